"""Tables over all runs of a setting, and the records: every row of every published run in one tidy file.

    results/records/<notebook>-<data>-<profile>.csv.gz           one row per run, round and client
    results/records/<notebook>-<data>-<profile>-queries.csv.gz   one row per answered query

A table comes from the run folders of this machine and, where a run is not there, from its record. `check` is a digest
of all rows of a run, in both files: a row that was changed or cut is noticed.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from .. import config as configs
from .environment import machine_text
from .files import ADVICE, encode, folder_name, project_root, read_json, typed, write_atomic
from .stored import COLUMNS, Config, Stored, read_run, setting_folder

KEY = ["digest", "method", "seed"]
FACTS = ["digest", "setting", "fingerprint", "commit", "machine", "minutes", "check", "method", "seed"]
WALL = "wall_seconds"  # of a round, in its server row

Texts = dict[str, pd.DataFrame]  # 'rounds', 'queries': one run's rows as text, KEY and FACTS in front


# --- tables -----------------------------------------------------------------------------------------------------------


def table(
    config: Config,
    notebook: str,
    root: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    fingerprint: str = "",
    what: str = "rounds",
) -> pd.DataFrame:
    """All rounds of this setting in one frame, `method` and `seed` in front.

    `client` is text ("server" or the client's name); empty cells are NaN.
    root: folder of runs; without one `results/runs`, and the records for runs that are not finished there.
    methods, seeds: all there are unless given.
    fingerprint: runs of other data are left out.
    what: rounds, queries (`client` and `id` are text) or times (wall seconds).
    ValueError naming the file if one was cut or changed, and if two runs belong to different data.
    """
    found = {
        key: run
        for key, run in _found(config, notebook, root).items()
        if (methods is None or key[0] in methods) and (seeds is None or key[1] in seeds)
        if run.sheets and (not fingerprint or run.fingerprint in ("", fingerprint))
    }
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
times = functools.partial(table, what="times")


def missing(
    config: Config,
    notebook: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    root: str | Path | None = None,
    fingerprint: str = "",
) -> list[tuple[str, int]]:
    """(method, seed) of the runs of this setting that are neither finished here nor in a record; as `table`."""
    found = _found(config, notebook, root)
    done = {key for key, run in found.items() if run.done and (not fingerprint or run.fingerprint in ("", fingerprint))}
    return [(method, int(seed)) for method in methods for seed in seeds if (method, int(seed)) not in done]


def _found(config: Config, notebook: str, root: str | Path | None) -> dict[tuple[str, int], Stored]:
    """(method, seed) -> all runs of a setting; a run that was broken off here counts where no record has it."""
    found = {}
    if root is None:
        for (digest, method, seed), run in _runs(record_path(config, notebook)).items():
            if digest == config.digest()[:8]:
                found[method, seed] = _stored(run)
    for folder in setting_folder(config, notebook, root).glob("*/seed*"):
        key = folder.parent.name, int(folder.name.removeprefix("seed"))
        run = read_run(folder)
        if run is not None and (run.done or key not in found):
            found[key] = run
    return found


# --- records ----------------------------------------------------------------------------------------------------------


def record_path(config: Config, notebook: str, queries: bool = False) -> Path:
    """The record that a setting's runs are published in."""
    settings = config.flat()
    data = re.sub(r"[^\w.+=-]+", "-", Path(str(settings["dataset"])).name)  # a folder of the user's own has any name
    name = f"{folder_name(notebook, 'notebook')}-{data}-{settings['profile']}"
    return project_root() / "results" / "records" / f"{name}{'-queries' * queries}.csv.gz"


def publish(settings: Config | Sequence[Config], notebook: str, root: str | Path | None = None) -> Path:
    """Put the finished runs of these settings into their record: those that are there are replaced, others stay.

    settings: of one data set and profile; the column `setting` tells what differs from the first.
    The same runs give the same bytes. ValueError if no run is finished.
    """
    settings = list(settings) if isinstance(settings, Sequence) else [settings]
    paths = {record_path(config, notebook) for config in settings}
    if len(paths) != 1:
        raise ValueError(f"settings of several data sets or profiles make several records: {sorted(map(str, paths))}")
    new, base = {}, settings[0].flat()
    for config in settings:
        changes = {k: v for k, v in config.flat().items() if v != base[k] and k not in ("methods", "seeds")}
        for folder in sorted(setting_folder(config, notebook, root).glob("*/seed*")):
            if (folder / "done.json").exists():
                key = config.digest()[:8], folder.parent.name, int(folder.name.removeprefix("seed"))
                new[key] = _texts(key, json.dumps(changes, sort_keys=True), folder)
    if not new:
        raise ValueError(f"no run of these settings of {notebook} is finished: nothing to publish")
    path = paths.pop()
    return _write(path, {**_runs(path), **new})


def collect(
    notebook: str, preset: Callable[[str, str], Config] | None = None, root: str | Path | None = None
) -> list[Path]:
    """Publish all finished runs of a notebook; preset: profile, data set -> its main setting, a record's base."""
    found: dict[tuple[str, str], dict[str, Config]] = {}
    root = project_root() / "results" / "runs" if root is None else Path(root)
    for path in sorted((root / folder_name(notebook, "notebook")).glob("*/*/seed*/done.json")):
        config = configs.Config.of(**read_json(path.with_name("config.json"))["config"])
        found.setdefault((config.profile, config.data.dataset), {})[config.digest()] = config
    paths = []
    for place, settings in found.items():
        base = [preset(*place)] if preset else []
        paths.append(publish([*base, *settings.values()], notebook, root))
    return paths


def merge(folder: str | Path) -> list[Path]:
    """Add the runs of another machine's records to ours; a run that both have stays ours.

    ValueError, before anything is written, if a record was changed, or if the same setting ran on other data there.
    """
    merged = {}
    for path in sorted(p for p in Path(folder).glob("*.csv.gz") if not p.name.endswith("-queries.csv.gz")):
        ours = _runs(project_root() / "results" / "records" / path.name)
        theirs = _runs(path)
        prints = {key[0]: texts["rounds"]["fingerprint"].iloc[0] for key, texts in ours.items()}
        for key, texts in theirs.items():
            found = texts["rounds"]["fingerprint"].iloc[0]
            if prints.get(key[0], found) != found:
                raise ValueError(f"{path}: setting {key[0]} ran on other data ({found}) than ours ({prints[key[0]]})")
        merged[path.name] = {**theirs, **ours}
    return [_write(project_root() / "results" / "records" / name, runs) for name, runs in merged.items()]


def read_record(path: str | Path) -> pd.DataFrame:
    """A whole record as one frame; ValueError if a run in it was changed or cut."""
    return typed(pd.concat([run["rounds"] for run in _runs(Path(path)).values()], ignore_index=True))


def _texts(key: tuple[str, str, int], setting: str, folder: Path) -> Texts:
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


def _stored(run: Texts) -> Stored:
    """A run of a record, as if it were read from its folder."""
    sheets = {}
    for name, rows in run.items():
        sheets[name] = rows[
            [c for c in rows if c in COLUMNS[name] or (c not in (*FACTS, WALL) and (rows[c] != "").any())]
        ]
    walls = run["rounds"][run["rounds"][WALL] != ""]
    sheets["times"] = walls[["cycle", "round", WALL]].rename(columns={WALL: "seconds"})
    return Stored(sheets, len(walls), True, run["rounds"]["fingerprint"].iloc[0])


def _check(texts: Texts) -> str:
    parts = [
        rows[sorted(c for c in rows if c != "check" and (rows[c] != "").any())].to_csv(index=False)
        for rows in (texts["rounds"], texts["queries"])
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _write(path: Path, runs: dict[tuple, Texts]) -> Path:
    def place(key: tuple) -> tuple:
        setting = runs[key]["rounds"]["setting"].iloc[0]
        return setting != "{}", setting, *key  # the base first

    order = sorted(runs, key=place)
    checks = {key: _check(runs[key]) for key in order}
    for name, suffix in (("rounds", ""), ("queries", "-queries")):
        rows = pd.concat([runs[key][name].assign(check=checks[key]) for key in order], ignore_index=True).fillna("")
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
            file.write(encode(rows))
        write_atomic(_with_suffix(path, suffix), packed.getvalue())
    return path


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name.removesuffix(".csv.gz") + suffix + ".csv.gz")


def _runs(path: Path) -> dict[tuple, Texts]:
    """The runs of a record; none if it is not there. ValueError naming it if a run was changed or cut."""
    files = [path, _with_suffix(path, "-queries")]
    if not path.exists():
        return {}
    return _read(*((file, file.stat().st_mtime_ns if file.exists() else 0) for file in files))


@functools.lru_cache(maxsize=16)
def _read(*files: tuple[Path, int]) -> dict[tuple, Texts]:
    path = files[0][0]
    try:
        both = [pd.read_csv(file, dtype=object, keep_default_na=False) for file, _ in files]
        parts = [dict(iter(rows.groupby(KEY, sort=False))) for rows in both]
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ValueError(f"{path} or its queries cannot be read ({error}): {ADVICE}") from None
    runs = {}
    for key, rounds in parts[0].items():
        texts = {"rounds": rounds, "queries": parts[1].get(key, both[1].iloc[:0])}
        if set(rounds["check"]) != {_check(texts)}:
            raise ValueError(f"{path}: the rows of {key[1]} seed {key[2]} were changed or cut: {ADVICE}")
        runs[key[0], key[1], int(key[2])] = texts
    return runs
