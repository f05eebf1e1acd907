"""Run notebooks headless and strictly: one, or all of them.

A notebook is known by the stem of its file, `11_fedavg`; one cell tagged `parameters` holds literals only. They
are found by walking `notebooks/`; there is no list of them anywhere.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from . import papers, record
from .config import Config

SILENCE = {"smoke": 15.0, "quick": 60.0, "paper": 0.0}  # minutes that a notebook may print nothing; 0 = without limit


class NotebookFailed(RuntimeError):
    """A notebook stopped early; the text names the cell, the error, and where the part done by then lies."""


def find(wish: str | None = None, root: str | Path | None = None) -> list[Path]:
    """The notebooks in reading order, or those wished for: "11_fedavg", "11", or several with commas between.

    root: the checkout; by default the one that the working directory lies in. ValueError naming what there is if a
    notebook is unknown or ambiguous.
    """
    folder = Path(root or record.project_root()).absolute() / "notebooks"
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise ValueError(f"no notebooks in {folder}: run this inside a checkout of the project")
    chosen = []
    for part in wish.split(",") if wish else [path.stem for path in paths]:
        word = Path(part.strip()).name.removesuffix(".ipynb")
        found = [p for p in paths if p.stem == word] or [p for p in paths if p.stem.split("_")[0] == word]
        if len(found) != 1:
            problem = "is ambiguous" if found else "is unknown"
            raise ValueError(f"notebook {word!r} {problem}; there are: {', '.join(p.stem for p in paths)}")
        chosen += [p for p in found if p not in chosen]
    return chosen


def read(path: Path) -> dict[str, Any]:
    """A notebook as it lies in its file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a notebook ({error})") from None


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write a notebook, keys in order, so that equal notebooks are equal files."""
    return record.write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def parameters(path: str | Path) -> dict[str, Any]:
    """Names and default values of a notebook's parameters, read from its source without running it.

    ValueError unless exactly one cell is tagged `parameters` and every statement in it is `name = literal`.
    """
    path = Path(path)
    cells = [c for c in read(path)["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(cells) != 1 or cells[0]["cell_type"] != "code":
        raise ValueError(f"{path.name} must have one code cell tagged 'parameters', it has {len(cells)} tagged cells")
    found: dict[str, Any] = {}
    for text in map(ast.unparse, ast.parse("".join(cells[0]["source"])).body):
        name, _, value = text.partition(" = ")
        name = name.partition(":")[0]  # `name: type = literal` is good as well
        try:
            if not name.isidentifier():
                raise ValueError(name)
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"{path.name}: the parameters cell holds `name = literal` only, got `{text}`") from None
    return found


def checked(path: Path, wishes: dict[str, Any]) -> dict[str, Any]:
    """The values to hand to a notebook; a name that is not its parameter but a setting of the config joins `overrides`.

    ValueError listing the known names if one is unknown, and with whatever `papers.load` has against the values, before
    anything runs.
    """
    known = parameters(path)
    values = {name: value for name, value in wishes.items() if name in known}
    others = {name: value for name, value in wishes.items() if name not in known}
    settings = Config.paths() if "overrides" in known else {}
    if unknown := [name for name in others if name not in settings]:
        more = f"; settings: {', '.join(sorted(settings))}" if settings else ""
        raise ValueError(f"{path.stem} has no parameter {unknown[0]!r}; known: {', '.join(known) or 'none'}{more}")
    if others:
        values["overrides"] = {**known["overrides"], **values.get("overrides", {}), **others}
    _config(path, values)
    return values


def _config(path: Path, values: dict[str, Any]) -> Config:
    """The config that a notebook makes of these parameters."""
    values = {**parameters(path), **values}
    given = {name: values[name] for name in ("profile", "data", "seeds") if name in values}
    try:
        return papers.load(path.stem, **given, **(values.get("overrides") or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.stem}: {error}") from None


def default_profile() -> str:
    """The profile that fits this machine: quick with a CUDA GPU, smoke without."""
    return "quick" if torch.cuda.is_available() else "smoke"


def run(
    name: str,
    profile: str | None = None,
    *,
    root: str | Path | None = None,
    silence: float | None = None,
    show: bool = False,
    stop: threading.Event | None = None,
    **wishes: Any,
) -> Path:
    """Execute one notebook with papermill, by this very interpreter, from the checkout's root.

    profile: what fits the machine unless given.
    silence: minutes that it may print nothing, those of the profile unless given; how long it takes does not matter.
    show: pass on what the cells print.
    stop: once it is set, the notebook is given up.
    wishes: parameters of the notebook, or settings of its config; unknown ones are refused before anything runs.

    Returns the copy with outputs, `results/notebooks/_work/<name>.ipynb`. NotebookFailed names the failing cell.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    (path,) = find(name, root)
    if "profile" in parameters(path):
        wishes = {"profile": profile or default_profile(), **wishes}
    values, home = checked(path, wishes), path.parents[1]
    output = home / "results" / "notebooks" / "_work" / path.name
    partial = output.with_suffix(".partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    minutes = SILENCE[wishes.get("profile", "smoke")] if silence is None else silence
    if not minutes >= 0:
        raise ValueError(f"silence is 0 (without limit) or more minutes, got {silence}")
    start, kernels, reasons = time.time(), [], []
    try:
        with _watch(kernels, reasons, partial, minutes, stop or threading.Event()):
            papermill.execute_notebook(
                *(str(place).replace("{", "{{").replace("}", "}}") for place in (path, partial)),  # it fills in braces
                parameters=json.loads(json.dumps(values)),  # tuples as lists: papermill would write them as texts
                kernel_name="python3",
                language="python",
                progress_bar=False,
                autosave_cell_every=2,  # seconds
                stdout_file=sys.stdout if show else None,
                stderr_file=sys.stderr if show else None,
                kernel_manager_class=_kernel(_config(path, values).threads, kernels),
                resources={"metadata": {"path": str(home)}},  # the kernel works there
            )
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        reason = "".join(reasons) or _reason(error)
        raise NotebookFailed(f"{path.stem}, {reason}\nWhat it had done: {partial}") from error
    executed, took = read(partial), round((time.time() - start) / 60, 2)
    executed["metadata"]["fedal"] = {"parameters": {**parameters(path), **values}, "minutes": took}
    write(output, executed)
    partial.unlink()
    return output


def _kernel(threads: int, kernels: list[Any]) -> type:
    """A kernel manager that starts this interpreter, whatever kernels the user has installed, and joins `kernels`."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    variables = {"FEDAL_PROGRESS": os.environ.get("FEDAL_PROGRESS", "lines")}  # one line per round
    variables |= {"OMP_NUM_THREADS": str(threads)} if threads else {}  # notebooks run side by side
    command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    command += ["--HistoryManager.enabled=False", "--IPKernelApp.log_level=40"]  # no history file; errors only

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, display_name="Python 3", language="python", env=variables)

        def __init__(self, **options: Any):
            super().__init__(**options)
            kernels.append(self)

    return Kernel


@contextlib.contextmanager
def _watch(kernels: list, reasons: list[str], partial: Path, minutes: float, stop: threading.Event) -> Iterator[None]:
    """Kill the kernel on `stop`, or where `partial`, saved while it prints, has not changed for so long; note why."""
    ended, start = threading.Event(), time.time()

    def watch() -> None:
        while not ended.wait(0.3):
            heard = max(start, partial.stat().st_mtime if partial.exists() else 0)
            silent = minutes and time.time() - heard > 60 * minutes
            pid = kernels[0].provisioner.pid if kernels and kernels[0].has_kernel else None
            if pid and (silent or stop.is_set()):
                reasons.append(f"printed nothing for {minutes:g} minutes" if silent else "given up")
                os.killpg(pid, signal.SIGKILL)  # and what the kernel started
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _reason(error: Any) -> str:
    """What stopped a notebook, the reason first: error and end of its traceback, then the cell's source."""
    if not hasattr(error, "ename"):
        return "its kernel died, most often for want of memory"
    traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).rstrip().splitlines()[-15:]
    parts = (traceback, ["in"], error.source.rstrip().splitlines()[:40])
    text = "\n".join(f"    {line}" for part in parts for line in part)
    return f"cell [{error.exec_count}]: {error.ename}: {error.evalue}\n{text}"


def reproduce(
    nb: str | None = None,
    profile: str | None = None,
    seeds: Sequence[int] | None = None,
    data: str | None = None,
    *,
    root: str | Path | None = None,
    jobs: int | None = None,
) -> list[str]:
    """Run every notebook (or those of `nb`, see `find`), print the minutes of each; the names of those that failed.

    seeds, data: reach the notebooks that have such a parameter; ValueError if none has.
    jobs: notebooks that run side by side; by default two where there are two cores and all train on one thread.

    A notebook that fails does not stop the others. Metadata {"fedal": {"after": [...]}} names notebooks whose runs
    another reads: it starts when they are done. {"needs": {"package": "extra"}}: it is passed over where the package
    is not installed, unless it was named: then ValueError.
    """
    profile, given, late, wanted = profile or default_profile(), {}, [], find(nb, root)
    for path in wanted:
        notes = read(path).get("metadata", {}).get("fedal", {})
        lacking = [extra for package, extra in notes.get("needs", {}).items() if not importlib.util.find_spec(package)]
        if lacking and nb:
            raise ValueError(f"{path.stem} needs an extra: pip install -e '.[{lacking[0]}]'")
        if lacking:
            print(f"passed over: {path.stem} needs an extra: pip install -e '.[{lacking[0]}]'", flush=True)
            continue
        values = {"profile": profile, "seeds": seeds, "data": data}
        wishes = {name: values[name] for name in parameters(path) if values.get(name) is not None}
        given[path] = checked(path, wishes)  # refused early: the last notebook may be hours away
        late += [path] if {other.stem for other in wanted} & set(notes.get("after", [])) else []
    for name, value in (("seeds", seeds), ("data", data)):
        if value is not None and not any(name in wishes for wishes in given.values()):
            raise ValueError(f"none of {', '.join(p.stem for p in given)} has a parameter {name!r}")
    narrow = (os.cpu_count() or 1) > 1 and all(_config(path, wishes).threads == 1 for path, wishes in given.items())
    width, start, failed = max(len(path.stem) for path in given), time.monotonic(), {}
    print(f"{len(given)} notebook{'s' * (len(given) > 1)}, profile {profile}", flush=True)
    pool, stop = ThreadPoolExecutor(jobs or 1 + narrow), threading.Event()
    try:
        for wave in ([path for path in given if path not in late], late):
            for task in as_completed([pool.submit(_attempt, path, given[path], stop) for path in wave]):
                name, minutes, problem = task.result()
                if problem:
                    failed[name] = problem.partition("\n")[0]
                    print(problem, file=sys.stderr, flush=True)
                print(f"{name:<{width}}  {minutes:5.1f} min  {'FAILED' if problem else 'done'}", flush=True)
    finally:
        stop.set()  # of an interruption: no kernel goes on by itself
        pool.shutdown(cancel_futures=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{'all':<{width}}  {minutes:5.1f} min  {len(given) - len(failed)} of {len(given)} notebooks")
    print(
        *(f"FAILED: {problem}" for problem in failed.values()), "In results/: figures/, tables/, notebooks/", sep="\n"
    )
    return sorted(failed)


def _attempt(path: Path, wishes: dict[str, Any], stop: threading.Event) -> tuple[str, float, str]:
    """Run one notebook; its name, its minutes, and what went wrong ("" = nothing)."""
    start, problem = time.monotonic(), ""
    try:
        run(path.stem, root=path.parents[1], stop=stop, **wishes)
    except Exception as error:  # does not take the others down
        problem = str(error) if isinstance(error, NotebookFailed) else f"{path.stem}: {type(error).__name__}: {error}"
    return path.stem, (time.monotonic() - start) / 60, problem
