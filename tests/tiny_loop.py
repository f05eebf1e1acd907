"""A deterministic experiment without a detector, to break off and resume; test_record.py runs it in other processes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import torch

from fedal_utils.record import run as record


@dataclasses.dataclass(frozen=True)
class Config:
    """As much of a config as `record` reads."""

    cycles: int = 2
    rounds: int = 2
    lr: float = 0.1
    sizes: tuple[int, ...] = (4, 3)
    profile: str = "quick"
    methods: tuple[str, ...] = ("sum", "random")
    seeds: tuple[int, ...] = (0,)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def digest(self) -> str:
        values = {k: v for k, v in self.as_dict().items() if k not in ("methods", "seeds")}
        return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()


def rows_of(run: record.Run, cycle: int, round: int, weights: torch.Tensor, asked: int) -> list[dict]:
    """Two clients and the server; a new metric column appears at the end of each cycle, as with rare evaluation."""
    clients = [
        {
            "client": k,
            "images": asked,
            "boxes": 3 * asked,
            "loss": float(weights[k].abs()),
            "bytes_up": 4 * k,
            "steps": 5,
        }
        for k in range(2)
    ]
    server = {"client": "server", "images": 2 * asked, "seconds": 2.5 * asked}
    if round == run.config.federation.rounds - 1:
        server |= {"ap50": float(torch.sigmoid(weights.sum())), "ap50/empty class": float("nan")}
    return [*clients, server]


def loop(root: Path, config: Config | None = None, pause: float = 0.0) -> None:
    """State: weights, a float64 moment and the generator's own state; every number depends on all before it."""
    config = config or Config.of()
    for run in record.runs(config, "tiny", root=root, progress=False):
        start = record.shared(
            config,
            "tiny",
            run.seed,
            "start",
            lambda run=run: {"w": torch.randn(3, generator=run.torch_rng("start"))},
            root,
        )
        draws = run.torch_rng("draws", run.method)
        weights, moment, ids = start["w"].clone(), torch.zeros(3, dtype=torch.float64), []
        if run.resumed:
            weights, moment, ids = run.resumed["weights"], run.resumed["moment"], run.resumed["ids"]
            draws.set_state(run.resumed["draws"])
        for cycle, round in run.rounds():
            asked = []
            if round == 0:
                asked = [
                    {"client": k, "id": f"image,{cycle}-{k}", "score": float(torch.rand((), generator=draws))}
                    for k in range(2)
                ]
                ids = ids + [row["id"] for row in asked]
            step = torch.randn(3, generator=draws) * run.config.training.lr + run.rng("noise", cycle, round).normal()
            weights = weights + step
            moment = 0.9 * moment + weights.double() / 3
            time.sleep(pause)
            state = {
                "weights": weights,
                "moment": moment,
                "ids": ids,
                "draws": draws.get_state(),
                "note": ("a", 1, None),
            }
            run.commit(cycle, round, rows_of(run, cycle, round, weights, len(ids)), asked, state)


def killed_at(root: Path, instant: int) -> None:
    """Run the loop and kill this process at the n-th instant; an atomic write has the five numbered below."""
    passed = 0

    def instant_passes() -> None:
        nonlocal passed
        if passed == instant:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    original_fsync, original_replace, original_open = os.fsync, os.replace, open

    def doomed_open(path, mode="r", *rest, **named):
        file = original_open(path, mode, *rest, **named)
        if mode == "wb":
            file.write(b"half a fi")  # what a full buffer would have put on disk
            file.flush()
            instant_passes()  # 1: the temporary file is half-written
            file.seek(0)
            file.truncate()
        return file

    def doomed_fsync(descriptor):
        instant_passes()  # 2: written, not yet on disk; and 5: renamed, the folder not yet on disk
        return original_fsync(descriptor)

    def doomed_replace(source, target):
        instant_passes()  # 3: just before the rename
        original_replace(source, target)
        instant_passes()  # 4: just after the rename

    record.open, os.fsync, os.replace = doomed_open, doomed_fsync, doomed_replace
    loop(root)
    (root / "all instants passed").touch()


if __name__ == "__main__":
    loop(Path(sys.argv[1]), pause=float(sys.argv[2]))
