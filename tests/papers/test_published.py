"""The published numbers that were typed once: no cell twice, nothing out of range, and the sums come out."""

import math
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from fedal_utils import record, sampling

PAPERS = sorted((Path(__file__).resolve().parents[2] / "results" / "paper").glob("*.csv"))
RANGES = {
    "fraction": (0, 1),
    "percent": (0, 100),
    "%": (0, 100),
    "MB": (0, 1e6),
    "rounds": (0, 1000),
    "images": (1, 1e6),
}
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


def test_a_number_that_stands_in_two_items_is_the_same():
    for classes, settings in ((2, FOUR), (8, ["MAX", "RND"])):
        for setting in settings:
            by_round = series(paper, f"FedAvg, {classes} classes, by round", setting)
            assert list(by_round) == [0, 10, 21, 30, 50, 75, 100, 110, 150, 200]
            by_labels = series(paper, f"FedAvg, {classes} classes, by labels", setting)
            # nine devices, ten images each and round, the first ones in round 0
            assert by_labels == {90 * (r + 1): by_round[r] for r in (0, 10, 21)}
            assert number(paper, f"FedAvg, {classes} classes, end", setting) == by_round[200]
            best = number(paper, f"FedAvg, {classes} classes, best round", setting)
            assert best >= max(by_round.values())
            at = number(paper, f"FedAvg, {classes} classes, best round", setting, "round")
            assert by_round.get(at, best) == best
            item = f"FedAvg, {classes} classes, mean of rounds 181 to 200"
            jitter = number(paper, item, setting, "ap50_sd")
            assert abs(number(paper, item, setting) - by_round[200]) < 3 * jitter + 5e-4
    for classes, setting in ((2, "SUM"), (2, "MAX"), (8, "SUM")):
        merged = number(paper, f"chain, {classes} classes, after the merge", setting)
        assert series(paper, f"accumulating chain, {classes} classes, by pass", setting)[0] == merged
    merged = number(paper, "chain, 2 classes, after the merge", "SUM")
    assert series(paper, "chain then FedAvg, 2 classes, by round", "SUM")[0] == merged


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


def test_the_order_that_the_paper_reports():
    end = {s: number(paper, "FedAvg, 2 classes, end", s) for s in FOUR}
    assert end["MAX"] > end["RND"] > end["AVG"] > end["SUM"]
    central = {s: number(paper, "centralised on each run's labels, 2 classes", s) for s in FOUR}
    assert central["MAX"] > central["AVG"] > central["RND"] > central["SUM"]
    assert all(central[s] - end[s] > 0.1 for s in FOUR)
    skewed = number(paper, "centralised on each run's labels, 8 classes", "MAX") - number(
        paper, "FedAvg, 8 classes, end", "MAX"
    )
    assert skewed > 1.8 * (central["MAX"] - end["MAX"])  # label skew doubles the gap
    chain = series(paper, "chain, 2 classes, first pass by device", "SUM")
    assert list(chain) == list(range(9)) == list(series(paper, "chain, 8 classes, first pass by device", "SUM"))
    assert chain[8] > end["MAX"]  # one pass of the chain: the bytes of one round of FedAvg
    for classes in (2, 8):
        passes = series(paper, f"chain, {classes} classes, by pass", "SUM")
        assert list(passes) == [1, 2, 3, 4, 5] and all(a < b for a, b in pairwise(passes.values()))
        assert passes[1] > number(paper, f"chain, {classes} classes, after the merge", "SUM")
        carried = series(paper, f"accumulating chain, {classes} classes, by pass", "SUM")
        assert carried[200] >= number(paper, f"centralised on the chain's labels, {classes} classes", "SUM")
        assert number(paper, f"accumulating chain, {classes} classes, best pass", "SUM") >= max(carried.values())
    assert number(paper, "chain, 8 classes, best device", "SUM") > series(paper, "chain, 8 classes, by pass", "SUM")[5]


def test_megabytes_follow_from_the_sizes():
    item = "communication, size of what is sent"
    model, head, state = (
        number(paper, item, s, "megabytes")
        for s in ("full model (FP16 checkpoint)", "head (frozen backbone)", "optimiser state")
    )
    devices = 9  # each transfer is counted twice, up and down
    first, frozen, carried = (2 * devices * size for size in (model, head, model + state))
    item = "communication, MB per round of 9 devices"
    for setting, want in (
        ("FedAvg", first),
        ("chain, first pass", first),
        ("chain", frozen),
        ("chain then FedAvg", frozen),
        ("accumulating chain", carried),
    ):
        assert number(paper, item, setting, "megabytes") == pytest.approx(want, abs=5e-4)
    totals = {
        "FedAvg": lambda r: (r + 1) * first,
        "FedAvg, local first": lambda r: first if r <= 21 else (r - 20) * first,
        "chain": lambda r: first + r * frozen,
        "chain then FedAvg": lambda r: first + r * frozen,
        "accumulating chain": lambda r: first + r * carried,
    }
    rows = paper[paper["item"] == "communication, MB"]
    assert set(rows["setting"]) == set(totals)
    for row in rows.itertuples():
        assert row.value == pytest.approx(totals[row.setting](row.x), abs=0.5), row


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


def test_kafals_curves_are_the_same_by_labels_and_by_cycle():
    for more, counts in (("", [6] * 9), (", earlier cell", [4] * 2)):
        by_labels, by_cycle = (accuracies(kafal_paper, f"CIFAR-10, by {x}{more}") for x in ("labels", "cycle"))
        assert [len(curve) for curve in by_labels.values()] == counts
        for method, curve in by_cycle.items():
            assert by_labels[method] == {5005 + 2506 * cycle: value for cycle, value in curve.items()}


def test_all_methods_of_kafals_figure_start_together_and_kafal_ends_first():
    for item, start, end, methods, beaten in (
        ("CIFAR-10, by cycle", 0.5060, 0.7460, 9, {2: "coreset"}),
        ("CIFAR-100, by cycle", 0.1767, 0.3204, 7, {2: "badge"}),
    ):
        curves = accuracies(kafal_paper, item)
        assert len(curves) == methods and {curve[0] for curve in curves.values()} == {start}
        assert all(list(curve) == list(range(6)) for curve in curves.values())
        assert all(a < b for curve in curves.values() for a, b in pairwise(curve.values()))
        assert curves["ksas"][5] == end
        for cycle in range(1, 6):
            best = max(curve[cycle] for curve in curves.values())
            assert curves[beaten.get(cycle, "ksas")][cycle] == best


def test_kafals_parameters_by_hand():
    # conv 3 -> 16; blocks 16, 32, 64 of two 3x3 convs, each with its batch norm (2 a channel), the two wider ones with
    # a 1x1 shortcut without one; a last batch norm; linear 64 -> 10
    blocks = sum(9 * i * o + 9 * o * o + 4 * o + (i * o if i != o else 0) for i, o in ((16, 16), (16, 32), (32, 64)))
    total = 9 * 3 * 16 + blocks + 2 * 64 + 64 * 10 + 10
    assert protocol(kafal_paper)["parameters"] == total == 77_946


def test_logos_numbers_and_protocols():
    for name, random, logo in (("CIFAR-10", 0.6914, 0.7192), ("CIFAR-100", 0.3267, 0.3427), ("SVHN", 0.8547, 0.8708)):
        item = f"{name}, re-run, end"
        assert number(logo_paper, item, "random", "accuracy") == random
        assert number(logo_paper, item, "logo", "accuracy") == logo
    for item, setting, cycles in (("protocol", "released code", 16), ("protocol, re-run", "FAST", 8)):
        first, step, last = (number(logo_paper, item, setting, f"share_{s}") for s in ("first", "cycle", "last"))
        assert 1 + (last - first) / step == pytest.approx(cycles)
    told = protocol(logo_paper)
    assert told["t_threshold"] == pytest.approx(stats.t.ppf(0.975, 4), abs=5e-4)  # of 5 seeds, though it has 4
    assert told["seeds"] == 4 and stats.t.ppf(0.975, 3) == pytest.approx(3.182, abs=5e-4)
    assert told["features"] == 64 * (32 // 2**4) ** 2  # four poolings of 32 pixels
