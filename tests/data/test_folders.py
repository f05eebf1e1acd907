"""A folder of one's own: format and split found out, strays left out and named, images nobody labelled, `inspect`."""

import json
import os
import shutil
from pathlib import Path

import pytest
from miniatures import THREE, Picture, coco, coco_content, folder, image, voc, voc_flat, xml, yolo
from PIL import Image

from fedal_utils import __main__ as command
from fedal_utils import data
from fedal_utils.data import folders

SIZE = (48, 64)
MANY = [Picture(i) for i in "defg"]


def counts(root: Path) -> tuple[int, int]:
    train, test = data.load(str(root), SIZE)
    return len(train), len(test)


@pytest.mark.parametrize(
    ("write", "told"),
    [(voc, "Pascal VOC"), (voc_flat, "Pascal VOC"), (coco, "COCO"), (yolo, "YOLO"), (folder, "images without labels")],
    ids=["voc", "voc-flat", "coco", "yolo", "images-only"],
)
def test_a_folder_of_ones_own_with_three_images(tmp_path, write, told):
    train, test = data.load(str(write(tmp_path / "mine")), SIZE)
    assert (len(train), len(test)) == (2, 1) and train.name == "mine train" and train.reading.format == told
    assert {Path(i).stem for i in train.images.ids + test.images.ids} == {"a", "b", "c"}
    labelled = told != "images without labels"
    drawn = f"split drawn {'80 : 20' if labelled else '4 % for test'} with seed 0"
    assert drawn in train.describe() and train.reading == test.reading
    assert train.class_names == test.class_names == (("cat", "dog") if labelled else ())
    assert (train.labels is not None) == labelled and train.labelled is None
    assert data.load("mine", SIZE, root=tmp_path)[1].images.ids == test.images.ids
    assert {data.load("mine", SIZE, root=tmp_path, seed=s)[1].images.ids for s in range(12)} != {test.images.ids}


def test_a_folder_keeps_the_split_it_brings(tmp_path):
    sets = voc(tmp_path / "sets", [*THREE, *MANY], splits={"train": "ab", "val": "cd", "test": "ef"})
    folder(tmp_path / "plain" / "train"), folder(tmp_path / "plain" / "test", MANY)
    both = coco(tmp_path / "coco", THREE, "instances_train.json", "train")
    coco(both, [Picture("d", objects=THREE[0].objects), *MANY[1:]], "instances_test.json", "test")
    by_names = "told by the names of folders and files"
    for root, want, told in (
        (sets, (4, 2), "told by ImageSets/Main (train, val; test)"),
        (yolo(yolo(tmp_path / "yolo", THREE, "train"), MANY, "valid"), (3, 4), by_names),
        (both, (3, 4), by_names),
        (tmp_path / "plain", (3, 4), by_names),
    ):
        assert counts(root) == want and data.inspect_folder(str(root))["split_from"] == told
    assert data.load(str(sets), SIZE)[0].drops == {"in_no_split": 1}  # g


def test_words_that_name_a_split():
    named = {"train": "train train2017 TRAIN_SET training images-train trainval", "test": "test testing Test2007"}
    named |= {"val": "val2017 valid validation dev val_data", None: "trains train_station 2017 latest data images"}
    for split, words in named.items():
        assert {folders.split_of([word]) for word in words.split()} == {split}


def yolo_of(root: Path, text: str, **where: str) -> Path:
    """YOLO images a.. in folders by split, and a data.yaml."""
    for split, ids in where.items():
        yolo(root, [Picture(i) for i in ids], split, names=None)
    (root / "data.yaml").write_text("names: [cat]\n" + text)
    return root


@pytest.mark.parametrize(
    ("text", "files", "want"),
    [
        ("train: images/one\nval: images/two\n", {}, ("abc", "de")),
        ("train: [images/one, images/three]\nval: images/two\n", {}, ("abcf", "de")),
        ("train: images/one\nval: images/two\ntest: images/three\n", {}, ("abcde", "f")),
        ("train: ../images/one\nval: ../images/two\ntest: ../images/gone\n", {}, ("abc", "de")),  # Roboflow's
        ("path: ../elsewhere\ntrain: images/one\nval: images/two\n", {}, ("abc", "de")),
        ("path: images\ntrain: one\nval: two\n", {}, ("abc", "de")),
        ("train: t.txt\nval: v.txt\n", {"t.txt": "./images/one/a.png\nd.png\n", "v.txt": "b.png\n"}, ("ad", "b")),
        ("train: t.txt\nval: v.txt\n", {"t.txt": "/home/me/x/images/one/a.png\n", "v.txt": "C:\\b\\f.png"}, ("a", "f")),
        ("", {"train.txt": "images/one/a.png\n", "test.txt": "images/one/b.png\n"}, ("a", "b")),
    ],
)
def test_the_split_of_data_yaml_is_kept(tmp_path, text, files, want):
    root = yolo_of(tmp_path, text, one="abc", two="de", three="f")
    for name, lines in files.items():
        (root / name).write_text(lines)
    found = data.load(str(root), SIZE)
    assert tuple("".join(i[-1] for i in side.images.ids) for side in found) == want
    left = 6 - sum(len(side) for side in want)
    assert found[0].drops.get("in_no_split", 0) == left and "drawn" not in found[0].describe()


def test_a_split_that_contradicts_itself_or_names_nothing_is_named(tmp_path):
    root = yolo_of(tmp_path, "train: t.txt\nval: images/two\n", one="abc", two="de")
    for lines, reason in (
        ("images/two/d.png\nimages/one/a.png", r"d\.png is in train and in val \(told by data.yaml\)"),
        ("z.png", r"t\.txt .*z\.png"),
    ):
        (root / "t.txt").write_text(lines)
        with pytest.raises(ValueError, match=reason):
            counts(root)
    (root / "data.yaml").write_text("names: [cat]\ntrain: /etc\nval: ../../..\n")  # never outside the folder
    assert "drawn" in data.inspect_folder(str(root))["split_from"]
    (root / "data.yaml").write_text("names: [cat]\ntrain: images\nval: images\n")
    assert "drawn" in data.inspect_folder(str(root))["split_from"]
    root = voc(tmp_path / "voc", splits={"test": ["c"]})
    for lines, reason in (("a b\na", "lists the image id 'a b'"), ("a\na", "lists the image id 'a'"), ("", "empty")):
        (root / "ImageSets" / "Main" / "train.txt").write_text(lines)
        with pytest.raises(ValueError, match=rf"train\.txt.*{reason}"):
            counts(root)
    stray = folder(tmp_path / "stray" / "train").parent
    folder(stray / "test", MANY), image(Picture("extra"), stray)
    with pytest.raises(ValueError, match=r"extra\.png lies in none of the folders train, val, test"):
        counts(stray)


def test_one_coco_file_beside_split_folders_obeys_the_folders(tmp_path):
    for split, pictures in (("train", THREE), ("test", MANY)):
        folder(tmp_path / split, pictures, ".png")
    content = coco_content([*THREE, *MANY])
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert counts(tmp_path) == (3, 4)
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "labels.json").unlink()
    with pytest.raises(ValueError, match="several COCO files .*must say train, val or test"):
        counts(tmp_path)


def test_images_are_found_in_another_form_of_unicode(tmp_path):
    root = coco(tmp_path, [Picture("e\u0301te\u0301"), THREE[1], THREE[2]])
    content = coco_content([Picture("\u00e9t\u00e9"), THREE[1], THREE[2]])
    (root / "annotations" / "instances.json").write_text(json.dumps(content))
    assert counts(root) == (2, 1)


@pytest.mark.parametrize("write", [voc, coco, yolo])
def test_masks_and_previews_beside_a_set_are_left_out_and_named(tmp_path, write):
    root = write(tmp_path)
    for picture in THREE:
        image(picture, root / "masks"), image(picture, root / "preview" / "small")
        image(picture, root / ".hidden"), image(picture, root / "__MACOSX" / "images")
    report = data.inspect_folder(str(root))
    assert [side["images"] for side in report["splits"].values()] == [2, 1]
    assert report["left_out"] == {
        "left out in masks, where no image has a label": 3,
        "left out in preview/small, where no image has a label": 3,
    }


@pytest.mark.parametrize(
    ("name", "content", "tool"),
    [
        ("a.json", {"version": "5", "shapes": [], "imagePath": "a.jpg"}, "LabelMe"),
        ("labels.json", [{"image": "a.jpg", "annotations": []}], "COCO or CreateML"),
        ("project.json", {"_via_img_metadata": {}, "_via_settings": {}}, "VIA"),
        ("labels.xml", "<annotations><image/></annotations>", "CVAT"),
        ("labels.csv", "filename,class,xmin,ymin,xmax,ymax\n", "a CSV table"),
    ],
)
def test_labels_of_a_tool_that_is_not_read_are_an_error_that_names_it(tmp_path, name, content, tool):
    root = folder(tmp_path / "bare")
    (root / "about.csv").write_text("name,price\n"), (root / "package.json").write_text("{}")
    assert counts(root) == (2, 1)
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"has labels of {tool}.*{name}.*convert them to COCO, VOC or YOLO"):
        counts(root)
    labelled = yolo(tmp_path / "labelled")  # beside labels that are read they are told
    (root / name).rename(labelled / name)
    told = f"labels of {tool} beside it, such as {name}, not read"
    assert data.inspect_folder(str(labelled))["left_out"] == {told: 1}
    assert told in data.load(str(labelled), SIZE)[0].describe()


def test_images_nobody_labelled_are_kept_apart_from_negatives(tmp_path):
    """a and b are labelled, c has no object, d and e have no annotation at all, e lies in a folder of its own."""
    pictures = [*THREE[:2], Picture("c", objects=())]
    roots = {write.__name__: write(tmp_path / write.__name__, pictures) for write in (voc, yolo, coco)}
    (roots["yolo"] / "labels" / "c.txt").write_text("")
    for kind, root in roots.items():
        image(Picture("d"), root / ("JPEGImages" if kind == "voc" else "images")), image(Picture("e"), root / "more")
        train, test = data.load(str(root), SIZE)
        told = {}
        for side in (train, test):
            known = [True] * len(side) if side.labelled is None else side.labelled.tolist()
            counted = zip(side.images.ids, known, side.labels.valid.sum(1).tolist(), strict=True)
            told |= {Path(i).stem: (k, n) for i, k, n in counted}
        assert told == {"a": (True, 2), "b": (True, 1), "c": (True, 0), "d": (False, 0), "e": (False, 0)}, kind
        assert len(test) == 1 and test.labelled is None  # the labelled ones are split, the others are for training
        assert "2 images not labelled" in train.describe() and "drawn 80 : 20 of the labelled images" in train.describe()
        assert data.inspect_folder(str(root))["splits"]["train"]["not_labelled"] == 2


def test_labels_that_come_later_change_neither_the_order_of_the_draw_nor_a_told_split(tmp_path):
    """What is named for test is test once it is labelled, and stays; unlabelled images of a told test are left out."""
    root = folder(tmp_path / "drawn", [Picture(f"p{i:02d}") for i in range(20)])
    (first,) = data.load(str(root), SIZE)[1].images.ids
    inside, before = sorted(file.name for file in root.iterdir() if file.name != first), {Path(first).stem}
    for count in (5, 10, 20):
        for name in (first, *inside[: count - 1]):
            xml(Picture(Path(name).stem), root / f"{Path(name).stem}.xml")
        train, test = (side.images.ids for side in data.load(str(root), SIZE))
        assert (len(train), len(test)) == (20 - count // 5, count // 5) and before <= set(test)
        before = set(test)
    told = voc(tmp_path / "told", THREE, splits={"train": "a", "test": "bc"})
    (told / "Annotations" / "b.xml").unlink()
    train, test = data.load(str(told), SIZE)
    assert test.images.ids == ("c",) and train.drops == {"test_not_labelled": 1}
    (told / "Annotations" / "c.xml").unlink()
    with pytest.raises(ValueError, match="no image of test is labelled .* label some of them first: b, c"):
        counts(told)


def test_a_file_that_belongs_to_nothing_is_an_error(tmp_path):
    xml(Picture("alone"), voc_flat(tmp_path / "alone") / "alone.xml")
    (yolo(tmp_path / "yolo") / "labels" / "z.txt").write_text("0 0.5 0.5 0.1 0.1")
    image(THREE[0], voc(tmp_path / "twice") / "JPEGImages", ".jpg")
    image(THREE[0], tmp_path / "single")
    (tmp_path / "none").mkdir()
    (coco(tmp_path / "coco") / "images" / "b.png").unlink()
    for place, reason in (
        ("alone", r"alone\.xml has no image alone"),
        ("yolo", r"z\.txt belongs to no image"),
        ("twice", r"a\.png and .*a\.jpg share the id 'a'"),
        ("single", r"single: 1 image\(s\) cannot be split"),
        ("none", "'.*none' is empty"),
        ("coco", r"image 'b\.png' .*does not exist"),
    ):
        with pytest.raises(ValueError, match=reason):
            counts(tmp_path / place)


def test_a_loop_of_linked_folders_is_an_error(tmp_path):
    root = yolo(tmp_path)
    (root / "images" / "again").symlink_to(root)
    with pytest.raises(ValueError, match="are the same one: a link leads to it a second time"):
        counts(root)


def test_pipes_are_passed_over_and_names_that_are_not_utf8_are_refused(tmp_path):
    root = voc(tmp_path / "set")
    os.mkfifo(root / "JPEGImages" / "pipe.png"), os.mkfifo(root / "Annotations" / "pipe.xml")
    assert counts(root) == (2, 1)
    plain = folder(tmp_path / "plain")
    shutil.copy(plain / "a.jpg", os.path.join(os.fsencode(plain), b"caf\xe9.jpg"))
    with pytest.raises(ValueError, match=r"caf\\udce9\.jpg' is not UTF-8"):
        counts(plain)
    with pytest.raises(ValueError, match="locked.* cannot be read" if os.geteuid() else "is not UTF-8"):
        (plain / "locked").mkdir(mode=0), counts(plain)


def test_inspect_tells_what_load_reads(tmp_path, capsys):
    root = voc(tmp_path / "mine", [*THREE, *MANY], splits={"train": "abd", "test": "ce"}, difficult=[1])
    assert command.main(["inspect", str(root), "--json", "--picture", str(tmp_path / "sheet.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "format": "Pascal VOC",
        "classes": ["cat", "dog"],
        "classes_from": "the objects",
        "split_from": "told by ImageSets/Main (train; test)",
        "left_out": {"in_no_split": 2},
        "splits": {
            "train": {"images": 3, "not_labelled": 0, "boxes": 3, "per_class": {"cat": 2, "dog": 1}, "ids": ["a", "b", "d"]},
            "test": {"images": 2, "not_labelled": 0, "boxes": 2, "per_class": {"cat": 2, "dog": 0}, "ids": ["c", "e"]},
        },
    }
    assert Image.open(tmp_path / "sheet.png").width > 300
    train, test = data.load(str(root), SIZE)
    assert [int(side.class_counts().sum()) for side in (train, test)] == [3, 2]
    assert command.main(["inspect", str(root)]) == 0
    assert "per_class: {cat: 2, dog: 1}" in capsys.readouterr().out
    (root / "Annotations" / "a.xml").write_text("<a>")
    assert command.main(["inspect", str(root)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and "a.xml is truncated" in told.err


def test_limits_are_seeded_and_nested(tmp_path):
    root = voc(tmp_path / "mine", [Picture(f"p{i:02d}") for i in range(20)])
    few, more = (set(data.load(str(root), SIZE, limit=(n, None))[0].images.ids) for n in (5, 9))
    assert len(few) == 5 and len(more) == 9 and few < more
    assert few == set(data.load(str(root), SIZE, limit=(5, 2))[0].images.ids)
    assert [len(side) for side in data.load("digits", 64, limit=(4, None), digits=data.Digits((9, 9)))] == [4, 9]
