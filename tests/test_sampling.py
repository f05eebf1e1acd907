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
from torch.utils._python_dispatch import TorchDispatchMode

from fedal_utils import sampling
from fedal_utils.boxes import Detections
from fedal_utils.sampling import Scores, Sight, View, cascade, choose, k_center, score, top_k
from fedal_utils.seeding import rng_for, torch_rng_for

VALUES = ("confidence", "entropy", "margin")
REDUCED = [name for name in sampling.BOX_STRATEGIES if name not in ("random", "count", "coreset")]


def detections(images, columns=4, length=None):
    """images: for each image a list of (confidence, class distribution); padding of `length` holds rubbish."""
    length = max([len(image) for image in images] + [length or 0])
    boxes = torch.full((len(images), length, 4), 7.0)
    scores = torch.full((len(images), length), 0.123)  # rubbish where padded: only labels may say what is real
    labels = torch.zeros(len(images), length, dtype=torch.int64)
    probs = torch.full((len(images), length, columns), 0.321)
    for i, image in enumerate(images):
        for j, (confidence, p) in enumerate(image):
            scores[i, j], labels[i, j], probs[i, j] = confidence, 1, torch.tensor(p)
    return Detections(boxes, scores, labels, probs)


def confidences(*images):
    return detections([[(c, [1 - c, c, 0.0, 0.0]) for c in image] for image in images])


def values_of(strategy, found):
    return score(strategy, found, len(found), rng_for(0, "s")).values


# ---------------------------------------------------------------------------------------------------- worked by hand


def test_least_confidence_van_bommel_7_1_sum_avg_max_by_hand():
    # c = .9, .6, .3: 1 - c = .1, .4, .7: SUM 1.2, AVG .4, MAX .7. The second image: c = .5: all three .5.
    found = confidences([0.9, 0.6, 0.3], [0.5])
    assert values_of("sum", found) == pytest.approx([1.2, 0.5])
    assert values_of("avg", found) == pytest.approx([0.4, 0.5])
    assert values_of("max", found) == pytest.approx([0.7, 0.5])
    # the crowded image comes first under SUM and MAX, the other one under AVG
    first = {how: top_k(score(how, found, 2, rng_for(0, "s")), 1, rng_for(0, "t"))[0] for how in ("sum", "avg", "max")}
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


def test_box_count_scores_every_image():
    scores = score("count", confidences([0.9, 0.3], [], [0.5]), 3, rng_for(0, "s"))
    assert scores.values.tolist() == [2, 0, 1] and scores.scored.all()


def test_random_looks_at_nothing_and_depends_on_the_generator_only():
    a = score("random", None, 5, rng_for(0, "s"))
    assert np.array_equal(a.values, score("random", None, 5, rng_for(0, "s")).values)
    assert not np.array_equal(a.values, score("random", None, 5, rng_for(1, "s")).values)
    assert a.scored.all() and len(set(a.values)) == 5 and ((0 <= a.values) & (a.values < 1)).all()


def test_images_without_detections_are_marked_and_carry_no_number():
    for strategy in REDUCED:
        scores = score(strategy, confidences([], [0.9], []), 3, rng_for(0, "s"))
        assert scores.scored.tolist() == [False, True, False]
        assert np.isfinite(scores.values).all()
        nothing = score(strategy, confidences([], []), 2, rng_for(0, "s"))  # T = 0: not one detection anywhere
        assert not nothing.scored.any() and len(nothing) == 2


# --------------------------------------------------------------------------------------------------------------- laws


distribution = (
    st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any).map(lambda row: [n / sum(row) for n in row])
)
image = st.lists(st.tuples(st.floats(0, 1, width=32), distribution), max_size=5)


@given(st.lists(image, min_size=1, max_size=5))
def test_every_strategy_equals_the_oracle(images):
    found = detections(images)
    for strategy in [*REDUCED, "count"]:
        got = score(strategy, found, len(images), rng_for(0, "s"))
        for i, one in enumerate(images):
            want = oracles.image_score(strategy, [c for c, _ in one], [p for _, p in one])
            assert got.scored[i] == (want is not None)
            if want is not None:
                assert got.values[i] == pytest.approx(want, abs=1e-5)


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
        a, b = (score(strategy, found, len(images), rng_for(0, "s")) for found in (plain, padded))
        assert a.values == pytest.approx(b.values, abs=1e-12)
        assert a.scored.tolist() == b.scored.tolist()
    for how in ("sum", "avg", "max"):  # confidences are float32: their float64 sums are exact, so not one bit moves
        assert np.array_equal(values_of(how, plain), values_of(how, padded))


def test_nan_in_the_padding_is_not_looked_at():
    found = confidences([0.9], [0.5, 0.4])
    found.scores[0, 1] = float("nan")
    assert values_of("sum", found) == pytest.approx([0.1, 1.1])


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
        score("sum", found, 2, rng_for(0, "s"))
    found.probs[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="non-finite score for image 0 of 2"):
        score("entropy_max", found, 2, rng_for(0, "s"))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="non-finite score at position 1"):
            top_k(Scores(np.array([0.0, bad]), np.ones(2, dtype=bool)), 1, rng_for(0, "t"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(Scores(np.zeros(3), np.ones(3, bool)), 4, rng_for(0, "t")), "budget of 4 images.* pool has 3"),
        (lambda: top_k(Scores(np.zeros(3), np.ones(3, bool)), -1, rng_for(0, "t")), "budget of -1 images"),
        (lambda: top_k(Scores(np.zeros(3), np.ones(3, bool)), 1, rng_for(0, "t"), "middle"), "got 'middle'"),
        (lambda: score("best", None, 3, rng_for(0, "s")), "strategy must be one of .*'margin_max'.* got 'best'"),
        (lambda: score("sum", None, 3, rng_for(0, "s")), "strategy 'sum' needs detections of 3 images, got none"),
        (lambda: score("sum", confidences([0.5]), 3, rng_for(0, "s")), "needs detections of 3 images, got 1"),
        (lambda: score("coreset", None, 3, rng_for(0, "s")), "it has no score of one image"),
        (lambda: score("badge", None, 3, rng_for(0, "s")), "it has no score of one image"),
        (lambda: score("entropy", confidences([0.5]), 1, rng_for(0, "s")), "whole images by their class scores"),
        (lambda: sampling.needs("best"), "strategy must be one of .* got 'best'"),
        (lambda: choose("best", Sight(3), 1, rng_for(0, "c")), "strategy must be one of .* got 'best'"),
        (lambda: choose("sum", Sight(3), 1, rng_for(0, "c")), "needs detections of 3 images, got none"),
        (lambda: choose("sum", Sight(3, confidences([0.5])), 1, rng_for(0, "c")), "needs detections of 3 .*, got 1"),
        (lambda: choose("random", Sight(3), 4, rng_for(0, "c")), "budget of 4 images.* pool has 3"),
        (lambda: choose("coreset", Sight(2, embedding=torch.ones(2, 1)), 1, rng_for(0, "c")), "needs embeddings"),
        (lambda: choose("coreset", Sight(2, known=torch.ones(2, 1)), 1, rng_for(0, "c")), "needs embeddings"),
        (
            lambda: choose("coreset", Sight(3, embedding=points(1, 2), known=points(0)), 1, rng_for(0, "c")),
            "needs embeddings of 3 images, got 2",
        ),
        (lambda: k_center(points(1, 2), points(0), 3, rng_for(0, "c")), "budget of 3 images.* pool has 2"),
        (lambda: k_center(points(1, 2), points(0), -1, rng_for(0, "c")), "budget of -1 images"),
        (lambda: k_center(points(1, math.nan), points(0), 1, rng_for(0, "c")), "non-finite embedding in row 1"),
        (lambda: k_center(points(1, 2), points(0, math.inf), 1, rng_for(0, "c")), "non-finite known in row 1"),
        (lambda: cascade([flat(4)], [2, 1], rng_for(0, "c")), "got 1 steps and sizes .2, 1."),
        (lambda: cascade([], [], rng_for(0, "c")), "one size a step, got 0 steps"),
        (lambda: cascade([flat(4), flat(4)], [1, 2], rng_for(0, "c")), r"must not grow, got \[1, 2\]"),
        (lambda: cascade([flat(4), flat(4)], [5, 2], rng_for(0, "c")), "budget of 5 images.* pool has 4"),
        (lambda: sampling.reduce(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), "median"), "got 'median'"),
    ],
)
def test_what_cannot_be_scored_or_chosen_is_an_error_that_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scores_are_pure():
    found = confidences([0.9, 0.6], [0.5])
    before = [t.clone() for t in (found.boxes, found.scores, found.labels, found.probs)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    sight = Sight(2, found, embedding=points(1, 2), known=points(0))
    first, again = (
        {name: choose(name, sight, 1, rng_for(0, "s")).scores.values.tolist() for name in sampling.BOX_STRATEGIES}
        for _ in range(2)
    )
    assert first == again
    assert torch.equal(sight.embedding, points(1, 2)) and torch.equal(sight.known, points(0))
    for old, new in zip(before, (found.boxes, found.scores, found.labels, found.probs), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_strategy_runs_on_what_a_detector_returns():
    found = Detections(
        torch.rand(6, 3, 4, generator=torch_rng_for(0, "b")), torch.rand(6, 3, generator=torch_rng_for(0, "s")),
        torch.randint(0, 3, (6, 3), generator=torch_rng_for(0, "l")),
        torch.rand(6, 3, 3, generator=torch_rng_for(0, "p")).softmax(-1),
    )  # fmt: skip
    sight = Sight(6, found, embedding=torch.rand(6, 5, generator=torch_rng_for(0, "e")), known=torch.zeros(0, 5))
    for name in sampling.BOX_STRATEGIES:
        choice = choose(name, sight, 4, rng_for(0, "s"))
        assert len(set(choice.positions.tolist())) == 4 and len(choice.scores) == 6


# ------------------------------------------------------------------------------------ a strategy, its sight, its choice


def points(*places):
    """Embeddings of one dimension, easy to see: (N, 1)."""
    return torch.tensor(places, dtype=torch.float32)[:, None]


def flat(count):
    return Scores(np.zeros(count), np.ones(count, dtype=bool))


def test_each_strategy_says_what_it_looks_at():
    needs = {name: set(sampling.needs(name)) for name in sampling.STRATEGIES}
    assert needs.pop("random") == set() and needs.pop("coreset") == {"embedding", "known"}
    assert needs.pop("badge") == {"logits", "embedding"} and needs.pop("qbc") == {"committee"}
    assert all(needs.pop(name) == {"logits"} for name in sampling.UNCERTAINTIES)
    assert len(needs) == 10 and all(fields == {"detections"} for fields in needs.values())
    every = {field for name in sampling.STRATEGIES for field in sampling.needs(name)}
    assert {f.name for f in dataclasses.fields(Sight)} >= every


def test_strategies_of_boxes_come_first_then_those_of_whole_images():
    boxes, classes = sampling.BOX_STRATEGIES, sampling.CLASS_STRATEGIES
    assert classes == ("random", "entropy", "margin", "confidence", "coreset", "badge", "qbc")
    assert sampling.STRATEGIES == (*boxes, "entropy", "margin", "confidence", "badge", "qbc")
    assert set(boxes) & set(classes) == {"random", "coreset"}


def test_a_sight_has_no_room_for_labels():
    hidden = {"labels", "truth", "classes", "ignore", "oracle", "pool"}
    assert not hidden & {f.name for f in dataclasses.fields(Sight)}
    assert {f.name for f in dataclasses.fields(View)} == {"moved", "found"}
    assert dict(Sight(3).views) == {} and Sight(3).detections is None  # what is not looked at need not be there


@pytest.mark.parametrize("strategy", [name for name in sampling.BOX_STRATEGIES if name != "coreset"])
def test_choosing_is_scoring_and_then_the_best_by_the_same_generator(strategy):
    found = confidences([0.9, 0.6], [], [0.5], [0.7, 0.7])
    rng = rng_for(3, "c")
    want_scores = score(strategy, found, 4, rng)
    want = top_k(want_scores, 3, rng, "first")
    choice = choose(strategy, Sight(4, found), 3, rng_for(3, "c"), "first")
    assert np.array_equal(choice.positions, want)
    assert np.array_equal(choice.scores.values, want_scores.values)
    assert np.array_equal(choice.scores.scored, want_scores.scored)


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
    choice = choose("coreset", Sight(4, embedding=points(1, 4, 10, 11), known=points(0)), 2, rng_for(0, "c"))
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
    return Sight(
        images, logits=2 * torch.randn(images, classes, generator=rng), known=torch.randn(5, 6, generator=rng),
        embedding=torch.randn(images, 6, generator=rng), committee=torch.randn(members, images, classes, generator=rng),
    )  # fmt: skip


def shuffled(sight, order):
    return dataclasses.replace(
        sight, logits=sight.logits[order], embedding=sight.embedding[order], committee=sight.committee[:, order]
    )


def test_uncertainty_settles_2_1_to_2_3_by_hand():
    logits = PROBS.log() + torch.tensor([[5.0], [-3.0], [0.0]])  # a softmax takes any constant away
    want = {
        "confidence": [0.5, 2 / 3, 0.3],  # 1 - best
        "margin": [0.75, 1, 0.5],  # 1 - (.5 - .25), 1 - 0, 1 - (.7 - .2)
        # .5 ln 2 + .5 ln 4; ln 3; the last one as it stands
        "entropy": [1.5 * math.log(2), math.log(3), -0.1 * math.log(0.1) - 0.2 * math.log(0.2) - 0.7 * math.log(0.7)],
    }
    for how, values in want.items():
        scores = sampling.uncertainty(logits, how)
        assert scores.values == pytest.approx(values, rel=1e-12) and scores.scored.all(), how
        choice = choose(how, Sight(3, logits=logits.float()), 2, rng_for(0, "c"))
        assert choice.positions.tolist() == [1, 0] and choice.scores.values == pytest.approx(values, rel=1e-6)
        assert choice.scores.values.dtype == np.float64


@given(st.lists(st.lists(st.floats(-800, 800), min_size=3, max_size=3), max_size=6))
def test_uncertainties_stay_in_their_ranges_and_equal_a_loop(rows):
    logits = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    found = {how: sampling.uncertainty(logits, how).values for how in sampling.UNCERTAINTIES}
    for how, top in (("entropy", math.log(3)), ("margin", 1), ("confidence", 2 / 3)):
        assert ((found[how] >= 0) & (found[how] <= top + 1e-12)).all()
    for i, row in enumerate(rows):
        parts = [math.exp(x - max(row)) for x in row]
        p = sorted(x / sum(parts) for x in parts)
        assert found["entropy"][i] == pytest.approx(-sum(x * math.log(x) for x in p if x > 0), abs=1e-12)
        assert found["margin"][i] == pytest.approx(1 - (p[2] - p[1]), abs=1e-12)
        assert found["confidence"][i] == pytest.approx(1 - p[2], abs=1e-12)


def test_a_committee_mccallum_and_nigam_1998_by_hand():
    # two certain members that disagree: consensus (1/2, 1/2), KL = ln 2 each; two that agree: 0
    sure = torch.tensor([[[50.0, -50], [50, -50]], [[-50, 50], [50, -50]]])
    assert sampling.query_by_committee(sure).values == pytest.approx([math.log(2), 0], abs=1e-12)
    # (3/4, 1/4) and (1/4, 3/4): consensus (1/2, 1/2), KL = 3/4 ln 3/2 + 1/4 ln 1/2
    torn = torch.tensor([[[3.0, 1]], [[1, 3]]], dtype=torch.float64).log()
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert sampling.query_by_committee(torn).values == pytest.approx([want], rel=1e-12)
    choice = choose("qbc", Sight(2, committee=sure), 1, rng_for(0, "c"))
    assert choice.positions.tolist() == [0] and choice.scores.scored.all()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 4), st.floats(0.1, 300))
def test_a_committee_equals_a_loop_whoever_speaks_first(members, images, classes, spread):
    rng = torch_rng_for(members, "committee", images, classes)
    committee = spread * torch.randn(members, images, classes, generator=rng, dtype=torch.float64)
    found = sampling.query_by_committee(committee).values
    probs = committee.softmax(2).tolist()
    for i in range(images):
        mean = [sum(p[i][c] for p in probs) / members for c in range(classes)]
        apart = [sum(a * math.log(a / b) for a, b in zip(p[i], mean, strict=True) if a > 0) for p in probs]
        assert found[i] == pytest.approx(sum(apart) / members, abs=1e-9)
    assert ((found >= 0) & (found <= math.log(members) + 1e-12)).all()
    assert sampling.query_by_committee(committee.flip(0)).values == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("strategy", sampling.CLASS_STRATEGIES)
def test_strategies_of_whole_images_choose_each_once_are_pure_and_move_with_the_pool(strategy):
    sight, order = class_sight(), torch.from_numpy(rng_for(0, "order").permutation(12))
    first, again = (choose(strategy, sight, 7, rng_for(1, "c")) for _ in range(2))
    assert np.array_equal(first.positions, again.positions)
    assert np.array_equal(first.scores.values, again.scores.values) and first.scores.scored.all()
    assert len(set(first.positions.tolist())) == 7 and first.positions.dtype == np.int64
    fresh = class_sight()
    for name in ("logits", "embedding", "known", "committee"):
        assert torch.equal(getattr(sight, name), getattr(fresh, name)), name
    moved = choose(strategy, shuffled(sight, order), 7, rng_for(1, "c"))
    if strategy != "random":
        assert moved.scores.values == pytest.approx(first.scores.values[order], rel=1e-9)
        assert order[moved.positions[0]] == first.positions[0]
    if strategy not in ("random", "badge"):  # those two draw
        assert order[moved.positions].tolist() == first.positions.tolist()
    assert len(choose(strategy, sight, 0, rng_for(1, "c")).positions) == 0
    assert sorted(choose(strategy, sight, 12, rng_for(1, "c")).positions.tolist()) == list(range(12))
    with pytest.raises(ValueError, match="budget of 13 images, but the pool has 12"):
        choose(strategy, sight, 13, rng_for(1, "c"))
    nobody = class_sight(images=0)
    assert len(choose(strategy, nobody, 0, rng_for(1, "c")).positions) == 0


@pytest.mark.parametrize("strategy", [name for name in sampling.CLASS_STRATEGIES if name != "random"])
def test_strategies_of_whole_images_need_their_fields_of_these_images_and_finite(strategy):
    for field in sampling.needs(strategy) - {"known"}:
        sight = class_sight()
        values = getattr(sight, field)
        with pytest.raises(ValueError, match=f"{strategy}' needs .*embeddings|needs '{field}' of its Sight, which has"):
            choose(strategy, dataclasses.replace(sight, **{field: None}), 1, rng_for(0, "c"))
        short = values[:, :7] if field == "committee" else values[:7]
        with pytest.raises(ValueError, match=f"'{strategy}' needs .* of 12 images, got 7"):
            choose(strategy, dataclasses.replace(sight, **{field: short}), 1, rng_for(0, "c"))
        for bad in (math.nan, math.inf):
            broken = values.clone()
            broken[..., 3, 1] = bad
            with pytest.raises(ValueError, match=f"non-finite {field} in row 3"):
                choose(strategy, dataclasses.replace(sight, **{field: broken}), 1, rng_for(0, "c"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampling.uncertainty(torch.zeros(2, 3), "doubt"), "one of .*'confidence'.*, got 'doubt'"),
        (lambda: sampling.uncertainty(torch.zeros(2, 1), "margin"), r"two classes or more, got logits \(2, 1\)"),
        (lambda: sampling.query_by_committee(torch.zeros(2, 3)), r"\(M, N, C\) with M >= 1, got \(2, 3\)"),
        (lambda: sampling.query_by_committee(torch.zeros(0, 2, 3)), r"M >= 1, got \(0, 2, 3\)"),
        (
            lambda: sampling.badge(torch.zeros(2, 3), torch.zeros(3, 4), 1, rng_for(0, "c")),
            r"got \(2, 3\) and \(3, 4\)",
        ),
        (lambda: sampling.badge(torch.zeros(2, 3), torch.zeros(2, 4), -1, rng_for(0, "c")), "budget of -1 images"),
        (
            lambda: sampling.badge(torch.zeros(2, 3), points(1, 2).double() * 1e160, 1, rng_for(0, "c")),
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
    positions, norms = sampling.badge(logits, points(4, 8, 2), 1, rng_for(0, "c"))
    assert positions.tolist() == [1] and norms == pytest.approx([math.sqrt(2), math.sqrt(8), math.sqrt(0.5)])
    # g = -1, -2 and +1/2 times (1, -1): squared distances to -2 are 1 * 2 and 6.25 * 2, so the third is drawn with
    # probability 6.25 / 7.25 = .862: 345 of 400, standard deviation 6.9
    second = Counter(int(sampling.badge(logits, points(4, 8, 2), 2, rng_for(seed, "c"))[0][1]) for seed in range(400))
    assert set(second) == {0, 2} and 317 < second[2] < 373


@pytest.mark.parametrize("spread", [0.1, 3, 30])
def test_badge_equals_the_naive_version_that_writes_all_gradients_down(spread):
    rng = rng_for(0, "gradients")
    for seed in range(5):
        logits, embedding = spread * rng.normal(size=(60, 5)), rng.normal(size=(60, 7))
        want, lengths = slow_badge(hallucinated(logits, embedding), 25, rng_for(seed, "c"))
        found, norms = sampling.badge(torch.from_numpy(logits), torch.from_numpy(embedding), 25, rng_for(seed, "c"))
        assert found.tolist() == want and norms == pytest.approx(lengths, rel=1e-9)


def test_badge_of_equal_images_takes_each_once_and_others_first():
    logits, embedding = torch.zeros(6, 3), torch.ones(6, 2) / 3
    for wide in (1, 500):  # sums of 500 thirds are rounded
        positions, norms = sampling.badge(logits, embedding.repeat(1, wide), 6, rng_for(0, "c"))
        assert sorted(positions.tolist()) == list(range(6)) and norms.min() == norms.max()
    runs = [tuple(sampling.badge(logits, embedding, 6, rng_for(seed, "c"))[0].tolist()) for seed in range(60)]
    assert len(set(runs)) > 50 and all({run[i] for run in runs} == set(range(6)) for i in range(6))
    # three different images, copied: all three come before any copy
    logits, embedding = class_sight(3).logits.repeat(4, 1), class_sight(3).embedding.repeat(4, 1)
    for seed in range(40):
        positions, _ = sampling.badge(logits, embedding, 12, rng_for(seed, "c"))
        assert sorted(positions[:3] % 3) == [0, 1, 2] and sorted(positions) == list(range(12))


def test_badge_of_a_model_that_is_sure_of_everything_draws_at_random():
    logits = torch.tensor([[1000.0, 0], [0, 1000]]).repeat(3, 1)
    runs = [sampling.badge(logits, torch.ones(6, 2), 3, rng_for(seed, "c")) for seed in range(40)]
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
        positions, norms = sampling.badge(logits, embedding, 8, rng_for(0, "c"))
    assert len(set(positions.tolist())) == 8 and norms.shape == (images,)
    assert images * wide <= largest.numbers < 2 * images * wide
