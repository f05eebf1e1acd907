"""A model of the config, with weights drawn from one generator; what cannot be combined is refused with the reason."""

import torch

from ..config import Config
from ..seeding import borrowed_global_rng
from .base import Detector
from .classifiers import CLASSIFIERS, Classifier, LinearClassifier, conv4, mlp, resnet8
from .faster_rcnn import FasterRCNN
from .ssd import SSD
from .vae import VAE
from .yolo import YOLO

DETECTORS = {"ssd": SSD, "faster_rcnn": FasterRCNN, "yolo": YOLO}
BACKBONES = {"ssd": ("small", "lite0", "vgg16"), "faster_rcnn": ("small", "lite0", "resnet50")}


def build(config: Config, classes: int, rng: torch.Generator) -> Detector | Classifier | LinearClassifier:
    """The config's detector (or classifier) with weights drawn from `rng`; with config.model.frozen ready to cache.

    ValueError, with the reason, where no model has all that the config asks for.
    """
    model, size, kind, backbone = config.model, config.data.image_size, config.model.detector, config.model.backbone
    name = model.classifier
    if name == "linear":
        return LinearClassifier(classes)
    if name:
        if name not in CLASSIFIERS:
            raise ValueError(f"classifier must be one of {CLASSIFIERS}, got {name!r}")
        if classes < 2 or (name == "conv4" and min(size) < 16):
            raise ValueError(f"a classifier needs 2 classes (got {classes}), 'conv4' also sides >= 16, got {size}")
        with borrowed_global_rng(rng):
            return conv4(classes, size) if name == "conv4" else {"resnet8": resnet8, "mlp": mlp}[name](classes)
    localised = model.box_loss != "smooth_l1" or model.auxiliary_head != "none" or model.emphasis != 0
    by_32, known = kind == "yolo" or backbone in ("small", "lite0"), BACKBONES.get(kind, (backbone,))
    for wrong, reason in (
        (classes < 1, f"a detector needs at least one class, got {classes}"),
        (localised and kind != "faster_rcnn", f"{kind!r} has no RoI heads for box_loss, auxiliary_head, emphasis"),
        (model.box_loss_head and kind == "yolo", "'yolo' has no box_loss_head"),
        (model.image_loss_head and kind != "ssd", f"{kind!r} has no image_loss_head: use 'ssd'"),
        (by_32 and any(s < 32 or s % 32 for s in size), f"image sides must be multiples of 32, got {size}"),
        (backbone not in known, f"detector {kind!r} takes a backbone of {known}, got {backbone!r}"),
        (kind == "ssd" and backbone == "vgg16" and size != (300, 300), f"SSD300 needs (300, 300), got {size}"),
        (model.frozen and kind != "yolo" and backbone != "lite0", f"frozen, layers of {backbone!r} would stay random"),
    ):
        if wrong:
            raise ValueError(reason)
    with borrowed_global_rng(rng):
        built = DETECTORS[kind](model, size, classes)
    if model.frozen:
        built.freeze_backbone()
    return built


def build_vae(config: Config, rng: torch.Generator) -> VAE:
    """The config's VAE with weights drawn from `rng`."""
    size, name = config.vae.vae_size, config.vae.vae_architecture
    if name == "published" and size != (300, 300):
        raise ValueError(f"autoencoder 'published' works at (300, 300) and nothing else, got vae_size {size}")
    if name == "small" and any(side % 8 or not 16 <= side <= 256 for side in size):
        raise ValueError(f"autoencoder 'small' takes sides that are multiples of 8 in 16..256, got vae_size {size}")
    with borrowed_global_rng(rng):
        return VAE(config.vae, config.as_released)
