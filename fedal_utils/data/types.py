"""The one in-memory type: a `Dataset` is images and labels side by side, so that scoring can see images only."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .boxes import flip_boxes

Index = Sequence[int] | np.ndarray | Tensor


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
        """The same images with their pixels on `device`."""
        return replace(self, pixels=self.pixels.to(device))

    def take(self, index: Index) -> "Images":
        """The images of these rows (row numbers or a mask), in this order."""
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


@dataclass(frozen=True, eq=False)
class Labels:
    """The objects of N images, padded to K rows each; padding is all zero and comes last."""

    boxes: Tensor  # (N, K, 4) float32 xyxy pixels of the letterboxed image
    classes: Tensor  # (N, K) int64, 1..C, 0 = padding
    ignore: Tensor  # (N, K) bool: difficult, crowd or too small
    crowd: Tensor  # (N, K) bool

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Labels":
        return Labels(*map(change, (self.boxes, self.classes, self.ignore, self.crowd)))

    @property
    def valid(self) -> Tensor:
        """(N, K) bool: objects that count, so neither padding nor ignore."""
        return (self.classes > 0) & ~self.ignore

    def to(self, device: str | torch.device) -> "Labels":
        """The same labels on `device`."""
        return self._each(lambda t: t.to(device))

    def take(self, index: Index) -> "Labels":
        """The labels of these rows (row numbers or a mask), in this order; K stays."""
        rows = torch.from_numpy(row_numbers(index, len(self))).to(self.boxes.device)
        return self._each(lambda t: t[rows])

    def count(self) -> Tensor:
        """(N,) int64 objects per image that count (neither padding nor ignore)."""
        return self.valid.sum(dim=1)

    def flip(self, mask: Tensor, width: int) -> "Labels":
        """The labels after images where `mask` (N,) bool is True were mirrored; padding rows stay zero."""
        mirror = mask.to(self.boxes.device)[:, None] & (self.classes > 0)  # (N, K)
        return replace(self, boxes=torch.where(mirror[..., None], flip_boxes(self.boxes, width), self.boxes))


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

    def take(self, index: Index) -> "Dataset":
        """The rows (row numbers or a mask) of images and labels; `drops` still tells of the whole set."""
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
        tensors = [images.sizes, self.labelled, *known, images.pixels]
        digest = hashlib.sha256(repr((images.ids, images.groups, images.image_size, self.class_names)).encode())
        for tensor in (t for t in tensors if t is not None):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line: images, their size, boxes per class, what is ignored, dropped, not labelled, how it was split."""
        height, width = self.images.image_size
        line = f"{self.name}: {len(self):,} images {height}x{width}"
        if self.labels is None:
            line += ", no labels"
        else:
            per_class = self.class_counts().sum(dim=0).tolist()
            listed = ", ".join(f"{name} {n:,}" for name, n in zip(self.class_names, per_class, strict=True))
            line += f", {sum(per_class):,} boxes ({listed})"
            known = torch.ones(len(self), dtype=torch.bool) if self.labelled is None else self.labelled
            empty = known & (self.labels.classes == 0).all(dim=1).cpu()
            told = {"ignored": self.labels.ignore, "images without objects": empty, "images not labelled": ~known}
            line += "".join(f", {int(mask.sum()):,} {what}" for what, mask in told.items() if mask.any())
        if self.drops:
            line += "; read: " + ", ".join(f"{reason} {n:,}" for reason, n in self.drops.items())
        return line + f"; split {self.reading.split_from}" * self.reading.split_from.startswith("drawn")
