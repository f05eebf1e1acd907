"""Differences in points of a metric, paired by seed: between arms, between strategies at equal labels, in an ablation.

A frame of effects has the columns EFFECT: what is compared, in which part, points with their interval, p, seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .statistics import area_under_curve, curve, cycle_ends, paired_test, shown

EFFECT = ("effect", "part", "points", "low", "high", "p", "seeds")
Curves = dict[int, np.ndarray]  # seed -> learning curve in points


def curves_by_arm(table: pd.DataFrame, y: str) -> dict[tuple[str, str], Curves]:
    """(arm, method) -> seed -> learning curve in points; table: rows of several arms, named in `arm`."""
    curves: dict[tuple[str, str], Curves] = {}
    for arm, runs in table.groupby("arm") if len(table) else ():
        for (method, seed), rows in cycle_ends(runs).groupby(["method", "seed"]):
            curves.setdefault((arm, method), {})[int(seed)] = 100 * rows.sort_values("cycle")[y].to_numpy(dtype=float)
    return curves


def effect(
    name: str, part: str, one: Curves, other: Curves, seeds: Sequence[int], where: slice = slice(None)
) -> dict[str, object]:
    """A row of EFFECT: the mean of this part of each curve of `one` minus that of `other`, paired by seed."""
    test = paired_test([one[s][where].mean() for s in seeds], [other[s][where].mean() for s in seeds])
    values = (test["difference"], test["low"], test["high"], test["p"], len(seeds))
    return dict(zip(EFFECT, (name, part, *values), strict=True))


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

    A difference is that of the mean heights of both curves (straight lines between points) over the labels that both
    reach: a method that queries images full of objects has paid for more boxes at the same number of images.
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
    curves = [curve(rows[x], rows[y]) for rows in (part.drop_duplicates(x, keep="last") for part in (one, other))]
    low, high = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    if not low < high:
        raise ValueError(f"two curves share no range of {x}: {curves[0][0].tolist()} and {curves[1][0].tolist()}")
    grid = np.unique(np.concatenate([[low, high], *(c[0][(c[0] > low) & (c[0] < high)] for c in curves)]))
    return tuple(area_under_curve(grid, np.interp(grid, *c)) for c in curves)


def finals(table: pd.DataFrame, y: str = "ap50") -> pd.DataFrame:
    """The end of every run's curve: columns arm, method, seed, value; arms in the order of the table."""
    if "arm" not in table.columns:
        raise ValueError(f"an ablation's table needs the column 'arm', it has {list(table.columns)}")
    server = table[(table["client"].astype(str) == "server") & table[y].notna()]
    ordered = server.sort_values(["seed", "cycle", "round"], kind="stable")
    last = ordered.groupby(["arm", "method", "seed"], sort=False)[y].last().rename("value").reset_index()
    place = {arm: i for i, arm in enumerate(dict.fromkeys(table["arm"]))}
    return last.sort_values(["method", "seed"]).sort_values(
        "arm", key=lambda a: a.map(place), kind="stable", ignore_index=True
    )


def gaps(finals: pd.DataFrame, method: str = "random", reference: str = "centralised") -> pd.DataFrame:
    """An ablation's ends as effects, on the seeds that all arms have.

    For each arm: the method minus the best reference (that of the last arm that has one: a single node, trained as
    well as the ablation knows how), then its gain over the first arm, and the reference's own gain over the first arm.
    """
    values = finals.assign(value=100 * finals["value"]).pivot(index="seed", columns=["method", "arm"], values="value")
    absent = [m for m in (method, reference) if m not in values.columns.get_level_values(0)]
    if absent:
        raise ValueError(f"no finished run of {absent} among {sorted(set(values.columns.get_level_values(0)))}")
    arms = list(dict.fromkeys(finals["arm"]))
    values = values[[c for c in values.columns if c[0] in (method, reference)]].dropna()
    if values.empty or any((method, arm) not in values for arm in arms):
        raise ValueError(f"no seed has finished in all arms {arms}")
    ends = {
        name: {arm: {s: np.array([v]) for s, v in values[name, arm].items()} for arm in arms if (name, arm) in values}
        for name in (method, reference)
    }
    nodes, seeds = ends[reference], values.index
    best, first_node = list(nodes.values())[-1], next(iter(nodes))
    found = []
    for arm, mine in ends[method].items():
        found.append(effect(arm, f"{method} minus {reference}", mine, best, seeds))
        if arm != arms[0]:
            found.append(effect(arm, f"gain over {arms[0]}", mine, ends[method][arms[0]], seeds))
        if arm in nodes and arm != first_node:
            found.append(effect(arm, f"{reference}'s gain", nodes[arm], nodes[first_node], seeds))
    return pd.DataFrame(found, columns=EFFECT)


def effect_findings(effects: pd.DataFrame) -> str:
    """What a frame of effects shows, in sentences; an interval that holds zero is no difference shown."""
    lines = []
    for row in effects[effects["part"] != "first cycle"].itertuples() if len(effects) else ():
        interval = f"{row.low:+.1f} to {row.high:+.1f}: "
        verdict = {
            "one seed": "one seed, so no interval",
            "not shown": f"{interval}no difference shown",
            "shown": f"{interval}{'a gain' if row.points > 0 else 'a loss'}",
        }[shown(row.low, row.high)]
        lines.append(f"{row.effect}, {row.part}: {row.points:+.1f} points ({verdict}).")
    return "\n".join(lines) or "Not run."
