"""The whole loop on a handful of scenes: one door to labels, paired starts, broken off and resumed, bad input."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import miniatures
import numpy as np
import pandas as pd
import pytest
import small_run
import torch

from fedal_utils import data, notebooks, papers, record, seeding, training
from fedal_utils.data import VIEWS, Dataset, Labels, Viewed
from fedal_utils.data.boxes import Detections, flip_boxes
from fedal_utils.federation import aggregate as federation
from fedal_utils.federation import experiment as alfl
from fedal_utils.federation import own_data
from fedal_utils.sampling import huale
from fedal_utils.sampling import strategies as sampling
from fedal_utils.sampling.pool import Oracle, Pool

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
    paid = set(record.queries(study.config, "small", root=root)["id"])
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
    asked = record.queries(study.config, "small", root=tmp_path)
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
    asked = record.queries(study.config, "small", root=root, methods=["sum"])
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
    asked = record.queries(study.config, "small", root=tmp_path)
    shared = next(tmp_path.rglob("starting-point-seed0.pt"))
    assert shared.exists()
    model = alfl.build(study.config, 10, seeding.torch_rng_for(0, "weights"))
    begun = alfl.beginning(study.config)
    start = record.shared(begun, "shared", 0, "starting-point", lambda: pytest.fail("made twice"), root=tmp_path)
    model.load_state_dict(start, strict=False)
    ids = list(study.train.images.ids)
    for cycle in range(2):
        rows = sorted(ids.index(sample) for sample in asked[asked["cycle"] <= cycle]["id"])
        for round in range(2):
            rng = seeding.torch_rng_for(0, "train", "00", cycle, round)
            images, labels = study.train.images.take(rows), study.train.labels.take(rows)
            list(
                training.fit(
                    model,
                    images,
                    labels,
                    study.config,
                    training.LocalTask(rng, iterations=study.config.federation.iterations),
                )
            )
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, federated[key]), key


def test_a_client_whose_loss_is_not_finite_stops_the_run_and_damages_nothing(tmp_path):
    study = alfl.prepare(small_run.settings(methods=("random",)), device="cpu")
    small_run.loop(tmp_path / "whole", study)
    asked = record.queries(study.config, "small", root=tmp_path / "whole")
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


# KSAS on boxes needs a second model, an outlier among boxes needs images that are held out.
LOOKS_ALONE = tuple(
    name for name in (*sampling.BOX_STRATEGIES, *huale.STRATEGIES) if name not in ("model_outlier", "mix")
)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"clients": 51}, "51 clients cannot share 50 images"),
        ({"query_size": 40}, r"client 00 holds 25 images, but first=3 and 1 cycles of budget=40 ask for 43"),
        ({"initial_model_images": 60}, "60 training images, and start_images=60 with merge_images=0 leaves none"),
        ({"initial_model_images": 30, "held_out_images": 30}, "start_images=30 with merge_images=30 leaves none"),
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
    strict = study.config.replace(no_detection_rule="never", score_above=0.999, methods=("sum",))
    small_run.loop(tmp_path, dataclasses.replace(study, config=strict))
    asked = record.queries(strict, "small", root=tmp_path)
    assert set(asked["cycle"]) == {0} and len(asked) == 6


def test_towns_as_clients_dirichlet_and_missing_classes(tmp_path, unbroken):
    _, study = unbroken
    towns = tuple("north" if row % 3 else "south" for row in range(len(study.train)))
    images = dataclasses.replace(study.train.images, groups=towns)
    named = dataclasses.replace(study, train=dataclasses.replace(study.train, images=images))
    _, parts, names = alfl.share_out(study.config.replace(partition="natural"), named.train, 0)
    assert names == ["north", "south"] and len(parts[0]) > len(parts[1])
    assert all(towns[row] == name for part, name in zip(parts, names, strict=True) for row in part)
    _, parts, _ = alfl.share_out(study.config.replace(partition="dirichlet", dirichlet_alpha=0.5), study.train, 0)
    assert sum(map(len, parts)) == 50 and min(map(len, parts)) >= 5
    _, parts, _ = alfl.share_out(
        study.config.replace(partition="missing", missing_classes=((0,), (9,))), study.train, 0
    )
    held = [set(study.train.labels.classes[part].flatten().tolist()) for part in parts]
    assert 1 not in held[0] and 10 not in held[1]


# --- a folder of the user's own ---------------------------------------------------------------------------------------


def test_fitted_shrinks_until_any_folder_suffices():
    for images in (*range(2, 60), 250, 1000):
        small = own_data.fitted(papers.load("11_fedavg", "quick", "somewhere/else"), images)
        held = (images - small.start_images) // small.clients
        assert 2 <= small.cycles and small.labels_needed() <= held
        assert alfl.later_passes(small, "chain") >= 1
    roomy = papers.load("11_fedavg", "quick", "somewhere/else")
    assert own_data.fitted(roomy, 1000) == roomy
    with pytest.raises(ValueError, match="got 1 images"):
        own_data.fitted(roomy, 1)


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
    short = {"initial_model_iterations": 4, "iterations": 2, "rounds": 1}
    done = notebooks.run("11_fedavg", "smoke", data=str(own), seeds=[0], overrides=short)
    assert done.output.exists()
    published = {p.name for p in (checkout / "results" / "tables").glob("*.csv")}
    if layout == "folder":
        assert published == {"11_fedavg-own-to-label.csv"}
        questions = pd.read_csv(checkout / "results" / "tables" / "11_fedavg-own-to-label.csv")
        assert len(questions) >= 1
    else:
        plain = {re.sub(r"-[0-9a-f]{8}", "", name) for name in published}  # the digest tells of the shorter training
        assert plain == {f"11_fedavg-own-smoke{part}.csv" for part in ("", "-optimiser", "-ksas")}
        figures = sorted((checkout / "results" / "figures").glob("11_fedavg-own-smoke-*.png"))
        assert len(figures) == 3 and all(figure.stat().st_size > 10_000 for figure in figures)


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
    model = alfl.build(study.config, 10, seeding.torch_rng_for(0, "weights"))
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
        model = alfl.build(study.config, 10, seeding.torch_rng_for(0, "weights"))
        model.load_state_dict(state["model"], strict=False)
        model.load_state_dict(state["home"][name], strict=False)
        own.append(alfl.judge(study, model)["ap_voc11"])
    table = record.table(study.config, "small", root=tmp_path)
    assert table[table["client"] == "server"]["ap_voc11"].iloc[-1] == pytest.approx(np.mean(own), abs=1e-12)


def test_a_single_node_rounds_nothing_for_the_wire(tmp_path, unbroken):
    _, study = unbroken
    small_run.loop(tmp_path, dataclasses.replace(study, config=study.config.replace(message_dtype="fp16")))
    half = record.table(study.config.replace(message_dtype="fp16"), "small", root=tmp_path, methods=["centralised"])
    full = record.table(study.config, "small", root=unbroken[0], methods=["centralised"])
    pd.testing.assert_frame_equal(half, full, check_exact=True)


# --- strategies: what they may see, and what they choose --------------------------------------------------------------

RCNN = dict(
    backbone="small",
    frozen=False,
    pretrained=False,
    image_size=(64, 64),
    scenes=(24, 4),
    digit_classes=3,
    fpn_channels=16,
    anchor_side=16.0,
    batch=4,
    iterations=2,
    initial_labels=3,
    query_size=2,
    cycles=2,
    warmup=0,
    seeds=(0,),
    methods=("cascade",),
)
SSD = dict(detector="ssd", box_loss_head=False)
YOLO = dict(
    detector="yolo",
    box_loss_head=False,
    depth_multiple=0.1,
    width_multiple=0.125,
    anchor_side=7.0,
    loss_weights=(1.0, 1.0, 20.0),
    box_weight=1.0,
    auxiliary_weight=1.0,
)
LABELLED = [5, 2, 11]


def huale_study(**changes) -> alfl.Study:
    return alfl.prepare(papers.load("20_huale", "smoke", **{**RCNN, **changes}), device="cpu")


@pytest.fixture(scope="module")
def rcnn() -> alfl.Study:
    return huale_study()


@pytest.fixture(scope="module")
def one_class() -> alfl.Study:
    return huale_study(digit_classes=1)


def changed(study: alfl.Study, **changes) -> alfl.Study:
    """The same data under another config."""
    return dataclasses.replace(study, config=study.config.replace(**changes), views={})


def detector(study: alfl.Study, lively: bool = True):
    """Untrained; lively: it sees things everywhere, of all scores; else nothing at all."""
    model = alfl.build(study.config, len(study.class_names), seeding.torch_rng_for(1, "weights")).eval()
    rng = seeding.torch_rng_for(0, "lively")
    with torch.no_grad():
        if study.config.model.detector == "yolo":
            for layer in model.head:
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * 0.8)
                layer.bias.view(3, -1)[:, 4] = 0.0 if lively else -30.0
            return model
        ssd = study.config.model.detector == "ssd"
        heads = model.head.classification_head.module_list if ssd else [model.roi.box_predictor.cls_score]
        for layer in heads:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * (0.3 if ssd else 1.5))
            layer.bias.view(-1, len(study.class_names) + 1)[:, 0] = 0.0 if lively else 90.0
    return model


def pool_of(study: alfl.Study, labels: Labels | None = None) -> Pool:
    """A client with all images in an order of its own; three of them have labels."""
    count = len(study.train)
    pool = Pool("00", study.train.images, Oracle(labels or study.train.labels), np.roll(np.arange(count), 7))
    pool.ask(LABELLED, cycle=0)
    return pool


def chosen(study: alfl.Study, model, pool: Pool, strategy: str, k: int = 4, seed: int = 0) -> list[int]:
    sight = alfl.see(study, model, pool, pool.unlabelled(), strategy)
    rng = seeding.rng_for(seed, "ask")
    return alfl.choose(study.config, strategy, sight, k, rng).positions.tolist()


def filled(sight: sampling.Sight) -> set[str]:
    """Names of the fields that say something."""
    values = {f.name: getattr(sight, f.name) for f in dataclasses.fields(sight) if f.name != "images"}
    return {name for name, value in values.items() if value is not None and not (name == "views" and not value)}


def needs(strategy: str) -> frozenset[str]:
    return (huale if strategy in huale.STRATEGIES else sampling).needs(strategy)


def images_seen(monkeypatch) -> list[tuple[str, str, tuple[str, ...], dict]]:
    """What goes through the detector from here on: (verb, view, ids, options)."""
    seen = []

    def watch(verb: str) -> None:
        plain = getattr(training, verb)

        def watched(model, images, **options):
            view = images.name if isinstance(images, Viewed) else ""
            seen.append((verb, view, tuple(images.ids), options))
            return plain(model, images, **options)

        monkeypatch.setattr(alfl.training, verb, watched)

    watch("predict")
    watch("embed")
    return seen


@pytest.mark.parametrize("strategy", LOOKS_ALONE)
def test_a_strategy_sees_what_it_needs_of_unlabelled_images_and_nothing_else(strategy, rcnn, monkeypatch):
    model, pool = detector(rcnn), pool_of(rcnn)
    asked = images_seen(monkeypatch)
    positions = pool.unlabelled()[[9, 0, 4, 17, 12]]  # in an order of its own
    sight = alfl.see(rcnn, model, pool, positions, strategy)
    assert filled(sight) == needs(strategy) and sight.images == 5
    mine, known = tuple(pool.ids[p] for p in positions), tuple(pool.ids[p] for p in pool.labelled())
    looks = {(verb, view, ids) for verb, view, ids, _ in asked}
    names = {
        "detections": ("predict", "", mine),
        "flipped": ("predict", "flip", mine),
        "crowd": ("predict", "", mine),
        "embedding": ("embed", "", mine),
        "known": ("embed", "", known),
    }
    wanted = {names[need] for need in needs(strategy) & names.keys()}
    wanted |= {("predict", name, mine) for name in VIEWS} if "views" in needs(strategy) else set()
    assert looks == wanted
    above = {"cald": 0.05, "hua": 0.3, "hua_entropy": 0.3}.get(strategy, rcnn.config.score_above)
    assert {options["score_above"] for verb, *_, options in asked if verb == "predict"} <= {above}
    if sight.detections is not None:
        assert len(sight.detections) == 5 and sight.detections.valid.any()
        alone = alfl.look(rcnn.config, model, rcnn.train.images.take([pool.index[positions[3]]]), rcnn.device, above)
        count = int(alone.valid.sum())
        assert torch.allclose(sight.detections.boxes[3, :count], alone.boxes[0], atol=1e-3)
    if sight.embedding is not None:
        every = training.embed(model, rcnn.train.images)
        assert torch.allclose(sight.embedding, every[pool.index[positions]], atol=1e-4)
    if sight.known is not None:
        assert torch.allclose(sight.known, every[pool.index[pool.labelled()]], atol=1e-4)
    if sight.crowd is not None:
        agnostic = rcnn.config.replace(class_agnostic=True)
        after = alfl.look(agnostic, model, rcnn.train.images.take(pool.index[positions]), rcnn.device, above)
        found, valid = sight.crowd, sight.crowd.valid
        assert valid.sum() > after.valid.sum() and "level" in found.extra
        assert torch.equal(found.labels[valid], found.probs[valid][:, 1:].argmax(1) + 1)  # each box once
        assert (sight.crowd.extra["predicted_loss"][sight.crowd.valid] > 0).all()
    none = alfl.see(rcnn, model, pool, positions[:0], strategy)
    assert none.images == 0 and not filled(none)


def test_the_thresholds_of_a_look_are_the_configs_or_those_it_is_given(rcnn, monkeypatch):
    seen = images_seen(monkeypatch)
    images, model = rcnn.train.images.take([0]), detector(rcnn)
    alfl.look(rcnn.config, model, images, rcnn.device)
    alfl.look(rcnn.config, model, images, rcnn.device, 0.4)
    alfl.look(rcnn.config, model, images, rcnn.device, crowd=True)
    first, second, third = ({k: v for k, v in options.items() if k != "device"} for *_, options in seen)
    assert first == {"score_above": 0.3, "nms_iou": 0.5, "class_agnostic": False}
    assert second == {**first, "score_above": 0.4}
    assert third == {**first, "nms_iou": 1.0, "class_agnostic": True, "top": alfl.CROWD, "candidates": alfl.CROWD}


def test_cald_is_told_the_mean_boxes_of_each_class_of_labelled_images_by_hand(rcnn):
    labels = rcnn.train.labels
    ignore = labels.ignore.clone()
    rows = np.roll(np.arange(24), 7)[LABELLED]
    ignore[rows[0], 0] = True
    sight = alfl.see(rcnn, detector(rcnn), pool_of(rcnn, dataclasses.replace(labels, ignore=ignore)), [0], "cald")
    counts = [0, 0, 0]
    for row in rows:
        for number, hidden in zip(labels.classes[row].tolist(), ignore[row].tolist(), strict=True):
            if number and not hidden:
                counts[number - 1] += 1
    assert sight.labelled.tolist() == pytest.approx([count / 3 for count in counts]) and sum(counts) > 2
    fresh = Pool("00", rcnn.train.images, Oracle(labels), range(24))
    assert alfl.see(rcnn, detector(rcnn), fresh, [0], "cald").labelled.tolist() == [0, 0, 0]


def test_flipped_detections_are_in_the_frame_of_the_plain_image_and_so_are_their_sides(rcnn, monkeypatch):
    """A detector that finds the same things in a mirrored image: the strategy must not see a difference."""
    boxes = torch.tensor([[[4.0, 6, 20, 30], [30, 10, 60, 50]], [[1, 2, 3, 4], [0, 0, 0, 0]]])
    sides = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]], [[0.9, 0.8, 0.2, 0.1], [0, 0, 0, 0]]])
    labels, losses = torch.tensor([[2, 1], [3, 0]]), torch.tensor([[1.0, 2], [3, 0]])
    probs = torch.rand(2, 2, 4, generator=seeding.torch_rng_for(0, "p")) * (labels > 0)[..., None]

    def symmetric(model, images, device, **options):
        mirrored = isinstance(images, Viewed) and images.name == "flip"
        where = flip_boxes(boxes, 64) * (labels > 0)[..., None] if mirrored else boxes
        sure = sides[..., [2, 1, 0, 3]] if mirrored else sides
        return Detections(where, probs.amax(-1), labels, probs, {"sides": sure, "level": labels, "loss": losses})

    monkeypatch.setattr(alfl.training, "predict", symmetric)
    sight = alfl.see(rcnn, None, pool_of(rcnn), np.array([0, 1]), "cascade")
    plain, back = sight.detections, sight.flipped
    for name in ("boxes", "scores", "labels", "probs"):
        assert torch.equal(getattr(back, name), getattr(plain, name)), name
    assert back.extra.keys() == plain.extra.keys()
    assert all(torch.equal(back.extra[name], plain.extra[name]) for name in plain.extra)


def test_a_real_detectors_detections_of_a_mirrored_image_are_mirrored_back(rcnn):
    """Of an image that is its own mirror image both looks are the same, so one comes back as the other's mirror."""
    study = changed(rcnn, companion="sides")
    pixels = study.train.images.pixels
    own = dataclasses.replace(study.train.images, pixels=torch.maximum(pixels, pixels.flip(-1)))
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, images=own))
    pool = pool_of(study)
    sight = alfl.see(study, detector(study), pool, pool.unlabelled(), "cascade")
    plain, back, valid = sight.detections, sight.flipped, sight.detections.valid
    assert valid.sum() > 40 and torch.equal(back.labels, plain.labels) and torch.equal(back.scores, plain.scores)
    assert torch.equal(back.boxes[valid], flip_boxes(plain.boxes, 64)[valid]) and not back.boxes[~valid].any()
    assert torch.equal(back.extra["sides"], plain.extra["sides"][..., [2, 1, 0, 3]])
    assert not torch.equal(back.extra["sides"], plain.extra["sides"])


def test_views_of_a_frozen_backbone_are_cached_once_and_are_those_of_the_pixels(monkeypatch):
    pytest.importorskip("timm")
    study = huale_study(backbone="lite0", pretrained=True, frozen=True, scenes=(6, 1), first=2)
    model, pool = detector(study), Pool("00", study.train.images, Oracle(study.train.labels), range(5, -1, -1))
    pool.ask([1, 4], cycle=0)
    positions = pool.unlabelled()
    sights = [alfl.see(study, model, pool, positions, strategy) for strategy in ("cascade", "cald")]
    assert study.views.keys() == {"cutout", "resize", "rotate"}  # flip is there already
    assert len(study.views["rotate"]) == 6
    monkeypatch.setattr(alfl.training, "cache_features", lambda *_, **__: pytest.fail("cached twice"))
    again = alfl.see(study, model, pool, positions[2:], "cald")
    assert torch.equal(again.views["cutout"].found.labels[0, :3], sights[1].views["cutout"].found.labels[2, :3])
    as_pixels = dataclasses.replace(study, train=study.photos[0], views={})
    theirs = [alfl.see(as_pixels, model, pool, positions, strategy) for strategy in ("cascade", "cald")]
    assert not as_pixels.views
    pairs = [(sights[1].views[name].found, theirs[1].views[name].found) for name in VIEWS]
    pairs.append((sights[0].flipped, theirs[0].flipped))
    firsts = []
    for ours, wanted in pairs:  # half precision tells the two apart, but not by much
        firsts.append(wanted.boxes[:, 0])
        assert ours.valid[:, 0].all() and torch.allclose(ours.scores[:, 0], wanted.scores[:, 0], atol=0.1)
        near = (ours.boxes[:, 0] - wanted.boxes[:, 0]).abs().amax(1) < 2
        assert near.float().mean() >= 0.5
    assert not any(torch.allclose(a, b, atol=2) for i, a in enumerate(firsts) for b in firsts[:i])


@pytest.mark.parametrize("strategy", LOOKS_ALONE)
def test_hidden_labels_scrambled_move_no_strategys_choice(strategy, rcnn):
    labels, model = rcnn.train.labels, detector(rcnn)
    pool = pool_of(rcnn)
    hidden = pool.index[pool.unlabelled()]
    order = torch.arange(24)
    order[hidden] = torch.as_tensor(np.roll(hidden, 5))
    other = pool_of(rcnn, Labels(*(getattr(labels, f.name)[order] for f in dataclasses.fields(labels))))
    assert not torch.equal(labels.classes[order], labels.classes)
    picks = chosen(rcnn, model, pool, strategy)
    assert len(set(picks)) == 4 and picks == chosen(rcnn, model, other, strategy)
    if strategy != "random":  # it is the model that decides
        assert picks != chosen(rcnn, model, pool, "random")
    else:
        assert picks != chosen(rcnn, model, pool, strategy, seed=1)


@pytest.mark.parametrize("strategy", LOOKS_ALONE)
@pytest.mark.parametrize("classes", [1, 3])
def test_a_detector_that_sees_nothing_and_one_that_knows_one_class_leave_a_choice(strategy, classes, rcnn, one_class):
    study = rcnn if classes == 3 else one_class
    assert len(study.class_names) == classes
    for lively in (False, True):
        model, pool = detector(study, lively), pool_of(study)
        if needs(strategy) & {"detections"}:
            found = alfl.see(study, model, pool, pool.unlabelled(), strategy).detections
            assert bool(found.valid.any()) == lively
        picks = chosen(study, model, pool, strategy, 5)
        assert len(set(picks)) == 5 and min(picks) >= 0 and max(picks) < 21
        if not lively and strategy != "coreset":  # ties are broken by lot, so others come with another seed
            assert picks != chosen(study, model, pool, strategy, 5, seed=1)


@pytest.mark.parametrize("strategy", ["cascade", "cald", "hua_entropy", "coreset", "entropy_max"])
@pytest.mark.parametrize("options", [SSD, YOLO], ids=["ssd", "yolo"])
def test_other_detectors_are_asked_by_every_strategy_that_needs_no_head_of_its_own(options, strategy):
    study = huale_study(**options)
    model, pool = detector(study), pool_of(study)
    sight = alfl.see(study, model, pool, pool.unlabelled(), strategy)
    assert filled(sight) == needs(strategy)
    if sight.crowd is not None:
        assert set(sight.crowd.extra["level"][sight.crowd.valid].tolist()) == {0, 1, 2}
    choice = alfl.choose(study.config, strategy, sight, 4, seeding.rng_for(0, "ask"))
    assert len(set(choice.positions.tolist())) == 4 and len(set(choice.scores.values.tolist())) > 5


@pytest.mark.parametrize("lively", [False, True])
def test_hua_needs_a_predicted_loss_and_says_which_head_gives_it(lively):
    for options in (YOLO, SSD, {"box_loss_head": False}):
        study = huale_study(**options)
        with pytest.raises(ValueError, match="evidence=True.*hua_entropy"):
            chosen(study, detector(study, lively), pool_of(study), "hua")
    study = huale_study(**{**SSD, "box_loss_head": True})
    assert len(set(chosen(study, detector(study, lively), pool_of(study), "hua"))) == 4


def test_a_detector_without_such_heads_is_refused_in_words(rcnn):
    rng = seeding.torch_rng_for(0, "weights")
    for changes in (
        {"box_loss_head": True},
        {"box_loss": "extended_iou"},
        {"auxiliary_head": "iou"},
        {"emphasis": 1.0},
    ):
        with pytest.raises(ValueError, match="'yolo' has neither RoI heads nor an evidence head: use 'faster_rcnn'"):
            alfl.build(rcnn.config.replace(**{**YOLO, **changes}), 3, rng)
    with pytest.raises(ValueError, match="'ssd' has no RoI heads"):
        alfl.build(rcnn.config.replace(**SSD, auxiliary_head="sides"), 3, rng)
    arm = alfl.build(
        rcnn.config.replace(
            box_loss="efficient_iou",
            box_weight=3.0,
            box_focal=0.5,
            auxiliary_head="iou",
            auxiliary_weight=0.25,
            iou_power=2.0,
            emphasis=1.5,
        ),
        3,
        rng,
    ).roi.localisation
    assert dataclasses.astuple(arm) == ("efficient_iou", 3.0, 0.5, "iou", 0.25, 2.0, 1.5)


# --- strategies as methods of a run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [*huale.STRATEGIES, "coreset"])
def test_new_ways_of_asking_go_with_every_scheme(strategy):
    assert alfl.scheme_of(strategy) == ("fedavg", strategy)
    for scheme in ("fedavg", "local-first", "chain", "chain-fedavg", "accumulate"):
        method = f"{scheme}+{strategy}"
        assert alfl.scheme_of(method) == (scheme, strategy)
        assert alfl.scheme_of(f"centralised+{method}") == ("centralised", method)
    for wrong in (f"ring+{strategy}", f"chain+{strategy}s", f"chain+chain+{strategy}"):
        with pytest.raises(ValueError, match=f"{wrong[:5]}.*is unknown: .*hua_entropy"):
            alfl.scheme_of(wrong)


def test_schemes_of_notebook_11_and_12_ask_by_new_strategies(tmp_path):
    methods = ("chain+cald", "local-first+coreset", "centralised+chain+cald")
    study = alfl.prepare(
        small_run.settings(
            methods=methods,
            width=16,
            digit_classes=3,
            scenes=(30, 4),
            first_pass=2,
            passes=1,
            rounds=1,
            score_above=0.1,
        ),
        device="cpu",
    )
    small_run.loop(tmp_path, study)
    asked = record.queries(study.config, "small", root=tmp_path)
    by = {method: part for method, part in asked.groupby("method")}
    assert by.keys() == set(methods) and all(len(part) == 2 * (3 + 2) for part in by.values())
    assert set(by["chain+cald"]["id"]) == set(by["centralised+chain+cald"]["id"])
    assert by["chain+cald"]["score"].notna().all() and (by["chain+cald"]["score"] <= 0).all()  # minus a consistency
    later = by["local-first+coreset"].query("cycle == 1")
    assert (later["score"] > 0).all() and later["score"].nunique() == 4  # distances to the nearest labelled image
    assert not asked.duplicated(["method", "id"]).any()


def asked_by(study: alfl.Study, root: Path, method: str, cycle: int = 1, model=None):
    """What `ask` looks at and chooses in a cycle, of a client of 21 unlabelled images: positions of both."""
    run = record.Run(study.config, "small", method, 0, root)
    client = alfl.Client("00", pool_of(study))
    before, looked = set(client.pool.labelled()), []
    with pytest.MonkeyPatch.context() as patch:
        see = alfl.see
        patch.setattr(alfl, "see", lambda *given: (looked.append(given[3]), see(*given))[1])
        alfl.ask(run, study, model or detector(study), client, cycle)
    return looked[0].tolist(), [p for p in client.pool.labelled().tolist() if p not in before]


def test_scored_limits_what_is_looked_at_and_stays_the_same(rcnn, tmp_path):
    study = changed(rcnn, scored=8)
    looked, picked = asked_by(study, tmp_path, "cascade")
    assert len(looked) == 8 and looked == sorted(set(looked)) and not set(looked) & set(LABELLED)
    assert len(picked) == 2 and set(picked) <= set(looked)
    assert asked_by(study, tmp_path, "cascade") == (looked, picked)
    assert asked_by(study, tmp_path, "entropy_max")[0] == looked  # the same images for every strategy
    for cycle in (2, 3, 4):
        other, best = asked_by(study, tmp_path, "sum", cycle)
        assert other != looked and set(best) <= set(other)
    everything = sorted(set(range(24)) - set(LABELLED))
    for unlimited in (changed(rcnn, scored=0), changed(rcnn, scored=21)):
        assert asked_by(unlimited, tmp_path, "cascade")[0] == everything
    assert asked_by(study, tmp_path, "random") == asked_by(rcnn, tmp_path, "random")
    few = changed(rcnn, scored=3, budget=5)  # no fewer than it asks for
    assert [len(part) for part in asked_by(few, tmp_path, "cascade")] == [5, 5]


def test_afresh_every_cycle_trains_from_the_starting_point_also_after_a_break(tmp_path):
    study = huale_study(start_images=4, start_iterations=2, rounds=2, score_above=0.2)
    small_run.loop(tmp_path, study)
    ended = record.state(study.config, "small", "cascade", 0, root=tmp_path)["model"]
    for commits in (2, 3):  # before and after the first round of cycle 1
        root = tmp_path / f"broken off after {commits}"
        with pytest.raises(small_run.BrokenOff):
            small_run.loop(root, study, enough=commits)
        small_run.loop(root, study)
        again = record.state(study.config, "small", "cascade", 0, root=root)["model"]
        assert again.keys() == ended.keys() and all(torch.equal(again[k], ended[k]) for k in ended)
    asked = record.queries(study.config, "small", root=tmp_path)
    begun = alfl.beginning(study.config)
    start = record.shared(begun, "shared", 0, "starting-point", lambda: pytest.fail("made twice"), root=tmp_path)
    model = alfl.build(study.config, 3, seeding.torch_rng_for(0, "weights"))
    assert not all(torch.equal(start[k], v) for k, v in model.state_dict().items())

    def train(cycle: int) -> dict:
        """Two rounds as notebook 20 has them, from whatever weights the model has."""
        rows = sorted(study.train.images.ids.index(sample) for sample in asked[asked["cycle"] <= cycle]["id"])
        assert len(rows) == 3 + 2 * cycle
        images, labels = study.train.images.take(rows), study.train.labels.take(rows)
        for round in range(2):
            rng = seeding.torch_rng_for(0, "train", "00", cycle, round)
            list(training.fit(model, images, labels, study.config, training.LocalTask(rng, iterations=2)))
        return {k: v.clone() for k, v in model.state_dict().items()}

    model.load_state_dict(start)
    train(0)
    onward = train(1)
    model.load_state_dict(start)
    wanted = train(1)
    assert all(torch.equal(ended[k], wanted[k]) for k in wanted)
    assert not any(torch.equal(ended[k], onward[k]) for k in onward if k.endswith("weight"))


def test_afresh_also_forgets_what_clients_held_for_themselves(tmp_path):
    """Local first: own weights; local BatchNorm statistics. All are of the cycle before."""
    study = huale_study(
        methods=("local-first+random",),
        clients=2,
        rounds=1,
        cycles=3,
        norm="batch",
        batch_norm="local",
        start_images=4,
        start_iterations=2,
    )
    run = record.Run(study.config, "small", "local-first+random", 0, tmp_path)
    clients, model = alfl.start(run, study)
    begun = {k: v.clone() for k, v in model.state_dict().items()}
    sent = []
    for cycle in range(2):
        for client in clients:
            alfl.ask(run, study, model, client, cycle)
        held = [(client.home, client.own) for client in clients]
        assert cycle == 0 or all(part for each in held for part in each)
        updates = alfl.train(run, study, model, clients, cycle, 0)
        assert all(torch.equal(v, begun[k]) for k, v in model.state_dict().items())
        alfl.keep(clients, updates)
        sent.append({update.client: federation.unpack(update.payload) for update in updates})
    fresh = record.Run(study.config, "small", "local-first+random", 0, tmp_path / "other")
    others, model = alfl.start(fresh, study)
    for client, other in zip(clients, others, strict=True):  # all labels at once, then what cycle 1 did
        other.pool.ask(client.pool.labelled(), 0)
    once = alfl.train(fresh, study, model, others, 1, 0)
    for client, other in zip(clients, others, strict=True):
        assert client.home and all(torch.equal(client.home[k], v) for k, v in other.home.items())
    for update in once:
        state = federation.unpack(update.payload)
        assert all(torch.equal(state[k], sent[1][update.client][k]) for k in state)
        assert any(not torch.equal(state[k], sent[0][update.client][k]) for k in state)


def test_until_something_is_chosen_the_methods_of_a_seed_are_trained_once(tmp_path, monkeypatch):
    """Rule 2, paired starts: the cycle-0 model is shared, and is the one that a run of its own would train."""
    study = huale_study(score_above=0.2, cycles=2, methods=("random", "cascade"), evaluate_every=1)
    trained = []
    real = alfl.federation.train_client

    def counted(*args, **kwargs):
        trained.append(len(args[2]))
        return real(*args, **kwargs)

    monkeypatch.setattr(alfl.federation, "train_client", counted)
    small_run.loop(tmp_path / "both", study)
    first, asked = study.config.query.initial_labels, study.config.query.query_size
    assert trained == [first, first + asked, first + asked]  # random: both cycles; cascade: the second only
    small_run.loop(tmp_path / "alone", changed(study, methods=("cascade",)))
    assert trained[3:] == [first, first + asked]
    other = changed(study, methods=("cascade",), cascade_order=study.config.query.cascade_order[::-1], budget=asked + 1)
    small_run.loop(tmp_path / "both", other)  # what is chosen later does not move the first training
    assert trained[5:] == [first + asked + 1]
    small_run.loop(tmp_path / "both", changed(study, methods=("random",), emphasis=0.5))  # another loss does
    assert trained[6:] == [first, first + asked]
    both, alone = (
        record.table(study.config, "small", root=tmp_path / where, methods=["cascade"]) for where in ("both", "alone")
    )
    pd.testing.assert_frame_equal(both, alone)
