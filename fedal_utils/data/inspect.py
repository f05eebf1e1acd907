"""What is read from a folder or a named set, told before anything is trained: `python -m fedal_utils inspect PATH`."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from . import classification
from .catalogue import data_root, find, load
from .formats import settled
from .types import Dataset, Reading


def inspect_folder(name: str, root: str | Path | None = None, seed: int = 0) -> dict[str, Any]:
    """What `load` reads, without pixels: a dict that JSON can hold.

    Keys: format, classes, classes_from, split_from, left_out (how many by reason), and under `splits` for train and
    test images, boxes, per_class (images, where a class is a whole image's) and the first ids.
    """
    if name == "digits":
        raise ValueError("data set 'digits' is drawn, not read from files: there is nothing to inspect")
    if name in classification.NAMES or name.lower().endswith(".zip"):
        return _of_classes(name, root, seed)
    found = find(name, data_root(root), seed, fetch=False)
    left_out, sides = Counter(found.drops), []
    for records in (found.train, found.test):
        records = [settled(record) for record in records]
        for record in records:
            left_out.update(record.drops)
        things = [thing for record in records for thing in record.objects or ()]
        kinds = [thing.name for thing in things if not (thing.difficult or thing.crowd)]
        sides.append(([record.id for record in records], kinds, len(kinds)))
    if found.class_names is None:  # images without labels: their folders may be classes
        with contextlib.suppress(ValueError):
            return _of_classes(name, root, seed)
    return _report(found.reading, found.class_names or (), sides, left_out)


def _of_classes(name: str, root: str | Path | None, seed: int) -> dict[str, Any]:
    _, names, sides, told = classification.find(name, data_root(root), seed)
    return _report(told, names, [(side.ids, [names[c - 1] for c in side.classes], 0) for side in sides], {})


def _report(told: Reading, classes: Sequence[str], sides: Iterable, left_out: Mapping[str, int]) -> dict[str, Any]:
    """sides: of train and test the ids, the class of each thing, and how many boxes there are."""
    splits = {}
    for split, (ids, kinds, boxes) in zip(("train", "test"), sides, strict=True):
        per_class = {name: kinds.count(name) for name in classes}
        splits[split] = {"images": len(ids), "boxes": boxes, "per_class": per_class, "ids": list(ids[:5])}
    report = {"format": told.format, "classes": list(classes), "classes_from": told.classes_from}
    left_out = {reason: n for reason, n in left_out.items() if n}
    return report | {"split_from": told.split_from, "left_out": left_out, "splits": splits}


def report_lines(report: dict[str, Any]) -> str:
    """The report of `inspect_folder` for a person."""
    return yaml.safe_dump(report, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120).rstrip()


def contact_sheet(name: str, root: str | Path | None = None, seed: int = 0, count: int = 12) -> Dataset:
    """Some training images of a set at 320 pixels, to be drawn with their boxes."""
    read = classification.load if name in classification.NAMES else load
    return read(name, (240, 320), root=root, seed=seed, limit=(count, 1))[0]
