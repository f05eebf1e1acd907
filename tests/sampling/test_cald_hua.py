"""CALD and HUA by hand-worked values of their public code's rules."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from observed import chosen, detections, observed

from fedal_utils.sampling.cald import consistency
from fedal_utils.sampling.hua import epistemic, pool_hierarchy
from fedal_utils.seeding import rng_for


def cald_seen(plain, *views, **more):
    """Views whose pixels are those of the plain image."""
    named = {f"view {number}": (plain.boxes, found) for number, found in enumerate(views)}
    return observed(len(plain), plain, views=named, **more)


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


BOX = ([0, 0, 10, 10], [0.2, 0.8])
COLUMNS = ["value", "image", "object", "level", "label"]


def test_cald_consistency_by_hand():
    # Same box, same class vector (.2, .8): m = 1 + (1 - 0) (.8 + .8) / 2 = 1.8, deviation .5.
    plain = detections([BOX], columns=2)
    assert consistency(cald_seen(plain, plain)).values == pytest.approx([-0.5])
    # IoU 1/2; q = (.4, .6): JS = .024157 nats; m = .5 + .975843 x .7 = 1.183090, deviation .116910
    other = detections([([0, 0, 10, 5], [0.4, 0.6])], columns=2)
    assert consistency(cald_seen(plain, other)).values == pytest.approx([-0.116910], abs=1e-6)


def test_a_view_that_shows_nothing_counts_zero_and_a_views_value_is_one_at_most():
    plain, none = detections([BOX], columns=2), detections([], columns=2)
    assert consistency(cald_seen(plain, plain, none)).values == pytest.approx([-(0.5 + 0) / 2])
    # no overlap, opposite vectors: m = (1 - JS) x (.1 + .9) / 2 with JS near ln 2, so |m - 1.3| > 1: capped at 1
    sure = detections([([0, 0, 9, 9], [0.01, 0.99])], columns=2)
    unsure = detections([([50, 0, 59, 9], [0.99, 0.01])], columns=2)
    assert consistency(cald_seen(sure, unsure)).values == pytest.approx([-1.0])
    # an image without a detection has consistency 0: queried first
    two = detections([], [BOX], columns=2)
    assert consistency(cald_seen(two, two)).values.tolist() == pytest.approx([0.0, -0.5])


def test_of_more_than_forty_boxes_fifty_even_steps_enter_the_last_included():
    # 60 boxes down the scores; only the last one moves in the view, so the image is consistent unless the last enters
    boxes = [([20 * i, 0, 20 * i + 10, 10], [0.2, 0.8 - i / 1000]) for i in range(60)]
    moved = [*boxes[:-1], ([20 * 59, 0, 20 * 59 + 10, 7], boxes[-1][1])]
    plain, view = detections(boxes, columns=2), detections(moved, columns=2)
    s = 0.8 - 59 / 1000
    assert consistency(cald_seen(plain, view)).values == pytest.approx([-abs(0.7 + s - 1.3)], abs=1e-6)
    skipped = min(set(range(60)) - set(np.round(np.linspace(0, 59, 50)).astype(int).tolist()))
    moved = [(b[:3] + [7], p) if i == skipped else (b, p) for i, (b, p) in enumerate(boxes)]
    unmoved = consistency(cald_seen(plain, plain)).values
    assert consistency(cald_seen(plain, detections(moved, columns=2))).values == pytest.approx(unmoved)


def test_hua_draws_its_quota_from_images_that_scored_zero():
    row, image = ([0, 0, 10, 10], [0.4, 0.6]), list(range(8))
    found = detections(*([row] if i < 4 else [] for i in image), columns=2)
    loss = [[1.0 + i] if i < 4 else [] for i in image]
    dense = detections(*([row] if i < 4 else [] for i in image), columns=2, predicted_loss=loss)
    seen = observed(8, found, pre_nms_detections=dense)
    runs = [chosen("hua", seen, 4, rng_for(s, "c"), quota=0.5).positions for s in range(40)]
    assert all((run[:2] < 4).all() and (run[2:] >= 4).all() and len(set(run)) == 4 for run in runs)
    assert {int(i) for run in runs for i in run[2:]} == {4, 5, 6, 7}
    few = chosen("hua", seen, 7, rng_for(0, "c"), quota=1.0).positions  # of fewer than the quota all are taken
    assert sorted(few[-4:]) == [4, 5, 6, 7]


def test_the_second_stage_keeps_int_1_2_k_and_takes_empty_plain_views_first():
    # five images; image 3 is empty in its plain view but not in the changed one
    plain = detections([BOX], [BOX], [BOX], [], [BOX], columns=2)
    view = detections([([0, 0, 10, 5], [0.4, 0.6])], [BOX], [BOX], [BOX], [BOX], columns=2)
    seen = cald_seen(plain, view, labelled_class_counts=np.array([1.0]))
    assert chosen("cald", seen, 1, rng_for(0, "c")).positions.tolist() == [3]
    # k = 4: int(4.8) = 4 pass the first stage (round would keep 5): the last image of the first stage is left out
    first = consistency(seen).values
    picked = chosen("cald", seen, 4, rng_for(0, "c")).positions
    assert picked[0] == 3 and 0 in picked and set(np.argsort(-first, kind="stable")[:2].tolist()) == {3, 0}


def test_a_box_of_hua_counts_for_every_object_that_it_overlaps():
    objects = detections([([0, 0, 10, 10], [0.1, 0.9, 0]), ([2, 0, 12, 10], [0.1, 0.9, 0])], [])
    row = [0.4, 0.6, 0.0]
    dense = detections([([1, 0, 11, 10], row)], [([0, 0, 10, 10], row)], predicted_loss=[[3.0], [3.0]])
    found = chosen("hua", observed(2, objects, pre_nms_detections=dense), 1, rng_for(0, "c"))
    one = float(epistemic(torch.tensor([row]), torch.tensor([3.0]), 3.0))
    assert found.scores.values == pytest.approx([2 * one, 0.0], abs=1e-6)  # IoU .82 with both
    assert found.positions.tolist() == [0]


def test_the_normaliser_of_hua_is_the_mean_loss_of_one_image_and_level():
    objects = detections([([0, 0, 10, 10], [0.1, 0.9, 0])], [([0, 0, 10, 10], [0.1, 0.9, 0])])
    row = ([0, 0, 10, 10], [0.4, 0.6, 0.0])
    dense = detections([row, row, row], [row], level=[[0, 0, 1], [0]], predicted_loss=[[1.0, 3.0, 5.0], [100.0]])
    values = chosen("hua", observed(2, objects, pre_nms_detections=dense), 1, rng_for(0, "c")).scores.values
    p = torch.tensor([[0.4, 0.6, 0.0]])
    pairs = ((1.0, 2.0), (3.0, 2.0), (5.0, 5.0), (100.0, 100.0))
    one = [float(epistemic(p, torch.tensor([loss]), scale)) for loss, scale in pairs]
    assert values == pytest.approx([max((one[0] + one[1]) / 2, one[2]), one[3]], rel=1e-6)
    alone = detections([row], [row], level=[[0], [0]], predicted_loss=[[1.0], [100.0]])
    both = chosen("hua", observed(2, objects, pre_nms_detections=alone), 1, rng_for(0, "c")).scores.values
    assert both[1] == pytest.approx(values[1])  # which other images are scored moves nothing


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


@pytest.mark.parametrize(("p", "loss"), [([0.5, 0.3, 0.2], 1.0), ([0.05, 0.9, 0.05], 6.0), ([0.0, 0.6, 0.4], 20.0)])
def test_epistemic_uncertainty_equals_its_monte_carlo_estimate(p, loss):
    # scale .8: e = 20, 3.33 and 1. 20,000 samples: standard error below .3 / sqrt(20000) = .002
    got = float(epistemic(torch.tensor([p]), torch.tensor([loss]), 0.8)[0])
    alpha = np.array(p) * 25 * 0.8 / (loss + 1e-7)
    drawn = np.zeros((20_000, 3))
    drawn[:, alpha > 0] = rng_for(0, "dirichlet").dirichlet(alpha[alpha > 0], 20_000)
    within = np.mean([entropy(one) for one in drawn])
    assert got == pytest.approx(entropy(p) - within, abs=0.008) and got > 0.03


def test_epistemic_uncertainty_in_its_limits():
    p = torch.tensor([[0.5, 0.3, 0.2]] * 4)
    values = epistemic(p, torch.tensor([0.0, 0.1, 1.0, 1e12]), 1.0)
    assert values[0] == pytest.approx(0, abs=1e-7)  # endless evidence: nothing left to learn
    assert values[3] == pytest.approx(entropy([0.5, 0.3, 0.2]), abs=1e-6)  # none: all of the entropy
    assert values.tolist() == sorted(values.tolist()) and (values >= 0).all()
    sure = epistemic(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1.0]), 1.0)
    assert sure.tolist() == [0]
    # only the ratio of a box's predicted loss to the mean counts
    assert epistemic(p, torch.full((4,), 2.0), 2.0) == pytest.approx(values[2].expand(4), abs=1e-6)


def test_the_hierarchy_by_hand():
    # image 0, object 0: level 0: class 1 mean(1, 3) = 2, class 2: 5 -> 7; level 1: class 1: 4 -> 4; the larger: 7
    # image 0, object 2: level 1: class 2: 6 -> 6. Sum 13. Image 1: nothing. Image 2, object 0: .5
    rows = [(1, 0, 0, 0, 1), (3, 0, 0, 0, 1), (5, 0, 0, 0, 2), (4, 0, 0, 1, 1), (6, 0, 2, 1, 2), (0.5, 2, 0, 3, 1)]
    for order in (list(range(6)), [5, 3, 1, 4, 2, 0]):
        assert pool_hierarchy(pd.DataFrame([rows[i] for i in order], columns=COLUMNS), 3).tolist() == [13, 0, 0.5]


@given(st.lists(st.tuples(*(st.integers(0, n) for n in (20, 3, 2, 3, 4))), max_size=60))
def test_the_hierarchy_equals_the_oracle(rows):
    got = pool_hierarchy(pd.DataFrame(rows, columns=COLUMNS), 4).tolist()
    assert got == pytest.approx([slow_pool([(r[0], *r[2:]) for r in rows if r[1] == i]) for i in range(4)])
