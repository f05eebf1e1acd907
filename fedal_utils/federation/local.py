"""In this process: training, clients with detectors one after another, with classifiers together; evaluation."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import detectors, metrics, record, training
from ..config import Config
from ..data import Dataset
from ..sampling import Oracle, Pool
from ..training import STEPS, LocalTask, TrainingDiverged
from .client import Client, State, Update, broadcast, pack, state_of, unpack
from .query import classifier_task, with_state
from .schemes import CENTRALISED, Step
from .setup import Setup, class_counts

if TYPE_CHECKING:
    from .experiment import Experiment

_OWN = ("initial_model_images", "initial_model_iterations", "initial_model_warmup")  # settings of an initial model
_LATER = ("schedule", "warmup", "epochs", "balanced_softmax", "distillation_weight")  # of training after it


def train_here(
    experiment: "Experiment", step: Step, clients: Sequence[Client], message: bytes
) -> dict[str, Update | TrainingDiverged]:
    """What each of these clients sends after a round, by name."""
    if experiment.config.model.classifier == "linear":
        return {client.name: _fit_linear(experiment, client) for client in clients}
    if experiment.config.model.classifier:
        return _train_classifiers(experiment, step, clients, message)
    scratch, sent = detectors.clone(experiment.model), {}
    for client in clients:
        try:
            sent[client.name] = train_client(experiment, step, client, scratch, message)
        except TrainingDiverged as error:
            sent[client.name] = error
    return sent


def train_client(experiment: "Experiment", step: Step, client: Client, scratch, message: bytes) -> Update:
    """One client's round with a detector, from the message or its own weights; scratch: any detector of that shape."""
    (recipe, iterations), config, state, position = experiment.recipe(step), experiment.config, None, None
    central = experiment.method.scheme.central
    together = len(experiment.clients) if central else 1  # whose gradient steps it takes
    if step.optimizer_state != "restart":
        state = dict(client.optimizer_state)
        # the schedule must not be over before the client is, so the labels at the end count
        each = iterations or recipe.epochs * math.ceil(config.labels_needed() / recipe.batch)
        position = (int(state.get(STEPS, 0)), each * step.schedule_rounds * together)
    rng = experiment.run.torch_rng("train", client.name, step.cycle, step.round)
    task = LocalTask(rng, client.name, iterations and iterations * together, state, position)
    images, labels = client.pool.training_set()
    scratch.load_state_dict(client.local_state or unpack(message), strict=False)
    *_, last = training.fit(scratch, images, labels, recipe, task, device=experiment.setup.device)
    dtype = "fp32" if step.local or central else config.federation.message_dtype
    try:  # an optimizer state is sent in full precision, where second moments do not vanish
        payload, along = broadcast(scratch, dtype), pack(state) if step.optimizer_state == "travels" else b""
    except ValueError as error:
        raise TrainingDiverged(f"client {client.name}: {error}") from None
    client.optimizer_state.update(state or {})
    boxes = int((labels.classes > 0).sum())
    return Update(client.name, payload, len(images), boxes, last["steps"], last["loss"], along)


def train_on_one_node(experiment: "Experiment", step: Step) -> Update:
    """On everyone's labels, for as many gradient steps as the clients take together."""
    first, model = experiment.clients[0], experiment.model
    rows = np.sort(np.concatenate([c.pool.index[c.pool.labelled()] for c in experiment.clients]))
    pool = Pool(CENTRALISED, experiment.setup.train.images, first.pool.oracle, rows)
    pool.queried_in[:] = 0
    node = Client(CENTRALISED, pool, first.optimizer_state)
    return train_client(experiment, step, node, detectors.clone(model), broadcast(model))


def _train_classifiers(
    experiment: "Experiment", step: Step, clients: Sequence[Client], message: bytes
) -> dict[str, Update | TrainingDiverged]:
    """All at once, from the global model, which from a cycle's second round on also teaches (KAFAL, 4.2)."""
    config, run, setup, tasks = experiment.config, experiment.run, experiment.setup, []
    recipe, iterations = experiment.recipe(step)
    for client in sorted(clients, key=lambda client: client.name):
        pool = client.pool
        others = pool.queried_in != 0 if config.as_released else pool.unlabelled()  # released: once and for all
        more = {"unlabelled": pool.index[others], "iterations": iterations}
        if config.federation.optimizer_state == "client":
            each = iterations or config.training.epochs * math.ceil(len(pool.labelled()) / config.training.batch)
            rounds = sum(cycle == step.cycle or not config.federation.reset_each_cycle for cycle, _ in run.plan)
            position = (int(client.optimizer_state.get(STEPS, 0)), each * rounds)
            more |= {"optimizer_state": client.optimizer_state, "schedule_position": position}
        rng = run.torch_rng("train", client.name, step.cycle, step.round)
        tasks.append(classifier_task(pool, len(setup.class_names), rng, **more))
    options = {"teacher": experiment.model if step.round else None, "as_released": config.as_released}
    model, start = detectors.clone(experiment.model), [unpack(message)] * len(tasks)
    found = training.fit_together(model, start, tasks, setup.train.images, recipe, device=setup.device, **options)
    sent: dict[str, Update | TrainingDiverged] = {}
    for task, result in zip(tasks, found, strict=True):
        sent[task.client] = result
        if not isinstance(result, TrainingDiverged):
            payload, count = pack(result.state, config.federation.message_dtype), len(task.rows)
            sent[task.client] = Update(task.client, payload, count, count, result.steps, result.loss)
    return sent


def _fit_linear(experiment: "Experiment", client: Client) -> Update:
    """Logistic regression on frozen features, from scratch on all labels so far."""
    model, (images, labels) = detectors.clone(experiment.model), client.pool.training_set()
    loss = model.fit(images.features[0], labels.classes[:, 0] - 1, experiment.config.flywheel.regularisation)
    return Update(client.name, pack(model.state_dict()), len(images), len(images), 1, loss)


def initial_model(run: record.Run, setup: Setup) -> State:
    """Weights that every method of a seed begins from, trained centrally on images of the server's; made once."""
    config, rows, iterations = run.config, setup.rows(run.seed)[0], run.config.federation.initial_model_iterations
    classes, default, flat = len(setup.class_names) or 1, Config(), config.flat()
    own = {name: flat[name] for name in _OWN} | {name: default.flat()[name] for name in _LATER}
    # Notebooks, schemes and optimizer settings share it: it lies under what it depends on, all else at its default.
    alike = Config(data=config.data, model=config.model, training=config.training, threads=config.threads)

    def make() -> State:
        model = detectors.build(config, classes, run.torch_rng("weights"))
        if len(rows) == 0 or iterations == 0:
            return state_of(model, model.exchanged())
        pool = Pool("initial model", setup.train.images, Oracle(setup.train.labels), rows)
        pool.label(range(len(rows)), 0)
        recipe = config.training.replace(schedule="cosine", warmup=config.federation.initial_model_warmup)
        rng = run.torch_rng("starting point")
        if config.model.classifier:
            recipe = recipe.replace(balanced_softmax=False, distillation_weight=0.0)  # plain cross-entropy
            task = classifier_task(pool, classes, rng, iterations=iterations)
            training.fit_classifier(model, task, setup.train.images, recipe, device=setup.device)
        else:
            task = LocalTask(rng, pool.client, iterations)
            list(training.fit(model, *pool.training_set(), recipe, task, device=setup.device))
        return state_of(model, model.exchanged())

    where = ("shared", run.seed, "starting-point")
    return record.shared(alike.replace(**own), *where, make, root=run.root, fingerprint=run.fingerprint)


def evaluate(experiment: "Experiment", step: Step) -> dict[str, float]:
    """Metrics on the test set; while clients are local, the mean over their models."""
    own = [client.local_state for client in experiment.clients if client.local_state and step.local]
    models = (with_state(experiment.model, state) if state else experiment.model for state in own or [{}])
    each = [_metrics(experiment, model, experiment.setup.test) for model in models]
    return {key: float(np.mean([found[key] for found in each])) for key in each[0]}


def ap_by_class(experiment: "Experiment", clients: Sequence[Client]) -> np.ndarray:
    """(M, C) AP50 of each class by each client's own model; NaN where it cannot be evaluated.

    On the images that the server holds out, else those of the initial model; as_released: on the test set.
    """
    setup, table = experiment.setup, []
    initial, held_out, _ = setup.rows(experiment.run.seed)
    held_out = held_out if len(held_out) else initial
    shown = setup.test if experiment.config.as_released else setup.train.take(held_out)
    for client in clients:
        ap = _metrics(experiment, with_state(experiment.model, client.local_state), shown) if len(shown) else {}
        table.append([ap.get(f"ap50/{name}", math.nan) for name in setup.class_names])
    return np.array(table, dtype=float)


def _metrics(experiment: "Experiment", model, shown: Dataset) -> dict[str, float]:
    setup, names = experiment.setup, experiment.setup.class_names
    if not experiment.config.model.classifier:
        return metrics.evaluate(training.predict(model, shown.images, device=setup.device), shown.labels, names)
    scores = training.class_scores(model, shown.images, device=setup.device)
    mixes = class_counts(setup, experiment.run.seed)[0] if len(experiment.clients) > 1 else None
    return metrics.accuracy(scores, shown.labels.classes[:, 0].cpu() - 1, names, mixes)
