"""KITTI's 2D objects: `training/image_2/*.png` and `training/label_2/*.txt`, as torchvision's `Kitti` has them.

As in the released code of van Bommel (2021), corners are cut to whole pixels, and `DontCare` regions and other classes
are dropped (and counted here); an image that keeps none stays as a negative.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..seeding import rng_for
from .files import images_in, read_text, reading
from .formats import Object, Record

KITTI_CLASSES = ("Car", "Cyclist", "Misc", "Pedestrian", "Person_sitting", "Tram", "Truck", "Van")
KITTI_TWO = ("Car", "Pedestrian")
KITTI_SPLIT_SEED = 11111  # van Bommel 2021, released code
_LINE = f"one of {', '.join(KITTI_CLASSES)}, DontCare, then 14 finite numbers, or 15 with a score"


def kitti_split(ids: Iterable[str]) -> tuple[list[str], list[str]]:
    """70 % train and 30 % validation ids, each sorted, the same for all class sets (van Bommel 2021).

    Seed and sizes (5,237 and 2,244 of 7,481) are those of the released code, the lists are not: its generator is
    another one. The paper's validation part is its test set too.
    """
    ids = sorted(ids)
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} image(s) cannot be split into train and validation; at least 2 are needed")
    count = max(1, int(0.3 * len(ids)))
    held = set(rng_for(KITTI_SPLIT_SEED, "kitti", "validation").permutation(len(ids))[:count].tolist())
    return [i for n, i in enumerate(ids) if n not in held], [i for n, i in enumerate(ids) if n in held]


def _kitti_record(key: str, image: Path, file: Path, class_names: Sequence[str]) -> Record:
    objects, left_out = [], Counter()
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        with reading(f"{file}: line {number} is {line[:200]!r}", _LINE):
            name, *fields = line.split()
            values = [float(text) for text in fields]
            if name not in (*KITTI_CLASSES, "DontCare") or len(values) not in (14, 15) or not np.isfinite(values).all():
                raise ValueError(f"type {name!r} and {len(values)} numbers")
        if name in class_names:
            objects.append(Object(name, tuple(float(int(v)) for v in values[3:7])))
        else:
            left_out["dont_care" if name == "DontCare" else "other_class"] += 1
    return Record(key, image, None, tuple(objects), source=file, drops=left_out)


def kitti_records(folder: Path, class_names: Sequence[str] = KITTI_CLASSES) -> list[Record]:
    """The images of a folder that holds `training`, sorted by id."""
    pictures, labels = folder / "training" / "image_2", folder / "training" / "label_2"
    if not labels.is_dir():
        raise ValueError(f"folder {labels} does not exist; it should hold one txt file an image, empty without objects")
    images = images_in(pictures)
    keys = sorted(images.keys() | {p.stem for p in labels.glob("*.txt") if not p.name.startswith(".")})
    return [_kitti_record(i, images.get(i, pictures / f"{i}.png"), labels / f"{i}.txt", class_names) for i in keys]
