"""Features of images by a pretrained network, cached once: what a linear classifier of the flywheel is trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ..data import Dataset, Images
from ..detectors import Embedder
from .inference import CachedImages, _digest, _read, _write, chunks


@torch.inference_mode()
def embedded(images: Images, side: int, device: str | torch.device = "cpu", model: str = "lite0") -> Tensor:
    """(N, D) what a pretrained network makes of images scaled to `side` pixels, before its classifier."""
    net = Embedder(model, side).to(device).eval()
    chunks = [range(start, min(start + 16, len(images))) for start in range(0, len(images), 16)]
    parts = [net(pixels).float().cpu() for pixels in images.batches(chunks, device)]
    return torch.cat(parts) if parts else torch.zeros(0, net.width)


def embedded_sets(
    train: Dataset, test: Dataset, model: str, side: int, device: str | torch.device, folder: str | Path | None = None
) -> tuple[Dataset, Dataset]:
    """Both sets with features of mean 0 and deviation 1 over the training images, in the place of pixels.

    model, side: the pretrained network and the side that images are scaled to. folder: kept there on disk.
    """
    both = [_kept(part.images, model, side, device, folder) for part in (train, test)]
    mean, spread = both[0].mean(0), both[0].std(0).clamp(min=1e-6)
    return tuple(
        dataclasses.replace(part, images=_as_images(part.images, (features - mean) / spread))
        for part, features in zip((train, test), both, strict=True)
    )


def _kept(images: Images, model: str, side: int, device: str | torch.device, folder: str | Path | None) -> Tensor:
    if folder is None:
        return embedded(images, side, device, model)
    pixels = _digest(images.batches(chunks(len(images), 64)))
    file = Path(folder) / f"{pixels}-{model}-{side}-{torch.device(device).type}.pt"
    found = _read(file)
    if found is None:
        found = [(embedded(images, side, device, model),)]
        _write(file, found)
    return found[0][0]


def _as_images(images: Images, features: Tensor) -> CachedImages:
    return CachedImages(images.ids, (features,), None, images.sizes, images.image_size, images.groups)
