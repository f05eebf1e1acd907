"""Where a run ran, and its progress on the screen."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import __version__


@functools.cache
def _commit() -> dict[str, Any]:
    """{'commit', 'dirty'} of the checkout that this package lies in (results/ apart); {} if it lies in none.

    A plain copy of the tree names it in the environment variable FEDAL_COMMIT or in a file COMMIT beside the package.
    """
    folder = Path(__file__).resolve().parents[2]
    note = folder / "COMMIT"
    if named := os.environ.get("FEDAL_COMMIT") or (note.read_text().strip() if note.is_file() else ""):
        return {"commit": named, "dirty": False}

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", "-C", str(folder), *arguments], text=True, stderr=-3, timeout=10).strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if Path(git("rev-parse", "--show-toplevel")).resolve() == folder:
            changes = git("status", "--porcelain", "-uno", "--", ".", ":!results")
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    return {}


def environment() -> dict[str, Any]:
    """Versions, commit and machine class of this process; no host name, user name or path."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"system": platform.system(), "cpu": cpu, "cores": cores}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {package: metadata.version(package) for package in ("torch", "torchvision", "numpy")}
    return {"fedal": __version__, "python": platform.python_version(), **versions, **_commit(), "machine": machine}


def machine_text(facts: Mapping[str, Any]) -> str:
    """The machine of `environment`, in a few words."""
    machine = facts.get("machine", {})
    words = [machine.get("cpu", "unknown"), f"{machine.get('cores', '?')} cores", machine.get("gpu")]
    return ", ".join(word for word in words if word)


def banner() -> str:
    """One line: versions, and the class of machine that this process runs on."""
    found = environment()
    versions = ", ".join(f"{name} {found[name]}" for name in ("fedal", "torch", "torchvision"))
    return f"{versions}, Python {found['python']} | {machine_text(found)}"


class Progress:
    """One bar per run over rounds, or one line per round where neither a terminal nor a notebook looks on.

    FEDAL_PROGRESS=bar|lines|none decides otherwise.
    """

    def __init__(self, name: str, rounds: int, committed: int):
        watched = "ipykernel" in sys.modules or sys.stderr.isatty()
        self.how = os.environ.get("FEDAL_PROGRESS") or ("bar" if watched else "lines")
        bar = self.how == "bar"
        self.bar = tqdm(total=rounds, initial=committed, desc=name, unit="round", dynamic_ncols=True, disable=not bar)

    def step(self, place: str, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """A round is done: its place in words, its rows, its wall seconds."""
        server = next((row for row in rows if row.get("client") == "server"), {})
        shown = [name for name in ("images", "ap50", "accuracy", "loss") if server.get(name) is not None]
        news = {name: f"{float(server[name]):.4g}" for name in shown}
        self.bar.set_postfix(news, refresh=False)
        self.bar.update()
        if self.how == "lines":
            print(place, *(f"{k} {v}" for k, v in news.items()), f"{seconds:.1f} s", sep="  ", flush=True)
