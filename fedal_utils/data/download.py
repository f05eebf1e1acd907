"""Downloads at a pinned commit, checked against a digest of their contents; KITTI through torchvision.

The archive is unpacked beside the target and put in place by one rename: a set's folder does not exist or is whole. An
archive that was put into the root by hand is used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock
from torchvision import datasets


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
    "HIT-UAV": Pinned(
        repository="suojiashun/HIT-UAV-Infrared-Thermal-Dataset",
        commit="f8100db7ce3ab602005dd9f32854bb57d4de9b87",
        root="",
        parts=("normal_xml", "normal_json/annotations"),
        sha256="8288caa56b68841b5bd4e6e3ff705975ec0999ccba5c53b7f510fa1a54fe4b0f",
        licence="CC BY 4.0",
    ),
}
KITTI = "Kitti"  # torchvision's folder; about 12 GB


def content_digest(folder: str | Path, parts: Iterable[str]) -> str:
    """sha256 of the sorted lines "<path relative to folder>  <sha256 of the file>\\n" of all files below the parts."""
    folder, lines = Path(folder), []
    for path in (path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        lines.append(f"{path.relative_to(folder).as_posix()}  {hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def fetch(name: str, root: str | Path, base_url: str = "https://github.com", pinned: Pinned | None = None) -> Path:
    """The folder `root`/`name`, downloaded if it is not there yet.

    name: "BCCD", "HIT-UAV" or "Kitti". pinned: what to fetch, if not what `PINNED` says. Raises ConnectionError without
    a network, naming URL, file and folder, and ValueError if the contents are not the pinned ones.
    """
    root = Path(root)
    target, pinned = root / name, pinned or PINNED.get(name)
    if pinned is None and name != KITTI:
        raise ValueError(f"no download is known for {name!r}; allowed are {', '.join([*PINNED, KITTI])}")
    if target.is_dir() and name != KITTI:
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if pinned is None:
            try:
                datasets.Kitti(str(root), download=True)  # what is there is not asked for again
            except (OSError, RuntimeError, HTTPException) as error:
                raise ConnectionError(f"KITTI could not be downloaded into {target / 'raw'}: {error}") from error
        elif not target.is_dir():  # or another process was quicker
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as half:
                by_hand = [root / pinned.archive, *sorted(root.glob(f"{pinned.repository.split('/')[-1]}-*.zip"))]
                archive = next((file for file in by_hand if file.is_file()), None)
                _put_in_place(archive or _download(pinned, Path(half), root, base_url), Path(half), target, pinned)
    return target


def _download(pinned: Pinned, folder: Path, root: Path, base_url: str) -> Path:
    url = f"{base_url}/{pinned.repository}/archive/{pinned.commit}.zip"
    try:
        datasets.utils.download_url(url, str(folder), pinned.archive)
    except (OSError, RuntimeError, HTTPException) as error:
        raise ConnectionError(
            f"{url} could not be downloaded: {error}. Run again, or get it by other means and put it, as "
            f"{pinned.archive}, into the folder {root.resolve()}"
        ) from error
    return folder / pinned.archive


def _put_in_place(archive: Path, folder: Path, target: Path, pinned: Pinned) -> None:
    try:
        datasets.utils.extract_archive(str(archive), str(folder / "all"))  # drops drives, leading '/' and '..'
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"archive {archive} is damaged: {error}; remove it and fetch it again") from error
    (top,) = (folder / "all").iterdir()
    for part in pinned.parts:
        if (top / pinned.root / part).is_dir():
            (folder / "set" / part).parent.mkdir(parents=True, exist_ok=True)
            (top / pinned.root / part).rename(folder / "set" / part)
    found = content_digest(folder / "set", pinned.parts)
    if found != pinned.sha256:
        raise ValueError(
            f"archive {archive} has contents with the digest {found}; expected is {pinned.sha256}, that of "
            f"{pinned.repository} at commit {pinned.commit}. Nothing was put into {target}"
        )
    if (top / "LICENSE").is_file():
        shutil.copy(top / "LICENSE", folder / "set")
    os.rename(folder / "set", target)
