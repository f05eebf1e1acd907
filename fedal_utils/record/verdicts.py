"""A paper's numbers beside ours, with a verdict by rule (in words: `results/README.md`), and what is published."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import Config
from ..metrics import area_under_curve, paired_test
from .files import project_root, read_sheet, write_atomic

PAPER_COLUMNS = "item setting x metric value unit source tolerance".split()
VERDICT_COLUMNS = (
    "notebook paper item theirs ours difference low high smallest_detectable seeds data scale verdict source".split()
)
Seeds = Mapping[int, float]  # seed -> value
UNPAIRED = {"difference": math.nan, "low": math.nan, "high": math.nan, "n": 0}


def about(config: Config, notebook: str, scale: str) -> dict[str, str]:
    """Where our numbers come from; scale: *full*, *small detector* or *frozen features*."""
    data = Path(config.data.dataset).name
    return {"notebook": notebook, "data": data, "scale": scale, "profile": config.profile}


def read_paper(paper: str | Path) -> pd.DataFrame:
    """A paper's published numbers: `results/paper/<paper>.csv`, or any CSV with PAPER_COLUMNS. `x` may be empty."""
    path = Path(paper) if str(paper).endswith(".csv") else project_root() / "results" / "paper" / f"{paper}.csv"
    frame = read_sheet(path)
    try:
        numbers = {c: frame[c].replace("", "nan").astype(float) for c in ("x", "value", "tolerance")}
        return frame[PAPER_COLUMNS].assign(**numbers)
    except (KeyError, ValueError) as error:
        told = f"columns are {', '.join(PAPER_COLUMNS)}, x, value, tolerance numbers"
        raise ValueError(f"{path}: {told}: {error}") from None


def order_verdict(theirs: Mapping[str, float], ours: Mapping[str, Seeds]) -> dict[str, Any]:
    """What our runs show of the paper's order, a step for each pair of unequal neighbours in it.

    theirs: setting -> the paper's value. ours: setting -> seed -> our value; settings that were not run are left out.
    Returns verdict, seeds, and difference, low, high of the first setting minus the last; smallest_detectable is half
    the widest interval of a step.
    """
    order = sorted((name for name in theirs if ours.get(name)), key=lambda name: -theirs[name])

    def paired(a: str, b: str) -> dict[str, float]:
        seeds = sorted(set(ours[a]) & set(ours[b]))
        return paired_test([ours[a][s] for s in seeds], [ours[b][s] for s in seeds]) if seeds else UNPAIRED

    steps = [paired(a, b) for a, b in zip(order, order[1:], strict=False) if theirs[a] > theirs[b]]
    if not steps:
        return {"verdict": "not run", "seeds": 0}
    shown = sum(step["low"] > 0 for step in steps)
    verdict = f"order partly shown ({shown} of {len(steps)} steps)" if shown else "inconclusive"
    if any(step["high"] < 0 for step in steps):
        verdict = "contradicted"
    elif shown == len(steps):
        verdict = "order shown"
    widest = max((step["high"] - step["low"]) / 2 for step in steps) if all(s["n"] > 1 for s in steps) else math.nan
    ends = paired(order[0], order[-1])
    return {**ends, "verdict": verdict, "smallest_detectable": widest, "seeds": min(step["n"] for step in steps)}


def level_verdict(theirs: float, ours: Seeds, tolerance: float) -> dict[str, Any]:
    """Is our value the paper's, on the same data? As `order_verdict`; numbers are ours minus theirs."""
    test = paired_test(list(ours.values()), [theirs] * len(ours))
    half = (test["high"] - test["low"]) / 2
    verdict = "level differs" if test["low"] > tolerance or test["high"] < -tolerance else "inconclusive"
    if half < tolerance and abs(test["difference"]) <= tolerance:
        verdict = "level matches"
    return {**test, "verdict": verdict, "smallest_detectable": tolerance + half, "seeds": len(ours)}


def compare_paper(
    table: pd.DataFrame,
    paper: str | Path,
    about: Mapping[str, str],
    *,
    items: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
    by: str = "end",
    x: str = "images",
    level: bool = False,
) -> pd.DataFrame:
    """What our runs say of a paper's items; a row of VERDICT_COLUMNS for each item and metric.

    table, about, paper: of `record.table`, `about`, `read_paper`. items: those of the paper's CSV (all unless given).
    settings: the paper's name of a setting -> our method; those not named are called as ours.
    by: 'end' of both curves, or 'area' under them (their mean height: more power).
    x: our column on the horizontal axis.
    level: same data only; a row more for each setting whose published number has a tolerance.
    Smoke runs are never compared: their rows read *not run*. Fractions are told in points of a hundred.
    """
    published = read_paper(paper)
    if unknown := set(items or ()) - set(published["item"]):
        raise ValueError(f"no item {sorted(unknown)} in {paper}")
    server = table[(table["client"].astype(str) == "server") & (about["profile"] != "smoke")]

    def height(part: pd.DataFrame, x: str, y: str) -> float:
        """The end of a curve or the area under it; a single point is both."""
        points = part[[x, y]].fillna({x: 0}).dropna().sort_values(x).to_numpy()
        area = by == "area" and len(points) > 1
        return area_under_curve(*points.T) if area else points[-1, 1] if len(points) else math.nan

    def of_seeds(method: str, metric: str, scale: float) -> dict[int, float]:
        if metric not in server:
            return {}
        mine = server[(server["method"] == method) & server[metric].notna()].sort_values(["cycle", "round"])
        mine = mine.drop_duplicates(["seed", "cycle"], keep="last").drop_duplicates(["seed", x], keep="last")
        return {int(seed): scale * height(part, x, metric) for seed, part in mine.groupby("seed")}

    rows = []
    for (item, metric), group in published.groupby(["item", "metric"], sort=False):
        if items is not None and item not in items:
            continue
        unit, parts = group["unit"].iloc[0], dict(iter(group.groupby("setting", sort=False)))
        scale, ours_scale = 100.0 if unit == "fraction" else 1.0, 100.0 if unit in ("fraction", "percent") else 1.0
        theirs = {name: scale * height(p, "x", "value") for name, p in parts.items() if p["value"].notna().any()}
        ours = {name: of_seeds((settings or {}).get(name, name), metric, ours_scale) for name in theirs}
        found = order_verdict(theirs, ours) if theirs else {"verdict": "no published number", "seeds": 0}
        rows.append(_row(about, paper, item, theirs, ours, found, group))
        for name, part in parts.items() if level else ():
            tolerance = scale * part["tolerance"].max()
            if ours.get(name) and not math.isnan(tolerance):
                found = level_verdict(theirs[name], ours[name], tolerance)
                rows.append(_row(about, paper, f"{item}: {name}", {name: theirs[name]}, ours, found, part))
    return pd.DataFrame(rows, columns=VERDICT_COLUMNS)


def check_formula(
    paper: str | Path, about: Mapping[str, str], item: str, formula: Callable[[str, float], float]
) -> pd.DataFrame:
    """A paper's item that is arithmetic: *formula checked* if every number is equal to its last printed digit.

    formula: (the paper's setting, x) -> our number, in the paper's unit. A row of VERDICT_COLUMNS.
    """
    group = read_paper(paper).query("item == @item")
    theirs, ours, gaps = {}, {}, []
    for setting, x, value in group[["setting", "x", "value"]].itertuples(index=False):
        name, computed = setting if math.isnan(x) else f"{setting} {x:g}", float(formula(setting, x))
        theirs[name], ours[name] = value, {0: computed}
        gaps.append(round(computed, 0 if value == int(value) else 3) - value)
    verdict = "contradicted" if any(abs(gap) > 1e-9 for gap in gaps) else "formula checked"
    found = {"verdict": verdict, "seeds": 0, "difference": max(gaps, key=abs)}
    return pd.DataFrame([_row(about, paper, item, theirs, ours, found, group)], columns=VERDICT_COLUMNS)


def _row(about: Mapping, paper: str | Path, item: str, theirs: Mapping, ours: Mapping, found: Mapping, group: Any):
    order = sorted(theirs, key=lambda name: -theirs[name])
    row = {"paper": Path(paper).stem, "item": item, "source": "; ".join(dict.fromkeys(group["source"]))}
    row["theirs"] = " > ".join(f"{name} {theirs[name]:.4g}" for name in order)
    row["ours"] = ", ".join(f"{n} {sum(ours[n].values()) / len(ours[n]):.4g}" for n in order if ours.get(n))
    return {**about, **row, **found}


def publish_verdicts(frame: pd.DataFrame, profile: str) -> Path:
    """Put verdicts into `results/tables/verdicts.csv`, in the place of those of the same item; none of smoke runs."""
    path = project_root() / "results" / "tables" / "verdicts.csv"
    if profile == "smoke":
        return path
    keys = ["notebook", "paper", "item", "data", "scale"]
    both = pd.concat([pd.read_csv(path), frame], ignore_index=True) if path.exists() else frame
    return save(both.drop_duplicates(keys, keep="last").sort_values(keys)[VERDICT_COLUMNS], path.name)


def save(result: Any, name: str, key: str = "") -> Path:
    """Write a table to `results/tables/<name>` (CSV) or a figure to `results/figures/<name>` (PNG), without a date.

    key: a column; the rows that the table had before stay, but for those of the same key.
    """
    results = project_root() / "results"
    if isinstance(result, pd.DataFrame):
        if key and (results / "tables" / name).exists():
            before = pd.read_csv(results / "tables" / name)
            result = pd.concat([before[~before[key].isin(result[key])], result])
        return write_atomic(results / "tables" / name, result.to_csv(index=False, lineterminator="\n"))
    options = {"format": "png", "dpi": 150, "bbox_inches": "tight", "metadata": {"Software": None}}
    return write_atomic(results / "figures" / name, lambda file: result.savefig(file, **options))
