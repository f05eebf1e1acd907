"""COCO JSON: images, annotations, categories. `iscrowd` objects are crowd, those with `ignore` difficult."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .files import class_name, number, read_text, reading, relative, whole, write_text
from .formats import Object, Record, settled, to_write, unique
from .pixels import SUFFIXES

SAMPLE = "sample"  # our own field of an image: its id, where the file name is another
_IMAGE = "an id, a number or always a text, once; a relative file_name; height, width; a group where others have one"
_OBJECT = "image_id and category_id of those listed, a bbox of 4 numbers, iscrowd and ignore 0 or 1"


def read_json(file: Path) -> Any:
    """The content of a JSON file; ValueError that names the file, also for a key that stands twice in one object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
        return found

    text = read_text(file)
    with reading(f"annotation {file} is truncated or not JSON", "a whole JSON file"):
        return json.loads(text, object_pairs_hook=once)


def _categories(entries: Sequence[dict], used: set, file: Path) -> dict[int, str]:
    """Names by id, in the order of ids, without a root that is only the parent of others (Roboflow writes one)."""
    names: dict[int, str] = {}
    for entry in entries:
        with reading(f"annotation {file}: category {entry}", "an id, a whole number, and a name, each once"):
            name, known = class_name(entry["name"]), names.items()
            if whole(entry["id"]) in names or name in names.values():
                raise ValueError(f"the id or the name stands more than once, beside {dict(known)}")
            names[int(entry["id"])] = name
    parents = [entry.get("supercategory") for entry in entries]
    for entry in entries:
        if entry.get("supercategory") == "none" and entry["name"] in parents and entry["id"] not in used:
            del names[entry["id"]]
    return {key: names[key] for key in sorted(names)}


def coco_records(file: Path, content: dict, find: Callable[[str], Path]) -> tuple[list[Record], tuple[str, ...]]:
    """Records and class names, each in the order of ids. find: file name -> path of the image."""
    with reading(f"annotation {file}", "the lists images, annotations, categories"):
        images, annotations, categories = (content[key] + [] for key in ("images", "annotations", "categories"))
        grouped = any("group" in entry for entry in images)
    objects: dict[int | str, list[Object]] = {}
    for entry in images:
        with reading(f"annotation {file}: image {entry}", _IMAGE):
            key = entry["id"] if isinstance(entry["id"], str) else whole(entry["id"])
            if key in objects or (objects and type(key) is not type(next(iter(objects)))):
                raise ValueError(f"the image id {key!r} stands more than once, or mixes numbers and texts")
            objects[key] = []
    used = [a.get("category_id") for a in annotations if isinstance(a, dict)]
    names = _categories(categories, {key for key in used if not isinstance(key, (list, dict))}, file)
    for position, entry in enumerate(annotations):
        with reading(f"annotation {file}: object {position}, {entry}", _OBJECT):
            x, y, width, height = (number(v) for v in entry["bbox"])
            flags = [{0: False, 1: True}[entry.get(key, 0)] for key in ("ignore", "iscrowd")]
            thing = Object(names[whole(entry["category_id"])], (x, y, x + width, y + height), *flags)
            objects[entry["image_id"]].append(thing)
    records = []
    for entry in sorted(images, key=lambda entry: entry["id"]):
        with reading(f"annotation {file}: image {entry}", _IMAGE):
            name, sides = relative(entry["file_name"]), [whole(entry.get(s) or 0) for s in ("height", "width")]
            group = str(entry["group"]) if grouped else None
            sample, size = relative(entry.get(SAMPLE, name)), tuple(sides) if all(sides) else None
            things = tuple(objects[entry["id"]])
            records.append(Record(sample, find(name), size, things, group=group, source=file))
    return unique(records), tuple(names.values())


def read_coco(path: str | Path, images: str | Path | None = None) -> list[Record]:
    """COCO JSON in the order of image ids; ids are file names. Files are looked for in `images` or beside the JSON."""
    file = Path(path)
    root = file.parent if images is None else Path(images)
    return [settled(record) for record in coco_records(file, read_json(file), lambda name: root / name)[0]]


def _width(start: float, end: float) -> float:
    """The float w with start + w == end; where there is none (ties round to even), end moves by its last bit."""
    w = end - start
    return next((v for v in (w, math.nextafter(w, 0), math.nextafter(w, math.inf)) if start + v == end), w)


def write_coco(path: str | Path, records: Iterable[Record], classes: Sequence[str]) -> Path:
    """One COCO JSON file: category ids 1..C in the order of `classes`, image ids 1..N in that of the records."""
    images, annotations = [], []
    for i, record in enumerate(to_write(records, classes, "COCO JSON", ("difficult", "crowd")), start=1):
        name, own = record.id, {} if record.group is None else {"group": record.group}
        if Path(name).suffix.lower() not in SUFFIXES and record.file is not None:
            name, own = name + record.file.suffix, own | {SAMPLE: name}
        height, width = map(int, record.size)
        images.append({"id": i, "file_name": name, "height": height, "width": width} | own)
        for thing in record.objects:
            x1, y1, x2, y2 = (float(v) for v in thing.box)
            w, h = _width(x1, x2), _width(y1, y2)
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + list(classes).index(thing.name)}
            entry |= {"bbox": [x1, y1, w, h], "area": w * h, "iscrowd": int(thing.crowd)}
            annotations.append(entry | ({"ignore": 1} if thing.difficult else {}))
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
