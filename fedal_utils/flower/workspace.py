"""A client's folder, and what the server knows of a client.

    <place>/server/federation.json   who holds which ids, class names, what was dealt
    <place>/server/start, test       the server's images: of the initial model and held out; test images
    <place>/server/runs              its run folders (`record`)
    <place>/clients/00/              annotations.json (COCO) and images/, which only this client opens
    <place>/clients/00/runs          what it keeps of each run between rounds

Every message can be repeated: a client starts from what it kept before that step, and gives the same answer.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import data, federation, record
from ..config import Config, QueryConfig
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
        name = sample if Path(sample).suffix.lower() in data.SUFFIXES else f"{sample}.png"
        file = folder / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.batch([i])[0].permute(1, 2, 0).cpu().numpy()).save(file, format="PNG")
        objects = []
        for j in torch.nonzero(labels.classes[i])[:, 0].tolist():
            box, crowd = tuple(labels.boxes[i, j].double().tolist()), bool(labels.crowd[i, j])
            difficult = bool(labels.ignore[i, j]) and not crowd
            objects.append(data.Object(names[int(labels.classes[i, j]) - 1], box, difficult, crowd))
        records.append(data.Record(sample, file, images.image_size, tuple(objects)))
    data.write_coco(folder / "annotations.json", records, names)


def read_set(folder: Path, classes: Sequence[str], image_size: Sequence[int]) -> Dataset:
    """The images of a folder with annotations.json and images/; ValueError if it has other classes."""
    records = data.read_coco(folder / "annotations.json", folder / "images")
    return data.assemble(folder.name, records, image_size, tuple(classes))


def deal(setup: Setup, place: str | Path, seed: int = 0) -> list[str]:
    """Write each client's images, and the server's, into folders below `place`, unless done; the clients' names."""
    place, fingerprint, (train, test) = Path(place), setup.fingerprint, setup.photos
    if (place / "server" / "federation.json").is_file():
        facts = facts_of(place, setup.config, seed)
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


def facts_of(place: str | Path, config: Config | None = None, seed: int | None = None) -> dict[str, Any]:
    """What `deal` noted: dealt, clients (name -> ids), classes, start, held_out; ValueError if for something else."""
    file = Path(place) / "server" / "federation.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: hand the data out first (flower.deal)")
    facts = json.loads(file.read_text())
    then = facts["dealt"]
    now = then if config is None else _dealt(config, then["seed"] if seed is None else seed)
    for name in now:
        if then.get(name) != now[name]:
            raise ValueError(f"{place} was dealt with {name} = {then.get(name)!r}, now it is {now[name]!r}")
    return facts


def server_setup(place: str | Path, config: Config) -> Setup:
    """What the server works with: its own images in the place of everybody's, and the test set."""
    facts, folder = facts_of(place, config), Path(place) / "server"
    test = read_set(folder / "test", facts["classes"], config.data.image_size)
    own = (facts["start"], facts["held_out"])
    train = read_set(folder / "start", facts["classes"], config.data.image_size) if any(own) else test.take([])
    return federation.setup_of(config, train, test, torch.device("cpu"), own)


@functools.lru_cache(maxsize=64)
def _setup(folder: Path, config: Config, classes: tuple[str, ...], device: str) -> Setup:
    part = read_set(folder, classes, config.data.image_size)
    return federation.setup_of(config, part, part.take([0]), torch.device(device))


class Workspace:
    """One client's folder, which has its name."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name

    @contextlib.contextmanager
    def experiment(self, task: Task, received: State, trains: bool) -> Iterator[Experiment]:
        """The experiment as this client knows it at this step (trains: after its queries); keeps what stays here."""
        run = record.Run(task.config, task.notebook, task.method, task.seed, self.folder / "runs", federation.plan)
        run.folder.mkdir(parents=True, exist_ok=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        setup = _setup(self.folder.absolute(), task.config, task.classes, device)
        place = run.plan.index((task.step.cycle, task.step.round))
        here, states = run.folder / f"after-{place:06d}-{int(trains)}.pt", sorted(run.folder.glob("after-*.pt"))
        before = [file for file in states if file < here]
        kept = torch.load(before[-1], weights_only=True) if before else {}
        run.resumed = {**kept, "model": {**kept.get("model", {}), **received}}
        query = task.config.query
        oracle = Oracle(setup.train.labels, query.seconds_per_image, query.seconds_per_box)
        client = Client(self.name, Pool(self.name, setup.train.images, oracle, np.arange(len(setup.train))))
        client.pool.replay(task.queries)
        yield Experiment(run, setup, [client], oracle)
        content = {what: {self.name: getattr(client, what)} for what in KEPT if what != "local_state"}
        content["model"] = run.resumed["model"]
        record.write_atomic(here, lambda out: torch.save(content, out))
        for old in {*states, here} - {*before[1 - STATES_KEPT :], here}:
            old.unlink()


class RemotePool:
    """What the server knows of a client's pool, in the place of a `Pool`: its queries, and the boxes that it drew."""

    def __init__(self, client: str, ids: Sequence[str], query: QueryConfig):
        self.client, self.ids, self.query = client, tuple(ids), query
        self.rows: list[dict[str, Any]] = []  # as of queries.csv
        self.boxes = 0

    def __len__(self) -> int:
        return len(self.ids)

    def labelled(self) -> range:
        return range(len(self.rows))

    def cost(self) -> Cost:
        images, query = len(self.rows), self.query
        return Cost(images, self.boxes, query.seconds_per_image * images + query.seconds_per_box * self.boxes)

    def queries(self, cycle: int) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["cycle"] == cycle]
