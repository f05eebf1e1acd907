"""Images, labels and sets: rows and mirrored batches, counts, and a fingerprint that notices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedal_utils import data


@pytest.fixture(scope="module")
def digits():
    return data.digit_scenes(data.Digits((60, 1)), seed=3)[0]


def test_batches_are_the_rows_asked_for_mirrored_where_asked(digits):
    images = digits.images
    batch = images.batch([7, 2], flip=torch.tensor([True, False]))
    assert torch.equal(batch[0], images.pixels[7].flip(-1)) and torch.equal(batch[1], images.pixels[2])
    for index in (np.array([4, 9]), torch.tensor([4, 9]), np.arange(60) % 60 == 4):
        assert torch.equal(images.batch(index)[0], images.pixels[4])
    got = list(images.batches([np.array([3, 1]), np.array([], dtype=int), np.array([5])]))
    assert [len(b) for b in got] == [2, 0, 1] and torch.equal(got[0], images.pixels[[3, 1]])


def test_take_keeps_images_labels_and_what_is_labelled_together(digits):
    known = replace(digits, labelled=torch.arange(60) % 2 == 0)
    part = known.take([5, 1, 2])
    assert part.images.ids == ("train-00005", "train-00001", "train-00002")
    assert torch.equal(part.images.pixels, digits.images.pixels[[5, 1, 2]])
    assert torch.equal(part.labels.boxes, digits.labels.boxes[[5, 1, 2]])
    assert part.labelled.tolist() == [False, False, True] and len(digits.take([])) == 0
    for row in (60, -1):
        with pytest.raises(ValueError, match=f"row {row} does not exist"):
            digits.images.take([row])


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=4, max_size=4), st.integers(40, 80), st.data())
def test_flipped_labels_mirror_objects_and_twice_is_the_identity(mask, width, draw):
    corner = torch.tensor(draw.draw(st.lists(st.integers(0, 20), min_size=16, max_size=16))).reshape(4, 2, 2)
    classes = torch.tensor(draw.draw(st.lists(st.integers(0, 2), min_size=8, max_size=8))).reshape(4, 2)
    boxes = torch.cat([corner, corner + 10], dim=-1).float() * (classes > 0)[..., None]
    labels = data.Labels(boxes, classes, torch.zeros(4, 2).bool(), torch.zeros(4, 2).bool())
    once = labels.flip(torch.tensor(mask), width)
    assert torch.equal(once.flip(torch.tensor(mask), width).boxes, boxes)
    mirrored = torch.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], dim=-1)
    where = torch.tensor(mask)[:, None] & (classes > 0)
    assert torch.equal(once.boxes, torch.where(where[..., None], mirrored, boxes))


def counted() -> data.Dataset:
    classes = torch.tensor([[2, 2, 1, 0], [1, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    ignore = torch.tensor([[False] * 4, [False] * 4, [True, False, False, False], [False] * 4])
    labels = data.Labels(torch.zeros(4, 4, 4), classes, ignore, torch.zeros(4, 4).bool())
    images = data.Images(("a", "b", "c", "d"), torch.zeros(4, 3, 8, 9, dtype=torch.uint8), torch.ones(4, 2).long())
    return data.Dataset("mine", images, labels, ("x", "y", "z"), {"zero_area": 2})


def test_counts_dominant_class_and_description_leave_ignored_objects_out():
    dataset = counted()
    assert dataset.labels.valid.sum(1).tolist() == [3, 2, 0, 0]
    assert dataset.class_counts().tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert dataset.dominant_class().tolist() == [2, 1, 0, 0]  # the lower class on a tie
    line = "mine: 4 images 8x9, 5 boxes (x 2, y 3, z 0), 1 ignored, 1 images without objects"
    assert dataset.describe() == line + "; read: zero_area 2"
    partly = replace(dataset, labelled=torch.tensor([True, True, True, False]), drops={})
    assert partly.describe() == line.replace("images without objects", "images not labelled")
    bare = data.Dataset("bare", dataset.images, None, ())
    assert bare.describe() == "bare: 4 images 8x9, no labels"
    with pytest.raises(ValueError, match="'bare' has no labels"):
        bare.dominant_class()


def test_a_fingerprint_notices_every_change_and_nothing_else():
    one = counted()
    assert one.fingerprint() == counted().fingerprint() == replace(one, name="other", drops={}).fingerprint()
    pixels = one.images.pixels.clone()
    pixels[2, 1, 3, 4] = 1
    ignore = one.labels.ignore.clone()
    ignore[0, 0] = True
    changed = [
        replace(one, images=replace(one.images, ids=("a", "b", "c", "e"))),
        replace(one, images=replace(one.images, pixels=pixels)),
        replace(one, labels=replace(one.labels, ignore=ignore)),
        replace(one, labels=None),
        replace(one, class_names=("x", "y", "w")),
        one.take([1, 0, 2, 3]),
    ]
    assert len({one.fingerprint(), *(other.fingerprint() for other in changed)}) == 7
