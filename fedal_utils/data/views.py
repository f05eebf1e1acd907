"""The changed views under which CALD compares a detector's output with itself (Yu et al. 2022, 2103.10374).

Changes and numbers are *from released code*. Ours: a patch's place follows from the image's id, the canvas is grey.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ..seeding import rng_for
from .augment import FILL
from .types import Detections, Images, flip_boxes

VIEWS = ("flip", "cutout", "resize", "rotate")
RESIZE, ANGLE = 0.8, 5.0  # part of the side; degrees, counter-clockwise
PATCHES, TRIES, PATCH_SIDE, COVERED = 2, 50, (0.05, 0.2), (0.1, 0.4)  # how many; parts of a side; parts of a box


def cutout_patches(ids: Sequence[str], boxes: Tensor, valid: Tensor, image_size: tuple[int, int]) -> Tensor:
    """What cutout covers in each image: (N, PATCHES, 4) xyxy whole pixels, zeros where too few of TRIES places will do.

    boxes (N, T, 4), valid (N, T): those detected in the plain image.
    """
    drawn = torch.stack([torch.from_numpy(rng_for(0, "cutout", name).random((TRIES, 4))) for name in ids])
    canvas = torch.tensor([image_size[1], image_size[0]], dtype=torch.float64)  # width, height
    side = (PATCH_SIDE[0] + (PATCH_SIDE[1] - PATCH_SIDE[0]) * drawn[..., :2]) * canvas
    start = drawn[..., 2:] * (canvas - side)
    tried = torch.cat([start, start + side], dim=-1).floor()[:, :, None]  # (N, TRIES, 1, 4)
    boxes, valid = boxes.double().cpu()[:, None], valid.cpu()[:, None]  # (N, 1, T, 4), (N, 1, T)
    low, high = tried[..., :2].maximum(boxes[..., :2]), tried[..., 2:].minimum(boxes[..., 2:])
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    lost = torch.where(valid & (area > 0), (high - low).clamp(min=0).prod(dim=-1) / area, 0.0)  # (N, TRIES, T)
    most = lost.amax(dim=-1) if lost.shape[-1] else lost.new_zeros(lost.shape[:2])
    will_do = (most >= COVERED[0]) & (most <= COVERED[1])  # (N, TRIES)
    first = (~will_do).int().argsort(dim=1, stable=True)[:, :PATCHES]  # the first that will do, if any
    chosen = tried[:, :, 0].gather(1, first[..., None].expand(-1, -1, 4)) * will_do.gather(1, first)[..., None]
    return chosen.float()


def change_view(name: str, pixels: Tensor, patches: Tensor | None = None) -> Tensor:
    """uint8 pixels (B, 3, H, W) of a view in `VIEWS`. patches: for cutout, of `cutout_patches`."""
    height, width = pixels.shape[-2:]
    if name == "flip":
        return pixels.flip(-1)
    if name == "cutout":
        y, x = torch.arange(height, device=pixels.device)[:, None], torch.arange(width, device=pixels.device)
        left, top, right, bottom = patches.to(pixels.device)[..., None, None].unbind(2)  # (B, P, 1, 1) each
        covered = ((x >= left) & (x < right) & (y >= top) & (y < bottom)).any(1, keepdim=True)  # (B, 1, H, W)
        return torch.where(covered, 0, pixels)
    if name == "resize":
        inner, (top, left) = _shrunk((height, width))
        around = [left, top, width - inner[1] - left, height - inner[0] - top]
        return transforms.pad(transforms.resize(pixels, list(inner), antialias=True), around, fill=FILL)
    turned = transforms.rotate(pixels, ANGLE, expand=True)  # nearest pixel, black corners
    return transforms.resize(turned, [height, width], InterpolationMode.BICUBIC, antialias=True)


def _shrunk(image_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the view 'resize', and the top and left where it lies in the canvas."""
    inner = tuple(max(1, round(side * RESIZE)) for side in image_size)
    return inner, tuple((side - part) // 2 for side, part in zip(image_size, inner, strict=True))


def move_boxes(name: str, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Where (..., 4) xyxy boxes lie in a view, cut to the image; a turned box is the upright one around its corners."""
    height, width = image_size
    if name == "flip":
        return flip_boxes(boxes, width)
    if name == "cutout":
        return boxes
    if name == "resize":
        inner, (top, left) = _shrunk(image_size)
        scale = boxes.new_tensor([inner[1] / width, inner[0] / height] * 2)
        return boxes * scale + boxes.new_tensor([left, top] * 2)
    # rotate, counter-clockwise on the screen, where y points down: x' = x cos + y sin, y' = y cos - x sin
    cos, sin = math.cos(math.radians(ANGLE)), math.sin(math.radians(ANGLE))
    x, y = boxes[..., [0, 2, 2, 0]] - width / 2, boxes[..., [1, 1, 3, 3]] - height / 2  # (..., 4) corners
    high, wide = transforms.rotate(torch.zeros(1, *image_size), ANGLE, expand=True).shape[-2:]  # before it is scaled
    turned_x, turned_y = (x * cos + y * sin) * (width / wide), (y * cos - x * sin) * (height / high)
    corners = torch.stack([turned_x + width / 2, turned_y + height / 2], dim=-1)  # (..., 4, 2)
    return clip_boxes_to_image(torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1), image_size)


@dataclass(frozen=True)
class Viewed:
    """Images as a view shows them, to predict on; plain: what is detected in the images as they are, for cutout."""

    images: Images
    name: str
    plain: Detections | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getattr__(self, what: str):
        return getattr(self.images, what)  # ids, sizes, groups, image_size

    def batches(self, chunks: Sequence, device: str | torch.device = "cpu") -> Iterator[Tensor]:
        """The view's pixels for each chunk of row numbers in turn."""
        for chunk, pixels in zip(chunks, self.images.batches(chunks, device), strict=True):
            patches = None
            if self.name == "cutout":
                found, ids = self.plain.take(chunk), [self.images.ids[row] for row in chunk]
                patches = cutout_patches(ids, found.boxes, found.valid, self.images.image_size)
            yield change_view(self.name, pixels, patches)
