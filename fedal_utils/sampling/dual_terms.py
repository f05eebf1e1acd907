"""The terms of the dual score: detection losses without labels, on images as a VAE gives them back; image texture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import training
from ..data import Detections, Images, Labels
from ..detectors import VAE, Detector
from ..training import CachedImages
from .scores import Scores


def texture(images: Images, size: tuple[int, int]) -> Tensor:
    """(N, 2) of each image at the VAE's size, grey in [0, 1]: mean absolute step between neighbours, and contrast.

    Contrast is the standard deviation. Plain reconstruction error is known to follow both.
    """
    rows = []
    for start in range(0, len(images), 64):
        pixels = images.batch(range(start, min(start + 64, len(images)))).float()
        grey = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False).mean(1) / 255
        steps = (grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))) / 2
        rows.append(torch.stack([steps, grey.flatten(1).std(1, correction=0)], dim=1))
    return torch.cat(rows)


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
def as_reconstructed(coder: VAE, images: Images, device: str | torch.device = "cpu") -> Images:
    """These images as the VAE gives them back, to be looked at: 8-bit pixels of their own size."""
    (pixels,) = Reconstructed(images, coder).batches([range(len(images))], device)
    return Images(images.ids, pixels.round().to("cpu", torch.uint8), images.sizes)


def as_labels(found: Detections, above: float) -> Labels:
    """Detections with a score of `above` and more in the place of ground truth; the rest is background. (N, T)."""
    sure = found.valid & (found.scores >= above)
    never = torch.zeros_like(sure)
    return Labels(found.boxes * sure[..., None], torch.where(sure, found.labels, 0), never, never.clone())


def detection_losses(
    model: Detector,
    images: Images | CachedImages | Reconstructed,
    labels: Labels,
    device: str | torch.device = "cpu",
    summed: bool = False,
) -> Scores:
    """MultiBox loss of each image by an SSD against these labels; an image without a label has none.

    Divided by the image's own matched anchors (summed: not, as in the released code): a sum favours crowded images, a
    mean easy ones.
    """
    batch = 8 if isinstance(images, Reconstructed) and torch.device(device).type == "cpu" else 32  # fits its caches
    parts = training.image_losses(model, images, labels, batch, device, summed)
    known = ((labels.classes > 0) & ~labels.ignore).any(1).cpu().numpy()
    return Scores(np.asarray(sum(parts.values()).double()), known)
