"""Run many notebooks, side by side, with a live line for each; the size of the papers is planned before it starts."""

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
from tqdm import tqdm

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
    parts = [part for part in re.split("[:,;] ", card[1]) if re.search("second|minute|hour|day", part)] if card else []
    return re.sub(" (on|of|in) .*", "", parts[-1]) if parts else "unknown"


@contextlib.contextmanager
def _live(name: str, expects: str) -> Iterator[SimpleNamespace]:
    """A notebook's line while it runs, renewed each second on a terminal, else told every five minutes.

    Gives the open file that takes what the notebook prints: the last of it stands on the line.
    """
    watched, ended, said, begin = sys.stdout.isatty(), threading.Event(), deque([""], 1), time.monotonic()
    bar = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True, file=sys.stdout, disable=not watched)

    def renew() -> None:
        while not ended.wait(1 if watched else 300):
            text = f"{name}  {(time.monotonic() - begin) / 60:5.1f} min, expected: {expects}  {said[0][-100:]}"
            bar.set_description_str(text) if watched else tqdm.write(text)

    if not watched:
        print(f"{name}  begins, expected: {expects}", flush=True)
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield SimpleNamespace(write=lambda text: said.extend(text.strip().splitlines()), flush=lambda: None)
    finally:
        ended.set()
        thread.join()
        bar.close()


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
    width, start, stop, problems, lock = max(map(len, stems)), time.monotonic(), threading.Event(), {}, threading.Lock()
    narrow = (os.cpu_count() or 1) > 1 and all(config.threads == 1 for config in configs.values())

    def wave(stem: str) -> int:
        return 1 + max(map(wave, after[stem]), default=-1)

    def attempt(path: Path) -> None:
        name, begin = path.stem, time.monotonic()
        whole = not (root / "results" / "runs" / name).exists() and {*own.values()} == {None}
        try:
            with _live(f"{name:<{width}}", expected(path, profile)) as shown:
                run(name, stop=stop, show=shown, **given[path])
        except Exception as error:  # does not take the others down
            if stop.is_set():
                return
            kind = "" if isinstance(error, NotebookFailed) else f"{name}: {type(error).__name__}: "
            problems[name] = f"{kind}{error}"
            tqdm.write(problems[name], file=sys.stderr)
        took = (time.monotonic() - begin) / 60
        tqdm.write(f"{name:<{width}}  {took:5.1f} min  {'FAILED' if name in problems else 'done'}")
        with lock:
            known = minutes(profile)
            if whole and name not in problems and not 2 / 3 < took / known.get(name, 1e9) < 3 / 2:
                rows = sorted({**known, name: round(took, 1)}.items())
                record.save(pd.DataFrame(rows, columns=["notebook", "minutes"]), f"minutes-{profile}.csv")

    pool = ThreadPoolExecutor(jobs or 1 + narrow)
    try:
        for number in sorted({wave(stem) for stem in stems}):
            list(pool.map(attempt, [path for path in given if wave(path.stem) == number]))
    finally:
        stop.set()  # of an interruption: no kernel goes on by itself
        pool.shutdown(cancel_futures=True)
    good, total = len(given) - len(problems), (time.monotonic() - start) / 60
    print(f"{'all':<{width}}  {total:5.1f} min  {good} of {len(given)} notebooks")
    failed = [f"FAILED: {text.splitlines()[0]}" for text in problems.values()]
    print(*failed, "In results/: figures/, tables/, notebooks/", sep="\n")
    return sorted(problems)
