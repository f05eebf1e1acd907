"""Published copies tell nothing of the machine and their links work; badges and navigation are kept in order."""

import functools
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from small_house import printed, write_notebook

from fedal_utils import __main__ as command
from fedal_utils import notebooks

TEXT = """# A title

[next](11_bad.ipynb), [again](10_good.ipynb#part), ![a](../results/figures/a.png) <img src="../docs/b.svg">
[site](https://example.org/x.ipynb) [part](#part)"""


def test_publish_leaves_no_trace_of_the_machine_and_links_work_from_there(house):
    secret = f"print({str(Path.home() / 'x')!r}, __import__('sys').prefix + '/lib', 'aGVsbG8=')"
    code = "import os; print(os.getcwd() + '/results')"
    write_notebook(house / "notebooks" / "10_good.ipynb", code, secret, text=TEXT)
    with pytest.raises(ValueError, match="has not been run"):
        notebooks.publish("10")
    notebooks.run("10")
    path = notebooks.publish("10")
    assert path == house / "results" / "notebooks" / "10_good.ipynb"
    text = path.read_text()
    assert "<python>/lib aGVsbG8=" in printed(path) and printed(path).startswith("./results")
    assert str(house) not in text and sys.prefix not in text and '"papermill"' not in text and "start_time" not in text
    nbformat.validate(nbformat.read(path, as_version=4))
    shown = "".join(json.loads(text)["cells"][0]["source"])
    assert "(../../notebooks/11_bad.ipynb)" in shown and "(../../notebooks/10_good.ipynb#part)" in shown
    assert "(../figures/a.png)" in shown and 'src="../../docs/b.svg"' in shown
    assert "(https://example.org/x.ipynb)" in shown and "(#part)" in shown
    again = "".join(json.loads(notebooks.publish("10").read_text())["cells"][0]["source"])
    assert "(../../notebooks/11_bad.ipynb)" in again and "(10_good.ipynb#part)" in again  # a copy is there now
    executed = notebooks.executed(house / "notebooks" / "10_good.ipynb")
    executed.write_text(executed.read_text().replace("aGVsbG8=", "x" * 550_000))
    with pytest.raises(ValueError, match="1.10 MB with outputs"):
        notebooks.publish("10")


def first_lines(house, name="10_good") -> str:
    return "".join(json.loads((house / "notebooks" / f"{name}.ipynb").read_text())["cells"][0]["source"])


def test_navigation_is_written_once_and_then_left_alone(house):
    assert notebooks.navigation(write=False) == ["10_good", "11_bad"]
    assert notebooks.navigation() == ["10_good", "11_bad"] and notebooks.navigation() == []
    title, _, line, *rest = first_lines(house).splitlines()
    assert title == "# A title" and rest == ["", "Text."]
    assert line == "<!-- navigation -->next: [11_bad](11_bad.ipynb)<!-- /navigation -->"  # no address, no badge
    write_notebook(house / "notebooks" / "12_new.ipynb")
    assert notebooks.navigation() == ["11_bad", "12_new"]  # the neighbour and the newcomer
    for path in notebooks.find():
        nbformat.validate(nbformat.read(path, as_version=4))


def test_the_address_comes_from_the_command_or_from_origin_and_is_never_invented(house, capsys):
    git = functools.partial(subprocess.run, cwd=house, check=True, capture_output=True)
    assert command.main(["badges"]) == 0 and notebooks.address() == ("", "")
    assert command.main(["badges", "--repo", "me/mine", "--branch", "dev"]) == 0
    assert notebooks.address() == ("me/mine", "dev") and notebooks.navigation() == []
    assert "/colab.research.google.com/github/me/mine/blob/dev/notebooks/10_good.ipynb) · next" in first_lines(house)
    git(["git", "init", "-q"])
    for remote, found in (("git@github.com:a/b.git", "a/b"), ("https://github.com/a/b.c", "a/b.c"), ("/srv/x.git", "")):
        git(["git", "config", "remote.origin.url", remote])
        assert command.main(["badges"]) == 0 and notebooks.address()[0] == found
    assert "colab" not in first_lines(house)
    assert command.main(["badges", "--repo", "https://x"]) == 2
    assert "is owner/name" in capsys.readouterr().err


def test_on_colab_the_install_cell_clones_once_keeps_torch_and_fails_loudly(root, tmp_path, monkeypatch):
    calls = []

    def run(words, check):
        calls.append(words)
        if words[0] == "git":
            assert check
            Path(words[-1], "fedal_utils").mkdir(parents=True)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    text = "".join(notebooks.read(root / "notebooks" / "00_start_here.ipynb")["cells"][1]["source"])
    cell = re.sub("source = .*", 'source = "-b dev https://github.com/me/mine"', text)
    exec(cell, {})
    assert not calls  # elsewhere it does nothing
    monkeypatch.setitem(sys.modules, "google.colab", None)
    for _ in range(2):
        exec(cell, {})
    clone, first, again = calls
    assert clone[5:] == ["-b", "dev", "https://github.com/me/mine", "fedal"] and Path.cwd() == tmp_path / "fedal"
    assert first == again and first[-2:] == ["-e", ".[backbones]"]
    assert f"torch=={version('torch')}\n" in (tmp_path / "kept.txt").read_text()
    monkeypatch.chdir(tmp_path / "fedal" / "fedal_utils")
    with pytest.raises(KeyError, match="FEDAL_REPOSITORY"):
        exec(re.sub("source = .*", 'source = os.environ["FEDAL_REPOSITORY"]', text), {})


def test_a_digest_tells_whether_a_copy_shows_the_code_of_its_source(house):
    path = house / "notebooks" / "10_good.ipynb"
    notebooks.run("10", seeds=[3])  # parameters are injected as a cell of their own
    copy = notebooks.read(notebooks.publish("10"))
    assert copy["metadata"]["fedal"]["code"] == notebooks.code_digest(notebooks.read(path))
    write_notebook(path, "print(1)")
    assert copy["metadata"]["fedal"]["code"] != notebooks.code_digest(notebooks.read(path))
