"""Every number of an experiment, in parts, as frozen dataclasses; the sizes of each paper are in `papers`.

`config.training.lr` reads a number; `config.replace(lr=0.1, clients=5)` and `Config.of(lr=0.1)` take flat names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from .fields import Part, fraction, name, number

PROFILES = ("smoke", "quick", "paper")
LISTS = ("methods", "seeds", "side_seeds")  # which runs there are, not what one of them does
SIZES = (
    "clients initial_model_images initial_model_iterations initial_labels query_size rounds iterations epochs".split()
)
FILTERS = ("semantic", "diversity", "overlap", "localisation")  # of HUALE's cascade, in the published order


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Part):
    """How training images are changed, see `data.augment`."""

    flip: float = fraction(0.5)  # probability of a left-right flip
    colour: float = number(0.0, least=0)  # strength of brightness, contrast and saturation changes
    zoom: tuple[float, float] = number((1.0, 1.0), above=0)  # range of the random scale
    shift: float = number(0.0, least=0)  # largest random translation, part of the side
    mosaic: float = fraction(0.0)  # probability of four images joined to one
    crop: int = number(0, least=0)  # classifiers: pixels of black border that a random crop may shift the image into

    def changes_pixels(self) -> bool:
        """True when augmentation does more than flip."""
        return self.colour > 0 or self.zoom != (1.0, 1.0) or self.shift > 0 or self.mosaic > 0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Part):
    """How a model is trained on a set of labelled images, see `training.fit`."""

    augment: AugmentConfig = AugmentConfig()
    epochs: int = number(1, least=0)
    batch: int = number(16, least=1)
    optimizer: str = name("adamw", "sgd")
    lr: float = number(2e-3, above=0)
    momentum: float = fraction(0.937)
    weight_decay: float = number(5e-4, least=0)
    schedule: str = name("constant", "cosine", "step")  # over one call of fit
    final_lr: float = fraction(0.05)  # cosine ends at this part of lr
    step_at: tuple[float, ...] = (0.6, 0.85)  # parts of the run at which 'step' divides by ten
    warmup: int = number(0, least=0)  # steps of rising learning rate; once in the life of an optimizer state
    warmup_epochs: float = number(0.0, least=0)  # most steps of the warm-up, in passes over the images; 0 = no limit
    warmup_momentum: float = fraction(0.0)  # momentum at the first of them (SGD), 0 = momentum all along
    warmup_bias_lr: float = number(0.0, least=0)  # learning rate of biases at the first of them; 0 = as the rest
    accumulate_to: int = number(0, least=0)  # images whose gradients are added up for a step; 0 = one batch
    clip: float = number(5.0, least=0)  # largest gradient norm, 0 = off
    amp: bool = False  # mixed precision
    ema: float = fraction(0.0)  # decay of the moving average of weights, 0 = off
    balanced_softmax: bool = False  # classifiers: class scores + log of the client's labelled counts
    distillation_weight: float = number(0.0, least=0)  # classifiers: of the global model's word on unlabelled images


@dataclass(frozen=True, kw_only=True)
class DataConfig(Part):
    """What is learned from. Sizes in pixels are (height, width) of the letterboxed image."""

    dataset: str = "digits"  # a known name, or the path of a folder
    image_size: tuple[int, int] = number((64, 64), least=1)
    scenes: tuple[int, int] = number((600, 150), least=1)  # DigitScenes: training and test scenes
    digit_classes: int = number(10, least=1)  # DigitScenes: the digits 0 to digit_classes - 1
    limit: tuple[int, int] | None = None  # at most so many training and test images
    min_object: float = number(0.0, least=0)  # pixels: a box with a shorter side is ignored
    kept: tuple[str, ...] = ()  # SIZES that the user set: the others follow from a folder of their own


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Part):
    """What is trained: a detector, or a classifier of whole images in its place, see `detectors`."""

    classifier: str = ""  # 'resnet8' | 'conv4' | 'mlp', 'linear' on frozen features | '' = a detector
    detector: str = name("ssd", "faster_rcnn", "yolo")
    backbone: str = name("small", "lite0", "vgg16", "resnet50")  # the last two: full size of SSD, of Faster R-CNN
    norm: str = name("group", "batch")
    depth_multiple: float = number(0.33, above=0)  # YOLO: repeats of its blocks, as part of the largest size's
    width_multiple: float = number(0.5, above=0)  # YOLO: channels, as part of the largest size's
    loss_weights: tuple[float, float, float] = number((0.05, 1.0, 0.5), least=0)  # YOLO: box, objectness, class
    anchor_side: float = number(16.0, above=0)  # pixels, the smallest anchor (YOLO: its width)
    anchor_ratios: tuple[float, ...] = number((0.7, 1.4), above=0)  # height / width
    pretrained: bool = False
    frozen: bool = False  # the backbone is not trained: its features are cached once
    box_loss: str = name("smooth_l1", "efficient_iou", "extended_iou")  # Faster R-CNN's second stage
    box_weight: float = number(1.0, least=0)  # of an IoU loss
    auxiliary_head: str = name("none", "sides", "iou")  # a deviation per side | a head that predicts the box's IoU
    auxiliary_weight: float = number(1.0, least=0)
    emphasis: float = number(0.0, least=0)
    box_loss_head: bool = False  # predicts each box's classification loss; strategy 'hua' needs it
    image_loss_head: bool = False  # beside an SSD: learns to rank images by their loss


@dataclass(frozen=True, kw_only=True)
class FederationConfig(Part):
    """Who learns with whom, and when, see `federation`."""

    clients: int = number(4, least=1)
    partition: str = name("iid", "dirichlet", "dirichlet-equal", "natural", "missing")
    dirichlet_alpha: float = number(0.5, above=0)
    missing_classes: tuple[tuple[int, ...], ...] = ()
    initial_model_images: int = number(40, least=0)  # the initial model is trained centrally on images of its own
    initial_model_iterations: int = number(150, least=0)
    initial_model_warmup: int = number(0, least=0)
    held_out_images: int = number(0, least=0)  # labelled, at the server: the class-wise merge is evaluated on them
    client_fraction: float = number(1.0, above=0, most=1)  # of the clients, in each round
    aggregation_weights: str = name("images", "boxes", "equal")
    message_dtype: str = name("fp32", "fp16")
    rounds: int = number(3, least=1)  # in a cycle
    iterations: int = number(12, least=0)  # gradient steps of one client in one round; 0 = `epochs` instead
    extra_rounds: int = number(0, least=0)  # of training only, after those of the last cycle
    reset_each_cycle: bool = False  # in every cycle the model begins again from the initial model
    round_lr_decay: float = number(1.0, above=0, most=1)  # lr of a cycle's last round as part of its first round's
    optimizer_state: str = name("restart", "client", "travels")  # reset each round | kept at the client | sent along
    first_pass_rounds: int = number(10, least=1)  # the chain's first visits train as long as so many rounds
    chain_passes: int = number(0, least=0)  # after the chain's first; 0 = as many as make equal gradient steps
    visit_fraction: float = number(1.0, above=0)  # length of an accumulating chain's visit, as part of a round
    dropout_rate: float = fraction(0.0)  # probability that a client's update does not arrive
    on_failure: str = name("stop", "skip")  # a client whose training diverges stops the run | is left out of the round
    max_update_ratio: float = 0.0  # an update that moved further than so many median updates is left out; 0 = off


@dataclass(frozen=True, kw_only=True)
class QueryConfig(Part):
    """What is labelled next, and what it costs, see `sampling`."""

    cycles: int = number(5, least=1)
    initial_labels: int = number(8, least=1)  # images labelled at each client in cycle 0, at random
    query_size: int = number(8, least=1)  # images labelled at each client in every later cycle
    initial_fraction: float = fraction(0.0)  # classifiers: instead, a part of the client's images; 0 = initial_labels
    query_fraction: float = fraction(0.0)  # likewise, 0 = query_size
    score_above: float = fraction(0.25)  # a detection counts from this confidence on; released code
    nms_iou: float = fraction(0.45)
    class_agnostic: bool = True
    test_time_views: bool = False  # score on flipped and scaled views as well (YOLO)
    no_detection_rule: str = name("last", "first", "never")  # where images without a detection are queried
    pool_subset_size: int = number(0, least=0)  # at most so many unlabelled images are scored in a cycle; 0 = all
    cascade: tuple[float, float, float, float] = number((4.0, 3.0, 2.0, 1.5), least=1)  # query sizes that steps leave
    cascade_order: tuple[str, ...] = FILTERS
    quota: float = fraction(0.15)  # part of the query that 'hua' draws from images with score zero
    pseudo_above: float = fraction(0.5)  # a detection stands in for ground truth from this confidence on
    local_only_epochs: int = number(50, least=1)  # LoGo's local-only model; it stops at 99 % training accuracy
    seconds_per_image: float = number(2.0, least=0)
    seconds_per_box: float = number(7.0, least=0)
    diagnostic: bool = False  # opens hidden labels to 'd0' and 'vae_d0': upper bounds, never methods


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Part):
    """The dual score of a VAE and an SSD, see `sampling.dual_score`; each client has a VAE of its own."""

    vae_architecture: str = name("small", "published")  # 'published': 300 x 300
    vae_size: tuple[int, int] = number((64, 64), least=1)  # what images are scaled to for it
    latent: int = number(64, least=1)
    kl_weight: float = number(1.0, least=0)  # beside the sum of squared errors over all pixels
    vae_iterations: int = number(200, least=1)
    vae_batch: int = number(16, least=1)
    vae_lr: float = number(1e-3, above=0)
    vae_images: str = name("labelled", "all")  # what it is trained on; labelled: novel = unlike them
    vae_refit: bool = True  # in every cycle from the same first weights, else from where it was
    vae_weight: float = fraction(0.5)  # alpha, the part of the reconstruction error; beta = 1 - alpha


@dataclass(frozen=True, kw_only=True)
class FlywheelConfig(Part):
    """The labelling flywheel, see `papers.flywheel`."""

    feature_side: int = number(64, least=1)  # pixels that images are scaled to for the frozen backbone
    regularisation: float = number(0.1, above=0)  # of its linear classifier: inverse strength of the L2 penalty
    annotator_error: float = fraction(0.0)  # how often a simulated annotator names the wrong class
    goal: float = fraction(0.9)  # a stopping rule: this accuracy (or AP50) is reached
    plateau: float = number(1.0, least=0)  # a stopping rule: the last cycle surely gained less than so many points


@dataclass(frozen=True, kw_only=True)
class Config(Part):
    """One experiment: its parts, and which runs are compared."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    query: QueryConfig = QueryConfig()
    vae: VAEConfig = VAEConfig()
    flywheel: FlywheelConfig = FlywheelConfig()
    profile: str = name("smoke", *PROFILES)
    methods: tuple[str, ...] = ("random", "sum", "avg", "max")
    seeds: tuple[int, ...] = (0, 1)
    side_seeds: int = number(3, least=1)  # a notebook's side experiments run the first so many of them
    threads: int = number(1, least=0)  # CPU threads of a training step; the same number gives the same bits
    evaluate_every: int = number(0, least=0)  # rounds; 0 = only after the last round of a cycle
    as_released: bool = False  # bring back the released code's quirks that move a figure (see each notebook's table)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be a list of different integers >= 0, got {self.seeds}")
        if sorted(self.query.cascade_order) != sorted(FILTERS):
            raise ValueError(f"cascade_order must name each of {FILTERS} once, got {self.query.cascade_order}")
        if sorted(self.query.cascade, reverse=True) != [*self.query.cascade]:
            raise ValueError(f"cascade must be four numbers that do not grow, got {self.query.cascade}")
        if self.federation.max_update_ratio != 0 and self.federation.max_update_ratio <= 1:
            raise ValueError(f"max_update_ratio must be 0 (off) or > 1, got {self.federation.max_update_ratio}")
        kept, state = ("restart", "client") if self.model.classifier else ("restart",), self.federation.optimizer_state
        if self.federation.reset_each_cycle and state not in kept:
            raise ValueError(f"reset_each_cycle=True begins again in every cycle: {state=} cannot live on")

    def digest(self) -> str:
        """Hex digest of all that decides a run's numbers: what differs from the defaults, without methods and seeds."""
        values = {k: v for k, (v, _) in self.differences(Config()).items() if k not in LISTS}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def labels_needed(self) -> int:
        """Images that one client has labelled at the end."""
        return self.query.initial_labels + self.query.query_size * (self.query.cycles - 1)
