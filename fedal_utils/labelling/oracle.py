"""The Oracle that answers an experiment from a store, with a person or a simulated one behind it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from .. import record
from ..data import Dataset, Images, Labels, letterbox_boxes, letterbox_fit, to_original
from ..sampling import Cost, Unanswered
from ..seeding import rng_for
from .store import Question, Store, store_path


class Simulated:
    """An annotator who knows the truth and now and then names the wrong class.

    truth: {image: class name, or list of {"class", "box"}}. error: probability that the class of an image, or of each
    of its boxes, is replaced by another one of the store's; drawn by image, so the order of questions changes nothing.
    seconds_per_image, seconds_per_box: what is noted for a look at the image, and for the drawing of a box.
    """

    def __init__(self, truth: Mapping[str, Any], error=0.0, seconds_per_image=2.0, seconds_per_box=7.0, seed: int = 0):
        self.truth, self.error, self.seed, self.seconds = truth, error, seed, (seconds_per_image, seconds_per_box)

    def label(self, image: str, task: str, classes: Sequence[str]) -> Any:
        """What is said about an image; the same each time."""
        rng, truth = rng_for(self.seed, "annotator", image), self.truth[image]

        def named(name: str) -> str:
            slip, which = rng.random(), rng.random()  # two draws in any case: the next box' do not depend on it
            others = [c for c in classes if c != name]
            return others[int(which * len(others))] if slip < self.error and others else name

        return named(truth) if task == "classes" else [{**one, "class": named(one["class"])} for one in truth]

    def answer_all(self, store: Store, who: str) -> None:
        """Answer until nothing waits."""
        while (question := store.next(who)) is not None:
            label = self.label(question.image, store.task, store.classes)
            boxes = len(label) if store.task == "boxes" else 0
            store.answer(who, question.image, label, seconds=self.seconds[0] + boxes * self.seconds[1])


class StoreOracle:
    """What a `Pool` takes for its Oracle: labels come from the store, and cost what the store says they took.

    images, classes: the training set's. strategy: noted with each question.
    annotator: answers at once as `who`; None = a person at the page, `annotate` raises `Unanswered` until all is done.
    """

    def __init__(self, store: Store, images: Images, classes, annotator=None, strategy: str = "", who: str = "person"):
        self.store, self.images, self.annotator, self.strategy, self.who = store, images, annotator, strategy, who
        self.class_names = tuple(classes)
        self._given: dict[int, Any] = {}  # row -> label

    def annotate(self, index: np.ndarray, cycle: int = 0, scores: Sequence[float] | None = None) -> np.ndarray:
        """(n,) bool: which of these rows have a label now; of the others nobody could say."""
        rows, ids, sizes = [int(row) for row in index], self.images.ids, self.images.sizes.tolist()
        known = [None] * len(rows) if scores is None else [None if math.isnan(s) else float(s) for s in scores]
        self.store.queue(
            Question(ids[r], self.strategy, score, cycle, sizes[r]) for r, score in zip(rows, known, strict=True)
        )
        if self.annotator is not None:
            self.annotator.answer_all(self.store, self.who)
        said = self._standing([cycle]).groupby("image")["action"].last()
        waiting = sum(ids[row] not in said for row in rows)
        if waiting:
            raise Unanswered(f"{waiting} questions wait in {self.store.path}: answer them at the page, then run again")
        given = self.store.labels()
        self._given.update({row: given[ids[row]] for row in rows if said[ids[row]] == "label"})
        return np.array([row in self._given for row in rows], dtype=bool)

    def _standing(self, cycles: Iterable[int] | None = None) -> pd.DataFrame:
        """Answers (labels and shrugs) of these cycles, or of all, that nobody took back, in their order."""
        history = self.store.history()
        kept = ~history["undone"] & history["action"].isin(["label", "unknown"])
        return history[kept if cycles is None else kept & history["cycle"].isin(list(cycles))]

    def undecided(self, cycles: Iterable[int]) -> set[str]:
        """Images whose last word in these cycles is that nobody can say."""
        last = self._standing(cycles).groupby("image")["action"].last()
        return set(last[last == "unknown"].index)

    def labels_of(self, index: np.ndarray) -> Labels:
        """Labels of answered rows, letterboxed; any other raises."""
        rows = [int(row) for row in index]
        if unknown := [row for row in rows if row not in self._given]:
            raise ValueError(f"labels of images {unknown[:5]} were not given: the store has no answer to them")
        given, (height, width) = [self._given[row] for row in rows], self.images.image_size
        if self.store.task == "classes":
            given = [[{"class": name, "box": [0.0, 0.0, width, height]}] for name in given]
        if new := sorted({one["class"] for drawn in given for one in drawn} - set(self.class_names)):
            raise ValueError(f"{self.store.path} has the class {new[0]!r}; the set knows {', '.join(self.class_names)}")
        numbers = [torch.tensor([self.class_names.index(one["class"]) + 1 for one in drawn]).long() for drawn in given]
        corners = [torch.tensor([one["box"] for one in drawn], dtype=torch.float32).reshape(-1, 4) for drawn in given]
        classes = pad_sequence([*numbers, torch.zeros(1).long()], batch_first=True)[:-1]  # K is at least 1
        boxes = pad_sequence([*corners, torch.zeros(1, 4)], batch_first=True)[:-1]
        if self.store.task == "boxes":
            boxes = letterbox_boxes(boxes, self.images.sizes[rows], (height, width)) * (classes > 0)[..., None]
        never = torch.zeros_like(classes, dtype=torch.bool)
        return Labels(boxes, classes, never, never.clone())

    def hidden_labels(self, index: np.ndarray) -> Labels:
        """PermissionError: what a person would say is not known before they are asked."""
        raise PermissionError("labels that were not asked are not in the store, so there is no upper bound to compute")

    def cost(self, index: np.ndarray) -> Cost:
        """Images, boxes (of classes: one an image) and the seconds that these answers took; shrugs are not counted."""
        boxes = int((self.labels_of(index).classes > 0).sum())
        seconds = self._standing().groupby("image")["seconds"].sum()
        return Cost(len(index), boxes, float(sum(seconds.get(self.images.ids[int(row)], 0.0) for row in index)))


def oracle_of(
    run: record.Run, train: Dataset, annotator: Simulated | None = None, task: str = "boxes", who: str = "person"
) -> StoreOracle:
    """The store of this run, `labels.sqlite` in its folder, and who answers there."""
    store = Store(store_path(run.folder), train.class_names, task)
    return StoreOracle(store, train.images, train.class_names, annotator, run.method, who)


def simulated(run: record.Run, train: Dataset, task: str = "boxes") -> Simulated:
    """Somebody who knows the truth, errs as the config says, and takes the seconds of its query costs."""
    query, error = run.config.query, run.config.flywheel.annotator_error
    return Simulated(truth_of(train, task), error, query.seconds_per_image, query.seconds_per_box, run.seed)


def truth_of(train: Dataset, task: str) -> dict[str, str | list[dict]]:
    """Image id -> class name, or boxes in pixels of the original image: what a simulated annotator knows.

    Objects to be ignored (difficult, too small) or with a side below 1 pixel are left out: nobody would draw them.
    """
    images, labels, names = train.images, train.labels, ("", *train.class_names)
    if task == "classes":
        return {id_: names[c] for id_, c in zip(images.ids, labels.classes[:, 0].tolist(), strict=True)}
    limits = images.sizes.flip(1).repeat(1, 2)[:, None]  # (N, 1, 4) width, height, width, height
    boxes = to_original(labels.boxes, images.sizes, images.image_size).double().clamp(min=0).minimum(limits.double())
    drawn = labels.valid & (boxes[..., 2:] - boxes[..., :2] >= 1).all(2)
    found: dict[str, list[dict]] = {id_: [] for id_ in images.ids}
    for i, j in drawn.nonzero().tolist():
        found[images.ids[i]].append({"class": names[labels.classes[i, j]], "box": boxes[i, j].tolist()})
    return found


def pictures(images: Images) -> dict[str, np.ndarray]:
    """Image id -> uint8 (h, w, 3) cut out of its letterbox, for the page, of sets that have no files of their own."""
    inner, offset = letterbox_fit(images.sizes, images.image_size)
    found = {}
    for row, (id_, (h, w), (y, x)) in enumerate(zip(images.ids, inner.tolist(), offset.tolist(), strict=True)):
        found[id_] = images.batch([row])[0, :, y : y + h, x : x + w].permute(1, 2, 0).numpy()
    return found
