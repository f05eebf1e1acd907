"""Cells, targets and loss of YOLO; no shape depends on values, so that a step never waits for its device.

Raw outputs are (B, A, 5 + C): x, y, w, h, objectness, classes; A runs over levels (stride 8, 16, 32), rows, columns and
the three anchors of a cell, the anchor fastest. "From released code" marks what no paper states.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import take, with_a_column
from .losses import complete_iou_loss

STRIDES = (8, 16, 32)
MATCH_RATIO = 4.0  # a box and an anchor whose sides differ by this factor or more have nothing to do with each other
LEAST_HALF = 1e-3  # pixels: half a side; less is lost in the corners' rounding, and CIoU would be 0 / 0
BALANCE = (4.0, 1.0, 0.4)  # of the levels' objectness, finest first; from released code


class Cells(NamedTuple):
    """Where the A outputs of L levels with P anchors a cell stand in an image; see `cells_of`.

    The origin is half a cell left of and above the cell, so that a neighbouring cell can answer for an object.
    """

    anchors: Tensor  # (L, P, 2) width, height
    levels: Tensor  # (L, 4) int64: columns, rows, stride, number of outputs before it
    grid: Tensor  # (A, 5) pixels: origin x, origin y, stride, anchor width, anchor height
    counts: tuple[int, ...]  # outputs of each level


def cells_of(image_size: tuple[int, int], anchors: Tensor) -> Cells:
    """The cells of an image of (height, width), both multiples of 32, on the device of anchors (L, P, 2)."""
    parts, levels = [], []
    for stride, own in zip(STRIDES, anchors, strict=True):
        sides = (torch.arange(side // stride, device=anchors.device, dtype=anchors.dtype) for side in image_size)
        y, x = torch.meshgrid(*sides, indexing="ij")
        origin = torch.stack([(x - 0.5) * stride, (y - 0.5) * stride, torch.full_like(x, stride)], dim=-1)  # (h, w, 3)
        shape = (*x.shape, len(own))
        levels.append([x.shape[1], x.shape[0], stride, sum(map(len, parts))])
        parts.append(torch.cat([origin[:, :, None].expand(*shape, 3), own.expand(*shape, 2)], dim=-1).flatten(0, 2))
    return Cells(anchors, torch.tensor(levels, device=anchors.device), torch.cat(parts), tuple(map(len, parts)))


def decode(raw: Tensor, grid: Tensor) -> Tensor:
    """xyxy pixels of raw outputs (..., 4 or more): centre = (2 s - 0.5 + cell) stride, side = (2 s)^2 anchor.

    s: sigmoid of the output; grid: the rows of `Cells.grid` that belong to raw, (..., 5). From released code.
    """
    twice = 2 * raw[..., :4].sigmoid()
    centre = twice[..., :2] * grid[..., 2:3] + grid[..., :2]
    half = (twice[..., 2:].square() * grid[..., 3:] / 2).clamp(min=LEAST_HALF)
    return torch.cat([centre - half, centre + half], dim=-1)


def claim_cells(boxes: Tensor, classes: Tensor, ignore: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    """Which outputs each box claims: index into A and whether it does, both (B, K, L, P, 3); 0 where it does not.

    A box claims an anchor if neither side differs by `MATCH_RATIO` or more; of that anchor's level it claims the cell
    its centre lies in, and the neighbour beyond the nearer border in x and the one in y, if there is one. Example,
    centre (3.2, 5.9) in cells: claims (3, 5), (2, 5) and (3, 6). A border exactly as far as the other draws no
    neighbour, nor does one exactly a cell from the image's left or upper border, as in the released code.
    """
    anchors, levels = cells.anchors, cells.levels
    size, stride, first = levels[:, :2], levels[:, 2:3], levels[:, 3:]
    sides = boxes[..., 2:] - boxes[..., :2]  # (B, K, 2)
    ratio = sides[:, :, None, None] / anchors  # (B, K, L, P, 2)
    # Negated, so that a box that is not a number claims and its loss shows it; a plain < would drop it in silence.
    fits = ~(torch.maximum(ratio, 1 / ratio) >= MATCH_RATIO).any(-1)
    fits = fits & ((classes > 0) & ~ignore & ~(sides <= 0).any(-1))[..., None, None]  # (B, K, L, P)

    place = ((boxes[..., :2] + boxes[..., 2:]) / 2)[:, :, None] / stride  # (B, K, L, 2) centre in cells
    cell = torch.minimum(place.floor().long().clamp_(min=0), size - 1)
    beyond = place - cell - 0.5
    step = (beyond > 0).long() - (beyond < 0).long()  # towards the nearer border
    there = cell + step
    inside = (step != 0) & ~((step < 0) & (place <= 1)) & (there < size)  # (B, K, L, 2)
    x, y = cell.unbind(-1)
    columns, rows = torch.stack([x, there[..., 0], x], dim=-1), torch.stack([y, y, there[..., 1]], dim=-1)
    exists = torch.cat([torch.ones_like(inside[..., :1]), inside], dim=-1)  # (B, K, L, 3)
    per_cell = anchors.shape[1]
    index = first + (rows * size[:, :1] + columns) * per_cell  # (B, K, L, 3)
    claimed = fits[..., None] & exists[..., None, :]  # (B, K, L, P, 3)
    index = index[..., None, :] + torch.arange(per_cell, device=boxes.device)[:, None]
    return index * claimed, claimed


def yolo_loss(raw, boxes, classes, ignore, cells: Cells, weights=(0.05, 1.0, 0.5)) -> dict[str, Tensor]:
    """Box (CIoU, 1911.08287), objectness and class loss of raw outputs (B, A, 5 + C) float32.

    weights: of box, objectness, classes (the last for 80 classes: times C / 80; one class has no class loss).

    In each level the box and class losses are means over the claims of the batch, objectness is one over all outputs,
    towards the CIoU of the predicted box (0 where no box claims it, the largest where several do). Outputs that no box
    claims, in an ignored box, do not count. All is multiplied by B, as in the released code, whose lr is meant for it.
    """
    count, _, columns = raw.shape
    number = columns - 5
    boxes, classes, ignore = with_a_column(boxes, classes, ignore)
    index, claimed = claim_cells(boxes, classes, ignore, cells)
    of_level = claimed.flatten(3)  # (B, K, L, 3 P)
    index, claims = index.flatten(1), claimed.flatten(1)  # (B, R), R = K * L * 3 P
    claims_in_level = of_level.sum((0, 1, 3)).clamp(min=1)  # (L,)
    per_box = index.shape[1] // boxes.shape[1]

    def level_means(values: Tensor) -> Tensor:  # sum over levels of the means over claims; values (B, R)
        return ((values.view_as(of_level) * of_level).sum((0, 1, 3)) / claims_in_level).sum()

    own = take(raw, index)  # (B, R, 5 + C)
    target = boxes.float().repeat_interleave(per_box, dim=1)  # (B, R, 4)
    found = decode(own, cells.grid[index])
    # Where nothing is claimed the box is its own target: the 0 / 0 of a padding row would spoil the gradient.
    ciou_loss = complete_iou_loss(found, torch.where(claims[..., None], target, found.detach()))  # (B, R)
    box = level_means(ciou_loss)

    classification = raw.new_zeros(())
    if number > 1:
        one_hot = classes[..., None] == torch.arange(1, number + 1, device=classes.device)  # (B, K, C)
        one_hot = one_hot.to(raw.dtype).repeat_interleave(per_box, dim=1)
        wrong = F.binary_cross_entropy_with_logits(own[..., 5:], one_hot, reduction="none").mean(-1)
        classification = level_means(wrong)

    with torch.no_grad():
        quality = (1 - ciou_loss).clamp(min=0) * claims
        wanted = torch.zeros_like(raw[..., 4]).scatter_reduce(1, index, quality, "amax")  # in any order the same
        x, y = (cells.grid[:, :2] + cells.grid[:, 2:3]).T  # (A,) middles: origin + half a cell + half a cell
        x1, y1, x2, y2 = boxes[..., None].unbind(2)  # (B, K, 1)
        ignored = (ignore & (classes > 0))[..., None]
        within = ((x >= x1) & (x <= x2) & (y >= y1) & (y <= y2) & ignored).any(1)  # (B, A)
        positive = torch.zeros_like(wanted).scatter_reduce(1, index, claims.to(wanted), "amax")
        counts = (~within).to(wanted).maximum(positive)
    error = F.binary_cross_entropy_with_logits(raw[..., 4], wanted, reduction="none") * counts
    split = zip(BALANCE, error.split(cells.counts, 1), counts.split(cells.counts, 1), strict=True)
    objectness = sum(share * part.sum() / many.sum().clamp(min=1) for share, part, many in split)
    return {
        "box": box * (weights[0] * count),
        "objectness": objectness * (weights[1] * count),
        "classification": classification * (weights[2] * number / 80 * count),
    }
