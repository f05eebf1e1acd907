"""A linear classifier of frozen features: multinomial logistic regression, trained from scratch in a moment."""

import numpy as np
import torch
from torch import Tensor, nn

from .base import Model

LEAST = -50.0  # natural logarithm of a probability: nothing counts as less likely, an unseen class as just that
FOLDS = 5


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
