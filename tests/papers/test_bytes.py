"""Bytes as van Bommel's released analysis counts them, by its published figures and by hand."""

import pytest
import torch

from fedal_utils import detectors, federation, papers, training
from fedal_utils.papers import van_bommel


def test_paper_megabytes_are_the_published_figures():
    each = van_bommel.paper_megabytes
    assert [each("fedavg", r) for r in range(3)] == pytest.approx([252.306, 504.612, 756.918], abs=5e-4)
    assert [each("local-first", r) for r in (0, 21, 22)] == pytest.approx([252.306, 252.306, 504.612], abs=5e-4)
    for scheme in ("chain", "chain-fedavg", "accumulate"):
        assert [each(scheme, d) for d in range(9)] == pytest.approx([(d + 1) * 28.034 for d in range(9)], abs=5e-4)
        assert each(scheme, 9) == pytest.approx(252.306, abs=5e-4)  # the merge sends nothing
    for r, d in ((1, 0), (1, 8), (3, 4)):
        by_hand = 252.306 + 2 * 5.7 * 9 * (r - 1) + 2 * 5.7 * (d + 1)
        assert each("chain", 9 + 9 * (r - 1) + d + 1) == pytest.approx(by_hand, abs=5e-4)
    assert each("chain-fedavg", 10) - each("chain-fedavg", 9) == pytest.approx(102.6, abs=5e-4)
    assert each("accumulate", 18) - each("accumulate", 9) == pytest.approx(346.644, abs=5e-4)
    assert each("centralised", 7) == 0
    small = {"full": 1.0, "head": 0.5, "optimizer": 0.0}
    assert each("chain", 1, 2, sizes=small) == 4 and each("chain", 4, 2, sizes=small) == 4 + 2 * 1.0


@pytest.fixture(scope="module")
def setup():
    small = papers.load("11_fedavg", scenes=(30, 8), initial_model_images=5, held_out_images=2, clients=2, cycles=2)
    return federation.prepare(small, device="cpu")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_size_of_an_optimizers_state_is_that_of_a_real_one(setup, optimizer):
    config, state = setup.config.replace(optimizer=optimizer), {}
    model = detectors.build(config, len(setup.class_names), torch.Generator().manual_seed(0))
    task = training.LocalTask(torch.Generator().manual_seed(0), iterations=1, optimizer_state=state)
    images, labels = setup.train.images.take([0]), setup.train.labels.take([0])
    list(training.fit(model, images, labels, config.training, task))
    sizes = van_bommel.message_sizes(federation.Setup(**{**vars(setup), "config": config}))
    assert round(1e6 * sizes["optimizer"]) == len(federation.pack(state))
    assert sizes["head"] < 0.5 * sizes["full"]
