"""Train one client's classifier, from draws that are made for the whole call at once: the plain way of `streams`."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..data import Images, random_crop
from ..detectors import Classifier, balanced_cross_entropy, compensation_loss, compensation_weights
from . import schedule
from .inference import class_scores
from .schedule import LocalTask, TrainingDiverged

State = Draws = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ClassifierTask(LocalTask):
    """What one client of a classifier trains on in one call; rows count in the training set."""

    rows: np.ndarray  # (n,) of its labelled images
    classes: Tensor  # (n,) int64 from 0
    counts: Tensor  # (C,) of them by class
    unlabelled: np.ndarray  # rows that may be mixed for distillation
    stop_at: float | None = None  # stop after the first pass behind which this part of its images is right

    def steps(self, config: TrainingConfig) -> int:
        """Gradient steps of this call."""
        passes = config.epochs * math.ceil(len(self.rows) / config.batch)
        return passes if self.iterations is None else self.iterations

    def mixes(self, config: TrainingConfig, teacher: Classifier | None) -> bool:
        """True where unlabelled images are mixed for distillation."""
        return teacher is not None and config.distillation_weight > 0 and len(self.unlabelled) > 0


class LocalResult(NamedTuple):
    """A client's weights after a call (on the CPU), the steps it took, its mean loss, and the parts of that."""

    state: State
    steps: int
    loss: float
    parts: dict[str, float]


def draw(task: ClassifierTask, config: TrainingConfig, mixing: bool, one_partner: bool = False) -> Draws:
    """All that is random in one call of one client: S steps of B labelled images, and of as many mixed ones.

    length (S,): images of a step, the last of a pass may be short; what stands behind repeats the first. rows, target
    (S, B): of the training set, and their classes; flip (S, B) bool; shift (S, B, 2) in 0..2 * crop. If mixing also
    mixed, mixed_flip, mixed_shift, and beta, partner (S, B): image b becomes beta_b * itself + (1 - beta_b) * partner.
    They come from a generator of their own, so that mixing moves nothing of the rest.
    """
    rng, batch, crop = task.rng, config.batch, config.augment.crop
    apart = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
    stream = schedule.draw_batches(len(task.unlabelled), batch, None, task.steps(config), apart)

    def full(t: Tensor) -> Tensor:  # with its first entry
        return t if len(t) == batch else torch.cat([t, t[:1].expand(batch - len(t), *t.shape[1:])])

    def changes(count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        flip = torch.rand(count, generator=source) < config.augment.flip
        return flip, torch.randint(0, 2 * crop + 1, (count, 2), generator=source)

    steps = []
    for _, _, index in schedule.draw_batches(len(task.rows), batch, config.epochs, task.iterations, rng):
        flip, shift = changes(len(index), rng)
        step = {"length": torch.tensor(len(index)), "rows": full(index), "flip": full(flip), "shift": full(shift)}
        if mixing:
            step["mixed"] = next(stream)[2]
            step["beta"] = torch.rand(batch, 3, generator=apart).median(dim=1).values  # of three uniforms: Beta(2, 2)
            partner = torch.randperm(batch, generator=apart)
            step["partner"] = partner[:1].expand(batch) if one_partner else partner
            step["mixed_flip"], step["mixed_shift"] = changes(batch, apart)
        steps.append(step)
    draws = {k: torch.stack([step[k] for step in steps]) for k in steps[0]}
    draws["target"], draws["rows"] = task.classes[draws["rows"]], torch.from_numpy(task.rows)[draws["rows"]]
    if mixing:
        draws["mixed"] = torch.from_numpy(task.unlabelled)[draws["mixed"]]
    return draws


def ready(tasks, config: TrainingConfig, teacher: Classifier | None, device, as_released: bool) -> Classifier | None:
    """A teacher that can be asked and does not learn; None where nothing is distilled. ValueError: a bad task."""
    if config.optimizer != "sgd" or config.ema or config.amp or config.warmup_momentum or config.warmup_bias_lr:
        raise ValueError("classifiers take plain SGD: optimizer='sgd', ema=0, amp=False, no warm-up but of the lr")
    for task in tasks:
        if len(task.rows) == 0 or task.steps(config) < 1:
            raise ValueError(f"client {task.client} makes no step: {len(task.rows)} labelled images, {config.epochs=}")
    if teacher is None or config.distillation_weight == 0:
        return None
    return copy.deepcopy(teacher).to(device).requires_grad_(False).train(as_released)


def result_of(state: State, steps: int, parts: dict[str, float], task: ClassifierTask, images: Images) -> LocalResult:
    """The result; TrainingDiverged where its loss or a weight is not finite."""
    loss = sum(parts.values())
    if not math.isfinite(loss):
        raise schedule.diverged(task.client, {"loss": loss, **parts}, [images.ids[row] for row in task.rows])
    schedule.check_weights(state, task.client)
    return LocalResult(state, steps, loss, parts)


def fit_classifier(
    model: Classifier, task: ClassifierTask, images, config, teacher=None, device="cpu", as_released: bool = False
) -> LocalResult:
    """Train `model` in place on one client's labelled images: SGD with momentum and weight decay on all weights.

    model: left in eval mode. task: what of `images`, the whole training set. config, device: as in `fit`.
    teacher: the global model of this round, for the distillation of KAFAL's 4.2; it is not changed.
    as_released: one partner for all images of a batch, and a teacher that uses each batch's statistics.
    """
    device = torch.device(device)
    teacher = ready([task], config, teacher, device, as_released)
    mixing = task.mixes(config, teacher)
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    schedule.load_optimizer(optimizer, model, task.optimizer_state or {})
    counts = task.counts.to(device)
    gamma, priors = compensation_weights(counts), counts if config.balanced_softmax else None
    draws = draw(task, config, mixing, as_released)
    before, whole = task.schedule_position or (0, task.steps(config))
    losses, seen = [], 0

    def pixels(rows: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
        return model.scaled(random_crop(images.batch(rows, device, flip=flip), shift, config.augment.crop))

    for done, length in enumerate(draws["length"].tolist()):
        step = {k: v[done] for k, v in draws.items()}
        optimizer.param_groups[0]["lr"] = config.lr * schedule.learning_rate_factor(config, before + done, whole)
        scores = model.scores(pixels(*(step[k][:length] for k in ("rows", "flip", "shift"))))
        parts = {"supervised": balanced_cross_entropy(scores, step["target"][:length].to(device), priors)}
        if mixing:
            u = pixels(step["mixed"], step["mixed_flip"], step["mixed_shift"])
            beta, partner = step["beta"].to(device), step["partner"].to(device)
            mixed = beta[:, None, None, None] * u + (1 - beta)[:, None, None, None] * u[partner]
            with torch.no_grad():
                taught = teacher.scores(mixed)
                guess = taught.argmax(1)
                weight = beta * gamma[guess] + (1 - beta) * gamma[guess[partner]]
            parts["distillation"] = config.distillation_weight * compensation_loss(model.scores(mixed), taught, weight)
        optimizer.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        if config.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        losses.append({k: v.detach() for k, v in parts.items()})
        seen += length
        if task.stop_at is not None and seen >= len(task.rows):
            seen = 0
            guess = class_scores(model, images.take(task.rows), device=device).argmax(1)
            if float((guess == task.classes.cpu()).float().mean()) >= task.stop_at:
                break
            model.train()
    model.eval()
    state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items() if v.dim() > 0}
    means = {k: float(sum(step[k] for step in losses)) / len(losses) for k in losses[0]}
    result = result_of(state, len(losses), means, task, images)
    if task.optimizer_state is not None:
        schedule.save_optimizer(optimizer, model, task.optimizer_state, before + len(losses))
    return result


def fit_in_turn(
    model: Classifier, states: Sequence[State], tasks: Sequence[ClassifierTask], images: Images, *options, **more
) -> list[LocalResult | TrainingDiverged]:
    """`fit_together` for one client after another."""
    results: list[LocalResult | TrainingDiverged] = []
    for state, task in zip(states, tasks, strict=True):
        scratch = copy.deepcopy(model)
        scratch.load_state_dict(state, strict=False)
        try:
            results.append(fit_classifier(scratch, task, images, *options, **more))
        except TrainingDiverged as error:
            results.append(error)
    return results
