"""Clients on streams against one client after another, from the same draws: on a CPU the same steps without a graph."""

import pytest
import torch
from client_tasks import CONFIG, MIXING, TOLERANCE, assert_same, model, small_images, states, task, unequal

from fedal_utils import seeding, training
from fedal_utils.training import streams
from fedal_utils.training.graphs import SplitNorm


@pytest.fixture(scope="module")
def images():
    return small_images()


@pytest.mark.parametrize("name", ["resnet8", "conv4"])
@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("iterations", [None, 3])
def test_streams_equal_one_client_after_another(images, monkeypatch, name, as_released, iterations):
    """Short batches, a client of one image, absent classes, no unlabelled pool; clipping, momentum kept."""
    monkeypatch.setattr(streams, "SLOTS", 2)
    config = MIXING.replace(clip=1.0, epochs=2, schedule="cosine", distillation_weight=2.0)
    start, teacher = model(name), model(name, seed=9)
    results, kept = [], []
    for train in (training.fit_graphs, training.fit_in_turn):
        tasks = unequal(state=True, iterations=iterations, schedule_position=(1, 9))
        results.append(train(start, states(start, 5), tasks, images, config, teacher, "cpu", as_released))
        kept.append([t.optimizer_state for t in tasks])
    assert_same(*results, **TOLERANCE)
    for one, other in zip(*results, strict=True):
        assert one.parts.keys() == other.parts.keys() and one.state.keys() == other.state.keys()
    for one, other in zip(*kept, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, **TOLERANCE)


def test_a_pool_serves_later_rounds_with_other_rates_and_weights(images):
    streams._KEPT.clear()
    start = model()
    for round_index, lr in enumerate((0.02, 0.005)):
        config, teacher = MIXING.replace(lr=lr, epochs=1 + round_index), model(seed=round_index)
        wanted, got = (
            train(start, states(start, 5), unequal(), images, config, teacher, "cpu")
            for train in (training.fit_in_turn, training.fit_graphs)
        )
        assert_same(got, wanted, **TOLERANCE)
    assert len(streams._KEPT) == 2  # with and without mixing


def test_clients_stop_after_the_pass_that_an_evaluation_ends(images):
    easy, start = CONFIG.replace(epochs=40, flip=0.0, crop=0), model()

    def tasks():
        return [task(c, at, 12, 0, classes, stop_at=0.99) for c, at, classes in (("a", 0, (0, 1)), ("b", 40, (2,)))]

    runs = [
        train(start, states(start, 2), tasks(), images, easy) for train in (training.fit_in_turn, training.fit_together)
    ]
    runs.append(training.fit_graphs(start, states(start, 2), tasks(), images, easy, device="cpu"))
    steps = [[result.steps for result in run] for run in runs]
    assert steps[0] == steps[1] == steps[2] and steps[0][1] < steps[0][0] < 80
    assert_same(runs[2], runs[0], **TOLERANCE)


@pytest.mark.parametrize("train", [training.fit_graphs, training.fit_in_turn])
def test_a_client_that_diverges_harms_nobody_and_is_named(images, train):
    start = model()
    broken = states(start, 5)
    broken[1] = {k: v * float("nan") if k == "head.weight" else v for k, v in broken[1].items()}
    tasks = unequal(state=True, iterations=2)
    got = train(start, broken, tasks, images, CONFIG, device="cpu")
    assert isinstance(got[1], training.TrainingDiverged) and "client b" in str(got[1]) and not tasks[1].optimizer_state
    wanted = training.fit_in_turn(start, states(start, 5), unequal(iterations=2), images, CONFIG)
    assert_same([got[0], *got[2:]], [wanted[0], *wanted[2:]], **TOLERANCE)


def test_a_split_norm_is_batch_norm_of_each_batch_in_turn_without_its_padding():
    rng = seeding.torch_rng_for(0, "norm")
    x = 3 + 2 * torch.randn(12, 5, 4, 4, generator=rng)
    plain = torch.nn.BatchNorm2d(5)
    valid = torch.ones(6)
    split = SplitNorm(5)
    split.batches, split.valid, split.masked = 2, valid, True
    for length in (4, 6, 1):
        valid.copy_(torch.arange(6) < length)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        wanted = torch.cat([plain(a[:length]), plain(a[6:])])
        got = split(b)
        got = torch.cat([got[:length], got[6:]])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(split.buffers(), plain.buffers(), strict=True):
            if mine.dim():
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        weights = torch.randn(wanted.shape, generator=rng)
        (wanted * weights).sum().backward()
        (got * weights).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5)
