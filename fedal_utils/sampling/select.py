"""From scores to a selection: the k largest, a cascade of filters, shares of several strategies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .scores import Scores

NO_DETECTION_RULES = ("last", "first", "never")


@dataclass(frozen=True)
class Selection:
    """positions (k,) to label, first one first; scores of all N images: why."""

    positions: np.ndarray
    scores: Scores


def affordable(k: int, images: int) -> None:
    if k < 0 or k > images:
        raise ValueError(f"a query of {k} images, but the pool has {images} unlabelled ones")


def top_k(scores: Scores, k: int, rng: np.random.Generator, empty: str = "last") -> np.ndarray:
    """Positions of the k largest scores, best first; ties break by `rng`, never by memory order.

    empty: what to do with images that had nothing to score: 'last' (after all scored ones, in random order), 'first'
    (before them: what the model cannot see may be what it must learn), 'never' (van Bommel's released code; fewer than
    k may come back).
    """
    if empty not in NO_DETECTION_RULES:
        raise ValueError(f"the rule for images without detections must be one of {NO_DETECTION_RULES}, got {empty!r}")
    affordable(k, len(scores))
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


def cascade(
    steps: Sequence[Scores], sizes: Sequence[int], rng: np.random.Generator, empty: str = "last"
) -> list[np.ndarray]:
    """Positions that are left after each step: the sizes[i] best by steps[i] of those that the step before left.

    Each step is `top_k` among the survivors, best first, so the last entry is the selection. Sizes must not grow; where
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


def portions(shares: Mapping[str, float], k: int) -> dict[str, int]:
    """How many of k images each strategy selects: whole parts, then one each to the largest remainders.

    shares: fractions >= 0 that sum to 1 within 1e-9. (active-vision gives the whole rest to the first strategy.)
    """
    given = {name: float(share) for name, share in shares.items()}
    for name, share in given.items():
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"the share of {name!r} is {share}; allowed are finite fractions >= 0")
    if abs(math.fsum(given.values()) - 1) > 1e-9:
        raise ValueError(f"the shares {given} sum to {math.fsum(given.values())}; they must sum to 1")
    if k < 0:
        raise ValueError(f"a query of {k} images: it must be 0 or more")
    exact = {name: Fraction(repr(share)) for name, share in given.items()}  # 0.29 is 29/100: 29 of 100 images
    quotas = {name: share * k / sum(exact.values()) for name, share in exact.items()}
    sizes = {name: math.floor(quota) for name, quota in quotas.items()}
    by_rest = sorted(quotas, key=lambda name: sizes[name] - quotas[name])  # stable: of equals the first
    for name in by_rest[: k - sum(sizes.values())]:
        sizes[name] += 1
    return sizes


def combination(
    shares: Mapping[str, float], select: Callable[[str, np.ndarray, int], np.ndarray], k: int, images: int
) -> np.ndarray:
    """Positions (k,) by several strategies, each selects its `portions` of k, in order, among what those before left.

    select: (strategy, positions (n,) that are left of the pool's 0..images-1, ascending, how many) -> that many of
    them; not called for none.
    """
    affordable(k, images)
    left, selected = np.arange(images), [np.zeros(0, dtype=np.int64)]
    for name, count in portions(shares, k).items():
        if count:
            found = np.asarray(select(name, left.copy(), count))
            distinct = np.unique(found)
            if found.shape != (count,) or len(distinct) != count or not np.isin(distinct, left).all():
                raise ValueError(
                    f"strategy {name!r} had to select {count} different of the {len(left)} images left, got "
                    f"{found.tolist()[:10]} of shape {found.shape}"
                )
            selected.append(found.astype(np.int64))
            left = np.setdiff1d(left, distinct, assume_unique=True)
    return np.concatenate(selected)
