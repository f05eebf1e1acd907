"""Curves, differences and ends of `record.table`: a line is the mean over seeds, a band `metrics.seed_interval`."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.patheffects
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..metrics import cycle_ends, finals, gains_at_equal, seed_interval
from .style import X_LABELS, Y_LABELS, legend_below, marks, mean_and_band, names_of, ordered, style, style_of, y_label

PARTS = (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#7F7F7F"), ("D", "#009E73"))  # marker and colour of each part


@style()
def learning_curves(
    table: pd.DataFrame | Mapping[str, pd.DataFrame],
    xs: Sequence[str] = ("images", "boxes", "bytes"),
    y: str | Sequence[str] = "ap50",
    methods: Sequence[str] | None = None,
    title: str = "",
    points: str = "cycle",
) -> tuple[Figure, str]:
    """A panel for each x, each metric y and each table (several by their titles), with one legend.

    xs: images, boxes, seconds (drawn as minutes), bytes (all rounds so far, both ways, as MB) or rounds. methods: in
    this order; None = all. points: "cycle" (the last round of each) or "round" (every evaluated round). A method is
    dashed at its final value where it pays nothing.
    """
    tables = table if isinstance(table, Mapping) else {"": table}
    ys = [y] if isinstance(y, str) else list(y)
    panels = [(name, x, metric) for name in tables for x in xs for metric in ys]
    size = (0.8 + 3.4 * max(2, len(panels)), 3.8)
    figure, axes = plt.subplots(1, len(panels), sharey=len(ys) == 1, squeeze=False, figsize=size)
    captions = []
    for ax, (name, x, metric) in zip(axes[0], panels, strict=True):
        captions.append(_curves(ax, tables[name], x, metric, methods, points))
        ax.set_title(name)
        if len(ys) == 1:
            ax.label_outer()
    legend_below(figure, *axes[0])
    figure.suptitle(title or None)
    return figure, captions[0]


def _curves(ax: Axes, table: pd.DataFrame, x="images", y="ap50", methods=None, points="cycle", bands=None) -> str:
    """One panel without its legend; returns the caption. bands: which methods get one; None = all."""
    rows = _server_rows(table, x, y, points)
    present = set(rows["method"])
    methods = ordered(present) if methods is None else [m for m in methods if m in present]
    for method, name in names_of(methods).items():
        mine = rows[rows["method"] == method]
        by = [] if (mine["x"] == 0).all() else ["cycle", "round"] if points == "round" else ["cycle"]
        _line(ax, method, name, mine, by, bands is None or method in bands)
    ax.set(xlabel=X_LABELS[x], ylabel=y_label(y))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x in ("images", "boxes", "rounds")))
    if y.startswith("ap"):  # an AP ends at 0 and 1
        ax.set_ylim(max(0, ax.get_ylim()[0]), min(1.02, ax.get_ylim()[1]))
    drawn = rows[rows["method"].isin(methods)].groupby(["method", "cycle", "round"])["seed"]
    banded = "" if bands is None else f" (only of {' and '.join(style_of(m).name for m in bands)})"
    return f"{y_label(y)} on the test images; line: {mean_and_band(drawn)}{banded}."


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
    return cycle_ends(rows) if points == "cycle" else rows


def _line(ax: Axes, method: str, name: str, rows: pd.DataFrame, by: list[str], banded: bool = True) -> None:
    """The mean over seeds at each point of `by`, and its band; without `by` dashed across at the last values."""
    look = style_of(method)
    if not by:
        values = rows.groupby("seed", sort=True)["y"].last()
        ax.axhline(values.mean(), color=look.colour, linestyle="--", label=name, zorder=2.5)
        ax.axhspan(*seed_interval(values), color=look.colour, alpha=0.08, linewidth=0, zorder=1.5)
        return
    groups = [at for _, at in rows.groupby(by, sort=True)]
    x, y = (np.array([at[c].mean() for at in groups]) for c in ("x", "y"))
    line = {"color": look.colour, "linestyle": look.line, "label": name, "zorder": 3, "linewidth": 1.8}
    ax.plot(x, y, markevery=math.ceil(len(x) / 12), **line, **marks(look))
    low, high = np.array([seed_interval(at["y"]) for at in groups]).T
    if banded and np.isfinite(low).any():
        ax.fill_between(x, low, high, color=look.colour, alpha=0.12, linewidth=0, zorder=2)


@style()
def traffic(
    table: pd.DataFrame, y: str = "ap50", methods: Sequence[str] | None = None, title: str = ""
) -> tuple[Figure, str]:
    """Metric `y` against all that was sent so far, both ways, on a logarithmic axis; each method's end has its MB."""
    figure, ax = plt.subplots(figsize=(7, 4))
    caption = _curves(ax, table, "bytes", y, methods, "round")
    for line in ax.get_lines():
        x, height = line.get_xdata()[-1], line.get_ydata()[-1]
        if len(line.get_xdata()) > 2:
            label = f"{x:,.0f} MB" if x >= 10 else f"{x:.2g} MB"
            ax.annotate(label, (x, height), (4, 5), textcoords="offset points", fontsize=8, color=line.get_color())
    ax.set(xscale="log", title=title)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:,.10g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    legend_below(figure, ax)
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
    figure, ax = plt.subplots(figsize=(8, 4))
    for method, name in names_of([*chains, *reference]).items():
        mine = rows[rows["method"] == method]
        later = mine["round"] - clients  # rounds after the first pass; 0 = the merge
        passes = later.clip(lower=0) / (1 if method.startswith("chain-fedavg") else clients)
        at = np.where(later < 0, (mine["round"] + 1) / clients, 1 + passes)
        _line(ax, method, name, mine.assign(x=at), [] if method in reference else ["round"])
    ax.axvline(1, color="0.6", linestyle=":", linewidth=1)
    ax.set(xlabel="passes over all devices (dotted: the merge)", ylabel=y_label(y), title=title)
    legend_below(figure, ax)
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

    paper: rows of `record.read_paper`, of one item; those without an x are left out. paper_x: label of the left axis.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.1))
    caption, points = _curves(right, table, "images", y, bands=["random"]), paper.dropna(subset=["x", "value"])
    for name in ordered(dict.fromkeys(points["setting"])):
        rows, look = points[points["setting"] == name].sort_values("x"), style_of(name)
        value = rows["value"].astype(float) / np.where(rows["unit"].isin(("percent", "%")), 100, 1)
        kwargs = marks(look, 6.5) | {"markerfacecolor": "white", "markeredgecolor": look.colour, "markeredgewidth": 1.3}
        left.plot(rows["x"], value, color=look.colour, linewidth=0.9, label=look.name, **kwargs)
    left.set(xlabel=paper_x or X_LABELS["images"], ylabel=y_label(y), title=titles[0])
    right.set_title(titles[1])
    legend_below(figure, right, left)
    return figure, f"Left, hollow: the paper's published points. Right, on axes of its own: {caption}"


@style()
def paired_differences(
    table: pd.DataFrame, y: str = "ap50", xs: Sequence[str] = ("images", "boxes"), title: str = ""
) -> tuple[Figure, str]:
    """Mean curves with random's band (left), and each method's `metrics.gains_at_equal` above it (right)."""
    methods = ordered(table["method"].unique())
    gains = gains_at_equal(table, xs, y)
    gains = gains.sort_values("effect", key=lambda names: names.map(methods.index), kind="stable")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(3.8, 1.6 + 0.42 * len(methods))))
    caption = _curves(left, table, xs[0], y, methods, bands=["random"])
    _, text = effects(gains, right, y, xlabel=f"points above random ({y_label(y)}), mean over the curve")
    legend_below(figure, left)
    figure.suptitle(title or None)
    return figure, f"Left: {caption} Right: {text}"


@style()
def effects(frame: pd.DataFrame, ax: Axes | None = None, y: str = "ap50", xlabel: str = "") -> tuple[Figure, str]:
    """Differences in points of the metric `y` with their intervals, one row an effect, one marker for each part.

    frame: columns of `metrics.effect`, in order of appearance. Hollow and pale: the interval holds zero.
    """
    names, parts = list(dict.fromkeys(frame["effect"])), list(dict.fromkeys(frame["part"]))
    ax = ax or plt.subplots(figsize=(7.6, 1.2 + 0.5 * len(names)))[1]
    for number, part in enumerate(parts):
        marker, colour = PARTS[number % len(PARTS)]
        ax.plot([], [], marker, color=colour, label=Y_LABELS.get(part, part))
        for row in frame[frame["part"] == part].itertuples():
            at = names.index(row.effect) + 0.22 * (number - (len(parts) - 1) / 2)
            shown = not row.low <= 0 <= row.high  # also without an interval
            ax.hlines(at, row.low, row.high, color=colour, linewidth=1.8, alpha=1 if shown else 0.4, zorder=2)
            ax.plot(row.points, at, marker, color=colour, markerfacecolor=colour if shown else "white", zorder=3)
    ax.axvline(0, color="0.5", linewidth=0.8, zorder=1)
    ax.set_yticks(range(len(names)), [style_of(name).name for name in names])
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel=xlabel or f"difference in points, {y_label(y)}")
    ax.grid(False, axis="y")
    if len(parts) > 1:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts))
    seeds = " to ".join(map(str, sorted({frame["seeds"].min(), frame["seeds"].max()})))
    caption = f"Differences paired by seed over {seeds} seeds, with 95 % t intervals; hollow: the interval holds zero."
    return ax.figure, caption


@style()
def ablation(table: pd.DataFrame, y: str = "ap50") -> tuple[Figure, str]:
    """Final values of the same runs under several arms: a dot per seed, and beside them the mean with its interval.

    table: rows of `record.table` with a column arm; grey lines join the dots of a seed from arm to arm.
    """
    rows = finals(table, y)
    arms, methods = list(dict.fromkeys(table["arm"])), ordered(rows["method"].unique())
    _, ax = plt.subplots(figsize=(1.6 + len(arms) * (0.45 + 0.62 * len(methods)), 4))
    step, halo = 0.8 / len(methods), [matplotlib.patheffects.withStroke(linewidth=2, foreground="white")]
    for m, (method, name) in enumerate(names_of(methods).items()):
        look, x = style_of(method), np.arange(len(arms)) + (m - len(methods) / 2 + 0.35) * step
        wide = rows[rows["method"] == method].pivot(index="seed", columns="arm", values="value").reindex(columns=arms)
        for _, values in wide.iterrows():
            ax.plot(x[values.notna()], values.dropna(), "-", color="0.75", linewidth=0.8, zorder=1.5)
        dots = {"color": look.colour, "markersize": 4, "alpha": 0.6, "zorder": 2}
        ax.plot(np.tile(x, len(wide)), wide.to_numpy().ravel(), "o", **dots)
        for at, (_, values) in zip(x + 0.22 * step, wide.items(), strict=True):
            mean = values.mean()
            if math.isnan(mean):  # this arm does not have the method
                continue
            ax.plot([at, at], seed_interval(values.dropna()), "-", color=look.colour, linewidth=1.6, zorder=2.5)
            ax.plot([at], [mean], color=look.colour, linestyle="None", zorder=3, **marks(look, 7.5))
            where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            ax.annotate(f"{mean:.3f}", (at, mean), color=look.colour, path_effects=halo, zorder=4, **where)
        ax.plot([], [], color=look.colour, linestyle="None", label=name, **marks(look, 7.5))
    ax.set_xticks(range(len(arms)), [textwrap.fill(str(arm), 16, break_on_hyphens=False) for arm in arms])
    ax.set(xlim=(-0.55, len(arms) - 0.45), ylabel=f"{y_label(y)}, at the end")
    ax.grid(False, axis="x")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(methods)))
    caption = f"{y_label(y)} on the test images at the end; dot: one seed, grey lines join a seed's runs; marker: "
    return ax.figure, caption + mean_and_band(rows.groupby(["arm", "method"])["seed"], "bar") + "."
