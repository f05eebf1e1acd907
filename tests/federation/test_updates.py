"""Federated averaging: laws bit for bit, weights by hand, what travels and its bytes, BatchNorm's three policies."""

import io
import itertools
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import weighted_average

from fedal_utils.config import Config
from fedal_utils.data import Digits, load
from fedal_utils.detectors import build, clone
from fedal_utils.federation import (
    SCHEMES,
    Client,
    Step,
    Update,
    average,
    broadcast,
    pack,
    state_of,
    train_client,
    unpack,
)
from fedal_utils.federation import aggregate as federation
from fedal_utils.sampling import Oracle, Pool
from fedal_utils.seeding import rng_for, torch_rng_for
from fedal_utils.training import LocalTask, TrainingDiverged, fit

CONFIG = Config.of(batch=2, lr=1e-3)


def update(client, state, images=1, boxes=1, dtype="fp32"):
    return Update(client, pack(state, dtype), images, boxes, steps=1, loss=0.5)


def vector(*values):
    return {"w": torch.tensor(values, dtype=torch.float32)}


def new_model(norm="group", seed=0, **options):
    return build(Config.of(norm=norm, **options), 3, torch_rng_for(seed, "weights"))


@pytest.fixture(scope="module")
def scenes():
    return load("digits", (64, 64), digits=Digits((6, 1), 3))[0]


def one_round(scenes, model, name="A", rows=(0, 1, 2, 3), scratch=None, message=b"", kept=None, dtype="fp32", **step):
    """`train_client` for two steps on these scenes, from the model; kept: its optimizer state, which is updated."""
    pool = Pool(name, scenes.images, Oracle(scenes.labels), rows)
    pool.label(range(len(rows)), 0)
    client, run = Client(name, pool, {} if kept is None else kept), SimpleNamespace(torch_rng=rng_of_seed_0)
    config, method = CONFIG.replace(message_dtype=dtype), SimpleNamespace(scheme=SCHEMES["fedavg"])
    setup = SimpleNamespace(device="cpu")
    told = SimpleNamespace(config=config, recipe=lambda _: (config.training, 2), run=run, method=method, setup=setup)
    return train_client(told, Step(0, 0, **step), client, scratch or clone(model), message or broadcast(model))


def rng_of_seed_0(*names):
    return torch_rng_for(0, *names)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


floats = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6)
counts = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 1000)), min_size=1, max_size=9)


@given(floats, counts, st.sampled_from(["boxes", "equal"]))
def test_the_average_of_equals_is_equal_bit_for_bit(values, clients, weights):
    state = vector(*values)
    updates = [update(f"{i}", state, images, boxes) for i, (images, boxes) in enumerate(clients)]
    assert torch.equal(average(updates, weights)["w"], state["w"])


@given(st.integers(2, 9), st.integers(0, 1000))
def test_permuting_clients_changes_no_bit(clients, seed):
    rng = rng_for(seed, "states")
    updates = [
        update(f"{i:02d}", vector(*rng.normal(size=20) * 10.0 ** rng.integers(-8, 8, 20)), int(rng.integers(1, 99)))
        for i in range(clients)
    ]
    straight = average(updates)
    assert same(average([updates[i] for i in rng.permutation(clients)]), straight)
    assert same(average(updates[::-1]), straight)


def test_permuting_clients_changes_no_bit_even_where_float64_is_too_short():
    # (2^60 - 2^60 + 1) / 3 in this order is 1/3; any order that adds the 1 to 2^60 / 3 loses it
    updates = [update(name, vector(value)) for name, value in (("A", 2.0**60), ("B", -(2.0**60)), ("C", 1.0))]
    for order in itertools.permutations(updates):
        assert average(order)["w"].item() == pytest.approx(1 / 3)


@given(st.integers(1, 6), st.integers(0, 1000), st.sampled_from(["images", "boxes", "equal"]))
def test_the_average_equals_exact_fractions(clients, seed, weights):
    rng = rng_for(seed, "states")
    arrays = [rng.normal(size=8).astype(np.float32) for _ in range(clients)]
    images, boxes = rng.integers(1, 50, clients), rng.integers(1, 200, clients)
    updates = [update(f"{i}", vector(*arrays[i].tolist()), int(images[i]), int(boxes[i])) for i in range(clients)]
    chosen = {"images": images, "boxes": boxes, "equal": np.ones(clients, dtype=int)}[weights]
    want = weighted_average(arrays, [Fraction(int(n)) for n in chosen])
    assert average(updates, weights)["w"].numpy() == pytest.approx(want, rel=1.2e-7, abs=1e-13)


def test_fedavg_1602_05629_alg_1_by_hand():
    # by images 1 : 3 -> .25 (0, 4) + .75 (4, 8) = (3, 7); by boxes 3 : 1 -> (1, 5); equal -> (2, 6)
    updates = [update("A", vector(0, 4), images=1, boxes=30), update("B", vector(4, 8), images=3, boxes=10)]
    assert average(updates)["w"].tolist() == [3, 7]
    assert average(updates, "boxes")["w"].tolist() == [1, 5]
    assert average(updates, "equal")["w"].tolist() == [2, 6]
    assert federation.shares(updates, "images").tolist() == [0.25, 0.75]
    idle = [*updates, update("C", vector(100, 100), images=0, boxes=0)]
    assert average(idle)["w"].tolist() == [3, 7]  # nothing labelled, no say


def test_a_state_survives_packing_bit_for_bit_and_the_same_state_packs_to_the_same_bytes():
    state = state_of(new_model("batch"), list(new_model("batch").state_dict()))
    there = unpack(pack(state))
    assert same(there, state) and any(v.dtype == torch.int64 for v in there.values())
    assert pack(state) == pack({k: v.clone() for k, v in state.items()})


def test_bytes_are_four_a_float_and_two_in_half_precision_beside_the_envelope():
    model = new_model()
    state = state_of(model)
    count = sum(v.numel() for v in state.values())
    full, half = len(pack(state)), len(pack(state, "fp16"))
    envelope = 500 * len(state) + 2000  # names and alignment
    assert 4 * count < full < 4 * count + envelope and 2 * count < half < 2 * count + envelope
    assert full - half == pytest.approx(2 * count, abs=80 * len(state))


def test_a_view_is_packed_without_the_memory_behind_it():
    whole = torch.randn(1000, 1000)
    assert len(pack({"w": whole[:2]})) == len(pack({"w": whole[:2].clone()})) < 20_000


def test_half_precision_on_the_wire_really_rounds():
    a, b = 1 + 2**-12, 3 + 2**-13  # halves have 10 bits behind the point: 1 and 3 arrive
    full = average([update("A", vector(a)), update("B", vector(b))])
    half = average([update("A", vector(a), dtype="fp16"), update("B", vector(b), dtype="fp16")])
    assert half["w"].item() == 2.0 and full["w"].item() == pytest.approx(2 + 1.5 * 2**-13, abs=1e-7)
    assert half["w"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"'w' is not finite in fp16 \(largest size 7e\+04\)"):
        pack(vector(7e4), "fp16")


def test_counters_stay_at_home_and_statistics_travel():
    everything = set(new_model("batch").state_dict())
    counters = {k for k in everything if k.endswith("num_batches_tracked")}
    assert counters and set(state_of(new_model("batch"))) == everything - counters


def test_a_frozen_backbone_is_not_sent():
    pytest.importorskip("timm")
    model = build(Config.of(backbone="lite0", pretrained=True, frozen=True), 3, torch_rng_for(0, "weights"))
    sent = state_of(model)
    assert sent and not any(k.startswith("backbone.") for k in sent)
    assert len(pack(sent)) < 1_000_000 < sum(v.numel() * 4 for v in model.state_dict().values())


def test_one_client_equals_training_without_a_federation_bit_for_bit(scenes):
    model = new_model()
    got = one_round(scenes, model, "A")
    merged = average([got])
    part = scenes.take([0, 1, 2, 3])
    alone = clone(model)
    task = LocalTask(rng_of_seed_0("train", "A", 0, 0), "A", 2)
    rows = list(fit(alone, part.images, part.labels, CONFIG.training, task))
    assert same(merged, dict(alone.state_dict()))
    assert got.steps == 2 and got.loss == rows[-1]["loss"]
    assert got.images == 4 and got.boxes == int((part.labels.classes > 0).sum()) and got.client == "A"
    assert not same(merged, dict(model.state_dict()))  # it did learn
    assert got.payload == one_round(scenes, model, "A", scratch=new_model(seed=9)).payload  # it may hold anything


def test_batch_norm_statistics_are_averaged_as_the_weights_are(scenes):
    model = new_model("batch")
    updates = [one_round(scenes, model, name, rows) for name, rows in (("A", (0, 1)), ("B", (2, 3, 4, 5)))]
    key = next(k for k in sorted(model.state_dict()) if k.endswith("running_mean"))
    a, b = (unpack(u.payload)[key].double() for u in updates)
    assert not torch.equal(a, b)
    assert torch.equal(average(updates)[key], (a * (2 / 6) + b * (4 / 6)).float())


def test_client_sampling_has_the_size_that_was_asked_and_depends_on_the_generator_only():
    names = [f"{i:02d}" for i in range(10)]
    for fraction, size in ((1.0, 10), (0.3, 3), (0.25, 2), (0.01, 1), (0.96, 10)):
        chosen = federation.sample_clients(names, fraction, rng_for(0, "t"))
        assert len(chosen) == size == len(set(chosen)) and chosen == sorted(chosen) and set(chosen) <= set(names)
    one, other = (federation.sample_clients(order, 0.3, rng_for(0, "t")) for order in (names, names[::-1]))
    assert one == other
    drawn = [tuple(federation.sample_clients(names, 0.3, rng_for(seed, "t"))) for seed in range(300)]
    assert len(set(drawn)) > 60
    times = [sum(name in one for one in drawn) for name in names]  # 90 each on average, standard deviation 8
    assert 58 < min(times) and max(times) < 122


@pytest.mark.parametrize(
    ("metric", "parts"),
    [
        ([[0.9, 0.2], [0.5, 0.6], [0.1, 0.1]], [1 / 2, 1 / 2, 0]),  # the docstring's
        ([[0.9, 0.3], [0.9, 0.1]], [3 / 4, 1 / 4]),  # the first class is shared
        ([[0.0, 0.2], [0.0, 0.3]], [0, 1]),  # nobody detects the first class: no vote
        ([[np.nan, 0.2], [np.nan, 0.1]], [1, 0]),  # not judged: no vote
        ([[np.nan, 0.2], [0.1, 0.1]], [1 / 2, 1 / 2]),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_class_wise_parts_by_hand_van_bommel_7_2(metric, parts):
    got = federation.class_wise_shares(np.array(metric))
    assert got.dtype == np.float64 and got.tolist() == pytest.approx(parts, abs=1e-15)


values = st.one_of(st.just(float("nan")), st.sampled_from([0.0, 0.25, 0.5]), st.floats(0, 1))


@given(st.integers(1, 9).flatmap(lambda c: st.lists(st.lists(values, min_size=c, max_size=c), min_size=1, max_size=9)))
def test_class_wise_parts_sum_to_one_and_follow_the_clients(metric):
    metric = np.array(metric)
    parts = federation.class_wise_shares(metric)
    assert parts.sum() == pytest.approx(1) and (parts >= 0).all()
    order = rng_for(0, "order").permutation(len(metric))
    assert federation.class_wise_shares(metric[order]).tolist() == pytest.approx(parts[order].tolist())
    columns = rng_for(0, "columns").permutation(metric.shape[1])
    assert federation.class_wise_shares(metric[:, columns]).tolist() == pytest.approx(parts.tolist())


def test_whole_percents_by_hand_and_for_all_counts():
    named = [update(f"{i:03d}", vector(i)) for i in range(100)]
    assert federation.shares(named[:9], "percent").tolist() == [0.12] + [0.11] * 8  # van Bommel 7.2, released code
    assert federation.shares(named[2::-1], "percent").tolist() == [0.33, 0.33, 0.34]  # by name
    for count in range(1, 101):
        percents = federation.shares(named[:count], "percent") * 100
        assert percents.round().sum() == 100 and percents == pytest.approx(percents.round())
        assert percents.max() - percents.min() < 1.5 and (np.diff(percents) <= 0).all()


def with_state(client, images, steps, *moment):
    memory = {"momentum_buffer:w": torch.tensor(moment), "steps": torch.tensor(steps)}
    return Update(client, pack(vector(0.0)), images, 1, 1, 0.5, pack(memory))


def test_moments_that_travelled_are_averaged_and_the_most_steps_count():
    merged = federation.average_optimizer_states([with_state("A", 1, 6, 0.0, 4.0), with_state("B", 3, 4, 4.0, 8.0)])
    assert merged["momentum_buffer:w"].tolist() == [3, 7] and int(merged["steps"]) == 6
    assert merged["steps"].dtype == torch.int64 and set(merged) == {"momentum_buffer:w", "steps"}
    alone = federation.average_optimizer_states([with_state("A", 1, 6, 0.0, 4.0)])
    assert alone["momentum_buffer:w"].tolist() == [0, 4] and int(alone["steps"]) == 6
    assert federation.average_optimizer_states([with_state("A", 1, 6, 1.0), update("B", vector(0.0))]) == {}


def test_an_optimizer_state_goes_in_and_out_and_travels_only_when_told(scenes):
    model, kept = new_model(), {}
    one = one_round(scenes, model, kept=kept, optimizer_state="client", schedule_rounds=2)
    assert one.optimizer_state == b"" and int(kept["steps"]) == 2
    again = {k: v.clone() for k, v in kept.items()}
    two = one_round(scenes, model, kept=again, optimizer_state="travels", schedule_rounds=2)
    assert same(unpack(two.optimizer_state), again) and int(again["steps"]) == 4
    assert two.bytes == len(two.payload) + len(two.optimizer_state) and two.payload != one.payload
    half = one_round(scenes, model, optimizer_state="travels", schedule_rounds=2, dtype="fp16")
    assert same(unpack(half.optimizer_state), kept), "second moments would vanish in half precision"
    assert len(half.payload) < 0.6 * len(one.payload)


def test_a_client_that_diverges_is_named_and_its_optimizer_state_as_it_was(scenes):
    model, labels, memory, kept = new_model("batch"), scenes.labels, {}, {"optimizer_state": "client"}
    one_round(scenes, model, kept=memory, **kept)
    before = {k: v.clone() for k, v in memory.items()}
    broken = replace(labels, boxes=labels.boxes * float("nan"))
    with pytest.raises(TrainingDiverged, match="client A: loss is nan"):
        one_round(replace(scenes, labels=broken), model, kept=memory, **kept)
    large = state_of(model)
    large[next(k for k in large if k.endswith("weight"))][0] = 1e5  # finite in fp32, not in fp16
    with pytest.raises(TrainingDiverged, match="client A: .* is not finite in fp16"):
        one_round(scenes, model, message=pack(large), dtype="fp16", kept=memory, **kept)
    assert same(memory, before)


def raw_update(client, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return Update(client, buffer.getvalue(), 1, 1, 1, 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_update_is_refused_with_the_clients_name(bad):
    updates = [update("A", vector(1, 2)), raw_update("B", vector(1, bad))]
    with pytest.raises(ValueError, match="client B sent a non-finite 'w'"):
        average(updates)
    with pytest.raises(ValueError, match="'w' is not finite in fp32"):
        pack(vector(bad))


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ([update("A", vector(1)), update("A", vector(2))], r"a client sent two updates: \['A', 'A'\]"),
        ([update("A", vector(1)), update("B", {"v": torch.ones(1)})], r"client B sent other entries .*\['v', 'w'\]"),
        ([update("A", {**vector(1), "v": torch.ones(1)}), update("B", vector(1))], r"client B sent other .*\['v'\]"),
        ([update("A", vector(1, 2)), update("B", vector(1))], r"client B sent 'w' of another shape: \(1,\)"),
        ([raw_update("A", {"n": torch.tensor(3)})], "client A sent integer entry 'n': counters are never averaged"),
        ([update("A", vector(1), images=0)], "need at least one client with images"),
    ],
)
def test_updates_that_do_not_fit_are_refused(updates, message):
    with pytest.raises(ValueError, match=message):
        average(updates)


BEFORE = vector(1, 1)


def at(**distances):  # from BEFORE: (1, 1) and as much along (0.6, 0.8)
    return [update(name, vector(1 + 0.6 * d, 1 + 0.8 * d)) for name, d in distances.items()]


@pytest.mark.parametrize(
    ("above", "distances", "out"),
    [
        (1.5, (1, 1, 2), "C"),  # median 1
        (1.5, (1, 2, 2), ""),  # median 2: who moved less is never too large
        (3.0, (1, 2, 5), ""),  # the median is 2, not 1: itself is one of them
        (1.5, (1, 2, 3, 4), "D"),  # median 2.5: above 3.75
        (3.0, (1000, 1, 1.25, 1000, 0.75), "AD"),  # two of five: median 1.25
        (3.0, (1, 1000, 1000), ""),  # most of them: they are the median
        (1.5, (1, 1000), ""),
        (1.5, (0, 0, 0), ""),  # nobody moved
    ],
)
def test_who_moved_too_far_by_hand(above, distances, out):
    updates = at(**dict(zip("ABCDE", distances, strict=False)))
    for order in (updates, updates[::-1]):
        assert federation.too_large(order, BEFORE, above) == set(out)


def test_the_distance_is_over_all_entries_in_float64_and_from_what_was_sent():
    before = {"v": torch.tensor([[1e8]]), "w": torch.tensor([5.0, 5.0])}
    near = {"v": torch.tensor([[1e8]]), "w": torch.tensor([5.0, 6.0])}  # 1
    far = {"v": torch.tensor([[1e8 + 8]]), "w": torch.tensor([8.0, 9.0])}  # sqrt(64 + 9 + 16) = 9.43
    three = [update("A", near), update("B", near), update("C", far)]
    assert federation.too_large(three, before, 9.44) == set() and federation.too_large(three, before, 9.43) == {"C"}
    huge = [update(name, vector(value)) for name, value in (("A", 1e38), ("B", -1e38), ("C", 3e38))]  # squares: 1e76
    assert federation.too_large(huge, vector(0), 2.5) == {"C"}
