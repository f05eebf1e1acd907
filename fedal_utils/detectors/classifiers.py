"""Image classifiers: ResNet-8 (KAFAL), a CNN of four convolutions (LoGo), two on frozen features."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import IMAGENET_MEAN, IMAGENET_STD, Scaled
from .base import Model

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # KAFAL's released code
CLASSIFIERS = ("resnet8", "conv4", "mlp")
FEATURES = 1280  # of an `Embedder`
LEAST = -50.0  # natural logarithm of a probability: nothing counts as less likely, an unseen class as just that
FOLDS = 5


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


class LinearClassifier(Model):
    """Logistic regression on features (N, D); classes without a labelled image are as unlikely as can be.

    weight (C, D), bias (C,), seen (C,) 1 for classes that it was trained on; float64. Before training D is 0.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        for name, shape in {"weight": (classes, 0), "bias": (classes,), "seen": (classes,)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """Takes weights of any number of columns."""
        for name, value in state.items():
            setattr(self, name, value.double().clone())

    def activations(self, features: Tensor) -> Tensor:
        """(N, C) class scores as they are; 0 before training."""
        if not self.weight.shape[1]:
            return features.new_zeros(len(features), self.classes)
        return features.double() @ self.weight.T + self.bias

    def forward(self, features: Tensor | tuple[Tensor]) -> Tensor:
        """(N, C) log-probabilities, `LEAST` at least."""
        activations, unseen = self.activations(self.embed(features)), self.seen == 0
        if bool(unseen.all()):
            return activations
        return activations.masked_fill(unseen, -torch.inf).log_softmax(1).clamp(min=LEAST)

    def embed(self, features: Tensor | tuple[Tensor]) -> Tensor:
        """(N, D) the features themselves."""
        return features[0] if isinstance(features, tuple) else features

    def fit(self, features: Tensor, classes: Tensor, regularisation: float = 0.1) -> float:
        """Train on features (L, D) of classes (L,) 0..C-1, from scratch: scikit-learn's, L2-penalised; mean log loss.

        regularisation: its `C`, the inverse of the penalty. One class alone is predicted for everything.
        """
        from sklearn.linear_model import LogisticRegression

        found = torch.unique(classes)
        self.weight = torch.zeros(self.classes, features.shape[1], dtype=torch.float64)
        self.bias, self.seen = torch.zeros_like(self.bias), torch.zeros_like(self.seen)
        if len(found) > 1:
            model = LogisticRegression(C=regularisation, max_iter=500).fit(features.double().numpy(), classes.numpy())
            rows = found[-len(model.coef_) :]  # of two classes one row: the second's
            self.weight[rows], self.bias[rows] = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        self.seen[found] = 1
        return float(nn.functional.nll_loss(self(features), classes))


def out_of_fold(
    features: Tensor, classes: Tensor, count: int, rng: np.random.Generator, regularisation: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Activations and log-probabilities (L, C = count) of labelled images by classifiers not trained on them.

    rng: of the `FOLDS` parts left out in turn. regularisation: as in `fit`.
    """
    activations, logs = torch.zeros(2, len(classes), count, dtype=torch.float64)
    order, model = rng.permutation(len(classes)), LinearClassifier(count)
    for part in np.array_split(order, min(FOLDS, len(order))):
        rest = np.setdiff1d(order, part) if len(order) > 1 else order
        model.fit(features[rest], classes[rest], regularisation)
        activations[part], logs[part] = model.activations(features[part]), model(features[part])
    return activations, logs
