"""What a trained model says of images, in order, on the CPU; features that are computed once and kept.

In a folder they lie under the fingerprint of pixels and network.
"""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import Dataset, Detections, Images, Labels, Viewed, join_detections, row_numbers
from ..detectors import SSD, Classifier, Detector, Embedder


@dataclass(frozen=True)
class CachedImages:
    """A frozen backbone's maps of a set of images, in the place of its pixels: same interface as `data.Images`.

    features, mirrored: tuples of (N, C, h, w), of the images and of their mirror images (None = not cached).
    """

    ids: tuple[str, ...]
    features: tuple[Tensor, ...]
    mirrored: tuple[Tensor, ...] | None
    sizes: Tensor
    image_size: tuple[int, int]
    groups: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: str | torch.device) -> "CachedImages":
        """The same maps on `device`; `batch` is then a slice there."""
        return self._each(lambda maps: maps.to(device))

    def take(self, index) -> "CachedImages":
        """The maps of these rows (row numbers or a mask), in this order."""
        rows = torch.from_numpy(row_numbers(index, len(self)))
        groups = None if self.groups is None else tuple(self.groups[i] for i in rows.tolist())
        taken = replace(self, ids=tuple(self.ids[i] for i in rows.tolist()), sizes=self.sizes[rows], groups=groups)
        return taken._each(lambda maps: maps[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "CachedImages":
        mirrored = None if self.mirrored is None else tuple(map(change, self.mirrored))
        return replace(self, features=tuple(map(change, self.features)), mirrored=mirrored)

    def batch(self, index, device: str | torch.device = "cpu", flip: Tensor | None = None) -> tuple[Tensor, ...]:
        """The maps of these rows on `device`; those of the mirror image where `flip` (B,) bool is True."""
        rows = torch.from_numpy(row_numbers(index, len(self)))
        maps = [plain[rows] for plain in self.features]
        if flip is not None and bool(flip.any()):
            if self.mirrored is None:
                raise ValueError("these features were cached without their mirror images: set flip=0")
            where = flip.to(maps[0].device)[:, None, None, None]
            maps = [torch.where(where, other[rows], own) for own, other in zip(maps, self.mirrored, strict=True)]
        return tuple(m.to(device, non_blocking=True) for m in maps)

    def batches(self, chunks, device: str | torch.device = "cpu") -> Iterator[tuple[Tensor, ...]]:
        """`batch` for each chunk of row numbers in turn."""
        return (self.batch(chunk, device) for chunk in chunks)


def chunks(count: int, size: int) -> list[np.ndarray]:
    """Row numbers 0..count - 1 in pieces of `size`."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


@torch.inference_mode()
def cache_features(
    model: Detector,
    images: Images,
    device: str | torch.device = "cpu",
    mirrored: bool = True,
    folder: str | Path | None = None,
) -> CachedImages:
    """A frozen backbone's maps of all images, and of their mirror images if `mirrored`, in half precision on the CPU.

    model, images, device: whose backbone, of what (also a changed view), and where it runs. folder: kept there on disk,
    and read from it; None = neither.
    """
    if not model.frozen:
        raise ValueError("only a frozen backbone's features can be cached; build the detector with frozen=True")
    model.eval()
    model.backbone.to(memory_format=torch.channels_last)
    batch = 8 if torch.device(device).type == "cpu" else 64  # a CPU's caches hold so many: three times as fast as 32

    def maps() -> list[Tensor]:
        kept: list[list[tuple[Tensor, ...]]] = [[], []]
        for pixels in images.batches(chunks(len(images), batch), device):
            for side, view in enumerate((pixels, pixels.flip(-1)) if mirrored else (pixels,)):
                kept[side].append(tuple(m.to("cpu", torch.float16) for m in model.features(view)))
        joined = [torch.cat(level) for parts in kept if parts for level in zip(*parts, strict=True)]
        if not all(bool(torch.isfinite(level).all()) for level in joined):
            raise ValueError("a cached feature is not finite in half precision")
        return joined

    state = [v for _, v in sorted(model.backbone.state_dict().items())]
    both = _kept(images, state, (type(model.backbone).__name__, mirrored), device, folder, maps)
    levels = len(both) // (1 + mirrored)
    features, others = tuple(both[:levels]), tuple(both[levels:])
    return CachedImages(images.ids, features, others or None, images.sizes, images.image_size, images.groups)


@torch.inference_mode()
def embedded_sets(
    train: Dataset, test: Dataset, side: int, device: str | torch.device, folder: str | Path | None = None
) -> tuple[Dataset, Dataset]:
    """Both sets with an `Embedder`'s features in the place of pixels: mean 0, deviation 1 over the training images.

    side: of the images that it sees. folder: kept there on disk.
    """
    net = Embedder(side).to(device).eval()

    def features(images: Images) -> Tensor:
        def made() -> list[Tensor]:
            return [torch.cat([net(x).float().cpu() for x in images.batches(chunks(len(images), 16), device)])]

        return _kept(images, list(net.state_dict().values()), ("embedder", side), device, folder, made)[0]

    both = [features(part.images) for part in (train, test)]
    mean, spread = both[0].mean(0), both[0].std(0).clamp(min=1e-6)

    def as_images(images: Images, values: Tensor) -> CachedImages:
        standard = (values - mean) / spread
        return CachedImages(images.ids, (standard,), None, images.sizes, images.image_size, images.groups)

    return tuple(replace(part, images=as_images(part.images, v)) for part, v in zip((train, test), both, strict=True))


def _kept(images: Images, state, about: tuple, device, folder, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `make` makes of these images with a network of this state, from the folder if it is there."""
    if folder is None:
        return make()
    digest = hashlib.sha256(repr((images.ids, torch.device(device).type, about)).encode())
    for tensor in chain(images.batches(chunks(len(images), 64)), state):
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    file = Path(folder) / f"{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(file) as arrays:  # checks each one's checksum
            found = [torch.from_numpy(arrays[name]) for name in arrays.files]
        # as a backbone gives them: another layout has other last bits
        return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in found]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none, or broken
        made = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{os.getpid()}-{file.name}")
    np.savez(scratch, *(t.numpy() for t in made))
    os.replace(scratch, file)
    return made


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


def _answers(model, images, batch: int, device: str | torch.device, ask: Callable) -> list:
    """What `ask` makes of each batch, by the model in eval mode; on a GPU in half precision, channels last."""
    gpu = torch.device(device).type == "cuda"
    with torch.inference_mode(False):  # or its weights could not be trained afterwards
        model.to(device).eval()
        if gpu:
            model.to(memory_format=torch.channels_last)
    with half_precision(device), tensor_cores(gpu):
        return [ask(x).to("cpu") for x in images.batches(chunks(len(images), batch), device)]


@torch.inference_mode()
def predict(
    model: Detector, images: Images | CachedImages, batch: int = 64, device: str | torch.device = "cpu", **options
) -> Detections:
    """Detections of all images, in order, on the CPU. options: as `model.predict` (score_above, nms_iou, top, ...)."""
    return join_detections(_answers(model, images, batch, device, lambda x: model.predict(x, **options)))


@torch.inference_mode()
def embed(
    model: Detector, images: Images | CachedImages, batch: int = 64, device: str | torch.device = "cpu"
) -> Tensor:
    """One vector an image (N, D), in order, on the CPU: see `model.embed`. No image gives (0, 0)."""
    return torch.cat(_answers(model, images, batch, device, model.embed) or [torch.zeros(0, 0)]).float()


@torch.inference_mode()
def class_scores(model: Classifier, images: Images, batch: int = 256, device: str | torch.device = "cpu") -> Tensor:
    """(N, C) class scores of all images, in order, on the CPU; no image gives (0, C)."""
    return torch.cat(_answers(model, images, batch, device, model) or [torch.zeros(0, model.classes)]).float()


@torch.inference_mode()
def learned_losses(
    model: SSD, images: Images | CachedImages | Viewed, batch: int = 64, device: str | torch.device = "cpu"
) -> Tensor:
    """Predicted loss of each image (N,), in order, on the CPU: see `SSD.predicted_loss`. No image gives (0,)."""
    return torch.cat(_answers(model, images, batch, device, model.predicted_loss) or [torch.zeros(0)]).float()


@torch.inference_mode()
def image_losses(
    model: SSD,
    images: Images | CachedImages | Viewed,
    labels: Labels,
    batch: int = 32,
    device: str | torch.device = "cpu",
    summed: bool = False,
) -> dict[str, Tensor]:
    """`SSD.image_losses` of each of N > 0 images against its labels, `batch` at once, in order, on the CPU."""
    model.to(device).eval()
    pieces, kept = chunks(len(images), batch), []
    for rows, x in zip(pieces, images.batches(pieces, device), strict=True):
        target = labels.take(rows).to(device)
        kept.append(model.image_losses(x, target.boxes, target.classes, target.ignore, summed=summed))
    return {name: torch.cat([part[name] for part in kept]).cpu() for name in kept[0]}
