"""What travels between the server and its clients, and what the server takes of an answer.

    query.hello    -                 the client's name
    query.select   task, the model   ids that it queried with their scores; images, boxes, seconds so far
    train.plain    task, the model   its weights; steps, loss (train.clipped: cut to a length by Flower's mod)

A task says which run, which step and how; an answer names the step that it is to. Images and labels are in no message.
A model travels as one flat array, named by the names and shapes of what it holds: each array costs Flower's server
requests, and a request costs milliseconds whatever its size.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from ..config import Config
from ..federation import State, Step
from ..training import STEPS

HELLO, SELECT, PLAIN, CLIPPED = "query.hello", "query.select", "train.plain", "train.clipped"
FAILED, DIVERGED, UNANSWERED = 1001, 1002, 1003  # codes of an error; Flower has others
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "sgd": ("momentum_buffer",)}  # of an optimizer state


def arrays_of(state: State) -> ArrayRecord:
    """A state as one flat array for each kind of number, named by what it holds: "conv.weight:16x3x3x3;..."."""
    kinds: dict[torch.dtype, list[str]] = {}
    for name, value in state.items():
        kinds.setdefault(value.dtype, []).append(name)
    flat = {}
    for names in kinds.values():
        layout = ";".join(f"{name}:{'x'.join(map(str, state[name].shape))}" for name in names)
        flat[layout] = Array(torch.cat([state[name].detach().cpu().flatten() for name in names]).numpy())
    return ArrayRecord(flat)


def arrays_from(payload: bytes) -> ArrayRecord:
    """A packed state as arrays, in its precision."""
    return arrays_of(torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True))


def state_of(arrays: Mapping[str, Array]) -> State:
    """The state in such arrays, in the precision in which it travelled; ValueError if names and values do not fit."""
    state: State = {}
    for layout, array in arrays.items():
        try:
            values = torch.from_numpy(np.array(array.numpy()))
            entries = [entry.rpartition(":") for entry in layout.split(";")]
            shapes = [tuple(map(int, shape.split("x"))) if shape else () for _, _, shape in entries]
        except Exception as error:  # from outside: NumPy and torch raise whatever their readers trip over
            raise ValueError(f"an array cannot be read: {type(error).__name__}") from None
        sizes = [math.prod(shape) if min(shape, default=0) >= 0 and len(shape) < 9 else -1 for shape in shapes]
        if values.ndim != 1 or min(sizes) < 0 or sum(sizes) != len(values):
            raise ValueError(f"wrong shape: an array of {tuple(values.shape)} does not hold what its name says")
        parts = zip(entries, shapes, values.split(sizes), strict=True)
        state |= {name: part.reshape(shape).clone() for (name, _, _), shape, part in parts}
    return state


def size_of(content: RecordDict) -> int:
    """Bytes of the serialised content."""

    def size(part: Any) -> int:
        return len(part.deflate()) + sum(map(size, (part.children or {}).values()))

    return size(content)


def without_paths(text: object, *folders: str | Path) -> str:
    """The text in one line of at most 300 signs, each path cut to its last part; of these folders nothing is left."""
    line = " ".join(str(text).split())
    for folder in sorted(map(str, folders), key=len, reverse=True):
        line = line.replace(folder, "...")
    line = re.sub(r"(['\"])[^'\"]*[/\\]([^'\"/\\]*)\1", r"\1\2\1", line)  # in quotes a path can have spaces
    return re.sub(r"(?:[A-Za-z]:|~|\.{1,3})?[/\\](?:[^\s'\"/\\:,;]*[/\\])*([^\s'\"/\\:,;]*)", r"\1", line)[:300]


@dataclass(frozen=True)
class Task:
    """What a message asks for, beside a model: which run, which step of it, and how.

    classes: everybody's class names, in their order. step: all of it that is not clients. labelled_in: the cycles of
    which the server has the client's queries; the client forgets others.
    """

    config: Config
    notebook: str
    method: str
    seed: int
    classes: tuple[str, ...]
    step: Step
    labelled_in: tuple[int, ...] = ()

    def record(self) -> ConfigRecord:
        step = {k: v for k, v in vars(self.step).items() if k not in ("participants", "querying")}
        told = {"config": self.config.flat(), "classes": self.classes, "step": step, "labelled_in": self.labelled_in}
        plain: dict[str, Any] = {name: json.dumps(value) for name, value in told.items()}
        plain |= {"notebook": self.notebook, "method": self.method, "seed": self.seed}
        if self.config.server.privacy == "clip":
            plain["clipping_norm"] = self.config.server.clip_norm  # where Flower's mod looks for it
        return ConfigRecord(plain)

    @classmethod
    def of(cls, sent: Mapping[str, Any]) -> Task:
        """ValueError on a task that another version of this package sent."""
        try:
            config, classes, step, cycles = (json.loads(sent[k]) for k in ("config", "classes", "step", "labelled_in"))
            plain = (sent[name] for name in ("notebook", "method", "seed"))
            return cls(Config.of(**config), *plain, tuple(classes), Step(**step), tuple(cycles))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this message is of another version of the package: {error}") from None


class Answer:
    """A client's answer, of which nothing is believed: each reader gives a value within its limits, or ValueError."""

    def __init__(self, content: RecordDict, step: Step | None = None):
        self.content = content
        if step is not None and (self.whole("cycle"), self.whole("round")) != (step.cycle, step.round):
            raise ValueError("it is an answer to another round")

    def _of(self, record: str, name: str, kind: type) -> Any:
        found = self.content.get(record)
        if found is None or type(found.get(name)) is not kind:
            raise ValueError(f"{record!r} has no {name!r}, or it is no {kind.__name__}")
        return found[name]

    def whole(self, name: str, least: int = 0, most: int = 10**9) -> int:
        if not least <= (value := self._of("counts", name, int)) <= most:
            raise ValueError(f"{name} must be in {least}..{most}, got {str(value)[:50]}")
        return value

    def real(self, name: str, least: float = -1e30, most: float = 1e30) -> float:
        if not least <= (value := self._of("counts", name, float)) <= most:  # NaN is in no range
            raise ValueError(f"{name} is {value:g}: not finite, or not in {least:g}..{most:g}")
        return value

    def name(self) -> str:
        return self._of("said", "name", str)

    def rows(self, cycle: int, client: str, allowed: Collection[str], most: int) -> list[dict[str, Any]]:
        """Rows of queries.csv: ids that the client holds and has not queried, each once, no more than granted."""
        if "said" not in self.content:
            return []
        ids, scores = self._of("said", "ids", list), self._of("said", "scores", list)
        if len(ids) != len(scores) or len(ids) > most:
            raise ValueError(f"{len(ids)} ids and {len(scores)} scores, where {most} images were granted")
        if any(type(score) is not float or math.isinf(score) for score in scores):
            raise ValueError("a score must be a number, or NaN for none: not finite")
        if (wrong := [str(id_)[:50] for id_ in ids if id_ not in allowed]) or len(set(ids)) != len(ids):
            raise ValueError(f"it queries what it does not hold or has queried: {wrong[:3] or 'an image twice'}")
        rows = zip(ids, scores, strict=True)
        return [{"cycle": cycle, "client": client, "id": id_, "score": score} for id_, score in rows]

    def state(self, like: State) -> State:
        """Weights of these names and shapes."""
        state = self._state("arrays")
        if state.keys() != like.keys() or any(state[k].shape != like[k].shape for k in like):
            raise ValueError("wrong shape: other entries, or an entry of another shape, than were sent")
        if not all(value.is_floating_point() for value in state.values()):
            raise ValueError("wrong shape: integers in the place of floats")
        return state

    def optimizer_state(self, optimizer: str, shapes: Mapping[str, torch.Size], steps: int) -> State:
        """Moments of parameters of these shapes, finite, after so many steps in all."""
        state = self._state("optimizer")
        if STEPS not in state or state[STEPS].shape or int(state[STEPS]) != steps:
            raise ValueError("its optimizer state has other steps than it took")
        for key, value in state.items():
            field, _, name = key.partition(":")
            if key == STEPS:
                continue
            if field not in MOMENTS[optimizer] or name not in shapes or not value.is_floating_point():
                raise ValueError(f"its optimizer state has an entry {key[:50]!r}")
            if value.shape != (() if field == "step" else shapes[name]):
                raise ValueError(f"wrong shape: {key[:50]!r} of its optimizer state")
            most = steps if field == "step" else 1e30
            if not bool(((value >= (-1e30 if field not in ("exp_avg_sq", "step") else 0)) & (value <= most)).all()):
                raise ValueError(f"{key[:50]!r} of its optimizer state is out of its range or not finite")
        return state

    def _state(self, name: str) -> State:
        found = self.content.get(name)
        if not isinstance(found, ArrayRecord) or not len(found):
            raise ValueError(f"it has no {name}")
        return state_of(found)
