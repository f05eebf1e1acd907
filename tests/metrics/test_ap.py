"""AP against pycocotools, against plain-loop oracles and by hand; its laws; accuracy of classifiers."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from oracles import coco_ap, voc_ap
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fedal_utils import metrics
from fedal_utils.data import Detections, Labels

N_CASES = 300


def random_case(seed):
    """(truths, founds, n_classes): lists per image of (box, class, ignore, crowd) and (box, class, score).

    Whole-number boxes in two cases of three (exact IoU of 1/2 and ties happen), few distinct scores, images without
    objects, images without detections, every fifth case nothing found at all.
    """
    rng = np.random.default_rng(seed)
    n_images, n_classes = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    whole, grid = seed % 3 > 0, int(rng.integers(2, 12))

    def box(near=None):
        if near is not None:
            corner = np.sort((np.asarray(near) + rng.normal(0, 1.5, 4)).reshape(2, 2), axis=0)
        else:
            corner = np.stack([at := rng.uniform(0, 40, 2), at + rng.uniform(2, 60 if rng.random() < 0.2 else 20, 2)])
        corner = np.round(corner) if whole else corner
        corner[1] = np.maximum(corner[1], corner[0] + 1)
        return tuple(float(v) for v in corner.astype(np.float32).ravel())

    truths, founds = [], []
    for _ in range(n_images):
        here = []
        for _ in range(int(rng.integers(0, 6))):
            crowd, ignore = rng.random() < 0.12, rng.random() < 0.2
            at = here[-1][0] if here and rng.random() < 0.1 else box()  # now and then two objects in one place
            here.append((at, int(rng.integers(1, n_classes + 1)), bool(ignore), bool(crowd)))
        seen = []
        for _ in range(0 if seed % 5 == 0 and rng.random() < 0.7 else int(rng.integers(0, 9))):
            near = here[int(rng.integers(len(here)))] if here and rng.random() < 0.75 else None
            c = near[1] if near and rng.random() < 0.9 else int(rng.integers(1, n_classes + 1))
            score = float(np.float32(rng.integers(1, grid) / grid if rng.random() < 0.8 else rng.random()))
            seen.append((box(near and near[0]), c, score))
        truths.append(here)
        founds.append(seen)
    if all(ignore or crowd for image in truths for _, _, ignore, crowd in image):
        truths[0].append((box(), 1, False, False))
    return truths, founds, n_classes


def packed(truths, founds, n_classes, seed=0):
    """The same case as our types, with padding rows strewn in between and rubbish left in the padding."""
    rng = np.random.default_rng(seed)

    def places(lists):
        width = max(map(len, lists), default=0) + 2
        return width, [sorted(rng.permutation(width)[: len(one)]) for one in lists]

    n = len(truths)
    width, where = places(truths)
    boxes, classes = torch.full((n, width, 4), float("nan")), torch.zeros(n, width, dtype=torch.int64)
    ignore, crowd = torch.zeros(n, width, dtype=torch.bool), torch.zeros(n, width, dtype=torch.bool)
    for i, image in enumerate(truths):
        for at, (box, c, is_ignored, is_crowd) in zip(where[i], image, strict=True):
            boxes[i, at], classes[i, at] = torch.tensor(box), c
            ignore[i, at], crowd[i, at] = is_ignored or is_crowd, is_crowd
    width, where = places(founds)
    found, labels = torch.full((n, width, 4), float("nan")), torch.zeros(n, width, dtype=torch.int64)
    scores = torch.full((n, width), float("nan"))
    for i, image in enumerate(founds):
        for at, (box, c, score) in zip(where[i], image, strict=True):
            found[i, at], labels[i, at], scores[i, at] = torch.tensor(box), c, score
    detections = Detections(found, scores, labels, torch.zeros(n, width, n_classes + 1))
    return detections, Labels(boxes, classes, ignore, crowd), [f"class {k}" for k in range(1, n_classes + 1)]


def of_class(truths, founds, c):
    return (
        [[(box, ignore, crowd) for box, k, ignore, crowd in image if k == c] for image in truths],
        [[(box, score) for box, k, score in image if k == c] for image in founds],
    )


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def three_by_pycocotools(truths, founds, n_classes):
    """AP, AP50, AP75 in pycocotools' usual way, from JSON dicts to `summarize`; an ignored object has area -1."""
    objects, results = [], []
    for i in range(len(truths)):
        for box, c, ignore, crowd in truths[i]:
            area = -1 if ignore and not crowd else xywh(box)[2] * xywh(box)[3]
            one = {"id": len(objects) + 1, "image_id": 10 * i, "category_id": c, "bbox": xywh(box)}
            objects.append({**one, "area": area, "iscrowd": int(crowd)})
        results += [{"image_id": 10 * i, "category_id": c, "bbox": xywh(b), "score": s} for b, c, s in founds[i]]
    if not results:
        return [0.0, 0.0, 0.0]  # loadRes cannot take an empty list
    with contextlib.redirect_stdout(io.StringIO()):
        truth, images = COCO(), [{"id": 10 * i} for i in range(len(truths))]
        categories = [{"id": k} for k in range(1, n_classes + 1)]
        truth.dataset = {"images": images, "categories": categories, "annotations": objects}
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[:3].tolist()


def test_ap_equals_pycocotools_and_the_plain_loop_oracles():
    empty = crowds = ignored = 0
    distinct = set()
    for seed in range(N_CASES):
        truths, founds, n_classes = random_case(seed)
        ours = metrics.evaluate(*packed(truths, founds, n_classes, seed))
        theirs = three_by_pycocotools(truths, founds, n_classes)
        assert [ours[name] for name in ("ap_coco", "ap50", "ap75")] == theirs, f"case {seed}"
        per_class = [of_class(truths, founds, c) for c in range(1, n_classes + 1)]
        for name, threshold in (("ap75", 0.75), ("ap50", 0.5)):
            aps = np.array([coco_ap(*one, threshold) for one in per_class], dtype=float)  # NaN: nothing to find
            assert ours[name] == pytest.approx(np.nanmean(aps), abs=1e-12), seed
        each = [ours[f"ap50/class {c}"] for c in range(1, n_classes + 1)]
        assert each == pytest.approx(aps, abs=1e-12, nan_ok=True), seed
        both = np.array([pair for one in per_class if (pair := voc_ap(*one)) is not None], dtype=float)
        assert [ours["ap_voc11"], ours["ap_voc"]] == pytest.approx(both.mean(axis=0), abs=1e-12), seed
        distinct.add(round(ours["ap_voc"], 6))
        empty += not any(founds)
        crowds += any(crowd for image in truths for *_, crowd in image)
        ignored += any(ignore and not crowd for image in truths for _, _, ignore, crowd in image)
    assert empty >= 10 and crowds >= 80 and ignored >= 80 and len(distinct) > 80  # what this test is for


A, B, FAR = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)


def by_hand(objects, found):
    truths = [[(box, 1, *flags) for box, *flags in objects]]
    return metrics.evaluate(*packed(truths, [[(box, 1, score) for box, score in found]], 1))


def plain(*boxes):
    return [(box, False, False) for box in boxes]


def test_two_objects_three_detections_by_hand():
    """Hit, miss, hit: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1."""
    ours = by_hand(plain(A, B), [(A, 0.9), (FAR, 0.8), (B, 0.7)])
    assert ours["ap_voc"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3, abs=1e-12)  # 5/6
    assert ours["ap_voc11"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11, abs=1e-12)  # 28/33
    for name in ("ap50", "ap75", "ap_coco", "ap50/class 1"):
        assert ours[name] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101, abs=1e-12)  # 253/303


def test_half_overlap_counts_by_hand():
    """IoU of exactly 1/2 is a hit at 0.5 and nowhere above: AP50 1, AP75 0, COCO 1 of 10 thresholds."""
    ours = by_hand(plain(A), [((0, 0, 10, 5), 0.9)])
    assert (ours["ap50"], ours["ap75"], ours["ap_voc"], ours["ap_voc11"]) == pytest.approx((1, 0, 1, 1))
    assert ours["ap_coco"] == pytest.approx(0.1)


def test_recall_grid_of_voc_is_exact():
    """3 of 10 found without error reaches the recalls 0, 0.1, 0.2 and 0.3: 4/11, not the 3/11 of 3 * 0.1 > 0.3."""
    objects = [(20 * k, 0, 20 * k + 10, 10) for k in range(10)]
    ours = by_hand(plain(*objects), [(box, 0.9) for box in objects[:3]])
    assert ours["ap_voc11"] == pytest.approx(4 / 11) and ours["ap_voc"] == pytest.approx(3 / 10)


@pytest.mark.parametrize("flags", [(True, False), (True, True)], ids=["difficult", "crowd"])
def test_ignored_object_counts_neither_way(flags):
    """With the detection on B first: nothing changes for A. Were B wanted or background, AP would move."""
    ours = by_hand([(A, False, False), (B, *flags)], [(B, 0.9), (A, 0.8)])
    assert [ours[name] for name in ("ap50", "ap75", "ap_coco", "ap_voc", "ap_voc11")] == pytest.approx([1] * 5)
    assert by_hand(plain(A), [(B, 0.9), (A, 0.8)])["ap_voc"] == pytest.approx(1 / 2)
    assert by_hand(plain(A, B), [(A, 0.8)])["ap_voc"] == pytest.approx(1 / 2)


def test_one_ignored_object_takes_one_detection_in_coco_but_any_number_in_voc_and_crowds():
    found = [(B, 0.9), (B, 0.85), (A, 0.8)]
    for crowd, ap50 in ((False, 1 / 2), (True, 1)):
        ours = by_hand([(A, False, False), (B, True, crowd)], found)
        assert (ours["ap50"], ours["ap_voc"]) == pytest.approx((ap50, 1))


def test_ties_follow_the_order_of_images_and_rows():
    """Equal scores, hit in the first image, miss in the second: AP 1; the other way round: 1/2."""
    hit, miss = [(A, 1, 0.5)], [(FAR, 1, 0.5)]
    assert metrics.evaluate(*packed([[(A, 1, False, False)], []], [hit, miss], 1))["ap_voc"] == 1
    other = metrics.evaluate(*packed([[], [(A, 1, False, False)]], [miss, hit], 1))
    assert other["ap_voc"] == pytest.approx(1 / 2) and other["ap50"] == pytest.approx(1 / 2)


def test_nothing_detected_is_zero_and_absent_class_is_nan():
    ours = metrics.evaluate(*packed([[(A, 1, False, False)], []], [[], []], 2))
    assert all(ours[name] == 0 for name in ("ap50", "ap75", "ap_coco", "ap_voc", "ap_voc11", "ap50/class 1"))
    assert math.isnan(ours["ap50/class 2"])
    _, labels, names = packed([[(A, 1, False, False)]], [[]], 2)
    none = torch.zeros(1, 0)
    found = metrics.evaluate(Detections(none[..., None].expand(1, 0, 4), none, none.long(), none), labels, names)
    assert found["ap_voc"] == 0
    assert list(found) == ["ap50", "ap75", "ap_coco", "ap_voc11", "ap_voc", "ap50/class 1", "ap50/class 2"]


def test_accuracy_over_images_classes_and_clients_by_hand():
    """Classes 0, 0, 1, 1; both zeros and one of the ones are right. A client of zeros has 1, one of ones 1/2."""
    scores = torch.tensor([[2.0, 1, 0], [2, 1, 0], [0, 1, 0], [1, 0, 0]])
    truth, mixes = torch.tensor([0, 0, 1, 1]), np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0, 0, 1]])
    found = metrics.accuracy(scores, truth, ["a", "b", "c"], mixes)
    assert math.isnan(found.pop("accuracy/c"))  # and the client that has nothing else is left out
    expected = {"accuracy": 0.75, "accuracy/a": 1, "accuracy/b": 0.5}
    assert found == pytest.approx(expected | {"accuracy_mean_client": 0.75, "accuracy_worst_client": 0.5})
    with pytest.raises(ValueError, match="not finite"):
        metrics.accuracy(scores * float("nan"), truth, ["a", "b", "c"])


def test_coco_takes_a_hundred_detections_of_an_image_and_class():
    many = [(FAR, 0.9 - i / 1000) for i in range(100)]
    assert by_hand(plain(A), [*many[1:], (A, 0.1)])["ap50"] == pytest.approx(1 / 100)
    late = by_hand(plain(A), [*many, (A, 0.1)])
    assert late["ap50"] == 0 and late["ap_voc"] == pytest.approx(1 / 101)


@pytest.mark.parametrize(("box", "score"), [(A, math.nan), ((0, 0, math.inf, 10), 0.5)])
def test_what_no_ap_can_be_made_of_is_refused(box, score):
    truths, founds = [[(A, 1, False, False)]] * 2, [[(A, 1, 0.5)], [(box, 1, score)]]
    with pytest.raises(ValueError, match="a detection in image 1 is not finite"):
        metrics.evaluate(*packed(truths, founds, 1))
    for objects in ([(A, 1, True, False)], [(A, 1, False, True)], []):
        with pytest.raises(ValueError, match="all of them ignored"):
            metrics.evaluate(*packed([objects] * 2, founds[:1] * 2, 1))
