"""Scores (pure, one number an image, bigger = ask first) and, apart from them, selections.

A strategy sees a `Sight` and nothing else: what the model says about images, never their labels. Scores of single
detections are reduced to one number an image by sum, mean or maximum. Source of the reductions: van Bommel 2021,
section 7.1 of the released code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .boxes import Detections

EMPTY_RULES = ("last", "first", "never")


@dataclass(frozen=True)
class Scores:
    """values (N,) float64, finite where `scored`; scored (N,) bool: the image had something to score."""

    values: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class View:
    """The same images after a change of their pixels: where the plain detections' boxes lie there, and what is seen.

    moved: (N, T, 4) xyxy pixels of the changed images, row by row the boxes of `Sight.detections`.
    """

    moved: Tensor
    found: Detections


@dataclass(frozen=True)
class Sight:
    """All that a strategy may see of N unlabelled images; what it does not need (see `needs`) may be None.

    detections: on the images as they are, cut at the score threshold. flipped: on the mirrored images, boxes mapped
    back. views: changed images by name. crowd: all boxes before non-maximum suppression. embedding (N, D) of these
    images, known (L, D) of the labelled ones. labelled (C,): mean boxes of each class per labelled image.
    """

    images: int
    detections: Detections | None = None
    flipped: Detections | None = None
    views: Mapping[str, View] = field(default_factory=dict)
    crowd: Detections | None = None
    embedding: Tensor | None = None
    known: Tensor | None = None
    labelled: np.ndarray | None = None


@dataclass(frozen=True)
class Choice:
    """positions (k,) to ask, first one first; scores of all N images: why."""

    positions: np.ndarray
    scores: Scores


def least_confidence(detections: Detections) -> Tensor:
    """1 - confidence of each detection; van Bommel 2021, 7.1. Returns (N, T) in [0, 1]; padding is not looked at."""
    return 1 - detections.scores


def entropy(detections: Detections) -> Tensor:
    """Entropy of each detection's class distribution in nats; Settles (2012) eq. 2.3. (N, T) in [0, ln(C + 1)]."""
    return torch.special.entr(detections.probs).sum(-1)


def margin(detections: Detections) -> Tensor:
    """1 - (best - second best) class probability; Settles (2012) eq. 2.2, turned so that bigger = ask first. (N, T)."""
    top = detections.probs.topk(2, dim=-1).values  # (N, T, 2) best, second
    return 1 - (top[..., 0] - top[..., 1])


def reduce(values: Tensor, valid: Tensor, how: str) -> Scores:
    """One number an image from its detections' (N, T) values: 'sum', 'avg' or 'max' over `valid` (N, T) bool."""
    count = valid.sum(1)
    values = values.double()
    if not bool(torch.isfinite(values[valid]).all()):
        image = int((~torch.isfinite(values) & valid).any(1).nonzero()[0])
        raise ValueError(f"non-finite score for image {image} of {len(values)}: a broken model must not choose labels")
    total = values.masked_fill(~valid, 0).sum(1)
    if how == "sum":
        out = total
    elif how == "avg":
        out = total / count.clamp(min=1)
    elif how == "max":
        out = values.masked_fill(~valid, -torch.inf).amax(1) if values.shape[1] else total
        out = out.masked_fill(count == 0, 0)
    else:
        raise ValueError(f"reduction must be 'sum', 'avg' or 'max', got {how!r}")
    return Scores(out.cpu().numpy(), (count > 0).cpu().numpy())


def box_count(detections: Detections) -> Scores:
    """How many detections the image has: crowded first. Zero is a count, so every image is scored."""
    count = detections.valid.sum(1).double().cpu().numpy()
    return Scores(count, np.ones(len(count), dtype=bool))


def random(images: int, rng: np.random.Generator) -> Scores:
    """A uniform number an image: the baseline that every strategy must beat."""
    return Scores(rng.random(images), np.ones(images, dtype=bool))


_VALUES: dict[str, Callable[[Detections], Tensor]] = {
    "confidence": least_confidence, "entropy": entropy, "margin": margin,
}  # fmt: skip
_SHORT = {"sum": "confidence_sum", "avg": "confidence_avg", "max": "confidence_max"}
STRATEGIES = (
    "random", "sum", "avg", "max", "count", "coreset",
    *(f"{value}_{how}" for value in ("entropy", "margin") for how in ("sum", "avg", "max")),
)  # fmt: skip


def needs(strategy: str) -> frozenset[str]:
    """The fields of `Sight` that a strategy reads; none for one that looks at nothing."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    return frozenset({"random": (), "coreset": ("embedding", "known")}.get(strategy, ("detections",)))


def choose(strategy: str, sight: Sight, k: int, rng: np.random.Generator, empty: str = "last") -> Choice:
    """The k images of a pool to ask next, by a strategy of this module."""
    if strategy == "coreset":
        if sight.embedding is None or sight.known is None:
            raise ValueError("strategy 'coreset' needs embeddings of the unlabelled and the labelled images")
        if len(sight.embedding) != sight.images:
            raise ValueError(
                f"strategy 'coreset' needs embeddings of {sight.images} images, got {len(sight.embedding)}"
            )
        positions, distances = k_center(sight.embedding, sight.known, k, rng)
        return Choice(positions, Scores(distances, np.ones(sight.images, dtype=bool)))
    scores = score(strategy, sight.detections, sight.images, rng)
    return Choice(top_k(scores, k, rng, empty), scores)


def score(strategy: str, detections: Detections | None, images: int, rng: np.random.Generator) -> Scores:
    """Scores by name: 'random', 'count', 'sum' | 'avg' | 'max' (least confidence), 'entropy_max', 'margin_avg', ...

    detections: the model's output for the `images` unlabelled images, already cut at the score threshold.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if strategy == "coreset":
        raise ValueError("strategy 'coreset' chooses a set of images together; it has no score of one image")
    if strategy == "random":
        return random(images, rng)
    if detections is None or len(detections) != images:
        got = "none" if detections is None else len(detections)
        raise ValueError(f"strategy {strategy!r} needs detections of {images} images, got {got}")
    if strategy == "count":
        return box_count(detections)
    value, how = _SHORT.get(strategy, strategy).split("_")
    return reduce(_VALUES[value](detections), detections.valid, how)


def k_center(
    embedding: Tensor, known: Tensor, k: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Greedy k-center (core-set; Sener and Savarese 2018, 1708.00489, algorithm 1): the farthest point, k times.

    embedding (N, D) of the pool, known (L, D) of the labelled images, which are centres already; without any, the first
    one is drawn. Returns positions (k,), and the distance (N,) of each image to its nearest centre before the choice
    (zeros where there was none). Ties break by `rng`.
    """
    points, centres = embedding.double(), known.double().to(embedding.device)
    if k < 0 or k > len(points):
        raise ValueError(f"budget of {k} images, but the pool has {len(points)} unlabelled ones")
    for name, values in (("embedding", points), ("known", centres)):
        if not bool(torch.isfinite(values).all()):
            row = int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"non-finite {name} in row {row}: a broken model must not choose labels")
    order = torch.from_numpy(rng.permutation(len(points))).to(points.device)  # argmax takes the first of equals
    points = points[order]
    nearest = points.new_full((len(points),), torch.inf)
    for start in range(0, len(centres), 256):  # in blocks: the table of all distances may not fit
        nearest = torch.minimum(nearest, torch.cdist(points, centres[start : start + 256]).amin(1))
    before = torch.where(torch.isinf(nearest), 0.0, nearest)
    taken = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    chosen = []
    for _ in range(k):
        best = int(nearest.masked_fill(taken, -1.0).argmax())
        taken[best] = True
        chosen.append(int(order[best]))
        nearest = torch.minimum(nearest, (points - points[best]).norm(dim=1))
    distances = torch.empty_like(before)
    distances[order] = before
    return np.array(chosen, dtype=np.int64), distances.cpu().numpy()


def cascade(
    steps: Sequence[Scores], sizes: Sequence[int], rng: np.random.Generator, empty: str = "last"
) -> list[np.ndarray]:  # fmt: skip
    """Positions that are left after each step: the sizes[i] best by steps[i] of those that the step before left.

    Each step is `top_k` among the survivors, best first, so the last entry is the choice. Sizes must not grow; where
    the rule 'never' left fewer than the next size, all that are left go on.
    """
    if len(steps) != len(sizes) or not steps:
        raise ValueError(f"a cascade needs one size a step, got {len(steps)} steps and sizes {list(sizes)}")
    if any(later > earlier for earlier, later in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"the sizes of a cascade must not grow, got {list(sizes)}")
    left, stages = np.arange(len(steps[0])), []
    for scores, size in zip(steps, sizes, strict=True):
        here = Scores(scores.values[left], scores.scored[left])
        left = left[top_k(here, min(size, len(left)) if stages else size, rng, empty)]
        stages.append(left)
    return stages


def top_k(scores: Scores, k: int, rng: np.random.Generator, empty: str = "last") -> np.ndarray:
    """Positions of the k largest scores, best first; ties break by `rng`, never by memory order.

    empty: what to do with images that had nothing to score: 'last' (after all scored ones, in random order), 'first'
    (before them: what the model cannot see may be what it must learn), 'never' (van Bommel's released code; fewer than
    k may come back).
    """
    if empty not in EMPTY_RULES:
        raise ValueError(f"the rule for images without detections must be one of {EMPTY_RULES}, got {empty!r}")
    if k < 0 or k > len(scores):
        raise ValueError(f"budget of {k} images, but the pool has {len(scores)} unlabelled ones")
    if not np.isfinite(scores.values[scores.scored]).all():
        bad = np.flatnonzero(~np.isfinite(scores.values) & scores.scored)
        raise ValueError(f"non-finite score at position {bad[0]}: it can be neither best nor worst")
    tie = rng.random(len(scores))
    rank = {"last": 0, "first": 2, "never": 0}[empty]
    level = np.where(scores.scored, 1, rank)
    values = np.where(scores.scored, scores.values, 0.0)
    order = np.lexsort((tie, -values, -level))
    if empty == "never":
        order = order[scores.scored[order]]
    return order[:k]
