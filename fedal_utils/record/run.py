"""A run's folder: append a round, save atomically, resume after a kill, read the tables back, compare with the paper.

    results/runs/<notebook>/<digest>/<method>/seed<k>/
        config.json  env.json             what was run; on what machine and for how long
        rounds.csv  asked.csv  times.csv  one row per client and round; every answered question; wall seconds
        state.pt                          resume point and commit point (tensors, numbers and strings only)
        done.json                         the run is complete; digests of the two result files

Every file is written under a temporary name in the same folder and then renamed. `state.pt` is renamed last and says
how many rows of each CSV belong to it, so a run that is killed at any instant and started again leaves `rounds.csv`
and `asked.csv` as an unbroken run does, byte for byte.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import __version__, seeding

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROUND_COLUMNS = (
    "cycle",
    "round",
    "client",
    "images",
    "boxes",
    "seconds",  # estimated annotation seconds, the third bill; wall seconds are in times.csv
    "bytes_up",
    "bytes_down",
    "loss",
    "steps",
)
ASKED_COLUMNS = ("cycle", "client", "id", "score")
PAPER_COLUMNS = ("item", "setting", "x", "metric", "value", "unit", "source", "tolerance")
LOCK_WAIT = 5.0  # seconds: a killed notebook's kernel notices within one or two that its parent is gone

_FINITE = frozenset(ROUND_COLUMNS)
_TEXT = frozenset({"client", "id", "group", "method", "status"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")


class Config(Protocol):
    """What this module needs of `config.Config`: sizes, who runs, and a digest that leaves methods and seeds out."""

    cycles: int
    rounds: int
    profile: str
    methods: Sequence[str]
    seeds: Sequence[int]

    def digest(self) -> str: ...

    def flat(self) -> dict[str, Any]: ...


Plan = Callable[[Config, str], Sequence[tuple[int, int]]]  # config, method -> (cycle, round) of every round


# --- places -----------------------------------------------------------------------------------------------------------


def home() -> Path:
    """The folder that holds `results/`: the checkout that the working directory lies in, else the working directory.

    A notebook opened in Jupyter works in `notebooks/`, one run headless in the checkout itself: both write to the same
    `results/`. The environment variable FEDAL_HOME overrides.
    """
    if os.environ.get("FEDAL_HOME"):
        return Path(os.environ["FEDAL_HOME"]).expanduser().absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


def _runs_root(root: str | Path | None) -> Path:
    return home() / "results" / "runs" if root is None else Path(root)


def _setting_folder(config: Config, notebook: str, root: str | Path | None) -> Path:
    return _runs_root(root) / _name(notebook, "notebook") / config.digest()[:8]


def _name(text: str, what: str) -> str:
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise ValueError(f"{what} {text!r} cannot name a folder: use letters, digits and _ . + = -, a letter first")
    return text


# --- atomic files -----------------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, content: bytes | str | Callable[[BinaryIO], None]) -> Path:
    """Write a file under a temporary name in its own folder, flush it to disk, then rename it into place.

    content: bytes, text (UTF-8), or a function that writes to the open binary file. Readers see the old file or the new
    one, never a half. An exception leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    """Put a rename on disk, so that renames survive a power cut in the order they were made (POSIX only)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): delete its folder to run again") from None


# --- one CSV ----------------------------------------------------------------------------------------------------------


@dataclass
class _Sheet:
    """A CSV in memory, every cell as the text that stands in the file, so that a rewrite never changes a byte."""

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def plus(self, rows: Sequence[Mapping[str, str]]) -> _Sheet:
        """This sheet with rows added at the end; a new column is appended and left empty in the rows before."""
        columns = [*self.columns, *dict.fromkeys(key for row in rows for key in row if key not in set(self.columns))]
        pad = [""] * (len(columns) - len(self.columns))
        return _Sheet(columns, [row + pad for row in self.rows] + [[row.get(c, "") for c in columns] for row in rows])

    def cut(self, length: int, columns: Sequence[str]) -> _Sheet:
        """The first `length` rows, with these columns only."""
        place = [self.columns.index(c) for c in columns]
        return _Sheet(list(columns), [[row[i] for i in place] for row in self.rows[:length]])

    def encode(self) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue().encode()

    @classmethod
    def read(cls, path: Path) -> _Sheet:
        """Read a file that this module wrote; ValueError naming the file if it is missing, cut or not a table."""
        advice = "restore it, or delete its folder to run again"
        try:
            text = path.read_bytes().decode()
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: {advice}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}): {advice}") from None
        if not text.endswith("\n"):
            raise ValueError(f"{path} is cut: its last line has no end ({text[-40:]!r}); {advice}")
        try:
            columns, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        except csv.Error as error:
            raise ValueError(f"{path} is not a CSV ({error}): {advice}") from None
        for number, row in enumerate(rows, start=2):
            if len(row) != len(columns):
                raise ValueError(f"{path}, row {number}: {len(row)} cells under {len(columns)} columns; {advice}")
        return cls(columns, rows)


def _cell(value: Any, column: str, where: str) -> str:
    """The text of one value; floats by `repr`, so that reading gives the same float back."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.ndim:
            raise ValueError(f"{where}: {column} must be one value, got shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, (bool, int)):
        return str(int(value))
    if isinstance(value, float):
        if column == "score" and math.isnan(value):
            return ""  # asked without a score: the first labels, or an image without detections
        if math.isinf(value) or (math.isnan(value) and (column in _FINITE or column.startswith("loss"))):
            raise ValueError(f"{where}: {column} is {value!r}; nothing was written")
        return repr(value)
    if isinstance(value, str):
        return value
    raise ValueError(f"{where}: {column} must be a number or a string, got {value!r} of {type(value).__name__}")


def _frame(sheet: _Sheet) -> pd.DataFrame:
    """A table of whole numbers, floats and text, exactly as written; an empty cell is NaN among floats."""
    import pandas as pd

    def typed(name: str, cells: list[str]):
        if name in _TEXT:
            return np.array(cells, dtype=object)
        for kind, empty in ((int, None), (float, "nan")):
            with contextlib.suppress(ValueError, TypeError):
                return np.array([kind(cell or empty) for cell in cells], dtype=np.dtype(kind))
        return np.array(cells, dtype=object)

    return pd.DataFrame({c: typed(c, [row[i] for row in sheet.rows]) for i, c in enumerate(sheet.columns)})


# --- who may write ----------------------------------------------------------------------------------------------------


class _Lock:
    """Exclusive use of a folder by one process. It vanishes with the process, however that ends.

    Within one process the newest owner wins: a cell that was interrupted and is run again takes the folder over, and
    the loop it replaces is told so if it ever tries to write.
    """

    _held: dict[Path, weakref.ref[_Lock]] = {}

    def __init__(self, path: Path, wait: float | None = None, what: str = "run folder"):
        self.path, self.file, self.taken_over = path.absolute(), None, False
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = self._held.get(self.path, lambda: None)()
        if earlier is not None:
            earlier.taken_over = True
            earlier.release()
        deadline = time.monotonic() + (LOCK_WAIT if wait is None else wait)
        while not self._take():
            if time.monotonic() >= deadline:
                raise RuntimeError(f"{what} {path.parent} is in use by process {self._owner() or 'unknown'}")
            time.sleep(0.1)
        self._held[self.path] = weakref.ref(self)

    def _owner(self) -> str:
        try:
            return self.path.read_text().strip()
        except OSError:
            return ""

    def _take(self) -> bool:
        if fcntl is None:
            return self._take_by_pid()
        file = open(self.path, "a+")  # noqa: SIM115 (held open for as long as the lock lives)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError as error:  # a file system without locks
            warnings.warn(f"{self.path.parent} cannot be locked ({error}): do not start this run twice", stacklevel=5)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self.file = file
        return True

    def _take_by_pid(self) -> bool:
        """Where flock is missing: a file with the owner's process id; that of a process that is gone is taken over."""
        try:
            self.file = open(self.path, "x")  # noqa: SIM115
        except FileExistsError:
            owner = self._owner()
            if owner.isdigit() and int(owner) != os.getpid() and alive(int(owner)):
                return False
            self.file = open(self.path, "w")  # noqa: SIM115
        self.file.write(f"{os.getpid()}\n")
        self.file.flush()
        return True

    def forget(self) -> None:
        """Close a forked child's copy of the file, so that the lock lives and dies with the parent alone."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def release(self) -> None:
        if self.file is not None:
            self.file.close()  # the file stays: unlinking it would let two processes lock two different files
            self.file = None
            if fcntl is None:
                with contextlib.suppress(OSError):
                    self.path.unlink()
        if self._held.get(self.path, lambda: None)() is self:
            del self._held[self.path]

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _after_fork() -> None:
    for reference in list(_Lock._held.values()):
        lock = reference()
        if lock is not None:
            lock.forget()
    _Lock._held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def alive(pid: int) -> bool:
    """True while a process of that id exists on this machine."""
    if os.name == "nt":  # os.kill(pid, 0) would send Ctrl-C there
        listing = subprocess.run(["tasklist", "/FI", f"PID eq {pid}", "/NH"], capture_output=True, text=True).stdout
        return str(pid) in listing.split()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- where it ran -----------------------------------------------------------------------------------------------------


@functools.cache
def _commit() -> dict[str, Any]:
    """{'commit', 'dirty'} of the checkout that this package lies in (results/ apart); {} if it lies in none."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return {}
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno", "--", ".", ":!results")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


@functools.cache
def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Versions, commit and machine class of this process; no host name, user name or path."""
    versions = {"fedal": __version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"system": platform.system(), "architecture": platform.machine(), "cpu": _cpu(), "cores": cores}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {**versions, **_commit(), "machine": machine}


def banner() -> str:
    """One line: versions, and the class of machine that this process runs on."""
    found = environment()
    machine = found["machine"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("fedal", "torch", "torchvision") if name in found)
    return f"{versions}, Python {found['python']} | {machine['cpu']}, {machine['cores']} cores" + (
        f", {machine['gpu']}" if "gpu" in machine else ""
    )


# --- one run ----------------------------------------------------------------------------------------------------------


def every_round(config: Config) -> list[tuple[int, int]]:
    """(cycle, round) of all rounds: as many in each cycle; after the last cycle's, the rounds of `tail`."""
    cycles = [(cycle, round) for cycle in range(config.query.cycles) for round in range(config.federation.rounds)]
    tail = config.federation.extra_rounds
    return cycles + [(config.query.cycles - 1, config.federation.rounds + extra) for extra in range(tail)]


class Run:
    """One seed of one method of one setting, made by `runs`.

    config, method, seed, folder: what and where. committed: rounds that are on disk. resumed: the `state` of the last
    of them if this run was broken off, else None.
    """

    def __init__(
        self,
        config: Config,
        notebook: str,
        method: str,
        seed: int,
        root: str | Path | None = None,
        plan: Plan | None = None,
    ):
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"a seed is a whole number from 0 up, got {seed!r}")
        if config.query.cycles < 1 or config.federation.rounds < 1:
            raise ValueError(
                f"a run has one round at least, got cycles={config.query.cycles}, rounds={config.federation.rounds}"
            )
        self.config, self.notebook, self.method, self.seed = config, notebook, method, int(seed)
        self.root = root
        self.folder = _setting_folder(config, notebook, root) / _name(method, "method") / f"seed{self.seed}"
        self.resumed: dict[str, Any] | None = None
        self.committed = 0
        self._sheets = {"rounds": _Sheet([*ROUND_COLUMNS]), "asked": _Sheet([*ASKED_COLUMNS])}
        self._times = _Sheet(["cycle", "round", "seconds"])
        self.plan = list(plan(config, method)) if plan else every_round(config)
        self._lock: _Lock | None = None
        self._progress: _Progress | None = None
        self._clock = time.monotonic()

    def rounds(self) -> Iterator[tuple[int, int]]:
        """(cycle, round) of each round still to do; round counts from 0 within its cycle. Each must be committed."""
        for position in range(self.committed, len(self.plan)):
            if self.committed != position:
                raise RuntimeError(
                    f"cycle {self.plan[position - 1][0]}, round {self.plan[position - 1][1]} of {self} was not "
                    "committed: end the loop's body with run.commit(cycle, round, ...)"
                )
            yield self.plan[position]
        if self.committed != len(self.plan):
            raise RuntimeError(f"the last round of {self} was not committed")

    def rng(self, *names: str | int) -> np.random.Generator:
        """The generator of that name for this run's seed; all methods draw the same, so starts are paired."""
        return seeding.rng_for(self.seed, *names)

    def torch_rng(self, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
        """As `rng`, for torch."""
        return seeding.torch_rng_for(self.seed, *names, device=device)

    def asked_rows(self) -> list[dict[str, Any]]:
        """The committed rows of asked.csv, to rebuild the pools of a resumed run; score is NaN where none was given."""
        return _frame(self._sheets["asked"]).to_dict("records")

    @property
    def finished(self) -> bool:
        """True once every round is committed."""
        return self.committed == len(self.plan)

    def commit(
        self,
        cycle: int,
        round: int,
        rows: Sequence[Mapping[str, Any]],
        asked: Sequence[Mapping[str, Any]] = (),
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """End a round: add rows to rounds.csv and asked.csv, then save `state`, from which the next round can start.

        rows: one per client and one with client "server" that carries the metrics; columns as in ROUND_COLUMNS, further
        ones (metrics) as they come; `cycle` and `round` are filled in. NaN is allowed for metrics only (a class without
        ground truth). asked: ASKED_COLUMNS, one per answered question, score NaN where none was given. state: tensors,
        numbers, strings, None, and lists, tuples and dicts of these. ValueError, before anything is written, if a value
        is not allowed.
        """
        if self._lock is None or self._lock.taken_over:
            reason = "was started again by this process" if self._lock else "is not open: take it from record.runs"
            raise RuntimeError(f"{self} {reason}; nothing was written")
        if self.finished or (cycle, round) != self.plan[self.committed]:
            due = "nothing, it is finished" if self.finished else f"{self.plan[self.committed]}"
            raise ValueError(f"commit of cycle {cycle}, round {round} in {self}: due is {due}")
        where = f"{self}, cycle {cycle}, round {round}"
        sheets = {
            "rounds": self._sheets["rounds"].plus(_cells(rows, {"cycle": cycle, "round": round}, where)),
            "asked": self._sheets["asked"].plus(_cells(asked, {"cycle": cycle}, where)),
        }
        state = _plain(dict(state or {}), f"{where}: state")
        seconds = time.monotonic() - self._clock
        times = self._times.plus([{"cycle": str(cycle), "round": str(round), "seconds": f"{seconds:.3f}"}])
        for name, sheet in sheets.items():
            write_atomic(self.folder / f"{name}.csv", sheet.encode())
        write_atomic(self.folder / "times.csv", times.encode())
        ledger = {
            "committed": self.committed + 1,
            "times": len(times.rows),
            "sheets": {
                name: {"rows": len(sheet.rows), "columns": sheet.columns, "sha256": _sha256(sheet)}
                for name, sheet in sheets.items()
            },
        }
        content = {"ledger": json.dumps(ledger), "state": state}
        write_atomic(self.folder / "state.pt", lambda file: torch.save(content, file))  # the round exists from here on
        self._sheets, self._times, self.committed = sheets, times, self.committed + 1
        self._clock = time.monotonic()
        if self.finished:
            self._finish()
        if self._progress is not None:
            self._progress.step(cycle, round, rows, seconds)

    def __str__(self) -> str:
        return f"{self.notebook} {self.method} seed {self.seed}"

    def _open(self) -> bool:
        """Lock the folder, check what is there, clean up after a kill. Returns False if the run is finished."""
        self._lock = _Lock(self.folder / ".lock")
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        self._check_config()
        if (self.folder / "done.json").exists():
            _check_done(self.folder)
            return False
        if (self.folder / "state.pt").exists():
            self._resume()
        else:  # killed before the first commit, or published without its state: start over
            for name in ("rounds.csv", "asked.csv", "times.csv", "env.json"):
                (self.folder / name).unlink(missing_ok=True)
        self._write_environment()
        if self.finished:  # killed between the last commit and its closing note
            self._finish()
            return False
        self._clock = time.monotonic()
        return True

    def _check_config(self) -> None:
        config = {k: v for k, v in self.config.flat().items() if k not in ("methods", "seeds")}
        stored = {"notebook": self.notebook, "method": self.method, "seed": self.seed, "digest": self.config.digest()}
        stored = json.loads(json.dumps({**stored, "config": config}, default=str))
        path = self.folder / "config.json"
        if not path.exists():
            _write_json(path, stored)
            return
        found = _read_json(path)
        if found.get("digest") == stored["digest"]:  # written before a setting was known that changes nothing here
            found["config"] = {**stored["config"], **found.get("config", {})}
        if found != stored:
            flat = [{**c.get("config", {}), **{k: v for k, v in c.items() if k != "config"}} for c in (found, stored)]
            keys = sorted(k for k in {**flat[0], **flat[1]} if flat[0].get(k) != flat[1].get(k))
            differences = "; ".join(f"{k}: {flat[0].get(k)!r} there, {flat[1].get(k)!r} here" for k in keys)
            raise ValueError(f"{path} belongs to another setting ({differences}): move that folder away")

    def _resume(self) -> None:
        content = _load(self.folder / "state.pt")
        try:
            ledger = json.loads(content["ledger"])
            self.resumed = content["state"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self.folder / 'state.pt'} is not a resume point: delete it to run again") from None
        for name, entry in ledger["sheets"].items():
            path = self.folder / f"{name}.csv"
            sheet = _Sheet.read(path)
            problem = None
            if len(sheet.rows) < entry["rows"] or not set(entry["columns"]) <= set(sheet.columns):
                problem = f"holds {len(sheet.rows)} rows, {entry['rows']} were committed"
            else:
                sheet = sheet.cut(entry["rows"], entry["columns"])
                if _sha256(sheet) != entry["sha256"]:
                    problem = "was changed since the run committed it"
            if problem:
                raise ValueError(f"{path} {problem}: restore it, or delete its folder to run again")
            self._sheets[name] = sheet
        self._times = _Sheet.read(self.folder / "times.csv")
        self._times = self._times.cut(ledger["times"], self._times.columns)
        self.committed = ledger["committed"]
        for name, sheet in [*self._sheets.items(), ("times", self._times)]:  # cut what a kill left beyond the commit
            if (self.folder / f"{name}.csv").read_bytes() != sheet.encode():
                write_atomic(self.folder / f"{name}.csv", sheet.encode())

    @property
    def minutes(self) -> float:
        """Wall minutes of the committed rounds, over all starts."""
        return sum(float(row[2]) for row in self._times.rows) / 60

    def _write_environment(self, starts: int = 1) -> None:
        path = self.folder / "env.json"
        now = environment()
        before = _read_json(path) if path.exists() else {}
        earlier = before.pop("earlier", [])
        starts += before.pop("starts", 0)
        before.pop("minutes", None)
        if before and before != now and before not in earlier:
            earlier = [*earlier, before]
        note = {"earlier": earlier} if earlier else {}
        _write_json(path, {**now, "minutes": round(self.minutes, 3), "starts": starts, **note})

    def _finish(self) -> None:
        self._write_environment(starts=0)
        digests = {f"{name}.csv": _sha256(sheet) for name, sheet in self._sheets.items()}
        _write_json(self.folder / "done.json", {"rounds": self.committed, "sha256": digests})

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._lock is not None:
            self._lock.release()


def _sha256(sheet: _Sheet) -> str:
    return hashlib.sha256(sheet.encode()).hexdigest()


def _check_done(folder: Path) -> None:
    for name, digest in _read_json(folder / "done.json")["sha256"].items():
        if _sha256(_Sheet.read(folder / name)) != digest:
            raise ValueError(f"{folder / name} was changed since its run finished: restore it, or delete its folder")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read ({line}): delete it to compute it again") from error


def _cells(rows: Sequence[Mapping[str, Any]], fixed: Mapping[str, int], where: str) -> list[dict[str, str]]:
    out = []
    for row in rows:
        place = f"{where}, client {row.get('client')!r}" + (f", id {row['id']!r}" if "id" in row else "")
        for name, value in fixed.items():
            if row.get(name, value) != value:
                raise ValueError(f"{place}: {name} is {row[name]!r}")
        if not all(isinstance(name, str) for name in row):
            raise ValueError(f"{place}: column names are strings, got {list(row)!r}")
        out.append({name: _cell(value, name, place) for name, value in {**row, **fixed}.items()})
    return out


def _plain(value: Any, where: str) -> Any:
    """The value, if `torch.load(weights_only=True)` reads all of it back; ValueError naming the place of the rest."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        # A view would drag its whole storage into the file.
        return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(f"{where}: a key is a string or an integer, got {key!r}")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    hint = ": use torch.from_numpy" if isinstance(value, np.ndarray) else ""
    raise ValueError(
        f"{where} is of {type(value).__name__}, which a resume point cannot hold{hint}; nothing was written"
    )


# --- all runs of a setting --------------------------------------------------------------------------------------------


def runs(
    config: Config,
    notebook: str,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    root: str | Path | None = None,
    progress: bool = True,
    plan: Plan | None = None,
) -> Iterator[Run]:
    """Every run that is still to do, seed by seed and method by method: finished ones are skipped, broken ones resumed.

    methods, seeds: those of the config unless given. root: `results/runs` of the checkout unless given. progress: one
    bar per run over rounds, or one line per round when neither a terminal nor a notebook looks on (FEDAL_PROGRESS=bar,
    lines or none overrides). plan: the (cycle, round) pairs of a method, where they are not the same for all (see
    `every_round`). RuntimeError if another process works in a run's folder; ValueError if its config.json
    differs or a file is damaged. Nothing is repaired silently.
    """
    methods = config.methods if methods is None else methods
    seeds = config.seeds if seeds is None else seeds
    for what, values in (("methods", methods), ("seeds", seeds)):
        if isinstance(values, str) or len(set(values)) != len(values) or not len(values):
            raise ValueError(f"{what} must be a list of one or more different entries, got {values!r}")
    for seed in seeds:
        for method in methods:
            run = Run(config, notebook, method, seed, root, plan)
            try:
                if not run._open():
                    continue
                run._progress = _Progress(run) if progress else None
                yield run
            finally:
                run._close()


def shared(
    config: Config, notebook: str, seed: int, name: str, make: Callable[[], Any], root: str | Path | None = None
) -> Any:
    """What all methods of a seed start from (the cycle-0 model): made once, saved, and loaded from then on.

    make: no arguments, returns what `Run.commit` accepts as a state. A second process that asks meanwhile waits. The
    value always comes from the file, on the CPU, so the first caller sees what the others see.
    """
    path = _setting_folder(config, notebook, root) / "shared" / f"{_name(name, 'shared')}-seed{int(seed)}.pt"
    if not path.exists():
        with _Lock(path.with_name(f".{path.stem}.lock"), wait=math.inf):
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                leftover.unlink()
            if not path.exists():
                content = _plain(make(), f"{notebook}: shared {name!r}")
                write_atomic(path, lambda file: torch.save(content, file))
    return _load(path)


def state(
    config: Config, notebook: str, method: str, seed: int, root: str | Path | None = None
) -> dict[str, Any] | None:
    """The last committed state of a run, finished or not (to look at its model); None if this machine has none."""
    path = Run(config, notebook, method, seed, root).folder / "state.pt"
    return _load(path)["state"] if path.exists() else None


def missing(
    config: Config, notebook: str, methods: Sequence[str], seeds: Sequence[int], root: str | Path | None = None
) -> list[tuple[str, int]]:
    """(method, seed) of the runs of this setting that have no rows here, or were broken off. Published rows count."""
    out = []
    for method in methods:
        for seed in seeds:
            folder = Run(config, notebook, method, seed, root).folder
            broken = (folder / "state.pt").exists() and not (folder / "done.json").exists()
            if broken or not (folder / "rounds.csv").exists():
                out.append((method, int(seed)))
    return out


def table(
    config: Config,
    notebook: str,
    root: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> pd.DataFrame:
    """All rounds.csv of this setting in one frame, `method` and `seed` in front; those asked for, or all there are.

    `client` is text ("server" or the client's name); empty cells are NaN. ValueError naming the file if one is damaged.
    """
    return _gather("rounds.csv", [*ROUND_COLUMNS], config, notebook, root, methods, seeds)


def asked(
    config: Config,
    notebook: str,
    root: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> pd.DataFrame:
    """All asked.csv of this setting in one frame, `method` and `seed` in front; `client` and `id` are text."""
    return _gather("asked.csv", [*ASKED_COLUMNS], config, notebook, root, methods, seeds)


def times(
    config: Config,
    notebook: str,
    root: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Wall seconds of every round of this setting, `method` and `seed` in front."""
    return _gather("times.csv", ["cycle", "round", "seconds"], config, notebook, root, methods, seeds)


def _gather(name, columns, config, notebook, root, methods, seeds) -> pd.DataFrame:
    import pandas as pd

    found = []
    for path in _setting_folder(config, notebook, root).glob(f"*/seed*/{name}"):
        method, seed = path.parts[-3], int(path.parts[-2].removeprefix("seed"))
        if (methods is None or method in methods) and (seeds is None or seed in seeds):
            found.append((method, seed, path))
    order = {m: i for i, m in enumerate(methods or config.methods)}
    found.sort(key=lambda entry: (order.get(entry[0], len(order)), entry[0], entry[1]))
    frames = []
    for method, seed, path in found:
        frame = _frame(_Sheet.read(path))
        frame.insert(0, "method", method)
        frame.insert(1, "seed", seed)
        if len(frame):
            frames.append(frame)
    if not frames:
        return pd.DataFrame(columns=["method", "seed", *columns])
    return pd.concat(frames, ignore_index=True)


# --- progress ---------------------------------------------------------------------------------------------------------


def _looks_on() -> str:
    """'bar' for a terminal or a live notebook, else 'lines'; FEDAL_PROGRESS overrides."""
    wish = os.environ.get("FEDAL_PROGRESS")
    if wish:
        if wish not in ("bar", "lines", "none"):
            raise ValueError(f"FEDAL_PROGRESS={wish!r}: use bar, lines or none")
        return wish
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return "bar" if getattr(shell, "kernel", None) is not None or sys.stderr.isatty() else "lines"


class _Progress:
    """One bar per run over rounds, or one line per round."""

    def __init__(self, run: Run):
        self.run, self.how = run, _looks_on()
        self.bar = None
        if self.how == "bar":
            label = f"{run.method} seed {run.seed}"
            self.bar = tqdm(total=len(run.plan), initial=run.committed, desc=label, unit="round", dynamic_ncols=True)

    def step(self, cycle: int, round: int, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
        server = next((row for row in rows if row.get("client") == "server"), {})
        news = {k: float(server[k]) for k in ("images", "ap50", "accuracy", "loss") if server.get(k) is not None}
        if self.bar is not None:
            self.bar.set_postfix({"cycle": cycle, **{k: f"{v:.4g}" for k, v in news.items()}}, refresh=False)
            self.bar.update()
        elif self.how == "lines":
            place = f"cycle {cycle + 1} round {round + 1}, {self.run.committed} of {len(self.run.plan)}"
            text = "  ".join(f"{k} {v:.4g}" for k, v in news.items())
            print(f"{self.run}  {place}  {text}  {seconds:.1f} s", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# --- tables, figures, the paper's numbers -----------------------------------------------------------------------------


def publish_table(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as CSV, atomically; a bare name goes to `results/tables/<name>.csv`. Returns the path."""
    return write_atomic(_published(path, "tables", ".csv"), frame.to_csv(index=False, lineterminator="\n"))


def publish_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Save a figure, atomically; a bare name goes to `results/figures/<name>.png`. Returns the path.

    No date or version goes into the file, so the same numbers give the same bytes on the same machine.
    """
    path = _published(path, "figures", ".png")
    kind = path.suffix.removeprefix(".")
    blank = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    return write_atomic(
        path, lambda file: figure.savefig(file, format=kind, dpi=dpi, bbox_inches="tight", metadata=blank)
    )


def _published(path: str | Path, folder: str, suffix: str) -> Path:
    path = Path(path)
    if path.suffix not in (".csv", ".png", ".pdf", ".svg"):  # a name may hold a dot
        path = path.with_name(path.name + suffix)
    return home() / "results" / folder / path if path.parent == Path(".") else path


def read_paper(paper: str | Path) -> pd.DataFrame:
    """A paper's published numbers: `results/paper/<paper>.csv`, or any CSV with PAPER_COLUMNS. `x` may be empty."""
    path = Path(paper) if str(paper).endswith(".csv") else home() / "results" / "paper" / f"{paper}.csv"
    sheet = _Sheet.read(path)
    if tuple(sheet.columns) != PAPER_COLUMNS:
        raise ValueError(f"{path}: columns must be {', '.join(PAPER_COLUMNS)}, got {', '.join(sheet.columns)}")
    frame = _frame(sheet)
    for name in ("x", "value", "tolerance"):
        try:
            frame[name] = frame[name].astype(float)
        except ValueError as error:
            raise ValueError(f"{path}: {name} must be a number or empty ({error})") from None
    for name in ("item", "setting", "metric", "unit", "source"):
        frame[name] = [row[sheet.columns.index(name)] for row in sheet.rows]
    return frame


def compare_paper(
    table: pd.DataFrame,
    paper: str | Path,
    profile: str,
    *,
    items: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
    x: str = "images",
    last: bool = False,
) -> pd.DataFrame:
    """Our numbers beside the paper's, with a verdict by rule; one row per row of the paper's CSV.

    table: as `table` gives it; the server's rows count. paper: see `read_paper`; its `setting` names a method of ours,
    or is translated by `settings` (paper's name to ours). A row with an `x` is compared at that value of column `x`,
    one without (or all, with last=True) at the end of the curve. unit "percent" or "%": ours is multiplied by 100.

    Verdicts: *matches* if the paper's value lies within the stated tolerance of our mean or inside our interval over
    seeds; *same order* if not, but all settings of that item, x and metric (two at least) rank as in the paper;
    *differs*; *no published number* if the paper's value is empty; *not run*. The smoke profile is never compared: its
    rows read *not run* and show our value in the column `smoke`.
    """
    import pandas as pd

    published = read_paper(paper)
    if items is not None:
        unknown = set(items) - set(published["item"])
        if unknown:
            raise ValueError(f"no item {sorted(unknown)} in {paper}: it has {sorted(set(published['item']))}")
        published = published[published["item"].isin(list(items))]
    server = table[table["client"].astype(str) == "server"] if len(table) else table
    rows = []
    for entry in published.to_dict("records"):
        method = (settings or {}).get(entry["setting"], entry["setting"])
        at = math.nan if last else entry["x"]
        values = _at(server[server["method"] == method] if len(server) else server, entry["metric"], x, at)
        mean, low, high = _mean_interval(values * (100 if entry["unit"] in ("percent", "%") else 1))
        rows.append({**entry, "ours": mean, "low": low, "high": high, "seeds": len(values)})
    frame = pd.DataFrame(rows, columns=[*PAPER_COLUMNS, "ours", "low", "high", "seeds"])
    frame = frame.rename(columns={"value": "paper"})
    frame["smoke"] = math.nan
    if profile == "smoke":
        frame["smoke"] = frame["ours"]
        frame[["ours", "low", "high"]] = math.nan
    frame["verdict"] = _verdicts(frame)
    front = ["item", "setting", "x", "metric", "paper", "ours", "low", "high", "seeds", "smoke", "verdict"]
    return frame[[*front, "unit", "tolerance", "source"]]


def _at(server: pd.DataFrame, metric: str, x: str, at: float) -> np.ndarray:
    """One value of the metric per seed: at x == at (its last such row), or the end of the curve if `at` is NaN."""
    if metric not in server or not len(server):
        return np.empty(0)
    server = server[np.isfinite(server[metric].astype(float))].sort_values(["seed", "cycle", "round"])
    if not math.isnan(at):
        server = server[np.isclose(server[x].astype(float), at, rtol=1e-9, atol=0)]
    return server.groupby("seed")[metric].last().to_numpy(dtype=float)


def _mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and interval over seeds; one seed is its own interval."""
    from ..metrics import seed_interval

    if not len(values):
        return math.nan, math.nan, math.nan
    if len(values) == 1:
        return float(values[0]), float(values[0]), float(values[0])
    return float(values.mean()), *seed_interval(values)


def _verdicts(frame: pd.DataFrame) -> list[str]:
    keys = [(row.item, "" if math.isnan(row.x) else row.x, row.metric) for row in frame.itertuples()]
    ranked: dict[tuple, list[tuple[float, float]]] = {}
    for key, row in zip(keys, frame.itertuples(), strict=True):
        if math.isfinite(row.paper) and math.isfinite(row.ours):
            ranked.setdefault(key, []).append((row.paper, row.ours))

    def verdict(key: tuple, row: Any) -> str:
        if math.isnan(row.paper):
            return "no published number"
        if math.isnan(row.ours):
            return "not run"
        near = not math.isnan(row.tolerance) and abs(row.ours - row.paper) <= row.tolerance
        if near or row.low <= row.paper <= row.high:
            return "matches"
        pairs = ranked[key]
        same = all(
            (paper - other) * (ours - others) > 0
            for i, (paper, ours) in enumerate(pairs)
            for other, others in pairs[:i]
            if paper != other
        )
        return "same order" if same and len({paper for paper, _ in pairs}) > 1 else "differs"

    return [verdict(key, row) for key, row in zip(keys, frame.itertuples(), strict=True)]
