"""One run's folder (its files: results/README.md): append a round, save atomically, resume after a kill.

`state.pt` is renamed last and says how many rows of each CSV belong to it, so a run that is killed at any instant and
started again leaves `rounds.csv` and `queries.csv` as an unbroken run does, byte for byte.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .. import seeding
from ..config import Config
from . import files
from .environment import Progress, environment
from .stored import COLUMNS, STATES, digests, read_run, setting_folder

Plan = Callable[[Config, str], Sequence[tuple[int, int]]]  # config, method -> (cycle, round) of every round


def every_round(config: Config) -> list[tuple[int, int]]:
    """(cycle, round) of all rounds: as many in each cycle; after the last cycle's, the extra rounds."""
    cycles, rounds = config.query.cycles, config.federation.rounds
    extra = [(cycles - 1, rounds + number) for number in range(config.federation.extra_rounds)]
    return [(cycle, number) for cycle in range(cycles) for number in range(rounds)] + extra


_writers: "dict[Path, Run]" = {}  # folder -> the run that may write there; within a process the newest


class Run:
    """One seed of one method of one setting, made by `runs`.

    config, notebook, method, seed, fingerprint, folder: what and where. plan: (cycle, round) of every round.
    committed: rounds that are on disk. resumed: the `state` of the last of them if this run was broken off, else None.
    """

    def __init__(
        self,
        config: Config,
        notebook: str,
        method: str,
        seed: int,
        root: str | Path | None = None,
        plan: Plan | None = None,
        fingerprint: str = "",
    ):
        self.config, self.notebook, self.method, self.seed = config, notebook, method, int(seed)
        self.root, self.fingerprint = root, fingerprint
        self.folder = setting_folder(config, notebook, root) / files.folder_name(method) / f"seed{self.seed}"
        self.plan = list(plan(config, method) if plan else every_round(config))
        self.resumed: dict[str, Any] | None = None
        self.committed = 0
        self._sheets = {name: pd.DataFrame(columns=columns, dtype=object) for name, columns in COLUMNS.items()}
        self._lock = self._progress = None
        self._clock = time.monotonic()

    def __str__(self) -> str:
        return f"{self.notebook} {self.method} seed {self.seed}"

    def rounds(self) -> Iterator[tuple[int, int]]:
        """(cycle, round) of each round still to do; round counts from 0 within its cycle. Each must be committed."""
        for position in range(self.committed, len(self.plan)):
            yield self.plan[position]
            if self.committed != position + 1:
                raise RuntimeError(f"cycle, round {self.plan[position]} of {self} was not committed: see run.commit")

    def rng(self, *names: str | int) -> np.random.Generator:
        """The generator of that name for this run's seed; all methods draw the same, so starts are paired."""
        return seeding.rng_for(self.seed, *names)

    def torch_rng(self, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
        """As `rng`, for torch."""
        return seeding.torch_rng_for(self.seed, *names, device=device)

    def query_rows(self) -> list[dict[str, Any]]:
        """The committed rows of queries.csv, to rebuild the pools of a resumed run; score NaN where none was given."""
        return files.typed(self._sheets["queries"]).to_dict("records")

    def commit(
        self,
        cycle: int,
        number: int,
        rows: Sequence[Mapping[str, Any]],
        queries: Sequence[Mapping[str, Any]] = (),
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """End a round: add rows to rounds.csv and queries.csv, then save `state`, from which the next round can start.

        rows: one per client and one with client "server" that carries the metrics; further columns as they come;
            `cycle` and `round` are filled in. NaN is allowed for metrics only (a class without ground truth).
        queries: one per answered query, score NaN where none was given.
        state: tensors, numbers, strings, None, and lists, tuples and dicts of these.
        ValueError, before anything is written, if a value is not allowed.
        """
        if _writers.get(self.folder) is not self:
            raise RuntimeError(f"{self} is not open, or was started again by this process; nothing was written")
        due = self.plan[self.committed] if self.committed < len(self.plan) else "nothing, it is finished"
        if (cycle, number) != due:
            raise ValueError(f"commit of cycle {cycle}, round {number} in {self}: due is {due}")
        where = f"{self}, cycle {cycle}, round {number}"
        seconds = time.monotonic() - self._clock
        now = {"cycle": cycle, "round": number}
        sheets = {
            "rounds": files.with_rows(self._sheets["rounds"], rows, now, where),
            "queries": files.with_rows(self._sheets["queries"], queries, {"cycle": cycle}, where),
            "times": files.with_rows(self._sheets["times"], [{"seconds": f"{seconds:.3f}"}], now, where)[
                [*COLUMNS["times"]]
            ],
        }
        state = files.plain(dict(state or {}), f"{where}: state")
        for name, sheet in sheets.items():
            files.write_atomic(self.folder / f"{name}.csv", files.encode(sheet))
        entries = {n: {"rows": len(s), "columns": list(s), "sha256": files.sha256(s)} for n, s in sheets.items()}
        last, before = (self.folder / name for name in STATES)
        if last.exists():
            os.replace(last, before)
        files.save_state(
            last, {"committed": self.committed + 1, "sheets": entries, "state": state}
        )  # the round exists now
        self._sheets, self.committed = sheets, self.committed + 1
        self._clock = time.monotonic()
        self._finish()
        if self._progress is not None:
            place = f"{self}  cycle {cycle + 1} round {number + 1}, {self.committed} of {len(self.plan)}"
            self._progress.step(place, rows, seconds)

    def _open(self, progress: bool) -> bool:
        """Take up what is in the folder, if nobody else works there. Returns False if the run is finished."""
        if self._done():
            return False  # needs no lock, and no disk that can be written
        self._lock = files.lock(self.folder / ".lock")
        _writers[self.folder] = self
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        if self._done():
            return False
        if not self._fits():
            warnings.warn(f"{self}: the data set is not the one of this run, which starts anew", stacklevel=3)
            self._set_aside("other-data", self.folder.glob("[!.]*"))
        if not (self.folder / "config.json").exists():
            facts = {"notebook": self.notebook, "method": self.method, "seed": self.seed}
            facts |= {"digest": self.config.digest(), "fingerprint": self.fingerprint, "config": self.config.flat()}
            files.write_json(self.folder / "config.json", facts)
        stored = read_run(self.folder)
        for problem in stored.damaged if stored else ():
            back = f"going back to round {stored.committed} of {len(self.plan)}"
            warnings.warn(f"{self}: {problem}; {back}", stacklevel=3)
        if stored and stored.sheets:
            self.resumed, self.committed, self._sheets = stored.state, stored.committed, stored.sheets
            for name, sheet in stored.sheets.items():  # cut what a kill left beyond the commit
                files.write_atomic(self.folder / f"{name}.csv", files.encode(sheet))
        elif stored:
            self._set_aside("damaged", [f for kind in ("*.csv", "*.pt") for f in self.folder.glob(kind)])
        if self._finish():  # killed between the last commit and its closing note
            return False
        self._progress = Progress(f"{self}", len(self.plan), self.committed) if progress else None
        self._clock = time.monotonic()
        return True

    def _done(self) -> bool:
        return (self.folder / "done.json").exists() and self._fits() and bool(read_run(self.folder))

    def _fits(self) -> bool:
        """False if the folder holds a run of other data; ValueError if it holds one of another setting."""
        path = self.folder / "config.json"
        found = files.read_json(path)
        if found and found.get("digest") != self.config.digest():
            raise ValueError(f"{path} belongs to another setting: move that folder away")
        return not (found and self.fingerprint) or found.get("fingerprint") == self.fingerprint

    def _set_aside(self, why: str, moved: Iterable[Path]) -> None:
        """Move files of the folder to one of its own in there, config.json last."""
        aside = self.folder / f"before-{why}-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.mkdir(exist_ok=True)
        for file in sorted((f for f in moved if f.is_file()), key=lambda f: f.name == "config.json"):
            os.replace(file, aside / file.name)

    def _finish(self) -> bool:
        """Write the closing notes if every round is committed; whether it is."""
        if self.committed < len(self.plan):
            return False
        minutes = self._sheets["times"]["seconds"].astype(float).sum() / 60  # over all starts
        files.write_json(self.folder / "env.json", {**environment(), "minutes": round(minutes, 3)})
        files.write_json(self.folder / "done.json", {"rounds": self.committed, "sha256": digests(self._sheets)})
        (self.folder / STATES[1]).unlink(missing_ok=True)
        return True


def runs(
    config: Config,
    notebook: str,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    root: str | Path | None = None,
    progress: bool = True,
    plan: Plan | None = None,
    fingerprint: str = "",
) -> Iterator[Run]:
    """Every run that is still to do, seed by seed and method by method: finished ones are skipped, broken ones resumed.

    methods, seeds: those of the config unless given.
    root: `results/runs` of the checkout unless given.
    progress: show it, see `environment.Progress`.
    plan: the (cycle, round) pairs of a method, where they are not the same for all (see `every_round`).
    fingerprint: stands for the data (ids, labels, files); a run of other data starts anew.
    RuntimeError if another process works in a run's folder; ValueError if its config.json differs or a CSV was changed.
    """
    for seed in config.seeds if seeds is None else seeds:
        for method in config.methods if methods is None else methods:
            run = Run(config, notebook, method, seed, root, plan, fingerprint)
            try:
                if run._open(progress):
                    yield run
            finally:
                if run._progress is not None:
                    run._progress.bar.close()
                if run._lock is not None:
                    run._lock.release()
                if _writers.get(run.folder) is run:
                    del _writers[run.folder]
