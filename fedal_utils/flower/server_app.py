"""The server: the notebooks' loop, with clients that are elsewhere.

`start` gives the experiment of a run; with a `Line` to clients elsewhere it sends a step's queries and training as
messages. `serve` runs all methods of a config; `build` makes Flower's ServerApp of that.

A client's word is never the weight. An answer that does not come, an error, or an answer beyond what the server granted
costs the round that client and nothing else (on_failure='skip'); the record names it. A server that was killed goes on
from its run folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from .. import federation, papers, record
from ..config import Config
from ..federation import Client, ClientLost, Experiment, Setup, State, Step, Update, broadcast, pack, unpack
from ..sampling import Cost, Oracle
from ..training import STEPS
from . import messages, strategies
from .line import Line
from .messages import Answer, Task, arrays_from, arrays_of, without_paths
from .workspace import RemotePool, facts_of, server_setup

MOST_BOXES = 10_000  # that anybody draws in an image


class ServerExperiment(Experiment):
    """The notebooks' experiment with Flower's way to make one model of the updates; its clients are in this process."""

    def __init__(self, run: record.Run, setup: Setup, clients: Sequence[Client], oracle: Oracle | None = None):
        super().__init__(run, setup, clients, oracle)
        strategies.refuse(self.config, self.method.scheme.name, run.method)
        self.remembered: dict[str, State] = dict((run.resumed or {}).get("server", {}))

    def average(self, updates: Sequence[Update]) -> None:
        server = self.config.server
        few = server.server_strategy in strategies.ROBUST and len(updates) < 2 * server.num_byzantine + 1
        if few and self.config.federation.on_failure == "skip":
            return print(f"{self.run}: {len(updates)} updates are too few for {server.server_strategy}", flush=True)
        super().average(updates)

    def averaged(self, updates: Sequence[Update]) -> State:
        server, settings, number = self.config.server, self.config.federation, self.run.committed + 1
        if server.privacy == "none" and server.server_strategy in strategies.PLAIN:
            return super().averaged(updates)
        if server.privacy == "secure":
            raise ValueError("privacy='secure': clients of this process send their updates as they are")
        before = unpack(broadcast(self.model, settings.batch_norm, settings.message_dtype))  # what was sent
        seed = int(self.run.rng("noise", number).integers(1 << 32)) if server.privacy == "clip" else None
        return strategies.average(self.config, number, before, updates, self.remembered, seed)

    def log(self, step: Step, updates: Sequence[Update], more: dict | None = None) -> dict:
        return super().log(step, updates, {"server": self.remembered, **(more or {})})


class RemoteExperiment(ServerExperiment):
    """The same with clients elsewhere: a step's queries and training are messages on a `Line`."""

    screens_updates = True

    def __init__(self, run: record.Run, setup: Setup, line: Line):
        pools = [RemotePool(name, ids) for name, ids in line.clients.items()]
        super().__init__(run, setup, [Client(pool.client, pool) for pool in pools])
        check(self.config, [run.method])
        self.line, self._step, self._lost = line, None, {}  # of the latest step, clients whose query failed
        self._secure: State = {}
        self._richest = int((setup.test.labels.classes > 0).sum(1).max())  # boxes in an image of the server's
        for pool in pools if run.resumed else ():
            pool.tell(Cost(*run.resumed["told"][pool.client]), run.query_rows())

    def query(self, step: Step, client: Client) -> None:
        """One exchange for all clients that query in this step, at the first call; the others find it done."""
        if not self._begin(step):
            return
        settings, waiting = self.config.federation, {}
        message = broadcast(self.model, settings.batch_norm, settings.message_dtype)
        by_name = {client.name: client for client in step.querying}
        for name, client in by_name.items():
            stale = client.stale_global_state
            arrays = arrays_from(pack(stale, settings.message_dtype) if stale else message)
            waiting[name] = RecordDict({"task": self._task(step, client), "arrays": arrays})
        deadline = time.monotonic() + self.line.patience
        while waiting:
            for name, answer in self.line.exchange(messages.SELECT, waiting).items():
                if getattr(answer, "status", "") != "unanswered" or time.monotonic() > deadline:
                    del waiting[name]
                    self._lost |= self._take_queries(step, by_name[name], answer)
            time.sleep(min(5.0, self.line.patience) if waiting else 0)  # a person takes longer
        self._tell(step, self._lost)
        if self._lost and settings.on_failure == "stop":
            raise next(iter(self._lost.values()))

    def _begin(self, step: Step) -> bool:
        """True once a step, when whoever is new or back is greeted."""
        if self._step == (step.cycle, step.round):
            return False
        self._step, self._lost = (step.cycle, step.round), {}
        self.line.greet()
        return True

    def _task(self, step: Step, client: Client) -> Any:
        known, run = tuple(sorted({row["cycle"] for row in client.pool.rows})), self.run
        return Task(self.config, run.notebook, run.method, run.seed, self.setup.class_names, step, known).record()

    def _take_queries(self, step: Step, client: Client, answer: RecordDict | ClientLost) -> dict[str, ClientLost]:
        """Note what a client queried; or why it cannot be believed."""
        if isinstance(answer, ClientLost):
            return {client.name: answer}
        pool, before = client.pool, client.pool.cost()
        try:
            answer, unknown = Answer(answer, step), set(pool.ids) - {row["id"] for row in pool.rows}
            rows = answer.rows(step.cycle, client.name, unknown, federation.query_size(self, client, step.cycle))
            images = answer.whole("images", before.images, before.images + len(rows))
            boxes = answer.whole("boxes", before.boxes, before.boxes + MOST_BOXES * len(rows))
            seconds = answer.real("seconds", before.seconds, before.seconds + 86400.0 * len(rows))
        except ValueError as error:
            return {client.name: _refused(client, error)}
        pool.tell(Cost(images, boxes, seconds), rows)
        return {}

    def train_clients(self, step: Step, clients: Sequence[Client], message: bytes) -> dict[str, Update | Exception]:
        """What each of these clients sends, or why it sends nothing."""
        self._begin(step)
        sent: dict[str, Update | Exception] = {c.name: self._lost[c.name] for c in clients if c.name in self._lost}
        asked = {client.name: client for client in clients if client.name not in sent}
        if self.config.server.privacy == "secure":
            found = self._train_masked(step, asked, message)
        else:
            contents, arrays = {}, arrays_from(message)
            for name, client in asked.items():
                contents[name] = RecordDict({"task": self._task(step, client), "arrays": arrays})
                if step.optimizer_state == "travels" and client.optimizer_state:
                    contents[name]["optimizer"] = arrays_of(client.optimizer_state)
            kind = messages.CLIPPED if self.config.server.privacy == "clip" else messages.PLAIN
            answers = self.line.exchange(kind, contents)
            found = {name: self._update(step, asked[name], answer) for name, answer in answers.items()}
            found |= _odd_optimizers(found)
        self._tell(step, found)
        return sent | found

    def _update(self, step: Step, client: Client, answer: RecordDict | ClientLost) -> Update | ClientLost:
        """The client's answer as an update."""
        if isinstance(answer, ClientLost):
            return answer
        settings, optimizer = self.config.federation, b""
        keys = federation.sent_keys(self.model, settings.batch_norm)
        try:
            answer, like = Answer(answer, step), federation.state_of(self.model, keys)
            steps, loss = self._steps_and_loss(step, client, answer)
            payload = pack(answer.state(like), settings.message_dtype)
            if step.optimizer_state == "travels":
                before = int(client.optimizer_state.get(STEPS, 0))
                shapes = {name: value.shape for name, value in self.model.named_parameters()}
                optimizer = pack(answer.optimizer_state(self.config.training.optimizer, shapes, before + steps))
        except ValueError as error:
            return _refused(client, error)
        return Update(client.name, payload, *self._weight(client), steps, loss, optimizer)

    def _weight(self, client: Client) -> tuple[int, int]:
        """Images and boxes that a client counts for: those it was granted, and no more boxes than the server has seen
        in an image.
        """
        cost = client.pool.cost()
        return cost.images, min(cost.boxes, cost.images * self._richest)

    def _steps_and_loss(self, step: Step, client: Client, answer: Answer) -> tuple[int, float]:
        recipe, iterations = self.recipe(step)
        most = iterations or recipe.epochs * math.ceil(client.pool.cost().images / recipe.batch)
        return answer.whole("steps", 1, most), answer.real("loss")

    def _train_masked(self, step: Step, clients: Mapping[str, Client], message: bytes) -> dict[str, Update | Exception]:
        """The clients' part of a round by secure aggregation: one average, and of each client its steps and loss."""
        online, known = set(self.line.grid.get_node_ids()), self.line.nodes
        nodes = {known[name]: clients[name] for name in sorted(clients) if known.get(name) in online}
        told: dict[int, dict[str, Any]] = {}
        if len(nodes) >= strategies.LEAST:
            configs = {node: dict(self._task(step, client)) for node, client in nodes.items()}
            self._secure, told = strategies.secure_round(self.line.grid, configs, unpack(message), self.line.timeout)
        why = "client {}: no masked update of it was summed"
        sent: dict[str, Update | Exception] = {name: ClientLost(why.format(name), "failed") for name in clients}
        for node, counts in told.items():
            client, size = nodes[node], counts["bytes"]
            try:
                answer = Answer(RecordDict({"counts": MetricRecord(counts)}), step)
                steps, loss = self._steps_and_loss(step, client, answer)
                sent[client.name] = Update(client.name, b"", *self._weight(client), steps, loss, size=size)
            except (TypeError, ValueError) as error:
                sent[client.name] = _refused(client, error)
        return sent

    def averaged(self, updates: Sequence[Update]) -> State:
        return self._secure if self.config.server.privacy == "secure" else super().averaged(updates)

    def _tell(self, step: Step, results: Mapping[str, Update | Exception]) -> None:
        for lost in results.values():
            if isinstance(lost, ClientLost):
                print(f"{self.run}, cycle {step.cycle}, round {step.round}: nothing from {lost}", flush=True)

    def log(self, step: Step, updates: Sequence[Update], more: dict | None = None) -> dict:
        costs = {client.name: client.pool.cost() for client in self.clients}
        told = {name: [cost.images, cost.boxes, cost.seconds] for name, cost in costs.items()}
        return super().log(step, updates, {"told": told, **(more or {})})


def _refused(client: Client, error: Exception) -> ClientLost:
    text = without_paths(error)
    status = next((status for status in ("not finite", "wrong shape") if status in text), "refused")
    return ClientLost(f"client {client.name}: its answer cannot be used: {text}", status=status)


def _odd_optimizers(found: Mapping[str, Update | Exception]) -> dict[str, ClientLost]:
    """Clients whose optimizer state has other entries than most have: such cannot be averaged."""
    sent = {name: update for name, update in found.items() if isinstance(update, Update) and update.optimizer_state}
    keys = {name: frozenset(unpack(update.optimizer_state)) for name, update in sent.items()}
    usual = max(keys.values(), key=lambda own: (list(keys.values()).count(own), len(own)), default=None)
    why = "client {}: its optimizer state has other entries than the rest"
    return {name: ClientLost(why.format(name), "refused") for name, own in keys.items() if own != usual}


def check(config: Config, methods: Sequence[str] | None = None) -> None:
    """ValueError on what cannot be done with clients that are elsewhere."""
    for setting, wanted in (("classifier", ""), ("batch_norm", "average")):
        if (value := config.flat()[setting]) != wanted:
            raise ValueError(f"{setting}={value!r}: what it needs stays in one process; use the plain loop")
    for name in methods or config.methods:
        method = federation.method_of(name, config)
        strategies.refuse(config, method.scheme.name, name)
        if method.scheme.name in ("local-first", "centralised"):
            raise ValueError(f"method {name!r}: nothing is sent in {method.scheme.name!r}; use the plain loop")
        if any(need.startswith(("held_out", "committee", "hidden")) for need in method.strategy.needs):
            raise ValueError(f"method {name!r} needs images or models that a client does not have; use the plain loop")


def start(run: record.Run, setup: Setup, line: Line | None = None) -> ServerExperiment:
    """The experiment of a run, fresh or where it was broken off: its clients at the end of a line, or in this process.

    setup: with a line, what the server has (`server_setup`).
    """
    if line is not None:
        return RemoteExperiment(run, setup, line)
    here = federation.start(run, setup)
    return ServerExperiment(run, setup, here.clients, here.oracle)


def serve(grid: Grid, place: str | Path, config: Config, notebook: str, wait: float = 60.0, **patience: float) -> Line:
    """All methods of a config with the clients of a place, one after another, in the place's run folders.

    wait: seconds until all clients must have come. patience: timeout and patience, see `Line`.
    """
    place, facts = Path(place), facts_of(place)
    config = config.replace(seeds=(facts["dealt"]["seed"],))
    check(config)
    setup, line = server_setup(place, config), Line(grid, facts["clients"], **patience)
    line.meet(wait)
    for run in federation.runs(setup, notebook, root=place / "server" / "runs", progress=False):
        experiment = start(run, setup, line)
        for step in experiment.steps():
            for client in step.querying:
                experiment.query(step, client)
            updates = experiment.train(step)
            experiment.aggregate(step, updates)
            experiment.log(step, updates)
    return line


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """What `flwr run` starts, see [tool.flwr.app.config] in pyproject.toml."""
    said, error = context.run_config, ""
    place, notebook, settings = Path(str(said["place"])), str(said["notebook"]), json.loads(str(said["settings"]))
    try:
        dealt, profile = facts_of(place)["dealt"], settings.pop("profile", "smoke")
        dataset, _ = settings.pop("dataset", dealt["dataset"]), settings.pop("seeds", None)
        config = papers.load(notebook, profile, dataset, [dealt["seed"]], **settings)
        serve(grid, place, config, notebook, **{name: float(said[name]) for name in ("wait", "timeout", "patience")})
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}"
        raise
    finally:  # for who started it
        record.write_atomic(place / "server" / f"ended-{context.run_id}.json", json.dumps({"error": error}))
