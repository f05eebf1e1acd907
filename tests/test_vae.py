"""Autoencoders: the divergence by sampling, the published shape by hand, training against a loop written out."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from miniatures import Picture
from miniatures import pixels as drawn
from torch import nn

from fedal_utils import training
from fedal_utils.data import readers as data
from fedal_utils.detectors import vae
from fedal_utils.seeding import torch_rng_for
from fedal_utils.training import TrainingDiverged, fit_vae, vae_losses

SIZE = (16, 16)


def pictures(count, size=SIZE):
    """Images of one bright object each, at places and of sizes of their own, on a gradient with grain."""
    height, width = size
    found = []
    for i in range(count):
        x, y = (i * 5 % 8) / 16 * width, (i * 3 % 8) / 16 * height
        box = (x, y, x + (4 + i % 4) / 16 * width, y + (7 - i % 3) / 16 * height)
        found.append(drawn(Picture(f"p{i}", size, (("cat", box),))))
    pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()
    return data.Images(tuple(f"p{i}" for i in range(count)), pixels, torch.tensor([size] * count))


def built(size=SIZE, latent=4, seed=0, kl_weight=1.0, name="small", **options):
    return vae.build(name, size, latent, torch_rng_for(seed, "weights"), kl_weight, **options)


def run(model, images, iterations, rows=None, seed=0, **options):
    rows = np.arange(len(images)) if rows is None else rows
    return list(fit_vae(model, images, rows, torch_rng_for(seed, "fit"), iterations, **options))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------------------------- divergence


def gaussians(count=4, latent=3):
    rng = torch_rng_for(0, "gaussians")
    draw = torch.randn(2, count, latent, generator=rng, dtype=torch.float64)
    return draw[0], draw[1] / 2


def test_the_divergence_is_that_of_torch():
    mean, log_std = gaussians()
    want = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(vae.kl(mean, log_std), want.sum(1))


def test_the_divergence_is_the_mean_log_ratio_of_samples():
    mean, log_std = gaussians(2)
    count = 200_000
    noise = torch.randn(count, *mean.shape, generator=torch_rng_for(0, "noise"), dtype=torch.float64)
    z = mean + log_std.exp() * noise
    ratio = (z.square() / 2 - noise.square() / 2 - log_std).sum(2)  # log q - log p, (count, B); log sqrt(2 pi) cancels
    error = ratio.std(0) / math.sqrt(count)
    got = vae.kl(mean, log_std)
    assert (error < 0.01 * got).all()  # so four of them let no other formula pass
    assert ((ratio.mean(0) - got).abs() < 4 * error).all()
    assert ((ratio.mean(0) - vae.kl_as_released(mean, log_std)).abs() > 40 * error).all()


def test_the_divergence_is_smallest_at_one_and_the_published_penalty_at_one_over_root_two():
    def at(penalty, mean, s):
        mean = torch.tensor([[mean] * 5], dtype=torch.float64, requires_grad=True)
        log_std = torch.tensor([[math.log(s)] * 5], dtype=torch.float64, requires_grad=True)
        value = penalty(mean, log_std)
        value.sum().backward()
        return value.item(), mean.grad[0, 0].item(), log_std.grad[0, 0].item()

    root = 1 / math.sqrt(2)
    assert at(vae.kl, 0.0, 1.0) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert at(vae.kl, 0.0, root)[2] == pytest.approx(0.5 - 1)  # s^2 - 1
    assert at(vae.kl_as_released, 0.0, root) == pytest.approx((5 * math.log(2) / 2, 0.0, 0.0), abs=1e-12)
    assert at(vae.kl_as_released, 0.0, 1.0)[2] == pytest.approx(1.0)  # 2 s^2 - 1
    for penalty, best in ((vae.kl, 1.0), (vae.kl_as_released, root)):
        least = at(penalty, 0.0, best)[0]
        for mean, s in ((0.0, best * 1.1), (0.0, best / 1.1), (0.1, best), (-0.1, best)):
            assert at(penalty, mean, s)[0] > least + 0.01
    assert at(vae.kl, 0.7, 1.3)[1] == pytest.approx(0.7)
    assert at(vae.kl_as_released, 0.7, 1.3)[1] == pytest.approx(1.4)  # twice, as nothing is halved


# ------------------------------------------------------------------------------------------------------ the published


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
        model = built((300, 300), None, name="published", kl_weight=50.0)
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


def test_the_published_autoencoder_has_341_million_parameters():
    with torch.device("meta"):
        model = built((300, 300), 1_024, name="published")
    down = (3 * 8 * 25 + 8) + (8 * 16 * 25 + 16 + 32) + (16 * 32 * 25 + 32 + 64) + (32 * 64 * 25 + 64)
    largest = 15 * 15 * 64 * 16_384
    heads = 2 * (16_384 * 1_024 + 1_024)
    linear = (1_024 * 4_096 + 4_096) + (4_096 * 16_384 + 16_384)
    up = (64 * 32 * 25 + 32 + 64) + (32 * 16 * 25 + 16 + 32) + (16 * 8 * 25 + 8 + 16) + (8 * 3 * 16 + 3)
    assert largest == 235_929_600  # "236 M of them in one encoder matrix"
    assert down + largest + 16_384 + heads + linear + up == 340_961_883
    assert sum(p.numel() for p in model.parameters()) == 340_961_883


# --------------------------------------------------------------------------------------------------- the forward pass


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (64, 32)])
def test_the_small_autoencoder_mirrors_its_size(size):
    model = built(size, 5)
    image, mean, log_std = model(torch.rand(2, 3, *size))
    assert image.shape == (2, 3, *size) and mean.shape == log_std.shape == (2, 5)
    assert ((image > 0) & (image < 1)).all()
    assert built(SIZE, None).latent == 64


def test_pixels_are_scaled_and_resized_without_aliasing():
    model = built()
    images = pictures(3)
    assert torch.equal(model.prepare(images.pixels), images.pixels.float() / 255)
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
    x = model.prepare(pictures(5).pixels)
    mean, log_std = model.encode(x)
    assert torch.equal(model(x)[0], mean)
    noise = torch.randn(5, 4, generator=torch_rng_for(3, "noise"))
    drawn_z, again, spread = model(x, torch_rng_for(3, "noise"))
    torch.testing.assert_close(drawn_z, mean + log_std.exp() * noise)
    assert torch.equal(again, mean) and torch.equal(spread, log_std)


def test_a_reconstruction_has_the_size_of_its_image_and_lets_gradients_through():
    model = built()
    pixels = pictures(2, (40, 24)).pixels.float().requires_grad_()
    got = model.reconstruct(pixels)
    assert got.shape == (2, 3, 40, 24) and 0 < got.min() and got.max() < 255
    want = model.decode(model.encode(model.prepare(pixels))[0])
    torch.testing.assert_close(got.mean((2, 3)) / 255, want.mean((2, 3)), rtol=0.02, atol=0)  # resizing keeps the mean
    got.sum().backward()
    assert pixels.grad.abs().sum((1, 2, 3)).min() > 0
    assert not torch.equal(model.reconstruct(pixels, torch_rng_for(0, "noise")), got)
    flat = model.restore(torch.full((1, 3, *SIZE), 0.4), (50, 20))
    torch.testing.assert_close(flat, torch.full((1, 3, 50, 20), 102.0))


# -------------------------------------------------------------------------------------------------------------- losses


def test_reconstruction_by_hand():
    model = built()
    nn.init.zeros_(model.decoder[-2].weight)
    nn.init.zeros_(model.decoder[-2].bias)  # sigmoid(0): grey everywhere
    x = torch.full((4, 3, *SIZE), 0.5)
    x[0], x[1] = 0.0, 1.0
    x[2, 1, 3, 4], x[2, 2, 7, 7] = 1.0, 0.3
    got = vae.losses(model, x)
    torch.testing.assert_close(got["reconstruction"], torch.tensor([192.0, 192.0, 0.25 + 0.04, 0.0]))  # 768 / 4
    mean, log_std = model.encode(x)
    torch.testing.assert_close(got["kl"], vae.kl(mean, log_std))
    model.as_released = True
    torch.testing.assert_close(vae.losses(model, x)["kl"], vae.kl_as_released(mean, log_std))


def test_an_images_losses_do_not_depend_on_its_batch_mates():
    model, images = built(), pictures(5)
    run(model, images, 5)
    x = model.prepare(images.pixels)
    together = vae.losses(model.train(), x)
    for key, values in together.items():
        alone = torch.cat([vae.losses(model, x[i : i + 1])[key] for i in range(5)])
        torch.testing.assert_close(values, alone, rtol=1e-5, atol=1e-6)
        assert values.std() > 1e-3 * values.mean()  # they differ from image to image


def test_losses_of_all_images_in_order():
    model, images = built(), pictures(7, (32, 24))
    got = vae_losses(model, images, batch=3)
    x = model.prepare(images.pixels)
    with torch.no_grad():
        want = vae.losses(model, x)
        want["latent"] = model.encode(x)[0]
    assert list(got) == ["reconstruction", "kl", "latent"]
    for key, values in got.items():
        torch.testing.assert_close(values, want[key], rtol=1e-5, atol=1e-6)
    assert got["latent"].shape == (7, 4)
    moved = vae_losses(model, images.take([6, 0]))
    torch.testing.assert_close(moved["reconstruction"], got["reconstruction"][[6, 0]], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(values, got[key]) for key, values in vae_losses(model, images, 3).items())


def test_as_released_latents_are_drawn_when_scoring_too():
    model, images = built(as_released=True), pictures(4)
    with pytest.raises(ValueError, match="give a generator"):
        vae_losses(model, images)
    a, b, c = (vae_losses(model, images, generator=torch_rng_for(seed, "noise")) for seed in (0, 0, 1))
    assert torch.equal(a["reconstruction"], b["reconstruction"])
    assert (a["reconstruction"] != c["reconstruction"]).all()
    assert torch.equal(a["latent"], c["latent"]) and torch.equal(a["kl"], c["kl"])
    torch.testing.assert_close(a["kl"], vae.kl_as_released(*model.encode(model.prepare(images.pixels))).detach())
    model.as_released = False
    plain = vae_losses(model, images)["reconstruction"]
    assert torch.equal(plain, vae_losses(model, images, generator=torch_rng_for(0, "noise"))["reconstruction"])


@pytest.mark.parametrize("as_released", [False, True])
def test_no_image_has_no_loss(as_released):
    got = vae_losses(built(as_released=as_released), pictures(2).take([]), generator=torch_rng_for(0, "noise"))
    assert {key: tuple(values.shape) for key, values in got.items()} == {
        "reconstruction": (0,),
        "kl": (0,),
        "latent": (0, 4),
    }


# ------------------------------------------------------------------------------------------------------------ training


def test_the_same_seed_gives_the_same_bytes_whatever_ran_before():
    images = pictures(6)
    first = built()
    rows = run(first, images, 4, batch=4)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = built()
    assert run(again, images, 4, batch=4) == rows and same(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(built(), built(seed=1))
    other = built()
    run(other, images, 4, batch=4, seed=1)
    assert not same(first, other)


def test_training_brings_the_error_far_below_that_of_the_mean_image():
    images = pictures(8, (32, 32))
    model = built((32, 32), 16)
    x = model.prepare(images.pixels)
    guess = (x - x.mean(0)).square().sum((1, 2, 3)).mean()
    before = vae_losses(model, images)["reconstruction"].mean()
    run(model, images, 60, batch=8, lr=3e-3)
    after = vae_losses(model, images)["reconstruction"].mean()
    assert before > guess and after < 0.3 * guess, (before, after, guess)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_images_scaled_once_and_scaled_in_every_step_teach_the_same_to_the_last_bit(monkeypatch):
    images, rows, times = pictures(9, (40, 24)), np.array([7, 1, 4, 0, 8]), []
    plain = vae.VAE.prepare

    def prepare(self, pixels):
        times.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(vae.VAE, "prepare", prepare)
    once, each = built(), built()
    first = run(once, images, 7, rows, batch=2)
    assert times == [5]
    monkeypatch.setattr(training, "SCALED_BYTES", 0)
    assert run(each, images, 7, rows, batch=2) == first
    assert times == [5] + [2] * 7
    assert same(once, each) and not same(once, built())


def by_hand(model, images, rows, clip, reset, released, iterations=6, batch=5):
    """Training written out; returns the loss of each step."""
    rng = torch_rng_for(0, "fit")
    noise = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    totals = []
    for _, _, index in training.draw_batches(len(rows), batch, None, iterations, rng):
        x = images.pixels[rows[index.numpy()]].float() / 255
        y, mean, log_std = model(x, noise)
        s = log_std.exp()
        penalty = s**2 + mean**2 - s.log() - 0.5 if released else (s**2 + mean**2 - 1) / 2 - s.log()
        loss = (((y - x) ** 2).sum() + model.kl_weight * penalty.sum()) / batch
        if reset:
            optimiser.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, clip / (norm.item() + 1e-6))
        optimiser.step()
        totals.append(loss.item())
    return totals


def moved(a, b, start):
    """How far apart a and b are, in units of the way they went."""
    a, b, start = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (a, b, start))
    return ((a - b).norm() / (a - start).norm()).item()


@pytest.mark.parametrize("released", [False, True])
def test_training_is_the_loop_written_out_and_as_released_never_resets_the_gradient(released):
    images, rows = pictures(9), np.array([7, 1, 4, 0, 8])
    start = built(kl_weight=3.0, as_released=released)
    model, right = copy.deepcopy(start), copy.deepcopy(start)
    found = run(model, images, 6, rows, batch=5, clip=30.0)  # half the gradient, so that it shows
    as_it_is = {"clip": 30.0, "reset": not released, "released": released}
    assert [row["loss"] for row in found] == pytest.approx(by_hand(right, images, rows, **as_it_is), rel=1e-4)
    assert moved(model, right, start) < 1e-3
    for change in ({"reset": released}, {"released": not released}, {"clip": math.inf}):
        wrong = copy.deepcopy(start)
        by_hand(wrong, images, rows, **(as_it_is | change))
        assert moved(model, wrong, start) > 0.05, change
    free, endless = copy.deepcopy(start), copy.deepcopy(start)
    run(free, images, 6, rows, batch=5, clip=0.0)
    by_hand(endless, images, rows, **(as_it_is | {"clip": math.inf}))
    assert moved(free, endless, start) < 1e-3


def test_a_row_a_pass_with_the_mean_of_each_part():
    model, images = built(kl_weight=2.0), pictures(6)
    found = run(model, images, 7, batch=4, task=lambda pixels, rows: pixels.mean((1, 2, 3)))
    assert [(row["epoch"], row["steps"]) for row in found] == [(0, 2), (1, 3), (2, 5), (3, 6), (4, 7)]
    assert [list(row) for row in found] == [["epoch", "steps", "loss", "reconstruction", "kl", "task"]] * 5
    for row in found:
        assert row["loss"] == pytest.approx(row["reconstruction"] + 2 * row["kl"] + row["task"], rel=1e-5)
    assert list(run(built(), images, 1)[0]) == ["epoch", "steps", "loss", "reconstruction", "kl"]


@pytest.mark.parametrize("one_number", [False, True])
def test_a_tasks_gradient_reaches_the_autoencoder(one_number):
    images, seen = pictures(6, (40, 24)), []

    def dark(pixels, rows):
        seen.append((tuple(pixels.shape), sorted(rows.tolist())))
        each = 20 * pixels.mean((1, 2, 3))
        return each.mean() if one_number else each

    plain, darkened = built(), built()
    run(plain, images, 20, np.array([5, 2, 0]), batch=3)
    found = run(darkened, images, 20, np.array([5, 2, 0]), batch=3, task=dark)
    assert seen == [((3, 3, 40, 24), [0, 2, 5])] * 20
    assert found[-1]["task"] < 0.8 * found[0]["task"]
    levels = [m.reconstruct(images.pixels).mean().item() for m in (darkened, plain)]
    assert levels[0] < 0.8 * levels[1]


# ------------------------------------------------------------------------------------------------------------ refusals


class Blinded(nn.Module):
    """An encoder that breaks on images which are white all over."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x) / (1 - x.amin((1, 2, 3)))[:, None]


def test_a_broken_reconstruction_names_its_image():
    images, model = pictures(6), built()
    images.pixels[4] = 255
    model.encoder = Blinded(model.encoder)
    with pytest.raises(ValueError, match=r"image 'p4': reconstruction nan.*must not choose labels"):
        vae_losses(model, images, batch=3)
    assert torch.isfinite(vae_losses(model, images.take([0, 1, 2, 3, 5]))["reconstruction"]).all()
    with pytest.raises(TrainingDiverged, match=r"client town: loss is nan .*reconstruction nan.* on images \['p4'\]"):
        run(model, images, 3, batch=6, who="town")


def test_a_broken_task_or_weight_stops_the_training():
    images = pictures(3)
    with pytest.raises(TrainingDiverged, match=r"client vae: loss is inf .*task inf\) on images \['p[01]', 'p[01]'\]"):
        run(built(), images, 2, [0, 1], batch=2, task=lambda pixels, rows: pixels.sum() * math.inf)
    with pytest.raises(TrainingDiverged, match=r"client vae: (loss|weight '\S+') is n"):
        run(built(), images, 1, task=lambda pixels, rows: (pixels * 0).sum().sqrt())  # a slope of 0 / 0


def test_what_cannot_be_built_is_said():
    with pytest.raises(ValueError, match=r"one of \('small', 'published'\), got 'large'"):
        built(name="large")
    with pytest.raises(ValueError, match=r"\(300, 300\) and nothing else, got size \(300, 299\)"):
        built((300, 299), name="published")
    for size in ((20, 16), (16, 20), (8, 16), (16, 264)):
        with pytest.raises(ValueError, match=rf"multiples of 8 in \(16, 256\), got size \({size[0]}, {size[1]}\)"):
            built(size)
    for latent in (0, 1.5):
        with pytest.raises(ValueError, match=f"latent must be an integer >= 1, got {latent}"):
            built(latent=latent)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"kl_weight must be finite and >= 0, got {weight}"):
            built(kl_weight=weight)
    assert built(kl_weight=0).kl_weight == 0.0


def test_wrong_shapes_are_said():
    model, x = built(), torch.zeros(2, 3, *SIZE)
    for pixels in (x[:, :2], x[0], x.long()):
        with pytest.raises(ValueError, match=r"pixels must be uint8 or float \(B, 3, H, W\)"):
            model.prepare(pixels)
    for images in (x[..., :8], x[0]):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, 16, 16\)"):
            model.encode(images)
    for z in (torch.zeros(2, 3), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"latents must be \(B, 4\)"):
            model.decode(z)
    for penalty in (vae.kl, vae.kl_as_released):
        for shapes in (((2, 3), (2, 4)), ((3,), (3,))):
            with pytest.raises(ValueError, match=r"both be \(B, D\)"):
                penalty(*map(torch.zeros, shapes))
    with pytest.raises(ValueError, match="has that shape"):
        vae.losses_of(model, x, x[:1], torch.zeros(2, 4), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": []}, "client vae has no image"),
        ({"rows": [0, 3]}, "row 3 does not exist"),
        ({"iterations": 0}, "iterations and batch must be >= 1, got 0 and 16"),
        ({"batch": 0}, "iterations and batch must be >= 1, got 2 and 0"),
        ({"lr": 0.0}, "lr > 0"),
        ({"lr": math.nan}, "lr > 0"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"clip": -1.0}, "clip >= 0"),
        ({"task": lambda pixels, rows: pixels}, r"one number or \(16,\)"),
    ],
)
def test_what_cannot_be_trained_is_said(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(built(), pictures(3), **({"iterations": 2} | wrong))


def test_cached_features_and_empty_batches_are_refused():
    images = pictures(2)
    cached = training.CachedImages(images.ids, (torch.zeros(2, 4, 2, 2),), None, images.sizes, SIZE)
    with pytest.raises(ValueError, match="needs pixels, got a backbone's cached features"):
        run(built(), cached, 1)
    with pytest.raises(ValueError, match="needs pixels, got a backbone's cached features"):
        vae_losses(built(), cached)
    with pytest.raises(ValueError, match="batch must be >= 1, got 0"):
        vae_losses(built(), images, batch=0)
