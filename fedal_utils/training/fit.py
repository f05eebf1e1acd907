"""Train a detector, or an autoencoder: one row a pass is yielded, nothing is remembered from one call to the next.

On a GPU nothing waits inside a pass: batches are drawn and augmented many at a time, gradients are CUDA graphs.
"""

import copy
import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from ..config import TrainingConfig, VAEConfig
from ..data import AugmentDraws, Images, Labels, apply_augmentation, draw_augmentation
from ..detectors import VAE, Detector, losses_of
from . import schedule
from .graphs import add_gradients, graphs_of
from .inference import CachedImages, Device, Source, chunks
from .schedule import LocalTask, check_weights, diverged, draw_batches

SCALED_BYTES = 1 << 30  # images at an autoencoder's size are kept up to so many bytes, else scaled in every step
VAE_DECAY, VAE_CLIP = 1e-5, 5.0  # weight decay, largest norm of the gradient
AHEAD = 1 << 28  # bytes of pixels that are augmented at once on a GPU
GRAPHED = ("cuda",)  # kinds of devices on which gradients are graphs


def fit(
    model: Detector, images: Source, labels: Labels, config: TrainingConfig, task: LocalTask, device: Device = "cpu"
) -> Iterator[dict]:
    """Train `model` in place on these images; yields {"epoch", "steps", "loss", ...each part} after every pass.

    model: left in eval mode. With `config.ema` > 0 the weights at the end are their exponential moving average.
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
    graphs = graphs_of(model, config.amp, seed) if device.type in GRAPHED else None
    net, generator = graphs.net if graphs else model, torch.Generator(device).manual_seed(seed)
    optimizer = schedule.build_optimizer(net, config)
    schedule.load_optimizer(optimizer, net, task.optimizer_state or {})
    optimizer.zero_grad(set_to_none=graphs is None)
    averaged = copy.deepcopy(net.state_dict()) if config.ema > 0 else None
    done = added = in_row = 0
    waiting, sums = [], {}  # losses of steps that nobody has read yet; of all losses of this pass
    for epoch, last, index, batch in _batches(images, labels, config, task, device):
        names, values = graphs.gradients(batch) if graphs else add_gradients(net, batch, config.amp, generator)
        waiting.append((values, index))
        in_row += 1
        if device.type == "cpu" or last:  # reading a loss makes a GPU wait
            for row, (_, rows) in zip(torch.stack([w[0] for w in waiting]).tolist(), waiting, strict=True):
                losses = dict(zip(names, row, strict=True))
                if not math.isfinite(losses["loss"]):
                    raise diverged(task.client, losses, [images.ids[i] for i in rows.tolist()])
                sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
            waiting.clear()
        added += 1
        if added >= schedule.batches_per_step(config, before + done) or done == steps - 1:
            schedule.set_rates(optimizer, config, before + done, whole)
            schedule.clip(net, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=graphs is None)
            if averaged:
                _average(averaged, net.state_dict(), 1 - min(config.ema, (2 + done) / (11 + done)))
            added = 0
        done += 1
        if last:
            yield {"epoch": epoch, "steps": done, **{k: v / in_row for k, v in sums.items()}}
            sums, in_row = {}, 0
    if averaged or graphs:
        model.load_state_dict(averaged or net.state_dict())
    check_weights(model.state_dict(), task.client)
    if task.optimizer_state is not None:
        schedule.save_optimizer(optimizer, net, task.optimizer_state, before + done)
    model.eval()


@torch.no_grad()
def _average(averaged: dict[str, Tensor], now: dict[str, Tensor], weight: float) -> None:
    """Move the moving average of a state by `weight` of the way to what it is now; counters are copied."""
    floats = [k for k, v in averaged.items() if v.is_floating_point()]
    torch._foreach_lerp_([averaged[k] for k in floats], [now[k] for k in floats], weight)
    for key in averaged.keys() - set(floats):
        averaged[key].copy_(now[key])


def _batches(images, labels: Labels, config: TrainingConfig, task: LocalTask, device: torch.device) -> Iterator[tuple]:
    """(epoch, is last of it, rows, (inputs, boxes, classes, ignore)) of each step, mirrored and augmented.

    Draws are made in the order of the steps; on a GPU those of many batches are applied at once.
    """
    change = config.augment
    changes = change.changes_pixels() and not isinstance(images, CachedImages)
    ahead = 1
    if device.type == "cuda" and change.mosaic == 0:  # a mosaic joins images of its batch
        ahead = max(1, min(16, AHEAD // (3 * math.prod(images.image_size) * config.batch)))
        labels = labels.to(device)

    def drawn() -> Iterator[tuple]:
        for epoch, last, index in draw_batches(len(images), config.batch, config.epochs, task.iterations, task.rng):
            flip = torch.rand(len(index), generator=task.rng) < change.flip
            draws = draw_augmentation(len(index), task.rng, change.mosaic > 0) if changes else None
            yield epoch, last, index, flip, draws

    stream = drawn()
    while some := list(islice(stream, ahead)):
        _, _, index, flip, draws = zip(*some, strict=True)
        index, flip = torch.cat(index), torch.cat(flip)
        target = labels.take(index).to(device).flip(flip.to(device), images.image_size[1])
        batch = images.batch(index, device, flip=flip), target.boxes, target.classes, target.ignore
        if changes:
            columns = zip(*draws, strict=True)  # mirror, colour, zoom, ... of each batch
            joined = (None if v[0] is None else torch.cat(v, dim=int(k == 1)) for k, v in enumerate(columns))
            batch = apply_augmentation(*batch, AugmentDraws(*joined), change.replace(flip=0.0))
        start = 0
        for epoch, last, rows, *_ in some:
            part = slice(start, start := start + len(rows))
            inputs = tuple(m[part] for m in batch[0]) if isinstance(batch[0], tuple) else batch[0][part]
            yield epoch, last, rows, (inputs, *(t[part] for t in batch[1:]))


def fit_vae(
    vae: VAE, images: Images, rows: np.ndarray, config: VAEConfig, rng: torch.Generator, device="cpu", client="vae"
) -> Iterator[dict]:
    """Train `vae` in place on these rows of `images` with Adam; yields as `fit` does, of each part its mean an image.

    The loss is the batch's mean of reconstruction + kl_weight * kl. With `vae.as_released` the gradient is never reset
    in a call: each step adds to what clipping left of the sum so far. rng: of order and of the latents' noise.
    """
    device = torch.device(device)
    vae.to(device).train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.vae_lr, weight_decay=VAE_DECAY)
    noise = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
    sums, in_row, scaled = {}, 0, None
    if 12 * len(rows) * math.prod(vae.size) <= SCALED_BYTES:  # scaling an image costs as much as learning from it
        parts = images.batches([rows[chunk] for chunk in chunks(len(rows), 64)], device)
        scaled = torch.cat([vae.prepare(pixels) for pixels in parts])
    batches = draw_batches(len(rows), config.vae_batch, None, config.vae_iterations, rng)
    for done, (epoch, last, index) in enumerate(batches, start=1):
        chosen = rows[index.numpy()]
        x = vae.prepare(images.batch(chosen, device)) if scaled is None else scaled[index.to(device)]
        parts = losses_of(vae, x, *vae(x, noise))  # (B,) each
        each = parts["reconstruction"] + vae.kl_weight * parts["kl"]
        loss = each.mean()
        means = {key: float(part.detach().mean()) for key, part in {"loss": loss, **parts}.items()}
        if not math.isfinite(means["loss"]):
            broken = chosen[~torch.isfinite(each.detach()).cpu().numpy()]
            raise diverged(client, means, [images.ids[i] for i in broken])
        if not vae.as_released or done == 1:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), VAE_CLIP)
        optimizer.step()
        in_row += 1
        sums = {key: sums.get(key, 0.0) + mean for key, mean in means.items()}
        if last:
            yield {"epoch": epoch, "steps": done, **{k: v / in_row for k, v in sums.items()}}
            sums, in_row = {}, 0
    optimizer.zero_grad(set_to_none=True)
    check_weights(vae.state_dict(), client)
    vae.eval()


@torch.inference_mode()
def reconstruction_errors(
    vae: VAE, images: Images, device: Device = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Squared error of all images (N,), in order, on the CPU. generator: of the latents with `vae.as_released`."""
    vae.to(device).eval()
    errors = [torch.zeros(0)]
    for pixels in images.batches(chunks(len(images), 64), device):
        x = vae.prepare(pixels)
        parts = losses_of(vae, x, *vae(x, generator if vae.as_released else None))
        errors.append(parts["reconstruction"].float().cpu())
    found = torch.cat(errors)
    for row in (~found.isfinite()).nonzero()[:, 0].tolist():
        raise ValueError(f"image {images.ids[row]!r}: a broken VAE must not choose labels: train it again")
    return found
