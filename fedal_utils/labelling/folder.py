"""A user's own photographs on their way round the loop: queries go to the page, answers lie beside the images."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from .. import data, record
from ..federation import Setup
from .oracle import Simulated, pictures, truth_of
from .store import Question, Store, store_path
from .transfer import export

LABELS = "labels.sqlite.json"  # COCO, beside the images, made of the store


@dataclass
class OwnFolder:
    """A folder of photographs; what its page was told is written beside the images at once."""

    path: str | Path
    annotator: Simulated | None = None  # answers at once what is queried; None = a person, at the page or elsewhere
    classes: Sequence[str] | None = None  # that the annotator tells apart
    settings: dict[str, Any] = field(default_factory=dict)  # what its images need of a config

    def __post_init__(self) -> None:
        self.path = Path(self.path).expanduser()
        self.write()

    @classmethod
    def of(cls, place: str | None, profile: str = "smoke", count: int = 60) -> "OwnFolder":
        """The folder of this path; else a copy of some images of a named set without labels, and who knows them.

        place: a path, or a set's name; None: BCCD where it is there, unless in smoke, else DigitScenes.
        """
        if place and Path(place).expanduser().is_dir():
            return cls(place)
        root = record.data_folder()
        source = place or ("bccd" if profile != "smoke" and (root / "BCCD").is_dir() else "digits")
        settings = {"image_size": (128, 128), "flip": 0.0} if source == "digits" else {}
        size, digits = settings.get("image_size", (480, 640)), data.Digits((count, 1), 3)
        known, _ = data.load(source, size, root, limit=(count, 1), digits=digits)
        folder = record.project_root() / "results" / "runs" / "_photographs" / source
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        truth = {f"{Path(id_).stem}.png": boxes for id_, boxes in truth_of(known, "boxes").items()}
        for name, picture in zip(truth, pictures(known.images).values(), strict=True):
            Image.fromarray(picture).save(folder / name)
        return cls(folder, Simulated(truth), known.class_names, settings)

    def report(self) -> dict[str, Any]:
        """What is read from it, see `data.inspect_folder`."""
        return data.inspect_folder(str(self.path))

    def ask(self, setup: Setup, queries: pd.DataFrame) -> None:
        """Have the annotator label what is queried, through the folder's store; a person does it later."""
        parts = (part.images for part in setup.photos)
        sizes = {id_: size for part in parts for id_, size in zip(part.ids, part.sizes.tolist(), strict=True)}
        if self.annotator is not None:
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
            there = store.task == "boxes" and store.labels()
            return export(store, "coco", self.path / LABELS) if there else 0


def queue(store: Store, queries: pd.DataFrame, sizes: Mapping[str, Any] | None = None, strategy: str = "") -> int:
    """Put queried images (columns client, id, perhaps score) into a store that has not asked for them; how many."""
    asked, sizes = store.cycles(), sizes or {}
    cycle = max(asked.values(), default=-1) + 1
    scores = queries.reindex(columns=["id", "score"]).set_index("id")["score"].astype(object)
    scores = scores.where(scores.notna(), None).to_dict()
    return store.queue(Question(i, strategy, s, cycle, sizes.get(i)) for i, s in scores.items() if i not in asked)
