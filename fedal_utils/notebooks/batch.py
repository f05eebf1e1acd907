"""Run many notebooks, side by side, with a live line for each; the size of the papers is planned before it starts."""

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from .. import data as sets
from .. import record
from ..config import Config
from .runner import NotebookFailed, checked, default_profile, find, parameters, read, run

DISK = 5.0  # GB that must be free before the size of the papers starts


def minutes(profile: str) -> dict[str, float]:
    """Notebook -> wall minutes of all its runs, as `reproduce` measured them last: tables/minutes-<profile>.csv."""
    path = record.project_root() / "results" / "tables" / f"minutes-{profile}.csv"
    return dict(pd.read_csv(path).itertuples(index=False)) if path.exists() else {}


def expected(path: Path, profile: str) -> str:
    """How long a notebook takes, in words: as measured, else as its claim card says."""
    if path.stem in (known := minutes(profile)):
        return f"about {known[path.stem]:.2g} min"
    row = rf"\| (?:[^|\n]*`{profile}`[^|\n]*|machine, minutes) \| ([^|\n]*) \|"
    card = re.search(row, "".join(read(path)["cells"][0]["source"]))
    return card[1].rpartition(": ")[2] if card else "unknown"


class _Line:
    """A notebook that runs: elapsed and expected minutes, and the last line that it printed (it is its stdout)."""

    def __init__(self, name: str, expects: str):
        self.name, self.expects, self.begin, self.said = name, expects, time.monotonic(), ""

    def write(self, text: str) -> None:
        self.said = (text.strip().splitlines() or [self.said])[-1]

    def flush(self) -> None:
        pass

    def took(self) -> float:
        return (time.monotonic() - self.begin) / 60

    def __str__(self) -> str:
        return f"{self.name}  {self.took():5.1f} min, expected: {self.expects}  {self.said}".rstrip()


class _Screen:
    """Lines of notebooks: on a terminal below all others and renewed each second, else told every five minutes."""

    def __init__(self):
        self.lines: dict[str, _Line] = {}
        self.watched, self.lock, self.ended = sys.stdout.isatty(), threading.Lock(), threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()

    def _renew(self) -> None:
        while not self.ended.wait(1 if self.watched else 300):
            self.tell(*([] if self.watched else map(str, list(self.lines.values()))))

    def tell(self, *texts: str, file=None) -> None:
        """Print these for good, the live lines anew below them."""
        with self.lock:
            print("\r\x1b[J" * self.watched, end="", flush=True)
            print(*texts, sep="\n", end="\n" * bool(texts), file=file or sys.stdout, flush=True)
            if self.watched and self.lines and not self.ended.is_set():
                width = shutil.get_terminal_size().columns - 1
                live = [str(line)[:width] for line in list(self.lines.values())]
                print(*live, sep="\n", end="\x1b[A" * (len(live) - 1), flush=True)


def plan(configs: Mapping[Path, Config]) -> None:
    """Print what the size of the papers needs: data, hours, disk. ValueError, with the way out, if some is missing."""
    lacking, known = {}, minutes("paper")
    for path, config in configs.items():
        name = config.data.dataset
        lacking[name] = sets.missing(name)
        hours = f"{known[path.stem] / 60:.1f} hours" if path.stem in known else "hours: not run"
        print(f"{path.stem:<20} {name:<12} {'MISSING' if lacking[name] else 'there':<8} {hours}")
    free = shutil.disk_usage(record.project_root()).free / 1e9
    print(f"disk: {free:.0f} GB free", flush=True)
    lacking["disk"] = f"{DISK:g} GB free are needed" if free < DISK else ""
    if problems := [f"{name}: {way}" for name, way in lacking.items() if way]:
        raise ValueError("\n  ".join(["nothing was run; missing:", *problems]))


def reproduce(
    nb: str | None = None,
    profile: str | None = None,
    seeds: Sequence[int] | None = None,
    data: str | None = None,
    jobs: int | None = None,
) -> list[str]:
    """Run every notebook (or those of `nb`, see `find`), print the minutes of each; the names of those that failed.

    profile: what fits the machine unless given.
    seeds, data: reach the notebooks that have such a parameter; ValueError if none has.
    jobs: notebooks that run side by side; by default two where there are two cores and all train on one thread.
    A notebook that fails does not stop the others. Metadata {"fedal": {"after": [...]}} names notebooks whose results
    another reads ("*": all): it starts when they are done.
    """
    profile, wanted, given, configs, after = profile or default_profile(), find(nb), {}, {}, {}
    stems, root, own = {path.stem for path in wanted}, record.project_root(), {"seeds": seeds, "data": data}
    for path in wanted:
        values = {"profile": profile, **own}
        wishes = {name: values[name] for name in parameters(path) if values.get(name) is not None}
        given[path], configs[path] = checked(path, wishes)  # refused early: the last notebook may be hours away
        names = read(path)["metadata"].get("fedal", {}).get("after", [])
        after[path.stem] = [stem for stem in stems - {path.stem} if stem in names or "*" in names]
    for name, value in own.items():
        if value is not None and not any(name in wishes for wishes in given.values()):
            raise ValueError(f"none of {', '.join(p.stem for p in given)} has a parameter {name!r}")
    print(f"{len(given)} notebook{'s' * (len(given) > 1)}, profile {profile}", flush=True)
    if profile == "paper":
        plan(configs)
    width, start, stop, problems, screen = max(map(len, stems)), time.monotonic(), threading.Event(), {}, _Screen()
    narrow = (os.cpu_count() or 1) > 1 and all(config.threads == 1 for config in configs.values())

    def wave(stem: str) -> int:
        return 1 + max(map(wave, after[stem]), default=-1)

    def attempt(path: Path) -> None:
        name, whole = path.stem, not (root / "results" / "runs" / path.stem).exists() and {*own.values()} == {None}
        line = screen.lines[name] = _Line(f"{name:<{width}}", expected(path, profile))
        screen.tell(*([] if screen.watched else [f"{line.name}  begins, expected: {line.expects}"]))
        try:
            run(name, stop=stop, show=line, **given[path])
        except Exception as error:  # does not take the others down
            kind = "" if isinstance(error, NotebookFailed) else f"{name}: {type(error).__name__}: "
            problems[name] = f"{kind}{error}"
        del screen.lines[name]
        if stop.is_set():
            return
        screen.tell(*([problems[name]] if name in problems else []), file=sys.stderr)
        screen.tell(f"{line.name}  {line.took():5.1f} min  {'FAILED' if name in problems else 'done'}")
        with screen.lock:
            known = minutes(profile)
            if whole and name not in problems and not 2 / 3 < line.took() / known.get(name, 1e9) < 3 / 2:
                rows = sorted({**known, name: round(line.took(), 1)}.items())
                record.save(pd.DataFrame(rows, columns=["notebook", "minutes"]), f"minutes-{profile}.csv")

    pool = ThreadPoolExecutor(jobs or 1 + narrow)
    try:
        for number in sorted({wave(stem) for stem in stems}):
            list(pool.map(attempt, [path for path in given if wave(path.stem) == number]))
    finally:
        stop.set()  # of an interruption: no kernel goes on by itself
        screen.ended.set()
        pool.shutdown(cancel_futures=True)
    good, total = len(given) - len(problems), (time.monotonic() - start) / 60
    print(f"{'all':<{width}}  {total:5.1f} min  {good} of {len(given)} notebooks")
    failed = [f"FAILED: {text.splitlines()[0]}" for text in problems.values()]
    print(*failed, "In results/: figures/, tables/, notebooks/", sep="\n")
    return sorted(problems)
