"""Train a detector on labelled images: `fit` yields one row a pass and lets the caller decide.

It never prints, saves, seeds, or remembers anything from one call to the next.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..data import Images, Labels, apply_augmentation, draw_augmentation
from ..detectors import Detector
from .inference import CachedImages
from .schedule import (
    LocalTask,
    TrainingDiverged,
    anchored,
    batches_per_step,
    build_optimizer,
    check_weights,
    clipped_together,
    draw_batches,
    load_optimizer,
    pull_back,
    save_optimizer,
    set_rates,
)


def fit(
    model: Detector,
    images: Images | CachedImages,
    labels: Labels,
    config: TrainingConfig,
    task: LocalTask,
    device: str | torch.device = "cpu",
) -> Iterator[dict]:
    """Train `model` in place on these images; yields {"epoch", "steps", "loss", ...each part} after every pass.

    model: left in eval mode. With `config.ema` > 0 the weights at the end are their exponential moving average.
    images, labels: of this client, row by row.
    config: optimizer, schedule, batch, augmentation. With `proximal` > 0 every step also pulls what is trained back to
        where it was at the start of this call (FedProx); the loss that is yielded is the detector's, without that term.
    task: generator, number of steps, and the optimizer's state, see `LocalTask`.
    device: where it is trained.
    """
    device = torch.device(device)
    if len(images) != len(labels.classes):
        raise ValueError(f"{len(images)} images but labels for {len(labels.classes)}")
    if isinstance(images, CachedImages) and config.augment.changes_pixels():
        raise ValueError("cached features can be mirrored and nothing else: set colour=0, zoom=(1, 1) and shift=0")
    epochs = config.epochs if task.iterations is None else None
    per_epoch = math.ceil(len(images) / config.batch)
    steps = task.iterations if task.iterations is not None else config.epochs * per_epoch
    before, whole = task.schedule_position or (0, steps)
    if config.warmup_epochs:
        config = config.replace(warmup=min(config.warmup, round(config.warmup_epochs * per_epoch)))
    model.to(device).train()
    optimizer = build_optimizer(model, config)
    if task.optimizer_state:
        load_optimizer(optimizer, model, task.optimizer_state)
    averaged = copy.deepcopy(model.state_dict()) if config.ema > 0 else None
    anchors = anchored(model, config)
    losses = _Losses(images, task.client)
    loss_rng = torch.Generator(device="cpu").manual_seed(int(torch.randint(1 << 62, (1,), generator=task.rng)))
    done = added = 0
    optimizer.zero_grad(set_to_none=True)
    for epoch, last, index in draw_batches(len(images), config.batch, epochs, task.iterations, task.rng):
        batch = _batch(images, labels, index, config, task.rng, device)
        set_rates(optimizer, config, before + done, whole)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.amp):
            parts = model.loss(*batch, loss_rng)
        loss = sum(parts.values())
        losses.add(loss, parts, index)
        if device.type == "cpu" or last:  # reading a loss makes a GPU wait
            losses.read()
        loss.backward()
        added += 1
        stepped = added >= batches_per_step(config, before + done) or done == steps - 1
        done += 1
        if stepped:
            if config.clip > 0:
                for together in clipped_together(model):
                    nn.utils.clip_grad_norm_(together, config.clip)
            pull_back(anchors, config.proximal)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            added = 0
            if averaged is not None:
                _update_average(averaged, model.state_dict(), min(config.ema, (1 + done) / (10 + done)))
        if last:
            yield {"epoch": epoch, "steps": done, **losses.means()}
    if averaged is not None:
        model.load_state_dict(averaged)
    check_weights(model, task.client)
    if task.optimizer_state is not None:
        save_optimizer(optimizer, model, task.optimizer_state, before + done)
    model.eval()


def _batch(
    images: Images | CachedImages,
    labels: Labels,
    index: Tensor,
    config: TrainingConfig,
    rng: torch.Generator,
    device: torch.device,
) -> tuple:
    """Inputs, boxes, classes and ignore of these rows, mirrored and augmented."""
    change = config.augment
    flip = torch.rand(len(index), generator=rng) < change.flip
    target = labels.take(index).to(device).flip(flip.to(device), images.image_size[1])
    batch = images.batch(index, device, flip=flip), target.boxes, target.classes, target.ignore
    if isinstance(images, CachedImages) or not change.changes_pixels():
        return batch
    draws = draw_augmentation(len(index), rng, change.mosaic > 0)
    return apply_augmentation(*batch, draws, change.replace(flip=0.0))


class _Losses:
    """Losses of steps that nobody has read yet, and the sums of a pass."""

    def __init__(self, images: Images | CachedImages, client: str):
        self.images, self.client = images, client
        self.waiting: list[tuple[dict[str, Tensor], Tensor]] = []
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, loss: Tensor, parts: dict[str, Tensor], index: Tensor) -> None:
        self.waiting.append(({"loss": loss.detach()} | {k: v.detach() for k, v in parts.items()}, index))

    def read(self) -> None:
        """Add what waits to the sums; TrainingDiverged for the first loss that is not finite."""
        for values, index in self.waiting:
            values = {k: float(v) for k, v in values.items()}
            if not math.isfinite(values["loss"]):
                names = [self.images.ids[i] for i in index.tolist()][:4]
                split = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "loss")
                raise TrainingDiverged(
                    f"client {self.client}: loss is {values['loss']} ({split}) on images {names}...; lower lr, or look "
                    "at their boxes"
                )
            for key, value in values.items():
                self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += len(self.waiting)
        self.waiting.clear()

    def means(self) -> dict[str, float]:
        """Means since the last call."""
        means = {k: v / self.count for k, v in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


@torch.no_grad()
def _update_average(averaged: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    floats = [k for k, v in averaged.items() if v.is_floating_point()]
    torch._foreach_lerp_([averaged[k] for k in floats], [now[k] for k in floats], 1 - decay)
    for key, value in averaged.items():
        if not value.is_floating_point():
            value.copy_(now[key])
