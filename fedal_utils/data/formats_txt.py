"""Labels as a txt file an image: YOLO's `class cx cy w h` in fractions of it, and KITTI's 2D objects, to read.

YOLO's data.yaml, classes.txt and *.names must agree; without any, classes are "0", "1", ... KITTI as in the code of
van Bommel (2021): corners cut to whole pixels, `DontCare` and other classes dropped and counted, empty images kept.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..seeding import rng_for
from .files import SUFFIXES, by_key, class_name, find_files, key_of, read_text, reading, write_text
from .formats import Object, Record, beside, settled, to_write

_LABEL_LINE = re.compile(r"^\s*[0-9]+(\s+[-+.0-9eE]+){4,}\s*$", re.MULTILINE)
MOST_CLASSES = 10_000
KITTI_CLASSES = ("Car", "Cyclist", "Misc", "Pedestrian", "Person_sitting", "Tram", "Truck", "Van")
KITTI_TWO = ("Car", "Pedestrian")
KITTI_SPLIT_SEED = 11111  # van Bommel 2021, released code


def _as_written(node: yaml.Node) -> Any:
    """YAML without types (`no` is a text, as is 010); ValueError for a key that stands twice."""
    if isinstance(node, yaml.MappingNode):
        found = {key.value: _as_written(value) for key, value in node.value}
        if len(found) < len(node.value):
            raise ValueError(f"a key stands twice: {[key.value for key, _ in node.value]}")
        return found
    return [_as_written(one) for one in node.value] if isinstance(node, yaml.SequenceNode) else node.value


def data_yamls(files: Sequence[Path]) -> dict[Path, dict]:
    """Contents of the set's YAML files: data.yaml, or others that name classes and where the images are."""
    found = {}
    for file in (f for f in files if f.suffix.lower() in (".yaml", ".yml")):
        text = read_text(file)
        if file.stem == "data" or "names" in text:
            with reading(f"{file} is not YAML", "plain YAML"):
                if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
                    raise ValueError("an alias stands in it; write it out")
                content = _as_written(yaml.compose(text) or yaml.ScalarNode("", ""))
            if isinstance(content, dict) and (file.stem == "data" or "names" in content):
                found[file] = content
    return {f: c for f, c in found.items() if f.stem == "data" or c.keys() & {"train", "val", "nc"}} or found


def yolo_names(files: Sequence[Path]) -> tuple[dict[int, str] | None, list[Path]]:
    """Class names by number, and the files that told them; None where no file does."""
    yamls = data_yamls(files)
    told: dict[Path, Any] = {file: content["names"] for file, content in yamls.items() if "names" in content}
    for file in (f for f in files if f.suffix == ".names" or f.name == "classes.txt"):
        told[file] = [line.strip() for line in read_text(file).rstrip().splitlines()]
    if not told and yamls:
        raise ValueError(f"{next(iter(yamls))} has no names, and there is no classes.txt: the classes are unknown")
    first: dict[int, str] | None = None
    for file, content in told.items():
        with reading(str(file), "a list of unique names, or a mapping of whole numbers to them, nc as many"):
            if isinstance(content, list):
                content = {str(i): name for i, name in enumerate(content)}
            names = {int(key): content[key] for key in sorted(content, key=int)}
            count = yamls.get(file, {}).get("nc", str(len(names)))
            if set(map(str, names)) != content.keys():
                raise ValueError(f"names has the keys {list(content)}")
            if not names or len(set(map(class_name, names.values()))) != len(names) or count != str(len(names)):
                raise ValueError(f"there are {len(names)} names, nc is {count}; no class name stands twice: {names}")
        first = first or names
        if names != first:
            raise ValueError(f"{file} names the classes {names}, but {next(iter(told))} {first}; they must agree")
    return first, list(told)


def _lines(file: Path) -> list[tuple[int, str]]:
    return [(i, line) for i, line in enumerate(read_text(file).splitlines(), start=1) if line.strip()]


def yolo_objects(file: Path, names: Mapping[int, str] | None) -> tuple[Object, ...]:
    """The objects of one file, boxes in exact fractions of the image."""
    objects = []
    allowed = f"0 to {MOST_CLASSES - 1}" if names is None else ", ".join(f"{n} ({name})" for n, name in names.items())
    for i, line in _lines(file):
        with reading(f"{file}: line {i} is {line[:200]!r}", f"`class cx cy w h`, the class one of {allowed}"):
            number, *fields = line.split()
            cx, cy, w, h = map(Decimal, fields)
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            if "_" in line or not re.fullmatch(r"[0-9]{1,9}", number) or not all(abs(v) < 10**6 for v in box):
                raise ValueError("not a whole number and four fractions")
            if names is None and int(number) >= MOST_CLASSES:
                raise ValueError(f"the class is {number}")
            objects.append(Object(str(int(number)) if names is None else names[int(number)], box))
    return tuple(objects)


def yolo_records(
    root: Path, files: Sequence[Path], names: Mapping[int, str] | None
) -> tuple[list[Record], tuple[str, ...]]:
    """A record an image, with objects None where there is no file of labels, and the class names."""
    images = by_key((f for f in files if f.suffix.lower() in SUFFIXES), root)
    labels = {key_of(f, root): f for f in files if f.suffix.lower() == ".txt"}
    for key, file in labels.items():
        if key not in images and _LABEL_LINE.search(read_text(file)):
            raise ValueError(f"{file} belongs to no image: there is no {key} with one of {', '.join(SUFFIXES)}")
    records = []
    for key, image in images.items():
        objects = yolo_objects(labels[key], names) if key in labels else None
        records.append(Record(key, image, None, objects, source=labels.get(key, image), fractions=True))
    if names is None:
        most = max((int(thing.name) for record in records for thing in record.objects or ()), default=-1)
        return records, tuple(map(str, range(most + 1)))
    return records, tuple(names.values())


def read_yolo(folder: str | Path) -> list[Record]:
    """A folder of YOLO txt labels beside their images, or in `labels` for `images`; images/train/a.jpg is 'train/a'."""
    files = find_files(folder)
    return [settled(record) for record in yolo_records(Path(folder), files, yolo_names(files)[0])[0]]


def write_yolo(folder: str | Path, records: Iterable[Record], classes: Sequence[str]) -> Path:
    """`labels/<image>.txt` and `data.yaml`; the images belong into `images`. Beside them the same corners are read."""
    folder, records = Path(folder), to_write(records, classes, "YOLO txt")
    for record, name in zip(records, beside(folder / "labels", records, ".txt"), strict=True):
        (height, width), lines = record.size, []
        for thing in record.objects:
            x1, y1, x2, y2 = map(Decimal, thing.box)
            fractions = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            words = [str(list(classes).index(thing.name)), *(f"{v.normalize():f}" for v in fractions)]
            lines.append(" ".join(words) + "\n")
        write_text(name, "".join(lines))
    content = {"train": "images", "val": "images", "nc": len(classes), "names": list(classes)}
    write_text(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1 << 30))
    return folder


def kitti_split(ids: Iterable[str]) -> tuple[list[str], list[str]]:
    """70 % train and 30 % validation ids, each sorted, the same for all class sets (van Bommel 2021).

    Seed and sizes (5,237 and 2,244 of 7,481) are the released code's, the generator is not. Validation is test too.
    """
    ids = sorted(ids)
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} image(s) cannot be split into train and validation; at least 2 are needed")
    count = max(1, int(0.3 * len(ids)))
    held = set(rng_for(KITTI_SPLIT_SEED, "kitti", "validation").permutation(len(ids))[:count].tolist())
    return [i for n, i in enumerate(ids) if n not in held], [i for n, i in enumerate(ids) if n in held]


def kitti_records(folder: Path, class_names: Sequence[str] = KITTI_CLASSES) -> list[Record]:
    """The images of a folder that holds `training`, `image_2` and `label_2` in it, sorted by id."""
    pictures, labels = folder / "training" / "image_2", folder / "training" / "label_2"
    images, texts = by_key(find_files(pictures, *SUFFIXES), pictures), by_key(find_files(labels, ".txt"), labels)
    known, records = (*KITTI_CLASSES, "DontCare"), []
    needed = f"one of {', '.join(known)}, then 14 finite numbers, or 15 with a score"
    for key in sorted(images.keys() | texts.keys()):
        file, objects, left_out = labels / f"{key}.txt", [], Counter()
        for number, line in _lines(file):
            with reading(f"{file}: line {number} is {line[:200]!r}", needed):
                name, *fields = line.split()
                values = np.array(fields, dtype=float)
                if name not in known or len(values) not in (14, 15) or not np.isfinite(values).all():
                    raise ValueError(f"type {name!r} and {len(values)} numbers")
            if name in class_names:
                objects.append(Object(name, tuple(float(int(v)) for v in values[3:7])))
            else:
                left_out["dont_care" if name == "DontCare" else "other_class"] += 1
        image = images.get(key, pictures / f"{key}.png")
        records.append(Record(key, image, None, tuple(objects), source=file, drops=left_out))
    return records
