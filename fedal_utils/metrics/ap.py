"""Average precision under three names from one detection list, because papers mean different things by "mAP".

All are means over the classes that have countable ground truth:

==========  ===================================================================================================
`ap_voc11`  IoU 0.5, mean of the best precision at recall >= 0, 0.1, ..., 1 (VOC 2007; Everingham et al. 2010)
`ap_voc`    IoU 0.5, area under the precision envelope, all points (VOC 2010 and later)
`ap_coco`   101 recall points, mean over IoU .50:.05:.95, by pycocotools; `ap50` and `ap75` at one IoU
==========  ===================================================================================================

**Ignored objects** (`Labels.ignore`: difficult, too small) are neither to be found nor wrong to be found. COCO: a
detection matched to one, by the ordinary IoU, leaves the list; each takes one detection. VOC: as in the VOC devkit,
any number of detections whose best overlap is a difficult object leave the list. **Crowd** regions (`Labels.crowd`)
follow COCO's `iscrowd` (overlap divided by the detection's area, any number of matches); VOC has no such notion, so
there they count as difficult. **Boxes** are continuous xyxy pixels: unlike the VOC devkit nothing adds 1 to a width.
**Ties** in score keep image order, then the order within the image's row, under all three names.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

from ..data import Detections, Labels

OUT_OF_RANGE = 1e12  # px2; beyond COCO's largest area (1e10), so that pycocotools itself sets the object aside


def evaluate(
    detections: Detections,
    labels: Labels,
    class_names: Sequence[str],
    per_class: bool = True,
    fast: bool = False,
    max_detections: int = 100,
) -> dict[str, float]:
    """All APs of one set of detections: ap50, ap75, ap_coco, ap_voc11, ap_voc and, if asked, 'ap50/<class>'.

    Row i of `detections` and of `labels` is the same image, in the same pixels; class k is `class_names[k - 1]`.
    Values are in [0, 1]; 'ap50/<class>' is NaN for a class without countable ground truth. No detections at all: zeros.
    `max_detections` per image and class enter COCO's numbers (pycocotools' rule); VOC takes all. `fast=True` counts
    with hotcoco where it is installed (extra `fast`; the numbers are the same), otherwise pycocotools does.
    ValueError: no countable ground truth at all, a non-finite or inverted box, a non-finite score, an unknown class
    (each with the image's row number), or unequal numbers of images.
    """
    flat = _flatten(detections, labels, class_names)
    by_coco = _coco(flat, class_names, max_detections, fast)
    by_voc = _voc(flat, len(class_names))
    out = {name: by_coco.pop(name) for name in ("ap50", "ap75", "ap_coco")}
    out |= {name: float(np.nanmean(by_voc[name])) for name in ("ap_voc11", "ap_voc")}
    return out | (by_coco if per_class else {})


def accuracy(
    scores: torch.Tensor, classes: torch.Tensor, class_names: Sequence[str], mixes: np.ndarray | None = None
) -> dict[str, float]:
    """Accuracy of whole-image classification: 'accuracy', and 'accuracy/<class>' (NaN for a class without an image).

    scores (N, C), classes (N,) from 0. mixes (M, C): each client's share of every class. A client's accuracy is that
    of the same model on the test set weighed by the client's own mix of classes; 'accuracy_mean_client' is the mean
    over clients, 'accuracy_worst_client' the smallest.
    """
    if len(scores) != len(classes) or not len(scores):
        raise ValueError(f"accuracy needs scores of every image and at least one, got {len(scores)} for {len(classes)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("a class score is not finite: a broken model has no accuracy")
    truth = classes.cpu().numpy()
    right = (scores.argmax(dim=1).cpu().numpy() == truth).astype(float)
    each = np.array([right[truth == c].mean() if (truth == c).any() else math.nan for c in range(len(class_names))])
    out = {"accuracy": float(right.mean())}
    if mixes is not None:
        present = np.isfinite(each)
        mixes = np.asarray(mixes, dtype=float)[:, present]
        weight = mixes.sum(axis=1, keepdims=True)
        clients = (mixes @ each[present])[weight[:, 0] > 0] / weight[weight[:, 0] > 0, 0]
        out |= {"accuracy_mean_client": float(clients.mean()), "accuracy_worst_client": float(clients.min())}
    return out | {f"accuracy/{name}": float(value) for name, value in zip(class_names, each, strict=True)}


class _Flat(NamedTuple):
    """The rows that are not padding, image after image; boxes float64 xyxy; `image` counts from 0, classes from 1."""

    n_images: int
    image: np.ndarray  # (D,) of each detection
    label: np.ndarray  # (D,)
    score: np.ndarray  # (D,)
    box: np.ndarray  # (D, 4)
    gt_image: np.ndarray  # (G,) of each ground-truth object
    gt_class: np.ndarray  # (G,)
    gt_box: np.ndarray  # (G, 4)
    gt_ignore: np.ndarray  # (G,) bool, crowd included
    gt_crowd: np.ndarray  # (G,) bool


def _flatten(detections: Detections, labels: Labels, class_names: Sequence[str]) -> _Flat:
    """Drop the padding and refuse what no AP can be made of."""
    n_images, n_labelled = len(detections.labels), len(labels.classes)
    if n_images != n_labelled:
        raise ValueError(f"{n_images} images with detections but {n_labelled} with labels: rows must be the same")
    if len(set(class_names)) != len(class_names) or not class_names:
        raise ValueError(f"class_names must be one or more different names, got {list(class_names)!r}")
    image, column, label, box = _rows("detection", detections.boxes, detections.labels, len(class_names))
    score = _numpy(detections.scores, float)[image, column]
    _refuse("detection score", score, image, ~np.isfinite(score), "finite numbers")
    gt_image, gt_column, gt_class, gt_box = _rows("ground truth", labels.boxes, labels.classes, len(class_names))
    crowd = _numpy(labels.crowd, bool)[gt_image, gt_column]
    ignore = _numpy(labels.ignore, bool)[gt_image, gt_column] | crowd
    if ignore.all():
        kind = f"{len(ignore)} objects, every one of them ignored" if len(ignore) else "no object"
        raise ValueError(f"AP needs ground truth: {n_images} images have {kind}")
    return _Flat(n_images, image, label, score, box, gt_image, gt_class, gt_box, ignore, crowd)


def _rows(what: str, boxes: torch.Tensor, classes: torch.Tensor, n_classes: int) -> tuple[np.ndarray, ...]:
    """Image, column, class (D,) and box (D, 4) of what is not padding: image after image, each in the row's order."""
    classes = _numpy(classes, int)  # (N, T)
    image, column = np.nonzero(classes)
    box = _numpy(boxes, float).reshape(*classes.shape, 4)[image, column]
    label = classes[image, column]
    _refuse(f"{what} class", label, image, (label < 1) | (label > n_classes), f"1..{n_classes} (0 = padding)")
    _refuse(f"{what} box", box, image, ~np.isfinite(box).all(1), "finite xyxy pixels")
    _refuse(f"{what} box", box, image, (box[:, 2:] < box[:, :2]).any(1), "x1 <= x2 and y1 <= y2")
    return image, column, label, box


def _numpy(values: torch.Tensor | np.ndarray, dtype: type) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = (values.double() if dtype is float else values).detach().cpu().numpy()  # numpy has no bfloat16
    return np.asarray(values).astype(dtype)


def _refuse(what: str, values: np.ndarray, rows: np.ndarray, bad: np.ndarray, allowed: str) -> None:
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{what} {values[first].tolist()!r} in image {int(rows[first])}: allowed are {allowed}")


def _coco(flat: _Flat, class_names: Sequence[str], max_detections: int, fast: bool) -> dict[str, float]:
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    count = _count_fast if fast and _hotcoco() else _count
    precision = count(_truth_dict(flat, class_names), _result_dicts(flat), max_detections)[..., 0, -1]
    # (T, R, C): IoU threshold, recall point, class; -1 where a class has no object

    def mean(values: np.ndarray) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else math.nan

    out = {"ap_coco": mean(precision), "ap50": mean(precision[0]), "ap75": mean(precision[5])}
    return out | {f"ap50/{name}": mean(precision[0, :, k]) for k, name in enumerate(class_names)}


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def _truth_dict(flat: _Flat, class_names: Sequence[str]) -> dict:
    """The ground truth in COCO's JSON form; ids count from 1 (pycocotools takes 0 for unmatched).

    pycocotools overwrites an 'ignore' of ours with `iscrowd`. What it does respect is an area outside every range, so
    a plainly ignored object gets one: same IoU, same one match, but counted neither way.
    """
    side = flat.gt_box[:, 2:] - flat.gt_box[:, :2]
    area = np.where(flat.gt_ignore & ~flat.gt_crowd, OUT_OF_RANGE, side.prod(1))
    columns = [c.tolist() for c in (flat.gt_image + 1, flat.gt_class, flat.gt_crowd.astype(int), area)]
    annotations = [
        {"id": i, "image_id": image, "category_id": c, "iscrowd": crowd, "area": a, "bbox": box}
        for i, (image, c, crowd, a, box) in enumerate(zip(*columns, _xywh(flat.gt_box), strict=True), start=1)
    ]
    return {
        "images": [{"id": i + 1} for i in range(flat.n_images)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(class_names, start=1)],
        "annotations": annotations,
    }


def _result_dicts(flat: _Flat) -> list[dict]:
    """Detections in COCO's results form, with what `COCO.loadRes` adds; unlike it, this takes an empty list."""
    columns = [c.tolist() for c in (flat.image + 1, flat.label, flat.score)]
    return [
        {"id": k, "image_id": i, "category_id": c, "score": s, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
        for k, (i, c, s, b) in enumerate(zip(*columns, _xywh(flat.box), strict=True), start=1)
    ]


def _count(truth: dict, found: list[dict], max_detections: int) -> np.ndarray:
    """Precision (T, R, C, 1, 1) by pycocotools, the referee, silently."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for dataset in (truth, {**truth, "annotations": found}):
            sides.append(COCO())
            sides[-1].dataset = dataset
            sides[-1].createIndex()
        counter = COCOeval(*sides, iouType="bbox")
        counter.params.areaRng, counter.params.maxDets = [[0, 1e10]], [max_detections]
        counter.evaluate()
        counter.accumulate()
    return counter.eval["precision"]


def _hotcoco():
    try:
        import hotcoco
    except ImportError:
        return None
    return hotcoco


def _count_fast(truth: dict, found: list[dict], max_detections: int) -> np.ndarray:
    """The same array by hotcoco."""
    library = _hotcoco()
    truth_side = library.COCO(truth)
    found_side = truth_side.load_res(found) if found else library.COCO({**truth, "annotations": []})
    counter = library.COCOeval(truth_side, found_side, "bbox")
    counter.params.area_rng, counter.params.max_dets = [[0.0, 1e10]], [max_detections]
    counter.params.area_rng_lbl = ["all"]
    counter.evaluate()
    counter.accumulate()
    return np.asarray(counter.eval["precision"])


def _voc(flat: _Flat, n_classes: int) -> dict[str, np.ndarray]:
    """{'ap_voc11': (C,), 'ap_voc': (C,)}, NaN where a class has nothing to find."""
    overlap, match = _best_overlap(flat)  # (D,), (D,) the object of its class that each detection covers best
    order = np.argsort(-flat.score, kind="stable")  # ties: image order, then order in the row
    out = {name: np.full(n_classes, math.nan) for name in ("ap_voc11", "ap_voc")}
    for c in range(1, n_classes + 1):
        n_objects = int(((flat.gt_class == c) & ~flat.gt_ignore).sum())
        if n_objects == 0:
            continue
        mine = order[flat.label[order] == c]  # (d,) best first
        hit = overlap[mine] >= 0.5
        aside = hit & flat.gt_ignore[match[mine]] if len(flat.gt_ignore) else np.zeros(len(mine), dtype=bool)
        mine, hit = mine[~aside], hit[~aside]
        first = np.zeros(len(mine), dtype=bool)  # the best-scored detection of each object
        rows = np.flatnonzero(hit)
        first[rows[np.unique(match[mine[rows]], return_index=True)[1]]] = True
        true = np.cumsum(first)  # (d,) true positives so far
        precision = true / np.arange(1, len(mine) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]  # best precision at this recall or a higher one
        out["ap_voc"][c - 1] = envelope[first].sum() / n_objects  # recall steps by 1 / n_objects at each new object
        # the first place with recall true / n >= k / 10, compared in whole numbers: 3 * 0.1 > 0.3 in floating point
        places = np.searchsorted(10 * true, np.arange(11) * n_objects)  # (11,)
        out["ap_voc11"][c - 1] = envelope[places[places < len(mine)]].sum() / 11
    return out


def _best_overlap(flat: _Flat) -> tuple[np.ndarray, np.ndarray]:
    """IoU (D,) of each detection with the best object of its own image and class, and that object's row (D,).

    The first object wins a tie; overlap -1 where the image has no object of the class.
    """
    overlap, match = np.full(len(flat.image), -1.0), np.zeros(len(flat.image), dtype=int)
    starts = np.searchsorted(flat.image, np.arange(flat.n_images + 1))
    gt_starts = np.searchsorted(flat.gt_image, np.arange(flat.n_images + 1))
    for i in range(flat.n_images):
        d, g = slice(starts[i], starts[i + 1]), slice(gt_starts[i], gt_starts[i + 1])
        if d.start == d.stop or g.start == g.stop:
            continue
        ious = box_iou(torch.from_numpy(flat.box[d]), torch.from_numpy(flat.gt_box[g])).nan_to_num().numpy()  # (d, g)
        ious[flat.label[d, None] != flat.gt_class[None, g]] = -1.0
        match[d], overlap[d] = ious.argmax(1) + g.start, ious.max(1)
    return overlap, match
