"""What all runs of one setting share: the data, who holds what, and the initial model of a seed."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import data, detectors, record, sampling, seeding, training
from ..config import Config
from ..data import Dataset, partition
from ..sampling import Scene
from ..training import CachedImages
from .schemes import method_of


@dataclass(frozen=True)
class Setup:
    """The data of one setting."""

    config: Config
    train: Dataset  # what models read: pixels, or a frozen backbone's features cached once
    test: Dataset
    photos: tuple[Dataset, Dataset]  # train and test with their pixels, for pictures
    device: torch.device
    views: dict[str, CachedImages] = field(default_factory=dict, compare=False, repr=False)  # features, changed images
    dealt: bool = False  # what is in `train` is a server's own: first the initial model's images, then those held out

    @property
    def name(self) -> str:
        dataset = self.config.data.dataset
        place = Path(dataset).expanduser().resolve()
        known = dataset in (*data.NAMES, *data.CLASS_NAMES)
        return dataset if known else place.stem if place.is_file() else place.name

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def fingerprint(self) -> str:
        """Of ids, labels and files of both sets: runs belong to it."""
        return hashlib.sha256("".join(part.fingerprint() for part in self.photos).encode()).hexdigest()

    @property
    def scene(self) -> Scene:
        """What the clients' observations share."""
        return Scene(self.train.images, self.photos[0].images, len(self.class_names), self.device, self.views)

    def view(self, rows, test: bool = False) -> Dataset:
        """These rows of the training (or test) set with their pixels."""
        return self.photos[test].take(list(rows))

    def preview(self, count: int) -> Dataset:
        """The first `count` training images with their pixels."""
        return self.view(range(min(count, len(self.train))))

    def rows(self, seed: int) -> list[np.ndarray]:
        """Rows of the initial model's labelled images, of those that the server holds out, and of the clients'."""
        first, held_out = self.config.federation.initial_model_images, self.config.federation.held_out_images
        rng, count = seeding.rng_for(seed, "start images"), len(self.train)
        order = np.arange(count) if self.dealt else rng.permutation(count)
        return [np.sort(part) for part in np.split(order, [first, first + held_out])]


def prepare(config: Config, device: str | torch.device | None = None, root: str | None = None) -> Setup:
    """Load the data once; with a frozen backbone, cache its features of all images.

    root: where data sets lie; by default $FEDAL_DATA, else `data/` of the checkout. Clients and query sizes are shrunk
    to a small folder of the user's own. ValueError on what cannot be combined. Sets the number of CPU threads.
    """
    place = Path(root or record.data_folder())
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = config.data
    load, more = data.load_classes, {}
    if not config.model.classifier:
        digits = data.Digits(settings.scenes, settings.digit_classes)
        load, more = data.load, {"digits": digits, "min_object": settings.min_object}
    train, test = load(settings.dataset, settings.image_size, root=place, limit=settings.limit, **more)
    if settings.dataset not in (*data.NAMES, *data.CLASS_NAMES):
        config = fitted(config, train)
    if config.federation.partition == "natural" and train.images.groups:
        config = config.replace(clients=len(set(train.images.groups)))
    check(config)
    setup = setup_of(config, train, test, device)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    return setup


def check(config: Config) -> None:
    """ValueError where a setting is for another kind of model, or a method cannot run."""
    names = ("balanced_softmax", "distillation_weight")
    if wrong := [name for name in names if config.flat()[name] and not config.model.classifier]:
        raise ValueError(f"{' and '.join(wrong)} are for classifiers: set classifier, or leave them out")
    if config.model.classifier == "linear" and config.federation.clients != 1:
        raise ValueError("classifier='linear' is trained on the labels of one client: set clients=1")
    for method in config.methods:
        method_of(method, config)


def setup_of(config: Config, train: Dataset, test: Dataset, device: torch.device, dealt: bool = False) -> Setup:
    """The setup of these sets: with a frozen backbone, its features of all images, cached once."""
    photos, folder = (train, test), record.project_root() / "results" / "runs" / "_features"
    if config.model.classifier in ("linear", "mlp"):
        train, test = training.embedded_sets(*photos, config.flywheel.feature_side, device, folder)
    elif config.model.frozen:
        model = detectors.build(config, len(train.class_names) or 1, torch.Generator().manual_seed(0)).to(device)
        cached = [training.cache_features(model, part.images, device=device, folder=folder) for part in photos]
        train, test = (replace(part, images=images) for part, images in zip(photos, cached, strict=True))
    if device.type == "cuda":
        train, test = (replace(part, images=part.images.to(device)) for part in (train, test))
    return Setup(config, train, test, photos, device, dealt=dealt)


def fitted(config: Config, train: Dataset) -> Config:
    """The sizes that suit a folder of the user's own, but for those in `kept`; all shrunk until its images suffice.

    Labelled in part, or not at all: a cycle of training on all labels without an initial model, then the next queries.
    """
    images, known, settings, own = len(train), int(train.known.sum()), config.federation, {}
    if images < 2:
        raise ValueError(f"one training image to start from and one to ask for are needed, got {images} images")
    as_set = config.model.classifier or config.profile == "paper"
    clients = max(1, min(settings.clients, images // (4 if as_set or "clients" in config.data.kept else 8)))
    if not as_set:
        size = max(1, min(50, images // clients // (6 if known < images else 12)))
        own = dict(initial_labels=size, query_size=size)
        if known < images:
            passes = (600 * clients // max(1, known)).bit_length() - 1
            own |= dict(rounds=5, iterations=0, epochs=1 << max(0, min(4, passes)))
        elif settings.initial_model_images:  # a shared start and rounds that grow with the labels
            start, steps = max(1, min(100, images // 16)), min(100, size * config.query.cycles // 2)
            own |= dict(initial_model_images=start, initial_model_iterations=max(60, min(400, 8 * start)))
            own |= dict(iterations=max(settings.iterations, steps))
    config = config.replace(**{name: value for name, value in own.items() if name not in config.data.kept})
    if known < images:
        config = config.replace(cycles=2, initial_model_images=0, initial_model_iterations=0, held_out_images=0)
    start_images = min(config.federation.initial_model_images, images // 5)
    held_out = min(config.federation.held_out_images, images // 10)
    share = (images - start_images - held_out) // clients
    first = max(1, min(config.query.initial_labels, share // 3))
    budget = max(1, min(config.query.query_size, (share - first) // 2))
    cycles = max(1, min(config.query.cycles, 1 + (share - first) // budget))
    rounds = cycles * config.federation.rounds + config.federation.extra_rounds
    first_pass = min(config.federation.first_pass_rounds, max(1, rounds - 1))  # leaves one later pass
    return config.replace(
        **dict(clients=clients, initial_model_images=start_images, initial_labels=first, query_size=budget),
        **dict(cycles=cycles, first_pass_rounds=first_pass, held_out_images=held_out),
    )


def partition_clients(setup: Setup, seed: int) -> tuple[list[np.ndarray], list[str]]:
    """Rows of each client, and the clients' names; depends on the seed and on no method."""
    config, train = setup.config, setup.train
    settings, query, how = config.federation, config.query, config.federation.partition
    rows, rng, groups = setup.rows(seed)[2], seeding.rng_for(seed, "partition"), train.images.groups
    stays = not bool(train.known.all())  # more labels come: an image stays with its client
    needed, names = 1 if stays or config.model.classifier or query.initial_fraction else config.labels_needed(), None
    if config.model.classifier == "linear":  # one annotator's flywheel
        parts, names = [np.arange(len(rows))], ["person"]
    elif how == "natural":
        parts, names = partition.natural(groups if groups is None else [groups[row] for row in rows])
    elif stays and how == "iid":
        draws = [seeding.rng_for(seed, "partition", Path(train.images.ids[row]).stem).random() for row in rows]
        parts = [np.sort(part) for part in np.array_split(np.argsort(draws, kind="stable"), settings.clients)]
    elif how == "iid":
        parts = partition.iid(len(rows), settings.clients, rng)
    elif how == "missing":
        classes = train.labels.classes.numpy()[rows]
        present = np.stack([(classes == c + 1).any(axis=1) for c in range(len(train.class_names))], axis=1)
        parts, _ = partition.missing_class(present, settings.missing_classes, rng)
    else:
        split, least = partition.dirichlet_equal, {}
        if how == "dirichlet":
            split, least = partition.dirichlet, {"least": 10 if config.model.classifier else needed}
        parts = split(train.dominant_class().numpy()[rows], settings.clients, settings.dirichlet_alpha, rng, **least)
    names = [str(name) for name in names or (f"{number:02d}" for number in range(len(parts)))]
    for name, part in zip(names, parts, strict=True):
        if len(part) < needed:
            raise ValueError(
                f"client {name} holds {len(part)} images, but {query.initial_labels} initial labels and "
                f"{query.cycles - 1} queries of {query.query_size} need {needed}; lower one of them, or clients"
            )
    return [rows[part] for part in parts], names


def class_counts(setup: Setup, seed: int) -> tuple[np.ndarray, list[str]]:
    """Objects of each class that each client could be queried about, (M, C), and the clients' names."""
    parts, names = partition_clients(setup, seed)
    counts = setup.train.class_counts().numpy(force=True)
    return np.stack([counts[part].sum(axis=0) for part in parts]), names


def first_queries(setup: Setup, seed: int = 0) -> pd.DataFrame:
    """What to label first when there are no labels yet: client and id; "test" is held out for the evaluation."""
    parts, names = partition_clients(setup, seed)
    count = setup.config.query.initial_labels
    held = setup.test.images.ids[: max(1, round(count * len(parts) / 4))] if setup.test.labels is None else ()
    rows = [("test", id_) for id_ in held]
    for part, name in zip(parts, names, strict=True):
        rng = seeding.rng_for(seed, "ask", name, 0)
        chosen = sampling.top_k(sampling.Scores.all(rng.random(len(part))), min(count, len(part)), rng)
        rows += [(name, setup.train.images.ids[part[position]]) for position in chosen]
    return pd.DataFrame(rows, columns=["client", "id"])
