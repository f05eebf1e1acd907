"""Faster R-CNN: torchvision's to the digit; its step of fixed shapes is the same where all is sampled."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from detector_cases import NoWaiting, as_list, pixels, random_boxes, random_targets, same_detections, small
from torch import nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.ops import MultiScaleRoIAlign

from fedal_utils.detectors import faster_rcnn as proposals
from fedal_utils.seeding import borrowed_global_rng, torch_rng_for

HUALE = dict(box_loss="efficient_iou", box_weight=5.0, auxiliary_head="sides", auxiliary_weight=0.2, emphasis=1)
NAMES = dict(objectness="loss_objectness", proposal_regression="loss_rpn_box_reg")
NAMES |= dict(classification="loss_classifier", regression="loss_box_reg")


class Parts(nn.Module):
    """Backbone and neck of one of ours, as torchvision's FasterRCNN wants them: pixels in, a dict of maps out."""

    def __init__(self, model):
        super().__init__()
        self.body, self.neck = model.backbone, model.neck
        self.out_channels = 64

    def forward(self, x):
        return OrderedDict((str(i), m) for i, m in enumerate(self.neck(self.body(x))))


def torchvisions(ours):
    """A FasterRCNN of torchvision of the same parts."""
    heads = {"box_roi_pool": ours.roi.box_roi_pool, "box_head": ours.roi.box_head}
    heads |= {"rpn_anchor_generator": ours.rpn.anchor_generator, "rpn_head": ours.rpn.head}
    limits = dict(rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=50, rpn_pre_nms_top_n_test=200)
    limits |= dict(rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=32, box_batch_size_per_image=32)
    sizes = dict(min_size=64, max_size=96, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    limits |= dict(box_predictor=ours.roi.box_predictor, box_score_thresh=0.01, box_nms_thresh=0.5)
    return FasterRCNN(Parts(ours), **sizes, **heads, **limits)


def test_a_small_one_equals_a_torchvision_one_of_the_same_parts():
    ours = small("faster_rcnn", image_size=(64, 96))
    theirs, x = torchvisions(ours), pixels(2, 64, 96)
    boxes, classes, ignore = random_targets(torch_rng_for(3, "targets"), 2, side=60.0)
    classes[:, 0], boxes[:, 0] = 1, torch.tensor([5.0, 5, 40, 30])
    loss = ours.train().loss(x, boxes, classes, ignore, torch_rng_for(0, "loss"))
    images, targets = theirs.train().transform(list(x.float()), as_list(boxes, classes))
    maps = theirs.backbone(images.tensors)
    with borrowed_global_rng(torch_rng_for(0, "loss")):
        found, wanted = theirs.rpn(images, maps, targets)
        wanted |= theirs.roi_heads(maps, found, images.image_sizes, targets)[1]
    assert loss.keys() == NAMES.keys()
    for name, value in loss.items():
        assert value.item() == pytest.approx(wanted[NAMES[name]].item(), rel=1e-4) and value > 0
    again = ours.loss(x, boxes, classes, ignore, torch_rng_for(1, "loss"))
    assert again["classification"].item() != loss["classification"].item()  # the generator decides the sample
    found = ours.eval().predict(x, score_above=0.01)
    with torch.no_grad():
        wanted = theirs.eval()(list(x.float()))
    assert len(wanted[0]["boxes"]) > 20
    same_detections(found, wanted, atol=1e-3)


def test_the_full_size_has_torchvisions_shapes_and_a_finite_loss():
    ours = small("faster_rcnn", backbone="resnet50", image_size=(64, 96))
    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    assert [v.shape for v in ours.state_dict().values()] == [v.shape for v in theirs.state_dict().values()]
    boxes, classes, ignore = torch.tensor([[[5.0, 5, 45, 50]]]), torch.tensor([[2]]), torch.zeros(1, 1).bool()
    loss = ours.loss(pixels(1, 64, 96), boxes, classes, ignore, torch_rng_for(0, "loss"))
    assert all(torch.isfinite(part) and part >= 0 for part in loss.values())
    assert ours.eval().predict(pixels(1, 64, 96), score_above=0.0).valid.any()


def test_bfloat16_leaves_proposals_and_anchors_exact():
    model = small("faster_rcnn", image_size=(320, 640))
    kinds = []
    model.roi.box_roi_pool.register_forward_pre_hook(lambda _, args: kinds.extend(p.dtype for p in args[1]))
    boxes, numbers = torch.tensor([[[401.0, 203, 451, 277]]]), torch.tensor([[1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(pixels(1, 320, 640), boxes, numbers, torch.zeros(1, 1).bool(), torch_rng_for(0, "loss"))
    assert kinds == [torch.float32] and all(torch.isfinite(part) for part in loss.values())


def spread_out(model):
    """Proposals that differ in place and score, so that there are no ties."""
    for layer in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred):
        nn.init.normal_(layer.weight, std=0.1, generator=torch_rng_for(0, "w"))


@pytest.mark.parametrize("options", [{}, HUALE, {**HUALE, "box_loss": "extended_iou", "auxiliary_head": "iou"}])
@pytest.mark.parametrize("broken", [False, True])
def test_where_all_is_sampled_both_ways_have_the_same_losses_and_gradients(options, broken):
    model = small("faster_rcnn", image_size=(64, 96), box_loss_head=bool(options), **options)
    spread_out(model)
    for sampler in (model.rpn.fg_bg_sampler, model.roi.fg_bg_sampler):
        sampler.batch_size_per_image = 100_000  # half of them positives at most
    boxes, classes, ignore = random_targets(torch_rng_for(5, "targets"), 4, side=60.0, some_ignored=True)
    classes[0], classes[1:3, 0], boxes[1:3, 0] = 0, 1, torch.tensor([5.0, 5, 40, 30])
    ignore &= classes > 0
    if broken:
        boxes[1, 0, 2] = float("nan")
    x, rng = pixels(4, 64, 96), torch_rng_for(0, "loss")
    wanted = model.loss(x, boxes, classes, ignore, rng)
    found = model.loss_at_once(model.pyramid(x)[1], boxes, classes * ~ignore, rng)
    assert found.keys() == wanted.keys()
    if broken:  # both say so
        assert all(not torch.isfinite(sum(parts.values())) for parts in (found, wanted))
        return
    for name, value in found.items():
        assert value.item() == pytest.approx(wanted[name].item(), rel=1e-5) and value != 0
    weights = list(model.parameters())
    slopes = [torch.autograd.grad(sum(parts.values()), weights, retain_graph=True) for parts in (found, wanted)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item() + 1e-9)


@pytest.mark.parametrize("columns", [0, 3])
def test_a_step_of_fixed_shapes_never_waits_and_bears_images_without_objects(columns):
    model = small("faster_rcnn", box_loss_head=True, **HUALE)
    full = random_targets(torch_rng_for(0, "targets"), 2, columns=6)[:2]
    empty = torch.zeros(2, columns or 1, 4), torch.zeros(2, columns or 1, dtype=torch.int64)
    for boxes, classes in (full, empty):
        model.zero_grad()
        _, maps = model.pyramid(pixels(2))
        with NoWaiting():
            parts = model.loss_at_once(maps, boxes, classes, torch_rng_for(0, "loss"))
            sum(parts.values()).backward()
        assert all(torch.isfinite(part) for part in parts.values()) and parts["classification"] > 0
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_samples_are_as_many_as_torchvisions_and_any_of_those_that_may_be():
    sizes, rng = SimpleNamespace(batch_size_per_image=8, positive_fraction=0.25), torch_rng_for(0, "sample")
    positive, negative = torch.zeros(3, 40).bool(), torch.zeros(3, 40).bool()
    positive[0, :10], negative[0, 10:] = True, True  # 2 of 10, 6 of 30
    positive[1, :1], negative[1, 20:23] = True, True  # 1 of 1, 3 of 3
    negative[2] = True  # none, 8 of 40
    hits, draws = torch.zeros(2, 3, 40), 2000
    for _ in range(draws):
        chosen = torch.stack(proposals.sample(positive, negative, sizes, rng))
        assert chosen.sum(2).tolist() == [[2, 1, 0], [6, 3, 8]]
        assert not (chosen & ~torch.stack([positive, negative])).any()
        hits += chosen
    for kind, image, rows, share in ((0, 0, positive, 2 / 10), (1, 0, negative, 6 / 30), (1, 2, negative, 8 / 40)):
        often = hits[kind, image][rows[image]] / draws
        assert (often - share).abs().max() < 4.5 * (share * (1 - share) / draws) ** 0.5  # of 40 places at most


def test_proposals_are_torchvisions():
    model = small("faster_rcnn", image_size=(64, 96))
    spread_out(model)
    images, maps = model.pyramid(pixels(3, 64, 96))
    with torch.no_grad():
        wanted, _ = model.rpn.eval()(images, maps)
        objectness, deltas = model.rpn.head(list(maps.values()))
        objectness = [o.permute(0, 2, 3, 1).flatten(1) for o in objectness]
        deltas = [d.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for d in deltas]
        anchors = model.anchors.split([o.shape[1] for o in objectness])
        found, valid = proposals.propose(objectness, deltas, anchors, (64, 96), (200, 100), 0.7)
    assert torch.equal(model.rpn.anchor_generator(images, list(maps.values()))[0], model.anchors)
    for boxes, real, own in zip(wanted, valid, found, strict=True):
        assert torch.allclose(own[real], boxes, atol=1e-4) and len(boxes) > 50


@pytest.mark.parametrize("sampling", [1, 2])
def test_pooling_of_all_levels_at_once_is_torchvisions_in_value_and_gradient(sampling):
    rng = torch_rng_for(0, "pool")
    maps = [torch.randn(2, 3, 64 // s, 96 // s, generator=rng, requires_grad=True) for s in (8, 16, 32)]
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 5, sampling, canonical_scale=16)
    rois = random_boxes(rng, 2, 200, side=64.0, least=4.0)
    rois[:, 0] = torch.tensor([0.0, 0, 96, 64])  # to the last row and column
    rois[:, 1] = torch.tensor([93.0, 62, 96, 64])  # less than a cell at the edge
    named = OrderedDict((str(i), m) for i, m in enumerate(maps))
    wanted = pooler(named, list(rois), [(64, 96)] * 2)
    found = proposals.pool(maps, rois, (8, 16, 32), pooler)
    assert pooler.map_levels(list(rois)).bincount().min() > 5
    assert torch.equal(found, wanted)
    weight = torch.randn(found.shape, generator=rng)
    slopes = [torch.autograd.grad((x * weight).sum(), maps) for x in (found, wanted)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs)
