"""A person in the common loop: no answer is lost or asked for twice, however often the loop is broken off."""

import math

import pandas as pd
import pytest
import torch

from fedal_utils import federation, labelling, papers, record
from fedal_utils.data import Dataset, Images, Labels
from fedal_utils.federation import Setup
from fedal_utils.labelling import Store
from fedal_utils.sampling import Unanswered
from fedal_utils.training import CachedImages

NAMES = ("ant", "bee", "cow", "dog")
SMALL = dict(initial_labels=9, query_size=6, cycles=3, methods=("margin",), seeds=(0,), seconds_per_box=0.0)
CPU = torch.device("cpu")


def dataset(name: str, classes: torch.Tensor, features: torch.Tensor | None = None) -> Dataset:
    """Black images of these classes, counted from 0, or cached features in their place."""
    count = len(classes)
    ids, sizes = tuple(f"{name}/{i:04d}.png" for i in range(count)), torch.tensor([[20, 10]] * count)
    images = Images(ids, torch.zeros(count, 3, 8, 8, dtype=torch.uint8), sizes)
    if features is not None:
        images = CachedImages(ids, (features,), None, sizes, (8, 8), None)
    no = torch.zeros(count, 1, dtype=torch.bool)
    labels = Labels(torch.tensor([0.0, 0, 8, 8]).repeat(count, 1, 1), classes[:, None] + 1, no, no.clone())
    return Dataset(name, images, labels, NAMES)


def setup_of(count: int = 60, **changes) -> Setup:
    """Four heaps of features, and as many in the test set."""
    rng = torch.Generator().manual_seed(0)
    centres, sets = 3 * torch.randn(4, 6, generator=rng), []
    for name, size in (("train", count), ("test", 40)):
        classes = torch.arange(size) % 4
        sets.append((name, classes, centres[classes] + torch.randn(size, 6, generator=rng)))
    config = papers.load("50_flywheel", "smoke", **{**SMALL, **changes})
    train, test = (dataset(*one) for one in sets)
    return Setup(config, train, test, tuple(dataset(*one[:2]) for one in sets), CPU)


class BrokenOff(Exception):
    """The loop ended where it was told to."""


def loop(root, setup, annotator=labelling.simulated, task="classes", commits=None, queried=None):
    """All methods as the notebook runs them. annotator: (run, train, task) -> who answers at a store; None: an Oracle.

    commits, queried: break off when so many cycles are committed, or have been queried.
    """
    for run in federation.runs(setup, "wheel", root=root):
        oracle = None
        if annotator is not None:
            oracle = labelling.oracle_of(run, setup.train, annotator(run, setup.photos[0], task), task)
        experiment = federation.start(run, setup, oracle)
        for step in experiment.steps():
            if run.committed == commits:
                raise BrokenOff
            for client in step.querying:
                experiment.query(step, client)
            if step.cycle + 1 == queried:
                raise BrokenOff
            updates = experiment.train(step)
            experiment.aggregate(step, updates)
            experiment.log(step, updates)


def results(root) -> dict[str, bytes]:
    names = ("rounds.csv", "queries.csv")
    found = {p.relative_to(root).as_posix(): p.read_bytes() for name in names for p in root.rglob(name)}
    assert found
    return found


def history(root) -> pd.DataFrame:
    (path,) = root.rglob("labels.sqlite")
    with Store(path) as store:
        return store.history()


class Human:
    """Goes through the questions one by one: another time each, and at some images nothing but a shrug."""

    def __init__(self, setup: Setup, shrugs=()):
        self.truth, self.shrugs = labelling.truth_of(setup.photos[0], "classes"), set(shrugs)

    def answer_all(self, store, who, most=math.inf):
        while most and (question := store.next(who)) is not None:
            if question.image in self.shrugs:
                store.unknown(who, question.image, seconds=5.5)
            else:
                spent = 1.25 + int(question.image[6:10]) / 8
                store.answer(who, question.image, self.truth[question.image], seconds=spent)
            most -= 1


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root, setup = tmp_path_factory.mktemp("unbroken"), setup_of(methods=("mix_diverse",), annotator_error=0.2)
    loop(root, setup)
    return root, setup


def test_a_simulated_annotator_without_error_is_a_plain_oracle(tmp_path):
    setup = setup_of(methods=("random", "margin", "model_outlier", "mix_diverse"))
    loop(tmp_path / "person", setup)
    loop(tmp_path / "oracle", setup, None)
    assert results(tmp_path / "person") == results(tmp_path / "oracle")
    queries = record.queries(setup.config, "wheel", root=tmp_path / "person")
    assert not queries.duplicated(["method", "id"]).any()
    first = queries[queries["cycle"] == 0].groupby("method")["id"].apply(tuple)
    assert len(first) == 4 and len(set(first)) == 1  # all methods begin alike


def test_sessions_at_the_page_are_the_same_run_and_tell_why_they_ask(tmp_path):
    setup = setup_of()
    loop(tmp_path / "all known", setup, lambda *_: Human(setup))
    asked = record.queries(setup.config, "wheel", root=tmp_path / "all known")
    shrugs = asked.groupby("cycle").head(2)["id"].tolist()
    loop(tmp_path / "at once", setup, lambda *_: Human(setup, shrugs))
    for _ in range(3):  # the notebook is run from its top, with somebody at the page in between, once a cycle
        with pytest.raises(Unanswered):
            loop(tmp_path / "sessions", setup, lambda *_: None)
        (path,) = (tmp_path / "sessions").rglob("labels.sqlite")
        with Store(path) as store:
            Human(setup, shrugs).answer_all(store, "Ann", most=4)  # who leaves in the middle
            Human(setup, shrugs).answer_all(store, "Bob")
    loop(tmp_path / "sessions", setup, lambda *_: None)
    assert results(tmp_path / "sessions") == results(tmp_path / "at once")
    rows = history(tmp_path / "sessions")
    assert set(rows["who"]) == {"Ann", "Bob"} and not rows["image"].duplicated().any() and len(rows) == 21
    nobody = set(rows[rows["action"] == "unknown"]["image"])
    assert len(nobody) > 2 and nobody <= set(shrugs)
    assert set(rows["strategy"]) == {"margin"} and rows["score"][rows["cycle"] > 0].notna().all()
    table = record.table(setup.config, "wheel", root=tmp_path / "sessions")
    (cost,) = table.query("client == 'server'").tail(1).seconds
    assert cost == pytest.approx(rows[rows["action"] == "label"]["seconds"].sum())


@pytest.mark.parametrize("where", [dict(commits=0), dict(commits=2), dict(queried=1), dict(queried=3)])
def test_broken_off_and_resumed_gives_the_same_bytes_and_asks_nobody_twice(unbroken, tmp_path, where):
    root, setup = unbroken
    with pytest.raises(BrokenOff):
        loop(tmp_path, setup, **where)
    before = history(tmp_path)
    loop(tmp_path, setup)
    assert results(tmp_path) == results(root)
    after, whole = history(tmp_path), history(root)
    told = ["image", "cycle", "action", "label", "strategy", "score", "seconds"]
    pd.testing.assert_frame_equal(after[told], whole[told])  # nothing was asked, or answered, twice
    assert after["when"].tolist()[: len(before)] == before["when"].tolist()


TINY = {
    **dict(detector="ssd", digit_classes=3, scenes=(40, 4), initial_model_images=4, initial_model_iterations=2),
    **dict(held_out_images=4, clients=2, initial_labels=4, query_size=3, cycles=2, rounds=1, iterations=3, batch=4),
    **dict(score_above=0.02, methods=("entropy_avg",), seeds=(0,), threads=1),
}


def test_boxes_from_a_simulated_annotator_are_those_of_an_oracle(tmp_path):
    scenes = federation.prepare(papers.load("50b", "smoke", "digits", **TINY), device="cpu")
    assert not scenes.train.labels.ignore.any()
    loop(tmp_path / "person", scenes, labelling.simulated, "boxes")
    loop(tmp_path / "oracle", scenes, None)
    tables = [record.table(scenes.config, "wheel", root=tmp_path / who) for who in ("person", "oracle")]
    cost = ["method", "cycle", "client", "images", "boxes", "seconds"]
    pd.testing.assert_frame_equal(tables[0][cost], tables[1][cost])
    assert tables[0]["boxes"].max() > 20
    queries = [record.queries(scenes.config, "wheel", root=tmp_path / who) for who in ("person", "oracle")]
    which = ["method", "cycle", "client", "id"]
    assert queries[0][which].equals(queries[1][which]) and len(queries[0]) == 2 * 7
    with pytest.raises(BrokenOff):
        loop(tmp_path / "broken", scenes, labelling.simulated, "boxes", queried=2)
    loop(tmp_path / "broken", scenes, labelling.simulated, "boxes")
    assert results(tmp_path / "broken") == results(tmp_path / "person")
