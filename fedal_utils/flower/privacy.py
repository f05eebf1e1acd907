"""Secure aggregation, a grid in this process, and what differential privacy costs: the rest of what is Flower's own.

SecAgg (Bonawitz et al. 2017, eprint 2017/281; SecAgg+: Bell et al. 2020, eprint 2020/704): clients add masks to their
weighted updates, pair by pair the same with opposite signs, and the sum is all that can be read. Flower 1.41 has it
behind an older interface; `secure_round` at the server and `secure_aggregation_mod` at the client carry it over to
messages of {"arrays": ArrayRecord, "task": ConfigRecord}, answered by {"arrays": ArrayRecord, "counts": MetricRecord}.

What the server still learns of a single client: who it is and when it dropped out, its task, all its counts (images,
boxes, steps, loss), and how near its largest value came to the clipping range. Clients learn the average of the others:
where two are left of a round, each knows the other's weights. Public keys travel through the server and are not signed,
so that all this holds against a server that keeps to the protocol and is curious, never against one that plays a
client's part itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.server.compat import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from ..seeding import numpy_seeded

REQUIRED = "require-secure-aggregation"  # in a node's configuration: true refuses to send weights without masks
LEAST = 3  # of two clients, each knows the other's weights from the average
PAUSE = 0.3  # seconds between two looks for answers
_OURS = "secagg."  # how the adapter's own entries begin in the task that travels
_REPORT = "secagg"  # the record of its own in an answer


# --- masks ------------------------------------------------------------------------------------------------------------


def strong_masks(seed: bytes, num_range: int, dimensions_list: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Masks of these shapes in [0, num_range), num_range a power of two up to 2^32, from all bits of the seed.

    Flower 1.41 folds a pair's key to 28 bits of seed for a Mersenne twister, so that whoever holds a masked update can
    try all 2^28 seeds of a pair in 12 to 70 core hours of NumPy. This is AES in counter mode under the SHA-256 of the
    whole key: the same average to the last bit, in the same time.
    """
    size = sum(math.prod(shape) for shape in dimensions_list)
    cipher = Cipher(algorithms.AES(hashlib.sha256(seed).digest()), modes.CTR(bytes(16))).encryptor()
    flat = np.frombuffer(cipher.update(bytes(4 * size)), "<u4").astype(np.int64) & (num_range - 1)
    ends = np.cumsum([math.prod(shape) for shape in dimensions_list])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), dimensions_list, strict=True)]


def use_strong_masks() -> None:
    """Put `strong_masks` into both sides of Flower's SecAgg+: done once, where this module is imported."""
    for side in (secaggplus_mod, SecAggPlusWorkflow):
        module = sys.modules[side.__module__]
        if not hasattr(module, "pseudo_rand_gen"):
            raise ImportError(f"{module.__name__} draws its masks in another way: this is for Flower 1.41")
        module.pseudo_rand_gen = strong_masks


def _masks_of(side: Callable) -> str:
    return sys.modules[side.__module__].pseudo_rand_gen.__name__


use_strong_masks()


# --- a client ---------------------------------------------------------------------------------------------------------


class SecureAggregationError(RuntimeError):
    """A secure round without an average, or a client's part that cannot be masked.

    failures: by node, as in `SecureResult`.
    """

    def __init__(self, message: str, failures: Mapping[int, tuple[str, str]] | None = None):
        self.failures = dict(failures or {})
        super().__init__("; ".join([message, *(f"node {node}: {why}" for node, (_, why) in self.failures.items())]))


class _NoWeights(Exception):
    """The handler's answer carries nothing to mask: it goes out as it is."""

    def __init__(self, reply: Message):
        super().__init__()
        self.reply = reply


def secure_aggregation_mod(message: Message, context: Context, call_next: Callable) -> Message:
    """Flower's SecAgg+ around a train handler; a plain request passes, unless the node's configuration forbids it.

    For the handler, `@app.train(mods=[secure_aggregation_mod, ...])`, first of its mods: the others see plain messages.
    The node says require-secure-aggregation=true to refuse every other training. Updates that are not finite or of
    another shape are not masked: the answer has a record "said" with status and why, as a handler's own refusal has.
    """
    if RECORD_KEY_CONFIGS not in message.content.config_records:
        if context.node_config.get(REQUIRED, False):
            reason = "this node sends weights by secure aggregation only"
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)
        return call_next(message, context)
    with contextlib.ExitStack() as rounding:

        def train(request: Message, context: Context) -> Message:
            reply, seed = _prepared(request, context, call_next)
            rounding.enter_context(numpy_seeded(seed))  # Flower rounds once this has returned
            return reply

        try:
            return secaggplus_mod(message, context, train)
        except _NoWeights as instead:
            return instead.reply


def _prepared(message: Message, context: Context, call_next: Callable) -> tuple[Message, int | None]:
    """The handler's answer to the plain form of this request, as a legacy result of one float64 vector (trained minus
    sent); and the seed of its rounding.

    One vector, for Flower brings 0-d tensors back wrong; float64, for it rounds in the precision that it is given.
    """
    task = dict(message.content.config_records["fitins.config"])
    ours = {key.removeprefix(_OURS): task.pop(key) for key in list(task) if key.startswith(_OURS)}
    if ours["masks"] != _masks_of(secaggplus_mod):
        raise SecureAggregationError(f"the server makes masks by {ours['masks']}, not by {_masks_of(secaggplus_mod)}")
    tensors = message.content.array_records["fitins.parameters"].values()
    sent = {key: array.numpy() for key, array in zip(ours["keys"], tensors, strict=True)}
    arrays = ArrayRecord({key: Array(value) for key, value in sent.items()})
    message.content = RecordDict({"arrays": arrays, "task": ConfigRecord(task)})
    reply = call_next(message, context)
    if reply.has_error() or "arrays" not in reply.content:
        raise _NoWeights(reply)
    trained, counts = reply.content["arrays"], reply.content["counts"]
    if {key: array.numpy().shape for key, array in trained.items()} != {key: old.shape for key, old in sent.items()}:
        raise _NoWeights(_said(message, "wrong shape", "trained arrays differ from those sent, in names or shapes"))
    flat = np.concatenate([(trained[key].numpy().astype(np.float64) - old).ravel() for key, old in sent.items()])
    if not np.isfinite(flat).all():
        raise _NoWeights(_said(message, "not finite", "trained weights are not finite"))
    limits = context.state.config_records[RECORD_KEY_STATE]
    most, reach = cast(float, limits[Key.MAX_WEIGHT]), cast(float, limits[Key.CLIPPING_RANGE])
    weight = cast(int, counts[ours["weight"]]) if ours["weight"] else 1
    if not 0 <= weight <= most:
        raise SecureAggregationError(f"the weight must be in [0, max_weight = {most:g}], got {weight}")
    scaled = np.abs(flat) * (weight / most)
    content = fitres_to_recorddict(
        FitRes(Status(Code.OK, ""), ndarrays_to_parameters([flat]), weight, {}), keep_input=False
    )
    content["counts"] = counts
    content[_REPORT] = MetricRecord(
        {"cut": int(np.count_nonzero(scaled > reach)), "reach": float(scaled.max(initial=0.0) / reach)}
    )
    return Message(content, reply_to=message), cast("int | None", ours.get("seed"))


def _said(message: Message, status: str, why: str) -> Message:
    return Message(RecordDict({"said": ConfigRecord({"status": status, "why": why})}), reply_to=message)


# --- the server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SecureResult:
    """What a secure round gives, and what the server learnt of single nodes.

    arrays: the weighted average, of the names, shapes and precision that were sent. By node: counts, of those in the
    average; failures, (status, why) as `flower.Line` has them: who failed in the last exchange is in the average all
    the same; cut: how many values were outside the clipping range; sizes: bytes of the masked update.
    """

    arrays: ArrayRecord
    counts: dict[int, MetricRecord]
    failures: dict[int, tuple[str, str]]
    cut: dict[int, int]
    sizes: dict[int, int]

    @property
    def clients(self) -> int:
        """Number of clients in the average."""
        return len(self.counts)


def secure_round(
    grid: Grid,
    node_ids: Sequence[int],
    arrays: ArrayRecord,
    task_for: Callable[[int], ConfigRecord],
    timeout: float | None,
    *,
    weight: str | None = "images",
    max_weight: float = 1000.0,
    clipping_range: float = 8.0,
    levels: int | None = None,
    threshold: int | None = None,
    least: int = LEAST,
    seed: int | None = None,
) -> SecureResult:
    """Have these nodes train, and average what they send by SecAgg+. SecureAggregationError if too few stay.

    timeout: seconds for each of the four exchanges; training falls into the third. weight: the count by which the
    average is weighted, at most max_weight at a node; None = all alike. A value v of an update is cut where |v| *
    weight / max_weight > clipping_range. levels: integers for a value; None = the most that cannot overflow. threshold:
    nodes that have to stay to the end; None = a majority. least: nodes that have to be asked. seed: fixes the random
    rounding, and with it the average to the last bit, whatever the keys are; by the order of node_ids.

    Where nothing is cut and all values are within clipping_range, the average is off by at most `rounding_error` and
    the last rounding to the precision that was sent.
    """
    nodes = list(dict.fromkeys(node_ids))
    if len(nodes) < max(least, 2):
        raise SecureAggregationError(f"secure aggregation needs {max(least, 2)} clients, {len(nodes)} can be asked")
    ours: dict[str, Any] = {"keys": list(arrays), "weight": weight or "", "masks": _masks_of(SecAggPlusWorkflow)}
    strategy, witness = _OneRound(nodes, arrays, task_for, ours, seed), _Witness(grid)
    state = {MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: 0}), MAIN_PARAMS_RECORD: ArrayRecord()}
    base = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(state), run_config={})
    manager = SimpleNamespace(num_available=lambda: len(nodes))
    workflow = _Workflow(
        num_shares=1.0,
        reconstruction_threshold=threshold or len(nodes) // 2 + 1,
        max_weight=float(max_weight) if weight else 1.0,
        clipping_range=float(clipping_range),  # an integer is refused by every client
        quantization_range=levels or most_levels(len(nodes)),
        timeout=timeout,
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # all weights zero: said below
        workflow(
            cast(Grid, witness), LegacyContext(base, strategy=cast(Any, strategy), client_manager=cast(Any, manager))
        )
    if strategy.average is None:
        raise SecureAggregationError(f"too few of {len(nodes)} clients are left for an average", witness.failures)
    if not np.isfinite(strategy.average).all():
        raise SecureAggregationError("the weights of all clients are zero", witness.failures)
    merged, start = {}, 0
    for key, array in arrays.items():
        old = array.numpy()
        moved = strategy.average[start : start + old.size].reshape(old.shape)
        merged[key] = Array(np.asarray(moved + old).astype(old.dtype))
        start += old.size
    cut = {node: cast(int, report["cut"]) for node, report in witness.reports.items()}
    return SecureResult(ArrayRecord(merged), witness.counts, dict(sorted(witness.failures.items())), cut, witness.sizes)


def most_levels(clients: int) -> int:
    """Integers for a value so that the sum of so many clients stays below 2^32; Flower rounds through int32."""
    return 2 ** min(30, int(math.log2((2**32 - 1) / clients)))


def rounding_error(
    weights: Sequence[float], max_weight: float = 1.0, clipping_range: float = 8.0, levels: int | None = None
) -> float:
    """The most that random rounding of M clients' values can move their average: 3 * M * clipping_range / (levels * W).

    W: the sum of weights / max_weight. Each value is off by less than one level, which is 2 * clipping_range / levels,
    and each weight by half a level of one: of values within clipping_range the latter makes another clipping_range /
    levels. weights: of the clients in the average; all alike: ones, and max_weight 1.
    """
    levels = levels or most_levels(len(weights))
    return 3 * len(weights) * clipping_range / levels / (math.fsum(weights) / max_weight)


@dataclass
class _OneRound:
    """The two calls that SecAggPlusWorkflow makes of a strategy."""

    nodes: list[int]
    arrays: ArrayRecord
    task_for: Callable[[int], ConfigRecord]
    ours: dict[str, Any]
    seed: int | None
    average: np.ndarray | None = None

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: object) -> list[Any]:
        """Instructions by node: all the same tensors, each its own task."""
        tensors = Parameters([array.data for array in self.arrays.values()], "numpy.ndarray")
        ours = {_OURS + key: value for key, value in self.ours.items()}
        plan = []
        for place, node in enumerate(self.nodes):
            seed = {} if self.seed is None else {f"{_OURS}seed": (self.seed + place) % 2**32}
            plan.append((SimpleNamespace(node_id=node), FitIns(tensors, {**self.task_for(node), **ours, **seed})))
        return plan

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[None, dict[str, Any]]:
        """Keeps the average, which the workflow puts into every result."""
        self.average = parameters_to_ndarrays(results[0][1].parameters)[0]
        return None, {}


@dataclass
class _Witness:
    """The grid as the workflow sees it: good answers reach it, all the rest is noted here.

    Messages expire with the exchange, so that a client that comes back late is not asked for a round of the past.
    """

    grid: Grid
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    counts: dict[int, MetricRecord] = field(default_factory=dict)
    reports: dict[int, MetricRecord] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        if not messages:
            return []
        stage = messages[0].content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
        for message in messages if timeout is not None else ():
            message.metadata.ttl = timeout + 5
        nodes = [message.metadata.dst_node_id for message in messages]
        waiting = {id_: node for id_, node in zip(self.grid.push_messages(messages), nodes, strict=False) if id_}
        failed = {node: ("away", "it is not there") for node in nodes if node not in waiting.values()}
        good: dict[int, Message] = {}
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                failure = _failure(reply)
                if failure:
                    failed[node] = failure
                else:
                    good[node] = reply
            if waiting:
                time.sleep(PAUSE)
        failed |= {node: ("no answer", f"no answer within {timeout:.0f} s") for node in waiting.values()}
        self.failures |= {node: (status, f"{why} ({stage})") for node, (status, why) in failed.items()}
        for node in sorted(good) if stage == Stage.COLLECT_MASKED_VECTORS else ():
            content = good[node].content
            self.counts[node], self.reports[node] = content["counts"], content[_REPORT]
            self.sizes[node] = sum(len(part) for part in content[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS])
        return [good[node] for node in sorted(good)]


def _failure(reply: Message) -> tuple[str, str] | None:
    if reply.has_error():
        return "failed", f"error {reply.error.code}: {reply.error.reason}"
    if "said" in reply.content and "status" in reply.content["said"]:
        return str(reply.content["said"]["status"]), str(reply.content["said"]["why"])
    if RECORD_KEY_CONFIGS not in reply.content:
        return "failed", "an answer without masks"
    return None


class _Workflow(SecAggPlusWorkflow):
    """Without nodes that were lost before they had shared keys: Flower 1.41 asks for their shares, and fails."""

    def setup_stage(self, grid: Grid, context: LegacyContext, state: Any) -> bool:
        return super().setup_stage(grid, context, state) and self._forget(state)

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: Any) -> bool:
        return super().share_keys_stage(grid, context, state) and self._forget(state)

    def _forget(self, state: Any) -> bool:
        alive = set(state.active_node_ids)
        state.sampled_node_ids = alive
        state.nid_to_neighbours = {node: state.nid_to_neighbours[node] & alive for node in alive}
        return True


# --- clients in this process ------------------------------------------------------------------------------------------


class InProcess(Grid):
    """Runs a ClientApp here for each node: messages and contexts cross as bytes, in the form in which they travel.

    nodes: the configuration of each. tap: sees every message that arrived, with the bytes that carried it, by object
    id. lose: says of a message, to a node or from it, whether it gets lost.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: Mapping[int, Mapping[str, Any]],
        run_config: Mapping[str, Any] | None = None,
        tap: Callable[[Message, dict[str, bytes]], None] | None = None,
        lose: Callable[[Message], bool] | None = None,
    ):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
        self._app, self._tap, self._lose = app, tap, lose
        self._run = Run.create_empty(1)
        self._replies: dict[str, Message] = {}
        self._contexts: dict[int, bytes] = {}
        for node, config in nodes.items():
            self._keep(Context(1, node, dict(config), RecordDict(), dict(run_config or {})))

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def context(self, node: int) -> Context:
        """A copy of a node's context, with what it keeps between messages."""
        return context_from_proto(ProtoContext.FromString(self._contexts[node]))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            request = self._carry(message)
            ids.append(request.metadata.message_id)
            if self._lose and self._lose(request):
                continue
            reply = self._carry(self._answer(request))
            if not (self._lose and self._lose(reply)):
                self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(id_) for id_ in message_ids if id_ in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _keep(self, context: Context) -> None:
        self._contexts[context.node_id] = context_to_proto(context).SerializeToString()

    def _carry(self, message: Message) -> Message:
        id_ = message.object_id
        message.metadata.__dict__["_message_id"] = id_
        objects = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}
        arrived = cast(Message, inflate_object_from_contents(id_, objects, keep_object_contents=True))
        arrived.metadata.__dict__["_message_id"] = id_
        if self._tap:
            self._tap(arrived, objects)
        return arrived

    def _answer(self, request: Message) -> Message:
        node = request.metadata.dst_node_id
        if node not in self._contexts:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, f"no node {node}"), reply_to=request)
        context = self.context(node)
        try:
            return self._app(request, context)
        except Exception as error:  # as Flower's own node does: an error for an answer, and the context is kept
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=request)
        finally:
            self._keep(context)


# --- what noise is worth ----------------------------------------------------------------------------------------------


def gaussian_delta(epsilon: float, noise: float, rounds: int, sensitivity: float = 1.0) -> float:
    """Exact delta of so many rounds of Gaussian noise (Balle and Wang 2018, 1805.06530, theorem 8), all clients in
    each.

    noise: standard deviation on the sum of the updates, in clip norms; the rounds are one release of 1 / sqrt(rounds)
    of it (Dong, Roth and Su 2022, 1905.02383, section 3). sensitivity: how far one client moves the sum, in clip norms:
    1 if it is there or not, 2 if its update is replaced by any other.
    """
    if epsilon < 0 or noise < 0 or rounds < 1 or not sensitivity > 0:
        raise ValueError(
            "epsilon and noise must be >= 0, rounds >= 1 and sensitivity > 0, got "
            f"{epsilon}, {noise}, {rounds} and {sensitivity}"
        )
    if noise == 0:
        return 1.0
    mu = sensitivity * math.sqrt(rounds) / noise
    return max(0.0, _normal_cdf(mu / 2 - epsilon / mu) - _exp_times_normal_cdf(epsilon, -mu / 2 - epsilon / mu))


def gaussian_epsilon(noise: float, rounds: int, delta: float, sensitivity: float = 1.0) -> float:
    """The smallest epsilon with `gaussian_delta` <= delta; infinite without noise.

    It is of a whole client, all its images together, and of what the clipped updates tell; counts, losses, scores and
    what is asked carry no noise. Whoever knows the seed of the noise can take it off again.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if noise == 0:
        return math.inf
    low, high = 0.0, 1.0
    if gaussian_delta(low, noise, rounds, sensitivity) <= delta:
        return 0.0
    while gaussian_delta(high, noise, rounds, sensitivity) > delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if gaussian_delta(middle, noise, rounds, sensitivity) > delta:
            low = middle
        else:
            high = middle
    return high


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _exp_times_normal_cdf(exponent: float, x: float) -> float:
    """exp(exponent) * Phi(x) for x <= 0, without overflow."""
    if x > -30:
        return math.exp(exponent + math.log(_normal_cdf(x)))
    return math.exp(exponent - x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-1 / x**2))
