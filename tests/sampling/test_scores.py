"""Scores by hand with their equation numbers, the laws between reductions, and selection with seeded ties."""

import math
from collections import Counter

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from observed import chosen, observed, scored

from fedal_utils.data import Detections
from fedal_utils.sampling import Scores, cascade, diversity, mixture, portions, strategies, strategy, top_k
from fedal_utils.sampling import scores as by
from fedal_utils.seeding import rng_for, torch_rng_for

LN4 = math.log(4)
VALUES = ("confidence", "entropy", "margin", "ratio")
REDUCED = ("sum", "avg", "max", *(f"{v}_{h}" for v in VALUES[1:] for h in ("sum", "avg", "max")))


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


def test_least_confidence_van_bommel_7_1_sum_avg_max_by_hand():
    # c = .9, .6, .3: 1 - c = .1, .4, .7: SUM 1.2, AVG .4, MAX .7. The second image: c = .5: all three .5.
    found = confidences([0.9, 0.6, 0.3], [0.5])
    assert values_of("sum", found) == pytest.approx([1.2, 0.5])
    assert values_of("avg", found) == pytest.approx([0.4, 0.5])
    assert values_of("max", found) == pytest.approx([0.7, 0.5])
    # the crowded image comes first under SUM and MAX, the other one under AVG
    first = {how: top_k(scored(how, found, 2, rng_for(0, "s")), 1, rng_for(0, "t"))[0] for how in ("sum", "avg", "max")}
    assert first == {"sum": 0, "avg": 1, "max": 0}


@pytest.mark.parametrize(("value", "pair"), [("entropy", (0.5 * LN4, LN4)), ("margin", (0.7, 1)), ("ratio", (0.5, 1))])
def test_entropy_margin_and_ratio_settles_2_2_2_3_and_monarch_ch_3_by_hand(value, pair):
    # entropy: (.5, .5, 0, 0): ln 2; (.25 x 4): ln 4; (1, 0, 0, 0): 0. Others: (.1, .6, .3, 0): 1 - (.6 - .3) = .7 and
    # .3 / .6 = .5; (.45, .45, .1, 0): 1 and 1; (0, 1, 0, 0): 0 and 0.
    rows = ([0.5, 0.5, 0, 0], [0.25] * 4) if value == "entropy" else ([0.1, 0.6, 0.3, 0], [0.45, 0.45, 0.1, 0])
    found = detections([[(max(p[1:]), p) for p in rows], [(1.0, [0, 1.0, 0, 0])]])
    for how, want in (("sum", sum(pair)), ("avg", sum(pair) / 2), ("max", max(pair))):
        assert values_of(f"{value}_{how}", found) == pytest.approx([want, 0])


def test_images_without_detections_are_marked_and_carry_no_number():
    some, nothing, held = confidences([], [0.9], []), confidences([], []), confidences([0.4, 0.8])  # T = 0: not one box
    for name in REDUCED + ("outlier",):
        for found, want in ((some, [False, True, False]), (nothing, [False, False])):
            given = name, found, len(want), rng_for(0, "s")
            scores = scored(*given) if name in REDUCED else diversity.box_outlier(found, held)
            assert scores.scored.tolist() == want and np.isfinite(scores.values).all()
    unranked = diversity.box_outlier(
        confidences([0.9], [0.5]), nothing
    )  # nothing was found on held-out images: no rank
    assert not unranked.scored.any() and np.isfinite(unranked.values).all() and len(unranked) == 2


distribution = (
    st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any).map(lambda row: [n / sum(row) for n in row])
)
image = st.lists(st.tuples(st.floats(0, 1, width=32), distribution), max_size=5)


@given(st.lists(image, min_size=1, max_size=5))
def test_every_strategy_equals_the_oracle(images):
    found = detections(images)
    for name in [*REDUCED, "count"]:
        got = scored(name, found, len(images), rng_for(0, "s"))
        for i, one in enumerate(images):
            want = oracles.image_score(name, [c for c, _ in one], [p for _, p in one])
            assert got.scored[i] == (want is not None)
            if want is not None:
                assert got.values[i] == pytest.approx(want, abs=1e-5)


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


@given(st.lists(image, min_size=1, max_size=4), st.integers(0, 9))
def test_padding_never_matters(images, extra):
    plain, padded = detections(images), detections(images, length=5 + extra)
    for name in [*REDUCED, "count"]:
        a, b = (scored(name, found, len(images), rng_for(0, "s")) for found in (plain, padded))
        assert a.values == pytest.approx(b.values, abs=1e-12)
        assert a.scored.tolist() == b.scored.tolist()
    held = confidences([0.4, 0.8], [0.6])
    a, b = diversity.box_outlier(plain, held), diversity.box_outlier(padded, held)
    assert a.values == pytest.approx(b.values, abs=1e-12) and a.scored.tolist() == b.scored.tolist()
    turned = diversity.box_outlier(held, plain), diversity.box_outlier(held, padded)  # padding of the held-out ones
    assert np.array_equal(turned[0].values, turned[1].values) and np.array_equal(turned[0].scored, turned[1].scored)
    for how in ("sum", "avg", "max"):  # confidences are float32: their float64 sums are exact, so not one bit moves
        assert np.array_equal(values_of(how, plain), values_of(how, padded))


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


def test_a_non_finite_score_names_the_image_and_never_sorts():
    found = confidences([0.9], [0.5, 0.4])
    found.scores[1, 1] = float("nan")
    with pytest.raises(ValueError, match="non-finite score in row 1"):
        scored("sum", found, 2, rng_for(0, "s"))
    found.probs[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="non-finite score in row 0"):
        scored("entropy_max", found, 2, rng_for(0, "s"))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="non-finite score at position 1"):
            top_k(Scores(np.array([0.0, bad]), np.ones(2, dtype=bool)), 1, rng_for(0, "t"))


def test_a_cascade_by_hand():
    first = Scores(np.array([5.0, 4.0, 3.0, 2.0, 9.0]), np.ones(5, dtype=bool))
    second = Scores(np.array([1.0, 3.0, 2.0, 99.0, 0.0]), np.ones(5, dtype=bool))  # image 3 is out by then
    stages = cascade([first, second, first], [4, 2, 1], rng_for(0, "c"), "last")
    assert [stage.tolist() for stage in stages] == [[4, 0, 1, 2], [1, 2], [1]]
    assert cascade([second, first], [2, 1], rng_for(0, "c"), "last")[-1].tolist() == [1]


@given(st.lists(st.lists(st.floats(-5, 5), min_size=8, max_size=8), min_size=1, max_size=4), st.data())
def test_each_step_of_a_cascade_takes_the_best_of_the_step_before(rows, data):
    drawn = st.lists(st.integers(0, 8), min_size=len(rows), max_size=len(rows))
    sizes = sorted(data.draw(drawn), reverse=True)
    steps = [Scores(np.array(row), np.ones(8, dtype=bool)) for row in rows]
    before = np.arange(8)
    for step, size, left in zip(steps, sizes, cascade(steps, sizes, rng_for(0, "c"), "last"), strict=True):
        assert len(left) == len(set(left.tolist())) == size and set(left.tolist()) <= set(before.tolist())
        assert step.values[left].tolist() == sorted(step.values[before], reverse=True)[:size]
        before = left


PROBS = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [0.1, 0.2, 0.7]], dtype=torch.float64)


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
    sizes = portions(shares, k)
    assert list(sizes) == list(shares) and list(sizes.values()) == slow_portions(hundredths, k)
    assert sum(sizes.values()) == k and all(abs(sizes[n] - share * k) < 1 + 1e-6 for n, share in shares.items())


@pytest.mark.parametrize("rule", ["last", "first", "never"])
def test_a_mixture_asks_in_order_among_what_is_left_and_fills_its_shares(rule):
    low = strategy("my_low", ("detections",), "boxes")(lambda seen: -seen.detections.scores[:, 0])
    high = strategy("my_high", ("detections",), "boxes")(lambda seen: seen.detections.scores[:, 0])
    try:
        shares = {"my_low": 0.5, "random": 0, "my_high": 0.25, "max": 0.25}
        strategy("my_mix", ("detections",), "boxes", selects=True)(mixture(shares, "boxes"))
        seen = observed(6, confidences(*([c / 10] for c in range(1, 7))))
        assert chosen("my_mix", seen, 4, rng_for(0, "c"), rule).positions.tolist() == [0, 1, 5, 2]
        assert len(chosen("my_mix", seen, 0, rng_for(0, "c"), rule).positions) == 0
    finally:
        assert low and high
        for name in ("my_low", "my_high", "my_mix"):
            del strategies._KNOWN["boxes", name]
    empty = observed(12, confidences(*[[]] * 12), held_out_detections=confidences([0.5]))
    picks = [chosen("mix", empty, 10, rng_for(0, "c"), rule).positions.tolist() for _ in range(2)]
    assert len(set(picks[0])) == 10 and picks[0] == picks[1]  # also by 'never', which would leave nobody to ask
