"""HUALE's cascade, CALD and HUA: each formula by hand and against a slow oracle, then what the selections promise."""

import dataclasses
import inspect
import itertools
import math

import miniatures
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedal_utils import metrics, papers, record
from fedal_utils.data.boxes import Detections, flip_boxes
from fedal_utils.federation import experiment as alfl
from fedal_utils.sampling import huale
from fedal_utils.sampling import strategies as sampling
from fedal_utils.sampling.huale import FILTERS, cald_consistency, cascade_stages, jensen_shannon, match
from fedal_utils.sampling.strategies import Scores, Sight, View
from fedal_utils.seeding import rng_for, torch_rng_for

LN2 = math.log(2)
PAIR_SCORES = {"retrieval": huale.retrieval, **FILTERS}
WIDTH = 100


def detections(*images, columns=3, length=0, **extra):
    """Each image a list of (box, class vector); score and label are its best class. Padding is NaN but for the labels.

    extra: for each image a list of one value a box.
    """
    length = max([len(image) for image in images] + [length])
    boxes = torch.full((len(images), length, 4), math.nan)
    scores = torch.full((len(images), length), math.nan)
    labels = torch.zeros(len(images), length, dtype=torch.int64)
    probs = torch.full((len(images), length, columns), math.nan)
    for i, image in enumerate(images):
        for j, (box, p) in enumerate(image):
            boxes[i, j], probs[i, j] = torch.tensor(box, dtype=torch.float32), torch.tensor(p, dtype=torch.float32)
            scores[i, j], labels[i, j] = probs[i, j, 1:].max(), probs[i, j, 1:].argmax() + 1
    more = {}
    for name, rows in extra.items():
        tail = np.shape(next(row[0] for row in rows if len(row)))
        more[name] = torch.full((len(images), length, *tail), 99, dtype=torch.int64 if name == "level" else torch.float)
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                more[name][i, j] = torch.tensor(value)
    return Detections(boxes, scores, labels, probs, more)


def lists(found):
    """The way back: each image a list of (box, class vector, score, label), as plain Python numbers."""
    fields = [t.double().tolist() for t in (found.boxes, found.probs, found.scores, found.labels)]
    return [[one for one in zip(*image, strict=True) if one[3] > 0] for image in zip(*fields, strict=True)]


def box(rng):
    x, y = rng.integers(0, 50, 2)
    return [x, y, x + rng.integers(4, 30), y + rng.integers(4, 30)]


def vector(rng, classes):
    p = rng.integers(0, 6, classes + 1) ** 2 + np.eye(classes + 1)[rng.integers(0, classes + 1)]
    return p / p.sum()


def two_views(seed, images=12, classes=3, most=6):
    """A view and a shaken one: boxes moved a little, some gone, some new, some class vectors changed; some without any.

    The coordinates are whole numbers, so equal IoUs do occur. Rows come best scored first.
    """
    rng = rng_for(seed, "views", classes)
    views = [], []
    for _ in range(images):
        plain = [(box(rng), vector(rng, classes)) for _ in range(rng.integers(0, most + 1))]
        shaken = [
            ([c + int(d) for c, d in zip(b, rng.integers(-3, 4, 4), strict=True)], p if rng.random() < 0.5 else q)
            for b, p in plain
            if rng.random() < 0.8
            for q in [vector(rng, classes)]
        ]
        if rng.random() < 0.5:
            shaken.append((box(rng), vector(rng, classes)))
        for view, rows in zip(views, (plain, shaken), strict=True):
            view.append(sorted(rows, key=lambda one: -max(one[1][1:])))
    length = rng.integers(0, 3) + most + 1
    return [detections(*view, columns=classes + 1, length=length) for view in views]


def sight_of(seed, images=12, classes=3, most=6):
    """All that the strategies here look at."""
    plain, flipped = two_views(seed, images, classes, most)
    views = {"same": View(plain.boxes + 5, moved(flipped))}
    views["other"] = View(plain.boxes + 5, moved(two_views(seed + 1000, images, classes)[1]))
    rng = rng_for(seed, "crowd")
    crowd = [
        [([c + int(d) for c, d in zip(b, rng.integers(-2, 3, 4), strict=True)], p) for b, p, *_ in image * 3]
        for image in lists(plain)
    ]
    extra = {
        "level": [[int(rng.integers(0, 3)) for _ in image] for image in crowd],
        "predicted_loss": [[float(rng.random()) for _ in image] for image in crowd],
    }
    crowd = detections(*crowd, columns=classes + 1, length=2, **(extra if any(crowd) else {}))
    labelled = rng.random(classes) * 3
    return Sight(images, plain, flipped, views, crowd, labelled=labelled)


def moved(found, by=5):
    return dataclasses.replace(found, boxes=found.boxes + by)


def nothing(images, classes=3, length=0):
    """A pool at cold start: no detection anywhere."""
    none = detections(*[[]] * images, columns=classes + 1, length=length)
    none.extra["predicted_loss"] = torch.zeros(images, length)
    views = {name: View(none.boxes, none) for name in ("flip", "cutout")}
    return Sight(images, none, none, views, none, labelled=np.zeros(classes))


# ------------------------------------------------------------------------------------- the same, slowly, and by itself


def slow_js(p, q):
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return sum(a * math.log(a / c) / 2 for one in (p, q) for a, c in zip(one, m, strict=True) if a > 0)


def slow_entropy(p):
    return -sum(a * math.log(a) for a in p if a > 0)


def slow_match(boxes, others, threshold=0.5):
    """Greedy over all pairs, one after the other: {row: other row}."""
    table = {(i, j): oracles.iou(a, b) for i, a in enumerate(boxes) for j, b in enumerate(others)}
    pairs = {}
    for (i, j), overlap in sorted(table.items(), key=lambda one: (-one[1], one[0])):
        if overlap >= threshold and i not in pairs and j not in pairs.values():
            pairs[i] = j
    return pairs


def slow_retrieval(plain, flipped, classes):
    if not plain and not flipped:
        return None
    if not plain or not flipped:
        return math.log(classes + 1)
    return max(slow_entropy(p) for _, p, *_ in plain)


def slow_semantic(plain, flipped, classes):
    pairs = slow_match([b for b, *_ in plain], [b for b, *_ in flipped])
    values = [slow_js(plain[i][1], flipped[j][1]) for i, j in pairs.items()]
    values += [LN2] * (len(plain) + len(flipped) - 2 * len(pairs))
    return sum(values) / len(values) if values else None


def slow_diversity(plain, flipped, classes):
    if not plain or not flipped:
        return LN2 if plain or flipped else None
    shares = [
        [sum(row[3] == c for row in view) / len(view) for c in range(1, classes + 1)] for view in (plain, flipped)
    ]
    return slow_js(*shares)


def slow_overlap(plain, flipped, classes):
    shares = []
    for view in filter(len, (plain, flipped)):
        touching = [any(oracles.iou(a[0], b[0]) > 0.1 for b in view if b is not a) for a in view]
        shares.append(sum(touching) / len(view))
    return max(shares, default=None)


def slow_localisation(plain, flipped, classes):
    pairs = slow_match([b for b, *_ in plain], [b for b, *_ in flipped])
    values = [0] * (len(plain) + len(flipped) - 2 * len(pairs))
    for i, j in pairs.items():
        a, b = plain[i][0], flipped[j][0]
        mean = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        side = [mean[2] - mean[0], mean[3] - mean[1]] * 2
        values.append(sum(max(0, 1 - abs(a[k] - b[k]) / side[k]) for k in range(4)) / 4)
    return 1 - sum(values) / len(values) if values else None


def slow_cald(plain, moved_boxes, views, beta=1.3, most=40, keep=50):
    """plain and each of views: lists of rows; moved_boxes: for each view the plain boxes' places."""
    if not plain:
        return 0.0
    ranks = range(len(plain))
    if len(plain) > most and len(plain) > keep:
        ranks = [math.floor(r * len(plain) / keep) for r in range(keep)]
    by_score = sorted(range(len(plain)), key=lambda i: -plain[i][2])
    image = []
    for places, view in zip(moved_boxes, views, strict=True):
        deviations = []
        for i in (by_score[r] for r in ranks):
            m = 0.0
            if view:
                overlaps = [oracles.iou(places[i], b) for b, *_ in view]
                j = overlaps.index(max(overlaps))
                p, q = plain[i][1], view[j][1]
                m = overlaps[j] + 0.5 * (1 - slow_js(p, q)) * (max(p[1:]) + max(q[1:]))
            deviations.append(abs(m - beta))
        image.append(min(deviations))
    return sum(image) / len(image)


def slow_pool(boxes):
    """boxes: (value, object, level, label) of one image."""
    total = 0.0
    for o in {one[1] for one in boxes}:
        of_levels = []
        for level in {one[2] for one in boxes if one[1] == o}:
            here = [one for one in boxes if one[1:3] == (o, level)]
            means = [[one[0] for one in here if one[3] == c] for c in {one[3] for one in here}]
            of_levels.append(sum(sum(values) / len(values) for values in means))
        total += max(of_levels)
    return total


SLOW = {
    "retrieval": slow_retrieval,
    "semantic": slow_semantic,
    "diversity": slow_diversity,
    "overlap": slow_overlap,
    "localisation": slow_localisation,
}


# ------------------------------------------------------------------------------------------- divergence, and matching


def test_jensen_shannon_by_hand():
    # (1, 0) and (1/2, 1/2): H(3/4, 1/4) - (0 + ln 2) / 2 = .56234 - .34657 = .21576
    p = torch.tensor([[1.0, 0], [1, 0], [0.3, 0.7], [1, 0]])
    q = torch.tensor([[0.5, 0.5], [0, 1], [0.3, 0.7], [1, 0]])
    assert jensen_shannon(p, q).tolist() == pytest.approx([0.215762, LN2, 0, 0], abs=1e-6)
    assert jensen_shannon(q, p).tolist() == jensen_shannon(p, q).tolist()
    assert jensen_shannon(p, q).tolist()[1:] == [LN2, 0, 0]  # to the last bit: neither above ln 2 nor below 0
    assert jensen_shannon(p[:, None], q[None]).shape == (4, 4)
    thirds = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0, 0]])  # in float32 they sum to more than one
    assert jensen_shannon(thirds, thirds.flip(1)).tolist() == [LN2]
    near = torch.rand(500, 4, generator=torch_rng_for(0, "near"), dtype=torch.float64)
    assert (jensen_shannon(near.softmax(1), (near + 1e-9 * near.flip(1)).softmax(1)) >= 0).all()


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any), min_size=2, max_size=2))
def test_jensen_shannon_equals_the_oracle_and_keeps_its_bounds(rows):
    p, q = ([n / sum(row) for n in row] for row in rows)
    got = float(jensen_shannon(torch.tensor(p), torch.tensor(q)))
    assert got == pytest.approx(slow_js(p, q), abs=1e-6) and 0 <= got <= LN2


@pytest.mark.parametrize("row", [[0.5, 0.4], [1.5, -0.5], [math.nan, 1.0], [0.0, 0.0], [math.inf, 0.0]])
def test_what_is_no_distribution_has_no_divergence(row):
    good = torch.tensor([[0.5, 0.5]])
    for name, pair in (("p", (torch.tensor([row]), good)), ("q", (good, torch.tensor([row])))):
        with pytest.raises(ValueError, match=f"{name} must hold distributions"):
            jensen_shannon(*pair)


SURE = [0.0, 1.0, 0.0]


def test_matching_is_greedy_one_to_one_and_inclusive_by_hand():
    # IoU, first image: a-A 8/12, b-A 10/10, b-B 8/12, a-B 6/14 < .5. Greedy: b-A, then a is left with nothing.
    plain = detections([([0, 0, 10, 1], SURE), ([2, 0, 12, 1], SURE)], [([0, 0, 10, 1], SURE)], [([0, 0, 10, 2], SURE)])
    other = detections([([2, 0, 12, 1], SURE), ([4, 0, 14, 1], SURE)], [], [([0, 0, 10, 1], SURE)])
    assert match(plain, other.boxes, other).tolist() == [[-1, 0], [-1, -1], [0, -1]]  # the third: IoU 1/2 just counts
    assert match(plain, other.boxes, other, iou=0.4).tolist() == [[1, 0], [-1, -1], [0, -1]]
    assert match(plain, other.boxes, other, iou=0.6)[2].tolist() == [-1, -1]
    assert match(plain, other.boxes + 100, other)[0].tolist() == [-1, -1]  # the boxes handed over are what counts


def test_matching_ties_go_to_the_lowest_rows():
    same = [([0, 0, 10, 10], SURE)] * 3
    assert match(detections(same[:2]), detections(same).boxes, detections(same)).tolist() == [[0, 1]]
    assert match(detections(same), detections(same[:2]).boxes, detections(same[:2])).tolist() == [[0, 1, -1]]


@pytest.mark.parametrize("seed", range(8))
def test_matching_equals_the_oracle(seed):
    plain, other = two_views(seed, images=30, most=9)
    got, lengths = match(plain, other.boxes, other, iou=0.2), []
    for row, mine, theirs in zip(got.tolist(), lists(plain), lists(other), strict=True):
        pairs = slow_match([b for b, *_ in mine], [b for b, *_ in theirs], 0.2)
        assert row == [pairs.get(i, -1) for i in range(len(row))]
        lengths.append(len(pairs))
    assert max(lengths) > 4


# -------------------------------------------------------------------------------------------------- HUALE by hand


def one_view(*images, columns=2):
    """Images of boxes far from each other, given by their class vectors alone."""
    return detections(
        *([([20 * i, 0, 20 * i + 10, 10], p) for i, p in enumerate(image)] for image in images), columns=columns
    )


def test_entropy_is_in_nats_and_the_image_takes_its_largest_as_the_printed_numbers_ask():
    # notes, section 3: a two-outcome entropy at .97 is .135 (printed .151: other classes add a little; in bits .194,
    # too much); at .69 it is .619 (printed .740; bits .893); of 1, 1, .93, .9, .77 the last alone gives .539 (.547)
    rows = [[[0.03, 0.97]], [[0.31, 0.69]], [[1 - s, s] for s in (1.0, 1.0, 0.93, 0.9, 0.77)]]
    view = one_view(*rows)
    values = huale.retrieval(view, view).values
    assert values == pytest.approx([0.1347, 0.6191, 0.5393], abs=1e-4)
    printed = np.array([0.151, 0.740, 0.547])
    assert (values <= printed).all() and (values > 0.8 * printed).all()
    bits = values[:2] / LN2
    assert (bits > printed[:2]).all()
    entropies = [slow_entropy(p) for p in rows[2]]
    assert sum(entropies) > 0.9 and sum(entropies) / 5 < 0.3  # neither the sum nor the mean comes near .547


def test_an_image_seen_in_one_view_only_is_retrieved_first_and_one_in_neither_has_no_score():
    plain = one_view([[0.5, 0.5]], [[0.1, 0.9]], [], [])
    flipped = one_view([[0.1, 0.9]], [], [[0.1, 0.9]], [])
    scores = huale.retrieval(plain, flipped)
    assert scores.values.tolist() == pytest.approx([LN2, LN2, LN2, 0])  # C = 1: ln(C + 1) = ln 2
    assert scores.scored.tolist() == [True, True, True, False]
    plain = one_view([[0.2, 0.8, 0, 0]], [[0.1, 0.9, 0, 0]], columns=4)
    flipped = one_view([[0.25] * 4], [], columns=4)
    values = huale.retrieval(plain, flipped).values  # the boxes of the plain view count, not those of the mirrored one
    assert values.tolist() == pytest.approx([slow_entropy([0.2, 0.8]), math.log(4)])


def test_semantic_disagreement_by_hand():
    # image 0: one pair, JS((0, 1, 0), (0, .5, .5)) = .215762, and a box that the flipped view alone has: ln 2
    # image 1: one pair that agrees; image 2: seen once; image 3: never
    there, elsewhere, half = [0, 0, 10, 10], [50, 50, 60, 60], [0.0, 0.5, 0.5]
    plain = detections([(there, SURE)], [(there, half)], [(there, SURE), (elsewhere, SURE)], [])
    flipped = detections([(there, half), (elsewhere, SURE)], [(there, half)], [], [])
    scores = huale.semantic_disagreement(plain, flipped)
    assert scores.values == pytest.approx([(0.215762 + LN2) / 2, 0, LN2, 0], abs=1e-6)
    assert scores.scored.tolist() == [True, True, True, False]


def test_category_diversity_by_hand():
    # image 0: classes (1, 1) and (1, 2): shares (1, 0) and (1/2, 1/2): .215762; image 1: (1, 2) and (2, 1): the same
    a, b = [0.1, 0.9, 0.0], [0.1, 0.0, 0.9]
    plain, flipped = one_view([a, a], [a, b], [a], [], columns=3), one_view([a, b], [b, a], [], [], columns=3)
    scores = huale.category_diversity(plain, flipped)
    assert scores.values == pytest.approx([0.215762, 0, LN2, 0], abs=1e-6)
    assert scores.scored.tolist() == [True, True, True, False]
    # with labels (1, 1): pooled (3, 1) against them .033823 (H(5/8, 3/8) - (H(3/4, 1/4) + ln 2) / 2), (2, 2): 0,
    # (1, 0): .215762
    added = huale.category_diversity(plain, flipped, labelled=np.array([7.0, 7.0]))
    assert added.values - scores.values == pytest.approx([0.033823, 0, 0.215762, 0], abs=1e-6)
    none_yet = huale.category_diversity(plain, flipped, labelled=np.zeros(2))
    assert none_yet.values - scores.values == pytest.approx([LN2, LN2, LN2, 0])


def test_overlap_ratio_by_hand():
    # plain: two of three boxes touch (IoU 5/15), flipped: IoU 1/19 is below .1. A box never overlaps itself.
    a, b, c = [0, 0, 10, 1], [5, 0, 15, 1], [50, 50, 60, 60]
    plain = detections([(a, SURE), (b, SURE), (c, SURE)], [(a, SURE)], [])
    flipped = detections([(a, SURE), ([9, 0, 19, 1], SURE)], [(a, SURE), (b, SURE)], [])
    scores = huale.overlap_ratio(plain, flipped)
    assert scores.values == pytest.approx([2 / 3, 1, 0]) and scores.scored.tolist() == [True, True, False]
    assert huale.overlap_ratio(flipped, plain).values == pytest.approx([2 / 3, 1, 0])  # the larger of the two
    # threshold just above 1/19 = .0526 or just below
    assert huale.overlap_ratio(flipped, flipped, above=0.0527).values[0] == 0
    assert huale.overlap_ratio(flipped, flipped, above=0.0526).values[0] == 1


def test_localisation_confidence_by_hand():
    # sides (.7, .8, .6, .7) and (.5, .5, .5, .5) of the plain view, (1, 1, 1, .2) of the flipped: mean .7, .5, .8
    a, b = ([0, 0, 10, 10], SURE), ([50, 50, 60, 60], SURE)
    plain = detections([a, b], [a], [], sides=[[[0.7, 0.8, 0.6, 0.7], [0.5] * 4], [[1.0] * 4], []])
    flipped = detections([a], [], [], sides=[[[1.0, 1.0, 1.0, 0.2]], [], []])
    scores = huale.localisation_confidence(plain, flipped)
    assert scores.values == pytest.approx([1 - 2 / 3, 0, 0]) and scores.scored.tolist() == [True, True, False]
    # No sides: the pair (0, 0, 10, 10) and (0, 0, 8, 10): mean width 9, right side off by 2: q = 1, 1, 7/9, 1; the lone
    # box counts 0: 1 - (34/36 + 0) / 2 = 19/36
    plain, flipped = detections([a, b], [a], []), detections([([0, 0, 8, 10], SURE)], [], [])
    scores = huale.localisation_confidence(plain, flipped)
    assert scores.values == pytest.approx([19 / 36, 1, 0]) and scores.scored.tolist() == [True, True, False]
    assert huale.localisation_confidence(flipped, plain).values == pytest.approx([19 / 36, 1, 0])


# ------------------------------------------------------------------------------------------------- laws of the metrics


@pytest.mark.parametrize("classes", [1, 3, 20])
@pytest.mark.parametrize("metric", PAIR_SCORES)
def test_every_metric_equals_the_oracle(metric, classes):
    plain, flipped = two_views(5, images=60, classes=classes)
    got, seen = PAIR_SCORES[metric](plain, flipped), set()
    for i, views in enumerate(zip(lists(plain), lists(flipped), strict=True)):
        want = SLOW[metric](*views, classes)
        assert got.scored[i] == (want is not None), i
        assert got.values[i] == pytest.approx(want or 0, abs=1e-6), i
        seen.add(round(got.values[i], 3))
    assert not got.scored.all() and len(seen) > (2 if metric == "diversity" and classes == 1 else 5) - (classes == 1)


def test_two_equal_views_have_nothing_to_disagree_about():
    plain, _ = two_views(1, images=40)
    assert torch.equal(flip_boxes(flip_boxes(plain.boxes, WIDTH), WIDTH)[plain.valid], plain.boxes[plain.valid])
    mirrored = dataclasses.replace(plain, boxes=flip_boxes(plain.boxes, WIDTH))
    back = dataclasses.replace(mirrored, boxes=flip_boxes(mirrored.boxes, WIDTH))
    for metric in (huale.semantic_disagreement, huale.category_diversity, huale.localisation_confidence):
        assert metric(plain, back).values.tolist() == [0] * 40
    # the test can fail: boxes that were not mapped back are somewhere else
    assert huale.semantic_disagreement(plain, mirrored).values.max() == pytest.approx(LN2)
    assert huale.localisation_confidence(plain, mirrored).values.max() == 1


def test_a_box_seen_once_is_the_worst_for_every_filter_that_compares_views():
    plain, _ = two_views(1, images=20)
    none = nothing(20).detections
    seen = plain.valid.any(1).numpy()
    assert 0 < seen.sum() < 20
    for one, other in ((plain, none), (none, plain)):
        for metric, worst in (("semantic", LN2), ("diversity", LN2), ("localisation", 1), ("retrieval", math.log(4))):
            scores = PAIR_SCORES[metric](one, other)
            assert scores.values == pytest.approx(seen * worst) and np.array_equal(scores.scored, seen)


@pytest.fixture(scope="module")
def crowded():
    """So many pairs of boxes that they are gone through in blocks."""
    return sight_of(2, images=500, most=25)


@pytest.mark.parametrize("metric", [*PAIR_SCORES, "cald"])
def test_the_score_of_an_image_depends_on_no_other_image(metric, crowded):
    def values(rows):
        plain, flipped = crowded.detections.take(rows), crowded.flipped.take(rows)
        if metric != "cald":
            return PAIR_SCORES[metric](plain, flipped).values
        views = {name: View(view.moved[rows], view.found.take(rows)) for name, view in crowded.views.items()}
        return cald_consistency(Sight(len(rows), plain, views=views)).values

    whole = values(range(500))
    for rows in ([0], [499, 250, 3], list(range(499, -1, -1))):
        assert np.array_equal(values(rows), whole[rows])
    assert len(set(whole)) > (5 if metric == "overlap" else 50)


def test_labels_and_scores_that_are_padding_are_not_looked_at():
    sight = sight_of(3)
    filled = [
        dataclasses.replace(view, boxes=view.boxes.nan_to_num(3.0), probs=view.probs.nan_to_num(0.2))
        for view in (sight.detections, sight.flipped)
    ]
    for metric in PAIR_SCORES.values():
        assert np.array_equal(metric(sight.detections, sight.flipped).values, metric(*filled).values)


# ------------------------------------------------------------------------------------------------------------- cascade


def test_the_filters_are_named_in_the_published_order():
    assert list(FILTERS) == ["semantic", "diversity", "overlap", "localisation"]


def test_the_cascade_keeps_its_sizes_each_step_the_best_of_the_one_before():
    sight = sight_of(4, images=60)
    stages = cascade_stages(sight, 10, rng_for(0, "c"))
    assert [name for name, *_ in stages] == ["retrieval", *FILTERS]
    assert [len(positions) for _, positions, _ in stages] == [40, 30, 20, 15, 10]
    before = np.arange(60)
    for name, positions, scores in stages:
        assert np.array_equal(scores.values, PAIR_SCORES[name](sight.detections, sight.flipped).values)
        assert len(set(positions.tolist())) == len(positions) and set(positions.tolist()) <= set(before.tolist())
        assert len(scores) == 60
        dropped = list(set(before.tolist()) - set(positions.tolist()))
        level = np.where(scores.scored, scores.values, -1.0)
        assert level[positions].min() >= level[dropped].max()
        before = positions
    choice = huale.choose("cascade", sight, 10, rng_for(0, "c"))
    assert np.array_equal(choice.positions, before) and np.array_equal(choice.scores.values, stages[0][2].values)
    assert not np.array_equal(np.sort(before), np.sort(sampling.top_k(stages[0][2], 10, rng_for(0, "c"))))


@pytest.mark.parametrize(
    ("images", "k", "sizes", "kept"),
    [
        (60, 10, (5, 2.5, 2.5, 1), [50, 25, 25, 10, 10]),
        (25, 10, huale.SIZES, [25, 25, 20, 15, 10]),  # a small pool: no more than there are
        (12, 10, huale.SIZES, [12, 12, 12, 12, 10]),
        (10, 10, huale.SIZES, [10] * 5),
        (9, 1, (2.4, 1.6, 1.2, 1), [2, 2, 1, 1, 1]),  # rounded
        (9, 0, huale.SIZES, [0] * 5),
    ],
)
def test_sizes_are_rounded_budgets_capped_by_the_pool(images, k, sizes, kept):
    sight = sight_of(4, images)
    assert [len(left) for _, left, _ in cascade_stages(sight, k, rng_for(0, "c"), sizes)] == kept
    assert len(huale.choose("cascade", sight, k, rng_for(0, "c"), sizes=sizes).positions) == k


def test_the_order_of_the_filters_is_the_only_weighting(monkeypatch):
    # 'semantic' keeps {0, 1} of three, 'overlap' {1, 2}. The last filter decides between the two that are left.
    values = {"semantic": [3, 2, 1], "diversity": [0, 0, 0], "overlap": [1, 2, 3], "localisation": [0, 0, 0]}
    for name, row in values.items():
        scores = Scores(np.array(row, dtype=float), np.ones(3, dtype=bool))
        monkeypatch.setitem(FILTERS, name, lambda plain, flipped, scores=scores: scores)
    sight, picks = sight_of(0, images=3), {}
    for order in itertools.permutations(FILTERS):
        stages = cascade_stages(sight, 1, rng_for(0, "c"), (3, 2, 2, 2), order)
        assert [name for name, *_ in stages] == ["retrieval", *order]
        picks[order] = stages[-1][1].tolist()
    assert picks["semantic", "diversity", "localisation", "overlap"] == [1]  # of {0, 1}
    assert picks["overlap", "diversity", "localisation", "semantic"] == [1]  # of {1, 2}
    assert picks["diversity", "localisation", "overlap", "semantic"] in ([0], [1], [2])
    assert {tuple(pick) for pick in picks.values()} == {(0,), (1,), (2,)}
    for order, pick in picks.items():
        choice = huale.choose("cascade", sight, 1, rng_for(0, "c"), sizes=(3, 2, 2, 2), order=order)
        assert choice.positions.tolist() == pick


@pytest.mark.parametrize("strategy", huale.STRATEGIES)
@pytest.mark.parametrize("length", [0, 4])
def test_at_cold_start_every_strategy_draws_k_different_images_and_says_so_again(strategy, length):
    sight = nothing(20, length=length)
    runs = [huale.choose(strategy, sight, 7, rng_for(seed, "c")).positions.tolist() for seed in range(6)]
    assert all(len(set(run)) == 7 and set(run) <= set(range(20)) for run in runs)
    assert runs[0] == huale.choose(strategy, sight, 7, rng_for(0, "c")).positions.tolist()
    assert len({tuple(sorted(run)) for run in runs}) > 3


def test_images_without_a_box_come_as_the_rule_says():
    plain, flipped = two_views(6, images=30)
    seen = (plain.valid | flipped.valid[:, : plain.valid.shape[1]]).any(1).numpy()
    sight = Sight(30, plain, flipped)
    assert 2 < (~seen).sum() < 12
    for rule, empties in (("last", 0), ("first", (~seen).sum()), ("never", 0)):
        picks = huale.choose("cascade", sight, 12, rng_for(0, "c"), empty=rule).positions
        assert (~seen[picks]).sum() == empties and len(picks) == 12
    everything = huale.choose("cascade", sight, 30, rng_for(0, "c"), empty="never").positions
    assert sorted(everything.tolist()) == np.flatnonzero(seen).tolist()  # fewer than k may come back


# ---------------------------------------------------------------------------------------------------------------- CALD


def cald_sight(plain, *views, labelled=None):
    """Views that leave the boxes where they are."""
    return Sight(
        len(plain), plain, views={f"v{i}": View(plain.boxes, v) for i, v in enumerate(views)}, labelled=labelled
    )


def test_cald_consistency_by_hand():
    # Same box, same class vector (.2, .8): m = 1 + (1 - 0) (.8 + .8) / 2 = 1.8, deviation .5.
    plain = detections([([0, 0, 10, 10], [0.2, 0.8])], columns=2)
    assert cald_consistency(cald_sight(plain, plain)).values == pytest.approx([-0.5])
    assert cald_consistency(cald_sight(plain, plain), beta=1.0).values == pytest.approx([-0.8])
    # IoU 1/2; q = (.4, .6): JS = [.2 ln(2/3) + .8 ln(8/7) + .4 ln(4/3) + .6 ln(6/7)] / 2 = .024157 nats;
    # m = .5 + .975843 x .7 = 1.183090, deviation .116910
    other = detections([([0, 0, 10, 5], [0.4, 0.6])], columns=2)
    assert cald_consistency(cald_sight(plain, other)).values == pytest.approx([-0.116910], abs=1e-6)
    # A view that shows nothing: m = 0, deviation 1.3. The mean over the three: (.5 + .116910 + 1.3) / 3
    none = detections([], columns=2)
    scores = cald_consistency(cald_sight(plain, plain, other, none))
    assert scores.values == pytest.approx([-(0.5 + 0.116910 + 1.3) / 3], abs=1e-6) and scores.scored.all()


@pytest.mark.parametrize("s", [0.31, 0.5, 1.0])
def test_cald_of_equal_views_is_the_distance_of_one_plus_s_from_beta(s):
    plain = detections([([3, 4, 30, 40], [1 - s, s])], columns=2)
    assert cald_consistency(cald_sight(plain, plain, plain)).values == pytest.approx([-abs(1 + s - 1.3)])


def test_cald_looks_where_the_box_lies_in_the_view_and_takes_the_least_of_the_boxes():
    # Two boxes, moved by 100. In the view the first keeps s = .9 (m = 1.9, .6), the second has s = .2 / .2 (1.2, .1).
    plain = detections([([0, 0, 10, 10], [0.1, 0.9]), ([20, 0, 30, 10], [0.8, 0.2])], columns=2)
    view = View(plain.boxes + 100, moved(plain, 100))
    assert cald_consistency(Sight(1, plain, views={"v": view})).values == pytest.approx([-0.1])
    # not mapped, no box overlaps: j is the best scored (s = .9, p = (.1, .9)), IoU 0:
    # the first: m = .9 (.4); the second: JS((.8, .2), (.1, .9)) = .275492, m = .724508 x 1.1 / 2 = .398 (.902)
    lost = View(plain.boxes, moved(plain, 100))
    assert cald_consistency(Sight(1, plain, views={"v": lost})).values == pytest.approx([-0.4])


def test_cald_asks_first_for_an_image_without_any_detection():
    plain = detections([([0, 0, 10, 10], [0.2, 0.8])], [], columns=2)
    sight = cald_sight(plain, detections(*[[([0, 0, 10, 10], [0.2, 0.8])]] * 2, columns=2), labelled=np.ones(1))
    assert cald_consistency(sight).values.tolist() == [pytest.approx(-0.5), 0]
    assert not np.signbit(cald_consistency(sight).values[1])
    assert huale.cald(sight, 1, rng_for(0, "c")).positions.tolist() == [1]


@pytest.mark.parametrize("classes", [1, 4])
def test_cald_consistency_equals_the_oracle(classes):
    sight = sight_of(7, images=60, classes=classes)
    got = cald_consistency(sight, beta=1.1).values
    rows, views = lists(sight.detections), [lists(view.found) for view in sight.views.values()]
    for i, plain in enumerate(rows):
        places = [[[x + 5 for x in b] for b, *_ in plain]] * 2
        assert got[i] == pytest.approx(-slow_cald(plain, places, [view[i] for view in views], beta=1.1), abs=1e-6), i
    assert len(set(got.round(4))) > 20


def test_of_many_boxes_cald_takes_fifty_at_even_steps():
    def value(count, odd, **limits):
        """All boxes but the odd one deviate by .7 (m = 2), that one by 0 (m = 1.3)."""
        p = [[0.0, 1 - i * 1e-6] if i != odd else [0.7 + 2e-6 * odd, 0.3 - 2e-6 * odd] for i in range(count)]
        # scores fall with i: the odd box would come last, so its score is set by hand
        view = one_view([[1 - x[1], x[1]] for x in p])
        view.scores[0] = torch.linspace(0.99, 0.5, count)
        assert view.scores[0].argsort(descending=True).tolist() == list(range(count))
        return -float(cald_consistency(cald_sight(view, view), **limits).values[0])

    def taken(count, **limits):
        return [odd for odd in range(count) if value(count, odd, **limits) < 0.1]

    assert taken(7, most=4, keep=5) == [0, 1, 2, 4, 5]  # floor(r 7 / 5)
    assert taken(5, most=4, keep=5) == taken(5, most=9, keep=2) == [0, 1, 2, 3, 4]
    assert taken(6, most=2, keep=2) == [0, 3]
    assert [odd for odd in (0, 1, 50, 51, 98, 99) if value(100, odd) < 0.1] == [0, 50, 98]  # 50 of 100: every other
    assert [odd for odd in (0, 1, 39, 48, 49) if value(50, odd) < 0.1] == [0, 1, 39, 48, 49]  # 41 .. 50: all


def test_many_boxes_equal_the_oracle():
    plain, flipped = two_views(8, images=20, classes=2, most=120)
    got = cald_consistency(cald_sight(plain, flipped)).values
    for i, (mine, theirs) in enumerate(zip(lists(plain), lists(flipped), strict=True)):
        places = [[b for b, *_ in mine]]
        assert got[i] == pytest.approx(-slow_cald(mine, places, [theirs]), abs=1e-6)
    assert max(map(len, lists(plain))) > 60


def test_the_second_stage_of_cald_by_hand():
    # One view that shows what the plain image shows, so v is the plain image's best score of each class; but image 3
    # has its box in the plain image only: v = half of it. All five pass the first stage (keep = 5 budgets).
    a, b = [0, 0, 10, 10], [50, 50, 60, 60]
    plain = detections(
        [(a, [0.0, 1.0, 0.0])],  # v = (1, 0)
        [(a, [0.0, 0.0, 1.0]), (b, [0.4, 0.0, 0.6])],  # (0, 1): the best of the class, not the sum
        [(a, [0.0, 1.0, 0.0]), (b, [0.0, 0.0, 1.0])],  # (1, 1)
        [(a, [0.0, 0.0, 1.0])],  # (0, .5)
        [],  # nothing anywhere
    )
    view = dataclasses.replace(plain, labels=plain.labels.clone())
    view.labels[3] = 0
    sight = cald_sight(plain, view, labelled=np.array([3.0, 1.0]))  # softmax (.880797, .119203)
    # JS to softmax(1, 0) = (.731, .269): .018; (0, 1) = (.269, .731): .208; (1, 1) = (.5, .5): .0895;
    # (0, .5) = (.378, .622): .145
    soft = [
        [math.exp(x) / (math.exp(x) + math.exp(y)) for x, y in ((c, d), (d, c))]
        for c, d in ((3, 1), (1, 0), (0, 1), (1, 1), (0, 0.5))
    ]
    apart = [slow_js(soft[0], other) for other in soft[1:]]
    assert apart == pytest.approx([0.0183, 0.2081, 0.0895, 0.1453], abs=5e-4)
    choice = huale.cald(sight, 5, rng_for(0, "c"), keep=1)
    assert choice.positions.tolist() == [4, 1, 3, 2, 0]  # all-zero first, then the largest divergence
    assert huale.cald(sight, 2, rng_for(0, "c"), keep=2.5).positions.tolist() == [4, 1]
    assert np.array_equal(choice.scores.values, cald_consistency(sight).values)


def slow_second_stage(sight):
    """How unlike the labelled set each image is: no update within the batch, so the order is a sort by it."""
    views = [lists(found) for found in (sight.detections, *(view.found for view in sight.views.values()))]
    known, unlike = soft_max(sight.labelled), []
    for i in range(sight.images):
        v = [
            sum(max((row[2] for row in view[i] if row[3] == c), default=0) for view in views) / len(views)
            for c in range(1, len(known) + 1)
        ]
        unlike.append(slow_js(soft_max(v), known) if any(v) else math.inf)
    return unlike


def soft_max(values):
    return [math.exp(x) / sum(math.exp(y) for y in values) for x in values]


@pytest.mark.parametrize("seed", [20, 21])
def test_the_second_stage_of_cald_equals_the_oracle(seed):
    sight = sight_of(seed, images=40, classes=4)
    sight.views.pop("other")  # it shows something in every image
    unlike = slow_second_stage(sight)
    got = [unlike[i] for i in huale.cald(sight, 40, rng_for(0, "c")).positions]
    assert got == pytest.approx(sorted(unlike, reverse=True), abs=1e-6)
    assert 0 < unlike.count(math.inf) < 10 and len(set(unlike)) > 30


def test_the_first_stage_of_cald_keeps_a_few_more_than_the_budget():
    sight = sight_of(9, images=50)
    order = np.argsort(-cald_consistency(sight).values, kind="stable")
    for k, keep, kept in ((10, 1.2, 12), (10, 1.0, 10), (7, 1.2, 8), (45, 1.2, 50)):
        choice = huale.cald(sight, k, rng_for(0, "c"), keep=keep)
        assert len(set(choice.positions.tolist())) == k
        limit = choice.scores.values[order[kept - 1]]
        assert (choice.scores.values[choice.positions] >= limit).all()
    same = huale.choose("cald", sight, 10, rng_for(0, "c"), beta=0.5)
    assert np.array_equal(same.positions, huale.cald(sight, 10, rng_for(0, "c"), beta=0.5).positions)
    other = huale.choose("cald", sight, 10, rng_for(0, "c"))
    assert set(same.positions.tolist()) != set(other.positions.tolist())


# ----------------------------------------------------------------------------------------------------------------- HUA


@pytest.mark.parametrize(("p", "loss"), [([0.5, 0.3, 0.2], 1.0), ([0.05, 0.9, 0.05], 6.0), ([0.0, 0.6, 0.4], 20.0)])
def test_epistemic_uncertainty_equals_its_monte_carlo_estimate(p, loss):
    # scale .8: e = 20, 3.33 and 1. 20,000 samples: standard error below .3 / sqrt(20000) = .002
    got = float(huale.epistemic(torch.tensor([p]), torch.tensor([loss]), 0.8)[0])
    alpha = np.array(p) * 25 * 0.8 / (loss + 1e-7)
    drawn = np.zeros((20_000, 3))
    drawn[:, alpha > 0] = rng_for(0, "dirichlet").dirichlet(alpha[alpha > 0], 20_000)
    within = np.mean([slow_entropy(one) for one in drawn])
    assert got == pytest.approx(slow_entropy(p) - within, abs=0.008) and got > 0.03


def test_epistemic_uncertainty_in_its_limits():
    p = torch.tensor([[0.5, 0.3, 0.2]] * 4)
    values = huale.epistemic(p, torch.tensor([0.0, 0.1, 1.0, 1e12]), 1.0)
    assert values[0] == pytest.approx(0, abs=1e-7)  # endless evidence: nothing left to learn
    assert values[3] == pytest.approx(slow_entropy([0.5, 0.3, 0.2]), abs=1e-6)  # none: all of the entropy
    assert values.tolist() == sorted(values.tolist()) and (values >= 0).all()
    sure = huale.epistemic(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1.0]), 1.0)
    assert sure.tolist() == [0]
    # only the ratio of a box's predicted loss to the mean counts
    assert huale.epistemic(p, torch.full((4,), 2.0), 2.0) == pytest.approx(values[2].expand(4), abs=1e-6)


def test_the_hierarchy_by_hand():
    # image 0, object 0: level 0: class 1 mean(1, 3) = 2, class 2: 5 -> 7; level 1: class 1: 4 -> 4; the larger: 7
    # image 0, object 2: level 1: class 2: 6 -> 6. Sum 13. Image 1: nothing. Image 2, object 0: .5
    rows = [(1, 0, 0, 0, 1), (3, 0, 0, 0, 1), (5, 0, 0, 0, 2), (4, 0, 0, 1, 1), (6, 0, 2, 1, 2), (0.5, 2, 0, 3, 1)]
    columns = torch.tensor(rows, dtype=torch.float64).T
    for order in (list(range(6)), [5, 3, 1, 4, 2, 0]):
        values, *keys = columns[:, order]
        assert huale.pool_hierarchy(values, *(key.long() for key in keys), 3).tolist() == [13, 0, 0.5]
    nobody = torch.zeros(0, dtype=torch.int64)
    assert huale.pool_hierarchy(nobody.float(), nobody, nobody, nobody, nobody, 2).tolist() == [0, 0]


@given(st.lists(st.tuples(*(st.integers(0, n) for n in (20, 3, 2, 3, 4))), max_size=60))
def test_the_hierarchy_equals_the_oracle(rows):
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5).T
    got = huale.pool_hierarchy(columns[0].float(), *columns[1:], 4).tolist()
    assert got == pytest.approx([slow_pool([(r[0], *r[2:]) for r in rows if r[1] == i]) for i in range(4)])


def test_the_boxes_and_objects_of_hua_by_hand():
    h = {p: slow_entropy([1 - p, p]) for p in (0.6, 0.8, 0.9)}
    objects = detections(
        [([0, 0, 10, 10], [0.1, 0.9, 0]), ([50, 0, 60, 10], [0.1, 0, 0.9]), ([80, 0, 90, 10], [0.7, 0.3, 0])],
        [],
        [([0, 0, 10, 10], [0.1, 0.9, 0])],
    )
    crowd = [
        [
            ([0, 0, 10, 10], [0.4, 0.6, 0.0]),  # object 0, level 0, class 1: mean with the next
            ([0, 0, 10, 9], [0.2, 0.8, 0.0]),
            ([0, 0, 10, 9], [0.1, 0.0, 0.9]),  # object 0, level 0, class 2: added
            ([0, 0, 9, 10], [0.4, 0.6, 0.0]),  # object 0, level 1: less than level 0, so it does not show
            ([50, 0, 60, 8], [0.4, 0.6, 0.0]),  # object 1
            ([50, 0, 60, 5], [0.5, 0.5, 0.0]),  # IoU 1/2 is not above 1/2
            ([0, 0, 10, 10], [0.7, 0.3, 0.0]),  # .3 is not above .3
            ([80, 0, 90, 10], [0.5, 0.5, 0.0]),  # its detection is not above .3
            ([0, 0, 10, 10], [0.1, 0.5, 0.4]),  # a row that holds the box for a class that is not its best (below)
        ],
        [([0, 0, 10, 10], [0.5, 0.5, 0.0])],  # no detection at all
        [],
    ]
    crowd = detections(*crowd, level=[[0, 0, 0, 1, 2, 0, 0, 0, 0], [0], []])
    crowd.labels[0, 8] = 2
    want = (h[0.6] + h[0.8]) / 2 + h[0.9] + h[0.6]
    scores = huale.hua(Sight(3, objects, crowd=crowd), 1, rng_for(0, "c"), uncertainty="entropy").scores
    assert scores.values == pytest.approx([want, 0, 0], abs=1e-6) and scores.scored.all()
    flat = dataclasses.replace(crowd, extra={})  # no levels: all are of one
    one = huale.hua(Sight(3, objects, crowd=flat), 1, rng_for(0, "c"), uncertainty="entropy")
    assert one.scores.values[0] == pytest.approx((2 * h[0.6] + h[0.8]) / 3 + h[0.9] + h[0.6], abs=1e-6)
    assert one.positions.tolist() == [0]


@pytest.mark.parametrize("uncertainty", ["epistemic", "entropy"])
def test_hua_equals_the_oracle(uncertainty):
    sight = sight_of(10, images=60)
    got = huale.hua(sight, 5, rng_for(0, "c"), score_above=0.45, iou=0.6, uncertainty=uncertainty).scores.values
    losses, levels = (sight.crowd.extra[name].tolist() for name in ("predicted_loss", "level"))
    crowd, objects = lists(sight.crowd), lists(sight.detections)
    every = [loss for row, image in zip(losses, crowd, strict=True) for loss in row[: len(image)]]
    scale = sum(every) / len(every)
    for i in range(60):
        boxes = []
        for row, (place, p, score, label) in enumerate(crowd[i]):
            overlaps = [oracles.iou(place, o[0]) if o[2] > 0.45 else -1 for o in objects[i]]
            if score > 0.45 and max(overlaps) > 0.6:
                value = slow_entropy(p)
                if uncertainty == "epistemic":
                    value = float(huale.epistemic(torch.tensor([p]), torch.tensor([losses[i][row]]), scale)[0])
                boxes.append((value, overlaps.index(max(overlaps)), levels[i][row], label))
        assert got[i] == pytest.approx(slow_pool(boxes), abs=1e-6), i
    assert len(set(got.round(4))) > 25 and (got == 0).any()


def quota_sight(seen, unseen):
    """`seen` images of different entropies, then `unseen` ones without a box."""
    images = [[([0, 0, 10, 10], [0.1 + 0.3 * i / seen, 0.9 - 0.3 * i / seen])] for i in range(seen)]
    found = detections(*images, *[[]] * unseen, columns=2)
    return Sight(seen + unseen, found, crowd=found)


@pytest.mark.parametrize(
    ("seen", "unseen", "k", "quota", "zeros"),
    [
        (30, 20, 20, 0.15, 3),  # round(.15 x 20)
        (30, 20, 10, 0.15, 2),  # round(1.5)
        (30, 20, 20, 0.5, 10),
        (30, 20, 20, 0.0, 0),
        (30, 1, 20, 0.15, 1),  # fewer when there are fewer
        (30, 0, 20, 0.15, 0),
        (5, 20, 20, 0.15, 15),  # too few with a score: the rest are zeros as well, none twice
        (0, 25, 20, 0.15, 20),
        (5, 5, 10, 0.15, 5),
    ],
)
def test_hua_draws_its_quota_from_the_images_that_scored_nothing(seen, unseen, k, quota, zeros):
    sight = quota_sight(seen, unseen)
    runs = [huale.choose("hua_entropy", sight, k, rng_for(seed, "c"), quota=quota).positions for seed in range(60)]
    for picks in runs:
        assert len(picks) == len(set(picks.tolist())) == k
        assert (picks >= seen).sum() == zeros and (
            picks[k - min(round(quota * k), unseen) :] >= seen
        ).all()  # drawn last
        best = picks[picks < seen]  # the most uncertain is the last of them
        assert best.tolist() == list(range(seen - 1, seen - 1 - len(best), -1))
    drawn = {int(i) for picks in runs for i in picks[picks >= seen]}
    assert drawn == set(range(seen, seen + unseen)) if zeros >= 3 else len(drawn) <= unseen
    assert np.array_equal(runs[4], huale.choose("hua_entropy", sight, k, rng_for(4, "c"), quota=quota).positions)


def test_epistemic_hua_follows_the_predicted_loss_and_cannot_do_without_it():
    sight = quota_sight(4, 0)
    with pytest.raises(ValueError, match="needs the predicted loss.*evidence=True"):
        huale.choose("hua", sight, 2, rng_for(0, "c"))
    assert huale.choose("hua_entropy", sight, 2, rng_for(0, "c")).positions.tolist() == [3, 2]
    losses = torch.tensor([[9.0], [1.0], [0.1], [0.01]])
    sight = dataclasses.replace(sight, crowd=dataclasses.replace(sight.crowd, extra={"predicted_loss": losses}))
    assert huale.choose("hua", sight, 2, rng_for(0, "c")).positions.tolist() == [0, 1]
    for bad in (-1.0, math.nan, math.inf):
        losses[2] = bad
        with pytest.raises(ValueError, match="predicted losses must be finite numbers >= 0"):
            huale.choose("hua", sight, 2, rng_for(0, "c"))


# ---------------------------------------------------------------------------------------------------- choosing by name


@pytest.mark.parametrize("strategy", huale.STRATEGIES)
@pytest.mark.parametrize("classes", [1, 3])
def test_every_strategy_chooses_k_different_images_the_same_ones_again_and_leaves_its_sight_alone(strategy, classes):
    sight = sight_of(11, images=40, classes=classes)
    copies = [
        t.clone() for t in (sight.detections.boxes, sight.detections.probs, sight.flipped.labels, sight.crowd.probs)
    ]
    first, again = (huale.choose(strategy, sight, 9, rng_for(0, "c")) for _ in range(2))
    assert len(set(first.positions.tolist())) == 9 and first.positions.dtype.kind == "i"
    assert np.array_equal(first.positions, again.positions) and np.array_equal(first.scores.values, again.scores.values)
    assert len(first.scores) == 40 and np.isfinite(first.scores.values).all()
    now = (sight.detections.boxes, sight.detections.probs, sight.flipped.labels, sight.crowd.probs)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(copies, now, strict=True))


@pytest.mark.parametrize("strategy", huale.STRATEGIES)
def test_a_strategy_needs_what_it_says_and_no_more(strategy):
    whole = sight_of(12)
    needs = huale.needs(strategy)
    empty = {"test_time_views": {}}
    fields = {f.name for f in dataclasses.fields(Sight)} - {"images"}
    bare = Sight(whole.images, **{name: getattr(whole, name) for name in needs})
    picks = huale.choose(strategy, bare, 3, rng_for(0, "c")).positions
    assert np.array_equal(picks, huale.choose(strategy, whole, 3, rng_for(0, "c")).positions)
    assert needs < fields
    for name in needs:
        with pytest.raises(ValueError, match=f"needs '{name}' of its Sight, which has none"):
            huale.choose(strategy, dataclasses.replace(bare, **{name: empty.get(name)}), 3, rng_for(0, "c"))
    with pytest.raises(ValueError, match="budget of 13 images, but the pool has 12 unlabelled"):
        huale.choose(strategy, whole, 13, rng_for(0, "c"))
    with pytest.raises(ValueError, match="budget of 2 images, but the pool has 0"):
        huale.choose(strategy, Sight(0), 2, rng_for(0, "c"))
    with pytest.raises(ValueError, match="budget of -1 images"):
        huale.choose(strategy, whole, -1, rng_for(0, "c"))
    with pytest.raises(ValueError, match="of 13 images, got 12"):
        huale.choose(strategy, dataclasses.replace(whole, images=13), 3, rng_for(0, "c"))


def spoilt(found, field, value):
    image, row = (found.valid & (found.valid.sum(1, keepdim=True) > 1)).nonzero()[0].tolist()
    tensor = getattr(found, field).clone()
    tensor[image, row] = value
    return dataclasses.replace(found, **{field: tensor}), image


@pytest.mark.parametrize("strategy", huale.STRATEGIES)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("probs", math.nan, "non-finite class probabilities"),
        ("probs", math.inf, "non-finite class probabilities"),
        ("probs", 0.9, "class probabilities that do not sum to 1"),
        ("boxes", math.nan, "a non-finite box or score"),
        ("scores", math.nan, "a non-finite box or score"),
        ("labels", 4, "a class above 3"),
    ],
)
def test_a_broken_model_chooses_nothing(strategy, field, value, message):
    sight = sight_of(13)
    looks = [name for name in ("detections", "flipped", "crowd") if name in huale.needs(strategy)]
    for name in looks:
        found, image = spoilt(getattr(sight, name), field, value)
        with pytest.raises(ValueError, match=f"{message} in image {image} of 12: a broken model"):
            huale.choose(strategy, dataclasses.replace(sight, **{name: found}), 3, rng_for(0, "c"))
    if strategy == "cald":
        found, image = spoilt(sight.views["same"].found, field, value)
        views = {**sight.views, "same": View(sight.views["same"].moved, found)}
        with pytest.raises(ValueError, match=f"view 'same': {message} in image {image} of 12"):
            huale.choose(strategy, dataclasses.replace(sight, views=views), 3, rng_for(0, "c"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: huale.choose("best", s, 1, rng_for(0, "c")), r"strategy must be one of \('cascade', .* got 'best'"),
        (lambda s: huale.needs("sum"), "got 'sum'"),
        (lambda s: cascade_stages(s, 1, rng_for(0, "c"), order=("semantic",)), "name each of .* once"),
        (lambda s: cascade_stages(s, 1, rng_for(0, "c"), order=("semantic",) * 4), "name each of .* once"),
        (lambda s: cascade_stages(s, 1, rng_for(0, "c"), order=(*FILTERS, "semantic")), "name each of .* once"),
        (lambda s: cascade_stages(s, 1, rng_for(0, "c"), sizes=(4, 3, 2)), r"four falling numbers .* got \(4, 3, 2\)"),
        (lambda s: cascade_stages(s, 1, rng_for(0, "c"), sizes=(4, 3, 2, 0.5)), "four falling numbers >= 1"),
        (lambda s: cascade_stages(s, 1, rng_for(0, "c"), sizes=(2, 3, 2, 1)), "four falling numbers"),
        (lambda s: cascade_stages(s, 1, rng_for(0, "c"), sizes=(math.nan, 3, 2, 1)), "four falling numbers"),
        (lambda s: cascade_stages(s, 1, rng_for(0, "c"), sizes=(math.inf, 3, 2, 1)), "four falling numbers"),
        (lambda s: cascade_stages(s, 1, rng_for(0, "c"), empty="middle"), "got 'middle'"),
        (lambda s: huale.retrieval(s.detections, s.flipped.take([0])), "two views .* got 12 and 1 images"),
        (lambda s: huale.retrieval(s.detections, sight_of(0, 12, 2).flipped), "4 and 3 columns"),
        (lambda s: huale.category_diversity(s.detections, s.flipped, np.ones(2)), "labelled boxes: 3 finite numbers"),
        (lambda s: huale.category_diversity(s.detections, s.flipped, np.array([1, 1, -1])), "labelled boxes"),
        (lambda s: huale.cald(s, 1, rng_for(0, "c"), keep=0.9), "at least the budget, got keep=0.9"),
        (
            lambda s: huale.cald(dataclasses.replace(s, labelled=np.array([1, 1, np.nan])), 1, rng_for(0, "c")),
            "labelled",
        ),
        (lambda s: cald_consistency(s, beta=math.nan), "finite beta"),
        (lambda s: cald_consistency(s, keep=0), "got keep=0"),
        (
            lambda s: cald_consistency(dataclasses.replace(s, views={"v": View(s.detections.boxes[:, :1], s.flipped)})),
            "view 'v' moves boxes of shape .* but the plain images have",
        ),
        (
            lambda s: cald_consistency(
                dataclasses.replace(s, views={"v": View(s.detections.boxes * math.nan, s.flipped)})
            ),
            "view 'v': the moved boxes must be finite",
        ),
        (lambda s: huale.hua(s, 1, rng_for(0, "c"), quota=1.5), "quota in .0, 1., got 'epistemic' and 1.5"),
        (lambda s: huale.hua(s, 1, rng_for(0, "c"), uncertainty="variance"), "got 'variance'"),
        (
            lambda s: huale.pool_hierarchy(torch.ones(2), *[torch.zeros(2).long()] * 3, torch.tensor([0, -1]), 1),
            "each of 2 boxes needs one label >= 0",
        ),
        (
            lambda s: huale.pool_hierarchy(torch.ones(2), *[torch.zeros(2).long()] * 3, torch.tensor([0]), 1),
            "each of 2 boxes needs one label >= 0",
        ),
    ],
)
def test_what_cannot_be_judged_or_chosen_is_an_error_that_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        change(sight_of(14))


def test_sides_outside_their_range_are_refused():
    a = ([0, 0, 10, 10], SURE)
    good, bad = (detections([a], sides=[[[0.5, 0.5, 0.5, last]]]) for last in (1.0, 1.5))
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=r"confidence of a side must lie in \[0, 1\]"):
            huale.localisation_confidence(*pair)
    assert huale.localisation_confidence(good, good).values == pytest.approx([0.375])


def test_labels_are_nowhere_to_be_had():
    hidden = {"labels", "truth", "classes", "targets", "oracle", "pool"}
    for name, function in inspect.getmembers(huale, inspect.isfunction):
        assert not hidden & set(inspect.signature(function).parameters) or name == "_per_class", name
    assert not {"fedal_utils.data", "fedal_utils.pool"} & {
        getattr(value, "__module__", "") for value in vars(huale).values()
    }


# ------------------------------------------------------------------------------------------------ the experiment's arms


def test_an_arm_differs_from_the_plain_one_in_what_its_name_says():
    base = papers.load("20_huale", "smoke")
    arms = huale.loss_arms(base.replace(box_loss="efficient_iou", emphasis=0.5))  # whatever the config says
    plain = arms[huale.PLAIN]
    assert (plain.box_loss, plain.companion, plain.emphasis) == ("smooth_l1", "none", 0.0)

    def changes(arm):
        return {k: v for k, v in arm.as_dict().items() if v != plain.as_dict()[k]}

    assert changes(arms[huale.WHOLE]) == {"box_loss": "extended_iou", "auxiliary_head": "sides", "emphasis": 1.0}
    alone = [changes(arm) for name, arm in arms.items() if name.endswith("alone")]
    assert alone == [
        {"box_loss": "extended_iou"},
        {"box_loss": "efficient_iou"},
        {"auxiliary_head": "sides"},
        {"auxiliary_head": "iou"},
        {"emphasis": 1.0},
    ]
    assert len({arm.digest() for arm in arms.values()}) == len(arms) == 7


def test_orders_are_different_permutations_and_the_published_one_is_the_config_itself():
    base = papers.load("20_huale", "smoke")
    orders = huale.filter_orders(base)
    assert [sorted(c.cascade_order) for c in orders.values()] == [sorted(FILTERS)] * 3
    assert len({c.cascade_order for c in orders.values()}) == 3
    assert next(iter(orders.values())).digest() == base.digest()


def curves_table(values, cycles=3):
    """values: (arm, method, seed) -> AP50 of each cycle; rows as `record.table` gives them."""
    rows = [
        {
            "arm": arm,
            "method": method,
            "seed": seed,
            "cycle": cycle,
            "round": 0,
            "client": "server",
            "images": 8,
            "ap50": ap,
        }
        for (arm, method, seed), curve in values.items()
        for cycle, ap in enumerate(curve)
    ]
    return pd.DataFrame(rows)


def test_the_gain_is_split_as_by_hand():
    p, w = huale.PLAIN, huale.WHOLE
    table = curves_table(
        {
            (p, "random", 0): [0.40, 0.50, 0.60],
            (p, "random", 1): [0.30, 0.50, 0.70],
            (p, "cascade", 0): [0.40, 0.52, 0.64],
            (p, "cascade", 1): [0.30, 0.54, 0.72],
            (w, "random", 0): [0.46, 0.53, 0.61],
            (w, "random", 1): [0.38, 0.53, 0.71],
            (w, "cascade", 0): [0.46, 0.57, 0.65],
            (w, "cascade", 1): [0.38, 0.55, 0.75],
        }
    )
    split = huale.gain_split(table).set_index(["effect", "part"])
    # whole cascade - plain random: seed 0 (6 + 7 + 5) / 3 = 6, seed 1 (8 + 5 + 5) / 3 = 6; without the first 6 and 5
    both = split.loc["losses and acquisition"]
    assert both["points"].to_dict() == pytest.approx({"all cycles": 6, "without the first": 5.5, "first cycle": 7})
    # the first cycle has random labels: choosing cannot have changed a thing, the losses all of it
    for effect in ("acquisition, plain losses", "acquisition, HUALE losses"):
        assert split.loc[(effect, "first cycle"), "points"] == 0
    assert split.loc[("losses, random labels", "first cycle"), "points"] == pytest.approx(7)
    # the parts add up to the whole, either way round
    for part in ("all cycles", "without the first", "first cycle"):
        points = split["points"].xs(part, level="part")
        for loss, choice in (
            ("losses, random labels", "acquisition, HUALE losses"),
            ("losses, cascade's labels", "acquisition, plain losses"),
        ):
            assert points[loss] + points[choice] == pytest.approx(points["losses and acquisition"])
    # without the first, seeds 6 and 5: t interval 5.5 +- 12.706 * 0.7071 / sqrt(2)
    row = split.loc[("losses and acquisition", "without the first")]
    assert (row["low"], row["high"], row["seeds"]) == pytest.approx((5.5 - 6.353, 5.5 + 6.353, 2), abs=1e-3)
    assert "against CALD as published" not in split.index.get_level_values(0)  # CALD was not run


def test_arms_are_held_against_one_of_them_seed_by_seed():
    table = curves_table(
        {
            ("plain", "random", 0): [0.40, 0.50],
            ("plain", "random", 1): [0.30, 0.50],
            ("plain", "cascade", 0): [0.9, 0.9],
            ("a", "random", 0): [0.44, 0.54],
            ("a", "random", 1): [0.34, 0.50],
            ("b", "random", 1): [0.20, 0.40],
            ("c", "random", 0): [0.9],
        }
    )
    table["ap_coco"] = table["ap50"] / 2
    gains = metrics.arm_gains(table, "random", "plain")
    assert gains[["effect", "part"]].to_records(index=False).tolist() == [
        ("a", "ap50"),
        ("b", "ap50"),
        ("a", "ap_coco"),
        ("b", "ap_coco"),
    ]
    assert gains["points"].tolist() == pytest.approx([3.0, -10.0, 1.5, -5.0])  # a: 4 and 2 points
    assert gains["seeds"].tolist() == [2, 1, 2, 1]  # c has fewer cycles, b has one seed in common


def test_unpaired_seeds_and_unequal_curves_are_left_out():
    p, w = huale.PLAIN, huale.WHOLE
    table = curves_table({(p, "random", 0): [0.4, 0.5], (w, "random", 0): [0.5, 0.7], (w, "random", 1): [0.9, 0.9]})
    split = huale.gain_split(table)
    assert set(split["effect"]) == {"losses, random labels"} and set(split["seeds"]) == {1}
    assert split["points"].tolist() == pytest.approx([15, 20, 10])
    assert not len(huale.gain_split(curves_table({(p, "random", 0): [0.4, 0.5], (w, "random", 0): [0.5]})))
    assert not len(huale.gain_split(pd.DataFrame()))


def test_findings_say_what_the_interval_says():
    frame = pd.DataFrame(
        {
            "effect": ["a", "b", "c", "d", "e"],
            "part": ["all cycles"] * 4 + ["first cycle"],
            "points": [2.0, -2.0, 1.0, 1.0, 9.0],
            "low": [1.0, -3.0, -1.0, math.nan, 8.0],
            "high": [3.0, -1.0, 3.0, math.nan, 10.0],
        }
    )
    lines = metrics.effect_findings(frame).splitlines()
    assert [line.split("(")[1].rstrip(").").split(": ")[-1] for line in lines] == [
        "a gain",
        "a loss",
        "no difference shown",
        "one seed, so no interval",
    ]
    assert metrics.effect_findings(frame[:0]) == "Not run."


def test_the_published_averages_include_the_first_cycle():
    """The abstract's 4.53, 3.44 and 1.57 come out of the digitised curves only with the first cycle in."""
    paper = record.read_paper("huale")
    split = huale.published_split(paper).set_index(["item", "minus"])
    stated = paper[paper["x"].isna()]
    for item in ("VOC07", "VOC12", "COCO"):
        headline = stated.loc[stated["item"] == f"{item}, average gain", "value"].item()
        assert split.loc[(item, "Random"), "all"] == pytest.approx(headline, abs=0.01)
    assert split["later"].xs("Random", level="minus").tolist() == pytest.approx([3.87, 3.38, 1.60], abs=0.01)
    assert split["first"].xs("Random", level="minus").tolist() == pytest.approx([8.5, 3.8, 1.46], abs=0.01)
    assert split["later"].xs("CALD", level="minus").tolist() == pytest.approx([0.98, 0.32, 0.81], abs=0.01)
    assert split["last"].xs("CALD", level="minus").tolist() == pytest.approx([0.1, 0.1, 0.48], abs=0.01)


# ---------------------------------------------------------------------------------------------------- the paper's size


@pytest.mark.parametrize("method", ["cald", "cascade"])
def test_the_papers_size_runs_on_a_miniature_of_voc_in_its_real_layout(tmp_path, method):
    """Everything as in the profile but the numbers: R50-FPN, whole, SGD in epochs, step schedule, afresh each cycle."""
    names = [f"{i:06d}" for i in range(8)]
    pictures = [
        miniatures.Picture(name, (48, 64), (("dog", (4 + i, 6, 30 + i, 34)), ("cat", (34, 8, 60, 40))))
        for i, name in enumerate(names)
    ]
    miniatures.voc(
        tmp_path / "VOCdevkit" / "VOC2007", pictures, {"trainval": names[:6], "test": names[6:]}, ".jpg", one_based=True
    )
    paper = papers.load("20_huale", "paper", seeds=[0])
    assert (paper.backbone, paper.frozen, paper.epochs, paper.schedule, paper.first, paper.cycles) == (
        "resnet50",
        False,
        20,
        "step",
        500,
        7,
    )
    tiny = paper.replace(
        image_size=(64, 64),
        pretrained=False,
        initial_labels=2,
        query_size=2,
        cycles=2,
        epochs=1,
        batch=2,
        pool_subset_size=3,
    )
    tiny = huale.loss_arms(tiny)[huale.WHOLE].replace(score_above=0.0, threads=1)
    study = alfl.prepare(tiny, device="cpu", root=str(tmp_path))
    assert len(study.class_names) == 20 and len(study.train) == 6 and len(study.test) == 2
    (run,) = record.runs(tiny, "20_huale", [method], [0], tmp_path / "runs", progress=False, plan=alfl.plan)
    clients, model = alfl.start(run, study)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    for cycle, round in run.rounds():
        alfl.ask(run, study, model, clients[0], cycle)
        updates = alfl.train(run, study, model, clients, cycle, round)
        alfl.merge(run, model, clients, updates)
        row = alfl.commit(run, study, model, clients, updates, cycle, round)
    assert (row["images"], row["boxes"], row["steps"]) == (4, 8, 2)
    assert 0 <= row["ap50"] <= 1
    assert any(not torch.equal(v, first[k]) for k, v in model.state_dict().items() if k.startswith("backbone."))
