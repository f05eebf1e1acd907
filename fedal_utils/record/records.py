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
from types import SimpleNamespace

import pandas as pd

from ..config import Config
from .environment import machine_text
from .files import ADVICE, encode, project_root, read_json, sha256, typed, write_atomic
from .run import COLUMNS, Root, read_run, runs_folder

KEY = ["digest", "method", "seed"]
FACTS = ["digest", "setting", "fingerprint", "commit", "machine", "minutes", "check", "method", "seed"]
WALL = "wall_seconds"  # of a round, in its server row

Runs = dict[
    tuple[str, str, int], SimpleNamespace
]  # KEY -> a finished run; its sheets have FACTS and KEY among their columns


def table(
    config: Config,
    notebook: str,
    root: Root = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    fingerprint: str = "",
    what: str = "rounds",
) -> pd.DataFrame:
    """All rounds of this setting in one frame, `method` and `seed` in front; `client`, `id` are text, empty cells NaN.

    root: folder of runs; without one `results/runs`, and the records for runs that are not finished there.
    methods, seeds, fingerprint: all there are unless given; runs of other data are left out. what: rounds or queries.
    ValueError naming the file if one was cut or changed, and if two runs belong to different data.
    """
    found = _found(config, notebook, root, fingerprint)
    found = {key: run for key, run in found.items() if methods is None or key[0] in methods}
    found = {key: run for key, run in found.items() if seeds is None or key[1] in seeds}
    prints = {run.fingerprint for run in found.values()} - {""}
    if len(prints) > 1:
        raise ValueError(f"runs of {notebook} belong to different data ({sorted(prints)}): run the older ones again")
    order = {m: i for i, m in enumerate(methods or config.methods)}
    frames = []
    for method, seed in sorted(found, key=lambda key: (order.get(key[0], len(order)), *key)):
        rows = found[method, seed].sheets[what]
        filled = {c for c in rows if (rows[c] != "").any()} - {*FACTS, WALL} | {*COLUMNS[what]}
        frame = typed(rows[[c for c in rows if c in filled]])
        frame.insert(0, "method", method)
        frame.insert(1, "seed", seed)
        frames += [frame] if len(frame) else []
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["method", "seed", *COLUMNS[what]])


queries = functools.partial(table, what="queries")


def missing(
    config: Config, notebook: str, methods: Sequence[str], seeds: Sequence[int], root: Root = None, fingerprint=""
) -> list[tuple[str, int]]:
    """(method, seed) of the runs of a setting that are neither finished here nor in a record; arguments as `table`."""
    done = {key for key, run in _found(config, notebook, root, fingerprint).items() if run.done}
    return [(method, int(seed)) for method in methods for seed in seeds if (method, int(seed)) not in done]


def _found(config: Config, notebook: str, root: Root, fingerprint: str) -> dict[tuple[str, int], SimpleNamespace]:
    """(method, seed) -> all runs of a setting; a run that was broken off here counts where no record has it."""
    published = _runs(record_path(config, notebook)) if root is None else {}
    found = {key[1:]: run for key, run in published.items() if key[0] == config.digest()[:8]}
    for folder in (runs_folder(notebook, root) / config.digest()[:8]).glob("*/seed*"):
        key, run = (folder.parent.name, int(folder.name[4:])), read_run(folder, config.digest(), fingerprint)
        if run and (run.done or run.committed and key not in found):
            found[key] = run
    return {key: run for key, run in found.items() if not fingerprint or run.fingerprint in ("", fingerprint)}


def record_path(config: Config, notebook: str) -> Path:
    """The record that a setting's runs are published in."""
    data = re.sub(r"[^\w.+=-]+", "-", Path(config.data.dataset).name)  # a folder of the user's own has any name
    return project_root() / "results" / "records" / f"{notebook}-{data}-{config.profile}.csv.gz"


def publish(notebook: str, preset: Callable[[str, str], Config], root: Root = None) -> list[Path]:
    """Put all finished runs of a notebook into its records: those that are there are replaced, others stay.

    preset: profile, data set -> the main setting; the column `setting` tells what differs from it.
    """
    published: dict[Path, Runs] = {}
    for note in sorted(runs_folder(notebook, root).glob("*/*/seed*/done.json")):
        saved, env = (read_json(note.with_name(name)) for name in ("config.json", "env.json"))
        config = Config.of(**{k: v for k, v in saved["config"].items() if k in Config.paths()})
        run = read_run(note.parent, config.digest())  # refused where a setting has gone that it was made with
        changes = config.differences(preset(config.profile, config.data.dataset))
        setting = {k: v for k, (v, _) in changes.items() if k not in ("methods", "seeds")}
        key = config.digest()[:8], note.parents[1].name, int(note.parent.name[4:])
        facts = dict(zip(KEY, map(str, key), strict=True)) | {"setting": json.dumps(setting, sort_keys=True)}
        facts["commit"] = env.get("commit", "unknown") + ("-dirty" if env.get("dirty") else "")
        facts |= {"machine": machine_text(env), "minutes": str(env.get("minutes", "")), "fingerprint": run.fingerprint}
        walls = run.sheets["times"].rename(columns={"seconds": WALL}).assign(client="server")
        run.sheets["rounds"] = run.sheets["rounds"].merge(walls, how="left").fillna("").assign(**facts)
        run.sheets["queries"] = run.sheets["queries"].assign(**{name: facts[name] for name in KEY})
        path = record_path(config, notebook)
        published.setdefault(path, _runs(path))[key] = run
    return [_write(path, runs) for path, runs in published.items()]


def merge(folder: str | Path) -> list[Path]:
    """Add the runs of other machines' records, wherever they lie in the folder, to ours; what both have stays ours.

    ValueError, before anything is written, if a record was changed, or if the same setting ran on other data there.
    """
    merged: dict[Path, Runs] = {}
    for path in sorted(p for p in Path(folder).rglob("*.csv.gz") if not p.name.endswith("-queries.csv.gz")):
        place = project_root() / "results" / "records" / path.name
        ours = merged.setdefault(place, _runs(place))
        prints = {key[0]: run.fingerprint for key, run in ours.items()}
        for key, run in _runs(path).items():
            if prints.get(key[0], run.fingerprint) != run.fingerprint:
                raise ValueError(f"{path}: setting {key[0]} ran on other data than ours")
            ours.setdefault(key, run)
    if not merged:
        raise ValueError(f"{folder} holds no records")
    return [_write(place, runs) for place, runs in merged.items()]


def read_record(path: str | Path) -> pd.DataFrame:
    """A whole record as one frame; ValueError if a run in it was changed or cut."""
    return typed(pd.concat([run.sheets["rounds"] for run in _runs(Path(path)).values()], ignore_index=True))


def _check(sheets: dict[str, pd.DataFrame]) -> str:
    texts = []
    for rows in (sheets["rounds"], sheets["queries"]):
        texts.append(rows[sorted(c for c in rows if c != "check" and (rows[c] != "").any())].to_csv(index=False))
    return sha256("\n".join(texts).encode())[:16]


def _files(path: Path) -> dict[str, Path]:
    return {"rounds": path, "queries": path.with_name(path.name.removesuffix(".csv.gz") + "-queries.csv.gz")}


def _write(path: Path, runs: Runs) -> Path:
    settings = {key: run.sheets["rounds"]["setting"].iloc[0] for key, run in runs.items()}
    order = sorted(runs, key=lambda key: (settings[key] != "{}", settings[key], *key))  # the main setting first
    for (name, place), front in zip(_files(path).items(), (FACTS, KEY), strict=True):
        rows = pd.concat([runs[key].sheets[name].assign(check=_check(runs[key].sheets)) for key in order]).fillna("")
        rows = rows[[*front, *(c for c in rows if c not in front)]]
        write_atomic(place, gzip.compress(encode(rows), mtime=0))
    return path


def _runs(path: Path) -> Runs:
    """The runs of a record; none if it is not there. ValueError naming it if a run was changed or cut."""
    times = [file.exists() and file.stat().st_mtime_ns for file in _files(path).values()]
    return dict(_read(path, *times)) if path.exists() else {}


@functools.lru_cache(maxsize=16)
def _read(path: Path, *times: int) -> Runs:
    try:
        both = {n: pd.read_csv(file, dtype=object, keep_default_na=False) for n, file in _files(path).items()}
        parts = [dict(iter(rows.groupby(KEY, sort=False))) for rows in both.values()]
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ValueError(f"{path} or its queries cannot be read ({error}): {ADVICE}") from None
    runs = {}
    for key, rounds in parts[0].items():
        sheets = {"rounds": rounds, "queries": parts[1].get(key, both["queries"].iloc[:0])}
        if set(rounds["check"]) != {_check(sheets)}:
            raise ValueError(f"{path}: the rows of {key[1]} seed {key[2]} were changed or cut: {ADVICE}")
        run = SimpleNamespace(fingerprint=rounds["fingerprint"].iloc[0], sheets=sheets, done=True)
        runs[key[0], key[1], int(key[2])] = run
    return runs
