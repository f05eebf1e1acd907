"""The published numbers that were typed once: no cell twice, nothing out of range, and the sums come out."""

import math
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from fedal_utils import record, sampling
from fedal_utils.papers import van_bommel

PAPERS = sorted((Path(__file__).resolve().parents[2] / "results" / "paper").glob("*.csv"))
RANGES = {"fraction": (0, 1), "percent": (0, 100), "%": (0, 100)}
RANGES |= {"MB": (0, 1e6), "rounds": (0, 1000), "images": (1, 1e6)}
FOUR = ["SUM", "AVG", "MAX", "RND"]
paper, kafal_paper, logo_paper = (record.read_paper(name) for name in ("van-bommel", "kafal", "logo"))


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.stem)
def test_no_number_is_there_twice_and_each_says_where_it_comes_from(path):
    frame = record.read_paper(str(path))
    twice = frame[frame.duplicated(["item", "setting", "x", "metric"], keep=False)]
    assert not len(twice), twice[["item", "setting", "x", "metric", "value"]].to_string()
    for column in ("item", "setting", "metric", "unit", "source"):
        assert (frame[column].str.strip() == frame[column]).all() and frame[column].all(), column
    for unit, (low, high) in RANGES.items():
        values = frame.loc[frame["unit"] == unit, "value"].dropna()
        assert values.between(low, high).all(), f"{unit}: {values[~values.between(low, high)].tolist()}"
    assert (frame["tolerance"].dropna() > 0).all()


def series(paper: pd.DataFrame, item: str, setting: str, metric: str = "ap50") -> dict[float, float]:
    """x -> value of one curve."""
    rows = paper[(paper["item"] == item) & (paper["setting"] == setting) & (paper["metric"] == metric)]
    assert len(rows), (item, setting, metric)
    return dict(zip(rows["x"], rows["value"], strict=True))


def number(paper: pd.DataFrame, item: str, setting: str, metric: str = "ap50") -> float:
    """The one value of an item that has no x."""
    values = list(series(paper, item, setting, metric).values())
    assert len(values) == 1, (item, setting, metric)
    return values[0]


def test_the_mean_over_classes_is_the_whole():
    for classes, setting in ((2, "SUM"), (2, "MAX"), (8, "SUM")):
        rows = paper[(paper["item"] == f"chain, {classes} classes, after the merge") & (paper["setting"] == setting)]
        per_class = rows.loc[rows["metric"].str.startswith("ap50/"), "value"]
        assert len(per_class) == classes
        assert per_class.mean() == pytest.approx(rows.loc[rows["metric"] == "ap50", "value"].item(), abs=1.1e-3)
    item, at = "FedAvg, 2 classes, per class at round 200", 200
    for metric, whole in (
        ("ap50", series(paper, "FedAvg, 2 classes, by round", "MAX")[at]),
        ("ap_coco", series(paper, "FedAvg, 2 classes, precision and recall at round 200", "MAX", "ap_coco")[at]),
    ):
        both = [series(paper, item, "MAX", f"{metric}/{name}")[at] for name in ("Car", "Pedestrian")]
        assert sum(both) / 2 == pytest.approx(whole, abs=2.1e-3)


def test_megabytes_are_those_of_the_released_analysis():
    """After x rounds; those of a chain of nine devices are nine visits, and its first pass came before."""
    of = {"FedAvg": ("fedavg", 1, 0), "FedAvg, local first": ("local-first", 1, 0), "chain": ("chain", 9, 9)}
    of |= {"chain then FedAvg": ("chain-fedavg", 1, 9), "accumulating chain": ("accumulate", 9, 9)}
    rows = paper[paper["item"] == "communication, MB"]
    assert set(rows["setting"]) == set(of)
    for row in rows.itertuples():
        scheme, visits, before = of[row.setting]
        wanted = van_bommel.paper_megabytes(scheme, int(before + visits * row.x))
        assert row.value == pytest.approx(wanted, abs=0.5), row


NOT_OURS = {"LL4AL", "ALFA-Mix"}
METHODS = set(sampling.registered("images"))


def accuracies(paper: pd.DataFrame, item: str) -> dict[str, dict[float, float]]:
    """method -> x -> accuracy."""
    methods = paper.loc[paper["item"] == item, "setting"].unique()
    return {method: series(paper, item, method, "accuracy") for method in methods}


def protocol(paper: pd.DataFrame) -> dict[str, float]:
    """metric -> value of the released code."""
    rows = paper[(paper["item"] == "protocol") & (paper["setting"] == "released code")]
    return dict(zip(rows["metric"], rows["value"], strict=True))


@pytest.mark.parametrize("name", ["kafal", "logo"])
def test_methods_go_by_our_names_and_every_source_says_of_what_kind_it_is(name):
    frame = record.read_paper(name)
    measured = frame[frame["metric"] == "accuracy"]
    assert set(measured["setting"]) <= METHODS | NOT_OURS and set(measured["unit"]) == {"fraction"}
    assert measured["source"].str.startswith("[2nd] ").all()  # neither paper's own tables were found
    assert frame["source"].str.match(r"\[(2nd|code|derived)\] |abstract; ").all()
    assert frame.loc[frame["metric"] != "accuracy", "tolerance"].isna().all()
    assert frame.loc[frame["item"].str.startswith("protocol"), "value"].notna().all()


def test_kafals_clients_add_up():
    images, first, cycle = (
        series(kafal_paper, f"protocol, {what}", "released partition", "images")
        for what in ("images of each client", "first labels of each client", "labels asked of each client a cycle")
    )
    told = protocol(kafal_paper)
    assert list(images) == list(first) == list(cycle) == list(range(int(told["clients"])))
    assert (sum(images.values()), sum(first.values()), sum(cycle.values())) == (50_000, 5_005, 2_506)
    for client, count in images.items():  # each share is rounded up
        assert first[client] == math.ceil(count * 10 / 100) and cycle[client] == math.ceil(count * 5 / 100)
    assert (told["share_first"], told["share_cycle"]) == (0.1, 0.05)
    labels = [sum(first.values()) + k * sum(cycle.values()) for k in range(int(told["cycles"]))]
    assert labels == [5005, 7511, 10017, 12523, 15029, 17535]
    for curve in accuracies(kafal_paper, "CIFAR-10, by labels").values():
        assert list(curve) == labels
    assert math.ceil(told["participation"] * told["clients"]) == 8


def test_kafals_parameters_by_hand():
    # conv 3 -> 16; blocks 16, 32, 64 of two 3x3 convs, each with its batch norm (2 a channel), the two wider ones with
    # a 1x1 shortcut without one; a last batch norm; linear 64 -> 10
    blocks = sum(9 * i * o + 9 * o * o + 4 * o + (i * o if i != o else 0) for i, o in ((16, 16), (16, 32), (32, 64)))
    total = 9 * 3 * 16 + blocks + 2 * 64 + 64 * 10 + 10
    assert protocol(kafal_paper)["parameters"] == total == 77_946


def test_logos_protocols():
    for item, setting, cycles in (("protocol", "released code", 16), ("protocol, re-run", "FAST", 8)):
        first, step, last = (number(logo_paper, item, setting, f"share_{s}") for s in ("first", "cycle", "last"))
        assert 1 + (last - first) / step == pytest.approx(cycles)
    told = protocol(logo_paper)
    assert told["t_threshold"] == pytest.approx(stats.t.ppf(0.975, 4), abs=5e-4)  # of 5 seeds, though it has 4
    assert told["seeds"] == 4 and stats.t.ppf(0.975, 3) == pytest.approx(3.182, abs=5e-4)
    assert told["features"] == 64 * (32 // 2**4) ** 2  # four poolings of 32 pixels
