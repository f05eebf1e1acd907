"""Every number of an experiment in one frozen dataclass, in three sizes; unknown names are refused.

`load("11_fedavg", "smoke")` gives the smoke size; a data set brings its own image size and detector; keyword overrides
come last. A profile changes numbers and nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass
from typing import Any, get_type_hints

PROFILES = ("smoke", "quick", "paper")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained on a set of labelled images: what `training.fit` reads."""

    epochs: int = 1
    batch: int = 16
    optimiser: str = "adamw"  # 'adamw' | 'sgd'
    lr: float = 2e-3
    momentum: float = 0.937
    weight_decay: float = 5e-4
    schedule: str = "constant"  # 'constant' | 'cosine' | 'step', over one call of fit
    final_lr: float = 0.05  # cosine ends at this part of lr
    step_at: tuple[float, ...] = (0.6, 0.85)  # parts of the run at which 'step' divides by ten
    warmup: int = 0  # steps, per call of fit
    clip: float = 5.0  # largest gradient norm, 0 = off
    amp: bool = False  # mixed precision
    ema: float = 0.0  # decay of the moving average of weights, 0 = off
    flip: float = 0.5  # probability of a left-right flip
    colour: float = 0.0  # strength of brightness, contrast and saturation changes
    zoom: tuple[float, float] = (1.0, 1.0)  # range of the random scale
    shift: float = 0.0  # largest random translation, part of the side

    def changes_pixels(self) -> bool:
        """True when augmentation does more than flip."""
        return self.colour > 0 or self.zoom != (1.0, 1.0) or self.shift > 0


@dataclass(frozen=True, kw_only=True)
class Config(Recipe):
    """One experiment. Sizes in pixels are (height, width) of the letterboxed image."""

    profile: str = "smoke"
    data: str = "digits"  # a known name, or the path of a folder
    image_size: tuple[int, int] = (64, 64)
    scenes: tuple[int, int] = (600, 150)  # DigitScenes: training and test scenes
    limit: tuple[int, int] | None = None  # at most so many training and test images
    min_object: float = 0.0  # pixels: a box with a shorter side is ignored
    # detector
    detector: str = "ssd"
    backbone: str = "small"
    norm: str = "group"
    width: int = 64
    anchor_side: float = 16.0
    pretrained: bool = False
    frozen: bool = False
    # starting point: trained centrally on images of its own, before any client is asked
    start_images: int = 40
    start_iterations: int = 150
    # clients
    clients: int = 4
    partition: str = "iid"  # 'iid' | 'dirichlet' | 'natural' | 'missing'
    alpha: float = 0.5
    missing: tuple[tuple[int, ...], ...] = ()
    fraction: float = 1.0  # of the clients, in each round
    weights: str = "images"  # 'images' | 'boxes' | 'equal'
    batch_norm: str = "average"
    wire: str = "fp32"
    # cycles of asking, rounds of training
    cycles: int = 5
    first: int = 8  # images labelled at each client in cycle 0, at random
    budget: int = 8  # images labelled at each client in every later cycle
    rounds: int = 3
    iterations: int = 12  # gradient steps of one client in one round; 0 = recipe.epochs instead
    # asking
    score_above: float = 0.25  # a detection counts from this confidence on; released code
    nms_iou: float = 0.45
    class_agnostic: bool = True
    empty: str = "last"
    seconds_per_image: float = 2.0
    seconds_per_box: float = 7.0
    # judging
    evaluate_every: int = 0  # rounds; 0 = only after the last round of a cycle
    # what is compared
    methods: tuple[str, ...] = ("random", "sum", "avg", "max")
    seeds: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"profile must be one of {PROFILES}, got {self.profile!r}")
        positive = ("batch", "clients", "cycles", "rounds", "first", "budget", "start_images")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be a list of different integers >= 0, got {self.seeds}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        for name in ("flip", "score_above", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and back."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """Hex digest of all that decides a run's numbers: everything but the lists of methods and seeds."""
        values = {k: v for k, v in self.as_dict().items() if k not in ("methods", "seeds")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def replace(self, **changes: Any) -> Config:
        """A copy with these values; unknown names are refused."""
        return dataclasses.replace(self, **checked(changes))

    def labels_needed(self) -> int:
        """Images that one client has labelled at the end."""
        return self.first + self.budget * (self.cycles - 1)


def fields() -> dict[str, Any]:
    """Every name in a config and its type."""
    return get_type_hints(Config)


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The same values with lists as tuples; raises on a name that no config has, or on a value of the wrong type."""
    known = fields()
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    out = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown parameter {name!r}{hint} Known: {', '.join(sorted(known))}")
        value = _as_tuple(value)
        default = defaults[name]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        nullable = name == "limit"
        if not (nullable and value is None) and default is not None and type(value) is not type(default):
            raise ValueError(f"parameter {name!r} must be {type(default).__name__}, got {value!r}")
        if isinstance(default, tuple) and default and len({type(v) for v in default}) == 1:
            item = type(default[0])
            value = tuple(float(v) if item is float and type(v) is int else v for v in value)
            if any(type(v) is not item for v in value):
                raise ValueError(f"parameter {name!r} must hold values of type {item.__name__}, got {value!r}")
        out[name] = value
    return out


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value
