"""The dual score: a VAE's reconstruction error says what is new, a detection loss what is useful (SSD + VAE, 2023).

The project's page gives the form, alpha * L_reconstruction + beta * L_detection, ranked from the top; its figure puts
the detector on the VAE's *reconstruction*. Its released code has the two networks and no loop: no ranking, no alpha,
and a detection loss only against ground truth. So each part says how it is known: *page*, *figure*, *released code* or
*ours*. What L_detection is where nobody has labelled anything:

    d0  MultiBox loss against the hidden labels: an upper bound for diagnosis (`diagnostic`), never a method
    d1  reconstruction consistency: of the detector on the reconstruction g(x), against its confident detections on x
    d2  self-training: of the detector on x, against its own confident detections
    d3  entropy of the most uncertain detection
    d4  a learned loss: a small head that predicts the detector's loss (Yoo and Kweon 2019, 1905.03677)

"vae" queries by reconstruction error alone (alpha, beta) = (1, 0), "d1" by the detection loss alone (0, 1), "vae_d1" by
both. A term that an image does not have (d1, d2: nothing is detected with confidence; d3: nothing is detected) counts
as the average of the others, so that the other term decides; the page is silent on it.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from .diversity import k_center
from .observation import Observation
from .registry import strategy
from .scores import Scores, entropy, reduce
from .select import Selection, top_k

STANDARDS = ("z", "rank")


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
        raise ValueError(f"non-finite term at position {place}: a broken model must not select images")
    if len(values) < 2 or values.std() <= 1e-12 * np.abs(values).max():
        return out
    if how == "z":
        out[scores.scored] = (values - values.mean()) / values.std()
    else:
        places = pd.Series(values).rank(method="average").to_numpy() - 1
        out[scores.scored] = places / (len(values) - 1) - 0.5
    return out


def mix(new: Scores, useful: Scores, weight: float, how: str = "z") -> Scores:
    """alpha * new + beta * useful of the standardised terms, alpha = weight in [0, 1] and beta = 1 - alpha."""
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of the VAE must be in [0, 1], got {weight}")
    values = weight * standardise(new, how) + (1 - weight) * standardise(useful, how)
    return Scores(values, new.scored | useful.scored)


TERMS = {  # detection term -> the observation that it is
    "d0": "hidden_label_losses",
    "d1": "consistency_losses",
    "d2": "pseudo_label_losses",
    "d3": "detections",
    "d4": "predicted_losses",
}
SOURCE = "SSD + VAE (2023): form from its page and figure"


def detection_term(seen: Observation, term: str) -> Scores:
    """(N,) a detection term by its name in `TERMS`."""
    if term == "d3":
        return reduce(entropy(seen.detections), seen.detections.valid, "max")
    values = getattr(seen, TERMS[term])
    return values if isinstance(values, Scores) else Scores.all(values)


def score(seen: Observation, new: bool, term: str) -> Scores:
    """The dual score, standardised over these images; with one term alone, alpha = 1 or 0.

    new: with the VAE's reconstruction error. term: a name in `TERMS`, '' = none.
    """
    nothing = Scores.all(np.zeros(seen.count))
    one = Scores.all(seen.reconstruction_errors) if new else nothing
    other = detection_term(seen, term) if term else nothing
    weight = seen.config.vae.vae_weight if new and term else float(new)
    return mix(one, other, weight, seen.config.vae.standardise_by)


def select(seen: Observation, k: int, rng: np.random.Generator, new: bool, term: str) -> Selection:
    """The k images with the largest dual score; ties break by `rng`.

    With `shortlist` > 1: of the shortlist x k best, the k that cover the others best in the VAE's latent space
    (k-center, labelled images being centres already), so that near-duplicates are not all selected (*ours*).
    """
    scores, rule, shortlist = score(seen, new, term), seen.config.query.no_detection_rule, seen.config.vae.shortlist
    if shortlist <= 1 or k == 0:
        return Selection(top_k(scores, k, rng, rule), scores)
    best = top_k(scores, max(k, min(seen.count, math.ceil(round(shortlist * k, 9)))), rng, rule)
    positions, _ = k_center(seen.latents[best], seen.labelled_latents, k, rng)
    return Selection(best[positions], scores)


def _register(name: str, new: bool, term: str) -> None:
    needs = {*(("reconstruction_errors",) if new else ()), *((TERMS[term],) if term else ())}
    needs |= {"reconstruction_errors"} if term == "d1" else set()  # it looks at reconstructions
    source = f"{SOURCE}; {term or 'the reconstruction error alone'}"
    strategy(name, needs, "boxes", selects=True, source=source)(lambda seen, k, rng: select(seen, k, rng, new, term))


_register("vae", True, "")
for _term in TERMS:
    _register(_term, False, _term)
    _register(f"vae_{_term}", True, _term)
