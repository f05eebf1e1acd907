"""Classifiers: draws made ahead, many clients at once against one after another, KAFAL's distillation by an oracle."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from client_tasks import CLASSES, CONFIG, MIXING, TOLERANCE, assert_same, model, small_images, states, task, unequal

from fedal_utils import training
from fedal_utils.config import TrainingConfig
from fedal_utils.detectors import CLASSIFIERS
from fedal_utils.training import TrainingDiverged, stacked
from fedal_utils.training.classifier import draw


@pytest.fixture(scope="module")
def images():
    return small_images()


@pytest.fixture
def one_stack(monkeypatch):
    monkeypatch.setattr(stacked, "CPU_STACK", 1 << 30)


def both(start, images, config, teacher=None, tasks=unequal, as_released=False, **options):
    """Results of fit_in_turn and of fit_stacked, from the same draws."""
    return (
        train(
            start, states(start, len(tasks(**options))), tasks(**options), images, config, teacher, "cpu", as_released
        )
        for train in (training.fit_in_turn, training.fit_stacked)
    )


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("most", [1, 2, 5])
def test_stacked_equals_sequential(images, monkeypatch, name, most):
    monkeypatch.setattr(stacked, "CPU_STACK", most * 6 * 16 * 16)
    wanted, got = both(model(name), images, MIXING.replace(epochs=2, clip=1.0), model(name, seed=9))
    assert [result.steps for result in got] == [6, 2, 2, 4, 2]
    assert_same(got, wanted, **TOLERANCE)
    assert ["distillation" in result.parts for result in wanted] == [True, True, False, True, True]
    assert any(result.parts.get("distillation", 0.0) > 0 for result in wanted)


@pytest.mark.parametrize("as_released", [False, True])
def test_one_step_agrees_to_rounding_in_fixed_iterations_as_well(images, one_stack, as_released):
    wanted, got = both(model(), images, MIXING, model(seed=9), as_released=as_released, iterations=1)
    assert_same(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_released_quirks_are_quirks(images):
    config = MIXING.replace(distillation_weight=50.0)
    runs = [next(both(model(), images, config, model(seed=9), as_released=q, iterations=2)) for q in (False, True)]
    assert abs(runs[0][0].loss - runs[1][0].loss) > 1e-3


def test_an_optimizer_that_lives_on_is_the_same_both_ways(images, one_stack):
    config = CONFIG.replace(schedule="step", step_at=(0.5,))
    start = model()

    def twice(train):
        tasks, before = unequal(state=True, iterations=3), states(start, 5)
        for _ in range(2):
            again = [replace(t, schedule_position=(int(t.optimizer_state.get(training.STEPS, 0)), 6)) for t in tasks]
            out = train(start, before, again, images, config)
            before = [result.state for result in out]
        return out, [t.optimizer_state for t in tasks]

    (wanted, kept), (got, stacked_kept) = twice(training.fit_in_turn), twice(training.fit_stacked)
    assert_same(got, wanted, **TOLERANCE)
    for one, other in zip(stacked_kept, kept, strict=True):
        assert one.keys() == other.keys() and int(one[training.STEPS]) == 6
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, **TOLERANCE)


def test_clients_may_stand_at_different_places_of_their_schedules(images, one_stack):
    def tasks():
        places = {"a": (0, (0, 8)), "b": (30, (6, 8))}
        return [task(c, at, 8, 0, schedule_position=p, iterations=2) for c, (at, p) in places.items()]

    start = model()
    wanted, got = both(start, images, CONFIG.replace(schedule="step", step_at=(0.5,), clip=0.5), tasks=tasks)
    assert_same(got, wanted, **TOLERANCE)
    moved = [(result.state["head.bias"] - start.head.bias.detach()).norm() for result in got]
    assert moved[1] < 0.3 * moved[0]


def test_who_else_is_in_the_stack_does_not_matter(images, one_stack):
    start = model()
    together = training.fit_stacked(start, states(start, 5), unequal(iterations=2), images, CONFIG)
    turned = training.fit_stacked(start, states(start, 5), unequal(iterations=2)[::-1], images, CONFIG)[::-1]
    assert_same(together, turned, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train", [training.fit_stacked, training.fit_in_turn])
def test_a_client_that_diverges_harms_nobody_and_is_named(images, one_stack, train):
    start = model()
    broken = states(start, 5)
    broken[1] = {k: v * float("nan") if k == "head.weight" else v for k, v in broken[1].items()}
    tasks = unequal(state=True, iterations=2)
    got = train(start, broken, tasks, images, CONFIG)
    assert isinstance(got[1], TrainingDiverged) and "client b" in str(got[1]) and not tasks[1].optimizer_state
    wanted = next(both(start, images, CONFIG, iterations=2))
    assert_same([got[0], *got[2:]], [wanted[0], *wanted[2:]], **TOLERANCE)


def test_bad_tasks_and_recipes_are_refused(images):
    start = model()
    for tasks, config, message in (
        ([task("z", 0, 0, 3)], CONFIG, "client z has no labelled image"),
        ([task("z", 0, 2, 3, iterations=0)], CONFIG, "client z makes no step"),
        ([task("z", 0, 2, 3)], TrainingConfig(), "plain SGD"),
        ([task("z", 0, 2, 3, stop_at=0.9)], CONFIG, "stop one of its clients early"),
    ):
        with pytest.raises(ValueError, match=message):
            training.fit_stacked(start, states(start, 1), tasks, images, config)


def test_how_many_clients_pay_on_a_cpu_and_on_a_gpu():
    assert training.clients_per_stack(16, (16, 16), "cpu") == 8
    assert training.clients_per_stack(128, (32, 32), "cpu") == 1
    assert training.clients_per_stack(128, (32, 32), "cuda") > 10**6


def test_a_model_that_is_right_stops_after_the_first_pass_behind_which_it_is(images):
    easy = CONFIG.replace(epochs=40, flip=0.0, crop=0)
    early, full = (
        training.fit_classifier(model(), task("a", 0, 12, 0, (0, 1), stop_at=at), images, easy) for at in (0.99, None)
    )
    assert early.steps < full.steps == 80
    right = []
    for passes in range(1, early.steps // 2 + 1):
        net, one = model(), task("a", 0, 12, 0, (0, 1), iterations=None)
        training.fit_classifier(net, one, images, easy.replace(epochs=passes))
        with torch.no_grad():
            right.append(bool((net(images.pixels[:12]).argmax(1) == one.classes).all()))
    assert right == [False] * (early.steps // 2 - 1) + [True]


# ------------------------------------------------------------------------------------------------------------- FedProx


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "clip": 1.0, "balanced_softmax": True}])
def test_stacked_clients_are_pulled_back_as_they_are_one_after_another(images, one_stack, options):
    """Stacks are made anew when a client is done, and the anchor stays what was sent."""
    config = CONFIG.replace(**{"momentum": 0.0, "epochs": 2, "proximal": 8.0, **options})
    wanted, got = both(model(), images, config)
    free = next(both(model(), images, config.replace(proximal=0.0)))
    assert_same(got, wanted, **TOLERANCE)
    moved = [k for k, v in wanted[0].state.items() if not torch.allclose(free[0].state[k], v, **TOLERANCE)]
    assert free[0].steps == 6 and len(moved) > 10


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_second_step_of_a_classifier_goes_further_by_lr_mu_and_the_way_it_came(images, one_stack, clip):
    plain = CONFIG.replace(momentum=0.0, weight_decay=0.0, clip=clip)
    pulled = plain.replace(proximal=4.0)
    w0 = {k: v.detach() for k, v in model().named_parameters()}
    runs = ((plain, 1), (plain, 2), (pulled, 1), (pulled, 2))
    for ways in zip(*(both(model(), images, config, iterations=n) for config, n in runs), strict=True):
        for w1, w2, same_first, got in zip(*ways, strict=True):
            assert all(torch.equal(v, same_first.state[k]) for k, v in w1.state.items())  # no pull at the anchor
            assert got.loss == w2.loss  # that of both steps, without the term
            for k, v in w0.items():
                way = w1.state[k] - v
                torch.testing.assert_close(got.state[k] - w2.state[k], -0.05 * 4 * way, rtol=0, atol=3e-7)


# --- the distillation, image by image ---------------------------------------------------------------------------------


def test_the_distillation_is_the_formula(images):
    """One step of one client against loops over images and classes, written from section 4.2 alone."""
    config = MIXING.replace(flip=0.0, crop=0, lr=1e-9)
    start, teacher = model(), model(seed=9).eval()
    one = task("a", 0, 6, 9, (0, 0, 1), iterations=1)  # four of class 0, two of class 1, none of 2 and 3
    result = training.fit_classifier(copy.deepcopy(start), one, images, config, teacher)
    step = draw(task("a", 0, 6, 9, (0, 0, 1), iterations=1), config, mixing=True).at(0)

    raw = np.array([1 / (4 + 1e-6), 1 / (2 + 1e-6), 0, 0])
    gamma = raw / raw.sum()
    u = start.scaled(images.pixels[step.mixed])
    beta, partner = step.beta.tolist(), step.partner.tolist()
    mixed = torch.stack([beta[b] * u[b] + (1 - beta[b]) * u[partner[b]] for b in range(6)])
    with torch.no_grad():
        q, p = teacher.scores(mixed).softmax(1).double(), start.train().scores(mixed).softmax(1).double()
    guess = q.argmax(1).tolist()
    total = 0.0
    for b in range(6):
        weight = beta[b] * gamma[guess[b]] + (1 - beta[b]) * gamma[guess[partner[b]]]
        total += weight * sum(float(q[b, c]) * float((q[b, c] / p[b, c]).log()) for c in range(4)) / 4
    assert result.parts["distillation"] == pytest.approx(total / 6, rel=1e-4)

    scores = model().train().scores(start.scaled(images.pixels[step.rows])).double().exp()
    scores = scores * torch.tensor([4.0, 2.0, 0.0, 0.0])
    by_hand = -(scores[range(6), step.target] / scores.sum(1)).log().mean()
    assert result.parts["supervised"] == pytest.approx(float(by_hand.detach()), rel=1e-4)


def test_draws_of_a_call_mixing_leaves_the_labelled_stream_alone():
    def drawn(mixing, one_partner=False, **options):
        return draw(task("a", 0, 14, 9, **options), CONFIG.replace(epochs=2), mixing, one_partner)

    plain, mixing, released = drawn(False), drawn(True), drawn(True, True)
    for name in ("length", "rows", "target", "flip", "shift"):
        assert torch.equal(getattr(plain, name), getattr(mixing, name))
    assert plain.length.tolist() == [6, 6, 2] * 2 and plain.mixed is None
    for passed in plain.rows.view(2, 18):
        assert sorted(passed[:14].tolist()) == list(range(14)) and set(passed[14:].tolist()) == {int(passed[12])}
    assert torch.equal(plain.target, plain.rows % 3) and int(plain.shift.min()) == 0 and int(plain.shift.max()) == 2
    assert torch.equal(mixing.beta, released.beta) and set(mixing.mixed.flatten().tolist()) == set(range(14, 23))
    assert all(sorted(row.tolist()) == list(range(6)) for row in mixing.partner)
    assert all(len(set(row.tolist())) == 1 for row in released.partner)
    assert drawn(True, iterations=5).rows.shape == (5, 6) == drawn(True, iterations=5).mixed.shape


def test_beta_is_beta_two_two():
    beta = draw(task("a", 0, 14, 9, iterations=1), CONFIG.replace(batch=4000), True).beta
    assert float(beta.mean()) == pytest.approx(0.5, abs=0.015) and float(beta.var()) == pytest.approx(0.05, abs=0.004)
    x = torch.linspace(0, 1, 11)
    below = torch.tensor([float((beta <= v).float().mean()) for v in x])
    torch.testing.assert_close(below, 3 * x**2 - 2 * x**3, rtol=0, atol=0.03)  # its distribution function


def test_a_frozen_teacher_is_not_touched(images):
    teacher = model(seed=9)
    before = copy.deepcopy(teacher.state_dict())
    for as_released in (False, True):
        list(both(model(), images, MIXING, teacher, as_released=as_released, iterations=2))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


def test_class_scores_are_the_models_in_order(images):
    net = model()
    scores = training.class_scores(net, images, batch=50)
    with torch.no_grad():
        torch.testing.assert_close(scores, net.eval()(images.pixels), rtol=1e-4, atol=1e-5)
    assert training.class_scores(net, images.take([]), batch=50).shape == (0, CLASSES)
