"""Figures on synthetic tables: what is drawn, where, in whose colour; refusals; the same bytes twice."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from fedal_utils import plots
from fedal_utils.boxes import Detections
from fedal_utils.data import Labels

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
    looks = plots.METHODS.values()
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == len(looks)
    assert all(to_hex(look.colour) != "#000000" for look in looks)  # black is the paper's


def test_a_method_looks_the_same_alone_or_in_company():
    for method, name in (("sum", "SUM"), ("my_own", "my own")):
        alone = lines(plots.learning_curve(synthetic([method])))[name]
        among = lines(plots.learning_curve(synthetic(["avg", method, "another"])))[name]
        assert alone.get_color() == among.get_color() == plots.look(method).colour
        assert alone.get_marker() == among.get_marker() == plots.look(method).marker
    assert plots.look("my_own") == plots.look("my_own") != plots.look("another")


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
