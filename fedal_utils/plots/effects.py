"""Differences with their intervals, and the ends of the same runs under several arms."""

import textwrap

import matplotlib.patheffects
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..metrics import finals, seed_interval
from .style import Y_LABELS, marks, mean_and_band, names_of, ordered, style, style_of, y_label

PARTS = (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#7F7F7F"), ("D", "#009E73"))  # marker and colour of each part


@style()
def effects(frame: pd.DataFrame, ax: Axes | None = None, y: str = "ap50", xlabel: str = "") -> tuple[Figure, str]:
    """Differences in points of the metric `y` with their intervals, one row an effect, one marker for each part.

    frame: columns of `metrics.effect`, in order of appearance from the top. An interval that holds zero is pale and its
    marker hollow; one seed has none.
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
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.set_xlabel(xlabel or f"difference in points, {y_label(y)}")
    if len(parts) > 1:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts))
    over = sorted(set(frame["seeds"])) or [0]
    seeds = f"{' to '.join(map(str, over[:1] + over[1:][-1:]))} seed{'s' if over[-1] > 1 else ''}"
    return (
        ax.figure,
        f"Differences paired by seed over {seeds}, with 95 % t intervals; hollow: the interval holds zero.",
    )


@style()
def ablation(table: pd.DataFrame, y: str = "ap50") -> tuple[Figure, str]:
    """Final values of the same runs under several arms: a dot per seed, and beside them the mean with its interval.

    table: rows of `record.table` with a column arm; grey lines join the dots of a seed from arm to arm.
    """
    rows = finals(table, y)
    arms, methods = list(dict.fromkeys(table["arm"])), ordered(rows["method"].unique())
    names = names_of(methods)
    _, ax = plt.subplots(figsize=(1.6 + len(arms) * (0.45 + 0.62 * len(methods)), 4))
    step, halo = 0.8 / len(methods), [matplotlib.patheffects.withStroke(linewidth=2, foreground="white")]
    for m, method in enumerate(methods):
        look, offset = style_of(method), (m - (len(methods) - 1) / 2) * step - 0.15 * step
        wide = rows[rows["method"] == method].pivot(index="seed", columns="arm", values="value").reindex(columns=arms)
        x = np.arange(len(arms)) + offset
        for _, values in wide.iterrows():
            ax.plot(x[values.notna()], values.dropna(), "-", color="0.75", linewidth=0.8, zorder=1.5)
        ax.plot(
            np.tile(x, len(wide)), wide.to_numpy().ravel(), "o", color=look.colour, markersize=4, alpha=0.6, zorder=2
        )
        for a, arm in enumerate(arms):
            values = wide[arm].dropna().to_numpy()
            if len(values):
                at, mean = x[a] + 0.22 * step, values.mean()
                ax.plot([at, at], seed_interval(values), "-", color=look.colour, linewidth=1.6, zorder=2.5)
                ax.plot([at], [mean], color=look.colour, linestyle="None", zorder=3, **marks(look, 7.5))
                where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
                ax.annotate(f"{mean:.3f}", (at, mean), color=look.colour, path_effects=halo, zorder=4, **where)
        ax.plot([], [], color=look.colour, linestyle="None", label=names[method], **marks(look, 7.5))
    ax.set_xticks(range(len(arms)), [textwrap.fill(str(arm), 16, break_on_hyphens=False) for arm in arms])
    ax.set_xlim(-0.55, len(arms) - 0.45)
    ax.grid(False, axis="x")
    ax.set_ylabel(f"{y_label(y)}, at the end")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(methods)))
    caption = f"{y_label(y)} on the test images at the end; dot: one seed, grey lines join a seed's runs; marker: "
    return ax.figure, caption + mean_and_band(rows.groupby(["arm", "method"])["seed"], "bar") + "."
