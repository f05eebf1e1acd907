"""COCO JSON: images, annotations, categories. `iscrowd` objects are crowd, those with `ignore` difficult."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .files import class_name, read_text, relative, write_text
from .formats import Object, Record, to_write, unique, with_image
from .pixels import SUFFIXES

SAMPLE = "sample"  # our own field of an image: its id, where the file name is another


def read_json(file: Path) -> Any:
    """The content of a JSON file; ValueError that names the file, also for a key that stands twice in one object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
        return found

    text = read_text(file)
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"annotation {file} is truncated or not JSON: {error}") from None


def whole(value: object, where: str, least: int = 0) -> int:
    """A whole number of at most nine digits, as JSON has it."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < 10**9 or value % 1:
        raise ValueError(f"{where} {str(value)[:99]!r}; a whole number from {least} up is needed")
    return int(value)


def numbers(values: object, where: str, count: int = 4) -> list[float]:
    """So many numbers as floats; not finite ones pass, for `settled` to name with their box."""
    if (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 10**300 for v in values if v == v)
    ):
        return [float(v) for v in values]
    shown = repr(values)
    raise ValueError(f"{where} {shown[:99]}{'...' if len(shown) > 99 else ''}; {count} finite numbers are needed")


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{where} {value!r}; allowed are 0 and 1")
    return bool(value)


def entries_of(content: object, key: str, file: Path) -> list[dict]:
    """The list of objects `key` of COCO JSON."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"annotation {file} has no list {key!r}; COCO needs images, annotations, categories")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"annotation {file}: entry {number} of {key!r} is {entry!r}; an object is needed")
    return entries


def _categories(content: dict, file: Path) -> dict[int, str]:
    """Names by id, in the order of ids, without a root that is only the parent of others (Roboflow writes one)."""
    found: dict[int, str] = {}
    entries = entries_of(content, "categories", file)
    used = [a.get("category_id") for a in content["annotations"]]
    parents = [entry.get("supercategory") for entry in entries if entry.get("supercategory") != entry.get("name")]
    for entry in entries:
        where = f"annotation {file}: category {entry}"
        number, name = whole(entry.get("id"), f"{where}: id"), class_name(entry.get("name"), where)
        if number in found:
            raise ValueError(f"{where}: the id {number} stands more than once")
        found[number] = name
        if entry.get("supercategory") == "none" and name in parents and number not in used:
            del found[number]
    if len(set(found.values())) != len(found):
        raise ValueError(f"annotation {file} has a category name more than once: {list(found.values())}")
    return {number: found[number] for number in sorted(found)}


def coco_records(
    file: Path, content: dict, find: Callable[[str], Path], group_field: str = "group"
) -> tuple[list[Record], tuple[str, ...]]:
    """Records in the order of image ids, and the class names in the order of category ids.

    find: file name -> path of the image. group_field: the field of an image that is its group, where the file has it.
    """
    images, annotations = entries_of(content, "images", file), entries_of(content, "annotations", file)
    categories = _categories(content, file)
    entries: dict[int | str, dict] = {}
    for entry in images:
        where = f"annotation {file}: image {entry}"
        number = entry.get("id")
        if not isinstance(number, str):
            whole(number, f"{where}: id")
        if entries.setdefault(number, entry) is not entry:
            raise ValueError(f"{where}: the image id {number!r} stands more than once")
    if len({type(number) for number in entries}) > 1:
        raise ValueError(f"annotation {file} mixes numbers and texts as ids of images; all must be of one kind")
    objects: dict[int | str, list[Object]] = {number: [] for number in entries}
    for annotation in annotations:
        where = f"annotation {file}: object {annotation.get('id')!r}"
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if type(image) not in (int, str) or image not in entries:
            raise ValueError(f"{where} belongs to image id {image!r}, which 'images' does not list")
        if type(category) is not int or category not in categories:
            raise ValueError(f"{where} has category_id {category!r}; allowed are {list(categories)}")
        x, y, width, height = numbers(annotation.get("bbox"), f"{where} has bbox")
        difficult, crowd = (_flag(annotation.get(k, 0), f"{where} has {k}") for k in ("ignore", "iscrowd"))
        objects[image].append(Object(categories[category], (x, y, x + width, y + height), difficult, crowd))
    records = []
    grouped = any(group_field in entry for entry in images)
    for number in sorted(entries):
        entry, where = entries[number], f"annotation {file}: image {number!r}"
        name = relative(entry.get("file_name"), f"{where} has the file_name")
        if grouped and not isinstance(entry.get(group_field), (str, int)):
            raise ValueError(f"{where} ({name!r}) has no field {group_field!r}, but others have it")
        sides = [entry.get(side) or 0 for side in ("height", "width")]
        size = tuple(whole(side, f"{where}: {what}") for side, what in zip(sides, ("height", "width"), strict=True))
        sample = relative(entry.get(SAMPLE, name), f"{where} has the {SAMPLE}")
        group, size = str(entry[group_field]) if grouped else None, size if min(size) > 0 else None
        records.append(Record(sample, find(name), size, tuple(objects[number]), group=group, source=file))
    return unique(records), tuple(categories.values())


def read_coco(path: str | Path, images: str | Path | None = None) -> list[Record]:
    """COCO JSON in the order of image ids; ids are file names. Files are looked for in `images` or beside the JSON."""
    file = Path(path)
    root = file.parent if images is None else Path(images)
    records, _ = coco_records(file, read_json(file), lambda name: root / name)
    return [with_image(record) for record in records]


def _width(start: float, end: float) -> float:
    """The float w with start + w == end; where there is none (ties round to even), end moves by its last bit."""
    w = end - start
    return next((v for v in (w, math.nextafter(w, 0), math.nextafter(w, math.inf)) if start + v == end), w)


def write_coco(path: str | Path, records: Iterable[Record], classes: Sequence[str]) -> Path:
    """One COCO JSON file: category ids 1..C in the order of `classes`, image ids 1..N in that of the records."""
    images, annotations, owners = [], [], {}
    for i, record in enumerate(to_write(records, classes, "COCO JSON"), start=1):
        name = record.id
        if Path(name).suffix.lower() not in SUFFIXES and record.file is not None:
            name += record.file.suffix
        if owners.setdefault(name, record.id) != record.id:
            raise ValueError(f"images {owners[name]!r} and {record.id!r} would share the file name {name!r}")
        entry = {"id": i, "file_name": name, "height": int(record.size[0]), "width": int(record.size[1])}
        own = {SAMPLE: record.id if name != record.id else None, "group": record.group}
        images.append(entry | {key: value for key, value in own.items() if value is not None})
        for thing in record.objects:
            x1, y1, x2, y2 = (float(v) for v in thing.box)
            w, h = _width(x1, x2), _width(y1, y2)
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + list(classes).index(thing.name)}
            entry |= {"bbox": [x1, y1, w, h], "area": w * h, "iscrowd": int(thing.crowd)}
            annotations.append(entry | ({"ignore": 1} if thing.difficult else {}))
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
