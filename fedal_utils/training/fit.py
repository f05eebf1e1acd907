"""Train a detector on labelled images: `fit` yields one row a pass, and remembers nothing from one call to the next.

On a GPU nothing waits inside a pass: batches are drawn and augmented many at a time, gradients are CUDA graphs.
"""

import copy
import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..data import AugmentDraws, Images, Labels, apply_augmentation, draw_augmentation
from ..detectors import Detector
from .graphs import graphs_of
from .inference import CachedImages, half_precision, tensor_cores
from .schedule import (
    LocalTask,
    TrainingDiverged,
    anchored,
    batches_per_step,
    build_optimizer,
    check_weights,
    clip,
    draw_batches,
    load_optimizer,
    pull_back,
    save_optimizer,
    set_rates,
    update_average,
)

AHEAD = 1 << 28  # bytes of pixels that are augmented at once on a GPU
GRAPHED = ("cuda",)  # kinds of devices on which gradients are graphs


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
    config: with `proximal` > 0 every step also pulls what is trained back to where it was at the start of this call
        (FedProx); the loss that is yielded is without that term.
    task, device: see `LocalTask`; where it is trained.
    """
    device = torch.device(device)
    if isinstance(images, CachedImages) and config.augment.changes_pixels():
        raise ValueError("cached features can be mirrored and nothing else: set colour=0, zoom=(1, 1) and shift=0")
    per_epoch = math.ceil(len(images) / config.batch)
    steps = task.iterations if task.iterations is not None else config.epochs * per_epoch
    before, whole = task.schedule_position or (0, steps)
    if config.warmup_epochs:
        config = config.replace(warmup=min(config.warmup, round(config.warmup_epochs * per_epoch)))
    model.to(device).train()
    seed = int(torch.randint(1 << 62, (1,), generator=task.rng))  # of what a loss samples
    work = _Step(model, config, task.optimizer_state or {}, seed, device.type in GRAPHED)
    done = added = in_row = 0
    waiting: list[tuple[Tensor, Tensor]] = []  # losses of steps that nobody has read yet
    sums: dict[str, float] = {}
    for epoch, last, index, batch in _batches(images, labels, config, task, device):
        waiting.append((work.gradients(batch), index))
        in_row += 1
        if device.type == "cpu" or last:  # reading a loss makes a GPU wait
            for name, value in _read(waiting, work.names, images, task.client):
                sums[name] = sums.get(name, 0.0) + value
            waiting.clear()
        added += 1
        if added >= batches_per_step(config, before + done) or done == steps - 1:
            work.update(before + done, whole, min(config.ema, (2 + done) / (11 + done)))
            added = 0
        done += 1
        if last:
            yield {"epoch": epoch, "steps": done, **{k: v / in_row for k, v in sums.items()}}
            sums, in_row = {}, 0
    work.finish(model)
    check_weights(model, task.client)
    if task.optimizer_state is not None:
        save_optimizer(work.optimizer, work.net, task.optimizer_state, before + done)
    model.eval()


class _Step:
    """A step of the model; graphed: of a copy, whose gradients come from CUDA graphs."""

    def __init__(self, model: Detector, config: TrainingConfig, kept: dict[str, Tensor], seed: int, graphed: bool):
        self.config, self.names, self.device = config, ("loss",), next(model.parameters()).device
        self.graphs = graphs_of(model, config.amp, seed) if graphed else None
        self.net = self.graphs.net if graphed else model
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.optimizer = build_optimizer(self.net, config)
        load_optimizer(self.optimizer, self.net, kept)
        self.optimizer.zero_grad(set_to_none=not graphed)
        self.averaged = copy.deepcopy(self.net.state_dict()) if config.ema > 0 else None
        self.anchors = anchored(self.net, config)

    def gradients(self, batch: tuple) -> Tensor:
        """Add the gradients of a batch; its loss and the parts of it (P,), called `names`."""
        if self.graphs:
            values, self.names = self.graphs.gradients(batch), self.graphs.names
            return values
        with tensor_cores(self.config.amp):
            with half_precision(self.device, self.config.amp):
                parts = self.net.loss(*batch, self.generator)
            loss = sum(parts.values())
            loss.backward()
        self.names = ("loss", *parts)
        return torch.stack([loss.detach(), *(v.detach() for v in parts.values())])

    def update(self, step: int, steps: int, decay: float) -> None:
        """Take the step `step` of `steps`, and average the weights."""
        set_rates(self.optimizer, self.config, step, steps)
        clip(self.net, self.config.clip)
        pull_back(self.anchors, self.config.proximal)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.graphs is None)
        if self.averaged is not None:
            update_average(self.averaged, self.net.state_dict(), 1 - decay)

    def finish(self, model: Detector) -> None:
        """The weights, or their average, into the model."""
        if self.averaged is not None or self.graphs:
            model.load_state_dict(self.averaged or self.net.state_dict())


def _read(waiting: list[tuple[Tensor, Tensor]], names: tuple[str, ...], images, client: str) -> Iterator[tuple]:
    """(name, value) of every loss and its parts; TrainingDiverged for the first loss that is not finite."""
    for row, (_, index) in zip(torch.stack([values for values, _ in waiting]).tolist(), waiting, strict=True):
        if not math.isfinite(row[0]):
            ids = [images.ids[i] for i in index.tolist()][:4]
            split = ", ".join(f"{k} {v:.4g}" for k, v in zip(names[1:], row[1:], strict=True))
            raise TrainingDiverged(
                f"client {client}: loss is {row[0]} ({split}) on images {ids}...; lower lr, or look at their boxes"
            )
        yield from zip(names, row, strict=True)


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
            draws = draw_augmentation(len(index), task.rng, change.mosaic > 0) if changes else None
            yield epoch, last, index, flip, draws

    stream = drawn()
    while some := list(islice(stream, ahead)):
        index, flip = (torch.cat(parts) for parts in zip(*((s[2], s[3]) for s in some), strict=True))
        target = labels.take(index).to(device).flip(flip.to(device), images.image_size[1])
        batch = images.batch(index, device, flip=flip), target.boxes, target.classes, target.ignore
        if changes:
            batch = apply_augmentation(*batch, _joined([s[4] for s in some]), change.replace(flip=0.0))
        start = 0
        for epoch, last, rows, *_ in some:
            part = slice(start, start := start + len(rows))
            inputs = tuple(m[part] for m in batch[0]) if isinstance(batch[0], tuple) else batch[0][part]
            yield epoch, last, rows, (inputs, *(t[part] for t in batch[1:]))


def _joined(draws: list[AugmentDraws]) -> AugmentDraws:
    """Draws of several batches side by side."""
    together = zip(AugmentDraws._fields, zip(*draws, strict=True), strict=True)
    return AugmentDraws(**{k: torch.cat(v, dim=int(k == "colour")) for k, v in together if v[0] is not None})
