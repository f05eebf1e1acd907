"""Every figure: learning curves with the band over seeds, boxes on images, clients' histograms.

A drawing function takes `ax` (None: a new figure), draws on it and returns it; what needs several axes returns the
figure. All of them use one style, `fedal.mplstyle`; a method has the same colour and marker in every figure. Tables are
those of `record.table`: one row per method, seed, cycle, round and client, metrics in the rows of client "server".
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.patheffects
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .boxes import Detections
from .data import Images, Labels
from .metrics import cycle_ends, seed_interval


class Look(NamedTuple):
    """How a method looks everywhere."""

    colour: str
    marker: str
    line: str
    name: str


# Colours of Okabe and Ito (2008) and of Paul Tol's muted set, told apart with any colour vision; never colour alone.
# Line: least confidence solid, entropy dash-dotted, margin dotted, a reference dashed.
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
    "centralised": Look("#444444", "d", "--", "centralised"),
    "federated": Look("#AA4499", "*", "-", "federated"),
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
    """Colour, marker, line and shown name of a method; an unknown one draws its own from its name."""
    if method in METHODS:
        return METHODS[method]
    draw = int.from_bytes(hashlib.sha256(method.encode()).digest()[:4], "big")
    colour, marker = OTHERS[draw % len(OTHERS)], OTHER_MARKERS[draw // len(OTHERS) % len(OTHER_MARKERS)]
    return Look(colour, marker, "-", method.replace("_", " "))


def _new_ax(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax


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
) -> Axes:
    """Metric `y` against one of the bills: mean line and interval band over seeds, one line per method.

    x: images, boxes, seconds (drawn as minutes), bytes (all rounds so far, both ways, as MB) or rounds. `points` is
    "cycle" (the last round of each cycle) or "round" (every round). Points and bands are over the seeds that got so
    far, the band as in `metrics.seed_interval`: t interval of the mean, min to max for two seeds, none for one. A
    method that pays nothing on this axis (bytes of central training) is a horizontal dashed line at its final value.
    `paper` holds published points, columns x and value (optional: setting = method, metric, unit "%"), x in the unit of
    the axis: hollow black markers. `methods` chooses and orders the lines. ValueError for an unknown column or method
    and for a table without server rows.
    """
    rows = _server_rows(table, x, y, points)
    there = list(dict.fromkeys(rows["method"]))
    if methods is None:
        methods = [m for m in METHODS if m in there] + sorted(m for m in there if m not in METHODS)
    missing = [m for m in methods if m not in there]
    if missing:
        raise ValueError(f"no server rows with a value of {y!r} for {missing}; the table has {there}")
    ax = _new_ax(ax)
    for method in methods:
        mine = rows[rows["method"] == method]
        shown = look(method)
        if (mine["x"] == 0).all():
            final = mine.groupby("seed", sort=True)["y"].last()  # (S,)
            _reference(ax, shown, final.to_numpy())
            continue
        ends = [
            (len(at), at["x"].mean(), at["y"].mean(), *seed_interval(at["y"]))
            for _, at in mine.groupby(["cycle", "round"] if points == "round" else "cycle", sort=True)
        ]
        n, at_x, mean, low, high = np.array(ends).T
        kwargs = {"color": shown.colour, "marker": shown.marker, "linestyle": shown.line}
        if points == "round" and len(mean) > 12:
            kwargs["markevery"] = math.ceil(len(mean) / 12)
        ax.plot(at_x, mean, label=shown.name, zorder=3, markeredgecolor="white", markeredgewidth=0.6, **kwargs)
        if (n > 1).any():
            alpha = 0.16 if len(methods) <= 6 else 0.08
            ax.fill_between(at_x, low, high, color=shown.colour, alpha=alpha, linewidth=0, label="_band", zorder=2)
    if paper is not None:
        _draw_paper(ax, paper, y)
    ax.set_xlabel(X_LABELS[x])
    ax.set_ylabel(y_label(y))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x in ("images", "boxes", "rounds")))
    if y.startswith("ap"):
        low, high = ax.get_ylim()
        ax.set_ylim(max(0, low), min(1.02, high))
    if legend:
        ax.legend()
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


def _reference(ax: Axes, shown: Look, values: np.ndarray) -> None:
    ax.axhline(values.mean(), color=shown.colour, linestyle="--", label=shown.name, zorder=2.5)
    low, high = seed_interval(values)
    if not math.isnan(low):
        ax.axhspan(low, high, color=shown.colour, alpha=0.08, linewidth=0, label="_band", zorder=1.5)


def _draw_paper(ax: Axes, paper: pd.DataFrame, y: str) -> None:
    if not {"x", "value"} <= set(paper.columns):
        raise ValueError(f"published points need the columns x and value, got {list(paper.columns)}")
    if "metric" in paper.columns:
        paper = paper[paper["metric"] == y]
    settings = paper["setting"].astype(str) if "setting" in paper.columns else pd.Series("", index=paper.index)
    for setting, rows in paper.groupby(settings, sort=True):
        value = rows["value"].astype(float)
        if "unit" in rows.columns:
            value = value.where(~rows["unit"].astype(str).str.startswith(("%", "percent")), value / 100)
        name = f"paper, {look(setting).name}" if setting else "paper"
        marker = look(setting).marker if setting else "o"
        ax.plot(
            rows["x"].astype(float),
            value,
            marker,
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
) -> Figure:
    """One panel per bill in `xs`, one y axis, one legend; published points in the panel `paper_x` only."""
    if not xs:
        raise ValueError("learning_curves needs at least one x")
    figure, axes = plt.subplots(1, len(xs), sharey=True, squeeze=False, figsize=(0.8 + 3.1 * len(xs), 3.7))
    handles: dict[str, object] = {}
    for ax, x in zip(axes[0], xs, strict=True):
        given = paper if x == paper_x else None
        learning_curve(table, x, y, ax, paper=given, methods=methods, points=points, legend=False)
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
        if ax is not axes[0, 0]:
            ax.set_ylabel("")
    _one_legend(figure, handles)
    if title:
        figure.suptitle(title)
    return figure


def _one_legend(figure: Figure, handles: dict[str, object]) -> None:
    most = max(1, int(figure.get_figwidth() / 1.5))  # columns that fit side by side
    rows = math.ceil(len(handles) / most)
    columns = math.ceil(len(handles) / rows)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, handlelength=2.6)


def round_curves(table: pd.DataFrame, y: str = "ap50", ax: Axes | None = None, **options) -> Axes:
    """Metric `y` after every communication round, counted through all cycles; options as in `learning_curve`."""
    return learning_curve(table, "rounds", y, ax, points="round", **options)


def caption(table: pd.DataFrame, y: str = "ap50", paper: bool = False) -> str:
    """One sentence for under a learning curve: what line, band and markers are, over how many seeds."""
    rows = _server_rows(table, "rounds", y, "cycle")
    counts = rows.groupby(["method", "cycle"])["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    seeds = f"{high} seed{'s' if high > 1 else ''}" if low == high else f"{low} to {high} seeds"
    band = {1: "no band", 2: "band: both values"}.get(high, "band: 95 % t interval of the mean")
    if low <= 2 < high:
        band += " (both values where there are two)"
    text = f"{y_label(y)} on the test images; line: mean over {seeds}; {band}"
    return text + ("; hollow black: published." if paper else ".")


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
                (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour,
                linewidth=1.0 if aside else 1.8, linestyle="--" if aside else "-",
            )
        )  # fmt: skip
        words = [names[k]] if names is not None else []
        words += [f"{float(scores[k]):.2f}"] if scores is not None else []
        if words:
            above = y1 > 0.12 * height  # else inside, so that it does not leave the image
            ax.annotate(
                " ".join(words), (x1, y1), xytext=(1, 1 if above else -1), textcoords="offset points",
                ha="left", va="bottom" if above else "top", fontsize=8, color=colour, annotation_clip=True,
                path_effects=[matplotlib.patheffects.withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
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
