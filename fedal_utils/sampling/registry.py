"""One registry of query strategies. To add one, write one function:

    from fedal_utils import sampling

    @sampling.strategy("my_margin", needs=("detections",))
    def my_margin(seen):  # seen: sampling.Observation of N unlabelled images, labels are not reachable from it
        return 1 - seen.detections.scores.amax(1)  # (N,) bigger = query first

It then runs in every notebook, scheme and detector that can give what it needs: `overrides={"methods": ["random",
"my_margin"]}`. With `selects=True` the function takes (seen, k, rng) and returns positions or a `Selection`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..config import Config
from .observation import Observation, PoolObservation
from .scores import Scores
from .select import Selection, top_k

KINDS = ("boxes", "images")  # for detectors | for classifiers of whole images
MODELS = ("global", "local", "local_only")
OBSERVATIONS = tuple(
    name for name, value in vars(PoolObservation).items() if isinstance(value, cached_property) and name != "images"
)


@dataclass(frozen=True)
class Strategy:
    """A way to select what is labelled next."""

    name: str
    function: Callable
    needs: frozenset[str] = frozenset()  # names of observations that it reads, see `PoolObservation`
    selects: bool = False  # the function returns a selection, else scores
    model: str = "global"  # which is asked: this one, the client's latest, or one of the client's labels alone
    score_above: float | None = None  # detections count from this confidence on, in the place of the config's
    source: str = ""  # paper, and how it is known

    def select(self, seen: Observation, k: int, rng: np.random.Generator) -> Selection:
        """The k images to label next. ValueError where a score is not finite, or the pool is smaller than k."""
        if self.selects:
            found = self.function(seen, k, rng)
            return found if isinstance(found, Selection) else Selection(np.asarray(found), Scores.none(seen.count))
        found = self.function(seen)
        scores = found if isinstance(found, Scores) else Scores.all(found)
        if len(scores) != seen.count:
            raise ValueError(f"strategy {self.name!r} scored {len(scores)} images of {seen.count}")
        return Selection(top_k(scores, k, rng, seen.config.query.no_detection_rule), scores)

    def compares_local(self) -> bool:
        """True if it reads clients' own models, which are then kept."""
        return self.model == "local" or bool(self.needs & _LOCAL)

    def refusal(self, config: Config) -> str:
        """Why this experiment cannot run it; '' = it can."""
        for need in sorted(self.needs):
            if reason := refusal(need, config):
                return f"strategy {self.name!r} reads {need!r}: {reason}"
        if self.model == "local_only" and not config.model.classifier:
            return f"strategy {self.name!r} asks a model of one client's labels alone: that is for classifiers"
        return ""


def refusal(name: str, config: Config) -> str:
    """Why this experiment cannot give an observation, in a few words; '' = it can."""
    classifier = config.model.classifier
    of_ssd = name.endswith("_losses") or name == "reconstruction_errors"
    if classifier and (of_ssd or name == "views" or name.endswith("detections")):
        return "it is for detectors"
    if not classifier and (name in _OF_LINEAR or name.endswith("class_scores") or name == "local_only_embeddings"):
        return "it is for classifiers of whole images"
    if name in _OF_LINEAR and classifier != "linear":
        return "it needs classifier='linear'"
    if name.startswith(("local_only", "committee")) and classifier == "linear":
        return "a linear classifier is trained on one client's labels anyway"
    if name == "held_out_detections" and config.federation.held_out_images < 1:
        return "it compares with images that are held out: set held_out_images to 1 or more"
    if of_ssd and config.model.detector != "ssd":
        return f"it needs the loss of each image: set detector='ssd', not {config.model.detector!r}"
    if name == "predicted_losses" and not config.model.image_loss_head:
        return "it reads a head that learns the detector's loss: set image_loss_head=True"
    if name == "hidden_label_losses" and not config.query.diagnostic:
        return "it looks at hidden labels, an upper bound and no method: set diagnostic=True to run it"
    return ""


_OF_LINEAR = frozenset({"activations", "held_out_activations", "held_out_classes"})
_LOCAL = frozenset({"local_detections", "local_class_scores", "committee_class_scores"})
_KNOWN: dict[tuple[str, str], Strategy] = {}  # (kind, name) -> strategy


def strategy(
    name: str,
    needs: Iterable[str] = (),
    kind: str | None = None,
    selects: bool = False,
    score_above: float | None = None,
    source: str = "ours",
) -> Callable[[Callable], Callable]:
    """Register the function below it, in the place of an older one of this name; see the module's example.

    name: what methods are called.
    kind: 'boxes', 'images', None = both.
    needs, selects, score_above, source: see `Strategy`.
    """
    for unknown in sorted(set(needs) - set(OBSERVATIONS)):
        raise ValueError(f"strategy {name!r} needs {unknown!r}, which nobody observes: known are {OBSERVATIONS}")
    if not name.replace("_", "").isalnum() or kind not in (None, *KINDS):
        raise ValueError(f"a strategy's name has letters, digits and _, its kind is one of {KINDS}: {name!r}, {kind!r}")

    def add(function: Callable) -> Callable:
        made = Strategy(name, function, frozenset(needs), selects, "global", score_above, source)
        _KNOWN.update({(one, name): made for one in ([kind] if kind else KINDS)})
        return function

    return add


def registered(kind: str | None = None) -> dict[str, Strategy]:
    """All strategies by name, of a kind or of both."""
    return {name: found for (one, name), found in _KNOWN.items() if kind in (None, one)}


def find(name: str, kind: str) -> Strategy:
    """A strategy by name; "entropy.local" and "entropy.local_only" ask another model than the global one."""
    plain, _, model = name.partition(".")
    if (kind, plain) not in _KNOWN or model and model not in MODELS:
        what = "detectors" if kind == "boxes" else "classifiers of whole images"
        raise ValueError(
            f"query strategy {name!r} is unknown for {what}: known are {', '.join(registered(kind))}, with '.local' or "
            "'.local_only' to ask the client's own model"
        )
    found = _KNOWN[kind, plain]
    return dataclasses.replace(found, name=name, model=model) if model else found


def kind_of(config: Config) -> str:
    """'images' for a config with a classifier, else 'boxes'."""
    return "images" if config.model.classifier else "boxes"
