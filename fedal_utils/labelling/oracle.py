"""The Oracle that answers an experiment from a store, with a person or a simulated one behind it."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch

from .. import federation, record, training
from ..data import Dataset, Images, Labels, letterbox_boxes, letterbox_fit, to_original
from ..federation import Client, Experiment, Query, Step
from ..sampling import Cost
from .annotators import Simulated
from .store import Question, Store, store_path


class Unanswered(RuntimeError):
    """Questions wait for a person; what was asked is in the store, and the loop goes on once they are answered."""


class StoreOracle:
    """What a `Pool` takes for its Oracle: labels come from the store, and cost what the store says they took.

    images, classes: the training set's. strategy: noted with each question, until an experiment says another.
    annotator: answers at once as `who`; None = a person at the page, `annotate` raises `Unanswered` until all is done.
    """

    def __init__(
        self,
        store: Store,
        images: Images,
        classes: Sequence[str],
        annotator: Simulated | None = None,
        strategy: str = "",
        who: str = "person",
    ):
        self.store, self.images, self.annotator, self.strategy, self.who = store, images, annotator, strategy, who
        self.model, self.suggestions = "", {}
        self.class_names, self._number = tuple(classes), {name: i + 1 for i, name in enumerate(classes)}
        self._given: dict[int, object] = {}

    def about(self, experiment: Experiment, client: Client, step: Step, chosen: Query) -> None:
        """Note why these images are queried and, of classes, what the model predicts."""
        self.strategy = federation.query.strategy_at(experiment, step.cycle).name
        if self.store.task == "classes" and step.cycle:
            rows, setup = client.pool.index[chosen.positions], experiment.setup
            scores = training.class_scores(experiment.model, setup.train.images.take(rows), device=setup.device)
            said = [setup.class_names[c] for c in scores.argmax(1).tolist()]
            self.suggestions, self.model = dict(zip(rows.tolist(), said, strict=True)), f"cycle {step.cycle - 1}"

    def annotate(self, index: np.ndarray, cycle: int = 0, scores: Sequence[float] | None = None) -> np.ndarray:
        """(n,) bool: which of these rows have a label now; of the others nobody could say."""
        rows, ids, sizes = [int(row) for row in index], self.images.ids, self.images.sizes.tolist()
        scores = [math.nan] * len(rows) if scores is None else map(float, scores)
        self.store.queue(
            Question(ids[r], self.strategy, score, self.model, self.suggestions.get(r), cycle, sizes[r])
            for r, score in zip(rows, (None if math.isnan(s) else s for s in scores), strict=True)
        )
        if self.annotator is not None:
            self.annotator.answer_all(self.store, self.who)
        here = self._last_actions([cycle])
        waiting = sum(ids[row] not in here for row in rows)
        if waiting:
            raise Unanswered(f"{waiting} questions wait in {self.store.path}: answer them at the page, then run again")
        given = self.store.labels()
        self._given.update({row: given[ids[row]] for row in rows if here[ids[row]] == "label"})
        return np.array([row in self._given for row in rows], dtype=bool)

    def _standing(self) -> pd.DataFrame:
        """Answers that nobody took back, in their order."""
        history = self.store.history()
        return history[~history["undone"] & history["action"].isin(["label", "unknown"])]

    def _last_actions(self, cycles: Iterable[int]) -> pd.Series:
        """Image -> "label" or "unknown": the last word in these cycles."""
        standing = self._standing()
        return standing[standing["cycle"].isin(list(cycles))].groupby("image")["action"].last()

    def undecided(self, cycles: Iterable[int]) -> set[str]:
        """Images whose last word in these cycles is that nobody can say."""
        last = self._last_actions(cycles)
        return set(last[last == "unknown"].index)

    def refresh(self) -> None:
        """Take in answers that were given again (label errors that were found and asked once more)."""
        given = self.store.labels()
        self._given = {row: given[self.images.ids[row]] for row in self._given}

    def labels_of(self, index: np.ndarray) -> Labels:
        """Labels of answered rows, letterboxed; any other raises."""
        rows = [int(row) for row in index]
        if unknown := [row for row in rows if row not in self._given]:
            raise ValueError(f"labels of images {unknown[:5]} were not given: the store has no answer to them")
        given, (height, width) = [self._given[row] for row in rows], self.images.image_size
        if self.store.task == "classes":
            given = [[{"class": name, "box": [0.0, 0.0, width, height]}] for name in given]
        if new := sorted({one["class"] for drawn in given for one in drawn} - set(self._number)):
            raise ValueError(f"{self.store.path} has the class {new[0]!r}; the set knows {', '.join(self._number)}")
        most = max((len(drawn) for drawn in given), default=0)
        boxes, classes = torch.zeros(len(rows), most, 4), torch.zeros(len(rows), most, dtype=torch.int64)
        for i, drawn in enumerate(given):
            for j, one in enumerate(drawn):
                boxes[i, j], classes[i, j] = torch.tensor(one["box"]), self._number[one["class"]]
        if self.store.task == "boxes" and most:
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
    config, query = run.config, run.config.query
    seconds = query.seconds_per_image, query.seconds_per_box
    return Simulated(truth_of(train, task), config.flywheel.annotator_error, *seconds, run.seed)


def truth_of(train: Dataset, task: str) -> dict[str, str | list[dict]]:
    """Image id -> class name, or boxes in pixels of the original image: what a simulated annotator knows.

    Objects to be ignored (difficult, too small) or with a side below 1 pixel are left out: nobody would draw them.
    """
    labels, names, sizes = train.labels, train.class_names, train.images.sizes
    if task == "classes":
        return {id_: names[int(c) - 1] for id_, c in zip(train.images.ids, labels.classes[:, 0], strict=True)}
    found: dict[str, list[dict]] = {id_: [] for id_ in train.images.ids}
    if labels.boxes.shape[1]:
        height, width = sizes.double()[:, None, :].unbind(2)  # (N, 1)
        boxes = to_original(labels.boxes, sizes, train.images.image_size).double()
        boxes = torch.minimum(boxes.clamp(min=0), torch.stack((width, height, width, height), dim=2))
        drawn = labels.valid & (boxes[..., 2:] - boxes[..., :2] >= 1).all(2)
        for i, j in torch.nonzero(drawn).tolist():
            box, name = boxes[i, j].tolist(), names[int(labels.classes[i, j]) - 1]
            found[train.images.ids[i]].append({"class": name, "box": box})
    return found


def pictures(images: Images) -> dict[str, np.ndarray]:
    """Image id -> uint8 (h, w, 3) cut out of its letterbox, for the page, of sets that have no files of their own."""
    inner, offset = letterbox_fit(images.sizes, images.image_size)
    found = {}
    for row, (id_, (h, w), (y, x)) in enumerate(zip(images.ids, inner.tolist(), offset.tolist(), strict=True)):
        found[id_] = images.batch([row])[0, :, y : y + h, x : x + w].permute(1, 2, 0).numpy()
    return found
