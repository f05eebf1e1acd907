"""One registry: a strategy of a few lines runs by name; what it reads is declared; labels are not reachable."""

import numpy as np
import pytest
import torch
from observed import chosen, detections, observed

from fedal_utils import sampling
from fedal_utils.config import Config
from fedal_utils.sampling import strategies
from fedal_utils.sampling.observation import PoolObservation
from fedal_utils.seeding import rng_for


@pytest.fixture
def own():
    @sampling.strategy("my_margin", needs=("detections",), kind="boxes", source="a test")
    def my_margin(seen):
        return 1 - seen.detections.scores.amax(1)

    @sampling.strategy("my_first", selects=True)
    def my_first(seen, k, rng):
        return np.arange(k)

    yield my_margin
    for key in [key for key in strategies._KNOWN if key[1].startswith("my_")]:
        del strategies._KNOWN[key]


def test_a_strategy_of_ones_own_is_found_by_name_and_selects(own):
    found = detections(*([([0, 0, 9, 9], [1 - p, p])] for p in (0.9, 0.4, 0.7)), columns=2)
    selection = chosen("my_margin", observed(3, found), 2, rng_for(0, "c"))
    assert selection.positions.tolist() == [1, 2] and selection.scores.scored.all()
    assert chosen("my_first", observed(3), 2, rng_for(0, "c")).positions.tolist() == [0, 1]
    assert "my_margin" in sampling.registered("boxes") and "my_margin" not in sampling.registered("images")
    assert "my_first" in sampling.registered("images") and sampling.find("my_margin", "boxes").source == "a test"


def test_what_is_wrong_with_a_strategy_is_said(own):
    with pytest.raises(ValueError, match="needs 'labels', which nobody observes: known are"):
        sampling.strategy("bad", needs=("labels",))
    with pytest.raises(ValueError, match="a strategy's name has letters"):
        sampling.strategy("a+b")
    with pytest.raises(ValueError, match="'my_margin' is unknown for classifiers of whole images"):
        sampling.find("my_margin", "images")
    sampling.strategy("my_short", kind="boxes")(lambda seen: torch.zeros(1))
    with pytest.raises(ValueError, match="'my_short' scored 1 images of 3"):
        chosen("my_short", observed(3), 1, rng_for(0, "c"))
    sampling.strategy("my_nan", kind="boxes")(lambda seen: torch.tensor([0.0, float("nan"), 1.0]))
    with pytest.raises(ValueError, match="non-finite score at position 1"):
        chosen("my_nan", observed(3), 1, rng_for(0, "c"))


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_every_need_can_be_observed_and_every_strategy_names_its_source(kind):
    known = set(sampling.OBSERVATIONS)
    for name, strategy in sampling.registered(kind).items():
        assert strategy.needs <= known and strategy.source, name
    of_labels = {name for name in known if "label" in name and "labelled" not in name}
    assert of_labels == {"hidden_label_losses", "pseudo_label_losses"}


def test_a_suffix_asks_another_model_than_the_global_one():
    local, plain, committee = (sampling.find(name, "images") for name in ("entropy.local", "entropy", "qbc"))
    assert (local.model, plain.model) == ("local", "global") and local.compares_local() and committee.compares_local()
    assert "for classifiers" in sampling.find("sum.local_only", "boxes").refusal(Config())
    with pytest.raises(ValueError, match="'entropy.elsewhere' is unknown"):
        sampling.find("entropy.elsewhere", "images")


def test_an_observation_is_made_once_and_only_when_it_is_read(monkeypatch):
    made = []
    monkeypatch.setattr(PoolObservation, "predict", lambda self, images, *_, **__: made.append(1) or "found")
    monkeypatch.setattr(PoolObservation, "images", None)
    seen = object.__new__(PoolObservation)
    assert not made and seen.detections == seen.detections == "found" and made == [1]
