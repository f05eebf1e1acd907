"""KAFAL: notebook 30. Its training taken apart.

Eight of ten clients, of equal size, take part in a round, in the last one too (`as_released`: all in the last).
"""

from ..config import Config
from .sizes import Preset, Sizes

_ALL: Sizes = {
    **dict(classifier="resnet8", pretrained=False, frozen=False, seconds_per_box=0.0),
    **dict(partition="dirichlet-equal", dirichlet_alpha=0.1, client_fraction=0.8),
    **dict(initial_model_images=0, initial_model_iterations=0, reset_each_cycle=True, optimizer_state="client"),
    **dict(optimizer="sgd", momentum=0.9, weight_decay=5e-4, schedule="step", round_lr_decay=1.0, clip=0.0, ema=0.0),
    **dict(balanced_softmax=True, distillation_weight=1.0, colour=0.0, zoom=(1.0, 1.0), shift=0.0),
}
_SMALL: dict[str, Sizes] = {
    "digit-images": {
        **_ALL,
        **dict(image_size=(16, 16), clients=5, dirichlet_alpha=0.3),
        **dict(methods=("random", "entropy", "badge", "logo", "ksas"), seeds=(0,), limit=(900, 300)),
        **dict(initial_fraction=0.04, query_fraction=0.04, cycles=3, rounds=3, iterations=8, local_only_epochs=10),
        **dict(batch=16, lr=0.05, step_at=(0.6,), flip=0.0, crop=1, side_seeds=1, threads=1),
    },
    # One hidden layer on frozen ImageNet features of two fifths of CIFAR-10, the paper's clients and range of labels:
    # 128 steps a client and cycle, where the paper takes about 6,400 of a ResNet-8.
    "": {
        **_ALL,
        **dict(classifier="mlp", image_size=(32, 32), feature_side=96, limit=(20000, 5000), clients=10),
        **dict(initial_fraction=0.1, query_fraction=0.05, cycles=6, rounds=8, iterations=16),
        **dict(batch=32, lr=0.05, step_at=(0.6,), flip=0.0, crop=0, threads=1, seeds=(0, 1, 2, 3, 4)),
    },
}

# The released code's protocol. Its one fall of the learning rate comes at the 260th of a client's 2,000 local epochs.
_FULL: Sizes = {
    **_ALL,
    **dict(dataset="cifar10", image_size=(32, 32), clients=10),
    **dict(initial_fraction=0.1, query_fraction=0.05, cycles=6, rounds=50, iterations=0, epochs=40),
    **dict(batch=128, lr=0.1, step_at=(0.13,), flip=0.5, crop=4, threads=0, seeds=(0, 1, 2, 3, 4)),
}
_METHODS = ("random", "entropy", "margin", "confidence", "coreset", "badge", "qbc", "logo", "jeffreys", "ksas")
PRESETS = {"30": Preset(_METHODS, _FULL, small=_SMALL, data={"smoke": "digit-images", "quick": "cifar10"})}


def training_arms(config: Config) -> dict[str, Config]:
    """The same experiment with KAFAL's training taken apart: plain FedAvg, with the balanced softmax, and the whole."""
    balanced = config.replace(balanced_softmax=True, distillation_weight=0.0)
    plain, whole = balanced.replace(balanced_softmax=False), balanced.replace(distillation_weight=1.0)
    return {"cross-entropy": plain, "balanced softmax": balanced, "KCFU": whole}
