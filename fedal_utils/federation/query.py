"""A client's query: which model is asked, what the strategy may observe, what it selects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import detectors, training
from ..detectors import VAE, Classifier, Detector
from ..sampling import PoolObservation, Strategy, find, kind_of
from ..training import ClassifierTask
from .client import Client
from .messages import State, broadcast, pack, state_of, unpack

if TYPE_CHECKING:
    from .experiment import Experiment
    from .schemes import Step


@dataclass(frozen=True)
class Query:
    """What a client would have labelled next."""

    positions: np.ndarray  # (k,) of its pool
    why: np.ndarray  # (k,) their scores, NaN: none
    scores: np.ndarray  # of everything that was observed, in the order of the pool
    detected: np.ndarray | None = None  # (C,) boxes of each class that the model predicts, where those are observed


def strategy_at(experiment: "Experiment", cycle: int) -> Strategy:
    """The method's strategy in this cycle: the first labels are random, but for a chain's (and as_released)."""
    config, method = experiment.config, experiment.method
    initial = cycle == 0 and not method.scheme.queries_at_once
    scored = config.as_released and kind_of(config) == "boxes" and "reconstruction_errors" not in method.strategy.needs
    return find("random", kind_of(config)) if initial and not scored else method.strategy


def query_size(experiment: "Experiment", client: Client, cycle: int) -> int:
    """How many images this client queries in a cycle; a classifier's client what it has left at most."""
    config, query = experiment.config, experiment.config.query
    if experiment.method.scheme.queries_at_once:
        return config.labels_needed()
    count, part = query.query_size, query.query_fraction
    if cycle == 0:
        count, part = query.initial_labels, query.initial_fraction
    if part:
        count = math.ceil(round(part * len(client.pool), 9))  # 0.05 * 20 is a little more than one
    return min(count, len(client.pool.unlabelled())) if config.model.classifier or query.initial_fraction else count


def select(experiment: "Experiment", step: "Step", client: Client) -> Query:
    """Observe the client's unlabelled images by its own model, else the global one as it knows it, and select."""
    config, run, cycle = experiment.config, experiment.run, step.cycle
    strategy, count = strategy_at(experiment, cycle), query_size(experiment, client, cycle)
    if count == 0:  # all is labelled
        return Query(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))
    state = client.local_state or client.stale_global_state
    model = with_state(experiment.model, state) if state else experiment.model
    if config.federation.message_dtype != "fp32":  # it observes with what it received
        model = with_state(model, unpack(broadcast(model, config.federation.message_dtype)))
    unlabelled = client.pool.unlabelled()
    rng, most = run.rng("ask", client.name, cycle), config.query.pool_subset_size
    if most and strategy.needs and len(unlabelled) > most:
        drawn = run.rng("looked at", client.name, cycle).permutation(unlabelled)
        unlabelled = np.sort(drawn[: max(most, count)])
    models = ClientModels(experiment, client, cycle, model)
    asked = (getattr(models, strategy.model) if strategy.model != "global" else None) or model
    scene = replace(experiment.setup.scene, score_above=strategy.score_above)
    seen = PoolObservation(config, scene, client.pool, unlabelled, asked, models)
    selection = strategy.select(seen, count, rng)
    scores = np.where(selection.scores.scored, selection.scores.values, np.nan)
    detected = None
    if "detections" in seen.__dict__:
        found, classes = seen.detections, len(experiment.setup.class_names)
        detected = torch.bincount(found.labels[found.valid].flatten(), minlength=classes + 1)[1:].numpy()
    return Query(unlabelled[selection.positions], scores[selection.positions], scores, detected)


def with_state(model: Detector | Classifier, state: State) -> Detector | Classifier:
    """A copy of the model with these weights."""
    copied = detectors.clone(model)
    copied.load_state_dict(state, strict=False)
    return copied


class ClientModels:
    """The models of a client beside the one that is asked, made when they are wanted; None where there is none."""

    def __init__(self, experiment: "Experiment", client: Client, cycle: int, model: Detector | Classifier):
        self.experiment, self.client, self.cycle, self.model = experiment, client, cycle, model
        self.run, self.setup, self.config = experiment.run, experiment.setup, experiment.config

    @cached_property
    def local(self) -> Detector | Classifier | None:
        """The client's own after its latest training."""
        state = self.client.last_local_state
        return with_state(self.model, state) if state else None

    @cached_property
    def committee(self) -> list[Classifier]:
        """Every client's own; those of others are received, and count as bytes."""
        voting = [client for client in self.experiment.clients if client.last_local_state]
        dtype = self.config.federation.message_dtype
        self.client.bytes_from_peers = sum(
            len(pack(other.last_local_state, dtype)) for other in voting if other is not self.client
        )
        return [with_state(self.model, other.last_local_state) for other in voting]

    @cached_property
    def local_only(self) -> Classifier:
        """Trained on the client's labels alone; on a GPU those of all clients are trained at once."""
        known, wanted = self.experiment.local_only, (self.cycle, self.client.name)
        if wanted not in known:
            clients = self.experiment.clients if self.setup.device.type == "cuda" else [self.client]
            known.clear()
            known.update(local_only_states(self.experiment, clients, self.cycle))
        return with_state(self.model, known[wanted])

    @cached_property
    def vae(self) -> VAE:
        """The client's VAE in this cycle, trained on its labelled images (or all of its own), in pixels."""
        config, client, run = self.config, self.client, self.run
        settings, pool, photos = config.vae, client.pool, self.setup.photos[0].images
        vae = detectors.build_vae(config, run.torch_rng("vae weights"))
        if client.vae_state and not settings.vae_refit:
            vae.load_state_dict(client.vae_state)
        rows = pool.index if settings.vae_images == "all" else pool.index[pool.labelled()]
        rng = run.torch_rng("vae", client.name, self.cycle)
        list(training.fit_vae(vae, photos, rows, settings, rng, device=self.setup.device, client=client.name))
        if not settings.vae_refit:
            client.vae_state = {name: value.detach().cpu().clone() for name, value in vae.state_dict().items()}
        return vae

    @cached_property
    def noise(self) -> torch.Generator:
        """What a VAE as released draws its latents with."""
        return self.run.torch_rng("vae noise", self.client.name, self.cycle)

    @property
    def folds(self) -> np.random.Generator:
        """Which labelled images a linear classifier leaves out in turn."""
        return self.run.rng("folds", self.cycle - 1)

    @property
    def held_out(self):
        """Labelled images at the server, in no client's pool."""
        return self.setup.train.images.take(self.setup.held_out_rows(self.run.seed))


def local_only_states(experiment: "Experiment", clients: Sequence[Client], cycle: int) -> dict[tuple[int, str], State]:
    """Weights of a classifier trained on each client's labels alone, from new weights that all share (LoGo, 9.1).

    Until 99 % of the training images are right; lr / 10 after three quarters of the passes (as_released: 37 batches).
    """
    config, run, setup = experiment.config, experiment.run, experiment.setup
    model = detectors.build(config, len(setup.class_names), run.torch_rng("local-only weights", cycle))
    recipe = config.training.replace(
        **dict(epochs=config.query.local_only_epochs, schedule="step", step_at=(0.75,), warmup=0),
        **dict(balanced_softmax=False, distillation_weight=0.0),
    )
    tasks = []
    for client in clients:
        rows, rng = client.pool.index[client.pool.labelled()], run.torch_rng("local-only", client.name, cycle)
        tasks.append(classifier_task(setup, client, rows, rng, stop_at=0.99))
    if config.as_released:
        recipe = recipe.replace(step_at=(37 / tasks[0].steps(recipe),))
    start = [state_of(model, list(model.state_dict()))] * len(tasks)
    found = training.fit_together(model, start, tasks, setup.train.images, recipe, device=setup.device)
    for result in found:
        if isinstance(result, Exception):
            raise result
    return {(cycle, client.name): result.state for client, result in zip(clients, found, strict=True)}


def classifier_task(setup, client: Client, rows: np.ndarray, rng: torch.Generator, **more) -> ClassifierTask:
    """What a classifier's client trains on: rows of the training set, and the labels that the Oracle gave for them."""
    classes = client.pool.labels_of(rows).classes[:, 0] - 1
    counts = torch.bincount(classes, minlength=len(setup.class_names))
    more = {"unlabelled": np.zeros(0, dtype=np.int64), **more}
    return ClassifierTask(rng=rng, client=client.name, rows=rows, classes=classes, counts=counts, **more)
