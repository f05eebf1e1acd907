"""Published copies tell nothing of the machine and their links work; badges and navigation are kept in order."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from small_house import printed, write_notebook

from fedal_utils import notebooks, publish

TEXT = """# A title

[next](11_bad.ipynb), [again](10_good.ipynb#part), ![a](../results/figures/a.png) <img src="../docs/b.svg">
[site](https://example.org/x.ipynb) [part](#part)"""


def test_publish_leaves_no_trace_of_the_machine_and_links_work_from_there(house):
    secret = f"print({str(Path.home() / 'x')!r}, __import__('sys').prefix + '/lib', 'aGVsbG8=')"
    code = "import os; print(os.getcwd() + '/results')"
    write_notebook(house / "notebooks" / "10_good.ipynb", code, secret, text=TEXT)
    with pytest.raises(ValueError, match="has not been run"):
        publish.publish("10")
    notebooks.run("10")
    path = publish.publish("10")
    assert path == house / "results" / "notebooks" / "10_good.ipynb"
    text = path.read_text()
    assert "<python>/lib aGVsbG8=" in printed(path) and printed(path).startswith("./results")
    assert str(house) not in text and sys.prefix not in text and '"papermill"' not in text and "start_time" not in text
    nbformat.validate(nbformat.read(path, as_version=4))
    shown = "".join(json.loads(text)["cells"][0]["source"])
    assert "(../../notebooks/11_bad.ipynb)" in shown and "(../../notebooks/10_good.ipynb#part)" in shown
    assert "(../figures/a.png)" in shown and 'src="../../docs/b.svg"' in shown
    assert "(https://example.org/x.ipynb)" in shown and "(#part)" in shown
    again = "".join(json.loads(publish.publish("10").read_text())["cells"][0]["source"])
    assert "(../../notebooks/11_bad.ipynb)" in again and "(10_good.ipynb#part)" in again  # a copy is there now
    executed = notebooks.executed(house / "notebooks" / "10_good.ipynb")
    executed.write_text(executed.read_text().replace("aGVsbG8=", "x" * 550_000))
    with pytest.raises(ValueError, match="1.10 MB with outputs"):
        publish.publish("10")


def test_navigation_is_written_once_and_then_left_alone(house):
    assert publish.navigation(write=False) == ["10_good", "11_bad"]
    assert publish.navigation() == ["10_good", "11_bad"] and publish.navigation() == []
    text = "".join(json.loads((house / "notebooks" / "10_good.ipynb").read_text())["cells"][0]["source"])
    title, _, line, *rest = text.splitlines()
    assert title == "# A title" and rest == ["", "Text."]
    assert line.startswith("<!-- navigation -->[![Open in Colab]") and line.endswith("<!-- /navigation -->")
    assert "next: [11_bad](11_bad.ipynb)" in line and "previous" not in line
    assert f"{publish.REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/10_good.ipynb" in line
    write_notebook(house / "notebooks" / "12_new.ipynb")
    assert publish.navigation() == ["11_bad", "12_new"]  # the neighbour and the newcomer
    for path in notebooks.find():
        nbformat.validate(nbformat.read(path, as_version=4))
