"""What travels between the server and its clients, and what the server takes of an answer.

    query.hello    -                 the client's name
    query.select   task, the model   ids that it queried with their scores; its boxes so far
    train          task, the model   its weights; steps, loss

A task says which run, which step and how; an answer names the step that it is to. Images and labels are in no message.
"""

import io
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MessageType, RecordDict

from ..federation import State, Step

HELLO, SELECT, TRAIN = "query.hello", "query.select", MessageType.TRAIN
FAILED, DIVERGED = 1001, 1002  # codes of an error; Flower has others


def arrays_from(payload: bytes) -> ArrayRecord:
    """A packed state as Flower sends it, in its precision."""
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return ArrayRecord({name: Array(value.numpy()) for name, value in state.items()})


def state_of(arrays: Mapping[str, Array]) -> State:
    """The state in such arrays, in the precision in which it travelled."""
    try:
        return {name: torch.from_numpy(np.array(array.numpy())) for name, array in arrays.items()}
    except Exception as error:  # from outside: NumPy and torch raise whatever their readers trip over
        raise ValueError(f"wrong shape: an array cannot be read: {type(error).__name__}") from None


def without_paths(text: object, *folders: str | Path) -> str:
    """The text in one line of at most 300 signs, each path cut to its last part; of these folders nothing is left."""
    line = " ".join(str(text).split())
    for folder in sorted(map(str, folders), key=len, reverse=True):
        line = line.replace(folder, "...")
    line = re.sub(r"(['\"])[^'\"]*[/\\]([^'\"/\\]*)\1", r"\1\2\1", line)  # in quotes a path can have spaces
    return re.sub(r"(?:[A-Za-z]:|~|\.{1,3})?[/\\](?:[^\s'\"/\\:,;]*[/\\])*([^\s'\"/\\:,;]*)", r"\1", line)[:300]


class Answer:
    """A client's answer to a step, of which nothing is believed: what is read is within its limits, or ValueError."""

    def __init__(self, content: RecordDict, step: Step):
        self.content, self.step = content, step
        if [self._of("counts", name, int) for name in ("cycle", "round")] != [step.cycle, step.round]:
            raise ValueError("it is an answer to another round")

    def _of(self, record: str, name: str, kind: type) -> Any:
        found = self.content.get(record)
        if found is None or type(found.get(name)) is not kind:
            raise ValueError(f"{record!r} has no {name!r}, or it is no {kind.__name__}")
        return found[name]

    def number(self, name: str, kind: type, least: float, most: float) -> Any:
        if not least <= (value := self._of("counts", name, kind)) <= most:  # NaN is in no range
            raise ValueError(f"{name} must be in {least}..{most}, got {str(value)[:50]}")
        return value

    def rows(self, client: str, allowed: Collection[str], most: int) -> list[dict[str, Any]]:
        """Rows of queries.csv: ids that the client holds and has not queried, each once, no more than granted."""
        if "said" not in self.content:
            return []
        ids, scores = self._of("said", "id", list), self._of("said", "score", list)
        odd = any(type(score) is not float or math.isinf(score) for score in scores)  # a number, or NaN for none
        if odd or len(ids) != len(scores) or len(ids) > most:
            raise ValueError(f"{len(ids)} ids and {len(scores)} scores, or a bad one; {most} images were granted")
        if (wrong := [str(id_)[:50] for id_ in ids if id_ not in allowed]) or len(set(ids)) != len(ids):
            raise ValueError(f"it queries what it does not hold or has queried: {wrong[:3] or 'an image twice'}")
        now = {"cycle": self.step.cycle, "client": client}
        return [{**now, "id": id_, "score": score} for id_, score in zip(ids, scores, strict=True)]

    def state(self, like: State) -> State:
        """Weights of these names and shapes."""
        found = self.content.get("arrays")
        state = state_of(found) if isinstance(found, ArrayRecord) else {}
        fits = state.keys() == like.keys() and all(state[key].shape == like[key].shape for key in like)
        if not (fits and all(value.is_floating_point() for value in state.values())):
            raise ValueError("wrong shape: other entries, or of another shape or kind, than were sent")
        return {key: state[key] for key in like}
