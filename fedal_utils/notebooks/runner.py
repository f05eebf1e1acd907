"""Run a notebook headless and strictly; notebooks are known by the stem of their file in `notebooks/`."""

import ast
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from .. import federation, papers, record
from ..config import Config

SILENCE = {"smoke": 15.0, "quick": 60.0, "paper": 0.0}  # minutes that a notebook may print nothing; 0 = without limit


class NotebookFailed(RuntimeError):
    """A notebook stopped early; the text names the cell, the error, and where the part done by then lies."""


def find(wish: str | None = None) -> list[Path]:
    """The notebooks of the checkout in reading order, or those wished for: "11_fedavg", "11", or "10,11"."""
    paths = sorted((record.project_root() / "notebooks").glob("*.ipynb"))
    if not paths:
        raise ValueError(f"no notebooks in {record.project_root()}: run this inside a checkout of the project")
    stems, chosen = [path.stem for path in paths], {}
    for part in wish.split(",") if wish else stems:
        word = Path(part.strip()).name.removesuffix(".ipynb")
        found = [path for path in paths if word in (path.stem, path.stem.split("_")[0])]
        if len(found) != 1:
            raise ValueError(f"notebook {word!r} is unknown or ambiguous; there are: {', '.join(stems)}")
        chosen[found[0]] = word
    return list(chosen)


def executed(path: Path) -> Path:
    """Where the last executed copy of a notebook lies, if it has been run."""
    return path.parents[1] / "results" / "notebooks" / "_work" / path.name


def read(path: Path) -> dict[str, Any]:
    """A notebook as it lies in its file; `record.write_atomic` writes it."""
    return json.loads(path.read_text(encoding="utf-8"))


def parameters(path: Path) -> dict[str, Any]:
    """Names and default values of a notebook's parameters, read from its source without running it.

    ValueError unless exactly one cell is tagged `parameters` and every statement in it is `name = literal`.
    """
    cells = [c for c in read(path)["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{path.name} must have one code cell tagged 'parameters', it has {len(cells)} tagged cells")
    found: dict[str, Any] = {}
    for text in map(ast.unparse, ast.parse("".join(cells[0]["source"])).body):
        name, _, value = text.partition(" = ")
        name = name.partition(":")[0]  # `name: type = literal` is good as well
        try:
            found[name] = ast.literal_eval(value if name.isidentifier() else "")
        except (ValueError, SyntaxError):
            raise ValueError(f"{path.name}: the parameters cell holds `name = literal` only, got `{text}`") from None
    return found


def checked(path: Path, wishes: dict[str, Any]) -> tuple[dict[str, Any], Config]:
    """The values to hand to a notebook, and the config that it makes of them; other settings join its `overrides`.

    ValueError, before anything runs, for an unknown name, and with whatever `papers.load` and `federation.method_of`
    have against the values; a strategy that a cell of the notebook defines is known there only.
    """
    known = parameters(path)
    values = {name: value for name, value in wishes.items() if name in known}
    others = {name: value for name, value in wishes.items() if name not in known}
    settings = Config.paths() if "overrides" in known else {}
    for name in others.keys() - settings.keys():
        more = f"; settings: {', '.join(sorted(settings))}" if settings else ""
        raise ValueError(f"{path.stem} has no parameter {name!r}; known: {', '.join(known) or 'none'}{more}")
    if others:
        values["overrides"] = {**known["overrides"], **values.get("overrides", {}), **others}
    every = {**known, **values}
    given = {name: every[name] for name in ("profile", "data", "seeds") if name in every}
    own = re.findall(r"""\bstrategy\(\s*\\?["'](\w+)""", path.read_text(encoding="utf-8"))
    try:
        config = papers.load(path.stem, **given, **(every.get("overrides") or {}))
        for method in config.methods:
            if method.rpartition("+")[2] not in own:
                federation.method_of(method, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.stem}: {error}") from None
    return values, config


def default_profile() -> str:
    """The profile that fits this machine: quick with a CUDA GPU, smoke without."""
    return "quick" if torch.cuda.is_available() else "smoke"


def run(
    name: str,
    profile: str | None = None,
    *,
    silence: float | None = None,
    show: Any = None,
    stop: threading.Event | None = None,
    **wishes: Any,
) -> Path:
    """Execute one notebook with papermill, by this very interpreter, from the checkout's root.

    profile: what fits the machine unless given.
    silence: minutes that it may print nothing, those of the profile unless given; how long it takes does not matter.
    show: an open file for what the cells print; True: this process's own.
    stop: once it is set, the notebook is given up.
    wishes: parameters of the notebook, or settings of its config, see `checked`.
    Returns the `executed` copy. NotebookFailed names the failing cell.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    (path,) = find(name)
    if "profile" in parameters(path):
        wishes = {"profile": profile or default_profile(), **wishes}
    values, config = checked(path, wishes)
    minutes = SILENCE[config.profile] if silence is None else silence
    if not minutes >= 0:
        raise ValueError(f"silence is 0 (without limit) or more minutes, got {silence}")
    partial = executed(path).with_suffix(".partial.ipynb")
    partial.parent.mkdir(parents=True, exist_ok=True)
    start, kernel, reasons, ended = time.time(), _kernel(config.threads), [], threading.Event()

    def watch() -> None:
        """Kill the kernel on `stop`, or where `partial`, saved while it prints, has not changed for so long."""
        while not ended.wait(0.3):
            heard = max(start, partial.stat().st_mtime if partial.exists() else 0)
            silent = minutes and time.time() - heard > 60 * minutes
            pid = kernel.last.provisioner.pid if kernel.last and kernel.last.has_kernel else None
            if pid and (silent or (stop and stop.is_set())):
                reasons.append(f"printed nothing for {minutes:g} minutes" if silent else "given up")
                os.killpg(pid, signal.SIGKILL)  # and what the kernel started
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        papermill.execute_notebook(
            *(str(place).replace("{", "{{").replace("}", "}}") for place in (path, partial)),  # it fills in braces
            parameters=json.loads(json.dumps(values)),  # tuples as lists: papermill would write them as texts
            kernel_name="python3",
            language="python",
            progress_bar=False,
            autosave_cell_every=2,  # seconds
            stdout_file=sys.stdout if show is True else show,
            stderr_file=sys.stderr if show is True else None,
            kernel_manager_class=kernel,
            resources={"metadata": {"path": str(path.parents[1])}},  # the kernel works there
        )
    except papermill.PapermillExecutionError as error:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).rstrip().splitlines()[-15:]
        text = "\n".join(f"    {line}" for line in (*lines, "in", *error.source.rstrip().splitlines()[:40]))
        reasons.append(f"cell [{error.exec_count}]: {error.ename}: {error.evalue}\n{text}")
    except DeadKernelError:
        reasons.append("its kernel died, most often for want of memory")
    except OSError as error:  # papermill's and nbclient's own
        if error.errno in record.FULL:
            raise OSError(error.errno, "no space left on the disk, the file was not written", str(partial)) from None
        raise
    finally:
        ended.set()
    if reasons:
        raise NotebookFailed(f"{path.stem}, {reasons[0]}\nWhat it had done: {partial}")
    content, took = read(partial), round((time.time() - start) / 60, 2)
    content["metadata"]["fedal"] = {"parameters": {**parameters(path), **values}, "minutes": took}
    partial.unlink()
    return record.write_atomic(executed(path), content)


def _kernel(threads: int) -> type:
    """A kernel manager that starts this interpreter, whatever kernels the user has installed; `last`: the one made."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    variables = {"FEDAL_PROGRESS": os.environ.get("FEDAL_PROGRESS", "lines")}  # one line per round
    variables |= {"OMP_NUM_THREADS": str(threads)} if threads else {}  # notebooks run side by side
    command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    command += ["--HistoryManager.enabled=False", "--IPKernelApp.log_level=40"]  # no history file; errors only

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, display_name="Python 3", language="python", env=variables)
        last = None

        def __init__(self, **options: Any):
            super().__init__(**options)
            type(self).last = self

    return Kernel
