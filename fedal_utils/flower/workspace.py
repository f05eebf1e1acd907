"""A client's folder, and what the server knows of a client.

    <place>/server/federation.json   who holds which ids, class names, what was dealt
    <place>/server/start, test       the server's images: of the initial model and held out; test images
    <place>/server/runs              its run folders (`record`)
    <place>/clients/00/              annotations.json (COCO) and images/, which only this client opens
    <place>/clients/00/runs          what it keeps of each run: its queries, its states, a person's label store

Every message can be repeated: a client starts from what it kept before that step, and gives the same answer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import data, federation, labelling, record
from ..config import Config
from ..data import Dataset
from ..federation import KEPT, Client, Experiment, Setup, State
from ..sampling import Cost, Oracle, Pool
from .messages import Task

STATES_KEPT = 3  # a server that was killed repeats one round at most
_DEALT = (  # what decides who holds which image: with all else different, a place serves other experiments as well
    *("dataset", "image_size", "scenes", "digit_classes", "limit", "min_object", "partition", "dirichlet_alpha"),
    *("missing_classes", "clients", "initial_model_images", "held_out_images"),
)


def write_set(folder: Path, part: Dataset) -> None:
    """A set as COCO: annotations.json, and letterboxed pixels as PNG in images/. `read_set` reads the same bits."""
    images, labels, names, records = part.images, part.labels, part.class_names, []
    for i, sample in enumerate(images.ids):
        file = folder / "images" / f"{sample.removesuffix('.png')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.batch([i])[0].permute(1, 2, 0).cpu().numpy()).save(file)
        objects = []
        for j in torch.nonzero(labels.classes[i])[:, 0].tolist():
            box, crowd = tuple(labels.boxes[i, j].double().tolist()), bool(labels.crowd[i, j])
            difficult = bool(labels.ignore[i, j]) and not crowd
            objects.append(data.Object(names[int(labels.classes[i, j]) - 1], box, difficult, crowd))
        name = file.relative_to(folder / "images").as_posix()
        records.append(data.Record(name, file, images.image_size, tuple(objects)))
    path = data.write_coco(folder / "annotations.json", records, names)
    content = json.loads(path.read_text())
    for entry, sample in zip(content["images"], images.ids, strict=True):
        entry["sample"] = sample  # its id
    record.write_atomic(path, json.dumps(content))


def read_set(folder: Path, classes: Sequence[str], image_size: Sequence[int]) -> Dataset:
    """The images of a folder with annotations.json and images/; ValueError if it has other classes."""
    records = data.read_coco(folder / "annotations.json", folder / "images")
    return data.assemble(folder.name, records, image_size, tuple(classes))


def deal(setup: Setup, place: str | Path, seed: int = 0) -> list[str]:
    """Write each client's images, and the server's, into folders below `place`; returns the clients' names.

    Who gets what is as in a run of that seed (`federation.partition_clients`). A place that was dealt for the same is
    left as it is; one that was dealt for something else is a ValueError.
    """
    place, fingerprint, (train, test) = Path(place), setup.fingerprint, setup.photos
    if (place / "server" / "federation.json").is_file():
        facts = _dealt_for(place, setup.config, seed)
        if facts["fingerprint"] != fingerprint:
            raise ValueError(f"{place} was dealt from other images or labels: give another place, or delete it")
        return list(facts["clients"])
    if (place / "server").exists() or (place / "clients").exists():
        raise ValueError(f"{place} holds something, but was not dealt to its end: give another place, or delete it")
    parts, names = federation.partition_clients(setup, seed)
    for name, rows in zip(names, parts, strict=True):
        write_set(place / "clients" / name, train.take(rows))
    first, held = setup.initial_rows(seed), setup.held_out_rows(seed)
    if len(first) + len(held):
        write_set(place / "server" / "start", train.take(np.concatenate([first, held])))
    write_set(place / "server" / "test", test)
    holds = {name: [train.images.ids[row] for row in rows] for name, rows in zip(names, parts, strict=True)}
    facts = {"dealt": _dealt(setup.config, seed), "fingerprint": fingerprint, "clients": holds}
    facts |= {"classes": train.class_names, "start": len(first), "held_out": len(held)}
    record.write_atomic(place / "server" / "federation.json", json.dumps(facts, indent=1))  # comes last
    return names


def _dealt(config: Config, seed: int) -> dict[str, Any]:
    flat = config.flat()
    return json.loads(json.dumps({**{name: flat[name] for name in _DEALT}, "seed": seed}))


def _dealt_for(place: Path, config: Config, seed: int | None = None) -> dict[str, Any]:
    """The facts of a place; ValueError if it was dealt for something else."""
    facts = facts_of(place)
    then, now = facts["dealt"], _dealt(config, facts["dealt"]["seed"] if seed is None else seed)
    if changed := [name for name in now if then.get(name) != now[name]]:
        name = changed[0]
        raise ValueError(f"{place} was dealt with {name} = {then.get(name)!r}, now it is {now[name]!r}: give another")
    return facts


def facts_of(place: str | Path) -> dict[str, Any]:
    """What `deal` noted: dealt (settings and seed), clients (name -> ids), classes, start, held_out."""
    file = Path(place) / "server" / "federation.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: hand the data out first (flower.deal)")
    return json.loads(file.read_text())


def server_setup(place: str | Path, config: Config, device: str | torch.device = "cpu") -> Setup:
    """What the server works with: its own images in the place of everybody's, and the test set."""
    facts, folder = _dealt_for(Path(place), config), Path(place) / "server"
    test = read_set(folder / "test", facts["classes"], config.data.image_size)
    own = (facts["start"], facts["held_out"])
    train = read_set(folder / "start", facts["classes"], config.data.image_size) if any(own) else test.take([])
    return federation.setup_of(config, train, test, torch.device(device), own)


@functools.lru_cache(maxsize=64)
def _setup(folder: Path, config: Config, classes: tuple[str, ...], device: str) -> Setup:
    part = read_set(folder, classes, config.data.image_size)
    return federation.setup_of(config, part, part.take([0]), torch.device(device))


@dataclass(frozen=True)
class Workspace:
    """One client's folder. person: labels are drawn by a person at the labelling page, else known by annotations."""

    folder: Path
    name: str
    person: bool = False
    device: str = "cpu"

    @contextmanager
    def experiment(self, task: Task, received: State, trains: bool) -> Iterator[Experiment]:
        """The experiment as this client knows it at this step: one client, and the model that it received.

        A backbone that does not travel any more is the one received last. trains: after its queries of this step, else
        before them.
        """
        run = self._run(task)
        run.folder.mkdir(parents=True, exist_ok=True)
        setup = _setup(self.folder.absolute(), task.config, task.classes, self.device)
        before = [file for file in sorted(run.folder.glob("after-*.pt")) if file < self._file(task, trains)]
        kept = torch.load(before[-1], weights_only=True) if before else {}
        run.resumed = {**kept, "model": {**kept.get("model", {}), **received}}
        query, store = task.config.query, None
        oracle = Oracle(setup.train.labels, query.seconds_per_image, query.seconds_per_box)
        if self.person:
            store = labelling.Store(labelling.store_path(run.folder), setup.class_names, "boxes")
            oracle = labelling.StoreOracle(store, setup.train.images, setup.class_names, strategy=run.method)
        try:
            pool = Pool(self.name, setup.train.images, oracle, np.arange(len(setup.train)))
            pool.replay(row for row in self.queries(task) if row["cycle"] in task.labelled_in)
            pool.exclude(oracle.undecided(set(task.labelled_in)))
            yield Experiment(run, setup, [Client(self.name, pool)], oracle)
        finally:
            if store is not None:
                store.close()

    def queries(self, task: Task) -> list[dict[str, Any]]:
        """What it has queried in this run: cycle, client, id, score."""
        file = self._run(task).folder / "queries.json"
        return json.loads(file.read_text()) if file.is_file() else []

    def keep_queries(self, task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note the queries of this cycle; earlier ones that the server does not know of are forgotten."""
        earlier = [row for row in self.queries(task) if row["cycle"] in set(task.labelled_in) - {task.step.cycle}]
        record.write_atomic(self._run(task).folder / "queries.json", json.dumps([*earlier, *rows], indent=1))

    def keep(self, task: Task, experiment: Experiment, trains: bool) -> None:
        """What stays here after this step; what was kept of later ones is no longer true."""
        (client,), file = experiment.clients, self._file(task, trains)
        content = {what: {self.name: getattr(client, what)} for what in KEPT if what != "local_state"}
        content["model"] = experiment.run.resumed["model"]
        record.write_atomic(file, lambda out: torch.save(content, out))
        states = sorted(file.parent.glob("after-*.pt"))
        for old in [*[f for f in states if f > file], *[f for f in states if f <= file][:-STATES_KEPT]]:
            old.unlink()

    def _run(self, task: Task) -> record.Run:
        """This client's side of a run: where its things lie, and the generators by name."""
        root = self.folder / "runs"
        return record.Run(task.config, task.notebook, task.method, task.seed, root, federation.plan)

    def _file(self, task: Task, trains: bool) -> Path:
        run = self._run(task)
        return run.folder / f"after-{run.plan.index((task.step.cycle, task.step.round)):06d}-{int(trains)}.pt"


class RemotePool:
    """What a client has told the server of its pool, in the place of a `Pool`: costs of labels, and queries."""

    def __init__(self, client: str, ids: Sequence[str]):
        self.client, self.ids, self.rows, self._cost = client, tuple(ids), [], Cost()

    def __len__(self) -> int:
        return len(self.ids)

    def tell(self, cost: Cost, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in what all labels cost so far, and rows of queries.csv of this client (others are passed over)."""
        self._cost, self.rows = cost, [*self.rows, *(dict(row) for row in rows if str(row["client"]) == self.client)]

    def labelled(self) -> range:
        """As many as there are labelled images; the server knows no positions."""
        return range(self._cost.images)

    def cost(self) -> Cost:
        return self._cost

    def queries(self, cycle: int) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["cycle"] == cycle]
