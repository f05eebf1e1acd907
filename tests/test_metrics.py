"""AP against pycocotools, against plain-loop oracles and by hand; laws; learning curves and statistics over seeds."""

import contextlib
import io
import itertools
import json
import math
import time

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import coco_ap, voc_ap

from fedal_utils.data.boxes import Detections
from fedal_utils.data.readers import Labels
from fedal_utils.metrics import ap as metrics

N_CASES = 400


# --- cases: plain lists first, so that the oracles never see our types ------------------------------------------------


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


def twelve_by_pycocotools(truths, founds, n_classes):
    """The usual way of pycocotools, from JSON dicts to `summarize`; an ignored object has area -1."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects, results = [], []
    for i in range(len(truths)):
        for box, c, ignore, crowd in truths[i]:
            area = -1 if ignore and not crowd else xywh(box)[2] * xywh(box)[3]
            one = {"id": len(objects) + 1, "image_id": 10 * i, "category_id": c, "bbox": xywh(box)}
            objects.append({**one, "area": area, "iscrowd": int(crowd)})
        results += [{"image_id": 10 * i, "category_id": c, "bbox": xywh(b), "score": s} for b, c, s in founds[i]]
    if not results:
        return None  # loadRes cannot take an empty list
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": 10 * i} for i in range(len(truths))],
            "categories": [{"id": k} for k in range(1, n_classes + 1)],
            "annotations": objects,
        }
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return np.where(judge.stats == -1, np.nan, judge.stats)


# --- AP ---------------------------------------------------------------------------------------------------------------


def test_ap_equals_pycocotools_and_the_plain_loop_oracle():
    empty = crowds = ignored = 0
    for seed in range(N_CASES):
        truths, founds, n_classes = random_case(seed)
        ours = metrics.coco(*packed(truths, founds, n_classes, seed), summary=True)
        theirs = twelve_by_pycocotools(truths, founds, n_classes)
        if theirs is None:
            empty += 1
            theirs = np.where(np.isnan([ours[name] for name in metrics.SUMMARY]), np.nan, 0.0)
        np.testing.assert_array_equal([ours[name] for name in metrics.SUMMARY], theirs, err_msg=f"case {seed}")
        per_class = [of_class(truths, founds, c) for c in range(1, n_classes + 1)]
        for name, threshold in (("ap50", 0.5), ("ap75", 0.75)):
            aps = [coco_ap(*one, threshold) for one in per_class]
            assert ours[name] == pytest.approx(np.mean([ap for ap in aps if ap is not None]), abs=1e-12), f"case {seed}"
            if name == "ap50":
                for c, ap in enumerate(aps, start=1):
                    ours_here = ours[f"ap50/class {c}"]
                    assert math.isnan(ours_here) if ap is None else ours_here == pytest.approx(ap, abs=1e-12)
        crowds += any(crowd for image in truths for *_, crowd in image)
        ignored += any(ignore and not crowd for image in truths for _, _, ignore, crowd in image)
    assert empty >= 10 and crowds >= 80 and ignored >= 80  # the cases hold what this test is for


def test_voc_aps_equal_the_plain_loop_oracle():
    distinct = set()
    for seed in range(1000, 1000 + N_CASES):
        truths, founds, n_classes = random_case(seed)
        ours = metrics.voc(*packed(truths, founds, n_classes, seed))
        both = [voc_ap(*of_class(truths, founds, c)) for c in range(1, n_classes + 1)]
        for k, name in enumerate(("ap_voc11", "ap_voc")):
            for c, pair in enumerate(both, start=1):
                value = ours[f"{name}/class {c}"]
                assert math.isnan(value) if pair is None else value == pytest.approx(float(pair[k]), abs=1e-12), seed
            expected = np.mean([float(pair[k]) for pair in both if pair is not None])
            assert ours[name] == pytest.approx(expected, abs=1e-12), f"case {seed}"
            distinct.add(round(ours[name], 6))
    assert len(distinct) > 100


@pytest.mark.parametrize("summary", [True, False])
def test_fast_path_gives_the_same_numbers(summary):
    pytest.importorskip("hotcoco")
    for seed in range(2000, 2060):
        case = packed(*random_case(seed), seed)
        slow = metrics.coco(*case, summary=summary)
        fast = metrics.coco(*case, summary=summary, fast=True)
        assert slow.keys() == fast.keys()
        np.testing.assert_allclose(list(fast.values()), list(slow.values()), rtol=0, atol=1e-12, err_msg=f"case {seed}")


def test_fast_path_without_hotcoco_falls_back(monkeypatch):
    case = packed(*random_case(3))
    monkeypatch.setattr(metrics, "_hotcoco", lambda: None)
    assert metrics.evaluate(*case, fast=True) == pytest.approx(metrics.evaluate(*case), nan_ok=True)


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


def test_second_detection_of_an_object_is_wrong_by_hand():
    """Hit, repeat, hit is the same list of hits as hit, miss, hit."""
    repeat = by_hand(plain(A, B), [(A, 0.9), (A, 0.8), (B, 0.7)])
    assert repeat == by_hand(plain(A, B), [(A, 0.9), (FAR, 0.8), (B, 0.7)])
    assert repeat["ap_voc"] == pytest.approx(5 / 6)


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
    difficult = by_hand([(A, False, False), (B, True, False)], found)
    assert (difficult["ap50"], difficult["ap_voc"]) == pytest.approx((1 / 2, 1))
    crowd = by_hand([(A, False, False), (B, True, True)], found)
    assert (crowd["ap50"], crowd["ap_voc"]) == pytest.approx((1, 1))


def test_small_detection_inside_a_crowd_is_set_aside_by_coco():
    """Overlap with a crowd is measured over the detection: a quarter of B lies wholly inside it."""
    found = [((20, 20, 25, 25), 0.9), (A, 0.8)]
    assert by_hand([(A, False, False), (B, True, True)], found)["ap50"] == pytest.approx(1)
    assert by_hand([(A, False, False), (B, True, False)], found)["ap50"] == pytest.approx(1 / 2)


def test_order_of_images_and_detections_does_not_matter():
    for seed in range(3000, 3020):
        truths, founds, n_classes = random_case(seed)
        rng = np.random.default_rng(seed)
        scores = iter(rng.permutation(500) / 500)  # no ties: they are broken by order
        founds = [[(box, c, float(next(scores))) for box, c, _ in image] for image in founds]
        ours = metrics.evaluate(*packed(truths, founds, n_classes))
        order = rng.permutation(len(truths))
        mixed = [[founds[i][k] for k in rng.permutation(len(founds[i]))] for i in order]
        again = metrics.evaluate(*packed([truths[i] for i in order], mixed, n_classes, seed=1))
        assert again == pytest.approx(ours, abs=1e-12, nan_ok=True), f"case {seed}"


def test_finding_a_missed_object_first_never_lowers_ap():
    rose = 0
    for seed in range(4000, 4030):
        truths, founds, n_classes = random_case(seed)
        truths, founds = [*truths, [(A, 1, False, False)]], [*founds, []]
        before = metrics.evaluate(*packed(truths, founds, n_classes))
        after = metrics.evaluate(*packed(truths, [*founds[:-1], [(A, 1, 2.0)]], n_classes))
        for name in ("ap50", "ap75", "ap_coco", "ap_voc", "ap_voc11"):
            assert after[name] >= before[name] - 1e-12, f"case {seed}, {name}"
            rose += after[name] > before[name] + 1e-6
    assert rose == 30 * 5


def test_ties_follow_the_order_of_images_and_rows():
    """Equal scores, hit in the first image, miss in the second: AP 1; the other way round: 1/2."""
    hit, miss = [(A, 1, 0.5)], [(FAR, 1, 0.5)]
    assert metrics.evaluate(*packed([[(A, 1, False, False)], []], [hit, miss], 1))["ap_voc"] == 1
    other = metrics.evaluate(*packed([[], [(A, 1, False, False)]], [miss, hit], 1))
    assert other["ap_voc"] == pytest.approx(1 / 2) and other["ap50"] == pytest.approx(1 / 2)


def test_of_two_objects_in_one_place_the_first_is_best_in_voc():
    found = [(FAR, 0.9), (A, 0.8)]
    assert by_hand([(A, False, False), (A, True, False)], found)["ap_voc"] == pytest.approx(1 / 2)
    assert by_hand([(A, True, False), (A, False, False)], found)["ap_voc"] == 0


def test_nothing_detected_is_zero_and_absent_class_is_nan():
    ours = metrics.evaluate(*packed([[(A, 1, False, False)], []], [[], []], 2))
    assert all(ours[name] == 0 for name in ("ap50", "ap75", "ap_coco", "ap_voc", "ap_voc11", "ap50/class 1"))
    assert math.isnan(ours["ap50/class 2"])
    detections, labels, names = packed([[(A, 1, False, False)]], [[]], 2)
    none = Detections(
        torch.zeros(1, 0, 4), torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, 3)
    )
    assert metrics.evaluate(none, labels, names)["ap_voc"] == 0
    assert list(metrics.evaluate(none, labels, names, per_class=False)) == [
        *("ap50", "ap75", "ap_coco", "ap_voc11", "ap_voc")
    ]


def test_limit_of_detections_is_per_image_and_class():
    found = [[(FAR, 1, 0.9), (A, 1, 0.8), (B, 2, 0.7)]]
    case = packed([[(A, 1, False, False), (B, 2, False, False)]], found, 2)
    assert metrics.evaluate(*case)["ap50/class 1"] == pytest.approx(1 / 2)
    one = metrics.evaluate(*case, max_detections=1)
    assert (one["ap50/class 1"], one["ap50/class 2"]) == pytest.approx((0, 1))
    with pytest.raises(ValueError, match="max_detections"):
        metrics.evaluate(*case, max_detections=0)


def test_nothing_is_printed(capfd):
    metrics.evaluate(*packed(*random_case(1)))
    metrics.evaluate(*packed(*random_case(1)), fast=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, g: d.scores.__setitem__((1, 0), float("nan")), "score nan in image 1"),
        (lambda d, g: d.boxes.__setitem__((1, 0, 2), float("inf")), "detection box .*inf.* in image 1"),
        (
            lambda d, g: d.boxes.__setitem__((1, 0), torch.tensor([5.0, 5, 4, 9])),
            "detection box .* in image 1.*x1 <= x2",
        ),
        (lambda d, g: d.labels.__setitem__((1, 0), 3), r"detection class 3 in image 1.*1\.\.2"),
        (lambda d, g: d.labels.__setitem__((1, 0), -1), "detection class -1 in image 1"),
        (lambda d, g: g.boxes.__setitem__((1, 0, 0), float("nan")), "ground truth box .*nan.* in image 1"),
        (lambda d, g: g.classes.__setitem__((1, 0), 9), "ground truth class 9 in image 1"),
        (lambda d, g: g.ignore.fill_(True), "2 objects, every one of them ignored"),
        (lambda d, g: g.classes.fill_(0), "2 images have no object"),
    ],
)
def test_bad_input_is_refused_by_image(change, message):
    box = torch.tensor([0.0, 0, 9, 9]).repeat(2, 1, 1)
    no, one = torch.zeros(2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.int64)
    detections = Detections(box.clone(), torch.full((2, 1), 0.5), one.clone(), torch.zeros(2, 1, 3))
    labels = Labels(box.clone(), one.clone(), no.clone(), no.clone())
    metrics.evaluate(detections, labels, ["a", "b"])
    change(detections, labels)
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(detections, labels, ["a", "b"])


def test_unequal_images_and_double_names_are_refused():
    detections, labels, names = packed(*random_case(8))
    fewer = Detections(*(t[:-1] for t in (detections.boxes, detections.scores, detections.labels, detections.probs)))
    with pytest.raises(ValueError, match="rows must be the same"):
        metrics.evaluate(fewer, labels, names)
    with pytest.raises(ValueError, match="different names"):
        metrics.evaluate(detections, labels, ["a", "a", "b"])


def test_evaluate_is_quick_enough():
    """150 images x 10 objects x 10 classes: 0.1 s on one idle core; a busy machine gets some room."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 40, (150, 10, 2))
    box = torch.tensor(np.concatenate([corner, corner + rng.uniform(5, 20, (150, 10, 2))], -1), dtype=torch.float32)
    classes, no = torch.tensor(rng.integers(1, 11, (150, 10))), torch.zeros(150, 10, dtype=torch.bool)
    detections = Detections(box + 1, torch.tensor(rng.random((150, 10))), classes, torch.zeros(150, 10, 11))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        metrics.evaluate(detections, Labels(box, classes, no, no), [str(k) for k in range(10)])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5


# --- the detection file -----------------------------------------------------------------------------------------------


def test_detection_file_keeps_every_digit_and_every_ap(tmp_path):
    for seed in range(5000, 5010):
        detections, labels, names = packed(*random_case(seed), seed)
        ids = [f"photo {i}.jpg" for i in range(len(detections))]
        path = tmp_path / "deep" / "detections.json"
        metrics.write_detections(path, detections, ids, names)
        again = metrics.read_detections(path, ids, names)
        assert metrics.evaluate(again, labels, names) == pytest.approx(
            metrics.evaluate(detections, labels, names), abs=0, nan_ok=True
        )
        kept = detections.valid
        assert torch.equal(again.boxes[again.valid], detections.boxes[kept])
        assert torch.equal(again.scores[again.valid], detections.scores[kept])
    assert [p.name for p in path.parent.iterdir()] == ["detections.json"]  # no temporary file is left


def test_detection_file_is_coco_results_json(tmp_path):
    detections, _, names = packed([[(A, 1, False, False)], []], [[(B, 2, 0.5)], []], 2)
    metrics.write_detections(tmp_path / "d.json", detections, ["x", "y"], names)
    assert json.loads((tmp_path / "d.json").read_text()) == [
        {"image_id": "x", "category_id": 2, "score": 0.5, "bbox": [20, 20, 10, 10]}
    ]
    metrics.write_detections(tmp_path / "none.json", detections.above(0.9), ["x", "y"], names)
    assert json.loads((tmp_path / "none.json").read_text()) == []
    assert len(metrics.read_detections(tmp_path / "none.json", ["x", "y"], names)) == 2


def test_bad_detection_files_are_refused(tmp_path):
    path = tmp_path / "d.json"
    good = {"image_id": "x", "category_id": 1, "score": 0.5, "bbox": [0, 0, 1, 1]}
    for content, message in [
        ("[{", "not COCO results JSON"),
        (json.dumps({"annotations": []}), "not COCO results JSON"),
        (json.dumps([{**good, "bbox": [0, 0, 1]}]), "four numbers"),
        (json.dumps([{**good, "image_id": "z"}]), "image 'z'"),
        (json.dumps([{**good, "category_id": 2}]), "category_id 2"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            metrics.read_detections(path, ["x"], ["a"])


def test_refused_detections_leave_the_old_file_alone(tmp_path):
    path = tmp_path / "d.json"
    detections, _, names = packed([[]], [[(B, 1, 0.5)]], 1)
    metrics.write_detections(path, detections, ["x"], names)
    before = path.read_bytes()
    bad = Detections(detections.boxes, detections.scores * float("nan"), detections.labels, detections.probs)
    with pytest.raises(ValueError, match="image 0"):
        metrics.write_detections(path, bad, ["x"], names)
    with pytest.raises(ValueError, match="2 ids"):
        metrics.write_detections(path, detections, ["x", "y"], names)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["d.json"]


# --- learning curves --------------------------------------------------------------------------------------------------


def test_area_under_curve_by_hand_and_of_a_constant():
    assert metrics.area_under_curve([0, 1, 3], [0, 1, 0]) == pytest.approx((0.5 + 1) / 3)
    assert metrics.area_under_curve([50, 70, 200], [0.3, 0.3, 0.3]) == pytest.approx(0.3)
    stretched = metrics.area_under_curve([500, 700, 2000], [0.1, 0.5, 0.6])
    assert stretched == pytest.approx(metrics.area_under_curve([50, 70, 200], [0.1, 0.5, 0.6]))


@pytest.mark.parametrize(
    ("x", "y"),
    [([1], [1]), ([2, 1], [0, 1]), ([1, 1], [0, 1]), ([1, 2], [0, math.nan]), ([1, math.inf], [0, 1]), ([1, 2], [1])],
)
def test_bad_curves_are_refused(x, y):
    for count in (metrics.area_under_curve, lambda x, y: metrics.labels_to_target(x, y, 0.5)):
        with pytest.raises(ValueError, match="curve|x must grow"):
            count(x, y)


def test_labels_to_target_interpolates_between_points():
    x, y = [100, 200, 300], [0.2, 0.6, 0.5]
    assert metrics.labels_to_target(x, y, 0.4) == pytest.approx(150)
    assert metrics.labels_to_target(x, y, 0.6) == pytest.approx(200)
    assert metrics.labels_to_target(x, y, 0.1) == 100
    assert math.isnan(metrics.labels_to_target(x, y, 0.7))


def test_cycle_ends_keeps_the_last_server_row_of_each_cycle():
    table = pd.DataFrame(
        [
            {"method": "sum", "seed": s, "cycle": c, "round": r, "client": k, "ap50": c + r / 10}
            for s, c, r, k in itertools.product((0, 1), (0, 1), (0, 1, 2), ("0", "server"))
        ]
    ).sample(frac=1, random_state=0)
    ends = metrics.cycle_ends(table)
    assert ends[["seed", "cycle", "round", "ap50"]].values.tolist() == [
        *([0, 0, 2, 0.2], [0, 1, 2, 1.2], [1, 0, 2, 0.2], [1, 1, 2, 1.2])
    ]


# --- over seeds -------------------------------------------------------------------------------------------------------


def test_bootstrap_interval_is_the_generators():
    values = [0.50, 0.52, 0.47, 0.55, 0.49]
    first = metrics.bootstrap_interval(values, rng=np.random.default_rng(1))
    assert first == metrics.bootstrap_interval(values, rng=np.random.default_rng(1))
    assert first != metrics.bootstrap_interval(values, rng=np.random.default_rng(2), draws=500)
    assert min(values) < first[0] < np.mean(values) < first[1] < max(values)
    narrow = metrics.bootstrap_interval(values, level=0.5, rng=np.random.default_rng(1))
    assert first[0] < narrow[0] < narrow[1] < first[1]


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        (low := metrics.bootstrap_interval(rng.normal(size=30), 0.8, 500, rng=rng))[0] <= 0 <= low[1]
        for _ in range(300)
    ]
    assert 0.72 < np.mean(hits) < 0.86


def test_intervals_of_one_and_two_seeds():
    assert all(map(math.isnan, metrics.bootstrap_interval([0.5], rng=np.random.default_rng(0))))
    assert all(map(math.isnan, metrics.seed_interval([0.5])))
    assert metrics.seed_interval([0.7, 0.5]) == (0.5, 0.7)


def test_seed_interval_of_three_is_students_by_hand():
    """1, 2, 3: mean 2, standard error 1 / sqrt 3, t(0.975, 2) = 4.302653."""
    low, high = metrics.seed_interval([1, 2, 3])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)


def test_paired_test_by_hand():
    """Differences 1, 2, 3: of 8 sign flips two are as extreme; the interval is that of `seed_interval`."""
    result = metrics.paired_test([1.5, 2.5, 3.5], [0.5, 0.5, 0.5])
    low, high = metrics.seed_interval([1, 2, 3])
    assert result == pytest.approx({"difference": 2, "low": low, "high": high, "p": 2 / 8, "n": 3})


def test_paired_test_p_equals_all_sign_flips():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 8), rng.normal(0, 1, 8)
    flips = [abs(np.mean(np.array(signs) * (a - b))) for signs in itertools.product((1, -1), repeat=8)]
    expected = np.mean([flip >= abs(np.mean(a - b)) - 1e-12 for flip in flips])
    assert metrics.paired_test(a, b)["p"] == pytest.approx(expected)
    assert metrics.paired_test(a, b)["p"] == metrics.paired_test(b, a)["p"]


def test_paired_test_at_the_edges():
    same = metrics.paired_test([0.5, 0.6], [0.5, 0.6])
    assert same["p"] == 1 and same["difference"] == 0
    one = metrics.paired_test([0.5], [0.4])
    assert one["p"] == 1 and math.isnan(one["low"])
    for a, b in (([1, 2], [1]), ([], []), ([math.nan, 1], [0, 1]), (range(17), range(17))):
        with pytest.raises(ValueError):
            metrics.paired_test(a, b)


# --- at equal labels --------------------------------------------------------------------------------------------------

IMAGES = [10, 20, 30]
EQUAL = {  # (method, seed) -> boxes and AP50 at the end of each cycle
    ("random", 0): ([20, 40, 60], [0.2, 0.4, 0.5]),
    ("crowded", 0): ([30, 70, 100], [0.2, 0.5, 0.6]),
    ("random", 1): ([10, 30, 50], [0.1, 0.3, 0.3]),
    ("crowded", 1): ([10, 30, 50], [0.1, 0.5, 0.5]),
}


def labels_table(runs: dict[tuple[str, int], tuple[list[float], list[float]]]) -> pd.DataFrame:
    """Server rows of two rounds a cycle (the first worth nothing) and clients' rows, in no order."""
    rows = []
    for (method, seed), (boxes, heights) in runs.items():
        for cycle, (images, box, height) in enumerate(zip(IMAGES, boxes, heights, strict=True)):
            one = {"method": method, "seed": seed, "cycle": cycle, "images": images, "boxes": box}
            rows += [{**one, "round": r, "client": "server", "ap50": v} for r, v in ((0, 0.01), (1, height))]
            rows.append({**one, "round": 1, "client": "00", "ap50": math.nan, "images": 1, "boxes": 1})
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_gains_at_equal_images_and_at_equal_boxes_by_hand():
    """Images: (.35 + .55) / 2 - (.3 + .45) / 2 = .075. Boxes 30 to 60: .2 to .425 is .3125 in the mean; random has
    .3, .4, .5 at 30, 40, 60: (.35 x 10 + .45 x 20) / 30 = .41667. What gains by images loses by boxes."""
    one = labels_table({key: run for key, run in EQUAL.items() if key[1] == 0})
    gains = metrics.gains_at_equal(one)
    assert list(gains.columns) == ["effect", "part", "points", "low", "high", "p", "seeds"]
    assert gains[["effect", "part", "seeds"]].values.tolist() == [
        ["crowded", "equal images", 1],
        ["crowded", "equal boxes", 1],
    ]
    assert gains["points"].tolist() == pytest.approx([7.5, -31.25 / 3])
    assert gains[["low", "high"]].isna().all().all()
    assert metrics.effect_findings(gains).splitlines() == [
        "crowded, equal images: +7.5 points (one seed, so no interval).",
        "crowded, equal boxes: -10.4 points (one seed, so no interval).",
    ]
    turned = metrics.gains_at_equal(one, xs=("boxes",), baseline="crowded")
    assert turned["effect"].tolist() == ["random"] and turned["points"].tolist() == pytest.approx([31.25 / 3])


def test_gains_at_equal_labels_are_paired_by_seed():
    """Seed 1: .4 - .25 = .15 by images and, at the same boxes, by boxes. 7.5 and 15: 11.25 +- 12.7062 x 3.75."""
    gains = metrics.gains_at_equal(labels_table(EQUAL)).set_index("part")
    assert gains["seeds"].tolist() == [2, 2]
    assert gains["points"].to_dict() == pytest.approx({"equal images": 11.25, "equal boxes": (15 - 31.25 / 3) / 2})
    low, high = gains.loc["equal images", ["low", "high"]]
    assert (low, high) == pytest.approx((11.25 - 12.7062 * 3.75, 11.25 + 12.7062 * 3.75), abs=1e-3)
    # a seed that only one of the two has counts nothing, and a method without any common seed is not there
    more = EQUAL | {("crowded", 2): EQUAL["crowded", 0], ("late", 2): EQUAL["crowded", 0]}
    pd.testing.assert_frame_equal(metrics.gains_at_equal(labels_table(more)).set_index("part"), gains)
    assert metrics.gains_at_equal(labels_table(EQUAL), baseline="best").empty


@pytest.mark.parametrize("boxes", [[70, 80, 90], [60, 80, 90], [1, 10, 20]])
def test_curves_that_share_no_labels_are_not_compared(boxes):
    table = labels_table({("random", 0): EQUAL["random", 0], ("crowded", 0): (boxes, [0.2, 0.5, 0.6])})
    with pytest.raises(ValueError, match="two curves share no range of boxes"):
        metrics.gains_at_equal(table)
    assert metrics.gains_at_equal(table, xs=("images",))["points"].tolist() == pytest.approx([7.5])


# --- an ablation ------------------------------------------------------------------------------------------------------


def arms_table(values: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """Server rows of two rounds a run (the first worth nothing), clients' rows between them; seeds 0, 1, ..."""
    rows = []
    for arm, methods in values.items():
        for method, ends in methods.items():
            for seed, end in enumerate(ends):
                for round, value in ((0, 0.1), (1, end)):
                    one = {"arm": arm, "method": method, "seed": seed, "cycle": 0, "round": round}
                    rows.append({**one, "client": "server", "ap50": value})
                    rows.append({**one, "client": "00", "ap50": math.nan})
    return pd.DataFrame(rows)


ARMS = {
    "restart": {"random": [0.4, 0.5, 0.3], "centralised": [0.6, 0.7, 0.8]},
    "kept": {"random": [0.5, 0.6, 0.5], "centralised": [0.8, 0.8, 0.8]},
}


def test_a_method_that_asks_once_has_an_end_and_no_area():
    rows = [
        {
            "method": m,
            "seed": 0,
            "cycle": c,
            "round": 0,
            "client": "server",
            "images": i,
            "boxes": i,
            "seconds": i,
            "bytes_up": 5e5,
            "bytes_down": 5e5,
            "ap50": a,
        }
        for m, c, i, a in (("random", 0, 4, 0.1), ("random", 1, 8, 0.3), ("once", 0, 8, 0.2), ("once", 1, 8, 0.5))
    ]
    found = metrics.summary(pd.DataFrame(rows)).set_index("method")
    assert found.loc["once", "last"] == 0.5 and math.isnan(found.loc["once", "area"])
    assert found.loc["random", "area"] == pytest.approx(0.2) and math.isnan(found.loc["once", "minus_random"])


def test_finals_are_the_ends_of_the_runs_in_the_order_of_the_arms():
    table = arms_table(ARMS)
    ends = metrics.finals(table.sample(frac=1, random_state=0).sort_values("arm", ascending=False, kind="stable"))
    assert list(dict.fromkeys(ends["arm"])) == ["restart", "kept"]
    for row in ends.itertuples():
        assert row.value == ARMS[row.arm][row.method][row.seed]
    assert len(ends) == 12
    with pytest.raises(ValueError, match="needs the column 'arm'"):
        metrics.finals(table.drop(columns="arm"))


def test_gaps_by_hand():
    """Reference: the last arm's node, 0.8 thrice. The arms lack 0.4, 0.3, 0.5 and 0.3, 0.2, 0.3: a third is gone."""
    table = metrics.gaps(metrics.finals(arms_table(ARMS)))
    assert list(table["gap"]) == pytest.approx([0.4, 0.8 / 3])
    assert list(table["gained"]) == pytest.approx([0, 0.4 / 3]) and table["gained_low"].isna().tolist() == [True, False]
    assert list(table["closed"]) == pytest.approx([0, 1 / 3])
    assert list(table["node_gained"]) == pytest.approx([0, 0.1])
    low, high = metrics.seed_interval([0.1, 0.1, 0.2])
    assert table[["gained_low", "gained_high"]].iloc[1].tolist() == pytest.approx([low, high])
    assert list(table["random"]) == pytest.approx([0.4, 1.6 / 3]) and list(table["seeds"]) == [3, 3]


def test_an_arm_without_a_reference_is_held_against_the_last_one_that_has_one():
    control = {**ARMS, "longer": {"random": [0.7, 0.7, 0.7]}}
    table = metrics.gaps(metrics.finals(arms_table(control)))
    assert list(table["gap"]) == pytest.approx([0.4, 0.8 / 3, 0.1]) and table["closed"].iloc[2] == pytest.approx(0.75)
    assert math.isnan(table["centralised"].iloc[2]) and math.isnan(table["node_gained"].iloc[2])
    assert metrics.gap_findings(table).splitlines()[2].endswith("75% of its gap.")


def test_gaps_use_the_seeds_that_all_arms_have_and_say_what_is_absent():
    fewer = {**ARMS, "kept": {"random": [0.5, 0.6], "centralised": [0.8, 0.8, 0.8]}}
    assert list(metrics.gaps(metrics.finals(arms_table(fewer)))["seeds"]) == [2, 2]
    with pytest.raises(ValueError, match=r"no finished run of \['centralised'\]"):
        metrics.gaps(metrics.finals(arms_table({"restart": {"random": [0.1]}})))
    with pytest.raises(ValueError, match="no seed has finished in all arms"):
        late = arms_table({"restart": {"random": [0.1], "centralised": [0.2]}})
        other = arms_table({"kept": {"random": [0.1], "centralised": [0.2]}}).assign(seed=7)
        metrics.gaps(metrics.finals(pd.concat([late, other])))


def test_gap_findings_say_what_is_shown_and_what_is_not():
    lines = metrics.gap_findings(metrics.gaps(metrics.finals(arms_table(ARMS)))).splitlines()
    assert lines[0].startswith("restart: federated ends 0.400 below the reference (shown") and "gains" not in lines[0]
    assert (
        "it gains +0.133 on the first arm (not shown, 95 % interval -0.010" in lines[1] and "33% of its gap" in lines[1]
    )
    one = {arm: {m: v[:1] for m, v in methods.items()} for arm, methods in ARMS.items()}
    assert "one seed" in metrics.gap_findings(metrics.gaps(metrics.finals(arms_table(one))))
