"""Real clients: the sizes of notebook 60. Few rounds, for each of a client's answers is a process of its own."""

from .sizes import DIGITS, Preset, Sizes
from .van_bommel import FULL, FULL_BY_DATA

_FAULTS: Sizes = dict(on_failure="skip", max_update_ratio=20.0)
_ALL: Sizes = dict(detector="ssd", **_FAULTS, evaluate_every=1, seeds=(0,), side_seeds=1, threads=1)
_SMALL: dict[str, Sizes] = {
    "digits": {
        **DIGITS,
        **_ALL,
        **dict(digit_classes=3, scenes=(260, 80), initial_model_iterations=120),
        **dict(initial_labels=12, query_size=12, cycles=2, rounds=2, iterations=16),
    },
    "bccd": {
        **_ALL,
        **dict(clients=4, initial_labels=6, query_size=6, cycles=4, rounds=3, iterations=20),
        **dict(seeds=(0, 1, 2), side_seeds=3),
    },
    "": {**_ALL, "rounds": 2},
}
PRESETS = {"60": Preset(("avg",), {**FULL, **_FAULTS}, FULL_BY_DATA, _SMALL)}
