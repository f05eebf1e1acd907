"""Pascal VOC: one XML file an image, `JPEGImages`, `Annotations`, `ImageSets/Main/<split>.txt`.

VOC07 and VOC12 count pixels from 1 (`one_based`): 1 is taken off xmin and ymin. No <object>: an image without objects.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .files import by_key, class_name, find_files, images_in, key_of, read_text, reading, same_form, whole, write_text
from .formats import Object, Record, beside, settled, to_write, unique
from .pixels import SUFFIXES

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def _xml_root(file: Path) -> ElementTree.Element:
    raw = file.read_bytes() if file.is_file() else b""
    declared = _DECLARED.match(raw)
    text = "" if declared else read_text(file)
    with reading(f"annotation {file} is truncated, not XML or wrongly encoded", "plain XML without entities"):
        if declared:
            text = raw[declared.end() :].decode(declared[1].decode())
        if "<!ENTITY" in text:
            raise ValueError("it defines entities")
        return ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))


def _numbers(element: ElementTree.Element, inner: str, tags: Sequence[str]) -> list[float]:
    """The numbers in the tags of the one <inner>; not finite ones pass, for `settled` to name with their box."""
    texts = [[e.text or "" for e in found.findall(tag)] for found in element.findall(inner) for tag in tags]
    if [len(found) for found in texts] != [1] * len(tags):
        raise ValueError(f"<{inner}> with {', '.join(tags)} is not there once, but {texts}")
    return [float(text) for (text,) in texts]


def voc_record(key: str, image: Path | None, file: Path, one_based: bool = False) -> Record:
    """What one XML file says about an image; a size of 0 in it counts as not told, as some tools write it."""
    root = _xml_root(file)
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


def voc_records(root: Path, files: Sequence[Path]) -> list[Record]:
    """A record an XML file among `files`; Annotations/a.xml is the image 'a', whose file is None if missing."""
    xmls = by_key((f for f in files if f.suffix.lower() == ".xml"), root)
    images = by_key((f for f in files if f.suffix.lower() in SUFFIXES and key_of(f, root) in xmls), root)
    return unique(voc_record(key, images.get(key), file) for key, file in xmls.items())


def split_lines(file: Path, ids: Mapping[str, object]) -> list[str]:
    """The image ids of an ImageSets file: whole lines, ids may have spaces; a last column 1, 0 or -1 is cut off."""
    lines = [same_form(line.strip()) for line in read_text(file).splitlines() if line.strip()]
    found = [line if line in ids else re.sub(r"\s+(-1|0|1)$", "", line) for line in lines]
    times = Counter(found)
    odd = [line for line, key in zip(lines, found, strict=True) if key not in ids or times[key] > 1]
    if odd or not found:
        told = f"lists the image id {odd[0]!r}, which does not exist or stands there twice" if odd else "is empty"
        raise ValueError(f"split file {file} {told}; it should list one image id a line")
    return found


def devkit_records(root: Path, split: str, one_based: bool) -> list[Record]:
    """The images of one split of a folder in the devkit's layout; without trainval.txt it is train and val."""
    images, sets = images_in(root / "JPEGImages"), root / "ImageSets" / "Main"
    if split == "trainval" and not (sets / "trainval.txt").is_file() and (sets / "train.txt").is_file():
        ids = sorted(split_lines(sets / "train.txt", images) + split_lines(sets / "val.txt", images))
    else:
        ids = split_lines(sets / f"{split}.txt", images)
    return [voc_record(i, images[i], root / "Annotations" / f"{i}.xml", one_based) for i in ids]


def read_voc(folder: str | Path) -> list[Record]:
    """All VOC XML files below a folder, with their images where they lie."""
    records = voc_records(Path(folder), find_files(folder, *SUFFIXES, ".xml"))
    if not records:
        raise ValueError(f"folder {folder} has no annotation: no .xml file in it")
    return [settled(record) for record in records]


def write_voc(folder: str | Path, records: Iterable[Record], classes: Sequence[str]) -> Path:
    """`Annotations/<image>.xml` with float coordinates from 0; images belong into `JPEGImages`. Reads back exactly."""
    folder, add = Path(folder), ElementTree.SubElement
    records = to_write(records, classes, "VOC XML", ("difficult",))
    for record, name in zip(records, beside(folder / "Annotations", records, ".xml"), strict=True):
        root = ElementTree.Element("annotation")
        add(root, "filename").text = record.file.name if record.file else record.id
        add(root, "sample").text = record.id
        size = add(root, "size")
        for tag, value in (("width", record.size[1]), ("height", record.size[0]), ("depth", 3)):
            add(size, tag).text = str(int(value))
        for thing in record.objects:
            element = add(root, "object")
            add(element, "name").text = thing.name
            add(element, "difficult").text = str(int(thing.difficult))
            frame = add(element, "bndbox")
            for tag, value in zip(_SIDES, thing.box, strict=True):
                add(frame, tag).text = repr(float(value))
        ElementTree.indent(root)
        write_text(name, ElementTree.tostring(root, encoding="unicode") + "\n")
    return folder
