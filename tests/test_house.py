"""The house keeps its rules: rooms in order, nothing too large, versions agree, `make` explains itself."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

import fedal_utils
from fedal_utils import __main__ as command
from fedal_utils import config, notebooks, papers

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

# A room imports only from the rooms before it. The README's map is in the same order.
ROOMS = """
    fields config seeding data detectors training metrics sampling record federation plots labelling papers flower
    notebooks __main__
""".split()
ONLY_IN = dict(flwr="flower", gradio="labelling", papermill="notebooks", argparse="__main__", random="seeding")
NOWHERE = {"ultralytics", "yolov5", "hydra", "lightning", "pytorch_lightning", "wandb", "pickle"}
CALLS = "exec eval exit quit sys.exit sys.path.append sys.path.insert np.random.seed random.seed".split()
LINES, FILE, TESTS, FIELDS, PARAMETERS = 12_000, 300, 13_000, 25, 8
NAMES, MODULES = 90, 12  # that notebooks import

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fedal_utils.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
not_yet = pytest.mark.xfail(strict=False, reason="the rooms are still being cut")
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).with_suffix("").as_posix())
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[tuple[str, ...]]:
    """Dotted names of all modules that a file imports, also inside functions; ours begin with fedal_utils."""
    found, here = set(), ("fedal_utils", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) + 1 - node.level] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            found |= {(*module, alias.name) for alias in node.names} if module == ("fedal_utils",) else {module}
    return found


@each_file
def test_a_room_imports_only_from_rooms_before_it_and_not_from_files_inside(path):
    mine = room(path)
    ours = [name for name in imported(path) if name[0] == "fedal_utils" and name[1] not in (mine, "__version__")]
    assert mine in (*ROOMS, "__init__"), f"{mine} has no place in the order: give it one here and on the README's map"
    assert not (mine == "__init__" and imported(path)), "the package imports nothing by itself"
    for name in ours:
        assert name[1] in ROOMS, f"{path.name} imports {'.'.join(name)}, which is no room"
        assert ROOMS.index(name[1]) < ROOMS.index(mine), f"{path.name} imports {name[1]}, which comes after {mine}"
        assert len(name) == 2 or mine == "__main__", f"{path.name} imports {'.'.join(name)}, a file inside a room"


@each_file
def test_forbidden_names_stay_out(path):
    for name in imported(path):
        assert name[0] not in NOWHERE, f"{path.name} imports {name[0]}"
        assert room(path) == ONLY_IN.get(name[0], room(path)), f"{path.name} imports {name[0]}: {ONLY_IN[name[0]]}"
    for node in ast.walk(TREES[path]):
        assert not isinstance(node, ast.Global), f"{path.name}, line {node.lineno}: global"
        call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert call not in CALLS, f"{path.name}, line {node.lineno}: {call}"
        assert call != "torch.manual_seed" or room(path) == "seeding", f"{path.name}, line {node.lineno}: {call}"


@each_file
def test_no_private_names_of_flower_or_torchvision(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module, names = getattr(node, "module", None) or "", [alias.name for alias in node.names]
            words = ".".join([module, *names] if module else names).split(".")
        else:
            words = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
        if words[0] in ("flwr", "torchvision"):
            assert not [n for n in words if n.startswith("_") and not n.endswith("__")], f"{path.name}: {words}"
        if isinstance(node, ast.ImportFrom) and words[0] == "flwr":
            assert set(names) <= set(pytest.importorskip(module).__all__), f"{path.name}: {words}"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@not_yet
def test_the_package_is_thin_and_its_tests_are_short(capsys):
    sizes = {name: sum(lines(path) for path in FILES if room(path) == name) for name in map(room, FILES)}
    tests = sum(map(lines, (ROOT / "tests").rglob("*.py")))
    with capsys.disabled():
        print("\n" + "  ".join(f"{name} {size:,}" for name, size in sizes.items()))
        print(f"package {sum(sizes.values()):,}  tests {tests:,}")
    assert sum(sizes.values()) <= LINES and tests <= TESTS


@each_file
def test_files_classes_and_signatures_are_short_and_public_names_say_what_they_are_for(path):
    assert lines(path) <= FILE and ast.get_docstring(TREES[path])
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ClassDef):
            assert sum(isinstance(part, ast.AnnAssign) for part in node.body) <= FIELDS, node.name
        if isinstance(node, ast.arguments):
            given = [a.arg for a in (*node.posonlyargs, *node.args, *node.kwonlyargs) if a.arg not in ("self", "cls")]
            assert len(given) <= PARAMETERS, given
    for node in TREES[path].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_the_formatter_formats_everything():
    places = [*FILES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    assert not [path for path in places if "fmt: " + "skip" in path.read_text()]
    for words in (["check", "-q"], ["format", "--check", "-q"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def code(name: str) -> list[ast.Module]:
    """The code cells of a notebook; lines for the shell are left out."""
    cells = [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    for number, text in enumerate(sources):
        magic = [line for line in text.splitlines() if line.lstrip().startswith(("!", "%"))]
        assert not magic or number == 0, f"{name}, code cell {number}: {magic[0]}; only the install cell may"
    return [ast.parse(re.sub(r"^(\s*)[!%].*", r"\1pass", text, flags=re.MULTILINE)) for text in sources]


@each_notebook
def test_a_notebook_is_valid_stripped_small_and_plain(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert len({cell["id"] for cell in book.cells}) == len(book.cells), "every cell has an id of its own"
    assert "widgets" not in book.metadata and "papermill" not in book.metadata
    assert path.stat().st_size <= 100_000 and len(book.cells) <= 45
    for number, cell in enumerate(book.cells):
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"cell {number} has outputs: nbstripout {name}"
            assert len(cell.source.splitlines()) <= 25, f"cell {number} has more than 25 lines"
    for number, node in ((number, node) for number, tree in enumerate(code(name)) for node in ast.walk(tree)):
        assert not isinstance(node, ast.ClassDef), f"code cell {number} defines a class"
        assert not isinstance(node, ast.Call) or ast.unparse(node.func) not in CALLS, f"code cell {number}"
        if isinstance(node, (ast.For, ast.comprehension)):
            bound = {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
            assert "round" not in bound, f"code cell {number} has a loop variable called round"


@each_notebook
def test_parameters_are_literals_that_the_config_knows(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    known = notebooks.parameters(path)
    assert set(known) <= {"profile", "data", "seeds", "overrides"} | set(config.Config.paths())
    if "profile" in known:
        for profile in config.PROFILES:
            notebooks.checked(path, {"profile": profile})
            papers.load(name, profile)
    with pytest.raises(ValueError, match="no_such_parameter"):
        notebooks.checked(path, {"no_such_parameter": 1})


def taken(name: str) -> set[tuple[str, str]]:
    """(module, name) of everything of ours that a notebook uses."""
    modules, found = {}, set()

    def follow(module: types.ModuleType, words: list[str]) -> types.ModuleType | None:
        """The module at the end of these words; what is none is found."""
        for word in words:
            if not hasattr(module, word):
                importlib.import_module(f"{module.__name__}.{word}")
            if not isinstance(getattr(module, word), types.ModuleType):
                return found.add((module.__name__, word))
            module = getattr(module, word)
        return module

    nodes = [node for tree in code(name) for node in ast.walk(tree)]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fedal_utils":
            here = importlib.import_module(node.module)
            modules |= {alias.asname or alias.name: follow(here, [alias.name]) for alias in node.names}
    for node in nodes:
        first, *rest = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
        if modules.get(first) and all(map(str.isidentifier, rest)):
            follow(modules[first], rest)
    return found


def test_notebooks_need_few_names(capsys):
    every = sorted({pair for name in NOTEBOOKS for pair in taken(name)})
    rooms = {module.split(".")[1] for module, _ in every}
    with capsys.disabled():
        print(f"\nnotebooks use {len(every)} names of {len(rooms)} rooms:", *(".".join(pair)[12:] for pair in every))
    assert len(every) <= NAMES and len(rooms) <= MODULES


def test_badges_and_navigation_are_up_to_date(monkeypatch):
    monkeypatch.setenv("FEDAL_HOME", str(ROOT))
    stale = notebooks.navigation(write=False)
    assert not stale, f"{stale}: run `python -m fedal_utils scoreboard`"


def test_the_tables_of_the_readme_are_up_to_date_and_it_is_short(monkeypatch):
    monkeypatch.setenv("FEDAL_HOME", str(ROOT))
    stale, tables = notebooks.scoreboard(write=False)
    assert not stale, f"{stale}: run `python -m fedal_utils scoreboard`"
    assert all(f"<!-- {name} -->" in (ROOT / "README.md").read_text() for name in ("notebooks", "papers"))
    assert tables["records"] in (ROOT / "results" / "README.md").read_text() and lines(ROOT / "README.md") <= 160


def test_executed_copies_show_the_code_of_their_source():
    """Those without a digest are of the first edition, and the README says so."""
    for path in sorted((ROOT / "results" / "notebooks").glob("*.ipynb")):
        code = json.loads(path.read_text())["metadata"]["fedal"].get("code")
        source = notebooks.code_digest(NOTEBOOKS[path.stem])
        assert code in (None, source), f"{path.name} is older than its source: run it in quick, then publish it"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MADE = [*PROJECT["dependencies"], *(part for name in ("backbones", "dev", "flower") for part in EXTRAS[name])]


def test_conda_and_pip_users_get_the_same_packages_with_bounds():
    wanted = [Requirement(text) for text in [*MADE, f"python{PROJECT['requires-python']}"]]
    listed = (ROOT / "environment.yml").read_text().split("dependencies:\n")[1].splitlines()
    listed = [line.strip().removeprefix("- ") for line in listed if line.strip() not in ("- pip:", "- pip", "- -e .")]
    found = {"torch" if r.name == "pytorch" else r.name: r.specifier for r in map(Requirement, listed)}
    assert found == {r.name: r.specifier for r in wanted} and len(listed) == len(wanted)
    for requirement in map(Requirement, [*MADE, *EXTRAS["label"]]):
        assert sorted(part.operator for part in requirement.specifier) == ["<", ">="], requirement


def test_version_and_repository_are_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert "https://github.com" not in citation, "the address stands in pyproject.toml alone, see make badges"
    assert f"\nversion: {fedal_utils.__version__}\n" in citation and PROJECT["version"] == fedal_utils.__version__
    assert PROJECT["license"] == "Apache-2.0" and "\nlicense: Apache-2.0\n" in citation


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_every_command_of_the_readme_exists(page):
    """Targets and variables of make, commands and options of the command line; links lead to files."""
    text, makefile = (ROOT / page).read_text(), (ROOT / "Makefile").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    for line in blocks.splitlines():
        words = shlex.split(line.split(" #")[0]) if line.startswith(("make", "python -m fedal_utils ")) else []
        if words[:1] == ["make"]:
            for word in words[1:]:
                name, variable, _ = word.partition("=")
                assert re.search(rf"^{name} *\?=" if variable else rf"^{name}:", makefile, re.MULTILINE), line
        elif len(words) > 3:
            command.parser().parse_args(words[3:])
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_make_env_leaves_a_current_environment_alone_and_passes_its_settings_on(tmp_path):
    """A stand-in for the environment's Python writes down what it is asked to do."""
    python, log = tmp_path / "my env" / "bin" / "python", tmp_path / "log"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "<$word>" >> "{log}"; done\n')
    python.chmod(0o755)

    def make(*words: str) -> str:
        given = (f"PYTHON={sys.executable}", f"VENV={tmp_path / 'my env'}")
        subprocess.run(["make", *words, *given], cwd=ROOT, capture_output=True, check=True)
        return log.read_text()

    first = make("env")
    assert "<.[backbones,dev,flower]>" in first and "<--no-deps>" not in first
    assert make("env") == first  # nothing to do
    stamp = tmp_path / "my env" / ".fedal-stamp"
    stamp.write_text(stamp.read_text().splitlines()[0] + "\n/another/clone\n")
    again = make("env")
    assert "<--no-deps>" in again and again.count("backbones") == 1  # only pointed here
    assert stamp.read_text().splitlines()[1] == str(ROOT)
    log.unlink()
    make("reproduce", "NB=11", "PROFILE=quick", "SEEDS=0,1", "DATA=../my data", "JOBS=1")
    words = re.findall("<(.*)>", log.read_text())
    expected = "-m fedal_utils reproduce --nb 11 --profile quick --seeds 0,1 --data".split()
    assert words == [*expected, "../my data", "--jobs", "1"]
