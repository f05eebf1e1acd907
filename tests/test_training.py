"""Training: batches, schedules and averages by hand, the same bytes from the same seed, cached features, divergence."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedal_utils.config import TrainingConfig
from fedal_utils.data import views
from fedal_utils.data import readers as data
from fedal_utils.detectors import base as detectors
from fedal_utils.detectors import classifiers, yolo
from fedal_utils.seeding import torch_rng_for
from fedal_utils.training import fit as training
from fedal_utils.training.fit import TrainingDiverged, draw_batches, embed, fit, learning_rate_factor, predict

PLAIN = TrainingConfig.of(batch=4, lr=1e-3, flip=0.0)


@pytest.fixture(scope="module")
def scenes():
    return data.digit_scenes(6, 1, (64, 64), classes=3)[0]


def new_model(detector="ssd", backbone="small", seed=0, **options):
    return detectors.build(detector, backbone, 3, (64, 64), torch_rng_for(seed, "weights"), width=16, **options)


def trained(scenes, recipe, iterations=None, detector="ssd", seed=0, **options):
    model = new_model(detector, **options)
    rows = list(fit(model, scenes.images, scenes.labels, recipe, torch_rng_for(seed, "fit"), iterations=iterations))
    return model, rows


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------ batches


@given(st.integers(1, 20), st.integers(1, 25), st.integers(1, 3))
def test_every_image_comes_once_an_epoch(count, batch, epochs):
    drawn = list(draw_batches(count, batch, epochs, None, torch_rng_for(0, "d")))
    assert len(drawn) == epochs * math.ceil(count / batch)
    for epoch in range(epochs):
        own = [(last, part) for e, last, part in drawn if e == epoch]
        assert sorted(torch.cat([part for _, part in own]).tolist()) == list(range(count))
        assert [last for last, _ in own] == [False] * (len(own) - 1) + [True]
        assert all(len(part) == batch for _, part in own[:-1])


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 15))
def test_fixed_iterations_are_full_batches_cut_from_whole_shuffles(count, batch, iterations):
    drawn = list(draw_batches(count, batch, None, iterations, torch_rng_for(0, "d")))
    assert [len(part) for _, _, part in drawn] == [batch] * iterations
    row = torch.cat([part for _, _, part in drawn])
    for shuffle in row.split(count):
        if len(shuffle) == count:
            assert sorted(shuffle.tolist()) == list(range(count))
        else:
            assert len(set(shuffle.tolist())) == len(shuffle)
    for step, (epoch, last, _) in enumerate(drawn):
        assert epoch == step * batch // count  # the pass in which the batch begins
        assert last == (step == iterations - 1 or (step + 1) * batch // count > epoch)


def test_shuffles_come_from_the_generator_and_differ_from_pass_to_pass():
    def row(seed):
        return torch.cat([p for _, _, p in draw_batches(30, 10, None, 6, torch_rng_for(seed, "d"))])

    assert torch.equal(row(0), row(0)) and not torch.equal(row(0), row(1))
    assert not torch.equal(row(0)[:30], row(0)[30:])


def test_nothing_to_train_on_is_an_error(scenes):
    with pytest.raises(ValueError, match="the set of labelled images is empty"):
        list(fit(new_model(), scenes.images.take([]), scenes.labels.take([]), PLAIN, torch_rng_for(0, "fit")))
    with pytest.raises(ValueError, match="2 images but labels for 3"):
        list(fit(new_model(), scenes.images.take([0, 1]), scenes.labels.take([0, 1, 2]), PLAIN, torch_rng_for(0, "f")))
    with pytest.raises(ValueError, match="either epochs or iterations, got epochs=1 and iterations=2"):
        list(draw_batches(3, 2, 1, 2, torch_rng_for(0, "d")))
    with pytest.raises(ValueError, match="no images to predict on"):
        predict(new_model(), scenes.images.take([]))


# ---------------------------------------------------------------------------------------------------------- schedules


def factors(steps=10, **options):
    return [learning_rate_factor(TrainingConfig.of(**options), step, steps) for step in range(steps)]


def test_constant_and_step_schedules_by_hand():
    assert factors(schedule="constant") == [1.0] * 10
    assert factors(schedule="step", step_at=(0.6, 0.85)) == pytest.approx([1] * 6 + [0.1] * 3 + [0.01])
    assert factors(schedule="step", step_at=()) == [1.0] * 10


def test_cosine_by_hand():
    got = factors(schedule="cosine", final_lr=0.2)
    assert got[0] == 1.0
    assert got[5] == pytest.approx(0.2 + 0.8 * 0.5)  # half way: cos(pi / 2) = 0
    assert learning_rate_factor(TrainingConfig.of(schedule="cosine", final_lr=0.2), 10, 10) == pytest.approx(0.2)
    assert all(a > b for a, b in zip(got, got[1:], strict=False))


def test_warm_up_by_hand_and_the_schedule_after_it():
    assert factors(warmup=3)[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    got = factors(12, warmup=2, schedule="cosine", final_lr=0.0)
    assert got[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert got[7] == pytest.approx(0.5)  # 5 of the 10 steps after the warm-up
    with pytest.raises(ValueError, match="schedule must be .* got 'poly'"):
        factors(schedule="poly")


def test_fit_follows_the_schedule(scenes, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def noted(self, *_, **__):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    trained(scenes, replace(PLAIN, warmup=1, schedule="step", step_at=(0.5,)), iterations=4)
    assert [lr for lr, *_ in seen] == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-4])
    assert all(len(set(rates)) == 1 for rates in seen)
    seen.clear()
    trained(scenes, replace(PLAIN, epochs=3, schedule="step", step_at=(0.5,)))  # 6 images in batches of 4: 6 steps
    assert [lr for lr, *_ in seen] == pytest.approx([1e-3] * 3 + [1e-4] * 3)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 5),  # 6 images in batches of 4: a pass has 2 steps
        ({"warmup_epochs": 0.0}, 5),
        ({"warmup_epochs": 1.0}, 2),
        ({"warmup_epochs": 1.5}, 3),
        ({"warmup_epochs": 2.0, "warmup": 1}, 1),  # a limit, no length
        ({"warmup_epochs": 9.0}, 5),
        ({"warmup_epochs": 0.2}, 0),
    ],
)
@pytest.mark.parametrize("steps", [7, None])
def test_a_warm_up_takes_no_more_steps_than_so_many_passes(scenes, monkeypatch, options, length, steps):
    seen = steps_taken(monkeypatch)
    recipe = replace(PLAIN, **{"optimizer": "sgd", "warmup": 5, "epochs": 4, **options})
    trained(scenes, recipe, iterations=steps)
    wanted = [1e-3 * min(1.0, (step + 1) / (length + 1)) for step in range(steps or 8)]
    assert [s["lr"][0] for s in seen] == pytest.approx(wanted)


# ---------------------------------------------------------------------------------------------------------- optimiser


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_weight_decay_is_for_weights_and_not_for_norms_and_biases(scenes, optimiser):
    base = replace(PLAIN, optimizer=optimiser, momentum=0.5, weight_decay=0.0)
    start, (without, _), (decayed, _) = (
        new_model(),
        trained(scenes, base, 1),
        trained(scenes, replace(base, weight_decay=0.2), 1),
    )
    # AdamW: w loses lr * decay * w. SGD with Nesterov: the first step is (1 + momentum) times the gradient.
    factor = 1e-3 * 0.2 * (1.5 if optimiser == "sgd" else 1.0)
    for (name, w), a, b in zip(start.named_parameters(), without.parameters(), decayed.parameters(), strict=True):
        if w.dim() <= 1:
            assert torch.equal(a, b), name
        else:
            assert torch.allclose(a - b, factor * w, atol=2e-7), name
            assert not torch.equal(a, b), name
    with pytest.raises(ValueError, match="optimiser must be 'sgd' or 'adamw', got 'lion'"):
        trained(scenes, replace(PLAIN, optimizer="lion"), 1)


# ------------------------------------------------------------------------------ what lives on from one call to the next


@pytest.fixture(scope="module")
def one_image(scenes):
    """Each batch is this image, so that nothing but the optimiser and the schedule depends on the call."""
    return scenes.take([0])


def calls(part, recipe, steps, model=None, memory=None, whole=None, before=0):
    """One call of `fit` for each entry of steps; with `whole`, one schedule over all of them."""
    model = model or new_model()
    for number in steps:
        span = None if whole is None else (before, whole)
        rng = torch_rng_for(0, "fit")
        list(fit(model, part.images, part.labels, recipe, rng, number, memory=memory, span=span))
        before += number
    return model


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", [{"schedule": "constant", "warmup": 4}, {"schedule": "cosine", "warmup": 1}])
def test_two_calls_with_memory_and_span_are_one_long_call_bit_for_bit(one_image, optimiser, schedule):
    recipe = replace(PLAIN, optimizer=optimiser, lr=1e-2, **schedule)
    one, parts = {}, {}
    long = calls(one_image, recipe, [6], memory=one)
    short = calls(one_image, recipe, [3, 3], memory=parts, whole=6)
    assert same(long, short) and same(long, calls(one_image, recipe, [1, 4, 1], memory={}, whole=6))
    assert one.keys() == parts.keys() and all(torch.equal(one[k], parts[k]) for k in one) and int(one["steps"]) == 6
    assert same(long, calls(one_image, recipe, [6])), "to remember changes nothing in a single call"
    for forgetful in ({"whole": 6}, {"memory": {}}, {}):  # no moments; no place in the schedule; neither
        assert not same(long, calls(one_image, recipe, [3, 3], **forgetful)), forgetful


@pytest.mark.parametrize(
    ("optimiser", "moments"), [("sgd", {"momentum_buffer"}), ("adamw", {"exp_avg", "exp_avg_sq", "step"})]
)
def test_memory_holds_each_trained_parameters_moments_and_none_of_a_frozen_one(one_image, optimiser, moments):
    model, memory = new_yolo(), {}
    model.freeze_backbone()
    calls(one_image, replace(PLAIN, optimizer=optimiser), [2], model, memory)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith("backbone.") for name in trained)
    assert set(memory) == {f"{moment}:{name}" for moment in moments for name in trained} | {"steps"}
    assert int(memory["steps"]) == 2


def test_memory_is_as_it_was_if_training_raises(one_image):
    memory = {}
    model = calls(one_image, PLAIN, [2], memory=memory)
    before = {k: v.clone() for k, v in memory.items()}
    broken = replace(one_image.labels, boxes=one_image.labels.boxes * float("nan"))
    with pytest.raises(TrainingDiverged):
        list(fit(model, one_image.images, broken, PLAIN, torch_rng_for(0, "fit"), iterations=2, memory=memory))
    assert memory.keys() == before.keys() and all(torch.equal(memory[k], before[k]) for k in before)
    calls(one_image, PLAIN, [1], model, memory, whole=3, before=2)
    assert int(memory["steps"]) == 3 and any(
        not torch.equal(memory[k], before[k]) for k in before if k[:7] == "exp_avg"
    )


def steps_taken(monkeypatch, optimizer=torch.optim.SGD):
    """What every step of an optimiser saw: learning rates and momentum of its groups, and all gradients."""
    seen, step = [], optimiser.step

    def noted(self, *_, **__):
        groups = self.param_groups
        seen.append(
            {
                "lr": [g["lr"] for g in groups],
                "momentum": [g.get("momentum") for g in groups],
                "gradients": [p.grad.clone() for g in groups for p in g["params"]],
            }
        )
        return step(self)

    monkeypatch.setattr(optimiser, "step", noted)
    return seen


def test_warm_up_of_momentum_and_biases_by_hand(one_image, monkeypatch):
    """Van Bommel, section 3: momentum 0.8 -> 0.937, bias lr 0.1 -> lr, other lr 0 -> lr; here in rounder numbers."""
    seen = steps_taken(monkeypatch)
    recipe = replace(PLAIN, optimizer="sgd", lr=0.01, momentum=0.9, warmup=4, warmup_momentum=0.5, warmup_bias_lr=0.1)
    calls(one_image, recipe, [6])
    assert [s["lr"][0] for s in seen] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    assert [s["lr"][1] for s in seen] == [s["lr"][0] for s in seen]
    assert [s["lr"][2] for s in seen] == pytest.approx([0.1, 0.0775, 0.055, 0.0325, 0.01, 0.01])
    for s, momentum in zip(seen, [0.5, 0.6, 0.7, 0.8, 0.9, 0.9], strict=True):
        assert s["momentum"] == pytest.approx([momentum] * 3)
    whole = seen[:]
    seen.clear()
    calls(one_image, recipe, [2, 2], memory={}, whole=6, before=2)  # from the middle of a schedule on
    assert [(s["lr"], s["momentum"]) for s in seen] == [(s["lr"], s["momentum"]) for s in whole[2:]]
    seen.clear()
    calls(one_image, replace(recipe, warmup=0), [2])  # no warm-up: nothing to start from
    assert [(s["lr"], s["momentum"]) for s in seen] == [([0.01] * 3, [0.9] * 3)] * 2


def new_yolo():
    return yolo.build(3, (64, 64), torch_rng_for(0, "weights"), depth=0.1, width=0.125, norm="group", anchor_scale=0.7)


def test_gradients_of_nominal_images_add_up_to_those_of_the_bigger_batch(one_image, monkeypatch):
    """YOLO's loss is B times a mean, so two batches of one image are a batch of two."""
    seen = steps_taken(monkeypatch)
    plain = replace(PLAIN, optimizer="sgd", clip=0.0)
    calls(one_image, replace(plain, batch=2), [2], new_yolo())
    bigger = seen[:]
    seen.clear()
    calls(one_image, replace(plain, batch=1, nominal=2), [4], new_yolo())
    assert len(seen) == len(bigger) == 2
    for ours, theirs in zip(seen, bigger, strict=True):
        for a, b in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max() + 1))
    seen.clear()
    calls(one_image, replace(plain, batch=1), [1], new_yolo())
    single = max(float(g.abs().max()) for g in seen[0]["gradients"])
    assert max(float(g.abs().max()) for g in bigger[0]["gradients"]) == pytest.approx(2 * single, rel=1e-3)


def test_the_number_of_batches_in_a_step_grows_over_the_warm_up_by_hand(one_image, monkeypatch):
    """Section 3: 1 -> nominal / batch. 1 + 3 step / 6, rounded: 1, 2, 2, 2, 3, 4, then 4; what is left makes a step."""
    seen, model = steps_taken(monkeypatch), new_model()
    batches, at = [], []
    loss = model.loss
    model.loss = lambda *inputs: (at.append(len(seen)), batches.append(1), loss(*inputs))[2]
    calls(one_image, replace(PLAIN, optimizer="sgd", batch=1, nominal=4, warmup=6), [14], model)
    after = [*at[1:], len(seen)]
    assert [batch for batch, (a, b) in enumerate(zip(at, after, strict=True)) if b > a] == [0, 2, 6, 10, 13]
    seen.clear()
    calls(one_image, replace(PLAIN, optimizer="sgd", batch=4, nominal=4), [3])
    assert len(seen) == 3
    seen.clear()
    calls(one_image, replace(PLAIN, optimizer="sgd", batch=4, nominal=2), [3])  # less than a batch: a batch
    assert len(seen) == 3


def moved(scenes, recipe):
    start, (end, _) = new_model(), trained(scenes, recipe, 1)
    pairs = zip(start.parameters(), end.parameters(), strict=True)
    return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))


def test_a_gradient_is_clipped_to_the_norm_that_was_given():
    scenes = data.digit_scenes(6, 1, (64, 64), classes=3)[0]
    plain = replace(PLAIN, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1)
    assert moved(scenes, replace(plain, clip=0.5)) == pytest.approx(0.1 * 0.5, rel=1e-3)  # lr x norm
    free = moved(scenes, replace(plain, clip=0.0))
    assert free > 0.06
    assert moved(scenes, replace(plain, clip=1e6)) == pytest.approx(free, rel=1e-4)


@pytest.mark.parametrize("detector", ["ssd", "faster_rcnn"])
def test_an_evidence_head_is_clipped_by_itself_and_slows_nobody(scenes, detector):
    recipe = replace(PLAIN, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1, clip=0.25)
    start = new_model(detector, evidence=True).state_dict()
    with_it, without = (trained(scenes, recipe, 1, detector, evidence=e)[0].state_dict() for e in (True, False))
    assert all(torch.equal(v, with_it[k]) for k, v in without.items())
    heads = {k for k in with_it if "evidence_head" in k}
    assert heads == with_it.keys() - without.keys() and heads
    for names in (heads, without.keys()):
        norm = math.sqrt(sum(float((with_it[k] - start[k]).square().sum()) for k in names))
        assert norm == pytest.approx(0.1 * 0.25, rel=1e-3)  # both would have gone further


def test_a_loss_head_and_an_evidence_head_are_clipped_each_by_itself(scenes):
    recipe = replace(PLAIN, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1, clip=0.05)
    both = dict(box_loss_head=True, image_loss_head=True)
    start, end = new_model(**both).state_dict(), trained(scenes, recipe, 1, **both)[0].state_dict()
    plain = trained(scenes, recipe, 1)[0].state_dict()
    assert all(torch.equal(v, end[k]) for k, v in plain.items())
    names = {head: {k for k in end if k.startswith(head)} for head in ("evidence_head", "loss_head")}
    assert set.union(*names.values()) == end.keys() - plain.keys()
    for own in (*names.values(), plain.keys()):
        norm = math.sqrt(sum(float((end[k] - start[k]).square().sum()) for k in own))
        assert norm == pytest.approx(0.1 * 0.05, rel=1e-3)  # each would have gone further


def test_a_loss_head_learns_to_rank_and_training_is_what_it_is_without_it(scenes):
    """AdamW, clipping, warm-up and an average of the weights: every other weight is the same to the last bit."""
    recipe = replace(PLAIN, batch=6, lr=5e-3, ema=0.5, warmup=3, schedule="cosine")
    assert recipe.clip > 0 and recipe.optimizer == "adamw"
    target = scenes.labels
    model, (first, *_) = trained(scenes, recipe, 60, learned_loss=True)
    plain, (wanted, *_) = trained(scenes, recipe, 60)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    assert first["classification"] == wanted["classification"] and first["loss"] > wanted["loss"]
    untrained = new_model(learned_loss=True)
    idle = {k: v for k, v in untrained.state_dict().items() if k.startswith("loss_head")}
    untrained.load_state_dict(state | idle)  # the same detector under a head that has not learned
    with torch.no_grad():
        start, end = (
            m.loss(scenes.images.pixels, target.boxes, target.classes, target.ignore)["ranking"].item()
            for m in (untrained, model)
        )
    assert 0.95 < start and end < 0.85 and first["ranking"] > 0.95  # predictions that are all alike: the margin, 1
    true = sum(training.image_losses(model, scenes.images, target.boxes, target.classes, target.ignore).values())
    learned = training.learned_losses(model, scenes.images)
    pairs = [(i, j) for i in range(6) for j in range(6) if true[i] > true[j]]
    assert sum(bool(learned[i] > learned[j]) for i, j in pairs) >= 12  # of 15


def test_a_loss_head_that_breaks_is_a_divergence_with_the_clients_name(scenes):
    model = new_model(learned_loss=True)
    with torch.no_grad():
        model.loss_head.joint.weight[0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match="client 3: loss is nan .*ranking nan"):
        list(fit(model, scenes.images, scenes.labels, PLAIN, torch_rng_for(0, "fit"), who="3"))


def test_the_moving_average_of_weights_by_hand_for_two_steps(scenes):
    start = new_model().state_dict()
    one, two = (trained(scenes, PLAIN, n)[0].state_dict() for n in (1, 2))
    averaged = trained(scenes, replace(PLAIN, ema=0.2), 2)[0].state_dict()
    # decay min(0.2, (1 + n) / (10 + n)): 2/11 after the first step, 0.2 after the second (3/12 would be more)
    for key, w0 in start.items():
        mean = 2 / 11 * w0.double() + 9 / 11 * one[key].double()
        mean = 0.2 * mean + 0.8 * two[key].double()
        assert torch.allclose(averaged[key].double(), mean, atol=1e-6), key
    assert not torch.allclose(
        averaged["head.classification_head.module_list.0.bias"],
        two["head.classification_head.module_list.0.bias"],
        atol=1e-6,
    )


def test_the_moving_average_keeps_batch_norms_counter_an_integer(scenes):
    model, _ = trained(scenes, replace(PLAIN, ema=0.9), 3, norm="batch")
    counters = [v for k, v in model.state_dict().items() if "num_batches" in k]
    assert counters and all(v.dtype == torch.int64 and int(v) == 3 for v in counters)


# ------------------------------------------------------------------------------------------------------------- FedProx


class Line(torch.nn.Module):
    """A "detector" of one weight, whose loss is 2 w whatever it sees: the gradient is 2 at every step.

    It also has a frozen weight, one that the loss does not reach, and a buffer.
    """

    def __init__(self):
        super().__init__()
        self.w, self.idle = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        self.backbone = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("counter", torch.ones(1))

    def loss(self, *_):
        self.counter += 1
        return {"slope": 2 * (self.w * self.backbone).sum()}


def slide(one_image, steps, model=None, **options):
    """(w after these steps of SGD with lr 0.5 and mu 0.25, the losses that fit yielded: one of each step)."""
    model = model or Line()
    recipe = replace(PLAIN, batch=1, optimizer="sgd", lr=0.5, momentum=0.0, clip=0.0, proximal=0.25)
    rows = list(
        fit(model, one_image.images, one_image.labels, replace(recipe, **options), torch_rng_for(0, "fit"), steps)
    )
    return model.w.item(), [row["loss"] for row in rows]


def test_fedprox_1812_06127_eq_2_by_hand(one_image):
    # w0 = 1; w1 = 1 - .5 x 2 = 0; w2 = 0 - 1 - .5 x .25 x (0 - 1) = -.875; w3 = -.875 - 1 - .125 x -1.875 = -1.640625
    assert [slide(one_image, steps)[0] for steps in (1, 2, 3)] == [0.0, -0.875, -1.640625]
    assert [slide(one_image, steps, proximal=0.0)[0] for steps in (1, 2, 3)] == [0.0, -1.0, -2.0]
    assert slide(one_image, 400)[0] == pytest.approx(1 - 2 / 0.25)  # where 2 + mu (w - w0) = 0


def test_the_loss_that_is_yielded_is_without_the_proximal_term(one_image):
    assert slide(one_image, 3)[1] == [2.0, 0.0, -1.75]  # 2 w at 1, 0 and -.875


def test_the_proximal_term_is_not_clipped_with_the_losss_gradient(one_image):
    # the gradient 2 is clipped to 1/2: w1 = 1 - 1/4; w2 = .75 - .25 - .125 x (.75 - 1) = .53125
    assert slide(one_image, 2, clip=0.5)[0] == pytest.approx(0.53125, abs=1e-6)
    assert slide(one_image, 2, clip=0.5, proximal=0.0)[0] == pytest.approx(0.5, abs=1e-6)
    # mu 4: w2 = .75 - .25 - .5 x 4 x -.25 = 1; were the sum of -1 and 1/2 clipped, it would be elsewhere
    assert slide(one_image, 2, clip=0.5, proximal=4.0)[0] == pytest.approx(1.0, abs=1e-6)


def test_a_step_of_several_batches_sees_the_proximal_term_once(one_image):
    # two batches a step, gradients 2 + 2: w1 = 1 - 2 = -1; w2 = -1 - 2 - .125 x (-1 - 1) = -2.75
    assert slide(one_image, 4, nominal=2)[0] == -2.75


@pytest.mark.parametrize(("clip", "wanted"), [(0.0, -0.875), (0.5, 0.53125)])
def test_the_proximal_term_is_not_scaled_as_half_precision_scales_the_loss(one_image, monkeypatch, clip, wanted):
    def scaled(*_):
        return torch.autocast("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=1024.0)

    monkeypatch.setattr(training, "_autocast", scaled)
    assert slide(one_image, 2, clip=clip)[0] == pytest.approx(wanted, abs=1e-6)


def test_the_anchor_is_what_the_call_began_with(one_image):
    model = Line()
    assert [slide(one_image, 1, model)[0] for _ in range(3)] == [0.0, -1.0, -2.0]  # at the anchor there is no pull
    assert slide(one_image, 2, model)[0] == -2 - 1.875


def test_frozen_weights_buffers_and_weights_out_of_reach_have_no_proximal_term(one_image):
    model = Line()
    assert [p is model.w or p is model.idle for p, _ in training._anchored(model, TrainingConfig.of(proximal=1.0))] == [True] * 2
    assert training._anchored(model, TrainingConfig.of()) == []
    slide(one_image, 3, model)
    assert model.idle.item() == model.backbone.item() == 1.0 and model.counter.item() == 4.0
    detector = new_yolo()
    detector.freeze_backbone()
    trained = {id(p) for name, p in detector.named_parameters() if not name.startswith("backbone.")}
    anchored = training._anchored(detector, TrainingConfig.of(proximal=1.0))
    assert {id(p) for p, _ in anchored} == trained and all(torch.equal(p, sent) for p, sent in anchored)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    calls(one_image, replace(PLAIN, proximal=10.0), [3], detector)
    assert {k for k, v in detector.state_dict().items() if torch.equal(v, before[k])} == {
        k for k in before if k.startswith("backbone.")
    }


def distance(a, b):
    return math.sqrt(sum(float((x - y).detach().double().square().sum()) for x, y in zip(a, b, strict=True)))


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_second_step_of_a_detector_goes_further_by_lr_mu_and_the_way_it_came(scenes, clip):
    """With clipping, too: of the first gradient, whose norm is above a half, and of the second."""
    recipe = replace(PLAIN, optimizer="sgd", momentum=0.0, lr=0.1, clip=clip)
    pulled = replace(recipe, proximal=3.0)
    w0, w1, w2, got = (
        [p.detach() for p in model.parameters()]
        for model in (new_model(), *(trained(scenes, r, n)[0] for r, n in ((recipe, 1), (recipe, 2), (pulled, 2))))
    )
    assert all(torch.allclose(d - c, -0.1 * 3 * (b - a), atol=3e-7) for a, b, c, d in zip(w0, w1, w2, got, strict=True))
    assert distance(got, w2) > 0.01


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_without_mu_no_bit_changes_and_with_it_the_first_step_is_the_same(scenes, monkeypatch, optimiser):
    recipe = replace(PLAIN, optimizer=optimiser, ema=0.5, warmup=2)
    first, rows = trained(scenes, replace(recipe, proximal=7.0), 1)
    plain, wanted = trained(scenes, recipe, 1)
    assert same(first, plain) and rows == wanted  # w is w_t
    third, pulled = (trained(scenes, replace(recipe, proximal=mu), 3)[0] for mu in (0.0, 7.0))
    seen = []
    monkeypatch.setattr(training, "_pull_back", lambda anchored, _: seen.extend(anchored))  # and adds nothing
    assert same(trained(scenes, recipe, 3)[0], third) and seen == [] and not same(third, pulled)


@pytest.mark.parametrize(("optimiser", "mus"), [("sgd", (0.0, 1.0, 5.0)), ("adamw", (0.0, 10.0, 1000.0))])
def test_the_larger_mu_the_nearer_the_weights_stay(scenes, optimiser, mus):
    recipe = replace(PLAIN, optimizer=optimiser, momentum=0.0, lr=0.1 if optimiser == "sgd" else 1e-3)
    start = list(new_model().parameters())
    far, near, nearest = (
        distance(start, trained(scenes, replace(recipe, proximal=mu), 12)[0].parameters()) for mu in mus
    )
    assert 0 < nearest < 0.8 * near and near < 0.8 * far


# Classifiers. Three clients whose stacks are made anew when one of them is done: 6, 2 and 4 steps in two passes.
SGD = TrainingConfig.of(batch=6, optimizer="sgd", lr=0.05, momentum=0.0, weight_decay=0.0, clip=0.0, crop=1, epochs=2)


@pytest.fixture(scope="module")
def crops():
    pixels = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8, generator=torch_rng_for(0, "pixels"))
    return data.Images(tuple(map(str, range(60))), pixels, torch.full((60, 2), 16))


def lessons():
    targets = [torch.arange(count) % 3 for count in (14, 5, 7)]
    return [
        training.Lesson(
            who,
            np.arange(start, start + len(target)),
            target,
            torch.bincount(target, minlength=4),
            np.arange(50, 59),
            torch_rng_for(3, who),
        )
        for who, start, target in zip("abc", (0, 20, 30), targets, strict=True)
    ]


def new_classifier(seed=0):
    return classifiers.build("resnet8", 4, (16, 16), torch_rng_for(seed, "weights"))


def taught(crops, recipe, iterations=None, together=False, teacher=None):
    start = new_classifier()
    if together:
        states = [{k: v for k, v in start.state_dict().items() if v.dim()}] * 3
        return training.fit_stacked(start, states, lessons(), crops, recipe, iterations, teacher, most=3)
    return [training.fit_classifier(copy.deepcopy(start), one, crops, recipe, iterations, teacher) for one in lessons()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 1.0, "momentum": 0.9, "weight_decay": 5e-4},
        {"distillation_weight": 1.0, "balanced_softmax": True, "clip": 1.0},
    ],
)
def test_stacked_clients_are_pulled_back_as_they_are_one_after_another(crops, options):
    recipe = replace(SGD, proximal=8.0, **options)
    teacher = new_classifier(9) if "compensation" in options else None
    one, other = (taught(crops, recipe, together=together, teacher=teacher) for together in (True, False))
    free = taught(crops, replace(recipe, proximal=0.0), teacher=teacher)
    tolerance = dict(rtol=2e-3, atol=2e-5)  # that of test_stacking.py
    assert [t.steps for t in one] == [6, 2, 4]
    for a, b, c in zip(one, other, free, strict=True):
        assert a.steps == b.steps and a.loss == pytest.approx(b.loss, rel=1e-3)
        for key, value in b.state.items():
            torch.testing.assert_close(a.state[key], value, **tolerance)
        assert sum(not torch.allclose(c.state[key], value, **tolerance) for key, value in b.state.items()) > 10


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_second_step_of_a_classifier_goes_further_by_lr_mu_and_the_way_it_came(crops, clip, together):
    plain = replace(SGD, clip=clip)
    pulled = replace(plain, proximal=4.0)
    w0 = {k: v.detach() for k, v in new_classifier().named_parameters()}
    runs = ((plain, 1), (plain, 2), (pulled, 1), (pulled, 2))
    for w1, w2, same_first, got in zip(*(taught(crops, r, n, together) for r, n in runs), strict=True):
        assert all(torch.equal(v, same_first.state[k]) for k, v in w1.state.items())  # at the anchor there is no pull
        for k, v in w0.items():
            way = w1.state[k] - v
            torch.testing.assert_close(got.state[k] - w2.state[k], -0.05 * 4 * way, rtol=0, atol=3e-7)
        assert distance([got.state[k] for k in w0], [w2.state[k] for k in w0]) > 0.003
        assert got.loss == w2.loss  # that of both steps, without the term


@pytest.mark.parametrize("together", [True, False])
def test_the_larger_mu_the_nearer_a_classifier_stays(crops, together):
    start = dict(new_classifier().named_parameters())
    far, near, nearest = (
        [
            distance(start.values(), [t.state[k] for k in start])
            for t in taught(crops, replace(SGD, proximal=mu), 8, together)
        ]
        for mu in (0.0, 2.0, 8.0)
    )
    assert all(0 < c < 0.9 * b and b < 0.9 * a for a, b, c in zip(far, near, nearest, strict=True))


# ------------------------------------------------------------------------------------------------------ rows and bytes


def test_rows_count_steps_and_hold_the_mean_of_each_part(scenes):
    rows = trained(scenes, replace(PLAIN, epochs=3))[1]
    assert [row["epoch"] for row in rows] == [0, 1, 2] and [row["steps"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["loss"] == pytest.approx(row["classification"] + row["regression"], rel=1e-5)
    assert len({row["loss"] for row in rows}) == 3
    assert trained(scenes, PLAIN, iterations=5)[1][-1]["steps"] == 5
    single = trained(scenes, replace(PLAIN, batch=6), iterations=2)[1]  # one step a pass: its mean is its loss
    model = new_model()
    order = next(iter(draw_batches(6, 6, None, 2, torch_rng_for(0, "fit"))))[2]
    target = scenes.labels.take(order)
    with torch.no_grad():
        loss = model.loss(scenes.images.batch(order), target.boxes, target.classes, target.ignore)
    assert single[0]["loss"] == pytest.approx(float(sum(loss.values())), rel=1e-4)


@pytest.mark.parametrize("detector", ["ssd", "faster_rcnn"])
def test_the_same_seed_gives_the_same_bytes_whatever_ran_before(scenes, detector):
    recipe = replace(PLAIN, flip=0.5, colour=0.3, zoom=(0.8, 1.2), shift=0.1, ema=0.9, schedule="cosine")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, rows_a = trained(scenes, recipe, 3, detector)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    torch.rand(17)
    b, rows_b = trained(scenes, recipe, 3, detector)
    assert rows_a == rows_b and same(a, b)
    assert not same(a, trained(scenes, recipe, 3, detector, seed=1)[0])


def test_fit_remembers_nothing_from_one_call_to_the_next(scenes):
    model, rng = new_model(), torch_rng_for(0, "fit")
    list(fit(model, scenes.images, scenes.labels, PLAIN, rng, iterations=2))
    twin = detectors.clone(model)
    a = list(fit(model, scenes.images, scenes.labels, PLAIN, torch_rng_for(1, "fit"), iterations=2))
    b = list(fit(twin, scenes.images, scenes.labels, PLAIN, torch_rng_for(1, "fit"), iterations=2))
    assert a == b and same(model, twin)
    assert not model.training  # left ready to predict


def test_a_flip_moves_boxes_with_their_pixels(scenes):
    mirrored = data.Images(scenes.images.ids, scenes.images.pixels.flip(-1), scenes.images.sizes)
    labels = scenes.labels.flip(torch.ones(6, dtype=torch.bool), 64)
    recipe = replace(PLAIN, batch=6)
    always, never = (
        list(fit(new_model(), images, target, replace(recipe, flip=flip), torch_rng_for(0, "fit"), iterations=2))
        for images, target, flip in ((scenes.images, scenes.labels, 1.0), (mirrored, labels, 0.0))
    )
    plain = trained(scenes, recipe, 2)[1]
    assert always == never and always != plain


def test_bfloat16_on_a_cpu_trains_and_stays_near_float32(scenes):
    full, half = (trained(scenes, replace(PLAIN, amp=amp), 3)[1][-1]["loss"] for amp in (False, True))
    assert math.isfinite(half) and half != full and half == pytest.approx(full, rel=0.1)
    model, _ = trained(scenes, replace(PLAIN, amp=True), 1)
    assert all(p.dtype == torch.float32 for p in model.parameters())


# --------------------------------------------------------------------------------------------------------- divergence


def test_a_nan_loss_names_the_client_and_the_image_and_spoils_no_weight(scenes):
    labels = replace(scenes.labels, boxes=scenes.labels.boxes.clone())
    labels.boxes[3, 0, 2] = float("nan")
    assert labels.classes[3, 0] > 0
    model = new_model()
    with pytest.raises(TrainingDiverged, match=r"client 07: loss is nan .*regression nan.*'train-00003'") as caught:
        list(fit(model, scenes.images, labels, replace(PLAIN, batch=1), torch_rng_for(0, "fit"), who="07"))
    assert isinstance(caught.value, ValueError) and "'train-00002'" not in str(caught.value)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_infinite_weight_names_itself_and_the_client(scenes):
    model = new_model()
    with torch.no_grad():
        model.neck.lateral[0][0].weight[0] = float("inf")
    with pytest.raises(TrainingDiverged, match="client 3: loss is nan"):
        list(fit(model, scenes.images, scenes.labels, PLAIN, torch_rng_for(0, "fit"), who="3"))
    model = new_model()
    model.register_buffer("unused", torch.tensor([1.0, float("inf")]))  # what the loss does not see
    with pytest.raises(TrainingDiverged, match="client 3: weight 'unused' is not finite after training"):
        list(fit(model, scenes.images, scenes.labels, PLAIN, torch_rng_for(0, "fit"), who="3", iterations=1))


def test_a_learning_rate_beyond_reason_diverges_with_the_clients_name(scenes):
    with pytest.raises(TrainingDiverged, match="client central"):
        trained(scenes, replace(PLAIN, lr=1e30, clip=0.0), 4)


# ---------------------------------------------------------------------------------------------------- cached features


@pytest.fixture(scope="module")
def cached(scenes):
    pytest.importorskip("timm")
    model = new_model(backbone="lite0", frozen=True)
    return training.cache_features(model, scenes.images)


def lite0(**options):
    return new_model(backbone="lite0", frozen=True, **options)


def test_cached_maps_are_the_maps_of_the_pixels_and_of_their_mirror_images(scenes, cached):
    model = lite0().eval()
    for pixels, maps in ((scenes.images.pixels, cached.features), (scenes.images.pixels.flip(-1), cached.mirrored)):
        for want, got in zip(model.features(pixels), maps, strict=True):
            assert got.dtype == torch.float16 and torch.allclose(got.float(), want, atol=2e-2, rtol=2e-3)
    flip = torch.tensor([True, False])
    for level, got in enumerate(cached.batch([4, 2], flip=flip)):
        assert torch.equal(got[0], cached.mirrored[level][4]) and torch.equal(got[1], cached.features[level][2])
    assert not torch.allclose(cached.mirrored[0], cached.features[0], atol=0.1)
    assert len(cached) == 6 and cached.ids == scenes.images.ids and cached.image_size == (64, 64)


@pytest.mark.parametrize("detector", ["ssd", "faster_rcnn"])
def test_training_on_cached_maps_equals_training_on_pixels(scenes, cached, detector):
    recipe = replace(PLAIN, flip=0.5)
    rows, models = [], []
    for images in (scenes.images, cached):
        model = lite0(detector=detector)
        rows.append(list(fit(model, images, scenes.labels, recipe, torch_rng_for(0, "fit"), iterations=3)))
        models.append(model)
    losses = [[row["loss"] for row in own] for own in rows]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]  # the second really saw half precision maps
    if detector == "ssd":
        a, b = (predict(models[1], images, score_above=0.01, top=5) for images in (scenes.images, cached))
        assert torch.allclose(a.scores[:, 0], b.scores[:, 0], atol=5e-3)


def test_cached_maps_take_rows_as_images_do(scenes, cached):
    mask = torch.tensor([False, True, False, False, True, False])
    for index in ([4, 1], mask, mask.numpy(), torch.tensor([5])):
        taken, wanted = cached.take(index), scenes.images.take(index)
        assert taken.ids == wanted.ids and torch.equal(taken.sizes, wanted.sizes)
        rows = [scenes.images.ids.index(i) for i in wanted.ids]
        assert torch.equal(taken.features[1], cached.features[1][rows])
        assert torch.equal(taken.mirrored[0], cached.mirrored[0][rows])
    for bad in ([-1], [6], [0.5]):
        with pytest.raises(ValueError, match="row"):
            cached.take(bad)
    assert torch.equal(cached.to("cpu").features[0], cached.features[0])


def test_what_cannot_be_cached_or_read_from_a_cache_is_an_error(scenes, cached):
    with pytest.raises(ValueError, match="only a frozen backbone's features can be cached"):
        training.cache_features(new_model(), scenes.images)
    plain = replace(cached, mirrored=None)
    assert len(plain.batch([0, 1], flip=torch.tensor([False, False]))) == 3
    with pytest.raises(ValueError, match="cached without their mirror images: set flip=0"):
        plain.batch([0, 1], flip=torch.tensor([False, True]))
    with pytest.raises(ValueError, match="this detector's backbone is trained"):
        list(fit(new_model(), cached, scenes.labels, PLAIN, torch_rng_for(0, "fit")))


# --------------------------------------------------------------------------------------------------------- prediction


def test_predictions_come_in_order_and_do_not_depend_on_the_batch(scenes):
    model = new_model()
    a, b = (predict(model, scenes.images, batch=n, score_above=0.02) for n in (4, 6))
    assert len(a) == 6 and torch.equal(a.labels, b.labels) and torch.allclose(a.boxes, b.boxes, atol=1e-3)
    backwards = predict(model, scenes.images.take([5, 4, 3, 2, 1, 0]), score_above=0.02)
    assert torch.allclose(backwards.scores[0][backwards.valid[0]], a.scores[5][a.valid[5]], atol=1e-5)
    assert a.valid.sum(1).min() > 0 and not torch.equal(a.scores[0], a.scores[5])
    few = predict(model, scenes.images, batch=4, score_above=0.02, top=2)
    assert few.boxes.shape[1] == 2


# ------------------------------------------------------------------------------------------------------------ embedding


@pytest.mark.parametrize("detector", ["ssd", "faster_rcnn", "yolo"])
def test_an_embedding_is_one_vector_an_image_in_order_whatever_the_batch(scenes, detector):
    model = new_yolo() if detector == "yolo" else new_model(detector)
    vectors = embed(model, scenes.images, batch=4)
    width = {"ssd": 64 + 96 + 128, "faster_rcnn": 128, "yolo": 32 + 64 + 128}[detector]
    assert vectors.shape == (6, width) and vectors.dtype == torch.float32 and torch.isfinite(vectors).all()
    assert not vectors.requires_grad and not model.training
    spread = (vectors[:, None] - vectors).abs().amax(2)
    assert spread[~torch.eye(6, dtype=torch.bool)].min() > 1e-3  # six images, six places
    order = [4, 0, 5, 2]
    for batch in (1, 3):  # nor does a vector depend on the other images
        again = embed(model, scenes.images.take(order), batch=batch)
        assert torch.allclose(again, vectors[order], atol=1e-4 * float(vectors.abs().max()))
    assert embed(model, scenes.images.take([])).shape == (0, 0)


def test_an_embedding_is_the_mean_of_each_map_by_hand(scenes):
    for model in (new_model(), new_yolo()):
        vectors = embed(model, scenes.images)
        with torch.no_grad():
            maps = model.eval().backbone(scenes.images.pixels)
        means = [[float(channel.mean()) for m in maps for channel in m[i]] for i in range(6)]
        assert torch.allclose(vectors, torch.tensor(means), atol=1e-5)


def test_faster_rcnns_embedding_weighs_proposals_by_their_foreground_by_hand(scenes):
    model = new_model("faster_rcnn").eval()
    with torch.no_grad():
        model.roi.box_predictor.cls_score.weight *= 30  # or all weights are much the same
        model.roi.box_predictor.cls_score.bias[0] += 4
        images, maps = model.pyramid(scenes.images.pixels)
        proposals, _ = model.rpn(images, maps)
        wanted = []
        for i, own in enumerate(proposals):
            features = model.roi.box_head(
                model.roi.box_roi_pool({k: m[i : i + 1] for k, m in maps.items()}, [own], images.image_sizes[:1])
            )
            scores = model.roi.box_predictor(features)[0].softmax(1)
            foreground = [1 - float(p[0]) for p in scores]
            weighed = sum(f * w for f, w in zip(features, foreground, strict=True))
            wanted.append(weighed / sum(foreground))
            assert max(foreground) > 2 * min(foreground)
    assert torch.allclose(embed(model, scenes.images), torch.stack(wanted), atol=1e-4)


def test_an_image_without_a_proposal_has_an_embedding_too(scenes):
    model = new_model("faster_rcnn").eval()
    found = model.rpn.forward

    def lost(images, maps):  # image 1 of every batch
        proposals, losses = found(images, maps)
        return [p[:0] if i == 1 else p for i, p in enumerate(proposals)], losses

    wanted = embed(model, scenes.images)
    model.rpn.forward = lost
    vectors = embed(model, scenes.images)
    assert not vectors[1].any() and torch.allclose(vectors[[0, 2, 3, 4, 5]], wanted[[0, 2, 3, 4, 5]], atol=1e-4)


@pytest.mark.parametrize("detector", ["ssd", "faster_rcnn"])
def test_cached_maps_have_the_embedding_of_their_pixels(scenes, cached, detector):
    model = lite0(detector=detector)
    maps, pixels = (embed(model, images, batch=4) for images in (cached, scenes.images))
    assert maps.dtype == torch.float32 and torch.allclose(maps, pixels, atol=2e-2 * float(pixels.abs().max()))
    apart = (pixels[:, None] - pixels).norm(dim=2)[~torch.eye(6, dtype=torch.bool)].min()
    assert (maps - pixels).norm(dim=1).max() < 0.2 * apart


# --------------------------------------------------------------------------------- losses, predicted and true, by image


@pytest.mark.parametrize("summed", [False, True])
def test_losses_of_many_images_are_those_of_each_in_order_whatever_the_batch(scenes, summed):
    model, target = new_model(learned_loss=True, norm="batch"), scenes.labels
    rows = target.boxes, target.classes, target.ignore
    viewed = views.Viewed(scenes.images, "flip")
    for images, x in ((scenes.images, scenes.images.pixels), (viewed, scenes.images.pixels.flip(-1))):
        model.train()  # both are asked in eval mode
        found = training.image_losses(model, images, *rows, batch=4, summed=summed)
        learned = training.learned_losses(model.train(), images, batch=4)
        assert not model.training and learned.shape == (6,)
        with torch.no_grad():
            wanted = model.image_losses(x, *rows, summed=summed)
        assert found.keys() == wanted.keys() and all(torch.allclose(found[k], wanted[k], rtol=1e-4) for k in wanted)
        assert torch.allclose(learned, model.predicted_loss(x), rtol=1e-4, atol=1e-5)
        for values in (*found.values(), learned):
            assert values.dtype == torch.float32 and len(set(values.tolist())) == 6 and not values.requires_grad


def test_losses_of_cached_maps_are_those_of_their_pixels(scenes, cached):
    model, target = lite0(learned_loss=True), scenes.labels
    rows = target.boxes, target.classes, target.ignore
    a, b = (training.image_losses(model, images, *rows, batch=4) for images in (cached, scenes.images))
    assert all(torch.allclose(a[k], b[k], rtol=2e-2) for k in b)
    a, b = (training.learned_losses(model, images, batch=4) for images in (cached, scenes.images))
    assert torch.allclose(a, b, atol=2e-2 * float(b.abs().max()))


def test_no_image_has_no_loss_and_targets_must_be_as_many_as_images(scenes):
    model, none = new_model(learned_loss=True), scenes.images.take([])
    rows = scenes.labels.boxes, scenes.labels.classes, scenes.labels.ignore
    assert training.learned_losses(model, none).shape == (0,)
    found = training.image_losses(model, none, *(t[:0] for t in rows))
    assert {k: v.shape for k, v in found.items()} == {"classification": (0,), "regression": (0,)}
    with pytest.raises(ValueError, match="5 images, but boxes for 6, classes for 6, ignore for 6"):
        training.image_losses(model, scenes.images.take([0, 1, 2, 3, 4]), *rows)
    with pytest.raises(ValueError, match="no head that learns an image's loss"):
        training.learned_losses(new_model(), scenes.images)
