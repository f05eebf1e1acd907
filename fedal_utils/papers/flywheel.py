"""The labelling flywheel (active-vision, 2025): notebook 50. When to stop, and which labels to have looked at again.

Part A, classes: a linear classifier on the features of a frozen network. Part B ("50b"), boxes: one node, every cycle
trains from the first weights (digits: from an initial model).
"""

import contextlib
import math
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import metrics
from ..detectors import LinearClassifier, out_of_fold
from ..federation import Setup
from ..labelling import Simulated, Store, StoreOracle, truth_of
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

    The evaluation set decides here, as in active-vision: a number that stops a loop is not a fair report of it.
    table, y: of `record.table`, several seeds; its column.
    goal, budget: the mean over seeds reaches it; so many images.
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


WAYS = ("as given", "suspects corrected", "random ones corrected", "as many more labels")


def suspects(held_out: Tensor, classes: Tensor) -> Scores:
    """How likely each given label is wrong, 0 .. 1: 1 - the probability that models which did not see it give it.

    held_out (L, C) log-probabilities of `detectors.out_of_fold`, classes (L,) as given. Self-confidence of confident
    learning (Northcutt et al. 2021, 1911.00068).
    """
    return Scores.all(1 - held_out.gather(1, classes[:, None])[:, 0].exp())


def label_errors(
    setup: Setup, seeds: Sequence[int], labels: int, error: float, again: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Does it pay to look again? One row a seed: wrong, found, and accuracy after each of `WAYS`; and their effects.

    wrong: the share of wrong labels; found: of wrong ones among the suspects (at random one would find `wrong`). As
    many more labels in the place of corrections (the same person, the same error) cost as much.
    labels: random images that are labelled. error: the share of them whose label is wrong.
    again: how many suspects are looked at once more.
    """
    truth, found = truth_of(setup.photos[0], "classes"), []
    for seed in seeds:
        rng = rng_for(seed, "label errors")
        order = rng.permutation(len(setup.train))
        rows, more_rows = np.sort(order[:labels]), np.sort(order[: labels + again])
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stores:
            person = Simulated(truth, error, setup.config.query.seconds_per_image, 0.0, seed)

            def oracle_of(name: str, stores=stores, folder=folder, person=person, rows=rows) -> StoreOracle:
                store = stores.enter_context(Store(Path(folder) / f"{name}.sqlite", setup.class_names))
                oracle = StoreOracle(store, setup.train.images, setup.class_names, person, "random")
                oracle.annotate(rows)
                return oracle

            checked, control, more = (oracle_of(name) for name in ("suspects", "random", "more"))
            more.annotate(np.setdiff1d(more_rows, rows), 1)
            given, before = _classes(checked, rows), _accuracy(setup, checked, rows)
            features, strength = setup.train.images.take(rows).features[0], setup.config.flywheel.regularisation
            _, logs = out_of_fold(features, given, len(setup.class_names), rng, strength)
            chosen = top_k(suspects(logs, given), again, rng)
            wrong = (given != setup.train.labels.classes[torch.from_numpy(rows), 0].cpu() - 1).numpy()
            for oracle, where in ((checked, chosen), (control, rng.permutation(len(rows))[:again])):
                oracle.annotator, oracle.strategy, oracle.who = Simulated(truth, seed=seed), "label errors", "checker"
                oracle.annotate(rows[where], 1)
            after = [before, *(_accuracy(setup, *one) for one in ((checked, rows), (control, rows), (more, more_rows)))]
            row = {"seed": seed, "wrong": float(wrong.mean()), "found": float(wrong[chosen].mean())}
            found.append(row | dict(zip(WAYS, after, strict=True)))
    frame = pd.DataFrame(found)
    points = {way: {s: np.array([100 * v]) for s, v in frame.set_index("seed")[way].items()} for way in WAYS}
    effects = [metrics.effect(way, "accuracy", points[way], points[WAYS[0]], seeds) for way in WAYS[1:]]
    return frame, pd.DataFrame(effects)


def _classes(oracle: StoreOracle, rows: np.ndarray) -> Tensor:
    return oracle.labels_of(rows).classes[:, 0] - 1


def _accuracy(setup: Setup, oracle: StoreOracle, rows: np.ndarray) -> float:
    """On the test set, of a linear classifier trained on what the store says of these rows."""
    model = LinearClassifier(len(setup.class_names))
    features = setup.train.images.take(rows).features[0]
    model.fit(features, _classes(oracle, rows), setup.config.flywheel.regularisation)
    truth = setup.test.labels.classes[:, 0].cpu() - 1
    return metrics.accuracy(model(setup.test.images.features), truth, setup.class_names)["accuracy"]
