"""A client: its pool, what stays with it between rounds, and its part of a round, training on its own labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ..config import TrainingConfig
from ..data import Images, Labels
from ..detectors import Detector
from ..sampling import Pool
from ..training import CachedImages, LocalTask, TrainingDiverged, fit
from .messages import State, Update, batch_norm_keys, pack, sent_keys, state_of, unpack


@dataclass
class Client:
    """A participant: its name, its pool, and what stays with it between rounds.

    bn_buffers: BatchNorm statistics under the policy 'local'. optimizer_state: where that is kept or sent along.
    local_state: the weights of its own model while it has one (local-first, and the chain's first pass).
    last_local_state: its weights after its latest training, where a strategy compares them with the global model.
    stale_global_state: the global model that it received last, while that is not the current one (KAFAL's algorithm 1:
    a client that missed rounds compares stale models). vae_state: the weights of its VAE, where that is not refitted in
    every cycle; it never leaves the client.

    Of the current round: status, why it sent nothing ('no labels', 'lost', 'diverged', ...; '' if it did); bytes_down,
    what it received; bytes_from_peers, of other clients' models that it received to query with; metrics of the global
    model on test images of its own, where it has some.
    """

    name: str
    pool: Pool
    bn_buffers: State = field(default_factory=dict)
    optimizer_state: State = field(default_factory=dict)
    local_state: State = field(default_factory=dict)
    last_local_state: State = field(default_factory=dict)
    stale_global_state: State = field(default_factory=dict)
    vae_state: State = field(default_factory=dict)
    status: str = ""
    bytes_down: int = 0
    bytes_from_peers: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


KEPT = (  # of a client, in the resume point
    *("bn_buffers", "optimizer_state", "local_state"),
    *("last_local_state", "stale_global_state", "vae_state"),
)


class ClientLost(RuntimeError):
    """A client's update did not arrive, or cannot be used; names the client, the cycle and the round.

    status: the same in a word or two, for the record.
    """

    def __init__(self, message: str, status: str = "lost"):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Exchange:
    """How a client's model is sent back.

    batch_norm: see `messages.sent_keys`. dtype: precision of the message. bn_buffers: with batch_norm='local' the
    client's own statistics, read before training and updated after it. send_optimizer_state: packed with the update.
    """

    batch_norm: str = "average"
    dtype: str = "fp32"
    bn_buffers: State | None = None
    send_optimizer_state: bool = False


def train_detector(
    model: Detector,
    payload: bytes,
    images: Images | CachedImages,
    labels: Labels,
    recipe: TrainingConfig,
    task: LocalTask,
    exchange: Exchange,
    device: str | torch.device = "cpu",
) -> Update:
    """One client's part of one round: unpack the weights, train on its own labels, pack the result.

    model: scratch space, whatever weights it holds; what the payload does not carry (BatchNorm statistics that are not
    averaged, counters) is put back afterwards, so that clients can share it one after the other.
    payload: the message with the weights to start from.
    images, labels: what the client has labelled.
    recipe: how to train.
    task: generator, steps, and the optimizer state, which is updated if training succeeds.
    exchange: how the result is sent.

    TrainingDiverged: a loss or weight is not finite; BatchNorm statistics and optimizer state are as they were.
    """
    own_keys = sorted(set(model.exchanged()) - set(sent_keys(model, exchange.batch_norm)))
    before = state_of(model, own_keys)
    unknown = model.load_state_dict(unpack(payload), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"client {task.client} was sent entries that its model does not have: {unknown[:3]}")
    if exchange.bn_buffers:
        model.load_state_dict(exchange.bn_buffers, strict=False)
    kept = task.optimizer_state
    if kept is not None:
        task = LocalTask(task.rng, task.client, task.iterations, dict(kept), task.schedule_position)
    steps, losses = 0, []
    frozen = batch_norm_frozen(model) if exchange.batch_norm == "frozen" else contextlib.nullcontext()
    try:
        with frozen:
            for row in fit(model, images, labels, recipe, task, device=device):
                steps = row["steps"]
                losses.append(row["loss"])
        state = state_of(model, sent_keys(model, exchange.batch_norm))
        buffers = state_of(model, sorted(batch_norm_keys(model)))
    finally:
        model.load_state_dict(before, strict=False)
    if not losses:
        raise ValueError(f"client {task.client} made no step: iterations={task.iterations}, epochs={recipe.epochs}")
    try:
        sent = pack(state, exchange.dtype)
        along = exchange.send_optimizer_state and task.optimizer_state
        optimizer = pack(task.optimizer_state) if along else b""  # second moments vanish in half precision
    except ValueError as error:
        raise TrainingDiverged(f"client {task.client}: {error}") from None
    if exchange.bn_buffers is not None and exchange.batch_norm == "local":
        exchange.bn_buffers.update(buffers)
    if kept is not None:
        kept.update(task.optimizer_state)
    boxes = int((labels.classes > 0).sum())
    return Update(task.client, sent, len(images), boxes, steps, losses[-1], optimizer_state=optimizer)


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
