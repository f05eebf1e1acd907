"""What real people hand to tools like this one: a kind of trouble each, from cases.json and ../shared/cases."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from fedal_utils import __main__ as command
from fedal_utils import data

HERE = Path(__file__).resolve()
SHARED = HERE.parents[3] / "shared" / "cases"
SOURCES = [json.loads(HERE.with_name("cases.json").read_text()), SHARED]


def photograph() -> bytes:
    """96 x 64, bright where the boxes of all cases are."""
    image, out = Image.new("RGB", (96, 64), (40, 60, 80)), io.BytesIO()
    ImageDraw.Draw(image).rectangle((10, 12, 39, 35), fill=(230, 220, 210))
    image.save(out, "JPEG")
    return out.getvalue()


def build(folder: Path, tree: dict | Path) -> Path:
    """The files of a case; a text without an ending that is a path becomes a link."""
    folder.mkdir(parents=True)
    for name in sorted(tree) if isinstance(tree, dict) else sorted(p.name for p in tree.iterdir()):
        content = tree[name] if isinstance(tree, dict) else tree / name
        if isinstance(content, dict) or (isinstance(content, Path) and content.is_dir()):
            build(folder / name, content)
            continue
        if isinstance(content, Path):
            content = content.read_bytes()
        raw = photograph() if content is None else content.encode("latin-1") if isinstance(content, str) else content
        if "." not in name and raw.startswith(b"../"):
            (folder / name).symlink_to(raw.decode().strip())
        else:
            (folder / name).write_bytes(raw)
    return folder


def case(source: dict | Path, name: str, folder: Path) -> Path:
    """The folder of a case, beside the others of its kind."""
    if isinstance(source, Path) and not source.is_dir():
        pytest.skip("../shared/cases is not there")
    kind, inner = name.split("/")
    build(folder / kind, source[kind] if isinstance(source, dict) else source / kind)
    return folder / kind / inner


# images and boxes of train and test (None: 3 and 1, drawn), objects by class in both, ids of test where they matter
READ = [
    ("01-yolo-names/names-from-1", None, {"cat": 4, "dog": 0}, None),
    ("01-yolo-names/names-strkeys", None, {f"c{i:02d}": 2 * (i in (2, 10)) for i in range(12)}, None),
    ("01-yolo-names/names-norway", None, {"no": 2, "yes": 2}, None),
    ("02-yolo-two-name-files/yaml-other", None, {"cat": 4, "dog": 0}, None),
    ("03-yolo-split/s-coco128", (8, 3), {"cat": 11}, ["val2017/v0", "val2017/v1", "val2017/v2"]),
    ("03-yolo-split/s-folders", (8, 2), {"cat": 10}, ["site_c/site_c0", "site_c/site_c1"]),
    ("03-yolo-split/s-dev", (6, 2), {"0": 8}, ["dev/dev0", "dev/dev1"]),
    ("05-linked-folders/link-labels", (6, 2), {"cat": 8}, ["val/val0", "val/val1"]),
    ("05-linked-folders/link-both-train", (6, 2), {"cat": 8}, ["val/val0", "val/val1"]),
    ("05-linked-folders/link-coco", (4, 1), {"cat": 5}, None),
    ("07-encodings/bom-classes", None, {"cat": 2, "dog": 2}, None),
    ("07-encodings/bom-labels", None, {"cat": 2, "dog": 2}, None),
    ("07-encodings/utf16-classes", None, {"cat": 2, "dog": 2}, None),
    ("07-encodings/v-bom", (4, 2), {"cat": 6}, ["a4", "a5"]),
    ("07-encodings/x-gbk", None, {"cat": 3, "\u732b": 1}, None),
    ("08-voc-ids-with-spaces/v-space", (4, 2), {"cat": 6}, ["IMG 4", "IMG 5"]),
    ("08-voc-ids-with-spaces/v-space3", (1, 1), {"cat": 2}, ["dog 1"]),
    ("08-voc-ids-with-spaces/v-perclass", (4, 2), {"cat": 6}, ["a4", "a5"]),
    ("10-coco-same-names/c-same-names", (5, 2), {"cat": 7, "dog": 0}, ["test/000000.jpg", "test/000001.jpg"]),
    ("11-coco-file-names/c-backslash", None, {"cat": 4, "dog": 0}, None),
    ("12-exif-garbage/e-png-garbage", None, {"cat": 4}, None),
]
REFUSED = [
    ("01-yolo-names/names-holes", r"p1\.txt: line 1 is '1 .*there is no 1.* 0 \(cat\), 2 \(dog\)"),
    ("01-yolo-names/names-dup", r"data\.yaml: .*no class name stands twice"),
    ("02-yolo-two-name-files/classes-differ", r"val/classes\.txt .*train/classes\.txt .*must agree"),
    ("07-encodings/gbk-classes", r"classes\.txt is not text in UTF-8"),
    ("07-encodings/x-unknown", r"a\d\.xml is .*unknown encoding"),
    ("09-coco-types/c-size-str", r"instances\.json: image .*: '64' is no number"),
    ("09-coco-types/c-cat-mixed", r"instances\.json: category .*: '1' is no number"),
    ("09-coco-types/c-ann-null", r"instances\.json: object 4, None"),
    ("09-coco-types/c-bbox-bigint", r"instances\.json: object 0, .*9999"),
    ("09-coco-types/c-cat-name-null", r"instances\.json: category .*class None"),
    ("09-coco-types/c-crowd-str0", r"instances\.json: object 0, .*there is no '0'"),
]


@pytest.mark.parametrize("source", SOURCES, ids=["own", "shared"])
@pytest.mark.parametrize(("name", "counts", "per_class", "test_ids"), READ, ids=[row[0] for row in READ])
def test_a_case_is_read_as_its_readme_wants(source, name, counts, per_class, test_ids, tmp_path):
    folder = case(source, name, tmp_path)
    report = data.inspect_folder(str(folder))
    sides = report["splits"]
    assert [sides[s]["images"] for s in ("train", "test")] == list(counts or (3, 1))
    assert [sides[s]["boxes"] for s in ("train", "test")] == list(counts or (3, 1))
    assert {c: sum(side["per_class"][c] for side in sides.values()) for c in report["classes"]} == per_class
    assert test_ids is None or sides["test"]["ids"] == test_ids
    assert report["split_from"].startswith("drawn") == (counts is None or name.endswith("link-coco"))
    train, test = data.load(str(folder), (64, 96))
    assert train.class_names == tuple(per_class) and (len(train), len(test)) == (counts or (3, 1))
    assert ("drawn 80 : 20" in train.describe()) == report["split_from"].startswith("drawn")
    x1, y1, x2, y2 = train.labels.boxes[0, 0].round().long().tolist()
    assert (x1, y1, x2, y2) == (10, 12, 40, 36)


@pytest.mark.parametrize("source", SOURCES, ids=["own", "shared"])
@pytest.mark.parametrize(("name", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_case_that_cannot_be_read_is_an_error_that_names_file_and_entry(source, name, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        data.load(str(case(source, name, tmp_path)), (64, 96))


@pytest.mark.parametrize("source", SOURCES, ids=["own", "shared"])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("same-names", ["0a1b2c3d-IMG_0001.jpg", "9f8e7d6c-IMG_0001.jpg"]),
        ("s3-same-base", ["cam1/0001.jpg", "cam2/0001.jpg"]),
        ("upload-subdir", ["a0.jpg"]),
        ("bom", ["a0.jpg"]),
        ("ann-ids", r"export\.json: task 1: "),
        ("label-space", r"task 1: class 'cat '"),
        ("base64", r"task 1: .*images inside the export are not read"),
    ],
)
def test_a_case_of_label_studio(source, name, wanted, tmp_path, capsys):
    file = case(source, f"14-label-studio/{name}", tmp_path) / "export.json"
    for place in (file, file.parent):  # inspect tells the command that reads it
        assert command.main(["inspect", str(place)]) == 2
        told = capsys.readouterr().err.strip()
        assert told.endswith(f"`python -m fedal_utils import labels.sqlite {file} --format label_studio`")
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            data.read_label_studio(file)
        return
    records = data.read_label_studio(file)
    assert [record.id for record in records] == wanted
    for record in records:  # 10, 20, 30, 40 per cent of 96 x 64
        assert record.objects[0].box == pytest.approx((9.6, 12.8, 38.4, 38.4)) and record.size == (64, 96)
