"""Schemes: who participates in a round, who queries, what is trained and sent, and how updates become the next model.

    fedavg        query with the global model, train, average, each round
    local-first   each client queries and trains alone until all labels are there; then as fedavg
    chain         the model visits one client after another, each queries everything at its first visit; the models of
                  the first pass are merged class by class; later passes train the head only
    chain-fedavg  the chain's first pass and merge, then rounds of fedavg that train the head only
    accumulate    the chain's first pass and merge, then short visits in which all of the model is trained and the
                  optimizer state is sent along (AccFL-Batch; its inner loop is not published: *reconstructed*)
    centralised   the labels that another method queried, "centralised+chain+sum", on one node

All from van Bommel's released code (Univ. of Twente, 2021), unless marked *reconstructed*.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .. import record, sampling
from ..config import Config
from ..sampling import Strategy
from .client import Client, Update

if TYPE_CHECKING:
    from .experiment import Experiment

CENTRALISED = "centralised"


@dataclass(frozen=True)
class Step:
    """One round: who acts, and how."""

    cycle: int
    round: int
    participants: tuple[Client, ...] = ()  # one in a chain, nobody in its merge, else all; sampling comes later
    querying: tuple[Client, ...] = ()  # they query before they train
    last: bool = False  # of its cycle
    evaluate: bool = False
    local: bool = False  # each participant goes on from its own weights, nothing is averaged
    merge_by_class: bool = False
    first_pass: bool = False  # a visit of the chain's first pass
    handed_on: bool = False  # the model goes to the next visitor, not to the server
    length: float = 1.0  # training as long as so many rounds
    schedule_rounds: int = 1  # such steps in one schedule, where the optimizer state lives on
    head_only: bool = False  # the head alone is trained and sent back
    send_backbone: bool = True  # to a client that has not received the merged one yet, even if it trains the head
    optimizer_state: str = "restart"  # as `FederationConfig.optimizer_state`
    lr_factor: float = 1.0  # on the learning rate

    def __str__(self) -> str:
        return f"cycle {self.cycle}, round {self.round}"


class FedAvg:
    """All clients train side by side and are averaged in each round; the other schemes say where they differ."""

    name = "fedavg"
    central = False  # trained on one node
    queries_at_once = False  # all labels in one query

    def plan(self, config: Config) -> list[tuple[int, int]]:
        return record.every_round(config)

    def step(self, config: Config, clients: Sequence[Client], cycle: int, number: int) -> Step:
        """Who acts in this round, and how."""
        plan, every = self.plan(config), config.evaluate_every
        rounds = sum(one == cycle for one, _ in plan)  # of this cycle
        last = number + 1 == rounds
        return Step(
            *(cycle, number, tuple(clients)),
            querying=tuple(clients) if number == 0 else (),
            last=last,
            evaluate=last or every > 0 and (number + 1) % every == 0,
            schedule_rounds=len(plan),
            optimizer_state=config.federation.optimizer_state,
            lr_factor=_falling(config, number, rounds),
        )

    def aggregate(self, experiment: "Experiment", step: Step, updates: Sequence[Update]) -> None:
        """The updates become the next global model."""
        experiment.average(updates)


class LocalFirst(FedAvg):
    """Each client alone in all cycles but the last (released code: 21 of 22)."""

    name = "local-first"

    def step(self, config: Config, clients: Sequence[Client], cycle: int, number: int) -> Step:
        return replace(super().step(config, clients, cycle, number), local=cycle < config.query.cycles - 1)

    def aggregate(self, experiment: "Experiment", step: Step, updates: Sequence[Update]) -> None:
        if not step.local:
            experiment.average(updates)
            merged = {update.client for update in updates}
            for client in experiment.clients:  # who sent nothing goes on alone until it does
                client.local_state = {} if client.name in merged else client.local_state


class Centralised(FedAvg):
    """One node with everyone's labels, and as many gradient steps as the clients take together."""

    name, central = CENTRALISED, True


class Chain(FedAvg):
    """The model visits one client after another; the first pass is merged class by class, later ones train the head."""

    name, queries_at_once = "chain", True
    together = False  # after the merge: all clients in a round, else a visit each
    head_only = True  # after the merge; else short visits that train all, and the optimizer state is sent along

    def plan(self, config: Config) -> list[tuple[int, int]]:
        """One cycle: `clients` visits of the first pass, the merge, then the later passes."""
        count = config.federation.clients
        visits = self.later_passes(config) * (1 if self.together else count)
        return [(0, number) for number in range(count + 1 + visits)]

    def later_passes(self, config: Config) -> int:
        """Passes after the first: as many as the config says, or as give every client as many steps as fedavg does."""
        rounds, settings = len(record.every_round(config)), config.federation
        passes = settings.chain_passes or rounds - settings.first_pass_rounds
        if passes < 1:
            raise ValueError(
                f"first_pass_rounds={settings.first_pass_rounds} leaves none of the {rounds} rounds (cycles x rounds + "
                "extra_rounds) for the chain's later passes: lower first_pass_rounds, or give chain_passes"
            )
        if self.head_only:
            return passes
        whole, part = settings.iterations, settings.visit_fraction
        part = max(1, round(whole * part)) / whole if whole else part
        return max(1, round(passes / part))  # more and shorter ones: nearest to the same number of gradient steps

    def step(self, config: Config, clients: Sequence[Client], cycle: int, number: int) -> Step:
        count, last, settings = len(clients), number + 1 == len(self.plan(config)), config.federation
        if number < count:
            visitor, length = (clients[number],), settings.first_pass_rounds
            return Step(cycle, number, visitor, visitor, evaluate=True, first_pass=True, length=length)
        if number == count:
            return Step(cycle, number, evaluate=True, merge_by_class=True)
        done, passes = number - count - 1, self.later_passes(config)
        here, turns = (tuple(clients), 1) if self.together else ((clients[done % count],), count)
        state = settings.optimizer_state if self.head_only else "travels"
        return Step(
            *(cycle, number, here),
            last=last,
            evaluate=last or here[-1] is clients[-1],
            handed_on=not (last or self.together),  # the last of all hands the result in
            length=1.0 if self.head_only else settings.visit_fraction,
            schedule_rounds=passes * (turns if state == "travels" else 1),
            head_only=self.head_only,
            send_backbone=not self.head_only or done < turns,  # each client receives the merged one once
            optimizer_state=state,
            lr_factor=_falling(config, done // turns, passes),
        )

    def aggregate(self, experiment: "Experiment", step: Step, updates: Sequence[Update]) -> None:
        if step.merge_by_class:
            return experiment.merge_by_class()
        experiment.average(updates)  # of one visitor: its own weights go on


class ChainThenFedAvg(Chain):
    """After the merge: rounds of all clients that train the head only."""

    name, together = "chain-fedavg", True


class AccumulatingChain(Chain):
    """After the merge: short visits in which the whole model is trained, with the optimizer state sent along."""

    name, head_only = "accumulate", False


_CLASSES = (FedAvg, LocalFirst, Chain, ChainThenFedAvg, AccumulatingChain, Centralised)
SCHEMES = {scheme.name: scheme() for scheme in _CLASSES}


@dataclass(frozen=True)
class Method:
    """A scheme and a query strategy. labels_of: the centralised reference gets the labels that this method queried."""

    scheme: FedAvg
    strategy: Strategy
    labels_of: str = ""


def method_of(name: str, config: Config) -> Method:
    """The method of this name: "sum" is fedavg, "chain+sum" the chain, "centralised" has random labels of its own."""
    scheme, plus, rest = name.partition("+")
    if name == CENTRALISED:
        rest = "random"
    elif not plus:
        scheme, rest = "fedavg", name
    if scheme not in SCHEMES:
        raise ValueError(f"method {name!r}: scheme {scheme!r} is unknown, write one of {', '.join(SCHEMES)} before '+'")
    labels_of = rest if scheme == CENTRALISED and rest != "random" else ""
    if labels_of:
        method_of(labels_of, config)
    strategy = sampling.find("random" if labels_of else rest, sampling.kind_of(config))
    reason = strategy.refusal(config)
    if scheme != "fedavg" and config.model.classifier:
        reason = f"classifiers run under fedavg: write {strategy.name!r}"
    elif scheme != "fedavg" and strategy.compares_local():
        reason = f"strategy {strategy.name!r} compares clients with the global model, which {scheme} has none of"
    if reason:
        raise ValueError(f"method {name!r} cannot run here: {reason}")
    return Method(SCHEMES[scheme], strategy, labels_of)


def plan(config: Config, method: str) -> list[tuple[int, int]]:
    """(cycle, round) of every round of a method, for `record.runs`."""
    return method_of(method, config).scheme.plan(config)


def _falling(config: Config, done: int, whole: int) -> float:
    """1 in the first of `whole` steps, `round_lr_decay` in the last, evenly in between."""
    return 1.0 if whole == 1 else 1 + (config.federation.round_lr_decay - 1) * done / (whole - 1)
