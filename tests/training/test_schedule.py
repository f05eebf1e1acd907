"""Batches and learning rates, worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedal_utils.config import TrainingConfig
from fedal_utils.seeding import torch_rng_for
from fedal_utils.training import draw_batches
from fedal_utils.training.schedule import batches_per_step, build_optimizer, learning_rate_factor, set_rates


@given(st.integers(1, 20), st.integers(1, 25), st.integers(1, 3))
def test_every_image_comes_once_an_epoch(count, batch, epochs):
    drawn = list(draw_batches(count, batch, epochs, None, torch_rng_for(0, "d")))
    assert len(drawn) == epochs * math.ceil(count / batch)
    for epoch in range(epochs):
        own = [(last, part) for e, last, part in drawn if e == epoch]
        assert sorted(torch.cat([part for _, part in own]).tolist()) == list(range(count))
        assert [last for last, _ in own] == [False] * (len(own) - 1) + [True]
        assert all(len(part) == batch for _, part in own[:-1])


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 15))
def test_fixed_iterations_are_full_batches_cut_from_whole_shuffles(count, batch, iterations):
    drawn = list(draw_batches(count, batch, None, iterations, torch_rng_for(0, "d")))
    assert [len(part) for _, _, part in drawn] == [batch] * iterations
    for shuffle in torch.cat([part for _, _, part in drawn]).split(count):
        assert len(set(shuffle.tolist())) == len(shuffle)
    for step, (epoch, last, _) in enumerate(drawn):
        assert epoch == step * batch // count  # the pass in which the batch begins
        assert last == (step == iterations - 1 or (step + 1) * batch // count > epoch)


def factors(steps=10, **options):
    return [learning_rate_factor(TrainingConfig.of(**options), step, steps) for step in range(steps)]


def test_schedules_by_hand():
    assert factors(schedule="constant") == [1.0] * 10
    assert factors(schedule="step", step_at=(0.6, 0.85)) == pytest.approx([1] * 6 + [0.1] * 3 + [0.01])
    cosine = factors(schedule="cosine", final_lr=0.2)
    assert cosine[0] == 1.0 and cosine[5] == pytest.approx(0.2 + 0.8 * 0.5)  # half way: cos(pi / 2) = 0
    assert all(a > b for a, b in zip(cosine, cosine[1:], strict=False))
    assert factors(warmup=3)[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    warm = factors(12, warmup=2, schedule="cosine", final_lr=0.0)
    assert warm[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert warm[7] == pytest.approx(0.5)  # 5 of the 10 steps after the warm-up


def test_warm_up_of_momentum_and_biases_by_hand():
    """Van Bommel, section 3: momentum 0.8 -> 0.937, bias lr 0.1 -> lr, other lr 0 -> lr; here in rounder numbers."""
    config = TrainingConfig.of(lr=0.01, momentum=0.9, warmup=4, warmup_momentum=0.5, warmup_bias_lr=0.1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))

    def rates(config, step):
        optimizer = build_optimizer(model, config.replace(optimizer="sgd"))
        set_rates(optimizer, config, step, 6)
        weights, norms, biases = optimizer.param_groups
        assert len(biases["params"]) == 2 and norms["lr"] == weights["lr"]
        return weights["lr"], biases["lr"], biases["momentum"]

    lr, bias_lr, momentum = zip(*(rates(config, step) for step in range(6)), strict=True)
    assert lr == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    assert bias_lr == pytest.approx([0.1, 0.0775, 0.055, 0.0325, 0.01, 0.01])
    assert momentum == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9])
    assert rates(config.replace(warmup=0), 0) == (0.01, 0.01, 0.9)  # no warm-up: nothing to start from


def test_the_number_of_batches_in_a_step_grows_over_the_warm_up_by_hand():
    """Section 3: 1 -> nominal / batch. 1 + 3 step / 6, rounded half to even."""
    config = TrainingConfig.of(batch=1, accumulate_to=4, warmup=6)
    assert [batches_per_step(config, step) for step in range(8)] == [1, 2, 2, 2, 3, 4, 4, 4]
    assert batches_per_step(TrainingConfig.of(batch=4, accumulate_to=2), 0) == 1  # less than a batch: a batch
