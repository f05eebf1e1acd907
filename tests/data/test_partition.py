"""Splits over clients: exact cover without overlap, the skews by their statistics, van Bommel's split at scale."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedal_utils.data import partition
from fedal_utils.seeding import rng_for

# van Bommel's 8-class split over 9 devices (released code): what each device must miss, in the notes' words
CLASSES = ("Car", "Cyclist", "Misc", "Pedestrian", "Person_sitting", "Tram", "Truck", "Van")
MISSING = [["Cyclist"], ["Person_sitting"], ["Cyclist", "Person_sitting"], ["Tram", "Person_sitting"], ["Pedestrian"]]
MISSING += [["Pedestrian", "Truck"], ["Truck", "Cyclist"], ["Tram", "Cyclist"], ["Pedestrian", "Cyclist"]]
COLUMNS = [[CLASSES.index(name) for name in names] for names in MISSING]


def assert_exact_cover(parts, images, left_over=()):
    everything = np.concatenate([*parts, np.asarray(left_over, dtype=np.int64)])
    assert np.array_equal(np.sort(everything), np.arange(images))  # each once: nothing lost, nothing shared
    for part in parts:
        assert len(part) > 0 and np.issubdtype(part.dtype, np.integer) and np.array_equal(part, np.sort(part))


@given(
    st.lists(st.integers(-1, 4), min_size=12, max_size=60),
    st.integers(1, 4),
    st.sampled_from([0.05, 0.1, 1.0, 50.0]),
    st.integers(0, 5),
)
def test_every_split_covers_exactly_and_equal_ones_have_sizes_within_one(classes, clients, alpha, seed):
    classes, many = np.array(classes), 3 * clients
    for wanted, split in (
        (clients, lambda rng: partition.dirichlet(classes, clients, alpha, rng)),
        (many, lambda rng: partition.dirichlet_equal(classes, many, alpha, rng)),
        (many, lambda rng: partition.iid(len(classes), many, rng)),
    ):
        parts, again = split(rng_for(seed, "p")), split(rng_for(seed, "p"))
        assert len(parts) == wanted and all(map(np.array_equal, parts, again))
        assert_exact_cover(parts, len(classes))
        sizes = [len(part) for part in parts]
        assert wanted == clients or max(sizes) - min(sizes) <= 1


def test_dirichlet_shares_have_the_variance_that_alpha_says():
    # Dirichlet(alpha, ..., alpha) over M: Var(share) = (1/M)(1 - 1/M) / (M alpha + 1); here M = 4, alpha = 1 -> 0.0375
    dominant = np.repeat(np.arange(400), 100)
    parts = partition.dirichlet(dominant, 4, 1.0, rng_for(0, "p"))
    shares = np.stack([np.bincount(dominant[part], minlength=400) for part in parts]) / 100
    assert shares.mean() == pytest.approx(0.25)
    assert shares.var() == pytest.approx(0.0375, rel=0.04)
    assert shares.mean(axis=1) == pytest.approx(0.25, abs=0.04)  # no client is favoured; standard error 0.0097


def test_missing_class_by_hand():
    # columns a, b. Groups: {a}: rows 0-3, {b}: rows 4, 5, {a, b}: row 6, {}: rows 7-9. Clients miss a, b, and both.
    # Rarest first: row 6 fits nobody. {b} may go to client 0 only (1 misses b): 0 has 2. {} (3 rows) tops up clients
    # 1 and 2 first: sizes 2, 2, 1 or 2, 1, 2. {a} fits client 1 only: 4 more.
    present = np.zeros((10, 2), dtype=bool)
    present[[0, 1, 2, 3, 6], 0] = True
    present[[4, 5, 6], 1] = True
    parts, left_over = partition.missing_class(present, [[0], [1], [0, 1]], rng_for(0, "p"))
    assert left_over.tolist() == [6]
    assert parts[0].tolist() == [4, 5]
    assert set(parts[1]) >= {0, 1, 2, 3} and set(parts[1]) <= {0, 1, 2, 3, 7, 8, 9}
    assert sorted(len(part) for part in (parts[1], parts[2])) in ([1, 6], [2, 5])
    assert len(parts[0]) + len(parts[1]) + len(parts[2]) == 9


@pytest.mark.parametrize("seed", range(3))
def test_missing_class_at_the_papers_scale_ends_nearly_equal(seed):
    often = np.array([0.89, 0.15, 0.1, 0.24, 0.013, 0.047, 0.14, 0.29])  # about KITTI's shares of images
    present = rng_for(seed, "presence").random((5000, 8)) < often
    parts, left_over = partition.missing_class(present, COLUMNS, rng_for(seed, "p"))
    assert_exact_cover(parts, 5000, left_over)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    fits_nobody = np.array([all(row[columns].any() for columns in COLUMNS) for row in present])
    assert fits_nobody.sum() == len(left_over) > 0
    for part, columns in zip(parts, COLUMNS, strict=True):
        assert set(np.flatnonzero(~present[part].any(axis=0))) == set(columns)  # these miss, every other one is there


def test_natural_groups_come_back_sorted_by_name():
    parts, names = partition.natural(["Town02", "Town01", "Town02", "Town10"])
    assert names == ["Town01", "Town02", "Town10"]
    assert [part.tolist() for part in parts] == [[1], [0, 2], [3]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: partition.iid(3, 4, rng), "4 clients cannot share 3 images"),
        (lambda rng: partition.dirichlet(np.zeros(9), 2, 1.0, rng, least=5), "gave each of 2 clients 5 of 9"),
        (lambda rng: partition.dirichlet(np.zeros(9), 9, 0.001, rng), r"no Dirichlet\(0.001\) draw .*raise"),
        (lambda rng: partition.missing_class(np.ones((4, 2), bool), [[], [2]], rng), "client 1 misses the columns"),
        (lambda rng: partition.missing_class(np.ones((4, 2), bool), [[], [0]], rng), r"clients \[1\] get no image"),
        (lambda rng: partition.natural(None), "needs a group for each image"),
    ],
)
def test_what_cannot_be_split_is_an_error_that_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call(rng_for(0, "p"))


def test_dirichlet_equal_is_the_more_skewed_the_smaller_alpha():
    classes = np.repeat(np.arange(10), 500)
    top = []
    for alpha in (0.01, 0.1, 1.0, 10.0):
        splits = [partition.dirichlet_equal(classes, 10, alpha, rng_for(seed, "p")) for seed in range(5)]
        top.append(np.mean([np.bincount(classes[part]).max() / len(part) for parts in splits for part in parts]))
    assert top[0] > 0.8 and top[-1] < 0.25  # the most frequent class at a client; 0.1 if all were equal
    assert all(a > b + 0.1 for a, b in zip(top, top[1:], strict=False)), top


def test_the_alternation_gives_the_margins_that_it_promises_and_keeps_the_odds():
    # The scaled matrix is the only one with these margins and the odds ratio of the draw (Sinkhorn): by hand for
    # [[4, 1], [1, 1]] with rows 1, columns 1: a^2 / (1 - a)^2 = 4, so a = 2/3.
    logs = np.log(np.array([[4.0, 1.0], [1.0, 1.0]]))
    balanced = partition._balanced(logs, np.array([1.0, 1.0]), 1e-9)
    assert balanced == pytest.approx(np.array([[2, 1], [1, 2]]) / 3, abs=1e-6)
    # unequal classes: columns 3/2 and 1/2; a (a - 1/2) / ((1 - a) (3/2 - a)) = 4 -> 3 a^2 - 9.5 a + 6 = 0
    a = (9.5 - np.sqrt(9.5**2 - 72)) / 6
    balanced = partition._balanced(logs, np.array([1.5, 0.5]), 1e-9)
    assert balanced == pytest.approx(np.array([[a, 1 - a], [1.5 - a, a - 0.5]]), abs=1e-6)
