"""Merging: federated averaging (McMahan et al. 2017, 1602.05629), merging class by class, screening of updates."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..training import STEPS
from .client import State, Update, unpack


def shares(updates: Sequence[Update], weights: str) -> np.ndarray:
    """Each update's part in the average, float64, summing to one: by 'images', by 'boxes', or 'equal'.

    'percent': equal but in whole percent, what is left over to the first by name (released code: 12, 11, ... of nine).
    """
    if weights == "percent":
        place = np.argsort(np.argsort([update.client for update in updates]))
        return (100 // len(updates) + (place < 100 % len(updates))) / 100
    counts = [1.0 if weights == "equal" else float(getattr(u, weights)) for u in updates]
    whole = math.fsum(counts)
    if whole <= 0:
        raise ValueError(f"weights by {weights} need at least one client with {weights}, got {counts}")
    return np.array(counts, dtype=np.float64) / whole


def average(updates: Sequence[Update], weights: str = "images") -> State:
    """FedAvg: w = sum_m p_m w_m (1602.05629 alg. 1), weighed as in `shares`."""
    return weighted_states([(u.client, unpack(u.payload)) for u in updates], shares(updates, weights))


def average_optimizer_states(updates: Sequence[Update], weights: str = "images") -> State:
    """Optimizer states, averaged as the weights are, the steps taken being the most; {} if an update carries none."""
    if not all(u.optimizer_state for u in updates):
        return {}
    states = {u.client: unpack(u.optimizer_state) for u in updates}
    counts = [int(state.pop(STEPS)) for state in states.values()]
    return {**weighted_states(list(states.items()), shares(updates, weights)), STEPS: torch.tensor(max(counts))}


def weighted_states(sent: Sequence[tuple[str, State]], parts: Sequence[float]) -> State:
    """The sum of the clients' states, each times its part; ValueError with a client's name on what does not fit.

    It runs in float64 over clients sorted by name: the order in which updates arrive changes no bit.
    """
    names = [client for client, _ in sent]
    if len(set(names)) != len(names):
        raise ValueError(f"a client sent two updates: {sorted(names)}")
    order = np.argsort(names)
    first = sent[order[0]][1]
    for client, state in sent:
        if odd := sorted(state.keys() ^ first.keys()):
            raise ValueError(f"client {client} sent other entries than client {names[order[0]]}: {odd[:3]}")
        for key, value in state.items():
            if not value.is_floating_point():
                raise ValueError(f"client {client} sent integer entry {key!r}: counters are never averaged")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"client {client} sent a non-finite {key!r}: it is not averaged")
            if value.shape != first[key].shape:
                raise ValueError(f"client {client} sent {key!r} of another shape: {tuple(value.shape)}")

    def merged(key: str) -> Tensor:
        return functools.reduce(torch.add, (sent[place][1][key].double() * float(parts[place]) for place in order))

    return {key: merged(key).to(value.dtype) for key, value in first.items()}


def too_large(updates: Sequence[Update], before: Mapping[str, Tensor], ratio: float) -> set[str]:
    """Clients whose update moved further from `before` than `ratio` times the median (L2); of fewer than three none."""
    moved = {}
    for update in updates:
        squares = [(v.double() - before[k].double()).square().sum() for k, v in unpack(update.payload).items()]
        moved[update.client] = math.sqrt(math.fsum(squares))
    most = ratio * float(np.median(list(moved.values()))) if len(moved) >= 3 else math.inf
    return {client for client, distance in moved.items() if distance > most}


def class_wise_shares(metric: np.ndarray) -> np.ndarray:
    """Parts of a merge class by class: each class gives its vote to the client that does it best (van Bommel, 7.2).

    metric: (M, C), bigger = better; NaN = not judged. Ties share a vote. A class that nobody detects has none (released
    code: the first client's); without any, all count alike. Returns (M,), summing to one.
    Example: [[.9, .2], [.5, .6], [.1, .1]] -> [1/2, 1/2, 0].
    """
    judged = np.nan_to_num(np.asarray(metric, dtype=np.float64), nan=0.0)
    best = judged.max(axis=0)  # (C,)
    votes = (judged == best) & (best > 0)  # (M, C)
    voting = votes.any(axis=0)
    if not voting.any():
        return np.full(len(judged), 1 / len(judged))
    return (votes[:, voting] / votes[:, voting].sum(axis=0)).sum(axis=1) / voting.sum()


def sample_clients(clients: Sequence[str], fraction: float, rng: np.random.Generator) -> list[str]:
    """Client sampling: max(1, round(fraction * M)) names, drawn without order and returned sorted."""
    count = max(1, round(fraction * len(clients)))
    return sorted(rng.choice(sorted(clients), size=count, replace=False).tolist())
