"""FedAvg, local first, and three chains on a handful of scenes: laws, bytes by hand, faults, broken off and resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import miniatures
import numpy as np
import pandas as pd
import pytest
import small_run
import torch

from fedal_utils import config, papers, record, seeding, training
from fedal_utils.data import Labels
from fedal_utils.detectors import Detector
from fedal_utils.federation import aggregate as federation
from fedal_utils.federation import experiment as alfl
from fedal_utils.sampling import strategies as sampling

TINY = dict(
    fpn_channels=16,
    digit_classes=3,
    scenes=(44, 6),
    initial_model_images=6,
    initial_model_iterations=2,
    held_out_images=6,
    clients=2,
    initial_labels=2,
    query_size=2,
    cycles=2,
    rounds=2,
    extra_rounds=1,
    first_pass_rounds=2,
    visit_fraction=0.5,
    iterations=2,
    batch=4,
    optimizer="sgd",
    lr=0.02,
    round_lr_decay=0.2,
    score_above=0.05,
    zoom=(1.0, 1.0),
    shift=0.0,
    colour=0.0,
)
YOLO = dict(
    detector="yolo",
    depth_multiple=0.1,
    width_multiple=0.125,
    norm="batch",
    anchor_side=7.0,
    loss_weights=(1.0, 1.0, 20.0),
    lr=0.01,
)
CHAINS = ("chain+sum", "chain-fedavg+sum", "accumulate+sum")
METHODS = ("sum", "local-first+sum", *CHAINS, "centralised", "centralised+sum", "centralised+chain+sum")
STEPS = 2 * 2 * (2 * 2 + 1)  # clients, iterations, cycles x rounds + tail


def tiny(**changes) -> alfl.Study:
    return alfl.prepare(small_run.settings(**{**TINY, **changes}), device="cpu")


@pytest.fixture(scope="module")
def study() -> alfl.Study:
    return tiny(methods=METHODS)


@pytest.fixture(scope="module")
def unbroken(study, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unbroken")
    small_run.loop(root, study)
    return root


def changed(study: alfl.Study, *methods: str, **changes) -> alfl.Study:
    """The same data under another config."""
    methods = {"methods": methods} if methods else {}
    return dataclasses.replace(study, config=study.config.replace(**methods, **changes))


def relabelled(study: alfl.Study, **tensors) -> alfl.Study:
    labels = dataclasses.replace(study.train.labels, **tensors)
    return dataclasses.replace(study, train=dataclasses.replace(study.train, labels=labels))


def poisoned(study: alfl.Study, rows) -> alfl.Study:
    """One box of each of these training images is not a number: whoever trains on one diverges."""
    boxes = study.train.labels.boxes.clone()
    boxes[torch.as_tensor(rows), 0] = float("nan")
    return relabelled(study, boxes=boxes)


def rows_of_client(study: alfl.Study, name: str) -> np.ndarray:
    _, parts, names = alfl.share_out(study.config, study.train, 0)
    return parts[names.index(name)]


def results(root: Path, name: str = "rounds", method: str = "*") -> dict[str, bytes]:
    return {p.parts[-3]: p.read_bytes() for p in root.rglob(f"{method}/seed0/{name}.csv")}


def table(study: alfl.Study, root: Path, method: str) -> pd.DataFrame:
    return record.table(study.config, "small", root=root, methods=[method])


def server(study: alfl.Study, root: Path, method: str) -> pd.DataFrame:
    rows = table(study, root, method)
    return rows[rows["client"] == "server"].reset_index(drop=True)


def asked(study: alfl.Study, root: Path, method: str) -> pd.DataFrame:
    return record.queries(study.config, "small", root=root, methods=[method]).drop(columns="method")


def state(study: alfl.Study, root: Path, method: str) -> dict:
    return record.state(study.config, "small", method, 0, root=root)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def broken_off(root: Path, study: alfl.Study, commits: int) -> None:
    with pytest.raises(small_run.BrokenOff):
        small_run.loop(root, study, enough=commits)


def starting_point(study: alfl.Study, root: Path) -> Detector:
    model = alfl.build(study.config, len(study.class_names), seeding.torch_rng_for(0, "weights"))
    begun = alfl.beginning(study.config)
    saved = record.shared(begun, "shared", 0, "starting-point", lambda: pytest.fail("made twice"), root=root)
    model.load_state_dict(saved, strict=False)
    return model


# --- names and plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("sum", ("fedavg", "sum")),
        ("random", ("fedavg", "random")),
        ("entropy_max", ("fedavg", "entropy_max")),
        ("fedavg+avg", ("fedavg", "avg")),
        ("local-first+max", ("local-first", "max")),
        ("chain+sum", ("chain", "sum")),
        ("chain-fedavg+random", ("chain-fedavg", "random")),
        ("accumulate+margin_avg", ("accumulate", "margin_avg")),
        ("centralised", ("centralised", "random")),
        ("centralised+sum", ("centralised", "sum")),
        ("centralised+chain+sum", ("centralised", "chain+sum")),
    ],
)
def test_a_method_names_a_scheme_and_a_way_of_asking(method, scheme):
    assert alfl.scheme_of(method) == scheme


@pytest.mark.parametrize(
    "method", ["", "+", "chain", "chain+", "+sum", "som", "chains+sum", "sum+chain", "chain+sum+max", "centralised+x"]
)
def test_a_method_that_nobody_knows_is_refused_with_those_that_there_are(method, study):
    with pytest.raises(ValueError, match=r"is unknown: write a way of asking \(random, sum,.*chain-fedavg\+"):
        alfl.scheme_of(method)
    with pytest.raises(ValueError, match="is unknown"):
        alfl.prepare(study.config.replace(methods=(method,)), device="cpu")


def test_plans_count_visits_by_hand(study):
    paper = config.Config.of(clients=9, cycles=22, rounds=1, extra_rounds=8, first_pass_rounds=10, chain_passes=5)
    assert alfl.plan(paper, "sum") == [(c, 0) for c in range(22)] + [(21, r) for r in range(1, 9)]
    assert alfl.plan(paper, "local-first+sum") == alfl.plan(paper, "centralised+chain+sum") == alfl.plan(paper, "sum")
    assert alfl.plan(paper, "chain+sum") == [(0, r) for r in range(9 + 1 + 5 * 9)]
    assert alfl.plan(paper, "chain-fedavg+sum") == [(0, r) for r in range(9 + 1 + 5)]
    assert alfl.plan(paper.replace(visit_fraction=0.25), "accumulate+sum") == [(0, r) for r in range(9 + 1 + 20 * 9)]
    assert alfl.later_passes(paper.replace(chain_passes=0), "chain") == 22 + 8 - 10
    tight = paper.replace(chain_passes=0, first_pass_rounds=30)
    with pytest.raises(ValueError, match=r"first_pass=30 rounds, which leaves none of the 30 .*give passes"):
        alfl.plan(tight, "chain+sum")
    assert alfl.plan(tight, "sum") and alfl.plan(tight.replace(chain_passes=1), "chain+sum")


def turns(study: alfl.Study, root: Path, method: str) -> list[alfl.Turn]:
    run = record.Run(study.config, "small", method, 0, root, alfl.plan)
    names = [alfl.Client(f"{i:02d}", None) for i in range(study.config.federation.clients)]
    return [alfl.whose_turn(run, names, cycle, round) for cycle, round in run.plan]


def test_turns_are_one_visit_each_then_the_merge_then_the_later_passes(study, tmp_path):
    def who(method):
        return ["+".join(c.name for c in turn.clients) for turn in turns(study, tmp_path, method)]

    assert who("chain+sum") == ["00", "01", "", *["00", "01"] * 3]
    assert who("chain-fedavg+sum") == ["00", "01", "", *["00+01"] * 3]
    assert who("accumulate+sum") == ["00", "01", "", *["00", "01"] * 6]
    for method in CHAINS:
        own = turns(study, tmp_path, method)
        assert [turn.first for turn in own] == [True] * 2 + [False] * (len(own) - 2)
        assert [turn.merge for turn in own] == [False, False, True] + [False] * (len(own) - 3)
        assert [turn.frozen for turn in own] == [False] * 3 + [method != "accumulate+sum"] * (len(own) - 3)
        assert [turn.times for turn in own[:2]] == [2, 2] and own[-1].times == (0.5 if "acc" in method else 1)
        assert own[3].anneal == 1.0 and own[-1].anneal == pytest.approx(0.2)
        assert [turn.asks for turn in own] == [turn.first for turn in own]
    for method in ("sum", "local-first+sum", "centralised+sum"):
        assert who(method) == ["00+01"] * 5
        own = turns(study, tmp_path, method)
        assert [turn.asks for turn in own] == [True, False, True, False, False]
        assert not any(turn.first or turn.merge or turn.frozen for turn in own)
        assert [turn.anneal for turn in own] == pytest.approx([1, 0.2, 1, 0.6, 0.2])
    assert [t.anneal for t in turns(study, tmp_path, "chain+sum")[3:]] == pytest.approx([1, 1, 0.6, 0.6, 0.2, 0.2])


def test_every_scheme_takes_the_same_gradient_steps_on_as_many_labels(study, unbroken):
    for method in METHODS:
        rows = server(study, unbroken, method)
        assert rows["steps"].sum() == STEPS, method
        assert rows["images"].iloc[-1] == 2 * 4, method
        each = table(study, unbroken, method).query("client != 'server'")
        if not method.startswith("centralised"):
            assert each.groupby("client")["steps"].sum().tolist() == [STEPS / 2] * 2, method


def test_all_schemes_begin_with_the_same_labels_and_starting_point(study, unbroken):
    assert len(list(unbroken.rglob("starting-point-seed0.pt"))) == 1
    fedavg, local = (asked(study, unbroken, m).query("cycle == 0") for m in ("sum", "local-first+sum"))
    pd.testing.assert_frame_equal(fedavg, local)
    first = {m: results(unbroken, "asked", m)[m] for m in CHAINS}
    assert len(set(first.values())) == 1, "one first pass, whatever comes after it"
    merged = [server(study, unbroken, m).iloc[:3].drop(columns="method") for m in CHAINS]
    for other in merged[1:]:
        pd.testing.assert_frame_equal(merged[0], other, check_exact=True)


def test_a_starting_point_is_shared_by_all_that_does_not_move_it(study):
    def begun(**changes):
        return alfl.beginning(study.config.replace(**changes)).digest()

    for changes in (
        {"optimizer_state": "client"},
        {"rounds": 3},
        {"chain_passes": 2},
        {"held_out_images": 0},
        {"warmup": 9},
        {"message_dtype": "fp16"},
        {"dropout_rate": 0.5, "on_failure": "skip"},
        {"clients": 3},
        {"methods": ("chain+sum",)},
        {"schedule": "step"},
        {"iterations": 7},
        {"as_released": True},
        {"evaluate_every": 1},
    ):
        assert begun(**changes) == begun(), changes
    for changes in (
        {"lr": 0.1},
        {"initial_model_images": 5},
        {"initial_model_iterations": 3},
        {"initial_model_warmup": 1},
        {"norm": "batch"},
        {"batch": 5},
        {"detector": "yolo"},
        {"final_lr": 0.5},
        {"digit_classes": 4},
        {"image_size": (96, 96)},
        {"ema": 0.5},
    ):
        assert begun(**changes) != begun(), changes


# --- a chain of one is training on one node ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", CHAINS)
def test_a_chain_of_one_client_is_centralised_on_its_labels_bit_for_bit(method, study, tmp_path):
    alone = changed(study, method, clients=1)
    small_run.loop(tmp_path, alone)
    settings, ids = alone.config, list(study.train.images.ids)
    rows = sorted(ids.index(sample) for sample in asked(alone, tmp_path, method)["id"])
    assert len(rows) == 4
    images, labels = study.train.images.take(rows), study.train.labels.take(rows)
    model = starting_point(alone, tmp_path)
    begun = {k: v.clone() for k, v in model.state_dict().items()}

    def fit(round, recipe, iterations, **options):
        rng = seeding.torch_rng_for(0, "train", "00", 0, round)
        list(training.fit(model, images, labels, recipe, training.LocalTask(rng, iterations=iterations, **options)))

    fit(0, settings.replace(schedule="cosine", final_lr=0.2), 4)  # 2 rounds at once; round 1 is the merge with itself
    if method == "accumulate+sum":
        memory = {}
        for visit in range(6):
            fit(2 + visit, settings.replace(lr=0.02 * (1 + (0.2 - 1) * visit / 5)), 1, memory=memory, span=(visit, 6))
    else:
        model.freeze_backbone()
        for later in range(3):
            fit(2 + later, settings.replace(lr=0.02 * (1 + (0.2 - 1) * later / 2)), 2)
    assert same(state(alone, tmp_path, method)["model"], dict(model.state_dict()))
    assert not same(begun, dict(model.state_dict()))


def test_local_first_with_one_client_is_fedavg_with_one_client(study, tmp_path):
    alone = changed(study, "sum", "local-first+sum", clients=1)
    small_run.loop(tmp_path, alone)
    for name in ("rounds", "asked"):
        assert len(set(results(tmp_path, name).values())) == 1
    assert same(*(state(alone, tmp_path, method)["model"] for method in alone.config.methods))


# --- the frozen backbone ----------------------------------------------------------------------------------------------


def test_after_the_merge_no_backbone_entry_changes_and_none_is_sent(tmp_path, monkeypatch):
    """6.3, 6.4: later passes freeze modules 0-9, weights and BatchNorm statistics; 8: what is sent is the head. The
    merged backbone itself reaches every client once, with its first message after the merge.
    """
    frozen = tiny(**YOLO, methods=("chain+sum", "chain-fedavg+sum"), first_pass=3, visit=1.0)
    sent, train_client = [], federation.train_client

    def noted(model, payload, *rest, **options):
        update = train_client(model, payload, *rest, **options)
        sent.append((set(federation.unpack(payload)), set(federation.unpack(update.payload))))
        return update

    monkeypatch.setattr(federation, "train_client", noted)
    sizes = alfl.sent_sizes(frozen)
    for method in frozen.config.methods:
        one, place = changed(frozen, method), tmp_path / method
        sent.clear()
        broken_off(place, one, 3)  # two visits and the merge
        merged = state(one, place, method)["model"]
        small_run.loop(place, one)
        end = state(one, place, method)["model"]
        backbone = {k for k in merged if k.startswith("backbone.")}
        assert sum("running_var" in k for k in backbone) > 20
        assert all(torch.equal(merged[k], end[k]) for k in backbone)
        moved = [k for k in merged if k not in backbone and not torch.equal(merged[k], end[k])]
        assert any("running_mean" in k for k in moved) and any(k.endswith("conv.weight") for k in moved)
        assert len(sent) == 6  # two visits, then two passes of two
        for number, (there, back) in enumerate(sent):
            assert bool(there & backbone) == (number < 4) and bool(back & backbone) == (number < 2)
            assert any("running_mean" in k for k in there)
        rows = table(one, place, method).query("client != 'server'")
        assert set(rows["bytes_down"].iloc[:4]) == {round(1e6 * sizes["full"])}
        assert set(rows["bytes_down"].iloc[4:]) == {round(1e6 * sizes["head"])}
        assert sizes["head"] < 0.5 * sizes["full"]


# --- bytes ------------------------------------------------------------------------------------------------------------


def megabytes(scheme: str, step: int) -> str:
    return f"{alfl.paper_megabytes(scheme, step):.0f}"


def test_paper_megabytes_are_the_notes_figures_section_8():
    each = alfl.paper_megabytes
    assert [each("fedavg", r) for r in range(3)] == pytest.approx([252.306, 504.612, 756.918], abs=5e-4)
    assert (megabytes("fedavg", 200), megabytes("fedavg", 110)) == ("50714", "28006")  # 201 and 111 rounds
    assert [each("local-first", r) for r in (0, 5, 20, 21)] == pytest.approx([252.306] * 4, abs=5e-4)
    for r in (22, 23, 110, 200):
        assert each("local-first", r) == pytest.approx((r - 20) * 252.306, abs=5e-4)
    for scheme in alfl.CHAINS:
        assert [each(scheme, d) for d in range(9)] == pytest.approx([(d + 1) * 28.034 for d in range(9)], abs=5e-4)
        assert each(scheme, 9) == pytest.approx(252.306, abs=5e-4)  # the merge sends nothing
    for r, d in ((1, 0), (1, 8), (3, 4)):
        by_hand = 252.306 + 2 * 5.7 * 9 * (r - 1) + 2 * 5.7 * (d + 1)
        assert each("chain", 9 + 9 * (r - 1) + d + 1) == pytest.approx(by_hand, abs=5e-4)
    assert each("chain-fedavg", 10) - each("chain-fedavg", 9) == pytest.approx(102.6, abs=5e-4)
    assert each("chain", 18) - each("chain", 9) == pytest.approx(102.6, abs=5e-4)
    assert each("accumulate", 18) - each("accumulate", 9) == pytest.approx(346.644, abs=5e-4)
    assert megabytes("accumulate", 9 + 200 * 9) == "69581"
    assert (megabytes("chain", 9 + 5 * 9), megabytes("chain-fedavg", 9 + 20)) == ("765", "2304")
    assert each("centralised", 7) == 0
    assert each("chain", 1, clients=2, full=1.0, head=0.5) == 4 and each("chain", 4, 2, 0, 1.0, 0.5) == 4 + 2 * 1.0
    for bad in ({"scheme": "sum", "step": 0}, {"scheme": "chain", "step": -1}):
        with pytest.raises(ValueError, match="must be"):
            each(**bad)


def traffic(study: alfl.Study, root: Path, method: str) -> list[tuple[int, int]]:
    """(up, down) of every round, all clients; each client's row checked against the server's."""
    rows = table(study, root, method)
    ends = rows[rows["client"] == "server"]
    for _, end in ends.iterrows():
        mine = rows.query(f"client != 'server' and cycle == {end['cycle']} and round == {end['round']}")
        assert (mine["bytes_up"].sum(), mine["bytes_down"].sum()) == (end["bytes_up"], end["bytes_down"])
    return list(zip(ends["bytes_up"], ends["bytes_down"], strict=True))


def test_metered_bytes_are_messages_times_hops_by_hand(study, unbroken):
    sizes = alfl.sent_sizes(study)
    full, head = round(1e6 * sizes["full"]), round(1e6 * sizes["head"])
    assert head < full
    luggage = len(federation.pack(state(study, unbroken, "accumulate+sum")["memory"]["00"]))
    assert luggage > 0.9 * full  # one moment a weight
    both = (2 * full, 2 * full)
    assert traffic(study, unbroken, "sum") == [both] * 5
    # apart: the starting point once; nothing in cycle 0; all models go up in the last cycle's first round
    assert traffic(study, unbroken, "local-first+sum") == [(0, 2 * full), (0, 0), (2 * full, 0), both, both]
    # to the next visitor and to the server; the merge; the merged model once to each; one hop a visit; the last hands
    # the result in
    first = [(full, full), (full, full), (0, 0)]
    assert traffic(study, unbroken, "chain+sum") == [*first, *[(0, full)] * 2, *[(0, head)] * 3, (head, head)]
    assert traffic(study, unbroken, "chain-fedavg+sum") == [*first, (2 * head, 2 * full), *[(2 * head, 2 * head)] * 2]
    hop = full + luggage
    assert traffic(study, unbroken, "accumulate+sum") == [*first, (0, full), *[(0, hop)] * 10, (hop, hop)]
    for method in METHODS[5:]:
        assert traffic(study, unbroken, method) == [(0, 0)] * 5


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_the_size_of_an_optimisers_state_is_the_metered_one(optimiser, study):
    images, labels = study.train.images.take([0]), study.train.labels.take([0])
    model, memory = alfl.build(study.config, 3, torch.Generator().manual_seed(0)), {}
    recipe = study.config.replace(optimizer=optimiser)
    list(
        training.fit(
            model,
            images,
            labels,
            recipe,
            training.LocalTask(torch.Generator().manual_seed(0), iterations=1, optimizer_state=memory),
        )
    )
    size = alfl.sent_sizes(changed(study, optimiser=optimiser))["optimiser"]
    assert round(1e6 * size) == len(federation.pack(memory))


def test_the_traffic_table_stands_beside_the_papers_formula(study, unbroken):
    frame = alfl.traffic_table(study, record.table(study.config, "small", root=unbroken))
    sizes = alfl.sent_sizes(study)
    full, head = sizes["full"], sizes["head"]
    ends = frame.groupby("method").last()
    assert ends.loc["sum", "metered"] == pytest.approx(ends.loc["sum", "formula"])  # fedavg: no hop to spare
    assert ends.loc["sum", "paper_sizes"] == pytest.approx(5 * 2 * 2 * 14.017)
    assert ends.loc["chain+sum", "formula"] == pytest.approx(2 * 2 * full + 6 * 2 * head)
    # the formula forgets that every client must get the merged backbone once: 2 x (full - head)
    assert ends.loc["chain+sum", "metered"] == pytest.approx(2 * 2 * full + 2 * full + 5 * head)
    unsent = 2 * (full - head)
    assert ends.loc["chain-fedavg+sum", "metered"] == pytest.approx(ends.loc["chain-fedavg+sum", "formula"] + unsent)
    # the formula counts the first merge's round at once and two ways, the meter one way when it happens
    assert ends.loc["local-first+sum", "metered"] == pytest.approx(ends.loc["local-first+sum", "formula"])
    assert (ends.loc["centralised", ["metered", "formula", "paper_sizes"]] == 0).all()
    assert frame.groupby("method")["step"].max().to_dict() == {m: len(alfl.plan(study.config, m)) - 1 for m in METHODS}


# --- local first ------------------------------------------------------------------------------------------------------


def test_local_first_depends_on_nobody_else_before_the_last_cycles_first_merge(study, unbroken, tmp_path):
    """6.2: with other labels at client 01, client 00 asks the same until the end; under FedAvg its scores move."""
    methods = ("sum", "local-first+sum")
    rows = torch.as_tensor(rows_of_client(study, "01"))
    order = torch.arange(len(study.train))
    order[rows] = rows.roll(1)
    labels = study.train.labels
    other = relabelled(study, **{f.name: getattr(labels, f.name)[order] for f in dataclasses.fields(labels)})
    other = changed(other, *methods)
    small_run.loop(tmp_path, other)
    for method in methods:
        mine, theirs = (asked(study, root, method).query("client == '00'") for root in (unbroken, tmp_path))
        assert mine.equals(theirs) == (method == "local-first+sum")
        mine, theirs = (table(study, root, method).query("client == '00'") for root in (unbroken, tmp_path))
        equal = [a == b for a, b in zip(mine["loss"], theirs["loss"], strict=True)]
        # rounds (0, 0), (0, 1), (1, 0) | merge | (1, 1), (1, 2)
        assert equal == ([True, True, True, False, False] if method != "sum" else [True, False, False, False, False])


def test_local_first_merges_for_the_first_time_in_the_last_cycles_first_round(study, unbroken, tmp_path):
    method = "local-first+sum"
    one = changed(study, method)
    broken_off(tmp_path, one, 2)
    before = state(one, tmp_path, method)
    start = starting_point(one, tmp_path).state_dict()
    assert same(before["model"], dict(start)) and set(before["own"]) == {"00", "01"}
    assert not same(before["own"]["00"], before["own"]["01"])
    updates = []
    with pytest.MonkeyPatch.context() as patch:
        merge = alfl.merge
        patch.setattr(alfl, "merge", lambda *all_: (updates.append(all_[3]), merge(*all_))[1])
        broken_off(tmp_path, one, 1)
    after = state(one, tmp_path, method)
    assert len(updates) == 1 and after["own"] == {}
    assert same(after["model"], federation.average(updates[0]))
    small_run.loop(tmp_path, one)
    assert results(tmp_path)[method] == results(unbroken)[method]


def test_local_first_scores_with_the_clients_own_model(study, unbroken, tmp_path):
    method = "local-first+sum"
    one = changed(study, method)
    broken_off(tmp_path, one, 2)
    before, model = state(one, tmp_path, method), starting_point(one, tmp_path)
    for name in ("00", "01"):
        rows = asked(study, unbroken, method).query(f"client == '{name}' and cycle == 1")
        images = study.train.images.take([study.train.images.ids.index(sample) for sample in rows["id"]])
        scores = []
        for weights in (before["own"][name], before["model"]):
            model.load_state_dict(weights, strict=False)
            seen = alfl.look(one.config, model, images, study.device)
            scores.append(sampling.score("sum", seen, len(images), None).values)
        assert rows["score"].to_numpy() == pytest.approx(scores[0], rel=1e-4)
        assert rows["score"].to_numpy() != pytest.approx(scores[1], rel=1e-2)


# --- the reference on a run's labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sum", "chain+sum"])
def test_the_reference_asks_what_its_method_asked_cycle_by_cycle(method, study, unbroken):
    theirs, mine = (
        asked(study, unbroken, name).sort_values(["cycle", "client", "id"], ignore_index=True)
        for name in (method, f"centralised+{method}")
    )
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    assert mine["cycle"].nunique() == (2 if method == "sum" else 1)
    assert server(study, unbroken, f"centralised+{method}")["images"].tolist() == (
        [4, 4, 8, 8, 8] if method == "sum" else [8] * 5
    )


def test_the_reference_before_its_method_is_a_clear_error(study, tmp_path):
    with pytest.raises(ValueError, match="gets the labels of method 'sum': run that first"):
        small_run.loop(tmp_path, changed(study, "centralised+sum"))
    assert not list(tmp_path.rglob("rounds.csv"))


def test_the_reference_of_an_unfinished_run_is_a_clear_error(study, tmp_path):
    broken_off(tmp_path, changed(study, "sum"), 1)  # cycle 0 only
    with pytest.raises(ValueError, match="run that first|finish"):
        small_run.loop(tmp_path, changed(study, "centralised+sum"))


# --- labels have one door ---------------------------------------------------------------------------------------------


def test_hidden_labels_scrambled_change_no_question_of_any_scheme(study, unbroken, tmp_path):
    methods = ("sum", "local-first+sum", "chain+sum")
    ids = study.train.images.ids
    first, _, _ = alfl.share_out(study.config, study.train, 0)
    paid = {ids[row] for row in [*first, *alfl.held_out(study.config, study.train, 0)]}
    for method in methods:
        paid |= set(asked(study, unbroken, method)["id"])
    hidden = np.array([row for row, sample in enumerate(ids) if sample not in paid])
    assert len(hidden) >= 10
    order = torch.arange(len(ids))
    order[hidden] = torch.as_tensor(np.roll(hidden, 3))
    labels = study.train.labels
    scrambled = Labels(*(getattr(labels, f.name)[order] for f in dataclasses.fields(labels)))
    assert not torch.equal(scrambled.classes, labels.classes)
    other = dataclasses.replace(study, train=dataclasses.replace(study.train, labels=scrambled))
    small_run.loop(tmp_path, changed(other, *methods))
    for name in ("asked", "rounds"):
        expected = results(unbroken, name)
        assert results(tmp_path, name) == {method: expected[method] for method in methods}


def test_held_out_images_are_in_nobodys_pool(study):
    first, parts, _ = alfl.share_out(study.config, study.train, 0)
    held = alfl.held_out(study.config, study.train, 0)
    every = [*first, *held, *(row for part in parts for row in part)]
    assert len(held) == 6 and sorted(every) == list(range(44))
    assert len(alfl.held_out(study.config.replace(held_out_images=0), study.train, 0)) == 0


# --- faults -----------------------------------------------------------------------------------------------------------


def without(monkeypatch, name: str, rounds=None) -> None:
    """Nobody calls this client (in these rounds, or in any)."""
    take_part, train = federation.take_part, alfl.train
    now = []

    def noted(run, study, model, clients, cycle, round):
        now[:] = [(cycle, round)]
        return train(run, study, model, clients, cycle, round)

    def some(names, *rest):
        return [n for n in take_part(names, *rest) if n != name or (rounds is not None and now[0] not in rounds)]

    monkeypatch.setattr(alfl, "train", noted)
    monkeypatch.setattr(federation, "take_part", some)


def agree(study, roots: tuple[Path, Path], method: str, name: str) -> None:
    """The same run for all but this client: final weights, and everybody else's rows."""
    assert same(*(state(study, root, method)["model"] for root in roots))
    ours, theirs = (table(study, root, method).query(f"client != '{name}'") for root in roots)
    columns = ["cycle", "round", "client", "images", "loss", "steps", "ap50"]
    pd.testing.assert_frame_equal(
        ours[columns].reset_index(drop=True), theirs[columns].reset_index(drop=True), check_exact=True
    )


@pytest.mark.parametrize("method", ["sum", "local-first+sum", "chain+sum"])
def test_a_client_that_diverges_is_left_out_or_stops_the_run_by_name(method, study, tmp_path, monkeypatch):
    """The middle one of three has labels that are not numbers: from round to round, apart, and in mid-chain."""
    three = changed(study, method, clients=3, tail=0, passes=1, on_failure="skip")
    bad = poisoned(three, rows_of_client(three, "01"))
    small_run.loop(tmp_path / "skip", bad)
    rows = table(bad, tmp_path / "skip", method).query("client == '01'")
    acts = 4 if method != "chain+sum" else 2
    assert rows["status"].tolist() == ["diverged"] * acts and (rows["bytes_up"] == 0).all()
    assert (rows["steps"] == 0).all() and rows["loss"].isna().all() and rows["images"].iloc[-1] == 4
    with pytest.raises(training.TrainingDiverged, match=r"client 01: loss is nan.*on_failure='skip' goes on without"):
        small_run.loop(tmp_path / "stop", changed(bad, on_failure="stop"))
    stopped = changed(bad, on_failure="stop")
    if method == "chain+sum":  # the first visitor's round is there, whole
        assert table(stopped, tmp_path / "stop", method)["client"].tolist() == ["00", "server"]
    else:
        assert not list(tmp_path.joinpath("stop").rglob("rounds.csv"))
    without(monkeypatch, "01")
    small_run.loop(tmp_path / "without", three)
    agree(three, (tmp_path / "skip", tmp_path / "without"), method, "01")


@pytest.mark.parametrize("state_of_optimiser", ["client", "travels"])
def test_a_client_that_diverged_keeps_its_optimiser_and_statistics_as_they_were(state_of_optimiser, tmp_path):
    base = tiny(
        norm="batch",
        batch_norm="local",
        optimiser_state=state_of_optimiser,
        on_failure="skip",
        batch=8,
        methods=("sum",),
        tail=0,
    )
    broken_off(tmp_path, base, 2)
    before = state(base, tmp_path, "sum")
    assert set(before["memory"]) == set(before["home"]) == {"00", "01"}
    seen = asked(base, tmp_path, "sum")["id"].tolist()
    rows = [row for row in rows_of_client(base, "01") if base.train.images.ids[row] not in seen]
    small_run.loop(tmp_path, poisoned(base, rows))  # all that 01 asks from now on is poison, and in every batch
    after = state(base, tmp_path, "sum")
    failed = table(base, tmp_path, "sum").query("client == '01'")
    assert failed["status"].tolist() == ["", "", "diverged", "diverged"]
    assert same(before["home"]["01"], after["home"]["01"])
    assert not same(before["home"]["00"], after["home"]["00"])
    # what travels is handed to all; what is kept stays
    assert same(before["memory"]["01"], after["memory"]["01"]) == (state_of_optimiser == "client")
    assert not same(before["memory"]["00"], after["memory"]["00"])
    assert int(after["memory"]["00"]["steps"]) == 8


def test_clients_that_are_apart_send_nothing_that_could_be_lost(study, tmp_path):
    """All updates lost: local-first clients train on alone, and nobody ever merges."""
    one = changed(study, "local-first+sum", lost=1.0, on_failure="skip", tail=0)
    small_run.loop(tmp_path, one)
    each = table(one, tmp_path, "local-first+sum").query("client != 'server'")
    assert each.query("cycle == 0")["status"].isna().all() or (each.query("cycle == 0")["status"] == "").all()
    assert (each.query("cycle == 1")["status"] == "lost").all() and (each["bytes_up"] == 0).all()
    assert set(state(one, tmp_path, "local-first+sum")["own"]) == {"00", "01"}


@pytest.mark.parametrize("method", ["sum", "chain-fedavg+sum"])
def test_lost_updates_leave_the_model_as_it_was_or_stop_the_run_by_name(method, study, tmp_path):
    all_lost = changed(study, method, lost=1.0, on_failure="skip", tail=0, passes=1)
    if method == "chain-fedavg+sum":
        with pytest.raises(ValueError, match="small chain-fedavg.sum seed 0: no client came through the chain's first"):
            small_run.loop(tmp_path / "skip", all_lost)
    else:
        small_run.loop(tmp_path / "skip", all_lost)
        start = starting_point(all_lost, tmp_path / "skip")
        assert same(state(all_lost, tmp_path / "skip", method)["model"], dict(start.state_dict()))
    rows = table(all_lost, tmp_path / "skip", method)
    each, ends = rows.query("client != 'server'"), rows.query("client == 'server'")
    assert (each["status"] == "lost").all() and (rows["bytes_up"] == 0).all() and (each["bytes_down"] > 0).all()
    assert (ends["steps"] == 0).all() and ends["loss"].isna().all()
    with pytest.raises(alfl.ClientLost, match=r"client 00: its update did not arrive in cycle 0, round 0; on_failure="):
        small_run.loop(tmp_path / "stop", changed(all_lost, on_failure="stop"))


def test_half_of_the_updates_lost_is_a_run_without_those_clients_in_those_rounds(study, tmp_path, monkeypatch):
    half = changed(study, "sum", "chain+sum", lost=0.5, on_failure="skip", iterations=1)
    small_run.loop(tmp_path / "half", half)
    both = changed(half, lost=0.0)
    for method in half.config.methods:
        rows = table(half, tmp_path / "half", method).query("client != 'server'")
        gone = rows[rows["status"] == "lost"]
        assert 0 < len(gone) < len(rows)
        missing = set(zip(gone["cycle"], gone["round"], gone["client"], strict=True))
        with monkeypatch.context() as patch:
            for name in ("00", "01"):
                without(patch, name, {(c, r) for c, r, who in missing if who == name})
            small_run.loop(tmp_path / "without", changed(both, method))
        places = ((half, tmp_path / "half"), (both, tmp_path / "without"))
        assert same(*(state(*place, method)["model"] for place in places))
        ours, theirs = (server(*place, method)[["steps", "bytes_up", "ap50"]] for place in places)
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


@pytest.mark.parametrize("method", ["sum", "chain+sum"])
def test_a_client_without_labels_sends_nothing_and_the_rest_go_on(method, study, tmp_path, monkeypatch):
    three = changed(study, method, clients=3, tail=0, passes=1)
    ask = alfl.ask
    monkeypatch.setattr(alfl, "ask", lambda *all_: None if all_[3].name == "01" else ask(*all_))
    small_run.loop(tmp_path / "idle", three)
    rows = table(three, tmp_path / "idle", method).query("client == '01'")
    assert len(rows) and (rows["status"] == "no labels").all()
    assert (rows[["images", "boxes", "bytes_up", "bytes_down", "steps"]] == 0).all().all()
    without(monkeypatch, "01")
    small_run.loop(tmp_path / "without", three)
    agree(three, (tmp_path / "idle", tmp_path / "without"), method, "01")


def test_a_chain_in_which_nobody_finds_anything_to_ask_stops_with_a_clear_error(study, tmp_path):
    blind = changed(study, "chain+sum", empty="never", score_above=0.999)
    with pytest.raises(ValueError, match="no client came through the chain's first pass, so there is nothing to merge"):
        small_run.loop(tmp_path, blind)
    rows = table(blind, tmp_path, "chain+sum").query("client != 'server'")
    assert rows["status"].tolist() == ["no labels"] * 2


# --- the class-wise merge ---------------------------------------------------------------------------------------------


def two_clients(study: alfl.Study) -> tuple[record.Run, Detector, list[alfl.Client]]:
    run = record.Run(study.config, "small", "chain+sum", 0, plan=alfl.plan)
    models = [alfl.build(study.config, 3, torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]
    clients = [alfl.Client(f"{i:02d}", None) for i in range(3)]
    for client, model in zip(clients[:2], models, strict=False):  # the third one sent nothing
        client.own = federation.state_of(model, model.exchanged())
    return run, models[2], clients


@pytest.mark.parametrize(("as_released", "judge"), [(False, "held out"), (True, "test")])
def test_each_class_votes_for_its_best_model_on_the_held_out_images_7_2(as_released, judge, study, monkeypatch):
    study = changed(study, as_released=as_released)
    run, model, clients = two_clients(study)
    judged = []
    table = iter([{"ap50/0": 0.9, "ap50/1": 0.2, "ap50/2": 0.4}, {"ap50/0": 0.5, "ap50/1": 0.6, "ap50/2": 0.4}])

    def evaluate(found, labels, names):
        judged.append(labels)
        return next(table)

    monkeypatch.setattr(alfl.metrics, "evaluate", evaluate)
    own = [client.own for client in clients[:2]]
    shares = alfl.merge_by_class(run, study, model, clients)
    assert shares == pytest.approx({"00": 0.5, "01": 0.5})  # one class each, one shared
    got = model.state_dict()
    for key, value in own[0].items():
        by_hand = (value.double() * 0.5 + own[1][key].double() * 0.5).float()
        assert torch.equal(got[key], by_hand), key
    rows = alfl.held_out(study.config, study.train, 0)
    want = study.train.labels.take(rows) if judge == "held out" else study.test.labels
    assert all(torch.equal(labels.boxes, want.boxes) for labels in judged) and len(judged) == 2
    assert all(client.own == {} for client in clients)


def test_one_winner_takes_the_whole_merge(study, monkeypatch):
    run, model, clients = two_clients(study)
    found = iter([{"ap50/0": 0.1}, {"ap50/0": 0.2}])  # classes 1 and 2 were not judged
    monkeypatch.setattr(alfl.metrics, "evaluate", lambda *_: next(found))
    own = clients[1].own
    assert alfl.merge_by_class(run, study, model, clients) == {"00": 0.0, "01": 1.0}
    assert same(dict(model.state_dict()), own)


def test_as_released_the_average_has_whole_percents_whatever_clients_hold(study):
    run, model, clients = two_clients(changed(study, as_released=True))
    updates = [
        federation.Update(name, federation.pack({"w": torch.tensor([value])}), images, 1, 1, 0.5)
        for name, value, images in (("02", 4.0, 9), ("00", 1.0, 1), ("01", 2.0, 1))
    ]
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(1))
    alfl.merge(run, model, clients, updates)
    assert model.w.item() == pytest.approx(0.34 * 1 + 0.33 * 2 + 0.33 * 4)  # released code: the rest goes to the first
    alfl.merge(record.Run(study.config, "small", "sum", 0), model, clients, updates)
    assert model.w.item() == pytest.approx((1 + 2 + 9 * 4) / 11)


# --- the optimiser between rounds, broken off and resumed -------------------------------------------------------------


def restarted_after_every_commit(root: Path, study: alfl.Study) -> int:
    for starts in range(1, 99):
        try:
            small_run.loop(root, study, enough=1)
            return starts
        except small_run.BrokenOff:
            continue
    pytest.fail("never finished")


@pytest.mark.parametrize("method", CHAINS)
def test_a_chain_broken_off_after_every_visit_gives_the_same_bytes(method, study, unbroken, tmp_path):
    starts = restarted_after_every_commit(tmp_path, changed(study, method))
    assert starts == len(alfl.plan(study.config, method))
    for name in ("rounds", "asked"):
        assert results(tmp_path, name)[method] == results(unbroken, name)[method]
    assert same(state(study, tmp_path, method)["model"], state(study, unbroken, method)["model"])


def test_kept_and_travelling_optimisers_survive_being_broken_off(study, tmp_path):
    losses, memory = {}, {}
    for how in ("restart", "client", "travels"):
        one, place = changed(study, "sum", optimiser_state=how, warmup=3), tmp_path / how
        small_run.loop(place / "whole", one)
        if how != "restart":
            restarted_after_every_commit(place / "broken", one)
            assert results(place / "broken") == results(place / "whole")
        losses[how] = server(one, place / "whole", "sum")["loss"].tolist()
        memory[how] = state(one, place / "whole", "sum")["memory"]
        full = round(1e6 * alfl.sent_sizes(study)["full"])
        luggage = len(federation.pack(memory[how]["00"])) if how == "travels" else 0
        assert traffic(one, place / "whole", "sum") == [
            (2 * (full + luggage), 2 * (full + (luggage if round else 0))) for round in range(5)
        ]
    assert len({values[0] for values in losses.values()}) == 1, "nothing to remember in the first round"
    assert len({values[-1] for values in losses.values()}) == 3
    assert memory["restart"] == {}
    for how in ("client", "travels"):
        assert {name: int(own["steps"]) for name, own in memory[how].items()} == {"00": 10, "01": 10}
        assert same(memory[how]["00"], memory[how]["01"]) == (how == "travels")


def test_the_centralised_reference_keeps_its_optimiser_too(study, unbroken, tmp_path):
    one = changed(study, "centralised", optimiser_state="client")
    restarted_after_every_commit(tmp_path / "broken", one)
    small_run.loop(tmp_path / "whole", one)
    assert results(tmp_path / "broken") == results(tmp_path / "whole") != results(unbroken, method="centralised")
    assert int(state(one, tmp_path / "whole", "centralised")["memory"]["00"]["steps"]) == STEPS


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("sum", "client"),
        ("sum", "travels"),
        ("local-first+sum", "client"),
        ("local-first+sum", "travels"),
        ("chain+sum", "client"),
        ("chain+sum", "travels"),
        ("chain-fedavg+sum", "client"),
        ("chain-fedavg+sum", "travels"),
        ("accumulate+sum", "restart"),
        ("centralised", "client"),
    ],
)
def test_a_schedule_that_lives_on_ends_with_the_last_step(method, how, study, tmp_path, monkeypatch):
    """Where an optimiser's state lives on, its steps count up without a gap, to the length of its schedule."""
    lines: dict[str, list[tuple[int, int, int]]] = {}

    def pretended(model, payload, images, labels, recipe, rng, client, iterations, *_, memory, span, **options):
        luggage = b""
        if memory is not None:
            travels = options.get("travels", False)
            one_for_all = travels and method in ("chain+sum", "accumulate+sum")
            lines.setdefault("all" if one_for_all else client, []).append((*span, iterations))
            memory["steps"] = torch.tensor(span[0] + iterations)
            luggage = federation.pack(memory) if travels else b""
        return federation.Update(client, payload, 1, 1, iterations, 0.5, luggage)

    monkeypatch.setattr(federation, "train_client", pretended)
    small_run.loop(tmp_path, changed(study, method, optimiser_state=how))
    assert lines
    for who, calls in lines.items():
        done = 0
        for before, _, iterations in calls:
            assert before == done, who
            done += iterations
        assert {whole for _, whole, _ in calls} == {done}, who


# --- the paper's settings ---------------------------------------------------------------------------------------------


def test_the_paper_profile_runs_on_kittis_layout_with_missing_classes(tmp_path):
    """Mosaic, fp16 on the wire, three views, gradients added up, epochs and warm-up as released: on 60 tiny images."""
    pictures = [
        miniatures.Picture(f"{i:06d}", (94, 310), ((name, (10 + 3 * (i % 60), 20, 60 + 3 * (i % 60), 60)),))
        for i, name in enumerate(["Car", "Pedestrian", "Cyclist"] * 20)
    ]
    miniatures.kitti(tmp_path / "kitti", pictures)
    small = papers.load(
        "13_communication",
        "paper",
        "kitti",
        seeds=[0],
        image_size=[64, 192],
        width_multiple=0.125,
        depth_multiple=0.1,
        clients=2,
        missing_classes=[[1], [3]],
        initial_model_images=6,
        initial_model_iterations=2,
        held_out_images=4,
        cycles=2,
        extra_rounds=1,
        initial_labels=2,
        query_size=2,
        epochs=1,
        first_pass_rounds=2,
        chain_passes=1,
        visit_fraction=1.0,
        no_detection_rule="last",
        threads=1,
        methods=["sum", "chain+sum", "accumulate+sum", "centralised+sum"],
    )
    study = alfl.prepare(small, device="cpu", root=str(tmp_path))
    assert study.class_names[1] == "Cyclist" and study.class_names[3] == "Pedestrian"
    small_run.loop(tmp_path / "runs", study)
    _, parts, _ = alfl.share_out(study.config, study.train, 0)
    for part, absent in zip(parts, (2, 4), strict=True):
        assert len(part) >= 4 and not (study.train.labels.classes[part] == absent).any()
    sizes = alfl.sent_sizes(study)
    for method in small.methods:
        rows = table(study, tmp_path / "runs", method).query("client == 'server'")
        assert np.isfinite(rows["ap50"].astype(float).iloc[-1]) and rows["steps"].sum() > 0, method
    down = table(study, tmp_path / "runs", "sum").query("client == 'server'")["bytes_down"]
    assert set(down) == {round(2e6 * sizes["full"])}
    state_dict = alfl.build(study.config, 8, seeding.torch_rng_for(0, "w")).state_dict()
    assert 2 * sum(v.numel() for v in state_dict.values() if v.is_floating_point()) <= 1e6 * sizes["full"], "fp16"
    assert 1e6 * sizes["full"] < 3 * sum(v.numel() for v in state_dict.values())
