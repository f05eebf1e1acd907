"""What the runs of a seed share: the initial model, and the first cycle of runs that are alike until they select."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from .. import detectors, record, training
from ..config import Config
from ..sampling import Oracle, Pool
from ..training import LocalTask
from .client import Client
from .messages import State, Update, state_of
from .query import classifier_task, strategy_at

if TYPE_CHECKING:
    from .experiment import Experiment
    from .schemes import Step
    from .setup import Setup

_RUNS = ("profile", "methods", "seeds", "side_seeds", "evaluate_every", "on_failure")
_SCORING = ("score_above", "nms_iou", "class_agnostic", "test_time_views", "no_detection_rule", "pool_subset_size")
_SELECTING = ("cascade", "cascade_order", "quota", "local_only_epochs", "pseudo_above", "diagnostic", "query_fraction")
_COSTS = ("seconds_per_image", "seconds_per_box")


def initial_model(run: record.Run, setup: Setup) -> State:
    """Weights that every method of a seed begins from, trained centrally on images of the server's; made once.

    Released code (van Bommel): 200 images, 200 epochs; they are in no client's pool.
    """
    config, rows = run.config, setup.initial_rows(run.seed)

    def make() -> State:
        model = detectors.build(config, len(setup.class_names) or 1, run.torch_rng("weights"))
        settings = config.federation
        if len(rows) and settings.initial_model_iterations:
            recipe = config.training.replace(schedule="cosine", warmup=settings.initial_model_warmup, proximal=0.0)
            _train_initial(run, setup, model, rows, recipe)
        return state_of(model, model.exchanged())

    return record.shared(
        _without(config, _AFTER_INITIAL),
        *("shared", run.seed, "starting-point", make),
        root=run.root,
        fingerprint=run.fingerprint,
    )


def _train_initial(run: record.Run, setup: Setup, model, rows, recipe) -> None:
    rng, iterations = run.torch_rng("starting point"), run.config.federation.initial_model_iterations
    if not run.config.model.classifier:
        task = LocalTask(rng, "initial model", iterations)
        images, labels = setup.train.images.take(rows), setup.train.labels.take(rows)
        for _ in training.fit(model, images, labels, recipe, task, device=setup.device):
            pass
        return
    server = Client("initial model", Pool("initial model", setup.train.images, Oracle(setup.train.labels), rows))
    server.pool.label(range(len(rows)), 0)
    task = classifier_task(setup, server, rows, rng, iterations=iterations)
    recipe = recipe.replace(balanced_softmax=False, distillation_weight=0.0)  # plain cross-entropy
    training.fit_classifier(model, task, setup.train.images, recipe, device=setup.device)


def _without(config: Config, names: Sequence[str]) -> Config:
    """The config with these settings at their defaults: what is the same whatever they are is saved under it."""
    default = Config().flat()
    return config.replace(**{name: default[name] for name in names})


def _names(*parts: str) -> tuple[str, ...]:
    """All flat names of these parts of the config."""
    return tuple(name for part in parts for name in getattr(Config(), part).flat())


# What an initial model does not depend on: with all else equal, notebooks, schemes and optimizer settings share it.
_MODEL_AND_DATA = ("initial_model_images", "initial_model_iterations", "initial_model_warmup", "batch_norm")
_AFTER_INITIAL = (
    *(name for name in _names("federation", "server", "query", "vae") if name not in _MODEL_AND_DATA),
    *_RUNS,
    *("as_released", "schedule", "warmup", "epochs", "proximal", "balanced_softmax", "distillation_weight"),
)
_AFTER_FIRST_CYCLE = (*_RUNS, *_SCORING, *_SELECTING, *_COSTS, *_names("vae"))


def shared_first_updates(
    experiment: Experiment, step: Step, clients: Sequence[Client], work: Callable[[], list[Update | Exception]]
) -> list[Update | Exception]:
    """What clients send in cycle 0: trained once for all strategies of a seed, then read.

    Until something has been selected, the methods of a seed are one and the same run; on a GPU, where two trainings
    never are, this is what makes them a pair. The clients' optimizer states and BatchNorm statistics go with it.
    """
    config, run = experiment.config, experiment.run
    alike = experiment.method.scheme.name == "fedavg" and step.cycle == 0 and not strategy_at(experiment, 0).needs
    if not alike or config.federation.dropout_rate or config.federation.on_failure != "stop":
        return work()

    def make() -> dict:
        sent = []
        for update in work():
            if isinstance(update, Exception):
                raise update
            values = {f.name: getattr(update, f.name) for f in fields(update)}
            for name in ("payload", "optimizer_state"):
                values[name] = torch.frombuffer(bytearray(values[name]) or bytearray(1), dtype=torch.uint8)
            sent.append({**values, "sizes": [len(update.payload), len(update.optimizer_state)]})
        return {"sent": sent, **{what: {c.name: getattr(c, what) for c in clients} for what in _STAY}}

    kept = record.shared(
        _without(config, _AFTER_FIRST_CYCLE),
        *("shared", run.seed, f"first-updates-{step.round}", make),
        root=run.root,
        fingerprint=run.fingerprint,
    )
    for client in clients:
        for what in _STAY:
            setattr(client, what, kept[what][client.name])
    return [_unfrozen(values) for values in kept["sent"]]


_STAY = ("optimizer_state", "bn_buffers")


def _unfrozen(values: dict) -> Update:
    payload, optimizer = (
        values[name].numpy().tobytes()[:size]
        for name, size in zip(("payload", "optimizer_state"), values["sizes"], strict=True)
    )
    plain = {name: value for name, value in values.items() if name != "sizes"}
    return Update(**{**plain, "payload": payload, "optimizer_state": optimizer})
