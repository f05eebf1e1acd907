"""What each paper adds: sizes, arms and tables; `load` gives the config of a notebook.

van_bommel: notebooks 10 to 14. huale: 20. kafal: 30. ssd_vae: 40. flywheel: 50. real_clients: 60.
"""

from collections.abc import Sequence
from typing import Any

from .. import config as _config
from ..config import Config
from . import flywheel, huale, kafal, real_clients, sizes, ssd_vae, van_bommel

__all__ = ["flywheel", "huale", "kafal", "load", "power_arms", "real_clients", "sizes", "ssd_vae", "van_bommel"]

_PRESETS = {
    k: v for paper in (van_bommel, huale, kafal, ssd_vae, flywheel, real_clients) for k, v in paper.PRESETS.items()
}


def load(
    notebook: str, profile: str = "smoke", data: str | None = None, seeds: Sequence[int] | None = None, **overrides: Any
) -> Config:
    """The config of a notebook ('10_centralised', '11_fedavg', ...) at a profile, on its own or another data set.

    data: a known name ('digits', 'bccd', 'voc07', ...) or a folder with images of your own, which is treated as
        photographs.
    seeds, overrides: last word; unknown names are refused.
    """
    if profile not in _config.PROFILES:
        raise ValueError(f"profile must be one of {_config.PROFILES}, got {profile!r}")
    number = notebook.partition("_")[0]
    preset = _PRESETS.get(number, van_bommel.OTHERS)
    if profile == "paper":
        data = data or preset.full["dataset"]
        chosen = {**preset.full, **preset.full_by_data.get(data, {})}
    else:
        base = sizes.PROFILES[profile]
        data = data or preset.data.get(profile) or base["dataset"]
        own = preset.small.get(data, preset.small.get("", {}))
        chosen = {**sizes.BY_DATA.get(data, sizes.PHOTOGRAPHS), **base, **own}
    config = Config.of(**{"methods": preset.methods, **chosen, "profile": profile, "dataset": data})
    if number == "10" and "clients" not in overrides:  # on one node: the labels and the steps of all clients together
        many = config.federation.clients
        labels = {name: many * getattr(config.query, name) for name in ("initial_labels", "query_size")}
        config = config.replace(clients=1, partition="iid", iterations=many * config.federation.iterations, **labels)
    if seeds is not None:
        overrides["seeds"] = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    return config.replace(**overrides)


def power_arms(config: Config) -> dict[str, Config]:
    """What `metrics.power` compares: this size, all labels at once for as many steps, and twice the steps."""
    settings, cycles = config.federation, config.query.cycles
    rounds = settings.rounds if settings.reset_each_cycle else cycles * settings.rounds
    whole = config.replace(initial_fraction=1.0, cycles=1, rounds=rounds)
    return {"this size": config, "all labels": whole, "twice the steps": config.replace(rounds=2 * settings.rounds)}
