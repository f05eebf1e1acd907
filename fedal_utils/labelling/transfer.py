"""Labels out of a store and into one, as COCO JSON, YOLO txt, VOC XML or CSV: commands `export` and `import`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..data import exchange
from .store import Question, Store

FORMATS = ("coco", "yolo", "voc", "csv")


def items(store: Store) -> list[exchange.Item]:
    """The last standing label of each image, in the order in which they were answered."""
    history, found = store.history(), {}
    for row in history[(history["action"] == "label") & ~history["undone"]].to_dict("records"):
        label, size = row["label"], row["size"]
        if store.task == "boxes":
            label = [exchange.Box(one["class"], *one["box"]) for one in label]
        found[row["image"]] = exchange.Item(row["image"], None, size and tuple(size), label)
    return list(found.values())


def truth_from(found: Iterable[exchange.Item]) -> dict[str, str | list[dict]]:
    """Finished labels as what a `Simulated` knows: labels from elsewhere join the loop as an annotator."""
    return {
        item.image: item.label
        if isinstance(item.label, str)
        else [{"class": box.name, "box": [box.x1, box.y1, box.x2, box.y2]} for box in item.label]
        for item in found
    }


def export(store: Store, form: str, out: str | Path) -> int:
    """Write the labels to a file (coco, csv) or into a folder (yolo, voc); returns how many images."""
    found = items(store)
    classes = () if _known(form) == "csv" else (store.classes,)
    getattr(exchange, f"write_{form}")(out, found, *classes)
    return len(found)


def load(path: str | Path, form: str, source: str | Path, who: str = "import") -> int:
    """Put labels that were made elsewhere into the store at `path`, made if need be; returns how many are new.

    A question that waits is answered; an image that nobody asked for joins as well; where there is another label
    already, this one counts from now on. Names may lack the ending that the store's have.
    """
    found = getattr(exchange, f"read_{_known(form)}")(source)
    truth, sizes = truth_from(found), {item.image: item.size for item in found}
    task = "classes" if all(isinstance(label, str) for label in truth.values()) else "boxes"
    named = truth.values() if task == "classes" else (one["class"] for label in truth.values() for one in label)
    with Store(path, sorted(set(named)) or None, task) as store:
        asked, labels, new = store.cycles(), store.labels(), 0
        endless = {str(PurePosixPath(image).with_suffix("")): image for image in asked}
        for name, label in truth.items():
            image = name if name in asked else endless.get(name, name)
            if labels.get(image) == label:
                continue
            if store.next(who, image) is None:
                cycle = asked.get(image, -1) + 1
                store.queue([Question(image, strategy="import", cycle=cycle, size=sizes[name])])
                store.next(who, image)
            store.answer(who, image, label, sizes[name], seconds=0.0)
            new += 1
    return new


def _known(form: str) -> str:
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    return form
