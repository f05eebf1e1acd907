"""Writers of tiny data sets in the layouts of the real ones: a few small pictures with boxes, written by the tests.

A picture's pixels depend on its id alone; its objects are drawn as bright rectangles where the annotation says.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """id; size (height, width); objects (class, (x1, y1, x2, y2)) in pixels counted from 0, the far edge excluded."""

    id: str
    size: tuple[int, int] = (40, 60)
    objects: tuple[tuple[str, tuple[float, float, float, float]], ...] = (("cat", (10, 5, 30, 25)),)


THREE = (
    Picture("a", (40, 60), (("cat", (10, 5, 30, 25)), ("dog", (40, 10, 58, 38)))),
    Picture("b", (60, 40), (("dog", (4, 8, 36, 50)),)),
    Picture("c", (50, 50), (("cat", (0, 0, 25, 50)),)),
)


def pixels(picture: Picture) -> np.ndarray:
    """uint8 (H, W, 3): a dark gradient and grain of the picture's own, objects bright."""
    height, width = picture.size
    rng = np.random.default_rng(zlib.crc32(picture.id.encode()))
    canvas = rng.integers(0, 40, (height, width, 3)) + np.linspace(0, 60, width)[None, :, None]
    for _, (x1, y1, x2, y2) in picture.objects:
        box = np.clip(np.nan_to_num([x1, y1, x2, y2], posinf=0, neginf=0), 0, 10_000).astype(int)
        canvas[box[1] : box[3], box[0] : box[2]] = rng.integers(180, 255, 3)
    return canvas.astype(np.uint8)


def image(picture: Picture, folder: Path, suffix: str = ".png") -> Path:
    path = folder / f"{picture.id}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(picture)).save(path)
    return path


def xml(picture: Picture, file: Path, one_based: bool = False, difficult: Sequence[int] = ()) -> Path:
    """A Pascal VOC annotation; the objects numbered in `difficult` carry the flag."""
    (height, width), shift = picture.size, int(one_based)
    objects = "".join(
        f"<object><name>{name}</name><difficult>{int(i in difficult)}</difficult><bndbox><xmin>{x1 + shift}</xmin>"
        f"<ymin>{y1 + shift}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for i, (name, (x1, y1, x2, y2)) in enumerate(picture.objects)
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    text = f"<annotation><filename>{picture.id}.png</filename>{size}{objects}</annotation>"
    return written(file, text)


def written(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def voc(root: Path, pictures=THREE, splits=None, suffix=".png", one_based=False, difficult=()) -> Path:
    """JPEGImages, Annotations and, with `splits`, ImageSets/Main, as BCCD and VOCdevkit/VOC20xx have it."""
    for picture in pictures:
        image(picture, root / "JPEGImages", suffix)
        xml(picture, root / "Annotations" / f"{picture.id}.xml", one_based, difficult)
    for split, ids in (splits or {}).items():
        written(root / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{i}\n" for i in ids))
    return root


def voc_flat(root: Path) -> Path:
    """Each image with an XML of the same name beside it."""
    for picture in THREE:
        xml(picture, folder(root) / f"{picture.id}.xml")
    return root


def coco_content(pictures: Sequence[Picture] = THREE, suffix: str = ".png", **extra: dict[str, object]) -> dict:
    """COCO's dictionary; `extra` maps an image's id to further fields, such as a town."""
    names = sorted({name for picture in pictures for name, _ in picture.objects})
    images, annotations = [], []
    for i, picture in enumerate(pictures, start=1):
        size = dict(zip(("height", "width"), picture.size, strict=True))
        images.append({"id": i, "file_name": f"{picture.id}{suffix}", **size, **extra.get(picture.id, {})})
        for name, (x1, y1, x2, y2) in picture.objects:
            box, kind = [x1, y1, x2 - x1, y2 - y1], 10 * (1 + names.index(name))
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": kind, "bbox": box, "iscrowd": 0}
            annotations.append(entry | {"area": box[2] * box[3]})
    categories = [{"id": 10 * (1 + k), "name": name} for k, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco(root: Path, pictures=THREE, file="annotations/instances.json", images="images") -> Path:
    """Images in one folder and one JSON file."""
    folder(root / images, pictures, ".png")
    written(root / file, json.dumps(coco_content(pictures)))
    return root


def yolo(root: Path, pictures=THREE, split: str = "", names: Sequence[str] | None = ("cat", "dog")) -> Path:
    """images/<split>, labels/<split> and, with `names`, data.yaml; a picture without objects gets no txt file."""
    numbers = names or sorted({name for picture in pictures for name, _ in picture.objects})
    for picture in pictures:
        image(picture, root / "images" / split)
        (height, width), text = picture.size, ""
        for name, (x1, y1, x2, y2) in picture.objects:
            box = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            text += " ".join(map(str, (list(numbers).index(name), *box))) + "\n"
        if text:
            written(root / "labels" / split / f"{picture.id}.txt", text)
    if names:
        listed = "".join(f"  {i}: {name}\n" for i, name in enumerate(names))
        (root / "data.yaml").write_text(f"train: images\nnames:\n{listed}")
    return root


KITTI = tuple(
    Picture(f"{i:06d}", (37 + i % 2, 124 - i % 3), objects)
    for i, objects in enumerate(
        (
            (("Car", (10.9, 5.2, 30.5, 25.7)), ("DontCare", (60.0, 4.0, 80.0, 20.0))),
            (("Pedestrian", (40.1, 6.6, 52.4, 34.9)), ("Car", (70.0, 10.0, 110.0, 30.0))),
            (("Cyclist", (12.3, 8.8, 30.2, 30.1)), ("Van", (50.5, 6.5, 80.5, 28.5))),
            (("Misc", (20.0, 10.0, 40.0, 30.0)),),
            (("DontCare", (15.0, 5.0, 45.0, 25.0)),),
            (),
            (("Person_sitting", (33.3, 12.9, 60.9, 33.3)), ("Pedestrian", (80.2, 4.0, 95.8, 34.2))),
            (("Tram", (5.5, 2.5, 90.5, 30.5)),),
            (("Truck", (8.0, 3.0, 60.0, 33.0)), ("Car", (65.7, 14.1, 99.9, 30.6)), ("Car", (100.2, 14.0, 120.9, 29.0))),
            (("Van", (8.0, 9.0, 48.0, 33.0)),),
            (("Car", (8.0, 9.0, 48.0, 33.0)),),
            (("Pedestrian", (60.0, 3.0, 80.0, 33.0)), ("Cyclist", (90.0, 5.0, 110.0, 31.0))),
        )
    )
)


def kitti_line(name: str, box: tuple[float, float, float, float]) -> str:
    """One object as KITTI writes it; 3D numbers that nobody reads, -1, -1000 and -10 for DontCare as there."""
    corners = " ".join(f"{v:.2f}" for v in box)
    if name == "DontCare":
        return f"DontCare -1 -1 -10 {corners} -1 -1 -1 -1000 -1000 -1000 -10"
    return f"{name} 0.00 0 -1.57 {corners} 1.50 1.60 3.70 1.84 1.47 8.41 -1.35"


def kitti(root: Path, pictures: Sequence[Picture] = KITTI, suffix: str = ".png") -> Path:
    """training/image_2 and training/label_2, as KITTI's zips unpack."""
    for picture in pictures:
        image(picture, root / "training" / "image_2", suffix)
        text = "".join(kitti_line(*thing) + "\n" for thing in picture.objects)
        written(root / "training" / "label_2" / f"{picture.id}.txt", text)
    return root


def folder(root: Path, pictures: Sequence[Picture] = THREE, suffix: str = ".jpg") -> Path:
    """Images and nothing else."""
    for picture in pictures:
        image(picture, root, suffix)
    return root


def cut(file: Path, part: float = 0.6) -> Path:
    """Truncate a file to a part of its bytes, as a broken copy leaves it."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    return file
