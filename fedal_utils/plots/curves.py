"""Curves over cycles, rounds, bytes and chains, ours beside a paper's, and paired differences from a baseline.

Tables are those of `record.table`: one row per method, seed, cycle, round and client, metrics in the rows of client
"server". Every function returns (figure, caption); a line is the mean over seeds, a band `metrics.seed_interval`.
"""

from __future__ import annotations

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
    keep_fractions,
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
    """Metric `y` against one of the costs, one line per method.

    x: images, boxes, seconds (drawn as minutes), bytes (all rounds so far, both ways, as MB) or rounds.
    ax: where to draw, without a legend; None = a new figure with one.
    methods: which ones, in this order; None = all.
    points: "cycle" (the last round of each) or "round" (every evaluated round).
    bands: the methods that get a band; None = all.

    A method that pays nothing on this axis (bytes of central training) is a dashed line at its final value. ValueError
    for an unknown column or method and for a table without server rows.
    """
    rows = _server_rows(table, x, y, points)
    methods, alone, ax = _chosen(rows, methods), ax is None, ax or plt.subplots(figsize=(7, 4))[1]
    for method, name in names_of(methods).items():
        mine, look = rows[rows["method"] == method], style_of(method)._replace(name=name)
        if (mine["x"] == 0).all():
            _level(ax, look, mine)
        else:
            by = ["cycle", "round"] if points == "round" else ["cycle"]
            _line(ax, look, mine, by, bands is None or method in bands, len(methods))
    ax.set(xlabel=X_LABELS[x], ylabel=y_label(y), title=title)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x in ("images", "boxes", "rounds")))
    keep_fractions(ax, y)
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
) -> tuple[Figure, str]:
    """A panel for each x, each y and each table, with one legend.

    table: one, or several by the panels' titles, of which each has some of the methods. xs, y: see `learning_curve`.
    """
    tables = table if isinstance(table, Mapping) else {"": table}
    ys = [y] if isinstance(y, str) else list(y)
    panels = [(name, x, metric) for name in tables for x in xs for metric in ys]
    size = (0.8 + 3.4 * max(2, len(panels)), 3.8)
    figure, axes = plt.subplots(1, len(panels), sharey=len(ys) == 1, squeeze=False, figsize=size)
    caption = ""
    for ax, (name, x, metric) in zip(axes[0], panels, strict=True):
        mine = methods and [m for m in methods if len(tables) == 1 or m in set(tables[name]["method"])]
        _, text = learning_curve(tables[name], x, metric, ax, mine, title=name)
        caption = caption or text
        if len(ys) == 1 and ax is not axes[0, 0]:
            ax.set_ylabel("")
    legend_below(figure, handles_of(*axes[0]))
    figure.suptitle(title or None)
    return figure, caption


def round_curves(table: pd.DataFrame, y: str = "ap50", **options) -> tuple[Figure, str]:
    """Metric `y` after every communication round, counted through all cycles; options as in `learning_curve`."""
    return learning_curve(table, "rounds", y, points="round", **options)


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
    return figure, (
        f"{caption} Each point: an evaluated round, against all bytes sent so far (log axis); a vertical stretch: "
        "rounds in which nothing is sent; dashed across: the final value of what sends nothing."
    )


@style()
def chain_progress(
    table: pd.DataFrame,
    clients: int,
    y: str = "ap50",
    methods: Sequence[str] | None = None,
    reference: Sequence[str] = (),
    title: str = "",
) -> tuple[Figure, str]:
    """Metric `y` along a chain: after each device of its first pass and the merge (left), after later passes (right).

    table: a chain has cycle 0 only, its rounds are visits; a round of chain-fedavg after the merge is a whole pass.
    clients: devices of a pass. methods: chains; None = all of the table. reference: methods drawn as a dashed line at
    their final value. Only evaluated rounds are drawn.
    """
    rows = _server_rows(table, "rounds", y, "round")
    chains = rows[[m.split("+")[0] in ("chain", "chain-fedavg", "accumulate") for m in rows["method"]]]
    if chains.empty:
        raise ValueError(f"the table has no evaluated round of a chain, only of {sorted(set(rows['method']))}")
    methods = _chosen(chains, methods)
    names = names_of([*methods, *reference])
    done = chains["round"].astype(int) + 1 - clients  # visits of the first pass that are left (<= 0), merge (1), later
    per_pass = np.where([m.startswith("chain-fedavg") for m in chains["method"]], 1, clients)
    first = chains.assign(x=np.minimum(done, 1) + clients)[done <= 1]
    later = chains.assign(x=(done - 1) / per_pass)[done > 1]
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(8.6, 4), width_ratios=(1, 1.4))
    for ax, part in ((left, first), (right, later)):
        for place, method in enumerate(methods, start=1):
            look, mine = style_of(method)._replace(name=names[method]), part[part["method"] == method]
            width = 1.8 + 1.4 * (len(methods) - place) * (ax is left)  # often equal there: thick below thin
            if len(mine):
                _line(ax, look, mine, ["x"], True, len(methods), width)
        for method in reference:
            _level(ax, style_of(method)._replace(name=names[method]), rows[rows["method"] == method])
    ticks = [*range(1, clients + 1, math.ceil(clients / 5)), clients + 1]
    left.set_xticks(ticks, [*map(str, ticks[:-1]), "merge"])
    left.set(xlabel="device of the first pass", ylabel=y_label(y), xlim=(0.5, clients + 1.6))
    right.set(xlabel="later passes over all devices", xlim=(0, None))
    right.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    keep_fractions(left, y)
    legend_below(figure, handles_of(right, left))
    figure.suptitle(title or None)
    caption = (
        f"{y_label(y)} on the test images after each device of the chain's first pass, after the merge, and after the "
        f"later passes; line: {mean_and_band(chains.groupby(['method', 'round'])['seed'])}"
    )
    return figure, caption + (
        f"; dashed: the end of {' and '.join(names[m] for m in reference)}." if reference else "."
    )


@style()
def beside_paper(
    table: pd.DataFrame,
    paper: pd.DataFrame,
    x: str = "images",
    y: str = "ap50",
    methods: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
    titles: tuple[str, str] = ("paper", "ours"),
    paper_x: str = "",
) -> tuple[Figure, str]:
    """A paper's published points (left, hollow) and our curves (right), each panel with its own axes; same colours.

    paper: rows of `record.read_paper` (setting, x, value, unit), of one item; those without an x are left out.
    settings: {paper's name of a setting: our method}; others keep their names.
    titles: what each is, such as "paper: VOC07, Faster R-CNN, 1 seed". paper_x: label of the paper's axis.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.1))
    _, caption = learning_curve(table, x, y, right, methods, "round" if x == "rounds" else "cycle", title=titles[1])
    points = paper.dropna(subset=["x", "value"])
    if points.empty:
        raise ValueError(f"no row of the paper has x and value; its items are {sorted(set(paper['item']))}")
    methods_of = {name: (settings or {}).get(name, name) for name in dict.fromkeys(points["setting"])}
    for name in sorted(methods_of, key=lambda name: ordered(methods_of.values()).index(methods_of[name])):
        rows, look = points[points["setting"] == name].sort_values("x"), style_of(methods_of[name])
        value = rows["value"].astype(float) / np.where(rows["unit"].isin(("percent", "%")), 100, 1)
        kwargs = marks(look, 6.5) | {"markerfacecolor": "white", "markeredgecolor": look.colour, "markeredgewidth": 1.3}
        left.plot(rows["x"], value, color=look.colour, linewidth=0.9, label=look.name, **kwargs)
    left.set(xlabel=paper_x or X_LABELS[x], ylabel=y_label(y), title=titles[0])
    left.xaxis.set_major_locator(MaxNLocator(nbins=6))
    legend_below(figure, handles_of(right, left))
    return figure, f"Left, hollow: the paper's published points. Right, on axes of its own: {caption}"


@style()
def paired_differences(
    table: pd.DataFrame,
    y: str = "ap50",
    baseline: str = "random",
    xs: Sequence[str] = ("images", "boxes"),
    methods: Sequence[str] | None = None,
    title: str = "",
) -> tuple[Figure, str]:
    """Mean curves with the baseline's band only (left), and each method's paired difference from it (right).

    A difference is that of the mean heights of both curves at equal images, and at equal boxes, see
    `metrics.gains_at_equal`; paired by seed, in points.
    """
    methods = ordered(dict.fromkeys(table["method"])) if methods is None else list(methods)
    gains = gains_at_equal(table[table["method"].isin({*methods, baseline})], xs, y, baseline)
    order = {method: place for place, method in enumerate(methods)}
    gains = gains.sort_values("effect", key=lambda names: names.map(order), kind="stable")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(3.8, 1.6 + 0.42 * len(methods))))
    _, caption = learning_curve(table, xs[0], y, left, methods, bands=[baseline])
    _, text = effects(
        gains, right, y, xlabel=f"points above {style_of(baseline).name} ({y_label(y)}), mean over the curve"
    )
    legend_below(figure, handles_of(left))
    figure.suptitle(title or None)
    return figure, f"Left: {caption} Right: {text}"


# ------------------------------------------------------------------------------------------------------------- parts


def _server_rows(table: pd.DataFrame, x: str, y: str, points: str) -> pd.DataFrame:
    """Server rows with the columns x (in the unit of the axis) and y, sorted, those without a y left out."""
    if x not in X_LABELS:
        raise ValueError(f"x must be one of {sorted(X_LABELS)}, got {x!r}")
    needed = {"bytes": ["bytes_up", "bytes_down"], "rounds": []}.get(x, [x])
    absent = [c for c in ("method", "seed", "cycle", "round", "client", y, *needed) if c not in table.columns]
    if absent:
        raise ValueError(f"the table lacks the columns {absent}; it has {list(table.columns)}")
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


def _chosen(rows: pd.DataFrame, methods: Sequence[str] | None) -> list[str]:
    """The methods to draw, in order; ValueError for one that the table does not have."""
    there = list(dict.fromkeys(rows["method"]))
    missing = [m for m in methods or () if m not in there]
    if missing:
        raise ValueError(f"no server rows with a value for {missing}; the table has {there}")
    return ordered(there) if methods is None else list(methods)


def _line(ax: Axes, look: Look, rows: pd.DataFrame, by: list[str], banded: bool, lines: int, width=1.8) -> None:
    """The mean over seeds at each point of `by`, and its band."""
    groups = [at for _, at in rows.groupby(by, sort=True)]
    x, y = (np.array([at[c].mean() for at in groups]) for c in ("x", "y"))
    marked = sorted({*range(0, len(x), math.ceil(len(x) / 12)), len(x) - 1})
    line = {"color": look.colour, "linestyle": look.line, "label": look.name, "zorder": 3, "linewidth": width}
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
