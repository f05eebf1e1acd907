"""Detectors held to torchvision on equal inputs: targets, losses with gradients, post-processing, whole models."""

from collections import OrderedDict

import pytest
import torch
from oracles import matched_boxes
from torch import nn
from torchvision.models.detection import FasterRCNN, ssd300_vgg16
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.ssd import SSD as TorchSSD
from torchvision.ops import box_iou

from fedal_utils import metrics, training
from fedal_utils.config import Config, TrainingConfig
from fedal_utils.data import readers as data
from fedal_utils.data.boxes import clip_boxes
from fedal_utils.detectors import base as detectors
from fedal_utils.detectors.base import clone, match_anchors, select_detections, ssd_loss
from fedal_utils.federation import experiment as alfl
from fedal_utils.seeding import borrowed_global_rng, torch_rng_for

CODER = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))


def pixels(count, height, width, seed=0):
    return torch.randint(0, 256, (count, 3, height, width), generator=torch_rng_for(seed, "px"), dtype=torch.uint8)


def random_boxes(rng, *shape, side=64.0, least=2.0):
    low = torch.rand(*shape, 2, generator=rng) * (side - least)
    return torch.cat([low, low + least + torch.rand(*shape, 2, generator=rng) * (side - least - low)], dim=-1)


def random_targets(rng, images, columns=6, classes=3, side=64.0, some_ignored=False):
    """Padded boxes, classes and ignore with 0..columns real rows an image."""
    boxes = random_boxes(rng, images, columns, side=side)
    count = torch.randint(0, columns + 1, (images, 1), generator=rng)
    real = torch.arange(columns) < count
    numbers = torch.randint(1, classes + 1, (images, columns), generator=rng) * real
    ignore = (torch.rand(images, columns, generator=rng) < 0.3) & real & some_ignored
    return boxes * real[..., None], numbers, ignore


def as_list(boxes, classes):
    return [{"boxes": b[c > 0], "labels": c[c > 0]} for b, c in zip(boxes, classes, strict=True)]


def torch_matched(boxes, classes, anchors):
    out = []
    for target in as_list(boxes, classes):
        if len(target["boxes"]) == 0:  # as torchvision's SSD.forward does
            out.append(torch.full((len(anchors),), -1))
        else:
            out.append(SSDMatcher(0.5)(box_iou(target["boxes"], anchors)))
    return out


def small(detector="ssd", backbone="small", classes=3, size=(64, 64), seed=0, **options):
    options = {"fpn_channels": 16} | options
    return detectors.build(detector, backbone, classes, size, torch_rng_for(seed, "weights"), **options)


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("case", range(30))
def test_matching_equals_torchvisions_ssd_matcher(case):  # 30 x 4 images
    rng = torch_rng_for(case, "match")
    anchors = random_boxes(rng, 150)
    boxes, classes, ignore = random_targets(rng, 4)
    matched, overlap = match_anchors(boxes, classes, ignore, anchors)
    for i, want in enumerate(torch_matched(boxes, classes, anchors)):
        assert torch.equal(matched[i], want)
        real = classes[i] > 0
        best = box_iou(boxes[i][real], anchors).amax(0) if real.any() else torch.full((150,), -1.0)
        assert torch.allclose(overlap[i], best)


@pytest.mark.parametrize("case", range(10))
def test_matching_with_ignored_boxes_equals_the_oracle(case):
    rng = torch_rng_for(case, "ignored")
    anchors = random_boxes(rng, 60, side=32.0)
    boxes, classes, ignore = random_targets(rng, 4, side=32.0, some_ignored=True)
    matched, _ = match_anchors(boxes, classes, ignore, anchors, threshold=0.4)
    for i in range(4):
        real, ignored = (classes[i] > 0) & ~ignore[i], (classes[i] > 0) & ignore[i]
        want = matched_boxes(boxes[i].tolist(), real.tolist(), ignored.tolist(), anchors.tolist(), threshold=0.4)
        assert matched[i].tolist() == want


def test_of_two_boxes_that_share_their_best_anchor_the_later_one_owns_it():
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 4, 4]]])  # IoU 1 and 0.16 with anchor 0: the later one wins
    classes, ignore = torch.tensor([[1, 2]]), torch.zeros(1, 2, dtype=torch.bool)
    assert match_anchors(boxes, classes, ignore, anchors)[0].tolist() == [[1, -1]]
    assert torch_matched(boxes, classes, anchors)[0].tolist() == [1, -1]
    swapped = boxes.flip(1)
    assert match_anchors(swapped, classes, ignore, anchors)[0].tolist() == [[1, -1]]
    assert torch_matched(swapped, classes, anchors)[0].tolist() == [1, -1]


def test_ignored_boxes_by_hand():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 44, 10], [0, 0, 0, 0]]])
    classes = torch.tensor([[1, 1, 1, 0]])
    ignore = torch.tensor([[False, True, True, False]])
    # anchor 0 lies on a real box; 1 on an ignored one (IoU 1): not used; 2 on an ignored one by 0.4 only: background
    assert match_anchors(boxes, classes, ignore, anchors)[0].tolist() == [[0, -2, -1, -1]]
    # the same box both real and ignored: the real one keeps its anchors
    twice = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10]]])
    flags = torch.tensor([[True, False]])
    assert match_anchors(twice, torch.tensor([[1, 1]]), flags, anchors)[0].tolist() == [[1, -1, -1, -1]]
    # an ignored box owns no anchor, however bad its best one is
    lonely = torch.tensor([[[80.0, 0, 90, 10]]])
    assert match_anchors(lonely, torch.tensor([[1]]), torch.tensor([[True]]), anchors)[0].tolist() == [[-1] * 4]
    assert match_anchors(lonely, torch.tensor([[1]]), torch.tensor([[False]]), anchors)[0].tolist() == [[0, -1, -1, -1]]


def test_padding_in_the_middle_and_at_the_end_never_matters():
    rng = torch_rng_for(1, "padding")
    anchors, (boxes, classes, ignore) = random_boxes(rng, 90), random_targets(rng, 3)
    matched, _ = match_anchors(boxes, classes, ignore, anchors)
    spread = torch.tensor([6, 0, 1, 6, 2, 3, 4, 5])  # old row of each new one, 6 = padding
    pad = [torch.cat([t, torch.zeros_like(t[:, :1])], dim=1)[:, spread] for t in (boxes, classes, ignore)]
    again, _ = match_anchors(*pad, anchors)
    assert torch.equal(torch.where(again >= 0, spread[again], again), matched)


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("case", range(5))
def test_ssd_loss_equals_torchvisions_in_value_and_gradient(case):
    rng = torch_rng_for(case, "loss")
    anchors = random_boxes(rng, 400)
    boxes, classes, ignore = random_targets(rng, 3)
    assert (classes > 0).any()
    logits = torch.randn(3, 400, 4, generator=rng, requires_grad=True)
    deltas = torch.randn(3, 400, 4, generator=rng, requires_grad=True)
    matched, _ = match_anchors(boxes, classes, ignore, anchors)
    ours = ssd_loss(logits, deltas, matched, boxes, classes, anchors, CODER)
    ours_grad = torch.autograd.grad(sum(ours.values()), (logits, deltas))
    reference = TorchSSD(
        nn.Identity(), DefaultBoxGenerator([[2]]), (64, 64), 4, head=nn.Identity()
    )  # what compute_loss needs of it: coder and ratio
    theirs = reference.compute_loss(
        as_list(boxes, classes),
        {"bbox_regression": deltas, "cls_logits": logits},
        [anchors] * 3,
        torch_matched(boxes, classes, anchors),
    )
    theirs_grad = torch.autograd.grad(sum(theirs.values()), (logits, deltas))
    assert ours["classification"].item() == pytest.approx(theirs["classification"].item(), rel=1e-5)
    assert ours["regression"].item() == pytest.approx(theirs["bbox_regression"].item(), rel=1e-5)
    for a, b in zip(ours_grad, theirs_grad, strict=True):
        assert b.abs().max() > 0 and torch.allclose(a, b, atol=1e-6)


def test_ssd_loss_1512_02325_eq_1_by_hand():
    # Four anchors, one positive: its class loss, and the three hardest of the negatives; all logits equal except one
    # negative that is sure of background and therefore the easiest. N = 1.
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [80, 0, 90, 10]])
    boxes, classes = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[1]])
    logits = torch.zeros(1, 5, 2)
    logits[0, 3, 0] = 5.0
    deltas = torch.zeros(1, 5, 4)
    deltas[0, 0] = torch.tensor([0.5, 2.0, 0, 0])  # the target is 0: smooth L1 0.125 + 1.5
    deltas[0, 1:] = 9.0  # negatives do not count
    matched = torch.tensor([[0, -1, -1, -1, -1]])
    loss = ssd_loss(logits, deltas, matched, boxes, classes, anchors, CODER)
    assert loss["regression"].item() == pytest.approx(1.625)
    assert loss["classification"].item() == pytest.approx(4 * 0.693147, rel=1e-5)  # 1 positive + 3 hard negatives, ln 2
    # an anchor that is not used teaches nothing: two hard ones are left, and the sure one takes the third place
    loss = ssd_loss(logits, deltas, torch.tensor([[0, -2, -1, -1, -1]]), boxes, classes, anchors, CODER)
    sure = torch.log1p(torch.exp(torch.tensor(-5.0))).item()
    assert loss["classification"].item() == pytest.approx(3 * 0.693147 + sure, rel=1e-5)


def test_least_negatives_let_an_empty_image_teach_the_background():
    anchors = random_boxes(torch_rng_for(0, "a"), 20)
    empty = torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64)
    matched = torch.full((1, 20), -1)
    logits, deltas = torch.zeros(1, 20, 3), torch.zeros(1, 20, 4)
    assert ssd_loss(logits, deltas, matched, *empty, anchors, CODER)["classification"].item() == 0
    some = ssd_loss(logits, deltas, matched, *empty, anchors, CODER, least_negatives=8)
    assert some["classification"].item() == pytest.approx(8 * 1.098612, rel=1e-5)  # 8 x ln 3, over max(1, 0 positives)
    assert some["regression"].item() == 0


def loss_case(case, images=5, anchors=300):
    """Logits, deltas, matched, boxes, classes, anchors: image 0 has no object, 1 one, the last only an ignored one."""
    rng = torch_rng_for(case, "each")
    places = random_boxes(rng, anchors)
    boxes, classes, ignore = random_targets(rng, images, columns=3, some_ignored=True)
    classes[0], classes[1], classes[2], classes[-1] = 0, torch.tensor([2, 0, 0]), torch.tensor([3, 1, 2]), 0
    boxes[1:3], boxes[-1, 0] = random_boxes(rng, 2, 3), places[7]
    ignore[1:3], classes[-1, 0], ignore[-1, 0] = False, 1, True
    matched, _ = match_anchors(boxes, classes, ignore, places)
    logits = torch.randn(images, anchors, 4, generator=rng, requires_grad=True)
    deltas = torch.randn(images, anchors, 4, generator=rng, requires_grad=True)
    return logits, deltas, matched, boxes, classes, places


@pytest.mark.parametrize("least", [0, 8])
@pytest.mark.parametrize("case", range(4))
def test_the_loss_of_each_image_is_the_batch_loss_of_that_image_alone(case, least):
    *rows, anchors = loss_case(case)
    logits, deltas, matched, _, _ = rows
    positives = (matched >= 0).sum(1)
    assert positives[0] == positives[-1] == 0 < positives[1] and (matched[-1] == -2).any()
    each = ssd_loss(*rows, anchors, CODER, least_negatives=least, each=True)
    alone = [ssd_loss(*(t[i : i + 1] for t in rows), anchors, CODER, least_negatives=least) for i in range(5)]
    for name in ("classification", "regression"):
        wanted = torch.stack([one[name] for one in alone])
        torch.testing.assert_close(each[name], wanted, rtol=1e-6, atol=0)
        weights = torch.arange(1.0, 6.0)  # or a gradient of the wrong image would not be seen
        slopes = [
            torch.autograd.grad((x * weights).sum(), (logits, deltas), retain_graph=True, allow_unused=True)
            for x in (each[name], wanted)
        ]
        assert [g is None for g in slopes[0]] == [g is None for g in slopes[1]]
        for ours, theirs in zip(*slopes, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert (each["classification"] > 0).tolist() == [
        least > 0,
        True,
        True,
        bool(positives[3] > 0) or least > 0,
        least > 0,
    ]
    summed = ssd_loss(*rows, anchors, CODER, least_negatives=least, each=True, summed=True)
    batch = ssd_loss(*rows, anchors, CODER, least_negatives=least)
    for name, values in summed.items():
        torch.testing.assert_close(values, each[name] * positives.clamp(min=1), rtol=1e-6, atol=0)
        assert values.sum().item() / int(positives.sum()) == pytest.approx(batch[name].item(), rel=1e-5)


@pytest.mark.parametrize("case", range(3))
def test_the_loss_of_each_image_equals_torchvisions_for_that_image(case):
    rng = torch_rng_for(case, "loss")
    anchors = random_boxes(rng, 200)
    boxes, classes, ignore = random_targets(rng, 4, columns=3)
    logits, deltas = torch.randn(2, 4, 200, 4, generator=rng)
    matched, _ = match_anchors(boxes, classes, ignore, anchors)
    each = ssd_loss(logits, deltas, matched, boxes, classes, anchors, CODER, each=True)
    reference = TorchSSD(nn.Identity(), DefaultBoxGenerator([[2]]), (64, 64), 4, head=nn.Identity())
    for i, (target, own) in enumerate(
        zip(as_list(boxes, classes), torch_matched(boxes, classes, anchors), strict=True)
    ):
        outputs = {"bbox_regression": deltas[i : i + 1], "cls_logits": logits[i : i + 1]}
        wanted = reference.compute_loss([target], outputs, [anchors], [own])
        assert each["classification"][i].item() == pytest.approx(wanted["classification"].item(), rel=1e-5)
        assert each["regression"][i].item() == pytest.approx(wanted["bbox_regression"].item(), rel=1e-5)


def test_a_sum_over_the_batch_that_is_not_divided_is_refused():
    *rows, anchors = loss_case(0)
    with pytest.raises(ValueError, match="summed=True .* needs each=True"):
        ssd_loss(*rows, anchors, CODER, summed=True)


# ---------------------------------------------------------------------------------------------------- post-processing


def torch_ssd(score, nms_iou, top, candidates):
    return TorchSSD(
        nn.Identity(),
        DefaultBoxGenerator([[2]]),
        (64, 64),
        4,
        head=nn.Identity(),
        score_thresh=score,
        nms_thresh=nms_iou,
        detections_per_img=top,
        topk_candidates=candidates,
    )


def assert_same_detections(found, wanted, atol=1e-4):
    for i, want in enumerate(wanted):
        n = int(found.valid[i].sum())
        assert n == len(want["boxes"])
        assert found.valid[i, :n].all()
        assert torch.equal(found.labels[i, :n], want["labels"])
        assert torch.allclose(found.scores[i, :n], want["scores"], atol=1e-6)
        assert torch.allclose(found.boxes[i, :n], want["boxes"], atol=atol)


def assert_well_formed(found, columns):
    valid = found.valid
    assert found.boxes.shape == (*valid.shape, 4) and found.probs.shape == (*valid.shape, columns)
    assert found.labels.dtype == torch.int64 and found.labels.max() < columns
    assert torch.allclose(found.probs.sum(-1), valid.float(), atol=1e-5)  # one where valid, zero where padded
    for t in (found.boxes, found.probs, found.scores[..., None]):
        assert (t[~valid] == 0).all()
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()  # best first, padding last
    chosen = found.probs.gather(-1, found.labels[..., None])[..., 0]
    assert torch.equal(chosen[valid], found.scores[valid])


@pytest.mark.parametrize("case", range(6))
def test_ssd_post_processing_equals_torchvisions(case):
    rng = torch_rng_for(case, "post")
    anchors = random_boxes(rng, 120, least=6.0)
    logits, deltas = torch.randn(3, 120, 4, generator=rng) * 2, torch.randn(3, 120, 4, generator=rng)
    top = (100, 7)[case % 2]
    boxes = clip_boxes(CODER.decode_single(deltas.flatten(0, 1), anchors.repeat(3, 1)).view(3, 120, 4), (64, 64))
    found = select_detections(boxes, logits.softmax(-1), 0.2, 0.45, top, candidates=360)
    wanted = torch_ssd(0.2, 0.45, top, 360).postprocess_detections(
        {"bbox_regression": deltas, "cls_logits": logits}, [anchors] * 3, [(64, 64)] * 3
    )
    assert_same_detections(found, wanted)
    assert_well_formed(found, 4)
    assert int(found.valid.sum(1).max()) > 5 and found.valid.shape[1] <= top


@pytest.mark.parametrize("case", range(4))
def test_post_processing_with_a_box_per_class_equals_torchvisions_roi_heads(case):
    rng = torch_rng_for(case, "roi")
    proposals = [random_boxes(rng, count, least=6.0) for count in (40, 25)]
    logits, deltas = torch.randn(65, 4, generator=rng) * 2, torch.randn(65, 16, generator=rng)
    heads = RoIHeads(None, None, None, 0.5, 0.5, 64, 0.25, None, 0.1, 0.5, 30)
    boxes, scores, labels = heads.postprocess_detections(logits, deltas, proposals, [(64, 64)] * 2)
    wanted = [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(boxes, scores, labels, strict=True)]
    decoded = clip_boxes(heads.box_coder.decode(deltas, proposals), (64, 64))[:, 1:]
    padded = nn.utils.rnn.pad_sequence(list(decoded.split([40, 25])), batch_first=True)
    probs = nn.utils.rnn.pad_sequence(list(logits.softmax(-1).split([40, 25])), batch_first=True)
    found = select_detections(padded, probs, 0.1, 0.5, 30, candidates=400)
    assert_same_detections(found, wanted)
    assert_well_formed(found, 4)


def test_class_agnostic_selection_by_hand():
    # box 0 and 1 overlap by 0.8 and are of different best classes; box 2 is elsewhere; box 3 has no area
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 8], [30, 30, 40, 40], [5, 5, 5, 9]]])
    probs = torch.tensor([[[0.1, 0.5, 0.4], [0.2, 0.2, 0.6], [0.5, 0.2, 0.3], [0, 1.0, 0]]])
    both = select_detections(boxes, probs, 0.25, 0.45, 100, 100)
    # per class: class 1: box 0 (.5); class 2: box 1 (.6) puts box 0 (.4) out, box 2 (.3) stays
    assert both.labels.tolist() == [[2, 1, 2]]
    assert both.scores[0].tolist() == pytest.approx([0.6, 0.5, 0.3])
    one = select_detections(boxes, probs, 0.25, 0.45, 100, 100, class_agnostic=True)
    # a box counts once, with its best class, and suppresses across classes: box 1 (.6) puts box 0 out altogether
    assert one.labels.tolist() == [[2, 2]]
    assert one.boxes[0].tolist() == [[0, 0, 10, 8], [30, 30, 40, 40]]
    assert one.probs[0, 0].tolist() == pytest.approx([0.2, 0.2, 0.6])


def test_scores_of_their_own_take_the_place_of_the_probs():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 8], [30, 30, 40, 40]]])
    probs = torch.tensor([[[0.1, 0.5, 0.4], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]]])
    scores = torch.tensor([[[0.3, 0.7], [0.2, 0.65], [0.1, 0.8]]])
    found = select_detections(boxes, probs, 0.25, 0.45, 100, 100, scores=scores)
    # class 2: box 2 (.8), then box 0 (.7), which puts box 1 (.65) out; class 1: box 0 (.3), 0.2 and 0.1 are too little
    assert found.labels.tolist() == [[2, 2, 1]]
    assert found.scores[0].tolist() == pytest.approx([0.8, 0.7, 0.3])
    assert torch.equal(found.boxes[0], boxes[0, [2, 0, 0]]) and torch.equal(found.probs[0], probs[0, [2, 0, 0]])
    one = select_detections(boxes, probs, 0.25, 0.45, 100, 100, class_agnostic=True, scores=scores)
    assert one.labels.tolist() == [[2, 2]] and one.scores[0].tolist() == pytest.approx([0.8, 0.7])
    same = select_detections(boxes, probs, 0.15, 0.45, 100, 100, scores=probs[..., 1:])
    plain = select_detections(boxes, probs, 0.15, 0.45, 100, 100)
    assert torch.equal(same.scores, plain.scores) and torch.equal(same.labels, plain.labels)
    with pytest.raises(ValueError, match="not finite"):
        select_detections(boxes, probs, 0.1, 0.45, 100, 100, scores=scores / 0)


def test_the_threshold_is_exclusive_and_no_detection_is_an_empty_row():
    boxes, probs = torch.tensor([[[0.0, 0, 10, 10]]] * 2), torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])
    found = select_detections(boxes, probs, 0.5, 0.45, 100, 100)
    assert found.valid.tolist() == [[False], [True]]
    assert_well_formed(found, 2)
    nothing = select_detections(boxes, probs, 0.9, 0.45, 100, 100)
    assert nothing.boxes.shape == (2, 0, 4) and nothing.probs.shape == (2, 0, 2)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("own_box", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
def test_what_is_known_of_a_box_follows_it(classes, own_box, agnostic):
    """Threshold, the best 60 pairs, NMS and the best 9 each take some away; what is left says where it is from."""
    rng = torch_rng_for(0, "extra")
    shape = (3, 40, classes) if own_box else (3, 40)
    boxes = random_boxes(rng, *shape, least=12.0)
    probs = (torch.randn(3, 40, classes + 1, generator=rng) * 2).softmax(-1)
    probs[1, 5:] = torch.eye(classes + 1)[0]  # image 1 has little to show: its row is padded
    pairs = torch.arange(1, 40 * classes + 1).expand(3, -1)  # (B, A * C): 1 + C * box + class
    rows = torch.arange(1, 41).expand(3, -1)  # (B, A): 1 + box
    extra = {"row": rows, "point": torch.stack([rows + 0.25, -rows.float()], dim=-1), "pair": pairs}
    extra["table"] = rows[..., None, None] + torch.arange(6.0).view(2, 3)  # (B, A, 2, 3)
    found = select_detections(boxes, probs, 0.2, 0.3, 9, 60, agnostic, extra=extra)
    alive = [int(n) for n in found.valid.sum(1)]
    assert max(alive) == 9 > alive[1] > 0
    assert {k: v.shape for k, v in found.extra.items()} == {
        "row": (3, 9),
        "point": (3, 9, 2),
        "pair": (3, 9),
        "table": (3, 9, 2, 3),
    }
    assert found.extra["row"].dtype == torch.int64 and found.extra["point"].dtype == torch.float32
    for image, count in enumerate(alive):
        for place in range(9):
            known = {name: value[image, place] for name, value in found.extra.items()}
            if place >= count:
                assert not any(value.any() for value in known.values())
                continue
            row, label = int(known["row"]) - 1, int(found.labels[image, place])
            wanted = boxes[image, row, label - 1] if own_box else boxes[image, row]
            assert torch.equal(found.boxes[image, place], wanted)
            assert torch.equal(found.probs[image, place], probs[image, row])
            assert known["point"].tolist() == [row + 1.25, -row - 1]
            assert torch.equal(known["table"], row + 1 + torch.arange(6.0).view(2, 3))
            assert int(known["pair"]) == 1 + classes * row + label - 1
    plain = select_detections(boxes, probs, 0.2, 0.3, 9, 60, agnostic)
    assert plain.extra == {} and torch.equal(plain.boxes, found.boxes)
    nothing = select_detections(boxes, probs, 0.9999, 0.3, 9, 60, agnostic, extra=extra)
    assert nothing.extra["point"].shape == (3, 0, 2) and nothing.extra["row"].shape == (3, 0)


def test_images_of_a_batch_do_not_suppress_each_other():
    rng = torch_rng_for(0, "apart")
    boxes, probs = random_boxes(rng, 5, 40), torch.randn(5, 40, 4, generator=rng).softmax(-1)
    for agnostic in (False, True):
        together = select_detections(boxes, probs, 0.3, 0.45, 100, 200, agnostic)
        for i in range(5):
            alone = select_detections(boxes[i : i + 1], probs[i : i + 1], 0.3, 0.45, 100, 200, agnostic)
            n = alone.valid.sum()
            assert n == together.valid[i].sum() > 0
            assert torch.equal(together.boxes[i, :n], alone.boxes[0, :n])
            assert torch.equal(together.labels[i, :n], alone.labels[0, :n])


def test_what_is_not_finite_does_not_vanish_in_silence():
    boxes, probs = torch.tensor([[[0.0, 0, 10, 10]] * 3] * 2), torch.full((2, 3, 2), 0.5)
    for where in (boxes, probs):
        broken = [t.clone() for t in (boxes, probs)]
        broken[0 if where is boxes else 1][1, 2, 1] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            select_detections(*broken, 0.1, 0.45, 100, 100)
    model = small().eval()
    with torch.no_grad():
        model.head.classification_head.module_list[1].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.predict(pixels(1, 64, 64))


# ------------------------------------------------------------------------------------------------ whole models, parity


def test_ssd300_vgg16_equals_torchvisions_with_the_same_weights():
    ours = detectors.build("ssd", "vgg16", 2, (300, 300), torch_rng_for(0, "weights"), pretrained=False)
    with borrowed_global_rng(torch_rng_for(1, "weights")):
        theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=3, detections_per_img=100)
    renamed = {k.replace("backbone.", "backbone.net.", 1): v for k, v in theirs.state_dict().items()}
    for key in renamed:  # or the scores of an untrained VGG are all one, and tie
        if key.startswith("head.classification_head"):
            renamed[key] = renamed[key] * 0.05
    theirs.load_state_dict(dict(zip(theirs.state_dict(), renamed.values(), strict=True)))
    ours.load_state_dict(renamed, strict=True)
    x = pixels(1, 300, 300)
    boxes = torch.tensor([[[20.0, 30, 120, 160], [150, 140, 290, 280], [0, 0, 0, 0]]])
    classes, ignore = torch.tensor([[1, 2, 0]]), torch.zeros(1, 3, dtype=torch.bool)
    with torch.no_grad():
        loss = ours.train().loss(x, boxes, classes, ignore)
        wanted = theirs.train()(list(x / 255), as_list(boxes, classes))
    assert loss["classification"].item() == pytest.approx(wanted["classification"].item(), rel=1e-3)
    assert loss["regression"].item() == pytest.approx(wanted["bbox_regression"].item(), rel=1e-3)
    with torch.no_grad():
        images, _ = theirs.transform(list(x / 255))
        anchors = theirs.anchor_generator(images, list(theirs.backbone(images.tensors).values()))[0]
        # 400 candidates of all classes here, of each class there: a threshold that 60 pairs pass makes them the same
        best = ours.eval()(x)[0].softmax(-1)[..., 1:].flatten().sort(descending=True).values
        theirs.score_thresh = float(best[59:61].mean())
        found, wanted = ours.predict(x, score_above=theirs.score_thresh), theirs.eval()(list(x / 255))
    assert torch.equal(ours.anchors, anchors) and len(anchors) == 8732
    maps = [torch.zeros(1, 1, side, side) for side in (38, 19, 10, 5, 3, 1)]  # 1512.02325: 4 or 6 boxes a cell
    assert ours._levels(maps)[0].bincount().tolist() == [4 * 38**2, 6 * 19**2, 6 * 10**2, 6 * 5**2, 4 * 3**2, 4]
    assert 5 < len(wanted[0]["boxes"]) <= 60
    assert_same_detections(found, wanted, atol=1e-2)


class Parts(nn.Module):
    """Backbone and neck of one of ours, as torchvision's FasterRCNN wants them: pixels in, a dict of maps out."""

    def __init__(self, model):
        super().__init__()
        self.body, self.neck = model.backbone, model.neck
        self.out_channels = 16

    def forward(self, x):
        return OrderedDict((str(i), m) for i, m in enumerate(self.neck(self.body(x))))


def test_small_faster_rcnn_equals_a_torchvision_one_of_the_same_parts():
    ours = small("faster_rcnn", size=(64, 96))
    theirs = FasterRCNN(
        Parts(ours),
        min_size=64,
        max_size=96,
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
        rpn_anchor_generator=ours.rpn.anchor_generator,
        rpn_head=ours.rpn.head,
        rpn_pre_nms_top_n_train=ours.rpn._pre_nms_top_n["training"],
        rpn_pre_nms_top_n_test=ours.rpn._pre_nms_top_n["testing"],
        rpn_post_nms_top_n_train=ours.rpn._post_nms_top_n["training"],
        rpn_post_nms_top_n_test=ours.rpn._post_nms_top_n["testing"],
        rpn_batch_size_per_image=ours.rpn.fg_bg_sampler.batch_size_per_image,
        box_roi_pool=ours.roi.box_roi_pool,
        box_head=ours.roi.box_head,
        box_predictor=ours.roi.box_predictor,
        box_batch_size_per_image=ours.roi.fg_bg_sampler.batch_size_per_image,
        box_score_thresh=0.01,
        box_nms_thresh=0.5,
    )
    rng = torch_rng_for(3, "targets")
    x = pixels(2, 64, 96)
    boxes, classes, ignore = random_targets(rng, 2, side=60.0)
    classes[:, 0], boxes[:, 0] = 1, torch.tensor([5.0, 5, 40, 30])
    loss = ours.train().loss(x, boxes, classes, ignore, torch_rng_for(0, "loss"))
    theirs.train()
    images, targets = theirs.transform(list(x.float()), as_list(boxes, classes))  # it draws a size: before we lend ours
    maps = theirs.backbone(images.tensors)
    with borrowed_global_rng(torch_rng_for(0, "loss")):
        proposals, wanted = theirs.rpn(images, maps, targets)
        wanted |= theirs.roi_heads(maps, proposals, images.image_sizes, targets)[1]
    names = {
        "objectness": "loss_objectness",
        "proposal_regression": "loss_rpn_box_reg",
        "classification": "loss_classifier",
        "regression": "loss_box_reg",
    }
    for ours_name, theirs_name in names.items():
        assert loss[ours_name].item() == pytest.approx(wanted[theirs_name].item(), rel=1e-4) and wanted[theirs_name] > 0
    assert loss.keys() == names.keys()
    again = ours.loss(x, boxes, classes, ignore, torch_rng_for(1, "loss"))
    assert again["classification"].item() != loss["classification"].item()  # the generator decides the sample
    found = ours.eval().predict(x, score_above=0.01)
    with torch.no_grad():
        wanted = theirs.eval()(list(x.float()))
    assert len(wanted[0]["boxes"]) > 20
    assert_same_detections(found, wanted, atol=1e-3)
    assert_well_formed(found, 4)


def test_full_faster_rcnn_r50_fpn_has_torchvisions_shapes_and_a_finite_loss():
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    ours = small("faster_rcnn", "resnet50", size=(64, 96), pretrained=False)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    assert [v.shape for v in ours.state_dict().values()] == [v.shape for v in theirs.state_dict().values()]
    boxes, classes, ignore = torch.tensor([[[5.0, 5, 45, 50]]]), torch.tensor([[2]]), torch.zeros(1, 1).bool()
    loss = ours.loss(pixels(1, 64, 96), boxes, classes, ignore, torch_rng_for(0, "loss"))
    assert all(torch.isfinite(part) and part >= 0 for part in loss.values())
    assert_well_formed(ours.eval().predict(pixels(1, 64, 96), score_above=0.0), 4)


# ------------------------------------------------------------------------------------------------- what all must share


KINDS = [("ssd", "small"), ("faster_rcnn", "small")]


@pytest.mark.parametrize(("detector", "backbone"), KINDS)
def test_detections_are_well_formed_inside_the_image_and_do_not_depend_on_the_batch(detector, backbone):
    model = small(detector, backbone, size=(64, 96)).eval()
    x = pixels(3, 64, 96)
    found = model.predict(x, score_above=0.02, top=20)
    assert_well_formed(found, 4)
    assert found.valid.sum() > 10
    assert (found.boxes >= 0).all() and (found.boxes[..., 0::2] <= 96).all() and (found.boxes[..., 1::2] <= 64).all()
    alone = model.predict(x[1:2], score_above=0.02, top=20)
    n = int(alone.valid.sum())
    assert n == found.valid[1].sum() and torch.allclose(alone.boxes[0, :n], found.boxes[1, :n], atol=1e-3)
    cut, above = model.predict(x, score_above=0.1, top=20), found.above(0.1)
    assert torch.equal(cut.valid.sum(1), above.valid.sum(1))


@pytest.mark.parametrize(("detector", "backbone"), KINDS)
@pytest.mark.parametrize("columns", [0, 3])
def test_images_without_objects_give_a_finite_loss_and_gradients(detector, backbone, columns):
    model = small(detector, backbone)
    empty = torch.zeros(2, columns, 4), torch.zeros(2, columns, dtype=torch.int64), torch.zeros(2, columns).bool()
    loss = sum(model.loss(pixels(2, 64, 64), *empty, torch_rng_for(0, "loss")).values())
    loss.backward()
    assert torch.isfinite(loss) and loss > 0  # the background is taught
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads) and max(g.abs().max() for g in grads) > 0


@pytest.mark.parametrize(("detector", "backbone"), KINDS)
@pytest.mark.parametrize("classes", [1, 5])
def test_every_parameter_gets_a_finite_gradient(detector, backbone, classes):
    model = small(detector, backbone, classes=classes)
    rng = torch_rng_for(0, "targets")
    boxes, numbers, ignore = random_targets(rng, 4, classes=classes, some_ignored=True)
    numbers[:, 0], boxes[:, 0], ignore[:, 0] = classes, torch.tensor([4.0, 4, 40, 40]), False
    sum(model.loss(pixels(4, 64, 64), boxes, numbers, ignore, torch_rng_for(0, "loss")).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("detector", "backbone"), KINDS)
def test_ignored_boxes_and_padding_have_no_say_in_the_targets(detector, backbone):
    model = small(detector, backbone)
    boxes, numbers, ignore = random_targets(torch_rng_for(0, "targets"), 2, columns=4)
    pad = [torch.cat([t, torch.zeros_like(t)], dim=1) for t in (boxes, numbers, ignore)]
    a = model.loss(pixels(2, 64, 64), boxes, numbers, ignore, torch_rng_for(0, "loss"))
    b = model.loss(pixels(2, 64, 64), *pad, torch_rng_for(0, "loss"))
    assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    if detector == "faster_rcnn":  # an ignored box is left out altogether
        pad[0][:, -1], pad[1][:, -1], pad[2][:, -1] = torch.tensor([3.0, 3, 50, 50]), 1, True
        c = model.loss(pixels(2, 64, 64), *pad, torch_rng_for(0, "loss"))
        assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in c.items()}


def test_weights_come_from_the_generator_and_the_global_one_is_left_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, b, c = small(seed=0).state_dict(), small(seed=0).state_dict(), small(seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("detector", ["ssd", "faster_rcnn"])
def test_a_frozen_backbone_never_changes_and_clones_share_it(detector):
    pytest.importorskip("timm")
    model = small(detector, "lite0", frozen=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = clone(model)
    assert twin.backbone is model.backbone and twin.frozen
    twin.train()
    assert twin.training and twin.neck.training and not any(m.training for m in twin.backbone.modules())
    boxes, numbers, ignore = random_targets(torch_rng_for(0, "targets"), 2)
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.1)
    sum(twin.loss(pixels(2, 64, 64), boxes, numbers, ignore, torch_rng_for(0, "loss")).values()).backward()
    optimiser.step()
    after = twin.state_dict()
    frozen = [k for k in after if k.startswith("backbone.")]
    assert len(frozen) > 100 and all(torch.equal(after[k], before[k]) for k in frozen)  # BatchNorm statistics too
    assert any(not torch.equal(after[k], before[k]) for k in after if k not in frozen)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the original did not move
    assert set(model.exchanged()) == set(before) - set(frozen)
    maps = tuple(m.half() for m in model.features(pixels(2, 64, 64)))
    assert not any(m.requires_grad for m in maps)
    cached, plain = (model.eval().predict(inputs, score_above=0.02) for inputs in (maps, pixels(2, 64, 64)))
    assert torch.allclose(cached.scores[:, 0], plain.scores[:, 0], atol=1e-2)


def test_a_clone_of_a_trained_backbone_shares_nothing():
    model = small()
    twin = clone(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 1
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert set(model.exchanged()) == set(model.state_dict())


def test_bfloat16_leaves_proposals_and_anchors_exact():
    model = small("faster_rcnn", size=(320, 640))
    kinds = []
    model.roi.box_roi_pool.register_forward_pre_hook(lambda _, args: kinds.extend(p.dtype for p in args[1]))
    boxes, numbers = torch.tensor([[[401.0, 203, 451, 277]]]), torch.tensor([[1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(pixels(1, 320, 640), boxes, numbers, torch.zeros(1, 1).bool(), torch_rng_for(0, "loss"))
    assert kinds == [torch.float32] and all(torch.isfinite(part) for part in loss.values())


# ------------------------------------------------------------------------------------------------------------ anchors


def test_anchors_sit_in_the_middle_of_their_cells_and_follow_the_head():
    anchors = detectors.grid_anchors((64, 96), (8, 16), ((16.0, 20.0), (32.0, 40.0)), (1.0,))
    assert anchors.shape == (8 * 12 * 2 + 4 * 6 * 2, 4)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres[:4].tolist() == [[4, 4], [4, 4], [12, 4], [12, 4]]  # cell after cell, two anchors each
    assert centres[8 * 12 * 2].tolist() == [8, 8]
    sides = anchors[:, 2:] - anchors[:, :2]
    assert sides[:2].tolist() == [[16, 16], [20, 20]] and sides[-1].tolist() == [40, 40]
    model = small(size=(64, 96)).eval()
    logits, deltas = model(pixels(1, 64, 96))
    assert logits.shape[1] == deltas.shape[1] == len(model.anchors)
    assert detectors.octave_sizes(16, 2) == ((16, pytest.approx(22.627417)), (32, pytest.approx(45.254834)))


# --------------------------------------------------------------------------------------- SSD: maps and predicted loss


class Numbered(nn.Module):
    """In the place of an evidence head of one map: the number of each anchor, counted as the class head counts."""

    def __init__(self, first, cell):
        super().__init__()
        self.first, self.cell = first, cell

    def forward(self, m):
        height, width = m.shape[-2:]
        number = self.first + torch.arange(height * width * self.cell).view(height, width, self.cell)
        return number.permute(2, 0, 1).expand(len(m), -1, -1, -1).float()


@pytest.mark.parametrize("ratios", [(1.0,), (0.7, 1.4)])
def test_an_ssd_knows_the_map_and_the_predicted_loss_of_each_anchor(ratios):
    model = small(size=(64, 96), anchor_side=8.0, anchor_ratios=ratios, evidence=True).eval()
    cell = 2 * len(ratios)
    counts = [cell * (64 // stride) * (96 // stride) for stride in (8, 16, 32)]
    firsts = [100, 100 + counts[0], 100 + counts[0] + counts[1]]  # softplus(x) = x to the last bit from 100 on
    model.evidence_head = nn.ModuleList(Numbered(first, cell) for first in firsts)
    for layer in model.head.regression_head.module_list:  # boxes are anchors
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    found = model.predict(pixels(2, 64, 96), score_above=0.0, nms_iou=0.99, top=10_000, candidates=10_000)
    assert found.extra.keys() == {"level", "predicted_loss"} and found.valid.all(1).any()
    number = found.extra["predicted_loss"][found.valid].long() - 100
    assert len(number.unique()) > 0.8 * sum(counts)
    assert torch.allclose(found.boxes[found.valid], clip_boxes(model.anchors[number], (64, 96)), atol=1e-4)
    wanted = torch.bucketize(number, torch.tensor(counts).cumsum(0), right=True)
    assert torch.equal(found.extra["level"][found.valid], wanted) and set(wanted.tolist()) == {0, 1, 2}
    assert small(size=(64, 96)).eval().predict(pixels(1, 64, 96), score_above=0.02).extra.keys() == {"level"}


def test_an_evidence_head_changes_nothing_else_of_an_ssd():
    plain, model = small(), small(evidence=True)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    assert {k.split(".")[0] for k in state.keys() - plain.state_dict().keys()} == {"evidence_head"}
    targets = random_targets(torch_rng_for(0, "targets"), 2, some_ignored=True)
    targets[0][0, :3], targets[1][0, :3], targets[2][0, :3] = model.anchors[[40, 270, -2]], 1, False  # one on each map
    wanted = plain.loss(pixels(2, 64, 64), *targets)
    parts = model.loss(pixels(2, 64, 64), *targets)
    assert parts.keys() == {*wanted, "evidence"} and all(torch.equal(parts[k], wanted[k]) for k in wanted)
    parts["evidence"].backward(retain_graph=True)
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("evidence_head")}
    model.zero_grad()
    sum(parts[k] for k in wanted).backward()
    assert all((p.grad is None) == name.startswith("evidence_head") for name, p in model.named_parameters())


def test_an_ssds_evidence_is_five_times_the_mean_squared_error_of_positive_anchors_by_a_loop():
    model = small(evidence=True)
    boxes, classes, ignore = random_targets(torch_rng_for(2, "targets"), 3, some_ignored=True)
    boxes[0, :3], classes[0, :3], ignore[0, :3] = model.anchors[[40, 270, -2]], torch.tensor([1, 2, 3]), False
    with torch.no_grad():
        evidence = model.loss(pixels(3, 64, 64), boxes, classes, ignore)["evidence"].item()
        logits = model(pixels(3, 64, 64))[0]
        predicted = model._predicted_loss(model._maps(pixels(3, 64, 64)))
    matched, _ = match_anchors(boxes, classes, ignore, model.anchors)
    errors = []
    for i, row in enumerate(matched.tolist()):
        for a, at in enumerate(row):
            if at >= 0:
                loss = -logits[i, a].log_softmax(0)[classes[i, at]].item()
                errors.append((predicted[i, a].item() - loss) ** 2)
    assert len(errors) > 10 and evidence == pytest.approx(5 * sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize("columns", [0, 3])
def test_an_ssds_evidence_of_images_without_objects_is_zero_and_has_finite_gradients(columns):
    model = small(evidence=True)
    empty = torch.zeros(2, columns, 4), torch.zeros(2, columns, dtype=torch.int64), torch.zeros(2, columns).bool()
    parts = model.loss(pixels(2, 64, 64), *empty)
    assert parts["evidence"] == 0 and parts["classification"] > 0
    sum(parts.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# ------------------------------------------------------------------------------------- SSD: the loss of each image


def few_targets():
    """Targets of four images with 0, 1, 3 objects and with an ignored box beside a real one."""
    boxes, classes, ignore = torch.zeros(4, 3, 4), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3).bool()
    boxes[1, 0], classes[1, 0] = torch.tensor([4.0, 6, 30, 40]), 2
    boxes[2] = torch.tensor([[2.0, 3, 20, 25], [30, 28, 62, 60], [40, 2, 58, 18]])
    classes[2] = torch.tensor([1, 3, 2])
    boxes[3, :2], classes[3, :2] = torch.tensor([[8.0, 8, 40, 40], [30, 30, 62, 62]]), 1
    ignore[3, 1] = True
    return boxes, classes, ignore


def test_an_ssds_loss_of_each_image_is_its_loss_of_a_batch_of_that_image():
    model, x, targets = small(), pixels(4, 64, 64), few_targets()
    each, summed = model.image_losses(x, *targets), model.image_losses(x, *targets, summed=True)
    assert each.keys() == summed.keys() == {"classification", "regression"}
    positives = (match_anchors(*targets, model.anchors)[0] >= 0).sum(1)
    for i in range(4):
        alone = model.loss(x[i : i + 1], *(t[i : i + 1] for t in targets))
        for name, value in alone.items():
            assert each[name][i].item() == pytest.approx(value.item(), rel=1e-5)
            assert summed[name][i].item() == pytest.approx(value.item() * max(1, int(positives[i])), rel=1e-5)
    assert positives[0] == 0 < positives[1:].min() and positives.max() > 1
    without = model.image_losses(x, *(t[:, :0] for t in targets))  # no column of boxes at all
    assert without["classification"].shape == (4,) and not without["regression"].any()
    assert without["classification"][0].item() == pytest.approx(each["classification"][0].item(), rel=1e-6)


@pytest.mark.parametrize("backbone", ["small", "lite0"])
def test_the_gradient_of_an_image_loss_reaches_float_pixels(backbone):
    if backbone == "lite0":
        pytest.importorskip("timm")
    model, targets = small(backbone=backbone, frozen=backbone == "lite0").eval(), few_targets()
    x = pixels(4, 64, 64)
    plain = model.image_losses(x, *targets)
    point = x.float().requires_grad_()
    found = model.image_losses(point, *targets)
    assert all(torch.allclose(found[name], plain[name], rtol=1e-5) for name in plain)
    slope = torch.autograd.grad(found["classification"].sum() + found["regression"].sum(), point)[0]
    assert torch.isfinite(slope).all() and slope.flatten(1).any(1).all()
    # the loss falls against it, by as much as it says: from 1e-3 of a grey value on the mean pixel to the other side
    step = 1e-3 * slope / slope.abs().mean((1, 2, 3), keepdim=True)
    with torch.no_grad():
        up, down = (sum(model.image_losses(x + side * step, *targets).values()) for side in (1, -1))
    assert torch.allclose(up - down, 2 * (slope * step).sum((1, 2, 3)), rtol=0.1)
    only = torch.autograd.grad(model.image_losses(point, *targets)["classification"][2], point)[0].flatten(1).any(1)
    assert only.tolist() == [False, False, True, False]
    assert all(p.grad is None for p in model.backbone.parameters())
    maps = model.features(x)
    assert all(m.requires_grad == (not model.frozen) for m in maps)  # uint8 pixels: a frozen backbone keeps no graph
    assert all(m.requires_grad == (not model.frozen) for m in model.features(x.float()))


# --------------------------------------------------------------------------------------------------- SSD: learned loss


@pytest.mark.parametrize("evidence", [False, True])
def test_a_loss_head_changes_nothing_else_of_an_ssd(evidence):
    plain, model = small(evidence=evidence), small(evidence=evidence, learned_loss=True)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    assert {k.split(".")[0] for k in state.keys() - plain.state_dict().keys()} == {"loss_head"}
    wanted = plain.loss(pixels(4, 64, 64), *few_targets())
    parts = model.loss(pixels(4, 64, 64), *few_targets())
    assert parts.keys() == {*wanted, "ranking"} and all(torch.equal(parts[k], wanted[k]) for k in wanted)
    parts["ranking"].backward(retain_graph=True)
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # not joint.bias: a common shift of all predictions changes no order
    assert moved == {k for k in state if k.startswith("loss_head") and k != "loss_head.joint.bias"}
    model.zero_grad()
    sum(parts[k] for k in wanted).backward()
    assert all((p.grad is None) == name.startswith("loss_head") for name, p in model.named_parameters())


def test_the_ranking_of_an_ssd_is_that_of_its_predictions_by_a_loop():
    model, x, targets = small(learned_loss=True), pixels(4, 64, 64), few_targets()
    with torch.no_grad():
        found = model.loss(x, *targets)["ranking"].item()
        maps = model.neck(model.backbone(x))
        predicted = []
        for image in range(4):
            seen = []
            for layer, m in zip(model.loss_head.each, maps, strict=True):
                seen += (layer.weight @ m[image].mean((1, 2)) + layer.bias).clamp(min=0).tolist()
            joint = model.loss_head.joint
            predicted.append(
                sum(w * s for w, s in zip(joint.weight[0].tolist(), seen, strict=True)) + joint.bias.item()
            )
        alone = [sum(model.loss(x[i : i + 1], *(t[i : i + 1] for t in targets)).values()).item() for i in range(4)]
    assert len(seen) == 3 * 32
    assert model.predicted_loss(x).tolist() == pytest.approx(predicted, rel=1e-4, abs=1e-5)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    terms = [max(0, 1 - (1 if alone[i] > alone[j] else -1) * (predicted[i] - predicted[j])) for i, j in pairs]
    assert found == pytest.approx(sum(terms) / 6, rel=1e-4) and len(set(terms)) == 6
    assert not model.predicted_loss(x).requires_grad


def test_a_loss_head_ranks_cached_maps_as_their_pixels_and_lone_images_without_nan():
    pytest.importorskip("timm")
    model, x = small(backbone="lite0", frozen=True, learned_loss=True).eval(), pixels(3, 64, 64)
    assert torch.equal(model.predicted_loss(model.features(x)), model.predicted_loss(x))
    parts = model.loss(x[:1], *(t[:1] for t in few_targets()))
    assert parts["ranking"] == 0
    sum(parts.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_who_has_no_loss_head_says_so():
    with pytest.raises(ValueError, match="no head that learns an image's loss: build it with learned_loss=True"):
        small().eval().predicted_loss(pixels(1, 64, 64))
    with pytest.raises(ValueError, match="'faster_rcnn' has no head that learns an image's loss: use 'ssd'"):
        small("faster_rcnn", learned_loss=True)
    for detector in ("yolo", "faster_rcnn"):
        with pytest.raises(ValueError, match=f"'{detector}' has no head that learns an image's loss: use 'ssd'"):
            alfl.new_detector(Config.of(detector=detector, image_loss_head=True), 3, torch_rng_for(0, "weights"))
    for wanted in (False, True):
        model = alfl.new_detector(Config.of(detector="ssd", image_loss_head=wanted), 3, torch_rng_for(0, "weights"))
        assert (model.loss_head is not None) == wanted


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detector": "yolo"}, r"detector must be one of \('ssd', 'faster_rcnn'\), got 'yolo'"),
        ({"backbone": "vit"}, "backbone must be one of .* got 'vit'"),
        ({"classes": 0}, "at least one class, got 0"),
        ({"size": (64, 80)}, r"multiples of 32, got \(64, 80\)"),
        ({"frozen": True}, "frozen, it would stay random"),
        ({"backbone": "vgg16"}, r"needs image_size \(300, 300\), got \(64, 64\)"),
        ({"backbone": "resnet50"}, "'ssd' takes backbone .* got 'resnet50'"),
        ({"backbone": "vgg16", "detector": "faster_rcnn"}, "'faster_rcnn' takes backbone .* got 'vgg16'"),
        ({"norm": "layer"}, "norm must be 'group' or 'batch', got 'layer'"),
    ],
)
def test_what_cannot_be_built_is_an_error_that_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_what_does_not_fit_the_detector_is_an_error():
    with pytest.raises(ValueError, match=r"built for \(64, 64\) images, got \(64, 96\)"):
        small().eval().predict(pixels(1, 64, 96))
    with pytest.raises(ValueError, match="cached features belong to a frozen backbone"):
        small().eval().predict((torch.zeros(1, 64, 8, 8),))
    rcnn = small("faster_rcnn")
    with pytest.raises(ValueError, match="predict needs eval mode"):
        rcnn.train().predict(pixels(1, 64, 64))
    with pytest.raises(ValueError, match="its loss needs a generator"):
        rcnn.loss(pixels(1, 64, 64), torch.zeros(1, 1, 4), torch.zeros(1, 1).long(), torch.zeros(1, 1).bool())


# ----------------------------------------------------------------------------------------------------------- learning


def test_a_small_ssd_learns_eight_images_by_heart():
    train, _ = data.digit_scenes(8, 1, (64, 64), digits_per_image=(1, 2), classes=3)
    model = detectors.build("ssd", "small", 3, (64, 64), torch_rng_for(0, "weights"))
    recipe = TrainingConfig.of(batch=8, lr=2e-3, flip=0.0, schedule="cosine")
    untrained = metrics.evaluate(training.predict(model, train.images), train.labels, train.class_names)["ap50"]
    for _ in training.fit(
        model, train.images, train.labels, recipe, training.LocalTask(torch_rng_for(0, "fit"), iterations=60)
    ):
        pass
    found = training.predict(model, train.images)
    ap50 = metrics.evaluate(found, train.labels, train.class_names)["ap50"]
    assert untrained < 0.1 and ap50 > 0.8


def test_the_loss_of_a_small_faster_rcnn_falls():
    train, _ = data.digit_scenes(8, 1, (64, 64), digits_per_image=(1, 2), classes=3)
    model = detectors.build("faster_rcnn", "small", 3, (64, 64), torch_rng_for(0, "weights"), width=32)
    recipe = TrainingConfig.of(batch=8, lr=2e-3, flip=0.0)
    rows = list(
        training.fit(
            model, train.images, train.labels, recipe, training.LocalTask(torch_rng_for(0, "fit"), iterations=40)
        )
    )
    first, last = rows[0], rows[-1]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["objectness"] < first["objectness"]
