"""Flower's messages in this process: the plain loop's bits, what travels and what never does, faults, how models merge.

Clients are `secure.InProcess`: contents and contexts cross as bytes. Processes and networks are tested elsewhere, and
so are privacy='clip' and 'secure'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr")

from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import SUPERLINK_NODE_ID  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from fedal_utils import config, papers, record
from fedal_utils.federation import aggregate as federation
from fedal_utils.federation import experiment as alfl
from fedal_utils.federation.aggregate import State, Update  # noqa: E402
from fedal_utils.federation.experiment import ClientLost, Turn  # noqa: E402
from fedal_utils.flower import privacy as secure  # noqa: E402
from fedal_utils.flower import server_app as flower
from fedal_utils.flower import workspace as homes
from fedal_utils.labelling import page as labelling
from fedal_utils.sampling.pool import Bill  # noqa: E402

NOTEBOOK = "60_real_clients"
TINY = dict(
    image_size=(32, 32),
    colour=0.0,
    zoom=(1.0, 1.0),
    shift=0.0,
    digit_classes=3,
    scenes=(46, 6),
    initial_labels=3,
    query_size=3,
    cycles=2,
    rounds=1,
    extra_rounds=1,
    iterations=2,
    batch=4,
    initial_model_images=8,
    initial_model_iterations=2,
    evaluate_every=0,
    max_update_ratio=0.0,
    held_out_images=6,
    methods=("random",),
)
FIRST_NODE = 101  # clients 00, 01, 02 are nodes 101, 102, 103


def small(**changes) -> config.Config:
    return papers.load(NOTEBOOK, "smoke", seeds=[0], **{**TINY, **changes})


@pytest.fixture(scope="module", autouse=True)
def in_haste():
    """Nobody waits here between two looks for answers, nor for a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flower, "PAUSE", 0.01)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def no_task_is_left():
    """Flower knows one task in a process; the next test begins without."""
    yield
    TaskIdentity._run_id = TaskIdentity._task_id = TaskIdentity._node_id = None


@pytest.fixture
def task_identity():
    """For tests that make messages themselves."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1


# --- experiments, in one process and by messages ----------------------------------------------------------------------


def plain(
    setting: config.Config,
    root: Path,
    without: Mapping[tuple[int, int], Mapping[str, str]] | None = None,
    unasked: Iterable[tuple[int, str]] = (),
) -> Path:
    """The notebooks' loop. without: (cycle, round) -> clients whose update is taken out, and why; unasked: (cycle,
    client) that gets no question."""
    study = alfl.prepare(setting, device="cpu")
    for run in record.runs(setting, NOTEBOOK, root=root, plan=alfl.plan, progress=False):
        clients, model = alfl.start(run, study)
        merging = flower.Merging(setting)
        for cycle, round in run.rounds():
            turn = alfl.whose_turn(run, clients, cycle, round)
            for client in turn.clients if turn.asks else ():
                if (cycle, client.name) not in unasked:
                    alfl.ask(run, study, model, client, cycle)
            updates = alfl.train(run, study, model, clients, cycle, round)
            lost = (without or {}).get((cycle, round), {})
            for client in clients:
                client.status = lost.get(client.name, client.status)
            updates = [update for update in updates if update.client not in lost]
            flower.merge(run, model, clients, updates, merging)
            if turn.merge:
                alfl.merge_by_class(run, study, model, clients)
            alfl.commit(run, study, model, clients, updates, cycle, round)
    return root


class Rounds(secure.InProcess):
    """A grid that knows which round of which method it is, from the server's greeting at the beginning of each."""

    now, method = (0, 0), ""


@pytest.fixture(autouse=True)
def greeted(monkeypatch):
    original = flower.Line.greet

    def greet(line, task, *rest, **named):
        line.grid.now, line.grid.method = (task.cycle, task.round), task.method
        return original(line, task, *rest, **named)

    monkeypatch.setattr(flower.Line, "greet", greet)


def grid_of(place: Path, setting: config.Config, kind=Rounds, nodes=None, **options) -> secure.InProcess:
    """nodes: what a client's node says beside its folder, by client."""
    names = homes.facts_of(place)["clients"]
    told = {
        FIRST_NODE + i: {"folder": str(place / "clients" / name), "device": "cpu", **(nodes or {}).get(name, {})}
        for i, name in enumerate(names)
    }
    return kind(flower.client_app, told, flower.run_config(setting, NOTEBOOK, place), **options)


def elsewhere(
    setting: config.Config, place: Path, timeout: float = 20.0, patience: float = 0.0, wait: float = 5.0, **options
) -> Path:
    """The experiment with clients that are elsewhere; where the run folders lie. options: of the grid."""
    grid = grid_of(place, setting, **options)
    flower.serve(grid, place, flower.run_config(setting, NOTEBOOK, place, timeout, patience, wait))
    return place / "server" / "runs"


def line_to(grid: secure.InProcess, names: Iterable[str] = ("00", "01", "02"), timeout: float = 20.0) -> flower.Line:
    line = flower.Line(grid, timeout)
    line.nodes = {name: FIRST_NODE + i for i, name in enumerate(names)}
    return line


def task_of(setting: config.Config, cycle: int = 0, round: int = 0, **more) -> flower.Task:
    return flower.Task(setting, NOTEBOOK, setting.methods[0], 0, cycle, round, ("0", "1", "2"), **more)


class Bench:
    """Places that are dealt once, and plain runs that are run once."""

    def __init__(self, root: Path):
        self.root, self._plain, self.count = root, {}, 0

    def place(self, setting: config.Config, tests: bool = False) -> Path:
        """A fresh place for an experiment; tests: each client has test images too."""
        dealt = self.root / f"dealt{tests:d}" / homes.dealt_as(setting, 0)
        homes.deal(setting, dealt, 0, tests=tests)
        self.count += 1
        return shutil.copytree(dealt, self.root / f"place{self.count}" / "place")

    def plain(self, setting: config.Config, **how) -> Path:
        key = (setting.digest(), setting.methods, repr(how))
        if key not in self._plain:
            self._plain[key] = plain(setting, self.root / f"plain{len(self._plain)}", **how)
        return self._plain[key]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def folder_of(setting: config.Config, root: Path, method: str) -> Path:
    return record.Run(setting, NOTEBOOK, method, 0, root).folder


def weights(setting: config.Config, root: Path, method: str | None = None) -> State:
    return record.state(setting, NOTEBOOK, method or setting.methods[0], 0, root=root)["model"]


def same_state(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same(setting: config.Config, root: Path, other: Path) -> None:
    """Both CSVs as text, and the final weights bit for bit, of all methods."""
    for method in setting.methods:
        one, two = (folder_of(setting, where, method) for where in (root, other))
        for name in ("rounds.csv", "queries.csv"):
            assert (one / name).read_text().splitlines() == (two / name).read_text().splitlines(), (method, name)
        assert same_state(weights(setting, root, method), weights(setting, other, method)), method


def rows_of(setting: config.Config, root: Path) -> pd.DataFrame:
    table = record.table(setting, NOTEBOOK, root=root)
    return table.assign(status=table["status"].fillna("") if "status" in table else "")


CHAINED = dict(clients=2, first_pass_rounds=2, chain_passes=2, optimizer="sgd", lr=0.02, round_lr_decay=0.2)
CASES: dict[str, dict] = {
    "avg": dict(methods=("avg",), norm="batch"),
    "chain": dict(methods=("chain+sum",), **CHAINED),
    "accumulate": dict(methods=("accumulate+sum",), visit_fraction=2.0, **CHAINED),
    "optimiser at the client": dict(optimizer_state="client", clients=2),
    "half the bits, two of three": dict(
        methods=("ksas_max",), client_fraction=0.67, message_dtype="fp16", cycles=3, extra_rounds=0
    ),
    "fedadam": dict(server_strategy="fedadam", server_lr=0.02, clients=2),
    "fedavgm": dict(
        server_strategy="fedavgm", server_lr=0.7, optimizer="sgd", lr=0.02, optimizer_state="travels", clients=2
    ),
}
WATCHED: dict[str, list] = {}  # case -> (direction and type, shape of the content) of each message of its run


@pytest.mark.parametrize("case", CASES)
def test_real_clients_and_the_plain_loop_agree_bit_for_bit(case, bench):
    setting = small(**CASES[case])
    seen = WATCHED.setdefault(case, [])
    root = elsewhere(setting, bench.place(setting), tap=lambda message, _: seen.append(shape_of(message)))
    assert_same(setting, root, bench.plain(setting))
    rows = rows_of(setting, root)
    assert (rows["status"] == "").all() and rows["steps"].sum() > 0
    assert not same_state(weights(setting, root), start_of(setting, root))


def start_of(setting: config.Config, root: Path) -> State:
    begun = alfl.beginning(setting)
    return record.shared(begun, "shared", 0, "starting-point", lambda: pytest.fail("made twice"), root=root)


def test_cases_are_what_they_say(bench):
    """Half of the test above is that something was there to differ."""
    chain, accumulate = small(**CASES["chain"]), small(**CASES["accumulate"])
    frozen = rows_of(chain, bench.plain(chain)).query("client != 'server'")
    assert frozen["bytes_down"].iloc[-1] < frozen["bytes_down"].iloc[0], "the last pass carries the head alone"
    memory = record.state(accumulate, NOTEBOOK, "accumulate+sum", 0, root=bench.plain(accumulate))["memory"]
    assert set(memory) == {"00", "01"} and any(key.startswith("momentum_buffer:") for key in memory["00"])
    half = small(**CASES["half the bits, two of three"])
    rows = rows_of(half, bench.plain(half)).query("client != 'server'")
    assert len(rows) == 3 * 2 and rows["bytes_up"].max() < 0.6 * frozen["bytes_up"].max()
    adam = record.state(small(**CASES["fedadam"]), NOTEBOOK, "random", 0, root=bench.plain(small(**CASES["fedadam"])))
    average = small(clients=2)
    assert not same_state(adam["model"], weights(average, bench.plain(average)))


class BrokenOff(KeyboardInterrupt):
    """The server was killed."""


@pytest.mark.parametrize("case", ["fedadam", "fedavgm", "optimiser at the client", "accumulate"])
def test_a_run_broken_off_before_and_after_a_commit_goes_on_to_the_same_bytes(case, bench, monkeypatch):
    """Clients have asked and trained for the commit that was lost, and do it again; the server's optimiser lives on."""
    setting = small(**CASES[case])
    place, original = bench.place(setting), alfl.commit
    breaks = {0: "after", 1: "before"} if case != "accumulate" else {1: "after", 2: "before", 4: "before"}
    starts = len(breaks) + 1

    def commit(run, *rest, **named):
        when = breaks.pop(run.committed, None)
        if when == "before":
            raise BrokenOff
        out = original(run, *rest, **named)
        if when == "after":
            raise BrokenOff
        return out

    monkeypatch.setattr(alfl, "commit", commit)
    for start in range(starts):
        with contextlib.nullcontext() if start == starts - 1 else pytest.raises(BrokenOff):
            elsewhere(setting, place)
    assert not breaks
    assert_same(setting, place / "server" / "runs", bench.plain(setting))
    kept = record.state(setting, NOTEBOOK, setting.methods[0], 0, root=place / "server" / "runs")["server"]
    assert set(kept) == {"fedadam": {"m_t", "v_t"}, "fedavgm": {"momentum_vector"}}.get(case, set())


class Late(Rounds):
    """Clients do their work in the opposite order, and answers come one at a time, the one that was sent last first."""

    def push_messages(self, messages):
        return super().push_messages(list(messages)[::-1])[::-1]

    def pull_messages(self, message_ids):
        return super().pull_messages([id_ for id_ in message_ids if id_ in self._replies][-1:])


def test_answers_in_another_order_and_one_by_one_change_no_bit(bench):
    setting, order = small(**CASES["avg"]), []

    def noted(message: Message, _) -> None:
        if message.metadata.dst_node_id == SUPERLINK_NODE_ID:
            order.append(message.metadata.src_node_id)

    root = elsewhere(setting, bench.place(setting), kind=Late, tap=noted)
    assert order[:6] == [103, 102, 101] * 2
    assert_same(setting, root, bench.plain(setting))


class Moved(Rounds):
    """Client 01 is node 102 in the first cycle, and comes back as another node."""

    def get_node_ids(self):
        return [101, 104 if self.now[0] else 102]


def test_a_client_that_comes_back_as_another_node_is_known_by_its_name(bench):
    setting = small(**CASES["optimiser at the client"])
    place = bench.place(setting)

    def kind(app, nodes, *rest, **named):
        return Moved(app, {**nodes, 104: nodes[102]}, *rest, **named)

    talked: list[int] = []
    root = elsewhere(setting, place, kind=kind, tap=lambda message, _: talked.append(message.metadata.dst_node_id))
    assert_same(setting, root, bench.plain(setting))
    assert 102 in talked[: talked.index(104)] and 102 not in talked[talked.index(104) :]


def test_the_server_app_leaves_a_word_of_its_end(bench):
    setting = small(cycles=1, tail=0)
    place = bench.place(setting)
    said = flower.run_config(setting, NOTEBOOK, place, wait=5.0)
    flower.server_app(grid_of(place, setting), Context(7, 0, {}, RecordDict(), said))
    assert json.loads((place / "server" / "ended-7.json").read_text()) == {"error": ""}
    assert rows_of(setting, place / "server" / "runs").query("client == 'server'")["steps"].tolist() == [3 * 2]
    other = flower.run_config(setting.replace(clients=4), NOTEBOOK, place)
    with pytest.raises(ValueError, match="was dealt with clients = 3"):
        flower.server_app(grid_of(place, setting), Context(8, 0, {}, RecordDict(), other))
    assert "was dealt with clients = 3" in json.loads((place / "server" / "ended-8.json").read_text())["error"]


# --- what travels -----------------------------------------------------------------------------------------------------

TASK = {
    "config": str,
    "notebook": str,
    "method": str,
    "seed": int,
    "cycle": int,
    "round": int,
    "classes": str,
    "turn": str,
}
MODEL = "the model"  # arrays whose names are checked against a detector's
MEMORY = "an optimiser's state"
# Everything that may be in a message: records by name, their entries and the type of each; those marked ? may lack.
MAY_SAY = {
    "to query.hello": {"task": TASK},
    "from query.hello": {"said": {"name": str, "torch": str, "person": str}, "counts": {"images": int, "judges": int}},
    "to query.score": {"task": TASK, "arrays?": MODEL},
    "from query.score": {"counts": {"waiting": int, "picked": int, "scores?": (list, float), "detected?": (list, int)}},
    "to query.label": {"task": TASK},
    "from query.label": {
        "counts": {"images": int, "boxes": int, "seconds": float, "histogram": (list, int)},
        "said?": {"ids": (list, str), "why": (list, float)},
    },
    "to train": {"task": TASK, "arrays?": MODEL, "memory?": MEMORY},
    "from train": {
        "arrays": MODEL,
        "memory?": MEMORY,
        "counts": {"images": int, "boxes": int, "equal": int, "steps": int, "loss": float},
    },
    "to evaluate": {"task": TASK, "arrays": MODEL},
    "from evaluate": {"counts": {"images": int, "boxes": int, "ap50": float}},
}


def kind_of(message: Message) -> str:
    way = "from" if message.metadata.dst_node_id == SUPERLINK_NODE_ID else "to"
    return f"{way} {message.metadata.message_type}"


def shape_of(message: Message) -> tuple[str, dict]:
    """Of a message: to or from a client and which; records, their entries and the types of these; of arrays, names."""
    shape: dict = {}
    for name, content in message.content.items():
        if isinstance(content, ArrayRecord):
            shape[name] = {entry.rpartition(":")[0] for layout in content for entry in layout.split(";")}
        else:
            shape[name] = {
                key: (list, *{type(item) for item in value}) if isinstance(value, list) else type(value)
                for key, value in content.items()
            }
    return kind_of(message), shape


def unlike(found: Mapping, allowed: Mapping) -> set[str]:
    """Entries that may not be, or must be and are not."""
    names = {name.rstrip("?"): name for name in allowed}
    return (found.keys() - names.keys()) | {key for key, name in names.items() if key == name and key not in found}


@pytest.mark.parametrize("case", [*CASES, "overheard"])
def test_messages_hold_what_they_may_and_nothing_else(case, overheard):
    if case not in WATCHED:
        pytest.skip("its run was not asked for")
    setting = overheard[0] if case == "overheard" else small(**CASES[case])
    model = alfl.build(setting, 3, torch.Generator().manual_seed(0))
    whole = set(federation.sent_keys(model))
    model.freeze_backbone()
    head = set(federation.sent_keys(model))
    assert head < whole
    for kind, shape in WATCHED[case]:
        allowed = {name.rstrip("?"): what for name, what in MAY_SAY[kind].items()}
        assert not unlike(shape, MAY_SAY[kind]), (kind, shape)
        for name, entries in shape.items():
            if allowed[name] == MODEL:
                assert entries in ((whole, head) if setting.methods[0].startswith("chain") else (whole,))
            elif allowed[name] == MEMORY:
                assert {entry.partition(":")[2] for entry in entries} <= {*whole, ""}
            else:
                assert not unlike(entries, allowed[name]), (kind, name, entries)
                may = {key.rstrip("?"): what for key, what in allowed[name].items()}
                assert all(entries[key] in (may[key], (list,)) for key in entries), (kind, name, entries)
    said = [kind for kind, _ in WATCHED[case]]
    judged = {"to evaluate", "from evaluate"}
    assert set(said) == set(MAY_SAY) - (set() if case == "overheard" else judged), "every kind of message was seen"
    with_memory = {kind for kind, shape in WATCHED[case] if "memory" in shape}
    expected = {"to train", "from train"} if case in ("accumulate", "fedavgm") else set()
    assert with_memory == expected


def words(raw: bytes, offset: int = 0) -> np.ndarray:
    """Little-endian 64-bit words of these bytes from an offset on."""
    return np.frombuffer(raw, "<u8", (len(raw) - offset) // 8, offset)


def occurring(patterns: Iterable[bytes], raw: bytes) -> set[bytes]:
    """Those patterns (of 8 bytes or more) that occur in the bytes, wherever they begin."""
    by_word: dict[int, list[bytes]] = {}
    for pattern in patterns:
        by_word.setdefault(int(words(pattern[:8])[0]), []).append(pattern)
    mix = np.uint64(0x9E3779B97F4A7C15)
    wanted = np.fromiter(by_word, "<u8", len(by_word))
    table = np.zeros(1 << 22, dtype=bool)
    table[(wanted * mix) >> np.uint64(42)] = True
    found = set()
    for offset in range(min(8, max(0, len(raw) - 7))):
        there = words(raw, offset)
        for place in np.flatnonzero(table[(there * mix) >> np.uint64(42)]):
            start = offset + 8 * int(place)
            found |= {p for p in by_word.get(int(there[place]), ()) if raw[start : start + len(p)] == p}
    return found


def pixel_patterns(pixels: np.ndarray, run: int = 64) -> set[bytes]:
    """8 bytes out of any `run` consecutive pixel bytes of a row, (3, H, W) by colours and by pixels; no flat ones."""
    step, found = run - 8 + 1, set()
    for rows in (pixels.reshape(-1, pixels.shape[2]), pixels.transpose(1, 2, 0).reshape(pixels.shape[1], -1)):
        for row in rows:
            for start in range(0, len(row) - 7, step):
                piece = row[start : start + 8]
                if len(set(piece.tolist())) >= 4:
                    found.add(piece.tobytes())
    return found


def box_patterns(part) -> set[bytes]:
    """Whole boxes as bytes of float32 and float64, corners or corner and sides, and as text of JSON."""
    found = set()
    for i, j in torch.nonzero(part.labels.classes).tolist():
        x1, y1, x2, y2 = part.labels.boxes[i, j].tolist()
        for box in ([x1, y1, x2, y2], [x1, y1, x2 - x1, y2 - y1]):
            found |= {np.array(box, dtype).tobytes() for dtype in ("<f4", "<f8", "<i4", "<i8")}
            for numbers in (box, [int(v) for v in box]):
                found |= {json.dumps(numbers, separators=(comma, ":"))[1:-1].encode() for comma in (", ", ",")}
    return {pattern for pattern in found if len(pattern) >= 8}


@pytest.fixture(scope="module")
def overheard(bench):
    """A whole run with rows of 64 pixels, clients with test images, 02 anonymous: (setting, place, root of the run
    folders, all bytes by kind of message, tasks)."""
    setting = small(methods=("avg",), image_size=(64, 64), tail=0, iterations=1)
    place, seen = bench.place(setting, tests=True), WATCHED.setdefault("overheard", [])
    raw: dict[str, set[bytes]] = {}
    tasks: list[tuple[str, ConfigRecord]] = []

    def tap(message: Message, objects: dict[str, bytes]) -> None:
        raw.setdefault(kind_of(message), set()).update(objects.values())
        seen.append(shape_of(message))
        if "task" in message.content:
            tasks.append((message.metadata.message_type, message.content["task"]))

    root = elsewhere(setting, place, tap=tap, nodes={"02": {"anonymous": True}})
    return setting, place, root, {kind: b"\n".join(sorted(parts)) for kind, parts in raw.items()}, tasks


def everybody(place: Path, setting: config.Config) -> list:
    """All sets of a place; the clients' test images are the server's."""
    folders = [*(place / "clients").iterdir(), place / "server" / "start", place / "server" / "test"]
    return [homes.read_set(folder, setting, ("0", "1", "2")) for folder in sorted(folders)]


def test_no_image_is_in_any_message(overheard):
    setting, place, _, raw, _ = overheard
    everything = b"\n".join(raw[kind] for kind in sorted(raw))
    parts = everybody(place, setting)
    assert sum(len(part) for part in parts) == 46 + 6 and len(everything) > 5e6
    patterns: set[bytes] = set()
    for part in parts:
        pixels = part.images.batch(range(len(part))).numpy()
        for image in pixels:
            own = pixel_patterns(image)
            assert len(own) > 3 * 64, "nearly all rows of each image can be told"
            patterns |= own
    assert occurring(patterns, everything) == set()
    image = parts[0].images.batch([3])[0].numpy()
    for planted in (image[1, 20], image.transpose(1, 2, 0).reshape(64, -1)[20][37 : 37 + 64]):
        assert occurring(patterns, everything[:99_999] + planted.tobytes() + everything[-99_999:]), "it would be found"
    for name in (b"\x89PNG", b"IHDR", b"JFIF"):
        assert name not in everything


def test_no_box_of_an_annotation_is_in_any_message(overheard):
    setting, place, _, raw, _ = overheard
    everything = b"\n".join(raw[kind] for kind in sorted(raw))
    patterns = set().union(*(box_patterns(part) for part in everybody(place, setting)))
    assert len(patterns) > 8 * 100
    assert occurring(patterns, everything) == set()
    planted = everything[:77_777] + b"-".join(patterns) + everything[-77_777:]
    assert occurring(patterns, planted) == patterns, "each of them would be found"


def test_ids_are_in_answers_of_who_labelled_and_not_under_anonymous(overheard):
    setting, place, root, raw, _ = overheard
    asked = record.queries(setting, NOTEBOOK, root=root)
    for name in ("00", "01", "02"):
        own = {sample.encode() for sample in homes.read_set(place / "clients" / name, setting).images.ids}
        mine = asked[asked["client"] == name]["id"]
        assert len(mine) == 6
        told = {kind for kind, content in raw.items() for sample in own if sample in content}
        if name == "02":
            assert told == set() and mine.str.fullmatch(r"02/\d+").all()
        else:
            assert told == {"from query.label"} and {sample.encode() for sample in mine} <= own
            unasked = own - {sample.encode() for sample in mine}
            assert unasked and not any(sample in raw["from query.label"] for sample in unasked)
    for content in raw.values():
        assert str(place).encode() not in content, "nor where a client keeps them"


def test_the_seed_and_the_whole_config_come_with_each_message(overheard):
    setting, _, _, _, tasks = overheard
    assert {kind for kind, _ in tasks} == {"query.hello", "query.score", "query.label", "train", "evaluate"}
    for kind, task in tasks:
        assert task["seed"] == 0 and (task["notebook"], task["method"]) == (NOTEBOOK, "avg")
        assert config.Config.of(**json.loads(task["config"])) == setting, kind
    assert [(t["cycle"], t["round"]) for kind, t in tasks if kind == "train"] == [(0, 0)] * 3 + [(1, 0)] * 3


# --- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "nan": ((0, 0), "not finite"),
    "shape": ((0, 1), "wrong shape"),
    "huge": ((1, 0), "too large"),
    "fail": ((1, 1), "failed"),
}
DRILLED = dict(methods=("avg",), max_update_ratio=5.0, rounds=2)


@pytest.fixture(scope="module")
def drilled(bench):
    setting = small(**DRILLED)
    faults = ", ".join(f"{kind}@{cycle}.{round}" for kind, ((cycle, round), _) in FAULTS.items())
    nodes = {"01": {"faults": faults}}
    return setting, elsewhere(setting, bench.place(setting), kind=secure.InProcess, nodes=nodes)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_costs_the_round_that_client_and_nothing_else(kind, drilled):
    setting, root = drilled
    (cycle, round), status = FAULTS[kind]
    rows, plan = rows_of(setting, root), alfl.plan(setting, "avg")
    faulty, later = (
        rows[(rows["cycle"] == c) & (rows["round"] == r)].set_index("client")
        for c, r in ((cycle, round), plan[plan.index((cycle, round)) + 1])
    )
    assert faulty["status"].to_dict() == {"00": "", "02": "", "01": status, "server": ""}
    assert faulty["steps"].to_dict() == {"00": 2, "02": 2, "01": 0, "server": 4}
    assert faulty.loc["01", "bytes_up"] == 0 and math.isnan(faulty.loc["01", "loss"])
    assert later.loc["01", "steps"] == (2 if later.loc["01", "status"] == "" else 0)


def test_what_is_left_of_a_faulty_round_is_the_plain_loop_without_that_client(drilled, bench):
    setting, root = drilled
    without = {when: {"01": status} for when, status in FAULTS.values()}
    assert_same(setting, root, bench.plain(setting, without=without))
    last = rows_of(setting, root).query("cycle == 1 and round == 2").set_index("client")
    assert last["steps"].to_dict() == {"00": 2, "01": 2, "02": 2, "server": 6}


@pytest.mark.parametrize("kind", ["fail", "nan", "huge"])
def test_a_fault_can_stop_the_run_and_says_whose_it_was_and_when(kind, bench):
    setting = small(on_failure="stop", too_large=5.0, cycles=1, tail=0)
    what = {"nan": "not finite", "huge": "too large", "fail": "a drill: this client fails"}
    place = bench.place(setting)
    with pytest.raises(ClientLost, match=rf"client 01: .*{what[kind]}.*on_failure='skip' goes on") as caught:
        elsewhere(setting, place, nodes={"01": {"faults": f"{kind}@0.0"}})
    assert "in cycle 0, round 0" in str(caught.value)
    assert not (folder_of(setting, place / "server" / "runs", "random") / "rounds.csv").exists()


def test_a_round_in_which_everybody_fails_leaves_the_model_as_it_was(bench):
    setting = small(cycles=1, iterations=1)
    place = bench.place(setting)
    elsewhere(setting, place, nodes={name: {"faults": "fail@0.1"} for name in ("00", "01", "02")})
    without = {(0, 1): dict.fromkeys(("00", "01", "02"), "failed")}
    assert_same(setting, place / "server" / "runs", bench.plain(setting, without=without))
    rows = rows_of(setting, place / "server" / "runs").query("round == 1").set_index("client")
    assert rows["status"].to_dict() == {"00": "failed", "01": "failed", "02": "failed", "server": ""}


class Away(Rounds):
    """Client 01 is not there in the first round of the second cycle."""

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node != 102 or self.now != (1, 0)]


class Latecomer(Rounds):
    """Client 01 comes in the second cycle of the first method."""

    def get_node_ids(self):
        late = self.method == "random" and self.now < (1, 0)
        return [node for node in super().get_node_ids() if node != 102 or not late]


def test_who_comes_when_the_run_has_begun_is_asked_from_then_on_and_in_the_next_method(bench):
    setting = small(methods=("random", "avg"), clients=2, tail=0, iterations=1)
    rows = rows_of(setting, elsewhere(setting, bench.place(setting), wait=0.1, kind=Latecomer)).query("client == '01'")
    assert rows["method"].tolist() == ["random", "random", "avg", "avg"]
    assert rows["status"].tolist() == ["no labels", "", "", ""] and rows["images"].tolist() == [0, 3, 3, 6]


def test_who_comes_while_the_server_is_down_is_asked_when_it_goes_on(bench, monkeypatch):
    setting, original = small(clients=2), alfl.commit
    place = bench.place(setting)

    def commit(*rest, **named):
        original(*rest, **named)
        raise BrokenOff

    with monkeypatch.context() as patch, pytest.raises(BrokenOff):
        patch.setattr(alfl, "commit", commit)
        elsewhere(setting, place, wait=0.1, kind=Latecomer)
    assert_same(setting, elsewhere(setting, place), bench.plain(setting, unasked=[(0, "01")]))


def lost_at(*places: tuple[str, int, int]) -> Callable[[Message], bool]:
    """Loses train messages 'to' and 'from' client 01 in these (direction, cycle, round)."""
    last: list[int] = [0, 0]

    def lose(message: Message) -> bool:
        way, _, kind = kind_of(message).partition(" ")
        nodes = (message.metadata.src_node_id, message.metadata.dst_node_id)
        if kind != "train" or 102 not in nodes:
            return False
        if way == "to":
            last[:] = message.content["task"]["cycle"], message.content["task"]["round"]
        return (way, *last) in places

    return lose


def test_no_answer_and_nobody_there_are_told_apart_and_the_client_comes_back(bench):
    """In the round in which it is away it is not asked either, and trains later on what it had."""
    setting = small(tail=3, clients=2, iterations=1)
    lose = lost_at(("from", 0, 0), ("to", 1, 2))
    root = elsewhere(setting, bench.place(setting), timeout=0.3, kind=Away, lose=lose)
    without = {(0, 0): {"01": "no answer"}, (1, 0): {"01": "away"}, (1, 2): {"01": "no answer"}}
    assert_same(setting, root, bench.plain(setting, without=without, unasked=[(1, "01")]))
    rows = rows_of(setting, root).query("client == '01'")
    assert rows["status"].tolist() == ["no answer", "away", "", "no answer", ""]
    assert rows["steps"].tolist() == [0, 0, 1, 0, 1] and rows["images"].tolist() == [3] * 5


def test_no_answer_ends_the_waiting_in_time_and_names_the_client(bench):
    setting = small(on_failure="stop")
    grid = grid_of(bench.place(setting), setting, lose=lambda message: kind_of(message) == "to query.label")
    answers, lost = line_to(grid, timeout=0.2).exchange(flower.LABEL, {"01": {"task": task_of(setting).record()}})
    assert answers == {} and lost["01"].status == "no answer"
    assert str(lost["01"]) == "client 01: no answer within 0 s (query.label)"


def test_too_few_updates_for_the_malicious_clients_leave_the_model_as_it_was(bench):
    """Two of three clients cannot outvote a liar; on_failure='stop' ends the run with the reason."""
    setting = small(server="krum", cycles=1, rounds=2, tail=0)
    faults = {"02": {"faults": "fail@0.1"}}
    root = elsewhere(setting, bench.place(setting), nodes=faults)
    rows = rows_of(setting, root).query("client == 'server'")
    assert len(rows) == 2 and rows["steps"].iloc[1] < rows["steps"].iloc[0]
    with pytest.raises(RuntimeError, match="client 02: .*on_failure='skip' goes on without it"):
        elsewhere(setting.replace(on_failure="stop"), bench.place(setting), nodes=faults)
    lone = flower.Merging(setting)
    with pytest.raises(ValueError, match="server 'krum' bears malicious=1 of 3 clients or more, not of 2"):
        lone.average(1, BEFORE, [sent("00", a=[1.0, 2.0], b=3.0), sent("01", a=[1.0, 2.0], b=3.0)])


def test_who_never_comes_is_named(bench):
    setting = small()
    stop, place = setting.replace(on_failure="stop"), bench.place(setting)
    grid = grid_of(place, setting)
    with pytest.raises(TimeoutError, match="clients 03, 04 did not come within 0 s"):
        flower.Line(grid).meet(task_of(stop), ["00", "01", "02", "03", "04"], wait=0.3)
    nobody = secure.InProcess(flower.client_app, {})
    for each in (setting, stop):
        with pytest.raises(TimeoutError, match="clients 00, 01 did not come within 0 s"):
            flower.Line(nobody).meet(task_of(each), ["00", "01"], wait=0.1)
    line = flower.Line(grid)
    held = line.meet(task_of(setting), ["00", "01", "02", "03"], wait=0.3)
    assert held == {"00": 11, "01": 11, "02": 10} and line.nodes == {"00": 101, "01": 102, "02": 103}


def test_two_nodes_of_one_name_are_refused(bench):
    setting = small()
    grid = grid_of(bench.place(setting), setting, nodes={"02": {"name": "00"}})
    with pytest.raises(ValueError, match="two nodes say that they are client '00': give one of them another name"):
        flower.Line(grid).meet(task_of(setting), ["00", "01", "02"], wait=0.3)


def test_a_client_with_classes_that_nobody_knows_is_refused_at_the_greeting(bench):
    setting = small()
    grid = grid_of(bench.place(setting), setting)
    task = dataclasses.replace(task_of(setting), classes=("0", "1", "7"))
    with pytest.raises(ValueError, match=r"node 10\d cannot take part: .*has objects of class '2'; .*knows 0, 1, 7"):
        flower.Line(grid).meet(task, ["00", "01", "02"], wait=0.3)


@pytest.mark.parametrize("said", ["explode@0.0", "nan@0.0, freeze@1.0"])
def test_a_drill_that_is_misspelt_is_refused(said, task_identity):
    message = Message(RecordDict({"task": task_of(small(), 0, 1).record()}), 101, flower.TRAIN)
    with pytest.raises(ValueError, match=r"faults must be of \('fail', 'hang', 'nan', 'shape', 'huge'\)"):
        flower.drill(message, Context(1, 101, {"faults": said}, RecordDict(), {}), lambda *_: pytest.fail("it trains"))


class Answering:
    """A line on which client 00 answers whatever it is told to."""

    def __init__(self, answer: RecordDict):
        self.answer, self.timeout = answer, 1.0

    def exchange(self, kind, contents):
        return {"00": self.answer}, {}


def packed(values: np.ndarray | Array, layout: str) -> ArrayRecord:
    return ArrayRecord({layout: values if isinstance(values, Array) else Array(values)})


COUNTS = {"images": 3, "boxes": 6, "equal": 1, "steps": 2, "loss": 1.5}
FOUR = np.zeros(4, np.float32)
UNREADABLE = {
    "no weights": {"counts": MetricRecord(COUNTS)},
    "no counts": {"arrays": packed(FOUR, "a:4")},
    "no steps": {"arrays": packed(FOUR, "a:4"), "counts": MetricRecord({"loss": 1.0})},
    "a list of losses": {"arrays": packed(FOUR, "a:4"), "counts": MetricRecord({**COUNTS, "loss": [1.0, 2.0]})},
    "too few values": {"arrays": packed(FOUR, "a:5"), "counts": MetricRecord(COUNTS)},
    "sides below zero": {"arrays": packed(FOUR, "a:-2x-2"), "counts": MetricRecord(COUNTS)},
    "a part below zero": {"arrays": packed(FOUR, "a:-2;b:6"), "counts": MetricRecord(COUNTS)},
    "no layout": {"arrays": packed(FOUR, "weights"), "counts": MetricRecord(COUNTS)},
    "text": {"arrays": packed(np.array(["x", "y"]), "a:2"), "counts": MetricRecord(COUNTS)},
    "rubbish": {
        "arrays": packed(Array("float32", (4,), "numpy.ndarray", b"rubbish"), "a:4"),
        "counts": MetricRecord(COUNTS),
    },
    "nothing": {"arrays": packed(Array("float32", (4,), "numpy.ndarray", b""), "a:4"), "counts": MetricRecord(COUNTS)},
    "another kind": {"arrays": packed(Array("float32", (4,), "torch", b"1234"), "a:4"), "counts": MetricRecord(COUNTS)},
}


def answered(answer: Mapping) -> Update | ClientLost:
    """What the server makes of a train answer of client 00."""
    run = record.Run(small(), NOTEBOOK, "random", 0, plan=alfl.plan)
    client = alfl.Client("00", homes.Told("00", 3))
    client.pool.tell(0, Bill(7, 9, 77.0), [9, 0, 0], [])
    message = federation.pack({"a": torch.zeros(4)})
    line = Answering(RecordDict(dict(answer)))
    study = dataclasses.make_dataclass("Study", ["class_names"])(("0", "1", "2"))
    return flower.sender(run, study, 0, 1, line, flower.Given())([client], message, Turn((client,)))["00"]


@pytest.mark.parametrize("what", UNREADABLE)
def test_an_answer_that_cannot_be_read_is_that_clients_fault_and_no_error_of_the_server(what):
    lost = answered(UNREADABLE[what])
    assert isinstance(lost, ClientLost) and lost.status == "unreadable"
    assert str(lost).startswith("client 00: its update cannot be read: ") and "in cycle 0, round 1" in str(lost)


def test_an_answer_is_weighed_by_the_labels_that_the_server_knows_of():
    good = {"arrays": packed(FOUR + 2, "a:4"), "counts": MetricRecord({**COUNTS, "images": 10**9, "boxes": 10**9})}
    update = answered(good)
    assert (update.images, update.boxes, update.steps, update.loss) == (7, 9, 2, 1.5)
    assert federation.unpack(update.payload)["a"].tolist() == [2.0] * 4
    for broken in ({"arrays": packed(FOUR * np.nan, "a:4")}, {"counts": MetricRecord({**COUNTS, "loss": math.nan})}):
        lost = answered({**good, **broken})
        assert isinstance(lost, ClientLost) and lost.status == "not finite"


# --- a person at the page ---------------------------------------------------------------------------------------------


def test_a_human_who_labels_as_the_simulated_one_would_gives_the_same_bytes(bench):
    """She answers while the server waits; it asks again until she is done."""
    setting = small(**CASES["avg"])
    place, waits = bench.place(setting), []

    def tap(message: Message, _) -> None:
        if kind_of(message) != "from query.label" or "unanswered" not in message.content["counts"]:
            return
        assert set(message.content) == {"counts", "said"} and set(message.content["said"]) == {"why"}
        waits.append(message.metadata.src_node_id)
        home = homes.Home(place / "clients" / "01", "01")
        run, study = home.run(setting, NOTEBOOK, "avg", 0), home.study(setting, ("0", "1", "2"), "cpu")
        with contextlib.closing(home.answers(run, study).store) as store:
            home.answers(run, study).person.answer_all(store, "Ann")

    root = elsewhere(setting, place, timeout=0.4, patience=30.0, tap=tap, nodes={"01": {"person": "human"}})
    assert waits == [102, 102]
    assert_same(setting, root, bench.plain(setting))
    with labelling.Store(next((place / "clients" / "01").rglob("labels.sqlite")), task="boxes") as store:
        assert set(store.history()["who"]) == {"Ann"}


def test_a_human_who_does_not_answer_in_time_costs_the_cycle_her_labels(bench, capsys):
    setting = small(cycles=1, tail=0, iterations=1)
    place = bench.place(setting)
    elsewhere(setting, place, patience=0.0, nodes={"01": {"person": "human"}})
    rows = rows_of(setting, place / "server" / "runs").set_index("client")
    assert rows["status"].to_dict() == {"00": "", "01": "no labels", "02": "", "server": ""}
    assert rows["images"].to_dict() == {"00": 3, "01": 0, "02": 3, "server": 6}
    assert "client 01 (unanswered): client 01: its questions wait for a person" in capsys.readouterr().out


# --- a message's parts ------------------------------------------------------------------------------------------------

tensors = st.tuples(
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8]),
)
names = st.text("abc.:_0", min_size=1, max_size=6)


def state_from(shapes: Mapping[str, tuple[list[int], torch.dtype]], seed: int = 0) -> State:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=rng, dtype=torch.float64) * 100).abs().to(dtype)
        for name, (shape, dtype) in shapes.items()
    }


@given(st.dictionaries(names, tensors, max_size=6))
def test_any_state_comes_back_in_its_precision_and_its_shapes(shapes):
    state = state_from(shapes)
    arrays = flower.arrays_from(state)
    assert len(arrays) == len({dtype for _, dtype in shapes.values()}), "one array for each kind of number"
    again = flower.state_of(arrays)
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert again[name].dtype == value.dtype and again[name].shape == value.shape
        assert torch.equal(again[name], value)


def test_a_packed_state_travels_in_the_precision_in_which_it_was_packed():
    state = {"w": torch.tensor([[1.0, 1 / 3], [70000.0 / 3, -0.0]]), "scale": torch.tensor(2.5), "none": torch.ones(0)}
    for wire, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        arrays = flower.arrays_of(federation.pack(state, wire))
        assert list(arrays) == ["w:2x2;scale:;none:0"]
        again = flower.state_of(arrays)
        assert all(again[key].dtype == dtype and torch.equal(again[key], state[key].to(dtype)) for key in state)
        assert federation.pack(again, wire) == federation.pack(state, wire)
    again["w"][0, 0] = 7.0
    assert flower.state_of(arrays)["w"][0, 0] == 1.0, "a copy"


@settings(max_examples=100)
@given(st.dictionaries(names, st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4), st.data())
def test_a_layout_that_lies_about_sizes_is_a_value_error(shapes, data):
    state = state_from({name: (shape, torch.float32) for name, shape in shapes.items()})
    ((layout, array),) = flower.arrays_from(state).items()
    entries = [entry.rpartition(":") for entry in layout.split(";")]
    place = data.draw(st.integers(0, len(entries) - 1))
    name, _, shape = entries[place]
    sides = [int(side) for side in shape.split("x")]
    lies = ["grow", "shrink", "negate", "word", "two dimensions", *["drop"] * (len(entries) > 1)]
    lie = data.draw(st.sampled_from(lies))
    if lie == "grow":
        sides[0] += data.draw(st.integers(1, 10**12))
    elif lie == "shrink":
        sides[0] -= 1
    elif lie == "negate":
        sides[0] *= -1
        sides += [-1]  # the product is what it was
    entries[place] = (name, ":", "x".join(map(str, sides)) + ("y" if lie == "word" else ""))
    if lie == "drop":
        del entries[place]
    values = array.numpy().reshape(1, -1) if lie == "two dimensions" else array.numpy()
    with pytest.raises(ValueError):
        flower.state_of(packed(values, ";".join(map("".join, entries))))


def test_a_task_says_all_that_it_said():
    setting = small(methods=("chain+sum", "avg"), missing=((0,), (1, 2)), partition="dirichlet", alpha=0.1)
    for turn in (
        Turn(()),
        Turn((), asks=True, first=True, times=0.5, visits=6, frozen=True, whole=False, state="travels", anneal=0.2),
    ):
        task = flower.Task(setting, NOTEBOOK, "chain+sum", 3, 1, 4, ("a", 'b, "c"', "ü"), turn)
        sent = ConfigRecord(json.loads(json.dumps(dict(task.record()))))
        with flower._some_task():
            assert flower.Task.of(Message(RecordDict({"task": sent}), 101, flower.TRAIN)) == task


def test_a_task_of_another_version_is_refused(task_identity):
    good = dict(task_of(small()).record())

    def refused(**changes) -> None:
        content = {key: value for key, value in {**good, **changes}.items() if value is not None}
        message = Message(RecordDict({"task": ConfigRecord(content)}), 101, flower.TRAIN)
        with pytest.raises(ValueError, match="this message is of another version of the package: "):
            flower.Task.of(message)

    for key in good:
        refused(**{key: None})
    refused(config=json.dumps({**json.loads(good["config"]), "tempo": 3}))
    refused(config=json.dumps({**json.loads(good["config"]), "rounds": "three"}))
    refused(config=json.dumps({**json.loads(good["config"]), "server_strategy": "fedmagic"}))
    refused(config="{", turn="{}")
    refused(turn=json.dumps({"speed": 2}))
    refused(turn="[1]")


def test_a_node_finds_its_home_by_its_folder_or_by_its_number(bench):
    place = bench.place(small())

    def context(run=None, **node) -> Context:
        return Context(1, 5, node, RecordDict(), {"place": str(place), **(run or {})})

    one = flower.home_of(context(folder=str(place / "clients" / "01"), name="Ann", person="human", anonymous=True))
    assert one == homes.Home(place / "clients" / "01", "Ann", "human", True)
    assert flower.home_of(context(**{"partition-id": 2})) == homes.Home(place / "clients" / "02", "02")
    with pytest.raises(ValueError, match="3 clients were dealt, but this is number 3 of the nodes"):
        flower.home_of(context(**{"partition-id": 3}))
    with pytest.raises(ValueError, match="the node's configuration names no folder"):
        flower.home_of(context())


def test_a_home_with_test_images_of_its_own_judges_a_model_there(bench):
    """As the server judges on the same images; a home without any says that there are none."""
    setting = small(start_iterations=30)
    place = bench.place(setting)
    study = homes.server_study(place, setting)
    homes.write_set(place / "clients" / "01" / "test", study.test)
    run = record.Run(setting, NOTEBOOK, "random", 0, place / "server" / "runs", alfl.plan)
    _, model = flower.start(run, study, ["00"], {})
    expected = alfl.judge(study, model)["ap50"]
    message = {"task": task_of(setting).record(), "arrays": flower.arrays_of(alfl.broadcast(model, "average", "fp32"))}
    answers, lost = line_to(grid_of(place, setting)).exchange(flower.EVALUATE, {"00": message, "01": message})
    assert lost == {} and dict(answers["00"]["counts"]) == {"images": 0}
    boxes = int(study.test.labels.valid.sum())
    assert dict(answers["01"]["counts"]) == {"images": 6, "boxes": boxes, "ap50": expected} and expected > 0


def test_clients_judge_the_servers_model_whatever_of_it_travelled_to_train(bench, monkeypatch):
    """A chain's later visits carry the head alone, and the next visitor has not had the merged backbone yet."""
    setting = small(**CASES["chain"])
    place, original, wrong = bench.place(setting, tests=True), alfl.commit, []
    tests = {name: homes.read_set(place / "clients" / name / "test", setting) for name in ("00", "01")}
    assert sorted(sum((list(part.images.ids) for part in tests.values()), [])) == [f"test-{i:05d}" for i in range(6)]

    def commit(run, study, model, clients, *rest):
        for client in clients:
            own = dataclasses.replace(study, test=tests[client.name])
            wrong.append(client.judged["ap50"] - alfl.judge(own, model)["ap50"])
        return original(run, study, model, clients, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(alfl, "commit", commit)
        root = elsewhere(setting, place)
    assert wrong == [0.0] * (2 * 7)
    rows = rows_of(setting, root).query("client != 'server'")
    assert rows["ap50"].notna().all() and rows["ap50"].nunique() > 3
    for name in ("rounds", "asked"):  # a judge moves nothing else
        one, two = (
            pd.read_csv(folder_of(setting, where, "chain+sum") / f"{name}.csv", dtype={"client": str})
            for where in (root, bench.plain(setting))
        )
        one = one.assign(ap50=one["ap50"].where(one["client"] == "server")) if name == "rounds" else one
        pd.testing.assert_frame_equal(one[two.columns], two, check_exact=True)


# --- one model of many ------------------------------------------------------------------------------------------------


def sent(client: str, images: int = 1, boxes: int = 1, **entries) -> Update:
    payload = federation.pack({name: torch.tensor(value) for name, value in entries.items()})
    return Update(client, payload, images, boxes, steps=1, loss=0.5)


def merged(setting: config.Config, before: State, updates: list[Update], number: int = 1) -> dict[str, list]:
    state = flower.Merging(setting).average(number, before, updates)
    return {name: value.tolist() for name, value in state.items()}


BEFORE = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}


@pytest.mark.parametrize("by", ["images", "boxes", "equal"])
def test_flowers_fedavg_is_the_average_of_federation_bit_for_bit(by):
    rng = torch.Generator().manual_seed(5)
    updates = [
        Update(
            name,
            federation.pack({"w": torch.randn(999, generator=rng), "s": torch.randn((), generator=rng)}),
            images,
            boxes,
            1,
            0.1,
        )
        for name, images, boxes in (("b", 3, 17), ("c", 7, 2), ("a", 11, 5))
    ]
    expected = federation.average(updates, by)
    before = {key: torch.zeros_like(value) for key, value in expected.items()}
    for order in (updates, updates[::-1]):
        assert same_state(flower.Merging(small(weights=by)).average(1, before, order), expected)
    flowers_own = flower.strategies.FedAvg.aggregate_train
    assert flower.Ordered.aggregate_train is not flowers_own
    assert TaskIdentity._run_id is None, "the plain loop has no task, and has none afterwards"


ABSURD = sent("d", 10**6, 10**6, a=[1e8, -1e8], b=1e8)


def test_fedmedian_by_hand():
    """Of each entry the middle of 1, 2, 4 and an absurd value: of four, half way between the two in the middle."""
    three = [sent("a", 5, a=[1.0, 4.0], b=2.0), sent("b", a=[2.0, 1.0], b=4.0), sent("c", a=[4.0, 2.0], b=1.0)]
    assert merged(small(server="fedmedian"), BEFORE, three) == {"a": [2.0, 2.0], "b": 2.0}
    assert merged(small(server="fedmedian"), BEFORE, [*three, ABSURD]) == {"a": [3.0, 1.5], "b": 3.0}


def test_fedtrimmedavg_by_hand():
    """malicious=1: the largest and the smallest value of each entry go, the mean of the rest stays, whoever sent it."""
    three = [sent("a", 5, a=[1.0, 4.0], b=2.0), sent("b", a=[2.0, 1.0], b=4.0), sent("c", a=[4.0, 2.0], b=1.0)]
    setting = small(server="fedtrimmedavg", malicious=1)
    assert merged(setting, BEFORE, three) == {"a": [2.0, 2.0], "b": 2.0}
    assert merged(setting, BEFORE, [*three, ABSURD]) == {"a": [3.0, 1.5], "b": 3.0}
    five = [*three, ABSURD, sent("e", a=[6.0, 6.0], b=6.0)]
    assert merged(setting, BEFORE, five) == {"a": [4.0, pytest.approx(7 / 3)], "b": 4.0}
    assert merged(small(server="fedtrimmedavg", malicious=2), BEFORE, five) == {"a": [4.0, 2.0], "b": 4.0}
    assert merged(small(server="fedtrimmedavg", malicious=0), BEFORE, three) == {
        "a": pytest.approx([7 / 3, 7 / 3]),
        "b": pytest.approx(7 / 3),
    }


def test_krum_and_multikrum_by_hand():
    """Points 0, 2, 3 and 6 on a line beside an absurd one, n - f - 2 = 2 neighbours each.

    Sums of squared distances: 4 + 9, 1 + 4, 1 + 9, 9 + 16: Krum takes the point 2; of 5 clients with one malicious,
    multi-Krum takes four, by images (1, 1, 1, 5): (0 + 2 + 3 + 5 * 6) / 8.
    """
    line = [sent(name, images, a=[x, 0.5], b=-1.0) for name, images, x in (("a", 1, 0.0), ("b", 1, 2.0), ("c", 1, 3.0))]
    everybody = [*line, ABSURD, sent("e", 5, a=[6.0, 0.5], b=-1.0)]
    for order in (everybody, everybody[::-1]):
        assert merged(small(server="krum"), BEFORE, order) == {"a": [2.0, 0.5], "b": -1.0}
        assert merged(small(server="multikrum"), BEFORE, order) == {"a": [35 / 8, 0.5], "b": -1.0}


def test_fedavgm_by_hand_over_two_rounds():
    """v <- m * v + (w - average), w <- w - lr * v; m = 0.5, lr = 0.5, v = 0 before (Hsu et al. 2019, 1909.06335, 4.3).

    w0 = 1, 2 | 3 and averages 2, 2 | 5: v = -1, 0 | -2 and w = 1.5, 2 | 4; then averages 2.5, 1 | 4:
    v = -0.5 - 1, 0 + 1 | -1 + 0 and w = 2.25, 1.5 | 4.5.
    """
    setting = small(server="fedavgm", server_momentum=0.5, server_lr=0.5)
    merging = flower.Merging(setting)
    first = [sent("a", 1, a=[5.0, -1.0], b=2.0), sent("b", 3, a=[1.0, 3.0], b=6.0)]  # by images: 2, 2 | 5
    once = merging.average(1, BEFORE, first)
    assert {k: v.tolist() for k, v in once.items()} == {"a": [1.5, 2.0], "b": 4.0}
    second = [sent("a", 1, a=[2.5, 1.0], b=4.0)]
    for going_on in (merging, flower.Merging(setting, kept=saved(merging))):
        twice = going_on.average(2, once, second)
        assert {k: v.tolist() for k, v in twice.items()} == {"a": [2.25, 1.5], "b": 4.5}


def saved(merging: flower.Merging) -> dict:
    return {name: {key: value.clone() for key, value in state.items()} for name, state in merging.state().items()}


def test_fedadam_by_hand_over_two_rounds():
    """d = average - w; m <- b1 m + (1 - b1) d; v <- 0.99 v + 0.01 d^2; w <- w + eta_t m / (sqrt(v) + 0.001) with
    eta_t = lr sqrt(1 - 0.99^(t + 1)) / (1 - b1^(t + 1)), t = 1, 2: Flower 1.41 is one step ahead of Kingma's t.

    lr = 0.1, b1 = 0.5. First d = 1, 0 | 2: m = 0.5, 0 | 1; v = 0.01, 0 | 0.04; eta_1 = 0.0188090; w moves by
    0.0188090 * (0.5 / 0.101, 0 | 1 / 0.201). Then d = -1, 1 | 0: m = -0.25, 0.5 | 0.5; v = 0.0199, 0.01 | 0.0396;
    eta_2 = 0.1 * sqrt(0.029701) / 0.875 = 0.0196961; w moves by 0.0196961 * (-0.25 / 0.142067, 0.5 / 0.101 |
    0.5 / 0.199997).
    """
    setting = small(server="fedadam", server_momentum=0.5, server_lr=0.1)
    merging = flower.Merging(setting)
    once = merging.average(1, BEFORE, [sent("a", a=[2.0, 2.0], b=5.0)])
    assert once["a"].tolist() == pytest.approx([1.0931138, 2.0], abs=1e-6)
    assert once["b"].item() == pytest.approx(3.0935771, abs=1e-6)
    a, b = once["a"].tolist(), once["b"].item()
    for going_on in (flower.Merging(setting, kept=saved(merging)), merging):
        twice = going_on.average(2, once, [sent("a", a=[a[0] - 1, a[1] + 1], b=b)])
        assert twice["a"].tolist() == pytest.approx([a[0] - 0.0346599, a[1] + 0.0975056], abs=1e-6)
        assert twice["b"].item() == pytest.approx(b + 0.0492411, abs=1e-6)


@pytest.mark.parametrize("server", ["fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedmedian", "krum"])
def test_what_a_server_remembers_survives_its_resume_point_bit_for_bit(server, tmp_path):
    setting = small(server=server, methods=("random",))
    rng = torch.Generator().manual_seed(1)

    def round_of(number: int) -> list[Update]:
        values = torch.randn(3, 3, generator=rng).tolist()
        return [sent(name, 1 + number, a=value[:2], b=value[2]) for name, value in zip("abc", values, strict=True)]

    rounds = [round_of(number) for number in range(4)]

    def run(broken: bool) -> State:
        merging, state = flower.Merging(setting), BEFORE
        for number, updates in enumerate(rounds, start=1):
            state = merging.average(number, state, updates)
            if broken:
                torch.save({"server_strategy": merging.state()}, tmp_path / "state.pt")
                merging = flower.Merging(setting, torch.load(tmp_path / "state.pt", weights_only=True)["server"])
        return state

    assert same_state(run(True), run(False))
    assert (flower.Merging(setting).state() == {}) and BEFORE["a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("server", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_no_variance_of_batchnorm_falls_below_zero(server):
    """A server's step goes on where the clients have stopped: below zero there is no standard deviation."""
    merging, state = flower.Merging(small(server=server, server_lr=0.5)), {"norm.running_var": torch.tensor([1.0, 1.0])}
    for number in range(1, 7):
        payload = federation.pack({"norm.running_var": torch.tensor([0.01, 2.0])})
        state = merging.average(number, state, [Update("a", payload, 1, 1, 1, 0.1)])
        assert (state["norm.running_var"] >= 0).all(), number
    assert state["norm.running_var"][1] > 1


@pytest.mark.parametrize("server", ["fedtrimmedavg", "krum", "multikrum"])
def test_too_few_clients_for_the_malicious_ones_are_refused(server):
    for bad in (1, 2):
        setting = small(server=server, malicious=bad)
        flower.strategy_of(setting, 2 * bad + 1)
        with pytest.raises(ValueError, match=rf"'{server}' bears malicious={bad} of {2 * bad + 1} clients or more, "):
            flower.strategy_of(setting, 2 * bad)


@pytest.mark.parametrize("server", config.SERVERS)
def test_every_server_of_the_config_makes_a_model_of_equal_updates(server):
    """Of three equal updates at the place of the model, every way makes that model again."""
    setting = small(server=server, proximal=0.1)
    equal = [sent(name, a=[1.0, 2.0], b=3.0) for name in "abc"]
    assert merged(setting, BEFORE, equal) == {"a": [1.0, 2.0], "b": 3.0}


def test_a_merge_that_is_not_finite_is_refused():
    merging = flower.Merging(small(server="fedavgm", server_lr=3e38))
    text = "server 'fedavgm' made weights that are not finite in round 4"
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=text):
        merging.average(4, BEFORE, [sent("a", a=[1e3, 2.0], b=3.0)])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"classifier": "resnet8"}, "classifier='resnet8': real clients train detectors; use the plain loop"),
        ({"batch_norm": "local"}, "batch_norm='local': models are judged at the server, which has nobody's"),
        ({"batch_norm": "frozen"}, "batch_norm='frozen': the statistics are those of the starting point"),
        ({"noise": 0.5}, "noise=0.5 is added to clipped updates: set privacy='clip', not 'none'"),
        ({"methods": ("avg", "local-first+sum")}, r"method 'local-first\+sum': nothing is sent in 'local-first'"),
        ({"methods": ("centralised",)}, "method 'centralised': nothing is sent in 'centralised'"),
        ({"methods": ("sum", "centralised+sum")}, r"method 'centralised\+sum': nothing is sent"),
        ({"methods": ("model_outlier",)}, "method 'model_outlier' needs images or models that a client does not have"),
        ({"methods": ("chain+mix",)}, r"method 'chain\+mix' needs images or models that a client does not have"),
        ({"methods": ("d0",)}, "method 'd0' needs images or models that a client does not have"),
        ({"methods": ("vae_d0",)}, "method 'vae_d0' needs images or models that a client does not have"),
        (
            {"methods": ("chain+sum",), "server_strategy": "fedadam"},
            r"method 'chain\+sum': server='fedadam' is a way of averag",
        ),
        (
            {"methods": ("avg", "chain-fedavg+sum"), "server_strategy": "krum"},
            "server='krum' is a way of averaging, for scheme",
        ),
    ],
)
def test_what_real_clients_cannot_do_is_refused_before_anything_begins(changes, text, bench, tmp_path):
    setting = small(**changes)
    with pytest.raises(ValueError, match=text):
        flower.check(setting)
    with pytest.raises(ValueError, match=text):
        elsewhere(setting, bench.place(small()))


def test_what_real_clients_can_do_is_not_refused():
    refused = {"model_outlier", "mix", "d0", "vae_d0"}
    flower.check(small(methods=tuple(name for name in alfl.BOX_STRATEGIES if name not in refused)))
    flower.check(small(methods=("chain+sum", "accumulate+sum", "chain-fedavg+sum")))
    for server in config.SERVERS:
        flower.check(small(server=server, proximal=0.1, methods=("avg", "fedavg+sum")))
