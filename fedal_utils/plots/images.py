"""Images with boxes, and how many objects each client holds. Every function returns (figure, caption)."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ..data import Detections, Images, Labels, flip_boxes, join_detections
from .style import PALETTE, legend_below, style

WIDE, LARGEST = 12.0, 4.4  # inches of a figure, and of an image in it


def _show_boxes(ax: Axes, pixels: np.ndarray, boxes, classes, scores, ignore) -> None:
    """One image, uint8 (3, H, W), with its boxes in the colours of their classes, scores, and ignored ones dashed."""
    height, width = pixels.shape[1:]
    ax.imshow(pixels.transpose(1, 2, 0), extent=(0, width, height, 0))
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        colour = PALETTE[int(classes[k]) % len(PALETTE) - 1]
        aside = ignore is not None and bool(ignore[k])
        line = {"linewidth": 1.0 if aside else 2.0, "linestyle": "--" if aside else "-"}
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **line))
        if scores is not None:
            label = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
            place = {"ha": "left", "va": "top", "fontsize": 7, "color": "white", "clip_on": True}
            ax.text(max(x1, 0), max(y1, 0), f"{float(scores[k]):.2f}", bbox=label, **place)
    ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _panels(count: int, columns: int, aspect: float, titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Axes for images side by side, as large as the figure's width allows, with wrapped titles."""
    columns = min(columns, count)
    size = min(LARGEST, WIDE / columns)
    rows = math.ceil(count / columns)
    wrapped = [textwrap.fill(title, int(13 * size)) for title in titles]
    room = 0.24 * max([0, *(1 + title.count("\n") for title in wrapped)])
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(size * columns, (size * aspect + room) * rows + 0.1)
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, title in zip(axes.flat, wrapped, strict=False):
        ax.set_title(title, fontsize=9)
    return figure, list(axes.flat[:count])


def _of_image(labels: Labels | Detections | None, i: int, above: float):
    """Boxes (K, 4), classes (K,), scores and ignore flags (K,) or None of image i, without the padding."""
    if labels is None:
        return np.zeros((0, 4)), np.zeros(0, dtype=int), None, None
    if isinstance(labels, Detections):
        keep = (labels.labels[i] > 0) & (labels.scores[i] > above)
        return *(t[i][keep].detach().cpu().numpy() for t in (labels.boxes, labels.labels, labels.scores)), None
    keep = labels.classes[i] > 0
    boxes, classes, ignore = (t[i][keep].cpu().numpy() for t in (labels.boxes, labels.classes, labels.ignore))
    return boxes, classes, None, ignore


@style()
def image_grid(
    images: Images,
    labels: Labels | Detections | None,
    class_names: Sequence[str],
    index: Sequence[int],
    columns: int = 4,
    titles: Sequence[str] = (),
    above: float = 0.3,
) -> tuple[Figure, str]:
    """The images `index` side by side: bare, with their labels, or with detections of a confidence over `above`."""
    index = np.asarray(index, dtype=int)
    pixels = np.asarray(images.batch(index).cpu())  # (B, 3, H, W)
    figure, axes = _panels(len(index), columns, pixels.shape[2] / pixels.shape[3], titles)
    seen: set[int] = set()
    for shown, ax, i in zip(pixels, axes, index, strict=True):
        boxes, classes, scores, ignore = _of_image(labels, int(i), above)
        _show_boxes(ax, shown, boxes, classes, scores, ignore)
        seen |= set(classes.tolist())
    colours = {class_names[c - 1]: PALETTE[c % len(PALETTE) - 1] for c in sorted(seen)}
    legend_below(figure, {name: Line2D([], [], color=colour, linewidth=3) for name, colour in colours.items()})
    if isinstance(labels, Detections):
        return figure, f"Detections of a confidence above {above:g}, which stands at each box; colour: class."
    return (
        figure,
        "" if labels is None else "Labels; colour: class; thin and dashed: ignored in training and evaluation.",
    )


def two_views(
    images: Images,
    plain: Detections,
    flipped: Detections,
    class_names: Sequence[str],
    index: Sequence[int],
    titles: Sequence[str],
) -> tuple[Figure, str]:
    """Each image beside its mirror image, both with their detections; two such pairs a row.

    flipped: of the mirrored images, with boxes mapped back to the plain ones. titles: one per shown image.
    """
    shown, width = images.take(index), images.image_size[1]
    mirrored = replace(flipped, boxes=flip_boxes(flipped.boxes, width)).take(index)
    ids = tuple(name for i in shown.ids for name in (i, f"{i} mirrored"))
    pixels = torch.stack([shown.batch(range(len(shown))), shown.batch(range(len(shown))).flip(-1)], dim=1).flatten(0, 1)
    pairs = Images(ids, pixels, shown.sizes.repeat_interleave(2, dim=0))
    order = torch.arange(2 * len(shown)).view(2, -1).T.flatten()  # 0, N, 1, N + 1, ...
    found = join_detections([plain.take(index), mirrored]).take(order)
    both = [text for title in titles for text in (title, "mirrored")]
    figure, caption = image_grid(pairs, found, class_names, range(len(pairs)), min(4, len(pairs)), both)
    return figure, f"An image and its mirror image. {caption}"


def score_strip(
    images: Images, scores: Sequence[float], show: int = 5, index: Sequence[int] | None = None
) -> tuple[Figure, str]:
    """The images that would be queried first (above) and last (below) by scores (N,) of `index` (None: all)."""
    scores = np.asarray(scores, dtype=float)
    index = np.arange(len(scores)) if index is None else np.asarray(index, dtype=int)
    order = np.argsort(-scores, kind="stable")
    show = min(show, len(scores))
    chosen = np.concatenate([order[:show], order[-show:]])  # both rows from high to low
    titles = [f"queried {'first' if row < show else 'last'}: {scores[k]:.3g}" for row, k in enumerate(chosen)]
    figure, _ = image_grid(images, None, (), index[chosen], show, titles)
    return figure, f"Highest scores above, lowest below, of {len(scores)} images; the highest are queried first."


@style()
def client_histograms(
    counts,
    class_names: Sequence[str],
    client_names: Sequence[str] | None = None,
    ax: Axes | None = None,
    what: str = "objects",
    title: str = "",
) -> tuple[Figure, str]:
    """How many objects (or `what`) of each class every client holds: counts (M, C) as shades with the numbers."""
    counts = np.asarray(counts)
    clients = list(client_names) if client_names is not None else [f"client {m}" for m in range(len(counts))]
    ax = ax or plt.subplots(figsize=tuple(np.clip((1.6 + 0.52 * counts.shape[1], 1.1 + 0.34 * len(counts)), 3, 12)))[1]
    top = max(1, counts.max())
    ax.imshow(counts, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    if counts.size <= 400:
        for (m, c), n in np.ndenumerate(counts):
            ax.text(c, m, f"{n:g}", ha="center", va="center", fontsize=8, color="white" if n > 0.55 * top else "0.15")
    long = max(map(len, class_names)) > 4
    ax.set_xticks(range(len(class_names)), class_names, rotation=40 if long else 0, ha="right" if long else "center")
    ax.set_yticks(range(len(counts)), [f"client {name}" if name.isdecimal() else name for name in clients])
    ax.set(xlabel=f"{what} of each class", title=title)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax.figure, f"{what[0].upper()}{what[1:]} of each class at each client; darker is more."
