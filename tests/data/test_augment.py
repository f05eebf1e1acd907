"""Laws of augmentation: nothing changes nothing, boxes go where the pixels go."""

import pytest
import torch

from fedal_utils.config import AugmentConfig
from fedal_utils.data import augment as a

HEIGHT, WIDTH = 40, 60


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment(given, generator, **recipe):
    """Draws, then changes, by settings of `AugmentConfig`."""
    recipe = AugmentConfig.of(**recipe)
    return a.apply_augmentation(*given, a.draw_augmentation(len(given[0]), generator, recipe.mosaic > 0), recipe)


def batch(count: int = 4, objects: int = 3):
    """Noise with boxes inside; the last row of each image is padding."""
    g = rng(1)
    pixels = torch.randint(0, 256, (count, 3, HEIGHT, WIDTH), generator=g, dtype=torch.uint8)
    corner = torch.rand(count, objects, 2, generator=g) * torch.tensor([WIDTH / 2, HEIGHT / 2])
    boxes = torch.cat([corner, corner + 5 + 10 * torch.rand(count, objects, 2, generator=g)], dim=-1)
    classes = torch.randint(1, 4, (count, objects), generator=g)
    ignore = torch.rand(count, objects, generator=g) < 0.3
    boxes[:, -1], classes[:, -1], ignore[:, -1] = 0, 0, False
    return pixels, boxes, classes, ignore


def test_settings_that_change_nothing_change_nothing():
    given = batch()
    for got, was in zip(augment(given, rng()), given, strict=True):
        assert torch.equal(got, was)
    pixels, boxes, classes, ignore = given
    ones = torch.ones(4)
    assert torch.equal(a.change_colour(pixels, ones, ones, ones), pixels)
    moved = a.scale_translate(given, ones, torch.zeros(4, 2))
    assert torch.equal(moved[0], pixels) and torch.equal(moved[2], classes) and torch.equal(moved[3], ignore)
    torch.testing.assert_close(moved[1], boxes)


def rectangle(x1: int, y1: int, x2: int, y2: int):
    pixels = torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    pixels[:, :, y1:y2, x1:x2] = 255
    return pixels, torch.tensor([[[x1, y1, x2, y2]]]).float(), torch.ones(1, 1).long(), torch.zeros(1, 1).bool()


def test_scale_and_shift_worked_by_hand():
    # centre (30, 20); x: (24 - 30) * 2 + 30 + 4 = 22, (36 - 30) * 2 + 34 = 46; y: (15 - 20) * 2 + 20 - 3 = 7, 27
    given = rectangle(24, 15, 36, 25)
    pixels, boxes, classes, ignore = a.scale_translate(given, torch.tensor([2.0]), torch.tensor([[4.0, -3.0]]))
    assert boxes[0, 0].tolist() == pytest.approx([22, 7, 46, 27])
    assert classes.tolist() == [[1]] and ignore.tolist() == [[False]]


@pytest.mark.parametrize("seed", range(8))
def test_the_box_follows_a_drawn_rectangle(seed):
    given = rectangle(22, 12, 40, 30)
    pixels, boxes, classes, _ = augment(given, rng(seed), zoom=(0.7, 1.3), shift=0.15)
    bright = pixels[0, 0] > 184  # halfway between the grey that a crop uncovers and the rectangle
    rows, columns = bright.any(dim=1).nonzero(), bright.any(dim=0).nonzero()
    seen = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    assert boxes[0, 0].tolist() == pytest.approx(seen, abs=1.0)
    assert boxes[0, 0].tolist() != pytest.approx(given[1][0, 0].tolist(), abs=0.05)  # it did move


def test_objects_that_lose_their_area_turn_to_ignore_and_those_out_of_sight_to_padding():
    pixels = torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    boxes = torch.tensor([[[0, 0, 20, 20], [10, 0, 30, 20], [40, 0, 60, 20], [0, 0, 0, 0]]]).float()
    classes, ignore = torch.tensor([[1, 2, 3, 0]]), torch.zeros(1, 4).bool()
    ignore[0, 2] = True
    moved = a.scale_translate((pixels, boxes, classes, ignore), torch.ones(1), torch.tensor([[-15.0, 0.0]]))
    # 5 of 20 columns left (0.25 < 0.4): ignore; 15 of 20: kept; ignore stays ignore; padding stays padding
    assert moved[1].tolist() == [[[0, 0, 5, 20], [0, 0, 15, 20], [25, 0, 45, 20], [0, 0, 0, 0]]]
    assert moved[2].tolist() == [[1, 2, 3, 0]] and moved[3].tolist() == [[True, False, True, False]]
    gone = a.scale_translate((pixels, boxes, classes, ignore), torch.ones(1), torch.tensor([[-35.0, 0.0]]))
    assert gone[2].tolist() == [[0, 0, 3, 0]] and not gone[1][0, :2].any()
    assert gone[3].tolist() == [[False, False, True, False]]


def test_colour_worked_by_hand():
    pixels = torch.tensor([100, 100, 100, 200, 200, 200], dtype=torch.uint8).reshape(1, 2, 3).permute(0, 2, 1)
    pixels = pixels.reshape(1, 3, 1, 2).contiguous()  # two grey pixels, 100 and 200
    one, half, twice = torch.ones(1), torch.tensor([0.5]), torch.tensor([2.0])
    assert a.change_colour(pixels, half, one, one)[0, 0, 0].tolist() == [50, 100]
    assert a.change_colour(pixels, twice, one, one)[0, 0, 0].tolist() == [200, 255]  # clipped
    assert a.change_colour(pixels, one, half, one)[0, 0, 0].tolist() == [125, 175]  # towards the mean, 150
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert a.change_colour(red, one, one, torch.zeros(1)).flatten().tolist() == [60, 60, 60]  # 0.299 * 200
    assert torch.equal(a.change_colour(pixels, one, one, half), pixels)  # grey has no saturation


def slow_mosaic(given, sources, centres, min_visible=0.1, min_side=2.0):
    """Pixel by pixel and box by box, as one would do it with scissors: pixels and a list of objects per image."""
    pixels, boxes, classes, ignore = given
    height, width = pixels.shape[-2:]
    canvas, objects = torch.zeros_like(pixels), []
    for b, (four, (cx, cy)) in enumerate(zip(sources.tolist(), centres.tolist(), strict=True)):
        for y in range(height):
            for x in range(width):
                source = four[2 * (y >= cy) + (x >= cx)]
                canvas[b, :, y, x] = pixels[source, :, (y - cy) % height, (x - cx) % width]
        kept = []
        for quadrant, source in enumerate(four):
            right, low = quadrant % 2, quadrant // 2
            dx, dy = cx - (0 if right else width), cy - (0 if low else height)
            limits = (cx if right else 0, cy if low else 0, width if right else cx, height if low else cy)
            for box, kind, ignored in zip(*(t[source].tolist() for t in (boxes, classes, ignore)), strict=True):
                whole = [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy]
                part = [*map(max, whole[:2], limits[:2]), *map(min, whole[2:], limits[2:])]
                w, h = part[2] - part[0], part[3] - part[1]
                area = (whole[2] - whole[0]) * (whole[3] - whole[1])
                visible = part == whole or (w * h >= min_visible * area and min(w, h) >= min_side)
                if kind > 0 and min(w, h) > 0 and visible:
                    kept.append((kind, ignored, part))
        objects.append(kept)
    return canvas, objects


@pytest.mark.parametrize("seed", range(6))
def test_a_mosaic_is_what_scissors_make(seed):
    given = batch(5, 6)
    g = rng(seed)
    sources = torch.randint(0, 5, (5, 4), generator=g)
    centre = torch.stack([torch.randint(0, side + 1, (5,), generator=g) for side in (WIDTH, HEIGHT)], dim=1)
    pixels, boxes, classes, ignore = a.join_four(given, torch.ones(5).bool(), sources, centre)
    canvas, objects = slow_mosaic(given, sources, centre)
    assert torch.equal(pixels, canvas)
    for *labels, want in zip(boxes.tolist(), classes.tolist(), ignore.tolist(), objects, strict=True):
        got = [(kind, ignored, pytest.approx(box, abs=1e-4)) for box, kind, ignored in zip(*labels, strict=True) if kind]
        assert got == want
    assert boxes.shape == (5, 24, 4) and classes.shape == ignore.shape == (5, 24)
    assert not boxes[classes == 0].any() and not ignore[classes == 0].any()
    assert ((classes[:, 1:] == 0) | (classes[:, :-1] > 0)).all()  # padding comes last
    assert any(i for row in objects for _, i, _ in row) and any(not i for row in objects for _, i, _ in row)


def test_a_mosaic_worked_by_hand():
    # centre (20, 10) of 60 x 40. Quadrants: 20 x 10, 40 x 10, 20 x 30 and 40 x 30 (width x height). The four images:
    # 0 top left, shifted by (-40, -30): (38, 28, 50, 40) -> (-2, -2, 10, 10), cut to (0, 0, 10, 10), 100 of 144: kept
    # 1 top right, shifted by (20, -30): (0, 20, 10, 31.5) -> (20, -10, 30, 1.5): 1.5 px high: dropped
    # 2 bottom left, by (-40, 10): (20, 0, 42.5, 20) -> (-20, 10, 2.5, 30): 50 of 450, 0.11: kept, and it is ignore
    # 3 bottom right, by (20, 10): (30, 5, 60, 20) -> (50, 15, 80, 30), cut to (50, 15, 60, 30), 1/3: kept
    boxes = torch.tensor([[38, 28, 50, 40], [0, 20, 10, 31.5], [20, 0, 42.5, 20], [30, 5, 60, 20]])[:, None]
    pixels = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, HEIGHT, WIDTH).clone()
    given = pixels, boxes, torch.tensor([[1], [2], [3], [4]]), torch.tensor([[False], [False], [True], [False]])
    mask = torch.tensor([True, False, False, False])
    out = a.join_four(given, mask, torch.tensor([[0, 1, 2, 3]] * 4), torch.tensor([[20, 10]] * 4))
    assert out[0][0, 0, [9, 9, 10, 10], [19, 20, 19, 20]].tolist() == [0, 1, 2, 3]
    assert torch.equal(out[0][1:], pixels[1:])
    assert out[1][0].tolist() == [[0, 0, 10, 10], [0, 10, 2.5, 30], [50, 15, 60, 30], [0, 0, 0, 0]]
    assert out[2].tolist() == [[1, 3, 4, 0], [2, 0, 0, 0], [3, 0, 0, 0], [4, 0, 0, 0]]
    assert out[3].tolist() == [[False, True, False, False], [False] * 4, [True] + [False] * 3, [False] * 4]
    assert torch.equal(out[1][1:, 0], boxes[1:, 0])  # where the mask is False nothing moved


def test_mosaic_is_as_frequent_as_asked_and_the_same_generator_gives_the_same_bytes():
    pixels = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 3, 8, 12).contiguous()
    boxes = torch.tensor([[[1.0, 1.0, 11.0, 7.0]]]).repeat(200, 1, 1)
    given = pixels, boxes, torch.arange(1, 201)[:, None], torch.zeros(200, 1).bool()
    first, again = (augment(given, rng(s), mosaic=0.25) for s in (3, 3))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    joined = [len(image.unique()) > 1 for image in first[0]]
    assert 30 <= sum(joined) <= 70  # binomial: 50, standard deviation 6
    whole = torch.tensor(joined).logical_not()
    assert torch.equal(first[0][whole], pixels[whole]) and torch.equal(first[1][whole][:, 0], boxes[whole][:, 0])
    every = augment(given, rng(3), mosaic=1.0)
    assert torch.equal(every[0][:, 0, 0, 0], pixels[:, 0, 0, 0])  # each image is the top left of its own mosaic
    corners = every[0][:, 0, [0, -1, -1], [-1, 0, -1]].long()
    assert len(corners.unique()) > 100  # the other three come from all over the batch


def test_a_random_crop_worked_by_hand():
    image = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3).expand(3, 3, 3, 3)
    out = a.random_crop(image, torch.tensor([[1, 1], [0, 1], [2, 0]]), 1)
    assert out[0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert out[1, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert out[2, 0].tolist() == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]
    assert a.random_crop(image, torch.zeros(3, 2, dtype=torch.int64), 0) is image
