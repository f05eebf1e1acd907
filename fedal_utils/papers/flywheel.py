"""The labelling flywheel (active-vision, 2025): notebook 50. When to stop, and which labels to look at again.

Part A, classes: a linear classifier on frozen features. Part B ("50b"), boxes: one node, from the first weights.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import metrics
from ..detectors import LinearClassifier, out_of_fold
from ..federation import Setup
from ..labelling import Simulated, truth_of
from ..sampling import Scores, top_k
from ..seeding import rng_for
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
    """Where each rule would have ended the labelling: columns method, rule, images, value (of y there), NaN if nowhere.

    The evaluation set decides, as in active-vision: a number that stops a loop is no fair report of it.
    table, y: of `record.table`; its column. goal, budget: the mean over seeds reaches it; so many images.
    plateau: the 95 % interval of the gain over the last cycle, paired by seed, lies below this many points (100 x y).
    """
    found = []
    for method, runs in metrics.cycle_ends(table).groupby("method", sort=False):
        wide = runs.pivot(index="cycle", columns="seed", values=y).dropna(axis=1)
        images, mean = runs.groupby("cycle")["images"].mean(), wide.mean(axis=1)
        gains = {b: metrics.paired_test(100 * wide.loc[b], 100 * wide.loc[a]) for a, b in pairwise(wide.index)}
        flat = [b for b, gain in gains.items() if gain["difference" if math.isnan(gain["high"]) else "high"] < plateau]
        strikes = {"goal": mean.index[mean >= goal], "budget": images.index[images >= budget], "plateau": flat}
        for rule, at in strikes.items():
            where = (float(images[at[0]]), float(mean[at[0]])) if len(at) else (math.nan, math.nan)
            found.append((method, rule, *where))
    return pd.DataFrame(found, columns=["method", "rule", "images", "value"])


WAYS = ("as given", "suspects corrected", "random ones corrected", "as many more labels")


def suspects(held_out: Tensor, classes: Tensor) -> Scores:
    """1 - self-confidence (Northcutt et al. 2021) of labels (L,) by log-probabilities (L, C) of models without them."""
    return Scores.all(1 - held_out.gather(1, classes[:, None])[:, 0].exp())


def label_errors(setup: Setup, seeds: Sequence[int], labels: int, error: float, again: int) -> tuple:
    """Does it pay to look again? A frame of a row a seed: wrong, found, accuracy after each of `WAYS`; and of effects.

    wrong, found: the share of wrong labels, in all and among the suspects. labels, error: so many random images are
    labelled, with this share of wrong labels. again: so many suspects are looked at once more (or images labelled).
    """
    names, images, strength = setup.class_names, setup.train.images, setup.config.flywheel.regularisation
    true, tested = (part.labels.classes[:, 0].cpu() - 1 for part in (setup.train, setup.test))
    knows, found = truth_of(setup.photos[0], "classes"), []

    def accuracy(rows: np.ndarray, classes: Tensor) -> float:
        model = LinearClassifier(len(names))
        model.fit(images.take(rows).features[0], classes[rows], strength)
        return metrics.accuracy(model(setup.test.images.features), tested, names)["accuracy"]

    for seed in seeds:
        rng, person = rng_for(seed, "label errors"), Simulated(knows, error, seed=seed)
        order, given = rng.permutation(len(images)), true.clone()
        rows, more = np.sort(order[:labels]), np.sort(order[: labels + again])
        given[more] = torch.tensor([names.index(person.label(images.ids[row], "classes", names)) for row in more])
        _, logs = out_of_fold(images.take(rows).features[0], given[rows], len(names), rng, strength)
        suspected = rows[top_k(suspects(logs, given[rows]), again, rng)]
        checked, control, others = given.clone(), given.clone(), rows[rng.permutation(len(rows))[:again]]
        checked[suspected], control[others] = true[suspected], true[others]
        after = [accuracy(rows, classes) for classes in (given, checked, control)] + [accuracy(more, given)]
        wrong = (given != true).numpy()
        row = {"seed": seed, "wrong": float(wrong[rows].mean()), "found": float(wrong[suspected].mean())}
        found.append(row | dict(zip(WAYS, after, strict=True)))
    points = {way: {row["seed"]: np.array([100 * row[way]]) for row in found} for way in WAYS}
    effects = [metrics.effect(way, "accuracy", points[way], points[WAYS[0]], seeds) for way in WAYS[1:]]
    return pd.DataFrame(found), pd.DataFrame(effects)
