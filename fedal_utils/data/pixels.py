"""The one place that opens images: whole files, turned upright, bounded in size, letterboxed to uint8 (3, H, W)."""

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from .boxes import letterbox_fit

FILL = 114  # grey of the letterbox' margins
MAX_PIXELS = 80_000_000  # of one image: a quarter of a gigabyte as RGB
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
THREADS = min(8, os.cpu_count() or 1)  # that read images


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


def letterbox_image(image: Image.Image, image_size: tuple[int, int]) -> np.ndarray:
    """An RGB image scaled (bilinear, antialiased) into a grey canvas of (height, width): uint8 (3, H, W)."""
    inner, offset = letterbox_fit(torch.tensor([[image.height, image.width]]), image_size)
    (height, width), (top, left) = inner[0].tolist(), offset[0].tolist()
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas = np.full((3, *image_size), FILL, dtype=np.uint8)  # NumPy: torch would start a pool in every reading thread
    canvas[:, top : top + height, left : left + width] = np.asarray(image).transpose(2, 0, 1)
    return canvas


def read_all(sources: Sequence, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images of what `read_upright` takes, letterboxed, uint8 (N, 3, H, W), and their sizes (N, 2)."""
    pixels = np.empty((len(sources), 3, *image_size), dtype=np.uint8)

    def fill(row: int) -> tuple[int, int]:
        image = read_upright(sources[row])
        pixels[row] = letterbox_image(image, image_size)
        return image.height, image.width

    sizes = in_order(fill, range(len(sources)))
    return torch.from_numpy(pixels), torch.tensor(sizes).reshape(-1, 2).long()


def in_order(work: Callable, items: Sequence) -> list:
    """`map` by a pool of threads; results and the first error come in the order of `items`."""
    with ThreadPoolExecutor(THREADS) as pool:  # whose map cancels the rest of the queue after an error
        return list(pool.map(work, items))
