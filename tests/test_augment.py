"""Laws of augmentation: nothing changes nothing, flips undo themselves, boxes go where the pixels go."""

import pytest
import torch

from fedal_utils import augment as a

HEIGHT, WIDTH = 40, 60


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    for got, was in zip(a.augment(*given, rng(), flip=0.0), given, strict=True):
        assert torch.equal(got, was)
    pixels, boxes, classes, ignore = given
    ones = torch.ones(4)
    assert torch.equal(a.change_colour(pixels, ones, ones, ones), pixels)
    moved = a.scale_translate(*given, ones, torch.zeros(4, 2), min_visible=1.0)
    assert torch.equal(moved[0], pixels) and torch.equal(moved[2], classes) and torch.equal(moved[3], ignore)
    torch.testing.assert_close(moved[1], boxes)


def test_flipping_twice_is_the_identity_and_padding_stays_zero():
    pixels, boxes, classes, _ = batch()
    mask = torch.tensor([True, False, True, True])
    once = a.horizontal_flip(pixels, boxes, classes, mask)
    assert torch.equal(once[0][0], pixels[0].flip(-1)) and torch.equal(once[0][1], pixels[1])
    assert not once[1][:, -1].any()
    twice = a.horizontal_flip(*once, classes, mask)
    assert torch.equal(twice[0], pixels)
    torch.testing.assert_close(twice[1], boxes)


def test_the_same_generator_gives_the_same_bytes_and_another_one_others():
    settings = dict(flip=0.5, colour=(0.3, 0.3, 0.3), scale=(0.7, 1.4), translate=0.2)
    first, again, other = (a.augment(*batch(), rng(s), **settings) for s in (5, 5, 6))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_types_and_shapes_stay():
    given = batch()
    out = a.augment(*given, rng(), colour=0.4, scale=(0.5, 2.0), translate=0.3)
    assert [(t.dtype, t.shape) for t in out] == [(t.dtype, t.shape) for t in given]


def rectangle(x1: int, y1: int, x2: int, y2: int):
    pixels = torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    pixels[:, :, y1:y2, x1:x2] = 255
    return pixels, torch.tensor([[[x1, y1, x2, y2]]]).float(), torch.ones(1, 1).long(), torch.zeros(1, 1).bool()


def test_scale_and_shift_worked_by_hand():
    # centre (30, 20); x: (24 - 30) * 2 + 30 + 4 = 22, (36 - 30) * 2 + 34 = 46; y: (15 - 20) * 2 + 20 - 3 = 7, 27
    given = rectangle(24, 15, 36, 25)
    pixels, boxes, classes, ignore = a.scale_translate(*given, torch.tensor([2.0]), torch.tensor([[4.0, -3.0]]))
    assert boxes[0, 0].tolist() == pytest.approx([22, 7, 46, 27])
    assert classes.tolist() == [[1]] and ignore.tolist() == [[False]]


@pytest.mark.parametrize("seed", range(8))
def test_the_box_follows_a_drawn_rectangle(seed):
    given = rectangle(22, 12, 40, 30)
    settings = dict(flip=0.5, scale=(0.7, 1.3), translate=0.15)
    pixels, boxes, classes, _ = a.augment(*given, rng(seed), **settings)
    bright = pixels[0, 0] > 184  # halfway between the grey that a crop uncovers and the rectangle
    rows, columns = bright.any(dim=1).nonzero(), bright.any(dim=0).nonzero()
    seen = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    assert boxes[0, 0].tolist() == pytest.approx(seen, abs=1.0)
    assert boxes[0, 0].tolist() != pytest.approx(given[1][0, 0].tolist(), abs=0.05)  # it did move


def test_what_a_crop_uncovers_is_grey():
    given = rectangle(0, 0, WIDTH, HEIGHT)
    pixels, *_ = a.scale_translate(*given, torch.tensor([0.5]), torch.zeros(1, 2))
    assert (pixels[0, :, 0] == 114).all() and (pixels[0, :, HEIGHT // 2, WIDTH // 2] == 255).all()


def test_objects_that_lose_their_area_turn_to_ignore_and_those_out_of_sight_to_padding():
    pixels = torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    boxes = torch.tensor([[[0, 0, 20, 20], [10, 0, 30, 20], [40, 0, 60, 20], [0, 0, 0, 0]]]).float()
    classes, ignore = torch.tensor([[1, 2, 3, 0]]), torch.zeros(1, 4).bool()
    ignore[0, 2] = True
    moved = a.scale_translate(pixels, boxes, classes, ignore, torch.ones(1), torch.tensor([[-15.0, 0.0]]))
    # 5 of 20 columns left (0.25 < 0.4): ignore; 15 of 20: kept; ignore stays ignore; padding stays padding
    assert moved[1].tolist() == [[[0, 0, 5, 20], [0, 0, 15, 20], [25, 0, 45, 20], [0, 0, 0, 0]]]
    assert moved[2].tolist() == [[1, 2, 3, 0]] and moved[3].tolist() == [[True, False, True, False]]
    gone = a.scale_translate(pixels, boxes, classes, ignore, torch.ones(1), torch.tensor([[-35.0, 0.0]]))
    assert gone[2].tolist() == [[0, 0, 3, 0]] and not gone[1][0, :2].any()
    assert gone[3].tolist() == [[False, False, True, False]]


def test_an_object_made_too_small_turns_to_ignore():
    given = rectangle(20, 10, 30, 30)
    _, boxes, classes, ignore = a.scale_translate(*given, torch.tensor([0.5]), torch.zeros(1, 2), min_object=6)
    assert (boxes[0, 0, 2] - boxes[0, 0, 0]).item() == pytest.approx(5)
    assert classes.tolist() == [[1]] and ignore.tolist() == [[True]]


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


def test_colour_differs_between_images_and_leaves_boxes_alone():
    pixels = torch.full((8, 3, 4, 4), 120, dtype=torch.uint8)
    boxes, classes, ignore = torch.ones(8, 1, 4), torch.ones(8, 1).long(), torch.zeros(8, 1).bool()
    out = a.augment(pixels, boxes, classes, ignore, rng(), flip=0.0, colour=(0.5, 0.0, 0.0))
    levels = out[0][:, 0, 0, 0]
    assert len(levels.unique()) > 4 and (levels >= 60).all() and (levels <= 180).all()
    assert torch.equal(out[1], boxes)


@pytest.mark.parametrize(
    ("wrong", "value"),
    [(dict(flip=1.5), "1.5"), (dict(colour=(0.1, 2.0, 0.0)), "2.0"), (dict(scale=(0.0, 1.0)), "0.0")]
    + [(dict(scale=(2.0, 1.0)), "2.0"), (dict(translate=1.0), "1.0"), (dict(colour=(0.1, 0.1)), "0.1, 0.1")],
)
def test_wrong_settings_are_named(wrong, value):
    with pytest.raises(ValueError, match=value):
        a.augment(*batch(), rng(), **wrong)
