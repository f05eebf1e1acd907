"""What all detectors share: their interface, the code of boxes relative to anchors, and post-processing.

`inputs`: uint8 pixels (B, 3, H, W) or cached maps; boxes (B, K, 4), classes (B, K) 1..C, 0 = padding, ignore (B, K).
"""

import copy
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ..config import ModelConfig
from ..data import Detections

Inputs = Tensor | tuple[Tensor, ...]
LARGEST_GROWTH = math.log(1000 / 16)  # a decoded side is at most 62.5 times its anchor's, as in torchvision


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU (B, N, M) of boxes (B, N, 4) with others, (M, 4) or (B, M, 4); torchvision's `box_iou` at half its time."""
    x1, y1, x2, y2 = boxes[..., None].unbind(2)  # (B, N, 1) each
    left, top, right, bottom = others[..., None, :, :].unbind(-1)  # (1, M) or (B, 1, M) each
    both = (torch.minimum(x2, right) - torch.maximum(x1, left)).clamp_(min=0)  # (B, N, M)
    both *= (torch.minimum(y2, bottom) - torch.maximum(y1, top)).clamp_(min=0)
    return both / ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top)).sub_(both)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B, M, ...) of values (B, N, ...); index (B, M), below 0: the first."""
    index = index.clamp(min=0)
    return values.gather(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(*index.shape, *values.shape[2:]))


def with_a_column(boxes: Tensor, classes: Tensor, ignore: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same targets, with a column of padding where K is 0."""
    if boxes.shape[1]:
        return boxes, classes, ignore
    return F.pad(boxes, (0, 0, 0, 1)), F.pad(classes, (0, 1)), F.pad(ignore, (0, 1))


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: tuple[float, float] = (10.0, 5.0)) -> Tensor:
    """Boxes (..., 4) as deltas (..., 4) from anchors (..., 4), as torchvision's; Ren et al. 2015 (1506.01497) eq. 2."""
    sides, own = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]  # (..., 2)
    apart = (boxes[..., :2] + 0.5 * sides) - (anchors[..., :2] + 0.5 * own)  # of the centres
    return torch.cat([weights[0] * apart / own, weights[1] * torch.log(sides / own)], dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: tuple[float, float] = (10.0, 5.0)) -> Tensor:
    """The inverse of `encode_boxes`: boxes (..., 4) of deltas (..., 4)."""
    own = anchors[..., 2:] - anchors[..., :2]
    centre = deltas[..., :2] / weights[0] * own + (anchors[..., :2] + 0.5 * own)
    half = 0.5 * (torch.exp((deltas[..., 2:] / weights[1]).clamp(max=LARGEST_GROWTH)) * own)
    return torch.cat([centre - half, centre + half], dim=-1)


class RawDetections(NamedTuple):
    """Detections before NMS of B images, A boxes each."""

    boxes: Tensor  # (B, A, 4), or (B, A, C, 4) with a box per class
    probs: Tensor  # (B, A, C + 1), background first
    scores: Tensor | None = None  # (B, A, C) in the place of the classes' probs
    extra: Mapping[str, Tensor] = {}  # more about each box, (B, A, ...)


def clone(model: "Detector") -> "Detector":
    """A copy to train on; a frozen backbone is shared."""
    shared = {id(model.backbone): model.backbone} if model.frozen else {}
    return copy.deepcopy(model, shared)


class Model(nn.Module):
    """What clients exchange."""

    frozen = False

    def exchanged(self) -> list[str]:
        """Names in `state_dict()` that clients exchange: all but a frozen backbone's."""
        return [k for k in self.state_dict() if not (self.frozen and k.startswith("backbone."))]


class Detector(Model):
    """A backbone that can be frozen, and inputs that may be its cached maps. image_size: (height, width) pixels.

    Each has `loss(inputs, boxes, classes, ignore, generator)`, named parts of it, and `raw_detections(inputs)`.
    """

    nms_iou, candidates = 0.45, 400  # unless `predict` is told otherwise

    def __init__(self, config: ModelConfig, image_size: tuple[int, int], classes: int):
        super().__init__()
        self.recipe = config, image_size, classes  # all that a step depends on beside the weights
        self.image_size, self.classes = image_size, classes

    def freeze_backbone(self, frozen: bool = True) -> None:
        """Backbone neither trained, nor sent, nor counted from here on, and its maps can be cached; or it is again."""
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen).train(self.training and not frozen)

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Maps of pixels (B, 3, H, W) in 0..255; a frozen backbone keeps no graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.backbone(pixels)

    def maps(self, inputs: Inputs) -> tuple[Tensor, ...]:
        if isinstance(inputs, Tensor):
            return self.features(inputs)
        if not self.frozen:
            raise ValueError("cached features belong to a frozen backbone; this detector's backbone is trained")
        return tuple(m.float() for m in inputs)

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> Tensor:
        """(B, D): one vector an image, the mean of each of the backbone's maps side by side."""
        return torch.cat([m.float().mean((2, 3)) for m in self.maps(inputs)], dim=1)

    @torch.no_grad()
    def predict(
        self, inputs: Inputs, score_above=0.01, nms_iou=None, top=100, candidates=None, class_agnostic=False, **views
    ) -> Detections:
        """Detections of each image, best first, see `select_detections`; views: see `YOLO.raw_detections`."""
        raw, nms_iou = self.raw_detections(inputs, **views), self.nms_iou if nms_iou is None else nms_iou
        return select_detections(raw, score_above, nms_iou, top, candidates or self.candidates, class_agnostic)


def suppress(boxes: Tensor, valid: Tensor, iou: float, groups=None, rounds: int | None = None) -> Tensor:
    """Which of the valid boxes (B, N, 4), best first, survive NMS within each group (B, N) of an image: (B, N) bool.

    For a GPU. A box survives if no survivor before it overlaps it: a round settles the next link of every chain.
    rounds: so many, without waiting for the device; None: until nothing changes.
    """
    above = (pairwise_iou(boxes, boxes) > iou).triu(1)  # (B, better, worse)
    above = above if groups is None else above & (groups[..., None] == groups[:, None])
    alive = valid
    while True:
        for _ in range(rounds or 8):
            before, alive = alive, valid & ~(above & alive[..., None]).any(1)
        if rounds or torch.equal(alive, before):
            return alive


def select_detections(
    raw: RawDetections, score_above: float, nms_iou: float, top: int, candidates: int, class_agnostic: bool = False
) -> Detections:
    """Threshold, the best `candidates` (box, class) pairs of each image, NMS within each class, the best `top`.

    class_agnostic: a box counts once, with its best class, and suppresses across classes. ValueError: not finite.
    """
    boxes, probs, scores, extra = raw
    columns = probs.shape[2]
    foreground = probs[..., 1:] if scores is None else scores  # (B, A, C)
    if class_agnostic:
        best = foreground.argmax(-1, keepdim=True)
        foreground = torch.zeros_like(foreground).scatter(-1, best, foreground.gather(-1, best))
    scores, pair = foreground.flatten(1).topk(min(candidates, foreground[0].numel()), dim=1)  # (B, T)
    row, label = pair // (columns - 1), pair % (columns - 1)
    chosen = take(boxes.flatten(1, 2), pair) if boxes.dim() == 4 else take(boxes, row)  # (B, T, 4)
    # topk puts NaN first, so a broken model is seen here; without this its detections would just vanish.
    if not bool(torch.isfinite(scores).all() & torch.isfinite(chosen).all()):
        raise ValueError("the detector's scores or boxes are not finite: its weights are broken, or its input is")
    keep = (scores > score_above) & (chosen[..., 2:] - chosen[..., :2] > 1e-2).all(-1)
    if keep.is_cuda:
        alive = suppress(chosen, keep, nms_iou, groups=label * (not class_agnostic))
    else:
        image, place = keep.nonzero(as_tuple=True)
        group = image if class_agnostic else image * (columns - 1) + label[image, place]
        # float64: groups are moved apart, and that must cost no precision
        kept = batched_nms(chosen[image, place].double(), scores[image, place].double(), group, nms_iou)
        alive = torch.zeros_like(keep)
        alive[image[kept], place[kept]] = True
    # topk gave each row in falling order, so the survivors are in order already: move them to the front.
    length = min(top, int(alive.sum(1).max()))
    front = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :length]  # (B, length)
    alive = alive.gather(1, front)

    def left(value: Tensor) -> Tensor:  # (B, T, ...) -> (B, length, ...), zeros where an image has fewer
        value = take(value, front)
        return value * alive.view(*alive.shape, *[1] * (value.dim() - 2))

    extra = {name: left(take(value, row)) for name, value in extra.items()}
    return Detections(left(chosen), left(scores), left(label + 1), left(take(probs, row)), extra)
