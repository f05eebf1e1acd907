"""The command line: `python -m fedal_utils reproduce`, `run 11_fedavg --profile smoke`, `publish`, `label`, ..."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, notebooks, record
from .config import PROFILES


def seed_list(text: str) -> list[int] | None:
    """ "0,1,2" as [0, 1, 2]; "" as None."""
    if not text.strip():
        return None
    try:
        seeds = [int(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        raise ValueError(f"seeds are whole numbers with commas between, got {text!r}") from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different and from 0 up, got {text!r}")
    return seeds


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """["cycles=3", "detector=ssd"] as {"cycles": 3, "detector": "ssd"}: Python literals where they are, else text."""
    out: dict[str, Any] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name.isidentifier():
            raise ValueError(f"--set takes name=value, got {text!r}")
        if name in out:
            raise ValueError(f"--set {name} is given twice")
        try:
            out[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[name] = value
    return out


def profile_name(text: str) -> str | None:
    """A known profile, or None for "" (the one that fits the machine)."""
    if text and text not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {text!r}")
    return text or None


def data_folder() -> Path:
    """$FEDAL_DATA, or `data/` of the checkout."""
    return Path(os.environ.get("FEDAL_DATA") or record.project_root() / "data").expanduser()


def doctor() -> None:
    """Print what a bug report needs, and what the suite would do here."""
    import torch

    facts = record.environment()
    machine = facts.pop("machine")
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(f"GPU memory {free / 2**30:.1f} GiB free of {total / 2**30:.1f}")
    else:
        print("no CUDA GPU")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        print(f"memory {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB")
    place = data_folder()
    there = sorted(p.name for p in place.iterdir() if p.is_dir()) if place.is_dir() else []
    print(
        f"data in {place}: {', '.join(there) or 'none (DigitScenes needs none; `make data` fetches BCCD and HIT-UAV)'}"
    )
    print(f"notebooks: {', '.join(p.stem for p in notebooks.find())}")
    print(f"profile chosen without PROFILE=: {notebooks.default_profile()}")


def fetch(names: Sequence[str]) -> None:
    """Download data sets into $FEDAL_DATA, or `data/` of the checkout."""
    from .data import download

    known = {name.lower(): name for name in (*download.PINNED, download.KITTI)}
    for name in names:
        print(f"{name}: {download.fetch(known.get(name.lower(), name), data_folder())}")


def inspect(given: argparse.Namespace) -> None:
    """Print what would be read from a folder or a named set, and draw a contact sheet if one is asked for."""
    from . import data

    report = data.inspect_folder(given.path, data_folder(), given.seed)
    print(json.dumps(report, indent=1, ensure_ascii=False) if given.json else data.report_lines(report))
    if given.picture:
        from .plots.curves import image_grid

        sheet = data.contact_sheet(given.path, data_folder(), given.seed)
        image_grid(sheet.images, sheet.labels, sheet.class_names, range(len(sheet))).savefig(given.picture)


def label(given: argparse.Namespace) -> None:
    """Serve the labelling page for a folder of images until Ctrl+C; everything is in the store by then."""
    from . import labelling
    from .labelling import page
    from .seeding import rng_for

    try:
        page.need_gradio()
    except ImportError as error:
        raise ValueError(str(error)) from None
    images = page.find_images(given.data)
    with labelling.Store(given.store or labelling.store_path(given.data), given.classes, given.task) as store:
        order = rng_for(given.seed, "labelling order").permutation(len(images))
        if given.asked:  # a client's samples may be named without the suffix of their files
            images = {**{str(Path(name).with_suffix("")): path for name, path in images.items()}, **images}
        else:
            ids = list(images)
            store.queue(labelling.Question(ids[i], strategy="random") for i in order)
        more = {"host": given.host, "allow": given.allow, "token": given.token, "server_port": given.port}
        blocks = page.launch(store, images, given.suggestions, given.names, **more)
        print(f"labelling page: {blocks.local_url}")
        if blocks.token and not given.token:
            print(f"token (any user name, this as the password): {blocks.token}")
        print(f"labels go to {store.path}; Ctrl+C ends", flush=True)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            blocks.close(verbose=False)
            counts = store.progress()
            print(f"\n{counts['labelled']:,} of {counts['all']:,} images are labelled, in {store.path}")


def transfer(given: argparse.Namespace) -> None:
    """Labels out of a store, or into one."""
    from . import labelling

    if given.command == "import":
        count = labelling.load(given.store, given.format, given.path, given.who)
        print(f"{count:,} labels are new in {given.store}")
    else:
        with labelling.Store(given.store) as store:
            print(f"{labelling.export(store, given.format, given.path):,} images: {given.path}")


def clients(given: argparse.Namespace) -> None:
    """Hand the data out, start a server and its clients as processes, and show the rounds as they come."""
    from .config import load
    from .flower import workspace as homes

    try:
        from .flower import server_app as flower
    except ImportError as error:
        raise ValueError(str(error)) from None
    wishes, name = settings(given.set), "60_real_clients"
    if given.clients:
        wishes["clients"] = given.clients
    if given.method:
        wishes["methods"] = (given.method,)
    data = notebooks.data_place(given.data) if given.data else None
    config = load(name, profile_name(given.profile) or notebooks.default_profile(), data, [given.seed], **wishes)
    flower.check(config)
    place = Path(
        given.place or record.project_root() / "results" / "runs" / name / f"place-{homes.dealt_as(config, given.seed)}"
    )
    people = {client: {"person": "human"} for client in given.human}
    names = homes.deal(config, place, given.seed, tests=given.tests)
    print(f"clients {', '.join(names)}; folders in {place / 'clients'}", flush=True)
    with flower.Deployment(place, given.simulation, people) as deployment:
        run = deployment.submit(config, name, given.timeout, patience=given.patience if people else 0.0)
        for client in people:
            print(f"client {client} waits for labels: {flower.how_to_label(place, client, config, name)}", flush=True)
        for row in deployment.rounds(run, seconds=given.minutes * 60):
            print(flower.one_line(row), flush=True)
        deployment.stop()
        if not given.simulation:
            print(deployment.traffic().to_string(index=False))
    print(f"run folders: {place / 'server' / 'runs'}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m fedal_utils", description=__doc__.partition(":")[0] + ".")
    top.add_argument("--version", action="version", version=f"fedal {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    def add_size(command: argparse.ArgumentParser) -> None:
        command.add_argument("--profile", default="", help=f"{', '.join(PROFILES)}; default: what fits the machine")
        command.add_argument("--data", default="", help="a data set's name, or the path of a folder")
        command.add_argument("--seeds", default="", help="whole numbers with commas between: 0,1,2")

    command = add("reproduce", "run every notebook headless, rebuild every table and figure")
    command.add_argument("--nb", default="", help="11_fedavg, or 11, or several with commas between")
    add_size(command)
    command = add("run", "run one notebook headless and show what it prints")
    command.add_argument("name", help="11_fedavg, or 11")
    add_size(command)
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter or a setting")
    command.add_argument("--minutes", type=float, help="wall limit; default: that of the profile")
    command.add_argument("--quiet", action="store_true", help="do not pass on what the cells print")
    command = add("publish", "copy the last executed notebook, outputs in, to results/notebooks")
    command.add_argument("name", nargs="+")
    add("navigation", "bring badges and previous/next links in the notebooks up to date")
    add("doctor", "versions, GPU, memory, data found, profile chosen")
    command = add("data", "download data sets into $FEDAL_DATA or data/")
    command.add_argument("name", nargs="+")
    command = add("inspect", "what is read from a folder or a named set: format, classes, split, what was left out")
    command.add_argument("path", help="a folder, or the name of a data set")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--picture", metavar="PNG", help="draw some of its images with their boxes")
    command.add_argument("--seed", type=int, default=0, help="of a split that has to be drawn")
    command = add("label", "label the images of a folder in the browser")
    command.add_argument("--data", required=True, metavar="DIR", help="folder of images")
    command.add_argument("--classes", nargs="+", help="class names; needed the first time")
    command.add_argument("--task", help="classes (one for each image; the default of a new store) or boxes")
    command.add_argument("--store", metavar="FILE", help="where the labels go; default: DIR/labels.sqlite")
    command.add_argument("--seed", type=int, default=0, help="of the random order")
    command.add_argument("--suggestions", action="store_true", help="show what a model suggests, if the store has it")
    command.add_argument("--names", action="store_true", help="show file names, which often contain the class")
    command.add_argument("--host", default="127.0.0.1", help="default: this machine alone; else it asks for a token")
    command.add_argument("--allow", nargs="*", default=[], metavar="NAME", help="host names that it may be called by")
    command.add_argument("--port", type=int, help="default: a free one from 7860 up")
    command.add_argument("--token", help="the password of the page; default: a new one where one is needed")
    command.add_argument("--asked", action="store_true", help="only what the store asks already (a client's questions)")
    for name, text in (("export", "labels of a store as a file or folder"), ("import", "labels of files into a store")):
        command = add(name, text)
        command.add_argument("store", metavar="STORE", help="labels.sqlite of a labelled folder, or of a run")
        command.add_argument(
            "--format", required=True, help="coco (a JSON file), yolo or voc (a folder), csv (out) or label_studio (in)"
        )
        command.add_argument("path", metavar="OUT" if name == "export" else "PATH")
    command.add_argument("--who", default="import", help="the name of whoever labelled")
    command = add("clients", "run the experiment with a server and real clients, processes of this machine (Flower)")
    command.add_argument("--clients", type=int, default=0, help="how many; default: the profile's")
    command.add_argument("--profile", default="", help=f"{', '.join(PROFILES)}; default: what fits the machine")
    command.add_argument("--data", default="", help="a data set's name, or the path of a folder")
    command.add_argument("--method", default="", help="scheme and way of asking, such as avg or chain+sum")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the config")
    command.add_argument("--tests", action="store_true", help="clients get a part of the test images, and judge too")
    command.add_argument("--simulation", action="store_true", help="Flower's simulation in the place of processes")
    command.add_argument("--place", metavar="DIR", help="where the clients' folders go; default: in results/runs")
    command.add_argument("--human", nargs="*", default=[], metavar="CLIENT", help="clients whose labels a person draws")
    command.add_argument("--patience", type=float, default=3600.0, help="seconds that a person has in each cycle")
    command.add_argument("--timeout", type=float, default=600.0, help="seconds that a round waits for a client")
    command.add_argument("--minutes", type=float, default=600.0, help="wall limit")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all went well, 1 if a notebook failed, 2 for a wrong argument or missing file."""
    given = parser().parse_args(arguments)
    try:
        return _obey(given)
    except notebooks.NotebookFailed as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _obey(given: argparse.Namespace) -> int:
    if given.command == "reproduce":
        profile, seeds = profile_name(given.profile), seed_list(given.seeds)
        return int(bool(notebooks.reproduce(given.nb or None, profile, seeds, given.data or None)))
    if given.command == "run":
        wishes = settings(given.set)
        taken = set(wishes) & {"profile", "data", "seeds", "minutes", "root", "show", "bar"}
        if taken:
            raise ValueError(f"--set {sorted(taken)[0]}: that is an argument of its own, see `run --help`")
        if given.data:
            wishes["data"] = notebooks.data_place(given.data)
        if given.seeds:
            wishes["seeds"] = seed_list(given.seeds)
        profile = profile_name(given.profile)
        done = notebooks.run(given.name, profile, minutes=given.minutes, show=not given.quiet, **wishes)
        print(f"{done.name}  {done.minutes:.1f} min  {done.output}")
    elif given.command == "publish":
        for name in given.name:
            print(notebooks.publish(name))
    elif given.command == "navigation":
        print("changed:", ", ".join(notebooks.navigation()) or "none")
    elif given.command == "doctor":
        doctor()
    elif given.command == "data":
        fetch(given.name)
    elif given.command == "inspect":
        inspect(given)
    elif given.command == "label":
        label(given)
    elif given.command in ("export", "import"):
        transfer(given)
    elif given.command == "clients":
        clients(given)
    return 0


def console() -> None:
    """Entry point of the `fedal` command."""
    raise SystemExit(main())


if __name__ == "__main__":
    console()
