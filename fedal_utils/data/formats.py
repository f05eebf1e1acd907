"""What all formats share: the record, boxes settled in their image, and `assemble`, which makes a Dataset of records.

Ignored and counted: VOC `difficult`, COCO `iscrowd`, objects smaller than `min_object`. Changed and counted: a box
partly outside its image is clipped, one without area dropped. All else is a ValueError that names file and entry.
"""

import math
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from .files import SUFFIXES, in_order, letterbox_boxes, read_all, relative, size_pair, upright_size, write_text
from .types import Dataset, Images, Labels, Reading

COLUMNS = ("image", "class", "x1", "y1", "x2", "y2", "height", "width", "difficult", "crowd")


@dataclass(frozen=True)
class Object:
    """An annotated object: its class and its xyxy box in pixels of the original upright image, far edge excluded."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool = False
    crowd: bool = False


@dataclass(frozen=True)
class Record:
    """An image as its annotation tells it: what readers return and writers take."""

    id: str  # a relative path with '/'
    file: Path | zipfile.Path | np.ndarray | None = None  # or the pixels, (H, W, 3) or (H, W)
    size: tuple[int, int] | None = None  # height, width
    objects: tuple[Object, ...] | None = None  # (): an image without objects, None: nobody has labelled it
    label: str | None = None  # the class of a whole image
    group: str | None = None  # day, town, camera
    source: str | Path = field(default="", compare=False)  # to name in an error
    fractions: bool = field(default=False, compare=False)  # are boxes in parts of the image?
    drops: Mapping[str, int] = field(default_factory=dict, compare=False)  # left out, by reason


def settled(record: Record) -> Record:
    """The record with the size of its upright image and its boxes in pixels inside it; `drops` counts what was done."""
    file = record.file if record.file is not None and record.file.is_file() else None
    size = upright_size(file) if file else record.size
    if record.size not in (None, size) or (size is None and record.objects):
        told = f"the size {record.size} (height, width) there, but its file {record.file} is {size or 'missing'}"
        raise ValueError(f"{record.source}: image {record.id!r} has {told}, upright")
    drops, kept = Counter(record.drops), []
    for thing in record.objects or ():
        height, width = size
        sides = (width, height) * 2 if record.fractions else (1, 1, 1, 1)
        box = x1, y1, x2, y2 = tuple(float(round(v * side, 20)) for v, side in zip(thing.box, sides, strict=True))
        if not (x1 <= x2 and y1 <= y2 and x2 > 0 and y2 > 0 and x1 < width and y1 < height and max(x2, y2) < math.inf):
            told = f"{record.source}: image {record.id!r} of {width} x {height}, class {thing.name!r}, box {box}"
            raise ValueError(f"{told} (xyxy pixels) is inverted, not finite or lies outside its image")
        if x1 == x2 or y1 == y2:
            drops["zero_area"] += 1
            continue
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        drops["clipped"] += any(abs(a - b) > 1e-6 * max(width, height) for a, b in zip(inside, box, strict=True))
        kept.append(replace(thing, box=inside))
    objects = None if record.objects is None else tuple(kept)
    return replace(record, file=file, size=size, objects=objects, fractions=False, drops=dict(drops))


def unique(records: Iterable[Record]) -> list[Record]:
    """The records; ValueError if two have one id."""
    seen: dict[str, Record] = {}
    for record in records:
        if record.id in seen:
            first = seen[record.id].source
            raise ValueError(f"{record.source}: image id {record.id!r} occurs more than once, first in {first}")
        seen[record.id] = record
    return list(seen.values())


def to_write(records: Iterable[Record], classes: Sequence[str], what: str, flags: Sequence[str] = ()) -> list[Record]:
    """The records; ValueError for one without size or boxes, of other classes, or with a flag not among `flags`."""
    records = unique(records)
    for record in records:
        if relative(record.id) != record.id or record.objects is None or record.size is None:
            raise ValueError(f"image {record.id!r} cannot be written as {what}: it has no boxes or no size")
        for thing in record.objects:
            odd = [flag for flag in ("difficult", "crowd") if getattr(thing, flag) and flag not in flags]
            if odd or thing.name not in classes:
                told = f"image {record.id!r} has a box of class {thing.name!r} {' '.join(odd)}"
                raise ValueError(f"{told}; {what} holds the classes {list(classes)} and of flags {list(flags)}")
    return records


def beside(folder: Path, records: Sequence[Record], suffix: str) -> list[Path]:
    """For each record the path of its annotation below `folder`, which must be new; ValueError where two share one."""
    if folder.exists():
        raise ValueError(f"{folder} is there already; give a folder without it, so that nothing is overwritten")
    ids = (PurePosixPath(record.id) for record in records)
    paths = [folder / f"{i.with_suffix('') if i.suffix.lower() in SUFFIXES else i}{suffix}" for i in ids]
    if shared := [path for path, n in Counter(str(path).lower() for path in paths).items() if n > 1]:
        raise ValueError(f"two images would share the annotation {shared[0]}; rename one of them")
    return paths


def write_csv(path: str | Path, records: Iterable[Record]) -> Path:
    """A row a box; an image without boxes is a row without class, the class of a whole image one without a box."""
    rows = []
    for record in unique(records):
        size = record.size or ("", "")
        if not record.objects:
            rows.append((record.id, record.label or "", "", "", "", "", *size, "", ""))
        for thing in record.objects or ():
            rows.append((record.id, thing.name, *map(float, thing.box), *size, int(thing.difficult), int(thing.crowd)))
    return write_text(path, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False, lineterminator="\n"))


def _labels(
    records: Sequence[Record],
    class_names: Sequence[str],
    image_size: tuple[int, int],
    min_object: float,
    drops: Counter,
) -> Labels:
    number = {name: i + 1 for i, name in enumerate(class_names)}
    for record in records:
        if odd := {thing.name for thing in record.objects or ()} - number.keys():
            raise ValueError(f"{record.source}: {record.id!r} has the classes {odd}; allowed are {list(class_names)}")
    rows = [[(number[t.name], t.difficult, t.crowd, *t.box) for t in record.objects or ()] for record in records]
    tensors = [torch.tensor(row, dtype=torch.float64).reshape(-1, 7) for row in [*rows, [[0.0] * 7]]]  # K is at least 1
    classes, difficult, crowd, boxes = pad_sequence(tensors, batch_first=True)[:-1].split([1, 1, 1, 4], dim=-1)
    classes, difficult, crowd = classes[..., 0].long(), difficult[..., 0] > 0, crowd[..., 0] > 0  # (N, K)
    sizes = torch.tensor([record.size for record in records])
    boxes = letterbox_boxes(boxes, sizes, image_size) * (classes > 0)[..., None]
    small = ((boxes[..., 2:] - boxes[..., :2]).amin(dim=-1) < min_object) & (classes > 0)
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
    drops: Mapping[str, int] | None = None,
    reading: Reading | None = None,
) -> Dataset:
    """The Dataset of these records, at least one: all annotations are checked before pixels are read.

    image_size: (height, width), or one side, that images are letterboxed to. class_names: by default sorted.
    min_object: a box with a shorter side (letterboxed) is ignore. drops: what was left out before, by reason.
    reading: how the records were read. The label of a whole image is one object as large as the canvas.
    """
    if not records:
        raise ValueError(f"data set {name!r} is empty: no image was found; at least one is needed")
    height, width = image_size = size_pair(image_size)
    records, counts = in_order(lambda r: settled(r) if r.label is None else r, unique(records)), Counter(drops)
    for i, record in enumerate(records):
        if record.label is not None:
            whole = Object(record.label, (0, 0, width, height))
            records[i] = record = replace(record, size=image_size, objects=(whole,))
        if record.file is None:
            raise ValueError(f"{record.source}: image {record.id!r} of {name!r} does not exist")
        counts.update(record.drops)
    labelled, labels = torch.tensor([record.objects is not None for record in records]), None
    if labelled.any():
        class_names = class_names or sorted({thing.name for record in records for thing in record.objects or ()})
        if not class_names:
            raise ValueError(f"{records[0].source}: no object in any annotation of {name!r}; give class_names")
        labels = _labels(records, class_names, image_size, min_object, counts)
    ids, files, groups = (tuple(getattr(record, what) for record in records) for what in ("id", "file", "group"))
    images = Images(ids, *read_all(files, image_size), None if None in groups else groups)
    kept = {reason: n for reason, n in counts.items() if n}
    partly = None if labels is None or labelled.all() else labelled
    return Dataset(name, images, labels, tuple(class_names or ()), kept, partly, reading or Reading())
