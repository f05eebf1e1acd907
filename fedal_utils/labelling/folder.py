"""A user's own photographs on their way round the loop: queries go to the page, answers lie beside the images."""

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from .. import data, record
from ..federation import Setup
from .oracle import Simulated, pictures, truth_of
from .store import Question, Store, store_path
from .transfer import export

LABELS = "labels.json"  # COCO, beside the images, made of the store


class OwnFolder:
    """A folder of photographs.

    annotator: answers all that is asked at once, of these classes; None = a person, at the page or in another tool.
    settings: what its images need of a config.
    """

    def __init__(
        self,
        path: str | Path,
        annotator: Simulated | None = None,
        classes=None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.path, self.annotator, self.classes = Path(path).expanduser(), annotator, classes
        self.settings = dict(settings or {})
        self.write()

    @classmethod
    def of(cls, place: str | None, profile: str = "smoke", count: int = 60) -> "OwnFolder":
        """The folder of this path; else a copy of some images of a named set without labels, and who knows them.

        place: a path, or a set's name; None: BCCD where it is there, unless in smoke, else DigitScenes.
        """
        if place and Path(place).expanduser().is_dir():
            return cls(place)
        root = Path(os.environ.get("FEDAL_DATA") or record.project_root() / "data")
        source = place or ("bccd" if profile != "smoke" and (root / "BCCD").is_dir() else "digits")
        settings = {"image_size": (128, 128), "flip": 0.0} if source == "digits" else {}
        size, digits = settings.get("image_size", (480, 640)), data.Digits((count, 1), 3)
        known, _ = data.load(source, size, root, limit=(count, 1), digits=digits)
        folder = record.project_root() / "results" / "runs" / "_photographs" / source
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        truth, named = truth_of(known, "boxes"), {}
        for id_, picture in pictures(known.images).items():
            name = f"{Path(id_).stem}.png"
            Image.fromarray(picture).save(folder / name)
            named[name] = truth[id_]
        return cls(folder, Simulated(named), known.class_names, settings)

    def report(self) -> dict[str, Any]:
        """What is read from it, see `data.inspect_folder`."""
        return data.inspect_folder(str(self.path))

    def ask(self, setup: Setup, queries: pd.DataFrame) -> None:
        """Have the annotator label what is queried, through the folder's store; without one nothing happens."""
        if self.annotator is None:
            return
        sizes = {
            i: s for part in setup.photos for i, s in zip(part.images.ids, part.images.sizes.tolist(), strict=True)
        }
        with Store(store_path(self.path), self.classes, "boxes") as store:
            queue(store, queries, sizes, setup.config.methods[0])
            self.annotator.answer_all(store, "simulated")
        self.write()

    def write(self) -> int:
        """Write the boxes of the store beside the images, as which every reader takes them; returns how many images.

        ValueError where the folder has labels in another format: one of the two would not be read.
        """
        if not store_path(self.path).is_file():
            return 0
        images = {path.stem for path in data.find_files(self.path, *data.SUFFIXES)}
        if others := [f for f in data.find_files(self.path, ".xml", ".txt") if f.stem in images]:
            way = "put them into the store (`python -m fedal_utils import`) and move them away"
            raise ValueError(f"{self.path} has a store and other labels, such as {others[0].name}: {way}")
        with Store(store_path(self.path)) as store:
            if store.task != "boxes" or not store.labels():
                return 0
            return export(store, "coco", self.path / LABELS)


def queue(store: Store, queries: pd.DataFrame, sizes: Mapping[str, Any] | None = None, strategy: str = "") -> int:
    """Put queried images (columns client, id, perhaps score) into a store that has not asked for them; how many."""
    asked, sizes = store.cycles(), sizes or {}
    cycle = max(asked.values(), default=-1) + 1
    scores = queries["score"] if "score" in queries else [math.nan] * len(queries)
    rows = [
        (i, None if math.isnan(s) else float(s)) for i, s in zip(queries["id"], scores, strict=True) if i not in asked
    ]
    return store.queue(Question(i, strategy, score, cycle, sizes.get(i)) for i, score in rows)
