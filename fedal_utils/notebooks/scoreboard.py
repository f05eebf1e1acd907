"""The tables of README.md and results/README.md, out of `results/`; nothing is trained."""

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from .. import record
from .batch import expected
from .copies import code_digest, colab
from .runner import checked, find, read


def scoreboard(write: bool = True) -> tuple[list[str], dict[str, str]]:
    """Bring the tables between `<!-- name -->` and `<!-- /name -->` up to date.

    Returns the pages that were not, and every table (Markdown) by its name: notebooks, papers (their verdicts in a row
    each), verdicts and records. As long as no verdict is published, what the pages say of them stays.
    """
    results, stale = record.project_root() / "results", []
    tables = {"notebooks": _notebooks(results), "records": _records(results)}
    if (results / "tables" / "verdicts.csv").exists():
        found = pd.read_csv(results / "tables" / "verdicts.csv", dtype=str, keep_default_na=False)
        found["seeds"] = found["seeds"].str.removesuffix(".0").replace("0", "")
        tables |= _verdicts(found)
    for page in (results.parent / "README.md", results / "README.md"):
        before = text = page.read_text() if page.exists() else ""
        for name, table in tables.items():
            whole = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
            text = re.sub(rf"(?s)<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, whole=whole: whole, text)
        if text != before:
            stale.append(page.relative_to(results.parent).as_posix())
            if write:
                record.write_atomic(page, text)
    return stale, tables


def _table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """Markdown; head: the columns' names with " | " between."""
    lines = [head.split(" | "), ["---"] * len(head.split(" | ")), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _notebooks(results: Path) -> str:
    """A row for each: title with a link to what was executed, badge, minutes, status."""
    rows = []
    for path in find():
        copy, source, quick = results / "notebooks" / path.name, read(path), expected(path, "quick")
        place, status = f"notebooks/{path.name}", "not executed yet"
        if copy.exists():
            facts, place = read(copy)["metadata"]["fedal"], f"results/notebooks/{path.name}"
            config = checked(path, facts["parameters"])[1]
            data, code = Path(config.data.dataset).name, facts.get("code")
            status = f"{config.profile}, {data}" + " (first edition)" * (not code)
            status += " (older than its source)" * (code not in (None, code_digest(source)))
            if config.profile == "quick":
                files = results.glob(f"records/{path.stem}-{data}-quick.csv.gz")
                took = max([facts["minutes"], *(_runs(file)["minutes"].sum() for file in files)])
                quick = f"{took:.0f} min" if took >= 1 else "seconds"
        title = "".join(source["cells"][0]["source"]).partition("\n")[0].lstrip("# ")
        rows.append([f"[{title}]({place}) {colab(path.stem)}".rstrip(), expected(path, "smoke"), quick, status])
    return _table("read | smoke | quick, all runs | executed with", rows)


def _runs(path: Path) -> pd.DataFrame:
    """A row for each run of a record: commit, minutes."""
    columns = ["digest", "method", "seed", "commit", "minutes"]
    return pd.read_csv(path, usecols=columns, dtype={"commit": str}).drop_duplicates(columns[:3])


def _records(results: Path) -> str:
    """From which commits each record is."""
    rows = []
    for path in sorted(results.glob("records/*.csv.gz")):
        if not path.name.endswith("-queries.csv.gz"):
            runs = _runs(path)
            commits = [f"`{name[:10]}{name[40:]}` ({n})" for name, n in runs["commit"].value_counts(sort=False).items()]
            name, took = path.name.removesuffix(".csv.gz"), runs["minutes"].sum()
            rows.append([f"`{name}`", str(len(runs)), f"{took:.0f}", ", ".join(commits)])
    return _table("record | runs | minutes of all runs | commit (runs)", rows)


def _verdicts(found: pd.DataFrame) -> dict[str, str]:
    """All verdicts, and a row for each paper."""

    def kinds(column: pd.Series) -> str:
        return ", ".join(dict.fromkeys(filter(None, column)))

    rows = []
    for paper, part in found.groupby("paper"):
        counts = [f"*{verdict}* ({n})" for verdict, n in part["verdict"].value_counts().items()]
        told = map(kinds, (part["data"], part["scale"], part["seeds"]))
        rows.append([f"[{paper}](results/README.md#verdicts)", ", ".join(counts), *told])
    facts = "*" + found["verdict"] + "*; " + found["scale"] + ", " + found["data"]
    for column, words in (("seeds", ", {} seeds"), ("smallest_detectable", "; could have shown {:.4}")):
        facts += [words.format(cell) if cell else "" for cell in found[column]]
    every = found.assign(verdict=facts)[["notebook", "paper", "item", "theirs", "ours", "verdict"]]
    papers = _table("paper | verdicts (how many) | data | scale | seeds", rows)
    return {"papers": papers, "verdicts": _table(" | ".join(every), every.to_numpy())}
