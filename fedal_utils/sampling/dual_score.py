"""The dual score: a VAE's reconstruction error says what is new, a detection loss what is useful (SSD + VAE, 2023).

The project's page gives the form, alpha * L_reconstruction + beta * L_detection, ranked from the top; its figure puts
the detector on the VAE's *reconstruction*. Its released code has the two networks and no loop: no ranking, no alpha,
and a detection loss only against ground truth. So each part says how it is known: *page*, *figure*, *released code* or
*ours*. What L_detection is where nobody has labelled anything:

    d0  MultiBox loss against the hidden labels: an upper bound for diagnosis (`Config.diagnostic`), never a method
    d1  reconstruction consistency: of the detector on the reconstruction g(x), against its confident detections on x
    d2  self-training: of the detector on x, against its own confident detections
    d3  entropy of the most uncertain detection
    d4  a learned loss: a small head that predicts the detector's loss (Yoo and Kweon 2019, 1905.03677)

"vae" asks by novelty alone (alpha, beta) = (1, 0), "d1" by usefulness alone (0, 1), "vae_d1" by both. A term that an
image does not have (d1, d2: nothing is detected with confidence; d3: nothing is detected) counts as the average of the
others, so that the other term decides; the page is silent on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import seeding, training
from ..config import Config
from ..data.boxes import Detections
from ..data.readers import Images, Labels
from ..detectors import vae
from ..detectors.base import SSD, Detector, clone
from ..detectors.vae import VAE
from ..training import CachedImages
from . import strategies as sampling
from .strategies import Choice, Scores, Sight

# What each detection term reads beside the detections: of the `Sight`, it is `usefulness`; here, how that is made.
STANDARDS = ("z", "rank")
TERMS = {"d0": "hidden", "d1": "consistency", "d2": "self_training", "d3": "doubt", "d4": "learned"}
NEEDS = {
    "vae_architecture": ("novelty",),
    **{term: (how,) for term, how in TERMS.items()},
    **{f"vae_{term}": ("novelty", how) for term, how in TERMS.items()},
}
STRATEGIES = tuple(NEEDS)
DIAGNOSTIC = ("d0", "vae_d0")


# ------------------------------------------------------------------------------------------------------------ the score


def standardise(scores: Scores, how: str = "z") -> np.ndarray:
    """(N,) float64 with mean 0 over the scored images; 0 for the others.

    'z': (value - mean) / standard deviation. 'rank': place among the others from -1/2 (smallest) to 1/2, equal values
    sharing the mean of their places. Without spread (one image, or all alike up to rounding) everything is 0: a term
    that says the same of all images says nothing. *Ours*: the page adds the raw terms, orders of magnitude apart.
    """
    if how not in STANDARDS:
        raise ValueError(f"terms are standardised by one of {STANDARDS}, got {how!r}")
    out, values = np.zeros(len(scores)), np.asarray(scores.values, dtype=np.float64)[scores.scored]
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(scores.scored)[~np.isfinite(values)][0])
        raise ValueError(f"non-finite term at position {place}: a broken model must not choose labels")
    if len(values) < 2 or values.std() <= 1e-12 * np.abs(values).max():
        return out
    if how == "z":
        out[scores.scored] = (values - values.mean()) / values.std()
    else:
        places = pd.Series(values).rank(method="average").to_numpy() - 1
        out[scores.scored] = places / (len(values) - 1) - 0.5
    return out


def mix(novelty: Scores, usefulness: Scores, part: float, how: str = "z") -> Scores:
    """alpha * novelty + beta * usefulness of the standardised terms, alpha = part in [0, 1] and beta = 1 - alpha."""
    if not 0 <= part <= 1:
        raise ValueError(f"the part of the VAE must be in [0, 1], got {part}")
    if len(novelty) != len(usefulness):
        raise ValueError(f"both terms must be of the same images, got {len(novelty)} and {len(usefulness)}")
    values = part * standardise(novelty, how) + (1 - part) * standardise(usefulness, how)
    return Scores(values, novelty.scored | usefulness.scored)


def texture(images: Images, size: tuple[int, int], batch: int = 64) -> Tensor:
    """(N, 2) of each image at the VAE's size, grey in [0, 1]: mean absolute step between neighbours, and contrast.

    Contrast is the standard deviation. Plain reconstruction error is known to follow both.
    """
    rows = []
    for start in range(0, len(images), batch):
        pixels = images.batch(range(start, min(start + batch, len(images)))).float()
        grey = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False).mean(1) / 255
        steps = (grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))) / 2
        rows.append(torch.stack([steps, grey.flatten(1).std(1, correction=0)], dim=1))
    return torch.cat(rows) if rows else torch.zeros(0, 2)


def beyond_texture(novelty: Tensor, looks: Tensor) -> Tensor:
    """(N,) what is left of the reconstruction error once texture and contrast (N, 2) have been accounted for.

    Residuals of least squares over the images at hand, in the error's own units. *Ours*.
    """
    if len(novelty) != len(looks):
        raise ValueError(f"texture of {len(novelty)} images is needed, got {len(looks)}")
    y = novelty.double().numpy()
    X = np.column_stack([np.ones(len(y)), looks.double().numpy()])
    rest = y - X @ np.linalg.lstsq(X, y, rcond=None)[0] if len(y) else y
    rounding = len(y) > 0 and np.abs(rest).max() <= 1e-9 * np.abs(y).max()  # all explained: nothing is left to rank by
    return torch.from_numpy(np.zeros_like(y) if rounding else rest)


# -------------------------------------------------------------------------------------- detection losses without labels


@dataclass(frozen=True)
class Reconstructed:
    """Images as a VAE gives them back, in pixels 0..255 of their own size: what a detector needs of a set of images.

    noise: what a VAE as released draws its latents with.
    """

    images: Images
    vae: VAE
    noise: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, chunks: Sequence, device: str | torch.device = "cpu") -> Iterator[Tensor]:
        """Float pixels (B, 3, H, W) of each chunk of row numbers in turn."""
        for pixels in self.images.batches(chunks, device):
            yield self.vae.to(device).reconstruct(pixels, self.noise if self.vae.as_released else None)


@torch.inference_mode()
def as_reconstructed(coder: VAE, images: Images, device: str | torch.device = "cpu", batch: int = 64) -> Images:
    """These images as the VAE gives them back, to be looked at: 8-bit pixels of their own size."""
    chunks = [range(start, min(start + batch, len(images))) for start in range(0, len(images), batch)]
    parts = [x.round().to("cpu", torch.uint8) for x in Reconstructed(images, coder).batches(chunks, device)]
    return Images(images.ids, torch.cat(parts), images.sizes)


def as_labels(found: Detections, above: float) -> Labels:
    """Detections with a score of `above` and more in the place of ground truth; the rest is background. (N, T)."""
    sure = found.valid & (found.scores >= above)
    classes = torch.where(sure, found.labels, 0)
    never = torch.zeros_like(sure)
    return Labels(found.boxes * sure[..., None], classes, never, never.clone())


def multibox(
    model: Detector,
    images: Images | CachedImages | Reconstructed,
    labels: Labels,
    device: str | torch.device = "cpu",
    summed: bool = False,
) -> Scores:
    """MultiBox loss of each image against these labels; an image without a label has none.

    Divided by the image's own matched anchors (summed: not, as in the released code): a sum favours crowded images, a
    mean easy ones.
    """
    _is_ssd(model)
    if len(images) != len(labels.classes):
        raise ValueError(f"labels of {len(images)} images are needed, got {len(labels.classes)}")
    if len(images) == 0:
        return Scores(np.zeros(0), np.zeros(0, dtype=bool))
    batch = 8 if isinstance(images, Reconstructed) and torch.device(device).type == "cpu" else 32  # fits its caches
    parts = training.image_losses(model, images, labels, batch, device, summed)
    known = ((labels.classes > 0) & ~labels.ignore).any(1).cpu().numpy()
    return Scores(sum(parts.values()).double().numpy(), known)


def _is_ssd(model: Detector) -> None:
    if not isinstance(model, SSD):
        raise ValueError(
            f"the dual score needs the detector 'ssd', whose loss is per image; got {type(model).__name__}"
        )


def usefulness(
    how: str,
    config: Config,
    model: Detector,
    images: Images | CachedImages,
    photos: Images,
    found: Detections | None,
    coder: VAE | None,
    hidden: Labels | None,
    device: str | torch.device,
    noise: torch.Generator | None = None,
) -> Scores:
    """A detection term (a value of `TERMS`) of each image. found: detections from `config.score_above` on."""
    _is_ssd(model)
    if how == "hidden":
        return multibox(model, images, hidden, device)
    if how == "learned":
        values = training.learned_losses(model, images, device=device).double().numpy()
        return Scores(values, np.ones(len(values), dtype=bool))
    if how == "doubt":
        return sampling.reduce(sampling.entropy(found), found.valid, "max")
    guess = as_labels(found, config.query.pseudo_above)
    shown = Reconstructed(photos, coder, noise) if how == "consistency" else images
    return multibox(model, shown, guess, device, summed=config.as_released)


# -------------------------------------------------------------------------------------------------------------- the VAE


def new_vae(config: Config, rng: torch.Generator) -> VAE:
    """The config's VAE with weights drawn from `rng`."""
    return vae.build(
        config.vae.vae_architecture,
        config.vae.vae_size,
        config.vae.latent,
        rng,
        config.vae.kl_weight,
        config.as_released,
    )


def train_vae(
    config: Config,
    coder: VAE,
    images: Images,
    rows: np.ndarray,
    rng: torch.Generator,
    model: Detector | None = None,
    labelled: np.ndarray | None = None,
    labels: Labels | None = None,
    device: str | torch.device = "cpu",
    who: str = "vae",
) -> VAE:
    """Train a VAE in place on these rows of `images` for `config.vae_iterations` steps, and return it.

    With `config.task_aware` > 0 the detector's loss on the reconstructions of labelled images, against the `labels`
    (L) of the rows `labelled` (L), is part of the VAE's (*figure*); the detector itself does not learn. as_released:
    the detector is shown the image and not its reconstruction, so that this term's gradient is zero.
    """
    task = None
    if config.vae.task_weight > 0:
        if model is None or labelled is None or labels is None:
            raise ValueError("task_aware > 0 needs the detector and the labels of the labelled images")
        task = task_term(config, model, images, labelled, labels, device)
    for _ in training.fit_vae(coder, images, rows, config.vae, rng, device, who, task):
        pass
    return coder


def task_term(
    config: Config, model: Detector, images: Images, labelled: np.ndarray, labels: Labels, device: str | torch.device
):
    """A function (pixels of reconstructions (B, 3, H, W), their rows (B,)) -> `task_aware` x the mean detection loss.

    Rows that nobody has labelled count nothing.
    """
    _is_ssd(model)
    judge = clone(model).to(device).eval().requires_grad_(False)
    place = {int(row): position for position, row in enumerate(labelled)}

    def term(pixels: Tensor, rows: np.ndarray) -> Tensor:
        known = [(b, place[int(row)]) for b, row in enumerate(rows) if int(row) in place]
        known = known[: config.vae.task_images or len(known)]  # a batch is in drawn order: the first ones are any
        if not known:
            return pixels.sum() * 0
        batch, at = (list(side) for side in zip(*known, strict=True))
        target = labels.take(at).to(device)
        shown = images.batch([int(rows[b]) for b in batch], device) if config.as_released else pixels[batch]
        parts = judge.image_losses(shown, target.boxes, target.classes, target.ignore, summed=config.as_released)
        return config.vae.task_weight * sum(parts.values()).mean()

    return term


# --------------------------------------------------------------------------------------------------- choosing by name


def needs(strategy: str) -> frozenset[str]:
    """What a strategy reads: 'novelty' of the `Sight`, and how its `usefulness` is made (a value of `TERMS`)."""
    if strategy not in NEEDS:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    return frozenset(NEEDS[strategy])


def score(strategy: str, sight: Sight, part: float = 0.5, how: str = "z") -> Scores:
    """The dual score, standardised over the images of this sight; "vae" and "d1" are it at alpha = 1 and 0.

    part: alpha. A sight that has `texture` has its reconstruction error corrected for it (`beyond_texture`).
    """
    needed = needs(strategy)
    nothing = Scores(np.zeros(sight.images), np.ones(sight.images, dtype=bool))
    new = useful = nothing
    if "novelty" in needed:
        error = sampling.required(sight, strategy, "novelty")
        if sight.texture is not None:
            error = beyond_texture(error, sampling.required(sight, strategy, "texture"))
        new = Scores(error.double().numpy(), nothing.scored)
    if needed - {"novelty"}:
        useful = sampling.required(sight, strategy, "usefulness")
    part = {1: float("novelty" in needed)}.get(len(needed), part)
    return mix(new, useful, part, how)


def choose(
    strategy: str,
    sight: Sight,
    k: int,
    rng: np.random.Generator,
    empty: str = "last",
    part: float = 0.5,
    how: str = "z",
    shortlist: float = 0.0,
) -> Choice:
    """The k images with the largest dual score; ties break by `rng`.

    shortlist > 1: of the shortlist x k best, the k that cover the others best in the VAE's latent space (k-center,
    labelled images being centres already), so that near-duplicates are not all asked (*ours*).
    """
    scores = score(strategy, sight, part, how)
    if shortlist <= 1 or k == 0:
        return Choice(sampling.top_k(scores, k, rng, empty), scores)
    best = sampling.top_k(scores, max(k, min(sight.images, math.ceil(round(shortlist * k, 9)))), rng, empty)
    latent, known = (sampling.required(sight, strategy, "latent"), sight.known_latent)
    picked, _ = sampling.k_center(latent[best], known, k, rng)
    return Choice(best[picked], scores)


# ----------------------------------------------------------------------------------------------------- what is compared

PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)


def sweep(config: Config, term: str = "d1", parts: Sequence[float] = PARTS) -> dict[float, tuple[Config, str]]:
    """alpha -> the experiment and the method that asks with it; the ends are the single terms."""
    ends = {1.0: "vae", 0.0: term}
    return {
        part: (config, ends[part]) if part in ends else (config.replace(vae_weight=part), f"vae_{term}")
        for part in parts
    }


def vae_arms(config: Config) -> dict[str, Config]:
    """The same experiment with other answers to what the page leaves open about the VAE; the first is ours."""
    return {
        "labelled images, refitted": config,
        "all images": config.replace(vae_images="all"),
        "fine-tuned": config.replace(vae_refit=False),
        "corrected for texture": config.replace(texture_correction=True),
        "diverse": config.replace(shortlist=3.0),
        "ranks": config.replace(standardise_by="rank"),
        "task-aware": config.replace(task_weight=10.0, task_images=2),
    }


def subsets(ids: Sequence[str], seed: int = 137, first: int = 1000, more: int = 4000) -> dict[str, list[str]]:
    """The released code's fixed subsets of its training ids, in their file order (section 4.1).

    'J1': `first` ids drawn with Python's `random.sample` from `seed`, sorted as the file has them; 'J2': all others;
    'J3': J1 and the first `more` of J2, chosen by no score; 'remaining': the others of J2. That the draw is `sample` is
    *reconstructed*; sizes, seed and order are *released code*.
    """
    ids = list(ids)
    if first > len(ids):
        raise ValueError(f"a subset of {first} ids needs as many, got {len(ids)}")
    chosen = set(seeding.python_sample(seed, len(ids), first))
    initial = [name for row, name in enumerate(ids) if row in chosen]
    rest = [name for row, name in enumerate(ids) if row not in chosen]
    return {"J1": initial, "J2": rest, "J3": initial + rest[:more], "remaining": rest[more:]}
