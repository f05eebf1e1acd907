"""Secure aggregation and noise: averages against exact sums, what crosses the wire, who may drop out, what noise costs.

Everything runs in this process: clients are `secure.InProcess`, which carries messages and contexts as bytes.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.client.mod import secaggplus_mod  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common.constant import SUPERLINK_NODE_ID  # noqa: E402
from flwr.common.secure_aggregation import secaggplus_utils  # noqa: E402
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key  # noqa: E402
from flwr.server.workflow import SecAggPlusWorkflow  # noqa: E402
from flwr.supercore.primitives.asymmetric import generate_key_pairs  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from fedal_utils import papers
from fedal_utils.federation import aggregate as federation
from fedal_utils.flower import privacy as secure  # noqa: E402
from fedal_utils.flower import server_app as flower
from fedal_utils.flower import workspace as homes
from fedal_utils.record.files import load_state
from fedal_utils.seeding import numpy_seeded  # noqa: E402

NODES = (2**63 + 11, 5, 2**64 - 7, 1234567)  # Flower's are unsigned 64-bit numbers
IMAGES = (120, 80, 200, 55)
MOST = 200
SHAPES = {"conv": (8, 4, 3, 3), "mean": (8,), "steps": (), "head": (20, 8)}
STAGES = ("setup", "share_keys", "collect_masked_vectors", "unmask")
PAIR = (secaggplus_mod, SecAggPlusWorkflow)


@pytest.fixture(autouse=True)
def no_task_is_left():
    """Flower knows one task in a process; the next test file begins without."""
    yield
    TaskIdentity._run_id = TaskIdentity._task_id = TaskIdentity._node_id = None


# --- clients that pretend to train ------------------------------------------------------------------------------------


def trained(number: int, arrays: ArrayRecord, spread: float = 0.05) -> dict[str, np.ndarray]:
    """What client `number` makes of a model: everything moves by normal noise of its own."""
    rng = np.random.default_rng(number)
    moved = {key: array.numpy() + rng.normal(0, spread, array.numpy().shape) for key, array in arrays.items()}
    return {key: np.asarray(value).astype(arrays[key].numpy().dtype) for key, value in moved.items()}


app = ClientApp()


@app.train(mods=[secure.secure_aggregation_mod])
def train(message: Message, context) -> Message:
    number, task = context.node_config["number"], message.content["task"]
    fault = task["fault"] if number == task.get("faulty") else ""
    if fault == "raise":
        raise RuntimeError("out of memory")
    if fault == "diverged":
        return Message(RecordDict({"said": ConfigRecord({"status": "diverged", "why": "loss"})}), reply_to=message)
    new = trained(number, message.content["arrays"], task.get("spread", 0.05))
    if fault == "nan":
        new["mean"][3] = np.nan
    if fault == "shape":
        new["mean"] = new["mean"][:-1]
    counts = MetricRecord({"images": IMAGES[number], "boxes": 7, "steps": 4, "loss": 0.25, "none": 0})
    return Message(
        RecordDict({"arrays": ArrayRecord({k: Array(v) for k, v in new.items()}), "counts": counts}), reply_to=message
    )


def model(dtype: type = np.float64) -> ArrayRecord:
    rng = np.random.default_rng(99)
    return ArrayRecord({k: Array(np.asarray(rng.normal(0, 0.7, s)).astype(dtype)) for k, s in SHAPES.items()})


def clients(count: int = 3, **hooks) -> secure.InProcess:
    return secure.InProcess(app, {node: {"number": i} for i, node in enumerate(NODES[:count])}, **hooks)


def secured(grid: secure.InProcess, arrays: ArrayRecord | None = None, task: dict | None = None, **options):
    nodes, options = grid.get_node_ids(), {"max_weight": MOST, "seed": 3, **options}
    return secure.secure_round(grid, nodes, arrays or model(), lambda _: ConfigRecord(task or {"a": 1}), 5, **options)


def exact(numbers, arrays: ArrayRecord, weights=IMAGES) -> dict[str, np.ndarray]:
    """The weighted average in float64, by hand."""
    sent, share = {n: trained(n, arrays) for n in numbers}, {n: weights[n] for n in numbers}
    whole = sum(share.values())
    return {key: sum(share[n] * sent[n][key].astype(np.float64) for n in numbers) / whole for key in arrays}


def gap(arrays: ArrayRecord, expected: dict[str, np.ndarray]) -> float:
    assert list(arrays) == list(expected)
    return max(float(np.abs(arrays[key].numpy() - expected[key]).max()) for key in expected)


def flat(state: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([value.astype(np.float64).ravel() for value in state.values()])


# --- the average ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["images", None])
@pytest.mark.parametrize("count", [3, 4])
def test_the_secure_average_is_the_exact_one_within_the_stated_bound(count, weight):
    images = IMAGES[:count] if weight else (1,) * count
    most = MOST if weight else 1
    bound = secure.rounding_error(images, most)
    assert bound < 5e-7  # 2^30 levels of values within 8; without weights 1 / 2^26
    result = secured(clients(count), weight=weight)
    assert 0 < gap(result.arrays, exact(range(count), model(), images)) < bound
    assert result.clients == count and result.failures == {} and set(result.cut.values()) == {0}
    assert {node: record["images"] for node, record in result.counts.items()} == dict(
        zip(NODES[:count], IMAGES, strict=False)
    )
    in_single = secured(clients(count), model(np.float32), weight=weight).arrays
    assert {array.numpy().dtype for array in in_single.values()} == {np.dtype(np.float32)}
    rounding = 2.0**-24 * 4  # half a unit in the last place of a number below 4
    assert gap(in_single, exact(range(count), model(np.float32), images)) < bound + rounding


def test_the_bound_is_of_the_right_size():
    """By hand, M = 2, max_weight 1, clipping 8, 2^30 levels: (2 * 2 * 8 + 2 * 8) / 2^30 / 2 = 24 / 2^30."""
    assert secure.rounding_error([1, 1]) == 24 / 2**30
    assert secure.rounding_error([100, 100], 200) == 48 / 2**30
    assert [secure.most_levels(n) for n in (2, 3, 4, 7, 8, 1000)] == [2**30, 2**30, 2**29, 2**29, 2**28, 2**22]
    assert all(n * secure.most_levels(n) < 2**32 for n in range(2, 300))


def test_a_seed_fixes_the_average_to_the_last_bit_whatever_the_keys_and_leaves_numpys_state():
    before = np.random.get_state()[1].copy()
    one, two, other = (secured(clients(), seed=seed).arrays for seed in (9, 9, 10))
    assert all(one[key].data == two[key].data for key in SHAPES)
    assert any(one[key].data != other[key].data for key in SHAPES)
    assert np.array_equal(before, np.random.get_state()[1])
    with numpy_seeded(4):
        drawn = np.random.rand(3)
    assert np.array_equal(drawn, np.random.RandomState(4).rand(3))
    assert np.array_equal(before, np.random.get_state()[1])


def test_values_beyond_the_clipping_range_are_cut_and_counted():
    """Updates of standard deviation 0.05 times the weight's part, cut at 0.05: those of few images are not."""
    result = secured(clients(), clipping_range=0.05)
    updates = {n: flat(trained(n, model())) - flat(trained(n, model(), 0.0)) for n in range(3)}
    cut = {NODES[n]: int((np.abs(updates[n]) * IMAGES[n] / MOST > 0.05).sum()) for n in range(3)}
    assert result.cut == cut and cut[NODES[2]] > cut[NODES[0]] > 0


# --- who may drop out -------------------------------------------------------------------------------------------------


def silent_from(index: int, node: int, replies: bool):
    """Loses requests to a node (or its answers) from its exchange `index` on."""
    seen = []

    def lose(message: Message) -> bool:
        asked = message.metadata.dst_node_id == node
        seen.extend([1] * asked)
        return (asked and not replies or message.metadata.src_node_id == node) and len(seen) > index

    return lose


@pytest.mark.parametrize("replies", [False, True], ids=["requests", "answers"])
@pytest.mark.parametrize("index", range(4), ids=STAGES)
@pytest.mark.parametrize("count", [3, 4])
def test_a_client_that_is_lost_at_any_stage_costs_its_own_update_only(count, index, replies, monkeypatch):
    monkeypatch.setattr(secure, "PAUSE", 0.001)
    lost = NODES[1]
    grid = clients(count, lose=silent_from(index, lost, replies))
    nodes = list(NODES[:count])
    options = {"max_weight": MOST, "seed": 3}
    result = secure.secure_round(grid, nodes, model(), lambda _: ConfigRecord({"a": 1}), 0.01, **options)
    present = [n for n in range(count) if n != 1 or index == 3]  # its vector was there before it fell silent
    assert list(result.counts) == sorted(NODES[n] for n in present)
    assert gap(result.arrays, exact(present, model())) < secure.rounding_error([IMAGES[n] for n in present], MOST)
    assert result.failures == {lost: ("no answer", f"no answer within 0 s ({STAGES[index]})")}
    grid._lose = None  # it is back, its context from the middle of a round
    again = secured(grid)
    assert again.clients == count and again.failures == {}


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("raise", "failed"),
        ("diverged", "diverged"),
        ("nan", "not finite"),
        ("shape", "wrong shape"),
    ],
)
def test_a_client_without_weights_says_why_and_the_others_are_averaged(fault, status):
    result = secured(clients(), task={"faulty": 1, "fault": fault})
    assert {node: status for node, (status, _) in result.failures.items()} == {NODES[1]: status}
    assert gap(result.arrays, exact([0, 2], model())) < secure.rounding_error([120, 200], MOST)


def test_a_weight_above_the_most_is_refused_at_the_client():
    with pytest.raises(secure.SecureAggregationError, match="too few of 3") as error:
        secured(clients(), max_weight=100)
    assert {node for node in error.value.failures} == {NODES[0], NODES[2]}
    assert "max_weight = 100], got 120" in error.value.failures[NODES[0]][1]


def test_too_few_clients_are_an_error_that_names_them():
    with pytest.raises(secure.SecureAggregationError, match="needs 3 clients, 2 can be asked"):
        secured(clients(2))
    gone = NODES[:2]
    with pytest.raises(secure.SecureAggregationError, match="too few of 3") as error:
        nodes = clients(lose=lambda message: message.metadata.dst_node_id in gone)
        secure.secure_round(nodes, NODES[:3], model(), lambda _: ConfigRecord({}), 0.01, max_weight=MOST)
    assert error.value.failures == {node: ("no answer", "no answer within 0 s (setup)") for node in sorted(gone)}
    with pytest.raises(secure.SecureAggregationError, match="of all clients are zero"):
        secured(clients(), task={"a": 1}, weight="none")


# --- what crosses -----------------------------------------------------------------------------------------------------


def test_nothing_of_a_clients_update_is_on_the_wire():
    up, down = [], []

    def tap(message, objects):
        (down if message.metadata.src_node_id == SUPERLINK_NODE_ID else up).extend(objects.values())

    started = model(np.float32)
    result = secured(clients(tap=tap), started)
    up, down = b"".join(up), b"".join(down)

    def runs(values: np.ndarray) -> list[bytes]:
        """Every run of four values, in single and double precision."""
        return [values[i : i + 4].astype(kind).tobytes() for kind in ("<f4", "<f8") for i in range(len(values) - 3)]

    for number in range(3):
        new = trained(number, started)
        moved = {key: new[key].astype(np.float64) - started[key].numpy() for key in new}
        for state in (new, moved, {key: value * (IMAGES[number] / MOST) for key, value in moved.items()}):
            assert not any(run in up or run in down for run in runs(flat(state)))
    in_the_message = started["conv"].numpy().ravel()[:4].tobytes()
    assert down.count(in_the_message) == 3 and in_the_message not in up  # the search finds what is there
    assert min(result.sizes.values()) > 8 * sum(math.prod(shape) for shape in SHAPES.values())


def test_a_masked_update_is_uniform_and_new_in_every_round():
    """Clients that do not move at all: their masked vectors look like any others."""
    seen = []

    def tap(message, objects):
        if message.has_content() and secure._REPORT in message.content:
            parts = message.content["secaggplus_configs"]["masked_params"]
            seen.append(np.load(io.BytesIO(parts[-1])).ravel())

    grid = clients(tap=tap)
    still = [secured(grid, task={"spread": 0.0}) for _ in range(2)]
    assert gap(still[0].arrays, {k: a.numpy() for k, a in model().items()}) < secure.rounding_error(IMAGES[:3], MOST)
    assert len(seen) == 6
    size, most = len(seen[0]), 2.0**32
    for vector in seen:
        assert 0 <= vector.min() and vector.max() < most
        assert abs(vector.mean() / most - 0.5) < 6 / math.sqrt(12 * size)
        assert stats.kstest(vector / most, "uniform").pvalue > 1e-9
    for i in range(6):
        for j in range(i):
            assert abs(np.corrcoef(seen[i], seen[j])[0, 1]) < 6 / math.sqrt(size)


def test_plain_requests_pass_unless_the_node_wants_masks():
    nodes = {5: {"number": 0, secure.REQUIRED: True}, 6: {"number": 1}}
    grid = secure.InProcess(app, nodes)
    asked = [Message(RecordDict({"arrays": model(), "task": ConfigRecord({"a": 1})}), node, "train") for node in nodes]
    strict, open_ = grid.send_and_receive(asked)
    assert strict.has_error() and "secure aggregation only" in strict.error.reason
    assert gap(open_.content["arrays"], trained(1, model())) == 0


# --- masks ------------------------------------------------------------------------------------------------------------


def test_both_sides_draw_strong_masks_and_a_mismatch_is_refused(monkeypatch):
    modules = [sys.modules[side.__module__] for side in PAIR]
    assert all(module.pseudo_rand_gen is secure.strong_masks for module in modules)
    strong = secured(clients())
    for module in modules:
        monkeypatch.setattr(module, "pseudo_rand_gen", secaggplus_utils.pseudo_rand_gen)
    usual = secured(clients())
    assert all(strong.arrays[key].data == usual.arrays[key].data for key in SHAPES)  # masks leave no trace
    monkeypatch.setattr(modules[1], "pseudo_rand_gen", secure.strong_masks)
    with pytest.raises(secure.SecureAggregationError, match="masks by strong_masks, not by pseudo_rand_gen"):
        secured(clients())
    monkeypatch.delattr(modules[0], "pseudo_rand_gen")
    with pytest.raises(ImportError, match="Flower 1.41"):
        secure.use_strong_masks()


def test_strong_masks_use_all_of_the_key_where_flower_uses_28_bits():
    shapes = [(1,), (3, 4), ()]
    key = bytes(range(32))
    assert [m.shape for m in secure.strong_masks(key, 2**32, shapes)] == shapes
    narrow = secure.strong_masks(key, 2**20, [(4096,)])[0]
    assert narrow.min() >= 0 and 0.99 * 2**20 < narrow.max() < 2**20
    swapped = key[4:8] + key[:4] + key[8:]  # Flower folds words of four bytes by exclusive or
    ours = [secure.strong_masks(k, 2**32, [(8,)])[0] for k in (key, swapped)]
    theirs = [secaggplus_utils.pseudo_rand_gen(k, 2**32, [(8,)])[0] for k in (key, swapped)]
    assert not np.array_equal(*ours) and np.array_equal(*theirs)
    bits = 0
    for _ in range(40):
        shared = generate_shared_key(generate_key_pairs()[0], generate_key_pairs()[1])
        bits |= int(np.bitwise_xor.reduce(np.frombuffer(shared, "<u4")))
    assert bits.bit_count() == 28  # the docstring's number


# --- what noise is worth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
def test_delta_is_theorem_8_of_balle_and_wang(epsilon, noise):
    """delta = Phi(1 / 2s - e s) - exp(e) Phi(-1 / 2s - e s), by SciPy."""
    phi = stats.norm
    up, down = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
    by_hand = phi.cdf(up) - np.exp(epsilon + phi.logcdf(down))
    assert secure.gaussian_delta(epsilon, noise, 1) == pytest.approx(max(0.0, by_hand), rel=1e-7, abs=1e-15)


def test_known_values_of_epsilon_and_delta():
    """s = 1: delta(0) = 2 Phi(1/2) - 1 and delta(1) = Phi(-1/2) - e Phi(-3/2). Epsilons: dp-accounting's PLD."""
    assert secure.gaussian_delta(0, 1, 1) == pytest.approx(0.3829249225480262, abs=1e-14)
    assert secure.gaussian_delta(1, 1, 1) == pytest.approx(0.3085375387259869 - math.e * 0.0668072012688581, abs=1e-14)
    known = {(0.5, 1): 10.00, (1, 1): 4.38, (2, 1): 1.99, (1, 10): 17.86, (1, 50): 54.38, (5, 50): 6.57}
    for (noise, rounds), epsilon in known.items():
        assert secure.gaussian_epsilon(noise, rounds, 1e-5) == pytest.approx(epsilon, abs=0.006)
    assert secure.gaussian_epsilon(0, 1, 1e-5) == math.inf and secure.gaussian_delta(3, 0, 1) == 1
    assert secure.gaussian_epsilon(1, 1, 0.5) == 0


def test_more_noise_is_safer_and_more_rounds_are_not():
    of = secure.gaussian_epsilon
    by_noise = [of(noise, 10, 1e-5) for noise in (0.2, 0.5, 1, 2, 5, 50)]
    by_rounds = [of(1, rounds, 1e-5) for rounds in (1, 2, 5, 50, 500)]
    by_delta = [of(1, 10, delta) for delta in (1e-12, 1e-5, 1e-2)]
    assert by_noise == sorted(by_noise, reverse=True) and len(set(by_noise)) == 6
    assert by_rounds == sorted(by_rounds) and len(set(by_rounds)) == 5
    assert by_delta == sorted(by_delta, reverse=True)
    assert of(2, 4, 1e-5) == pytest.approx(of(1, 1, 1e-5), rel=1e-9)  # T rounds: one of noise / sqrt(T)
    assert of(2, 1, 1e-5, sensitivity=2) == pytest.approx(of(1, 1, 1e-5), rel=1e-9)
    assert secure.gaussian_delta(of(0.7, 3, 1e-6), 0.7, 3) == pytest.approx(1e-6, rel=1e-6)
    for wrong in ({"noise": -1}, {"rounds": 0}, {"sensitivity": 0}):
        with pytest.raises(ValueError, match="must be >= 0, rounds >= 1"):
            of(**{"noise": 1, "rounds": 1, "delta": 1e-5, **wrong})
    for delta in (0, 1):
        with pytest.raises(ValueError, match=r"delta must be in \(0, 1\)"):
            of(1, 1, delta)


# --- clipping and noise -----------------------------------------------------------------------------------------------


def setting(**over):
    """A digits experiment of seconds."""
    tiny = dict(
        scenes=(60, 16),
        initial_labels=3,
        query_size=3,
        cycles=1,
        rounds=2,
        iterations=2,
        initial_model_iterations=4,
        initial_model_images=8,
        max_update_ratio=0.0,
        optimizer="sgd",
    )
    return papers.load("60_real_clients", "smoke", None, [0], **{**tiny, **over})


CLIPPED = {"privacy": "clip", "aggregation_weights": "equal", "clip_norm": 0.5}


def clip(update: np.ndarray, **over) -> np.ndarray:
    """What is left of a client's update behind `flower.private`."""
    chosen = flower.Task(setting(**over), "60_real_clients", "avg", 0, 0, 0, ("0",)).record()
    one = ClientApp()

    @one.train(mods=[flower.private])
    def add(message: Message, context) -> Message:
        if not len(update):
            return Message(RecordDict({"said": ConfigRecord({"status": "diverged", "why": "loss"})}), reply_to=message)
        new = flower.state_of(message.content["arrays"])["w"] + torch.from_numpy(update)
        return Message(RecordDict({"arrays": flower.arrays_from({"w": new})}), reply_to=message)

    sent = RecordDict({"task": chosen, "arrays": flower.arrays_from({"w": torch.zeros(400)})})
    (answer,) = secure.InProcess(one, {1: {}}).send_and_receive([Message(sent, 1, "train")])
    assert not answer.has_error()
    if "said" in answer.content:
        return np.array([answer.content["said"]["status"]])
    return flower.state_of(answer.content["arrays"])["w"].numpy()


def test_a_long_update_arrives_with_the_clip_norm_and_a_shorter_one_as_it_is():
    update = np.random.default_rng(0).normal(size=400).astype(np.float32)
    long, short = 3 * update / np.linalg.norm(update), 0.4 * update / np.linalg.norm(update)
    assert np.linalg.norm(clip(long, **CLIPPED)) == pytest.approx(0.5, rel=1e-6)
    np.testing.assert_allclose(clip(long, **CLIPPED), long / 6, rtol=1e-5)
    assert np.array_equal(clip(short, **CLIPPED), short)
    assert np.array_equal(clip(long), long)  # privacy='none'
    assert clip(np.zeros(0), **CLIPPED) == ["diverged"]


def noised(seed: int | None, count: int = 3, entries: int = 20000, **over) -> dict[str, torch.Tensor]:
    """An average of equal updates over zeros, all ones but a variance of 0.01."""
    state = {"w": torch.ones(entries), "norm.running_var": torch.full((500,), 0.01)}
    updates = [federation.Update(f"{i:02d}", federation.pack(state), 10 * (i + 1), 5, 1, 0.5) for i in range(count)]
    merging = flower.Merging(setting(**{**CLIPPED, **over}))
    return merging.average(1, {key: torch.zeros_like(value) for key, value in state.items()}, updates, seed)


def test_noise_has_the_stated_deviation_and_repeats_by_its_seed():
    """Standard deviation noise * clip_norm / updates; of 20,000 draws it is known to 1 / 200, six times that is 3 %."""
    before = np.random.get_state()[1].copy()
    for count in (3, 4):
        added = noised(4, count, noise=1.5)["w"].double() - 1
        assert float(added.std()) == pytest.approx(1.5 * 0.5 / count, rel=0.03)
        assert abs(float(added.mean())) < 6 * 1.5 * 0.5 / count / math.sqrt(20000)
    one, same, other = (noised(seed, noise=1.5)["w"] for seed in (4, 4, 5))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert np.array_equal(before, np.random.get_state()[1])
    variance = noised(4, noise=1.5)["norm.running_var"]
    assert float(variance.min()) == 0 and 0.3 < float((variance == 0).double().mean()) < 0.7
    quiet = noised(4)
    assert torch.equal(quiet["w"], torch.ones(20000)) and float(quiet["norm.running_var"].min()) == pytest.approx(0.01)


# --- a whole experiment -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Runs a setting with three clients: their model, rounds.csv and asked.csv; a setting is run once."""
    place, known = tmp_path_factory.mktemp("place"), {}

    def run(faults: dict[str, str] | None = None, tap=None, **over):
        config = setting(**over)
        key = (config.digest(), str(faults))
        if key in known:
            return known[key]
        names = homes.deal(config, place, 0)
        for earlier in place.glob(f"**/runs/60_real_clients/{config.digest()[:8]}"):  # with other faults
            shutil.rmtree(earlier)
        usual = papers.load("60_real_clients", "smoke").as_dict()
        settings = {name: value for name, value in config.as_dict().items() if value != usual[name] and name != "seeds"}
        said = {
            "place": str(place),
            "notebook": "60_real_clients",
            "profile": "smoke",
            "settings": json.dumps(settings),
            "timeout": 60.0,
            "patience": 0.0,
            "wait": 5.0,
        }
        nodes = {
            i: {"folder": str(place / "clients" / name), "faults": (faults or {}).get(name, "")}
            for i, name in enumerate(names, start=11)
        }
        flower.serve(secure.InProcess(flower.client_app, nodes, said, tap=tap), place, said)
        (folder,) = (place / "server" / "runs").glob(f"60_real_clients/{config.digest()[:8]}/avg/seed0")
        state = load_state(folder / "state.pt")["state"]["model"]
        known[key] = (state, *(pd.read_csv(folder / f, dtype={"client": str}) for f in ("rounds.csv", "queries.csv")))
        return known[key]

    return run


def apart(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    return max(float((one[key].double() - two[key].double()).abs().max()) for key in one)


# Each round's average is off by rounding to 2^30 levels (below 2e-7 here) and to float32; SGD's few steps hardly
# stretch that: 1e-7 was seen, of weights that move by 1.5e-3.
CLOSE = 1e-6


def test_a_secure_experiment_gives_the_plain_weights_and_asks_for_the_same_images(run_of):
    answers = []

    def tap(message, _):
        if message.metadata.message_type == "train" and message.metadata.src_node_id != SUPERLINK_NODE_ID:
            answers.append(message.content)

    size = {"cycles": 2, "rounds": 1}
    plain, rounds, asked = run_of(**size)
    hidden, masked_rounds, masked_asked = run_of(privacy="secure", tap=tap, **size)
    assert 0 < apart(plain, hidden) < CLOSE
    assert asked["id"].tolist() == masked_asked["id"].tolist() and len(asked) == 18
    np.testing.assert_allclose(asked["score"], masked_asked["score"], rtol=1e-3)
    same = ["cycle", "round", "client", "images", "boxes", "steps"]
    pd.testing.assert_frame_equal(rounds[same], masked_rounds[same])
    np.testing.assert_allclose(rounds["loss"], masked_rounds["loss"], rtol=1e-4)
    assert len(answers) == 2 * 3 * 4
    assert not any(len(record) for content in answers for record in content.array_records.values())
    values = sum(value.numel() for value in plain.values())
    sent = masked_rounds[masked_rounds["client"] == "00"]["bytes_up"]
    assert ((sent > 8 * values) & (sent < 8 * values + 1000)).all()


def test_a_secure_average_of_equal_parts(run_of):
    plain, hidden = run_of(weights="equal")[0], run_of(weights="equal", privacy="secure")[0]
    assert 0 < apart(plain, hidden) < CLOSE


def test_clipping_that_never_bites_changes_nothing(run_of):
    plain, _, asked = run_of(weights="equal")
    clipped, rounds, again = run_of(weights="equal", privacy="clip", clip_norm=1e6)
    assert apart(plain, clipped) < CLOSE
    assert asked["id"].tolist() == again["id"].tolist() and "status" not in rounds


def test_clipping_bounds_what_a_round_moves(run_of):
    """Two rounds of averages of updates no longer than 0.01; without clipping they go further."""
    start = run_of(weights="equal", privacy="clip", clip_norm=1e-9)[0]
    clipped = run_of(weights="equal", privacy="clip", clip_norm=0.01)[0]
    free = run_of(weights="equal")[0]

    def far(state):
        return math.sqrt(sum(float((state[k].double() - start[k].double()).square().sum()) for k in start))

    assert far(free) > 0.03 and 0.005 < far(clipped) < 0.0201


def test_faults_of_a_drill_cost_a_secure_round_that_client(run_of):
    """Not finite in the first round, an error in the second: as without masks."""
    faults = {"00": "nan@0.0, fail@0.1"}
    (plain, rounds, _), (hidden, masked, _) = (run_of(faults=faults, privacy=how) for how in ("none", "secure"))
    assert 0 < apart(plain, hidden) < CLOSE
    for table in (rounds, masked):
        assert table[table["client"] == "00"]["status"].tolist() == ["not finite", "failed"]
        assert table[table["client"] == "01"]["status"].isna().all()


def test_a_secure_round_with_too_few_clients_changes_nothing_or_stops(run_of):
    faults = {"00": "shape@0.0", "02": "fail@0.0"}
    state, rounds, _ = run_of(faults=faults, privacy="secure", rounds=1)
    assert rounds["client"].tolist() == ["00", "01", "02", "server"]
    assert rounds["status"].tolist()[:3] == ["wrong shape", "too few", "failed"]
    assert rounds["bytes_up"].tolist() == [0, 0, 0, 0]
    start = run_of(weights="equal", privacy="clip", clip_norm=1e-9)[0]
    assert apart(state, start) < 1e-8
    with pytest.raises(secure.SecureAggregationError, match="too few of 3"):
        run_of(faults=faults, privacy="secure", rounds=1, on_failure="stop")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"privacy": "clip"}, "needs weights='equal', not 'images'.*0.67"),
        ({"privacy": "clip", "aggregation_weights": "boxes"}, "needs weights='equal', not 'boxes'"),
        ({**CLIPPED, "server_strategy": "fedadam"}, "'fedavg' or 'fedprox', not 'fedadam'"),
        ({**CLIPPED, "optimizer_state": "travels"}, "optimiser_state='travels'"),
        ({**CLIPPED, "message_dtype": "fp16"}, "wire='fp32', not 'fp16': rounding after clipping"),
        ({**CLIPPED, "noise": 1.0, "max_update_ratio": 20.0}, "too_large=20.0"),
        ({**CLIPPED, "methods": ("chain+sum",)}, "for scheme fedavg"),
        ({"noise": 1.0}, "noise=1.0.*privacy='clip', not 'none'"),
        ({"privacy": "secure", "noise": 1.0}, "privacy='clip', not 'secure'"),
        ({"privacy": "secure", "aggregation_weights": "boxes"}, "'images' or 'equal'"),
        ({"privacy": "secure", "server_strategy": "krum"}, "'fedavg' or 'fedprox', not 'krum'"),
        ({"privacy": "secure", "optimizer_state": "travels"}, "optimiser_state='travels'"),
        ({"privacy": "secure", "message_dtype": "fp16"}, "wire='fp32', not 'fp16': masked updates"),
        ({"privacy": "secure", "max_update_ratio": 20.0}, "too_large=20.0.*sees no update"),
        ({"privacy": "secure", "clients": 2}, r"3 clients or more in a round, not 2 \(clients=2"),
        ({"privacy": "secure", "clients": 4, "client_fraction": 0.5}, "not 2 .*fraction=0.5"),
        ({"privacy": "secure", "methods": ("avg", "chain+sum")}, "method 'chain\\+sum'.*for scheme fedavg"),
    ],
)
def test_what_privacy_cannot_go_with_is_refused(over, words):
    with pytest.raises(ValueError, match=words):
        flower.check(setting(**over))


@pytest.mark.parametrize(
    "over",
    [
        CLIPPED,
        {**CLIPPED, "noise": 1.0},
        {**CLIPPED, "max_update_ratio": 20.0},
        {**CLIPPED, "server_strategy": "fedprox", "proximal": 0.1},
        {"privacy": "secure"},
        {"privacy": "secure", "aggregation_weights": "equal", "server_strategy": "fedprox", "proximal": 0.1},
        {"privacy": "secure", "optimizer_state": "client"},
        {"privacy": "secure", "clients": 4, "client_fraction": 0.75},
    ],
)
def test_what_privacy_goes_with(over):
    flower.check(setting(**over))


def test_the_plain_loop_has_no_secure_average():
    run = type("Run", (), {"config": setting(privacy="secure"), "committed": 0})()
    update = federation.Update("00", b"", 3, 9, 2, 0.5, size=800)
    assert update.bytes == 800
    with pytest.raises(ValueError, match="as they are"):
        flower.merge(run, None, [], [update], None)
