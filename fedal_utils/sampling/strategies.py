"""The classic strategies, registered by name; each published one has a file of its own beside this one."""

from collections.abc import Mapping

import numpy as np

from . import diversity, scores
from .observation import Observation
from .registry import find, strategy
from .scores import Scores
from .select import Selection, portions, top_k

SETTLES, MONARCH, VAN_BOMMEL = "Settles (2012), ch. 2", "Monarch (2021), ch. 3-5", "van Bommel (2021), released code"


@strategy("random", selects=True, source="the baseline that every strategy must beat")
def _random(seen: Observation, k: int, rng: np.random.Generator) -> Selection:
    drawn = Scores.all(rng.random(seen.count))
    return Selection(top_k(drawn, k, rng, seen.config.query.no_detection_rule), drawn)


def _reduced(value, how: str):
    return lambda seen: scores.reduce(value(seen.detections), seen.detections.valid, how)


def _unsure(how: str):
    return lambda seen: scores.uncertainty(seen.class_scores, how)


for _how in ("sum", "avg", "max"):
    strategy(_how, ("detections",), "boxes", source=VAN_BOMMEL)(_reduced(scores.least_confidence, _how))
    for _name, _value in (("entropy", scores.entropy), ("margin", scores.margin), ("ratio", scores.ratio)):
        strategy(f"{_name}_{_how}", ("detections",), "boxes", source=SETTLES)(_reduced(_value, _how))
for _name in scores.UNCERTAINTIES:
    strategy(_name, ("class_scores",), "images", source=SETTLES)(_unsure(_name))


@strategy("count", ("detections",), "boxes", source="a cheap baseline: crowded images first")
def _count(seen: Observation) -> Scores:
    return Scores.all(seen.detections.valid.sum(1))  # zero is a count, so every image is scored


@strategy("qbc", ("committee_class_scores",), "images", source="McCallum and Nigam (1998)")
def _committee(seen: Observation) -> Scores:
    members = seen.committee_class_scores
    return Scores.none(seen.count) if members is None else scores.query_by_committee(members)


_EMBEDDED = ("embeddings", "labelled_embeddings")
strategy("coreset", _EMBEDDED, selects=True, source="Sener and Savarese (2018), 1708.00489")(
    lambda seen, k, rng: diversity.k_center(seen.embeddings, seen.labelled_embeddings, k, rng)
)
strategy("badge", ("class_scores", "embeddings"), "images", selects=True, source="Ash et al. (2020), 1906.03671")(
    lambda seen, k, rng: diversity.badge(seen.class_scores, seen.embeddings, k, rng)
)
strategy("cluster", ("embeddings",), selects=True, source=MONARCH)(
    lambda seen, k, rng: diversity.cluster(seen.embeddings, k, rng)
)
strategy("representative", _EMBEDDED, source=MONARCH)(
    lambda seen: diversity.representative(seen.embeddings, seen.labelled_embeddings)
)
strategy("embedding_outlier", _EMBEDDED, source=MONARCH)(
    lambda seen: diversity.embedding_outlier(seen.embeddings, seen.labelled_embeddings)
)
strategy("model_outlier", ("detections", "held_out_detections"), "boxes", source=f"{MONARCH}, carried to boxes: ours")(
    lambda seen: diversity.box_outlier(seen.detections, seen.held_out_detections)
)
# Class by class among held-out images of that class. Among all of them, as in active-vision, a certain image is low in
# every class but one, so the lowest mean rank would be the most certain image's.
strategy("model_outlier", ("activations", "held_out_activations", "held_out_classes"), "images", source=MONARCH)(
    lambda seen: diversity.model_outlier(seen.activations, seen.held_out_activations, seen.held_out_classes)
)


def mixture(shares: Mapping[str, float], kind: str):
    """A selection by several strategies: each selects its `portions`, in order, among what those before left."""

    def select(seen: Observation, k: int, rng: np.random.Generator) -> np.ndarray:
        left, selected = np.arange(seen.count), [np.zeros(0, dtype=np.int64)]
        for name, count in portions(shares, k).items():
            if count:
                some = seen.take(left)
                if some.config.query.no_detection_rule == "never":  # each part selects its share
                    some.config = some.config.replace(no_detection_rule="last")
                selected.append(left[find(name, kind).select(some, count, rng).positions])
                left = np.setdiff1d(left, selected[-1])
        return np.concatenate(selected)

    return select


# active-vision's mixtures (of boxes, uncertainties are averaged over an image's boxes), and the book's advice.
for _name, _kind, _shares in (
    ("mix", "boxes", {"avg": 0.4, "ratio_avg": 0.2, "entropy_avg": 0.2, "model_outlier": 0.1, "random": 0.1}),
    ("mix", "images", {"confidence": 0.4, "ratio": 0.2, "entropy": 0.2, "model_outlier": 0.1, "random": 0.1}),
    ("mix_diverse", "images", {"margin": 0.5, "cluster": 0.3, "model_outlier": 0.2}),
):
    _needs = frozenset().union(*(find(part, _kind).needs for part in _shares))
    strategy(_name, _needs, _kind, selects=True, source="active-vision's quickstart")(mixture(_shares, _kind))
