"""RoI heads: the plain ones are torchvision's to the bit; every loss, companion and weight against plain loops."""

import math
from dataclasses import replace

import oracles
import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops.poolers import initLevelMapper

from fedal_utils import training
from fedal_utils.config import TrainingConfig
from fedal_utils.data import readers as data
from fedal_utils.detectors import base as detectors
from fedal_utils.detectors import roi_heads
from fedal_utils.detectors.roi_heads import BOX_LOSSES, COMPANIONS, LEAST_DEVIATION, Localisation, LocalisedRoIHeads
from fedal_utils.seeding import borrowed_global_rng, torch_rng_for
from fedal_utils.training import TrainingDiverged

HUALE = Localisation("efficient_iou", weight=5.0, companion="sides", companion_weight=0.2, emphasis=1.0)
ARMS = [Localisation(box, 2.0, companion=companion, emphasis=1.0) for box in BOX_LOSSES for companion in COMPANIONS]


def name_of(arm):
    return f"{arm.box}-{arm.companion}" if isinstance(arm, Localisation) else str(arm)


def small(localisation=None, evidence=False, classes=3, size=(64, 64), seed=0):
    rng = torch_rng_for(seed, "weights")
    more = {"localisation": localisation, "evidence": evidence}
    return detectors.build("faster_rcnn", "small", classes, size, rng, width=16, **more)


def pixels(count=2, side=64, seed=0):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch_rng_for(seed, "px"), dtype=torch.uint8)


def sharpened(model, factor=20.0):
    """The same model, so sure of its classes that some boxes pass any threshold."""
    with torch.no_grad():
        model.roi.box_predictor.cls_score.weight *= factor
    return model.eval()


def sampled(seed=0):
    """Targets of three images, the last of them without an object, and proposals, half of them near an object."""
    rng = torch_rng_for(seed, "proposals")
    boxes = torch.tensor([[4.0, 4, 30, 34], [20, 10, 50, 40], [40, 44, 60, 62]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 3, 2])},
        {"boxes": boxes[1:], "labels": torch.tensor([2, 2])},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    near = boxes.repeat(10, 1) + torch.randn(30, 4, generator=rng) * 2
    low = torch.rand(30, 2, generator=rng) * 40
    far = torch.cat([low, low + 4 + torch.rand(30, 2, generator=rng) * 20], dim=1)
    return targets, [torch.cat([near, far]).clamp(0, 64) for _ in range(3)]


# ------------------------------------------------------------------------------------------------- torchvision's, plain


def torchvisions(roi, score=0.05, top=100):
    """torchvision's own heads on the very same modules."""
    sampler = roi.fg_bg_sampler
    return RoIHeads(
        roi.box_roi_pool,
        roi.box_head,
        roi.box_predictor,
        0.5,
        0.5,
        sampler.batch_size_per_image,
        sampler.positive_fraction,
        None,
        score,
        0.5,
        top,
    )


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("localisation", [None, Localisation(weight=5.0, focal=0.5, companion_weight=3.0, power=2.0)])
def test_plain_heads_have_torchvisions_loss_and_gradients_to_the_bit(localisation, evidence):
    model = small(localisation, evidence)
    assert model.roi.localisation.plain
    targets, proposals = sampled()
    images, maps = model.pyramid(pixels(3))
    losses, gradients = [], []
    shared = [*model.backbone.parameters(), *model.roi.box_head.parameters(), *model.roi.box_predictor.parameters()]
    for roi in (model.roi, torchvisions(model.roi)):
        with borrowed_global_rng(torch_rng_for(0, "sample")):
            if roi is model.roi:
                parts = roi.loss(maps, list(proposals), images.image_sizes, targets)
            else:
                parts = roi(maps, list(proposals), images.image_sizes, targets)[1]
        losses.append(parts)
        gradients.append(torch.autograd.grad(sum(parts.values()), shared, retain_graph=True))
    ours, theirs = losses
    assert ours.keys() == {"classification", "regression"} | ({"evidence"} if evidence else set())
    assert torch.equal(ours["classification"], theirs["loss_classifier"]) and ours["classification"] > 0
    assert torch.equal(ours["regression"], theirs["loss_box_reg"]) and ours["regression"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and any(g.any() for g in gradients[0])


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("arm", [None, HUALE, Localisation(companion="iou", power=0.0)], ids=name_of)
def test_predict_gives_the_detections_of_torchvisions_own_heads(arm, evidence):
    model = sharpened(small(arm, evidence, seed=1), 4.0)
    found = model.predict(pixels(3), score_above=0.3, nms_iou=0.5, top=12)
    with torch.no_grad():
        images, maps = model.pyramid(pixels(3))
        proposals, _ = model.rpn(images, maps)
        wanted, _ = torchvisions(model.roi, 0.3, 12).eval()(maps, proposals, images.image_sizes)
    counts = [len(want["boxes"]) for want in wanted]
    assert found.valid.sum(1).tolist() == counts and max(counts) == 12 and len(proposals[0]) * 3 <= 400
    for i, (want, count) in enumerate(zip(wanted, counts, strict=True)):
        assert torch.equal(found.labels[i, :count], want["labels"])
        assert torch.equal(found.scores[i, :count], want["scores"])
        assert torch.equal(found.boxes[i, :count], want["boxes"])


def test_weights_do_not_depend_on_what_stands_beside_them():
    """Every part that two arms share has the same weights, and so has the evidence head beside each companion."""
    plain = small().state_dict()
    seen = {}
    for arm in (None, *ARMS):
        for evidence in (False, True):
            state = small(arm, evidence).state_dict()
            assert all(torch.equal(state[k], plain[k]) for k in plain)
            companion = "none" if arm is None else arm.companion
            heads = {"roi.side_head"} if companion == "sides" else {"roi.iou_head"} if companion == "iou" else set()
            heads |= {"roi.evidence_head"} if evidence else set()
            extra = {k: v for k, v in state.items() if k not in plain}
            assert {".".join(k.split(".")[:2]) for k in extra} == heads
            for key, value in extra.items():
                assert torch.equal(value, seen.setdefault(key, value)), key
    other = small(HUALE, True, seed=1).state_dict()
    assert not any(torch.equal(other[k], v) for k, v in seen.items() if "iou_head" not in k)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_training_with_an_evidence_head_is_training_without_it(clip):
    """Its gradient flows nowhere else, and a limit on gradients that it alone breaks slows nobody but it."""
    scenes = data.digit_scenes(4, 1, (64, 64), classes=3)[0]
    states = []
    for evidence in (False, True):
        model = small(HUALE, evidence)
        recipe = TrainingConfig.of(batch=4, flip=0.0, clip=clip)
        list(
            training.fit(
                model, scenes.images, scenes.labels, recipe, training.LocalTask(torch_rng_for(0, "fit"), iterations=3)
            )
        )
        states.append(model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    start = small(HUALE, True).state_dict()
    assert all(not torch.equal(v, start[k]) for k, v in states[1].items() if "evidence_head" in k)


# ------------------------------------------------------------------------------------------- each loss, by plain loops

HIDDEN, CLASSES = 6, 3
TRUTHS = [  # of three images: two of the first's three boxes overlap
    [[4, 4, 30, 34], [20, 10, 50, 40], [52, 50, 62, 60]],
    [[8, 8, 28, 38], [40, 40, 60, 56]],
    [],
]
ROIS = [  # proposal, label, matched box
    [([6, 2, 32, 30], 1, 0), ([18, 12, 46, 44], 3, 1), ([50, 50, 62, 62], 2, 2), ([0, 40, 12, 60], 0, 0)],
    [([10, 10, 30, 36], 2, 0), ([40, 38, 56, 58], 2, 1), ([2, 50, 10, 60], 0, 0)],
    [([10, 10, 50, 50], 0, 0), ([5, 5, 9, 30], 0, 0)],
]


def heads(localisation, evidence=False):
    """Heads without a body, in float64."""
    with borrowed_global_rng(torch_rng_for(0, "heads")):
        return LocalisedRoIHeads(
            None,
            None,
            FastRCNNPredictor(HIDDEN, CLASSES + 1),
            0.5,
            0.5,
            64,
            0.25,
            None,
            0.05,
            0.5,
            100,
            localisation=localisation,
            evidence=evidence,
            hidden=HIDDEN,
        ).double()


def case():
    """Made-up outputs of nine RoIs, and all else that `_localised` is given."""
    rng = torch_rng_for(0, "case")

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).requires_grad_()

    features, logits, regression = draw(9, HIDDEN), draw(9, CLASSES + 1, scale=2.0), draw(9, 4 * (CLASSES + 1))
    with torch.no_grad():
        regression[2, 4 * 2 : 4 * 3] = torch.tensor([-40.0, -30, 1, 0.5])  # image 0, RoI 2: far from its box
    proposals = [torch.tensor([p for p, *_ in rois], dtype=torch.float64) for rois in ROIS]
    labels = [torch.tensor([label for _, label, _ in rois]) for rois in ROIS]
    matched = [torch.tensor([m for *_, m in rois]) for rois in ROIS]
    truths = [torch.tensor(boxes, dtype=torch.float64).view(-1, 4) for boxes in TRUTHS]
    of_each = [t[m] if len(t) else torch.zeros(len(m), 4).double() for t, m in zip(truths, matched, strict=True)]
    deltas = list(heads(Localisation()).box_coder.encode(of_each, proposals))
    return features, logits, regression, proposals, matched, labels, deltas, [{"boxes": t} for t in truths]


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


def efficient(a, b, focal):
    cw, ch = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    x, y = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    w, h = ((a[i + 2] - a[i]) - (b[i + 2] - b[i]) for i in (0, 1))
    iou = oracles.iou(a, b)
    value = 1 - iou + (x * x + y * y) / (cw * cw + ch * ch) + (w / cw) ** 2 + (h / ch) ** 2
    return value * iou**focal


def extended(a, b):
    ax, ay = (max(a[i], b[i]) - min(a[i], b[i]) for i in (0, 1))
    ex, ey = (min(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1))
    if ex >= ax and ey >= ay:
        both = (ex - ax) * (ey - ay)
    elif ey >= ay:
        both = (ex - ax) * (ey + ay)
    elif ex >= ax:
        both = (ex + ax) * (ey - ay)
    else:
        both = 2 * (ex * ey - ax * ay)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return smooth_l1(1 - both / (sum(areas) - both), 0.1)


def linear(layer, x):
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slowly(how, roi, features, logits, regression):
    """The parts of `_localised` with one RoI after another."""
    crowds = []  # share of an image's other boxes that overlap each
    for boxes in TRUTHS:
        overlaps = [[oracles.iou(a, b) > 0 for j, b in enumerate(boxes) if j != i] for i, a in enumerate(boxes)]
        crowds.append([sum(o) / max(1, len(o)) for o in overlaps])
    rows = [(image, *one) for image, rois in enumerate(ROIS) for one in rois]
    raw = [1 + how.emphasis * crowds[image][m] for image, _, label, m in rows if label]
    sums = dict.fromkeys(("classification", "regression", "sides", "iou"), 0.0)
    lines = zip(rows, features.tolist(), logits.tolist(), regression.tolist(), strict=True)
    for (image, proposal, label, m), f, logit, delta in lines:
        cross_entropy = math.log(sum(map(math.exp, logit))) - logit[label]
        if not label:
            sums["classification"] += cross_entropy
            continue
        weight = (1 + how.emphasis * crowds[image][m]) / (sum(raw) / len(raw))
        sums["classification"] += weight * cross_entropy
        truth, own = TRUTHS[image][m], delta[4 * label : 4 * label + 4]
        box = decoded(own, proposal)
        if how.box == "smooth_l1":
            each = sum(smooth_l1(a - b, 1 / 9) for a, b in zip(own, encoded(truth, proposal), strict=True))
        elif how.box == "efficient_iou":
            each = efficient(box, truth, how.focal)
        else:
            each = extended(box, truth)
        sums["regression"] += weight * each * (1 if how.box == "smooth_l1" else how.weight)
        iou = oracles.iou(box, truth)
        if how.companion == "sides":
            size = [proposal[2] - proposal[0], proposal[3] - proposal[1]] * 2
            for a, b, side, x in zip(truth, box, size, linear(roi.side_head, f), strict=True):
                s = LEAST_DEVIATION + (1 - LEAST_DEVIATION) * sigmoid(x)
                part = ((a - b) / side) ** 2 / (2 * s * s) + math.log(s)
                sums["sides"] += how.companion_weight * weight * iou * part
        if how.companion == "iou":
            p = sigmoid(linear(roi.iou_head, f)[0])
            part = -iou * math.log(p) - (1 - iou) * math.log(1 - p)
            sums["iou"] += how.companion_weight * weight * part
    wanted = {"classification", "regression", how.companion} - {"none"}
    return {name: value / len(rows) for name, value in sums.items() if name in wanted}


@pytest.mark.parametrize("emphasis", [0.0, 1.5])
@pytest.mark.parametrize("companion", COMPANIONS)
@pytest.mark.parametrize("box", [*BOX_LOSSES, "focal"])
def test_every_part_equals_a_loop_over_rois(box, companion, emphasis):
    focal = 0.5 if box == "focal" else 0.0
    box = "efficient_iou" if box == "focal" else box
    how = Localisation(box, 2.5, focal, companion, 0.3, emphasis=emphasis)
    roi, given = heads(how), case()
    parts, wanted = roi._localised(*given), slowly(how, roi, *given[:3])
    assert parts.keys() == wanted.keys()
    for part, value in parts.items():
        assert value.item() == pytest.approx(wanted[part], rel=1e-9), part
    assert oracles.iou(decoded(given[2][2, 8:12].tolist(), ROIS[0][2][0]), TRUTHS[0][2]) == 0  # one is far off


@pytest.mark.parametrize("arm", ARMS, ids=name_of)
def test_emphasis_moves_weight_between_foreground_rois_and_none_to_the_background(arm):
    """In the case two of five objects are crowded; a loss that is the same for all foreground RoIs must not change."""
    given = list(case())
    roi = heads(arm)
    parts = roi._localised(*given)
    plain = heads(Localisation(arm.box, arm.weight, companion=arm.companion))._localised(*given)
    assert all(abs(parts[k].item() - plain[k].item()) > 1e-4 for k in parts)
    given[1] = torch.zeros_like(given[1])  # logits: every RoI's loss is ln 4
    assert roi._localised(*given)["classification"].item() == pytest.approx(math.log(4), rel=1e-12)


def test_emphasis_without_crowds_and_emphasis_of_strength_zero_are_torchvisions_loss():
    targets, proposals = sampled()
    apart = [{name: value[[0, -1]] if len(value) else value for name, value in t.items()} for t in targets]
    assert oracles.iou(*apart[0]["boxes"].tolist()) == 0 < oracles.iou(*targets[0]["boxes"][:2].tolist())
    model = small()
    images, maps = model.pyramid(pixels(3))

    def losses(truth, **options):
        heads = small(Localisation(**options)).roi
        with borrowed_global_rng(torch_rng_for(0, "sample")):
            parts = heads.loss(maps, list(proposals), images.image_sizes, truth)
        return [parts["classification"].item(), parts["regression"].item()]

    with borrowed_global_rng(torch_rng_for(0, "sample")):
        theirs = torchvisions(model.roi)(maps, list(proposals), images.image_sizes, apart)[1]
    wanted = [theirs["loss_classifier"].item(), theirs["loss_box_reg"].item()]
    assert losses(apart, emphasis=2.0) == pytest.approx(wanted, rel=1e-5)
    assert losses(targets, emphasis=2.0) != pytest.approx(losses(targets), rel=1e-3)
    classification, regression = losses(targets, box="extended_iou")  # emphasis 0
    thrice = losses(targets, box="extended_iou", weight=3.0)
    assert thrice == pytest.approx([classification, 3 * regression], rel=1e-5) and classification == losses(targets)[0]


# ------------------------------------------------------------------------------------------------------------ gradients


def test_the_evidence_is_five_times_the_squared_error_of_foreground_rois_by_a_loop():
    roi = heads(HUALE, evidence=True)
    features, logits, regression, proposals, matched, labels, deltas, targets = case()
    roi.select_training_samples = lambda *_: (proposals, matched, labels, deltas)
    roi.box_roi_pool, roi.box_head = lambda *_: features, nn.Identity()
    roi.box_predictor.forward = lambda f: (logits, regression)
    parts = roi.loss({}, None, None, targets)
    first, _, last = roi.evidence_head
    errors = []
    for f, logit, label in zip(features.tolist(), logits.tolist(), torch.cat(labels).tolist(), strict=True):
        if label:
            loss = math.log(sum(map(math.exp, logit))) - logit[label]
            (out,) = linear(last, [max(0.0, v) for v in linear(first, f)])
            errors.append((math.log1p(math.exp(out)) - loss) ** 2)
    assert len(errors) == 5 and parts["evidence"].item() == pytest.approx(5 * sum(errors) / 5, rel=1e-9)
    inputs = (features, logits, regression)
    assert torch.autograd.grad(parts["evidence"], inputs, retain_graph=True, allow_unused=True) == (None,) * 3
    weights = list(roi.evidence_head.parameters())
    assert all(g.any() for g in torch.autograd.grad(parts["evidence"], weights[2:], retain_graph=True))
    rest = sum(value for name, value in parts.items() if name != "evidence")
    assert torch.autograd.grad(rest, weights, retain_graph=True, allow_unused=True) == (None,) * len(weights)
    assert all(g.any() for g in torch.autograd.grad(rest, inputs))


@pytest.mark.parametrize("arm", [None, HUALE, Localisation("extended_iou", companion="iou")], ids=name_of)
def test_evidence_trains_its_own_head_and_nothing_else(arm):
    model = small(arm, evidence=True)
    targets, proposals = sampled()
    images, maps = model.pyramid(pixels(3))
    with borrowed_global_rng(torch_rng_for(0, "sample")):
        model.roi.loss(maps, proposals, images.image_sizes, targets)["evidence"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in model.named_parameters() if "evidence_head" in name}


def test_the_iou_that_a_head_learns_is_a_constant_and_a_deviation_is_learned_with_its_box():
    for companion, reaches in (("iou", False), ("sides", True)):
        given = case()
        part = heads(Localisation("efficient_iou", companion=companion))._localised(*given)[companion]
        of_features, of_regression = torch.autograd.grad(part, (given[0], given[2]), allow_unused=True)
        assert of_features.any() and (of_regression is not None) == reaches


def test_deviations_stay_between_the_least_and_one_and_their_confidence_between_zero_and_one():
    roi = heads(HUALE).float()
    features = torch.randn(500, HIDDEN, generator=torch_rng_for(0, "f")) * torch.logspace(-2, 8, 500)[:, None]
    s = roi.deviations(features).detach()
    assert s.shape == (500, 4) and s.min() == pytest.approx(LEAST_DEVIATION) and s.max() == 1
    sides = roi.extra(features, torch.zeros(500))["sides"]
    assert torch.equal(sides, 1 - s) and (sides >= 0).all() and (sides <= 1).all()


@pytest.mark.parametrize("arm", [None, *ARMS], ids=name_of)
def test_every_parameter_of_every_arm_gets_a_finite_gradient(arm):
    model = small(arm, evidence=True)
    scenes = data.digit_scenes(4, 1, (64, 64), classes=3)[0]
    t = scenes.labels
    sum(model.loss(scenes.images.pixels, t.boxes, t.classes, t.ignore, torch_rng_for(0, "loss")).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() or "evidence_head" in name, name  # a ReLU may be off everywhere


# ------------------------------------------------------------------------------------------------------- hard input


@pytest.mark.parametrize("arm", [None, *ARMS], ids=name_of)
@pytest.mark.parametrize("what", ["no column", "padding", "ignored", "one of two"])
def test_images_without_objects_give_finite_losses_and_teach_the_background(arm, what):
    model = small(arm, evidence=True, classes=1)
    boxes = torch.tensor([[[4.0, 4, 30, 34], [20, 10, 50, 40]]] * 2)
    classes, ignore = torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.bool)
    if what == "no column":
        boxes, classes, ignore = boxes[:, :0], classes[:, :0], ignore[:, :0]
    if what == "padding":
        boxes, classes = boxes * 0, classes * 0
    if what == "ignored":
        ignore = ~ignore
    if what == "one of two":
        boxes[0], classes[0] = 0, 0
    parts = model.loss(pixels(), boxes, classes, ignore, torch_rng_for(0, "loss"))
    assert all(torch.isfinite(part) for part in parts.values()) and parts["classification"] > 0
    empty = what != "one of two"
    for name in parts.keys() - {"objectness", "classification"}:
        assert (parts[name] == 0) == empty, name
    sum(parts.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.roi.box_predictor.cls_score.weight.grad.any()
    found = model.eval().predict(pixels(), score_above=0.0)
    assert found.valid.any() and found.probs.shape[-1] == 2 and found.labels.max() == 1


@pytest.mark.parametrize("arm", [None, *ARMS], ids=name_of)
@pytest.mark.parametrize("what", ["box", "weight", "weight without objects", "companion"])
def test_what_is_not_finite_stops_training_with_the_clients_name(arm, what):
    """An IoU loss would refuse such boxes in words that name neither client nor image, and no run could go on."""
    scenes = data.digit_scenes(4, 1, (64, 64), classes=3)[0]
    labels = replace(scenes.labels, boxes=scenes.labels.boxes.clone(), classes=scenes.labels.classes.clone())
    model = small(arm, evidence=True)
    if what == "box":
        labels.boxes[2, 0, 2] = float("nan")
        assert labels.classes[2, 0] > 0
    elif what == "companion":
        head = model.roi.side_head or model.roi.iou_head or model.roi.evidence_head[0]
        nn.init.constant_(head.weight, float("nan"))
    else:
        nn.init.constant_(model.rpn.head.cls_logits.weight, float("nan"))
        nn.init.constant_(model.roi.box_predictor.bbox_pred.weight, float("nan"))
        labels.classes[:] *= what == "weight"
    recipe = TrainingConfig.of(batch=4, flip=0.0)
    with pytest.raises(TrainingDiverged, match="client 07: loss is nan .* on images .*'train-00002'"):
        list(
            training.fit(
                model,
                scenes.images,
                labels,
                recipe,
                training.LocalTask(torch_rng_for(0, "fit"), iterations=1, client="07"),
            )
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": "giou"}, r"box loss must be one of \('smooth_l1', 'efficient_iou', 'extended_iou'\), got 'giou'"),
        ({"auxiliary_head": "both"}, r"companion must be one of \('none', 'sides', 'iou'\), got 'both'"),
        *(
            ({name: value}, f"{name} of the localisation must be finite and >= 0, got {value}")
            for name in ("weight", "focal", "companion_weight", "power", "emphasis")
            for value in (-0.5, math.inf, math.nan)
        ),
    ],
)
def test_a_localisation_that_makes_no_sense_is_an_error_that_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        Localisation(**options)


def test_only_torchvisions_settings_are_plain():
    assert Localisation().plain and Localisation(weight=5.0, focal=1.0, power=0.0, companion_weight=9.0).plain
    for options in ({"box": "extended_iou"}, {"box": "efficient_iou"}, {"auxiliary_head": "iou"}, {"emphasis": 0.1}):
        assert not Localisation(**options).plain
    with pytest.raises(ValueError, match="'ssd' has no RoI heads to give Localisation.*use 'faster_rcnn'"):
        detectors.build("ssd", "small", 3, (64, 64), torch_rng_for(0, "w"), localisation=HUALE)
    weights = Localisation(weight=5.0, companion_weight=0.2)  # of losses that nobody asks for
    assert detectors.build("ssd", "small", 3, (64, 64), torch_rng_for(0, "w"), localisation=weights)


# ----------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("companion", COMPANIONS)
def test_what_is_known_of_each_detection(companion, evidence):
    model = small(Localisation(companion=companion), evidence).eval()
    found = model.predict(pixels(3), score_above=0.1, top=20)
    names = {"level"} | ({"sides"} if companion != "none" else set()) | ({"predicted_loss"} if evidence else set())
    assert found.extra.keys() == names and found.valid.sum() > 20
    assert found.extra["level"].shape == found.labels.shape and found.extra["level"].dtype == torch.int64
    for name, value in found.extra.items():
        assert value.shape == (*found.labels.shape, *((4,) if name == "sides" else ()))
        assert not value[~found.valid].any()
    if companion != "none":
        sides = found.extra["sides"][found.valid]
        assert (sides > 0).all() and (sides < 1).all() and len(sides.unique()) > 20
        assert (sides == sides[:, :1]).all() == (companion == "iou")
    if evidence:
        losses = found.extra["predicted_loss"][found.valid]
        assert (losses > 0).all() and len(losses.unique()) > 5


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_with_an_iou_head_a_score_is_probability_times_a_power_of_the_iou(power):
    model = small(Localisation(companion="iou", power=power)).eval()
    nn.init.normal_(model.roi.iou_head.weight, std=3.0, generator=torch_rng_for(0, "iou"))
    found = model.predict(pixels(3), score_above=0.1, nms_iou=0.9, top=400)
    valid = found.valid
    probability = found.probs.gather(-1, found.labels[..., None])[..., 0]
    iou = found.extra["sides"][..., 0]
    assert torch.allclose(found.scores[valid], (probability * iou**power)[valid], rtol=1e-5)
    assert (found.scores[valid] > 0.1).all() and iou[valid].min() < 0.8 < iou[valid].max()
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()
    both = valid[:, 1:]
    assert (probability[:, :-1] < probability[:, 1:])[both].any()  # not the order of the probabilities
    again = small(Localisation(companion="iou", power=power)).eval()
    again.load_state_dict(model.state_dict())
    again.roi.localisation = Localisation(companion="iou", power=0.0)
    plain = again.predict(pixels(3), score_above=0.1, nms_iou=0.9, top=400)
    assert plain.valid.sum() > valid.sum()  # what the product puts below the threshold


def test_an_unsure_box_ranks_below_a_sure_one_of_less_probability_by_hand():
    model = small(Localisation(companion="iou", power=0.5), classes=1).eval()
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
    model = small(evidence=True).eval()
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
    assert set(levels[clear].tolist()) == {0, 1, 2}
    assert torch.equal(levels[clear], torch.where(side < 16, 0, torch.where(side < 32, 1, 2))[clear])


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    "arm",
    [None, HUALE, Localisation("extended_iou", 5.0, companion="iou", emphasis=1.0), Localisation(emphasis=1.0)],
    ids=name_of,
)
def test_a_short_training_lowers_the_loss(arm):
    """The detector's own; the evidence head chases a loss that falls, and rises for the RoIs that are still wrong."""
    scenes = data.digit_scenes(8, 1, (64, 64), digits_per_image=(1, 2), classes=3)[0]
    model = small(arm, evidence=True)
    recipe = TrainingConfig.of(batch=8, lr=2e-3, flip=0.0)
    rows = list(
        training.fit(
            model, scenes.images, scenes.labels, recipe, training.LocalTask(torch_rng_for(0, "fit"), iterations=50)
        )
    )
    first, last = (
        {name: sum(row[name] for row in part) / len(part) for name in rows[0]} for part in (rows[:5], rows[-5:])
    )
    own = [mean["loss"] - mean["evidence"] for mean in (first, last)]
    assert own[1] < 0.6 * own[0], own
    for name in ("objectness", "classification"):
        assert last[name] < 0.6 * first[name], name


def test_the_names_of_losses_and_companions_are_those_that_a_config_may_hold():
    assert (BOX_LOSSES, COMPANIONS) == (("smooth_l1", "efficient_iou", "extended_iou"), ("none", "sides", "iou"))
    assert roi_heads.Localisation().box == BOX_LOSSES[0] and roi_heads.Localisation().companion == COMPANIONS[0]
