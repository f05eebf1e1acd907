"""The command line: `python -m fedal_utils reproduce`, `run 11_fedavg --profile smoke`, `publish`, `label`, ..."""

from __future__ import annotations

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

import torch

from . import __version__, notebooks, papers, publish, record
from .config import PROFILES


def seeds(text: str) -> tuple[int, ...] | None:
    """ "0,1,2" as (0, 1, 2); "" as None."""
    return tuple(int(part) for part in text.replace(" ", ",").split(",") if part) or None


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """["cycles=3", "detector=ssd"] as {"cycles": 3, "detector": "ssd"}: Python literals where they are, else text."""
    out: dict[str, Any] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name.isidentifier() or name in out:
            raise ValueError(f"--set takes name=value, each name once, got {text!r}")
        try:
            out[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[name] = value
    return out


OPTIONS: dict[str, dict[str, Any]] = {
    "notebook": dict(help="11_fedavg, or 11"),
    "names": dict(nargs="*", help="default: all that there are"),
    "--nb": dict(default="", help="11_fedavg, or 11, or several with commas between"),
    "--profile": dict(
        choices=("", *PROFILES), default="", metavar="SIZE", help="smoke, quick or paper; default: what fits"
    ),
    "--data": dict(default="", help="a data set's name, or the path of a folder"),
    "--seeds": dict(type=seeds, help="whole numbers with commas between: 0,1,2"),
    "--jobs": dict(type=int, help="notebooks side by side; default: two where all train on one thread"),
    "--set": dict(action="append", default=[], metavar="NAME=VALUE", help="a parameter or a setting of the config"),
    "--silence": dict(type=float, help="minutes that it may print nothing; default: those of the profile"),
    "--quiet": dict(action="store_true", help="do not pass on what the cells print"),
    "path": dict(help="a folder, a file, or the name of a data set"),
    "--json": dict(action="store_true", help="as JSON"),
    "--picture": dict(metavar="PNG", help="draw some of its images with their boxes"),
    "--classes": dict(nargs="+", help="class names; needed the first time"),
    "--task": dict(help="classes (one for each image; the default of a new store) or boxes"),
    "--store": dict(metavar="FILE", help="where the labels go; default: DATA/labels.sqlite"),
    "--seed": dict(type=int, default=0, help="of all that is random"),
    "--suggestions": dict(action="store_true", help="show what a model suggests, if the store has it"),
    "--show-names": dict(action="store_true", help="show file names, which often contain the class"),
    "--queried": dict(action="store_true", help="only what the store asks for already (a client's queries)"),
    "--host": dict(default="127.0.0.1", help="default: this machine alone; else it asks for a token"),
    "--allow": dict(nargs="*", default=[], metavar="NAME", help="host names that the page may be called by"),
    "--port": dict(type=int, help="default: a free one from 7860 up"),
    "--token": dict(help="the password of the page; default: a new one where one is needed"),
    "store": dict(metavar="STORE", help="labels.sqlite of a labelled folder, or of a run"),
    "--format": dict(required=True, help="coco (a JSON file), yolo or voc (a folder), csv (out), label_studio (in)"),
    "--who": dict(default="import", help="the name of whoever labelled"),
    "--clients": dict(type=int, default=0, help="how many; default: the profile's"),
    "--method": dict(default="", help="scheme and query strategy, such as avg or chain+sum"),
    "--simulation": dict(action="store_true", help="Flower's simulation in the place of processes"),
    "--place": dict(metavar="DIR", help="where the clients' folders go; default: in results/runs"),
    "--timeout": dict(type=float, default=600.0, help="seconds that a round waits for a client"),
}
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Any], str]] = {}


def command(options: str = "") -> Callable:
    """A function of the parsed arguments is the command of its name, its docstring's first line the help."""

    def register(function: Callable) -> Callable:
        COMMANDS[function.__name__] = (function, options)
        return function

    return register


def data_place(data: str) -> str | None:
    """A data set's name as it is; a folder's path made good for a notebook, which works in the checkout's root."""
    if not {"/", os.sep} & set(data) and not data.startswith((".", "~")):
        return data or None
    path = Path(data).expanduser()
    return str(path if path.is_absolute() or Path.cwd() == record.project_root() else path.absolute())


def data_folder() -> Path:
    """$FEDAL_DATA, or `data/` of the checkout."""
    return Path(os.environ.get("FEDAL_DATA") or record.project_root() / "data")


@command("--nb --profile --data --seeds --jobs")
def reproduce(given: argparse.Namespace) -> int:
    """Run every notebook headless, rebuild every table and figure."""
    failed = notebooks.reproduce(given.nb, given.profile, given.seeds, data_place(given.data), jobs=given.jobs)
    return int(bool(failed))


@command("notebook --profile --data --seeds --set --silence --quiet")
def run(given: argparse.Namespace) -> None:
    """Run one notebook headless and show what it prints."""
    wishes = {"data": data_place(given.data), "seeds": given.seeds}
    wishes = {name: value for name, value in wishes.items() if value is not None}
    if taken := {"profile", "data", "seeds", "name", "root", "show", "silence"} & set(settings(given.set)):
        raise ValueError(f"--set {min(taken)}: that is no setting, or an argument of its own: see `run --help`")
    wishes |= {"show": not given.quiet, "silence": given.silence, **settings(given.set)}
    print(notebooks.run(given.notebook, given.profile, **wishes))


@command("names")
def publish_(given: argparse.Namespace) -> None:
    """Copy the last executed notebooks, outputs in, to results/notebooks."""
    for name in given.names or [path.stem for path in notebooks.find() if publish.executed(path).exists()]:
        print(publish.publish(name))


@command()
def navigation(given: argparse.Namespace) -> None:
    """Bring badges and previous/next links in the notebooks up to date."""
    print("changed:", ", ".join(publish.navigation()) or "none")


@command()
def doctor(given: argparse.Namespace) -> None:
    """Print versions, GPU, memory, data found, profile chosen: what a bug report needs."""
    facts = record.environment()
    for part in (facts.pop("machine"), facts):
        print("  ".join(f"{name} {value}" for name, value in part.items()))
    if torch.cuda.is_available():
        print("GPU memory {:.1f} GiB free of {:.1f}".format(*(size / 2**30 for size in torch.cuda.mem_get_info())))
    print(f"memory {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB")
    there = sorted(p.name for p in data_folder().glob("*") if p.is_dir())
    print(f"data in {data_folder()}: {', '.join(there) or 'none (DigitScenes needs none; `make data` fetches some)'}")
    print(f"notebooks: {', '.join(p.stem for p in notebooks.find())}")
    print(f"profile chosen without PROFILE=: {notebooks.default_profile()}")


@command("names")
def data(given: argparse.Namespace) -> None:
    """Download data sets into $FEDAL_DATA or data/."""
    from .data import KITTI, PINNED, fetch

    known = {name.lower(): name for name in (*PINNED, KITTI)}
    for name in given.names or PINNED:
        print(f"{name}: {fetch(known.get(name.lower(), name), data_folder())}")


@command("path --json --picture --seed")
def inspect(given: argparse.Namespace) -> None:
    """Tell what is read from a folder or a named set: format, classes, split, what was left out."""
    from . import data, plots

    report = data.inspect_folder(given.path, data_folder(), given.seed)
    print(json.dumps(report, indent=1, ensure_ascii=False) if given.json else data.report_lines(report))
    if given.picture:
        sheet = data.contact_sheet(given.path, data_folder(), given.seed)
        figure, _ = plots.image_grid(sheet.images, sheet.labels, sheet.class_names, range(len(sheet)))
        figure.savefig(given.picture)


@command("--data --classes --task --store --seed --suggestions --show-names --host --allow --port --token --queried")
def label(given: argparse.Namespace) -> None:
    """Label the images of a folder (--data) in the browser, until Ctrl+C; everything is in the store by then."""
    from . import labelling
    from .labelling import page

    if not given.data:
        raise ValueError("label needs the folder of images: --data DIR")
    try:
        page.need_gradio()
    except ImportError as error:
        raise ValueError(str(error)) from None
    more = {"host": given.host, "allow": given.allow, "token": given.token, "server_port": given.port}
    more |= {"suggestions": given.suggestions, "names": given.show_names}
    with labelling.Store(given.store or labelling.store_path(given.data), given.classes, given.task) as store:
        page.serve(store, given.data, None if given.queried else given.seed, **more)


@command("store path --format")
def export(given: argparse.Namespace) -> None:
    """Labels of a store as a file or folder."""
    from . import labelling

    with labelling.Store(given.store) as store:
        print(f"{labelling.export(store, given.format, given.path):,} images: {given.path}")


@command("store path --format --who")
def import_(given: argparse.Namespace) -> None:
    """Labels of files into a store."""
    from . import labelling

    print(f"{labelling.load(given.store, given.format, given.path, given.who):,} labels are new in {given.store}")


@command("--nb")
def records(given: argparse.Namespace) -> None:
    """Collect the finished runs of results/runs into results/records."""
    for path in notebooks.find(given.nb):
        for part in record.publish(path.stem, functools.partial(papers.load, path.stem)):
            print(part)


@command("path")
def merge(given: argparse.Namespace) -> None:
    """Add the runs of another machine to results/records: a tar archive, or a folder, that holds records."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(given.path)
        if place.is_file():
            with tarfile.open(place) as archive:
                archive.extractall(folder, filter="data")
            place = Path(folder)
        for part in sorted({path.parent for path in place.rglob("*.csv.gz")}):
            print(*record.merge(part), sep="\n")


@command("--clients --profile --data --method --seed --set --simulation --place --timeout")
def clients(given: argparse.Namespace) -> None:
    """Run the experiment with a server and real clients, processes of this machine (Flower)."""
    from . import federation

    try:
        from . import flower
    except ImportError as error:
        raise ValueError(str(error)) from None
    name, wishes = "60_real_clients", settings(given.set)
    wishes |= {"clients": given.clients} if given.clients else {}
    wishes |= {"methods": (given.method,)} if given.method else {}
    profile = given.profile or notebooks.default_profile()
    setup = federation.prepare(papers.load(name, profile, data_place(given.data), [given.seed], **wishes), device="cpu")
    folder = record.project_root() / "results" / "runs" / name
    place = Path(given.place or folder / f"place-{setup.config.digest()[:8]}-seed{given.seed}")
    print(f"clients {', '.join(flower.deal(setup, place, given.seed))}; folders in {place / 'clients'}", flush=True)
    if given.simulation:
        root = flower.simulate(setup.config, name, place)
    else:
        root = flower.deployed(setup.config, name, place, timeout=given.timeout)
    print(f"run folders: {root}")


def parser() -> argparse.ArgumentParser:
    """Reads the command line; what to call stands in `call`."""
    top = argparse.ArgumentParser(prog="python -m fedal_utils", description=__doc__.partition(":")[0] + ".")
    top.add_argument("--version", action="version", version=f"fedal {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    for name, (function, options) in COMMANDS.items():
        text = (function.__doc__ or "").strip()
        sub = commands.add_parser(name.rstrip("_"), help=text, description=text)
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
    except notebooks.NotebookFailed as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def console() -> None:
    """Entry point of the `fedal` command."""
    raise SystemExit(main())


if __name__ == "__main__":
    console()
