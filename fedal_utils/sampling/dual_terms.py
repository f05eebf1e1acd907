"""The terms of the dual score: detection losses without labels, image texture, and how the VAE is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import training
from ..config import Config
from ..data import Detections, Images, Labels
from ..detectors import SSD, VAE, Detector, clone
from ..training import CachedImages
from .scores import Scores


def texture(images: Images, size: tuple[int, int], batch: int = 64) -> Tensor:
    """(N, 2) of each image at the VAE's size, grey in [0, 1]: mean absolute step between neighbours, and contrast.

    Contrast is the standard deviation. Plain reconstruction error is known to follow both.
    """
    rows = []
    for start in range(0, len(images), batch):
        pixels = images.batch(range(start, min(start + batch, len(images)))).float()
        grey = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False).mean(1) / 255
        steps = (grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))) / 2
        rows.append(torch.stack([steps, grey.flatten(1).std(1, correction=0)], dim=1))
    return torch.cat(rows) if rows else torch.zeros(0, 2)


def beyond_texture(novelty: Tensor, looks: Tensor) -> Tensor:
    """(N,) what is left of the reconstruction error once texture and contrast (N, 2) have been accounted for.

    Residuals of least squares over the images at hand, in the error's own units. *Ours*.
    """
    if len(novelty) != len(looks):
        raise ValueError(f"texture of {len(novelty)} images is needed, got {len(looks)}")
    y = novelty.double().numpy()
    X = np.column_stack([np.ones(len(y)), looks.double().numpy()])
    rest = y - X @ np.linalg.lstsq(X, y, rcond=None)[0] if len(y) else y
    rounding = len(y) > 0 and np.abs(rest).max() <= 1e-9 * np.abs(y).max()  # all explained: nothing is left to rank by
    return torch.from_numpy(np.zeros_like(y) if rounding else rest)


@dataclass(frozen=True)
class Reconstructed:
    """Images as a VAE gives them back, in pixels 0..255 of their own size: what a detector needs of a set of images.

    noise: what a VAE as released draws its latents with.
    """

    images: Images
    vae: VAE
    noise: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, chunks: Sequence, device: str | torch.device = "cpu") -> Iterator[Tensor]:
        """Float pixels (B, 3, H, W) of each chunk of row numbers in turn."""
        for pixels in self.images.batches(chunks, device):
            yield self.vae.to(device).reconstruct(pixels, self.noise if self.vae.as_released else None)


@torch.inference_mode()
def as_reconstructed(coder: VAE, images: Images, device: str | torch.device = "cpu", batch: int = 64) -> Images:
    """These images as the VAE gives them back, to be looked at: 8-bit pixels of their own size."""
    chunks = [range(start, min(start + batch, len(images))) for start in range(0, len(images), batch)]
    parts = [x.round().to("cpu", torch.uint8) for x in Reconstructed(images, coder).batches(chunks, device)]
    return Images(images.ids, torch.cat(parts), images.sizes)


def as_labels(found: Detections, above: float) -> Labels:
    """Detections with a score of `above` and more in the place of ground truth; the rest is background. (N, T)."""
    sure = found.valid & (found.scores >= above)
    classes = torch.where(sure, found.labels, 0)
    never = torch.zeros_like(sure)
    return Labels(found.boxes * sure[..., None], classes, never, never.clone())


def detection_losses(
    model: Detector,
    images: Images | CachedImages | Reconstructed,
    labels: Labels,
    device: str | torch.device = "cpu",
    summed: bool = False,
) -> Scores:
    """MultiBox loss of each image against these labels; an image without a label has none.

    Divided by the image's own matched anchors (summed: not, as in the released code): a sum favours crowded images, a
    mean easy ones.
    """
    _is_ssd(model)
    if len(images) == 0:
        return Scores(np.zeros(0), np.zeros(0, dtype=bool))
    batch = 8 if isinstance(images, Reconstructed) and torch.device(device).type == "cpu" else 32  # fits its caches
    parts = training.image_losses(model, images, labels, batch, device, summed)
    known = ((labels.classes > 0) & ~labels.ignore).any(1).cpu().numpy()
    return Scores(sum(parts.values()).double().numpy(), known)


def _is_ssd(model: Detector) -> None:
    if not isinstance(model, SSD):
        raise ValueError(
            f"the dual score needs the detector 'ssd', whose loss is per image; got {type(model).__name__}"
        )


def task_term(
    config: Config, model: Detector, images: Images, labelled: np.ndarray, labels: Labels, device: str | torch.device
):
    """A function (pixels of reconstructions (B, 3, H, W), their rows (B,)) -> `task_weight` x the mean detection loss.

    Rows that nobody has labelled count nothing.
    """
    _is_ssd(model)
    frozen = clone(model).to(device).eval().requires_grad_(False)
    place = {int(row): position for position, row in enumerate(labelled)}

    def term(pixels: Tensor, rows: np.ndarray) -> Tensor:
        known = [(b, place[int(row)]) for b, row in enumerate(rows) if int(row) in place]
        known = known[: config.vae.task_images or len(known)]  # a batch is in drawn order: the first ones are any
        if not known:
            return pixels.sum() * 0
        batch, at = (list(side) for side in zip(*known, strict=True))
        target = labels.take(at).to(device)
        shown = images.batch([int(rows[b]) for b in batch], device) if config.as_released else pixels[batch]
        parts = frozen.image_losses(shown, target.boxes, target.classes, target.ignore, summed=config.as_released)
        return config.vae.task_weight * sum(parts.values()).mean()

    return term
