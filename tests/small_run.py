"""The loops of notebooks 11 and 12 on a few scenes: seconds, not minutes; test_alfl.py kills it in other processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from fedal_utils import config, papers, record
from fedal_utils.federation import experiment as alfl

SMALL = dict(
    scenes=(60, 8),
    initial_model_images=10,
    initial_model_iterations=6,
    clients=2,
    initial_labels=3,
    query_size=2,
    cycles=2,
    rounds=2,
    iterations=2,
    batch=4,
    methods=("sum", "centralised"),
    seeds=(0,),
)


def settings(**changes) -> config.Config:
    return papers.load("00_start_here", "smoke", **{**SMALL, **changes})


def loop(
    root: Path, study: alfl.Study | None = None, order: int = 1, enough: int | None = None, **changes
) -> alfl.Study:
    """Run all methods as notebooks 11 and 12 do. Returns the study, to be used again.

    order: -1 turns the clients' order round in every round of all clients. enough: break off after so many commits.
    """
    torch.set_num_threads(1)
    study = study or alfl.prepare(settings(**changes), device="cpu")
    commits = 0
    for run in record.runs(study.config, "small", root=root, plan=alfl.plan, progress=False):
        chained = alfl.scheme_of(run.method)[0] in alfl.CHAINS
        clients, model = alfl.start(run, study)
        for cycle, round in run.rounds():
            if commits == enough:
                raise BrokenOff
            turn = alfl.whose_turn(run, clients, cycle, round)
            for client in turn.clients[::order] if turn.asks else ():
                alfl.ask(run, study, model, client, cycle)
            updates = alfl.train(run, study, model, clients if chained else clients[::order], cycle, round)
            if alfl.apart(run, cycle):
                alfl.keep(clients, updates)
            else:
                alfl.merge(run, model, clients, updates)
            if turn.merge:
                alfl.merge_by_class(run, study, model, clients)
            alfl.commit(run, study, model, clients, updates, cycle, round)
            commits += 1
    return study


class BrokenOff(Exception):
    """The loop ended after as many commits as it was told."""


def killed_at(root: Path, writes: int) -> None:
    """Run the loop and kill this process just before its n-th atomic write, or just after where n is odd."""
    passed, original = 0, record.write_atomic

    def doomed(path, content):
        nonlocal passed
        passed += 1
        if passed == writes and writes % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        out = original(path, content)
        if passed == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    record.write_atomic = doomed
    loop(root)
