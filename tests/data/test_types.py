"""Images, labels and sets: rows and mirrored batches, counts, a fingerprint that notices; detections; letterbox."""

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


@pytest.mark.parametrize(
    ("size", "canvas", "inner", "offset", "box", "expected"),
    [
        # 640 wide into 320: scale 1/2, 380 -> 190, one grey row above and below
        ((380, 640), (192, 320), (190, 320), (1, 0), (100, 50, 300, 250), (50, 26, 150, 126)),
        # 480 x 640 into 192 x 256: scale 2/5, no margin
        ((480, 640), (192, 256), (192, 256), (0, 0), (10, 20, 640, 480), (4, 8, 256, 192)),
        # portrait: scale 64/100, 50 -> 32, 16 columns on either side; the whole image becomes the whole inner part
        ((100, 50), (64, 64), (64, 32), (0, 16), (0, 0, 50, 100), (16, 0, 48, 64)),
        ((33, 100), (50, 100), (33, 100), (8, 0), (1, 2, 3, 4), (1, 10, 3, 12)),  # 17 rows: 8 above, 9 below
        ((10, 20), (60, 60), (30, 60), (15, 0), (1, 1, 2, 10), (3, 18, 6, 45)),  # enlarged: scale 3
    ],
)
def test_letterbox_worked_by_hand(size, canvas, inner, offset, box, expected):
    sizes = torch.tensor([size])
    fit_inner, fit_offset = data.letterbox_fit(sizes, canvas)
    assert tuple(fit_inner[0].tolist()) == inner
    assert tuple(fit_offset[0].tolist()) == offset
    assert data.letterbox_boxes(torch.tensor([[box]]).float(), sizes, canvas)[0, 0].tolist() == pytest.approx(expected)
    assert data.to_original(torch.tensor([expected]).float(), sizes, canvas)[0].tolist() == pytest.approx(box, abs=1e-4)


SIDES, CANVAS = (st.tuples(st.integers(1, most), st.integers(1, most)) for most in (2000, 700))


@settings(max_examples=200, deadline=None)
@given(SIDES, CANVAS, st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_letterbox_fits_fills_and_is_undone_by_to_original(size, canvas, fractions):
    (h, w), (canvas_h, canvas_w), sizes = size, canvas, torch.tensor([size])
    inner, offset = data.letterbox_fit(sizes, canvas)
    before, after = offset[0], torch.tensor(canvas) - offset[0] - inner[0]
    assert (before >= 0).all() and set((after - before).tolist()) <= {0, 1}  # inside and centred
    assert (inner[0] == torch.tensor(canvas)).any()  # one side is used up
    x1, x2 = sorted(f * w for f in fractions[:2])
    y1, y2 = sorted(f * h for f in fractions[2:])
    box = torch.tensor([[[x1, y1, x2, y2]]])
    there = data.letterbox_boxes(box, sizes, canvas)
    assert (there >= -1e-3).all() and (there[..., 0::2] <= canvas_w + 1e-3).all()
    assert (there[..., 1::2] <= canvas_h + 1e-3).all()
    # float32 keeps 24 bits of a letterboxed coordinate; on the way back that error grows by the scale
    error = 4 * 2**-24 * max(canvas) * max(h / int(inner[0, 0]), w / int(inner[0, 1])) + 1e-3
    torch.testing.assert_close(data.to_original(there, sizes, canvas), box, rtol=0, atol=error)


def _detections(count: int, scores: list[float]) -> data.Detections:
    k = len(scores)
    boxes = torch.rand(count, k, 4, generator=torch.Generator().manual_seed(k))
    return data.Detections(boxes, torch.tensor([scores] * count), torch.ones(count, k).long(), torch.ones(count, k, 3))


def _known(found: data.Detections, first: int) -> data.Detections:
    """The same with the map of each box, and four numbers."""
    level = first + torch.arange(found.scores.numel()).view(found.scores.shape)
    return replace(found, extra={"level": level, "sides": level[..., None] + torch.arange(4) / 10})


def test_what_is_known_of_each_box_goes_where_the_box_goes():
    found = _known(_detections(3, [0.9, 0.5, 0.25]), 1)
    level = found.extra["level"]  # 1 2 3 | 4 5 6 | 7 8 9
    cut = found.above(0.25)  # the third is at the score, not above it
    assert cut.valid.tolist() == [[True, True, False]] * 3 and not cut.boxes[:, 2].any() and not cut.probs[:, 2].any()
    assert cut.extra["level"].tolist() == [[1, 2, 0], [4, 5, 0], [7, 8, 0]] and cut.extra["level"].dtype == torch.int64
    assert torch.equal(cut.extra["sides"][:, :2], found.extra["sides"][:, :2]) and not cut.extra["sides"][:, 2].any()
    taken = found.take(torch.tensor([2, 0]))
    assert len(taken) == 2 and torch.equal(taken.boxes, found.boxes[[2, 0]])
    assert taken.extra["level"].tolist() == [[7, 8, 9], [1, 2, 3]]
    assert torch.equal(taken.extra["sides"], found.extra["sides"][[2, 0]])
    none = found.take([])
    assert len(none) == 0 and none.extra["sides"].shape == (0, 3, 4)
    moved = found.to("meta")
    assert {t.device.type for t in (moved.boxes, moved.probs, *moved.extra.values())} == {"meta"}
    joined = data.join_detections([_known(_detections(1, [0.8]), 50), found])
    assert joined.extra["level"].tolist() == [[50, 0, 0], *level.tolist()]
    assert joined.extra["sides"].shape == (4, 3, 4) and not joined.extra["sides"][0, 1:].any()
    assert torch.equal(joined.extra["sides"][1:], found.extra["sides"])
    assert data.join_detections([_detections(1, [0.8])]).extra == {}
