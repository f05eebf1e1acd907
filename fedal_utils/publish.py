"""Publish executed copies of notebooks, and keep the notebooks' badges and navigation in order."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import notebooks

REPOSITORY = "https://github.com/fedal-project/fedal"  # pyproject.toml and CITATION.cff repeat it; a test compares
BRANCH = "main"
MAX_PUBLISHED = 1_000_000  # bytes


def executed(path: Path) -> Path:
    """Where the last executed copy of a notebook lies, if it has been run."""
    return path.parents[1] / "results" / "notebooks" / "_work" / path.name


def publish(name: str, root: str | Path | None = None) -> Path:
    """Copy the last executed copy of a notebook to `results/notebooks/`, without traces of the machine it ran on.

    Relative links and pictures work from there. ValueError if it has not been run, or if the copy is above 1 MB.
    """
    (path,) = notebooks.find(name, root)
    folder = path.parents[1] / "results" / "notebooks"
    if not executed(path).exists():
        raise ValueError(f"{path.stem} has not been run: python -m fedal_utils run {path.stem}")
    content = _without_traces(notebooks.read(executed(path)), path.parents[1])
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = _relinked("".join(cell["source"]), path.parent, folder).splitlines(keepends=True)
    size = len(json.dumps(content, indent=1, ensure_ascii=False).encode()) / 1e6
    if size * 1e6 > MAX_PUBLISHED:
        largest, at = max((len(json.dumps(cell)) / 1e6, i) for i, cell in enumerate(content["cells"]))
        raise ValueError(f"{path.stem} has {size:.2f} MB with outputs, 1 MB is allowed (cell {at}: {largest:.2f} MB)")
    return notebooks.write(folder / path.name, content)


def _relinked(text: str, old: Path, new: Path) -> str:
    """Markdown whose relative links, good in folder `old`, are good in `new`: to published copies where there are."""

    def moved(match: re.Match) -> str:
        mark, target = match.groups()
        if re.match(r"\w+:|/", target) or target.endswith(".ipynb") and (new / target).exists():
            return match[0]
        return mark + Path(os.path.relpath(old / target, new)).as_posix()

    return re.sub(r"""(\]\(|\b(?:src|href)=["'])([^)"'\s#]+)""", moved, text)


def _without_traces(content: dict[str, Any], home: Path) -> dict[str, Any]:
    """An executed notebook without papermill's notes, time stamps, widget states and local absolute paths."""
    noise = ("papermill", "execution", "widgets", "application/vnd.jupyter.widget-view+json")
    places = {str(home): ".", str(home.resolve()): ".", sys.prefix: "<python>", sys.base_prefix: "<python>"}
    places |= {tempfile.gettempdir(): "<temporary>", str(Path.home()): "~"}
    pattern = re.compile("|".join(map(re.escape, sorted((p for p in places if len(p) > 1), key=len, reverse=True))))

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: places[match.group()], value)
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, dict):
            return {k: v if k in ("image/png", "image/jpeg") else clean(v) for k, v in value.items() if k not in noise}
        return value

    return clean(content)


def navigation(root: str | Path | None = None, write: bool = True) -> list[str]:
    """Bring Colab badge and links in each notebook's first markdown cell up to date; the names of those that were not.

    A cell without the line gets it under its title.
    """
    paths, stale = notebooks.find(None, root), []
    for before, path, after in zip([None, *paths[:-1]], paths, [*paths[1:], None], strict=True):
        target = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/{BRANCH}/notebooks/{path.name}"
        badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        parts = [f"{badge}(https://colab.research.google.com/github/{target})"]
        parts += [f"{word}: [{p.stem}]({p.name})" for word, p in (("previous", before), ("next", after)) if p]
        line = f"<!-- navigation -->{' · '.join(parts)}<!-- /navigation -->"
        content = notebooks.read(path)
        cell = next(cell for cell in content["cells"] if cell["cell_type"] == "markdown")
        title, _, rest = "".join(cell["source"]).partition("\n")
        rest = re.sub(r"\s*<!-- navigation -->.*?<!-- /navigation -->", "", rest, count=1, flags=re.DOTALL)
        cell["source"] = f"{title}\n\n{line}\n\n{rest.lstrip()}".rstrip().splitlines(keepends=True)
        if content != notebooks.read(path):
            stale.append(path.stem)
            if write:
                notebooks.write(path, content)
    return stale
