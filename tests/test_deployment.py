"""Real processes: a server and clients over TLS with registered keys, killed, broken off and started again.

What they compute is held to the plain loop, bit for bit; Flower's simulation as well.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("psutil")

from fedal_utils import papers, record
from fedal_utils.federation import experiment as alfl
from fedal_utils.flower import deployment as wire  # noqa: E402
from fedal_utils.flower import server_app as flower
from fedal_utils.flower import workspace as homes
from fedal_utils.record.files import load_state

NOTEBOOK = "60_real_clients"
SMALL = dict(
    scenes=(90, 20),
    initial_model_images=12,
    initial_model_iterations=30,
    initial_labels=6,
    query_size=6,
    cycles=2,
    rounds=3,
    iterations=4,
    batch=8,
)


@pytest.fixture(scope="module")
def settings():
    return papers.load(NOTEBOOK, "smoke", **SMALL)


@pytest.fixture(scope="module")
def plain(settings, tmp_path_factory):
    """The run folder of the plain loop, and its weights after each round."""
    root, study, after = tmp_path_factory.mktemp("plain"), alfl.prepare(settings), []
    for run in record.runs(settings, NOTEBOOK, root=root, plan=alfl.plan):
        clients, model = alfl.start(run, study)
        for cycle, round in run.rounds():
            for client in clients if round == 0 else ():
                alfl.ask(run, study, model, client, cycle)
            updates = alfl.train(run, study, model, clients, cycle, round)
            alfl.merge(run, model, clients, updates)
            alfl.commit(run, study, model, clients, updates, cycle, round)
            after.append(weights(run.folder)[1])
    return run.folder, after


def folder_of(place: Path) -> Path:
    return next((place / "server" / "runs").rglob("rounds.csv")).parent


def weights(folder: Path) -> tuple[int, dict]:
    """Rounds that are committed, and the global model after them."""
    kept = load_state(folder / "state.pt")
    return json.loads(kept["ledger"])["committed"], kept["state"]["model"]


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_nothing_left(deployment: flower.Deployment, ports: list[int]) -> None:
    assert deployment.stop() == [] and deployment.processes.alive() == []
    psutil = pytest.importorskip("psutil")
    here = str(deployment.place)
    for process in psutil.process_iter(["pid", "cmdline"]):
        assert here not in " ".join(process.info["cmdline"] or []), process
    assert not any(flower._listens(port) for port in ports)


def test_real_processes_lose_clients_and_the_server_and_come_to_the_end(settings, plain, tmp_path):
    place = tmp_path / "place"
    names = homes.deal(settings, place)
    assert names == ["00", "01", "02"]
    with flower.Deployment(place) as deployment:
        ports = [deployment.port, *(relay.port for relay in deployment.relays.values())]
        assert len(set(ports)) == 4

        # A node without a registered key, and a certificate that nobody here signed.
        private, _ = wire.node_key(deployment.folder / "keys" / "stranger")
        home = {"folder": str(place / "clients" / "00"), "name": "00"}
        deployment.start_node("stranger", private, home, deployment.port)
        with pytest.raises(Exception, match="certificate verify failed"):
            urllib.request.urlopen(f"https://127.0.0.1:{deployment.port}/health", context=ssl.create_default_context())

        seen, run = [], deployment.submit(settings, NOTEBOOK, timeout=20)
        with pytest.raises(RuntimeError, match="was killed"):
            for row in deployment.rounds(run, 200):
                seen.append((row["cycle"], row["round"]))
                if seen[-1] == (0, 0):
                    assert not deployment.processes.running("stranger")
                    assert "Failed to activate SuperNode" in deployment.processes.log("stranger")
                    deployment.processes.kill("server")  # and what runs in it: they have no chance to say anything
        assert seen[0] == (0, 0) and len(seen) < 6
        kept, after = plain
        committed, model = weights(folder_of(place))
        assert equal(model, after[committed - 1])
        assert (kept / "rounds.csv").read_text().startswith((folder_of(place) / "rounds.csv").read_text())

        deployment.restart()
        ports += [deployment.port, *(relay.port for relay in deployment.relays.values())]
        run = deployment.submit(settings, NOTEBOOK, timeout=20)
        for row in deployment.rounds(run, 200):
            seen.append((row["cycle"], row["round"]))
            if seen[-1] == (0, 1):
                committed, model = weights(folder_of(place))
                assert equal(model, after[committed - 1])  # as if nothing had happened
                deployment.processes.kill("00")
            if seen[-1] == (0, 2):
                deployment.start_client("00")
        assert sorted(set(seen)) == [(c, r) for c in range(2) for r in range(3)] and len(seen) == 6
        table = deployment.tables(settings, NOTEBOOK)
        traffic = deployment.traffic().set_index("client")
        assert_nothing_left(deployment, ports)

    lines = [(folder / "rounds.csv").read_text().splitlines() for folder in (folder_of(place), kept)]
    ours, theirs = ([line.rstrip(",") for line in part if line.startswith(("0,0,", "0,1,"))] for part in lines)
    assert ours == theirs and len(ours) == 8
    at = table.set_index(["cycle", "round", "client"])
    assert at.loc[(0, 2, "00"), "status"] == "no answer" and at.loc[(0, 2, "00"), "steps"] == 0
    assert at.loc[(0, 2, "server"), "steps"] == 8 and at.loc[(0, 2, "server"), "images"] == 18
    assert list(at.loc[(1, 2)].loc[["01", "02"], "images"]) == [12, 12]
    assert at.loc[(1, 2, "00"), "steps"] == 4  # it has come back
    assert not equal(weights(folder_of(place))[1], after[-1])

    # The byte meter counts packed models; the wire carries them, TLS, the app once, and Flower's own messages.
    metered = table[table["client"] == "01"][["bytes_up", "bytes_down"]].sum()
    assert metered["bytes_up"] < traffic.loc["01", "up"] < 1.3 * metered["bytes_up"] + 500_000
    assert metered["bytes_down"] < traffic.loc["01", "down"] < 1.3 * metered["bytes_down"] + 2_500_000


def test_the_simulation_is_the_plain_loop_bit_for_bit_from_the_command_line(plain, tmp_path):
    pytest.importorskip("ray")
    place, (kept, after) = tmp_path / "place", plain
    command = [sys.executable, "-m", "fedal_utils", "clients", "--profile", "smoke", "--place", str(place)]
    command += [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--simulation"], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cycle 2 round 3" in done.stdout
    for name in ("rounds.csv", "queries.csv"):
        assert (folder_of(place) / name).read_text() == (kept / name).read_text(), name
    assert equal(weights(folder_of(place))[1], after[-1])
    psutil = pytest.importorskip("psutil")
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(place) in " ".join(p.info["cmdline"] or [])]


def test_the_project_file_is_what_flower_wants(tmp_path, root):
    env = {**os.environ, "FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0"}
    command = [*flower._program(["flwr"]), "build", "--app", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing" not in done.stdout
    import zipfile

    with zipfile.ZipFile(next(tmp_path.glob("*.fab"))) as bundle:
        names = set(bundle.namelist())
    assert "fedal_utils/flower.py" in names and not any(name.startswith(("tests", "results", "data")) for name in names)
