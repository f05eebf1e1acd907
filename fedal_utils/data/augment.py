"""Augmentation of whole batches as tensors, on the device they live on: mosaic, flip, colour, scale and translate crop;
and the fixed changed views of an image by which some strategies judge a model.

Speaks uint8 pixels (B, 3, H, W), padded boxes (B, K, 4) xyxy pixels, classes (B, K) with 0 = padding, ignore (B, K).
Every draw comes from the generator handed in; it may live on the CPU while the pixels do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

from .boxes import clip_boxes, flip_boxes
from .readers import Images, StreamedImages
from ..seeding import rng_for

FILL = 114.0  # grey of what a crop uncovers, as in the letterbox
_GREY = (0.299, 0.587, 0.114)  # luminance of R, G, B (ITU-R BT.601)


def horizontal_flip(pixels: Tensor, boxes: Tensor, classes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels and boxes mirrored where `mask` (B,) bool is True; padding rows stay zero. Twice is the identity."""
    mirror = mask[:, None] & (classes > 0)  # (B, K)
    pixels = torch.where(mask[:, None, None, None], pixels.flip(-1), pixels)
    return pixels, torch.where(mirror[..., None], flip_boxes(boxes, pixels.shape[-1]), boxes)


def change_colour(pixels: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """uint8 pixels with their brightness, contrast about the mean grey, and saturation multiplied, in this order.

    Each factor is (B,) float, one an image; factors of 1 give the same bytes.
    """

    def per_image(factor: Tensor) -> Tensor:
        return factor.to(image)[:, None, None, None]

    image = pixels.float()
    weights = image.new_tensor(_GREY)[:, None, None]
    image = (image * per_image(brightness)).clamp(0, 255)
    mean = (image * weights).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)  # (B, 1, 1, 1)
    image = (mean + (image - mean) * per_image(contrast)).clamp(0, 255)
    grey = (image * weights).sum(dim=1, keepdim=True)  # (B, 1, H, W)
    image = grey + (image - grey) * per_image(saturation)
    return image.clamp(0, 255).round().to(torch.uint8)


def scale_translate(
    pixels: Tensor,
    boxes: Tensor,
    classes: Tensor,
    ignore: Tensor,
    scale: Tensor,
    shift: Tensor,
    min_visible: float = 0.4,
    min_object: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each image enlarged by `scale` (B,) about its centre, moved by `shift` (B, 2) pixels right, down, and cropped.

    Boxes follow and are clipped. An object of which less than `min_visible` of the area is left, or whose shorter side
    becomes less than `min_object` pixels, turns to ignore; one that is out of sight turns to padding (all zero).
    """
    height, width = pixels.shape[-2:]
    side = pixels.new_tensor([width, height], dtype=torch.float32)
    scale, shift = scale.to(pixels.device, torch.float32), shift.to(pixels.device, torch.float32)
    # grid_sample asks where an output pixel comes from; the image spans -1..1 there: in = (out - 2 shift) / scale
    theta = pixels.new_zeros(len(pixels), 2, 3, dtype=torch.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -2 * shift / side / scale[:, None]
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels.float() - FILL, grid, padding_mode="zeros", align_corners=False) + FILL
    pixels = moved.clamp(0, 255).round().to(torch.uint8)

    centre = (side / 2).repeat(2)  # (4,) x, y, x, y
    whole = (boxes - centre) * scale[:, None, None] + centre + shift.repeat(1, 2)[:, None]  # (B, K, 4)
    seen = clip_boxes(whole, (height, width))
    sides = (seen[..., 2:] - seen[..., :2]).clamp(min=0)
    area, left = (whole[..., 2:] - whole[..., :2]).prod(dim=-1), sides.prod(dim=-1)
    gone = (classes > 0) & (left <= 0)
    present = (classes > 0) & ~gone
    # a hair of slack, or rounding alone would turn an untouched object to ignore at min_visible = 1
    reduced = (left < (min_visible - 1e-5) * area) | (sides.amin(dim=-1) < min_object)
    ignore = (ignore | (present & reduced)) & ~gone
    return pixels, seen * present[..., None], classes * present, ignore


def join_four(
    pixels: Tensor,
    boxes: Tensor,
    classes: Tensor,
    ignore: Tensor,
    mask: Tensor,
    sources: Tensor,
    centre: Tensor,
    min_visible: float = 0.1,
    min_side: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A mosaic where `mask` (B,) bool is True: four images of the batch joined at a point of a canvas of the same size.

    Bochkovskiy et al. 2020 (2004.10934), sec. 3.3, which says that four images are mixed; how is ours. sources: (B, 4)
    rows of the batch for the quadrants top left, top right, bottom left, bottom right. centre: (B, 2) whole pixels
    x, y. Nothing is scaled: each image lies with one corner on the centre and is cut to its quadrant. For
    centre (20, 10) in 60 x 40: pixel (0, 0) shows (40, 30) of the first image, (20, 10) shows (0, 0) of the last.

    Boxes follow and are clipped to their quadrant, ignore flags go along. A box that was cut is dropped if less than
    `min_visible` of its area is left or its shorter side is under `min_side` pixels. Objects come first, then padding;
    K is the largest number of objects of an image (at least 1).
    """
    (count, longest), (height, width) = classes.shape, pixels.shape[-2:]
    joined = pixels.clone()
    for i, four, (x, y), wanted in zip(
        range(count), sources.tolist(), centre.long().tolist(), mask.tolist(), strict=True
    ):
        if wanted:  # whole rectangles: on a CPU 40 times as fast as one gather by pixel
            joined[i, :, :y, :x] = pixels[four[0], :, height - y :, width - x :]
            joined[i, :, :y, x:] = pixels[four[1], :, height - y :, : width - x]
            joined[i, :, y:, :x] = pixels[four[2], :, : height - y, width - x :]
            joined[i, :, y:, x:] = pixels[four[3], :, : height - y, : width - x]

    mask, sources, centre = (t.to(boxes.device) for t in (mask, sources, centre))
    side = boxes.new_tensor([width, height])
    right_low = boxes.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]])  # (4, 2) of a quadrant
    point = centre.to(boxes.dtype)[:, None]  # (B, 1, 2)
    shift = point - (1 - right_low) * side  # (B, 4, 2)
    low, high = point * right_low, point + (side - point) * right_low  # (B, 4, 2) corners of the quadrants
    whole = boxes[sources] + shift.repeat(1, 1, 2)[:, :, None]  # (B, 4, K, 4)
    seen = torch.cat(
        [whole[..., :2].maximum(low[:, :, None]), whole[..., 2:].minimum(high[:, :, None])], dim=-1
    )  # (B, 4, K, 4)
    sides, full = (seen[..., 2:] - seen[..., :2]).clamp(min=0), whole[..., 2:] - whole[..., :2]
    left, area = sides.prod(dim=-1), full.prod(dim=-1)  # (B, 4, K)
    cut = (seen != whole).any(dim=-1)
    dropped = cut & ((left < min_visible * area) | (sides.amin(dim=-1) < min_side))
    kinds, ignored = classes[sources], ignore[sources]  # (B, 4, K)
    present = (kinds > 0) & (left > 0) & ~dropped

    def settled(mosaic: Tensor, was: Tensor) -> Tensor:
        """(B, 4K, ...): the mosaic's objects, or those of an image that stays with room for as many behind them."""
        room = torch.cat([was, was.new_zeros(count, 3 * longest, *was.shape[2:])], dim=1)
        chosen = mask.reshape(-1, *[1] * (was.dim() - 1))
        return torch.where(chosen, mosaic.reshape(count, 4 * longest, *was.shape[2:]), room)

    classes = settled(kinds * present, classes)
    ignore = settled(ignored & present, ignore)
    boxes = settled(seen * present[..., None], boxes)
    order = (classes == 0).int().argsort(dim=1, stable=True)  # (B, 4K) objects first, otherwise as they were
    order = order[:, : max([1, *(classes > 0).sum(dim=1).tolist()])]  # (B, K) of the fullest image
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return joined, boxes, classes.gather(1, order), ignore.gather(1, order)


def random_crop(pixels: Tensor, shift: Tensor, crop: int) -> Tensor:
    """Images (B, 3, H, W) with a black border of `crop` pixels, cut back to their size from `shift` (B, 2) on.

    shift: (down, right) in 0..2 * crop, whole numbers; `crop` itself gives the image as it was.
    """
    if crop == 0:
        return pixels
    height, width = pixels.shape[-2:]
    shift = shift.to(pixels.device)
    rows = shift[:, :1] + torch.arange(height, device=pixels.device)  # (B, H)
    columns = shift[:, 1:] + torch.arange(width, device=pixels.device)  # (B, W)
    padded = torch.nn.functional.pad(pixels, (crop,) * 4)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None, None]
    channel = torch.arange(pixels.shape[1], device=pixels.device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def augment(
    pixels: Tensor,
    boxes: Tensor,
    classes: Tensor,
    ignore: Tensor,
    generator: torch.Generator,
    flip: float = 0.5,
    colour: float | tuple[float, float, float] = (0.0, 0.0, 0.0),
    scale: tuple[float, float] = (1.0, 1.0),
    translate: float = 0.0,
    min_visible: float = 0.4,
    min_object: float = 0.0,
    mosaic: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One random change an image: mirrored, recoloured, scaled and moved; returns the four tensors in the same types.

    flip: probability. colour: strengths b, c, s of brightness, contrast and saturation (one number for all three); each
    factor is uniform in [1 - strength, 1 + strength]. scale: range of the enlargement, log-uniform. translate: the
    largest shift as a fraction of each side. min_visible, min_object: see `scale_translate`; padding may then lie
    between objects, so go by `classes > 0`. mosaic: probability that, before all this, an image is joined with three
    drawn from the batch with replacement, at a point between a quarter and three quarters of each side (`join_four`);
    K then becomes what the fullest image needs. Settings that change nothing return the same bytes.
    """
    strengths = (colour, colour, colour) if isinstance(colour, (int, float)) else tuple(colour)
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability in [0, 1], got {flip}")
    if len(strengths) != 3 or not all(0 <= s <= 1 for s in strengths):
        raise ValueError(f"colour must be one or three strengths in [0, 1], got {colour}")
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be a range (low, high) above 0, got {scale}")
    if not 0 <= translate < 1:
        raise ValueError(f"translate must be in [0, 1), got {translate}")
    if not 0 <= mosaic <= 1:
        raise ValueError(f"mosaic must be a probability in [0, 1], got {mosaic}")

    def uniform(*shape: int) -> Tensor:  # the same number of draws whatever the settings, mosaic apart
        return torch.rand(*shape, generator=generator, device=generator.device).to(pixels.device)

    batch, (height, width) = len(pixels), pixels.shape[-2:]
    mirror, colours, zoom, move = uniform(batch) < flip, uniform(3, batch), uniform(batch), uniform(batch, 2)
    if mosaic > 0:  # draws after the others, and only here: without it nothing else changes
        chosen, others, points = uniform(batch) < mosaic, uniform(batch, 3), uniform(batch, 2)
        itself = torch.arange(batch, device=others.device)[:, None]
        sources = torch.cat([itself, (others * batch).long().clamp(max=batch - 1)], dim=1)  # (B, 4)
        centre = ((0.25 + 0.5 * points) * points.new_tensor([width, height])).long()  # (B, 2) x, y
        pixels, boxes, classes, ignore = join_four(pixels, boxes, classes, ignore, chosen, sources, centre)
    if flip > 0:
        pixels, boxes = horizontal_flip(pixels, boxes, classes, mirror)
    if any(strengths):
        factors = 1 + (2 * colours - 1) * colours.new_tensor(strengths)[:, None]  # (3, B)
        pixels = change_colour(pixels, *factors)
    if tuple(scale) != (1.0, 1.0) or translate > 0:
        scales = scale[0] * (scale[1] / scale[0]) ** zoom
        shifts = (2 * move - 1) * translate * move.new_tensor([width, height])
        pixels, boxes, classes, ignore = scale_translate(
            pixels, boxes, classes, ignore, scales, shifts, min_visible, min_object
        )
    return pixels, boxes, classes, ignore


# --- views ------------------------------------------------------------------------------------------------------------

# The changes under which CALD (2103.10374) compares a detector's output with itself. Its paper gives the factor, the
# angle and the number of patches; where the patches lie and how large they are is ours.
VIEWS = ("flip", "cutout", "resize", "rotate")
RESIZE, ANGLE, PATCHES, PATCH_SIDE = 0.8, 5.0, 2, (0.1, 0.3)  # part of the side; degrees; how many; parts of the side


def cutout_patches(ids: Sequence[str], image_size: tuple[int, int]) -> Tensor:
    """Where grey patches cover each image (N, PATCHES, 4) xyxy whole pixels; an image's id decides, nothing else."""
    height, width = image_size
    rows = []
    for name in ids:
        rng = rng_for(0, "cutout", name)
        part = rng.uniform(*PATCH_SIDE, size=(PATCHES, 2))  # of width, height
        place = rng.random((PATCHES, 2)) * (1 - part)
        rows.append(
            torch.from_numpy(place).repeat(1, 2) + torch.cat([torch.zeros(PATCHES, 2), torch.from_numpy(part)], 1)
        )
    if not rows:
        return torch.zeros(0, PATCHES, 4)
    return (torch.stack(rows) * torch.tensor([width, height, width, height])).round()


def change_view(name: str, pixels: Tensor, ids: Sequence[str]) -> Tensor:
    """uint8 pixels (B, 3, H, W) of a view in `VIEWS`; what a change uncovers or covers is grey."""
    height, width = pixels.shape[-2:]
    if name == "flip":
        return pixels.flip(-1)
    if name == "cutout":
        patches = cutout_patches(ids, (height, width)).to(pixels.device)
        y, x = torch.arange(height, device=pixels.device)[:, None], torch.arange(width, device=pixels.device)
        left, top, right, bottom = (side[..., None, None] for side in patches.unbind(-1))  # (B, P, 1, 1) each
        covered = ((x >= left) & (x < right) & (y >= top) & (y < bottom)).any(1, keepdim=True)  # (B, 1, H, W)
        return torch.where(covered, torch.full_like(pixels, round(FILL)), pixels)
    if name == "resize":
        inner, (top, left) = _shrunk((height, width))
        small = transforms.resize(pixels, list(inner), antialias=True)
        return functional.pad(
            small, (left, width - inner[1] - left, top, height - inner[0] - top), value=round(FILL)
        )
    if name == "rotate":
        bilinear = transforms.InterpolationMode.BILINEAR
        return transforms.rotate(pixels, ANGLE, interpolation=bilinear, fill=[FILL] * 3)
    raise ValueError(f"view must be one of {VIEWS}, got {name!r}")


def _shrunk(image_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the view 'resize', and the top and left where it lies in the canvas."""
    height, width = image_size
    inner = max(1, round(height * RESIZE)), max(1, round(width * RESIZE))
    return inner, ((height - inner[0]) // 2, (width - inner[1]) // 2)


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
    if name == "rotate":  # counter-clockwise on the screen, where y points down: x' = x cos + y sin, y' = y cos - x sin
        cos, sin = math.cos(math.radians(ANGLE)), math.sin(math.radians(ANGLE))
        x = boxes[..., [0, 2, 2, 0]] - width / 2  # (..., 4) corners
        y = boxes[..., [1, 1, 3, 3]] - height / 2
        turned = torch.stack([x * cos + y * sin + width / 2, y * cos - x * sin + height / 2], dim=-1)  # (..., 4, 2)
        return clip_boxes(torch.cat([turned.amin(-2), turned.amax(-2)], dim=-1), image_size)
    raise ValueError(f"view must be one of {VIEWS}, got {name!r}")


@dataclass(frozen=True)
class Viewed:
    """Images as a view shows them: what `training.predict` and `training.cache_features` need of a set of images."""

    images: Images | StreamedImages
    name: str

    def __post_init__(self) -> None:
        if self.name not in VIEWS:
            raise ValueError(f"view must be one of {VIEWS}, got {self.name!r}")

    def __len__(self) -> int:
        return len(self.images)

    def __getattr__(self, what: str):
        if what in ("ids", "sizes", "groups", "image_size"):
            return getattr(self.images, what)
        raise AttributeError(what)

    def batches(self, chunks: Sequence, device: str | torch.device = "cpu") -> Iterator[Tensor]:
        """The view's pixels for each chunk of row numbers in turn."""
        for chunk, pixels in zip(chunks, self.images.batches(chunks, device), strict=True):
            yield change_view(self.name, pixels, [self.images.ids[row] for row in chunk])
