"""The config of an experiment: flat names, what it refuses, and a digest that moves with every number that matters."""

import dataclasses
import json

import pytest

from fedal_utils import config
from fedal_utils.config import Config, TrainingConfig

LISTS = ("methods", "seeds", "side_seeds")  # which runs there are, not what one of them does
# A different, allowed value where the rule of `another` gives none.
ANOTHER = dict(profile="quick", max_update_ratio=2.0, limit=(7, 7), seeds=(5,), cascade=(5.0, 3.0, 2.0, 1.5))
ANOTHER["cascade_order"] = config.FILTERS[::-1]


def another(name: str, value: object, names: tuple) -> object:
    if name in ANOTHER:
        return ANOTHER[name]
    if names:
        return next(n for n in names if n != value)
    if isinstance(value, bool):
        return not value
    for kind, change in ((int, lambda v: v + 1), (float, lambda v: v / 2 + 0.0625), (str, lambda v: v + "x")):
        if isinstance(value, kind):
            return change(value)
    return (*value[:-1], value[-1] * 2) if value else ((1,),)


def metadata(path: tuple[str, ...]) -> dict:
    part: object = Config
    for name in path[:-1]:
        part = {f.name: type(f.default) for f in dataclasses.fields(part)}[name]
    return {f.name: f.metadata for f in dataclasses.fields(part)}[path[-1]]


def test_every_number_moves_the_digest_and_no_two_parts_share_a_name():
    base, digests = Config.of(), set()
    for name, value in base.flat().items():
        changed = base.replace(**{name: another(name, value, metadata(Config.paths()[name]).get("names", ()))})
        assert changed.flat()[name] != value and (changed.digest() == base.digest()) is (name in LISTS)
        digests.add(changed.digest())
    assert len(digests) == len(base.flat()) - len(LISTS) + 1
    parts = [f for f in dataclasses.fields(Config) if isinstance(f.default, config.Part)]
    inner = [name for f in parts for name in type(f.default).paths()]
    assert len(inner) == len(set(inner))


def test_flat_names_reach_the_parts_and_a_part_knows_its_own_only():
    changed = Config.of(lr=0.1, clients=5, flip=0.0)
    assert (changed.training.lr, changed.federation.clients, changed.training.augment.flip) == (0.1, 5, 0.0)
    assert Config.paths()["flip"] == ("training", "augment", "flip")
    assert TrainingConfig.of(lr=0.1, flip=0.0) == changed.training
    with pytest.raises(ValueError, match="unknown parameter 'clients'"):
        changed.training.replace(clients=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.threads = 2


def test_a_config_goes_through_json_and_back_where_tuples_are_lists():
    base = Config.of(missing_classes=((0, 1), (2,)), lr=1, seeds=(3,), zoom=[1, 2])
    there = Config.of(**json.loads(json.dumps(base.flat())))
    assert there == base and there.digest() == base.digest()
    assert type(base.training.lr) is float and base.training.augment.zoom == (1.0, 2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"roundz": 3}, "unknown parameter 'roundz'; did you mean 'rounds'"),
        ({"rounds": "3"}, "parameter 'rounds' must be int, got '3'"),
        ({"image_size": 64}, "parameter 'image_size' must be tuple, got 64"),
        ({"profile": "huge"}, r"profile must be one of \('smoke', 'quick', 'paper'\), got 'huge'"),
        ({"clients": 0}, "clients must be 1 or more, got 0"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"image_size": (64, 0)}, r"image_size must be 1 or more, got \(64, 0\)"),
        ({"flip": 1.5}, "flip must be 1 at most, got 1.5"),
        ({"seeds": (-1,)}, "seeds must be a list of different integers >= 0"),
        ({"max_update_ratio": 0.5}, r"max_update_ratio must be 0 \(off\) or > 1, got 0.5"),
        ({"cascade": (4.0, 5.0, 2.0, 1.5)}, "cascade must be four numbers that do not grow"),
        ({"reset_each_cycle": True, "optimizer_state": "client"}, "reset_each_cycle=True .*'client' cannot live on"),
    ],
)
def test_unknown_names_wrong_types_and_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Config.of(**values)
