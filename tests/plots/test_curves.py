"""Curves and differences of synthetic tables: what is drawn, where, in whose colour; the same bytes twice."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from fedal_utils import plots

START = {"sum": 0.30, "avg": 0.25, "max": 0.28, "random": 0.20, "centralised": 0.35}


def synthetic(methods=("sum", "random", "centralised"), seeds=3, cycles=3, rounds=2, clients=2):
    """Rows as `record.table` gives them; AP grows with the cycle, differs by method and seed."""
    rows = []
    for method in methods:
        for seed in range(seeds):
            for cycle, number in itertools.product(range(cycles), range(rounds)):
                key = {"method": method, "seed": seed, "cycle": cycle, "round": number}
                cost = {"images": 40, "boxes": 100, "seconds": 600}
                key |= {k: v * (cycle + 1) + 5 * seed * (k == "boxes") for k, v in cost.items()}
                sent = 0 if method == "centralised" else 1_500_000
                rows += [{**key, "bytes_up": sent, "bytes_down": sent, "client": str(k)} for k in range(clients)]
                ap = START.get(method, 0.2) + 0.15 * cycle + 0.03 * number + 0.02 * seed
                total = {"bytes_up": clients * sent, "bytes_down": clients * sent}
                rows.append({**key, "client": "server", **total, "ap50": ap, "ap50/red cell": ap / 2})
    return pd.DataFrame(rows)


def chains(methods=("chain+sum", "chain-fedavg+sum"), seeds=3, clients=3, passes=2):
    """A chain of 3 devices: visits 0, 1, 2, the merge, then 2 passes, in chain-fedavg a round each."""
    rows = []
    for method in methods:
        later = passes if method.startswith("chain-fedavg") else passes * clients
        for seed in range(seeds):
            for number in range(clients + 1 + later):
                costs = {"images": 90, "boxes": 90, "seconds": 90, "bytes_up": 1e6, "bytes_down": 1e6}
                key = {"method": method, "seed": seed, "cycle": 0, "round": number, "client": "server"}
                rows.append({**key, **costs, "ap50": 0.2 + 0.01 * number + 0.02 * seed})
    return pd.DataFrame(rows)


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def test_learning_curve_draws_the_mean_of_the_last_rounds():
    figure, caption = plots.learning_curves(synthetic(), ("images",))
    assert not plt.rcParams["axes.grid"]  # the style is put back
    (ax,) = figure.axes
    assert list(lines(ax)) == ["random", "SUM", "centralised"]
    np.testing.assert_allclose(lines(ax)["SUM"].get_xdata(), [40, 80, 120])
    np.testing.assert_allclose(lines(ax)["SUM"].get_ydata(), 0.30 + 0.15 * np.arange(3) + 0.03 + 0.02)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("labelled images", "AP at IoU 0.5")
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["random", "SUM", "centralised"]
    assert len(ax.collections) == 3
    assert caption.endswith("line: mean over 3 seeds; band: 95 % t interval of the mean.")
    few = pd.concat([synthetic(["sum"], seeds=2), synthetic(["max"], seeds=1)])
    assert "mean over 1 to 2 seeds; band: both values." in plots.learning_curves(few, ("images",))[1]


@pytest.mark.parametrize(("seeds", "low", "high"), [(2, 0.33, 0.35), (3, 0.35 - 0.0496828, 0.35 + 0.0496828)])
def test_band_is_both_values_of_two_seeds_and_the_t_interval_of_three(seeds, low, high):
    """0.33, 0.35, 0.37: standard error 0.02 / sqrt 3, t(0.975, 2) = 4.302653."""
    (band,) = plots.learning_curves(synthetic(["sum"], seeds=seeds), ("images",))[0].axes[0].collections
    at = band.get_paths()[0].vertices
    assert at[at[:, 0] == 40, 1].min() == pytest.approx(low, abs=1e-6)
    assert at[at[:, 0] == 40, 1].max() == pytest.approx(high, abs=1e-6)
    assert not plots.learning_curves(synthetic(["sum"], seeds=1), ("images",))[0].axes[0].collections


@pytest.mark.parametrize(
    ("x", "wanted", "label"),
    [
        ("rounds", [2, 4, 6], "communication rounds"),
        ("bytes", [12, 24, 36], "communication, both ways (MB)"),  # 2 clients x 2 ways x 1.5 MB a round
        ("seconds", [10, 20, 30], "estimated annotation time (min)"),
        ("boxes", [105, 205, 305], "labelled boxes"),
    ],
)
def test_each_cost_has_its_unit(x, wanted, label):
    ax = plots.learning_curves(synthetic(), (x,))[0].axes[0]
    np.testing.assert_allclose(lines(ax)["SUM"].get_xdata(), wanted)
    assert ax.get_xlabel() == label
    if x == "bytes":  # central training sends nothing: a line across at its end
        reference = lines(ax)["centralised"]
        np.testing.assert_allclose(reference.get_ydata(), 0.35 + 0.15 * 2 + 0.03 + 0.02)
        assert list(reference.get_xdata()) == [0, 1] and reference.get_linestyle() == "--"


def test_rounds_not_evaluated_cost_bytes_all_the_same_and_rows_may_come_in_any_order():
    table = synthetic(["sum"])
    table.loc[(table["client"] == "server") & (table["cycle"] == 0), "ap50"] = np.nan
    mixed = table.sample(frac=1, random_state=0)
    ax = plots.learning_curves({"every round": mixed}, ("rounds",), points="round")[0].axes[0]
    np.testing.assert_allclose(lines(ax)["SUM"].get_xdata(), [3, 4, 5, 6])
    assert ax.get_title() == "every round"
    np.testing.assert_allclose(lines(plots.learning_curves(table, ("bytes",))[0].axes[0])["SUM"].get_xdata(), [24, 36])


def test_panels_for_costs_metrics_and_tables_share_one_legend():
    figure, _ = plots.learning_curves(synthetic(), title="T")
    assert [ax.get_xlabel().split()[-1] for ax in figure.axes] == ["images", "boxes", "(MB)"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["AP at IoU 0.5", "", ""]
    tables = {"A": synthetic(["sum"]), "B": synthetic(["avg", "max"])}
    two, _ = plots.learning_curves(tables, xs=("images",), methods=["sum", "max"])
    assert [ax.get_title() for ax in two.axes] == ["A", "B"]
    assert [t.get_text() for t in two.legends[0].get_texts()] == ["SUM", "MAX"]
    both, _ = plots.learning_curves(synthetic(), xs=("images",), y=("ap50", "ap50/red cell"))
    assert [ax.get_ylabel() for ax in both.axes] == ["AP at IoU 0.5", "AP at IoU 0.5, red cell"]


def test_traffic_is_every_evaluated_round_at_all_that_was_sent_and_tells_the_end():
    figure, caption = plots.traffic(synthetic(["sum", "centralised"]))
    (ax,) = figure.axes
    np.testing.assert_allclose(lines(ax)["SUM"].get_xdata(), [6, 12, 18, 24, 30, 36])
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.texts] == ["36 MB"]
    assert "vertical stretch" in caption


def test_a_chain_stands_at_its_passes_and_the_merge_is_a_step():
    table = chains(("chain+sum", "chain-fedavg+sum", "centralised+chain+sum"))
    figure, caption = plots.chain_progress(table, 3, reference=["centralised+chain+sum"])
    (ax,) = figure.axes
    chain, averaged = lines(ax)["chain, SUM"], lines(ax)["chain then FedAvg, SUM"]
    np.testing.assert_allclose(chain.get_xdata(), [1 / 3, 2 / 3, 1, 1, *(1 + np.arange(1, 7) / 3)])
    np.testing.assert_allclose(chain.get_ydata(), 0.22 + 0.01 * np.arange(10))
    np.testing.assert_allclose(averaged.get_xdata(), [1 / 3, 2 / 3, 1, 1, 2, 3])
    assert lines(ax)["centralised on the labels of chain, SUM"].get_linestyle() == "--" and "3 seeds" in caption


def test_a_papers_points_stand_in_a_panel_of_their_own_in_the_same_colours():
    rows = [("sum", 500, 43.0, "percent"), ("sum", 900, 58.5, "percent")]
    rows += [("VAAL", 500, 0.4, "fraction"), ("VAAL", np.nan, 0.5, "fraction")]
    paper = pd.DataFrame(rows, columns=("setting", "x", "value", "unit"))
    figure, caption = plots.beside_paper(synthetic(), paper, "ap50", ("paper: VOC", "ours"))
    left, right = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["paper: VOC", "ours"] and left.get_ylim() != right.get_ylim()
    theirs, ours = lines(left)["SUM"], lines(right)["SUM"]
    np.testing.assert_allclose(theirs.get_xydata(), [[500, 0.43], [900, 0.585]])
    assert theirs.get_color() == ours.get_color() and theirs.get_markerfacecolor() == "white"
    assert len(lines(left)["VAAL"].get_xdata()) == 1 and "VAAL" not in lines(right)
    assert "published points" in caption


def test_differences_are_paired_by_seed_and_only_the_baseline_has_a_band():
    table = synthetic(("random", "sum", "avg"))  # sum is .1, avg .05 above random on every seed
    figure, caption = plots.paired_differences(table)
    left, right = figure.axes
    assert len(left.collections) == 1 and list(lines(left)) == ["random", "SUM", "AVG"]
    points = sorted(line.get_xdata()[0] for line in right.get_lines() if len(line.get_xdata()) == 1)
    assert points == pytest.approx([5, 5, 10, 10])
    assert "only of random" in caption and "paired by seed over 3 seeds" in caption


def test_effects_stand_in_order_with_their_intervals_hollow_where_zero_is_inside():
    rows = [("vae_d1", "ap50", 1.5, 0.5, 2.5, 3), ("vae_d1", "ap_coco", -1.0, -2.0, 0.5, 3)]
    rows.append(("mine", "ap50", 2.0, np.nan, np.nan, 1))
    frame = pd.DataFrame(rows, columns=("effect", "part", "points", "low", "high", "seeds"))
    figure, caption = plots.effects(frame, xlabel="points above random")
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["VAE + D1", "mine"]
    drawn = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in drawn] == [1.5, 2.0, -1.0]
    assert [line.get_markerfacecolor() == "white" for line in drawn] == [False, False, True]
    intervals = [c.get_segments()[0][:, 0].tolist() for c in ax.collections if c.get_segments()[0].size]
    assert intervals == [[0.5, 2.5], [-2.0, 0.5]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["AP at IoU 0.5", "AP, COCO (IoU .50:.95)"]
    assert "over 1 to 3 seeds" in caption


def test_an_ablation_shows_seeds_pairs_means_and_intervals():
    """Two arms, two methods, three seeds: values .1 (arm) + .2 (method) + .01 seed."""
    cases = itertools.product(enumerate(("as it is", "kept")), enumerate(("random", "centralised")), range(3))
    rows = [(arm, method, seed, 0.1 * a + 0.2 * m + 0.01 * seed) for (a, arm), (m, method), seed in cases]
    table = pd.DataFrame(rows, columns=("arm", "method", "seed", "ap50")).assign(client="server", cycle=0, round=0)
    figure, caption = plots.ablation(table)
    (ax,) = figure.axes
    assert sorted(t.get_text() for t in ax.texts) == ["0.010", "0.110", "0.210", "0.310"]
    joins = [line for line in ax.get_lines() if line.get_color() == "0.75"]
    assert len(joins) == 6 and joins[0].get_ydata().tolist() == pytest.approx([0.0, 0.1])
    half = 4.302653 * 0.01 / np.sqrt(3)
    bars = [line.get_ydata() for line in ax.get_lines() if line.get_linewidth() == 1.6]
    assert any(bar == pytest.approx([0.01 - half, 0.01 + half], abs=1e-6) for bar in bars)
    assert caption.endswith("mean over 3 seeds; bar: 95 % t interval of the mean.")
