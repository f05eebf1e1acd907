"""The README's tables come out of results/, and stay as they are where nothing has changed."""

import gzip
import json

import pandas as pd

from fedal_utils import notebooks
from fedal_utils.record.verdicts import VERDICT_COLUMNS

RECORD = """digest,method,seed,commit,minutes,client
d,sum,0,0123456789abcdef0123456789abcdef01234567-dirty,90.5,server
d,sum,0,0123456789abcdef0123456789abcdef01234567-dirty,90.5,00
d,sum,1,0123456789abcdef0123456789abcdef01234567,30,server
"""
ROWS = [
    ["10", "huale", "gain", "a 2 > b 1", "a 2, b 1", 1, -0.5, 2.5, 1.5, 5, "bccd", "full", "inconclusive", "p. 3"],
    ["10", "huale", "bytes", "a 2", "a 2", 0, None, None, None, 0, "bccd", "full", "formula checked", "p. 3"],
    ["11", "huale", "order", "b 1", "b 1", 1, 0.5, 1.5, 0.5, 3, "voc07", "full", "inconclusive", "p. 4"],
]


def marked(*names: str) -> str:
    return "\n".join(f"before\n<!-- {name} -->\nby hand\n<!-- /{name} -->" for name in names)


def test_tables_of_notebooks_records_and_verdicts(house):
    pages = {"README.md": ("notebooks", "papers"), "results/README.md": ("verdicts", "records")}
    results = house / "results"
    notebooks.run("10", "quick", data="bccd")
    for name in ("records", "tables"):
        (results / name).mkdir(exist_ok=True)
    for page, names in pages.items():
        (house / page).write_text(marked(*names))
    (results / "records" / "10_good-bccd-quick.csv.gz").write_bytes(gzip.compress(RECORD.encode()))
    (results / "tables" / "minutes-smoke.csv").write_text("notebook,minutes\n11_bad,2.4\n")
    copy = notebooks.publish("10")
    assert notebooks.scoreboard(write=False)[0] == [*pages]
    assert notebooks.scoreboard()[0] == [*pages] and notebooks.scoreboard()[0] == []
    readme, page = ((house / page).read_text() for page in pages)
    assert "| [A title](results/notebooks/10_good.ipynb) | unknown | 120 min | quick, bccd |" in readme
    assert "| [A title](notebooks/11_bad.ipynb) | about 2.4 min | unknown | not executed yet |" in readme
    assert "| `10_good-bccd-quick` | 2 | 120 | `0123456789-dirty` (1), `0123456789` (1) |" in page
    assert "by hand" in readme and "by hand" in page  # of verdicts: none is published
    pd.DataFrame(ROWS, columns=VERDICT_COLUMNS).to_csv(results / "tables" / "verdicts.csv", index=False)
    assert notebooks.scoreboard()[0] == [*pages]
    readme, page = ((house / page).read_text() for page in pages)
    assert "| *inconclusive* (2), *formula checked* (1) | bccd, voc07 | full | 5, 3 |" in readme
    assert (
        "| 10 | huale | gain | a 2 > b 1 | a 2, b 1 | *inconclusive*; full, bccd, 5 seeds; could have shown 1.5 |"
        in page
    )
    assert "by hand" not in readme + page and readme.count("before") == 2
    content = json.loads(copy.read_text())
    for code, told in (("another", "(older than its source)"), ("", "(first edition)")):
        content["metadata"]["fedal"]["code"] = code
        copy.write_text(json.dumps(content))
        assert told in notebooks.scoreboard()[1]["notebooks"]
