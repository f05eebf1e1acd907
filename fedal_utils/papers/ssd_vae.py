"""SSD with a VAE's dual score: notebook 40, on one node, from the first weights in every cycle. Its weights swept."""

from collections.abc import Sequence

from ..config import Config
from .sizes import ONE_NODE, Preset, Sizes

ONE_SSD: Sizes = {**ONE_NODE, **dict(detector="ssd", round_lr_decay=1.0, schedule="cosine", warmup=10)}
DIGITS: Sizes = {  # of an SSD with an initial model; the labelling flywheel takes them as well
    **ONE_SSD,
    **dict(digit_classes=3, scenes=(180, 60), batch=8, initial_model_images=40, initial_model_iterations=150),
    **dict(initial_labels=12, query_size=12, cycles=3, iterations=50, threads=1),
}
BCCD: Sizes = {**ONE_SSD, **dict(initial_labels=8, query_size=10, cycles=4, iterations=100, threads=1)}
PHOTOGRAPHS: Sizes = {**ONE_SSD, **dict(initial_labels=8, query_size=8, cycles=5, iterations=150)}

_VAE: Sizes = dict(image_loss_head=True, kl_weight=0.005, vae_lr=2e-3, vae_iterations=150)
_SMALL: dict[str, Sizes] = {
    "digits": {
        **DIGITS,
        **_VAE,
        **dict(scenes=(140, 50), initial_model_iterations=100, iterations=30, seeds=(0,), side_seeds=1),
        **dict(methods=("random", "entropy_max", "vae", "d1", "vae_d1")),
        **dict(vae_size=(32, 32), latent=32, vae_iterations=30),
    },
    "bccd": {**BCCD, **_VAE, **dict(vae_size=(48, 64))},
    "": {**PHOTOGRAPHS, **_VAE},
}

# SSD300 of the released code on VOC07 + VOC12 with the start and the steps of the learning-loss line of work (1,000
# images a cycle), which its fixed subsets of 1,000 and 5,000 ids fit; the VAE in its published shape. Its 120,000
# iterations of batch 32 are for the whole set: a cycle takes 40,000, as its runs on 1,000 images did.
FULL_SSD: Sizes = {
    **ONE_NODE,
    **dict(dataset="voc0712", image_size=(300, 300)),
    **dict(detector="ssd", backbone="vgg16", norm="batch", pretrained=True, frozen=False),
    **dict(iterations=40000, batch=32, optimizer="sgd", lr=1e-3, momentum=0.9, weight_decay=5e-4),
    **dict(schedule="step", step_at=(2 / 3, 5 / 6), warmup=500, clip=0.0),
    **dict(flip=0.5, colour=0.4, zoom=(0.5, 1.5), shift=0.2),
    **dict(initial_labels=1000, query_size=1000, cycles=10, score_above=0.01, threads=0, seeds=(0, 1, 2)),
}
_FULL: Sizes = {
    **FULL_SSD,
    **dict(image_loss_head=True, vae_architecture="published", vae_size=(300, 300), latent=1024, kl_weight=50.0),
    **dict(vae_iterations=30000, vae_batch=32, vae_lr=1e-4),
}
PRESETS = {"40": Preset(("random", "entropy_max", "coreset", "count", "vae", "d1", "vae_d1"), _FULL, small=_SMALL)}

PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)


def sweep(config: Config, term: str = "d1", parts: Sequence[float] = PARTS) -> dict[float, tuple[Config, str]]:
    """alpha -> the experiment and the method that queries with it; the ends are the single terms."""
    mixed = {part: (config.replace(vae_weight=part), f"vae_{term}") for part in parts}
    return mixed | {end: (config, name) for end, name in ((1.0, "vae"), (0.0, term)) if end in parts}
