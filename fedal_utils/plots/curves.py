"""Curves over cycles, rounds, bytes and chains, ours beside a paper's, and paired differences from a baseline.

Tables are those of `record.table`; a line is the mean over seeds, a band `metrics.seed_interval`.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..metrics import cycle_ends, gains_at_equal, seed_interval
from .effects import effects
from .style import (
    X_LABELS,
    Look,
    handles_of,
    legend_below,
    marks,
    mean_and_band,
    names_of,
    ordered,
    style,
    style_of,
    y_label,
)


@style()
def learning_curve(
    table: pd.DataFrame,
    x: str = "images",
    y: str = "ap50",
    ax: Axes | None = None,
    methods: Sequence[str] | None = None,
    points: str = "cycle",
    bands: Sequence[str] | None = None,
    title: str = "",
) -> tuple[Figure, str]:
    """Metric `y` against one of the costs, one line per method; dashed at its final value if it pays nothing there.

    x: images, boxes, seconds (drawn as minutes), bytes (all rounds so far, both ways, as MB) or rounds.
    ax: where to draw, without a legend; None = a new figure with one.
    methods, bands: which ones, in this order, and which of them get a band; None = all.
    points: "cycle" (the last round of each) or "round" (every evaluated round).
    """
    rows = _server_rows(table, x, y, points)
    methods = (
        ordered(rows["method"].unique()) if methods is None else [m for m in methods if (rows["method"] == m).any()]
    )
    alone, ax = ax is None, ax or plt.subplots(figsize=(7, 4))[1]
    for method, name in names_of(methods).items():
        mine, look = rows[rows["method"] == method], style_of(method)._replace(name=name)
        if (mine["x"] == 0).all():
            _level(ax, look, mine)
        else:
            by = ["cycle", "round"] if points == "round" else ["cycle"]
            _line(ax, look, mine, by, bands is None or method in bands, len(methods))
    ax.set(xlabel=X_LABELS[x], ylabel=y_label(y), title=title)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x in ("images", "boxes", "rounds")))
    if y.startswith("ap"):  # an AP ends at 0 and 1
        ax.set_ylim(max(0, ax.get_ylim()[0]), min(1.02, ax.get_ylim()[1]))
    if alone:
        legend_below(ax.figure, handles_of(ax))
    drawn = rows[rows["method"].isin(methods)].groupby(["method", "cycle", "round"])["seed"]
    banded = "" if bands is None else f" (only of {' and '.join(style_of(m).name for m in bands)})"
    return ax.figure, f"{y_label(y)} on the test images; line: {mean_and_band(drawn)}{banded}."


@style()
def learning_curves(
    table: pd.DataFrame | Mapping[str, pd.DataFrame],
    xs: Sequence[str] = ("images", "boxes", "bytes"),
    y: str | Sequence[str] = "ap50",
    methods: Sequence[str] | None = None,
    title: str = "",
    points: str = "cycle",
) -> tuple[Figure, str]:
    """A panel for each x, each y and each table (several by their titles), with one legend; see `learning_curve`."""
    tables = table if isinstance(table, Mapping) else {"": table}
    ys = [y] if isinstance(y, str) else list(y)
    panels = [(name, x, metric) for name in tables for x in xs for metric in ys]
    size = (0.8 + 3.4 * max(2, len(panels)), 3.8)
    figure, axes = plt.subplots(1, len(panels), sharey=len(ys) == 1, squeeze=False, figsize=size)
    caption = ""
    for ax, (name, x, metric) in zip(axes[0], panels, strict=True):
        _, text = learning_curve(tables[name], x, metric, ax, methods, points, title=name)
        caption = caption or text
        if len(ys) == 1 and ax is not axes[0, 0]:
            ax.set_ylabel("")
    legend_below(figure, handles_of(*axes[0]))
    figure.suptitle(title or None)
    return figure, caption


@style()
def traffic(
    table: pd.DataFrame, y: str = "ap50", methods: Sequence[str] | None = None, title: str = ""
) -> tuple[Figure, str]:
    """Metric `y` against all that was sent so far, both ways, on a logarithmic axis; each method's end has its MB."""
    figure, caption = learning_curve(table, "bytes", y, None, methods, "round", title=title)
    ax = figure.axes[0]
    for line in ax.get_lines():
        x, height = line.get_xdata()[-1], line.get_ydata()[-1]
        if line.get_linestyle() != "None" and len(line.get_xdata()) > 2:
            label = f"{x:,.0f} MB" if x >= 10 else f"{x:.2g} MB"
            ax.annotate(label, (x, height), (4, 5), textcoords="offset points", fontsize=8, color=line.get_color())
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ax.get_xlim()[1] < 1000 * ax.get_xlim()[0] else (1,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return figure, f"{caption} A vertical stretch: rounds in which nothing is sent; dashed across: what sends nothing."


@style()
def chain_progress(
    table: pd.DataFrame, clients: int, reference: Sequence[str] = (), title: str = "", y: str = "ap50"
) -> tuple[Figure, str]:
    """Metric `y` along chains of so many clients, against passes over all of them; the merge is a step at 1.

    A chain's rounds are visits, `clients` of them a pass; a round of chain-fedavg after the merge is a whole pass.
    reference: methods drawn as a dashed line at their final value.
    """
    rows = _server_rows(table, "rounds", y, "round")
    chains = [m for m in ordered(rows["method"].unique()) if m.split("+")[0] in ("chain", "chain-fedavg", "accumulate")]
    names, (figure, ax) = names_of([*chains, *reference]), plt.subplots(figsize=(8, 4))
    for method, name in names.items():
        mine, look = rows[rows["method"] == method], style_of(method)._replace(name=name)
        if method in reference:
            _level(ax, look, mine)
            continue
        later = mine["round"] - clients  # rounds after the first pass; 0 = the merge
        passes = later.clip(lower=0) / (1 if method.startswith("chain-fedavg") else clients)
        at = np.where(later < 0, (mine["round"] + 1) / clients, 1 + passes)
        _line(ax, look, mine.assign(x=at), ["round"], True, len(chains))
    ax.axvline(1, color="0.6", linestyle=":", linewidth=1)
    ax.set(xlabel="passes over all devices (dotted: the merge)", ylabel=y_label(y), title=title)
    legend_below(figure, handles_of(ax))
    return figure, (
        f"{y_label(y)} on the test images after each device of the first pass, the merge, and later passes; "
        f"line: {mean_and_band(rows[rows['method'].isin(chains)].groupby(['method', 'round'])['seed'])}; "
        "dashed: the end of one node."
    )


@style()
def beside_paper(
    table: pd.DataFrame, paper: pd.DataFrame, y: str, titles: tuple[str, str], paper_x: str = ""
) -> tuple[Figure, str]:
    """A paper's published points (left, hollow) and our curves (right), each panel with its own axes; same colours.

    paper: rows of `record.read_paper` (setting, x, value, unit), of one item; those without an x are left out.
    titles, paper_x: of both panels, and label of the paper's axis.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.1))
    _, caption = learning_curve(table, "images", y, right, title=titles[1])
    points = paper.dropna(subset=["x", "value"])
    for name in ordered(dict.fromkeys(points["setting"])):
        rows, look = points[points["setting"] == name].sort_values("x"), style_of(name)
        value = rows["value"].astype(float) / np.where(rows["unit"].isin(("percent", "%")), 100, 1)
        kwargs = marks(look, 6.5) | {"markerfacecolor": "white", "markeredgecolor": look.colour, "markeredgewidth": 1.3}
        left.plot(rows["x"], value, color=look.colour, linewidth=0.9, label=look.name, **kwargs)
    left.set(xlabel=paper_x or X_LABELS["images"], ylabel=y_label(y), title=titles[0])
    left.xaxis.set_major_locator(MaxNLocator(nbins=6))
    legend_below(figure, handles_of(right, left))
    return figure, f"Left, hollow: the paper's published points. Right, on axes of its own: {caption}"


@style()
def paired_differences(
    table: pd.DataFrame, y: str = "ap50", xs: Sequence[str] = ("images", "boxes"), title: str = ""
) -> tuple[Figure, str]:
    """Mean curves with random's band (left), and each method's `metrics.gains_at_equal` above it (right)."""
    methods = ordered(dict.fromkeys(table["method"]))
    gains = gains_at_equal(table, xs, y)
    gains = gains.sort_values("effect", key=lambda names: names.map(methods.index), kind="stable")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(3.8, 1.6 + 0.42 * len(methods))))
    _, caption = learning_curve(table, xs[0], y, left, methods, bands=["random"])
    _, text = effects(gains, right, y, xlabel=f"points above random ({y_label(y)}), mean over the curve")
    legend_below(figure, handles_of(left))
    figure.suptitle(title or None)
    return figure, f"Left: {caption} Right: {text}"


def _server_rows(table: pd.DataFrame, x: str, y: str, points: str) -> pd.DataFrame:
    """Server rows with the columns x (in the unit of the axis) and y, sorted, those without a y left out."""
    rows = table[table["client"].astype(str) == "server"].sort_values(["method", "seed", "cycle", "round"])
    runs = [rows["method"], rows["seed"]]
    if x == "bytes":
        at = (rows["bytes_up"] + rows["bytes_down"]).groupby(runs, sort=False).cumsum() / 1e6
    elif x == "rounds":
        at = rows.groupby(runs, sort=False).cumcount() + 1.0
    else:
        at = rows[x] / (60.0 if x == "seconds" else 1.0)
    rows = rows.assign(x=at, y=rows[y].astype(float)).dropna(subset=["y"])
    if rows.empty:
        raise ValueError(f"no server row of the table has a value of {y!r}")
    return cycle_ends(rows) if points == "cycle" else rows


def _line(ax: Axes, look: Look, rows: pd.DataFrame, by: list[str], banded: bool, lines: int) -> None:
    """The mean over seeds at each point of `by`, and its band."""
    groups = [at for _, at in rows.groupby(by, sort=True)]
    x, y = (np.array([at[c].mean() for at in groups]) for c in ("x", "y"))
    marked = sorted({*range(0, len(x), math.ceil(len(x) / 12)), len(x) - 1})
    line = {"color": look.colour, "linestyle": look.line, "label": look.name, "zorder": 3, "linewidth": 1.8}
    ax.plot(x, y, markevery=marked, **line, **marks(look))
    low, high = np.array([seed_interval(at["y"]) for at in groups]).T
    if banded and np.isfinite(low).any():
        ax.fill_between(x, low, high, color=look.colour, alpha=0.16 if lines <= 4 else 0.08, linewidth=0, zorder=2)


def _level(ax: Axes, look: Look, rows: pd.DataFrame) -> None:
    """A dashed line at the mean over seeds of the last value."""
    values = rows.groupby("seed", sort=True)["y"].last().to_numpy()
    ax.axhline(values.mean(), color=look.colour, linestyle="--", label=look.name, zorder=2.5)
    low, high = seed_interval(values)
    if not math.isnan(low):
        ax.axhspan(low, high, color=look.colour, alpha=0.08, linewidth=0, zorder=1.5)
