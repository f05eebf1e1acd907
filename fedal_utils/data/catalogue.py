"""Data sets by name, folders of one's own by path: `load`, `load_classes`, and `inspect_folder`, which only tells."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from ..seeding import rng_for
from . import download
from .classification import CLASS_NAMES, find_classes
from .digits import Digits, digit_scenes
from .files import size_pair
from .folders import Found, kitti_found, own_folder, place_of
from .formats import Record, assemble, settled
from .formats_json import coco_records, read_json
from .formats_txt import KITTI_CLASSES, KITTI_TWO
from .formats_voc import VOC_CLASSES, devkit_records, voc_record
from .types import Dataset, Reading

BCCD_CLASSES = ("RBC", "WBC", "Platelets")
HIT_UAV_CLASSES = ("Person", "Car", "Bicycle", "OtherVehicle")


class _Source(NamedTuple):
    find: Callable[[Path], Found]
    places: tuple[str, ...]  # below the data root
    origin: str
    download: str | None = None  # a name for `fetch`


def _devkit(class_names: Sequence[str], one_based: bool, train: str, test: str, place: Path) -> Found:
    """Splits of a folder in VOC's layout: names, or paths from it to those of another year, with spaces between."""
    paths = ([place / split for split in side.split()] for side in (train, test))
    sides = ([r for path in side for r in devkit_records(path.parent, path.name, one_based)] for side in paths)
    return Found(*sides, class_names)


def _voc07_half(place: Path) -> Found:
    """VOC07's test half, split once more: the folder VOC07 has it scaled down and split, the devkit has it as it is."""
    if place.name == "VOC07":
        return _devkit(VOC_CLASSES, True, "trainval", "test", place)
    every, held = devkit_records(place, "test", one_based=True), read_json(Path(__file__).with_name("voc07_half.json"))
    return Found(*([r for r in every if (r.id in held) == side] for side in (False, True)), VOC_CLASSES)


def _coco(files: Mapping[str, str], place: Path) -> Found:
    """Two COCO files, each with the folder of its images."""
    places = ((place / file, place / folder) for file, folder in files.items())
    train, test = (coco_records(file, read_json(file), folder.joinpath) for file, folder in places)
    return Found(train[0], *test)


def _hit_uav(place: Path) -> Found:
    """HIT-UAV, its days as groups: the published layout, or a copy in COCO's with `group` and DontCare as crowd.

    Test is the last fifth of each day by frame number. DontCare is a region of every class, to be ignored.
    """
    if (place / "instances_train.json").is_file():
        found = _coco(dict.fromkeys(("instances_train.json", "instances_test.json"), "images"), place)
        return found._replace(class_names=HIT_UAV_CLASSES)
    days: dict[str, list[Record]] = defaultdict(list)
    for split in ("train", "val", "test"):
        for entry in read_json(place / "normal_json" / "annotations" / f"{split}.json")["images"]:
            file = place / "normal_xml" / "JPEGImages" / Path(entry["filename"]).name
            record = voc_record(file.name, file, file.parents[1] / "Annotations" / f"{file.stem}.xml")
            things, day = [], str(entry["date_captured"])
            for thing in record.objects:
                names = HIT_UAV_CLASSES if thing.name == "DontCare" else (thing.name,)
                things += [replace(thing, name=name, crowd=thing.name == "DontCare") for name in names]
            days[day].append(replace(record, id=file.name, objects=tuple(things), group=day))
    train, test = [], []
    for records in days.values():
        records.sort(key=lambda record: int(record.file.stem.split("_")[-1]))
        train += records[: round(0.8 * len(records))]
        test += records[round(0.8 * len(records)) :]
    return Found(*(sorted(side, key=lambda record: record.id) for side in (train, test)), HIT_UAV_CLASSES)


_VOC = "http://host.robots.ox.ac.uk/pascal/VOC/"
_KITTI = "https://www.cvlibs.net/datasets/kitti/eval_object.php, or by `python -m fedal_utils data kitti` (12 GB),"
_BCCD = "https://github.com/Shenggan/BCCD_Dataset"
_07, _12, _RAW = ("VOCdevkit/VOC2007",), ("VOCdevkit/VOC2012",), ("kitti", "Kitti/raw")  # Kitti/raw is torchvision's
_COCO = {f"annotations/instances_{split}.json": split for split in ("train2017", "val2017")}
_voc = partial(_devkit, VOC_CLASSES, True)
SOURCES = {
    "bccd": _Source(partial(_devkit, BCCD_CLASSES, False, "trainval", "test"), ("BCCD",), _BCCD, "BCCD"),
    "hit-uav": _Source(_hit_uav, ("HIT-UAV",), "https://github.com/suojiashun", "HIT-UAV"),
    "voc07": _Source(partial(_voc, "trainval", "test"), _07, _VOC + "voc2007"),
    "voc07-half": _Source(_voc07_half, ("VOC07", *_07), _VOC + "voc2007"),
    "voc12": _Source(partial(_voc, "train", "val"), _12, _VOC + "voc2012"),
    "voc0712": _Source(partial(_voc, "../VOC2007/trainval trainval", "../VOC2007/test"), _12, _VOC),
    "coco": _Source(partial(_coco, _COCO), ("coco",), "https://cocodataset.org/#download"),
    "kitti": _Source(partial(kitti_found, class_names=KITTI_CLASSES), _RAW, _KITTI),
    "kitti-2": _Source(partial(kitti_found, class_names=KITTI_TWO), _RAW, _KITTI),
}
NAMES = ("digits", *SOURCES)


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds the data sets: the argument, else $FEDAL_DATA, else `data`."""
    return Path(root or os.environ.get("FEDAL_DATA") or "data").expanduser()


def missing(name: str, root: str | Path | None = None) -> str:
    """How to get a set by name that is not in the data root; "" if it is, is drawn, or comes by itself (CIFAR)."""
    root = data_root(root)
    if name not in SOURCES or any((root / place).is_dir() for place in SOURCES[name].places):
        return ""
    source = SOURCES[name]
    way = f"python -m fedal_utils data {source.download.lower()}" if source.download else f"get it from {source.origin}"
    return f"{root / source.places[0]} does not exist; {way}".rstrip(",")


def find(name: str, root: Path, seed: int = 0, kind: str = "boxes", fetch: bool = True) -> Found:
    """Both sides of a set before any pixel is read: a known name, or a folder here or in `root`; kind: see `load`."""
    if kind == "classes":
        return find_classes(name, root, seed)
    if name not in SOURCES:
        return own_folder(place_of(name, root, NAMES), seed)
    source = SOURCES[name]
    place = next((root / place for place in source.places if (root / place).is_dir()), None)
    if place is None and source.download and fetch:
        place = download.fetch(source.download, root)
    if place is None:
        folder = root / source.places[0]
        raise ValueError(f"data set {name!r}: {folder} does not exist; get it from {source.origin}, or set FEDAL_DATA")
    return source.find(place)._replace(reading=Reading(name, "the published list", "as published"))


def load(
    name: str,
    image_size: int | Sequence[int],
    root: str | Path | None = None,
    seed: int = 0,
    limit: tuple[int | None, int | None] | None = None,
    min_object: float = 0,
    digits: Digits | None = None,
    kind: str = "boxes",
) -> tuple[Dataset, Dataset]:
    """Train and test of a data set by name, or of a folder of the user's own, here or in the data root.

    image_size: (height, width), or one side, that every image is letterboxed to. root: see `data_root`.
    seed: also draws the digits, and the 80 : 20 split of a folder that tells none; KITTI's split is fixed.
    limit: at most so many train and test images, drawn by a named generator, nested, in the set's order.
    min_object: objects whose shorter side, letterboxed, is below this many pixels become ignore.
    digits: DigitScenes in train and test. kind: "boxes", or "classes" of whole images: one of `CLASS_NAMES`, or class
        folders, also in a .zip. Of a folder that is labelled in part, `Dataset.labelled` of train tells which are.
    """
    limit = limit or (None, None)
    if name == "digits":
        digits = digits or Digits()
        scenes = tuple(n if most is None else min(n, most) for n, most in zip(digits.scenes, limit, strict=True))
        return digit_scenes(digits._replace(scenes=scenes), size_pair(image_size), seed, min_object)
    found = find(name, data_root(root), seed, kind)
    if shared := {r.id for r in found.train} & {r.id for r in found.test}:
        raise ValueError(f"data set {name!r}: image id {min(shared)!r} is in train and in test")
    sides, label = [], Path(name).absolute().name.removesuffix(".zip")
    for split, records, most in zip(("train", "test"), (found.train, found.test), limit, strict=True):
        kept = np.sort(rng_for(seed, "limit", split).permutation(len(records))[:most])  # 50 are among 100 of another
        told = found.class_names, min_object, found.drops if split == "train" else None, found.reading
        sides.append(assemble(f"{label} {split}", [records[i] for i in kept], image_size, *told))
    return sides[0], sides[1]


load_classes = partial(load, kind="classes")


def inspect_folder(name: str, root: str | Path | None = None, seed: int = 0) -> dict[str, Any]:
    """What `load` or `load_classes` reads, without pixels: a dict that JSON can hold.

    Keys: format, classes, classes_from, split_from, left_out (how many by reason), and under `splits` for train and
    test images, not_labelled, boxes, per_class (images, where a class is a whole image's) and the first ids.
    """
    if name == "digits":
        raise ValueError("data set 'digits' is drawn, not read from files: there is nothing to inspect")
    root = data_root(root)
    kind = "classes" if name in CLASS_NAMES or name.lower().endswith(".zip") else "boxes"
    found = find(name, root, seed, kind, fetch=False)
    if found.class_names is None:  # images without labels: their folders may be classes
        with contextlib.suppress(ValueError):
            found = find_classes(name, root, seed)
    left_out, splits = Counter(found.drops), {}
    for split, records in (("train", found.train), ("test", found.test)):
        records = [settled(record) if isinstance(record.file, Path) else record for record in records]
        for record in records:
            left_out.update(record.drops)
        things = [t.name for r in records for t in r.objects or () if not (t.difficult or t.crowd)]
        kinds = Counter(things or (record.label for record in records))
        per_class = {kind: kinds[kind] for kind in found.class_names or ()}
        ids = [record.id for record in records[:5]]
        splits[split] = {"images": len(records), "not_labelled": sum(r.objects is r.label for r in records)}  # None
        splits[split] |= {"boxes": len(things), "per_class": per_class, "ids": ids}
    told = {"classes": list(found.class_names or ()), **asdict(found.reading), "splits": splits}
    told["left_out"] = {reason: n for reason, n in left_out.items() if n}
    return {key: told[key] for key in ("format", "classes", "classes_from", "split_from", "left_out", "splits")}


def report_lines(report: dict[str, Any]) -> str:
    """The report of `inspect_folder` for a person."""
    return yaml.safe_dump(report, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120).rstrip()


def contact_sheet(name: str, root: str | Path | None = None, seed: int = 0, count: int = 12) -> Dataset:
    """Some training images of a set at 320 pixels, to be drawn with their boxes."""
    kind = "classes" if name in CLASS_NAMES else "boxes"
    return load(name, (240, 320), root, seed, limit=(count, 1), kind=kind)[0]
