"""Pascal VOC: one XML file an image, `JPEGImages`, `Annotations`, `ImageSets/Main/<split>.txt`.

VOC07 and VOC12 count pixels from 1 (`one_based`): 1 is taken off xmin and ymin. No <object>: an image without objects.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from .files import SUFFIXES, by_key, class_name, find_files, key_of, read_text, reading, same_form, whole, write_text
from .formats import Object, Record, beside, settled, to_write, unique

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def voc_record(key: str, image: Path | None, file: Path, one_based: bool = False) -> Record:
    """What one XML file says about an image; a size of 0 in it counts as not told, as some tools write it."""
    declared = _DECLARED.match(file.read_bytes()) if file.is_file() else None
    text = "" if declared else re.sub(r"^\s*<\?xml[^>]*\?>", "", read_text(file))
    with reading(f"annotation {file} is truncated, not XML or wrongly encoded", "plain XML without entities"):
        if declared:
            text = declared.string[declared.end() :].decode(declared[1].decode())
        if "<!ENTITY" in text:
            raise ValueError("it defines entities")
        root = ElementTree.fromstring(text)
    with reading(f"annotation {file}", "an <annotation> with one <size> of whole numbers"):
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>")
        size = tuple(whole(side) for side in _numbers(root, "size", ("height", "width")))
    shift, objects = 1.0 if one_based else 0.0, []
    for i, element in enumerate(root.findall("object")):
        name, difficult = ((element.findtext(tag) or "").strip() for tag in ("name", "difficult"))
        with reading(f"{file}: object {i} ({name})", "a <name>, one <bndbox> of four numbers, <difficult> 0 or 1"):
            x1, y1, x2, y2 = _numbers(element, "bndbox", _SIDES)
            flag = {"": False, "0": False, "1": True}[difficult]
            objects.append(Object(class_name(name), (x1 - shift, y1 - shift, x2, y2), flag))
    return Record(root.findtext("sample") or key, image, size if all(size) else None, tuple(objects), source=file)


def _numbers(element: ElementTree.Element, inner: str, tags: Sequence[str]) -> list[float]:
    """The numbers in the tags of the one <inner>; not finite ones pass, for `settled` to name with their box."""
    texts = [[e.text or "" for e in found.findall(tag)] for found in element.findall(inner) for tag in tags]
    if [len(found) for found in texts] != [1] * len(tags):
        raise ValueError(f"<{inner}> with {', '.join(tags)} is not there once, but {texts}")
    return [float(text) for (text,) in texts]


def voc_records(root: Path, files: Sequence[Path]) -> list[Record]:
    """A record an XML file among `files`; Annotations/a.xml is the image 'a', whose file is None if missing."""
    xmls = by_key((f for f in files if f.suffix.lower() == ".xml"), root)
    images = by_key((f for f in files if f.suffix.lower() in SUFFIXES and key_of(f, root) in xmls), root)
    return unique(voc_record(key, images.get(key), file) for key, file in xmls.items())


def split_lines(file: Path, ids: Mapping[str, object]) -> list[str]:
    """The image ids of an ImageSets file: whole lines, ids may have spaces; a last column 1, 0 or -1 is cut off."""
    found: dict[str, None] = {}
    for line in (same_form(line.strip()) for line in read_text(file).splitlines() if line.strip()):
        key = line if line in ids else re.sub(r"\s+(-1|0|1)$", "", line)
        if key not in ids or key in found:
            raise ValueError(f"split file {file} lists the image id {line!r}, which is not there, or twice")
        found[key] = None
    if not found:
        raise ValueError(f"split file {file} is empty; it should list one image id a line")
    return list(found)


def devkit_records(root: Path, split: str, one_based: bool) -> list[Record]:
    """The images of one split of a folder in the devkit's layout; without trainval.txt it is train and val."""
    images, sets = by_key(find_files(root / "JPEGImages", *SUFFIXES), root / "JPEGImages"), root / "ImageSets" / "Main"
    parts = ["train", "val"] if split == "trainval" and not (sets / "trainval.txt").is_file() else [split]
    ids = [i for part in parts for i in split_lines(sets / f"{part}.txt", images)]
    ids = sorted(ids) if len(parts) > 1 else ids
    return [voc_record(i, images[i], root / "Annotations" / f"{i}.xml", one_based) for i in ids]


def read_voc(folder: str | Path) -> list[Record]:
    """All VOC XML files below a folder, with their images where they lie."""
    if records := voc_records(Path(folder), find_files(folder, *SUFFIXES, ".xml")):
        return [settled(record) for record in records]
    raise ValueError(f"folder {folder} has no annotation: no .xml file in it")


def write_voc(folder: str | Path, records: Iterable[Record], classes: Sequence[str]) -> Path:
    """`Annotations/<image>.xml` with float coordinates from 0; images belong into `JPEGImages`. Reads back exactly."""
    folder, records = Path(folder), to_write(records, classes, "VOC XML", ("difficult",))
    for record, name in zip(records, beside(folder / "Annotations", records, ".xml"), strict=True):
        (height, width), file = map(int, record.size), record.file.name if record.file else record.id
        lines = ["<annotation>", f"<filename>{escape(file)}</filename>", f"<sample>{escape(record.id)}</sample>"]
        lines.append(f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>")
        for thing in record.objects:
            box = "".join(f"<{tag}>{float(v)!r}</{tag}>" for tag, v in zip(_SIDES, thing.box, strict=True))
            what = f"<name>{escape(thing.name)}</name><difficult>{int(thing.difficult)}</difficult>"
            lines.append(f"<object>{what}<bndbox>{box}</bndbox></object>")
        write_text(name, "\n".join([*lines, "</annotation>", ""]))
    return folder
