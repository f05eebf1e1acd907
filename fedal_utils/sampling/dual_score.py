"""The dual score: a VAE's reconstruction error says what is new, a detection loss what is useful (SSD + VAE, 2023).

The project's page gives the form, alpha * L_reconstruction + beta * L_detection; its figure puts the detector on the
VAE's *reconstruction*. Its released code has no loop, so L_detection where nobody has labelled anything is ours:

    d0  MultiBox loss against the hidden labels: an upper bound for diagnosis (`diagnostic`), never a method
    d1  reconstruction consistency: of the detector on the reconstruction g(x), against its confident detections on x
    d2  self-training: of the detector on x, against its own confident detections
    d3  entropy of the most uncertain detection
    d4  a learned loss: a small head that predicts the detector's loss (Yoo and Kweon 2019, 1905.03677)

"vae" queries by reconstruction error alone, "d1" by the detection loss alone, "vae_d1" by both.
"""

import numpy as np

from .observation import Observation
from .registry import strategy
from .scores import Scores, entropy, reduce

TERMS = {  # detection term -> the observation that it is
    "d0": "hidden_label_losses",
    "d1": "consistency_losses",
    "d2": "pseudo_label_losses",
    "d3": "detections",
    "d4": "predicted_losses",
}


def standardise(scores: Scores) -> np.ndarray:
    """(N,) float64: (value - mean) / standard deviation over the scored images; 0 for the others, or without spread.

    *Ours*: the page adds the raw terms, orders of magnitude apart. ValueError: a value is not finite.
    """
    out, values = np.zeros(len(scores)), np.asarray(scores.values, dtype=np.float64)[scores.scored]
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(scores.scored)[~np.isfinite(values)][0])
        raise ValueError(f"non-finite term at position {place}: a broken model must not select images")
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
    nothing = Scores.all(np.zeros(seen.count))
    one = Scores.all(seen.reconstruction_errors) if new else nothing
    other = detection_term(seen, term) if term else nothing
    return mix(one, other, seen.config.vae.vae_weight if new and term else float(new))


def _register(name: str, new: bool, term: str) -> None:
    reads = {"reconstruction_errors"} if new or term == "d1" else set()  # d1 looks at reconstructions
    source = f"SSD + VAE (2023): form from its page and figure; {term or 'the reconstruction error alone'}"
    needs = reads | ({TERMS[term]} if term else set())
    strategy(name, needs, "boxes", source=source)(lambda seen: score(seen, new, term))


_register("vae", True, "")
for _term in TERMS:
    _register(_term, False, _term)
    _register(f"vae_{_term}", True, _term)
