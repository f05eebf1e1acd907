"""Data sets by name, folders of one's own by path, and the one function that loads either: `load`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..seeding import rng_for
from . import download
from .digits import Digits, digit_scenes
from .files import images_in
from .folders import Found, kitti_found, own_folder
from .formats import Record, assemble
from .formats_coco import coco_records, read_json
from .formats_kitti import KITTI_CLASSES, KITTI_TWO
from .formats_voc import VOC_CLASSES, devkit_records, voc_record
from .pixels import size_pair
from .types import Dataset, Reading

BCCD_CLASSES = ("RBC", "WBC", "Platelets")
HIT_UAV_CLASSES = ("Person", "Car", "Bicycle", "OtherVehicle")


class _Source(NamedTuple):
    find: Callable[[Path], Found]
    places: tuple[str, ...]  # below the data root
    origin: str
    download: str | None = None  # a name for `fetch`


def _voc(train: Sequence[str], test: str, place: Path) -> Found:
    """Splits such as 'VOC2007/trainval' of a devkit, `place` being one of its years."""
    read = [devkit_records(place.parent / Path(s).parent, Path(s).name, one_based=True) for s in (*train, test)]
    return Found(sum(read[:-1], []), read[-1], VOC_CLASSES)


def _split(class_names: Sequence[str], one_based: bool, place: Path) -> Found:
    return Found(*(devkit_records(place, split, one_based) for split in ("trainval", "test")), class_names)


def _voc07_half(place: Path) -> Found:
    """VOC07's test half, split once more: the folder VOC07 has it scaled down and split, the devkit has it as it is."""
    if place.name == "VOC07":
        return _split(VOC_CLASSES, True, place)
    every, held = devkit_records(place, "test", one_based=True), read_json(Path(__file__).with_name("voc07_half.json"))
    return Found(*([r for r in every if (r.id in held) == side] for side in (False, True)), VOC_CLASSES)


def _coco(place: Path) -> Found:
    def side(split: str) -> tuple[list[Record], tuple[str, ...]]:
        file = place / "annotations" / f"instances_{split}.json"
        return coco_records(file, read_json(file), lambda name: place / split / name)

    return Found(side("train2017")[0], *side("val2017"))


def _hit_uav(place: Path) -> Found:
    """HIT-UAV, its days as groups: the published layout, or a copy in COCO's with `group` and DontCare as crowd.

    Test is the last fifth of each day by frame number. DontCare is a region of every class, to be ignored.
    """
    if (place / "instances_train.json").is_file():
        files = [place / f"instances_{split}.json" for split in ("train", "test")]
        sides = [coco_records(f, read_json(f), lambda name: place / "images" / name)[0] for f in files]
        return Found(*sides, HIT_UAV_CLASSES)
    days: dict[str, list[Record]] = {}
    pictures = images_in(place / "normal_xml" / "JPEGImages")
    for split in ("train", "val", "test"):
        for entry in read_json(place / "normal_json" / "annotations" / f"{split}.json")["images"]:
            name, day = Path(entry["filename"]).stem, str(entry["date_captured"])
            record = voc_record(name, pictures[name], place / "normal_xml" / "Annotations" / f"{name}.xml")
            things = []
            for thing in record.objects:
                names = HIT_UAV_CLASSES if thing.name == "DontCare" else (thing.name,)
                things += [replace(thing, name=name, crowd=thing.name == "DontCare") for name in names]
            days.setdefault(day, []).append(replace(record, id=record.file.name, objects=tuple(things), group=day))
    train, test = [], []
    for records in days.values():
        records.sort(key=lambda record: int(record.file.stem.split("_")[-1]))
        train += records[: round(0.8 * len(records))]
        test += records[round(0.8 * len(records)) :]
    return Found(*(sorted(side, key=lambda record: record.id) for side in (train, test)), HIT_UAV_CLASSES)


_VOC = "http://host.robots.ox.ac.uk/pascal/VOC/"
_KITTI = "https://www.cvlibs.net/datasets/kitti/eval_object.php, or by `python -m fedal_utils data kitti` (12 GB),"
_KITTI_PLACES = ("kitti", "Kitti/raw")  # Kitti/raw is torchvision's
_07, _12, _TEST = "VOC2007/trainval", "VOC2012/trainval", "VOC2007/test"
SOURCES = {
    "bccd": _Source(
        partial(_split, BCCD_CLASSES, False), ("BCCD",), "https://github.com/Shenggan/BCCD_Dataset", "BCCD"
    ),
    "hit-uav": _Source(_hit_uav, ("HIT-UAV",), "https://github.com/suojiashun", "HIT-UAV"),
    "voc07": _Source(partial(_voc, [_07], _TEST), ("VOCdevkit/VOC2007",), _VOC + "voc2007"),
    "voc07-half": _Source(_voc07_half, ("VOC07", "VOCdevkit/VOC2007"), _VOC + "voc2007"),
    "voc12": _Source(partial(_voc, ["VOC2012/train"], "VOC2012/val"), ("VOCdevkit/VOC2012",), _VOC + "voc2012"),
    "voc0712": _Source(partial(_voc, [_07, _12], _TEST), ("VOCdevkit/VOC2012",), _VOC),
    "coco": _Source(_coco, ("coco",), "https://cocodataset.org/#download"),
    "kitti": _Source(lambda place: kitti_found(place, KITTI_CLASSES), _KITTI_PLACES, _KITTI),
    "kitti-2": _Source(lambda place: kitti_found(place, KITTI_TWO), _KITTI_PLACES, _KITTI),
}
NAMES = ("digits", *SOURCES)


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds the data sets: the argument, else $FEDAL_DATA, else `data`."""
    return Path(root or os.environ.get("FEDAL_DATA") or "data").expanduser()


def within_limit(count: int, most: int | None, seed: int, split: str) -> np.ndarray:
    """Which of `count` images stay, in their order; nested: the 50 of a limit are among the 100 of another."""
    return np.sort(rng_for(seed, "limit", split).permutation(count)[:most])


def find(name: str, root: Path, seed: int = 0, fetch: bool = True, unlabelled: bool = False) -> Found:
    """Both sides of a set before any pixel is read: a known name, or a folder here or in `root`."""
    source = SOURCES.get(name)
    if source is None:
        folders = [folder for folder in (Path(name).expanduser(), root / name) if folder.is_dir()]
        if not folders:
            allowed = f"{', '.join(NAMES)} or the path of a folder of images"
            raise ValueError(f"data set {name!r} is not known, nor a folder here or in {root}; allowed are {allowed}")
        return own_folder(folders[0], seed, unlabelled)
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
    unlabelled: bool = False,
) -> tuple[Dataset, Dataset]:
    """Train and test of a data set by name (`NAMES`), or of a folder of the user's own.

    image_size: (height, width), or one side, that every image is letterboxed to. root: see `data_root`.
    seed: also draws the digits, and the 80 : 20 split of a folder that tells none; KITTI's split is fixed.
    limit: at most so many train and test images, drawn by a named generator, nested, in the set's order.
    min_object: objects whose shorter side, letterboxed, is below this many pixels become ignore.
    digits: DigitScenes in train and test. unlabelled: keep a folder's images without annotation, as not labelled.
    """
    limit = limit or (None, None)
    if name == "digits":
        digits = digits or Digits()
        scenes = tuple(n if most is None else min(n, most) for n, most in zip(digits.scenes, limit, strict=True))
        return digit_scenes(digits._replace(scenes=scenes), size_pair(image_size), seed, min_object)
    found = find(name, data_root(root), seed, unlabelled=unlabelled)
    if shared := {r.id for r in found.train} & {r.id for r in found.test}:
        raise ValueError(f"data set {name!r}: image id {min(shared)!r} is in train and in test")
    sides, label = [], name if name in SOURCES else Path(name).absolute().name
    for split, records, most in zip(("train", "test"), (found.train, found.test), limit, strict=True):
        kept = [records[i] for i in within_limit(len(records), most, seed, split)]
        told = found.class_names, min_object, found.drops if split == "train" else None, found.reading
        sides.append(assemble(f"{label} {split}", kept, image_size, *told))
    return sides[0], sides[1]
