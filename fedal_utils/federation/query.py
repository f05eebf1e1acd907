"""A client's query: which model is asked, what the strategy may observe, what it selects."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import detectors, training
from ..detectors import VAE, Classifier, Detector
from ..sampling import Pool, PoolObservation, find, kind_of
from ..training import ClassifierTask
from .client import Client, State, broadcast, pack, state_of, unpack

if TYPE_CHECKING:
    from .experiment import Experiment
    from .schemes import Step


def query_size(experiment: "Experiment", client: Client, cycle: int) -> int:
    """How many images this client queries in a cycle; a classifier's client what it has left at most."""
    config, query = experiment.config, experiment.config.query
    if experiment.method.scheme.queries_at_once:
        return config.labels_needed()
    initial, later = (query.initial_labels, query.initial_fraction), (query.query_size, query.query_fraction)
    count, part = later if cycle else initial
    if part:
        count = math.ceil(round(part * len(client.pool), 9))  # 0.05 * 20 is a little more than one
    few = config.model.classifier or query.initial_fraction or experiment.setup.train.labelled is not None
    return min(count, len(client.pool.unlabelled())) if few else count


def select(experiment: "Experiment", step: "Step", client: Client) -> tuple[np.ndarray, np.ndarray]:
    """Positions (k,) of its pool that the client would have labelled next, and their scores (NaN: none)."""
    config, run, cycle, strategy = experiment.config, experiment.run, step.cycle, experiment.method.strategy
    scored = config.as_released and kind_of(config) == "boxes" and "reconstruction_errors" not in strategy.needs
    if cycle == 0 and not (scored or experiment.method.scheme.queries_at_once):
        strategy = find("random", kind_of(config))  # the first labels
    count = query_size(experiment, client, cycle)
    if count == 0:  # all is labelled
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    state = client.local_state or client.stale_global_state  # its own, else the global one as it knows it
    model = with_state(experiment.model, state) if state else experiment.model
    if config.federation.message_dtype != "fp32":  # it observes with what it received
        model = with_state(model, unpack(broadcast(model, config.federation.message_dtype)))
    unlabelled, most = client.pool.unlabelled(), config.query.pool_subset_size
    if most and strategy.needs and len(unlabelled) > most:
        drawn = run.rng("looked at", client.name, cycle).permutation(unlabelled)
        unlabelled = np.sort(drawn[: max(most, count)])
    models = ClientModels(experiment, client, cycle, model)
    asked = (getattr(models, strategy.model) if strategy.model != "global" else None) or model
    scene = replace(experiment.setup.scene, score_above=strategy.score_above)
    seen = PoolObservation(config, scene, client.pool, unlabelled, asked, models)
    selection = strategy.select(seen, count, run.rng("ask", client.name, cycle))
    scores = np.where(selection.scores.scored, selection.scores.values, np.nan)
    return unlabelled[selection.positions], scores[selection.positions]


def with_state(model: Detector | Classifier, state: State) -> Detector | Classifier:
    """A copy of the model with these weights."""
    copied = detectors.clone(model)
    copied.load_state_dict(state, strict=False)
    return copied


@dataclass
class ClientModels:
    """The models of a client beside the one that is asked, made when they are wanted; None where there is none."""

    experiment: "Experiment"
    client: Client
    cycle: int
    model: Detector | Classifier

    @cached_property
    def local(self) -> Detector | Classifier | None:  # the client's own after its latest training
        state = self.client.last_local_state
        return with_state(self.model, state) if state else None

    @cached_property
    def committee(self) -> list[Classifier]:  # every client's own; those of others are received, and count as bytes
        voting = [client for client in self.experiment.clients if client.last_local_state]
        dtype = self.experiment.config.federation.message_dtype
        others = [client.last_local_state for client in voting if client is not self.client]
        self.client.bytes_down += sum(len(pack(state, dtype)) for state in others)
        return [with_state(self.model, client.last_local_state) for client in voting]

    @cached_property
    def local_only(self) -> Classifier:
        """Trained on the client's labels alone until 99 % are right, from new weights that all share (LoGo, 9.1).

        On a GPU all at once. lr / 10 after three quarters of the passes (as_released: 37 batches).
        """
        experiment, known = self.experiment, self.experiment.local_only
        if (self.cycle, self.client.name) not in known:
            config, run, setup = experiment.config, experiment.run, experiment.setup
            model = detectors.build(config, len(setup.class_names), run.torch_rng("local-only weights", self.cycle))
            recipe = config.training.replace(
                **dict(epochs=config.query.local_only_epochs, schedule="step", step_at=(0.75,), warmup=0),
                **dict(balanced_softmax=False, distillation_weight=0.0),
            )
            tasks = []
            for client in experiment.clients if setup.device.type == "cuda" else [self.client]:
                rng = run.torch_rng("local-only", client.name, self.cycle)
                tasks.append(classifier_task(client.pool, len(setup.class_names), rng, stop_at=0.99))
            if config.as_released:
                recipe = recipe.replace(step_at=(37 / tasks[0].steps(recipe),))
            start = [state_of(model, list(model.state_dict()))] * len(tasks)
            found = training.fit_together(model, start, tasks, setup.train.images, recipe, device=setup.device)
            known.clear()
            for task, result in zip(tasks, found, strict=True):
                if isinstance(result, Exception):
                    raise result
                known[self.cycle, task.client] = result.state
        return with_state(self.model, known[self.cycle, self.client.name])

    @cached_property
    def vae(self) -> VAE:
        """The client's VAE in this cycle, trained on its labelled images (or all of its own), in pixels."""
        client, run, setup = self.client, self.experiment.run, self.experiment.setup
        pool, settings = client.pool, run.config.vae
        vae = detectors.build_vae(run.config, run.torch_rng("vae weights"))
        if client.vae_state and not settings.vae_refit:
            vae.load_state_dict(client.vae_state)
        rows = pool.index if settings.vae_images == "all" else pool.index[pool.labelled()]
        rng, photos = run.torch_rng("vae", client.name, self.cycle), setup.photos[0].images
        list(training.fit_vae(vae, photos, rows, settings, rng, device=setup.device, client=client.name))
        if not settings.vae_refit:
            client.vae_state = state_of(vae, list(vae.state_dict()))
        return vae

    @cached_property
    def noise(self) -> torch.Generator:  # what a VAE as released draws its latents with
        return self.experiment.run.torch_rng("vae noise", self.client.name, self.cycle)

    @property
    def folds(self) -> np.random.Generator:  # which labelled images a linear classifier leaves out in turn
        return self.experiment.run.rng("folds", self.cycle - 1)

    @property
    def held_out(self):  # labelled images at the server, in no client's pool
        setup, seed = self.experiment.setup, self.experiment.run.seed
        return setup.train.images.take(setup.rows(seed)[1])


def classifier_task(pool: Pool, classes: int, rng: torch.Generator, **more) -> ClassifierTask:
    """What a classifier's client trains on: rows of the training set, and the labels that the Oracle gave for them."""
    rows = pool.index[pool.labelled()]
    labels = pool.labels_of(rows).classes[:, 0] - 1
    counts, more = torch.bincount(labels, minlength=classes), {"unlabelled": np.zeros(0, dtype=np.int64), **more}
    return ClassifierTask(rng=rng, client=pool.client, rows=rows, classes=labels, counts=counts, **more)
