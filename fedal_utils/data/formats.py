"""What all formats share: the record, files found and read safely, boxes settled in their image, a Dataset made of it.

What a reader does with imperfect input, the same for every format:

* kept as *ignore* and counted: VOC `difficult`, COCO `iscrowd`, objects whose shorter side is below `min_object`;
* changed and counted: a box partly outside its image is clipped; a box of the stored image is turned with it;
* dropped and counted: a box without area;
* a ValueError that names file and entry: a missing, truncated, 16-bit or huge image, an unreadable annotation, an image
  size that is not the annotated one, a box wholly outside its image, inverted or not finite, an unknown class, a
  duplicate id, a path that leaves the set's folder, an empty set.

An annotation that lists no object is no error: the image is a negative. An image without an annotation is none.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .boxes import letterbox_boxes, pad_boxes
from .files import class_name, key_of, relative
from .pixels import SUFFIXES, ImageInfo, image_info, in_order, read_all, size_pair, threads_for, turned_box
from .types import Dataset, Images, Labels, Reading, StreamedImages

MAX_BYTES = 8 << 30  # of a set's pixels; larger sets stream


@dataclass(frozen=True)
class Object:
    """An annotated object: its class and its xyxy box in pixels of the original upright image, far edge excluded."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool = False
    crowd: bool = False


@dataclass(frozen=True)
class Record:
    """An image as its annotation tells it: what readers return and writers take.

    id: a relative path with '/'. file: the image, if known. size: (height, width), if known. objects: () is an image
    without objects, None one that nobody has labelled. label: the class of a whole image. group: day, town, camera.
    source: the file to name in an error. fractions: boxes are in parts of the image. drops: left out, by reason.
    """

    id: str
    file: Path | None = None
    size: tuple[int, int] | None = None
    objects: tuple[Object, ...] | None = None
    label: str | None = None
    group: str | None = None
    source: str | Path = field(default="", compare=False)
    fractions: bool = field(default=False, compare=False)
    drops: Mapping[str, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class How:
    """How a set is read: may it be downloaded; above how many bytes it streams; threads; are unlabelled images kept."""

    fetch: bool = True
    max_bytes: int = MAX_BYTES
    workers: int | None = None
    unlabelled: bool = False


# ---------------------------------------------------------------------------------------- boxes inside their image


def settled(record: Record, info: ImageInfo | None = None) -> Record:
    """The record with the size of its upright image and its boxes in pixels inside it; `drops` counts what was done.

    info: what the image file says, None where there is none. An annotated size that is that of the stored image (before
    EXIF turns it) says that the boxes are, too, and they are turned along. Any other size is an error.
    """
    size, orientation = record.size, 1
    if info is not None and size not in (None, info.size):
        if info.orientation < 5 or size != info.size[::-1]:
            raise ValueError(
                f"image {info.path} is {info.size[0]} x {info.size[1]} (height x width), but its annotation "
                f"{record.source} says {size[0]} x {size[1]}; they must agree"
            )
        orientation = info.orientation
    size = info.size if info is not None else size
    if size is None and record.objects:
        raise ValueError(f"{record.source}: image {record.id!r} has no size, and there is no file of it")
    drops, objects = Counter(record.drops), []
    for thing in record.objects or ():
        box = _inside(record, thing, size if orientation == 1 else size[::-1], drops)
        if box is not None:
            objects.append(replace(thing, box=turned_box(box, orientation, size)))
    if orientation > 1:
        drops["turned"] += len(objects)
    kept = None if record.objects is None else tuple(objects)
    return replace(record, size=size, objects=kept, fractions=False, drops=dict(drops))


def with_image(record: Record) -> Record:
    """`settled` for labels alone: the image's file may be missing where the annotation tells its size."""
    if record.file is not None and record.file.is_file():
        return settled(record, image_info(record.file))
    return settled(replace(record, file=None))


def _inside(record: Record, thing: Object, size: tuple[int, int], drops: Counter) -> tuple[float, ...] | None:
    """The object's box in pixels inside its image, None if it has no area."""
    height, width = size
    sides = (width, height) * 2 if record.fractions else (1, 1, 1, 1)
    box = x1, y1, x2, y2 = tuple(float(round(v * side, 20)) for v, side in zip(thing.box, sides, strict=True))
    where = (
        f"{record.source}: image {record.id!r}, class {thing.name!r}, box {[round(v, 3) for v in box]} (xyxy pixels)"
    )
    if not all(math.isfinite(v) for v in box):
        raise ValueError(f"{where} has a coordinate that is not finite")
    if x2 < x1 or y2 < y1:
        raise ValueError(f"{where} is inverted; allowed are x1 <= x2 and y1 <= y2")
    if x1 == x2 or y1 == y2:
        drops["zero_area"] += 1
        return None
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        raise ValueError(f"{where} lies outside its image, which spans x 0..{width}, y 0..{height}")
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if any(abs(a - b) > 1e-6 * max(width, height) for a, b in zip(inside, box, strict=True)):
        drops["clipped"] += 1
    return inside


def names_in(records: Iterable[Record]) -> tuple[str, ...]:
    """The classes of all objects, sorted."""
    return tuple(sorted({thing.name for record in records for thing in record.objects or ()}))


def unique(records: Sequence[Record]) -> list[Record]:
    """The records; ValueError if two have one id."""
    seen: dict[str, Record] = {}
    for record in records:
        if record.id in seen:
            first = seen[record.id].source
            raise ValueError(f"{record.source}: image id {record.id!r} occurs more than once, first in {first}")
        seen[record.id] = record
    return list(records)


# ------------------------------------------------------------------------------------------------- before writing


def to_write(
    records: Iterable[Record], classes: Sequence[str], what: str, difficult: bool = True, crowd: bool = True
) -> list[Record]:
    """The records; ValueError for the first that the format `what` could not give back as it is.

    difficult, crowd: has the format a place for such objects?
    """
    records = unique(list(records))
    if not records:
        raise ValueError(f"nothing to write as {what}: the list of records is empty")
    for name in classes:
        class_name(name, what)
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"{what} needs one or more classes, each once, got {list(classes)}")
    for record in records:
        where = f"image {record.id!r}"
        if relative(record.id, what) != record.id or record.objects is None or record.size is None:
            raise ValueError(f"{where} cannot be written as {what}: needed are an id with '/', objects and a size")
        height, width = record.size
        for thing in record.objects:
            x1, y1, x2, y2 = thing.box
            if thing.name not in classes:
                raise ValueError(f"{where} has a box of class {thing.name!r}; allowed are {list(classes)}")
            if (thing.difficult and not difficult) or (thing.crowd and not crowd):
                raise ValueError(f"{where} has a difficult or crowd object; {what} cannot hold it: use COCO or CSV")
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):  # False for nan as well
                raise ValueError(f"{where} has the box {thing.box}; needed is 0 <= x1 < x2 <= {width} and so on in y")
    return records


def beside(folder: Path, records: Sequence[Record], suffix: str) -> list[Path]:
    """For each record the path of its annotation below `folder`, which must be new; ValueError where two share one."""
    if folder.exists():
        raise ValueError(f"{folder} is there already; give a folder without it, so that nothing is overwritten")
    paths: dict[str, Path] = {}
    for record in records:
        stem, ending = os.path.splitext(record.id)
        path = folder / f"{stem if ending.lower() in SUFFIXES else record.id}{suffix}"
        if paths.setdefault(key_of(path, folder).lower(), path) is not path:
            raise ValueError(f"image {record.id!r} would share its annotation {path} with another one")
    return list(paths.values())


# -------------------------------------------------------------------------------------------------------- a Dataset


def _labels_of(
    records: Sequence[Record], class_names: Sequence[str], image_size: tuple[int, int], min_object: float, drops: dict
) -> Labels:
    number = {name: i + 1 for i, name in enumerate(class_names)}
    for record in records:
        for thing in record.objects or ():
            if thing.name not in number:
                raise ValueError(
                    f"{record.source}: image {record.id!r} has an object of class {thing.name!r}; "
                    f"allowed are {list(class_names)}"
                )
    objects = [record.objects or () for record in records]
    longest = max(1, max(len(things) for things in objects))  # one padding row, so that reductions over K are defined

    def padded(value, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(len(records), longest, dtype=dtype)
        for i, things in enumerate(objects):
            out[i, : len(things)] = torch.tensor([value(thing) for thing in things], dtype=dtype)
        return out  # (N, K)

    classes = padded(lambda thing: number[thing.name], torch.int64)
    difficult, crowd = padded(lambda thing: thing.difficult, torch.bool), padded(lambda thing: thing.crowd, torch.bool)
    rows = [torch.tensor([thing.box for thing in things], dtype=torch.float64).reshape(-1, 4) for things in objects]
    boxes = pad_boxes([*rows, torch.zeros(longest, 4, dtype=torch.float64)])[:-1]
    sizes = torch.tensor([record.size for record in records])
    boxes = letterbox_boxes(boxes, sizes, image_size) * (classes > 0)[..., None]
    small = (torch.minimum(*(boxes[..., 2:] - boxes[..., :2]).unbind(-1)) < min_object) & (classes > 0)
    small &= ~(difficult | crowd)  # each ignored object is counted once
    for reason, mask in (("difficult", difficult & ~crowd), ("crowd", crowd), ("too_small", small)):
        drops[reason] += int(mask.sum())
    return Labels(boxes.float(), classes, difficult | crowd | small, crowd)


def assemble(
    name: str,
    records: Sequence[Record],
    image_size: int | Sequence[int],
    class_names: Sequence[str] | None = None,
    min_object: float = 0,
    how: How | None = None,
    drops: Mapping[str, int] | None = None,
    reading: Reading | None = None,
) -> Dataset:
    """The Dataset of these records: annotations are checked first, then pixels are read.

    name: what it is called. image_size: (height, width), or one side, that images are letterboxed to.
    class_names: default: those of the objects, sorted. min_object: a box with a shorter side (letterboxed) is ignore.
    how: streaming and threads. drops: what was left out before, by reason. reading: how the records were read.
    """
    if not records:
        raise ValueError(f"data set {name!r} is empty: no image was found; at least one is needed")
    for record in records:
        if record.file is None:
            raise ValueError(f"{record.source}: image {record.id!r} of {name!r} does not exist")
    how, image_size, counts = how or How(), size_pair(image_size), Counter(drops)
    threads = threads_for(how.workers)
    infos = list(in_order(lambda record: image_info(record.file), unique(records), threads))
    records = [settled(record, info) for record, info in zip(records, infos, strict=True)]
    for record in records:
        counts.update(record.drops)
    labelled = torch.tensor([record.objects is not None for record in records])
    labels = None
    if labelled.any():
        class_names = class_names or names_in(records)
        if not class_names:
            raise ValueError(f"{records[0].source}: no object in any annotation of {name!r}; give class_names")
        labels = _labels_of(records, class_names, image_size, min_object, counts)
    ids = tuple(record.id for record in records)
    groups = tuple(record.group for record in records)
    groups = None if None in groups else groups
    sizes = torch.tensor([info.size for info in infos], dtype=torch.int64)
    if len(records) * 3 * image_size[0] * image_size[1] > how.max_bytes:
        images = StreamedImages(ids, tuple(infos), sizes, image_size, groups, threads)
    else:
        images = Images(ids, read_all(infos, image_size, threads), sizes, groups)
    kept = {reason: n for reason, n in counts.items() if n}
    partly = None if labels is None or labelled.all() else labelled
    return Dataset(name, images, labels, tuple(class_names or ()), kept, partly, reading or Reading())
