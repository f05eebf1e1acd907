"""Verdicts by the rule of DESIGN 6.11, on numbers worked by hand; what is published."""

import math
from pathlib import Path

import pandas as pd
import pytest

from fedal_utils import record
from fedal_utils.config import Config
from fedal_utils.record.verdicts import level_verdict, order_verdict

T2, T1 = 4.302653, 12.7062  # Student's t, 97.5 %, at 2 and 1 degrees of freedom
ABOUT = {"notebook": "11_fedavg", "data": "bccd", "scale": "small detector", "profile": "quick"}


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


THEIRS = {"HUALE": 60.0, "CALD": 55.0, "Random": 50.0}
RANDOM = seeds(10, 20, 30)


def above(base: dict[int, float], *by: float) -> dict[int, float]:
    return {seed: base[seed] + step for seed, step in zip(base, by, strict=True)}


STEADY, NOISY, FALLING = (4, 5, 6), (-1, 2, 5), (-4, -5, -6)  # steps of 5 +- 2.48, 2 +- 7.45, -5 +- 2.48
CASES = {
    "order shown": (STEADY, STEADY),
    "order partly shown (1 of 2 steps)": (NOISY, STEADY),
    "contradicted": (FALLING, STEADY),
    "inconclusive": (NOISY, NOISY),
}


@pytest.mark.parametrize("verdict", CASES)
def test_the_order_of_a_paper_by_hand(verdict):
    first, second = CASES[verdict]
    cald = above(RANDOM, *second)
    ours = {"HUALE": above(cald, *first), "CALD": cald, "Random": RANDOM}
    found = order_verdict(THEIRS, ours)
    assert found["verdict"] == verdict and found["seeds"] == 3
    ends = [a + b for a, b in zip(first, second, strict=True)]
    mean, spread = sum(ends) / 3, (ends[2] - ends[0]) / 2  # of three equally spaced numbers: the standard deviation
    assert found["difference"] == pytest.approx(mean)
    half = T2 * abs(spread) / math.sqrt(3)
    assert (found["low"], found["high"]) == pytest.approx((mean - half, mean + half), abs=1e-5)
    widest = max(abs(step[2] - step[0]) / 2 for step in (first, second))
    assert found["smallest_detectable"] == pytest.approx(T2 * widest / math.sqrt(3), abs=1e-5)


def test_two_seeds_need_students_interval_and_one_seed_shows_nothing():
    """Steps 4 and 6: 5 +- 12.7. Two runs that both lie above prove nothing yet."""
    two = order_verdict({"a": 2, "b": 1}, {"a": seeds(14, 26), "b": seeds(10, 20)})
    assert two["verdict"] == "inconclusive" and two["smallest_detectable"] == pytest.approx(T1, abs=1e-4)
    one = order_verdict({"a": 2, "b": 1}, {"a": seeds(14), "b": seeds(10)})
    assert one["verdict"] == "inconclusive" and math.isnan(one["smallest_detectable"]) and one["seeds"] == 1


def test_a_step_is_one_of_the_paper_among_settings_that_we_ran():
    ours = {"HUALE": above(RANDOM, *STEADY), "Random": RANDOM}  # CALD is not run: its neighbours become a step
    assert order_verdict(THEIRS, ours)["verdict"] == "order shown"
    assert order_verdict(THEIRS, {"Random": RANDOM}) == {"verdict": "not run", "seeds": 0}
    tied = order_verdict({"a": 1.0, "b": 1.0}, {"a": seeds(1, 2), "b": seeds(1, 2)})
    assert tied["verdict"] == "not run"  # equal published values say nothing of an order
    other = {"HUALE": {7: 1.0, 8: 2.0}, "Random": RANDOM}  # no seed in common
    assert order_verdict(THEIRS, other)["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    ("theirs", "ours", "tolerance", "verdict"),
    [
        (50.0, (50.4, 50.5, 50.6), 1.0, "level matches"),  # +0.5 +- 0.25
        (50.0, (51.4, 51.5, 51.6), 1.0, "level differs"),  # +1.5 +- 0.25, wholly beyond 1
        (50.0, (51.0, 51.1, 51.2), 1.0, "inconclusive"),  # +1.1 +- 0.25 holds 1
        (50.0, (48.0, 50.0, 52.0), 1.0, "inconclusive"),  # noisy seeds match nothing: +- 4.97
        (50.0, (50.0,), 1.0, "inconclusive"),
    ],
)
def test_a_level_matches_only_if_the_interval_is_narrow(theirs, ours, tolerance, verdict):
    found = level_verdict(theirs, seeds(*ours), tolerance)
    assert found["verdict"] == verdict and found["difference"] == pytest.approx(sum(ours) / len(ours) - theirs)


HEAD = "item,setting,x,metric,value,unit,source,tolerance\n"


def paper_csv(folder: Path, *rows: str) -> Path:
    (folder / "p.csv").write_text(HEAD + "".join(row + "\n" for row in rows))
    return folder / "p.csv"


ENDS = {"sum": (0.54, 0.55, 0.56), "random": (0.50, 0.50, 0.50)}  # a seed each, of curves that begin at 0.30
TABLE = pd.DataFrame(
    {"method": m, "seed": s, "cycle": c, "round": r, "client": client, "images": 10 * (c + 1), "ap50": v * r}
    for m, ends in ENDS.items()
    for s, end in enumerate(ends)
    for c, v in enumerate((0.30, end))
    for client in ("0", "server")
    for r in (0, 1)
)


def test_items_of_a_paper_are_compared_at_the_end_or_by_area(tmp_path):
    csv = paper_csv(
        tmp_path,
        "fig. 1,SUM,100,ap50,0.50,fraction,p. 3,0.02",
        "fig. 1,SUM,200,ap50,0.70,fraction,p. 3,0.02",
        "fig. 1,RND,100,ap50,0.50,fraction,p. 3,0.02",
        "fig. 1,RND,200,ap50,0.60,fraction,p. 4,0.02",
        "fig. 2,SUM,,ap50,55.2,percent,p. 5,1.0",
        "fig. 2,RND,,ap50,55.3,percent,p. 5,1.0",
        "fig. 3,SUM,,ap50,,,p. 6,",
        "fig. 4,MAX,,ap50,0.5,fraction,p. 7,",
    )
    names = {"SUM": "sum", "RND": "random"}
    rows = record.compare_paper(TABLE, csv, ABOUT, settings=names).set_index("item")
    assert rows["verdict"].to_dict() == {
        "fig. 1": "order shown",  # 4, 5, 6 points: 5 +- 2.48
        "fig. 2": "contradicted",  # the paper has random above
        "fig. 3": "no published number",
        "fig. 4": "not run",
    }
    first = rows.loc["fig. 1"]
    assert (first["theirs"], first["ours"]) == ("SUM 70 > RND 60", "SUM 55, RND 50")
    assert first["difference"] == pytest.approx(5) and first["source"] == "p. 3; p. 4"
    assert first["smallest_detectable"] == pytest.approx(T2 / math.sqrt(3), abs=1e-5)
    assert rows.loc["fig. 2", "difference"] == pytest.approx(-5)
    (area,) = record.compare_paper(TABLE, csv, ABOUT, settings=names, items=["fig. 1"], by="area").to_dict("records")
    assert area["theirs"] == "SUM 60 > RND 55" and area["difference"] == pytest.approx(2.5)
    level = record.compare_paper(TABLE, csv, ABOUT, settings=names, items=["fig. 2"], level=True)
    assert level["item"].tolist() == ["fig. 2", "fig. 2: SUM", "fig. 2: RND"]
    assert level["verdict"].tolist()[1:] == ["inconclusive", "level differs"]  # +- 2.48 is wider than 1; 5 away
    with pytest.raises(ValueError, match=r"no item \['fig. 9'\]"):
        record.compare_paper(TABLE, csv, ABOUT, items=["fig. 9"])


def test_verdicts_are_published_once_for_each_item_and_none_of_smoke_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDAL_HOME", str(tmp_path))
    csv = paper_csv(tmp_path, "fig. 1,sum,,ap50,.6,,p. 3,", "fig. 1,random,,ap50,.5,,p. 3,")
    frame = record.compare_paper(TABLE, csv, record.about(Config.of(profile="smoke"), "11_fedavg", "small detector"))
    assert frame["verdict"].tolist() == ["not run"] and frame["ours"].tolist() == [""]
    assert not record.publish_verdicts(frame, "smoke").exists()
    path = record.publish_verdicts(record.compare_paper(TABLE, csv, ABOUT), "quick")
    before = path.read_bytes()
    assert record.publish_verdicts(record.compare_paper(TABLE, csv, ABOUT), "quick").read_bytes() == before
    record.publish_verdicts(record.compare_paper(TABLE, csv, ABOUT | {"notebook": "12_chain"}), "quick")
    assert pd.read_csv(path)["notebook"].tolist() == ["11_fedavg", "12_chain"]


@pytest.mark.parametrize(("ours", "verdict"), [(14.0174, "formula checked"), (14.02, "contradicted")])
def test_a_formula_is_checked_to_the_last_printed_digit(tmp_path, ours, verdict):
    csv = paper_csv(tmp_path, "MB,FULL,,megabytes,14.017,MB,p. 5,", "MB,FULL,20,megabytes,765,MB,p. 5,")
    formula = lambda setting, x: 765.4 if x == 20 else ours  # noqa: E731
    (found,) = record.check_formula(csv, ABOUT, "MB", formula).to_dict("records")
    assert found["verdict"] == verdict and "FULL 20 765" in found["theirs"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("item,value\nfig. 1,2\n", "p.csv: columns are item, setting"),
        (f"{HEAD}fig. 1,sum,20,ap50,high,,p. 3,\n", "x, value, tolerance numbers"),
        ("item,setting", "it is cut"),
    ],
)
def test_a_wrong_paper_file_is_an_error(tmp_path, text, reason):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        record.read_paper(tmp_path / "p.csv")


def test_tables_and_figures_are_published_under_results(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setenv("FEDAL_HOME", str(tmp_path))
    path = record.save(pd.DataFrame({"a": [0.1, 1 / 3], "b": ["x", None]}), "11_fedavg.csv")
    assert path == tmp_path / "results" / "tables" / "11_fedavg.csv"
    assert path.read_text() == "a,b\n0.1,x\n0.3333333333333333,\n"
    figure, ax = plt.subplots()
    ax.plot([1, 2])
    first = record.save(figure, "11_fedavg.png").read_bytes()
    assert first[:4] == b"\x89PNG" and record.save(figure, "b.png").read_bytes() == first
    plt.close(figure)
