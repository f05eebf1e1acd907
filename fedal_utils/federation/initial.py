"""What the runs of a seed share: the initial model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .. import detectors, record, training
from ..config import Config
from ..sampling import Oracle, Pool
from ..training import LocalTask
from .client import Client
from .messages import State, state_of
from .query import classifier_task

if TYPE_CHECKING:
    from .setup import Setup

_OWN = ("initial_model_images", "initial_model_iterations", "initial_model_warmup")
_LATER = (
    *("profile", "methods", "seeds", "side_seeds", "evaluate_every", "as_released"),
    *("schedule", "warmup", "epochs", "proximal", "balanced_softmax", "distillation_weight"),
)


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
            _train(run, setup, model, rows, recipe)
        return state_of(model, model.exchanged())

    where = ("shared", run.seed, "starting-point")
    return record.shared(_alike(config), *where, make, root=run.root, fingerprint=run.fingerprint)


def _train(run: record.Run, setup: Setup, model, rows, recipe) -> None:
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


def _alike(config: Config) -> Config:
    """What an initial model depends on, all else at its default: notebooks, schemes and optimizer settings share it."""
    default, flat = Config(), config.flat()
    config = replace(config, federation=default.federation, query=default.query, vae=default.vae)
    later = {name: default.flat()[name] for name in _LATER}
    return config.replace(**later, **{name: flat[name] for name in _OWN})
