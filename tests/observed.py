"""Observations by hand for tests of query strategies, and a selection by name."""

import copy
import math

import numpy as np
import torch

from fedal_utils.config import Config
from fedal_utils.data import Detections
from fedal_utils.sampling import Observation, Selection, find, registered


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
