"""`make gpu` in miniature: the benchmark, a pending run and one archive, which another checkout takes over."""

import importlib.util
import os
import subprocess
import sys
import tarfile

import pytest


def test_the_dry_run_leaves_an_archive_that_can_be_merged(root, tmp_path):
    archive, place = tmp_path / "gpu.tar.gz", {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, root / "tests" / "bench" / "gpu.py", "--dry", "--minutes", "5", "--out", archive]
    subprocess.run(command, env=place, timeout=300, cwd=tmp_path, check=True)
    with tarfile.open(archive) as content:
        names = content.getnames()
    record = "records/30_kafal-digit-images-smoke.csv.gz"
    assert record in names and "tables/bench.csv" in names and archive.stat().st_size < 15 << 20
    home = {**place, "FEDAL_HOME": str(tmp_path / "elsewhere")}
    subprocess.run([sys.executable, "-m", "fedal_utils", "merge", archive], env=home, timeout=120, check=True)
    assert (tmp_path / "elsewhere" / "results" / record).is_file()


def test_the_readmes_speed_table_is_that_of_the_last_benchmark_and_a_new_one_leaves_the_rest(root, tmp_path):
    spec = importlib.util.spec_from_file_location("bench", root / "tests" / "bench" / "bench.py")
    bench, page = importlib.util.module_from_spec(spec), tmp_path / "README.md"
    spec.loader.exec_module(bench)
    table = bench.speed_table(root / "results" / "tables" / "bench.csv")
    assert f"<!-- speed -->\n{table}\n<!-- /speed -->" in (root / "README.md").read_text()
    page.write_text("# a\n<!-- speed -->\n<!-- /speed -->\n\n## b\n")  # nothing was measured yet
    for table in ("| one |", "| two |\n| three |"):
        bench.into_readme(table, page)
        assert page.read_text() == f"# a\n<!-- speed -->\n{table}\n<!-- /speed -->\n\n## b\n"
    page.write_text("# a\n")
    with pytest.raises(ValueError, match="lacks the marks"):
        bench.into_readme("| one |", page)
    assert page.read_text() == "# a\n"
