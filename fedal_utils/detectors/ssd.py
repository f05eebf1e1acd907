"""SSD: Liu et al. 2016 (1512.02325), SSD300 on VGG16 and small ones; targets and loss are batched, of fixed shapes."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSDHead

from ..config import ModelConfig
from ..data import clip_boxes
from .backbones import FPN_CHANNELS, VGG16, Lite0, SmallConv, TopDown
from .base import Detector, Inputs, RawDetections, decode_boxes, encode_boxes, pairwise_iou, take, with_a_column
from .losses import ranking_loss

SSD300_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]  # of the default boxes of each map, and their scales
SSD300_SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
NEGATIVES = 3.0  # hard negatives per positive anchor, sec. 2.2


def match_anchors(boxes: Tensor, classes: Tensor, ignore: Tensor, anchors: Tensor, threshold: float = 0.5) -> Tensor:
    """Which box each anchor answers for, as torchvision's SSDMatcher: index (B, A), -1 = background, -2 = unused.

    Anchors that lie on an ignored box, and on no real box as much, are not used.
    """
    real, unwanted = (classes > 0) & ~ignore, (classes > 0) & ignore
    iou = pairwise_iou(boxes, anchors)  # (B, K, A)
    on_ignored = iou.masked_fill(~unwanted[..., None], -1.0).amax(dim=1)  # (B, A)
    usable = iou.masked_fill_(~real[..., None], -1.0)
    best, index = usable.max(dim=1)  # (B, A)
    matched = torch.where(best >= threshold, index, -1)
    matched = torch.where((on_ignored >= threshold) & (on_ignored > best), -2, matched)
    owner = usable.argmax(dim=2)  # (B, K) best anchor of each box
    rows = torch.arange(boxes.shape[1], device=boxes.device).expand_as(owner)
    # A padded row must not own an anchor: it writes -1, and the maximum keeps whichever real row is there.
    #   owner [7, 7, 0], real [1, 1, 0] -> claims {7: 1}
    claims = torch.full_like(matched, -1).scatter_reduce(1, owner, torch.where(real, rows, -1), "amax")
    return torch.where(claims >= 0, claims, matched)


def anchor_losses(logits, deltas, boxes, classes, matched, anchors, least_negatives=0) -> tuple[Tensor, ...]:
    """Of each anchor (B, A): cross-entropy of positives and hard negatives (sec. 2.2), smooth L1, is it positive?

    logits, deltas, matched: (B, A, C + 1), background first, (B, A, 4), and (B, A) from `match_anchors`.
    least_negatives: 0 in torchvision; more lets an image without objects teach the background.
    """
    positive = matched >= 0
    target_class = take(classes, matched) * positive  # (B, A)
    classification = F.cross_entropy(logits.flatten(0, 1), target_class.flatten(), reduction="none")
    classification = classification.view_as(target_class)
    with torch.no_grad():
        hardness = classification.masked_fill(positive | (matched == -2), -math.inf)
        wanted = (positive.sum(1, keepdim=True) * NEGATIVES).clamp(min=least_negatives)
        order = hardness.argsort(dim=1, descending=True)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(1, order, places)
        negative = (ranks < wanted) & (hardness > -math.inf)
        target = encode_boxes(take(boxes, matched), anchors)  # (B, A, 4)
        target = torch.where(positive[..., None], target, deltas)  # an anchor without a box is its own target
    box = F.smooth_l1_loss(deltas, target, reduction="none").sum(-1)
    return classification * (positive | negative), box, positive


def multibox(classification: Tensor, box: Tensor, positive: Tensor, dims: tuple[int, ...], summed=False) -> dict:
    """Eq. 1, {"classification", "regression"}: sums of `anchor_losses` over dims, divided by the number of positives.

    dims: (0, 1) for the batch, (1,) for each image. summed: not divided.
    """
    count = 1 if summed else positive.sum(dims).clamp(min=1)
    return {"classification": classification.sum(dims) / count, "regression": box.sum(dims) / count}


class LossHead(nn.Module):
    """Predicts an image's loss (B,), in a unit of its own; Yoo and Kweon 2019 (1905.03677), section 3.2.

    Of width 32 where the paper has 128. The maps are detached: the paper lets its gradient through for 120 of 200
    epochs.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(inputs, 32) for inputs in channels)
        self.joint = nn.Linear(32 * len(channels), 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        means = [m.detach().float().mean((2, 3)) for m in maps]  # (B, channels) each
        hidden = [F.relu(layer(mean)) for layer, mean in zip(self.each, means, strict=True)]  # (B, width) each
        return self.joint(torch.cat(hidden, dim=1))[:, 0].float()


class SSD(Detector):
    """Single-shot detector with softmax classes and hard negatives.

    box_loss_head: predicts each anchor's classification loss (Park et al. 2023) from maps that it does not train.
    """

    def __init__(self, config: ModelConfig, image_size: tuple[int, int], classes: int):
        super().__init__(config, image_size, classes)
        full = config.backbone == "vgg16"
        if full:
            body, neck = VGG16(config.pretrained), None
            channels = list(body.channels)
            generator = DefaultBoxGenerator(SSD300_RATIOS, scales=SSD300_SCALES, steps=body.strides)
        else:
            body = SmallConv(norm=config.norm) if config.backbone == "small" else Lite0(config.pretrained)
            channels = [FPN_CHANNELS] * len(body.strides)
            sizes = octave_sizes(config.anchor_side, len(body.strides))
            generator = AnchorGenerator(sizes, (config.anchor_ratios,) * len(sizes))
        per_cell = generator.num_anchors_per_location()
        head = SSDHead(channels, per_cell, classes + 1)
        anchors, levels = place_anchors(generator, image_size, body.strides)
        if not full:
            # Few positives among many anchors: start from "background", so that no step is spent on finding it.
            for layer in head.classification_head.module_list:
                layer.bias.data.view(-1, classes + 1)[:, 0] = 3.0
            neck = TopDown(body.channels, config.norm)
            anchors = anchors + torch.tensor(body.strides)[levels][:, None] / 2  # to the middle of their cells
        self.least_negatives = 0 if full else 8
        self.backbone, self.neck, self.head = body, neck, head
        own = (nn.Conv2d(inputs, count, 1) for inputs, count in zip(channels, per_cell, strict=True))
        self.evidence_head = nn.ModuleList(own) if config.box_loss_head else None
        self.loss_head = LossHead(channels) if config.image_loss_head else None
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("levels", levels, persistent=False)  # (A,) which map each anchor belongs to

    def forward(self, inputs: Inputs) -> tuple[list[Tensor], Tensor, Tensor]:
        """The head's maps, class logits (B, A, C + 1) and box deltas (B, A, 4)."""
        maps = self.maps(inputs)
        maps = self.neck(maps) if self.neck is not None else list(maps)
        out = self.head(maps)
        return maps, out["cls_logits"].float(), out["bbox_regression"].float()

    def _predicted_loss(self, maps: list[Tensor]) -> Tensor:
        """What the box loss head takes each anchor's classification loss to be (B, A), >= 0."""
        each = [head(m.detach()) for head, m in zip(self.evidence_head, maps, strict=True)]  # (B, per cell, h, w)
        return F.softplus(torch.cat([e.permute(0, 2, 3, 1).flatten(1) for e in each], dim=1).float())

    def _each(self, outputs: tuple[Tensor, Tensor], *target: Tensor) -> tuple[Tensor, ...]:
        boxes, classes, ignore = with_a_column(*target)
        matched = match_anchors(boxes, classes, ignore, self.anchors)
        return anchor_losses(*outputs, boxes, classes, matched, self.anchors, self.least_negatives)

    def loss(self, inputs: Inputs, boxes: Tensor, classes: Tensor, ignore: Tensor, generator=None) -> dict[str, Tensor]:
        """{"classification", "regression"}, and "box_loss_head", "ranking" of the heads that there are."""
        maps, *outputs = self(inputs)
        each = self._each(outputs, boxes, classes, ignore)
        parts, positive = multibox(*each, (0, 1)), each[2]
        if self.evidence_head is not None:
            error = (self._predicted_loss(maps) - each[0].detach()) ** 2
            parts["box_loss_head"] = 5 * (error * positive).sum() / positive.sum().clamp(min=1)
        if self.loss_head is not None:
            parts["ranking"] = ranking_loss(self.loss_head(maps), sum(multibox(*each, (1,)).values()))
        return parts

    def image_losses(self, inputs: Inputs, boxes: Tensor, classes: Tensor, ignore: Tensor, summed=False) -> dict:
        """{"classification": (B,), "regression": (B,)}: `loss` of each image alone; summed: without its divisor."""
        return multibox(*self._each(self(inputs)[1:], boxes, classes, ignore), (1,), summed)

    @torch.no_grad()
    def predicted_loss(self, inputs: Inputs) -> Tensor:
        """What the image loss head takes each image's loss to be (B,); only the order means something."""
        return self.loss_head(self(inputs)[0])

    def raw_detections(self, inputs: Inputs) -> RawDetections:
        maps, logits, deltas = self(inputs)
        boxes = clip_boxes(decode_boxes(deltas, self.anchors), self.image_size)
        extra = {"level": self.levels.expand(len(logits), -1)}
        if self.evidence_head is not None:
            extra["predicted_loss"] = self._predicted_loss(maps)
        return RawDetections(boxes, logits.softmax(-1), extra=extra)


def place_anchors(generator: nn.Module, image_size: tuple[int, int], strides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """torchvision's anchors of an image of (height, width): (A, 4) xyxy pixels, and the map of each (A,)."""
    maps = [torch.zeros(1, 1, math.ceil(image_size[0] / s), math.ceil(image_size[1] / s)) for s in strides]
    anchors = generator(ImageList(torch.zeros(1).expand(1, 3, *image_size), [image_size]), maps)[0]
    counts = [m.numel() * cell for m, cell in zip(maps, generator.num_anchors_per_location(), strict=True)]
    return anchors, torch.arange(len(strides)).repeat_interleave(torch.tensor(counts))


def octave_sizes(smallest: float, levels: int, per_level: int = 2) -> tuple[tuple[float, ...], ...]:
    """Anchor sides in pixels, doubling from level to level: (16, 22.6), (32, 45.3), ..."""
    parts = [part / per_level for part in range(per_level)]
    return tuple(tuple(smallest * 2 ** (level + part) for part in parts) for level in range(levels))
