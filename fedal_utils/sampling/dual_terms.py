"""The terms of the dual score: detection losses without labels, on images as a VAE gives them back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import training
from ..data import Detections, Images, Labels
from ..detectors import VAE, Detector
from ..training import CachedImages
from .scores import Scores


@dataclass(frozen=True)
class Reconstructed:
    """Images as a VAE gives them back; noise: what a VAE as released draws its latents with."""

    images: Images
    vae: VAE
    noise: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, chunks: Sequence, device: str | torch.device = "cpu") -> Iterator[Tensor]:
        """Float pixels (B, 3, H, W) of each chunk of row numbers in turn."""
        for pixels in self.images.batches(chunks, device):
            yield self.vae.to(device).reconstruct(pixels, self.noise if self.vae.as_released else None)


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

    summed: not divided by the image's own matched anchors, as in the released code, which favours crowded images.
    """
    batch = 8 if isinstance(images, Reconstructed) and torch.device(device).type == "cpu" else 32  # fits its caches
    parts = training.image_losses(model, images, labels, batch, device, summed)
    known = ((labels.classes > 0) & ~labels.ignore).any(1).cpu().numpy()
    return Scores(np.asarray(sum(parts.values()).double()), known)
