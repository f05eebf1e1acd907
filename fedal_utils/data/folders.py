"""A folder of the user's own: which format it is in, which images belong to it, and how it splits into train and test.

The split is told by `ImageSets/Main`, by data.yaml (or train.txt, val.txt, test.txt), or by the names of folders and
COCO files; otherwise it is drawn 80 : 20. Test is `test`, or `val` without one; train is the rest. An image without an
annotation is not labelled: it belongs to train. Without objects it has an empty annotation (in COCO: an entry).
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..seeding import rng_for
from .files import SUFFIXES, find_files, key_of, read_text, same_form
from .formats import Record
from .formats_json import coco_records, read_json
from .formats_txt import KITTI_CLASSES, data_yamls, kitti_records, kitti_split, yolo_names, yolo_records
from .formats_voc import split_lines, voc_records
from .types import Reading

_SPLITS = dict.fromkeys(("train", "training", "trainval"), "train") | {"test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
_NO_WORD = ("", "set", "data", "images", "labels")
_TOOLS = {"LabelMe": {"shapes"}, "VIA": {"_via_img_metadata"}, "Label Studio": {"data", "annotations"}}
_TOOLS |= {"COCO or CreateML": {"annotations"}}  # by the keys of their files
_NO_PHOTOGRAPHS = re.compile(r"(?i)mask|thumb|preview|segment|depth|visual|annot")  # names of folders
_BOX_COLUMN = re.compile(rb"(?i)\b(x_?min|x1|bbox|left)\b")


class Found(NamedTuple):
    """Both sides of a set before any pixel is read."""

    train: list[Record]
    test: list[Record]
    class_names: Sequence[str] | None
    reading: Reading = Reading()
    drops: Mapping[str, int] = MappingProxyType({})


def split_of(words: Iterable[str]) -> str | None:
    """'train', 'val' or 'test', whichever a word says first: train2017, train_set, valid, dev, testing, ..."""
    for word in words:
        said = {_SPLITS.get(part) for part in re.split(r"[^a-z]+", word.lower()) if part not in _NO_WORD}
        if len(said) == 1 and None not in said:
            return said.pop()
    return None


def drawn_split(records: Sequence[Record], seed: int, source: object) -> tuple[list[Record], list[Record], str]:
    """80 : 20 of the labelled ones in an order that labels do not change, and what to say of it; at least one in test.

    Without any label, test is what to label first for the evaluation: 4 % of all, 50 at most.
    """
    if len(records) < 2:
        raise ValueError(f"{source}: {len(records)} image(s) cannot be split into train and test; 2 are needed")
    known = [r.objects is not None or r.label is not None for r in records]
    count = max(1, round(0.2 * sum(known)) if any(known) else min(50, round(0.04 * len(records))))
    order = rng_for(seed, "split", "test").permutation(len(records)).tolist()
    test = set([i for i in order if known[i] or not any(known)][:count])
    sides = ([r for i, r in enumerate(records) if (i in test) == side] for side in (False, True))
    part = "80 : 20" + " of the labelled images" * (0 < sum(known) < len(known)) if any(known) else "4 % for test"
    return *sides, f"drawn {part} with seed {seed}, as nothing tells one"


def place_of(name: str, root: Path, known: Sequence[str]) -> Path:
    """The user's own folder (or .zip, or a JSON file to be told about), here or in `root`; ValueError if none."""
    for path in (Path(name).expanduser(), root / name):
        if path.is_dir() or (path.suffix.lower() in (".zip", ".json") and path.is_file()):
            return path
    allowed = f"{', '.join(known)} or the path of a folder of images"
    raise ValueError(f"data set {name!r} is not known, nor a folder here or in {root}; allowed are {allowed}")


def own_folder(root: Path, seed: int) -> Found:
    """Both sides of a folder in any of the formats."""
    if (root / "training" / "label_2").is_dir():
        return kitti_found(root, KITTI_CLASSES)
    files = [root] if root.is_file() else find_files(root)
    images = [f for f in files if f.suffix.lower() in SUFFIXES]
    keys = {key_of(path, root) for path in images}
    xmls = [f for f in files if f.suffix.lower() == ".xml"]
    xmls = [f for f in xmls if key_of(f, root) in keys or f.parent.name == "Annotations"]
    texts = [f for f in files if f.suffix.lower() == ".txt" and key_of(f, root) in keys]
    jsons = {f: read_json(f) for f in files if f.suffix.lower() == ".json"}
    coco = {f: c for f, c in jsons.items() if isinstance(c, dict) and {"images", "annotations"} <= c.keys()}
    coco = {} if xmls else coco
    foreign = _foreign([f for f in files if f not in coco and f not in xmls], jsons)
    if foreign and not (xmls or coco or texts):  # or somebody would take the images for unlabelled
        tool, file = next(iter(foreign.items()))
        way = "convert them to COCO, VOC or YOLO"
        if tool == "Label Studio":
            way = f"read them with `python -m fedal_utils import labels.sqlite {file} --format label_studio`"
        raise ValueError(f"{root} has labels of {tool} ({file}), which is no data set by itself; {way}")
    if not images:
        raise ValueError(f"data set {str(root)!r} is empty: no {', '.join(SUFFIXES)} file in it")
    names, told, said = None, [], {}
    if xmls:
        layout, records = "Pascal VOC", voc_records(root, files)
    elif coco:
        layout, (records, names, said), told = "COCO", _coco(root, images, coco), list(coco)
    elif texts:
        numbers, told = yolo_names(files)
        layout, (records, names) = "YOLO", yolo_records(root, files, numbers)
    else:
        layout = "images without labels"
        records = [Record(path.relative_to(root).as_posix(), path, source=path) for path in images]
    for record in (record for record in records if record.file is None):
        raise ValueError(f"annotation {record.source} has no image {record.id} with one of {', '.join(SUFFIXES)}")
    drops = Counter({f"labels of {tool} beside it, such as {file.name}, not read": 1 for tool, file in foreign.items()})
    if labelled := [record for record in records if record.objects is not None]:
        records = _with_the_rest(root, layout, labelled, images, drops)
        names = names or tuple(sorted({thing.name for record in labelled for thing in record.objects}))
    train, test, split_from = _sides(root, files, records, said, seed, drops)
    classes_from = ", ".join(f.relative_to(root).as_posix() for f in told) or ("the objects" if labelled else "")
    return Found(train, test, names, Reading(layout, classes_from, split_from), drops)


def kitti_found(root: Path, class_names: Sequence[str]) -> Found:
    """KITTI's images with van Bommel's split."""
    records = {r.id: r for r in kitti_records(root, class_names)}
    train, held = ([records[i] for i in side] for side in kitti_split(records))
    reading = Reading("KITTI", "KITTI's types", "70 : 30 by a fixed seed, as in van Bommel's code")
    return Found(train, held, class_names, reading)


def _coco(
    root: Path, images: Sequence[Path], contents: Mapping[Path, Any]
) -> tuple[list[Record], tuple[str, ...] | None, dict[Path, str]]:
    """Records and class names of all COCO files, and the split of each image whose file's name tells one."""
    plain = {f: c for f, c in contents.items() if f.name.startswith("instances")}
    contents = plain or contents  # beside captions and key points of the same images
    by_name, names, said, read = _by_name(images), None, {}, []
    for file, content in contents.items():
        inner = file.relative_to(root)
        split = split_of([*reversed(re.split(r"[._-]", inner.name)), *reversed(inner.parts[:-1])])
        if split is None and len(contents) > 1:
            listed = ", ".join(str(f.relative_to(root)) for f in contents)
            raise ValueError(f"{root} has several COCO files ({listed}); each name must say train, val or test: {file}")

        def find(name: str, file: Path = file, split: str | None = split) -> Path:
            def likely(path: Path) -> tuple[bool, ...]:  # rather than masks or previews of the same names
                parts = path.relative_to(root).parts
                return file.parent in path.parents, split_of(parts) == split, parts[0].lower() == "images"

            return _named(name, by_name, file, likely) or file.parent / name

        records, told = coco_records(file, content, find)
        if names not in (None, told):
            raise ValueError(f"annotation {file} has the categories {list(told)}, another file of {root} {list(names)}")
        names, read = told, read + records
        said |= {record.file: split for record in records} if split else {}
    if twice := [file for file, n in Counter(record.file for record in read).items() if n > 1]:
        raise ValueError(f"image {twice[0]} stands more than once in {', '.join(map(str, contents))}")
    if len({record.id for record in read}) < len(read):  # equal file names in two folders: ids carry the folder
        read = [replace(record, id=record.file.relative_to(root).as_posix()) for record in read]
    return read, names, said


def _foreign(files: Sequence[Path], contents: Mapping[Path, Any]) -> dict[str, Path]:
    """The first label file of each tool that is not read."""
    found: dict[str, Path] = {}
    for file in (f for f in files if f.suffix.lower() in (".json", ".xml", ".csv")):
        content = contents.get(file, ())
        entry = content[0] if isinstance(content, list) and content else content
        keys, head = set(entry) if isinstance(entry, dict) else set(), file.read_bytes()[:2000]
        tools = [tool for tool, needed in _TOOLS.items() if needed <= keys]
        tools += ["CVAT"] if file.suffix.lower() == ".xml" and b"<annotations" in head else []
        tools += ["a CSV table"] if file.suffix.lower() == ".csv" and _BOX_COLUMN.search(head) else []
        found = {tool: file for tool in tools[:1]} | found
    return found


def _with_the_rest(
    root: Path, layout: str, labelled: list[Record], images: Sequence[Path], drops: Counter
) -> list[Record]:
    """The labelled images, and the others as not labelled; counts in `drops` what is left out.

    Those are the images of a folder without any label whose name, or whose images' names, say that they are masks,
    thumbnails or previews of the others.
    """
    known, records = {record.file for record in labelled}, list(labelled)
    folders, names, rest = {path.parent for path in known}, {path.stem for path in known}, defaultdict(list)
    for path in (path for path in images if path not in known):
        rest[path.parent].append(path)
    for folder, paths in rest.items():
        inner = folder.relative_to(root)
        copies = _NO_PHOTOGRAPHS.search(str(inner)) or names & {path.stem for path in paths}
        if copies and folder not in folders and inner.parts[:1] != ("images",) and not split_of(inner.parts):
            drops[f"left out in {inner.as_posix()}, where no image has a label"] += len(paths)
            continue
        for path in paths:
            key = path.relative_to(root).as_posix() if layout == "COCO" else key_of(path, root)
            records.append(Record(key, path, source=path))
    if layout == "COCO" and len(records) == len(labelled):
        return records  # in the order of its ids
    return sorted(records, key=lambda record: record.file)


def _sides(
    root: Path, files: Sequence[Path], records: list[Record], said: Mapping[Path, str], seed: int, drops: Counter
) -> tuple[list[Record], list[Record], str]:
    """Train, test, and how that was decided; images that no list names are left out and counted."""
    for told, by in _told(root, files, records, said):
        held = "test" if told.get("test") else "val"
        train, test = set(told.get("train", ())), set(told.get(held, ()))
        learn = train | set(told.get("val", ())) - test
        if not test or not learn - test:
            continue
        if both := test & train:
            raise ValueError(f"{root}: image {min(both)} is in train and in {held} ({by})")
        train, test = ([r for r in records if r.file in side] for side in (learn, test))
        drops["in_no_split"] += len(records) - len(train) - len(test)
        labelled = [r for r in test if r.objects is not None]
        if any(r.objects is not None for r in records):
            if not labelled:
                first = ", ".join(r.id for r in test[:3])
                raise ValueError(f"{root}: no image of {held} is labelled ({by}); label some of them first: {first}")
            drops["test_not_labelled"] += len(test) - len(labelled)
            test = labelled
        return train, test, by
    return drawn_split(records, seed, root)


def _told(
    root: Path, files: Sequence[Path], records: Sequence[Record], said: Mapping[Path, str]
) -> Iterator[tuple[dict[str | None, list[Path]], str]]:
    """What tells a split, the plainest first: the images of train, val and test, and what to say of it."""
    sets = {f.stem: f for f in files if f.suffix == ".txt" and f.parts[-3:-1] == ("ImageSets", "Main")}
    names = ["trainval", "test"] if {"trainval", "test"} <= sets.keys() else ["train", "val", "test"]
    names = [split for split in names if split in sets]
    if len(names) > 1:
        ids = {r.id.split("/")[-1]: r.file for r in records} | {r.id: r.file for r in records}
        told = {_SPLITS[split]: [ids[i] for i in split_lines(sets[split], ids)] for split in names}
        yield told, f"told by ImageSets/Main ({', '.join(names[:-1])}; {names[-1]})"
    images = [record.file for record in records]
    by_name = _by_name(images)
    for file, content in data_yamls(files).items():
        bases, told = (file.parent / str(content.get("path") or ""), file.parent), {}
        for split in {"train", "val", "valid", "test"} & content.keys():
            entries = content[split] if isinstance(content[split], list) else [content[split]]
            told[_SPLITS[split]] = [p for entry in entries for p in _entry(str(entry), bases, root, images, by_name)]
        yield told, f"told by {file.relative_to(root).as_posix()}"
    lists = [split for split in ("train", "val", "test") if root / f"{split}.txt" in files]
    told = {split: _entry(f"{split}.txt", (root,), root, images, by_name) for split in lists}
    yield told, f"told by {', '.join(f'{split}.txt' for split in lists)}"
    told = defaultdict(list)
    for path in images:
        told[said.get(path) or split_of(path.relative_to(root).parts[:-1])].append(path)
    if None in told and len(told) > 2:
        raise ValueError(f"image {told[None][0]} lies in none of the folders train, val, test, but others do")
    yield told, "told by the names of folders and files"


def _entry(entry: str, bases: Sequence[Path], root: Path, images: Sequence[Path], by_name: Mapping) -> list[Path]:
    """The images of an entry, a folder or a list of files, never outside `root`; [] if there is no such place."""
    top = os.path.abspath(root) + os.sep
    for text in (entry, re.sub(r"^(\.\./)+", "", entry)):  # some tools write ../train for the folder beside
        for place in (os.path.abspath(base / text.replace("\\", "/")) for base in bases):
            if place.startswith(top) and os.path.isdir(place):
                return [path for path in images if os.path.abspath(path).startswith(place + os.sep)]
            if place.startswith(top) and os.path.isfile(place):
                lines = [line.strip() for line in read_text(Path(place)).splitlines() if line.strip()]
                found = {line: _named(line, by_name, Path(place)) for line in lines}
                if missing := [line for line, path in found.items() if path is None]:
                    raise ValueError(f"{place} lists {missing[0]!r}; the set has no such image")
                return list(found.values())
    return []


def _by_name(images: Iterable[Path]) -> dict[str, list[Path]]:
    found = defaultdict(list)
    for path in images:
        found[same_form(path.name)].append(path)
    return found


def _named(
    name: str, by_name: Mapping[str, list[Path]], file: Path, likely: Callable[[Path], tuple] = lambda path: ()
) -> Path | None:
    """The image whose path ends most as `name` does, then the most likely one; ValueError if that leaves several."""
    parts = [p for p in same_form(name).replace("\\", "/").split("/") if p not in ("", ".", "..")][::-1]

    def rank(path: Path) -> tuple:
        return len(os.path.commonprefix([same_form(path.as_posix()).split("/")[::-1], parts])), *likely(path)

    found = by_name.get(parts[0], []) if parts else []
    if len(found) > 1:
        best = max(map(rank, found))
        found = [path for path in found if rank(path) == best]
    if len(found) > 1:
        raise ValueError(f"{file}: image {name!r} could be {found[0]} or {found[1]}")
    return found[0] if found else None
