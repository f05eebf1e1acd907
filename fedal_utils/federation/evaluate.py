"""The end of a round: metrics on the test set, and bytes on the way."""

import math
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


def evaluate(experiment: "Experiment", step: Step) -> dict[str, float]:
    """Metrics on the test set; while clients are local, the mean over their models."""
    model, own = experiment.model, [client.local_state for client in experiment.clients if client.local_state]
    if step.local and own:
        each = [_metrics(experiment, with_state(model, state)) for state in own]
        return {key: float(np.mean([found[key] for found in each])) for key in each[0]}
    return _metrics(experiment, model)


def _metrics(experiment: "Experiment", model) -> dict[str, float]:
    setup, clients = experiment.setup, experiment.clients
    test, names = setup.test, setup.class_names
    if experiment.config.model.classifier:
        scores = training.class_scores(model, test.images, device=setup.device)
        held = setup.train.class_counts().numpy()
        mixes = np.stack([held[client.pool.index].sum(axis=0) for client in clients]) if len(clients) > 1 else None
        return metrics.accuracy(scores, test.labels.classes[:, 0].cpu() - 1, names, mixes)
    return metrics.evaluate(training.predict(model, test.images, device=setup.device), test.labels, names)


def ap_by_class(experiment: "Experiment", clients: Sequence[Client]) -> np.ndarray:
    """(M, C) AP50 of each class by each client's own model; NaN where it cannot be evaluated.

    On the images that the server holds out, else those of the initial model; as_released: on the test set.
    """
    setup, seed = experiment.setup, experiment.run.seed
    rows = setup.held_out_rows(seed) if len(setup.held_out_rows(seed)) else setup.initial_rows(seed)
    shown = setup.test if experiment.config.as_released else setup.train.take(rows)
    if not len(shown):
        return np.full((len(clients), len(setup.class_names)), math.nan)
    table = []
    for client in clients:
        found = training.predict(with_state(experiment.model, client.local_state), shown.images, device=setup.device)
        ap = metrics.evaluate(found, shown.labels, setup.class_names)
        table.append([ap.get(f"ap50/{name}", math.nan) for name in setup.class_names])
    return np.array(table, dtype=float)


def traffic(experiment: "Experiment", step: Step, updates: Sequence[Update]) -> dict[str, tuple[int, int]]:
    """Bytes that each client sent and received in this round: packed messages, as they are.

    One node sends nothing, nor do local clients before the last cycle. A hop of a chain counts where it arrives.
    """
    clients = experiment.clients
    if experiment.method.scheme.central or len(clients) == 1:
        return {name: (0, 0) for name in [*(u.client for u in updates), *(c.name for c in clients)]}
    silent = step.handed_on or step.local
    sent = {update.client: update.bytes for update in updates}
    peers = {c.name: c.bytes_from_peers if step.round == 0 else 0 for c in clients}  # queries come before round 0
    return {c.name: (0 if silent else sent.get(c.name, 0), c.bytes_down + peers[c.name]) for c in clients}
