"""The form of a notebook's sizes, and the sizes that several notebooks share.

A dictionary holds flat names of the config, one group of them a line: data, model, training, federation, query.
"""

from dataclasses import dataclass, field
from typing import Any

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """The sizes of one notebook."""

    methods: tuple[str, ...]  # what is compared
    full: Sizes  # the size `paper`
    full_by_data: dict[str, Sizes] = field(default_factory=dict)  # what another data set changes in it
    small: dict[str, Sizes] = field(default_factory=dict)  # on top of `BY_DATA`; "" = photographs without an entry
    data: dict[str, str] = field(default_factory=dict)  # of a profile, where it is not that of `PROFILES`


PROFILES: dict[str, Sizes] = {
    "smoke": {"dataset": "digits", "seeds": (0, 1), "threads": 1},
    "quick": {"dataset": "bccd", "seeds": (0, 1, 2), "threads": 0},
}

# DigitScenes: a small detector learns from nothing in seconds. Digits are not mirrored (a mirrored 2 is no 2).
DIGITS: Sizes = {
    **dict(dataset="digits", image_size=(64, 64), scenes=(600, 150)),
    **dict(detector="ssd", backbone="small", anchor_side=16.0),
    **dict(batch=16, lr=2e-3, flip=0.0, zoom=(0.8, 1.2), shift=0.15, colour=0.3),
    **dict(clients=3, initial_model_images=40, initial_model_iterations=200, rounds=3, iterations=16),
    **dict(initial_labels=12, query_size=14, cycles=4),
}

# Photographs: frozen ImageNet features, cached once; only the head learns and travels.
PHOTOGRAPHS: Sizes = {
    **dict(image_size=(256, 256)),
    **dict(detector="ssd", backbone="lite0", pretrained=True, frozen=True, anchor_side=16.0),
    **dict(batch=8, lr=2e-3, round_lr_decay=0.2, flip=0.5),
    **dict(clients=3, initial_model_images=10, initial_model_iterations=80, rounds=3, iterations=12),
    **dict(initial_labels=4, query_size=8, cycles=5),
}

BY_DATA: dict[str, Sizes] = {
    "digits": DIGITS,
    "bccd": {
        **PHOTOGRAPHS,
        **dict(image_size=(192, 256), initial_model_images=5, initial_model_iterations=60),
        **dict(initial_labels=3, query_size=6),
    },
    # Days are clients; the smallest has 100 images.
    "hit-uav": {**PHOTOGRAPHS, **dict(image_size=(256, 320), partition="natural", clients=9)},
    "kitti-2": {
        **PHOTOGRAPHS,
        **dict(image_size=(192, 640), min_object=4.0, initial_model_images=30, initial_model_iterations=150),
    },
}

# A user's own photographs: notebook 05.
PRESETS = {"05": Preset(("avg",), {"dataset": "bccd", **PHOTOGRAPHS}, small={"": {"seeds": (0,)}})}

# One node instead of clients, without an initial model of its own; in every cycle the detector begins again.
ONE_NODE: Sizes = {
    **dict(partition="iid", clients=1, initial_model_images=0, initial_model_iterations=0, rounds=1),
    **dict(reset_each_cycle=True),
}
