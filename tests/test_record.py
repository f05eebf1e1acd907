"""A run killed at any instant and started again leaves the same bytes; nothing damaged is ever written or read."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_loop
import torch
from tiny_loop import Config

from fedal_utils import config, papers
from fedal_utils.record import run as record

PACKAGE = Path(record.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL and fork are POSIX")


def results(root: Path) -> dict[str, bytes]:
    """The files that must not depend on how often a run was broken off."""
    return {str(p.relative_to(root)): p.read_bytes() for name in ("rounds", "asked") for p in root.rglob(f"{name}.csv")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unbroken")
    tiny_loop.loop(root)
    return root


@pytest.fixture(scope="module")
def server():
    """A process that has imported everything once and forks: a fresh process for a few hundredths of a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_loop"])
    with pytest.MonkeyPatch.context() as patch:  # the server reads its path from the environment only
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (PACKAGE, Path(tiny_loop.__file__).parent))))
        context.Process(target=math.sqrt, args=(2,)).start()
    return context


def first_run(root: Path, config: Config | None = None, **changes) -> tuple[record.Run, object]:
    config = config or dataclasses.replace(Config(), methods=("sum",), **changes)
    runs = record.runs(config, "tiny", root=root, progress=False)
    return next(runs), runs


def commit(run: record.Run, cycle: int = 0, round: int = 0, **values) -> None:
    run.commit(cycle, round, [{"client": "server", "images": 1, **values}], [], {"w": torch.ones(2)})


# --- killed and resumed -----------------------------------------------------------------------------------------------


def test_killed_at_every_instant_then_resumed_gives_the_same_bytes(unbroken, tmp_path, server):
    """Every 9th instant: a write has five, and 9 is prime to 5, so each kind of instant is met at many files."""
    expected = results(unbroken)
    assert len(expected) == 4
    instants = 0
    for instant in range(0, 10_000, 9):
        root = tmp_path / str(instant)
        root.mkdir()
        doomed = server.Process(target=tiny_loop.killed_at, args=(root, instant))
        doomed.start()
        doomed.join()
        if (root / "all instants passed").exists():
            assert doomed.exitcode == 0
            break
        assert doomed.exitcode == -signal.SIGKILL
        instants += 1
        tiny_loop.loop(root)
        assert results(root) == expected, f"killed at instant {instant}"
        assert not list(root.rglob("*.tmp"))
    assert instants >= 20  # of 5 per write


def test_killed_again_and_again_makes_progress_and_gives_the_same_bytes(unbroken, tmp_path, server):
    for instant in (37, 45, 31, 52, 40, 33):
        doomed = server.Process(target=tiny_loop.killed_at, args=(tmp_path, instant))
        doomed.start()
        doomed.join()
    tiny_loop.loop(tmp_path)
    assert results(tmp_path) == results(unbroken)
    env = json.loads(next(tmp_path.rglob("env.json")).read_text())
    assert env["starts"] > 1


def test_killed_by_the_clock_in_a_process_of_its_own(unbroken, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, tiny_loop.__file__, str(tmp_path), "0.2"]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("state.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert not list(tmp_path.rglob("done.json"))
    tiny_loop.loop(tmp_path)
    assert results(tmp_path) == results(unbroken)


def test_resumes_from_the_last_commit_only(tmp_path):
    run, runs = first_run(tmp_path)
    run.commit(0, 0, [], [{"client": 3, "id": "007", "score": math.nan}], {"w": torch.ones(2)})
    runs.close()
    run, runs = first_run(tmp_path)
    assert run.committed == 1 and torch.equal(run.resumed["w"], torch.ones(2))
    (row,) = run.asked_rows()
    assert row["client"] == "3" and row["id"] == "007" and row["cycle"] == 0 and math.isnan(row["score"])
    assert next(run.rounds()) == (0, 1)


def test_finished_runs_are_skipped_and_new_methods_and_seeds_join(tmp_path):
    tiny_loop.loop(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert list(record.runs(Config(), "tiny", root=tmp_path)) == []
    assert before == {p: p.stat().st_mtime_ns for p in before}
    more = list(record.runs(Config(), "tiny", ["sum", "max"], [0, 1], root=tmp_path, progress=False))
    assert [(r.method, r.seed) for r in more] == [("max", 0), ("sum", 1), ("max", 1)]


def test_killed_between_the_last_commit_and_its_note_counts_as_finished(tmp_path):
    tiny_loop.loop(tmp_path)
    notes = list(tmp_path.rglob("done.json"))
    for note in notes:
        note.unlink()
    assert list(record.runs(Config(), "tiny", root=tmp_path, progress=False)) == []
    assert all(note.exists() for note in notes) and len(notes) == 2


# --- who may write ----------------------------------------------------------------------------------------------------


def test_two_processes_cannot_share_a_folder_and_a_dead_owner_does_not_block(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "LOCK_WAIT", 0.0)
    hold = "import sys, time; from pathlib import Path; from fedal_utils import record\n"
    hold += "lock = record._Lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    config = dataclasses.replace(Config(), methods=("sum",))
    path = record.Run(config, "tiny", "sum", 0, tmp_path).folder / ".lock"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    owner = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE, env=environment)
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(RuntimeError, match=f"in use by process {owner.pid}"):
        first_run(tmp_path)
    owner.kill()
    owner.wait()
    run, runs = first_run(tmp_path)
    commit(run)
    runs.close()


def test_the_same_process_takes_its_own_run_over_and_the_old_loop_cannot_write(tmp_path):
    """A notebook's cell is interrupted and run again: the old generator still hangs in a traceback."""
    old, old_runs = first_run(tmp_path)
    commit(old)
    new, new_runs = first_run(tmp_path)
    with pytest.raises(RuntimeError, match="started again"):
        commit(old, 0, 1)
    commit(new, 0, 1)
    new_runs.close()
    old_runs.close()


def test_lock_without_fcntl_takes_over_from_a_dead_process_only(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "fcntl", None)
    monkeypatch.setattr(record, "LOCK_WAIT", 0.0)
    path = tmp_path / ".lock"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path.write_text(f"{gone.pid}\n")
    with record._Lock(path):
        assert path.read_text() == f"{os.getpid()}\n"
    path.write_text(f"{os.getppid()}\n")
    with pytest.raises(RuntimeError, match=str(os.getppid())):
        record._Lock(path)


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    lock = record._Lock(tmp_path / ".lock")
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    lock.release()
    time.sleep(0.2)
    try:
        record._Lock(tmp_path / ".lock", wait=0).release()
    finally:
        child.kill()
        child.join()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"loss": math.nan},
        {"loss": math.inf},
        {"loss_box": np.float32("nan")},
        {"ap50": -math.inf},
        {"images": math.nan},
    ],
)
def test_a_non_finite_loss_is_refused_by_name_and_nothing_is_written(tmp_path, values):
    run, runs = first_run(tmp_path)
    commit(run, 0, 0)
    before = {p: p.read_bytes() for p in run.folder.iterdir()}
    with pytest.raises(ValueError, match=rf"tiny sum seed 0, cycle 0, round 1, client 7: {next(iter(values))} is"):
        run.commit(0, 1, [{"client": 7, **values}])
    with pytest.raises(ValueError, match="id 'b': score is inf"):
        run.commit(0, 1, [], [{"client": 7, "id": "b", "score": math.inf}])
    assert before == {p: p.read_bytes() for p in run.folder.iterdir()}
    commit(run, 0, 1)
    runs.close()
    assert len(record.table(run.config, "tiny", tmp_path)) == 2


@pytest.mark.parametrize(
    "value, message",
    [
        (np.zeros(3), r"state\['a'\]\[1\] is of ndarray.*torch.from_numpy"),
        (print, "builtin_function_or_method"),
        ({(1, 2): 3}, "a key is a string or an integer"),
    ],
)
def test_a_state_that_could_not_be_read_back_is_refused(tmp_path, value, message):
    run, runs = first_run(tmp_path)
    with pytest.raises(ValueError, match=message):
        run.commit(0, 0, [], [], {"a": [0, value]})
    assert not (run.folder / "rounds.csv").exists()


def test_a_round_out_of_turn_or_forgotten_is_an_error(tmp_path):
    run, runs = first_run(tmp_path)
    with pytest.raises(ValueError, match=r"due is \(0, 0\)"):
        commit(run, 0, 1)
    with pytest.raises(RuntimeError, match="cycle 0, round 0 .* was not committed"):
        for _ in run.rounds():
            pass
    with pytest.raises(ValueError, match="round is 5"):
        run.commit(0, 0, [{"client": "server", "round": 5}])
    with pytest.raises(RuntimeError, match="not open"):
        commit(record.Run(Config(), "tiny", "sum", 0, tmp_path))


def test_a_folder_of_another_setting_is_an_error_that_names_the_difference(tmp_path):
    run, runs = first_run(tmp_path)
    runs.close()
    path = run.folder / "config.json"
    stored = json.loads(path.read_text())
    stored["config"]["lr"] = 0.2
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"config.json belongs to another setting \(lr: 0.2 there, 0.1 here\)"):
        first_run(tmp_path)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def damage_short(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def damage_edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"server,1", b"server,2"))


def damage_ragged(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"1,2\n")


def damage_binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("damage", [damage_cut, damage_short, damage_edit, damage_ragged, damage_binary, Path.unlink])
def test_a_damaged_csv_is_an_error_that_names_it(tmp_path, damage, done):
    run, runs = first_run(tmp_path, cycles=1)
    commit(run, 0, 0)
    if done:
        commit(run, 0, 1)
    runs.close()
    damage(run.folder / "rounds.csv")
    with pytest.raises(ValueError, match="rounds.csv"):
        first_run(tmp_path, cycles=1)


def test_a_damaged_state_is_an_error_that_names_it(tmp_path):
    run, runs = first_run(tmp_path)
    commit(run)
    runs.close()
    (run.folder / "state.pt").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="state.pt cannot be read"):
        first_run(tmp_path)


@pytest.mark.parametrize("wrong", [{"methods": "sum"}, {"methods": ["a", "a"]}, {"seeds": []}, {"methods": ["../up"]}])
def test_wrong_lists_of_methods_and_seeds_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError):
        next(record.runs(Config(), "tiny", root=tmp_path, **wrong))
    for seed in (-1, True, 0.5):
        with pytest.raises(ValueError, match="seed"):
            record.Run(Config(), "tiny", "sum", seed, tmp_path)


# --- what is read back ------------------------------------------------------------------------------------------------


def test_floats_and_texts_come_back_as_they_went_in(tmp_path):
    rng = np.random.default_rng(0)
    values = [
        0.1,
        1 / 3,
        5e-324,
        1.7976931348623157e308,
        -0.0,
        *rng.normal(size=200) * 10.0 ** rng.integers(-300, 300, 200),
    ]
    run, runs = first_run(tmp_path, cycles=1, rounds=1)
    rows = [{"client": k, "loss": v, "steps": 2**60 + k, "ap50": np.float32(0.1)} for k, v in enumerate(values)]
    ids = ["NA", "nan", "007", 'a "quoted", id', "two\nlines", "größe"]
    asked = [{"client": "NA", "id": name, "score": torch.tensor(0.5)} for name in ids]
    run.commit(0, 0, rows, asked, {})
    runs.close()
    table = record.table(run.config, "tiny", tmp_path)
    assert table["loss"].tolist() == values and [math.copysign(1, v) for v in table["loss"]][4] == -1
    assert table["steps"].tolist() == [2**60 + k for k in range(len(values))]
    assert table["ap50"].iloc[0] == float(np.float32(0.1))
    assert table["images"].isna().all() and table["client"].tolist() == [str(k) for k in range(len(values))]
    back = record.asked(run.config, "tiny", tmp_path)
    assert back["id"].tolist() == ids and set(back["client"]) == {"NA"} and set(back["score"]) == {0.5}
    assert back.columns[:2].tolist() == ["method", "seed"]


def test_table_gathers_all_methods_and_seeds_in_order(unbroken, tmp_path):
    table = record.table(Config(), "tiny", unbroken)
    assert table["method"].drop_duplicates().tolist() == ["sum", "random"]  # the config's order
    assert len(table) == 2 * 4 * 3 and set(table["client"]) == {"0", "1", "server"}
    assert table["ap50"].notna().sum() == 2 * 2 and table["ap50/empty class"].isna().all()
    assert set(record.table(Config(), "tiny", unbroken, methods=["random"])["method"]) == {"random"}
    assert len(record.times(Config(), "tiny", unbroken)) == 8
    empty = record.table(Config(), "tiny", tmp_path)
    assert len(empty) == 0 and {"method", "seed", "client", "images"} <= set(empty.columns)


def test_env_tells_versions_and_machine_but_not_whose(unbroken):
    path = next(unbroken.rglob("env.json"))
    env = json.loads(path.read_text())
    assert env["torch"] == torch.__version__.split("+")[0] or env["torch"] == torch.__version__
    assert env["machine"]["cores"] >= 1 and env["minutes"] >= 0 and env["starts"] == 1
    assert str(Path.home()) not in path.read_text() and os.uname().nodename not in path.read_text().split('"')


def test_state_loads_with_weights_only_and_a_view_does_not_drag_its_storage_along(tmp_path):
    run, runs = first_run(tmp_path)
    run.commit(0, 0, [], [], {"row": torch.zeros(1000, 1000)[3], "big": 2**100, "nested": [{"a": (1, None, True)}]})
    path = run.folder / "state.pt"
    state = torch.load(path, weights_only=True)["state"]
    assert path.stat().st_size < 20_000
    assert state["big"] == 2**100 and state["nested"] == [{"a": (1, None, True)}] and state["row"].shape == (1000,)
    runs.close()
    assert record.state(run.config, "tiny", "sum", 0, tmp_path)["big"] == 2**100
    assert record.state(run.config, "tiny", "sum", 1, tmp_path) is None


def test_shared_is_made_once_and_read_from_then_on(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"w": torch.arange(3.0, requires_grad=True)}

    first = record.shared(Config(), "tiny", 0, "start", make, tmp_path)
    again = record.shared(dataclasses.replace(Config(), methods=("max",)), "tiny", 0, "start", make, tmp_path)
    assert torch.equal(first["w"], again["w"]) and not first["w"].requires_grad and len(calls) == 1
    record.shared(Config(), "tiny", 1, "start", make, tmp_path)
    record.shared(dataclasses.replace(Config(), lr=0.2), "tiny", 0, "start", make, tmp_path)
    assert len(calls) == 3
    with pytest.raises(ZeroDivisionError):
        record.shared(Config(), "tiny", 0, "other", lambda: 1 / 0, tmp_path)
    assert record.shared(Config(), "tiny", 0, "other", lambda: 5, tmp_path) == 5


def test_generators_do_not_depend_on_the_method(tmp_path):
    a, b = (record.Run(Config(), "tiny", method, 3, tmp_path) for method in ("sum", "random"))
    assert a.rng("client", 1).normal() == b.rng("client", 1).normal() != a.rng("client", 2).normal()
    assert torch.equal(torch.rand(3, generator=a.torch_rng("x")), torch.rand(3, generator=b.torch_rng("x")))


def test_an_exception_while_writing_leaves_the_old_file(tmp_path):
    path = record.write_atomic(tmp_path / "a.csv", "old\n")

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        record.write_atomic(path, fail)
    assert path.read_text() == "old\n" and [p.name for p in tmp_path.iterdir()] == ["a.csv"]


# --- progress ---------------------------------------------------------------------------------------------------------


def test_one_line_per_round_when_nobody_looks_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEDAL_PROGRESS", "lines")
    config = dataclasses.replace(Config(), methods=("sum",))
    for run in record.runs(config, "tiny", root=tmp_path):
        for cycle, round in run.rounds():
            commit(run, cycle, round, ap50=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[3].startswith("tiny sum seed 0  cycle 2 round 2, 4 of 4  images 1  ap50 0.25")


def test_one_bar_per_run_when_a_terminal_looks_on(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FEDAL_PROGRESS", "bar")
    config = dataclasses.replace(Config(), methods=("sum",))
    for run in record.runs(config, "tiny", root=tmp_path):
        for cycle, round in run.rounds():
            commit(run, cycle, round, ap50=0.25)
    out, err = capfd.readouterr()
    assert out == "" and "sum seed 0: 100%" in err and "4/4" in err and "ap50=0.25" in err


# --- beside the paper -------------------------------------------------------------------------------------------------


def paper_csv(path: Path, *rows: str) -> Path:
    path.write_text("item,setting,x,metric,value,unit,source,tolerance\n" + "".join(row + "\n" for row in rows))
    return path


def our_table(**curves: list[list[float]]) -> pd.DataFrame:
    """curves: method -> per seed the ap50 at 10, 20, ... images."""
    rows = [
        {"method": m, "seed": s, "cycle": c, "round": 0, "client": client, "images": 10 * (c + 1), "ap50": v}
        for m, seeds in curves.items()
        for s, values in enumerate(seeds)
        for c, v in enumerate(values)
        for client in ("0", "server")
    ]
    return pd.DataFrame(rows)


def test_verdicts_by_rule(tmp_path):
    csv = paper_csv(
        tmp_path / "p.csv",
        "fig. 1,sum,20,ap50,0.50,,p. 3,0.02",  # ours 0.51: within the tolerance
        "fig. 2,sum,,ap50,0.515,,p. 3,",  # no tolerance; inside our two seeds' interval 0.50..0.52
        "fig. 3,sum,20,ap50,0.80,,p. 3,0.01",  # levels differ ...
        "fig. 3,random,20,ap50,0.70,,p. 3,0.01",  # ... and the order holds
        "fig. 4,sum,20,ap50,0.60,,p. 3,0.01",
        "fig. 4,random,20,ap50,0.70,,p. 3,0.01",  # the order is turned round
        "fig. 5,sum,20,ap50,0.90,,p. 3,0.01",  # alone: no order to hold
        "fig. 6,sum,20,ap50,,,p. 3,",
        "fig. 7,max,20,ap50,0.5,,p. 3,0.1",  # not run
        "fig. 8,sum,15,ap50,0.5,,p. 3,0.1",  # no point of ours there
        "fig. 9,2-2-SUM,10,ap50,30,percent,p. 3,0.1",
    )
    table = our_table(sum=[[0.3, 0.50], [0.3, 0.52]], random=[[0.2, 0.4], [0.2, 0.42]])
    frame = record.compare_paper(table, csv, "quick", settings={"2-2-SUM": "sum"})
    assert dict(zip(frame["item"] + " " + frame["setting"], frame["verdict"], strict=True)) == {
        "fig. 1 sum": "matches",
        "fig. 2 sum": "matches",
        "fig. 3 sum": "same order",
        "fig. 3 random": "same order",
        "fig. 4 sum": "differs",
        "fig. 4 random": "differs",
        "fig. 5 sum": "differs",
        "fig. 6 sum": "no published number",
        "fig. 7 max": "not run",
        "fig. 8 sum": "not run",
        "fig. 9 2-2-SUM": "matches",
    }
    assert frame["ours"].iloc[0] == pytest.approx(0.51) and frame["ours"].iloc[-1] == pytest.approx(30)
    assert frame["seeds"].tolist()[:2] == [2, 2] and frame["smoke"].isna().all()
    only = record.compare_paper(table, csv, "quick", items=["fig. 8"], last=True)
    assert only["ours"].tolist() == [pytest.approx(0.51)]
    with pytest.raises(ValueError, match="no item"):
        record.compare_paper(table, csv, "quick", items=["fig. 88"])


def test_smoke_never_enters_a_comparison(tmp_path):
    csv = paper_csv(tmp_path / "p.csv", "fig. 1,sum,20,ap50,0.50,,p. 3,0.02")
    frame = record.compare_paper(our_table(sum=[[0.3, 0.5]]), csv, "smoke")
    assert frame["verdict"].tolist() == ["not run"] and frame["ours"].isna().all() and frame["smoke"].tolist() == [0.5]
    empty = record.compare_paper(record.table(Config(), "tiny", tmp_path), csv, "quick")
    assert empty["verdict"].tolist() == ["not run"]


def test_a_wrong_paper_file_is_an_error(tmp_path):
    (tmp_path / "p.csv").write_text("item,value\nfig. 1,2\n")
    with pytest.raises(ValueError, match=r"p.csv: columns must be item, setting"):
        record.read_paper(tmp_path / "p.csv")
    with pytest.raises(ValueError, match="value must be a number"):
        record.read_paper(paper_csv(tmp_path / "q.csv", "fig. 1,sum,20,ap50,high,,p. 3,"))


def test_the_committed_paper_files_can_be_read(root):
    for path in (root / "results" / "paper").glob("*.csv"):
        assert len(record.read_paper(path)) > 0


def test_tables_and_figures_are_published_under_results(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setenv("FEDAL_HOME", str(tmp_path))
    frame = pd.DataFrame({"a": [0.1, 1 / 3], "b": ["x", None]})
    path = record.publish_table(frame, "11_fedavg")
    assert path == tmp_path / "results" / "tables" / "11_fedavg.csv"
    assert path.read_text() == "a,b\n0.1,x\n0.3333333333333333,\n"
    figure, ax = plt.subplots()
    ax.plot([1, 2])
    first = record.publish_figure(figure, "11_fedavg").read_bytes()
    assert first[:4] == b"\x89PNG" and record.publish_figure(figure, tmp_path / "b.png").read_bytes() == first
    plt.close(figure)


def test_home_is_the_checkout_from_its_notebooks_too(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDAL_HOME", raising=False)
    (tmp_path / "house" / "notebooks").mkdir(parents=True)
    (tmp_path / "house" / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "house" / "notebooks")
    assert record.home() == tmp_path / "house"
    monkeypatch.chdir(tmp_path)
    assert record.home() == tmp_path


# --- settings that came later -----------------------------------------------------------------------------------------


def real_run(root: Path, **changes) -> record.Run:
    settings = papers.load("00_start_here", methods=("sum",), seeds=(0,), **changes)
    return next(record.runs(settings, "later", root=root, progress=False))


def test_a_run_written_before_a_setting_existed_is_accepted_and_another_setting_is_not(tmp_path):
    run = real_run(tmp_path)
    path = run.folder / "config.json"
    run._close()
    whole = json.loads(path.read_text())
    old = {k: v for k, v in whole["config"].items() if k not in config._LATER}
    assert len(old) < len(whole["config"])
    path.write_text(json.dumps({**whole, "config": old}))
    real_run(tmp_path)._close()
    assert json.loads(path.read_text())["config"] == old, "what was published stays as it is"
    path.write_text(json.dumps({**whole, "config": {**old, "lr": 0.5}}))
    with pytest.raises(ValueError, match=r"belongs to another setting \(lr: 0.5 there, 0.002 here\)"):
        real_run(tmp_path)
    path.write_text(json.dumps({**whole, "config": {**old, "dropout_rate": 0.5}}))
    with pytest.raises(ValueError, match=r"belongs to another setting \(lost: 0.5 there, 0.0 here\)"):
        real_run(tmp_path)
    # a file of another digest does not get the benefit of the doubt
    path.write_text(json.dumps({**whole, "digest": "0" * 64, "config": old}))
    with pytest.raises(ValueError, match="belongs to another setting"):
        real_run(tmp_path)


def test_a_later_setting_at_another_value_is_another_folder(tmp_path):
    folders = {
        real_run(tmp_path, **c).folder
        for c in ({}, {"dropout_rate": 0.1}, {"extra_rounds": 1}, {"optimizer_state": "client"})
    }
    assert len(folders) == 4


def test_the_plan_of_every_round_has_the_tail_after_the_last_cycle(tmp_path):
    settings = config.Config(cycles=2, rounds=2, extra_rounds=3)
    assert record.every_round(settings) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert record.every_round(settings.replace(extra_rounds=0)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    run = record.Run(settings, "x", "a", 0, tmp_path, plan=lambda config, method: [(0, 0), (0, 5)])
    assert run.plan == [(0, 0), (0, 5)] and not run.finished


def test_missing_runs_are_those_without_rows_and_those_broken_off(tmp_path):
    config = dataclasses.replace(Config(), methods=("sum", "random"))
    assert record.missing(config, "tiny", ("sum", "random"), (0, 1), tmp_path) == [
        ("sum", 0),
        ("sum", 1),
        ("random", 0),
        ("random", 1),
    ]
    tiny_loop.loop(tmp_path, config)
    assert record.missing(config, "tiny", ("sum", "random"), (0,), tmp_path) == []
    folder = record.Run(config, "tiny", "sum", 0, tmp_path).folder
    (folder / "done.json").unlink()  # killed just before its closing note
    assert record.missing(config, "tiny", ("sum", "random"), (0,), tmp_path) == [("sum", 0)]
    (folder / "state.pt").unlink()  # as published: rows, and nothing to resume from
    assert record.missing(config, "tiny", ("sum", "random"), (0,), tmp_path) == []
