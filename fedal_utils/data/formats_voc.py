"""Pascal VOC: one XML file an image, `JPEGImages`, `Annotations`, `ImageSets/Main/<split>.txt`.

Boxes are read as they are written; VOC07 and VOC12 count pixels from 1 (`one_based`): 1 is taken off xmin and ymin.
`difficult` objects are ignore. An <annotation> without <object> is an image without objects.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .files import by_key, class_name, find_files, images_in, read_text, same_form, write_text
from .formats import Object, Record, beside, to_write, unique, with_image
from .pixels import SUFFIXES

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")


def xml_root(file: Path) -> ElementTree.Element:
    """The root of an XML file in the encoding that it declares; ValueError that names the file."""
    declared = _DECLARED.match(file.read_bytes()[:200]) if file.is_file() else None
    try:
        if declared is None:
            text = re.sub(r"^\s*<\?xml[^>]*\?>", "", read_text(file))
        else:
            text = file.read_bytes()[declared.end() :].decode(declared[1].decode())
        if "<!ENTITY" in text:
            raise ValueError(f"annotation {file} defines entities; allowed is plain XML")
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, UnicodeError, LookupError) as error:
        raise ValueError(f"annotation {file} is truncated, not XML or wrongly encoded: {error}") from None


def _number(element: ElementTree.Element, tag: str, where: str) -> float:
    """The number in <tag>; not finite ones pass, for `settled` to name with their box."""
    texts = [found.text for found in element.findall(tag)]
    try:
        (text,) = texts
        return float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{where} has <{tag}> {texts}; one number is needed") from None


def _only(element: ElementTree.Element, tag: str, where: str) -> ElementTree.Element:
    found = element.findall(tag)
    if len(found) != 1:
        raise ValueError(f"{where} has {len(found)} <{tag}>; one is needed")
    return found[0]


def voc_record(key: str, image: Path | None, file: Path, one_based: bool = False) -> Record:
    """What one XML file says about an image; a size of 0 in it counts as not told, as some tools write it."""
    root = xml_root(file)
    if root.tag != "annotation":
        raise ValueError(f"annotation {file} has the root <{root.tag}>; <annotation> is needed")
    size = _only(root, "size", f"annotation {file}")
    sides = [_number(size, tag, f"{file}: <size>") for tag in ("height", "width")]
    if not all(side.is_integer() and 0 <= side < 1e9 for side in sides):  # False for nan and inf as well
        raise ValueError(f"annotation {file} has the <size> {sides} (height, width); whole numbers are needed")
    shift = 1.0 if one_based else 0.0
    objects = []
    for i, element in enumerate(root.findall("object")):
        name = class_name((element.findtext("name") or "").strip(), f"{file}: object {i}")
        where = f"{file}: object {i} ({name})"
        box = _only(element, "bndbox", where)
        x1, y1, x2, y2 = (_number(box, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax"))
        difficult = (element.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            raise ValueError(f"{where} has <difficult> {difficult!r}; allowed are 0 and 1")
        objects.append(Object(name, (x1 - shift, y1 - shift, x2, y2), difficult == "1"))
    stated = tuple(int(side) for side in sides) if min(sides) > 0 else None
    return Record(root.findtext("sample") or key, image, stated, tuple(objects), source=file)


def split_lines(file: Path, ids: Mapping[str, object]) -> list[str]:
    """The image ids of an ImageSets file: whole lines, ids may have spaces; a last column 1, 0 or -1 is cut off."""
    if not file.is_file():
        raise ValueError(f"split file {file} does not exist; it should list one image id a line")
    found = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        line = whole = same_form(line.strip())
        if line and line not in ids:
            line = re.sub(r"\s+(-1|0|1)$", "", line)
            if line not in ids:
                raise ValueError(f"split file {file}: line {number} lists the image id {whole!r}; there is none such")
        if line:
            found.append(line)
    if not found:
        raise ValueError(f"split file {file} is empty; it should list one image id a line")
    twice = [i for i, n in Counter(found).items() if n > 1]
    if twice:
        raise ValueError(f"split file {file} lists the image id {twice[0]!r} more than once")
    return found


def devkit_records(root: Path, split: str, one_based: bool) -> list[Record]:
    """The images of one split of a folder in the devkit's layout; without trainval.txt it is train and val."""
    images, sets = images_in(root / "JPEGImages"), root / "ImageSets" / "Main"
    if split == "trainval" and not (sets / "trainval.txt").is_file() and (sets / "train.txt").is_file():
        ids = sorted(split_lines(sets / "train.txt", images) + split_lines(sets / "val.txt", images))
    else:
        ids = split_lines(sets / f"{split}.txt", images)
    return [voc_record(i, images[i], root / "Annotations" / f"{i}.xml", one_based) for i in ids]


def read_voc(folder: str | Path, one_based: bool = False) -> list[Record]:
    """All VOC XML files below a folder, with their images where they lie; Annotations/a.xml is the image 'a'."""
    root = Path(folder)
    images, files = (by_key(find_files(root, *suffixes), root) for suffixes in (SUFFIXES, (".xml",)))
    if not files:
        raise ValueError(f"folder {root} has no annotation: no .xml file in it")
    return unique([with_image(voc_record(key, images.get(key), file, one_based)) for key, file in files.items()])


def write_voc(folder: str | Path, records: Iterable[Record], classes: Sequence[str]) -> Path:
    """`Annotations/<image>.xml` with float coordinates from 0; images belong into `JPEGImages`. Reads back exactly."""
    folder = Path(folder)
    records = to_write(records, classes, "VOC XML", crowd=False)
    for record, name in zip(records, beside(folder / "Annotations", records, ".xml"), strict=True):
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = record.file.name if record.file else record.id
        ElementTree.SubElement(root, "sample").text = record.id
        size = ElementTree.SubElement(root, "size")
        for tag, value in (("width", record.size[1]), ("height", record.size[0]), ("depth", 3)):
            ElementTree.SubElement(size, tag).text = str(int(value))
        for thing in record.objects:
            element = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(element, "name").text = thing.name
            ElementTree.SubElement(element, "difficult").text = str(int(thing.difficult))
            frame = ElementTree.SubElement(element, "bndbox")
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), thing.box, strict=True):
                ElementTree.SubElement(frame, tag).text = repr(float(value))
        ElementTree.indent(root)
        write_text(name, ElementTree.tostring(root, encoding="unicode") + "\n")
    return folder
