"""Faster R-CNN's proposals and samples of a whole batch with fixed shapes, so that no GPU is waited for.

A mask marks what torchvision leaves out. B images, K ground-truth boxes, N anchors or proposals, xyxy pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper

from ..data import clip_boxes
from .base import decode_boxes, pairwise_iou, suppress, take

OUTSIDE = 1e6  # pixels
ROUNDS = 16  # of suppression; a chain of boxes that suppress each other in turn is hardly ever longer than nine


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
