"""YOLO: a txt file an image, lines `class cx cy w h` in fractions of it, and files that name the classes.

Names come from data.yaml (`names`, a list or a mapping by number), classes.txt and *.names, as they are written there;
files that disagree are an error. Without any, classes are "0", "1", ... An image without a txt file is an image without
objects, as YOLO has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from .files import by_key, class_name, find_files, key_of, read_text, write_text
from .formats import Object, Record, beside, to_write, with_image
from .pixels import SUFFIXES

_LABEL_LINE = re.compile(r"^\s*[0-9]+(\s+[-+.0-9eE]+){4,}\s*$", re.MULTILINE)
MOST_CLASSES = 10_000


class _AsWritten(yaml.BaseLoader):
    """YAML without types (`no` is a text, as is 010), aliases or keys that stand twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias stands in line {self.peek_event().start_mark.line + 1}; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        found: dict[str, Any] = {}
        for key, value in node.value:
            if key.value in found or not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"the key {key.value!r} stands twice or is no text")
            found[key.value] = self.construct_object(value, deep=True)
        return found


def read_yaml(file: Path) -> Any:
    """The content of a YAML file, every value a text; ValueError that names the file."""
    try:
        return yaml.load(read_text(file), Loader=_AsWritten)  # noqa: S506 (BaseLoader makes texts only)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from None


def data_yamls(files: Sequence[Path]) -> dict[Path, dict]:
    """Contents of the set's YAML files: data.yaml, or others that name classes and where the images are."""
    found = {}
    for file in files:
        if file.suffix.lower() in (".yaml", ".yml") and (file.stem == "data" or "names" in read_text(file)):
            content = read_yaml(file)
            found |= {file: content} if isinstance(content, dict) else {}
    told = {f: c for f, c in found.items() if f.stem == "data" or ("names" in c and c.keys() & {"train", "val", "nc"})}
    return told or {file: content for file, content in found.items() if "names" in content}


def _from_yaml(file: Path, content: dict) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{file}: names is {names!r}; a list of names, or a mapping of numbers to names, is needed")
    odd = next((key for key in names if not re.fullmatch(r"0|[1-9][0-9]{0,8}", key)), None)
    if odd is not None:
        raise ValueError(f"{file}: names has the key {odd!r}; whole numbers from 0 up are needed")
    if content.get("nc", str(len(names))) != str(len(names)):
        raise ValueError(f"{file}: nc is {content['nc']!r}, but there are {len(names)} names")
    return {int(number): name for number, name in names.items()}


def _from_lines(file: Path) -> dict[int, str]:
    lines = [line.strip() for line in read_text(file).rstrip().splitlines()]
    return dict(enumerate(lines))


def yolo_names(files: Sequence[Path]) -> tuple[dict[int, str] | None, list[Path]]:
    """Class names by number, and the files that told them; None where no file does."""
    yamls = data_yamls(files)
    told = {file: _from_yaml(file, content) for file, content in yamls.items() if "names" in content}
    told |= {f: _from_lines(f) for f in files if f.suffix == ".names" or f.name == "classes.txt"}
    if not told and yamls:
        raise ValueError(f"{next(iter(yamls))} has no names, and there is no classes.txt: the classes are unknown")
    for file, names in told.items():
        for number, name in names.items():
            class_name(name, f"{file}: class {number}")
        if len(set(names.values())) != len(names):
            raise ValueError(f"{file} has a class name more than once: {list(names.values())}")
        first = next(iter(told))
        if names != told[first]:
            raise ValueError(f"{file} names the classes {names}, but {first} {told[first]}; they must agree")
    names = next(iter(told.values()), None)
    return None if names is None else {number: names[number] for number in sorted(names)}, list(told)


def yolo_objects(file: Path, names: Mapping[int, str] | None) -> tuple[Object, ...]:
    """The objects of one file, boxes in exact fractions of the image."""
    objects = []
    for i, line in enumerate(read_text(file).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            if "_" in line or not re.fullmatch(r"-?[0-9]{1,9}", fields[0]):
                raise ValueError
            number, (cx, cy, w, h) = int(fields[0]), (Decimal(text) for text in fields[1:])
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            if not all(abs(v) < 10**6 for v in box):
                raise ValueError
        except (ValueError, ArithmeticError):
            raise ValueError(
                f"{file}: line {i} is {line[:200]!r}; allowed is `class cx cy w h`, a whole number and four fractions"
            ) from None
        if not 0 <= number < MOST_CLASSES or (names is not None and number not in names):
            allowed = ", ".join(f"{n} ({name})" for n, name in names.items()) if names else f"0 to {MOST_CLASSES - 1}"
            raise ValueError(f"{file}: line {i} has the class {number}; allowed are {allowed}")
        objects.append(Object(names[number] if names is not None else str(number), box))
    return tuple(objects)


def yolo_records(
    root: Path, files: Sequence[Path], names: Mapping[int, str] | None
) -> tuple[list[Record], tuple[str, ...]]:
    """A record an image, with objects None where there is no file of labels; and the class names in their order."""
    images = by_key((f for f in files if f.suffix.lower() in SUFFIXES), root)
    labels = {key_of(f, root): f for f in files if f.suffix.lower() == ".txt"}
    for key, file in labels.items():
        if key not in images and _LABEL_LINE.search(read_text(file)):
            raise ValueError(f"{file} belongs to no image: there is no {key} with one of {', '.join(SUFFIXES)}")
    records = []
    for key, image in images.items():
        file = labels.get(key)
        objects = None if file is None else yolo_objects(file, names)
        records.append(Record(key, image, None, objects, source=file or image, fractions=True))
    if names is None:
        found = [int(thing.name) for record in records for thing in record.objects or ()]
        names = {number: str(number) for number in range(1 + max(found, default=-1))}
    return records, tuple(names.values())


def read_yolo(folder: str | Path) -> list[Record]:
    """A folder of YOLO txt labels beside their images, or in `labels` for `images`; images/train/a.jpg is 'train/a'."""
    root = Path(folder)
    files = find_files(root)
    records, _ = yolo_records(root, files, yolo_names(files)[0])
    return [with_image(record) for record in records]


def _decimal(value: Decimal) -> str:
    return format(value.normalize(), "f") if value else "0"


def write_yolo(folder: str | Path, records: Iterable[Record], classes: Sequence[str]) -> Path:
    """`labels/<image>.txt`, empty without boxes, and the classes in `data.yaml`; the images belong into `images`.

    Fractions have as many digits as it takes to read the same corners again (beside images of the same size).
    """
    folder, numbers = Path(folder), {name: number for number, name in enumerate(classes)}
    records = to_write(records, classes, "YOLO txt", difficult=False, crowd=False)
    for record, name in zip(records, beside(folder / "labels", records, ".txt"), strict=True):
        sides, lines = (Decimal(record.size[1]), Decimal(record.size[0])), []
        for thing in record.objects:
            x1, y1, x2, y2 = (Decimal(v) for v in thing.box)
            numbered = ((x1 + x2) / 2 / sides[0], (y1 + y2) / 2 / sides[1], (x2 - x1) / sides[0], (y2 - y1) / sides[1])
            lines.append(" ".join([str(numbers[thing.name]), *map(_decimal, numbered)]) + "\n")
        write_text(name, "".join(lines))
    content = {"train": "images", "val": "images", "nc": len(classes), "names": list(classes)}
    write_text(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1 << 30))
    return folder
