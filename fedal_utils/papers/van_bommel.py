"""Van Bommel (2021), active learning during federated learning: notebooks 10 to 14, and what the paper sends."""

import pandas as pd
import torch

from .. import detectors, federation, training
from ..config import Config
from .sizes import Preset, Sizes

_YOLO: Sizes = {
    **dict(detector="yolo", depth_multiple=0.1, width_multiple=0.125, norm="group", pretrained=False, frozen=False),
    **dict(anchor_side=7.0, loss_weights=(1.0, 1.0, 20.0)),
    **dict(batch=8, optimizer="sgd", lr=2e-2, clip=10.0, ema=0.9, round_lr_decay=0.2, threads=1),
}
_SMALL: dict[str, Sizes] = {
    "digits": {
        **_YOLO,
        **dict(image_size=(64, 64), digit_classes=3, scenes=(220, 40), held_out_images=20, seeds=(0,)),
        **dict(initial_model_images=40, initial_model_iterations=120, rounds=1, extra_rounds=2, iterations=5),
        **dict(first_pass_rounds=3, initial_labels=8, query_size=8, cycles=3, side_seeds=1),
    },
    "bccd": {
        **_YOLO,
        **dict(image_size=(128, 160), held_out_images=20, anchor_side=3.0, loss_weights=(0.3, 1.0, 5.0)),
        **dict(clip=0.0, zoom=(0.8, 1.2), shift=0.15, colour=0.3),
        **dict(initial_model_images=20, initial_model_iterations=120, rounds=2, extra_rounds=4, iterations=12),
        **dict(first_pass_rounds=7, visit_fraction=0.5, initial_labels=10, query_size=10, cycles=4),
        **dict(evaluate_every=2, seeds=(0, 1, 2, 3, 4)),
    },
    # From scratch the small YOLO learns nothing in the time (AP50 .004 after 400 steps): an SSD on frozen features. Few
    # labels, for there they count: in trials on held-out training images twice the steps added 0.8 points, labels 4.4.
    "hit-uav": {
        **dict(detector="ssd", image_size=(224, 288), anchor_side=8.0, limit=(2319, 300), partition="natural"),
        **dict(batch=4, optimizer="adamw", lr=2e-3, clip=10.0, optimizer_state="client", held_out_images=20),
        **dict(initial_model_images=27, initial_model_iterations=200, rounds=1, extra_rounds=3, iterations=12),
        **dict(first_pass_rounds=4, visit_fraction=0.5, initial_labels=3, query_size=3, cycles=5),
        **dict(evaluate_every=1, round_lr_decay=1.0, threads=1, seeds=(0, 1, 2)),
    },
}

# The released code's protocol: YOLOv5s's shape from scratch, 200 images and 200 epochs before the first query, 9
# clients, 22 cycles of 10 images and 179 rounds more, 20 local epochs a round, SGD with Nesterov momentum that begins
# again with a warm-up of 1,000 iterations in every call. Images are letterboxed to 192 x 640: the scale of 640 x 640
# without its grey bars.
FULL: Sizes = {
    **dict(dataset="kitti-2", image_size=(192, 640)),
    **dict(detector="yolo", depth_multiple=0.33, width_multiple=0.5, norm="batch", anchor_side=10.0),
    **dict(flip=0.5, zoom=(0.5, 1.5), shift=0.1, colour=0.4, mosaic=1.0, batch=16, accumulate_to=64, epochs=20),
    **dict(optimizer="sgd", lr=1e-2, momentum=0.937, weight_decay=5e-4, schedule="cosine", final_lr=0.2),
    **dict(warmup=1000, warmup_momentum=0.8, warmup_bias_lr=0.1, clip=0.0, ema=0.9999, amp=True),
    **dict(initial_model_images=200, initial_model_iterations=2600, initial_model_warmup=1000, held_out_images=100),
    **dict(clients=9, rounds=1, extra_rounds=179, iterations=0, message_dtype="fp16"),
    **dict(first_pass_rounds=10, chain_passes=20, visit_fraction=0.1),
    **dict(initial_labels=10, query_size=10, cycles=22, test_time_views=True, no_detection_rule="never"),
    **dict(evaluate_every=5, threads=0, seeds=(0, 1, 2)),
}

# Missing classes of the nine devices in the 8-class set (released code), as columns of the classes in alphabetical
# order: Car, Cyclist, Misc, Pedestrian, Person_sitting, Tram, Truck, Van.
KITTI_MISSING = ((1,), (4,), (1, 4), (4, 5), (3, 6), (1, 6), (1, 5), (3,), (1, 3))

FULL_BY_DATA: dict[str, Sizes] = {
    "kitti": {"partition": "missing", "missing_classes": KITTI_MISSING},
    "voc07": {"image_size": (416, 416)},
}

# A centralised reference gets the labels of another method, which stands before it.
_SIDE_BY_SIDE = ("random", "sum", "avg", "max", "local-first+sum", "centralised", "centralised+sum")
_IN_A_ROW = ("chain+sum", "chain-fedavg+sum", "accumulate+sum", "centralised+chain+sum")
PRESETS = {
    number: Preset(methods, FULL, FULL_BY_DATA, _SMALL, {} if number == "14" else {"quick": "hit-uav"})
    for number, methods in {
        "10": ("random", "sum", "avg", "max"),
        "11": _SIDE_BY_SIDE,
        "12": _IN_A_ROW,
        "13": (*_SIDE_BY_SIDE, *_IN_A_ROW),
        "14": ("random", "centralised"),
    }.items()
}
OTHERS = Preset(_SIDE_BY_SIDE, FULL, FULL_BY_DATA)  # of a notebook that has no sizes of its own

# The schemes as `results/paper/van-bommel.csv` names them, all with SUM.
SCHEMES = {
    "FedAvg": "sum",
    "local first": "local-first+sum",
    "chain": "chain+sum",
    "chain then FedAvg": "chain-fedavg+sum",
    "accumulating chain": "accumulate+sum",
    "centralised": "centralised+chain+sum",
}
MEGABYTES = {"full": 14.017, "head": 5.7, "optimizer": 5.241}  # section 8: FP16 checkpoint, its head, SGD's state


def paper_megabytes(scheme: str, step: int, clients: int = 9, merge_at: int = 21, sizes: dict = MEGABYTES) -> float:
    """MB sent by all clients, both ways, after a step of a scheme: the released analysis' formulas (section 8).

    They count two transfers for each hop of a chain, which needs one, and neither the initial model nor labels.
    step: the round, from 0; of chains: the visit of the first pass, the merge, then later visits (or rounds).
    merge_at, sizes: the first round in which local-first merges; MB by the names of `MEGABYTES`.
    """
    full, head, optimizer = (sizes[name] for name in ("full", "head", "optimizer"))
    each = {"chain": 2 * head, "chain-fedavg": 2 * head * clients, "accumulate": 2 * (full + optimizer)}
    if scheme in each:
        return min(step + 1, clients) * 2 * full + max(0, step - clients) * each[scheme]
    rounds = {"centralised": 0, "fedavg": step + 1, "local-first": max(1, step - merge_at + 1)}
    return rounds[scheme] * 2 * full * clients


def message_sizes(setup: federation.Setup) -> dict[str, float]:
    """MB of one packed message of this setup's detector: 'full', 'head' (backbone frozen), 'optimizer' (its state)."""
    config, dtype = setup.config, setup.config.federation.message_dtype
    model = detectors.build(config, max(1, len(setup.class_names)), torch.Generator().manual_seed(0))
    moments = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}[config.training.optimizer]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    state = {f"{moment}:{n}": torch.tensor(0.0) if moment == "step" else p for n, p in trained for moment in moments}
    messages = {"full": federation.broadcast(model, dtype)}
    model.freeze_backbone()
    messages["head"] = federation.broadcast(model, dtype)
    messages["optimizer"] = federation.pack({**state, training.STEPS: torch.tensor(0)})
    return {name: len(message) / 1e6 for name, message in messages.items()}


def traffic_table(setup: federation.Setup, table: pd.DataFrame) -> pd.DataFrame:
    """The bytes of every evaluated round beside the paper's formula, for our message sizes and for the paper's own.

    MB so far, both ways: metered (packed messages), formula (with this setup's message sizes), paper_sizes.
    """
    config, ours = setup.config, message_sizes(setup)
    given = config.federation.clients, (config.query.cycles - 1) * config.federation.rounds
    frame = table[table["client"].astype(str) == "server"].sort_values(["method", "seed", "cycle", "round"])
    frame = frame.assign(metered=frame["bytes_up"] + frame["bytes_down"]).reset_index(drop=True)
    runs = frame.groupby(["method", "seed"])
    frame = frame.assign(step=runs.cumcount(), metered=runs["metered"].cumsum() / 1e6)
    schemes = [federation.method_of(method, config).scheme.name for method in frame["method"]]
    for name, sizes in (("formula", ours), ("paper_sizes", MEGABYTES)):
        frame[name] = [paper_megabytes(*at, *given, sizes) for at in zip(schemes, frame["step"], strict=True)]
    return frame[["method", "seed", "step", "ap50", "metered", "formula", "paper_sizes"]]


def optimizer_ablation(config: Config) -> dict[str, Config]:
    """The same experiment with three policies for the optimizer state between rounds, and a control.

    The released code's warm-up of 1,000 iterations begins again in every call of at most 280. In the control clients
    take the single node's steps in a row: what is left of the gap is due to averaging and the split.
    """
    iterations, many = config.federation.iterations, config.federation.clients
    warmup = round(1000 / 280 * iterations) if iterations else 1000
    longer = {"iterations": many * iterations} if iterations else {"epochs": many * config.training.epochs}
    return {
        "restart, warm-up": config.replace(optimizer_state="restart", warmup=warmup),
        "restart, no warm-up": config.replace(optimizer_state="restart", warmup=0),
        "kept, one warm-up": config.replace(optimizer_state="client", warmup=warmup),
        f"kept, {many} x the steps": config.replace(optimizer_state="client", warmup=warmup, **longer),
    }
