"""The labelling flywheel (active-vision, 2025): notebook 50. When to stop.

Its loop is that of all notebooks; what is new is who annotates (`labelling.StoreOracle`). Part A, classes: a linear
classifier on the features of a frozen network, cached once. Part B ("50b"), boxes: one node, every cycle trains from
the first weights (digits: from an initial model); the images that are held out say what the detector makes of images
it knows nothing of.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pandas as pd

from .. import metrics
from . import ssd_vae
from .sizes import Preset, Sizes

_CLASSES: Sizes = dict(classifier="linear", clients=1, initial_model_images=0, rounds=1, seconds_per_box=0.0)
_SMALL: dict[str, Sizes] = {
    "digit-images": {
        **_CLASSES,
        **dict(image_size=(16, 16), feature_side=64, limit=(900, 500)),
        **dict(methods=("random", "margin", "entropy", "model_outlier", "cluster", "mix_diverse"), seeds=(0,)),
        **dict(initial_labels=20, query_size=20, cycles=5, goal=0.85, threads=1),
    },
    "": {
        **_CLASSES,
        **dict(image_size=(32, 32), feature_side=96, limit=(10000, 2000)),
        **dict(initial_labels=100, query_size=100, cycles=11, goal=0.7, threads=1),
    },
}
_FULL: Sizes = {
    **_CLASSES,
    **dict(dataset="cifar10", image_size=(32, 32), feature_side=224),
    **dict(initial_labels=100, query_size=100, cycles=21, goal=0.9, threads=0, seeds=(0, 1, 2, 3, 4)),
}
_SMALL_BOXES: dict[str, Sizes] = {
    "digits": {
        **ssd_vae.DIGITS,
        **dict(scenes=(140, 50), initial_model_iterations=100, iterations=30, held_out_images=10),
        **dict(methods=("random", "avg", "margin_avg", "cluster"), seeds=(0,)),
    },
    "bccd": {**ssd_vae.BCCD, "held_out_images": 20},
    "": {**ssd_vae.PHOTOGRAPHS, "held_out_images": 10},
}
_METHODS = (
    *("random", "confidence", "margin", "ratio", "entropy", "model_outlier", "embedding_outlier", "cluster"),
    *("representative", "coreset", "mix", "mix_diverse"),
)
_BOX_METHODS = (
    *("random", "avg", "margin_avg", "ratio_avg", "entropy_avg", "model_outlier", "embedding_outlier", "cluster"),
    *("representative", "mix"),
)
PRESETS = {
    "50": Preset(_METHODS, _FULL, small=_SMALL, data={"smoke": "digit-images", "quick": "cifar10"}),
    "50b": Preset(_BOX_METHODS, {**ssd_vae.FULL_SSD, "held_out_images": 500}, small=_SMALL_BOXES),
}


def stopping(table: pd.DataFrame, y: str, goal: float, budget: int, plateau: float = 0.0) -> pd.DataFrame:
    """Where each rule would have ended the labelling: columns method, rule, images, value (of y there).

    The evaluation set decides here, as in active-vision: a number that stops a loop is not a fair report of it. A rule
    that never strikes has no images.
    table, y: of `record.table`, several seeds; its column.
    goal: the mean over seeds reaches it.
    budget: so many images.
    plateau: the 95 % interval of the gain over the last cycle, paired by seed, lies below this many points (100 x y).
    """
    found = []
    for method, runs in metrics.cycle_ends(table).groupby("method", sort=False):
        wide = runs.pivot(index="cycle", columns="seed", values=y).dropna(axis=1)
        images, mean, cycles = runs.groupby("cycle")["images"].mean(), wide.mean(axis=1), list(wide.index)
        gains = {b: metrics.paired_test(100 * wide.loc[b], 100 * wide.loc[a]) for a, b in pairwise(cycles)}
        most = {cycle: gain["difference" if math.isnan(gain["high"]) else "high"] for cycle, gain in gains.items()}
        strikes = {
            "goal": [cycle for cycle in cycles if mean[cycle] >= goal],
            "budget": [cycle for cycle in cycles if images[cycle] >= budget],
            "plateau": [cycle for cycle, high in most.items() if high < plateau],
        }
        for rule, where in strikes.items():
            at = (float(images[where[0]]), float(mean[where[0]])) if where else (math.nan, math.nan)
            found.append((method, rule, *at))
    return pd.DataFrame(found, columns=["method", "rule", "images", "value"])
