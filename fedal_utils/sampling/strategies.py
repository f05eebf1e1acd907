"""The one registry of query strategies, and the classic ones. To add one, write one function:

    @sampling.strategy("my_margin", needs=("detections",))
    def my_margin(seen):  # seen: sampling.Observation of N unlabelled images, labels are not reachable from it
        return 1 - seen.detections.scores.amax(1)  # (N,) bigger = query first

With `selects=True` it takes (seen, k, rng) and returns positions or a `Selection`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from torch import Tensor

from ..config import Config
from . import diversity, scores
from .observation import Observation, Part, PoolObservation
from .scores import Scores, Selection, portions, top_k

KINDS = ("boxes", "images")  # for detectors | for classifiers of whole images
OBSERVATIONS = {n for n, made in vars(PoolObservation).items() if isinstance(made, cached_property) and n != "images"}

_OF_LINEAR = {"activations", "held_out_activations", "held_out_classes"}
_OF_CLASSIFIERS = _OF_LINEAR | {n for n in OBSERVATIONS if n.endswith("class_scores")} | {"local_only_embeddings"}
_OF_SSD = {n for n in OBSERVATIONS if n.endswith("_losses")} | {"reconstruction_errors"}
_OF_DETECTORS = _OF_SSD | {n for n in OBSERVATIONS if n.endswith("detections")} | {"views"}
_KNOWN: dict[tuple[str, str], "Strategy"] = {}  # (kind, name) -> strategy


@dataclass(frozen=True)
class Strategy:
    """A way to select what is labelled next."""

    name: str
    function: Callable
    needs: frozenset[str] = frozenset()  # names of observations that it reads, see `PoolObservation`
    selects: bool = False  # the function returns a selection, else scores
    model: str = "global"  # which is asked: this one, the client's latest, or one of the client's labels alone
    score_above: float | None = None  # detections count from this confidence on, in the place of the config's
    source: str = "ours"  # paper, and how it is known

    def select(self, seen: Observation, k: int, rng: np.random.Generator) -> Selection:
        """The k images to label next. ValueError where a score is not finite, or the pool is smaller than k."""
        found = self.function(seen, k, rng) if self.selects else self.function(seen)
        if self.selects:
            return found if isinstance(found, Selection) else Selection(np.asarray(found), Scores.none(seen.count))
        found = found if isinstance(found, Scores) else Scores.all(found)
        if len(found) != seen.count:
            raise ValueError(f"strategy {self.name!r} scored {len(found)} images of {seen.count}")
        return Selection(top_k(found, k, rng, seen.config.query.no_detection_rule), found)

    def compares_local(self) -> bool:
        """True if it reads clients' own models, which are then kept."""
        own = {"local_detections", "local_class_scores", "committee_class_scores"}
        return self.model == "local" or bool(self.needs & own)

    def refusal(self, config: Config) -> str:
        """Why this experiment cannot run it; '' = it can."""
        model, classifier = config.model, config.model.classifier
        alone = {"local_only_class_scores", "local_only_embeddings", "committee_class_scores"}
        for names, refused, reason in (
            (_OF_DETECTORS, classifier, "it is for detectors"),
            (_OF_CLASSIFIERS, not classifier, "it is for classifiers of whole images"),
            (_OF_LINEAR, classifier != "linear", "it needs classifier='linear'"),
            (alone, classifier == "linear", "a linear classifier is trained on one client's labels anyway"),
            ({"held_out_detections"}, config.federation.held_out_images < 1, "set held_out_images to 1 or more"),
            (_OF_SSD, model.detector != "ssd", f"set detector='ssd', not {model.detector!r}"),
            ({"predicted_losses"}, not model.image_loss_head, "it reads a head: set image_loss_head=True"),
            ({"hidden_label_losses"}, not config.query.diagnostic, "an upper bound, no method: set diagnostic=True"),
        ):
            if refused and self.needs & names:
                return f"strategy {self.name!r} reads {min(self.needs & names)!r}: {reason}"
        if self.model == "local_only" and not classifier:
            return f"strategy {self.name!r} asks a model of one client's labels alone: that is for classifiers"
        return ""


def strategy(name: str, needs: Iterable[str] = (), kind: str | None = None, selects: bool = False, **about) -> Callable:
    """Register the function below it, in the place of an older one of this name; see the module's example.

    kind: 'boxes', 'images', None = both. needs, selects, about (score_above, source): as of `Strategy`.
    """
    for unknown in sorted(set(needs) - OBSERVATIONS):
        raise ValueError(f"strategy {name!r} needs {unknown!r}, which nobody observes: known are {OBSERVATIONS}")
    if not name.replace("_", "").isalnum() or kind not in (None, *KINDS):
        raise ValueError(f"a strategy's name has letters, digits and _, its kind is one of {KINDS}: {name!r}, {kind!r}")

    def add(function: Callable) -> Callable:
        made = Strategy(name, function, frozenset(needs), selects, **about)
        _KNOWN.update({(one, name): made for one in ([kind] if kind else KINDS)})
        return function

    return add


def registered(kind: str | None = None) -> dict[str, Strategy]:
    """All strategies by name, of a kind or of both."""
    return {name: found for (one, name), found in _KNOWN.items() if kind in (None, one)}


def find(name: str, kind: str) -> Strategy:
    """A strategy by name; "entropy.local" and "entropy.local_only" ask another model than the global one."""
    plain, _, model = name.partition(".")
    if (kind, plain) not in _KNOWN or model not in ("", "global", "local", "local_only"):
        what = "detectors" if kind == "boxes" else "classifiers of whole images"
        known = ", ".join(registered(kind))
        raise ValueError(
            f"query strategy {name!r} is unknown for {what}, as it is or with .local, .local_only: {known}"
        )
    return dataclasses.replace(_KNOWN[kind, plain], name=name, model=model or "global")


def kind_of(config: Config) -> str:
    """'images' for a config with a classifier, else 'boxes'."""
    return "images" if config.model.classifier else "boxes"


SETTLES, MONARCH, VAN_BOMMEL = "Settles (2012), ch. 2", "Monarch (2021), ch. 3-5", "van Bommel (2021), released code"
OURS = f"{MONARCH}, carried to boxes: ours"
_EMBEDDED = ("embeddings", "labelled_embeddings")
_HELD_OUT = ("activations", "held_out_activations", "held_out_classes")


@strategy("random", selects=True, source="the baseline that every strategy must beat")
def _random(seen: Observation, k: int, rng: np.random.Generator) -> Selection:
    drawn = Scores.all(rng.random(seen.count))
    return Selection(top_k(drawn, k, rng), drawn)


for _how in ("sum", "avg", "max"):
    for _value in (scores.least_confidence, scores.entropy, scores.margin, scores.ratio):
        _of_paper = _value is scores.least_confidence
        _name, _source = (_how, VAN_BOMMEL) if _of_paper else (f"{_value.__name__}_{_how}", SETTLES)
        strategy(_name, ("detections",), "boxes", source=_source)(
            lambda seen, of=_value, how=_how: scores.reduce(of(seen.detections), seen.detections.valid, how)
        )
for _how in scores.UNCERTAINTIES:
    strategy(_how, ("class_scores",), "images", source=SETTLES)(
        lambda seen, how=_how: scores.uncertainty(seen.class_scores, how)
    )


@strategy("count", ("detections",), "boxes", source="a cheap baseline: crowded images first")
def _count(seen: Observation) -> Tensor:
    return seen.detections.valid.sum(1)  # zero is a count, so every image is scored


@strategy("qbc", ("committee_class_scores",), "images", source="McCallum and Nigam (1998)")
def _committee(seen: Observation) -> Scores:
    members = seen.committee_class_scores
    return Scores.none(seen.count) if members is None else scores.query_by_committee(members)


def _on(seen: Observation, *asked, needs: Iterable[str], function: Callable):
    return function(*(getattr(seen, need) for need in needs), *asked)  # asked: k and rng of one that selects


# Outliers of a model: class by class among held-out images of that class. Among all of them, as in active-vision, a
# certain image is low in every class but one, so the lowest mean rank would be the most certain image's.
for _name, _kind, _needs, _selects, _function, _source in (
    ("coreset", None, _EMBEDDED, True, diversity.k_center, "Sener and Savarese (2018), 1708.00489"),
    ("badge", "images", ("class_scores", "embeddings"), True, diversity.badge, "Ash et al. (2020), 1906.03671"),
    ("cluster", None, ("embeddings",), True, diversity.cluster, MONARCH),
    ("representative", None, _EMBEDDED, False, diversity.representative, MONARCH),
    ("embedding_outlier", None, _EMBEDDED, False, diversity.embedding_outlier, MONARCH),
    ("model_outlier", "boxes", ("detections", "held_out_detections"), False, diversity.box_outlier, OURS),
    ("model_outlier", "images", _HELD_OUT, False, diversity.model_outlier, MONARCH),
):
    strategy(_name, _needs, _kind, _selects, source=_source)(partial(_on, needs=_needs, function=_function))


def mixture(shares: Mapping[str, float], kind: str):
    """A selection by several strategies: each selects its `portions`, in order, among what those before left."""

    def select(seen: Observation, k: int, rng: np.random.Generator) -> np.ndarray:
        left, selected = np.arange(seen.count), [np.zeros(0, dtype=np.int64)]
        for name, count in portions(shares, k).items():
            if count:
                some = Part(seen, left)
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
