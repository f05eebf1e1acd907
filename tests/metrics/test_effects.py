"""Differences at equal labels, of arms and of an ablation, worked by hand."""

import math

import pandas as pd
import pytest

from fedal_utils import metrics

IMAGES = [10, 20, 30]
EQUAL = {  # (method, seed) -> boxes and AP50 at the end of each cycle
    ("random", 0): ([20, 40, 60], [0.2, 0.4, 0.5]),
    ("crowded", 0): ([30, 70, 100], [0.2, 0.5, 0.6]),
    ("random", 1): ([10, 30, 50], [0.1, 0.3, 0.3]),
    ("crowded", 1): ([10, 30, 50], [0.1, 0.5, 0.5]),
}


def labels_table(runs: dict[tuple[str, int], tuple[list[float], list[float]]]) -> pd.DataFrame:
    """Server rows of two rounds a cycle (the first worth nothing) and clients' rows, in no order."""
    rows = []
    for (method, seed), (boxes, heights) in runs.items():
        for cycle, (images, box, height) in enumerate(zip(IMAGES, boxes, heights, strict=True)):
            one = {"method": method, "seed": seed, "cycle": cycle, "images": images, "boxes": box}
            rows += [{**one, "round": r, "client": "server", "ap50": v} for r, v in ((0, 0.01), (1, height))]
            rows.append({**one, "round": 1, "client": "00", "ap50": math.nan, "images": 1, "boxes": 1})
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_gains_at_equal_images_and_at_equal_boxes_by_hand():
    """Images: (.35 + .55) / 2 - (.3 + .45) / 2 = .075. Boxes 30 to 60: .2 to .425 is .3125 in the mean; random has
    .3, .4, .5 at 30, 40, 60: (.35 x 10 + .45 x 20) / 30 = .41667. What gains by images loses by boxes."""
    one = labels_table({key: run for key, run in EQUAL.items() if key[1] == 0})
    gains = metrics.gains_at_equal(one)
    assert list(gains.columns) == list(metrics.EFFECT) and gains["points"].tolist() == pytest.approx([7.5, -31.25 / 3])
    assert "crowded, equal boxes: -10.4 points (one seed, so no interval)." in metrics.findings(gains)
    turned = metrics.gains_at_equal(one, xs=("boxes",), baseline="crowded")
    assert turned["effect"].tolist() == ["random"] and turned["points"].tolist() == pytest.approx([31.25 / 3])


def test_gains_at_equal_labels_are_paired_by_seed():
    """Seed 1: .4 - .25 = .15 by images and, at the same boxes, by boxes. 7.5 and 15: 11.25 +- 12.7062 x 3.75."""
    gains = metrics.gains_at_equal(labels_table(EQUAL)).set_index("part")
    assert gains["seeds"].tolist() == [2, 2]
    assert gains["points"].to_dict() == pytest.approx({"equal images": 11.25, "equal boxes": (15 - 31.25 / 3) / 2})
    low, high = gains.loc["equal images", ["low", "high"]]
    assert (low, high) == pytest.approx((11.25 - 12.7062 * 3.75, 11.25 + 12.7062 * 3.75), abs=1e-3)
    # a seed that only one of the two has counts nothing, and a method without any common seed is not there
    more = EQUAL | {("crowded", 2): EQUAL["crowded", 0], ("late", 2): EQUAL["crowded", 0]}
    pd.testing.assert_frame_equal(metrics.gains_at_equal(labels_table(more)).set_index("part"), gains)
    assert metrics.gains_at_equal(labels_table(EQUAL), baseline="best").empty


@pytest.mark.parametrize("boxes", [[70, 80, 90], [60, 80, 90]])
def test_curves_that_share_no_labels_are_not_compared(boxes):
    table = labels_table({("random", 0): EQUAL["random", 0], ("crowded", 0): (boxes, [0.2, 0.5, 0.6])})
    with pytest.raises(ValueError, match="two curves share no range of boxes"):
        metrics.gains_at_equal(table)
    assert metrics.gains_at_equal(table, xs=("images",))["points"].tolist() == pytest.approx([7.5])


def test_gains_of_arms_by_hand():
    """Means over the cycles: .3667 and .2333 under random; the arm's are 10 points above in seed 0, 2 below in 1."""
    plain = labels_table({k: v for k, v in EQUAL.items() if k[0] == "random"}).assign(arm="plain")
    new = plain.assign(arm="new", ap50=plain["ap50"] + plain["seed"].map({0: 0.1, 1: -0.02}))
    gains = metrics.arm_gains(pd.concat([plain, new]), "random", "plain", ys=("ap50",))
    assert gains[["effect", "part", "seeds"]].values.tolist() == [["new", "ap50", 2]]
    assert gains["points"].tolist() == pytest.approx([4])
    assert metrics.findings(gains).endswith("no difference shown).")
    assert metrics.findings(gains.iloc[:0]) == "Nothing to compare."


def arms_table(values: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """Server rows of two rounds a run (the first worth nothing), clients' rows between them; seeds 0, 1, ..."""
    ends = {(arm, m, seed): v for arm, of in values.items() for m, line in of.items() for seed, v in enumerate(line)}
    rows = [(*key, r, "server", v) for key, end in ends.items() for r, v in ((0, 0.1), (1, end))]
    rows += [(*key, r, "00", math.nan) for key in ends for r in (0, 1)]
    return pd.DataFrame(rows, columns=["arm", "method", "seed", "round", "client", "ap50"]).assign(cycle=0)


ARMS = {
    "restart": {"random": [0.4, 0.5, 0.3], "centralised": [0.6, 0.7, 0.8]},
    "kept": {"random": [0.5, 0.6, 0.5], "centralised": [0.8, 0.8, 0.8]},
}


def test_finals_are_the_ends_of_the_runs_in_the_order_of_the_arms():
    table = arms_table(ARMS)
    table = pd.concat([table[table["arm"] == arm].sample(frac=1, random_state=0) for arm in ARMS])
    ends = metrics.finals(table)
    assert list(dict.fromkeys(ends["arm"])) == ["restart", "kept"] and len(ends) == 12
    assert all(row.value == pytest.approx(ARMS[row.arm][row.method][row.seed]) for row in ends.itertuples())


def test_gaps_by_hand():
    """Reference: the last arm's node, 80 thrice. The arms lack 40, 30, 50 and 30, 20, 30: 10, 10, 20 are gained."""
    found = metrics.gaps(arms_table(ARMS)).set_index(["effect", "part"])
    wanted = {("restart", "random minus centralised"): -40, ("kept", "random minus centralised"): -80 / 3}
    wanted |= {("kept", "gain over restart"): 40 / 3, ("kept", "centralised's gain"): 10}
    assert found["points"].to_dict() == pytest.approx(wanted)
    low, high = metrics.seed_interval([10, 10, 20])
    assert found.loc[("kept", "gain over restart"), ["low", "high"]].tolist() == pytest.approx([low, high])
    text = metrics.findings(found.reset_index())
    assert "restart, random minus centralised: -40.0 points (-64.8 to -15.2: a loss)." in text


def test_gaps_use_the_seeds_that_all_arms_have_and_say_what_is_absent():
    fewer = {**ARMS, "kept": {"random": [0.5, 0.6], "centralised": [0.8, 0.8, 0.8]}}
    assert set(metrics.gaps(arms_table(fewer))["seeds"]) == {2}
    late = arms_table({"restart": {"random": [0.1], "centralised": [0.2]}})
    other = arms_table({"kept": {"random": [0.1], "centralised": [0.2]}}).assign(seed=7)
    for table in (arms_table({"restart": {"random": [0.1]}}), pd.concat([late, other])):
        with pytest.raises(ValueError, match="no seed of 'random' and 'centralised' has finished in all arms"):
            metrics.gaps(table)
