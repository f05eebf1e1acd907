"""The dual score in the whole loop on a few scenes: whose VAE sees what, one start, broken off and resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch

from fedal_utils import papers, record, training
from fedal_utils.federation import experiment as alfl
from fedal_utils.sampling import dual_score as dual_vae

CYCLES = 3
TINY = dict(
    detector="ssd",
    digit_classes=3,
    scenes=(40, 4),
    initial_model_images=4,
    initial_model_iterations=2,
    clients=2,
    initial_labels=4,
    query_size=3,
    cycles=CYCLES,
    rounds=1,
    iterations=3,
    batch=4,
    score_above=0.02,
    pseudo_above=0.2,
    vae_size=(16, 16),
    latent=8,
    vae_iterations=4,
    vae_batch=4,
    vae_refit=False,
    methods=("vae_d1",),
    seeds=(0,),
    threads=1,
)


def prepared(**changes) -> alfl.Study:
    return alfl.prepare(papers.load("00_start_here", "smoke", **TINY | changes), device="cpu")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A whole run of 'vae_d1' whose VAEs are fine-tuned from cycle to cycle."""
    root, study = tmp_path_factory.mktemp("unbroken"), prepared()
    return root, small_run.loop(root, study)


def other(study, **changes):
    return dataclasses.replace(study, config=study.config.replace(**changes))


def results(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for name in ("rounds", "asked") for p in root.rglob(f"{name}.csv")}


def asked(study, root, **which):
    return record.queries(study.config, "small", root=root, **which)


# ----------------------------------------------------------------------------------------------- broken off and resumed


@pytest.mark.parametrize("commits", [1, 2])
def test_broken_off_after_a_cycle_and_resumed_gives_the_same_bytes(unbroken, tmp_path, commits):
    root, study = unbroken
    expected = results(root)
    assert len(expected) == 2 and set(asked(study, root)["cycle"]) == {0, 1, 2}
    with pytest.raises(small_run.BrokenOff):
        small_run.loop(tmp_path, study, enough=commits)
    assert set(asked(study, tmp_path)["cycle"]) == set(range(commits))
    small_run.loop(tmp_path, prepared())  # all is read and built anew
    assert results(tmp_path) == expected


def test_it_is_the_kept_vae_that_makes_a_resumed_run_the_same(unbroken, tmp_path, monkeypatch):
    root, study = unbroken
    with pytest.raises(small_run.BrokenOff):
        small_run.loop(tmp_path, study, enough=2)
    kept = record.state(study.config, "small", "vae_d1", 0, root=root)["coder"]
    assert set(kept) == {"00", "01"}
    assert any(not torch.equal(kept["00"][name], kept["01"][name]) for name in kept["00"])
    monkeypatch.setattr(alfl, "KEPT", tuple(what for what in alfl.KEPT if what != "coder"))
    small_run.loop(tmp_path, study)  # as if it had been forgotten
    assert results(tmp_path) != results(root)


def test_a_refitted_vae_is_not_kept_and_asks_otherwise(unbroken, tmp_path):
    root, study = unbroken
    fresh = other(study, vae_refit=True)
    small_run.loop(tmp_path, fresh)
    assert record.state(fresh.config, "small", "vae_d1", 0, root=tmp_path)["coder"] == {}
    fine, refitted = asked(study, root), asked(fresh, tmp_path)
    for cycle, same in ((0, True), (1, True), (2, False)):  # in cycle 1 either is trained for the first time
        a, b = (list(t.query(f"cycle == {cycle}")["score"]) for t in (fine, refitted))
        assert (a == b) is same


def test_the_first_labels_are_by_lot_and_the_later_ones_by_both_terms(unbroken, tmp_path):
    root, study = unbroken
    single = other(study, methods=("vae", "d1"))
    small_run.loop(tmp_path, single)
    both, new, useful = asked(study, root), *(asked(single, tmp_path, methods=[name]) for name in ("vae", "d1"))
    assert len(both) == 2 * (4 + 3 + 3) and not both["id"].duplicated().any()
    for rows in (new, useful):
        assert rows.query("cycle == 0")["score"].tolist() == both.query("cycle == 0")["score"].tolist()
        assert set(rows.query("cycle == 1")["score"]).isdisjoint(both.query("cycle == 1")["score"])
    assert both.query("cycle == 0")["score"].between(0, 1).all()
    assert (both.query("cycle > 0").groupby(["cycle", "client"])["score"].max() > 0).all()  # above the average


# ------------------------------------------------------------------------------------------------- whose images it sees


@pytest.fixture
def lessons(monkeypatch):
    """(client, rows) of every training of a VAE from here on."""
    seen, plain = [], training.fit_vae

    def watched(vae, images, rows, rng, *options, **more):
        seen.append((more["who"], sorted(np.asarray(rows).tolist()), len(images)))
        return plain(vae, images, rows, rng, *options, **more)

    monkeypatch.setattr(training, "fit_vae", watched)
    return seen


@pytest.mark.parametrize("on", ["labelled", "all"])
def test_each_client_trains_a_vae_of_its_own_on_its_own_images(unbroken, tmp_path, lessons, on):
    _, study = unbroken
    study = other(study, vae_on=on)
    small_run.loop(tmp_path, study)
    _, parts, names = alfl.share_out(study.config, study.train, 0)
    rows, ids = asked(study, tmp_path), list(study.train.images.ids)
    want = []
    for cycle in range(1, CYCLES):
        for name, part in zip(names, parts, strict=True):
            known = rows[(rows["client"].astype(int) == int(name)) & (rows["cycle"] < cycle)]["id"]
            mine = sorted(ids.index(sample) for sample in known)
            assert set(mine) < set(part.tolist())
            want.append((name, mine if on == "labelled" else sorted(part.tolist()), len(ids)))
    assert lessons == want and not set(want[0][1]) & set(want[1][1])


@pytest.mark.parametrize(("method", "shortlist", "count"), [("d2", 0.0, 0), ("d1", 0.0, 4), ("d2", 2.0, 4)])
def test_a_vae_is_trained_where_it_is_read(unbroken, tmp_path, lessons, method, shortlist, count):
    _, study = unbroken
    small_run.loop(tmp_path, other(study, methods=(method,), shortlist=shortlist))
    assert len(lessons) == count


def test_task_aware_training_is_shown_the_labels_of_its_client_alone(unbroken, tmp_path, monkeypatch):
    _, study = unbroken
    study, seen, plain = other(study, vae_on="all", task_aware=2.0), [], dual_vae.task_term

    def watched(config, model, images, labelled, labels, device):
        seen.append(sorted(labelled.tolist()))
        assert torch.equal(labels.classes, study.train.labels.take(labelled).classes)
        return plain(config, model, images, labelled, labels, device)

    monkeypatch.setattr(dual_vae, "task_term", watched)
    small_run.loop(tmp_path, study)
    rows, ids = asked(study, tmp_path), list(study.train.images.ids)
    want = [
        sorted(ids.index(s) for s in rows[(rows["client"].astype(int) == client) & (rows["cycle"] < cycle)]["id"])
        for cycle in range(1, CYCLES)
        for client in (0, 1)
    ]
    assert seen == want


# ------------------------------------------------------------------------------------------------------- the same start


def first_cycle(study, root):
    """Method -> what it asked in cycle 0, and the weights after it."""
    found = {}
    for run in record.runs(study.config, "small", root=root, plan=alfl.plan, progress=False):
        clients, model = alfl.start(run, study)
        for client in clients:
            alfl.ask(run, study, model, client, 0)
        updates = alfl.train(run, study, model, clients, 0, 0)
        alfl.merge(run, model, clients, updates)
        found[run.method] = (
            [c.pool.asked_rows(0) for c in clients],
            {k: v.clone() for k, v in model.state_dict().items()},
        )
    return found


@pytest.mark.parametrize("released", [False, True])
def test_all_dual_strategies_share_cycle_0_with_random(tmp_path, released):
    methods = ("random", *dual_vae.STRATEGIES)
    study = prepared(methods=methods, diagnostic=True, learned_loss=True, iterations=1, as_released=released)
    found = first_cycle(study, tmp_path)
    assert tuple(found) == methods
    labels, weights = found["random"]
    assert [len(rows) for rows in labels] == [4, 4]
    for name in dual_vae.STRATEGIES:
        assert found[name][0] == labels, name
        assert all(torch.equal(v, weights[k]) for k, v in found[name][1].items()), name


# ---------------------------------------------------------------------------------------------------------- as released


def test_as_released_draws_latents_and_is_reproducible_all_the_same(unbroken, tmp_path, monkeypatch):
    _, study = unbroken
    released, generators, plain = other(study, as_released=True), [], training.vae_losses

    def watched(vae, images, *options, **more):
        generators.append(more["generator"])
        first = plain(vae, images, *options, **more)["reconstruction"]
        second = plain(vae, images, *options, **more)["reconstruction"]
        assert vae.as_released and not torch.equal(first, second)  # drawn, not the mean
        return plain(vae, images, *options, **more)

    small_run.loop(tmp_path / "whole", released)
    with pytest.raises(small_run.BrokenOff):
        small_run.loop(tmp_path / "broken", released, enough=2)
    small_run.loop(tmp_path / "broken", released)
    assert results(tmp_path / "broken") == results(tmp_path / "whole")
    monkeypatch.setattr(training, "vae_losses", watched)
    small_run.loop(tmp_path / "watched", released)
    assert len(generators) == 2 * (CYCLES - 1) and len({id(g) for g in generators}) == len(generators)
    assert all(isinstance(g, torch.Generator) for g in generators)
