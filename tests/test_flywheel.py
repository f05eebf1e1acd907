"""The labelling flywheel: who answers, what is asked, that no answer is lost or asked twice; features stand in."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from fedal_utils.papers.flywheel import LEAST, MIXES, STRATEGIES, Answers, Unanswered, Wheel
from sklearn.linear_model import LogisticRegression

from fedal_utils import config, papers, record
from fedal_utils.data import Dataset, Images, Labels, boxes, exchange
from fedal_utils.federation import experiment as alfl
from fedal_utils.labelling import page as labelling
from fedal_utils.papers import flywheel
from fedal_utils.sampling import strategies as sampling
from fedal_utils.sampling.pool import SET_ASIDE, Bill, Oracle, Pool
from fedal_utils.seeding import rng_for, torch_rng_for

NAMES = ("ant", "bee", "cow", "dog")
SMALL = dict(initial_labels=9, query_size=6, cycles=3, methods=("margin",), seeds=(0,), seconds_per_box=0.0)


# ------------------------------------------------------------------------------------------------------------ settings


def whole_images(name: str, classes: torch.Tensor) -> Dataset:
    """Black images of these classes, counted from 0."""
    count = len(classes)
    images = Images(
        tuple(f"{name}/{i:04d}.png" for i in range(count)),
        torch.zeros(count, 3, 8, 8, dtype=torch.uint8),
        torch.tensor([[20, 10]] * count),
    )
    no = torch.zeros(count, 1, dtype=torch.bool)
    labels = Labels(torch.tensor([0.0, 0, 8, 8]).repeat(count, 1, 1), classes[:, None] + 1, no, no.clone())
    return Dataset(name, images, labels, NAMES)


def settings(**changes) -> config.Config:
    return papers.load("50_flywheel", "smoke", **{**SMALL, **changes})


def study_of(count=60, spread=1.0, seed=0, hidden=None, **changes) -> flywheel.Study:
    """Four heaps of features, and as many in the test set; hidden: another order of the training labels."""
    rng = torch_rng_for(seed, "flywheel study")
    classes, test_classes = torch.arange(count) % 4, torch.arange(40) % 4
    centres = 3 * torch.randn(4, 6, generator=rng)
    features = centres[classes] + spread * torch.randn(count, 6, generator=rng)
    test_features = centres[test_classes] + spread * torch.randn(40, 6, generator=rng)
    train = whole_images("train", classes if hidden is None else classes[hidden])
    return flywheel.Study(settings(**changes), train, whole_images("test", test_classes), features, test_features)


class BrokenOff(Exception):
    """The loop ended where it was told to."""


def loop(root, study, person=flywheel.simulated, plain=False, commits=None, asked=None, watch=None):
    """All methods as notebook 50 runs them. person: (run, train, task) -> who answers; plain: a `pool.Oracle` does.

    commits, asked: break off when so many cycles are committed, or have been asked. Returns the last wheel.
    """
    wheel = None
    for run in record.runs(study.config, "wheel", root=root, plan=flywheel.plan, progress=False):
        someone = person(run, study.train, "classes") if person else None
        wheel = with_oracle(study) if plain else flywheel.start(run, study, someone)
        for cycle, _ in run.rounds():
            if run.committed == commits:
                raise BrokenOff
            flywheel.ask(run, study, wheel, cycle)
            if cycle + 1 == asked:
                raise BrokenOff
            flywheel.learn(run, study, wheel, cycle)
            flywheel.commit(run, study, wheel, cycle)
            if watch:
                watch(run, wheel, cycle)
    return wheel


class Plain(Oracle):
    """Ground truth where a wheel expects `Answers`."""

    model, suggestions = "", {}


def with_oracle(study) -> Wheel:
    oracle = Plain(study.train.labels, study.config.query.seconds_per_image, study.config.query.seconds_per_box)
    return Wheel(Pool(flywheel.PERSON, study.train.images, oracle, range(len(study.train))), oracle)


def results(root) -> dict[str, bytes]:
    found = {
        p.relative_to(root).as_posix(): p.read_bytes() for n in ("rounds", "asked") for p in root.rglob(f"{n}.csv")
    }
    assert found
    return found


def history(root, task="classes") -> pd.DataFrame:
    (path,) = root.rglob("labels.sqlite")
    with labelling.Store(path, task=task) as store:
        return store.history()


def a_run(root, study, method="margin") -> record.Run:
    """A run's name and place, for what needs no commits."""
    return record.Run(study.config, "wheel", method, 0, root, flywheel.plan)


class Human:
    """Goes through the questions one by one: another time each, and at some images nothing but a shrug."""

    def __init__(self, study, shrugs=()):
        self.truth, self.shrugs = flywheel.truth_of(study.train, "classes"), set(shrugs)

    def answer_all(self, store, who, most=math.inf):
        done = 0
        while done < most and (question := store.next(who)) is not None:
            if question.image in self.shrugs:
                store.unknown(who, question.image, 5.5)
            else:
                store.answer(who, question.image, self.truth[question.image], 1.25 + int(question.image[6:10]) / 8)
            done += 1
        return done


# ------------------------------------------------------------------------------------------------ the linear classifier


@pytest.mark.parametrize("present", [(0, 1, 2), (1, 3)])
def test_the_classifier_is_scikit_learns(present):
    rng = torch_rng_for(0, "linear")
    classes = torch.tensor(present).repeat(14)
    features = torch.randn(len(classes), 5, generator=rng) + classes[:, None]
    new = torch.randn(9, 5, generator=rng)
    model = flywheel.fit_linear(features, classes, 4, 0.3)
    logs = model.log_probs(new)
    theirs = LogisticRegression(C=0.3, max_iter=500).fit(features.double().numpy(), classes.numpy())
    assert logs[:, list(present)].numpy() == pytest.approx(theirs.predict_log_proba(new.double().numpy()), abs=1e-9)
    absent = [c for c in range(4) if c not in present]
    assert (logs[:, absent] == LEAST).all() and (model.scores(new)[:, absent] == 0).all()
    assert model.seen.tolist() == [c in present for c in range(4)]
    assert model.scores(new).log_softmax(1).shape == logs.shape == (9, 4)
    other = flywheel.fit_linear(features, classes, 4, 30.0)
    assert not torch.allclose(other.log_probs(new), logs)  # the penalty counts


def test_one_class_alone_is_predicted_for_everything_and_no_label_is_an_error():
    model = flywheel.fit_linear(torch.randn(3, 5, generator=torch_rng_for(0, "one")), torch.tensor([2, 2, 2]), 4)
    logs = model.log_probs(100 * torch.randn(6, 5, generator=torch_rng_for(1, "one")))
    assert logs.tolist() == [[LEAST, LEAST, 0.0, LEAST]] * 6
    with pytest.raises(ValueError, match="one labelled image at least, got none"):
        flywheel.fit_linear(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 4)


def test_a_far_away_image_is_not_less_likely_than_can_be():
    features = torch.tensor([[-1.0], [1.0], [-2.0], [2.0]])
    model = flywheel.fit_linear(features, torch.tensor([0, 1, 0, 1]), 2)
    logs = model.log_probs(torch.tensor([[1e6], [-1e6]]))
    assert logs.tolist() == [[LEAST, 0.0], [0.0, LEAST]]


@pytest.mark.parametrize(("count", "parts"), [(23, 5), (3, 3), (1, 1)])
def test_held_out_labels_are_judged_by_models_that_did_not_see_them(monkeypatch, count, parts):
    features = torch.arange(float(count))[:, None].repeat(1, 2)  # a row's first feature is its number
    classes, taught = torch.arange(count) % 3, []
    fit = flywheel.fit_linear

    def spied(rows, given, total, regularisation=0.1):
        numbers = rows[:, 0].long()
        assert torch.equal(given, classes[numbers]) and total == 4 and regularisation == 0.7
        model = fit(rows, given, total, regularisation)
        taught.append((set(numbers.tolist()), model))
        return model

    monkeypatch.setattr(flywheel, "fit_linear", spied)
    scores, logs = flywheel.out_of_fold(features, classes, 4, rng_for(0, "folds"), 0.7)
    assert len(taught) == parts and scores.shape == logs.shape == (count, 4)
    if count == 1:
        assert taught[0][0] == {0} and logs.tolist() == [[0.0, LEAST, LEAST, LEAST]]
        return
    judges = [[k for k, (seen, _) in enumerate(taught) if i not in seen] for i in range(count)]
    assert all(len(own) == 1 for own in judges)  # each image is left out once
    sizes = [len(seen) for seen, _ in taught]
    assert max(sizes) - min(sizes) <= 1
    for i, (k,) in enumerate(judges):
        model = taught[k][1]
        assert scores[i].numpy() == pytest.approx(model.scores(features[[i]])[0].numpy(), abs=1e-12)
        assert logs[i].numpy() == pytest.approx(model.log_probs(features[[i]])[0].numpy(), abs=1e-12)
    if count == 23:
        again = flywheel.out_of_fold(features, classes, 4, rng_for(1, "folds"), 0.7)[1]
        assert not torch.equal(again, logs)  # the parts are drawn


# ------------------------------------------------------------------------------------------------------- ways of asking


def labelled(study, root, count=16, method="margin") -> tuple[record.Run, Wheel]:
    """A wheel with labels of the first `count` images."""
    run = a_run(root, study, method)
    wheel = flywheel.start(run, study, flywheel.simulated(run, study.train, "classes"))
    wheel.pool.ask(range(count), 0)
    flywheel.learn(run, study, wheel, 0)
    return run, wheel


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A study, a wheel with 16 labels, and both where all other labels are scrambled; nobody changes them."""
    order = torch.cat([torch.arange(16), 16 + torch.from_numpy(rng_for(0, "hidden").permutation(44))])
    study, other = study_of(spread=2.0), study_of(spread=2.0, hidden=order)
    assert not torch.equal(study.train.labels.classes, other.train.labels.classes)
    root = tmp_path_factory.mktemp("taught")
    return study, labelled(study, root / "one")[1], other, labelled(other, root / "other")[1]


def test_a_model_outlier_is_ranked_class_by_class(tmp_path):
    """By hand: three classes, features are class scores; images 0 to 5 are labelled, 6, 7, 8 wait."""
    study = study_of()
    rows = [
        [5, -5, -5],
        [-5, 5, -5],
        [-5, -5, 5],
        [3, -3, -3],
        [-3, 3, -3],
        [-3, -3, 3],
        [9, -9, -9],  # as sure as can be
        [0, 0, 0],  # nothing moves the model
        [4, -4, -4],  # as usual
    ]
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0])
    features = torch.tensor(rows, dtype=torch.float32)
    study = dataclasses.replace(study, train=whole_images("hand", classes), features=features)
    run, wheel = labelled(study, tmp_path, 6)
    identity = torch.cat([torch.eye(3), torch.zeros(1, 3)]).double()  # nobody saw a dog
    wheel.model = flywheel.Linear(identity, torch.zeros(4).double(), torch.tensor([True] * 3 + [False]))
    wheel.held_out = (wheel.model.scores(features[:6]), wheel.model.log_probs(features[:6]))
    choice = flywheel.choose("model_outlier", study, wheel, np.array([6, 7, 8]), 3, rng_for(0, "c"))
    # class 0 among 5 and 3: 9 -> 1, 0 -> 0, 4 -> 1/2; classes 1 and 2: nothing lies below; a dog does not count
    assert choice.scores.values == pytest.approx([2 / 3, 1, 5 / 6], abs=1e-12) and choice.scores.scored.all()
    assert choice.positions.tolist() == [1, 2, 0]
    plain = sampling.model_outlier(features[6:], features[:6]).values  # as in active-vision
    assert plain.argmax() == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_way_of_asking_chooses_each_once_and_knows_no_hidden_label(strategy, taught):
    study, wheel, other, scrambled = taught
    rows = np.arange(16, 60)
    choice = flywheel.choose(strategy, study, wheel, rows, 20, rng_for(0, "c"))
    assert len(set(choice.positions.tolist())) == len(choice.positions) == 20
    assert set(choice.positions.tolist()) <= set(range(44)) and len(choice.scores) == 44
    assert np.isfinite(choice.scores.values).all()
    for again in (
        flywheel.choose(strategy, study, wheel, rows, 20, rng_for(0, "c")),
        flywheel.choose(strategy, other, scrambled, rows, 20, rng_for(0, "c")),
    ):
        assert np.array_equal(again.positions, choice.positions)
        assert np.array_equal(again.scores.values, choice.scores.values)
        assert np.array_equal(again.scores.scored, choice.scores.scored)
    if strategy != "random":  # it does look at the images
        turned = dataclasses.replace(study, features=torch.cat([study.features[:16], study.features[16:].flip(0)]))
        moved = flywheel.choose(strategy, turned, wheel, rows, 20, rng_for(0, "c"))
        assert set(moved.positions.tolist()) != set(choice.positions.tolist())
    assert len(flywheel.choose(strategy, study, wheel, rows, 0, rng_for(0, "c")).positions) == 0
    whole = flywheel.choose(strategy, study, wheel, rows, 44, rng_for(0, "c")).positions
    assert sorted(whole.tolist()) == list(range(44))


def test_ways_of_asking_differ_and_an_unknown_one_is_refused(taught):
    study, wheel, *_ = taught
    asked = {
        name: frozenset(flywheel.choose(name, study, wheel, np.arange(16, 60), 8, rng_for(0, "c")).positions.tolist())
        for name in STRATEGIES
    }
    assert len(set(asked.values())) >= len(STRATEGIES) - 2
    assert set(STRATEGIES) == set(papers.load("50_flywheel").methods)
    with pytest.raises(ValueError, match="strategy must be one of .*'mix_diverse'.*, got 'doubt'"):
        flywheel.choose("doubt", study, wheel, np.arange(16, 60), 8, rng_for(0, "c"))


@pytest.mark.parametrize("name", ["entropy", "margin", "confidence", "ratio"])
def test_uncertainty_is_asked_of_the_model_itself(name, taught):
    study, wheel, *_ = taught
    choice = flywheel.choose(name, study, wheel, np.arange(16, 60), 5, rng_for(0, "c"))
    p = np.sort(wheel.model.log_probs(study.features[16:]).exp().numpy(), axis=1)
    want = {
        "entropy": -(p * np.log(p)).sum(1),
        "margin": 1 - (p[:, -1] - p[:, -2]),
        "confidence": 1 - p[:, -1],
        "ratio": p[:, -2] / p[:, -1],
    }[name]
    assert choice.scores.values == pytest.approx(want, abs=1e-9)
    assert choice.positions.tolist() == np.argsort(-want)[:5].tolist()


@pytest.mark.parametrize("mix", MIXES)
def test_a_mixture_asks_its_portions_of_what_is_left(mix, taught, monkeypatch):
    (study, wheel, *_), told, real = taught, [], flywheel.choose

    def spied(strategy, study, wheel, rows, k, rng):
        found = real(strategy, study, wheel, rows, k, rng)
        told.append((strategy, k, rows.copy(), rows[found.positions]))
        return found

    monkeypatch.setattr(flywheel, "choose", spied)
    rows = np.arange(16, 60)
    choice = real(mix, study, wheel, rows, 20, rng_for(0, "c"))
    assert {name: k for name, k, _, _ in told} == sampling.portions(MIXES[mix], 20) and len(told) == len(MIXES[mix])
    assert rows[choice.positions].tolist() == [row for _, _, _, taken in told for row in taken.tolist()]
    left = set(rows.tolist())
    for _, _, offered, taken in told:
        assert set(offered.tolist()) == left
        left -= set(taken.tolist())
    assert not choice.scores.scored.any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_thousand_classes_and_probabilities_of_zero_are_no_harm(strategy, taught, monkeypatch):
    study, wheel = taught[0], dataclasses.replace(taught[1])
    monkeypatch.setattr(Wheel, "known", lambda self: (np.arange(16), torch.arange(16) % 5))
    rng = torch_rng_for(0, "thousand")
    weight = 1e6 * torch.randn(1000, 6, generator=rng, dtype=torch.float64)
    weight[5:] = 0
    seen = torch.arange(1000) < 5
    wheel.model = flywheel.Linear(weight, torch.zeros(1000).double(), seen)
    logs = wheel.model.log_probs(study.features)
    assert (logs[:, 5:] == LEAST).all() and (logs.max(1).values == 0).all() and logs.isfinite().all()
    wheel.held_out = (wheel.model.scores(study.features[:16]), logs[:16])
    choice = flywheel.choose(strategy, study, wheel, np.arange(16, 60), 20, rng_for(0, "c"))
    assert np.isfinite(choice.scores.values).all() and len(set(choice.positions.tolist())) == 20
    bad = flywheel.suspects(logs[:16], torch.arange(16) + 900)
    assert bad.values == pytest.approx(1.0) and bad.scored.all()


# --------------------------------------------------------------------------------------- a person instead of an Oracle


def test_a_simulated_person_without_error_is_a_plain_oracle(tmp_path):
    study = study_of(methods=STRATEGIES, cycles=2)
    loop(tmp_path / "person", study)
    loop(tmp_path / "oracle", study, plain=True)
    assert results(tmp_path / "person") == results(tmp_path / "oracle")
    table = record.table(study.config, "wheel", root=tmp_path / "person")
    assert set(table["method"]) == set(STRATEGIES) and len(table) == 2 * len(STRATEGIES)
    assert (table["images"] == 9 + 6 * table["cycle"]).all() and (table["boxes"] == table["images"]).all()
    assert (table["seconds"] == 2.0 * table["images"]).all()
    asked = record.queries(study.config, "wheel", root=tmp_path / "person")
    assert not asked.duplicated(["method", "id"]).any()
    first = asked[asked["cycle"] == 0].groupby("method")["id"].apply(tuple)
    assert len(set(first)) == 1  # all methods begin alike


def test_errors_are_as_many_as_told_and_the_same_in_any_order(tmp_path):
    study = study_of(count=240, annotator_error=0.3)
    truth, said = flywheel.truth_of(study.train, "classes"), []
    for number, order in enumerate((np.arange(240), rng_for(0, "order").permutation(240))):
        run = a_run(tmp_path / str(number), study)
        given = flywheel.answers(run, study.train, flywheel.simulated(run, study.train, "classes"), "classes")
        for cycle, part in enumerate(np.array_split(order, 3)):
            assert given.ask(part, cycle).all()
        said.append(given.labels_of(np.arange(240)).classes[:, 0])
        stored = given.store.labels()
        assert [NAMES[c - 1] for c in said[-1].tolist()] == [stored[id_] for id_ in study.train.images.ids]
    assert torch.equal(*said)
    wrong = said[0] != study.train.labels.classes[:, 0]
    assert [truth[i] for i in study.train.images.ids] == [NAMES[c - 1] for c in study.train.labels.classes[:, 0]]
    # 72 of 240, standard deviation 7.1; the bounds are four of them away
    assert 43 < int(wrong.sum()) < 101
    assert set(said[0][wrong].tolist()) == {1, 2, 3, 4}
    other = labelling.Simulated(truth, 0.3, seed=1)
    mine = torch.tensor([NAMES.index(other.label(i, "classes", NAMES)) + 1 for i in study.train.images.ids])
    assert not torch.equal(mine, said[0])  # another person errs elsewhere


def test_labels_that_nobody_gave_are_not_there(tmp_path):
    study = study_of()
    run = a_run(tmp_path, study)
    given = flywheel.answers(run, study.train, flywheel.simulated(run, study.train, "classes"), "classes")
    given.ask(np.array([3, 1]), 0, [0.5, math.nan])
    assert given.labels_of(np.array([1, 3])).classes.tolist() == [[2], [4]]
    assert given.labels_of(np.array([3])).boxes.tolist() == [[[0.0, 0, 8, 8]]]
    for call in (given.labels_of, given.bill):
        with pytest.raises(ValueError, match=r"labels of images \[0, 2\] were not given"):
            call(np.array([0, 1, 2]))
    rows = given.store.history()
    assert rows["image"].tolist() == ["train/0003.png", "train/0001.png"]
    assert rows["score"].tolist()[0] == 0.5 and math.isnan(rows["score"].tolist()[1])
    assert given.bill(np.array([1, 3])) == Bill(2, 2, 4.0) and given.bill(np.array([], dtype=np.int64)) == Bill()


# ------------------------------------------------------------------------------------------------------- nobody answers


def test_questions_wait_until_somebody_answers_them(tmp_path):
    study = study_of()
    human, wheels = Human(study), []
    for run in record.runs(study.config, "wheel", root=tmp_path, plan=flywheel.plan, progress=False):
        wheel = flywheel.start(run, study)
        store = wheel.answers.store
        wheels.append(wheel)
        for cycle, _ in run.rounds():
            want = 9 if cycle == 0 else 6
            with pytest.raises(Unanswered, match=f"{want} questions wait in .*labels.sqlite: answer them at the page"):
                flywheel.ask(run, study, wheel, cycle)
            assert len(wheel.pool.labelled()) == (0, 9, 15)[cycle] and store.progress()["waiting"] == want
            assert human.answer_all(store, "Ann", most=4) == 4
            with pytest.raises(Unanswered, match=f"{want - 4} questions wait"):
                flywheel.ask(run, study, wheel, cycle)
            assert store.progress()["waiting"] == want - 4  # nothing is asked in its place
            human.answer_all(store, "Bob")
            flywheel.ask(run, study, wheel, cycle)
            assert len(wheel.pool.labelled()) == (9, 15, 21)[cycle]
            if cycle:
                guess = wheel.model.log_probs(study.features).argmax(1).tolist()
                told = store.history().query(f"cycle == {cycle}")
                rows = [study.train.images.ids.index(image) for image in told["image"]]
                assert told["suggestion"].tolist() == [NAMES[guess[row]] for row in rows]
            flywheel.learn(run, study, wheel, cycle)
            flywheel.commit(run, study, wheel, cycle)
    (wheel,) = wheels
    rows = history(tmp_path)
    assert set(rows["who"]) == {"Ann", "Bob"} and not rows["image"].duplicated().any() and len(rows) == 21
    assert wheel.pool.bill() == Bill(21, 21, pytest.approx(rows["seconds"].sum()))
    loop(tmp_path / "at once", study, lambda *_: human)
    other = history(tmp_path / "at once")
    assert rows["image"].tolist() == other["image"].tolist() and rows["label"].tolist() == other["label"].tolist()
    later = rows[rows["cycle"] > 0]
    assert later["score"].notna().all()
    assert set(later["model"]) == {"linear, cycle 1", "linear, cycle 2"}


def sessions(root, study, human, most=20):
    """The notebook is run from its top, again and again, with somebody at the page in between."""
    for number in range(most):
        try:
            return loop(root, study, person=None), number
        except Unanswered:
            (path,) = root.rglob("labels.sqlite")
            with labelling.Store(path) as store:
                human.answer_all(store, "Ann")
    raise AssertionError("the wheel never came to its end")


def test_a_notebook_run_from_its_top_after_each_session_is_the_same_run(tmp_path):
    study = study_of()
    loop(tmp_path / "at once", study, lambda *_: Human(study))
    _, times = sessions(tmp_path / "sessions", study, Human(study))
    assert times == 3  # one session a cycle
    assert results(tmp_path / "sessions") == results(tmp_path / "at once")


@pytest.fixture(scope="module")
def shrugs(tmp_path_factory) -> list[str]:
    """Two images of each cycle of the run in which somebody can name all."""
    root, study = tmp_path_factory.mktemp("all known"), study_of()
    loop(root, study, lambda *_: Human(study))
    rows = record.queries(study.config, "wheel", root=root)
    return [name for cycle in range(3) for name in rows[rows["cycle"] == cycle]["id"].tolist()[:2]]


def test_images_that_nobody_can_name_are_set_aside(tmp_path):
    study = study_of(first=20, budget=20, methods=("random",))
    shrugs = ("train/0003.png", "train/0041.png")
    seen = []

    def watch(run, wheel, cycle):
        away = {wheel.pool.ids[p] for p in np.flatnonzero(wheel.pool.asked_in == SET_ASIDE)}
        seen.append((away, len(wheel.pool.labelled()) + len(away), len(wheel.pool.unlabelled())))

    wheel = loop(tmp_path / "run", study, lambda *_: Human(study, shrugs), watch=watch)
    # everything is asked: 20, 20, the last 20
    assert [counts for _, *counts in seen] == [[20, 40], [40, 20], [60, 0]]
    assert seen[0][0] <= seen[1][0] <= seen[2][0] == set(shrugs)
    rows = history(tmp_path / "run")
    assert not rows["image"].duplicated().any() and len(rows) == 60
    assert set(rows[rows["action"] == "unknown"]["image"]) == set(shrugs) == wheel.answers.unsure(range(9))
    asked = record.queries(study.config, "wheel", root=tmp_path / "run")
    assert len(asked) == 58 and not set(asked["id"]) & set(shrugs)


@pytest.mark.parametrize("commits", [1, 2])
def test_what_was_set_aside_stays_so_after_a_resume(tmp_path, shrugs, commits):
    study = study_of()
    loop(tmp_path / "whole", study, lambda *_: Human(study, shrugs))
    with pytest.raises(BrokenOff):
        loop(tmp_path / "broken", study, lambda *_: Human(study, shrugs), commits=commits)
    loop(tmp_path / "broken", study, lambda *_: Human(study, shrugs))
    assert results(tmp_path / "broken") == results(tmp_path / "whole")
    rows = history(tmp_path / "broken")
    assert not rows["image"].duplicated().any() and (rows["action"] == "unknown").sum() >= 2


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_shrug_in_a_cycle_that_was_not_committed_does_not_change_what_is_asked(tmp_path, shrugs, asked):
    study = study_of()
    loop(tmp_path / "whole", study, lambda *_: Human(study, shrugs))
    with pytest.raises(BrokenOff):
        loop(tmp_path / "broken", study, lambda *_: Human(study, shrugs), asked=asked)
    loop(tmp_path / "broken", study, lambda *_: Human(study, shrugs))
    assert len(history(tmp_path / "broken")) == len(history(tmp_path / "whole")) == 21
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


def test_sessions_with_shrugs_are_the_same_run(tmp_path, shrugs):
    study = study_of()
    loop(tmp_path / "at once", study, lambda *_: Human(study, shrugs))
    _, times = sessions(tmp_path / "sessions", study, Human(study, shrugs))
    assert times == 3 and results(tmp_path / "sessions") == results(tmp_path / "at once")


# --------------------------------------------------------------------------------------- broken off, resumed, replayed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root, study = tmp_path_factory.mktemp("unbroken"), study_of(methods=("mix_diverse",), annotator_error=0.2)
    loop(root, study)
    return root, study


@pytest.mark.parametrize("where", [dict(commits=0), dict(commits=1), dict(commits=2), dict(asked=1), dict(asked=3)])
def test_broken_off_and_resumed_gives_the_same_bytes_and_asks_nobody_twice(unbroken, tmp_path, where):
    root, study = unbroken
    with pytest.raises(BrokenOff):
        loop(tmp_path, study, **where)
    before = history(tmp_path)
    assert len(before) == {0: 0, 1: 9, 2: 15, 3: 21}[next(iter(where.values()))]  # asked, or committed, so many cycles
    loop(tmp_path, study)
    assert results(tmp_path) == results(root)
    after, whole = history(tmp_path), history(root)
    told = ["image", "cycle", "action", "label", "strategy", "score", "model", "suggestion", "seconds"]
    pd.testing.assert_frame_equal(after[told], whole[told])  # nothing was asked, or answered, twice
    assert after["when"].tolist()[: len(before)] == before["when"].tolist()
    with pytest.raises(StopIteration):  # and it is finished
        next(record.runs(study.config, "wheel", root=tmp_path, plan=flywheel.plan, progress=False))


def test_a_resumed_wheel_knows_what_the_unbroken_one_knows(tmp_path):
    study = study_of(annotator_error=0.2)
    kept = {}
    with pytest.raises(BrokenOff):
        loop(tmp_path, study, commits=2, watch=lambda run, wheel, cycle: kept.update({cycle: wheel}))
    for run in record.runs(study.config, "wheel", root=tmp_path, plan=flywheel.plan, progress=False):
        wheel = flywheel.start(run, study, flywheel.simulated(run, study.train, "classes"))
        break
    old = kept[1]
    assert np.array_equal(wheel.pool.asked_in, old.pool.asked_in) and wheel.pool.bill() == old.pool.bill()
    assert torch.equal(wheel.known()[1], old.known()[1])
    assert torch.equal(wheel.model.weight, old.model.weight) and torch.equal(wheel.model.seen, old.model.seen)
    assert all(torch.equal(a, b) for a, b in zip(wheel.held_out, old.held_out, strict=True))


def test_a_recorded_session_played_again_is_the_same_run(tmp_path, shrugs):
    study = study_of()
    loop(tmp_path / "session", study, lambda *_: Human(study, shrugs))
    recorded = history(tmp_path / "session")
    loop(tmp_path / "again", study, lambda *_: labelling.Replay(recorded))
    assert results(tmp_path / "again") == results(tmp_path / "session")
    again = history(tmp_path / "again")
    same = [name for name in recorded if name not in ("when", "who")]
    pd.testing.assert_frame_equal(again[same], recorded[same])
    some = recorded[recorded["cycle"] < 2]
    with pytest.raises(ValueError, match="replayed history has no answer to image 'train/"):
        loop(tmp_path / "short", study, lambda *_: labelling.Replay(some))


# ---------------------------------------------------------------------------------------------------------------- boxes

TINY = dict(
    detector="ssd",
    digit_classes=3,
    scenes=(40, 4),
    initial_model_images=4,
    initial_model_iterations=2,
    held_out_images=4,
    clients=2,
    initial_labels=4,
    query_size=3,
    cycles=2,
    rounds=1,
    iterations=3,
    batch=4,
    score_above=0.02,
    methods=("entropy_avg", "mix"),
    seeds=(0,),
    threads=1,
)


@pytest.fixture(scope="module")
def scenes():
    return alfl.prepare(papers.load("50b", "smoke", "digits", **TINY), device="cpu")


def box_loop(root, study, person=None, commits=None, asked=None, watch=None):
    """person: (run, train) -> who answers at a store; None: `pool.Oracle`."""
    for run in record.runs(study.config, "boxes", root=root, plan=alfl.plan, progress=False):
        given = flywheel.answers(run, study.train, person(run, study.train)) if person else None
        clients, model = alfl.start(run, study, given)
        for cycle, round in run.rounds():
            if run.committed == commits:
                raise BrokenOff
            for client in clients:
                alfl.ask(run, study, model, client, cycle)
            if cycle + 1 == asked:
                raise BrokenOff
            updates = alfl.train(run, study, model, clients, cycle, round)
            alfl.merge(run, model, clients, updates)
            alfl.commit(run, study, model, clients, updates, cycle, round)
            if watch:
                watch(run, clients, cycle)


def test_boxes_from_a_simulated_person_are_those_of_an_oracle(scenes, tmp_path):
    compared = []

    def watch(run, clients, cycle):
        for client in clients:
            rows = client.pool.index[client.pool.labelled()]
            got, want = client.pool.labels_of(rows), scenes.train.labels.take(rows)
            width = got.classes.shape[1]
            assert torch.equal(got.classes, want.classes[:, :width]) and not want.classes[:, width:].any()
            assert (got.boxes - want.boxes[:, :width]).abs().max() <= 1e-3
            assert not got.ignore.any() and torch.equal(got.valid, want.valid[:, :width])
            compared.append(len(rows))

    assert not scenes.train.labels.ignore.any()
    box_loop(tmp_path / "person", scenes, flywheel.simulated, watch=watch)
    box_loop(tmp_path / "oracle", scenes)
    assert sum(compared) == 2 * 2 * (4 + 7)
    tables = [record.table(scenes.config, "boxes", root=tmp_path / who) for who in ("person", "oracle")]
    bill = ["method", "cycle", "client", "images", "boxes", "seconds"]
    pd.testing.assert_frame_equal(tables[0][bill], tables[1][bill])
    assert tables[0]["boxes"].max() > 20 and (tables[0]["seconds"] > 7 * tables[0]["boxes"]).all()
    asked = [record.queries(scenes.config, "boxes", root=tmp_path / who) for who in ("person", "oracle")]
    which = ["method", "cycle", "client", "id"]
    assert asked[0][which].equals(asked[1][which]) and len(asked[0]) == 2 * 2 * 7
    by_method = asked[0][asked[0]["cycle"] > 0].groupby("method")["id"].apply(tuple)
    assert len(set(by_method)) == 2
    with pytest.raises(BrokenOff):
        box_loop(tmp_path / "broken", scenes, flywheel.simulated, asked=2)
    box_loop(tmp_path / "broken", scenes, flywheel.simulated)
    assert results(tmp_path / "broken") == results(tmp_path / "person")


class Puzzled(labelling.Simulated):
    """Knows all but the first two images that are asked in cycle 0."""

    def answer_all(self, store, who):
        done = 0
        while (question := store.next(who)) is not None:
            shrugs = set(store.history().query("action == 'unknown'")["image"])
            if question.image in shrugs or question.cycle == 0 and len(shrugs) < 2:
                store.unknown(who, question.image, 3.0)
            else:
                store.answer(who, question.image, self.label(question.image, "boxes", store.classes), 2.0)
            done += 1
        return done


@pytest.mark.parametrize("where", [dict(commits=1), dict(asked=1)])
def test_scenes_that_nobody_can_name_stay_set_aside_after_a_resume(scenes, tmp_path, where):
    study = dataclasses.replace(
        scenes, config=scenes.config.replace(methods=("random",), initial_labels=5, query_size=5, cycles=3)
    )

    def puzzled(run, train):
        return Puzzled(flywheel.truth_of(train, "boxes"))

    box_loop(tmp_path / "whole", study, puzzled)
    whole = history(tmp_path / "whole", "boxes")
    assert not whole["image"].duplicated().any() and (whole["action"] == "unknown").sum() == 2
    with pytest.raises(BrokenOff):
        box_loop(tmp_path / "broken", study, puzzled, **where)
    box_loop(tmp_path / "broken", study, puzzled)
    assert not history(tmp_path / "broken", "boxes")["image"].duplicated().any()
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


def letterboxed() -> tuple[Dataset, list[list[list[float]]]]:
    """Wide, high and odd images in 64 x 64, and their boxes in original pixels; object 1 of image 0 is ignored."""
    sizes = torch.tensor([[30, 90], [121, 47], [64, 64], [500, 333]])
    drawn = [
        [[0.0, 0, 90, 30], [3, 4, 20, 28], [10.5, 2.25, 77.125, 29]],
        [[0, 100, 47, 121]],
        [],
        [[33.3, 250.7, 333, 500], [1.5, 2.5, 300, 400]],
    ]
    original = boxes.pad_boxes([torch.tensor(rows, dtype=torch.float32).reshape(-1, 4) for rows in drawn])
    numbers = [[1, 2, 3], [4], [], [2, 1]]
    classes = boxes.pad_boxes([torch.tensor(row, dtype=torch.int64) for row in numbers])
    moved = boxes.letterbox_boxes(original, sizes, (64, 64)) * (classes > 0)[..., None]
    ignore = torch.zeros_like(classes, dtype=torch.bool)
    ignore[0, 1] = True
    images = Images(tuple("abcd"), torch.zeros(4, 3, 64, 64, dtype=torch.uint8), sizes)
    return Dataset("letters", images, Labels(moved, classes, ignore, torch.zeros_like(ignore)), NAMES), drawn


def test_the_truth_is_in_original_pixels_without_what_is_ignored(tmp_path):
    train, drawn = letterboxed()
    truth = flywheel.truth_of(train, "boxes")
    del drawn[0][1]
    names = [["ant", "cow"], ["dog"], [], ["bee", "ant"]]
    assert list(truth) == list("abcd")
    for i, id_ in enumerate("abcd"):
        assert [one["class"] for one in truth[id_]] == names[i]
        height, width = train.images.sizes[i].tolist()
        for one, want in zip(truth[id_], drawn[i], strict=True):
            assert one["box"] == pytest.approx(want, abs=1e-3)
            x1, y1, x2, y2 = one["box"]
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    # and back: what such a person draws is what was letterboxed
    store = labelling.Store(tmp_path / "labels.sqlite", NAMES, "boxes")
    given = Answers(store, train.images, NAMES, "boxes", labelling.Simulated(truth))
    assert given.ask(np.arange(4)).all()
    got = given.labels_of(np.array([3, 0, 2]))
    assert got.classes.tolist() == [[2, 1], [1, 3], [0, 0]] and not got.ignore.any() and not got.crowd.any()
    want = train.labels.boxes
    assert got.boxes[0].numpy() == pytest.approx(want[3, :2].numpy(), abs=1e-3)
    assert got.boxes[1].numpy() == pytest.approx(want[0, [0, 2]].numpy(), abs=1e-3)
    assert not got.boxes[2].any()  # padding is zero
    assert given.bill(np.arange(4)) == Bill(4, 5, 4 * 2.0 + 5 * 7.0)
    nothing = given.labels_of(np.array([2]))
    assert nothing.boxes.shape == (1, 0, 4) and nothing.classes.shape == (1, 0)


def test_the_truth_of_a_set_without_any_object_is_that_there_is_none():
    train, _ = letterboxed()
    empty = torch.zeros(4, 0, dtype=torch.bool)
    bare = dataclasses.replace(train, labels=Labels(torch.zeros(4, 0, 4), empty.long(), empty, empty))
    assert flywheel.truth_of(bare, "boxes") == {"a": [], "b": [], "c": [], "d": []}


def test_comparing_with_held_out_images_needs_held_out_images(scenes):
    for method in ("model_outlier", "mix", "chain+model_outlier"):
        changed = papers.load("50b", "smoke", "digits", **{**TINY, "held_out_images": 0, "methods": (method,)})
        with pytest.raises(ValueError, match="images that are held out: set merge_images to 1 or more"):
            alfl.prepare(changed, device="cpu")


def test_what_held_out_images_show_is_no_image_of_the_pool(scenes, tmp_path, monkeypatch):
    """The reference of 'model_outlier' is the asked model's detections on images that nobody will ask for."""
    study = dataclasses.replace(scenes, config=scenes.config.replace(methods=("model_outlier",)))
    seen, see, looked, look = [], alfl.see, [], alfl.look

    def spied_see(study, model, pool, rows, strategy, others=None):
        sight = see(study, model, pool, rows, strategy, others)
        if strategy == "model_outlier":
            seen.append((sight.reference, look(study.config, model, held.images, study.device)))
        return sight

    held_rows = alfl.held_out(study.config, study.train, 0)
    held = study.train.take(held_rows)

    def spied_look(config, model, images, *rest, **more):
        looked.append(set(images.ids))
        return look(config, model, images, *rest, **more)

    monkeypatch.setattr(alfl, "see", spied_see)
    monkeypatch.setattr(alfl, "look", spied_look)
    box_loop(tmp_path, study)
    assert len(seen) == 2 and set(held.images.ids) in looked
    for reference, want in seen:
        assert torch.equal(reference.probs, want.probs) and torch.equal(reference.labels, want.labels)
        assert len(reference) == 4
    asked = set(record.queries(study.config, "boxes", root=tmp_path)["id"])
    assert asked and not asked & set(held.images.ids)


# ----------------------------------------------------------------------------------------------- when to stop, features


def curve(values, method="margin", images=10) -> list[dict]:
    """values[seed][cycle]: rows as `record.table` gives them, a client's and an earlier round's among them."""
    rows = []
    for seed, accuracies in enumerate(values):
        for cycle, accuracy in enumerate(accuracies):
            key = {"method": method, "seed": seed, "cycle": cycle, "images": images * (cycle + 1)}
            rows.append({**key, "round": 0, "client": "0", "accuracy": math.nan})
            rows.append({**key, "round": 0, "client": "server", "accuracy": accuracy})
    return rows


def test_each_rule_stops_where_it_should():
    rising = [[0.50, 0.70, 0.80, 0.803], [0.52, 0.72, 0.82, 0.822], [0.51, 0.71, 0.81, 0.814]]
    table = pd.DataFrame(curve(rising) + curve([[0.1, 0.3, 0.5, 0.7]] * 3, "random", images=20))
    found = flywheel.stopping(table, "accuracy", goal=0.81, budget=25, plateau=1.0)
    assert found[["method", "rule"]].to_records(index=False).tolist() == [
        (method, rule) for method in ("margin", "random") for rule in ("goal", "budget", "plateau")
    ]
    at = found.set_index(["method", "rule"])
    assert at.loc[("margin", "goal")].tolist() == [30, pytest.approx(0.81)]  # the mean of the seeds, not the best
    assert at.loc[("margin", "budget")].tolist() == [30, pytest.approx(0.81)]
    # 0.3, 0.2 and 0.4 points: 0.3 +- 4.303 x 0.1 / sqrt 3 = 0.05 .. 0.55
    assert at.loc[("margin", "plateau")].tolist() == [40, pytest.approx(0.813)]
    assert at.loc[("random", "budget")].tolist() == [40, pytest.approx(0.3)]
    for rule in ("goal", "plateau"):
        assert at.loc[("random", rule)].isna().all()  # 70 %, and it still gains 20 points a cycle
    for limit, strikes in ((0.56, True), (0.54, False)):
        plateau = flywheel.stopping(table, "accuracy", 2.0, 10**6, limit).set_index(["method", "rule"])
        assert plateau.loc[("margin", "plateau"), "images"] == 40 if strikes else plateau["images"].isna().all()
        assert plateau.loc[("margin", ["goal", "budget"]), "images"].isna().all()


def test_a_plateau_of_one_seed_is_its_gain_and_unsure_gains_are_none():
    table = pd.DataFrame(curve([[0.5, 0.9, 0.905, 0.95]]))
    at = flywheel.stopping(table, "accuracy", 0.9, 30, 1.0).set_index("rule")
    assert at["images"].tolist() == [20, 30, 30] and at["value"].tolist() == [0.9, 0.905, 0.905]
    # no gain on the mean, but the seeds differ by 10 points: nobody can be sure
    unsure = pd.DataFrame(curve([[0.5, 0.6], [0.6, 0.5]]))
    assert flywheel.stopping(unsure, "accuracy", 0.9, 30, 1.0).set_index("rule")["images"].isna().all()


# --------------------------------------------------------------------------------------------------------- label errors


def test_suspects_by_hand():
    logs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [1.0, 1e-30]], dtype=torch.float64).log()
    assert flywheel.suspects(logs, torch.tensor([0, 0, 1])).values == pytest.approx([0.1, 0.8, 1.0])
    with pytest.raises(ValueError, match="one label for each of 3 rows is needed, got 2"):
        flywheel.suspects(logs, torch.tensor([0, 1]))


@pytest.fixture
def mislabelled(tmp_path):
    """A run, a wheel with 120 labels, a fifth of them wrong, and which."""
    study = study_of(count=140, annotator_error=0.2, first=120)
    run = a_run(tmp_path, study)
    wheel = flywheel.start(run, study, flywheel.simulated(run, study.train, "classes"))
    flywheel.ask(run, study, wheel, 0)
    flywheel.learn(run, study, wheel, 0)
    rows, given = wheel.known()
    wrong = (given != study.train.labels.classes[rows, 0] - 1).numpy()
    assert 10 < wrong.sum() < 40
    return study, run, wheel, wrong


def test_wrong_labels_rank_above_right_ones(mislabelled):
    _, _, wheel, wrong = mislabelled
    values = flywheel.suspects(wheel.held_out[1], wheel.known()[1]).values
    pairs = [float(a > b) + float(a == b) / 2 for a in values[wrong] for b in values[~wrong]]
    assert np.mean(pairs) > 0.9 and (values >= 0).all() and (values <= 1).all()


def test_asking_again_corrects_the_labels_and_says_who_did(mislabelled):
    study, run, wheel, wrong = mislabelled
    rows, before = wheel.known()
    bill = wheel.pool.bill()
    told = len(wheel.answers.store.history())
    checker = labelling.Simulated(flywheel.truth_of(study.train, "classes"), seconds_per_image=3.0)
    positions = np.argsort(-flywheel.suspects(wheel.held_out[1], before).values, kind="stable")[:40]
    found = flywheel.ask_again(wheel, positions, checker, cycle=1)
    assert found["image"].tolist() == [study.train.images.ids[row] for row in rows[positions]]
    assert found["before"].tolist() == [NAMES[c] for c in before[positions]]
    truth = study.train.labels.classes[rows, 0] - 1
    assert found["after"].tolist() == [NAMES[c] for c in truth[positions]]
    assert (found["before"] != found["after"]).sum() == wrong[positions].sum() > 0.7 * wrong.sum()
    after = wheel.known()[1]
    assert torch.equal(after[positions], truth[positions])  # the last word counts
    rest = np.setdiff1d(np.arange(120), positions)
    assert torch.equal(after[rest], before[rest])
    entries = wheel.answers.store.history()[told:]
    assert len(entries) == 40 and set(entries["who"]) == {"checker"} and set(entries["strategy"]) == {"label errors"}
    assert set(entries["image"]) == set(found["image"]) and set(entries["cycle"]) == {1}
    assert wheel.pool.bill() == Bill(bill.images, bill.boxes, bill.seconds + 40 * 3.0)  # the check is paid for, too
    stored = wheel.answers.store.labels()
    assert all(stored[row.image] == row.after for row in found.itertuples())
    anew = flywheel.start(run, study)  # whoever comes later finds the corrected labels
    anew.pool.ask(wheel.pool.labelled(), 0)
    assert torch.equal(anew.known()[1], after)
    assert flywheel.ask_again(wheel, positions[:3], checker, cycle=2, who="Eve")["before"].tolist() == [
        NAMES[c] for c in truth[positions[:3]]
    ]
    assert wheel.answers.store.history()["who"].tolist()[-3:] == ["Eve"] * 3


def test_asking_again_waits_for_a_human_checker_too(mislabelled):
    study, _, wheel, wrong = mislabelled
    before, positions = wheel.known()[1], np.flatnonzero(wrong)[:4]
    with pytest.raises(Unanswered, match="4 questions wait"):
        flywheel.ask_again(wheel, positions, None, cycle=1)
    assert torch.equal(wheel.known()[1], before)
    Human(study).answer_all(wheel.answers.store, "checker")
    found = flywheel.ask_again(wheel, positions, None, cycle=1)
    assert (found["before"] != found["after"]).all()


def test_asking_again_in_the_cycle_of_the_first_answer_is_not_silently_nothing(mislabelled):
    """An image is asked once a cycle: either this is refused, or somebody is asked all the same."""
    study, _, wheel, wrong = mislabelled
    checker, positions = labelling.Simulated(flywheel.truth_of(study.train, "classes")), np.flatnonzero(wrong)[:4]
    try:
        found = flywheel.ask_again(wheel, positions, checker, cycle=0)
    except ValueError:
        return
    assert (found["before"] != found["after"]).all()


def test_a_checker_who_cannot_say_means_the_same_before_and_after_a_resume(tmp_path):
    study, kept = study_of(), []

    def watch(run, wheel, cycle):
        if cycle == 1:
            ids = [study.train.images.ids[row] for row in wheel.known()[0][:3]]
            flywheel.ask_again(wheel, np.arange(3), Human(study, ids), cycle=10)
            kept.append((wheel, ids))

    with pytest.raises(BrokenOff):
        loop(tmp_path, study, commits=2, watch=watch)
    ((old, ids),) = kept
    rows = history(tmp_path)
    assert rows[rows["who"] == "checker"]["action"].tolist() == ["unknown"] * 3
    for run in record.runs(study.config, "wheel", root=tmp_path, plan=flywheel.plan, progress=False):
        wheel = flywheel.start(run, study, Human(study))
        break
    assert np.array_equal(wheel.pool.asked_in, old.pool.asked_in)
    assert torch.equal(wheel.known()[1], old.known()[1]) and wheel.pool.bill() == old.pool.bill()


# ------------------------------------------------------------------------------------------------------------- features


def test_features_are_made_once_standardised_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDAL_HOME", str(tmp_path))
    made = []

    def embedded(images, side, device="cpu", batch=16, model="lite0"):
        made.append((len(images), side))
        first = images.pixels.float().mean((2, 3))
        return torch.cat([first, first[:, :1] ** 2, torch.ones(len(images), 1)], 1)

    monkeypatch.setattr(flywheel, "embedded", embedded)
    small = settings(limit=(50, 20), feature_side=32)
    study = flywheel.prepare(small, device="cpu")
    assert made == [(50, 32), (20, 32)] and study.name == "digit-images" and len(study.class_names) == 10
    assert study.features.shape == (50, 5) and study.test_features.shape == (20, 5)
    raw = embedded(study.train.images, 32), embedded(study.test.images, 32)
    mean, spread = raw[0].mean(0), raw[0].std(0)
    assert torch.allclose(study.features[:, :4].mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(study.features[:, :4].std(0), torch.ones(4), atol=1e-4)
    assert torch.allclose(study.test_features[:, :4], ((raw[1] - mean) / spread)[:, :4], atol=1e-4)
    assert not study.features[:, 4].any()  # a feature that never moves
    del made[:]
    again = flywheel.prepare(small.replace(initial_labels=3, methods=("random",)), device="cpu")
    assert not made and torch.equal(again.features, study.features)
    flywheel.prepare(small.replace(feature_side=48), device="cpu")
    assert made == [(50, 48), (20, 48)]


def test_the_backbone_gives_the_same_features_whatever_the_batches():
    pixels = torch.randint(0, 256, (3, 3, 16, 16), generator=torch_rng_for(0, "pixels"), dtype=torch.uint8)
    images = Images(("a", "b", "c"), pixels, torch.tensor([[16, 16]] * 3))
    together, apart = flywheel.embedded(images, 32), flywheel.embedded(images, 32, batch=2)
    assert together.shape == (3, 1280) and together.isfinite().all()
    assert torch.allclose(together, apart, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    assert flywheel.embedded(images.take([]), 32).shape == (0, 1280)


def test_labels_from_elsewhere_join_the_loop_as_a_person():
    """What was exported, and is read again, answers as the person who drew it did."""
    drawn = {"a.png": [exchange.Box("cat", 1.5, 2, 30, 41)], "b.png": []}
    items = [exchange.Item(name, None, (60, 80), boxes) for name, boxes in drawn.items()]
    truth = flywheel.from_items([*items, exchange.Item("c.png", None, None, "dog")])
    assert truth == {"a.png": [{"class": "cat", "box": [1.5, 2, 30, 41]}], "b.png": [], "c.png": "dog"}
    person = labelling.Simulated(truth)
    assert person.label("a.png", "boxes", ("cat", "dog")) == truth["a.png"]
    assert person.label("c.png", "classes", ("cat", "dog")) == "dog"


def test_an_unknown_feature_model_is_refused_by_name():
    with pytest.raises(ValueError, match="got 'no_such_net'"):
        flywheel.embedded(None, 32, model="no_such_net")
