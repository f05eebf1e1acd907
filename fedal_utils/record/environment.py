"""Where a run ran, and its progress on the screen."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__


@functools.cache
def _commit() -> dict[str, Any]:
    """{'commit', 'dirty'} of the checkout (results and texts apart), or $FEDAL_COMMIT; {} outside one."""
    if os.environ.get("FEDAL_COMMIT"):
        return {"commit": os.environ["FEDAL_COMMIT"], "dirty": False}
    folder = Path(__file__).resolve().parents[2]
    git = functools.partial(subprocess.check_output, cwd=folder, text=True, stderr=subprocess.DEVNULL, timeout=10)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        top, commit = git(["git", "rev-parse", "--show-toplevel", "HEAD"]).splitlines()
        if Path(top).resolve() == folder:
            changes = git(["git", "status", "--porcelain", "-uno", "--", ".", ":!results", ":!*.md"])
            return {"commit": commit, "dirty": bool(changes)}
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
    machine = {"cpu": "unknown", "cores": "?", "gpu": "", **facts.get("machine", {})}
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu']}".removesuffix(", ")


def banner() -> str:
    """One line: versions, and the class of machine that this process runs on."""
    found = environment()
    versions = ", ".join(f"{name} {found[name]}" for name in ("fedal", "torch", "torchvision"))
    return f"{versions}, Python {found['python']} | {machine_text(found)}"


def progress() -> str:
    """How rounds are shown: as $FEDAL_PROGRESS says, else in a 'bar' of each run, or 'lines' where nobody looks on."""
    watched = "ipykernel" in sys.modules or sys.stderr.isatty()
    return os.environ.get("FEDAL_PROGRESS") or ("bar" if watched else "lines")
