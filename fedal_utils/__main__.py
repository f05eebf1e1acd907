"""The command line: `python -m fedal_utils reproduce`, `run 11_fedavg --profile smoke`, `publish`, `label`, ..."""

import argparse
import ast
import functools
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from . import __version__, federation, labelling, notebooks, papers, plots, record
from .config import PROFILES


def seeds(text: str) -> tuple[int, ...] | None:
    """ "0,1,2" as (0, 1, 2); "" as None."""
    return tuple(int(part) for part in text.replace(" ", ",").split(",") if part) or None


def setting(text: str) -> tuple[str, Any]:
    """ "cycles=3" as ("cycles", 3), "detector=ssd" as ("detector", "ssd"): a Python literal where it is one."""
    name, mark, value = text.partition("=")
    if not (mark and name.isidentifier()) or name in "profile data seeds name root silence show stop".split():
        raise argparse.ArgumentTypeError(f"it takes NAME=VALUE, NAME not an option of its own, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


OPTIONS: dict[str, dict[str, Any]] = {
    "notebook": dict(help="11_fedavg, or 11"),
    "names": dict(nargs="*", help="default: all that there are"),
    "--nb": dict(default="", help="11_fedavg, or 11, or several with commas between"),
    "--profile": dict(choices=("", *PROFILES), default="", help="default: smoke, or quick with a GPU"),
    "--data": dict(default="", help="a data set's name, or the path of a folder"),
    "--seeds": dict(type=seeds, help="whole numbers with commas between: 0,1,2"),
    "--jobs": dict(type=int, help="notebooks side by side; default: two where all train on one thread"),
    "--set": dict(type=setting, action="append", default=[], metavar="NAME=VALUE", help="a parameter or a setting"),
    "--silence": dict(type=float, help="minutes that it may print nothing; default: those of the profile"),
    "--repo": dict(default="", metavar="OWNER/NAME", help="on GitHub; default: that of git's remote origin"),
    "--branch": dict(default="", help="default: main"),
    "path": dict(help="a folder, a file, or the name of a data set"),
    "--json": dict(action="store_true", help="as JSON"),
    "--picture": dict(metavar="PNG", help="draw some of its images with their boxes"),
    "--classes": dict(nargs="+", help="class names; needed the first time"),
    "--task": dict(help="classes (one for each image; the default of a new store) or boxes"),
    "--store": dict(metavar="FILE", help="where the labels go; default: DATA/labels.sqlite"),
    "--seed": dict(type=int, default=0, help="of all that is random"),
    "--show-names": dict(action="store_true", help="show file names, which often contain the class"),
    "--queried": dict(nargs="?", const="", metavar="CSV", help="only what the store, or this table, asks for"),
    "--host": dict(default="127.0.0.1", help="default: this machine alone; else it asks for a token"),
    "--allow": dict(nargs="*", default=[], metavar="NAME", help="host names that the page may be called by"),
    "--port": dict(type=int, help="default: a free one from 7860 up"),
    "--token": dict(help="the password of the page; default: a new one where one is needed"),
    "store": dict(metavar="STORE", help="labels.sqlite of a labelled folder, or of a run"),
    "--format": dict(required=True, help="coco (a JSON file), yolo or voc (a folder), csv (out), label_studio (in)"),
    "--who": dict(default="import", help="the name of whoever labelled"),
    "--clients": dict(type=int, default=0, help="how many; default: the profile's"),
    "--simulation": dict(action="store_true", help="Flower's simulation in the place of processes"),
}


def data_place(data: str) -> str | None:
    """A data set's name as it is; a folder's path made good for a notebook, which works in the checkout's root."""
    path = Path(data).expanduser()
    named = "/" not in data and not data.startswith((".", "~"))
    return (data if named else str(path if Path.cwd() == record.project_root() else path.absolute())) or None


def reproduce(given: argparse.Namespace) -> int:
    """Run every notebook headless, rebuild every table and figure."""
    return int(bool(notebooks.reproduce(given.nb, given.profile, given.seeds, data_place(given.data), given.jobs)))


def run(given: argparse.Namespace) -> None:
    """Run one notebook headless and show what it prints."""
    wishes = {"data": data_place(given.data), "seeds": given.seeds}
    wishes = {name: value for name, value in wishes.items() if value is not None} | dict(given.set)
    print(notebooks.run(given.notebook, given.profile, silence=given.silence, show=True, **wishes))


def publish_(given: argparse.Namespace) -> None:
    """Copy the last executed notebooks, outputs in, to results/notebooks."""
    for name in given.names or [path.stem for path in notebooks.find() if notebooks.executed(path).exists()]:
        print(notebooks.publish(name))
    scoreboard(given)


def scoreboard(given: argparse.Namespace) -> None:
    """Bring the notebooks' badges, links and install cells up to date, and the tables of both READMEs."""
    print("changed:", ", ".join(notebooks.navigation() + notebooks.scoreboard()[0]) or "none")


def badges(given: argparse.Namespace) -> None:
    """Say where the repository lies; badges, links and install cells follow."""
    notebooks.badges(given.repo, given.branch)
    print("repository: {} {}".format(*notebooks.address()))
    scoreboard(given)


def doctor(given: argparse.Namespace) -> None:
    """Print versions, GPU, memory, data found, profile chosen: what a bug report needs."""
    facts = record.environment()
    for part in (facts.pop("machine"), facts):
        print("  ".join(f"{name} {value}" for name, value in part.items()))
    if torch.cuda.is_available():
        print("GPU memory {:.1f} GiB free of {:.1f}".format(*(size / 2**30 for size in torch.cuda.mem_get_info())))
    print(f"memory {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB")
    there = ", ".join(sorted(p.name for p in record.data_folder().glob("*") if p.is_dir()))
    print(f"data in {record.data_folder()}: {there or 'none (DigitScenes needs none; `make data` fetches some)'}")
    print(f"profile chosen without PROFILE=: {notebooks.default_profile()}")


def data(given: argparse.Namespace) -> None:
    """Download data sets into $FEDAL_DATA or data/."""
    from .data import KITTI, PINNED, fetch

    known = {name.lower(): name for name in (*PINNED, KITTI)}
    for name in given.names or PINNED:
        print(f"{name}: {fetch(known.get(name.lower(), name), record.data_folder())}")


def inspect(given: argparse.Namespace) -> None:
    """Tell what is read from a folder or a named set: format, classes, split, what was left out."""
    from . import data

    report = data.inspect_folder(given.path, record.data_folder(), given.seed)
    print(json.dumps(report, indent=1, ensure_ascii=False) if given.json else data.report_lines(report))
    if given.picture:
        sheet = data.contact_sheet(given.path, record.data_folder(), given.seed)
        figure, _ = plots.image_grid(sheet.images, sheet.labels, sheet.class_names, range(len(sheet)))
        kind = Path(given.picture).suffix[1:] or "png"
        record.write_atomic(given.picture, lambda file: figure.savefig(file, format=kind))


def label(given: argparse.Namespace) -> None:
    """Label the images of a folder (--data) in the browser, until Ctrl+C; everything is in the store by then."""
    from .labelling import page

    if not (given.data and Path(given.data).is_dir()):
        raise ValueError("label needs the folder of images: --data DIR")
    page.need_gradio()
    more = {"host": given.host, "allow": given.allow, "token": given.token, "server_port": given.port}
    with labelling.Store(given.store or labelling.store_path(given.data), given.classes, given.task) as store:
        if given.queried:
            labelling.queue(store, pd.read_csv(given.queried))
        page.serve(store, given.data, given.seed if given.queried is None else None, given.show_names, **more)
    if not given.store and (count := labelling.OwnFolder(given.data).write()):
        print(f"{count:,} of them lie beside the images in {labelling.LABELS}, where all notebooks read them")


def export(given: argparse.Namespace) -> None:
    """Labels of a store as a file or folder."""
    with labelling.Store(given.store) as store:
        print(f"{labelling.export(store, given.format, given.path):,} images: {given.path}")


def import_(given: argparse.Namespace) -> None:
    """Labels of files into a store."""
    print(f"{labelling.load(given.store, given.format, given.path, given.who):,} labels are new in {given.store}")


def records(given: argparse.Namespace) -> None:
    """Collect the finished runs of results/runs into results/records."""
    for path in notebooks.find(given.nb):
        for part in record.publish(path.stem, functools.partial(papers.load, path.stem)):
            print(part)


def merge(given: argparse.Namespace) -> None:
    """Add the runs of another machine to results/records: a tar archive, or a folder, that holds records."""
    with tempfile.TemporaryDirectory() as folder:
        if Path(given.path).is_file():
            with tarfile.open(given.path) as archive:
                archive.extractall(folder, filter="data")
        print(*record.merge(folder if Path(given.path).is_file() else given.path), sep="\n")


def clients(given: argparse.Namespace) -> None:
    """Run the experiment with a server and real clients, processes of this machine (Flower)."""
    from . import flower

    name, wishes = "60_real_clients", {**dict(given.set), "seeds": [given.seed], "data": data_place(given.data)}
    wishes |= {"clients": given.clients} if given.clients else {}
    settings = papers.load(name, given.profile or notebooks.default_profile(), **wishes)
    setup = federation.prepare(settings, device="cpu")
    place = record.project_root() / "results" / "runs" / name / f"place-{settings.digest()[:8]}-seed{given.seed}"
    print(f"clients {', '.join(flower.deal(setup, place, given.seed))}; folders in {place / 'clients'}", flush=True)
    start = flower.simulate if given.simulation else flower.deployed
    print(f"run folders: {start(setup.config, name, place)}")


COMMANDS: dict[Callable[[argparse.Namespace], int | None], str] = {
    reproduce: "--nb --profile --data --seeds --jobs",
    run: "notebook --profile --data --seeds --set --silence",
    publish_: "names",
    scoreboard: "",
    badges: "--repo --branch",
    doctor: "",
    data: "names",
    inspect: "path --json --picture --seed",
    label: "--data --classes --task --store --seed --show-names --host --allow --port --token --queried",
    export: "store path --format",
    import_: "store path --format --who",
    records: "--nb",
    merge: "path",
    clients: "--clients --profile --data --seed --set --simulation",
}


def parser() -> argparse.ArgumentParser:
    """Reads the command line; what to call stands in `call`."""
    top = argparse.ArgumentParser(prog="python -m fedal_utils", description=__doc__.partition(":")[0] + ".")
    top.add_argument("--version", action="version", version=f"fedal {__version__}")
    commands = top.add_subparsers(required=True)
    for function, options in COMMANDS.items():
        sub = commands.add_parser(function.__name__.rstrip("_"), help=function.__doc__, description=function.__doc__)
        sub.set_defaults(call=function)
        for option in options.split():
            sub.add_argument(option, **OPTIONS[option])
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all went well, 1 if a notebook failed, 2 for a wrong argument or missing file."""
    given = parser().parse_args(arguments)
    if os.environ.get("FEDAL_DATA"):  # notebooks work in another folder than the shell
        os.environ["FEDAL_DATA"] = str(Path(os.environ["FEDAL_DATA"]).expanduser().absolute())
    try:
        return given.call(given) or 0
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    except notebooks.NotebookFailed as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError, RuntimeError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
