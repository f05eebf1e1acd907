"""The server: the notebooks' loop, with clients that are elsewhere; a client's word is never the weight.

With on_failure='skip' no answer, an error, or more than was granted costs the round that client and nothing else.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from .. import federation, papers, record
from ..config import Config
from ..federation import Client, ClientLost, Experiment, Setup, Step, Update, broadcast, pack
from . import messages
from .line import Line
from .messages import Answer, Task, arrays_from
from .workspace import RemotePool, facts_of, server_setup

MOST_BOXES = 10_000  # that anybody draws in an image


class RemoteExperiment(Experiment):
    """The notebooks' experiment with clients elsewhere: a step's queries and training are messages on a `Line`."""

    def __init__(self, run: record.Run, setup: Setup, line: Line):
        pools = [RemotePool(name, ids, run.config.query) for name, ids in line.clients.items()]
        super().__init__(run, setup, [Client(pool.client, pool) for pool in pools])
        self.line, self._lost = line, {}  # of the latest step, clients whose query failed
        for pool in pools if run.resumed else ():
            pool.boxes = run.resumed["boxes"][pool.client]
            pool.rows = [row for row in run.query_rows() if row["client"] == pool.client]

    def query(self, step: Step, client: Client) -> None:
        """One exchange for all clients that query in this step, at the first call; the others find it done."""
        if client is not step.querying[0]:
            return
        self.line.greet()
        dtype, contents = self.config.federation.message_dtype, {}
        message = broadcast(self.model, dtype)
        by_name = {client.name: client for client in step.querying}
        for name, client in by_name.items():
            stale = client.stale_global_state
            arrays = arrays_from(pack(stale, dtype) if stale else message)
            contents[name] = RecordDict({"task": self._task(step, client), "arrays": arrays})

        def note(name: str, answer: Answer) -> None:
            pool, most = by_name[name].pool, federation.query_size(self, by_name[name], step.cycle)
            rows = answer.rows(step.cycle, name, set(pool.ids) - {row["id"] for row in pool.rows}, most)
            pool.boxes = answer.number("boxes", int, pool.boxes, pool.boxes + MOST_BOXES * len(rows))
            pool.rows += rows

        noted = self.line.exchange(messages.SELECT, contents, step, note)
        self._lost = {name: answer for name, answer in noted.items() if isinstance(answer, ClientLost)}
        if self._lost and self.config.federation.on_failure == "stop":
            raise next(iter(self._lost.values()))

    def _task(self, step: Step, client: Client) -> ConfigRecord:
        run, names = self.run, self.setup.class_names
        return Task(self.config, run.notebook, run.method, run.seed, names, step, tuple(client.pool.rows)).record()

    def train_clients(self, step: Step, clients: Sequence[Client], message: bytes) -> dict[str, Update | Exception]:
        """What each of these clients sends, or why it sends nothing; it weighs the images that it was granted."""
        if not step.querying:
            self.line.greet()
            self._lost = {}
        (recipe, iterations), dtype = self.recipe(step), self.config.federation.message_dtype
        like = federation.state_of(self.model, federation.sent_keys(self.model))
        asked, arrays = {c.name: c for c in clients if c.name not in self._lost}, arrays_from(message)
        contents = {n: RecordDict({"task": self._task(step, c), "arrays": arrays}) for n, c in asked.items()}

        def update(name: str, answer: Answer) -> Update:
            cost = asked[name].pool.cost()
            steps = answer.number("steps", int, 1, iterations or recipe.epochs * math.ceil(cost.images / recipe.batch))
            payload, loss = pack(answer.state(like), dtype), answer.number("loss", float, -1e30, 1e30)
            return Update(name, payload, cost.images, cost.boxes, steps, loss)

        return self._lost | self.line.exchange(messages.TRAIN, contents, step, update)

    def log(self, step: Step, updates: Sequence[Update], more: dict | None = None) -> dict:
        """As in the plain loop; the resume point also has the boxes that the clients drew."""
        return super().log(step, updates, {"boxes": {client.name: client.pool.boxes for client in self.clients}})


def check(config: Config) -> None:
    """ValueError on what cannot be done with clients that are elsewhere."""
    refused = {
        "classifier": config.model.classifier,  # is trained together with those of other clients
        "optimizer_state": config.federation.optimizer_state == "travels",
        "aggregation_weights": config.federation.aggregation_weights == "boxes",  # a client's word is never the weight
    }
    if wrong := [f"{name}={config.flat()[name]!r}" for name, holds in refused.items() if holds]:
        raise ValueError(f"{' and '.join(wrong)} cannot be had with clients elsewhere; use the plain loop")
    for name in config.methods:
        method = federation.method_of(name, config)
        if method.scheme.name in ("local-first", "centralised", "accumulate"):
            raise ValueError(f"method {name!r} is for one process; use the plain loop")
        if any(need.startswith(("held_out", "committee", "hidden")) for need in method.strategy.needs):
            raise ValueError(f"method {name!r} needs images or models that a client does not have; use the plain loop")


def serve(
    grid: Grid, place: str | Path, config: Config, notebook: str, wait: float = 60.0, timeout: float = 600.0
) -> Path:
    """All methods of a config with the clients of a place, one after another; the root of the run folders.

    grid: Flower's connection to the clients.
    place: where `deal` handed the data out.
    config, notebook: which runs; their seed is the place's.
    wait: seconds until all clients must have come.
    timeout: seconds until a client must have answered a message.
    """
    facts, root = facts_of(place), Path(place) / "server" / "runs"
    config = config.replace(seeds=(facts["dealt"]["seed"],))
    check(config)
    setup, line = server_setup(place, config), Line(grid, facts["clients"], timeout)
    line.meet(wait)
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
    dealt, profile = facts_of(place)["dealt"], settings.pop("profile", "smoke")
    dataset, _ = settings.pop("dataset", dealt["dataset"]), settings.pop("seeds", None)
    config = papers.load(notebook, profile, dataset, [dealt["seed"]], **settings)
    serve(grid, place, config, notebook, float(said["wait"]), float(said["timeout"]))
