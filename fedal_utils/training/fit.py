"""Train a detector on labelled images: `fit` yields one row a pass and lets the caller decide.

It never prints, saves, seeds, or remembers anything from one call to the next. On a GPU nothing waits for the device
inside a pass: batches are drawn and augmented many at a time, losses are read at its end, and where shapes are fixed a
step is a CUDA graph (`graphs`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..data import AugmentDraws, Images, Labels, apply_augmentation, draw_augmentation
from ..detectors import Detector
from .graphs import can_be_graphed, graphed_step
from .inference import CachedImages, half_precision, tensor_cores
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
    update_average,
)

AHEAD = 1 << 28  # bytes of pixels that are augmented at once on a GPU


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
    per_epoch = math.ceil(len(images) / config.batch)
    steps = task.iterations if task.iterations is not None else config.epochs * per_epoch
    before, whole = task.schedule_position or (0, steps)
    if config.warmup_epochs:
        config = config.replace(warmup=min(config.warmup, round(config.warmup_epochs * per_epoch)))
    model.to(device).train()
    losses, seed = _Losses(images, task.client), int(torch.randint(1 << 62, (1,), generator=task.rng))
    begin = graphed_step if can_be_graphed(model, device) else EagerStep
    work = begin(model, config, task.optimizer_state or {}, seed)
    done = added = 0
    for epoch, last, index, batch in _batches(images, labels, config, task, device):
        losses.add(work.gradients(batch), index)
        if device.type == "cpu" or last:  # reading a loss makes a GPU wait
            losses.read(work.parts)
        added += 1
        if added >= batches_per_step(config, before + done) or done == steps - 1:
            work.update(config, before + done, whole, min(config.ema, (2 + done) / (11 + done)))
            added = 0
        done += 1
        if last:
            yield {"epoch": epoch, "steps": done, **losses.means()}
    work.finish(model)
    check_weights(model, task.client)
    if task.optimizer_state is not None:
        work.save(task.optimizer_state, before + done)
    model.eval()


class EagerStep:
    """A step of the model itself, operation by operation: what a graph is tested against."""

    def __init__(self, model: Detector, config: TrainingConfig, kept: dict[str, Tensor], seed: int):
        self.model, self.config, self.parts = model, config, ("loss",)
        device = next(model.parameters()).device
        self.generator = torch.Generator(device).manual_seed(seed)  # of what a loss samples
        if device.type == "cuda":
            model.to(memory_format=torch.channels_last)
        self.autocast = half_precision(device, config.amp)
        self.optimizer = build_optimizer(model, config)
        load_optimizer(self.optimizer, model, kept)
        self.optimizer.zero_grad(set_to_none=True)
        self.averaged = copy.deepcopy(model.state_dict()) if config.ema > 0 else None
        self.anchors = anchored(model, config)

    def gradients(self, batch: tuple) -> Tensor:
        """Add the gradients of a batch; the loss and its parts (P,), named by `parts`."""
        with tensor_cores(self.config.amp):
            with self.autocast:
                parts = self.model.loss(*batch, self.generator)
            loss = sum(parts.values())
            loss.backward()
        self.parts = ("loss", *parts)
        return torch.stack([loss.detach(), *(v.detach() for v in parts.values())])

    def update(self, config: TrainingConfig, step: int, steps: int, decay: float) -> None:
        """Take the step `step` of `steps`, and average the weights."""
        set_rates(self.optimizer, config, step, steps)
        if config.clip > 0:
            for together in clipped_together(self.model):
                nn.utils.clip_grad_norm_(together, config.clip)
        pull_back(self.anchors, config.proximal)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            update_average(self.averaged, self.model.state_dict(), 1 - decay)

    def finish(self, model: Detector) -> None:
        """The weights, or their average, into the model."""
        if self.averaged is not None:
            model.load_state_dict(self.averaged)

    def save(self, state: dict[str, Tensor], steps: int) -> None:
        """The optimizer's state."""
        save_optimizer(self.optimizer, self.model, state, steps)


def _batches(
    images: Images | CachedImages, labels: Labels, config: TrainingConfig, task: LocalTask, device: torch.device
) -> Iterator[tuple[int, bool, Tensor, tuple]]:
    """(epoch, is last of it, rows, (inputs, boxes, classes, ignore)) of each step, mirrored and augmented.

    Draws are made in the order of the steps; on a GPU those of many batches are applied at once.
    """
    change, epochs = config.augment, config.epochs if task.iterations is None else None
    changes = change.changes_pixels() and not isinstance(images, CachedImages)
    ahead = 1
    if device.type == "cuda" and change.mosaic == 0:  # a mosaic joins images of its batch
        ahead = max(1, min(16, AHEAD // (3 * math.prod(images.image_size) * config.batch)))
        labels = labels.to(device)

    def drawn() -> Iterator[tuple]:
        for epoch, last, index in draw_batches(len(images), config.batch, epochs, task.iterations, task.rng):
            flip = torch.rand(len(index), generator=task.rng) < change.flip
            yield (
                epoch,
                last,
                index,
                flip,
                draw_augmentation(len(index), task.rng, change.mosaic > 0) if changes else (),
            )

    stream = drawn()
    while some := list(islice(stream, ahead)):
        index, flip = (torch.cat(parts) for parts in zip(*((s[2], s[3]) for s in some), strict=True))
        target = labels.take(index).to(device).flip(flip.to(device), images.image_size[1])
        batch = images.batch(index, device, flip=flip), target.boxes, target.classes, target.ignore
        if changes:
            draws = _joined([s[4] for s in some])
            batch = apply_augmentation(*batch, draws, change.replace(flip=0.0))
        start = 0
        for epoch, last, rows, *_ in some:
            part = slice(start, start := start + len(rows))
            inputs = tuple(m[part] for m in batch[0]) if isinstance(batch[0], tuple) else batch[0][part]
            yield epoch, last, rows, (inputs, *(t[part] for t in batch[1:]))


def _joined(draws: list[AugmentDraws]) -> AugmentDraws:
    """Draws of several batches side by side."""
    if len(draws) == 1:
        return draws[0]
    together = zip(AugmentDraws._fields, zip(*draws, strict=True), strict=True)
    return AugmentDraws(**{k: torch.cat(v, dim=int(k == "colour")) for k, v in together if v[0] is not None})


class _Losses:
    """Losses of steps that nobody has read yet, and the sums of a pass."""

    def __init__(self, images: Images | CachedImages, client: str):
        self.images, self.client = images, client
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, values: Tensor, index: Tensor) -> None:
        self.waiting.append((values, index))

    def read(self, parts: tuple[str, ...]) -> None:
        """Add what waits to the sums; TrainingDiverged for the first loss that is not finite."""
        rows = torch.stack([values for values, _ in self.waiting]).tolist()
        for row, (_, index) in zip(rows, self.waiting, strict=True):
            values = dict(zip(parts, row, strict=True))
            if not math.isfinite(values["loss"]):
                names = [self.images.ids[i] for i in index.tolist()][:4]
                split = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "loss")
                raise TrainingDiverged(
                    f"client {self.client}: loss is {values['loss']} ({split}) on images {names}...; lower lr, or look "
                    "at their boxes"
                )
            for key, value in values.items():
                self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += len(rows)
        self.waiting.clear()

    def means(self) -> dict[str, float]:
        """Means since the last call."""
        means = {k: v / self.count for k, v in self.sums.items()}
        self.sums, self.count = {}, 0
        return means
