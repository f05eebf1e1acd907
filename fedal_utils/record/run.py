"""One run's folder (its files: results/README.md): append a round, save atomically, resume after a kill.

`state.pt` is renamed last and says how many rows of each CSV belong to it, so a run that is killed at any instant and
started again leaves `rounds.csv` and `queries.csv` as an unbroken run does, byte for byte.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from .. import seeding
from ..config import Config
from . import files
from .environment import environment, progress

COLUMNS = {  # seconds in rounds: estimated annotation seconds, the third cost; in times: wall seconds
    "rounds": ("cycle", "round", "client", "images", "boxes", "seconds", "bytes_up", "bytes_down", "loss", "steps"),
    "queries": ("cycle", "client", "id", "score"),
    "times": ("cycle", "round", "seconds"),
}
LOCK_WAIT = 5.0  # seconds: a killed notebook's kernel notices within one or two that its parent is gone
STATES = ("state.pt", "state-before.pt")
Plan = Callable[[Config, str], Sequence[tuple[int, int]]] | None  # config, method -> (cycle, round) of every round
Rows = Sequence[Mapping[str, Any]]
Root = str | Path | None  # folder of runs; None: `results/runs`


def runs_folder(notebook: str, root: Root) -> Path:
    """Where the runs of a notebook lie."""
    return Path(root or files.project_root() / "results" / "runs") / notebook


def read_run(folder: Path, digest: str, fingerprint: str = "") -> SimpleNamespace | None:
    """All of a finished run, the last good state of a broken one, or nothing; None if it is a run of other data.

    sheets: texts, keys of COLUMNS. damaged: states that could not be read.
    ValueError naming the file that was cut or changed, or belongs to another setting (digest: of the config).
    """
    facts = files.read_json(folder / "config.json")
    if facts.get("digest", digest) != digest:
        raise ValueError(f"{folder / 'config.json'} belongs to another setting: move that folder away")
    if fingerprint and facts.get("fingerprint", fingerprint) != fingerprint:
        return None
    stored = SimpleNamespace(committed=0, done=False, sheets={}, state=None, damaged=[])
    stored.fingerprint = facts.get("fingerprint", "")
    if (folder / "done.json").exists():
        note, stored.done = files.read_json(folder / "done.json"), True
        stored.sheets = {name: files.read_sheet(folder / f"{name}.csv") for name in COLUMNS}
        stored.committed = note.get("rounds", 0)
        if not stored.committed or note.get("sha256") != _digests(stored.sheets):
            raise ValueError(f"rounds.csv, queries.csv or done.json of {folder} was changed: {files.ADVICE}")
        return stored
    for path in (folder / name for name in STATES if (folder / name).exists()):
        try:
            content = files.load_state(path)
        except ValueError as error:
            stored.damaged.append(str(error))
            continue
        for name, entry in content["sheets"].items():
            sheet = files.read_sheet(folder / f"{name}.csv")
            if set(entry["columns"]) <= set(sheet):
                sheet = sheet[entry["columns"]].head(entry["rows"])
            if files.sha256(sheet) != entry["sha256"]:
                raise ValueError(f"{folder / name}.csv was cut or changed: {files.ADVICE}")
            stored.sheets[name] = sheet
        stored.committed, stored.state = content["committed"], content["state"]
        break
    return stored


def _digests(sheets: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    return {f"{name}.csv": files.sha256(sheets[name]) for name in ("rounds", "queries")}


def every_round(config: Config) -> list[tuple[int, int]]:
    """(cycle, round) of all rounds: as many in each cycle; after the last cycle's, the extra rounds."""
    cycles, rounds, extra = config.query.cycles, config.federation.rounds, config.federation.extra_rounds
    return [(cycle, n) for cycle in range(cycles) for n in range(rounds + extra * (cycle == cycles - 1))]


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
        root: Root = None,
        plan: Plan = None,
        fingerprint="",
    ):
        self.config, self.notebook, self.method, self.seed = config, notebook, method, int(seed)
        self.root, self.fingerprint = root, fingerprint
        self.folder = runs_folder(notebook, root) / config.digest()[:8] / method / f"seed{self.seed}"
        self.plan = list(plan(config, method) if plan else every_round(config))
        self.resumed: dict[str, Any] | None = None
        self.committed = 0
        self._sheets = {name: pd.DataFrame(columns=columns, dtype=object) for name, columns in COLUMNS.items()}
        self._clock = time.monotonic()
        self.place, self.later, self.pace = "", 0, []  # run k of n; rounds of the runs after it; seconds of rounds

    def __str__(self) -> str:
        return f"{self.notebook} {self.method} seed {self.seed}"

    def rounds(self) -> Iterator[tuple[int, int]]:
        """(cycle, round) of each round still to do; round counts from 0 within its cycle. Each must be committed."""
        options = {"total": len(self.plan), "unit": "round", "disable": progress() != "bar"}
        options["desc"] = f"{self}{self.place}"
        for position in tqdm(range(self.committed, len(self.plan)), initial=self.committed, **options):
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
        self, cycle: int, number: int, rows: Rows, queries: Rows = (), state: Mapping[str, Any] | None = None
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
        seconds, now = time.monotonic() - self._clock, {"cycle": cycle, "round": number}
        times = [{**now, "seconds": f"{seconds:.3f}"}]
        added = {"rounds": (rows, now), "queries": (queries, {"cycle": cycle}), "times": (times, {})}
        sheets = {name: files.with_rows(self._sheets[name], *new, where) for name, new in added.items()}
        state = files.plain(dict(state or {}), f"{where}: state")
        for name, sheet in sheets.items():
            files.write_atomic(self.folder / f"{name}.csv", files.encode(sheet))
        entries = {n: {"rows": len(s), "columns": list(s), "sha256": files.sha256(s)} for n, s in sheets.items()}
        last, before = (self.folder / name for name in STATES)
        if last.exists():
            os.replace(last, before)
        content = {"committed": self.committed + 1, "sheets": entries, "state": state}
        files.save_state(last, content)  # the round exists now
        self._sheets, self.committed = sheets, self.committed + 1
        self.pace.append(seconds)
        self._clock = time.monotonic()
        self._finish()
        if progress() == "lines":
            server = next((row for row in rows if row.get("client") == "server"), {})
            shown = [name for name in ("images", "ap50", "accuracy", "loss") if server.get(name) is not None]
            place = f"{self}{self.place}  cycle {cycle + 1} round {number + 1}, {self.committed} of {len(self.plan)}"
            left = (len(self.plan) - self.committed + self.later) * float(np.mean(self.pace)) / 60
            told = [place, *(f"{n} {float(server[n]):.4g}" for n in shown), f"{seconds:.1f} s"]
            print(*told, f"about {left:.2g} min to go", sep="  ", flush=True)

    def _open(self, ending: contextlib.ExitStack) -> bool:
        """Take up what is in the folder, if nobody else works there. Returns False if the run is finished."""
        run = self.folder, self.config.digest(), self.fingerprint
        if (self.folder / "done.json").exists() and (stored := read_run(*run)) and stored.done:
            return False  # needs no lock, and no disk that can be written
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.folder.absolute() / ".lock", is_singleton=True, thread_local=False)
        try:  # vanishes with the process, which itself may take the folder once more
            ending.enter_context(lock.acquire(timeout=LOCK_WAIT))
        except filelock.Timeout:
            raise RuntimeError(f"{self.folder} is in use by another process") from None
        _writers[self.folder] = self
        ending.callback(lambda: _writers.get(self.folder) is self and _writers.pop(self.folder))
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        stored = read_run(*run)
        if stored and stored.done:
            return False
        for problem in stored.damaged if stored else ():
            back = f"going back to round {stored.committed} of {len(self.plan)}"
            warnings.warn(f"{self}: {problem}; {back}", stacklevel=3)
        if stored is None:
            print(
                f"{self}: images or labels are others than before, so it starts anew; the old run is kept", flush=True
            )
        if stored is None or (stored.damaged and not stored.committed):
            aside = self.folder / f"before-{'damaged' if stored else 'other-data'}-{time.strftime('%Y%m%d-%H%M%S')}"
            aside.mkdir(exist_ok=True)
            there = [file for file in self.folder.glob("[!.]*") if file.is_file()]
            for file in sorted(there, key=lambda file: file.name == "config.json"):  # which goes last
                os.replace(file, aside / file.name)
        if not (self.folder / "config.json").exists():
            facts = {"notebook": self.notebook, "method": self.method, "seed": self.seed}
            facts |= {"digest": self.config.digest(), "fingerprint": self.fingerprint, "config": self.config.flat()}
            files.write_atomic(self.folder / "config.json", facts)
        if stored and stored.committed:
            self.resumed, self.committed, self._sheets = stored.state, stored.committed, stored.sheets
            for name, sheet in stored.sheets.items():  # cut what a kill left beyond the commit
                files.write_atomic(self.folder / f"{name}.csv", files.encode(sheet))
        if self._finish():  # killed between the last commit and its closing note
            return False
        self._clock = time.monotonic()
        return True

    def _finish(self) -> bool:
        """Write the closing notes if every round is committed; whether it is."""
        if self.committed < len(self.plan):
            return False
        minutes = self._sheets["times"]["seconds"].astype(float).sum() / 60  # over all starts
        files.write_atomic(self.folder / "env.json", {**environment(), "minutes": round(minutes, 3)})
        files.write_atomic(self.folder / "done.json", {"rounds": self.committed, "sha256": _digests(self._sheets)})
        (self.folder / STATES[1]).unlink(missing_ok=True)
        return True


def runs(
    config: Config,
    notebook: str,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    root: Root = None,
    plan: Plan = None,
    fingerprint: str = "",
    arm: str = "",
) -> Iterator[Run]:
    """Every run that is still to do, seed by seed and method by method: finished ones are skipped, broken ones resumed.

    plan: the (cycle, round) pairs of a method, where they are not the same for all (see `every_round`).
    fingerprint: stands for the data (ids, labels, files); a run of other data starts anew. arm: for the progress line.
    RuntimeError if another process works in a run's folder; ValueError if its config.json differs or a CSV was changed.
    """
    pairs = product(config.seeds if seeds is None else seeds, config.methods if methods is None else methods)
    every, pace = [Run(config, notebook, method, seed, root, plan, fingerprint) for seed, method in pairs], []
    for number, run in enumerate(every, 1):
        run.place, run.pace = f", run {number} of {len(every)}{arm and f' ({arm})'}", pace
        run.later = sum(len(other.plan) for other in every[number:] if not (other.folder / "done.json").exists())
        with contextlib.ExitStack() as ending:
            if run._open(ending):
                yield run


def state(config: Config, notebook: str, method: str, seed: int, root: Root = None) -> dict[str, Any] | None:
    """The last committed state of a run, finished or not (to look at its model); None if this machine has none."""
    path = Run(config, notebook, method, seed, root).folder / STATES[0]
    return files.load_state(path)["state"] if path.exists() else None


def shared(
    config: Config, notebook: str, seed: int, name: str, make: Callable[[], Any], root: Root = None, fingerprint=""
) -> Any:
    """What all methods of a seed start from (the initial model): made once, saved, loaded from then on, on the CPU.

    make: returns what `Run.commit` accepts as a state; a second process that asks meanwhile waits.
    fingerprint: it is made anew where the file belongs to other data, or is damaged.
    """
    path = runs_folder(notebook, root) / config.digest()[:8] / "shared" / f"{name}-seed{seed}.pt"
    where, content = f"{notebook}: shared {name!r} of seed {seed}", None
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.stem}.lock")):
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
            leftover.unlink()
        if path.exists():
            try:
                content = files.load_state(path)
            except ValueError as error:
                warnings.warn(f"{where}: {error}; it is made anew", stacklevel=2)
        if content is None or fingerprint not in ("", content["fingerprint"]):
            files.save_state(path, {"fingerprint": fingerprint, "content": files.plain(make(), where)})
            content = files.load_state(path)
    return content["content"]
