"""Training an autoencoder against the loop written out; what its losses say of images, and of broken ones."""

import copy
import math

import numpy as np
import pytest
import torch
from miniatures import Picture
from miniatures import pixels as drawn
from torch import nn

from fedal_utils.config import Config
from fedal_utils.data import Images
from fedal_utils.detectors import build_vae, losses_of
from fedal_utils.seeding import torch_rng_for
from fedal_utils.training import TrainingDiverged, draw_batches, fit_vae, reconstruction_errors

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
    return Images(tuple(f"p{i}" for i in range(count)), pixels, torch.tensor([size] * count))


def built(size=SIZE, latent=4, seed=0, **options):
    return build_vae(Config.of(vae_size=size, latent=latent, **options), torch_rng_for(seed, "weights"))


def run(model, images, iterations, rows=None, seed=0, batch=16, lr=1e-3, **options):
    config = Config.of(vae_iterations=iterations, vae_batch=batch, vae_lr=lr).vae
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    return list(fit_vae(model, images, rows, config, torch_rng_for(seed, "fit"), **options))


def by_hand(model, images, rows, reset, released, clip=5.0, iterations=6, batch=5):
    """Training written out; returns the loss of each step."""
    rng, rows = torch_rng_for(0, "fit"), np.asarray(rows)
    noise = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    totals = []
    for _, _, index in draw_batches(len(rows), batch, None, iterations, rng):
        x = images.pixels[rows[index.numpy()]].float() / 255
        y, mean, log_std = model(x, noise)
        s = log_std.exp()
        penalty = s**2 + mean**2 - s.log() - 0.5 if released else (s**2 + mean**2 - 1) / 2 - s.log()
        loss = (((y - x) ** 2).sum() + model.kl_weight * penalty.sum()) / batch
        if reset:
            optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, clip / (norm.item() + 1e-6))
        optimizer.step()
        totals.append(loss.item())
    return totals


def moved(a, b, start):
    """How far apart a and b are, in units of the way they went."""
    a, b, start = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (a, b, start))
    return ((a - b).norm() / (a - start).norm()).item()


@pytest.mark.parametrize("released", [False, True])
def test_training_is_the_loop_written_out_and_as_released_never_resets_the_gradient(released):
    images, rows = pictures(9), [7, 1, 4, 0, 8]
    start = built(kl_weight=3.0, as_released=released)
    model, right = copy.deepcopy(start), copy.deepcopy(start)
    found = run(model, images, 6, rows, batch=5)
    as_it_is = {"reset": not released, "released": released}
    assert [row["loss"] for row in found] == pytest.approx(by_hand(right, images, rows, **as_it_is), rel=1e-4)
    assert moved(model, right, start) < 1e-3
    for change in ({"reset": released}, {"released": not released}):
        wrong = copy.deepcopy(start)
        by_hand(wrong, images, rows, **(as_it_is | change))
        assert moved(model, wrong, start) > 0.02, change


def test_a_row_a_pass_with_the_mean_of_each_part():
    found = run(built(kl_weight=2.0), pictures(6, (40, 24)), 20, [5, 2, 0], batch=3)
    assert list(found[0]) == ["epoch", "steps", "loss", "reconstruction", "kl"]
    assert [(row["epoch"], row["steps"]) for row in found] == [(i, i + 1) for i in range(20)]
    for row in found:
        assert row["loss"] == pytest.approx(row["reconstruction"] + 2 * row["kl"], rel=1e-5)


def test_errors_of_all_images_in_order():
    model, images = built(), pictures(7, (32, 24))
    got, x = reconstruction_errors(model, images), model.prepare(images.pixels)
    with torch.no_grad():
        torch.testing.assert_close(got, losses_of(model, x, *model(x))["reconstruction"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reconstruction_errors(model, images.take([6, 0])), got[[6, 0]], rtol=1e-5, atol=1e-6)
    assert reconstruction_errors(model, images.take([])).shape == (0,)


def test_what_is_broken_names_its_image_and_client():
    images, model = pictures(6), built()
    with torch.no_grad():
        model.mean.bias[0] = math.nan
    with pytest.raises(ValueError, match="image 'p0': a broken VAE"):
        reconstruction_errors(model, images)
    with pytest.raises(TrainingDiverged, match=r"client town: loss is nan .*kl nan\) on images \['p[01]', 'p[01]'\]"):
        run(model, images, 2, [0, 1], batch=2, client="town")
