"""What one call of training is given: its task, batches, learning rates, and an optimizer whose state lives on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TrainingConfig

STEPS = "steps"  # in an optimizer state: steps taken so far
DETACHED_HEADS = ("evidence_head", "loss_head")  # parts of a detector that learn from maps which they do not train


class TrainingDiverged(ValueError):
    """The loss or a weight stopped being finite; names the client and the images."""


@dataclass(frozen=True)
class LocalTask:
    """What one client trains in one call."""

    rng: torch.Generator  # of order and augmentation
    client: str = "central"  # named if the loss stops being finite
    iterations: int | None = None  # steps in the place of `config.epochs`
    optimizer_state: dict[str, Tensor] | None = None  # of an earlier call, updated in place at the end; None = reset
    schedule_position: tuple[int, int] | None = None  # steps before this call, and in all; None = this call alone


def draw_batches(count: int, batch: int, epochs: int | None, iterations: int | None, rng: torch.Generator) -> Iterator:
    """(epoch, is last of it, index) of each batch; an epoch is a pass over `count` images.

    epochs: whole passes, the last batch of each short. iterations: in their place so many full batches, cut from an
    endless row of shuffles.
    """
    if count < 1:
        raise ValueError("nothing to train on: the set of labelled images is empty")
    if iterations is None:
        for epoch in range(epochs):
            parts = torch.randperm(count, generator=rng).split(batch)
            for number, part in enumerate(parts):
                yield epoch, number == len(parts) - 1, part
        return
    waiting, seen = torch.empty(0, dtype=torch.int64), 0
    for step in range(iterations):
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(count, generator=rng)])
        part, waiting = waiting[:batch], waiting[batch:]
        epoch, seen = seen // count, seen + batch
        yield epoch, step == iterations - 1 or seen // count > epoch, part


def learning_rate_factor(config: TrainingConfig, step: int, steps: int) -> float:
    """Factor on `config.lr` at step `step` of `steps`: linear warm-up, then constant, cosine or step schedule."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    if config.schedule == "cosine":
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return 0.1 ** sum(progress >= at for at in config.step_at)


def _warmed(config: TrainingConfig, step: int) -> float:
    """The part of the warm-up that is over."""
    return min(1.0, step / config.warmup) if config.warmup else 1.0


def batches_per_step(config: TrainingConfig, step: int) -> int:
    """How many batches' gradients are added up before a step: from 1 to accumulate_to / batch over the warm-up."""
    most = max(1.0, config.accumulate_to / config.batch)
    return max(1, round(1 + (most - 1) * _warmed(config, step)))


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or AdamW; only weights of two or more dimensions decay. Biases come last."""
    groups = [{"params": [], "weight_decay": decay} for decay in (config.weight_decay, 0.0, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = 0 if parameter.dim() > 1 else 1 + name.endswith("bias")
            groups[place]["params"].append(parameter)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups, lr=config.lr)


def set_rates(optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int, steps: int) -> None:
    """Give the optimizer this step's learning rate and momentum; biases may start above the rest."""
    part, momentum = _warmed(config, step), config.momentum
    if config.warmup_momentum:
        momentum = config.warmup_momentum + (config.momentum - config.warmup_momentum) * part
    for group in optimizer.param_groups:
        group["lr"] = config.lr * learning_rate_factor(config, step, steps)
        if "momentum" in group:
            group["momentum"] = momentum
    if config.warmup_bias_lr and part < 1:
        optimizer.param_groups[-1]["lr"] = config.warmup_bias_lr + (config.lr - config.warmup_bias_lr) * part


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Tensor], steps: int) -> None:
    """Copy the optimizer's moments into `state`, '<moment>:<parameter>' each, and the steps taken so far."""
    for name, parameter in model.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"{field}:{name}"] = value.detach().cpu().clone()
    state[STEPS] = torch.tensor(steps)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the moments of `state` into the optimizer; parameters that are not in it start anew."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for key, value in state.items():
        field, _, name = key.partition(":")
        if name in named:
            place = "cpu" if field == "step" else named[name].device  # AdamW counts its steps on the CPU
            optimizer.state[named[name]][field] = value.to(place, copy=True)


def clip(model: nn.Module, most: float) -> None:
    """Clip gradients to this norm (0: not at all), each of the `DETACHED_HEADS` apart: they slow nobody else."""
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in ("", *DETACHED_HEADS)}
    for name, parameter in model.named_parameters():
        parts[next((head for head in DETACHED_HEADS if head in name.split(".")), "")].append(parameter)
    for together in parts.values() if most > 0 else ():
        nn.utils.clip_grad_norm_(together, most)


def diverged(client: str, losses: Mapping[str, float], ids: Sequence[str]) -> TrainingDiverged:
    """The error of a loss ("loss", then the parts of it) that is not finite on these images."""
    split = ", ".join(f"{name} {value:.4g}" for name, value in losses.items() if name != "loss")
    ids = list(ids)[:4]
    return TrainingDiverged(f"client {client}: loss is {losses['loss']:.4g} ({split}) on images {ids}...; lower lr")


def check_weights(state: dict[str, Tensor], client: str) -> None:
    """TrainingDiverged if a weight is not finite."""
    state = {k: v for k, v in state.items() if v.is_floating_point() and v.numel()}
    largest = torch.stack([v.float() for v in torch._foreach_norm(list(state.values()), math.inf)])  # NaN if one is
    for name, finite in zip(state, torch.isfinite(largest).tolist(), strict=True):
        if not finite:
            raise TrainingDiverged(f"client {client}: weight {name!r} is not finite after training; lower lr")
