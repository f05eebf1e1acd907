"""Clients of a classifier with little to learn from: what the tests of all ways to train them share."""

import numpy as np
import torch

from fedal_utils import seeding
from fedal_utils.config import Config, TrainingConfig
from fedal_utils.data import Images
from fedal_utils.detectors import build
from fedal_utils.training import ClassifierTask

SIZE, CLASSES = (16, 16), 4
CONFIG = TrainingConfig.of(batch=6, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, clip=0.0, crop=1)
MIXING = CONFIG.replace(balanced_softmax=True, distillation_weight=1.0)
TOLERANCE = dict(rtol=2e-3, atol=2e-5)  # after a dozen steps; one step agrees to 1e-6


def small_images(count=120):
    pixels = torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8, generator=seeding.torch_rng_for(0, "pixels"))
    return Images(tuple(map(str, range(count))), pixels, torch.full((count, 2), 16), None)


def model(name="resnet8", seed=0):
    return build(Config.of(classifier=name, image_size=SIZE), CLASSES, seeding.torch_rng_for(seed, "weights"))


def task(client, start, labelled, unlabelled, classes=(0, 1, 2), **options):
    target = torch.tensor([classes[i % len(classes)] for i in range(labelled)], dtype=torch.int64)
    rng, counts = seeding.torch_rng_for(3, client), torch.bincount(target, minlength=CLASSES)
    rows, rest = np.arange(start, start + labelled), np.arange(start + labelled, start + labelled + unlabelled)
    return ClassifierTask(rng, client, rows=rows, classes=target, counts=counts, unlabelled=rest, **options)


def unequal(state=False, **options):
    """Different sizes, class priors, absent classes; one image alone, one class alone, an empty unlabelled pool."""
    sizes = ("a", 0, 14, 9, (0, 1, 2)), ("b", 30, 1, 8, (3,)), ("c", 50, 5, 0, (1, 2))
    sizes += ("d", 70, 7, 20, (2,)), ("e", 100, 6, 2, (0, 3))
    return [task(*size, optimizer_state={} if state else None, **options) for size in sizes]


def states(start, count):
    return [{k: v for k, v in start.state_dict().items() if v.dim()}] * count


def assert_same(got, wanted, **tolerance):
    for one, other in zip(got, wanted, strict=True):
        assert one.steps == other.steps and one.parts.keys() >= {"supervised"}
        assert abs(one.loss - other.loss) <= 1e-3 * abs(other.loss) + 1e-12
        for key, value in other.state.items():
            torch.testing.assert_close(one.state[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
