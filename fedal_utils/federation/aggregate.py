"""Messages, bytes, merging: federated averaging (McMahan et al. 2017, 1602.05629) and merging class by class.

What travels is bytes: a state is packed, the packed bytes are counted, and the receiver works with what it unpacks, so
that half precision on the wire has its real effect. Sums run in float64 over clients sorted by name: the order in which
updates arrive changes no bit.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..data.readers import Images, Labels
from ..detectors.base import Detector
from ..detectors.classifiers import Classifier, State
from ..training import STEPS, CachedImages, ClassifierTask, LocalTask, TrainingDiverged, fit, fit_in_turn, fit_stacked

WEIGHTS = ("images", "boxes", "equal")
BATCH_NORM = ("average", "local", "frozen")
_WIRE = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Update:
    """What one client sends back: its packed weights, and the numbers that weigh and record them.

    memory: the packed state of its optimiser, where that travels with the model; else empty. size: bytes on the wire
    where the payload is not to be seen (`secure`), which is then empty.
    """

    client: str
    payload: bytes
    images: int
    boxes: int
    steps: int
    loss: float
    memory: bytes = b""
    size: int = 0

    @property
    def bytes(self) -> int:
        """Size of the whole message."""
        return len(self.payload) + len(self.memory) + self.size


def pack(state: Mapping[str, Tensor], wire: str = "fp32") -> bytes:
    """Serialise a state for sending; floats in `wire` precision ('fp32' | 'fp16'), integers as they are."""
    if wire not in _WIRE:
        raise ValueError(f"wire precision must be one of {tuple(_WIRE)}, got {wire!r}")
    dtype = _WIRE[wire]
    sent = {}
    for name, value in state.items():
        value = value.detach().cpu()
        if value.is_floating_point():
            cast = value.to(dtype)
            if not bool(torch.isfinite(cast).all()):
                raise ValueError(f"{name!r} is not finite in {wire} (largest size {float(value.abs().max()):.4g})")
            value = cast
        # A view would be saved with all the memory behind it.
        sent[name] = value.clone(memory_format=torch.contiguous_format)
    buffer = io.BytesIO()
    torch.save(sent, buffer)
    return buffer.getvalue()


def unpack(payload: bytes) -> State:
    """The state in these bytes, floats back in float32; loads tensors only."""
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def batch_norm_keys(model: nn.Module) -> set[str]:
    """Names of the running statistics and counters of BatchNorm layers in `model.state_dict()`."""
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            start = f"{prefix}." if prefix else ""
            names |= {start + buffer for buffer in ("running_mean", "running_var", "num_batches_tracked")}
    return names & set(model.state_dict())


def sent_keys(model: nn.Module, batch_norm: str = "average") -> list[str]:
    """What travels: all but a frozen backbone, integer counters, and (unless averaged) BatchNorm's statistics.

    batch_norm: 'average' float statistics with the weights; 'local': each client keeps its own (FedBN's idea, Li et al.
    2021, 2102.07623); 'frozen': nobody changes them. Counters are never averaged. A model without BatchNorm (the small
    size uses GroupNorm) is the same under all three.
    """
    if batch_norm not in BATCH_NORM:
        raise ValueError(f"the BatchNorm policy must be one of {BATCH_NORM}, got {batch_norm!r}")
    keys = model.exchanged() if hasattr(model, "exchanged") else list(model.state_dict())
    kept_home = set() if batch_norm == "average" else batch_norm_keys(model)
    state = model.state_dict()
    return [k for k in keys if k not in kept_home and state[k].is_floating_point()]


def state_of(model: nn.Module, keys: Sequence[str]) -> State:
    """A copy of these entries of the model's state, on the CPU."""
    state = model.state_dict()
    return {k: state[k].detach().cpu().clone() for k in keys}


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


def average_memory(updates: Sequence[Update], weights: str = "images") -> State:
    """The optimisers' states that came with the updates, averaged as the weights are; the steps taken are the most.

    Only where all of them travel: {} if an update carries none.
    """
    if not all(u.memory for u in updates):
        return {}
    states = {u.client: unpack(u.memory) for u in updates}
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
    optimiser sends along (`Update.memory`) is not looked at.
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


def take_part(clients: Sequence[str], fraction: float, rng: np.random.Generator) -> list[str]:
    """Client sampling: max(1, round(fraction * M)) names, drawn without order and returned sorted."""
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of clients must be in (0, 1], got {fraction}")
    ordered = sorted(clients)
    count = max(1, round(fraction * len(ordered)))
    return [ordered[i] for i in sorted(rng.choice(len(ordered), size=count, replace=False))]


def train_client(
    model: Detector,
    payload: bytes,
    images: Images | CachedImages,
    labels: Labels,
    recipe: TrainingConfig,
    rng: torch.Generator,
    client: str,
    iterations: int | None = None,
    wire: str = "fp32",
    batch_norm: str = "average",
    home: State | None = None,
    device: str | torch.device = "cpu",
    memory: State | None = None,
    travels: bool = False,
    span: tuple[int, int] | None = None,
) -> Update:
    """One client's part of one round: unpack the global weights, train on its own labels, pack the result.

    model: scratch space, whatever weights it holds; what the payload does not carry (BatchNorm statistics that are not
    averaged, counters) is put back afterwards, so that clients can share it one after the other. home: with
    batch_norm='local', the client's own statistics; read before training and updated after it. memory, span: the
    optimizer's state and the place in the schedule, see `training.LocalTask`. travels: pack the memory with the update.
    If training fails, home and memory are as they were.
    """
    kept_home = state_of(model, sorted(set(model.exchanged()) - set(sent_keys(model, batch_norm))))
    unknown = model.load_state_dict(unpack(payload), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"client {client} was sent entries that its model does not have: {unknown[:3]}")
    if home:
        model.load_state_dict(home, strict=False)
    steps, losses = 0, []
    remembered = None if memory is None else dict(memory)
    freeze = batch_norm_frozen(model) if batch_norm == "frozen" else contextlib.nullcontext()
    try:
        with freeze:
            task = LocalTask(rng, client, iterations, remembered, span)
            for row in fit(model, images, labels, recipe, task, device):
                steps = row["steps"]
                losses.append(row["loss"])
        state = state_of(model, sent_keys(model, batch_norm))
        own = state_of(model, sorted(batch_norm_keys(model)))
    finally:
        model.load_state_dict(kept_home, strict=False)
    if not losses:
        raise ValueError(f"client {client} made no step: iterations={iterations}, epochs={recipe.epochs}")
    try:
        sent = pack(state, wire)
        luggage = pack(remembered) if travels and remembered else b""  # second moments vanish in half precision
    except ValueError as error:
        raise TrainingDiverged(f"client {client}: {error}") from None
    if home is not None and batch_norm == "local":
        home.update(own)
    if memory is not None:
        memory.update(remembered)
    return Update(
        client,
        sent,
        images=len(images),
        boxes=int((labels.classes > 0).sum()),
        steps=steps,
        loss=losses[-1],
        memory=luggage,
    )


def train_together(
    model: Classifier,
    payload: bytes,
    lessons: Sequence[ClassifierTask],
    images: Images,
    recipe: TrainingConfig,
    teacher: Classifier | None = None,
    wire: str = "fp32",
    device: str | torch.device = "cpu",
    as_released: bool = False,
    stacked: bool = True,
) -> list[Update | TrainingDiverged]:
    """All clients' part of one round of a classifier: from the global weights, each on its own lesson, in its order.

    stacked: as one model (`training.fit_stacked`), else one client after another. `model` is not changed. A client
    whose training diverges has its error in its place, and its memory is as it was.
    """
    start = unpack(payload)
    options = {"teacher": teacher, "device": device, "as_released": as_released}
    train = fit_stacked if stacked else fit_in_turn
    taught = train(model, [start] * len(lessons), lessons, images, recipe, **options)
    return [
        result
        if isinstance(result, TrainingDiverged)
        else Update(
            lesson.client,
            pack(result.state, wire),
            images=len(lesson.rows),
            boxes=len(lesson.rows),
            steps=result.steps,
            loss=result.loss,
        )
        for result, lesson in zip(taught, lessons, strict=True)
    ]


@contextlib.contextmanager
def batch_norm_frozen(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers use their running statistics and do not update them, in train mode too."""

    def to_eval(module: nn.Module, _) -> None:  # returns nothing: what a pre-hook returns replaces the input
        module.eval()

    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(to_eval) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
