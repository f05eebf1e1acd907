"""Looks of methods: distinct, the same everywhere, also for those that nobody listed."""

import itertools

from matplotlib.lines import Line2D

from fedal_utils.plots.style import LISTED, SCHEMES, names_of, ordered, style_of


def test_no_two_listed_strategies_look_equal_and_all_can_be_drawn():
    looks = {name: style_of(name) for name in LISTED}
    for one, other in itertools.combinations(looks, 2):
        assert looks[one][:2] != looks[other][:2], (one, other)
        assert looks[one].name != looks[other].name
    for look in looks.values():
        Line2D([0], [0], color=look.colour, marker=look.marker, linestyle=look.line)


def test_schemes_differ_in_line_and_colour_under_every_strategy():
    for strategy in ("random", "sum", "a new one"):
        looks = [style_of(f"{scheme}+{strategy}") for scheme in SCHEMES]
        assert len({look.line for look in looks}) == len({look.colour for look in looks}) == len(SCHEMES)
        assert {look.marker for look in looks} == {style_of(strategy).marker}
    assert style_of("fedavg+sum")[:3] == style_of("sum")[:3]


def test_an_unlisted_strategy_has_a_look_of_its_own_and_keeps_it():
    looks = [style_of(f"strategy_{i}") for i in range(12)]
    assert len({(look.colour, look.marker) for look in looks}) == 12
    assert style_of("strategy_3") == looks[3] and looks[3].name == "strategy 3"
    assert style_of("LS+C").name == "LS+C"  # no scheme is called LS
    assert {look.colour for look in looks}.isdisjoint(style_of(name).colour for name in LISTED)


def test_a_legend_has_plain_strategies_first_and_references_last():
    methods = ["centralised", "chain+sum", "zz_mine", "centralised+sum", "sum", "random"]
    assert ordered(methods) == ["random", "sum", "zz_mine", "chain+sum", "centralised+sum", "centralised"]
    assert names_of(["sum", "random"]) == {"sum": "SUM", "random": "random"}
    wanted = {"sum": "FedAvg, SUM", "chain-fedavg+my_own": "chain then FedAvg, my own", "centralised": "centralised"}
    wanted["centralised+chain+sum"] = "centralised on the labels of chain, SUM"
    assert names_of(list(wanted)) == wanted
