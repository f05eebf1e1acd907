"""Sets by name, on miniatures of their layouts and on the real files where they are."""

import json
import os
from pathlib import Path

import pytest
import torch
from miniatures import KITTI, THREE, Picture, coco_content, folder, kitti, voc, written

from fedal_utils import data
from fedal_utils.data import catalogue, download
from fedal_utils.data.formats_txt import KITTI_CLASSES, KITTI_TWO, kitti_split

REAL = Path(os.environ.get("FEDAL_DATA", "-"))
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZE, LONG = (48, 64), (37, 124)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("place", ["kitti", "Kitti/raw"])
def test_kitti_in_both_class_sets(tmp_path, suffix, place):
    kitti(tmp_path / place, suffix=suffix)
    for name, names, drops in (
        ("kitti", KITTI_CLASSES, {"dont_care": 2}),
        ("kitti-2", KITTI_TWO, {"dont_care": 2, "other_class": 8}),
    ):
        train, test = data.load(name, LONG, root=tmp_path)
        assert train.class_names == test.class_names == names
        assert (len(train), len(test)) == (9, 3)  # int(0.3 * 12)
        assert {i for side in (train, test) for i in side.images.ids} == {picture.id for picture in KITTI}
        assert {k: train.drops.get(k, 0) + test.drops.get(k, 0) for k in drops} == drops
        held = {data.load(n, LONG, root=tmp_path, seed=s)[1].images.ids for n in ("kitti", "kitti-2") for s in (0, 7)}
        assert held == {test.images.ids}  # whatever the classes and the seed


def test_kittis_split_has_the_papers_sizes_and_depends_on_the_sorted_ids_alone():
    ids = [f"{i:06d}" for i in range(7481)]
    train, validation = kitti_split(ids)
    assert (len(train), len(validation)) == (5237, 2244)  # van Bommel (2021)
    assert sorted(train + validation) == ids and train == sorted(train) and validation == sorted(validation)
    assert kitti_split(reversed(ids)) == (train, validation)
    assert sum(int(i) < 3740 for i in validation) / 2244 == pytest.approx(0.5, abs=0.04)  # standard deviation 0.009


def year(root: Path, name: str, ids, splits: dict) -> None:
    pictures = [Picture(i, objects=(("dog", (10, 5, 30, 25)),)) for i in ids]
    voc(root / "VOCdevkit" / name, pictures, splits, ".jpg", one_based=True)


def test_voc07_and_voc12_count_from_one_and_keep_their_splits(tmp_path):
    year(tmp_path, "VOC2007", "abc", {"trainval": "ab", "test": "c"})
    year(tmp_path, "VOC2012", "def", {"train": "d", "val": "ef"})  # trainval is both
    for name, train_ids, test_ids in (("voc07", "ab", "c"), ("voc12", "d", "ef"), ("voc0712", "abdef", "c")):
        train, test = data.load(name, SIZE, root=tmp_path)
        assert train.images.ids == tuple(train_ids) and test.images.ids == tuple(test_ids)
        size = torch.tensor([[40, 60]])
        box = data.to_original(train.labels.boxes[:1, 0], size, SIZE)[0].tolist()
        assert box == pytest.approx((10, 5, 30, 25), abs=1e-3) and len(train.class_names) == 20


def test_voc07s_test_half_splits_as_the_scaled_copy_does(tmp_path):
    """The first 15 ids of the test half; which of them the copy holds out is typed here."""
    ids = "000001 000002 000003 000004 000006 000008 000010 000011 000013 000014 000015 000018 000022 000025 000027"
    held = {"000001", "000004", "000008", "000022"}
    year(tmp_path, "VOC2007", ids.split(), {"test": ids.split()})
    train, test = data.load("voc07-half", SIZE, root=tmp_path)
    assert set(test.images.ids) == held and set(train.images.ids) == set(ids.split()) - held


def test_coco_by_name(tmp_path):
    for split, pictures in (("train2017", THREE[:2]), ("val2017", THREE[2:])):
        folder(tmp_path / "coco" / split, pictures)
        content = coco_content(pictures, ".jpg")
        content["categories"] = coco_content(THREE)["categories"]
        content["annotations"] = [a | {"category_id": 10} for a in content["annotations"]]
        written(tmp_path / "coco" / "annotations" / f"instances_{split}.json", json.dumps(content))
    train, test = data.load("coco", SIZE, root=tmp_path)
    assert train.images.ids == ("a.jpg", "b.jpg") and test.images.ids == ("c.jpg",)
    assert train.class_names == ("cat", "dog") and train.labels.valid.sum(1).tolist() == [2, 1]


def test_hit_uav_as_published_has_days_as_groups_and_ignores_what_nobody_cares_for(tmp_path):
    """Five frames of one day, two of another: the last fifth of each day, by frame number, is held out."""
    root, days = tmp_path / "HIT-UAV", 5 * ["20210116"] + 2 * ["20210121"]
    objects = ("Car", (10, 5, 30, 25)), ("DontCare", (40, 0, 60, 20))
    pictures = [Picture(f"0_60_30_0_{n:05d}", objects=objects) for n in (9, 3, 17, 5, 1, 8, 2)]
    voc(root / "normal_xml", pictures, suffix=".jpg")
    one = {"height": 40, "width": 60}
    entries = [{"filename": f"{p.id}.jpg", "id": i, "date_captured": days[i]} | one for i, p in enumerate(pictures)]
    for split, part in (("train", entries[:4]), ("val", entries[4:]), ("test", [])):
        file = root / "normal_json" / "annotations" / f"{split}.json"
        written(file, json.dumps({"images": part, "annotation": [], "categories": []}))
    train, test = data.load("hit-uav", SIZE, root=tmp_path)
    assert [int(i[-9:-4]) for i in train.images.ids] == [1, 2, 3, 5, 8, 9]
    assert [group[-2:] for group in train.images.groups] == ["16", "21", "16", "16", "21", "16"]
    assert [int(i[-9:-4]) for i in test.images.ids] == [17] and test.images.groups == ("20210116",)
    assert train.labels.classes[0].tolist() == [2, 1, 2, 3, 4]
    assert train.labels.crowd[0].tolist() == train.labels.ignore[0].tolist() == [False, True, True, True, True]
    assert train.labels.valid.sum(1).tolist() == [1] * 6 and train.drops == {"crowd": 24}


@pytest.mark.parametrize("name", ["voc07", "voc07-half", "voc12", "voc0712", "coco", "kitti", "kitti-2"])
def test_a_set_that_is_not_there_and_cannot_be_fetched_names_folder_and_origin(tmp_path, name):
    with pytest.raises(ValueError, match="http") as error:
        data.load(name, SIZE, root=tmp_path)
    assert str(tmp_path / catalogue.SOURCES[name].places[0]) in str(error.value) and not list(tmp_path.iterdir())


def test_a_set_that_can_be_fetched_is_fetched_once_asked(tmp_path, monkeypatch):
    def fetch(name, root):
        assert name == "BCCD"
        pictures = [Picture(i, objects=(("WBC", (1, 1, 20, 20)),)) for i in "abc"]
        return voc(root / name, pictures, splits={"train": "a", "val": "b", "test": "c"})

    with pytest.raises(ValueError, match="BCCD does not exist"):
        data.inspect_folder("bccd", tmp_path)
    monkeypatch.setattr(download, "fetch", fetch)
    train, test = data.load("bccd", SIZE, root=tmp_path)
    assert train.images.ids == ("a", "b") and test.images.ids == ("c",)
    assert train.class_names == ("RBC", "WBC", "Platelets") and train.labels.classes[0].tolist() == [2]


@pytest.mark.parametrize(
    ("name", "folder", "images", "boxes", "drops"),
    [
        ("bccd", "BCCD", (292, 72), [4155 - 2, 372, 361], {"zero_area": 2}),  # the two without area are RBC
        ("hit-uav", "HIT-UAV", (2319, 579), [12312, 7311, 4980, 148], {"crowd": 4 * 148}),
        ("voc07-half", "VOC07", (3466, 1486), [14976 - 2944], {"difficult": 2944}),  # of all 20 classes
    ],
)
def test_a_real_set_has_its_counts(name, folder, images, boxes, drops):
    if not (REAL / folder).is_dir():
        pytest.skip(f"needs {folder} in FEDAL_DATA")
    train, test = data.load(name, 32, root=REAL)
    counted = sum(side.class_counts().sum(dim=0) for side in (train, test)).tolist()
    assert (len(train), len(test)) == images and (counted if len(boxes) > 1 else [sum(counted)]) == boxes
    assert {reason: train.drops.get(reason, 0) + test.drops.get(reason, 0) for reason in drops} == drops
    if name == "hit-uav":
        days = {day: train.images.groups.count(day) for day in set(train.images.groups)}
        assert len(days) == 9 and days["20201217"] == 470 and set(test.images.groups) == set(days)
    if name == "voc07-half":
        assert json.loads(Path(catalogue.__file__).with_name("voc07_half.json").read_text()) == list(test.images.ids)


@pytest.mark.skipif(not (SHARED / "HIT-UAV-original-sample").is_dir(), reason="needs ../shared/data")
def test_the_sample_of_hit_uav_as_published_agrees_with_the_scaled_copy(tmp_path):
    """45 files in the published layout, 640 x 512, beside their copies of 448 x 358: same days, classes and places."""
    (tmp_path / "HIT-UAV").symlink_to(SHARED / "HIT-UAV-original-sample")
    sides = data.load("hit-uav", (358, 448), root=tmp_path)
    assert sum(len(side) for side in sides) == 45
    copies = data.load("hit-uav", (358, 448), root=SHARED)
    rows = {i: (copy, row) for copy in copies for row, i in enumerate(copy.images.ids)}
    for side in sides:
        for here, i in enumerate(side.images.ids):
            copy, there = rows[i]
            one, other = side.take([here]), copy.take([there])
            k = int((one.labels.classes > 0).sum())
            assert one.images.groups == other.images.groups
            for name in ("classes", "crowd"):
                assert torch.equal(getattr(one.labels, name)[:, :k], getattr(other.labels, name)[:, :k])
            assert (one.labels.boxes[:, :k] - other.labels.boxes[:, :k]).abs().max() < 1.5  # rounded twice


