"""Where the clients run: in this process, in Flower's simulation, or as processes of this machine, over TLS.

All three run `server_app.serve`, and return the root of the run folders.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import trustme
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from .. import record
from ..config import Config
from . import client_app
from .messages import message_of
from .server_app import check, serve
from .workspace import facts_of

Meddle = Callable[[Message], Message | None]


class InProcess:
    """What a `Line` needs of Flower's Grid, with clients in this process; messages cross as bytes.

    nodes: the folder of each. meddle: gives what arrives in the place of each message, or None where it is lost.
    """

    def __init__(self, app: ClientApp, nodes: Mapping[int, str], meddle: Meddle):
        self._app, self._meddle, self.message = app, meddle, message_of
        self._contexts = {node: Context(1, node, {"folder": nodes[node]}, RecordDict(), {}) for node in nodes}

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def send_and_receive(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            if (request := self._meddle(_carried(message))) is not None:
                answer = self._app(request, self._contexts[message.metadata.dst_node_id])
                replies.append(self._meddle(_carried(answer)))
        return [reply for reply in replies if reply is not None]


def _carried(message: Message) -> Message:
    """The message as it arrives: its content made anew of bytes."""

    def copy(part: Any) -> Any:
        children = {id_: copy(child) for id_, child in (part.children or {}).items()}
        return type(part).inflate(part.deflate(), children)

    return message if message.has_error() else Message(copy(message.content), metadata=message.metadata)


def in_process(
    config: Config, notebook: str, place: str | Path, meddle: Meddle = lambda message: message, **waiting: float
) -> Path:
    """The experiment with the clients of this place in this process; waiting: see `serve`, meddle: `InProcess`."""
    folders = [str(Path(place) / "clients" / name) for name in facts_of(place)["clients"]]
    grid = InProcess(client_app.build(), dict(enumerate(folders, start=101)), meddle)
    return serve(grid, place, config, notebook, **waiting)


def simulate(config: Config, notebook: str, place: str | Path) -> Path:
    """The experiment in Flower's simulation of the clients of this place; RuntimeError if it was not finished."""
    place, server = Path(place).absolute(), ServerApp()
    check(config)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, place, config, notebook)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client_app.build(place), len(facts_of(place)["clients"]), backend_config=resources)
    return _finished(config, notebook, place, "see what it said above")


def deployed(config: Config, notebook: str, place: str | Path, **waiting: float) -> Path:
    """The experiment with processes of this machine over TLS on free ports; RuntimeError if it was not finished."""
    check(config)
    place, package, bin_ = Path(place).absolute(), Path(__file__).parents[2], Path(sys.executable).parent
    folder = place / "deployment"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = f"{bin_}{os.pathsep}{os.environ.get('PATH', '')}"
    own = {"PATH": path, "PYTHONPATH": str(package), "FLWR_HOME": str(folder)}  # Flower's own files lie there, too
    with contextlib.ExitStack() as stack:

        def begin(program: str, name: str, *words: str) -> subprocess.Popen:
            log = stack.enter_context(open(folder / f"{name}.log", "wb"))
            how = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL, "cwd": folder}
            process = subprocess.Popen([str(bin_ / program), *words], env={**os.environ, **own}, **how)
            stack.callback(_end, process)
            return process

        _start(place, folder, begin)
        told = {"place": str(place), "notebook": notebook, "settings": json.dumps(config.flat()), **waiting}
        (folder / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()))
        begin("flwr", "run", "run", str(package), "fedal", "--run-config", str(folder / "run.toml"), "--stream").wait()
        return _finished(config, notebook, place, (folder / "run.log").read_text()[-2000:])


def _start(place: Path, folder: Path, begin: Callable[..., subprocess.Popen]) -> None:
    """Flower's server, then a node for each client, which checks the server by the certificate."""
    names, authority = list(facts_of(place)["clients"]), trustme.CA()
    port, *others = _free_ports(1 + len(names))
    own = authority.issue_cert("localhost", "127.0.0.1")
    ca, certificate, key = (str(folder / f"{name}.pem") for name in ("ca", "certificate", "key"))
    authority.cert_pem.write_to_path(ca)
    own.cert_chain_pems[0].write_to_path(certificate)
    own.private_key_pem.write_to_path(key)
    connection = f'address = "127.0.0.1:{port}"\nroot-certificates = {json.dumps(ca)}\n'
    (folder / "config.toml").write_text(f'[superlink]\ndefault = "fedal"\n[superlink.fedal]\n{connection}')
    words = ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certfile", ca]
    words += ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    server = begin("flower-superlink", "server", *words)
    while not _listens(port):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended: {(folder / 'server.log').read_text()[-2000:]}")
        time.sleep(0.2)
    for name, free in zip(names, others, strict=True):
        words = ["--node-config", f"folder={json.dumps(str(place / 'clients' / name))}", "--port", str(free)]
        begin("flower-supernode", name, "--root-certificates", ca, "--superlink", f"127.0.0.1:{port}", *words)


def _end(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def _finished(config: Config, notebook: str, place: Path, said: str) -> Path:
    root, seed = place / "server" / "runs", facts_of(place)["dealt"]["seed"]
    if missing := record.missing(config, notebook, config.methods, [seed], root):
        raise RuntimeError(f"Flower did not finish {missing}: {said}")
    return root


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
