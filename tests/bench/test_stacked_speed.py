"""M clients as one stacked model against one client after another, on the machine at hand; no assertion on time.

Clients have unequal class counts, with KAFAL's distillation, in fixed iterations, at the two CPU sizes of notebook 30,
and on a CPU also with every client in one stack, whatever `training.clients_per_stack` says.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_speed import in_turn

from fedal_utils import seeding, training
from fedal_utils.config import Config, TrainingConfig
from fedal_utils.data import Images
from fedal_utils.detectors import build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("clients", [2, 5, 10, 20])
@pytest.mark.parametrize(("side", "batch", "steps"), [(16, 16, 8), (32, 16, 4)], ids=["digits", "cifar"])
def test_clients_at_once(clients, side, batch, steps):
    count = 40 * clients
    rng = seeding.torch_rng_for(0, "bench", "stack")
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=rng)
    images = Images(tuple(map(str, range(count))), pixels, torch.full((count, 2), side), None).to(DEVICE)
    model = build(Config.of(classifier="resnet8", image_size=(side, side)), 10, rng).to(DEVICE)
    recipe = TrainingConfig.of(
        batch=batch, optimizer="sgd", lr=0.01, momentum=0.9, clip=0.0, crop=2, balanced=True, compensation=1.0
    )
    state = {k: v.cpu() for k, v in model.state_dict().items() if v.dim()}

    def lessons():
        out = []
        for m in range(clients):
            classes = torch.randint(m % 5, 10, (20,), generator=rng)
            out.append(
                training.Lesson(
                    str(m),
                    np.arange(40 * m, 40 * m + 20),
                    classes,
                    torch.bincount(classes, minlength=10),
                    np.arange(40 * m + 20, 40 * m + 40),
                    seeding.torch_rng_for(0, m),
                )
            )
        return out

    def together(most=None):
        training.fit_stacked(
            model, [state] * clients, lessons(), images, recipe, steps, teacher=model, device=DEVICE, most=most
        )

    def apart():
        for lesson in lessons():
            training.fit_classifier(copy.deepcopy(model), lesson, images, recipe, steps, teacher=model, device=DEVICE)

    name = f"M={clients}, {side} px, batch {batch}, ResNet-8"
    in_turn(f"{name}: stacked against sequential", together, apart, runs=7)
    if DEVICE == "cpu" and training.clients_per_stack(batch, (side, side), DEVICE) < clients:
        in_turn(f"{name}: all in one stack against sequential", lambda: together(clients), apart, runs=5)
