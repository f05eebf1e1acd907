"""The labelling flywheel (active-vision, 2025): train, predict, ask, label, add, with a person in it.

Two wheels. *Classes*: a linear classifier on the features of a frozen, pretrained backbone, cached once; the loop is
here. *Boxes*: any detector and any way of asking of `alfl`; what is new there is who answers. In both, every question
and every answer goes through a `labelling.Store`, whether a person sits at the page, a recorded session is replayed, or
somebody with a known error rate is simulated (`Answers`).

Each way of asking says where it comes from; the book is R. Monarch, *Human-in-the-Loop Machine Learning* (2021), which
active-vision follows. As in `sampling`, bigger = ask first, and strategies never see a label that was not given.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import metrics, record, seeding
from ..config import Config
from ..data import classification as class_sets
from ..data import exchange
from ..data.boxes import letterbox_boxes, letterbox_fit, to_original
from ..data.readers import Dataset, Images, Labels
from ..detectors.backbones import Embedder
from ..federation import experiment as alfl
from ..labelling import page as labelling
from ..sampling import strategies as sampling
from ..sampling.pool import Bill, Pool
from ..sampling.strategies import Choice, Scores

PERSON = "person"  # the one pool of the wheel, and who answers where nobody else is named
LEAST = -50.0  # natural logarithm of a probability: nothing counts as less likely, an unseen class as just that
FOLDS = 5
ERRORS = "label errors"  # the strategy of questions that are asked again
ALONE = (
    "random",
    "confidence",
    "margin",
    "ratio",
    "entropy",
    "model_outlier",
    "embedding_outlier",
    "cluster",
    "representative",
    "coreset",
)
MIXES: dict[str, dict[str, float]] = {
    # active-vision's quickstart
    "mix": {"confidence": 0.4, "ratio": 0.2, "entropy": 0.2, "model_outlier": 0.1, "random": 0.1},
    # the book's advice: uncertainty and outliers, then diversity
    "mix_diverse": {"margin": 0.5, "cluster": 0.3, "model_outlier": 0.2},
}
STRATEGIES = (*ALONE, *MIXES)


# --------------------------------------------------------------------------------------------------------- who answers


class Person(Protocol):
    """Whoever goes through a store's questions: `labelling.Simulated`, `labelling.Replay`, or nobody (a human does)."""

    def answer_all(self, store: labelling.Store, who: str) -> int: ...


class Unanswered(RuntimeError):
    """Questions wait for a person; what was asked is in the store, and the loop goes on once they are answered."""


class Answers:
    """What a `Pool` takes for its Oracle: labels come from the store, and cost what the store says they took.

    images: the training set; classes: its class names; task 'classes' or 'boxes'. person: answers at once; None = a
    human at the page, and `ask` raises `Unanswered` until all is answered. strategy, model: noted with each question;
    suggestions: row -> what the model would say, shown only where the page is told to.
    """

    def __init__(
        self,
        store: labelling.Store,
        images: Images,
        classes: Sequence[str],
        task: str,
        person: Person | None = None,
        strategy: str = "",
        who: str = PERSON,
    ):
        self.store, self.person, self.strategy, self.who, self.task = store, person, strategy, who, task
        self.model, self.suggestions = "", {}
        self.images, self._number = images, {name: i + 1 for i, name in enumerate(classes)}
        self._given: dict[int, object] = {}

    def ask(self, index: np.ndarray, cycle: int = 0, scores: Sequence[float] | None = None) -> np.ndarray:
        """(n,) bool: who of these rows has a label now; the others nobody could say."""
        scores = [math.nan] * len(index) if scores is None else scores
        rows = [int(row) for row in index]
        self.store.queue(
            [
                labelling.Question(
                    image=self.images.ids[row],
                    strategy=self.strategy,
                    score=None if math.isnan(score) else float(score),
                    model=self.model,
                    suggestion=self.suggestions.get(row),
                    cycle=cycle,
                )
                for row, score in zip(rows, scores, strict=True)
            ]
        )
        if self.person is not None:
            self.person.answer_all(self.store, self.who)
        standing = self._standing()
        answered = set(standing.loc[standing["cycle"] == cycle, "image"])
        waiting = [row for row in rows if self.images.ids[row] not in answered]
        if waiting:
            raise Unanswered(
                f"{len(waiting)} questions wait in {self.store.path}: answer them at the page, then run this again"
            )
        given = self.store.labels()
        unsure = _last_unknown(standing, {cycle})
        said = [row for row in rows if self.images.ids[row] not in unsure]
        self._given.update({row: given[self.images.ids[row]] for row in said})
        return np.array([row in self._given for row in rows], dtype=bool)

    def _standing(self) -> pd.DataFrame:
        """Answers that nobody took back, in their order."""
        history = self.store.history()
        return history[~history["undone"] & history["action"].isin(["label", "unknown"])]

    def unsure(self, cycles: Iterable[int]) -> set[str]:
        """Images whose last word in these cycles is that nobody can say."""
        return _last_unknown(self._standing(), cycles)

    def refresh(self) -> None:
        """Take in answers that were given again (label errors that were found and asked once more)."""
        given = self.store.labels()
        self._given = {row: given[self.images.ids[row]] for row in self._given}

    def labels_of(self, index: np.ndarray) -> Labels:
        """Labels of answered rows, letterboxed; any other raises."""
        unknown = [int(row) for row in index if int(row) not in self._given]
        if unknown:
            raise ValueError(f"labels of images {unknown[:5]} were not given: the store has no answer to them")
        given = [self._given[int(row)] for row in index]
        named = given if self.task == "classes" else [one["class"] for drawn in given for one in drawn]
        new = sorted(set(named) - set(self._number))
        if new:
            raise ValueError(
                f"class {new[0]!r} was added in {self.store.path}, but the data set knows {', '.join(self._number)}; "
                "give it a folder (or a label) of its own there, and begin a new run"
            )
        height, width = self.images.image_size
        if self.task == "classes":
            classes = torch.tensor([self._number[name] for name in given], dtype=torch.int64).reshape(-1, 1)
            boxes = torch.tensor([0.0, 0.0, width, height]).repeat(len(given), 1, 1)
        else:
            most = max((len(drawn) for drawn in given), default=0)
            boxes = torch.zeros(len(given), most, 4)
            classes = torch.zeros(len(given), most, dtype=torch.int64)
            for i, drawn in enumerate(given):
                for j, one in enumerate(drawn):
                    boxes[i, j], classes[i, j] = torch.tensor(one["box"]), self._number[one["class"]]
            sizes = self.images.sizes[torch.as_tensor(np.asarray(index), dtype=torch.int64)]
            if most:
                boxes = letterbox_boxes(boxes, sizes, (height, width)) * (classes > 0)[..., None]
        never = torch.zeros_like(classes, dtype=torch.bool)
        return Labels(boxes, classes, never, never.clone())

    def bill(self, index: np.ndarray) -> Bill:
        """Images, boxes (of classes: one an image) and the seconds that the store says these answers took.

        Time spent on images that nobody could label stands in the store's history and on no bill.
        """
        labels = self.labels_of(index)
        seconds = self._standing().groupby("image")["seconds"].sum()
        spent = sum(seconds.get(self.images.ids[int(row)], 0.0) for row in index)
        return Bill(len(index), int((labels.classes > 0).sum()), float(spent))


def _last_unknown(standing: pd.DataFrame, cycles: Iterable[int]) -> set[str]:
    last = standing[standing["cycle"].isin(list(cycles))].groupby("image")["action"].last()
    return set(last[last == "unknown"].index)


def truth_of(train: Dataset, task: str) -> dict[str, str | list[dict]]:
    """Image id -> class name, or boxes in pixels of the original image: what a simulated person knows.

    Objects to be ignored (difficult, too small) or with a side below 1 pixel are left out: nobody would draw them.
    """
    labels, names = train.labels, train.class_names
    if task == "classes":
        return {id_: names[int(c) - 1] for id_, c in zip(train.images.ids, labels.classes[:, 0], strict=True)}
    original = to_original(labels.boxes, train.images.sizes, train.images.image_size) if labels.boxes.shape[1] else None
    found = {}
    for i, id_ in enumerate(train.images.ids):
        height, width = train.images.sizes[i].tolist()
        rows = torch.nonzero(labels.valid[i])[:, 0].tolist()
        drawn = [(names[int(labels.classes[i, j]) - 1], _inside(original[i, j].tolist(), width, height)) for j in rows]
        found[id_] = [{"class": c, "box": b} for c, b in drawn if b[2] - b[0] >= 1 and b[3] - b[1] >= 1]
    return found


def _inside(box: Sequence[float], width: int, height: int) -> list[float]:
    x1, y1, x2, y2 = box
    return [max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)]


def answers(
    run: record.Run, train: Dataset, person: Person | None = None, task: str = "boxes", who: str = PERSON
) -> Answers:
    """The store of this run (`labels.sqlite` in its folder) and who answers there."""
    run.folder.mkdir(parents=True, exist_ok=True)
    store = labelling.Store(run.folder / "labels.sqlite", train.class_names, task)
    return Answers(store, train.images, train.class_names, task, person, strategy=run.method, who=who)


def simulated(run: record.Run, train: Dataset, task: str = "boxes") -> labelling.Simulated:
    """A person who knows the truth, errs as often as `config.annotator_error`, and takes its seconds."""
    config = run.config
    return labelling.Simulated(
        truth_of(train, task),
        config.flywheel.annotator_error,
        config.query.seconds_per_image,
        config.query.seconds_per_box,
        run.seed,
    )


def items(given: Answers) -> list[exchange.Item]:
    """What has been collected, to be written as COCO, YOLO, VOC or CSV (`exchange`), in the order of the images."""
    labels, images = given.store.labels(), given.images
    found = []
    for i, id_ in enumerate(images.ids):
        if id_ in labels:
            label = labels[id_]
            if given.task == "boxes":
                label = [exchange.Box(one["class"], *one["box"]) for one in label]
            found.append(exchange.Item(id_, None, tuple(images.sizes[i].tolist()), label))
    return found


def from_items(found: Iterable[exchange.Item]) -> dict[str, str | list[dict]]:
    """Finished labels (`exchange.read_coco`, `exchange.read_label_studio`, ...) as what a `labelling.Simulated` knows.

    With it as the person of `answers`, the loop takes in what was labelled elsewhere, through the same store.
    """
    return {
        item.image: item.label
        if isinstance(item.label, str)
        else [{"class": box.name, "box": [box.x1, box.y1, box.x2, box.y2]} for box in item.label]
        for item in found
    }


def pictures(images: Images, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Image id -> uint8 (H, W, 3) of its original size, for the page, of sets that have no files of their own."""
    rows = {id_: i for i, id_ in enumerate(images.ids)}
    found = {}
    for id_ in ids:
        row = rows[id_]
        inner, offset = letterbox_fit(images.sizes[row : row + 1], images.image_size)
        (height, width), (top, left) = inner[0].tolist(), offset[0].tolist()
        pixels = images.batch([row])[:, :, top : top + height, left : left + width].float()
        size = tuple(images.sizes[row].tolist())
        if size != (height, width):
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        found[id_] = pixels[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
    return found


# --------------------------------------------------------------------------------------------------- the wheel: classes


@dataclass(frozen=True)
class Study:
    """What all runs of one setting share: both sets, and their features (N, D), standardised by the training set's."""

    config: Config
    train: Dataset
    test: Dataset
    features: Tensor
    test_features: Tensor

    @property
    def name(self) -> str:
        return alfl.short_name(self.config.data.dataset)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names


def prepare(config: Config, root: str | Path | None = None, device: str | torch.device | None = None) -> Study:
    """Load the sets and run the frozen backbone over them once; its features are kept on disk.

    root: where data sets lie, see `data.data_root`.
    """
    train, test = class_sets.load(
        config.data.dataset, config.data.image_size, root=alfl.data_place(root), limit=config.data.limit
    )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = ("dataset", "image_size", "limit", "feature_side", "feature_model")
    key = Config.of(**{name: config.flat()[name] for name in names})

    def make() -> dict:
        return {
            part.name: embedded(part.images, config.flywheel.feature_side, device, model=config.flywheel.feature_model)
            for part in (train, test)
        }

    kept = record.shared(key, "shared", 0, "features", make)
    if any(len(kept.get(part.name, ())) != len(part) for part in (train, test)):  # another folder of the same name
        kept = make()
    mean, spread = kept[train.name].mean(0), kept[train.name].std(0).clamp(min=1e-6)
    features, test_features = ((kept[part.name] - mean) / spread for part in (train, test))
    return Study(config, train, test, features, test_features)


@torch.inference_mode()
def embedded(
    images: Images, side: int, device: str | torch.device = "cpu", batch: int = 16, model: str = "lite0"
) -> Tensor:
    """(N, D) what a pretrained network makes of images scaled to `side` pixels, before its classifier."""
    net = Embedder(model, side).to(device).eval()
    chunks = [range(start, min(start + batch, len(images))) for start in range(0, len(images), batch)]
    parts = [net(pixels).float().cpu() for pixels in images.batches(chunks, device)]
    return torch.cat(parts) if parts else torch.zeros(0, net.width)


@dataclass(frozen=True)
class Linear:
    """Multinomial logistic regression on features; classes without a labelled image are as unlikely as can be.

    weight (C, D), bias (C,); seen (C,) bool: classes that it was trained on.
    """

    weight: Tensor
    bias: Tensor
    seen: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """(N, C) class scores before the softmax; 0 for unseen classes."""
        return features.double() @ self.weight.T + self.bias

    def log_probs(self, features: Tensor) -> Tensor:
        """(N, C) log-probabilities, `LEAST` at least."""
        return self.scores(features).masked_fill(~self.seen, -torch.inf).log_softmax(1).clamp(min=LEAST)


def fit_linear(features: Tensor, classes: Tensor, count: int, regularisation: float = 0.1) -> Linear:
    """Train on labelled features (L, D) of classes (L,) 0..count-1, from nothing: scikit-learn's, L2-penalised.

    regularisation: its `C`, the inverse of the penalty. One class alone is predicted for everything.
    """
    from sklearn.linear_model import LogisticRegression

    if not len(classes):
        raise ValueError("a classifier needs one labelled image at least, got none")
    weight, bias = torch.zeros(count, features.shape[1], dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    found = torch.unique(classes)
    if len(found) > 1:
        model = LogisticRegression(C=regularisation, max_iter=500).fit(features.double().numpy(), classes.numpy())
        coefficients, intercept = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(found) == 2:  # one row there: the second class's
            coefficients = torch.cat([torch.zeros_like(coefficients), coefficients])
            intercept = torch.cat([torch.zeros_like(intercept), intercept])
        weight[found], bias[found] = coefficients.double(), intercept.double()
    seen = torch.zeros(count, dtype=torch.bool)
    seen[found] = True
    return Linear(weight, bias, seen)


def out_of_fold(
    features: Tensor, classes: Tensor, count: int, rng: np.random.Generator, regularisation: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Class scores and log-probabilities (L, C) of labelled images by models that were not trained on them.

    `FOLDS` parts in turn; one labelled image alone is judged by the model that it made.
    """
    scores = torch.zeros(len(classes), count, dtype=torch.float64)
    logs = torch.zeros_like(scores)
    order = rng.permutation(len(classes))
    for part in np.array_split(order, min(FOLDS, len(order))):
        rest = np.setdiff1d(order, part) if len(order) > 1 else order
        model = fit_linear(features[rest], classes[rest], count, regularisation)
        scores[part], logs[part] = model.scores(features[part]), model.log_probs(features[part])
    return scores, logs


@dataclass
class Wheel:
    """A run's moving parts: the pool, who answers, the classifier trained last, and what `out_of_fold` says."""

    pool: Pool
    answers: Answers
    model: Linear | None = None
    held_out: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def known(self) -> tuple[np.ndarray, Tensor]:
        """Rows of the labelled images, and their classes from 0."""
        rows = self.pool.index[self.pool.labelled()]
        return rows, self.answers.labels_of(rows).classes[:, 0] - 1


def plan(config: Config, method: str) -> list[tuple[int, int]]:
    """One round a cycle, for `record.runs`."""
    return [(cycle, 0) for cycle in range(config.query.cycles)]


def start(run: record.Run, study: Study, person: Person | None = None) -> Wheel:
    """The pool with nothing labelled, or as a broken run left it. person: None = a human at the page."""
    given = answers(run, study.train, person, "classes")
    wheel = Wheel(Pool(PERSON, study.train.images, given, range(len(study.train))), given)
    wheel.pool.replay(run.query_rows())
    wheel.pool.set_aside(given.unsure({cycle for cycle, _ in run.plan[: run.committed]}))
    if run.committed:
        learn(run, study, wheel, run.plan[run.committed - 1][0])
    return wheel


def ask(run: record.Run, study: Study, wheel: Wheel, cycle: int) -> None:
    """Have the next images labelled: in cycle 0 `first` at random, later `budget` by the run's way of asking."""
    config, pool = run.config, wheel.pool
    waiting = pool.unlabelled()
    count = min(config.query.initial_labels if cycle == 0 else config.query.query_size, len(waiting))
    if count == 0:
        return
    strategy, rng = "random" if cycle == 0 else run.method, run.rng("ask", PERSON, cycle)
    wheel.answers.strategy = strategy
    choice = choose(strategy, study, wheel, pool.index[waiting], count, rng)
    why = np.where(choice.scores.scored, choice.scores.values, np.nan)[choice.positions]
    if wheel.model is not None:
        rows = pool.index[waiting[choice.positions]]
        said = wheel.model.log_probs(study.features[rows]).argmax(1).tolist()
        wheel.answers.suggestions = {int(row): study.class_names[c] for row, c in zip(rows, said, strict=True)}
        wheel.answers.model = f"linear, cycle {cycle}"
    pool.ask(waiting[choice.positions], cycle, why)


def choose(strategy: str, study: Study, wheel: Wheel, rows: np.ndarray, k: int, rng: np.random.Generator) -> Choice:
    """Positions among `rows` of the k images to ask next, by a name of `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if strategy == "random":
        scores = sampling.random(len(rows), rng)
        return Choice(sampling.top_k(scores, k, rng), scores)
    features, known = study.features[rows], study.features[wheel.known()[0]]
    none = Scores(np.zeros(len(rows)), np.zeros(len(rows), dtype=bool))
    if strategy in MIXES:

        def part(name: str, left: np.ndarray, count: int) -> np.ndarray:
            return left[choose(name, study, wheel, rows[left], count, rng).positions]

        return Choice(sampling.combination(MIXES[strategy], part, k, len(rows)), none)
    if strategy == "cluster":
        return Choice(sampling.cluster(features, k, rng), none)
    if strategy == "coreset":
        positions, distances = sampling.k_center(features, known, k, rng)
        return Choice(positions, Scores(distances, ~none.scored))
    if strategy == "representative":
        return sampling.representative(features, known, k, rng)
    if strategy == "embedding_outlier":
        scores = sampling.embedding_outlier(features, known)
    elif strategy == "model_outlier":
        # Class by class among held-out images of that class. Among all of them, as in active-vision, a sure image is
        # low in every class but one, so the lowest mean rank would be the surest image's.
        scores = sampling.model_outlier(wheel.model.scores(features), wheel.held_out[0], wheel.known()[1])
    else:
        scores = sampling.uncertainty(wheel.model.log_probs(features), strategy)
    return Choice(sampling.top_k(scores, k, rng), scores)


def learn(run: record.Run, study: Study, wheel: Wheel, cycle: int) -> Linear:
    """Train the classifier on all labels so far, from nothing, and note what it says of labels it has not seen."""
    rows, classes = wheel.known()
    count, strength = len(study.class_names), run.config.flywheel.regularisation
    wheel.model = fit_linear(study.features[rows], classes, count, strength)
    rng = run.rng("folds", cycle)
    wheel.held_out = out_of_fold(study.features[rows], classes, count, rng, strength)
    return wheel.model


def commit(run: record.Run, study: Study, wheel: Wheel, cycle: int) -> dict:
    """End of a cycle: judge on the test set, write the row and the questions, save the resume point."""
    bill = wheel.pool.bill()
    truth = study.test.labels.classes[:, 0] - 1
    row = {
        "cycle": cycle,
        "round": 0,
        "client": "server",
        "images": bill.images,
        "boxes": bill.boxes,
        "seconds": bill.seconds,
        "bytes_up": 0,
        "bytes_down": 0,
        "steps": 0,
        **metrics.accuracy(wheel.model.log_probs(study.test_features), truth, study.class_names),
    }
    state = {"weight": wheel.model.weight, "bias": wheel.model.bias, "seen": wheel.model.seen}
    run.commit(cycle, 0, [row], wheel.pool.asked_rows(cycle), state)
    return row


# ------------------------------------------------------------------------------------------------- when to stop, errors


def stopping(table: pd.DataFrame, y: str, goal: float, budget: int, plateau: float = 0.0) -> pd.DataFrame:
    """Where each rule would have ended the labelling: columns method, rule, images, value (of y there).

    table: of `record.table`, several seeds. goal: the mean over seeds reaches it. budget: so many images. plateau: the
    95 % interval of the gain over the last cycle, paired by seed, lies below this many points (100 x y): the last
    labels bought less than that. A rule that never strikes has no images. The evaluation set decides here, as in
    active-vision: a number that stops a loop is not a fair report of it.
    """
    ends = metrics.cycle_ends(table)
    found = []
    for method, runs in ends.groupby("method", sort=False):
        wide = runs.pivot(index="cycle", columns="seed", values=y).dropna(axis=1)
        images = runs.groupby("cycle")["images"].mean()
        mean = wide.mean(axis=1)
        gains = [
            metrics.paired_test(100 * wide.loc[cycle], 100 * wide.loc[before])
            for before, cycle in zip(wide.index, wide.index[1:], strict=False)
        ]
        strikes = {
            "goal": [cycle for cycle in wide.index if mean[cycle] >= goal],
            "query_size": [cycle for cycle in wide.index if images[cycle] >= budget],
            "plateau": [
                cycle
                for cycle, gain in zip(wide.index[1:], gains, strict=True)
                if (gain["difference"] if math.isnan(gain["high"]) else gain["high"]) < plateau
            ],
        }
        for rule, cycles in strikes.items():
            at = cycles[0] if cycles else None
            found.append(
                {
                    "method": method,
                    "rule": rule,
                    "images": math.nan if at is None else float(images[at]),
                    "value": math.nan if at is None else float(mean[at]),
                }
            )
    return pd.DataFrame(found, columns=["method", "rule", "images", "value"])


def suspects(held_out: Tensor, classes: Tensor) -> Scores:
    """How likely each given label is wrong, 0 .. 1: 1 - the probability that models which did not see it give it.

    held_out (L, C) log-probabilities of `out_of_fold`, classes (L,) as given. Self-confidence of confident learning
    (Northcutt et al. 2021, 1911.00068).
    """
    if len(held_out) != len(classes):
        raise ValueError(f"one label for each of {len(held_out)} rows is needed, got {len(classes)}")
    given = held_out.gather(1, classes[:, None])[:, 0].exp()
    return Scores((1 - given).numpy(), np.ones(len(classes), dtype=bool))


def ask_again(
    wheel: Wheel, positions: np.ndarray, person: Person | None, cycle: int, who: str = "checker"
) -> pd.DataFrame:
    """Have given labels (places in `Wheel.known`) looked at once more, by somebody else; the last word counts.

    Returns image, before, after. The questions go through the same store, under the strategy "label errors".
    """
    rows, classes = wheel.known()
    history = wheel.answers.store.history()
    first = history[(history["cycle"] == cycle) & (history["strategy"] != ERRORS)]
    if first["image"].isin([wheel.answers.images.ids[int(row)] for row in rows[positions]]).any():
        raise ValueError(f"these images were first asked in cycle {cycle}: ask again in a later one")
    names = [wheel.answers.store.classes[int(c)] for c in classes[positions]]
    other = replace_asker(wheel.answers, person, who)
    other.ask(rows[positions], cycle)
    wheel.answers.refresh()
    after = wheel.known()[1][positions]
    return pd.DataFrame(
        {
            "image": [wheel.pool.ids[int(row)] for row in rows[positions]],
            "before": names,
            "after": [wheel.answers.store.classes[int(c)] for c in after],
        }
    )


def replace_asker(given: Answers, person: Person | None, who: str) -> Answers:
    """The same store, asked in somebody else's name."""
    other = Answers(given.store, given.images, given.store.classes, given.task, person, ERRORS, who)
    other._given = dict(given._given)
    return other


def label_errors(study: Study, seeds: Sequence[int], labels: int, error: float, again: int) -> pd.DataFrame:
    """Does it pay to ask again? `labels` random images, a share `error` of them wrong; `again` are looked at once more.

    One row a seed: wrong (share of wrong labels), found (share of wrong ones among the `again` suspects; `wrong` is
    what picking at random would find), and accuracy on the test set with the labels as given, after the suspects were
    corrected, after as many random ones were, and with `again` more labels in their place (the same person, the same
    error), which cost as much.
    """
    config, rows_out = study.config, []
    truth = truth_of(study.train, "classes")
    test = study.test.labels.classes[:, 0] - 1
    true = (study.train.labels.classes[:, 0] - 1).numpy()
    for seed in seeds:
        rng = seeding.rng_for(seed, "label errors")
        person = labelling.Simulated(truth, error, config.query.seconds_per_image, 0.0, seed)
        checker = labelling.Simulated(truth, 0.0, config.query.seconds_per_image, 0.0, seed)
        with tempfile.TemporaryDirectory() as folder:

            def wheel_of(name: str, folder: str = folder, person: Person = person) -> Wheel:
                store = labelling.Store(Path(folder) / f"{name}.sqlite", study.class_names, "classes")
                given = Answers(store, study.train.images, study.class_names, "classes", person, "random")
                return Wheel(Pool(PERSON, study.train.images, given, range(len(study.train))), given)

            def judged(wheel: Wheel) -> float:
                rows, classes = wheel.known()
                model = fit_linear(
                    study.features[rows], classes, len(study.class_names), config.flywheel.regularisation
                )
                return metrics.accuracy(model.log_probs(study.test_features), test, study.class_names)["accuracy"]

            wheels = {name: wheel_of(name) for name in ("suspects", "random", "more")}
            order = rng.permutation(len(study.train))
            for name, wheel in wheels.items():
                wheel.pool.ask(order[: labels + (again if name == "more" else 0)], 0)
            rows, classes = wheels["suspects"].known()
            wrong = classes.numpy() != true[rows]
            before = judged(wheels["suspects"])
            _, logs = out_of_fold(
                study.features[rows], classes, len(study.class_names), rng, config.flywheel.regularisation
            )
            picked = sampling.top_k(suspects(logs, classes), again, rng)
            ask_again(wheels["suspects"], picked, checker, 1)
            ask_again(wheels["random"], rng.permutation(len(rows))[:again], checker, 1)
            rows_out.append(
                {
                    "seed": seed,
                    "wrong": float(wrong.mean()),
                    "found": float(wrong[picked].mean()),
                    "as given": before,
                    "suspects corrected": judged(wheels["suspects"]),
                    "random ones corrected": judged(wheels["random"]),
                    "as many more labels": judged(wheels["more"]),
                }
            )
            for wheel in wheels.values():
                wheel.answers.store.close()
    return pd.DataFrame(rows_out)
