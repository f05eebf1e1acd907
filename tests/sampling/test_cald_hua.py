"""CALD and HUA by hand-worked values of their public code's rules."""

import math

import numpy as np
import pytest
import torch
from observed import chosen, detections, observed

from fedal_utils.sampling import View
from fedal_utils.sampling.cald import consistency
from fedal_utils.sampling.hua import epistemic
from fedal_utils.seeding import rng_for


def cald_seen(plain, *views, **more):
    """Views whose pixels are those of the plain image."""
    named = {f"view {number}": View(plain.boxes, found) for number, found in enumerate(views)}
    return observed(len(plain), plain, views=named, **more)


BOX = ([0, 0, 10, 10], [0.2, 0.8])


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
    sure, unsure = (
        detections([([0, 0, 9, 9], [0.01, 0.99])], columns=2),
        detections([([50, 0, 59, 9], [0.99, 0.01])], columns=2),
    )
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
    ranks = set(np.round(np.linspace(0, 59, 50)).astype(int).tolist())
    skipped = next(i for i in range(60) if i not in ranks)
    moved = [*boxes]
    moved[skipped] = (boxes[skipped][0][:3] + [7], boxes[skipped][1])
    unmoved = consistency(cald_seen(plain, plain)).values
    assert consistency(cald_seen(plain, detections(moved, columns=2))).values == pytest.approx(unmoved)


def test_the_second_stage_keeps_int_1_2_k_and_takes_empty_plain_views_first():
    counts = np.array([1.0])
    # five images; image 3 is empty in its plain view but not in the changed one
    plain = detections([BOX], [BOX], [BOX], [], [BOX], columns=2)
    view = detections([([0, 0, 10, 5], [0.4, 0.6])], [BOX], [BOX], [BOX], [BOX], columns=2)
    seen = cald_seen(plain, view, labelled_class_counts=counts)
    assert chosen("cald", seen, 1, rng_for(0, "c")).positions.tolist() == [3]
    # k = 4: int(4.8) = 4 pass the first stage (round would keep 5): the last image of the first stage is left out
    first = consistency(seen).values
    picked = chosen("cald", seen, 4, rng_for(0, "c")).positions
    assert picked[0] == 3 and 0 in picked and set(np.argsort(-first, kind="stable")[:2].tolist()) == {3, 0}


def entropy(*p):
    return -sum(x * math.log(x) for x in p if x)


def test_a_box_of_hua_counts_for_every_object_that_it_overlaps():
    objects = detections([([0, 0, 10, 10], [0.1, 0.9, 0]), ([2, 0, 12, 10], [0.1, 0.9, 0])], [])
    dense = detections([([1, 0, 11, 10], [0.4, 0.6, 0.0])], [([0, 0, 10, 10], [0.4, 0.6, 0.0])])
    found = chosen("hua_entropy", observed(2, objects, pre_nms_detections=dense), 1, rng_for(0, "c"))
    assert found.scores.values == pytest.approx([2 * entropy(0.4, 0.6), 0.0], abs=1e-6)  # IoU .82 with both
    assert found.positions.tolist() == [0]


def test_the_normaliser_of_hua_is_the_mean_loss_of_one_image_and_level():
    objects = detections([([0, 0, 10, 10], [0.1, 0.9, 0])], [([0, 0, 10, 10], [0.1, 0.9, 0])])
    row = ([0, 0, 10, 10], [0.4, 0.6, 0.0])
    dense = detections([row, row, row], [row], level=[[0, 0, 1], [0]], predicted_loss=[[1.0, 3.0, 5.0], [100.0]])
    values = chosen("hua", observed(2, objects, pre_nms_detections=dense), 1, rng_for(0, "c")).scores.values
    p = torch.tensor([[0.4, 0.6, 0.0]])
    one = [
        float(epistemic(p, torch.tensor([loss]), scale))
        for loss, scale in ((1.0, 2.0), (3.0, 2.0), (5.0, 5.0), (100.0, 100.0))
    ]
    assert values == pytest.approx([max((one[0] + one[1]) / 2, one[2]), one[3]], rel=1e-6)
    alone = detections([row], [row], level=[[0], [0]], predicted_loss=[[1.0], [100.0]])
    both = chosen("hua", observed(2, objects, pre_nms_detections=alone), 1, rng_for(0, "c")).scores.values
    assert both[1] == pytest.approx(values[1])  # which other images are scored moves nothing
