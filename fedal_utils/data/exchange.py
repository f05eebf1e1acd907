"""Labels go out as COCO JSON, YOLO txt, VOC XML, CSV, and finished ones come in, from Label Studio as well.

What travels is a list of `Item`s: an image's id, its size and either a class or its boxes, in pixels of the original
image. Files say what `data` says about the same formats (boxes count pixels from 0, the far edge excluded; classes of
YOLO from 0, of COCO from 1), and are read with its parsers, so `data.load` reads an export beside its images.

| format | what is written | what comes back |
|---|---|---|
| COCO | one JSON file | all bits; "corners" beside a bbox whose x + width is not x2 in floats |
| VOC | `Annotations/*.xml`, `exported.csv` | all bits |
| CSV | one file, a row a box | all bits; the only one that also holds classes of whole images |
| YOLO | `labels/*.txt`, `data.yaml`, `exported.csv` | corners to 1e-9 of the image's side (fractions, 17 digits) |

`exported.csv` lists images, sizes and files, for ids and sizes that a format has no room for. What cannot come back as
it was is refused before anything is written: boxes that are not finite, without area or not inside their image, classes
that a line cannot hold, and names of images that leave the folder. Everything is written under a temporary name first.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import tempfile
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from . import readers as data

LISTING = "exported.csv"
COLUMNS = ("image", "class", "x1", "y1", "x2", "y2", "height", "width")
THINNEST = 1e-9  # of the image's side: the narrowest box that YOLO's fractions hold


@dataclass(frozen=True)
class Box:
    """An object: its class and xyxy float pixels of the original image, counted from 0, the far edge excluded."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Item:
    """A labelled image: its id, a relative path with '/', its file and (height, width) if known, its class or boxes."""

    image: str
    file: Path | None
    size: tuple[int, int] | None
    label: str | list[Box]


# --------------------------------------------------------------------------------------------- what may be written


def _place(name: str) -> PurePosixPath:
    """An image's id as a path below a folder; ValueError for one that is absolute, leaves it, or is hidden there."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(not p or p.startswith(".") for p in parts) or "\\" in name or ":" in parts[0] or not _plain(name):
        raise ValueError(
            f"image {name!r} is no name of a file below a folder: allowed are relative paths with '/', without empty "
            "parts, parts that start with '.', '\\', a drive or control characters"
        )
    return PurePosixPath(name)


def _plain(text: str) -> bool:
    """Can every format hold this text in one line?"""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\ufffe\uffff" for c in text)


def _check_class(name: str) -> str:
    if not isinstance(name, str) or not name or name != name.strip() or not _plain(name):
        raise ValueError(
            f"class {name!r} cannot be written: allowed is text in one line that neither starts nor ends with a space"
        )
    return name


def _checked(items: Iterable[Item], classes: Sequence[str] | None, what: str) -> list[Item]:
    """The items; ValueError for the first one that could not come back as it is. classes None: any, boxes or not."""
    items = list(items)
    if not items:
        raise ValueError(f"nothing to write as {what}: the list of items is empty")
    for name in classes or ():
        _check_class(name)
    if classes is not None and (not classes or len(set(classes)) != len(classes)):
        raise ValueError(f"{what} needs one or more classes, each once, got {list(classes)}")
    _unique(items, what)
    for item in items:
        _place(item.image)
        where = f"image {item.image!r}"
        if isinstance(item.label, str):
            if classes is not None:
                raise ValueError(f"{where} has the class {item.label!r}, but {what} holds boxes; write it as CSV")
            _check_class(item.label)
            boxes = []
        elif isinstance(item.label, (list, tuple)):
            boxes = item.label
        else:
            raise ValueError(f"{where} has the label {item.label!r}; a class or a list of boxes is needed")
        if item.size is None and (boxes or classes is not None):
            raise ValueError(f"{where} has no size; {what} needs (height, width) of images with boxes")
        if item.size is not None and (len(item.size) != 2 or any(s != int(s) or s < 1 for s in item.size)):
            raise ValueError(f"{where} has the size {item.size}; (height, width) in whole pixels >= 1 is needed")
        for box in boxes:
            _check_class(box.name)
            if classes is not None and box.name not in classes:
                raise ValueError(f"{where} has a box of class {box.name!r}; allowed are {list(classes)}")
            height, width = item.size
            x1, y1, x2, y2 = _corners(box)
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):  # False for nan as well
                raise ValueError(
                    f"{where} has the box {box}; needed is 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}"
                )
    return items


def _unique(items: Sequence[Item], where: object) -> None:
    twice = next((name for name, n in Counter(item.image for item in items).items() if n > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: image {twice!r} occurs more than once; one label an image is needed")


def _corners(box: Box) -> tuple[float, float, float, float]:
    return float(box.x1), float(box.y1), float(box.x2), float(box.y2)


def _suffix(name: PurePosixPath) -> str:
    """The ending of an image's name that says what kind of image it is, else ''."""
    return name.suffix if name.suffix.lower() in data.SUFFIXES else ""


def _file_name(item: Item) -> PurePosixPath:
    """The id as the name of an image file: an id without its ending gets that of the file."""
    place = _place(item.image)
    ending = "" if _suffix(place) or item.file is None else _suffix(PurePosixPath(item.file.name))
    return place.with_name(place.name + ending)


def _beside(items: Sequence[Item], folder: str, suffix: str) -> list[str]:
    """For each item the relative path of its annotation; ValueError where two images would share one."""
    paths, owners = [], {}
    for item in items:
        place = _file_name(item)
        stem = place.name.removesuffix(_suffix(place))
        path = (PurePosixPath(folder) / place.with_name(stem + suffix)).as_posix()
        other = owners.setdefault(data._key(Path(path), Path()), item.image)
        if other != item.image:
            raise ValueError(f"images {other!r} and {item.image!r} would share the annotation {path}")
        paths.append(path)
    return paths


# ------------------------------------------------------------------------------------------------------ safe writing


def _write(path: str | Path, text: str) -> Path:
    """The file with this text, or as it was before; line ends are not changed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as sink:
            sink.write(text)
        os.chmod(name, 0o644)  # mkstemp's file is private
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()


def _rows(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV file with these columns, in any order and beside others."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as source:
            reader = csv.DictReader(source, strict=True)
            lacking = [c for c in columns if c not in (reader.fieldnames or ())]
            if lacking:
                raise ValueError(f"{file} has no column {lacking[0]!r}; needed are {', '.join(columns)}")
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (csv.Error, UnicodeError) as error:
        raise ValueError(f"{file} is truncated or not CSV: {error}") from None
    for line, row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{file}: line {line} has more or fewer fields than the {len(reader.fieldnames)} columns")
    return [(line, {c: row.get(c) or "" for c in (*columns, *optional)}) for line, row in rows]


def _write_folder(folder: str | Path, items: Sequence[Item], files: dict[str, str], annotations: Sequence[str]) -> Path:
    """The files, by relative path, and the listing below `folder`, in place of those of an earlier export.

    Images may lie in the folder too; any other file in it is an error. New files are complete before old ones go.
    """
    folder = Path(folder)
    sizes = [item.size for item in items]
    listed = [(item.image, *map(int, size), file) for item, size, file in zip(items, sizes, annotations, strict=True)]
    files = files | {LISTING: _table(("image", "height", "width", "file"), listed)}
    tops = sorted({PurePosixPath(name).parts[0] for name in files})
    if folder.exists():
        _refuse_foreign(folder, tops, {name for name in files if "/" not in name})
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    old = Path(tempfile.mkdtemp(prefix=".written-before-", dir=folder.parent))
    try:
        for name, text in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(text, encoding="utf-8", newline="")
        for part in (new, *(p for p in new.rglob("*") if p.is_dir())):
            part.chmod(0o755)  # mkdtemp's folder is private
        if not folder.exists():
            os.rename(new, folder)
            return folder
        moved: list[tuple[Path, Path]] = []
        try:
            for top in tops:
                for source, target in ((folder / top, old / top), (new / top, folder / top)):
                    if source.exists():
                        os.rename(source, target)
                        moved.append((source, target))
        except BaseException:
            for source, target in reversed(moved):
                os.rename(target, source)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):  # what could not be put back stays there
            old.rmdir()
    return folder


def _refuse_foreign(folder: Path, tops: Sequence[str], plain: set[str]) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a folder is needed to write to")
    ours: set[str] = set()
    if (folder / LISTING).is_file():
        listed = {row["file"] for _, row in _rows(folder / LISTING, ("file",))}
        ours = plain | {file for file in listed if file.split("/")[0] in tops}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        harmless = path.suffix.lower() in data.SUFFIXES or any(part.startswith(".") for part in name.parts)
        if harmless and name.parts[0] not in tops:
            continue
        if not path.is_dir() and name.as_posix() not in ours:
            raise ValueError(
                f"{path} is no image and of no export that {folder / LISTING} lists: move it away or choose another "
                "folder, so that nothing is overwritten"
            )


# ------------------------------------------------------------------------------------------------------------ writers


def write_coco(path: str | Path, items: Iterable[Item], classes: Sequence[str]) -> Path:
    """One COCO JSON file: category ids 1..C in the order of `classes`, image ids 1..N in that of the items."""
    items, images, annotations = _checked(items, classes, "COCO JSON"), [], []
    owners: dict[str, str] = {}
    for i, item in enumerate(items, start=1):
        height, width = (int(side) for side in item.size)
        name = _file_name(item).as_posix()
        other = owners.setdefault(name, item.image)
        if other != item.image:
            raise ValueError(f"images {other!r} and {item.image!r} would share the file name {name!r}")
        own = {} if name == item.image else {"image": item.image}
        images.append({"id": i, "file_name": name, "height": height, "width": width} | own)
        for box in item.label:
            x1, y1, x2, y2 = _corners(box)
            w, h = x2 - x1, y2 - y1
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + list(classes).index(box.name)}
            entry |= {"bbox": [x1, y1, w, h], "area": w * h, "iscrowd": 0}
            if (x1 + w, y1 + h) != (x2, y2):
                entry["corners"] = [x1, y1, x2, y2]
            annotations.append(entry)
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return _write(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def write_yolo(folder: str | Path, items: Iterable[Item], classes: Sequence[str]) -> Path:
    """`labels/<image>.txt`, lines `class cx cy w h` in fractions, empty without boxes, and the classes in `data.yaml`.

    The images belong into `images`. A box narrower than `THINNEST` of its image's side is an error: fractions lose it.
    """
    import yaml

    items = _checked(items, classes, "YOLO txt")
    names, files = _beside(items, "labels", ".txt"), {}
    for item, name in zip(items, names, strict=True):
        height, width = item.size
        lines = []
        for box in item.label:
            x1, y1, x2, y2 = _corners(box)
            w, h = (x2 - x1) / width, (y2 - y1) / height
            if min(w, h) < THINNEST:
                raise ValueError(
                    f"image {item.image!r} has the box {box}, too thin for fractions: {min(w, h)} of a side"
                )
            centre = (x1 / width + x2 / width) / 2, (y1 / height + y2 / height) / 2
            lines.append(" ".join(map(repr, (list(classes).index(box.name), *centre, w, h))) + "\n")
        files[name] = "".join(lines)
    content = {"train": "images", "val": "images", "nc": len(classes), "names": list(classes)}
    files["data.yaml"] = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1 << 30)
    return _write_folder(folder, items, files, names)


def write_voc(folder: str | Path, items: Iterable[Item], classes: Sequence[str]) -> Path:
    """`Annotations/<image>.xml` in Pascal VOC's form with float coordinates from 0; images belong into `JPEGImages`."""
    items = _checked(items, classes, "VOC XML")
    names, files = _beside(items, "Annotations", ".xml"), {}
    for item, name in zip(items, names, strict=True):
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = _file_name(item).as_posix()
        size = ElementTree.SubElement(root, "size")
        height, width = item.size
        for tag, value in (("width", width), ("height", height), ("depth", 3)):
            ElementTree.SubElement(size, tag).text = str(int(value))
        for box in item.label:
            thing = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(thing, "name").text = box.name
            ElementTree.SubElement(thing, "difficult").text = "0"
            frame = ElementTree.SubElement(thing, "bndbox")
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), _corners(box), strict=True):
                ElementTree.SubElement(frame, tag).text = repr(value)
        ElementTree.indent(root)
        files[name] = ElementTree.tostring(root, encoding="unicode") + "\n"
    return _write_folder(folder, items, files, names)


def write_csv(path: str | Path, items: Iterable[Item]) -> Path:
    """One CSV file: image, class, x1, y1, x2, y2, height, width; a row a box, UTF-8, quoted where needed.

    An image without boxes is a row without class and corners, the class of a whole image a row without corners.
    """
    rows = []
    for item in _checked(items, None, "CSV"):
        size = ("", "") if item.size is None else tuple(int(side) for side in item.size)
        if isinstance(item.label, str):
            rows.append((item.image, item.label, "", "", "", "", *size))
        elif not item.label:
            rows.append((item.image, "", "", "", "", "", *size))
        else:
            rows += [(item.image, box.name, *map(repr, _corners(box)), *size) for box in item.label]
    return _write(path, _table(COLUMNS, rows))


def class_folders(items: Iterable[Item]) -> list[tuple[str, Path | None]]:
    """For each image of a class its place `<class>/<image>` in class folders, as `class_sets` reads them, and its file.

    The image's own folders become part of its name ('a/b.png' is 'a-b.png'), as deeper images are not read.
    """
    out, owners = [], {}
    for item in _checked(items, None, "class folders"):
        if not isinstance(item.label, str):
            raise ValueError(f"image {item.image!r} has boxes; class folders hold images of one class each")
        if "/" in item.label:
            raise ValueError(
                f"class {item.label!r} of image {item.image!r} cannot be the name of a folder: it has a '/'"
            )
        _place(item.label)
        place = f"{item.label}/{_file_name(item).as_posix().replace('/', '-')}"
        other = owners.setdefault(place, item.image)
        if other != item.image:
            raise ValueError(f"images {other!r} and {item.image!r} would share the place {place!r}")
        out.append((place, item.file))
    return out


# ------------------------------------------------------------------------------------------------------------ readers


def _item(record: data._Record, image: str | None = None) -> Item:
    """The item of a record that `data` read: boxes in original pixels, inside the image, each with an area.

    As in `data`, boxes partly outside are clipped, those without area left out, others an error. The size is the
    annotated one, else that of the image file.
    """
    image = record.id if image is None else image
    _place(image)
    there = record.path.is_file()
    size = record.size
    if size is None:
        if not there:
            raise ValueError(f"{record.source}: image {image!r} has no size, and there is no file {record.path}")
        size = data._file(record.path, None).size
    boxes = []
    for thing in record.objects or ():
        if thing.crowd:
            raise ValueError(f"{record.source}: image {image!r} has a crowd region of {thing.name!r}, which is no box")
        inside = data._settled(record, thing, size, Counter())
        if inside is not None:
            boxes.append(Box(thing.name, *map(float, inside)))
    return Item(image, record.path if there else None, size, boxes)


def read_coco(path: str | Path, images: str | Path | None = None) -> list[Item]:
    """COCO JSON with boxes, in the order of image ids; files are looked for in `images`, else beside the JSON.

    A crowd region is an error. "corners" count only while they agree with their bbox, which other tools may change.
    """
    file = Path(path)
    root = file.parent if images is None else Path(images)
    content = data._json(file)
    records, _ = data._coco_records(file, content, lambda name: root / _place(name), None)
    entries = {entry["file_name"]: entry for entry in content["images"]}
    exact: dict[object, list] = {entry["id"]: [] for entry in content["images"]}
    for annotation in content["annotations"]:
        corners, (x, y, w, h) = annotation.get("corners"), annotation["bbox"]
        if isinstance(corners, list) and len(corners) == 4 and all(isinstance(v, (int, float)) for v in corners):
            x1, y1, x2, y2 = corners
            exact[annotation["image_id"]].append(corners if [x, y, w, h] == [x1, y1, x2 - x1, y2 - y1] else None)
        else:
            exact[annotation["image_id"]].append(None)
    items = []
    for record in records:
        entry = entries[record.id]
        things = [
            data._Object(thing.name, thing.box if corners is None else tuple(corners), thing.difficult, thing.crowd)
            for thing, corners in zip(record.objects, exact[entry["id"]], strict=False)
        ]
        whole = data._Record(record.id, record.path, tuple(things), file, record.size)
        items.append(_item(whole, str(entry.get("image", record.id))))
    _unique(items, file)
    return items


def _listed(folder: Path) -> list[tuple[str, tuple[int, int], str]]:
    """(image, size, annotation) of an export's listing."""
    out = []
    for line, row in _rows(folder / LISTING, ("image", "height", "width", "file")):
        size = _size_of(row, f"{folder / LISTING}: line {line}")
        _place(row["file"])
        if size is None:
            raise ValueError(f"{folder / LISTING}: line {line} has no height and width")
        out.append((row["image"], size, row["file"]))
    return out


def _size_of(row: dict[str, str], where: str) -> tuple[int, int] | None:
    sides = row["height"], row["width"]
    if sides == ("", ""):
        return None
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", side) for side in sides):
        raise ValueError(f"{where} has height {sides[0]!r} and width {sides[1]!r}; whole pixels >= 1 are needed")
    return int(sides[0]), int(sides[1])


def _pictures(folder: Path) -> dict[str, Path]:
    return data._by_key(data._files(folder, *data.SUFFIXES), folder)


def read_yolo(folder: str | Path) -> list[Item]:
    """A folder of YOLO txt labels with `data.yaml` or `classes.txt`: an export, or one that holds the images as well.

    Without the listing of an export, images are named as `data` does: images/train/a.jpg is 'train/a'.
    """
    folder = Path(folder)
    if not (folder / LISTING).is_file():
        records, _, _ = data._yolo_records(folder, None)
        return [_item(record) for record in records]
    names, pictures, items = data._yolo_names(folder), _pictures(folder), []
    for image, size, name in _listed(folder):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"annotation {file} does not exist, but {folder / LISTING} lists it")
        path = pictures.get(data._key(file, folder), file.with_suffix(""))
        items.append(_item(data._Record(image, path, data._yolo_txt(file, names), file, size, fractions=True)))
    _unique(items, folder)
    return items


def read_voc(folder: str | Path, one_based: bool = False) -> list[Item]:
    """All VOC XML files below a folder: an export, or others'; `difficult` objects are boxes as any.

    one_based: coordinates count pixels from 1 (VOC07 and VOC12 do): 1 is taken off xmin and ymin. Without the listing
    of an export, images are named as `data` does: Annotations/a.xml is 'a'.
    """
    folder = Path(folder)
    pictures, items = _pictures(folder), []
    if (folder / LISTING).is_file():
        listed = [(image, folder / name) for image, _, name in _listed(folder)]
    else:
        listed = list(data._by_key(data._files(folder, ".xml"), folder).items())
    if not listed:
        raise ValueError(f"folder {folder} has no annotation: no .xml file in it")
    for image, file in listed:
        size, objects = data._voc_xml(file, one_based)
        path = pictures.get(data._key(file, folder), file.with_suffix(""))
        items.append(_item(data._Record(image, path, objects, file, size)))
    _unique(items, folder)
    return items


def read_csv(path: str | Path) -> list[Item]:
    """What `write_csv` writes, in the order of the images' first rows; sizes are needed of images with boxes alone."""
    file = Path(path)
    found: dict[str, tuple[tuple[int, int] | None, list[tuple[int, str, tuple[float, ...] | None]]]] = {}
    for line, row in _rows(file, COLUMNS[:6], COLUMNS[6:]):
        where = f"{file}: line {line}"
        _place(row["image"])
        size = _size_of(row, where)
        texts = [row[c] for c in COLUMNS[2:6]]
        corners = None
        if any(texts):
            try:
                corners = tuple(float(text) for text in texts)
            except ValueError:
                raise ValueError(f"{where} has the corners {texts}; four numbers, or four empty fields") from None
        if corners is not None and not row["class"]:
            raise ValueError(f"{where} has a box without a class")
        before, rows = found.setdefault(row["image"], (size, []))
        if before != size:
            raise ValueError(f"{where} has the size {size} of image {row['image']!r}, an earlier line {before}")
        rows.append((line, row["class"], corners))
    items = []
    for image, (size, rows) in found.items():
        if len(rows) > 1 and any(corners is None for _, _, corners in rows):
            line = next(line for line, _, corners in rows if corners is None)
            raise ValueError(f"{file}: line {line} is the whole label of image {image!r}, but other lines have it too")
        _, name, corners = rows[0]
        if corners is None:
            items.append(Item(image, _found(file.parent / image), size, name if name else []))
            continue
        things = tuple(data._Object(name, corners) for _, name, corners in rows)
        items.append(_item(data._Record(image, file.parent / image, things, file, size)))
    return items


def _found(path: Path) -> Path | None:
    return path if path.is_file() else None


# ------------------------------------------------------------------------------------------------------- Label Studio


def read_label_studio(path: str | Path, images: str | Path | None = None) -> list[Item]:
    """Finished tasks of Label Studio's export "JSON": one choice an image, or upright labelled rectangles.

    Of several annotations of a task the last one in the file that was not cancelled counts; tasks without one are not
    finished and left out; predictions are not looked at. An empty result is an image without boxes. The id of an image
    is its path: below the storage of local files, else the last part, without the 8 digits that an upload puts before.
    Sizes are those told with the regions, else of the file in `images` (else beside the JSON), else None.
    """
    file = Path(path)
    root = file.parent if images is None else Path(images)
    tasks = data._json(file)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "id" in task for task in tasks):
        raise ValueError(f"{file} is no list of tasks with ids; Label Studio's export 'JSON' is needed")
    items, kinds = [], {}
    for task in tasks:
        where = f"{file}: task {task['id']!r}"
        annotations = task.get("annotations")
        if not isinstance(annotations, list):
            raise ValueError(f"{where} has no list 'annotations'; Label Studio's export 'JSON' is needed, not JSON-MIN")
        finished = [a for a in annotations if not a.get("was_cancelled")]
        if not finished:
            continue
        image = _image_of(task.get("data"), where)
        label, size = _label_of(finished[-1].get("result") or [], image, where)
        place = _found(root / image)
        if size is None and place is not None:
            size = data._file(place, None).size
        items.append(Item(image, place, size, label))
        kinds[image] = where
    _unique(items, file)
    bare = next((item.image for item in items if item.label == []), None)
    if bare is not None and any(isinstance(item.label, str) for item in items):
        raise ValueError(f"{kinds[bare]} has no choice, but other tasks have one")
    return items


def _image_of(content: object, where: str) -> str:
    """The id of the image of a task's data: of 'image', or of the only text there."""
    texts = {k: v for k, v in content.items() if isinstance(v, str)} if isinstance(content, dict) else {}
    told = texts.get("image") or (next(iter(texts.values())) if len(texts) == 1 else None)
    if not told:
        raise ValueError(f"{where} has the data {content!r}; an entry 'image', or a single text, is needed")
    address = urlsplit(told)
    local = parse_qs(address.query).get("d")
    if local:
        name = local[0]
    elif address.scheme or told.startswith("/"):
        name = unquote(address.path).rstrip("/").split("/")[-1]
        if address.path.startswith("/data/upload/"):
            name = re.sub(r"^[0-9a-f]{8}-", "", name)
    else:
        name = told
    try:
        return _place(name).as_posix()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _label_of(result: list, image: str, where: str) -> tuple[str | list[Box], tuple[int, int] | None]:
    """The class or the boxes of one annotation, and the image's size where its regions tell it."""
    choices, boxes, sizes = [], [], set()
    for region in result:
        kind, value = region.get("type"), region.get("value") or {}
        if kind not in ("choices", "rectanglelabels"):
            raise ValueError(f"{where} has a region of type {kind!r}; allowed are 'choices' and 'rectanglelabels'")
        names = value.get(kind)
        if not isinstance(names, list) or len(names) != 1:
            raise ValueError(f"{where} has {kind} {names!r}; exactly one class is needed")
        height, width = region.get("original_height"), region.get("original_width")
        if height is not None or width is not None or kind == "rectanglelabels":
            if not all(isinstance(side, int) and side >= 1 for side in (height, width)):
                raise ValueError(
                    f"{where} has original_height {height!r} and original_width {width!r}; pixels are needed"
                )
            sizes.add((height, width))
        if kind == "choices":
            choices.append(_check_class(names[0]))
            continue
        if value.get("rotation") or region.get("rotation") or region.get("image_rotation"):
            raise ValueError(f"{where} has a rotated rectangle of {names[0]!r}; allowed are upright ones")
        percent = [value.get(k) for k in ("x", "y", "width", "height")]
        if not all(isinstance(v, (int, float)) for v in percent):
            raise ValueError(f"{where} has a rectangle with x, y, width, height {percent}; numbers are needed")
        x, y, w, h = (v / 100 for v in percent)
        thing = data._Object(_check_class(names[0]), (x, y, x + w, y + h))
        record = data._Record(image, Path(image), None, Path(where), fractions=True)
        inside = data._settled(record, thing, (height, width), Counter())
        if inside is not None:
            boxes.append(Box(thing.name, *inside))
    if len(sizes) > 1:
        raise ValueError(f"{where} tells several sizes of its image: {sorted(sizes)}")
    if len(choices) > 1 or (choices and boxes):
        raise ValueError(f"{where} has {len(choices)} choices and {len(boxes)} rectangles; one choice, or rectangles")
    return (choices[0] if choices else boxes), (next(iter(sizes)) if sizes else None)
