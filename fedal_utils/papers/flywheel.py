"""The labelling flywheel (active-vision, 2025): notebook 50. When to stop, and which labels to have looked at again.

Its loop is that of all notebooks; what is new is who annotates (`labelling.StoreOracle`). Part A, classes: a linear
classifier on the features of a frozen network, cached once. Part B ("50b"), boxes: one node, every cycle trains from
the first weights (digits: from an initial model); the images that are held out say what the detector makes of images
it knows nothing of.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import metrics
from ..detectors import LinearClassifier, out_of_fold
from ..federation import Setup
from ..labelling import Annotator, Simulated, Store, StoreOracle, truth_of
from ..sampling import Scores, top_k
from ..seeding import rng_for
from . import ssd_vae
from .sizes import Preset, Sizes

ERRORS = "label errors"  # the strategy of questions that are asked again

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
    table: of `record.table`, several seeds; y: its column.
    goal: the mean over seeds reaches it.
    budget: so many images.
    plateau: the 95 % interval of the gain over the last cycle, paired by seed, lies below this many points (100 x y).
    """
    found = []
    for method, runs in metrics.cycle_ends(table).groupby("method", sort=False):
        wide = runs.pivot(index="cycle", columns="seed", values=y).dropna(axis=1)
        images, mean, cycles = runs.groupby("cycle")["images"].mean(), wide.mean(axis=1), list(wide.index)
        pairs = list(zip(cycles, cycles[1:], strict=False))
        gains = [metrics.paired_test(100 * wide.loc[after], 100 * wide.loc[before]) for before, after in pairs]
        most = [gain["difference"] if math.isnan(gain["high"]) else gain["high"] for gain in gains]
        strikes = {
            "goal": [cycle for cycle in cycles if mean[cycle] >= goal],
            "budget": [cycle for cycle in cycles if images[cycle] >= budget],
            "plateau": [cycle for cycle, high in zip(cycles[1:], most, strict=True) if high < plateau],
        }
        for rule, where in strikes.items():
            at = (float(images[where[0]]), float(mean[where[0]])) if where else (math.nan, math.nan)
            found.append((method, rule, *at))
    return pd.DataFrame(found, columns=["method", "rule", "images", "value"])


def suspects(held_out: Tensor, classes: Tensor) -> Scores:
    """How likely each given label is wrong, 0 .. 1: 1 - the probability that models which did not see it give it.

    held_out (L, C) log-probabilities of `detectors.out_of_fold`, classes (L,) as given. Self-confidence of confident
    learning (Northcutt et al. 2021, 1911.00068).
    """
    if len(held_out) != len(classes):
        raise ValueError(f"one label for each of {len(held_out)} rows is needed, got {len(classes)}")
    return Scores.all(1 - held_out.gather(1, classes[:, None])[:, 0].exp())


def ask_again(
    oracle: StoreOracle, rows: np.ndarray, annotator: Annotator | None, cycle: int, who: str = "checker"
) -> pd.DataFrame:
    """Have labels of these rows looked at once more, by somebody else; the last word counts.

    Returns image, before, after. The questions go through the same store, under the strategy "label errors", in a cycle
    of their own: ValueError for one in which an image was queried first.
    """
    ids = [oracle.images.ids[int(row)] for row in rows]
    history, before = oracle.store.history(), _classes(oracle, rows)
    first = history[(history["cycle"] == cycle) & (history["strategy"] != ERRORS)]
    if first["image"].isin(ids).any():
        raise ValueError(f"some of these images were first queried in cycle {cycle}: ask again in a later one")
    StoreOracle(oracle.store, oracle.images, oracle.store.classes, annotator, ERRORS, who).annotate(rows, cycle)
    oracle.refresh()
    named = [[oracle.class_names[c] for c in said.tolist()] for said in (before, _classes(oracle, rows))]
    return pd.DataFrame({"image": ids, "before": named[0], "after": named[1]})


def label_errors(setup: Setup, seeds: Sequence[int], labels: int, error: float, again: int) -> pd.DataFrame:
    """Does it pay to ask again? One row a seed: wrong, found, and accuracy on the test set after each way of going on.

    wrong: the share of wrong labels; found: of wrong ones among the suspects (at random one would find `wrong`).
    Accuracies: with the labels as given, after the suspects were corrected, after as many random ones were, and with as
    many more labels in their place (the same person, the same error), which cost as much.
    labels: random images that are labelled. error: the share of them whose label is wrong.
    again: how many suspects are looked at once more.
    """
    truth, rows_out = truth_of(setup.photos[0], "classes"), []
    for seed in seeds:
        rng = rng_for(seed, "label errors")
        order = rng.permutation(len(setup.train))
        rows = np.sort(order[:labels])
        with tempfile.TemporaryDirectory() as folder:

            def labelled(name: str, rows: np.ndarray = rows, folder: str = folder, seed: int = seed) -> StoreOracle:
                store = Store(Path(folder) / f"{name}.sqlite", setup.class_names)
                person = Simulated(truth, error, setup.config.query.seconds_per_image, 0.0, seed)
                oracle = StoreOracle(store, setup.train.images, setup.class_names, person, "random")
                oracle.annotate(rows)
                return oracle

            checked, control, more = (labelled(name) for name in ("suspects", "random", "more"))
            more_rows = np.sort(order[: labels + again])
            more.annotate(np.setdiff1d(more_rows, rows), 1)
            given, before = _classes(checked, rows), _accuracy(setup, checked, rows)
            features, strength = setup.train.images.take(rows).features[0], setup.config.flywheel.regularisation
            _, logs = out_of_fold(features, given, len(setup.class_names), rng, strength)
            chosen = top_k(suspects(logs, given), again, rng)
            right = setup.train.labels.classes[torch.from_numpy(rows), 0].cpu() - 1
            wrong = (given != right).numpy()
            checker = Simulated(truth, seed=seed)
            ask_again(checked, rows[chosen], checker, 1)
            ask_again(control, rows[rng.permutation(len(rows))[:again]], checker, 1)
            rows_out.append(
                {
                    "seed": seed,
                    "wrong": float(wrong.mean()),
                    "found": float(wrong[chosen].mean()),
                    "as given": before,
                    "suspects corrected": _accuracy(setup, checked, rows),
                    "random ones corrected": _accuracy(setup, control, rows),
                    "as many more labels": _accuracy(setup, more, more_rows),
                }
            )
            for oracle in (checked, control, more):
                oracle.store.close()
    return pd.DataFrame(rows_out)


def _classes(oracle: StoreOracle, rows: np.ndarray) -> Tensor:
    return oracle.labels_of(rows).classes[:, 0] - 1


def _accuracy(setup: Setup, oracle: StoreOracle, rows: np.ndarray) -> float:
    """On the test set, of a linear classifier trained on what the store says of these rows."""
    model = LinearClassifier(len(setup.class_names))
    features = setup.train.images.take(rows).features[0]
    model.fit(features, _classes(oracle, rows), setup.config.flywheel.regularisation)
    truth = setup.test.labels.classes[:, 0].cpu() - 1
    return metrics.accuracy(model.scores(setup.test.images.features), truth, setup.class_names)["accuracy"]
