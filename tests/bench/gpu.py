"""One command for a machine with a GPU: its tests, the benchmark, then the runs that are pending, and one archive.

    python tests/bench/gpu.py [--minutes N] [--dry] [--out results/gpu.tar.gz]

No notebook is run and nothing is downloaded: a run whose data are not there is left out. Runs resume where they were
broken off. `python -m fedal_utils merge ARCHIVE` takes records and table over. --dry: in miniature on any machine.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
LARGEST = 15 << 20  # bytes of the archive
# (notebook, profile, data set; None = the profile's own), in the order of their worth.
PENDING = (
    ("30_kafal", "paper", None),
    ("11_fedavg", "quick", "hit-uav"),
    ("20_huale", "quick", "voc07-half"),
    ("40_ssd_vae", "quick", "voc07-half"),
    ("12_chain", "quick", "hit-uav"),
    ("40_ssd_vae", "paper", None),
    ("11_fedavg", "paper", None),
)
DRY = (("30_kafal", "smoke", None),)
TINY = {"methods": ("random",), "cycles": 2, "rounds": 1, "iterations": 2, "extra_rounds": 0}


def run_pending(plans, until: float, **overrides) -> None:
    """Run what is not finished, seed by seed; stops after the round in which the time is over."""
    from fedal_utils import federation, papers, record

    for notebook, profile, data in plans:
        try:
            setup = federation.prepare(papers.load(notebook, profile, data, **overrides))
            print(f"{notebook} {profile}: {setup.train.describe()}, {setup.device}", flush=True)
            for run in federation.runs(setup, notebook):
                for step in federation.start(run, setup).advance():
                    if time.monotonic() > until:
                        print(f"time is over in {run}, cycle {step.cycle}, round {step.round}", flush=True)
                        return
        except Exception:  # no data on this machine, or a run that diverges: the others go on
            traceback.print_exc()
        finally:
            record.publish(notebook, partial(papers.load, notebook))


def pack(out: Path, results: Path) -> None:
    """Records and the benchmark's table in one archive."""
    files = [
        *sorted((results / "records").glob("*.csv.gz")),
        results / "tables" / "bench.csv",
        results / "gpu-tests.txt",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:gz") as archive:
        for file in files:
            if file.is_file():
                archive.add(file, str(file.relative_to(results)))
    size = out.stat().st_size
    print(f"{out}: {size / 1e6:.1f} MB", "(more than it may be)" if size > LARGEST else "", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=600, help="in all; runs stop after it and resume next time")
    parser.add_argument("--dry", action="store_true", help="in miniature, in a folder of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu.tar.gz")
    options = parser.parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    if options.dry:
        os.environ["FEDAL_HOME"] = tempfile.mkdtemp(prefix="fedal-dry-")
    results = Path(os.environ.get("FEDAL_HOME") or ROOT) / "results"
    results.mkdir(parents=True, exist_ok=True)
    here, place = str(Path(__file__).parent), os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": place, "PYTHONUNBUFFERED": "1"}
    if not options.dry:
        with (results / "gpu-tests.txt").open("w") as log:
            tests = [sys.executable, str(ROOT / "tests" / "training" / "test_gpu.py")]
            failed = subprocess.run(tests, env=environment, stdout=log, stderr=log, timeout=600).returncode
        print("GPU tests", "failed, see gpu-tests.txt" if failed else "passed", flush=True)
    small = ["small_sizes", "clients", "--small"] if options.dry else []
    table = ["--out", str(results / "tables" / "bench.csv")]
    subprocess.run([sys.executable, f"{here}/bench.py", *small, *table], env=environment, timeout=900)
    run_pending(DRY if options.dry else PENDING, until, **(TINY | {"seeds": (0,)} if options.dry else {}))
    pack(options.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
