"""The house keeps its rules: imports point up, versions agree, `make` explains itself, forbidden names stay out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fedal_utils
from fedal_utils import __main__ as command
from fedal_utils import notebooks

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

# An import points up this list. The README's map is in the same order.
ORDER = """
    config seeding boxes download data exchange class_sets augment partition pool backbones losses roi_heads detectors
    yolo classifiers vae training sampling federation metrics record plots notebooks labelling huale kafal
    dual_vae alfl flywheel wire homes secure flower __main__
""".split()
ONLY_IN = {
    "flwr": ("flower", "secure"),
    "gradio": ("labelling",),
    "papermill": ("notebooks",),
    "argparse": ("__main__",),
    "random": ("seeding",),
}
NOWHERE = {"ultralytics", "yolov5", "hydra", "lightning", "pytorch_lightning", "wandb", "pickle"}
CONDA_NAMES = {"torch": "pytorch"}  # where conda calls a package by another name

MODULES = sorted(Path(fedal_utils.__file__).parent.glob("*.py"))


def imported(tree: ast.AST) -> set[tuple[str, bool]]:
    """(top name, is it ours) of every import in a module, also those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                found.add((parts[1], True) if parts[0] == "fedal_utils" and len(parts) > 1 else (parts[0], False))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            ours = node.level > 0 or module.split(".")[0] == "fedal_utils"
            inner = module if node.level else module.removeprefix("fedal_utils").lstrip(".")
            if ours and not inner:
                found |= {(alias.name, True) for alias in node.names}
            else:
                found.add(((inner if ours else module).split(".")[0], ours))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_only_point_up(path):
    if path.stem == "__init__":
        assert not imported(ast.parse(path.read_text())), "the package imports nothing by itself"
        return
    assert path.stem in ORDER, f"{path.name} has no place in the order: give it one here and on the README's map"
    for name, ours in imported(ast.parse(path.read_text())):
        if ours and not name.startswith("__version__"):
            assert name in ORDER, f"{path.name} imports {name}, which is no module of the package"
            assert ORDER.index(name) < ORDER.index(path.stem), f"{path.name} imports {name}, which lies below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_forbidden_names_stay_out(path):
    tree = ast.parse(path.read_text())
    for name, ours in imported(tree):
        if not ours:
            assert name not in NOWHERE, f"{path.name} imports {name}"
            assert path.stem in ONLY_IN.get(name, (path.stem,)), (
                f"{path.name} imports {name}: it belongs to {' and '.join(ONLY_IN[name])}"
            )
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path.name}, line {node.lineno}: global"
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            line = f"{path.name}, line {node.lineno}: {call}"
            assert call not in ("exec", "eval", "sys.exit", "exit", "quit", "sys.path.append", "sys.path.insert"), line
            assert call not in ("np.random.seed", "random.seed", "torch.cuda.manual_seed_all"), line
            assert call != "torch.manual_seed" or path.stem == "seeding", line


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_module_and_public_name_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path.name
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node.name in ("main", "console", "parser"), f"{path.name}: {node.name}"


# --- versions ---------------------------------------------------------------------------------------------------------


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def split(requirement: str) -> tuple[str, str]:
    """("numpy", ">=1.26,<3") of "numpy>=1.26,<3"; extras and markers apart."""
    plain = re.sub(r"\[.*?\]", "", requirement.partition(";")[0].strip())
    name, versions = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*([<>=!~].*)?", plain).groups()
    return name, (versions or "").replace(" ", "")


def conda_requirements(root: Path) -> list[str]:
    """Every package line of environment.yml; a plain reading is enough for a file this plain."""
    lines = (root / "environment.yml").read_text().split("dependencies:\n")[1].splitlines()
    return [line.strip().removeprefix("- ") for line in lines if line.strip() not in ("- pip:", "- pip", "- -e .")]


def test_conda_and_pip_users_get_the_same_packages(root):
    facts = project(root)
    extras = facts["optional-dependencies"]
    pip = [*facts["dependencies"], *extras["backbones"], *extras["fast"], *extras["dev"], *extras["flower"]]
    pip = [*map(split, pip), ("python", facts["requires-python"].replace(" ", ""))]
    ours = {CONDA_NAMES.get(name, name): versions for name, versions in pip}
    theirs = dict(map(split, conda_requirements(root)))
    assert len(pip) == len(ours) and len(theirs) == len(conda_requirements(root))
    assert ours == theirs


def test_every_requirement_has_a_lower_and_an_upper_bound(root):
    facts = project(root)
    for requirement in [*facts["dependencies"], *sum(facts["optional-dependencies"].values(), [])]:
        assert re.fullmatch(r">=[\d.]+,<[\d.]+", split(requirement)[1]), requirement


def test_what_is_installed_satisfies_the_requirements(root):
    from packaging.requirements import Requirement

    facts = project(root)
    extras = facts["optional-dependencies"]
    for text in [*facts["dependencies"], *extras["backbones"], *extras["fast"], *extras["dev"], *extras["flower"]]:
        requirement = Requirement(text)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            assert text not in facts["dependencies"], f"{text} is not installed"
            continue
        assert requirement.specifier.contains(version, prereleases=True), f"{text}, but {version} is installed"


def test_version_and_repository_are_the_same_everywhere(root):
    facts = project(root)
    citation = (root / "CITATION.cff").read_text()
    assert facts["urls"]["Repository"] == notebooks.REPOSITORY
    assert f'repository-code: "{notebooks.REPOSITORY}"' in citation
    assert f"\nversion: {fedal_utils.__version__}\n" in citation
    assert facts["license"] == "Apache-2.0" and "\nlicense: Apache-2.0\n" in citation
    licence = (root / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


# --- make and the command line ----------------------------------------------------------------------------------------


def make(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=root, capture_output=True, text=True)


def test_make_alone_explains_every_target(root):
    shown = make(root)
    assert shown.returncode == 0, shown.stderr
    targets = re.findall(r"^([a-z-]+):.*##", (root / "Makefile").read_text(), re.MULTILINE)
    assert {"env", "reproduce", "test", "bench", "lint", "clean", "data"} <= set(targets)
    for target in targets:
        assert re.search(rf"^  make {target} +\S", shown.stdout, re.MULTILINE), target


def test_make_refuses_an_old_or_missing_python_in_words(root, tmp_path):
    old = tmp_path / "old python"  # a space, too
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    for python, word in ((str(old), "Python 3.8.1"), (str(tmp_path / "none"), "none")):
        refused = make(root, "env", f"PYTHON={python}", f"VENV={tmp_path / 'new env'}")
        assert refused.returncode != 0 and "needs Python 3.10 or newer" in refused.stderr and word in refused.stderr
    assert not (tmp_path / "new env").exists()


def test_make_env_leaves_a_current_environment_alone_and_passes_its_settings_on(root, tmp_path):
    """A stand-in for the environment's Python writes down what it is asked to do."""
    bin_folder = tmp_path / "my env" / "bin"
    bin_folder.mkdir(parents=True)
    log = tmp_path / "log"
    (bin_folder / "python").write_text(f'#!/bin/sh\nfor word in "$@"; do echo "<$word>" >> "{log}"; done\n')
    (bin_folder / "python").chmod(0o755)
    given = (f"PYTHON={sys.executable}", f"VENV={tmp_path / 'my env'}")
    assert make(root, "env", *given).returncode == 0
    first = log.read_text()
    assert "<.[backbones,fast,dev,flower]>" in first and "<--no-deps>" not in first
    assert make(root, "env", *given).returncode == 0
    assert log.read_text() == first  # nothing to do
    stamp = tmp_path / "my env" / ".fedal-stamp"
    stamp.write_text(stamp.read_text().splitlines()[0] + "\n/another/clone\n")
    assert make(root, "env", *given).returncode == 0
    assert "<--no-deps>" in log.read_text() and log.read_text().count("backbones") == 1  # only pointed here
    assert stamp.read_text().splitlines()[1] == str(root.resolve())
    log.unlink()
    assert make(root, "reproduce", "NB=11", "PROFILE=quick", "SEEDS=0,1", "DATA=../my data", *given).returncode == 0
    words = re.findall("<(.*)>", log.read_text())
    assert words == "-m fedal_utils reproduce --nb 11 --profile quick --seeds 0,1 --data".split() + ["../my data"]


def test_make_clean_keeps_data_runs_and_published_results(root):
    for target, kept in (("clean", ("data", "paper", "runs", "tables", "figures")), ("clean-runs", ("data", "paper"))):
        shown = make(root, "-n", target).stdout
        assert not [word for word in kept if re.search(rf"results/{word}|\b{word}/|rm -rf {word}", shown)], shown


def test_ci_runs_the_readmes_test_command(root):
    script = (root / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script and "\nmake test VENV=" in script
    assert subprocess.run(["bash", "-n", str(root / ".ci" / "run")]).returncode == 0


def test_the_command_line_reads_seeds_and_settings():
    assert command.seed_list("") is None and command.seed_list("0") == [0] and command.seed_list("0,2, 1") == [0, 2, 1]
    for wrong in ("a", "0,0", "-1", "1.5"):
        with pytest.raises(ValueError, match="seeds"):
            command.seed_list(wrong)
    assert command.settings(["cycles=3", "data=bccd", "size=(4, 5)", "name='3'", "flag=True", "empty="]) == {
        "cycles": 3,
        "data": "bccd",
        "size": (4, 5),
        "name": "3",
        "flag": True,
        "empty": "",
    }
    for wrong in (["cycles"], ["=3"], ["a=1", "a=2"]):
        with pytest.raises(ValueError):
            command.settings(wrong)


def test_a_wrong_command_is_one_line_and_exit_code_two(capsys):
    assert command.main(["run", "99_nothing"]) == 2
    assert command.main(["reproduce", "--profile", "huge"]) == 2
    assert command.main(["reproduce", "--seeds", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "smoke, quick, paper" in lines[1]


def test_doctor_tells_versions_data_and_profile(capsys, tmp_path, monkeypatch):
    (tmp_path / "BCCD").mkdir()
    monkeypatch.setenv("FEDAL_DATA", str(tmp_path))
    assert command.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"fedal {fedal_utils.__version__}" in out and "torch" in out and "BCCD" in out and "profile" in out
