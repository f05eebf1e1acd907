"""What the tests of detectors share: small models, noise, padded targets; what torchvision is given for the same."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedal_utils.config import Config
from fedal_utils.detectors import build
from fedal_utils.seeding import torch_rng_for

YOLO = {"detector": "yolo", "image_size": (64, 96), "width_multiple": 0.125, "anchor_side": 2.5}


def small(detector="ssd", classes=3, seed=0, **options):
    """An untrained detector of few weights; (64, 64) px, or (64, 96) for a YOLO, unless told otherwise."""
    options = (YOLO if detector == "yolo" else {"detector": detector}) | options
    return build(Config.of(**options), classes, torch_rng_for(seed, "weights"))


def pixels(count, height=64, width=64, seed=0):
    return torch.randint(0, 256, (count, 3, height, width), generator=torch_rng_for(seed, "px"), dtype=torch.uint8)


def random_boxes(rng, *shape, side=64.0, least=2.0):
    low = torch.rand(*shape, 2, generator=rng) * (side - least)
    return torch.cat([low, low + least + torch.rand(*shape, 2, generator=rng) * (side - least - low)], dim=-1)


def random_targets(rng, images, columns=6, classes=3, side=64.0, some_ignored=False):
    """Padded boxes, classes and ignore with 0..columns real rows an image."""
    boxes = random_boxes(rng, images, columns, side=side)
    count = torch.randint(0, columns + 1, (images, 1), generator=rng)
    real = torch.arange(columns) < count
    numbers = torch.randint(1, classes + 1, (images, columns), generator=rng) * real
    ignore = (torch.rand(images, columns, generator=rng) < 0.3) & real & some_ignored
    return boxes * real[..., None], numbers, ignore


def targets(rows, columns=None):
    """Padded boxes, classes, ignore of lists of (box, class, ignored), one list an image."""
    columns = max(map(len, rows)) if columns is None else columns
    rows = [[*row, *[((0, 0, 0, 0), 0, False)] * (columns - len(row))] for row in rows]
    boxes, classes, ignore = (torch.tensor([[one[k] for one in row] for row in rows]) for k in range(3))
    return boxes.float().reshape(len(rows), columns, 4), classes.long(), ignore.bool()


def as_list(boxes, classes):
    return [{"boxes": b[c > 0], "labels": c[c > 0]} for b, c in zip(boxes, classes, strict=True)]


def same_detections(found, wanted, atol=1e-4):
    """Padded detections equal torchvision's list, in order."""
    for i, want in enumerate(wanted):
        n = int(found.valid[i].sum())
        assert n == len(want["boxes"]) and found.valid[i, :n].all()
        assert torch.equal(found.labels[i, :n], want["labels"])
        assert torch.allclose(found.scores[i, :n], want["scores"], atol=1e-6)
        assert torch.allclose(found.boxes[i, :n], want["boxes"], atol=atol)


class NoWaiting(TorchDispatchMode):
    """Fails where an operation's shape or a Python number depends on values: on a GPU it would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        masks = [t for t in (args[1] if name in ("index", "index_put", "index_put_") else []) if t is not None]
        assert not any(t.dtype in (torch.bool, torch.uint8) for t in masks), f"{func} by a mask"
        waits = ("nonzero", "_local_scalar_dense", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal")
        assert name not in waits and "nms" not in name, str(func)
        return func(*args, **(kwargs or {}))
