"""Differences and ablations: where their points, intervals and numbers stand."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from fedal_utils import plots


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_effects_stand_in_order_with_their_intervals_hollow_where_zero_is_inside():
    rows = [("vae_d1", "ap50", 1.5, 0.5, 2.5, 3), ("vae_d1", "ap_coco", -1.0, -2.0, 0.5, 3)]
    rows.append(("mine", "ap50", 2.0, np.nan, np.nan, 1))
    frame = pd.DataFrame(rows, columns=("effect", "part", "points", "low", "high", "seeds"))
    figure, caption = plots.effects(frame, xlabel="points above random")
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["VAE + D1", "mine"]
    drawn = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in drawn] == [1.5, 2.0, -1.0]
    assert [line.get_markerfacecolor() == "white" for line in drawn] == [False, False, True]
    intervals = [c.get_segments()[0][:, 0].tolist() for c in ax.collections if c.get_segments()[0].size]
    assert intervals == [[0.5, 2.5], [-2.0, 0.5]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["AP at IoU 0.5", "AP, COCO (IoU .50:.95)"]
    assert ax.get_xlabel() == "points above random" and "over 1 to 3 seeds" in caption


def ends():
    """Two arms, two methods, three seeds: values .1 (arm) + .2 (method) + .01 seed."""
    rows = [
        (arm, method, seed, 0.1 * a + 0.2 * m + 0.01 * seed)
        for a, arm in enumerate(("as it is", "kept"))
        for m, method in enumerate(("random", "centralised"))
        for seed in range(3)
    ]
    return pd.DataFrame(rows, columns=("arm", "method", "seed", "ap50")).assign(client="server", cycle=0, round=0)


def test_an_ablation_shows_seeds_pairs_means_and_intervals():
    figure, caption = plots.ablation(ends())
    (ax,) = figure.axes
    assert sorted(t.get_text() for t in ax.texts) == ["0.010", "0.110", "0.210", "0.310"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["as it is", "kept"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["random", "centralised"]
    joins = [line for line in ax.get_lines() if line.get_color() == "0.75"]
    assert len(joins) == 6 and joins[0].get_ydata().tolist() == pytest.approx([0.0, 0.1])
    half = 4.302653 * 0.01 / np.sqrt(3)
    bars = [line.get_ydata() for line in ax.get_lines() if line.get_linewidth() == 1.6]
    assert any(bar == pytest.approx([0.01 - half, 0.01 + half], abs=1e-6) for bar in bars)
    assert caption.endswith("mean over 3 seeds; bar: 95 % t interval of the mean.")
    assert plots.ablation(ends()[lambda f: f["seed"] == 0])[1].endswith("mean over 1 seed; no bar.")
