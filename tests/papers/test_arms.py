"""Arms change what their names say; gains are split as by hand; fixed subsets are the published ones."""

import pandas as pd
import pytest

from fedal_utils import papers, record
from fedal_utils.config import FILTERS
from fedal_utils.papers import huale, kafal, ssd_vae, van_bommel


def changes(arm, base) -> dict:
    return {name: value for name, value in arm.flat().items() if value != base.flat()[name]}


def test_the_optimizer_is_reset_or_kept_and_a_client_takes_the_nodes_steps():
    base = papers.load("11_fedavg", iterations=28)
    arms = van_bommel.optimizer_ablation(base)
    policies = [(arm.federation.optimizer_state, arm.training.warmup) for arm in arms.values()]
    assert policies == [("restart", 100), ("restart", 0), *[("client", 100)] * 2]  # 1,000 of 280 steps, as 100 of 28
    longer, clients = list(arms.values())[-1], base.federation.clients
    assert changes(longer, arms["kept, one warm-up"]) == {"iterations": 28 * clients}
    epochs = base.replace(iterations=0, epochs=2)
    assert van_bommel.optimizer_ablation(epochs)["restart, warm-up"].training.warmup == 1000
    assert list(van_bommel.optimizer_ablation(epochs).values())[-1].training.epochs == 2 * clients


def test_an_arm_of_the_losses_differs_from_the_plain_one_in_what_its_name_says():
    base = papers.load("20_huale", "smoke")
    arms = huale.loss_arms(base.replace(box_loss="efficient_iou", emphasis=0.5))  # whatever the config says
    plain = arms[huale.PLAIN]
    assert (plain.model.box_loss, plain.model.auxiliary_head, plain.model.emphasis) == ("smooth_l1", "none", 0.0)
    losses, heads = ({name: value} for name, value in (("box_loss", "extended_iou"), ("auxiliary_head", "sides")))
    others = [{"box_loss": "efficient_iou"}, heads, {"auxiliary_head": "iou"}, {"emphasis": 1.0}]
    found = [changes(arm, plain) for arm in arms.values()]
    assert found == [{}, losses | heads | {"emphasis": 1.0}, losses, *others]


def test_orders_are_different_permutations_and_the_published_one_is_the_config_itself():
    base = papers.load("20_huale", "smoke")
    orders = [arm.query.cascade_order for arm in huale.filter_orders(base).values()]
    assert [sorted(order) for order in orders] == [sorted(FILTERS)] * 3 and len(set(orders)) == 3
    assert orders[0] == base.query.cascade_order


def curves_table(values) -> pd.DataFrame:
    """values: (arm, method, seed) -> AP50 of each cycle; rows as `record.table` gives them."""
    names = ["arm", "method", "seed", "cycle", "ap50"]
    rows = [(*key, cycle, ap) for key, curve in values.items() for cycle, ap in enumerate(curve)]
    return pd.DataFrame(rows, columns=names).assign(round=0, client="server", images=8)


def test_the_gain_is_split_as_by_hand():
    p, w = huale.PLAIN, huale.WHOLE
    both = {
        (p, "random"): ([0.40, 0.50, 0.60], [0.30, 0.50, 0.70]),
        (p, "cascade"): ([0.40, 0.52, 0.64], [0.30, 0.54, 0.72]),
        (w, "random"): ([0.46, 0.53, 0.61], [0.38, 0.53, 0.71]),
        (w, "cascade"): ([0.46, 0.57, 0.65], [0.38, 0.55, 0.75]),
    }
    table = curves_table({(*key, seed): curve for key, curves in both.items() for seed, curve in enumerate(curves)})
    split = huale.gain_split(table).set_index(["effect", "part"])
    # whole cascade - plain random: seed 0 (6 + 7 + 5) / 3 = 6, seed 1 (8 + 5 + 5) / 3 = 6; without the first 6 and 5
    both = split.loc["losses and acquisition"]
    assert both["points"].to_dict() == pytest.approx({"all cycles": 6, "without the first": 5.5, "first cycle": 7})
    # the first cycle has random labels: the selection cannot have changed a thing, the losses all of it
    for effect in ("acquisition, plain losses", "acquisition, HUALE losses"):
        assert split.loc[(effect, "first cycle"), "points"] == 0
    # the parts add up to the whole, either way round
    for part in ("all cycles", "without the first", "first cycle"):
        points = split["points"].xs(part, level="part")
        for loss, selection in (
            ("losses, random labels", "acquisition, HUALE losses"),
            ("losses, cascade's labels", "acquisition, plain losses"),
        ):
            assert points[loss] + points[selection] == pytest.approx(points["losses and acquisition"])
    # without the first, seeds 6 and 5: t interval 5.5 +- 12.706 * 0.7071 / sqrt(2)
    row = split.loc[("losses and acquisition", "without the first")]
    assert (row["low"], row["high"], row["seeds"]) == pytest.approx((5.5 - 6.353, 5.5 + 6.353, 2), abs=1e-3)
    assert "against CALD as published" not in split.index.get_level_values(0)  # CALD was not run


def test_unpaired_seeds_and_unequal_curves_are_left_out():
    p, w = huale.PLAIN, huale.WHOLE
    table = curves_table({(p, "random", 0): [0.4, 0.5], (w, "random", 0): [0.5, 0.7], (w, "random", 1): [0.9, 0.9]})
    split = huale.gain_split(table)
    assert set(split["effect"]) == {"losses, random labels"} and set(split["seeds"]) == {1}
    assert split["points"].tolist() == pytest.approx([15, 20, 10])
    assert not len(huale.gain_split(curves_table({(p, "random", 0): [0.4, 0.5], (w, "random", 0): [0.5]})))


def test_the_published_averages_include_the_first_cycle():
    """The abstract's 4.53, 3.44 and 1.57 come out of the digitised curves only with the first cycle in."""
    paper = record.read_paper("huale")
    split = huale.published_split(paper).set_index(["item", "minus"])
    stated = paper[paper["x"].isna()]
    for item in ("VOC07", "VOC12", "COCO"):
        headline = stated.loc[stated["item"] == f"{item}, average gain", "value"].item()
        assert split.loc[(item, "Random"), "all"] == pytest.approx(headline, abs=0.01)
    by_hand = {"later": [3.87, 3.38, 1.60], "first": [8.5, 3.8, 1.46]}
    for column, values in by_hand.items():
        assert split[column].xs("Random", level="minus").tolist() == pytest.approx(values, abs=0.01)
    assert split["last"].xs("CALD", level="minus").tolist() == pytest.approx([0.1, 0.1, 0.48], abs=0.01)


def test_kafals_training_is_taken_apart():
    base = papers.load("30_kafal")
    arms = kafal.training_arms(base)
    parts = [(arm.training.balanced_softmax, arm.training.distillation_weight) for arm in arms.values()]
    assert parts == [(False, 0.0), (True, 0.0), (True, 1.0)] and changes(arms["KCFU"], base) == {}


def test_the_sweep_ends_in_the_single_terms():
    base = papers.load("40_ssd_vae", vae_weight=0.4)
    arms = ssd_vae.sweep(base, "d3")
    assert list(arms) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert arms[1.0] == (base, "vae") and arms[0.0] == (base, "d3")
    for alpha in (0.75, 0.5, 0.25):
        assert arms[alpha] == (base.replace(vae_weight=alpha), "vae_d3")
