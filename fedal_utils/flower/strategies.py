"""How the server makes one model of the updates: Flower's strategies by name, its clipping, its secure aggregation.

FedAvg is ours to the last bit: float64, clients in the order of their names. Of the others Flower's code runs
unmodified on replies that are made here. privacy='clip': Flower's wrapper adds noise to the average of clipped updates;
its seed is the run's, so whoever knows the seed can take the noise off again. privacy='secure': Flower's SecAgg+
(Bell et al. 2020, eprint 2020/704), so the server sees the sum and no single update; it still sees who took part,
counts and losses. Flower rounds at random, seeds a pair's mask with 28 bits of the key, and a client that is lost
before keys are shared ends the round for all. Both privacies weigh all clients alike: the sum shows no client's weight.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp import Grid, strategy

from ..config import Config
from ..federation import State, Update, unpack, weighted_states
from ..seeding import numpy_seeded
from .messages import arrays_of, size_of, state_of

PLAIN = ("fedavg", "fedprox")  # the proximal term is the clients'
ROBUST = ("fedtrimmedavg", "krum", "multikrum")  # they bear `num_byzantine` clients of at least twice as many and one
REMEMBERED = ("momentum_vector", "m_t", "v_t")  # by Flower's strategies between rounds
LEAST = 3  # clients of a secure round: of two, each knows the other's weights from the average


class Ordered(strategy.FedAvg):
    """FedAvg with the sum of `federation`: float64, in the order of the replies."""

    def aggregate_train(self, server_round: int, replies: Sequence[Message]) -> tuple[ArrayRecord, None]:
        counts = np.array([float(reply.content["counts"][self.weighted_by_key]) for reply in replies])
        sent = [(f"{place:09d}", state_of(reply.content["arrays"])) for place, reply in enumerate(replies)]
        return arrays_of(weighted_states(sent, counts / counts.sum())), None


def strategy_of(config: Config, clients: int) -> strategy.Strategy:
    """Flower's strategy of this name, for so many updates in a round."""
    server = config.server
    bad, lr, name = server.num_byzantine, server.server_lr, server.server_strategy
    if name in ROBUST and 2 * bad + 1 > clients:
        raise ValueError(f"{name!r} bears num_byzantine={bad} of {2 * bad + 1} clients or more, not of {clients}")
    kinds: dict[str, tuple[Callable[..., strategy.Strategy], dict[str, Any]]] = {
        **dict.fromkeys(PLAIN, (Ordered, {})),
        "fedavgm": (strategy.FedAvgM, {"server_learning_rate": lr or 1.0, "server_momentum": server.server_momentum}),
        "fedadam": (strategy.FedAdam, {"eta": lr or 0.01, "tau": 1e-3, "beta_1": server.server_momentum}),
        "fedyogi": (strategy.FedYogi, {"eta": lr or 0.01, "tau": 1e-3, "beta_1": server.server_momentum}),
        "fedadagrad": (strategy.FedAdagrad, {"eta": lr or 0.01, "tau": 1e-3}),
        "fedmedian": (strategy.FedMedian, {}),
        "fedtrimmedavg": (strategy.FedTrimmedAvg, {"beta": bad / clients + 1e-9}),
        "krum": (strategy.Krum, {"num_malicious_nodes": bad}),
        "multikrum": (strategy.MultiKrum, {"num_malicious_nodes": bad, "num_nodes_to_select": max(1, clients - bad)}),
    }
    kind, options = kinds[name]
    found = kind(fraction_train=0.0, weighted_by_key=config.federation.aggregation_weights, **options)
    if server.privacy == "clip":
        return strategy.DifferentialPrivacyClientSideFixedClipping(found, server.noise, server.clip_norm, clients)
    return found


def message_of(content: RecordDict, node: int, kind: str, ttl: float = 3600.0, id_: str = "") -> Message:
    """A server's message outside of a run of Flower's, where its own constructor does not work."""
    return Message(content, metadata=Metadata(1, id_, 1, node, "", "", time.time(), ttl, kind))


def average(
    config: Config, number: int, before: State, updates: Sequence[Update], kept: dict[str, State], seed: int | None
) -> State:
    """One model of these updates.

    number: of the round in the run, from 1.
    before: what the clients were sent.
    updates: in any order.
    kept: what the strategy remembers between rounds, by the names of `arrays_of`; read, and brought up to date.
    seed: of the noise under privacy='clip', whose standard deviation is noise * clip_norm / updates.
    """
    ordered, arrays = sorted(updates, key=lambda update: update.client), arrays_of(before)
    replies = []
    for place, update in enumerate(ordered, start=1):
        counts = MetricRecord({"images": update.images, "boxes": update.boxes, "equal": 1})
        content = RecordDict({"arrays": arrays_of(unpack(update.payload)), "counts": counts})
        replies.append(message_of(content, place, MessageType.TRAIN))
    with quietly(), numpy_seeded(seed):
        found = strategy_of(config, len(ordered))
        found.configure_train(number, arrays, ConfigRecord(), None)  # tells it the model; it samples nobody
        for name, state in kept.items():
            tensors = {key: state[key].numpy() for key in arrays}
            setattr(found, name, list(tensors.values()) if name == "momentum_vector" else tensors)
        merged, _ = found.aggregate_train(number, replies)
    for name in REMEMBERED:
        if (value := getattr(found, name, None)) is not None:
            named = value if isinstance(value, dict) else dict(zip(arrays, value, strict=True))
            kept[name] = {key: torch.from_numpy(np.array(part)) for key, part in named.items()}
    state = state_of(merged)
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise ValueError(f"{config.server.server_strategy!r} made weights that are not finite in round {number}")
    # A variance below 0 breaks the model; a server's step can lead there, or noise (which this costs no privacy).
    state = {key: value.clamp(min=0) if key.endswith("running_var") else value for key, value in state.items()}
    return {key: state[key].to(before[key].dtype) for key in before}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Flower's log below errors: a line for every step of a sum is no news."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class OneRound(LegacyFedAvg):
    """The two calls that Flower's SecAgg+ workflow makes of a strategy: what each node is told, and what came of it."""

    def __init__(self, vector: np.ndarray, configs: Mapping[int, dict[str, Any]]):
        super().__init__()
        self.vector, self.configs, self.average, self.metrics = vector, configs, None, {}

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[tuple[Any, FitIns]]:
        told = ndarrays_to_parameters([self.vector])
        return [(SimpleNamespace(node_id=node), FitIns(told, config)) for node, config in self.configs.items()]

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[None, dict[str, Any]]:
        self.metrics = {proxy.node_id: dict(result.metrics) for proxy, result in results}
        self.average = parameters_to_ndarrays(results[0][1].parameters)[0]  # the workflow puts it into each result
        return None, {}


def secure_round(
    grid: Grid, configs: Mapping[int, dict[str, Any]], before: State, timeout: float
) -> tuple[State, dict[int, dict[str, Any]]]:
    """Have these nodes train, and average what they send by Flower's SecAgg+: the average, and metrics by node.

    Both are empty if too few stayed. A value of an update beyond 8 is cut, the rest is rounded to steps of 2^-18. The
    metrics have the bytes of the node's largest message as well.
    """
    ((layout, array),) = arrays_of(before).items()
    sizes: dict[int, int] = {}

    def send_and_receive(messages: Sequence[Message], *, timeout: float | None = None) -> list[Message]:
        replies = list(grid.send_and_receive(messages, timeout=timeout))
        for reply in replies:
            if reply.has_content():
                node = reply.metadata.src_node_id
                sizes[node] = max(sizes.get(node, 0), size_of(reply.content))
        return replies

    found = OneRound(array.numpy(), {node: {**config, "layout": layout} for node, config in configs.items()})
    records = {"config": ConfigRecord({"current_round": 0}), "parameters": ArrayRecord()}  # what the workflow reads
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(records), run_config={})
    manager = SimpleNamespace(num_available=lambda: len(configs))
    workflow = SecAggPlusWorkflow(1.0, len(configs) // 2 + 1, max_weight=1.0, timeout=timeout)
    with quietly(), contextlib.suppress(Exception):  # whatever a client's nonsense makes of Flower's arithmetic
        line = SimpleNamespace(send_and_receive=send_and_receive)
        workflow(line, LegacyContext(context, strategy=found, client_manager=manager))
    if found.average is None or found.average.shape != array.numpy().shape or not np.isfinite(found.average).all():
        return {}, {}
    parts = torch.from_numpy(found.average).split([value.numel() for value in before.values()])
    moved = zip(before.items(), parts, strict=True)
    state = {name: (value.double() + part.reshape(value.shape)).to(value.dtype) for (name, value), part in moved}
    return state, {node: {**told, "bytes": sizes[node]} for node, told in found.metrics.items()}


def refuse(config: Config, scheme: str, method: str) -> None:
    """ValueError on a way of averaging, or a privacy, that cannot be had."""
    server, federation = config.server, config.federation
    privacy, named = server.privacy, server.server_strategy not in PLAIN
    asked = max(1, round(federation.client_fraction * federation.clients))
    wrong = {
        f"noise={server.noise} is added to clipped updates: set privacy='clip'": server.noise and privacy != "clip",
        "server_strategy and privacy are of an average: fedavg": (named or privacy != "none") and scheme != "fedavg",
    }
    if privacy != "none":
        wrong |= {
            f"privacy={privacy!r} is of a plain average: server_strategy is fedavg or fedprox": named,
            f"privacy={privacy!r} needs aggregation_weights='equal'": federation.aggregation_weights != "equal",
            f"privacy={privacy!r} needs message_dtype='fp32'": federation.message_dtype != "fp32",
            f"privacy={privacy!r}: an optimizer state that travels tells it": federation.optimizer_state == "travels",
            f"privacy={privacy!r} needs max_update_ratio=0": server.max_update_ratio,
            f"a secure sum is of {LEAST} clients or more": privacy == "secure" and asked < LEAST,
        }
    if reasons := [reason for reason, holds in wrong.items() if holds]:
        raise ValueError(f"method {method!r}: {reasons[0]}")
