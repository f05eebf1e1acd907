"""Learning curves, intervals and paired tests by hand and against scipy; the summary's sentences."""

import itertools
import math
import operator
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedal_utils import metrics


def test_area_under_curve_by_hand_and_of_a_constant():
    assert metrics.area_under_curve([0, 1, 3], [0, 1, 0]) == pytest.approx((0.5 + 1) / 3)
    assert metrics.area_under_curve([50, 70, 200], [0.3, 0.3, 0.3]) == pytest.approx(0.3)


@pytest.mark.parametrize(("x", "y"), [([1], [1]), ([1, 1], [0, 1]), ([1, 2], [0, math.nan]), ([1, math.inf], [0, 1])])
def test_bad_curves_are_refused(x, y):
    with pytest.raises(ValueError, match="a curve needs"):
        metrics.area_under_curve(x, y)


def test_cycle_ends_keeps_the_last_server_row_of_each_cycle():
    rows = itertools.product((0, 1), (0, 1), (0, 1, 2), ("0", "server"))
    table = pd.DataFrame(rows, columns=["seed", "cycle", "round", "client"]).sample(frac=1, random_state=0)
    table = table.assign(method="sum", ap50=table["cycle"] + table["round"] / 10)
    ends = metrics.cycle_ends(table)[["seed", "cycle", "round", "ap50"]].values.tolist()
    assert ends == [[0, 0, 2, 0.2], [0, 1, 2, 1.2], [1, 0, 2, 0.2], [1, 1, 2, 1.2]]


def test_seed_interval_by_hand():
    """1, 2, 3: mean 2, standard error 1 / sqrt 3, t(0.975, 2) = 4.302653. Two seeds: both; one: nothing."""
    half = 4.302653 / math.sqrt(3)
    assert metrics.seed_interval([1, 2, 3]) == pytest.approx((2 - half, 2 + half), abs=1e-6)
    assert metrics.seed_interval([0.7, 0.5]) == (0.5, 0.7) and all(map(math.isnan, metrics.seed_interval([0.5])))


def test_paired_test_by_hand():
    """Differences 1, 2, 3: of 8 sign flips two are as extreme; the interval is Student's, for two seeds as well."""
    low, high = metrics.seed_interval([1, 2, 3])
    expected = {"difference": 2, "low": low, "high": high, "p": 2 / 8, "n": 3}
    assert metrics.paired_test([1.5, 2.5, 3.5], [0.5, 0.5, 0.5]) == pytest.approx(expected)
    two = metrics.paired_test([1, 3], [0, 0])  # mean 2, standard error 1, t(0.975, 1) = 12.7062
    assert (two["low"], two["high"]) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_ties_are_ties_and_not_split_by_rounding(seed):
    """Accuracies of a few hundredths tie often: p counted in fractions, where nothing is rounded."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 12, 6), rng.integers(0, 12, 6)
    exact = [Fraction(int(d), 100) for d in a - b]
    flips = [abs(sum(map(operator.mul, signs, exact))) for signs in itertools.product((1, -1), repeat=6)]
    found = metrics.paired_test(a / 100 + 0.1, b / 100 + 0.1)
    assert found["p"] == np.mean([flip >= abs(sum(exact)) for flip in flips])
    assert found["p"] == metrics.paired_test(b / 100 + 0.1, a / 100 + 0.1)["p"]
    if any(exact):
        test = stats.ttest_rel(a / 100 + 0.1, b / 100 + 0.1).confidence_interval()
        assert (found["low"], found["high"]) == pytest.approx((test.low, test.high))


def test_paired_test_at_the_edges():
    rounded = metrics.paired_test([0.1 + 0.2, 0.1 + 0.2], [0.3, 0.3])  # equal but for rounding: nothing is shown
    assert rounded == {"difference": 0, "low": 0, "high": 0, "p": 1, "n": 2}
    one = metrics.paired_test([0.5], [0.4])
    assert one["p"] == 1 and math.isnan(one["low"])
    for a, b in (([1, 2], [1]), ([], []), ([math.nan, 1], [0, 1]), (range(17), range(17))):
        with pytest.raises(ValueError, match="finite values of the same 1..16 seeds"):
            metrics.paired_test(a, b)


def test_holm_by_hand():
    """0.01, 0.04, 0.03 of three: 0.03, 0.06 (no less than the one before), 0.06; NaN is not counted."""
    assert metrics.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    found = metrics.holm([math.nan, 0.5, 0.9])
    assert math.isnan(found[0]) and found[1:].tolist() == pytest.approx([1, 1])


def curves_table(curves: dict[str, list[list[float]]], images=(10, 20)) -> pd.DataFrame:
    """curves: method -> per seed the ap50 at the end of each cycle; every row counts 1 MB each way."""
    runs = ((m, s, values) for m, seeds in curves.items() for s, values in enumerate(seeds))
    rows = [(m, s, c, images[c], v) for m, s, values in runs for c, v in enumerate(values)]
    table = pd.DataFrame(rows, columns=["method", "seed", "cycle", "images", "ap50"])
    costs = dict(boxes=2 * table["images"], seconds=60 * table["images"], bytes_up=1e6, bytes_down=1e6)
    return table.assign(round=0, client="server", **costs)


def test_summary_and_findings_by_hand():
    """Areas are means of both ends: sum .3 .4 .5 above random's .2 .3 .4 by .1 in each seed."""
    random = [[0.1, 0.3], [0.2, 0.4], [0.3, 0.5]]
    table = curves_table(
        {"random": random, "sum": [[0.2, 0.4], [0.3, 0.5], [0.4, 0.6]], "max": [[0, 0.2], [0.4, 0.6], [0.2, 0.4]]}
    )
    found = metrics.summary(table).set_index("method")
    assert found.loc[
        "sum", ["images", "boxes", "annotation_minutes", "megabytes", "last", "area"]
    ].tolist() == pytest.approx([20, 40, 20, 4, 0.5, 0.4])
    assert found.loc["sum", "minus_random"] == pytest.approx(0.1) and found.loc["sum", "p"] == 0.25
    assert found.loc["sum", "p_holm"] == 0.5 and math.isnan(found.loc["random", "minus_random"])
    assert metrics.findings(found.reset_index()).replace(" -0.0", " +0.0").splitlines() == [
        "max, area above random: +0.0 points (-43.0 to +43.0: no difference shown).",
        "sum, area above random: +10.0 points (+10.0 to +10.0: a gain).",
    ]
    one = metrics.summary(curves_table({"random": random[:1], "sum": random[1:2]}))
    assert metrics.findings(one).endswith("(one seed, so no interval).")
    assert metrics.findings(one.iloc[:1]) == "Nothing to compare."


def test_a_method_that_queries_once_has_an_end_and_no_area():
    table = curves_table({"random": [[0.1, 0.3]]})
    once = curves_table({"once": [[0.2, 0.5]]}, images=(8, 8))
    found = metrics.summary(pd.concat([table, once])).set_index("method")
    assert found.loc["once", "last"] == 0.5 and math.isnan(found.loc["once", "area"])
    assert found.loc["random", "area"] == pytest.approx(0.2) and math.isnan(found.loc["once", "minus_random"])
