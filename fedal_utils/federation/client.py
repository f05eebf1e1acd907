"""A client, what stays with it, and what it sends: states packed to bytes, which arrive rounded as they were sent."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..sampling import Pool

State = dict[str, Tensor]
KEPT = ("optimizer_state", "local_state", "last_local_state", "stale_global_state", "vae_state")  # when a run resumes
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass
class Client:
    """A participant: its name, its pool, and what stays with it between rounds; at the end, what this round was."""

    name: str
    pool: Pool
    optimizer_state: State = field(default_factory=dict)  # where that is kept or sent along
    local_state: State = field(default_factory=dict)  # its own model: local-first, and the chain's first pass
    last_local_state: State = field(default_factory=dict)  # where a strategy compares it with the global model
    stale_global_state: State = field(default_factory=dict)  # the last it received, if it missed rounds (KAFAL, alg. 1)
    vae_state: State = field(default_factory=dict)  # of its VAE, where that is not refitted; never leaves it
    status: str = ""  # why it sent nothing: 'no labels', 'lost', 'diverged', ...
    bytes_down: int = 0


class ClientLost(RuntimeError):
    """A client's update did not arrive, or cannot be used; status: the same in a word or two, for the record."""

    def __init__(self, message: str, status: str = "lost"):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Update:
    """What one client sends back: its packed weights, and the numbers that weigh and record them."""

    client: str
    payload: bytes
    images: int
    boxes: int
    steps: int
    loss: float
    optimizer_state: bytes = b""  # packed, where it is sent along

    @property
    def bytes(self) -> int:
        """Size of the whole message."""
        return len(self.payload) + len(self.optimizer_state)


def pack(state: Mapping[str, Tensor], dtype: str = "fp32") -> bytes:
    """Serialise a state for sending; floats in this precision ('fp32' | 'fp16'), integers as they are."""
    sent = {}
    for name, value in state.items():
        kind = _DTYPES[dtype] if value.is_floating_point() else value.dtype
        # A view would be saved with all the memory behind it.
        sent[name] = value.detach().to("cpu", kind, copy=True).contiguous()
        if not bool(torch.isfinite(sent[name]).all()):
            raise ValueError(f"{name!r} is not finite in {dtype} (largest size {float(value.abs().max()):.4g})")
    buffer = io.BytesIO()
    torch.save(sent, buffer)
    return buffer.getvalue()


def unpack(payload: bytes) -> State:
    """The state in these bytes, floats back in float32; loads tensors only."""
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def state_of(model: nn.Module, keys: Sequence[str] | None = None) -> State:
    """A copy on the CPU of these entries of a model's state; by default of what travels: floats that are not frozen."""
    state = model.state_dict()
    if keys is None:
        keys = [key for key in model.exchanged() if state[key].is_floating_point()]
    return {k: state[k].detach().cpu().clone() for k in keys}


def broadcast(model: nn.Module, dtype: str = "fp32") -> bytes:
    """The message that carries a model."""
    return pack(state_of(model), dtype)
