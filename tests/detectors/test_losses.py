"""Losses by hand, against exact fractions, loops and PyTorch's own, with their gradients."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from detector_cases import NoWaiting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck

from fedal_utils.detectors import losses
from fedal_utils.seeding import torch_rng_for

fewer = settings(max_examples=50)  # of up to eight rows each
TARGET = (0, 0, 4, 4)

# name: box against TARGET, Extended IoU, Efficient IoU loss. Area of TARGET 16, its centre (2, 2).
# Efficient: 1 - IoU + rho2 / (cw2 + ch2) + (w - 4)2 / cw2 + (h - 4)2 / ch2. All enclosing boxes begin at (0, 0).
BY_HAND = {
    # 2 x 1 inside: intersection 2, union 16. Enclosing 4 x 4; centre (2, 1.5): rho2 1/4 of 32; sides 4/16 + 9/16
    "nested": ((1, 1, 3, 2), 1 / 8, 7 / 8 + 1 / 128 + 4 / 16 + 9 / 16),
    # 4 x 6: intersection 2 x 3 = 6, union 16 + 24 - 6 = 34. Enclosing 6 x 7; centre (4, 4): rho2 8 of 85; 0 + 4/49
    "crossing": ((2, 1, 6, 7), 6 / 34, 28 / 34 + 8 / 85 + 4 / 49),
    # 2 x 3, common edge x = 4: (4 - 4)(4 + 1) = 0. Enclosing 6 x 4; centre (5, 2.5): rho2 37/4 of 52; 4/36 + 1/16
    "touching": ((4, 1, 6, 4), 0, 1 + 37 / 208 + 4 / 36 + 1 / 16),
    # 2 x 3, gap 2 in x: (4 - 6)(4 + 1) = -10, U 16 + 6 + 10. Enclosing 8 x 4; centre (7, 2.5): 101/4 of 80; 4/64 + 1/16
    "x disjoint": ((6, 1, 8, 4), -10 / 32, 1 + 101 / 320 + 4 / 64 + 1 / 16),
    # 2 x 5, gap 1 in y: (3 + 1)(4 - 5) = -4, U 16 + 10 + 4. Enclosing 4 x 10; centre (2, 7.5): 121/4 of 116; 4/16 + .01
    "y disjoint": ((1, 5, 3, 10), -4 / 30, 1 + 121 / 464 + 4 / 16 + 1 / 100),
    # 2 x 3: 2 (4 x 4 - 5 x 6) = -28, U 16 + 6 + 28. Enclosing 7 x 9; centre (6, 7.5): 185/4 of 130; 4/49 + 1/81
    "both disjoint": ((5, 6, 7, 9), -28 / 50, 1 + 185 / 520 + 4 / 49 + 1 / 81),
}
SMOOTH = [name for name in BY_HAND if name != "touching"]  # a kink of both formulas
CLOSE = (0.5, 0.25, 40.125, 40.5)  # against 10 x TARGET: 1 - IoU is 0.034, in the quadratic part of the smoothed loss

BOX_LOSSES = {"efficient": losses.efficient_iou_loss, "extended": losses.extended_iou_loss}
BOX_LOSSES["sides"] = lambda boxes, targets: losses.side_likelihood_loss(boxes, targets, *unit_sides(boxes))


def rows(*boxes, dtype=torch.float64):
    return torch.tensor(boxes, dtype=dtype).reshape(-1, 4)


def leaf(*boxes, dtype=torch.float64):
    return rows(*boxes, dtype=dtype).requires_grad_()


def unit_sides(boxes):
    """Deviations (N, 4) and sizes (N, 2) for the likelihood where they do not matter."""
    return torch.full_like(boxes, 0.5), torch.full_like(boxes[:, :2], 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BY_HAND)
def test_both_eious_notes_5_1_by_hand(name, dtype):
    box, extended, efficient = BY_HAND[name]
    boxes, targets = rows(box, dtype=dtype), rows(TARGET, dtype=dtype)
    tight = 4 * torch.finfo(dtype).eps
    assert losses.extended_iou(boxes, targets).item() == pytest.approx(extended, rel=tight, abs=tight)
    assert losses.efficient_iou_loss(boxes, targets).item() == pytest.approx(efficient, rel=tight)
    # z = 1 - EIoU >= .8: with s = .1 the loss is z - .05, with s = 2 it is z^2 / 4
    z = 1 - extended
    assert losses.extended_iou_loss(boxes, targets).item() == pytest.approx(z - 0.05, rel=tight)
    assert losses.extended_iou_loss(boxes, targets, smooth=2.0).item() == pytest.approx(z * z / 4, rel=tight)


def test_side_likelihood_notes_5_2_by_hand():
    # IoU 7 * 8 / 80 = .7. Errors: -1/10, 0, 0, 2/20. left .01 / .02 = 1/2, bottom .01 / .08 = 1/8; ln(.1 * 1 * .5 * .2)
    boxes, targets, sizes = rows((1, 0, 8, 8)), rows((0, 0, 8, 10)), torch.tensor([[10.0, 20.0]]).double()
    deviations = rows((0.1, 1.0, 0.5, 0.2))
    found = losses.side_likelihood_loss(boxes, targets, deviations, sizes)
    assert found.item() == pytest.approx(0.7 * (0.625 + math.log(0.01)), rel=1e-12)


def ratio(part, whole):
    return Fraction(part, whole) if whole else Fraction(0)


def exact_efficient(a, b):
    """Efficient IoU loss of two integer boxes as a fraction; 0 / 0 is 0."""
    w, h, w2, h2 = a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]
    both = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    cw, ch = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    rho2 = Fraction((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2, 4)
    iou = ratio(both, w * h + w2 * h2 - both)
    return 1 - iou + ratio(rho2, cw**2 + ch**2) + ratio((w - w2) ** 2, cw**2) + ratio((h - h2) ** 2, ch**2)


def exact_extended(a, b):
    """Extended IoU of two integer boxes as a fraction, by the one formula of the notes, 5.1; 0 / 0 is 0."""
    ox, oy = min(a[0], b[0]), min(a[1], b[1])
    ax, ay = max(a[0], b[0]) - ox, max(a[1], b[1]) - oy
    ex, ey = min(a[2], b[2]) - ox, min(a[3], b[3]) - oy
    both = ex * ey + min(ax, ex) * min(ay, ey) - ax * max(ay, ey) - max(ax, ex) * ay
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return ratio(both, union)


def boxes_of(sides):
    corner = st.integers(-30, 30)
    return st.tuples(corner, corner, sides, sides).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


real, with_empty_ones = (boxes_of(st.integers(*sides)) for sides in ((1, 40), (0, 5)))
pairs, more = (st.lists(st.tuples(box, box), min_size=1, max_size=8) for box in (real, with_empty_ones))


@fewer
@given(st.one_of(pairs, more))
def test_both_eious_equal_exact_fractions(some):
    for dtype, tight in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        boxes, targets = rows(*(a for a, _ in some), dtype=dtype), rows(*(b for _, b in some), dtype=dtype)
        for found, exact in (
            (losses.efficient_iou_loss(boxes, targets), exact_efficient),
            (losses.extended_iou(boxes, targets), exact_extended),
        ):
            assert found.dtype == dtype and found.shape == (len(some),)
            assert found.tolist() == pytest.approx([float(exact(a, b)) for a, b in some], abs=tight)


@fewer
@given(pairs)
def test_equal_boxes_have_loss_zero_to_the_last_bit(some):
    for dtype in (torch.float32, torch.float64):
        boxes = rows(*(a for a, _ in some), dtype=dtype) / 7  # not representable: rounded as real boxes are
        for name in ("efficient", "extended"):
            assert not BOX_LOSSES[name](boxes, boxes.clone()).any(), name
        assert (losses.extended_iou(boxes, boxes.clone()) == 1).all()
        still = boxes.requires_grad_()
        assert not grad(losses.extended_iou_loss(still, boxes.detach().clone()).sum(), still)[0].any()


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_both_eious_are_right(name):
    boxes, targets = leaf(BY_HAND[name][0]), leaf(TARGET)
    assert gradcheck(losses.efficient_iou_loss, (boxes, targets)) and gradcheck(losses.extended_iou, (boxes, targets))


@pytest.mark.parametrize("name", ["nested", "crossing", "close"])
def test_the_gradient_of_the_likelihood_is_that_with_a_constant_weight(name):
    targets = rows(TARGET) if name != "close" else rows([10 * x for x in TARGET])
    boxes = leaf(CLOSE if name == "close" else BY_HAND[name][0])
    deviations, sizes = leaf((0.3, 0.7, 1.1, 0.2)), torch.tensor([[5.0, 7.0]]).double()

    # by hand: the constant IoU times -error / (size s^2), and times (s^2 - error^2) / s^3
    iou = losses.extended_iou(boxes, targets).detach()  # the IoU where boxes overlap
    errors = (targets - boxes).detach() / sizes.repeat(1, 2)
    s = deviations.detach()
    wanted = (-errors / (sizes.repeat(1, 2) * s**2), (s**2 - errors**2) / s**3)
    found = grad(losses.side_likelihood_loss(boxes, targets, deviations, sizes).sum(), (boxes, deviations))
    for slope, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(slope, iou * plain, rtol=1e-12, atol=1e-12)


POINT, LINE, WALL = (1, 2, 1, 2), (0, 2, 4, 2), (2, 0, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("box", "target", "extended", "efficient"),
    [
        (POINT, POINT, 0, 1),  # nothing over nothing is 0
        (LINE, LINE, 0, 1),
        (LINE, WALL, 0, 3),  # a cross: enclosing 4 x 4, one centre, sides 1 + 1
        (POINT, LINE, 0, 1 + 1 / 16 + 1),  # on it: enclosing 4 x 0, centre 1 off
        (POINT, (4, 6, 4, 6), -1, 2),  # apart: 1 + the whole diagonal
        (POINT, (1, 6, 1, 6), 0, 2),  # apart, one above the other: I = (0 + 0)(0 - 4)
        (POINT, TARGET, 0, 1 + 1 / 32 + 2),
        (TARGET, POINT, 0, 1 + 1 / 32 + 2),
        ((8, 0, 8, 4), TARGET, -(4 * 4) / (16 + 16), 1 + 36 / 80 + 16 / 64),  # the wall x = 8: I = (4 - 8)(4 + 0)
        ((1e-30, 0, 2e-30, 1e-30), (0, 0, 0, 0), 0, 1),  # too small to be told from nothing in float32
    ],
)
def test_boxes_without_area_are_defined_and_never_nan(box, target, extended, efficient, dtype):
    boxes, targets = leaf(box, dtype=dtype), leaf(target, dtype=dtype)
    if box[0] != 1e-30 or dtype == torch.float32:
        assert losses.extended_iou(boxes, targets).item() == pytest.approx(extended, abs=1e-6)
        assert losses.efficient_iou_loss(boxes, targets).item() == pytest.approx(efficient, abs=1e-6)
    for name, loss in BOX_LOSSES.items():
        found = loss(boxes, targets)
        assert torch.isfinite(found).all(), name
        assert all(torch.isfinite(slope).all() for slope in grad(found.sum(), (boxes, targets))), name
    assert losses.side_likelihood_loss(boxes, targets, *unit_sides(boxes)).item() == 0


def crowding(*boxes):
    """Of one image, beside one that is all padding."""
    found = losses.crowding(torch.stack([rows(*boxes)] * 2), torch.tensor([[True], [False]]).expand(2, len(boxes)))
    assert not found[1].any()
    return found[0].tolist()


def test_crowding_notes_5_3_by_hand():
    # b overlaps a and c; a and c only touch (edge x = 4); d stands alone: 1/3, 2/3, 1/3, 0 of three others
    a, b, c, d = (0, 0, 4, 4), (2, 2, 6, 6), (4, 0, 8, 4), (20, 20, 30, 30)
    assert crowding(a, b, c, d) == pytest.approx([1 / 3, 2 / 3, 1 / 3, 0])
    assert crowding(a) == [0]
    assert crowding(a, a) == [1, 1]  # two objects in one place
    assert crowding(a, POINT, POINT) == [0, 0, 0]  # 0 over 16, 0 over 0
    # padding is nobody's neighbour and counts for no other
    found = losses.crowding(rows(a, b, c, d)[None], torch.tensor([[True, True, False, True]]))
    assert found[0, [0, 1, 3]].tolist() == pytest.approx([1 / 2, 1 / 2, 0])


@fewer
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.floats(0, 10))
def test_emphasis_has_mean_one_and_keeps_the_order(values, strength):
    weights = losses.emphasis_weights(torch.tensor(values, dtype=torch.float64), strength)
    assert weights.mean().item() == pytest.approx(1, abs=1e-12) and (weights > 0).all()
    ordered = weights[torch.tensor(values).argsort(stable=True)]
    assert (ordered.diff() >= 0).all()
    counted = torch.arange(2 * len(values)) % 2  # every other row is padding: the others keep their weights
    spread = torch.tensor(values, dtype=torch.float64).repeat_interleave(2)
    masked = losses.emphasis_weights(spread, strength, counted)
    torch.testing.assert_close(masked[1::2], weights, rtol=1e-12, atol=0)


THREE = torch.tensor([[math.log(2), math.log(3), math.log(5)], [0, 0, 0]], dtype=torch.float64)  # exp: 2, 3, 5; 1, 1, 1


def random_batch(images=5, classes=4):
    """logits (B, C) that need a gradient, labels (B,), counts (C,) > 0."""
    rng = torch_rng_for(0, "batch", images, classes)
    logits = 3 * torch.randn(images, classes, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, classes, (images,), generator=rng)
    return logits.requires_grad_(), labels, torch.randint(1, 30, (classes,), generator=rng)


def test_balanced_softmax_by_hand():
    # n = 4, 2, 0. Image 0, label 0: 4 * 2 / (4 * 2 + 2 * 3) = 4 / 7; image 1, label 1: 2 / (4 + 2) = 1 / 3
    labels, counts = torch.tensor([0, 1]), torch.tensor([4, 2, 0])
    found = losses.balanced_cross_entropy(THREE, labels, counts)
    assert found.shape == () and found.item() == pytest.approx((math.log(7 / 4) + math.log(3)) / 2, rel=1e-12)
    # plain: 2 / 10 and 1 / 3; and the first image alone
    assert losses.balanced_cross_entropy(THREE, labels, None).item() == pytest.approx(math.log(15) / 2, rel=1e-12)
    only = losses.balanced_cross_entropy(THREE, labels, counts, torch.tensor([True, False]))
    assert only.item() == pytest.approx(math.log(7 / 4), rel=1e-12)


def test_equal_counts_are_pytorchs_cross_entropy_in_value_and_gradient():
    logits, labels, counts = random_batch()
    for n in (None, torch.full_like(counts, 12), torch.full(counts.shape, 0.25)):
        found, wanted = losses.balanced_cross_entropy(logits, labels, n), F.cross_entropy(logits, labels)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        slopes = [grad(value, logits, retain_graph=True)[0] for value in (found, wanted)]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)


def test_what_stands_in_padding_does_not_matter():
    logits, labels, counts = random_batch()
    counts[0], labels[labels == 0] = 0, 1
    valid = torch.tensor([True] * 3 + [False] * 2)
    want = losses.balanced_cross_entropy(logits[:3], labels[:3], counts)
    assert gradcheck(lambda x: losses.balanced_cross_entropy(x, labels, counts, valid), (logits,))
    for rubbish, label in ((math.nan, -1), (math.inf, 99), (0.0, 0)):
        padded = logits.detach().clone()
        padded[3:], labels[3:] = rubbish, label
        padded.requires_grad_()
        found = losses.balanced_cross_entropy(padded, labels, counts, valid)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
        slope = grad(found, padded)[0]
        assert torch.isfinite(slope).all() and not slope[3:].any()
        assert not slope[:, 0].any()  # a class without labels
    # no labels at all: the seat of a client that does not train
    loss = losses.balanced_cross_entropy(padded, labels, torch.zeros_like(counts), torch.zeros_like(valid))
    assert loss == 0 and not grad(loss, padded)[0].any()


def test_compensation_weights_by_hand():
    # 1 / 1, 1 / 2, 1 / 4: of 7 / 4 in all; the class without labels gets nothing
    found = losses.compensation_weights(torch.tensor([1, 2, 0, 4], dtype=torch.float64))
    assert found.tolist() == pytest.approx([4 / 7, 2 / 7, 0, 1 / 7], rel=2e-6)
    whole = [losses.compensation_weights(torch.tensor(n)) for n in ([0, 0, 0, 0], [0, 9, 0, 0])]
    assert whole[0].dtype == torch.float32 and [w.tolist() for w in whole] == [[0, 0, 0, 0], [0, 1, 0, 0]]


def test_compensation_loss_by_hand():
    # teacher q = (1/2, 1/4, 1/4), student p = (1/4, 1/4, 1/2): 1/2 ln 2 - 1/4 ln 2 = 1/4 ln 2, over C = 3.
    # Weights .6, .2; the second image agrees: 0. Mean of two images: .6 / 4 ln 2 / 3 / 2
    student = torch.tensor([[1.0, 1, 2], [1, 2, 3]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[2.0, 1, 1], [1, 2, 3]], dtype=torch.float64).log().requires_grad_()
    found = losses.compensation_loss(student, teacher, torch.tensor([0.6, 0.2]))
    assert found.shape == () and found.item() == pytest.approx(0.6 * math.log(2) / 4 / 3 / 2, rel=1e-7)
    found.backward()
    assert teacher.grad is None
    # w (p - q) / (C B)
    wanted = torch.tensor([[-0.25, 0, 0.25], [0, 0, 0]], dtype=torch.float64) * 0.6 / 6
    torch.testing.assert_close(student.grad, wanted, rtol=1e-6, atol=1e-15)


def test_ranking_loss_1905_03677_eq_2_by_hand():
    # Images 1 and 2 have equal losses: no pair. (0, 1): l0 < l1, max(0, (0 - 1.5) + 1) = 0. (0, 2): (0 - .4) + 1 = .6
    predicted = torch.tensor([0.0, 1.5, 0.4], dtype=torch.float64, requires_grad=True)
    loss = torch.tensor([2.0, 5.0, 5.0], dtype=torch.float64, requires_grad=True)
    found = losses.ranking_loss(predicted, loss)
    assert found.shape == () and found.item() == pytest.approx(0.6 / 2, rel=1e-12)  # over two pairs, not three
    found.backward()
    assert predicted.grad.tolist() == [0.5, 0.0, -0.5] and loss.grad is None  # a step lowers p0 and raises p2
    # margin 2: (0, 1) .5, (0, 2) 1.6
    assert losses.ranking_loss(predicted, loss, margin=2.0).item() == pytest.approx((0.5 + 1.6) / 2, rel=1e-12)
    # the wrong way round: 1.5 + 1 and .4 + 1
    assert losses.ranking_loss(-predicted, loss).item() == pytest.approx((2.5 + 1.4) / 2, rel=1e-12)


@pytest.mark.parametrize("case", range(5))
def test_ranking_loss_equals_torchs_margin_loss_over_all_pairs(case):
    rng = torch_rng_for(case, "ranking")
    predicted = torch.randn(7, generator=rng, dtype=torch.float64, requires_grad=True)
    loss = torch.randint(0, 5, (7,), generator=rng)  # of seven in 0..4, some are equal
    pairs = [(i, j) for i in range(7) for j in range(i + 1, 7) if loss[i] != loss[j]]
    assert 0 < len(pairs) < 21
    first, second = (predicted[list(side)] for side in zip(*pairs, strict=True))
    sign = torch.tensor([1.0 if loss[i] > loss[j] else -1.0 for i, j in pairs])
    wanted = F.margin_ranking_loss(first, second, sign, margin=0.7)
    found = losses.ranking_loss(predicted, loss, margin=0.7)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(grad(x, predicted, retain_graph=True)[0] for x in (found, wanted)))
    assert gradcheck(lambda p: losses.ranking_loss(p, loss, margin=0.7), (predicted,))


def test_what_is_not_a_number_stays_none_and_no_device_is_waited_for():
    fine, broken = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, math.nan, 4.0])
    assert losses.ranking_loss(broken, fine).isnan()
    # the pair that is left is (0, 2): (4 - 1) is more than the margin of 1, and less than one of 5, by 2
    assert losses.ranking_loss(fine, broken) == 0 and losses.ranking_loss(fine, broken, margin=5.0) == 2
    bad, good = rows((0, 0, math.nan, 4)), rows(TARGET)
    assert all(loss(bad, good).isnan() for loss in BOX_LOSSES.values())
    unseen = losses.balanced_cross_entropy(THREE, torch.tensor([0, 2]), torch.tensor([4, 2, 0]))
    assert unseen == math.inf
    logits, labels, counts = (t.detach() for t in random_batch())
    with NoWaiting():
        losses.balanced_cross_entropy(logits, labels, counts, torch.ones_like(labels, dtype=torch.bool))
        losses.compensation_loss(logits, logits, torch.ones(5))
        losses.ranking_loss(fine, fine)
        for loss in BOX_LOSSES.values():
            loss(good, good)
