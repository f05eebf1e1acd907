"""From scores to a selection: the k largest, a cascade of filters, shares of several strategies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .scores import Scores


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
    bad = np.flatnonzero(~np.isfinite(scores.values) & scores.scored)
    if len(bad):
        raise ValueError(f"non-finite score at position {bad[0]}: it can be neither best nor worst")
    level = np.where(scores.scored, 1, 2 if empty == "first" else 0)
    order = np.lexsort((rng.random(len(scores)), -np.where(scores.scored, scores.values, 0.0), -level))
    if empty == "never":
        order = order[scores.scored[order]]
    return order[:k]


def cascade(
    steps: Sequence[Scores], sizes: Sequence[int], rng: np.random.Generator, empty: str = "last"
) -> list[np.ndarray]:
    """Positions left after each step, the last = the selection: the sizes[i] best (`top_k`) of what was left before."""
    left, stages = np.arange(len(steps[0])), []
    for scores, size in zip(steps, sizes, strict=True):
        here = Scores(scores.values[left], scores.scored[left])
        left = left[top_k(here, min(size, len(left)) if stages else size, rng, empty)]
        stages.append(left)
    return stages


def portions(shares: Mapping[str, float], k: int) -> dict[str, int]:
    """How many of k images each strategy selects: whole parts, then one each to the largest remainders."""
    exact = {name: Fraction(repr(float(share))) for name, share in shares.items()}  # 0.29 is 29/100: 29 of 100 images
    quotas = {name: share * k / sum(exact.values()) for name, share in exact.items()}
    sizes = {name: math.floor(quota) for name, quota in quotas.items()}
    by_rest = sorted(quotas, key=lambda name: sizes[name] - quotas[name])  # stable: of equals the first
    for name in by_rest[: k - sum(sizes.values())]:
        sizes[name] += 1
    return sizes
