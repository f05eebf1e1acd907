"""The config of an experiment: flat names, what it refuses, and a digest that moves with every number that matters."""

import dataclasses
import json

import pytest

from fedal_utils import config
from fedal_utils.config import Config, TrainingConfig

LISTS = ("methods", "seeds", "side_seeds")  # which runs there are, not what one of them does
# A different, allowed value where the rule of `another` gives none.
ANOTHER = {
    "profile": "quick",
    "max_update_ratio": 2.0,
    "limit": (7, 7),
    "seeds": (5,),
    "cascade": (5.0, 3.0, 2.0, 1.5),
    "cascade_order": config.FILTERS[::-1],
}


def another(name: str, value: object, names: tuple) -> object:
    if name in ANOTHER:
        return ANOTHER[name]
    if names:
        return next(n for n in names if n != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.0625
    if isinstance(value, str):
        return value + "x"
    return (*value, *value[-1:]) if value else ((1,),)


def metadata(path: tuple[str, ...]) -> dict:
    part: object = Config
    for name in path[:-1]:
        part = {f.name: type(f.default) for f in dataclasses.fields(part)}[name]
    return {f.name: f.metadata for f in dataclasses.fields(part)}[path[-1]]


def test_every_number_moves_the_digest_and_no_two_parts_share_a_name():
    base, digests = Config.of(), set()
    for name, value in base.flat().items():
        changed = base.replace(**{name: another(name, value, metadata(Config.paths()[name]).get("names", ()))})
        assert changed.flat()[name] != value
        if name in LISTS:
            assert changed.digest() == base.digest()
        else:
            digests.add(changed.digest())
    assert len(digests) == len(base.flat()) - len(LISTS) and base.digest() not in digests
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


def test_a_config_goes_through_json_and_back():
    base = Config.of(missing_classes=((0, 1), (2,)), lr=1 / 3, seeds=(3,))
    there = Config.of(**json.loads(json.dumps(base.flat())))
    assert there == base and there.digest() == base.digest()


def test_an_integer_for_a_float_and_a_list_for_a_tuple_are_the_same_config():
    changed = Config.of(lr=1, zoom=[1, 2], missing_classes=[[0], [1, 2]], image_size=[64, 96])
    assert changed == Config.of(lr=1.0, zoom=(1.0, 2.0), missing_classes=((0,), (1, 2)), image_size=(64, 96))
    assert type(changed.training.lr) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"roundz": 3}, "unknown parameter 'roundz'; did you mean 'rounds'"),
        ({"qqqqqq": 3}, "unknown parameter 'qqqqqq'.* Known: .*dirichlet_alpha"),
        ({"rounds": "3"}, "parameter 'rounds' must be int, got '3'"),
        ({"rounds": 3.0}, "parameter 'rounds' must be int, got 3.0"),
        ({"rounds": True}, "parameter 'rounds' must be int, got True"),
        ({"lr": "fast"}, "parameter 'lr' must be float, got 'fast'"),
        ({"frozen": 1}, "parameter 'frozen' must be bool, got 1"),
        ({"methods": "random"}, "parameter 'methods' must be tuple, got 'random'"),
        ({"methods": ["random", 3]}, "parameter 'methods' must hold values of type str"),
        ({"seeds": [0.5]}, "parameter 'seeds' must hold values of type int"),
        ({"image_size": 64}, "parameter 'image_size' must be tuple, got 64"),
        ({"dataset": None}, "parameter 'dataset' must be str, got None"),
        ({"limit": 10}, "parameter 'limit' must be None or a pair"),
        ({"limit": (10, 0)}, "parameter 'limit' must be None or a pair"),
        ({"profile": "huge"}, r"profile must be one of \('smoke', 'quick', 'paper'\), got 'huge'"),
        ({"optimizer_state": "lost"}, r"optimizer_state must be one of .*'travels'\), got 'lost'"),
        ({"clients": 0}, "clients must be 1 or more, got 0"),
        ({"extra_rounds": -1}, "extra_rounds must be 0 or more, got -1"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"zoom": (1.0, float("inf"))}, "zoom must be a finite number"),
        ({"flip": 1.5}, "flip must be 1 at most, got 1.5"),
        ({"mosaic": -0.1}, "mosaic must be 0 or more, got -0.1"),
        ({"round_lr_decay": 0.0}, "round_lr_decay must be > 0, got 0.0"),
        ({"seeds": ()}, "seeds must be a list of different integers"),
        ({"seeds": (1, 1)}, "seeds must be a list of different integers"),
        ({"seeds": (-1,)}, "seeds must be a list of different integers >= 0"),
        ({"max_update_ratio": 0.5}, r"max_update_ratio must be 0 \(off\) or > 1, got 0.5"),
        ({"cascade_order": ("semantic", "overlap")}, "cascade_order must name each of .* once"),
        ({"cascade": (4.0, 3.0, 2.0)}, "cascade must be four numbers"),
        ({"cascade": (4.0, 5.0, 2.0, 1.5)}, "cascade must be four numbers >= 1 that do not grow"),
        ({"cascade": (4.0, 3.0, 2.0, 0.5)}, "cascade must be four numbers >= 1"),
        ({"reset_each_cycle": True, "optimizer_state": "client"}, "reset_each_cycle=True .*'client' cannot live on"),
    ],
)
def test_unknown_names_wrong_types_and_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Config.of(**values)


def test_labels_needed_is_the_first_ones_and_the_query_of_every_later_cycle():
    assert Config.of(initial_labels=8, query_size=5, cycles=4).labels_needed() == 8 + 3 * 5
    assert Config.of(initial_labels=8, query_size=5, cycles=1).labels_needed() == 8


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({}, False),
        ({"flip": 1.0}, False),
        ({"colour": 0.1}, True),
        ({"zoom": (0.9, 1.1)}, True),
        ({"shift": 0.1}, True),
    ],
)
def test_a_flip_alone_does_not_change_pixels(change, answer):
    assert config.AugmentConfig.of(**change).changes_pixels() is answer
