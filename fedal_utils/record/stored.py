"""What is stored of a run, and what all runs of a seed share: read with every check, written once."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import Config
from .files import ADVICE, folder_name, load_state, lock, plain, project_root, read_json, read_sheet, save_state, sha256

COLUMNS = {  # seconds in rounds: estimated annotation seconds, the third cost; in times: wall seconds
    "rounds": ("cycle", "round", "client", "images", "boxes", "seconds", "bytes_up", "bytes_down", "loss", "steps"),
    "queries": ("cycle", "client", "id", "score"),
    "times": ("cycle", "round", "seconds"),
}
STATES = ("state.pt", "state-before.pt")


def setting_folder(config: Config, notebook: str, root: str | Path | None) -> Path:
    """Where the runs of a setting lie; root: `results/runs` unless given."""
    root = project_root() / "results" / "runs" if root is None else Path(root)
    return root / folder_name(notebook) / config.digest()[:8]


@dataclass
class Stored:
    """What counts of a run's folder: all rows of a finished run, those of the last good state of a broken one."""

    sheets: dict[str, pd.DataFrame]  # texts; keys of COLUMNS
    committed: int
    done: bool
    fingerprint: str
    state: dict[str, Any] | None = None
    damaged: tuple[str, ...] = ()  # states that could not be read


def read_run(folder: Path) -> Stored | None:
    """The committed part of a run; None if there is none. ValueError naming the file that was cut or changed."""
    fingerprint = read_json(folder / "config.json").get("fingerprint", "")
    if (folder / "done.json").exists():
        note = read_json(folder / "done.json")
        sheets = {name: read_sheet(folder / f"{name}.csv") for name in COLUMNS}
        if not note.get("rounds") or note.get("sha256") != digests(sheets):
            raise ValueError(f"rounds.csv, queries.csv or done.json of {folder} was changed since its run: {ADVICE}")
        return Stored(sheets, note["rounds"], True, fingerprint)
    damaged: list[str] = []
    for path in (folder / name for name in STATES if (folder / name).exists()):
        try:
            content = load_state(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        sheets = {}
        for name, entry in content["sheets"].items():
            sheet = read_sheet(folder / f"{name}.csv")
            if set(entry["columns"]) <= set(sheet):
                sheet = sheet[entry["columns"]].head(entry["rows"])
            if sha256(sheet) != entry["sha256"]:
                raise ValueError(f"{folder / name}.csv was cut or changed since the run committed it: {ADVICE}")
            sheets[name] = sheet
        return Stored(sheets, content["committed"], False, fingerprint, content["state"], tuple(damaged))
    return Stored({}, 0, False, fingerprint, None, tuple(damaged)) if damaged else None


def digests(sheets: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Of the two files that a finished run vouches for."""
    return {f"{name}.csv": sha256(sheets[name]) for name in ("rounds", "queries")}


def shared(
    config: Config,
    notebook: str,
    seed: int,
    name: str,
    make: Callable[[], Any],
    root: str | Path | None = None,
    fingerprint: str = "",
) -> Any:
    """What all methods of a seed start from (the initial model): made once, saved, loaded from then on, on the CPU.

    config, notebook, seed, name, root: where it lies.
    make: returns what `Run.commit` accepts as a state; a second process that asks meanwhile waits.
    fingerprint: it is made anew where the file belongs to other data, or is damaged.
    """
    path = setting_folder(config, notebook, root) / "shared" / f"{folder_name(name)}-seed{seed}.pt"
    where, content = f"{notebook}: shared {name!r} of seed {seed}", None
    with lock(path.with_name(f".{path.stem}.lock"), wait=-1):
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
            leftover.unlink()
        if path.exists():
            try:
                content = load_state(path)
            except ValueError as error:
                warnings.warn(f"{where}: {error}; it is made anew", stacklevel=2)
        if content is None or fingerprint not in ("", content["fingerprint"]):
            save_state(path, {"fingerprint": fingerprint, "content": plain(make(), where)})
            content = load_state(path)
    return content["content"]


def state(
    config: Config, notebook: str, method: str, seed: int, root: str | Path | None = None
) -> dict[str, Any] | None:
    """The last committed state of a run, finished or not (to look at its model); None if this machine has none."""
    path = setting_folder(config, notebook, root) / method / f"seed{seed}" / STATES[0]
    return load_state(path)["state"] if path.exists() else None
