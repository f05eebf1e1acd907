"""A run killed at any instant and started again leaves the same bytes; nothing damaged is ever written or read."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_loop
import torch

from fedal_utils import config, record
from fedal_utils.record import files

ROOT = Path(record.__file__).resolve().parents[2]
CONFIG = tiny_loop.CONFIG
KILL_EVERY = int(os.environ.get("FEDAL_KILL_EVERY", 17))  # `make torture`: 1


def results(root: Path) -> dict[str, bytes]:
    """The files that must not depend on how often a run was broken off."""
    found = [p for name in ("rounds", "queries") for p in root.rglob(f"{name}.csv") if "before-" not in str(p)]
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


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
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        context.Process(target=math.sqrt, args=(2,)).start()
    return context


def first_run(root: Path, fingerprint: str = "", **changes) -> record.Run:
    """Open as long as its loop, which nobody goes on with; opened once more, it is one that was broken off."""
    settings = CONFIG.replace(methods=("sum",), **changes)
    loop = record.runs(settings, "tiny", root=root, fingerprint=fingerprint)
    run = next(loop)
    run.loop = loop
    return run


def commit(run: record.Run, cycle: int = 0, number: int = 0, **values) -> None:
    run.commit(cycle, number, [{"client": "server", "images": 1, **values}], [], {"w": torch.ones(2)})


def finish(root: Path, rounds: int = 2, **named) -> record.Run:
    """One run of one cycle and two rounds, or the first of them."""
    run = first_run(root, cycles=1, **named)
    for number in range(rounds):
        commit(run, 0, number)
    return run


def refused(root: Path, reason: str) -> None:
    """The run of `finish` cannot be opened, and no table can be made of it."""
    for read in (record.table, record.queries, lambda *_: first_run(root, cycles=1)):
        with pytest.raises(ValueError, match=reason):
            read(CONFIG.replace(methods=("sum",), cycles=1), "tiny", root)


def flip_a_bit(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def test_killed_at_every_instant_then_resumed_gives_the_same_bytes(unbroken, tmp_path, server):
    """Every 17th instant: a write has five, and 17 is prime to 5, so each kind of instant is met at many files."""
    expected = results(unbroken)
    assert len(expected) == 4
    instants = 0
    for instant in range(0, 10_000, KILL_EVERY):
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
    assert instants >= 200 // KILL_EVERY


def test_resumes_from_the_last_commit_only(tmp_path):
    run = first_run(tmp_path)
    run.commit(0, 0, [], [{"client": 3, "id": "007", "score": math.nan}], {"w": torch.ones(2)})
    run = first_run(tmp_path)
    assert run.committed == 1 and torch.equal(run.resumed["w"], torch.ones(2)) and next(run.rounds()) == (0, 1)
    (row,) = run.query_rows()
    assert row["client"] == "3" and row["id"] == "007" and row["cycle"] == 0 and math.isnan(row["score"])


def test_finished_runs_are_skipped_without_a_lock_or_a_write_and_new_ones_join(tmp_path):
    tiny_loop.loop(tmp_path)
    for path in tmp_path.rglob(".lock"):
        path.unlink()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert list(record.runs(CONFIG, "tiny", root=tmp_path)) == []
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}  # so a disk that is read-only will do
    notes = list(tmp_path.rglob("done.json"))
    for note in notes:  # killed between the last commit and its note
        note.unlink()
    more = list(record.runs(CONFIG, "tiny", ["sum", "max"], [0, 1], root=tmp_path))
    assert [(r.method, r.seed) for r in more] == [("max", 0), ("sum", 1), ("max", 1)]
    assert [note.parents[1].name for note in notes if note.exists()] == ["sum"] and len(notes) == 2


@pytest.mark.parametrize("place", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize("both", [False, True])
def test_a_flipped_bit_is_noticed_and_the_run_goes_back_to_the_last_good_state(unbroken, tmp_path, place, both):
    with contextlib.suppress(ZeroDivisionError):  # broken off after three of four rounds
        tiny_loop.loop(tmp_path, CONFIG.replace(methods=("sum",)), stop_after=3)
    (folder,) = [p.parent for p in tmp_path.rglob("state.pt")]
    flip_a_bit(folder / "state.pt", place)
    if both:
        flip_a_bit(folder / "state-before.pt", place)
    with pytest.warns(UserWarning, match=f"state.pt is damaged.* going back to round {0 if both else 2} of 4"):
        tiny_loop.loop(tmp_path, CONFIG.replace(methods=("sum",)))
    expected = {name: content for name, content in results(unbroken).items() if "/sum/" in name}
    assert results(tmp_path) == expected
    assert len(list(folder.glob("before-damaged-*/state.pt"))) == both  # nothing is lost


def test_a_damaged_shared_state_is_made_anew(tmp_path):
    made = []

    def shared(**named):
        return record.shared(CONFIG, "tiny", 0, "start", lambda: made.append(1) or torch.ones(3), tmp_path, **named)

    assert torch.equal(shared(), torch.ones(3)) and torch.equal(shared(), torch.ones(3)) and len(made) == 1
    (path,) = tmp_path.rglob("start-seed0.pt")
    flip_a_bit(path, 0.5)
    with pytest.warns(UserWarning, match="start-seed0.pt is damaged"):
        shared()
    shared(fingerprint="other data")
    shared(fingerprint="other data")
    assert len(made) == 3


def test_two_processes_share_a_state_that_is_made_once(tmp_path, server):
    both = [server.Process(target=tiny_loop.share, args=(tmp_path, number)) for number in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert len({path.read_text() for path in tmp_path.glob("got by *")}) == 1
    assert len(list(tmp_path.glob("got by *"))) == 2 and len(list(tmp_path.glob("made by *"))) == 1


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_of_other_data_starts_anew_and_is_kept_aside(tmp_path, rounds, capsys):
    finish(tmp_path, rounds, fingerprint="aaaa")  # broken off, or finished
    with contextlib.suppress(StopIteration):
        first_run(tmp_path, "aaaa", cycles=1)  # the same data
    assert "starts anew" not in capsys.readouterr().out
    run = first_run(tmp_path, "bbbb", cycles=1)
    assert "images or labels are others than before, so it starts anew" in capsys.readouterr().out
    assert run.committed == 0 and run.resumed is None
    assert json.loads((run.folder / "config.json").read_text())["fingerprint"] == "bbbb"
    assert len(list(run.folder.glob("before-other-data-*/rounds.csv"))) == 1
    assert record.table(run.config, "tiny", tmp_path).empty


def test_rows_of_different_data_never_stand_in_one_table(tmp_path):
    settings = finish(tmp_path, fingerprint="aaaa").config
    for run in record.runs(settings, "tiny", ["max"], root=tmp_path, fingerprint="bbbb"):
        for place in run.rounds():
            commit(run, *place)
    with pytest.raises(ValueError, match=r"belong to different data \(\['aaaa', 'bbbb'\]\)"):
        record.table(settings, "tiny", tmp_path)
    assert set(record.table(settings, "tiny", tmp_path, fingerprint="aaaa")["method"]) == {"sum"}


def test_two_processes_cannot_share_a_folder_and_a_dead_owner_does_not_block(tmp_path, monkeypatch, server):
    monkeypatch.setattr("fedal_utils.record.run.LOCK_WAIT", 0.0)
    path = record.Run(CONFIG, "tiny", "sum", 0, tmp_path).folder / ".lock"
    owner = server.Process(target=tiny_loop.hold, args=(path,))
    owner.start()
    while owner.is_alive() and not path.with_name("held").exists():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="is in use by another process"):
        first_run(tmp_path)
    owner.kill()
    owner.join()
    run = first_run(tmp_path)
    commit(run)


def test_the_same_process_takes_its_own_run_over_and_the_old_loop_cannot_write(tmp_path):
    """A notebook's cell is interrupted and run again: the old generator still hangs in a traceback."""
    old = first_run(tmp_path)
    commit(old)
    new = first_run(tmp_path)
    with pytest.raises(RuntimeError, match="started again"):
        commit(old, 0, 1)
    old.loop.close()
    commit(new, 0, 1)
    new.loop.close()
    with pytest.raises(RuntimeError, match="not open"):
        commit(record.Run(CONFIG, "tiny", "sum", 0, tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss", math.nan), ("loss_box", np.float32("nan")), ("ap50", -math.inf), ("images", math.nan), ("ap50", [1])],
)
def test_a_value_that_no_cell_can_hold_is_refused_by_name_and_nothing_is_written(tmp_path, name, value):
    run = first_run(tmp_path)
    commit(run, 0, 0)
    before = {p: p.read_bytes() for p in run.folder.iterdir()}
    with pytest.raises(ValueError, match=rf"tiny sum seed 0, cycle 0, round 1, client 7: {name} "):
        run.commit(0, 1, [{"client": 7, name: value}])
    with pytest.raises(ValueError, match="id 'b': score is inf"):
        run.commit(0, 1, [], [{"client": 7, "id": "b", "score": math.inf}])
    assert before == {p: p.read_bytes() for p in run.folder.iterdir()}
    commit(run, 0, 1)
    assert len(record.table(run.config, "tiny", tmp_path)) == 2


def test_what_cannot_be_committed_is_an_error(tmp_path):
    run = first_run(tmp_path)
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\] is a ndarray.*torch.from_numpy"):
        run.commit(0, 0, [], [], {"a": [0, np.zeros(3)]})
    with pytest.raises(ValueError, match=r"due is \(0, 0\)"):
        commit(run, 0, 1)
    with pytest.raises(RuntimeError, match=r"\(0, 0\) .* was not committed"):
        list(run.rounds())
    assert not (run.folder / "rounds.csv").exists()


def test_a_folder_of_another_setting_is_an_error(tmp_path):
    path = finish(tmp_path).folder / "config.json"
    path.write_text(path.read_text().replace('"digest": "', '"digest": "0'))
    refused(tmp_path, "config.json belongs to another setting")


DAMAGES = {
    "cut": lambda content: content[:-5],
    "short": lambda content: b"".join(content.splitlines(keepends=True)[:-1]),
    "edited": lambda content: content.replace(b"server,1", b"server,2"),
    "ragged": lambda content: content.replace(b"server", b"server,1"),
    "binary": lambda content: b"\xff\xfe\x00",
}


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_a_damaged_csv_is_an_error_that_names_it_for_every_reader(tmp_path, damage, done):
    run = finish(tmp_path, 1 + done)
    content = (run.folder / "rounds.csv").read_bytes()
    (run.folder / "rounds.csv").unlink()
    if damage != "missing":
        (run.folder / "rounds.csv").write_bytes(DAMAGES[damage](content))
    refused(tmp_path, "rounds.csv")


@pytest.mark.parametrize("digests", [{}, None, {"rounds.csv": "0" * 64}, {"rounds.csv": "", "queries.csv": ""}])
def test_a_closing_note_without_the_right_digests_is_refused(tmp_path, digests):
    note = finish(tmp_path).folder / "done.json"
    note.write_text(json.dumps({"rounds": 2, "sha256": digests}))
    refused(tmp_path, "was changed")


def test_floats_and_texts_come_back_as_they_went_in(tmp_path):
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=200) * 10.0 ** rng.integers(-300, 300, 200)
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, *numbers]
    run = first_run(tmp_path, cycles=1, rounds=1)
    rows = [{"client": k, "loss": v, "steps": 2**60 + k, "ap50": np.float32(0.1)} for k, v in enumerate(values)]
    ids = ["NA", "nan", "007", 'a "quoted", id', "two\nlines", "größe", "", " "]
    run.commit(0, 0, rows, [{"client": "NA", "id": name, "score": torch.tensor(0.5)} for name in ids], {})
    table = record.table(run.config, "tiny", tmp_path)
    assert table["loss"].tolist() == values and [math.copysign(1, v) for v in table["loss"]][4] == -1
    assert table["steps"].tolist() == [2**60 + k for k in range(len(values))]
    assert table["ap50"].iloc[0] == float(np.float32(0.1))
    assert table["images"].isna().all() and table["client"].tolist() == [str(k) for k in range(len(values))]
    back = record.queries(run.config, "tiny", tmp_path)
    assert back["id"].tolist() == ids and set(back["client"]) == {"NA"} and set(back["score"]) == {0.5}


def test_table_gathers_all_methods_and_seeds_in_order(unbroken, tmp_path):
    table = record.table(CONFIG, "tiny", unbroken)
    assert table["method"].drop_duplicates().tolist() == ["sum", "random"]  # the config's order
    assert len(table) == 2 * 4 * 3 and set(table["client"]) == {"0", "1", "server"}
    assert table["ap50"].notna().sum() == 2 * 2 and table["ap50/empty class"].isna().all()
    assert set(record.table(CONFIG, "tiny", unbroken, methods=["random"])["method"]) == {"random"}
    empty = record.table(CONFIG, "tiny", tmp_path)
    assert len(empty) == 0 and {"method", "seed", "client", "images"} <= set(empty.columns)
    assert record.missing(CONFIG, "tiny", ("sum", "random"), (0, 1), unbroken) == [("sum", 1), ("random", 1)]


def test_env_tells_versions_and_machine_but_not_whose(unbroken):
    text = next(unbroken.rglob("env.json")).read_text()
    assert json.loads(text).keys() >= {"torch", "machine", "minutes"} and "cores" in record.banner()
    assert str(Path.home()) not in text and os.uname().nodename not in text.split('"')


def test_state_is_the_last_one_and_a_view_does_not_drag_its_storage_along(tmp_path):
    run = first_run(tmp_path)
    run.commit(0, 0, [], [], {"row": torch.zeros(1000, 1000)[3], "big": 2**100, "nested": [{"a": (1, None, True)}]})
    found = record.state(run.config, "tiny", "sum", 0, tmp_path)
    assert found["row"].shape == (1000,) and found["big"] == 2**100 and found["nested"] == [{"a": (1, None, True)}]
    assert (run.folder / "state.pt").stat().st_size < 20_000
    assert record.state(run.config, "tiny", "max", 0, tmp_path) is None


def test_a_disk_that_fills_up_within_a_commit_leaves_a_run_that_resumes(unbroken, tmp_path, monkeypatch):
    original, writes = files.os.fsync, []

    def full(descriptor):
        writes.append(1)
        if len(writes) == 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left on the disk"):
        tiny_loop.loop(tmp_path)
    tiny_loop.loop(tmp_path)
    assert results(tmp_path) == results(unbroken)


def test_progress_is_a_line_per_round(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FEDAL_PROGRESS", "lines")
    run = first_run(tmp_path, seeds=(0, 1))
    for cycle, number in run.rounds():
        commit(run, cycle, number, ap50=0.25)
    last = capfd.readouterr().out.splitlines()[3]
    assert last.startswith("tiny sum seed 0, run 1 of 2  cycle 2 round 2, 4 of 4  images 1  ap50 0.25")
    assert run.later == 4 and re.search(r" s  about \S+ min to go$", last)


def test_the_plan_of_every_round_has_the_extra_rounds_after_the_last_cycle(tmp_path):
    settings = config.Config.of(cycles=2, rounds=2, extra_rounds=3)
    assert record.every_round(settings) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]


def test_the_project_root_is_the_checkout_from_its_notebooks_too(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDAL_HOME", raising=False)
    (tmp_path / "house" / "notebooks").mkdir(parents=True)
    (tmp_path / "house" / "pyproject.toml").touch()
    for folder in ("house/notebooks", "house", "."):
        monkeypatch.chdir(tmp_path / folder)
        assert record.project_root() == tmp_path / folder.removesuffix("/notebooks")
