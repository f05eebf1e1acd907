"""Downloads at a pinned commit, checked against a digest of their contents, put in place by one rename."""

import hashlib
import tempfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock
from torchvision import datasets

from .files import reading

# repository, commit, folder in it, its parts, and the `content_digest` that they must have
PINNED = {
    "BCCD": (  # MIT
        "Shenggan/BCCD_Dataset",
        "d272fb14cdff6e473fafeeeba32aba5f560e9e43",
        "BCCD",
        ("Annotations", "ImageSets", "JPEGImages"),
        "650db5c44a6db1f967fe843261ef645a7b275e9d72db887987b797f9074f8ef3",
    ),
    "HIT-UAV": (  # CC BY 4.0
        "suojiashun/HIT-UAV-Infrared-Thermal-Dataset",
        "f8100db7ce3ab602005dd9f32854bb57d4de9b87",
        "",
        ("normal_xml", "normal_json/annotations"),
        "8288caa56b68841b5bd4e6e3ff705975ec0999ccba5c53b7f510fa1a54fe4b0f",
    ),
}
KITTI = "Kitti"  # torchvision's folder; about 12 GB


def content_digest(folder: str | Path, parts: Sequence[str]) -> str:
    """sha256 of the sorted lines "<path relative to folder>  <sha256 of the file>\\n" of all files below the parts."""
    folder, lines = Path(folder), []
    for path in (path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        lines.append(f"{path.relative_to(folder).as_posix()}  {hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def fetch(name: str, root: str | Path) -> Path:
    """The folder `root`/`name` of "BCCD", "HIT-UAV" or "Kitti", downloaded if it is not there yet.

    ConnectionError, with URL, file and folder, without a network; ValueError if the contents are not the pinned ones.
    """
    root, target, hint = Path(root), Path(root, name), ""
    if name not in (*PINNED, KITTI):
        raise ValueError(f"no download is known for {name!r}; allowed are {', '.join([*PINNED, KITTI])}")
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"), tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as half:
        try:
            if name == KITTI:
                datasets.Kitti(str(root), download=True)  # what is there is not asked for again
            elif not target.is_dir():
                (repository, commit, *rest), half = PINNED[name], Path(half)
                url, label = f"https://github.com/{repository}/archive/{commit}.zip", repository.split("/")[-1]
                hint = f"; {url} may be put there by other means, as {label}-{commit}.zip"
                there = sorted(root.glob(f"{label}-*.zip"))
                if not there:
                    datasets.utils.download_url(url, str(half), "it.zip")
                _unpack(there[0] if there else half / "it.zip", half, *rest).rename(target)
        except (OSError, RuntimeError, HTTPException) as error:
            raise ConnectionError(f"{name} could not be downloaded into {target}: {error}{hint}") from error
    return target


def _unpack(archive: Path, half: Path, inner: str, parts: Sequence[str], sha256: str) -> Path:
    with reading(f"archive {archive} cannot be unpacked", "a whole zip, and room; remove it and fetch it again"):
        datasets.utils.extract_archive(str(archive), str(half / "all"))  # drops drives, leading '/' and '..'
    (top,) = (half / "all").iterdir()
    for part in parts:
        (half / "set" / part).parent.mkdir(parents=True, exist_ok=True)
        (top / inner / part).rename(half / "set" / part)
    if (found := content_digest(half / "set", parts)) != sha256:
        raise ValueError(f"archive {archive} has the digest {found}; expected is {sha256}; nothing was put in place")
    return half / "set"
