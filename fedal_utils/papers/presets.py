"""The sizes of every notebook's experiment: by data set, by paper, by profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import PROFILES, Config

# --- the sizes --------------------------------------------------------------------------------------------------------

# DigitScenes: a small detector learns from nothing in seconds. Digits are not mirrored (a mirrored 2 is no 2).
_DIGITS = dict(
    dataset="digits",
    image_size=(64, 64),
    scenes=(600, 150),
    detector="ssd",
    backbone="small",
    anchor_side=16.0,
    flip=0.0,
    zoom=(0.8, 1.2),
    shift=0.15,
    colour=0.3,
    batch=16,
    lr=2e-3,
    initial_model_images=40,
    initial_model_iterations=200,
    clients=3,
    initial_labels=12,
    query_size=14,
    cycles=4,
    rounds=3,
    iterations=16,
)

# Photographs: frozen ImageNet features, cached once; only the head learns and travels.
_PHOTOS = dict(
    image_size=(256, 256),
    detector="ssd",
    backbone="lite0",
    pretrained=True,
    frozen=True,
    anchor_side=16.0,
    flip=0.5,
    batch=8,
    lr=2e-3,
    round_lr_decay=0.2,
    initial_model_images=10,
    initial_model_iterations=80,
    clients=3,
    initial_labels=4,
    query_size=8,
    cycles=5,
    rounds=3,
    iterations=12,
)

_BY_DATA: dict[str, dict[str, Any]] = {
    "digits": _DIGITS,
    "bccd": {
        **_PHOTOS,
        "image_size": (192, 256),
        "initial_model_images": 5,
        "initial_model_iterations": 60,
        "initial_labels": 3,
        "query_size": 6,
    },
    # Scratches are thin, patches as large as the image.
    "neu-det": {
        **_PHOTOS,
        "image_size": (192, 192),
        "anchor_side": 24.0,
        "anchor_ratios": (0.3, 1.0, 3.0),
        "initial_model_images": 30,
        "initial_model_iterations": 200,
        "initial_labels": 20,
        "query_size": 60,
        "batch": 16,
        "rounds": 4,
        "iterations": 25,
    },
    # Towns are clients; the test town is one that no client has seen. The smallest town has 58 frames.
    "kitti-2": {
        **_PHOTOS,
        "image_size": (192, 640),
        "min_object": 4.0,
        "initial_model_images": 30,
        "initial_model_iterations": 150,
    },
    "carla": {
        **_PHOTOS,
        "image_size": (192, 320),
        "min_object": 8.0,
        "partition": "natural",
        "clients": 4,
        "initial_model_images": 30,
        "initial_model_iterations": 150,
        "initial_labels": 8,
        "query_size": 10,
        "cycles": 4,
        "rounds": 3,
        "iterations": 15,
    },
}

# Notebooks 10 to 13 (van Bommel 2021) train a small detector of the paper's shape from nothing, so that there is a
# backbone to freeze and to send. A chain's first visits take as many steps as `first_pass` rounds, the rest is for the
# later passes; every scheme takes the same number of gradient steps.
_SMALL_YOLO = dict(
    detector="yolo",
    depth_multiple=0.1,
    width_multiple=0.125,
    norm="group",
    pretrained=False,
    frozen=False,
    anchor_side=7.0,
    loss_weights=(1.0, 1.0, 20.0),
    threads=1,
    optimizer="sgd",
    lr=2e-2,
    clip=10.0,
    ema=0.9,
    round_lr_decay=0.2,
)

_VAN_BOMMEL: dict[str, dict[str, Any]] = {
    "digits": {
        **_SMALL_YOLO,
        "side_seeds": 1,
        "image_size": (96, 96),
        "digit_classes": 3,
        "scenes": (400, 100),
        "batch": 8,
        "initial_model_images": 40,
        "initial_model_iterations": 160,
        "held_out_images": 30,
        "initial_labels": 8,
        "query_size": 8,
        "cycles": 4,
        "rounds": 2,
        "extra_rounds": 2,
        "iterations": 6,
        "first_pass_rounds": 5,
        "evaluate_every": 2,
    },
    "bccd": {
        **_SMALL_YOLO,
        "image_size": (128, 160),
        "zoom": (0.8, 1.2),
        "shift": 0.15,
        "colour": 0.3,
        "batch": 8,
        "anchor_side": 3.0,
        "loss_weights": (0.3, 1.0, 5.0),
        "clip": 0.0,
        "initial_model_images": 20,
        "initial_model_iterations": 120,
        "held_out_images": 20,
        "initial_labels": 10,
        "query_size": 10,
        "cycles": 4,
        "rounds": 2,
        "extra_rounds": 4,
        "iterations": 12,
        "first_pass_rounds": 7,
        "visit_fraction": 0.5,
        "evaluate_every": 2,
        "seeds": (0, 1, 2, 3, 4),
    },
}

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
    dataset="kitti-2",
    image_size=(192, 640),
    detector="yolo",
    depth_multiple=0.33,
    width_multiple=0.5,
    norm="batch",
    anchor_side=10.0,
    flip=0.5,
    zoom=(0.5, 1.5),
    shift=0.1,
    colour=0.4,
    mosaic=1.0,
    batch=16,
    accumulate_to=64,
    optimizer="sgd",
    lr=1e-2,
    momentum=0.937,
    weight_decay=5e-4,
    schedule="cosine",
    final_lr=0.2,
    warmup=1000,
    warmup_momentum=0.8,
    warmup_bias_lr=0.1,
    clip=0.0,
    ema=0.9999,
    amp=True,
    initial_model_images=200,
    initial_model_iterations=2600,
    initial_model_warmup=1000,
    held_out_images=100,
    clients=9,
    initial_labels=10,
    query_size=10,
    cycles=22,
    rounds=1,
    extra_rounds=179,
    iterations=0,
    epochs=20,
    first_pass_rounds=10,
    chain_passes=20,
    visit_fraction=0.1,
    message_dtype="fp16",
    test_time_views=True,
    no_detection_rule="never",
    evaluate_every=5,
    threads=0,
    seeds=(0, 1, 2),
)

_PAPER_BY_DATA: dict[str, dict[str, Any]] = {
    "kitti": {"partition": "missing", "missing_classes": KITTI_MISSING},
    "voc07": {"image_size": (416, 416)},
}

# Notebook 20 (HUALE): one node, no starting point; every cycle trains from the first weights for the same number of
# steps. Scoring mirrors images, so training does, digits too. Small sizes: Faster R-CNN on frozen features.
_SMALL_RCNN = dict(
    detector="faster_rcnn",
    backbone="lite0",
    pretrained=True,
    frozen=True,
    norm="group",
    partition="iid",
    clients=1,
    initial_model_images=0,
    initial_model_iterations=0,
    rounds=1,
    round_lr_decay=1.0,
    reset_each_cycle=True,
    box_loss_head=True,
    schedule="cosine",
    warmup=10,
    lr=3e-3,
    batch=4,
    flip=0.5,
    zoom=(1.0, 1.0),
    shift=0.0,
    colour=0.0,
    score_above=0.3,
    nms_iou=0.5,
    class_agnostic=False,
    box_weight=5.0,
    auxiliary_weight=0.2,
    threads=1,
)

_HUALE: dict[str, dict[str, Any]] = {
    "digits": {
        **_SMALL_RCNN,
        "image_size": (96, 96),
        "digit_classes": 3,
        "scenes": (240, 80),
        "anchor_side": 24.0,
        "anchor_ratios": (1.0,),
        "side_seeds": 1,
        "initial_labels": 4,
        "query_size": 6,
        "cycles": 3,
        "iterations": 75,
    },
    "bccd": {
        **_SMALL_RCNN,
        "image_size": (192, 256),
        "anchor_side": 24.0,
        "anchor_ratios": (0.7, 1.0, 1.4),
        "initial_labels": 8,
        "query_size": 8,
        "cycles": 5,
        "iterations": 240,
        "seeds": (0, 1, 2, 3, 4),
    },
    "neu-det": {
        **_SMALL_RCNN,
        "image_size": (192, 192),
        "anchor_side": 32.0,
        "anchor_ratios": (0.3, 1.0, 3.0),
        "initial_labels": 60,
        "query_size": 60,
        "cycles": 6,
        "iterations": 800,
    },
    "carla": {
        **_SMALL_RCNN,
        "image_size": (192, 320),
        "min_object": 8.0,
        "anchor_side": 16.0,
        "initial_labels": 40,
        "query_size": 40,
        "cycles": 6,
        "iterations": 600,
    },
    "": {**_SMALL_RCNN, "initial_labels": 8, "query_size": 8, "cycles": 5, "iterations": 240},
}

# CALD's public protocol, which HUALE's grids and baseline curves coincide with: torchvision's Faster R-CNN R50-FPN,
# from ImageNet weights in every cycle, 20 epochs, learning rate / 10 at 16 and 19, warm-up in the first epoch.
# Its sides of 600 / 1000 (VOC) and 800 / 1333 (COCO) are a square canvas here, of the same scale for 4:3 images.
_HUALE_PAPER = dict(
    dataset="voc07",
    image_size=(800, 800),
    detector="faster_rcnn",
    backbone="resnet50",
    norm="batch",
    pretrained=True,
    frozen=False,
    partition="iid",
    clients=1,
    initial_model_images=0,
    initial_model_iterations=0,
    initial_labels=500,
    query_size=500,
    cycles=7,
    rounds=1,
    reset_each_cycle=True,
    box_loss_head=True,
    iterations=0,
    epochs=20,
    batch=4,
    optimizer="sgd",
    lr=2.5e-3,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="step",
    step_at=(0.8, 0.95),
    warmup=1000,
    warmup_epochs=1.0,
    clip=0.0,
    flip=0.5,
    score_above=0.3,
    nms_iou=0.5,
    class_agnostic=False,
    box_weight=5.0,
    auxiliary_weight=0.2,
    threads=0,
    seeds=(0, 1, 2),
)

_HUALE_PAPER_BY_DATA: dict[str, dict[str, Any]] = {
    "coco": {
        "image_size": (1088, 1088),
        "initial_labels": 5000,
        "query_size": 1000,
        "cycles": 5,
        "pool_subset_size": 10000,
    },
}

# Notebook 30 (KAFAL): image classification; every cycle trains from the first weights, and the optimiser lives for the
# cycle. Eight of ten clients take part in a round, in the last one too (the paper's algorithm 1; its released code then
# takes all: as_released). Clients are of equal size, as those of its one published partition nearly are.
_KAFAL_ALL = dict(
    classifier="resnet8",
    partition="dirichlet-equal",
    dirichlet_alpha=0.1,
    client_fraction=0.8,
    initial_model_images=0,
    initial_model_iterations=0,
    reset_each_cycle=True,
    optimizer_state="client",
    optimizer="sgd",
    momentum=0.9,
    weight_decay=5e-4,
    schedule="step",
    round_lr_decay=1.0,
    clip=0.0,
    colour=0.0,
    zoom=(1.0, 1.0),
    shift=0.0,
    ema=0.0,
    balanced_softmax=True,
    distillation_weight=1.0,
    seconds_per_box=0.0,
    pretrained=False,
    frozen=False,
)

_KAFAL: dict[str, dict[str, Any]] = {
    "digit-images": {
        **_KAFAL_ALL,
        "image_size": (16, 16),
        "clients": 5,
        "dirichlet_alpha": 0.3,
        "initial_fraction": 0.04,
        "query_fraction": 0.04,
        "cycles": 3,
        "rounds": 4,
        "iterations": 8,
        "batch": 16,
        "lr": 0.05,
        "step_at": (0.6,),
        "flip": 0.0,
        "crop": 1,
        "local_only_epochs": 20,
        "side_seeds": 1,
        "threads": 1,
    },
    # Scaled down from the paper: a fifth of CIFAR-10, 128 steps a client and cycle where the paper takes about 6,400.
    "": {
        **_KAFAL_ALL,
        "image_size": (32, 32),
        "limit": (10000, 2000),
        "clients": 10,
        "initial_fraction": 0.1,
        "query_fraction": 0.05,
        "cycles": 6,
        "rounds": 8,
        "iterations": 16,
        "batch": 32,
        "lr": 0.05,
        "step_at": (0.6,),
        "flip": 0.5,
        "crop": 4,
    },
}

# The released code's protocol. Its one fall of the learning rate comes at the 260th of a client's 2,000 local epochs.
_KAFAL_PAPER = {
    **_KAFAL_ALL,
    "dataset": "cifar10",
    "image_size": (32, 32),
    "clients": 10,
    "initial_fraction": 0.1,
    "query_fraction": 0.05,
    "cycles": 6,
    "rounds": 50,
    "iterations": 0,
    "epochs": 40,
    "batch": 128,
    "lr": 0.1,
    "step_at": (0.13,),
    "flip": 0.5,
    "crop": 4,
    "threads": 0,
    "seeds": (0, 1, 2, 3, 4),
}

# Notebook 40 (SSD + VAE): one node; in every cycle the detector begins again, and takes the same number of steps.
_ONE_SSD = dict(
    detector="ssd",
    partition="iid",
    clients=1,
    initial_model_images=0,
    initial_model_iterations=0,
    rounds=1,
    round_lr_decay=1.0,
    reset_each_cycle=True,
    schedule="cosine",
    warmup=10,
)
_DUAL_ALL = dict(**_ONE_SSD, image_loss_head=True, kl_weight=0.005, vae_lr=2e-3, vae_iterations=150)

_DUAL: dict[str, dict[str, Any]] = {
    "digits": {
        **_DUAL_ALL,
        "digit_classes": 3,
        "scenes": (180, 60),
        "batch": 8,
        "initial_model_images": 40,
        "initial_model_iterations": 150,
        "initial_labels": 12,
        "query_size": 12,
        "cycles": 3,
        "iterations": 50,
        "side_seeds": 1,
        "vae_size": (32, 32),
        "latent": 32,
        "vae_iterations": 60,
        "threads": 1,
    },
    "bccd": {
        **_DUAL_ALL,
        "initial_labels": 8,
        "query_size": 10,
        "cycles": 4,
        "iterations": 100,
        "vae_size": (48, 64),
        "threads": 1,
    },
    "neu-det": {
        **_DUAL_ALL,
        "initial_labels": 60,
        "query_size": 60,
        "cycles": 6,
        "iterations": 600,
        "vae_size": (64, 64),
    },
    "carla": {
        **_DUAL_ALL,
        "initial_labels": 40,
        "query_size": 40,
        "cycles": 6,
        "iterations": 400,
        "vae_size": (48, 80),
    },
    "": {**_DUAL_ALL, "initial_labels": 8, "query_size": 8, "cycles": 5, "iterations": 150},
}

# SSD300 of the released code on VOC07 + VOC12 with the start and the steps of the learning-loss line of work (1,000
# images a cycle), which its subsets of 1,000 and 5,000 ids fit; the VAE in its published shape. Its 120,000 iterations
# of batch 32 are for the whole set: a cycle takes 40,000, as its runs on 1,000 images did.
_DUAL_PAPER = dict(
    dataset="voc0712",
    image_size=(300, 300),
    detector="ssd",
    backbone="vgg16",
    norm="batch",
    pretrained=True,
    frozen=False,
    image_loss_head=True,
    partition="iid",
    clients=1,
    initial_model_images=0,
    initial_model_iterations=0,
    initial_labels=1000,
    query_size=1000,
    cycles=10,
    rounds=1,
    reset_each_cycle=True,
    iterations=40000,
    batch=32,
    optimizer="sgd",
    lr=1e-3,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="step",
    step_at=(2 / 3, 5 / 6),
    warmup=500,
    clip=0.0,
    flip=0.5,
    colour=0.4,
    zoom=(0.5, 1.5),
    shift=0.2,
    score_above=0.01,
    vae_architecture="published",
    vae_size=(300, 300),
    latent=1024,
    kl_weight=50.0,
    vae_iterations=30000,
    vae_batch=32,
    vae_lr=1e-4,
    threads=0,
    seeds=(0, 1, 2),
)

# Notebook 50 (the labelling flywheel). Part A, classes: a linear classifier on cached features. Part B ("50b"), boxes:
# one node, every cycle trains from the first weights (digits: from a starting point); the images that are held out
# say what the detector makes of images it knows nothing of.
_WHEEL: dict[str, dict[str, Any]] = {
    "digit-images": {
        "image_size": (16, 16),
        "feature_side": 64,
        "limit": (900, 500),
        "clients": 1,
        "initial_model_images": 0,
        "initial_labels": 20,
        "query_size": 20,
        "cycles": 6,
        "rounds": 1,
        "seconds_per_box": 0.0,
        "goal": 0.85,
        "threads": 1,
    },
    "": {
        "image_size": (32, 32),
        "feature_side": 96,
        "limit": (10000, 2000),
        "clients": 1,
        "initial_model_images": 0,
        "initial_labels": 100,
        "query_size": 100,
        "cycles": 11,
        "rounds": 1,
        "seconds_per_box": 0.0,
        "goal": 0.7,
        "threads": 1,
    },
}
_WHEEL_PAPER = {
    "dataset": "cifar10",
    "image_size": (32, 32),
    "feature_side": 224,
    "clients": 1,
    "initial_model_images": 0,
    "initial_labels": 100,
    "query_size": 100,
    "cycles": 21,
    "rounds": 1,
    "seconds_per_box": 0.0,
    "goal": 0.9,
    "threads": 0,
    "seeds": (0, 1, 2, 3, 4),
}
_WHEEL_BOXES: dict[str, dict[str, Any]] = {
    "digits": {
        **_ONE_SSD,
        "digit_classes": 3,
        "scenes": (180, 60),
        "batch": 8,
        "initial_model_images": 40,
        "initial_model_iterations": 150,
        "held_out_images": 10,
        "initial_labels": 12,
        "query_size": 12,
        "cycles": 3,
        "iterations": 50,
        "threads": 1,
    },
    "bccd": {
        **_ONE_SSD,
        "held_out_images": 20,
        "initial_labels": 8,
        "query_size": 10,
        "cycles": 4,
        "iterations": 100,
        "threads": 1,
    },
    "": {**_ONE_SSD, "held_out_images": 10, "initial_labels": 8, "query_size": 8, "cycles": 5, "iterations": 150},
}

# Notebook 60 (real clients): few rounds, for each of a client's answers is a process of its own. A client that fails
# costs the round that client.
_CLIENTS_ALL = dict(
    detector="ssd",
    on_failure="skip",
    max_update_ratio=20.0,
    evaluate_every=1,
    side_seeds=1,
    seeds=(0,),
    threads=1,
)
_CLIENTS: dict[str, dict[str, Any]] = {
    "digits": {
        **_DIGITS,
        **_CLIENTS_ALL,
        "digit_classes": 3,
        "scenes": (260, 80),
        "initial_model_iterations": 120,
        "initial_labels": 12,
        "query_size": 12,
        "cycles": 2,
        "rounds": 2,
        "iterations": 16,
    },
    "bccd": {
        **_CLIENTS_ALL,
        "clients": 4,
        "initial_labels": 6,
        "query_size": 6,
        "cycles": 4,
        "rounds": 3,
        "iterations": 20,
        "seeds": (0, 1, 2),
        "side_seeds": 3,
    },
    "": {**_CLIENTS_ALL, "rounds": 2},
}

_OF_A_VAE = ("vae", "vae_size", "vae_iterations", "vae_batch", "vae_lr", "latent", "kl_weight", "learned_loss")
_WHEEL_BOXES_PAPER = {k: v for k, v in _DUAL_PAPER.items() if k not in _OF_A_VAE} | {"held_out_images": 500}

_BY_PROFILE: dict[str, dict[str, Any]] = {
    "smoke": {"dataset": "digits", "seeds": (0, 1), "threads": 1},
    "quick": {"dataset": "bccd", "seeds": (0, 1, 2), "threads": 0},
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
    "random",
    "entropy",
    "margin",
    "confidence",
    "coreset",
    "badge",
    "qbc",
    "logo",
    "jeffreys",
    "ksas",
)

_METHODS["40"] = ("random", "entropy_max", "coreset", "count", "vae", "d1", "vae_d1")
_METHODS["60"] = ("avg",)
_METHODS["50"] = (
    "random",
    "confidence",
    "margin",
    "ratio",
    "entropy",
    "model_outlier",
    "embedding_outlier",
    "cluster",
    "representative",
    "coreset",
    "mix",
    "mix_diverse",
)
_METHODS["50b"] = (
    "random",
    "avg",
    "margin_avg",
    "ratio_avg",
    "entropy_avg",
    "model_outlier",
    "embedding_outlier",
    "cluster",
    "representative",
    "mix",
)

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
    "20": (_HUALE_PAPER, _HUALE_PAPER_BY_DATA),
    "30": (_KAFAL_PAPER, {}),
    "40": (_DUAL_PAPER, {}),
    "50": (_WHEEL_PAPER, {}),
    "50b": (_WHEEL_BOXES_PAPER, {}),
    "60": ({**_PAPER, "on_failure": "skip", "max_update_ratio": 20.0}, _PAPER_BY_DATA),
}
# Where a notebook is not about detection.
_OWN_DATA = dict.fromkeys(("30", "50"), {"smoke": "digit-images", "quick": "cifar10"})


def one_node(config: Config) -> Config:
    """The same experiment on a single node: as many labels and gradient steps as all clients take together."""
    clients = config.federation.clients
    return config.replace(
        clients=1,
        partition="iid",
        initial_labels=config.query.initial_labels * clients,
        query_size=config.query.query_size * clients,
        iterations=config.federation.iterations * clients,
    )


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
    name = data or _OWN_DATA.get(number, {}).get(profile) or chosen.get("dataset")
    if profile != "paper":
        own = _OWN.get(number, {})
        chosen = {**_BY_DATA.get(name, _PHOTOS), **chosen, **own.get(name, own.get("", {}))}
    else:
        paper, by_data = _OWN_PAPER.get(number, (_PAPER, _PAPER_BY_DATA))
        name = data or paper["dataset"]
        chosen = {**paper, **by_data.get(name, {})}
    chosen.update(profile=profile, dataset=name)
    config = Config.of(**chosen)
    config = config.replace(methods=_METHODS.get(number, _METHODS["11"]))
    if number == "10" and "clients" not in overrides:
        config = one_node(config)
    if seeds is not None:
        overrides["seeds"] = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    return config.replace(**overrides)
