"""Faster R-CNN: Ren et al. 2015 (1506.01497), torchvision's proposals and RoI heads on maps that may be cached.

On a GPU a batch's proposals and samples have fixed shapes, so that nothing waits; a mask marks what is left out.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper

from ..config import ModelConfig
from ..data import clip_boxes
from ..seeding import borrowed_global_rng
from .backbones import FPN_CHANNELS, Lite0, ResNet50FPN, SmallConv, TopDown
from .base import (
    Detector,
    Inputs,
    RawDetections,
    decode_boxes,
    encode_boxes,
    pairwise_iou,
    suppress,
    take,
    with_a_column,
)
from .losses import crowding
from .roi_heads import LocalisedRoIHeads
from .ssd import octave_sizes, place_anchors

OUTSIDE = 1e6  # pixels
ROUNDS = 16  # of suppression; a chain of boxes that suppress each other in turn is hardly ever longer than nine


class FasterRCNN(Detector):
    """The detector; how boxes are learned: `LocalisedRoIHeads`. Ignored boxes are left out of the targets."""

    nms_iou = 0.5

    def __init__(self, config: ModelConfig, image_size: tuple[int, int], classes: int):
        super().__init__(config, image_size, classes)
        full = config.backbone == "resnet50"
        if full:
            body, neck, width, ratios = ResNet50FPN(config.pretrained), None, 256, (0.5, 1.0, 2.0)
        else:
            body = SmallConv(norm=config.norm) if config.backbone == "small" else Lite0(config.pretrained)
            width, ratios = FPN_CHANNELS, config.anchor_ratios
            neck = TopDown(body.channels, config.norm)
        sizes = octave_sizes(32 if full else config.anchor_side, len(body.strides), per_level=1)
        levels = len(body.strides) - full  # torchvision pools no RoI from the last map
        self.backbone, self.neck = body, neck
        self.limits = (2000, 2000) if full else (200, 50)  # proposals while training: of a map, of an image
        self.rpn = RegionProposalNetwork(
            AnchorGenerator(sizes, (ratios,) * len(sizes)),
            RPNHead(width, len(ratios)),
            **dict(fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256 if full else 32),
            **dict(positive_fraction=0.5, nms_thresh=0.7),
            pre_nms_top_n={"training": self.limits[0], "testing": 1000 if full else 200},
            post_nms_top_n={"training": self.limits[1], "testing": 1000 if full else 100},
        )
        side, hidden = (7, 1024) if full else (5, 128)
        anchors, _ = place_anchors(self.rpn.anchor_generator, image_size, self.backbone.strides)
        self.register_buffer("anchors", anchors, persistent=False)
        self.roi = LocalisedRoIHeads(
            MultiScaleRoIAlign([str(level) for level in range(levels)], side, sampling_ratio=2 if full else 1),
            TwoMLPHead(width * side**2, hidden),
            FastRCNNPredictor(hidden, classes + 1),
            **dict(fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=512 if full else 32),
            **dict(positive_fraction=0.25, bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5),
            **dict(detections_per_img=100, config=config, hidden=hidden),
        )

    def pyramid(self, inputs: Inputs) -> tuple[ImageList, OrderedDict[str, Tensor]]:
        """What torchvision's parts want: the images' sizes, and the maps by name."""
        maps = self.maps(inputs)
        maps = self.neck(maps) if self.neck is not None else maps
        count = len(maps[0])
        # torchvision reads the batch's height and width from this tensor and nothing else: no memory behind it.
        canvas = maps[0].new_zeros(1, dtype=torch.float32).expand(count, 3, *self.image_size)
        named = OrderedDict((str(level), m.float()) for level, m in enumerate(maps))
        return ImageList(canvas, [self.image_size] * count), named

    def loss(self, inputs: Inputs, boxes: Tensor, classes: Tensor, ignore: Tensor, generator) -> dict[str, Tensor]:
        """{"objectness", "proposal_regression"} and what `LocalisedRoIHeads.losses_of` gives.

        generator: of the samples, on the detector's device.
        """
        boxes, classes, ignore = with_a_column(boxes, classes, ignore)
        images, maps = self.pyramid(inputs)
        classes = classes * ~ignore
        # Outside of autocast: torchvision casts boxes to the maps' type, and bfloat16 cannot tell 401 from 400.
        with torch.autocast(boxes.device.type, enabled=False):
            if boxes.device.type != "cpu":
                return self.loss_at_once(maps, boxes, classes, generator)
            density = crowding(boxes, classes > 0)
            targets = [
                {"boxes": box[name > 0], "labels": name[name > 0], "density": share[name > 0]}
                for box, name, share in zip(boxes, classes, density, strict=True)
            ]
            with borrowed_global_rng(generator):
                proposals, rpn = self.rpn(images, maps, targets)
                rest = self.roi.loss(maps, proposals, images.image_sizes, targets)
            return {"objectness": rpn["loss_objectness"], "proposal_regression": rpn["loss_rpn_box_reg"], **rest}

    def loss_at_once(self, maps, boxes, classes, generator) -> dict[str, Tensor]:
        """`loss` for the whole batch with fixed shapes: nothing waits for the device; samples differ."""
        real = classes > 0
        objectness, deltas = self.rpn.head(list(maps.values()))
        objectness = [o.permute(0, 2, 3, 1).flatten(1) for o in objectness]  # (B, n) each
        deltas = [d.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for d in deltas]  # (B, n, 4) each
        logits, delta = torch.cat(objectness, dim=1), torch.cat(deltas, dim=1)
        with torch.no_grad():
            matched = match(boxes, real, self.anchors, 0.3, 0.7, rescue=True)  # (B, A)
            positive, negative = sample(matched >= 0, matched == -1, self.rpn.fg_bg_sampler, generator)
            goal = encode_boxes(take(boxes, matched), self.anchors, (1.0, 1.0))
            goal = torch.where(positive[..., None], goal, delta)
            anchors = self.anchors.split([o.shape[1] for o in objectness])
            found, valid = propose(objectness, deltas, anchors, self.image_size, self.limits, self.rpn.nms_thresh)
            found, valid = torch.cat([found, boxes], dim=1), torch.cat([valid, real], dim=1)
            matched, sampler = match(boxes, real, found, 0.5, 0.5), self.roi.fg_bg_sampler
            objects, rest = sample((matched >= 0) & valid, (matched == -1) & valid, sampler, generator)
            # (B, S) RoIs of the second stage: the sampled ones first, in their order
            index = (objects | rest).to(torch.int8).argsort(dim=1, descending=True, stable=True)
            index = index[:, : sampler.batch_size_per_image]
            at, counted = matched.gather(1, index), (objects | rest).gather(1, index)
            labels = take(classes, at) * objects.gather(1, index)
            pixel = found.new_tensor([0.0, 0, 1, 1])  # what is no RoI has an area, too
            rois = torch.where(counted[..., None], take(found, index), pixel)
            density = take(crowding(boxes, real), at)
        sampled = positive | negative
        wrong = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none") * sampled
        apart = F.smooth_l1_loss(delta, goal, beta=1 / 9, reduction="sum")
        count = sampled.sum().clamp(min=1)
        pooler = self.roi.box_roi_pool
        pooled = pool([maps[name] for name in pooler.featmap_names], rois, self.backbone.strides, pooler)
        every = (t.flatten(0, 1) for t in (rois, labels, take(boxes, at), density, counted))
        rest = self.roi.losses_of(self.roi.box_head(pooled), *every)
        return {"objectness": wrong.sum() / count, "proposal_regression": apart / count, **rest}

    def _rois(self, inputs: Inputs) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
        """Proposals of each image; of all the box head's features (R, hidden), class logits and deltas, extra."""
        images, maps = self.pyramid(inputs)
        with torch.autocast(images.tensors.device.type, enabled=False):  # as in `loss`
            proposals, _ = self.rpn(images, maps)
            features = self.roi.box_head(self.roi.box_roi_pool(maps, proposals, images.image_sizes))
            mapper = self.roi.box_roi_pool.map_levels  # None where there is a single map
            levels = features.new_zeros(len(features), dtype=torch.int64) if mapper is None else mapper(proposals)
            return proposals, features, self.roi.box_predictor(features), self.roi.extra(features, levels)

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> Tensor:
        """(B, hidden): the box head's features, averaged over an image's proposals by their foreground probability."""
        proposals, features, (logits, _), _ = self._rois(inputs)
        weight = 1 - logits.softmax(-1)[:, :1]  # (R, 1)
        counts = [len(p) for p in proposals]
        parts = zip(features.split(counts), weight.split(counts), strict=True)
        return torch.stack([(f * w).sum(0) / w.sum().clamp(min=1e-9) for f, w in parts])

    def raw_detections(self, inputs: Inputs) -> RawDetections:
        proposals, _, (logits, deltas), extra = self._rois(inputs)
        decoded = decode_boxes(deltas.unflatten(1, (-1, 4)), torch.cat(proposals)[:, None])  # (R, C + 1, 4)
        decoded = clip_boxes(decoded, self.image_size)

        def padded(values: Tensor) -> Tensor:  # (B, P, ...)
            return nn.utils.rnn.pad_sequence(values.split([len(p) for p in proposals]), batch_first=True)

        boxes, probs = padded(decoded[:, 1:]), padded(logits.softmax(-1))  # (B, P, C, 4), (B, P, C + 1)
        extra = {name: padded(value) for name, value in extra.items()}
        scores = None if self.roi.iou_head is None else probs[..., 1:] * extra["sides"][..., :1] ** 0.5
        return RawDetections(boxes, probs, scores, extra)


def match(boxes: Tensor, real: Tensor, others: Tensor, low: float, high: float, rescue: bool = False) -> Tensor:
    """Which real box (B, K) each of `others` ((N, 4) or (B, N, 4)) matches: (B, N), -1 below `low`, -2 below `high`.

    As torchvision's Matcher; rescue: a box's best overlap counts whatever it is. A box that is not a number matches.
    """
    iou = pairwise_iou(boxes, others).masked_fill(~real[..., None], -1.0)  # (B, K, N)
    best, index = iou.max(dim=1)
    matched = torch.where(best < low, -1, torch.where(best < high, -2, index))
    if rescue:
        owned = ((iou == iou.amax(dim=2, keepdim=True)) & real[..., None]).any(1)
        matched = torch.where(owned, index, matched)
    return matched


def sample(positive: Tensor, negative: Tensor, sizes: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random sample of each image (B, N), as masks: positives up to a part of its size, negatives up to the rest.

    sizes: torchvision's sampler, which says how many an image. generator: on the masks' device.
    """
    count, device = sizes.batch_size_per_image, positive.device
    most = min(count, positive.shape[1])
    places = torch.arange(most, device=device)

    def draw(mask: Tensor, wanted: int | Tensor) -> Tensor:
        keys = torch.rand(mask.shape, generator=generator, device=device).masked_fill(~mask, 2.0)
        index = keys.topk(most, dim=1, largest=False).indices  # (B, most) in random order, the masked ones last
        return torch.zeros_like(mask).scatter(1, index, mask.gather(1, index) & (places < wanted))

    chosen = draw(positive, int(count * sizes.positive_fraction))
    return chosen, draw(negative, count - chosen.sum(1, keepdim=True))


def propose(objectness, deltas, anchors, image_size, limits: tuple[int, int], nms_iou) -> tuple[Tensor, Tensor]:
    """The best boxes of all levels (B, P, 4), best first, and which of them are real (B, P).

    objectness, deltas, anchors: of each level (B, n), (B, n, 4), (n, 4).
    limits: boxes of each level before NMS, and of all levels after it (P, or less where there are not as many).
    """
    boxes, scores = [], []
    for logits, delta, own in zip(objectness, deltas, anchors, strict=True):
        top, index = logits.topk(min(limits[0], logits.shape[1]), dim=1)  # (B, T), best first
        found = clip_boxes(decode_boxes(take(delta, index), own[index], (1.0, 1.0)), image_size)
        keep = suppress(found, (found[..., 2:] - found[..., :2] >= 1e-3).all(-1), nms_iou, rounds=ROUNDS)
        boxes.append(found)
        scores.append(top.sigmoid().masked_fill(~keep, -1.0))
    score = torch.cat(scores, dim=1)
    score, index = score.topk(min(limits[1], score.shape[1]), dim=1)
    return take(torch.cat(boxes, dim=1), index), score >= 0


def pool(maps: Sequence[Tensor], rois: Tensor, strides: Sequence[int], pooler: MultiScaleRoIAlign) -> Tensor:
    """What torchvision's `pooler` makes of rois (B, S, 4), each from the map of its size: (B * S, C, side, side).

    Every map is asked for all RoIs, those of other maps moved so far outside that nothing is read for them and 0 comes.
    """
    first, last = (int(math.log2(strides[level])) for level in (0, len(maps) - 1))
    mapper = initLevelMapper(first, last, pooler.canonical_scale, pooler.canonical_level)
    levels = mapper([rois.flatten(0, 1)])[:, None]  # (B * S, 1)
    image = torch.arange(len(rois), device=rois.device, dtype=rois.dtype).repeat_interleave(rois.shape[1])
    pooled = 0
    for level, m in enumerate(maps):
        own = torch.cat([image[:, None], torch.where(levels == level, rois.flatten(0, 1), OUTSIDE)], dim=1)
        pooled = pooled + roi_align(m, own, pooler.output_size, 1 / strides[level], pooler.sampling_ratio)
    return pooled
