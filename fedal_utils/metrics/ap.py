"""Average precision under three names from one detection list, because papers mean different things by "mAP".

All are means over the classes that have countable ground truth: `ap_voc11`, IoU 0.5, mean of the best precision at
recall >= 0, 0.1, ..., 1 (VOC 2007; Everingham et al. 2010); `ap_voc`, IoU 0.5, area under the precision envelope, all
points (VOC 2010 and later); `ap_coco`, 101 recall points, mean over IoU .50:.05:.95; `ap50` and `ap75` at one IoU.

Ignored objects (`Labels.ignore`) are neither to be found nor wrong to be found: in COCO each takes one detection off
the list, in VOC, as in its devkit, any number of which it is the best overlap. Crowd regions (`Labels.crowd`) follow
COCO's `iscrowd`, and count as difficult in VOC. Boxes are continuous xyxy pixels: nothing adds 1 to a width. Ties in
score keep the order of images and of their rows.
"""

import contextlib
import io
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from ..data import Detections, Labels

OUT_OF_RANGE = 1e12  # px2; beyond COCO's largest area (1e10), so that pycocotools itself sets the object aside
BOX = ["x1", "y1", "x2", "y2"]
MOST = 100  # detections of an image and class that enter COCO's numbers; VOC takes all


def evaluate(detections: Detections, labels: Labels, class_names: Sequence[str]) -> dict[str, float]:
    """All APs of one set of detections: ap50, ap75, ap_coco, ap_voc11, ap_voc and 'ap50/<class>', in [0, 1].

    Row i of both is the same image; class k is `class_names[k - 1]`, NaN without countable ground truth.
    """
    found = _rows(detections.labels, detections.boxes, score=detections.scores.double())
    truth = _rows(labels.classes, labels.boxes, crowd=labels.crowd, ignore=labels.ignore | labels.crowd)
    if truth["ignore"].all():
        raise ValueError(f"AP needs ground truth: {len(labels)} images have {len(truth)} objects, all of them ignored")
    broken = ~np.isfinite(found[[*BOX, "score"]]).all(axis=1)
    if broken.any():
        raise ValueError(f"a detection in image {found['image'][broken].iloc[0]} is not finite: a broken model")
    by_coco, by_voc = _coco(found, truth, len(labels), class_names), _voc(found, truth, len(class_names))
    out = {name: by_coco.pop(name) for name in ("ap50", "ap75", "ap_coco")}
    return out | {name: float(np.nanmean(values)) for name, values in by_voc.items()} | by_coco


def accuracy(scores: torch.Tensor, classes: torch.Tensor, class_names: Sequence[str], mixes=None) -> dict[str, float]:
    """'accuracy' of classes (N,) from 0 by scores (N, C), and 'accuracy/<class>' (NaN for a class without an image).

    mixes (M, C): each client's classes, which weigh the test set for 'accuracy_mean_client', 'accuracy_worst_client'.
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
        mixes = mixes[mixes.sum(axis=1) > 0]
        clients = mixes @ each[present] / mixes.sum(axis=1)
        out |= {"accuracy_mean_client": float(clients.mean()), "accuracy_worst_client": float(clients.min())}
    return out | {f"accuracy/{name}": float(value) for name, value in zip(class_names, each, strict=True)}


def _rows(classes: torch.Tensor, boxes: torch.Tensor, **more: torch.Tensor) -> pd.DataFrame:
    """A row for each that is no padding, image after image: image from 0, label from 1, BOX in float64, and more."""
    real = classes > 0
    columns = {"image": real.nonzero()[:, 0], "label": classes[real], **{name: t[real] for name, t in more.items()}}
    columns |= dict(zip(BOX, boxes[real].double().T, strict=True))
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def _coco(found: pd.DataFrame, truth: pd.DataFrame, images: int, class_names: Sequence[str]) -> dict[str, float]:
    """By pycocotools, the referee, silently.

    It overwrites an 'ignore' of ours with `iscrowd`, but sets an object aside whose area is outside every range.
    """
    sides, ids = [], [{"id": i} for i in range(max(images, len(class_names)) + 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in (truth, found):
            box = rows[BOX].to_numpy(copy=True)
            box[:, 2:] -= box[:, :2]
            one = pd.DataFrame({"image_id": rows["image"], "category_id": rows["label"], "bbox": box.tolist()})
            one = one.assign(id=range(1, len(one) + 1), area=box[:, 2:].prod(1), iscrowd=0)  # 0: unmatched, for it
            if rows is truth:
                one["iscrowd"] = truth["crowd"].astype(int)
                one["area"] = one["area"].where(truth["crowd"] | ~truth["ignore"], OUT_OF_RANGE)
            else:
                one["score"] = found["score"]
            sides.append(COCO())
            sides[-1].dataset = {"images": ids[:images], "categories": ids[1 : len(class_names) + 1]}
            sides[-1].dataset["annotations"] = one.to_dict("records")
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


def _voc(found: pd.DataFrame, truth: pd.DataFrame, n_classes: int) -> dict[str, np.ndarray]:
    """{'ap_voc11': (C,), 'ap_voc': (C,)}, NaN where a class has nothing to find."""
    overlap, match = np.full(len(found), -1.0), np.zeros(len(found), dtype=int)  # best object of its image and class
    objects = truth.groupby(["image", "label"]).indices
    boxes, wanted = (torch.tensor(rows[BOX].to_numpy()) for rows in (found, truth))
    for place, rows in found.groupby(["image", "label"]).indices.items():
        if place in objects:
            ious = box_iou(boxes[rows], wanted[objects[place]]).nan_to_num().numpy()  # the first object wins a tie
            overlap[rows], match[rows] = ious.max(1), objects[place][ious.argmax(1)]
    order = np.argsort(-found["score"].to_numpy(), kind="stable")  # ties: image order, then order in the row
    label, ignore = found["label"].to_numpy(), truth["ignore"].to_numpy()
    out = {name: np.full(n_classes, math.nan) for name in ("ap_voc11", "ap_voc")}
    for c in range(1, n_classes + 1):
        n_objects = int(((truth["label"] == c) & ~truth["ignore"]).sum())
        if n_objects == 0:
            continue
        mine = order[label[order] == c]  # (d,) best first
        hit = overlap[mine] >= 0.5
        aside = hit & ignore[match[mine]]
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
