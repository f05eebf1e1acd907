"""Training a detector: optimizer and averages by hand, the same bytes from the same seed, divergence."""

import math
from dataclasses import replace

import pytest
import torch

from fedal_utils import data, training
from fedal_utils.config import Config, TrainingConfig
from fedal_utils.detectors import build
from fedal_utils.seeding import torch_rng_for
from fedal_utils.training import LocalTask, TrainingDiverged
from fedal_utils.training.schedule import DETACHED_HEADS

PLAIN = TrainingConfig.of(batch=4, lr=1e-3, flip=0.0)
SGD = PLAIN.replace(optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1)


@pytest.fixture(scope="module")
def scenes():
    return data.digit_scenes(data.Digits((6, 1), 3))[0]


@pytest.fixture(scope="module")
def one_image(scenes):
    """Each batch is this image, so that nothing but the optimizer and the schedule depends on the call."""
    return scenes.take([0])


def new_model(detector="ssd", seed=0, **options):
    if detector == "yolo":
        options = {"depth_multiple": 0.1, "width_multiple": 0.125, "anchor_side": 7.0} | options
    return build(Config.of(detector=detector, **options), 3, torch_rng_for(seed, "weights"))


def fit(model, part, config, iterations=None, seed=0, **task):
    task = LocalTask(torch_rng_for(seed, "fit"), iterations=iterations, **task)
    return list(training.fit(model, part.images, part.labels, config, task))


def trained(scenes, config, iterations=None, detector="ssd", seed=0, **options):
    model = new_model(detector, **options)
    return model, fit(model, scenes, config, iterations, seed)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("limit", "length"), [(0.0, 5), (1.0, 2), (1.5, 3), (9.0, 5), (0.2, 0)])
def test_a_warm_up_takes_no_more_steps_than_so_many_passes(scenes, monkeypatch, limit, length):
    seen, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *_: (seen.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    trained(scenes, SGD.replace(lr=1e-3, warmup=5, warmup_epochs=limit), 7)  # 6 images in batches of 4: 2 steps a pass
    assert seen == pytest.approx([1e-3 * min(1.0, (step + 1) / (length + 1)) for step in range(7)])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_for_weights_and_not_for_norms_and_biases(scenes, optimizer):
    base = PLAIN.replace(optimizer=optimizer, momentum=0.5, weight_decay=0.0)
    start, without = new_model(), trained(scenes, base, 1)[0]
    decayed = trained(scenes, base.replace(weight_decay=0.2), 1)[0]
    # AdamW: w loses lr * decay * w. SGD with Nesterov: the first step is (1 + momentum) times the gradient.
    factor = 1e-3 * 0.2 * (1.5 if optimizer == "sgd" else 1.0)
    for (name, w), a, b in zip(start.named_parameters(), without.parameters(), decayed.parameters(), strict=True):
        if w.dim() <= 1:
            assert torch.equal(a, b), name
        else:
            assert torch.allclose(a - b, factor * w, atol=2e-7) and not torch.equal(a, b), name


def calls(part, config, steps, model=None, state=None, whole=None, before=0):
    """One call of `fit` for each entry of steps; with `whole`, one schedule over all of them."""
    model = model or new_model()
    for number in steps:
        position = None if whole is None else (before, whole)
        fit(model, part, config, number, optimizer_state=state, schedule_position=position)
        before += number
    return model


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", [{"schedule": "constant", "warmup": 4}, {"schedule": "cosine", "warmup": 1}])
def test_two_calls_with_state_and_position_are_one_long_call_bit_for_bit(one_image, optimizer, schedule):
    config = PLAIN.replace(optimizer=optimizer, lr=1e-2, **schedule)
    one, parts = {}, {}
    long = calls(one_image, config, [6], state=one)
    assert same(long, calls(one_image, config, [3, 3], state=parts, whole=6))
    assert one.keys() == parts.keys() and all(torch.equal(one[k], parts[k]) for k in one)
    assert int(one[training.STEPS]) == 6
    assert same(long, calls(one_image, config, [6])), "to keep a state changes nothing in a single call"
    for forgetful in ({"whole": 6}, {"state": {}}, {}):  # no moments; no place in the schedule; neither
        assert not same(long, calls(one_image, config, [3, 3], **forgetful)), forgetful


@pytest.mark.parametrize(
    ("optimizer", "moments"), [("sgd", {"momentum_buffer"}), ("adamw", {"exp_avg", "exp_avg_sq", "step"})]
)
def test_a_state_holds_each_trained_parameters_moments_and_none_of_a_frozen_one(one_image, optimizer, moments):
    model, state = new_model("yolo"), {}
    model.freeze_backbone()
    calls(one_image, PLAIN.replace(optimizer=optimizer), [2], model, state)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith("backbone.") for name in trained)
    assert set(state) == {f"{moment}:{name}" for moment in moments for name in trained} | {training.STEPS}


def test_a_state_is_as_it_was_if_training_raises(one_image):
    state = {}
    model = calls(one_image, PLAIN, [2], state=state)
    before = {k: v.clone() for k, v in state.items()}
    broken = replace(one_image, labels=replace(one_image.labels, boxes=one_image.labels.boxes * float("nan")))
    with pytest.raises(TrainingDiverged):
        fit(model, broken, PLAIN, 2, optimizer_state=state)
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


def test_heads_that_look_on_are_clipped_each_by_itself_and_slow_nobody(scenes):
    config = SGD.replace(clip=0.05)
    both = {"box_loss_head": True, "image_loss_head": True}
    start, end = new_model(**both).state_dict(), trained(scenes, config, 1, **both)[0].state_dict()
    plain = trained(scenes, config, 1)[0].state_dict()
    assert all(torch.equal(v, end[k]) for k, v in plain.items())
    names = {head: {k for k in end if k.startswith(head)} for head in DETACHED_HEADS}
    assert set.union(*names.values()) == end.keys() - plain.keys()
    for own in (*names.values(), plain.keys()):
        norm = math.sqrt(sum(float((end[k] - start[k]).square().sum()) for k in own))
        assert norm == pytest.approx(0.1 * 0.05, rel=1e-3)  # each would have gone further


def test_the_moving_average_of_weights_by_hand_for_two_steps(scenes):
    start = new_model(norm="batch").state_dict()
    one, two = (trained(scenes, PLAIN, n, norm="batch")[0].state_dict() for n in (1, 2))
    averaged = trained(scenes, PLAIN.replace(ema=0.2), 2, norm="batch")[0].state_dict()
    # decay min(0.2, (1 + n) / (10 + n)): 2/11 after the first step, 0.2 after the second (3/12 would be more)
    for key, w0 in start.items():
        if w0.is_floating_point():
            mean = 2 / 11 * w0.double() + 9 / 11 * one[key].double()
            mean = 0.2 * mean + 0.8 * two[key].double()
            assert torch.allclose(averaged[key].double(), mean, atol=1e-6), key
        else:
            assert averaged[key].dtype == torch.int64 and int(averaged[key]) == 2  # BatchNorm's counter
    assert not all(torch.allclose(averaged[k].float(), two[k].float(), atol=1e-6) for k in two)


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


@pytest.mark.parametrize(
    ("steps", "options", "wanted"),
    [
        (3, {}, -2.0),  # w0 = 1; w1 = 1 - .5 x 2 = 0
        (2, {"clip": 0.5}, 0.5),  # the gradient 2 is clipped to 1/2: w1 = .75
        (4, {"accumulate_to": 2}, -3.0),  # two batches a step: w1 = 1 - .5 x 4
    ],
)
def test_steps_of_sgd_by_hand(one_image, steps, options, wanted):
    model = Line()
    rows = fit(model, one_image, SGD.replace(**{"batch": 1, "lr": 0.5, "clip": 0.0, **options}), steps)
    assert model.w.item() == pytest.approx(wanted, abs=1e-5) and rows[0]["loss"] == 2.0
    assert model.idle.item() == model.backbone.item() == 1.0 and model.counter.item() == 1 + steps


def test_rows_count_steps_and_hold_the_mean_of_each_part(scenes):
    rows = trained(scenes, PLAIN.replace(epochs=3))[1]
    assert [row["epoch"] for row in rows] == [0, 1, 2] and [row["steps"] for row in rows] == [2, 4, 6]
    assert all(row["loss"] == pytest.approx(row["classification"] + row["regression"], rel=1e-5) for row in rows)
    single = trained(scenes, PLAIN.replace(batch=6), 2)[1]  # one step a pass: its mean is its loss
    order = next(iter(training.draw_batches(6, 6, None, 2, torch_rng_for(0, "fit"))))[2]
    target = scenes.labels.take(order)
    with torch.no_grad():
        loss = new_model().loss(scenes.images.batch(order), target.boxes, target.classes, target.ignore)
    assert single[0]["loss"] == pytest.approx(float(sum(loss.values())), rel=1e-4)


@pytest.mark.parametrize("detector", ["ssd", "faster_rcnn", "yolo"])
def test_the_same_seed_gives_the_same_bytes_whatever_ran_before(scenes, detector):
    config = PLAIN.replace(flip=0.5, colour=0.3, zoom=(0.8, 1.2), shift=0.1, mosaic=0.5, ema=0.9, schedule="cosine")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, rows_a = trained(scenes, config, 3, detector)
    assert torch.equal(torch.get_rng_state(), state) and not a.training
    torch.manual_seed(99)
    torch.rand(17)
    b, rows_b = trained(scenes, config, 3, detector)
    assert rows_a == rows_b and same(a, b)
    assert not same(a, trained(scenes, config, 3, detector, seed=1)[0])


def test_a_nan_loss_names_the_client_and_the_image_and_spoils_no_weight(scenes):
    boxes = scenes.labels.boxes.clone()
    boxes[3, 0, 2] = float("nan")
    model = new_model()
    with pytest.raises(TrainingDiverged, match=r"client 07: loss is nan .*regression nan.*'train-00003'") as caught:
        fit(model, replace(scenes, labels=replace(scenes.labels, boxes=boxes)), PLAIN.replace(batch=1), client="07")
    assert "'train-00002'" not in str(caught.value)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_infinite_weight_or_a_learning_rate_beyond_reason_names_the_client(scenes):
    model = new_model()
    model.register_buffer("unused", torch.tensor([1.0, float("inf")]))  # what the loss does not see
    with pytest.raises(TrainingDiverged, match="client 3: weight 'unused' is not finite after training"):
        fit(model, scenes, PLAIN, 1, client="3")
    with pytest.raises(TrainingDiverged, match="client central"):
        trained(scenes, PLAIN.replace(lr=1e30, clip=0.0), 4)
