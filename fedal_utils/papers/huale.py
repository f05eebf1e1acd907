"""HUALE: notebook 20. Its losses one at a time, the orders of its filters, and its gain taken apart.

One node; every cycle trains from the first weights. Scoring mirrors images, so training does, digits too.
"""

import pandas as pd

from .. import metrics
from ..config import FILTERS, Config
from .sizes import ONE_NODE, Preset, Sizes

_RCNN: Sizes = {
    **ONE_NODE,
    **dict(detector="faster_rcnn", backbone="lite0", pretrained=True, frozen=True, norm="group", box_loss_head=True),
    **dict(box_weight=5.0, auxiliary_weight=0.2),
    **dict(schedule="cosine", warmup=10, lr=3e-3, batch=4, round_lr_decay=1.0),
    **dict(flip=0.5, zoom=(1.0, 1.0), shift=0.0, colour=0.0),
    **dict(score_above=0.3, nms_iou=0.5, class_agnostic=False, threads=1),
}
_SMALL: dict[str, Sizes] = {
    "digits": {
        **_RCNN,
        **dict(image_size=(96, 96), digit_classes=3, scenes=(140, 50), anchor_side=24.0, anchor_ratios=(1.0,)),
        **dict(initial_labels=4, query_size=6, cycles=2, iterations=24, seeds=(0,), side_seeds=1),
    },
    "bccd": {
        **_RCNN,
        **dict(image_size=(192, 256), anchor_side=24.0, anchor_ratios=(0.7, 1.0, 1.4)),
        **dict(initial_labels=8, query_size=8, cycles=5, iterations=240, seeds=(0, 1, 2, 3, 4)),
    },
    "": {**_RCNN, **dict(initial_labels=8, query_size=8, cycles=5, iterations=240)},
}

# CALD's public protocol, which HUALE's grids and baseline curves coincide with: torchvision's Faster R-CNN R50-FPN,
# from ImageNet weights in every cycle, 20 epochs, learning rate / 10 at 16 and 19, warm-up in the first epoch.
# Its sides of 600 / 1000 (VOC) and 800 / 1333 (COCO) are a square canvas here, of the same scale for 4:3 images.
_FULL: Sizes = {
    **ONE_NODE,
    **dict(dataset="voc07", image_size=(800, 800)),
    **dict(detector="faster_rcnn", backbone="resnet50", norm="batch", pretrained=True, frozen=False),
    **dict(box_loss_head=True, box_weight=5.0, auxiliary_weight=0.2),
    **dict(iterations=0, epochs=20, batch=4, optimizer="sgd", lr=2.5e-3, momentum=0.9, weight_decay=1e-4),
    **dict(schedule="step", step_at=(0.8, 0.95), warmup=1000, warmup_epochs=1.0, clip=0.0, flip=0.5),
    **dict(initial_labels=500, query_size=500, cycles=7, score_above=0.3, nms_iou=0.5, class_agnostic=False),
    **dict(threads=0, seeds=(0, 1, 2)),
}
_COCO: Sizes = {
    **dict(image_size=(1088, 1088)),
    **dict(initial_labels=5000, query_size=1000, cycles=5, pool_subset_size=10000),
}
PRESETS = {"20": Preset(("random", "entropy_max", "cald", "cascade"), _FULL, {"coco": _COCO}, _SMALL)}

ARMS = PLAIN, WHOLE = "plain", "HUALE losses"


def loss_arms(config: Config) -> dict[str, Config]:
    """The same experiment under other losses: torchvision's own, all of HUALE's (*reconstructed*), and each alone."""
    plain = config.replace(box_loss="smooth_l1", auxiliary_head="none", emphasis=0.0)
    return {
        PLAIN: plain,
        WHOLE: plain.replace(box_loss="extended_iou", auxiliary_head="sides", emphasis=1.0),
        "Extended IoU alone": plain.replace(box_loss="extended_iou"),
        "Efficient IoU alone": plain.replace(box_loss="efficient_iou"),
        "side likelihood alone": plain.replace(auxiliary_head="sides"),
        "IoU head alone": plain.replace(auxiliary_head="iou"),
        "emphasis alone": plain.replace(emphasis=1.0),
    }


def filter_orders(config: Config) -> dict[str, Config]:
    """The same experiment with the cascade's four filters in other orders: as published, reversed, turned by two."""
    orders = (FILTERS, FILTERS[::-1], FILTERS[2:] + FILTERS[:2])
    return {" > ".join(order): config.replace(cascade_order=order) for order in orders}


EFFECTS = {  # name: (arm and method) minus (arm and method)
    "losses and acquisition": ((WHOLE, "cascade"), (PLAIN, "random")),
    "losses, random labels": ((WHOLE, "random"), (PLAIN, "random")),
    "losses, cascade's labels": ((WHOLE, "cascade"), (PLAIN, "cascade")),
    "acquisition, plain losses": ((PLAIN, "cascade"), (PLAIN, "random")),
    "acquisition, HUALE losses": ((WHOLE, "cascade"), (WHOLE, "random")),
    "against CALD as published": ((WHOLE, "cascade"), (PLAIN, "cald")),
    "cascade - CALD, equal losses": ((WHOLE, "cascade"), (WHOLE, "cald")),
}
# As HUALE's abstract averages, as CALD's does, and where all labels are random.
PARTS = {"all cycles": slice(None), "without the first": slice(1, None), "first cycle": slice(0, 1)}


def gain_split(table: pd.DataFrame, y: str = "ap50") -> pd.DataFrame:
    """HUALE's gain over random taken apart: a frame of effects (`metrics.EFFECT`), one row per effect and part.

    table: of `record.table`, with a column `arm` (names of `loss_arms`); an effect whose runs are missing is left out.
    """
    curves, found = metrics.curves_by_arm(table, y), []
    for effect, (one, other) in EFFECTS.items():
        a, b = curves.get(one, {}), curves.get(other, {})
        seeds = [seed for seed in sorted(set(a) & set(b)) if len(a[seed]) == len(b[seed]) > 1]
        found += [metrics.effect(effect, part, a, b, seeds, where) for part, where in PARTS.items() if seeds]
    return pd.DataFrame(found, columns=metrics.EFFECT)


def published_split(paper: pd.DataFrame) -> pd.DataFrame:
    """The same arithmetic on the published curves (`record.read_paper("huale")`): points of HUALE over another method.

    The baselines' curves were trained without HUALE's losses, so losses and acquisition cannot be told apart here.
    """
    rows = []
    for item, part in paper[paper["x"].notna()].groupby("item", sort=False):
        wide = part.pivot(index="x", columns="setting", values="value").sort_index()
        for other in ("Random", "CALD"):
            gap = (wide["HUALE"] - wide[other]).to_numpy()
            rows.append((item, other, gap.mean(), gap[1:].mean(), gap[0], gap[-1]))
    return pd.DataFrame(rows, columns=["item", "minus", "all", "later", "first", "last"])
