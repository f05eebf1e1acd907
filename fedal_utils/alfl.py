"""Active learning during federated learning for object detection (van Bommel, Univ. of Twente, 2021): the set-up.

The paper's text is public in its abstract only; what is here follows the author's released code as described in its
repository (marked *released code*) or fills a gap (*reconstructed*). The loop itself stands in notebooks 10 and 11.
Section 6.1: devices label their k highest-scoring images with the global model, train, and are averaged, each round.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import data, detectors, federation, metrics, partition, record, sampling, seeding, training
from .boxes import Detections
from .config import Config, fitted
from .data import Dataset, Images, Labels
from .detectors import Detector
from .federation import State, Update
from .pool import Oracle, Pool, total
from .training import CachedImages

CENTRALISED = "centralised"


@dataclass
class Client:
    """A participant: its name, its pool, and what never leaves it."""

    name: str
    pool: Pool
    home: State = field(default_factory=dict)  # BatchNorm statistics under the policy 'local'


@dataclass(frozen=True)
class Study:
    """What all runs of one setting share.

    train, test: what detectors read: pixels, or a frozen backbone's features cached once. photos: train and test with
    their pixels, for pictures. name: of the data set, short enough for a file's name.
    """

    config: Config
    train: Dataset
    test: Dataset
    photos: tuple[Dataset, Dataset]
    device: torch.device

    @property
    def name(self) -> str:
        known = self.config.data in data.NAMES
        return self.config.data if known else Path(self.config.data).expanduser().resolve().name

    def view(self, rows: Sequence[int], test: bool = False) -> Dataset:
        """These rows of the training (or test) set with their pixels."""
        return self.photos[test].take(list(rows))

    def preview(self, count: int) -> Dataset:
        """The first `count` training images with their pixels, or all if there are fewer."""
        return self.view(range(min(count, len(self.train))))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names


def new_detector(config: Config, classes: int, rng: torch.Generator) -> Detector:
    """The config's detector with weights drawn from `rng`."""
    return detectors.build(
        config.detector, config.backbone, classes, config.image_size, rng, norm=config.norm, width=config.width,
        anchor_side=config.anchor_side, anchor_ratios=config.anchor_ratios, pretrained=config.pretrained,
        frozen=config.frozen,
    )  # fmt: skip


def prepare(config: Config, device: str | torch.device | None = None, root: str | None = None) -> Study:
    """Load the data once; with a frozen backbone, cache its features of all images.

    root: where data sets lie; by default $FEDAL_DATA, else `data/` of the checkout that the notebook was opened in.
    A folder of the user's own may be small: clients and budgets are shrunk to it (`config.fitted`). Sets the number of
    CPU threads to `config.threads` (0 = as it was).
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cores = torch.get_num_threads()
    place = root or os.environ.get("FEDAL_DATA") or record.home() / "data"
    train, test = data.load(
        config.data, config.image_size, root=place, min_object=config.min_object, limit=config.limit,
        scenes=config.scenes,
    )  # fmt: skip
    if config.data not in data.NAMES:
        config = fitted(config, len(train))
    photos = (train, test)
    if config.frozen:
        model = new_detector(config, len(train.class_names) or 1, torch.Generator().manual_seed(0)).to(device)
        train, test = (
            Dataset(part.name, training.cache_features(model, part.images, device=device), part.labels,
                    part.class_names, part.drops)
            for part in (train, test)
        )  # fmt: skip
    if device.type == "cuda":
        train, test = (
            Dataset(p.name, p.images.to(device), p.labels, p.class_names, p.drops) for p in (train, test)
        )  # fmt: skip
    torch.set_num_threads(config.threads or cores)
    return Study(config, train, test, photos, device)


def deal(
    config: Config, train: Dataset, rows: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[str]]:
    """Rows of the training set for each client, and the clients' names, by `config.partition`."""
    if config.partition == "natural":
        groups = train.images.groups
        parts, names = partition.natural(groups if groups is None else [groups[row] for row in rows])
        return [rows[part] for part in parts], [str(name) for name in names]
    if config.partition == "iid":
        parts = partition.iid(len(rows), config.clients, rng)
    elif config.partition == "dirichlet":
        dominant = train.dominant_class().numpy()[rows]
        parts = partition.dirichlet(dominant, config.clients, config.alpha, rng, least=config.labels_needed())
    elif config.partition == "missing":
        classes = train.labels.classes.numpy()[rows]
        present = np.stack([(classes == c + 1).any(axis=1) for c in range(len(train.class_names))], axis=1)
        parts, _ = partition.missing_class(present, config.missing, rng)
    else:
        raise ValueError(f"partition must be 'iid', 'dirichlet', 'missing' or 'natural', got {config.partition!r}")
    return [rows[part] for part in parts], [f"{number:02d}" for number in range(len(parts))]


def share_out(config: Config, train: Dataset, seed: int) -> tuple[np.ndarray, list[np.ndarray], list[str]]:
    """Rows of the start images, rows of each client, and the clients' names; depends on the seed and on no method."""
    if len(train) <= config.start_images:
        raise ValueError(
            f"data set {train.name!r} has {len(train)} training images, and start_images={config.start_images} "
            "leaves none for the clients; lower start_images"
        )
    order = seeding.rng_for(seed, "start images").permutation(len(train))
    first, rest = np.sort(order[: config.start_images]), np.sort(order[config.start_images :])
    parts, names = deal(config, train, rest, seeding.rng_for(seed, "partition"))
    for name, part in zip(names, parts, strict=True):
        if len(part) < config.labels_needed():
            raise ValueError(
                f"client {name} holds {len(part)} images, but first={config.first} and {config.cycles - 1} cycles of "
                f"budget={config.budget} ask for {config.labels_needed()}; lower budget, first, cycles or clients"
            )
    return first, parts, names


def first_questions(study: Study, seed: int = 0) -> pd.DataFrame:
    """What each client should label first when there are no labels yet: random images, as in cycle 0 of a run.

    Columns: client, id. The start images come first, under the client 'start'.
    """
    config = study.config
    first, parts, names = share_out(config, study.train, seed)
    rows = [("start", row) for row in first]
    for name, part in zip(names, parts, strict=True):
        rng = seeding.rng_for(seed, "ask", name, 0)
        chosen = sampling.top_k(sampling.random(len(part), rng), config.first, rng)
        rows += [(name, part[position]) for position in chosen]
    return pd.DataFrame([(name, study.train.images.ids[row]) for name, row in rows], columns=["client", "id"])


def start(run: record.Run, study: Study) -> tuple[list[Client], Detector]:
    """Clients with their pools, and the global model: fresh, or where a broken run stopped.

    Partition, start images and the starting point depend on the seed only, so every method begins from the same.
    The starting point is trained centrally on `start_images` images that are in no client's pool (released code: 200
    images, 200 epochs).
    """
    config, train = study.config, study.train
    if train.labels is None:
        raise ValueError(f"data set {train.name!r} has no labels: it can be scored, but nobody can answer for it")
    first, parts, names = share_out(config, train, run.seed)
    oracle = Oracle(train.labels, config.seconds_per_image, config.seconds_per_box)
    clients = [
        Client(name, Pool(name, train.images, oracle, part)) for name, part in zip(names, parts, strict=True)
    ]  # fmt: skip
    model = new_detector(config, len(study.class_names), run.torch_rng("weights"))
    if run.resumed is not None:
        model.load_state_dict(run.resumed["model"], strict=False)
        rows = run.asked_rows()
        for client in clients:
            client.pool.replay(rows)
            client.home.update(run.resumed["home"].get(client.name, {}))
        return clients, model.to(study.device)

    def starting_point() -> dict:
        if len(first) == 0 or config.start_iterations == 0:
            return federation.state_of(model, model.exchanged())
        images, labels = train.images.take(first), train.labels.take(first)
        schedule = config.replace(schedule="cosine")
        for _ in training.fit(
            model, images, labels, schedule, run.torch_rng("starting point"), iterations=config.start_iterations,
            device=study.device, who="starting point",
        ):  # fmt: skip
            pass
        return federation.state_of(model, model.exchanged())

    state = record.shared(config, run.notebook, run.seed, "starting-point", starting_point, root=run.root)
    model.load_state_dict(state, strict=False)
    return clients, model.to(study.device)


def look(config: Config, model: Detector, images: Images | CachedImages, device: torch.device) -> Detections:
    """Detections for scoring: confidence above 0.25, class-agnostic NMS at 0.45 (van Bommel 7.1, released code)."""
    return training.predict(
        model, images, device=device, score_above=config.score_above, nms_iou=config.nms_iou,
        class_agnostic=config.class_agnostic,
    )  # fmt: skip


def ask(run: record.Run, study: Study, model: Detector, client: Client, cycle: int) -> None:
    """Score the client's unlabelled images, choose, and have the Oracle label them.

    The first labels are random, and so are those of the centralised reference: it gets the labels of method 'random'.
    """
    config = study.config
    strategy = "random" if cycle == 0 or run.method == CENTRALISED else run.method
    waiting = client.pool.unlabelled()
    rng = run.rng("ask", client.name, cycle)
    seen = look(config, model, client.pool.candidates(), study.device) if sampling.needs_model(strategy) else None
    scores = sampling.score(strategy, seen, len(waiting), rng)
    chosen = sampling.top_k(scores, config.first if cycle == 0 else config.budget, rng, config.empty)
    why = np.where(scores.scored, scores.values, np.nan)[chosen]
    client.pool.ask(waiting[chosen], cycle, why)


def broadcast(model: Detector, batch_norm: str, wire: str) -> bytes:
    """The message that carries the global model to one client."""
    return federation.pack(federation.state_of(model, federation.sent_keys(model, batch_norm)), wire)


def train(
    run: record.Run, study: Study, model: Detector, clients: Sequence[Client], cycle: int, round: int
) -> list[Update]:
    """One round: the clients that take part train from the global model, each on its own labels.

    Method 'centralised' trains once on everyone's labels, for as many gradient steps as the clients take together.
    """
    config = study.config
    wire = "fp32" if run.method == CENTRALISED else config.wire  # one node rounds nothing for a wire it does not use
    payload = broadcast(model, config.batch_norm, wire)
    scratch = detectors.clone(model)
    recipe = config.replace(lr=config.lr * round_factor(config, round))
    iterations = config.iterations or None
    if run.method == CENTRALISED:
        images, labels = everyone(study, clients)
        together = None if iterations is None else iterations * len(clients)
        return [
            federation.train_client(
                scratch, payload, images, labels, recipe, run.torch_rng("train", CENTRALISED, cycle, round),
                CENTRALISED, together, device=study.device,
            )
        ]  # fmt: skip
    names = federation.take_part([c.name for c in clients], config.fraction, run.rng("take part", cycle, round))
    updates = []
    for client in clients:
        if client.name not in names or len(client.pool.labelled()) == 0:
            continue
        images, labels = client.pool.training_set()
        updates.append(
            federation.train_client(
                scratch, payload, images, labels, recipe, run.torch_rng("train", client.name, cycle, round),
                client.name, iterations, config.wire, config.batch_norm, client.home, study.device,
            )
        )  # fmt: skip
    return updates


def round_factor(config: Config, round: int) -> float:
    """Factor on the learning rate in this round of a cycle: 1 in the first, `config.anneal` in the last.

    The schedule belongs to the server's loop, so it does not start again inside each client's call of `fit`.
    """
    if config.rounds == 1:
        return 1.0
    return 1 + (config.anneal - 1) * round / (config.rounds - 1)


def everyone(study: Study, clients: Sequence[Client]) -> tuple[Images | CachedImages, Labels]:
    """The labelled images of all clients on one node, in the order of the training set."""
    rows = np.sort(np.concatenate([c.pool.index[c.pool.labelled()] for c in clients]))
    return study.train.images.take(rows), clients[0].pool.labels_of(rows)


def judge(study: Study, model: Detector, clients: Sequence[Client] = ()) -> dict[str, float]:
    """Metrics on the test set; where clients keep BatchNorm statistics of their own, the mean over their models."""
    homes = [client.home for client in clients if client.home]
    if homes:
        each = []
        for home in homes:
            own = detectors.clone(model)
            own.load_state_dict(home, strict=False)
            each.append(judge(study, own))
        return {key: float(np.mean([found[key] for found in each])) for key in each[0]}
    found = training.predict(model, study.test.images, device=study.device)
    return metrics.evaluate(found, study.test.labels, study.class_names)


def commit(
    run: record.Run, study: Study, model: Detector, clients: Sequence[Client], updates: Sequence[Update],
    cycle: int, round: int,
) -> dict:  # fmt: skip
    """End of a round: judge (after a cycle's last round, or as the config says), write rows, save the resume point."""
    config = study.config
    last = round == config.rounds - 1
    judged = last or (config.evaluate_every > 0 and (round + 1) % config.evaluate_every == 0)
    sent = 0 if run.method == CENTRALISED or len(clients) == 1 else 1  # one node: nothing travels
    down = len(broadcast(model, config.batch_norm, config.wire))
    where = {"cycle": cycle, "round": round}
    by_name = {c.name: c for c in clients}
    rows = []
    for update in updates:
        if update.client in by_name:
            bill = by_name[update.client].pool.bill()
            rows.append(
                {**where, "client": update.client, "images": bill.images, "boxes": bill.boxes, "seconds": bill.seconds,
                 "bytes_up": len(update.payload), "bytes_down": down, "loss": update.loss, "steps": update.steps}
            )  # fmt: skip
    bill = total(c.pool.bill() for c in clients)
    server = {
        **where, "client": "server", "images": bill.images, "boxes": bill.boxes, "seconds": bill.seconds,
        "bytes_up": sent * sum(len(u.payload) for u in updates), "bytes_down": sent * down * len(updates),
        "loss": float(np.mean([u.loss for u in updates])), "steps": sum(u.steps for u in updates),
        **(judge(study, model, clients) if judged else {}),
    }  # fmt: skip
    asked = [row for c in clients for row in c.pool.asked_rows(cycle)] if round == 0 else []
    state = {
        "model": federation.state_of(model, model.exchanged()),
        "home": {c.name: c.home for c in clients if c.home},
    }
    run.commit(cycle, round, [*rows, server], asked, state)
    return server
