"""What is stored of a run, and what all runs of a seed share: read with every check, written once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import Config
from .files import (
    ADVICE,
    encode,
    folder_name,
    load_state,
    lock,
    plain,
    project_root,
    read_json,
    read_sheet,
    save_state,
    sha256,
)

COLUMNS = {
    "rounds": (
        *("cycle", "round", "client", "images", "boxes"),
        "seconds",  # estimated annotation seconds, the third cost; wall seconds are in times.csv
        *("bytes_up", "bytes_down", "loss", "steps"),
    ),
    "queries": ("cycle", "client", "id", "score"),
    "times": ("cycle", "round", "seconds"),
}
STATES = ("state.pt", "state-before.pt")


def setting_folder(config: Config, notebook: str, root: str | Path | None) -> Path:
    """Where the runs of a setting lie; root: `results/runs` unless given."""
    return Path(root or project_root() / "results" / "runs") / folder_name(notebook, "notebook") / config.digest()[:8]


@dataclass
class Stored:
    """What counts of a run's folder: all rows of a finished run, those of the last good state of a broken one."""

    sheets: dict[str, pd.DataFrame]  # texts; keys of COLUMNS
    fingerprint: str
    done: bool = False
    committed: int = 0
    state: dict[str, Any] | None = None
    damaged: tuple[str, ...] = ()  # states that could not be read


def read_run(folder: Path) -> Stored | None:
    """The committed part of a run; None if there is none. ValueError naming the file that was cut or changed."""
    fingerprint = str(read_json(folder / "config.json").get("fingerprint", ""))
    if (folder / "done.json").exists():
        digests = read_json(folder / "done.json").get("sha256")
        if not isinstance(digests, dict) or set(digests) != {"rounds.csv", "queries.csv"}:
            raise ValueError(f"{folder / 'done.json'} names no digests of rounds.csv and queries.csv: {ADVICE}")
        sheets = {name: read_sheet(folder / f"{name}.csv") for name in COLUMNS}
        for name, digest in digests.items():
            if sha256(encode(sheets[name.removesuffix(".csv")])) != digest:
                raise ValueError(f"{folder / name} was changed since its run finished: {ADVICE}")
        return Stored(sheets, fingerprint, done=True)
    damaged = []
    for path in (folder / name for name in STATES):
        try:
            content = load_state(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged.append(str(error))
            continue
        ledger = json.loads(content["ledger"])
        sheets = {name: _committed_rows(folder / f"{name}.csv", entry) for name, entry in ledger["sheets"].items()}
        return Stored(sheets, fingerprint, False, ledger["committed"], content["state"], tuple(damaged))
    return Stored({}, fingerprint, damaged=tuple(damaged)) if damaged else None


def _committed_rows(path: Path, entry: Mapping[str, Any]) -> pd.DataFrame:
    sheet = read_sheet(path)
    if set(entry["columns"]) <= set(sheet):
        sheet = sheet[entry["columns"]].head(entry["rows"])
    if sha256(encode(sheet)) != entry["sha256"]:
        raise ValueError(f"{path} was changed since the run committed it: {ADVICE}")
    return sheet


def shared(
    config: Config,
    notebook: str,
    seed: int,
    name: str,
    make: Callable[[], Any],
    root: str | Path | None = None,
    fingerprint: str = "",
) -> Any:
    """What all methods of a seed start from (the initial model): made once, saved, and loaded from then on, on the CPU.

    config, notebook, seed, name, root: what it belongs to.
    make: no arguments, returns what `Run.commit` accepts as a state. A second process that asks meanwhile waits.
    fingerprint: it is made anew where the file belongs to other data, or is damaged.
    """
    path = setting_folder(config, notebook, root) / "shared" / f"{folder_name(name, 'shared')}-seed{int(seed)}.pt"
    if (content := _shared(path, fingerprint)) is None:
        with lock(path.with_name(f".{path.stem}.lock"), wait=-1):
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                leftover.unlink()
            if (content := _shared(path, fingerprint)) is None:
                save_state(path, {"fingerprint": fingerprint, "content": plain(make(), f"{notebook}: {name}")})
                content = load_state(path)
    return content["content"]


def _shared(path: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        content = load_state(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        warnings.warn(f"{error}; it is made anew", stacklevel=3)
        return None
    return content if not fingerprint or content["fingerprint"] == fingerprint else None


def state(
    config: Config, notebook: str, method: str, seed: int, root: str | Path | None = None
) -> dict[str, Any] | None:
    """The last committed state of a run, finished or not (to look at its model); None if this machine has none."""
    path = setting_folder(config, notebook, root) / method / f"seed{seed}" / STATES[0]
    return load_state(path)["state"] if path.exists() else None
