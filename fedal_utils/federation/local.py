"""Training of clients that are in this process: detectors one after another, classifiers together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import detectors, training
from ..config import TrainingConfig
from ..training import ClassifierTask, LocalTask, TrainingDiverged
from .client import Client, Exchange, train_detector
from .messages import Update, broadcast, pack, state_of, unpack
from .query import classifier_task
from .schemes import CENTRALISED, Step

if TYPE_CHECKING:
    from .experiment import Experiment


def train_here(
    experiment: Experiment, step: Step, clients: Sequence[Client], message: bytes
) -> list[Update | TrainingDiverged]:
    """What each of these clients sends after a round, in their order; if centralised, the node's one update."""
    if experiment.method.scheme.central:
        return [_train_on_one_node(experiment, step)]
    if experiment.config.model.classifier == "linear":
        return [_fit_linear(experiment, step, client) for client in clients]
    if experiment.config.model.classifier:
        return _train_classifiers(experiment, step, clients, message)
    scratch, sent = detectors.clone(experiment.model), []
    for client in clients:
        try:
            sent.append(train_client(experiment, step, client, scratch, message))
        except TrainingDiverged as error:
            sent.append(error)
            if experiment.config.federation.on_failure == "stop":
                raise TrainingDiverged(f"{error}; on_failure='skip' goes on without it") from error
    return sent


def train_client(experiment: Experiment, step: Step, client: Client, scratch, message: bytes) -> Update:
    """One client's part of a round of detectors: from the message (or its own weights), on its own labels.

    scratch: a detector of the right shape, whatever it holds; for a step that trains the head, its backbone is frozen.
    """
    config, keeps = experiment.config, step.optimizer_state != "restart"
    recipe, iterations = experiment.recipe(step)
    task = LocalTask(
        experiment.run.torch_rng("train", client.name, step.cycle, step.round),
        client.name,
        iterations,
        client.optimizer_state if keeps else None,
        _position(experiment, step, client, recipe, iterations) if keeps else None,
    )
    dtype = "fp32" if step.local else config.federation.message_dtype
    exchange = Exchange(config.federation.batch_norm, dtype, client.bn_buffers, step.optimizer_state == "travels")
    payload = pack(client.local_state) if client.local_state else message
    images, labels = client.pool.training_set()
    return train_detector(scratch, payload, images, labels, recipe, task, exchange, experiment.setup.device)


def _position(
    experiment: Experiment, step: Step, client: Client, recipe: TrainingConfig, iterations: int | None
) -> tuple[int, int]:
    """Where an optimizer whose state lives on stands: steps so far, and those that it will take in all.

    In epochs, the number of labels at the end counts: the schedule must not be over before the client is.
    """
    each = iterations or recipe.epochs * math.ceil(experiment.config.labels_needed() / recipe.batch)
    return int(client.optimizer_state.get(training.STEPS, 0)), each * step.schedule_rounds


def _train_on_one_node(experiment: Experiment, step: Step) -> Update:
    """On everyone's labels, for as many gradient steps as the clients take together."""
    config, clients, setup = experiment.config, experiment.clients, experiment.setup
    node, count = clients[0], len(clients)
    rows = np.sort(np.concatenate([c.pool.index[c.pool.labelled()] for c in clients]))
    recipe, iterations = experiment.recipe(step)
    keeps = config.federation.optimizer_state != "restart"
    before, whole = _position(experiment, step, node, recipe, iterations)
    task = LocalTask(
        experiment.run.torch_rng("train", CENTRALISED, step.cycle, step.round),
        CENTRALISED,
        None if iterations is None else iterations * count,
        node.optimizer_state if keeps else None,
        (before, whole * count) if keeps else None,
    )
    payload = broadcast(experiment.model, config.federation.batch_norm, "fp32")
    images, labels = setup.train.images.take(rows), node.pool.labels_of(rows)
    scratch = detectors.clone(experiment.model)
    recipe = recipe.replace(proximal=0.0)
    return train_detector(scratch, payload, images, labels, recipe, task, Exchange(), setup.device)


def _train_classifiers(
    experiment: Experiment, step: Step, clients: Sequence[Client], message: bytes
) -> list[Update | TrainingDiverged]:
    """All at once, from the global model.

    With `distillation_weight`, from a cycle's second round on, each also learns from the global model on its unlabelled
    images (KAFAL, 4.2). as_released: the "unlabelled" images are those that were unlabelled in the first cycle.
    """
    config, setup = experiment.config, experiment.setup
    recipe, iterations = experiment.recipe(step)
    ordered = sorted(clients, key=lambda client: client.name)
    tasks = [_task_of(experiment, step, client, iterations) for client in ordered]
    teacher = experiment.model if step.round else None
    model = detectors.clone(experiment.model)
    start = [unpack(message)] * len(tasks)
    options = {"teacher": teacher, "device": setup.device, "as_released": config.as_released}
    found = training.fit_together(model, start, tasks, setup.train.images, recipe, **options)
    results = dict(zip((c.name for c in ordered), found, strict=True))
    sizes = {task.client: len(task.rows) for task in tasks}
    sent: list[Update | TrainingDiverged] = []
    for client in clients:
        result, count = results[client.name], sizes[client.name]
        if not isinstance(result, TrainingDiverged):
            payload = pack(result.state, config.federation.message_dtype)
            result = Update(client.name, payload, count, count, result.steps, result.loss)
        sent.append(result)
    return sent


def _task_of(experiment: Experiment, step: Step, client: Client, iterations: int | None) -> ClassifierTask:
    """This client's task in this round: its labels, its unlabelled images, and its optimizer state."""
    config, run, pool = experiment.config, experiment.run, client.pool
    rows = pool.index[pool.labelled()]
    unlabelled = pool.index[pool.queried_in != 0] if config.as_released else pool.index[pool.unlabelled()]
    state, position = None, None
    if config.federation.optimizer_state == "client":
        state = client.optimizer_state
        each = config.federation.iterations or config.training.epochs * math.ceil(len(rows) / config.training.batch)
        here = [r for c, r in run.plan if c == step.cycle] if config.federation.reset_each_cycle else run.plan
        position = (int(state.get(training.STEPS, 0)), each * len(here))
    return classifier_task(
        experiment.setup,
        client,
        rows,
        run.torch_rng("train", client.name, step.cycle, step.round),
        iterations=iterations,
        optimizer_state=state,
        schedule_position=position,
        unlabelled=unlabelled,
    )


def _fit_linear(experiment: Experiment, step: Step, client: Client) -> Update:
    """Logistic regression on frozen features, from scratch on all labels so far."""
    pool, model = client.pool, detectors.clone(experiment.model)
    rows = pool.index[pool.labelled()]
    features = experiment.setup.train.images.take(rows).features[0]
    classes = pool.labels_of(rows).classes[:, 0] - 1
    loss = model.fit(features, classes, experiment.config.flywheel.regularisation)
    payload = pack(state_of(model, list(model.state_dict())))
    return Update(client.name, payload, len(rows), len(rows), 1, loss)
