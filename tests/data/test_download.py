"""Downloads: verified, put in place by one rename, or refused with reasons."""

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from fedal_utils.data import download

FILES = {
    "Set/Annotations/a.xml": b"<annotation/>",
    "Set/ImageSets/Main/train.txt": b"a\n",
    "Set/JPEGImages/a.jpg": os.urandom(30_000),  # not compressible, so the archive has a middle to break off in
}
LINES = [f"{path.removeprefix('Set/')}  {hashlib.sha256(raw).hexdigest()}\n" for path, raw in FILES.items()]
DIGEST = hashlib.sha256("".join(sorted(LINES)).encode()).hexdigest()
PIN = ("someone/Set_Repo", "0123abcd", "Set", ("Annotations", "ImageSets/Main", "JPEGImages"), DIGEST)


def archive(path: Path, files: dict[str, bytes] = FILES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, raw in files.items():
            packed.writestr("Set_Repo-0123abcd/" + name, raw)
        packed.writestr("Set_Repo-0123abcd/Set/other/ignored.txt", b"not one of the parts")
    return path


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    monkeypatch.setitem(download.PINNED, "set", PIN)


def left(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if not p.name.endswith(".lock"))


def test_a_set_is_fetched_whole_once_and_nothing_else_stays(tmp_path, monkeypatch):
    served, asked, root = archive(tmp_path / "www.zip"), [], tmp_path / "data"

    def download_url(url, folder, name):
        asked.append(url)
        shutil.copy(served, Path(folder) / name)

    monkeypatch.setattr(download.datasets.utils, "download_url", download_url)
    for _ in range(2):
        target = download.fetch("set", root)
        assert target == root / "set" and left(root) == ["set"]
    assert asked == ["https://github.com/someone/Set_Repo/archive/0123abcd.zip"]
    for path, raw in FILES.items():
        assert (target / path.removeprefix("Set/")).read_bytes() == raw
    assert not (target / "other").exists()


def test_what_cannot_be_reached_names_address_file_and_folder(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(download.datasets.utils, "download_url", offline)
    monkeypatch.setattr(download.datasets, "Kitti", offline)
    wanted = rf"{tmp_path}.*: no network; https://github.*0123abcd\.zip.*Set_Repo-0123abcd\.zip"
    with pytest.raises(ConnectionError, match=wanted):
        download.fetch("set", tmp_path)
    with pytest.raises(ConnectionError, match="Kitti could not be downloaded into .*Kitti: no network"):
        download.fetch("Kitti", tmp_path)
    assert left(tmp_path) == []
    with pytest.raises(ValueError, match="'mars'.*BCCD, HIT-UAV"):
        download.fetch("mars", tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (FILES | {"Set/JPEGImages/a.jpg": b"other"}, "digest .*expected is .*nothing was put in place"),
        (FILES | {"../../../../evil.txt": b"x"}, None),  # put there by hand
        (None, "cannot be unpacked"),
    ],
)
def test_wrong_contents_put_nothing_in_place(tmp_path, files, reason):
    root = tmp_path / "in" / "data"
    file = archive(root / "Set_Repo-0123abcd.zip", files or FILES)
    if files is None:
        file.write_bytes(file.read_bytes()[:20_000])
    if reason is None:  # an entry that would lie elsewhere is kept inside, where nobody looks at it
        download.fetch("set", root)
        assert left(root) == [file.name, "set"] and not list(tmp_path.rglob("evil*"))
        return
    with pytest.raises(ValueError, match=reason):
        download.fetch("set", root)
    assert left(root) == [file.name]


@pytest.mark.skipif(not os.environ.get("FEDAL_DATA"), reason="needs BCCD in FEDAL_DATA")
def test_the_real_bccd_has_the_pinned_contents():
    *_, parts, sha256 = download.PINNED["BCCD"]
    assert download.content_digest(Path(os.environ["FEDAL_DATA"]) / "BCCD", parts) == sha256
