"""The flywheel's stopping rules, by hand."""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from fedal_utils import papers
from fedal_utils.data import Dataset, Images, Labels
from fedal_utils.federation import Setup
from fedal_utils.papers import flywheel
from fedal_utils.training import CachedImages

NAMES = ("ant", "bee", "cow", "dog")


def curve(values, method="margin", images=10) -> list[dict]:
    """values[seed][cycle]: rows as `record.table` gives them, a client's and an earlier round's among them."""
    rows = []
    for seed, accuracies in enumerate(values):
        for cycle, accuracy in enumerate(accuracies):
            key = {"method": method, "seed": seed, "cycle": cycle, "images": images * (cycle + 1)}
            rows.append({**key, "round": 0, "client": "0", "accuracy": math.nan})
            rows.append({**key, "round": 0, "client": "server", "accuracy": accuracy})
    return rows


def test_each_rule_stops_where_it_should():
    rising = [[0.50, 0.70, 0.80, 0.803], [0.52, 0.72, 0.82, 0.822], [0.51, 0.71, 0.81, 0.814]]
    table = pd.DataFrame(curve(rising) + curve([[0.1, 0.3, 0.5, 0.7]] * 3, "random", images=20))
    found = flywheel.stopping(table, "accuracy", goal=0.81, budget=25, plateau=1.0)
    assert found[["method", "rule"]].to_records(index=False).tolist() == [
        (method, rule) for method in ("margin", "random") for rule in ("goal", "budget", "plateau")
    ]
    at = found.set_index(["method", "rule"])
    assert at.loc[("margin", "goal")].tolist() == [30, pytest.approx(0.81)]  # the mean of the seeds, not the best
    assert at.loc[("margin", "budget")].tolist() == [30, pytest.approx(0.81)]
    # 0.3, 0.2 and 0.4 points: 0.3 +- 4.303 x 0.1 / sqrt 3 = 0.05 .. 0.55
    assert at.loc[("margin", "plateau")].tolist() == [40, pytest.approx(0.813)]
    assert at.loc[("random", "budget")].tolist() == [40, pytest.approx(0.3)]
    for rule in ("goal", "plateau"):
        assert at.loc[("random", rule)].isna().all()  # 70 %, and it still gains 20 points a cycle
    for limit, strikes in ((0.56, True), (0.54, False)):
        plateau = flywheel.stopping(table, "accuracy", 2.0, 10**6, limit).set_index(["method", "rule"])
        assert plateau.loc[("margin", "plateau"), "images"] == 40 if strikes else plateau["images"].isna().all()
        assert plateau.loc[("margin", ["goal", "budget"]), "images"].isna().all()


def test_a_plateau_of_one_seed_is_its_gain_and_unsure_gains_are_none():
    table = pd.DataFrame(curve([[0.5, 0.9, 0.905, 0.95]]))
    at = flywheel.stopping(table, "accuracy", 0.9, 30, 1.0).set_index("rule")
    assert at["images"].tolist() == [20, 30, 30] and at["value"].tolist() == [0.9, 0.905, 0.905]
    # no gain on the mean, but the seeds differ by 10 points: nobody can be sure
    unsure = pd.DataFrame(curve([[0.5, 0.6], [0.6, 0.5]]))
    assert flywheel.stopping(unsure, "accuracy", 0.9, 30, 1.0).set_index("rule")["images"].isna().all()


def test_suspects_by_hand():
    logs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [1.0, 1e-30]], dtype=torch.float64).log()
    assert flywheel.suspects(logs, torch.tensor([0, 0, 1])).values == pytest.approx([0.1, 0.8, 1.0])


def setup_of(count: int = 140) -> Setup:
    """Four heaps of features, and as many in the test set."""
    rng, sets = torch.Generator().manual_seed(0), []
    centres = 3 * torch.randn(4, 6, generator=rng)
    for name, size in (("train", count), ("test", 40)):
        classes = torch.arange(size) % 4
        features = centres[classes] + torch.randn(size, 6, generator=rng)
        ids, sizes = tuple(f"{name}/{i:04d}.png" for i in range(size)), torch.tensor([[8, 8]] * size)
        no = torch.zeros(size, 1, dtype=torch.bool)
        labels = Labels(torch.tensor([0.0, 0, 8, 8]).repeat(size, 1, 1), classes[:, None] + 1, no, no.clone())
        photos = Dataset(name, Images(ids, torch.zeros(size, 3, 8, 8, dtype=torch.uint8), sizes), labels, NAMES)
        sets.append(
            (dataclasses.replace(photos, images=CachedImages(ids, (features,), None, sizes, (8, 8), None)), photos)
        )
    (train, photos), (test, test_photos) = sets
    config = papers.load("50_flywheel", "smoke", seconds_per_box=0.0)
    return Setup(config, train, test, (photos, test_photos), torch.device("cpu"))


def test_label_errors_are_found_and_mending_them_pays():
    found, effects = flywheel.label_errors(setup_of(), (0, 1), labels=80, error=0.3, again=20)
    assert list(found["seed"]) == [0, 1] and found["wrong"].between(0.15, 0.45).all()
    assert (found["found"] > 2 * found["wrong"]).all()  # suspects rank wrong labels above right ones
    assert found["suspects corrected"].mean() >= found["as given"].mean()
    assert found.drop(columns="seed").stack().between(0, 1).all()
    gain = 100 * (found["suspects corrected"] - found["as given"]).mean()
    assert len(effects) == 3 and effects["points"][0] == pytest.approx(gain)
