"""The loop under every scheme on a handful of scenes: laws, bytes by hand, faults, broken off and resumed."""

import dataclasses
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_run
import tiny_loop
import torch

from fedal_utils import federation, record, sampling, training
from fedal_utils.data import Labels
from fedal_utils.federation import Setup, state_of
from fedal_utils.sampling import PoolObservation

CHAINS = ("chain+sum", "chain-fedavg+sum", "accumulate+sum")
METHODS = ("sum", "local-first+sum", *CHAINS, "centralised", "centralised+sum", "centralised+chain+sum")
STEPS = 2 * 2 * (2 * 2 + 1)  # clients, iterations, cycles x rounds + extra rounds


@pytest.fixture(scope="module")
def setup() -> Setup:
    return small_run.prepared(methods=METHODS)


@pytest.fixture(scope="module")
def unbroken(setup, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unbroken")
    small_run.loop(root, setup)
    return root


def changed(setup: Setup, *methods: str, **changes) -> Setup:
    """The same data under another config."""
    methods = {"methods": methods} if methods else {}
    return dataclasses.replace(setup, config=setup.config.replace(**methods, **changes))


def with_labels(setup: Setup, labels: Labels) -> Setup:
    train = dataclasses.replace(setup.train, labels=labels)
    return dataclasses.replace(setup, train=train)


def results(root: Path, method: str = "*") -> dict[str, bytes]:
    files = (path for name in ("rounds", "queries") for path in root.rglob(f"{method}/seed0/{name}.csv"))
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def resumed(root: Path, setup: Setup, enough: int) -> dict[str, bytes]:
    """The results of a loop that was broken off after so many rounds and started again."""
    with pytest.raises(small_run.BrokenOff):
        small_run.loop(root, setup, enough=enough)
    small_run.loop(root, setup)
    return results(root)


def table(setup: Setup, root: Path, method: str) -> pd.DataFrame:
    return record.table(setup.config, "small", root=root, methods=[method])


def server(setup: Setup, root: Path, method: str) -> pd.DataFrame:
    rows = table(setup, root, method)
    return rows[rows["client"] == "server"].reset_index(drop=True)


def queries(setup: Setup, root: Path, method: str) -> pd.DataFrame:
    return record.queries(setup.config, "small", root=root, methods=[method]).drop(columns="method")


def experiment(setup: Setup, root: Path, method: str = "sum") -> federation.Experiment:
    runs = federation.runs(setup, "small", root=root, methods=[method])
    started = federation.start(next(runs), setup)
    started.kept_open = runs  # a run is closed with its iterator
    return started


def test_every_scheme_takes_the_same_gradient_steps_on_as_many_labels(setup, unbroken):
    for method in METHODS:
        rows = server(setup, unbroken, method)
        assert rows["steps"].sum() == STEPS and rows["images"].iloc[-1] == 2 * setup.config.labels_needed(), method


def test_schemes_of_a_seed_share_partition_initial_labels_and_initial_model(setup, unbroken, tmp_path):
    def first(method):
        rows = queries(setup, unbroken, method)
        return rows[rows["cycle"] == 0][["client", "id"]].values.tolist()

    assert first("sum") == first("local-first+sum") == first("centralised") == first("centralised+sum")
    methods = ("sum", "chain+sum", "centralised")
    models = [experiment(changed(setup, m), tmp_path, m).model.state_dict() for m in methods]
    assert all(torch.equal(models[0][key], model[key]) for model in models for key in models[0])


def test_the_reference_queries_what_its_method_queried_cycle_by_cycle(setup, unbroken):
    for method in ("sum", "chain+sum"):
        one, other = (queries(setup, unbroken, name) for name in (f"centralised+{method}", method))
        pd.testing.assert_frame_equal(one, other)


def test_the_reference_before_its_method_is_a_clear_error(setup, tmp_path):
    with pytest.raises(ValueError, match="gets the labels of method 'sum': run that first"):
        small_run.loop(tmp_path, changed(setup, "centralised+sum"))


def test_clients_in_another_order_change_no_bit(setup, unbroken, tmp_path):
    small_run.loop(tmp_path, changed(setup, "sum", "local-first+sum"), turned=True)
    for method in ("sum", "local-first+sum"):
        key = ["cycle", "round", "client"]
        one, other = (table(setup, root, method).sort_values(key, ignore_index=True) for root in (unbroken, tmp_path))
        pd.testing.assert_frame_equal(one, other)


def test_one_client_is_one_node(setup, tmp_path):
    one = changed(setup, "sum", "centralised+sum", "local-first+sum", clients=1, round_lr_decay=1.0)
    small_run.loop(tmp_path, one)
    ap = {m: server(one, tmp_path, m)[["cycle", "round", "images", "boxes", "steps"]] for m in one.config.methods}
    pd.testing.assert_frame_equal(ap["sum"], ap["centralised+sum"])
    rows = server(one, tmp_path, "sum")
    assert (rows["bytes_up"] == 0).all() and (rows["bytes_down"] == 0).all()
    a, b = (server(one, tmp_path, m).drop(columns=["method"]) for m in ("sum", "local-first+sum"))
    pd.testing.assert_frame_equal(a, b)  # alone, averaging one's own model changes nothing


def test_hidden_labels_scrambled_change_no_query_of_any_scheme(setup, unbroken, tmp_path):
    used = set().union(*(queries(setup, unbroken, m)["id"] for m in METHODS))
    server_rows = {row for part in setup.rows(0)[:2] for row in part.tolist()}
    hidden = [i for i, name in enumerate(setup.train.images.ids) if name not in used and i not in server_rows]
    labels = setup.train.labels
    boxes, classes = labels.boxes.clone(), labels.classes.clone()
    boxes[hidden], classes[hidden] = boxes[hidden].flip(0), classes[hidden].flip(0)
    assert not torch.equal(classes, labels.classes)
    other = with_labels(setup, Labels(boxes, classes, labels.ignore, labels.crowd))
    small_run.loop(tmp_path, changed(other, "sum", "local-first+sum", "chain+sum"))
    for method in ("sum", "local-first+sum", "chain+sum"):
        assert results(tmp_path, method) == results(unbroken, method)


def test_costs_add_up(setup, unbroken):
    for method in ("sum", "chain+sum"):
        rows = table(setup, unbroken, method)
        last = rows[rows["client"] != "server"].groupby("client").last()
        end = server(setup, unbroken, method).iloc[-1]
        assert end["images"] == last["images"].sum() and end["boxes"] == last["boxes"].sum()
        assert end["seconds"] == 2.0 * end["images"] + 7.0 * end["boxes"]


def test_held_out_images_are_in_nobodys_pool(setup):
    parts, _ = federation.partition_clients(setup, 0)
    dealt = set(np.concatenate(parts).tolist())
    aside = {row for part in setup.rows(0)[:2] for row in part.tolist()}
    assert not dealt & aside and len(dealt | aside) == len(setup.train)


def test_a_chain_runs_as_a_chain_under_the_one_loop(setup, tmp_path):
    """As an override in a notebook of FedAvg it once ran without ever merging, and was recorded as a chain."""
    seen, running = [], experiment(changed(setup, "chain+sum"), tmp_path, "chain+sum")
    for step in running.advance():
        held = [client.name for client in running.clients if client.local_state]
        seen.append(([c.name for c in step.participants], [c.name for c in step.querying], step.merge_by_class, held))
    assert seen[:3] == [(["00"], ["00"], False, ["00"]), (["01"], ["01"], False, ["00", "01"]), ([], [], True, [])]
    assert [step[0] for step in seen[3:]] == [["00"], ["01"]] * 3 and not any(step[1] for step in seen[3:])


def test_plans_count_visits_by_hand(setup):
    config = setup.config  # 2 cycles x 2 rounds + 1 = 5 rounds; a first pass as long as 2; 3 later passes
    lengths = {method: len(federation.plan(config, method)) for method in METHODS}
    assert lengths["sum"] == lengths["local-first+sum"] == lengths["centralised"] == 5
    assert lengths["chain+sum"] == 2 + 1 + 3 * 2 and lengths["chain-fedavg+sum"] == 2 + 1 + 3
    assert lengths["accumulate+sum"] == 2 + 1 + 6 * 2  # visits half as long, twice as many
    with pytest.raises(ValueError, match="lower first_pass_rounds, or give chain_passes"):
        federation.plan(config.replace(first_pass_rounds=5), "chain+sum")


def test_local_first_merges_for_the_first_time_in_the_last_cycle(setup, unbroken):
    rows = server(setup, unbroken, "local-first+sum")
    assert ((rows["bytes_up"] > 0) == (rows["cycle"] == 1)).all()


def test_after_the_merge_no_backbone_is_sent_but_once_to_each_client(setup, unbroken, tmp_path):
    running = experiment(changed(setup, "chain+sum"), tmp_path, "chain+sum")
    full = len(federation.broadcast(running.model))
    running.model.freeze_backbone()
    head = len(federation.broadcast(running.model))
    rows = table(setup, unbroken, "chain+sum")
    down = rows[rows["client"] == "server"]["bytes_down"].tolist()
    up = rows[rows["client"] == "server"]["bytes_up"].tolist()
    assert down == [full, full, 0, full, full, head, head, head, head]
    assert up == [full, full, 0, 0, 0, 0, 0, 0, head]  # a hop is counted when it arrives; the last hands the result in


def test_metered_bytes_of_fedavg_are_two_messages_a_client_and_round(setup, unbroken, tmp_path):
    full = len(federation.broadcast(experiment(changed(setup, "sum"), tmp_path).model))
    rows = server(setup, unbroken, "sum")
    assert (rows["bytes_up"] == 2 * full).all() and (rows["bytes_down"] == 2 * full).all()
    assert server(setup, unbroken, "centralised")[["bytes_up", "bytes_down"]].sum().sum() == 0


def test_each_class_votes_for_its_best_model_on_the_held_out_images_7_2(setup, tmp_path, monkeypatch):
    running = experiment(changed(setup, "chain+sum"), tmp_path, "chain+sum")
    state = state_of(running.model)
    for number, client in enumerate(running.clients):
        client.local_state = {key: value + number for key, value in state.items()}
    ap = iter([{"ap50/0": 0.9, "ap50/1": 0.2, "ap50/2": 0.0}, {"ap50/0": 0.5, "ap50/1": 0.6, "ap50/2": 0.0}])
    monkeypatch.setattr("fedal_utils.metrics.evaluate", lambda *_: next(ap))
    running.merge_by_class()
    merged = running.model.state_dict()
    assert all(torch.allclose(merged[key], value + 0.5, atol=1e-5) for key, value in state.items())
    assert not any(client.local_state for client in running.clients)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"methods": ("what",)}, "query strategy 'what' is unknown for detectors"),
        ({"methods": ("ring+sum",)}, "scheme 'ring' is unknown, write one of fedavg, local-first"),
        ({"methods": ("chain+ksas_sum",)}, "compares clients with the global model, which chain has none of"),
        ({"methods": ("d0",)}, "set diagnostic=True"),
        ({"methods": ("d4",)}, "set image_loss_head=True"),
        ({"methods": ("vae",), "detector": "faster_rcnn"}, "set detector='ssd'"),
        ({"methods": ("model_outlier",), "held_out_images": 0}, "set held_out_images to 1 or more"),
        ({"methods": ("vae",), "classifier": "resnet8", "dataset": "digit-images"}, "'vae' is unknown for classifiers"),
        ({"methods": ("logo",), "classifier": "linear", "dataset": "digit-images", "clients": 1}, "labels anyway"),
        ({"methods": ("cluster.local_only",)}, "a model of one client's labels"),
        ({"distillation_weight": 1.0}, "distillation_weight are for classifiers"),
        ({"methods": ("chain+entropy",), "classifier": "resnet8", "dataset": "digit-images"}, "run under fedavg"),
        ({"methods": ("margin",), "classifier": "linear", "dataset": "digit-images"}, "set clients=1"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_its_reason(changes, text, setup):
    with pytest.raises(ValueError, match=text):
        federation.setup.check(setup.config.replace(**changes))


def test_too_few_images_are_said_before_anything_is_trained(setup):
    with pytest.raises(ValueError, match="2 clients cannot share 0 images"):
        federation.partition_clients(changed(setup, initial_model_images=60), 0)
    with pytest.raises(ValueError, match=r"client 00 holds \d+ images, but .* need 42"):
        federation.partition_clients(changed(setup, query_size=40), 0)


def test_a_data_set_without_labels_cannot_be_trained_on(setup, tmp_path):
    with pytest.raises(ValueError, match="nobody can annotate it"):
        experiment(dataclasses.replace(setup, train=dataclasses.replace(setup.train, labels=None)), tmp_path)
    first = federation.first_queries(setup)
    assert list(first["client"]) == ["00", "00", "01", "01"] and first["id"].is_unique  # what is held out has labels


def poisoned(setup: Setup, rows) -> Setup:
    """One box of each of these training images is not a number: whoever trains on one diverges."""
    boxes = setup.train.labels.boxes.clone()
    boxes[torch.as_tensor(rows), 0] = float("nan")
    return with_labels(setup, dataclasses.replace(setup.train.labels, boxes=boxes))


@pytest.mark.parametrize("method", ["sum", "chain+sum"])
def test_a_client_that_diverges_is_left_out_or_stops_the_run_by_name(method, setup, tmp_path):
    parts, _ = federation.partition_clients(setup, 0)
    broken = poisoned(changed(setup, method), parts[1])
    with pytest.raises(training.TrainingDiverged, match="client 01: .*on_failure='skip' goes on without it"):
        small_run.loop(tmp_path / "stop", broken)
    skipping = changed(broken, on_failure="skip")
    small_run.loop(tmp_path / "skip", skipping)
    rows = table(skipping, tmp_path / "skip", method)
    assert set(rows.loc[rows["client"] == "01", "status"]) == {"diverged"}
    assert set(rows.loc[rows["client"] == "00", "status"].fillna("")) == {""}


def test_lost_updates_leave_the_model_as_it_was_or_stop_the_run_by_name(setup, tmp_path):
    with pytest.raises(federation.ClientLost, match="client 00: its update did not arrive in cycle 0, round 0"):
        small_run.loop(tmp_path / "stop", changed(setup, "sum", dropout_rate=1.0))
    lost = changed(setup, "sum", dropout_rate=1.0, on_failure="skip")
    small_run.loop(tmp_path / "skip", lost)
    rows = server(lost, tmp_path / "skip", "sum")
    assert rows["steps"].sum() == 0 and rows["ap50"].dropna().nunique() == 1


@pytest.mark.parametrize("method", ["sum", "local-first+sum", "chain+sum", "accumulate+sum", "centralised"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_broken_off_and_resumed_gives_the_same_bytes(method, rounds, setup, unbroken, tmp_path):
    assert resumed(tmp_path, changed(setup, method), rounds) == results(unbroken, method)


@pytest.mark.parametrize("policy", ["client", "travels"])
def test_kept_and_sent_optimizer_states_survive_being_broken_off(policy, setup, tmp_path):
    one = changed(setup, "sum", optimizer_state=policy)
    small_run.loop(tmp_path / "whole", one)
    assert resumed(tmp_path / "broken", one, 2) == results(tmp_path / "whole")
    reset = changed(setup, "sum")
    small_run.loop(tmp_path / "reset", reset)
    assert set(results(tmp_path / "reset").values()) != set(results(tmp_path / "whole").values())
    rows = server(one, tmp_path / "whole", "sum")["bytes_up"]
    assert (rows.iloc[0] > server(reset, tmp_path / "reset", "sum")["bytes_up"].iloc[0]) == (policy == "travels")


def test_killed_at_many_instants_then_resumed_gives_the_same_bytes(tmp_path):
    whole = small_run.loop(tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    for instant in (7, 23, 37):  # before a rename, after one, before one
        child = context.Process(target=tiny_loop.killed_at, args=(tmp_path / "killed", instant, small_run.loop))
        child.start()
        child.join()
        assert child.exitcode == -9
    small_run.loop(tmp_path / "killed", whole)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_reset_each_cycle_begins_again_from_the_initial_model(setup, tmp_path):
    running = experiment(changed(setup, "sum", reset_each_cycle=True), tmp_path)
    start = {key: value.clone() for key, value in running.model.state_dict().items()}
    for step in running.steps():
        for client in step.querying:
            running.query(step, client)
        updates = running.train(step)  # the second cycle's first round has put the model back before it trains
        same = all(torch.equal(running.model.state_dict()[key], value) for key, value in start.items())
        assert same == (step.round == 0)
        running.aggregate(step, updates)
        running.log(step, updates)


def test_pool_subset_limits_what_is_scored_and_stays_the_same(setup, tmp_path, monkeypatch):
    running, seen = experiment(changed(setup, "sum", pool_subset_size=5), tmp_path), []

    def noting(config, scene, pool, positions, *models):
        seen.append(positions.tolist())
        return PoolObservation(config, scene, pool, positions, *models)

    monkeypatch.setattr("fedal_utils.federation.query.PoolObservation", noting)
    step = dataclasses.replace(next(running.steps()), cycle=1)
    picked = [federation.select(running, step, running.clients[0])[0].tolist() for _ in range(2)]
    assert picked[0] == picked[1] and len(seen[0]) == 5 and seen[0] == seen[1] and set(picked[0]) < set(seen[0])


CLASSES = dict(
    **dict(dataset="digit-images", image_size=(16, 16), limit=(160, 60), classifier="resnet8", clients=3),
    **dict(partition="dirichlet-equal", dirichlet_alpha=0.3, initial_model_images=0, held_out_images=0, flip=0.0),
    **dict(initial_labels=4, query_size=3, cycles=3, rounds=2, extra_rounds=0, iterations=2, optimizer="sgd", lr=0.05),
    **dict(momentum=0.9, clip=0.0, balanced_softmax=True, distillation_weight=1.0, reset_each_cycle=True),
    **dict(optimizer_state="client", client_fraction=0.7, local_only_epochs=2, round_lr_decay=1.0, batch=8),
)


def test_every_strategy_of_classifiers_goes_through_the_loop_and_starts_alike(tmp_path):
    whole = (name for name, one in sampling.registered("images").items() if "activations" not in one.needs)
    methods = (*(name for name in whole if not name.startswith("mix")), "entropy.local", "entropy.local_only")
    setup = small_run.prepared(**CLASSES, methods=methods)
    small_run.loop(tmp_path, setup)
    first = [server(setup, tmp_path, method)["accuracy"].dropna().iloc[0] for method in methods]
    assert len(set(first)) == 1
    ids = {method: tuple(queries(setup, tmp_path, method)["id"]) for method in methods}
    assert len(set(ids.values())) > len(methods) // 2 and all(len(one) == 3 * 10 for one in ids.values())


def test_classifiers_broken_off_and_resumed(tmp_path):
    setup = small_run.prepared(**CLASSES, methods=("ksas",))
    small_run.loop(tmp_path / "whole", setup)
    assert resumed(tmp_path / "broken", setup, 3) == results(tmp_path / "whole")


def test_a_linear_classifier_of_frozen_features_runs_in_the_same_loop(tmp_path):
    setup = small_run.prepared(
        **dict(dataset="digit-images", image_size=(16, 16), limit=(150, 80), classifier="linear", clients=1),
        **dict(feature_side=32, initial_model_images=0, held_out_images=0, initial_labels=20, query_size=10, cycles=3),
        **dict(rounds=1, extra_rounds=0, methods=("random", "margin", "mix", "model_outlier", "cluster")),
    )
    small_run.loop(tmp_path, setup)
    for method in setup.config.methods:
        rows = server(setup, tmp_path, method)
        assert rows["images"].tolist() == [20, 30, 40] and rows["accuracy"].iloc[-1] > 0.4


def test_the_dual_score_trains_a_vae_of_each_client_and_resumes(tmp_path, monkeypatch):
    setup = small_run.prepared(methods=("vae_d1",), vae_size=(16, 16), latent=4, vae_iterations=3, vae_refit=False)
    fitted, original = [], training.fit_vae
    monkeypatch.setattr(
        training, "fit_vae", lambda vae, *rest, **how: fitted.append(how["client"]) or original(vae, *rest, **how)
    )
    small_run.loop(tmp_path / "whole", setup)
    assert fitted == ["00", "01"]  # in cycle 1; the initial labels are random
    assert resumed(tmp_path / "broken", setup, 3) == results(tmp_path / "whole")
    scores = queries(setup, tmp_path / "whole", "vae_d1")
    assert math.isfinite(scores.loc[scores["cycle"] == 1, "score"].abs().sum())
