"""Train an autoencoder on a client's images, and say how well it knows others."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..config import VAEConfig
from ..data import Images
from ..detectors import VAE, losses_of
from .inference import chunks
from .schedule import TrainingDiverged, check_weights, draw_batches

SCALED_BYTES = 1 << 30  # images at an autoencoder's size are kept up to so many bytes, else scaled in every step
WEIGHT_DECAY, CLIP = 1e-5, 5.0  # largest norm of the gradient


def fit_vae(
    vae: VAE,
    images: Images,
    rows: np.ndarray,
    config: VAEConfig,
    rng: torch.Generator,
    device: str | torch.device = "cpu",
    client: str = "vae",
    task: Callable[[Tensor, np.ndarray], Tensor] | None = None,
) -> Iterator[dict]:
    """Train `vae` in place on these rows of `images` with Adam; yields as `fit` does, of each part its mean an image.

    The loss is the batch's mean of reconstruction + kl_weight * kl. With `vae.as_released` the gradient is never reset
    in a call: each step adds to what clipping left of the sum so far.

    rng: of order and of the latents' noise. client: named if the loss stops being finite.
    task: also added; task(pixels, rows) gets reconstructions 0..255 (B, 3, H, W) at the images' own size, through which
        its gradient comes, and their rows in `images`.
    """
    device = torch.device(device)
    vae.to(device).train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.vae_lr, weight_decay=WEIGHT_DECAY)
    noise = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
    sums: dict[str, float] = {}
    in_row, scaled = 0, None
    if 12 * len(rows) * math.prod(vae.size) <= SCALED_BYTES:  # scaling an image costs as much as learning from it
        parts = images.batches([rows[chunk] for chunk in chunks(len(rows), 64)], device)
        scaled = torch.cat([vae.prepare(pixels) for pixels in parts])
    batches = draw_batches(len(rows), config.vae_batch, None, config.vae_iterations, rng)
    for done, (epoch, last, index) in enumerate(batches, start=1):
        chosen = rows[index.numpy()]
        x = vae.prepare(images.batch(chosen, device)) if scaled is None else scaled[index.to(device)]
        output = vae(x, noise)
        parts = losses_of(vae, x, *output)  # (B,) each
        each = parts["reconstruction"] + vae.kl_weight * parts["kl"]
        if task is not None:
            parts["task"] = task(vae.restore(output[0], images.image_size), chosen)
            each = each + parts["task"]
        loss = each.mean()
        if not bool(loss.isfinite()):
            broken = chosen[~torch.isfinite(each.detach()).cpu().numpy()]
            split = ", ".join(f"{k} {float(v.detach().mean()):.4g}" for k, v in parts.items())
            names = [images.ids[i] for i in broken][:4]
            raise TrainingDiverged(f"client {client}: loss is {loss:.4g} ({split}) on images {names}...; lower lr")
        if not vae.as_released or done == 1:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), CLIP)
        optimizer.step()
        in_row += 1
        for key, part in {"loss": loss, **parts}.items():
            sums[key] = sums.get(key, 0.0) + float(part.detach().mean())
        if last:
            yield {"epoch": epoch, "steps": done, **{k: v / in_row for k, v in sums.items()}}
            sums, in_row = {}, 0
    optimizer.zero_grad(set_to_none=True)
    check_weights(vae, client)
    vae.eval()


@torch.inference_mode()
def vae_losses(
    vae: VAE, images: Images, device: str | torch.device = "cpu", generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Of all images, in order, on the CPU: "reconstruction" (N,), "kl" (N,) unweighted, "latent" (N, D) means.

    generator: latents are drawn from it with `vae.as_released`.
    """
    vae.to(device).eval()
    pieces = chunks(len(images), 64)
    found = {"reconstruction": [torch.zeros(0)], "kl": [torch.zeros(0)], "latent": [torch.zeros(0, vae.latent)]}
    for rows, pixels in zip(pieces, images.batches(pieces, device), strict=True):
        x = vae.prepare(pixels)
        output = vae(x, generator if vae.as_released else None)
        parts = {k: v.float().cpu() for k, v in (losses_of(vae, x, *output) | {"latent": output[1]}).items()}
        broken = ~torch.isfinite(parts["reconstruction"] + parts["kl"])
        if broken.any():
            name = images.ids[rows[int(broken.nonzero()[0])]]
            raise ValueError(f"image {name!r}: a broken VAE must not choose labels: train it again")
        for key, value in parts.items():
            found[key].append(value)
    return {key: torch.cat(values) for key, values in found.items()}
