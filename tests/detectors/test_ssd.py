"""SSD held to torchvision on equal inputs: targets, losses with gradients, the whole model; its two extra heads."""

import pytest
import torch
from detector_cases import as_list, pixels, random_boxes, random_targets, same_detections, small, targets
from oracles import matched_boxes
from torch import nn
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD as TorchSSD
from torchvision.ops import box_iou

from fedal_utils.detectors.ssd import anchor_losses, match_anchors, multibox, octave_sizes
from fedal_utils.seeding import torch_rng_for

REFERENCE = TorchSSD(nn.Identity(), DefaultBoxGenerator([[2]]), (64, 64), 4, head=nn.Identity())  # its matcher and loss


def torch_matched(boxes, classes, anchors):
    out = []
    for target in as_list(boxes, classes):
        if len(target["boxes"]) == 0:  # as torchvision's SSD.forward does
            out.append(torch.full((len(anchors),), -1))
        else:
            out.append(REFERENCE.proposal_matcher(box_iou(target["boxes"], anchors)))
    return out


@pytest.mark.parametrize("case", range(30))
def test_matching_equals_torchvisions_ssd_matcher(case):  # 30 x 4 images
    rng = torch_rng_for(case, "match")
    anchors, (boxes, classes, ignore) = random_boxes(rng, 150), random_targets(rng, 4)
    matched = match_anchors(boxes, classes, ignore, anchors)
    assert torch.equal(matched, torch.stack(torch_matched(boxes, classes, anchors)))


@pytest.mark.parametrize("case", range(10))
def test_matching_with_ignored_boxes_equals_the_oracle(case):
    rng = torch_rng_for(case, "ignored")
    anchors = random_boxes(rng, 60, side=32.0)
    boxes, classes, ignore = random_targets(rng, 4, side=32.0, some_ignored=True)
    matched = match_anchors(boxes, classes, ignore, anchors, threshold=0.4)
    for i in range(4):
        real, ignored = (classes[i] > 0) & ~ignore[i], (classes[i] > 0) & ignore[i]
        want = matched_boxes(boxes[i].tolist(), real.tolist(), ignored.tolist(), anchors.tolist(), threshold=0.4)
        assert matched[i].tolist() == want


@pytest.mark.parametrize("case", range(5))
def test_the_loss_equals_torchvisions_in_value_and_gradient_of_the_batch_and_of_each_image(case):
    rng = torch_rng_for(case, "loss")
    anchors, (boxes, classes, ignore) = random_boxes(rng, 400), random_targets(rng, 3)
    logits = torch.randn(3, 400, 4, generator=rng, requires_grad=True)
    deltas = torch.randn(3, 400, 4, generator=rng, requires_grad=True)
    matched = match_anchors(boxes, classes, ignore, anchors)
    each = anchor_losses(logits, deltas, boxes, classes, matched, anchors)

    def theirs(rows):
        outputs = {"bbox_regression": deltas[rows], "cls_logits": logits[rows]}
        wanted, own = as_list(boxes[rows], classes[rows]), torch_matched(boxes[rows], classes[rows], anchors)
        found = REFERENCE.compute_loss(wanted, outputs, [anchors] * len(wanted), own)
        return {"classification": found["classification"], "regression": found["bbox_regression"]}

    ours, wanted = multibox(*each, (0, 1)), theirs(slice(None))
    slopes = [torch.autograd.grad(sum(p.values()), (logits, deltas), retain_graph=True) for p in (ours, wanted)]
    for a, b in zip(*slopes, strict=True):
        assert b.abs().max() > 0 and torch.allclose(a, b, atol=1e-6)
    for name, value in wanted.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-5)
        alone = [theirs(slice(i, i + 1))[name].item() for i in range(3)]
        assert multibox(*each, (1,))[name].tolist() == pytest.approx(alone, rel=1e-5)


def test_the_loss_1512_02325_eq_1_by_hand():
    # Four anchors, one positive: its class loss, and the three hardest of the negatives; all logits equal except one
    # negative that is sure of background and therefore the easiest. N = 1.
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [80, 0, 90, 10]])
    boxes, classes = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[1]])
    logits, deltas = torch.zeros(1, 5, 2), torch.full((1, 5, 4), 9.0)  # negatives' deltas do not count
    logits[0, 3, 0] = 5.0
    deltas[0, 0] = torch.tensor([0.5, 2.0, 0, 0])  # the target is 0: smooth L1 0.125 + 1.5

    def loss(*matched):
        return multibox(*anchor_losses(logits, deltas, boxes, classes, torch.tensor([matched]), anchors), (0, 1))

    assert loss(0, -1, -1, -1, -1)["regression"].item() == pytest.approx(1.625)
    # 1 positive + 3 hard negatives, ln 2 each
    assert loss(0, -1, -1, -1, -1)["classification"].item() == pytest.approx(4 * 0.693147, rel=1e-5)
    # an anchor that is not used teaches nothing: two hard ones are left, and the sure one takes the third place
    sure = torch.log1p(torch.exp(torch.tensor(-5.0))).item()
    assert loss(0, -2, -1, -1, -1)["classification"].item() == pytest.approx(3 * 0.693147 + sure, rel=1e-5)


def test_ssd300_vgg16_equals_torchvisions_with_the_same_weights():
    ours = small(backbone="vgg16", classes=2, image_size=(300, 300))
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=3, detections_per_img=100)
    state = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    for key, value in ours.state_dict().items():
        # or the scores of an untrained VGG are all one, and tie
        state[key] = value * (0.05 if key.startswith("head.classification_head") else 1)
    ours.load_state_dict(state)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
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
        maps = list(theirs.backbone(images.tensors).values())
        anchors = theirs.anchor_generator(images, maps)[0]
        # 400 candidates of all classes here, of each class there: a threshold that 60 pairs pass makes them the same
        best = ours.eval()(x)[1].softmax(-1)[..., 1:].flatten().sort(descending=True).values
        theirs.score_thresh = float(best[59:61].mean())
        found, wanted = ours.predict(x, score_above=theirs.score_thresh), theirs.eval()(list(x / 255))
    assert torch.equal(ours.anchors, anchors) and len(anchors) == 8732
    assert [m.shape[-1] for m in maps] == [38, 19, 10, 5, 3, 1]  # 1512.02325: 4 or 6 boxes a cell
    assert ours.levels.bincount().tolist() == [4 * 38**2, 6 * 19**2, 6 * 10**2, 6 * 5**2, 4 * 3**2, 4]
    assert 5 < len(wanted[0]["boxes"]) <= 60
    same_detections(found, wanted, atol=1e-2)


def test_anchors_sit_in_the_middle_of_their_cells_and_follow_the_head():
    model = small(image_size=(64, 96), anchor_side=8.0, anchor_ratios=(1.0,)).eval()
    anchors, first = model.anchors, 8 * 12 * 2
    assert anchors.shape == (8 * 12 * 2 + 4 * 6 * 2 + 2 * 3 * 2, 4)
    assert model.levels.tolist() == [0] * 8 * 12 * 2 + [1] * 4 * 6 * 2 + [2] * 2 * 3 * 2
    centres, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    assert centres[:4].tolist() == [[4, 4], [4, 4], [12, 4], [12, 4]]  # cell after cell, two anchors each
    assert centres[first].tolist() == [8, 8] and centres[-1].tolist() == [80, 48]
    assert sides[:2].tolist() == [[8, 8], [12, 12]] and sides[first].tolist() == [16, 16]  # 8 sqrt 2, to whole pixels
    assert octave_sizes(16, 2) == ((16, pytest.approx(22.627417)), (32, pytest.approx(45.254834)))
    _, logits, deltas = model(pixels(1, 64, 96))
    assert logits.shape[1] == deltas.shape[1] == len(anchors)


def few_targets():
    """Targets of four images with 0, 1, 3 objects and with an ignored box beside a real one."""
    three = [((2, 3, 20, 25), 1, False), ((30, 28, 62, 60), 3, False), ((40, 2, 58, 18), 2, False)]
    beside = [((8, 8, 40, 40), 1, False), ((30, 30, 62, 62), 1, True)]
    return targets([[], [((4, 6, 30, 40), 2, False)], three, beside])


@pytest.mark.parametrize(
    ("option", "head", "part", "still"),
    [
        ("box_loss_head", "evidence_head", "box_loss_head", set()),
        # a common shift of all predictions changes no order
        ("image_loss_head", "loss_head", "ranking", {"loss_head.joint.bias"}),
    ],
)
def test_a_head_changes_nothing_else_of_an_ssd_and_trains_itself_alone(option, head, part, still):
    plain, model, x = small(), small(**{option: True}), pixels(4)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    assert {k.split(".")[0] for k in state.keys() - plain.state_dict().keys()} == {head}
    wanted, parts = plain.loss(x, *few_targets()), model.loss(x, *few_targets())
    assert parts.keys() == {*wanted, part} and all(torch.equal(parts[k], wanted[k]) for k in wanted)
    parts[part].backward(retain_graph=True)
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved <= {k for k in state if k.startswith(head)} - still and len(moved) >= 2
    model.zero_grad()
    sum(parts[k] for k in wanted).backward()
    assert all((p.grad is None) == name.startswith(head) for name, p in model.named_parameters())
    empty = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3).bool()
    assert model.loss(x[:2], *empty)[part] >= 0


def test_the_box_loss_head_learns_five_times_the_mean_squared_error_of_positive_anchors_by_a_loop():
    model, x = small(box_loss_head=True), pixels(3)
    boxes, classes, ignore = random_targets(torch_rng_for(2, "targets"), 3, some_ignored=True)
    boxes[0, :3], classes[0, :3], ignore[0, :3] = model.anchors[[40, 270, -2]], torch.tensor([1, 2, 3]), False
    with torch.no_grad():
        part = model.loss(x, boxes, classes, ignore)["box_loss_head"].item()
        logits, predicted = model(x)[1], model.eval().raw_detections(x).extra["predicted_loss"]
    errors = []
    for i, row in enumerate(match_anchors(boxes, classes, ignore, model.anchors).tolist()):
        for a, at in enumerate(row):
            if at >= 0:
                loss = -logits[i, a].log_softmax(0)[classes[i, at]].item()
                errors.append((predicted[i, a].item() - loss) ** 2)
    assert len(errors) > 10 and part == pytest.approx(5 * sum(errors) / len(errors), rel=1e-4)


def test_the_ranking_is_that_of_predictions_by_a_loop_against_each_images_own_loss():
    model, x, few = small(image_loss_head=True), pixels(4), few_targets()
    with torch.no_grad():
        found = model.loss(x, *few)["ranking"].item()
        maps = model.neck(model.backbone(x))
        predicted = []
        for image in range(4):
            means = [m[image].mean((1, 2)) for m in maps]
            layers = zip(model.loss_head.each, means, strict=True)
            hidden = torch.cat([layer(mean).clamp(min=0) for layer, mean in layers])
            predicted.append(model.loss_head.joint(hidden).item())
        ones = (model.loss(x[i : i + 1], *(t[i : i + 1] for t in few)) for i in range(4))
        apart = [{k: v.item() for k, v in one.items()} for one in ones]
        each, summed = model.image_losses(x, *few), model.image_losses(x, *few, summed=True)
    assert hidden.shape == (3 * 32,) and not model.predicted_loss(x).requires_grad
    assert model.predicted_loss(x).tolist() == pytest.approx(predicted, rel=1e-4, abs=1e-5)
    positives = (match_anchors(*few, model.anchors) >= 0).sum(1).tolist()
    assert positives[0] == 0 < min(positives[1:])
    for i, one in enumerate(apart):
        assert one["ranking"] == 0  # an image alone
        for name, value in each.items():
            assert value[i].item() == pytest.approx(one[name], rel=1e-5)
            assert summed[name][i].item() == pytest.approx(one[name] * max(1, positives[i]), rel=1e-5)
    alone = [one["classification"] + one["regression"] for one in apart]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    terms = [max(0, 1 - (1 if alone[i] > alone[j] else -1) * (predicted[i] - predicted[j])) for i, j in pairs]
    assert found == pytest.approx(sum(terms) / 6, rel=1e-4) and len(set(terms)) == 6
