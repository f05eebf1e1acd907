"""Classifiers: parameters as published, and M of them stacked are M of them apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedal_utils import seeding
from fedal_utils.config import Config
from fedal_utils.detectors import CLASSIFIERS, build, join, split, stacked
from fedal_utils.detectors.classifiers import Block
from fedal_utils.detectors.stacked import GroupedBatchNorm

SIZE = (16, 16)


def built(name="resnet8", classes=10, size=SIZE, seed=0):
    return build(Config.of(classifier=name, image_size=size), classes, seeding.torch_rng_for(seed, "weights"))


def pixels(count, seed=0, size=SIZE):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=seeding.torch_rng_for(seed, "pixels"))


def side_by_side(x):
    """(M, B, 3, H, W) -> (B, M * 3, H, W)."""
    return x.transpose(0, 1).flatten(1, 2)


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


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("training", [True, False])
def test_stacked_clients_do_not_meet(name, training):
    models = [built(name, classes=4, seed=m).train(training) for m in range(3)]
    wide = stacked(models[0], 3).train(training)
    missing = wide.load_state_dict(join([m.state_dict() for m in models]), strict=False).missing_keys
    assert all(key.endswith("num_batches_tracked") for key in missing)
    x = torch.stack([models[0].scaled(pixels(5, seed=m)) for m in range(3)])
    got = wide.scores(side_by_side(x)).unflatten(1, (3, 4))
    for m, model in enumerate(models):
        torch.testing.assert_close(got[:, m], model.scores(x[m]), rtol=1e-4, atol=1e-5)
    for m, state in enumerate(split(wide.state_dict(), 3)):  # running statistics too
        for key, value in state.items():
            torch.testing.assert_close(value, models[m].state_dict()[key], rtol=1e-4, atol=1e-5)


def test_padding_moves_neither_statistics_nor_gradients():
    torch.manual_seed(0)
    plain = [nn.BatchNorm2d(4), nn.BatchNorm2d(4)]
    wide = GroupedBatchNorm(8)
    x = torch.randn(6, 8, 3, 3, requires_grad=True)
    y = [x[:6, :4].detach().clone().requires_grad_(), x[:2, 4:].detach().clone().requires_grad_()]
    wide.valid = torch.tensor([[True, True]] * 2 + [[True, False]] * 4)
    out = wide(x)
    apart = [norm(part) for norm, part in zip(plain, y, strict=True)]
    torch.testing.assert_close(out[:, :4], apart[0])
    torch.testing.assert_close(out[:2, 4:], apart[1])
    weight = torch.randn_like(out)
    (out[:, :4] * weight[:, :4]).sum().add((out[:2, 4:] * weight[:2, 4:]).sum()).backward()
    (apart[0] * weight[:, :4]).sum().add((apart[1] * weight[:2, 4:]).sum()).backward()
    torch.testing.assert_close(x.grad[:, :4], y[0].grad)
    torch.testing.assert_close(x.grad[:2, 4:], y[1].grad)
    assert not x.grad[2:, 4:].any()
    torch.testing.assert_close(wide.running_mean, torch.cat([n.running_mean for n in plain]))
    torch.testing.assert_close(wide.running_var, torch.cat([n.running_var for n in plain]))


def test_a_layer_that_cannot_be_stacked_is_refused():
    model = built()
    model.trunk[4] = nn.LayerNorm(8)
    with pytest.raises(ValueError, match="LayerNorm"):
        stacked(model, 2)


def test_join_and_split_are_inverse_and_share_no_memory():
    states = [{k: v for k, v in built(seed=m).state_dict().items() if v.dim()} for m in range(2)]
    parts = split(join(states), 2)
    for part, state in zip(parts, states, strict=True):
        assert part.keys() == state.keys()
        assert all(torch.equal(part[k], state[k]) for k in state)
    parts[0]["head.bias"].zero_()
    assert torch.equal(parts[1]["head.bias"], states[1]["head.bias"]) and states[0]["head.bias"].any()
