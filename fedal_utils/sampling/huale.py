"""HUALE's filter cascade (Hierarchical Uncertainty Aggregation and Emphasis Loss, IEEE BigData 2023).

Its text, equations and code are not public; its README, its author's page and figures are. Each function says how it is
known: *stated* (in words), *from figures* or *reconstructed* (ours). N images, T boxes, C classes, background first.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..data import Detections
from .matching import LN2, in_blocks, iou_of, jensen_shannon, match
from .observation import Observation
from .registry import strategy
from .scores import Scores, entropy, reduce
from .select import Selection, cascade


def retrieval(plain: Detections, flipped: Detections) -> Scores:
    """Entropy in nats of the plain view's most uncertain box, 0 .. ln(C + 1): the last for an image seen once.

    *From figures*: nats and the maximum; that it is the retrieval score, and the rule for one view: *reconstructed*.
    """
    largest = math.log(plain.probs.shape[-1])
    scores, too = reduce(entropy(plain), plain.valid, "max"), flipped.valid.any(1).cpu().numpy()
    values = np.where(scores.scored != too, largest, np.minimum(scores.values, largest))
    return Scores(values, scores.scored | too)


def semantic_disagreement(plain: Detections, flipped: Detections) -> Scores:
    """Mean JS divergence of the class vectors of matched pairs, 0 .. ln 2; a box that one view alone has counts ln 2.

    The name "semantic affinity" and its place are *from figures*, the formula is *reconstructed*.
    """
    paired, partner, lone = _paired(plain, flipped)
    apart = torch.zeros(paired.shape, dtype=torch.float64, device=paired.device)
    apart[paired] = jensen_shannon(plain.probs[paired], flipped.probs[partner])
    return _means(apart.sum(1) + lone * LN2, paired.sum(1) + lone)


def category_diversity(plain: Detections, flipped: Detections) -> Scores:
    """JS divergence of the two views' class histograms, 0 .. ln 2; ln 2 where one view is empty.

    The metric's name and place are *from figures*, the formula is *reconstructed*.
    """
    shares, count = [], torch.stack([found.valid.sum(1) for found in (plain, flipped)])  # (2, N)
    for found, boxes in zip((plain, flipped), count, strict=True):
        histogram = found.probs.new_zeros(len(found), found.probs.shape[-1], dtype=torch.float64)
        histogram.scatter_add_(1, found.labels.clamp(min=0), found.valid.double())
        shares.append(histogram[:, 1:] / boxes.clamp(min=1)[:, None])
    apart = torch.where((count > 0).all(0), jensen_shannon(*shares), LN2)
    scored = (count > 0).any(0)
    return _means(apart * scored, scored.long())


def overlap_ratio(plain: Detections, flipped: Detections, above: float = 0.1) -> Scores:
    """Share of an image's boxes that overlap another of its boxes with IoU > `above`, 0 .. 1; the larger of two views.

    Name, place and "0 for a single box" are *from figures*; the rule is *reconstructed* (one of two printed values).
    """

    def touching(boxes: Tensor, valid: Tensor) -> Tensor:
        table = iou_of(boxes[:, :, None], boxes[:, None])  # (N, T, T)
        table = torch.where(valid[:, :, None] & valid[:, None], table, -1.0)
        table.diagonal(dim1=1, dim2=2).fill_(-1)
        return (table > above).any(2).sum(1)

    shares, count = [], plain.valid.sum(1) + flipped.valid.sum(1)
    for found in (plain, flipped):
        touched = in_blocks(touching, found.boxes.shape[1] ** 2, found.boxes, found.valid)
        shares.append(touched / found.valid.sum(1).clamp(min=1).double())
    return Scores(torch.maximum(*shares).cpu().numpy(), (count > 0).cpu().numpy())


def localisation_confidence(plain: Detections, flipped: Detections) -> Scores:
    """1 - the mean confidence in the four sides of the boxes of both views, 0 .. 1: badly placed boxes first.

    From `extra['sides']`; without them (ours alone) side k of a matched pair has q_k = max(0, 1 - |difference| / the
    pair's mean width or height), a box without a partner q = 0. Four numbers a box and the name are *from figures*, the
    reduction is *reconstructed*.
    """
    if "sides" in plain.extra and "sides" in flipped.extra:
        pairs = [(found.extra["sides"].double().mean(2), found.valid) for found in (plain, flipped)]
        total = sum(sure.masked_fill(~valid, 0).sum(1) for sure, valid in pairs)
        count = sum(valid.sum(1) for _, valid in pairs)
        return _means(count - total, count)
    paired, partner, lone = _paired(plain, flipped)
    a, b = plain.boxes[paired].double(), flipped.boxes[partner].double()  # (pairs, 4)
    side = (a[:, 2:] - a[:, :2] + b[:, 2:] - b[:, :2]) / 2  # (pairs, 2) mean width, height
    sure = torch.zeros(paired.shape, dtype=torch.float64, device=paired.device)
    sure[paired] = (1 - (a - b).abs() / side.repeat(1, 2)).clamp(min=0).mean(1)  # matched, so no side is 0
    count = paired.sum(1) + lone
    return _means(count - sure.sum(1), count)


FILTERS: dict[str, Callable[[Detections, Detections], Scores]] = {  # in the published order
    "semantic": semantic_disagreement,
    "diversity": category_diversity,
    "overlap": overlap_ratio,
    "localisation": localisation_confidence,
}


def _paired(plain: Detections, flipped: Detections) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """paired (N, T) bool; (image, row) of each pair in the flipped view; boxes (N,) of both that nobody matches."""
    index = match(plain, flipped)
    paired = index >= 0
    lone = plain.valid.sum(1) + flipped.valid.sum(1) - 2 * paired.sum(1)
    return paired, (paired.nonzero()[:, 0], index[paired]), lone


def _means(total: Tensor, count: Tensor) -> Scores:
    """Means (N,) of what was added up; an image where nothing was counted has no score."""
    return Scores((total / count.clamp(min=1)).cpu().numpy(), (count > 0).cpu().numpy())


def cascade_stages(seen: Observation, k: int, rng: np.random.Generator) -> list[tuple[str, np.ndarray, Scores]]:
    """Retrieval and four filters: (name, the positions it left, best first, its scores of all images) of each.

    They leave round(size * k) images for the sizes in `query.cascade`, and k. The cascade and its order are *stated*
    and *from figures*, its sizes are *reconstructed*.
    """
    query = seen.config.query
    steps = {"retrieval": retrieval, **{name: FILTERS[name] for name in query.cascade_order}}
    scores = [step(seen.detections, seen.flipped_detections) for step in steps.values()]
    kept = [max(k, min(seen.count, round(size * k))) for size in (*query.cascade, 1.0)]
    left = cascade(scores, kept, rng, query.no_detection_rule)
    return list(zip(steps, left, scores, strict=True))


@strategy("cascade", ("detections", "flipped_detections"), "boxes", selects=True, source="HUALE (2023), reconstructed")
def _cascade(seen: Observation, k: int, rng: np.random.Generator) -> Selection:
    stages = cascade_stages(seen, k, rng)
    return Selection(stages[-1][1], stages[0][2])
