"""The flywheel's stopping rules, by hand."""

import math

import pandas as pd
import pytest
import small_run
import torch

from fedal_utils.papers import flywheel


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


def test_label_errors_are_found_and_mending_them_pays():
    found, effects = flywheel.label_errors(small_run.heaps(140), (0, 1), labels=80, error=0.3, again=20)
    assert list(found["seed"]) == [0, 1] and found["wrong"].between(0.15, 0.45).all()
    assert (found["found"] > 2 * found["wrong"]).all()  # suspects rank wrong labels above right ones
    assert found["suspects corrected"].mean() >= found["as given"].mean()
    assert found.drop(columns="seed").stack().between(0, 1).all()
    gain = 100 * (found["suspects corrected"] - found["as given"]).mean()
    assert len(effects) == 3 and effects["points"][0] == pytest.approx(gain)
