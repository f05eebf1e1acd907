"""COCO JSON, in and out, and finished tasks of Label Studio's export "JSON", in.

COCO: `iscrowd` objects are crowd, those with `ignore` difficult.
"""

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .files import SUFFIXES, class_name, number, read_text, reading, relative, whole, write_text
from .formats import Object, Record, settled, to_write, unique

SAMPLE = "sample"  # our own field of an image: its id, where the file name is another
_IMAGE = "an id, a number or always a text, once; a relative file_name; height, width; a group where others have one"
_OBJECT = "image_id and category_id of those listed, a bbox of 4 numbers, iscrowd and ignore 0 or 1"
_TASK = "an id, an image address in 'data', annotations: one choice, or upright rectanglelabels of one image size"


def read_json(file: Path) -> Any:
    """The content of a JSON file; ValueError that names the file, also for a key that stands twice in one object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return found

    text = read_text(file)
    with reading(f"annotation {file} is truncated or not JSON", "a whole JSON file"):
        return json.loads(text, object_pairs_hook=once)


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
    names: dict[int, str] = {}
    for entry in categories:
        with reading(f"annotation {file}: category {entry}", "an id, a whole number, and a name, each once"):
            if whole(entry["id"]) in names or class_name(entry["name"]) in names.values():
                raise ValueError(f"the id or the name stands more than once, beside {names}")
            names[int(entry["id"])] = entry["name"]
    parents = [entry.get("supercategory") for entry in categories]
    used = [entry.get("category_id") for entry in annotations if isinstance(entry, dict)]
    for entry in categories:  # a root that is only the parent of others, as Roboflow writes one, is no class
        if entry.get("supercategory") == "none" and entry["name"] in parents and entry["id"] not in used:
            del names[entry["id"]]
    names = dict(sorted(names.items()))
    for position, entry in enumerate(annotations):
        with reading(f"annotation {file}: object {position}, {entry}", _OBJECT):
            x, y, width, height = (number(v) for v in entry["bbox"])
            flags = [{0: False, 1: True}[entry.get(key, 0)] for key in ("ignore", "iscrowd")]
            thing = Object(names[whole(entry["category_id"])], (x, y, x + width, y + height), *flags)
            objects[entry["image_id"]].append(thing)
    records = []
    for entry in sorted(images, key=lambda entry: entry["id"]):
        with reading(f"annotation {file}: image {entry}", _IMAGE):
            name, size = relative(entry["file_name"]), tuple(whole(entry.get(s) or 0) for s in ("height", "width"))
            sample, group = relative(entry.get(SAMPLE, name)), str(entry["group"]) if grouped else None
            known, things = size if all(size) else None, tuple(objects[entry["id"]])
            records.append(Record(sample, find(name), known, things, group=group, source=file))
    return unique(records), tuple(names.values())


def read_coco(path: str | Path, images: str | Path | None = None) -> list[Record]:
    """COCO JSON in the order of image ids; ids are file names. Files are looked for in `images` or beside the JSON."""
    file = Path(path)
    root = Path(images or file.parent)
    return [settled(record) for record in coco_records(file, read_json(file), lambda name: root / name)[0]]


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
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + list(classes).index(thing.name)}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": int(thing.crowd)}
            annotations.append(entry | ({"ignore": 1} if thing.difficult else {}))
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def read_label_studio(path: str | Path, images: str | Path | None = None) -> list[Record]:
    """Finished tasks: one choice an image, or upright labelled rectangles. Files are looked for in `images`.

    Of a task's annotations the last one that was not cancelled counts. The id is the base name of the image's address,
    without the prefix of an upload; where tasks share it, its whole path.
    """
    file = Path(path)
    root, tasks = Path(images or file.parent), read_json(file)
    found, records = [], []
    for position, task in enumerate(tasks if isinstance(tasks, list) else [tasks]):
        shown = task.get("id", position) if isinstance(task, dict) else position
        with reading(f"{file}: task {shown!r}", _TASK):
            finished = [a for a in task["annotations"] if not a.get("was_cancelled")]
            if finished:
                record = _task_record(finished[-1].get("result") or [], f"{file}: task {shown!r}")
                found.append((record, *map(relative, _place(task["data"]))))
    shared = Counter(name for _, name, _ in found)
    for record, name, longer in found:
        key = name if shared[name] == 1 else longer
        names = (key, longer, name.split("/")[-1]) if key == name else (key,)
        there = next((root / name for name in names if (root / name).is_file()), None)
        records.append(settled(replace(record, id=key, file=there)))
    odd = [record for record in records if record.label is None]
    if odd and len(odd) < len(records):
        raise ValueError(f"{odd[0].source} has no choice, but other tasks have one")
    return unique(records)


def _place(content: dict) -> tuple[str, str]:
    """The base name and the whole path of the image of a task's data: of 'image', or of the only text there."""
    texts = [value for value in content.values() if isinstance(value, str)]
    told = content.get("image") or (texts[0] if len(texts) == 1 else "")
    if not told or told.startswith("data:"):
        raise ValueError("there is no address of an image in 'data'; images inside the export are not read")
    address = urlsplit(told)
    query = parse_qs(address.query)
    if "fileuri" in query:  # .../resolve/?fileuri=<base64 of the address in the storage>
        address = urlsplit(base64.b64decode(query["fileuri"][0], validate=True).decode())
    if query.get("d"):  # local files: the path below the storage
        return query["d"][0], query["d"][0]
    if not address.scheme and not told.startswith("/"):
        return told, told
    path = unquote(address.path).strip("/")
    name, upload = path.split("/")[-1], "data/upload/" in path
    return (re.sub(r"^[0-9a-f]{8}-", "", name), name) if upload else (name, path)


def _task_record(result: list[dict], where: str) -> Record:
    """The class or the boxes of one annotation, in fractions of an image of the size that its regions tell."""
    choices, objects, sizes = [], [], set()
    for region in result:
        kind, value = region["type"], region.get("value")
        if kind not in ("choices", "rectanglelabels"):
            raise ValueError(f"a region of type {kind!r} is not read")
        (name,) = map(class_name, value[kind])
        if kind == "choices":
            choices.append(name)
            continue
        if value.get("rotation") or region.get("rotation") or region.get("image_rotation"):
            raise ValueError(f"a rotated rectangle of {name!r} is not read")
        sizes.add(tuple(whole(region[side], 1) for side in ("original_height", "original_width")))
        x, y, w, h = (number(value[side]) / 100 for side in ("x", "y", "width", "height"))
        objects.append(Object(name, (x, y, x + w, y + h)))
    if len(sizes) > 1 or len(choices) + bool(objects) > 1:
        raise ValueError(f"there are {len(choices)} choices, {len(objects)} rectangles and image sizes {sorted(sizes)}")
    kept, label = (None, choices[0]) if choices else (tuple(objects), None)
    return Record(where, None, next(iter(sizes), None), kept, label, source=where, fractions=True)
