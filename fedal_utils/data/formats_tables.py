"""Labels out as a plain CSV table; finished tasks of Label Studio's export "JSON" in."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .files import class_name, relative, write_text
from .formats import Object, Record, to_write, unique, with_image
from .formats_coco import numbers, read_json, whole

COLUMNS = ("image", "class", "x1", "y1", "x2", "y2", "height", "width", "difficult", "crowd")


def write_csv(path: str | Path, records: Iterable[Record]) -> Path:
    """A row a box; an image without boxes is a row without class, the class of a whole image one without a box."""
    records, rows = unique(list(records)), []
    boxed = [record for record in records if record.label is None]
    if boxed:
        to_write(boxed, sorted({thing.name for r in boxed for thing in r.objects or ()}) or ["none"], "CSV")
    for record in records:
        relative(record.id, "CSV")
        size = record.size or ("", "")
        if record.label is not None or not record.objects:
            rows.append((record.id, record.label or "", "", "", "", "", *size, "", ""))
        for thing in record.objects or ():
            corners = (repr(float(v)) for v in thing.box)
            rows.append((record.id, thing.name, *corners, *size, int(thing.difficult), int(thing.crowd)))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    return write_text(path, out.getvalue())


# ------------------------------------------------------------------------------------------------------- Label Studio


def read_label_studio(path: str | Path, images: str | Path | None = None) -> list[Record]:
    """Finished tasks: one choice an image, or upright labelled rectangles. Files are looked for in `images`.

    Of several annotations of a task the last one that was not cancelled counts; a task without one is left out. The id
    is the base name of the image's address, without the prefix of an upload; where tasks share it, its whole path.
    """
    file = Path(path)
    root, tasks = file.parent if images is None else Path(images), read_json(file)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "id" in task for task in tasks):
        raise ValueError(f"{file} is no list of tasks with ids; Label Studio's export 'JSON' is needed")
    places, records = [], []
    for task in tasks:
        where = f"{file}: task {task['id']!r}"
        annotations = task.get("annotations")
        if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
            raise ValueError(f"{where} has no list of annotations; Label Studio's export 'JSON' is needed")
        finished = [a for a in annotations if not a.get("was_cancelled")]
        if finished:
            places.append(_place(task.get("data"), where))
            records.append(_task_record(finished[-1].get("result"), where))
    names = Counter(name for name, _ in places)
    for i, (name, longer) in enumerate(places):
        alone = names[name] == 1
        name, longer = (relative(text, records[i].source) for text in (name, longer))
        key = name if alone else longer
        files = [root / key, root / longer, *([root / key.split("/")[-1]] if alone else [])]
        file_of = next((place for place in files if place.is_file()), None)
        records[i] = with_image(replace(records[i], id=key, file=file_of))
    kinds = {record.label is None for record in records}
    if len(kinds) > 1:
        odd = next(record for record in records if record.label is None)
        raise ValueError(f"{odd.source} has no choice, but other tasks have one")
    return unique(records)


def _place(content: object, where: str) -> tuple[str, str]:
    """The base name and the whole path of the image of a task's data: of 'image', or of the only text there."""
    texts = {k: v for k, v in content.items() if isinstance(v, str)} if isinstance(content, dict) else {}
    told = texts.get("image") or (next(iter(texts.values())) if len(texts) == 1 else None)
    if not told or told.startswith("data:"):
        raise ValueError(f"{where} has no address of an image in 'data'; images inside the export are not read")
    try:
        address = urlsplit(told)
        query = parse_qs(address.query)
        if "fileuri" in query:  # .../resolve/?fileuri=<base64 of the address in the storage>
            address = urlsplit(base64.b64decode(query["fileuri"][0], validate=True).decode())
    except (ValueError, UnicodeError):
        raise ValueError(f"{where} has the address {told[:200]!r}, which cannot be read") from None
    if query.get("d"):  # local files: the path below the storage
        return query["d"][0], query["d"][0]
    if not address.scheme and not told.startswith("/"):
        return told, told
    path = unquote(address.path).strip("/")
    name = path.split("/")[-1]
    upload = "data/upload/" in path
    return re.sub(r"^[0-9a-f]{8}-", "", name) if upload else name, name if upload else path


def _task_record(result: object, where: str) -> Record:
    """The class or the boxes of one annotation, in fractions of an image of the size that its regions tell."""
    choices, objects, sizes = [], [], set()
    if not isinstance(result or [], list):
        raise ValueError(f"{where} has the result {str(result)[:200]}; a list of regions is needed")
    for region in result or []:
        kind = region.get("type") if isinstance(region, dict) else None
        value = region.get("value") if kind in ("choices", "rectanglelabels") else None
        if not isinstance(value, dict):
            raise ValueError(f"{where} has a region of type {kind!r}; allowed are 'choices' and 'rectanglelabels'")
        names = value.get(kind)
        if not isinstance(names, list) or len(names) != 1:
            raise ValueError(f"{where} has {kind} {names!r}; exactly one class is needed")
        name = class_name(names[0], where)
        sides = [region.get(side) for side in ("original_height", "original_width")]
        if sides != [None, None] or kind == "rectanglelabels":
            sizes.add(tuple(whole(side, f"{where} has a side of the image of", least=1) for side in sides))
        if kind == "choices":
            choices.append(name)
            continue
        if value.get("rotation") or region.get("rotation") or region.get("image_rotation"):
            raise ValueError(f"{where} has a rotated rectangle of {name!r}; allowed are upright ones")
        percent = [value.get(k) for k in ("x", "y", "width", "height")]
        x, y, w, h = (v / 100 for v in numbers(percent, f"{where} has a rectangle with x, y, width, height"))
        objects.append(Object(name, (x, y, x + w, y + h)))
    if len(sizes) > 1 or len(choices) > 1 or (choices and objects):
        raise ValueError(
            f"{where} has {len(choices)} choices, {len(objects)} rectangles and image sizes {sorted(sizes)}; allowed "
            "are one choice, or rectangles, and one size"
        )
    label = choices[0] if choices else None
    kept = None if choices else tuple(objects)
    return Record(where, None, next(iter(sizes), None), kept, label, source=where, fractions=True)
