"""Train a detector on labelled images and stream its predictions.

`fit` yields one row per pass over the images and lets the caller decide; it never prints, saves, seeds, or remembers
anything from one call to the next: what an optimiser knows is handed in and out as `memory`, and where a call stands in
a longer schedule as `span` (a warm-up tied to "the first epoch" would restart in every federated round).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from .augment import augment
from .boxes import Detections, cat
from .config import Recipe
from .data import Images, Labels, _rows
from .detectors import Detector


class TrainingDiverged(ValueError):
    """The loss or a weight stopped being finite; names the client and the images."""


@dataclass(frozen=True)
class CachedImages:
    """A frozen backbone's maps of a set of images, in the place of its pixels: same interface as `data.Images`.

    features, mirrored: tuples of (N, C, h, w) tensors, of the images and of their mirror images (None = not cached).
    """

    ids: tuple[str, ...]
    features: tuple[Tensor, ...]
    mirrored: tuple[Tensor, ...] | None
    sizes: Tensor
    image_size: tuple[int, int]
    groups: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: str | torch.device) -> CachedImages:
        """The same maps on `device`; `batch` is then a slice there."""
        mirrored = None if self.mirrored is None else tuple(f.to(device) for f in self.mirrored)
        return replace(self, features=tuple(f.to(device) for f in self.features), mirrored=mirrored)

    def take(self, index) -> CachedImages:
        """The maps of these rows (row numbers or a mask), in this order."""
        rows = torch.from_numpy(_rows(index, len(self)))
        return CachedImages(
            ids=tuple(self.ids[i] for i in rows.tolist()),
            features=tuple(f[rows] for f in self.features),
            mirrored=None if self.mirrored is None else tuple(f[rows] for f in self.mirrored),
            sizes=self.sizes[rows],
            image_size=self.image_size,
            groups=None if self.groups is None else tuple(self.groups[i] for i in rows.tolist()),
        )

    def batch(self, index, device: str | torch.device = "cpu", flip: Tensor | None = None) -> tuple[Tensor, ...]:
        rows = torch.from_numpy(_rows(index, len(self)))
        out = []
        for level, plain in enumerate(self.features):
            chosen = plain[rows]
            if flip is not None and bool(flip.any()):
                if self.mirrored is None:
                    raise ValueError("these features were cached without their mirror images: set flip=0")
                where = flip.to(chosen.device)[:, None, None, None]
                chosen = torch.where(where, self.mirrored[level][rows], chosen)
            out.append(chosen.to(device, non_blocking=True))
        return tuple(out)

    def batches(self, chunks, device: str | torch.device = "cpu") -> Iterator[tuple[Tensor, ...]]:
        for chunk in chunks:
            yield self.batch(chunk, device)


def _chunks(count: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


@torch.inference_mode()
def cache_features(
    model: Detector, images: Images, batch: int | None = None, device: str | torch.device = "cpu", mirrored: bool = True
) -> CachedImages:
    """Run the frozen backbone once over all images; half precision, kept in the memory of the CPU.

    Training the head alone then costs no backbone pass at all, which makes real photographs feasible on a CPU.
    batch: 8 on a CPU (its caches hold that much: three times as fast an image as 32), 64 on a GPU unless given.
    """
    if not model.frozen:
        raise ValueError("only a frozen backbone's features can be cached; build the detector with frozen=True")
    model.eval()
    model.backbone.to(memory_format=torch.channels_last)
    batch = batch or (8 if torch.device(device).type == "cpu" else 64)
    kept: list[list[tuple[Tensor, ...]]] = [[], []]
    for pixels in images.batches(_chunks(len(images), batch), device):
        for side, view in enumerate((pixels, pixels.flip(-1)) if mirrored else (pixels,)):
            kept[side].append(tuple(m.to("cpu", torch.float16) for m in model.features(view)))
    joined = [tuple(torch.cat(level) for level in zip(*parts, strict=True)) for parts in kept if parts]
    if not all(bool(torch.isfinite(level).all()) for level in joined[0]):
        raise ValueError("a cached feature is not finite in half precision")
    return CachedImages(
        images.ids, joined[0], joined[1] if mirrored else None, images.sizes, images.image_size, images.groups
    )


def draw_batches(count: int, batch: int, epochs: int | None, iterations: int | None, rng: torch.Generator):
    """Index batches: whole epochs (last batch short), or a fixed number of full batches from one shuffle after another.

    Fixed iterations cut an endless row of shuffles into batches, so that a client with three images takes as many
    steps of the same size as one with three hundred.
    Returns an iterator of (epoch, is_last_of_epoch, index); an epoch is a pass over `count` images.
    """
    if count < 1:
        raise ValueError("nothing to train on: the set of labelled images is empty")
    if (epochs is None) == (iterations is None):
        raise ValueError(f"give either epochs or iterations, got epochs={epochs} and iterations={iterations}")
    if epochs is not None:
        for epoch in range(epochs):
            order = torch.randperm(count, generator=rng)
            parts = order.split(batch)
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


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Weight decay on weights of two or more dimensions only; biases are a group of their own (the last)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    flat = [(name, p) for name, p in trained if p.dim() <= 1]
    groups = [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in flat if not name.endswith("bias")], "weight_decay": 0.0},
        {"params": [p for name, p in flat if name.endswith("bias")], "weight_decay": 0.0},
    ]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    raise ValueError(f"optimiser must be 'sgd' or 'adamw', got {recipe.optimiser!r}")


STEPS = "steps"  # in an optimiser's memory: steps taken so far


def _remember(optimiser: torch.optim.Optimizer, model: nn.Module, memory: dict[str, Tensor], steps: int) -> None:
    """Copy the optimiser's moments into `memory`, '<moment>:<parameter>' each, and the steps taken so far."""
    for name, parameter in model.named_parameters():
        for field, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                memory[f"{field}:{name}"] = value.detach().cpu().clone()
    memory[STEPS] = torch.tensor(steps)


def _recall(optimiser: torch.optim.Optimizer, model: nn.Module, memory: dict[str, Tensor]) -> None:
    """Put the moments of `memory` into the optimiser; parameters that are not in it start afresh."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for key, value in memory.items():
        field, _, name = key.partition(":")
        if name in named:
            place = "cpu" if field == "step" else named[name].device  # AdamW counts its steps on the CPU
            optimiser.state[named[name]][field] = value.to(place, copy=True)


def _warm(optimiser: torch.optim.Optimizer, recipe: Recipe, step: int, factor: float) -> None:
    """Learning rates of this step (and, in a warm-up, SGD's momentum): biases may start above the rest."""
    part = min(1.0, step / recipe.warmup) if recipe.warmup else 1.0
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr * factor
        if recipe.warmup_momentum and "momentum" in group:
            group["momentum"] = recipe.warmup_momentum + (recipe.momentum - recipe.warmup_momentum) * part
    if recipe.warmup_bias_lr and part < 1:
        optimiser.param_groups[-1]["lr"] = recipe.warmup_bias_lr + (recipe.lr - recipe.warmup_bias_lr) * part


def _batches_per_step(recipe: Recipe, step: int) -> int:
    """How many batches' gradients are added up before a step: from 1 to nominal / batch over the warm-up."""
    most = max(1.0, recipe.nominal / recipe.batch)
    part = min(1.0, step / recipe.warmup) if recipe.warmup else 1.0
    return max(1, round(1 + (most - 1) * part))


def learning_rate_factor(recipe: Recipe, step: int, steps: int) -> float:
    """Factor on `recipe.lr` at step `step` of `steps`: linear warm-up, then constant, cosine or step schedule."""
    if step < recipe.warmup:
        return (step + 1) / (recipe.warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    progress = (step - recipe.warmup) / max(1, steps - recipe.warmup)
    if recipe.schedule == "cosine":
        return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if recipe.schedule == "step":
        return 0.1 ** sum(progress >= at for at in recipe.step_at)
    raise ValueError(f"schedule must be 'constant', 'cosine' or 'step', got {recipe.schedule!r}")


def _autocast(device: torch.device, amp: bool):
    """bf16 where the device has it, else fp16 on CUDA; off on a CPU unless it is asked for."""
    dtype = torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        dtype = torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=amp and dtype is torch.float16)
    return torch.autocast(device.type, dtype=dtype, enabled=amp), scaler


def fit(
    model: Detector, images: Images | CachedImages, labels: Labels, recipe: Recipe, rng: torch.Generator,
    iterations: int | None = None, device: str | torch.device = "cpu", who: str = "central",
    memory: dict[str, Tensor] | None = None, span: tuple[int, int] | None = None,
) -> Iterator[dict]:  # fmt: skip
    """Train `model` in place on these images; yields {"epoch", "steps", "loss", ...each part} after every pass.

    recipe: optimiser, schedule, batch, augmentation (see `config.Recipe`). iterations: fixed number of steps in the
    place of `recipe.epochs`. rng: the one source of order and augmentation. who: named if the loss stops being finite.
    With `recipe.ema > 0` the weights at the end are their exponential moving average.
    memory: the optimiser's moments and step count of an earlier call, read at the start (empty: none) and updated in
    place at the end; None = forget. span: (steps before this call, steps in all) of the caller's schedule, by which
    warm-up and learning rate run; None = this call is all there is.
    """
    device = torch.device(device)
    if len(images) != len(labels.classes):
        raise ValueError(f"{len(images)} images but labels for {len(labels.classes)}")
    if isinstance(images, CachedImages) and recipe.changes_pixels():
        raise ValueError("cached features can be mirrored and nothing else: set colour=0, zoom=(1, 1) and shift=0")
    model.to(device).train()
    optimiser = _optimiser(model, recipe)
    epochs = None if iterations is not None else recipe.epochs
    per_epoch = math.ceil(len(images) / recipe.batch)
    steps = iterations if iterations is not None else (epochs or 0) * per_epoch
    before, whole = span or (0, steps)
    if recipe.warmup_epochs:
        recipe = replace(recipe, warmup=min(recipe.warmup, round(recipe.warmup_epochs * per_epoch)))
    if memory:
        _recall(optimiser, model, memory)
    autocast, scaler = _autocast(device, recipe.amp)
    averaged = copy.deepcopy(model.state_dict()) if recipe.ema > 0 else None
    cached = isinstance(images, CachedImages)
    loss_rng = torch.Generator(device="cpu").manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
    sums: dict[str, float] = {}
    waiting: list[tuple[Tensor, Tensor, dict]] = []
    done = in_row = added = 0
    optimiser.zero_grad(set_to_none=True)
    for epoch, last, index in draw_batches(len(images), recipe.batch, epochs, iterations, rng):
        flip = torch.rand(len(index), generator=rng) < recipe.flip
        target = labels.take(index).to(device)
        inputs = images.batch(index, device, flip=flip)
        target = target.flip(flip.to(device), images.image_size[1])
        boxes, classes, ignore = target.boxes, target.classes, target.ignore
        if not cached and recipe.changes_pixels():
            inputs, boxes, classes, ignore = augment(
                inputs, boxes, classes, ignore, rng, flip=0.0, colour=recipe.colour, scale=recipe.zoom,
                translate=recipe.shift, mosaic=recipe.mosaic,
            )  # fmt: skip
        _warm(optimiser, recipe, before + done, learning_rate_factor(recipe, before + done, whole))
        with autocast:
            parts = model.loss(inputs, boxes, classes, ignore, loss_rng)
        loss = sum(parts.values())
        waiting.append((loss.detach(), index, {k: v.detach() for k, v in parts.items()}))
        # Reading a loss makes a GPU wait, so there it is read once in a while and at the end of the pass.
        if device.type == "cpu" or last or len(waiting) == 16:
            in_row += _read_losses(waiting, sums, images, who)
        scaler.scale(loss).backward()
        added += 1
        stepped = added >= _batches_per_step(recipe, before + done) or done == steps - 1
        done += 1
        if stepped:
            if recipe.clip > 0:
                scaler.unscale_(optimiser)
                for together in _clipped_together(model):
                    nn.utils.clip_grad_norm_(together, recipe.clip)
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad(set_to_none=True)
            added = 0
        if averaged is not None and stepped:
            _update_average(averaged, model.state_dict(), min(recipe.ema, (1 + done) / (10 + done)))
        if last:
            yield {"epoch": epoch, "steps": done, **{k: v / in_row for k, v in sums.items()}}
            sums, in_row = {}, 0
    if averaged is not None:
        model.load_state_dict(averaged)
    _check_weights(model, who)
    if memory is not None:
        _remember(optimiser, model, memory, before + done)
    model.eval()


def _clipped_together(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All parameters, and apart from them those of an evidence head: it must not slow what it only looks on at."""
    parts = ([], [])
    for name, parameter in model.named_parameters():
        parts["evidence_head" in name.split(".")].append(parameter)
    return parts


def _read_losses(waiting: list, sums: dict[str, float], images, who: str) -> int:
    """Add waiting losses to `sums` and empty the list; raise on the first that is not finite."""
    count = len(waiting)
    for loss, index, parts in waiting:
        value = float(loss)
        if not math.isfinite(value):
            names = [images.ids[i] for i in index.tolist()][:4]
            split = ", ".join(f"{k} {float(v):.4g}" for k, v in parts.items())
            raise TrainingDiverged(
                f"client {who}: loss is {value} ({split}) on images {names}...; lower lr, or look at their boxes"
            )
        sums["loss"] = sums.get("loss", 0.0) + value
        for key, part in parts.items():
            sums[key] = sums.get(key, 0.0) + float(part)
    waiting.clear()
    return count


@torch.no_grad()
def _update_average(averaged: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    floats = [k for k, v in averaged.items() if v.is_floating_point()]
    torch._foreach_lerp_([averaged[k] for k in floats], [now[k] for k in floats], 1 - decay)
    for key, value in averaged.items():
        if not value.is_floating_point():
            value.copy_(now[key])


def _check_weights(model: nn.Module, who: str) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise TrainingDiverged(f"client {who}: weight {name!r} is not finite after training; lower lr")


@torch.inference_mode()
def predict(
    model: Detector, images: Images | CachedImages, batch: int = 64, device: str | torch.device = "cpu", **options
) -> Detections:
    """Detections of all images, in order, on the CPU. options: as `model.predict` (score_above, nms_iou, top, ...)."""
    if len(images) == 0:
        raise ValueError("no images to predict on")
    model.to(device).eval()
    parts = [model.predict(x, **options).to("cpu") for x in images.batches(_chunks(len(images), batch), device)]
    return cat(parts)


@torch.inference_mode()
def embed(
    model: Detector, images: Images | CachedImages, batch: int = 64, device: str | torch.device = "cpu"
) -> Tensor:
    """One vector an image (N, D), in order, on the CPU: see `model.embed`. No image gives (0, 0)."""
    model.to(device).eval()
    parts = [model.embed(x).to("cpu") for x in images.batches(_chunks(len(images), batch), device)]
    return torch.cat(parts) if parts else torch.zeros(0, 0)
