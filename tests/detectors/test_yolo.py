"""YOLO: published parameter counts, architecture, post-processing, views, freezing."""

import numpy as np
import pytest
import torch
from detector_cases import pixels, small
from torch import nn

from fedal_utils.config import Config
from fedal_utils.detectors import VIEWS, build
from fedal_utils.detectors.yolo_loss import decode
from fedal_utils.seeding import torch_rng_for


def tiny(classes=3, size=(64, 96), seed=0, **options):
    return small("yolo", classes, seed, **{"norm": "batch", "image_size": size, **options})


def lively(classes=3, size=(64, 96), **options):
    """An untrained model in eval mode whose outputs differ from place to place and pass a threshold."""
    model = tiny(classes, size, norm="group", **options).eval()
    rng = torch_rng_for(1, "head")
    with torch.no_grad():
        for layer in model.head:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * 0.8)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=rng) * 0.5)
    return model


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    "classes, trained, folded", [(2, 7_066_239, 7_056_607), (8, 7_082_421, 7_072_789), (80, 7_276_605, 7_266_973)]
)
def test_the_published_size_has_the_published_number_of_parameters(classes, trained, folded):
    model = build(Config.of(detector="yolo", norm="batch", frozen=True), classes, torch_rng_for(0, "weights"))
    count = sum(p.numel() for p in model.parameters())
    assert count == trained == 7_066_239 + 2_697 * (classes - 2)  # 3 anchors x (128 + 256 + 512 inputs + bias)
    # a BatchNorm's scale and shift become one bias of its convolution
    assert count - sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)) == folded
    assert model.backbone.channels == (128, 256, 512) and len(model.backbone.stages) == 10
    state = model.state_dict()
    sent = sum(state[k].numel() for k in model.exchanged())
    if classes == 2:  # van Bommel 2021 counts 5.7 MB of 14.017 MB (half precision)
        assert sent * 2 / 1e6 == pytest.approx(5.7, abs=0.2)
        assert sum(v.numel() for v in state.values()) * 2 / 1e6 == pytest.approx(14.017, abs=0.2)


@pytest.mark.parametrize("scale, cells", [(1.0, (6400, 1600, 400)), (0.25, (400, 100, 25)), (0.05, (16, 8, 8))])
@pytest.mark.parametrize("classes, odds", [(1, 0.6 / 1e-5), (4, 0.6 / 3.00001)])
def test_biases_start_at_eight_objects_in_an_image_of_640_px_or_of_as_much_as_the_anchors_are_scaled(
    scale, cells, classes, odds
):
    for layer, number in zip(tiny(classes, anchor_side=10 * scale).head, cells, strict=True):
        bias = layer.bias.view(3, -1)
        assert torch.allclose(bias[:, 4].exp(), torch.full((3,), 8 / number), rtol=1e-4)
        assert torch.allclose(bias[:, 5:].exp(), torch.full((3, classes), odds), rtol=1e-3)


@pytest.mark.parametrize("classes", [1, 3])
def test_confidence_is_objectness_times_class_and_probs_sum_to_one(classes):
    model, x = lively(classes), pixels(1, 64, 96)
    model.candidates = 5000
    found = model.predict(x, score_above=0.2, nms_iou=1.0, top=5000)
    raw = model(x)[0].detach().double().numpy()
    boxes = decode(model(x)[0], model.grid).detach()
    objectness, p = sigmoid(raw[:, 4]), sigmoid(raw[:, 5:]) if classes > 1 else np.ones((378, 1))
    boxes = np.clip(boxes.double().numpy(), 0, [96, 64, 96, 64])
    real = (boxes[:, 2:] - boxes[:, :2] > 1e-2).all(1)  # what is left of it in the image
    rows = [
        (o * q[c], c + 1, row) for row, (o, q) in enumerate(zip(objectness, p, strict=True)) for c in range(classes)
    ]
    want = sorted((one for one in rows if one[0] > 0.2 and real[one[2]]), reverse=True)
    assert int(found.valid.sum()) == len(want) > 20
    for t, (score, label, row) in enumerate(want):
        assert found.scores[0, t].item() == pytest.approx(score, abs=1e-6) and found.labels[0, t] == label
        shares = [1 - objectness[row], *(objectness[row] * p[row] / p[row].sum())]
        assert found.probs[0, t].tolist() == pytest.approx(shares, abs=1e-6)
        assert found.boxes[0, t].tolist() == pytest.approx(boxes[row].tolist(), abs=1e-3)
    assert torch.allclose(found.probs.sum(-1), torch.ones(1, len(want)), atol=1e-6)


@pytest.mark.parametrize(
    "scale, inner, canvas", [(0.5, (64, 80), (64, 96)), (0.83, (106, 133), (128, 160)), (1.3, (166, 208), (192, 224))]
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_of_a_scaled_view_are_in_the_frame_of_the_full_image(scale, inner, canvas, mirrored):
    model = lively(size=(128, 160))
    with torch.no_grad():
        for layer in model.head:  # every output: its anchor in the middle of its cell
            layer.weight.zero_()
            layer.bias.zero_()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x = torch.full((1, 3, 128, 160), 20, dtype=torch.uint8)
    x[:, :, 32:64, 40:80] = 220  # a bright block around (60, 48)
    boxes, raw, level = model._view(x, scale, mirrored)
    counts = [3 * canvas[0] * canvas[1] // s**2 for s in (8, 16, 32)]
    assert boxes.shape == (1, sum(counts), 4)
    assert level.tolist() == [[number for number, count in enumerate(counts) for _ in range(count)]]
    view = seen[0].float()
    assert tuple(view.shape[-2:]) == canvas
    assert bool((view[..., inner[0] :, :] == 114).all()) and bool((view[..., inner[1] :] == 114).all())
    bright = view[0, 0, : inner[0], : inner[1]] > 120
    rows, columns = (bright.nonzero().float() + 0.5).mean(0).tolist()
    assert rows * 128 / inner[0] == pytest.approx(48, abs=0.6)
    assert columns * 160 / inner[1] == pytest.approx(100 if mirrored else 60, abs=0.6)
    # row 2, column 3 of stride 8, second anchor: 16 x 30 at a quarter
    cx, cy, w, h = 3.5 * 8 * 160 / inner[1], 2.5 * 8 * 128 / inner[0], 4 * 160 / inner[1], 7.5 * 128 / inner[0]
    cx = 160 - cx if mirrored else cx
    place = (2 * (canvas[1] // 8) + 3) * 3 + 1
    assert boxes[0, place].tolist() == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], abs=1e-3)
    assert boxes[..., [0, 2]].max() <= 160 and boxes[..., [1, 3]].max() <= 128 and boxes.min() >= 0


def test_views_are_joined_before_one_nms():
    model, x = lively(), pixels(2, 64, 96)
    options = {"score_above": 0.3, "top": 50}
    model.candidates = 100_000
    once = model.predict(x, **options)
    twice = model.predict(x, views=((1.0, False), (1.0, False)), **options)
    for name in ("labels", "boxes", "scores", "probs"):
        torch.testing.assert_close(getattr(twice, name), getattr(once, name), rtol=0, atol=1e-3)
    joined = model.predict(x, views=VIEWS, nms_iou=1.0, score_above=0.3, top=10_000)
    single = [model.predict(x, views=(v,), nms_iou=1.0, score_above=0.3, top=10_000) for v in VIEWS]
    assert torch.equal(joined.valid.sum(1), sum(s.valid.sum(1) for s in single))
    assert all(s.valid.any() for s in single)
    best = torch.stack([s.scores[:, 0] for s in single]).amax(0)
    assert torch.allclose(joined.scores[:, 0], best)
