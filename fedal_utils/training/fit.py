"""Train a detector on labelled images and stream its predictions.

`fit` yields one row per pass over the images and lets the caller decide; it never prints, saves, seeds, or remembers
anything from one call to the next: what an optimiser knows is handed in and out as `memory`, and where a call stands in
a longer schedule as `span` (a warm-up tied to "the first epoch" would restart in every federated round).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..data import Detections, Viewed, apply_augmentation, draw_augmentation, random_crop
from ..data.boxes import cat
from ..data.readers import Images, Labels, _rows
from ..detectors.base import SSD, Detector
from ..detectors.classifiers import Classifier, State, join, mark_valid, split, stacked
from ..detectors.losses import balanced_cross_entropy, compensation_loss, compensation_weights
from ..detectors.vae import VAE, losses_of


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


def _optimiser(model: nn.Module, recipe: TrainingConfig) -> torch.optim.Optimizer:
    """Weight decay on weights of two or more dimensions only; biases are a group of their own (the last)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    flat = [(name, p) for name, p in trained if p.dim() <= 1]
    groups = [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in flat if not name.endswith("bias")], "weight_decay": 0.0},
        {"params": [p for name, p in flat if name.endswith("bias")], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    raise ValueError(f"optimiser must be 'sgd' or 'adamw', got {recipe.optimizer!r}")


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


def _warm(optimiser: torch.optim.Optimizer, recipe: TrainingConfig, step: int, factor: float) -> None:
    """Learning rates of this step (and, in a warm-up, SGD's momentum): biases may start above the rest."""
    part = min(1.0, step / recipe.warmup) if recipe.warmup else 1.0
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr * factor
        if recipe.warmup_momentum and "momentum" in group:
            group["momentum"] = recipe.warmup_momentum + (recipe.momentum - recipe.warmup_momentum) * part
    if recipe.warmup_bias_lr and part < 1:
        optimiser.param_groups[-1]["lr"] = recipe.warmup_bias_lr + (recipe.lr - recipe.warmup_bias_lr) * part


def _batches_per_step(recipe: TrainingConfig, step: int) -> int:
    """How many batches' gradients are added up before a step: from 1 to nominal / batch over the warm-up."""
    most = max(1.0, recipe.accumulate_to / recipe.batch)
    part = min(1.0, step / recipe.warmup) if recipe.warmup else 1.0
    return max(1, round(1 + (most - 1) * part))


def learning_rate_factor(recipe: TrainingConfig, step: int, steps: int) -> float:
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
    model: Detector,
    images: Images | CachedImages,
    labels: Labels,
    recipe: TrainingConfig,
    rng: torch.Generator,
    iterations: int | None = None,
    device: str | torch.device = "cpu",
    who: str = "central",
    memory: dict[str, Tensor] | None = None,
    span: tuple[int, int] | None = None,
) -> Iterator[dict]:
    """Train `model` in place on these images; yields {"epoch", "steps", "loss", ...each part} after every pass.

    recipe: optimiser, schedule, batch, augmentation (see `config.TrainingConfig`). iterations: fixed number of steps in the
    place of `recipe.epochs`. rng: the one source of order and augmentation. who: named if the loss stops being finite.
    With `recipe.ema > 0` the weights at the end are their exponential moving average.
    memory: the optimiser's moments and step count of an earlier call, read at the start (empty: none) and updated in
    place at the end; None = forget. span: (steps before this call, steps in all) of the caller's schedule, by which
    warm-up and learning rate run; None = this call is all there is.
    With `recipe.proximal > 0` every step also pulls what is trained back to where it was at the start of this call
    (FedProx, see `_pull_back`); the loss that is yielded is the detector's, without that term.
    """
    device = torch.device(device)
    if len(images) != len(labels.classes):
        raise ValueError(f"{len(images)} images but labels for {len(labels.classes)}")
    if isinstance(images, CachedImages) and recipe.augment.changes_pixels():
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
    anchored = _anchored(model, recipe)
    cached = isinstance(images, CachedImages)
    loss_rng = torch.Generator(device="cpu").manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
    sums: dict[str, float] = {}
    waiting: list[tuple[Tensor, Tensor, dict]] = []
    done = in_row = added = 0
    optimiser.zero_grad(set_to_none=True)
    for epoch, last, index in draw_batches(len(images), recipe.batch, epochs, iterations, rng):
        flip = torch.rand(len(index), generator=rng) < recipe.augment.flip
        target = labels.take(index).to(device)
        inputs = images.batch(index, device, flip=flip)
        target = target.flip(flip.to(device), images.image_size[1])
        boxes, classes, ignore = target.boxes, target.classes, target.ignore
        if not cached and recipe.augment.changes_pixels():
            draws = draw_augmentation(len(inputs), rng, recipe.augment.mosaic > 0)
            inputs, boxes, classes, ignore = apply_augmentation(
                inputs, boxes, classes, ignore, draws, recipe.augment.replace(flip=0.0)
            )
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
            if recipe.clip > 0 or anchored:
                scaler.unscale_(optimiser)
            if recipe.clip > 0:
                for together in _clipped_together(model):
                    nn.utils.clip_grad_norm_(together, recipe.clip)
            _pull_back(anchored, recipe.proximal)
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


def _anchored(model: nn.Module, recipe: TrainingConfig) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, copy of what it is now) of everything that is trained: w and w_t of FedProx; [] where mu is 0."""
    if not recipe.proximal > 0:
        return []
    return [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def _pull_back(anchored: Iterable[tuple[Tensor, Tensor]], proximal: float) -> None:
    """Add mu (w - w_t) to w's gradients: that of FedProx's mu/2 |w - w_t|^2 (Li et al. 2020, 1812.06127 eq. 2).

    Called once a step, however many batches that adds up, on gradients that are unscaled and clipped already: clipping
    is for the loss, whose gradient is noisy; this term is left as it is, like weight decay. So plain SGD goes further
    by -lr mu (w - w_t), neither more nor less (AdamW scales it with the rest of the gradient). A parameter that this
    step's loss did not reach has no step.
    """
    for parameter, sent in anchored:
        if parameter.grad is not None:
            parameter.grad.add_(parameter - sent, alpha=proximal)


ONLOOKERS = ("evidence_head", "loss_head")  # parts of a detector that learn from maps which they do not train


def _clipped_together(model: nn.Module) -> list[list[nn.Parameter]]:
    """All parameters, but each head that only looks on apart: it must not slow what it looks on at."""
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in ("", *ONLOOKERS)}
    for name, parameter in model.named_parameters():
        parts[next((head for head in ONLOOKERS if head in name.split(".")), "")].append(parameter)
    return list(parts.values())


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


@torch.inference_mode()
def learned_losses(
    model: SSD, images: Images | CachedImages | Viewed, batch: int = 64, device: str | torch.device = "cpu"
) -> Tensor:
    """Predicted loss of each image (N,), in order, on the CPU: see `SSD.predicted_loss`. No image gives (0,)."""
    model.to(device).eval()
    parts = [model.predicted_loss(x).to("cpu") for x in images.batches(_chunks(len(images), batch), device)]
    return torch.cat(parts) if parts else torch.zeros(0)


@torch.inference_mode()
def image_losses(
    model: SSD,
    images: Images | CachedImages | Viewed,
    boxes: Tensor,
    classes: Tensor,
    ignore: Tensor,
    batch: int = 32,
    device: str | torch.device = "cpu",
    summed: bool = False,
) -> dict[str, Tensor]:
    """{"classification": (N,), "regression": (N,)} of each image, in order, on the CPU: see `SSD.image_losses`.

    boxes (N, K, 4) xyxy pixels, classes (N, K) 1..C with 0 = padding, ignore (N, K).
    """
    if not len(images) == len(boxes) == len(classes) == len(ignore):
        raise ValueError(
            f"{len(images)} images, but boxes for {len(boxes)}, classes for {len(classes)}, ignore for {len(ignore)}"
        )
    model.to(device).eval()
    chunks = _chunks(len(images), batch)
    kept: dict[str, list[Tensor]] = {"classification": [], "regression": []}
    for chunk, x in zip(chunks, images.batches(chunks, device), strict=True):
        rows = torch.from_numpy(chunk)
        target = (t[rows].to(device) for t in (boxes, classes, ignore))
        for name, part in model.image_losses(x, *target, summed=summed).items():
            kept[name].append(part.to("cpu"))
    return {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in kept.items()}


# --- classifiers: one client, or M clients as one stacked model -------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What one client of a classifier trains on in one call; rows count in the training set.

    rows (n,) of its labelled images, classes (n,) int64 from 0, counts (C,) of them by class; unlabelled: rows that
    may be mixed for distillation (empty: none). rng: the one source of order, augmentation and mixing. memory, span: as
    in `fit`.
    """

    who: str
    rows: np.ndarray
    classes: Tensor
    counts: Tensor
    unlabelled: np.ndarray
    rng: torch.Generator
    memory: dict[str, Tensor] | None = None
    span: tuple[int, int] | None = None

    def steps(self, recipe: TrainingConfig, iterations: int | None) -> int:
        """Gradient steps of this call."""
        return recipe.epochs * math.ceil(len(self.rows) / recipe.batch) if iterations is None else iterations


@dataclass(frozen=True)
class Taught:
    """A client's weights after a call (on the CPU), the steps it took, its mean loss, and the parts of that."""

    state: State
    steps: int
    loss: float
    parts: dict[str, float]


@dataclass(frozen=True)
class _Draw:
    """All that is random in one step of one client: rows, what becomes of their pixels, how they are mixed.

    index (B,) into the lesson's rows; flip (B,) bool; shift (B, 2) in 0..2 * crop; of the second batch likewise, and
    beta (U,), partner (U,): image b becomes beta_b * itself + (1 - beta_b) * its partner.
    """

    index: Tensor
    flip: Tensor
    shift: Tensor
    mixed: np.ndarray | None = None
    mixed_flip: Tensor | None = None
    mixed_shift: Tensor | None = None
    beta: Tensor | None = None
    partner: Tensor | None = None


def _draws(
    lesson: Lesson, recipe: TrainingConfig, iterations: int | None, mixing: bool, one_partner: bool
) -> Iterator[_Draw]:
    """The steps of one client. The second stream of numbers is drawn apart, so that mixing moves nothing of the first.

    Mixed batches are always full: an unlabelled pool smaller than a batch is gone through several times.
    """
    rng, batch = lesson.rng, recipe.batch
    apart = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
    mixing = mixing and len(lesson.unlabelled) > 0
    stream = (
        draw_batches(len(lesson.unlabelled), batch, None, lesson.steps(recipe, iterations), apart) if mixing else None
    )

    def changes(count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        flip = torch.rand(count, generator=source) < recipe.augment.flip
        return flip, torch.randint(0, 2 * recipe.augment.crop + 1, (count, 2), generator=source)

    epochs = recipe.epochs if iterations is None else None
    for _, _, index in draw_batches(len(lesson.rows), batch, epochs, iterations, rng):
        draw = _Draw(index, *changes(len(index), rng))
        if stream is not None:
            _, _, picked = next(stream)
            beta = torch.rand(batch, 3, generator=apart).median(dim=1).values  # of three uniforms: Beta(2, 2)
            partner = torch.randperm(batch, generator=apart)
            if one_partner:
                partner = partner[:1].expand(batch)
            draw = _Draw(
                draw.index,
                draw.flip,
                draw.shift,
                lesson.unlabelled[picked.numpy()],
                *changes(batch, apart),
                beta,
                partner,
            )
        yield draw


def _pixels(
    model: Classifier, images: Images, rows: np.ndarray, flip: Tensor, shift: Tensor, crop: int, device: torch.device
) -> Tensor:
    """(B, 3, H, W) scaled pixels of these rows, mirrored and cropped."""
    return model.scaled(random_crop(images.batch(rows, device, flip=flip), shift, crop))


def _plain_sgd(recipe: TrainingConfig) -> None:
    if recipe.optimizer != "sgd" or recipe.ema or recipe.amp or recipe.warmup_momentum or recipe.warmup_bias_lr:
        raise ValueError(
            "classifiers train with plain SGD and momentum, as KAFAL and LoGo do: set optimiser='sgd', ema=0, "
            f"amp=False and no warm-up of momentum or biases (got optimiser={recipe.optimizer!r})"
        )


def _check_lesson(lesson: Lesson, recipe: TrainingConfig, iterations: int | None) -> None:
    if len(lesson.rows) == 0:
        raise ValueError(f"client {lesson.who} has no labelled image to train on")
    if lesson.steps(recipe, iterations) < 1:
        raise ValueError(f"client {lesson.who} would make no step: iterations={iterations}, epochs={recipe.epochs}")


def fit_classifier(
    model: Classifier,
    lesson: Lesson,
    images: Images,
    recipe: TrainingConfig,
    iterations: int | None = None,
    teacher: Classifier | None = None,
    device: str | torch.device = "cpu",
    as_released: bool = False,
    until: float = 1.1,
) -> Taught:
    """Train `model` in place on one client's labelled images: SGD with momentum and weight decay on all weights.

    images: the whole training set. teacher: the global model of this round, for the distillation of KAFAL's 4.2 (with
    `recipe.compensation` > 0); it is not changed. as_released: one partner for all images of a batch, and a teacher
    that uses each batch's statistics. until: stop after the pass whose training accuracy reaches this.
    `recipe.proximal`: as in `fit`; the loss is without it here, too.
    `fit_stacked` does the same for many clients at once; this is what it is tested against.
    """
    device = torch.device(device)
    _plain_sgd(recipe)
    _check_lesson(lesson, recipe, iterations)
    model.to(device).train()
    optimiser = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    if lesson.memory:
        _recall(optimiser, model, lesson.memory)
    anchored = _anchored(model, recipe)
    counts = lesson.counts.to(device)
    gamma = compensation_weights(counts)
    classes = lesson.classes.to(device)
    teacher = _ready(teacher, recipe, device, as_released)
    before, whole = lesson.span or (0, lesson.steps(recipe, iterations))
    losses, right, seen = [], 0, 0
    for done, draw in enumerate(_draws(lesson, recipe, iterations, teacher is not None, as_released)):
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * learning_rate_factor(recipe, before + done, whole)
        x = _pixels(model, images, lesson.rows[draw.index.numpy()], draw.flip, draw.shift, recipe.augment.crop, device)
        target = classes[draw.index.to(device)]
        scores = model.scores(x)
        parts = {"supervised": balanced_cross_entropy(scores, target, counts if recipe.balanced_softmax else None)}
        if draw.mixed is not None:
            u = _pixels(model, images, draw.mixed, draw.mixed_flip, draw.mixed_shift, recipe.augment.crop, device)
            beta, partner = draw.beta.to(device), draw.partner.to(device)
            mixed = beta[:, None, None, None] * u + (1 - beta)[:, None, None, None] * u[partner]
            with torch.no_grad():
                taught = teacher.scores(mixed)
                guess = taught.argmax(1)
                weight = beta * gamma[guess] + (1 - beta) * gamma[guess[partner]]
            parts["compensation"] = recipe.distillation_weight * compensation_loss(model.scores(mixed), taught, weight)
        optimiser.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        if recipe.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        _pull_back(anchored, recipe.proximal)
        optimiser.step()
        losses.append({k: v.detach() for k, v in parts.items()})
        right, seen = right + (scores.argmax(1) == target).sum(), seen + len(target)
        if seen >= len(lesson.rows):
            if until <= 1 and int(right) >= until * seen:
                break
            right, seen = 0, 0
    model.eval()
    state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items() if v.dim() > 0}
    means = {k: float(sum(step.get(k, 0.0) for step in losses)) / len(losses) for k in losses[0]}
    taught = _sound(Taught(state, len(losses), sum(means.values()), means), lesson, images)
    if lesson.memory is not None:
        _remember(optimiser, model, lesson.memory, before + len(losses))
    return taught


def _ready(
    teacher: Classifier | None, recipe: TrainingConfig, device: torch.device, as_released: bool
) -> Classifier | None:
    """A teacher that can be asked and does not learn; None where nothing is distilled."""
    if teacher is None or recipe.distillation_weight == 0:
        return None
    return copy.deepcopy(teacher).to(device).requires_grad_(False).train(as_released)


def _sound(taught: Taught, lesson: Lesson, images: Images) -> Taught:
    broken = [k for k, v in taught.state.items() if not bool(torch.isfinite(v).all())]
    if broken or not math.isfinite(taught.loss):
        what = f"loss is {taught.loss}" + (f", weight {broken[0]!r} is not finite" if broken else "")
        some = [images.ids[row] for row in lesson.rows[:4]]
        raise TrainingDiverged(f"client {lesson.who}: {what}, trained on images {some}...; lower lr")
    return taught


# Scaled pixels of a step (clients x batch x height x width) that one stack holds on a CPU. More, and the activations
# leave its caches: at 32 x 32 a stack then takes longer than its clients one after another (`make bench`).
CPU_STACK = 1 << 15


def clients_per_stack(batch: int, image_size: tuple[int, int], device: str | torch.device) -> int:
    """How many clients train as one stacked model: on a CPU as many as pay, on a GPU all (a number larger than any)."""
    if torch.device(device).type != "cpu":
        return 1 << 30
    return max(1, CPU_STACK // (batch * image_size[0] * image_size[1]))


def fit_stacked(
    model: Classifier,
    states: Sequence[State],
    lessons: Sequence[Lesson],
    images: Images,
    recipe: TrainingConfig,
    iterations: int | None = None,
    teacher: Classifier | None = None,
    device: str | torch.device = "cpu",
    as_released: bool = False,
    most: int | None = None,
) -> list[Taught | TrainingDiverged]:
    """What `fit_classifier` does, for all clients at once: equal to it but for rounding, from the same generators.

    states: each client's weights to start from; `model` is not changed. Clients may differ in the number of images, of
    steps and in class counts. most: clients in one stack, by default `clients_per_stack`. A client whose training
    diverges harms nobody else: its error stands in its place. Memories are updated as `fit_classifier` does, but for a
    client that diverged.
    """
    device = torch.device(device)
    if len(states) != len(lessons):
        raise ValueError(f"{len(lessons)} lessons, but {len(states)} states to start from")
    _plain_sgd(recipe)
    for lesson in lessons:
        _check_lesson(lesson, recipe, iterations)
    most = most or clients_per_stack(recipe.batch, images.image_size, device)
    teacher = _ready(teacher, recipe, device, as_released)
    out: list[Taught | TrainingDiverged | None] = [None] * len(lessons)
    mixing = [teacher is not None and len(lesson.unlabelled) > 0 for lesson in lessons]
    for kind in (True, False):
        same = [m for m, mixes in enumerate(mixing) if mixes == kind]
        for start in range(0, len(same), most):
            members = same[start : start + most]
            results, memories = _run_stack(
                model,
                [states[m] for m in members],
                [lessons[m] for m in members],
                images,
                recipe,
                iterations,
                teacher if kind else None,
                device,
                as_released,
            )
            for m, taught, memory in zip(members, results, memories, strict=True):
                try:
                    out[m] = _sound(taught, lessons[m], images)
                except TrainingDiverged as error:
                    out[m] = error
                    continue
                if lessons[m].memory is not None:
                    lessons[m].memory.update(memory)
    return out


def _run_stack(
    model: Classifier,
    states: Sequence[State],
    lessons: Sequence[Lesson],
    images: Images,
    recipe: TrainingConfig,
    iterations: int | None,
    teacher: Classifier | None,
    device: torch.device,
    one_partner: bool,
) -> tuple[list[Taught], list[State]]:
    """One stack from start to end, and the clients' optimiser memories. Who has taken all its steps leaves."""
    streams = [_draws(lesson, recipe, iterations, teacher is not None, one_partner) for lesson in lessons]
    steps = [lesson.steps(recipe, iterations) for lesson in lessons]
    sent, states, memories = states, list(states), [dict(lesson.memory or {}) for lesson in lessons]
    sums = torch.zeros(2, len(lessons), device=device)
    done = 0
    while any(done < count for count in steps):
        here = [m for m, count in enumerate(steps) if done < count]
        net = stacked(model, len(here)).to(device)
        net.load_state_dict(join([states[m] for m in here]), strict=False)
        net.train()
        names = [name for name, _ in net.named_parameters()]
        momenta = [
            torch.cat([memories[m].get(f"momentum_buffer:{name}", torch.zeros_like(states[m][name])) for m in here])
            for name in names
        ]
        momenta = [momentum.to(device) for momentum in momenta]
        anchors = []  # of FedProx: not where a stack begins again because somebody left, but what the clients were sent
        if recipe.proximal > 0:
            anchors = [torch.cat([sent[m][name] for m in here]).to(device) for name in names]
        tutor = _Tutor(net, [lessons[m] for m in here], images, recipe, teacher, device)
        for step in range(done, min(steps[m] for m in here)):
            sums[:, here] += tutor.losses([next(streams[m]) for m in here])
            factors = []
            for m in here:
                before, whole = lessons[m].span or (0, steps[m])
                factors.append(learning_rate_factor(recipe, before + step, whole))
            _sgd_step(list(net.parameters()), momenta, factors, recipe, anchors)
        done = step + 1
        after = split(net.state_dict(), len(here))
        kept = split(dict(zip(names, momenta, strict=True)), len(here))
        for place, m in enumerate(here):
            states[m] = after[place]
            memories[m] = {f"momentum_buffer:{name}": value for name, value in kept[place].items()}
    taught = []
    for m, lesson in enumerate(lessons):
        supervised, compensation = (sums[:, m] / steps[m]).tolist()
        parts = {"supervised": supervised} | ({"distillation_weight": compensation} if teacher is not None else {})
        taught.append(Taught(states[m], steps[m], sum(parts.values()), parts))
        memories[m][STEPS] = torch.tensor((lesson.span or (0, 0))[0] + steps[m])
    return taught, memories


class _Tutor:
    """The losses of M clients' next step on their stacked model, each client's from its own draws."""

    def __init__(
        self,
        net: Classifier,
        lessons: Sequence[Lesson],
        images: Images,
        recipe: TrainingConfig,
        teacher: Classifier | None,
        device: torch.device,
    ):
        self.net, self.lessons, self.images, self.recipe, self.teacher = net, lessons, images, recipe, teacher
        self.device, self.place = device, torch.arange(len(lessons), device=device)[:, None]  # (M, 1)
        self.counts = torch.stack([lesson.counts for lesson in lessons]).to(device)  # (M, C)
        self.gamma = compensation_weights(self.counts)

    def losses(self, draws: Sequence[_Draw]) -> Tensor:
        """(2, M): supervised loss and distillation of each client; their gradients are in the net afterwards."""
        rows, flip, shift, target, valid = self._padded(draws)
        mark_valid(self.net, valid if valid is None else valid.T)
        scores = self._scores(self._pixels(rows, flip, shift))
        supervised = balanced_cross_entropy(
            scores, target, self.counts if self.recipe.balanced_softmax else None, valid
        )
        compensation = torch.zeros_like(supervised)
        if self.teacher is not None:
            mark_valid(self.net, None)
            compensation = self.recipe.distillation_weight * self._compensation(draws)
        self.net.zero_grad(set_to_none=True)
        (supervised + compensation).sum().backward()
        return torch.stack([supervised, compensation]).detach()

    def _padded(self, draws: Sequence[_Draw]) -> tuple[np.ndarray, Tensor, Tensor, Tensor, Tensor | None]:
        """Rows (M, B), flips, shifts, classes, and which of them count where batches are of different length."""
        lengths = [len(draw.index) for draw in draws]
        longest = max(lengths)

        def fill(t: Tensor) -> Tensor:  # with its first entry
            return t if len(t) == longest else torch.cat([t, t[:1].expand(longest - len(t), *t.shape[1:])])

        index = [fill(draw.index) for draw in draws]
        rows = np.stack([lesson.rows[i.numpy()] for lesson, i in zip(self.lessons, index, strict=True)])
        target = torch.stack([lesson.classes[i] for lesson, i in zip(self.lessons, index, strict=True)])
        flip, shift = torch.stack([fill(d.flip) for d in draws]), torch.stack([fill(d.shift) for d in draws])
        valid = None
        if min(lengths) < longest:
            valid = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(self.device)  # (M, B)
        return rows, flip, shift, target.to(self.device), valid

    def _pixels(self, rows: np.ndarray, flip: Tensor, shift: Tensor) -> Tensor:
        """(M, B, 3, H, W) scaled pixels."""
        x = _pixels(
            self.net,
            self.images,
            rows.ravel(),
            flip.flatten(),
            shift.flatten(0, 1),
            self.recipe.augment.crop,
            self.device,
        )
        return x.unflatten(0, rows.shape)

    def _scores(self, x: Tensor) -> Tensor:
        """(M, B, 3, H, W) -> (M, B, C) by each client's own weights."""
        return self.net.scores(x.transpose(0, 1).flatten(1, 2)).unflatten(1, (len(self.lessons), -1)).transpose(0, 1)

    def _compensation(self, draws: Sequence[_Draw]) -> Tensor:
        """(M,) distillation of the global model on mixed unlabelled images (KAFAL, 4.2)."""
        u = self._pixels(
            np.stack([d.mixed for d in draws]),
            torch.stack([d.mixed_flip for d in draws]),
            torch.stack([d.mixed_shift for d in draws]),
        )
        beta = torch.stack([d.beta for d in draws]).to(self.device)  # (M, U)
        partner = torch.stack([d.partner for d in draws]).to(self.device)
        part = beta[:, :, None, None, None]
        mixed = part * u + (1 - part) * u[self.place, partner]
        with torch.no_grad():
            if self.teacher.training:  # as released: it uses the statistics of each client's batch
                taught = torch.stack([self.teacher.scores(x) for x in mixed])
            else:
                taught = self.teacher.scores(mixed.flatten(0, 1)).unflatten(0, mixed.shape[:2])
            likely = self.gamma.gather(1, taught.argmax(2))  # (M, U)
            weight = beta * likely + (1 - beta) * likely.gather(1, partner)
        return compensation_loss(self._scores(mixed), taught, weight)


@torch.no_grad()
def _sgd_step(
    parameters: list[Tensor],
    momenta: list[Tensor],
    factors: Sequence[float],
    recipe: TrainingConfig,
    anchors: Sequence[Tensor] = (),
) -> None:
    """One step of torch's SGD for M clients whose weights lie one after another in each parameter.

    factors (M,): on each client's learning rate. The gradient is clipped client by client. anchors: FedProx's w_t of
    each parameter; none = no such term.
    """
    clients, grads = len(factors), [p.grad for p in parameters]

    def spread(values: Tensor, like: Tensor) -> Tensor:  # (M,) over a parameter's first dimension
        return values.repeat_interleave(len(like) // clients).view(-1, *[1] * (like.dim() - 1))

    if recipe.clip > 0:
        squares = sum(g.square().unflatten(0, (clients, -1)).flatten(1).sum(1) for g in grads)
        scale = (recipe.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(spread(scale, grad))
    if anchors:
        _pull_back(zip(parameters, anchors, strict=True), recipe.proximal)
    torch._foreach_add_(grads, parameters, alpha=recipe.weight_decay)
    torch._foreach_mul_(momenta, recipe.momentum)
    torch._foreach_add_(momenta, grads)
    if len(set(factors)) == 1:
        torch._foreach_add_(parameters, momenta, alpha=-recipe.lr * factors[0])
        return
    rates = torch.tensor([recipe.lr * factor for factor in factors], device=parameters[0].device)
    for parameter, momentum in zip(parameters, momenta, strict=True):
        parameter.sub_(spread(rates, parameter) * momentum)


@torch.inference_mode()
def class_scores(model: Classifier, images: Images, batch: int = 256, device: str | torch.device = "cpu") -> Tensor:
    """(N, C) class scores of all images, in order, on the CPU; no image gives (0, C)."""
    model.to(device).eval()
    parts = [model(x).to("cpu") for x in images.batches(_chunks(len(images), batch), device)]
    return torch.cat(parts) if parts else torch.zeros(0, model.head.out_features)


# --- autoencoders -----------------------------------------------------------------------------------------------------

SCALED_BYTES = 1 << 30  # images at an autoencoder's size are kept up to so many bytes, else scaled in every step


def fit_vae(
    vae: VAE,
    images: Images,
    rows: np.ndarray,
    rng: torch.Generator,
    iterations: int,
    batch: int = 16,
    lr: float = 1e-3,
    weight_decay: float = 1e-5,
    clip: float = 5.0,
    device: str | torch.device = "cpu",
    who: str = "vae",
    task: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[dict]:
    """Train `vae` in place on these rows of `images` with Adam; yields as `fit` does, of each part its mean an image.

    The loss is the batch's mean of reconstruction + kl_weight * kl, plus the mean of what `task` makes of the
    reconstructions: task(pixels, rows) gets float pixels 0..255 (B, 3, H, W) at the images' own size, through which its
    gradient comes, and their rows (B,) in `images`; it returns one number or one an image, weighted as it should count.
    clip: largest norm of the gradient, 0 = any. rng: the one source of order and of the latents' noise.
    AL-VAE: lr 1e-4, batch 32, the sum over the batch. With `vae.as_released` its penalty is taken (`kl_as_released`),
    and the gradient is never reset in a call: each step adds to what clipping left of the sum so far.
    """
    _check_pixels(images)
    rows = _rows(rows, len(images))
    if len(rows) == 0:
        raise ValueError(f"client {who} has no image to train its autoencoder on")
    if iterations < 1 or batch < 1:
        raise ValueError(f"iterations and batch must be >= 1, got {iterations} and {batch}")
    if not (0 < lr < math.inf and 0 <= weight_decay < math.inf and 0 <= clip < math.inf):
        raise ValueError(f"need finite lr > 0, weight_decay >= 0, clip >= 0, got {lr}, {weight_decay} and {clip}")
    device = torch.device(device)
    vae.to(device).train()
    optimiser = torch.optim.Adam(vae.parameters(), lr=lr, weight_decay=weight_decay)
    noise = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
    optimiser.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    in_row = 0
    scaled = None
    if 12 * len(rows) * math.prod(vae.size) <= SCALED_BYTES:  # scaling an image costs as much as learning from it
        parts = images.batches([rows[chunk] for chunk in _chunks(len(rows), 64)], device)
        scaled = torch.cat([vae.prepare(pixels) for pixels in parts])
    for done, (epoch, last, index) in enumerate(draw_batches(len(rows), batch, None, iterations, rng), start=1):
        chosen = rows[index.numpy()]
        x = vae.prepare(images.batch(chosen, device)) if scaled is None else scaled[index.to(device)]
        output = vae(x, noise)
        parts = losses_of(vae, x, *output)  # (B,) each
        each = parts["reconstruction"] + vae.kl_weight * parts["kl"]
        if task is not None:
            parts["task"] = task(vae.restore(output[0], images.image_size), torch.from_numpy(chosen))
            if parts["task"].shape not in ((), each.shape):
                raise ValueError(f"task must return one number or ({len(each)},), got {tuple(parts['task'].shape)}")
            each = each + parts["task"]
        loss = each.mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            broken = chosen[~torch.isfinite(each.detach()).cpu().numpy()]
            split_up = ", ".join(f"{k} {float(v.detach().mean()):.4g}" for k, v in parts.items())
            names = [images.ids[i] for i in (broken if len(broken) else chosen)][:4]
            raise TrainingDiverged(f"client {who}: loss is {value} ({split_up}) on images {names}...; lower lr")
        if not vae.as_released:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if clip > 0:
            nn.utils.clip_grad_norm_(vae.parameters(), clip)
        optimiser.step()
        in_row += 1
        for key, part in {"loss": loss, **parts}.items():
            sums[key] = sums.get(key, 0.0) + float(part.detach().mean())
        if last:
            yield {"epoch": epoch, "steps": done, **{k: v / in_row for k, v in sums.items()}}
            sums, in_row = {}, 0
    optimiser.zero_grad(set_to_none=True)
    _check_weights(vae, who)
    vae.eval()


@torch.inference_mode()
def vae_losses(
    vae: VAE,
    images: Images,
    batch: int = 64,
    device: str | torch.device = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Of all images, in order, on the CPU: "reconstruction" (N,), "kl" (N,) unweighted, "latent" (N, D) means.

    Latents are their means; with `vae.as_released` they are drawn from `generator`, which is then needed (else unused).
    """
    _check_pixels(images)
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
    if vae.as_released and generator is None:
        raise ValueError("a VAE as released draws its latents when it scores, too: give a generator")
    vae.to(device).eval()
    chunks = _chunks(len(images), batch)
    found = {"reconstruction": [torch.zeros(0)], "kl": [torch.zeros(0)], "latent": [torch.zeros(0, vae.latent)]}
    for rows, pixels in zip(chunks, images.batches(chunks, device), strict=True):
        x = vae.prepare(pixels)
        output = vae(x, generator if vae.as_released else None)
        parts = {k: v.float().cpu() for k, v in (losses_of(vae, x, *output) | {"latent": output[1]}).items()}
        broken = ~torch.isfinite(parts["reconstruction"] + parts["kl"])
        if broken.any():
            first = int(broken.nonzero()[0])
            values = ", ".join(f"{k} {float(parts[k][first]):.4g}" for k in ("reconstruction", "kl"))
            name = images.ids[rows[first]]
            raise ValueError(f"image {name!r}: {values}; a broken VAE must not choose labels: train it again")
        for key, value in parts.items():
            found[key].append(value)
    return {key: torch.cat(values) for key, values in found.items()}


def _check_pixels(images: Images) -> None:
    if isinstance(images, CachedImages):
        raise ValueError("an autoencoder needs pixels, got a backbone's cached features: give it the images themselves")
