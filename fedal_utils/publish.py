"""Publish executed copies of notebooks, and keep the notebooks' badges and navigation in order."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import notebooks, record

REPOSITORY = "https://github.com/fedal-project/fedal"  # pyproject.toml and CITATION.cff repeat it; a test compares
BRANCH = "main"
MAX_PUBLISHED = 1_000_000  # bytes
NOISE = ("papermill", "execution", "widgets", "application/vnd.jupyter.widget-view+json")


def publish(name: str) -> Path:
    """Copy the executed copy of a notebook to `results/notebooks/`, without traces of its machine, links mended."""
    (path,) = notebooks.find(name)
    home, folder = path.parents[1], path.parents[1] / "results" / "notebooks"
    if not notebooks.executed(path).exists():
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

    def moved(match: re.Match) -> str:
        """A relative link, good beside the notebook, as it is good in the folder: to published copies if there are."""
        mark, target = match.groups()
        if re.match(r"\w+:|/", target) or target.endswith(".ipynb") and (folder / target).exists():
            return match[0]
        return mark + Path(os.path.relpath(path.parent / target, folder)).as_posix()

    content = clean(notebooks.read(notebooks.executed(path)))
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"""(\]\(|\b(?:src|href)=["'])([^)"'\s#]+)""", moved, "".join(cell["source"]))
            cell["source"] = text.splitlines(keepends=True)
    size = len(json.dumps(content, indent=1, ensure_ascii=False).encode())
    if size > MAX_PUBLISHED:
        raise ValueError(f"{path.stem} has {size / 1e6:.2f} MB with outputs, 1 MB is allowed")
    return record.write_atomic(folder / path.name, content)


def navigation(write: bool = True) -> list[str]:
    """Bring Colab badge and links under each notebook's title up to date; the names of those that were not."""
    paths, stale = notebooks.find(), []
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
                record.write_atomic(path, content)
    return stale
