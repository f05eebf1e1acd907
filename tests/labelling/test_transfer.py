"""Labels go out of a store and come into another one; they join the loop as if somebody had answered at the page."""

import json

import pytest
from PIL import Image

from fedal_utils import __main__ as command
from fedal_utils.labelling import Question, Simulated, Store, export, load

CLASSES = ["cat", "dog"]
DRAWN = {
    "a/1.jpg": [{"class": "cat", "box": [1.5, 2, 30, 41]}, {"class": "dog", "box": [0, 0, 80, 60]}],
    "b.jpg": [],
    "c.jpg": [{"class": "dog", "box": [10, 10.25, 20, 20]}],
}


def filled(path, labels, task="boxes"):
    store = Store(path, CLASSES, task)
    store.queue(Question(image, size=(60, 80)) for image in labels)
    Simulated(labels).answer_all(store, "Ann")
    return store


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_boxes_come_back_through_every_format(form, tmp_path):
    out = tmp_path / ("labels.json" if form == "coco" else "out")
    with filled(tmp_path / "labels.sqlite", DRAWN) as store:
        store.undo("Ann"), store.answer("Ann", "c.jpg", DRAWN["c.jpg"])  # what was taken back is not written twice
        assert export(store, form, out) == 3
    for image in DRAWN if form == "yolo" else ():  # whose fractions are of the images beside them
        (out / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60)).save(out / "images" / image)
    with Store(tmp_path / "new.sqlite", CLASSES, "boxes") as other:
        other.queue(Question(image, cycle=4) for image in ("c.jpg", "a/1.jpg", "z.jpg"))
    assert command.main(["import", str(tmp_path / "new.sqlite"), "--format", form, str(out), "--who", "Bob"]) == 0
    with Store(tmp_path / "new.sqlite") as other:
        found = other.labels()
        for image, boxes in DRAWN.items():
            name = image if image in found else image.removesuffix(".jpg")
            assert [one["class"] for one in found[name]] == [one["class"] for one in boxes]
            for one, want in zip(found[name], boxes, strict=True):
                assert one["box"] == pytest.approx(want["box"], abs=1e-6)
        assert len(found) == 3 and {"c.jpg", "a/1.jpg"} <= set(found)  # names need no ending where the store has one
        assert other.next("Ann").image == "z.jpg" and set(other.history()["who"]) == {"Bob"}
    assert load(tmp_path / "new.sqlite", form, out) == 0  # the same again is nothing new


def test_classes_of_whole_images_go_out_as_a_table_and_come_from_label_studio(tmp_path):
    with filled(tmp_path / "a.sqlite", {"x.jpg": "cat", "y.jpg": "dog"}, "classes") as store:
        assert export(store, "csv", tmp_path / "a.csv") == 2
        with pytest.raises(ValueError, match="cannot be written as COCO JSON"):
            export(store, "coco", tmp_path / "a.json")
    assert (tmp_path / "a.csv").read_text().splitlines()[1].startswith("x.jpg,cat,")
    choice = {"type": "choices", "from_name": "c", "to_name": "i", "value": {"choices": ["dog"]}}
    tasks = [{"id": 7, "data": {"image": "x.jpg"}, "annotations": [{"result": [choice]}]}]
    (tmp_path / "studio.json").write_text(json.dumps(tasks))
    for store, labels in (("a", {"x.jpg": "dog", "y.jpg": "dog"}), ("made", {"x.jpg": "dog"})):
        assert load(tmp_path / f"{store}.sqlite", "label_studio", tmp_path / "studio.json") == 1
        with Store(tmp_path / f"{store}.sqlite") as found:
            assert found.labels() == labels  # of two labels the one that was imported last counts


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with filled(tmp_path / "labels.sqlite", DRAWN):
        pass
    for words in (
        ["export", str(tmp_path / "none.sqlite"), "--format", "coco", str(tmp_path / "out")],
        ["export", str(tmp_path / "labels.sqlite"), "--format", "word", str(tmp_path / "out")],
        ["import", str(tmp_path / "labels.sqlite"), "--format", "coco", str(tmp_path / "none.json")],
    ):
        assert command.main(words) == 2
        assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()
    assert command.main(["export", str(tmp_path / "labels.sqlite"), "--format", "coco", str(tmp_path / "l.json")]) == 0
    assert capsys.readouterr().out == f"3 images: {tmp_path / 'l.json'}\n"
