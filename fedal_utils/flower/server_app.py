"""The same experiment on Flower: a ClientApp and a ServerApp around the verbs of `alfl`.

Flower is named here and in `secure`.

Messages of the server, and what a client answers (`Line` sends, `client_app` answers):

    query.hello   class names                        its name, how many images it holds, versions
    query.score   the model, config, seed, cycle     scores of unlabelled images, how many boxes of each class it sees
    query.label   config, seed, cycle                the bill, labelled boxes of each class, ids and scores
    train         the model, config, seed, round     its weights, images, boxes, steps, loss
    evaluate      the model, config                  AP50 on test images of its own, how many they are

Images and labels are in no message. Seeds come with the message and a client's generators go by its name; updates are
averaged in the order of names: what arrives when changes no bit. `experiment` is the loop of the notebooks, with the
verbs of this module where clients are elsewhere.

An answer that does not come, an error, or an update that is not fit to be averaged costs the round that client and
nothing else (on_failure='skip'); the record names it. Every message can be repeated (`homes`), so a server that was
killed goes on from its run folder.

privacy='clip': a client's update is cut to a length of `clip_norm`, and the server adds noise to the average; its seed
is the run's, so that the run can be repeated, and nobody who knows the seed is kept from anything. privacy='secure':
the server gets the average of a round and of no client its update, see `secure` for what it learns all the same.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import fixedclipping_mod
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp import strategy as strategies
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise ImportError(
        'this needs Flower: pip install "fedal[flower]" (Python 3.11 or newer); without it, everything runs in the '
        f"plain loop of the notebooks ({error})"
    ) from error

from .. import metrics, record, training
from ..config import Config
from ..detectors.base import Detector
from ..federation import aggregate as federation
from ..federation import experiment as alfl
from ..federation.aggregate import State, Update
from ..federation.experiment import Client, ClientLost, Study, Turn
from ..papers import flywheel, load
from ..sampling.pool import Bill
from ..seeding import numpy_seeded
from . import deployment as wire
from . import privacy as secure
from . import workspace as homes

HELLO, SCORE, LABEL = "query.hello", "query.score", "query.label"
TRAIN, EVALUATE = MessageType.TRAIN, MessageType.EVALUATE
PAUSE = 0.3  # seconds between two looks for answers
ROBUST = ("fedtrimmedavg", "krum", "multikrum")  # they bear `malicious` clients of at least twice as many and one
FAULTS = ("fail", "hang", "nan", "shape", "huge")  # of a drill, see `drill`


# --- what travels -----------------------------------------------------------------------------------------------------


def arrays_of(payload: bytes) -> ArrayRecord:
    """A packed state as Flower's arrays, in its precision."""
    return arrays_from(torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True))


def arrays_from(state: State) -> ArrayRecord:
    """A state as one flat array (one for each kind of number), named by what it holds: "conv.weight:16x3x3x3;...".

    Each array costs Flower's server requests, and a request costs some milliseconds whatever its size: a detector's
    hundred tensors took longer to hand over than to train. All of Flower's ways of averaging work value by value, or
    on norms over all values, so they see no difference.
    """
    kinds: dict[torch.dtype, list[str]] = {}
    for name, value in state.items():
        kinds.setdefault(value.dtype, []).append(name)
    flat = {}
    for names in kinds.values():
        layout = ";".join(f"{name}:{'x'.join(map(str, state[name].shape))}" for name in names)
        flat[layout] = Array(torch.cat([state[name].detach().cpu().flatten() for name in names]).numpy())
    return ArrayRecord(flat)


def state_of(arrays: ArrayRecord) -> State:
    """The state in such arrays, in the precision in which it travelled; ValueError if names and values do not fit."""
    state: State = {}
    for layout, array in arrays.items():
        values, entries = torch.from_numpy(np.array(array.numpy())), []
        for entry in layout.split(";"):
            name, _, shape = entry.rpartition(":")
            entries.append((name, tuple(int(side) for side in shape.split("x")) if shape else ()))
        sizes = [math.prod(shape) for _, shape in entries]
        if values.ndim != 1 or sum(sizes) != len(values) or any(side < 0 for _, shape in entries for side in shape):
            raise ValueError(f"an array of shape {tuple(values.shape)} does not hold what its name says")
        parts = values.split(sizes)
        state |= {name: part.reshape(shape).clone() for (name, shape), part in zip(entries, parts, strict=True)}
    return state


@dataclass(frozen=True)
class Task:
    """What a message asks for, beside a model: which run, which round, and how it is to be done.

    classes: everybody's class names, in their order. turn: of `alfl.Turn` all that is not clients.
    """

    config: Config
    notebook: str
    method: str
    seed: int
    cycle: int
    round: int
    classes: tuple[str, ...]
    turn: Turn = Turn(())

    def record(self) -> ConfigRecord:
        turn = {f.name: getattr(self.turn, f.name) for f in fields(Turn) if f.name != "clients"}
        plain = {
            "config": json.dumps(asdict(self.config)),
            "notebook": self.notebook,
            "method": self.method,
            "seed": self.seed,
            "cycle": self.cycle,
            "round": self.round,
            "classes": json.dumps(self.classes),
            "turn": json.dumps(turn),
        }
        if self.config.server.privacy == "clip":
            plain["clipping_norm"] = self.config.server.clip_norm  # where Flower's mod looks for it
        return ConfigRecord(plain)

    @classmethod
    def of(cls, message: Message) -> Task:
        """Raises ValueError on a message that another version of this package sent."""
        sent = message.content["task"]
        try:
            read = Config.of(**json.loads(sent["config"]))
            turn = Turn((), **json.loads(sent["turn"]))
            plain = {name: sent[name] for name in ("notebook", "method", "seed", "cycle", "round")}
            return cls(read, **plain, classes=tuple(json.loads(sent["classes"])), turn=turn)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this message is of another version of the package: {error}") from None


# --- a client ---------------------------------------------------------------------------------------------------------


def home_of(context: Context) -> homes.Home:
    """This node's home: the folder that its configuration names, or, simulated, the one of its number in the place."""
    node = context.node_config
    if "folder" in node:
        folder = Path(str(node["folder"])).expanduser()
    elif "partition-id" in node:
        dealt = sorted((Path(str(context.run_config["place"])) / "clients").iterdir())
        if int(node["partition-id"]) >= len(dealt):
            raise ValueError(f"{len(dealt)} clients were dealt, but this is number {node['partition-id']} of the nodes")
        folder = dealt[int(node["partition-id"])]
    else:
        raise ValueError("the node's configuration names no folder: start it with --node-config 'folder=\"...\"'")
    return homes.Home(
        folder,
        str(node.get("name", folder.name)),
        str(node.get("person", "simulated")),
        bool(node.get("anonymous", False)),
    )


def _device(context: Context) -> str:
    return str(context.node_config.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def drill(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """A fault on purpose, for drills: the node's configuration says faults="nan@0.1, huge@1.0" (cycle.round).

    fail: an error; hang: no answer for an hour; nan: a weight that is not a number; shape: a weight of another shape;
    huge: the update a thousand times as large. It is the training that goes wrong: what comes out of it is clipped or
    masked like any other.
    """
    due = str(context.node_config.get("faults", ""))
    if not due or message.metadata.message_type != TRAIN:
        return call_next(message, context)
    at = f"@{message.content['task']['cycle']}.{message.content['task']['round']}"
    kinds = [word.strip().partition("@") for word in due.split(",") if word.strip()]
    kind = next((kind for kind, _, when in kinds if f"@{when}" == at), None)
    if any(kind not in FAULTS for kind, _, _ in kinds):
        raise ValueError(f"faults must be of {FAULTS}, such as 'nan@0.1', got {due!r}")
    if kind == "fail":
        raise RuntimeError("a drill: this client fails")
    if kind == "hang":
        time.sleep(3600)
    answer = call_next(message, context)
    if kind in ("nan", "shape", "huge") and not answer.has_error() and "arrays" in answer.content:
        after = state_of(answer.content["arrays"])
        first = next(iter(after))
        if kind == "nan":
            after[first] = torch.full_like(after[first], torch.nan)
        elif kind == "shape":
            after[first] = after[first].flatten()[:-1]
        else:
            home, task, run, _ = _at_work(message, context)
            before = _received(message, home, run, task)
            after = {key: before[key] + 1000 * (value - before[key]) for key, value in after.items()}
        answer.content["arrays"] = arrays_from(after)
    return answer


def private(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower's clipping of an update, where the task wants it; an answer without weights goes out as it is."""
    if Task.of(message).config.privacy != "clip":
        return call_next(message, context)
    said: list[Message] = []

    def train(message: Message, context: Context) -> Message:
        answer = call_next(message, context)
        if not answer.has_error() and "arrays" not in answer.content:
            said.append(answer)
        return answer

    clipped = fixedclipping_mod(message, context, train)
    return said[0] if said else clipped


client_app = ClientApp()


def _answer(message: Message, **records: Any) -> Message:
    return Message(RecordDict({name: kept for name, kept in records.items() if kept is not None}), reply_to=message)


@client_app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who this is. ValueError if its annotations name classes that the server does not know."""
    home, task = home_of(context), Task.of(message)
    study = home.study(task.config, task.classes, _device(context))
    said = {"name": home.name, "torch": torch.__version__, "person": home.person}
    counts = {"images": len(study.train), "judges": int((home.folder / "test").is_dir())}
    return _answer(message, said=ConfigRecord(said), counts=MetricRecord(counts))


def _at_work(message: Message, context: Context) -> tuple[homes.Home, Task, record.Run, Study]:
    home, task = home_of(context), Task.of(message)
    study = home.study(task.config, task.classes, _device(context))
    torch.set_num_threads(task.config.threads or torch.get_num_threads())
    return home, task, home.run(task.config, task.notebook, task.method, task.seed), study


def _received(message: Message, home: homes.Home, run: record.Run, task: Task) -> State:
    """The model in the message, or the one that came with the questions of this cycle."""
    return state_of(message.content["arrays"]) if "arrays" in message.content else home.sent(run, task.cycle)


def _model(task: Task, run: record.Run, study: Study, *states: State) -> Detector:
    model = alfl.new_detector(task.config, len(study.class_names), run.torch_rng("weights"))
    for state in states:
        model.load_state_dict(state, strict=False)
    return model.to(study.device)


@client_app.query("score")
def score(message: Message, context: Context) -> Message:
    """Score the unlabelled images with the model in the message, and note which of them to have labelled."""
    home, task, run, study = _at_work(message, context)
    run.folder.mkdir(parents=True, exist_ok=True)
    sent = state_of(message.content["arrays"]) if "arrays" in message.content else {}  # random asking needs no model
    if sent:
        home.keep_sent(run, task.cycle, sent)
    model = _model(task, run, study, sent)
    with home.client(run, study, task.cycle, 0, asked=False) as client:
        picked = alfl.pick(run, study, model, client, task.cycle)
        counts: dict[str, Any] = {"waiting": len(client.pool.unlabelled()), "picked": len(picked.positions)}
        home.pick(run, task.cycle, picked, client.coder)
    if len(picked.scores):
        counts["scores"] = [float(value) for value in picked.scores]
    if picked.detected is not None:
        counts["detected"] = [int(value) for value in picked.detected]
    return _answer(message, counts=MetricRecord(counts))


@client_app.query("label")
def label(message: Message, context: Context) -> Message:
    """Have the noted images labelled here; tells the bill, labelled boxes of each class, and what was asked.

    While a human has not answered all of it, it tells how many questions wait.
    """
    home, task, run, study = _at_work(message, context)
    try:
        client, rows = home.ask(run, study, task.cycle)
    except flywheel.Unanswered:
        said = ConfigRecord({"why": "its questions wait for a person"})
        return _answer(message, counts=MetricRecord({"unanswered": 1}), said=said)
    bill, (_, labels) = client.pool.bill(), client.pool.training_set()
    histogram = torch.bincount(labels.classes[labels.valid], minlength=len(study.class_names) + 1)[1:].tolist()
    counts = {"images": bill.images, "boxes": bill.boxes, "seconds": bill.seconds, "histogram": histogram}
    if rows:
        said = ConfigRecord({"ids": [row["id"] for row in rows], "why": [float(row["score"]) for row in rows]})
        return _answer(message, counts=MetricRecord(counts), said=said)
    return _answer(message, counts=MetricRecord(counts))


@client_app.train(mods=[secure.secure_aggregation_mod, private, drill])
def train_here(message: Message, context: Context) -> Message:
    """Train the model in the message on what is labelled here; the weights go back, or why there are none."""
    home, task, run, study = _at_work(message, context)
    turn, received = task.turn, _received(message, home, run, task)
    with home.client(run, study, task.cycle, task.round) as client:
        if task.config.federation.reset_each_cycle and task.cycle > 0 and task.round == 0:
            client.memory, client.home = {}, {}
        if "memory" in message.content:
            client.memory = state_of(message.content["memory"])
        base = home.base(run, task.cycle, task.round) if turn.frozen else {}
        model = _model(task, run, study, base, received)
        if turn.frozen and not task.config.model.frozen:
            if turn.whole:
                base = {key: value for key, value in received.items() if key.startswith("backbone.")}
            model.freeze_backbone()
        payload = federation.pack(received, task.config.federation.message_dtype)
        try:
            update = alfl.train_one(run, study, model, client, payload, turn, task.cycle, task.round)
        except training.TrainingDiverged as error:
            return _answer(message, said=ConfigRecord({"status": "diverged", "why": str(error)}))
        if alfl.compares(task.method):
            client.last = federation.unpack(update.payload)
        home.remember(run, task.cycle, task.round, client, base)
    counts = {
        "images": update.images,
        "boxes": update.boxes,
        "equal": 1,
        "steps": update.steps,
        "loss": float(update.loss),
    }
    memory = arrays_from(federation.unpack(update.memory)) if update.memory else None
    return _answer(message, arrays=arrays_of(update.payload), memory=memory, counts=MetricRecord(counts))


@client_app.evaluate()
def evaluate_here(message: Message, context: Context) -> Message:
    """AP50 of the model in the message on the test images of this home (its folder `test`), if it has some."""
    home, task, run, study = _at_work(message, context)
    if not (home.folder / "test").is_dir():
        return _answer(message, counts=MetricRecord({"images": 0}))
    test = homes.read_set(home.folder / "test", task.config, task.classes)
    model = _model(task, run, study, state_of(message.content["arrays"]))
    images = alfl.study_of(task.config, test, test.take([0]), study.device).train.images
    found = metrics.evaluate(training.predict(model, images, device=study.device), test.labels, study.class_names)
    boxes = int(test.labels.valid.sum())
    return _answer(message, counts=MetricRecord({"images": len(test), "boxes": boxes, "ap50": float(found["ap50"])}))


# --- the server's line to its clients ---------------------------------------------------------------------------------


class Line:
    """The server's connection to its clients, by name.

    timeout: seconds that a round waits for answers; patience: seconds that a human may take to label.
    """

    def __init__(self, grid: Grid, timeout: float = 600.0, patience: float = 0.0):
        self.grid, self.timeout, self.patience = grid, timeout, patience
        self.nodes: dict[str, int] = {}
        self.judges: set[str] = set()  # clients with test images of their own
        self.held: dict[str, int] = {}  # images of each client

    def meet(self, task: Task, names: Sequence[str], wait: float) -> dict[str, int]:
        """Learn which node is which client; how many images each holds.

        TimeoutError that names who did not come within `wait` seconds; with on_failure='skip' only if nobody did.
        """
        deadline, held = time.monotonic() + wait, {}
        while missing := sorted(set(names) - set(self.nodes)):
            left = deadline - time.monotonic()
            if left <= 0:
                if self.nodes and task.config.federation.on_failure == "skip":
                    print(f"the run begins without {', '.join(missing)}, who did not come in {wait:.0f} s", flush=True)
                    break
                raise TimeoutError(f"clients {', '.join(missing)} did not come within {wait:.0f} s")
            held |= self.greet(task, left)
            time.sleep(PAUSE)
        return held

    def greet(self, task: Task, wait: float = 30.0) -> dict[str, int]:
        """Say hello to nodes that are new; images of each of them. One that does not answer is not known yet."""
        online = list(self.grid.get_node_ids())
        known, held = set(self.nodes.values()), {}
        new = {str(node): node for node in online if node not in known}
        if not new:
            return held
        contents = {name: {"task": task.record()} for name in new}
        answers, failed = self._exchange(HELLO, contents, new, min(wait, self.timeout))
        for node, (status, why) in failed.items():
            if status == "failed":
                raise ValueError(f"node {node} cannot take part: {why}")
        for node, answer in sorted(answers.items()):
            name = str(answer["said"]["name"])
            if self.nodes.get(name) in online:
                raise ValueError(f"two nodes say that they are client {name!r}: give one of them another name")
            self.nodes[name], held[name] = new[node], int(answer["counts"]["images"])
            (self.judges.add if answer["counts"]["judges"] else self.judges.discard)(name)
        self.held |= held
        return held

    def exchange(
        self, kind: str, contents: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, RecordDict], dict[str, ClientLost]]:
        """Send each client its message; answers by name, and of the others why there is none."""
        answers, failed = self._exchange(kind, contents, self.nodes, self.timeout)
        lost = {
            name: ClientLost(f"client {name}: {why} ({kind})", status=status) for name, (status, why) in failed.items()
        }
        return answers, lost

    def _exchange(
        self, kind: str, contents: Mapping[str, Mapping[str, Any]], nodes: Mapping[str, int], timeout: float
    ) -> tuple[dict[str, RecordDict], dict[str, tuple[str, str]]]:
        online = set(self.grid.get_node_ids())
        failed = {name: ("away", "it is not there") for name in contents if nodes.get(name) not in online}
        here = [name for name in sorted(contents) if name not in failed]
        messages = [Message(RecordDict(dict(contents[n])), nodes[n], kind, ttl=timeout + 5) for n in here]
        ids = list(self.grid.push_messages(messages))
        waiting = {id_: name for id_, name in zip(ids, here, strict=True) if id_}
        failed |= {name: ("away", "it is not there") for id_, name in zip(ids, here, strict=True) if not id_}
        answers: dict[str, RecordDict] = {}
        again: dict[str, str] = {}  # who answered with an error once, and which; every message can be repeated
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(list(waiting)):
                name = waiting.pop(reply.metadata.reply_to_message_id, None)
                if name is None:
                    continue
                if reply.has_error():
                    why = f"error {reply.error.code}: {reply.error.reason}"
                    if name not in again:
                        again[name] = why
                        repeated = Message(RecordDict(dict(contents[name])), nodes[name], kind, ttl=timeout + 5)
                        waiting |= {id_: name for id_ in self.grid.push_messages([repeated]) if id_}
                    if name not in waiting.values():
                        failed[name] = ("failed", why)
                elif "said" in reply.content and "status" in reply.content["said"]:
                    said = reply.content["said"]
                    failed[name] = (str(said["status"]), str(said["why"]))
                else:
                    answers[name] = reply.content
            if waiting:
                time.sleep(PAUSE)
        for name in waiting.values():
            why = f"no answer within {timeout:.0f} s" + (f", after {again[name]}" if name in again else "")
            failed[name] = ("failed" if name in again else "no answer", why)
        for name, why in again.items():
            if name in answers:
                print(f"client {name} answered {kind} when it was asked again, after {why}", flush=True)
        return answers, dict(sorted(failed.items()))


# --- how one model is made of the updates -----------------------------------------------------------------------------


class _Present(Grid):
    """A grid on which exactly these nodes are: a strategy of Flower's that samples takes them all."""

    def __init__(self, nodes: Iterable[int]):
        self._nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        return self._nodes

    def _none(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("nothing is sent over this grid")

    set_run = create_message = push_messages = pull_messages = send_and_receive = _none

    @property
    def run(self) -> Any:
        return self._none()


class Ordered(strategies.FedAvg):
    """Flower's FedAvg with the sum of `federation`: float64, clients in the order of their names."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        good, _ = self._check_and_log_replies(list(replies), is_train=True)
        if not good:
            return None, None
        counts = np.array([float(reply.content["counts"][self.weighted_by_key]) for reply in good])
        sent = [(f"{place:09d}", state_of(reply.content["arrays"])) for place, reply in enumerate(good)]
        merged = federation.weighted_states(sent, counts / counts.sum())
        return arrays_from(merged), None


def strategy_of(config: Config, clients: int) -> strategies.Strategy:
    """Flower's strategy of this name (`config.SERVERS`), for so many updates in a round."""
    shared = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_available_nodes": 1,
        "weighted_by_key": config.federation.aggregation_weights,
    }
    bad, lr = config.server.num_byzantine, config.server.server_lr
    if config.server.server_strategy in ROBUST and 2 * bad + 1 > clients:
        raise ValueError(
            f"server {config.server.server_strategy!r} bears malicious={bad} of {2 * bad + 1} clients or more, not of {clients}"
        )
    adaptive = {"eta": lr or 0.01, "tau": 1e-3, **shared}
    made = {
        "fedavg": lambda: Ordered(**shared),
        "fedprox": lambda: Ordered(**shared),  # the proximal term is the clients'
        "fedavgm": lambda: strategies.FedAvgM(
            server_learning_rate=lr or 1.0, server_momentum=config.server.server_momentum, **shared
        ),
        "fedadam": lambda: strategies.FedAdam(beta_1=config.server.server_momentum, **adaptive),
        "fedyogi": lambda: strategies.FedYogi(beta_1=config.server.server_momentum, **adaptive),
        "fedadagrad": lambda: strategies.FedAdagrad(**adaptive),
        "fedmedian": lambda: strategies.FedMedian(**shared),
        "fedtrimmedavg": lambda: strategies.FedTrimmedAvg(beta=bad / clients + 1e-9, **shared),
        "krum": lambda: strategies.Krum(num_malicious_nodes=bad, **shared),
        "multikrum": lambda: strategies.MultiKrum(
            num_malicious_nodes=bad, num_nodes_to_select=max(1, clients - bad), **shared
        ),
    }
    return made[config.server.server_strategy]()


@contextlib.contextmanager
def _some_task() -> Iterator[None]:
    """Flower's messages know their task; in the plain loop, where there is none, they get one of no meaning."""
    if TaskIdentity._run_id is not None:
        yield
        return
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 0, 0, SUPERLINK_NODE_ID
    try:
        yield
    finally:
        TaskIdentity._run_id = TaskIdentity._task_id = TaskIdentity._node_id = None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Flower's log below errors: a line for every step of a sum is no news."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class Merging:
    """How the server makes one model of a round's updates (`config.server`), and what it remembers between rounds.

    kept: what `state` gave, of a run that goes on.
    """

    REMEMBERED = ("momentum_vector", "m_t", "v_t")  # attributes of Flower's strategies

    def __init__(self, config: Config, kept: Mapping[str, Any] | None = None):
        self.config = config
        self._kept: dict[str, State] = {name: dict(state) for name, state in (kept or {}).items()}

    def state(self) -> dict[str, State]:
        """What is remembered: flat tensors by the names of `arrays_from`."""
        return self._kept

    def average(self, number: int, before: State, updates: Sequence[Update], seed: int | None = None) -> State:
        """One model of these updates; number: of the round in the run, from 1; before: what the clients were sent.

        seed: of the noise under privacy='clip', whose standard deviation is noise * clip_norm / updates.
        """
        with _some_task(), _quietly(), numpy_seeded(seed):
            return self._average(number, before, updates)

    def _average(self, number: int, before: State, updates: Sequence[Update]) -> State:
        ordered = sorted(updates, key=lambda update: update.client)
        strategy = strategy_of(self.config, len(ordered))
        if self.config.server.privacy == "clip":
            strategy = strategies.DifferentialPrivacyClientSideFixedClipping(
                strategy, self.config.server.noise, self.config.server.clip_norm, len(ordered)
            )
        arrays = arrays_from(before)
        keys = list(arrays)
        list(strategy.configure_train(number, arrays, ConfigRecord(), _Present(range(1, len(ordered) + 1))))
        for name, state in self._kept.items():
            tensors = [state[key].numpy() for key in keys]
            setattr(strategy, name, tensors if name == "momentum_vector" else dict(zip(keys, tensors, strict=True)))
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": arrays_from(federation.unpack(update.payload)),
                        "counts": MetricRecord({"images": update.images, "boxes": update.boxes, "equal": 1}),
                    }
                ),
                place,
                TRAIN,
            )
            for place, update in enumerate(ordered, start=1)
        ]
        merged, _ = strategy.aggregate_train(number, replies)
        for name in self.REMEMBERED:
            kept = getattr(strategy, name, None)
            if kept is not None:
                named = kept if isinstance(kept, dict) else dict(zip(keys, kept, strict=True))
                self._kept[name] = {key: torch.from_numpy(np.array(value)) for key, value in named.items()}
        state = state_of(merged)
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise ValueError(
                f"server {self.config.server.server_strategy!r} made weights that are not finite in round {number}"
            )
        # A variance below 0 breaks the model; a server's step can lead there, or noise (which this costs no privacy).
        state = {key: value.clamp(min=0) if key.endswith("running_var") else value for key, value in state.items()}
        return {key: state[key].to(before[key].dtype) for key in before}


def merge(
    run: record.Run,
    model: Detector,
    clients: Sequence[Client],
    updates: Sequence[Update],
    merging: Merging,
    given: Given | None = None,
) -> None:
    """As `alfl.merge`, the way that `config.server` and `config.privacy` name; given: holds a secure average."""
    config, number = run.config, run.committed + 1
    if config.server.privacy == "secure":
        if updates and not (given and given.average):
            raise ValueError("privacy='secure': clients of the plain loop send their updates as they are")
        alfl.merge(run, model, clients, updates, lambda sent: given.average)
        return
    if config.server.privacy == "none" and config.server.server_strategy in (
        "fedavg",
        "fedprox",
    ):  # the proximal term is the clients'
        alfl.merge(run, model, clients, updates)
        return
    before = federation.unpack(
        alfl.broadcast(model, config.federation.batch_norm, config.federation.message_dtype)
    )  # what was sent
    least = 2 * config.server.num_byzantine + 1
    if config.server.server_strategy in ROBUST and config.federation.on_failure == "skip" and 0 < len(updates) < least:
        print(
            f"{run}: {config.server.server_strategy} needs {least} updates, {len(updates)} came: the model stays as it was",
            flush=True,
        )
        return
    seed = int(run.rng("noise", number).integers(1 << 32)) if config.server.privacy == "clip" else None
    alfl.merge(run, model, clients, updates, lambda sent: merging.average(number, before, sent, seed))


# --- the server's verbs -----------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """ValueError on what cannot be done with clients that are elsewhere, or by this server."""
    if config.model.classifier:
        raise ValueError(f"classifier={config.model.classifier!r}: real clients train detectors; use the plain loop")
    if config.federation.batch_norm == "local":
        raise ValueError("batch_norm='local': models are judged at the server, which has nobody's statistics")
    if config.federation.batch_norm == "frozen":
        raise ValueError("batch_norm='frozen': the statistics are those of the starting point, which no client knows")
    _check_privacy(config)
    for method in config.methods:
        scheme, strategy = alfl.scheme_of(method)
        if scheme in ("local-first", alfl.CENTRALISED):
            raise ValueError(f"method {method!r}: nothing is sent in {scheme!r}; run it in the plain loop")
        if alfl.needs(strategy) & {"reference", "committee", "hidden"}:
            raise ValueError(
                f"method {method!r} needs images or models that a client does not have; use the plain loop"
            )
        if config.server.server_strategy != "fedavg" and scheme != "fedavg":
            raise ValueError(
                f"method {method!r}: server={config.server.server_strategy!r} is a way of averaging, for scheme fedavg"
            )
        if config.server.privacy != "none" and scheme != "fedavg":
            raise ValueError(
                f"method {method!r}: privacy={config.server.privacy!r} is of an average, for scheme fedavg"
            )


def _check_privacy(config: Config) -> None:
    privacy = config.server.privacy
    if config.server.noise and privacy != "clip":
        raise ValueError(
            f"noise={config.server.noise} is added to clipped updates: set privacy='clip', not {privacy!r}"
        )
    if privacy == "none":
        return
    if config.server.server_strategy not in ("fedavg", "fedprox"):
        raise ValueError(
            f"privacy={privacy!r} is of a plain average: server must be 'fedavg' or 'fedprox', not {config.server.server_strategy!r}"
        )
    if config.federation.optimizer_state == "travels":
        raise ValueError(
            f"optimiser_state='travels': privacy={privacy!r} is of weights, and the optimiser's state tells gradients"
        )
    if config.federation.message_dtype != "fp32":
        why = "rounding after clipping makes updates longer" if privacy == "clip" else "masked updates are integers"
        raise ValueError(f"privacy={privacy!r} needs wire='fp32', not {config.federation.message_dtype!r}: {why}")
    if privacy == "clip":
        if config.federation.aggregation_weights != "equal":
            raise ValueError(
                f"privacy='clip' needs weights='equal', not {config.federation.aggregation_weights!r}: noise is made for equal parts, and "
                "120, 80 and 200 images would cut the real multiplier to 0.67 of the stated one"
            )
        if config.server.noise and config.server.max_update_ratio:
            raise ValueError(
                f"too_large={config.server.max_update_ratio}: whose update is left out would depend on the others', which the noise "
                "does not cover; clipped updates are never too large, set 0"
            )
        return
    if config.federation.aggregation_weights == "boxes":
        raise ValueError("privacy='secure' weights by 'images' or 'equal': nobody knows the most boxes of a client")
    if config.server.max_update_ratio:
        raise ValueError(
            f"too_large={config.server.max_update_ratio}: under privacy='secure' the server sees no update, set 0"
        )
    asked = max(1, round(config.federation.client_fraction * config.federation.clients))
    if asked < secure.LEAST:
        raise ValueError(
            f"privacy='secure' needs {secure.LEAST} clients or more in a round, not {asked} (clients={config.federation.clients}, "
            f"fraction={config.federation.client_fraction}): of two, each knows the other's weights from the average"
        )


def start(
    run: record.Run, study: Study, names: Sequence[str], held: Mapping[str, int]
) -> tuple[list[Client], Detector]:
    """The clients as the server knows them, and the global model: fresh, or where a broken run stopped."""
    clients = [Client(name, homes.Told(name, len(study.class_names))) for name in names]
    for client in clients:
        client.pool.held = held.get(client.name, 0)
    model = alfl.new_detector(run.config, len(study.class_names), run.torch_rng("weights"))
    if run.resumed is not None:
        rows = run.query_rows()
        for client in clients:
            client.pool.restore(run.resumed["told"][client.name], rows)
            client.pool.held = held.get(client.name, client.pool.held)  # it may have come while the server was down
        alfl.go_on(run, model, clients)
        return clients, model.to(study.device)
    model.load_state_dict(alfl.starting_point(run, study, study.start_rows(run.seed)), strict=False)
    return clients, model.to(study.device)


@dataclass
class Given:
    """The packed model that each client got with the questions of this cycle: no need to send it again.

    average: what a secure round gave, until it is merged.
    """

    cycle: int = -1
    payloads: dict[str, bytes] = field(default_factory=dict)
    average: State = field(default_factory=dict)


def ask(
    run: record.Run, study: Study, model: Detector, clients: Sequence[Client], cycle: int, line: Line, given: Given
) -> dict[str, ClientLost]:
    """Score and label messages to these clients; of each that did not answer, why. What they told is in their pools."""
    config, task = run.config, _task(run, study, cycle, 0)
    given.cycle, given.payloads = cycle, {}
    message = alfl.broadcast(model, config.federation.batch_norm, config.federation.message_dtype)
    contents: dict[str, dict[str, Any]] = {}
    for client in clients:
        contents[client.name] = {"task": task.record()}
        if alfl.needs(alfl.way_of_asking(run, cycle)):
            payload = federation.pack(client.known, config.federation.message_dtype) if client.known else message
            contents[client.name]["arrays"] = arrays_of(payload)
            given.payloads[client.name] = payload
    scored, lost = line.exchange(SCORE, contents)
    for name in lost:
        given.payloads.pop(name, None)
    waiting = {name: {"task": task.record()} for name in scored}
    by_name, deadline = {client.name: client for client in clients}, time.monotonic() + line.patience
    while waiting:
        answers, failed = line.exchange(LABEL, waiting)
        lost |= failed
        for name, answer in answers.items():
            if "unanswered" in answer["counts"]:
                if time.monotonic() < deadline:
                    continue
                lost[name] = ClientLost(f"client {name}: {answer['said']['why']}", status="unanswered")
            else:
                try:
                    _take_in(by_name[name], cycle, answer)
                except (KeyError, TypeError, ValueError) as error:
                    lost[name] = ClientLost(f"client {name}: its answer makes no sense: {error}", status="failed")
            del waiting[name]
        waiting = {name: content for name, content in waiting.items() if name not in failed}
        if waiting:
            time.sleep(min(5.0, line.timeout))  # a person takes longer
    return lost


def _take_in(client: Client, cycle: int, answer: RecordDict) -> None:
    """Note what a client told of its labels; ValueError if it cannot be: its counts weigh its updates."""
    counts, pool = answer["counts"], client.pool
    images, boxes, seconds = int(counts["images"]), int(counts["boxes"]), float(counts["seconds"])
    if not 0 <= images <= pool.held or boxes < 0 or not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{images} images of {pool.held}, {boxes} boxes, {seconds} s")
    histogram = [int(count) for count in counts["histogram"]]
    if len(histogram) != len(pool.histogram) or min(histogram) < 0 or sum(histogram) > boxes:
        raise ValueError(f"{boxes} boxes, by class {histogram}")
    rows = []
    if "said" in answer:
        said = answer["said"]
        rows = [
            {"cycle": cycle, "client": client.name, "id": str(sample), "score": float(score)}
            for sample, score in zip(said["ids"], said["why"], strict=True)
        ]
    if any(math.isinf(row["score"]) for row in rows):
        raise ValueError("a score is infinite")
    pool.tell(cycle, Bill(images, boxes, seconds), histogram, rows)


def _task(run: record.Run, study: Study, cycle: int, round: int, turn: Turn | None = None) -> Task:
    return Task(run.config, run.notebook, run.method, run.seed, cycle, round, study.class_names, turn or Turn(()))


def sender(run: record.Run, study: Study, cycle: int, round: int, line: Line, given: Given) -> alfl.Send:
    """How `alfl.train` has the clients' part of this round done."""

    def send(clients: Sequence[Client], message: bytes, turn: Turn) -> dict[str, Update | ClientLost]:
        task, contents = _task(run, study, cycle, round, turn), {}
        if run.config.server.privacy == "secure":
            return _send_masked(run, task, clients, message, line, given)
        again = run.config.server.privacy != "none" or (given.cycle, round) != (
            cycle,
            0,
        )  # Flower's clipping wants it there
        for client in clients:
            contents[client.name] = {"task": task.record()}
            if again or given.payloads.get(client.name) != message:
                contents[client.name]["arrays"] = arrays_of(message)
            if turn.state == "travels" and client.memory:
                contents[client.name]["memory"] = arrays_from(client.memory)
        answers, sent = line.exchange(TRAIN, contents)
        by_name, when = {client.name: client for client in clients}, f"in cycle {cycle}, round {round}"
        sent |= {name: _update(run, by_name[name], answer) for name, answer in answers.items()}
        for what in sent.values():
            if isinstance(what, ClientLost):
                print(f"{run}, {when[3:]}: nothing from {what}", flush=True)
        return {
            name: ClientLost(f"{what} {when}", what.status) if isinstance(what, ClientLost) else what
            for name, what in sent.items()
        }

    return send


def _send_masked(
    run: record.Run, task: Task, clients: Sequence[Client], message: bytes, line: Line, given: Given
) -> dict[str, Update | ClientLost]:
    """The clients' part of a round by secure aggregation: the average goes to `given`, of each client there are counts.

    If too few are left, nobody has sent anything (on_failure='stop': SecureAggregationError).
    """
    config, online = run.config, set(line.grid.get_node_ids())
    by_name = {client.name: client for client in sorted(clients, key=lambda client: client.name)}
    nodes = {name: line.nodes[name] for name in by_name if line.nodes.get(name) in online}
    sent: dict[str, Update | ClientLost] = {
        name: ClientLost(f"client {name}: it is not there ({TRAIN})", status="away")
        for name in by_name
        if name not in nodes
    }
    given.average, counts = {}, {}
    try:
        result = secure.secure_round(
            line.grid,
            list(nodes.values()),
            arrays_of(message),
            lambda _: task.record(),
            line.timeout,
            weight=None if config.federation.aggregation_weights == "equal" else config.federation.aggregation_weights,
            max_weight=config.labels_needed(),
            seed=int(run.rng("secure", task.cycle, task.round).integers(1 << 32)),
        )
        given.average, counts, failures, why = state_of(result.arrays), result.counts, result.failures, ""
    except secure.SecureAggregationError as error:
        if config.federation.on_failure == "stop":
            raise
        failures, why = error.failures, str(error)
    for name, node in nodes.items():
        if node not in counts:
            status, reason = failures.get(node, ("too few", why))
            sent[name] = ClientLost(f"client {name}: {reason}", status=status)
            continue
        bill, said = by_name[name].pool.bill(), counts[node]
        steps, loss = int(said["steps"]), float(said["loss"])
        sent[name] = Update(name, b"", bill.images, bill.boxes, steps, loss, size=result.sizes[node])
        if result.cut[node]:
            what = f"{result.cut[node]} values of client {name} were too large for the masks and were cut"
            print(f"{run}, cycle {task.cycle}, round {task.round}: {what}", flush=True)
    return sent


def _update(run: record.Run, client: Client, answer: RecordDict) -> Update | ClientLost:
    """The client's answer as an update; weighed by the labels that the server knows of."""
    bill = client.pool.bill()
    try:
        state, memory = state_of(answer["arrays"]), state_of(answer["memory"]) if "memory" in answer else {}
        steps, loss = int(answer["counts"]["steps"]), float(answer["counts"]["loss"])
    except Exception as error:  # an answer from outside: NumPy and torch raise whatever their readers trip over
        return ClientLost(f"client {client.name}: its update cannot be read: {error!r}", status="unreadable")
    try:
        payload, memory = (
            federation.pack(state, run.config.federation.message_dtype),
            federation.pack(memory) if memory else b"",
        )
        if not math.isfinite(loss):
            raise ValueError(f"its loss is {loss}")
    except ValueError as error:
        return ClientLost(f"client {client.name}: {error}", status="not finite")
    return Update(client.name, payload, bill.images, bill.boxes, steps, loss, memory)


def evaluate(
    run: record.Run, study: Study, model: Detector, clients: Sequence[Client], cycle: int, round: int, line: Line
) -> None:
    """Have the clients that hold test images judge the global model; what they say goes into their rows."""
    for client in clients:
        client.judged = {}
    judges = [client for client in clients if client.name in line.judges]
    if not judges:
        return
    task, keys = _task(run, study, cycle, round), federation.sent_keys(model, run.config.federation.batch_norm)
    if not run.config.model.frozen:  # where the head alone travels, not everybody has had the merged backbone yet
        keys = [key for key, value in model.state_dict().items() if value.is_floating_point()]
    payload = federation.pack(federation.state_of(model, keys), run.config.federation.message_dtype)
    contents = {client.name: {"task": task.record(), "arrays": arrays_of(payload)} for client in judges}
    answers, _ = line.exchange(EVALUATE, contents)
    for client in judges:
        if client.name in answers and "ap50" in answers[client.name]["counts"]:
            client.judged = {"ap50": float(answers[client.name]["counts"]["ap50"])}


def experiment(run: record.Run, study: Study, line: Line, names: Sequence[str], held: Mapping[str, int]) -> None:
    """The notebooks' loop, with clients that are elsewhere."""
    clients, model = start(run, study, names, held)
    by_name = {client.name: client for client in clients}
    merging, given = Merging(run.config, (run.resumed or {}).get("server")), Given()
    for cycle, round in run.rounds():
        for name, images in line.greet(_task(run, study, cycle, round)).items():  # whoever has come (back)
            if name in by_name:
                by_name[name].pool.held = images
        turn = alfl.whose_turn(run, clients, cycle, round)
        if turn.asks:
            for name, why in ask(run, study, model, turn.clients, cycle, line, given).items():
                print(f"{run}, cycle {cycle}: no labels from client {name} ({why.status}): {why}", flush=True)
        updates = alfl.train(run, study, model, clients, cycle, round, sender(run, study, cycle, round, line, given))
        merge(run, model, clients, updates, merging, given)
        if turn.merge:
            alfl.merge_by_class(run, study, model, clients)
        evaluate(run, study, model, clients, cycle, round, line)
        more = {"told": {client.name: client.pool.state() for client in clients}, "server": merging.state()}
        alfl.commit(run, study, model, clients, updates, cycle, round, more)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """What `flwr run` starts: all methods of the experiment, one after another, in the place's run folders."""
    place, error = Path(str(context.run_config["place"])).expanduser().absolute(), ""
    try:
        serve(grid, place, context.run_config)
    except BaseException as failure:
        error = "".join(traceback.format_exception_only(failure)).strip()
        raise
    finally:
        if place.is_dir():
            record.write_atomic(_end_of(place, context.run_id), json.dumps({"error": error}))


def serve(grid: Grid, place: Path, said: Mapping[str, Any]) -> None:
    """The experiment that the run's configuration names, with the clients of this place."""
    facts, notebook = homes.facts_of(place), str(said["notebook"])
    record.write_atomic(place / "server" / "pid", str(os.getpid()))
    seed, settings = facts["dealt"]["seed"], json.loads(str(said["settings"]))
    config = load(notebook, str(said["profile"]), facts["dealt"]["data"], [seed], **settings)
    check(config)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    study = homes.server_study(place, config)
    line = Line(grid, float(said["timeout"]), float(said["patience"]))
    task = Task(config, notebook, config.methods[0], seed, 0, 0, study.class_names)
    line.meet(task, facts["clients"], float(said["wait"]))
    for run in record.runs(config, notebook, root=place / "server" / "runs", plan=alfl.plan):
        experiment(run, study, line, facts["clients"], line.held)


def run_config(
    config: Config, notebook: str, place: str | Path, timeout: float = 600.0, patience: float = 0.0, wait: float = 120.0
) -> dict[str, Any]:
    """What `flwr run` is told of an experiment, see [tool.flwr.app.config] in pyproject.toml."""
    plain = {name: value for name, value in asdict(config).items() if name not in ("profile", "data", "seeds")}
    usual = asdict(load(notebook, config.profile, config.data.dataset))
    settings = {name: value for name, value in plain.items() if usual[name] != value}
    return {
        "place": str(Path(place).absolute()),
        "notebook": notebook,
        "profile": config.profile,
        "settings": json.dumps(settings),
        "timeout": float(timeout),
        "patience": float(patience),
        "wait": float(wait),
    }


def in_process(
    config: Config,
    notebook: str,
    place: str | Path,
    nodes: Mapping[str, Mapping[str, Any]] | None = None,
    tap: Callable[[Message, dict[str, bytes]], None] | None = None,
) -> Path:
    """The experiment with the clients of this place, in this process: every message passes through Flower's bytes.

    Quick to start, and mods (privacy, faults) work as with real clients. nodes: as for `Deployment`; tap: sees every
    message and the bytes that carried it. Returns where the run folders lie (`root` of `record`).
    """
    place, said = Path(place).absolute(), run_config(config, notebook, place)
    homes_of = {name: place / "clients" / name for name in homes.facts_of(place)["clients"]}
    told = {
        number: {"folder": str(folder), "name": name, **(nodes or {}).get(name, {})}
        for number, (name, folder) in enumerate(homes_of.items(), start=1)
    }
    with _some_task(), _quietly():
        serve(secure.InProcess(client_app, told, said, tap=tap), place, said)
    return place / "server" / "runs"


# --- real processes on this machine -----------------------------------------------------------------------------------


class Deployment:
    """One server and a node for each client as processes of this machine: TLS, nodes with registered keys, free ports.

    place: where `homes.deal` handed the data out. Certificates and keys are made at each start; a relay between each
    node and the server counts bytes (`traffic`) and breaks the line on request. simulation: Flower's simulation of the
    nodes in the place of processes. nodes: what the nodes' configuration says beside the folder, by client, such as
    {"00": {"faults": "nan@0.1"}}. warm: answers come from forks of processes that have everything imported already,
    where Flower starts a new Python for each of them (seconds of processor time an answer), and nodes ask for work
    twice a second, where Flower's ask every three seconds. Use it as a context manager: whatever happens, nothing is
    left behind.
    """

    def __init__(
        self,
        place: str | Path,
        simulation: bool = False,
        nodes: Mapping[str, Mapping[str, Any]] | None = None,
        warm: bool = True,
    ):
        self.place = Path(place).expanduser().absolute()
        self.names = list(homes.facts_of(self.place)["clients"])
        self.simulation, self.warm = simulation, warm and not simulation and hasattr(os, "fork")
        self.nodes = {name: dict((nodes or {}).get(name, {})) for name in self.names}
        self.folder = self.place / "wire"
        self._registered: dict[str, str] = {}
        self._earlier: dict[str, tuple[int, int, int]] = {}  # traffic before a restart
        self.relays: dict[str, wire.Relay] = {}
        self.processes: wire.Processes | None = None
        self.port = 0

    def __enter__(self) -> Deployment:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- beginning and end

    def start(self) -> Deployment:
        """Certificates, the server, and (unless simulated) a registered node for each client."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "home").mkdir(parents=True)
        self.processes = wire.Processes(self.folder / "logs")
        try:
            self.certificates = wire.certificates(self.folder / "tls")
            self.port = wire.free_ports(1)[0]
            connection = {"address": f"127.0.0.1:{self.port}", "root-certificates": str(self.certificates.ca)}
            lines = [f"{key} = {json.dumps(value)}" for key, value in connection.items()]
            text = "\n".join(["[superlink]", 'default = "fedal"', "[superlink.fedal]", *lines, ""])
            (self.folder / "home" / "config.toml").write_text(text)
            if self.warm:
                first = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(_checkout())!r})\n"
                forks = first + "from fedal_utils.flower import superexec\nsuperexec()\n"
                for name, text in (("flower-superexec", forks), ("flower-supernode", f"#!{sys.executable}\n{_EAGER}")):
                    record.write_atomic(self.folder / "bin" / name, text).chmod(0o755)
            self.start_server()
            for name in () if self.simulation else self.names:
                self.relays[name] = wire.Relay(self.port).start()
                self.start_client(name)
        except BaseException:
            self.stop()
            raise
        return self

    def start_server(self) -> None:
        """The server's process. It keeps nodes and messages in memory: after a kill, `restart`."""
        tls = self.certificates
        command = [
            "flower-superlink",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--ssl-certfile",
            str(tls.certificate),
            "--ssl-keyfile",
            str(tls.key),
            "--ssl-ca-certfile",
            str(tls.ca),
            "--disable-runtime-dependency-installation",
            "--simulation" if self.simulation else "--enable-supernode-auth",
        ]
        self.processes.start("server", _program(command), self.environment(), cwd=self.folder)
        wire.wait_for(lambda: _listens(self.port), 60, "the server to listen", self.processes, "server")

    def start_client(self, name: str, **config: Any) -> None:
        """A client's node, with a key made and registered for it; config: changes to its configuration.

        For a client that was killed as well: its old key is withdrawn, for the server would count the node that held
        it as present for another minute, and refuse a second one.
        """
        self.nodes[name].update(config)
        key = self.folder / "keys" / name
        if name in self._registered:
            self._flower("supernode", "unregister", self._registered.pop(name), "fedal")
            for file in (key, key.with_name(f"{name}.pub")):
                file.unlink()
        private, public = wire.node_key(key)
        answer = self._flower("supernode", "register", str(public), "fedal")
        self._registered[name] = str(answer["node-id"])
        node = {"folder": str(self.place / "clients" / name), "name": name, **self.nodes[name]}
        self.start_node(name, private, node, self.relays[name].port)

    def start_node(self, process: str, key: Path, node: Mapping[str, Any], port: int) -> None:
        """A node process with this private key, which connects to the server at `port`; refused without its key."""
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in node.items())
        eager = self.folder / "bin" / "flower-supernode"
        command = [
            str(eager) if self.warm else "flower-supernode",
            "--superlink",
            f"127.0.0.1:{port}",
            "--root-certificates",
            str(self.certificates.ca),
            "--auth-supernode-private-key",
            str(key),
            "--port",
            str(wire.free_ports(1)[0]),
            "--node-config",
            words,
        ]
        self.processes.start(process, _program(command), self.environment(), cwd=self.folder)

    def stop(self) -> list[str]:
        """End all processes and relays; what still runs afterwards (nothing should)."""
        left: list[str] = []
        if self.processes is not None:
            self.processes.stop_all()
            left = self.processes.alive()
        for relay in self.relays.values():
            relay.close()
        return left

    def restart(self) -> Deployment:
        """Stop what is left and start anew, with new certificates, keys and ports; a run that is submitted goes on."""
        self.stop()
        self._registered, self._earlier = {}, {name: tuple(row) for name, *row in self.traffic().values.tolist()}
        return self.start()

    def environment(self) -> dict[str, str]:
        """The environment of all of them: Flower's own files go to this deployment's folder, nothing calls home."""
        ours = {
            "FLWR_HOME": str(self.folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
            "RAY_USAGE_STATS_ENABLED": "0",
            "NO_COLOR": "1",
            "PATH": os.pathsep.join(
                [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
            ),
        }
        colours = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS")  # Jupyter's kernels set them; answers are read here
        return {**{name: value for name, value in os.environ.items() if name not in colours}, **ours, "TERM": "dumb"}

    def _flower(self, *words: str) -> dict[str, Any]:
        """What a command of Flower's answers, as JSON; RuntimeError with what it says if it fails."""
        command = _program(["flwr", *words, "--format", "json"])
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment(), cwd=self.folder)
        answer: dict[str, Any] = {}
        for match in re.finditer(r"^\{", done.stdout, re.MULTILINE):  # other words may stand around it
            with contextlib.suppress(ValueError):
                answer = json.JSONDecoder().raw_decode(done.stdout, match.start())[0]
        if done.returncode or not answer or not answer.get("success", True):
            raise RuntimeError(f"flwr {' '.join(words)} failed: {done.stdout.strip()} {done.stderr.strip()}")
        return answer

    # --- a run

    def submit(
        self, config: Config, notebook: str, timeout: float = 600.0, patience: float = 0.0, wait: float = 120.0
    ) -> int:
        """Start the experiment (`flwr run` with this checkout); the run's id. Its folders are below place/server."""
        check(config)
        said = run_config(config, notebook, self.place, timeout, patience, wait)
        file = self.folder / "run.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in said.items()))
        nodes = f"num-supernodes={len(self.names)} client-resources-num-cpus=1"
        engine = ["--federation-config", nodes] if self.simulation else []
        (self.place / "server" / "pid").unlink(missing_ok=True)
        answer = self._flower("run", str(_checkout()), "fedal", "--run-config", str(file), *engine)
        return int(answer["run-id"])

    def rounds(self, run_id: int, seconds: float = 3600.0, every: float = 0.5) -> Iterator[dict[str, Any]]:
        """Rows of the server as rounds are committed, until the run has ended; with method, seed and seconds so far.

        RuntimeError with the run's own words if it failed, TimeoutError after so many seconds.
        """
        begun, seen = time.monotonic(), set(self._committed())
        asked = begun
        while True:
            ended = self.ended(run_id)
            for key, row in self._committed().items():
                if key not in seen:
                    seen.add(key)
                    yield {**row, "at": time.monotonic() - begun}
            if ended is not None:
                if ended["error"]:
                    raise RuntimeError(f"the run failed: {ended['error']}")
                return
            now = time.monotonic()
            if now - begun > seconds:
                raise TimeoutError(f"the run did not end within {seconds:.0f} s; see {self.folder / 'logs'}")
            if self._gone():
                time.sleep(1.0)
                if self.ended(run_id) is None:
                    raise RuntimeError("the server's part of the run was killed: submit it again, and it goes on")
            if now - asked > 60:  # one that never began, or began elsewhere, leaves no word
                asked = now
                status = self.status(run_id)
                if status.startswith("finished") and self.ended(run_id) is None:
                    raise RuntimeError(f"the run is {status}, without a word of its end: {self.log(run_id)[-2000:]}")
            time.sleep(every)

    def _gone(self) -> bool:
        """True when the process of the server's part of the run has begun, and is no more."""
        file = self.place / "server" / "pid"
        return file.is_file() and not Path(f"/proc/{file.read_text()}").exists()

    def _committed(self) -> dict[tuple, dict[str, Any]]:
        rows = {}
        for file in sorted((self.place / "server" / "runs").rglob("rounds.csv")):
            table = pd.read_csv(file, dtype={"client": str})
            for row in table[table["client"] == "server"].to_dict("records"):
                method, seed = file.parts[-3], file.parts[-2]
                rows[str(file), row["cycle"], row["round"]] = {"method": method, "seed": seed, **row}
        return rows

    def ended(self, run_id: int) -> dict[str, Any] | None:
        """{'error': '' or what went wrong} once the server's part of the run has ended, else None."""
        file = _end_of(self.place, run_id)
        return json.loads(file.read_text()) if file.is_file() else None

    def status(self, run_id: int) -> str:
        """What Flower says of the run: 'pending', 'running', 'finished:completed', 'finished:failed', ..."""
        runs = self._flower("list", "fedal", "--run-id", str(run_id)).get("runs", [])
        return str(runs[0]["status"]) if runs else "unknown"

    def log(self, run_id: int) -> str:
        """What the server's part of the run has printed."""
        command = _program(["flwr", "log", str(run_id), "fedal", "--show"])
        return subprocess.run(command, capture_output=True, text=True, env=self.environment(), cwd=self.folder).stdout

    def traffic(self) -> pd.DataFrame:
        """Bytes on the wire so far, TLS and Flower's own messages included: client, up, down, connections."""
        rows = []
        for name, relay in self.relays.items():
            up, down, connections = self._earlier.get(name, (0, 0, 0))
            rows.append((name, up + relay.up, down + relay.down, connections + relay.connections))
        return pd.DataFrame(rows, columns=["client", "up", "down", "connections"])

    def tables(self, config: Config, notebook: str) -> pd.DataFrame:
        """`record.table` of this place's runs."""
        return record.table(config, notebook, root=self.place / "server" / "runs")


# Flower's `flower-supernode`, which asks for a message every three seconds, asking twice a second.
_EAGER = """\
import time
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

class Clock:
    def __getattr__(self, name):
        return getattr(time, name)

    def sleep(self, seconds):
        time.sleep(min(seconds, 0.5))

start_client_internal.time = Clock()
flower_supernode()
"""


def superexec() -> None:
    """Flower's `flower-superexec`, which starts a process for each answer, with forks of itself in their place.

    What takes seconds to import is imported once. A fork has random states of its own where somebody draws from a
    global one; everything of ours draws from generators by name.
    """
    from flwr.supercore import cli
    from flwr.supercore.superexec.executor import subprocess_executor
    from flwr.superlink.cli import flwr_serverapp
    from flwr.supernode.cli import flwr_clientapp

    programs = {"flwr-clientapp": flwr_clientapp, "flwr-serverapp": flwr_serverapp}
    start, torch_threads = subprocess.Popen, torch.get_num_threads()

    def begin(command: Sequence[str], **options: Any) -> Any:
        if command[0] not in programs:
            return start(command, **options)
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            np.random.set_state(np.random.RandomState(int.from_bytes(os.urandom(4), "big")).get_state())
            torch.set_num_threads(torch_threads)
            sys.argv = list(command)
            programs[command[0]]()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    subprocess_executor.subprocess = SimpleNamespace(Popen=begin, DEVNULL=subprocess.DEVNULL)
    sys.argv[0] = "flower-superexec"
    cli.flower_superexec()


def one_line(row: Mapping[str, Any]) -> str:
    """A round of `Deployment.rounds` in one line."""
    ap50 = row.get("ap50", math.nan)
    judged = "" if math.isnan(ap50) else f"  ap50 {ap50:.3f}"
    return (
        f"{row['method']} {row['seed']}  cycle {row['cycle'] + 1} round {row['round'] + 1}  images {row['images']}"
        f"{judged}  {row['at']:.1f} s"
    )


def how_to_label(place: str | Path, client: str, config: Config, notebook: str) -> str:
    """The command that opens the labelling page of a client whose labels a person draws."""
    home = homes.Home(Path(place) / "clients" / client, client, "human")
    run = home.run(config, notebook, config.methods[0], config.seeds[0])
    run.folder.mkdir(parents=True, exist_ok=True)
    images = home.folder / "images" if (home.folder / "annotations.json").is_file() else home.folder
    words = ["python", "-m", "fedal_utils", "label", "--asked", "--task", "boxes", "--data", str(images)]
    words += ["--store", str(run.folder / "labels.sqlite"), "--classes", *homes.facts_of(place)["classes"]]
    return shlex.join(words)


def _end_of(place: Path, run_id: int) -> Path:
    return place / "server" / f"ended-{run_id}.json"


def _program(words: Sequence[str]) -> list[str]:
    """The command with its program beside this Python."""
    beside = Path(sys.executable).parent / words[0]
    return [str(beside) if beside.exists() else words[0], *words[1:]]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _checkout() -> Path:
    """The folder of this package's pyproject.toml, which `flwr run` needs."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / "pyproject.toml").is_file():
        raise ValueError(f"{folder} has no pyproject.toml: real clients are started from a checkout of the repository")
    return folder
