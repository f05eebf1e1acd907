"""What a trained model says of images, in order, on the CPU; and a frozen backbone's maps, computed once and kept.

With a folder, cached maps are kept on disk under the fingerprint of backbone and pixels: who comes next does not pay.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import Detections, Images, Labels, Viewed, join_detections, row_numbers
from ..detectors import SSD, Classifier, Detector


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
        rows = torch.from_numpy(row_numbers(index, len(self)))
        return CachedImages(
            ids=tuple(self.ids[i] for i in rows.tolist()),
            features=tuple(f[rows] for f in self.features),
            mirrored=None if self.mirrored is None else tuple(f[rows] for f in self.mirrored),
            sizes=self.sizes[rows],
            image_size=self.image_size,
            groups=None if self.groups is None else tuple(self.groups[i] for i in rows.tolist()),
        )

    def batch(self, index, device: str | torch.device = "cpu", flip: Tensor | None = None) -> tuple[Tensor, ...]:
        """The maps of these rows on `device`; those of the mirror image where `flip` (B,) bool is True."""
        rows = torch.from_numpy(row_numbers(index, len(self)))
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
        """`batch` for each chunk of row numbers in turn."""
        for chunk in chunks:
            yield self.batch(chunk, device)


def chunks(count: int, size: int) -> list[np.ndarray]:
    """Row numbers 0..count - 1 in pieces of `size`."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


@torch.inference_mode()
def cache_features(
    model: Detector,
    images: Images,
    batch: int | None = None,
    device: str | torch.device = "cpu",
    mirrored: bool = True,
    folder: str | Path | None = None,
) -> CachedImages:
    """Run the frozen backbone once over all images; half precision, kept in the memory of the CPU.

    Training the head alone then costs no backbone pass at all, which makes real photographs feasible on a CPU.
    model: with a frozen backbone; images: also a changed view of them.
    batch: 8 on a CPU (its caches hold that much: three times as fast an image as 32), 64 on a GPU unless given.
    mirrored: the maps of the mirror images as well.
    folder: the maps are kept there on disk, and read where they are there already; None = neither.
    """
    if not model.frozen:
        raise ValueError("only a frozen backbone's features can be cached; build the detector with frozen=True")
    model.eval()
    model.backbone.to(memory_format=torch.channels_last)
    batch = batch or (8 if torch.device(device).type == "cpu" else 64)
    file = None if folder is None else Path(folder) / f"{_fingerprint(model, images, device, mirrored)}.pt"
    joined = None if file is None else _read(file)
    if joined is None:
        kept: list[list[tuple[Tensor, ...]]] = [[], []]
        for pixels in images.batches(chunks(len(images), batch), device):
            for side, view in enumerate((pixels, pixels.flip(-1)) if mirrored else (pixels,)):
                kept[side].append(tuple(m.to("cpu", torch.float16) for m in model.features(view)))
        joined = [tuple(torch.cat(level) for level in zip(*parts, strict=True)) for parts in kept if parts]
        if not all(bool(torch.isfinite(level).all()) for level in joined[0]):
            raise ValueError("a cached feature is not finite in half precision")
        if file is not None:
            _write(file, joined)
    return CachedImages(
        images.ids, joined[0], joined[1] if mirrored else None, images.sizes, images.image_size, images.groups
    )


def _digest(tensors) -> str:
    """SHA-256 of tensors' bytes, cut to 16 hex digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()[:16]


def _fingerprint(model: Detector, images: Images, device, mirrored: bool) -> str:
    """Name of the file that holds these images' maps: pixels, ids, backbone, kind of machine."""
    pixels = _digest(images.batches(chunks(len(images), 64)))
    backbone = _digest(v for _, v in sorted(model.backbone.state_dict().items()))
    about = (images.ids, type(model.backbone).__name__, torch.device(device).type, mirrored)
    return f"{pixels}-{backbone}-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"


def _read(file: Path) -> list[tuple[Tensor, ...]] | None:
    """What `_write` wrote; None where nothing is, or where it is broken."""
    try:
        kept = torch.load(file, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return None
    sides = [tuple(side) for side in kept["maps"]]
    return sides if _digest(m for side in sides for m in side) == kept["digest"] else None


def _write(file: Path, maps: list[tuple[Tensor, ...]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        torch.save({"maps": maps, "digest": _digest(m for side in maps for m in side)}, scratch)
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


def half_precision(device: str | torch.device, wanted: bool | None = None) -> torch.autocast:
    """Inside, bfloat16 where it is wanted (None: on a GPU) and where the device has it."""
    device = torch.device(device)
    has = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = device.type == "cuda" if wanted is None else wanted
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted and has)


@contextlib.contextmanager
def tensor_cores(wanted: bool) -> Iterator[None]:
    """Inside, what is left of float32 matrix products on a GPU runs in TF32 if that is wanted."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _ready(model, device: str | torch.device) -> torch.autocast:
    """Put the model on the device in eval mode; on a GPU it predicts in half precision, channels last."""
    with torch.inference_mode(False):  # or its weights could not be trained afterwards
        model.to(device).eval()
        if torch.device(device).type == "cuda":
            model.to(memory_format=torch.channels_last)
    return half_precision(device)


@torch.inference_mode()
def predict(
    model: Detector, images: Images | CachedImages, batch: int = 64, device: str | torch.device = "cpu", **options
) -> Detections:
    """Detections of all images, in order, on the CPU. options: as `model.predict` (score_above, nms_iou, top, ...)."""
    if len(images) == 0:
        raise ValueError("no images to predict on")
    with _ready(model, device), tensor_cores(torch.device(device).type == "cuda"):
        parts = [model.predict(x, **options).to("cpu") for x in images.batches(chunks(len(images), batch), device)]
    return join_detections(parts)


def _each(method: str, model, images, batch: int, device, empty: Tensor) -> Tensor:
    """One row an image of what this method of the model says, in order, on the CPU; `empty` where there is no image."""
    with _ready(model, device), tensor_cores(torch.device(device).type == "cuda"):
        parts = [getattr(model, method)(x).to("cpu") for x in images.batches(chunks(len(images), batch), device)]
    return torch.cat(parts).float() if parts else empty


@torch.inference_mode()
def embed(
    model: Detector, images: Images | CachedImages, batch: int = 64, device: str | torch.device = "cpu"
) -> Tensor:
    """One vector an image (N, D), in order, on the CPU: see `model.embed`. No image gives (0, 0)."""
    return _each("embed", model, images, batch, device, torch.zeros(0, 0))


@torch.inference_mode()
def class_scores(model: Classifier, images: Images, batch: int = 256, device: str | torch.device = "cpu") -> Tensor:
    """(N, C) class scores of all images, in order, on the CPU; no image gives (0, C)."""
    return _each("forward", model, images, batch, device, torch.zeros(0, model.classes))


@torch.inference_mode()
def learned_losses(
    model: SSD, images: Images | CachedImages | Viewed, batch: int = 64, device: str | torch.device = "cpu"
) -> Tensor:
    """Predicted loss of each image (N,), in order, on the CPU: see `SSD.predicted_loss`. No image gives (0,)."""
    return _each("predicted_loss", model, images, batch, device, torch.zeros(0))


@torch.inference_mode()
def image_losses(
    model: SSD,
    images: Images | CachedImages | Viewed,
    labels: Labels,
    batch: int = 32,
    device: str | torch.device = "cpu",
    summed: bool = False,
) -> dict[str, Tensor]:
    """{"classification": (N,), "regression": (N,)} of each image against its labels, in order, on the CPU.

    model, images, labels: the detector, N images, and their N rows of labels.
    batch, device: how many images at once, and where.
    summed: see `SSD.image_losses`.
    """
    if len(images) != len(labels.classes):
        raise ValueError(f"{len(images)} images, but labels for {len(labels.classes)}")
    model.to(device).eval()
    pieces = chunks(len(images), batch)
    kept: dict[str, list[Tensor]] = {"classification": [], "regression": []}
    for rows, x in zip(pieces, images.batches(pieces, device), strict=True):
        target = labels.take(rows).to(device)
        for name, part in model.image_losses(x, target.boxes, target.classes, target.ignore, summed=summed).items():
            kept[name].append(part.to("cpu"))
    return {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in kept.items()}
