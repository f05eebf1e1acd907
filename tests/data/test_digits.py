"""DigitScenes: the same whatever else is drawn, no digit shared by train and test, tight boxes, ink one can see."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedal_utils import data
from fedal_utils.data import digits as room
from fedal_utils.seeding import rng_for


@pytest.fixture(scope="module")
def digits():
    return data.digit_scenes(data.Digits((60, 20)), seed=3)


def test_scenes_do_not_change_when_the_count_grows_or_other_numbers_were_drawn(digits):
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002 (the global generator must not matter)
    before = torch.random.get_rng_state()
    train, test = data.digit_scenes(data.Digits((20, 5)), seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    for small, large in zip((train, test), digits, strict=True):
        n, k = len(small), small.labels.boxes.shape[1]
        assert small.images.ids == large.images.ids[:n]
        assert torch.equal(small.images.pixels, large.images.pixels[:n])
        assert torch.equal(small.labels.boxes, large.labels.boxes[:n, :k])
        assert torch.equal(small.labels.classes, large.labels.classes[:n, :k])
    assert not torch.equal(digits[0].images.pixels[:20], digits[1].images.pixels[:20])
    assert not torch.equal(data.digit_scenes(data.Digits((20, 5)), seed=4)[0].images.pixels, train.images.pixels)


def test_train_and_test_share_no_source_digit():
    train, test = room.digit_sources(seed=3)
    assert len(train) + len(test) == 1797 and not set(train) & set(test)
    drawn = {}
    for split, sources in (("train", train), ("test", test)):
        scenes = [room.digit_scene(rng_for(3, "digits", split, k), sources) for k in range(40)]
        drawn[split] = {int(row) for _, _, rows in scenes for row in rows}
    assert drawn["train"] <= set(train) and drawn["test"] <= set(test) and len(drawn["train"]) > 60


def test_boxes_are_tight_around_the_drawn_digit():
    sources, _ = room.digit_sources()
    for k in range(30):
        pixels, boxes, _ = room.digit_scene(rng_for(0, "tight", k), sources, most=1)
        bare = np.round(room._canvas(rng_for(0, "tight", k), 64, 64) * 255).transpose(2, 0, 1)
        changed = (np.abs(pixels - bare) > 12).any(axis=0)  # a twentieth of the range: ink that one can see
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert boxes[0].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_scenes_keep_their_ranges(digits):
    labels, valid = digits[0].labels, digits[0].labels.valid
    longer = (labels.boxes[..., 2:] - labels.boxes[..., :2]).amax(dim=-1)[valid]
    assert 14 <= longer.min() < 17 and 25 < longer.max() <= 28
    assert set(labels.valid.sum(1).tolist()) == {1, 2, 3, 4}
    assert set(labels.classes[valid].tolist()) == set(range(1, 11))
    assert (labels.boxes[valid] >= 0).all() and (labels.boxes[valid] <= 64).all() and not labels.boxes[~valid].any()
    for boxes, kept in zip(labels.boxes, valid, strict=True):
        for one, other in itertools.combinations(boxes[kept], 2):
            corner = torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])
            areas = [(box[2:] - box[:2]).prod() for box in (one, other)]
            assert corner.clamp(min=0).prod() <= room.MAX_OVERLAP * min(areas) + 1e-6


@settings(max_examples=100)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_ink_has_its_contrast_and_is_a_colour(seed, ground):
    ink = room._ink_colour(rng_for(seed, "ink"), ground)
    assert abs(ink @ np.array([0.299, 0.587, 0.114]) - ground) >= room.MIN_CONTRAST - 1e-9
    assert (ink >= -1e-9).all() and (ink <= 1 + 1e-9).all()


