"""The runner is strict, and the notebooks keep the house's hygiene."""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest

from fedal_utils import __main__ as command
from fedal_utils import config, notebooks

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").rglob("*.ipynb"))
NOTEBOOKS = [p for p in NOTEBOOKS if ".ipynb_checkpoints" not in p.parts]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def source(cell: dict) -> str:
    return "".join(cell["source"])


# --- hygiene ----------------------------------------------------------------------------------------------------------


def test_there_are_notebooks():
    assert NOTEBOOKS


@each
def test_valid_and_stripped(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert path.parent.name == "notebooks", "notebooks lie flat in their folder"
    assert book.nbformat_minor >= 5, "older formats have no cell ids"
    ids = [cell.get("id") for cell in book.cells]
    assert all(ids) and len(set(ids)) == len(ids), "every cell has an id of its own"
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, (
                f"cell {cell.id} has outputs: nbstripout {path.name}"
            )
    assert "widgets" not in book.metadata and "papermill" not in book.metadata


@each
def test_small(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size <= 100_000
    assert len(book["cells"]) <= 60
    for number, cell in enumerate(book["cells"]):
        assert len(source(cell).splitlines()) <= 40, f"cell {number} has more than 40 lines"


@each
def test_plain_code(path):
    """No class definitions; `!` and `%` only in the install cell, which comes first among the code cells."""
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        magic = [line for line in source(cell).splitlines() if line.lstrip().startswith(("!", "%"))]
        assert not magic or number == 0, f"code cell {number}: {magic[0]}"
        lines = [
            line[: len(line) - len(line.lstrip())] + "pass" if line.lstrip().startswith(("!", "%")) else line
            for line in source(cell).splitlines()
        ]
        tree = ast.parse("\n".join(lines))
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)], f"code cell {number} defines a class"
        calls = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
        assert not {"exec", "eval", "sys.path.append", "sys.path.insert"} & set(calls), f"code cell {number}"


@each
def test_parameters_are_literals_that_the_config_knows(path):
    known = notebooks.parameters(path)
    allowed = set(inspect.signature(config.load).parameters) | set(config.fields()) | {"profile", "overrides"}
    assert set(known) <= allowed, f"{sorted(set(known) - allowed)} are no parameters of config.load"
    if "profile" in known:
        assert known["profile"] in (None, *config.PROFILES)
        for profile in config.PROFILES:
            notebooks.checked(path, {"profile": profile})
    with pytest.raises(ValueError, match="no_such_parameter"):
        notebooks.checked(path, {"no_such_parameter": 1})


def test_badges_and_navigation_are_up_to_date():
    stale = notebooks.navigation(Path(__file__).resolve().parents[1], write=False)
    assert not stale, f"{stale}: run `python -m fedal_utils navigation`"


# --- a small checkout to run things in --------------------------------------------------------------------------------


def write_notebook(path: Path, *cells: str, parameters: str = 'profile = "smoke"\ndata = None\nseeds = None') -> Path:
    book = nbformat.v4.new_notebook()
    book.metadata.kernelspec = {"name": "nowhere", "display_name": "A kernel nobody has", "language": "python"}
    book.cells = [nbformat.v4.new_markdown_cell("# A title\n\nText.")]
    book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    book.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


GOOD = """
import json, os, sys
from pathlib import Path
Path("results/figures").mkdir(parents=True, exist_ok=True)
Path("results/figures/10_good.png").write_bytes(b"x")
print(json.dumps([profile, data, seeds, os.getcwd(), sys.executable, os.environ["FEDAL_PROGRESS"]]))
"""


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "a {house} with spaces"
    write_notebook(root / "notebooks" / "10_good.ipynb", GOOD)
    write_notebook(root / "notebooks" / "11_bad.ipynb", "before = 1", "ratio = before / 0", "print('never')")
    (root / "pyproject.toml").touch()
    monkeypatch.delenv("FEDAL_HOME", raising=False)
    monkeypatch.chdir(root)
    return root


def printed(path: Path) -> str:
    book = json.loads(path.read_text())
    return "".join(source({"source": o["text"]}) for c in book["cells"] for o in c.get("outputs", []) if "text" in o)


def test_runs_by_this_interpreter_from_the_root_with_the_parameters_given(house, monkeypatch):
    work = house / "results" / "notebooks" / "_work"
    work.mkdir(parents=True)
    (work / ".10_good.99999999.tmp.ipynb").touch()  # a runner was killed here: no such process
    monkeypatch.chdir(house / "notebooks")
    done = notebooks.run("10", "quick", data="../x", seeds=[0, 1])
    assert done.name == "10_good" and 0 < done.minutes < 1
    assert json.loads(printed(done.output)) == ["quick", "../x", [0, 1], str(house), sys.executable, "lines"]
    assert [p.name for p in done.output.parent.iterdir()] == ["10_good.ipynb"]
    book = nbformat.read(done.output, as_version=4)
    assert book.metadata.fedal.parameters == {"profile": "quick", "dataset": "../x", "seeds": [0, 1]}
    assert "JUPYTER_PATH" not in os.environ or "fedal-kernel" not in os.environ["JUPYTER_PATH"]


def test_a_failing_cell_is_shown_and_the_part_before_it_is_kept(house):
    with pytest.raises(notebooks.NotebookFailed, match="ratio = before / 0") as caught:
        notebooks.run("11_bad")
    assert "ZeroDivisionError: division by zero" in str(caught.value) and "\x1b" not in str(caught.value)
    assert caught.value.partial.name == "11_bad.failed.ipynb" and caught.value.partial.exists()
    assert not (caught.value.partial.parent / "11_bad.ipynb").exists()


def test_a_notebook_that_takes_too_long_is_stopped(house):
    write_notebook(house / "notebooks" / "12_slow.ipynb", "import time", "time.sleep(60)")
    with pytest.raises(notebooks.NotebookFailed, match="12_slow passed its limit of 0.05 minutes"):
        notebooks.run("12", minutes=0.05)


def test_a_dead_kernel_is_told(house):
    write_notebook(house / "notebooks" / "12_dead.ipynb", "import os; os._exit(9)")
    with pytest.raises(notebooks.NotebookFailed, match="lost its kernel"):
        notebooks.run("12")


def test_a_notebook_may_set_its_own_limit(house):
    path = house / "notebooks" / "10_good.ipynb"
    book = json.loads(path.read_text())
    book["metadata"]["fedal"] = {"minutes": {"smoke": 3, "paper": 600}}
    path.write_text(json.dumps(book))
    assert [notebooks._limit(path, p) for p in ("smoke", "quick", "paper", None)] == [3, 180, 600, 15]


def test_reproduce_goes_on_after_a_failure_and_tells_minutes_and_figures(house, capsys):
    assert command.main(["reproduce", "--profile", "smoke", "--seeds", "3"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "2 notebooks, profile smoke"
    assert lines[1].split()[0] == "10_good" and "min  done  profile=smoke  seeds=3" in lines[1]
    assert lines[2].split()[0] == "11_bad" and "FAILED" in lines[2]
    assert lines[4:6] == ["Figures:", f"  {Path('results/figures/10_good.png')}"]
    assert "ZeroDivisionError" in err


def test_a_notebook_that_reads_the_runs_of_others_starts_when_they_are_done(house, capsys):
    """Two side by side: 05 would start at once, but it waits for 10_good; who is not asked for is not waited for."""
    path = house / "notebooks" / "05_late.ipynb"
    write_notebook(path, "import pathlib; assert pathlib.Path('results/figures/10_good.png').exists()")
    book = json.loads(path.read_text())
    book["metadata"]["fedal"] = {"after": ["10_good"]}
    path.write_text(json.dumps(book))
    assert notebooks.reproduce("05,10", "smoke", jobs=2) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["10_good", "05_late"]
    (house / "results" / "figures" / "10_good.png").unlink()
    assert notebooks.reproduce("05", "smoke") == ["05_late"]


def test_reproduce_refuses_before_it_runs_anything(house, capsys):
    write_notebook(house / "notebooks" / "00_start.ipynb", parameters='profile = "smoke"')
    assert command.main(["reproduce", "--nb", "00", "--data", "bccd"]) == 2
    assert "none of 00_start has a parameter 'data'" in capsys.readouterr().err
    assert not (house / "results").exists()


def test_data_paths_are_made_good_for_the_root(house, monkeypatch):
    assert notebooks.data_place("bccd", house) == "bccd" and notebooks.data_place(None, house) is None
    assert notebooks.data_place("my/folder", house) == "my/folder"
    monkeypatch.chdir(house / "notebooks")
    assert notebooks.data_place("bccd", house) == "bccd"
    assert notebooks.data_place("./x", house) == str(house / "notebooks" / "x")
    assert notebooks.data_place("/x", house) == "/x"


def test_unknown_parameters_are_refused_and_the_known_ones_named(house):
    path = house / "notebooks" / "10_good.ipynb"
    with pytest.raises(ValueError, match="10_good has no parameter 'sede'; known: profile, data, seeds"):
        notebooks.run("10_good", sede=3)
    assert notebooks.checked(path, {"seeds": [1]}) == {"seeds": [1]}
    write_notebook(path, parameters='profile = "smoke"\noverrides = {"cycles": 2, "clients": 3}')
    assert notebooks.checked(path, {"cycles": 5}) == {"overrides": {"cycles": 5, "clients": 3}}
    with pytest.raises(ValueError, match="no parameter 'cylces'; known: profile, overrides; settings: .*cycles"):
        notebooks.checked(path, {"cylces": 5})


@pytest.mark.parametrize(
    "text, message",
    [
        ("profile = default()", "literals only"),
        ("import os", "`name = literal` only, got `import os`"),
        ("a = b = 1", "`name = literal` only"),
        ("a, b = 1, 2", "`name = literal` only"),
        ("a: int", "`name = literal` only"),
    ],
)
def test_only_literals_are_parameters(tmp_path, text, message):
    path = write_notebook(tmp_path / "a.ipynb", parameters=text)
    with pytest.raises(ValueError, match=message):
        notebooks.parameters(path)


def test_literals_are_read_without_running_anything(tmp_path):
    text = '# a comment\nprofile: str = "smoke"  # size\nseeds = [0, 1]\noverrides = {"a": (1, -2.5)}\ndata = None'
    path = write_notebook(tmp_path / "a.ipynb", parameters=text)
    assert notebooks.parameters(path) == {
        "profile": "smoke",
        "seeds": [0, 1],
        "overrides": {"a": (1, -2.5)},
        "data": None,
    }
    book = json.loads(path.read_text())
    book["cells"][1]["metadata"] = {}
    path.write_text(json.dumps(book))
    with pytest.raises(ValueError, match="one code cell tagged 'parameters', it has 0"):
        notebooks.parameters(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a notebook"):
        notebooks.parameters(path)


def test_find_by_name_number_and_list(house):
    names = lambda wish: [p.stem for p in notebooks.find(wish)]  # noqa: E731
    assert names(None) == ["10_good", "11_bad"]
    assert names("11_bad") == names("11") == names("11_bad.ipynb") == names("notebooks/11_bad.ipynb") == ["11_bad"]
    assert names("11, 10,11") == ["11_bad", "10_good"]
    with pytest.raises(ValueError, match="'1' is unknown; there are: 10_good, 11_bad"):
        notebooks.find("1")


# --- publishing and navigation ----------------------------------------------------------------------------------------


def test_publish_leaves_no_trace_of_the_machine(house):
    secret = f"print({str(Path.home() / 'x')!r}, __import__('sys').prefix + '/lib', 'aGVsbG8=')"
    write_notebook(house / "notebooks" / "10_good.ipynb", "import os; print(os.getcwd() + '/results')", secret)
    with pytest.raises(ValueError, match="has not been run"):
        notebooks.publish("10")
    notebooks.run("10")
    path = notebooks.publish("10")
    assert path == house / "results" / "notebooks" / "10_good.ipynb"
    text = path.read_text()
    assert printed(path) == "./results\n~/x <python>/lib aGVsbG8=\n" or "<python>/lib" in printed(path)
    assert str(house) not in text and sys.prefix not in text and '"papermill"' not in text and "start_time" not in text
    nbformat.validate(nbformat.read(path, as_version=4))


def test_publish_refuses_more_than_a_megabyte(house):
    write_notebook(house / "notebooks" / "10_good.ipynb", "print('x' * 1_100_000)")
    notebooks.run("10")
    with pytest.raises(ValueError, match=r"1.10 MB with its outputs, 1 MB is allowed \(cell 3: 1.10 MB"):
        notebooks.publish("10")
    assert not (house / "results" / "notebooks" / "10_good.ipynb").exists()


def test_navigation_is_written_once_and_then_left_alone(house):
    assert notebooks.navigation(write=False) == ["10_good", "11_bad"]
    assert notebooks.navigation() == ["10_good", "11_bad"] and notebooks.navigation() == []
    text = source(json.loads((house / "notebooks" / "10_good.ipynb").read_text())["cells"][0])
    title, _, line, *rest = text.splitlines()
    assert title == "# A title" and rest == ["", "Text."]
    assert line.startswith("<!-- navigation -->[![Open in Colab]") and line.endswith("<!-- /navigation -->")
    assert "next: [11_bad](11_bad.ipynb)" in line and "previous" not in line
    assert f"{notebooks.REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/10_good.ipynb" in line
    write_notebook(house / "notebooks" / "12_new.ipynb")
    assert notebooks.navigation() == ["11_bad", "12_new"]  # the neighbour and the newcomer
    for path in notebooks.find():
        nbformat.validate(nbformat.read(path, as_version=4))
