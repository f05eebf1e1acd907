"""What each paper adds: sizes, arms and tables; `load` gives the config of a notebook."""

from collections.abc import Sequence

from ..config import PROFILES, SIZES, Config
from ..data import CLASS_NAMES, NAMES
from . import flywheel, huale, kafal, real_clients, sizes, ssd_vae, van_bommel

_PAPERS = (sizes, van_bommel, huale, kafal, ssd_vae, flywheel, real_clients)


def load(notebook: str, profile="smoke", data: str | None = None, seeds: Sequence[int] | None = None, **more) -> Config:
    """The config of a notebook ('10_centralised', '11_fedavg', ...) at a profile, on its own or another data set.

    data: a known name ('digits', 'bccd', 'voc07', ...) or a folder of your own images, taken for photographs.
    seeds, more: the last word on settings of the config; unknown names are refused.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {PROFILES}, got {profile!r}")
    number = notebook.partition("_")[0]
    preset = next((paper.PRESETS[number] for paper in _PAPERS if number in paper.PRESETS), van_bommel.OTHERS)
    if profile == "paper":
        data = data or preset.full["dataset"]
        chosen = {**preset.full, **preset.full_by_data.get(data, {})}
    else:
        base = sizes.PROFILES[profile]
        data = data or preset.data.get(profile) or base["dataset"]
        own = preset.small.get(data, preset.small.get("", {}))
        chosen = {**sizes.BY_DATA.get(data, sizes.PHOTOGRAPHS), **base, **own}
    config = Config.of(**{"methods": preset.methods, **chosen, "profile": profile, "dataset": data})
    if number == "10" and "clients" not in more:  # on one node: the labels and the steps of all clients together
        many = config.federation.clients
        labels = {name: many * getattr(config.query, name) for name in ("initial_labels", "query_size")}
        config = config.replace(clients=1, partition="iid", iterations=many * config.federation.iterations, **labels)
    if seeds is not None:
        more["seeds"] = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    if data not in (*NAMES, *CLASS_NAMES):
        more["kept"] = tuple(name for name in SIZES if name in more)
    return config.replace(**more)


def power_arms(config: Config) -> dict[str, Config]:
    """What `metrics.power` compares: this size, all labels at once for as many steps, and twice the steps."""
    rounds, cycles = config.federation.rounds, 1 if config.federation.reset_each_cycle else config.query.cycles
    whole = config.replace(initial_fraction=1.0, cycles=1, rounds=cycles * rounds)
    return {"this size": config, "all labels": whole, "twice the steps": config.replace(rounds=2 * rounds)}
