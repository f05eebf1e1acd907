"""Downloads from a server on this machine: verified, put in place by one rename, or refused with reasons."""

import functools
import hashlib
import http.server
import os
import threading
import zipfile
from pathlib import Path

import pytest

from fedal_utils.data import download

FILES = {
    "Set/Annotations/a.xml": b"<annotation/>",
    "Set/ImageSets/Main/train.txt": b"a\n",
    "Set/JPEGImages/a.jpg": os.urandom(30_000),  # not compressible, so the archive has a middle to break off in
}
PARTS = ("Annotations", "ImageSets/Main", "JPEGImages")


def digest(files: dict[str, bytes]) -> str:
    lines = [f"{path.removeprefix('Set/')}  {hashlib.sha256(raw).hexdigest()}\n" for path, raw in files.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


PIN = download.Pinned("someone/Set_Repo", "0123abcd", "Set/", PARTS, digest(FILES), "MIT")


def archive(path: Path, files: dict[str, bytes] = FILES, top: str = "Set_Repo-0123abcd/") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, raw in files.items():
            packed.writestr(top + name, raw)
        packed.writestr(top + "LICENSE", b"MIT")
        packed.writestr(top + "Set/other/ignored.txt", b"not one of the parts")
    return path


@pytest.fixture
def served(tmp_path):
    """The archive at its address on a server of this machine; yields (address, its file, what was asked for)."""
    file, asked = archive(tmp_path / "www" / "someone" / "Set_Repo" / "archive" / "0123abcd.zip"), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", file, asked
    server.shutdown()
    server.server_close()


def left(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if not p.name.endswith(".lock"))


def test_a_set_is_fetched_whole_once_and_nothing_else_stays(served, tmp_path):
    url, _, asked = served
    root = tmp_path / "data"
    target = download.fetch("set", root, url, PIN)
    assert target == root / "set" and left(root) == ["set"]
    for path, raw in FILES.items():
        assert (target / path.removeprefix("Set/")).read_bytes() == raw
    assert (target / "LICENSE").read_bytes() == b"MIT" and not (target / "other").exists()
    assert target.stat().st_mode & 0o755 == 0o755
    before = len(asked)
    assert download.fetch("set", root, url, PIN) == target and len(asked) == before


def test_several_at_once_fetch_one_set(served, tmp_path):
    found, threads = [], []
    for _ in range(4):
        work = lambda: found.append(download.fetch("set", tmp_path / "data", served[0], PIN))  # noqa: E731
        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "data" / "set"] * 4 and left(tmp_path / "data") == ["set"]


def test_an_archive_put_there_by_hand_is_used_and_kept(tmp_path):
    for name in (PIN.archive, "Set_Repo-main.zip"):
        root = tmp_path / name
        archive(root / name)
        assert download.fetch("set", root, "http://127.0.0.1:9", PIN).is_dir() and left(root) == [name, "set"]


def test_what_cannot_be_reached_names_address_file_and_folder(served, tmp_path):
    url, file, _ = served
    file.unlink()
    for address in (url, "http://127.0.0.1:9"):
        with pytest.raises(ConnectionError, match=rf"0123abcd\.zip could not be downloaded.*{PIN.archive}.*{tmp_path}"):
            download.fetch("set", tmp_path / "data", address, PIN)
    assert left(tmp_path / "data") == []
    with pytest.raises(ValueError, match="'mars'.*BCCD, HIT-UAV, Kitti"):
        download.fetch("mars", tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (FILES | {"Set/JPEGImages/a.jpg": b"other"}, "digest .*expected is .*Nothing was put into"),
        ({"Set/Annotations/a.xml": b"<annotation/>"}, "digest .*expected is"),
        (FILES | {"../../../../evil.txt": b"x"}, None),
        (None, "is damaged"),
    ],
)
def test_wrong_contents_put_nothing_in_place(tmp_path, files, reason):
    root = tmp_path / "in" / "data"
    file = archive(root / PIN.archive, files or FILES)
    if files is None:
        file.write_bytes(file.read_bytes()[:20_000])
    if reason is None:  # an entry that would lie elsewhere is kept inside, where nobody looks at it
        download.fetch("set", root, "http://127.0.0.1:9", PIN)
        assert left(root) == [PIN.archive, "set"] and not list(tmp_path.rglob("evil*"))
        return
    with pytest.raises(ValueError, match=reason):
        download.fetch("set", root, "http://127.0.0.1:9", PIN)
    assert left(root) == [PIN.archive]


def test_kitti_comes_through_torchvision(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(download.datasets, "Kitti", lambda root, download: asked.append((root, download)))
    assert download.fetch("Kitti", tmp_path) == tmp_path / "Kitti" and asked == [(str(tmp_path), True)]
    monkeypatch.setattr(download.datasets, "Kitti", lambda root, download: 1 / 0 if not download else _offline())
    with pytest.raises(ConnectionError, match="KITTI could not be downloaded into .*Kitti.raw: no network"):
        download.fetch("Kitti", tmp_path)


def _offline() -> None:
    raise OSError("no network")


def test_the_pins_are_those_of_the_published_digests(tmp_path):
    pins = download.PINNED
    assert {name: pin.commit[:8] for name, pin in pins.items()} == {"BCCD": "d272fb14", "HIT-UAV": "f8100db7"}
    assert download.content_digest(tmp_path, ("none",)) == hashlib.sha256(b"").hexdigest()


@pytest.mark.skipif(not os.environ.get("FEDAL_DATA"), reason="needs BCCD in FEDAL_DATA")
def test_the_real_bccd_has_the_pinned_contents():
    pin = download.PINNED["BCCD"]
    assert download.content_digest(Path(os.environ["FEDAL_DATA"]) / "BCCD", pin.parts) == pin.sha256
