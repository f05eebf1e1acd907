"""Merging: federated averaging (McMahan et al. 2017, 1602.05629), merging class by class, screening of updates.

Sums run in float64 over clients sorted by name: the order in which updates arrive changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..training import STEPS
from .messages import State, Update, unpack

WEIGHTS = ("images", "boxes", "equal")


def shares(updates: Sequence[Update], weights: str) -> np.ndarray:
    """Each update's part in the average, float64, summing to one: by 'images', by 'boxes', or 'equal'."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    if not updates:
        raise ValueError("no update to average: no client took part")
    counts = [1.0 if weights == "equal" else float(getattr(u, weights)) for u in updates]
    whole = math.fsum(counts)
    if whole <= 0:
        raise ValueError(f"weights by {weights} need at least one client with {weights}, got {counts}")
    return np.array(counts, dtype=np.float64) / whole


def average(updates: Sequence[Update], weights: str = "images") -> State:
    """FedAvg: w = sum_m p_m w_m (1602.05629 alg. 1), in float64, over clients sorted by name."""
    return weighted(updates, shares(updates, weights))


def weighted(updates: Sequence[Update], parts: Sequence[float]) -> State:
    """The sum of the updates' weights, each times its part; float64, over clients sorted by name."""
    return weighted_states([(u.client, unpack(u.payload)) for u in updates], parts)


def average_optimizer_states(updates: Sequence[Update], weights: str = "images") -> State:
    """The optimizer states that came with the updates, averaged as the weights are; the steps taken are the most.

    Only where all of them travel: {} if an update carries none.
    """
    if not all(u.optimizer_state for u in updates):
        return {}
    states = {u.client: unpack(u.optimizer_state) for u in updates}
    counts = {name: int(state.pop(STEPS)) for name, state in states.items()}
    merged = weighted_states(list(states.items()), shares(updates, weights))
    return {**merged, STEPS: torch.tensor(max(counts.values()))}


def weighted_states(sent: Sequence[tuple[str, State]], parts: Sequence[float]) -> State:
    """As `weighted`, of (client, state) that are unpacked already."""
    if len(sent) != len(parts):
        raise ValueError(f"{len(sent)} updates, but {len(parts)} parts")
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
            kinds[key] = value.dtype
            if key in sums:
                if value.shape != sums[key].shape:
                    got, rest = tuple(value.shape), tuple(sums[key].shape)
                    raise ValueError(f"client {client} sent {key!r} of shape {got}, the rest {rest}")
                sums[key] += value.double() * part
            else:
                sums[key] = value.double() * part
    return {key: value.to(kinds[key]) for key, value in sums.items()}


@torch.no_grad()
def screen(updates: Sequence[Update], before: State, above: float = 0.0) -> tuple[list[Update], dict[str, str]]:
    """The updates that are fit to be averaged, in the order in which they came, and of each other client the reason.

    before: the state that was sent to the clients. Reasons, the first that holds, by client name:
    'unreadable': the payload does not hold a state of plain tensors;
    'wrong shape': other entries than `before`, or an entry of another shape, or integers in the place of floats;
    'not finite': a value is NaN or infinite;
    'too large': with above > 0, the update's distance from `before` (L2 over all entries, float64) is more than `above`
    times the median distance of all updates that none of the other reasons holds for, itself among them. Of fewer than
    three such updates none is too large: the median of two is half way between them and says nothing about either.
    above: 0 = any distance, else > 1. The median stands while less than half of the updates are too large. What an
    optimizer sends along (`Update.optimizer_state`) is not looked at.
    """
    if not (above == 0 or 1 < above < math.inf):
        raise ValueError(f"above must be 0 (off) or a finite number > 1 (times the median distance), got {above}")
    reasons: dict[str, str] = {}
    moved: dict[int, float] = {}  # by place in `updates`
    for place in sorted(range(len(updates)), key=lambda place: updates[place].client):
        state = _read(updates[place].payload)
        reason = "unreadable" if state is None else _unfit(state, before)
        if reason:
            reasons[updates[place].client] = reason
        else:
            moved[place] = _distance(state, before)
    if above and len(moved) >= 3:
        most = above * float(np.median(list(moved.values())))
        for place in [place for place, distance in moved.items() if distance > most]:
            reasons[updates[place].client] = "too large"
            del moved[place]
    return [updates[place] for place in sorted(moved)], dict(sorted(reasons.items()))


def _read(payload: bytes) -> State | None:
    """As `unpack`; None if these bytes hold anything but plain tensors by name."""
    try:
        state = unpack(payload)
    except Exception:  # bytes from outside: torch.load raises whatever its readers trip over
        return None
    plain = all(v.layout is torch.strided and v.device.type == "cpu" and not v.is_nested for v in state.values())
    return state if plain else None


def _unfit(state: State, before: State) -> str:
    """Why a state cannot stand in an average with `before`; '' = it can."""
    if state.keys() != before.keys():
        return "wrong shape"
    for key, sent in before.items():
        if state[key].shape != sent.shape or state[key].is_floating_point() != sent.is_floating_point():
            return "wrong shape"
    return "" if all(bool(torch.isfinite(value).all()) for value in state.values()) else "not finite"


def _distance(state: State, before: State) -> float:
    """L2 norm of state - before over all entries, float64."""
    squares = (float((state[k].double() - sent.cpu().double()).square().sum()) for k, sent in before.items())
    return math.sqrt(math.fsum(squares))


def percent_shares(count: int) -> np.ndarray:
    """Equal parts as whole percentages that add up to 100, what is left over to the first (released code: 12 % and 11 %
    for nine devices).
    """
    each = 100 // count
    return np.array([each + (place < 100 - each * count) for place in range(count)]) / 100


def class_wise_shares(metric: np.ndarray) -> np.ndarray:
    """Parts of a merge class by class: each class gives its vote to the client that does it best (van Bommel, 7.2).

    metric: (M, C), one row a client, one column a class, bigger = better; NaN = the class was not judged. The clients
    that tie share a class's vote. A class that nobody detects (best value 0, or not judged) has no vote, where the
    released code would give it to the first client; if no class has one, all clients count alike.
    Returns (M,) float64, summing to one. Example: [[.9, .2], [.5, .6], [.1, .1]] -> [1/2, 1/2, 0].
    """
    metric = np.asarray(metric, dtype=np.float64)
    if metric.ndim != 2 or not metric.size or (metric < 0).any() or np.isinf(metric).any():
        raise ValueError(f"metric must be (clients, classes), finite and >= 0, got {metric.tolist()}")
    judged = np.nan_to_num(metric, nan=0.0)
    best = judged.max(axis=0)  # (C,)
    votes = (judged == best) & (best > 0)  # (M, C)
    voting = votes.any(axis=0)
    if not voting.any():
        return np.full(len(metric), 1 / len(metric))
    return (votes[:, voting] / votes[:, voting].sum(axis=0)).sum(axis=1) / voting.sum()


def sample_clients(clients: Sequence[str], fraction: float, rng: np.random.Generator) -> list[str]:
    """Client sampling: max(1, round(fraction * M)) names, drawn without order and returned sorted."""
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of clients must be in (0, 1], got {fraction}")
    ordered = sorted(clients)
    count = max(1, round(fraction * len(ordered)))
    return [ordered[i] for i in sorted(rng.choice(len(ordered), size=count, replace=False))]
