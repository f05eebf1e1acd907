"""Publish executed copies of notebooks; keep badges, navigation and install cells in order, from one address."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import record
from .runner import executed, find, read

MAX_PUBLISHED = 1_000_000  # bytes
NOISE = ("papermill", "execution", "widgets", "application/vnd.jupyter.widget-view+json")
ADDRESS = re.compile(r'^(?:# )?Repository\b(?: = "https://github\.com/([^/"]+/[^/"]+)/tree/([^"]+)")?.*', re.MULTILINE)


def address() -> tuple[str, str]:
    """("owner/name", branch) of the repository, as pyproject.toml has it; ("", "") where it names none."""
    found = ADDRESS.search((record.project_root() / "pyproject.toml").read_text())
    return (found[1] or "", found[2] or "") if found else ("", "")


def badges(repository: str = "", branch: str = "") -> None:
    """Write where the repository lies on GitHub ("owner/name") into pyproject.toml, for `address`.

    Without a name that of git's remote `origin`; where it is elsewhere or there is none, the line becomes a comment.
    """
    root = record.project_root()
    if not repository:
        done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=root, capture_output=True, text=True)
        repository = "".join(re.findall(r"github\.com[:/]([^/]+/[^/]+?)(?:\.git)?/?\s*$", done.stdout))
    if repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"a repository on GitHub is owner/name, got {repository!r}")
    line = f'Repository = "https://github.com/{repository}/tree/{branch or "main"}"'
    text = (root / "pyproject.toml").read_text()
    line = line if repository else "# Repository: none, see make badges"
    record.write_atomic(root / "pyproject.toml", ADDRESS.sub(line, text))


def colab(name: str) -> str:
    """The badge that opens a notebook on Colab; "" where the repository has no address."""
    repository, branch = address()
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    place = f"https://colab.research.google.com/github/{repository}/blob/{branch}/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({image})]({place})" if repository else ""


def code_digest(content: dict[str, Any]) -> str:
    """Of a notebook's code cells, the same for source and executed copy; what depends on the address is left out."""
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    told = ["".join(c["source"]) for c in cells if "injected-parameters" not in c["metadata"].get("tags", [])]
    return hashlib.sha256(json.dumps([text for text in told if "google.colab" not in text]).encode()).hexdigest()[:16]


def publish(name: str) -> Path:
    """Copy the executed copy of a notebook to `results/notebooks/`, without traces of its machine, links mended."""
    (path,) = find(name)
    home, folder = path.parents[1], path.parents[1] / "results" / "notebooks"
    if not executed(path).exists():
        raise ValueError(f"{path.stem} has not been run: python -m fedal_utils run {path.stem}")
    places = {str(home): ".", str(home.resolve()): ".", sys.prefix: "<python>", sys.base_prefix: "<python>"}
    places |= {tempfile.gettempdir(): "<temporary>", str(Path.home()): "~"}
    pattern = "|".join(map(re.escape, sorted((p for p in places if len(p) > 1), key=len, reverse=True)))

    def clean(value: Any) -> Any:
        """Without papermill's notes, time stamps, widget states and local absolute paths."""
        if isinstance(value, str):
            return re.sub(pattern, lambda match: places[match.group()], value)
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, dict):
            return {k: v if k in ("image/png", "image/jpeg") else clean(v) for k, v in value.items() if k not in NOISE}
        return value

    done = read(executed(path))
    content = clean(done)
    content["metadata"]["fedal"]["code"] = code_digest(done)
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = _moved("".join(cell["source"]), path, folder).splitlines(keepends=True)
    size = len(json.dumps(content, indent=1, ensure_ascii=False).encode())
    if size > MAX_PUBLISHED:
        raise ValueError(f"{path.stem} has {size / 1e6:.2f} MB with outputs, 1 MB is allowed")
    return record.write_atomic(folder / path.name, content)


def _moved(text: str, path: Path, folder: Path) -> str:
    """Relative links, good beside the notebook, as they are good in the folder: to copies there if there are."""

    def moved(match: re.Match) -> str:
        mark, target = match.groups()
        if re.match(r"\w+:|/", target) or target.endswith(".ipynb") and (folder / target).exists():
            return match[0]
        return mark + Path(os.path.relpath(path.parent / target, folder)).as_posix()

    return re.sub(r"""(\]\(|\b(?:src|href)=["'])([^)"'\s#]+)""", moved, text)


def navigation(write: bool = True) -> list[str]:
    """Bring badge, links and install cell of each notebook and copy up to date; the names of those that were not.

    The first install cell is the pattern of all: they differ in the extras that they install.
    """
    paths, stale, install, (repository, branch) = find(), [], "", address()
    source = f'"-b {branch} https://github.com/{repository}"' if repository else 'os.environ["FEDAL_REPOSITORY"]'
    for before, path, after in zip([None, *paths[:-1]], paths, [*paths[1:], None], strict=True):
        parts = [f"{word}: [{p.stem}]({p.name})" for word, p in (("previous", before), ("next", after)) if p]
        line = f"<!-- navigation -->{' · '.join(filter(None, [colab(path.stem), *parts]))}<!-- /navigation -->"
        for file in (path, path.parents[1] / "results" / "notebooks" / path.name):
            content = read(file) if file.exists() else {"cells": []}
            for cell in content["cells"]:
                text = "".join(cell["source"])
                if cell is content["cells"][0]:
                    title, _, rest = text.partition("\n")
                    rest = re.sub(r"\s*<!-- navigation -->.*?<!-- /navigation -->", "", rest, count=1, flags=re.DOTALL)
                    text = f"{title}\n\n{_moved(line, path, file.parent)}\n\n{rest.lstrip()}".rstrip()
                elif cell["cell_type"] == "code" and "google.colab" in text:
                    install = install or re.sub(r"source = .*", lambda _: f"source = {source}", text)
                    extras = re.search(r"\.\[[\w,]+\]", text)[0]
                    text = re.sub(r"\.\[[\w,]+\]", extras, install)
                cell["source"] = text.splitlines(keepends=True)
            if file.exists() and content != read(file):
                stale.append(path.stem)
                if write:
                    record.write_atomic(file, content)
    return list(dict.fromkeys(stale))
