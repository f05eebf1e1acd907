"""Detectors held to torchvision: the code of boxes, post-processing; and what every detector does alike."""

import pytest
import torch
from detector_cases import NoWaiting, pixels, random_boxes, random_targets, same_detections, small
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import roi_heads
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD as TorchSSD
from torchvision.ops import box_iou, nms

from fedal_utils.data import clip_boxes
from fedal_utils.detectors import clone, decode_boxes, encode_boxes
from fedal_utils.detectors.base import RawDetections, pairwise_iou, select_detections, suppress
from fedal_utils.seeding import torch_rng_for

HEADS = roi_heads.RoIHeads(None, None, None, 0.5, 0.5, 64, 0.25, None, 0.1, 0.5, 30)  # torchvision's, for its coder
KINDS = ["ssd", "faster_rcnn", "yolo"]


def select(boxes, probs, score_above, nms_iou, top=100, candidates=400, agnostic=False, scores=None, **extra):
    raw = RawDetections(boxes, probs, scores, extra)
    return select_detections(raw, score_above, nms_iou, top, candidates, agnostic)


@pytest.mark.parametrize("weights", [(10.0, 5.0), (1.0, 1.0)])
def test_boxes_as_deltas_and_back_are_torchvisions_to_the_bit(weights):
    rng = torch_rng_for(0, "coder")
    boxes, anchors, deltas = random_boxes(rng, 90), random_boxes(rng, 90), torch.randn(90, 4, generator=rng) * 9
    coder = type(HEADS.box_coder)((weights[0],) * 2 + (weights[1],) * 2)
    assert torch.equal(encode_boxes(boxes, anchors, weights), coder.encode_single(boxes, anchors))
    assert torch.equal(decode_boxes(deltas, anchors, weights), coder.decode_single(deltas, anchors))
    back = decode_boxes(encode_boxes(boxes, anchors, weights), anchors, weights)
    assert torch.allclose(back, boxes, atol=1e-3)


def test_pairwise_iou_is_torchvisions_of_each_image():
    rng = torch_rng_for(0, "iou")
    boxes, others = random_boxes(rng, 3, 5), random_boxes(rng, 3, 7)
    for second in (others, others[0]):
        wanted = [box_iou(b, o) for b, o in zip(boxes, second.expand(3, 7, 4), strict=True)]
        assert torch.equal(pairwise_iou(boxes, second), torch.stack(wanted))


def assert_well_formed(found, columns):
    valid = found.valid
    assert found.boxes.shape == (*valid.shape, 4) and found.probs.shape == (*valid.shape, columns)
    assert found.labels.dtype == torch.int64 and found.labels.max() < columns
    assert torch.allclose(found.probs.sum(-1), valid.float(), atol=1e-5)  # one where valid, zero where padded
    for t in (found.boxes, found.probs, found.scores[..., None]):
        assert (t[~valid] == 0).all()
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()  # best first, padding last


@pytest.mark.parametrize("case", range(6))
def test_post_processing_equals_that_of_torchvisions_ssd(case):
    rng = torch_rng_for(case, "post")
    anchors, top = random_boxes(rng, 120, least=6.0), (100, 7)[case % 2]
    logits, deltas = torch.randn(3, 120, 4, generator=rng) * 2, torch.randn(3, 120, 4, generator=rng)
    boxes = clip_boxes(decode_boxes(deltas, anchors), (64, 64))
    found = select(boxes, logits.softmax(-1), 0.2, 0.45, top, candidates=360)
    parts = nn.Identity(), DefaultBoxGenerator([[2]]), (64, 64), 4
    limits = {"score_thresh": 0.2, "nms_thresh": 0.45, "detections_per_img": top, "topk_candidates": 360}
    theirs = TorchSSD(*parts, head=nn.Identity(), **limits)
    outputs = {"bbox_regression": deltas, "cls_logits": logits}
    same_detections(found, theirs.postprocess_detections(outputs, [anchors] * 3, [(64, 64)] * 3))
    assert_well_formed(found, 4)
    assert int(found.valid.sum(1).max()) > 5 and found.valid.shape[1] <= top


@pytest.mark.parametrize("case", range(4))
def test_post_processing_with_a_box_per_class_equals_that_of_torchvisions_roi_heads(case):
    rng = torch_rng_for(case, "roi")
    proposals = [random_boxes(rng, count, least=6.0) for count in (40, 25)]
    logits, deltas = torch.randn(65, 4, generator=rng) * 2, torch.randn(65, 16, generator=rng)
    boxes, scores, labels = HEADS.postprocess_detections(logits, deltas, proposals, [(64, 64)] * 2)
    wanted = [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(boxes, scores, labels, strict=True)]
    decoded = clip_boxes(HEADS.box_coder.decode(deltas, proposals), (64, 64))[:, 1:]
    padded, probs = (pad_sequence(t.split([40, 25]), batch_first=True) for t in (decoded, logits.softmax(-1)))
    found = select(padded, probs, 0.1, 0.5, 30)
    same_detections(found, wanted)
    assert_well_formed(found, 4)


def test_scores_of_their_own_take_the_place_of_the_probs():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 8], [30, 30, 40, 40]]])
    probs = torch.tensor([[[0.1, 0.5, 0.4], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]]])
    scores = torch.tensor([[[0.3, 0.7], [0.2, 0.65], [0.1, 0.8]]])
    found = select(boxes, probs, 0.25, 0.45, scores=scores)
    # class 2: box 2 (.8), then box 0 (.7), which puts box 1 (.65) out; class 1: box 0 (.3), 0.2 and 0.1 are too little
    assert found.labels.tolist() == [[2, 2, 1]] and found.scores[0].tolist() == pytest.approx([0.8, 0.7, 0.3])
    assert torch.equal(found.boxes[0], boxes[0, [2, 0, 0]]) and torch.equal(found.probs[0], probs[0, [2, 0, 0]])
    one = select(boxes, probs, 0.25, 0.45, agnostic=True, scores=scores)
    assert one.labels.tolist() == [[2, 2]] and one.scores[0].tolist() == pytest.approx([0.8, 0.7])


def test_the_threshold_is_exclusive_and_no_detection_is_an_empty_row():
    boxes, probs = torch.tensor([[[0.0, 0, 10, 10]]] * 2), torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])
    assert select(boxes, probs, 0.5, 0.45).valid.tolist() == [[False], [True]]
    nothing = select(boxes, probs, 0.9, 0.45)
    assert nothing.boxes.shape == (2, 0, 4) and nothing.probs.shape == (2, 0, 2)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("own_box", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
def test_what_is_known_of_a_box_follows_it(classes, own_box, agnostic):
    """Threshold, the best 60 pairs, NMS and the best 9 each take some away; what is left says where it is from."""
    rng = torch_rng_for(0, "extra")
    boxes = random_boxes(rng, *((3, 40, classes) if own_box else (3, 40)), least=12.0)
    probs = (torch.randn(3, 40, classes + 1, generator=rng) * 2).softmax(-1)
    probs[1, 5:] = torch.eye(classes + 1)[0]  # image 1 has little to show: its row is padded
    rows = torch.arange(1, 41).expand(3, -1)  # (B, A): 1 + box
    extra = {"row": rows, "table": rows[..., None, None] + torch.arange(6.0).view(2, 3)}
    found = select(boxes, probs, 0.2, 0.3, 9, 60, agnostic, **extra)
    alive = [int(n) for n in found.valid.sum(1)]
    assert max(alive) == 9 > alive[1] > 0 and found.extra["row"].dtype == torch.int64
    for image, count in enumerate(alive):
        assert not any(value[image, count:].any() for value in found.extra.values())
        for place in range(count):
            known = {name: value[image, place] for name, value in found.extra.items()}
            row, label = int(known["row"]) - 1, int(found.labels[image, place])
            box = boxes[image, row, label - 1] if own_box else boxes[image, row]
            assert torch.equal(found.boxes[image, place], box)
            assert torch.equal(found.probs[image, place], probs[image, row])
            assert torch.equal(known["table"], row + 1 + torch.arange(6.0).view(2, 3))
    assert torch.equal(select(boxes, probs, 0.2, 0.3, 9, 60, agnostic).boxes, found.boxes)


def test_what_is_not_finite_does_not_vanish_in_silence():
    boxes, probs = torch.tensor([[[0.0, 0, 10, 10]] * 3] * 2), torch.full((2, 3, 2), 0.5)
    for broken in range(2):
        arguments = [boxes.clone(), probs.clone()]
        arguments[broken][1, 2, 1] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            select(*arguments, 0.1, 0.45)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_inside_the_image_and_do_not_depend_on_the_batch(kind):
    model, x = small(kind, image_size=(64, 96), norm="group").eval(), pixels(3, 64, 96)
    above = 0.001 if kind == "yolo" else 0.02
    found = model.predict(x, score_above=above, top=20)
    assert_well_formed(found, 4)
    assert found.valid.sum() > 10
    assert (found.boxes >= 0).all() and (found.boxes[..., 0::2] <= 96).all() and (found.boxes[..., 1::2] <= 64).all()
    alone = model.predict(x[1:2], score_above=above, top=20)
    n = int(alone.valid.sum())
    assert n == found.valid[1].sum() and torch.allclose(alone.boxes[0, :n], found.boxes[1, :n], atol=1e-3)
    with pytest.raises(ValueError, match="cached features belong to a frozen backbone"):
        model.predict((torch.zeros(1, 64, 8, 8),))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [0, 3])
def test_images_without_objects_give_a_finite_loss_and_gradients(kind, columns):
    model = small(kind, image_size=(64, 64))
    empty = torch.zeros(2, columns, 4), torch.zeros(2, columns, dtype=torch.int64), torch.zeros(2, columns).bool()
    loss = sum(model.loss(pixels(2), *empty, torch_rng_for(0, "loss")).values())
    loss.backward()
    assert torch.isfinite(loss) and loss > 0  # the background is taught
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads) and max(g.abs().max() for g in grads) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 5])
def test_every_parameter_gets_a_finite_gradient(kind, classes):
    model = small(kind, classes, image_size=(64, 64))
    boxes, numbers, ignore = random_targets(torch_rng_for(0, "targets"), 4, classes=classes, some_ignored=True)
    numbers[:, 0], boxes[:, 0], ignore[:, 0] = classes, torch.tensor([4.0, 4, 40, 40]), False
    sum(model.loss(pixels(4), boxes, numbers, ignore, torch_rng_for(0, "loss")).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_say_in_the_targets(kind):
    model = small(kind, image_size=(64, 64)).eval()  # eval: no BatchNorm statistics move between the calls
    rows = random_targets(torch_rng_for(0, "targets"), 2, columns=4)
    more = [torch.zeros_like(t) for t in rows]
    if kind == "yolo":
        more[0][:, 2:] = torch.tensor([3.0, 3, 30, 30])  # leftovers
    padded = [torch.cat(pair, dim=1) for pair in zip(rows, more, strict=True)]
    model.train(kind == "faster_rcnn")
    a, b = (model.loss(pixels(2), *t, torch_rng_for(0, "loss")) for t in (rows, padded))
    assert {k: v.item() for k, v in a.items()} == pytest.approx({k: v.item() for k, v in b.items()}, rel=1e-6)


@pytest.mark.parametrize("kind", ["ssd", "yolo", "ssd with heads"])
def test_a_training_step_never_waits_for_its_device(kind):
    heads = {"box_loss_head": True, "image_loss_head": True} if kind == "ssd with heads" else {}
    model = small(kind.split()[0], image_size=(64, 64), **heads)
    boxes = random_targets(torch_rng_for(0, "targets"), 3, some_ignored=True)
    with NoWaiting():
        sum(model.loss(pixels(3), *boxes, torch_rng_for(0, "loss")).values()).backward()
    with pytest.raises(AssertionError), NoWaiting():
        boxes[0][boxes[1] > 0]


@pytest.mark.parametrize("kind", ["ssd", "faster_rcnn"])
def test_a_frozen_backbone_never_changes_and_clones_share_it(kind):
    pytest.importorskip("timm")
    model = small(kind, backbone="lite0", pretrained=True, frozen=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = clone(model).train()
    assert twin.backbone is model.backbone and twin.frozen
    assert twin.training and twin.neck.training and not any(m.training for m in twin.backbone.modules())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.1)
    rows = random_targets(torch_rng_for(0, "targets"), 2)
    sum(twin.loss(pixels(2), *rows, torch_rng_for(0, "loss")).values()).backward()
    optimizer.step()
    after = twin.state_dict()
    frozen = [k for k in after if k.startswith("backbone.")]
    assert len(frozen) > 100 and all(torch.equal(after[k], before[k]) for k in frozen)  # BatchNorm statistics too
    assert any(not torch.equal(after[k], before[k]) for k in after if k not in frozen)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the original did not move
    assert set(model.exchanged()) == set(before) - set(frozen)
    maps = tuple(m.half() for m in model.features(pixels(2)))
    assert not any(m.requires_grad for m in maps)
    cached, plain = (model.eval().predict(inputs, score_above=0.02) for inputs in (maps, pixels(2)))
    assert torch.allclose(cached.scores[:, 0], plain.scores[:, 0], atol=1e-2)


@pytest.mark.parametrize("crowd", [40.0, 200.0])
def test_suppression_of_all_images_at_once_is_nms(crowd):
    """Of each image and group alone; also along a chain of sixty boxes, each of which overlaps the next."""
    rng = torch_rng_for(0, "survivors")
    corner = torch.rand(6, 200, 2, generator=rng) * crowd
    boxes = torch.cat([corner, corner + 10 + 30 * torch.rand(6, 200, 2, generator=rng)], dim=2)
    groups, keep = torch.randint(0, 3, (6, 200), generator=rng), torch.rand(6, 200, generator=rng) < 0.8
    few = suppress(boxes, keep, 0.4, groups, rounds=16)  # as in a training step
    assert torch.equal(few, suppress(boxes, keep, 0.4, groups))
    boxes[0, :60] = torch.tensor([[4.0 * i, 0, 4 * i + 10, 10] for i in range(60)])
    groups[0, :60], keep[0, :60] = 0, True
    alive = suppress(boxes, keep, 0.4, groups)
    for image in range(6):
        wanted = torch.zeros(200, dtype=torch.bool)
        for group in range(3):
            own = ((groups[image] == group) & keep[image]).nonzero()[:, 0]
            wanted[own[nms(boxes[image, own], -torch.arange(len(own)).float(), 0.4)]] = True
        assert torch.equal(alive[image], wanted)
