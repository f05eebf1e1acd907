"""YOLO's cells, targets and loss against plain loops and by hand."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from detector_cases import targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import complete_box_iou_loss

from fedal_utils.detectors.losses import complete_iou_loss
from fedal_utils.detectors.yolo_loss import cells_of, claim_cells, decode, yolo_loss
from fedal_utils.seeding import torch_rng_for

COCO_ANCHORS = [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]]
SIZE = (64, 96)
CELLS = cells_of(SIZE, torch.tensor(COCO_ANCHORS, dtype=torch.float32) * 0.25)


def test_decoding_one_cell_by_hand():
    assert CELLS.grid.shape == (378, 5) and CELLS.counts == (288, 72, 18)
    assert CELLS.levels.tolist() == [[12, 8, 8, 0], [6, 4, 16, 288], [3, 2, 32, 360]]
    row = 288 + (2 * 6 + 5) * 3 + 1  # level 1: row 2, column 5, second anchor: 62 x 45, a quarter of it
    assert CELLS.grid[row, 2:].tolist() == [16, 15.5, 11.25]
    raw = torch.tensor([0.0, math.log(3), math.log(1 / 3), 0.0, 7.0])  # sigmoids 0.5, 0.75, 0.25, 0.5
    x, y = (2 * 0.5 - 0.5 + 5) * 16, (2 * 0.75 - 0.5 + 2) * 16  # 88, 48
    w, h = (2 * 0.25) ** 2 * 15.5, (2 * 0.5) ** 2 * 11.25  # 3.875, 11.25
    found = decode(raw, CELLS.grid[row]).tolist()
    assert found == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=1e-4)
    reach = [decode(torch.tensor([v, 0.0, 0, 0]), CELLS.grid[row])[[0, 2]].mean().item() for v in (-50.0, 50.0)]
    assert reach == pytest.approx([4.5 * 16, 6.5 * 16])  # half a cell beyond either side


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
                # the cell left of it, if the centre is more than a cell from the image's left border; likewise above
                near_x = 0 < left - cx < stride / 2 or 0 <= cx - right < stride / 2 and cx > stride
                near_y = 0 < top - cy < stride / 2 or 0 <= cy - bottom < stride / 2 and cy > stride
                if (in_x and in_y) or (near_x and in_y) or (in_x and near_y):
                    cells.append((row, column))
            for a in range(3):
                w, h = anchors[level][a]
                if w < 4 * (x2 - x1) and x2 - x1 < 4 * w and h < 4 * (y2 - y1) and y2 - y1 < 4 * h:
                    claims += [(i, k, level, a, row, column) for row, column in cells]
    return claims


def our_claims(boxes, classes, ignore, cells, size):
    index, claimed = claim_cells(boxes, classes, ignore, cells)
    assert bool((index[~claimed] == 0).all())
    found = []
    for i, k, level, a, slot in claimed.nonzero().tolist():
        place = index[i, k, level, a, slot].item() - sum(cells.counts[:level])
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
    cells = cells_of(SIZE, torch.tensor(COCO_ANCHORS) * scale)
    want = oracle_claims(boxes, classes, ignore, cells.anchors.tolist(), SIZE)
    assert sorted(our_claims(boxes, classes, ignore, cells, SIZE)) == sorted(want)


def claimed_cells(box, level=0):
    found = our_claims(*targets([[(box, 1, False)]]), CELLS, SIZE)
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
    # exactly one cell from the left or upper border, 1.0: no neighbour there (released code: strictly greater than 1);
    # a hair more, and there is one
    assert claimed_cells(at(8, 42)) == {(5, 1), (4, 1)} and claimed_cells(at(27, 8)) == {(1, 3), (1, 2)}
    assert claimed_cells(at(8, 8)) == {(1, 1)}
    assert claimed_cells(at(8.01, 42)) == {(5, 1), (5, 0), (4, 1)}
    assert claimed_cells(at(27, 8.01)) == {(1, 3), (1, 2), (0, 3)}
    # one cell from the right or lower border the neighbour is the one before
    assert claimed_cells(at(88, 42)) == {(5, 11), (5, 10), (4, 11)}
    # 10 x 13 at a quarter is 2.5 x 3.25: four times that is one too much
    found = (our_claims(*targets([[(at(27, 42, w, 6), 1, False)]]), CELLS, SIZE) for w in (10, 9.75))
    wide, less = ({(level, a) for _, _, level, a, _, _ in claims} for claims in found)
    assert less - wide == {(0, 0)} and wide < less


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
        high, wide = size[0] // stride, size[1] // stride
        quality, box_terms, class_terms = {}, [], []
        for i, k, _, a, r, c in (claim for claim in claims if claim[2] == level):
            out = raw[i, start + (r * wide + c) * 3 + a]
            s = sigmoid(out)
            cx, cy = (2 * s[0] - 0.5 + c) * stride, (2 * s[1] - 0.5 + r) * stride
            w, h = (2 * s[2]) ** 2 * anchors[level][a][0], (2 * s[3]) ** 2 * anchors[level][a][1]
            score = oracle_ciou((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), boxes[i, k])
            box_terms.append(1 - score)
            quality[i, r, c, a] = max(quality.get((i, r, c, a), 0.0), score, 0.0)
            class_terms += [oracle_bce(out[5 + n], float(n + 1 == classes[i, k])) for n in range(number)]
        errors = []
        for i, r, c, a in product(range(images), range(high), range(wide), range(3)):
            x, y = (c + 0.5) * stride, (r + 0.5) * stride
            rows = zip(boxes[i], classes[i], ignore[i], strict=True)
            hidden = any(flag and n > 0 and b[0] <= x <= b[2] and b[1] <= y <= b[3] for b, n, flag in rows)
            if (i, r, c, a) in quality or not hidden:
                out = raw[i, start + (r * wide + c) * 3 + a, 4]
                errors.append(oracle_bce(out, quality.get((i, r, c, a), 0.0)))
        parts["box"] += gains[0] * np.mean(box_terms) if box_terms else 0.0
        parts["objectness"] += gains[1] * (4.0, 1.0, 0.4)[level] * np.mean(errors)
        parts["classification"] += gains[2] * number / 80 * np.mean(class_terms) if class_terms and number > 1 else 0.0
        start += high * wide * 3
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
    ours, anchors = yolo_loss(raw, *target, CELLS, (0.05, 1.5, 0.5)), CELLS.anchors.tolist()
    want = oracle_loss(raw.double().numpy(), *(t.numpy() for t in target), anchors, SIZE, (0.05, 1.5, 0.5))
    for name, value in want.items():
        assert ours[name].item() == pytest.approx(value, rel=1e-4), name
    assert want["box"] > 0.05 and want["objectness"] > 1 and (want["classification"] > 0.01) == (classes > 1)


def test_complete_iou_of_equation_8_equals_the_oracle_and_torchvisions():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 20, (400, 2, 2))
    boxes = np.concatenate([low, low + rng.uniform(1, 20, (400, 2, 2))], axis=-1)
    wanted = [1 - oracle_ciou(a, b) for a, b in boxes]
    pairs = torch.tensor(boxes)
    assert complete_iou_loss(*pairs.unbind(1)).numpy() == pytest.approx(np.array(wanted), abs=1e-6)
    assert max(wanted) > 1 > min(wanted)
    found, slopes = [], []
    for loss in (complete_iou_loss, complete_box_iou_loss):
        first = pairs[:, 0].float().requires_grad_()
        found.append(loss(first, pairs[:, 1].float()))
        slopes.append(torch.autograd.grad(found[-1].sum(), first)[0])
    assert torch.equal(*found) and torch.equal(*slopes)  # to the bit


def test_a_cell_that_two_boxes_claim_aims_at_the_better_one_in_any_order():
    raw, boxes, classes, ignore = loss_case(0)
    parts = []
    for order in ([0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [4, 3, 2, 1, 0]):
        own = raw.clone().requires_grad_()
        loss = yolo_loss(own, boxes[:, order], classes[:, order], ignore[:, order], CELLS)
        loss["objectness"].backward()
        parts.append((loss["objectness"].item(), own.grad))
    for value, grad in parts[1:]:
        assert value == pytest.approx(parts[0][0], rel=1e-6) and torch.allclose(grad, parts[0][1], atol=1e-8)
    # the target is no path for gradients: objectness moves objectness only
    assert bool((parts[0][1][..., :4] == 0).all()) and bool((parts[0][1][..., 4] != 0).any())


def test_ignored_boxes_are_no_targets():
    raw, boxes, classes, _ = loss_case(1)

    def loss(*target):
        return {k: v.item() for k, v in yolo_loss(raw, *target, CELLS).items()}

    # all ignored: neither a box nor a class to learn, and what lies in them does not count as background either
    hidden = loss(boxes, classes, classes > 0)
    assert hidden["box"] == hidden["classification"] == 0
    assert hidden["objectness"] != pytest.approx(loss(boxes * 0, classes * 0, classes < 0)["objectness"], rel=1e-3)


def test_an_output_of_no_size_has_a_finite_loss_and_gradient():
    """A side of 1e-11 pixels would vanish in its corners, and CIoU would compare the shapes 0 / 0 and target."""
    raw = torch.full((1, len(CELLS.grid), 8), -15.0, requires_grad=True)
    boxes, classes = torch.tensor([[[24.2, 9.8, 44.8, 39.5]]]), torch.tensor([[1]])
    parts = yolo_loss(raw, boxes, classes, classes < 0, CELLS)
    sum(parts.values()).backward()
    assert all(math.isfinite(part) for part in parts.values()) and bool(raw.grad.isfinite().all())
