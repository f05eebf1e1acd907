"""A published table comes out of its record, without a run folder; a record that was changed is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import tiny_loop

from fedal_utils import metrics, record

CONFIG = tiny_loop.CONFIG.replace(dataset="bccd", seeds=(0, 1, 2))
ARM = CONFIG.replace(lr=0.3, methods=("random",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with results/runs of two settings."""
    home = tmp_path_factory.mktemp("trained")
    for config in (CONFIG, ARM):
        tiny_loop.loop(home / "results" / "runs", config)
    return home


@pytest.fixture
def home(trained, tmp_path, monkeypatch) -> Path:
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.setenv("FEDAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def published(config) -> pd.DataFrame:
    """As a notebook makes its table."""
    return metrics.summary(record.table(config, "tiny"))


def test_a_published_table_comes_out_of_its_record_without_training(home):
    before = [f(c, "tiny") for f in (record.table, record.queries, record.times) for c in (CONFIG, ARM)]
    table = record.publish_table(published(CONFIG), "tiny").read_bytes()
    path = record.publish([CONFIG, ARM], "tiny")
    assert path == home / "results" / "records" / "tiny-bccd-quick.csv.gz"
    shutil.rmtree(home / "results" / "runs")
    after = [f(c, "tiny") for f in (record.table, record.queries, record.times) for c in (CONFIG, ARM)]
    for one, other in zip(before, after, strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert record.publish_table(published(CONFIG), "tiny").read_bytes() == table
    assert record.missing(CONFIG, "tiny", ("sum", "max"), (0,)) == [("max", 0)]
    assert record.table(CONFIG, "tiny", methods=["sum"], seeds=[2])["seed"].unique().tolist() == [2]
    assert record.table(CONFIG.replace(lr=0.9), "tiny").empty and not (home / "results" / "runs").exists()


def test_a_record_is_one_tidy_table_with_the_same_bytes_each_time(home):
    path = record.publish([CONFIG, ARM], "tiny")
    queries = path.with_name("tiny-bccd-quick-queries.csv.gz")
    bytes_before = path.read_bytes(), queries.read_bytes()
    for one in ([ARM, CONFIG], [CONFIG, ARM]):  # whoever was published last is the base
        record.publish(one, "tiny")
    assert (path.read_bytes(), queries.read_bytes()) == bytes_before
    rows = record.read_record(path)
    assert list(rows.columns[:9]) == "digest setting fingerprint commit machine minutes check method seed".split()
    assert rows["setting"].iloc[0] == "{}" and json.loads(rows["setting"].iloc[-1]) == {"lr": 0.3}
    assert len(rows) == 9 * 4 * 3 and set(rows["digest"]) == {CONFIG.digest()[:8], ARM.digest()[:8]}
    assert rows["machine"].str.contains("cores").all() and (rows["minutes"] >= 0).all()
    assert rows.loc[rows["client"] != "server", "wall_seconds"].isna().all()
    assert (pd.read_csv(queries)["digest"].value_counts() > 0).all()


def test_all_finished_runs_of_a_notebook_are_collected(home):
    (path,) = record.collect("tiny", lambda profile, data: CONFIG.replace(profile=profile, dataset=data))
    kept = path.read_bytes()
    path.unlink()
    path.with_name("tiny-bccd-quick-queries.csv.gz").unlink()
    assert record.publish([CONFIG, ARM], "tiny").read_bytes() == kept
    assert record.collect("another") == []
    assert record.table(CONFIG.replace(dataset="/here/my photos (2)"), "tiny").empty  # a folder of the user's own


def test_runs_that_are_published_again_are_replaced_and_others_stay(home):
    record.publish(CONFIG, "tiny")
    shutil.rmtree(home / "results" / "runs")
    tiny_loop.loop(home / "results" / "runs", ARM)
    path = record.publish([CONFIG, ARM], "tiny")
    rows = record.read_record(path)
    assert len(rows) == 9 * 4 * 3
    with pytest.raises(ValueError, match="nothing to publish"):
        record.publish(CONFIG.replace(lr=0.9), "tiny")
    with pytest.raises(ValueError, match="make several records"):
        record.publish([CONFIG, CONFIG.replace(dataset="digits")], "tiny")


def test_a_broken_run_here_does_not_hide_the_published_one(home):
    record.publish(CONFIG, "tiny")
    whole = record.table(CONFIG, "tiny")
    shutil.rmtree(home / "results" / "runs")
    with pytest.raises(ZeroDivisionError):
        tiny_loop.loop(home / "results" / "runs", CONFIG, stop_after=2)
    pd.testing.assert_frame_equal(record.table(CONFIG, "tiny"), whole)


def edited(path: Path, old: bytes, new: bytes, count: int = 1) -> None:
    content = gzip.decompress(path.read_bytes())
    assert old in content
    path.write_bytes(gzip.compress(content.replace(old, new, count)))


@pytest.mark.parametrize("which", ["", "-queries"])
@pytest.mark.parametrize("damage", ["edit", "cut", "bit", "short", "missing"])
def test_a_record_that_was_changed_or_cut_is_refused_by_every_reader(home, damage, which):
    path = record.publish(CONFIG, "tiny")
    file = path.with_name(f"tiny-bccd-quick{which}.csv.gz")
    shutil.rmtree(home / "results" / "runs")
    if damage == "edit":
        edited(file, b",1,", b",2,")
    elif damage == "cut":
        lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
        file.write_bytes(gzip.compress(b"".join(lines[:-1])))
    elif damage == "bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-20])
    elif which:
        file.unlink()
    else:
        pytest.skip("no record is no record")
    for read in (
        lambda: record.table(CONFIG, "tiny"),
        lambda: record.read_record(path),
        lambda: record.merge(path.parent),
    ):
        with pytest.raises(ValueError, match="tiny-bccd-quick.csv.gz"):
            read()


def test_records_of_another_machine_are_merged_and_other_data_refused(home, tmp_path, monkeypatch):
    record.publish(ARM, "tiny")
    theirs = shutil.copytree(home / "results" / "records", tmp_path / "archive")
    shutil.rmtree(home / "results" / "records")
    ours = record.publish(CONFIG, "tiny").read_bytes()
    (path,) = record.merge(theirs)
    assert len(record.read_record(path)) == 9 * 4 * 3 and path.read_bytes() != ours
    edited_home = tmp_path / "elsewhere"
    monkeypatch.setenv("FEDAL_HOME", str(edited_home))
    for run in record.runs(ARM, "tiny", progress=False, fingerprint="other data"):
        for cycle, number in run.rounds():
            run.commit(cycle, number, [{"client": "server", "images": 1}])
    record.publish(ARM, "tiny")
    with pytest.raises(ValueError, match="ran on other data"):
        record.merge(theirs)


# --- what is committed ------------------------------------------------------------------------------------------------

RECORDS = Path(__file__).resolve().parents[2] / "results" / "records"
COMMITTED = sorted(path for path in RECORDS.glob("*.csv.gz") if "-queries" not in path.name)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name.removesuffix(".csv.gz"))
def test_the_committed_tables_come_out_of_the_committed_records(path, root):
    rows = record.read_record(path)  # with every check
    published = root / "results" / "tables" / f"{path.name.removesuffix('.gz')}"
    table = pd.read_csv(published) if published.exists() else pd.DataFrame()
    if "method" not in table or not {"last", "last_low"} <= set(table) or {"arm", "metric"} & set(table):
        return  # not a plain summary of the main setting
    rows = rows[(rows["setting"] == "{}") & rows["method"].isin(table["method"])]
    again = metrics.summary(rows, y="accuracy" if "accuracy" in rows else "ap50").set_index("method")
    for column in again.columns.intersection(table.columns):
        kept = table.set_index("method")[column]
        pd.testing.assert_series_equal(
            again[column].reindex(kept.index), kept, check_dtype=False, rtol=1e-9, atol=1e-12
        )
