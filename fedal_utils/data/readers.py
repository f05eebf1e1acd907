"""Readers that turn DigitScenes, VOC XML, COCO JSON, KITTI, YOLO txt and plain folders into one in-memory type.

A `Dataset` is images and labels side by side, kept apart on purpose: code that scores sees `Images` only.
Pixels are uint8 (N, 3, H, W), letterboxed once at load; boxes are float32 (N, K, 4) xyxy pixels of the letterboxed
image, padded to the largest K; classes are 1..C, 0 = padding (background is class 0 in detectors).

What a reader does with imperfect input, the same for every format:

* kept as *ignore* and counted: VOC `difficult`, COCO `iscrowd`, objects whose shorter side is below `min_object`;
* changed and counted: a box partly outside its image is clipped;
* dropped and counted: a box without area; in KITTI `DontCare` and classes that were not asked for, as the paper does;
* an error that names file and value: a missing, truncated or 16-bit image, an unreadable annotation, an image size that
  is not the annotated one, a box wholly outside its image, inverted or not finite, an unknown class, a duplicate id, an
  empty set.

An annotation that lists no object is no error: the image is a negative, and `Dataset.describe` says how many there are.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from . import boxes as boxes_of
from . import download
from ..seeding import rng_for

FILL = 114  # grey of the letterbox' margins
MAX_BYTES = 8 << 30  # larger sets stream
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

Index = Sequence[int] | np.ndarray | Tensor


# ------------------------------------------------------------------------------------------------------- the one type


def _rows(index: Index, count: int) -> np.ndarray:
    """Row numbers 0..count-1 as int64 from a list, array, tensor or mask; anything else is an error."""
    if isinstance(index, Tensor):
        index = index.detach().cpu().numpy()
    rows = np.asarray(index)
    if rows.ndim != 1:
        raise ValueError(f"row numbers must be one-dimensional, got shape {rows.shape}")
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rows.dtype == bool:
        if rows.size != count:
            raise ValueError(f"a mask over {count} rows was expected, got one of length {rows.size}")
        return np.flatnonzero(rows)
    if rows.dtype.kind not in "iu":
        raise ValueError(f"row numbers must be integers, got {rows.dtype}: {rows[:5].tolist()}")
    if rows.min() < 0 or rows.max() >= count:
        bad = rows[(rows < 0) | (rows >= count)][0]
        raise ValueError(f"row {bad} does not exist: rows are 0..{count - 1}")
    return rows.astype(np.int64)


def _check_ids(ids: tuple[str, ...], sizes: Tensor, groups: tuple[str, ...] | None) -> None:
    if len(set(ids)) != len(ids):
        twice = next(i for i, n in Counter(ids).items() if n > 1)
        raise ValueError(f"image id {twice!r} occurs more than once; ids must be unique")
    if tuple(sizes.shape) != (len(ids), 2) or (groups is not None and len(groups) != len(ids)):
        raise ValueError(f"{len(ids)} ids, sizes of shape {tuple(sizes.shape)} and groups {groups and len(groups)}")


def _mirrored(batch: Tensor, flip: Tensor | None) -> Tensor:
    if flip is None:
        return batch
    return torch.where(flip.to(batch.device)[:, None, None, None], batch.flip(-1), batch)


def _picked(groups: tuple[str, ...] | None, rows: np.ndarray) -> tuple[str, ...] | None:
    return None if groups is None else tuple(groups[i] for i in rows)


@dataclass(frozen=True, eq=False)
class Images:
    """Images without labels. ids are unique; sizes (N, 2) int64 original height, width; groups: town, camera, ..."""

    ids: tuple[str, ...]
    pixels: Tensor
    sizes: Tensor
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_ids(self.ids, self.sizes, self.groups)
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4 or self.pixels.shape[:2] != (len(self.ids), 3):
            raise ValueError(
                f"pixels must be uint8 ({len(self.ids)}, 3, H, W), got {self.pixels.dtype} {tuple(self.pixels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the letterboxed images."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def to(self, device: str | torch.device) -> Images:
        """The same images with their pixels on `device`; `batch` is then a slice there."""
        return replace(self, pixels=self.pixels.to(device))

    def take(self, index: Index) -> Images:
        """The images of these rows (row numbers or a mask), in this order."""
        rows = _rows(index, len(self))
        pixels = self.pixels[torch.from_numpy(rows).to(self.pixels.device)]
        return Images(tuple(self.ids[i] for i in rows), pixels, self.sizes[rows], _picked(self.groups, rows))

    def batch(self, index: Index, device: str | torch.device = "cpu", flip: Tensor | None = None) -> Tensor:
        """Model inputs for these rows: uint8 (B, 3, H, W) on `device`, mirrored where `flip` (B,) bool is True."""
        rows = torch.from_numpy(_rows(index, len(self))).to(self.pixels.device)
        return _mirrored(self.pixels[rows].to(device), flip)

    def batches(self, chunks: Sequence[Index], device: str | torch.device = "cpu") -> Iterator[Tensor]:
        """`batch` for each chunk of row numbers in turn (a streaming set reads ahead with workers)."""
        for chunk in chunks:
            yield self.batch(chunk, device)


@dataclass(frozen=True)
class _File:
    """Where an image's pixels are: its file, (height, width), and whether its EXIF orientation is to be applied."""

    path: Path
    size: tuple[int, int]
    turn: bool


class _Letterboxed(torch.utils.data.Dataset):
    """What a DataLoader worker needs to turn a row number into letterboxed pixels."""

    def __init__(self, files: Sequence[_File], image_size: tuple[int, int]):
        self.files, self.image_size = files, image_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Tensor:
        return _read_letterboxed(self.files[row], self.image_size)  # uint8 (3, H, W)


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """`Images` whose pixels stay in their files until asked for: the same rows give the same bytes.

    A broken file is therefore found when its row is read, not at load; the error is the same one.
    """

    ids: tuple[str, ...]
    files: tuple[_File, ...]
    sizes: Tensor
    image_size: tuple[int, int]
    groups: tuple[str, ...] | None = None
    workers: int = 4

    def __post_init__(self) -> None:
        _check_ids(self.ids, self.sizes, self.groups)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: str | torch.device) -> StreamedImages:
        """Itself: pixels that are not in memory cannot live on a device; `batch` moves what it reads."""
        return self

    def take(self, index: Index) -> StreamedImages:
        """The images of these rows (row numbers or a mask), in this order; nothing is read."""
        rows = _rows(index, len(self))
        ids, files = tuple(self.ids[i] for i in rows), tuple(self.files[i] for i in rows)
        return replace(self, ids=ids, files=files, sizes=self.sizes[rows], groups=_picked(self.groups, rows))

    def batch(self, index: Index, device: str | torch.device = "cpu", flip: Tensor | None = None) -> Tensor:
        """Model inputs for these rows: uint8 (B, 3, H, W) on `device`, mirrored where `flip` (B,) bool is True."""
        files = [self.files[i] for i in _rows(index, len(self))]
        return _mirrored(_read_all(files, self.image_size, max(1, self.workers)).to(device), flip)

    def batches(self, chunks: Sequence[Index], device: str | torch.device = "cpu") -> Iterator[Tensor]:
        """`batch` for each chunk of row numbers in turn, read ahead by `workers` processes (0: in this one)."""
        device = torch.device(device)
        chunks = [_rows(chunk, len(self)) for chunk in chunks]
        if any(len(chunk) == 0 for chunk in chunks):  # a loader cannot stack nothing
            for chunk in chunks:
                yield self.batch(chunk, device)
            return
        loader = torch.utils.data.DataLoader(
            _Letterboxed(self.files, self.image_size),
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=min(self.workers, len(chunks)),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own, or the loader would draw from the global one
        )
        reading = iter(loader)
        try:
            for batch in reading:
                yield batch.to(device, non_blocking=True)
        finally:  # or after an error the workers wait 5 s for the garbage collector
            getattr(reading, "_shutdown_workers", lambda: None)()


@dataclass(frozen=True, eq=False)
class Labels:
    """The objects of N images, padded to K rows each, apart from the images.

    boxes (N, K, 4) float32 xyxy pixels of the letterboxed image; classes (N, K) int64, 1..C, 0 = padding; ignore (N, K)
    bool: difficult, crowd or too small; crowd (N, K) bool. Padding rows are all zero and come last.
    """

    boxes: Tensor
    classes: Tensor
    ignore: Tensor
    crowd: Tensor

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def _with(self, change: Callable[[Tensor], Tensor]) -> Labels:
        return Labels(change(self.boxes), change(self.classes), change(self.ignore), change(self.crowd))

    @property
    def valid(self) -> Tensor:
        """(N, K) bool: objects that count, so neither padding nor ignore."""
        return (self.classes > 0) & ~self.ignore

    def to(self, device: str | torch.device) -> Labels:
        return self._with(lambda t: t.to(device))

    def take(self, index: Index) -> Labels:
        """The labels of these rows (row numbers or a mask), in this order; K stays."""
        rows = torch.from_numpy(_rows(index, len(self))).to(self.boxes.device)
        return self._with(lambda t: t[rows])

    def count(self) -> Tensor:
        """(N,) int64 objects per image that count (neither padding nor ignore)."""
        return self.valid.sum(dim=1)

    def flip(self, mask: Tensor, width: int) -> Labels:
        """The labels after images where `mask` (N,) bool is True were mirrored; padding rows stay zero."""
        mirror = mask.to(self.boxes.device)[:, None] & (self.classes > 0)  # (N, K)
        return replace(self, boxes=torch.where(mirror[..., None], boxes_of.flip_boxes(self.boxes, width), self.boxes))


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of one data set. `labels` is None for a plain folder; `drops` counts what a reader left out and why."""

    name: str
    images: Images | StreamedImages
    labels: Labels | None
    class_names: tuple[str, ...]
    drops: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Index) -> Dataset:
        """The rows (row numbers or a mask) of images and labels; `drops` still tells of the whole set."""
        labels = None if self.labels is None else self.labels.take(index)
        return replace(self, images=self.images.take(index), labels=labels)

    def _labels(self) -> Labels:
        if self.labels is None:
            raise ValueError(f"data set {self.name!r} has no labels: it was read from images alone")
        return self.labels

    def class_counts(self) -> Tensor:
        """(N, C) int64 objects of each class in each image, ignored ones left out."""
        labels = self._labels()
        kept = labels.classes * labels.valid  # (N, K)
        counts = torch.zeros(len(self), len(self.class_names) + 1, dtype=torch.int64, device=kept.device)
        return counts.scatter_add_(1, kept, torch.ones_like(kept))[:, 1:]

    def dominant_class(self) -> Tensor:
        """(N,) int64 the most frequent class of each image, 1..C; the lower one on a tie, 0 without objects."""
        counts = self.class_counts()
        best = counts.max(dim=1)  # the first maximum, as the classes are compared in order
        first = (counts == best.values[:, None]).int().argmax(dim=1) + 1
        return torch.where(best.values > 0, first, torch.zeros_like(first))

    def describe(self) -> str:
        """One line: images, their size, boxes per class, what is ignored, dropped and without objects."""
        height, width = self.images.image_size
        line = f"{self.name}: {len(self):,} images {height}x{width}"
        if self.labels is None:
            return line + ", no labels"
        per_class = self.class_counts().sum(dim=0).tolist()
        listed = ", ".join(f"{name} {n:,}" for name, n in zip(self.class_names, per_class, strict=True))
        line += f", {sum(per_class):,} boxes ({listed})"
        ignored = int((self.labels.ignore & (self.labels.classes > 0)).sum())
        negatives = int((self.labels.classes > 0).any(dim=1).logical_not().sum())
        line += f", {ignored:,} ignored" if ignored else ""
        line += f", {negatives:,} images without objects" if negatives else ""
        if self.drops:
            line += "; read: " + ", ".join(f"{reason} {n:,}" for reason, n in self.drops.items())
        return line


# ------------------------------------------------------------------------------------------------------------- pixels


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except Exception as error:
        raise ValueError(
            f"image {path} cannot be read: {error}; allowed are whole {', '.join(SUFFIXES)} files"
        ) from None


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # or getexif would decode all pixels to look behind them
    return image.getexif().get(0x0112, 1)


def _file(path: Path, stated: tuple[int, int] | None) -> _File:
    """The file with its size: the annotated one if there is one, else that of the upright image."""
    if stated is not None:
        if not path.is_file():
            raise ValueError(f"image {path} does not exist")
        return _File(path, stated, turn=False)
    with _opened(path) as image:
        height, width = image.height, image.width
        if _orientation(image) in (5, 6, 7, 8):
            height, width = width, height
    return _File(path, (height, width), turn=True)


def refuse_half_images() -> None:
    """ValueError where Pillow was told to fill in the missing part of a truncated image."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: broken images would pass as grey; set it to False"
        )


def _read_rgb(file: _File) -> Image.Image:
    """The whole image as 8-bit RGB, of the size the annotation states; a truncated file is an error."""
    refuse_half_images()
    with _opened(file.path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"image {file.path} has mode {image.mode!r} (more than 8 bits); allowed are 8-bit images")
        stored = (image.height, image.width)
        try:
            image.load()
            orientation = _orientation(image)
            # Annotation tools disagree on EXIF: the stated size tells which way the annotator saw the image.
            turn = file.turn or (stored != file.size and stored[::-1] == file.size and orientation in (5, 6, 7, 8))
            upright = ImageOps.exif_transpose(image) if turn and orientation != 1 else image
            rgb = upright.convert("RGB")
        except Exception as error:
            raise ValueError(f"image {file.path} is truncated or corrupt: {error}") from None
    if (rgb.height, rgb.width) != file.size:
        raise ValueError(
            f"image {file.path} is {stored[0]} x {stored[1]} (height x width), "
            f"but its annotation says {file.size[0]} x {file.size[1]}; they must agree"
        )
    return rgb


def letterbox_image(image: Image.Image, image_size: tuple[int, int]) -> Tensor:
    """An RGB image scaled (bilinear, antialiased) into a grey canvas of (height, width): uint8 (3, H, W)."""
    inner, offset = boxes_of.letterbox_fit(torch.tensor([[image.height, image.width]]), image_size)
    (height, width), (top, left) = inner[0].tolist(), offset[0].tolist()
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas = np.full((3, *image_size), FILL, dtype=np.uint8)  # NumPy: torch would start a pool in every reading thread
    canvas[:, top : top + height, left : left + width] = np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(canvas)  # (3, H, W)


def _read_letterboxed(file: _File, image_size: tuple[int, int]) -> Tensor:
    return letterbox_image(_read_rgb(file), image_size)


def _read_all(files: Sequence[_File], image_size: tuple[int, int], threads: int) -> Tensor:
    """All images as uint8 (N, 3, H, W) in the order of `files`, whatever the threads do."""
    pixels = torch.empty(len(files), 3, *image_size, dtype=torch.uint8)

    def fill(row: int) -> None:
        pixels.numpy()[row] = _read_letterboxed(files[row], image_size).numpy()

    deque(_in_order(fill, range(len(files)), threads), maxlen=0)
    return pixels


def _in_order(work: Callable, items: Sequence, threads: int) -> Iterator:
    """`map` by a pool of threads; results and the first error come in the order of `items`."""
    if threads == 1 or len(items) < 2:
        yield from map(work, items)
        return
    broken = threading.Event()

    def unless_broken(item):  # after the first error the rest of the queue is not worth reading
        if not broken.is_set():
            return work(item)

    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(unless_broken, items)
        except BaseException:
            broken.set()
            raise


# -------------------------------------------------------------------------------------- from annotations to a Dataset


@dataclass(frozen=True)
class _Object:
    """One annotated object: class name, xyxy in original pixels (or in fractions of the image), and its flags."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool = False
    crowd: bool = False


@dataclass(frozen=True)
class _Record:
    """One image as its annotation tells it.

    objects: None without labels; source: the file to name in an error; left_out: objects a reader dropped, by reason.
    """

    id: str
    path: Path
    objects: tuple[_Object, ...] | None
    source: Path
    size: tuple[int, int] | None = None
    group: str | None = None
    fractions: bool = False
    left_out: dict[str, int] = field(default_factory=dict)


def _settled(record: _Record, thing: _Object, size: tuple[int, int], counts: Counter) -> tuple[float, ...] | None:
    """The object's box in original pixels inside its image, None if it has no area; counts what was done to it."""
    height, width = size
    box = tuple(v * s for v, s in zip(thing.box, (width, height) * 2, strict=True)) if record.fractions else thing.box
    x1, y1, x2, y2 = box
    told = [round(float(v), 3) for v in box]
    where = f"{record.source}: image {record.id!r}, class {thing.name!r}, box {told} (xyxy pixels)"
    if not all(math.isfinite(v) for v in box):
        raise ValueError(f"{where} has a coordinate that is not finite")
    if x2 < x1 or y2 < y1:
        raise ValueError(f"{where} is inverted; allowed are x1 <= x2 and y1 <= y2")
    if x1 == x2 or y1 == y2:
        counts["zero_area"] += 1
        return None
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        raise ValueError(f"{where} lies outside its image, which spans x 0..{width}, y 0..{height}")
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if any(abs(a - b) > 1e-6 * max(width, height) for a, b in zip(inside, box, strict=True)):
        counts["clipped"] += 1
    return inside


def _names_in(records: Iterable[_Record]) -> tuple[str, ...]:
    return tuple(sorted({thing.name for record in records for thing in record.objects or ()}))


def _labels_of(
    records: Sequence[_Record],
    sizes: Sequence[tuple[int, int]],
    class_names: Sequence[str],
    image_size: tuple[int, int],
    min_object: float,
    counts: Counter,
) -> Labels:
    number = {name: i + 1 for i, name in enumerate(class_names)}
    per_image: list[tuple[list, list, list, list]] = []
    for record, size in zip(records, sizes, strict=True):
        rows: tuple[list, list, list, list] = ([], [], [], [])
        for thing in record.objects or ():
            if thing.name not in number:
                raise ValueError(
                    f"{record.source}: image {record.id!r} has an object of class {thing.name!r}; "
                    f"allowed are {list(class_names)}"
                )
            box = _settled(record, thing, size, counts)
            if box is None:
                continue
            for kept, value in zip(rows, (box, number[thing.name], thing.difficult, thing.crowd), strict=True):
                kept.append(value)
        per_image.append(rows)
    boxes = boxes_of.pad_boxes([torch.tensor(r[0], dtype=torch.float64).reshape(-1, 4) for r in per_image])
    if boxes.shape[1] == 0:  # one padding row, so that reductions over K are defined
        boxes = boxes.new_zeros(len(records), 1, 4)

    def padded(column: int, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(boxes.shape[:2], dtype=dtype)
        for i, r in enumerate(per_image):
            out[i, : len(r[column])] = torch.tensor(r[column], dtype=dtype)
        return out  # (N, K)

    classes, difficult, crowd = padded(1, torch.int64), padded(2, torch.bool), padded(3, torch.bool)
    boxes = boxes_of.letterbox_boxes(boxes, torch.tensor(sizes), image_size) * (classes > 0)[..., None]
    small = (torch.minimum(*(boxes[..., 2:] - boxes[..., :2]).unbind(-1)) < min_object) & (classes > 0)
    small &= ~(difficult | crowd)  # each ignored object is counted once
    for reason, mask in (("difficult", difficult & ~crowd), ("crowd", crowd), ("too_small", small)):
        counts[reason] += int(mask.sum())
    return Labels(boxes.float(), classes, difficult | crowd | small, crowd)


def _size_pair(image_size: int | Sequence[int]) -> tuple[int, int]:
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(int(v) for v in image_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"image_size must be (height, width) in pixels >= 1, got {image_size!r}")
    return pair


def _assemble(
    name: str,
    records: Sequence[_Record],
    class_names: Sequence[str] | None,
    image_size: int | Sequence[int],
    *,
    source: Path | str,
    min_object: float = 0,
    max_bytes: int = MAX_BYTES,
    workers: int | None = None,
    counts: Counter | None = None,
) -> Dataset:
    """The Dataset of these records: annotations are checked first, then pixels are read."""
    if not records:
        raise ValueError(f"data set {name!r} is empty: no image in {source}; at least one is needed")
    image_size = _size_pair(image_size)
    counts = Counter() if counts is None else counts
    for record in records:
        counts.update(record.left_out)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    seen: dict[str, Path] = {}
    for record in records:
        if record.id in seen:
            raise ValueError(f"{record.source}: image id {record.id!r} was already used by {seen[record.id]}")
        seen[record.id] = record.source
    files = list(_in_order(lambda r: _file(r.path, r.size), records, max(1, workers)))
    sizes = [file.size for file in files]
    labels = None
    if all(record.objects is not None for record in records):
        if class_names is None:
            class_names = _names_in(records)
        if not class_names:
            raise ValueError(f"{source}: no object in any annotation, so the classes are unknown; give class_names")
        labels = _labels_of(records, sizes, class_names, image_size, min_object, counts)
    ids = tuple(record.id for record in records)
    groups = tuple(record.group for record in records)
    groups = None if None in groups else groups
    originals = torch.tensor(sizes, dtype=torch.int64)
    if len(records) * 3 * image_size[0] * image_size[1] > max_bytes:
        images = StreamedImages(ids, tuple(files), originals, image_size, groups, workers)
    else:
        images = Images(ids, _read_all(files, image_size, max(1, workers)), originals, groups)
    return Dataset(name, images, labels, tuple(class_names or ()), {k: n for k, n in counts.items() if n})


# ---------------------------------------------------------------------------------------------------------- Pascal VOC

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
BCCD_CLASSES = ("RBC", "WBC", "Platelets")
CARLA_CLASSES = ("vehicle", "bike", "motobike", "traffic_light", "traffic_sign")
NEU_CLASSES = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")


def _voc_number(element: ElementTree.Element | None, tag: str, file: Path, where: str) -> float:
    """The number in <tag>; not finite ones pass, for `_settled` to name with their box."""
    text = None if element is None else element.findtext(tag)
    try:
        return float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{file}: {where} has <{tag}> {text!r}; a number is needed") from None


def _voc_xml(file: Path, one_based: bool) -> tuple[tuple[int, int] | None, tuple[_Object, ...]]:
    """(height, width) as annotated (None where it says 0, as some tools do) and the objects of one XML file."""
    try:
        root = ElementTree.parse(file).getroot()
    except FileNotFoundError:
        raise ValueError(f"annotation {file} does not exist") from None
    except (ElementTree.ParseError, UnicodeError) as error:
        raise ValueError(f"annotation {file} is truncated or not XML: {error}") from None
    if root.tag != "annotation":
        raise ValueError(f"annotation {file} has the root <{root.tag}>; <annotation> is needed")
    size = root.find("size")
    if size is None:
        raise ValueError(f"annotation {file} has no <size>; <size> with <width> and <height> is needed")
    sides = [_voc_number(size, tag, file, "<size>") for tag in ("height", "width")]
    if not all(side.is_integer() and side >= 0 for side in sides):  # False for nan and inf as well
        raise ValueError(f"annotation {file} has the <size> {sides} (height, width); whole numbers are needed")
    height, width = (int(side) for side in sides)
    shift = 1.0 if one_based else 0.0
    objects = []
    for i, element in enumerate(root.findall("object")):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{file}: object {i} has no <name>")
        box = element.find("bndbox")
        x1, y1, x2, y2 = (_voc_number(box, t, file, f"object {i} ({name})") for t in ("xmin", "ymin", "xmax", "ymax"))
        difficult = (element.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            raise ValueError(f"{file}: object {i} ({name}) has <difficult> {difficult!r}; allowed are 0 and 1")
        objects.append(_Object(name, (x1 - shift, y1 - shift, x2, y2), difficult == "1"))
    return (height, width) if height > 0 and width > 0 else None, tuple(objects)


def _voc_record(id: str, image: Path, xml: Path, one_based: bool = False, group: str | None = None) -> _Record:
    size, objects = _voc_xml(xml, one_based)
    return _Record(id, image, objects, xml, size, group)


def _images_by_stem(folder: Path) -> dict[str, Path]:
    """Image files directly in `folder` by name without suffix, sorted."""
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist; it should hold the images")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(f"{path} and {found[path.stem].name} share the image id {path.stem!r}")
            found[path.stem] = path
    return found


def _split_ids(file: Path) -> list[str]:
    """The first word of each line of an ImageSets file."""
    if not file.is_file():
        raise ValueError(f"split file {file} does not exist; it should list one image id a line")
    ids = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not ids:
        raise ValueError(f"split file {file} is empty; it should list one image id a line")
    twice = [i for i, n in Counter(ids).items() if n > 1]
    if twice:
        raise ValueError(f"split file {file} lists the image id {twice[0]!r} more than once")
    return ids


def _voc_records(root: Path, split: str | None, image_ids: Sequence[str] | None, one_based: bool) -> list[_Record]:
    if image_ids is None and split is not None:
        sets = root / "ImageSets" / "Main"
        if split == "trainval" and not (sets / "trainval.txt").is_file() and (sets / "train.txt").is_file():
            image_ids = sorted(_split_ids(sets / "train.txt") + _split_ids(sets / "val.txt"))
        else:
            image_ids = _split_ids(sets / f"{split}.txt")
    images = _images_by_stem(root / "JPEGImages")
    if image_ids is None:
        image_ids = sorted(path.stem for path in (root / "Annotations").glob("*.xml") if not path.name.startswith("."))
    missing = root / "JPEGImages"
    return [
        _voc_record(i, images.get(i, missing / f"{i}.jpg"), root / "Annotations" / f"{i}.xml", one_based)
        for i in image_ids
    ]


def read_voc(
    root: str | Path,
    split: str | None = None,
    image_size: int | tuple[int, int] = (300, 300),
    image_ids: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    one_based: bool = False,
    min_object: float = 0,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
    workers: int | None = None,
) -> Dataset:
    """A folder in Pascal VOC's layout: `JPEGImages`, `Annotations/*.xml`, `ImageSets/Main/<split>.txt`.

    Which images: `image_ids`, else the split's list, else every annotation. one_based: coordinates count pixels from 1
    (VOC07 and VOC12 do): 1 is taken off xmin and ymin. class_names default to those found, sorted. `difficult` objects
    are ignore. An `<annotation>` without `<object>` is an image without objects; one without `<size>` is an error.
    """
    root = Path(root)
    records = _voc_records(root, split, image_ids, one_based)
    return _assemble(
        name or root.name, records, class_names, image_size, source=root, min_object=min_object, max_bytes=max_bytes,
        workers=workers,
    )


def _carla_records(root: Path, splits: Sequence[str], towns: Sequence[str] | None) -> list[_Record]:
    records = []
    for split in splits:
        images = _images_by_stem(root / "images" / split)
        xmls = {path.stem: path for path in sorted((root / "labels" / split).glob("*.xml"))}
        for stem in sorted(images.keys() | xmls.keys()):
            town = stem.split("_")[0]
            if towns is None or town in towns:
                image = images.get(stem, root / "images" / split / f"{stem}.png")
                xml = xmls.get(stem, root / "labels" / split / f"{stem}.xml")
                records.append(_voc_record(stem, image, xml, group=town))
    return records


# ---------------------------------------------------------------------------------------------------------- COCO JSON


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"annotation {file} does not exist") from None
    except ValueError as error:
        raise ValueError(f"annotation {file} is truncated or not JSON: {error}") from None


def _coco_records(
    file: Path, content: dict, find: Callable[[str], Path], group_field: str | None
) -> tuple[list[_Record], tuple[str, ...]]:
    """Records in the order of image ids, and the class names in the order of category ids."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"annotation {file} has no list {key!r}; COCO needs images, annotations, categories")
    for key, fields in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        for entry in content[key]:
            lacking = [f for f in fields if not isinstance(entry, dict) or f not in entry]
            if lacking:
                raise ValueError(f"annotation {file}: {key} has an entry without {lacking[0]!r}: {entry!r}")
    categories = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
    if len(categories) != len(content["categories"]) or len(set(categories.values())) != len(categories):
        raise ValueError(f"annotation {file} has a category id or name more than once: {content['categories']}")
    entries: dict = {}
    for entry in content["images"]:
        if entry["id"] in entries:
            raise ValueError(f"annotation {file} has the image id {entry['id']!r} more than once")
        entries[entry["id"]] = entry
    objects: dict = {i: [] for i in entries}
    for annotation in content["annotations"]:
        where = f"annotation {file}: object {annotation.get('id')!r}"
        image, category, box = (annotation.get(k) for k in ("image_id", "category_id", "bbox"))
        if image not in entries:
            raise ValueError(f"{where} belongs to image id {image!r}, which 'images' does not list")
        if category not in categories:
            raise ValueError(f"{where} has category_id {category!r}; allowed are {list(categories)}")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise ValueError(f"{where} has bbox {box!r}; four numbers x, y, width, height are needed")
        x, y, width, height = box
        objects[image].append(
            _Object(
                categories[category],
                (x, y, x + width, y + height),
                bool(annotation.get("ignore", 0)),
                bool(annotation.get("iscrowd", 0)),
            )
        )
    grouped = {group_field in entry for entry in entries.values()}
    if grouped == {True, False}:
        lacking = next(entry["file_name"] for entry in entries.values() if group_field not in entry)
        raise ValueError(f"annotation {file}: image {lacking!r} has no field {group_field!r}, but others have it")
    records = []
    for i in sorted(entries, key=lambda i: (isinstance(i, str), i)):
        entry = entries[i]
        size = (entry.get("height") or 0, entry.get("width") or 0)
        group = str(entry[group_field]) if group_field in entry else None
        path, stated = find(entry["file_name"]), size if min(size) > 0 else None
        records.append(_Record(entry["file_name"], path, tuple(objects[i]), file, stated, group))
    return records, tuple(categories.values())


def read_coco(
    annotations: str | Path,
    image_dir: str | Path,
    image_size: int | tuple[int, int] = (300, 300),
    class_names: Sequence[str] | None = None,
    group_field: str | None = "town",
    min_object: float = 0,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
    workers: int | None = None,
) -> Dataset:
    """COCO JSON with its images in `image_dir`; image ids are the file names.

    class_names default to the categories in the order of their ids. `iscrowd` objects are crowd and ignore.
    group_field: the field of an image that becomes its group, where the file has it.
    """
    file = Path(annotations)
    records, names = _coco_records(file, _json(file), lambda n: Path(image_dir) / n, group_field)
    return _assemble(
        name or file.stem, records, class_names or names, image_size, source=file, min_object=min_object,
        max_bytes=max_bytes, workers=workers,
    )


# -------------------------------------------------------------------------------------------------------------- KITTI

KITTI_CLASSES = ("Car", "Cyclist", "Misc", "Pedestrian", "Person_sitting", "Tram", "Truck", "Van")
KITTI_TWO = ("Car", "Pedestrian")
KITTI_SPLIT_SEED = 11111  # van Bommel 2021, released code
_KITTI_PAGE = "https://www.cvlibs.net/datasets/kitti/eval_object.php"
_KITTI_ZIPS = {"image_2": "data_object_image_2.zip", "label_2": "data_object_label_2.zip"}
_KITTI_UNPACKED = 32 << 30  # bytes; the training images take about 6 GB


def kitti_split(ids: Iterable[str]) -> tuple[list[str], list[str]]:
    """70 % train and 30 % validation ids, each sorted; of KITTI's 7,481 images 5,237 and 2,244 (van Bommel 2021).

    Depends on the sorted ids alone, so all class sets and machines share it. Seed and sizes are those of the released
    code; the lists are not, as its generator is another one. The paper's validation part is its test set too.
    """
    ids = sorted(ids)
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} image(s) cannot be split into train and validation; at least 2 are needed")
    count = max(1, int(0.3 * len(ids)))
    held = set(rng_for(KITTI_SPLIT_SEED, "kitti", "validation").permutation(len(ids))[:count].tolist())
    return [i for n, i in enumerate(ids) if n not in held], [i for n, i in enumerate(ids) if n in held]


def _kitti_txt(file: Path, class_names: Sequence[str], whole_pixels: bool, dont_care: bool) -> tuple[list, Counter]:
    """The objects of one label file and how many were left out, by reason."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"annotation {file} does not exist; an image without objects needs an empty file") from None
    except UnicodeError as error:
        raise ValueError(f"annotation {file} is not text: {error}") from None
    known = dict.fromkeys((*class_names, *KITTI_CLASSES, "DontCare"))
    objects: list[_Object] = []
    left_out: Counter = Counter()
    for i, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) not in (15, 16):
            raise ValueError(
                f"{file}: line {i} has {len(fields)} fields: {line!r}; allowed are 15, or 16 with a score: type, "
                "truncated, occluded, alpha, left, top, right, bottom, 3 dimensions, 3 coordinates, rotation"
            )
        kind = fields[0]
        if kind not in known:
            raise ValueError(f"{file}: line {i} has the type {kind!r}; allowed are {', '.join(known)}")
        for text in fields[1:]:
            try:
                finite = math.isfinite(float(text))
            except ValueError:
                finite = False
            if not finite:
                raise ValueError(f"{file}: line {i} has {text!r} after the type; allowed are finite numbers: {line!r}")
        box = tuple(float(v) for v in fields[4:8])
        if whole_pixels:
            box = tuple(float(int(v)) for v in box)
        if kind == "DontCare" and dont_care:  # any class may be there
            objects += [_Object(name, box, crowd=True) for name in class_names]
        elif kind in class_names:
            objects.append(_Object(kind, box))
        else:
            left_out["dont_care" if kind == "DontCare" else "other_class"] += 1
    return objects, left_out


def _kitti_records(
    folder: Path,
    class_names: Sequence[str],
    image_ids: Sequence[str] | None = None,
    whole_pixels: bool = True,
    dont_care: bool = False,
) -> list[_Record]:
    if len(set(class_names)) != len(class_names) or "DontCare" in class_names or not class_names:
        raise ValueError(f"class_names must be different types other than 'DontCare', got {list(class_names)}")
    images = _images_by_stem(folder / "training" / "image_2")
    labels = folder / "training" / "label_2"
    if not labels.is_dir():
        raise ValueError(f"folder {labels} does not exist; it should hold one txt file an image")
    if image_ids is None:
        told = {path.stem for path in labels.glob("*.txt") if not path.name.startswith(".")}
        image_ids = sorted(images.keys() | told)
    records = []
    for i in image_ids:
        file = labels / f"{i}.txt"
        objects, left_out = _kitti_txt(file, class_names, whole_pixels, dont_care)
        image = images.get(i, folder / "training" / "image_2" / f"{i}.png")
        records.append(_Record(i, image, tuple(objects), file, left_out=dict(left_out)))
    return records


def read_kitti(
    root: str | Path,
    image_size: int | tuple[int, int] = (192, 640),
    class_names: Sequence[str] = KITTI_CLASSES,
    image_ids: Sequence[str] | None = None,
    whole_pixels: bool = True,
    dont_care: bool = False,
    min_object: float = 0,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
    workers: int | None = None,
) -> Dataset:
    """A folder in KITTI's 2D layout: `training/image_2/*.png` (or .jpg) and `training/label_2/*.txt`.

    Which images: `image_ids`, else all. Boxes of other classes are dropped and counted (`drops["other_class"]`); an
    image that keeps none is a negative. whole_pixels: corners are truncated to integers, as van Bommel's (2021)
    released code does; False keeps the floats. dont_care: False drops `DontCare` regions and counts them, as that code
    does; True keeps each as a crowd region, thus ignore, of every class.
    """
    root = Path(root)
    records = _kitti_records(root, class_names, image_ids, whole_pixels, dont_care)
    return _assemble(
        name or root.name, records, class_names, image_size, source=root, min_object=min_object, max_bytes=max_bytes,
        workers=workers,
    )


def _kitti_unpack(archive: Path, part: str, training: Path) -> None:
    """`training/<part>/` of one of KITTI's zips in the folder `training`, put in place by one rename."""
    training.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{part}-", dir=training))
    try:
        try:
            with zipfile.ZipFile(archive) as packed:
                names = {member: download._safe(member, archive) for member in packed.infolist()}
                wanted = [
                    member for member, path in names.items()
                    if path.startswith(f"{part}/") and member.filename.startswith("training/") and not member.is_dir()
                ]
                size = sum(member.file_size for member in wanted)
                if not wanted or size > _KITTI_UNPACKED:
                    raise ValueError(
                        f"archive {archive} has {len(wanted)} files of {size} bytes below training/{part}/; allowed "
                        f"are at least one file and at most {_KITTI_UNPACKED} bytes"
                    )
                for member in wanted:
                    out = beside / names[member].removeprefix(f"{part}/")
                    if out.parent != beside:
                        raise ValueError(f"archive {archive}: entry {member.filename!r} lies in a folder of its own")
                    with packed.open(member) as source, out.open("xb") as sink:
                        shutil.copyfileobj(source, sink, download.CHUNK)
        except (zipfile.BadZipFile, EOFError, FileExistsError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"archive {archive} is damaged: {error}; remove it and get it again") from error
        beside.chmod(0o755)  # mkdtemp's folder is private
        os.rename(beside, training / part)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _kitti_folder(root: Path, unpack: bool) -> Path:
    """The folder that holds `training`: `kitti`, or torchvision's `Kitti/raw`; zips lying there are unpacked."""
    places = [root / "kitti", root / "Kitti" / "raw"]
    for place in places:
        if all((place / "training" / part).is_dir() for part in _KITTI_ZIPS):
            return place
    begun = [place for place in places if any((place / "training" / part).is_dir() for part in _KITTI_ZIPS)]
    folder = [*begun, places[0]][0]
    lacking = [part for part in _KITTI_ZIPS if not (folder / "training" / part).is_dir()]
    archives = {}
    for part in lacking:
        found = [p / _KITTI_ZIPS[part] for p in (*places, root) if (p / _KITTI_ZIPS[part]).is_file()]
        if not found or not unpack:
            there = f" ({found[0]} is there, but fetch=False does not unpack it)" if found else ""
            wanted = " and ".join(_KITTI_ZIPS[p] for p in lacking)
            raise ValueError(
                f"data set 'kitti': folder {folder / 'training' / part} does not exist{there}; KITTI asks for a "
                f"registration: get {wanted} from {_KITTI_PAGE} and put it into {folder}, as it is or unpacked, or "
                "point FEDAL_DATA to the folder that holds kitti"
            )
        archives[part] = found[0]
    folder.mkdir(parents=True, exist_ok=True)
    with download._alone(folder / ".unpack.lock"):
        for part, archive in archives.items():
            if not (folder / "training" / part).is_dir():  # or another process was quicker
                _kitti_unpack(archive, part, folder / "training")
    return folder


# -------------------------------------------------------------------------------------------- YOLO txt, plain folders

# Folders that only say what kind of file they hold: images/train/a.jpg and labels/train/a.txt belong together.
_LAYOUT = {"images", "jpegimages", "labels", "annotations", "annotation", "xml", "imagesets", "main"}


def _files(root: Path, *suffixes: str) -> list[Path]:
    """Files below `root` with one of these suffixes, sorted; hidden ones and macOS' archive leftovers left out."""
    found = []
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        if path.suffix.lower() in suffixes and not any(p.startswith(".") or p == "__MACOSX" for p in parts):
            if path.is_file():
                found.append(path)
    return sorted(found)


def _key(path: Path, root: Path) -> str:
    """What an image and its annotation share: images/train/a.jpg and labels/train/a.txt -> train/a."""
    relative = path.relative_to(root)
    return "/".join([p for p in relative.parts[:-1] if p.lower() not in _LAYOUT] + [relative.stem])


def _by_key(paths: Iterable[Path], root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        key = _key(path, root)
        if key in found:
            raise ValueError(f"{path} and {found[key]} share the id {key!r}; ids must be unique")
        found[key] = path
    return found


def _yolo_names(root: Path) -> tuple[str, ...] | None:
    """Class names from data.yaml (`names`), else from classes.txt, obj.names or *.names, else None."""
    for file in _files(root, ".yaml", ".yml"):
        import yaml

        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not YAML: {error}") from None
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict):
            names = [names[i] for i in sorted(names)]
        if names:
            return tuple(str(n) for n in names)
    for file in [*_files(root, ".names"), *(root.rglob("classes.txt"))]:
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return None


def _yolo_txt(file: Path, class_names: Sequence[str] | None) -> tuple[_Object, ...]:
    """The objects of one file, lines of `class cx cy w h` in fractions of the image; classes count from 0."""
    objects = []
    for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            number, (cx, cy, w, h) = int(fields[0]), (float(v) for v in fields[1:])
        except ValueError:
            raise ValueError(
                f"{file}: line {i} is {line!r}; allowed is `class cx cy w h`, an integer and four numbers"
            ) from None
        if number < 0 or (class_names is not None and number >= len(class_names)):
            allowed = f"0..{len(class_names) - 1} ({', '.join(class_names)})" if class_names else "0 and above"
            raise ValueError(f"{file}: line {i} has the class {number}; allowed are {allowed}")
        name = class_names[number] if class_names is not None else str(number)
        objects.append(_Object(name, (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)))
    return tuple(objects)


def _yolo_records(root: Path, class_names: Sequence[str] | None) -> tuple[list[_Record], tuple[str, ...], int]:
    """Records, class names and how many images have no file of labels (negatives, as YOLO has it)."""
    class_names = class_names or _yolo_names(root)
    images, labels = _by_key(_files(root, *SUFFIXES), root), {_key(p, root): p for p in _files(root, ".txt")}
    lists = {"classes", "train", "val", "test", "trainval", "readme", "license", "requirements"}
    for key, file in labels.items():
        told = key.split("/")[-1].lower().split(".")[0]
        if key not in images and told not in lists:
            raise ValueError(f"{file} belongs to no image: there is no {key} with one of {', '.join(SUFFIXES)}")
    records = [
        _Record(k, path, _yolo_txt(labels[k], class_names) if k in labels else (), labels.get(k, path), fractions=True)
        for k, path in images.items()
    ]
    if class_names is None:
        class_names = tuple(str(i) for i in range(1 + max((int(n) for n in _names_in(records)), default=-1)))
    return records, tuple(class_names), len(images.keys() - labels.keys())


def read_yolo(
    root: str | Path,
    image_size: int | tuple[int, int] = (300, 300),
    class_names: Sequence[str] | None = None,
    min_object: float = 0,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
    workers: int | None = None,
) -> Dataset:
    """Images with YOLO txt labels beside them, or in `labels` for `images`: lines `class cx cy w h`.

    Boxes are fractions of the image, classes count from 0. class_names default to those of data.yaml, classes.txt or
    *.names, else "0", "1", ... An image without a txt file is an image without objects, as YOLO has it;
    `drops["no_label_file"]` counts them.
    """
    root = Path(root)
    records, names, bare = _yolo_records(root, class_names)
    return _assemble(
        name or root.name, records, names, image_size, source=root, min_object=min_object, max_bytes=max_bytes,
        workers=workers, counts=Counter(no_label_file=bare),
    )


def _folder_records(root: Path) -> list[_Record]:
    return [_Record(path.relative_to(root).as_posix(), path, None, path) for path in _files(root, *SUFFIXES)]


def read_folder(
    root: str | Path,
    image_size: int | tuple[int, int] = (300, 300),
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
    workers: int | None = None,
) -> Dataset:
    """All images below a folder, without labels; ids are the relative paths."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"folder {root} does not exist")
    return _assemble(
        name or root.name, _folder_records(root), None, image_size, source=root, max_bytes=max_bytes, workers=workers
    )


# --------------------------------------------------------------------------------------------------------- DigitScenes


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """scikit-learn's 1,797 handwritten digits as crisp uint8 masks cut tightly to their ink, and what they are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = torch.from_numpy(digits.images).float()[:, None]  # (1797, 1, 8, 8)
    ink = torch.nn.functional.pad(ink / ink.amax(dim=(2, 3), keepdim=True), (1, 1, 1, 1))
    ink = torch.nn.functional.interpolate(ink, scale_factor=8, mode="bicubic", align_corners=False)
    masks = ((ink[:, 0] - 0.3) / 0.3).clamp(0, 1).mul(255).round().byte().numpy()  # (1797, 80, 80)
    cut = []
    for mask in masks:
        rows, columns = np.flatnonzero((mask > 127).any(axis=1)), np.flatnonzero((mask > 127).any(axis=0))
        cut.append(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return tuple(cut), digits.target.astype(np.int64)


def digit_sources(seed: int = 0, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Which of scikit-learn's digits train and test scenes may draw: two disjoint arrays of row numbers, 70 : 30."""
    if not 1 <= classes <= 10:
        raise ValueError(f"classes must be 1..10, the digits 0..classes-1, got {classes!r}")
    target = _digits()[1]
    order = rng_for(seed, "digits", "sources").permutation(len(target))
    cut = int(0.7 * len(target))
    return tuple(part[target[part] < classes] for part in (order[:cut], order[cut:]))


@dataclass(frozen=True, eq=False)
class Scene:
    """One DigitScene: pixels uint8 (3, H, W), boxes (k, 4) xyxy, classes (k,) 1..C, rows (k,) of the digits drawn."""

    pixels: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    sources: np.ndarray


def _stretched(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, ...) bilinearly enlarged to (height, width, ...), corners on corners."""
    for axis, side in ((0, height), (1, width)):
        at = np.linspace(0, grid.shape[axis] - 1, side)
        low = np.minimum(at.astype(np.int64), grid.shape[axis] - 2)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(grid.ndim)])
        grid = grid.take(low, axis) * (1 - part) + grid.take(low + 1, axis) * part
    return grid


def _canvas(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A background in [0, 1], (H, W, 3): a gradient, soft blotches, a fine grain and a slight tint."""
    level = rng.uniform(0.1, 0.9)
    slope = _stretched(rng.uniform(-0.12, 0.12, (2, 2, 1)), height, width)
    cells = int(rng.integers(3, 8))
    blotches = _stretched(rng.uniform(-0.1, 0.1, (cells, cells, 1)), height, width)
    grain = rng.uniform(-0.03, 0.03, (height, width, 1))
    return np.clip(level + rng.uniform(-0.06, 0.06, 3) + slope + blotches + grain, 0, 1)


_LUMINANCE = np.array([0.299, 0.587, 0.114])


def _ink_colour(rng: np.random.Generator, ground: float, min_contrast: float) -> np.ndarray:
    """A slightly tinted colour whose luminance differs from `ground` by at least `min_contrast`."""
    dark, light = max(0.0, ground - min_contrast), max(0.0, 1 - ground - min_contrast)  # room on either side
    at = rng.uniform(0, dark + light)
    luminance = at if at < dark else ground + min_contrast + (at - dark)
    tint = rng.uniform(-0.15, 0.15, 3)
    tint -= tint @ _LUMINANCE  # the tint has no luminance of its own
    room = [(luminance if t < 0 else 1 - luminance) / abs(t) for t in tint if t != 0]
    return luminance + tint * min([1.0, *room])


def digit_scene(
    rng: np.random.Generator,
    sources: np.ndarray,
    image_size: tuple[int, int] = (64, 64),
    digits_per_image: tuple[int, int] = (1, 4),
    digit_side: tuple[int, int] = (14, 28),
    min_contrast: float = 0.35,
    max_overlap: float = 0.1,
) -> Scene:
    """One scene: digits from the rows `sources` on a generated canvas.

    digits_per_image, digit_side: inclusive ranges, the side in pixels of a box' longer side. min_contrast: the least
    difference in luminance (0..1) between ink and the mean of what it is drawn on. max_overlap: the most of the smaller
    of two boxes that the other may cover; a digit that finds no such place in 30 tries is left out, the first never.
    """
    height, width = image_size
    masks, target = _digits()
    scene = _canvas(rng, height, width)
    boxes: list[tuple[int, int, int, int]] = []
    drawn: list[int] = []
    for _ in range(int(rng.integers(digits_per_image[0], digits_per_image[1] + 1))):
        row = int(sources[rng.integers(len(sources))])
        mask, side = masks[row], int(rng.integers(digit_side[0], digit_side[1] + 1))
        h, w = (max(3, round(side * s / max(mask.shape))) for s in mask.shape)
        place = None
        for _ in range(30):
            y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            covers = [
                max(0, min(x + w, b[2]) - max(x, b[0])) * max(0, min(y + h, b[3]) - max(y, b[1]))
                / min(w * h, (b[2] - b[0]) * (b[3] - b[1]))
                for b in boxes
            ]
            if max(covers, default=0) <= max_overlap:
                place = (x, y, x + w, y + h)
                break
        if place is None:
            continue
        x1, y1, x2, y2 = place
        alpha = np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.BILINEAR))[..., None] / 255.0
        under = scene[y1:y2, x1:x2]  # (h, w, 3)
        ink = _ink_colour(rng, float((under @ _LUMINANCE).mean()), min_contrast)
        scene[y1:y2, x1:x2] = under * (1 - alpha) + ink * alpha
        boxes.append(place)
        drawn.append(row)
    pixels = np.round(scene * 255).astype(np.uint8).transpose(2, 0, 1)
    rows = np.array(drawn)
    return Scene(np.ascontiguousarray(pixels), np.array(boxes, dtype=np.float32), target[rows] + 1, rows)


def digit_scenes(
    count_train: int,
    count_test: int,
    image_size: int | tuple[int, int] = (64, 64),
    seed: int = 0,
    digits_per_image: tuple[int, int] = (1, 4),
    digit_side: tuple[int, int] = (14, 28),
    min_contrast: float = 0.35,
    max_overlap: float = 0.1,
    classes: int = 10,
    min_object: float = 0,
) -> tuple[Dataset, Dataset]:
    """Train and test DigitScenes: scikit-learn's real handwritten digits on generated canvases, classes "0", "1", ...

    The two share no source digit (`digit_sources`). Scene k of a split has a generator of its own, so the first n
    scenes are the same whatever the counts. The other arguments are `digit_scene`'s.
    """
    size = _size_pair(image_size)
    low, high = digit_side
    if not 4 <= low <= high <= min(size):
        raise ValueError(
            f"digit_side must be a range inside 4..{min(size)} (the image's shorter side), got {digit_side}"
        )
    if not 1 <= digits_per_image[0] <= digits_per_image[1]:
        raise ValueError(f"digits_per_image must be a range from 1, got {digits_per_image}")
    if not 0 <= min_contrast < 0.5:
        raise ValueError(f"min_contrast must be in [0, 0.5), or mid-grey has no room for ink, got {min_contrast}")
    names = tuple(str(i) for i in range(classes))
    splits = []
    for split, count, sources in zip(
        ("train", "test"), (count_train, count_test), digit_sources(seed, classes), strict=True
    ):
        if count < 1:
            raise ValueError(f"data set 'digits' {split} is empty: {count} scenes asked for; at least one is needed")
        pixels = torch.empty(count, 3, *size, dtype=torch.uint8)
        scenes = []
        for k in range(count):
            rng = rng_for(seed, "digits", split, k)
            scene = digit_scene(rng, sources, size, digits_per_image, digit_side, min_contrast, max_overlap)
            pixels[k] = torch.from_numpy(scene.pixels)
            scenes.append(scene)
        boxes = boxes_of.pad_boxes([torch.from_numpy(s.boxes) for s in scenes])
        numbers = boxes_of.pad_boxes([torch.from_numpy(s.classes) for s in scenes])
        small = (torch.minimum(*(boxes[..., 2:] - boxes[..., :2]).unbind(-1)) < min_object) & (numbers > 0)
        labels = Labels(boxes, numbers, small, torch.zeros_like(small))
        ids = tuple(f"{split}-{k:05d}" for k in range(count))
        images = Images(ids, pixels, torch.tensor([size] * count))
        drops = {"too_small": int(small.sum())} if small.any() else {}
        splits.append(Dataset(f"digits {split}", images, labels, names, drops))
    return splits[0], splits[1]


# ------------------------------------------------------------------------------------------------------------ by name


def _parted(records: list[_Record], seed: int, source: Path) -> tuple[list[_Record], list[_Record]]:
    """80 : 20 by a named generator, at least one image in either; for sets that come without a split."""
    if len(records) < 2:
        raise ValueError(
            f"{source}: {len(records)} image(s) cannot be split into train and test; at least 2 are needed"
        )
    count = max(1, round(0.2 * len(records)))
    test = set(rng_for(seed, "split", "test").permutation(len(records))[:count].tolist())
    return [r for i, r in enumerate(records) if i not in test], [r for i, r in enumerate(records) if i in test]


_TRAIN, _VAL, _TEST = ("train", "training", "trainval"), ("val", "valid", "validation"), ("test", "testing")


def _split_of(words: Iterable[str]) -> str | None:
    for word in words:
        for split, names in (("train", _TRAIN), ("val", _VAL), ("test", _TEST)):
            if word.lower() in names:
                return split
    return None


def _sides(splits: Sequence[str | None], records: Sequence, seed: int, source: Path) -> tuple[list, list]:
    """Records by their splits: test is `test`, or `val` without one; train is the rest. Without splits, 80 : 20."""
    told = set(splits)
    judge = "test" if "test" in told else "val"
    if judge not in told or "train" not in told:
        return _parted(list(records), seed, source)
    if None in told:
        stray = records[list(splits).index(None)]
        raise ValueError(f"{source}: image {stray.id!r} lies in none of the folders train, val, test, but others do")
    pairs = list(zip(records, splits, strict=True))
    return [r for r, s in pairs if s != judge], [r for r, s in pairs if s == judge]


@dataclass(frozen=True)
class _Found:
    """Both sides of a set before any pixel is read."""

    train: list[_Record]
    test: list[_Record]
    class_names: tuple[str, ...] | None
    counts: dict[str, int] = field(default_factory=dict)


def _own_voc(root: Path, images: list[Path], xmls: list[Path], seed: int) -> _Found:
    framed = [p for p in images if "JPEGImages" in p.relative_to(root).parts]  # not the masks of a VOC devkit
    pictures, annotations = _by_key(framed or images, root), _by_key(xmls, root)
    for key, path in pictures.items():
        if key not in annotations:
            raise ValueError(
                f"image {path} has no annotation {key}.xml, but others have one; an image without objects needs an XML "
                "file without <object>"
            )
    for key, path in annotations.items():
        if key not in pictures:
            raise ValueError(f"annotation {path} has no image {key} with one of {', '.join(SUFFIXES)}")
    records = [_voc_record(key, pictures[key], annotations[key]) for key in pictures]
    names = _names_in(records)
    sets = {f.stem: f for f in _files(root, ".txt") if f.parts[-3:-1] == ("ImageSets", "Main")}
    judge = next((s for s in ("test", "val") if s in sets), None)
    learn = [s for s in (("trainval",) if "trainval" in sets and judge == "test" else ("train", "val")) if s in sets]
    learn = [s for s in learn if s != judge]
    if judge is None or not learn:
        return _Found(*_sides([_split_of(r.id.split("/")[:-1]) for r in records], records, seed, root), names)
    by_id = {r.id: r for r in records} | {r.id.split("/")[-1]: r for r in records}
    sides = []
    for listed in (learn, [judge]):
        side = []
        for split in listed:
            for i in _split_ids(sets[split]):
                if i not in by_id:
                    raise ValueError(f"split file {sets[split]} lists the image id {i!r}, but there is no such image")
                side.append(by_id[i])
        sides.append(side)
    unused = len(records) - len({r.id for side in sides for r in side})
    return _Found(sides[0], sides[1], names, {"in_no_split": unused})


def _own_coco(root: Path, images: list[Path], contents: dict[Path, dict], seed: int) -> _Found:
    if any(f.name.startswith("instances") for f in contents):  # beside captions and key points of the same images
        contents = {f: c for f, c in contents.items() if f.name.startswith("instances")}
    by_name: dict[str, list[Path]] = {}
    for path in images:
        by_name.setdefault(path.name, []).append(path)
    records: list[_Record] = []
    splits: list[str | None] = []
    names: tuple[str, ...] | None = None
    for file, content in contents.items():
        words = [
            w for part in file.relative_to(root).parts for w in part.replace(".", "_").replace("-", "_").split("_")
        ]
        split = _split_of(w.rstrip("0123456789") for w in reversed(words))
        if split is None and len(contents) > 1:
            listed = ", ".join(str(f.relative_to(root)) for f in contents)
            raise ValueError(
                f"{root} holds several COCO files ({listed}); each name must say train, val or test: {file}"
            )

        def find(name: str, file: Path = file, split: str | None = split) -> Path:
            found = by_name.get(Path(name).name, [])
            narrower = (
                lambda p: p.as_posix().endswith("/" + name),
                lambda p: file.parent in p.parents,
                lambda p: _split_of(p.relative_to(root).parts) == split,
            )
            for narrow in narrower:
                if len(found) > 1:
                    found = [p for p in found if narrow(p)] or found
            if len(found) > 1:
                raise ValueError(f"annotation {file}: image {name!r} could be {found[0]} or {found[1]}")
            return found[0] if found else file.parent / name

        read, told = _coco_records(file, content, find, "town")
        if names is not None and told != names:
            raise ValueError(f"annotation {file} has the categories {list(told)}, another file of {root} {list(names)}")
        names = told
        records += read
        splits += [split] * len(read)
    unused = len({p.resolve() for p in images} - {r.path.resolve() for r in records})
    return _Found(*_sides(splits, records, seed, root), names, {"not_in_json": unused})


def _own(root: Path, seed: int) -> _Found:
    """A folder of the user's own, its layout found out: KITTI, VOC XML, COCO JSON, YOLO txt, else images alone."""
    if (root / "training" / "label_2").is_dir():
        return _kitti(KITTI_CLASSES)(root, seed)
    images = _files(root, *SUFFIXES)
    xmls = _files(root, ".xml")
    keys = {_key(p, root) for p in images}
    if any(_key(p, root) in keys or p.parent.name == "Annotations" for p in xmls):
        return _own_voc(root, images, xmls, seed)
    contents = {file: _json(file) for file in _files(root, ".json")}
    contents = {f: c for f, c in contents.items() if isinstance(c, dict) and {"images", "annotations"} <= c.keys()}
    if contents:
        return _own_coco(root, images, contents, seed)
    if not images:
        raise ValueError(f"data set {str(root)!r} is empty: no {', '.join(SUFFIXES)} file in it")
    if any(_key(p, root) in keys for p in _files(root, ".txt")):
        records, names, bare = _yolo_records(root, None)
        splits = [_split_of(r.id.split("/")[:-1]) for r in records]
        return _Found(*_sides(splits, records, seed, root), names, {"no_label_file": bare})
    records = _folder_records(root)
    return _Found(*_sides([_split_of(r.id.split("/")[:-1]) for r in records], records, seed, root), None)


def _voc_set(*parts: tuple[str, str], test: tuple[str, str]) -> Callable[[Path, int], _Found]:
    def find(root: Path, seed: int) -> _Found:
        learn = [r for year, split in parts for r in _voc_records(root / "VOCdevkit" / year, split, None, True)]
        return _Found(learn, _voc_records(root / "VOCdevkit" / test[0], test[1], None, True), VOC_CLASSES)

    return find


def _bccd(root: Path, seed: int) -> _Found:
    folder = root / "BCCD"
    return _Found(
        _voc_records(folder, "trainval", None, False), _voc_records(folder, "test", None, False), BCCD_CLASSES
    )


def _neu(root: Path, seed: int) -> _Found:
    folder = root / "NEU-DET"
    return _Found(_voc_records(folder, "trainval", None, False), _voc_records(folder, "test", None, False), NEU_CLASSES)


def _carla(root: Path, seed: int) -> _Found:
    train, test = (_carla_records(root / "carla", (split,), None) for split in ("train", "test"))
    return _Found(train, test, CARLA_CLASSES)


def _carla_towns(root: Path, seed: int) -> _Found:
    records = _carla_records(root / "carla", ("train", "test"), None)
    train, test = [], []
    for town in sorted({r.group or "" for r in records}):
        learn, judge = _parted([r for r in records if r.group == town], seed, root / "carla")
        train, test = train + learn, test + judge
    return _Found(train, test, CARLA_CLASSES)


def _coco(root: Path, seed: int) -> _Found:
    sides, names = [], None
    for split in ("train2017", "val2017"):
        file = root / "coco" / "annotations" / f"instances_{split}.json"
        records, names = _coco_records(file, _json(file), lambda n, s=split: root / "coco" / s / n, None)
        sides.append(records)
    return _Found(sides[0], sides[1], names)


def _kitti(class_names: tuple[str, ...]) -> Callable[[Path, int], _Found]:
    def find(folder: Path, seed: int) -> _Found:
        records = {r.id: r for r in _kitti_records(folder, class_names)}
        train, validation = kitti_split(records)
        return _Found([records[i] for i in train], [records[i] for i in validation], class_names)

    return find


@dataclass(frozen=True)
class _Source:
    """A set known by name: the folders it needs below the data root, how to read it, and where it comes from.

    place: for a set that may lie in more than one way, (root, may it write) -> the folder that `find` reads.
    """

    folders: tuple[str, ...]
    find: Callable[[Path, int], _Found]
    origin: str
    download: str | None = None
    place: Callable[[Path, bool], Path] | None = None


_VOC_PAGE = "http://host.robots.ox.ac.uk/pascal/VOC/"
SOURCES: dict[str, _Source] = {
    "bccd": _Source(("BCCD",), _bccd, "https://github.com/Shenggan/BCCD_Dataset", "BCCD"),
    "carla": _Source(("carla",), _carla, "https://github.com/DanielHfnr/Carla-Object-Detection-Dataset", "carla"),
    "carla-towns": _Source(
        ("carla",), _carla_towns, "https://github.com/DanielHfnr/Carla-Object-Detection-Dataset", "carla"
    ),
    "neu-det": _Source(
        ("NEU-DET",), _neu, "https://github.com/siddhartamukherjee/NEU-DET-Steel-Surface-Defect-Detection"
    ),
    "voc07": _Source(
        ("VOCdevkit/VOC2007",), _voc_set(("VOC2007", "trainval"), test=("VOC2007", "test")), _VOC_PAGE + "voc2007"
    ),
    "voc12": _Source(
        ("VOCdevkit/VOC2012",), _voc_set(("VOC2012", "train"), test=("VOC2012", "val")), _VOC_PAGE + "voc2012"
    ),
    "voc0712": _Source(
        ("VOCdevkit/VOC2007", "VOCdevkit/VOC2012"),
        _voc_set(("VOC2007", "trainval"), ("VOC2012", "trainval"), test=("VOC2007", "test")),
        _VOC_PAGE,
    ),
    "coco": _Source(("coco",), _coco, "https://cocodataset.org/#download"),
    "kitti": _Source(("kitti",), _kitti(KITTI_CLASSES), _KITTI_PAGE, place=_kitti_folder),
    "kitti-2": _Source(("kitti",), _kitti(KITTI_TWO), _KITTI_PAGE, place=_kitti_folder),
}
NAMES = ("digits", *SOURCES)


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds the data sets: the argument, else $FEDAL_DATA, else `data`."""
    return Path(root or os.environ.get("FEDAL_DATA") or "data")


def checked_limit(limit: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """At most so many train and test images; ValueError below 1."""
    limit = limit or (None, None)
    if any(most is not None and most < 1 for most in limit):
        raise ValueError(f"limit must be at least 1 image or None, got {limit}")
    return limit


def within_limit(count: int, most: int | None, seed: int, split: str) -> np.ndarray:
    """Which of `count` images stay, in their order; nested: the 50 of a limit are among the 100 of another."""
    if most is None or most >= count:
        return np.arange(count)
    return np.sort(rng_for(seed, "limit", split).permutation(count)[:most])


def _found(name: str, root: Path, seed: int, fetch: bool) -> tuple[_Found, Path]:
    source = SOURCES.get(name)
    if source is None:
        folder = next((f for f in (Path(name), root / name) if f.is_dir()), None)
        if folder is None:
            raise ValueError(
                f"data set {name!r} is not known and no folder of that name exists here or in {root}; "
                f"allowed are {', '.join(NAMES)} or the path of a folder of images"
            )
        return _own(folder, seed), folder
    if source.place is not None:
        folder = source.place(root, fetch)
        return source.find(folder, seed), folder
    missing = [root / folder for folder in source.folders if not (root / folder).is_dir()]
    if missing and source.download and fetch:
        download.fetch(source.download, root)
    elif missing:
        raise ValueError(
            f"data set {name!r}: folder {missing[0]} does not exist; get it from {source.origin} and put it there, "
            "or point FEDAL_DATA to the folder that holds it"
        )
    return source.find(root, seed), root / source.folders[0]


def load(
    name: str,
    image_size: int | tuple[int, int],
    root: str | Path | None = None,
    min_object: float = 0,
    limit: tuple[int | None, int | None] | None = None,
    seed: int = 0,
    scenes: tuple[int, int] = (400, 200),
    digit_classes: int = 10,
    fetch: bool = True,
    max_bytes: int = MAX_BYTES,
    workers: int | None = None,
) -> tuple[Dataset, Dataset]:
    """Train and test of a data set by name (`NAMES`), or of a folder of the user's own.

    image_size: (height, width), or one side, that every image is letterboxed to. root: see `data_root`. min_object:
    objects whose shorter side, letterboxed, is below this many pixels become ignore. limit: at most so many train and
    test images, drawn by a named generator, nested (the first 50 are among the first 100), in the set's order. seed:
    also draws the digits and the 80 : 20 split of a folder that has none (it may have `ImageSets/Main/*.txt`, folders
    or COCO files named train, val, test); KITTI's split is fixed (`kitti_split`). scenes: DigitScenes in train and
    test, of the digits 0 to digit_classes - 1. fetch: download, or unpack, what is missing where that is possible. A
    set above `max_bytes` streams with `workers` processes.
    """
    limit = checked_limit(limit)
    if name == "digits":
        counts = [n if most is None else min(n, most) for n, most in zip(scenes, limit, strict=True)]
        size = _size_pair(image_size)
        side = tuple(round(side * min(size) / 64) for side in (14, 28))  # digits grow with the image
        return digit_scenes(
            *counts, image_size=size, seed=seed, digit_side=side, classes=digit_classes, min_object=min_object
        )
    found, source = _found(name, data_root(root), seed, fetch)
    shared = {r.id for r in found.train} & {r.id for r in found.test}
    if shared:
        raise ValueError(f"{source}: image id {min(shared)!r} is in train and in test")
    class_names = found.class_names
    sides = []
    label = name if name in SOURCES else source.name
    for split, records, most in zip(("train", "test"), (found.train, found.test), limit, strict=True):
        records = [records[i] for i in within_limit(len(records), most, seed, split)]
        counts = Counter(found.counts) if split == "train" else Counter()
        sides.append(
            _assemble(
                f"{label} {split}",
                records,
                class_names,
                image_size,
                source=source,
                min_object=min_object,
                max_bytes=max_bytes,
                workers=workers,
                counts=counts,
            )
        )
    return sides[0], sides[1]
