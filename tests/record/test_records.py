"""A published table comes out of its record, without a run folder; a record that was changed is refused."""

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


def publish() -> Path:
    (path,) = record.publish("tiny", lambda profile, data: CONFIG.replace(profile=profile, dataset=data))
    return path


def summary(config) -> bytes:
    """As a notebook makes its table."""
    return record.save(metrics.summary(record.table(config, "tiny")), "tiny.csv").read_bytes()


def test_a_published_table_comes_out_of_its_record_without_training(home):
    before = [f(c, "tiny") for f in (record.table, record.queries) for c in (CONFIG, ARM)]
    table, path = summary(CONFIG), publish()
    assert path == home / "results" / "records" / "tiny-bccd-quick.csv.gz"
    shutil.rmtree(home / "results" / "runs")
    after = [f(c, "tiny") for f in (record.table, record.queries) for c in (CONFIG, ARM)]
    for one, other in zip(before, after, strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert summary(CONFIG) == table
    assert record.missing(CONFIG, "tiny", ("sum", "max"), (0,)) == [("max", 0)]
    assert record.table(CONFIG, "tiny", methods=["sum"], seeds=[2])["seed"].unique().tolist() == [2]
    assert record.table(CONFIG.replace(lr=0.9), "tiny").empty and not (home / "results" / "runs").exists()
    assert record.table(CONFIG.replace(dataset="/here/my photos (2)"), "tiny").empty  # a folder of the user's own


def test_a_record_is_one_tidy_table_with_the_same_bytes_each_time(home):
    path = publish()
    queries = path.with_name("tiny-bccd-quick-queries.csv.gz")
    before = path.read_bytes(), queries.read_bytes()
    publish()
    assert (path.read_bytes(), queries.read_bytes()) == before and record.publish("another", None) == []
    rows = record.read_record(path)
    assert list(rows.columns[:9]) == "digest setting fingerprint commit machine minutes check method seed".split()
    assert rows["setting"].iloc[0] == "{}" and json.loads(rows["setting"].iloc[-1]) == {"lr": 0.3}
    assert len(rows) == 9 * 4 * 3 and set(rows["digest"]) == {CONFIG.digest()[:8], ARM.digest()[:8]}
    assert rows["machine"].str.contains("cores").all() and (rows["minutes"] >= 0).all()
    assert rows.loc[rows["client"] != "server", "wall_seconds"].isna().all()
    assert (pd.read_csv(queries)["digest"].value_counts() > 0).all()


def test_runs_published_again_are_replaced_others_stay_and_a_broken_run_hides_nothing(home):
    publish()
    whole, runs = record.table(CONFIG, "tiny"), home / "results" / "runs"
    shutil.rmtree(runs)
    tiny_loop.loop(runs, ARM)
    assert len(record.read_record(publish())) == 9 * 4 * 3
    with pytest.raises(ZeroDivisionError):
        tiny_loop.loop(runs, CONFIG, stop_after=2)
    pd.testing.assert_frame_equal(record.table(CONFIG, "tiny"), whole)


DAMAGES = {
    "edit": lambda content: gzip.compress(gzip.decompress(content).replace(b",1,", b",2,", 1)),
    "cut": lambda content: gzip.compress(gzip.decompress(content)[:-1].rpartition(b"\n")[0] + b"\n"),
    "bit": lambda content: content[:500] + bytes([content[500] ^ 4]) + content[501:],
    "short": lambda content: content[:-20],
}


@pytest.mark.parametrize("which", ["", "-queries"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_was_changed_or_cut_is_refused_by_every_reader(home, damage, which):
    path = publish()
    file = path.with_name(f"tiny-bccd-quick{which}.csv.gz")
    shutil.rmtree(home / "results" / "runs")
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    for read, *given in ((record.table, CONFIG, "tiny"), (record.read_record, path), (record.merge, path.parent)):
        with pytest.raises(ValueError, match="tiny-bccd-quick.csv.gz"):
            read(*given)


def test_records_of_another_machine_are_merged_and_other_data_refused(home, tmp_path, monkeypatch):
    publish()
    theirs = shutil.copytree(home / "results" / "records", tmp_path / "archive")
    for folder in (home / "results" / "records", home / "results" / "runs" / "tiny" / ARM.digest()[:8]):
        shutil.rmtree(folder)
    ours = publish().read_bytes()
    (path,) = record.merge(theirs)
    assert len(record.read_record(path)) == 9 * 4 * 3 and path.read_bytes() != ours
    monkeypatch.setenv("FEDAL_HOME", str(tmp_path / "elsewhere"))
    for run in record.runs(ARM, "tiny", fingerprint="other data"):
        for cycle, number in run.rounds():
            run.commit(cycle, number, [{"client": "server", "images": 1}])
    publish()
    with pytest.raises(ValueError, match="ran on other data"):
        record.merge(theirs)


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
