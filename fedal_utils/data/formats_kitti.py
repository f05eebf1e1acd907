"""KITTI's 2D objects: `training/image_2/*.png` and `training/label_2/*.txt`, as torchvision's `Kitti` has them.

Only the class and the box of a line are read. Corners are cut to whole pixels, as the released code of van Bommel
(2021) does; `DontCare` regions and other classes are dropped and counted, as there; an image that keeps none stays as a
negative.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..seeding import rng_for
from .files import images_in, read_text
from .formats import Object, Record

KITTI_CLASSES = ("Car", "Cyclist", "Misc", "Pedestrian", "Person_sitting", "Tram", "Truck", "Van")
KITTI_TWO = ("Car", "Pedestrian")
KITTI_SPLIT_SEED = 11111  # van Bommel 2021, released code


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


def _box(fields: Sequence[str], where: str) -> tuple[float, ...]:
    try:
        values = [float(text) for text in fields[1:]]
        if "_" in "".join(fields[1:]) or not all(map(math.isfinite, values)):
            raise ValueError
    except ValueError:
        raise ValueError(f"{where} has {fields[1:]} after the type; allowed are finite numbers") from None
    return tuple(float(int(v)) for v in values[3:7])


def kitti_objects(file: Path, class_names: Sequence[str]) -> tuple[tuple[Object, ...], Counter]:
    """The objects of one label file and how many were left out, by reason."""
    if not file.exists():
        raise ValueError(f"annotation {file} does not exist; an image without objects needs an empty file")
    known, objects, left_out = (*KITTI_CLASSES, "DontCare"), [], Counter()
    for i, line in enumerate(read_text(file).splitlines(), start=1):
        fields, where = line.split(), f"{file}: line {i}"
        if not fields:
            continue
        if len(fields) not in (15, 16):
            raise ValueError(
                f"{where} has {len(fields)} fields: {line[:200]!r}; allowed are 15, or 16 with a score: type, "
                "truncated, occluded, alpha, left, top, right, bottom, 3 dimensions, 3 coordinates, rotation"
            )
        if fields[0] not in known:
            raise ValueError(f"{where} has the type {fields[0]!r}; allowed are {', '.join(known)}")
        box = _box(fields, where)
        if fields[0] in class_names:
            objects.append(Object(fields[0], box))
        else:
            left_out["dont_care" if fields[0] == "DontCare" else "other_class"] += 1
    return tuple(objects), left_out


def kitti_records(folder: Path, class_names: Sequence[str] = KITTI_CLASSES) -> list[Record]:
    """The images of a folder that holds `training`, sorted by id."""
    images, labels = images_in(folder / "training" / "image_2"), folder / "training" / "label_2"
    if not labels.is_dir():
        raise ValueError(f"folder {labels} does not exist; it should hold one txt file an image")
    records = []
    for i in sorted(images.keys() | {p.stem for p in labels.glob("*.txt") if not p.name.startswith(".")}):
        objects, left_out = kitti_objects(labels / f"{i}.txt", class_names)
        image = images.get(i, folder / "training" / "image_2" / f"{i}.png")
        records.append(Record(i, image, None, objects, source=labels / f"{i}.txt", drops=left_out))
    return records
