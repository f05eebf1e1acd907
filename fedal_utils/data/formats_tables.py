"""Labels out as a plain CSV table; finished tasks of Label Studio's export "JSON" in."""

import base64
import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .files import class_name, number, reading, relative, whole, write_text
from .formats import Object, Record, settled, unique
from .formats_coco import read_json

COLUMNS = ("image", "class", "x1", "y1", "x2", "y2", "height", "width", "difficult", "crowd")
_TASK = "an id, an image address in 'data', annotations: one choice, or upright rectanglelabels of one image size"


def write_csv(path: str | Path, records: Iterable[Record]) -> Path:
    """A row a box; an image without boxes is a row without class, the class of a whole image one without a box."""
    rows = [COLUMNS]
    for record in unique(records):
        size = record.size or ("", "")
        if not record.objects:
            rows.append((record.id, record.label or "", "", "", "", "", *size, "", ""))
        for thing in record.objects or ():
            rows.append((record.id, thing.name, *map(float, thing.box), *size, int(thing.difficult), int(thing.crowd)))
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return write_text(path, out.getvalue())


def read_label_studio(path: str | Path, images: str | Path | None = None) -> list[Record]:
    """Finished tasks: one choice an image, or upright labelled rectangles. Files are looked for in `images`.

    Of a task's annotations the last one that was not cancelled counts. The id is the base name of the image's address,
    without the prefix of an upload; where tasks share it, its whole path.
    """
    file = Path(path)
    root, tasks = file.parent if images is None else Path(images), read_json(file)
    places, records = [], []
    for position, task in enumerate(tasks if isinstance(tasks, list) else [tasks]):
        shown = task.get("id", position) if isinstance(task, dict) else position
        with reading(f"{file}: task {shown!r}", _TASK):
            finished = [a for a in task["annotations"] if not a.get("was_cancelled")]
            if finished:
                places.append([relative(name) for name in _place(task["data"])])
                records.append(_task_record(finished[-1].get("result") or [], f"{file}: task {shown!r}"))
    shared = Counter(name for name, _ in places)
    for i, (name, longer) in enumerate(places):
        key = name if shared[name] == 1 else longer
        names = [key, longer, *([key.split("/")[-1]] if key == name else [])]
        there = next((root / name for name in names if (root / name).is_file()), None)
        records[i] = settled(replace(records[i], id=key, file=there))
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
