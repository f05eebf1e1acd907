"""A small checkout to run notebooks in."""

import json
from pathlib import Path

import nbformat

PARAMETERS = 'profile = "smoke"\ndata = None\nseeds = None'


def write_notebook(path: Path, *cells: str, parameters=PARAMETERS, text="# A title\n\nText.", fedal=None) -> Path:
    """A notebook of a title, a parameters cell and these code cells; fedal: of its metadata."""
    book, new = nbformat.v4.new_notebook(), nbformat.v4.new_code_cell
    book.metadata.kernelspec = {"name": "nowhere", "display_name": "A kernel nobody has", "language": "python"}
    book.metadata |= {"fedal": fedal} if fedal else {}
    first = [nbformat.v4.new_markdown_cell(text), new(parameters, metadata={"tags": ["parameters"]})]
    book.cells = [*first, *map(new, cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


GOOD = """
import json, os, sys
from pathlib import Path
Path("results/good").touch()
print(json.dumps([profile, data, seeds, os.getcwd(), sys.executable, os.environ["FEDAL_PROGRESS"]]))
"""


def build(root: Path) -> Path:
    """A checkout with a notebook that runs and one that fails."""
    write_notebook(root / "notebooks" / "10_good.ipynb", GOOD)
    write_notebook(root / "notebooks" / "11_bad.ipynb", "before = 1", "ratio = before / 0", "print('never')")
    (root / "pyproject.toml").write_text("[project.urls]\n# Repository: none, see make badges\n")
    return root


def printed(path: Path) -> str:
    """What a notebook's cells printed."""
    cells = json.loads(path.read_text())["cells"]
    return "".join("".join(out["text"]) for cell in cells for out in cell.get("outputs", []) if "text" in out)
