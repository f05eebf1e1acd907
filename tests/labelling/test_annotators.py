"""Annotators for headless runs are repeatable: the same labels in any order."""

import pytest

from fedal_utils.labelling import Question, Simulated, Store

CLASSES = ("cat", "dog", "owl")
BOX = {"class": "cat", "box": [1.0, 2.0, 30.5, 40.0]}


@pytest.fixture
def make(tmp_path):
    def build(images, task="classes"):
        store = Store(tmp_path / f"{len(list(tmp_path.glob('*.sqlite')))}.sqlite", CLASSES, task)
        store.queue(map(Question, images))
        return store

    return build


def test_a_simulated_annotator_without_error_gives_the_truth_and_takes_time(make):
    truth = {"a": [BOX, {**BOX, "class": "dog"}], "b": []}
    store = make("ab", "boxes")
    Simulated(truth).answer_all(store, "Sim")
    assert store.labels() == truth and list(store.history()["seconds"]) == [2 + 14, 2]
    with pytest.raises(ValueError, match="no image 'c'"):
        Simulated(truth).answer_all(make("abc", "boxes"), "Sim")


def test_the_errors_of_a_simulated_annotator_do_not_depend_on_the_order(make):
    truth = {f"i{i}": CLASSES[i % 3] for i in range(200)}
    told = []
    for order in (1, -1):
        store = make(list(truth)[::order])
        Simulated(truth, error=0.2, seed=3).answer_all(store, "Sim")
        told.append(store.labels())
    assert told[0] == told[1]
    wrong = sum(told[0][image] != truth[image] for image in truth)
    assert 25 <= wrong <= 55  # 40 of 200 are expected
    assert Simulated(truth, error=1.0).label("i0", "classes", CLASSES) != "cat"
    assert Simulated(truth, error=1.0).label("i0", "classes", ["cat"]) == "cat"  # nothing to mistake it for
    boxes = Simulated({"a": [BOX] * 50}, error=0.3, seed=1).label("a", "boxes", CLASSES)
    assert 5 <= sum(thing["class"] != "cat" for thing in boxes) <= 25 and all(t["box"] == BOX["box"] for t in boxes)
    other = Simulated(truth, error=0.2, seed=4)
    assert any(other.label(image, "classes", CLASSES) != told[0][image] for image in truth)  # errs elsewhere
