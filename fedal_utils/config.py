"""Every number of an experiment in one frozen dataclass, in three sizes; unknown names are refused.

`load("11_fedavg", "smoke")` gives the smoke size; a data set brings its own image size, detector and counts; keyword
overrides come last. A profile changes numbers and nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

PROFILES = ("smoke", "quick", "paper")
_LISTS = ("methods", "seeds", "side_seeds")  # which runs there are, not what one of them does

# How a server makes one model of the updates; Flower's strategies of that name.
SERVERS = (
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedmedian", "fedtrimmedavg", "krum",
    "multikrum",
)  # fmt: skip
PRIVACY = ("none", "clip", "secure")
BOX_LOSSES = ("smooth_l1", "efficient_iou", "extended_iou")
COMPANIONS = ("none", "sides", "iou")
VAES = ("small", "published")
TRAINED_ON = ("labelled", "all")
STANDARDS = ("z", "rank")
FILTERS = ("semantic", "diversity", "overlap", "localisation")  # of HUALE's cascade, in the published order

# Settings that came after runs had been published: at these values the code does what it did before, so they leave the
# digest, and the folder, of those runs as it was.
_LATER: dict[str, Any] = dict(
    warmup_momentum=0.0, warmup_bias_lr=0.0, nominal=0, mosaic=0.0, depth=0.33, channels=0.5, start_warmup=0,
    merge_images=0, tail=0, optimiser_state="restart", first_pass=10, passes=0, visit=1.0, lost=0.0, on_failure="stop",
    views=False, as_released=False, gains=(0.05, 1.0, 0.5), digit_classes=10, warmup_epochs=0.0, box_loss="smooth_l1",
    box_weight=1.0, box_focal=0.0, companion="none", companion_weight=1.0, iou_power=0.5, emphasis=0.0, evidence=False,
    afresh=False, scored=0, cascade=(4.0, 3.0, 2.0, 1.5), quota=0.15,
    cascade_order=FILTERS, crop=0, balanced=False, compensation=0.0, classifier="", first_part=0.0, budget_part=0.0,
    stacked=True, alone_epochs=50, learned_loss=False, vae="small", vae_size=(64, 64), latent=64, kl_weight=1.0,
    vae_iterations=200, vae_batch=16, vae_lr=1e-3, vae_on="labelled", vae_refit=True, vae_corrected=False,
    vae_part=0.5, standard="z", shortlist=0.0, pseudo_above=0.5, task_aware=0.0, task_images=0,
    diagnostic=False,
    feature_model="lite0", feature_side=64, regularisation=0.1, annotator_error=0.0, goal=0.9, plateau=1.0,
    proximal=0.0, too_large=0.0, server="fedavg", server_lr=0.0, server_momentum=0.9, malicious=1, privacy="none",
    clip_norm=1.0, noise=0.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained on a set of labelled images: what `training.fit` reads."""

    epochs: int = 1
    batch: int = 16
    optimiser: str = "adamw"  # 'adamw' | 'sgd'
    lr: float = 2e-3
    momentum: float = 0.937
    weight_decay: float = 5e-4
    proximal: float = 0.0  # FedProx's mu: how strongly weights are pulled back to those that were sent, 0 = off
    schedule: str = "constant"  # 'constant' | 'cosine' | 'step', over one call of fit
    final_lr: float = 0.05  # cosine ends at this part of lr
    step_at: tuple[float, ...] = (0.6, 0.85)  # parts of the run at which 'step' divides by ten
    warmup: int = 0  # steps of rising learning rate; where the optimiser's state is kept, once in its life
    warmup_epochs: float = 0.0  # the warm-up takes no more steps than so many passes have, 0 = no such limit
    warmup_momentum: float = 0.0  # momentum at the first of them (SGD), 0 = momentum all along
    warmup_bias_lr: float = 0.0  # learning rate of biases at the first of them, falling to lr; 0 = as the rest
    nominal: int = 0  # images whose gradients are added up for a step, reached over the warm-up; 0 = one batch
    clip: float = 5.0  # largest gradient norm, 0 = off
    amp: bool = False  # mixed precision
    ema: float = 0.0  # decay of the moving average of weights, 0 = off
    flip: float = 0.5  # probability of a left-right flip
    colour: float = 0.0  # strength of brightness, contrast and saturation changes
    zoom: tuple[float, float] = (1.0, 1.0)  # range of the random scale
    shift: float = 0.0  # largest random translation, part of the side
    mosaic: float = 0.0  # probability of four images joined to one
    # classifiers only
    crop: int = 0  # pixels of black border that a random crop may shift the image into
    balanced: bool = False  # balanced softmax: class scores + log of the client's labelled counts
    compensation: float = 0.0  # weight of the distillation from the global model on mixed unlabelled images, 0 = off

    def changes_pixels(self) -> bool:
        """True when augmentation does more than flip."""
        return self.colour > 0 or self.zoom != (1.0, 1.0) or self.shift > 0 or self.mosaic > 0


@dataclass(frozen=True, kw_only=True)
class Config(Recipe):
    """One experiment. Sizes in pixels are (height, width) of the letterboxed image."""

    profile: str = "smoke"
    data: str = "digits"  # a known name, or the path of a folder
    image_size: tuple[int, int] = (64, 64)
    scenes: tuple[int, int] = (600, 150)  # DigitScenes: training and test scenes
    digit_classes: int = 10  # DigitScenes: the digits 0 to digit_classes - 1
    limit: tuple[int, int] | None = None  # at most so many training and test images
    min_object: float = 0.0  # pixels: a box with a shorter side is ignored
    # a classifier of whole images in the place of a detector: 'resnet8' | 'conv4', see `classifiers`
    classifier: str = ""
    # detector
    detector: str = "ssd"
    backbone: str = "small"
    norm: str = "group"
    width: int = 64
    depth: float = 0.33  # YOLO: repeats of its blocks, as part of the largest size's
    channels: float = 0.5  # YOLO: channels, as part of the largest size's
    gains: tuple[float, float, float] = (0.05, 1.0, 0.5)  # YOLO: weights of box, objectness and class loss
    anchor_side: float = 16.0  # pixels, the smallest anchor (YOLO: its width)
    anchor_ratios: tuple[float, ...] = (0.7, 1.4)  # height / width
    pretrained: bool = False
    frozen: bool = False
    # how Faster R-CNN learns boxes, see `roi_heads.Localisation`; the defaults are torchvision's
    box_loss: str = "smooth_l1"  # 'smooth_l1' | 'efficient_iou' | 'extended_iou'
    box_weight: float = 1.0  # of an IoU loss
    box_focal: float = 0.0
    companion: str = "none"  # 'none' | 'sides' (a deviation per side) | 'iou' (a head that predicts the box's IoU)
    companion_weight: float = 1.0
    iou_power: float = 0.5
    emphasis: float = 0.0
    evidence: bool = False  # a head beside it that predicts each box's classification loss; strategy 'hua' needs it
    learned_loss: bool = False  # a head beside an SSD that learns to rank images by their loss
    # starting point: trained centrally on images of its own, before any client is asked
    start_images: int = 40
    start_iterations: int = 150
    start_warmup: int = 0
    merge_images: int = 0  # held out, labelled, at the server: the chain's class-wise merge is judged on them
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
    budget: int = 8  # images labelled at each client in every later cycle (classifiers: or what it has left)
    first_part: float = 0.0  # classifiers: the same as a part of the client's images, rounded up; 0 = `first`
    budget_part: float = 0.0  # likewise, 0 = `budget`
    rounds: int = 3
    iterations: int = 12  # gradient steps of one client in one round; 0 = recipe.epochs instead
    tail: int = 0  # further rounds, of training only, after those of the last cycle
    afresh: bool = False  # in every cycle the model begins again from the starting point
    anneal: float = 1.0  # lr of a cycle's last round as part of its first round's; falls evenly in between
    optimiser_state: str = "restart"  # between rounds: 'restart' | 'client' (kept there) | 'travels' (with the model)
    first_pass: int = 10  # the chain's first visits train as long as so many rounds; released code: 200 epochs, 20
    passes: int = 0  # passes, or rounds, after the chain's first; 0 = as many as make equal gradient steps
    visit: float = 1.0  # a visit of the accumulating chain trains so long, as part of a round
    lost: float = 0.0  # probability that a client's update does not arrive
    too_large: float = 0.0  # an update that moved further than so many times the median update is left out; 0 = off
    server: str = "fedavg"  # how the updates become one model, see `SERVERS`; all but fedavg need `flower`
    server_lr: float = 0.0  # learning rate of the server's own step; 0 = 1 for fedavgm, 0.01 for the adaptive ones
    server_momentum: float = 0.9  # of fedavgm; beta_1 of fedadam and fedyogi
    malicious: int = 1  # clients that krum, multikrum and fedtrimmedavg bear
    privacy: str = "none"  # 'clip': updates are clipped and noised | 'secure': the server sees their sum only; `flower`
    clip_norm: float = 1.0  # L2 norm that a clipped update has at most
    noise: float = 0.0  # noise multiplier: standard deviation of the noise on the sum, in clip norms
    on_failure: str = "stop"  # a client whose training diverges: 'stop' the run | 'skip' it in this round
    stacked: bool = True  # clients of classifiers train as one stacked model, else one after another
    threads: int = 1  # CPU threads of a training step; the same number gives the same bits on the same kind of CPU
    # asking
    score_above: float = 0.25  # a detection counts from this confidence on; released code
    nms_iou: float = 0.45
    class_agnostic: bool = True
    views: bool = False  # score on flipped and scaled views as well (YOLO)
    empty: str = "last"
    scored: int = 0  # at most so many unlabelled images are looked at in a cycle, drawn at random; 0 = all
    cascade: tuple[float, ...] = (4.0, 3.0, 2.0, 1.5)  # what retrieval and the first three filters leave, in budgets
    cascade_order: tuple[str, ...] = FILTERS
    quota: float = 0.15  # part of the budget that 'hua' draws from images with score zero
    # the dual score of a VAE and an SSD, see `dual_vae`; each client has a VAE of its own
    vae: str = "small"  # 'small' | 'published' (300 x 300)
    vae_size: tuple[int, int] = (64, 64)  # what images are scaled to for it
    latent: int = 64
    kl_weight: float = 1.0  # beside the sum of squared errors over all pixels
    vae_iterations: int = 200
    vae_batch: int = 16
    vae_lr: float = 1e-3
    vae_on: str = "labelled"  # it is trained on 'labelled' images (novel = unlike them) | on 'all' of the client's
    vae_refit: bool = True  # in every cycle from the same first weights, else from where it was
    vae_corrected: bool = False  # reconstruction error beyond what texture and contrast explain
    vae_part: float = 0.5  # alpha, the part of the reconstruction error; beta = 1 - alpha
    standard: str = "z"  # terms are standardised by 'z' (standard deviations) | 'rank'
    shortlist: float = 0.0  # the best so many budgets, of which k-center in latent space chooses; 0 = the best alone
    pseudo_above: float = 0.5  # a detection stands in for ground truth from this confidence on
    task_aware: float = 0.0  # weight of the detector's loss on reconstructions in the VAE's
    task_images: int = 0  # so many labelled images of a batch carry that term (their mean stands for all); 0 = all
    diagnostic: bool = False  # opens hidden labels to 'd0' and 'vae_d0': upper bounds, never methods
    # the labelling flywheel, see `flywheel`
    feature_model: str = "lite0"  # its backbone: EfficientNet-Lite0, or the name of another pretrained model of timm
    feature_side: int = 64  # pixels that images are scaled to for the frozen backbone of the class wheel
    regularisation: float = 0.1  # of its linear classifier: inverse strength of the L2 penalty
    annotator_error: float = 0.0  # how often a simulated person names the wrong class
    goal: float = 0.9  # a stopping rule: this accuracy (or AP50) is reached
    plateau: float = 1.0  # a stopping rule: the last cycle surely gained less than so many points
    alone_epochs: int = 50  # a local-only model (LoGo's) trains so long at most, and stops at 99 % training accuracy
    seconds_per_image: float = 2.0
    seconds_per_box: float = 7.0
    # judging
    evaluate_every: int = 0  # rounds; 0 = only after the last round of a cycle
    as_released: bool = False  # bring back the released code's quirks that move a figure (see each notebook's table)
    # what is compared
    methods: tuple[str, ...] = ("random", "sum", "avg", "max")
    seeds: tuple[int, ...] = (0, 1)
    side_seeds: int = 3  # a notebook's side experiments run the first so many of them

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"profile must be one of {PROFILES}, got {self.profile!r}")
        positive = (
            "batch", "clients", "cycles", "rounds", "first", "budget", "side_seeds", "alone_epochs", "latent",
            "vae_iterations", "vae_batch", "feature_side",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        counts = (
            "start_images", "start_iterations", "start_warmup", "merge_images", "iterations", "epochs", "tail", "crop",
            "passes", "warmup", "warmup_epochs", "nominal", "evaluate_every", "threads", "scored",
            "task_images", "malicious",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be a list of different integers >= 0, got {self.seeds}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if self.first_pass < 1 or not self.visit > 0:
            raise ValueError(f"first_pass and visit must be > 0, got {self.first_pass} and {self.visit}")
        choices = {
            "optimiser_state": ("restart", "client", "travels"), "on_failure": ("stop", "skip"),
            "server": SERVERS, "privacy": PRIVACY, "box_loss": BOX_LOSSES,
            "companion": COMPANIONS, "vae": VAES, "vae_on": TRAINED_ON, "standard": STANDARDS,
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        parts = ("flip", "score_above", "nms_iou", "mosaic", "lost", "quota", "first_part", "budget_part", "vae_part")
        for name in (*parts, "pseudo_above", "annotator_error", "goal"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if sorted(self.cascade_order) != sorted(FILTERS):
            raise ValueError(f"cascade_order must name each of {FILTERS} once, got {self.cascade_order}")
        falling = (*self.cascade, 1.0)
        if len(falling) != 5 or any(not a >= b for a, b in zip(falling, falling[1:], strict=False)):
            raise ValueError(f"cascade must be four numbers >= 1 that do not grow, in budgets, got {self.cascade}")
        not_below = ("compensation", "kl_weight", "task_aware", "shortlist", "plateau", "proximal", "server_lr")
        for name in (*not_below, "noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("vae_lr", "regularisation", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.server_momentum < 1:
            raise ValueError(f"server_momentum must be in [0, 1), got {self.server_momentum}")
        if self.server == "fedprox" and not self.proximal > 0:
            raise ValueError(f"server 'fedprox' needs proximal > 0 (its mu), got {self.proximal}")
        if not (self.too_large == 0 or 1 < self.too_large < math.inf):
            raise ValueError(f"too_large must be 0 (off) or a finite number > 1, got {self.too_large}")
        kept = ("restart", "client") if self.classifier else ("restart",)
        if self.afresh and self.optimiser_state not in kept:
            raise ValueError(
                f"afresh=True begins again in every cycle: optimiser_state={self.optimiser_state!r} cannot live on"
            )
        if not 0 < self.anneal <= 1:
            raise ValueError(f"anneal must be in (0, 1], got {self.anneal}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and back."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """Hex digest of all that decides a run's numbers: everything but the lists of methods and seeds."""
        values = {k: v for k, v in self.as_dict().items() if k not in _LISTS}
        values = {k: v for k, v in values.items() if k not in _LATER or v != _LATER[k]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def replace(self, **changes: Any) -> Config:
        """A copy with these values; unknown names are refused."""
        return dataclasses.replace(self, **checked(changes))

    def labels_needed(self) -> int:
        """Images that one client has labelled at the end."""
        return self.first + self.budget * (self.cycles - 1)


# --- the sizes --------------------------------------------------------------------------------------------------------

# DigitScenes: a small detector learns from nothing in seconds. Digits are not mirrored (a mirrored 2 is no 2).
_DIGITS = dict(
    data="digits", image_size=(64, 64), scenes=(600, 150), detector="ssd", backbone="small", anchor_side=16.0,
    flip=0.0, zoom=(0.8, 1.2), shift=0.15, colour=0.3, batch=16, lr=2e-3,
    start_images=40, start_iterations=200, clients=3, first=12, budget=14, cycles=4, rounds=3, iterations=16,
)  # fmt: skip

# Photographs: frozen ImageNet features, cached once; only the head learns and travels.
_PHOTOS = dict(
    image_size=(256, 256), detector="ssd", backbone="lite0", pretrained=True, frozen=True, anchor_side=16.0,
    flip=0.5, batch=8, lr=2e-3, anneal=0.2, start_images=10, start_iterations=80, clients=3, first=4, budget=8,
    cycles=5, rounds=3, iterations=12,
)  # fmt: skip

_BY_DATA: dict[str, dict[str, Any]] = {
    "digits": _DIGITS,
    "bccd": {**_PHOTOS, "image_size": (192, 256), "start_images": 5, "start_iterations": 60, "first": 3, "budget": 6},
    # Scratches are thin, patches as large as the image.
    "neu-det": {
        **_PHOTOS, "image_size": (192, 192), "anchor_side": 24.0, "anchor_ratios": (0.3, 1.0, 3.0), "start_images": 30,
        "start_iterations": 200, "first": 20, "budget": 60, "batch": 16, "rounds": 4, "iterations": 25,
    },
    # Towns are clients; the test town is one that no client has seen. The smallest town has 58 frames.
    "kitti-2": {**_PHOTOS, "image_size": (192, 640), "min_object": 4.0, "start_images": 30, "start_iterations": 150},
    "carla": {
        **_PHOTOS, "image_size": (192, 320), "min_object": 8.0, "partition": "natural", "clients": 4,
        "start_images": 30, "start_iterations": 150, "first": 8, "budget": 10, "cycles": 4, "rounds": 3,
        "iterations": 15,
    },
}  # fmt: skip

# Notebooks 10 to 13 (van Bommel 2021) train a small detector of the paper's shape from nothing, so that there is a
# backbone to freeze and to send. A chain's first visits take as many steps as `first_pass` rounds, the rest is for the
# later passes; every scheme takes the same number of gradient steps.
_SMALL_YOLO = dict(
    detector="yolo", depth=0.1, channels=0.125, norm="group", pretrained=False, frozen=False, anchor_side=7.0,
    gains=(1.0, 1.0, 20.0), threads=1, optimiser="sgd", lr=2e-2, clip=10.0, ema=0.9, anneal=0.2,
)  # fmt: skip

_VAN_BOMMEL: dict[str, dict[str, Any]] = {
    "digits": {
        **_SMALL_YOLO, "side_seeds": 1, "image_size": (96, 96), "digit_classes": 3, "scenes": (400, 100), "batch": 8,
        "start_images": 40, "start_iterations": 160, "merge_images": 30, "first": 8, "budget": 8, "cycles": 4,
        "rounds": 2, "tail": 2, "iterations": 6, "first_pass": 5, "evaluate_every": 2,
    },
    "bccd": {
        **_SMALL_YOLO, "image_size": (128, 160), "zoom": (0.8, 1.2), "shift": 0.15, "colour": 0.3, "batch": 8,
        "anchor_side": 3.0, "gains": (0.3, 1.0, 5.0), "clip": 0.0, "start_images": 20, "start_iterations": 120,
        "merge_images": 20, "first": 10, "budget": 10, "cycles": 4, "rounds": 2, "tail": 4, "iterations": 12,
        "first_pass": 7, "visit": 0.5, "evaluate_every": 2,
        "seeds": (0, 1, 2, 3, 4),
    },
}  # fmt: skip

# Missing classes of the nine devices in the 8-class set (van Bommel 2021, released code), as columns of the classes in
# alphabetical order: Car, Cyclist, Misc, Pedestrian, Person_sitting, Tram, Truck, Van.
KITTI_MISSING = (
    (1,),  # 0: Cyclist
    (4,),  # 1: Person_sitting
    (1, 4),  # 2: Cyclist, Person_sitting
    (4, 5),  # 3: Person_sitting, Tram
    (3, 6),  # 4: Pedestrian, Truck
    (1, 6),  # 5: Cyclist, Truck
    (1, 5),  # 6: Cyclist, Tram
    (3,),  # 7: Pedestrian
    (1, 3),  # 8: Cyclist, Pedestrian
)

# The released code's protocol (van Bommel 2021): YOLOv5s's shape from nothing, 200 images and 200 epochs before any
# client is asked, 9 clients, 22 cycles of 10 images and 179 rounds more, 20 local epochs a round, SGD with Nesterov
# momentum that begins again with a warm-up of 1,000 iterations in every call. Images are letterboxed to 192 x 640: the
# scale of 640 x 640 without its grey bars.
_PAPER = dict(
    data="kitti-2", image_size=(192, 640), detector="yolo", depth=0.33, channels=0.5, norm="batch", anchor_side=10.0,
    flip=0.5, zoom=(0.5, 1.5), shift=0.1, colour=0.4, mosaic=1.0, batch=16, nominal=64, optimiser="sgd", lr=1e-2,
    momentum=0.937, weight_decay=5e-4, schedule="cosine", final_lr=0.2, warmup=1000, warmup_momentum=0.8,
    warmup_bias_lr=0.1, clip=0.0, ema=0.9999, amp=True, start_images=200, start_iterations=2600, start_warmup=1000,
    merge_images=100, clients=9, first=10, budget=10, cycles=22, rounds=1, tail=179, iterations=0, epochs=20,
    first_pass=10, passes=20, visit=0.1, wire="fp16", views=True, empty="never", evaluate_every=5, threads=0,
    seeds=(0, 1, 2),
)  # fmt: skip

_PAPER_BY_DATA: dict[str, dict[str, Any]] = {
    "kitti": {"partition": "missing", "missing": KITTI_MISSING},
    "voc07": {"image_size": (416, 416)},
}

# Notebook 20 (HUALE): one node, no starting point; every cycle trains from the first weights for the same number of
# steps. Scoring mirrors images, so training does, digits too. Small sizes: Faster R-CNN on frozen features.
_SMALL_RCNN = dict(
    detector="faster_rcnn", backbone="lite0", pretrained=True, frozen=True, norm="group", partition="iid", clients=1,
    start_images=0, start_iterations=0, rounds=1, anneal=1.0, afresh=True, evidence=True, schedule="cosine", warmup=10,
    lr=3e-3, batch=4, flip=0.5, zoom=(1.0, 1.0), shift=0.0, colour=0.0, score_above=0.3, nms_iou=0.5,
    class_agnostic=False, box_weight=5.0, companion_weight=0.2, threads=1,
)  # fmt: skip

_HUALE: dict[str, dict[str, Any]] = {
    "digits": {
        **_SMALL_RCNN, "image_size": (96, 96), "digit_classes": 3, "scenes": (240, 80), "anchor_side": 24.0,
        "anchor_ratios": (1.0,), "side_seeds": 1, "first": 4, "budget": 6, "cycles": 3, "iterations": 75,
    },
    "bccd": {
        **_SMALL_RCNN, "image_size": (192, 256), "anchor_side": 24.0, "anchor_ratios": (0.7, 1.0, 1.4), "first": 8,
        "budget": 8, "cycles": 5, "iterations": 240, "seeds": (0, 1, 2, 3, 4),
    },
    "neu-det": {
        **_SMALL_RCNN, "image_size": (192, 192), "anchor_side": 32.0, "anchor_ratios": (0.3, 1.0, 3.0), "first": 60,
        "budget": 60, "cycles": 6, "iterations": 800,
    },
    "carla": {
        **_SMALL_RCNN, "image_size": (192, 320), "min_object": 8.0, "anchor_side": 16.0, "first": 40, "budget": 40,
        "cycles": 6, "iterations": 600,
    },
    "": {**_SMALL_RCNN, "first": 8, "budget": 8, "cycles": 5, "iterations": 240},
}  # fmt: skip

# CALD's public protocol, which HUALE's grids and baseline curves coincide with: torchvision's Faster R-CNN R50-FPN,
# from ImageNet weights in every cycle, 20 epochs, learning rate / 10 at 16 and 19, warm-up in the first epoch.
# Its sides of 600 / 1000 (VOC) and 800 / 1333 (COCO) are a square canvas here, of the same scale for 4:3 images.
_HUALE_PAPER = dict(
    data="voc07", image_size=(800, 800), detector="faster_rcnn", backbone="resnet50", norm="batch", pretrained=True,
    frozen=False, partition="iid", clients=1, start_images=0, start_iterations=0, first=500, budget=500, cycles=7,
    rounds=1, afresh=True, evidence=True, iterations=0, epochs=20, batch=4, optimiser="sgd", lr=2.5e-3, momentum=0.9,
    weight_decay=1e-4, schedule="step", step_at=(0.8, 0.95), warmup=1000, warmup_epochs=1.0, clip=0.0, flip=0.5,
    score_above=0.3, nms_iou=0.5, class_agnostic=False, box_weight=5.0, companion_weight=0.2, threads=0,
    seeds=(0, 1, 2),
)  # fmt: skip

_HUALE_PAPER_BY_DATA: dict[str, dict[str, Any]] = {
    "coco": {
        "image_size": (1088, 1088), "first": 5000, "budget": 1000, "cycles": 5, "scored": 10000,
    },
}  # fmt: skip

# Notebook 30 (KAFAL): image classification; every cycle trains from the first weights, and the optimiser lives for the
# cycle. Eight of ten clients take part in a round, in the last one too (the paper's algorithm 1; its released code then
# takes all: as_released). Clients are of equal size, as those of its one published partition nearly are.
_KAFAL_ALL = dict(
    classifier="resnet8", partition="dirichlet-equal", alpha=0.1, fraction=0.8, start_images=0, start_iterations=0,
    afresh=True, optimiser_state="client", optimiser="sgd", momentum=0.9, weight_decay=5e-4, schedule="step",
    anneal=1.0, clip=0.0, colour=0.0, zoom=(1.0, 1.0), shift=0.0, ema=0.0, balanced=True, compensation=1.0,
    seconds_per_box=0.0, pretrained=False, frozen=False,
)  # fmt: skip

_KAFAL: dict[str, dict[str, Any]] = {
    "digit-images": {
        **_KAFAL_ALL, "image_size": (16, 16), "clients": 5, "alpha": 0.3, "first_part": 0.04,
        "budget_part": 0.04, "cycles": 3, "rounds": 4, "iterations": 8, "batch": 16, "lr": 0.05, "step_at": (0.6,),
        "flip": 0.0, "crop": 1,
        "alone_epochs": 20, "side_seeds": 1, "threads": 1,
    },
    # Scaled down from the paper: a fifth of CIFAR-10, 128 steps a client and cycle where the paper takes about 6,400.
    "": {
        **_KAFAL_ALL, "image_size": (32, 32), "limit": (10000, 2000), "clients": 10, "first_part": 0.1,
        "budget_part": 0.05, "cycles": 6, "rounds": 8, "iterations": 16, "batch": 32, "lr": 0.05, "step_at": (0.6,),
        "flip": 0.5, "crop": 4,
    },
}  # fmt: skip

# The released code's protocol. Its one fall of the learning rate comes at the 260th of a client's 2,000 local epochs.
_KAFAL_PAPER = {
    **_KAFAL_ALL, "data": "cifar10", "image_size": (32, 32), "clients": 10, "first_part": 0.1, "budget_part": 0.05,
    "cycles": 6, "rounds": 50, "iterations": 0, "epochs": 40, "batch": 128, "lr": 0.1, "step_at": (0.13,), "flip": 0.5,
    "crop": 4, "threads": 0, "seeds": (0, 1, 2, 3, 4),
}  # fmt: skip

# Notebook 40 (SSD + VAE): one node; in every cycle the detector begins again, and takes the same number of steps.
_ONE_SSD = dict(
    detector="ssd", partition="iid", clients=1, start_images=0, start_iterations=0, rounds=1, anneal=1.0, afresh=True,
    schedule="cosine", warmup=10,
)  # fmt: skip
_DUAL_ALL = dict(**_ONE_SSD, learned_loss=True, kl_weight=0.005, vae_lr=2e-3, vae_iterations=150)

_DUAL: dict[str, dict[str, Any]] = {
    "digits": {
        **_DUAL_ALL, "digit_classes": 3, "scenes": (180, 60), "batch": 8, "start_images": 40, "start_iterations": 150,
        "first": 12, "budget": 12, "cycles": 3, "iterations": 50, "side_seeds": 1, "vae_size": (32, 32),
        "latent": 32, "vae_iterations": 60, "threads": 1,
    },
    "bccd": {
        **_DUAL_ALL, "first": 8, "budget": 10, "cycles": 4, "iterations": 100, "vae_size": (48, 64), "threads": 1,
    },
    "neu-det": {**_DUAL_ALL, "first": 60, "budget": 60, "cycles": 6, "iterations": 600, "vae_size": (64, 64)},
    "carla": {**_DUAL_ALL, "first": 40, "budget": 40, "cycles": 6, "iterations": 400, "vae_size": (48, 80)},
    "": {**_DUAL_ALL, "first": 8, "budget": 8, "cycles": 5, "iterations": 150},
}  # fmt: skip

# SSD300 of the released code on VOC07 + VOC12 with the start and the steps of the learning-loss line of work (1,000
# images a cycle), which its subsets of 1,000 and 5,000 ids fit; the VAE in its published shape. Its 120,000 iterations
# of batch 32 are for the whole set: a cycle takes 40,000, as its runs on 1,000 images did.
_DUAL_PAPER = dict(
    data="voc0712", image_size=(300, 300), detector="ssd", backbone="vgg16", norm="batch", pretrained=True,
    frozen=False, learned_loss=True, partition="iid", clients=1, start_images=0, start_iterations=0, first=1000,
    budget=1000, cycles=10, rounds=1, afresh=True, iterations=40000, batch=32, optimiser="sgd", lr=1e-3, momentum=0.9,
    weight_decay=5e-4, schedule="step", step_at=(2 / 3, 5 / 6), warmup=500, clip=0.0, flip=0.5, colour=0.4,
    zoom=(0.5, 1.5), shift=0.2, score_above=0.01, vae="published", vae_size=(300, 300), latent=1024, kl_weight=50.0,
    vae_iterations=30000, vae_batch=32, vae_lr=1e-4, threads=0, seeds=(0, 1, 2),
)  # fmt: skip

# Notebook 50 (the labelling flywheel). Part A, classes: a linear classifier on cached features. Part B ("50b"), boxes:
# one node, every cycle trains from the first weights (digits: from a starting point); the images that are held out
# say what the detector makes of images it knows nothing of.
_WHEEL: dict[str, dict[str, Any]] = {
    "digit-images": {
        "image_size": (16, 16), "feature_side": 64, "limit": (900, 500), "clients": 1, "start_images": 0, "first": 20,
        "budget": 20, "cycles": 6, "rounds": 1, "seconds_per_box": 0.0, "goal": 0.85, "threads": 1,
    },
    "": {
        "image_size": (32, 32), "feature_side": 96, "limit": (10000, 2000), "clients": 1, "start_images": 0,
        "first": 100, "budget": 100, "cycles": 11, "rounds": 1, "seconds_per_box": 0.0, "goal": 0.7, "threads": 1,
    },
}  # fmt: skip
_WHEEL_PAPER = {
    "data": "cifar10", "image_size": (32, 32), "feature_side": 224, "clients": 1, "start_images": 0, "first": 100,
    "budget": 100, "cycles": 21, "rounds": 1, "seconds_per_box": 0.0, "goal": 0.9, "threads": 0,
    "seeds": (0, 1, 2, 3, 4),
}  # fmt: skip
_WHEEL_BOXES: dict[str, dict[str, Any]] = {
    "digits": {
        **_ONE_SSD, "digit_classes": 3, "scenes": (180, 60), "batch": 8, "start_images": 40, "start_iterations": 150,
        "merge_images": 10, "first": 12, "budget": 12, "cycles": 3, "iterations": 50, "threads": 1,
    },
    "bccd": {
        **_ONE_SSD, "merge_images": 20, "first": 8, "budget": 10, "cycles": 4, "iterations": 100, "threads": 1,
    },
    "": {**_ONE_SSD, "merge_images": 10, "first": 8, "budget": 8, "cycles": 5, "iterations": 150},
}  # fmt: skip

# Notebook 60 (real clients): few rounds, for each of a client's answers is a process of its own. A client that fails
# costs the round that client.
_CLIENTS_ALL = dict(
    detector="ssd", on_failure="skip", too_large=20.0, evaluate_every=1, side_seeds=1, seeds=(0,), threads=1,
)  # fmt: skip
_CLIENTS: dict[str, dict[str, Any]] = {
    "digits": {
        **_DIGITS, **_CLIENTS_ALL, "digit_classes": 3, "scenes": (260, 80), "start_iterations": 120, "first": 12,
        "budget": 12, "cycles": 2, "rounds": 2, "iterations": 16,
    },
    "bccd": {
        **_CLIENTS_ALL, "clients": 4, "first": 6, "budget": 6, "cycles": 4, "rounds": 3, "iterations": 20,
        "seeds": (0, 1, 2), "side_seeds": 3,
    },
    "": {**_CLIENTS_ALL, "rounds": 2},
}  # fmt: skip

_OF_A_VAE = ("vae", "vae_size", "vae_iterations", "vae_batch", "vae_lr", "latent", "kl_weight", "learned_loss")
_WHEEL_BOXES_PAPER = {k: v for k, v in _DUAL_PAPER.items() if k not in _OF_A_VAE} | {"merge_images": 500}

_BY_PROFILE: dict[str, dict[str, Any]] = {
    "smoke": {"data": "digits", "seeds": (0, 1), "threads": 1},
    "quick": {"data": "bccd", "seeds": (0, 1, 2), "threads": 0},
    "paper": _PAPER,
}


# A centralised reference gets the labels of another method, which stands before it.
_METHODS = {
    "10": ("random", "sum", "avg", "max"),
    "11": ("random", "sum", "avg", "max", "local-first+sum", "centralised", "centralised+sum"),
    "12": ("chain+sum", "chain-fedavg+sum", "accumulate+sum", "centralised+chain+sum"),
}
_METHODS["13"] = (*_METHODS["11"], *_METHODS["12"])
_METHODS["20"] = ("random", "entropy_max", "cald", "cascade")
_METHODS["30"] = (
    "random", "entropy", "margin", "confidence", "coreset", "badge", "qbc", "logo", "jeffreys", "ksas",
)  # fmt: skip

_METHODS["40"] = ("random", "entropy_max", "coreset", "count", "vae", "d1", "vae_d1")
_METHODS["60"] = ("avg",)
_METHODS["50"] = (
    "random", "confidence", "margin", "ratio", "entropy", "model_outlier", "embedding_outlier", "cluster",
    "representative", "coreset", "mix", "mix_diverse",
)  # fmt: skip
_METHODS["50b"] = (
    "random", "avg", "margin_avg", "ratio_avg", "entropy_avg", "model_outlier", "embedding_outlier", "cluster",
    "representative", "mix",
)  # fmt: skip

# Notebooks with sizes of their own, by their number: by data set ("": photographs without an entry), and in full size.
_OWN: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("10", "11", "12", "13"), _VAN_BOMMEL),
    "20": _HUALE,
    "30": _KAFAL,
    "40": _DUAL,
    "50": _WHEEL,
    "50b": _WHEEL_BOXES,
    "60": _CLIENTS,
}
_OWN_PAPER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "20": (_HUALE_PAPER, _HUALE_PAPER_BY_DATA), "30": (_KAFAL_PAPER, {}), "40": (_DUAL_PAPER, {}),
    "50": (_WHEEL_PAPER, {}), "50b": (_WHEEL_BOXES_PAPER, {}),
    "60": ({**_PAPER, "on_failure": "skip", "too_large": 20.0}, _PAPER_BY_DATA),
}  # fmt: skip
# Where a notebook is not about detection.
_OWN_DATA = dict.fromkeys(("30", "50"), {"smoke": "digit-images", "quick": "cifar10"})


def one_node(config: Config) -> Config:
    """The same experiment on a single node: as many labels and gradient steps as all clients take together."""
    clients = config.clients
    return config.replace(
        clients=1, partition="iid", first=config.first * clients, budget=config.budget * clients,
        iterations=config.iterations * clients,
    )  # fmt: skip


def load(
    notebook: str, profile: str = "smoke", data: str | None = None, seeds: Sequence[int] | None = None, **overrides: Any
) -> Config:
    """The config of a notebook ('10_centralised', '11_fedavg', ...) at a profile, on its own or another data set.

    data: a known name ('digits', 'bccd', 'neu-det', 'carla', 'voc07', ...) or a folder with images of your own, which
    is treated as photographs. seeds, overrides: last word; unknown names are refused.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {PROFILES}, got {profile!r}")
    chosen = dict(_BY_PROFILE[profile])
    number = notebook.partition("_")[0]
    name = data or _OWN_DATA.get(number, {}).get(profile) or chosen.get("data")
    if profile != "paper":
        own = _OWN.get(number, {})
        chosen = {**_BY_DATA.get(name, _PHOTOS), **chosen, **own.get(name, own.get("", {}))}
    else:
        paper, by_data = _OWN_PAPER.get(number, (_PAPER, _PAPER_BY_DATA))
        name = data or paper["data"]
        chosen = {**paper, **by_data.get(name, {})}
    chosen.update(profile=profile, data=name)
    config = Config(**checked(chosen))
    config = config.replace(methods=_METHODS.get(number, _METHODS["11"]))
    if number == "10" and "clients" not in overrides:
        config = one_node(config)
    if seeds is not None:
        overrides["seeds"] = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    return config.replace(**overrides)


def fitted(config: Config, images: int) -> Config:
    """For a folder of the user's own: clients, budgets and cycles shrunk until `images` training images suffice.

    A config that fits is returned unchanged; two images are enough (one client, one label in each of two cycles).
    """
    if images < 2:
        raise ValueError(f"one training image to start from and one to ask for are needed, got {images} images")
    clients = max(1, min(config.clients, images // 4))
    start_images = min(config.start_images, images // 5)
    share = (images - start_images) // clients
    first = max(1, min(config.first, share // 3))
    budget = max(1, min(config.budget, (share - first) // 2))
    cycles = max(1, min(config.cycles, 1 + (share - first) // budget))
    first_pass = min(config.first_pass, max(1, cycles * config.rounds + config.tail - 1))  # leaves one later pass
    return config.replace(
        clients=clients, start_images=start_images, first=first, budget=budget, cycles=cycles, first_pass=first_pass
    )  # fmt: skip


@functools.cache
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
