"""Who is labelled since when, and the Oracle: the only door to labels, which counts their cost."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data import Images, Labels

UNDECIDED = -2


@dataclass(frozen=True)
class Cost:
    """What labels cost: images looked at, boxes drawn, estimated annotation seconds."""

    images: int = 0
    boxes: int = 0
    seconds: float = 0.0


def total(costs: Iterable[Cost]) -> Cost:
    """The costs of all clients in one."""
    return Cost(*map(sum, zip(*(vars(cost).values() for cost in (Cost(), *costs)), strict=True)))


class Unanswered(RuntimeError):
    """Queries wait for a person; the loop goes on once they are answered. queries: a row each, where they are known."""

    def __init__(self, message: str, queries: Sequence[dict] = ()):
        super().__init__(message)
        self.queries = list(queries)


class Oracle:
    """Answers with the ground truth, and counts what that costs; where that is not known, the row joins `waiting`.

    A look at an image takes 2 s (our estimate), drawing a box 7 s, the median of extreme clicking (Papadopoulos et al.
    2017, 1708.02750); ignored boxes count, for an annotator draws them too. diagnostic: opens `hidden_labels`.
    labelled: (N,) bool, whose truth is known; None = all.
    """

    def __init__(self, labels: Labels, seconds_per_image=2.0, seconds_per_box=7.0, diagnostic=False, labelled=None):
        self.seconds_per_image, self.seconds_per_box, self._diagnostic = seconds_per_image, seconds_per_box, diagnostic
        self._labels, self._boxes = labels, (labels.classes > 0).sum(dim=1).numpy()  # (N,)
        self._annotated = np.zeros(len(self._boxes), dtype=bool)
        self._known = np.ones(len(self._boxes), dtype=bool) if labelled is None else np.asarray(labelled)
        self.waiting: dict[int, float] = {}  # row -> score

    def annotate(self, index: np.ndarray, cycle: int = 0, scores: Sequence[float] | None = None) -> np.ndarray:
        """Annotate these images: (n,) True where that could be done. cycle, scores: for `labelling.StoreOracle`."""
        again = np.asarray(index)[self._annotated[index]]
        if len(again):
            raise ValueError(f"images {again.tolist()} were annotated before: no label is paid twice")
        known = self._known[index]
        self._annotated[np.asarray(index)[known]] = True
        told = np.full(len(index), np.nan) if scores is None else scores
        self.waiting |= {int(row): float(told[i]) for i, row in enumerate(index) if not known[i]}
        return known

    def undecided(self, cycles: Iterable[int]) -> set[str]:
        """Ids that were queried in these cycles and that nobody could label: none of ground truth."""
        return set()

    def labels_of(self, index: np.ndarray) -> Labels:
        """Labels of images that were queried; any other raises."""
        hidden = np.asarray(index)[~self._annotated[index]]
        if len(hidden):
            raise ValueError(f"labels of images {hidden[:5].tolist()} were not queried: the Oracle keeps them")
        return self._labels.take(index)

    def hidden_labels(self, index: np.ndarray) -> Labels:
        """Labels that were not queried, for an upper bound that is marked as one; else PermissionError."""
        if not (self._diagnostic and self._known[index].all()):
            raise PermissionError("labels that were not queried are for upper bounds: set diagnostic=True, and say so")
        return self._labels.take(index)

    def cost(self, index: np.ndarray) -> Cost:
        """What the labels of these images cost; annotated ones only."""
        self.labels_of(index)
        boxes = int(self._boxes[index].sum())
        return Cost(len(index), boxes, len(index) * self.seconds_per_image + boxes * self.seconds_per_box)


class Pool:
    """One client's images: which are labelled, since which cycle, and what that cost.

    index: rows of the training set that this client holds; positions count within the client. `queried_in` is the whole
    history: the cycle of each image's query, -1 = unlabelled, -2 = undecided (queried, and nobody could say).
    """

    def __init__(self, client: str, images: Images, oracle: Oracle, index: Sequence[int]):
        self.client, self.images, self.oracle, self.index = client, images, oracle, np.asarray(index, dtype=np.int64)
        self.ids = tuple(images.ids[i] for i in self.index)
        self.queried_in = np.full(len(self.index), -1, dtype=np.int64)
        self.scores = np.full(len(self.index), np.nan)

    def __len__(self) -> int:
        return len(self.index)

    def labelled(self) -> np.ndarray:
        """Positions with a label, ascending."""
        return np.flatnonzero(self.queried_in >= 0)

    def unlabelled(self) -> np.ndarray:
        """Positions that can be queried, ascending."""
        return np.flatnonzero(self.queried_in == -1)

    def exclude(self, ids: Iterable[str]) -> None:
        """These images were queried and nobody could say: they are neither labelled nor queried again."""
        self.queried_in[np.isin(self.ids, list(ids)) & (self.queried_in == -1)] = UNDECIDED

    def training_set(self) -> tuple[Images, Labels]:
        """The labelled images and their labels."""
        rows = self.index[self.labelled()]
        return self.images.take(rows), self.labels_of(rows)

    def label(self, positions: Sequence[int], cycle: int, scores: Sequence[float] | None = None) -> None:
        """Have these positions labelled in this cycle; scores: why, for the record."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(np.unique(positions)) != len(positions) or not np.isin(positions, self.unlabelled()).all():
            raise ValueError(f"client {self.client}: queries must be different, unlabelled images: {positions}")
        answered = self.oracle.annotate(self.index[positions], cycle, scores)
        self.queried_in[positions] = np.where(answered, cycle, UNDECIDED)
        if scores is not None:
            self.scores[positions] = scores

    def labels_of(self, rows: np.ndarray) -> Labels:
        """Labels of annotated rows of the training set, this client's or another's: the Oracle refuses others."""
        return self.oracle.labels_of(rows)

    def cost(self) -> Cost:
        """What this client's labels cost so far."""
        return self.oracle.cost(self.index[self.labelled()])

    def queries(self, cycle: int) -> list[dict]:
        """What was queried in this cycle, as rows of queries.csv."""
        return [
            {"cycle": cycle, "client": self.client, "id": self.ids[p], "score": float(self.scores[p])}
            for p in np.flatnonzero(self.queried_in == cycle)
        ]

    def replay(self, rows: Iterable[dict]) -> None:
        """Label again what queries.csv says that this client queried."""
        place = {sample: p for p, sample in enumerate(self.ids)}
        mine = [
            (int(row["cycle"]), row["id"], float(row["score"])) for row in rows if str(row["client"]) == self.client
        ]
        for stranger in [sample for _, sample, _ in mine if sample not in place]:
            raise ValueError(f"queries.csv names {stranger!r}, which client {self.client} does not hold")
        for cycle in sorted({cycle for cycle, _, _ in mine}):
            _, ids, scores = zip(*(row for row in mine if row[0] == cycle), strict=True)
            self.label([place[sample] for sample in ids], cycle, scores)
