"""Labels leave and come back as they were: every format, odd names, and what is refused before anything is written."""

import csv
import json
import math
import os
from pathlib import Path

import miniatures
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedal_utils.data import classification as class_sets
from fedal_utils.data import exchange
from fedal_utils.data import readers as data
from fedal_utils.data.exchange import Box, Item

CLASSES = ["cat", "dog"]
ITEMS = [
    Item("a.png", None, (40, 60), [Box("cat", 10.0, 5.0, 30.25, 25.0), Box("dog", 40.0, 10.0, 60.0, 40.0)]),
    Item("b.png", None, (60, 40), []),
    Item("far/off/c.v2.png", None, (50, 50), [Box("cat", 0.0, 0.0, 0.1, 50.0)]),
]


def written(folder):
    """Every file below a folder and its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def export(kind, folder, items=ITEMS, classes=CLASSES):
    """What a format reads back after writing."""
    if kind == "coco":
        return exchange.read_coco(exchange.write_coco(folder / "labels.json", items, classes))
    if kind == "csv":
        return exchange.read_csv(exchange.write_csv(folder / "labels.csv", items))
    write, read = {"yolo": (exchange.write_yolo, exchange.read_yolo), "voc": (exchange.write_voc, exchange.read_voc)}[
        kind
    ]
    return read(write(folder / kind, items, classes))


KINDS = ("coco", "yolo", "voc", "csv")
EXACT = ("coco", "voc", "csv")


def close(found, items):
    """Equal, but for corners that moved by at most 1e-9 of the image's side."""
    assert [(i.image, i.file, i.size, [b.name for b in i.label]) for i in found] == [
        (i.image, i.file, i.size, [b.name for b in i.label]) for i in items
    ]
    for one, other in zip(found, items, strict=True):
        height, width = one.size
        for a, b in zip(one.label, other.label, strict=True):
            assert abs(a.x1 - b.x1) <= 1e-9 * width >= abs(a.x2 - b.x2)
            assert abs(a.y1 - b.y1) <= 1e-9 * height >= abs(a.y2 - b.y2)
            assert 0 <= a.x1 < a.x2 <= width and 0 <= a.y1 < a.y2 <= height


# --------------------------------------------------------------------------------------------------------- round trips

text = st.text(
    st.one_of(
        st.sampled_from(list(" ,;:'\"<>&|#%=+-_@![]{}()0123abcXYZ\u00e9\u00df\u4e2d\u00a0\ufeff\U0001f600")),
        st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Cn")),
    ),
    min_size=1,
    max_size=12,
)
odd = st.sampled_from(
    ["<b>", "a,b", 'say "hi"', "it's", "null", "1", "yes", "- x", "a: b", "=1+1", "#", "~", "two  gaps"]
)
names = st.one_of(odd, text.filter(lambda t: t == t.strip()))
part = text.filter(lambda t: not t.startswith(".") and not set(t) & set("/\\:") and len(t.encode()) < 100)
ids = st.lists(part, min_size=1, max_size=3).map("/".join)


def sides(side):
    """Two different places in 0..side, often its edges."""
    place = st.one_of(st.sampled_from([0.0, float(side), 0.1, side / 3]), st.floats(0, side, allow_subnormal=False))
    return st.tuples(place, place).map(sorted).filter(lambda p: p[1] - p[0] > 2e-9 * side)


@st.composite
def labelled(draw):
    classes = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    items, places = (
        [],
        draw(st.lists(ids, min_size=1, max_size=4, unique_by=lambda i: data._key(Path(i), Path()).lower())),
    )
    for place in places:
        height, width = draw(st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
        boxes = []
        for _ in range(draw(st.integers(0, 3))):
            (x1, x2), (y1, y2) = draw(sides(width)), draw(sides(height))
            boxes.append(Box(draw(st.sampled_from(classes)), x1, y1, x2, y2))
        items.append(Item(f"{place}.{draw(st.sampled_from(['png', 'JPG', 'jpeg']))}", None, (height, width), boxes))
    return items, classes


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(case=labelled())
def test_what_goes_out_comes_back(kind, case, tmp_path_factory):
    items, classes = case
    found = export(kind, tmp_path_factory.mktemp("trip"), items, classes)
    if kind in EXACT:
        assert found == items
    else:
        close(found, items)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_by_hand(kind, tmp_path):
    found = export(kind, tmp_path)
    close(found, ITEMS)
    assert kind == "yolo" or found == ITEMS
    assert not [p for p in tmp_path.rglob(".*")]  # nothing is left of the writing


def test_corners_that_a_coco_box_cannot_hold_are_kept_while_they_agree_with_it(tmp_path):
    x1, x2 = 2.0**-53, 1 + 2.0**-52  # no float w has x1 + w == x2: both neighbours round to another even number
    assert all(x1 + w != x2 for w in (x2 - x1, math.nextafter(x2 - x1, 0), math.nextafter(x2 - x1, 2)))
    items = [Item("a.png", None, (4, 4), [Box("cat", x1, 0.0, x2, 1.0), Box("cat", 1.0, 1.0, 3.0, 3.0)])]
    path = exchange.write_coco(tmp_path / "a.json", items, CLASSES)
    assert exchange.read_coco(path) == items
    content = json.loads(path.read_text())
    assert ["corners" in entry for entry in content["annotations"]] == [True, False]
    content["annotations"][0]["bbox"][2] = 2.0  # another tool moved the edge
    path.write_text(json.dumps(content))
    assert exchange.read_coco(path)[0].label[0] == Box("cat", x1, 0.0, 2.0, 1.0)


def test_a_csv_holds_classes_of_whole_images_beside_boxes_and_images_without_size(tmp_path):
    items = [
        Item("a.png", None, None, 'grey, "old" <cat>'),
        Item("b.png", None, (3, 4), "dog"),
        Item("c.png", None, None, []),
        Item("d.png", None, (3, 4), [Box("dog", 0.0, 0.0, 4.0, 3.0)]),
    ]
    path = exchange.write_csv(tmp_path / "a.csv", items)
    assert exchange.read_csv(path) == items
    with path.open(newline="") as source:
        rows = list(csv.reader(source))
    assert rows[0] == "image class x1 y1 x2 y2 height width".split()
    assert rows[1] == ["a.png", 'grey, "old" <cat>', "", "", "", "", "", ""]
    assert rows[4] == ["d.png", "dog", "0.0", "0.0", "4.0", "3.0", "3", "4"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets save it
    assert exchange.read_csv(path) == items


def test_files_and_ids_without_an_ending(tmp_path):
    """An id 'a' whose file is a.png: named a.png outside, 'a' again after the import; files beside are found."""
    picture = miniatures.Picture("far/a", (40, 60))
    for folder in ("", "yolo/images", "voc/JPEGImages"):
        miniatures.image(picture, tmp_path / folder)
    for kind, folder in (("coco", ""), ("csv", ""), ("yolo", "yolo/images"), ("voc", "voc/JPEGImages")):
        file = tmp_path / folder / "far" / "a.png"
        item = Item("far/a", file, (40, 60), [Box("cat", 15.0, 10.0, 30.0, 20.0)])
        (found,) = export(kind, tmp_path, [item])
        assert found.image == "far/a" and found.size == (40, 60) and found.label[0].name == "cat"
        assert found.file == (None if kind == "csv" else file)  # a CSV has the id alone
    assert json.loads((tmp_path / "labels.json").read_text())["images"][0]["file_name"] == "far/a.png"


# ------------------------------------------------------------------------------------------------- as `data` reads it

PICTURES = miniatures.THREE + tuple(
    miniatures.Picture(f"n{i}", (30 + i, 40), (("dog", (i, 2.5, i + 10.25, 20)),)) for i in range(3)
)


def items_of(pictures):
    return [Item(f"{p.id}.png", None, p.size, [Box(n, *map(float, box)) for n, box in p.objects]) for p in pictures]


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_data_reads_an_export_beside_its_images_as_it_reads_the_miniature(kind, tmp_path):
    ours = tmp_path / "ours"
    if kind == "coco":
        exchange.write_coco(ours / "annotations" / "instances.json", items_of(PICTURES), CLASSES)
        theirs = miniatures.coco(tmp_path / "theirs", PICTURES)
    elif kind == "yolo":
        exchange.write_yolo(ours, items_of(PICTURES), CLASSES)
        theirs = miniatures.yolo(tmp_path / "theirs", PICTURES)
    else:
        exchange.write_voc(ours, items_of(PICTURES), CLASSES)
        theirs = miniatures.voc(tmp_path / "theirs", PICTURES)
    for picture in PICTURES:
        miniatures.image(picture, ours / ("JPEGImages" if kind == "voc" else "images"))
    for found, want in zip(data.load(str(ours), 32), data.load(str(theirs), 32), strict=True):
        assert found.images.ids == want.images.ids and found.class_names == want.class_names == tuple(CLASSES)
        assert torch.equal(found.images.pixels, want.images.pixels)
        assert torch.allclose(found.labels.boxes, want.labels.boxes, atol=1e-5)
        assert torch.equal(found.labels.classes, want.labels.classes)


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_what_others_wrote_comes_in_with_sizes_and_files(kind, tmp_path):
    if kind == "coco":
        miniatures.coco(tmp_path, PICTURES)
        found = exchange.read_coco(tmp_path / "annotations" / "instances.json", tmp_path / "images")
        ending = ".png"
    elif kind == "yolo":
        found, ending = exchange.read_yolo(miniatures.yolo(tmp_path, PICTURES)), ""
    else:
        found, ending = exchange.read_voc(miniatures.voc(tmp_path, PICTURES)), ""
        miniatures.voc(tmp_path / "one", PICTURES, one_based=True)
        assert [i.label for i in exchange.read_voc(tmp_path / "one", one_based=True)] == [i.label for i in found]
    want = [Item(i.image.removesuffix(".png") + ending, None, i.size, i.label) for i in items_of(PICTURES)]
    assert all(item.file.is_file() and item.file.stem == item.image.removesuffix(".png") for item in found)
    close([Item(i.image, None, i.size, i.label) for i in found], want)


def test_class_folders_are_a_list_that_class_sets_reads_once_it_is_copied(tmp_path):
    items = []
    for i in range(4):
        picture = miniatures.Picture(f"{i % 2}/{i}", (20, 20), ())
        items.append(Item(f"{picture.id}.png", miniatures.image(picture, tmp_path / "from"), None, CLASSES[i // 2]))
    listed = exchange.class_folders(items)
    assert [place for place, _ in listed] == ["cat/0-0.png", "cat/1-1.png", "dog/0-2.png", "dog/1-3.png"]
    for place, file in listed:
        (tmp_path / "to" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "to" / place).write_bytes(file.read_bytes())
    train, test = class_sets.load(str(tmp_path / "to"), 20)
    assert train.class_names == tuple(CLASSES) and {*train.images.ids, *test.images.ids} >= {"cat/0-0.png"}
    with pytest.raises(ValueError, match="images 'a/b.png' and 'a-b.png' would share the place 'cat/a-b.png'"):
        exchange.class_folders([Item("a/b.png", None, None, "cat"), Item("a-b.png", None, None, "cat")])
    for label, message in (("a/b", "it has a '/'"), ("..", "no name of a file"), ([], "has boxes")):
        with pytest.raises(ValueError, match=message):
            exchange.class_folders([Item("a.png", None, None, label)])


# ------------------------------------------------------------------------------------------------ what stays as it was


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_export_replaces_the_first_one_and_nothing_else(kind, tmp_path):
    export(kind, tmp_path)
    place = tmp_path / kind / "images" / "b.png"
    if kind in ("yolo", "voc"):
        place.parent.mkdir()
        place.write_bytes(b"an image of the user")
    fewer = [ITEMS[2], Item("new.png", None, (9, 9), [])]
    found = export(kind, tmp_path, fewer)
    assert [item.image for item in found] == ["far/off/c.v2.png", "new.png"]
    if kind in ("yolo", "voc"):
        assert place.read_bytes() == b"an image of the user"
        assert not [name for name in written(tmp_path) if "/a." in name]  # labels of images that are gone


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_while_writing_leaves_the_first_export_whole(kind, tmp_path, monkeypatch):
    export(kind, tmp_path)
    before = written(tmp_path)
    with pytest.raises(ValueError, match="box"):  # found before anything is touched
        export(kind, tmp_path, [*ITEMS, Item("bad.png", None, (9, 9), [Box("cat", 5, 5, 5, 9)])])
    assert written(tmp_path) == before
    where, fatal = ("replace", 1) if kind in ("coco", "csv") else ("rename", 4)  # of a folder, in the middle
    real, calls = getattr(os, where), []

    def failing(source, target):
        calls.append(source)
        if len(calls) == fatal:
            raise OSError("the disk is gone")
        return real(source, target)

    monkeypatch.setattr(exchange.os, where, failing)
    with pytest.raises(OSError, match="the disk is gone"):
        export(kind, tmp_path, ITEMS[:1])
    assert written(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_what_cannot_be_put_back_stays_beside_the_folder(tmp_path, monkeypatch):
    export("voc", tmp_path)
    before, real, calls = written(tmp_path / "voc"), os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) > 1:  # the old annotations are out, nothing works any more
            raise OSError("the disk is gone")
        return real(source, target)

    monkeypatch.setattr(exchange.os, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        export("voc", tmp_path, ITEMS[:1])
    (kept,) = tmp_path.glob(".written-before-*")
    assert written(kept) | written(tmp_path / "voc") == before


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_a_folder_with_foreign_files_is_not_touched(kind, tmp_path):
    for name in ("notes.txt", "labels/mine.txt", "Annotations/mine.xml", "data.yaml", "labels/mine.png"):
        folder = tmp_path / name.replace("/", "-")
        (folder / kind / name).parent.mkdir(parents=True)
        (folder / kind / name).write_text("precious")
        if name == "labels/mine.png" and kind == "voc":
            continue  # an image in a folder that VOC does not use is fine
        before = written(folder)
        with pytest.raises(ValueError, match="is no image and of no export"):
            export(kind, folder)
        assert written(folder) == before
    both = tmp_path / "both"  # YOLO over VOC would leave annotations of both
    exchange.write_voc(both, ITEMS, CLASSES)
    with pytest.raises(ValueError, match="of no export"):
        exchange.write_yolo(both, ITEMS, CLASSES)
    export(kind, tmp_path / "later")
    annotation = next(p for p in (tmp_path / "later").rglob("*") if p.stem == "a")
    annotation.with_stem("by_hand").write_text("precious")
    with pytest.raises(ValueError, match="by_hand"):
        export(kind, tmp_path / "later")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        exchange.write_voc(tmp_path / "file", ITEMS, CLASSES)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/a.png",
        "../a.png",
        "a/../../b.png",
        "a//b.png",
        "./a.png",
        ".a.png",
        "a/.b/c.png",
        "C:/a.png",
        "a\\..\\b.png",
        "a\nb.png",
        "a\x00.png",
        "a/",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_images_that_leave_the_folder_are_refused(kind, name, tmp_path):
    with pytest.raises(ValueError, match="no name of a file below a folder"):
        export(kind, tmp_path, [Item(name, None, (9, 9), [])])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("items", "classes", "message"),
    [
        ([], CLASSES, "the list of items is empty"),
        ([ITEMS[1], ITEMS[1]], CLASSES, "image 'b.png' occurs more than once"),
        ([Item("a.png", None, (9, 9), "cat")], CLASSES, "'a.png' has the class 'cat'.* write it as CSV"),
        ([Item("a.png", None, None, [])], CLASSES, "'a.png' has no size"),
        ([Item("a.png", None, (0, 9), [])], CLASSES, r"size \(0, 9\)"),
        ([Item("a.png", None, (9.5, 9), [])], CLASSES, r"size \(9.5, 9\)"),
        ([Item("a.png", None, (9, 9), None)], CLASSES, "label None; a class or a list"),
        ([Item("a.png", None, (9, 9), [Box("fox", 0, 0, 1, 1)])], CLASSES, "class 'fox'; allowed are .'cat', 'dog'."),
        ([Item("a.png", None, (9, 9), [Box("cat", 0, 0, math.nan, 1)])], CLASSES, "needed is 0 <= x1 < x2 <= 9"),
        ([Item("a.png", None, (9, 9), [Box("cat", 0, 0, math.inf, 1)])], CLASSES, "needed is 0 <= x1 < x2 <= 9"),
        ([Item("a.png", None, (9, 8), [Box("cat", 0, 0, 9, 1)])], CLASSES, "needed is 0 <= x1 < x2 <= 8"),
        ([Item("a.png", None, (9, 9), [Box("cat", -0.1, 0, 9, 1)])], CLASSES, "needed is 0 <= x1 < x2"),
        ([Item("a.png", None, (9, 9), [Box("cat", 5, 0, 4, 1)])], CLASSES, "needed is 0 <= x1 < x2"),
        (ITEMS, [], "one or more classes"),
        (ITEMS, ["cat", "dog", "cat"], "each once, got"),
        (ITEMS, ["cat", "dog", " fox"], "class ' fox' cannot be written"),
        (ITEMS, ["cat", "dog", "a\nb"], "cannot be written"),
        (ITEMS, ["cat", "dog", ""], "class '' cannot be written"),
        ([Item("a.png", None, (9, 9), []), Item("a", Path("x/a.png"), (9, 9), [])], CLASSES, "would share the"),
    ],
)
@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_what_could_not_come_back_is_refused(kind, items, classes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(kind, tmp_path, items, classes)
    assert not list(tmp_path.iterdir())


def test_labels_beside_each_other_need_names_of_their_own(tmp_path):
    for other in ("a.jpg", "images/a.png"):  # a YOLO reader could not tell them apart
        with pytest.raises(ValueError, match="images 'a.png' and .* would share the annotation labels/"):
            exchange.write_yolo(tmp_path / "y", [ITEMS[0], Item(other, None, (9, 9), [])], CLASSES)
    items = [ITEMS[0], Item("a.jpg", None, (9, 9), [])]
    assert export("coco", tmp_path, items) == export("csv", tmp_path, items) == items
    with pytest.raises(ValueError, match="too thin for fractions"):
        exchange.write_yolo(tmp_path / "y", [Item("a.png", None, (9, 9), [Box("cat", 1, 1, 1 + 1e-9, 2)])], CLASSES)
    assert yaml.safe_load(
        (exchange.write_yolo(tmp_path / "y", ITEMS, ["1", "yes", *CLASSES]) / "data.yaml").read_text()
    )["names"] == ["1", "yes", "cat", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,class,x1,y1,x2\na,b,1,2,3\n", "no column 'y2'"),
        ("image,class,x1,y1,x2,y2\na.png,cat,1,2,3\n", "line 2 has more or fewer fields"),
        ("image,class,x1,y1,x2,y2\na.png,cat,1,2,3,4,5\n", "line 2 has more or fewer fields"),
        ("image,class,x1,y1,x2,y2\na.png,cat,1,2,3,four\n", "line 2 has the corners"),
        ("image,class,x1,y1,x2,y2\na.png,cat,1,2,3,\n", "line 2 has the corners"),
        ("image,class,x1,y1,x2,y2\na.png,cat,1,2,3,4\n", "'a.png' has no size, and there is no file"),
        ("image,class,x1,y1,x2,y2\n../a.png,cat,,,,\n", "no name of a file below"),
        ("image,class,x1,y1,x2,y2\na.png,cat,,,,\na.png,dog,,,,\n", "line 2 is the whole label of image 'a.png'"),
        ("image,class,x1,y1,x2,y2,height,width\na.png,,1,2,3,4,9,9\n", "a box without a class"),
        ("image,class,x1,y1,x2,y2,height,width\na.png,cat,3,2,1,4,9,9\n", "is inverted"),
        ("image,class,x1,y1,x2,y2,height,width\na.png,cat,nan,2,1,4,9,9\n", "not finite"),
        ("image,class,x1,y1,x2,y2,height,width\na.png,cat,1,2,3,4,9,-9\n", "height '9' and width '-9'"),
        (
            "image,class,x1,y1,x2,y2,height,width\na.png,cat,1,2,3,4,9,9\na.png,cat,1,2,3,4,9,8\n",
            r"line 3 has the size \(9, 8\) of image 'a.png', an earlier line \(9, 9\)",
        ),
        ('image,class,x1,y1,x2,y2\na.png,"cat,,,,\n', "truncated or not CSV"),
    ],
)
def test_a_broken_csv_is_an_error_that_names_line_and_value(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        exchange.read_csv(tmp_path / "a.csv")


def test_broken_exports_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        exchange.read_csv(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="no annotation"):
        exchange.read_voc(tmp_path)
    exchange.write_yolo(tmp_path / "yolo", ITEMS, CLASSES)
    (tmp_path / "yolo" / "labels" / "a.txt").unlink()
    with pytest.raises(ValueError, match="labels/a.txt does not exist, but .*exported.csv lists it"):
        exchange.read_yolo(tmp_path / "yolo")
    path = exchange.write_coco(tmp_path / "a.json", ITEMS, CLASSES)
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'a.png' has a crowd region of 'cat'"):
        exchange.read_coco(path)
    content["images"][0]["file_name"] = "../a.png"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image '../a.png' is no name"):
        exchange.read_coco(path)
    miniatures.cut(path)
    with pytest.raises(ValueError, match="truncated or not JSON"):
        exchange.read_coco(path)


# -------------------------------------------------------------------------------------------------------- Label Studio


def region(kind, value, **more):
    sizes = {} if kind == "choices" else {"original_width": 200, "original_height": 100, "image_rotation": 0}
    return {"type": kind, "from_name": "f", "to_name": "image", "value": value} | sizes | more


def rectangle(name, x, y, width, height, rotation=0, **more):
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation, "rectanglelabels": [name]}
    return region("rectanglelabels", value, **more)


def choice(name):
    return region("choices", {"choices": [name]})


def task(number, *results, image=None, cancelled=()):
    annotations = [{"id": i, "was_cancelled": i in cancelled, "result": result} for i, result in enumerate(results)]
    guess = [{"result": [choice("guessed")]}]
    return {"id": number, "data": {"image": image or f"{number}.png"}, "annotations": annotations, "predictions": guess}


def studio(folder, *tasks):
    (folder / "export.json").write_text(json.dumps(tasks))
    return exchange.read_label_studio(folder / "export.json")


def test_rectangles_of_label_studio_by_hand(tmp_path):
    # 200 x 100 pixels: 10 % and 25 % of the width are 20 and 50; 20 % and 60 % of the height 20 and 60
    first = [rectangle("cat", 10, 20, 25, 60), rectangle("dog", 50, 0, 50, 100)]
    found = studio(tmp_path, task(1, first), task(2, []))
    assert found == [
        Item("1.png", None, (100, 200), [Box("cat", 20, 20, 70, 80), Box("dog", 100, 0, 200, 100)]),
        Item("2.png", None, None, []),
    ]
    miniatures.image(miniatures.Picture("2", (40, 60)), tmp_path)  # now its size is known
    assert studio(tmp_path, task(2, []))[0] == Item("2.png", tmp_path / "2.png", (40, 60), [])


def test_the_last_annotation_that_was_not_cancelled_counts_and_unfinished_tasks_are_left_out(tmp_path):
    results = [[choice("cat")], [choice("dog")], [choice("fox")]]
    found = studio(
        tmp_path, task(1, *results, cancelled=[2]), task(2, *results), task(3), task(4, *results, cancelled=[0, 1, 2])
    )
    assert [(item.image, item.label) for item in found] == [("1.png", "dog"), ("2.png", "fox")]


@pytest.mark.parametrize(
    ("told", "image"),
    [
        ("/data/upload/3/0f3a1b2c-my%20cat.png", "my cat.png"),
        ("/data/upload/3/holiday-cat.png", "holiday-cat.png"),
        ("/data/local-files/?d=pool/far/a%20b.png", "pool/far/a b.png"),
        ("s3://bucket/pool/a.png", "a.png"),
        ("https://host/pool/a.png?token=1", "a.png"),
        ("far/a.png", "far/a.png"),
    ],
)
def test_ids_of_images_of_label_studio(told, image, tmp_path):
    assert studio(tmp_path, task(1, [choice("cat")], image=told))[0].image == image
    one = task(1, [choice("cat")])
    one["data"] = {"picture": told}
    assert studio(tmp_path, one)[0].image == image


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            [task(7, [region("polygonlabels", {"polygonlabels": ["cat"]})])],
            "task 7 has a region of type 'polygonlabels'",
        ),
        ([task(7, [region("brushlabels", {})])], "task 7 has a region of type 'brushlabels'"),
        ([task(7, [{"type": "relation"}])], "task 7 has a region of type 'relation'"),
        ([task(7, [rectangle("cat", 1, 1, 9, 9, rotation=3)])], "task 7 has a rotated rectangle of 'cat'"),
        ([task(7, [rectangle("cat", 1, 1, 9, 9, image_rotation=90)])], "task 7 has a rotated rectangle of 'cat'"),
        ([task(7, [rectangle("cat", 1, "1", 9, 9)])], "task 7 has a rectangle with x, y"),
        ([task(7, [rectangle("cat", 101, 1, 9, 9)])], "task 7.* lies outside"),
        ([task(7, [rectangle("cat", 1, 1, -9, 9)])], "task 7.* is inverted"),
        ([task(7, [rectangle("cat", 1, 1, 9, 9, original_width=None)])], "task 7 has original_height 100"),
        (
            [task(7, [rectangle("cat", 1, 1, 9, 9), rectangle("cat", 1, 1, 9, 9, original_width=201)])],
            "task 7 tells several sizes",
        ),
        ([task(7, [region("choices", {"choices": ["a", "b"]})])], r"task 7 has choices \['a', 'b'\]; exactly one"),
        ([task(7, [choice("a"), choice("b")])], "task 7 has 2 choices and 0 rectangles"),
        ([task(7, [choice("a"), rectangle("cat", 1, 1, 9, 9)])], "task 7 has 1 choices and 1 rectangles"),
        ([task(7, []), task(8, [choice("a")])], "task 7 has no choice, but other tasks have one"),
        ([task(7, [choice("a")], image="../a.png")], "task 7: image '../a.png' is no name"),
        ([task(7, [choice("a")]), task(8, [choice("a")], image="7.png")], "image '7.png' occurs more than once"),
        ([{"id": 7, "image": "a.png", "choice": "cat"}], "task 7 has no list 'annotations'.*not JSON-MIN"),
        ([{"id": 7, "data": {"a": "x", "b": "y"}, "annotations": [{"result": []}]}], "task 7 has the data"),
        ([{"dataset": {}}], "no list of tasks with ids"),
    ],
)
def test_what_label_studio_may_tell_but_a_box_cannot_names_the_task(tasks, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        studio(tmp_path, *tasks)


def test_a_box_of_label_studio_that_overshoots_is_clipped(tmp_path):
    (item,) = studio(tmp_path, task(1, [rectangle("cat", -0.001, 0, 100.01, 100.0000001)]))
    assert item.label == [Box("cat", 0, 0, 200, 100)]
