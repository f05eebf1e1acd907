"""Classifiers: parameters and features as published."""

import pytest
import torch
from torch import nn

from fedal_utils import seeding
from fedal_utils.config import Config
from fedal_utils.detectors import build
from fedal_utils.detectors.classifiers import Block

SIZE = (16, 16)


def built(name="resnet8", classes=10, size=SIZE, seed=0):
    return build(Config.of(classifier=name, image_size=size), classes, seeding.torch_rng_for(seed, "weights"))


def pixels(count, seed=0, size=SIZE):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=seeding.torch_rng_for(seed, "pixels"))


def test_resnet8_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in built(size=(32, 32)).parameters()) == 77_946
    model = built()
    assert isinstance(model.trunk[0], nn.Conv2d) and isinstance(model.trunk[1], Block)  # no norm after it
    assert isinstance(model.trunk[4], nn.BatchNorm2d)  # one before pooling
    shortcuts = [block.shortcut for block in model.trunk if isinstance(block, Block)]
    assert [type(s) for s in shortcuts] == [nn.Identity, nn.Conv2d, nn.Conv2d] and shortcuts[1].bias is None


@pytest.mark.parametrize(("size", "features"), [((32, 32), 256), ((28, 28), 64), ((16, 16), 64)])
def test_conv4_has_the_published_features(size, features):
    model = built("conv4", size=size)
    assert model.embed(pixels(2, size=size)).shape == (2, features)
    assert model(pixels(2, size=size)).shape == (2, 10)
    assert [m.out_channels for m in model.trunk if isinstance(m, nn.Conv2d)] == [64] * 4
