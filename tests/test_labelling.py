"""The labelling store loses nothing and gives no image twice; persons are repeatable; the page tells no names."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedal_utils import __main__ as command
from fedal_utils.labelling import page as labelling
from fedal_utils.labelling.page import NotHeld, Question, Replay, Simulated, Store

CLASSES = ["cat", "dog", "<b>x</b>"]
BOX = {"class": "cat", "box": [1.0, 2.0, 30.5, 40.0]}


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make(tmp_path):
    """A store with questions a, b, c, ...; several may share a file."""
    stores = []

    def build(count=5, classes=CLASSES, task="classes", name="labels.db", **more):
        store = Store(tmp_path / name, classes, task, **more)
        store.queue(Question(image, score=1 - i / 10) for i, image in enumerate("abcdefghij"[:count]))
        stores.append(store)
        return store

    yield build
    for store in stores:
        store.close()


# --- asking and answering ---------------------------------------------------------------------------------------------


def test_an_answer_is_stored_with_everything_that_is_known_about_it(make):
    store = make(0, clock=Clock())
    asked = Question("x/1.jpg", "x/1.jpg", "margin", 0.25, "ssd-3", "dog", cycle=4)
    assert store.queue([asked]) == 1
    assert store.next("Ann") == asked == store.held("Ann")
    store.answer("Ann", "x/1.jpg", "cat", 3.5, note="blurred", suggestion_shown=True)
    frame = store.history()
    assert tuple(frame.columns) == labelling.HISTORY and len(frame) == 1
    row = frame.iloc[0].to_dict()
    assert row.pop("when") == "2027-01-15T08:00:00.000+00:00"
    assert row == {
        "id": 1,
        "who": "Ann",
        "image": "x/1.jpg",
        "cycle": 4,
        "action": "label",
        "label": "cat",
        "strategy": "margin",
        "score": 0.25,
        "model": "ssd-3",
        "suggestion": "dog",
        "suggestion_shown": True,
        "seconds": 3.5,
        "note": "blurred",
        "undoes": row["undoes"],
        "undone": False,
    }
    assert store.labels() == {"x/1.jpg": "cat"} and store.next("Ann") is None
    assert store.progress() == {"all": 1, "labelled": 1, "unknown": 0, "waiting": 0, "held": 0, "skipped": 0}


def test_questions_come_in_the_order_they_were_queued_and_each_only_once(make):
    store = make(3)
    assert store.queue([Question("b"), Question("d"), Question("a")]) == 1  # d; the others are known
    assert store.queue([Question("a", cycle=1)]) == 1  # another cycle is another question
    order = []
    while (question := store.next("Ann")) is not None:
        order.append((question.image, question.cycle))
        store.answer("Ann", question.image, "cat" if question.cycle == 0 else "dog", 1.0)
    assert order == [("a", 0), ("b", 0), ("c", 0), ("d", 0), ("a", 1)]
    assert store.labels() == {"a": "dog", "b": "cat", "c": "cat", "d": "cat"}  # the last one counts


def test_a_person_gets_the_same_image_until_they_answer_and_others_do_not(make):
    store = make(2)
    assert [store.next("Ann").image for _ in range(3)] == ["a", "a", "a"]
    assert store.next("Ben").image == "b" and store.next("Cem") is None
    for who, image in (("Ben", "a"), ("Ann", "b"), ("Cem", "a"), ("Ann", "nothing")):
        with pytest.raises(NotHeld, match="holds"):
            store.answer(who, image, "cat", 1.0)
    store.answer("Ann", "a", "cat", 1.0)
    with pytest.raises(NotHeld):  # a double click
        store.answer("Ann", "a", "dog", 1.0)
    assert store.labels() == {"a": "cat"} and store.next("Ann") is None


def test_an_image_asked_in_two_cycles_is_with_one_person_at_a_time(make):
    store = make(1)
    store.queue([Question("a", cycle=1)])
    assert store.next("Ann").cycle == 0 and store.next("Ben") is None
    store.answer("Ann", "a", "cat", 1.0)
    assert store.next("Ben").cycle == 1


def test_a_lease_ends_but_is_good_until_somebody_else_has_the_image(make):
    clock = Clock()
    store = make(1, lease_minutes=30, clock=clock)
    store.next("Ann")
    clock.now += 29 * 60
    assert store.next("Ben") is None
    clock.now += 61
    assert store.progress()["held"] == 0
    assert store.next("Ben").image == "a" and store.held("Ann") is None
    with pytest.raises(NotHeld):
        store.answer("Ann", "a", "cat", 1.0)
    clock.now += 31 * 60
    store.answer("Ben", "a", "dog", 1.0)  # late, but nobody took it
    assert store.labels() == {"a": "dog"}


def test_asking_again_renews_the_lease_and_the_time_counts_from_the_first(make):
    clock = Clock()
    store = make(1, lease_minutes=30, clock=clock)
    store.next("Ann")
    clock.now += 20 * 60
    store.next("Ann")
    clock.now += 20 * 60
    assert store.next("Ben") is None and store.held_seconds("Ann") == 2400 and store.held_seconds("Ben") == 0


def test_a_skipped_image_goes_to_the_end_for_others(make):
    store = make(3)
    store.next("Ann")
    store.skip("Ann", "a")
    assert store.progress()["skipped"] == 1 and store.labels() == {}
    for image in "bc":
        assert store.next("Ann").image == image
        store.answer("Ann", image, "cat", 1.0)
    assert store.next("Ann") is None
    assert store.next("Ann", skipped=True).image == "a"
    store.skip("Ann", "a")
    assert store.next("Ben").image == "a"


def test_unknown_takes_an_image_out_of_the_queue_without_a_label(make):
    store = make(1)
    store.next("Ann")
    store.unknown("Ann", "a", 2.0)
    assert store.next("Ann") is None and store.next("Ben") is None and store.labels() == {}
    assert store.progress()["unknown"] == 1


# --- undo -------------------------------------------------------------------------------------------------------------


def test_undo_goes_back_step_by_step_and_gives_the_image_back(make):
    store = make(4)
    for image, act in (("a", "answer"), ("b", "unknown"), ("c", "skip")):
        assert store.next("Ann").image == image
        getattr(store, act)("Ann", image, *(["cat", 1.0] if act == "answer" else []))
    store.next("Ann")  # d
    assert [store.undo("Ann").image for _ in range(3)] == ["c", "b", "a"]
    assert store.undo("Ann") is None
    assert store.held("Ann").image == "a" and store.labels() == {} and store.progress()["held"] == 1
    store.answer("Ann", "a", "dog", 1.0)
    assert store.next("Ann").image == "b"  # taken back before: at the front
    frame = store.history()
    assert frame["undone"].sum() == 3 and list(frame["undoes"].dropna()) == [3, 2, 1]
    assert store.undo("Ann").image == "a" and store.labels() == {}


def test_undo_is_ones_own_and_passes_over_a_skip_that_somebody_took_up(make):
    store = make(2)
    store.next("Ann"), store.answer("Ann", "a", "cat", 1.0)
    assert store.undo("Ben") is None and store.labels() == {"a": "cat"}
    store.next("Ann"), store.skip("Ann", "b")
    store.next("Ben"), store.answer("Ben", "b", "dog", 1.0)
    assert store.undo("Ann").image == "a" and store.labels() == {"b": "dog"}


def test_the_label_that_was_taken_back_is_known_until_the_next_one(make):
    store = make(1, task="boxes")
    question = store.next("Ann")
    assert store.taken_back("Ann", question) is None
    store.answer("Ann", "a", [BOX], 1.0)
    store.undo("Ann")
    assert store.taken_back("Ann", question) == [BOX] and store.taken_back("Ben", question) is None
    store.answer("Ann", "a", [], 1.0)
    assert store.taken_back("Ann", question) is None


def test_actions_are_never_changed_not_even_by_hand(make):
    store = make(1)
    store.next("Ann"), store.answer("Ann", "a", "cat", 1.0)
    db = sqlite3.connect(store.path)
    for order in ("UPDATE actions SET label = '\"dog\"'", "DELETE FROM actions"):
        with pytest.raises(sqlite3.DatabaseError, match="only appended"):
            db.execute(order)
    db.close()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["bird", "", None, 1, ["cat"], "CAT"])
def test_an_unknown_class_is_refused_and_nothing_is_stored(make, label):
    store = make(1)
    store.next("Ann")
    with pytest.raises(ValueError, match="image 'a'.*allowed are cat, dog"):
        store.answer("Ann", "a", label, 1.0)
    assert len(store.history()) == 0 and store.held("Ann").image == "a"


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 10],
        "0123",
        [0, 0, float("nan"), 5],
        [0, 0, float("inf"), 5],
        [5, 0, 5, 10],
        [0, 9, 10, 3],
        [0, 0, 0.5, 10],
        [-20, 0, -5, 10],
        [-20, 0, 0.5, 10],
        [100, 0, 120, 10],
        [99.5, 0, 120, 10],
        [0, 0, True, 5],
        [0, 0, "4", 5],
        None,
    ],
)
def test_a_box_must_be_finite_upright_and_inside_by_a_pixel(make, box):
    store = make(1, task="boxes")
    store.next("Ann")
    with pytest.raises(ValueError, match="image 'a'"):
        store.answer("Ann", "a", [BOX, {"class": "cat", "box": box}], 1.0, size=(50, 100))
    assert len(store.history()) == 0


def test_a_box_that_reaches_over_the_edge_is_cut_to_the_image(make):
    store = make(3, task="boxes")
    store.next("Ann")
    store.answer("Ann", "a", [{"class": "dog", "box": [-5, 10.5, np.float32(120), 70]}], 1.0, size=(50, 100))
    store.next("Ann")
    store.answer("Ann", "b", [], 1.0)
    store.next("Ann")
    store.answer("Ann", "c", [BOX], 1.0)  # the size is not known: 0 is the edge all the same
    assert store.labels() == {"a": [{"class": "dog", "box": [0, 10.5, 100, 50]}], "b": [], "c": [BOX]}
    for wrong in ([{"class": "cat"}], [{**BOX, "score": 1}], [{**BOX, "class": "bird"}], "cat", [1], None):
        with pytest.raises(ValueError, match="image 'c'"):
            labelling.checked_label(wrong, "boxes", CLASSES, "image 'c'")


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "3", True])
def test_seconds_are_a_number_from_zero_up(make, seconds):
    store = make(1)
    store.next("Ann")
    with pytest.raises(ValueError, match="seconds"):
        store.answer("Ann", "a", "cat", seconds)


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "a/../../b", "..\\b", "C:\\x.jpg", "\\x", "", "a\nb", 3])
def test_names_that_leave_the_folder_are_refused(name):
    for what in ({"image": name}, {"image": "a", "file": name}):
        if name != "" or "file" not in what:
            with pytest.raises(ValueError, match="not allowed"):
                Question(**what)


def test_a_question_must_make_sense(make):
    for wrong in ({"score": float("nan")}, {"cycle": -1}, {"cycle": 0.5}):
        with pytest.raises(ValueError, match="image 'a'"):
            Question("a", **wrong)
    store = make(1)
    with pytest.raises(ValueError, match="image 'z', suggestion"):
        store.queue([Question("y"), Question("z", suggestion="bird")])
    assert store.progress()["all"] == 1  # all or none
    for who in ("", " ", "x" * 101, "a\nb", None):
        with pytest.raises(ValueError, match="name"):
            store.next(who)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_an_open_file_takes_new_classes_but_keeps_the_old_ones_and_the_task(make):
    store = make(1)
    assert store.add_class("fox", "Ann") and not store.add_class("fox", "Ben")
    assert make(0, [*CLASSES, "owl"]).classes == ("cat", "dog", "<b>x</b>", "fox", "owl")
    assert make(0, CLASSES + ["owl"]).classes == store.classes  # a class found on the way need not be given
    store.next("Ann"), store.answer("Ann", "a", "fox", 1.0)
    assert make(0, None).labels() == {"a": "fox"}
    with pytest.raises(ValueError, match=r"labels\.db has the class 'dog'.*cat, dog"):
        make(0, ["cat", "<b>x</b>", "owl"])
    with pytest.raises(ValueError, match=r"labels\.db holds the task 'classes', got 'boxes'"):
        make(0, CLASSES, "boxes")
    for name in ("", " ", "a\tb", "x" * 101, 3):
        with pytest.raises(ValueError, match="class name"):
            store.add_class(name)


def test_a_store_is_made_of_sensible_things(tmp_path):
    for wrong in ({"classes": []}, {"classes": ["a", "a"]}, {"classes": "cat"}, {"task": "masks"}, {"classes": None}):
        with pytest.raises(ValueError):
            Store(tmp_path / "new.db", **{"classes": CLASSES, **wrong})
    with pytest.raises(ValueError, match="lease_minutes"):
        Store(tmp_path / "new.db", CLASSES, lease_minutes=0)
    assert not (tmp_path / "new.db").exists()


def damage_text(path: Path) -> None:
    path.write_text("image,label\na,cat\n")


def damage_cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\x7f" * (len(content) - 4096)
    path.write_bytes(content)


def damage_other(path: Path) -> None:
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE notes (text)")
    db.close()


@pytest.mark.parametrize("damage", [damage_text, damage_cut, damage_page, damage_other], ids=lambda d: d.__name__[7:])
def test_a_damaged_file_is_named_and_left_as_it_is(make, tmp_path, damage):
    store = make(5)
    store.next("Ann"), store.answer("Ann", "a", "cat", 1.0)
    store.close()
    damage(store.path)
    before = store.path.read_bytes()
    with pytest.raises(ValueError, match=r"labels\.db is damaged or no labelling store"):
        Store(store.path, CLASSES)
    assert store.path.read_bytes() == before


def test_an_empty_file_is_a_new_store(tmp_path):
    (tmp_path / "labels.db").touch()
    with Store(tmp_path / "labels.db", CLASSES) as store:
        assert store.classes == tuple(CLASSES)


# --- threads and processes --------------------------------------------------------------------------------------------


def test_threads_that_race_never_get_the_same_image(make):
    stores = [make(0, name="race.db") for _ in range(2)]
    images = [f"i{i}" for i in range(60)]
    stores[0].queue(map(Question, images))
    got, errors, gate = [], [], threading.Barrier(4)

    def work(number: int) -> None:
        try:
            store, who = stores[number % 2], f"p{number}"
            gate.wait()
            while (question := store.next(who)) is not None:
                got.append(question.image)
                store.answer(who, question.image, "cat", 0.1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and sorted(got) == sorted(images) and len(stores[1].labels()) == 60


WORKER = """
import sys, time
from fedal_utils.labelling import Store
store = Store(sys.argv[1], None)
print("ready", flush=True)
sys.stdin.readline()
while (question := store.next(sys.argv[2])) is not None:
    store.answer(sys.argv[2], question.image, "cat", 0.1)
    print(question.image, flush=True)
    time.sleep(0.004)  # a waiting writer looks again every few milliseconds: let it have its turn
"""


def worker(path: Path, who: str, root: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), who],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=path.parent,
    )


def test_processes_race_and_one_is_killed_and_nothing_acknowledged_is_lost(make, root):
    store = make(0)
    images = [f"i{i}" for i in range(150)]
    store.queue(map(Question, images))
    workers = [worker(store.path, who, root) for who in ("Ann", "Ben")]
    try:
        for process in workers:
            assert process.stdout.readline() == "ready\n"
        for process in workers:
            process.stdin.write("go\n")
            process.stdin.flush()
        killed = [workers[0].stdout.readline().strip() for _ in range(15)]
        workers[0].send_signal(signal.SIGKILL)
        rest = workers[0].communicate()[0].splitlines()  # what it said before it died
        acknowledged = {"Ann": killed + rest, "Ben": workers[1].communicate(timeout=60)[0].splitlines()}
    finally:
        for process in workers:
            process.kill()
    assert workers[1].returncode == 0
    frame = make(0, None).history()
    assert not frame["image"].duplicated().any()
    stored = {who: list(rows["image"]) for who, rows in frame.groupby("who")}
    assert stored["Ben"] == acknowledged["Ben"]
    # An answer may be on disk that the killed process had no time to tell; never the other way round.
    assert stored["Ann"][: len(acknowledged["Ann"])] == acknowledged["Ann"]
    assert len(stored["Ann"]) <= len(acknowledged["Ann"]) + 1
    left = set(images) - set(frame["image"])
    assert len(left) <= 1  # the image that was leased to the one that died
    assert left == ({store.held("Ann").image} if left else set())


def test_processes_may_make_the_same_store_at_the_same_time(tmp_path, root):
    code = (
        "import sys; from fedal_utils.labelling import *; print('ready', flush=True); sys.stdin.readline(); "
        "s = Store('new.db', ['cat', 'dog']); print(s.queue(map(Question, 'abc')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60) for process in both]
    assert sorted(out.strip() for out, _ in told) == ["0", "3"], told


# --- persons ----------------------------------------------------------------------------------------------------------


def test_a_simulated_person_without_error_gives_the_truth_and_takes_time(make):
    truth = {"a": [BOX, {**BOX, "class": "dog"}], "b": []}
    store = make(2, task="boxes")
    assert Simulated(truth).answer_all(store, "Sim") == 2
    assert store.labels() == truth and list(store.history()["seconds"]) == [2 + 14, 2]
    with pytest.raises(ValueError, match="no image 'c'"):
        make(3, task="boxes")
        Simulated(truth).answer_all(store, "Sim")


def test_the_errors_of_a_simulated_person_do_not_depend_on_the_order(make):
    truth = {f"i{i}": CLASSES[i % 3] for i in range(200)}
    told = []
    for order in (1, -1):
        store = make(0, name=f"order{order}.db")
        store.queue(map(Question, list(truth)[::order]))
        Simulated(truth, error=0.2, seed=3).answer_all(store, "Sim")
        told.append(store.labels())
    assert told[0] == told[1]
    wrong = sum(told[0][image] != truth[image] for image in truth)
    assert 25 <= wrong <= 55  # 40 of 200 are expected
    assert Simulated(truth, error=1.0).label("i0", "classes", CLASSES) != "cat"
    assert Simulated(truth, error=1.0).label("i0", "classes", ["cat"]) == "cat"  # nothing to mistake it for
    boxes = Simulated({"a": [BOX] * 50}, error=0.3, seed=1).label("a", "boxes", CLASSES)
    assert 5 <= sum(thing["class"] != "cat" for thing in boxes) <= 25 and all(t["box"] == BOX["box"] for t in boxes)
    with pytest.raises(ValueError, match="probability"):
        Simulated({}, error=1.5)


def test_a_replay_gives_the_same_labels_again(make):
    first = make(4, name="first.db")
    for image, label in (("a", "cat"), ("b", None), ("c", "dog"), ("d", "dog")):
        first.next("Ann")
        if label is None:
            first.unknown("Ann", image, 1.5, note="dark")
        else:
            first.answer("Ann", image, label, 2.5)
    first.undo("Ann")
    first.answer("Ann", "d", "cat", 4.0)
    again = make(4, name="again.db")
    assert Replay(first.history()).answer_all(again, "Rob") == 4
    assert again.labels() == first.labels() == {"a": "cat", "c": "dog", "d": "cat"}
    assert list(again.history()["seconds"]) == [2.5, 1.5, 2.5, 4.0] and again.progress()["unknown"] == 1
    again.queue([Question("z")])
    with pytest.raises(ValueError, match="no answer to image 'z'"):
        Replay(first.history()).answer_all(again, "Rob")
    with pytest.raises(ValueError, match="missing"):
        Replay(first.history().drop(columns="undone"))


# --- images -----------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG that claims a size; no pixels behind it."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_are_no_images_or_too_large_are_refused_by_name(tmp_path):
    (tmp_path / "huge.png").write_bytes(png_of(10_000, 10_000))
    (tmp_path / "vast.png").write_bytes(png_of(60_000, 60_000))
    (tmp_path / "page.jpg").write_text("<script>alert(1)</script>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "short.png").write_bytes(png_of(8, 8))
    (tmp_path / "folder.jpg").mkdir()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    names = [
        "huge.png",
        "vast.png",
        "page.jpg",
        "empty.jpg",
        "short.png",
        "folder.jpg",
        "deep.png",
        "pipe.jpg",
        "no.jpg",
    ]
    for name in names:
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            labelling.read_image(tmp_path / name)
    with pytest.raises(ValueError, match="10000 x 10000 pixels.*at most 80,000,000"):
        labelling.read_image(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="uint8"):
        labelling.read_image(np.zeros((4, 4, 3)), "a")


def test_an_image_is_shown_upright_and_boxes_find_their_way_back(tmp_path, make):
    picture = Image.fromarray(np.zeros((20, 40, 3), dtype=np.uint8))  # 40 wide; turned by EXIF: 20 wide
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    store = make(0, task="boxes")
    store.queue([Question("turned.jpg", suggestion=[{"class": "dog", "box": [2, 4, 10, 20]}])])
    desk = labelling._Desk(store, {"turned.jpg": tmp_path / "turned.jpg"}, True, False)
    screen = desk.start("Ann")
    view, boxes = screen["picture"]
    assert view.size == (40, 20) and view.shown == (900, 450) and boxes == [{"class": "dog", "box": [2, 4, 10, 20]}]
    drawn = labelling._drawable(view, boxes, store.classes)["boxes"][0]
    assert [drawn[s] for s in ("xmin", "ymin", "xmax", "ymax")] == [45, 90, 225, 450] and drawn["label"] == "dog"
    sent = json.dumps([{"label": "dog", "box": [45, 90, 225, 450]}, {"label": "cat", "box": [-9, 0, 451, 45]}])
    assert desk.act("label", "Ann", screen["key"], None, "", "1.5", sent)["stage"] == "done"
    label = store.labels()["turned.jpg"]
    assert label[0] == {"class": "dog", "box": [2, 4, 10, 20]} and label[1] == {"class": "cat", "box": [0, 0, 20, 2]}
    assert store.history()["suggestion_shown"].tolist() == [True]


# --- what the page does, without a browser ----------------------------------------------------------------------------


@pytest.fixture
def desk(make, tmp_path):
    store = make(0, clock=Clock())
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    names = ["dog/rex.png", "dog/<i>.png", "cat/tom.png"]
    store.queue(Question(n, n, "<b>margin</b>", 0.5, "ssd", "dog") for n in names)
    return labelling._Desk(store, dict.fromkeys(names, pixels), False, False)


def test_nothing_the_browser_gets_tells_the_name_or_the_suggestion(desk):
    screen = desk.start("Ann")
    text = repr(screen)
    assert "rex.png" not in text and "suggest" not in text and screen["chosen"] is None
    assert screen["about"] == "&lt;b&gt;margin&lt;/b&gt; · score 0.5 · ssd"
    assert screen["picture"][0].url.startswith("data:image/jpeg;base64,")
    assert "&lt;b&gt;" in labelling._say("<b>x</b>") and "&lt;i" in desk.start("<i>")["bar"]
    loud = labelling._Desk(desk.store, desk.images, True, True)
    assert loud.start("Ann")["about"].endswith("dog/rex.png<br><span class='suggestion'>suggested: <b>dog</b></span>")


def test_a_click_on_an_image_that_is_gone_stores_nothing(desk):
    first = desk.start("Ann")
    assert desk.act("label", "Ann", first["key"], None, "", 1)["message"] == "Choose a class first."
    second = desk.act("label", "Ann", first["key"], "cat", "a note", 1)
    assert second["stage"] == "work" and second["key"] != first["key"]
    stale = desk.act("label", "Ann", first["key"], "dog", "", 1)  # the second of two quick clicks
    assert "no longer" in stale["message"] and stale["key"] == second["key"]
    assert len(desk.store.history()) == 1
    for who, key in (("", first["key"]), ("Ann", ""), ("Ann", None), ("Ben", second["key"])):
        desk.act("label", who, key, "dog", "", 1)
    assert len(desk.store.history()) == 1
    message = desk.act("label", "Ann", second["key"], "bird", "", 1)["message"]
    assert "bird" in message and "dog/" not in message


def test_the_seconds_are_those_of_the_browser_but_no_more_than_passed(desk):
    for told, stored in ((4.5, 4.5), (1e9, 10.0), (float("nan"), 10.0), (-3, 10.0)):
        screen = desk.start("Ann")
        desk.store._clock.now += 10
        desk.act("label", "Ann", screen["key"], "cat", "", told)
        assert desk.store.history()["seconds"].iloc[-1] == stored
        desk.undo("Ann")


def test_a_picture_that_cannot_be_shown_is_told_and_can_be_passed_over(desk, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    desk.images["dog/rex.png"] = tmp_path / "x.png"
    with pytest.warns(UserWarning, match="x.png cannot be read"):
        screen = desk.start("Ann")
    assert screen["picture"] is None and "cannot be shown" in screen["message"] and "x.png" not in screen["message"]
    assert desk.act("unknown", "Ann", screen["key"], None, "", 1)["picture"] is not None


def test_skipped_images_can_be_asked_for_at_the_end(desk):
    for _ in range(3):
        screen = desk.act("skip", "Ann", desk.start("Ann")["key"], None, "", 1)
    assert screen["stage"] == "done" and "3 skipped" in screen["left"]
    assert desk.again("Ann")["stage"] == "work"
    assert "nothing to take back" in desk.undo("Ben")["message"]
    assert desk.add_class("<u>", "Ann")["classes"][-1] == "<u>" and "already" in desk.add_class("cat", "Ann")["message"]
    assert "class name" in desk.add_class(" ", "Ann")["message"]


def test_every_class_has_its_own_key_and_none_is_taken_twice():
    assert len(set(labelling.KEYS)) == len(labelling.KEYS) == 30 and not set(labelling.KEYS) & set("usi?cde")


# --- starting it ------------------------------------------------------------------------------------------------------


def test_without_gradio_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(labelling.importlib.util, "find_spec", lambda name: None)
    assert command.main(["label", "--data", str(tmp_path), "--classes", "cat", "dog"]) == 2
    said = capsys.readouterr().err
    assert said == "error: the labelling page needs gradio: pip install 'fedal[label]'\n"
    assert list(tmp_path.iterdir()) == [] and not Path(f"{tmp_path}.labels.db").exists()


def test_the_package_imports_without_gradio(root):
    code = "import sys; sys.modules['gradio'] = None; import fedal_utils.labelling, fedal_utils.__main__"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_a_folder_is_walked_and_a_wrong_one_is_refused(tmp_path):
    for name in ("b.PNG", "sub/a.jpg", ".hidden/c.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(labelling.find_images(tmp_path)) == ["b.PNG", "sub/a.jpg"]
    with pytest.raises(ValueError, match="does not exist"):
        labelling.find_images(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        labelling.find_images(tmp_path / "bare")
