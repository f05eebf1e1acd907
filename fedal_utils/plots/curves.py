"""Every figure: learning curves, traffic and chains with the band over seeds, boxes on images, clients' histograms.

A drawing function takes `ax` (None: a new figure), draws on it and returns it; what needs several axes returns the
figure. All of them use one style, `fedal.mplstyle`; a method has the same colour and marker in every figure. Tables are
those of `record.table`: one row per method, seed, cycle, round and client, metrics in the rows of client "server".
"""

from __future__ import annotations

import hashlib
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.patheffects
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ..data.boxes import Detections
from ..data.readers import Images, Labels
from ..metrics import cycle_ends, seed_interval


class Look(NamedTuple):
    """How a method looks everywhere; marker and line as matplotlib takes them."""

    colour: str
    marker: str | Outline
    line: str | tuple[int, tuple[float, ...]]
    name: str


# Colours of Okabe and Ito (2008) and of Paul Tol's muted set, told apart with any colour vision; never colour alone.
# Line: least confidence solid, entropy dash-dotted, margin dotted, ratio dash-dot-dotted, a reference dashed.
DASH_DOTS = (0, (4.5, 1.5, 1, 1.5, 1, 1.5))
HOURGLASS = Outline([(-1, -1), (1, -1), (-1, 1), (1, 1), (-1, -1)], closed=True)
BOW_TIE = Outline([(-1, -1), (-1, 1), (1, -1), (1, 1), (-1, -1)], closed=True)
TALL = Outline([(-0.5, -1), (0.5, -1), (0.5, 1), (-0.5, 1), (-0.5, -1)], closed=True)
METHODS: dict[str, Look] = {
    "random": Look("#7F7F7F", "X", "-", "random"),
    "sum": Look("#0072B2", "o", "-", "SUM"),
    "avg": Look("#E69F00", "s", "-", "AVG"),
    "max": Look("#009E73", "^", "-", "MAX"),
    "count": Look("#CC79A7", "D", "-", "box count"),
    "entropy_sum": Look("#332288", "v", "-.", "entropy SUM"),
    "entropy_avg": Look("#D55E00", "P", "-.", "entropy AVG"),
    "entropy_max": Look("#44AA99", "<", "-.", "entropy MAX"),
    "margin_sum": Look("#56B4E9", ">", ":", "margin SUM"),
    "margin_avg": Look("#882255", "p", ":", "margin AVG"),
    "margin_max": Look("#999933", "h", ":", "margin MAX"),
    "ratio_sum": Look("#B07AA1", HOURGLASS, DASH_DOTS, "ratio SUM"),
    "ratio_avg": Look("#5C7A29", BOW_TIE, DASH_DOTS, "ratio AVG"),
    "ratio_max": Look("#7B3F00", Outline.wedge(0, 180), DASH_DOTS, "ratio MAX"),
    "cascade": Look("#8C1D40", Outline.unit_regular_star(3, 0.4), "-", "HUALE cascade"),
    "cald": Look("#5E3C99", "H", "-", "CALD"),
    "hua": Look("#1B7837", "8", "-", "HUA pooling"),
    "hua_entropy": Look("#A6761D", Outline.unit_regular_star(8, 0.7), "-.", "HUA pooling of entropies"),
    "coreset": Look("#01665E", Outline.unit_regular_star(5, 0.75), "--", "core-set"),
    "entropy": Look("#C51B7D", Outline.unit_regular_star(4, 0.3), "-.", "entropy"),
    "margin": Look("#4393C3", Outline.unit_regular_star(4, 0.6), ":", "margin"),
    "confidence": Look("#BF812D", Outline.unit_regular_polygon(7), ":", "least confidence"),
    "ratio": Look("#2E8BA8", TALL, DASH_DOTS, "ratio"),
    "badge": Look("#35978F", Outline.unit_regular_star(6, 0.5), "--", "BADGE"),
    "qbc": Look("#9970AB", Outline.unit_regular_star(7, 0.5), "--", "committee"),
    "logo": Look("#1A1A8C", Outline.unit_regular_star(3, 0.7), "-", "LoGo"),
    "jeffreys": Look("#E78AC3", Outline.unit_regular_star(6, 0.8), "-.", "plain symmetric KL"),
    "ksas": Look("#B2182B", Outline.unit_circle(), "-", "KSAS"),
    "ksas_client": Look("#D6604D", Outline.unit_regular_star(5, 0.25), "-.", "KSAS, KL(client || global)"),
    "ksas_global": Look("#F4A582", Outline.unit_regular_star(7, 0.8), "-.", "KSAS, KL(global || client)"),
    "ksas_sum": Look("#67001F", Outline.unit_regular_star(9, 0.6), "--", "KSAS on boxes, SUM"),
    "ksas_avg": Look("#A8123E", Outline.unit_regular_star(10, 0.6), "--", "KSAS on boxes, AVG"),
    "ksas_max": Look("#EF3B2C", Outline.unit_regular_star(12, 0.7), "--", "KSAS on boxes, MAX"),
    "vae": Look("#7A5195", Outline.unit_regular_star(8, 0.45), "--", "VAE novelty"),
    "d0": Look("#B0B0B0", Outline.unit_regular_star(11, 0.5), ":", "D0, hidden labels"),
    "d1": Look("#EF8A17", Outline.unit_regular_star(9, 0.35), "-.", "D1, reconstruction consistency"),
    "d2": Look("#006D77", Outline.unit_regular_star(10, 0.4), "-.", "D2, self-training"),
    "d3": Look("#84A98C", Outline.unit_regular_star(11, 0.7), "-.", "D3, entropy"),
    "d4": Look("#3D5A80", Outline.unit_regular_star(12, 0.45), "-.", "D4, learned loss"),
    "vae_d0": Look("#8A8A8A", Outline.unit_regular_polygon(9), ":", "VAE + D0, hidden labels"),
    "vae_d1": Look("#BC4B00", Outline.unit_regular_polygon(10), "-", "VAE + D1"),
    "vae_d2": Look("#004C54", Outline.unit_regular_polygon(11), "-", "VAE + D2"),
    "vae_d3": Look("#4F772D", Outline.unit_regular_polygon(12), "-", "VAE + D3"),
    "vae_d4": Look("#1D3557", Outline.unit_regular_star(14, 0.7), "-", "VAE + D4"),
    "model_outlier": Look("#8E6C8A", Outline.unit_regular_star(16, 0.7), "--", "model-based outlier"),
    "embedding_outlier": Look("#C4A000", Outline.unit_regular_star(13, 0.5), "--", "embedding outlier"),
    "cluster": Look("#2A9D8F", Outline.unit_regular_star(4, 0.8), "--", "cluster centres"),
    "representative": Look("#577590", Outline.unit_regular_polygon(13), "--", "representative"),
    "mix": Look("#E63946", Outline.unit_regular_star(15, 0.8), "-", "mixture"),
    "mix_diverse": Look("#9D0208", Outline.unit_regular_star(17, 0.6), "-", "mixture with diversity"),
    "centralised": Look("#444444", "d", "--", "centralised"),
    "federated": Look("#AA4499", "*", "-", "federated"),
}
_BARE = (
    "cascade",
    "cald",
    "hua",
    "hua_entropy",
    "coreset",
    "entropy",
    "margin",
    "confidence",
    "ratio",
    "badge",
    "qbc",
    "logo",
    "jeffreys",
    "ksas",
    "ksas_client",
    "ksas_global",
    "ksas_sum",
    "ksas_avg",
    "ksas_max",
    "vae",
    *(f"{both}{term}" for both in ("", "vae_") for term in ("d0", "d1", "d2", "d3", "d4")),
    "model_outlier",
    "embedding_outlier",
    "cluster",
    "representative",
    "mix",
    "mix_diverse",
    "centralised",
    "federated",
)  # schemes have no shades of them
WAYS = tuple(name for name in METHODS if name not in _BARE)
# Schemes: a colour and a marker each, told apart from SUM's blue and from each other with any colour vision. The way of
# asking is the shade (SUM: the colour itself) and the line, as above.
LINK = Outline([(-1, -0.55), (1, -0.55), (1, 0.55), (-1, 0.55), (-1, -0.55)], closed=True)
WEDGE = Outline([(-1, -0.9), (1, -0.9), (1, 0.9), (-1, -0.9)], closed=True)
SCHEMES: dict[str, Look] = {
    "local-first": Look("#33BBEE", Outline.unit_regular_star(4, 0.5), "-", "local first"),
    "chain": Look("#A50F15", LINK, "-", "chain"),
    "chain-fedavg": Look("#F0803C", Outline.unit_regular_star(6, 0.6), "-", "chain then FedAvg"),
    "accumulate": Look("#4B0F6B", WEDGE, "-", "accumulating chain"),
}
CHAINS = ("chain", "chain-fedavg", "accumulate")
SHADES = {"sum": 0.0, "max": 0.35, "avg": 0.6, "count": -0.5}
OWNERS = {
    "local-first": "local first's",
    "chain": "the chain's",
    "chain-fedavg": "chain-FedAvg's",
    "accumulate": "the accumulating chain's",
}
OTHERS = ("#117733", "#CC6677", "#6F4C9B", "#B8860B", "#8B0000", "#005F73", "#7A4E2D", "#1F3A93")  # unknown methods
OTHER_MARKERS = ("H", "8", "o", "s", "^", "D", "v", "P", "<", ">", "p", "h", "d")

X_LABELS = {
    "images": "labelled images",
    "boxes": "labelled boxes",
    "seconds": "estimated annotation time (min)",
    "bytes": "communication, both ways (MB)",
    "rounds": "communication rounds",
}
Y_LABELS = {
    "accuracy": "accuracy",
    "accuracy_mean_client": "accuracy, mean over clients",
    "accuracy_worst_client": "accuracy, worst client",
    "ap50": "AP at IoU 0.5",
    "ap75": "AP at IoU 0.75",
    "ap_coco": "AP, COCO (IoU .50:.95)",
    "ap_voc11": "AP, VOC 11-point (IoU 0.5)",
    "ap_voc": "AP, VOC all-point (IoU 0.5)",
    "loss": "training loss",
}


def style():
    """Context in which everything drawn has the suite's style: `with plots.style(): ...`."""
    return plt.style.context(str(Path(__file__).with_name("fedal.mplstyle")))


def look(method: str) -> Look:
    """Colour, marker, line and shown name of a method, "[scheme+]way of asking"; an unknown one draws its own.

    A scheme has its colour and marker, the way of asking its shade and line. "centralised+<method>" is dashed, in that
    method's colour mixed with the grey of "centralised". "fedavg+sum" is "sum" with its full name.
    """
    if method in METHODS:
        return METHODS[method]
    scheme, _, asks = method.partition("+")
    if scheme == "centralised":
        asks = asks.removeprefix("fedavg+")
    if scheme == "fedavg" and asks in WAYS:
        return METHODS[asks]._replace(name=f"FedAvg, {METHODS[asks].name}")
    if scheme in SCHEMES and asks in WAYS:
        shown = SCHEMES[scheme]
        return shown._replace(
            colour=_shade(shown.colour, asks), line=METHODS[asks].line, name=f"{shown.name}, {METHODS[asks].name}"
        )
    if scheme == "centralised" and (asks in WAYS or _scheme(asks) in SCHEMES):
        return _look_of_reference(asks)
    draw = int.from_bytes(hashlib.sha256(method.encode()).digest()[:4], "big")
    colour, marker = OTHERS[draw % len(OTHERS)], OTHER_MARKERS[draw // len(OTHERS) % len(OTHER_MARKERS)]
    return Look(colour, marker, "-", method.replace("_", " "))


def _look_of_reference(asks: str) -> Look:
    """Of "centralised+<asks>": longer dashes than "centralised" for a bare way of asking, shorter for a scheme."""
    scheme, way = _scheme(asks), asks.rpartition("+")[2]
    if scheme in OWNERS:
        whose = f"{OWNERS[scheme]} {METHODS[way].name}"
    else:
        whose = "random" if way == "random" else f"{METHODS[way].name}'s"
    dots = {"-.": (1, 1.5), ":": (1, 1.5, 1, 1.5), DASH_DOTS: (1, 1.5) * 3}.get(METHODS[way].line, ())
    dashes = (0, ((2.2, 1.5) if scheme in SCHEMES else (7, 2)) + dots)
    grey = METHODS["centralised"]
    return Look(_mix(look(asks).colour, grey.colour, 0.5), grey.marker, dashes, f"centralised on {whose} labels")


def _scheme(method: str) -> str:
    """The scheme that a method's text names; 'fedavg' for a bare way of asking, '' for an unknown method."""
    scheme, plus, asks = method.partition("+")
    if method == "centralised":
        return method
    if not plus:
        return "fedavg" if method in WAYS else ""
    if scheme == "centralised":
        asks = asks.removeprefix("fedavg+")
        return scheme if asks in WAYS or _scheme(asks) in SCHEMES else ""
    return scheme if scheme in ("fedavg", *SCHEMES) and asks in WAYS else ""


def _mix(colour: str, other: str, part: float) -> str:
    return to_hex((1 - part) * np.array(to_rgb(colour)) + part * np.array(to_rgb(other)))


def _shade(colour: str, way: str) -> str:
    """A scheme's colour for a way of asking: dark colours get lighter, light ones darker (count: the other way)."""
    if way == "random":
        return _mix(colour, METHODS["random"].colour, 0.65)
    dark, part = np.dot(to_rgb(colour), (0.21, 0.72, 0.07)) < 0.4, SHADES[way.rpartition("_")[2]]
    return _mix(colour, "white" if dark == (part > 0) else "black", abs(part))


def _ordered(methods: Sequence[str]) -> list[str]:
    """Bare ways of asking first, then the schemes, unknown methods by name, the centralised references last."""
    schemes, known = ["fedavg", *SCHEMES, "", "centralised"], list(METHODS)

    def place(method: str) -> tuple[int, int, int, str]:
        if method == "federated":
            return 0, 0, len(known), method
        way = method.rpartition("+")[2]
        return schemes.index(_scheme(method)), method.count("+"), known.index(way) if way in known else 0, method

    return sorted(methods, key=place)


def _names(methods: Sequence[str]) -> dict[str, str]:
    """Shown names for one legend: beside schemes a bare way of asking says that it is FedAvg."""
    full = any("+" in method and _scheme(method) for method in methods)
    return {method: look(f"fedavg+{method}" if full and method in WAYS else method).name for method in methods}


def _new_ax(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax


def _marks(shown: Look, size: float = 5.5) -> dict[str, object]:
    """Marker options of a line; outlines of schemes need a bit more room than matplotlib's own markers."""
    size *= 1.3 if isinstance(shown.marker, Outline) else 1
    return {"marker": shown.marker, "markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.6}


def _legend(ax: Axes, own: bool) -> None:
    """Inside where it is small, else to the right of the axes; a figure of our `own` grows to hold it."""
    names = ax.get_legend_handles_labels()[1]
    if len(names) <= 5 and max(map(len, names), default=0) <= 20:
        ax.legend()
        return
    legend = ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, handlelength=2.6)
    if own:
        figure = ax.figure
        figure.set_figwidth(figure.get_figwidth() + legend.get_window_extent().width / figure.dpi)


def _keep_fractions(ax: Axes, y: str) -> None:
    if y.startswith("ap"):
        low, high = ax.get_ylim()
        ax.set_ylim(max(0, low), min(1.02, high))


def _log_x(ax: Axes) -> None:
    """A logarithmic x axis with plain numbers at 1, 2, 5; only at powers of ten where it is long."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    if high < 4 * low:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    else:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=12))
    ax.xaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=12) if high >= 1000 * low else NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _over_seeds(rows: pd.DataFrame, by: str | list[str]) -> np.ndarray:
    """(5, points): seeds, mean x, mean y, low and high end of the band at each point, a group of `by` in x and y."""
    groups = [at for _, at in rows.groupby(by, sort=True)]
    return np.array([(len(at), at["x"].mean(), at["y"].mean(), *seed_interval(at["y"])) for at in groups]).T


def _band(ax: Axes, shown: Look, x: np.ndarray, low: np.ndarray, high: np.ndarray, lines: int) -> None:
    if np.isfinite(low).any():
        alpha = 0.16 if lines <= 6 else 0.08
        ax.fill_between(x, low, high, color=shown.colour, alpha=alpha, linewidth=0, label="_band", zorder=2)


def _chosen(there: Sequence[str], methods: Sequence[str] | None, y: str) -> list[str]:
    """The methods to draw, in order; ValueError for one that the table does not have."""
    missing = [m for m in methods or () if m not in there]
    if missing:
        raise ValueError(f"no server rows with a value of {y!r} for {missing}; the table has {list(there)}")
    return _ordered(there) if methods is None else list(methods)


# --- learning curves --------------------------------------------------------------------------------------------------


@style()
def learning_curve(
    table: pd.DataFrame,
    x: str = "images",
    y: str = "ap50",
    ax: Axes | None = None,
    paper: pd.DataFrame | None = None,
    methods: Sequence[str] | None = None,
    points: str = "cycle",
    legend: bool = True,
    log: bool = False,
) -> Axes:
    """Metric `y` against one of the bills: mean line and interval band over seeds, one line per method.

    x: images, boxes, seconds (drawn as minutes), bytes (all rounds so far, both ways, as MB) or rounds. `points` is
    "cycle" (the last round of each cycle) or "round" (every round). Points and bands are over the seeds that got so
    far, the band as in `metrics.seed_interval`: t interval of the mean, min to max for two seeds, none for one. A
    method that pays nothing on this axis (bytes of central training) is a horizontal dashed line at its final value.
    `paper` holds published points, columns x and value (optional: setting = method, metric, unit "%"), x in the unit of
    the axis: hollow black markers. `methods` chooses and orders the lines. `log`: the x axis is logarithmic; points at
    0, where nothing is paid yet, are left out. ValueError for an unknown column or method and for a table without
    server rows.
    """
    rows = _server_rows(table, x, y, points)
    methods = _chosen(list(dict.fromkeys(rows["method"])), methods, y)
    own, ax, names = ax is None, _new_ax(ax), _names(methods)
    for method in methods:
        mine = rows[rows["method"] == method]
        shown = look(method)._replace(name=names[method])
        if (mine["x"] == 0).all():
            _reference(ax, shown, _finals(mine))
            continue
        if log:
            mine = mine[mine["x"] > 0]
        _, at_x, mean, low, high = _over_seeds(mine, ["cycle", "round"] if points == "round" else "cycle")
        kwargs = {"color": shown.colour, "linestyle": shown.line, **_marks(shown)}
        if points == "round" and len(mean) > 12:
            kwargs["markevery"] = math.ceil(len(mean) / 12)
        ax.plot(at_x, mean, label=shown.name, zorder=3, **kwargs)
        _band(ax, shown, at_x, low, high, len(methods))
    if paper is not None:
        _draw_paper(ax, paper, y, methods)
    ax.set_xlabel(X_LABELS[x])
    ax.set_ylabel(y_label(y))
    if log:
        _log_x(ax)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x in ("images", "boxes", "rounds")))
    _keep_fractions(ax, y)
    if legend:
        _legend(ax, own)
    return ax


def y_label(y: str) -> str:
    """The axis label of a metric column; 'ap50/<class>' names its class."""
    name, _, of_class = y.partition("/")
    return Y_LABELS.get(name, name.replace("_", " ")) + (f", {of_class}" if of_class else "")


def _server_rows(table: pd.DataFrame, x: str, y: str, points: str) -> pd.DataFrame:
    """Server rows with the columns x (in the unit of the axis) and y, sorted, those without a y left out."""
    if x not in X_LABELS:
        raise ValueError(f"x must be one of {sorted(X_LABELS)}, got {x!r}")
    if points not in ("cycle", "round"):
        raise ValueError(f"points must be 'cycle' or 'round', got {points!r}")
    needed = ["bytes_up", "bytes_down"] if x == "bytes" else [] if x == "rounds" else [x]
    absent = [c for c in ("method", "seed", "cycle", "round", "client", y, *needed) if c not in table.columns]
    if absent:
        raise ValueError(f"the table lacks the columns {absent}; it has {list(table.columns)}")
    rows = table[table["client"].astype(str) == "server"].sort_values(["method", "seed", "cycle", "round"])
    if rows.empty:
        raise ValueError(f"the table has no row of client 'server' among its {len(table)} rows")
    runs = rows.groupby(["method", "seed"], sort=False)
    if x == "bytes":
        so_far = (rows["bytes_up"] + rows["bytes_down"]).groupby([rows["method"], rows["seed"]], sort=False).cumsum()
        rows = rows.assign(x=so_far / 1e6)
    elif x == "rounds":
        rows = rows.assign(x=runs.cumcount() + 1.0)
    else:
        rows = rows.assign(x=rows[x] / 60 if x == "seconds" else rows[x].astype(float))
    rows = rows.assign(y=rows[y].astype(float)).dropna(subset=["y"])
    if rows.empty:
        raise ValueError(f"no server row of the table has a value of {y!r}")
    bad = rows[~np.isfinite(rows[["x", "y"]]).all(axis=1)]
    if len(bad):
        where = bad.iloc[0][["method", "seed", "cycle", "round", "x", "y"]].to_dict()
        raise ValueError(f"non-finite {x} or {y} in the server row {where}")
    return cycle_ends(rows) if points == "cycle" else rows


def _finals(rows: pd.DataFrame) -> np.ndarray:
    """(S,) the last y of every seed."""
    return rows.groupby("seed", sort=True)["y"].last().to_numpy()


def _reference(ax: Axes, shown: Look, values: np.ndarray) -> None:
    line = "--" if shown.line == "-" else shown.line
    ax.axhline(values.mean(), color=shown.colour, linestyle=line, label=shown.name, zorder=2.5)
    low, high = seed_interval(values)
    if not math.isnan(low):
        ax.axhspan(low, high, color=shown.colour, alpha=0.08, linewidth=0, label="_band", zorder=1.5)


def _draw_paper(ax: Axes, paper: pd.DataFrame, y: str, methods: Sequence[str]) -> None:
    if not {"x", "value"} <= set(paper.columns):
        raise ValueError(f"published points need the columns x and value, got {list(paper.columns)}")
    if "metric" in paper.columns:
        paper = paper[paper["metric"] == y]
    settings = paper["setting"].astype(str) if "setting" in paper.columns else pd.Series("", index=paper.index)
    given, taken = _ordered(settings.unique()), []
    names = _names([*methods, *given])
    for setting in given:
        rows = paper[settings == setting]
        value = rows["value"].astype(float)
        if "unit" in rows.columns:
            value = value.where(~rows["unit"].astype(str).str.startswith(("%", "percent")), value / 100)
        name = f"paper, {names[setting]}" if setting else "paper"
        marker = look(setting).marker if setting else "o"
        if marker in taken:  # two ways of asking of one scheme: black has no shades
            others = (look(setting.rpartition("+")[2]).marker, *OTHER_MARKERS)
            marker = next((other for other in others if other not in taken), marker)
        taken.append(marker)
        ax.plot(
            rows["x"].astype(float),
            value,
            marker=marker,
            linestyle="None",
            color="black",
            fillstyle="none",
            markersize=6.5,
            label=name,
            zorder=4,
        )


@style()
def learning_curves(
    table: pd.DataFrame,
    xs: Sequence[str] = ("images", "boxes", "bytes"),
    y: str = "ap50",
    paper: pd.DataFrame | None = None,
    paper_x: str = "images",
    methods: Sequence[str] | None = None,
    points: str = "cycle",
    title: str | None = None,
    log: bool = False,
) -> Figure:
    """One panel per bill in `xs`, one y axis, one legend; published points in the panel `paper_x` only.

    `log` makes the axis of the panel of bytes logarithmic.
    """
    if not xs:
        raise ValueError("learning_curves needs at least one x")
    figure, axes = plt.subplots(1, len(xs), sharey=True, squeeze=False, figsize=(0.8 + 3.1 * len(xs), 3.7))
    handles: dict[str, object] = {}
    for ax, x in zip(axes[0], xs, strict=True):
        given = paper if x == paper_x else None
        learning_curve(
            table, x, y, ax, paper=given, methods=methods, points=points, legend=False, log=log and x == "bytes"
        )
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
        if ax is not axes[0, 0]:
            ax.set_ylabel("")
    _one_legend(figure, handles)
    if title:
        figure.suptitle(title)
    return figure


def _one_legend(figure: Figure, handles: dict[str, object]) -> None:
    wide = max(1.5, 0.7 + 0.07 * max(map(len, handles), default=0))  # inches of a column
    most = max(1, int(figure.get_figwidth() / wide))  # columns that fit side by side
    rows = math.ceil(len(handles) / most)
    columns = math.ceil(len(handles) / rows)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, handlelength=2.6)


def round_curves(table: pd.DataFrame, y: str = "ap50", ax: Axes | None = None, **options) -> Axes:
    """Metric `y` after every communication round, counted through all cycles; options as in `learning_curve`."""
    return learning_curve(table, "rounds", y, ax, points="round", **options)


def caption(table: pd.DataFrame, y: str = "ap50", paper: bool = False) -> str:
    """One sentence for under a learning curve: what line, band and markers are, over how many seeds."""
    rows = _server_rows(table, "rounds", y, "cycle")
    text = f"{y_label(y)} on the test images; line: {_mean_and_band(rows.groupby(['method', 'cycle']))}"
    return text + ("; hollow black: published." if paper else ".")


def _mean_and_band(points, band: str = "band") -> str:
    """'mean over 3 seeds; band: 95 % t interval of the mean' of the groups `points`, one per drawn point."""
    counts = points["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    seeds = f"{high} seed{'s' if high > 1 else ''}" if low == high else f"{low} to {high} seeds"
    shown = {1: f"no {band}", 2: f"{band}: both values"}.get(high, f"{band}: 95 % t interval of the mean")
    if low <= 2 < high:
        shown += " (both values where there are two)"
    return f"mean over {seeds}; {shown}"


# --- traffic, chains, ablations ---------------------------------------------------------------------------------------


@style()
def traffic(
    table: pd.DataFrame,
    y: str = "ap50",
    ax: Axes | None = None,
    paper: pd.DataFrame | None = None,
    methods: Sequence[str] | None = None,
    legend: bool = True,
) -> Axes:
    """Metric `y` against all that was sent so far, both ways, on a logarithmic axis of MB; each method's end is marked.

    table: of `record.table` (not `alfl.traffic_table`); bytes of rounds that were not judged count as well. A thin line
    through the mean over seeds at every judged round, with the band of `metrics.seed_interval`; the marker is its last
    point. A method that sends nothing is a horizontal dashed line at its final value. `paper` holds published points,
    columns x (MB) and value (optional: setting, metric, unit "%"): hollow black markers. ValueError as
    `learning_curve`.
    """
    rows = _server_rows(table, "bytes", y, "round")
    methods = _chosen(list(dict.fromkeys(rows["method"])), methods, y)
    own, ax, names = ax is None, _new_ax(ax), _names(methods)
    for method in methods:
        mine, shown = rows[rows["method"] == method], look(method)._replace(name=names[method])
        if (mine["x"] == 0).all():
            _reference(ax, shown, _finals(mine))
            continue
        _, x, mean, low, high = _over_seeds(mine[mine["x"] > 0], ["cycle", "round"])
        ax.plot(
            x,
            mean,
            color=shown.colour,
            linestyle=shown.line,
            linewidth=1.1,
            label=shown.name,
            zorder=3,
            markevery=[-1],
            **_marks(shown, 8),
        )
        _band(ax, shown, x, low, high, len(methods))
    if paper is not None:
        _draw_paper(ax, paper, y, methods)
    _log_x(ax)
    ax.set(xlabel=X_LABELS["bytes"], ylabel=y_label(y))
    _keep_fractions(ax, y)
    if legend:
        _legend(ax, own)
    return ax


def traffic_caption(table: pd.DataFrame, y: str = "ap50", paper: bool = False) -> str:
    """One sentence for under `traffic`."""
    rows = _server_rows(table, "bytes", y, "round")
    text = (
        f"{y_label(y)} on the test images at every judged round, against all bytes sent so far (log axis); line: "
        f"{_mean_and_band(rows.groupby(['method', 'cycle', 'round']))}; marker: end of training"
    )
    text += "; dashed: final value of what sends nothing" if (rows.groupby("method")["x"].max() == 0).any() else ""
    return text + ("; hollow black: published." if paper else ".")


@style()
def chain_progress(
    table: pd.DataFrame,
    clients: int,
    y: str = "ap50",
    ax: Axes | None = None,
    reference: Sequence[str] | None = None,
    paper: pd.DataFrame | None = None,
    methods: Sequence[str] | None = None,
    legend: bool = True,
) -> Axes:
    """Metric `y` along a chain: devices 1..D of its first pass, the merge, then the ends of its later passes.

    table: of `record.table`; of its methods those of a chain are drawn (cycle 0, round = visit). clients: D. x is the
    visit's number, 1..D in the first pass, D + 0.5 at the merge (vertical line), D + D p at the end of pass p; a round
    of chain-fedavg, in which all devices train, stands where a pass ends. Where passes are many the axis is narrower
    beyond the merge. Only judged rounds are drawn: a thin line per seed, the mean thick, with the band of
    `metrics.seed_interval`. `reference`: methods drawn as a horizontal dashed line at their final value. `paper` holds
    published points, columns x and value (optional: setting, metric, unit "%"), x as on the axis or in its words,
    "device 3", "merge", "pass 2". ValueError for a table without a chain, for unknown methods and columns.
    """
    rows = _chain_rows(table, clients, y)
    methods = _chosen(list(dict.fromkeys(rows["method"])), methods, y)
    finals = _server_rows(table, "rounds", y, "round")
    reference = _chosen(list(dict.fromkeys(finals["method"])), list(reference or ()), y)
    own, ax, names = ax is None, _new_ax(ax), _names([*methods, *reference])
    ax.axvline(clients + 0.5, color="0.55", linewidth=1, linestyle=":", label="_merge", zorder=1.8)
    for method in methods:
        mine, shown = rows[rows["method"] == method], look(method)._replace(name=names[method])
        for _, seed in mine.groupby("seed", sort=True):
            ax.plot(
                seed["x"],
                seed["y"],
                color=shown.colour,
                linestyle=shown.line,
                linewidth=0.7,
                alpha=0.5,
                label="_seed",
                zorder=2.7,
            )
        _, x, mean, low, high = _over_seeds(mine, "x")
        ax.plot(
            x,
            mean,
            color=shown.colour,
            linestyle=shown.line,
            linewidth=2.2,
            label=shown.name,
            zorder=3,
            markevery=math.ceil(len(x) / 18),
            **_marks(shown, 6),
        )
        _band(ax, shown, x, low, high, len(methods))
    for method in reference:
        shown = look(method)._replace(name=names[method])
        _reference(ax, shown, _finals(finals[finals["method"] == method]))
    if paper is not None:
        if "x" in paper.columns:
            paper = paper.assign(x=[_visit(x, clients) for x in paper["x"]])
        _draw_paper(ax, paper, y, methods)
    last = max(rows["x"].max(), paper["x"].max() if paper is not None and len(paper) else 0)
    _visits_axis(ax, clients, max(0, math.ceil((int(last) - clients) / clients)))
    ax.set_ylabel(y_label(y))
    _keep_fractions(ax, y)
    if legend:
        _legend(ax, own)
    return ax


def _chain_rows(table: pd.DataFrame, clients: int, y: str) -> pd.DataFrame:
    """Judged server rows of the chains with x, the number of the visit after which they were judged."""
    if isinstance(clients, bool) or not isinstance(clients, int | np.integer) or clients < 1:
        raise ValueError(f"clients must be a number of devices >= 1, got {clients!r}")
    rows = _server_rows(table, "rounds", y, "round")
    there = list(dict.fromkeys(rows["method"]))
    rows = rows[[_scheme(method) in CHAINS for method in rows["method"]]]
    if rows.empty:
        raise ValueError(f"the table has no judged round of a chain ({', '.join(CHAINS)}), it has {there}")
    if (rows["cycle"] != 0).any():
        odd = rows[rows["cycle"] != 0].iloc[0]
        raise ValueError(f"a chain has cycle 0 only, got a row of {odd['method']!r} in cycle {odd['cycle']}")
    done = rows["round"].astype(int) - clients  # visits after the merge; 0: the merge
    each = np.where([_scheme(method) == "chain-fedavg" for method in rows["method"]], clients, 1)
    x = np.select([done < 0, done == 0], [done + clients + 1.0, clients + 0.5], clients + done * each)
    return rows.assign(x=x)


def _visit(x: str | float, clients: int) -> float:
    """A place on the axis of visits from its number or its words."""
    what, _, number = str(x).partition(" ")
    if what == "merge" and not number:
        return clients + 0.5
    if what == "device" and number.isdecimal() and 1 <= int(number) <= clients:
        return float(number)
    if what == "pass" and number.isdecimal() and int(number) >= 1:
        return float(clients + clients * int(number))
    try:
        return float(x)
    except ValueError:
        raise ValueError(f"x must be a visit, 'device 1..{clients}', 'merge' or 'pass 1..', got {x!r}") from None


def _visits_axis(ax: Axes, clients: int, passes: int) -> None:
    """Names at the visits; the merge gets room, all later passes at most twice that of what is before them."""
    later = max(1, clients * passes - 1)  # visits beyond clients + 1
    slope = min(1.0, 2 * (clients + 1) / later)
    merge = max(2.0, (clients + slope * later) / 10)  # drawn width between visits clients and clients + 1

    def drawn(visit):
        early, late = np.minimum(visit, clients), np.maximum(np.asarray(visit, dtype=float) - clients - 1, 0)
        return early + merge * np.clip(np.asarray(visit) - clients, 0, 1) + slope * late

    def visit(drawn):
        early, late = np.minimum(drawn, clients), np.maximum(np.asarray(drawn, dtype=float) - clients - merge, 0)
        return early + np.clip(np.asarray(drawn) - clients, 0, merge) / merge + late / slope

    ax.set_xscale("function", functions=(drawn, visit))
    left, right = drawn(1) - 0.4, drawn(clients * (passes + 1) if passes else clients + 0.5) + 0.4
    ax.set_xlim(visit(left), visit(right))
    room = (right - left) / 22  # of a slanted label
    steps = [k * 10**e for e in range(6) for k in (1, 2, 5)]
    every = next(k for k in steps if k >= room)
    ticks = {float(device): f"device {device}" for device in range(clients, 0, -every)}
    ticks[clients + 0.5] = "merge"
    every = next(k for k in steps if k * clients * slope >= room)
    shown = [p for p in range(1, passes + 1) if p % every == 0 or (p == 1 and every > 2)]
    ticks.update({float(clients + clients * p): f"pass {p}" for p in shown})
    ax.set_xticks(list(ticks), list(ticks.values()), rotation=45, ha="right", rotation_mode="anchor")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(False, axis="x")


def chain_caption(
    table: pd.DataFrame, y: str = "ap50", reference: Sequence[str] | None = None, paper: bool = False
) -> str:
    """One sentence for under `chain_progress`."""
    rows = _chain_rows(table, 1, y)  # counted by round: the places do not matter
    text = (
        f"{y_label(y)} on the test images after each device of the chain's first pass, after the merge (dotted) and "
        f"after every later pass (drawn narrower where they are many); thin: one seed; thick: "
        f"{_mean_and_band(rows.groupby(['method', 'round']))}"
    )
    if reference:
        names = _names([*rows["method"].unique(), *reference])
        text += f"; dashed: end of {' and '.join(names[method] for method in reference)}"
    return text + ("; hollow black: published." if paper else ".")


@style()
def ablation(frame: pd.DataFrame, ax: Axes | None = None, y: str = "ap50", legend: bool = True) -> Axes:
    """Final values of the same runs under several arms: a dot per seed, and beside them the mean with its interval.

    frame: columns arm, method, seed, value; arms in order of appearance along x, methods side by side. Thin grey lines
    join the dots of a seed from arm to arm. The interval is that of `metrics.seed_interval`; the number is the mean.
    `y` names the axis. Rows without a value (NaN) are left out. ValueError for missing columns, for two values of one
    (arm, method, seed) and for a frame without a value.
    """
    rows = _ablation_rows(frame)
    arms, methods = list(dict.fromkeys(rows["arm"])), _ordered(rows["method"].unique())
    own, names = ax is None, _names(methods)
    if own:
        ax = plt.subplots(figsize=(1.0 + len(arms) * (0.45 + 0.62 * len(methods)), 3.8))[1]
    step = 0.8 / len(methods)
    for m, method in enumerate(methods):
        shown, offset = look(method), (m - (len(methods) - 1) / 2) * step - 0.15 * step
        mine = rows[rows["method"] == method]
        wide = mine.pivot(index="seed", columns="arm", values="value").reindex(columns=arms)
        x, named = np.arange(len(arms)) + offset, False
        for _, values in wide.iterrows():
            ax.plot(x[values.notna()], values.dropna(), color="0.75", linewidth=0.8, label="_pair", zorder=1.5)
        for a, arm in enumerate(arms):
            values = wide[arm].dropna().to_numpy()
            if not len(values):
                continue
            ax.plot(
                np.full(len(values), x[a]),
                values,
                "o",
                color=shown.colour,
                markersize=4,
                alpha=0.6,
                label="_seeds",
                markerfacecolor="white" if _scheme(method) == "centralised" else shown.colour,
                zorder=2,
            )
            mean, (low, high) = values.mean(), seed_interval(values)
            at = x[a] + 0.22 * step
            if math.isfinite(low):
                ax.plot([at, at], [low, high], color=shown.colour, linewidth=1.6, label="_interval", zorder=2.5)
            ax.plot(
                [at],
                [mean],
                color=shown.colour,
                linestyle="None",
                zorder=3,
                **_marks(shown, 7.5),
                label="_mean" if named else names[method],
            )
            named = True
            ax.annotate(
                f"{mean:.3f}",
                (at, mean),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=shown.colour,
                zorder=4,
                path_effects=[matplotlib.patheffects.withStroke(linewidth=2, foreground="white")],
            )
    ax.set_xticks(range(len(arms)), [textwrap.fill(str(arm), 16, break_on_hyphens=False) for arm in arms])
    ax.set_xlim(-0.55, len(arms) - 0.45)
    ax.grid(False, axis="x")
    ax.set_ylabel(f"{y_label(y)}, at the end")
    if legend:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(methods) if len(methods) < 4 else 2)
    return ax


def _ablation_rows(frame: pd.DataFrame) -> pd.DataFrame:
    absent = [column for column in ("arm", "method", "seed", "value") if column not in frame.columns]
    if absent:
        raise ValueError(f"the frame lacks the columns {absent}; it has {list(frame.columns)}")
    twice = frame[frame.duplicated(["arm", "method", "seed"])]
    if len(twice):
        raise ValueError(f"two values of one run: {twice.iloc[0][['arm', 'method', 'seed']].to_dict()}")
    rows = frame.assign(value=frame["value"].astype(float)).dropna(subset=["value"])
    if rows.empty:
        raise ValueError(f"the frame has no value in its {len(frame)} rows")
    return rows


def ablation_caption(frame: pd.DataFrame, y: str = "ap50") -> str:
    """One sentence for under `ablation`."""
    text = _mean_and_band(_ablation_rows(frame).groupby(["arm", "method"]), "bar")
    return f"{y_label(y)} on the test images at the end; dot: one seed, grey lines join a seed's runs; marker: {text}."


@style()
def effects(frame: pd.DataFrame, ax: Axes | None = None, y: str = "ap50") -> Axes:
    """Differences in points with their intervals, one row an effect, one marker for each part of the curve.

    frame: columns effect, part, points, low, high, in order of appearance from the top. An interval of NaN (one seed)
    is not drawn. `y` names the metric whose points (100 x) these are.
    """
    absent = [column for column in ("effect", "part", "points", "low", "high") if column not in frame.columns]
    if absent or not len(frame):
        raise ValueError(f"the frame lacks {absent or 'rows'}; it has {list(frame.columns)} and {len(frame)} rows")
    names, parts = list(dict.fromkeys(frame["effect"])), list(dict.fromkeys(frame["part"]))
    if ax is None:
        ax = plt.subplots(figsize=(7.6, 0.9 + 0.5 * len(names)))[1]
    marks = (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#7F7F7F"), ("D", "#009E73"))
    for number, part in enumerate(parts):
        marker, colour = marks[number % len(marks)]
        rows = frame[frame["part"] == part]
        at = np.array([names.index(name) for name in rows["effect"]]) + 0.22 * (number - (len(parts) - 1) / 2)
        points, low, high = (rows[column].to_numpy(dtype=float) for column in ("points", "low", "high"))
        ax.hlines(at, low, high, color=colour, linewidth=1.4, zorder=2)
        ax.plot(points, at, marker, color=colour, label=part, zorder=3)
    ax.axvline(0, color="0.5", linewidth=0.8, zorder=1)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.set_xlabel(f"difference in points, {y_label(y)}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts))
    return ax


# --- images and boxes -------------------------------------------------------------------------------------------------


@style()
def show_boxes(
    pixels,
    boxes=(),
    names: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    ax: Axes | None = None,
    ignore: Sequence[bool] | None = None,
    class_names: Sequence[str] | None = None,
) -> Axes:
    """One image, uint8 (3, H, W), with its boxes (K, 4) xyxy pixels, class names (K,) and scores (K,) beside them.

    A class keeps its colour: by its place in `class_names`, or by its name where that is not given. `ignore` (K,) draws
    a box thin and dashed. Box edges lie where the pixels' edges are: [0, 0, W, H] frames the image.
    """
    pixels, boxes = np.asarray(pixels), np.asarray(boxes, dtype=float).reshape(-1, 4)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8 (3, H, W), got {pixels.dtype} {pixels.shape}")
    for what, values in (("names", names), ("scores", scores), ("ignore", ignore)):
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"{len(values)} {what} for {len(boxes)} boxes")
    ax = _new_ax(ax)
    height, width = pixels.shape[1:]
    ax.imshow(pixels.transpose(1, 2, 0), extent=(0, width, height, 0))
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        colour = _class_colour(names[k] if names is not None else "", class_names)
        aside = ignore is not None and bool(ignore[k])
        ax.add_patch(
            plt.Rectangle(
                (x1, y1),
                x2 - x1,
                y2 - y1,
                fill=False,
                edgecolor=colour,
                linewidth=1.0 if aside else 1.8,
                linestyle="--" if aside else "-",
            )
        )
        words = [names[k]] if names is not None else []
        words += [f"{float(scores[k]):.2f}"] if scores is not None else []
        if words:
            above = y1 > 0.12 * height  # else inside, so that it does not leave the image
            ax.annotate(
                " ".join(words),
                (x1, y1),
                xytext=(1, 1 if above else -1),
                textcoords="offset points",
                ha="left",
                va="bottom" if above else "top",
                fontsize=8,
                color=colour,
                annotation_clip=True,
                path_effects=[matplotlib.patheffects.withStroke(linewidth=2, foreground="white")],
            )
    ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


CLASS_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#332288", "#882255", "#117733", "#AA4499")


def _class_colour(name: str, class_names: Sequence[str] | None) -> str:
    if class_names is not None and name in class_names:
        return CLASS_COLOURS[list(class_names).index(name) % len(CLASS_COLOURS)]
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") if name else 0
    return CLASS_COLOURS[draw % len(CLASS_COLOURS)]


def _grid(count: int, columns: int, size: float, aspect: float, titled: bool) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    room = 0.25 if titled else 0.0
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(size * columns, (size * aspect + room) * rows + 0.1)
    )
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


@style()
def image_grid(
    images: Images,
    labels: Labels | Detections | None,
    class_names: Sequence[str],
    index: Sequence[int],
    columns: int = 4,
    titles: Sequence[str] | None = None,
    above: float = 0.3,
) -> Figure:
    """The images `index` side by side with their labels, or with detections of a score over `above`; None: bare images.

    `titles` (one per shown image) stand above them.
    """
    index = np.asarray(index, dtype=int)
    if not len(index):
        raise ValueError("image_grid needs at least one image")
    pixels = np.asarray(images.batch(index).cpu())  # (B, 3, H, W)
    figure, axes = _grid(len(index), columns, 2.2, pixels.shape[2] / pixels.shape[3], titles is not None)
    for place, (ax, i) in enumerate(zip(axes, index, strict=True)):
        boxes, classes, scores, ignore = _of_image(labels, int(i), above)
        names = [class_names[c - 1] for c in classes]
        show_boxes(pixels[place], boxes, names, scores, ax, ignore, class_names)
        if titles is not None:
            ax.set_title(titles[place], fontsize=9)
    return figure


@style()
def two_views(
    images: Images,
    plain: Detections,
    flipped: Detections,
    class_names: Sequence[str],
    index: Sequence[int],
    titles: Sequence[str],
    above: float = 0.3,
    across: int = 2,
) -> Figure:
    """Each image beside its mirror image, both with their detections; `across` such pairs a row.

    flipped: detections of the mirrored images with boxes mapped back to the plain ones, as `sampling.Sight` holds them.
    titles: one per shown image. A box has its class's colour, and fades with its confidence.
    """
    index = np.asarray(index, dtype=int)
    if not len(index) or len(titles) != len(index):
        raise ValueError(f"two_views needs one title per image, got {len(titles)} for {len(index)} images")
    pixels = np.asarray(images.batch(index).cpu())  # (B, 3, H, W)
    width = pixels.shape[3]
    figure, axes = _grid(2 * len(index), 2 * min(across, len(index)), 2.6, pixels.shape[2] / width, True)
    shown = {}
    for place, i in enumerate(index):
        for side, found in enumerate((plain, flipped)):
            ax = axes[2 * place + side]
            boxes, classes, scores, _ = _of_image(found, int(i), above)
            if side:
                boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
            show_boxes(pixels[place][:, :, ::-1] if side else pixels[place], ax=ax)
            for (x1, y1, x2, y2), c, score in zip(boxes, classes, scores, strict=True):
                colour = _class_colour(class_names[c - 1], class_names)
                patch = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.6, alpha=score)
                shown[class_names[c - 1]] = Line2D([], [], color=colour, linewidth=1.6)
                ax.add_patch(patch)
            ax.set_title("mirrored" if side else textwrap.fill(titles[place], 34), fontsize=8)
    if shown:
        _one_legend(figure, {name: shown[name] for name in class_names if name in shown})
    return figure


def _of_image(labels: Labels | Detections | None, i: int, above: float):
    """Boxes (K, 4), classes (K,), scores and ignore flags (K,) or None of image i, without the padding."""
    if labels is None:
        return np.zeros((0, 4)), np.zeros(0, dtype=int), None, None
    if isinstance(labels, Detections):
        keep = (labels.labels[i] > 0) & (labels.scores[i] > above)
        kept = (t[i][keep].detach().cpu().numpy() for t in (labels.boxes, labels.labels, labels.scores))
        return *kept, None
    keep = labels.classes[i] > 0
    boxes, classes, ignore = (t[i][keep].cpu().numpy() for t in (labels.boxes, labels.classes, labels.ignore))
    return boxes, classes, None, ignore


@style()
def score_strip(images: Images, scores: Sequence[float], show: int = 5, index: Sequence[int] | None = None) -> Figure:
    """The images that would be asked first (top row, highest scores) and last (bottom row), each with its score.

    scores (N,) belong to `index` (default: all images in order); of equal scores the earlier comes first.
    """
    scores = np.asarray(scores, dtype=float)
    index = np.arange(len(scores)) if index is None else np.asarray(index, dtype=int)
    if scores.ndim != 1 or len(scores) != len(index) or not len(scores):
        raise ValueError(f"need one score per image, got {scores.shape} scores for {len(index)} images")
    if not np.isfinite(scores).all():
        raise ValueError(f"non-finite score of image {index[~np.isfinite(scores)][0]}")
    order = np.argsort(-scores, kind="stable")
    show = min(show, len(scores))
    rows = np.stack([order[:show], order[::-1][:show][::-1]])  # (2, show) both from high to low
    pixels = np.asarray(images.batch(index[rows.ravel()]).cpu())
    figure, axes = _grid(2 * show, show, 1.8, pixels.shape[2] / pixels.shape[3], True)
    for place, (ax, k) in enumerate(zip(axes, rows.ravel(), strict=True)):
        show_boxes(pixels[place], ax=ax)
        ax.set_title(f"{scores[k]:.3g}", fontsize=9)
    for ax, words in ((axes[0], "asked first"), (axes[show], "asked last")):
        ax.set_ylabel(words)
    return figure


@style()
def client_histograms(
    counts, class_names: Sequence[str], ax: Axes | None = None, client_names: Sequence[str] | None = None
) -> Axes:
    """How many objects of each class every client holds: counts (M, C) as a table of shades with the numbers in it."""
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != len(class_names) or not counts.size:
        raise ValueError(f"counts must be (clients, {len(class_names)} classes), got {counts.shape}")
    clients = list(client_names) if client_names is not None else [f"client {m}" for m in range(len(counts))]
    if len(clients) != len(counts):
        raise ValueError(f"{len(clients)} client names for {len(counts)} clients")
    if ax is None:
        size = (1.6 + 0.52 * len(class_names), 1.1 + 0.34 * len(counts))
        ax = plt.subplots(figsize=tuple(np.clip(size, 3, 12)))[1]
    top = max(1, counts.max())
    ax.imshow(counts, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    if counts.size <= 400:
        for (m, c), n in np.ndenumerate(counts):
            ax.text(c, m, f"{n:g}", ha="center", va="center", fontsize=8, color="white" if n > 0.55 * top else "0.15")
    long = max(map(len, class_names)) > 4
    ax.set_xticks(range(len(class_names)), class_names, rotation=40 if long else 0, ha="right" if long else "center")
    ax.set_yticks(range(len(counts)), clients)
    ax.set_xlabel("objects of each class")
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


# --- files ------------------------------------------------------------------------------------------------------------


def save(figure: Figure | Axes, path: str | Path) -> Path:
    """Write a figure (or the figure of an `ax`) as PNG, 150 dpi; folders are made, the write is atomic.

    The file holds no date and no version, so the same figure gives the same bytes.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"figures are saved as .png, got {str(path)!r}")
    figure = figure.figure if isinstance(figure, Axes) else figure
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with style():
            figure.savefig(unfinished, format="png", dpi=150, metadata={"Software": None})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
