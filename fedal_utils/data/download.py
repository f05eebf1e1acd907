"""Downloads BCCD and CARLA from their repositories at a pinned commit, checked against a digest of their contents.

The archive is streamed to `<archive>.part` and resumed from there, unpacked beside the target and put in place by one
rename: a data set's folder either does not exist or is whole. An archive that was put into the root by hand is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import stat
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

CHUNK = 1 << 18  # bytes
ATTEMPTS = 5  # times that a connection may break off in one call
TIMEOUT = 60  # seconds without a byte
MAX_UNPACKED = 8 << 30  # bytes; no data set here comes near


@dataclass(frozen=True)
class Pinned:
    """A data set in a repository: `parts` below `root` at `commit`, and the `content_digest` they must have."""

    repository: str
    commit: str
    root: str
    parts: tuple[str, ...]
    sha256: str
    licence: str

    @property
    def archive(self) -> str:
        """The file name under which the repository serves this commit."""
        return f"{self.repository.split('/')[-1]}-{self.commit}.zip"


PINNED = {
    "BCCD": Pinned(
        repository="Shenggan/BCCD_Dataset",
        commit="d272fb14cdff6e473fafeeeba32aba5f560e9e43",
        root="BCCD/",
        parts=("Annotations", "ImageSets", "JPEGImages"),
        sha256="650db5c44a6db1f967fe843261ef645a7b275e9d72db887987b797f9074f8ef3",
        licence="MIT",
    ),
    "carla": Pinned(
        repository="DanielHfnr/Carla-Object-Detection-Dataset",
        commit="2a10f67a1ad64695390d09bf260a999006b670b6",
        root="",
        parts=("images", "labels"),
        sha256="0988cb65a67627b39bbefb79497c698f996289b065f8d3a3397e656bb42e716c",
        licence="MIT",
    ),
}


def content_digest(folder: str | Path, parts: Iterable[str]) -> str:
    """sha256 of the sorted lines "<path relative to folder>  <sha256 of the file>\\n" of all files below the parts."""
    folder = Path(folder)
    lines = []
    for part in parts:
        for path in (folder / part).rglob("*"):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                lines.append(f"{path.relative_to(folder).as_posix()}  {digest}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def fetch(
    name: str,
    root: str | Path,
    base_url: str = "https://github.com",
    progress: bool = True,
    pinned: Pinned | None = None,
) -> Path:
    """The folder `root`/`name`, downloaded if it is not there yet; a broken-off download goes on where it stopped.

    name: "BCCD" or "carla". pinned: what to fetch, if not what `PINNED` says. Raises ConnectionError without a network,
    naming URL, file and folder, and ValueError if the contents are not the pinned ones; then nothing is put in place.
    """
    pinned = pinned or PINNED.get(name)
    if pinned is None:
        raise ValueError(f"no download is known for {name!r}; allowed are {', '.join(PINNED)}")
    root = Path(root)
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / f".{name}.lock"):
        if target.is_dir():  # another process was quicker
            return target
        archive = _by_hand(root, pinned)
        ours = archive is None
        if archive is None:
            url = f"{base_url}/{pinned.repository}/archive/{pinned.commit}.zip"
            archive = download(url, root / pinned.archive, progress)
        try:
            _put_in_place(archive, target, pinned)
        finally:
            if ours:  # also a wrong one: trying again must not meet it
                archive.unlink(missing_ok=True)
    return target


def _by_hand(root: Path, pinned: Pinned) -> Path | None:
    """An archive that somebody put into the root: the pinned commit's, else any of that repository's."""
    if (root / pinned.archive).is_file():
        return root / pinned.archive
    return next(iter(sorted(root.glob(f"{pinned.repository.split('/')[-1]}-*.zip"))), None)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time, where the system has file locks; a killed process leaves none behind."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------------------------- the archive


def download(url: str, file: str | Path, progress: bool = True) -> Path:
    """`url` in `file`, through `<file>.part`, which a later call continues (HTTP Range) if this one breaks off."""
    file = Path(file)
    part = file.with_name(file.name + ".part")
    advice = (
        f"Run again to go on where it stopped, or get {url} by other means and put it, as {file.name}, "
        f"into the folder {file.parent.resolve()}"
    )
    reason: object = None
    for _ in range(ATTEMPTS):
        before = part.stat().st_size if part.exists() else 0
        try:
            if _stream(url, part, progress):
                os.replace(part, file)
                return file
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise ConnectionError(f"{url} answered {error.code} {error.reason}. {advice}") from error
            reason = error
        except (OSError, http.client.HTTPException) as error:
            reason = error
        if not part.exists() or part.stat().st_size <= before:  # not a byte came: waiting in a loop will not help
            break
    raise ConnectionError(f"{url} could not be downloaded: {reason}. {advice}")


def _stream(url: str, part: Path, progress: bool) -> bool:
    """Append what `part` still lacks; True if it is whole as far as the server tells."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "fedal"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing lies beyond what we have
            raise
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if whole and int(whole[1]) == have:
            return True
        part.unlink()  # it belongs to some other file
        return _stream(url, part, progress)
    with answer:
        start = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or start is None or int(start[1]) != have:
            have = 0  # the server sends all of it
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        bar = tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.name.removesuffix(".part")[:40],
            disable=not progress,
        )
        with bar, part.open("ab" if have else "wb") as out:
            while data := answer.read(CHUNK):
                out.write(data)
                out.flush()
                have += len(data)
                bar.update(len(data))
    return total is None or have == total


def _safe(member: zipfile.ZipInfo, archive: Path) -> str:
    """The member's path without the archive's top folder; one that could leave the target is an error."""
    name = member.filename
    kind = stat.S_IFMT(member.external_attr >> 16)
    why = None
    if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name) or "\0" in name:
        why = "is absolute or has a drive letter or a backslash"
    elif ".." in name.split("/"):
        why = "contains '..'"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        why = "is a link or a device"
    if why:
        raise ValueError(f"archive {archive}: entry {name!r} {why}; allowed are plain files below one folder")
    return name.partition("/")[2]


def _unpack(archive: Path, folder: Path, pinned: Pinned) -> None:
    """The pinned parts of a zip, and its licence, into `folder`; all entries are judged before the first is written."""
    wanted = tuple(f"{pinned.root}{part}/" for part in pinned.parts)
    with zipfile.ZipFile(archive) as packed:
        members = {member: _safe(member, archive) for member in packed.infolist()}
        size = sum(member.file_size for member in members)
        if size > MAX_UNPACKED:
            raise ValueError(f"archive {archive} unpacks to {size} bytes; allowed are {MAX_UNPACKED}")
        for member, path in members.items():
            if member.is_dir() or not (path.startswith(wanted) or path == "LICENSE"):
                continue
            out = folder / path.removeprefix(pinned.root)
            if not out.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"archive {archive}: entry {member.filename!r} would leave {folder}")
            out.parent.mkdir(parents=True, exist_ok=True)
            with packed.open(member) as source, out.open("xb") as sink:
                shutil.copyfileobj(source, sink, CHUNK)


def _put_in_place(archive: Path, target: Path, pinned: Pinned) -> None:
    """Unpack beside the target, check the contents, rename; whatever goes wrong, nothing is left behind."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        try:
            _unpack(archive, folder, pinned)
        except (zipfile.BadZipFile, EOFError, FileExistsError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"archive {archive} is damaged: {error}; remove it and fetch it again") from error
        found = content_digest(folder, pinned.parts)
        if found != pinned.sha256:
            raise ValueError(
                f"archive {archive} has contents with the digest {found}; expected is {pinned.sha256}, that of "
                f"{pinned.repository} at commit {pinned.commit}. Nothing was put into {target}"
            )
        folder.chmod(0o755)  # mkdtemp's folder is private
        os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
