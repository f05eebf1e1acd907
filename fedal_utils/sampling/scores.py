"""Scores: one number an image, bigger = query first; pure functions of what models say, never of labels.

Scores of single detections are reduced to one number an image by sum, mean or maximum (van Bommel 2021, section 7.1 of
the released code). Whole images are scored by the class scores of one model or of a committee of models. N images,
T boxes of an image, C classes, M models. Divergences and entropies are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import Detections

UNCERTAINTIES = ("entropy", "margin", "confidence", "ratio")
BLOCK = 1024  # rows of a large table that are looked at in float64 at a time


@dataclass(frozen=True)
class Scores:
    """values (N,) float64, finite where `scored`; scored (N,) bool: the image had something to score."""

    values: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def none(cls, count: int) -> Scores:
        """Of images that a strategy selects together, or has nothing to say of: none is scored."""
        return cls(np.zeros(count), np.zeros(count, dtype=bool))

    @classmethod
    def all(cls, values: np.ndarray | Tensor) -> Scores:
        """Of images that are all scored."""
        values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
        return cls(values, np.ones(len(values), dtype=bool))


def finite(name: str, values: Tensor) -> Tensor:
    """The same values; ValueError with the first row of (N, ...) that holds a non-finite one."""
    for start in range(0, len(values), 8 * BLOCK):  # or the check would need as much memory as the values
        fine = torch.isfinite(values[start : start + 8 * BLOCK])
        if not bool(fine.all()):
            row = start + int((~fine).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"non-finite {name} in row {row}: a broken model must not select images")
    return values


def least_confidence(detections: Detections) -> Tensor:
    """1 - confidence of each detection; van Bommel 2021, 7.1. Returns (N, T) in [0, 1]; padding is not looked at."""
    return 1 - detections.scores


def entropy(detections: Detections) -> Tensor:
    """Entropy of each detection's class distribution in nats; Settles (2012) eq. 2.3. (N, T) in [0, ln(C + 1)]."""
    return torch.special.entr(detections.probs).sum(-1)


def margin(detections: Detections) -> Tensor:
    """1 - (best - second best) class probability; Settles (2012) eq. 2.2, turned: bigger = query first. (N, T)."""
    top = detections.probs.topk(2, dim=-1).values  # (N, T, 2) best, second
    return 1 - (top[..., 0] - top[..., 1])


def ratio(detections: Detections) -> Tensor:
    """Second best / best class probability of each detection, 1 = torn between two; Monarch (2021), ch. 3. (N, T)."""
    top = detections.probs.topk(2, dim=-1).values  # (N, T, 2) best, second
    return top[..., 1] / top[..., 0]


def reduce(values: Tensor, valid: Tensor, how: str) -> Scores:
    """One number an image from its detections' (N, T) values: 'sum', 'avg' or 'max' over `valid` (N, T) bool."""
    count = valid.sum(1)
    values = values.double()
    if not bool(torch.isfinite(values[valid]).all()):
        image = int((~torch.isfinite(values) & valid).any(1).nonzero()[0])
        raise ValueError(f"non-finite score for image {image} of {len(values)}: a broken model must not select images")
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


def uncertainty(logits: Tensor, how: str) -> Scores:
    """How unsure a model is of whole images, from its class scores (N, C), in float64; Settles (2012), ch. 2.

    'entropy' of the class probabilities in nats (eq. 2.3), 0 .. ln C; 'margin', 1 - (best - second best) (eq. 2.2), and
    'confidence', 1 - best (least confidence, eq. 2.1), both turned so that bigger = query first; 'ratio', second best /
    best (Monarch 2021, ch. 3), taken from the difference of the class scores. Probabilities of exactly 0 are no harm.
    """
    logits = finite("logits", logits.double())
    if how in ("margin", "ratio") and logits.shape[1] < 2:
        raise ValueError(f"a {how} needs two classes or more, got logits {tuple(logits.shape)}")
    probs = logits.softmax(1)
    if how == "entropy":
        values = torch.special.entr(probs).sum(1)
    elif how == "margin":
        best, second = probs.topk(2, dim=1).values.unbind(1)
        values = 1 - (best - second)
    elif how == "confidence":
        values = 1 - probs.amax(1)
    elif how == "ratio":
        best, second = logits.topk(2, dim=1).values.unbind(1)
        values = (second - best).exp()
    else:
        raise ValueError(f"uncertainty must be one of {UNCERTAINTIES}, got {how!r}")
    return Scores(values.cpu().numpy(), np.ones(len(values), dtype=bool))


def query_by_committee(committee: Tensor) -> Scores:
    """Mean divergence in nats of the members' class probabilities from their mean, 0 .. ln M, in float64.

    1/M sum_m KL(P_m || P), P the consensus 1/M sum_m P_m; McCallum and Nigam 1998; Settles (2012), ch. 3.
    committee: (M, N, C) class scores; one member alone never disagrees.
    """
    if committee.dim() != 3 or not len(committee):
        raise ValueError(f"a committee must be (M, N, C) with M >= 1, got {tuple(committee.shape)}")
    members = finite("committee", committee.double().transpose(0, 1)).log_softmax(2)  # (N, M, C)
    consensus = members.logsumexp(1, keepdim=True) - math.log(members.shape[1])  # (N, 1, C) logs: nothing underflows
    apart = (members.exp() * (members - consensus)).sum(2)  # (N, M)
    return Scores(apart.mean(1).clamp(min=0).cpu().numpy(), np.ones(len(apart), dtype=bool))
