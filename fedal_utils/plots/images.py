"""Images with boxes, and how many objects each client holds. Every function returns (figure, caption)."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..data import Detections, Images, Labels, flip_boxes, join_detections
from .style import PALETTE, legend_below, style

WIDE, LARGEST = 12.0, 4.4  # inches of a figure, and of an image in it


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
    pixels = np.asarray(images.batch(index).cpu()).transpose(0, 2, 3, 1)  # (B, H, W, 3)
    height, width = pixels.shape[1:3]
    columns = min(columns, len(pixels))
    rows, size = math.ceil(len(pixels) / columns), min(LARGEST, WIDE / columns)
    wrapped = [textwrap.fill(title, int(13 * size)) for title in titles]
    room = 0.24 * max([0, *(1 + title.count("\n") for title in wrapped)])
    tall = (size * height / width + room) * rows + 0.1
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(size * columns, tall))
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, shown, i, title in zip_longest(axes.flat[: len(pixels)], pixels, index, wrapped, fillvalue=""):
        ax.set_title(title, fontsize=9)
        ax.imshow(shown, extent=(0, width, height, 0))
        for (x1, y1, x2, y2), number, score, aside in _objects(labels, int(i), above):
            colour = PALETTE[number % len(PALETTE) - 1]
            line = {"linewidth": 1.0 if aside else 2.0, "linestyle": "--" if aside else "-"}
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **line))
            ax.plot([], [], color=colour, linewidth=3, label=class_names[number - 1])
            if score is not None:
                label = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
                place = {"ha": "left", "va": "top", "fontsize": 7, "color": "white", "clip_on": True}
                ax.text(max(x1, 0), max(y1, 0), f"{score:.2f}", bbox=label, **place)
        ax.set(xlim=(0, width), ylim=(height, 0))
    legend_below(figure, *axes.flat)
    if isinstance(labels, Detections):
        return figure, f"Detections of a confidence above {above:g}, which stands at each box; colour: class."
    told = "Labels; colour: class; thin and dashed: ignored in training and evaluation."
    return figure, "" if labels is None else told


def _objects(labels: Labels | Detections | None, i: int, above: float) -> Iterator[tuple]:
    """Box, class, score or None, and whether it is ignored, of the objects of image i."""
    if isinstance(labels, Detections):
        for k in torch.nonzero((labels.labels[i] > 0) & (labels.scores[i] > above))[:, 0].tolist():
            yield labels.boxes[i, k].tolist(), int(labels.labels[i, k]), float(labels.scores[i, k]), False
    elif labels is not None:
        for k in torch.nonzero(labels.classes[i])[:, 0].tolist():
            yield labels.boxes[i, k].tolist(), int(labels.classes[i, k]), None, bool(labels.ignore[i, k])


def two_views(
    images: Images,
    plain: Detections,
    flipped: Detections,
    class_names: Sequence[str],
    index: Sequence[int],
    titles: Sequence[str],
) -> tuple[Figure, str]:
    """Each image beside its mirror image, both with their detections; flipped: mapped back to the plain images."""
    shown, width = images.take(index), images.image_size[1]
    mirrored = replace(flipped, boxes=flip_boxes(flipped.boxes, width)).take(index)
    order = torch.arange(2 * len(shown)).view(2, -1).T.flatten()  # 0, N, 1, N + 1, ...
    batch = shown.batch(range(len(shown)))
    pairs = Images(tuple(map(str, order.tolist())), torch.cat([batch, batch.flip(-1)])[order], shown.sizes.repeat(2, 1))
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
    counts, class_names: Sequence[str], client_names=None, ax: Axes | None = None, what="objects", title=""
) -> tuple[Figure, str]:
    """How many objects (or `what`) of each class every client holds: counts (M, C) as shades with the numbers."""
    counts = np.asarray(counts)
    clients = [f"client {m}" for m in range(len(counts))] if client_names is None else list(client_names)
    ax = ax or plt.subplots(figsize=tuple(np.clip((1.6 + 0.52 * counts.shape[1], 1.1 + 0.34 * len(counts)), 3, 12)))[1]
    top, long = max(1, counts.max()), max(map(len, class_names)) > 4
    ax.imshow(counts, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for (m, c), n in np.ndenumerate(counts if counts.size <= 400 else np.zeros((0, 0))):
        ax.text(c, m, f"{n:g}", ha="center", va="center", fontsize=8, color="white" if n > 0.55 * top else "0.15")
    ax.set_xticks(range(len(class_names)), class_names, rotation=40 if long else 0, ha="right" if long else "center")
    ax.set_yticks(range(len(counts)), [f"client {name}" if name.isdecimal() else name for name in clients])
    ax.set(xlabel=f"{what} of each class", title=title)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax.figure, f"{what[0].upper()}{what[1:]} of each class at each client; darker is more."
