"""Judging detections and learning curves: AP three ways from one detection file, and statistics over seeds.

Three names for average precision, because papers mean different things by "mAP". All are means over the classes that
have countable ground truth:

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
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats

from ..data.boxes import Detections
from ..data.readers import Labels

OUT_OF_RANGE = 1e12  # px2; beyond COCO's largest area (1e10), so that pycocotools itself sets the object aside
SUMMARY = (  # the order in which pycocotools prints its twelve numbers
    *("ap_coco", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)


# --- AP -------------------------------------------------------------------------------------------------------------


def evaluate(
    detections: Detections,
    labels: Labels,
    class_names: Sequence[str],
    per_class: bool = True,
    fast: bool | None = None,
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
    by_coco = _coco(flat, class_names, max_detections, bool(fast))
    by_voc = _voc(flat, len(class_names))
    out = {name: by_coco[name] for name in ("ap50", "ap75", "ap_coco")}
    out |= {name: float(np.nanmean(by_voc[name])) for name in ("ap_voc11", "ap_voc")}
    if per_class:
        out |= {name: value for name, value in by_coco.items() if name.startswith("ap50/")}
    return out


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
        judged = np.isfinite(each)
        mixes = np.asarray(mixes, dtype=float)[:, judged]
        weight = mixes.sum(axis=1, keepdims=True)
        clients = (mixes @ each[judged])[weight[:, 0] > 0] / weight[weight[:, 0] > 0, 0]
        out |= {"accuracy_mean_client": float(clients.mean()), "accuracy_worst_client": float(clients.min())}
    return out | {f"accuracy/{name}": float(value) for name, value in zip(class_names, each, strict=True)}


def coco(
    detections: Detections,
    labels: Labels,
    class_names: Sequence[str],
    max_detections: int = 100,
    fast: bool | None = None,
    summary: bool = False,
) -> dict[str, float]:
    """COCO AP: ap_coco, ap50, ap75 and 'ap50/<class>'; with `summary` all twelve numbers of `SUMMARY` besides.

    The sizes in `SUMMARY` are areas in letterboxed pixels (small < 32 x 32 <= medium < 96 x 96 <= large); NaN where no
    object has that size. Arguments and errors as in `evaluate`.
    """
    return _coco(_flatten(detections, labels, class_names), class_names, max_detections, bool(fast), summary)


def voc(detections: Detections, labels: Labels, class_names: Sequence[str], iou: float = 0.5) -> dict[str, float]:
    """VOC AP at one IoU: ap_voc11, ap_voc and the same per class as 'ap_voc11/<class>', 'ap_voc/<class>' (NaN: none).

    Arguments and errors as in `evaluate`; a detection hits when its IoU is at least `iou`.
    """
    by_class = _voc(_flatten(detections, labels, class_names), len(class_names), iou)
    out = {name: float(np.nanmean(values)) for name, values in by_class.items()}
    for name, values in by_class.items():
        out |= {f"{name}/{class_name}": float(v) for class_name, v in zip(class_names, values, strict=True)}
    return out


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


def _numpy(values: torch.Tensor | np.ndarray, dtype: type) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if dtype is float:
            values = values.double()  # numpy has no bfloat16
        values = values.numpy()
    return np.asarray(values).astype(dtype)


def _rows(
    what: str, boxes: torch.Tensor, classes: torch.Tensor, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image, column, class (D,) and box (D, 4) of what is not padding: image after image, each in the row's order."""
    if len(set(class_names)) != len(class_names) or not class_names:
        raise ValueError(f"class_names must be one or more different names, got {list(class_names)!r}")
    classes = _numpy(classes, int)  # (N, T)
    image, column = np.nonzero(classes)
    box = _numpy(boxes, float).reshape(*classes.shape, 4)[image, column]
    label = classes[image, column]
    known = (label > 0) & (label <= len(class_names))
    _refuse(f"{what} class", label, image, ~known, f"1..{len(class_names)} (0 = padding)")
    _refuse(f"{what} box", box, image, ~np.isfinite(box).all(1), "finite xyxy pixels")
    _refuse(f"{what} box", box, image, (box[:, 2:] < box[:, :2]).any(1), "x1 <= x2 and y1 <= y2")
    return image, column, label, box


def _detection_rows(detections: Detections, class_names: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Image, class, score (D,) and box (D, 4) of the detections."""
    image, column, label, box = _rows("detection", detections.boxes, detections.labels, class_names)
    score = _numpy(detections.scores, float)[image, column]
    _refuse("detection score", score, image, ~np.isfinite(score), "finite numbers")
    return image, label, score, box


def _flatten(detections: Detections, labels: Labels, class_names: Sequence[str]) -> _Flat:
    """Drop the padding and refuse what no AP can be made of."""
    n_images, n_labelled = len(detections.labels), len(labels.classes)
    if n_images != n_labelled:
        raise ValueError(f"{n_images} images with detections but {n_labelled} with labels: rows must be the same")
    found = _detection_rows(detections, class_names)
    gt_image, gt_column, gt_class, gt_box = _rows("ground truth", labels.boxes, labels.classes, class_names)
    crowd = _numpy(labels.crowd, bool)[gt_image, gt_column]
    ignore = _numpy(labels.ignore, bool)[gt_image, gt_column] | crowd
    if ignore.all():
        kind = f"{len(ignore)} objects, every one of them ignored" if len(ignore) else "no object"
        raise ValueError(f"AP needs ground truth: {n_images} images have {kind}")
    return _Flat(n_images, *found, gt_image, gt_class, gt_box, ignore, crowd)


def _refuse(what: str, values: np.ndarray, rows: np.ndarray, bad: np.ndarray, allowed: str) -> None:
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{what} {values[first].tolist()!r} in image {int(rows[first])}: allowed are {allowed}")


def _coco(
    flat: _Flat, class_names: Sequence[str], max_detections: int, fast: bool, summary: bool = False
) -> dict[str, float]:
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    truth, found = _truth_dict(flat, class_names), _result_dicts(flat.image, flat.label, flat.score, flat.box)
    areas = [[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]]
    limits = [min(1, max_detections), min(10, max_detections), max_detections]
    if not summary:
        areas, limits = areas[:1], limits[2:]
    precision, recall = (_count_fast if fast and _hotcoco() else _count)(truth, found, areas, limits)
    # precision (T, R, C, A, M): IoU threshold, recall point, class, area range, limit; recall without R; -1 = no object

    def mean(values: np.ndarray) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else math.nan

    aps = precision[..., 0, -1]  # (T, R, C) any area, the last limit
    out = {"ap_coco": mean(aps), "ap50": mean(aps[0]), "ap75": mean(aps[5])}
    if summary:
        out |= {name: mean(precision[..., a, -1]) for a, name in ((1, "ap_small"), (2, "ap_medium"), (3, "ap_large"))}
        out |= {name: mean(recall[..., 0, m]) for m, name in ((0, "ar1"), (1, "ar10"), (2, "ar100"))}
        out |= {name: mean(recall[..., a, -1]) for a, name in ((1, "ar_small"), (2, "ar_medium"), (3, "ar_large"))}
    return out | {f"ap50/{name}": mean(aps[0, :, k]) for k, name in enumerate(class_names)}


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


def _result_dicts(image: np.ndarray, label: np.ndarray, score: np.ndarray, box: np.ndarray) -> list[dict]:
    """Detections in COCO's results form; image ids count from 1."""
    columns = [c.tolist() for c in (image + 1, label, score)]
    return [
        {"image_id": i, "category_id": c, "score": s, "bbox": b}
        for i, c, s, b in zip(*columns, _xywh(box), strict=True)
    ]


def _count(truth: dict, found: list[dict], areas: list, limits: list) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, R, C, A, M) and recall (T, C, A, M) by pycocotools, the referee, silently."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for dataset in (truth, {**truth, "annotations": _as_annotations(found)}):
            side = COCO()
            side.dataset = dataset
            side.createIndex()
            sides.append(side)
        counter = COCOeval(*sides, iouType="bbox")
        counter.params.areaRng, counter.params.maxDets = areas, limits
        counter.evaluate()
        counter.accumulate()
    return counter.eval["precision"], counter.eval["recall"]


def _as_annotations(found: list[dict]) -> list[dict]:
    """What `COCO.loadRes` adds to a result that is a box; unlike it, this takes an empty list."""
    return [
        {**one, "id": i, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0} for i, one in enumerate(found, start=1)
    ]


def _hotcoco():
    try:
        import hotcoco
    except ImportError:
        return None
    return hotcoco


def _count_fast(truth: dict, found: list[dict], areas: list, limits: list) -> tuple[np.ndarray, np.ndarray]:
    """The same two arrays by hotcoco."""
    library = _hotcoco()
    truth_side = library.COCO(truth)
    found_side = truth_side.load_res(found) if found else library.COCO({**truth, "annotations": []})
    counter = library.COCOeval(truth_side, found_side, "bbox")
    counter.params.area_rng, counter.params.max_dets = [[float(low), float(high)] for low, high in areas], limits
    counter.params.area_rng_lbl = ["all", "small", "medium", "large"][: len(areas)]
    counter.evaluate()
    counter.accumulate()
    return np.asarray(counter.eval["precision"]), np.asarray(counter.eval["recall"])


def _voc(flat: _Flat, n_classes: int, iou: float = 0.5) -> dict[str, np.ndarray]:
    """{'ap_voc11': (C,), 'ap_voc': (C,)}, NaN where a class has nothing to find."""
    overlap, match = _best_overlap(flat)  # (D,), (D,) the object of its class that each detection covers best
    order = np.argsort(-flat.score, kind="stable")  # ties: image order, then order in the row
    out = {name: np.full(n_classes, math.nan) for name in ("ap_voc11", "ap_voc")}
    for c in range(1, n_classes + 1):
        n_objects = int(((flat.gt_class == c) & ~flat.gt_ignore).sum())
        if n_objects == 0:
            continue
        mine = order[flat.label[order] == c]  # (d,) best first
        hit = overlap[mine] >= iou
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
        a, b = flat.box[d, None], flat.gt_box[None, g]  # (d, 1, 4), (1, g, 4)
        side = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(min=0)
        inter = side.prod(-1)  # (d, g)
        union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
        ious = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
        ious[flat.label[d, None] != flat.gt_class[None, g]] = -1.0
        match[d], overlap[d] = ious.argmax(1) + g.start, ious.max(1)
    return overlap, match


# --- the detection file -----------------------------------------------------------------------------------------------


def write_detections(path: str | Path, detections: Detections, ids: Sequence[str], class_names: Sequence[str]) -> None:
    """Save detections as COCO results JSON, the one file that every AP can be recomputed from.

    A list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}: `image_id` is the image's id, `category_id`
    k is `class_names[k - 1]`, boxes are letterboxed pixels. Order and every digit are kept; written under a temporary
    name, then renamed. ValueError as in `evaluate`.
    """
    if len(ids) != len(detections) or len(set(ids)) != len(ids):
        raise ValueError(f"{len(ids)} ids ({len(set(ids))} different) for {len(detections)} images of detections")
    found = _result_dicts(*_detection_rows(detections, class_names))
    for row in found:
        row["image_id"] = ids[row["image_id"] - 1]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write("[" + ",\n".join(json.dumps(row, allow_nan=False) for row in found) + "]\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_detections(path: str | Path, ids: Sequence[str], class_names: Sequence[str]) -> Detections:
    """Detections of the images `ids`, in that order, from a file of `write_detections`; AP is the same as before.

    The file knows no class probabilities: `probs` is (N, T, 0). ValueError for an image that is not in `ids`, an
    unknown class, or a file that is not a list of results.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [(one["image_id"], one["category_id"], one["score"], *one["bbox"]) for one in found]
        if any(len(row) != 7 for row in rows):
            raise ValueError("a bbox must have four numbers")
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not COCO results JSON (image_id, category_id, bbox, score): {error}") from error
    row_of = {name: i for i, name in enumerate(ids)}
    per_image: list[list[tuple]] = [[] for _ in ids]
    for image_id, category, score, x, y, w, h in rows:
        if image_id not in row_of:
            raise ValueError(f"{path} has detections of image {image_id!r}, which is not among the {len(ids)} ids")
        if category not in range(1, len(class_names) + 1):
            raise ValueError(f"{path}, image {image_id!r}: category_id {category!r}, allowed 1..{len(class_names)}")
        per_image[row_of[image_id]].append((x, y, x + w, y + h, score, category))
    longest = max(map(len, per_image), default=0)
    table = np.zeros((len(ids), longest, 6))
    for i, one in enumerate(per_image):
        table[i, : len(one)] = np.asarray(one).reshape(-1, 6)
    values = torch.from_numpy(table)
    return Detections(
        boxes=values[..., :4].float(),
        scores=values[..., 4].float(),
        labels=values[..., 5].long(),
        probs=torch.zeros(len(ids), longest, 0),
    )


# --- learning curves --------------------------------------------------------------------------------------------------


def cycle_ends(table: pd.DataFrame) -> pd.DataFrame:
    """Server rows of the last round of each cycle, one per (method, seed, cycle): the points of a learning curve."""
    server = table[table["client"].astype(str) == "server"].sort_values(["method", "seed", "cycle", "round"])
    return server.groupby(["method", "seed", "cycle"], sort=False).tail(1)


def _curve(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"a curve needs two or more points, as many x as y; got shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"a curve must be finite, got x = {x.tolist()}, y = {y.tolist()}")
    if not (np.diff(x) > 0).all():
        raise ValueError(f"x must grow from point to point, got {x.tolist()}")
    return x, y


def area_under_curve(x: Sequence[float], y: Sequence[float]) -> float:
    """Area under a learning curve by trapezoids, divided by its width: the mean of y over the range of x.

    A constant curve gives its constant. ValueError for fewer than two points, NaN, or x that does not grow.
    """
    x, y = _curve(x, y)
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


def labels_to_target(x: Sequence[float], y: Sequence[float], target: float) -> float:
    """The first x at which the curve, drawn with straight lines, reaches `target`; NaN if it never does.

    `x[0]` if the first point is already there. Errors as in `area_under_curve`.
    """
    x, y = _curve(x, y)
    reached = np.flatnonzero(y >= target)
    if not len(reached):
        return math.nan
    i = int(reached[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (target - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


# --- over seeds -------------------------------------------------------------------------------------------------------


def _over_seeds(values: Sequence[float], level: float = 0.95) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"need one finite value per seed, got {values.tolist()!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}")
    return values


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, draws: int = 10_000, *, rng: np.random.Generator
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over seeds (Efron 1979); (nan, nan) for a single seed.

    The same generator state gives the same interval. Below about five seeds it is too narrow: see `seed_interval`.
    """
    values = _over_seeds(values, level)
    if len(values) == 1:
        return math.nan, math.nan
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)  # (draws,)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seed_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The band that figures draw: t interval of the mean for three or more seeds, min to max for two, NaN for one.

    Student's t at two seeds is 12.7 standard errors wide, and the bootstrap of two values says nothing: the two values
    themselves are the honest picture.
    """
    values = _over_seeds(values, level)
    if len(values) == 1:
        return math.nan, math.nan
    if len(values) == 2:
        return float(values.min()), float(values.max())
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def paired_test(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """Is a different from b, seed by seed? {'difference', 'low', 'high', 'p', 'n'}; entry i of both is the same seed.

    `difference` is the mean of a - b, `low` and `high` its t interval (NaN for one seed), `p` two-sided from all 2^n
    sign flips of the differences (n seeds can show no p below 2 / 2^n). ValueError for unequal or non-finite values and
    for more than 16 seeds, where 2^n is no longer small.
    """
    a, b = _over_seeds(a, level), _over_seeds(b)
    if len(a) != len(b) or len(a) > 16:
        raise ValueError(f"need the same 1..16 seeds on both sides, got {len(a)} and {len(b)} values")
    n, difference = len(a), a - b
    if n == 1:
        return {"difference": float(difference[0]), "low": math.nan, "high": math.nan, "p": 1.0, "n": 1}
    half = stats.t.ppf((1 + level) / 2, n - 1) * difference.std(ddof=1) / math.sqrt(n)
    flips = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    mean = float(difference.mean())
    return {"difference": mean, "low": mean - half, "high": mean + half, "p": float(flips.pvalue), "n": n}


def summary(table: pd.DataFrame, y: str = "ap50", baseline: str = "random") -> pd.DataFrame:
    """One row per method: the end of its learning curve, the area under it over labelled images, and both against
    `baseline` on the same seeds.

    Columns: method, seeds, images, boxes, minutes (estimated annotation time), megabytes (both ways, whole run), last,
    last_low, last_high, area, area_low, area_high, minus_<baseline> (difference of areas), low, high, p.
    """
    ends = cycle_ends(table)
    server = table[table["client"].astype(str) == "server"]
    areas: dict[str, dict[int, float]] = {}
    rows = []
    for method in dict.fromkeys(ends["method"]):
        curves = {seed: part for seed, part in ends[ends["method"] == method].groupby("seed")}
        traffic = server[server["method"] == method].groupby("seed")[["bytes_up", "bytes_down"]].sum().sum(axis=1)
        last = [float(part[y].iloc[-1]) for part in curves.values()]
        if all(len(part) > 1 and (part["images"].diff().iloc[1:] > 0).all() for part in curves.values()):
            areas[method] = {seed: area_under_curve(part["images"], part[y]) for seed, part in curves.items()}
        area = list(areas.get(method, {}).values())
        finals = pd.concat([part.tail(1) for part in curves.values()])
        last_low, last_high = seed_interval(last)
        area_low, area_high = seed_interval(area) if area else (math.nan, math.nan)
        rows.append(
            {
                "method": method,
                "seeds": len(curves),
                "images": float(finals["images"].mean()),
                "boxes": float(finals["boxes"].mean()),
                "minutes": float(finals["seconds"].mean()) / 60,
                "megabytes": float(traffic.mean()) / 1e6,
                "last": float(np.mean(last)),
                "last_low": last_low,
                "last_high": last_high,
                "area": float(np.mean(area)) if area else math.nan,
                "area_low": area_low,
                "area_high": area_high,
            }
        )
    for row in rows:
        mine, theirs = areas.get(row["method"], {}), areas.get(baseline, {})
        both = sorted(set(mine) & set(theirs))
        test = {"difference": math.nan, "low": math.nan, "high": math.nan, "p": math.nan}
        if row["method"] != baseline and both:
            test = paired_test([mine[seed] for seed in both], [theirs[seed] for seed in both])
        row[f"minus_{baseline}"] = test["difference"]
        row.update(low=test["low"], high=test["high"], p=test["p"])
    return pd.DataFrame(rows)


def findings(summary: pd.DataFrame, baseline: str = "random") -> str:
    """What `summary` shows, in sentences made by rule: a difference counts when its interval leaves out zero."""
    lines = []
    for row in summary.to_dict("records"):
        difference = row[f"minus_{baseline}"]
        if math.isnan(difference):
            continue
        gap = f"{row['method']} is {abs(difference):.3f} {'above' if difference > 0 else 'below'} {baseline} in area"
        if math.isnan(row["low"]):
            lines.append(f"{gap}: one seed, nothing can be said about chance.")
        elif row["low"] <= 0 <= row["high"]:
            lines.append(f"{gap}: no difference shown (95 % interval {row['low']:+.3f} to {row['high']:+.3f}).")
        else:
            lines.append(f"{gap} (95 % interval {row['low']:+.3f} to {row['high']:+.3f}, {row['seeds']} seeds).")
    return "\n".join(lines) or f"Nothing to compare with {baseline!r}."


# --- effects in points ------------------------------------------------------------------------------------------------


def curves_by_arm(table: pd.DataFrame, y: str) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """(arm, method) -> seed -> learning curve in points."""
    curves: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for arm, runs in table.groupby("arm") if len(table) else ():
        for (method, seed), rows in cycle_ends(runs).groupby(["method", "seed"]):
            curves.setdefault((arm, method), {})[int(seed)] = 100 * rows.sort_values("cycle")[y].to_numpy(dtype=float)
    return curves


EFFECT = ("effect", "part", "points", "low", "high", "p", "seeds")


def effect(
    name: str,
    part: str,
    one: dict[int, np.ndarray],
    other: dict[int, np.ndarray],
    seeds: Sequence[int],
    where: slice = slice(None),
) -> dict:
    """A row of `EFFECT`: the mean of this part of each curve of `one` minus that of `other`, paired by seed."""
    test = paired_test([one[s][where].mean() for s in seeds], [other[s][where].mean() for s in seeds])
    values = (test["difference"], test["low"], test["high"], test["p"], len(seeds))
    return dict(zip(EFFECT, (name, part, *values), strict=True))


def arm_gains(
    table: pd.DataFrame, method: str, reference: str, ys: Sequence[str] = ("ap50", "ap_coco")
) -> pd.DataFrame:
    """Each arm minus the arm `reference` under one method: mean over all cycles, in points, paired by seed.

    table: rows of `record.table` of several arms, named in `arm`. Columns: effect (the arm), part (the metric), points,
    low, high, p, seeds.
    """
    found = []
    for y in ys:
        curves = {arm: seeds for (arm, name), seeds in curves_by_arm(table, y).items() if name == method}
        base = curves.get(reference, {})
        for arm in (name for name in dict.fromkeys(table["arm"]) if name != reference):
            seeds = [s for s in sorted(set(curves.get(arm, {})) & set(base)) if len(curves[arm][s]) == len(base[s])]
            if seeds:
                found.append(effect(arm, y, curves[arm], base, seeds))
    return pd.DataFrame(found, columns=EFFECT)


def gains_at_equal(
    table: pd.DataFrame, xs: Sequence[str] = ("images", "boxes"), y: str = "ap50", baseline: str = "random"
) -> pd.DataFrame:
    """Each method minus the baseline at equal labels, counted in images and in boxes: points, paired by seed.

    A difference is that of the mean heights of both curves (straight lines between points) over the labels that both
    reach: a method that asks for crowded images has paid for more boxes at the same number of images. Columns as
    `arm_gains`: effect (the method), part ("equal images", ...).
    """
    runs = {key: rows.sort_values("cycle") for key, rows in cycle_ends(table).groupby(["method", "seed"])}
    found = []
    for method in (name for name in dict.fromkeys(table["method"]) if name != baseline):
        seeds = sorted(seed for name, seed in runs if name == method and (baseline, seed) in runs)
        for x in xs if seeds else ():
            pairs = [_mean_heights(runs[method, s], runs[baseline, s], x, y) for s in seeds]
            one, other = (
                {s: np.array([100 * pair[side]]) for s, pair in zip(seeds, pairs, strict=True)} for side in (0, 1)
            )
            found.append(effect(method, f"equal {x}", one, other, seeds))
    return pd.DataFrame(found, columns=EFFECT)


def _mean_heights(one: pd.DataFrame, other: pd.DataFrame, x: str, y: str) -> tuple[float, float]:
    """Mean heights of two curves over the range of x that they share; where x stands still, its last point counts."""
    parts = (rows.drop_duplicates(x, keep="last") for rows in (one, other))
    curves = [_curve(rows[x], rows[y]) for rows in parts]
    low, high = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    if not low < high:
        raise ValueError(f"two curves share no range of {x}: {curves[0][0].tolist()} and {curves[1][0].tolist()}")
    grid = np.unique(np.concatenate([[low, high], *(c[0][(c[0] > low) & (c[0] < high)] for c in curves)]))
    return tuple(area_under_curve(grid, np.interp(grid, *c)) for c in curves)


def effect_findings(effects: pd.DataFrame) -> str:
    """What a frame of effects shows, in sentences; an interval that holds zero is no difference shown."""
    if not len(effects):
        return "Not run."
    lines = []
    for row in effects[effects["part"] != "first cycle"].itertuples():
        if math.isnan(row.low):
            verdict = "one seed, so no interval"
        elif row.low > 0 or row.high < 0:
            verdict = f"{row.low:+.1f} to {row.high:+.1f}: {'a gain' if row.points > 0 else 'a loss'}"
        else:
            verdict = f"{row.low:+.1f} to {row.high:+.1f}: no difference shown"
        lines.append(f"{row.effect}, {row.part}: {row.points:+.1f} points ({verdict}).")
    return "\n".join(lines)


# --- an ablation ------------------------------------------------------------------------------------------------------


def finals(table: pd.DataFrame, y: str = "ap50") -> pd.DataFrame:
    """The end of every run's curve: columns arm, method, seed, value. table: rows of several arms, named in `arm`."""
    if "arm" not in table.columns:
        raise ValueError(f"an ablation's table needs the column 'arm', it has {list(table.columns)}")
    server = table[(table["client"].astype(str) == "server") & table[y].notna()]
    ordered = server.sort_values(["seed", "cycle", "round"], kind="stable")
    last = ordered.groupby(["arm", "method", "seed"], sort=False)[y].last().rename("value").reset_index()
    place = {arm: i for i, arm in enumerate(dict.fromkeys(table["arm"]))}
    return last.sort_values(["method", "seed"]).sort_values(
        "arm", key=lambda a: a.map(place), kind="stable", ignore_index=True
    )


def gaps(finals: pd.DataFrame, method: str = "random", reference: str = "centralised") -> pd.DataFrame:
    """How far the method stays below one reference in every arm, and what each arm gains on the first; by seed.

    The reference is that of the last arm that has one: a single node, trained as well as the ablation knows how.
    Columns: arm, seeds, <method>, <reference> (means of this arm), gap (the reference - method), gap_low, gap_high,
    gained (method against the first arm), gained_low, gained_high, closed (the part of the first arm's gap that is
    gone), node_gained (this arm's reference against the first's), node_gained_low, node_gained_high. Intervals as in
    `paired_test`; NaN for one seed, for the first arm against itself, and for an arm without a reference.
    """
    values = finals.pivot(index=["arm", "seed"], columns="method", values="value")
    absent = [m for m in (method, reference) if m not in values.columns]
    if absent:
        raise ValueError(f"no finished run of {absent} among {sorted(values.columns)}")
    arms = list(dict.fromkeys(finals["arm"]))
    wide = values[[method, reference]].unstack("arm").dropna(axis=1, how="all").dropna()  # the seeds that all arms have
    ends = {arm: wide[method, arm] for arm in arms if (method, arm) in wide.columns}
    nodes = {arm: wide[reference, arm] for arm in arms if (reference, arm) in wide.columns}
    if wide.empty or not nodes or len(ends) < len(arms):
        raise ValueError(f"no seed has finished in all arms {arms}")
    first, first_node, best = ends[arms[0]], next(iter(nodes.values())), next(reversed(nodes.values()))

    def against(a: pd.Series | None, b: pd.Series) -> dict[str, float]:
        if a is None or a is b:
            return {"difference": math.nan if a is None else 0.0, "low": math.nan, "high": math.nan}
        return paired_test(a, b)

    rows = []
    for arm, mine in ends.items():
        node = nodes.get(arm)
        tests = {
            "gap": paired_test(best, mine),
            "gained": against(mine, first),
            "node_gained": against(node, first_node),
        }
        row = {"arm": arm, "seeds": len(wide), method: mine.mean()}
        row[reference] = math.nan if node is None else node.mean()
        for name, test in tests.items():
            row |= {name: test["difference"], f"{name}_low": test["low"], f"{name}_high": test["high"]}
        whole = (best - first).mean()
        row["closed"] = row["gained"] / whole if whole > 0 else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def gap_findings(gaps: pd.DataFrame) -> str:
    """What `gaps` shows, in sentences made by rule: a number counts as shown when its interval leaves out zero."""

    def chance(row: dict, name: str) -> str:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        if math.isnan(low):
            return "one seed: nothing can be said about chance"
        return f"{'not shown' if low <= 0 <= high else 'shown'}, 95 % interval {low:+.3f} to {high:+.3f}"

    lines = []
    for number, row in enumerate(gaps.to_dict("records")):
        side = "below" if row["gap"] >= 0 else "above"
        line = f"{row['arm']}: federated ends {abs(row['gap']):.3f} {side} the reference ({chance(row, 'gap')})"
        if number:
            line += f"; it gains {row['gained']:+.3f} on the first arm ({chance(row, 'gained')})"
            if not math.isnan(row["closed"]):
                line += f", {row['closed']:.0%} of its gap"
            if not math.isnan(row["node_gained"]):
                line += f"; the single node gains {row['node_gained']:+.3f} ({chance(row, 'node_gained')})"
        lines.append(line + ".")
    return "\n".join(lines)
