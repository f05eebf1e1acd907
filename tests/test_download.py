"""Downloads from a server on this machine: resumed, verified, put in place by one rename, or refused with reasons."""

import hashlib
import http.server
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from fedal_utils.data import download

FILES = {
    "Set/Annotations/a.xml": b"<annotation/>",
    "Set/ImageSets/Main/train.txt": b"a\n",
    "Set/JPEGImages/a.jpg": os.urandom(300_000),  # not compressible, so the archive has a middle to break off in
}
PARTS = ("Annotations", "ImageSets", "JPEGImages")


def digest(files: dict[str, bytes]) -> str:
    lines = [f"{path.removeprefix('Set/')}  {hashlib.sha256(data).hexdigest()}\n" for path, data in files.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


PIN = download.Pinned("someone/Set_Repo", "0123abcd", "Set/", PARTS, digest(FILES), "MIT")


def archive(path: Path, files: dict[str, bytes] = FILES, top: str = "Set_Repo-0123abcd/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(top, b"")
        for name, data in files.items():
            packed.writestr(top + name, data)
        packed.writestr(top + "LICENSE", b"MIT")
        packed.writestr(top + "Set/other/ignored.txt", b"not one of the parts")
    return path


class Server(http.server.ThreadingHTTPServer):
    """Serves one file with Range; can break off after some bytes, dawdle, or know no Range."""

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.asked = content, []
        self.break_after: list[int] = []  # for each answer in turn, after how many bytes it ends early
        self.ranges, self.length, self.pause = True, True, 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        s = self.server
        wanted = self.headers.get("Range")
        s.asked.append((self.path, wanted))
        if not self.path.endswith(f"{PIN.commit}.zip"):
            self.send_error(404)
            return
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and s.ranges else 0
        if start >= len(s.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(s.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(s.content) - 1}/{len(s.content)}")
        if s.length:
            self.send_header("Content-Length", str(len(s.content) - start))
        self.end_headers()
        stop = start + s.break_after.pop(0) if s.break_after else len(s.content)
        for at in range(start, min(stop, len(s.content)), 10_000):
            self.wfile.write(s.content[at : min(at + 10_000, stop)])
            time.sleep(s.pause)


@pytest.fixture
def server(tmp_path):
    served = Server(archive(tmp_path / "served.zip").read_bytes())
    yield served
    served.shutdown()
    served.server_close()


def fetch(server: Server, root: Path, pinned: download.Pinned = PIN) -> Path:
    return download.fetch("set", root, base_url=server.url, progress=False, pinned=pinned)


def visible(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if not p.name.endswith(".lock"))


def test_a_set_is_fetched_whole_and_nothing_else_stays(server, tmp_path):
    root = tmp_path / "data"
    target = fetch(server, root)
    assert target == root / "set" and visible(root) == ["set"]
    for path, data in FILES.items():
        assert (target / path.removeprefix("Set/")).read_bytes() == data
    assert (target / "LICENSE").read_bytes() == b"MIT" and not (target / "other").exists()
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert server.asked == [("/someone/Set_Repo/archive/0123abcd.zip", None)]
    fetch(server, root)
    assert len(server.asked) == 1  # what is there is not asked for again


def test_a_connection_that_breaks_off_is_resumed_with_range(server, tmp_path):
    server.break_after = [120_000, 50_000]
    fetch(server, tmp_path / "data")
    assert [r for _, r in server.asked] == [None, "bytes=120000-", "bytes=170000-"]


def test_a_server_without_range_or_length_is_started_over(server, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / f"{PIN.archive}.part").write_bytes(b"half of something else")
    server.ranges = server.length = False
    assert (fetch(server, root) / "JPEGImages" / "a.jpg").read_bytes() == FILES["Set/JPEGImages/a.jpg"]


def test_a_part_that_is_already_whole_or_too_long_is_no_obstacle(server, tmp_path):
    for name, content in (("whole", server.content), ("long", server.content + b"tail")):
        root = tmp_path / name
        root.mkdir()
        (root / f"{PIN.archive}.part").write_bytes(content)
        assert fetch(server, root).is_dir() and visible(root) == ["set"]


def test_killed_in_the_middle_then_resumed(server, tmp_path):
    root = tmp_path / "data"
    server.pause = 0.05
    code = "import sys; from fedal_utils import download as d; d.download(sys.argv[1], sys.argv[2], progress=False)"
    root.mkdir()
    part = root / f"{PIN.archive}.part"
    url = f"{server.url}/{PIN.repository}/archive/{PIN.commit}.zip"
    child = subprocess.Popen([sys.executable, "-c", code, url, str(root / PIN.archive)], cwd=Path(__file__).parents[1])
    deadline = time.time() + 30
    while not (part.exists() and part.stat().st_size) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    have = part.stat().st_size
    assert 0 < have < len(server.content) and visible(root) == [part.name]
    server.pause = 0.0
    fetch(server, root)
    assert server.asked[-1][1] == f"bytes={have}-" and visible(root) == ["set"]


def test_contents_with_another_digest_are_not_put_in_place(server, tmp_path):
    root = tmp_path / "data"
    wrong = download.Pinned(PIN.repository, PIN.commit, PIN.root, PIN.parts, "f" * 64, "MIT")
    with pytest.raises(ValueError) as error:
        fetch(server, root, wrong)
    assert "f" * 64 in str(error.value) and PIN.sha256 in str(error.value) and PIN.archive in str(error.value)
    assert visible(root) == []
    assert fetch(server, root).is_dir()  # nothing of the wrong one is in the way


def test_an_archive_put_there_by_hand_is_used_and_kept(tmp_path):
    for name in (PIN.archive, "Set_Repo-master.zip"):
        root = tmp_path / name
        root.mkdir()
        archive(root / name, top="Set_Repo-master/")
        target = download.fetch("set", root, base_url="http://127.0.0.1:9", progress=False, pinned=PIN)
        assert download.content_digest(target, PARTS) == PIN.sha256 and visible(root) == sorted([name, "set"])


def test_without_a_network_the_error_names_url_file_and_folder(tmp_path):
    with pytest.raises(ConnectionError) as error:
        download.fetch("BCCD", tmp_path, base_url="http://127.0.0.1:9", progress=False)
    commit = download.PINNED["BCCD"].commit
    for text in (
        f"http://127.0.0.1:9/Shenggan/BCCD_Dataset/archive/{commit}.zip",
        f"BCCD_Dataset-{commit}.zip",
        str(tmp_path),
    ):
        assert text in str(error.value)
    assert visible(tmp_path) == []


def test_an_answer_of_404_names_the_url_and_is_not_repeated(server, tmp_path):
    other = download.Pinned(PIN.repository, "ffff", PIN.root, PIN.parts, PIN.sha256, "MIT")
    with pytest.raises(ConnectionError, match=r"archive/ffff\.zip answered 404"):
        fetch(server, tmp_path, other)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "name", ["../../evil.txt", "top/../../../evil.txt", "/tmp/evil.txt", "C:/evil.txt", "top/Set\\..\\evil.txt"]
)
def test_no_path_in_an_archive_leaves_the_target(tmp_path, name):
    root = tmp_path / "deep" / "data"
    root.mkdir(parents=True)
    path = archive(root / PIN.archive)
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr(zipfile.ZipInfo(name), b"evil")
    with pytest.raises(ValueError) as error:
        download.fetch("set", root, progress=False, pinned=PIN)
    assert repr(name) in str(error.value) and PIN.archive in str(error.value)
    assert visible(root) == [PIN.archive] and not list(tmp_path.rglob("evil*"))


def test_a_symlink_in_an_archive_is_refused(tmp_path):
    path = archive(tmp_path / PIN.archive)
    link = zipfile.ZipInfo("top/Set/JPEGImages/link")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr(link, b"/etc/passwd")
    with pytest.raises(ValueError, match="top/Set/JPEGImages/link.*link"):
        download.fetch("set", tmp_path, progress=False, pinned=PIN)
    assert visible(tmp_path) == [PIN.archive]


def test_a_damaged_archive_is_an_error_that_names_it(tmp_path):
    path = archive(tmp_path / PIN.archive)
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(ValueError, match=re.escape(PIN.archive) + ".*damaged"):
        download.fetch("set", tmp_path, progress=False, pinned=PIN)
    assert visible(tmp_path) == [PIN.archive]


def test_an_unknown_name_lists_what_is_known(tmp_path):
    with pytest.raises(ValueError, match="'mars'.*BCCD, carla"):
        download.fetch("mars", tmp_path)


def test_the_digest_depends_on_every_path_and_byte_but_not_on_other_folders(tmp_path):
    for path, data in FILES.items():
        file = tmp_path / path.removeprefix("Set/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / "elsewhere.txt").write_text("x")
    assert download.content_digest(tmp_path, PARTS) == PIN.sha256
    (tmp_path / "Annotations" / "a.xml").write_bytes(b"<annotation />")
    assert download.content_digest(tmp_path, PARTS) != PIN.sha256
    (tmp_path / "Annotations" / "a.xml").write_bytes(FILES["Set/Annotations/a.xml"])
    (tmp_path / "Annotations" / "a.xml").rename(tmp_path / "Annotations" / "b.xml")
    assert download.content_digest(tmp_path, PARTS) != PIN.sha256


@pytest.mark.skipif(not (Path(os.environ.get("FEDAL_DATA", "-")) / "BCCD").is_dir(), reason="needs BCCD in FEDAL_DATA")
def test_the_real_bccd_has_the_pinned_digest():
    pinned = download.PINNED["BCCD"]
    assert download.content_digest(Path(os.environ["FEDAL_DATA"]) / "BCCD", pinned.parts) == pinned.sha256
