"""One place opens images: upright whatever the format says, whole, of at most 8 bits, bounded, letterboxed."""

import warnings

import numpy as np
import pytest
import torch
from miniatures import THREE, Picture, cut, folder, image, pixels
from PIL import Image, ImageFile

from fedal_utils import data
from fedal_utils.data import files as room

BOX = (10.0, 5.0, 30.0, 25.0)
TURN = Image.Transpose
# how a camera stores an upright photograph that is to be shown by this orientation (EXIF 2.3, tag 274)
STORED = {1: None, 2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM}
STORED |= {5: TURN.TRANSPOSE, 6: TURN.ROTATE_90, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_270}


def photograph(path, orientation: int, size: tuple[int, int] = (40, 60)) -> Image.Image:
    """The upright picture, bright in BOX; in the file it lies as a camera would have it."""
    upright = Image.fromarray(pixels(Picture(path.stem, size, (("cat", BOX),))))
    tag = Image.Exif()
    tag[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(STORED[orientation])
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.save(path, exif=tag, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return upright


@pytest.mark.parametrize("size", [(40, 60), (50, 50)])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_every_orientation_is_read_upright(tmp_path, suffix, size):
    for orientation in range(1, 9):
        upright = photograph(tmp_path / f"{orientation}{suffix}", orientation, size)
        found = data.read_upright(tmp_path / f"{orientation}{suffix}")
        assert room.upright_size(tmp_path / f"{orientation}{suffix}") == (found.height, found.width) == size
        difference = np.asarray(found).astype(int) - np.asarray(upright).astype(int)
        assert abs(difference).mean() < 12  # JPEG noise; turned the wrong way it is above 40


@pytest.mark.parametrize("size", [(40, 60), (50, 50)])
@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
def test_boxes_written_here_fit_when_read_back_in_every_orientation(tmp_path, kind, size):
    for orientation in range(1, 9):
        root = tmp_path / str(orientation)
        where = root / {"voc": "JPEGImages", "coco": "images", "yolo": "images"}[kind] / "p.jpg"
        photograph(where, orientation, size)
        photograph(where.with_name("q.jpg"), 1, size)
        ends, thing = ".jpg" if kind == "coco" else "", data.Object("cat", BOX)
        records = [data.Record(i + ends, where.with_name(f"{i}.jpg"), size, (thing,)) for i in "pq"]
        getattr(data, f"write_{kind}")(root / "c.json" if kind == "coco" else root, records, ["cat"])
        for side in data.load(str(root), size):
            assert side.labels.boxes[0, 0].tolist() == list(BOX) and side.images.sizes.tolist() == [list(size)]
            seen = side.images.pixels[0, :, 7:23, 12:28].float()
            assert seen.mean() > 150, (kind, orientation, "the bright part lies elsewhere")


def test_exif_that_cannot_be_read_counts_as_upright(tmp_path):
    file = image(THREE[0], tmp_path, ".jpg")
    with Image.open(file) as picture:
        picture.save(file, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert room.upright_size(file) == (40, 60)
        assert data.read_upright(file).size == (60, 40)


def test_letterboxed_pixels_are_the_picture_in_grey_margins(tmp_path):
    (found,), sizes = room.read_all([image(THREE[0], tmp_path)], (60, 60))
    assert np.array_equal(found[:, 10:50], pixels(THREE[0]).transpose(2, 0, 1))  # 40 x 60: no scaling
    assert (found[:, :10] == 114).all() and (found[:, 50:] == 114).all() and sizes.tolist() == [[40, 60]]
    (half,), _ = room.read_all([np.kron([[0, 200], [100, 40]], np.ones((2, 2))).astype(np.uint8)], (2, 2))
    # bilinear with antialiasing at scale 1/2 weighs 4 columns 3 3 1 0 (of 7) near the edge: (6 * 0 + 1 * 200) / 7 ...
    left, right, low_left, low_right = 200 / 7, 6 * 200 / 7, (6 * 100 + 40) / 7, (100 + 6 * 40) / 7
    want = [[6 * left + low_left, 6 * right + low_right], [left + 6 * low_left, right + 6 * low_right]]
    assert half[0].numpy() == pytest.approx(np.array(want) / 7, abs=1.0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_image_is_named(tmp_path, suffix, part):
    file = cut(image(THREE[0], tmp_path, suffix), part)
    with pytest.raises(ValueError, match=rf"{file.stem}\{suffix} (cannot be read|is truncated)"):
        data.read_upright(file)


def test_images_that_are_no_photographs_are_refused_by_name(tmp_path, monkeypatch):
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("deep.png", r"mode 'I;16'"),
        ("huge.png", r"\(10000, 10000\) pixels; at most 80,000,000"),
        ("folder.png", "is no plain file"),
        ("none.png", "does not exist"),
    ):
        with pytest.raises(ValueError, match=rf"{name} .*{reason}"):
            data.read_upright(tmp_path / name)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is True"):
        data.load(str(folder(tmp_path / "fine")), (48, 64))


def test_threads_do_not_change_the_order_and_the_first_error_comes_first(tmp_path, monkeypatch):
    files = [image(Picture(f"p{i:02d}", (20 + i, 30)), tmp_path) for i in range(20)]
    found = []
    for threads in (1, 8):
        monkeypatch.setattr(room, "THREADS", threads)
        found.append(room.read_all(files, (24, 24)))
    assert torch.equal(found[0][0], found[1][0]) and found[1][1].tolist() == [[20 + i, 30] for i in range(20)]
    for i in (15, 4, 9):
        cut(files[i])
    with pytest.raises(ValueError, match=r"p04\.png"):
        room.read_all(files, (24, 24))
