"""`serve` with clients in this process, in Flower's simulation, or as processes of this machine, over TLS."""

import contextlib
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import trustme
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from .. import record
from ..config import Config
from . import client_app
from .server_app import check, serve
from .workspace import facts_of

Meddle = Callable[[Message], Message | None]


class InProcess:
    """A Grid of clients in this process; meddle: gives what arrives in the place of a message, None = it is lost."""

    def __init__(self, place: str | Path, meddle: Meddle):
        self._app, self._meddle = client_app.build(place), meddle
        nodes = range(101, 101 + len(facts_of(place)["clients"]))
        self._contexts = {n: Context(1, n, {"partition-id": n - 101}, RecordDict(), {}) for n in nodes}

    def message(self, content: RecordDict, node: int, kind: str, ttl: float) -> Message:
        """Flower's shorter constructor works in its processes only."""
        return Message(content, metadata=Metadata(1, "", 1, node, "", "", time.time(), ttl, kind))

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def send_and_receive(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            if (request := self._meddle(copy.deepcopy(message))) is not None:
                answer = self._app(request, self._contexts[message.metadata.dst_node_id])
                replies.append(self._meddle(answer))
        return [reply for reply in replies if reply is not None]


def in_process(
    config: Config, notebook: str, place: str | Path, meddle: Meddle = lambda message: message, **waiting: float
) -> Path:
    """The experiment with the clients of this place in this process; meddle: see `InProcess`, waiting: see `serve`."""
    return serve(InProcess(place, meddle), place, config, notebook, **waiting)


def simulate(config: Config, notebook: str, place: str | Path) -> Path:
    """The experiment in Flower's simulation of the clients of this place; RuntimeError if it was not finished."""
    place, server = Path(place).absolute(), ServerApp()
    check(config)
    server.main()(lambda grid, context: serve(grid, place, config, notebook))
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client_app.build(place), len(facts_of(place)["clients"]), backend_config=resources)
    return _finished(config, notebook, place, "see what it said above")


def deployed(config: Config, notebook: str, place: str | Path, **waiting: float) -> Path:
    """The experiment with processes of this machine over TLS on free ports; RuntimeError if it was not finished."""
    check(config)
    place, package, bin_ = Path(place).absolute(), Path(__file__).parents[2], Path(sys.executable).parent
    folder, authority = place / "deployment", trustme.CA()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = f"{bin_}{os.pathsep}{os.environ.get('PATH', '')}"
    own = {"PATH": path, "PYTHONPATH": str(package), "FLWR_HOME": str(folder)}  # Flower's own files lie there, too
    ca, certificate, key = (str(folder / f"{name}.pem") for name in ("ca", "certificate", "key"))
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(ca)
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    with contextlib.ExitStack() as stack:

        def begin(program: str, name: str, *words: str) -> subprocess.Popen:
            log = stack.enter_context(open(folder / f"{name}.log", "wb"))
            how = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL, "cwd": folder}
            process = subprocess.Popen([str(bin_ / program), *words], env={**os.environ, **own}, **how)
            stack.callback(_end, process)
            return process

        names = list(facts_of(place)["clients"])
        port, *others = _free_ports(1 + len(names))
        address = f"127.0.0.1:{port}"
        connection = f'address = "{address}"\nroot-certificates = {json.dumps(ca)}\n'
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
            begin("flower-supernode", name, "--root-certificates", ca, "--superlink", address, *words)
        told = {"place": str(place), "notebook": notebook, "settings": json.dumps(config.flat()), **waiting}
        (folder / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()))
        begin("flwr", "run", "run", str(package), "fedal", "--run-config", str(folder / "run.toml"), "--stream").wait()
        return _finished(config, notebook, place, (folder / "run.log").read_text()[-2000:])


def _end(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _finished(config: Config, notebook: str, place: Path, said: str) -> Path:
    root = place / "server" / "runs"
    if missing := record.missing(config, notebook, config.methods, [facts_of(place)["seed"]], root):
        raise RuntimeError(f"Flower did not finish {missing}: {said}")
    return root


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
