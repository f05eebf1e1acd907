"""The loop of every notebook: read this file first.

for run in federation.runs(setup, NOTEBOOK):        # finished runs are skipped, a broken one resumes
    experiment = federation.start(run, setup)       # partition, initial labels, the shared initial model
    for step in experiment.steps():                 # step.cycle, step.round, step.participants
        for client in step.querying:
            experiment.query(step, client)          # observe, score, select; the Oracle annotates, counts the cost
        updates = experiment.train(step)            # each participant on its own labels
        experiment.aggregate(step, updates)         # FedAvg, chain hop, class-wise merge: the scheme's business
        experiment.log(step, updates)               # evaluate, count labels and bytes, save the resume point
"""

from collections.abc import Iterator, Sequence

import numpy as np

from .. import detectors, record
from ..config import Config, TrainingConfig
from ..sampling import Oracle, Pool, Unanswered, total
from . import aggregate as merging
from . import query as querying
from .client import KEPT, Client, ClientLost, State, Update, broadcast, pack, state_of, unpack
from .local import ap_by_class, evaluate, initial_model, train_here, train_on_one_node
from .schemes import Step, method_of, plan
from .setup import Setup, partition_clients


def runs(setup: Setup, notebook: str, config: Config | None = None, **options) -> Iterator[record.Run]:
    """The runs that are not finished; config: a variant of the setup's own; options: methods, seeds, root."""
    config = config or setup.config
    for method in options.get("methods") or config.methods:
        method_of(method, config)  # refused before the first run starts
    changes = {k: v for k, (v, _) in config.differences(setup.config).items() if k not in ("methods", "seeds")}
    arm = ", ".join(f"{name} {value}" for name, value in changes.items())
    return record.runs(config, notebook, plan=plan, fingerprint=setup.fingerprint, arm=arm, **options)


def start(run: record.Run, setup: Setup, oracle: Oracle | None = None) -> "Experiment":
    """An experiment, fresh or where a broken run stopped; oracle: who annotates, in the place of the known labels."""
    if setup.train.labels is None:
        told = "notebook 05_your_own_images names what to label first"
        raise ValueError(f"data set {setup.train.name!r} has no labels, and nobody can annotate it: {told}")
    query = run.config.query
    costs = query.seconds_per_image, query.seconds_per_box
    oracle = oracle or Oracle(setup.train.labels, *costs, query.diagnostic, setup.train.labelled)
    clients = []
    for part, name in zip(*partition_clients(setup, run.seed), strict=True):
        pool = Pool(name, setup.train.images, oracle, part)
        if run.resumed is not None:
            pool.replay(run.query_rows())
            pool.exclude(oracle.undecided({cycle for cycle, _ in run.plan[: run.committed]}))
        clients.append(Client(name, pool))
    return Experiment(run, setup, clients, oracle)


class Experiment:
    """One run: clients, global model, and the verbs of the loop. Flower's server overrides `query`, `train_clients`."""

    def __init__(self, run: record.Run, setup: Setup, clients: Sequence[Client], oracle: Oracle | None = None):
        self.run, self.setup, self.config, self.clients, self.oracle = run, setup, run.config, list(clients), oracle
        self.method = method_of(run.method, run.config)
        self.local_only: dict[tuple[int, str], State] = {}  # by cycle and client, see `ClientModels.local_only`
        model = detectors.build(self.config, len(setup.class_names) or 1, run.torch_rng("weights"))
        known = {"model": initial_model(run, setup)} if run.resumed is None else run.resumed
        model.load_state_dict(known["model"], strict=False)
        self.model = model.to(setup.device)
        for client in self.clients:
            for what in KEPT:
                getattr(client, what).update(known.get(what, {}).get(client.name, {}))

    def steps(self) -> Iterator[Step]:
        """The rounds that are not on disk yet, in order."""
        for cycle, number in self.run.rounds():
            yield self.method.scheme.step(self.config, self.clients, cycle, number)

    def advance(self) -> Iterator[Step]:
        """The loop above where nobody needs to see it; yields each step once it is logged."""
        for step in self.steps():
            for client in step.querying:
                self.query(step, client)
            updates = self.train(step)
            self.aggregate(step, updates)
            self.log(step, updates)
            yield step

    def query(self, step: Step, client: Client) -> None:
        """Observe the client's unlabelled images, select, and have the Oracle annotate them.

        Of a set that is labelled in part, each client begins with all the labels that are there.
        """
        if method := self.method.labels_of:  # the reference queries what that method queried, in the same cycles
            run = self.run
            if record.missing(run.config, run.notebook, [method], [run.seed], run.root, run.fingerprint):
                raise ValueError(f"{run} gets the labels of method {method!r}: run that first, put it before this one")
            rows = record.queries(run.config, run.notebook, run.root, [method], [run.seed], run.fingerprint)
            return client.pool.replay(rows[rows["cycle"] == step.cycle].to_dict("records"))
        if step.cycle == 0 and self.setup.train.labelled is not None:
            positions, scores = np.flatnonzero(self.setup.train.known[client.pool.index]), None
        else:
            positions, scores = querying.select(self, step, client)
        if len(positions):
            client.pool.label(positions, step.cycle, scores)

    def waiting(self) -> list[dict]:
        """What the clients queried and nobody has labelled yet: rows of client, id and score, as they were selected."""
        scores, found = getattr(self.oracle, "waiting", {}), []
        for client in self.clients if scores else ():
            ids = dict(zip(client.pool.index.tolist(), client.pool.ids, strict=True))
            found += [{"client": client.name, "id": ids[row], "score": scores[row]} for row in scores if row in ids]
        return found

    def train(self, step: Step) -> list[Update]:
        """Each participant trains from the global model (or its own), on its own labels.

        The `status` of a client that sends nothing says why. With on_failure='stop' a lost one ends the run.
        `Unanswered`, with all that the clients queried, where labels are not known: it goes on once they are there.
        """
        if waiting := self.waiting():
            told = "label them, then run the same again (notebook 05_your_own_images shows them)"
            raise Unanswered(f"{self.run}: {len(waiting)} images wait for labels: {told}", waiting)
        if self.config.federation.reset_each_cycle and step.cycle > 0 and step.round == 0:
            self._remember_global(self.clients)
            self.model.load_state_dict(initial_model(self.run, self.setup), strict=False)
            for client in self.clients:
                client.optimizer_state, client.local_state = {}, {}
        if self.method.scheme.central:
            return [train_on_one_node(self, step)]
        if not step.participants:
            return []
        if step.head_only:
            self.model.freeze_backbone(self.config.model.frozen or not step.send_backbone)
        message = broadcast(self.model, self.config.federation.message_dtype)
        if step.head_only:
            self.model.freeze_backbone()  # it is neither trained nor sent back
        here, lost = self._participants(step, message)
        return self._accepted(step, lost | self.train_clients(step, here, message), message)

    def train_clients(self, step: Step, clients: Sequence[Client], message: bytes) -> dict[str, Update | Exception]:
        """What each of these clients sends, by name, or why it sends nothing."""
        return train_here(self, step, clients, message)

    def recipe(self, step: Step) -> tuple[TrainingConfig, int | None]:
        """How a participant trains in this step, and for how many gradient steps (None: in epochs)."""
        recipe, settings = self.config.training, self.config.federation
        recipe = recipe.replace(lr=recipe.lr * step.lr_factor, epochs=max(1, round(recipe.epochs * step.length)))
        if step.first_pass and recipe.schedule == "constant" and settings.round_lr_decay < 1:
            # one long call in the place of many rounds: the learning rate falls within it
            recipe = recipe.replace(schedule="cosine", final_lr=settings.round_lr_decay)
        return recipe, max(1, round(settings.iterations * step.length)) if settings.iterations else None

    def _participants(self, step: Step, message: bytes) -> tuple[list[Client], dict[str, Update | Exception]]:
        """Who trains in this round, and who would have but its update is lost."""
        settings, rng = self.config.federation, self.run.rng("take part", step.cycle, step.round)
        names = merging.sample_clients([c.name for c in step.participants], settings.client_fraction, rng)
        everyone = self.config.model.classifier and self.config.as_released and step.last  # in a cycle's last round
        here, lost = [], {}
        for client in step.participants:
            if client.name not in names and not everyone:
                continue
            if len(client.pool.labelled()) == 0:
                client.status = "no labels"
                continue
            if not client.local_state:
                along = step.optimizer_state == "travels" and client.optimizer_state
                client.bytes_down += len(message) + (len(pack(client.optimizer_state)) if along else 0)
            rng, dropout = self.run.rng("lost", client.name, step.cycle, step.round), settings.dropout_rate
            if not step.local and rng.random() < dropout:
                lost[client.name] = ClientLost(f"client {client.name}: its update did not arrive in {step}")
            else:
                here.append(client)
        return here, lost

    def _accepted(self, step: Step, sent: dict[str, Update | Exception], message: bytes) -> list[Update]:
        """The updates that may be averaged; notes at each client why it has none, or its local model."""
        if ratio := self.config.federation.max_update_ratio:
            arrived = [update for update in sent.values() if isinstance(update, Update)]
            for name in merging.too_large(arrived, unpack(message), ratio):
                sent[name] = ClientLost(f"client {name}: its update is too large in {step}", "too large")
        updates = []
        for client in step.participants:
            result = sent.get(client.name)
            if isinstance(result, Exception):
                if self.config.federation.on_failure == "stop":
                    raise type(result)(f"{result}; on_failure='skip' goes on without it") from result
                client.status = getattr(result, "status", "diverged")
            elif result is not None:
                updates.append(result)
                if step.first_pass or step.local:
                    client.local_state = unpack(result.payload)
                if self.method.strategy.compares_local():
                    client.last_local_state = unpack(result.payload)
        return updates

    def aggregate(self, step: Step, updates: Sequence[Update]) -> None:
        """The updates become the next model, as the scheme says; without any it stays as it was."""
        self.method.scheme.aggregate(self, step, updates)

    def average(self, updates: Sequence[Update]) -> None:
        """The global model becomes the updates' average, as do optimizer states that came along."""
        if not updates:
            return
        weights = self.config.federation.aggregation_weights
        percent = self.config.as_released and not self.config.model.classifier  # whatever the clients hold
        merged = {update.client for update in updates}
        self._remember_global([client for client in self.clients if client.name not in merged])
        self.model.load_state_dict(merging.average(updates, "percent" if percent else weights), strict=False)
        sent_along = merging.average_optimizer_states(updates, weights)
        for client in self.clients:
            if client.name in merged:
                client.stale_global_state = {}
            if sent_along:
                client.optimizer_state = dict(sent_along)

    def merge_by_class(self) -> None:
        """The chain's merge: each class votes for the client whose model detects it best (van Bommel, 7.2)."""
        sent = [client for client in self.clients if client.local_state]
        if not sent:
            raise ValueError(f"{self.run}: no client came through the chain's first pass: there is nothing to merge")
        parts = merging.class_wise_shares(ap_by_class(self, sent))
        merged = merging.weighted_states([(client.name, client.local_state) for client in sent], parts)
        self.model.load_state_dict(merged, strict=False)
        for client in sent:
            client.local_state = {}

    def _remember_global(self, clients: Sequence[Client]) -> None:
        """These clients miss what comes next: the global model that they know is this one, or an older one."""
        if self.config.model.classifier or self.method.strategy.compares_local():
            for client in clients:
                client.stale_global_state = client.stale_global_state or state_of(self.model)

    def log(self, step: Step, updates: Sequence[Update], more: dict | None = None) -> dict:
        """Evaluate where the step says so, write rows, save the resume point (and `more`); the server's row."""
        by_name, trained, others, bytes_up, bytes_down = {update.client: update for update in updates}, [], [], 0, 0
        alone = self.method.scheme.central or len(self.clients) == 1  # one node sends nothing
        silent = alone or step.local or step.handed_on  # a hop of a chain counts where it arrives
        for client in self.clients:
            update = by_name.get(client.name)
            up = 0 if update is None or silent else update.bytes
            row = {"client": client.name, **vars(client.pool.cost())}
            row |= {"bytes_up": up, "bytes_down": 0 if alone else client.bytes_down}
            if update is not None:
                trained.append({**row, "loss": update.loss, "steps": update.steps})
            elif client.status:
                others.append({**row, "steps": 0, "status": client.status})
            bytes_up, bytes_down = bytes_up + up, bytes_down + row["bytes_down"]
            client.status, client.bytes_down = "", 0
        server = {
            **{"client": "server", **vars(total(client.pool.cost() for client in self.clients))},
            **{"bytes_up": bytes_up, "bytes_down": bytes_down, "steps": sum(update.steps for update in updates)},
            "loss": float(np.mean([update.loss for update in updates])) if updates else None,
            **(evaluate(self, step) if step.evaluate else {}),
        }
        queries = [row for client in step.querying for row in client.pool.queries(step.cycle)]
        keys = self.model.exchanged() if self.config.model.frozen else list(self.model.state_dict())
        state = {
            "model": state_of(self.model, keys),
            **{what: {c.name: getattr(c, what) for c in self.clients if getattr(c, what)} for what in KEPT},
            **(more or {}),
        }
        self.run.commit(step.cycle, step.round, [*trained, *others, server], queries, state)
        return server
