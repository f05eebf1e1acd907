"""The Oracle behind which a store lies: what nobody gave is not there, boxes come back where they were drawn.

Simulated annotators are repeatable: the same labels in any order.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from fedal_utils.data import Dataset, Images, Labels, letterbox_boxes
from fedal_utils.labelling import Question, Simulated, Store, StoreOracle, pictures, truth_of
from fedal_utils.sampling import Cost, Pool, Unanswered

NAMES = ("ant", "bee", "cow", "dog")


def whole_images(count: int) -> Dataset:
    """Black images of classes 0, 1, 2, 3, 0, ..."""
    ids, pixels = tuple(f"{i:04d}.png" for i in range(count)), torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    images = Images(ids, pixels, torch.tensor([[20, 10]] * count))
    no = torch.zeros(count, 1, dtype=torch.bool)
    classes = (torch.arange(count) % 4)[:, None] + 1
    return Dataset("whole", images, Labels(torch.tensor([0.0, 0, 8, 8]).repeat(count, 1, 1), classes, no, no), NAMES)


def letterboxed() -> tuple[Dataset, list[list[list[float]]]]:
    """Wide, high and odd images in 64 x 64, and their boxes in original pixels; object 1 of image 0 is ignored."""
    sizes = torch.tensor([[30, 90], [121, 47], [64, 64], [500, 333]])
    drawn = [
        [[0.0, 0, 90, 30], [3, 4, 20, 28], [10.5, 2.25, 77.125, 29]],
        [[0, 100, 47, 121]],
        [],
        [[33.3, 250.7, 333, 500], [1.5, 2.5, 300, 400]],
    ]
    original = pad_sequence([torch.tensor(rows, dtype=torch.float32).reshape(-1, 4) for rows in drawn], True)
    classes = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in ([1, 2, 3], [4], [], [2, 1])], True)
    moved = letterbox_boxes(original, sizes, (64, 64)) * (classes > 0)[..., None]
    ignore = torch.zeros_like(classes, dtype=torch.bool)
    ignore[0, 1] = True
    images = Images(tuple("abcd"), torch.zeros(4, 3, 64, 64, dtype=torch.uint8), sizes)
    return Dataset("letters", images, Labels(moved, classes, ignore, torch.zeros_like(ignore)), NAMES), drawn


@pytest.fixture
def oracle(tmp_path):
    """(task, annotator or None for the truth) -> the Oracle, its data set."""

    def build(task="classes", annotator=None):
        train = whole_images(12) if task == "classes" else letterboxed()[0]
        annotator = Simulated(truth_of(train, task)) if annotator is None else annotator
        store = Store(tmp_path / "labels.sqlite", NAMES, task)
        return StoreOracle(store, train.images, NAMES, annotator or None, "margin"), train

    return build


def test_labels_that_nobody_gave_are_not_there(oracle):
    given, _ = oracle()
    assert given.annotate(np.array([3, 1]), 0, [0.5, math.nan]).tolist() == [True, True]
    assert given.labels_of(np.array([1, 3])).classes.tolist() == [[2], [4]]
    assert given.labels_of(np.array([3])).boxes.tolist() == [[[0.0, 0, 8, 8]]]
    for call in (given.labels_of, given.cost):
        with pytest.raises(ValueError, match=r"labels of images \[0, 2\] were not given"):
            call(np.array([0, 1, 2]))
    with pytest.raises(PermissionError):
        given.hidden_labels(np.array([0]))
    rows = given.store.history()
    assert rows["image"].tolist() == ["0003.png", "0001.png"] and set(rows["strategy"]) == {"margin"}
    assert rows["score"][0] == 0.5 and math.isnan(rows["score"][1])
    assert given.cost(np.array([1, 3])) == Cost(2, 2, 4.0) and given.cost(np.array([], dtype=np.int64)) == Cost()


def test_a_person_is_waited_for_and_what_they_cannot_say_is_undecided(oracle):
    given, train = oracle(annotator=False)
    for waiting in (3, 2, 1):
        with pytest.raises(Unanswered, match=f"{waiting} questions wait in .*labels.sqlite: answer them at the page"):
            given.annotate(np.arange(3), 2)
        question = given.store.next("Ann")
        if question.image == "0001.png":
            given.store.unknown("Ann", question.image)
        else:
            given.store.answer("Ann", question.image, "cow")
    assert given.annotate(np.arange(3), 2).tolist() == [True, False, True]
    assert given.undecided(range(9)) == {"0001.png"} and given.undecided([0, 1]) == set()
    pool = Pool("person", train.images, given, range(12))
    pool.replay([{"cycle": 2, "client": "person", "id": f"000{i}.png", "score": 0.5} for i in (0, 2)])
    assert pool.labelled().tolist() == [0, 2] and len(given.store.history()) == 3  # nobody is asked twice


def test_the_truth_is_in_original_pixels_without_what_is_ignored_and_comes_back_letterboxed(oracle):
    train, drawn = letterboxed()
    truth = truth_of(train, "boxes")
    del drawn[0][1]
    for i, (id_, names) in enumerate({"a": ["ant", "cow"], "b": ["dog"], "c": [], "d": ["bee", "ant"]}.items()):
        assert [one["class"] for one in truth[id_]] == names
        for one, want in zip(truth[id_], drawn[i], strict=True):
            assert one["box"] == pytest.approx(want, abs=1e-3)
            assert np.clip(one["box"], 0, train.images.sizes[i].flip(0).repeat(2).numpy()).tolist() == one["box"]
    given, _ = oracle("boxes")
    assert given.annotate(np.arange(4)).all()
    got, want = given.labels_of(np.array([3, 0, 2])), train.labels.boxes
    assert got.classes.tolist() == [[2, 1], [1, 3], [0, 0]] and not got.ignore.any() and not got.crowd.any()
    assert got.boxes[0].numpy() == pytest.approx(want[3, :2].numpy(), abs=1e-3)
    assert got.boxes[1].numpy() == pytest.approx(want[0, [0, 2]].numpy(), abs=1e-3)
    assert not got.boxes[2].any()  # padding is zero
    assert given.cost(np.arange(4)) == Cost(4, 5, 4 * 2.0 + 5 * 7.0)
    assert not given.labels_of(np.array([2])).classes.any()
    shapes = [(21, 64, 3), (64, 25, 3), (64, 64, 3), (64, 43, 3)]  # as large as in the letterbox
    assert [picture.shape for picture in pictures(train.images).values()] == shapes


def test_a_class_that_the_data_set_lacks_is_named(oracle):
    given, _ = oracle(annotator=False)
    with Store(given.store.path, ["yak"]) as store, pytest.raises(Unanswered):
        given.annotate(np.array([0]))
    with Store(given.store.path) as store:
        store.next("Ann"), store.answer("Ann", "0000.png", "yak")
    given.annotate(np.array([0]))
    with pytest.raises(ValueError, match="labels.sqlite has the class 'yak'; the set knows ant, bee"):
        given.labels_of(np.array([0]))


BOX = {"class": "ant", "box": [1.0, 2.0, 30.5, 40.0]}


def test_the_errors_of_a_simulated_annotator_do_not_depend_on_the_order(tmp_path):
    truth = {f"i{i}": NAMES[i % 3] for i in range(200)}
    told = []
    for order in (1, -1):
        with Store(tmp_path / f"{order}.sqlite", NAMES[:3]) as store:
            store.queue(map(Question, list(truth)[::order]))
            Simulated(truth, error=0.2, seed=3).answer_all(store, "Sim")
            told.append(store.labels())
    assert told[0] == told[1]
    wrong = sum(told[0][image] != truth[image] for image in truth)
    assert 25 <= wrong <= 55  # 40 of 200 are expected
    assert Simulated(truth, error=1.0).label("i0", "classes", NAMES) != "ant"
    assert Simulated(truth, error=1.0).label("i0", "classes", ["ant"]) == "ant"  # nothing to mistake it for
    boxes = Simulated({"a": [BOX] * 50}, error=0.3, seed=1).label("a", "boxes", NAMES)
    assert 5 <= sum(thing["class"] != "ant" for thing in boxes) <= 25 and all(t["box"] == BOX["box"] for t in boxes)
    other = Simulated(truth, error=0.2, seed=4)
    assert any(other.label(image, "classes", NAMES[:3]) != told[0][image] for image in truth)  # errs elsewhere
