"""Messages: a model's state packed to bytes; the receiver works with what it unpacks, rounded as it was sent."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Update:
    """What one client sends back: its packed weights, and the numbers that weigh and record them.

    optimizer_state: packed, where that is sent along with the model; else empty.
    """

    client: str
    payload: bytes
    images: int
    boxes: int
    steps: int
    loss: float
    optimizer_state: bytes = b""

    @property
    def bytes(self) -> int:
        """Size of the whole message."""
        return len(self.payload) + len(self.optimizer_state)


def pack(state: Mapping[str, Tensor], dtype: str = "fp32") -> bytes:
    """Serialise a state for sending; floats in this precision ('fp32' | 'fp16'), integers as they are."""
    sent = {}
    for name, value in state.items():
        value = value.detach().cpu()
        if value.is_floating_point():
            cast = value.to(_DTYPES[dtype])
            if not bool(torch.isfinite(cast).all()):
                raise ValueError(f"{name!r} is not finite in {dtype} (largest size {float(value.abs().max()):.4g})")
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


def sent_keys(model: nn.Module) -> list[str]:
    """What travels: all but a frozen backbone and integer counters, which are never averaged."""
    state = model.state_dict()
    return [key for key in model.exchanged() if state[key].is_floating_point()]


def state_of(model: nn.Module, keys: Sequence[str]) -> State:
    """A copy of these entries of the model's state, on the CPU."""
    state = model.state_dict()
    return {k: state[k].detach().cpu().clone() for k in keys}


def broadcast(model: nn.Module, dtype: str = "fp32") -> bytes:
    """The message that carries the global model to one client."""
    return pack(state_of(model, sent_keys(model)), dtype)
