"""CALD's changed views against its released rules, written out here with Pillow and plain loops."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fedal_utils.data import Detections, Images, views
from fedal_utils.seeding import rng_for

SIZE = (64, 96)


def squares(height=SIZE[0], width=SIZE[1]):
    """Three images with one bright square each, and its box."""
    pixels = torch.full((3, 3, height, width), 60, dtype=torch.uint8)
    boxes = torch.tensor([[8.0, 10.0, 28.0, 30.0], [50.0, 20.0, 70.0, 44.0], [66.0, 30.0, 88.0, 58.0]])
    for image, (x1, y1, x2, y2) in zip(pixels, boxes.int().tolist(), strict=True):
        image[:, y1:y2, x1:x2] = 255
    return pixels, boxes


def found(boxes: torch.Tensor) -> Detections:
    """(N, T, 4) boxes as detections; boxes without area are padding."""
    valid = (boxes[..., 2] > boxes[..., 0]).long()
    return Detections(boxes, 0.5 * valid, valid, torch.stack([1.0 - valid, valid], dim=-1))


@pytest.mark.parametrize("name", ["flip", "resize", "rotate"])
@pytest.mark.parametrize("size", [SIZE, (65, 90)])
def test_a_moved_box_lies_on_what_it_holds(name, size):
    pixels, boxes = squares(*size)
    seen, moved = views.change_view(name, pixels), views.move_boxes(name, boxes, size)
    assert seen.shape == pixels.shape and seen.dtype == torch.uint8
    for image, box in zip(seen, moved, strict=True):
        bright = (image[0] > 157).nonzero()
        mark = torch.cat([bright.amin(0).flip(0), bright.amax(0).flip(0) + 1]).float()  # x1, y1, x2, y2
        assert (mark - box).abs().max() <= 1.2, (name, mark, box)


def test_rotate_is_pillows_with_expansion_scaled_back_as_released():
    pixels = torch.randint(0, 256, (3, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    smooth = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((12, 8))
    smooth = smooth.resize(SIZE[::-1], Image.Resampling.BICUBIC)
    turned = smooth.rotate(5, expand=True)
    assert turned.size[0] > SIZE[1] and turned.size[1] > SIZE[0]
    want = np.asarray(turned.resize(smooth.size, Image.Resampling.BICUBIC)).astype(int)
    got = views.change_view("rotate", torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None])[0]
    away = np.abs(got.permute(1, 2, 0).numpy().astype(int) - want)
    assert np.median(away) <= 4 and (away > 24).mean() < 0.02  # another nearest pixel here and there
    assert (got[:, 0, 0] == 0).all() and (got[:, -1, -1] == 0).all()  # corners are black


def test_rotated_corners_by_hand():
    # 64 x 96 turned by 5 degrees: 96 cos + 64 sin = 101.2 wide, 64 cos + 96 sin = 72.1 high; PIL takes 103 x 73 or so.
    # The middle stays; a point 20 right of it goes to 20 cos * 96 / W right and 20 sin * 64 / H up.
    high, wide = views.transforms.rotate(torch.zeros(1, *SIZE), views.ANGLE, expand=True).shape[-2:]
    assert 101 <= wide <= 104 and 72 <= high <= 75
    x, y = 48 + 20 * math.cos(math.radians(5)) * 96 / wide, 32 - 20 * math.sin(math.radians(5)) * 64 / high
    point = views.move_boxes("rotate", torch.tensor([[68.0, 32.0, 68.0, 32.0]]), SIZE)[0].tolist()
    assert point == pytest.approx([x, y, x, y], abs=1e-4)
    whole = views.move_boxes("rotate", torch.tensor([[0.0, 0.0, 96.0, 64.0]]), SIZE)[0].tolist()
    assert whole == pytest.approx([0, 0, 96, 64], abs=1.5)  # with expansion nothing is cut


def slow_patches(name, boxes, size):
    """The released rule as a loop over tries."""
    drawn, kept = rng_for(0, "cutout", name).random((50, 4)), []
    for w, h, left, top in drawn.tolist():
        side = (0.05 + 0.15 * w) * size[1], (0.05 + 0.15 * h) * size[0]
        x, y = left * (size[1] - side[0]), top * (size[0] - side[1])
        x1, y1, x2, y2 = int(x), int(y), int(x + side[0]), int(y + side[1])
        shares = [0]
        for a, b, c, d in boxes:
            common = max(0, min(x2, c) - max(x1, a)) * max(0, min(y2, d) - max(y1, b))
            shares.append(common / ((c - a) * (d - b)))
        if 0.1 <= max(shares) <= 0.4:
            kept.append([x1, y1, x2, y2])
    return (kept + [[0, 0, 0, 0]] * 2)[:2]


def test_cutout_takes_the_first_two_places_that_cover_a_tenth_to_four_tenths_of_the_most_covered_box():
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(40, 3, 2, generator=g) * torch.tensor([60.0, 40.0])
    boxes = torch.cat([corner, corner + 4 + 24 * torch.rand(40, 3, 2, generator=g)], dim=-1)
    boxes[::2, 2], boxes[::5] = 0, boxes[::5] * torch.tensor([True, False, False])[:, None]  # some have fewer boxes
    boxes[7, 0] = torch.tensor([0.0, 0.0, 96.0, 64.0])  # too large for any patch
    boxes[7, 1:] = 0
    ids = [f"image {i}" for i in range(40)]
    got = views.cutout_patches(ids, boxes, boxes[..., 2] > boxes[..., 0], SIZE)
    want = [slow_patches(i, [b for b in row.tolist() if b[2] > b[0]], SIZE) for i, row in zip(ids, boxes, strict=True)]
    assert got.tolist() == want
    assert set((got[..., 2] > got[..., 0]).sum(1).tolist()) == {0, 1, 2}  # images with no, one and two patches


def test_cutout_covers_its_patches_in_black_and_nothing_without_a_box():
    pixels, boxes = squares()
    images = Images(("a", "b", "c"), pixels, torch.tensor([SIZE] * 3))
    plain = found(torch.stack([boxes[:1], boxes[1:2], torch.zeros(1, 4)]))
    (seen,) = views.Viewed(images, "cutout", plain).batches([[0, 1, 2]])
    patches = views.cutout_patches(images.ids, plain.boxes, plain.valid, SIZE)
    want = pixels.clone()
    for image, hidden in zip(want, patches.int().tolist(), strict=True):
        for x1, y1, x2, y2 in hidden:
            image[:, y1:y2, x1:x2] = 0
    assert torch.equal(seen, want)
    assert torch.equal(seen[2], pixels[2]) and not torch.equal(seen[0], pixels[0])
    assert torch.equal(views.move_boxes("cutout", boxes, SIZE), boxes)


def test_a_view_of_an_image_is_the_same_in_every_batch():
    pixels, boxes = squares()
    images = Images(("a", "b", "c"), pixels, torch.tensor([SIZE] * 3))
    for name in views.VIEWS:
        viewed = views.Viewed(images, name, found(boxes[:, None]))
        together = torch.cat(list(viewed.batches([[0, 1, 2]])))
        assert torch.equal(together[[2, 0, 1]], torch.cat(list(viewed.batches([[2], [0], [1]]))))
        assert (len(viewed), viewed.ids, viewed.image_size) == (3, ("a", "b", "c"), SIZE)
