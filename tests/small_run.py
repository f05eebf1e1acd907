"""The loop of all notebooks on a few scenes: seconds, not minutes."""

from pathlib import Path

import torch

from fedal_utils import config, federation, papers
from fedal_utils.federation import Experiment, Setup

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
