"""Messages: a model's state packed to bytes; the bytes are counted, and the receiver works with what it unpacks.

So half precision in a message has its real effect on what is learned.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
BATCH_NORM = ("average", "local", "frozen")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Update:
    """What one client sends back: its packed weights, and the numbers that weigh and record them.

    optimizer_state: packed, where that is sent along with the model; else empty. size: bytes sent
    where the payload is not to be seen (secure aggregation), which is then empty.
    """

    client: str
    payload: bytes
    images: int
    boxes: int
    steps: int
    loss: float
    optimizer_state: bytes = b""
    size: int = 0

    @property
    def bytes(self) -> int:
        """Size of the whole message."""
        return len(self.payload) + len(self.optimizer_state) + self.size


def pack(state: Mapping[str, Tensor], dtype: str = "fp32") -> bytes:
    """Serialise a state for sending; floats in this precision ('fp32' | 'fp16'), integers as they are."""
    if dtype not in _DTYPES:
        raise ValueError(f"message precision must be one of {tuple(_DTYPES)}, got {dtype!r}")
    sent_as = _DTYPES[dtype]
    sent = {}
    for name, value in state.items():
        value = value.detach().cpu()
        if value.is_floating_point():
            cast = value.to(sent_as)
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
    not_sent = set() if batch_norm == "average" else batch_norm_keys(model)
    state = model.state_dict()
    return [k for k in keys if k not in not_sent and state[k].is_floating_point()]


def state_of(model: nn.Module, keys: Sequence[str]) -> State:
    """A copy of these entries of the model's state, on the CPU."""
    state = model.state_dict()
    return {k: state[k].detach().cpu().clone() for k in keys}


def broadcast(model: nn.Module, batch_norm: str = "average", dtype: str = "fp32") -> bytes:
    """The message that carries the global model to one client."""
    return pack(state_of(model, sent_keys(model, batch_norm)), dtype)
