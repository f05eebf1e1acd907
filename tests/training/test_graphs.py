"""A detector's gradients as graphs against the eager ones; on a CPU the same operations without a graph."""

import sys

import pytest
import torch

from fedal_utils import data, training
from fedal_utils.config import Config, TrainingConfig
from fedal_utils.data import Digits
from fedal_utils.detectors import build
from fedal_utils.seeding import torch_rng_for
from fedal_utils.training import LocalTask, graphs

RECIPES = {
    "adamw": dict(lr=2e-3, clip=1.0, ema=0.9, warmup=2),
    "sgd": dict(lr=5e-3, optimizer="sgd", momentum=0.9, warmup=3, warmup_momentum=0.5, warmup_bias_lr=0.05, clip=0.0),
}


@pytest.fixture(scope="module")
def scenes():
    return data.load("digits", (64, 64), digits=Digits((6, 1), 3))[0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("detector", ["ssd", "yolo"])
def test_steps_with_graphs_are_the_steps_without(scenes, monkeypatch, detector, recipe):
    """Two calls with an optimizer that lives on, gradients of two batches a step, a short last batch."""
    config = TrainingConfig.of(batch=4, accumulate_to=8, epochs=2, colour=0.2, **RECIPES[recipe])
    shape = dict(width_multiple=0.125, depth_multiple=0.1) if detector == "yolo" else dict(norm="batch")
    whole = Config.of(detector=detector, image_size=(64, 64), **shape)
    runs = []
    graphs._GRAPHS.clear()
    for graphed in (False, True):
        monkeypatch.setattr(sys.modules["fedal_utils.training.fit"], "GRAPHED", ("cpu",) * graphed)
        model, state, losses = build(whole, 3, torch_rng_for(0, "weights")), {}, []
        for call in range(2):
            task = LocalTask(torch_rng_for(call, "fit"), optimizer_state=state, schedule_position=(4 * call, 8))
            rows = list(training.fit(model, scenes.images, scenes.labels, config, task))
            losses += [row["loss"] for row in rows]
        runs.append((model.state_dict(), state, losses))
    assert len(graphs._GRAPHS) == 1  # the second call took the first one's
    (wanted, kept, losses), (got, state, same) = runs
    assert same == pytest.approx(losses, rel=1e-4) and state.keys() == kept.keys()
    start = build(whole, 3, torch_rng_for(0, "weights")).state_dict()
    for ours, theirs, first in ((got, wanted, start), (state, kept, {})):
        pairs = [(ours[k].double(), v.double(), first.get(k, torch.zeros(())).double()) for k, v in theirs.items()]
        apart, way = (sum(float((p[0] - p[i]).square().sum()) for p in pairs) for i in (1, 2))
        assert apart < 1e-6 * way  # a thousandth of the way that weights went
