"""YOLO: published parameter counts, folding, targets and loss against plain loops, post-processing, views, freezing."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_iou, complete_box_iou_loss

from fedal_utils import metrics, training
from fedal_utils.config import TrainingConfig
from fedal_utils.data import readers as data
from fedal_utils.data.boxes import flip_boxes
from fedal_utils.detectors import yolo
from fedal_utils.detectors.base import clone
from fedal_utils.seeding import torch_rng_for
from fedal_utils.training import TrainingDiverged

COCO_ANCHORS = [
    [(10, 13), (16, 30), (33, 23)],
    [(30, 61), (62, 45), (59, 119)],
    [(116, 90), (156, 198), (373, 326)],
]


def tiny(classes=3, size=(64, 96), seed=0, **options):
    options = {"width": 0.125, "anchor_scale": 0.25} | options
    return yolo.build(classes, size, torch_rng_for(seed, "weights"), **options)


def lively(classes=3, size=(64, 96), **options):
    """An untrained model in eval mode whose outputs differ from place to place and pass a threshold."""
    model = tiny(classes, size, norm="group", **options).eval()
    rng = torch_rng_for(1, "head")
    with torch.no_grad():
        for layer in model.head:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * 0.8)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=rng) * 0.5)
    return model


def pixels(count, size=(64, 96), seed=0):
    return torch.randint(0, 256, (count, 3, *size), generator=torch_rng_for(seed, "px"), dtype=torch.uint8)


def targets(rows, columns=None):
    """Padded boxes, classes, ignore of lists of (box, class, ignored), one list an image."""
    columns = max(map(len, rows)) if columns is None else columns
    boxes, classes = torch.zeros(len(rows), columns, 4), torch.zeros(len(rows), columns, dtype=torch.int64)
    ignore = torch.zeros(len(rows), columns, dtype=torch.bool)
    for i, row in enumerate(rows):
        for k, (box, number, ignored) in enumerate(row):
            boxes[i, k], classes[i, k], ignore[i, k] = torch.tensor(box, dtype=torch.float32), number, ignored
    return boxes, classes, ignore


SOME = [
    [((4, 4, 20, 30), 1, False), ((40, 10, 90, 60), 3, False), ((60, 2, 66, 9), 2, False)],
    [((10, 20, 30, 44), 2, False), ((0, 0, 0, 0), 0, False), ((50, 8, 80, 40), 1, True)],
]

# ------------------------------------------------------------------------------------------------------- architecture


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "classes, trained, folded", [(2, 7_066_239, 7_056_607), (8, 7_082_421, 7_072_789), (80, 7_276_605, 7_266_973)]
)
def test_the_published_size_has_the_published_number_of_parameters(classes, trained, folded):
    model = yolo.build(classes, (64, 64), torch_rng_for(0, "weights"))
    assert count(model) == trained == 7_066_239 + 2_697 * (classes - 2)  # 3 anchors x (128 + 256 + 512 inputs + bias)
    assert count(yolo.fold(model)) == folded
    assert model.backbone.channels == (128, 256, 512) and len(model.backbone.stages) == 10


def test_width_and_depth_scale_channels_and_repeats():
    model = tiny(width=0.2, depth=0.7)  # 12.8 -> 16, 25.6 -> 32, 51.2 -> 56, 102.4 -> 104, 204.8 -> 208
    assert model.backbone.channels == (56, 104, 208)
    assert [len(model.backbone.stages[i].blocks) for i in (2, 4, 6, 9)] == [2, 6, 6, 2]
    assert len(model.neck.out3.blocks) == 2
    norms = [m for m in tiny(width=0.2, norm="group").modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_channels, m.num_groups) for m in norms} >= {(56, 7), (28, 7)}  # half of 56 is no multiple of 8
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        assert (norm.eps, norm.momentum) == (1e-3, 0.03)


def test_maps_and_outputs_have_the_strides_they_say():
    model = tiny()
    maps = model.features(pixels(2))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 8, 12), (2, 64, 4, 6), (2, 128, 2, 3)]
    assert model(pixels(2)).shape == (2, 3 * (96 + 24 + 6), 8)
    assert torch.equal(model.eval()(maps := pixels(1)), model(maps))


def test_pyramid_pooling_takes_maxima_over_5_9_and_13_cells():
    block = yolo.PyramidPooling(16, "group")
    x = torch.randn(1, 16, 20, 17, generator=torch_rng_for(0, "x"))
    first = block.enter(x)
    pools = [F.max_pool2d(first, k, stride=1, padding=k // 2) for k in (5, 9, 13)]
    assert torch.equal(block(x), block.leave(torch.cat([first, *pools], dim=1)))


def test_pixels_are_scaled_to_one():
    stem = tiny().backbone.stages[0].eval()
    x = pixels(1)
    # rows and columns 2 by 2: channel 4 c + 2 dy + dx
    blocks = torch.stack([x[:, c, dy::2, dx::2] for c, dy, dx in product(range(3), (0, 1), (0, 1))], dim=1)
    assert torch.allclose(stem(x), stem.conv(blocks.float() / 255), atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_shortcut_is_in_the_backbone_only(norm):
    model = tiny(norm=norm)
    inside = [block.shortcut for m in model.backbone.modules() if isinstance(m, yolo.CSP) for block in m.blocks]
    assert inside == [True] * 7 + [False]  # 1 + 3 + 3 with, the last CSP without
    assert not any(block.shortcut for m in model.neck.modules() if isinstance(m, yolo.CSP) for block in m.blocks)
    block = model.backbone.stages[2].blocks[0].eval()
    x = torch.randn(1, 8, 4, 4, generator=torch_rng_for(0, "x"))
    with torch.no_grad():
        for p in block.wide.parameters():
            p.zero_()
    assert torch.equal(block(x), x)  # SiLU(0) = 0


@pytest.mark.parametrize("scale, cells", [(1.0, (6400, 1600, 400)), (0.25, (400, 100, 25)), (0.05, (16, 8, 8))])
@pytest.mark.parametrize("classes, odds", [(1, 0.6 / 1e-5), (4, 0.6 / 3.00001)])
def test_biases_start_at_eight_objects_in_an_image_of_640_px_or_of_as_much_as_the_anchors_are_scaled(
    scale, cells, classes, odds
):
    for layer, number in zip(tiny(classes, anchor_scale=scale).head, cells, strict=True):
        bias = layer.bias.view(3, -1)
        assert torch.allclose(bias[:, 4].exp(), torch.full((3,), 8 / number), rtol=1e-4)
        assert torch.allclose(bias[:, 5:].exp(), torch.full((3, classes), odds), rtol=1e-3)


def test_the_same_generator_gives_the_same_weights():
    a, b, c = (tiny(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["head.0.weight"], c["head.0.weight"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": (64, 100)}, r"multiples of 32, got \(64, 100\)"),
        ({"size": (0, 64)}, "multiples of 32"),
        ({"classes": 0}, "at least one class, got 0"),
        ({"norm": "layer"}, "norm must be 'group' or 'batch', got 'layer'"),
        ({"fpn_channels": 0.0}, "width must be > 0"),
        ({"depth_multiple": -1.0}, "depth must be > 0"),
        ({"anchor_scale": 0.0}, "anchor_scale must be > 0"),
    ],
)
def test_what_cannot_be_built_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_an_image_of_another_size_is_an_error():
    model = lively()
    for views in (((1.0, False),), ((0.5, True),)):
        with pytest.raises(ValueError, match="built for"):
            model.predict(pixels(1, (96, 96)), views=views)
    with pytest.raises(ValueError, match="multiples of 32"):
        model.backbone(pixels(1, (64, 80)))


def test_folding_keeps_the_outputs_after_the_statistics_have_moved():
    model = tiny().train()
    for seed in range(5):
        model(pixels(4, seed=seed))
    with torch.no_grad():
        for norm in (
            m for m in model.modules() if isinstance(m, nn.BatchNorm2d)
        ):  # scale and shift are not one and zero
            norm.weight.mul_(1.3)
            norm.bias.add_(0.1)
        model.backbone.stages[0].conv.norm.running_var.mul_(0.02)  # so small that eps counts
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = yolo.fold(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = pixels(2, seed=9)
    with torch.no_grad():
        model.eval()
        want, got = model(x), folded(x)
        fresh = yolo.fold(tiny())(x)
    assert want.std() > 1e-3 and torch.allclose(got, want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(fresh, want, atol=1e-2)
    assert not any(p.requires_grad for p in folded.parameters())
    with pytest.raises(ValueError, match="only BatchNorm can be folded.*GroupNorm"):
        yolo.fold(tiny(norm="group"))


# ------------------------------------------------------------------------------------------------------------- decode


def test_decoding_one_cell_by_hand():
    grid = yolo.cell_grid((64, 96), tiny().anchors)
    assert grid.shape == (378, 5)
    row = (8 * 12 * 3) + (2 * 6 + 5) * 3 + 1  # level 1: row 2, column 5, second anchor: 62 x 45, a quarter of it
    assert grid[row, 2:].tolist() == [16, 15.5, 11.25]
    raw = torch.tensor([0.0, math.log(3), math.log(1 / 3), 0.0, 7.0])  # sigmoids 0.5, 0.75, 0.25, 0.5
    x, y = (2 * 0.5 - 0.5 + 5) * 16, (2 * 0.75 - 0.5 + 2) * 16  # 88, 48
    w, h = (2 * 0.25) ** 2 * 15.5, (2 * 0.5) ** 2 * 11.25  # 3.875, 11.25
    found = yolo.decode(raw, grid[row]).tolist()
    assert found == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=1e-4)
    reach = [yolo.decode(torch.tensor([v, 0.0, 0, 0]), grid[row])[[0, 2]].mean().item() for v in (-50.0, 50.0)]
    assert reach == pytest.approx([4.5 * 16, 6.5 * 16])  # half a cell beyond either side


def test_outputs_are_in_the_order_of_the_grid():
    model = lively()
    x = pixels(1)
    raw = model(x)[0]
    grid = yolo.cell_grid((64, 96), model.anchors)
    maps = [layer(m)[0] for layer, m in zip(model.head, model.neck(model.features(x)), strict=True)]
    for level, a, y, xx in ((0, 2, 7, 3), (1, 0, 1, 5), (2, 1, 0, 2)):
        stride = (8, 16, 32)[level]
        w, h = (side / 4 for side in COCO_ANCHORS[level][a])
        here = (grid == torch.tensor([(xx - 0.5) * stride, (y - 0.5) * stride, stride, w, h])).all(1).nonzero()
        assert here.shape == (1, 1)
        assert torch.allclose(raw[here[0, 0]], maps[level].view(3, 8, *maps[level].shape[1:])[a, :, y, xx], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ targets


def oracle_claims(boxes, classes, ignore, anchors, size):
    """All (image, box, level, anchor, row, column) that are claimed; looks at every cell."""
    claims = []
    for i, k in product(range(len(boxes)), range(boxes.shape[1])):
        x1, y1, x2, y2 = map(float, boxes[i, k])
        if classes[i, k] == 0 or ignore[i, k] or x2 <= x1 or y2 <= y1:
            continue
        for level, stride in enumerate((8, 16, 32)):
            rows, columns = size[0] // stride, size[1] // stride
            cells = []
            for row, column in product(range(rows), range(columns)):
                left, top = column * stride, row * stride
                right, bottom = left + stride, top + stride
                cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
                # how far the centre lies beyond this cell; 0 = in it. A centre on the image's last edge is in the last.
                in_x = left <= cx < right or (cx == size[1] == right)
                in_y = top <= cy < bottom or (cy == size[0] == bottom)
                near_x = 0 < left - cx < stride / 2 or 0 <= cx - right < stride / 2
                near_y = 0 < top - cy < stride / 2 or 0 <= cy - bottom < stride / 2
                if (in_x and in_y) or (near_x and in_y) or (in_x and near_y):
                    cells.append((row, column))
            for a in range(3):
                w, h = anchors[level][a]
                if w < 4 * (x2 - x1) and x2 - x1 < 4 * w and h < 4 * (y2 - y1) and y2 - y1 < 4 * h:
                    claims += [(i, k, level, a, row, column) for row, column in cells]
    return claims


def our_claims(boxes, classes, ignore, anchors, size):
    index, claimed = yolo.claim_cells(boxes, classes, ignore, anchors, size)
    assert bool((index[~claimed] == 0).all())
    found = []
    for i, k, level, a, slot in claimed.nonzero().tolist():
        place = index[i, k, level, a, slot].item()
        for before in range(level):
            place -= 3 * (size[0] // (8, 16, 32)[before]) * (size[1] // (8, 16, 32)[before])
        columns = size[1] // (8, 16, 32)[level]
        assert place % 3 == a
        found.append((i, k, level, a, place // 3 // columns, place // 3 % columns))
    return found


corner = st.tuples(st.integers(0, 383), st.integers(0, 255), st.integers(0, 200), st.integers(0, 200))
row = st.lists(st.tuples(corner, st.integers(0, 3), st.booleans()), max_size=4)


@given(st.lists(row, min_size=1, max_size=3), st.sampled_from([0.25, 0.125, 0.5]))
@settings(max_examples=60)
def test_claims_equal_the_oracles(rows, scale):
    # quarters of pixels: centres fall on borders and on middles of cells, sides on exactly four times an anchor
    def box(x, y, w, h):
        return x / 4, y / 4, min(96, (x + w) / 4), min(64, (y + h) / 4)

    boxes, classes, ignore = targets([[(box(*c), n, flag and n > 0) for c, n, flag in r] for r in rows])
    if boxes.shape[1] == 0:
        return
    anchors = torch.tensor(COCO_ANCHORS) * scale
    want = oracle_claims(boxes, classes, ignore, anchors.tolist(), (64, 96))
    assert sorted(our_claims(boxes, classes, ignore, anchors, (64, 96))) == sorted(want)


def claimed_cells(box, level=0):
    anchors = torch.tensor(COCO_ANCHORS) * 0.25
    found = our_claims(*targets([[(box, 1, False)]]), anchors, (64, 96))
    return {(row, column) for _, _, lv, _, row, column in found if lv == level}


def test_claims_by_hand():
    def at(cx, cy, w=4.0, h=6.0):
        return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2

    assert claimed_cells(at(27, 42)) == {(5, 3), (5, 2), (4, 3)}  # 3.375, 5.25 in cells: left and up
    assert claimed_cells(at(30, 47)) == {(5, 3), (5, 4), (6, 3)}  # 3.75, 5.875: right and down
    assert claimed_cells(at(28, 44)) == {(5, 3)}  # the middle of a cell draws no neighbour
    assert claimed_cells(at(24, 44)) == {(5, 3), (5, 2)}  # on a border: the cell right of it, and the one left of it
    assert claimed_cells(at(3, 3.5)) == {(0, 0)}  # no cell left of the first
    assert claimed_cells(at(94, 61.5)) == {(7, 11)}
    # 10 x 13 at a quarter is 2.5 x 3.25: four times that is one too much
    wide = our_claims(*targets([[(at(27, 42, 10, 6), 1, False)]]), torch.tensor(COCO_ANCHORS) * 0.25, (64, 96))
    less = our_claims(*targets([[(at(27, 42, 9.75, 6), 1, False)]]), torch.tensor(COCO_ANCHORS) * 0.25, (64, 96))
    assert {a for *_, a, _, _ in wide} | {0} == {a for *_, a, _, _ in less}
    assert 0 not in {a for _, _, level, a, _, _ in wide if level == 0}
    assert 0 in {a for _, _, level, a, _, _ in less if level == 0}


def test_two_boxes_may_claim_one_cell():
    rows = [[((20, 20, 28, 30), 1, False), ((21, 20, 29, 31), 2, False)]]
    found = our_claims(*targets(rows), tiny().anchors, (64, 96))
    cells = [[c[2:] for c in found if c[1] == k] for k in (0, 1)]
    assert set(cells[0]) & set(cells[1]) and sorted(found) == sorted(set(found))


# --------------------------------------------------------------------------------------------------------------- loss


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle_bce(x, target):
    p = sigmoid(x)
    return -(target * np.log(p) + (1 - target) * np.log(1 - p))


def oracle_ciou(a, b):
    """1911.08287 eq. 8 to 11: IoU - rho^2 / c^2 - alpha v."""
    iw, ih = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(iw, 0) * max(ih, 0)
    w, h, wb, hb = a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]
    iou = both / (w * h + wb * hb - both)
    rho2 = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
    c2 = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    v = 4 / np.pi**2 * (np.arctan(wb / hb) - np.arctan(w / h)) ** 2
    return iou - rho2 / c2 - v * v / (1 - iou + v) if v else iou - rho2 / c2


def oracle_loss(raw, boxes, classes, ignore, anchors, size, gains=(0.05, 1.0, 0.5)):
    """The three parts, in float64 and plain loops, from `oracle_claims`."""
    images, number = len(raw), raw.shape[-1] - 5
    claims = oracle_claims(boxes, classes, ignore, anchors, size)
    parts = {"box": 0.0, "objectness": 0.0, "classification": 0.0}
    start = 0
    for level, stride in enumerate((8, 16, 32)):
        rows, columns = size[0] // stride, size[1] // stride
        quality, box_terms, class_terms = {}, [], []
        for i, k, _, a, r, c in (claim for claim in claims if claim[2] == level):
            out = raw[i, start + (r * columns + c) * 3 + a]
            s = sigmoid(out)
            cx, cy = (2 * s[0] - 0.5 + c) * stride, (2 * s[1] - 0.5 + r) * stride
            w, h = (2 * s[2]) ** 2 * anchors[level][a][0], (2 * s[3]) ** 2 * anchors[level][a][1]
            score = oracle_ciou((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), boxes[i, k])
            box_terms.append(1 - score)
            quality[i, r, c, a] = max(quality.get((i, r, c, a), 0.0), score, 0.0)
            class_terms += [oracle_bce(out[5 + n], float(n + 1 == classes[i, k])) for n in range(number)]
        errors = []
        for i, r, c, a in product(range(images), range(rows), range(columns), range(3)):
            x, y = (c + 0.5) * stride, (r + 0.5) * stride
            hidden = any(
                flag and n > 0 and b[0] <= x <= b[2] and b[1] <= y <= b[3]
                for b, n, flag in zip(boxes[i], classes[i], ignore[i], strict=True)
            )
            if (i, r, c, a) in quality or not hidden:
                out = raw[i, start + (r * columns + c) * 3 + a, 4]
                errors.append(oracle_bce(out, quality.get((i, r, c, a), 0.0)))
        parts["box"] += gains[0] * np.mean(box_terms) if box_terms else 0.0
        parts["objectness"] += gains[1] * (4.0, 1.0, 0.4)[level] * np.mean(errors)
        parts["classification"] += gains[2] * number / 80 * np.mean(class_terms) if class_terms and number > 1 else 0.0
        start += rows * columns * 3
    return {name: images * value for name, value in parts.items()}


def loss_case(case, classes=3, images=2, columns=5):
    rng = torch_rng_for(case, "loss")
    boxes, numbers, ignore = targets([[]] * images, columns)
    low = torch.rand(images, columns, 2, generator=rng) * torch.tensor([70.0, 40.0])
    boxes = torch.cat([low, low + 2 + torch.rand(images, columns, 2, generator=rng) * 22], dim=-1)
    numbers = torch.randint(0, classes + 1, (images, columns), generator=rng)
    ignore = (torch.rand(images, columns, generator=rng) < 0.3) & (numbers > 0)
    boxes[0, 1] = boxes[0, 0] + 0.5  # two boxes that claim the same cells
    numbers[0, :2], ignore[0, :2] = torch.tensor([1, classes]), False
    raw = torch.randn(images, 378, 5 + classes, generator=rng)
    return raw, boxes, numbers, ignore


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("classes", [1, 3])
def test_the_loss_equals_the_oracles(case, classes):
    raw, *target = loss_case(case, classes)
    anchors = torch.tensor(COCO_ANCHORS) * 0.25
    ours = yolo.yolo_loss(raw, *target, anchors, (64, 96), gains=(0.05, 1.5, 0.5))
    want = oracle_loss(raw.double().numpy(), *(t.numpy() for t in target), anchors.tolist(), (64, 96), (0.05, 1.5, 0.5))
    for name, value in want.items():
        assert ours[name].item() == pytest.approx(value, rel=1e-4), name
    assert want["box"] > 0.05 and want["objectness"] > 1 and (want["classification"] > 0.01) == (classes > 1)


def test_ciou_of_equation_8_equals_torchvisions():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 20, (40, 2, 2))
    boxes = np.concatenate([low, low + rng.uniform(1, 20, (40, 2, 2))], axis=-1)
    ours = [1 - oracle_ciou(a, b) for a, b in boxes]
    theirs = complete_box_iou_loss(*torch.tensor(boxes).unbind(1))
    assert theirs.numpy() == pytest.approx(np.array(ours), abs=1e-6) and max(ours) > 1 > min(ours)


def test_a_cell_that_two_boxes_claim_aims_at_the_better_one_in_any_order():
    model, (raw, boxes, classes, ignore) = tiny(), loss_case(0)
    parts = []
    for order in ([0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [4, 3, 2, 1, 0]):
        own = raw.clone().requires_grad_()
        loss = yolo.yolo_loss(own, boxes[:, order], classes[:, order], ignore[:, order], model.anchors, (64, 96))
        loss["objectness"].backward()
        parts.append((loss["objectness"].item(), own.grad))
    for value, grad in parts[1:]:
        assert value == pytest.approx(parts[0][0], rel=1e-6) and torch.allclose(grad, parts[0][1], atol=1e-8)
    # the target is no path for gradients: objectness moves objectness only
    assert bool((parts[0][1][..., :4] == 0).all()) and bool((parts[0][1][..., 4] != 0).any())


def test_padding_and_ignored_boxes_are_no_targets():
    model, (raw, boxes, classes, ignore) = tiny(), loss_case(1)

    def loss(*target):
        return {k: v.item() for k, v in yolo.yolo_loss(raw, *target, model.anchors, (64, 96)).items()}

    plain = loss(boxes, classes, ignore)
    stray = torch.tensor([3.0, 3, 30, 30]).expand(2, 4, 4)  # padding rows with leftovers in them
    none = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.bool)
    for extra in (stray, stray * 0):
        padded = loss(torch.cat([boxes, extra], 1), torch.cat([classes, none[0]], 1), torch.cat([ignore, none[1]], 1))
        assert padded == pytest.approx(plain, rel=1e-6)
    # all ignored: neither a box nor a class to learn, and what lies in them does not count as background either
    hidden = loss(boxes, classes, classes > 0)
    assert hidden["box"] == hidden["classification"] == 0
    assert hidden["objectness"] != pytest.approx(loss(boxes * 0, classes * 0, ignore & False)["objectness"], rel=1e-3)


def test_an_image_set_without_objects_teaches_that_there_are_none():
    raw = loss_case(2)[0].requires_grad_()
    for columns in (0, 3):
        parts = yolo.yolo_loss(raw, *targets([[], []], columns), tiny().anchors, (64, 96))
        assert parts["box"].item() == parts["classification"].item() == 0
        grad = torch.autograd.grad(sum(parts.values()), raw)[0]
        assert bool((grad[..., 4] > 0).all()) and bool((grad[..., :4] == 0).all()) and bool((grad[..., 5:] == 0).all())


def test_the_loss_of_two_equal_images_is_twice_that_of_one_and_a_mean_if_asked():
    model, (raw, *target) = tiny(), loss_case(3, images=1)
    double = [t.repeat(2, *[1] * (t.dim() - 1)) for t in (raw, *target)]
    for times_batch, factor in ((True, 2), (False, 1)):
        one, two = (
            yolo.yolo_loss(r, *t, model.anchors, (64, 96), times_batch=times_batch)
            for r, *t in ((raw, *target), double)
        )
        for name, value in one.items():
            assert two[name].item() == pytest.approx(factor * value.item(), rel=1e-5) and value > 0


def test_the_gradient_reaches_every_parameter():
    model = tiny().train()
    rows = [[((2, 2, 6, 8), 1, False), ((20, 10, 40, 34), 2, False), ((10, 2, 90, 60), 3, False)]] * 2
    parts = model.loss(pixels(2), *targets(rows))
    assert set(parts) == {"box", "objectness", "classification"}
    sum(parts.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool(torch.isfinite(p.grad).all()) and bool((p.grad != 0).any()), name
    for layer in model.head:  # all outputs of all anchors: 3 x (4 + 1 + 3)
        assert int((layer.bias.grad != 0).sum()) >= 3 * (1 + 0) and bool((layer.bias.grad.view(3, 8)[:, 4] != 0).all())


def test_a_box_that_is_not_a_number_is_an_error_and_does_not_vanish():
    scenes = data.digit_scenes(2, 1, (64, 64), classes=3)[0]
    scenes.labels.boxes[1, 0, 2] = float("nan")
    with pytest.raises(TrainingDiverged, match="loss is nan .*box nan.*'train-00001'"):
        list(
            training.fit(
                tiny(size=(64, 64)),
                scenes.images,
                scenes.labels,
                TrainingConfig.of(batch=1, flip=0.0),
                torch_rng_for(0, "fit"),
                iterations=2,
            )
        )


# --------------------------------------------------------------------------------------------------------- prediction


def same_detections(a, b, atol=1e-3):
    assert torch.equal(a.labels, b.labels)
    for name in ("boxes", "scores", "probs"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=atol), name


@pytest.mark.parametrize("classes", [1, 3])
def test_confidence_is_objectness_times_class_and_probs_sum_to_one(classes):
    model, x = lively(classes), pixels(1)
    found = model.predict(x, score_above=0.2, nms_iou=1.0, top=5000, candidates=5000)
    raw = model(x)[0].detach().double().numpy()
    boxes = yolo.decode(model(x)[0], yolo.cell_grid((64, 96), model.anchors)).detach()
    objectness, p = sigmoid(raw[:, 4]), sigmoid(raw[:, 5:]) if classes > 1 else np.ones((378, 1))
    boxes = np.clip(boxes.double().numpy(), 0, [96, 64, 96, 64])
    real = (boxes[:, 2:] - boxes[:, :2] > 1e-2).all(1)  # what is left of it in the image
    want = sorted(
        (
            (o * q[c], c + 1, row)
            for row, (o, q) in enumerate(zip(objectness, p, strict=True))
            for c in range(classes)
            if o * q[c] > 0.2 and real[row]
        ),
        reverse=True,
    )
    assert int(found.valid.sum()) == len(want) > 20
    for t, (score, label, row) in enumerate(want):
        assert found.scores[0, t].item() == pytest.approx(score, abs=1e-6) and found.labels[0, t] == label
        shares = [1 - objectness[row], *(objectness[row] * p[row] / p[row].sum())]
        assert found.probs[0, t].tolist() == pytest.approx(shares, abs=1e-6)
        assert found.boxes[0, t].tolist() == pytest.approx(boxes[row].tolist(), abs=1e-3)
    assert torch.allclose(found.probs.sum(-1), torch.ones(1, len(want)), atol=1e-6)


def test_probs_sum_to_one_where_every_class_is_very_unlikely():
    model = lively()
    with torch.no_grad():
        for layer in model.head:
            layer.weight.zero_()
            layer.bias.view(3, 8)[:, 4:] = torch.tensor([1.0, -200, -201, -202])  # float32 sigmoids are zero
    found = model.predict(pixels(1), score_above=-1.0)
    assert found.valid.any() and torch.allclose(found.probs.sum(-1), found.valid.float(), atol=1e-6)
    assert found.probs[0, 0, 1:].tolist() == pytest.approx(
        (0.7310586 * np.array([0.66524, 0.24473, 0.09003])), abs=1e-4
    )


@pytest.mark.parametrize("agnostic", [False, True])
def test_nms_within_classes_or_across_them(agnostic):
    found = lively().predict(pixels(1), score_above=0.2, nms_iou=0.4, top=300, class_agnostic=agnostic)
    n = int(found.valid.sum())
    overlap = box_iou(found.boxes[0, :n], found.boxes[0, :n]).fill_diagonal_(0)
    equal = found.labels[0, :n, None] == found.labels[0, :n]
    assert n > 5 and overlap[equal].max() <= 0.4
    assert (overlap.max() <= 0.4) == agnostic


def test_predictions_do_not_depend_on_the_batch():
    model, x = lively(), pixels(3)
    together = model.predict(x, score_above=0.3, top=20)
    for i in range(3):
        alone = model.predict(x[i : i + 1], score_above=0.3, top=20)
        n = int(alone.valid.sum())
        assert n == int(together.valid[i].sum()) > 3
        assert torch.equal(alone.labels[0, :n], together.labels[i, :n])
        assert torch.allclose(alone.boxes[0, :n], together.boxes[i, :n], atol=1e-3)
    assert not torch.equal(together.labels[0], together.labels[1])


def test_predict_refuses_training_mode_broken_weights_and_odd_views():
    model = lively()
    for views in ((), ((0.0, False),), ((-1.0, True),), ((float("nan"), True),)):
        with pytest.raises(ValueError, match="views must be one or more pairs"):
            model.predict(pixels(1), views=views)
    with pytest.raises(ValueError, match="predict needs eval mode"):
        lively().train().predict(pixels(1))
    with torch.no_grad():
        model.head[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.predict(pixels(1))


# -------------------------------------------------------------------------------------------------------------- views


def test_the_mirrored_view_of_a_mirrored_image_gives_mirrored_boxes():
    model, x = lively(), pixels(2)
    plain = model.predict(x, score_above=0.3, top=30)
    mirrored = model.predict(x.flip(-1), score_above=0.3, top=30, views=((1.0, True),))
    assert plain.valid.all() and torch.equal(plain.labels, mirrored.labels)
    assert torch.allclose(flip_boxes(mirrored.boxes, 96), plain.boxes, atol=1e-3)
    assert torch.allclose(plain.probs, mirrored.probs, atol=1e-5)
    other = model.predict(x, score_above=0.3, top=30, views=((1.0, True),))
    assert not torch.allclose(other.scores[:, 0], plain.scores[:, 0], atol=1e-3)


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
    assert boxes.shape == (1, 3 * sum(canvas[0] * canvas[1] // s**2 for s in (8, 16, 32)), 4)
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
    model, x = lively(), pixels(2)
    options = {"score_above": 0.3, "top": 50, "candidates": 100_000}
    once = model.predict(x, **options)
    same_detections(model.predict(x, views=((1.0, False), (1.0, False)), **options), once)
    joined = model.predict(x, views=yolo.VIEWS, nms_iou=1.0, score_above=0.3, top=10_000, candidates=100_000)
    single = [
        model.predict(x, views=(v,), nms_iou=1.0, score_above=0.3, top=10_000, candidates=100_000) for v in yolo.VIEWS
    ]
    assert torch.equal(joined.valid.sum(1), sum(s.valid.sum(1) for s in single))
    assert all(s.valid.any() for s in single)
    best = torch.stack([s.scores[:, 0] for s in single]).amax(0)
    assert torch.allclose(joined.scores[:, 0], best)


@pytest.mark.parametrize("views", [((1.0, False),), ((0.5, True),), yolo.VIEWS])
def test_a_detection_knows_which_map_it_came_from(views):
    """Every output is its anchor in the middle of its cell: a box's sides say which map and which view it is from."""
    model, size = lively(size=(128, 160)), (128, 160)
    with torch.no_grad():
        for layer in model.head:
            layer.weight.zero_()
            layer.bias.zero_()
    x = pixels(2, size)
    found = model.predict(x, score_above=0.1, nms_iou=1.0, top=100_000, candidates=100_000, views=views)
    assert found.extra["level"].shape == found.labels.shape and found.extra["level"].dtype == torch.int64
    inner = [(round(128 * scale), round(160 * scale)) for scale, _ in views]
    sizes = {  # (width, height) of each anchor in each view -> its map
        (w / 4 * 160 / width, h / 4 * 128 / height): level
        for height, width in inner
        for level, anchors in enumerate(COCO_ANCHORS)
        for w, h in anchors
    }
    boxes, levels = found.boxes[found.valid], found.extra["level"][found.valid]
    whole = (boxes > 0).all(1) & (boxes[:, 2] < 160) & (boxes[:, 3] < 128)  # not cut at the edge
    sides = boxes[whole, 2:] - boxes[whole, :2]
    table = torch.tensor(list(sizes))
    near = (sides[:, None] - table).abs().amax(2)  # (boxes, anchors)
    assert near.amin(1).max() < 1e-3 and (near < 0.05).sum(1).max() == 1
    assert torch.equal(torch.tensor(list(sizes.values()))[near.argmin(1)], levels[whole])
    assert levels[whole].bincount(minlength=3).min() > 3 and len(near.argmin(1).unique()) > 6 * len(views)
    cells = [math.ceil(h / 32) * math.ceil(w / 32) for h, w in inner]  # of the coarsest map
    assert (levels == 2).sum() <= 3 * 2 * 3 * sum(cells) and (levels == 1).sum() <= 4 * 3 * 2 * 3 * sum(cells)


# ----------------------------------------------------------------------------------------------------------- freezing


def take_steps(model, steps=1):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for seed in range(steps):
        optimiser.zero_grad()
        sum(model.loss(pixels(2, seed=seed), *targets(SOME)).values()).backward()
        optimiser.step()


def test_a_frozen_backbone_stands_still_and_stays_at_home():
    model = tiny()
    take_steps(model)
    model.freeze_backbone()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    take_steps(model, 2)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("backbone."), key
    assert set(model.exchanged()) == {k for k in before if not k.startswith("backbone.")}
    twin = clone(model)
    assert twin.backbone is model.backbone and twin.neck is not model.neck
    model.unfreeze_backbone()
    assert not model.frozen and set(model.exchanged()) == set(before)
    take_steps(model)
    for key, value in model.state_dict().items():  # parameters and statistics move again
        assert not torch.equal(value, before[key]), key


def test_without_the_backbone_a_message_is_about_two_fifths():
    model = yolo.build(2, (64, 64), torch_rng_for(0, "weights"), frozen=True)
    state = model.state_dict()
    sent = sum(state[k].numel() for k in model.exchanged())
    # van Bommel 2021 counts 5.7 MB of 14.017 MB (half precision)
    assert sent * 2 / 1e6 == pytest.approx(5.7, abs=0.2)
    assert sum(v.numel() for v in state.values()) * 2 / 1e6 == pytest.approx(14.017, abs=0.2)
    assert model.frozen and not any(p.requires_grad for p in model.backbone.parameters())
    model.train()
    assert not model.backbone.training and model.neck.training
    model.unfreeze_backbone()
    assert model.backbone.training and all(p.requires_grad for p in model.parameters())


def test_a_frozen_backbones_maps_may_be_cached_but_not_seen_in_other_views():
    model, x = lively(frozen=True), pixels(2)
    maps = model.features(x)
    options = {"score_above": 0.3, "top": 20}
    same_detections(model.predict(maps, **options), model.predict(x, **options))
    for views in (((1.0, True),), yolo.VIEWS):
        with pytest.raises(ValueError, match="need pixels, but these inputs are cached"):
            model.predict(maps, views=views)
    with pytest.raises(ValueError, match="this detector's backbone is trained"):
        lively().predict(maps)
    model.train()
    cached, plain = (sum(model.loss(i, *targets(SOME)).values()).item() for i in (maps, x))
    assert cached == pytest.approx(plain, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- learning


def fitted(scenes, steps, norm="group", **recipe):
    model = tiny(size=(64, 64), norm=norm)
    recipe = TrainingConfig.of(**({"batch": 8, "lr": 3e-3, "flip": 0.0} | recipe))
    rows = list(
        training.fit(
            model, scenes.images, scenes.labels, recipe, training.LocalTask(torch_rng_for(0, "fit"), iterations=steps)
        )
    )
    return model, rows


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_training_lowers_the_loss_and_is_the_same_each_time(norm):
    scenes = data.digit_scenes(20, 1, (64, 64), classes=3)[0]
    runs = [fitted(scenes, 40, norm) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    state, again = (model.state_dict() for model, _ in runs)
    assert all(torch.equal(state[k], again[k]) for k in state)
    first, last = runs[0][1][0], runs[0][1][-1]
    # objectness aims at the IoU, a target that rises while boxes improve: it is no measure of progress at first
    assert last["box"] < 0.8 * first["box"] and last["classification"] < 0.97 * first["classification"]


def test_bfloat16_on_a_cpu_trains_and_stays_near_float32():
    scenes = data.digit_scenes(8, 1, (64, 64), classes=3)[0]
    (_, full), (model, half) = (fitted(scenes, 3, amp=amp) for amp in (False, True))
    assert half[-1]["loss"] != full[-1]["loss"] and half[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_few_images_are_learned_by_heart():
    scenes = data.digit_scenes(4, 1, (64, 64), classes=3)[0]
    model, rows = fitted(scenes, 150, batch=4)
    found = training.predict(model, scenes.images)
    assert metrics.evaluate(found, scenes.labels, scenes.class_names)["ap50"] > 0.9
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
