"""Labels out of a store and into one: COCO JSON, YOLO txt, VOC XML, CSV, Label Studio (commands `export`, `import`)."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .. import data
from ..data import Object, Record
from .store import Question, Store

WRITTEN = ("coco", "yolo", "voc", "csv")
READ = ("coco", "yolo", "voc", "label_studio")


def records(store: Store) -> list[Record]:
    """The last standing label of each image, in the order in which they were answered."""
    history, found = store.history(), {}
    for row in history[(history["action"] == "label") & ~history["undone"]].to_dict("records"):
        size = None if row["size"] is None else tuple(row["size"])
        boxes = row["label"] if store.task == "boxes" else None
        objects = None if boxes is None else tuple(Object(one["class"], tuple(one["box"])) for one in boxes)
        label = row["label"] if boxes is None else None
        found[row["image"]] = Record(row["image"], size=size, objects=objects, label=label)
    return list(found.values())


def truth_from(found: Iterable[Record]) -> dict[str, str | list[dict]]:
    """Finished labels as what a `Simulated` knows: labels from elsewhere join the loop as an annotator."""
    truth = {}
    for one in found:
        boxes = [{"class": thing.name, "box": list(thing.box)} for thing in one.objects or ()]
        if one.label is not None or one.objects is not None:
            truth[one.id] = boxes if one.label is None else one.label
    return truth


def export(store: Store, form: str, out: str | Path) -> int:
    """Write the labels to a file (coco, csv) or into a folder (yolo, voc); returns how many images."""
    if form not in WRITTEN:
        raise ValueError(f"format must be one of {', '.join(WRITTEN)}, got {form!r}")
    found, classes = records(store), () if form == "csv" else (store.classes,)
    getattr(data, f"write_{form}")(out, found, *classes)
    return len(found)


def load(path: str | Path, form: str, source: str | Path, who: str = "import") -> int:
    """Put labels that were made elsewhere into the store at `path`, made if need be; returns how many are new.

    A question that waits is answered; an image that nobody asked for joins as well; where there is another label
    already, this one counts from now on. Names may lack the ending that the store's have.
    """
    if form not in READ:
        raise ValueError(f"format must be one of {', '.join(READ)}, got {form!r}")
    found = getattr(data, f"read_{form}")(source)
    truth, sizes = truth_from(found), {one.id: one.size for one in found}
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
