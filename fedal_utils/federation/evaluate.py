"""The end of a round: metrics on the test set, and bytes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import metrics, training
from .client import Client
from .messages import Update
from .query import with_state
from .schemes import Step

if TYPE_CHECKING:
    from .experiment import Experiment


def evaluate(experiment: Experiment, step: Step) -> dict[str, float]:
    """Metrics on the test set; where clients hold BatchNorm statistics (or weights) of their own, the mean over their
    models. Of a classifier also by each client's mix of classes.
    """
    model, clients = experiment.model, experiment.clients
    own = [{**(client.local_state if step.local else {}), **client.bn_buffers} for client in clients]
    if any(own):
        each = [_metrics(experiment, with_state(model, state), ()) for state in own if state]
        return {key: float(np.mean([found[key] for found in each])) for key in each[0]}
    return _metrics(experiment, model, clients)


def _metrics(experiment: Experiment, model, clients: Sequence[Client]) -> dict[str, float]:
    setup = experiment.setup
    test, names = setup.test, setup.class_names
    if experiment.config.model.classifier:
        scores = training.class_scores(model, test.images, device=setup.device)
        held = setup.train.class_counts().numpy()
        mixes = np.stack([held[client.pool.index].sum(axis=0) for client in clients]) if len(clients) > 1 else None
        return metrics.accuracy(scores, test.labels.classes[:, 0].cpu() - 1, names, mixes)
    found = training.predict(model, test.images, device=setup.device)
    return metrics.evaluate(found, test.labels, names)


def traffic(experiment: Experiment, step: Step, updates: Sequence[Update]) -> dict[str, tuple[int, int]]:
    """Bytes that each client sent and received in this round: packed messages, as they are.

    One node sends nothing. While they are local, clients receive the initial model once, and send when all labels are
    there. A visit of a chain receives the model from the visitor before (one hop) and, in the first pass, sends its own
    to the server for the merge; the last visitor of all hands the result in.
    """
    clients = experiment.clients
    if experiment.method.scheme.central or len(clients) == 1:
        return {name: (0, 0) for name in [*(u.client for u in updates), *(c.name for c in clients)]}
    silent = step.handed_on or step.local  # a hop is counted when it arrives
    sent = {update.client: update.bytes for update in updates}
    peers = {c.name: c.bytes_from_peers if step.round == 0 else 0 for c in clients}  # queries come before round 0
    return {c.name: (0 if silent else sent.get(c.name, 0), c.bytes_down + peers[c.name]) for c in clients}
