"""Augmentation of whole batches as tensors, on the device they live on: mosaic, colour, scale and translate crop.

Speaks uint8 pixels (B, 3, H, W), padded boxes (B, K, 4) xyxy pixels, classes (B, K) with 0 = padding, ignore (B, K).
`draw_augmentation` makes the random numbers, `apply_augmentation` uses them, so a whole pass can be drawn ahead.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import clip_boxes_to_image

from ..config import AugmentConfig

MIN_VISIBLE = 0.4  # part of its area
FILL = 114.0  # grey of what a crop uncovers, as in the letterbox
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # pixels, boxes, classes, ignore
_GREY = (0.299, 0.587, 0.114)  # luminance of R, G, B (ITU-R BT.601)


class AugmentDraws(NamedTuple):
    """Uniform numbers in [0, 1) for B images, all the chance in an augmentation; the last three for mosaics."""

    unused: Tensor  # (B,) mirrors are drawn by whoever takes the batch; here to keep the numbers of old records
    colour: Tensor  # (3, B) brightness, contrast, saturation
    zoom: Tensor  # (B,)
    move: Tensor  # (B, 2) right, down
    chosen: Tensor | None = None  # (B,) is it a mosaic?
    others: Tensor | None = None  # (B, 3) the three images joined to it
    points: Tensor | None = None  # (B, 2) where the four meet


def draw_augmentation(batch: int, generator: torch.Generator, mosaic: bool = False) -> AugmentDraws:
    """The numbers for one batch, on the generator's device: as many whatever the other settings are."""
    shapes = [(batch,), (3, batch), (batch,), (batch, 2)] + [(batch,), (batch, 3), (batch, 2)] * mosaic
    return AugmentDraws(*(torch.rand(*shape, generator=generator, device=generator.device) for shape in shapes))


def apply_augmentation(
    pixels: Tensor, boxes: Tensor, classes: Tensor, ignore: Tensor, draws: AugmentDraws, recipe: AugmentConfig
) -> Batch:
    """One random change an image: joined to a mosaic, recoloured, scaled and moved; the four tensors again.

    draws: of `draw_augmentation`, with those of a mosaic where `recipe.mosaic` > 0.
    recipe: mosaic, a probability; colour: three factors uniform in [1 - colour, 1 + colour]; zoom, the range of the
        enlargement, log-uniform; shift, the largest one as a part of each side. A mosaic's point lies between a
        quarter and three quarters of each side. After a move padding may lie between objects: go by `classes > 0`.
    """
    batch, count, (height, width) = (pixels, boxes, classes, ignore), len(pixels), pixels.shape[-2:]
    draws = AugmentDraws(*(None if t is None else t.to(pixels.device) for t in draws))
    if recipe.mosaic > 0:
        itself = torch.arange(count, device=pixels.device)[:, None]
        sources = torch.cat([itself, (draws.others * count).long().clamp(max=count - 1)], dim=1)  # (B, 4)
        centre = ((0.25 + 0.5 * draws.points) * draws.points.new_tensor([width, height])).long()  # (B, 2) x, y
        batch = join_four(batch, draws.chosen < recipe.mosaic, sources, centre)
    if recipe.colour > 0:
        batch = change_colour(batch[0], *(1 + (2 * draws.colour - 1) * recipe.colour)), *batch[1:]
    low, high = recipe.zoom
    if (low, high) != (1.0, 1.0) or recipe.shift > 0:
        shift = (2 * draws.move - 1) * recipe.shift * draws.move.new_tensor([width, height])
        batch = scale_translate(batch, low * (high / low) ** draws.zoom, shift)
    return batch


def change_colour(pixels: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """uint8 pixels with their brightness, contrast about the mean grey, and saturation multiplied by (B,), in order."""
    image = pixels.float()
    weights = image.new_tensor(_GREY)[:, None, None]
    brightness, contrast, saturation = (f[:, None, None, None] for f in (brightness, contrast, saturation))
    image = (image * brightness).clamp(0, 255)
    mean = (image * weights).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)  # (B, 1, 1, 1)
    image = (mean + (image - mean) * contrast).clamp(0, 255)
    grey = (image * weights).sum(dim=1, keepdim=True)  # (B, 1, H, W)
    return (grey + (image - grey) * saturation).clamp(0, 255).round().to(torch.uint8)


def scale_translate(batch: Batch, scale: Tensor, shift: Tensor) -> Batch:
    """Each image enlarged by `scale` (B,) about its centre, moved by `shift` (B, 2) pixels right, down, and cropped.

    Boxes are clipped. An object with less than MIN_VISIBLE of its area turns to ignore, one out of sight to padding.
    """
    pixels, boxes, classes, ignore = batch
    height, width = pixels.shape[-2:]
    side = scale.new_tensor([width, height])
    # grid_sample asks where an output pixel comes from; the image spans -1..1 there: in = (out - 2 shift) / scale
    theta = scale.new_zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -2 * shift / side / scale[:, None]
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels.float() - FILL, grid, padding_mode="zeros", align_corners=False) + FILL
    centre = (side / 2).repeat(2)  # (4,) x, y, x, y
    whole = (boxes - centre) * scale[:, None, None] + centre + shift.repeat(1, 2)[:, None]  # (B, K, 4)
    seen = clip_boxes_to_image(whole, (height, width))
    area, left = ((b[..., 2:] - b[..., :2]).clamp(min=0).prod(dim=-1) for b in (whole, seen))
    present = (classes > 0) & (left > 0)
    ignore = present & (ignore | (left < (MIN_VISIBLE - 1e-5) * area))
    return moved.clamp(0, 255).round().to(torch.uint8), seen * present[..., None], classes * present, ignore


def join_four(batch: Batch, mask: Tensor, sources: Tensor, centre: Tensor) -> Batch:
    """A mosaic where `mask` (B,) bool is True: four images of the batch joined at a point of a canvas of the same size.

    That four images are mixed: Bochkovskiy et al. 2020 (2004.10934), sec. 3.3; how is ours. A box that was cut is
    dropped if less than a tenth of its area is left or its shorter side is under 2 pixels. Objects come first; K is 4K.
    sources (B, 4): rows for the quadrants top left, top right, bottom left, bottom right. centre (B, 2): whole pixels
    x, y. Each image lies unscaled with one corner on the centre, cut to its quadrant.
    """
    pixels, boxes, classes, ignore = batch
    (count, longest), (height, width) = classes.shape, pixels.shape[-2:]
    x = torch.arange(width, device=pixels.device) - centre[:, :1]  # (B, W) from the centre; below 0: left of it
    y = torch.arange(height, device=pixels.device) - centre[:, 1:]  # (B, H)
    quadrant = 2 * (y >= 0).long()[:, :, None] + (x >= 0).long()[:, None]  # (B, H, W)
    source = sources.gather(1, quadrant.flatten(1)).view_as(quadrant)
    joined = pixels.permute(0, 2, 3, 1)[source, (y % height)[:, :, None], (x % width)[:, None]]  # waits for no GPU
    joined = torch.where(mask[:, None, None, None], joined.permute(0, 3, 1, 2), pixels)

    right_low, side = boxes.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]]), boxes.new_tensor([width, height])
    point = centre.to(boxes.dtype)[:, None]  # (B, 1, 2)
    low, high = point * right_low, point + (side - point) * right_low  # (B, 4, 2) corners of the quadrants
    shift = point - (1 - right_low) * side  # (B, 4, 2)
    whole = boxes[sources] + shift.repeat(1, 1, 2)[:, :, None]  # (B, 4, K, 4)
    seen = torch.cat([whole[..., :2].maximum(low[:, :, None]), whole[..., 2:].minimum(high[:, :, None])], dim=-1)
    extent = seen[..., 2:] - seen[..., :2]
    left, area = extent.clamp(min=0).prod(dim=-1), (whole[..., 2:] - whole[..., :2]).prod(dim=-1)  # (B, 4, K)
    dropped = (seen != whole).any(dim=-1) & ((left < 0.1 * area) | (extent.amin(dim=-1) < 2))
    present = (classes[sources] > 0) & (left > 0) & ~dropped

    def chosen(mosaic: Tensor, was: Tensor) -> Tensor:
        """(B, 4K, ...): the mosaic's objects, or those of an image that stays with room for as many behind them."""
        room = torch.cat([was, was.new_zeros(count, 3 * longest, *was.shape[2:])], dim=1)
        return torch.where(mask.view(-1, *[1] * (was.dim() - 1)), mosaic.flatten(1, 2), room)

    boxes = chosen(seen * present[..., None], boxes)
    classes, ignore = chosen(classes[sources] * present, classes), chosen(ignore[sources] & present, ignore)
    order = (classes == 0).int().argsort(dim=1, stable=True)  # (B, 4K) objects first, otherwise as they were
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return joined, boxes, classes.gather(1, order), ignore.gather(1, order)


def random_crop(pixels: Tensor, shift: Tensor, crop: int) -> Tensor:
    """Images (B, 3, H, W) with a black border of `crop` pixels, cut to their size from `shift` (B, 2) down, right."""
    if crop == 0:
        return pixels
    (count, channels, height, width), shift = pixels.shape, shift.to(pixels.device)
    image, channel = (torch.arange(n, device=pixels.device)[:, None, None] for n in (count, channels))
    rows = (shift[:, :1] + torch.arange(height, device=pixels.device))[:, None, :, None]  # (B, 1, H, 1)
    columns = (shift[:, 1:] + torch.arange(width, device=pixels.device))[:, None, None]  # (B, 1, 1, W)
    return functional.pad(pixels, (crop,) * 4)[image[..., None], channel, rows, columns]
