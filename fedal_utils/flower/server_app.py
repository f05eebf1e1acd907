"""The server: the notebooks' loop, with clients that are elsewhere; a client's word is never the weight.

With on_failure='skip' no answer, an error, or more than was granted costs the round that client and nothing else.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from .. import federation, papers, record
from ..config import Config, QueryConfig
from ..federation import Client, ClientLost, Experiment, Setup, Step, Update, pack
from ..sampling import Cost, Pool
from .messages import DIVERGED, HELLO, SELECT, TRAIN, Answer, arrays_from, without_paths
from .workspace import facts_of, server_setup

MOST_BOXES = 10_000  # that anybody draws in an image


class Line:
    """The connection to the clients: name -> the ids that it holds; timeout: seconds that a message waits."""

    def __init__(self, grid: Grid, clients: Mapping[str, Sequence[str]], timeout: float):
        self.grid, self.clients, self.timeout = grid, dict(clients), timeout
        self.nodes: dict[str, int] = {}
        self._refused: set[int] = set()  # nodes that are nobody

    def greet(self) -> int:
        """Ask nodes that are new who they are. A name is the first one's that claims it, while that is there."""
        online = set(self.grid.get_node_ids())
        new = online - set(self.nodes.values()) - self._refused
        for node, answer in self.send(HELLO, {node: RecordDict() for node in sorted(new)}).items():
            if not isinstance(answer, RecordDict):
                continue  # asked again in the next round
            said = str(answer.get("said", {}).get("name"))
            if said in self.clients and self.nodes.get(said) not in online:
                self.nodes[said] = node
            else:
                print(f"a node was refused that claims to be client {without_paths(said)!r}", flush=True)
                self._refused.add(node)
        return len(self.nodes)

    def send(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, RecordDict | tuple[str, str]]:
        """The answers by node, or (status, why) there is none."""
        make = getattr(self.grid, "message", Message)  # a grid in this process has messages of its own
        sent = [make(content, node, kind, ttl=self.timeout + 5) for node, content in contents.items()]
        answers = dict.fromkeys(contents, ("no answer", f"no answer within {self.timeout:.0f} s"))
        for reply in self.grid.send_and_receive(sent, timeout=self.timeout) if sent else ():
            if (node := reply.metadata.src_node_id) in answers and reply.has_content():
                answers[node] = reply.content
            elif node in answers:
                status = "diverged" if reply.error.code == DIVERGED else "failed"
                answers[node] = (status, reply.error.reason or "no reason")
        return answers


class RemoteOracle:
    """In the place of an Oracle that is at a client: what it tells of the boxes that it drew."""

    def __init__(self, query: QueryConfig):
        self.query, self.boxes = query, 0

    def annotate(self, index: np.ndarray, cycle: int = 0, scores: Sequence[float] | None = None) -> np.ndarray:
        return np.ones(len(index), dtype=bool)

    def cost(self, index: np.ndarray) -> Cost:
        seconds = self.query.seconds_per_image * len(index) + self.query.seconds_per_box * self.boxes
        return Cost(len(index), self.boxes, seconds)


class RemoteExperiment(Experiment):
    """The notebooks' experiment with clients elsewhere: a step's queries and training are messages on a `Line`."""

    def __init__(self, run: record.Run, setup: Setup, line: Line):
        self.line, self._lost, clients = line, {}, []
        for name, ids in line.clients.items():
            pool = Pool(name, SimpleNamespace(ids=ids), RemoteOracle(run.config.query), range(len(ids)))
            if run.resumed:
                pool.replay(run.query_rows())
                pool.oracle.boxes = run.resumed["boxes"][name]
            clients.append(Client(name, pool))
        super().__init__(run, setup, clients)

    def query(self, step: Step, client: Client) -> None:
        """One exchange for all clients that query in this step, at the first call; the others find it done."""
        if client is not step.querying[0]:
            return
        model, dtype = federation.state_of(self.model), self.config.federation.message_dtype
        payloads = {one.name: pack(one.stale_global_state or model, dtype) for one in step.querying}

        def note(client: Client, answer: Answer) -> None:
            pool, oracle = client.pool, client.pool.oracle
            allowed = {pool.ids[place] for place in pool.unlabelled()}
            rows = answer.rows(client.name, allowed, federation.query_size(self, client, step.cycle))
            oracle.boxes = answer.number("boxes", int, oracle.boxes, oracle.boxes + MOST_BOXES * len(rows))
            pool.replay(rows)

        noted = self._exchange(SELECT, step, payloads, note)
        self._lost = {name: answer for name, answer in noted.items() if isinstance(answer, ClientLost)}

    def train_clients(self, step: Step, clients: Sequence[Client], message: bytes) -> dict[str, Update | Exception]:
        """What each of these clients sends, or why it sends nothing; it weighs the images that it was granted."""
        (recipe, iterations), dtype = self.recipe(step), self.config.federation.message_dtype
        like = federation.state_of(self.model)
        lost, self._lost = self._lost, {}  # whose query failed in this step

        def update(client: Client, answer: Answer) -> Update:
            cost = client.pool.cost()
            steps = answer.number("steps", int, 1, iterations or recipe.epochs * math.ceil(cost.images / recipe.batch))
            payload, loss = pack(answer.state(like), dtype), answer.number("loss", float, -1e30, 1e30)
            return Update(client.name, payload, cost.images, cost.boxes, steps, loss)

        asked = {client.name: message for client in clients if client.name not in lost}
        return lost | self._exchange(TRAIN, step, asked, update)

    def _exchange(
        self, kind: str, step: Step, payloads: Mapping[str, bytes], read: Callable[[Client, Answer], Any]
    ) -> dict[str, Any | ClientLost]:
        """Send these clients a task and a model; by name what `read` makes of the answer, or why there is none."""
        self.line.greet()
        online, run, contents, found = set(self.line.grid.get_node_ids()), self.run, {}, {}
        task = {"config": self.config.flat(), "notebook": run.notebook, "method": run.method, "seed": run.seed}
        task["step"] = {k: v for k, v in vars(step).items() if k not in ("participants", "querying")}
        asked = [client for client in self.clients if client.name in payloads]
        for client in asked:
            rows = [row for cycle in range(step.cycle + 1) for row in client.pool.queries(cycle)]
            told = json.dumps({**task, "classes": self.setup.class_names, "queries": rows})
            content = {"task": ConfigRecord({"json": told}), "arrays": arrays_from(payloads[client.name])}
            if (node := self.line.nodes.get(client.name)) in online:
                contents[node] = RecordDict(content)
        answers = self.line.send(kind, contents)
        for client in asked:
            answer = answers.get(self.line.nodes.get(client.name), ("away", "it is not there"))
            try:
                if isinstance(answer, RecordDict):
                    found[client.name] = read(client, Answer(answer, step))
                    continue
                status, why = answer
            except ValueError as error:
                why = f"its answer cannot be used: {error}"
                status = next((word for word in ("not finite", "wrong shape") if word in why), "refused")
            found[client.name] = ClientLost(f"client {client.name}: {without_paths(why)} ({kind})", status)
            print(f"nothing from {found[client.name]}", flush=True)
        return found

    def log(self, step: Step, updates: Sequence[Update], more: dict | None = None) -> dict:
        """As in the plain loop; the resume point also has the boxes that the clients drew."""
        return super().log(step, updates, {"boxes": {client.name: client.pool.oracle.boxes for client in self.clients}})


def check(config: Config) -> None:
    """ValueError on what cannot be done with clients that are elsewhere."""
    travels, boxes = config.federation.optimizer_state == "travels", config.federation.aggregation_weights == "boxes"
    if config.model.classifier or travels or boxes:
        refused = "a classifier, optimizer_state='travels' and aggregation_weights='boxes'"
        raise ValueError(f"{refused} cannot be had with clients elsewhere: use the plain loop")
    for name in config.methods:
        method = federation.method_of(name, config)
        needs = any(need.startswith(("held_out", "committee", "hidden")) for need in method.strategy.needs)
        if needs or method.scheme.name in ("local-first", "centralised", "accumulate"):
            raise ValueError(f"method {name!r} needs what a client does not have: use the plain loop")


def serve(
    grid: Grid, place: str | Path, config: Config, notebook: str, wait: float = 60.0, timeout: float = 600.0
) -> Path:
    """All methods of a config with the clients of a place, one after another; the root of the run folders.

    grid: Flower's connection to the clients. place: where `deal` handed the data out; its seed is that of the runs.
    wait, timeout: seconds until all clients must have come, until a client must have answered.
    """
    facts, root = facts_of(place), Path(place) / "server" / "runs"
    config = config.replace(seeds=(facts["seed"],))
    check(config)
    setup, line = server_setup(place, config), Line(grid, facts["clients"], timeout)
    deadline = time.monotonic() + wait
    while line.greet() < len(line.clients) and time.monotonic() < deadline:
        time.sleep(0.2)
    if not line.nodes:
        raise TimeoutError(f"no client of {', '.join(line.clients)} came within {wait:.0f} s")
    for run in federation.runs(setup, notebook, root=root):
        for _ in RemoteExperiment(run, setup, line).advance():
            pass
    return root


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """What `flwr run` starts, see [tool.flwr.app.config] in pyproject.toml."""
    said = context.run_config
    place, notebook, settings = Path(str(said["place"])), str(said["notebook"]), json.loads(str(said["settings"]))
    settings.pop("seeds", None)
    profile, dataset = settings.pop("profile", "smoke"), settings.pop("dataset", facts_of(place)["dealt"]["dataset"])
    config = papers.load(notebook, profile, dataset, **settings)
    serve(grid, place, config, notebook, float(said["wait"]), float(said["timeout"]))
