"""The pool and the Oracle: one door to labels, a bill that adds up, a history that can be played again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedal_utils.data import Images, Labels
from fedal_utils.sampling import Cost, Oracle, Pool, total
from fedal_utils.sampling.pool import UNDECIDED
from fedal_utils.seeding import torch_rng_for

BOXES = [2, 0, 3, 1, 1, 4]  # of each image; one of image 2's is ignored


def world():
    count = len(BOXES)
    classes = torch.zeros(count, 4, dtype=torch.int64)
    for row, boxes in enumerate(BOXES):
        classes[row, :boxes] = 1
    boxes = torch.tensor([1.0, 2, 20, 30]) * (classes > 0)[..., None]
    ignore = torch.zeros(count, 4, dtype=torch.bool)
    ignore[2, 0] = True
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=torch_rng_for(0, "pixels"), dtype=torch.uint8)
    images = Images(tuple("abcdef"), pixels, torch.tensor([[32, 32]] * count))
    return images, Labels(boxes, classes, ignore, torch.zeros_like(ignore))


def test_the_bill_in_three_currencies_by_hand():
    images, labels = world()
    pool = Pool("A", images, Oracle(labels, seconds_per_image=2.0, seconds_per_box=7.0), [5, 0, 1, 2])
    assert pool.cost() == Cost(0, 0, 0.0)
    pool.label([1, 2], cycle=0)  # images 0 and 1: two boxes and none: 2 x 2 s + 2 x 7 s = 18 s
    assert pool.cost() == Cost(2, 2, 18.0)
    pool.label([3], cycle=1)  # image 2: three boxes, the ignored one is drawn too: 2 + 21 = 23 s
    assert pool.cost() == Cost(3, 5, 41.0)
    assert total([pool.cost(), Cost(1, 1, 9.0)]) == Cost(4, 6, 50.0)
    assert total([]) == Cost()


@given(st.lists(st.integers(0, 5), unique=True, min_size=1), st.data())
def test_the_budget_adds_up_however_the_asking_is_cut(order, data):
    images, labels = world()
    pool = Pool("A", images, Oracle(labels), range(6))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=3)))
    so_far = 0
    for cycle, chunk in enumerate(np.split(np.array(order), cuts)):
        pool.label(chunk, cycle)
        so_far += len(chunk)
        assert pool.cost().images == so_far == len(pool.labelled()) == 6 - len(pool.unlabelled())
        assert set(pool.labelled()) & set(pool.unlabelled()) == set()
    boxes = sum(BOXES[i] for i in order)
    assert pool.cost() == Cost(len(order), boxes, 2.0 * len(order) + 7.0 * boxes)
    assert sum(len(pool.queries(cycle)) for cycle in range(5)) == len(order)


def test_nobody_is_asked_twice_and_a_refused_question_changes_nothing():
    images, labels = world()
    oracle = Oracle(labels)
    pool, neighbour = Pool("A", images, oracle, [0, 1, 2]), Pool("B", images, oracle, [2, 3])
    pool.label([2], cycle=0)
    for positions in ([2], [0, 2], [0, 0], [3], [-1]):
        with pytest.raises(ValueError, match="client A: queries must be different, unlabelled images"):
            pool.label(positions, cycle=1)
        assert pool.labelled().tolist() == [2] and pool.cost().images == 1
    with pytest.raises(ValueError, match=r"images \[2\] were annotated before: no label is paid twice"):
        neighbour.label([0], cycle=1)  # the same image at another client
    assert pool.labelled().tolist() == [2] and len(neighbour.labelled()) == 0
    pool.label([], cycle=1)
    pool.label([0, 1], cycle=1)  # what was refused before is still to be had
    assert pool.cost().images == 3


def test_labels_that_were_not_paid_for_stay_with_the_oracle():
    images, labels = world()
    oracle = Oracle(labels)
    pool = Pool("A", images, oracle, [3, 4])
    with pytest.raises(ValueError, match=r"labels of images \[3\] were not queried"):
        oracle.labels_of(np.array([3]))
    with pytest.raises(ValueError, match=r"labels of images \[4\] were not queried"):
        oracle.cost(np.array([4]))
    with pytest.raises(PermissionError, match="upper bounds"):
        oracle.hidden_labels(np.array([4]))
    pool.label([0], cycle=0)
    with pytest.raises(ValueError, match=r"labels of images \[4\] were not queried"):
        pool.labels_of(np.array([3, 4]))
    pool = Pool("A", images, Oracle(labels), [5, 0, 2])  # each image with its own labels, whatever the order of asking
    pool.label([2, 0], cycle=0)
    got_images, got_labels = pool.training_set()
    assert got_images.ids == ("f", "c") and torch.equal(got_labels.boxes, labels.boxes[[5, 2]])
    assert torch.equal(got_images.pixels, images.pixels[[5, 2]])


def asked_csv(pools, cycles):
    return [row for cycle in range(cycles) for pool in pools for row in pool.queries(cycle)]


def test_a_replayed_history_equals_the_original():
    images, labels = world()
    pools = [Pool("A", images, oracle, index) for oracle in [Oracle(labels)] for index in ([4, 0, 2],)]
    pools.append(Pool("B", images, pools[0].oracle, [1, 3, 5]))
    pools[0].label([2, 0], 0)
    pools[1].label([1], 0, [0.25])
    pools[0].label([1], 2, [1 / 3])
    rows = asked_csv(pools, 3)
    assert rows[0] == {"cycle": 0, "client": "A", "id": "e", "score": pytest.approx(np.nan, nan_ok=True)}
    assert rows[3:] == [{"cycle": 2, "client": "A", "id": "a", "score": 1 / 3}]
    oracle = Oracle(labels)
    again = [Pool("A", images, oracle, [4, 0, 2]), Pool("B", images, oracle, [1, 3, 5])]
    for pool in again:  # as a CSV reader hands them over: everything a string
        pool.replay([{key: str(value) for key, value in row.items()} for row in reversed(rows)])
    for old, new in zip(pools, again, strict=True):
        assert np.array_equal(old.queried_in, new.queried_in)
        assert np.array_equal(old.scores, new.scores, equal_nan=True)
        assert old.cost() == new.cost()
    assert str(asked_csv(again, 3)) == str(rows)
    pool, row = Pool("A", images, Oracle(labels), [0, 1]), {"cycle": 0, "client": "A", "id": "a", "score": 1.0}
    for history, text in (([row | {"id": "f"}], "names 'f', which client A does not hold"), ([row, row], "unlabelled")):
        with pytest.raises(ValueError, match=text):
            pool.replay(history)


class Puzzled(Oracle):
    """Cannot say what is on images 1 and 4, and is told when and why it is asked."""

    told = ()

    def annotate(self, index, cycle=0, scores=None):
        super().annotate(index, cycle, scores)
        self.told = (*self.told, (index.tolist(), cycle, scores))
        return ~np.isin(index, [1, 4])


def test_an_image_that_nobody_can_name_is_exclude_for_good():
    images, labels = world()
    pool = Pool("A", images, Puzzled(labels), [5, 4, 1, 0])
    pool.label([0, 1], cycle=0)
    assert pool.oracle.told == (([5, 4], 0, None),)
    assert pool.labelled().tolist() == [0] and pool.unlabelled().tolist() == [2, 3]
    assert pool.queried_in.tolist() == [0, UNDECIDED, -1, -1] and UNDECIDED not in (-1, 0)
    assert pool.cost() == Cost(1, 4, 30.0) and [row["id"] for row in pool.queries(0)] == ["f"]
    assert pool.training_set()[0].ids == ("f",)
    with pytest.raises(ValueError, match="different, unlabelled"):
        pool.label([1], cycle=1)
    pool.label([2, 3], cycle=1)
    assert pool.labelled().tolist() == [0, 3] and len(pool.unlabelled()) == 0
    # what asked.csv says, and who was set aside, rebuild it
    again = Pool("A", images, Puzzled(labels), [5, 4, 1, 0])
    again.replay(asked_csv([pool], 2))
    assert again.unlabelled().tolist() == [1, 2]
    again.exclude(["b", "e", "f", "nobody"])  # a label that was given stays
    assert np.array_equal(again.queried_in, pool.queried_in) and again.cost() == pool.cost()
