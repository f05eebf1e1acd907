"""A deterministic experiment without a detector, to break off and resume; tests/record run it in other processes."""

import os
import signal
import time
from pathlib import Path

import filelock
import torch

from fedal_utils import record
from fedal_utils.config import Config
from fedal_utils.record import files

CONFIG = Config.of(cycles=2, rounds=2, profile="quick", methods=("sum", "random"), seeds=(0,))


def loop(root: Path, config: Config = CONFIG, stop_after: int = 0) -> None:
    """State: weights, a float64 moment and the generator's own; every number depends on all before it."""
    for run in record.runs(config, "tiny", root=root):
        first = {"w": torch.randn(3, generator=run.torch_rng("start"))}
        start = record.shared(config, "tiny", run.seed, "start", lambda first=first: first, root)
        draws = run.torch_rng("draws", run.method)
        weights, moment, ids = start["w"].clone(), torch.zeros(3, dtype=torch.float64), []
        if run.resumed:
            weights, moment, ids = run.resumed["weights"], run.resumed["moment"], run.resumed["ids"]
            draws.set_state(run.resumed["draws"])
        for cycle, number in run.rounds():
            queries = []
            if number == 0:
                asked = [(k, f"image,{cycle}-{k}") for k in range(2)]
                queries = [{"client": k, "id": i, "score": float(torch.rand((), generator=draws))} for k, i in asked]
                ids = ids + [row["id"] for row in queries]
            step = torch.randn(3, generator=draws) * run.config.training.lr + run.rng("noise", cycle, number).normal()
            weights = weights + step
            moment = 0.9 * moment + weights.double() / 3
            if stop_after and run.committed == stop_after:
                raise ZeroDivisionError("broken off")
            costs = {"images": len(ids), "boxes": 3 * len(ids), "steps": 5}
            rows = [{"client": k, **costs, "loss": float(weights[k].abs()), "bytes_up": 4 * k} for k in range(2)]
            rows.append({"client": "server", "images": 2 * len(ids), "seconds": 2.5 * len(ids)})
            if number == run.config.federation.rounds - 1:  # a new column, as with rare evaluation
                rows[-1] |= {"ap50": float(torch.sigmoid(weights.sum())), "ap50/empty class": float("nan")}
            state = {"weights": weights, "moment": moment, "ids": ids, "draws": draws.get_state(), "note": ("a", 1)}
            run.commit(cycle, number, rows, queries, state)


def killed_at(root: Path, instant: int, loop=loop) -> None:
    """Run a loop and kill this process at the n-th instant; an atomic write has the five numbered below."""
    passed = []

    def instant_passes() -> None:
        if len(passed) == instant:
            os.kill(os.getpid(), signal.SIGKILL)
        passed.append(1)

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

    files.open, os.fsync, os.replace = doomed_open, doomed_fsync, doomed_replace
    loop(root)
    (root / "all instants passed").touch()


def hold(path: Path) -> None:
    """Take a lock, say so in a file beside it, and keep it for a minute."""
    path.parent.mkdir(parents=True)
    with filelock.FileLock(path):
        path.with_name("held").touch()
        time.sleep(60)


def share(root: Path, number: int) -> None:
    """Ask for a shared state of random numbers; write down what came, and that it was made."""

    def make() -> torch.Tensor:
        time.sleep(0.2)
        (root / f"made by {number}").touch()
        return torch.rand(2, generator=torch.Generator().manual_seed(number))

    (root / f"got by {number}").write_text(str(record.shared(CONFIG, "tiny", 0, "start", make, root).tolist()))
