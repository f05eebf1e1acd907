"""Autoencoders: the divergence by sampling, the published shape by hand, what a forward pass gives."""

import math

import pytest
import torch
from detector_cases import pixels
from torch import nn

from fedal_utils.config import Config
from fedal_utils.detectors import build_vae, losses_of
from fedal_utils.seeding import torch_rng_for

SIZE = (16, 16)


def built(size=SIZE, latent=4, seed=0, **options):
    return build_vae(Config.of(vae_size=size, latent=latent, **options), torch_rng_for(seed, "weights"))


def penalty(mean, log_std, released=False):
    x = torch.zeros(len(mean), 3, 2, 2)
    return losses_of(built(as_released=released), x, x, mean, log_std)["kl"]


def test_the_divergence_is_that_of_torch():
    mean, log_std = torch.randn(2, 4, 3, generator=torch_rng_for(0, "gaussians"), dtype=torch.float64) / 2
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(0.0, 1.0))
    torch.testing.assert_close(penalty(mean, log_std), want.sum(1))


def test_the_divergence_is_smallest_at_one_and_the_published_penalty_at_one_over_root_two():
    def at(released, mean, s):
        mean = torch.tensor([[mean] * 5], dtype=torch.float64, requires_grad=True)
        log_std = torch.tensor([[math.log(s)] * 5], dtype=torch.float64, requires_grad=True)
        value = penalty(mean, log_std, released)
        value.sum().backward()
        return value.item(), mean.grad[0, 0].item(), log_std.grad[0, 0].item()

    root = 1 / math.sqrt(2)
    assert at(False, 0.0, 1.0) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert at(True, 0.0, root) == pytest.approx((5 * math.log(2) / 2, 0.0, 0.0), abs=1e-12)
    assert at(False, 0.7, 1.3)[1:] == pytest.approx((0.7, 1.3**2 - 1))
    assert at(True, 0.7, 1.3)[1:] == pytest.approx((1.4, 2 * 1.3**2 - 1))  # twice, as nothing is halved


def sides(layers, x):
    """Height after each convolution."""
    found = []
    for layer in layers:
        x = layer(x)
        assert x.dim() < 4 or x.shape[-1] == x.shape[-2]
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            found.append(x.shape[-1])
    return found, x


def test_the_published_autoencoder_has_the_published_shape():
    with torch.device("meta"):
        model = built((300, 300), 1_024, vae_architecture="published")
        x = torch.empty(2, 3, 300, 300)
        found, features = sides(model.encoder, x)
        assert found == [148, 72, 34, 15] and features.shape == (2, 16_384)
        found, image = sides(model.decoder, torch.empty(2, 1_024))
        assert found == [35, 73, 149, 300] and image.shape == x.shape
        assert [tuple(t.shape) for t in model(x)] == [(2, 3, 300, 300), (2, 1_024), (2, 1_024)]
    assert [m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)] == [0.2] * 10
    assert isinstance(model.decoder[4], nn.Unflatten) and model.decoder[4].unflattened_size == (64, 16, 16)
    norms = [m.num_features for part in (model.encoder, model.decoder) for m in part if isinstance(m, nn.BatchNorm2d)]
    assert norms == [16, 32, 32, 16, 8]


def test_pixels_are_scaled_and_resized_without_aliasing():
    model = built()
    images = pixels(3, *SIZE)
    assert torch.equal(model.prepare(images), images.float() / 255)
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., 1::4] = stripes[..., 2::4] = 255  # two of four columns: what lies half way between is all bright
    small = model.prepare(stripes)
    assert small.shape == (1, 3, *SIZE) and ((small > 0.4) & (small < 0.6)).all()
    flat = model.prepare(torch.full((2, 3, 10, 37), 51.0))
    torch.testing.assert_close(flat, torch.full((2, 3, *SIZE), 0.2))
    assert torch.equal(model.prepare(stripes.double()), small)


def test_latents_are_the_mean_or_drawn_around_it():
    model = built()
    model.decoder = nn.Identity()
    x = model.prepare(pixels(5, *SIZE))
    z, mean, log_std = model(x)
    assert torch.equal(z, mean)
    noise = torch.randn(5, 4, generator=torch_rng_for(3, "noise"))
    drawn_z, again, spread = model(x, torch_rng_for(3, "noise"))
    torch.testing.assert_close(drawn_z, mean + log_std.exp() * noise)
    assert torch.equal(again, mean) and torch.equal(spread, log_std)


def test_reconstruction_by_hand():
    model = built()
    nn.init.zeros_(model.decoder[-2].weight)
    nn.init.zeros_(model.decoder[-2].bias)  # sigmoid(0): grey everywhere
    x = torch.full((4, 3, *SIZE), 0.5)
    x[0], x[1] = 0.0, 1.0
    x[2, 1, 3, 4], x[2, 2, 7, 7] = 1.0, 0.3
    got = losses_of(model, x, *model(x))
    torch.testing.assert_close(got["reconstruction"], torch.tensor([192.0, 192.0, 0.25 + 0.04, 0.0]))  # 768 / 4
    _, mean, log_std = model(x)
    torch.testing.assert_close(got["kl"], penalty(mean, log_std))
    model.as_released = True
    torch.testing.assert_close(losses_of(model, x, *model(x))["kl"], penalty(mean, log_std, True))
