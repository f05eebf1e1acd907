"""Learning curves and what can be said of them over seeds: areas, intervals, paired tests, a summary.

A table is one of `record.table`: a row per method, seed, cycle, round and client, metrics in the rows of "server".
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats


def cycle_ends(table: pd.DataFrame) -> pd.DataFrame:
    """Server rows of the last round of each cycle, one per (method, seed, cycle): the points of a learning curve."""
    server = table[table["client"].astype(str) == "server"].sort_values(["method", "seed", "cycle", "round"])
    return server.groupby(["method", "seed", "cycle"], sort=False).tail(1)


def area_under_curve(x: Sequence[float], y: Sequence[float]) -> float:
    """Area under a learning curve by trapezoids, divided by its width: the mean of y over the range of x."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 2 or x.shape != y.shape or not (np.isfinite(y).all() and (np.diff(x) > 0).all() and np.isfinite(x[-1])):
        raise ValueError(f"a curve needs two or more finite points with growing x, got {x.tolist()} and {y.tolist()}")
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """The band that figures draw: 95 % t interval of the mean for three or more seeds, both for two, NaN for one."""
    if len(values) < 3:
        return (min(values), max(values)) if len(values) == 2 else (math.nan, math.nan)
    mean, half = float(np.mean(values)), _half_width(np.asarray(values, dtype=float))
    return mean - half, mean + half


def _half_width(values: np.ndarray) -> float:
    n = len(values)  # half the Student's 95 % t interval of the mean; NaN for one value
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def paired_test(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Is a different from b, seed by seed? {'difference', 'low', 'high', 'p', 'n'}; entry i of both is the same seed.

    `difference` is the mean of a - b, `low` and `high` its 95 % t interval (NaN for one seed), `p` two-sided from all
    2^n sign flips of the differences, n <= 16 (no p below 2 / 2^n). Sums that differ by rounding only are ties.
    """
    a, b = (np.asarray(values, dtype=float) for values in (a, b))
    if a.shape != b.shape or not 1 <= len(a) <= 16 or not np.isfinite([a, b]).all():
        raise ValueError(f"need finite values of the same 1..16 seeds, got {a.tolist()} and {b.tolist()}")
    rounding = 1e-12 * float(np.abs(a).sum() + np.abs(b).sum())
    difference = np.where(np.abs(a - b) <= rounding, 0.0, a - b)
    n, mean, half = len(a), float(difference.mean()), _half_width(difference)
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2^n, n), every way to flip n signs
    p = float(np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - rounding))
    return {"difference": mean, "low": mean - half, "high": mean + half, "p": p, "n": n}


def holm(p: Sequence[float]) -> np.ndarray:
    """P values corrected for their number (Holm 1979): the chance that any of them is this small by luck; NaN stays."""
    p = np.asarray(p, dtype=float)
    out, order = np.full(len(p), math.nan), np.argsort(p)[: int(np.isfinite(p).sum())]  # NaN sorts last
    out[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1.0)
    return out


def summary(table: pd.DataFrame, y: str = "ap50", baseline: str = "random") -> pd.DataFrame:
    """One row per method: the end of its learning curve, the area under it, and what lies between it and `baseline`.

    Columns: method, seeds, images, boxes, annotation_minutes, megabytes (both ways), last and area (over
    labelled images) with _low and _high, minus_<baseline> (areas, same seeds) with low, high, p and p_holm.
    """
    server, ends, areas, rows = table[table["client"].astype(str) == "server"], cycle_ends(table), {}, []
    for method, part in ends.groupby("method"):
        curves = dict(list(part.groupby("seed")))
        grow = all(len(curve) > 1 and (curve["images"].diff().iloc[1:] > 0).all() for curve in curves.values())
        areas[method] = {s: area_under_curve(c["images"], c[y]) for s, c in curves.items()} if grow else {}
    for method, mine in areas.items():
        finals = ends[ends["method"] == method].groupby("seed").tail(1)
        traffic = server[server["method"] == method][["bytes_up", "bytes_down"]].sum().sum() / len(finals)
        row = {"method": method, "seeds": len(finals), **finals[["images", "boxes"]].mean()}
        row |= {"annotation_minutes": finals["seconds"].mean() / 60, "megabytes": traffic / 1e6}
        for name, values in (("last", finals[y].tolist()), ("area", list(mine.values()))):
            low, high = seed_interval(values)
            row |= {name: float(np.mean(values)) if values else math.nan, f"{name}_low": low, f"{name}_high": high}
        both = sorted(set(mine) & set(areas.get(baseline, {}))) if method != baseline else []
        test = paired_test([mine[s] for s in both], [areas[baseline][s] for s in both]) if both else {}
        row[f"minus_{baseline}"] = test.get("difference", math.nan)
        rows.append(row | {name: test.get(name, math.nan) for name in ("low", "high", "p")})
    return pd.DataFrame(rows).assign(p_holm=holm([row["p"] for row in rows]))


def power(size, all_labels, twice, found: pd.DataFrame, y: str = "ap50") -> pd.DataFrame:
    """Whether a size can tell methods apart: a row of points of `y`.

    size, all_labels, twice: tables of the baseline at this size, with all labels at once, with twice the steps.
    found: the `summary` of all methods; `smallest` is half the widest interval of a difference from the baseline.
    labels_add, steps_add: what the cycles' labels add to the start, what the doubling adds to the end (less is wanted).
    """
    start, end = (cycle_ends(size).groupby("seed")[y].nth(place).mean() for place in (0, -1))
    full, more = (cycle_ends(table).groupby("seed")[y].last().mean() for table in (all_labels, twice))
    row = {"start": start, "end": end, "all_labels": full, "twice_the_steps": more}
    row |= {"labels_add": end - start, "steps_add": more - end, "smallest": (found["high"] - found["low"]).max() / 2}
    return 100 * pd.DataFrame([row])
