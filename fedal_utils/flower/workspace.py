"""Folders that the data are dealt out into, for clients that open nothing but their own.

<place>/server/federation.json   who holds which ids, class names, what was dealt
<place>/server/start, test       the server's images: of the initial model and held out; test images
<place>/server/runs              its run folders (`record`)
<place>/clients/00/              annotations.json (COCO) and images/, which only this client opens
<place>/clients/00/runs          what it keeps of each run between rounds
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import data, federation, record
from ..config import Config
from ..data import Dataset
from ..federation import Setup

_DEALT = (  # what decides who holds which image: with all else different, a place serves other experiments as well
    *("dataset", "image_size", "scenes", "digit_classes", "limit", "min_object", "partition", "dirichlet_alpha"),
    *("missing_classes", "clients", "initial_model_images", "held_out_images"),
)


def write_set(folder: Path, part: Dataset) -> None:
    """A set as COCO: annotations.json, and letterboxed pixels as PNG in images/. `read_set` reads the same bits."""
    images, labels, names, records = part.images, part.labels, part.class_names, []
    for i, sample in enumerate(images.ids):
        file = folder / "images" / (sample if Path(sample).suffix.lower() in data.SUFFIXES else f"{sample}.png")
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
    place, (train, test), (first, held_out, _) = Path(place), setup.photos, setup.rows(seed)
    if train.labels is None or train.labelled is not None:
        raise ValueError(f"{train.name} has images without labels: take notebook 05_your_own_images until all have one")
    parts, names = federation.partition_clients(setup, seed)
    holds = {name: [train.images.ids[row] for row in rows] for name, rows in zip(names, parts, strict=True)}
    dealt = {name: setup.config.flat()[name] for name in _DEALT}
    facts = {"dealt": dealt, "seed": seed, "fingerprint": setup.fingerprint, "clients": holds}
    text, file = json.dumps({**facts, "classes": train.class_names}, indent=1), place / "server" / "federation.json"
    if not (place / "server").exists() and not (place / "clients").exists():
        for name, rows in zip(names, parts, strict=True):
            write_set(place / "clients" / name, train.take(rows))
        if len(first) + len(held_out):
            write_set(place / "server" / "start", train.take(np.concatenate([first, held_out])))
        write_set(place / "server" / "test", test)
        record.write_atomic(file, text)  # comes last
    elif not file.is_file() or file.read_text() != text:
        raise ValueError(f"{place} was dealt for something else, or not to its end: give another place, or delete it")
    return names


def facts_of(place: str | Path) -> dict[str, Any]:
    """What `deal` noted: dealt (settings), seed, fingerprint, clients (name -> ids), classes."""
    return json.loads((Path(place) / "server" / "federation.json").read_text())


def server_setup(place: str | Path, config: Config) -> Setup:
    """What the server works with: its own images in the place of everybody's, and the test set."""
    facts, folder, size = facts_of(place), Path(place) / "server", config.data.image_size
    now = json.loads(json.dumps(config.flat()))
    for name, then in facts["dealt"].items():
        if then != now[name]:
            raise ValueError(f"{place} was dealt with {name} = {then!r}, now it is {now[name]!r}")
    test = read_set(folder / "test", facts["classes"], size)
    train = read_set(folder / "start", facts["classes"], size) if (folder / "start").exists() else test.take([])
    return federation.setup_of(config, train, test, torch.device("cpu"), dealt=True)
