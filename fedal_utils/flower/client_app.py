"""A client: what it answers to the server's messages. An error goes to the server as text without paths.

Every message can be repeated: a client starts from what it kept before that step, and gives the same answer.
"""

import functools
import json
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .. import federation, record
from ..config import Config
from ..federation import KEPT, Client, Experiment, Setup, Step
from ..sampling import Oracle, Pool
from ..training import TrainingDiverged
from .messages import DIVERGED, FAILED, HELLO, TRAIN, arrays_from, state_of, without_paths
from .workspace import read_set


@functools.lru_cache(maxsize=64)
def _setup(folder: Path, config: Config, classes: tuple[str, ...], device: str) -> Setup:
    part = read_set(folder, classes, config.data.image_size)
    return federation.setup_of(config, part, part.take([0]), torch.device(device))


def act(folder: Path, content: RecordDict, trains: bool) -> RecordDict:
    """Query with the model in the message and annotate here, or train it on what is labelled; keeps what stays here."""
    told, received = json.loads(content["task"]["json"]), state_of(content["arrays"])
    config, step = Config.of(**told["config"]), Step(**told["step"])
    torch.set_num_threads(config.threads or torch.get_num_threads())
    run = record.Run(config, told["notebook"], told["method"], told["seed"], folder / "runs", federation.plan)
    run.folder.mkdir(parents=True, exist_ok=True)
    here = run.folder / f"after-{run.plan.index((step.cycle, step.round)):06d}-{int(trains)}.pt"
    states = sorted(run.folder.glob("after-*.pt"))
    before = [file for file in states if file < here]
    kept = torch.load(before[-1], weights_only=True) if before else {}
    run.resumed = {**kept, "model": {**kept.get("model", {}), **received}}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setup = _setup(folder.absolute(), config, tuple(told["classes"]), device)
    oracle = Oracle(setup.train.labels, config.query.seconds_per_image, config.query.seconds_per_box)
    client = Client(folder.name, Pool(folder.name, setup.train.images, oracle, range(len(setup.train))))
    client.pool.replay(told["queries"])
    experiment = Experiment(run, setup, [client], oracle)
    answer, counts = RecordDict(), {"cycle": step.cycle, "round": step.round}
    if trains:
        if config.federation.reset_each_cycle and step.cycle > 0 and step.round == 0:
            client.optimizer_state = {}
        if step.head_only:
            experiment.model.freeze_backbone()
        message = federation.pack(received, config.federation.message_dtype)
        update = federation.train_client(experiment, step, client, experiment.model, message)
        if experiment.method.strategy.compares_local():
            client.last_local_state = federation.unpack(update.payload)
        answer["arrays"] = arrays_from(update.payload)
        counts |= {"steps": update.steps, "loss": float(update.loss)}
    else:
        experiment.query(step, client)
        counts["boxes"] = client.pool.cost().boxes
        if rows := client.pool.queries(step.cycle):
            answer["said"] = ConfigRecord({name: [row[name] for row in rows] for name in ("id", "score")})
    answer["counts"] = MetricRecord(counts)
    kept = {what: {client.name: getattr(client, what)} for what in KEPT if what != "local_state"}
    record.write_atomic(here, lambda out: torch.save({**kept, "model": run.resumed["model"]}, out))
    for old in {*states} - {*before[-2:], here}:  # a server that was killed repeats one round at most
        old.unlink()
    return answer


def build(place: str | Path | None = None) -> ClientApp:
    """Flower's ClientApp; place: of simulated clients, whose nodes have a number in the place of a folder."""
    client_app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        node, kind, folder = context.node_config, message.metadata.message_type, Path.home()
        try:
            if "folder" in node:
                folder = Path(str(node["folder"]))
            else:
                folder = sorted((Path(place) / "clients").iterdir())[int(node["partition-id"])]
            hello = RecordDict({"said": ConfigRecord({"name": folder.name})})
            said = hello if kind == HELLO else act(folder, message.content, trains=kind == TRAIN)
            return Message(said, reply_to=message)
        except Exception as error:  # an answer as well
            code = DIVERGED if isinstance(error, TrainingDiverged) else FAILED
            text = without_paths(f"{type(error).__name__}: {error}", folder, Path.home())
            return Message(Error(code, text), reply_to=message)

    for answers in (client_app.query("hello"), client_app.query("select"), client_app.train()):
        answers(answer)
    return client_app


app = build()
