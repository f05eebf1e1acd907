"""Scores: one number an image, bigger = query first, from what models say, never from labels; and how they select."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ..data import Detections

UNCERTAINTIES = ("entropy", "margin", "confidence", "ratio")  # Settles (2012) eq. 2.3, 2.2, 2.1; Monarch (2021), ch. 3


@dataclass(frozen=True)
class Scores:
    """values (N,) float64, finite where `scored`; scored (N,) bool: the image had something to score."""

    values: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def none(cls, count: int) -> "Scores":
        """Of images that a strategy selects together, or has nothing to say of: none is scored."""
        return cls(np.zeros(count), np.zeros(count, dtype=bool))

    @classmethod
    def all(cls, values: np.ndarray | Tensor) -> "Scores":
        """Of images that are all scored."""
        values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
        return cls(values, np.ones(len(values), dtype=bool))


def finite(name: str, values: Tensor) -> Tensor:
    """The same values (N, ...); ValueError with the first row that holds a non-finite one."""
    broken = (~torch.isfinite(values).flatten(1).all(1)).nonzero()
    if len(broken):
        raise ValueError(f"non-finite {name} in row {int(broken[0])}: a broken model must not select images")
    return values


def least_confidence(detections: Detections) -> Tensor:
    """1 - confidence of each detection; van Bommel 2021, 7.1. (N, T) in [0, 1]."""
    return 1 - detections.scores


def entropy(detections: Detections) -> Tensor:
    """Entropy of each detection's class distribution in nats; Settles (2012) eq. 2.3. (N, T) in [0, ln(C + 1)]."""
    return torch.special.entr(detections.probs).sum(-1)


def margin(detections: Detections) -> Tensor:
    """1 - (best - second best) class probability; Settles (2012) eq. 2.2, turned: bigger = query first. (N, T)."""
    best, second = detections.probs.topk(2, dim=-1).values.unbind(-1)
    return 1 - (best - second)


def ratio(detections: Detections) -> Tensor:
    """Second best / best class probability of each detection, 1 = torn between two; Monarch (2021), ch. 3. (N, T)."""
    best, second = detections.probs.topk(2, dim=-1).values.unbind(-1)
    return second / best


def reduce(values: Tensor, valid: Tensor, how: str) -> Scores:
    """One number an image from its detections' (N, T) values: 'sum', 'avg' or 'max' over `valid` (N, T) bool."""
    values, count = finite("score", values.double().masked_fill(~valid, 0)), valid.sum(1)
    out = values.sum(1)
    if how == "avg":
        out = out / count.clamp(min=1)
    elif how == "max" and values.shape[1]:
        out = values.masked_fill(~valid, -torch.inf).amax(1).masked_fill(count == 0, 0)
    return Scores(out.cpu().numpy(), (count > 0).cpu().numpy())


def uncertainty(logits: Tensor, how: str) -> Scores:
    """How unsure a model is of whole images, by a name in `UNCERTAINTIES`, from its class scores (N, C)."""
    logits = logits.double()
    probs = logits.softmax(1)
    if how == "entropy":
        return Scores.all(torch.special.entr(probs).sum(1))
    if how == "confidence":
        return Scores.all(1 - probs.amax(1))
    best, second = (logits if how == "ratio" else probs).topk(2, dim=1).values.unbind(1)
    return Scores.all((second - best).exp() if how == "ratio" else 1 - (best - second))


def query_by_committee(committee: Tensor) -> Scores:
    """Mean divergence in nats of the members' class probabilities from their mean, 0 .. ln M, in float64.

    1/M sum_m KL(P_m || P), P the consensus 1/M sum_m P_m, of class scores (M, N, C); McCallum and Nigam 1998.
    """
    members = committee.double().transpose(0, 1).log_softmax(2)  # (N, M, C)
    consensus = members.logsumexp(1, keepdim=True) - math.log(members.shape[1])  # (N, 1, C) logs: nothing underflows
    return Scores.all((members.exp() * (members - consensus)).sum(2).mean(1).clamp(min=0))


@dataclass(frozen=True)
class Selection:
    """positions (k,) to label, first one first; scores of all N images: why."""

    positions: np.ndarray
    scores: Scores


def top_k(scores: Scores, k: int, rng: np.random.Generator, empty: str = "last") -> np.ndarray:
    """Positions of the k largest scores, best first; ties break by `rng`, never by memory order.

    empty: where images that had nothing to score come, in random order: 'last', 'first', or 'never' (van Bommel's
    released code; fewer than k may come back). ValueError: more than there are, or a score that is not finite.
    """
    if not 0 <= k <= len(scores):
        raise ValueError(f"a query of {k} images, but the pool has {len(scores)} unlabelled ones")
    values = np.where(scores.scored, scores.values, 0.0)
    if not np.isfinite(values).all():
        raise ValueError(f"non-finite score at position {np.flatnonzero(~np.isfinite(values))[0]}")
    rank = np.where(scores.scored, 1, 0 if empty == "first" else 2)
    order = np.lexsort((rng.random(len(scores)), -values, rank))
    return order[scores.scored[order]][:k] if empty == "never" else order[:k]


def cascade(steps: Sequence[Scores], sizes: Sequence[int], rng: np.random.Generator, empty: str) -> list[np.ndarray]:
    """Positions left after each step, the last = the selection: the sizes[i] best (`top_k`) of what was left before."""
    left, stages = np.arange(len(steps[0])), []
    for scores, size in zip(steps, sizes, strict=True):
        here = Scores(scores.values[left], scores.scored[left])
        left = left[top_k(here, min(size, len(left)) if stages else size, rng, empty)]
        stages.append(left)
    return stages


def portions(shares: Mapping[str, float], k: int) -> dict[str, int]:
    """How many of k images each strategy selects: whole parts of its share, then one each to the largest remainders."""
    quotas = {name: Fraction(str(share)) * k for name, share in shares.items()}  # 0.29 is 29/100: 29 of 100 images
    sizes = {name: math.floor(quota) for name, quota in quotas.items()}
    for name in sorted(quotas, key=lambda name: sizes[name] - quotas[name])[: k - sum(sizes.values())]:
        sizes[name] += 1
    return sizes
