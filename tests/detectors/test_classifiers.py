"""Classifiers: parameters and features as published."""

import pytest
from detector_cases import pixels
from torch import nn

from fedal_utils import seeding
from fedal_utils.config import Config
from fedal_utils.detectors import build
from fedal_utils.detectors.classifiers import Block


def built(name="resnet8", size=(16, 16)):
    return build(Config.of(classifier=name, image_size=size), 10, seeding.torch_rng_for(0, "weights"))


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
    assert model.embed(pixels(2, *size)).shape == (2, features) and model(pixels(2, *size)).shape == (2, 10)
    assert [m.out_channels for m in model.trunk if isinstance(m, nn.Conv2d)] == [64] * 4
