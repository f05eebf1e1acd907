"""What each observation needs of an experiment, so that what cannot work is refused before it starts."""

from __future__ import annotations

from functools import cached_property

from ..config import Config
from .observation import PoolObservation


def names() -> tuple[str, ...]:
    """All that can be observed, by name."""
    return tuple(
        name
        for name, value in vars(PoolObservation).items()
        if isinstance(value, cached_property) and not name.startswith("_") and name not in ("images", "photos")
    )


def refusal(name: str, config: Config) -> str:
    """Why this experiment cannot give an observation, in a few words; '' = it can."""
    boxes, query, classifier = name in _OF_DETECTORS, config.query, config.model.classifier
    if boxes and classifier:
        return "it is for detectors"
    if name in _OF_CLASSIFIERS and not classifier:
        return "it is for classifiers of whole images"
    if name in _OF_LINEAR and classifier != "linear":
        return "it needs classifier='linear'"
    if name.startswith(("local_only", "committee")) and classifier == "linear":
        return "a linear classifier is trained on one client's labels anyway"
    if name == "held_out_detections" and config.federation.held_out_images < 1:
        return "it compares with images that are held out: set held_out_images to 1 or more"
    if name in _OF_SSD and config.model.detector != "ssd":
        return f"it needs the loss of each image: set detector='ssd', not {config.model.detector!r}"
    if name == "predicted_losses" and not config.model.image_loss_head:
        return "it reads a head that learns the detector's loss: set image_loss_head=True"
    if name == "hidden_label_losses" and not query.diagnostic:
        return "it looks at hidden labels, an upper bound and no method: set diagnostic=True to run it"
    return ""


_OF_SSD = frozenset(
    {"reconstruction_errors", "hidden_label_losses", "consistency_losses", "pseudo_label_losses", "predicted_losses"}
)
_OF_LINEAR = frozenset({"activations", "held_out_activations", "held_out_classes"})
_OF_DETECTORS = _OF_SSD | {name for name in names() if name.endswith("detections")} | {"views", "latents"}
_OF_CLASSIFIERS = _OF_LINEAR | {name for name in names() if name.endswith("class_scores")} | {"local_only_embeddings"}
