"""HUALE's filter cascade (Hierarchical Uncertainty Aggregation and Emphasis Loss, IEEE BigData 2023).

Its text, equations and code are not public; its README, its author's page and figures are. The cascade and its order
are *stated* (in words) and *from figures*; so are the names and places of the filters, while their formulas and sizes
are *reconstructed* (ours). N images, T boxes; each filter gives one number an image.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ..data import Detections
from .matching import LN2, in_blocks, iou_of, jensen_shannon, match
from .observation import Observation
from .scores import Scores, Selection, cascade, entropy, reduce
from .strategies import strategy


def retrieval(plain: Detections, flipped: Detections) -> Scores:
    """Entropy in nats of the plain view's most uncertain box, 0 .. ln(C + 1): the last for an image seen once.

    *From figures*: nats and the maximum; that it is the retrieval score, and the rule for one view: *reconstructed*.
    """
    scores, too = reduce(entropy(plain), plain.valid, "max"), flipped.valid.any(1).cpu().numpy()
    largest = math.log(plain.probs.shape[-1])
    return Scores(np.where(scores.scored != too, largest, scores.values.clip(max=largest)), scores.scored | too)


def semantic_disagreement(plain: Detections, flipped: Detections) -> Scores:
    """Mean JS divergence of the class vectors of matched pairs, 0 .. ln 2; a box of one view alone counts ln 2."""
    paired, partner, lone = _paired(plain, flipped)
    apart = torch.zeros(paired.shape, dtype=torch.float64, device=paired.device)
    apart[paired] = jensen_shannon(plain.probs[paired], flipped.probs[partner])
    return _means(apart.sum(1) + lone * LN2, paired.sum(1) + lone)


def category_diversity(plain: Detections, flipped: Detections) -> Scores:
    """JS divergence of the two views' class histograms, 0 .. ln 2; ln 2 where one view is empty."""
    shares, counts = [], [found.valid.sum(1) for found in (plain, flipped)]  # (N,) each
    for found, count in zip((plain, flipped), counts, strict=True):
        histogram = found.probs.new_zeros(len(found), found.probs.shape[-1], dtype=torch.float64)
        histogram.scatter_add_(1, found.labels.clamp(min=0), found.valid.double())
        shares.append(histogram[:, 1:] / count.clamp(min=1)[:, None])
    both, either = (counts[0] > 0) & (counts[1] > 0), (counts[0] > 0) | (counts[1] > 0)
    return _means(torch.where(both, jensen_shannon(*shares), LN2) * either, either.long())


def overlap_ratio(plain: Detections, flipped: Detections, above: float = 0.1) -> Scores:
    """Share of an image's boxes that overlap another of them with IoU > `above`, 0 .. 1; the larger of two views."""

    def touching(boxes: Tensor, valid: Tensor) -> Tensor:
        table = iou_of(boxes[:, :, None], boxes[:, None])  # (N, T, T)
        table = torch.where(valid[:, :, None] & valid[:, None], table, -1.0)
        table.diagonal(dim1=1, dim2=2).fill_(-1)
        return (table > above).any(2).sum(1) / valid.sum(1).clamp(min=1).double()

    shares = [in_blocks(touching, d.boxes.shape[1] ** 2, d.boxes, d.valid) for d in (plain, flipped)]
    return Scores(torch.maximum(*shares).cpu().numpy(), (plain.valid.any(1) | flipped.valid.any(1)).cpu().numpy())


def localisation_confidence(plain: Detections, flipped: Detections) -> Scores:
    """1 - the mean confidence in the four sides of the boxes of both views, 0 .. 1: badly placed boxes first.

    From `extra['sides']`; without them (ours alone) side k of a matched pair has q_k = max(0, 1 - |difference| / the
    pair's mean width or height), a box without a partner q = 0.
    """
    count = plain.valid.sum(1) + flipped.valid.sum(1)
    if "sides" in plain.extra and "sides" in flipped.extra:
        sure = [d.extra["sides"].double().mean(2).masked_fill(~d.valid, 0).sum(1) for d in (plain, flipped)]
        return _means(count - (sure[0] + sure[1]), count)
    paired, partner, lone = _paired(plain, flipped)
    a, b = plain.boxes[paired].double(), flipped.boxes[partner].double()  # (pairs, 4)
    side = (a[:, 2:] - a[:, :2] + b[:, 2:] - b[:, :2]) / 2  # (pairs, 2) mean width, height
    sure = torch.zeros(paired.shape, dtype=torch.float64, device=paired.device)
    sure[paired] = (1 - (a - b).abs() / side.repeat(1, 2)).clamp(min=0).mean(1)  # matched, so no side is 0
    count = paired.sum(1) + lone
    return _means(count - sure.sum(1), count)


FILTERS = dict(semantic=semantic_disagreement, diversity=category_diversity, overlap=overlap_ratio)
FILTERS["localisation"] = localisation_confidence  # in the published order


def _paired(plain: Detections, flipped: Detections) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """paired (N, T) bool; (image, row) of each pair in the flipped view; boxes (N,) of both that nobody matches."""
    index = match(plain, flipped)
    paired = index >= 0
    lone = plain.valid.sum(1) + flipped.valid.sum(1) - 2 * paired.sum(1)
    return paired, (paired.nonzero()[:, 0], index[paired]), lone


def _means(total: Tensor, count: Tensor) -> Scores:
    return Scores((total / count.clamp(min=1)).cpu().numpy(), (count > 0).cpu().numpy())


def cascade_stages(seen: Observation, k: int, rng: np.random.Generator) -> list[tuple[str, np.ndarray, Scores]]:
    """Retrieval and four filters: (name, the positions it left, best first, its scores of all images) of each.

    They leave round(size * k) images for the sizes in `query.cascade`, and k.
    """
    query = seen.config.query
    steps = {"retrieval": retrieval, **{name: FILTERS[name] for name in query.cascade_order}}
    scores = [step(seen.detections, seen.flipped_detections) for step in steps.values()]
    kept = [max(k, min(seen.count, round(size * k))) for size in (*query.cascade, 1.0)]
    return list(zip(steps, cascade(scores, kept, rng, query.no_detection_rule), scores, strict=True))


@strategy("cascade", ("detections", "flipped_detections"), "boxes", selects=True, source="HUALE (2023), reconstructed")
def _cascade(seen: Observation, k: int, rng: np.random.Generator) -> Selection:
    stages = cascade_stages(seen, k, rng)
    return Selection(stages[-1][1], stages[0][2])
