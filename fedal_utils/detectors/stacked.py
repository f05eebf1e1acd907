"""M clients' classifiers as one stacked model, so that small clients train together.

It is the same module with its layers widened: M clients' channels lie side by side, convolutions and linear layers are
grouped, so nobody's numbers meet anybody else's. Its state is the clients' states, joined along the first dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .classifiers import Classifier

State = dict[str, Tensor]


class GroupedLinear(nn.Module):
    """M linear layers side by side: (B, M * inputs) -> (B, M * outputs)."""

    def __init__(self, count: int, inputs: int, outputs: int):
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.empty(count * outputs, inputs))
        self.bias = nn.Parameter(torch.empty(count * outputs))

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.unflatten(1, (self.count, -1)).transpose(0, 1)  # (M, B, inputs)
        weight = self.weight.unflatten(0, (self.count, -1)).transpose(1, 2)  # (M, inputs, outputs)
        out = torch.baddbmm(self.bias.view(self.count, 1, -1), inputs, weight)  # (M, B, outputs)
        return out.transpose(0, 1).flatten(1)


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm of M clients' channels, whose batches may be of different length.

    valid: (B, M) bool, which images of the batch are each client's own; None: all. The rest is padding, which neither
    moves the statistics nor gets a gradient through them.
    """

    valid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.valid is None or not self.training:
            return super().forward(x)
        clients = self.valid.shape[1]
        weight = self.valid.to(x.dtype).repeat_interleave(x.shape[1] // clients, dim=1)[:, :, None, None]
        count = weight.sum(0) * (x.shape[2] * x.shape[3])  # (C, 1, 1), pixels that count
        mean = (x * weight).sum((0, 2, 3), keepdim=True) / count
        centred = (x - mean) * weight
        variance = centred.square().sum((0, 2, 3), keepdim=True) / count
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(unbiased.flatten(), self.momentum)
        scale = self.weight.view(1, -1, 1, 1) * (variance + self.eps).rsqrt()
        return centred * scale + self.bias.view(1, -1, 1, 1)


def stacked(model: Classifier, count: int) -> Classifier:
    """A model that holds `count` clients' weights: scaled pixels (B, count * 3, H, W) -> scores (B, count * C).

    Its weights are not set yet, see `join`. A layer that cannot be widened is an error.
    """
    return _widened(copy.deepcopy(model), count)


def _widened(module: nn.Module, count: int) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            wide = nn.Conv2d(
                count * child.in_channels,
                count * child.out_channels,
                child.kernel_size,
                child.stride,
                child.padding,
                groups=count * child.groups,
                bias=child.bias is not None,
            )
        elif isinstance(child, nn.BatchNorm2d):
            wide = GroupedBatchNorm(count * child.num_features, child.eps, child.momentum)
        elif isinstance(child, nn.Linear):
            wide = GroupedLinear(count, child.in_features, child.out_features)
        elif any(True for _ in child.parameters(recurse=False)):
            raise ValueError(f"a layer of type {type(child).__name__} cannot be stacked")
        else:
            wide = _widened(child, count)
        setattr(module, name, wide.to(next(child.parameters(), torch.empty(0)).device))
    return module


def mark_valid(model: nn.Module, valid: Tensor | None) -> None:
    """Tell the stacked model which images of the next batch are whose: see `GroupedBatchNorm`."""
    for module in model.modules():
        if isinstance(module, GroupedBatchNorm):
            module.valid = valid


def join(states: Sequence[State]) -> State:
    """Clients' states as one state of the stacked model; counters, which are nobody's, are left out."""
    return {k: torch.cat([s[k] for s in states]) for k, v in states[0].items() if v.dim() > 0}


def split(state: State, count: int) -> list[State]:
    """The clients' states of a stacked one, as copies on the CPU; counters are left out."""
    parts = {k: v.detach().cpu().chunk(count) for k, v in state.items() if v.dim() > 0}
    return [{k: part[m].clone() for k, part in parts.items()} for m in range(count)]
