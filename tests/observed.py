"""Observations by hand for tests of query strategies, and a selection by name."""

import copy
import math

import numpy as np
import oracles
import torch

from fedal_utils.config import Config
from fedal_utils.data import Detections
from fedal_utils.sampling import Observation, Selection, find, registered
from fedal_utils.seeding import rng_for


def observed(count: int, detections: Detections | None = None, config: Config | None = None, **what) -> Observation:
    """An observation of `count` images; reading what is not there raises AttributeError."""
    return Observation(config or Config(), count, **what, **({} if detections is None else {"detections": detections}))


def chosen(name: str, seen: Observation, k: int, rng: np.random.Generator, rule: str = "last", **settings) -> Selection:
    """The selection of a strategy of this name, whatever its kind; rule: `no_detection_rule`."""
    kinds = [kind for kind in ("boxes", "images") if name.partition(".")[0] in registered(kind)]
    kind = "images" if "images" in kinds and ("class_scores" in seen.__dict__ or kinds == ["images"]) else kinds[0]
    seen = copy.copy(seen)
    seen.config = seen.config.replace(no_detection_rule=rule, **settings)
    return find(name, kind).select(seen, k, rng)


def scored(name: str, found, count: int, rng: np.random.Generator):
    """Scores of a strategy that reduces detections to one number an image."""
    return chosen(name, observed(count, detections=found), 0, rng).scores


def detections(*images, columns=3, length=0, **extra):
    """Each image a list of (box, class vector); score and label are its best class. Padding is NaN but for the labels.

    extra: for each image a list of one value a box.
    """
    length = max([len(image) for image in images] + [length])
    boxes = torch.full((len(images), length, 4), math.nan)
    scores = torch.full((len(images), length), math.nan)
    labels = torch.zeros(len(images), length, dtype=torch.int64)
    probs = torch.full((len(images), length, columns), math.nan)
    for i, image in enumerate(images):
        for j, (box, p) in enumerate(image):
            boxes[i, j], probs[i, j] = torch.tensor(box, dtype=torch.float32), torch.tensor(p, dtype=torch.float32)
            scores[i, j], labels[i, j] = probs[i, j, 1:].max(), probs[i, j, 1:].argmax() + 1
    more = {}
    for name, rows in extra.items():
        tail = np.shape(next(row[0] for row in rows if len(row)))
        more[name] = torch.full((len(images), length, *tail), 99, dtype=torch.int64 if name == "level" else torch.float)
        for i, row in enumerate(rows):
            more[name][i, : len(row)] = torch.as_tensor(np.array(row, dtype=np.float32).reshape(len(row), *tail))
    return Detections(boxes, scores, labels, probs, more)


def lists(found):
    """The way back: each image a list of (box, class vector, score, label), as plain Python numbers."""
    fields = [t.double().tolist() for t in (found.boxes, found.probs, found.scores, found.labels)]
    return [[one for one in zip(*image, strict=True) if one[3] > 0] for image in zip(*fields, strict=True)]


def box(rng):
    x, y = rng.integers(0, 50, 2)
    return [x, y, x + rng.integers(4, 30), y + rng.integers(4, 30)]


def vector(rng, classes):
    p = rng.integers(0, 6, classes + 1) ** 2 + np.eye(classes + 1)[rng.integers(0, classes + 1)]
    return p / p.sum()


def two_views(seed, images=12, classes=3, most=6):
    """A view and a shaken one: boxes moved a little, some gone, some new, some class vectors changed; some without any.

    The coordinates are whole numbers, so equal IoUs do occur. Rows come best scored first.
    """
    rng = rng_for(seed, "views", classes)
    views = [], []
    for _ in range(images):
        plain = [(box(rng), vector(rng, classes)) for _ in range(rng.integers(0, most + 1))]
        shaken = [
            ([c + int(d) for c, d in zip(b, rng.integers(-3, 4, 4), strict=True)], p if rng.random() < 0.5 else q)
            for b, p in plain
            if rng.random() < 0.8
            for q in [vector(rng, classes)]
        ]
        if rng.random() < 0.5:
            shaken.append((box(rng), vector(rng, classes)))
        for view, rows in zip(views, (plain, shaken), strict=True):
            view.append(sorted(rows, key=lambda one: -max(one[1][1:])))
    length = rng.integers(0, 3) + most + 1
    return [detections(*view, columns=classes + 1, length=length) for view in views]


def slow_match(boxes, others, threshold=0.5):
    """Greedy over all pairs, one after the other: {row: other row}."""
    table = {(i, j): oracles.iou(a, b) for i, a in enumerate(boxes) for j, b in enumerate(others)}
    pairs = {}
    for (i, j), overlap in sorted(table.items(), key=lambda one: (-one[1], one[0])):
        if overlap >= threshold and i not in pairs and j not in pairs.values():
            pairs[i] = j
    return pairs
