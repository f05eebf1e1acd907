"""Figures on synthetic tables: what is drawn, where, in whose colour; refusals; the same bytes twice."""

import matplotlib

matplotlib.use("Agg")

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb

from fedal_utils.data.boxes import Detections
from fedal_utils.data.readers import Images, Labels
from fedal_utils.plots import curves as plots

START = {"sum": 0.30, "avg": 0.25, "max": 0.28, "random": 0.20, "centralised": 0.35}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def synthetic(methods=("sum", "random", "centralised"), seeds=3, cycles=3, rounds=2, clients=2):
    """Rows as `record.table` gives them; AP grows with the cycle, differs by method and seed."""
    rows = []
    for method in methods:
        for seed in range(seeds):
            for cycle in range(cycles):
                for round in range(rounds):
                    key = {"method": method, "seed": seed, "cycle": cycle, "round": round}
                    bill = {
                        "images": 40 * (cycle + 1),
                        "boxes": 100 * (cycle + 1) + 5 * seed,
                        "seconds": 600 * (cycle + 1),
                    }
                    sent = 0 if method == "centralised" else 1_500_000
                    for k in range(clients):
                        rows.append(
                            {**key, "client": str(k), **bill, "bytes_up": sent, "bytes_down": sent, "loss": 1.0}
                        )
                    ap = START.get(method, 0.2) + 0.15 * cycle + 0.03 * round + 0.02 * seed
                    total = {"bytes_up": clients * sent, "bytes_down": clients * sent}
                    rows.append({**key, "client": "server", **bill, **total, "ap50": ap, "ap50/red cell": ap / 2})
    return pd.DataFrame(rows)


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def bands(ax):
    return [c for c in ax.collections if c.get_label() == "_band"]


# --- learning curves --------------------------------------------------------------------------------------------------


def test_learning_curve_draws_the_mean_of_the_last_rounds():
    ax = plots.learning_curve(synthetic())
    assert list(lines(ax)) == ["random", "SUM", "centralised"]
    np.testing.assert_allclose(lines(ax)["SUM"].get_xdata(), [40, 80, 120])
    np.testing.assert_allclose(lines(ax)["SUM"].get_ydata(), 0.30 + 0.15 * np.arange(3) + 0.03 + 0.02)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("labelled images", "AP at IoU 0.5")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["random", "SUM", "centralised"]
    assert len(bands(ax)) == 3


@pytest.mark.parametrize(("seeds", "low", "high"), [(2, 0.33, 0.35), (3, 0.35 - 0.0496828, 0.35 + 0.0496828)])
def test_band_is_both_values_of_two_seeds_and_the_t_interval_of_three(seeds, low, high):
    """0.33, 0.35, 0.37: standard error 0.02 / sqrt 3, t(0.975, 2) = 4.302653."""
    (band,) = bands(plots.learning_curve(synthetic(["sum"], seeds=seeds)))
    at = band.get_paths()[0].vertices
    assert at[at[:, 0] == 40, 1].min() == pytest.approx(low, abs=1e-6)
    assert at[at[:, 0] == 40, 1].max() == pytest.approx(high, abs=1e-6)


def test_one_seed_has_no_band():
    assert not bands(plots.learning_curve(synthetic(["sum"], seeds=1)))


def test_points_of_every_round_and_communication_rounds():
    ax = plots.learning_curve(synthetic(["sum"]), points="round")
    assert len(lines(ax)["SUM"].get_xdata()) == 3 * 2
    ax = plots.round_curves(synthetic(["sum", "avg"]))
    np.testing.assert_allclose(lines(ax)["AVG"].get_xdata(), np.arange(1, 7))
    assert ax.get_xlabel() == "communication rounds"


def test_bytes_add_up_over_rounds_both_ways_and_central_training_is_a_reference_line():
    """2 clients x 2 ways x 1.5 MB = 6 MB a round, 12 MB a cycle."""
    ax = plots.learning_curve(synthetic(), "bytes")
    np.testing.assert_allclose(lines(ax)["SUM"].get_xdata(), [12, 24, 36])
    assert ax.get_xlabel() == "communication, both ways (MB)"
    reference = lines(ax)["centralised"]
    np.testing.assert_allclose(reference.get_ydata(), 0.35 + 0.15 * 2 + 0.03 + 0.02)
    assert list(reference.get_xdata()) == [0, 1] and reference.get_linestyle() == "--"


def test_seconds_are_drawn_as_minutes_and_boxes_as_their_mean():
    ax = plots.learning_curve(synthetic(["sum"]), "seconds")
    np.testing.assert_allclose(lines(ax)["SUM"].get_xdata(), [10, 20, 30])
    assert ax.get_xlabel() == "estimated annotation time (min)"
    ax = plots.learning_curve(synthetic(["sum"]), "boxes")
    np.testing.assert_allclose(lines(ax)["SUM"].get_xdata(), [105, 205, 305])


def test_class_metric_names_its_class_and_order_of_methods_is_the_callers():
    ax = plots.learning_curve(synthetic(), y="ap50/red cell", methods=["sum", "random"])
    assert ax.get_ylabel() == "AP at IoU 0.5, red cell" and list(lines(ax)) == ["SUM", "random"]


def test_published_points_are_black_and_hollow():
    paper = pd.DataFrame(
        {
            "setting": ["sum", "sum", "avg"],
            "x": [40, 80, 40],
            "metric": ["ap50", "ap50", "ap75"],
            "value": [41.0, 52, 30],
        }
    ).assign(unit="%")
    ax = plots.learning_curve(synthetic(["sum"]), paper=paper)
    points = lines(ax)["paper, SUM"]
    np.testing.assert_allclose(points.get_ydata(), [0.41, 0.52])
    assert points.get_color() == "black" and points.get_fillstyle() == "none" and points.get_linestyle() == "None"
    assert "paper, AVG" not in lines(ax)  # another metric
    ax = plots.learning_curve(synthetic(["sum"]), paper=pd.DataFrame({"x": [50], "value": [0.4]}))
    assert "paper" in lines(ax)
    with pytest.raises(ValueError, match="columns x and value"):
        plots.learning_curve(synthetic(["sum"]), paper=pd.DataFrame({"x": [50]}))


def test_rows_without_a_value_still_cost_bytes():
    table = synthetic(["sum"], seeds=1)
    early = (table["client"] == "server") & (table["round"] == 0)
    table.loc[early, "ap50"] = np.nan
    ax = plots.learning_curve(table, "bytes", points="round")
    np.testing.assert_allclose(lines(ax)["SUM"].get_xdata(), [12, 24, 36])


def test_numbers_do_not_depend_on_the_order_of_rows():
    table = synthetic()
    first, mixed = plots.learning_curve(table), plots.learning_curve(table.sample(frac=1, random_state=1))
    for name, line in lines(first).items():
        np.testing.assert_allclose(lines(mixed)[name].get_xydata(), line.get_xydata())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t, {"x": "epochs"}, "x must be one of"),
        (lambda t: t, {"points": "all"}, "points must be"),
        (lambda t: t, {"y": "ap99"}, "lacks the columns .*ap99"),
        (lambda t: t, {"methods": ["sum", "magic"]}, "magic"),
        (lambda t: t[t["client"] != "server"], {}, "no row of client 'server'"),
        (lambda t: t.assign(ap50=np.nan), {}, "no server row .* 'ap50'"),
        (lambda t: t.assign(ap50=np.inf), {}, "non-finite"),
        (lambda t: t.assign(bytes_up=np.nan), {"x": "bytes"}, "non-finite bytes"),
    ],
)
def test_bad_tables_are_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        plots.learning_curve(change(synthetic()), **options)


def test_learning_curves_share_an_axis_and_one_legend():
    table = synthetic(("sum", "avg", "max", "random", "centralised"))
    figure = plots.learning_curves(table, paper=pd.DataFrame({"x": [50], "value": [0.4]}))
    assert [ax.get_xlabel() for ax in figure.axes] == [plots.X_LABELS[x] for x in ("images", "boxes", "bytes")]
    assert [ax.get_ylabel() for ax in figure.axes] == ["AP at IoU 0.5", "", ""]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    assert not any(ax.get_legend() for ax in figure.axes) and len(figure.legends) == 1
    shown = [t.get_text() for t in figure.legends[0].get_texts()]
    assert shown == ["random", "SUM", "AVG", "MAX", "centralised", "paper"]
    assert ["paper" in lines(ax) for ax in figure.axes] == [True, False, False]
    figure.canvas.draw()  # the legend stands below every axis label
    legend = figure.legends[0].get_window_extent()
    assert all(ax.xaxis.label.get_window_extent().y0 >= legend.y1 - 1 for ax in figure.axes)
    with pytest.raises(ValueError, match="at least one x"):
        plots.learning_curves(table, xs=())


def test_caption_says_what_the_band_is():
    assert "mean over 3 seeds" in plots.caption(synthetic()) and "t interval" in plots.caption(synthetic())
    assert "both values" in plots.caption(synthetic(seeds=2)) and "no band" in plots.caption(synthetic(seeds=1))
    assert "1 seed;" in plots.caption(synthetic(seeds=1)) and "published" in plots.caption(synthetic(), paper=True)


# --- looks ------------------------------------------------------------------------------------------------------------


def test_known_methods_differ_in_colour_and_in_marker():
    looks = [*plots.METHODS.values(), *plots.SCHEMES.values()]
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == len(looks)
    assert all(to_hex(look.colour) != "#000000" for look in looks)  # black is the paper's


def test_a_method_looks_the_same_alone_or_in_company():
    for method, name in (("sum", "SUM"), ("my_own", "my own")):
        alone = lines(plots.learning_curve(synthetic([method])))[name]
        among = lines(plots.learning_curve(synthetic(["avg", method, "another"])))[name]
        assert alone.get_color() == among.get_color() == plots.look(method).colour
        assert alone.get_marker() == among.get_marker() == plots.look(method).marker
    assert plots.look("my_own") == plots.look("my_own") != plots.look("another")


GRAMMAR = [
    *plots.METHODS,
    *(f"{scheme}+{way}" for scheme in plots.SCHEMES for way in plots.WAYS),
    *(f"centralised+{way}" for way in plots.WAYS),
    *(f"centralised+{scheme}+{way}" for scheme in plots.SCHEMES for way in plots.WAYS),
]
# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as seen without red, green or blue cones.
EYES = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour, eye="all cones"):
    """CIE L*a*b* (D65) of a colour as an eye sees it; a distance of 2.3 is just noticeable."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(EYES[eye]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ seen / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_no_two_methods_of_the_grammar_look_equal():
    """Other marker, other line, or a colour four just noticeable differences away; and never the same name."""
    assert len(GRAMMAR) == 52 + 4 * 14 + 14 + 4 * 14
    for one, other in itertools.combinations(GRAMMAR, 2):
        a, b = plots.look(one), plots.look(other)
        assert a.name != b.name
        if (a.marker, a.line) == (b.marker, b.line):
            assert np.linalg.norm(lab(a.colour) - lab(b.colour)) > 4 * 2.3, (one, other)


@pytest.mark.parametrize("eye", EYES)
def test_schemes_are_told_apart_by_colour_alone_with_any_eyes(eye):
    schemes = ["sum", *(f"{scheme}+sum" for scheme in plots.SCHEMES), "centralised"]
    colours = {method: lab(plots.look(method).colour, eye) for method in schemes}
    for one, other in itertools.combinations(schemes, 2):
        assert np.linalg.norm(colours[one] - colours[other]) > 15, (one, other)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("sum", "SUM"),
        ("fedavg+sum", "FedAvg, SUM"),
        ("local-first+sum", "local first, SUM"),
        ("chain+sum", "chain, SUM"),
        ("chain-fedavg+sum", "chain then FedAvg, SUM"),
        ("accumulate+entropy_max", "accumulating chain, entropy MAX"),
        ("centralised", "centralised"),
        ("centralised+sum", "centralised on SUM's labels"),
        ("centralised+fedavg+sum", "centralised on SUM's labels"),
        ("centralised+random", "centralised on random labels"),
        ("centralised+chain+sum", "centralised on the chain's SUM labels"),
        ("chain+magic_way", "chain+magic way"),
    ],
)
def test_shown_names_of_schemes(method, name):
    assert plots.look(method).name == name


def test_a_scheme_keeps_its_marker_and_sum_has_its_colour():
    for scheme, shown in plots.SCHEMES.items():
        assert {plots.look(f"{scheme}+{way}").marker for way in plots.WAYS} == {shown.marker}
        assert to_hex(plots.look(f"{scheme}+sum").colour) == to_hex(shown.colour)
    assert plots.look("fedavg+max")[:3] == plots.look("max")[:3]


def test_every_look_can_be_drawn_and_centralised_is_dashed():
    ax = plt.subplots()[1]
    for method in GRAMMAR:
        shown = plots.look(method)
        (line,) = ax.plot([0, 1], [0, 1], color=shown.colour, marker=shown.marker, linestyle=shown.line)
        if method.startswith("centralised"):
            assert line.get_linestyle() == "--"
    ax.figure.canvas.draw()


def test_style_is_put_back():
    before = dict(plt.rcParams)
    plots.learning_curve(synthetic(["sum"]))
    assert dict(plt.rcParams) == before
    with plots.style():
        assert plt.rcParams["axes.spines.top"] is False


def test_given_axes_are_drawn_on():
    figure, (left, right) = plt.subplots(1, 2)
    assert plots.learning_curve(synthetic(["sum"]), ax=left) is left
    assert plots.show_boxes(np.zeros((3, 8, 8), np.uint8), ax=right) is right
    assert plt.get_fignums() == [figure.number]


# --- traffic, chains, ablations ---------------------------------------------------------------------------------------

DEVICES, PASSES = 3, 5
SCHEMES = ["sum", "local-first+sum", "chain+sum", "chain-fedavg+sum", "accumulate+sum"]
REFERENCES = ["centralised", "centralised+sum", "centralised+chain+sum"]
GAIN = {method: 0.01 * i for i, method in enumerate([*SCHEMES, *REFERENCES])}


def chained(methods=(*SCHEMES, *REFERENCES), seeds=3):
    """Server rows as `alfl.commit` writes them: chains have one cycle of visits, and NaN where nobody judged.

    2 MB for each round in which somebody sends; 2 x 2 MB for each of fedavg's.
    """
    rows = []
    for method in methods:
        scheme = plots._scheme(method)
        later = PASSES * (1 if scheme == "chain-fedavg" else DEVICES)
        places = [(0, r) for r in range(DEVICES + 1 + later)] if scheme in plots.CHAINS else [(c, 0) for c in range(4)]
        for seed, (step, (cycle, round)) in itertools.product(range(seeds), enumerate(places)):
            judged = scheme != "chain" and scheme != "accumulate" or round <= DEVICES or round % DEVICES == 0
            sent = 0 if scheme == "centralised" or (scheme in plots.CHAINS and round == DEVICES) else 1_000_000
            ap = 0.3 + 0.01 * step + 0.02 * seed + GAIN[method]
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "cycle": cycle,
                    "round": round,
                    "client": "server",
                    "images": 40,
                    "boxes": 1,
                    "seconds": 1,
                    "bytes_up": sent,
                    "bytes_down": sent,
                    "loss": np.nan if sent == 0 else 1.0,
                    "ap50": ap if judged else np.nan,
                }
            )
    return pd.DataFrame(rows)


def labelled(ax, label):
    return [line for line in ax.get_lines() if line.get_label() == label]


def test_traffic_draws_every_judged_round_at_all_that_was_sent_so_far():
    """The merge sends nothing; visits between the ends of passes are not judged and still cost 2 MB each."""
    ax = plots.traffic(chained())
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "communication, both ways (MB)"
    chain = lines(ax)["chain, SUM"]
    np.testing.assert_allclose(chain.get_xdata(), [2, 4, 6, 6, 12, 18, 24, 30, 36])
    steps = np.array([0, 1, 2, 3, 6, 9, 12, 15, 18])
    np.testing.assert_allclose(chain.get_ydata(), 0.3 + 0.01 * steps + 0.02 + GAIN["chain+sum"])
    assert chain.get_markevery() == [-1] and chain.get_marker() is plots.look("chain+sum").marker
    np.testing.assert_allclose(lines(ax)["FedAvg, SUM"].get_xdata(), [2, 4, 6, 8])
    for method in REFERENCES:
        level = lines(ax)[plots.look(method).name]
        np.testing.assert_allclose(level.get_ydata(), 0.3 + 0.03 + 0.02 + GAIN[method])
        assert level.get_linestyle() == "--" and list(level.get_xdata()) == [0, 1]
    assert len(bands(ax)) == len(SCHEMES) and len(ax.patches) == len(REFERENCES)  # these bands are as wide as the axes
    assert len({to_hex(line.get_color()) for line in lines(ax).values()}) == len(SCHEMES) + len(REFERENCES)


@pytest.mark.parametrize(("low_mb", "high_mb"), [(3, 5), (2, 36), (0.02, 70_000)])
def test_logarithmic_axes_have_a_few_plain_numbers(low_mb, high_mb):
    table = chained(["sum"], seeds=1).head(2)
    table["bytes_down"] = 0
    table["bytes_up"] = [low_mb * 1e6, (high_mb - low_mb) * 1e6]
    for ax in (plots.traffic(table), plots.learning_curve(table, "bytes", log=True)):
        ax.figure.canvas.draw()
        low, high = ax.get_xlim()
        shown = [t.get_text() for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]
        assert 3 <= len(shown) <= 9 and not any("e" in text or "$" in text for text in shown)
        assert all(float(text.replace(",", "")) > 0 for text in shown)


def test_learning_curve_over_logarithmic_bytes():
    ax = plots.learning_curve(chained(), "bytes", points="round", log=True)
    assert ax.get_xscale() == "log" and lines(ax)["centralised"].get_linestyle() == "--"
    np.testing.assert_allclose(lines(ax)["local first, SUM"].get_xdata(), [2, 4, 6, 8])
    silent = chained(["sum"])
    silent.loc[silent["cycle"] == 0, ["bytes_up", "bytes_down"]] = 0
    assert list(lines(plots.learning_curve(silent, "bytes", log=True))["SUM"].get_xdata()) == [2, 4, 6]
    scales = [ax.get_xscale() for ax in plots.learning_curves(silent, log=True).axes]
    assert scales == ["linear", "linear", "log"]


def test_published_traffic_is_black_and_hollow_with_a_marker_for_each_setting():
    paper = pd.DataFrame({"setting": ["chain+max", "sum", "chain+sum"], "x": [6, 90, 12.0], "value": [0.5, 0.6, 0.4]})
    ax = plots.traffic(chained(), paper=paper)
    points = {name: line for name, line in lines(ax).items() if name.startswith("paper")}
    assert list(points) == ["paper, FedAvg, SUM", "paper, chain, SUM", "paper, chain, MAX"]
    assert len({line.get_marker() for line in points.values()}) == 3
    assert all(line.get_color() == "black" and line.get_fillstyle() == "none" for line in points.values())
    assert points["paper, chain, SUM"].get_xydata().tolist() == [[12, 0.4]]
    with pytest.raises(ValueError, match="columns x and value"):
        plots.traffic(chained(), paper=pd.DataFrame({"setting": ["sum"], "value": [0.5]}))


def test_chain_stands_at_its_visits():
    """D = 3: devices at 1, 2, 3, the merge at 3.5, pass p at 3 + 3 p, also where a pass is one round of all devices."""
    ax = plots.chain_progress(chained(), DEVICES)
    ends = [1, 2, 3, 3.5, 6, 9, 12, 15, 18]
    assert list(lines(ax)) == ["chain, SUM", "chain then FedAvg, SUM", "accumulating chain, SUM"]
    for line in lines(ax).values():
        np.testing.assert_allclose(line.get_xdata(), ends)
    np.testing.assert_allclose(lines(ax)["chain, SUM"].get_ydata()[[0, 3, 4]], np.array([0.32, 0.35, 0.38]) + 0.02)
    np.testing.assert_allclose(lines(ax)["chain then FedAvg, SUM"].get_ydata()[4], 0.3 + 0.04 + 0.02 + 0.03)
    assert len(bands(ax)) == 3 and len(labelled(ax, "_seed")) == 3 * 3
    np.testing.assert_allclose(labelled(ax, "_seed")[0].get_ydata()[0], 0.3 + 0.02)
    (merge,) = labelled(ax, "_merge")
    assert list(merge.get_xdata()) == [3.5, 3.5]
    words = {t.get_text(): x for t, x in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True)}
    assert words == {
        **{f"device {d}": d for d in (1, 2, 3)},
        "merge": 3.5,
        **{f"pass {p}": 3 + 3 * p for p in range(1, 6)},
    }


def test_band_of_a_chain_is_the_interval_of_its_judged_rounds():
    """0.32, 0.34, 0.36 at device 1: standard error 0.02 / sqrt 3, t(0.975, 2) = 4.302653."""
    (band,) = bands(plots.chain_progress(chained(), DEVICES, methods=["chain+sum"]))
    at = band.get_paths()[0].vertices
    assert at[at[:, 0] == 1, 1].min() == pytest.approx(0.34 - 0.0496828, abs=1e-6)
    assert at[at[:, 0] == 1, 1].max() == pytest.approx(0.34 + 0.0496828, abs=1e-6)


@pytest.mark.parametrize(("devices", "passes"), [(1, 1), (2, 0), (3, 5), (9, 20), (9, 200)])
def test_names_at_the_visits_have_room(devices, passes):
    ax = plt.subplots(figsize=(5.2, 3.6))[1]
    plots._visits_axis(ax, devices, passes)
    ax.figure.canvas.draw()
    at = np.sort(ax.transData.transform([(x, 0) for x in ax.get_xticks()])[:, 0])
    assert np.diff(at).min() > 1.3 * 9 / 72 * ax.figure.dpi  # a slanted line of 9 points
    names = [t.get_text() for t in ax.get_xticklabels()]
    assert {"merge", f"device {devices}"} <= set(names) and (not passes or any(n.startswith("pass") for n in names))
    inverse = ax.transData.inverted().transform(ax.transData.transform([(x, 0) for x in ax.get_xticks()]))
    np.testing.assert_allclose(inverse[:, 0], ax.get_xticks(), rtol=1e-9)


def test_references_and_published_points_of_a_chain():
    paper = pd.DataFrame(
        {"setting": "chain+sum", "x": ["device 1", "merge", "pass 2", 18], "value": [0.31, 0.36, 0.4, 0.5]}
    )
    ax = plots.chain_progress(chained(), DEVICES, reference=["centralised+chain+sum", "sum"], paper=paper)
    assert list(lines(ax))[3:] == ["centralised on the chain's SUM labels", "FedAvg, SUM", "paper, chain, SUM"]
    for method, name in (("sum", "FedAvg, SUM"), ("centralised+chain+sum", "centralised on the chain's SUM labels")):
        assert lines(ax)[name].get_linestyle() == "--"
        np.testing.assert_allclose(lines(ax)[name].get_ydata(), 0.3 + 0.03 + 0.02 + GAIN[method])
    np.testing.assert_allclose(lines(ax)["paper, chain, SUM"].get_xdata(), [1, 3.5, 9, 18])
    for wrong in ("device 4", "pass 0", "start"):
        with pytest.raises(ValueError, match=f"x must be a visit.*got '{wrong}'"):
            plots.chain_progress(chained(), DEVICES, paper=paper.assign(x=wrong))


def test_a_chain_that_is_not_done_and_one_with_a_silent_seed_are_drawn():
    table = chained(["chain+sum"])
    ax = plots.chain_progress(table[table["round"] < 2], DEVICES)
    assert list(lines(ax)["chain, SUM"].get_xdata()) == [1, 2]
    table.loc[(table["seed"] == 0) & (table["round"] == 6), ["ap50", "loss"]] = np.nan
    chain = lines(plots.chain_progress(table, DEVICES))["chain, SUM"]
    assert chain.get_xdata()[4] == 6 and chain.get_ydata()[4] == pytest.approx(0.3 + 0.06 + 0.03 + GAIN["chain+sum"])
    assert np.isfinite(lines(plots.traffic(table))["chain, SUM"].get_xydata()).all()


@pytest.mark.parametrize("draw", [plots.traffic, lambda t, **kw: plots.chain_progress(t, DEVICES, **kw)])
def test_traffic_and_chains_reuse_axes_work_with_one_seed_and_refuse_other_tables(draw):
    ax = plt.subplots()[1]
    assert draw(chained(seeds=1), ax=ax) is ax and not bands(ax) and plt.get_fignums() == [ax.figure.number]
    assert len(ax.get_legend().get_texts()) == len(lines(ax))
    with pytest.raises(ValueError, match=r"lacks the columns \['ap99'\]"):
        draw(chained(), y="ap99")
    with pytest.raises(ValueError, match="lacks the columns .*client"):
        draw(chained().drop(columns="client"))
    with pytest.raises(ValueError, match="magic"):
        draw(chained(), methods=["magic"])


def test_chain_progress_refuses_what_is_no_chain():
    with pytest.raises(ValueError, match=r"no judged round of a chain .*\['sum'\]"):
        plots.chain_progress(chained(["sum"]), DEVICES)
    with pytest.raises(ValueError, match="number of devices >= 1, got 0"):
        plots.chain_progress(chained(), 0)
    with pytest.raises(ValueError, match="for \\['max'\\]"):
        plots.chain_progress(chained(), DEVICES, reference=["max"])
    with pytest.raises(ValueError, match="'chain\\+sum' in cycle 1"):
        plots.chain_progress(chained(["chain+sum"]).assign(cycle=1), DEVICES)


def arms(seeds=3):
    rows = [
        {"arm": arm, "method": method, "seed": seed, "value": start + 0.05 * a + 0.02 * seed}
        for a, arm in enumerate(["restart, warm-up", "restart, no warm-up", "kept, one warm-up"])
        for method, start in (("centralised+sum", 0.6), ("sum", 0.4))
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def test_ablation_shows_seeds_pairs_means_and_intervals():
    ax = plots.ablation(arms())
    ticks = [t.get_text().replace("\n", " ") for t in ax.get_xticklabels()]
    assert ticks == ["restart, warm-up", "restart, no warm-up", "kept, one warm-up"]
    assert list(lines(ax)) == ["FedAvg, SUM", "centralised on SUM's labels"]
    assert [t.get_text() for t in ax.texts] == ["0.420", "0.470", "0.520", "0.620", "0.670", "0.720"]
    pairs = labelled(ax, "_pair")
    assert len(pairs) == 2 * 3 and all(len(pair.get_xdata()) == 3 for pair in pairs)
    np.testing.assert_allclose(pairs[0].get_ydata(), [0.40, 0.45, 0.50])
    dots, intervals = labelled(ax, "_seeds"), labelled(ax, "_interval")
    np.testing.assert_allclose(dots[0].get_ydata(), [0.40, 0.42, 0.44])
    np.testing.assert_allclose(intervals[0].get_ydata(), [0.42 - 0.0496828, 0.42 + 0.0496828], atol=1e-6)
    assert len(dots) == len(intervals) == 6
    mean = lines(ax)["FedAvg, SUM"]
    assert mean.get_ydata()[0] == pytest.approx(0.42) and dots[0].get_xdata()[0] < mean.get_xdata()[0] < 0
    assert mean.get_color() == dots[0].get_color() == plots.look("sum").colour
    assert lines(ax)["centralised on SUM's labels"].get_xdata()[0] > 0


def test_ablation_with_one_seed_on_given_axes_and_with_a_run_missing():
    ax = plt.subplots()[1]
    assert plots.ablation(arms(1), ax=ax) is ax and not labelled(ax, "_interval")
    frame = arms()
    frame.loc[(frame["arm"] == "restart, warm-up") & (frame["method"] == "sum"), "value"] = np.nan
    ax = plots.ablation(frame)
    assert list(lines(ax)) == ["FedAvg, SUM", "centralised on SUM's labels"]
    assert [t.get_text() for t in ax.texts] == ["0.470", "0.520", "0.620", "0.670", "0.720"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns=["arm", "value"]), r"lacks the columns \['arm', 'value'\]"),
        (lambda f: pd.concat([f, f.head(1)]), "two values of one run.*centralised"),
        (lambda f: f.assign(value=np.nan), "no value in its 18 rows"),
    ],
)
def test_bad_ablations_are_refused(change, message):
    for draw in (plots.ablation, plots.ablation_caption):
        with pytest.raises(ValueError, match=message):
            draw(change(arms()))


def test_captions_say_what_is_drawn():
    words = plots.traffic_caption(chained(), paper=True)
    assert all(
        w in words for w in ("log axis", "mean over 3 seeds", "t interval", "marker: end", "dashed", "published")
    )
    assert "dashed" not in plots.traffic_caption(chained(SCHEMES)) and "no band" in plots.traffic_caption(
        chained(seeds=1)
    )
    words = plots.chain_caption(chained(), reference=["centralised+chain+sum", "sum"])
    assert "merge" in words and words.endswith("end of centralised on the chain's SUM labels and FedAvg, SUM.")
    words = plots.ablation_caption(arms(2))
    assert "grey lines join a seed's runs" in words and "mean over 2 seeds; bar: both values" in words


def test_a_legend_of_many_methods_stands_beside_the_data():
    ax = plots.traffic(chained())
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1
    assert ax.get_window_extent().width > 4 * ax.figure.dpi  # the figure grew, the axes did not shrink
    assert ax.get_legend().get_window_extent().x1 <= ax.figure.bbox.x1 + 1


# --- images and boxes -------------------------------------------------------------------------------------------------


class Pictures:
    """What the grid needs of `data.Images`: rows on demand."""

    def __init__(self, n):
        self.pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 12, 16).contiguous()

    def batch(self, index):
        return self.pixels[torch.as_tensor(index)]


def test_boxes_stand_at_their_pixels_with_name_and_score():
    pixels = np.zeros((3, 20, 30), np.uint8)
    ax = plots.show_boxes(pixels, [[1, 2, 11, 8], [0, 0, 30, 20]], ["cat", "dog"], [0.5, 0.25], ignore=[False, True])
    first, second = ax.patches
    assert first.get_bbox().extents.tolist() == [1, 2, 11, 8] and second.get_bbox().extents.tolist() == [0, 0, 30, 20]
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")
    assert [t.get_text() for t in ax.texts] == ["cat 0.50", "dog 0.25"]
    assert ax.images[0].get_extent() == (0, 30, 20, 0) or ax.images[0].get_extent() == [0, 30, 20, 0]
    assert ax.get_xlim() == (0, 30) and ax.get_ylim() == (20, 0)
    assert not plots.show_boxes(torch.zeros(3, 5, 5, dtype=torch.uint8)).patches


def test_bad_pictures_are_refused():
    good = np.zeros((3, 8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"uint8 \(3, H, W\), got float64 \(3, 8, 8\)"):
        plots.show_boxes(good.astype(float))
    with pytest.raises(ValueError, match=r"\(8, 8, 3\)"):
        plots.show_boxes(good.transpose(1, 2, 0))
    with pytest.raises(ValueError, match="1 names for 2 boxes"):
        plots.show_boxes(good, np.zeros((2, 4)), ["cat"])


def test_image_grid_shows_labels_or_good_detections():
    boxes = torch.tensor([0.0, 0, 5, 5]).repeat(6, 3, 1)
    classes = torch.tensor([[1, 2, 0]]).repeat(6, 1)
    ignore = torch.tensor([[False, True, False]]).repeat(6, 1)
    labels = Labels(boxes, classes, ignore, torch.zeros_like(ignore))
    figure = plots.image_grid(Pictures(6), labels, ["cat", "dog"], [5, 0, 2], columns=2, titles=["a", "b", "c"])
    shown = [ax for ax in figure.axes if ax.images]
    assert [int(ax.images[0].get_array().max()) for ax in shown] == [5, 0, 2]
    assert [t.get_text() for t in shown[0].texts] == ["cat", "dog"] and shown[0].patches[1].get_linestyle() == "--"
    found = Detections(boxes, torch.tensor([[0.9, 0.2, 0.0]]).repeat(6, 1), classes, torch.zeros(6, 3, 3))
    figure = plots.image_grid(Pictures(6), found, ["cat", "dog"], [1])
    assert [t.get_text() for t in figure.axes[0].texts] == ["cat 0.90"]
    assert not plots.image_grid(Pictures(6), None, ["cat", "dog"], [1]).axes[0].patches
    with pytest.raises(ValueError, match="at least one image"):
        plots.image_grid(Pictures(6), labels, ["cat", "dog"], [])


def test_score_strip_has_the_highest_above_and_the_lowest_below():
    figure = plots.score_strip(Pictures(9), [0.1, 0.9, 0.5, 0.3, 0.7], show=2, index=[4, 5, 6, 7, 8])
    assert [ax.get_title() for ax in figure.axes] == ["0.9", "0.7", "0.3", "0.1"]
    assert [int(ax.images[0].get_array().max()) for ax in figure.axes] == [5, 8, 7, 4]
    assert figure.axes[0].get_ylabel() == "asked first" and figure.axes[2].get_ylabel() == "asked last"
    with pytest.raises(ValueError, match="non-finite score of image 1"):
        plots.score_strip(Pictures(2), [0.1, float("nan")])
    with pytest.raises(ValueError, match="one score per image"):
        plots.score_strip(Pictures(2), [0.1], index=[0, 1])


def test_client_histograms_write_every_count():
    counts = np.array([[3, 0, 12], [0, 7, 1]])
    ax = plots.client_histograms(counts, ["a", "b", "c"])
    assert [t.get_text() for t in ax.texts] == [str(n) for n in counts.ravel()]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["client 0", "client 1"]
    for bad in (counts[:, :2], counts[0], np.zeros((0, 3))):
        with pytest.raises(ValueError, match="counts must be"):
            plots.client_histograms(bad, ["a", "b", "c"])


# --- files ------------------------------------------------------------------------------------------------------------


def test_save_is_deterministic_and_leaves_nothing_else(tmp_path):
    for name in ("one", "two"):
        ax = plots.learning_curve(synthetic(["sum"]))
        assert plots.save(ax, tmp_path / "deep" / f"{name}.png") == tmp_path / "deep" / f"{name}.png"
    one, two = ((tmp_path / "deep" / f"{name}.png").read_bytes() for name in ("one", "two"))
    assert one == two and one.startswith(b"\x89PNG") and b"atplotlib" not in one
    assert plt.imread(tmp_path / "deep" / "one.png").shape[:2] == (540, 780)  # 3.6 x 5.2 inches at 150 dpi
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["one.png", "two.png"]
    with pytest.raises(ValueError, match=r"saved as \.png"):
        plots.save(ax, tmp_path / "three.pdf")


# --------------------------------------------------------------------------------------------- effects, two views


def test_effects_stand_in_order_with_their_intervals():
    frame = pd.DataFrame(
        {
            "effect": ["losses", "losses", "choice", "choice"],
            "part": ["all", "later"] * 2,
            "points": [3.0, 1.0, -1.0, 0.5],
            "low": [2.0, np.nan, -2.0, 0.0],
            "high": [4.0, np.nan, 0.0, 1.0],
        }
    )
    ax = plots.effects(frame)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["losses", "choice"]
    assert ax.yaxis_inverted()
    shown = lines(ax)
    assert shown["all"].get_xdata().tolist() == [3.0, -1.0] and shown["later"].get_xdata().tolist() == [1.0, 0.5]
    assert shown["all"].get_marker() != shown["later"].get_marker()
    spans = [path.vertices[:, 0].tolist() for c in ax.collections for path in c.get_paths()]
    assert [2.0, 4.0] in spans and [-2.0, 0.0] in spans and [0.0, 1.0] in spans
    with pytest.raises(ValueError, match="lacks .*'high'"):
        plots.effects(frame.drop(columns="high"))
    with pytest.raises(ValueError, match="rows"):
        plots.effects(frame[:0])


def test_two_views_draw_the_mirrored_box_where_it_lies_in_the_mirror_image():
    pixels = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    pixels[:, :, 8:24, 4:20] = 255
    images = Images(("a",), pixels, torch.tensor([[32, 64]]))

    def found(box):
        return Detections(
            torch.tensor([[box]]), torch.tensor([[0.9]]), torch.tensor([[1]]), torch.tensor([[[0.1, 0.9]]])
        )

    box = [4.0, 8.0, 20.0, 24.0]
    figure = plots.two_views(images, found(box), found(box), ("cell",), [0], ["entropy 0.3"])
    left, right = figure.axes[:2]
    (plain,), (mirrored,) = left.patches, right.patches
    assert plain.get_alpha() == pytest.approx(0.9) and figure.legends[0].get_texts()[0].get_text() == "cell"
    assert (plain.get_x(), plain.get_width()) == (4, 16) and (mirrored.get_x(), mirrored.get_width()) == (44, 16)
    for ax, patch in ((left, plain), (right, mirrored)):  # each lies on its bright square
        shown = np.asarray(ax.get_images()[0].get_array())
        x, y = int(patch.get_x()), int(patch.get_y())
        assert (shown[y : y + 16, x : x + 16] == shown.max()).all() and shown[:, :x].max() == 0
    assert left.get_title() == "entropy 0.3" and right.get_title() == "mirrored"
    with pytest.raises(ValueError, match="one title per image"):
        plots.two_views(images, found(box), found(box), ("cell",), [0], [])
