"""Image classifiers: ResNet-8 (KAFAL), a CNN of four convolutions (LoGo), and a small one on frozen features."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import IMAGENET_MEAN, IMAGENET_STD, Scaled
from .base import Model

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # KAFAL's released code
CLASSIFIERS = ("resnet8", "conv4", "mlp")
FEATURES = 1280  # of an `Embedder`


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


class Classifier(Model):
    """`trunk` makes features of scaled pixels, `head` class scores of features."""

    def __init__(self, trunk: nn.Sequential, features: int, classes: int, scaled: Scaled):
        super().__init__()
        self.scaled, self.trunk, self.head = scaled, trunk, nn.Linear(features, classes)
        self.classes = classes

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels uint8 (B, 3, H, W), or cached features -> class scores (B, C), softmax not yet taken."""
        return self.scores(self.scaled(pixels))

    def scores(self, x: Tensor) -> Tensor:
        """As `forward`, of pixels that are scaled already."""
        return self.head(self.trunk(x.contiguous(memory_format=torch.channels_last)))

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, D): what the last layer reads."""
        return self.trunk(self.scaled(pixels).contiguous(memory_format=torch.channels_last))


def resnet8(classes: int) -> Classifier:
    """KAFAL's ResNet-8: no BatchNorm after the first convolution, one before pooling, none on the shortcuts."""
    blocks = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    trunk = nn.Sequential(*blocks, nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(trunk, 64, classes, Scaled(CIFAR_MEAN, CIFAR_STD))


def conv4(classes: int, image_size: tuple[int, int]) -> Classifier:
    """LoGo's CNN: four times convolution, BatchNorm, ReLU and halving; image_size (height, width), 16 px or more."""
    layers: list[nn.Module] = []
    for inputs in (3, 64, 64, 64):
        layers += [nn.Conv2d(inputs, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    features = 64 * (image_size[0] // 16) * (image_size[1] // 16)
    trunk = nn.Sequential(*layers, nn.Flatten())
    return Classifier(trunk, features, classes, Scaled(IMAGENET_MEAN, IMAGENET_STD))


class FirstMap(nn.Module):
    """A batch of cached features ((B, D),) as (B, D, 1, 1)."""

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return maps[0][:, :, None, None]


def mlp(classes: int, width: int = 128) -> Classifier:
    """One hidden layer on frozen features, which stand in the place of pixels, also where images are mixed."""
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, width), nn.ReLU()), width, classes, FirstMap())
