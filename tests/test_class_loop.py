"""Notebook 30's loop on a few digits: KAFAL's clients, who is stale, who has nothing left, and kill and resume."""

from __future__ import annotations

import dataclasses
import filecmp

import numpy as np
import pytest
import torch

from fedal_utils import config, data, papers, record
from fedal_utils.data import partition
from fedal_utils.federation import experiment as alfl

SMALL = dict(
    limit=(80, 30),
    clients=4,
    initial_fraction=0.0,
    query_fraction=0.0,
    initial_labels=3,
    query_size=4,
    cycles=3,
    rounds=2,
    iterations=2,
    batch=4,
    local_only_epochs=2,
    seeds=(0,),
    dirichlet_alpha=0.5,
    client_fraction=0.75,
)


def settings(**changes) -> config.Config:
    return papers.load("30_kafal", "smoke", **{**SMALL, "methods": ("ksas",), **changes})


def prepared(**changes) -> alfl.Study:
    torch.set_num_threads(1)
    return alfl.prepare(settings(**changes), device="cpu")


def loop(root, study, order=1, enough=None, watch=None):
    """All methods, as the notebook runs them. watch(run, clients, cycle, round, updates) sees every round."""
    done = 0
    for run in record.runs(study.config, "small", root=root, plan=alfl.plan, progress=False):
        clients, model = alfl.start(run, study)
        for cycle, round in run.rounds():
            if done == enough:
                raise KeyboardInterrupt
            if round == 0:
                for client in clients[::order]:
                    alfl.ask(run, study, model, client, cycle, clients)
            updates = alfl.train(run, study, model, clients[::order], cycle, round)
            alfl.merge(run, model, clients, updates)
            alfl.commit(run, study, model, clients, updates, cycle, round)
            done += 1
            if watch:
                watch(run, clients, cycle, round, updates)
    return record.table(study.config, "small", root=root), record.queries(study.config, "small", root=root)


def same_files(one, other):
    files = sorted(p.relative_to(one) for name in ("rounds.csv", "queries.csv") for p in one.rglob(name))
    assert files and all(filecmp.cmp(one / f, other / f, shallow=False) for f in files)


def test_every_way_of_asking_goes_through_the_loop_and_starts_alike(tmp_path):
    study = prepared(methods=alfl.CLASS_STRATEGIES)
    table, asked = loop(tmp_path, study)
    server = table[table["client"].astype(str) == "server"]
    assert set(server["method"]) == set(alfl.CLASS_STRATEGIES)
    first = server[(server["cycle"] == 0)].groupby("round")
    assert all(len(set(rows["loss"])) == 1 and len(set(rows["accuracy"].dropna())) <= 1 for _, rows in first)
    ends = server[server["accuracy"].notna()]
    assert ((ends["accuracy_worst_client"] <= ends["accuracy_mean_client"]) & (ends["accuracy"] <= 1)).all()
    assert (server[server["cycle"] == 2]["images"] == 4 * (3 + 4 + 4)).all()
    assert len({tuple(rows["id"]) for _, rows in asked[asked["cycle"] > 0].groupby("method")}) > 8
    down = server[(server["cycle"] == 1) & (server["round"] == 0)].set_index("method")["bytes_down"]
    assert down["qbc"] > 2 * down["ksas"] == 2 * down["random"]  # the committee is sent, and billed


def test_broken_off_and_resumed_and_turned_round_gives_the_same_bytes(tmp_path):
    study = prepared(methods=("ksas", "logo", "qbc"))
    loop(tmp_path / "whole", study)
    for enough in (1, 2, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            loop(tmp_path / "broken", study, enough=enough)
    loop(tmp_path / "broken", study)
    same_files(tmp_path / "whole", tmp_path / "broken")
    loop(tmp_path / "turned", study, order=-1)
    same_files(tmp_path / "whole", tmp_path / "turned")


def test_hidden_labels_scrambled_move_no_choice(tmp_path):
    methods = ("ksas", "entropy", "badge", "coreset", "margin.local", "logo")
    study = prepared(methods=methods, cycles=2, rounds=1, compensation=1.0)
    _, asked = loop(tmp_path / "plain", study)
    seen = {study.train.images.ids.index(i) for i in asked[asked["cycle"] == 0]["id"]}
    hidden = np.array([row for row in range(len(study.train)) if row not in seen])
    order = np.arange(len(study.train))
    order[hidden] = np.roll(hidden, 7)
    rows = study.config.replace(partition=str(alfl.save_partition(study, 0, tmp_path / "same.json")))
    _, parts, _ = alfl.share_out(rows, study.train, 0)
    scrambled = dataclasses.replace(study.train, labels=study.train.labels.take(order))
    other = dataclasses.replace(study, config=rows, train=scrambled)
    assert not torch.equal(scrambled.labels.classes, study.train.labels.classes)
    _, again = loop(tmp_path / "scrambled", other)
    assert sorted(np.concatenate(parts)) == list(range(len(study.train)))
    pick = ["method", "cycle", "client", "id"]
    assert asked[pick].equals(again[pick])


def test_who_missed_the_last_round_asks_with_stale_models(tmp_path):
    kept = {}

    def watch(run, clients, cycle, round, updates):
        sent = {u.client for u in updates}
        for c in clients:
            kept[cycle, round, c.name] = (c.name in sent, bool(c.known), bool(c.last))

    loop(tmp_path, prepared(rounds=3), watch=watch)
    took_part = [value for value in kept.values()]
    assert any(not there for there, _, _ in took_part)
    for there, stale, trained in took_part:
        assert stale != there and (trained or not there)


def test_as_released_everyone_takes_part_in_a_cycles_last_round(tmp_path):
    who = {}

    def watch(run, clients, cycle, round, updates):
        who[cycle, round] = (len(updates), any(c.known for c in clients))

    loop(tmp_path, prepared(as_released=True), watch=watch)
    assert all(count == (4 if round == 1 else 3) for (_, round), (count, _) in who.items())
    assert not any(stale for (_, round), (_, stale) in who.items() if round == 1)


def test_a_client_asks_for_what_it_has_left_and_then_nothing(tmp_path):
    study = prepared(budget=12, clients=4, cycles=4, rounds=1, methods=("ksas", "logo", "badge", "random"))
    table, asked = loop(tmp_path, study)
    server = table[table["client"].astype(str) == "server"]
    assert set(server[server["cycle"] == 3]["images"]) == {80}  # all of the training images, and the loop went on
    assert not asked.duplicated(["method", "id"]).any()


def test_one_label_or_one_class_at_a_client_is_enough(tmp_path):
    study = prepared(first=1, budget=1, methods=("ksas", "logo", "qbc", "badge.local", "jeffreys"))
    table, _ = loop(tmp_path, study)
    assert table["accuracy"].notna().any()


def test_parts_of_a_client_in_the_place_of_counts():
    study = prepared(first_part=0.1, budget_part=0.05, partition="dirichlet", alpha=1.0)
    oracle = alfl.Oracle(study.train.labels)
    for count, first, later in ((20, 2, 1), (21, 3, 2), (1, 1, 1)):
        pool = alfl.Pool("x", study.train.images, oracle, range(count))
        assert alfl.to_ask(study.config, pool, 0) == first and alfl.to_ask(study.config, pool, 1) == later


def test_a_saved_partition_is_dealt_again_on_every_seed(tmp_path):
    study = prepared()
    path = alfl.save_partition(study, 3, tmp_path / "mine.json")
    again = prepared(partition=str(path), clients=2)
    assert again.config.clients == 4
    _, wanted, names = alfl.share_out(study.config, study.train, 3)
    for seed in (0, 3):
        _, parts, same = alfl.share_out(again.config, again.train, seed)
        assert same == names and all(np.array_equal(a, b) for a, b in zip(parts, wanted, strict=True))
    assert partition.load(path, study.train.images.ids)[1] == names


def test_what_is_not_for_classifiers_or_not_for_detectors_is_said():
    for changes, words in (
        ({"methods": ("sum",)}, "not for classifiers"),
        ({"methods": ("chain+entropy",)}, "one scheme"),
        (
            {"classifier": "", "reset_each_cycle": False, "dataset": "digits", "methods": ("sum",)},
            "balanced and compensation are for classifiers",
        ),
        ({"optimizer": "adamw"}, "plain SGD"),
    ):
        with pytest.raises(ValueError, match=words):
            study = prepared(**changes)
            loop(None, study)
    with pytest.raises(ValueError, match="not for detectors"):
        alfl.prepare(papers.load("11_fedavg", "smoke", methods=("ksas",)), device="cpu")
    with pytest.raises(ValueError, match="global model"):
        alfl.prepare(papers.load("11_fedavg", "smoke", methods=("local-first+ksas_avg",)), device="cpu")


def test_sequential_clients_give_the_same_run_but_for_rounding(tmp_path):
    stacked, _ = loop(tmp_path / "a", prepared(methods=("random",)))
    apart, _ = loop(tmp_path / "b", prepared(methods=("random",), stacked=False))
    np.testing.assert_allclose(stacked["loss"].dropna(), apart["loss"].dropna(), rtol=1e-3)


def test_the_labels_of_whole_images_are_billed_as_images():
    study = prepared()
    assert isinstance(study.train.labels, data.Labels) and study.config.query.seconds_per_box == 0
