"""A client: what it answers to the server's messages. An error goes to the server as text without paths."""

from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ..federation import pack, select, train_client, unpack
from ..training import TrainingDiverged
from .messages import DIVERGED, FAILED, Task, arrays_from, state_of, without_paths
from .workspace import Workspace

Handler = Callable[[Workspace, RecordDict], RecordDict]


def workspace_of(context: Context, place: str | Path | None = None) -> Workspace:
    """This node's folder: the one that its configuration names, or, simulated, the one of its number in the place."""
    node = context.node_config
    if "folder" in node:
        return Workspace(Path(str(node["folder"])))
    if place is not None and "partition-id" in node:
        return Workspace(sorted((Path(place) / "clients").iterdir())[int(node["partition-id"])])
    raise ValueError("the node's configuration names no folder: start it with --node-config 'folder=\"...\"'")


def select_and_annotate(workspace: Workspace, content: RecordDict) -> RecordDict:
    """Query with the model in the message and have the images annotated here; tells what was queried."""
    task = Task.of(content["task"])
    with workspace.experiment(task, state_of(content["arrays"]), trains=False) as experiment:
        (client,) = experiment.clients
        pool, chosen = client.pool, select(experiment, task.step, client)
        if len(chosen.positions):
            pool.label(chosen.positions, task.step.cycle, chosen.why)
    rows = pool.queries(task.step.cycle)
    answer = RecordDict({"counts": MetricRecord({**task.place(), "boxes": pool.cost().boxes})})
    if rows:
        said = {"ids": [row["id"] for row in rows], "scores": [float(row["score"]) for row in rows]}
        answer["said"] = ConfigRecord(said)
    return answer


def train(workspace: Workspace, content: RecordDict) -> RecordDict:
    """Train the model in the message on what is labelled here; the weights go back, what stays here is kept."""
    task, received = Task.of(content["task"]), state_of(content["arrays"])
    step, config = task.step, task.config
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with workspace.experiment(task, received, trains=True) as experiment:
        (client,) = experiment.clients
        if config.federation.reset_each_cycle and step.cycle > 0 and step.round == 0:
            client.optimizer_state = {}
        if step.head_only and not config.model.frozen:
            experiment.model.freeze_backbone()
        message = pack(received, config.federation.message_dtype)
        update = train_client(experiment, step, client, experiment.model, message)
        if experiment.method.strategy.compares_local():
            client.last_local_state = unpack(update.payload)
    counts = MetricRecord({**task.place(), "steps": update.steps, "loss": float(update.loss)})
    return RecordDict({"arrays": arrays_from(update.payload), "counts": counts})


def build(place: str | Path | None = None) -> ClientApp:
    """Flower's ClientApp; place: of simulated clients, whose nodes have no configuration."""
    client_app = ClientApp()

    def answering(handler: Handler) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            workspace = workspace_of(context, place)
            try:
                return Message(handler(workspace, message.content), reply_to=message)
            except Exception as error:  # an answer as well
                code = DIVERGED if isinstance(error, TrainingDiverged) else FAILED
                text = without_paths(f"{type(error).__name__}: {error}", workspace.folder, Path.home())
                return Message(Error(code, text), reply_to=message)

        return answer

    client_app.query("hello")(answering(lambda own, _: RecordDict({"said": ConfigRecord({"name": own.name})})))
    client_app.query("select")(answering(select_and_annotate))
    client_app.train()(answering(train))
    return client_app


app = build()
