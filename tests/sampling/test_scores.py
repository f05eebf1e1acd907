"""Scores by hand with their equation numbers, the laws between reductions, and selection with seeded ties."""

import dataclasses
import math
from collections import Counter

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from observed import chosen, observed, scored
from torch.utils._python_dispatch import TorchDispatchMode

from fedal_utils.data import Detections
from fedal_utils.sampling import Scores, cascade, diversity, select, top_k
from fedal_utils.sampling import scores as by
from fedal_utils.sampling.diversity import k_center
from fedal_utils.seeding import rng_for, torch_rng_for

VALUES = ("confidence", "entropy", "margin", "ratio")
# Box strategies that need more than detections, or choose a set; all others reduce detections to one number.
BOX = (
    "random",
    "sum",
    "avg",
    "max",
    "count",
    "coreset",
    "model_outlier",
    "embedding_outlier",
    "cluster",
    "representative",
    "mix",
    *(f"{v}_{h}" for v in ("entropy", "margin", "ratio") for h in ("sum", "avg", "max")),
)
CLASS = ("random", "entropy", "margin", "confidence", "ratio", "coreset", "badge", "qbc")
BEYOND = ("model_outlier", "embedding_outlier", "representative", "coreset", "cluster", "mix")
REDUCED = [name for name in BOX if name not in ("random", "count", *BEYOND)]


def detections(images, columns=4, length=None, likeliest=False):
    """images: for each image a list of (confidence, class distribution); padding of `length` holds rubbish.

    likeliest: a detection is of its likeliest class, else of class 1.
    """
    length = max([len(image) for image in images] + [length or 0])
    boxes = torch.full((len(images), length, 4), 7.0)
    scores = torch.full((len(images), length), 0.123)  # rubbish where padded: only labels may say what is real
    labels = torch.zeros(len(images), length, dtype=torch.int64)
    probs = torch.full((len(images), length, columns), 0.321)
    for i, image in enumerate(images):
        for j, (confidence, p) in enumerate(image):
            label = 1 + max(range(columns - 1), key=lambda c: p[1 + c]) if likeliest else 1
            scores[i, j], labels[i, j], probs[i, j] = confidence, label, torch.tensor(p)
    return Detections(boxes, scores, labels, probs)


def confidences(*images):
    return detections([[(c, [1 - c, c, 0.0, 0.0]) for c in image] for image in images])


def values_of(strategy, found):
    return scored(strategy, found, len(found), rng_for(0, "s")).values


# ---------------------------------------------------------------------------------------------------- worked by hand


def test_least_confidence_van_bommel_7_1_sum_avg_max_by_hand():
    # c = .9, .6, .3: 1 - c = .1, .4, .7: SUM 1.2, AVG .4, MAX .7. The second image: c = .5: all three .5.
    found = confidences([0.9, 0.6, 0.3], [0.5])
    assert values_of("sum", found) == pytest.approx([1.2, 0.5])
    assert values_of("avg", found) == pytest.approx([0.4, 0.5])
    assert values_of("max", found) == pytest.approx([0.7, 0.5])
    # the crowded image comes first under SUM and MAX, the other one under AVG
    first = {how: top_k(scored(how, found, 2, rng_for(0, "s")), 1, rng_for(0, "t"))[0] for how in ("sum", "avg", "max")}
    assert first == {"sum": 0, "avg": 1, "max": 0}


def test_entropy_settles_2_3_by_hand():
    # (.5, .5, 0, 0): ln 2; (.25 x 4): ln 4; (1, 0, 0, 0): 0
    found = detections([[(0.5, [0.5, 0.5, 0, 0]), (0.25, [0.25] * 4)], [(1.0, [0, 1.0, 0, 0])]])
    assert values_of("entropy_sum", found) == pytest.approx([math.log(2) + math.log(4), 0])
    assert values_of("entropy_avg", found) == pytest.approx([1.5 * math.log(2), 0])
    assert values_of("entropy_max", found) == pytest.approx([math.log(4), 0])


def test_margin_settles_2_2_by_hand():
    # (.1, .6, .3, 0): 1 - (.6 - .3) = .7; (.45, .45, .1, 0): 1 - 0 = 1; (0, 1, 0, 0): 1 - 1 = 0
    found = detections([[(0.6, [0.1, 0.6, 0.3, 0]), (0.45, [0.45, 0.45, 0.1, 0])], [(1.0, [0, 1.0, 0, 0])]])
    assert values_of("margin_sum", found) == pytest.approx([1.7, 0])
    assert values_of("margin_avg", found) == pytest.approx([0.85, 0])
    assert values_of("margin_max", found) == pytest.approx([1.0, 0])


def test_ratio_monarch_2021_ch_3_by_hand():
    # (.1, .6, .3, 0): .3 / .6 = .5; (.45, .45, .1, 0): 1; (0, 1, 0, 0): 0
    found = detections([[(0.6, [0.1, 0.6, 0.3, 0]), (0.45, [0.45, 0.45, 0.1, 0])], [(1.0, [0, 1.0, 0, 0])]])
    assert values_of("ratio_sum", found) == pytest.approx([1.5, 0])
    assert values_of("ratio_avg", found) == pytest.approx([0.75, 0])
    assert values_of("ratio_max", found) == pytest.approx([1.0, 0])


def test_box_count_scores_every_image():
    scores = scored("count", confidences([0.9, 0.3], [], [0.5]), 3, rng_for(0, "s"))
    assert scores.values.tolist() == [2, 0, 1] and scores.scored.all()


def test_random_looks_at_nothing_and_depends_on_the_generator_only():
    a = scored("random", None, 5, rng_for(0, "s"))
    assert np.array_equal(a.values, scored("random", None, 5, rng_for(0, "s")).values)
    assert not np.array_equal(a.values, scored("random", None, 5, rng_for(1, "s")).values)
    assert a.scored.all() and len(set(a.values)) == 5 and ((0 <= a.values) & (a.values < 1)).all()


def test_images_without_detections_are_marked_and_carry_no_number():
    for strategy in REDUCED:
        scores = scored(strategy, confidences([], [0.9], []), 3, rng_for(0, "s"))
        assert scores.scored.tolist() == [False, True, False]
        assert np.isfinite(scores.values).all()
        nothing = scored(strategy, confidences([], []), 2, rng_for(0, "s"))  # T = 0: not one detection anywhere
        assert not nothing.scored.any() and len(nothing) == 2
    held = confidences([0.4, 0.8])
    scores = diversity.box_outlier(confidences([], [0.9], []), held)
    assert scores.scored.tolist() == [False, True, False] and np.isfinite(scores.values).all()
    assert not diversity.box_outlier(confidences([], []), held).scored.any()
    for empty in (confidences([]), confidences([], [])):  # nothing was found on held-out images: no rank
        unranked = diversity.box_outlier(confidences([0.9], [0.5]), empty)
        assert not unranked.scored.any() and np.isfinite(unranked.values).all() and len(unranked) == 2


# --------------------------------------------------------------------------------------------------------------- laws


distribution = (
    st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any).map(lambda row: [n / sum(row) for n in row])
)
image = st.lists(st.tuples(st.floats(0, 1, width=32), distribution), max_size=5)


@given(st.lists(image, min_size=1, max_size=5))
def test_every_strategy_equals_the_oracle(images):
    assert set(REDUCED) | {"random", "count", *BEYOND} == set(BOX) and len(REDUCED) == 12
    found = detections(images)
    for strategy in [*REDUCED, "count"]:
        got = scored(strategy, found, len(images), rng_for(0, "s"))
        for i, one in enumerate(images):
            want = oracles.image_score(strategy, [c for c, _ in one], [p for _, p in one])
            assert got.scored[i] == (want is not None)
            if want is not None:
                assert got.values[i] == pytest.approx(want, abs=1e-5)


# Some equal, zeros among them; equal odds come from equal rows alone, or a logarithm's last bit would decide.
PALETTE = [
    (0, [0.13, 0.31, 0.29, 0.27]),
    (1, [0.41, 0.11, 0.23, 0.25]),
    (2, [0.07, 0.51, 0.37, 0.05]),
    (3, [1.0, 0, 0, 0]),
    (4, [0.0, 0.61, 0.39, 0]),
    (5, [0.53, 0.0, 0.0, 0.47]),
    (6, [0.19, 0.03, 0.67, 0.11]),
    (7, [0.02, 0.06, 0.01, 0.91]),
]
row = st.lists(st.sampled_from(PALETTE), max_size=4)


@given(st.lists(row, min_size=1, max_size=4), st.lists(row, min_size=1, max_size=4))
def test_model_outliers_among_boxes_equal_the_oracle(images, held):
    found, reference = detections(images), detections(held, likeliest=True)
    choice = chosen(
        "model_outlier", observed(len(images), found, held_out_detections=reference), len(images), rng_for(0, "s")
    )
    held_probs = reference.probs[reference.valid].tolist()
    held_labels = reference.labels[reference.valid].tolist()
    for i, one in enumerate(images):
        seen = found.probs[i][: len(one)].tolist()
        want = oracles.box_outlier(seen, held_probs, held_labels)
        assert choice.scores.scored[i] == (want is not None)
        if want is not None:
            assert choice.scores.values[i] == pytest.approx(want, abs=1e-9)


def test_model_outliers_among_boxes_by_hand():
    # held out, log odds of class 1: ln 2, ln 4; of class 2 (one box): ln 2.5
    held = detections(
        [[(0.5, [0.25, 0.5, 0.25]), (0.5, [0.125, 0.5, 0.375])], [(0.6, [0.25, 0.125, 0.625])]], 3, likeliest=True
    )
    assert held.labels.tolist() == [[1, 1], [2, 0]]
    # (.25, .75, 0): class 1 ln 3: half lie below, class 2: none: 1 - .25. (.9, .05, .05): nothing below: 1.
    # (.25, .5, .25): ln 2, a tie with one of two: .25; ln 1: 0: 1 - .125. (.1, .3, .6): ln 3: .5; ln 6: 1: 1 - .75.
    boxes = [(0.75, [0.25, 0.75, 0.0]), (0.5, [0.9, 0.05, 0.05]), (0.5, [0.25, 0.5, 0.25]), (0.6, [0.1, 0.3, 0.6])]
    found = detections([*([box] for box in boxes), [boxes[0], boxes[3]], []], 3)  # an image is the mean of its boxes
    scores = diversity.box_outlier(found, held)
    assert scores.scored.tolist() == [True] * 5 + [False]
    assert scores.values[:5] == pytest.approx([0.75, 1, 0.875, 0.25, 0.5], abs=1e-12)
    choice = chosen("model_outlier", observed(6, found, held_out_detections=held), 3, rng_for(0, "c"))
    assert choice.positions.tolist() == [1, 2, 0]


@given(st.lists(image.filter(len), min_size=1, max_size=5))
def test_sum_is_at_least_max_is_at_least_avg(images):
    found = detections(images)
    for value in VALUES:
        total, largest, mean = (
            values_of(how if value == "confidence" else f"{value}_{how}", found) for how in ("sum", "max", "avg")
        )
        assert (total >= largest - 1e-9).all() and (largest >= mean - 1e-9).all() and (mean >= -1e-6).all()


@given(st.lists(image, min_size=1, max_size=4), st.integers(0, 9))
def test_padding_never_matters(images, extra):
    plain, padded = detections(images), detections(images, length=5 + extra)
    for strategy in [*REDUCED, "count"]:
        a, b = (scored(strategy, found, len(images), rng_for(0, "s")) for found in (plain, padded))
        assert a.values == pytest.approx(b.values, abs=1e-12)
        assert a.scored.tolist() == b.scored.tolist()
    held = confidences([0.4, 0.8], [0.6])
    a, b = diversity.box_outlier(plain, held), diversity.box_outlier(padded, held)
    assert a.values == pytest.approx(b.values, abs=1e-12) and a.scored.tolist() == b.scored.tolist()
    turned = diversity.box_outlier(held, plain), diversity.box_outlier(held, padded)  # padding of the held-out ones
    assert np.array_equal(turned[0].values, turned[1].values) and np.array_equal(turned[0].scored, turned[1].scored)
    for how in ("sum", "avg", "max"):  # confidences are float32: their float64 sums are exact, so not one bit moves
        assert np.array_equal(values_of(how, plain), values_of(how, padded))


def test_nan_in_the_padding_is_not_looked_at():
    found = confidences([0.9], [0.5, 0.4])
    found.scores[0, 1] = float("nan")
    assert values_of("sum", found) == pytest.approx([0.1, 1.1])
    found.probs[0, 1] = float("nan")
    scores = diversity.box_outlier(found, found)
    assert scores.scored.all() and np.isfinite(scores.values).all()


# ---------------------------------------------------------------------------------------------------------- selection


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.data())
def test_top_k_takes_the_largest_best_first(values, data):
    k = data.draw(st.integers(0, len(values)))
    picks = top_k(Scores(np.array(values), np.ones(len(values), dtype=bool)), k, rng_for(0, "t"))
    assert len(set(picks.tolist())) == k
    assert [values[i] for i in picks] == sorted(values, reverse=True)[:k]


def test_top_k_of_different_scores_equals_argsort():
    values = rng_for(0, "v").permutation(200) / 7
    scores = Scores(values, np.ones(200, dtype=bool))
    assert np.array_equal(top_k(scores, 50, rng_for(0, "t")), np.argsort(-values)[:50])


def test_ties_break_by_the_seed_and_not_by_the_order_in_memory():
    values = np.array([1.0, 0.5, 0.5, 0.5, 0.5, 0.0])
    scores = Scores(values, np.ones(6, dtype=bool))
    picks = [tuple(top_k(scores, 2, rng_for(seed, "t"))) for seed in range(400)]
    assert {first for first, _ in picks} == {0}
    counts = Counter(second for _, second in picks)
    assert set(counts) == {1, 2, 3, 4}
    # each is taken with probability 1/4: 100 of 400, standard deviation 8.7; the bounds are four of them away
    assert all(65 < counts[i] < 135 for i in counts)
    assert picks[7] == tuple(top_k(scores, 2, rng_for(7, "t")))


@pytest.mark.parametrize("empty", ["last", "first", "never"])
def test_the_three_rules_for_images_without_detections(empty):
    scores = Scores(np.array([0.2, np.nan, 0.9, np.nan, np.nan]), np.array([True, False, True, False, False]))
    picks = top_k(scores, 5, rng_for(0, "t"), empty).tolist()
    if empty == "never":  # van Bommel's released code: fewer than k may come back
        assert picks == [2, 0]
    elif empty == "last":
        assert picks[:2] == [2, 0] and set(picks[2:]) == {1, 3, 4}
    else:
        assert picks[3:] == [2, 0] and set(picks[:3]) == {1, 3, 4}
    orders = {tuple(top_k(scores, 5, rng_for(seed, "t"), empty)) for seed in range(60)}
    assert len(orders) == (1 if empty == "never" else 6)  # all 3! orders of the empty ones turn up


def test_a_scored_image_below_zero_still_comes_before_an_empty_one():
    scores = Scores(np.array([-3.0, 0.0]), np.array([True, False]))
    assert all(top_k(scores, 1, rng_for(seed, "t")).tolist() == [0] for seed in range(20))


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_non_finite_score_names_the_image_and_never_sorts():
    found = confidences([0.9], [0.5, 0.4])
    found.scores[1, 1] = float("nan")
    with pytest.raises(ValueError, match="non-finite score for image 1 of 2"):
        scored("sum", found, 2, rng_for(0, "s"))
    found.probs[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="non-finite score for image 0 of 2"):
        scored("entropy_max", found, 2, rng_for(0, "s"))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="non-finite score at position 1"):
            top_k(Scores(np.array([0.0, bad]), np.ones(2, dtype=bool)), 1, rng_for(0, "t"))


def test_scores_are_pure():
    found = confidences([0.9, 0.6], [0.5])
    before = [t.clone() for t in (found.boxes, found.scores, found.labels, found.probs)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    held = confidences([0.7, 0.2])
    held_before = [t.clone() for t in (held.boxes, held.scores, held.labels, held.probs)]
    sight = observed(2, found, held_out_detections=held, embeddings=points(1, 2), labelled_embeddings=points(0))
    runs = [{name: chosen(name, sight, 1, rng_for(0, "s")) for name in BOX} for _ in range(2)]
    first, again = (
        {name: (c.positions.tolist(), c.scores.values.tolist(), c.scores.scored.tolist()) for name, c in run.items()}
        for run in runs
    )
    assert first == again
    for old, new in zip(held_before, (held.boxes, held.scores, held.labels, held.probs), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(sight.embeddings, points(1, 2)) and torch.equal(sight.labelled_embeddings, points(0))
    for old, new in zip(before, (found.boxes, found.scores, found.labels, found.probs), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------ a strategy, its sight, its choice


def points(*places):
    """Embeddings of one dimension, easy to see: (N, 1)."""
    return torch.tensor(places, dtype=torch.float32)[:, None]


def flat(count):
    return Scores(np.zeros(count), np.ones(count, dtype=bool))


@pytest.mark.parametrize("strategy", [name for name in BOX if name not in BEYOND])
def test_choosing_is_scoring_and_then_the_best_by_the_same_generator(strategy):
    found = confidences([0.9, 0.6], [], [0.5], [0.7, 0.7])
    rng = rng_for(3, "c")
    want_scores = scored(strategy, found, 4, rng)
    want = top_k(want_scores, 3, rng, "first")
    choice = chosen(strategy, observed(4, found), 3, rng_for(3, "c"), "first")
    assert np.array_equal(choice.positions, want)
    assert np.array_equal(choice.scores.values, want_scores.values)
    assert np.array_equal(choice.scores.scored, want_scores.scored)


def wide_sight(images=30, seed=0):
    """Up to four boxes an image, three classes; held-out detections and embeddings beside them."""
    rng = rng_for(seed, "wide sight")

    def drawn(count):
        rows = [[(0.0, rng.dirichlet(np.ones(4)).tolist()) for _ in range(rng.integers(0, 5))] for _ in range(count)]
        return detections([[(max(p[1:]), p) for _, p in row] for row in rows], likeliest=True)

    embedding, known = torch.from_numpy(rng.normal(size=(images, 5))), torch.from_numpy(rng.normal(size=(6, 5)))
    return observed(
        images, drawn(images), held_out_detections=drawn(12), embeddings=embedding, labelled_embeddings=known
    )


def test_the_mixture_asks_its_share_where_nothing_was_detected():
    empty = observed(12, confidences(*[[]] * 12), held_out_detections=confidences([0.5]))
    for rule in select.NO_DETECTION_RULES:  # also by 'never', which would leave nobody to ask
        assert len(set(chosen("mix", empty, 10, rng_for(0, "c"), rule).positions.tolist())) == 10


# --------------------------------------------------------------------------------------------------- greedy k-center


def test_k_center_by_hand():
    # known: 0. Pool: 1, 4, 10, 11. Farthest from 0: 11 (11 away). Then 1: 1, 4: 4, 10: min(10, 1) = 1 -> 4.
    # Then 1: min(1, 3) = 1, 10: 1: a tie.
    positions, distances = k_center(points(1, 4, 10, 11), points(0), 3, rng_for(0, "c"))
    assert positions[:2].tolist() == [3, 1] and positions[2] in (0, 2)
    assert distances == pytest.approx([1, 4, 10, 11])  # before the choice
    thirds = {int(k_center(points(1, 4, 10, 11), points(0), 3, rng_for(seed, "c"))[0][2]) for seed in range(20)}
    assert thirds == {0, 2}


def test_k_center_without_labelled_images_draws_the_first_centre():
    runs = [k_center(points(0, 1, 10), torch.zeros(0, 1), 2, rng_for(seed, "c")) for seed in range(40)]
    assert {int(positions[0]) for positions, _ in runs} == {0, 1, 2}
    assert all(positions[1] == (2 if positions[0] < 2 else 0) for positions, _ in runs)
    assert all(distances.tolist() == [0, 0, 0] for _, distances in runs)


def slow_k_center(pool, known, k):
    """Sener and Savarese 2018, algorithm 1, word by word: u = argmax_i min_j distance(x_i, x_j), k times."""
    centres, chosen = list(known), []
    for _ in range(k):
        distance = [min(math.dist(x, c) for c in centres) if i not in chosen else -1 for i, x in enumerate(pool)]
        chosen.append(distance.index(max(distance)))
        centres.append(pool[chosen[-1]])
    return chosen


def test_k_center_equals_the_oracle_over_many_labelled_images():
    rng = rng_for(0, "embedding")
    pool, known = rng.normal(size=(40, 6)), rng.normal(size=(300, 6))  # more centres than one block holds
    positions, distances = k_center(torch.from_numpy(pool), torch.from_numpy(known), 25, rng_for(0, "c"))
    assert positions.tolist() == slow_k_center(pool, known, 25)
    assert distances == pytest.approx(np.linalg.norm(pool[:, None] - known[None], axis=2).min(1))


def test_k_center_of_equal_images_takes_each_once():
    positions, _ = k_center(torch.ones(5, 3), torch.ones(2, 3), 5, rng_for(0, "c"))
    assert sorted(positions.tolist()) == [0, 1, 2, 3, 4]
    assert len({tuple(k_center(torch.ones(5, 3), torch.ones(2, 3), 5, rng_for(s, "c"))[0]) for s in range(9)}) > 3
    assert len(k_center(torch.ones(5, 3), torch.ones(2, 3), 0, rng_for(0, "c"))[0]) == 0


def test_a_core_set_is_chosen_from_its_sight():
    choice = chosen(
        "coreset", observed(4, embeddings=points(1, 4, 10, 11), labelled_embeddings=points(0)), 2, rng_for(0, "c")
    )
    assert choice.positions.tolist() == [3, 1]
    assert choice.scores.values == pytest.approx([1, 4, 10, 11]) and choice.scores.scored.all()


# ------------------------------------------------------------------------------------------------------------ cascade


def test_a_cascade_by_hand():
    first = Scores(np.array([5.0, 4.0, 3.0, 2.0, 9.0]), np.ones(5, dtype=bool))
    second = Scores(np.array([1.0, 3.0, 2.0, 99.0, 0.0]), np.ones(5, dtype=bool))  # image 3 is out by then
    stages = cascade([first, second, first], [4, 2, 1], rng_for(0, "c"))
    assert [stage.tolist() for stage in stages] == [[4, 0, 1, 2], [1, 2], [1]]
    assert cascade([second, first], [2, 1], rng_for(0, "c"))[-1].tolist() == [1]


@given(st.lists(st.lists(st.floats(-5, 5), min_size=8, max_size=8), min_size=1, max_size=4), st.data())
def test_each_step_of_a_cascade_takes_the_best_of_the_step_before(rows, data):
    drawn = st.lists(st.integers(0, 8), min_size=len(rows), max_size=len(rows))
    sizes = sorted(data.draw(drawn), reverse=True)
    steps = [Scores(np.array(row), np.ones(8, dtype=bool)) for row in rows]
    before = np.arange(8)
    for step, size, left in zip(steps, sizes, cascade(steps, sizes, rng_for(0, "c")), strict=True):
        assert len(left) == len(set(left.tolist())) == size and set(left.tolist()) <= set(before.tolist())
        assert step.values[left].tolist() == sorted(step.values[before], reverse=True)[:size]
        before = left


def test_a_cascade_breaks_ties_by_its_generator_and_obeys_the_rule_for_empty_images():
    runs = [cascade([flat(6), flat(6)], [4, 2], rng_for(seed, "c"))[-1] for seed in range(60)]
    assert {int(i) for left in runs for i in left} == set(range(6))
    assert np.array_equal(runs[5], cascade([flat(6), flat(6)], [4, 2], rng_for(5, "c"))[-1])
    half = Scores(np.arange(6.0), np.array([True, True, False, False, False, False]))
    assert cascade([half, half], [3, 2], rng_for(0, "c"))[-1].tolist() == [1, 0]
    assert not half.scored[cascade([half, half], [3, 2], rng_for(0, "c"), "first")[-1]].any()
    # 'never' leaves two of three: the next step works with what is left
    assert [len(left) for left in cascade([half, half], [3, 3], rng_for(0, "c"), "never")] == [2, 2]


# -------------------------------------------------------------------------------- whole images: uncertainty, committee

PROBS = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [0.1, 0.2, 0.7]], dtype=torch.float64)


def class_sight(images=12, classes=4, seed=0, members=3):
    """All that a strategy of whole images looks at."""
    rng = torch_rng_for(seed, "class sight")
    return observed(
        images,
        class_scores=2 * torch.randn(images, classes, generator=rng),
        labelled_embeddings=torch.randn(5, 6, generator=rng),
        embeddings=torch.randn(images, 6, generator=rng),
        committee_class_scores=torch.randn(members, images, classes, generator=rng),
    )


def shuffled(sight, order):
    return dataclasses.replace(
        sight,
        logits=sight.class_scores[order],
        embedding=sight.embeddings[order],
        committee=sight.committee_class_scores[:, order],
    )


def test_uncertainty_settles_2_1_to_2_3_by_hand():
    logits = PROBS.log() + torch.tensor([[5.0], [-3.0], [0.0]])  # a softmax takes any constant away
    want = {
        "confidence": [0.5, 2 / 3, 0.3],  # 1 - best
        "margin": [0.75, 1, 0.5],  # 1 - (.5 - .25), 1 - 0, 1 - (.7 - .2)
        "ratio": [0.5, 1, 2 / 7],  # .25 / .5, 1, .2 / .7
        # .5 ln 2 + .5 ln 4; ln 3; the last one as it stands
        "entropy": [1.5 * math.log(2), math.log(3), -0.1 * math.log(0.1) - 0.2 * math.log(0.2) - 0.7 * math.log(0.7)],
    }
    for how, values in want.items():
        scores = by.uncertainty(logits, how)
        assert scores.values == pytest.approx(values, rel=1e-12) and scores.scored.all(), how
        choice = chosen(how, observed(3, class_scores=logits.float()), 2, rng_for(0, "c"))
        assert choice.positions.tolist() == [1, 0] and choice.scores.values == pytest.approx(values, rel=1e-6)
        assert choice.scores.values.dtype == np.float64


@given(st.lists(st.lists(st.floats(-800, 800), min_size=3, max_size=3), max_size=6))
def test_uncertainties_stay_in_their_ranges_and_equal_a_loop(rows):
    logits = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    found = {how: by.uncertainty(logits, how).values for how in by.UNCERTAINTIES}
    for how, top in (("entropy", math.log(3)), ("margin", 1), ("confidence", 2 / 3), ("ratio", 1)):
        assert ((found[how] >= 0) & (found[how] <= top + 1e-12)).all()
    for i, row in enumerate(rows):
        parts = [math.exp(x - max(row)) for x in row]
        p = sorted(x / sum(parts) for x in parts)
        assert found["entropy"][i] == pytest.approx(-sum(x * math.log(x) for x in p if x > 0), abs=1e-12)
        assert found["margin"][i] == pytest.approx(1 - (p[2] - p[1]), abs=1e-12)
        assert found["confidence"][i] == pytest.approx(1 - p[2], abs=1e-12)
        assert found["ratio"][i] == pytest.approx(p[1] / p[2], abs=1e-12)


def test_uncertainties_of_a_thousand_classes_with_probabilities_of_exactly_zero():
    logits = torch.full((4, 1000), -1e4)
    logits[0, 7] = 1e4  # sure: all other probabilities are exactly 0
    logits[1, [7, 8]] = 1e4  # torn between two
    logits[2, 7], logits[2, 8] = 1e4, 1e4 - 2  # e^-2 to 1
    want = {"confidence": [0, 0.5], "margin": [0, 1], "ratio": [0, 1], "entropy": [0, math.log(2)]}
    uniform = {"confidence": 0.999, "margin": 1, "ratio": 1, "entropy": math.log(1000)}  # all equal: the last row
    for how in by.UNCERTAINTIES:
        values = by.uncertainty(logits, how).values
        assert np.isfinite(values).all()
        assert values[[0, 1, 3]] == pytest.approx([*want[how], uniform[how]], abs=1e-12), how
    assert by.uncertainty(logits, "ratio").values[2] == pytest.approx(math.exp(-2), rel=1e-12)
    assert by.uncertainty(1e308 * logits[:1, :9].sign().double(), "ratio").values.tolist() == [0]  # overflows


def test_a_committee_mccallum_and_nigam_1998_by_hand():
    # two certain members that disagree: consensus (1/2, 1/2), KL = ln 2 each; two that agree: 0
    sure = torch.tensor([[[50.0, -50], [50, -50]], [[-50, 50], [50, -50]]])
    assert by.query_by_committee(sure).values == pytest.approx([math.log(2), 0], abs=1e-12)
    # (3/4, 1/4) and (1/4, 3/4): consensus (1/2, 1/2), KL = 3/4 ln 3/2 + 1/4 ln 1/2
    torn = torch.tensor([[[3.0, 1]], [[1, 3]]], dtype=torch.float64).log()
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert by.query_by_committee(torn).values == pytest.approx([want], rel=1e-12)
    choice = chosen("qbc", observed(2, committee_class_scores=sure), 1, rng_for(0, "c"))
    assert choice.positions.tolist() == [0] and choice.scores.scored.all()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 4), st.floats(0.1, 300))
def test_a_committee_equals_a_loop_whoever_speaks_first(members, images, classes, spread):
    rng = torch_rng_for(members, "committee", images, classes)
    committee = spread * torch.randn(members, images, classes, generator=rng, dtype=torch.float64)
    found = by.query_by_committee(committee).values
    probs = committee.softmax(2).tolist()
    for i in range(images):
        mean = [sum(p[i][c] for p in probs) / members for c in range(classes)]
        apart = [sum(a * math.log(a / b) for a, b in zip(p[i], mean, strict=True) if a > 0) for p in probs]
        assert found[i] == pytest.approx(sum(apart) / members, abs=1e-9)
    assert ((found >= 0) & (found <= math.log(members) + 1e-12)).all()
    assert by.query_by_committee(committee.flip(0)).values == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: by.uncertainty(torch.zeros(2, 3), "doubt"), "one of .*'confidence'.*, got 'doubt'"),
        (lambda: by.uncertainty(torch.zeros(2, 1), "margin"), r"two classes or more, got logits \(2, 1\)"),
        (lambda: by.uncertainty(torch.zeros(2, 1), "ratio"), r"ratio needs two classes .* got logits \(2, 1\)"),
        (lambda: by.query_by_committee(torch.zeros(2, 3)), r"\(M, N, C\) with M >= 1, got \(2, 3\)"),
        (lambda: by.query_by_committee(torch.zeros(0, 2, 3)), r"M >= 1, got \(0, 2, 3\)"),
        (
            lambda: diversity.badge(torch.zeros(2, 3), torch.zeros(3, 4), 1, rng_for(0, "c")),
            r"got \(2, 3\) and \(3, 4\)",
        ),
        (lambda: diversity.badge(torch.zeros(2, 3), torch.zeros(2, 4), -1, rng_for(0, "c")), "a query of -1 images"),
        (
            lambda: diversity.badge(torch.zeros(2, 3), points(1, 2).double() * 1e160, 1, rng_for(0, "c")),
            "non-finite gradient in row 0",
        ),
    ],
)
def test_what_whole_images_cannot_be_scored_by_is_an_error_that_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------------------------------------- BADGE


def hallucinated(logits, embedding):
    """(N, C * D) gradients of the last layer, one row an image, as Ash et al. 2020 eq. 1 writes them."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(p)), logits.argmax(1)] -= 1
    return np.einsum("nc,nd->ncd", p, embedding).reshape(len(p), -1)


def slow_badge(gradients, k, rng):
    """Arthur and Vassilvitskii's seeding on the rows; the first centre is the longest, as in BADGE's code."""
    length = np.linalg.norm(gradients, axis=1)
    tie = rng.permutation(len(length))
    chosen = [int(tie[length[tie].argmax()])] if k else []
    while len(chosen) < k:
        weights = np.min([((gradients - gradients[c]) ** 2).sum(1) for c in chosen], axis=0)
        chosen.append(int(rng.choice(len(weights), p=weights / weights.sum())))
    return chosen, length


def test_badge_ash_2020_by_hand():
    # p = (3/4, 1/4): a = (-1/4, 1/4), |a|^2 = 1/8; h = 4 and 8: |g|^2 = 2 and 8. p = (1/4, 3/4), h = 2: a turned, 1/2
    logits = torch.tensor([[3.0, 1], [3, 1], [1, 3]], dtype=torch.float64).log()
    positions, norms = diversity.badge(logits, points(4, 8, 2), 1, rng_for(0, "c"))
    assert positions.tolist() == [1] and norms == pytest.approx([math.sqrt(2), math.sqrt(8), math.sqrt(0.5)])
    # g = -1, -2 and +1/2 times (1, -1): squared distances to -2 are 1 * 2 and 6.25 * 2, so the third is drawn with
    # probability 6.25 / 7.25 = .862: 345 of 400, standard deviation 6.9
    second = Counter(int(diversity.badge(logits, points(4, 8, 2), 2, rng_for(seed, "c"))[0][1]) for seed in range(400))
    assert set(second) == {0, 2} and 317 < second[2] < 373


@pytest.mark.parametrize("spread", [0.1, 3, 30])
def test_badge_equals_the_naive_version_that_writes_all_gradients_down(spread):
    rng = rng_for(0, "gradients")
    for seed in range(5):
        logits, embedding = spread * rng.normal(size=(60, 5)), rng.normal(size=(60, 7))
        want, lengths = slow_badge(hallucinated(logits, embedding), 25, rng_for(seed, "c"))
        found, norms = diversity.badge(torch.from_numpy(logits), torch.from_numpy(embedding), 25, rng_for(seed, "c"))
        assert found.tolist() == want and norms == pytest.approx(lengths, rel=1e-9)


def test_badge_of_equal_images_takes_each_once_and_others_first():
    logits, embedding = torch.zeros(6, 3), torch.ones(6, 2) / 3
    for wide in (1, 500):  # sums of 500 thirds are rounded
        positions, norms = diversity.badge(logits, embedding.repeat(1, wide), 6, rng_for(0, "c"))
        assert sorted(positions.tolist()) == list(range(6)) and norms.min() == norms.max()
    runs = [tuple(diversity.badge(logits, embedding, 6, rng_for(seed, "c"))[0].tolist()) for seed in range(60)]
    assert len(set(runs)) > 50 and all({run[i] for run in runs} == set(range(6)) for i in range(6))
    # three different images, copied: all three come before any copy
    logits, embedding = class_sight(3).class_scores.repeat(4, 1), class_sight(3).embeddings.repeat(4, 1)
    for seed in range(40):
        positions, _ = diversity.badge(logits, embedding, 12, rng_for(seed, "c"))
        assert sorted(positions[:3] % 3) == [0, 1, 2] and sorted(positions) == list(range(12))


def test_badge_of_a_model_that_is_sure_of_everything_draws_at_random():
    logits = torch.tensor([[1000.0, 0], [0, 1000]]).repeat(3, 1)
    runs = [diversity.badge(logits, torch.ones(6, 2), 3, rng_for(seed, "c")) for seed in range(40)]
    assert all(not norms.any() and len(set(positions.tolist())) == 3 for positions, norms in runs)
    assert {int(i) for positions, _ in runs for i in positions} == set(range(6))


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that anything inside makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.numbers = max([self.numbers, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


def test_badge_never_writes_the_gradients_down():
    images, classes, wide = 20_000, 100, 512  # 8 GB of float64 if it did
    rng = torch_rng_for(0, "large")
    logits, embedding = torch.randn(images, classes, generator=rng), torch.randn(images, wide, generator=rng)
    with Largest() as largest:
        positions, norms = diversity.badge(logits, embedding, 8, rng_for(0, "c"))
    assert len(set(positions.tolist())) == 8 and norms.shape == (images,)
    assert images * wide <= largest.numbers < 2 * images * wide


# ------------------------------------------------------------------------------------------------ model-based outliers


def slow_model_outlier(logits, held, classes=None):
    """1 - mean over columns of the part of held-out logits below, of equal ones the half; counted one by one."""
    out = []
    for row in logits:
        ranks = []
        for c, x in enumerate(row):
            column = [h[c] for v, h in enumerate(held) if classes is None or classes[v] == c]
            if column:
                ranks.append(sum(1.0 if h < x else 0.5 if h == x else 0.0 for h in column) / len(column))
        out.append(1 - sum(ranks) / len(ranks))
    return out


def test_model_outlier_monarch_2021_ch_4_by_hand():
    held = torch.tensor([[1.0, 10], [2, 20], [2, 30], [3, 40]])
    # (2, 35): ranks (1 + 2/2) / 4 = .5 and 3/4 -> 1 - .625; (0, 0): 1; (9, 99): 0; (1, 10): .5/4 each -> .875
    pool = torch.tensor([[2.0, 35], [0, 0], [9, 99], [1, 10]])
    scores = diversity.model_outlier(pool, held)
    assert scores.values.tolist() == [0.375, 1, 0, 0.875] and scores.scored.all()
    # column 0 among images 1 and 3 alone (2, 3), column 1 among 0 and 2 (10, 30): (2, 35): (.25 + 1) / 2
    by_class = diversity.model_outlier(pool, held, np.array([1, 0, 1, 0])).values
    assert by_class.tolist() == [0.375, 1, 0, 1 - (0 + 0.25) / 2]
    only_one = diversity.model_outlier(pool, held, torch.ones(4, dtype=torch.int64)).values  # column 0 does not count
    assert only_one.tolist() == [0.25, 1, 0, 0.875]


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_model_outlier_equals_the_slow_loop_ties_and_all(images, held, columns, seed, coarse):
    rng = rng_for(seed, "outlier")
    pool, others = rng.normal(size=(images, columns)), rng.normal(size=(held, columns))
    if coarse:
        pool, others = np.round(pool), np.round(others)
    classes = rng.integers(0, columns, held)
    tensors = torch.from_numpy(pool), torch.from_numpy(others)
    assert diversity.model_outlier(*tensors).values == pytest.approx(slow_model_outlier(pool, others), abs=1e-12)
    found = diversity.model_outlier(*tensors, classes)
    assert found.values == pytest.approx(slow_model_outlier(pool, others, classes), abs=1e-12)
    assert ((found.values >= 0) & (found.values <= 1)).all() and len(found) == images
    turned = diversity.model_outlier(tensors[0], tensors[1].flip(0), classes[::-1].copy())
    assert np.array_equal(turned.values, found.values)  # the order of the held-out images does not matter


def test_model_outliers_are_low_activations_in_fine_steps():
    """active-vision 0.4.3 asks high activations first and knows C + 1 levels."""
    rng, columns = rng_for(0, "outlier"), 3
    pool = np.linspace(-4, 4, 200)[:, None] + 0.01 * rng.normal(size=(200, columns))  # activations grow row by row
    values = diversity.model_outlier(torch.from_numpy(pool), torch.from_numpy(rng.normal(size=(500, columns)))).values
    assert len(set(values)) > 30 * (columns + 1)
    assert np.corrcoef(values, pool.mean(1))[0, 1] < -0.9
    asked = top_k(Scores(values, np.ones(200, dtype=bool)), 20, rng_for(0, "t"))
    assert asked.max() < 50 and values[asked].min() > 0.95 > 0.05 > values[-20:].max()


# -------------------------------------------------------------------------------------------------- embedding outliers


def unit(rows):
    return [[x / (math.hypot(*row) or 1) for x in row] for row in rows]


def test_embedding_outlier_by_hand():
    # known: east, north. East: 0 and sqrt 2; west: 2 and sqrt 2; twice north: 0; the length does not matter
    known, pool = torch.tensor([[3.0, 0], [0, 0.5]]), torch.tensor([[7.0, 0], [-1, 0], [0, 2], [0, 0]])
    nearest = diversity.embedding_outlier(pool, known, 1)
    assert nearest.values == pytest.approx([0, math.sqrt(2), 0, 1], abs=1e-12) and nearest.scored.all()
    both = diversity.embedding_outlier(pool, known, 10).values  # all that there are
    root = math.sqrt(2)
    assert both == pytest.approx([root / 2, (2 + root) / 2, root / 2, 1], abs=1e-12)


@pytest.mark.parametrize("block", [3, 1024])
def test_embedding_outlier_equals_the_slow_loop_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(diversity, "BLOCK", block)
    rng = rng_for(0, "embedding")
    known = rng.normal(size=(31, 5)) + 1
    pool = np.concatenate([rng.normal(size=(20, 5)), 3 * known[:2], np.zeros((1, 5)), 1e200 * known[2:3]])
    for k in (1, 4, 31, 50):
        want = [sum(sorted(math.dist(x, y) for y in unit(known))[:k]) / min(k, 31) for x in unit(pool)]
        found = diversity.embedding_outlier(torch.from_numpy(pool), torch.from_numpy(known), k)
        assert found.values == pytest.approx(want, abs=1e-9)
        if k == 1:
            assert found.values[[20, 21, 23]].tolist() == [0, 0, 0]  # of labelled images themselves: no rounding


def test_without_labelled_images_nothing_is_far_from_them():
    scores = diversity.embedding_outlier(torch.ones(3, 2), torch.zeros(0, 2))
    assert not scores.scored.any() and not scores.values.any()
    assert len({tuple(top_k(scores, 3, rng_for(seed, "t"))) for seed in range(40)}) == 6  # so they come at random


# ------------------------------------------------------------------------------------------------------------- cluster


def heaps(sizes=(5, 3, 9), wide=4, seed=0, spread=0.1):
    """(N, wide) float32 heaps far from each other, and the heap of each row."""
    rng = rng_for(seed, "heaps")
    heap = np.repeat(np.arange(len(sizes)), sizes)
    rows = 100 * np.eye(wide)[heap] + spread * rng.normal(size=(len(heap), wide))
    order = rng.permutation(len(heap))
    return torch.from_numpy(rows[order]).float(), heap[order]


@pytest.mark.parametrize("many", [10_000, 10])  # k-means, k-means by batches
def test_clusters_give_the_image_nearest_to_each_centre_the_largest_first(many):
    embedding, heap = heaps()
    asked = diversity.cluster(embedding, 3, rng_for(0, "c"), many)
    assert asked.dtype == np.int64 and heap[asked].tolist() == [2, 0, 1]
    rows = embedding.double().numpy()
    if many > 17:  # centres are means: the nearest one by a loop
        for one in asked:
            members = [i for i in range(len(heap)) if heap[i] == heap[one]]
            centre = rows[members].mean(0)
            assert one == min(members, key=lambda i: math.dist(rows[i], centre))


@pytest.mark.parametrize("many", [10_000, 10])
def test_clusters_are_filled_up_where_images_are_equal_and_take_each_once(many):
    rows = torch.tensor([[0.0, 0], [9, 9], [-9, 9]])[[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]]
    for k in (3, 5, 6, 8, 11):
        asked = diversity.cluster(rows, k, rng_for(k, "c"), many)
        assert len(set(asked.tolist())) == k
        assert len({tuple(row) for row in rows[asked[:3]].tolist()}) == 3  # all three before any copy
    assert sorted(diversity.cluster(rows, 12, rng_for(0, "c"), many).tolist()) == list(range(12))
    assert diversity.cluster(rows, 0, rng_for(0, "c"), many).tolist() == []
    firsts = {tuple(diversity.cluster(rows, 3, rng_for(seed, "c"), many)) for seed in range(40)}
    assert {positions[0] for positions in firsts} == set(range(6))  # any of the six copies of the largest heap


def test_clusters_depend_on_the_seed_alone():
    rows = torch.randn(300, 8, generator=torch_rng_for(0, "rows"))
    before = rows.clone()
    for many in (10_000, 100):
        runs = [diversity.cluster(rows, 20, rng_for(seed, "c"), many).tolist() for seed in (0, 0, 1)]
        assert runs[0] == runs[1] != runs[2] and all(len(set(run)) == 20 for run in runs)
    assert torch.equal(rows, before)


# ------------------------------------------------------------------------------------------------------ representative


def test_representative_by_hand():
    # centre of the pool: east (two to the east, north and south cancel out); labelled: north
    pool, known = torch.tensor([[2.0, 0], [5, 0], [0, 1], [0, -3]]), torch.tensor([[0.0, 4]])
    choice = diversity.representative(pool, known, 2, rng_for(0, "c"))
    assert choice.scores.values == pytest.approx([1, 1, -1, 1], abs=1e-12)  # south: 0 - -1
    nobody = diversity.representative(pool, known[:0], 2, rng_for(0, "c"))
    assert nobody.scores.values == pytest.approx([1, 1, 0, 0], abs=1e-12)
    firsts = {int(diversity.representative(pool, known[:0], 2, rng_for(s, "c")).positions[0]) for s in range(30)}
    assert firsts == {0, 1}  # ties break by the generator


@pytest.mark.parametrize("block", [4, 1024])
def test_representative_equals_the_slow_loop_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(diversity, "BLOCK", block)
    rng = rng_for(0, "embedding")
    pool, known = rng.normal(size=(23, 5)) + 1, rng.normal(size=(9, 5)) - 1

    def centre(rows):
        (mean,) = unit([[sum(column) for column in zip(*unit(rows), strict=True)]])
        return mean

    def cosine(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True))

    want = [cosine(x, centre(pool)) - cosine(x, centre(known)) for x in unit(pool)]
    choice = diversity.representative(torch.from_numpy(pool), torch.from_numpy(known), 6, rng_for(0, "c"))
    assert choice.scores.values == pytest.approx(want, abs=1e-12)
    assert choice.positions.tolist() == sorted(range(23), key=lambda i: -want[i])[:6]


# ---------------------------------------------------------------------------------------------------------- combination


def slow_portions(shares, k):
    """One image after the other: whole parts in hundredths, the rest to whoever lacks most."""
    sizes = [share * k // 100 for share in shares]
    lacks = [share * k % 100 for share in shares]
    for _ in range(k - sum(sizes)):
        first = lacks.index(max(lacks))
        sizes[first], lacks[first] = sizes[first] + 1, -1
    return sizes


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6), st.integers(0, 400))
def test_portions_are_the_largest_remainders_and_add_up(cuts, k):
    edges = [0, *sorted(cuts), 100]
    hundredths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    shares = {f"way {i}": share / 100 for i, share in enumerate(hundredths)}
    sizes = select.portions(shares, k)
    assert list(sizes) == list(shares) and list(sizes.values()) == slow_portions(hundredths, k)
    assert sum(sizes.values()) == k and all(abs(sizes[n] - share * k) < 1 + 1e-6 for n, share in shares.items())


def test_portions_by_hand():
    assert select.portions({"a": 0.4, "b": 0.2, "c": 0.2, "d": 0.1, "e": 0.1}, 30) == dict(a=12, b=6, c=6, d=3, e=3)
    assert select.portions({"a": 0.5, "b": 0.26, "c": 0.24}, 10) == dict(a=5, b=3, c=2)  # 2.6, 2.4: not the first
    assert select.portions({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 5) == dict(a=2, b=2, c=1)  # equal: the first ones
    assert select.portions({"a": 0.29, "b": 0.71}, 100) == dict(a=29, b=71)  # .29 * 100 is 28.99... in floats
    assert select.portions({"a": np.float32(0.5), "b": 0.5}, 1) == dict(a=1, b=0)


def test_a_combination_asks_in_order_among_what_is_left_and_nobody_twice():
    told = []

    def ask(name, left, count):
        told.append((name, left.tolist(), count))
        picked = (left if name == "low" else left[::-1])[:count].copy()
        left[:] = -1  # its own copy
        return picked

    positions = select.combination({"low": 0.5, "none": 0, "high": 0.25, "again": 0.25}, ask, 4, 6)
    assert positions.tolist() == [0, 1, 5, 4] and positions.dtype == np.int64
    assert told == [("low", [0, 1, 2, 3, 4, 5], 2), ("high", [2, 3, 4, 5], 1), ("again", [2, 3, 4], 1)]
    assert select.combination({"low": 1}, ask, 0, 6).tolist() == []


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 40), st.integers(0, 9))
def test_a_combination_takes_exactly_k_different_ones_the_same_for_a_seed(weights, k, seed):
    shares = {f"way {i}": weight / sum(weights) for i, weight in enumerate(weights)}

    def run():
        rng = rng_for(seed, "combination")
        return select.combination(shares, lambda name, left, count: rng.choice(left, count, replace=False), k, 40)

    positions = run()
    assert len(set(positions.tolist())) == len(positions) == k and np.array_equal(positions, run())
    assert set(positions.tolist()) <= set(range(40))


def broken(values):
    return lambda name, left, count: np.array(values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diversity.model_outlier(torch.zeros(2, 3), torch.zeros(2, 4)), r"same columns.*\(2, 3\) and \(2, 4\)"),
        (lambda: diversity.model_outlier(torch.zeros(2, 3), torch.zeros(0, 3)), "one or more of them, got none"),
        (lambda: diversity.model_outlier(torch.zeros(2, 3), torch.zeros(4, 3), [0, 1]), r"4 held-out .* got \(2,\)"),
        (lambda: diversity.model_outlier(torch.zeros(2, 3), torch.zeros(2, 3), [0, 3]), r"class 3 of .* 0\.\.2"),
        (lambda: diversity.model_outlier(torch.zeros(2, 3), torch.zeros(2, 3), [-1, 2]), "class -1 of a held-out"),
        (lambda: diversity.model_outlier(points(1, math.nan), points(1)), "non-finite logits in row 1"),
        (lambda: diversity.model_outlier(points(1), points(1, math.inf)), "non-finite held_out_logits in row 1"),
        (lambda: diversity.embedding_outlier(points(1), torch.zeros(2, 2)), r"same columns.*\(1, 1\) and \(2, 2\)"),
        (lambda: diversity.embedding_outlier(points(1), points(1), 0), "1 or more, got k = 0"),
        (lambda: diversity.embedding_outlier(points(1, math.nan), points(1)), "non-finite embedding in row 1"),
        (
            lambda: diversity.embedding_outlier(points(*[1] * 20_000, math.nan, 1), points(1)),
            "non-finite embedding in row 20000",
        ),
        (lambda: diversity.embedding_outlier(points(1), points(1, math.inf)), "non-finite labelled in row 1"),
        (lambda: diversity.cluster(points(1, 2), 3, rng_for(0, "c")), "a query of 3 images.* pool has 2"),
        (lambda: diversity.cluster(points(1, math.nan), 1, rng_for(0, "c")), "non-finite embedding in row 1"),
        (lambda: diversity.representative(points(1, 2), points(1), 3, rng_for(0, "c")), "a query of 3 images"),
        (lambda: diversity.representative(points(math.inf), points(1), 1, rng_for(0, "c")), "embedding in row 0"),
        (lambda: diversity.representative(points(1), points(1, math.nan), 1, rng_for(0, "c")), "labelled in row 1"),
        (lambda: select.portions({"a": 0.5, "b": 0.5 + 1e-8}, 3), "sum to 1.00000001; they must sum to 1"),
        (lambda: select.portions({}, 3), "must sum to 1"),
        (lambda: select.portions({"a": 1.5, "b": -0.5}, 3), "share of 'b' is -0.5"),
        (lambda: select.portions({"a": math.nan}, 3), "share of 'a' is nan"),
        (lambda: select.portions({"a": 1}, -1), "a query of -1 images"),
        (lambda: select.combination({"a": 1}, broken([0, 0]), 2, 5), "'a' had to select 2 different of the 5 images"),
        (lambda: select.combination({"a": 1}, broken([0, 5]), 2, 5), r"left, got \[0, 5\] of shape \(2,\)"),
        (lambda: select.combination({"a": 1}, broken([0]), 2, 5), "select 2 different"),
        (lambda: select.combination({"a": 0.5, "b": 0.5}, broken([3]), 2, 5), "'b' had to select 1 .* the 4 images"),
        (lambda: select.combination({"a": 1}, broken([0]), 6, 5), "a query of 6 images.* pool has 5"),
    ],
)
def test_what_diversity_and_shares_cannot_work_with_is_an_error_that_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()
