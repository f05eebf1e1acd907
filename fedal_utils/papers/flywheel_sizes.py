"""The labelling flywheel: the sizes of notebook 50, classes, and of its second part, boxes ("50b").

Classes: a linear classifier on cached features. Boxes: one node, every cycle trains from the first weights (digits:
from an initial model); the images that are held out say what the detector makes of images it knows nothing of.
"""

from __future__ import annotations

from . import ssd_vae
from .sizes import Preset, Sizes

_CLASSES: Sizes = dict(clients=1, initial_model_images=0, rounds=1, seconds_per_box=0.0)
_SMALL: dict[str, Sizes] = {
    "digit-images": {
        **_CLASSES,
        **dict(image_size=(16, 16), feature_side=64, limit=(900, 500)),
        **dict(initial_labels=20, query_size=20, cycles=6, goal=0.85, threads=1),
    },
    "": {
        **_CLASSES,
        **dict(image_size=(32, 32), feature_side=96, limit=(10000, 2000)),
        **dict(initial_labels=100, query_size=100, cycles=11, goal=0.7, threads=1),
    },
}
_FULL: Sizes = {
    **_CLASSES,
    **dict(dataset="cifar10", image_size=(32, 32), feature_side=224),
    **dict(initial_labels=100, query_size=100, cycles=21, goal=0.9, threads=0, seeds=(0, 1, 2, 3, 4)),
}
_SMALL_BOXES: dict[str, Sizes] = {
    "digits": {**ssd_vae.DIGITS, "held_out_images": 10},
    "bccd": {**ssd_vae.BCCD, "held_out_images": 20},
    "": {**ssd_vae.PHOTOGRAPHS, "held_out_images": 10},
}
_METHODS = (
    *("random", "confidence", "margin", "ratio", "entropy", "model_outlier", "embedding_outlier", "cluster"),
    *("representative", "coreset", "mix", "mix_diverse"),
)
_BOX_METHODS = (
    *("random", "avg", "margin_avg", "ratio_avg", "entropy_avg", "model_outlier", "embedding_outlier", "cluster"),
    *("representative", "mix"),
)
PRESETS = {
    "50": Preset(_METHODS, _FULL, small=_SMALL, data={"smoke": "digit-images", "quick": "cifar10"}),
    "50b": Preset(_BOX_METHODS, {**ssd_vae.FULL_SSD, "held_out_images": 500}, small=_SMALL_BOXES),
}
