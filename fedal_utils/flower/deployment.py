"""Where the clients run: in this process, in Flower's simulation, or as processes of this machine, over TLS.

All three run `server_app.serve`; `in_process` sends every message through Flower's bytes and starts at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import trustme
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from .. import record
from ..config import Config
from . import client_app
from .line import Line
from .messages import FAILED
from .server_app import check, serve
from .strategies import message_of, quietly
from .workspace import facts_of

ALONE = "--disable-runtime-dependency-installation"  # else our dependencies are installed once more, for each run
ONE_PORT = tuple(map(int, version("flwr").split(".")[:2])) >= (1, 40)  # for all that a server hears
Meddle = Callable[[Message], Message | None]


class InProcess:
    """What a `Line` needs of Flower's Grid, with a ClientApp in this process for each node.

    Messages cross as bytes, in the form in which they travel. nodes: the configuration of each. meddle: sees each
    message as it arrives, and gives what arrives in its place, or None where it is lost.
    """

    def __init__(
        self, app: ClientApp, nodes: Mapping[int, Mapping[str, Any]], meddle: Meddle = lambda message: message
    ):
        self._app, self._meddle = app, meddle
        self._replies: dict[str, Message] = {}
        self._contexts = {node: Context(1, node, dict(config), RecordDict(), {}) for node, config in nodes.items()}

    def message(self, content: RecordDict, node: int, kind: str, ttl: float) -> Message:
        return message_of(content, node, kind, ttl, str(uuid.uuid4()))

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        ids = [message.metadata.message_id for message in messages]
        for id_, message in zip(ids, messages, strict=True):
            request = self._meddle(_carried(message))
            reply = None if request is None else self._meddle(_carried(self._answer(request)))
            self._replies |= {} if reply is None else {id_: reply}
        return ids

    def pull_messages(self, message_ids: Sequence[str]) -> list[Message]:
        return [self._replies.pop(id_) for id_ in message_ids if id_ in self._replies]

    def _answer(self, request: Message) -> Message:
        try:
            return self._app(request, self._contexts[request.metadata.dst_node_id])
        except Exception as error:  # as Flower's own node does
            return Message(Error(FAILED, f"{type(error)}:<'{error}'>"), reply_to=request)


def _carried(message: Message) -> Message:
    """The message as it arrives: its content made anew of bytes."""

    def copy(part: Any) -> Any:
        children = {id_: copy(child) for id_, child in (part.children or {}).items()}
        return type(part).inflate(part.deflate(), children)

    return message if message.has_error() else Message(copy(message.content), metadata=message.metadata)


def in_process(
    config: Config,
    notebook: str,
    place: str | Path,
    nodes: Mapping[str, Mapping[str, Any]] | None = None,
    meddle: Meddle = lambda message: message,
    **waiting: float,
) -> Line:
    """The experiment with the clients of this place, in this process; its line tells the traffic.

    nodes: what nodes are told beside their folder, by client.
    meddle: see `InProcess`.
    waiting: see `server_app.serve`.
    """
    told = {name: {"folder": str(Path(place) / "clients" / name)} for name in facts_of(place)["clients"]}
    told = {number: told[name] | dict((nodes or {}).get(name, {})) for number, name in enumerate(told, start=101)}
    with quietly():
        return serve(InProcess(client_app.build(), told, meddle), place, config, notebook, **waiting)


def simulate(configs: Sequence[Config], notebook: str, place: str | Path, cpus: int = 1) -> Path:
    """The experiments, one after another, in Flower's simulation of the clients of this place; root of the run folders.

    cpus: of each of the workers that play the clients. RuntimeError if a run was not finished.
    """
    place, server = Path(place).absolute(), ServerApp()
    root, facts = place / "server" / "runs", facts_of(place)
    for config in configs:
        check(config)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for config in configs:
            serve(grid, place, config, notebook)

    resources = {"client_resources": {"num_cpus": cpus, "num_gpus": 0.0}}
    with quietly():
        run_simulation(server, client_app.build(place), len(facts["clients"]), backend_config=resources)
    for config in configs:
        if missing := record.missing(config, notebook, config.methods, [facts["dealt"]["seed"]], root):
            raise RuntimeError(f"the simulation did not finish {missing}: see what Flower said above")
    return root


class Deployment:
    """A server and a node for each client of a place, as processes of this machine, over TLS on free ports.

    Certificates are made at each start, and each node checks the server by them; nodes need no key of their own, so
    this is for the loopback. nodes: what nodes are told beside their folder, by client. Use it as a context manager:
    whatever happens, no process is left behind.
    """

    def __init__(self, place: str | Path, nodes: Mapping[str, Mapping[str, Any]] | None = None):
        self.place, self.nodes = Path(place).absolute(), nodes or {}
        self.folder = self.place / "deployment"
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Deployment:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "home").mkdir(parents=True)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes, and what they have started."""
        family: list[psutil.Process] = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += [*(parent := psutil.Process(process.pid)).children(recursive=True), parent]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)

    def _start(self) -> None:
        names, authority = list(facts_of(self.place)["clients"]), trustme.CA()
        port, fleet, *others = _free_ports(2 + len(names))
        own = authority.issue_cert("localhost", "127.0.0.1")
        pem = {"ca": authority.cert_pem, "key": own.private_key_pem, "certificate": own.cert_chain_pems[0]}
        for name, blob in pem.items():
            blob.write_to_path(str(self.folder / f"{name}.pem"))
        address, files = f"127.0.0.1:{port}", {name: str(self.folder / f"{name}.pem") for name in pem}
        connection = {"address": address, "root-certificates": files["ca"]}
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in connection.items()]
        text = "".join(['[superlink]\ndefault = "fedal"\n[superlink.fedal]\n', *lines])
        (self.folder / "home" / "config.toml").write_text(text)
        tls = ["--ssl-certfile", files["certificate"], "--ssl-keyfile", files["key"], "--ssl-ca-certfile", files["ca"]]
        more = [ALONE] if ONE_PORT else [ALONE, "--fleet-api-address", f"127.0.0.1:{fleet}"]
        self._begin("flower-superlink", "server", *tls, "--host", "127.0.0.1", "--port", str(port), *more)
        while not _listens(port):
            if self.processes[0].poll() is not None:
                raise RuntimeError(f"the server ended: {(self.folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.2)
        for name, free in zip(names, others, strict=True):
            told = {"folder": str(self.place / "clients" / name), "name": name, **self.nodes.get(name, {})}
            words = ["--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in told.items())]
            words += ["--root-certificates", files["ca"], "--superlink", address if ONE_PORT else f"127.0.0.1:{fleet}", "--port", str(free)]
            self._begin("flower-supernode", name, *words)

    def run(self, config: Config, notebook: str, seconds: float = 600.0, **waiting: float) -> Iterator[dict[str, Any]]:
        """Start the experiment (`flwr run`); the server's row of each round that is committed, until the end.

        seconds: without a new round, until TimeoutError. waiting: see `server_app.serve`. RuntimeError with the run's
        own words if it fails.
        """
        check(config)
        told = {"place": str(self.place), "notebook": notebook, "settings": json.dumps(config.flat())}
        told |= {"wait": 60.0, "timeout": 600.0, "patience": 0.0, **waiting}
        (self.folder / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()))
        for old in (self.place / "server").glob("ended-*.json"):
            old.unlink()
        app = str(Path(__file__).parents[2])
        submitted = self._begin("flwr", "submit", "run", app, "fedal", "--run-config", str(self.folder / "run.toml"))
        if submitted.wait():
            raise RuntimeError(f"flwr run failed: {(self.folder / 'submit.log').read_text()[-2000:]}")
        seen, latest, seed = 0, time.monotonic(), facts_of(self.place)["dealt"]["seed"]
        runs = [record.Run(config, notebook, method, seed, self.place / "server" / "runs") for method in config.methods]
        while True:
            ended = list((self.place / "server").glob("ended-*.json"))  # before the rows: none is missed
            rows = [row for run in runs for row in _rows(run.folder / "rounds.csv")]
            yield from rows[seen:]
            latest, seen = (latest if seen == len(rows) else time.monotonic()), len(rows)
            if ended:
                if error := json.loads(ended[0].read_text())["error"]:
                    raise RuntimeError(f"the run failed: {error}")
                return
            if time.monotonic() - latest > seconds:
                raise TimeoutError(f"no new round within {seconds:.0f} s; see {self.folder}/*.log")
            time.sleep(0.5)

    def _begin(self, program: str, name: str, *words: str) -> subprocess.Popen:
        """A process of a program beside this Python; Flower's own files go to our folder."""
        bin_, package = Path(sys.executable).parent, Path(__file__).parents[2]
        ours = {"FLWR_HOME": str(self.folder / "home"), "PYTHONPATH": str(package)}
        ours["PATH"] = f"{bin_}{os.pathsep}{os.environ.get('PATH', '')}"
        with open(self.folder / f"{name}.log", "ab") as log:
            how = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL, "cwd": self.folder}
            process = subprocess.Popen([str(bin_ / program), *words], env={**os.environ, **ours}, **how)
        self.processes.append(process)
        return process


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _rows(file: Path) -> list[dict[str, Any]]:
    """The server's rows of a run so far."""
    table = pd.read_csv(file, dtype={"client": str}) if file.is_file() else pd.DataFrame({"client": []})
    return table[table["client"] == "server"].to_dict("records")
