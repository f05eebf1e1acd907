"""The dual score: a VAE's reconstruction error says what is new, a detection loss what is useful (SSD + VAE, 2023).

The project's page gives the form, alpha * L_reconstruction + beta * L_detection; its figure puts the detector on the
VAE's *reconstruction*. Its released code has no loop, so L_detection without labels is ours; "vae" is alpha = 1:

    d0  MultiBox loss against the hidden labels: an upper bound for diagnosis (`diagnostic`), never a method
    d1  reconstruction consistency: of the detector on the reconstruction g(x), against its confident detections on x
    d2  self-training: of the detector on x, against its own confident detections
    d3  entropy of the most uncertain detection
    d4  a learned loss: a small head that predicts the detector's loss (Yoo and Kweon 2019, 1905.03677)
"""

from functools import partial

import numpy as np

from .observation import Observation
from .scores import Scores, entropy, reduce
from .strategies import strategy

_LOSSES = ("hidden_label_losses", "consistency_losses", "pseudo_label_losses", "detections", "predicted_losses")
TERMS = dict(zip(("d0", "d1", "d2", "d3", "d4"), _LOSSES, strict=True))  # detection term -> what it observes


def standardise(scores: Scores) -> np.ndarray:
    """(N,) float64: (value - mean) / standard deviation over the scored images; 0 for the others, or without spread.

    *Ours*: the page adds the raw terms, orders of magnitude apart. ValueError: a value is not finite.
    """
    out, values = np.zeros(len(scores)), np.where(scores.scored, scores.values, 0.0)
    if not np.isfinite(values).all():
        raise ValueError(f"non-finite term at position {np.flatnonzero(~np.isfinite(values))[0]}")
    values = values[scores.scored]
    if len(values) > 1 and values.std() > 1e-12 * np.abs(values).max():
        out[scores.scored] = (values - values.mean()) / values.std()
    return out


def mix(new: Scores, useful: Scores, weight: float) -> Scores:
    """alpha * new + beta * useful of the standardised terms, alpha = weight in [0, 1] and beta = 1 - alpha."""
    return Scores(weight * standardise(new) + (1 - weight) * standardise(useful), new.scored | useful.scored)


def detection_term(seen: Observation, term: str) -> Scores:
    """(N,) a detection term by its name in `TERMS`."""
    if term == "d3":
        return reduce(entropy(seen.detections), seen.detections.valid, "max")
    values = getattr(seen, TERMS[term])
    return values if isinstance(values, Scores) else Scores.all(values)


def score(seen: Observation, new: bool, term: str) -> Scores:
    """The dual score; new: with the VAE's reconstruction error; term: a name in `TERMS`, '' = none."""
    one = Scores.all(seen.reconstruction_errors if new else np.zeros(seen.count))
    other = detection_term(seen, term) if term else Scores.none(seen.count)
    return mix(one, other, seen.config.vae.vae_weight if new and term else float(new))


for _new, _term in ((True, ""), *((new, term) for term in TERMS for new in (False, True))):
    _needs = {TERMS[_term]} if _term else set()
    _needs |= {"reconstruction_errors"} if _new or _term == "d1" else set()  # d1 looks at reconstructions
    _name = "_".join(filter(None, ("vae" if _new else "", _term)))
    _source = f"SSD + VAE (2023): form from its page and figure; {_term or 'the reconstruction error alone'}"
    strategy(_name, _needs, "boxes", source=_source)(partial(score, new=_new, term=_term))
