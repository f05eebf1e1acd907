"""Training in this process: clients with detectors one after another, with classifiers together; the initial model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import detectors, record, training
from ..config import Config, TrainingConfig
from ..data import Images, Labels
from ..detectors import Detector
from ..sampling import Oracle, Pool
from ..training import CachedImages, LocalTask, TrainingDiverged
from .client import Client
from .messages import State, Update, broadcast, pack, sent_keys, state_of, unpack
from .query import classifier_task
from .schemes import CENTRALISED, Step

if TYPE_CHECKING:
    from .experiment import Experiment
    from .setup import Setup

_OWN = ("initial_model_images", "initial_model_iterations", "initial_model_warmup")
_LATER = (
    *("profile", "methods", "seeds", "side_seeds", "evaluate_every", "as_released"),
    *("schedule", "warmup", "epochs", "balanced_softmax", "distillation_weight"),
)


def train_here(
    experiment: "Experiment", step: Step, clients: Sequence[Client], message: bytes
) -> list[Update | TrainingDiverged]:
    """What each of these clients sends after a round; if centralised, the node's one update."""
    if experiment.method.scheme.central:
        return [_train_on_one_node(experiment, step)]
    if experiment.config.model.classifier == "linear":
        return [_fit_linear(experiment, client) for client in clients]
    if experiment.config.model.classifier:
        return _train_classifiers(experiment, step, clients, message)
    scratch, sent = detectors.clone(experiment.model), []
    for client in clients:
        try:
            sent.append(train_client(experiment, step, client, scratch, message))
        except TrainingDiverged as error:
            sent.append(error)
    return sent


def train_client(experiment: "Experiment", step: Step, client: Client, scratch, message: bytes) -> Update:
    """One client's round with a detector, from the message or its own weights; scratch: any detector of that shape."""
    recipe, task = _recipe_and_task(experiment, step, client, client.name)
    payload = pack(client.local_state) if client.local_state else message
    dtype = "fp32" if step.local else experiment.config.federation.message_dtype
    along = step.optimizer_state == "travels"
    part, device = client.pool.training_set(), experiment.setup.device
    return train_detector(scratch, payload, part, recipe, task, dtype, along, device)


def _recipe_and_task(
    experiment: "Experiment", step: Step, client: Client, name: str, count: int = 1
) -> tuple[TrainingConfig, LocalTask]:
    """How a client trains in this step; count: clients whose steps one node takes."""
    (recipe, iterations), state, position = experiment.recipe(step), None, None
    if step.optimizer_state != "restart":
        state = client.optimizer_state
        # the schedule must not be over before the client is, so the labels at the end count
        each = iterations or recipe.epochs * math.ceil(experiment.config.labels_needed() / recipe.batch)
        position = (int(state.get(training.STEPS, 0)), each * step.schedule_rounds * count)
    rng = experiment.run.torch_rng("train", name, step.cycle, step.round)
    return recipe, LocalTask(rng, name, iterations and iterations * count, state, position)


def train_detector(
    model: Detector,
    payload: bytes,
    part: tuple[Images | CachedImages, Labels],
    recipe: TrainingConfig,
    task: LocalTask,
    dtype: str = "fp32",
    sends_state: bool = False,
    device: str | torch.device = "cpu",
) -> Update:
    """Unpack the weights, train on these images and labels, pack the result.

    model: scratch space, whatever weights it holds.
    payload: the message with the weights to start from.
    part: what the client has labelled.
    recipe: how to train.
    task: generator, steps, and the optimizer state, which is updated if training succeeds.
    dtype: of the answer; an optimizer state is sent in full precision, where second moments do not vanish.
    sends_state: the optimizer state is sent along.
    device: where to train.
    """
    model.load_state_dict(unpack(payload), strict=False)
    images, labels = part
    kept = task.optimizer_state
    if kept is not None:
        task = replace(task, optimizer_state=dict(kept))
    rows = list(training.fit(model, images, labels, recipe, task, device=device))
    if not rows:
        raise ValueError(f"client {task.client} made no step: iterations={task.iterations}, epochs={recipe.epochs}")
    try:
        sent = pack(state_of(model, sent_keys(model)), dtype)
        optimizer = pack(task.optimizer_state) if sends_state and task.optimizer_state else b""
    except ValueError as error:
        raise TrainingDiverged(f"client {task.client}: {error}") from None
    if kept is not None:
        kept.update(task.optimizer_state)
    boxes = int((labels.classes > 0).sum())
    return Update(task.client, sent, len(images), boxes, rows[-1]["steps"], rows[-1]["loss"], optimizer)


def _train_on_one_node(experiment: "Experiment", step: Step) -> Update:
    """On everyone's labels, for as many gradient steps as the clients take together."""
    clients, setup = experiment.clients, experiment.setup
    rows = np.sort(np.concatenate([c.pool.index[c.pool.labelled()] for c in clients]))
    recipe, task = _recipe_and_task(experiment, step, clients[0], CENTRALISED, len(clients))
    scratch, payload = detectors.clone(experiment.model), broadcast(experiment.model)
    part = setup.train.images.take(rows), clients[0].pool.labels_of(rows)
    return train_detector(scratch, payload, part, recipe, task, device=setup.device)


def _train_classifiers(
    experiment: "Experiment", step: Step, clients: Sequence[Client], message: bytes
) -> list[Update | TrainingDiverged]:
    """All at once, from the global model, which from a cycle's second round on also teaches (KAFAL, 4.2).

    as_released: the "unlabelled" images are those that were unlabelled in the first cycle.
    """
    config, run, setup = experiment.config, experiment.run, experiment.setup
    recipe, iterations = experiment.recipe(step)
    tasks = []
    for client in sorted(clients, key=lambda client: client.name):
        pool = client.pool
        rows, others = pool.index[pool.labelled()], pool.queried_in != 0 if config.as_released else pool.unlabelled()
        more = {"unlabelled": pool.index[others], "iterations": iterations}
        if config.federation.optimizer_state == "client":
            each = iterations or config.training.epochs * math.ceil(len(rows) / config.training.batch)
            rounds = sum(cycle == step.cycle or not config.federation.reset_each_cycle for cycle, _ in run.plan)
            position = (int(client.optimizer_state.get(training.STEPS, 0)), each * rounds)
            more |= {"optimizer_state": client.optimizer_state, "schedule_position": position}
        rng = run.torch_rng("train", client.name, step.cycle, step.round)
        tasks.append(classifier_task(setup, client, rows, rng, **more))
    model, teacher, start = detectors.clone(experiment.model), experiment.model if step.round else None, unpack(message)
    options = {"teacher": teacher, "device": setup.device, "as_released": config.as_released}
    found = training.fit_together(model, [start] * len(tasks), tasks, setup.train.images, recipe, **options)
    sent: dict[str, Update | TrainingDiverged] = {}
    for task, result in zip(tasks, found, strict=True):
        if not isinstance(result, TrainingDiverged):
            payload, count = pack(result.state, config.federation.message_dtype), len(task.rows)
            result = Update(task.client, payload, count, count, result.steps, result.loss)
        sent[task.client] = result
    return [sent[client.name] for client in clients]


def _fit_linear(experiment: "Experiment", client: Client) -> Update:
    """Logistic regression on frozen features, from scratch on all labels so far."""
    model, (images, labels) = detectors.clone(experiment.model), client.pool.training_set()
    loss = model.fit(images.features[0], labels.classes[:, 0] - 1, experiment.config.flywheel.regularisation)
    payload = pack(state_of(model, list(model.state_dict())))
    return Update(client.name, payload, len(images), len(images), 1, loss)


def initial_model(run: record.Run, setup: "Setup") -> State:
    """Weights that every method of a seed begins from, trained centrally on images of the server's; made once."""
    config, rows, settings = run.config, setup.initial_rows(run.seed), run.config.federation

    def make() -> State:
        model = detectors.build(config, len(setup.class_names) or 1, run.torch_rng("weights"))
        if len(rows) and settings.initial_model_iterations:
            recipe = config.training.replace(schedule="cosine", warmup=settings.initial_model_warmup)
            _train_initial(run, setup, model, rows, recipe)
        return state_of(model, model.exchanged())

    where = ("shared", run.seed, "starting-point")
    return record.shared(_alike(config), *where, make, root=run.root, fingerprint=run.fingerprint)


def _train_initial(run: record.Run, setup: "Setup", model, rows: np.ndarray, recipe: TrainingConfig) -> None:
    server = Client("initial model", Pool("initial model", setup.train.images, Oracle(setup.train.labels), rows))
    server.pool.label(range(len(rows)), 0)
    rng, iterations = run.torch_rng("starting point"), run.config.federation.initial_model_iterations
    if run.config.model.classifier:
        task = classifier_task(setup, server, rows, rng, iterations=iterations)
        recipe = recipe.replace(balanced_softmax=False, distillation_weight=0.0)  # plain cross-entropy
        training.fit_classifier(model, task, setup.train.images, recipe, device=setup.device)
    else:
        task = LocalTask(rng, server.name, iterations)
        list(training.fit(model, *server.pool.training_set(), recipe, task, device=setup.device))


def _alike(config: Config) -> Config:
    """What an initial model depends on, all else at its default: notebooks, schemes and optimizer settings share it."""
    default, flat = Config(), config.flat()
    config = replace(config, federation=default.federation, query=default.query, vae=default.vae)
    later = {name: default.flat()[name] for name in _LATER}
    return config.replace(**later, **{name: flat[name] for name in _OWN})
