"""The runner is strict: it refuses early, names the failing cell, goes on with the others, and limits silence only."""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill.iorw
import pytest
from small_house import printed, write_notebook

from fedal_utils import __main__ as command
from fedal_utils import notebooks
from fedal_utils.notebooks import batch


def test_runs_by_this_interpreter_from_the_root_with_the_parameters_given(house, monkeypatch):
    monkeypatch.chdir(house / "notebooks")
    output = notebooks.run("10", "quick", data="../x", seeds=[0, 1])
    assert output == house / "results" / "notebooks" / "_work" / "10_good.ipynb"
    assert json.loads(printed(output)) == ["quick", "../x", [0, 1], str(house), sys.executable, "lines"]
    assert [p.name for p in output.parent.iterdir()] == ["10_good.ipynb"]
    notes = nbformat.read(output, as_version=4).metadata.fedal
    assert notes.parameters == {"profile": "quick", "data": "../x", "seeds": [0, 1]} and 0 <= notes.minutes < 1


def test_seeds_and_tuples_arrive_as_lists(house, capsys):
    path = house / "notebooks" / "10_good.ipynb"
    write_notebook(path, "print(seeds, overrides)", parameters='profile = "smoke"\nseeds = None\noverrides = {}')
    words = "run 10 --profile smoke --seeds 0,1 --set zoom=(1,2) --set limit=(3,4)".split()
    assert command.main(words) == 0
    assert capsys.readouterr().out.splitlines()[0] == "[0, 1] {'zoom': [1, 2], 'limit': [3, 4]}"


def test_a_failing_cell_is_told_reason_first_and_the_part_before_it_is_kept(house):
    with pytest.raises(notebooks.NotebookFailed) as caught:
        notebooks.run("notebooks/11_bad.ipynb")
    first, *rest = str(caught.value).splitlines()
    assert first == "11_bad, cell [4]: ZeroDivisionError: division by zero"
    assert rest.index("    in") < rest.index("    ratio = before / 0") and "\x1b" not in "".join(rest)
    partial = Path(rest[-1].removeprefix("What it had done: "))
    assert partial.exists() and not (partial.parent / "11_bad.ipynb").exists()


def test_silence_is_limited_not_time_and_a_dead_kernel_is_told(house):
    talks = "import time\nfor i in range(10):\n    print(i, flush=True)\n    time.sleep(1)"
    write_notebook(house / "notebooks" / "12_slow.ipynb", talks)
    write_notebook(house / "notebooks" / "13_silent.ipynb", "import time", "time.sleep(600)")
    write_notebook(house / "notebooks" / "14_dead.ipynb", "import os; os._exit(9)")
    assert notebooks.run("12", silence=0.1).exists()
    with pytest.raises(notebooks.NotebookFailed, match="13_silent, printed nothing for 0.05 minutes"):
        notebooks.run("13", silence=0.05)
    with pytest.raises(notebooks.NotebookFailed, match="14_dead, its kernel died"):
        notebooks.run("14")


@pytest.mark.parametrize(("number", "instant"), [(errno.EDQUOT, 1), (errno.ENOSPC, 4)])
def test_a_disk_that_fills_up_under_papermill_is_one_sentence_with_a_name(house, capfd, monkeypatch, number, instant):
    original, writes = papermill.iorw.LocalHandler.write, []

    def full(self, content, path):
        writes.append(path)
        if len(writes) >= instant:
            raise OSError(number, os.strerror(number))
        original(self, content, path)

    monkeypatch.setattr(papermill.iorw.LocalHandler, "write", full)
    assert command.main(["run", "10", "--profile", "smoke"]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert "no space left" in error and "10_good.partial.ipynb" in error


def test_a_kernel_does_not_outlive_its_runner(house, capfd):
    note = house / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(600)"
    write_notebook(house / "notebooks" / "12_long.ipynb", code)
    runner = multiprocessing.get_context("fork").Process(target=notebooks.run, args=("12", "smoke"))
    runner.start()
    until(lambda: note.exists() and note.read_text())
    runner.kill()
    until(lambda: gone(int(note.read_text())))
    note.unlink()

    def interrupt() -> None:
        until(lambda: note.exists() and note.read_text())
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        assert command.main(["reproduce", "--nb", "12", "--profile", "smoke"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "interrupted: the same command goes on where it stopped\n"
    until(lambda: gone(int(note.read_text())))


def until(true):
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def gone(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_reproduce_goes_on_after_a_failure_and_names_notebook_cell_and_error(house, capsys):
    card = "# 11\n\n| | |\n|---|---|\n| `smoke` | digits, 1 seed: about 2 minutes |"
    write_notebook(house / "notebooks" / "11_bad.ipynb", "before = 1", "ratio = before / 0", text=card)
    assert command.main(["reproduce", "--profile", "smoke", "--jobs", "1"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "2 notebooks, profile smoke" and lines[5].endswith("1 of 2 notebooks")
    assert lines[1] == "10_good  begins, expected: unknown" and lines[3] == "11_bad   begins, expected: about 2 minutes"
    assert [line.split()[::3] for line in (lines[2], lines[4])] == [["10_good", "done"], ["11_bad", "FAILED"]]
    assert lines[6] == "FAILED: 11_bad, cell [4]: ZeroDivisionError: division by zero"
    assert "ratio = before / 0" in err
    path = house / "results" / "tables" / "minutes-smoke.csv"
    assert re.fullmatch(r"notebook,minutes\n10_good,0\.\d\n", path.read_text())
    path.write_text("notebook,minutes\n10_good,30\n")
    assert batch.expected(house / "notebooks" / "10_good.ipynb", "smoke") == "about 30 min"


def test_on_a_terminal_each_notebook_has_a_live_line_with_what_it_printed_last(house, monkeypatch, capsys):
    write_notebook(house / "notebooks" / "12_slow.ipynb", "import time; print('run 1 of 9', flush=True); time.sleep(4)")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert notebooks.reproduce("10,12", "smoke", jobs=2) == []
    assert re.search(r"\r12_slow +0\.\d min, expected: unknown  run 1 of 9", capsys.readouterr().out)


def test_the_size_of_the_papers_is_planned_and_stops_where_something_is_missing(house, monkeypatch, capsys):
    monkeypatch.setenv("FEDAL_DATA", str(house / "nothing"))
    assert command.main(["reproduce", "--nb", "10", "--profile", "paper", "--data", "bccd"]) == 2
    out, err = capsys.readouterr()
    assert re.search(r"10_good +bccd +MISSING +hours: not run\ndisk: \d+ GB free", out)
    assert "nothing was run; missing:" in err and "python -m fedal_utils data bccd" in err
    assert not (house / "results").exists()


def test_a_notebook_that_reads_the_runs_of_others_starts_when_they_are_done(house, capsys):
    """Two side by side: 05 would start at once, but it waits for 10_good; who is not asked for is not waited for."""
    path = house / "notebooks" / "05_late.ipynb"
    write_notebook(path, "import pathlib; assert pathlib.Path('results/good').exists()", fedal={"after": ["10_good"]})
    assert notebooks.reproduce("05,10", "smoke", jobs=2) == []
    done = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("done")]
    assert done == ["10_good", "05_late"]
    (house / "results" / "good").unlink()
    assert notebooks.reproduce("05", "smoke", jobs=1) == ["05_late"]


def test_reproduce_refuses_before_it_runs_anything(house, capsys):
    write_notebook(house / "notebooks" / "00_start.ipynb", parameters='profile = "smoke"')
    assert command.main(["reproduce", "--nb", "00", "--data", "bccd"]) == 2
    assert "none of 00_start has a parameter 'data'" in capsys.readouterr().err
    assert command.main(["reproduce", "--seeds", "0,0"]) == 2
    assert "seeds must be a list of different integers" in capsys.readouterr().err
    assert not (house / "results").exists()


def test_unknown_parameters_are_refused_and_the_known_ones_named(house):
    path = house / "notebooks" / "10_good.ipynb"
    with pytest.raises(ValueError, match="10_good has no parameter 'sede'; known: profile, data, seeds"):
        notebooks.run("10_good", sede=3)
    assert notebooks.checked(path, {"seeds": [1]})[0] == {"seeds": [1]}
    write_notebook(path, parameters='profile = "smoke"\noverrides = {"cycles": 2, "clients": 3}')
    values, config = notebooks.checked(path, {"cycles": 5})
    assert values == {"overrides": {"cycles": 5, "clients": 3}} and config.query.cycles == 5
    with pytest.raises(ValueError, match="no parameter 'cylces'; known: profile, overrides; settings: .*cycles"):
        notebooks.checked(path, {"cylces": 5})
    with pytest.raises(ValueError, match="10_good: cycles must be 1 or more, got 0"):
        notebooks.checked(path, {"cycles": 0})
    write_notebook(path, '@sampling.strategy("my_own", needs=())', parameters="overrides = {}")
    assert notebooks.checked(path, {"methods": ("sum", "chain+my_own")})[1].methods == ("sum", "chain+my_own")


def test_literals_are_read_without_running_anything_and_only_literals_are_parameters(tmp_path):
    text = '# a comment\nprofile: str = "smoke"  # size\nseeds = [0, 1]\noverrides = {"a": (1, -2.5)}\ndata = None'
    path = write_notebook(tmp_path / "a.ipynb", parameters=text)
    wanted = {"profile": "smoke", "seeds": [0, 1], "overrides": {"a": (1, -2.5)}, "data": None}
    assert notebooks.parameters(path) == wanted
    path.write_text(path.read_text().replace('"parameters"', '"others"'))
    with pytest.raises(ValueError, match="one code cell tagged 'parameters', it has 0"):
        notebooks.parameters(path)
    for text in ("profile = default()", "import os", "a = b = 1", "a, b = 1, 2", "a: int", "a += 1"):
        with pytest.raises(ValueError, match="`name = literal` only, got"):
            notebooks.parameters(write_notebook(path, parameters=text))


def test_the_command_line_reads_seeds_settings_and_folders(house, monkeypatch):
    assert command.seeds("") is None and command.seeds("0") == (0,) and command.seeds("0,2, 1") == (0, 2, 1)
    words = ["cycles=3", "set=bccd", "size=(4, 5)", "text='3'", "flag=True", "empty="]
    wanted = {"cycles": 3, "set": "bccd", "size": (4, 5), "text": "3", "flag": True, "empty": ""}
    assert dict(map(command.setting, words)) == wanted
    assert [command.data_place(data) for data in ("bccd", "", "my/folder")] == ["bccd", None, "my/folder"]
    monkeypatch.chdir(house / "notebooks")
    places = {"bccd": "bccd", "/x": "/x", "./x": str(house / "notebooks" / "x"), "~/x": str(Path.home() / "x")}
    assert {data: command.data_place(data) for data in places} == places


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("run 99_nothing", "notebook '99_nothing' is unknown"),
        ("run 1", "notebook '1' is unknown or ambiguous; there are: 10_good, 11_bad, 12_set"),
        ("run 12 --set limit=10", "12_set: parameter 'limit' must be None or a pair"),
        ("run 12 --set lr=inf", "12_set: parameter 'lr' must be float, got 'inf'"),
        ("run 12 --seeds=-1", "12_set: seeds must be a list of different integers >= 0"),
        ("run 12 --set methods=('sum','randm')", "12_set: query strategy 'randm' is unknown"),
        ("run 12 --set methods=('chian+sum',)", "12_set: method 'chian+sum': scheme 'chian' is unknown"),
        ("run 12 --silence=nan", "silence is 0 (without limit) or more minutes"),
        ("reproduce --profile huge", ""),
        ("run 12 --set name=x", ""),
        ("run 12 --set seeds=(-1,)", ""),
        ("run 12 --set cycles", ""),
        ("merge pyproject.toml", "file could not be opened"),
        ("merge notebooks", "notebooks holds no records"),
        ("inspect digits", "data set 'digits' is drawn"),
        ("inspect ~/x", "Could not determine home directory"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_two(house, capsys, monkeypatch, words, reason):
    """Without a home directory, by a user whom the system does not know."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 54321)
    write_notebook(house / "notebooks" / "12_set.ipynb", parameters="seeds = [0]\noverrides = {}")
    try:
        code = command.main(words.split())
    except SystemExit as stopped:  # by argparse, which tells the usage as well
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and "error: " + reason in error and "Traceback" not in error


def test_doctor_tells_versions_data_and_profile(capsys):
    assert command.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("fedal ", "torch", "data in", "profile"))
