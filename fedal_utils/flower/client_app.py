"""A client: what it answers to the server's messages, with its images, labels and states in a folder of its own.

`build` makes Flower's ClientApp; `app` is the one that `flwr run` starts. Privacy is Flower's own: its clipping mod
cuts an update, its SecAgg+ mod masks it; neither is changed. An error goes to the server as text without paths.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod

from .. import labelling, training
from ..federation import State, Update, pack, select, train_client, unpack
from .messages import DIVERGED, FAILED, UNANSWERED, Task, arrays_from, state_of, without_paths
from .workspace import Workspace


def workspace_of(context: Context, place: str | Path | None = None) -> Workspace:
    """This node's folder: the one that its configuration names, or, simulated, the one of its number in the place."""
    node = context.node_config
    if "folder" in node:
        folder = Path(str(node["folder"]))
    elif place is not None and "partition-id" in node:
        folder = sorted((Path(place) / "clients").iterdir())[int(node["partition-id"])]
    else:
        raise ValueError("the node's configuration names no folder: start it with --node-config 'folder=\"...\"'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Workspace(folder, str(node.get("name", folder.name)), node.get("annotator") == "person", device)


def hello(workspace: Workspace, content: RecordDict) -> RecordDict:
    """Who this is."""
    return RecordDict({"said": ConfigRecord({"name": workspace.name})})


def select_and_annotate(workspace: Workspace, content: RecordDict) -> RecordDict:
    """Query with the model in the message and have the answers annotated here; tells what was queried, and its cost."""
    task = Task.of(content["task"])
    step, received = task.step, state_of(content["arrays"])
    with workspace.experiment(task, received, trains=False) as experiment:
        (client,) = experiment.clients
        pool = client.pool
        rows = [row for row in workspace.queries(task) if row["cycle"] == step.cycle]
        if not rows:  # else this message was sent before
            chosen = select(experiment, step, client)
            picked = zip(chosen.positions.tolist(), chosen.why.tolist(), strict=True)
            rows = [{"cycle": step.cycle, "client": client.name, "id": pool.ids[p], "score": why} for p, why in picked]
        workspace.keep_queries(task, rows)
        workspace.keep(task, experiment, trains=False)
        pool.replay(rows)
        cost, rows = pool.cost(), pool.queries(step.cycle)
    counts = _counts(task, images=cost.images, boxes=cost.boxes, seconds=float(cost.seconds))
    said = {"ids": [row["id"] for row in rows], "scores": [float(row["score"]) for row in rows]}
    return RecordDict({"counts": counts, **({"said": ConfigRecord(said)} if rows else {})})


def train(workspace: Workspace, task: Task, received: State, optimizer_state: State | None) -> Update:
    """Train the received model on what is labelled here; what stays here is kept."""
    step, config = task.step, task.config
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with workspace.experiment(task, received, trains=True) as experiment:
        (client,) = experiment.clients
        if config.federation.reset_each_cycle and step.cycle > 0 and step.round == 0:
            client.optimizer_state, client.bn_buffers = {}, {}
        if optimizer_state is not None:
            client.optimizer_state = optimizer_state
        if step.head_only and not config.model.frozen:
            experiment.model.freeze_backbone()
        message = pack(received, config.federation.message_dtype)
        update = train_client(experiment, step, client, experiment.model, message)
        if experiment.method.strategy.compares_local():
            client.last_local_state = unpack(update.payload)
        workspace.keep(task, experiment, trains=True)
    return update


def train_and_send(workspace: Workspace, content: RecordDict) -> RecordDict:
    """Train the model in the message; the weights go back."""
    task = Task.of(content["task"])
    sent_along = state_of(content["optimizer"]) if "optimizer" in content else {}
    travels = task.step.optimizer_state == "travels"
    update = train(workspace, task, state_of(content["arrays"]), sent_along if travels else None)
    answer = RecordDict({"arrays": arrays_from(update.payload)})
    answer["counts"] = _counts(task, steps=update.steps, loss=float(update.loss))
    if update.optimizer_state:
        answer["optimizer"] = arrays_from(update.optimizer_state)
    return answer


def _counts(task: Task, **counts: Any) -> MetricRecord:
    return MetricRecord({"cycle": task.step.cycle, "round": task.step.round, **counts})


def _told(error: Exception, workspace: Workspace) -> str:
    return without_paths(f"{type(error).__name__}: {error}", workspace.folder, Path.home())


class Masked(NumPyClient):
    """The trainer that Flower's SecAgg+ mod wants; it gives one vector, trained minus received.

    One, for Flower brings tensors without dimensions back wrong; float64, for it rounds in the precision it is given.
    """

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        try:
            task, received = Task.of(config), state_of({str(config["layout"]): Array(parameters[0])})
            update = train(self.workspace, task, received, None)
        except Exception as error:  # the mod takes no other answer
            raise RuntimeError(_told(error, self.workspace)) from None
        after = unpack(update.payload)
        moved = torch.cat([(after[name].double() - value.double()).flatten() for name, value in received.items()])
        return [moved.numpy()], 1, dict(_counts(task, steps=update.steps, loss=float(update.loss)))


def build(place: str | Path | None = None) -> ClientApp:
    """Flower's ClientApp; place: of simulated clients, whose nodes have no configuration."""
    client_app = ClientApp()

    def answering(handler: Callable[[Workspace, RecordDict], RecordDict]) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            workspace = workspace_of(context, place)
            try:
                return Message(handler(workspace, message.content), reply_to=message)
            except Exception as error:  # an answer as well
                kinds = {training.TrainingDiverged: DIVERGED, labelling.Unanswered: UNANSWERED}
                return Message(Error(kinds.get(type(error), FAILED), _told(error, workspace)), reply_to=message)

        return answer

    def masked(message: Message, context: Context) -> Message:
        return ClientApp(lambda context: Masked(workspace_of(context, place)).to_client())(message, context)

    client_app.query("hello")(answering(hello))
    client_app.query("select")(answering(select_and_annotate))
    client_app.train("plain")(answering(train_and_send))
    client_app.train("clipped", mods=[fixedclipping_mod])(answering(train_and_send))
    client_app.train(mods=[secaggplus_mod])(masked)  # messages of this type come from Flower's workflow
    return client_app


app = build()
