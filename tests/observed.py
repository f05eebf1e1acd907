"""Observations by hand for tests of query strategies, and a selection by name."""

from __future__ import annotations

import numpy as np

from fedal_utils.config import Config
from fedal_utils.sampling import Observation, Selection, find, registered


def observed(count: int, config: Config | None = None, **what) -> Observation:
    """An observation of `count` images; what was not observed is None where a strategy may ask for it in vain."""
    return Observation(config or Config(), count, **what)


def chosen(name: str, seen: Observation, k: int, rng: np.random.Generator, rule: str = "last", **settings) -> Selection:
    """The selection of a strategy of this name, whatever its kind; rule: `no_detection_rule`."""
    kinds = [kind for kind in ("boxes", "images") if name.partition(".")[0] in registered(kind)]
    kind = "images" if "images" in kinds and ("class_scores" in seen.__dict__ or kinds == ["images"]) else kinds[0]
    seen.config = seen.config.replace(no_detection_rule=rule, **settings)
    return find(name, kind).select(seen, k, rng)


def scored(name: str, found, count: int, rng: np.random.Generator):
    """Scores of a strategy that reduces detections to one number an image."""
    return chosen(name, observed(count, detections=found), 0, rng).scores
