"""Federated averaging: laws bit for bit, weights by hand, what travels and its bytes, BatchNorm's three policies."""

import io
import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import weighted_average

from fedal_utils.config import Config, TrainingConfig
from fedal_utils.data import Digits, Labels, load
from fedal_utils.detectors import build, clone
from fedal_utils.federation import aggregate as federation
from fedal_utils.federation.aggregate import average
from fedal_utils.federation.client import Exchange, train_detector
from fedal_utils.federation.messages import BATCH_NORM, Update, batch_norm_keys, pack, sent_keys, state_of, unpack
from fedal_utils.seeding import rng_for, torch_rng_for
from fedal_utils.training import LocalTask, TrainingDiverged, fit

RECIPE = TrainingConfig.of(batch=2, lr=1e-3)


def update(client, state, images=1, boxes=1, dtype="fp32"):
    return Update(client, pack(state, dtype), images, boxes, steps=1, loss=0.5)


def vector(*values):
    return {"w": torch.tensor(values, dtype=torch.float32)}


def new_model(norm="group", seed=0, **options):
    return build(Config.of(norm=norm, fpn_channels=16, **options), 3, torch_rng_for(seed, "weights"))


@pytest.fixture(scope="module")
def scenes():
    return load("digits", (64, 64), digits=Digits((6, 1), 3))[0]


def train(model, payload, part, rng, client="A", iterations=2, *, dtype="fp32", policy="average", buffers=None, **more):
    """`train_detector` on these scenes; more: optimizer_state, position, send."""
    task = LocalTask(rng, client, iterations, more.get("optimizer_state"), more.get("position"))
    exchange = Exchange(policy, dtype, buffers, more.get("send", False))
    return train_detector(model, payload, part.images, part.labels, RECIPE, task, exchange)


def one_round(scenes, model, client="A", rows=(0, 1, 2, 3), seed=0, scratch=None, policy="average", **options):
    payload, rng = pack(state_of(model, sent_keys(model, policy))), torch_rng_for(seed, "train", client)
    return train(scratch or clone(model), payload, scenes.take(list(rows)), rng, client, policy=policy, **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------------------------------- laws


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


def test_sums_run_in_float64():
    # in float32 the one would be lost beside 1e8
    updates = [update(name, vector(value)) for name, value in (("A", 1e8), ("B", 1.0), ("C", -1e8))]
    assert average(updates, "equal")["w"].item() == pytest.approx(1 / 3, rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- bytes


def test_a_state_survives_packing_bit_for_bit_and_the_same_state_packs_to_the_same_bytes():
    state = state_of(new_model("batch"), list(new_model("batch").state_dict()))
    there = unpack(pack(state))
    assert same(there, state) and any(v.dtype == torch.int64 for v in there.values())
    assert pack(state) == pack({k: v.clone() for k, v in state.items()})
    torch.load(io.BytesIO(pack(state)), weights_only=True)


def test_bytes_are_four_a_float_and_two_in_half_precision_beside_the_envelope():
    model = new_model()
    state = state_of(model, sent_keys(model))
    count = sum(v.numel() for v in state.values())
    full, half = len(pack(state)), len(pack(state, "fp16"))
    envelope = 500 * len(state) + 2000  # names and alignment
    assert 4 * count < full < 4 * count + envelope and 2 * count < half < 2 * count + envelope
    assert full - half == pytest.approx(2 * count, abs=80 * len(state))
    large = {"w": torch.randn(500_000)}
    assert len(pack(large)) == pytest.approx(2_000_000, rel=1e-3)
    assert len(pack(large, "fp16")) == pytest.approx(1_000_000, rel=2e-3)


def test_a_view_is_packed_without_the_memory_behind_it():
    whole = torch.randn(1000, 1000)
    assert len(pack({"w": whole[:2]})) == len(pack({"w": whole[:2].clone()})) < 20_000
    turned = torch.randn(1, 4, 3, 3).to(memory_format=torch.channels_last)
    assert torch.equal(unpack(pack({"w": turned}))["w"], turned)


def test_half_precision_on_the_wire_really_rounds():
    a, b = 1 + 2**-12, 3 + 2**-13  # halves have 10 bits behind the point: 1 and 3 arrive
    full = average([update("A", vector(a)), update("B", vector(b))])
    half = average([update("A", vector(a), dtype="fp16"), update("B", vector(b), dtype="fp16")])
    assert half["w"].item() == 2.0 and full["w"].item() == pytest.approx(2 + 1.5 * 2**-13, abs=1e-7)
    assert half["w"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"'w' is not finite in fp16 \(largest size 7e\+04\)"):
        pack(vector(7e4), "fp16")
    with pytest.raises(ValueError, match=r"message precision must be one of \('fp32', 'fp16'\), got 'int8'"):
        pack(vector(1.0), "int8")


# -------------------------------------------------------------------------------------------------------- what travels


def test_counters_stay_at_home_and_statistics_travel_when_they_are_averaged():
    model = new_model("batch")
    everything = set(model.state_dict())
    statistics = batch_norm_keys(model)
    counters = {k for k in everything if k.endswith("num_batches_tracked")}
    assert counters and counters < statistics
    assert set(sent_keys(model)) == everything - counters
    for policy in ("local", "frozen"):
        assert set(sent_keys(model, policy)) == everything - statistics
    assert set(statistics) == {k for k in everything if "running_" in k or "num_batches" in k}
    group = new_model("group")
    assert batch_norm_keys(group) == set()
    assert all(set(sent_keys(group, policy)) == set(group.state_dict()) for policy in BATCH_NORM)
    with pytest.raises(ValueError, match="BatchNorm policy must be one of .* got 'sync'"):
        sent_keys(model, "sync")


def test_a_frozen_backbone_is_not_sent():
    pytest.importorskip("timm")
    model = build(
        Config.of(backbone="lite0", fpn_channels=16, pretrained=True, frozen=True), 3, torch_rng_for(0, "weights")
    )
    sent = sent_keys(model)
    assert sent and not any(k.startswith("backbone.") for k in sent)
    assert len(pack(state_of(model, sent))) < 1_000_000 < sum(v.numel() * 4 for v in model.state_dict().values())


def test_a_state_is_a_copy():
    model = new_model()
    state = state_of(model, sent_keys(model))
    before = {k: v.clone() for k, v in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert same(state, before)


# ------------------------------------------------------------------------------------------------------------ training


def test_one_client_equals_training_without_a_federation_bit_for_bit(scenes):
    model = new_model()
    got = one_round(scenes, model, "A")
    merged = average([got])
    part = scenes.take([0, 1, 2, 3])
    alone = clone(model)
    rows = list(fit(alone, part.images, part.labels, RECIPE, LocalTask(torch_rng_for(0, "train", "A"), "A", 2)))
    assert same(merged, dict(alone.state_dict()))
    assert got.steps == 2 and got.loss == rows[-1]["loss"]
    assert got.images == 4 and got.boxes == int((part.labels.classes > 0).sum()) and got.client == "A"
    assert not same(merged, dict(model.state_dict()))  # it did learn


def test_scratch_space_may_hold_anything(scenes):
    model = new_model()
    a = one_round(scenes, model)
    b = one_round(scenes, model, scratch=new_model(seed=9))
    assert a.payload == b.payload


@pytest.mark.parametrize("policy", ["average", "local", "frozen"])
def test_clients_that_share_scratch_space_do_not_see_each_other(scenes, policy):
    model = new_model("batch")
    scratch = clone(model)
    one_round(scenes, model, "A", (0, 1, 2), scratch=scratch, policy=policy, buffers={})
    after, alone = {}, {}
    second = one_round(scenes, model, "B", (3, 4, 5), scratch=scratch, policy=policy, buffers=after)
    fresh = one_round(scenes, model, "B", (3, 4, 5), policy=policy, buffers=alone)
    assert second.payload == fresh.payload and same(after, alone)


def test_batch_norm_average_merges_the_statistics(scenes):
    model = new_model("batch")
    updates = [one_round(scenes, model, name, rows) for name, rows in (("A", (0, 1)), ("B", (2, 3, 4, 5)))]
    key = next(k for k in sorted(batch_norm_keys(model)) if k.endswith("running_mean"))
    a, b = (unpack(u.payload)[key].double() for u in updates)
    assert not torch.equal(a, b)
    assert torch.equal(average(updates)[key], (a * (2 / 6) + b * (4 / 6)).float())
    assert not any("num_batches" in k for k in average(updates))


def test_batch_norm_local_keeps_each_clients_own_statistics(scenes):
    model = new_model("batch")
    homes = {"A": {}, "B": {}}
    updates = [
        one_round(scenes, model, n, r, policy="local", buffers=homes[n]) for n, r in (("A", (0, 1)), ("B", (2, 3)))
    ]
    statistics = batch_norm_keys(model)
    assert all(set(homes[n]) == statistics for n in homes)
    assert not statistics & set(average(updates))
    assert not same(homes["A"], homes["B"])
    counter = next(k for k in statistics if "num_batches" in k)
    mean = counter.replace("num_batches_tracked", "running_mean")
    assert int(homes["A"][counter]) == 2
    first = homes["A"][mean].clone()
    one_round(scenes, model, "A", (0, 1), policy="local", buffers=homes["A"])
    assert int(homes["A"][counter]) == 4  # it went on from its own
    # by hand: one step from the same statistics with the same batch moves them by 0.1 x (batch mean - old)
    home, start = {}, model.state_dict()[mean].clone()
    one_round(scenes, model, "A", (0, 1), policy="local", buffers=home, iterations=1)
    batch_mean = start + (home[mean] - start) / 0.1
    home_again = {k: v.clone() for k, v in home.items()}
    one_round(scenes, model, "A", (0, 1), policy="local", buffers=home_again, iterations=1)
    assert torch.allclose(home_again[mean], 0.9 * home[mean] + 0.1 * batch_mean, atol=1e-4)
    assert not torch.equal(first, start)


def test_batch_norm_frozen_changes_no_statistic_but_trains_the_weights(scenes):
    model = new_model("batch")
    with torch.no_grad():  # statistics that are not the initial ones
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1
    scratch = clone(model)
    seen = []
    layer = next(m for m in scratch.modules() if isinstance(m, torch.nn.BatchNorm2d))
    layer.register_forward_hook(lambda module, args, out: seen.append((module, args[0].clone(), out.clone())))
    got = one_round(scenes, model, scratch=scratch, policy="frozen", iterations=1)
    before, after = model.state_dict(), scratch.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in batch_norm_keys(model))
    module, x, out = seen[0]  # the first forward pass used the running statistics: (x - mean) / sqrt(var + eps)
    mean, scale = module.running_mean.view(1, -1, 1, 1), (module.running_var + module.eps).rsqrt().view(1, -1, 1, 1)
    assert torch.allclose(out, (x - mean) * scale, atol=1e-4)
    sent = unpack(got.payload)
    learned = [k for k in sent if k.startswith("backbone.")]  # convolutions, and BatchNorm's own weights and biases
    assert len(learned) > 20 and all(not torch.equal(sent[k], before[k]) for k in learned)
    scratch.train()  # the freeze ends with the round
    scratch(scenes.images.pixels[:2])
    moved = [k for k in batch_norm_keys(model) if not torch.equal(scratch.state_dict()[k], before[k])]
    assert moved


# --------------------------------------------------------------------------------------------------------- who and how


def test_client_sampling_has_the_size_that_was_asked_and_depends_on_the_generator_only():
    names = [f"{i:02d}" for i in range(10)]
    for fraction, size in ((1.0, 10), (0.3, 3), (0.25, 2), (0.01, 1), (0.96, 10)):
        chosen = federation.sample_clients(names, fraction, rng_for(0, "t"))
        assert len(chosen) == size == len(set(chosen)) and chosen == sorted(chosen) and set(chosen) <= set(names)
    assert federation.sample_clients(names, 0.3, rng_for(0, "t")) == federation.sample_clients(
        names[::-1], 0.3, rng_for(0, "t")
    )
    drawn = [tuple(federation.sample_clients(names, 0.3, rng_for(seed, "t"))) for seed in range(300)]
    assert len(set(drawn)) > 60
    times = [sum(name in one for one in drawn) for name in names]  # 90 each on average, standard deviation 8
    assert 58 < min(times) and max(times) < 122
    for fraction in (0.0, 1.1, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"fraction of clients must be in \(0, 1\], got {fraction}"):
            federation.sample_clients(names, fraction, rng_for(0, "t"))


# ------------------------------------------------------------------------------------------------------ parts by class


@pytest.mark.parametrize(
    ("metric", "parts"),
    [
        ([[0.9, 0.2], [0.5, 0.6], [0.1, 0.1]], [1 / 2, 1 / 2, 0]),  # the docstring's
        ([[0.9, 0.7], [0.5, 0.6]], [1, 0]),  # one winner
        ([[0.9, 0.3], [0.9, 0.1]], [3 / 4, 1 / 4]),  # the first class is shared
        ([[0.5, 0.5], [0.5, 0.5], [0.4, 0.9]], [1 / 4, 1 / 4, 1 / 2]),
        ([[0.0, 0.2], [0.0, 0.3]], [0, 1]),  # nobody detects the first class: no vote
        ([[np.nan, 0.2], [np.nan, 0.1]], [1, 0]),  # not judged: no vote
        ([[np.nan, 0.2], [0.1, 0.1]], [1 / 2, 1 / 2]),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [1 / 3, 1 / 3, 1 / 3]),
        ([[np.nan], [np.nan]], [1 / 2, 1 / 2]),
        ([[0.3, 0.0, np.nan]], [1]),
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


@pytest.mark.parametrize("bad", [[[-0.1]], [[float("inf")]], [0.1, 0.2], [[]]])
def test_class_wise_parts_of_what_is_no_table_are_refused(bad):
    with pytest.raises(ValueError, match=r"metric must be \(clients, classes\), finite and >= 0"):
        federation.class_wise_shares(np.array(bad))


def test_whole_percents_by_hand_and_for_all_counts():
    assert federation.percent_shares(9).tolist() == [0.12] + [0.11] * 8  # van Bommel 7.2, released code
    assert federation.percent_shares(3).tolist() == [0.34, 0.33, 0.33] and federation.percent_shares(1).tolist() == [1]
    for count in range(1, 101):
        percents = federation.percent_shares(count) * 100
        assert percents.round().sum() == 100 and percents == pytest.approx(percents.round())
        assert percents.max() - percents.min() < 1.5 and (np.diff(percents) <= 0).all()


def test_weighted_is_the_average_with_the_parts_that_were_given():
    updates = [update("B", vector(8, 0)), update("A", vector(0, 4))]
    assert federation.weighted(updates, [0.25, 0.75])["w"].tolist() == [2, 3]  # parts go with the updates, not by name
    assert same(federation.weighted(updates, [0.5, 0.5]), average(updates, "equal"))
    with pytest.raises(ValueError, match="2 updates, but 3 parts"):
        federation.weighted(updates, [0.5, 0.25, 0.25])


# ----------------------------------------------------------------------------------------------- optimizers that travel


def with_state(client, images, steps, *moment):
    memory = {"momentum_buffer:w": torch.tensor(moment), "steps": torch.tensor(steps)}
    return Update(client, pack(vector(0.0)), images, 1, 1, 0.5, pack(memory))


def test_moments_that_travelled_are_averaged_and_the_most_steps_count():
    merged = federation.average_optimizer_states([with_state("A", 1, 6, 0.0, 4.0), with_state("B", 3, 4, 4.0, 8.0)])
    assert merged["momentum_buffer:w"].tolist() == [3, 7] and int(merged["steps"]) == 6
    assert merged["steps"].dtype == torch.int64 and set(merged) == {"momentum_buffer:w", "steps"}
    alone = federation.average_optimizer_states([with_state("A", 1, 6, 0.0, 4.0)])
    assert alone["momentum_buffer:w"].tolist() == [0, 4] and int(alone["steps"]) == 6


def test_where_one_lacks_its_optimizer_nobody_gets_one():
    assert federation.average_optimizer_states([with_state("A", 1, 6, 1.0), update("B", vector(0.0))]) == {}
    assert federation.average_optimizer_states([update("B", vector(0.0))]) == {}


def test_an_update_weighs_its_weights_and_its_optimizer_state():
    plain, loaded = update("A", vector(1.0)), with_state("A", 1, 6, 1.0)
    assert plain.bytes == len(plain.payload) and loaded.bytes == len(loaded.payload) + len(loaded.optimizer_state)
    assert len(loaded.optimizer_state) > 0


def test_an_optimizer_state_goes_in_and_out_and_travels_only_when_told(scenes):
    model, kept = new_model(), {}
    one = one_round(scenes, model, optimizer_state=kept, position=(0, 4))
    assert one.optimizer_state == b"" and int(kept["steps"]) == 2
    again = {k: v.clone() for k, v in kept.items()}
    two = one_round(scenes, model, optimizer_state=again, position=(2, 4), send=True)
    assert same(unpack(two.optimizer_state), again) and int(again["steps"]) == 4
    assert not same(again, kept) and two.payload != one.payload
    half = one_round(scenes, model, optimizer_state={}, position=(0, 4), send=True, dtype="fp16")
    assert same(unpack(half.optimizer_state), kept), "second moments would vanish in half precision"
    assert len(half.payload) < 0.6 * len(one.payload)


def broken(part):
    labels = part.labels
    return replace(part, labels=Labels(labels.boxes * float("nan"), labels.classes, labels.ignore, labels.crowd))


def test_a_client_that_diverges_leaves_optimizer_state_statistics_and_scratch_as_they_were(scenes):
    model, part = new_model("batch"), scenes.take([0, 1])
    home, memory = {}, {}
    scratch = clone(model)
    one_round(scenes, model, scratch=scratch, policy="local", buffers=home, optimizer_state=memory, position=(0, 9))
    before = [{k: v.clone() for k, v in own.items()} for own in (home, memory)]
    statistics = state_of(scratch, sorted(batch_norm_keys(scratch)))
    payload = pack(state_of(model, sent_keys(model, "local")))
    with pytest.raises(TrainingDiverged, match="client A: loss is nan"):
        train(
            scratch,
            payload,
            broken(part),
            torch_rng_for(0, "train"),
            "A",
            1,
            policy="local",
            buffers=home,
            optimizer_state=memory,
            position=(2, 9),
        )
    assert same(home, before[0]) and same(memory, before[1])
    assert same(state_of(scratch, sorted(batch_norm_keys(scratch))), statistics)


def test_weights_that_do_not_fit_the_message_leave_the_optimizer_state_as_it_was(scenes):
    model, part, memory = new_model(), scenes.take([0, 1]), {}
    large = {k: v.clone() for k, v in state_of(model, sent_keys(model)).items()}
    large["neck.smooth.0.1.weight"][0] = 1e5  # finite in fp32, not in fp16
    with pytest.raises(TrainingDiverged, match="client A: .* is not finite in fp16"):
        train(
            model,
            pack(large),
            part,
            torch_rng_for(0, "train"),
            "A",
            1,
            dtype="fp16",
            optimizer_state=memory,
            position=(0, 9),
        )
    assert memory == {}


# -------------------------------------------------------------------------------------------------------------- errors


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
        ([], "no update to average"),
        ([update("A", vector(1)), update("A", vector(2))], r"a client sent two updates: \['A', 'A'\]"),
        ([update("A", vector(1)), update("B", {"v": torch.ones(1)})], r"client B sent other entries .*\['v', 'w'\]"),
        ([update("A", {**vector(1), "v": torch.ones(1)}), update("B", vector(1))], r"client B sent other .*\['v'\]"),
        ([update("A", vector(1, 2)), update("B", vector(1))], r"client B sent 'w' of shape \(1,\), the rest \(2,\)"),
        ([raw_update("A", {"n": torch.tensor(3)})], "client A sent integer entry 'n': counters are never averaged"),
        ([update("A", vector(1), images=0)], "need at least one client with images"),
    ],
)
def test_updates_that_do_not_fit_are_refused(updates, message):
    with pytest.raises(ValueError, match=message):
        average(updates)


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match=r"weights must be one of .* got 'loss'"):
        average([update("A", vector(1))], "loss")


def test_what_goes_wrong_at_a_client_names_the_client(scenes):
    model = new_model()
    part = scenes.take([0, 1])
    rng = torch_rng_for(0, "train")
    payload = pack(state_of(model, sent_keys(model)))
    with pytest.raises(ValueError, match=r"client A was sent entries that its model does not have: \['odd'\]"):
        train(model, pack({"odd": torch.ones(1)}), part, rng, "A", 1)
    with pytest.raises(ValueError, match="client A made no step: iterations=0"):
        train(model, payload, part, rng, "A", 0)
    with pytest.raises(TrainingDiverged, match="client A: loss is nan"):
        train(model, payload, broken(part), rng, "A", 1)
    large = {k: v.clone() for k, v in state_of(model, sent_keys(model)).items()}
    large["neck.smooth.0.1.weight"][0] = 1e5  # finite in fp32, not in fp16
    with pytest.raises(ValueError, match="client A: 'neck.smooth.0.1.weight' is not finite in fp16"):
        train(model, pack(large), part, rng, "A", 1, dtype="fp16")


# ---------------------------------------------------------------------------------------------- what is left out of it

BEFORE = vector(1, 1)


def at(**distances):
    """An update so far from BEFORE, of each client: (1, 1) and as much along (0.6, 0.8)."""
    return [update(name, vector(1 + 0.6 * d, 1 + 0.8 * d)) for name, d in distances.items()]


def screened(updates, above=0.0, before=BEFORE):
    kept, reasons = federation.screen(updates, before, above)
    assert all(any(u is given for given in updates) for u in kept)
    return [u.client for u in kept], reasons


@pytest.mark.parametrize(
    ("above", "distances", "out"),
    [
        (1.5, (1, 1, 2), "C"),  # median 1
        (2.5, (1, 1, 2), ""),
        (1.5, (2, 1, 1), "A"),
        (1.5, (1, 2, 2), ""),  # median 2: who moved less is never too large
        (1.5, (1, 1, 1), ""),
        (3.0, (1, 2, 5), ""),  # the median is 2, not 1: itself is one of them
        (2.25, (1, 2, 5), "C"),
        (3.0, (1, 1, 1000), "C"),
        (3.0, (1, 1, 1, 1000), "D"),
        (1.5, (1, 2, 3, 4), "D"),  # median 2.5: above 3.75
        (1.75, (1, 2, 3, 4), ""),
        (3.0, (1000, 1, 1.25, 1000, 0.75), "AD"),  # two of five: median 1.25
        (3.0, (1, 1000, 1000), ""),  # most of them: they are the median
        (100.0, (1, 1000), ""),  # fewer than three
        (1.5, (1, 1000), ""),
        (1.5, (1000,), ""),
        (1.5, (), ""),
        (1.5, (0, 0, 0), ""),  # nobody moved
        (0.0, (1, 1, 1000), ""),  # off
    ],
)
def test_who_moved_too_far_by_hand(above, distances, out):
    names = "ABCDE"[: len(distances)]
    kept, reasons = screened(at(**dict(zip(names, distances, strict=True))), above)
    assert reasons == dict.fromkeys(out, "too large") and kept == [name for name in names if name not in out]


def test_so_many_times_the_median_is_not_yet_too_large():
    three = [update(name, vector(value, 0)) for name, value in (("A", 2), ("B", -2), ("C", 3))]
    assert screened(three, 1.5, vector(0, 0)) == (["A", "B", "C"], {})  # 3 = 1.5 x 2
    assert screened(three, 1.499, vector(0, 0)) == (["A", "B"], {"C": "too large"})


def test_the_distance_is_over_all_entries_in_float64_and_from_what_was_sent():
    before = {"v": torch.tensor([[1e8]]), "w": torch.tensor([5.0, 5.0])}
    near = {"v": torch.tensor([[1e8]]), "w": torch.tensor([5.0, 6.0])}  # 1
    far = {"v": torch.tensor([[1e8 + 8]]), "w": torch.tensor([8.0, 9.0])}  # sqrt(64 + 9 + 16) = 9.43
    three = [update("A", near), update("B", near), update("C", far)]
    assert screened(three, 9.44, before) == (["A", "B", "C"], {})
    assert screened(three, 9.43, before) == (["A", "B"], {"C": "too large"})
    huge = [update(name, vector(value)) for name, value in (("A", 1e38), ("B", -1e38), ("C", 3e38))]  # squares: 1e76
    assert screened(huge, 2.5, vector(0)) == (["A", "B"], {"C": "too large"})


GOOD = raw_update("B", vector(1, 2)).payload


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "unreadable"),
        (b"no state at all", "unreadable"),
        (GOOD[:-40], "unreadable"),
        (GOOD[:100] + bytes(100) + GOOD[200:], "unreadable"),
        ([1.0, 2.0], "unreadable"),
        (torch.ones(2), "unreadable"),
        ({"w": None}, "unreadable"),
        ({"w": torch.nn.Linear}, "unreadable"),  # names code
        ({"w": torch.ones(2, device="meta")}, "unreadable"),
        ({"w": torch.ones(2).to_sparse()}, "unreadable"),
        ({}, "wrong shape"),
        ({"v": torch.ones(2)}, "wrong shape"),
        ({1: torch.ones(2)}, "wrong shape"),
        ({**vector(1, 2), "v": torch.ones(1)}, "wrong shape"),
        (vector(1, 2, 3), "wrong shape"),
        ({"w": torch.ones(1, 2)}, "wrong shape"),
        ({"w": torch.tensor(1.0)}, "wrong shape"),
        ({"w": torch.tensor([1, 2])}, "wrong shape"),  # integers: `average` refuses them
        ({"w": torch.tensor([1j, 2])}, "wrong shape"),
        (vector(1, float("nan"), 3), "wrong shape"),  # the first reason that holds
        (vector(1, float("nan")), "not finite"),
        (vector(float("-inf"), 1), "not finite"),
        ({"w": torch.tensor([1, float("inf")], dtype=torch.float16)}, "not finite"),
        ({"w": torch.tensor([1, 1e300], dtype=torch.float64)}, "not finite"),  # as a float32 it is
        (GOOD, None),
        ({"w": torch.tensor([1, 2], dtype=torch.float16)}, None),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about reading sparse tensors
def test_what_cannot_be_averaged_is_left_out_with_the_first_reason(sent, reason):
    odd = Update("B", sent, 1, 1, 1, 0.5) if isinstance(sent, bytes) else raw_update("B", sent)
    kept, reasons = screened([*at(A=1), odd, *at(C=1)])
    assert (kept, reasons) == ((["A", "C"], {"B": reason}) if reason else (["A", "B", "C"], {}))
    for above in (1.5, 3.0):  # nor has it a say in the median: of two
        assert screened([*at(A=1), odd, *at(C=100)], above)[1].get("C") == (None if reason else "too large")


def test_every_bad_one_has_its_reason_and_the_rest_can_be_averaged():
    bad = [
        raw_update("b", vector(1, float("nan"))),
        Update("d", b"?", 1, 1, 1, 0.5),
        raw_update("f", vector(1)),
        *at(B=1000),
    ]
    kept, reasons = federation.screen([bad[3], *at(g=1), bad[2], *at(c=1.25), bad[1], bad[0], *at(a=1.5)], BEFORE, 3.0)
    assert [u.client for u in kept] == ["g", "c", "a"]  # as they came
    assert list(reasons.items()) == [("B", "too large"), ("b", "not finite"), ("d", "unreadable"), ("f", "wrong shape")]
    assert average(kept)["w"].tolist() == pytest.approx([1 + 0.6 * 1.25, 1 + 0.8 * 1.25])
    assert federation.screen([], BEFORE, 3.0) == ([], {})


far_or_broken = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 1000.0, None]), max_size=7)


@given(far_or_broken, st.sampled_from([0.0, 1.25, 2.0, 10.0]), st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_nothing(far, above, random):
    """None: not finite. The oracle is a sorted list."""
    names = "ABCDEFG"[: len(far)]
    updates = [
        raw_update(name, vector(1, float("nan"))) if d is None else at(**{name: d})[0]
        for name, d in zip(names, far, strict=True)
    ]
    straight = screened(updates, above)
    mixed = random.sample(updates, len(updates))
    kept, reasons = screened(mixed, above)
    assert list(reasons.items()) == list(straight[1].items()) and sorted(kept) == straight[0]
    assert kept == [u.client for u in mixed if u.client not in reasons]
    ordered = sorted(d for d in far if d is not None)
    half = len(ordered) // 2
    median = (ordered[half] + ordered[~half]) / 2 if ordered else 0
    most = above * median if above and len(ordered) >= 3 else float("inf")
    wanted = {name for name, d in zip(names, far, strict=True) if d is not None and d > most * (1 + 1e-6)}
    assert {name for name, reason in reasons.items() if reason == "too large"} == wanted
    assert {name for name, reason in reasons.items() if reason == "not finite"} == {
        name for name, d in zip(names, far, strict=True) if d is None
    }


def test_a_real_round_loses_nobody_and_a_client_a_thousand_times_as_far_is_found(scenes):
    model = new_model()
    before = unpack(pack(state_of(model, sent_keys(model))))
    updates = [one_round(scenes, model, name, rows) for name, rows in (("A", (0, 1)), ("B", (2, 3)), ("C", (4, 5)))]
    assert screened(updates, 2.0, before) == (["A", "B", "C"], {})
    poisoned = {k: before[k] + 1000 * (v - before[k]) for k, v in unpack(updates[1].payload).items()}
    updates[1] = update("B", poisoned)
    assert screened(updates, 500.0, before) == (["A", "C"], {"B": "too large"})
    assert screened(updates, 0.0, before) == (["A", "B", "C"], {})


@pytest.mark.parametrize("above", [-1.0, 0.5, 1.0, float("inf"), float("nan")])
def test_a_limit_below_the_median_itself_is_refused(above):
    with pytest.raises(ValueError, match=rf"above must be 0 \(off\) or a finite number > 1 .*, got {above}"):
        federation.screen([], BEFORE, above)


def test_federated_training_learns(scenes):
    model, whole = new_model(), []
    for turn in range(4):
        with torch.no_grad():
            target = scenes.labels
            parts = model.loss(scenes.images.pixels, target.boxes, target.classes, target.ignore)
        whole.append(float(sum(parts.values())))
        updates = [
            one_round(scenes, model, name, rows, seed=turn, iterations=6)
            for name, rows in (("A", (0, 1, 2)), ("B", (3, 4, 5)))
        ]
        model.load_state_dict(average(updates), strict=False)
    assert whole[3] < 0.6 * whole[0] and whole[1] < whole[0]
