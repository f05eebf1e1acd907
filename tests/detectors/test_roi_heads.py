"""RoI heads: the plain ones are torchvision's to the bit; every loss, head and weight against plain loops."""

import math

import oracles
import pytest
import torch
from detector_cases import pixels, small
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops.poolers import initLevelMapper

from fedal_utils import detectors
from fedal_utils.config import ModelConfig
from fedal_utils.detectors import crowding
from fedal_utils.detectors.roi_heads import LEAST_DEVIATION, LocalisedRoIHeads
from fedal_utils.seeding import borrowed_global_rng, torch_rng_for

BOX_LOSSES, AUXILIARY = ("smooth_l1", "efficient_iou", "extended_iou"), ("none", "sides", "iou")
HUALE = {"box_loss": "efficient_iou", "box_weight": 5.0, "auxiliary_head": "sides", "emphasis": 1.0}
ARMS = [
    {"box_loss": box, "box_weight": 2.0, "auxiliary_head": h, "emphasis": 1.0} for box in BOX_LOSSES for h in AUXILIARY
]


def rcnn(arm=None, classes=3, seed=0, **options):
    return small("faster_rcnn", classes, seed, **{**(arm or {}), **options})


def sampled(seed=0):
    """Targets of three images, the last of them without an object, and proposals, half of them near an object."""
    rng = torch_rng_for(seed, "proposals")
    boxes = torch.tensor([[4.0, 4, 30, 34], [20, 10, 50, 40], [40, 44, 60, 62]])
    parts = (boxes, [1, 3, 2]), (boxes[1:], [2, 2]), (boxes[:0], [])
    targets = [{"boxes": box, "labels": torch.tensor(names, dtype=torch.int64)} for box, names in parts]
    near = boxes.repeat(10, 1) + torch.randn(30, 4, generator=rng) * 2
    low = torch.rand(30, 2, generator=rng) * 40
    far = torch.cat([low, low + 4 + torch.rand(30, 2, generator=rng) * 20], dim=1)
    return [crowded(t) for t in targets], [torch.cat([near, far]).clamp(0, 64) for _ in range(3)]


def crowded(target):
    boxes = target["boxes"][None]
    return target | {"density": crowding(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool))[0]}


def torchvisions(roi, score=0.05, top=100):
    """torchvision's own heads on the very same modules."""
    parts, sampler = (roi.box_roi_pool, roi.box_head, roi.box_predictor), roi.fg_bg_sampler
    return RoIHeads(*parts, 0.5, 0.5, sampler.batch_size_per_image, sampler.positive_fraction, None, score, 0.5, top)


@pytest.mark.parametrize("head", [False, True])
def test_plain_heads_have_torchvisions_loss_and_gradients_to_the_bit(head):
    model = rcnn(box_weight=5.0, auxiliary_weight=3.0, box_loss_head=head)
    targets, proposals = sampled()
    images, maps = model.pyramid(pixels(3))
    losses, gradients = [], []
    shared = [*model.backbone.parameters(), *model.roi.box_head.parameters(), *model.roi.box_predictor.parameters()]
    for roi in (model.roi, torchvisions(model.roi)):
        with borrowed_global_rng(torch_rng_for(0, "sample")):
            given = maps, list(proposals), images.image_sizes, targets
            parts = roi.loss(*given) if roi is model.roi else roi(*given)[1]
        losses.append(parts)
        gradients.append(torch.autograd.grad(sum(parts.values()), shared, retain_graph=True))
    ours, theirs = losses
    assert ours.keys() == {"classification", "regression"} | ({"box_loss_head"} if head else set())
    assert torch.equal(ours["classification"], theirs["loss_classifier"]) and ours["classification"] > 0
    assert torch.equal(ours["regression"], theirs["loss_box_reg"]) and ours["regression"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and any(g.any() for g in gradients[0])


def test_weights_do_not_depend_on_what_stands_beside_them():
    """Every part that two arms share has the same weights, and so has the box loss head beside each auxiliary one."""
    plain, seen = rcnn().state_dict(), {}
    for arm in ({}, *ARMS):
        for head in (False, True):
            state = rcnn(arm, box_loss_head=head).state_dict()
            assert all(torch.equal(state[k], plain[k]) for k in plain)
            extra = {k: v for k, v in state.items() if k not in plain}
            wanted = {"sides": {"roi.side_head"}, "iou": {"roi.iou_head"}}.get(arm.get("auxiliary_head"), set())
            assert {".".join(k.split(".")[:2]) for k in extra} == wanted | ({"roi.evidence_head"} if head else set())
            for key, value in extra.items():
                assert torch.equal(value, seen.setdefault(key, value)), key
    other = rcnn(HUALE, seed=1, box_loss_head=True).state_dict()
    assert not any(torch.equal(other[k], v) for k, v in seen.items() if "iou_head" not in k)


HIDDEN, CLASSES = 6, 3
TRUTHS = [  # of three images: two of the first's three boxes overlap
    [[4, 4, 30, 34], [20, 10, 50, 40], [52, 50, 62, 60]],
    [[8, 8, 28, 38], [40, 40, 60, 56]],
    [],
]
ROIS = [  # image, proposal, label, matched box
    *((0, *roi) for roi in [([6, 2, 32, 30], 1, 0), ([18, 12, 46, 44], 3, 1), ([50, 50, 62, 62], 2, 2)]),
    (0, [0, 40, 12, 60], 0, 0),
    *((1, *roi) for roi in [([10, 10, 30, 36], 2, 0), ([40, 38, 56, 58], 2, 1), ([2, 50, 10, 60], 0, 0)]),
    *((2, *roi) for roi in [([10, 10, 50, 50], 0, 0), ([5, 5, 9, 30], 0, 0)]),
]
CROWDS = []  # share of an image's other boxes that overlap each
for _boxes in TRUTHS:
    _overlaps = [[oracles.iou(a, b) > 0 for j, b in enumerate(_boxes) if j != i] for i, a in enumerate(_boxes)]
    CROWDS.append([sum(o) / max(1, len(o)) for o in _overlaps])


def heads(outputs=None, **arm):
    """Heads without a body, in float64; outputs: what the predictor is made to say."""
    with borrowed_global_rng(torch_rng_for(0, "heads")):
        parts = None, None, FastRCNNPredictor(HIDDEN, CLASSES + 1), 0.5, 0.5, 64, 0.25, None, 0.05, 0.5, 100
        roi = LocalisedRoIHeads(*parts, config=ModelConfig.of(**arm), hidden=HIDDEN).double()
    if outputs:
        roi.box_predictor.forward = lambda _: outputs
    return roi


def case(padding=0):
    """Made-up features, logits and deltas of nine RoIs, and (proposals, labels, goals, density[, valid])."""
    rng = torch_rng_for(0, "case")

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).requires_grad_()

    features, logits, regression = draw(9, HIDDEN), draw(9, CLASSES + 1, scale=2.0), draw(9, 4 * (CLASSES + 1))
    with torch.no_grad():
        regression[2, 4 * 2 : 4 * 3] = torch.tensor([-40.0, -30, 1, 0.5])  # image 0, RoI 2: far from its box
    rows = [
        (p, label, TRUTHS[i][m] if TRUTHS[i] else [0] * 4, CROWDS[i][m] if TRUTHS[i] else 0) for i, p, label, m in ROIS
    ]
    truth = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    truth[1] = truth[1].long()
    if not padding:
        return (features, logits, regression), truth
    spread = [3, 9, 0, 1, 9, 2, 4, 5, 6, 9, 7, 8]  # 9 = padding
    given = [torch.cat([t, t[:1].detach()])[spread] for t in (features, logits, regression)]
    pads = torch.tensor([[0.0, 0, 1, 1]]), torch.zeros(1), torch.zeros(1, 4), torch.zeros(1)
    truth = [torch.cat([t, pad.to(t.dtype)])[spread] for t, pad in zip(truth, pads, strict=True)]
    return given, [*truth, torch.tensor(spread) < 9]


def decoded(delta, proposal):
    """1506.01497 eq. 2 with torchvision's weights (10, 10, 5, 5)."""
    x1, y1, x2, y2 = proposal
    w, h = x2 - x1, y2 - y1
    cx, cy = x1 + w / 2 + delta[0] / 10 * w, y1 + h / 2 + delta[1] / 10 * h
    w, h = w * math.exp(delta[2] / 5), h * math.exp(delta[3] / 5)
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def encoded(box, proposal):
    (w, h), (pw, ph) = ((b[2] - b[0], b[3] - b[1]) for b in (box, proposal))
    x, y = ((box[i] + box[i + 2] - proposal[i] - proposal[i + 2]) / 2 for i in (0, 1))
    return [10 * x / pw, 10 * y / ph, 5 * math.log(w / pw), 5 * math.log(h / ph)]


def smooth_l1(z, beta):
    return z * z / (2 * beta) if abs(z) < beta else abs(z) - beta / 2


def linear(layer, x):
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in rows]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slowly(how, roi, features, logits, regression):
    """The parts of the loss with one RoI after another."""
    raw = [1 + how.emphasis * CROWDS[image][m] for image, _, label, m in ROIS if label]
    sums = dict.fromkeys(("classification", "regression", "sides", "iou", "box_loss_head"), 0.0)
    for (image, proposal, label, m), f, logit, delta in zip(
        ROIS, features.tolist(), logits.tolist(), regression.tolist(), strict=True
    ):
        cross_entropy = math.log(sum(map(math.exp, logit))) - logit[label]
        if not label:
            sums["classification"] += cross_entropy
            continue
        weight = (1 + how.emphasis * CROWDS[image][m]) / (sum(raw) / len(raw))
        sums["classification"] += weight * cross_entropy
        truth, own = TRUTHS[image][m], delta[4 * label : 4 * label + 4]
        box = decoded(own, proposal)
        if how.box_loss == "smooth_l1":
            each = sum(smooth_l1(a - b, 1 / 9) for a, b in zip(own, encoded(truth, proposal), strict=True))
        else:
            pair = (torch.tensor([one], dtype=torch.float64) for one in (box, truth))
            each = how.box_weight * getattr(detectors, f"{how.box_loss}_loss")(*pair).item()
        sums["regression"] += weight * each
        iou = oracles.iou(box, truth)
        if how.auxiliary_head == "sides":
            size = [proposal[2] - proposal[0], proposal[3] - proposal[1]] * 2
            for a, b, side, x in zip(truth, box, size, linear(roi.side_head, f), strict=True):
                s = LEAST_DEVIATION + (1 - LEAST_DEVIATION) * sigmoid(x)
                part = ((a - b) / side) ** 2 / (2 * s * s) + math.log(s)
                sums["sides"] += how.auxiliary_weight * weight * iou * part
        if how.auxiliary_head == "iou":
            p = sigmoid(linear(roi.iou_head, f)[0])
            sums["iou"] += how.auxiliary_weight * weight * (-iou * math.log(p) - (1 - iou) * math.log(1 - p))
        if how.box_loss_head:
            (out,) = linear(roi.evidence_head[2], [max(0.0, v) for v in linear(roi.evidence_head[0], f)])
            sums["box_loss_head"] += 5 / len(raw) * len(ROIS) * (math.log1p(math.exp(out)) - cross_entropy) ** 2
    wanted = {"classification", "regression", how.auxiliary_head, "box_loss_head" if how.box_loss_head else "none"}
    return {name: value / len(ROIS) for name, value in sums.items() if name in wanted}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("emphasis", [0.0, 1.5])
@pytest.mark.parametrize("auxiliary", AUXILIARY)
@pytest.mark.parametrize("box", BOX_LOSSES)
def test_every_part_equals_a_loop_over_rois(box, auxiliary, emphasis, padding):
    """With rows of padding and fixed shapes too; and the gradients of both ways are the same."""
    arm = {"box_loss": box, "auxiliary_head": auxiliary, "emphasis": emphasis, "box_loss_head": emphasis > 0}
    arm |= {"box_weight": 2.5, "auxiliary_weight": 0.3}
    leaves, truth = case()
    given, padded = case(padding) if padding else (leaves, truth)
    if padding:
        given = [t.detach().requires_grad_() for t in given]
    roi = heads(given[1:], **arm)
    parts = roi.losses_of(given[0], *padded)
    wanted = slowly(ModelConfig.of(**arm), roi, *leaves)
    assert parts.keys() == wanted.keys()
    for part, value in parts.items():
        assert value.item() == pytest.approx(wanted[part], rel=1e-9), part
    slopes = torch.autograd.grad(sum(parts.values()), given, allow_unused=True)
    plain = heads(leaves[1:], **arm).losses_of(leaves[0], *truth)
    spread = [2, 3, 5, 0, 6, 7, 8, 10, 11] if padding else list(range(9))
    wanted = torch.autograd.grad(sum(plain.values()), leaves, allow_unused=True)
    assert (slopes[0] is None) == (auxiliary == "none")  # nothing else but the predictor reads the features
    for slope, right in zip(slopes[auxiliary == "none" :], wanted[auxiliary == "none" :], strict=True):
        torch.testing.assert_close(slope[spread], right, rtol=1e-9, atol=1e-12)
        assert slope.abs().sum().item() == pytest.approx(right.abs().sum().item(), rel=1e-9)  # none on padding
    assert oracles.iou(decoded(leaves[2][2, 8:12].tolist(), ROIS[2][1]), TRUTHS[0][2]) == 0  # one is far off


@pytest.mark.parametrize("arm", [{}, HUALE, {"box_loss": "extended_iou", "auxiliary_head": "iou"}])
def test_a_box_loss_head_trains_itself_and_nothing_else(arm):
    model = rcnn(arm, box_loss_head=True)
    targets, proposals = sampled()
    images, maps = model.pyramid(pixels(3))
    with borrowed_global_rng(torch_rng_for(0, "sample")):
        parts = model.roi.loss(maps, proposals, images.image_sizes, targets)
    own = parts.pop("box_loss_head")
    own.backward(retain_graph=True)
    head = {name for name, _ in model.named_parameters() if "evidence_head" in name}
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == head
    model.zero_grad()
    sum(parts.values()).backward()
    assert not any(p.grad is not None for name, p in model.named_parameters() if name in head)


def test_an_unsure_box_ranks_below_a_sure_one_of_less_probability_by_hand():
    model = rcnn(auxiliary_head="iou", classes=1).eval()
    proposals = torch.tensor([[0.0, 0, 20, 20], [40, 40, 60, 60]])
    model.rpn.forward = lambda images, maps: ([proposals], {})
    model.roi.box_head.forward = lambda _: torch.eye(2, 128)
    with torch.no_grad():
        for layer in (model.roi.box_predictor.cls_score, model.roi.box_predictor.bbox_pred, model.roi.iou_head):
            layer.weight.zero_()
            layer.bias.zero_()
        model.roi.box_predictor.cls_score.weight[1, :2] = torch.tensor([0.8, 0.6]).logit()
        model.roi.iou_head.weight[0, :2] = torch.tensor([0.25, 0.81]).logit()
    found = model.predict(pixels(1), score_above=0.3)
    assert found.scores[0].tolist() == pytest.approx([0.6 * 0.9, 0.8 * 0.5], rel=1e-5)
    assert torch.allclose(found.boxes[0], proposals.flip(0), atol=1e-4)
    assert found.probs[0, :, 1].tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert found.extra["sides"][0].tolist() == [pytest.approx([v] * 4, rel=1e-5) for v in (0.81, 0.25)]
    assert model.predict(pixels(1), score_above=0.45).valid.tolist() == [[True]]


def test_the_level_of_a_detection_is_the_map_that_torchvision_pooled_it_from():
    model = rcnn(box_loss_head=True).eval()
    model.roi.box_roi_pool.canonical_scale = 16  # a box of 16 x 16 px belongs to map 4, as one of 224 x 224 otherwise
    with torch.no_grad():  # boxes are proposals
        model.roi.box_predictor.bbox_pred.weight.zero_()
        model.roi.box_predictor.bbox_pred.bias.zero_()
    found = model.predict(pixels(3), score_above=0.1, nms_iou=0.9, top=100)
    boxes, levels = found.boxes[found.valid], found.extra["level"][found.valid]
    wanted = initLevelMapper(3, 5, canonical_scale=16)([boxes])  # maps of stride 8, 16, 32
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    clear = ((side - 16).abs() > 0.1) & ((side - 32).abs() > 0.1)  # decoded boxes are rounded
    assert torch.equal(levels[clear], wanted[clear]) and clear.sum() > 50
    assert torch.equal(levels[clear], torch.where(side < 16, 0, torch.where(side < 32, 1, 2))[clear])
