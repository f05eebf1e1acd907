"""The loop of all notebooks on a few scenes: seconds, not minutes."""

from pathlib import Path

import torch

from fedal_utils import config, federation, papers
from fedal_utils.data import Dataset, Images, Labels
from fedal_utils.federation import Experiment, Setup
from fedal_utils.training import CachedImages

SMALL = dict(
    **dict(scenes=(60, 8), digit_classes=3, initial_model_images=6, initial_model_iterations=6, held_out_images=6),
    **dict(clients=2, initial_labels=2, query_size=2, cycles=2, rounds=2, extra_rounds=1, iterations=2, batch=4),
    **dict(first_pass_rounds=2, visit_fraction=0.5, zoom=(1.0, 1.0), shift=0.0, colour=0.0),
    **dict(score_above=0.05, round_lr_decay=0.2, methods=("sum", "centralised"), seeds=(0,)),
)


def settings(**changes) -> config.Config:
    return papers.load("00_start_here", "smoke", **{**SMALL, **changes})


def prepared(**changes) -> Setup:
    torch.set_num_threads(1)
    return federation.prepare(settings(**changes), device="cpu")


def heaps(count: int, **changes) -> Setup:
    """A flywheel over four heaps of features, 40 of them in the test set; its photos are black."""
    rng, names = torch.Generator().manual_seed(0), ("ant", "bee", "cow", "dog")
    centres, sets = 3 * torch.randn(4, 6, generator=rng), []
    for name, size in (("train", count), ("test", 40)):
        classes, ids = torch.arange(size) % 4, tuple(f"{name}/{i:04d}.png" for i in range(size))
        cached = (centres[classes] + torch.randn(size, 6, generator=rng),)
        sizes, no = torch.tensor([[20, 10]] * size), torch.zeros(size, 1, dtype=torch.bool)
        labels = Labels(torch.tensor([0.0, 0, 8, 8]).repeat(size, 1, 1), classes[:, None] + 1, no, no.clone())
        photos = Images(ids, torch.zeros(size, 3, 8, 8, dtype=torch.uint8), sizes)
        features = CachedImages(ids, cached, None, sizes, (8, 8), None)
        sets.append([Dataset(name, images, labels, names) for images in (features, photos)])
    (train, photos), (test, others) = sets
    config = papers.load("50_flywheel", "smoke", seconds_per_box=0.0, **changes)
    return Setup(config, train, test, (photos, others), torch.device("cpu"))


class BrokenOff(Exception):
    """The loop ended after as many logged rounds as it was told."""


def one(experiment: Experiment, enough: int | None = None) -> int:
    """The rounds of one run; returns how many it logged."""
    logged = 0
    for step in experiment.steps():
        if logged == enough:
            raise BrokenOff
        for client in step.querying:
            experiment.query(step, client)
        updates = experiment.train(step)
        experiment.aggregate(step, updates)
        experiment.log(step, updates)
        logged += 1
    return logged


def results(root: Path, method: str = "*") -> dict[str, bytes]:
    """The files that must not depend on how a loop came to its end."""
    files = [path for name in ("rounds", "queries") for path in root.rglob(f"{method}/seed*/{name}.csv")]
    assert files
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def loop(root: Path, setup: Setup | None = None, enough: int | None = None, turned: bool = False, **changes) -> Setup:
    """Run all methods. Returns the setup, to be used again. enough: break off a run after so many rounds.

    turned: the clients stand in the other order (not for chains, whose order is the scheme's).
    """
    setup = setup or prepared(**changes)
    for run in federation.runs(setup, "small", root=root):
        experiment = federation.start(run, setup)
        if turned:
            experiment.clients.reverse()
        one(experiment, enough)
    return setup
