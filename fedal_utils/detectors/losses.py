"""Losses that torch or torchvision lack: CIoU and two EIoUs, likelihood per side, crowding weights, classes, ranking.

Boxes and targets are (N, 4) xyxy pixels, row by row. No device is waited for; what is not a number stays none.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area

from .base import pairwise_iou


def complete_iou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU loss (...,) in [0, 3); Zheng et al. 2019 (1911.08287) eq. 8 to 11; torchvision's to the bit."""

    # Corners anew for each term: so gradients are added up in torchvision's order.
    (x1, y1, x2, y2), (x3, y3, x4, y4) = boxes.unbind(-1), targets.unbind(-1)
    left, top, right, bottom = torch.max(x1, x3), torch.max(y1, y3), torch.min(x2, x4), torch.min(y2, y4)
    both = torch.where((bottom > top) & (right > left), (right - left) * (bottom - top), 0.0)
    iou = both / ((x2 - x1) * (y2 - y1) + (x4 - x3) * (y4 - y3) - both + eps)
    (x1, y1, x2, y2), (x3, y3, x4, y4) = boxes.unbind(-1), targets.unbind(-1)
    width, height = torch.max(x2, x4) - torch.min(x1, x3), torch.max(y2, y4) - torch.min(y1, y3)
    between = ((x2 + x1) / 2 - (x3 + x4) / 2) ** 2 + ((y2 + y1) / 2 - (y3 + y4) / 2) ** 2
    loss = 1 - iou + between / (width**2 + height**2 + eps)
    (x1, y1, x2, y2), (x3, y3, x4, y4) = boxes.unbind(-1), targets.unbind(-1)
    shape = 4 / math.pi**2 * (torch.atan((x4 - x3) / (y4 - y3)) - torch.atan((x2 - x1) / (y2 - y1))) ** 2
    with torch.no_grad():
        alpha = shape / (1 - iou + shape + eps)
    return loss + alpha * shape


def efficient_iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Efficient IoU loss (N,) in [0, 3.25]; Zhang et al. 2021 (2101.08158), with the enclosing box' sides cw and ch.

    1 - IoU + rho^2 / (cw^2 + ch^2) + (w - w*)^2 / cw^2 + (h - h*)^2 / ch^2, where rho is the distance of the centres.
    """
    enclosing = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])  # (N, 2)
    between = ((boxes[:, :2] + boxes[:, 2:]) - (targets[:, :2] + targets[:, 2:])) / 2  # (N, 2) of the centres
    sides = (boxes[:, 2:] - boxes[:, :2]) - (targets[:, 2:] - targets[:, :2])  # (N, 2) differences
    distance = _ratio(between.square().sum(1), enclosing.square().sum(1))
    return 1 - extended_iou(boxes, targets).relu() + distance + _ratio(sides, enclosing).square().sum(1)


def extended_iou(boxes: Tensor, targets: Tensor) -> Tensor:
    """Extended IoU (N,) in (-1, 1]; Peng and Yu 2021 (IEEE TIP): IoU where boxes overlap, below 0 where they do not.

    I / (area + area* - I). From the enclosing box' corner, with a the larger start and e the smaller end along an axis,
    I = (ex - ax)(ey - ay) where both overlap, with + where that axis alone does, 2(ex ey - ax ay) where neither does.
    """
    corner = torch.minimum(boxes[:, :2], targets[:, :2])  # (N, 2)
    starts = torch.maximum(boxes[:, :2], targets[:, :2]) - corner
    ends = torch.minimum(boxes[:, 2:], targets[:, 2:]) - corner
    overlap = torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(
        boxes[:, :2], targets[:, :2]
    )  # or minus a gap
    width, height = overlap.relu().unbind(1)  # (N,) each
    # clamp's gradient at its bound differs between versions of PyTorch
    gap_x, gap_y = torch.where(overlap > 0, 0, overlap).unbind(1)  # <= 0
    reach_x, reach_y = (starts + ends).unbind(1)
    both = width * height + gap_x * reach_y + gap_y * reach_x  # the four cases of I in one line
    return _ratio(both, box_area(boxes) + box_area(targets) - both)


def extended_iou_loss(boxes: Tensor, targets: Tensor, smooth: float = 0.1) -> Tensor:
    """Smoothed Extended IoU loss (N,) in [0, 2 - smooth / 2); Peng and Yu 2021.

    z = 1 - Extended IoU: z^2 / (2 smooth) if z < smooth, else z - smooth / 2.
    """
    value = extended_iou(boxes, targets)
    return F.smooth_l1_loss(value, torch.ones_like(value), reduction="none", beta=smooth)


def side_likelihood_loss(boxes: Tensor, targets: Tensor, deviations: Tensor, sizes: Tensor) -> Tensor:
    """IoU-weighted Gaussian negative log-likelihood (N,) of left, top, right and bottom; it can be below 0.

    IoU * sum over sides of error^2 / (2 s^2) + ln s, with error = (target - box) / (w, h, w, h); the IoU is detached.
    deviations: (N, 4) s > 0. sizes: (N, 2) w, h of the proposals. After UAD (2006.15607); a reconstruction of HUALE's.
    """
    errors = (targets - boxes) / sizes.repeat(1, 2)  # (N, 4)
    variances = deviations.square()
    losses = 0.5 * (variances.log() + errors.square() / variances)
    return extended_iou(boxes, targets).relu().detach() * losses.sum(1)


def crowding(boxes: Tensor, real: Tensor) -> Tensor:
    """The share (B, K) of an image's other real boxes (B, K, 4) that overlap each, in [0, 1]; real (B, K) bool."""
    others = ~torch.eye(boxes.shape[1], dtype=torch.bool, device=boxes.device) & real[:, None]
    overlaps = (pairwise_iou(boxes, boxes) > 0) & others  # (B, K, K); 0 / 0 is NaN, and not > 0
    return overlaps.sum(-1).to(boxes.dtype) / (real.sum(1, keepdim=True) - 1).clamp(min=1)


def emphasis_weights(density: Tensor, strength: float, counted: Tensor | None = None) -> Tensor:
    """Weights (N,) with mean 1 of N foreground RoIs, larger where it is crowded: 1 + strength * density over its mean.

    density: (N,), see `crowding`. counted: (N,) 1 for foreground, else 0; None: all. A reconstruction of HUALE's.
    """
    weights = 1 + strength * density
    if counted is None:
        return weights / weights.mean()  # N = 0: empty over NaN is empty
    return weights / ((weights * counted).sum() / counted.sum().clamp(min=1)).clamp(min=1)


def balanced_cross_entropy(logits: Tensor, labels: Tensor, counts: Tensor | None, valid=None) -> Tensor:
    """Balanced softmax loss, for training only; Ren et al. 2020 (2007.10740), KAFAL's balanced classifier.

    Cross-entropy of logits (B, C) + ln n over the classes with n > 0. labels (B,) from 0; counts (C,) of the client's
    labels, None: plain cross-entropy; valid (B,) bool: images that count, without any the loss is 0.
    """
    logits = _at_least_float32(logits)
    if valid is not None:
        labels, logits = labels.masked_fill(~valid, 0), logits.masked_fill(~valid[:, None], 0)  # whatever stands there
    if counts is not None:
        present = counts > 0
        prior = torch.where(present, counts, 1).to(logits.dtype).log()
        present = present | ~present.any()  # a client without labels: its images do not count either
        logits = (logits + prior).masked_fill(~present, -torch.inf)
    each = -logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)  # (B,)
    if valid is None:
        return each.sum() / max(1, len(labels))
    return each.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def compensation_weights(counts: Tensor) -> Tensor:
    """Class weights (C,) of KAFAL's distillation (ICCV 2023, released code): the fewer labels, the larger.

    1 / (n + 1e-6) over its sum, over the classes with n > 0; 0 for the others, and all 0 without a label.
    """
    inverse = torch.where(counts > 0, 1 / (counts.double() + 1e-6), 0)
    total = inverse.sum()
    weights = inverse / torch.where(total > 0, total, 1)
    return weights.to(torch.promote_types(counts.dtype, torch.float32))


def compensation_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """KAFAL's knowledge-compensatory distillation, >= 0 (ICCV 2023, released code); 0 where both agree.

    mean_b w_b (1 / C) sum_c q_c (ln q_c - ln p_c), p and q softmaxes of the student's and the teacher's logits (B, C);
    the mean over classes is the released code's. weights (B,). No gradient flows to the teacher.
    """
    log_p, log_q = (_at_least_float32(logits).log_softmax(-1) for logits in (student, teacher.detach()))
    divergence = (log_q.exp() * (log_q - log_p)).mean(-1)  # (B,)
    return (weights * divergence).mean()


def ranking_loss(predicted: Tensor, loss: Tensor, margin: float = 1.0) -> Tensor:
    """How badly predicted losses (B,) order images as their true losses (B,) do; Yoo and Kweon 2019 (1905.03677) eq. 2.

    Mean over all pairs i < j of different loss of max(0, -sign(l_i - l_j) (p_i - p_j) + margin); the paper has B / 2.
    """
    predicted, loss = _at_least_float32(predicted), _at_least_float32(loss.detach())
    i, j = torch.triu_indices(len(loss), len(loss), 1, device=loss.device)  # B = 3: (0, 1), (0, 2), (1, 2)
    order = torch.sign(loss[i] - loss[j])
    each = F.relu(margin - order * (predicted[i] - predicted[j])) * order.abs()
    return each.sum() / order.abs().sum().clamp(min=1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole for |part| <= whole; `part` itself, as good as 0, where `whole` is too small to be divided by."""
    floor = math.sqrt(torch.finfo(whole.dtype).tiny)  # float32: 1e-19, so that no gradient overflows
    return part / torch.where(whole > floor, whole, 1)
