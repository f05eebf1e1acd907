"""Merging: federated averaging (McMahan et al. 2017, 1602.05629), merging class by class, screening of updates.

Sums run in float64 over clients sorted by name: the order in which updates arrive changes no bit.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..training import STEPS
from .messages import State, Update, unpack


def shares(updates: Sequence[Update], weights: str) -> np.ndarray:
    """Each update's part in the average, float64, summing to one: by 'images', by 'boxes', or 'equal'."""
    counts = [1.0 if weights == "equal" else float(getattr(u, weights)) for u in updates]
    whole = math.fsum(counts)
    if whole <= 0:
        raise ValueError(f"weights by {weights} need at least one client with {weights}, got {counts}")
    return np.array(counts, dtype=np.float64) / whole


def average(updates: Sequence[Update], weights: str = "images", parts: Sequence[float] | None = None) -> State:
    """FedAvg: w = sum_m p_m w_m (1602.05629 alg. 1). parts: in the place of the shares by `weights`."""
    parts = shares(updates, weights) if parts is None else parts
    return weighted_states([(u.client, unpack(u.payload)) for u in updates], parts)


def average_optimizer_states(updates: Sequence[Update], weights: str = "images") -> State:
    """Optimizer states, averaged as the weights are, the steps taken being the most; {} if an update carries none."""
    if not all(u.optimizer_state for u in updates):
        return {}
    states = {u.client: unpack(u.optimizer_state) for u in updates}
    counts = [int(state.pop(STEPS)) for state in states.values()]
    merged = weighted_states(list(states.items()), shares(updates, weights))
    return {**merged, STEPS: torch.tensor(max(counts))}


def weighted_states(sent: Sequence[tuple[str, State]], parts: Sequence[float]) -> State:
    """The sum of the clients' states, each times its part; ValueError with a client's name on what does not fit."""
    names = [client for client, _ in sent]
    if len(set(names)) != len(names):
        raise ValueError(f"a client sent two updates: {sorted(names)}")
    sums: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for place in np.argsort(names):
        (client, state), part = sent[place], float(parts[place])
        if sums and state.keys() != sums.keys():
            odd = sorted(state.keys() ^ sums.keys())[:3]
            raise ValueError(f"client {client} sent other entries than the rest: {odd}")
        for key, value in state.items():
            if not value.is_floating_point():
                raise ValueError(f"client {client} sent integer entry {key!r}: counters are never averaged")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"client {client} sent a non-finite {key!r}: it is not averaged")
            if key in sums and value.shape != sums[key].shape:
                shape = tuple(sums[key].shape)
                raise ValueError(f"client {client} sent {key!r} of shape {tuple(value.shape)}, the rest {shape}")
            kinds[key], term = value.dtype, value.double() * part
            sums[key] = sums[key] + term if key in sums else term
    return {key: value.to(kinds[key]) for key, value in sums.items()}


def too_large(updates: Sequence[Update], before: Mapping[str, Tensor], ratio: float) -> set[str]:
    """Clients whose update moved further from `before` than `ratio` times the median (L2); of fewer than three none."""
    moved = {}
    for update in updates:
        sent = unpack(update.payload).items()
        squares = [float((value.double() - before[key].double()).square().sum()) for key, value in sent]
        moved[update.client] = math.sqrt(math.fsum(squares))
    most = ratio * float(np.median(list(moved.values()))) if len(moved) >= 3 else math.inf
    return {client for client, distance in moved.items() if distance > most}


def percent_shares(count: int) -> np.ndarray:
    """Equal parts as whole percentages, what is left over to the first (released code: 12 % and 11 % of nine)."""
    each = 100 // count
    return np.array([each + (place < 100 - each * count) for place in range(count)]) / 100


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
    ordered = sorted(clients)
    count = max(1, round(fraction * len(ordered)))
    return [ordered[i] for i in sorted(rng.choice(len(ordered), size=count, replace=False))]
