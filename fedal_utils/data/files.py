"""Files of strangers, found and read safely: links, hidden files, encodings, names."""

import contextlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

NOT_DATA = ("__MACOSX", "@eaDir")  # folders that systems leave behind
# Folders that only say what kind of file they hold: images/train/a.jpg and labels/train/a.txt belong together.
LAYOUT = {"images", "jpegimages", "labels", "annotations", "annotation", "xml", "imagesets", "main"}


def find_files(root: str | Path, *suffixes: str) -> list[Path]:
    """Files below `root`, sorted, with one of these suffixes (none given: all), also in linked folders; none hidden."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be read: {error.strerror}")

    found: list[Path] = []
    seen: dict[str, str] = {}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        other = seen.setdefault(os.path.realpath(folder), folder)
        if other != folder:
            raise ValueError(f"folders {folder} and {other} are the same one: a link leads to it a second time")
        folders[:] = [name for name in folders if not name.startswith(".") and name not in NOT_DATA]
        for name in (n for n in names if n[0] != "." and (not suffixes or n.lower().endswith(suffixes))):
            path = Path(folder, name)
            if not plain(str(path)):
                raise ValueError(f"file name {ascii(str(path))} is not UTF-8 or holds control characters; rename it")
            if path.is_file():
                found.append(path)
    return sorted(found)


def key_of(path: Path, root: Path) -> str:
    """What an image and its annotation share: images/train/a.jpg and labels/train/a.txt -> train/a."""
    inner = path.relative_to(root)
    return same_form("/".join([p for p in inner.parts[:-1] if p.lower() not in LAYOUT] + [inner.stem]))


def by_key(paths: Iterable[Path], root: Path) -> dict[str, Path]:
    """The paths by `key_of`; ValueError where two share one."""
    found: dict[str, Path] = {}
    for path in paths:
        key = key_of(path, root)
        if found.setdefault(key, path) != path:
            raise ValueError(f"{path} and {found[key]} share the id {key!r}; ids must be unique")
    return found


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or with a byte order mark in UTF-16."""
    if not file.is_file():
        raise ValueError(f"{file} is no plain file" if file.exists() else f"annotation {file} does not exist")
    content = file.read_bytes()
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}); save it as UTF-8") from None


def write_text(path: str | Path, text: str) -> Path:
    """The file with this text in UTF-8, its folder made if need be; line ends are not changed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:  # a full disk does not tell the name by itself
        raise OSError(error.errno, error.strerror, str(path)) from None
    return path


@contextlib.contextmanager
def reading(where: str, needed: str) -> Iterator[None]:
    """Whatever is wrong with a value read inside becomes a ValueError that names the entry and what is needed."""
    try:
        yield
    except Exception as error:
        told = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where[:400]}: {told[:400]}; needed: {needed}") from None


def number(value: object) -> float:
    """A finite number as JSON has it, and no text."""
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ValueError(f"{str(value)[:99]!r} is no number")
    return float(value)


def whole(value: object, least: int = 0) -> int:
    """A whole number from `least` up, of at most nine digits."""
    if not least <= number(value) < 1e9 or value % 1:
        raise ValueError(f"{str(value)[:99]!r} is no whole number from {least} up")
    return int(value)


def plain(text: str) -> bool:
    """Can every format hold this text in one line?"""
    odd = ("Cc", "Cs", "Zl", "Zp")
    return not any(unicodedata.category(c) in odd or c in "\ufffe\uffff" for c in text)


def class_name(name: object) -> str:
    """The name of a class as it is written; ValueError unless it is text in one line without outer spaces."""
    if not isinstance(name, str) or not name or name != name.strip() or not plain(name):
        raise ValueError(f"class {name!r} is no name; allowed is text in one line without outer spaces")
    return name


def relative(name: object) -> str:
    """A path below a set's folder, with '/' for '\\'; ValueError for any other."""
    parts = name.replace("\\", "/").removeprefix("./").split("/") if isinstance(name, str) else [""]
    if any(p in ("", ".", "..") for p in parts) or ":" in parts[0] or not plain(name):
        raise ValueError(f"{name!r} is no path below the set's folder")
    return "/".join(parts)


def same_form(text: str) -> str:
    """Text with accents composed, so that names from different systems can be compared."""
    return unicodedata.normalize("NFC", text)
