"""Differences in points of a metric, paired by seed: between arms, between strategies at equal labels, in an ablation.

A frame of effects has the columns EFFECT: what is compared, in which part, points with their interval, p, seeds.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .statistics import area_under_curve, cycle_ends, paired_test

EFFECT = ("effect", "part", "points", "low", "high", "p", "seeds")
Curves = dict[int, np.ndarray]  # seed -> learning curve in points


def curves_by_arm(table: pd.DataFrame, y: str) -> dict[tuple[str, str], Curves]:
    """(arm, method) -> seed -> learning curve in points; table: rows of several arms, named and in order in `arm`."""
    curves: dict[tuple[str, str], Curves] = {}
    for arm, runs in table.groupby("arm", sort=False):
        for (method, seed), rows in cycle_ends(runs).groupby(["method", "seed"]):
            curves.setdefault((arm, method), {})[int(seed)] = 100 * rows.sort_values("cycle")[y].to_numpy(dtype=float)
    return curves


def effect(name: str, part: str, one: Curves, other: Curves, seeds: Sequence[int], where=slice(None)) -> dict:
    """A row of EFFECT: the mean of the part `where` of each curve of `one` minus that of `other`, paired by seed."""
    test = paired_test([one[s][where].mean() for s in seeds], [other[s][where].mean() for s in seeds])
    return dict(zip(EFFECT, (name, part, *test.values()), strict=True))


def arm_gains(
    table: pd.DataFrame, method: str, reference: str, ys: Sequence[str] = ("ap50", "ap_coco")
) -> pd.DataFrame:
    """Each arm (effect) minus the arm `reference` under one method: mean over all cycles of each metric (part)."""
    found = []
    for y in ys:
        curves = {arm: seeds for (arm, name), seeds in curves_by_arm(table, y).items() if name == method}
        base = curves.pop(reference, {})
        for arm, mine in curves.items():
            seeds = [s for s in sorted(set(mine) & set(base)) if len(mine[s]) == len(base[s])]
            found += [effect(arm, y, mine, base, seeds)] if seeds else []
    return pd.DataFrame(found, columns=EFFECT)


def gains_at_equal(table: pd.DataFrame, xs=("images", "boxes"), y="ap50", baseline="random") -> pd.DataFrame:
    """Mean height of each method (effect) minus the baseline's over labels that both reach, images and boxes (part)."""
    runs = {key: rows.sort_values("cycle") for key, rows in cycle_ends(table).groupby(["method", "seed"])}
    found = []
    for method in (name for name in dict.fromkeys(table["method"]) if name != baseline):
        seeds = sorted(seed for name, seed in runs if name == method and (baseline, seed) in runs)
        for x in xs if seeds else ():
            pairs = {s: _mean_heights(runs[method, s], runs[baseline, s], x, y) for s in seeds}
            one, other = ({s: 100 * pair[side : side + 1] for s, pair in pairs.items()} for side in (0, 1))
            found.append(effect(method, f"equal {x}", one, other, seeds))
    return pd.DataFrame(found, columns=EFFECT)


def _mean_heights(one: pd.DataFrame, other: pd.DataFrame, x: str, y: str) -> np.ndarray:
    """Mean heights of two curves over the range of x that they share; where x stands still, its last point counts."""
    parts = (part.drop_duplicates(x, keep="last") for part in (one, other))
    curves = [(part[x].to_numpy(dtype=float), part[y].to_numpy(dtype=float)) for part in parts]
    low, high = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    if not low < high:
        raise ValueError(f"two curves share no range of {x}: {curves[0][0].tolist()} and {curves[1][0].tolist()}")
    grid = np.unique(np.concatenate([[low, high], *(c[0][(c[0] > low) & (c[0] < high)] for c in curves)]))
    return np.array([area_under_curve(grid, np.interp(grid, *c)) for c in curves])


def finals(table: pd.DataFrame, y: str = "ap50") -> pd.DataFrame:
    """The end of every run's curve: columns arm, method, seed, value; arms in the order of the table."""
    curves = curves_by_arm(table, y)
    rows = [(*key, seed, curve[-1] / 100) for key, seeds in curves.items() for seed, curve in seeds.items()]
    return pd.DataFrame(rows, columns=["arm", "method", "seed", "value"])


def gaps(table: pd.DataFrame, y: str = "ap50", method: str = "random", reference: str = "centralised") -> pd.DataFrame:
    """An ablation's ends as effects, on the seeds that all arms have.

    The method minus the last arm's reference (a single node, trained best), then gains of both over the first arm.
    """
    curves, arms = curves_by_arm(table, y), list(dict.fromkeys(table["arm"]))
    nodes = [arm for arm in arms if (arm, reference) in curves]
    keys = [*((arm, method) for arm in arms), *((arm, reference) for arm in nodes)]
    seeds = sorted(set.intersection(*(set(curves.get(key, {})) for key in keys)))
    if not nodes or not seeds:
        raise ValueError(f"no seed of {method!r} and {reference!r} has finished in all arms {arms}")
    rows = [(arm, f"{method} minus {reference}", (arm, method), (nodes[-1], reference)) for arm in arms]
    rows += [(arm, f"gain over {arms[0]}", (arm, method), (arms[0], method)) for arm in arms[1:]]
    rows += [(arm, f"{reference}'s gain", (arm, reference), (nodes[0], reference)) for arm in nodes[1:]]
    rows.sort(key=lambda row: arms.index(row[0]))
    found = [effect(arm, part, curves[a], curves[b], seeds, slice(-1, None)) for arm, part, a, b in rows]
    return pd.DataFrame(found, columns=EFFECT)


def findings(frame: pd.DataFrame, baseline: str = "random") -> str:
    """What a frame of effects or a `summary` shows, in sentences; a difference counts if its interval lacks zero."""
    if f"minus_{baseline}" in frame:
        rest = frame.assign(part=f"area above {baseline}", points=100 * frame[f"minus_{baseline}"])
        rest = rest.assign(low=100 * frame["low"], high=100 * frame["high"], effect=frame["method"])
        frame = rest.dropna(subset=["points"])
    lines = []
    for row in frame.itertuples():
        verdict = "a gain" if row.low > 0 else "a loss" if row.high < 0 else "no difference shown"
        interval = "one seed, so no interval" if np.isnan(row.low) else f"{row.low:+.1f} to {row.high:+.1f}: {verdict}"
        lines.append(f"{row.effect}, {row.part}: {row.points:+.1f} points ({interval}).")
    return "\n".join(lines) or "Nothing to compare."
