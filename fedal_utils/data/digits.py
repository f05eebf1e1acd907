"""DigitScenes: real handwritten digits (scikit-learn's 1,797) on generated canvases; nothing has to be downloaded."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ..seeding import rng_for
from .types import Dataset, Images, Labels

MIN_CONTRAST = 0.35  # least difference in luminance (0..1) between ink and the mean of what it is drawn on
MAX_OVERLAP = 0.1  # most of the smaller of two boxes that the other may cover
TRIES = 30  # places tried for a digit
_LUMINANCE = np.array([0.299, 0.587, 0.114])


class Digits(NamedTuple):
    """How many DigitScenes there are in train and test, and which digits are on them: 0 to classes - 1."""

    scenes: tuple[int, int] = (400, 200)
    classes: int = 10


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[list[np.ndarray], np.ndarray]:
    """scikit-learn's handwritten digits as crisp uint8 masks cut tightly to their ink, and what they are."""
    digits = load_digits()
    ink = torch.from_numpy(digits.images).float()[:, None]  # (1797, 1, 8, 8)
    ink = functional.pad(ink / ink.amax(dim=(2, 3), keepdim=True), (1, 1, 1, 1))
    ink = functional.interpolate(ink, scale_factor=8, mode="bicubic", align_corners=False)
    masks = ((ink[:, 0] - 0.3) / 0.3).clamp(0, 1).mul(255).round().byte().numpy()  # (1797, 80, 80)
    cut = []
    for mask in masks:
        rows, columns = np.nonzero(mask > 127)
        cut.append(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    return cut, digits.target.astype(np.int64)


def digit_sources(seed: int = 0, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The rows of scikit-learn's digits that train and test may draw: two disjoint arrays, 70 : 30."""
    target = _digits()[1]
    order = rng_for(seed, "digits", "sources").permutation(len(target))
    cut = int(0.7 * len(target))
    return tuple(part[target[part] < classes] for part in (order[:cut], order[cut:]))


def _canvas(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A background in [0, 1], (H, W, 3): a gradient, soft blotches, a fine grain and a slight tint."""

    def smooth(cells: int, most: float) -> np.ndarray:  # (H, W, 1), random at a grid of cells
        grid = torch.from_numpy(rng.uniform(-most, most, (1, 1, cells, cells)))
        return functional.interpolate(grid, (height, width), mode="bilinear", align_corners=True)[
            0, 0, :, :, None
        ].numpy()

    level, slope = rng.uniform(0.1, 0.9), smooth(2, 0.12)
    blotches, grain = smooth(int(rng.integers(3, 8)), 0.1), rng.uniform(-0.03, 0.03, (height, width, 1))
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


def digit_scene(
    rng: np.random.Generator, sources: np.ndarray, image_size: tuple[int, int] = (64, 64), most: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene of 1 to `most` digits from the rows `sources`: pixels uint8 (3, H, W), boxes (k, 4), the rows drawn."""
    low, high = (round(side * min(image_size) / 64) for side in (14, 28))  # of a box' longer side
    scene, boxes, drawn = _canvas(rng, *image_size), np.zeros((0, 4), dtype=np.float32), []
    for _ in range(int(rng.integers(1, most + 1))):
        row = int(sources[rng.integers(len(sources))])
        mask, side = _digits()[0][row], int(rng.integers(low, high + 1))
        h, w = (max(3, round(side * s / max(mask.shape))) for s in mask.shape)
        areas = np.minimum(h * w, (boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
        for _ in range(TRIES):
            y, x = int(rng.integers(image_size[0] - h + 1)), int(rng.integers(image_size[1] - w + 1))
            shared = np.minimum(boxes[:, 2:], [x + w, y + h]) - np.maximum(boxes[:, :2], [x, y])
            if (shared.clip(0).prod(axis=1) <= MAX_OVERLAP * areas).all():
                break
        else:
            continue
        alpha = np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.BILINEAR))[..., None] / 255.0
        under = scene[y : y + h, x : x + w]  # (h, w, 3)
        under[:] = under * (1 - alpha) + _ink_colour(rng, float((under @ _LUMINANCE).mean())) * alpha
        boxes = np.vstack([boxes, np.float32([x, y, x + w, y + h])])
        drawn.append(row)
    pixels = np.round(scene * 255).astype(np.uint8).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels), boxes, np.array(drawn)


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
        small = ((boxes[..., 2:] - boxes[..., :2]).amin(dim=-1) < min_object) & (numbers > 0)
        labels = Labels(boxes, numbers, small, torch.zeros_like(small))
        ids = tuple(f"{split}-{k:05d}" for k in range(count))
        images = Images(ids, torch.from_numpy(np.stack(pixels)), torch.tensor([image_size] * count))
        drops = {"too_small": int(small.sum())} if small.any() else {}
        sides.append(Dataset(f"digits {split}", images, labels, tuple(map(str, range(digits.classes))), drops))
    return sides[0], sides[1]
