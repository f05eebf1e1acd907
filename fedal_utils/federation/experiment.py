"""Active learning during federated learning for object detection (van Bommel, Univ. of Twente, 2021): the verbs.

The paper's text is public in its abstract only; what is here follows the author's released code as described in its
repository (marked *released code*) or fills a gap (*reconstructed*). The loops themselves stand in notebooks 10 to 12.

A run's method names a scheme and a way of asking, "chain+sum"; a bare way of asking is the first scheme:

    fedavg        ask with the global model, train, average, each round
    local-first   each client asks and trains alone until all labels are there; then as fedavg
    chain         the model visits one client after another, each labels everything at its first visit; the models of
                  the first pass are merged class by class; later passes train the head only
    chain-fedavg  the chain's first pass and merge, then rounds of fedavg that train the head only
    accumulate    the chain's first pass and merge, then short visits in which all of the model is trained and the
                  optimiser's state travels with it (AccFL-Batch; its inner loop is not published: *reconstructed*)
    centralised   the labels that another method asked for, "centralised+chain+sum", on one node
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import metrics, record, seeding, training
from ..config import Config, TrainingConfig
from ..data import classification as class_sets
from ..data import partition
from ..data import readers as data
from ..data.boxes import Detections, flip_boxes
from ..data.readers import Dataset, Images, Labels
from ..data.views import VIEWS, Viewed, move_boxes
from ..detectors import base as detectors
from ..detectors import classifiers, yolo
from ..detectors.base import Detector
from ..detectors.classifiers import Classifier
from ..detectors.roi_heads import Localisation
from ..detectors.vae import VAE
from ..sampling import dual_score as dual_vae
from ..sampling import huale
from ..sampling import ksas as kafal
from ..sampling import strategies as sampling
from ..sampling.pool import Oracle, Pool, total
from ..sampling.strategies import Choice, Sight, View
from ..training import CachedImages
from . import aggregate as federation
from .aggregate import State, Update
from .own_data import fitted

CENTRALISED = "centralised"
CROWD = 1000  # boxes of an image at most, where they are wanted before non-maximum suppression
YOLO_ANCHOR = 10.0  # pixels, width of the smallest anchor at 640 px
CHAINS = ("chain", "chain-fedavg", "accumulate")
SCHEMES = ("fedavg", "local-first", *CHAINS, CENTRALISED)
ASKED = ("local", "alone")  # "entropy.local": not the global model is asked, see `ask`
BOX_STRATEGIES = (  # all schemes take them all
    *sampling.BOX_STRATEGIES,
    *huale.STRATEGIES,
    *kafal.BOX_STRATEGIES,
    *dual_vae.STRATEGIES,
)
CLASS_STRATEGIES = (
    *sampling.CLASS_STRATEGIES,
    *kafal.CLASS_STRATEGIES,
    *(f"{name}.{who}" for name in ("entropy", "margin", "confidence", "coreset", "badge") for who in ASKED),
)
STRATEGIES = tuple(dict.fromkeys((*BOX_STRATEGIES, *CLASS_STRATEGIES)))  # ways of asking


@dataclass
class Client:
    """A participant: its name, its pool, and what stays with it between rounds.

    home: BatchNorm statistics under the policy 'local'. memory: its optimiser's state, where that is kept or travels.
    own: the weights of its own model while it has one (local-first, and the chain's first pass). status: why it sent
    nothing in this round: 'no labels', 'lost', 'diverged', or '' if it did. received: bytes that it got in this round;
    heard: bytes of other clients' models that it got to ask with. last: its own weights after its latest training,
    where a strategy compares them with the global model; known: the global model that it got last, while that is not
    the current one (KAFAL's algorithm 1: a client that missed rounds compares stale models). coder: the weights of its
    VAE, where that is not refitted in every cycle; it never leaves the client. judged: metrics of the global model on
    test images of its own, after this round, where it has some (`flower`).
    """

    name: str
    pool: Pool
    home: State = field(default_factory=dict)
    memory: State = field(default_factory=dict)
    own: State = field(default_factory=dict)
    last: State = field(default_factory=dict)
    known: State = field(default_factory=dict)
    coder: State = field(default_factory=dict)
    status: str = ""
    received: int = 0
    heard: int = 0
    judged: dict[str, float] = field(default_factory=dict)


KEPT = ("home", "memory", "own", "last", "known", "coder")  # of a client, in the resume point


@dataclass(frozen=True)
class Turn:
    """Who acts in a round, and how.

    clients: one in a chain, nobody in the round of its class-wise merge (`merge`), else all. asks: they ask for labels
    before they train. first: a visit of the chain's first pass, which asks for all labels at once. times: training as
    long as so many rounds. visits: how many such turns make one schedule, where the optimiser's state lives on. frozen:
    only the head is trained and sent back. whole: the message to the client carries the backbone all the same, for it
    has not seen the merged one yet. state: what happens to the optimiser's state, as `Config.optimiser_state`. anneal:
    factor on the learning rate.
    """

    clients: tuple[Client, ...]
    asks: bool = False
    first: bool = False
    merge: bool = False
    times: float = 1.0
    visits: int = 1
    frozen: bool = False
    whole: bool = True
    state: str = "restart"
    anneal: float = 1.0


@dataclass(frozen=True)
class Study:
    """What all runs of one setting share.

    train, test: what detectors read: pixels, or a frozen backbone's features cached once. photos: train and test with
    their pixels, for pictures. name: of the data set, short enough for a file's name. views: a frozen backbone's
    features of changed training images, by view, cached when a strategy first asks for them. dealt: of a server that
    holds nobody's images but its own, which are `train`: so many start images, then so many that are held out.
    """

    config: Config
    train: Dataset
    test: Dataset
    photos: tuple[Dataset, Dataset]
    device: torch.device
    views: dict[str, CachedImages] = field(default_factory=dict, compare=False, repr=False)
    dealt: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return short_name(self.config.data.dataset)

    def start_rows(self, seed: int) -> np.ndarray:
        """Rows of the labelled images that the starting point is trained on."""
        if self.dealt is None:
            return start_rows(self.config, self.train, seed)
        return np.arange(self.dealt[0])

    def held_out(self, seed: int) -> np.ndarray:
        """Rows of the labelled images that the server keeps for judging: in no client's pool, never trained on."""
        if self.dealt is None:
            return held_out(self.config, self.train, seed)
        return np.arange(self.dealt[0], sum(self.dealt))

    def view(self, rows: Sequence[int], test: bool = False) -> Dataset:
        """These rows of the training (or test) set with their pixels."""
        return self.photos[test].take(list(rows))

    def preview(self, count: int) -> Dataset:
        """The first `count` training images with their pixels, or all if there are fewer."""
        return self.view(range(min(count, len(self.train))))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names


def scheme_of(method: str) -> tuple[str, str]:
    """Scheme and way of asking of a method; of the centralised reference, the method whose labels it gets.

    "sum" -> ("fedavg", "sum"); "chain+sum" -> ("chain", "sum"); "centralised" -> ("centralised", "random");
    "centralised+chain+sum" -> ("centralised", "chain+sum").
    """
    scheme, plus, rest = method.partition("+")
    if method == CENTRALISED:
        return CENTRALISED, "random"
    if not plus:
        scheme, rest = "fedavg", method
    asks = scheme_of(rest)[1] if scheme == CENTRALISED else rest
    if scheme not in SCHEMES or asks not in STRATEGIES:
        raise ValueError(
            f"method {method!r} is unknown: write a way of asking ({', '.join(STRATEGIES)}), with one of "
            f"{', '.join(f'{name}+' for name in SCHEMES)} before it or nothing for fedavg"
        )
    return scheme, rest


def new_detector(config: Config, classes: int, rng: torch.Generator) -> Detector | Classifier:
    """The config's detector (or classifier) with weights drawn from `rng`."""
    if config.model.classifier:
        return classifiers.build(config.model.classifier, classes, config.data.image_size, rng)
    localisation = Localisation(
        config.model.box_loss,
        config.model.box_weight,
        config.model.box_focal,
        config.model.auxiliary_head,
        config.model.auxiliary_weight,
        config.model.iou_power,
        config.model.emphasis,
    )
    if config.model.detector == "yolo":
        if config.model.box_loss_head or not localisation.plain:
            raise ValueError("detector 'yolo' has neither RoI heads nor an evidence head: use 'faster_rcnn' (or 'ssd')")
        if config.model.image_loss_head:
            raise ValueError("detector 'yolo' has no head that learns an image's loss: use 'ssd'")
        return yolo.build(
            classes,
            config.data.image_size,
            rng,
            depth=config.model.depth_multiple,
            width=config.model.width_multiple,
            norm=config.model.norm,
            anchor_scale=config.model.anchor_side / YOLO_ANCHOR,
            frozen=config.model.frozen,
            gains=config.model.loss_weights,
        )
    return detectors.build(
        config.model.detector,
        config.model.backbone,
        classes,
        config.data.image_size,
        rng,
        norm=config.model.norm,
        width=config.model.fpn_channels,
        anchor_side=config.model.anchor_side,
        anchor_ratios=config.model.anchor_ratios,
        pretrained=config.model.pretrained,
        frozen=config.model.frozen,
        localisation=localisation,
        evidence=config.model.box_loss_head,
        learned_loss=config.model.image_loss_head,
    )


def prepare(config: Config, device: str | torch.device | None = None, root: str | None = None) -> Study:
    """Load the data once; with a frozen backbone, cache its features of all images.

    root: where data sets lie; by default $FEDAL_DATA, else `data/` of the checkout that the notebook was opened in.
    A folder of the user's own may be small: clients and budgets are shrunk to it (`fitted`). Sets the number of
    CPU threads to `config.threads` (0 = as it was).
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cores = torch.get_num_threads()
    place = data_place(root)
    if config.model.classifier:
        train, test = class_sets.load(config.data.dataset, config.data.image_size, root=place, limit=config.data.limit)
    else:
        train, test = data.load(
            config.data.dataset,
            config.data.image_size,
            root=place,
            min_object=config.data.min_object,
            limit=config.data.limit,
            scenes=config.data.scenes,
            digit_classes=config.data.digit_classes,
        )
    if config.data.dataset not in (*data.NAMES, *class_sets.NAMES):
        config = fitted(config, len(train))
    if config.federation.partition == "natural" and train.images.groups:
        config = config.replace(clients=len(set(train.images.groups)))
    elif config.federation.partition.endswith(".json"):
        config = config.replace(clients=len(partition.load(config.federation.partition, train.images.ids)[1]))
    for_classes = [
        name
        for name in ("balanced_softmax", "distillation_weight", "initial_fraction", "query_fraction")
        if config.flat()[name]
    ]
    if for_classes and not config.model.classifier:
        raise ValueError(
            f"{' and '.join(for_classes)} are for classifiers: set classifier to one of {classifiers.NAMES}"
        )
    for method in config.methods:
        _check_method(config, method)
    study = study_of(config, train, test, device)
    torch.set_num_threads(config.threads or cores)
    return study


def study_of(
    config: Config, train: Dataset, test: Dataset, device: torch.device, dealt: tuple[int, int] | None = None
) -> Study:
    """A study of these sets: with a frozen backbone, its features of all images, cached once. dealt: see `Study`."""
    photos = (train, test)
    if config.model.frozen:
        model = new_detector(config, len(train.class_names) or 1, torch.Generator().manual_seed(0)).to(device)
        train, test = (
            Dataset(
                part.name,
                training.cache_features(model, part.images, device=device),
                part.labels,
                part.class_names,
                part.drops,
            )
            for part in (train, test)
        )
    if device.type == "cuda":
        train, test = (Dataset(p.name, p.images.to(device), p.labels, p.class_names, p.drops) for p in (train, test))
    return Study(config, train, test, photos, device, dealt=dealt)


def short_name(what: str) -> str:
    """A data set's name, fit for a file's: a known one's own, else its folder's, or its file's without suffix."""
    if what in (*data.NAMES, *class_sets.NAMES):
        return what
    place = Path(what).expanduser().resolve()
    return place.stem if place.is_file() else place.name


def data_place(root: str | Path | None = None) -> Path:
    """Where data sets lie: the argument, else $FEDAL_DATA, else `data/` of the checkout the notebook was opened in."""
    return Path(root or os.environ.get("FEDAL_DATA") or record.project_root() / "data")


def _check_method(config: Config, method: str) -> None:
    """Raises on a method that is unknown, or that this config's kind of model cannot do."""
    scheme, rest = scheme_of(method)
    asks = scheme_of(rest)[1] if scheme == CENTRALISED and rest != "random" else rest
    what, allowed = ("classifiers", CLASS_STRATEGIES) if config.model.classifier else ("detectors", BOX_STRATEGIES)
    if asks not in allowed:
        raise ValueError(f"method {method!r} is not for {what}: ways of asking are {', '.join(allowed)}")
    if scheme != "fedavg" and config.model.classifier:
        raise ValueError(f"method {method!r}: classifiers know one scheme, fedavg; write {asks!r}")
    if asks in ("model_outlier", "mix") and not config.model.classifier and config.federation.held_out_images < 1:
        raise ValueError(f"method {method!r} compares with images that are held out: set merge_images to 1 or more")
    if asks in dual_vae.STRATEGIES and config.model.detector != "ssd":
        raise ValueError(
            f"method {method!r} needs the loss of each image: set detector='ssd', not {config.model.detector!r}"
        )
    if asks in ("d4", "vae_d4") and not config.model.image_loss_head:
        raise ValueError(f"method {method!r} asks a head that learns the detector's loss: set learned_loss=True")
    if asks in dual_vae.DIAGNOSTIC and not config.query.diagnostic:
        raise ValueError(
            f"method {method!r} looks at hidden labels: an upper bound and no method; set diagnostic=True to run it"
        )
    if scheme != "fedavg" and asks in kafal.BOX_STRATEGIES:
        raise ValueError(f"method {method!r} compares clients with the global model, which {scheme} has none of")


def deal(
    config: Config, train: Dataset, rows: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[str]]:
    """Rows of the training set for each client, and the clients' names, by `config.partition`."""
    if config.federation.partition == "natural":
        groups = train.images.groups
        parts, names = partition.natural(groups if groups is None else [groups[row] for row in rows])
        return [rows[part] for part in parts], [str(name) for name in names]
    if config.federation.partition == "iid":
        parts = partition.iid(len(rows), config.federation.clients, rng)
    elif config.federation.partition == "dirichlet":
        dominant = train.dominant_class().numpy()[rows]
        least = LEAST if config.model.classifier else config.labels_needed()
        parts = partition.dirichlet(
            dominant, config.federation.clients, config.federation.dirichlet_alpha, rng, least=least
        )
    elif config.federation.partition == "dirichlet-equal":
        dominant = train.dominant_class().numpy()[rows]
        parts = partition.dirichlet_equal(dominant, config.federation.clients, config.federation.dirichlet_alpha, rng)
    elif config.federation.partition.endswith(".json"):
        parts, names = partition.load(config.federation.partition, train.images.ids)
        return [np.intersect1d(part, rows) for part in parts], names
    elif config.federation.partition == "missing":
        classes = train.labels.classes.numpy()[rows]
        present = np.stack([(classes == c + 1).any(axis=1) for c in range(len(train.class_names))], axis=1)
        parts, _ = partition.missing_class(present, config.federation.missing_classes, rng)
    else:
        raise ValueError(
            "partition must be 'iid', 'dirichlet', 'dirichlet-equal', 'missing', 'natural' or a file saved by "
            f"partition.save (*.json), got {config.federation.partition!r}"
        )
    return [rows[part] for part in parts], [f"{number:02d}" for number in range(len(parts))]


def share_out(config: Config, train: Dataset, seed: int) -> tuple[np.ndarray, list[np.ndarray], list[str]]:
    """Rows of the start images, rows of each client, and the clients' names; depends on the seed and on no method."""
    aside = config.federation.initial_model_images + config.federation.held_out_images
    if len(train) <= aside:
        raise ValueError(
            f"data set {train.name!r} has {len(train)} training images, and start_images={config.federation.initial_model_images} "
            f"with merge_images={config.federation.held_out_images} leaves none for the clients; lower them"
        )
    first, rest = start_rows(config, train, seed), np.sort(_order(train, seed)[aside:])
    parts, names = deal(config, train, rest, seeding.rng_for(seed, "partition"))
    for name, part in zip(names, parts, strict=True):
        if len(part) < (1 if config.model.classifier else config.labels_needed()):
            raise ValueError(
                f"client {name} holds {len(part)} images, but first={config.query.initial_labels} and {config.query.cycles - 1} cycles of "
                f"budget={config.query.query_size} ask for {config.labels_needed()}; lower budget, first, cycles or clients"
            )
    return first, parts, names


LEAST = 10  # images of a classifier's client under 'dirichlet', at least


def save_partition(study: Study, seed: int, path: str | Path) -> Path:
    """Who holds which training image on this seed, as a file that `Config.partition` can name."""
    _, parts, names = share_out(study.config, study.train, seed)
    return partition.save(path, study.name, study.train.images.ids, parts, names)


def to_ask(config: Config, pool: Pool, cycle: int) -> int:
    """How many images this client asks for in a cycle. A classifier's client asks for what it has left at most."""
    count = config.query.initial_labels if cycle == 0 else config.query.query_size
    part = config.query.initial_fraction if cycle == 0 else config.query.query_fraction
    if part:
        count = math.ceil(round(part * len(pool), 9))  # 0.05 * 20 is a little more than one
    return min(count, len(pool.unlabelled())) if config.model.classifier else count


def _order(train: Dataset, seed: int) -> np.ndarray:
    """The shuffle that decides which training images are the start images, which are held out, and which are dealt."""
    return seeding.rng_for(seed, "start images").permutation(len(train))


def start_rows(config: Config, train: Dataset, seed: int) -> np.ndarray:
    """Rows of the labelled images that the starting point is trained on."""
    return np.sort(_order(train, seed)[: config.federation.initial_model_images])


def held_out(config: Config, train: Dataset, seed: int) -> np.ndarray:
    """Rows of the labelled images that the server keeps for judging a merge: in no client's pool, never trained on."""
    order = _order(train, seed)
    return np.sort(
        order[
            config.federation.initial_model_images : config.federation.initial_model_images
            + config.federation.held_out_images
        ]
    )


def first_questions(study: Study, seed: int = 0) -> pd.DataFrame:
    """What each client should label first when there are no labels yet: random images, as in cycle 0 of a run.

    Columns: client, id. The start images come first, under the client 'start'.
    """
    config = study.config
    first, parts, names = share_out(config, study.train, seed)
    rows = [("start", row) for row in first]
    for name, part in zip(names, parts, strict=True):
        rng = seeding.rng_for(seed, "ask", name, 0)
        chosen = sampling.top_k(sampling.random(len(part), rng), config.query.initial_labels, rng)
        rows += [(name, part[position]) for position in chosen]
    return pd.DataFrame([(name, study.train.images.ids[row]) for name, row in rows], columns=["client", "id"])


def start(run: record.Run, study: Study, oracle: Oracle | None = None) -> tuple[list[Client], Detector]:
    """Clients with their pools, and the global model: fresh, or where a broken run stopped.

    Partition, start images and the starting point depend on the seed only, so every method begins from the same.
    The starting point is trained centrally on `start_images` images that are in no client's pool (released code: 200
    images, 200 epochs). oracle: who answers, in the place of the known labels (`flywheel.Answers`).
    """
    config, train = run.config, study.train
    if train.labels is None:
        raise ValueError(f"data set {train.name!r} has no labels: it can be scored, but nobody can answer for it")
    first, parts, names = share_out(config, train, run.seed)
    oracle = oracle or Oracle(
        train.labels, config.query.seconds_per_image, config.query.seconds_per_box, config.query.diagnostic
    )
    clients = [Client(name, Pool(name, train.images, oracle, part)) for name, part in zip(names, parts, strict=True)]
    model = new_detector(config, len(study.class_names), run.torch_rng("weights"))
    if run.resumed is not None:
        rows = run.query_rows()
        for client in clients:
            client.pool.replay(rows)
            client.pool.set_aside(oracle.unsure({cycle for cycle, _ in run.plan[: run.committed]}))
        go_on(run, model, clients)
        return clients, model.to(study.device)
    model.load_state_dict(starting_point(run, study, first), strict=False)
    return clients, model.to(study.device)


def go_on(run: record.Run, model: Detector | Classifier, clients: Sequence[Client]) -> None:
    """Weights, and what stays with the clients between rounds, as they were when the run broke off."""
    model.load_state_dict(run.resumed["model"], strict=False)
    for client in clients:
        for what in KEPT:
            getattr(client, what).update(run.resumed.get(what, {}).get(client.name, {}))


def starting_point(run: record.Run, study: Study, rows: np.ndarray) -> State:
    """Weights that every method of a seed begins from, trained on these start images; made once, then read."""
    config, train = run.config, study.train

    def make() -> dict:
        model = new_detector(config, len(study.class_names), run.torch_rng("weights"))
        if len(rows) == 0 or config.federation.initial_model_iterations == 0:
            return federation.state_of(model, model.exchanged())
        if config.model.classifier:
            return _classifier_start(run, study, model, rows)
        images, labels = train.images.take(rows), train.labels.take(rows)
        schedule = config.training.replace(
            schedule="cosine", warmup=config.federation.initial_model_warmup, proximal=0.0
        )
        task = training.LocalTask(
            run.torch_rng("starting point"), "starting point", config.federation.initial_model_iterations
        )
        for _ in training.fit(model, images, labels, schedule, task, study.device):
            pass
        return federation.state_of(model, model.exchanged())

    return record.shared(beginning(config), "shared", run.seed, "starting-point", make, root=run.root)


def _classifier_start(run: record.Run, study: Study, model: Classifier, rows: np.ndarray) -> State:
    """A classifier trained on the start images alone, with plain cross-entropy."""
    config, oracle = run.config, Oracle(study.train.labels)
    oracle.ask(rows)
    lesson = _lesson(
        study,
        "starting point",
        rows,
        oracle.labels_of(rows),
        run.torch_rng("starting point"),
        iterations=config.federation.initial_model_iterations,
    )
    recipe = config.training.replace(
        schedule="cosine",
        warmup=config.federation.initial_model_warmup,
        balanced_softmax=False,
        distillation_weight=0.0,
        proximal=0.0,
    )
    return training.fit_classifier(model, lesson, study.train.images, recipe, device=study.device).state


def _lesson(
    study: Study,
    who: str,
    rows: np.ndarray,
    labels: Labels,
    rng: torch.Generator,
    unlabelled: Sequence[int] = (),
    memory: State | None = None,
    span: tuple[int, int] | None = None,
    iterations: int | None = None,
    stop_at: float | None = None,
) -> training.ClassifierTask:
    """What a classifier's client trains on: rows of the training set, and the labels that the Oracle gave for them."""
    classes = labels.classes[:, 0] - 1
    counts = torch.bincount(classes, minlength=len(study.class_names))
    return training.ClassifierTask(
        rng,
        who,
        iterations,
        memory,
        span,
        rows=rows,
        classes=classes,
        counts=counts,
        unlabelled=np.asarray(unlabelled, dtype=np.int64),
        stop_at=stop_at,
    )


_OF_THE_VAE = (
    "vae_architecture",
    "vae_size",
    "latent",
    "kl_weight",
    "vae_iterations",
    "vae_batch",
    "vae_lr",
    "vae_images",
    "vae_refit",
    "texture_correction",
    "vae_weight",
    "standardise_by",
    "shortlist",
    "pseudo_above",
    "task_weight",
    "task_images",
    "diagnostic",
)
_OF_THE_SERVER = (
    "proximal",
    "max_update_ratio",
    "server_strategy",
    "server_lr",
    "server_momentum",
    "num_byzantine",
    "privacy",
    "clip_norm",
    "noise",
)
# What a starting point does not depend on: with all else equal, notebooks, schemes and optimiser settings share it.
_NOT_AT_THE_START = (
    "profile",
    "clients",
    "partition",
    "dirichlet_alpha",
    "missing_classes",
    "client_fraction",
    "aggregation_weights",
    "message_dtype",
    "cycles",
    "initial_labels",
    "query_size",
    "rounds",
    "iterations",
    "epochs",
    "extra_rounds",
    "round_lr_decay",
    "warmup",
    "optimizer_state",
    "first_pass_rounds",
    "chain_passes",
    "visit_fraction",
    "dropout_rate",
    "on_failure",
    "score_above",
    "nms_iou",
    "class_agnostic",
    "test_time_views",
    "no_detection_rule",
    "seconds_per_image",
    "seconds_per_box",
    "evaluate_every",
    "as_released",
    "held_out_images",
    "methods",
    "seeds",
    "schedule",
    "reset_each_cycle",
    "pool_subset_size",
    "cascade",
    "cascade_order",
    "quota",
    "side_seeds",
    "balanced_softmax",
    "distillation_weight",
    "initial_fraction",
    "query_fraction",
    "stacked",
    "local_only_epochs",
    *_OF_THE_VAE,
    *_OF_THE_SERVER,
)


def beginning(config: Config) -> Config:
    """The config with all that does not move the starting point at its default: what that is saved under."""
    return _apart_from(config, _NOT_AT_THE_START)


def _apart_from(config: Config, names: Sequence[str]) -> Config:
    """The config with these settings at their defaults: what is the same whatever they are is saved under it."""
    default = Config().flat()
    return config.replace(**{name: default[name] for name in names})


# --- who acts when ----------------------------------------------------------------------------------------------------


def plan(config: Config, method: str) -> list[tuple[int, int]]:
    """(cycle, round) of every round of a method, for `record.runs`.

    A chain asks for all labels in its first pass, so it has one cycle; its rounds are visits of one client each:
    `clients` of the first pass, the merge, then the visits of the later passes (chain-fedavg: rounds of all clients).
    """
    scheme, _ = scheme_of(method)
    if scheme not in CHAINS:
        return record.every_round(config)
    if config.federation.batch_norm == "local":
        raise ValueError(f"method {method!r} hands one model on: batch_norm='local' is for schemes that average")
    later = later_passes(config, scheme) * (1 if scheme == "chain-fedavg" else config.federation.clients)
    return [(0, round) for round in range(config.federation.clients + 1 + later)]


def later_passes(config: Config, scheme: str) -> int:
    """Passes (chain-fedavg: rounds) after the chain's first: as many as the config says, or as give every client as
    many gradient steps as the rounds of fedavg do. Those of the accumulating chain are shorter and more.
    """
    rounds = len(record.every_round(config))
    passes = config.federation.chain_passes or rounds - config.federation.first_pass_rounds
    if passes < 1:
        raise ValueError(
            f"the chain's first pass trains as long as first_pass={config.federation.first_pass_rounds} rounds, which leaves none of the "
            f"{rounds} (cycles x rounds + tail) for later passes: lower first_pass, or give passes"
        )
    if scheme != "accumulate":
        return passes
    visit = (
        max(1, round(config.federation.iterations * config.federation.visit_fraction)) / config.federation.iterations
        if config.federation.iterations
        else config.federation.visit_fraction
    )
    return max(1, round(passes / visit))  # the nearest whole number of passes


def whose_turn(run: record.Run, clients: Sequence[Client], cycle: int, round: int) -> Turn:
    """Who acts in this round, and how: see `Turn`. Device d of a chain's next pass goes on from the last one's."""
    config, count, scheme = run.config, len(clients), scheme_of(run.method)[0]
    if scheme not in CHAINS:
        visits, anneal = len(run.plan), round_factor(config, cycle, round)
        return Turn(
            tuple(clients), asks=round == 0, state=config.federation.optimizer_state, visits=visits, anneal=anneal
        )
    if round < count:
        return Turn((clients[round],), asks=True, first=True, times=config.federation.first_pass_rounds)
    if round == count:
        return Turn((), merge=True)
    done, passes = round - count - 1, later_passes(config, scheme)
    if scheme == "chain-fedavg":
        return Turn(
            tuple(clients),
            frozen=True,
            whole=done == 0,
            state=config.federation.optimizer_state,
            visits=passes,
            anneal=_fall(config, done, passes),
        )
    visitor, anneal = (clients[done % count],), _fall(config, done // count, passes)
    if scheme == "chain":
        visits = passes * (count if config.federation.optimizer_state == "travels" else 1)
        return Turn(
            visitor,
            frozen=True,
            whole=done < count,
            state=config.federation.optimizer_state,
            visits=visits,
            anneal=anneal,
        )
    return Turn(visitor, times=config.federation.visit_fraction, state="travels", visits=passes * count, anneal=anneal)


def _fall(config: Config, done: int, whole: int) -> float:
    """1 in the first of `whole` steps, `config.anneal` in the last, evenly in between."""
    return 1.0 if whole == 1 else 1 + (config.federation.round_lr_decay - 1) * done / (whole - 1)


def apart(run: record.Run, cycle: int) -> bool:
    """True while each client goes its own way: local-first, all cycles but the last (released code: 21 of 22)."""
    return scheme_of(run.method)[0] == "local-first" and cycle < run.config.query.cycles - 1


# --- the verbs of a round ---------------------------------------------------------------------------------------------


def look(
    config: Config,
    model: Detector,
    images: Images | CachedImages | Viewed,
    device: torch.device,
    score_above: float | None = None,
    crowd: bool = False,
) -> Detections:
    """Detections for scoring: confidence above 0.25, class-agnostic NMS at 0.45 (van Bommel 7.1, released code).

    score_above: in the place of the config's. crowd: all boxes before NMS, each with its best class.
    """
    options = {"test_time_views": yolo.VIEWS} if config.query.test_time_views else {}
    if crowd:
        options |= {"nms_iou": 1.0, "class_agnostic": True, "top": CROWD, "candidates": CROWD}
    else:
        options |= {"nms_iou": config.query.nms_iou, "class_agnostic": config.query.class_agnostic}
    above = config.query.score_above if score_above is None else score_above
    return training.predict(model, images, device=device, score_above=above, **options)


def _seen_as(
    study: Study, model: Detector, rows: np.ndarray, name: str, plain: Detections | None = None
) -> CachedImages | Viewed:
    """Training images of these rows as a view shows them; of a frozen backbone, their features."""
    images = study.train.images
    if not isinstance(images, CachedImages):
        return Viewed(images.take(rows), name, plain)
    if name == "cutout":  # it goes by what is detected, so nothing of it outlives a model
        changed = Viewed(study.photos[0].images.take(rows), name, plain)
        return training.cache_features(model, changed, device=study.device, mirrored=False)
    if name == "flip" and images.mirrored is not None:
        return replace(images, features=images.mirrored, mirrored=None).take(rows)
    if name not in study.views:
        changed = Viewed(study.photos[0].images, name)
        study.views[name] = training.cache_features(model, changed, device=study.device, mirrored=False)
    return study.views[name].take(rows)


@dataclass(frozen=True)
class Others:
    """Models beside the one that is asked: the client's own last one, its local-only one, and all clients' (M).

    coder: the client's VAE; noise: what it samples with, where it does (as_released). reference: detections on images
    that the server holds out.
    """

    own: Detector | Classifier | None = None
    alone: Classifier | None = None
    committee: Sequence[Classifier] = ()
    coder: VAE | None = None
    noise: torch.Generator | None = None
    reference: Detections | None = None


def see(
    study: Study,
    model: Detector | Classifier,
    pool: Pool,
    positions: np.ndarray,
    strategy: str,
    others: Others | None = None,
) -> Sight:
    """What a strategy may see of unlabelled images of a pool: what it needs and no more, labels least of all.

    CALD and HUA pooling count boxes from the scores of their released codes on (0.05, 0.3), the rest from the config's.
    """
    config, device, rows = study.config, study.device, pool.index[positions]
    needed = _home(strategy).needs(strategy)
    if not needed or not len(positions):
        return Sight(len(positions))
    images, above = study.train.images.take(rows), huale.SCORE_ABOVE.get(strategy, config.query.score_above)

    def look_at(what: Images | CachedImages | Viewed, **options) -> Detections:
        return look(config, model, what, device, above, **options)

    def scores_by(who: Classifier) -> torch.Tensor:
        return training.class_scores(who, images, device=device)

    seen: dict = {}
    others = others or Others()
    if {"detections", "consistency", "self_training", "doubt"} & needed:
        seen["detections"] = look_at(images)
    if "novelty" in needed or config.vae.shortlist and strategy in dual_vae.STRATEGIES:
        seen |= _as_the_coder_sees(study, pool, rows, others)
    for how in needed & set(dual_vae.TERMS.values()):
        hidden = pool.hidden_labels(rows) if how == "hidden" else None
        seen["usefulness"] = dual_vae.usefulness(
            how,
            config,
            model,
            images,
            study.photos[0].images.take(rows),
            seen.get("detections"),
            others.coder,
            hidden,
            device,
            others.noise,
        )
    if "reference" in needed:
        seen["reference"] = others.reference
    if "own" in needed and others.own is not None:
        seen["own"] = look(config, others.own, images, device, above)
    if "logits" in needed:
        seen["logits"] = scores_by(model)
    if "own_logits" in needed and others.own is not None:
        seen["own_logits"] = scores_by(others.own)
    if "committee" in needed and others.committee:
        seen["committee"] = torch.stack([scores_by(member) for member in others.committee])
    if "alone_logits" in needed and others.alone is not None:
        seen["alone_logits"] = scores_by(others.alone)
        seen["alone_embedding"] = training.embed(others.alone, images, device=device)
    if "flipped" in needed:
        found = look_at(_seen_as(study, model, rows, "flip"))
        back = flip_boxes(found.boxes, images.image_size[1]) * found.valid[..., None]
        sides = {k: v[..., [2, 1, 0, 3]] if k == "sides" else v for k, v in found.extra.items()}  # left is right there
        seen["flipped"] = replace(found, boxes=back, extra=sides)
    if "views" in needed:
        boxes, size = seen["detections"].boxes, images.image_size
        seen["views"] = {
            name: View(move_boxes(name, boxes, size), look_at(_seen_as(study, model, rows, name, seen["detections"])))
            for name in VIEWS
        }
    if "crowd" in needed:
        seen["crowd"] = look_at(images, crowd=True)
    if "embedding" in needed:
        seen["embedding"] = training.embed(model, images, device=device)
    if "known" in needed:
        known = pool.index[pool.labelled()]
        seen["known"] = training.embed(model, study.train.images.take(known), device=device)
    if "labelled" in needed:
        labels = pool.labels_of(pool.index[pool.labelled()])
        counted = torch.where(labels.ignore, 0, labels.classes).flatten()
        seen["labelled"] = torch.bincount(counted, minlength=len(study.class_names) + 1)[1:].numpy() / max(
            1, len(labels.classes)
        )
    return Sight(len(positions), **seen)


def _as_the_coder_sees(study: Study, pool: Pool, rows: np.ndarray, others: Others) -> dict:
    """What the client's VAE says of these images: fields of `Sight`."""
    config, photos = study.config, study.photos[0].images
    if others.coder is None:
        raise ValueError("a strategy that asks by novelty needs a VAE: give it as `others.coder`")
    options = {"device": study.device, "generator": others.noise}
    judged = training.vae_losses(others.coder, photos.take(rows), **options)
    seen = {"novelty": judged["reconstruction"]}
    if config.vae.texture_correction:
        seen["texture"] = dual_vae.texture(photos.take(rows), others.coder.size)
    if config.vae.shortlist:
        known = photos.take(pool.index[pool.labelled()])
        seen["latent"] = judged["latent"]
        seen["known_latent"] = training.vae_losses(others.coder, known, **options)["latent"]
    return seen


def _home(strategy: str):
    """The module that a way of asking belongs to: it says what that `needs` and how to `choose`."""
    return next((module for module in (huale, kafal, dual_vae) if strategy in module.STRATEGIES), sampling)


def needs(strategy: str) -> frozenset[str] | set[str]:
    """Fields of `Sight` that a way of asking looks at; none: it needs no model."""
    return _home(strategy.partition(".")[0]).needs(strategy.partition(".")[0])


def way_of_asking(run: record.Run, cycle: int) -> str:
    """The method's way of asking in this cycle: the first labels are random, but for a chain's (and as_released)."""
    config, (scheme, strategy) = run.config, scheme_of(run.method)
    first = cycle == 0 and scheme not in CHAINS
    if first and (config.model.classifier or strategy in dual_vae.STRATEGIES or not config.as_released):
        return "random"
    return strategy


def choose(config: Config, strategy: str, sight: Sight, k: int, rng: np.random.Generator) -> Choice:
    """The k images that a strategy asks next, with the config's settings for it."""
    if strategy in huale.STRATEGIES:
        return huale.choose(
            strategy,
            sight,
            k,
            rng,
            config.query.no_detection_rule,
            sizes=config.query.cascade,
            order=config.query.cascade_order,
            quota=config.query.quota,
        )
    if strategy in dual_vae.STRATEGIES:
        return dual_vae.choose(
            strategy,
            sight,
            k,
            rng,
            config.query.no_detection_rule,
            part=config.vae.vae_weight,
            how=config.vae.standardise_by,
            shortlist=config.vae.shortlist,
        )
    return _home(strategy).choose(strategy, sight, k, rng, config.query.no_detection_rule)


def ask(
    run: record.Run,
    study: Study,
    model: Detector | Classifier,
    client: Client,
    cycle: int,
    clients: Sequence[Client] = (),
) -> None:
    """Score the client's unlabelled images, choose, and have the Oracle label them.

    The first labels are random (as_released: scored by the starting point); a chain's first visit scores all that it
    asks for. A client with a model of its own scores with that. The centralised reference asks what its method asked,
    in the same cycles. A strategy's name says which model is asked: "entropy" the global one, as the client knows it,
    "entropy.local" the client's own after its latest training, "entropy.alone" one that it trains on its own labels
    for the purpose. clients: all of them, for a strategy that asks everyone's models.
    """
    scheme, strategy = scheme_of(run.method)
    if scheme == CENTRALISED and strategy != "random":
        _ask_again(run, client, cycle, strategy)
        return
    picked = pick(run, study, model, client, cycle, clients)
    if len(picked.positions):
        client.pool.ask(picked.positions, cycle, picked.why)


@dataclass(frozen=True)
class Picked:
    """What a client would have labelled next: positions of its pool and the score of each (NaN: it had none).

    scores: of everything that was looked at (NaN: not scored), in the order of the pool; detected: (C,) how many boxes
    of each class the model sees there, where the strategy looks at boxes.
    """

    positions: np.ndarray
    why: np.ndarray
    scores: np.ndarray
    detected: np.ndarray | None = None


def pick(
    run: record.Run,
    study: Study,
    model: Detector | Classifier,
    client: Client,
    cycle: int,
    clients: Sequence[Client] = (),
) -> Picked:
    """The first half of `ask`: score the client's unlabelled images and choose; nobody is asked yet."""
    config, strategy = run.config, way_of_asking(run, cycle)
    count = config.labels_needed() if scheme_of(run.method)[0] in CHAINS else to_ask(config, client.pool, cycle)
    if count == 0:  # all is labelled
        return Picked(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))
    strategy, _, asked = strategy.partition(".")
    if client.known:
        model = _with(model, client.known)
    if client.own:
        model = detectors.clone(model)
        model.load_state_dict(client.own, strict=False)
    if config.federation.message_dtype != "fp32":  # it looks with what it received
        model = _with(
            model, federation.unpack(broadcast(model, config.federation.batch_norm, config.federation.message_dtype))
        )
    waiting = client.pool.unlabelled()
    rng = run.rng("ask", client.name, cycle)
    if (
        config.query.pool_subset_size
        and _home(strategy).needs(strategy)
        and len(waiting) > config.query.pool_subset_size
    ):
        waiting = np.sort(
            run.rng("looked at", client.name, cycle).permutation(waiting)[: max(config.query.pool_subset_size, count)]
        )
    others = _others(run, study, model, client, cycle, strategy, asked, clients)
    model = {"local": others.own, "alone": others.alone}.get(asked) or model
    sight = see(replace(study, config=config), model, client.pool, waiting, strategy, others)
    choice = choose(config, strategy, sight, count, rng)
    scores, detected = np.where(choice.scores.scored, choice.scores.values, np.nan), None
    if sight.detections is not None:
        found = sight.detections
        detected = torch.bincount(found.labels[found.valid].flatten(), minlength=len(study.class_names) + 1)[1:].numpy()
    return Picked(waiting[choice.positions], scores[choice.positions], scores, detected)


def _with(model: Detector | Classifier, *states: State) -> Detector | Classifier:
    """A copy of the model with these weights."""
    copied = detectors.clone(model)
    for state in states:
        copied.load_state_dict(state, strict=False)
    return copied


def _others(
    run: record.Run,
    study: Study,
    model: Detector | Classifier,
    client: Client,
    cycle: int,
    strategy: str,
    asked: str,
    clients: Sequence[Client],
) -> Others:
    """The models that a strategy needs beside the global one. Those of other clients are sent, and billed."""
    needed, own, alone, committee, coder = _home(strategy).needs(strategy), None, None, [], None
    if client.last and (asked == "local" or {"own", "own_logits"} & needed):
        own = _with(model, client.last, client.home)
    if asked == "alone" or "alone_logits" in needed:
        alone = local_only(run, study, client, cycle)
    if "committee" in needed:
        voting = [c for c in clients or (client,) if c.last]
        client.heard = sum(
            len(federation.pack(c.last, run.config.federation.message_dtype)) for c in voting if c is not client
        )
        committee = [_with(model, c.last) for c in voting]
    if strategy in dual_vae.STRATEGIES and ({"novelty", "consistency"} & needed or run.config.vae.shortlist):
        coder = vae_of(run, study, model, client, cycle)
    reference = None
    if "reference" in needed:
        rows = study.held_out(run.seed)
        reference = look(run.config, model, study.train.images.take(rows), study.device)
    return Others(own, alone, committee, coder, run.torch_rng("vae noise", client.name, cycle), reference)


def vae_of(run: record.Run, study: Study, model: Detector, client: Client, cycle: int) -> VAE:
    """This client's VAE in this cycle, trained on its labelled images (or all of its own), in pixels."""
    config, pool, photos = run.config, client.pool, study.photos[0].images
    coder = dual_vae.new_vae(config, run.torch_rng("vae weights"))
    if client.coder and not config.vae.vae_refit:
        coder.load_state_dict(client.coder)
    labelled = pool.index[pool.labelled()]
    dual_vae.train_vae(
        config,
        coder,
        photos,
        pool.index if config.vae.vae_images == "all" else labelled,
        run.torch_rng("vae", client.name, cycle),
        model,
        labelled,
        pool.labels_of(labelled),
        study.device,
        client.name,
    )
    if not config.vae.vae_refit:
        client.coder = {name: value.detach().cpu().clone() for name, value in coder.state_dict().items()}
    return coder


def local_only(run: record.Run, study: Study, client: Client, cycle: int) -> Classifier:
    """A model trained on the client's labels alone, from new weights that all clients of a cycle share (LoGo, 9.1).

    Plain cross-entropy, at most `alone_epochs` passes, until 99 % of the training images are right; the learning rate
    falls to a tenth after three quarters of them (as_released: after 37 batches, as the released code steps its
    schedule once a batch).
    """
    config, pool = run.config, client.pool
    model = new_detector(config, len(study.class_names), run.torch_rng("local-only weights", cycle))
    rows = pool.index[pool.labelled()]
    rng = run.torch_rng("local-only", client.name, cycle)
    lesson = _lesson(study, client.name, rows, pool.labels_of(rows), rng, stop_at=0.99)
    recipe = config.training.replace(
        epochs=config.query.local_only_epochs,
        schedule="step",
        step_at=(0.75,),
        warmup=0,
        balanced_softmax=False,
        distillation_weight=0.0,
        proximal=0.0,
    )
    if config.as_released:
        recipe = recipe.replace(step_at=(37 / lesson.steps(recipe),))
    training.fit_classifier(model, lesson, study.train.images, recipe, device=study.device)
    return model


def _ask_again(run: record.Run, client: Client, cycle: int, method: str) -> None:
    """Ask what `method` asked of this client in this cycle, on the same seed: its run must be finished."""
    if record.missing(run.config, run.notebook, [method], [run.seed], run.root):
        raise ValueError(f"{run} gets the labels of method {method!r}: run that first (put it before in `methods`)")
    rows = record.queries(run.config, run.notebook, root=run.root, methods=[method], seeds=[run.seed])
    client.pool.replay(rows[rows["cycle"] == cycle].to_dict("records"))


def broadcast(model: Detector, batch_norm: str, wire: str) -> bytes:
    """The message that carries the global model to one client."""
    return federation.pack(federation.state_of(model, federation.sent_keys(model, batch_norm)), wire)


# How clients that are elsewhere do their part of a round: those who train, the message to them, and the turn -> what
# each of them sent, by name, or why it sent nothing.
Send = Callable[[Sequence[Client], bytes, Turn], dict[str, "Update | ClientLost"]]


def train(
    run: record.Run,
    study: Study,
    model: Detector,
    clients: Sequence[Client],
    cycle: int,
    round: int,
    send: Send | None = None,
) -> list[Update]:
    """One round: the clients whose turn it is train from the global model (or their own), each on its own labels.

    Method 'centralised' trains once on everyone's labels, for as many gradient steps as the clients take together. A
    client without labels sends nothing, nor (with on_failure='skip') does one whose update is lost, whose training
    diverges, or whose update is not fit to be averaged (`federation.screen`); its `status` says why. send: how it is
    done where clients are not in this process (`flower`).
    """
    config = run.config
    if config.federation.reset_each_cycle and cycle > 0 and round == 0:
        _remember_global(run, model, clients)
        model.load_state_dict(starting_point(run, study, study.start_rows(run.seed)), strict=False)
        for client in clients:
            client.memory, client.home, client.own = {}, {}, {}
    for client in clients:
        client.status, client.received = "", 0
    if config.model.classifier:
        return _train_together(run, study, model, clients, cycle, round)
    if scheme_of(run.method)[0] == CENTRALISED:
        return _train_on_one_node(run, study, model, clients, cycle, round)
    turn = whose_turn(run, clients, cycle, round)
    if not turn.clients:
        return []
    message = message_of(config, model, turn)
    names = federation.take_part(
        [c.name for c in turn.clients], config.federation.client_fraction, run.rng("take part", cycle, round)
    )
    unasked = (
        config.federation.reset_each_cycle
        and not config.as_released
        and config.federation.batch_norm != "local"
        and (cycle, round) == (0, 0)
    )
    shared = unasked and scheme_of(run.method)[0] == "fedavg" and send is None
    sent: dict[str, Update | ClientLost | training.TrainingDiverged] = {}
    here = []
    for client in turn.clients:
        if client.name not in names:
            continue
        if len(client.pool.labelled()) == 0:
            client.status = "no labels"
            continue
        luggage = len(federation.pack(client.memory)) if turn.state == "travels" and client.memory else 0
        client.received = 0 if client.own else len(message) + luggage
        if (
            config.federation.dropout_rate
            and not apart(run, cycle)
            and run.rng("lost", client.name, cycle, round).random() < config.federation.dropout_rate
        ):
            sent[client.name] = ClientLost(
                f"client {client.name}: its update did not arrive in cycle {cycle}, round {round}"
            )
        else:
            here.append(client)
    if send is not None:
        sent |= send(here, message, turn) if here else {}
    else:
        scratch = detectors.clone(model)
        for client in here:
            if config.federation.on_failure == "stop":
                _stop_at_failures(sent)

            def work(client=client) -> Update:
                return train_one(run, study, scratch, client, message, turn, cycle, round)

            try:
                sent[client.name] = (
                    _first_updates(run, client.name, lambda work=work: [work()])[0] if shared else work()
                )
            except training.TrainingDiverged as error:
                sent[client.name] = error
    if send is not None or config.server.max_update_ratio:
        before = federation.unpack(message)
        expected = {key: before[key] for key in federation.sent_keys(model, config.federation.batch_norm)}
        _screen(config, sent, expected, cycle, round)
    if config.federation.on_failure == "stop":
        _stop_at_failures(sent)
    updates = []
    for client in turn.clients:
        result = sent.get(client.name)
        if isinstance(result, Exception):
            client.status = result.status if isinstance(result, ClientLost) else "diverged"
        elif result is not None:
            updates.append(result)
            if turn.first:
                client.own = federation.unpack(result.payload)
            if compares(run.method) and result.payload:
                client.last = federation.unpack(result.payload)
    return updates


def _stop_at_failures(sent: dict[str, Update | Exception]) -> None:
    for result in sent.values():
        if isinstance(result, Exception):
            raise type(result)(f"{result}; on_failure='skip' goes on without it") from result


def _screen(config: Config, sent: dict[str, Update | Exception], before: State, cycle: int, round: int) -> None:
    """Puts an error in the place of each update that is not fit to be averaged."""
    updates = [result for result in sent.values() if isinstance(result, Update)]
    if any(update.payload for update in updates):  # of a secure sum there is nothing to look at
        for name, reason in federation.screen(updates, before, config.server.max_update_ratio)[1].items():
            sent[name] = ClientLost(
                f"client {name}: its update in cycle {cycle}, round {round} is {reason}", status=reason
            )


def message_of(config: Config, model: Detector, turn: Turn) -> bytes:
    """What is sent to the clients of a turn: the model, or its head. Freezes the backbone where the turn does."""
    if not turn.frozen:
        return broadcast(model, config.federation.batch_norm, config.federation.message_dtype)
    if turn.whole and not config.model.frozen:
        model.unfreeze_backbone()
    message = broadcast(model, config.federation.batch_norm, config.federation.message_dtype)
    model.freeze_backbone()
    return message if turn.whole else broadcast(model, config.federation.batch_norm, config.federation.message_dtype)


def train_one(
    run: record.Run, study: Study, scratch: Detector, client: Client, message: bytes, turn: Turn, cycle: int, round: int
) -> Update:
    """One client's part of a round: train from the message (or from its own weights) on its own labels.

    scratch: a detector of the right shape, whatever it holds; for a turn that trains the head, its backbone is frozen.
    """
    config, keeps = run.config, turn.state != "restart"
    recipe, iterations = _recipe(config, turn)
    images, labels = client.pool.training_set()
    return federation.train_client(
        scratch,
        federation.pack(client.own) if client.own else message,
        images,
        labels,
        recipe,
        run.torch_rng("train", client.name, cycle, round),
        client.name,
        iterations,
        "fp32" if apart(run, cycle) else config.federation.message_dtype,
        config.federation.batch_norm,
        client.home,
        study.device,
        memory=client.memory if keeps else None,
        travels=turn.state == "travels",
        span=_span(config, turn, client, recipe, iterations) if keeps else None,
    )


def compares(method: str) -> bool:
    """True if a way of asking looks at clients' own models, which are then kept."""
    strategy, _, asked = scheme_of(method)[1].partition(".")
    if "+" in strategy:  # the centralised reference asks what another method asked
        return False
    return asked == "local" or bool({"own", "own_logits", "committee"} & _home(strategy).needs(strategy))


def _train_together(
    run: record.Run, study: Study, model: Classifier, clients: Sequence[Client], cycle: int, round: int
) -> list[Update]:
    """One round of a classifier: all clients that take part train at once, from the global model.

    With `compensation`, from a cycle's second round on, each also learns from the global model on its unlabelled
    images (KAFAL, 4.2). as_released: everyone takes part in a cycle's last round, whatever `fraction` says, and the
    "unlabelled" images are those that were unlabelled in the first cycle.
    """
    config, last = run.config, (cycle, round + 1) not in run.plan
    names = federation.take_part(
        [c.name for c in clients], config.federation.client_fraction, run.rng("take part", cycle, round)
    )
    if config.as_released and last:
        names = [c.name for c in clients]
    message = broadcast(model, config.federation.batch_norm, config.federation.message_dtype)
    here, lessons = [], []
    for client in sorted(clients, key=lambda client: client.name):  # who stands where in a stack moves the last bits
        if client.name not in names:
            continue
        if len(client.pool.labelled()) == 0:
            client.status = "no labels"
            continue
        client.received = len(message)
        if (
            config.federation.dropout_rate
            and run.rng("lost", client.name, cycle, round).random() < config.federation.dropout_rate
        ):
            if config.federation.on_failure == "stop":
                raise ClientLost(
                    f"client {client.name}: its update did not arrive in cycle {cycle}, round {round}; "
                    "on_failure='skip' goes on without it"
                )
            client.status = "lost"
            continue
        here.append(client)
        lessons.append(_lesson_of(run, study, client, cycle, round))
    recipe, _ = _recipe(config, Turn((), anneal=round_factor(config, cycle, round)))

    def work() -> list[Update | training.TrainingDiverged]:
        return federation.train_together(
            model,
            message,
            lessons,
            study.train.images,
            recipe,
            model if round else None,
            config.federation.message_dtype,
            study.device,
            config.as_released,
            config.federation.stacked,
        )

    shared = (
        config.federation.reset_each_cycle
        and cycle == 0
        and not config.federation.dropout_rate
        and config.federation.on_failure == "stop"
    )
    sent = _first_updates(run, f"round-{round}", work, here) if shared else work()
    updates = []
    for client, update in zip(here, sent, strict=True):
        if isinstance(update, training.TrainingDiverged):
            if config.federation.on_failure == "stop":
                raise type(update)(f"{update}; on_failure='skip' goes on without it")
            client.status = "diverged"
            continue
        if compares(run.method):
            client.last = federation.unpack(update.payload)
        updates.append(update)
    return updates


def _lesson_of(run: record.Run, study: Study, client: Client, cycle: int, round: int) -> training.ClassifierTask:
    """This client's lesson in this round: its labels, its unlabelled images, and what its optimiser remembers."""
    config, pool = run.config, client.pool
    rows = pool.index[pool.labelled()]
    unlabelled = pool.index[pool.asked_in != 0] if config.as_released else pool.index[pool.unlabelled()]
    memory, span = None, None
    if config.federation.optimizer_state == "client":
        memory = client.memory
        each = config.federation.iterations or config.training.epochs * math.ceil(len(rows) / config.training.batch)
        here = [r for c, r in run.plan if c == cycle] if config.federation.reset_each_cycle else run.plan
        span = (int(memory.get(training.STEPS, 0)), each * len(here))
    return _lesson(
        study,
        client.name,
        rows,
        pool.labels_of(rows),
        run.torch_rng("train", client.name, cycle, round),
        unlabelled,
        memory,
        span,
        config.federation.iterations or None,
    )


# What the first training of a run does not depend on, where the first labels are random.
_NOT_AT_FIRST = (
    "profile",
    "cycles",
    "query_size",
    "score_above",
    "nms_iou",
    "class_agnostic",
    "test_time_views",
    "no_detection_rule",
    "pool_subset_size",
    "cascade",
    "cascade_order",
    "quota",
    "seconds_per_image",
    "seconds_per_box",
    "evaluate_every",
    "on_failure",
    "methods",
    "seeds",
    "side_seeds",
    "query_fraction",
    "local_only_epochs",
    *_OF_THE_VAE,
)


def _first_updates(run: record.Run, what: str | int, work: Callable[[], list[Update]], clients=()) -> list[Update]:
    """What clients send in cycle 0 of runs that begin afresh: trained once for all ways of asking, then read.

    Until something has been chosen, the methods of a seed are one and the same run; on a GPU, where two trainings never
    are, this is what makes them a pair. clients: whose optimisers' memory goes with it.
    """

    def make() -> dict:
        sent = []
        for update in work():
            if isinstance(update, Exception):
                raise update
            payload = torch.frombuffer(bytearray(update.payload), dtype=torch.uint8)
            kept = {f.name: getattr(update, f.name) for f in fields(update) if f.name != "memory"}
            sent.append({**kept, "payload": payload})
        return {"sent": sent, "memory": {client.name: client.memory for client in clients}}

    known = record.shared(
        _apart_from(run.config, _NOT_AT_FIRST), "shared", run.seed, f"first-updates-{what}", make, root=run.root
    )
    for client in clients:
        client.memory = known["memory"][client.name]
    return [Update(**{**sent, "payload": sent["payload"].numpy().tobytes()}) for sent in known["sent"]]


class ClientLost(RuntimeError):
    """A client's update did not arrive, or cannot be used; names the client, the cycle and the round.

    status: the same in a word or two, for the record.
    """

    def __init__(self, message: str, status: str = "lost"):
        super().__init__(message)
        self.status = status


def _recipe(config: Config, turn: Turn) -> tuple[TrainingConfig, int | None]:
    """How a client trains in this turn, and for how many steps (None: in epochs)."""
    recipe = config.training.replace(
        lr=config.training.lr * turn.anneal, epochs=max(1, round(config.training.epochs * turn.times))
    )
    if (
        turn.first and recipe.schedule == "constant" and config.federation.round_lr_decay < 1
    ):  # one long call in the place of many rounds: it anneals within itself
        recipe = recipe.replace(schedule="cosine", final_lr=config.federation.round_lr_decay)
    return recipe, max(1, round(config.federation.iterations * turn.times)) if config.federation.iterations else None


def _span(
    config: Config, turn: Turn, client: Client, recipe: TrainingConfig, iterations: int | None
) -> tuple[int, int]:
    """Where an optimiser whose state lives on stands: steps so far, and those that it will take in all.

    In epochs, the number of labels at the end counts: the schedule must not be over before the client is.
    """
    each = iterations or recipe.epochs * math.ceil(config.labels_needed() / recipe.batch)
    return int(client.memory.get(training.STEPS, 0)), each * turn.visits


def _train_on_one_node(
    run: record.Run, study: Study, model: Detector, clients: Sequence[Client], cycle: int, round: int
) -> list[Update]:
    config, node, turn = run.config, clients[0], whose_turn(run, clients, cycle, round)
    images, labels = everyone(study, clients)
    recipe, iterations = _recipe(config, turn)
    keeps = config.federation.optimizer_state != "restart"
    before, whole = _span(config, turn, node, recipe, iterations)
    return [
        federation.train_client(
            detectors.clone(model),
            broadcast(model, config.federation.batch_norm, "fp32"),
            images,
            labels,
            recipe.replace(proximal=0.0),
            run.torch_rng("train", CENTRALISED, cycle, round),
            CENTRALISED,
            None if iterations is None else iterations * len(clients),
            device=study.device,
            memory=node.memory if keeps else None,
            span=(before, whole * len(clients)) if keeps else None,
        )
    ]


def merge(
    run: record.Run,
    model: Detector,
    clients: Sequence[Client],
    updates: Sequence[Update],
    average: Callable[[Sequence[Update]], State] | None = None,
) -> None:
    """The global model becomes the updates' average (of one update: that one); without any it stays as it was.

    Optimisers' states that travelled are averaged too and handed to every client. as_released: equal parts in whole
    percent, whatever the clients hold. average: another way of making one model of the updates (`flower.Server`).
    """
    config = run.config
    if average is None and (
        config.server.privacy != "none" or config.server.server_strategy not in ("fedavg", "fedprox")
    ):
        raise ValueError(
            f"server={config.server.server_strategy!r} with privacy={config.server.privacy!r} needs Flower: use flower.merge"
        )
    if not updates:
        return
    merged = {update.client for update in updates}
    _remember_global(run, model, [client for client in clients if client.name not in merged])
    if average is not None:
        state = average(updates)
    elif run.config.as_released and len(updates) > 1 and not run.config.model.classifier:
        ordered = sorted(updates, key=lambda update: update.client)
        state = federation.weighted(ordered, federation.percent_shares(len(ordered)))
    else:
        state = federation.average(updates, run.config.federation.aggregation_weights)
    model.load_state_dict(state, strict=False)
    travelling = federation.average_memory(updates, run.config.federation.aggregation_weights)
    for client in clients:
        if client.name in merged:
            client.known = {}
            if scheme_of(run.method)[0] == "local-first":
                client.own = {}  # who sent nothing goes on alone until it does
        if travelling:
            client.memory = dict(travelling)


def _remember_global(run: record.Run, model: Detector | Classifier, clients: Sequence[Client]) -> None:
    """These clients miss what comes next: the global model that they know is this one, or an older one."""
    if run.config.model.classifier or compares(run.method):
        for client in clients:
            client.known = client.known or federation.state_of(model, federation.sent_keys(model))


def keep(clients: Sequence[Client], updates: Sequence[Update]) -> None:
    """Nobody merges: each client that trained goes on from its own weights."""
    by_name = {client.name: client for client in clients}
    for update in updates:
        by_name[update.client].own = federation.unpack(update.payload)


def merge_by_class(run: record.Run, study: Study, model: Detector, clients: Sequence[Client]) -> dict[str, float]:
    """The chain's merge after its first pass: each class votes for the client whose model detects it best (7.2).

    The models are judged, class by class at AP50, on the images that the server holds out (`merge_images`), or if
    there are none on the start images, which all of them have seen; a server without a labelled image counts all
    alike. as_released: on the test set, as the released code does. Returns each client's part; clients that sent
    nothing have none.
    """
    sent = [client for client in clients if client.own]
    if not sent:
        raise ValueError(f"{run}: no client came through the chain's first pass, so there is nothing to merge")
    parts = federation.class_wise_shares(_judged_apart(run, study, model, sent))
    merged = federation.weighted_states([(client.name, client.own) for client in sent], parts)
    model.load_state_dict(merged, strict=False)
    for client in clients:
        client.own, client.status, client.received = {}, "", 0
    return dict(zip((client.name for client in sent), parts.tolist(), strict=True))


def _judged_apart(run: record.Run, study: Study, model: Detector, sent: Sequence[Client]) -> np.ndarray:
    """(M, C) AP50 of each class by each client's own model; NaN where it cannot be judged."""
    config = run.config
    if config.as_released:
        judges = study.test
    elif config.federation.held_out_images or config.federation.initial_model_images:
        rows = study.held_out(run.seed) if config.federation.held_out_images else study.start_rows(run.seed)
        judges = study.train.take(rows)
    else:
        return np.full((len(sent), len(study.class_names)), math.nan)
    scratch = detectors.clone(model)
    table = []
    for client in sent:
        scratch.load_state_dict(client.own, strict=False)
        found = training.predict(scratch, judges.images, device=study.device)
        judged = metrics.evaluate(found, judges.labels, study.class_names)
        table.append([judged.get(f"ap50/{name}", math.nan) for name in study.class_names])
    return np.array(table, dtype=float)


def round_factor(config: Config, cycle: int, round: int) -> float:
    """Factor on the learning rate in this round of a cycle: 1 in the first, `config.anneal` in the last.

    The schedule belongs to the server's loop, so it does not start again inside each client's call of `fit`. The last
    cycle has the rounds of the tail as well.
    """
    return _fall(
        config,
        round,
        config.federation.rounds + (config.federation.extra_rounds if cycle == config.query.cycles - 1 else 0),
    )


def everyone(study: Study, clients: Sequence[Client]) -> tuple[Images | CachedImages, Labels]:
    """The labelled images of all clients on one node, in the order of the training set."""
    rows = np.sort(np.concatenate([c.pool.index[c.pool.labelled()] for c in clients]))
    return study.train.images.take(rows), clients[0].pool.labels_of(rows)


def judge(study: Study, model: Detector, clients: Sequence[Client] = (), alone: bool = False) -> dict[str, float]:
    """Metrics on the test set; where clients hold BatchNorm statistics (alone: weights) of their own, the mean over
    their models. Of a classifier also by each client's mix of classes.
    """
    states = [state for client in clients if (state := {**(client.own if alone else {}), **client.home})]
    if states:
        each = []
        for state in states:
            own = detectors.clone(model)
            own.load_state_dict(state, strict=False)
            each.append(judge(study, own))
        return {key: float(np.mean([found[key] for found in each])) for key in each[0]}
    if isinstance(model, Classifier):
        scores = training.class_scores(model, study.test.images, device=study.device)
        held = study.train.class_counts().numpy()
        mixes = np.stack([held[client.pool.index].sum(axis=0) for client in clients]) if clients else None
        return metrics.accuracy(scores, study.test.labels.classes[:, 0].cpu() - 1, study.class_names, mixes)
    found = training.predict(model, study.test.images, device=study.device)
    return metrics.evaluate(found, study.test.labels, study.class_names)


def commit(
    run: record.Run,
    study: Study,
    model: Detector,
    clients: Sequence[Client],
    updates: Sequence[Update],
    cycle: int,
    round: int,
    more: dict | None = None,
) -> dict:
    """End of a round: judge (after a cycle's last round, or as the config says), write rows, save the resume point.

    more: what else the resume point keeps.

    A client that sent nothing has a row that says why. Of a chain, each visit of the first pass, the merge, the end of
    every later pass and the rounds of chain-fedavg are judged.
    """
    config = run.config
    last = (cycle, round + 1) not in run.plan
    judged = last or (config.evaluate_every > 0 and (round + 1) % config.evaluate_every == 0)
    turn, chained = whose_turn(run, clients, cycle, round), scheme_of(run.method)[0] in CHAINS
    if chained:
        judged = last or turn.first or len(turn.clients) != 1 or turn.clients[0] is clients[-1]
    traffic = _traffic(run, clients, updates, cycle, round, turn)
    where = {"cycle": cycle, "round": round}
    by_name = {c.name: c for c in clients}
    rows = []
    for update in updates:
        if update.client in by_name:
            bill = by_name[update.client].pool.bill()
            up, down = traffic[update.client]
            rows.append(
                {
                    **where,
                    "client": update.client,
                    "images": bill.images,
                    "boxes": bill.boxes,
                    "seconds": bill.seconds,
                    "bytes_up": up,
                    "bytes_down": down,
                    "loss": update.loss,
                    "steps": update.steps,
                    **by_name[update.client].judged,
                }
            )
    for client in clients:
        if client.status:
            bill = client.pool.bill()
            rows.append(
                {
                    **where,
                    "client": client.name,
                    "images": bill.images,
                    "boxes": bill.boxes,
                    "seconds": bill.seconds,
                    "bytes_up": 0,
                    "bytes_down": traffic[client.name][1],
                    "steps": 0,
                    "status": client.status,
                    **client.judged,
                }
            )
    bill = total(c.pool.bill() for c in clients)
    server = {
        **where,
        "client": "server",
        "images": bill.images,
        "boxes": bill.boxes,
        "seconds": bill.seconds,
        "bytes_up": sum(up for up, _ in traffic.values()),
        "bytes_down": sum(down for _, down in traffic.values()),
        "loss": float(np.mean([u.loss for u in updates])) if updates else None,
        "steps": sum(u.steps for u in updates),
        **(judge(study, model, clients, apart(run, cycle)) if judged else {}),
    }
    asked = [row for c in turn.clients if turn.asks for row in c.pool.asked_rows(cycle)]
    kept = model.exchanged() if config.model.frozen else list(model.state_dict())
    state = {
        "model": federation.state_of(model, kept),
        **{what: {c.name: getattr(c, what) for c in clients if getattr(c, what)} for what in KEPT},
        **(more or {}),
    }
    run.commit(cycle, round, [*rows, server], asked, state)
    return server


def _traffic(
    run: record.Run, clients: Sequence[Client], updates: Sequence[Update], cycle: int, round: int, turn: Turn
) -> dict[str, tuple[int, int]]:
    """Bytes that each client sent and received in this round: packed messages, as they are.

    One node sends nothing. Apart, clients receive the starting point once, and send when all labels are there. A visit
    of a chain receives the model from the visitor before (one hop) and, in the first pass, sends its own to the server
    for the merge; the last visitor of all hands the result in.
    """
    scheme = scheme_of(run.method)[0]
    if scheme == CENTRALISED or len(clients) == 1:
        return {name: (0, 0) for name in [*(u.client for u in updates), *(c.name for c in clients)]}
    visit = scheme in CHAINS and len(turn.clients) == 1
    hop = visit and not turn.first and (cycle, round + 1) in run.plan
    silent = hop or apart(run, cycle)  # a hop is counted when it arrives
    sent = {update.client: update.bytes for update in updates}
    heard = {c.name: c.heard if round == 0 else 0 for c in clients}  # asking comes before a cycle's first round
    return {c.name: (0 if silent else sent.get(c.name, 0), c.received + heard[c.name]) for c in clients}


# --- what the paper sends ---------------------------------------------------------------------------------------------


# The schemes as `results/paper/van-bommel.csv` names them, all with SUM.
PAPER_SCHEMES = {
    "FedAvg": "sum",
    "local first": "local-first+sum",
    "chain": "chain+sum",
    "chain then FedAvg": "chain-fedavg+sum",
    "accumulating chain": "accumulate+sum",
    "centralised": "centralised+chain+sum",
}
PAPER_MEGABYTES = {"full": 14.017, "head": 5.7, "optimiser": 5.241}  # section 8: FP16 checkpoint, head, state


def paper_megabytes(
    scheme: str,
    step: int,
    clients: int = 9,
    merge_at: int = 21,
    full: float = PAPER_MEGABYTES["full"],
    head: float = PAPER_MEGABYTES["head"],
    optimiser: float = PAPER_MEGABYTES["optimiser"],
) -> float:
    """MB sent by all clients, both ways, after a step of a scheme: the released analysis' formulas (section 8).

    step: fedavg and local-first: the communication round, from 0; chains: the visit of the first pass, from 0 to
    clients - 1, then clients for the merge, and from clients + 1 on the later visits (chain-fedavg: rounds). merge_at:
    the round in which local-first merges for the first time. full, head, optimiser: MB of the model, of what is left
    of it when the backbone is frozen, and of the optimiser's state. The formulas count two transfers for each hop of a
    chain, which needs one, and neither the starting point nor labels.
    """
    if step < 0 or clients < 1:
        raise ValueError(f"step must be >= 0 and clients >= 1, got {step} and {clients}")
    around = 2 * full * clients
    if scheme == CENTRALISED:
        return 0.0
    if scheme == "fedavg":
        return (step + 1) * around
    if scheme == "local-first":
        return max(1, step - merge_at + 1) * around
    if scheme not in CHAINS:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    if step <= clients:
        return min(step + 1, clients) * 2 * full
    later = step - clients
    each = {"chain": 2 * head, "chain-fedavg": 2 * head * clients, "accumulate": 2 * (full + optimiser)}[scheme]
    return around + later * each


def sent_sizes(study: Study) -> dict[str, float]:
    """MB of one packed message of this study's detector: 'full', 'head' (backbone frozen), 'optimiser' (its state)."""
    config = study.config
    model = new_detector(config, max(1, len(study.class_names)), torch.Generator().manual_seed(0))
    full = len(broadcast(model, config.federation.batch_norm, config.federation.message_dtype))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    moments = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}[config.training.optimizer]
    memory = {
        f"{moment}:{name}": torch.tensor(0.0) if moment == "step" else p for name, p in trained for moment in moments
    }
    memory[training.STEPS] = torch.tensor(0)
    model.freeze_backbone()
    head = len(broadcast(model, config.federation.batch_norm, config.federation.message_dtype))
    return {"full": full / 1e6, "head": head / 1e6, "optimiser": len(federation.pack(memory)) / 1e6}


def traffic_table(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """The bytes of every judged round beside the paper's formula, for our message sizes and for the paper's own.

    table: of `record.table`. Columns: method, seed, step, ap50, metered (MB, packed messages, both ways, so far),
    formula (the paper's, with this study's message sizes), paper_sizes (the same formula with the paper's sizes).
    """
    config, sizes = study.config, sent_sizes(study)
    merge_at = (config.query.cycles - 1) * config.federation.rounds
    rows = []
    server = table[table["client"].astype(str) == "server"].sort_values(["method", "seed", "cycle", "round"])
    for (method, seed), run in server.groupby(["method", "seed"], sort=False):
        scheme, _ = scheme_of(method)
        so_far = (run["bytes_up"] + run["bytes_down"]).cumsum() / 1e6
        for step, (metered, ap50) in enumerate(zip(so_far, run["ap50"], strict=True)):
            given = {"clients": config.federation.clients, "merge_at": merge_at}
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "step": step,
                    "ap50": ap50,
                    "metered": metered,
                    "formula": paper_megabytes(scheme, step, **given, **sizes),
                    "paper_sizes": paper_megabytes(scheme, step, **given, **PAPER_MEGABYTES),
                }
            )
    return pd.DataFrame(rows)


def optimiser_ablation(config: Config) -> dict[str, Config]:
    """The same experiment with three fates of the optimiser between rounds; the first is the released code's.

    Its warm-up of 1,000 iterations begins again in every local call of at most 280; here it is as many times longer
    than a round as there, so that it never ends either. Kept at the client, it happens once.
    """
    warmup = round(1000 / 280 * config.federation.iterations) if config.federation.iterations else 1000
    return {
        "restart, warm-up": config.replace(optimizer_state="restart", warmup=warmup),
        "restart, no warm-up": config.replace(optimizer_state="restart", warmup=0),
        "kept, one warm-up": config.replace(optimizer_state="client", warmup=warmup),
    }


def steps_in_a_row(config: Config) -> dict[str, Config]:
    """A control beside the ablation's last arm: every client takes as many steps in a row as the single node does.

    At equal steps in all, the clients' steps lie side by side, so each of them is `clients` times shorter; what is left
    of the gap here is due to averaging and to the split of the images alone.
    """
    kept, many = optimiser_ablation(config)["kept, one warm-up"], config.federation.clients
    longer = (
        {"iterations": many * config.federation.iterations}
        if config.federation.iterations
        else {"epochs": many * config.training.epochs}
    )
    return {f"kept, {many} x the steps": kept.replace(**longer)}
