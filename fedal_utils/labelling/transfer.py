"""Labels out of a store and into one: COCO JSON, YOLO txt, VOC XML, CSV, Label Studio (commands `export`, `import`)."""

from pathlib import Path, PurePosixPath

from .. import data
from ..data import Object, Record
from .store import Question, Store

WRITTEN = ("coco", "yolo", "voc", "csv")
READ = ("coco", "yolo", "voc", "label_studio")


def export(store: Store, form: str, out: str | Path) -> int:
    """Write the last standing label of each image to a file (coco, csv) or folder (yolo, voc); returns how many."""
    if form not in WRITTEN:
        raise ValueError(f"format must be one of {', '.join(WRITTEN)}, got {form!r}")
    found, sizes = [], store.history().set_index("image")["size"].dropna().map(tuple).to_dict()
    for image, label in store.labels().items():
        told = {"label": label}
        if store.task == "boxes":
            told = {"objects": tuple(Object(one["class"], tuple(one["box"])) for one in label)}
        found.append(Record(image, size=sizes.get(image), **told))
    getattr(data, f"write_{form}")(out, found, *(() if form == "csv" else (store.classes,)))
    return len(found)


def load(path: str | Path, form: str, source: str | Path, who: str = "import") -> int:
    """Put labels that were made elsewhere into the store at `path`, made if need be; returns how many are new.

    An image that nobody asked for joins; of several labels the last counts. Names may lack the ending of the store's.
    """
    if form not in READ:
        raise ValueError(f"format must be one of {', '.join(READ)}, got {form!r}")
    found = [one for one in getattr(data, f"read_{form}")(source) if (one.label, one.objects) != (None, None)]
    task = "classes" if all(one.label for one in found) else "boxes"
    named = {name for one in found for name in ([one.label] if one.label else [thing.name for thing in one.objects])}
    with Store(path, sorted(named) or None, task) as store:
        asked, labels, new = store.cycles(), store.labels(), 0
        endless = {str(PurePosixPath(image).with_suffix("")): image for image in asked}
        for one in found:
            image = one.id if one.id in asked else endless.get(one.id, one.id)
            label = one.label or [{"class": thing.name, "box": list(thing.box)} for thing in one.objects]
            if labels.get(image) == label:
                continue
            if store.next(who, image) is None:
                cycle = asked.get(image, -1) + 1
                store.queue([Question(image, strategy="import", cycle=cycle, size=one.size)])
                store.next(who, image)
            store.answer(who, image, label, one.size, seconds=0.0)
            new += 1
    return new
