"""Files of strangers, found and read safely: links, hidden files, encodings, names; images whole, upright, bounded."""

import contextlib
import functools
import os
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

FILL = 114  # grey of the letterbox' margins
MAX_PIXELS = 80_000_000  # of one image: a quarter of a gigabyte as RGB
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
THREADS = min(8, os.cpu_count() or 1)  # that read images
NOT_DATA = ("__MACOSX", "@eaDir")  # folders that systems leave behind
# Folders that only say what kind of file they hold: images/train/a.jpg and labels/train/a.txt belong together.
LAYOUT = {"images", "jpegimages", "labels", "annotations", "annotation", "xml", "imagesets", "main"}


same_form = functools.partial(unicodedata.normalize, "NFC")  # accents composed: names of different systems agree


def find_files(root: str | Path, *suffixes: str) -> list[Path]:
    """Files below `root`, sorted, with one of these suffixes (none given: all), also in linked folders; none hidden."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}")

    found: list[Path] = []
    seen: dict[str, str] = {}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        other = seen.setdefault(os.path.realpath(folder), folder)
        if other != folder:
            raise ValueError(f"folders {folder} and {other} are the same one: a link leads to it a second time")
        folders[:] = [name for name in folders if not name.startswith(".") and name not in NOT_DATA]
        for name in (n for n in names if n[0] != "." and (not suffixes or n.lower().endswith(suffixes))):
            path = Path(folder, name)
            if not plain(str(path)):
                raise ValueError(f"file name {ascii(str(path))} is not UTF-8 or holds control characters; rename it")
            if path.is_file():
                found.append(path)
    return sorted(found)


def key_of(path: Path, root: Path) -> str:
    """What an image and its annotation share: images/train/a.jpg and labels/train/a.txt -> train/a."""
    inner = path.relative_to(root)
    return same_form("/".join([p for p in inner.parts[:-1] if p.lower() not in LAYOUT] + [inner.stem]))


def by_key(paths: Iterable[Path], root: Path) -> dict[str, Path]:
    """The paths by `key_of`; ValueError where two share one."""
    found: dict[str, Path] = {}
    for path in paths:
        key = key_of(path, root)
        if found.setdefault(key, path) != path:
            raise ValueError(f"{path} and {found[key]} share the id {key!r}; ids must be unique")
    return found


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or with a byte order mark in UTF-16."""
    if not file.is_file():
        raise ValueError(f"{file} is no plain file" if file.exists() else f"annotation {file} does not exist")
    content = file.read_bytes()
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}); save it as UTF-8") from None


def write_text(path: str | Path, text: str) -> Path:
    """The file with this text in UTF-8, its folder made if need be; line ends are not changed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:  # a full disk does not tell the name by itself
        raise OSError(error.errno, error.strerror, str(path)) from None
    return path


@contextlib.contextmanager
def reading(where: str, needed: str) -> Iterator[None]:
    """Whatever is wrong with a value read inside becomes a ValueError that names the entry and what is needed."""
    try:
        yield
    except Exception as error:
        told = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where[:400]}: {told[:400]}; needed: {needed}") from None


def number(value: object) -> float:
    """A finite number as JSON has it, and no text."""
    if type(value) in (int, float) and abs(value) < 1e300:
        return float(value)
    raise ValueError(f"{str(value)[:99]!r} is no number")


def whole(value: object, least: int = 0) -> int:
    """A whole number from `least` up, of at most nine digits."""
    if least <= number(value) < 1e9 and value % 1 == 0:
        return int(value)
    raise ValueError(f"{str(value)[:99]!r} is no whole number from {least} up")


def plain(text: str) -> bool:
    """Can every format hold this text in one line?"""
    odd = ("Cc", "Cs", "Zl", "Zp")
    return not any(unicodedata.category(c) in odd or c in "\ufffe\uffff" for c in text)


def class_name(name: object) -> str:
    """The name of a class as it is written; ValueError unless it is text in one line without outer spaces."""
    if not isinstance(name, str) or not name or name != name.strip() or not plain(name):
        raise ValueError(f"class {name!r} is no name; allowed is text in one line without outer spaces")
    return name


def relative(name: object) -> str:
    """A path below a set's folder, with '/' for '\\'; ValueError for any other."""
    parts = name.replace("\\", "/").removeprefix("./").split("/") if isinstance(name, str) else [""]
    if any(p in ("", ".", "..") for p in parts) or ":" in parts[0] or not plain(name):
        raise ValueError(f"{name!r} is no path below the set's folder")
    return "/".join(parts)


def size_pair(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a side or a pair; ValueError below 1 pixel."""
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(int(v) for v in image_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"image_size must be (height, width) in pixels >= 1, got {image_size!r}")
    return pair


@contextlib.contextmanager
def _opened(path: Path | zipfile.Path) -> Iterator[Image.Image]:
    if not path.is_file():
        raise ValueError(f"image {path} does not exist" if not path.exists() else f"image {path} is no plain file")
    with contextlib.ExitStack() as stack:
        try:
            image = stack.enter_context(Image.open(stack.enter_context(path.open("rb"))))
        except Exception as error:  # Pillow raises whatever its parsers trip over
            raise ValueError(f"image {path} cannot be read: {error}; needed is a {', '.join(SUFFIXES)}") from None
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"image {path} has {image.size} pixels; at most {MAX_PIXELS:,} are allowed: scale it down")
        if image.mode[0] in "IF":
            raise ValueError(f"image {path} has mode {image.mode!r}, more than 8 bits; allowed are 8-bit images")
        yield image


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright image from the file's header; ValueError that names a missing or broken file."""
    with _opened(path) as image:
        size, orientation = (image.height, image.width), 1
        if image.format == "TIFF":  # whose size Pillow may have turned already
            size = (image.tag_v2[257], image.tag_v2[256])
        if image.format != "PNG" or "exif" in image.info:  # or getexif would decode all pixels to look behind them
            with contextlib.suppress(Exception):  # a broken EXIF block counts as upright
                orientation = image.getexif().get(0x0112, 1)
        return size[::-1] if orientation in (5, 6, 7, 8) else size


def read_upright(source: str | Path | zipfile.Path | np.ndarray) -> Image.Image:
    """The whole image, upright, as 8-bit RGB; a truncated, too large or 16-bit file is a ValueError that names it.

    source: a file, or pixels as uint8 (H, W, 3) or (H, W).
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: broken images would pass; set it to False")
    with _opened(Path(source) if isinstance(source, str) else source) as image:
        try:
            image.load()
        except Exception as error:
            raise ValueError(f"image {source} is truncated or corrupt: {error}") from None
        with contextlib.suppress(Exception):  # a broken EXIF block counts as upright
            image = ImageOps.exif_transpose(image)
        return image.convert("RGB")


def letterbox_fit(sizes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where images of `sizes` (N, 2) land in a canvas of (height, width): inner sizes (N, 2), offsets (N, 2) top, left.

    One scale for both sides, the largest that fits; the scaled image is rounded to whole pixels (at least one) and
    centred, an odd pixel going below or to the right: 380 x 640 in 192 x 320 -> inner 190 x 320, offset 1, 0.
    """
    sizes, canvas = torch.as_tensor(sizes, dtype=torch.int64), torch.tensor(image_size, dtype=torch.int64)
    scale = (canvas / sizes.double()).amin(dim=-1, keepdim=True)  # (N, 1)
    inner = torch.minimum((sizes * scale + 0.5).floor().long().clamp(min=1), canvas)  # (N, 2)
    return inner, (canvas - inner) // 2


def letterbox_boxes(boxes: Tensor, sizes: Tensor, image_size: tuple[int, int], undo: bool = False) -> Tensor:
    """Boxes (N, 4) or (N, K, 4) in pixels of images of `sizes` (N, 2) height, width in pixels of letterboxed ones.

    undo: from letterboxed pixels to original ones.
    """
    inner, offset = letterbox_fit(sizes, image_size)
    both = torch.stack([inner.double() / torch.as_tensor(sizes).double(), offset.double()])  # (2, N, 2) y, x
    both = both.flip(-1).repeat(1, 1, 2).to(boxes.device)  # (2, N, 4) x, y, x, y
    factor, shift = both[:, :, None] if boxes.dim() == 3 else both
    return ((boxes.double() - shift) / factor if undo else boxes.double() * factor + shift).to(boxes.dtype)


def to_original(boxes: Tensor, sizes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes in letterboxed pixels, (N, 4) or (N, K, 4), in pixels of the original images of `sizes` (N, 2)."""
    return letterbox_boxes(boxes, sizes, image_size, undo=True)


def read_all(sources: Sequence, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images of what `read_upright` takes, scaled (bilinear, antialiased) into a grey canvas of (height, width).

    Returns uint8 (N, 3, H, W), and the sizes that they had (N, 2).
    """
    pixels = np.full((len(sources), 3, *image_size), FILL, dtype=np.uint8)  # torch would start a pool in every thread

    def fill(row: int) -> tuple[int, int]:
        image = read_upright(sources[row])
        inner, offset = letterbox_fit(torch.tensor([[image.height, image.width]]), image_size)
        (height, width), (top, left) = inner[0].tolist(), offset[0].tolist()
        scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        pixels[row, :, top : top + height, left : left + width] = scaled
        return image.height, image.width

    sizes = in_order(fill, range(len(sources)))
    return torch.from_numpy(pixels), torch.tensor(sizes).reshape(-1, 2).long()


def in_order(work: Callable, items: Sequence) -> list:
    """`map` by a pool of threads; results and the first error come in the order of `items`."""
    with ThreadPoolExecutor(THREADS) as pool:  # whose map cancels the rest of the queue after an error
        return list(pool.map(work, items))
