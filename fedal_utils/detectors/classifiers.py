"""Image classifiers: ResNet-8 (KAFAL), a CNN of four convolutions (LoGo), and M of either as one stacked model.

A stacked model is the same module with its layers widened: M clients' channels lie side by side, convolutions and
linear layers are grouped, so nobody's numbers meet anybody else's. Its state is the clients' states, joined along the
first dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..seeding import borrowed_global_rng
from .backbones import IMAGENET_MEAN, IMAGENET_STD, Scaled

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # KAFAL's released code
NAMES = ("resnet8", "conv4")
State = dict[str, Tensor]


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the input (through a 1x1 convolution where the shape changes), ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Classifier(nn.Module):
    """`trunk` makes features of scaled pixels, `head` class scores of features.

    The interface of a detector where the loop needs it: `embed`, `exchanged`, `frozen`.
    """

    frozen = False

    def __init__(self, trunk: nn.Sequential, features: int, classes: int, scaled: Scaled):
        super().__init__()
        self.scaled, self.trunk, self.head = scaled, trunk, nn.Linear(features, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels uint8 (B, 3, H, W) -> class scores (B, C), softmax not yet taken."""
        return self.scores(self.scaled(pixels))

    def scores(self, x: Tensor) -> Tensor:
        """As `forward`, of pixels that are scaled already (mixed images, stacked clients)."""
        return self.head(self.trunk(x.contiguous(memory_format=torch.channels_last)))

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels uint8 (B, 3, H, W) -> (B, D): what the last layer reads."""
        return self.trunk(self.scaled(pixels).contiguous(memory_format=torch.channels_last))

    def exchanged(self) -> list[str]:
        """Names of the state that clients and server exchange: all of it."""
        return list(self.state_dict())


def build(name: str, classes: int, image_size: tuple[int, int], rng: torch.Generator) -> Classifier:
    """A classifier with weights drawn from `rng`. image_size: (height, width) in pixels.

    resnet8: KAFAL's, 77,946 parameters with ten classes: post-activation blocks, no BatchNorm after the first
    convolution, one before pooling, none on the shortcuts. conv4: LoGo's, four times convolution, BatchNorm, ReLU and
    halving; sides of 16 pixels or more.
    """
    if classes < 2:
        raise ValueError(f"a classifier needs 2 classes or more, got {classes}")
    with borrowed_global_rng(rng):
        if name == "resnet8":
            trunk = nn.Sequential(
                nn.Conv2d(3, 16, 3, 1, 1, bias=False),
                Block(16, 16, 1),
                Block(16, 32, 2),
                Block(32, 64, 2),
                nn.BatchNorm2d(64),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            return Classifier(trunk, 64, classes, Scaled(CIFAR_MEAN, CIFAR_STD))
        if name == "conv4":
            if min(image_size) < 16:
                raise ValueError(f"classifier 'conv4' halves the image four times: sides >= 16, got {image_size}")
            layers: list[nn.Module] = []
            for inputs in (3, 64, 64, 64):
                layers += [nn.Conv2d(inputs, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
            features = 64 * (image_size[0] // 16) * (image_size[1] // 16)
            trunk = nn.Sequential(*layers, nn.Flatten())
            return Classifier(trunk, features, classes, Scaled(IMAGENET_MEAN, IMAGENET_STD))
    raise ValueError(f"classifier must be one of {NAMES}, got {name!r}")


# --- M clients as one model -------------------------------------------------------------------------------------------


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
    if count < 1:
        raise ValueError(f"at least one client is needed, got {count}")
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
        elif isinstance(child, nn.GroupNorm):
            wide = nn.GroupNorm(count * child.num_groups, count * child.num_channels, child.eps)
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
