"""The loop of notebook 11 on a few scenes: seconds, not minutes; test_alfl.py breaks it off in other processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from fedal_utils import alfl, config, federation, record

SMALL = dict(
    scenes=(60, 8), start_images=10, start_iterations=6, clients=2, first=3, budget=2, cycles=2, rounds=2, iterations=2,
    batch=4, methods=("sum", "centralised"), seeds=(0,),
)  # fmt: skip


def settings(**changes) -> config.Config:
    return config.load("11_fedavg", "smoke", **{**SMALL, **changes})


def loop(root: Path, study: alfl.Study | None = None, order: int = 1, **changes) -> alfl.Study:
    """Run all methods; `order` = -1 turns the clients' order round. Returns the study, to be used again."""
    torch.set_num_threads(1)
    study = study or alfl.prepare(settings(**changes), device="cpu")
    for run in record.runs(study.config, "small", root=root, progress=False):
        clients, model = alfl.start(run, study)
        for cycle, round in run.rounds():
            if round == 0:
                for client in clients[::order]:
                    alfl.ask(run, study, model, client, cycle)
            updates = alfl.train(run, study, model, clients[::order], cycle, round)
            model.load_state_dict(federation.average(updates, study.config.weights), strict=False)
            alfl.commit(run, study, model, clients, updates, cycle, round)
    return study


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
