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


def effect(
    name: str, part: str, one: Curves, other: Curves, seeds: Sequence[int], where: slice = slice(None)
) -> dict[str, object]:
    """A row of EFFECT: the mean of the part `where` of each curve of `one` minus that of `other`, paired by seed.

    name, part: what the row is called. one, other, seeds: curves, and the seeds of both that count.
    """
    test = paired_test([one[s][where].mean() for s in seeds], [other[s][where].mean() for s in seeds])
    return dict(zip(EFFECT, (name, part, *test.values()), strict=True))


def arm_gains(
    table: pd.DataFrame, method: str, reference: str, ys: Sequence[str] = ("ap50", "ap_coco")
) -> pd.DataFrame:
    """Each arm (effect) minus the arm `reference` under one method: mean over all cycles of each metric (part)."""
    found = []
    for y in ys:
        curves = {arm: seeds for (arm, name), seeds in curves_by_arm(table, y).items() if name == method}
        base = curves.get(reference, {})
        for arm in (name for name in dict.fromkeys(table["arm"]) if name != reference):
            seeds = [s for s in sorted(set(curves.get(arm, {})) & set(base)) if len(curves[arm][s]) == len(base[s])]
            if seeds:
                found.append(effect(arm, y, curves[arm], base, seeds))
    return pd.DataFrame(found, columns=EFFECT)


def gains_at_equal(
    table: pd.DataFrame, xs: Sequence[str] = ("images", "boxes"), y: str = "ap50", baseline: str = "random"
) -> pd.DataFrame:
    """Each method (effect) minus the baseline at equal labels, counted in images and in boxes (part).

    A difference is that of the mean heights of both curves over the labels that both reach.
    """
    runs = {key: rows.sort_values("cycle") for key, rows in cycle_ends(table).groupby(["method", "seed"])}
    found = []
    for method in (name for name in dict.fromkeys(table["method"]) if name != baseline):
        seeds = sorted(seed for name, seed in runs if name == method and (baseline, seed) in runs)
        for x in xs if seeds else ():
            pairs = {s: _mean_heights(runs[method, s], runs[baseline, s], x, y) for s in seeds}
            one, other = ({s: np.array([100 * pair[side]]) for s, pair in pairs.items()} for side in (0, 1))
            found.append(effect(method, f"equal {x}", one, other, seeds))
    return pd.DataFrame(found, columns=EFFECT)


def _mean_heights(one: pd.DataFrame, other: pd.DataFrame, x: str, y: str) -> tuple[float, ...]:
    """Mean heights of two curves over the range of x that they share; where x stands still, its last point counts."""
    parts = [part.drop_duplicates(x, keep="last").astype({x: float}) for part in (one, other)]
    curves = [(part[x].to_numpy(), part[y].to_numpy(dtype=float)) for part in parts]
    low, high = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    if not low < high:
        raise ValueError(f"two curves share no range of {x}: {curves[0][0].tolist()} and {curves[1][0].tolist()}")
    grid = np.unique(np.concatenate([[low, high], *(c[0][(c[0] > low) & (c[0] < high)] for c in curves)]))
    return tuple(area_under_curve(grid, np.interp(grid, *c)) for c in curves)


def finals(table: pd.DataFrame, y: str = "ap50") -> pd.DataFrame:
    """The end of every run's curve: columns arm, method, seed, value; arms in the order of the table."""
    curves = curves_by_arm(table, y)
    rows = [(*key, seed, curve[-1] / 100) for key, seeds in curves.items() for seed, curve in seeds.items()]
    return pd.DataFrame(rows, columns=["arm", "method", "seed", "value"])


def gaps(table: pd.DataFrame, y: str = "ap50", method: str = "random", reference: str = "centralised") -> pd.DataFrame:
    """An ablation's ends as effects, on the seeds that all arms have.

    For each arm: the method minus the reference of the last arm that has one (a single node, trained as well as the
    ablation knows how), then the gains of both over the first arm.
    """
    curves, arms, end = curves_by_arm(table, y), list(dict.fromkeys(table["arm"])), slice(-1, None)
    nodes = [arm for arm in arms if (arm, reference) in curves]
    keys = [*((arm, method) for arm in arms), *((arm, reference) for arm in nodes)]
    seeds = sorted(set.intersection(*(set(curves.get(key, {})) for key in keys)))
    if not nodes or not seeds:
        raise ValueError(f"no seed of {method!r} and {reference!r} has finished in all arms {arms}")
    found = []
    for arm in arms:
        mine, parts = curves[arm, method], {f"{method} minus {reference}": curves[nodes[-1], reference]}
        if arm != arms[0]:
            parts[f"gain over {arms[0]}"] = curves[arms[0], method]
        found += [effect(arm, part, mine, other, seeds, end) for part, other in parts.items()]
        if arm in nodes[1:]:
            node, first = curves[arm, reference], curves[nodes[0], reference]
            found.append(effect(arm, f"{reference}'s gain", node, first, seeds, end))
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
