"""One client's classifier: draws made ahead, stopping; KAFAL's distillation by an oracle."""

import copy

import numpy as np
import pytest
import torch
from client_tasks import CONFIG, MIXING, TOLERANCE, model, small_images, states, task

from fedal_utils import training
from fedal_utils.config import TrainingConfig
from fedal_utils.training.classifier import draw


@pytest.fixture(scope="module")
def images():
    return small_images()


def test_two_calls_with_an_optimizer_that_lives_on_are_one_long_call(images):
    config, start = CONFIG.replace(schedule="step", step_at=(0.5,), flip=0.0, crop=0, batch=12), model()

    def calls(*steps):
        net, state, done = copy.deepcopy(start), {}, 0
        for count in steps:
            one = task("a", 0, 12, 0, iterations=count, optimizer_state=state, schedule_position=(done, 6))
            training.fit_classifier(net, one, images, config)
            done += count
        return net.state_dict(), state

    (long, kept), (parts, again) = calls(6), calls(3, 3)
    assert int(kept[training.STEPS]) == 6 and kept.keys() == again.keys()
    for one, other in ((long, parts), (kept, again)):
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, **TOLERANCE)


def test_bad_tasks_and_recipes_are_refused(images):
    start = model()
    for tasks, config, message in (
        ([task("z", 0, 0, 3)], CONFIG, "client z makes no step: 0 labelled images"),
        ([task("z", 0, 2, 3, iterations=0)], CONFIG, "client z makes no step"),
        ([task("z", 0, 2, 3)], TrainingConfig(), "plain SGD"),
    ):
        for train in (training.fit_in_turn, training.fit_graphs):
            with pytest.raises(ValueError, match=message):
                train(start, states(start, 1), tasks, images, config, device="cpu")


def test_a_model_that_is_right_stops_after_the_first_pass_behind_which_it_is(images):
    easy = CONFIG.replace(epochs=40, flip=0.0, crop=0)
    early, full = (
        training.fit_classifier(model(), task("a", 0, 12, 0, (0, 1), stop_at=at), images, easy) for at in (0.99, None)
    )
    assert early.steps < full.steps == 80
    right = []
    for passes in range(1, early.steps // 2 + 1):
        net, one = model(), task("a", 0, 12, 0, (0, 1), iterations=None)
        training.fit_classifier(net, one, images, easy.replace(epochs=passes))
        with torch.no_grad():
            right.append(bool((net(images.pixels[:12]).argmax(1) == one.classes).all()))
    assert right == [False] * (early.steps // 2 - 1) + [True]


def test_the_distillation_is_the_formula(images):
    """One step of one client against loops over images and classes, written from section 4.2 alone."""
    config = MIXING.replace(flip=0.0, crop=0, lr=1e-9)
    start, teacher = model(), model(seed=9).eval()
    one = task("a", 0, 6, 9, (0, 0, 1), iterations=1)  # four of class 0, two of class 1, none of 2 and 3
    result = training.fit_classifier(copy.deepcopy(start), one, images, config, teacher)
    step = draw(task("a", 0, 6, 9, (0, 0, 1), iterations=1), config, mixing=True)
    step = {k: v[0] for k, v in step.items()}

    raw = np.array([1 / (4 + 1e-6), 1 / (2 + 1e-6), 0, 0])
    gamma = raw / raw.sum()
    u = start.scaled(images.pixels[step["mixed"]])
    beta, partner = step["beta"].tolist(), step["partner"].tolist()
    mixed = torch.stack([beta[b] * u[b] + (1 - beta[b]) * u[partner[b]] for b in range(6)])
    with torch.no_grad():
        q, p = teacher.scores(mixed).softmax(1).double(), start.train().scores(mixed).softmax(1).double()
    guess = q.argmax(1).tolist()
    total = 0.0
    for b in range(6):
        weight = beta[b] * gamma[guess[b]] + (1 - beta[b]) * gamma[guess[partner[b]]]
        total += weight * sum(float(q[b, c]) * float((q[b, c] / p[b, c]).log()) for c in range(4)) / 4
    assert result.parts["distillation"] == pytest.approx(total / 6, rel=1e-4)

    scores = model().train().scores(start.scaled(images.pixels[step["rows"]])).double().exp()
    scores = scores * torch.tensor([4.0, 2.0, 0.0, 0.0])
    by_hand = -(scores[range(6), step["target"]] / scores.sum(1)).log().mean()
    assert result.parts["supervised"] == pytest.approx(float(by_hand.detach()), rel=1e-4)


def test_draws_of_a_call_mixing_leaves_the_labelled_stream_alone():
    def drawn(mixing, one_partner=False, **options):
        return draw(task("a", 0, 14, 9, **options), CONFIG.replace(epochs=2), mixing, one_partner)

    plain, mixing, released = drawn(False), drawn(True), drawn(True, True)
    for name in ("length", "rows", "target", "flip", "shift"):
        assert torch.equal(plain[name], mixing[name])
    assert plain["length"].tolist() == [6, 6, 2] * 2 and "mixed" not in plain
    for passed in plain["rows"].view(2, 18):
        assert sorted(passed[:14].tolist()) == list(range(14)) and set(passed[14:].tolist()) == {int(passed[12])}
    assert torch.equal(plain["target"], plain["rows"] % 3) and set(plain["shift"].flatten().tolist()) == {0, 1, 2}
    assert torch.equal(mixing["beta"], released["beta"]) and mixing["mixed"].unique().tolist() == list(range(14, 23))
    assert all(sorted(row.tolist()) == list(range(6)) for row in mixing["partner"])
    assert all(len(set(row.tolist())) == 1 for row in released["partner"])
    assert drawn(True, iterations=5)["rows"].shape == (5, 6) == drawn(True, iterations=5)["mixed"].shape


def test_beta_is_beta_two_two():
    beta = draw(task("a", 0, 14, 9, iterations=1), CONFIG.replace(batch=4000), True)["beta"]
    assert float(beta.mean()) == pytest.approx(0.5, abs=0.015) and float(beta.var()) == pytest.approx(0.05, abs=0.004)
    x = torch.linspace(0, 1, 11)
    below = torch.tensor([float((beta <= v).float().mean()) for v in x])
    torch.testing.assert_close(below, 3 * x**2 - 2 * x**3, rtol=0, atol=0.03)  # its distribution function
