"""Ours against the library or the plain way, in one process, in turn; writes results/tables/bench.csv.

    python tests/bench/bench.py [PART ...] [--out FILE] [--small] [--seconds N]

Columns: what, against, ratio (against / what, bigger is better), median (of what, in `unit`), machine, commit.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
COLUMNS = ("what", "against", "ratio", "median", "unit", "machine", "commit")

from fedal_utils import record  # noqa: E402

PARTS: "dict[str, Callable[[Bench], None]]" = {}


def part(function: "Callable[[Bench], None]") -> "Callable[[Bench], None]":
    PARTS[function.__name__] = function
    return function


class Bench:
    """Where results go, on which device, and how small."""

    def __init__(self, out: Path, small: bool):
        self.out, self.small, self.rows = out, small, []
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.gpu = self.device == "cuda"
        processor = f"{os.cpu_count()} {platform.machine()} cores"
        self.machine = torch.cuda.get_device_name() if self.gpu else f"{processor}, {torch.get_num_threads()} threads"
        self.commit = record.environment().get("commit", "")[:12]
        if out.is_file():  # what other machines measured stays
            with out.open(newline="") as file:
                self.rows = [tuple(row) for row in csv.reader(file) if row[5] not in ("machine", self.machine)]

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def clock(self, call: Callable[[], object]) -> float:
        self.wait()
        begun = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begun

    def in_turn(self, what: str, against: str, ours, theirs, unit: str = "ms", runs: int = 5, **scale) -> None:
        """A, B, A, B, ...: the machine's drift meets both. ours_do, theirs_do: how many units one call is (1)."""
        ours(), theirs()
        pairs = [(self.clock(ours), self.clock(theirs)) for _ in range(1 if self.small else runs)]
        a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
        self.add(what, against, a / scale.get("ours_do", 1), b / scale.get("theirs_do", 1), unit)

    def alone(self, what: str, ours, unit: str = "ms", runs: int = 5, ours_do: int = 1) -> None:
        ours()
        median = statistics.median(self.clock(ours) for _ in range(1 if self.small else runs))
        self.add(what, "", median / ours_do, None, unit)

    def add(self, what: str, against: str, one: float, other: float | None, unit: str) -> None:
        """One row, from the seconds of one unit."""
        shown = 1000 * one if unit == "ms" else 1 / one
        ratio = "" if other is None else f"{other / one:.3g}"
        row = what, against, ratio, f"{shown:.4g}", unit, self.machine, self.commit
        self.rows.append(row)
        beside = f", {ratio} x {against}" if ratio else ""
        print(f"[{time.strftime('%X')}] {what}: {shown:.4g} {unit}{beside}", flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *self.rows])


def speed_table(path: Path) -> str:
    """The README's table: what was measured against something, from the CSV."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ratio"]]
    shown = [f"| {row['what']} | {row['median']} {row['unit']} | {row['against']} | {row['ratio']} |" for row in rows]
    places = ", ".join(dict.fromkeys(f"{row['machine']} at {row['commit']}" for row in rows))
    head = ["| what | ours | against | times faster |", "|---|---|---|---|"]
    return "\n".join([*head, *shown, "", f"Medians; {places}."])


def into_readme(table: str, path: Path = ROOT / "README.md") -> None:
    """Put the table between the README's two marks; ValueError where they are not there."""
    before, begun, rest = path.read_text().partition("<!-- speed -->\n")
    _, ended, after = rest.partition("<!-- /speed -->")
    if not begun or not ended:
        raise ValueError(f"{path} lacks the marks of the speed table")
    path.write_text(f"{before}{begun}{table}\n{ended}{after}")


def main(arguments: list[str] | None = None) -> int:
    import parts  # noqa: F401  fills PARTS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", choices=[[], *PARTS], default=[], help=f"of {', '.join(PARTS)}; none = all")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "tables" / "bench.csv")
    parser.add_argument("--small", action="store_true", help="in miniature: does it run?")
    parser.add_argument("--seconds", type=float, default=240, help="no part begins after so many")
    options = parser.parse_args(arguments)
    bench, begun, failed = Bench(options.out, options.small), time.monotonic(), 0
    print(f"{bench.machine}, torch {torch.__version__}, commit {bench.commit}", flush=True)
    for name in options.part or PARTS:
        if time.monotonic() - begun > options.seconds:
            print(f"{name}: no time left", flush=True)
            continue
        try:
            PARTS[name](bench)
        except Exception:
            failed += 1
            print(f"{name} failed", flush=True)
            traceback.print_exc()
    if options.out == parser.get_default("out") and not options.small and not options.part:
        into_readme(speed_table(options.out))
    return failed


if __name__ == "__main__":
    sys.modules["bench"] = sys.modules["__main__"]
    sys.exit(main())
