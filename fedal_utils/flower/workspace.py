"""A client's own folder, its home: images, annotations, label store, and what stays there between two messages.

`deal` hands a data set out into such folders, one for each client and one for the server, so that an experiment of one
process can be run with real clients; a client's home may as well be a folder that somebody filled by hand:

    <place>/server/start, test     what the server has: start images and held-out images, test images; COCO
    <place>/server/runs            its run folders (`record`)
    <place>/clients/00/            annotations.json (COCO) and images/, or any layout that `data.load` finds out
    <place>/clients/00/runs/       label store, questions, and states, by run

A person at home draws no box for an object that is to be ignored (crowd, difficult, too small), so a data set with such
objects costs fewer boxes there than the plain loop's Oracle bills.

Nothing in a home is needed twice at one time, and every step can be repeated: a client that is asked again for what it
has done already (its answer was lost, or the server was killed) gives the same answer.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import record
from ..config import Config
from ..data import readers as data
from ..data.readers import Dataset
from ..federation import experiment as alfl
from ..federation.aggregate import State
from ..federation.experiment import Client, Picked, Study
from ..labelling import page as labelling
from ..papers import flywheel
from ..sampling.pool import Bill, Pool
from ..training import CachedImages

PEOPLE = ("simulated", "human")
STATES_KEPT = 3  # a server that was killed repeats one round at most
# What decides who holds which image: with all else different, a place serves other experiments as well.
_DEALT = (
    "data",
    "image_size",
    "scenes",
    "digit_classes",
    "limit",
    "min_object",
    "partition",
    "alpha",
    "missing",
    "clients",
    "start_images",
    "merge_images",
)


# --- sets on disk -----------------------------------------------------------------------------------------------------


def write_set(folder: str | Path, part: Dataset) -> Path:
    """A set as COCO: annotations.json, and images/ of letterboxed pixels as PNG. `read_set` reads the same bits."""
    folder = Path(folder)
    images, labels = part.images, part.labels
    height, width = images.image_size
    entries, annotations = [], []
    for i, sample in enumerate(images.ids):
        name = _file_name(sample)
        place = folder / "images" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            raise ValueError(f"{place} is there already: two samples of {part.name!r} share the file name {name!r}")
        Image.fromarray(images.batch([i])[0].permute(1, 2, 0).cpu().numpy()).save(place)
        entries.append({"id": i, "file_name": name, "height": height, "width": width, "sample": sample})
        for j in range(labels.classes.shape[1] if labels is not None else 0):
            if labels.classes[i, j] == 0:
                continue
            x1, y1, x2, y2 = labels.boxes[i, j].double().tolist()  # differences of float32 are exact in float64
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": int(labels.classes[i, j]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(labels.crowd[i, j]),
                    "ignore": int(labels.ignore[i, j]),
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(part.class_names)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    return record.write_atomic(folder / "annotations.json", json.dumps(content))


def _file_name(sample: str) -> str:
    name = PurePosixPath(labelling.safe_name(sample))
    return str(name.with_suffix(".png") if name.suffix.lower() in data.SUFFIXES else f"{name}.png")


def read_set(folder: str | Path, config: Config, classes: Sequence[str] = ()) -> Dataset:
    """The training images of a folder: one that `write_set` wrote, or any layout that `data.load` finds out.

    classes: the names that everybody uses, in their order; () = the folder's own. ValueError if the folder has others.
    """
    folder = Path(folder)
    file = folder / "annotations.json"
    if file.is_file():
        content = file.read_text()
        ours = '"sample": ' in content  # then what is too small was settled before boxes were rounded to float32
        found = data.read_coco(
            file,
            folder / "images",
            config.data.image_size,
            group_field=None,
            min_object=0 if ours else config.data.min_object,
            name=folder.name,
        )
        samples = {e["file_name"]: e.get("sample", e["file_name"]) for e in json.loads(content)["images"]}
        found = replace(found, images=replace(found.images, ids=tuple(samples[id_] for id_ in found.images.ids)))
    else:
        found = data.load(str(folder.absolute()), config.data.image_size, min_object=config.data.min_object)[0]
    return _of_these_classes(found, tuple(classes), folder)


def _of_these_classes(part: Dataset, classes: tuple[str, ...], folder: Path) -> Dataset:
    if not classes or part.class_names == classes or part.labels is None:
        return replace(part, class_names=classes or part.class_names)
    unknown = sorted(set(part.class_names) - set(classes))
    if unknown:
        raise ValueError(f"{folder} has objects of class {unknown[0]!r}; the experiment knows {', '.join(classes)}")
    number = torch.tensor([0, *(classes.index(name) + 1 for name in part.class_names)])
    return replace(part, labels=replace(part.labels, classes=number[part.labels.classes]), class_names=classes)


# --- handing out ------------------------------------------------------------------------------------------------------


def deal(
    config: Config, place: str | Path, seed: int = 0, root: str | Path | None = None, tests: bool = False
) -> list[str]:
    """Write each client's images, and the server's, into folders of their own below `place`; the clients' names.

    Who gets what is as in a run of that seed (`alfl.share_out`). Done once: a place that was dealt for the same data,
    partition and seed is left as it is, one that was dealt for others is a ValueError. root: where data sets lie.
    tests: each client also gets an equal part of the test images, to judge the model on (the server keeps them all).
    """
    place, facts = Path(place), _facts(config, seed)
    with contextlib.suppress(FileNotFoundError):
        there = json.loads((place / "server" / "federation.json").read_text())
        for name, was, now in _changed(there["dealt"], facts):
            raise ValueError(
                f"{place} was dealt for another experiment ({name} = {was!r}, now {now!r}): give another place, or "
                "delete it"
            )
        if tests and not all((place / "clients" / name / "test").is_dir() for name in there["clients"]):
            raise ValueError(f"{place} was dealt without test images for the clients: give another place, or delete it")
        return there["clients"]
    for part in ("server", "clients"):
        if (place / part).exists():
            raise ValueError(f"{place / part} is there, but {place} was not dealt to its end: delete it")
    train, test = data.load(
        config.data.dataset,
        config.data.image_size,
        root=alfl.data_place(root),
        min_object=config.data.min_object,
        limit=config.data.limit,
        scenes=config.data.scenes,
        digit_classes=config.data.digit_classes,
    )
    if train.labels is None:
        raise ValueError(f"data set {config.data.dataset!r} has no labels: nobody could answer for the clients")
    first, parts, names = alfl.share_out(config, train, seed)
    held = alfl.held_out(config, train, seed)
    half = place.with_name(f".{place.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    for number, (name, rows) in enumerate(zip(names, parts, strict=True)):
        write_set(half / "clients" / name, train.take(rows))
        if tests:
            write_set(half / "clients" / name / "test", test.take(np.arange(number, len(test), len(names))))
    write_set(half / "server" / "start", train.take(np.concatenate([first, held])))
    write_set(half / "server" / "test", test)
    content = {
        "dealt": facts,
        "name": alfl.short_name(config.data.dataset),
        "clients": names,
        "classes": list(train.class_names),
        "start": len(first),
        "held_out": len(held),
    }
    record.write_atomic(half / "server" / "federation.json", json.dumps(content, indent=1))
    place.mkdir(parents=True, exist_ok=True)
    for part in ("clients", "server"):  # the server's file comes last: without it the place was not dealt
        (half / part).rename(place / part)
    half.rmdir()
    return names


def _facts(config: Config, seed: int) -> dict[str, Any]:
    facts = {name: value for name, value in asdict(config).items() if name in _DEALT}
    return json.loads(json.dumps({**facts, "seed": seed}))


def _changed(dealt: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(setting, as it was dealt, as it is now) of each that differs."""
    return [(name, dealt.get(name), now) for name, now in facts.items() if dealt.get(name) != now]


def dealt_as(config: Config, seed: int) -> str:
    """A short name of who holds what: the same for experiments that can share a place."""
    return hashlib.sha256(json.dumps(_facts(config, seed), sort_keys=True).encode()).hexdigest()[:8]


def facts_of(place: str | Path) -> dict[str, Any]:
    """What `deal` noted: dealt (settings and seed), name, clients, classes, start, held_out."""
    file = Path(place) / "server" / "federation.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: hand the data out first (`make clients`, or homes.deal)")
    return json.loads(file.read_text())


def server_study(place: str | Path, config: Config, device: str | torch.device = "cpu") -> Study:
    """What the server works with: start images and held-out images in the place of everybody's, and the test set."""
    facts, folder = facts_of(place), Path(place) / "server"
    for name, was, _ in _changed(facts["dealt"], _facts(config, facts["dealt"]["seed"])):
        raise ValueError(
            f"{place} was dealt with {name} = {was!r}, the experiment has {config.flat()[name]!r}: hand the data out "
            "again, elsewhere"
        )
    train, test = (read_set(folder / part, config, facts["classes"]) for part in ("start", "test"))
    train, test = replace(train, name=f"{facts['name']}-server"), replace(test, name=f"{facts['name']}-test")
    return alfl.study_of(config, train, test, torch.device(device), dealt=(facts["start"], facts["held_out"]))


# --- a client at home -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Home:
    """One client's folder. person: who answers, 'simulated' (knows the folder's annotations) or 'human' (at the page).

    anonymous: samples are told to the server by their number, not by their name.
    """

    folder: Path
    name: str
    person: str = "simulated"
    anonymous: bool = False

    def __post_init__(self) -> None:
        if self.person not in PEOPLE:
            raise ValueError(f"client {self.name}: person must be one of {PEOPLE}, got {self.person!r}")
        if not self.folder.is_dir():
            raise ValueError(f"client {self.name}: its folder {self.folder} does not exist")

    def study(self, config: Config, classes: Sequence[str], device: str | torch.device = "cpu") -> Study:
        """This client's images and nothing else; with a frozen backbone, its features of them, kept on disk."""
        return _study(self.folder.absolute(), self.name, config, tuple(classes), str(device))

    def run(self, config: Config, notebook: str, method: str, seed: int) -> record.Run:
        """This client's side of a run: where its things lie, and the generators by name."""
        return record.Run(config, notebook, method, seed, self.folder / "runs", alfl.plan)

    def answers(self, run: record.Run, study: Study) -> flywheel.Answers:
        """The label store of this run, and who answers there."""
        person = None
        if self.person == "simulated":
            if study.train.labels is None:
                raise ValueError(f"client {self.name}: {self.folder} has no annotations, so nobody can be simulated")
            person = labelling.Simulated(
                flywheel.truth_of(study.photos[0], "boxes"),
                run.config.flywheel.annotator_error,
                run.config.query.seconds_per_image,
                run.config.query.seconds_per_box,
                run.seed,
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        store = labelling.Store(run.folder / "labels.sqlite", study.class_names, "boxes")
        return flywheel.Answers(store, study.photos[0].images, study.class_names, "boxes", person, run.method)

    @contextlib.contextmanager
    def client(self, run: record.Run, study: Study, cycle: int, round: int, asked: bool = True):
        """The client as it is at the beginning of this round; asked: with this cycle's labels, else before them."""
        oracle = self.answers(run, study)
        try:
            pool = Pool(self.name, study.train.images, oracle, np.arange(len(study.train)))
            before = cycle + 1 if asked else cycle
            asked_before = [row for row in self._asked(run) if row["cycle"] < before]
            pool.replay({**row, "score": np.nan if row["score"] is None else row["score"]} for row in asked_before)
            pool.set_aside(oracle.unsure(range(before)))
            client = Client(self.name, pool)
            for what, kept in self._state(run, cycle, round).items():
                if what in alfl.KEPT:
                    getattr(client, what).update(kept)
            coders = [f for c in range(before) if (f := run.folder / f"picked-{c}.pt").is_file()]
            client.coder = torch.load(coders[-1], weights_only=True)["coder"] if coders else {}
            yield client
        finally:
            oracle.store.close()

    def _asked(self, run: record.Run) -> list[dict[str, Any]]:
        """Rows as the file has them: no score is None there."""
        file = run.folder / "asked.json"
        return json.loads(file.read_text()) if file.is_file() else []

    def pick(self, run: record.Run, cycle: int, picked: Picked, coder: State) -> None:
        """Note what to ask in this cycle, and the VAE that chose it where that lives on."""
        content = {
            "positions": torch.from_numpy(np.asarray(picked.positions, dtype=np.int64)),
            "why": torch.from_numpy(np.asarray(picked.why, dtype=np.float64)),
            "coder": coder,
        }
        self._save(run.folder / f"picked-{cycle}.pt", content)

    def ask(self, run: record.Run, study: Study, cycle: int) -> tuple[Client, list[dict[str, Any]]]:
        """Have what was picked in this cycle labelled: the client with its labels, and the rows of asked.csv.

        Asked again, it answers the same. `flywheel.Unanswered` while a human has not labelled all of it.
        """
        file = run.folder / f"picked-{cycle}.pt"
        if not file.is_file():
            raise ValueError(f"client {self.name}: nothing was scored in cycle {cycle}, so there is nothing to label")
        picked = torch.load(file, weights_only=True)
        with self.client(run, study, cycle, 0, asked=False) as client:
            client.pool.ask(picked["positions"].numpy(), cycle, picked["why"].numpy())
            rows = client.pool.asked_rows(cycle)
            plain = [{**row, "score": None if np.isnan(row["score"]) else row["score"]} for row in rows]
            kept = [row for row in self._asked(run) if row["cycle"] != cycle]
            record.write_atomic(run.folder / "asked.json", json.dumps([*kept, *plain], indent=1))
            if self.anonymous:
                number = {sample: f"{self.name}/{place}" for place, sample in enumerate(client.pool.ids)}
                rows = [{**row, "id": number[row["id"]]} for row in rows]
            return client, rows

    def remember(self, run: record.Run, cycle: int, round: int, client: Client, base: State) -> None:
        """What stays here after this round; base: the backbone, while only the head travels."""
        content = {what: getattr(client, what) for what in ("home", "memory", "last")}
        self._save(self._file(run, cycle, round), {**content, "base": base})
        states, now = sorted(run.folder.glob("after-*.pt")), self._file(run, cycle, round)
        for old in [*[f for f in states if f > now], *[f for f in states if f <= now][:-STATES_KEPT]]:
            old.unlink()

    def keep_sent(self, run: record.Run, cycle: int, state: State) -> None:
        """The model that came with the questions of this cycle: its first round need not carry it again."""
        self._save(run.folder / "sent.pt", {"cycle": cycle, "state": state})

    def sent(self, run: record.Run, cycle: int) -> State:
        """What `keep_sent` kept; ValueError if that was of another cycle."""
        kept = torch.load(run.folder / "sent.pt", weights_only=True)
        if kept["cycle"] != cycle:
            raise ValueError(f"client {self.name} has the model of cycle {kept['cycle']}, not of cycle {cycle}")
        return kept["state"]

    def base(self, run: record.Run, cycle: int, round: int) -> State:
        """The backbone as it was received last before this round."""
        return self._state(run, cycle, round).get("base", {})

    @staticmethod
    def _file(run: record.Run, cycle: int, round: int) -> Path:
        return run.folder / f"after-{run.plan.index((cycle, round)):06d}.pt"

    def _state(self, run: record.Run, cycle: int, round: int) -> Mapping[str, State]:
        """What was remembered last before this round; rounds that came after are no longer true."""
        before = [f for f in sorted(run.folder.glob("after-*.pt")) if f < self._file(run, cycle, round)]
        return torch.load(before[-1], weights_only=True) if before else {}

    @staticmethod
    def _save(path: Path, content: Mapping[str, Any]) -> None:
        record.write_atomic(path, lambda file: torch.save(dict(content), file))


@functools.lru_cache(maxsize=64)
def _study(folder: Path, name: str, config: Config, classes: tuple[str, ...], device: str) -> Study:
    part = replace(read_set(folder, config, classes), name=name)
    nothing = part.take([0])  # a client has no part in the server's judging
    if not config.model.frozen:
        return alfl.study_of(config, part, nothing, torch.device(device))
    file = folder / "runs" / f"features-{alfl.beginning(config).digest()[:8]}.pt"
    if not file.is_file():
        made = alfl.study_of(config, part, nothing, torch.device(device))
        images = made.train.images
        record.write_atomic(
            file, lambda out: torch.save({"features": images.features, "mirrored": images.mirrored}, out)
        )
        return made
    kept = torch.load(file, weights_only=True)
    if len(kept["features"][0]) != len(part):
        raise ValueError(f"{file} holds features of other images than {folder}: delete it")
    images = CachedImages(
        part.images.ids,
        tuple(kept["features"]),
        kept["mirrored"],
        part.images.sizes,
        config.data.image_size,
    )
    return Study(config, replace(part, images=images), nothing, (part, nothing), torch.device(device))


# --- a client as the server knows it ----------------------------------------------------------------------------------


class Told:
    """What a client has told the server of its pool, in the place of a `Pool`: counts, bills, and what was asked."""

    def __init__(self, client: str, classes: int):
        self.client = client
        self._bill, self._rows = Bill(), []
        self.histogram = [0] * classes  # labelled boxes of each class
        self.held = 0  # images that it holds

    def tell(self, cycle: int, bill: Bill, histogram: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in the answer to a question round: the whole bill so far, and the rows of this cycle."""
        self._bill, self.histogram = bill, list(histogram)
        self._rows = [row for row in self._rows if row["cycle"] != cycle] + [dict(row) for row in rows]

    def labelled(self) -> range:
        """As many as there are labelled images; the server knows no positions."""
        return range(self._bill.images)

    def bill(self) -> Bill:
        return self._bill

    def asked_rows(self, cycle: int) -> list[dict[str, Any]]:
        return [row for row in self._rows if row["cycle"] == cycle]

    def state(self) -> dict[str, Any]:
        """For a resume point; the rows are in asked.csv."""
        return {
            "bill": [self._bill.images, self._bill.boxes, self._bill.seconds],
            "histogram": self.histogram,
            "held": self.held,
        }

    def restore(self, kept: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """As it was when `state` was taken; rows: of asked.csv, anybody's."""
        self._bill, self.histogram, self.held = Bill(*kept["bill"]), list(kept["histogram"]), kept["held"]
        self._rows = [dict(row) for row in rows if str(row["client"]) == self.client]
