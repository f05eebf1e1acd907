"""Augmentation of whole batches as tensors, on the device they live on: flip, colour, scale and translate crop.

Speaks uint8 pixels (B, 3, H, W), padded boxes (B, K, 4) xyxy pixels, classes (B, K) with 0 = padding, ignore (B, K).
Every draw comes from the generator handed in; it may live on the CPU while the pixels do not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .boxes import clip_boxes, flip_boxes

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One random change an image: mirrored, recoloured, scaled and moved; returns the four tensors in the same types.

    flip: probability. colour: strengths b, c, s of brightness, contrast and saturation (one number for all three); each
    factor is uniform in [1 - strength, 1 + strength]. scale: range of the enlargement, log-uniform. translate: the
    largest shift as a fraction of each side. min_visible, min_object: see `scale_translate`; padding may then lie
    between objects, so go by `classes > 0`. Settings that change nothing return the same bytes.
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

    def uniform(*shape: int) -> Tensor:  # the same number of draws whatever the settings
        return torch.rand(*shape, generator=generator, device=generator.device).to(pixels.device)

    batch, (height, width) = len(pixels), pixels.shape[-2:]
    mirror, colours, zoom, move = uniform(batch) < flip, uniform(3, batch), uniform(batch), uniform(batch, 2)
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
