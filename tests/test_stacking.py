"""All clients at once: the stacked trainer against one client after another; KAFAL's distillation by a slow oracle."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedal_utils import seeding
from fedal_utils.config import TrainingConfig
from fedal_utils.data import augment
from fedal_utils.data.readers import Images
from fedal_utils.detectors import classifiers
from fedal_utils.training import fit as training

SIZE, CLASSES = (16, 16), 4
RECIPE = TrainingConfig.of(batch=6, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, clip=0.0, crop=1, flip=0.5)
TOLERANCE = dict(rtol=2e-3, atol=2e-5)  # after a dozen steps; one step agrees to 1e-6


@pytest.fixture(scope="module")
def images():
    count = 120
    pixels = torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8, generator=seeding.torch_rng_for(0, "pixels"))
    return Images(tuple(map(str, range(count))), pixels, torch.full((count, 2), 16), None)


def model(name="resnet8", seed=0):
    return classifiers.build(name, CLASSES, SIZE, seeding.torch_rng_for(seed, "weights"))


def lesson(who, start, labelled, unlabelled, classes=(0, 1, 2), memory=None, span=None):
    target = torch.tensor([classes[i % len(classes)] for i in range(labelled)], dtype=torch.int64)
    return training.Lesson(
        who,
        np.arange(start, start + labelled),
        target,
        torch.bincount(target, minlength=CLASSES),
        np.arange(start + labelled, start + labelled + unlabelled),
        seeding.torch_rng_for(3, who),
        memory,
        span,
    )


def unequal(memory=False):
    """Different sizes, class priors, absent classes; one image alone, one class alone, an empty unlabelled pool."""
    kept = {} if memory else None
    return [
        lesson("a", 0, 14, 9, (0, 1, 2), copy.copy(kept)),
        lesson("b", 30, 1, 8, (3,), copy.copy(kept)),
        lesson("c", 50, 5, 0, (1, 2), copy.copy(kept)),
        lesson("d", 70, 7, 20, (2,), copy.copy(kept)),
        lesson("e", 100, 6, 2, (0, 3), copy.copy(kept)),
    ]


def one_after_another(start, lessons, images, recipe, iterations=None, **options):
    out = []
    for each in lessons:
        scratch = copy.deepcopy(start)
        out.append(training.fit_classifier(scratch, each, images, recipe, iterations, **options))
    return out


def states(start, count):
    return [{k: v for k, v in start.state_dict().items() if v.dim()}] * count


def assert_same(got, wanted, **tolerance):
    for one, other in zip(got, wanted, strict=True):
        assert one.steps == other.steps and one.parts.keys() >= {"supervised"}
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        for key, value in other.state.items():
            torch.testing.assert_close(one.state[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", classifiers.NAMES)
@pytest.mark.parametrize("most", [1, 2, 5])
def test_stacked_equals_sequential(images, name, most):
    recipe = TrainingConfig.of(**{**vars(RECIPE), "balanced_softmax": True, "distillation_weight": 1.0, "epochs": 2, "clip": 1.0})
    start, teacher = model(name), model(name, seed=9)
    wanted = one_after_another(start, unequal(), images, recipe, teacher=teacher)
    got = training.fit_stacked(start, states(start, 5), unequal(), images, recipe, teacher=teacher, most=most)
    assert [taught.steps for taught in got] == [6, 2, 2, 4, 2]
    assert_same(got, wanted, **TOLERANCE)
    assert wanted[2].parts.get("compensation", 0.0) == 0.0  # nothing unlabelled
    assert any(taught.parts.get("compensation", 0.0) > 0 for taught in wanted)


def test_one_step_agrees_to_rounding_in_fixed_iterations_as_well(images):
    start, teacher = model(), model(seed=9)
    recipe = TrainingConfig.of(**{**vars(RECIPE), "balanced_softmax": True, "distillation_weight": 1.0})
    wanted = one_after_another(start, unequal(), images, recipe, 1, teacher=teacher)
    got = training.fit_stacked(start, states(start, 5), unequal(), images, recipe, 1, teacher=teacher, most=5)
    assert_same(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("as_released", [False, True])
def test_stacked_equals_sequential_with_the_released_quirks(images, as_released):
    recipe = TrainingConfig.of(**{**vars(RECIPE), "balanced_softmax": True, "distillation_weight": 50.0})
    start, teacher = model(), model(seed=9)
    runs = [
        (
            one_after_another(start, unequal(), images, recipe, 2, teacher=teacher, as_released=quirk),
            training.fit_stacked(
                start, states(start, 5), unequal(), images, recipe, 2, teacher=teacher, as_released=quirk, most=5
            ),
        )
        for quirk in (as_released, not as_released)
    ]
    assert_same(runs[0][1], runs[0][0], **TOLERANCE)
    assert abs(runs[0][1][0].loss - runs[1][1][0].loss) > 1e-3  # and they are quirks


def test_an_optimiser_that_lives_on_is_the_same_both_ways(images):
    recipe = TrainingConfig.of(**{**vars(RECIPE), "schedule": "step", "step_at": (0.5,)})
    start = model()

    def twice(work):
        lessons = unequal(memory=True)
        before = states(start, 5)
        for _ in range(2):
            again = [
                training.Lesson(**{**vars(each), "span": (int(each.memory.get(training.STEPS, 0)), 6)})
                for each in lessons
            ]
            out = work(before, again)
            before = [taught.state for taught in out]
        return out, [each.memory for each in lessons]

    def apart(before, lessons):
        out = []
        for state, each in zip(before, lessons, strict=True):
            scratch = copy.deepcopy(start)
            scratch.load_state_dict(state, strict=False)
            out.append(training.fit_classifier(scratch, each, images, recipe, 3))
        return out

    wanted, memory = twice(apart)
    got, stacked_memory = twice(
        lambda before, lessons: training.fit_stacked(start, before, lessons, images, recipe, 3, most=5)
    )
    assert_same(got, wanted, **TOLERANCE)
    for one, other in zip(stacked_memory, memory, strict=True):
        assert one.keys() == other.keys() and int(one[training.STEPS]) == 6
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, **TOLERANCE)


def test_clients_may_stand_at_different_places_of_their_schedules(images):
    recipe = TrainingConfig.of(**{**vars(RECIPE), "schedule": "step", "step_at": (0.5,), "clip": 0.5})
    start = model()
    lessons = [lesson("a", 0, 8, 0, span=(0, 8)), lesson("b", 30, 8, 0, span=(6, 8))]
    wanted = one_after_another(start, lessons, images, recipe, 2)
    lessons = [lesson("a", 0, 8, 0, span=(0, 8)), lesson("b", 30, 8, 0, span=(6, 8))]
    got = training.fit_stacked(start, states(start, 2), lessons, images, recipe, 2, most=2)
    assert_same(got, wanted, **TOLERANCE)
    moved = [(t.state["head.bias"] - start.head.bias.detach()).norm() for t in got]
    assert moved[1] < 0.3 * moved[0]


def test_who_else_is_in_the_stack_does_not_matter(images):
    start = model()
    together = training.fit_stacked(start, states(start, 5), unequal(), images, RECIPE, 2, most=5)
    turned = training.fit_stacked(start, states(start, 5), unequal()[::-1], images, RECIPE, 2, most=5)[::-1]
    for one, other in zip(together, turned, strict=True):
        for key, value in one.state.items():
            torch.testing.assert_close(value, other.state[key], rtol=1e-4, atol=1e-6)


def test_a_client_that_diverges_harms_nobody_and_is_named(images):
    start = model()
    broken = states(start, 5)
    broken[1] = {k: v * float("nan") if k == "head.weight" else v for k, v in broken[1].items()}
    got = training.fit_stacked(start, broken, unequal(memory=True), images, RECIPE, 2, most=5)
    assert isinstance(got[1], training.TrainingDiverged) and "client b" in str(got[1])
    wanted = one_after_another(start, [unequal()[0], *unequal()[2:]], images, RECIPE, 2)
    assert_same([got[0], *got[2:]], wanted, **TOLERANCE)


def test_bad_lessons_and_recipes_are_refused(images):
    start = model()
    with pytest.raises(ValueError, match="client z has no labelled image"):
        training.fit_stacked(start, states(start, 1), [lesson("z", 0, 0, 3)], images, RECIPE, 1)
    with pytest.raises(ValueError, match="no step"):
        training.fit_classifier(start, lesson("z", 0, 2, 3), images, RECIPE, 0)
    with pytest.raises(ValueError, match="plain SGD"):
        training.fit_classifier(start, lesson("z", 0, 2, 3), images, TrainingConfig.of(optimizer="adamw"), 1)
    with pytest.raises(ValueError, match="1 lessons, but 2 states"):
        training.fit_stacked(start, states(start, 2), [lesson("z", 0, 2, 3)], images, RECIPE, 1)


def test_how_many_clients_pay_on_a_cpu_and_on_a_gpu():
    assert training.clients_per_stack(16, (16, 16), "cpu") == 8
    assert training.clients_per_stack(128, (32, 32), "cpu") == 1
    assert training.clients_per_stack(128, (32, 32), "cuda") > 10**6


def test_a_model_that_is_right_stops_early(images):
    easy = TrainingConfig.of(**{**vars(RECIPE), "epochs": 40, "flip": 0.0, "crop": 0})
    taught = training.fit_classifier(model(), lesson("a", 0, 12, 0, (0, 1)), images, easy, until=0.99)
    full = training.fit_classifier(model(), lesson("a", 0, 12, 0, (0, 1)), images, easy)
    assert taught.steps < full.steps == 80


# --- the distillation, image by image ---------------------------------------------------------------------------------


def test_the_distillation_is_the_formula(images):
    """One step of one client against loops over images and classes, written from section 4.2 alone."""
    recipe = TrainingConfig.of(
        **{**vars(RECIPE), "flip": 0.0, "crop": 0, "balanced_softmax": True, "distillation_weight": 1.0, "lr": 1e-9}
    )
    start, teacher = model(), model(seed=9).eval()
    one = lesson("a", 0, 6, 9, (0, 0, 1))  # four of class 0, two of class 1, none of 2 and 3
    taught = training.fit_classifier(copy.deepcopy(start), one, images, recipe, 1, teacher=teacher)
    draw = next(training._draws(lesson("a", 0, 6, 9, (0, 0, 1)), recipe, 1, True, False))

    raw = np.array([1 / (4 + 1e-6), 1 / (2 + 1e-6), 0, 0])
    gamma = raw / raw.sum()
    u = start.scaled(images.pixels[draw.mixed])
    beta, partner = draw.beta.tolist(), draw.partner.tolist()
    mixed = torch.stack([beta[b] * u[b] + (1 - beta[b]) * u[partner[b]] for b in range(6)])
    with torch.no_grad():
        q, p = teacher.scores(mixed).softmax(1).double(), start.train().scores(mixed).softmax(1).double()
    guess = q.argmax(1).tolist()
    total = 0.0
    for b in range(6):
        weight = beta[b] * gamma[guess[b]] + (1 - beta[b]) * gamma[guess[partner[b]]]
        total += weight * sum(float(q[b, c]) * float((q[b, c] / p[b, c]).log()) for c in range(4)) / 4
    assert taught.parts["compensation"] == pytest.approx(total / 6, rel=1e-4)

    x = start.scaled(images.pixels[one.rows[draw.index.numpy()]])
    scores = model().train().scores(x).double().exp() * torch.tensor([4.0, 2.0, 0.0, 0.0])
    target = one.classes[draw.index]
    by_hand = -(scores[range(6), target] / scores.sum(1)).log().mean()
    assert taught.parts["supervised"] == pytest.approx(float(by_hand.detach()), rel=1e-4)


def test_mixing_draws_per_image_and_leaves_the_labelled_stream_alone():
    plain = list(training._draws(lesson("a", 0, 14, 9), RECIPE, 3, False, False))
    mixing = list(training._draws(lesson("a", 0, 14, 9), RECIPE, 3, True, False))
    released = list(training._draws(lesson("a", 0, 14, 9), RECIPE, 3, True, True))
    for one, other, third in zip(plain, mixing, released, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.flip, other.flip)
        assert torch.equal(one.shift, other.shift) and torch.equal(other.beta, third.beta)
        assert one.mixed is None and len(other.mixed) == 6 and set(other.mixed) <= set(range(14, 23))
        assert sorted(other.partner.tolist()) == list(range(6)) and len(set(third.partner.tolist())) == 1
        assert len(set(other.beta.tolist())) == 6


def test_beta_is_beta_two_two():
    recipe = TrainingConfig.of(**{**vars(RECIPE), "batch": 4000})
    beta = next(training._draws(lesson("a", 0, 14, 9), recipe, 1, True, False)).beta
    assert float(beta.mean()) == pytest.approx(0.5, abs=0.015) and float(beta.var()) == pytest.approx(0.05, abs=0.004)
    x = torch.linspace(0, 1, 11)
    below = torch.tensor([float((beta <= v).float().mean()) for v in x])
    torch.testing.assert_close(below, 3 * x**2 - 2 * x**3, rtol=0, atol=0.03)  # its distribution function


def test_a_frozen_teacher_is_not_touched(images):
    teacher = model(seed=9)
    before = copy.deepcopy(teacher.state_dict())
    recipe = TrainingConfig.of(**{**vars(RECIPE), "distillation_weight": 1.0})
    for as_released in (False, True):
        training.fit_stacked(
            model(), states(model(), 5), unequal(), images, recipe, 2, teacher=teacher, as_released=as_released
        )
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


# --- what is cropped, what is scored ----------------------------------------------------------------------------------


def test_random_crop_shifts_into_a_black_border():
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(3, 3, 3, 3)
    out = augment.random_crop(image, torch.tensor([[1, 1], [0, 1], [2, 0]]), 1)
    assert torch.equal(out[0], image[0])
    assert out[1, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert out[2, 0].tolist() == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]
    padded = F.pad(image, (1, 1, 1, 1))
    assert torch.equal(out[2], padded[2, :, 2:5, 0:3])
    assert augment.random_crop(image, torch.zeros(3, 2, dtype=torch.int64), 0) is image


def test_class_scores_are_the_models_in_order(images):
    net = model()
    scores = training.class_scores(net, images, batch=50)
    with torch.no_grad():
        torch.testing.assert_close(scores, net.eval()(images.pixels), rtol=1e-4, atol=1e-5)
    assert training.class_scores(net, images.take([]), batch=50).shape == (0, CLASSES)
