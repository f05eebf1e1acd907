"""The whole loop on a handful of scenes: one door to labels, paired starts, broken off and resumed, bad input."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import miniatures
import numpy as np
import pandas as pd
import pytest
import small_run
import torch

from fedal_utils import alfl, config, data, federation, notebooks, record, seeding, training
from fedal_utils.data import Dataset, Labels

HERE = Path(__file__).resolve().parent


def results(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for name in ("rounds", "asked") for p in root.rglob(f"{name}.csv")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, alfl.Study]:
    root = tmp_path_factory.mktemp("unbroken")
    return root, small_run.loop(root)


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HERE.parent, HERE))))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.Process(target=math.sqrt, args=(2,)).start()
    return context


def test_killed_at_many_instants_then_resumed_gives_the_same_bytes(unbroken, tmp_path, server):
    root, study = unbroken
    expected = results(root)
    assert len(expected) == 4
    for writes in (2, 5, 8, 11, 15, 18, 24, 31):  # in either run, before and after a write
        place = tmp_path / str(writes)
        doomed = server.Process(target=small_run.killed_at, args=(place, writes))
        doomed.start()
        doomed.join()
        assert doomed.exitcode == -signal.SIGKILL
        small_run.loop(place, study)
        assert results(place) == expected, f"killed at write {writes}"


def test_clients_in_another_order_change_no_bit(unbroken, tmp_path):
    root, study = unbroken
    small_run.loop(tmp_path, study, order=-1)
    mine, theirs = (record.table(study.config, "small", root=place) for place in (tmp_path, root))
    server = [t[t["client"] == "server"].reset_index(drop=True) for t in (mine, theirs)]
    pd.testing.assert_frame_equal(server[0].drop(columns="loss"), server[1].drop(columns="loss"), check_exact=True)


def test_hidden_labels_scrambled_change_no_selection(unbroken, tmp_path):
    """Only labels that nobody has paid for are scrambled: what was trained on stays, and so must every question."""
    root, study = unbroken
    paid = set(record.asked(study.config, "small", root=root)["id"])
    first, _, _ = alfl.share_out(study.config, study.train, 0)
    paid |= {study.train.images.ids[row] for row in first}
    hidden = np.array([row for row, sample in enumerate(study.train.images.ids) if sample not in paid])
    assert len(hidden) > 20
    labels = study.train.labels
    order = torch.arange(len(labels))
    order[hidden] = torch.as_tensor(np.roll(hidden, 7))
    scrambled = Labels(*(getattr(labels, f.name)[order] for f in dataclasses.fields(labels)))
    assert not torch.equal(scrambled.classes, labels.classes)
    other = dataclasses.replace(study, train=dataclasses.replace(study.train, labels=scrambled))
    small_run.loop(tmp_path, other)
    assert {k: v for k, v in results(tmp_path).items() if "asked" in k} == {
        k: v for k, v in results(root).items() if "asked" in k
    }


def test_all_methods_start_from_the_same_and_the_reference_gets_the_labels_of_random(tmp_path, unbroken):
    _, study = unbroken
    study = dataclasses.replace(study, config=study.config.replace(methods=("random", "max", "centralised")))
    small_run.loop(tmp_path, study)
    asked = record.asked(study.config, "small", root=tmp_path)
    by = {m: part.drop(columns="method").reset_index(drop=True) for m, part in asked.groupby("method")}
    pd.testing.assert_frame_equal(by["random"], by["centralised"])
    for other in ("max", "centralised"):
        assert set(by["random"].query("cycle == 0")["id"]) == set(by[other].query("cycle == 0")["id"])
    assert set(by["random"]["id"]) != set(by["max"]["id"])
    table = record.table(study.config, "small", root=tmp_path)
    ends = table[table["client"] == "server"]
    first = ends.query("cycle == 0 and method in ['random', 'max']").drop(columns="method")
    assert first.groupby("round")["ap50"].nunique().max() <= 1 and first.groupby("round")["loss"].nunique().max() == 1
    steps = ends.groupby("method")["steps"].sum()
    assert steps["random"] == steps["centralised"] == 2 * 2 * 2 * 2  # cycles, rounds, clients, iterations
    reference = ends[ends["method"] == "centralised"]
    assert (reference[["bytes_up", "bytes_down"]] == 0).all().all()


def test_the_bill_adds_up(unbroken):
    root, study = unbroken
    table = record.table(study.config, "small", root=root, methods=["sum"])
    asked = record.asked(study.config, "small", root=root, methods=["sum"])
    assert not asked["id"].duplicated().any(), "nobody is asked twice"
    ids = list(study.train.images.ids)
    boxes = (study.train.labels.classes > 0).sum(1)
    for cycle in (0, 1):
        bought = asked[asked["cycle"] <= cycle]
        assert len(bought) == 2 * (3 + 2 * cycle)
        count = int(sum(boxes[ids.index(sample)] for sample in bought["id"]))
        row = table.query(f"client == 'server' and cycle == {cycle} and round == 1").iloc[0]
        assert (row["images"], row["boxes"]) == (len(bought), count)
        assert row["seconds"] == pytest.approx(2.0 * len(bought) + 7.0 * count)
        each = table.query(f"client != 'server' and cycle == {cycle} and round == 1")
        assert each["images"].sum() == len(bought) and each["boxes"].sum() == count
        assert row["bytes_up"] == each["bytes_up"].sum() and row["bytes_down"] == each["bytes_down"].sum()


def test_one_client_is_centralised_on_its_data(tmp_path):
    """Federated rounds of one client equal plain calls of `fit` on the same labels, bit for bit."""
    study = alfl.prepare(small_run.settings(clients=1, methods=("random",)), device="cpu")
    small_run.loop(tmp_path, study)
    federated = record.state(study.config, "small", "random", 0, root=tmp_path)["model"]
    asked = record.asked(study.config, "small", root=tmp_path)
    shared = next(tmp_path.rglob("starting-point-seed0.pt"))
    assert shared.exists()
    model = alfl.new_detector(study.config, 10, seeding.torch_rng_for(0, "weights"))
    begun = alfl.beginning(study.config)
    start = record.shared(begun, "shared", 0, "starting-point", lambda: pytest.fail("made twice"), root=tmp_path)
    model.load_state_dict(start, strict=False)
    ids = list(study.train.images.ids)
    for cycle in range(2):
        rows = sorted(ids.index(sample) for sample in asked[asked["cycle"] <= cycle]["id"])
        for round in range(2):
            rng = seeding.torch_rng_for(0, "train", "00", cycle, round)
            images, labels = study.train.images.take(rows), study.train.labels.take(rows)
            list(training.fit(model, images, labels, study.config, rng, iterations=study.config.iterations))
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, federated[key]), key


def test_a_client_whose_loss_is_not_finite_stops_the_run_and_damages_nothing(tmp_path):
    study = alfl.prepare(small_run.settings(methods=("random",)), device="cpu")
    small_run.loop(tmp_path / "whole", study)
    asked = record.asked(study.config, "small", root=tmp_path / "whole")
    late = asked.query("cycle == 1").iloc[0]
    row = study.train.images.ids.index(late["id"])
    boxes = study.train.labels.boxes.clone()
    boxes[row, 0] = float("nan")
    broken = dataclasses.replace(
        study, train=dataclasses.replace(study.train, labels=dataclasses.replace(study.train.labels, boxes=boxes))
    )
    # batch 50 from 5 labelled images: the poisoned one is met in the first step
    broken = dataclasses.replace(broken, config=study.config.replace(batch=50))
    with pytest.raises(training.TrainingDiverged, match=f"client {late['client']}: loss is nan"):
        small_run.loop(tmp_path / "broken", broken)
    rounds = record.table(broken.config, "small", root=tmp_path / "broken")
    assert rounds["cycle"].max() == 0 and rounds["round"].max() == 1, "the first cycle is there, whole"
    mended = dataclasses.replace(broken, train=study.train)
    small_run.loop(tmp_path / "broken", mended)  # goes on from there
    assert record.table(broken.config, "small", root=tmp_path / "broken")["cycle"].max() == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"clients": 51}, "51 clients cannot share 50 images"),
        ({"budget": 40}, r"client 00 holds 25 images, but first=3 and 1 cycles of budget=40 ask for 43"),
        ({"start_images": 60}, "60 training images, and start_images=60 with merge_images=0 leaves none"),
        ({"start_images": 30, "merge_images": 30}, "start_images=30 with merge_images=30 leaves none"),
        ({"partition": "natural"}, "natural partition needs a group"),
        ({"partition": "by lot"}, "partition must be"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(changes, text, tmp_path, unbroken):
    _, study = unbroken
    study = dataclasses.replace(study, config=study.config.replace(**changes))
    with pytest.raises(ValueError, match=text):
        small_run.loop(tmp_path, study)
    assert not list(tmp_path.rglob("rounds.csv"))


def test_rule_never_asks_for_no_image_without_detections(tmp_path, unbroken):
    """An untrained detector sees nothing above 0.999: nobody is asked in cycle 1, and the run goes on."""
    _, study = unbroken
    strict = study.config.replace(empty="never", score_above=0.999, methods=("sum",))
    small_run.loop(tmp_path, dataclasses.replace(study, config=strict))
    asked = record.asked(strict, "small", root=tmp_path)
    assert set(asked["cycle"]) == {0} and len(asked) == 6


def test_towns_as_clients_dirichlet_and_missing_classes(tmp_path, unbroken):
    _, study = unbroken
    towns = tuple("north" if row % 3 else "south" for row in range(len(study.train)))
    images = dataclasses.replace(study.train.images, groups=towns)
    named = dataclasses.replace(study, train=dataclasses.replace(study.train, images=images))
    _, parts, names = alfl.share_out(study.config.replace(partition="natural"), named.train, 0)
    assert names == ["north", "south"] and len(parts[0]) > len(parts[1])
    assert all(towns[row] == name for part, name in zip(parts, names, strict=True) for row in part)
    _, parts, _ = alfl.share_out(study.config.replace(partition="dirichlet", alpha=0.5), study.train, 0)
    assert sum(map(len, parts)) == 50 and min(map(len, parts)) >= 5
    _, parts, _ = alfl.share_out(study.config.replace(partition="missing", missing=((0,), (9,))), study.train, 0)
    held = [set(study.train.labels.classes[part].flatten().tolist()) for part in parts]
    assert 1 not in held[0] and 10 not in held[1]


# --- a folder of the user's own ---------------------------------------------------------------------------------------


def test_fitted_shrinks_until_any_folder_suffices():
    for images in (*range(2, 60), 250, 1000):
        small = config.fitted(config.load("11_fedavg", "quick", "somewhere/else"), images)
        held = (images - small.start_images) // small.clients
        assert 2 <= small.cycles and small.labels_needed() <= held
        assert alfl.later_passes(small, "chain") >= 1
    roomy = config.load("11_fedavg", "quick", "somewhere/else")
    assert config.fitted(roomy, 1000) == roomy
    with pytest.raises(ValueError, match="got 1 images"):
        config.fitted(roomy, 1)


@pytest.fixture
def checkout(tmp_path, monkeypatch, root) -> Path:
    """A place to run notebook 11 in, with results of its own."""
    home = tmp_path / "checkout"
    (home / "notebooks").mkdir(parents=True)
    shutil.copy(root / "notebooks" / "11_fedavg.ipynb", home / "notebooks")
    shutil.copytree(root / "results" / "paper", home / "results" / "paper")
    (home / "pyproject.toml").touch()
    monkeypatch.delenv("FEDAL_HOME", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize("layout", ["voc", "coco", "folder"])
def test_three_images_of_ones_own_go_through_notebook_11(layout, checkout, tmp_path):
    """One parameter: data. Labelled folders are trained on; one without labels gets its first list to label."""
    own = getattr(miniatures, layout)(tmp_path / "own")
    own = own if own is not None and own.is_dir() else tmp_path / "own"
    done = notebooks.run("11_fedavg", "smoke", data=str(own), seeds=[0])
    assert done.output.exists()
    published = {p.name for p in (checkout / "results" / "tables").glob("*.csv")}
    if layout == "folder":
        assert published == {"11_fedavg-own-to-label.csv"}
        questions = pd.read_csv(checkout / "results" / "tables" / "11_fedavg-own-to-label.csv")
        assert len(questions) >= 1
    else:
        assert published == {"11_fedavg-own-smoke.csv", "11_fedavg-own-smoke-optimiser.csv"}
        assert (checkout / "results" / "figures" / "11_fedavg-own-smoke.png").stat().st_size > 10_000


def test_a_data_set_without_labels_cannot_be_trained_on(unbroken, tmp_path):
    _, study = unbroken
    bare = Dataset(study.train.name, study.train.images, None, ())
    with pytest.raises(ValueError, match="has no labels"):
        small_run.loop(tmp_path, dataclasses.replace(study, train=bare))
    questions = alfl.first_questions(dataclasses.replace(study, train=bare))
    assert list(questions.columns) == ["client", "id"] and len(questions) == 10 + 2 * 3
    assert not questions["id"].duplicated().any()


def test_central_and_federated_messages(unbroken):
    _, study = unbroken
    model = alfl.new_detector(study.config, 10, seeding.torch_rng_for(0, "weights"))
    payload = federation.pack(federation.state_of(model, federation.sent_keys(model)))
    floats = sum(v.numel() for v in model.state_dict().values() if v.is_floating_point())
    assert 4 * floats <= len(payload) <= 4 * floats * 1.05
    assert data.NAMES[0] == "digits"


def test_local_batch_norm_judges_the_mean_of_the_clients_models(tmp_path):
    study = alfl.prepare(small_run.settings(norm="batch", batch_norm="local", methods=("random",)), device="cpu")
    small_run.loop(tmp_path, study)
    state = record.state(study.config, "small", "random", 0, root=tmp_path)
    assert set(state["home"]) == {"00", "01"}
    own = []
    for name in ("00", "01"):
        model = alfl.new_detector(study.config, 10, seeding.torch_rng_for(0, "weights"))
        model.load_state_dict(state["model"], strict=False)
        model.load_state_dict(state["home"][name], strict=False)
        own.append(alfl.judge(study, model)["ap_voc11"])
    table = record.table(study.config, "small", root=tmp_path)
    assert table[table["client"] == "server"]["ap_voc11"].iloc[-1] == pytest.approx(np.mean(own), abs=1e-12)


def test_a_single_node_rounds_nothing_for_the_wire(tmp_path, unbroken):
    _, study = unbroken
    small_run.loop(tmp_path, dataclasses.replace(study, config=study.config.replace(wire="fp16")))
    half = record.table(study.config.replace(wire="fp16"), "small", root=tmp_path, methods=["centralised"])
    full = record.table(study.config, "small", root=unbroken[0], methods=["centralised"])
    pd.testing.assert_frame_equal(half, full, check_exact=True)
