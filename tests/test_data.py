"""DigitScenes, every reader on a miniature of its layout, every bad input by name, and streaming's parity."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import (
    KITTI,
    THREE,
    Picture,
    carla,
    coco,
    coco_content,
    cut,
    folder,
    image,
    kitti,
    kitti_line,
    kitti_zips,
    pixels,
    voc,
    voc_flat,
    xml,
    yolo,
)
from PIL import Image, ImageFile

from fedal_utils.data import boxes as boxes_of
from fedal_utils.data import download
from fedal_utils.data import readers as data
from fedal_utils.seeding import rng_for

REAL = Path(os.environ.get("FEDAL_DATA", "-"))
SIZE = (48, 64)


def objects(dataset: data.Dataset, row: int) -> list[tuple[str, tuple[float, ...], bool, bool]]:
    """(class, box, ignore, crowd) of one image, boxes back in original pixels."""
    labels = dataset.labels
    back = boxes_of.to_original(labels.boxes, dataset.images.sizes, dataset.images.image_size)
    return [
        (dataset.class_names[c - 1], tuple(round(v, 3) for v in back[row, k].tolist()), bool(i), bool(w))
        for k, (c, i, w) in enumerate(zip(labels.classes[row], labels.ignore[row], labels.crowd[row], strict=True))
        if c > 0
    ]


def assert_reads_three(dataset: data.Dataset) -> None:
    """The boxes of `miniatures.THREE`, each where its picture is bright."""
    by_id = {picture.id: picture for picture in THREE}
    for row, full in enumerate(dataset.images.ids):
        picture = by_id[Path(full).stem]
        want = [(name, pytest.approx(box, abs=1e-3), False, False) for name, box in picture.objects]
        assert objects(dataset, row) == want
        assert tuple(dataset.images.sizes[row].tolist()) == picture.size
        for k in range(len(picture.objects)):
            x1, y1, x2, y2 = dataset.labels.boxes[row, k].round().long().tolist()
            seen = dataset.images.pixels[row, :, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float()
            assert seen.mean() > 150


# -------------------------------------------------------------------------------------------------------- DigitScenes


@pytest.fixture(scope="module")
def digits():
    return data.digit_scenes(60, 20, seed=3)


def test_scenes_do_not_change_when_the_count_grows_or_other_numbers_were_drawn(digits):
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002 (the global generator must not matter)
    before = torch.random.get_rng_state()
    train, test = data.digit_scenes(20, 5, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    for small, large in zip((train, test), digits, strict=True):
        n = len(small)
        k = small.labels.boxes.shape[1]
        assert small.images.ids == large.images.ids[:n]
        assert torch.equal(small.images.pixels, large.images.pixels[:n])
        assert torch.equal(small.labels.boxes, large.labels.boxes[:n, :k])
        assert torch.equal(small.labels.classes, large.labels.classes[:n, :k])
    assert not torch.equal(digits[0].images.pixels[:20], digits[1].images.pixels[:20])
    other, _ = data.digit_scenes(20, 5, seed=4)
    assert not torch.equal(other.images.pixels, train.images.pixels)


def test_train_and_test_share_no_source_digit():
    train, test = data.digit_sources(seed=3)
    assert len(train) + len(test) == 1797 and not set(train) & set(test)
    drawn = {}
    for split, sources in (("train", train), ("test", test)):
        scenes = [data.digit_scene(rng_for(3, "digits", split, k), sources) for k in range(40)]
        drawn[split] = {int(row) for scene in scenes for row in scene.sources}
    assert drawn["train"] <= set(train) and drawn["test"] <= set(test)
    assert len(drawn["train"]) > 60 and not drawn["train"] & drawn["test"]


def test_boxes_are_tight_around_the_drawn_digit():
    sources, _ = data.digit_sources()
    for k in range(30):
        scene = data.digit_scene(rng_for(0, "tight", k), sources, digits_per_image=(1, 1))
        bare = np.round(data._canvas(rng_for(0, "tight", k), 64, 64) * 255).transpose(2, 0, 1)
        changed = (np.abs(scene.pixels - bare) > 12).any(axis=0)  # a twentieth of the range: ink that one can see
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert scene.boxes[0].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_scenes_keep_their_ranges(digits):
    train, _ = digits
    labels, valid = train.labels, train.labels.valid
    sides = labels.boxes[..., 2:] - labels.boxes[..., :2]
    longer = sides.amax(dim=-1)[valid]
    assert longer.min() >= 14 and longer.max() <= 28 and longer.min() < 17 and longer.max() > 25
    counts = labels.count()
    assert set(counts.tolist()) == {1, 2, 3, 4}
    assert set(labels.classes[valid].tolist()) == set(range(1, 11))
    assert (labels.boxes[valid] >= 0).all() and (labels.boxes[valid] <= 64).all()
    assert not labels.boxes[~valid].any()
    luminance = (train.images.pixels.double() * torch.tensor(data._LUMINANCE)[:, None, None]).sum(dim=1) / 255
    for row in range(len(train)):
        kept = labels.boxes[row][valid[row]]
        for box in kept.long().tolist():
            around = [max(0, v + d) for v, d in zip(box, (-3, -3, 3, 3), strict=True)]  # a fat 1 fills its box
            seen = luminance[row, around[1] : around[3], around[0] : around[2]]
            assert seen.max() - seen.min() >= 0.33  # 0.35 between ink and mean ground, less rounding to bytes
        for i in range(len(kept)):
            for j in range(i):
                corner = torch.minimum(kept[i, 2:], kept[j, 2:]) - torch.maximum(kept[i, :2], kept[j, :2])
                areas = [(box[2:] - box[:2]).prod() for box in (kept[i], kept[j])]
                assert corner.clamp(min=0).prod() <= 0.1 * min(areas) + 1e-6


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 0.49))
def test_ink_has_the_contrast_asked_for_and_is_a_colour(seed, ground, contrast):
    ink = data._ink_colour(rng_for(seed, "ink"), ground, contrast)
    assert abs(ink @ data._LUMINANCE - ground) >= contrast - 1e-9
    assert (ink >= -1e-9).all() and (ink <= 1 + 1e-9).all()


def test_fewer_classes_draw_fewer_digits():
    train, test = data.digit_scenes(30, 10, classes=3)
    assert train.class_names == ("0", "1", "2")
    assert set(train.labels.classes.unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        (dict(count_train=0), "0 scenes"),
        (dict(image_size=(20, 64)), r"\(14, 28\)"),
        (dict(digits_per_image=(0, 2)), r"\(0, 2\)"),
        (dict(min_contrast=0.6), "0.6"),
        (dict(classes=11), "11"),
        (dict(seed=-1), "-1"),
    ],
)
def test_impossible_scenes_are_named(wrong, value):
    with pytest.raises(ValueError, match=value):
        data.digit_scenes(**(dict(count_train=2, count_test=2) | wrong))


# --------------------------------------------------------------------------------------------------------- the one type


def test_batches_are_the_rows_asked_for_mirrored_where_asked(digits):
    images = digits[0].images
    flip = torch.tensor([True, False])
    batch = images.batch([7, 2], flip=flip)
    assert torch.equal(batch[0], images.pixels[7].flip(-1)) and torch.equal(batch[1], images.pixels[2])
    assert batch.dtype == torch.uint8
    for index in (np.array([4, 9]), torch.tensor([4, 9]), np.arange(60) % 60 == 4):
        assert torch.equal(images.batch(index)[0], images.pixels[4])
    chunks = [np.array([3, 1]), np.array([], dtype=int), np.array([5])]
    got = list(images.batches(chunks))
    assert [len(b) for b in got] == [2, 0, 1] and torch.equal(got[0], images.pixels[[3, 1]])


@pytest.mark.parametrize(
    ("index", "value"), [([60], "60"), ([-1], "-1"), ([0.5], "0.5"), ([[1]], r"\(1, 1\)"), (np.ones(3, bool), "3")]
)
def test_rows_that_do_not_exist_are_named(digits, index, value):
    with pytest.raises(ValueError, match=value):
        digits[0].images.take(index)


def test_take_keeps_images_and_labels_together(digits):
    part = digits[0].take([5, 1])
    assert part.images.ids == ("train-00005", "train-00001") and len(part) == 2
    assert torch.equal(part.images.pixels, digits[0].images.pixels[[5, 1]])
    assert torch.equal(part.labels.boxes, digits[0].labels.boxes[[5, 1]])
    assert len(digits[0].take([])) == 0


def test_ids_must_be_unique():
    with pytest.raises(ValueError, match="'x' occurs more than once"):
        data.Images(("x", "y", "x"), torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.ones(3, 2).long())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=4, max_size=4), st.integers(40, 80), st.data())
def test_flipped_labels_mirror_objects_and_twice_is_the_identity(mask, width, draw):
    corner = torch.tensor(draw.draw(st.lists(st.integers(0, 20), min_size=16, max_size=16))).reshape(4, 2, 2)
    boxes = torch.cat([corner, corner + 10], dim=-1).float()
    classes = torch.tensor(draw.draw(st.lists(st.integers(0, 2), min_size=8, max_size=8))).reshape(4, 2)
    boxes = boxes * (classes > 0)[..., None]
    labels = data.Labels(boxes, classes, torch.zeros(4, 2).bool(), torch.zeros(4, 2).bool())
    once = labels.flip(torch.tensor(mask), width)
    assert torch.equal(once.flip(torch.tensor(mask), width).boxes, boxes)
    for row, flipped in enumerate(mask):
        for k in range(2):
            want = boxes[row, k]
            if flipped and classes[row, k] > 0:
                want = torch.stack([width - want[2], want[1], width - want[0], want[3]])
            assert torch.equal(once.boxes[row, k], want)


def test_counts_dominant_class_and_description_leave_ignored_objects_out():
    classes = torch.tensor([[2, 2, 1, 0], [1, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    ignore = torch.tensor([[False] * 4, [False] * 4, [True, False, False, False], [False] * 4])
    labels = data.Labels(torch.zeros(4, 4, 4), classes, ignore, torch.zeros(4, 4).bool())
    images = data.Images(("a", "b", "c", "d"), torch.zeros(4, 3, 8, 9, dtype=torch.uint8), torch.ones(4, 2).long())
    dataset = data.Dataset("mine", images, labels, ("x", "y", "z"), {"zero_area": 2})
    assert labels.count().tolist() == [3, 2, 0, 0]
    assert dataset.class_counts().tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert dataset.dominant_class().tolist() == [2, 1, 0, 0]  # the lower class on a tie
    assert dataset.describe() == (
        "mine: 4 images 8x9, 5 boxes (x 2, y 3, z 0), 1 ignored, 1 images without objects; read: zero_area 2"
    )
    bare = data.Dataset("bare", images, None, ())
    assert bare.describe() == "bare: 4 images 8x9, no labels"
    with pytest.raises(ValueError, match="'bare' has no labels"):
        bare.dominant_class()


# ------------------------------------------------------------------------------------------------------------- readers


def test_voc_is_read_as_written(tmp_path):
    dataset = data.read_voc(voc(tmp_path / "set"), image_size=SIZE)
    assert dataset.images.ids == ("a", "b", "c") and dataset.class_names == ("cat", "dog")
    assert dataset.images.pixels.shape == (3, 3, *SIZE) and dataset.drops == {}
    assert_reads_three(dataset)


def test_voc_that_counts_from_one_gives_the_same_boxes(tmp_path):
    root = voc(tmp_path, one_based=True)
    assert_reads_three(data.read_voc(root, image_size=SIZE, one_based=True))
    assert objects(data.read_voc(root, image_size=SIZE), 0)[0][1] == (11, 6, 30, 25)


def test_voc_splits_and_ids_choose_images_in_their_order(tmp_path):
    root = voc(tmp_path, splits={"train": "b", "val": "a", "test": "c"})
    assert data.read_voc(root, "test", SIZE).images.ids == ("c",)
    assert data.read_voc(root, "trainval", SIZE).images.ids == ("a", "b")  # no trainval.txt: train and val
    assert data.read_voc(root, image_size=SIZE, image_ids=["c", "a"]).images.ids == ("c", "a")


def test_difficult_and_too_small_objects_are_ignored_and_counted(tmp_path):
    dataset = data.read_voc(voc(tmp_path, difficult=[1]), image_size=(40, 60), min_object=21)
    # a: cat 20 x 20 is too small, dog is difficult (and counted once); b at scale 2/3: 21.3 x 28 will do;
    # c at scale 0.8: 20 x 40 is too small
    assert [o[2] for row in range(3) for o in objects(dataset, row)] == [True, True, False, True]
    assert dataset.drops == {"difficult": 1, "too_small": 2}
    assert dataset.labels.count().tolist() == [0, 1, 0]


def test_classes_given_set_the_order(tmp_path):
    dataset = data.read_voc(voc(tmp_path), image_size=SIZE, class_names=("dog", "mouse", "cat"))
    assert dataset.labels.classes[0].tolist() == [3, 1]


def test_letterboxed_pixels_are_the_picture_in_grey_margins(tmp_path):
    dataset = data.read_voc(voc(tmp_path), image_size=(60, 60))
    rows = dict(zip(dataset.images.ids, dataset.images.pixels, strict=True))
    assert torch.equal(rows["a"][:, 10:50], torch.from_numpy(pixels(THREE[0])).permute(2, 0, 1))  # 40 x 60: no scaling
    assert (rows["a"][:, :10] == 114).all() and (rows["a"][:, 50:] == 114).all()
    half = data.letterbox_image(
        Image.fromarray(np.kron([[0, 200], [100, 40]], np.ones((2, 2))).astype(np.uint8)).convert("RGB"), (2, 2)
    )
    # bilinear with antialiasing at scale 1/2 weighs 4 columns 3 3 1 0 (of 7) near the edge: (6 * 0 + 1 * 200) / 7 ...
    left, right = (6 * 0 + 200) / 7, (0 + 6 * 200) / 7
    low_left, low_right = (6 * 100 + 40) / 7, (100 + 6 * 40) / 7
    want = [
        [(6 * left + low_left) / 7, (6 * right + low_right) / 7],
        [(left + 6 * low_left) / 7, (right + 6 * low_right) / 7],
    ]
    torch.testing.assert_close(half[0].double(), torch.tensor(want).double(), rtol=0, atol=1.0)


def test_carla_groups_are_towns_and_png_or_jpeg_will_do(tmp_path):
    train, test = ["Town01_000001", "Town01_000002", "Town03_000001", "Town03_000009"], ["Town05_000001"]
    for suffix in (".png", ".jpg"):
        root = tmp_path / suffix[1:]
        carla(root / "carla", train, test, suffix)
        first, second = data.load("carla", SIZE, root=root)
        assert first.images.ids == tuple(train) and first.images.groups == ("Town01", "Town01", "Town03", "Town03")
        assert second.images.groups == ("Town05",) and second.class_names == data.CARLA_CLASSES
        assert objects(first, 0) == [
            ("vehicle", (8, 6, 40, 30), False, False),
            ("traffic_light", (50, 2, 53, 8), False, False),
        ]
    carla(tmp_path / "more" / "carla", train, ["Town05_000001", "Town05_000002"])
    first, second = data.load("carla-towns", SIZE, root=tmp_path / "more")
    assert sorted(first.images.groups) == ["Town01", "Town03", "Town05"] == sorted(second.images.groups)


def test_coco_is_read_as_written_with_crowds_and_groups(tmp_path):
    root = coco(tmp_path)
    file = root / "annotations" / "instances.json"
    assert_reads_three(data.read_coco(file, root / "images", SIZE))
    content = coco_content(a={"town": "X"}, b={"town": "Y"}, c={"town": "X"})
    content["annotations"][1]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    dataset = data.read_coco(file, root / "images", SIZE)
    assert dataset.images.groups == ("X", "Y", "X") and dataset.images.ids == ("a.png", "b.png", "c.png")
    assert [o[2:] for o in objects(dataset, 0)] == [(False, False), (True, True)] and dataset.drops == {"crowd": 1}


def test_yolo_is_read_as_written_and_an_image_without_a_file_is_a_negative(tmp_path):
    assert_reads_three(data.read_yolo(yolo(tmp_path / "named"), SIZE))
    dataset = data.read_yolo(yolo(tmp_path / "bare", [*THREE, Picture("d", objects=())], names=None), SIZE)
    assert dataset.class_names == ("0", "1") and dataset.drops == {"no_label_file": 1}
    assert dataset.labels.count().tolist() == [2, 1, 1, 0]


def test_a_plain_folder_has_no_labels(tmp_path):
    image(Picture("deep"), folder(tmp_path / "mine") / "sub")
    dataset = data.read_folder(tmp_path / "mine", SIZE)
    assert dataset.labels is None and dataset.images.ids == ("a.jpg", "b.jpg", "c.jpg", "sub/deep.png")
    assert dataset.take([1]).labels is None


def test_an_image_turned_by_exif_is_read_as_its_annotation_states(tmp_path):
    picture = Picture("p", (40, 60), (("cat", (10, 5, 30, 25)),))
    voc(tmp_path, [picture], suffix=".jpg")
    file = tmp_path / "JPEGImages" / "p.jpg"
    tag = Image.Exif()
    tag[0x0112] = 6  # to be shown turned by 90 degrees: the file holds 60 x 40
    Image.fromarray(pixels(picture)).rotate(90, expand=True).save(file, exif=tag, quality=95)
    assert Image.open(file).size == (40, 60)
    dataset = data.read_voc(tmp_path, image_size=(40, 60))
    error = dataset.images.pixels[0].float() - torch.from_numpy(pixels(picture)).permute(2, 0, 1).float()
    assert error.abs().mean() < 12  # JPEG noise; turned the wrong way it is above 40
    assert data.read_folder(tmp_path / "JPEGImages", SIZE).images.sizes.tolist() == [[40, 60]]


# ----------------------------------------------------------------------------------------------------------- bad input

OUTSIDE, NAN = (70, 5, 90, 25), (float("nan"), 5, 30, 25)
INVERTED, INFINITE = (30, 5, 10, 25), (10, 5, float("inf"), 25)


def written(layout: str, root: Path, box: tuple[float, ...]) -> tuple[data.Dataset, str]:
    """One image with one cat there, read back; and the annotation file's name."""
    pictures = [Picture("a-bad", (40, 60), (("cat", box),)), THREE[1]]
    if layout == "voc":
        return data.read_voc(voc(root, pictures), image_size=(40, 60)), "a-bad.xml"
    if layout == "coco":
        coco(root, pictures)
        return data.read_coco(root / "annotations/instances.json", root / "images", (40, 60)), "instances.json"
    return data.read_yolo(yolo(root, pictures), (40, 60)), "a-bad.txt"


@pytest.mark.parametrize("layout", ["voc", "coco", "yolo"])
@pytest.mark.parametrize(
    ("box", "reason", "value"),
    [(OUTSIDE, "outside", "70"), (NAN, "not finite", "nan"), (INVERTED, "inverted", "30"), (INFINITE, "finite", "inf")],
    ids=["outside", "nan", "inverted", "infinite"],
)
def test_an_impossible_box_is_an_error_that_names_file_and_value(tmp_path, layout, box, reason, value):
    with pytest.raises(ValueError, match=reason) as error:
        written(layout, tmp_path, box)
    name = {"voc": "a-bad.xml", "coco": "instances.json", "yolo": "a-bad.txt"}[layout]
    assert name in str(error.value) and value in str(error.value) and "'cat'" in str(error.value)


@pytest.mark.parametrize("layout", ["voc", "coco", "yolo"])
def test_a_box_without_area_is_dropped_and_counted(tmp_path, layout):
    dataset, _ = written(layout, tmp_path, (10, 5, 10, 25))
    assert dataset.drops == {"zero_area": 1}
    assert dataset.labels.count().tolist() == [0, 1]


@pytest.mark.parametrize("layout", ["voc", "coco", "yolo"])
def test_a_box_partly_outside_is_clipped_and_counted(tmp_path, layout):
    dataset, _ = written(layout, tmp_path, (50, -6, 66, 12))
    assert objects(dataset, 0) == [("cat", (50, 0, 60, 12), False, False)]
    assert dataset.drops == {"clipped": 1}


def test_a_missing_image_is_named(tmp_path):
    voc(tmp_path / "voc"), coco(tmp_path / "coco")
    (tmp_path / "voc" / "JPEGImages" / "b.png").unlink()
    (tmp_path / "coco" / "images" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"image .*JPEGImages.b\.\w+ does not exist"):
        data.read_voc(tmp_path / "voc", image_size=SIZE)
    with pytest.raises(ValueError, match=r"image .*images.b\.png does not exist"):
        data.read_coco(tmp_path / "coco" / "annotations/instances.json", tmp_path / "coco/images", SIZE)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_image_is_named(tmp_path, suffix, part):
    voc(tmp_path, suffix=suffix)
    cut(tmp_path / "JPEGImages" / f"b{suffix}", part)
    with pytest.raises(ValueError, match=rf"b\{suffix} (cannot be read|is truncated)"):
        data.read_voc(tmp_path, image_size=SIZE)


def test_an_image_of_more_than_8_bits_is_refused_not_crushed(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has mode 'I;16'"):
        data.read_folder(tmp_path, SIZE)


def test_truncated_images_cannot_be_switched_on_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is True"):
        data.read_folder(folder(tmp_path), SIZE)


def test_an_image_that_is_not_of_the_stated_size_is_named(tmp_path):
    voc(tmp_path)
    Image.new("RGB", (61, 40)).save(tmp_path / "JPEGImages" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is 40 x 61 .* says 40 x 60"):
        data.read_voc(tmp_path, image_size=SIZE)


def test_xml_without_boxes_is_an_image_without_objects_and_said_so(tmp_path):
    dataset = data.read_voc(voc(tmp_path, [*THREE, Picture("empty", objects=())]), image_size=SIZE)
    row = dataset.images.ids.index("empty")
    assert dataset.labels.count()[row] == 0 and not dataset.labels.boxes[row].any()
    assert "1 images without objects" in dataset.describe()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<annotation><size><width>60</width><height>40</height></size><object>", "truncated or not XML"),
        ("", "truncated or not XML"),
        ("<annotation></annotation>", "has no <size>"),
        ("<annotation><size><width>wide</width><height>40</height></size></annotation>", "<width> 'wide'"),
        ("<annotation><size><width>nan</width><height>40</height></size></annotation>", r"<size> \[40.0, nan\]"),
        ("<kml><size/></kml>", "<kml>"),
        (
            "<annotation><size><width>60</width><height>40</height></size>"
            "<object><name>cat</name></object></annotation>",
            r"object 0 \(cat\) has <xmin> None",
        ),
        (
            "<annotation><size><width>60</width><height>40</height></size><object><name>cat</name><bndbox><xmin>left"
            "</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object></annotation>",
            "<xmin> 'left'",
        ),
        (
            "<annotation><size><width>60</width><height>40</height></size><object><bndbox/></object></annotation>",
            "object 0 has no <name>",
        ),
    ],
)
def test_broken_xml_is_named(tmp_path, text, reason):
    voc(tmp_path)
    (tmp_path / "Annotations" / "b.xml").write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        data.read_voc(tmp_path, image_size=SIZE)
    assert "b.xml" in str(error.value)


def test_a_size_of_zero_in_xml_is_taken_from_the_image(tmp_path):
    xml(THREE[0], voc(tmp_path) / "Annotations" / "a.xml")
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<width>60", "<width>0").replace("<height>40", "<height>0"))
    assert_reads_three(data.read_voc(tmp_path, image_size=SIZE))


def test_an_unknown_class_is_named_with_what_is_allowed(tmp_path):
    with pytest.raises(ValueError, match=r"a\.xml.*'dog'.*\['cat', 'bird'\]"):
        data.read_voc(voc(tmp_path / "voc"), image_size=SIZE, class_names=["cat", "bird"])
    root = coco(tmp_path / "coco")
    with pytest.raises(ValueError, match=r"instances\.json.*'dog'.*\['cat'\]"):
        data.read_coco(root / "annotations/instances.json", root / "images", SIZE, class_names=["cat"])
    with pytest.raises(ValueError, match=r"a\.txt: line 2 has the class 1; allowed are 0\.\.0 \(cat\)"):
        data.read_yolo(yolo(tmp_path / "yolo"), SIZE, class_names=["cat"])


@pytest.mark.parametrize("line", ["0 0.5 0.5 0.1", "cat 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1 0.1 0.9", "0 a b c d"])
def test_a_broken_line_of_yolo_is_named(tmp_path, line):
    yolo(tmp_path)
    (tmp_path / "labels" / "c.txt").write_text(f"0 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(ValueError, match=rf"c\.txt: line 2 is '{line}'"):
        data.read_yolo(tmp_path, SIZE)


def broken_coco(change) -> dict:
    content = coco_content()
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["images"][1].update(id=1), "image id 1 more than once"),
        (lambda c: c["images"][1].update(file_name="a.png"), "image id 'a.png' was already used"),
        (lambda c: c["annotations"][0].update(image_id=77), "image id 77"),
        (lambda c: c["annotations"][0].update(category_id=5), r"category_id 5; allowed are \[10, 20\]"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]"),
        (lambda c: c["annotations"][0].pop("bbox"), "bbox None"),
        (lambda c: c["images"][0].update(town="X"), "'b.png' has no field 'town'"),
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c["images"][2].pop("file_name"), "images has an entry without 'file_name'"),
        (lambda c: c.update(images=[], annotations=[]), "is empty"),
    ],
)
def test_broken_coco_is_named(tmp_path, change, reason):
    file = coco(tmp_path) / "annotations" / "instances.json"
    file.write_text(json.dumps(broken_coco(change)))
    with pytest.raises(ValueError, match=reason) as error:
        data.read_coco(file, tmp_path / "images", SIZE)
    assert "instances.json" in str(error.value)


def test_truncated_json_is_named(tmp_path):
    file = cut(coco(tmp_path) / "annotations" / "instances.json")
    for read in (lambda: data.read_coco(file, tmp_path / "images", SIZE), lambda: data.load(str(tmp_path), SIZE)):
        with pytest.raises(ValueError, match=r"instances\.json is truncated or not JSON"):
            read()


def test_a_duplicate_id_is_named(tmp_path):
    root = voc(tmp_path, splits={"train": ["a", "b", "a"], "val": ["c"], "test": ["a"]})
    with pytest.raises(ValueError, match=r"train\.txt lists the image id 'a' more than once"):
        data.read_voc(root, "train", SIZE)
    with pytest.raises(ValueError, match="image id 'b' was already used"):
        data.read_voc(root, image_size=SIZE, image_ids=["b", "c", "b"])
    image(THREE[0], root / "JPEGImages", ".jpg")
    with pytest.raises(ValueError, match=r"a\.png and a\.jpg share the image id 'a'"):
        data.read_voc(root, image_size=SIZE)


def test_an_id_in_train_and_test_is_named(tmp_path):
    voc(
        tmp_path / "BCCD",
        [Picture(i, objects=(("RBC", (1, 1, 9, 9)),)) for i in "abc"],
        splits={"trainval": "ab", "test": "bc"},
    )
    with pytest.raises(ValueError, match="BCCD: image id 'b' is in train and in test"):
        data.load("bccd", SIZE, root=tmp_path)


def test_an_empty_set_is_named(tmp_path):
    for sub in ("JPEGImages", "Annotations"):
        (tmp_path / sub).mkdir()
    with pytest.raises(ValueError, match=f"'{tmp_path.name}' is empty.*{tmp_path.name}"):
        data.read_voc(tmp_path, image_size=SIZE)
    with pytest.raises(ValueError, match="is empty"):
        data.read_folder(tmp_path, SIZE)
    with pytest.raises(ValueError, match="is empty"):
        data.load(str(tmp_path), SIZE)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"test\.txt is empty"):
        data.read_voc(tmp_path, "test", SIZE)


def test_no_object_anywhere_asks_for_class_names(tmp_path):
    root = voc(tmp_path, [Picture("a", objects=())])
    with pytest.raises(ValueError, match="give class_names"):
        data.read_voc(root, image_size=SIZE)
    assert data.read_voc(root, image_size=SIZE, class_names=["cat"]).labels.count().tolist() == [0]


# ----------------------------------------------------------------------------------------------------------- streaming


def test_streamed_images_are_the_same_bytes_as_those_in_memory(tmp_path):
    many = [Picture(f"p{i}", (30 + i, 60 - 2 * i)) for i in range(7)]
    root = voc(tmp_path, many, suffix=".jpg")
    memory = data.read_voc(root, image_size=SIZE)
    stream = data.read_voc(root, image_size=SIZE, max_bytes=7 * 3 * 48 * 64 - 1, workers=2)
    assert isinstance(stream.images, data.StreamedImages) and isinstance(memory.images, data.Images)
    assert isinstance(data.read_voc(root, image_size=SIZE, max_bytes=7 * 3 * 48 * 64).images, data.Images)
    for name in ("ids", "image_size", "groups"):
        assert getattr(stream.images, name) == getattr(memory.images, name)
    assert torch.equal(stream.images.sizes, memory.images.sizes) and torch.equal(
        stream.labels.boxes, memory.labels.boxes
    )
    flip = torch.tensor([True, False, True])
    assert torch.equal(stream.images.batch([4, 0, 6], flip=flip), memory.images.batch([4, 0, 6], flip=flip))
    before = torch.random.get_rng_state()
    chunks = [np.array([5, 1]), np.array([0, 6, 2]), np.array([3])]
    both = list(zip(stream.images.batches(chunks), memory.images.batches(chunks), strict=True))
    assert len(both) == 3 and all(torch.equal(a, b) for a, b in both)
    assert torch.equal(before, torch.random.get_rng_state())
    part, same = stream.take([6, 2]), memory.take([6, 2])
    assert part.images.ids == same.images.ids
    assert torch.equal(part.images.batch([0, 1]), same.images.pixels)


def test_a_truncated_image_is_named_by_a_streaming_worker_too(tmp_path):
    root = voc(tmp_path, suffix=".jpg")
    cut(root / "JPEGImages" / "b.jpg")
    stream = data.read_voc(root, image_size=SIZE, max_bytes=0, workers=1)
    with pytest.raises(ValueError, match=r"b\.jpg is truncated"):
        list(stream.images.batches([[0], [1]]))


def test_threads_do_not_change_the_order(tmp_path):
    root = voc(tmp_path, [Picture(f"p{i:02d}", (20 + i, 30)) for i in range(20)])
    one, eight = (data.read_voc(root, image_size=SIZE, workers=w) for w in (1, 8))
    assert torch.equal(one.images.pixels, eight.images.pixels) and one.images.ids == eight.images.ids


# ------------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("write", "labelled"),
    [(voc, True), (voc_flat, True), (coco, True), (yolo, True), (folder, False)],
    ids=["voc", "voc-flat", "coco", "yolo", "images-only"],
)
def test_a_folder_of_ones_own_with_three_images(tmp_path, write, labelled):
    train, test = data.load(str(write(tmp_path / "mine")), SIZE)
    assert (len(train), len(test)) == (2, 1)
    ids = {Path(i).stem for i in train.images.ids + test.images.ids}
    assert ids == {"a", "b", "c"}
    assert train.name == "mine train"
    if labelled:
        assert train.class_names == test.class_names == ("cat", "dog")
        if write is not voc_flat:  # JPEG blurs the rectangle's edges
            assert_reads_three(train), assert_reads_three(test)
    else:
        assert train.labels is None and test.labels is None and train.class_names == ()
    again = data.load("mine", SIZE, root=tmp_path)
    assert again[1].images.ids == test.images.ids
    assert {data.load("mine", SIZE, root=tmp_path, seed=s)[1].images.ids for s in range(12)} != {test.images.ids}


def test_a_folder_of_ones_own_keeps_the_split_it_brings(tmp_path):
    many = [Picture(i) for i in "defg"]
    roots = {
        "sets": voc(tmp_path / "sets", [*THREE, *many], splits={"train": "ab", "val": "cd", "test": "ef"}),
        "yolo": yolo(yolo(tmp_path / "yolo", THREE, "train"), many, "val"),
        "coco": coco(
            coco(tmp_path / "coco", THREE, "instances_train.json", "train"),
            many[:2] + [THREE[1]],
            "instances_test.json",
            "test",
        ),
        "plain": tmp_path / "plain",
    }
    folder(roots["plain"] / "train"), folder(roots["plain"] / "test", many)
    want = {"sets": (4, 2), "yolo": (3, 4), "plain": (3, 4)}
    for name, counts in want.items():
        train, test = data.load(str(roots[name]), SIZE)
        assert (len(train), len(test)) == counts, name
    assert data.load(str(roots["sets"]), SIZE)[0].drops == {"in_no_split": 1}  # g
    with pytest.raises(ValueError, match=r"coco: image id 'b\.png' is in train and in test"):
        data.load(str(roots["coco"]), SIZE)


def test_a_labelled_folder_with_a_file_that_belongs_to_nothing_is_an_error(tmp_path):
    image(Picture("extra"), voc_flat(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"extra\.png has no annotation extra\.xml"):
        data.load(str(tmp_path / "bare"), SIZE)
    xml(Picture("alone"), voc_flat(tmp_path / "alone") / "alone.xml")
    with pytest.raises(ValueError, match=r"alone\.xml has no image alone"):
        data.load(str(tmp_path / "alone"), SIZE)
    (yolo(tmp_path / "yolo") / "labels" / "z.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(ValueError, match=r"z\.txt belongs to no image"):
        data.load(str(tmp_path / "yolo"), SIZE)
    image(THREE[0], folder(tmp_path / "single", []))
    with pytest.raises(ValueError, match=r"single: 1 image\(s\) cannot be split"):
        data.load(str(tmp_path / "single"), SIZE)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'bcd' is not known.*digits, bccd, carla"):
        data.load("bcd", SIZE, root=tmp_path)


@pytest.mark.parametrize("name", ["neu-det", "voc07", "voc12", "voc0712", "coco", "kitti", "kitti-2"])
def test_a_set_that_is_not_there_and_cannot_be_fetched_names_folder_and_origin(tmp_path, name):
    with pytest.raises(ValueError, match="http") as error:
        data.load(name, SIZE, root=tmp_path)
    assert str(tmp_path / data.SOURCES[name].folders[0]) in str(error.value)


def test_a_set_that_can_be_fetched_is_fetched_once_asked(tmp_path, monkeypatch):
    def fetch(name, root):
        assert name == "BCCD"
        return voc(
            root / name,
            [Picture(i, objects=(("WBC", (1, 1, 20, 20)),)) for i in "abc"],
            splits={"train": "a", "val": "b", "test": "c"},
        )

    with pytest.raises(ValueError, match="BCCD does not exist"):
        data.load("bccd", SIZE, root=tmp_path, fetch=False)
    monkeypatch.setattr(download, "fetch", fetch)
    train, test = data.load("bccd", SIZE, root=tmp_path)
    assert train.images.ids == ("a", "b") and test.images.ids == ("c",)
    assert train.class_names == ("RBC", "WBC", "Platelets") and train.labels.classes[0].tolist() == [2]


def test_voc07_and_voc12_count_from_one_and_keep_their_splits(tmp_path):
    def year(name: str, ids: str, splits: dict[str, str]) -> None:
        pictures = [Picture(i, objects=(("dog", (10, 5, 30, 25)),)) for i in ids]
        voc(tmp_path / "VOCdevkit" / name, pictures, splits, ".jpg", one_based=True)

    year("VOC2007", "abc", {"trainval": "ab", "test": "c"})
    year("VOC2012", "def", {"train": "d", "val": "ef", "trainval": "def"})
    want = {"voc07": ("ab", "c"), "voc12": ("d", "ef"), "voc0712": ("abdef", "c")}
    for name, (train_ids, test_ids) in want.items():
        train, test = data.load(name, SIZE, root=tmp_path)
        assert train.images.ids == tuple(train_ids) and test.images.ids == tuple(test_ids)
        assert objects(train, 0) == [("dog", (10, 5, 30, 25), False, False)]
        assert len(train.class_names) == 20


def test_coco_by_name(tmp_path):
    for split, pictures in (("train2017", THREE[:2]), ("val2017", THREE[2:])):
        for picture in pictures:
            image(picture, tmp_path / "coco" / split, ".jpg")
        content = coco_content(pictures, ".jpg")
        content["categories"] = coco_content(THREE)["categories"]
        content["annotations"] = [a | {"category_id": 10} for a in content["annotations"]]
        file = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    train, test = data.load("coco", SIZE, root=tmp_path)
    assert train.images.ids == ("a.jpg", "b.jpg") and test.images.ids == ("c.jpg",)
    assert train.class_names == ("cat", "dog") and train.labels.count().tolist() == [2, 1]


def test_the_data_root_is_the_argument_then_the_environment_then_data(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDAL_DATA", str(tmp_path))
    assert data.data_root() == tmp_path and data.data_root("x") == Path("x")
    monkeypatch.delenv("FEDAL_DATA")
    assert data.data_root() == Path("data")


def test_limits_are_seeded_and_nested(tmp_path):
    root = voc(tmp_path / "mine", [Picture(f"p{i:02d}") for i in range(20)])
    few, more = (set(data.load(str(root), SIZE, limit=(n, None))[0].images.ids) for n in (5, 9))
    assert len(few) == 5 and len(more) == 9 and few < more
    assert few == set(data.load(str(root), SIZE, limit=(5, 2))[0].images.ids)
    assert len(data.load(str(root), SIZE, limit=(None, 2))[1]) == 2
    whole = data.load(str(root), SIZE)[0].images.ids
    assert few != set(whole[:5])
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        data.load(str(root), SIZE, limit=(0, 3))
    train, test = data.load("digits", 64, scenes=(9, 9), limit=(4, None))
    assert (len(train), len(test)) == (4, 9)


def test_image_size_is_a_side_or_a_pair():
    assert data.load("digits", 40, scenes=(1, 1))[0].images.image_size == (40, 40)
    with pytest.raises(ValueError, match=r"\(3, 4, 5\)"):
        data.load("digits", (3, 4, 5), scenes=(1, 1))


# ---------------------------------------------------------------------------------------------------------------- KITTI

LONG = (37, 124)  # the shape of KITTI's images, a tenth of the size


def assert_reads_kitti(dataset: data.Dataset, names: tuple[str, ...], whole_pixels: bool = True) -> None:
    """The objects of `miniatures.KITTI` whose class is among `names`, each where its picture is bright."""
    by_id = {picture.id: picture for picture in KITTI}
    for row, i in enumerate(dataset.images.ids):
        kept = [(name, box) for name, box in by_id[i].objects if name in names]
        want = [tuple(float(int(v)) for v in box) if whole_pixels else box for _, box in kept]
        assert objects(dataset, row) == [
            (name, pytest.approx(box, abs=2e-3), False, False) for (name, _), box in zip(kept, want, strict=True)
        ]
        assert tuple(dataset.images.sizes[row].tolist()) == by_id[i].size
        for k in range(len(kept)):
            x1, y1, x2, y2 = dataset.labels.boxes[row, k].round().long().tolist()
            assert dataset.images.pixels[row, :, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().mean() > 150


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("place", ["kitti", "Kitti/raw"])
def test_kitti_is_read_as_written_in_both_class_sets(tmp_path, suffix, place):
    kitti(tmp_path / place, suffix=suffix)
    for name, names, drops in (
        ("kitti", data.KITTI_CLASSES, {"dont_care": 2}),
        ("kitti-2", data.KITTI_TWO, {"dont_care": 2, "other_class": 8}),
    ):
        train, test = data.load(name, LONG, root=tmp_path)
        assert train.name == f"{name} train" and train.class_names == test.class_names == names
        assert (len(train), len(test)) == (9, 3)  # int(0.3 * 12)
        assert {i for side in (train, test) for i in side.images.ids} == {picture.id for picture in KITTI}
        for side in (train, test):
            assert side.images.ids == tuple(sorted(side.images.ids))
            assert_reads_kitti(side, names)
        total = {k: train.drops.get(k, 0) + test.drops.get(k, 0) for k in drops}
        assert total == drops and set(train.drops) | set(test.drops) == set(drops)
    assert data.KITTI_CLASSES == ("Car", "Cyclist", "Misc", "Pedestrian", "Person_sitting", "Tram", "Truck", "Van")
    assert data.KITTI_TWO == ("Car", "Pedestrian")


def test_both_class_sets_and_every_seed_hold_out_the_same_images_of_kitti(tmp_path):
    kitti(tmp_path / "kitti")
    held = {data.load(name, LONG, root=tmp_path, seed=s)[1].images.ids for name in ("kitti", "kitti-2") for s in (0, 7)}
    assert len(held) == 1


def test_kittis_split_has_the_papers_sizes_and_depends_on_the_sorted_ids_alone():
    ids = [f"{i:06d}" for i in range(7481)]
    train, validation = data.kitti_split(ids)
    assert (len(train), len(validation)) == (5237, 2244)  # van Bommel (2021)
    assert sorted(train + validation) == ids and train == sorted(train) and validation == sorted(validation)
    assert data.kitti_split(reversed(ids)) == (train, validation)
    share = sum(int(i) < 3740 for i in validation) / 2244
    assert share == pytest.approx(0.5, abs=0.04)  # drawn from all over; standard deviation 0.009
    assert [len(part) for part in data.kitti_split("ab")] == [1, 1]
    with pytest.raises(ValueError, match=r"1 image\(s\) cannot be split"):
        data.kitti_split("a")


def test_kittis_corners_are_truncated_unless_asked_not_to_be(tmp_path):
    root = kitti(tmp_path)
    whole, exact = (data.read_kitti(root, LONG, whole_pixels=w) for w in (True, False))
    assert objects(whole, 0) == [("Car", pytest.approx((10, 5, 30, 25), abs=1e-3), False, False)]
    assert objects(exact, 0) == [("Car", pytest.approx((10.9, 5.2, 30.5, 25.7), abs=2e-3), False, False)]
    assert_reads_kitti(exact, data.KITTI_CLASSES, whole_pixels=False)
    flat = Picture("000000", LONG, (("Car", (10.1, 5.0, 10.9, 25.0)), ("Car", (30.0, 5.0, 60.0, 25.0))))
    dataset = data.read_kitti(kitti(tmp_path / "flat", [flat]), LONG)
    assert len(objects(dataset, 0)) == 1 and dataset.drops == {"zero_area": 1}


def test_images_that_keep_no_object_of_kitti_stay_as_negatives(tmp_path):
    dataset = data.read_kitti(kitti(tmp_path), LONG, class_names=data.KITTI_TWO)
    assert len(dataset) == 12
    assert dataset.labels.count().tolist() == [1, 2, 0, 0, 0, 0, 1, 0, 2, 0, 1, 1]
    assert "6 images without objects" in dataset.describe()


def test_dont_care_can_be_kept_as_an_ignored_region_of_every_class(tmp_path):
    dataset = data.read_kitti(kitti(tmp_path), LONG, class_names=data.KITTI_TWO, dont_care=True)
    region = pytest.approx((15, 5, 45, 25), abs=1e-3)
    assert objects(dataset, 4) == [("Car", region, True, True), ("Pedestrian", region, True, True)]
    assert dataset.labels.count()[4] == 0 and dataset.drops == {"other_class": 8, "crowd": 4}


def test_image_ids_choose_among_kittis_images_in_their_order(tmp_path):
    dataset = data.read_kitti(kitti(tmp_path), LONG, image_ids=["000007", "000001"], max_bytes=0)
    assert dataset.images.ids == ("000007", "000001") and isinstance(dataset.images, data.StreamedImages)
    same = data.read_kitti(tmp_path, LONG, image_ids=["000001"])
    assert torch.equal(dataset.images.batch([1]), same.images.pixels)


def test_kitti_agrees_with_torchvisions_reader(tmp_path):
    from torchvision.datasets import Kitti

    theirs = Kitti(str(kitti(tmp_path / "Kitti" / "raw").parents[1]))
    ours = data.read_kitti(tmp_path / "Kitti" / "raw", LONG, whole_pixels=False)
    assert len(theirs) == len(ours) == 12
    for n, file in enumerate(theirs.images):
        row = ours.images.ids.index(Path(file).stem)
        image, targets = theirs[n]
        want = [(t["type"], pytest.approx(t["bbox"], abs=2e-3)) for t in targets if t["type"] != "DontCare"]
        assert [(name, list(box)) for name, box, _, _ in objects(ours, row)] == want
        assert (image.height, image.width) == tuple(ours.images.sizes[row].tolist())


GOOD = kitti_line("Car", (1, 2, 30, 20))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (" ".join(GOOD.split()[:14]), r"line 3 has 14 fields: 'Car .*allowed are 15"),
        (GOOD + " 0.9 7", "line 3 has 17 fields"),
        (GOOD.replace("Car", "Bus"), r"line 3 has the type 'Bus'; allowed are Car, Cyclist, .* Van, DontCare"),
        (GOOD.replace("30.00", "wide"), "line 3 has 'wide' .*allowed are finite numbers"),
        (GOOD.replace("30.00", "nan"), "line 3 has 'nan'"),
        (GOOD.replace("-1.35", "1,35"), "line 3 has '1,35'"),
        (kitti_line("Car", (30, 2, 10, 20)), r"'000003', class 'Car', box \[30\.0, 2\.0, .* is inverted"),
        (kitti_line("Car", (130, 2, 140, 20)), r"class 'Car', box \[130\.0, .* lies outside its image"),
    ],
)
def test_a_broken_line_of_kitti_is_named(tmp_path, line, reason):
    file = kitti(tmp_path / "kitti") / "training" / "label_2" / "000003.txt"
    file.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError, match=reason) as error:
        data.load("kitti", LONG, root=tmp_path)
    assert str(file) in str(error.value)


def test_a_score_at_the_end_of_kittis_line_does_no_harm(tmp_path):
    (kitti(tmp_path) / "training" / "label_2" / "000003.txt").write_text(f"{GOOD} 0.9\n")
    box = pytest.approx((1, 2, 30, 20), abs=1e-3)
    assert objects(data.read_kitti(tmp_path, LONG), 3) == [("Car", box, False, False)]


def test_what_is_missing_or_broken_in_kitti_is_named(tmp_path):
    root = kitti(tmp_path / "kitti") / "training"
    (root / "label_2" / "000003.txt").rename(tmp_path / "away.txt")
    with pytest.raises(ValueError, match=r"label_2.000003\.txt does not exist; an image without objects"):
        data.load("kitti", LONG, root=tmp_path)
    (tmp_path / "away.txt").rename(root / "label_2" / "000003.txt")
    (root / "image_2" / "000007.png").rename(tmp_path / "away.png")
    with pytest.raises(ValueError, match=r"image .*image_2.000007\.png does not exist"):
        data.load("kitti-2", LONG, root=tmp_path)
    (tmp_path / "away.png").rename(root / "image_2" / "000007.png")
    image(KITTI[7], root / "image_2", ".jpg")
    with pytest.raises(ValueError, match=r"000007\.png and 000007\.jpg share the image id '000007'"):
        data.load("kitti", LONG, root=tmp_path)
    (root / "image_2" / "000007.jpg").unlink()
    cut(root / "image_2" / "000007.png")
    with pytest.raises(ValueError, match=r"000007\.png is truncated"):
        data.load("kitti", LONG, root=tmp_path)
    (root / "label_2" / "000003.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"000003\.txt is not text"):
        data.read_kitti(root.parent, LONG)
    (root / "label_2").rename(tmp_path / "labels")
    with pytest.raises(ValueError, match=r"training.label_2 does not exist; it should hold one txt file an image"):
        data.read_kitti(root.parent, LONG)


@pytest.mark.parametrize("names", [(), ("Car", "Car"), ("Car", "DontCare")])
def test_kittis_class_names_must_be_different_types(tmp_path, names):
    with pytest.raises(ValueError, match="class_names must be different types other than 'DontCare', got"):
        data.read_kitti(kitti(tmp_path), LONG, class_names=names)


def test_where_kitti_comes_from_is_said_part_by_part(tmp_path):
    with pytest.raises(ValueError, match="object_image_2.zip and data_object_label_2.zip from https://www.cvlibs"):
        data.load("kitti", LONG, root=tmp_path)
    assert not list(tmp_path.iterdir())
    kitti(tmp_path / "Kitti" / "raw")
    (tmp_path / "Kitti" / "raw" / "training" / "label_2").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"Kitti.raw.training.label_2 does not .*get data_object_label_2.zip from"):
        data.load("kitti-2", LONG, root=tmp_path)


@pytest.mark.parametrize("place", ["kitti", "Kitti/raw", "."])
def test_kittis_zips_are_unpacked_where_they_lie(tmp_path, place):
    kitti_zips(tmp_path / place)
    with pytest.raises(ValueError, match="image_2.zip is there, but fetch=False"):
        data.load("kitti", LONG, root=tmp_path, fetch=False)
    train, test = data.load("kitti", LONG, root=tmp_path)
    assert_reads_kitti(train, data.KITTI_CLASSES), assert_reads_kitti(test, data.KITTI_CLASSES)
    assert {path.name for path in (tmp_path / "kitti" / "training").iterdir()} == {"image_2", "label_2"}
    assert not (tmp_path / "kitti" / "testing").exists()
    for part in ("image_2", "label_2"):
        (tmp_path / place / f"data_object_{part}.zip").unlink()
    assert data.load("kitti-2", LONG, root=tmp_path, fetch=False)[1].images.ids == test.images.ids


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("training/label_2/../../../evil.txt", "contains '..'"),
        ("/training/label_2/evil.txt", "is absolute"),
        ("training/label_2/deep/evil.txt", "lies in a folder of its own"),
        ("training/label_2/000003.txt", "is damaged"),  # twice
    ],
)
def test_a_zip_of_kitti_that_would_write_elsewhere_leaves_nothing_behind(tmp_path, entry, reason):
    root = kitti_zips(tmp_path / "in" / "kitti")
    with zipfile.ZipFile(root / "data_object_label_2.zip", "a") as packed:
        if entry in packed.namelist():
            with pytest.warns(UserWarning, match="Duplicate"):
                packed.writestr(entry, "x")
        else:
            packed.writestr(entry, "x")
    with pytest.raises(ValueError, match=reason) as error:
        data.load("kitti", LONG, root=tmp_path / "in")
    assert "data_object_label_2.zip" in str(error.value)
    assert [path.name for path in (root / "training").iterdir()] == ["image_2"]  # whole; and the next call goes on
    assert not list(tmp_path.rglob("evil*"))


def test_a_damaged_or_wrong_zip_of_kitti_is_named(tmp_path):
    root = kitti_zips(tmp_path / "kitti")
    (root / "data_object_image_2.zip").rename(tmp_path / "away.zip")
    (root / "data_object_label_2.zip").rename(root / "data_object_image_2.zip")
    (tmp_path / "away.zip").rename(root / "data_object_label_2.zip")
    with pytest.raises(ValueError, match=r"data_object_image_2\.zip has 0 files .* below training/image_2/"):
        data.load("kitti", LONG, root=tmp_path)
    cut(root / "data_object_image_2.zip")
    with pytest.raises(ValueError, match=r"data_object_image_2\.zip is damaged"):
        data.load("kitti", LONG, root=tmp_path)
    assert not list((root / "training").iterdir())


def test_a_folder_of_ones_own_in_kittis_layout_is_read_with_its_labels(tmp_path):
    train, test = data.load(str(kitti(tmp_path / "mine")), LONG)
    assert train.name == "mine train" and (len(train), len(test)) == (9, 3)
    assert_reads_kitti(train, data.KITTI_CLASSES)


@pytest.mark.skipif(not (REAL / "kitti" / "training").is_dir(), reason="needs KITTI in FEDAL_DATA")
def test_the_real_kitti_has_its_counts():
    train, test = data.load("kitti", (48, 160), root=REAL, fetch=False)
    assert (len(train), len(test)) == (5237, 2244)
    boxes = dict(zip(test.class_names, test.class_counts().sum(dim=0).tolist(), strict=True))
    # van Bommel's own validation list, another draw of the same size, has 8,748 and 1,332
    assert boxes["Car"] == pytest.approx(8748, rel=0.06) and boxes["Pedestrian"] == pytest.approx(1332, rel=0.2)


# ----------------------------------------------------------------------------------------------------- the real sets


@pytest.mark.skipif(not (REAL / "BCCD").is_dir(), reason="needs BCCD in FEDAL_DATA")
def test_the_real_bccd_has_its_counts():
    train, test = data.load("bccd", (48, 64), root=REAL, fetch=False)
    assert (len(train), len(test)) == (292, 72) and train.drops == {"zero_area": 2}
    per_class = train.class_counts().sum(dim=0) + test.class_counts().sum(dim=0)
    assert per_class.tolist() == [4155 - 2, 372, 361]  # 4,888 boxes; the two without area are RBC


@pytest.mark.skipif(not (REAL / "carla").is_dir(), reason="needs CARLA in FEDAL_DATA")
def test_the_real_carla_has_its_counts_in_both_of_its_forms():
    train, test = data.load("carla", (48, 80), root=REAL, fetch=False)
    assert (len(train), len(test)) == (779, 249)
    towns = {town: train.images.groups.count(town) for town in sorted(set(train.images.groups))}
    assert towns == {"Town01": 200, "Town02": 184, "Town03": 337, "Town04": 58}
    assert set(test.images.groups) == {"Town05"}
    assert int(train.labels.count().sum() + test.labels.count().sum()) == 4395
    negatives = sum(int((side.labels.count() == 0).sum()) for side in (train, test))
    assert negatives == 142
    file = REAL / "carla" / "instances_test.json"
    if file.is_file():
        other = data.read_coco(file, REAL / "carla" / "images" / "test", (48, 80))
        assert other.class_names == test.class_names and torch.equal(other.labels.boxes, test.labels.boxes)
        assert torch.equal(other.labels.classes, test.labels.classes) and other.images.groups == test.images.groups


@pytest.mark.skipif(not (REAL / "NEU-DET").is_dir(), reason="needs NEU-DET in FEDAL_DATA")
def test_the_real_neu_det_has_its_counts():
    train, test = data.load("neu-det", 48, root=REAL)
    assert (len(train), len(test)) == (1260, 540)
    assert sum(int((side.labels.classes > 0).sum()) for side in (train, test)) == 4189
    assert train.drops["difficult"] + test.drops["difficult"] == 81
