"""Run notebooks headless and strictly, publish executed copies, keep their badges and navigation in order.

A notebook is known by the stem of its file, `11_fedavg`; one cell tagged `parameters` holds literals only. They
are found by walking `notebooks/`; there is no list of them anywhere.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import papers, record
from .config import Config

REPOSITORY = "https://github.com/fedal-project/fedal"  # pyproject.toml and CITATION.cff repeat it; a test compares
BRANCH = "main"
MAX_PUBLISHED = 1_000_000  # bytes
# Wall minutes that one notebook may take. A notebook's own metadata, {"fedal": {"minutes": {"smoke": 3}}}, goes first.
MINUTES: dict[str, float | None] = {"smoke": 15, "quick": 180, "paper": None}

_NAVIGATION = re.compile(r"<!-- navigation -->.*?<!-- /navigation -->", re.DOTALL)


class NotebookFailed(RuntimeError):
    """A notebook stopped early; the text names the cell and the error, `partial` is what it had done by then."""

    def __init__(self, message: str, partial: Path):
        super().__init__(message)
        self.partial = partial


@dataclass(frozen=True)
class Done:
    """One executed notebook: where its copy lies and how long it took."""

    name: str
    minutes: float
    output: Path


# --- finding ----------------------------------------------------------------------------------------------------------


def folder(root: str | Path | None = None) -> Path:
    """The `notebooks/` folder of the checkout that the working directory, or else this package, lies in."""
    if root is not None:
        return Path(root) / "notebooks"
    for place in (record.project_root(), Path(__file__).resolve().parents[1]):
        if (place / "notebooks").is_dir():
            return place / "notebooks"
    raise ValueError(f"no notebooks/ in {record.project_root()}: run this inside a checkout of {REPOSITORY}")


def find(wish: str | None = None, root: str | Path | None = None) -> list[Path]:
    """The notebooks in reading order, or those wished for: "11_fedavg", "11", or several with commas between.

    ValueError naming what there is if one of them is unknown or ambiguous.
    """
    paths = sorted(folder(root).glob("*.ipynb"))
    if not wish:
        return paths
    chosen = []
    for word in (part.strip().removesuffix(".ipynb") for part in wish.split(",")):
        word = Path(word).name
        found = [p for p in paths if p.stem == word] or [p for p in paths if p.stem.split("_")[0] == word]
        if len(found) != 1:
            problem = "is ambiguous" if found else "is unknown"
            raise ValueError(f"notebook {word!r} {problem}; there are: {', '.join(p.stem for p in paths) or 'none'}")
        chosen += [p for p in found if p not in chosen]
    return chosen


def parameters(path: str | Path) -> dict[str, Any]:
    """Names and default values of a notebook's parameters, read from its source without running it.

    ValueError unless exactly one cell is tagged `parameters` and every statement in it is `name = literal`.
    """
    path = Path(path)
    cells = [c for c in _read(path)["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(cells) != 1 or cells[0]["cell_type"] != "code":
        raise ValueError(f"{path.name} must have one code cell tagged 'parameters', it has {len(cells)} tagged cells")
    found: dict[str, Any] = {}
    for statement in ast.parse(_source(cells[0])).body:
        text = ast.unparse(statement)
        if isinstance(statement, ast.AnnAssign):
            targets, value = [statement.target], statement.value
        elif isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        else:
            raise ValueError(f"{path.name}: the parameters cell holds `name = literal` only, got `{text}`")
        if len(targets) != 1 or not isinstance(targets[0], ast.Name) or value is None:
            raise ValueError(f"{path.name}: the parameters cell holds `name = literal` only, got `{text}`")
        try:
            found[targets[0].id] = ast.literal_eval(value)
        except ValueError:
            raise ValueError(f"{path.name}: the parameters cell holds literals only, got `{text}`") from None
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a notebook ({error})") from None


def _source(cell: dict[str, Any]) -> str:
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


# --- running ----------------------------------------------------------------------------------------------------------


def default_profile() -> str:
    """The profile that fits this machine: quick with a CUDA GPU, smoke without."""
    import torch

    return "quick" if torch.cuda.is_available() else "smoke"


def checked(path: Path, wishes: dict[str, Any]) -> dict[str, Any]:
    """The values to hand to a notebook; a name that is not its parameter but a setting of the config joins `overrides`.

    ValueError listing the known names if one is unknown, and with whatever `config.load` has against the values, before
    anything runs.
    """
    known = parameters(path)
    values = {name: value for name, value in wishes.items() if name in known}
    others = {name: value for name, value in wishes.items() if name not in known}
    if others:
        settings = Config.paths() if "overrides" in known else {}
        unknown = [name for name in others if name not in settings]
        if unknown:
            more = f"; settings: {', '.join(sorted(settings))}" if settings else ""
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"{path.stem} has no parameter {names}; known: {', '.join(known) or 'none'}{more}")
        values["overrides"] = {**known["overrides"], **values.get("overrides", {}), **others}
    if any("papers.load(" in _source(cell) for cell in _read(path)["cells"]):
        final = {**known, **values}
        given = {name: final[name] for name in ("profile", "data", "seeds") if name in final}
        try:
            papers.load(path.stem, **given, **(final.get("overrides") or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.stem}: {error}") from None
    return values


def run(
    name: str,
    profile: str | None = None,
    *,
    root: str | Path | None = None,
    minutes: float | None = None,
    show: bool = False,
    bar: bool = False,
    **wishes: Any,
) -> Done:
    """Execute one notebook with papermill, by this very interpreter, from the checkout's root.

    wishes: parameters of the notebook, or settings of its config; unknown ones are refused before anything runs.
    minutes: wall limit, that of the profile unless given. show: pass on what the cells print. bar: a progress bar over
    cells. The copy with outputs goes to `results/notebooks/_work/<name>.ipynb`. NotebookFailed names the failing cell.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    (path,) = find(name, root)
    home = path.absolute().parents[1]
    if profile is None and "profile" in parameters(path):
        profile = default_profile()
    values = checked(path, {**({} if profile is None else {"profile": profile}), **wishes})
    limit = _limit(path, profile) if minutes is None else minutes
    work = home / "results" / "notebooks" / "_work"
    work.mkdir(parents=True, exist_ok=True)
    output, failed = work / path.name, work / f"{path.stem}.failed.ipynb"
    for leftover in work.glob(f".{path.stem}.*.tmp.ipynb"):  # of a runner that was killed
        if not Path(f"/proc/{leftover.name.split('.')[-3]}").exists():
            leftover.unlink()
    partial = work / f".{path.stem}.{os.getpid()}.tmp.ipynb"
    start = time.monotonic()

    def seconds_left(cell: Any) -> float | None:
        return None if limit is None else max(1.0, limit * 60 - (time.monotonic() - start))

    try:
        with _this_interpreter(home):
            papermill.execute_notebook(
                _unformatted(path),
                _unformatted(partial),
                parameters=values,
                kernel_name="python3",
                language="python",
                cwd=str(home),
                progress_bar={"leave": False, "desc": path.stem} if bar else False,
                stdout_file=sys.stdout if show else None,
                stderr_file=sys.stderr if show else None,
                timeout_func=seconds_left,
            )
        took = (time.monotonic() - start) / 60
        executed = _read(partial)
        executed["metadata"]["fedal"] = {"parameters": {**parameters(path), **values}, "minutes": round(took, 2)}
        record.write_atomic(output, _encode(executed))
        failed.unlink(missing_ok=True)
    except (papermill.PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
        os.replace(partial, failed)
        raise NotebookFailed(f"{path.stem} {_reason(error, limit)}\nWhat it had done: {failed}", failed) from error
    finally:
        partial.unlink(missing_ok=True)
    return Done(path.stem, took, output)


def _after(path: Path) -> list[str]:
    """Names of the notebooks whose runs this one reads."""
    return _read(path).get("metadata", {}).get("fedal", {}).get("after", [])


def _threads(path: Path, values: dict[str, Any]) -> int:
    """CPU threads of this notebook's training steps with these parameters."""
    given = {name: values[name] for name in ("profile", "data") if name in values}
    return papers.load(path.stem, **given).threads


def _unformatted(path: Path) -> str:
    """The path as papermill wants it: it fills braces in paths like a format string."""
    return str(path.absolute()).replace("{", "{{").replace("}", "}}")


def _limit(path: Path, profile: str | None) -> float | None:
    own = _read(path).get("metadata", {}).get("fedal", {}).get("minutes", {})
    return own[profile] if profile in own else MINUTES.get(profile or "smoke")


def _reason(error: Exception, limit: float | None) -> str:
    """What stopped a notebook: the cell's source and the end of its traceback, or the limit, or a dead kernel."""
    if type(error).__name__ == "CellTimeoutError":
        return f"passed its limit of {limit:g} minutes: {str(error).strip()}"
    if type(error).__name__ == "DeadKernelError":
        return "lost its kernel: the process died, most often for want of memory"
    source = "\n".join(f"    {line}" for line in error.source.rstrip().splitlines()[:40])
    traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).rstrip().splitlines()
    shown = "\n".join(f"    {line}" for line in traceback[-15:])
    return f"failed in [{error.exec_count}]:\n{source}\n{error.ename}: {error.evalue}\n{shown}"


@contextlib.contextmanager
def _this_interpreter(home: Path) -> Iterator[None]:
    """Make `python3` the kernel of the running interpreter, whatever kernels the user has installed.

    The kernel finds the checkout before an installed copy of the package, and prints one line per round.
    """
    paths = [str(home), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "FEDAL_HOME": str(home),
        "FEDAL_PROGRESS": os.environ.get("FEDAL_PROGRESS", "lines"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a warning of the debugger that nobody uses here
    }
    if os.environ.get("FEDAL_DATA"):
        variables["FEDAL_DATA"] = str(Path(os.environ["FEDAL_DATA"]).expanduser().absolute())
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    command += ["--HistoryManager.enabled=False", "--IPKernelApp.log_level=40"]  # no history file; errors only
    specification = {"argv": command, "display_name": "Python 3", "language": "python", "env": variables}
    earlier = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory(prefix="fedal-kernel-") as place:
        kernel = Path(place) / "kernels" / "python3"
        kernel.mkdir(parents=True)
        (kernel / "kernel.json").write_text(json.dumps(specification), encoding="utf-8")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [place, earlier]))
        try:
            yield
        finally:
            if earlier is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = earlier


def reproduce(
    nb: str | None = None,
    profile: str | None = None,
    seeds: Sequence[int] | None = None,
    data: str | None = None,
    *,
    root: str | Path | None = None,
    jobs: int | None = None,
) -> list[str]:
    """Run every notebook (or those of `nb`, see `find`); print the minutes of each and where the figures are.

    seeds and data reach the notebooks that have such a parameter; ValueError if none has. A notebook that fails does
    not stop the others. jobs: notebooks that run side by side; by default one, but two where there are two cores and
    all settings train on one thread (two such fits side by side beat one on two threads). A notebook that reads the
    runs of others (metadata {"fedal": {"after": [...]}}) starts when those are done. One whose packages are not
    installed ({"needs": {"package": "extra"}}) is passed over, unless it was named: then ValueError. Returns the names
    of those that failed.
    """
    paths = find(nb, root)
    if not paths:
        raise ValueError(f"no notebooks in {folder(root)}")
    lacking = {path: extra for path in paths if (extra := _lacks(path))}
    for path, extra in lacking.items():
        reason = f"{path.stem} needs the extra {extra!r}: pip install -e '.[{extra}]'"
        if nb:
            raise ValueError(reason)
        print(f"passed over: {reason}", flush=True)
    paths = [path for path in paths if path not in lacking]
    profile = profile or default_profile()
    wishes = {"profile": profile, "seeds": seeds, "dataset": data_place(data, paths[0].absolute().parents[1])}
    wishes = {name: value for name, value in wishes.items() if value is not None}
    known = {path: parameters(path) for path in paths}
    for name in set(wishes) - {"profile"}:
        if not any(name in names for names in known.values()):
            raise ValueError(f"none of {', '.join(p.stem for p in paths)} has a parameter {name!r}")
    accepted = {path: {k: v for k, v in wishes.items() if k in known[path]} for path in paths}
    for path in paths:  # refuse early: the last notebook may be hours away
        checked(path, accepted[path])
    figures = paths[0].absolute().parents[1] / "results" / "figures"
    before = _stamps(figures)
    failed = []
    width = max(len(path.stem) for path in paths)
    print(f"{len(paths)} notebook{'s' * (len(paths) > 1)}, profile {profile}", flush=True)
    narrow = all(_threads(path, accepted[path]) == 1 for path in paths)
    jobs = min(len(paths), jobs or (2 if narrow and record.environment()["machine"]["cores"] > 1 else 1))
    late = [path for path in paths if {other.stem for other in paths} & set(_after(path))]
    start = time.monotonic()
    with _workers(jobs) as each:
        for wave in ([path for path in paths if path not in late], late):
            tasks = [(path.stem, str(path.absolute().parents[1]), accepted[path]) for path in wave]
            for path, (minutes, problem) in zip(wave, each(_attempt, tasks), strict=True):
                if problem:
                    failed.append(path.stem)
                    print(problem, file=sys.stderr, flush=True)
                note = "  ".join(f"{k}={_short(v)}" for k, v in accepted[path].items())
                print(
                    f"{path.stem:<{width}}  {minutes:5.1f} min  {'FAILED' if problem else 'done'}  {note}", flush=True
                )
    total = (time.monotonic() - start) / 60
    changed = [place for place, stamp in _stamps(figures).items() if before.get(place) != stamp]
    print(f"{'all':<{width}}  {total:5.1f} min  {len(paths) - len(failed)} of {len(paths)} notebooks")
    print("Figures:" if changed else f"No figure changed in {_relative(figures)}.")
    for place in changed:
        print(f"  {_relative(place)}")
    print(f"Notebooks with their outputs: {_relative(figures.parent / 'notebooks' / '_work')}", flush=True)
    return failed


def _lacks(path: Path) -> str:
    """The extra that this notebook needs and that is not installed here; '' if nothing is missing."""
    needs = _read(path).get("metadata", {}).get("fedal", {}).get("needs", {})
    return next((extra for package, extra in needs.items() if importlib.util.find_spec(package) is None), "")


def _attempt(task: tuple[str, str, dict[str, Any]]) -> tuple[float, str]:
    """Run one notebook; its minutes, and what went wrong ("" = nothing). At the top level, for other processes."""
    name, root, wishes = task
    start, problem, values = time.monotonic(), "", dict(wishes)
    try:
        run(name, values.pop("profile", None), root=root, bar=_tty(), **values)
    except NotebookFailed as error:
        problem = str(error)
    return (time.monotonic() - start) / 60, problem


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over `jobs` processes whose results come in order; the plain one for a single job."""
    if jobs < 2:
        yield map
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def data_place(data: str | None, home: Path | None = None) -> str | None:
    """A data set's name as it is; the path of a folder made good for a notebook, which works in the checkout's root."""
    home = folder().absolute().parent if home is None else home
    if data is None or not (set(data) & {"/", os.sep} or data.startswith((".", "~"))):
        return data
    path = Path(data).expanduser()
    return str(path if path.is_absolute() or Path.cwd() == home else path.absolute())


def _stamps(figures: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(figures.glob("*.png"))}


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _tty() -> bool:
    return sys.stderr.isatty()


# --- publishing -------------------------------------------------------------------------------------------------------


def publish(name: str, root: str | Path | None = None) -> Path:
    """Copy the last executed copy of a notebook to `results/notebooks/`, without traces of the machine it ran on.

    ValueError if it has not been run, or if the copy is above 1 MB: then the largest outputs are named.
    """
    (path,) = find(name, root)
    home = path.absolute().parents[1]
    source = home / "results" / "notebooks" / "_work" / path.name
    if not source.exists():
        raise ValueError(f"{path.stem} has not been run: python -m fedal_utils run {path.stem}")
    content = _without_traces(_read(source), home)
    encoded = _encode(content).encode()
    if len(encoded) > MAX_PUBLISHED:
        sizes = sorted(((len(json.dumps(c)), i) for i, c in enumerate(content["cells"])), reverse=True)[:3]
        largest = ", ".join(f"cell {i}: {size / 1e6:.2f} MB" for size, i in sizes)
        raise ValueError(f"{path.stem} is {len(encoded) / 1e6:.2f} MB with its outputs, 1 MB is allowed ({largest})")
    return record.write_atomic(home / "results" / "notebooks" / path.name, encoded)


def _without_traces(content: dict[str, Any], home: Path) -> dict[str, Any]:
    """An executed notebook without papermill's notes, time stamps, widget states and local absolute paths."""
    places = {str(home): ".", str(home.resolve()): ".", sys.prefix: "<python>", sys.base_prefix: "<python>"}
    places |= {tempfile.gettempdir(): "<temporary>", str(Path.home()): "~"}
    places = {place: name for place, name in places.items() if len(place) > 1}
    pattern = re.compile("|".join(map(re.escape, sorted(places, key=len, reverse=True))))

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: places[match.group()], value)
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, dict):
            return {k: v if k.startswith("image/") and k != "image/svg+xml" else clean(v) for k, v in value.items()}
        return value

    content = clean(content)
    for owner in (content, *content["cells"]):
        for noise in ("papermill", "execution", "widgets"):
            owner["metadata"].pop(noise, None)
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return content


def _encode(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


# --- badges and navigation --------------------------------------------------------------------------------------------


def badge(name: str) -> str:
    """Markdown of the button that opens a notebook on Colab."""
    slug = REPOSITORY.removeprefix("https://github.com/")
    target = f"https://colab.research.google.com/github/{slug}/blob/{BRANCH}/notebooks/{name}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def navigation_line(name: str, names: Sequence[str]) -> str:
    """Badge and links to the notebooks before and after, between the marks by which `navigation` finds it again."""
    place = list(names).index(name)
    parts = [badge(name)]
    if place > 0:
        parts.append(f"previous: [{names[place - 1]}]({names[place - 1]}.ipynb)")
    if place + 1 < len(names):
        parts.append(f"next: [{names[place + 1]}]({names[place + 1]}.ipynb)")
    return f"<!-- navigation -->{' · '.join(parts)}<!-- /navigation -->"


def navigation(root: str | Path | None = None, write: bool = True) -> list[str]:
    """Bring the badge and links in each notebook's first markdown cell up to date; the names of those that were not.

    A cell without the marks gets the line under its title.
    """
    paths = find(None, root)
    names = [path.stem for path in paths]
    stale = []
    for path in paths:
        content = _read(path)
        cell = next((c for c in content["cells"] if c["cell_type"] == "markdown"), None)
        if cell is None:
            raise ValueError(f"{path.name} has no markdown cell to put its navigation into")
        text, line = _source(cell), navigation_line(path.stem, names)
        if _NAVIGATION.search(text):
            new = _NAVIGATION.sub(lambda _, line=line: line, text, count=1)
        else:
            title, _, rest = text.partition("\n")
            new = f"{title}\n\n{line}\n\n{rest.lstrip()}".rstrip()
        if new != text:
            stale.append(path.stem)
            if write:
                cell["source"] = new.splitlines(keepends=True)
                record.write_atomic(path, _encode(content))
    return stale
