"""Variational autoencoders whose reconstruction error says how novel an image is (AL-VAE, papers/vae-ssd.md).

Images x are (B, 3, h, w) in [0, 1] at the autoencoder's own size, pixels (B, 3, H, W) in 0..255 at any, latents (B, D).
"""

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from ..config import VAEConfig
from .backbones import norm_layer


class VAE(nn.Module):
    """`encoder` makes features of images, two heads a Gaussian over latents of them, `decoder` images of latents.

    'small': three stride-2 stages with GroupNorm and their mirror. 'published': AL-VAE's final one, 300 x 300.
    as_released: train and score as the published code does (see `training.fit_vae` and `losses_of`).
    """

    def __init__(self, config: VAEConfig, as_released: bool = False):
        super().__init__()
        self.size, self.latent, self.kl_weight = config.vae_size, config.latent, config.kl_weight
        self.as_released = as_released
        make = _small if config.vae_architecture == "small" else _published
        self.encoder, features, self.decoder = make(config.vae_size, config.latent)
        self.mean, self.log_std = nn.Linear(features, config.latent), nn.Linear(features, config.latent)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pixels 0..255 (B, 3, H, W), uint8 or float -> x."""
        return resize(pixels.to(self.mean.weight.dtype) / 255, self.size)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x -> its reconstruction, mean and log s (B, D); latents are drawn from `generator`, or their mean."""
        features = self.encoder(x)
        z = mean = self.mean(features)
        log_std = self.log_std(features)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
            z = mean + log_std.exp() * noise.to(mean)
        return self.decoder(z), mean, log_std

    def reconstruct(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels 0..255 (B, 3, H, W) -> what is left of them, float 0..255 at the same size; gradients flow."""
        return resize(self(self.prepare(pixels), generator)[0], pixels.shape[-2:]) * 255


def losses_of(vae: VAE, x: Tensor, reconstruction: Tensor, mean: Tensor, log_std: Tensor) -> dict[str, Tensor]:
    """Of each image: "reconstruction" (B,), its sum of squared errors, and "kl" (B,), unweighted.

    "kl" is the divergence in nats of N(mean, s^2) from N(0, 1), 1312.6114, app. B; with `vae.as_released` the published
    code's s^2 + mean^2 - log s - 1/2, which is none. reconstruction, mean, log_std: what `vae` made of x.
    """
    if vae.as_released:
        kl = mean.square() + torch.exp(2 * log_std) - log_std - 0.5
    else:
        kl = (mean.square() + torch.expm1(2 * log_std)) / 2 - log_std
    return {"reconstruction": (reconstruction - x).square().flatten(1).sum(1), "kl": kl.sum(1)}


def _small(size: tuple[int, int], latent: int) -> tuple[nn.Sequential, int, nn.Sequential]:
    """Encoder, its number of features, decoder: 32, 64 and 96 channels at a half, a quarter and an eighth."""
    height, width = size[0] // 8, size[1] // 8
    features = 96 * height * width
    down = [nn.Conv2d(3, 32, 4, 2, 1), nn.SiLU(inplace=True)]
    for inputs, outputs in ((32, 64), (64, 96)):
        down += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), norm_layer("group", outputs), nn.SiLU(inplace=True)]
    up = [nn.Linear(latent, features), nn.SiLU(inplace=True), nn.Unflatten(1, (96, height, width))]
    up += [nn.ConvTranspose2d(96, 64, 3, 2, 1, 1, bias=False), norm_layer("group", 64), nn.SiLU(inplace=True)]
    up += [nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), nn.SiLU(inplace=True)]
    up += [nn.ConvTranspose2d(32, 3, 3, 2, 1, 1), nn.Sigmoid()]
    return nn.Sequential(*down, nn.Flatten()), features, nn.Sequential(*up)


def _published(size: tuple[int, int], latent: int) -> tuple[nn.Sequential, int, nn.Sequential]:
    """Encoder, its number of features, decoder of AL-VAE's main branch (papers/vae-ssd.md, sec. 4.3)."""
    down: list[nn.Module] = []
    for inputs, outputs, normed in ((3, 8, False), (8, 16, True), (16, 32, True), (32, 64, False)):
        norm = [nn.BatchNorm2d(outputs)] if normed else []
        down += [nn.Conv2d(inputs, outputs, 5, 2), *norm, nn.LeakyReLU(0.2)]  # sides 300 -> 148, 72, 34, 15
    down += [nn.Flatten(), nn.Linear(14_400, 16_384), nn.LeakyReLU(0.2)]
    up = [nn.Linear(latent, 4_096), nn.LeakyReLU(0.2), nn.Linear(4_096, 16_384), nn.LeakyReLU(0.2)]
    up += [nn.Unflatten(1, (64, 16, 16))]
    for inputs, outputs in ((64, 32), (32, 16), (16, 8)):
        up += [nn.ConvTranspose2d(inputs, outputs, 5, 2), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]  # 35, 73, 149
    up += [nn.ConvTranspose2d(8, 3, 4, 2), nn.Sigmoid()]  # 300
    return nn.Sequential(*down), 16_384, nn.Sequential(*up)
