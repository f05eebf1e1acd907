"""Tables over all runs of a setting, and the records: every row of every published run in two tidy files.

`check` is a digest of all rows of a run, in both files: a row that was changed or cut is noticed.
"""

import functools
import gzip
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from ..config import Config
from .environment import machine_text
from .files import ADVICE, encode, folder_name, project_root, read_json, sha256, typed, write_atomic
from .stored import COLUMNS, Stored, read_run, setting_folder

KEY = ["digest", "method", "seed"]
FACTS = ["digest", "setting", "fingerprint", "commit", "machine", "minutes", "check", "method", "seed"]
WALL = "wall_seconds"  # of a round, in its server row

Key = tuple[str, str, int]
Texts = dict[str, pd.DataFrame]  # 'rounds', 'queries': one run's rows as text, KEY and FACTS in front


def table(
    config: Config,
    notebook: str,
    root: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    fingerprint: str = "",
    what: str = "rounds",
) -> pd.DataFrame:
    """All rounds of this setting in one frame, `method` and `seed` in front; `client` is text, empty cells are NaN.

    config, notebook: the setting.
    root: folder of runs; without one `results/runs`, and the records for runs that are not finished there.
    methods, seeds: all there are unless given.
    fingerprint: runs of other data are left out.
    what: rounds, or queries (`client` and `id` are text).
    ValueError naming the file if one was cut or changed, and if two runs belong to different data.
    """
    found = _found(config, notebook, root, fingerprint)
    found = {key: run for key, run in found.items() if run.sheets and (methods is None or key[0] in methods)}
    found = {key: run for key, run in found.items() if seeds is None or key[1] in seeds}
    prints = {run.fingerprint for run in found.values()} - {""}
    if len(prints) > 1:
        raise ValueError(f"runs of {notebook} belong to different data ({sorted(prints)}): run the older ones again")
    order = {m: i for i, m in enumerate(methods or config.methods)}
    frames = []
    for method, seed in sorted(found, key=lambda key: (order.get(key[0], len(order)), *key)):
        frame = typed(found[method, seed].sheets[what])
        frame.insert(0, "method", method)
        frame.insert(1, "seed", seed)
        frames += [frame] if len(frame) else []
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["method", "seed", *COLUMNS[what]])


queries = functools.partial(table, what="queries")


def missing(
    config: Config,
    notebook: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    root: str | Path | None = None,
    fingerprint: str = "",
) -> list[tuple[str, int]]:
    """(method, seed) of the runs of a setting that are neither finished here nor in a record; arguments as `table`."""
    found = _found(config, notebook, root, fingerprint)
    done = {key for key, run in found.items() if run.done}
    return [(method, int(seed)) for method in methods for seed in seeds if (method, int(seed)) not in done]


def _found(config: Config, notebook: str, root: str | Path | None, fingerprint: str) -> dict[tuple[str, int], Stored]:
    """(method, seed) -> all runs of a setting; a run that was broken off here counts where no record has it."""
    found = {}
    for (digest, method, seed), run in (_runs(record_path(config, notebook)) if root is None else {}).items():
        if digest != config.digest()[:8]:
            continue
        sheets = {}
        for name, rows in run.items():
            filled = [c for c in rows if c not in (*FACTS, WALL) and (rows[c] != "").any()]
            sheets[name] = rows[[c for c in rows if c in COLUMNS[name] or c in filled]]
        found[method, seed] = Stored(sheets, 0, True, _print(run))
    for folder in setting_folder(config, notebook, root).glob("*/seed*"):
        key = folder.parent.name, int(folder.name.removeprefix("seed"))
        run = read_run(folder)
        if run is not None and (run.done or key not in found):
            found[key] = run
    return {key: run for key, run in found.items() if not fingerprint or run.fingerprint in ("", fingerprint)}


def _print(run: Texts) -> str:
    return run["rounds"]["fingerprint"].iloc[0]


def record_path(config: Config, notebook: str) -> Path:
    """The record that a setting's runs are published in."""
    data = re.sub(r"[^\w.+=-]+", "-", Path(config.data.dataset).name)  # a folder of the user's own has any name
    name = f"{folder_name(notebook)}-{data}-{config.profile}.csv.gz"
    return project_root() / "results" / "records" / name


def publish(notebook: str, preset: Callable[[str, str], Config], root: str | Path | None = None) -> list[Path]:
    """Put all finished runs of a notebook into its records: those that are there are replaced, others stay.

    preset: profile, data set -> the main setting; the column `setting` tells what differs from it.
    """
    bases, new = {}, {}
    root = Path(root or project_root() / "results" / "runs")
    for note in sorted((root / folder_name(notebook)).glob("*/*/seed*/done.json")):
        config = Config.of(**read_json(note.with_name("config.json"))["config"])
        path = record_path(config, notebook)
        if path not in bases:
            bases[path] = preset(config.profile, config.data.dataset).flat()
        changes = {k: v for k, v in config.flat().items() if v != bases[path][k] and k not in ("methods", "seeds")}
        key = config.digest()[:8], note.parents[1].name, int(note.parent.name.removeprefix("seed"))
        new.setdefault(path, {})[key] = _texts(key, json.dumps(changes, sort_keys=True), note.parent)
    return [_write(path, {**_runs(path), **runs}) for path, runs in new.items()]


def merge(folder: str | Path) -> list[Path]:
    """Add the runs of another machine's records to ours; a run that both have stays ours.

    ValueError, before anything is written, if a record was changed, or if the same setting ran on other data there.
    """
    merged = {}
    for path in sorted(p for p in Path(folder).glob("*.csv.gz") if not p.name.endswith("-queries.csv.gz")):
        place = project_root() / "results" / "records" / path.name
        ours, theirs = _runs(place), _runs(path)
        prints = {key[0]: _print(run) for key, run in ours.items()}
        for key, run in theirs.items():
            if prints.get(key[0], _print(run)) != _print(run):
                raise ValueError(f"{path}: setting {key[0]} ran on other data than ours")
        merged[place] = {**theirs, **ours}
    return [_write(place, runs) for place, runs in merged.items()]


def read_record(path: str | Path) -> pd.DataFrame:
    """A whole record as one frame; ValueError if a run in it was changed or cut."""
    return typed(pd.concat([run["rounds"] for run in _runs(Path(path)).values()], ignore_index=True))


def _texts(key: Key, setting: str, folder: Path) -> Texts:
    """A finished run's rows, as they stand in a record."""
    run, env = read_run(folder), read_json(folder / "env.json")
    facts = dict(zip(KEY, map(str, key), strict=True)) | {"setting": setting, "fingerprint": run.fingerprint}
    facts["commit"] = env.get("commit", "unknown") + ("-dirty" if env.get("dirty") else "")
    facts |= {"machine": machine_text(env), "minutes": str(env.get("minutes", ""))}
    walls = run.sheets["times"].rename(columns={"seconds": WALL}).assign(client="server")
    run.sheets["rounds"] = run.sheets["rounds"].merge(walls, how="left").fillna("")
    out = {}
    for name, front in (("rounds", FACTS), ("queries", KEY)):
        rows = run.sheets[name]
        out[name] = pd.concat([pd.DataFrame([facts] * len(rows), columns=front, dtype=object), rows], axis=1)
    return out


def _check(run: Texts) -> str:
    parts = []
    for rows in (run["rounds"], run["queries"]):
        filled = sorted(c for c in rows if c != "check" and (rows[c] != "").any())
        parts.append(rows[filled].to_csv(index=False))
    return sha256("\n".join(parts).encode())[:16]


def _write(path: Path, runs: dict[Key, Texts]) -> Path:
    settings = {key: run["rounds"]["setting"].iloc[0] for key, run in runs.items()}
    order = sorted(runs, key=lambda key: (settings[key] != "{}", settings[key], *key))  # the main setting first
    checks = {key: _check(runs[key]) for key in order}
    for name, place in zip(("rounds", "queries"), _files(path), strict=True):
        rows = pd.concat([runs[key][name].assign(check=checks[key]) for key in order], ignore_index=True).fillna("")
        write_atomic(place, gzip.compress(encode(rows), mtime=0))
    return path


def _files(path: Path) -> tuple[Path, Path]:
    return path, path.with_name(path.name.removesuffix(".csv.gz") + "-queries.csv.gz")


def _runs(path: Path) -> dict[Key, Texts]:
    """The runs of a record; none if it is not there. ValueError naming it if a run was changed or cut."""
    return _read(path, *(f.exists() and f.stat().st_mtime_ns for f in _files(path))) if path.exists() else {}


@functools.lru_cache(maxsize=16)
def _read(path: Path, *times: int) -> dict[Key, Texts]:
    try:
        both = [pd.read_csv(file, dtype=object, keep_default_na=False) for file in _files(path)]
        parts = [dict(iter(rows.groupby(KEY, sort=False))) for rows in both]
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ValueError(f"{path} or its queries cannot be read ({error}): {ADVICE}") from None
    runs = {}
    for key, rounds in parts[0].items():
        run = {"rounds": rounds, "queries": parts[1].get(key, both[1].iloc[:0])}
        if set(rounds["check"]) != {_check(run)}:
            raise ValueError(f"{path}: the rows of {key[1]} seed {key[2]} were changed or cut: {ADVICE}")
        runs[key[0], key[1], int(key[2])] = run
    return runs
