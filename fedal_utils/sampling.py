"""Scores (pure, one number an image, bigger = ask first) and, apart from them, selections.

Scoring sees detections and nothing else: no labels, no data set. Scores of single detections are reduced to one number
an image by sum, mean or maximum. Source of the reductions: van Bommel 2021, section 7.1 of the released code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    "random", "sum", "avg", "max", "count",
    *(f"{value}_{how}" for value in ("entropy", "margin") for how in ("sum", "avg", "max")),
)  # fmt: skip


def needs_model(strategy: str) -> bool:
    """False for strategies that look at nothing."""
    return strategy != "random"


def score(strategy: str, detections: Detections | None, images: int, rng: np.random.Generator) -> Scores:
    """Scores by name: 'random', 'count', 'sum' | 'avg' | 'max' (least confidence), 'entropy_max', 'margin_avg', ...

    detections: the model's output for the `images` unlabelled images, already cut at the score threshold.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if strategy == "random":
        return random(images, rng)
    if detections is None or len(detections) != images:
        got = "none" if detections is None else len(detections)
        raise ValueError(f"strategy {strategy!r} needs detections of {images} images, got {got}")
    if strategy == "count":
        return box_count(detections)
    value, how = _SHORT.get(strategy, strategy).split("_")
    return reduce(_VALUES[value](detections), detections.valid, how)


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
