"""What is read from a folder or a named set, told before anything is trained: `python -m fedal_utils inspect PATH`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from . import classification
from .catalogue import data_root, find, load
from .formats import settled
from .types import Dataset, Reading


def inspect_folder(
    name: str, root: str | Path | None = None, seed: int = 0, ids: int = 5, unlabelled: bool = False
) -> dict[str, Any]:
    """What `load` reads, without pixels: a dict that JSON can hold.

    Keys: format, classes, classes_from, split_from, left_out (how many by reason), and under `splits` for train and
    test images, boxes, per_class (images, where a class is a whole image's), ignored, not_labelled and the first ids.
    """
    if name in classification.NAMES or name.lower().endswith(".zip"):
        return _class_report(name, root, seed, ids)
    found = find(name, data_root(root), seed, False, unlabelled)
    report, left_out = _head(found.reading, found.class_names or ()), Counter(found.drops)
    for split, records in (("train", found.train), ("test", found.test)):
        records = [settled(record) for record in records]
        for record in records:
            left_out.update(record.drops)
        things = [thing for record in records for thing in record.objects or ()]
        per_class = Counter(thing.name for thing in things if not (thing.difficult or thing.crowd))
        report["splits"][split] = {
            "images": len(records),
            "boxes": sum(per_class.values()),
            "per_class": {name: per_class[name] for name in report["classes"]},
            "ignored": len(things) - sum(per_class.values()),
            "not_labelled": sum(record.objects is None for record in records),
            "ids": [record.id for record in records[:ids]],
        }
    if found.class_names is None:  # images without labels: their folders may be classes
        with contextlib.suppress(ValueError):
            return _class_report(name, root, seed, ids)
    return report | {"left_out": {reason: n for reason, n in left_out.items() if n}}


def _head(told: Reading, classes: Sequence[str]) -> dict[str, Any]:
    report = {"format": told.format, "classes": list(classes), "classes_from": told.classes_from}
    return report | {"split_from": told.split_from, "left_out": {}, "splits": {}}


def _class_report(name: str, root: str | Path | None, seed: int, ids: int) -> dict[str, Any]:
    _, names, sides, told = classification.find(name, data_root(root), seed)
    report = _head(told, names)
    for split, side in zip(("train", "test"), sides, strict=True):
        counts = {name: side.classes.count(c + 1) for c, name in enumerate(names)}
        report["splits"][split] = {
            "images": len(side.ids),
            "boxes": 0,
            "per_class": counts,
            "ids": list(side.ids[:ids]),
        }
    return report


def report_lines(report: dict[str, Any]) -> str:
    """The report of `inspect_folder` for a person."""
    return yaml.safe_dump(report, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120).rstrip()


def contact_sheet(name: str, root: str | Path | None = None, seed: int = 0, count: int = 12) -> Dataset:
    """Some training images of a set at 320 pixels, to be drawn with their boxes."""
    read = classification.load if name in classification.NAMES else load
    return read(name, (240, 320), root=root, seed=seed, limit=(count, 1))[0]
