"""What a trained model says of images, in order, on the CPU; features that are computed once and kept."""

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

Device = str | torch.device
Folder = str | Path | None


@dataclass(frozen=True)
class CachedImages:
    """A frozen backbone's maps of a set of images, in the place of its pixels: same interface as `data.Images`."""

    ids: tuple[str, ...]
    features: tuple[Tensor, ...]  # (N, C, h, w) each
    mirrored: tuple[Tensor, ...] | None  # of the mirror images
    sizes: Tensor
    image_size: tuple[int, int]
    groups: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: Device) -> "CachedImages":
        """The same maps on `device`."""
        return self._each(lambda maps: maps.to(device))

    def take(self, index) -> "CachedImages":
        """The maps of these rows (row numbers or a mask), in this order."""
        rows = row_numbers(index, len(self))
        ids, groups = (names and tuple(names[row] for row in rows) for names in (self.ids, self.groups))
        return replace(self._each(lambda maps: maps[rows]), ids=ids, sizes=self.sizes[rows], groups=groups)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "CachedImages":
        mirrored = None if self.mirrored is None else tuple(map(change, self.mirrored))
        return replace(self, features=tuple(map(change, self.features)), mirrored=mirrored)

    def batch(self, index, device: Device = "cpu", flip: Tensor | None = None) -> tuple[Tensor, ...]:
        """The maps of these rows on `device`; those of the mirror image where `flip` (B,) bool is True."""
        rows = torch.from_numpy(row_numbers(index, len(self)))
        maps = [plain[rows] for plain in self.features]
        if flip is not None and bool(flip.any()):
            if self.mirrored is None:
                raise ValueError("these features were cached without their mirror images: set flip=0")
            where = flip.to(maps[0].device)[:, None, None, None]
            maps = [torch.where(where, other[rows], own) for own, other in zip(maps, self.mirrored, strict=True)]
        return tuple(m.to(device, non_blocking=True) for m in maps)

    def batches(self, chunks, device: Device = "cpu") -> Iterator[tuple[Tensor, ...]]:
        """`batch` for each chunk of row numbers in turn."""
        return (self.batch(chunk, device) for chunk in chunks)


Source = Images | CachedImages | Viewed


def chunks(count: int, size: int) -> list[np.ndarray]:
    """Row numbers 0..count - 1 in pieces of `size`."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


@torch.inference_mode()
def cache_features(
    model: Detector, images: Images | Viewed, device: Device = "cpu", mirrored: bool = True, folder: Folder = None
) -> CachedImages:
    """A frozen backbone's maps of all images, and of their mirror images if `mirrored`, in half precision on the CPU.

    folder: where they are kept on disk and read from; None = nowhere.
    """
    if not model.frozen:
        raise ValueError("only a frozen backbone's features can be cached; build the detector with frozen=True")
    model.eval()
    model.backbone.to(memory_format=torch.channels_last)
    batch = 8 if torch.device(device).type == "cpu" else 64  # a CPU's caches hold so many: three times as fast as 32

    def maps(pixels: Tensor) -> list[Tensor]:
        views = (pixels, pixels.flip(-1)) if mirrored else (pixels,)
        return [m.to("cpu", torch.float16) for view in views for m in model.features(view)]

    about = type(model.backbone).__name__, mirrored
    state = [v for _, v in sorted(model.backbone.state_dict().items())]
    both = _kept(images, state, about, device, folder, maps, batch)
    levels = len(both) // (1 + mirrored)
    features, others = tuple(both[:levels]), tuple(both[levels:])
    return CachedImages(images.ids, features, others or None, images.sizes, images.image_size, images.groups)


@torch.inference_mode()
def embedded_sets(
    train: Dataset, test: Dataset, side: int, device: Device, folder: Folder = None
) -> tuple[Dataset, Dataset]:
    """Both sets with an `Embedder`'s features in the place of pixels: mean 0, deviation 1 over the training images.

    side: of the images that it sees. folder: kept there on disk.
    """
    net, found = Embedder(side).to(device).eval(), []
    state, about = list(net.state_dict().values()), ("embedder", side)
    for part in (train, test):
        old = part.images
        values = _kept(old, state, about, device, folder, lambda x: [net(x).float().cpu()], 16)[0]
        if part is train:
            mean, spread = values.mean(0), values.std(0).clamp(min=1e-6)
        standard = ((values - mean) / spread,)
        images = CachedImages(old.ids, standard, None, old.sizes, old.image_size, old.groups)
        found.append(replace(part, images=images))
    return tuple(found)


def _kept(images: Images, state, about: tuple, device, folder, ask: Callable, batch: int) -> list[Tensor]:
    """What `ask`, by a network of this state, makes of all images, `batch` at once; in the folder by fingerprint."""
    file = None
    if folder is not None:
        digest = hashlib.sha256(repr((images.ids, torch.device(device).type, about)).encode())
        for tensor in chain(images.batches(chunks(len(images), 64)), state):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        file = Path(folder) / f"{digest.hexdigest()[:32]}.npz"
        with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile):  # none, or broken
            with np.load(file) as arrays:  # checks each one's checksum
                found = [torch.from_numpy(arrays[name]) for name in arrays.files]
            # as a backbone gives them: another layout has other last bits
            return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in found]
    made = zip(*(ask(pixels) for pixels in images.batches(chunks(len(images), batch), device)), strict=True)
    made = [torch.cat(level) for level in made]
    if not all(bool(torch.isfinite(level).all()) for level in made):
        raise ValueError("a cached feature is not finite in half precision")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{os.getpid()}-{file.name}")
        np.savez(scratch, *(t.numpy() for t in made))
        os.replace(scratch, file)
    return made


def half_precision(device: Device, wanted: bool | None = None) -> torch.autocast:
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


def _answers(model, images: Source, batch: int, device: Device, ask: Callable) -> list:
    """What `ask` makes of each batch, by the model in eval mode; on a GPU in half precision, channels last."""
    gpu = torch.device(device).type == "cuda"
    model.to(device).eval()
    if gpu:
        model.to(memory_format=torch.channels_last)
    with torch.inference_mode(), half_precision(device), tensor_cores(gpu):
        return [ask(x).to("cpu") for x in images.batches(chunks(len(images), batch), device)]


def predict(model: Detector, images: Source, batch: int = 64, device: Device = "cpu", **options) -> Detections:
    """Detections of all images, in order, on the CPU. options: as `model.predict` (score_above, nms_iou, top, ...)."""
    return join_detections(_answers(model, images, batch, device, lambda x: model.predict(x, **options)))


def embed(model: Detector, images: Source, batch: int = 64, device: Device = "cpu") -> Tensor:
    """One vector an image (N, D), in order, on the CPU: see `model.embed`. No image gives (0, 0)."""
    return torch.cat(_answers(model, images, batch, device, model.embed) or [torch.zeros(0, 0)]).float()


def class_scores(model: Classifier, images: Source, batch: int = 256, device: Device = "cpu") -> Tensor:
    """(N, C) class scores of all images, in order, on the CPU; no image gives (0, C)."""
    return torch.cat(_answers(model, images, batch, device, model) or [torch.zeros(0, model.classes)]).float()


def learned_losses(model: SSD, images: Source, batch: int = 64, device: Device = "cpu") -> Tensor:
    """Predicted loss of each image (N,), in order, on the CPU: see `SSD.predicted_loss`."""
    return torch.cat(_answers(model, images, batch, device, model.predicted_loss) or [torch.zeros(0)]).float()


@torch.inference_mode()
def image_losses(
    model: SSD, images: Source, labels: Labels, batch: int = 32, device: Device = "cpu", summed: bool = False
) -> dict[str, Tensor]:
    """`SSD.image_losses` of each of N > 0 images against its labels, in order, on the CPU."""
    model.to(device).eval()
    pieces, kept = chunks(len(images), batch), []
    for rows, x in zip(pieces, images.batches(pieces, device), strict=True):
        target = labels.take(rows).to(device)
        kept.append(model.image_losses(x, target.boxes, target.classes, target.ignore, summed))
    return {name: torch.cat([part[name] for part in kept]).cpu() for name in kept[0]}
