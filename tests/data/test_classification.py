"""Classification sets: each source on a miniature of its real layout, every bad input by name, the real zips."""

import hashlib
import io
import pickle
import urllib.error
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import Picture, cut, pixels
from PIL import Image
from torchvision import datasets
from torchvision.datasets import cifar

from fedal_utils import data
from fedal_utils.data import classification
from fedal_utils.data.digits import digit_sources


def encoded(name: str, size: tuple[int, int] = (40, 60), suffix: str = ".png") -> bytes:
    """A picture that depends on its id alone, as the bytes of a file."""
    out = io.BytesIO()
    Image.fromarray(pixels(Picture(name, size, ()))).save(out, {".jpg": "JPEG", ".png": "PNG"}[suffix])
    return out.getvalue()


def written(place: Path, files: dict[str, bytes]) -> Path:
    """The same files as a folder or, if `place` ends in .zip, as a zip."""
    if place.suffix == ".zip":
        place.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in files.items():
                packed.writestr(name, content)
        return place
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def many(*names: str, suffix: str = ".png", **sizes: tuple[int, int]) -> dict[str, bytes]:
    """Files of these names, each with its own picture."""
    return {name: encoded(name, sizes.get(name.split("/")[-1].split(".")[0], (40, 60)), suffix) for name in names}


BOTH = many("train/dog/b.png", "train/cat/a.png", "train/cat/c.png", "test/cat/d.png", "test/dog/e.png")
FLAT = many(*(f"{name}/{i}.png" for name in ("cat", "dog", "emu") for i in range(5)))


def assert_one_whole_object_each(dataset: data.Dataset) -> None:
    height, width = dataset.images.image_size
    labels = dataset.labels
    assert labels.boxes.shape == (len(dataset), 1, 4) and labels.boxes.dtype == torch.float32
    assert (labels.boxes == torch.tensor([0.0, 0.0, width, height])).all() and not labels.crowd.any()
    assert dataset.images.pixels.dtype == torch.uint8 and dataset.images.pixels.shape[1:] == (3, height, width)
    assert (dataset.class_counts().sum(dim=1) == 1).all()
    assert torch.equal(dataset.dominant_class(), labels.classes[:, 0])


def told(dataset: data.Dataset) -> dict[str, str]:
    """id -> class name."""
    classes = [dataset.class_names[c - 1] for c in dataset.labels.classes[:, 0]]
    return dict(zip(dataset.images.ids, classes, strict=True))


def test_digit_images_are_scikit_learns_digits_split_as_the_scenes_are():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = data.load_classes("digit-images", 8, seed=3)
    assert (train.name, test.name) == ("digit-images train", "digit-images test")
    assert (len(train), len(test)) == (1257, 540) and train.class_names == tuple("0123456789")
    for part, rows in zip((train, test), digit_sources(3), strict=True):
        assert_one_whole_object_each(part)
        assert part.images.ids == tuple(f"digit/{row:04d}" for row in sorted(rows))
        rows = np.sort(rows)
        assert part.labels.classes[:, 0].tolist() == (digits.target[rows] + 1).tolist()
        grey = np.round(digits.images[rows] * 255 / 16).astype(np.uint8)
        assert np.array_equal(part.images.pixels.numpy(), np.repeat(grey[:, None], 3, axis=1))
        assert (part.images.sizes == 8).all()
    assert data.load_classes("digit-images", 8, seed=4)[0].images.ids != train.images.ids


def pickles(root: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """The layout that the official archives unpack to, with a few images a file; torchvision is told their MD5."""
    rng = np.random.default_rng(0)
    key, meta_key = ("labels", "label_names") if kind is datasets.CIFAR10 else ("fine_labels", "fine_label_names")
    names = [f"class {i}" for i in range(10 if kind is datasets.CIFAR10 else 100)]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def dump(file: str, content: dict) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    kept: dict[str, list] = {"train": [], "test": []}
    for attribute, split in (("train_list", "train"), ("test_list", "test")):
        listed = []
        for file, _ in getattr(kind, attribute):
            labels = rng.integers(0, len(names), 6).tolist()
            rows = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
            coarse = {} if key == "labels" else {"coarse_labels": [0] * 6}
            listed.append([file, dump(file, {"data": rows, key: labels, "batch_label": file} | coarse)])
            kept[split].append((rows.reshape(-1, 3, 32, 32), labels))
        monkeypatch.setattr(kind, attribute, listed)
    md5 = dump(kind.meta["filename"], {meta_key: names, "coarse_label_names": ["wrong"]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5})
    return {
        split: [np.concatenate([np.asarray(part[n]) for part in parts]) for n in (0, 1)]
        for split, parts in kept.items()
    }


KINDS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


@pytest.mark.parametrize("name", KINDS)
def test_cifar_is_read_from_the_official_pickles(name, tmp_path, monkeypatch):
    truth = pickles(tmp_path, KINDS[name], monkeypatch)
    sides = data.load_classes(name, 32, tmp_path)
    for split, part in zip(("train", "test"), sides, strict=True):
        images, labels = truth[split]
        assert part.name == f"{name} {split}" and len(part) == len(labels)
        assert_one_whole_object_each(part)
        assert part.images.ids == tuple(f"{split}/{i:05d}" for i in range(len(part)))
        assert np.array_equal(part.images.pixels.numpy(), images)
        assert part.labels.classes[:, 0].tolist() == (labels + 1).tolist()
        assert (part.images.sizes == 32).all() and part.class_names[3] == "class 3"
    assert len(sides[0].class_names) == {"cifar10": 10, "cifar100": 100}[name]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # reading needs no right to write


@pytest.mark.parametrize("name", KINDS)
def test_a_download_that_fails_says_where_it_was_looked_for_and_where_to_get_it(tmp_path, monkeypatch, name):
    def broken(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(cifar, "download_and_extract_archive", broken)
    with pytest.raises(ConnectionError) as error:
        data.load_classes(name, 32, tmp_path / "new")
    for word in (str(tmp_path / "new"), KINDS[name].url, KINDS[name].filename, "cifar10-jpeg", "no network"):
        assert word in str(error.value)


def test_cifar_jpeg_is_read_from_the_zips(tmp_path):
    """Both zips as published: folder entries, then train/<class>/0000.jpg in no order."""
    for split, count in (("train", 3), ("test", 2)):
        names = [f"{split}/{c}/{i:04d}.jpg" for i in range(count) for c in ("cat", "airplane", "truck")]
        files = {f"{split}/": b"", f"{split}/cat/": b""}
        files |= {name: encoded(name, (32, 32), ".jpg") for name in names[::-1]}
        written(tmp_path / f"cifar10_{split}_jpeg.zip", files)
    train, test = data.load_classes("cifar10-jpeg", 32, tmp_path)
    assert (train.name, test.name) == ("cifar10-jpeg train", "cifar10-jpeg test")
    assert train.class_names == test.class_names == ("airplane", "cat", "truck")
    assert (len(train), len(test)) == (9, 6)
    assert train.images.ids[:4] == (*(f"train/airplane/000{i}.jpg" for i in range(3)), "train/cat/0000.jpg")
    for part in (train, test):
        assert_one_whole_object_each(part)
        assert all(i.split("/")[1] == name for i, name in told(part).items())
        for row in (0, 5):
            read = np.asarray(Image.open(io.BytesIO(encoded(part.images.ids[row], (32, 32), ".jpg"))))
            assert np.array_equal(part.images.pixels[row].numpy(), read.transpose(2, 0, 1))
    for spoil in (cut, Path.unlink):
        spoil(tmp_path / "cifar10_train_jpeg.zip")
        with pytest.raises(ValueError, match="cifar10_train_jpeg.zip is missing or damaged"):
            data.load_classes("cifar10-jpeg", 32, tmp_path)


def test_the_real_jpeg_zips(real_data):
    if not (real_data / "cifar10_train_jpeg.zip").is_file():
        pytest.skip("FEDAL_DATA has no cifar10_train_jpeg.zip")
    for part, count in zip(data.load_classes("cifar10-jpeg", 32, real_data, limit=(300, 100)), (300, 100), strict=True):
        assert len(part) == count and (part.images.sizes == 32).all()
        assert_one_whole_object_each(part)
        assert len(set(told(part).values())) == 10
        assert 90 < part.images.pixels.float().mean() < 150  # the official training images have a mean of 120.7
    *sides, names = classification.find_classes("cifar10-jpeg", real_data, 0)[:3]
    assert names == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for side, count in zip(sides, (5000, 1000), strict=True):
        assert Counter(record.label for record in side) == dict.fromkeys(names, count)


@pytest.fixture(params=["pets", "pets.zip"])
def place(request, tmp_path) -> Callable[[dict[str, bytes]], Path]:
    """files -> where they lie: a folder, or a zip."""
    return lambda files: written(tmp_path / request.param, files)


def test_class_folders_in_train_and_test(place, tmp_path):
    train, test = data.load_classes(str(place(BOTH)), (40, 60))
    assert (train.name, test.name) == ("pets train", "pets test") and train.class_names == ("cat", "dog")
    assert told(train) == {"train/cat/a.png": "cat", "train/cat/c.png": "cat", "train/dog/b.png": "dog"}
    assert told(test) == {"test/cat/d.png": "cat", "test/dog/e.png": "dog"}
    for part in (train, test):
        assert_one_whole_object_each(part)
        for row, i in enumerate(part.images.ids):
            want = pixels(Picture(i, (40, 60), ())).transpose(2, 0, 1)
            assert np.array_equal(part.images.pixels[row].numpy(), want)
    assert not train.drops and train.reading.split_from == "the folders test, train"


def test_without_splits_one_in_five_is_for_testing(place):
    at = str(place(FLAT))
    train, test = data.load_classes(at, 24)
    assert (len(train), len(test)) == (12, 3) and train.class_names == test.class_names == ("cat", "dog", "emu")
    assert set(train.images.ids) | set(test.images.ids) == set(FLAT) and not set(train.images.ids) & set(
        test.images.ids
    )
    assert all(i.split("/")[0] == name for part in (train, test) for i, name in told(part).items())
    assert data.load_classes(at, 24, seed=1)[1].images.ids != test.images.ids
    assert "drawn 80 : 20" in train.describe()


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        (["train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"], "ab", "cd"),
        (["Training/cat/a.png", "Training/dog/b.png", "Validation/cat/c.png", "Validation/dog/d.png"], "ab", "cd"),
        ([f"{s}/{c}/{s[:2]}.png" for s in ("train", "val", "test") for c in "cd"], ["tr", "va"], ["te"]),
        ([f"outer/inner/{s}/{c}/{s[:2]}.png" for s in ("train", "test") for c in "cd"], ["tr"], ["te"]),
    ],
)
def test_splits_are_folders_also_within_others(place, files, train, test):
    sides = data.load_classes(str(place(many(*files) | {"README.md": b"hello"})), 8)
    assert [sorted({Path(i).stem for i in side.images.ids}) for side in sides] == [sorted(train), sorted(test)]
    assert all("inner" not in i for side in sides for i in side.images.ids)


def test_hidden_files_and_other_files_are_passed_and_deeper_images_belong_to_their_class(place):
    hidden = ".DS_Store train/.hidden/z.png train/cat/._a.png __MACOSX/train/cat/a.png train/cat/notes.txt"
    extra = dict.fromkeys(hidden.split(), b"x")
    train, test = data.load_classes(str(place(BOTH | extra | many("train/cat/deeper/f.png"))), 8)
    cats = dict.fromkeys(("train/cat/a.png", "train/cat/c.png", "train/cat/deeper/f.png"), "cat")
    assert len(test) == 2 and told(train) == cats | {"train/dog/b.png": "dog"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b"x"}, "is empty: no .jpg"),
        (many("a.png", "cat/b.png", "dog/c.png"), "a.png lies in no class folder"),
        (many("train/cat/a.png", "train/dog/b.png", "test/c.png"), "test/c.png lies in no class folder"),
        (BOTH | many("other/cat/x.png"), "other/cat/x.png lies in no class folder"),
        (BOTH | many("train/emu/x.png"), "no image of .*'test', 'emu'"),
        (BOTH | many("val/cat/x.png"), "no image of .*'val', 'dog'"),
        (many("train/cat/a.png", "test/cat/b.png"), r"has the classes \('cat',\), two are needed"),
        (BOTH | {"train/cat/a.png": encoded("a")[:-400]}, "train/cat/a.png is truncated or corrupt"),
    ],
)
def test_what_is_wrong_with_class_folders_is_named(place, files, message):
    with pytest.raises(ValueError, match=message):
        data.load_classes(str(place(files)), 8)


def test_inspect_tells_of_class_sets_and_class_folders(place):
    report = data.inspect_folder(str(place(BOTH)))
    assert (report["format"], report["classes"]) == ("class folders", ["cat", "dog"])
    assert report["split_from"] == "the folders test, train"
    ids = ["train/cat/a.png", "train/cat/c.png", "train/dog/b.png"]
    assert report["splits"]["train"] == {
        **{"images": 3, "not_labelled": 0, "boxes": 0, "per_class": {"cat": 2, "dog": 1}, "ids": ids}
    }
    digits = data.inspect_folder("digit-images")
    assert digits["splits"]["train"]["images"] == sum(digits["splits"]["train"]["per_class"].values()) == 1257
    assert len(data.contact_sheet("digit-images", count=5)) == 5
