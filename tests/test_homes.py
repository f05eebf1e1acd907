"""Homes: sets on disk bit for bit, who is dealt what, a client that gives the same answer twice, what a human changes.

Nothing here needs Flower: `homes` is what a client does between two messages.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedal_utils import config, data, papers, record, seeding
from fedal_utils.data import Dataset, Images, Labels
from fedal_utils.federation import experiment as alfl
from fedal_utils.flower import workspace as homes
from fedal_utils.labelling import page as labelling
from fedal_utils.papers import flywheel
from fedal_utils.sampling.pool import Bill, Oracle, Pool

TINY = dict(
    scenes=(30, 4),
    digit_classes=3,
    image_size=(32, 32),
    clients=2,
    initial_model_images=4,
    held_out_images=3,
    initial_labels=3,
    query_size=2,
    cycles=3,
    rounds=2,
    iterations=1,
    batch=4,
    initial_model_iterations=0,
)
SIZE = (40, 60)  # height, width
NAMES = ("cat", "dog", "owl")


def tiny(**changes) -> config.Config:
    return papers.load("60_real_clients", "smoke", seeds=[0], **{**TINY, **changes})


def drawn(ids, boxes, classes, ignore=None, crowd=None, size=SIZE) -> Dataset:
    """A set of noise with these objects; boxes (N, K, 4), classes (N, K) with 0 = padding."""
    rng = torch.Generator().manual_seed(len(ids))
    pixels = torch.randint(0, 256, (len(ids), 3, *size), generator=rng, dtype=torch.uint8)
    classes = torch.as_tensor(classes)
    never = torch.zeros_like(classes, dtype=torch.bool)
    flags = [never.clone() if flag is None else torch.as_tensor(flag) & (classes > 0) for flag in (ignore, crowd)]
    labels = Labels(torch.as_tensor(boxes, dtype=torch.float32), classes, flags[0] | flags[1], flags[1])
    return Dataset("drawn", Images(tuple(ids), pixels, torch.tensor([size] * len(ids))), labels, NAMES)


def objects(part: Dataset) -> list[tuple]:
    """Of each image: id, and boxes as bytes, class name, ignore and crowd of each object, padding left out."""
    labels, out = part.labels, []
    for i, sample in enumerate(part.images.ids):
        rows = torch.nonzero(labels.classes[i])[:, 0].tolist()
        found = [
            (
                labels.boxes[i, j].numpy().tobytes(),
                part.class_names[int(labels.classes[i, j]) - 1],
                bool(labels.ignore[i, j]),
                bool(labels.crowd[i, j]),
            )
            for j in rows
        ]
        out.append((sample, found))
    return out


def pixels_of(part: Dataset) -> torch.Tensor:
    return part.images.batch(range(len(part)))


# --- sets on disk -----------------------------------------------------------------------------------------------------


def test_a_written_set_reads_back_with_the_same_pixels_ids_boxes_and_flags(tmp_path):
    train, _ = data.load("digits", SIZE, scenes=(12, 4), digit_classes=3, min_object=9.0)
    assert train.labels.ignore.any() and not train.labels.ignore.all()
    homes.write_set(tmp_path / "home", train)
    for classes in ((), train.class_names):
        read = homes.read_set(tmp_path / "home", tiny(image_size=SIZE, min_object=9.0), classes)
        assert torch.equal(pixels_of(read), pixels_of(train)) and read.images.image_size == SIZE
        assert objects(read) == objects(train) and read.class_names == train.class_names
    read = homes.read_set(tmp_path / "home", tiny(image_size=SIZE))
    assert objects(read) == objects(train), "flags are those of the set that was written, not judged again"


sides = st.tuples(
    st.floats(0, 60, width=32), st.floats(0, 40, width=32), st.floats(0, 60, width=32), st.floats(0, 40, width=32)
).filter(lambda b: b[0] != b[2] and b[1] != b[3])


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.tuples(sides, st.integers(1, 3), st.booleans(), st.booleans()), max_size=4), min_size=1, max_size=3
    )
)
def test_any_float32_box_comes_back_bit_for_bit(pictures):
    most = max(1, *(len(picture) for picture in pictures))
    boxes, classes = torch.zeros(len(pictures), most, 4), torch.zeros(len(pictures), most, dtype=torch.int64)
    ignore, crowd = (torch.zeros(len(pictures), most, dtype=torch.bool) for _ in range(2))
    for i, picture in enumerate(pictures):
        for j, ((a, b, c, d), number, ignored, crowded) in enumerate(picture):
            boxes[i, j] = torch.tensor([min(a, c), min(b, d), max(a, c), max(b, d)])
            classes[i, j], ignore[i, j], crowd[i, j] = number, ignored, crowded
    part = drawn([f"{i}" for i in range(len(pictures))], boxes + 0.0, classes, ignore, crowd)
    with tempfile.TemporaryDirectory() as folder:
        read = homes.read_set(homes.write_set(folder, part).parent, tiny(image_size=SIZE))
    assert objects(read) == objects(part)
    assert torch.equal(pixels_of(read), pixels_of(part)) and read.class_names == NAMES


def test_a_box_at_the_limit_of_too_small_is_judged_once(tmp_path):
    """Scaled by 1/5, sides of 40 pixels are 8; in float32 some are a little less, and would be ignored at home only."""
    lefts = [x for x in range(1, 120) if x % 5 < 2]
    pictures = [miniatures.Picture(f"{x:03d}", (160, 160), (("cat", (x, 3, x + 40, 60)),)) for x in lefts]
    file = miniatures.coco(tmp_path / "all", pictures) / "annotations" / "instances.json"
    found = data.read_coco(file, tmp_path / "all" / "images", (32, 32), min_object=8.0)
    boxes = found.labels.boxes[:, 0].double()
    less = boxes[:, 2] - boxes[:, 0] < 8.0
    assert (less & ~found.labels.ignore[:, 0]).any(), "the case is there"
    homes.write_set(tmp_path / "home", found)
    assert objects(homes.read_set(tmp_path / "home", tiny(min_object=8.0))) == objects(found)


def test_boxes_of_a_folder_that_somebody_filled_are_judged_at_home(tmp_path):
    """Of 60 x 40 pixels in 32 x 32 the scale is 8/15: sides of 20 and 18 are 10.7 and 9.6."""
    miniatures.coco(tmp_path / "house", miniatures.THREE[:1], file="annotations.json")
    read = homes.read_set(tmp_path / "house", tiny(min_object=10.0))
    assert read.labels.ignore.tolist() == [[False, True]] and read.images.ids == ("a.png",)


IDS = ("plain", "with.dot", "photo.JPG", "scan.png", "town/a.jpg", "town/b", "town.old/a.jpg", "ünicode & spaces", ".x")


def test_ids_with_and_without_suffix_and_with_folders_come_back_as_they_are(tmp_path):
    part = drawn(IDS, torch.tensor([[[1.5, 2.0, 9.0, 8.25]]]).repeat(len(IDS), 1, 1), [[2]] * len(IDS))
    homes.write_set(tmp_path, part)
    read = homes.read_set(tmp_path, tiny(image_size=SIZE))
    assert read.images.ids == IDS and torch.equal(pixels_of(read), pixels_of(part))
    files = {p.relative_to(tmp_path / "images").as_posix() for p in (tmp_path / "images").rglob("*") if p.is_file()}
    assert files == {
        "plain.png",
        "with.dot.png",
        "photo.png",
        "scan.png",
        "town/a.png",
        "town/b.png",
        "town.old/a.png",
        "ünicode & spaces.png",
        ".x.png",
    }


@pytest.mark.parametrize("twins", [("a.jpg", "a.png"), ("a", "a.png"), ("d/a.jpg", "d/a.JPEG")])
def test_two_samples_of_one_file_name_are_refused(twins, tmp_path):
    part = drawn(twins, torch.tensor([[[1.0, 2, 9, 8]]] * 2), [[1], [1]])
    with pytest.raises(ValueError, match=r"two samples of 'drawn' share the file name '(d/)?a.png'"):
        homes.write_set(tmp_path, part)


@pytest.mark.parametrize("sample", ["../a", "/etc/a", "a/../../b", "C:/a", "a\nb"])
def test_an_id_that_leaves_the_folder_is_refused(sample, tmp_path):
    with pytest.raises(ValueError, match="is not allowed"):
        homes.write_set(tmp_path / "home", drawn([sample], torch.tensor([[[1.0, 2, 9, 8]]]), [[1]]))
    assert [p.name for p in tmp_path.rglob("*.png")] == []


def test_class_names_come_back_where_a_home_lacks_a_class(tmp_path):
    part = drawn(
        "ab", torch.tensor([[[1.0, 2, 9, 8], [0, 0, 0, 0]], [[3.0, 4, 50, 40], [0, 0, 9, 9]]]), [[3, 0], [3, 1]]
    )
    homes.write_set(tmp_path, part)
    for classes in ((), NAMES):
        read = homes.read_set(tmp_path, tiny(image_size=SIZE), classes)
        assert read.class_names == NAMES and read.labels.classes.tolist() == [[3, 0], [3, 1]]


def test_classes_of_a_folder_are_mapped_to_everybodys_order(tmp_path):
    """The folder's own order is cat, dog; the experiment's is dog, owl, cat."""
    place = miniatures.voc(tmp_path / "house", splits={"train": ["a", "b"], "test": ["c"]})
    own = homes.read_set(place, tiny(image_size=SIZE))
    assert own.class_names == ("cat", "dog") and own.labels.classes.tolist() == [[1, 2], [2, 0]]
    read = homes.read_set(place, tiny(image_size=SIZE), ("dog", "owl", "cat"))
    assert read.class_names == ("dog", "owl", "cat") and read.labels.classes.tolist() == [[3, 1], [1, 0]]
    assert objects(read) == objects(own) and torch.equal(pixels_of(read), pixels_of(own))
    with pytest.raises(ValueError, match=r"house has objects of class 'dog'; the experiment knows cat, owl"):
        homes.read_set(place, tiny(image_size=SIZE), ("cat", "owl"))


def test_a_folder_without_annotations_has_everybodys_classes_and_no_labels(tmp_path):
    read = homes.read_set(miniatures.folder(tmp_path / "house"), tiny(image_size=SIZE), ("x", "y"))
    assert read.labels is None and read.class_names == ("x", "y")
    with pytest.raises(ValueError, match="client c: .*house has no annotations, so nobody can be simulated"):
        home = homes.Home(tmp_path / "house", "c")
        with home.client(home.run(tiny(), "n", "avg", 0), home.study(tiny(), ("x", "y"), "cpu"), 0, 0):
            pass


# --- handing out ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dealt(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("dealt") / "place"
    assert homes.deal(tiny(), place, seed=0) == ["00", "01"]
    return place


@pytest.fixture
def place(dealt, tmp_path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(dealt, tmp_path / "place")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def test_everybody_gets_what_a_run_of_that_seed_gives_them_and_nobody_shares(dealt):
    settings = tiny()
    train, test = data.load("digits", (32, 32), scenes=(30, 4), digit_classes=3)
    first, parts, names = alfl.share_out(settings, train, 0)
    held = alfl.held_out(settings, train, 0)
    assert sorted(p.name for p in (dealt / "clients").iterdir()) == names
    seen: list[str] = []
    for name, rows in zip(names, parts, strict=True):
        own = homes.read_set(dealt / "clients" / name, settings, train.class_names)
        assert objects(own) == objects(train.take(rows))
        assert torch.equal(pixels_of(own), pixels_of(train.take(rows)))
        seen += own.images.ids
    study = homes.server_study(dealt, settings)
    assert objects(study.train.take(study.start_rows(0))) == objects(train.take(first))
    assert objects(study.train.take(study.held_out(0))) == objects(train.take(held))
    assert len(study.train) == 4 + 3 and study.name == "digits" and study.class_names == train.class_names
    assert objects(study.test) == objects(test) and torch.equal(pixels_of(study.test), pixels_of(test))
    seen += study.train.images.ids
    assert sorted(seen) == sorted(train.images.ids), "all of them, each once"


def test_each_client_may_have_a_part_of_the_test_images(dealt, tmp_path):
    homes.deal(tiny(), tmp_path / "place", tests=True)
    _, test = data.load("digits", (32, 32), scenes=(30, 4), digit_classes=3)
    for place, name in enumerate(("00", "01")):
        part = homes.read_set(tmp_path / "place" / "clients" / name / "test", tiny(), test.class_names)
        assert objects(part) == objects(test.take([place, place + 2]))
        own, other = (homes.read_set(root / "clients" / name, tiny()) for root in (tmp_path / "place", dealt))
        assert objects(own) == objects(other), "and trains on what it would"
    assert objects(homes.server_study(tmp_path / "place", tiny()).test) == objects(test)
    assert not list((dealt / "clients").glob("*/test"))


def test_another_seed_deals_otherwise_and_says_so(dealt, tmp_path):
    homes.deal(tiny(), tmp_path / "other", seed=3)
    train, _ = data.load("digits", (32, 32), scenes=(30, 4), digit_classes=3)
    _, parts, _ = alfl.share_out(tiny(), train, 3)
    own = homes.read_set(tmp_path / "other" / "clients" / "00", tiny())
    assert own.images.ids == tuple(train.images.ids[row] for row in parts[0])
    assert own.images.ids != homes.read_set(dealt / "clients" / "00", tiny()).images.ids
    assert homes.facts_of(tmp_path / "other")["dealt"]["seed"] == 3
    with pytest.raises(ValueError, match=r"was dealt for another experiment \(seed = 3, now 0\)"):
        homes.deal(tiny(), tmp_path / "other", seed=0)


def test_a_place_is_dealt_once(place):
    before = contents(place)
    assert homes.deal(tiny(), place, seed=0) == ["00", "01"]
    assert homes.deal(tiny(lr=0.1, cycles=2, first=4, methods=("sum",)), place) == ["00", "01"]
    assert contents(place) == before
    assert homes.dealt_as(tiny(), 0) == homes.dealt_as(tiny(lr=0.1, rounds=7), 0) != homes.dealt_as(tiny(), 1)


CHANGES = [
    ("clients", 3),
    ("scenes", (31, 4)),
    ("image_size", (32, 40)),
    ("start_images", 5),
    ("merge_images", 2),
    ("partition", "dirichlet"),
    ("alpha", 0.1),
    ("min_object", 2.0),
    ("digit_classes", 4),
    ("limit", (20, 4)),
]


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_a_place_dealt_for_another_experiment_is_refused_by_the_settings_name(name, value, place):
    before, old = contents(place), json.dumps(getattr(tiny(), name))
    text = rf"{name} = .*give another place, or delete it"
    with pytest.raises(ValueError, match=text):
        homes.deal(tiny(**{name: value}), place)
    with pytest.raises(ValueError, match=rf"place was dealt with {name} = .*hand the data out again, elsewhere"):
        homes.server_study(place, tiny(**{name: value}))
    assert contents(place) == before and homes.dealt_as(tiny(**{name: value}), 0) != homes.dealt_as(tiny(), 0)
    assert json.dumps(homes.facts_of(place)["dealt"][name]) == old


def test_a_place_that_was_not_dealt_to_its_end_is_refused_and_half_of_one_is_never_seen(place, tmp_path, monkeypatch):
    (place / "server" / "federation.json").unlink()
    with pytest.raises(ValueError, match=r"place/server is there, but .* was not dealt to its end: delete it"):
        homes.deal(tiny(), place)
    with pytest.raises(ValueError, match=r"federation.json is missing: hand the data out first"):
        homes.facts_of(place)
    (tmp_path / "taken" / "clients").mkdir(parents=True)
    with pytest.raises(ValueError, match="taken/clients is there"):
        homes.deal(tiny(), tmp_path / "taken")

    written, original = [], homes.write_set

    def doomed(folder, part):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(original(folder, part))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(homes, "write_set", doomed)
        homes.deal(tiny(), tmp_path / "new")
    assert len(written) == 2 and not (tmp_path / "new").exists()
    assert homes.deal(tiny(), tmp_path / "new") == ["00", "01"]
    assert not list(tmp_path.glob(".*.half"))


# --- a client at home -------------------------------------------------------------------------------------------------


@pytest.fixture
def home(place) -> homes.Home:
    return homes.Home(place / "clients" / "01", "01")


def at_home(home: homes.Home, **changes) -> tuple[record.Run, alfl.Study]:
    settings = tiny(**changes)
    return home.run(settings, "60_real_clients", "avg", 0), home.study(settings, ("0", "1", "2"), "cpu")


def wants(*positions: int, why: float = math.nan) -> alfl.Picked:
    scores = np.array([why + i for i in range(len(positions))])
    return alfl.Picked(np.array(positions), scores, scores)


def expected_bill(study: alfl.Study, positions) -> Bill:
    boxes = int((study.train.labels.classes[list(positions)] > 0).sum())
    return Bill(len(positions), boxes, 2.0 * len(positions) + 7.0 * boxes)


def test_a_home_is_checked_when_it_is_named(place):
    with pytest.raises(ValueError, match=r"client 01: person must be one of \('simulated', 'human'\), got 'robot'"):
        homes.Home(place / "clients" / "01", "01", "robot")
    with pytest.raises(ValueError, match="client 07: its folder .*/07 does not exist"):
        homes.Home(place / "clients" / "07", "07")


def test_a_home_knows_its_own_images_and_no_others(home):
    run, study = at_home(home)
    train, _ = data.load("digits", (32, 32), scenes=(30, 4), digit_classes=3)
    _, parts, _ = alfl.share_out(tiny(), train, 0)
    assert study.train.images.ids == tuple(train.images.ids[row] for row in parts[1])
    assert len(study.test) == 1 and set(study.test.images.ids) <= set(study.train.images.ids)
    assert run.folder.is_relative_to(home.folder / "runs")
    with home.client(run, study, 0, 0, asked=False) as client:
        assert client.name == "01" and client.pool.ids == study.train.images.ids
        assert list(client.pool.unlabelled()) == list(range(len(study.train)))


def test_what_is_asked_is_what_an_oracle_answers_and_asking_again_changes_nothing(home):
    run, study = at_home(home)
    picked = [wants(4, 1, 7, why=0.25), wants(0, 9), wants(2, 3, why=1.5)]
    oracle = Oracle(study.train.labels)
    pool = Pool("01", study.train.images, oracle, np.arange(len(study.train)))
    told: list = []
    for cycle, one in enumerate(picked):
        pool.ask(one.positions, cycle, one.why)
        home.pick(run, cycle, one, {})
        for _ in range(2):
            client, rows = home.ask(run, study, cycle)
            assert repr(rows) == repr(pool.asked_rows(cycle)) and client.pool.bill() == pool.bill()
            for mine, theirs in zip(client.pool.training_set()[1:], pool.training_set()[1:], strict=True):
                width = mine.boxes.shape[1]
                assert torch.equal(mine.boxes, theirs.boxes[:, :width]) and not theirs.classes[:, width:].any()
                assert torch.equal(mine.classes, theirs.classes[:, :width])
        told.append((rows, client.pool.bill()))
    for cycle in (0, 2, 1):  # a server that went back repeats its questions, and gets what it got
        client, rows = home.ask(run, study, cycle)
        assert repr((rows, client.pool.bill())) == repr(told[cycle])
    assert client.pool.bill() == expected_bill(study, [4, 1, 7, 0, 9])


def test_labels_of_a_cycle_are_there_from_its_label_message_on(home):
    run, study = at_home(home)
    for cycle, one in enumerate((wants(4, 1, 7), wants(0, 9), wants(2, 3))):
        home.pick(run, cycle, one, {})
        home.ask(run, study, cycle)
    for cycle, expected in enumerate(([1, 4, 7], [0, 1, 4, 7, 9], [0, 1, 2, 3, 4, 7, 9])):
        with home.client(run, study, cycle, 0) as client:
            assert client.pool.labelled().tolist() == expected
        with home.client(run, study, cycle, 0, asked=False) as client:
            assert client.pool.labelled().tolist() == ([[]] + [[1, 4, 7], [0, 1, 4, 7, 9]])[cycle]
            assert client.pool.bill() == expected_bill(study, client.pool.labelled())


def test_labels_that_nobody_scored_for_are_refused(home):
    run, study = at_home(home)
    home.pick(run, 0, wants(1), {})
    with pytest.raises(ValueError, match="client 01: nothing was scored in cycle 1, so there is nothing to label"):
        home.ask(run, study, 1)


def test_a_client_that_is_anonymous_tells_numbers_and_answers_the_same(home, place):
    other = shutil.copytree(home.folder, place / "clients" / "copy")
    hidden = homes.Home(other, "01", anonymous=True)
    answers = []
    for each in (home, hidden):
        run, study = at_home(each)
        each.pick(run, 0, wants(4, 1, 7, why=0.5), {})
        answers.append(each.ask(run, study, 0))
    (client, named), (same, numbered) = answers
    assert [row["id"] for row in numbered] == ["01/1", "01/4", "01/7"]
    assert [{**row, "id": ""} for row in named] == [{**row, "id": ""} for row in numbered]
    assert [row["id"] for row in named] == [client.pool.ids[p] for p in (1, 4, 7)]
    assert client.pool.bill() == same.pool.bill()


def test_a_vae_that_chose_is_there_in_the_next_cycle_and_not_before(home):
    run, study = at_home(home)
    coders = [{"w": torch.tensor([float(cycle)])} for cycle in range(3)]
    for cycle, coder in enumerate(coders):
        home.pick(run, cycle, wants(cycle), coder)
        home.ask(run, study, cycle)
    for cycle in range(3):
        with home.client(run, study, cycle, 0, asked=False) as client:
            assert client.coder == (coders[cycle - 1] if cycle else {})


# --- what stays between two rounds ------------------------------------------------------------------------------------


def kept_by(number: int) -> tuple[alfl.Client, dict]:
    client = alfl.Client("01", None)
    for what in ("home", "memory", "last"):
        getattr(client, what)[what] = torch.tensor([float(number)])
    return client, {"backbone.w": torch.tensor([float(number)])}


def remembered(home: homes.Home, run, study, cycle: int, round: int) -> list:
    """Number of the round whose state the client begins this round with, in all that it keeps."""
    with home.client(run, study, cycle, round) as client:
        found = [client.home, client.memory, client.last]
    return [next(iter(state.values())).item() for state in (*found, home.base(run, cycle, round)) if state]


def test_a_round_begins_with_the_state_of_the_round_before_and_a_repeated_one_drops_the_later(home):
    run, study = at_home(home)
    assert run.plan == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for number, (cycle, round) in enumerate(run.plan):
        before = [number - 1.0] * 4 if number else []
        assert remembered(home, run, study, cycle, round) == before
        home.remember(run, cycle, round, *kept_by(number))
        assert remembered(home, run, study, cycle, round) == before, "its own state is not where a round begins"
        assert len(list(run.folder.glob("after-*.pt"))) == min(number + 1, homes.STATES_KEPT)
    assert remembered(home, run, study, 2, 0) == [3.0] * 4, "a server that was killed in it asks for it again"
    home.remember(run, 2, 0, *kept_by(14))
    assert remembered(home, run, study, 2, 1) == [14.0] * 4
    assert sorted(f.name for f in run.folder.glob("after-*.pt")) == ["after-000003.pt", "after-000004.pt"]
    assert remembered(home, run, study, 0, 0) == []
    home.remember(run, 0, 0, *kept_by(20))
    assert [f.name for f in run.folder.glob("after-*.pt")] == ["after-000000.pt"], "begun again, the rest is not true"


def test_who_missed_rounds_goes_on_from_the_last_that_it_had(home):
    run, study = at_home(home)
    home.remember(run, 0, 1, *kept_by(1))
    assert remembered(home, run, study, 2, 1) == [1.0] * 4


def test_a_model_that_came_with_the_questions_is_good_for_its_cycle(home):
    run, _ = at_home(home)
    state = {"w": torch.tensor([1.5, -2.0]), "half": torch.tensor([0.5], dtype=torch.float16)}
    run.folder.mkdir(parents=True)
    home.keep_sent(run, 1, state)
    sent = home.sent(run, 1)
    assert all(torch.equal(sent[k], state[k]) and sent[k].dtype == state[k].dtype for k in state)
    with pytest.raises(ValueError, match="client 01 has the model of cycle 1, not of cycle 2"):
        home.sent(run, 2)


def test_features_of_a_frozen_backbone_are_kept_on_disk_and_read_back_as_they_were(home, place):
    pytest.importorskip("timm")
    settings, classes = tiny(backbone="lite0", frozen=True), ("0", "1", "2")
    made = home.study(settings, classes, "cpu")
    files = list(home.folder.glob("runs/features-*.pt"))
    assert len(files) == 1
    moved = homes.Home(shutil.copytree(home.folder, place / "clients" / "moved"), "01")
    read = moved.study(settings, classes, "cpu")  # another folder, so that nothing in memory answers for it
    rows = np.arange(len(made.train))
    for mine, theirs in zip(made.train.images.features, read.train.images.features, strict=True):
        assert torch.equal(mine, theirs)
    assert read.train.images.ids == made.train.images.ids and objects(read.train) == objects(made.train)
    assert torch.equal(read.photos[0].images.batch(rows), made.photos[0].images.batch(rows))
    short = place / "clients" / "short"
    homes.write_set(short, made.photos[0].take([0, 1]))
    (short / "runs").mkdir()
    shutil.copy(files[0], short / "runs")
    with pytest.raises(ValueError, match=r"features-.*holds features of other images than .*short: delete it"):
        homes.Home(short, "01").study(settings, classes, "cpu")


# --- a person at the page ---------------------------------------------------------------------------------------------


def test_a_human_is_waited_for_and_then_the_labels_count(home):
    human = homes.Home(home.folder, "01", "human")
    run, study = at_home(human)
    human.pick(run, 0, wants(4, 1, 7, why=0.5), {})
    with pytest.raises(flywheel.Unanswered, match="3 questions wait in .*labels.sqlite: answer them at the page"):
        human.ask(run, study, 0)
    ids = study.train.images.ids
    box = {"class": "2", "box": [1.5, 2.0, 20.0, 30.25]}
    with labelling.Store(run.folder / "labels.sqlite", task="boxes") as store:
        assert store.progress()["waiting"] == 3
        for said in ([box], [], None):
            with pytest.raises(flywheel.Unanswered):
                human.ask(run, study, 0)
            question = store.next("Ann")
            assert question.strategy == "avg"
            if said is None:
                store.unknown("Ann", question.image, 3.5)
            else:
                store.answer("Ann", question.image, said, 10.0)
        history = store.history()
    assert history["image"].tolist() == [ids[4], ids[1], ids[7]], "in the order in which they were picked"
    for _ in range(2):
        client, rows = human.ask(run, study, 0)
        assert client.pool.bill() == Bill(2, 1, 20.0)
        assert [(row["id"], row["score"]) for row in rows] == [(ids[1], 1.5), (ids[4], 0.5)]
        _, labels = client.pool.training_set()
        assert labels.boxes[1, 0].tolist() == box["box"] and labels.classes.tolist() == [[0], [3]]
    with human.client(run, study, 1, 0, asked=False) as client:
        assert 7 not in client.pool.unlabelled() and 7 not in client.pool.labelled(), "asked, and nobody could say"
        assert len(client.pool.unlabelled()) == len(study.train) - 3


def test_a_simulated_person_is_as_wrong_as_the_config_says(home):
    run, study = at_home(home, annotator_error=1.0, seconds_per_image=0.5, seconds_per_box=0.25)
    home.pick(run, 0, wants(0, 1, 2, 3, 4), {})
    client, _ = home.ask(run, study, 0)
    images, labels = client.pool.training_set()
    truth = study.train.labels.take([0, 1, 2, 3, 4])
    width = labels.classes.shape[1]
    real = labels.classes > 0
    assert real.any() and torch.equal(real, truth.classes[:, :width] > 0)
    assert (labels.classes[real] != truth.classes[:, :width][real]).all()
    assert torch.equal(labels.boxes[real], truth.boxes[:, :width][real])
    assert client.pool.bill() == Bill(5, int(real.sum()), 0.5 * 5 + 0.25 * int(real.sum()))


# --- a client as the server knows it ----------------------------------------------------------------------------------


def test_what_was_told_stands_in_for_a_pool(tmp_path):
    told = homes.Told("01", 3)
    assert (len(told.labelled()), told.bill(), told.histogram, told.asked_rows(0)) == (0, Bill(), [0, 0, 0], [])
    first = [{"cycle": 0, "client": "01", "id": "a", "score": 0.5}, {"cycle": 0, "client": "01", "id": "b", "score": 1}]
    told.tell(0, Bill(2, 5, 39.0), [5, 0, 0], first)
    second = [{"cycle": 1, "client": "01", "id": "c", "score": 0.1}]
    for _ in range(2):  # told twice is told once
        told.tell(1, Bill(3, 6, 50.0), [5, 1, 0], second)
    assert len(told.labelled()) == 3 and told.bill() == Bill(3, 6, 50.0) and told.histogram == [5, 1, 0]
    assert told.asked_rows(0) == first and told.asked_rows(1) == second and told.asked_rows(2) == []


counts = st.integers(0, 2**40)


@given(
    st.tuples(counts, counts, st.floats(0, 1e9)),
    st.lists(counts, min_size=1, max_size=9),
    counts,
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["00", "01", "1"]), st.text(min_size=1)), max_size=6),
)
def test_what_was_told_survives_the_resume_point(bill, histogram, held, rows):
    """Through JSON and back, as text of numbers; rows are those of asked.csv, anybody's."""
    rows = [{"cycle": cycle, "client": client, "id": sample, "score": 0.5} for cycle, client, sample in rows]
    told = homes.Told("01", len(histogram))
    told.held = held
    mine = [row for row in rows if row["client"] == "01"]
    for cycle in range(6):
        told.tell(cycle, Bill(*bill), histogram, [row for row in mine if row["cycle"] == cycle])
    again = homes.Told("01", len(histogram))
    again.restore(json.loads(json.dumps(told.state())), rows)
    assert again.bill() == told.bill() == Bill(*bill) and again.histogram == histogram and again.held == held
    assert [again.asked_rows(cycle) for cycle in range(6)] == [told.asked_rows(cycle) for cycle in range(6)]
    assert again.state() == told.state()


def test_a_clients_generators_are_those_of_the_plain_loop(home):
    run, _ = at_home(home)
    plain = record.Run(tiny(), "60_real_clients", "avg", 0, plan=alfl.plan)
    for names in (("ask", "01", 1), ("train", "01", 1, 0)):
        assert torch.rand(3, generator=run.torch_rng(*names)).tolist() == (
            torch.rand(3, generator=seeding.torch_rng_for(0, *names)).tolist()
        )
        assert run.rng(*names).random() == plain.rng(*names).random()
