"""Files that are whole or not there: atomic writes, locks, tables of text, states with a checksum."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or what the user may have of it
ADVICE = "restore it, or delete its folder to run again"

_TEXT = frozenset({"client", "id", "group", "method", "status"})  # columns that are never numbers
_FINITE = frozenset({"images", "boxes", "seconds", "bytes_up", "bytes_down", "steps"})


def project_root() -> Path:
    """The folder that holds `results/`: $FEDAL_HOME, or the checkout around the working directory, or the latter."""
    here = Path.cwd()
    checkouts = (f for f in (here, *here.parents) if (f / "notebooks").is_dir() and (f / "pyproject.toml").is_file())
    return Path(os.environ.get("FEDAL_HOME") or next(checkouts, here)).expanduser().absolute()


def data_folder() -> Path:
    """Where data sets lie: $FEDAL_DATA, or `data/` of the `project_root`."""
    return Path(os.environ.get("FEDAL_DATA") or project_root() / "data")


def write_atomic(path: str | Path, content: bytes | str | Mapping[str, Any] | Callable[[BinaryIO], None]) -> Path:
    """Write a file under a temporary name, flush it to disk, rename it: readers see the old file or the new one.

    content: bytes, text (UTF-8), an object for JSON (keys in order), or a function that writes to the open file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if isinstance(content, Mapping):
        content = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(error.errno, "no space left on the disk, the file was not written", str(path)) from None
        raise
    with contextlib.suppress(OSError):  # renames survive a power cut in the order they were made
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read an object, {} if there is no file; ValueError naming the file if it is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no readable JSON object ({error}): {ADVICE}") from None


def read_sheet(path: Path) -> pd.DataFrame:
    """A CSV, every cell as its text; ValueError naming the file if it is missing, cut or not a table."""
    try:
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            raise ValueError(f"it is cut, its last line has no end: {content[-40:]!r}")
        return pd.read_csv(io.BytesIO(content), dtype=object, keep_default_na=False)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} is not a whole CSV ({error}): {ADVICE}") from None


def encode(sheet: pd.DataFrame) -> bytes:
    """The bytes of its file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([sheet.columns, *sheet.to_numpy().tolist()])  # to_csv, 4 x as fast
    return text.getvalue().encode()


def sha256(content: pd.DataFrame | bytes) -> str:
    """Hex digest of bytes, or of a sheet's file."""
    return hashlib.sha256(content if isinstance(content, bytes) else encode(content)).hexdigest()


def typed(sheet: pd.DataFrame) -> pd.DataFrame:
    """The same as whole numbers, floats (exactly as written, NaN where a cell is empty) and text."""
    columns = {name: sheet[name] for name in sheet}
    for name in set(columns) - _TEXT:
        for kind, cells in ((int, sheet[name]), (float, sheet[name].replace("", "nan"))):
            with contextlib.suppress(ValueError):
                columns[name] = cells.astype(kind)
                break
    return pd.DataFrame(columns)


def with_rows(sheet: pd.DataFrame, rows: Sequence[Mapping[str, Any]], fixed: Mapping[str, Any], where: str):
    """The sheet with rows added and `fixed` filled in; a new column is left empty in the rows before.

    Floats are written by `repr`, which gives the same back. ValueError naming client and column of an impossible value.
    """

    def cell(row: Mapping[str, Any], column: str, value: Any) -> str:
        value = value.item() if isinstance(value, (torch.Tensor, np.generic)) and value.ndim == 0 else value
        if value is None or (column == "score" and value != value):
            return ""  # a query without a score: an initial label, or an image without detections
        if isinstance(value, (str, int)):
            return value if isinstance(value, str) else str(int(value))
        counted = column in _FINITE or column.startswith("loss")
        if not isinstance(value, float) or math.isinf(value) or (math.isnan(value) and counted):
            place = f"client {row.get('client')!r}" + (f", id {row['id']!r}" if "id" in row else "")
            raise ValueError(f"{where}, {place}: {column} is {value!r}, which no cell can hold; nothing was written")
        return repr(value)

    texts = [{name: cell(row, name, value) for name, value in {**row, **fixed}.items()} for row in rows]
    return pd.concat([sheet, pd.DataFrame(texts, dtype=object)], ignore_index=True).fillna("") if texts else sheet


def save_state(path: Path, content: Any) -> None:
    """Write what `plain` gave: the SHA-256 of the rest in a first line, then torch's own format."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, sha256(buffer.getvalue()).encode() + b"\n" + buffer.getvalue())


def load_state(path: Path) -> Any:
    """Read it, on the CPU; ValueError naming the file if a single bit is not as it was written."""
    content = path.read_bytes()
    if sha256(content[65:]).encode() + b"\n" != content[:65]:
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    return torch.load(io.BytesIO(content[65:]), map_location="cpu", weights_only=True)


def plain(value: Any, where: str) -> Any:
    """The value, if `torch.load(weights_only=True)` reads all of it back; ValueError naming the place of the rest."""
    if isinstance(value, torch.Tensor):  # a view would drag its whole storage into the file
        view = value.untyped_storage().nbytes() > value.numel() * value.element_size()
        return value.detach().clone() if view else value.detach()
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise ValueError(f"{where} is a {type(value).__name__}, which no state can hold (arrays: torch.from_numpy)")
