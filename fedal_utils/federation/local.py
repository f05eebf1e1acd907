"""Training of clients that are in this process: detectors one after another, classifiers together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import detectors, training
from ..config import TrainingConfig
from ..data import Images, Labels
from ..detectors import Detector
from ..training import CachedImages, ClassifierTask, LocalTask, TrainingDiverged
from .client import Client
from .messages import Update, broadcast, pack, sent_keys, state_of, unpack
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
        return [_fit_linear(experiment, client) for client in clients]
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
    keeps, (recipe, iterations) = step.optimizer_state != "restart", experiment.recipe(step)
    task = LocalTask(
        experiment.run.torch_rng("train", client.name, step.cycle, step.round),
        client.name,
        iterations,
        client.optimizer_state if keeps else None,
        _position(experiment, step, client, recipe, iterations) if keeps else None,
    )
    payload = pack(client.local_state) if client.local_state else message
    dtype, sends = (
        "fp32" if step.local else experiment.config.federation.message_dtype,
        step.optimizer_state == "travels",
    )
    return train_detector(
        scratch, payload, client.pool.training_set(), recipe, task, dtype, sends, experiment.setup.device
    )


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
    dtype: precision of the answer; an optimizer state is sent in full, for second moments vanish in half precision.
    sends_state: the optimizer state is sent along.
    device: where to train.

    TrainingDiverged: a loss or weight is not finite; the optimizer state is as it was.
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
    clients, setup = experiment.clients, experiment.setup
    node, count = clients[0], len(clients)
    rows = np.sort(np.concatenate([c.pool.index[c.pool.labelled()] for c in clients]))
    recipe, iterations = experiment.recipe(step)
    keeps = experiment.config.federation.optimizer_state != "restart"
    before, whole = _position(experiment, step, node, recipe, iterations)
    task = LocalTask(
        experiment.run.torch_rng("train", CENTRALISED, step.cycle, step.round),
        CENTRALISED,
        None if iterations is None else iterations * count,
        node.optimizer_state if keeps else None,
        (before, whole * count) if keeps else None,
    )
    scratch, payload = detectors.clone(experiment.model), broadcast(experiment.model)
    part = setup.train.images.take(rows), node.pool.labels_of(rows)
    return train_detector(scratch, payload, part, recipe.replace(proximal=0.0), task, device=setup.device)


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


def _task_of(experiment: Experiment, step: Step, client: Client, iterations: int | None) -> ClassifierTask:
    """This client's task in this round: its labels, its unlabelled images, and its optimizer state."""
    config, run, pool = experiment.config, experiment.run, client.pool
    rows = pool.index[pool.labelled()]
    more = {"unlabelled": pool.index[pool.queried_in != 0] if config.as_released else pool.index[pool.unlabelled()]}
    if config.federation.optimizer_state == "client":
        each = iterations or config.training.epochs * math.ceil(len(rows) / config.training.batch)
        here = [r for c, r in run.plan if c == step.cycle] if config.federation.reset_each_cycle else run.plan
        done = int(client.optimizer_state.get(training.STEPS, 0))
        more |= {"optimizer_state": client.optimizer_state, "schedule_position": (done, each * len(here))}
    rng = run.torch_rng("train", client.name, step.cycle, step.round)
    return classifier_task(experiment.setup, client, rows, rng, iterations=iterations, **more)


def _fit_linear(experiment: Experiment, client: Client) -> Update:
    """Logistic regression on frozen features, from scratch on all labels so far."""
    pool, model = client.pool, detectors.clone(experiment.model)
    rows = pool.index[pool.labelled()]
    features = experiment.setup.train.images.take(rows).features[0]
    classes = pool.labels_of(rows).classes[:, 0] - 1
    loss = model.fit(features, classes, experiment.config.flywheel.regularisation)
    payload = pack(state_of(model, list(model.state_dict())))
    return Update(client.name, payload, len(rows), len(rows), 1, loss)
