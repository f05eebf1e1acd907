"""What data are in memory: images and labels side by side, so that scoring can see images only, detections, boxes.

Boxes are (N, 4) float32 xyxy in pixels. A padded batch is (B, K, 4); class 0 marks a padding row.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

Index = Sequence[int] | np.ndarray | Tensor  # row numbers, or a mask


def row_numbers(index: Index, count: int) -> np.ndarray:
    """Row numbers 0..count-1 as int64 from a list, array, tensor or mask; ValueError for a row that does not exist."""
    rows = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    if rows.dtype == bool:
        return np.flatnonzero(rows)
    rows = rows.astype(np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= count):
        raise ValueError(f"row {rows[(rows < 0) | (rows >= count)][0]} does not exist: rows are 0..{count - 1}")
    return rows


@dataclass(frozen=True, eq=False)
class Images:
    """Images without labels, letterboxed once at load."""

    ids: tuple[str, ...]  # unique
    pixels: Tensor  # uint8 (N, 3, H, W)
    sizes: Tensor  # (N, 2) int64 original height, width
    groups: tuple[str, ...] | None = None  # day, town, camera of each image

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the letterboxed images."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def to(self, device: str | torch.device) -> "Images":
        return replace(self, pixels=self.pixels.to(device))

    def take(self, index: Index) -> "Images":
        """The images of these rows, in this order."""
        rows = row_numbers(index, len(self))
        groups = None if self.groups is None else tuple(self.groups[row] for row in rows)
        ids, pixels = tuple(self.ids[row] for row in rows), self.batch(rows, self.pixels.device)
        return Images(ids, pixels, self.sizes[rows], groups)

    def batch(self, index: Index, device: str | torch.device = "cpu", flip: Tensor | None = None) -> Tensor:
        """Model inputs for these rows: uint8 (B, 3, H, W) on `device`, mirrored where `flip` (B,) bool is True."""
        rows = torch.from_numpy(row_numbers(index, len(self)))
        batch = self.pixels[rows.to(self.pixels.device)].to(device)
        return batch if flip is None else torch.where(flip.to(device)[:, None, None, None], batch.flip(-1), batch)

    def batches(self, chunks: Sequence[Index], device: str | torch.device = "cpu") -> Iterator[Tensor]:
        """`batch` for each chunk of row numbers in turn."""
        return (self.batch(chunk, device) for chunk in chunks)


class _Rows:
    """Tensors of N images side by side, `boxes` among them."""

    def __len__(self) -> int:
        return len(self.boxes)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "_Rows":
        def changed(value: Tensor | Mapping) -> Tensor | Mapping:
            return {k: change(t) for k, t in value.items()} if isinstance(value, Mapping) else change(value)

        return type(self)(*map(changed, vars(self).values()))

    def to(self, device: str | torch.device) -> "_Rows":
        """The same on `device`."""
        return self._each(lambda t: t.to(device))

    def take(self, index: Index) -> "_Rows":
        """Those of these images, in this order; shapes stay otherwise."""
        rows = torch.from_numpy(row_numbers(index, len(self))).to(self.boxes.device)
        return self._each(lambda t: t[rows])


@dataclass(frozen=True, eq=False)
class Labels(_Rows):
    """The objects of N images, padded to K rows each; padding is all zero and comes last."""

    boxes: Tensor  # (N, K, 4) float32 xyxy pixels of the letterboxed image
    classes: Tensor  # (N, K) int64, 1..C, 0 = padding
    ignore: Tensor  # (N, K) bool: difficult, crowd or too small
    crowd: Tensor  # (N, K) bool

    @property
    def valid(self) -> Tensor:
        """(N, K) bool: objects that count, so neither padding nor ignore."""
        return (self.classes > 0) & ~self.ignore

    def flip(self, mask: Tensor, width: int) -> "Labels":
        """The labels after images where `mask` (N,) bool is True were mirrored; padding rows stay zero."""
        mirror = mask.to(self.boxes.device)[:, None] & (self.classes > 0)  # (N, K)
        return replace(self, boxes=torch.where(mirror[..., None], flip_boxes(self.boxes, width), self.boxes))


@dataclass(frozen=True)
class Detections(_Rows):
    """Padded detections of N images, best first: the one thing that a detector returns.

    extra: what some detectors add: 'level' (N, T) int64, the map that a box came from; 'sides' (N, T, 4), confidence
    in [0, 1] of left, top, right and bottom; 'predicted_loss' (N, T) >= 0.
    """

    boxes: Tensor  # (N, T, 4) float32 xyxy pixels of the letterboxed image
    scores: Tensor  # (N, T) in [0, 1]
    labels: Tensor  # (N, T) int64, 1..C, 0 = padding
    probs: Tensor  # (N, T, C + 1) class probabilities, background first, zeros where padded
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor:
        """(N, T) bool, False where padded."""
        return self.labels > 0

    def above(self, score: float) -> "Detections":
        """The same detections with those at or below `score` turned into padding (shapes stay)."""
        keep = (self.scores > score) & self.valid
        return self._each(lambda t: t * keep.view(*keep.shape, *[1] * (t.dim() - 2)))


def join_detections(parts: Sequence[Detections]) -> Detections:
    """Detections of several batches in one; rows are padded to the longest."""
    longest = max(part.boxes.shape[1] for part in parts)

    def joined(tensors: Iterable[Tensor]) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat([pad(t, (0, 0) * (t.dim() - 2) + (0, longest - t.shape[1])) for t in tensors])

    plain = (joined(getattr(part, name) for part in parts) for name in ("boxes", "scores", "labels", "probs"))
    return Detections(*plain, {name: joined(part.extra[name] for part in parts) for name in parts[0].extra})


@dataclass(frozen=True)
class Reading:
    """How a set was read: its format, the files that named the classes, and how the split was decided."""

    format: str = ""
    classes_from: str = ""
    split_from: str = ""


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of one data set. An image that is not labelled is no negative: nobody knows what is on it."""

    name: str
    images: Images
    labels: Labels | None  # None for images alone
    class_names: tuple[str, ...]
    drops: dict[str, int] = field(default_factory=dict)  # what a reader changed or left out, by reason
    labelled: Tensor | None = None  # (N,) bool; None = all of them, if there are labels
    reading: Reading = Reading()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def known(self) -> Tensor:
        """(N,) bool: the images whose labels are known."""
        return torch.full((len(self),), self.labels is not None) if self.labelled is None else self.labelled

    def take(self, index: Index) -> "Dataset":
        """These rows of images and labels; `drops` still tells of the whole set."""
        labels = None if self.labels is None else self.labels.take(index)
        labelled = None if self.labelled is None else self.labelled[row_numbers(index, len(self))]
        return replace(self, images=self.images.take(index), labels=labels, labelled=labelled)

    def class_counts(self) -> Tensor:
        """(N, C) int64 objects of each class in each image, ignored ones left out."""
        if self.labels is None:
            raise ValueError(f"data set {self.name!r} has no labels: it was read from images alone")
        kept = self.labels.classes * self.labels.valid  # (N, K)
        counts = torch.zeros(len(self), len(self.class_names) + 1, dtype=torch.int64, device=kept.device)
        return counts.scatter_add_(1, kept, torch.ones_like(kept))[:, 1:]

    def dominant_class(self) -> Tensor:
        """(N,) int64 the most frequent class of each image, 1..C; the lower one on a tie, 0 without objects."""
        counts = self.class_counts().numpy(force=True)  # whose argmax is the first of equal ones
        return torch.from_numpy(np.where(counts.any(axis=1), counts.argmax(axis=1) + 1, 0))

    def fingerprint(self) -> str:
        """SHA-256 of ids, sizes, groups, class names, labels and pixels: what runs and cached features belong to."""
        images, labels = self.images, self.labels
        known = () if labels is None else (labels.boxes, labels.classes, labels.ignore, labels.crowd)
        digest = hashlib.sha256(repr((images.ids, images.groups, images.image_size, self.class_names)).encode())
        for tensor in (images.sizes, self.labelled, *known, images.pixels):
            if tensor is not None:
                digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line: images, their size, boxes per class, what is ignored, dropped, not labelled, how it was split."""
        line = "{}: {:,} images {}x{}".format(self.name, len(self), *self.images.image_size)
        if self.labels is None:
            line += ", no labels"
        else:
            per_class = self.class_counts().sum(dim=0).tolist()
            listed = ", ".join(f"{name} {n:,}" for name, n in zip(self.class_names, per_class, strict=True))
            line += f", {sum(per_class):,} boxes ({listed})"
            empty = self.known & (self.labels.classes == 0).all(dim=1).cpu()
            told = {"ignored": self.labels.ignore, "images without objects": empty, "images not labelled": ~self.known}
            line += "".join(f", {int(mask.sum()):,} {what}" for what, mask in told.items() if mask.any())
        if self.drops:
            line += "; read: " + ", ".join(f"{reason} {n:,}" for reason, n in self.drops.items())
        return line + f"; split {self.reading.split_from}" * self.reading.split_from.startswith("drawn")


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirror (..., 4) xyxy boxes left-right in an image `width` pixels wide; twice is the identity."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)
