"""What strategies on two sets of detections share: IoU, matching one to one, Jensen-Shannon divergence in nats."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..data import Detections

LN2 = math.log(2)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions along the last axis (Lin 1991), 0 .. ln 2; zeros are fine."""
    entropy, p, q = torch.special.entr, p.double(), q.double()
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).sum(-1).clamp(0, LN2)


def match(plain: Detections, other: Detections, iou: float = 0.5) -> Tensor:
    """Pairs one-to-one, image by image, from the largest IoU of all pairs down to `iou`; ties: the lowest rows.

    Returns (N, T), the row of `other` of each plain box, -1 where none. How views are matched is *reconstructed*.
    """

    def pairs(boxes: Tensor, valid: Tensor, others: Tensor, valid_too: Tensor) -> Tensor:
        table = iou_of(boxes[:, :, None], others[:, None])  # (N, T, T2)
        table = torch.where(valid[:, :, None] & valid_too[:, None] & (table >= iou), table, -1.0)
        partner = torch.full(valid.shape, -1, device=valid.device)
        # A pair that is the best of its row and of its column is what the greedy rule would take sooner or later: all
        # of them at once, until none is left, gives the same pairs in a few rounds. max takes the first of equals.
        while table.numel():
            best, column = table.max(2)  # (N, T)
            rows = torch.arange(valid.shape[1], device=valid.device)
            image, row = ((best >= 0) & (table.argmax(1).gather(1, column) == rows)).nonzero(as_tuple=True)
            if not len(image):
                break
            partner[image, row] = column[image, row]
            table[image, row] = -1
            table[image, :, column[image, row]] = -1
        return partner

    size = plain.boxes.shape[1] * other.boxes.shape[1]
    return in_blocks(pairs, size, plain.boxes, plain.valid, other.boxes, other.valid)


def iou_of(a: Tensor, b: Tensor) -> Tensor:
    """IoU of (..., 4) xyxy boxes with (..., 4), as they broadcast, in float64; 0 where neither has an area."""
    (ax, ay, au, av), (bx, by, bu, bv) = a.double().unbind(-1), b.double().unbind(-1)
    width, height = torch.minimum(au, bu) - torch.maximum(ax, bx), torch.minimum(av, bv) - torch.maximum(ay, by)
    common = width.clamp_(min=0) * height.clamp_(min=0)
    union = (au - ax) * (av - ay) + (bu - bx) * (bv - by) - common
    return torch.where(union > 0, common / union, 0.0)


def in_blocks(work: Callable[..., Tensor], pairs: int, *tensors: Tensor) -> Tensor:
    """`work` on a few rows at a time, each a table of so many `pairs`: those of a whole pool fit in no cache."""
    rows = max(1, 2**17 // max(1, pairs))
    return torch.cat([work(*block) for block in zip(*(t.split(rows) for t in tensors), strict=True)])
