"""The labelling store loses nothing and gives no image twice, however many people and processes are at work."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from fedal_utils.labelling import HISTORY, Question, Store, store_path

CLASSES = ["cat", "dog", "<b>x</b>"]
BOX = {"class": "cat", "box": [1.0, 2.0, 30.5, 40.0]}


@pytest.fixture
def make(tmp_path):
    """A store with questions a, b, c, ...; several may share a file."""

    def build(count=5, classes=CLASSES, task="classes", name="labels.sqlite", clock=time.time):
        store = Store(tmp_path / name, classes, task)
        store.clock = clock
        store.queue(Question(image, score=1 - i / 10) for i, image in enumerate("abcdefghij"[:count]))
        return store

    return build


def label(store: Store, who: str, said: str = "cat", **told) -> str:
    """Answer the next question of this person; its image."""
    image = store.next(who).image
    store.answer(who, image, said, **told)
    return image


def test_an_answer_is_stored_with_everything_that_is_known_about_it(make):
    store = make(0, clock=lambda: 1_800_000_000.0)
    asked = Question("x/1.jpg", "margin", 0.25, cycle=4, size=(30, 40))
    assert store.queue([asked]) == 1
    held = store.next("Ann")
    assert held.id == 1 and list(held.size) == [30, 40] and held.score == 0.25
    store.answer("Ann", "x/1.jpg", "cat", seconds=3.5)
    frame = store.history()
    assert list(frame.columns) == HISTORY.split() and len(frame) == 1
    known = [
        2,
        "2027-01-15T08:00:00.000+00:00",
        "Ann",
        "x/1.jpg",
        4,
        "label",
        "cat",
        [30, 40],
        "margin",
        0.25,
        3.5,
        False,
    ]
    assert frame.iloc[0].tolist() == known  # action 1 notes the task and its classes
    assert store.labels() == {"x/1.jpg": "cat"} and store.next("Ann") is None
    assert store.progress() == {"all": 1, "labelled": 1, "unknown": 0, "waiting": 0}


def test_questions_come_in_the_order_they_were_queued_and_each_only_once(make):
    store = make(3)
    assert store.queue([Question("b"), Question("d"), Question("a")]) == 1  # d; the others are known
    assert store.queue([Question("a", cycle=1)]) == 1  # another cycle is another question
    assert store.cycles() == {"a": 1, "b": 0, "c": 0, "d": 0}
    order = []
    while (question := store.next("Ann")) is not None:
        order.append((question.image, question.cycle))
        store.answer("Ann", question.image, "cat" if question.cycle == 0 else "dog")
    assert order == [("a", 0), ("b", 0), ("c", 0), ("d", 0), ("a", 1)]
    assert store.labels() == {"a": "dog", "b": "cat", "c": "cat", "d": "cat"}  # the last one counts


def test_a_person_gets_the_same_image_until_they_answer_and_others_do_not(make):
    store = make(2)
    assert [store.next("Ann").image for _ in range(3)] == ["a", "a", "a"]
    assert store.next("Ann", "b").image == "b" and store.next("Ann", "a").image == "a"  # what was held goes back
    assert store.next("Ben").image == "b" and store.next("Cem") is None and store.next("Cem", "a") is None
    for who, image in (("Ben", "a"), ("Ann", "b"), ("Cem", "a"), ("Ann", "nothing")):
        with pytest.raises(ValueError, match="does not hold"):
            store.answer(who, image, "cat")
    store.answer("Ann", "a", "cat")
    with pytest.raises(ValueError, match="does not hold"):  # a double click
        store.answer("Ann", "a", "dog")
    assert store.labels() == {"a": "cat"} and store.next("Ann") is None


def test_a_lease_ends_but_is_good_until_somebody_else_has_the_image(make):
    now = [1_800_000_000.0]
    store = make(1, clock=lambda: now[0])
    store.next("Ann")
    now[0] += 29 * 60
    assert store.next("Ben") is None
    now[0] += 61
    assert store.next("Ben").image == "a" and store.next("Ann") is None
    with pytest.raises(ValueError, match="does not hold"):
        store.answer("Ann", "a", "cat")
    now[0] += 31 * 60
    store.answer("Ben", "a", "dog")  # late, but nobody took it
    assert store.labels() == {"a": "dog"} and store.history()["seconds"].tolist() == [31 * 60]  # since it was given


def test_a_skipped_image_comes_again_at_the_end_and_an_unknown_one_never(make):
    store = make(3)
    store.next("Ann"), store.skip("Ann", "a")
    store.next("Ann"), store.unknown("Ann", "b", seconds=2.0)
    assert label(store, "Ann") == "c" and store.next("Ben").image == "a" and store.next("Ann") is None
    assert store.labels() == {"c": "cat"}
    assert store.progress() == {"all": 3, "labelled": 1, "unknown": 1, "waiting": 1}


def test_undo_goes_back_step_by_step_and_gives_the_image_and_the_label_back(make):
    store = make(4)
    label(store, "Ann")
    store.next("Ann"), store.unknown("Ann", "b")
    store.next("Ann"), store.skip("Ann", "c")
    store.next("Ann")  # d
    taken = [(q.image, said) for q, said in (store.undo("Ann") for _ in range(3))]
    assert taken == [("c", None), ("b", None), ("a", "cat")]
    assert store.undo("Ann") is None and store.labels() == {} and store.next("Ben").image == "d"
    store.answer("Ann", "a", "dog")
    frame = store.history()
    assert frame["undone"].sum() == 3 and (frame["action"] == "undo").sum() == 3
    assert store.undo("Ann")[0].image == "a" and store.labels() == {}


def test_undo_is_ones_own_and_passes_over_a_skip_that_somebody_took_up(make):
    store = make(2)
    label(store, "Ann")
    assert store.undo("Ben") is None and store.labels() == {"a": "cat"}
    store.next("Ann"), store.skip("Ann", "b")
    assert label(store, "Ben", "dog") == "b"
    assert store.undo("Ann")[0].image == "a" and store.labels() == {"b": "dog"}


def test_what_is_no_label_no_time_and_no_name_is_refused_and_nothing_is_stored(make):
    store = make(1)
    store.next("Ann")
    for said in ("bird", "", None, 1, ["cat"], "CAT"):
        with pytest.raises(ValueError, match="one of cat, dog"):
            store.answer("Ann", "a", said)
    for seconds in (-1, NAN, INF, "3", True):
        with pytest.raises(ValueError, match="seconds"):
            store.answer("Ann", "a", "cat", seconds=seconds)
    for who in ("", " ", "x" * 101, "a\nb", None):
        with pytest.raises(ValueError, match="name"):
            store.next(who)
    assert len(store.history()) == 0 and store.next("Ann").image == "a"


NAN, INF = float("nan"), float("inf")
BAD = [[0, 0, 10], "0123", [0, 0, NAN, 5], [0, 0, INF, 5], [5, 0, 5, 10], [0, 9, 10, 3], [0, 0, 0.5, 10], None]
BAD += [[-20, 0, -5, 10], [-20, 0, 0.5, 10], [100, 0, 120, 10], [99.5, 0, 120, 10], [0, 0, "x", 5], [[0, 0, 9, 9]]]


def test_a_box_must_be_finite_upright_and_inside_by_a_pixel(make):
    store = make(1, task="boxes")
    store.next("Ann")
    for box in BAD:
        with pytest.raises(ValueError, match="list of boxes"):
            store.answer("Ann", "a", [BOX, {"class": "cat", "box": box}], size=(50, 100))
    assert len(store.history()) == 0


def test_a_box_that_reaches_over_the_edge_is_cut_to_the_image(make):
    store = make(2, task="boxes")
    store.queue([Question("q", size=(50, 100)), Question("r")])
    over = [{"class": "dog", "box": [-5, 10.5, np.float32(120), 70]}]
    cut = [{"class": "dog", "box": [0, 10.5, 100, 50]}]
    store.next("Ann"), store.answer("Ann", "a", over, size=(50, 100))
    store.next("Ann"), store.answer("Ann", "b", [])
    store.next("Ann"), store.answer("Ann", "q", over)  # the question knows the size
    assert store.labels() == {"a": cut, "b": [], "q": cut}
    for wrong in ([{"class": "cat"}], [{**BOX, "class": "bird"}], "cat", [1], None):
        with pytest.raises(ValueError, match="list of boxes"):
            store.answer("Ann", store.next("Ann").image, wrong)


def test_an_open_file_takes_new_classes_but_keeps_the_old_ones_and_the_task(make):
    store = make(1)
    assert make(0, ["owl", "cat"]).classes == ("cat", "dog", "<b>x</b>", "owl")
    label(store, "Ann")
    again = make(0, None, None)
    assert again.labels() == {"a": "cat"} and again.task == "classes" and again.classes[-1] == "owl"
    with pytest.raises(ValueError, match=r"labels\.sqlite .*holds the task 'classes', got 'boxes'"):
        make(0, CLASSES, "boxes")


def test_a_store_is_made_of_sensible_things(tmp_path):
    wrong = [{"classes": []}, {"classes": ["a", "a"]}, {"classes": "cat"}, {"classes": None}, {"classes": ["a\tb"]}]
    for one in (*wrong, {"task": "masks"}):
        with pytest.raises(ValueError):
            Store(tmp_path / "new.sqlite", **{"classes": CLASSES, **one})
    assert not (tmp_path / "new.sqlite").exists() and store_path(tmp_path) == tmp_path / "labels.sqlite"
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(ValueError, match="it is empty"):
        Store(tmp_path / "empty.sqlite")
    with Store(tmp_path / "empty.sqlite", CLASSES) as store:
        assert store.classes == tuple(CLASSES)


@pytest.mark.parametrize("damage", ["text", "page", "other"])
def test_a_damaged_file_is_named_and_left_as_it_is(make, damage):
    store = make(5)
    label(store, "Ann")
    store.close()
    if damage == "page":
        store.path.write_bytes(store.path.read_bytes()[:4096].ljust(store.path.stat().st_size, b"\x7f"))
    else:
        store.path.unlink()
        store.path.write_text("image,label\na,cat\n" * (damage == "text"))
    if damage == "other":
        with contextlib.closing(sqlite3.connect(store.path)) as db:
            db.execute("CREATE TABLE notes (text)")
    before = store.path.read_bytes()
    with pytest.raises(ValueError, match=r"labels\.sqlite cannot be used as a labelling store"):
        Store(store.path, CLASSES)
    assert store.path.read_bytes() == before


WORKER = """
import sys, time
from fedal_utils.labelling import Question, Store
print("ready", flush=True)
sys.stdin.readline()
store = Store(sys.argv[1], ["cat", "dog"])  # both make it at once
print(store.queue(Question(f"i{i}") for i in range(150)), flush=True)
while (question := store.next(sys.argv[2])) is not None:
    store.answer(sys.argv[2], question.image, "cat")
    print(question.image, flush=True)
    time.sleep(0.004)  # a waiting writer looks again every few milliseconds: let it have its turn
"""


def test_processes_race_and_one_is_killed_and_nothing_acknowledged_is_lost(tmp_path, root):
    path, environment = tmp_path / "new.sqlite", {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": environment}
    ann, ben = (subprocess.Popen([sys.executable, "-c", WORKER, path, who], **pipes) for who in ("Ann", "Ben"))
    try:
        assert ann.stdout.readline() == ben.stdout.readline() == "ready\n"
        for process in (ann, ben):
            print("go", file=process.stdin, flush=True)
        queued = ann.stdout.readline().strip()
        killed = [ann.stdout.readline().strip() for _ in range(15)]
        ann.send_signal(signal.SIGKILL)
        killed += ann.communicate()[0].splitlines()  # what it said before it died
        other, *rest = ben.communicate(timeout=60)[0].splitlines()
    finally:
        for process in (ann, ben):
            process.kill()
    assert ben.returncode == 0 and sorted([queued, other]) == ["0", "150"]
    with Store(path) as store:
        frame = store.history()
        assert not frame["image"].duplicated().any()
        stored = {who: list(rows["image"]) for who, rows in frame.groupby("who")}
        # An answer may be on disk that the killed process had no time to tell; never the other way round.
        assert stored["Ben"] == rest and stored["Ann"][: len(killed)] == killed
        assert len(stored["Ann"]) <= len(killed) + 1
        left = {f"i{i}" for i in range(150)} - set(frame["image"])
        assert left <= {store.next("Ann").image if left else None}  # at most what was leased to the one that died


def test_a_full_disk_is_told_with_the_name_of_the_file(make, tmp_path):
    store = make(5)
    label(store, "Ann")
    store._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(OSError, match=r"labels\.sqlite: database or disk is full"):
        store.queue(Question(f"more {i}", size=(9, 9)) for i in range(2000))
    assert store.next("Ann").image == "b"
    with pytest.raises(ValueError, match="unable to open database file"):
        Store(tmp_path, CLASSES)
