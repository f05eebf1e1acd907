"""Average precision under three names from one detection list, because papers mean different things by "mAP".

All are means over the classes that have countable ground truth: `ap_voc11`, IoU 0.5, mean of the best precision at
recall >= 0, 0.1, ..., 1 (VOC 2007; Everingham et al. 2010); `ap_voc`, IoU 0.5, area under the precision envelope, all
points (VOC 2010 and later); `ap_coco`, 101 recall points, mean over IoU .50:.05:.95; `ap50` and `ap75` at one IoU.

Ignored objects (`Labels.ignore`) are neither to be found nor wrong to be found: in COCO each takes one detection off
the list, in VOC, as in its devkit, any number of which it is the best overlap. Crowd regions (`Labels.crowd`) follow
COCO's `iscrowd`, and count as difficult in VOC. Boxes are continuous xyxy pixels: nothing adds 1 to a width. Ties in
score keep image order, then the order within the image's row.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from ..data import Detections, Labels

OUT_OF_RANGE = 1e12  # px2; beyond COCO's largest area (1e10), so that pycocotools itself sets the object aside
MOST = 100  # detections of an image and class that enter COCO's numbers; VOC takes all


def evaluate(detections: Detections, labels: Labels, class_names: Sequence[str]) -> dict[str, float]:
    """All APs of one set of detections: ap50, ap75, ap_coco, ap_voc11, ap_voc and 'ap50/<class>', in [0, 1].

    Row i of both is the same image; class k is `class_names[k - 1]`, NaN without countable ground truth. ValueError: no
    countable ground truth at all, or a detection that is not finite.
    """
    flat = _flatten(detections, labels)
    by_coco, by_voc = _coco(flat, class_names), _voc(flat, len(class_names))
    out = {name: by_coco.pop(name) for name in ("ap50", "ap75", "ap_coco")}
    return out | {name: float(np.nanmean(values)) for name, values in by_voc.items()} | by_coco


def accuracy(
    scores: torch.Tensor, classes: torch.Tensor, class_names: Sequence[str], mixes: np.ndarray | None = None
) -> dict[str, float]:
    """Accuracy of whole-image classification: 'accuracy', and 'accuracy/<class>' (NaN for a class without an image).

    scores (N, C), classes (N,) from 0. mixes (M, C): each client's share of every class, which weighs the test set for
    'accuracy_mean_client', the mean over clients, and 'accuracy_worst_client'.
    """
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


def _flatten(detections: Detections, labels: Labels) -> _Flat:
    """Drop the padding."""
    found, real = detections.labels > 0, labels.classes > 0
    crowd = labels.crowd[real].cpu().numpy()
    ignore = labels.ignore[real].cpu().numpy() | crowd
    if ignore.all():
        raise ValueError(f"AP needs ground truth: {len(real)} images have {len(ignore)} objects, all of them ignored")
    score, box = (t[found].double().cpu().numpy() for t in (detections.scores, detections.boxes))
    image = found.nonzero()[:, 0].cpu().numpy()
    broken = ~(np.isfinite(score) & np.isfinite(box).all(1))
    if broken.any():
        raise ValueError(f"a detection in image {image[broken][0]} is not finite: a broken model has no AP")
    detected = (image, detections.labels[found].cpu().numpy(), score, box)
    truth = (t.cpu().numpy() for t in (real.nonzero()[:, 0], labels.classes[real], labels.boxes[real].double()))
    return _Flat(len(real), *detected, *truth, ignore, crowd)


def _coco(flat: _Flat, class_names: Sequence[str]) -> dict[str, float]:
    """By pycocotools, the referee, silently.

    It overwrites an 'ignore' of ours with `iscrowd`. What it does respect is an area outside every range, so a plainly
    ignored object gets one: same IoU, same one match, but counted neither way.
    """
    truth = _annotations(flat.gt_image, flat.gt_class, flat.gt_box, iscrowd=flat.gt_crowd.astype(int))
    for one, ignored in zip(truth, flat.gt_ignore & ~flat.gt_crowd, strict=True):
        one["area"] = OUT_OF_RANGE if ignored else one["area"]
    found = _annotations(flat.image, flat.label, flat.box, score=flat.score, iscrowd=np.zeros_like(flat.label))
    images = [{"id": i + 1} for i in range(flat.n_images)]
    categories = [{"id": k, "name": name} for k, name in enumerate(class_names, start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for annotations in (truth, found):
            sides.append(COCO())
            sides[-1].dataset = {"images": images, "categories": categories, "annotations": annotations}
            sides[-1].createIndex()
        counter = COCOeval(*sides, iouType="bbox")
        counter.params.areaRng, counter.params.maxDets = [[0, 1e10]], [MOST]
        counter.evaluate()
        counter.accumulate()
    precision = counter.eval["precision"][..., 0, -1]  # (T, R, C) IoU, recall, class; -1 where a class has no object

    def mean(values: np.ndarray) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else math.nan

    out = {"ap50": mean(precision[0]), "ap75": mean(precision[5]), "ap_coco": mean(precision)}
    return out | {f"ap50/{name}": mean(precision[0, :, k]) for k, name in enumerate(class_names)}


def _annotations(image: np.ndarray, label: np.ndarray, box: np.ndarray, **more: np.ndarray) -> list[dict]:
    """COCO's JSON form; ids count from 1 (pycocotools takes 0 for unmatched)."""
    xywh = np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], axis=1)
    columns = {"image_id": image + 1, "category_id": label, "bbox": xywh, "area": xywh[:, 2:].prod(1), **more}
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [{"id": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows, start=1)]


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
        aside = hit & flat.gt_ignore[match[mine]]
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
