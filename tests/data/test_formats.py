"""Every format on a miniature of its layout, out and in again to the last bit, and every bad input by name."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import miniatures
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniatures import KITTI, THREE, Picture, coco, coco_content, kitti, kitti_line, voc, xml, yolo

from fedal_utils import data
from fedal_utils.data import Object, Record, formats_txt
from fedal_utils.data.files import NOT_DATA

SIZE = (48, 64)
LONG = (37, 124)  # the shape of KITTI's images, a tenth of the size


def objects(dataset: data.Dataset, row: int) -> list[tuple[str, tuple[float, ...], bool, bool]]:
    """(class, box, ignore, crowd) of one image, boxes back in original pixels."""
    labels = dataset.labels
    back = data.to_original(labels.boxes, dataset.images.sizes, dataset.images.image_size)
    return [
        (dataset.class_names[c - 1], tuple(round(v, 3) for v in back[row, k].tolist()), bool(i), bool(w))
        for k, (c, i, w) in enumerate(zip(labels.classes[row], labels.ignore[row], labels.crowd[row], strict=True))
        if c > 0
    ]


def assert_reads(dataset: data.Dataset, pictures=THREE) -> None:
    """The boxes of the pictures, each where its picture is bright."""
    by_id = {picture.id: picture for picture in pictures}
    for row, full in enumerate(dataset.images.ids):
        picture = by_id[Path(full).stem]
        want = [(name, pytest.approx(box, abs=1e-3), False, False) for name, box in picture.objects]
        assert objects(dataset, row) == want
        assert tuple(dataset.images.sizes[row].tolist()) == picture.size
        for k in range(len(picture.objects)):
            x1, y1, x2, y2 = dataset.labels.boxes[row, k].round().long().tolist()
            assert dataset.images.pixels[row, :, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().mean() > 150


def read(kind: str, root: Path, pictures=THREE, image_size=SIZE, **options) -> data.Dataset:
    """The pictures written in a format and read back as a Dataset."""
    if kind == "coco":
        coco(root, pictures)
        records = data.read_coco(root / "annotations" / "instances.json", root / "images")
    else:
        {"voc": voc, "yolo": yolo}[kind](root, pictures)
        records = {"voc": data.read_voc, "yolo": data.read_yolo}[kind](root)
    return data.assemble("set", records, image_size, **options)


@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
def test_a_format_is_read_as_written(tmp_path, kind):
    dataset = read(kind, tmp_path)
    assert {Path(i).stem for i in dataset.images.ids} == set("abc") and dataset.class_names == ("cat", "dog")
    assert dataset.images.pixels.shape == (3, 3, *SIZE) and dataset.drops == {}
    assert_reads(dataset)


def test_voc_that_counts_from_one_gives_the_same_boxes(tmp_path):
    root = voc(tmp_path, one_based=True)
    records = [data.formats_voc.voc_record(r.id, r.file, r.source, one_based=True) for r in data.read_voc(root)]
    assert_reads(data.assemble("s", records, SIZE))
    assert objects(data.assemble("s", data.read_voc(root), SIZE), 0)[0][1] == (11, 6, 30, 25)


def test_difficult_crowd_and_too_small_objects_are_ignored_and_counted(tmp_path):
    root = voc(tmp_path, difficult=[1])
    dataset = data.assemble("s", data.read_voc(root), (40, 60), ("dog", "mouse", "cat"), min_object=21)
    # a: cat 20 x 20 is too small, dog is difficult (and counted once); b at scale 2/3: 21.3 x 28 will do;
    # c at scale 0.8: 20 x 40 is too small
    assert [o[2] for row in range(3) for o in objects(dataset, row)] == [True, True, False, True]
    assert dataset.drops == {"difficult": 1, "too_small": 2} and dataset.labels.valid.sum(1).tolist() == [0, 1, 0]
    assert dataset.labels.classes[0].tolist() == [3, 1]  # the classes given set the order
    content = coco_content()
    content["annotations"][1]["iscrowd"] = 1
    file = coco(tmp_path / "coco") / "annotations" / "instances.json"
    file.write_text(json.dumps(content))
    dataset = data.assemble("s", data.read_coco(file, file.parents[1] / "images"), SIZE)
    assert [o[2:] for o in objects(dataset, 0)] == [(False, False), (True, True)] and dataset.drops == {"crowd": 1}


def test_kitti_cuts_corners_and_drops_what_it_was_not_asked_for(tmp_path):
    records = formats_txt.kitti_records(kitti(tmp_path), ("Car", "Pedestrian"))
    dataset = data.assemble("s", records, LONG, ("Car", "Pedestrian"))
    assert objects(dataset, 0) == [("Car", pytest.approx((10, 5, 30, 25), abs=1e-3), False, False)]
    assert dataset.labels.valid.sum(1).tolist() == [1, 2, 0, 0, 0, 0, 1, 0, 2, 0, 1, 1]
    assert dataset.drops == {"dont_care": 2, "other_class": 8} and "6 images without objects" in dataset.describe()
    whole = [
        Picture(p.id, p.size, tuple((n, tuple(map(int, b))) for n, b in p.objects if n != "DontCare")) for p in KITTI
    ]
    assert_reads(data.assemble("s", formats_txt.kitti_records(tmp_path), LONG, formats_txt.KITTI_CLASSES), whole)


def test_kitti_agrees_with_torchvisions_reader(tmp_path):
    from torchvision.datasets import Kitti

    theirs = Kitti(str(kitti(tmp_path / "Kitti" / "raw").parents[1]))
    ours = {record.id: record for record in formats_txt.kitti_records(tmp_path / "Kitti" / "raw")}
    assert len(theirs) == len(ours) == 12
    for n, file in enumerate(theirs.images):
        want = [(t["type"], tuple(map(int, t["bbox"]))) for t in theirs[n][1] if t["type"] != "DontCare"]
        assert [(thing.name, thing.box) for thing in ours[Path(file).stem].objects] == want


def test_coco_agrees_with_pycocotools_index(tmp_path):
    from pycocotools.coco import COCO

    file = coco(tmp_path) / "annotations" / "instances.json"
    theirs = COCO(str(file))
    names = {c["id"]: c["name"] for c in theirs.loadCats(theirs.getCatIds())}
    for record, image in zip(
        data.read_coco(file, tmp_path / "images"), theirs.loadImgs(theirs.getImgIds()), strict=True
    ):
        found = theirs.loadAnns(theirs.getAnnIds(image["id"]))
        want = [(names[a["category_id"]], (x, y, x + w, y + h)) for a in found for x, y, w, h in [a["bbox"]]]
        assert record.id == image["file_name"] and [(t.name, t.box) for t in record.objects] == want


def test_roboflows_unused_root_category_is_no_class(tmp_path):
    content = coco_content()
    content["categories"] = [{"id": 0, "name": "animals", "supercategory": "none"}] + [
        c | {"supercategory": "animals"} for c in content["categories"]
    ]
    file = coco(tmp_path) / "annotations" / "instances.json"
    file.write_text(json.dumps(content))
    assert data.load(str(tmp_path), SIZE)[0].class_names == ("cat", "dog")


CLASSES = ["cat", "dog"]
RECORDS = [
    Record("a.png", None, (40, 60), (Object("cat", (10.0, 5.0, 30.25, 25.0)), Object("dog", (40.0, 10.0, 60.0, 40.0)))),
    Record("b.png", None, (60, 40), ()),
    Record("far/off/c.v2.png", None, (50, 50), (Object("cat", (0.0, 0.0, 0.1, 50.0)),)),
]
text = st.text(
    st.one_of(
        st.sampled_from(list(" ,;:'\"<>&|#%=+-_@![]{}()0123abcXYZ\u00e9\u00df\u4e2d\u00a0\ufeff\U0001f600")),
        st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Cn")),
    ),
    min_size=1,
    max_size=12,
)
odd = st.sampled_from(
    ["<b>", "a,b", 'say "hi"', "null", "1", "010", "yes", "- x", "a: b", "=1+1", "#", "~", "two  gaps"]
)
names = st.one_of(odd, text.filter(lambda t: t == t.strip() and "\\" not in t))
part = text.filter(lambda t: t[0] != "." and t not in NOT_DATA and not set(t) & set("/\\:") and len(t.encode()) < 100)


@st.composite
def labelled(draw, flags: bool):
    """Records whose boxes end on thousandths of a pixel or at odd floats, and their classes."""
    classes = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    ids = st.lists(part, min_size=1, max_size=3).map("/".join)
    places = draw(st.lists(ids, min_size=1, max_size=4, unique_by=lambda i: data.files.key_of(Path(i), Path()).lower()))
    records = []
    for place in places:
        height, width = draw(st.tuples(st.integers(1, 5000), st.integers(1, 5000)))

        def sides(side: int):
            at = st.one_of(st.sampled_from([0.0, float(side), side / 3, side / 7]), st.floats(1e-3, side))
            return draw(st.tuples(at, at).map(sorted).filter(lambda p: p[1] - p[0] > 1e-6 * side))

        things = []
        for _ in range(draw(st.integers(0, 3))):
            (x1, x2), (y1, y2) = sides(width), sides(height)
            flag = [flags and draw(st.booleans()) for _ in range(2)]
            things.append(Object(draw(st.sampled_from(classes)), (x1, y1, x2, y2), *flag))
        records.append(Record(f"{place}.{draw(st.sampled_from(['png', 'JPG']))}", None, (height, width), tuple(things)))
    return records, classes


QUIET = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@QUIET
@given(case=labelled(flags=True))
def test_coco_comes_back_exactly(case, tmp_path_factory):
    records, classes = case
    found = data.read_coco(data.write_coco(tmp_path_factory.mktemp("trip") / "a.json", records, classes))
    for one, other in zip(found, records, strict=True):  # x1 + width may miss x2 by its last bit, where floats tie
        assert one == replace(other, objects=one.objects)
        for a, b in zip(one.objects, other.objects, strict=True):
            assert a == replace(b, box=a.box) and a.box[:2] == b.box[:2]
            assert all(
                x in (y, math.nextafter(y, 0), math.nextafter(y, 1e9)) for x, y in zip(a.box, b.box, strict=True)
            )


@QUIET
@given(case=labelled(flags=False), difficult=st.booleans())
def test_voc_comes_back_exactly(case, difficult, tmp_path_factory):
    records, classes = case
    if difficult:
        records = [replace(r, objects=tuple(replace(t, difficult=True) for t in r.objects)) for r in records]
    found = data.read_voc(data.write_voc(tmp_path_factory.mktemp("trip") / "v", records, classes))
    assert sorted(found, key=lambda r: r.id) == sorted(records, key=lambda r: r.id)


@QUIET
@given(case=labelled(flags=False))
def test_yolo_comes_back_exactly_beside_images_of_the_same_size(case, tmp_path_factory):
    from fedal_utils.data.formats import settled
    from fedal_utils.data.formats_txt import yolo_objects

    records, classes = case
    folder = data.write_yolo(tmp_path_factory.mktemp("trip") / "y", records, classes)
    assert formats_txt.yolo_names(data.find_files(folder))[0] == dict(enumerate(classes))
    for record in records:
        things = yolo_objects(folder / "labels" / Path(record.id).with_suffix(".txt"), dict(enumerate(classes)))
        raw = Record(record.id, None, record.size, things, fractions=True)
        assert settled(raw).objects == record.objects


@QUIET
@given(case=labelled(flags=True))
def test_csv_comes_back_exactly(case, tmp_path_factory):
    records, _ = case
    file = data.write_csv(
        tmp_path_factory.mktemp("trip") / "a.csv", [*records, Record("whole image.png", label="a cat")]
    )
    with file.open(newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    assert [row["class"] for row in rows if row["image"] == "whole image.png"] == ["a cat"]
    for record in records:
        mine = [row for row in rows if row["image"] == record.id]
        assert {(int(row["height"]), int(row["width"])) for row in mine} == {record.size}
        boxed = [(row, tuple(float(row[c]) for c in ("x1", "y1", "x2", "y2"))) for row in mine if row["class"]]
        found = [Object(row["class"], box, row["difficult"] == "1", row["crowd"] == "1") for row, box in boxed]
        assert found == list(record.objects)


def test_ids_that_are_no_file_names_come_back(tmp_path):
    """A set read from VOC has ids without a suffix: the file name in COCO has one, the id comes back without."""
    file = miniatures.image(THREE[0], tmp_path)
    records = [Record("a", file, (40, 60), (Object("cat", (1.0, 2.0, 3.0, 4.0)),), group="monday")]
    path = data.write_coco(tmp_path / "a.json", records, CLASSES)
    assert json.loads(path.read_text())["images"][0]["file_name"] == "a.png" and data.read_coco(path) == records


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ([RECORDS[0], RECORDS[0]], "'a.png' occurs more than once"),
        ([Record("../a.png", None, (9, 9), ())], r"'\.\./a\.png' is no path below"),
        ([Record("a.png", None, None, ())], "no boxes or no size"),
        ([Record("a.png", None, (9, 9), None)], "no boxes or no size"),
        ([Record("a.png", None, (9, 9), (Object("fox", (1, 1, 2, 2)),))], "class 'fox' .*holds the classes"),
        ([Record("a.png", None, (9, 9), (Object("cat", (1, 1, 2, 2), crowd=True),))], "'cat' crowd"),
        ([Record("a.png", None, (9, 9), ()), Record("a.jpg", None, (9, 9), ())], "would share the annotation"),
    ],
)
def test_what_could_not_come_back_is_refused_before_anything_is_written(tmp_path, wrong, reason):
    for write in (data.write_voc, data.write_yolo):
        with pytest.raises(ValueError, match=reason):
            write(tmp_path / "out", wrong, CLASSES)
    assert not list(tmp_path.rglob("*.txt")) and not list(tmp_path.rglob("*.xml"))
    data.write_voc(tmp_path / "twice", RECORDS, CLASSES)
    with pytest.raises(ValueError, match="Annotations is there already"):
        data.write_voc(tmp_path / "twice", RECORDS, CLASSES)


WRONG_BOXES = {"outside": (70, 5, 90, 25), "nan": (math.nan, 5, 30, 25), "inverted": (30, 5, 10, 25)}
WRONG_BOXES |= {"infinite": (10, 5, math.inf, 25)}


@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
@pytest.mark.parametrize("box", WRONG_BOXES.values(), ids=WRONG_BOXES)
def test_an_impossible_box_is_an_error_that_names_file_and_entry(tmp_path, kind, box):
    entry = {"voc": r"a-bad\.xml", "coco": r"instances\.json: (image|object)", "yolo": r"a-bad\.txt"}[kind]
    with pytest.raises(ValueError, match=f"{entry}.*(outside|not finite|no number|inverted|line 1)"):
        read(kind, tmp_path, [Picture("a-bad", (40, 60), (("cat", box),)), THREE[1]])


@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
def test_a_box_without_area_is_dropped_and_one_partly_outside_is_clipped(tmp_path, kind):
    flat = read(kind, tmp_path / "flat", [Picture("a", (40, 60), (("cat", (10, 5, 10, 25)),)), THREE[1]])
    assert flat.drops == {"zero_area": 1} and flat.labels.valid.sum(1).tolist() == [0, 1]
    over = read(kind, tmp_path / "over", [Picture("a", (40, 60), (("cat", (50, -6, 66, 12)),)), THREE[1]])
    assert objects(over, 0) == [("cat", (50, 0, 60, 12), False, False)] and over.drops == {"clipped": 1}


@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
def test_an_unknown_class_and_an_image_of_another_size_are_named(tmp_path, kind):
    with pytest.raises(ValueError, match=r"'dog'\}; allowed are \['cat', 'bird'\]"):
        read(kind, tmp_path / "set", class_names=["cat", "bird"])
    if kind != "yolo":
        (file,) = (tmp_path / "set").rglob("a.png")
        miniatures.image(Picture("a", (40, 61)), file.parent)
        with pytest.raises(ValueError, match=r"\(40, 60\) .*a\.png is \(40, 61\)"):
            data.load(str(tmp_path / "set"), SIZE)


GOOD_XML = "<annotation><size><width>60</width><height>40</height></size>{}</annotation>"
BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"


def test_a_size_of_zero_in_xml_is_taken_from_the_image(tmp_path):
    file = xml(THREE[0], voc(tmp_path) / "Annotations" / "a.xml")
    file.write_text(file.read_text().replace("<width>60", "<width>0").replace("<height>40", "<height>0"))
    assert_reads(data.assemble("s", data.read_voc(tmp_path), SIZE))


def test_class_names_are_taken_as_written(tmp_path):
    (yolo(tmp_path) / "data.yaml").write_text("names: {1: off, 0: 010}\nnc: 2")
    assert data.load(str(tmp_path), SIZE)[0].class_names == ("010", "off")
    (tmp_path / "other.yaml").write_text("names: [cat, dog]\ntrain: images")
    with pytest.raises(ValueError, match=r"other\.yaml .*data\.yaml .*must agree"):
        data.read_yolo(tmp_path)


@pytest.mark.parametrize(
    ("key", "number", "changes"),
    [
        ("images", 1, {"id": "b"}),
        ("images", 1, {"file_name": "../b.png"}),
        ("images", 1, {"file_name": "/etc/passwd"}),
        ("images", 1, {"width": float("inf")}),
        ("images", 0, {"group": "X"}),
        ("annotations", 0, {"image_id": 77}),
        ("annotations", 0, {"category_id": 5}),
        ("annotations", 0, {"category_id": [10]}),
        ("annotations", 0, {"bbox": [1, 2, 3]}),
        ("annotations", 0, {"bbox": [True, 2, 3, 4]}),
        ("categories", 1, {"name": "cat"}),
        ("categories", 1, {"supercategory": ["x"], "name": ["x"]}),
    ],
)
def test_broken_coco_names_file_and_entry(tmp_path, key, number, changes):
    content = coco_content()
    content[key][number].update(changes)
    file = coco(tmp_path) / "annotations" / "instances.json"
    file.write_text(json.dumps(content))
    entry = {"images": "image", "annotations": "object 0,", "categories": "category"}[key]
    with pytest.raises(ValueError, match=rf"instances\.json: {entry} \{{'id'"):
        data.read_coco(file, tmp_path / "images")


GOOD = kitti_line("Car", (1, 2, 30, 20))
LEFT, CAT = BOX.replace(">1<", ">left<"), "<object><name>cat</name>"
IMAGE_3 = ".*'000003' .*class 'Car', box .* "
YOLO_LINES = "0 0.5 0.5 0.1|cat 0.5 0.5 0.1 0.1|0 0.5 0.5 0.1 0.1 0.9|1_0 .5 .5 .1 .1|0 1e99 0 0 0".split("|")
NAMES = ["[[cat], dog]", "{0: cat, 0: dog}", "{01: cat, 2: dog}", "[cat, dog]\nnc: 3", "[cat, dog", "[" * 1000]
TRUNCATED = "is truncated, not XML"
BROKEN = {
    "Annotations/b.xml": [
        (GOOD_XML[:60], TRUNCATED),
        (GOOD_XML.replace("60", "wide"), ": .*'wide'"),
        (GOOD_XML.replace("60", "1e300"), r": '1e\+300'"),
        (GOOD_XML.format(f"{CAT}{BOX}{BOX}</object>"), r": object 0 \(cat\)"),
        (GOOD_XML.format(f"{CAT}{LEFT}</object>"), ": object 0 .*'left'"),
        (GOOD_XML.format(f"{CAT}<difficult>no</difficult>{BOX}</object>"), ": object 0 .*'no'"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]>" + GOOD_XML, ".*defines entities"),
        ("<a>" * 100_000, TRUNCATED),
    ],
    "labels/c.txt": [(f"0 0.5 0.5 0.2 0.2\n{line}\n", f": line 2 is '{line}'") for line in YOLO_LINES],
    "data.yaml": [
        *((f"names: {names}", "(: | is not YAML)") for names in NAMES),
        ("a: &a [x]\nb: [*a, *a]\nnames: [cat, dog]", " is not YAML"),
        ("train: images", " has no names"),
    ],
    "annotations/instances.json": [
        ('{"images": [], "images": [{}]}', ""),
        ('{"images": [], "annotations": []}', ""),
        ('{"images": [], "annotations": {"0": {}}, "categories": []}', ""),
        ("[" * 100_000, ""),
        ('{"images": [], "annotations": 1' + "0" * 5000 + "}", ""),
    ],
    "training/label_2/000003.txt": [  # a score at the end does no harm
        (f"{GOOD} 0.9\n\n{' '.join(GOOD.split()[:14])}", ": line 3 is 'Car"),
        (GOOD.replace("Car", "Bus"), ": line 1 is 'Bus"),
        (GOOD.replace("30.00", "nan"), ": line 1 is"),
        (kitti_line("Car", (30, 2, 10, 20)), IMAGE_3 + "is inverted"),
        (kitti_line("Car", (130, 2, 140, 20)), IMAGE_3 + "lies outside its image"),
    ],
}
KINDS = zip((voc, yolo, yolo, coco, kitti), BROKEN, strict=True)
ROWS = [(write, file, *row) for write, file in KINDS for row in BROKEN[file]]


@pytest.mark.parametrize(("write", "file", "content", "entry"), ROWS, ids=range(len(ROWS)))
def test_a_broken_file_is_named_with_its_entry(tmp_path, write, file, content, entry):
    (write(tmp_path) / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(Path(file).name) + " ?" + entry):
        data.load(str(tmp_path), LONG)


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
    return {"id": number, "data": {"image": image or f"{number}.png"}, "annotations": annotations}


def studio(folder, *tasks):
    (folder / "export.json").write_text(json.dumps(tasks))
    return data.read_label_studio(folder / "export.json")


def test_rectangles_and_choices_of_label_studio_by_hand(tmp_path):
    # 200 x 100 pixels: 10 % and 25 % of the width are 20 and 50; 20 % and 60 % of the height 20 and 60
    first = [rectangle("cat", 10, 20, 25, 60), rectangle("dog", -0.001, 0, 100.01, 100.0000001)]
    assert studio(tmp_path, task(1, first), task(2, [])) == [
        Record("1.png", None, (100, 200), (Object("cat", (20, 20, 70, 80)), Object("dog", (0, 0, 200, 100)))),
        Record("2.png", None, None, ()),
    ]
    miniatures.image(Picture("2", (40, 60)), tmp_path)  # now its size is known
    assert studio(tmp_path, task(2, []))[0] == Record("2.png", tmp_path / "2.png", (40, 60), ())
    results = [[choice("cat")], [choice("dog")], [choice("fox")]]
    found = studio(
        tmp_path, task(1, *results, cancelled=[2]), task(3, *results), task(4), task(5, *results, cancelled=[0, 1, 2])
    )
    assert [(record.id, record.label) for record in found] == [("1.png", "dog"), ("3.png", "fox")]


@pytest.mark.parametrize(
    ("told", "image"),
    [
        ("/data/upload/3/0f3a1b2c-my%20cat.png", "my cat.png"),
        ("/data/upload/3/holiday-cat.png", "holiday-cat.png"),
        ("/data/local-files/?d=pool/far/a%20b.png", "pool/far/a b.png"),
        ("s3://bucket/pool/a.png", "a.png"),
        ("https://host/pool/a.png?token=1", "a.png"),
        ("/tasks/12/resolve/?fileuri=czM6Ly9iL3Bvb2wvYS5wbmc=", "a.png"),
        ("far/a.png", "far/a.png"),
    ],
)
def test_ids_of_images_of_label_studio(told, image, tmp_path):
    one = task(1, [choice("cat")], image=told)
    assert studio(tmp_path, one)[0].id == image
    one["data"] = {"picture": told}
    assert studio(tmp_path, one)[0].id == image


@pytest.mark.parametrize(
    "tasks",
    [
        [task(7, [region("polygonlabels", {"polygonlabels": ["cat"]})])],
        [task(7, [rectangle("cat", 1, 1, 9, 9, rotation=3)])],
        [task(7, [rectangle("cat", 1, 1, 9, 9, image_rotation=90)])],
        [task(7, [rectangle("cat", 101, 1, 9, 9)])],
        [task(7, [rectangle("cat", 1, 1, 9, 9, original_width=None)])],
        [task(7, [rectangle("cat", 1, 1, 9, 9), rectangle("cat", 1, 1, 9, 9, original_width=201)])],
        [task(7, [region("choices", {"choices": ["a", "b"]})])],
        [task(7, [choice("a"), rectangle("cat", 1, 1, 9, 9)])],
        [task(7, []), task(8, [choice("a")])],
        [task(7, [choice("a")], image="../a.png")],
        [task(8, [choice("a")], image="7.png"), task(7, [choice("a")])],
        [{"id": 7, "data": {"a": "x", "b": "y"}, "annotations": [{"result": []}]}],
    ],
)
def test_what_label_studio_may_tell_but_a_box_cannot_names_the_task(tasks, tmp_path):
    with pytest.raises(ValueError, match=r"export\.json: task 7"):
        studio(tmp_path, *tasks)
