"""DigitScenes: real handwritten digits (scikit-learn's 1,797) on generated canvases; nothing has to be downloaded."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.utils.rnn import pad_sequence

from ..seeding import rng_for
from .types import Dataset, Images, Labels

MIN_CONTRAST = 0.35  # least difference in luminance (0..1) between ink and the mean of what it is drawn on
MAX_OVERLAP = 0.1  # most of the smaller of two boxes that the other may cover
_LUMINANCE = np.array([0.299, 0.587, 0.114])


class Digits(NamedTuple):
    """How many DigitScenes there are in train and test, and which digits are on them: 0 to classes - 1."""

    scenes: tuple[int, int] = (400, 200)
    classes: int = 10


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """scikit-learn's 1,797 handwritten digits as crisp uint8 masks cut tightly to their ink, and what they are."""
    digits = load_digits()
    ink = torch.from_numpy(digits.images).float()[:, None]  # (1797, 1, 8, 8)
    ink = torch.nn.functional.pad(ink / ink.amax(dim=(2, 3), keepdim=True), (1, 1, 1, 1))
    ink = torch.nn.functional.interpolate(ink, scale_factor=8, mode="bicubic", align_corners=False)
    masks = ((ink[:, 0] - 0.3) / 0.3).clamp(0, 1).mul(255).round().byte().numpy()  # (1797, 80, 80)
    cut = []
    for mask in masks:
        rows, columns = np.flatnonzero((mask > 127).any(axis=1)), np.flatnonzero((mask > 127).any(axis=0))
        cut.append(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return tuple(cut), digits.target.astype(np.int64)


def digit_sources(seed: int = 0, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The rows of scikit-learn's digits that train and test may draw: two disjoint arrays, 70 : 30."""
    target = _digits()[1]
    order = rng_for(seed, "digits", "sources").permutation(len(target))
    cut = int(0.7 * len(target))
    return tuple(part[target[part] < classes] for part in (order[:cut], order[cut:]))


def _stretched(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, ...) bilinearly enlarged to (height, width, ...), corners on corners."""
    for axis, side in ((0, height), (1, width)):
        at = np.linspace(0, grid.shape[axis] - 1, side)
        low = np.minimum(at.astype(np.int64), grid.shape[axis] - 2)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(grid.ndim)])
        grid = grid.take(low, axis) * (1 - part) + grid.take(low + 1, axis) * part
    return grid


def _canvas(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A background in [0, 1], (H, W, 3): a gradient, soft blotches, a fine grain and a slight tint."""
    level = rng.uniform(0.1, 0.9)
    slope = _stretched(rng.uniform(-0.12, 0.12, (2, 2, 1)), height, width)
    cells = int(rng.integers(3, 8))
    blotches = _stretched(rng.uniform(-0.1, 0.1, (cells, cells, 1)), height, width)
    grain = rng.uniform(-0.03, 0.03, (height, width, 1))
    return np.clip(level + rng.uniform(-0.06, 0.06, 3) + slope + blotches + grain, 0, 1)


def _ink_colour(rng: np.random.Generator, ground: float) -> np.ndarray:
    """A slightly tinted colour whose luminance differs from `ground` by at least MIN_CONTRAST."""
    dark, light = max(0.0, ground - MIN_CONTRAST), max(0.0, 1 - ground - MIN_CONTRAST)  # room on either side
    at = rng.uniform(0, dark + light)
    luminance = at if at < dark else ground + MIN_CONTRAST + (at - dark)
    tint = rng.uniform(-0.15, 0.15, 3)
    tint -= tint @ _LUMINANCE  # the tint has no luminance of its own
    room = [(luminance if t < 0 else 1 - luminance) / abs(t) for t in tint if t != 0]
    return luminance + tint * min([1.0, *room])


def _place(rng: np.random.Generator, h: int, w: int, image_size: tuple[int, int], boxes: list) -> tuple | None:
    for _ in range(30):
        y, x = int(rng.integers(image_size[0] - h + 1)), int(rng.integers(image_size[1] - w + 1))
        covered = (
            max(0, min(x + w, x2) - max(x, x1))
            * max(0, min(y + h, y2) - max(y, y1))
            / min(w * h, (x2 - x1) * (y2 - y1))
            for x1, y1, x2, y2 in boxes
        )
        if all(part <= MAX_OVERLAP for part in covered):
            return x, y, x + w, y + h
    return None


def digit_scene(
    rng: np.random.Generator, sources: np.ndarray, image_size: tuple[int, int] = (64, 64), most: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene, 1 to `most` digits from the rows `sources`: pixels uint8 (3, H, W), boxes (k, 4), the rows (k,) drawn.

    A box' longer side is 14 to 28 pixels of 64. A digit that finds no place is left out, the first never.
    """
    masks, _ = _digits()
    low, high = (round(side * min(image_size) / 64) for side in (14, 28))
    scene = _canvas(rng, *image_size)
    boxes, drawn = [], []
    for _ in range(int(rng.integers(1, most + 1))):
        row = int(sources[rng.integers(len(sources))])
        mask, side = masks[row], int(rng.integers(low, high + 1))
        h, w = (max(3, round(side * s / max(mask.shape))) for s in mask.shape)
        if (place := _place(rng, h, w, image_size, boxes)) is None:
            continue
        x1, y1, x2, y2 = place
        alpha = np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.BILINEAR))[..., None] / 255.0
        under = scene[y1:y2, x1:x2]  # (h, w, 3)
        ink = _ink_colour(rng, float((under @ _LUMINANCE).mean()))
        scene[y1:y2, x1:x2] = under * (1 - alpha) + ink * alpha
        boxes.append(place)
        drawn.append(row)
    pixels = np.round(scene * 255).astype(np.uint8).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels), np.array(boxes, dtype=np.float32), np.array(drawn)


def digit_scenes(
    digits: Digits, image_size: tuple[int, int] = (64, 64), seed: int = 0, min_object: float = 0
) -> tuple[Dataset, Dataset]:
    """Train and test DigitScenes; a box with a side below `min_object` is ignore."""
    if min(image_size) < 18:
        raise ValueError(f"digits need images of 18 and more pixels a side, got {image_size}")
    target, sides, parts = _digits()[1], [], digit_sources(seed, digits.classes)
    for split, count, sources in zip(("train", "test"), digits.scenes, parts, strict=True):
        scenes = [digit_scene(rng_for(seed, "digits", split, k), sources, image_size) for k in range(count)]
        pixels, boxes, drawn = zip(*scenes, strict=True)
        boxes = pad_sequence([torch.from_numpy(one) for one in boxes], batch_first=True)
        numbers = pad_sequence([torch.from_numpy(target[rows] + 1) for rows in drawn], batch_first=True)
        small = (torch.minimum(*(boxes[..., 2:] - boxes[..., :2]).unbind(-1)) < min_object) & (numbers > 0)
        labels = Labels(boxes, numbers, small, torch.zeros_like(small))
        ids = tuple(f"{split}-{k:05d}" for k in range(count))
        images = Images(ids, torch.from_numpy(np.stack(pixels)), torch.tensor([image_size] * count))
        drops = {"too_small": int(small.sum())} if small.any() else {}
        sides.append(Dataset(f"digits {split}", images, labels, tuple(map(str, range(digits.classes))), drops))
    return sides[0], sides[1]
