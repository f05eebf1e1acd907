"""The one place that opens images: whole files only, turned upright, bounded in size, letterboxed to uint8 (3, H, W).

Upright: the EXIF orientation (1 to 8) is applied whatever the format; an EXIF block that cannot be read counts as 1.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from .boxes import letterbox_fit

FILL = 114  # grey of the letterbox' margins
MAX_PIXELS = 80_000_000  # of one image: a quarter of a gigabyte as RGB
LARGE = 16_000_000  # pixels; larger images are decoded one at a time
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

_FLIP = Image.Transpose
_TURNS = {2: _FLIP.FLIP_LEFT_RIGHT, 3: _FLIP.ROTATE_180, 4: _FLIP.FLIP_TOP_BOTTOM}  # by EXIF orientation
_TURNS |= {5: _FLIP.TRANSPOSE, 6: _FLIP.ROTATE_270, 7: _FLIP.TRANSVERSE, 8: _FLIP.ROTATE_90}
_one_large_at_a_time = threading.Lock()


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image file says: (height, width) of the upright image, and the EXIF orientation."""

    path: Path
    size: tuple[int, int]
    orientation: int = 1


def size_pair(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a side or a pair; ValueError below 1 pixel."""
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(int(v) for v in image_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"image_size must be (height, width) in pixels >= 1, got {image_size!r}")
    return pair


def orientation_of(image: Image.Image) -> int:
    """1 to 8, see EXIF; 1 where there is none or the block is broken."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # or getexif would decode all pixels to look behind them
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises whatever its parser trips over
        return 1
    return value if value in _TURNS else 1


def turned_box(box: Sequence[float], orientation: int, size: tuple[int, int]) -> tuple[float, ...]:
    """An xyxy box of the stored image in the upright one, whose (height, width) is `size`."""
    height, width = size
    if orientation >= 5:
        box = (box[1], box[0], box[3], box[2])  # x and y change places, then 6, 7 and 8 mirror
    x1, y1, x2, y2 = box
    if orientation in (2, 3, 6, 7):
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 7, 8):
        y1, y2 = height - y2, height - y1
    return x1, y1, x2, y2


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():
        raise ValueError(f"image {path} does not exist" if not path.exists() else f"image {path} is no plain file")
    try:
        image = Image.open(path)
    except Exception as error:
        allowed = f"allowed are whole {', '.join(SUFFIXES)} files of at most {MAX_PIXELS:,} pixels"
        raise ValueError(f"image {path} cannot be read: {error}; {allowed}") from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"image {path} has {image.height} x {image.width} pixels; at most {MAX_PIXELS:,} are allowed: "
                "scale it down or cut it into tiles"
            )
        if image.mode[0] in "IF":
            raise ValueError(f"image {path} has mode {image.mode!r} (more than 8 bits); allowed are 8-bit images")
        yield image


def image_info(path: str | Path) -> ImageInfo:
    """Size and orientation from the header, no pixel decoded; ValueError that names a missing or broken file."""
    with _opened(Path(path)) as image:
        orientation = orientation_of(image)
        size = (image.height, image.width)
        if image.format == "TIFF":  # whose size Pillow may have turned already
            size = (image.tag_v2[257], image.tag_v2[256])
    return ImageInfo(Path(path), size[::-1] if orientation >= 5 else size, orientation)


def read_upright(source: str | Path | ImageInfo) -> Image.Image:
    """The whole image, upright, as 8-bit RGB; a truncated, too large or 16-bit file is a ValueError that names it."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: broken images would pass as grey; set it to False"
        )
    info = source if isinstance(source, ImageInfo) else image_info(source)
    large = info.size[0] * info.size[1] > LARGE
    with _opened(info.path) as image, _one_large_at_a_time if large else contextlib.nullcontext():
        try:
            image.load()
            rgb = image.convert("RGB")
            if info.orientation > 1 and image.format != "TIFF":  # which Pillow turns as it loads
                rgb = rgb.transpose(_TURNS[info.orientation])
        except Exception as error:
            raise ValueError(f"image {info.path} is truncated or corrupt: {error}") from None
    if (rgb.height, rgb.width) != info.size:
        raise ValueError(f"image {info.path} is {rgb.height} x {rgb.width} now, it was {info.size} when it was listed")
    return rgb


def letterbox_image(image: Image.Image, image_size: tuple[int, int]) -> Tensor:
    """An RGB image scaled (bilinear, antialiased) into a grey canvas of (height, width): uint8 (3, H, W)."""
    if image.height * image_size[1] == image.width * image_size[0]:  # no margin: many small images are read like this
        image = image if image.size == image_size[::-1] else image.resize(image_size[::-1], Image.Resampling.BILINEAR)
        return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
    inner, offset = letterbox_fit(torch.tensor([[image.height, image.width]]), image_size)
    (height, width), (top, left) = inner[0].tolist(), offset[0].tolist()
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas = np.full((3, *image_size), FILL, dtype=np.uint8)  # NumPy: torch would start a pool in every reading thread
    canvas[:, top : top + height, left : left + width] = np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(canvas)  # (3, H, W)


def read_all(files: Sequence[ImageInfo], image_size: tuple[int, int], threads: int) -> Tensor:
    """All images as uint8 (N, 3, H, W) in the order of `files`, whatever the threads do."""
    pixels = torch.empty(len(files), 3, *image_size, dtype=torch.uint8)

    def fill(row: int) -> None:
        pixels.numpy()[row] = letterbox_image(read_upright(files[row]), image_size).numpy()

    deque(in_order(fill, range(len(files)), threads), maxlen=0)
    return pixels


def threads_for(workers: int | None) -> int:
    """How many threads read: `workers`, by default one a core and at most 8."""
    return max(1, min(8, os.cpu_count() or 1) if workers is None else workers)


def in_order(work: Callable, items: Sequence, threads: int) -> Iterator:
    """`map` by a pool of threads; results and the first error come in the order of `items`."""
    if threads == 1 or len(items) < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:  # whose map cancels the rest of the queue after an error
        yield from pool.map(work, items)
