"""Answers with one thing mutated: each is read within its limits, or refused by a ValueError; nothing else happens."""

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

app = pytest.importorskip("flwr.app")
messages = pytest.importorskip("fedal_utils.flower.messages")

CASES = int(os.environ.get("FEDAL_FUZZ", "600")) // 6
STEP = type("Step", (), {"cycle": 1, "round": 2})
LIKE = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}
ODD = st.one_of(
    st.floats(),
    st.integers(-(2**62), 2**62),
    st.text(max_size=4),
    st.booleans(),
    st.binary(max_size=4),
    st.lists(st.floats(), max_size=3),
    st.lists(st.text(max_size=3), max_size=3),
)
SHAPES = st.lists(st.integers(-1, 3), max_size=70)
RAW = st.builds(
    app.Array,
    dtype=st.sampled_from(["float32", "float64", "int64", "object", "no such type", ""]),
    shape=SHAPES.map(tuple),
    stype=st.sampled_from(["numpy.ndarray", "torch", ""]),
    data=st.binary(max_size=80),
)
NUMPY = st.tuples(SHAPES, st.sampled_from(["f4", "f8", "i8", "U2", "?"])).map(
    lambda of: app.Array(np.ones([max(0, n) for n in of[0][:4]], of[1]))
)


def answer() -> app.RecordDict:
    """As an honest client gives it."""
    return app.RecordDict(
        {
            "counts": app.ConfigRecord({"cycle": 1, "round": 2, "steps": 5, "loss": 0.5}),
            "said": app.ConfigRecord({"id": ["a", "b"], "score": [0.5, float("nan")]}),
            "arrays": app.ArrayRecord({name: app.Array(value.numpy()) for name, value in LIKE.items()}),
        }
    )


def read(content: app.RecordDict) -> tuple:
    found = messages.Answer(content, STEP)
    steps, loss = found.number("steps", int, 0, 10), found.number("loss", float, 0, 1e6)
    return steps, loss, found.rows("00", {"a", "b", "c"}, 2), found.state(LIKE)


@settings(max_examples=CASES, suppress_health_check=list(HealthCheck), derandomize="FEDAL_FUZZ" not in os.environ)
@given(st.data())
def test_an_answer_is_read_within_its_limits_or_refused(data):
    content, record = answer(), data.draw(st.sampled_from(["counts", "said", "arrays"]))
    how = data.draw(st.sampled_from(["replace", "remove", "add", "swap"]))
    name = data.draw(st.sampled_from(sorted(content[record])))
    value = data.draw(st.one_of(RAW, NUMPY) if record == "arrays" else ODD)
    if how == "remove":
        del content[record][name]
    elif how == "swap":  # a record of another kind in its place
        content[record] = content["said" if record == "arrays" else "arrays"]
    else:
        content[record][name if how == "replace" else "more"] = value
    try:
        steps, loss, rows, state = read(content)
    except ValueError:
        return
    assert type(steps) is int and 0 <= steps <= 10 and type(loss) is float and 0 <= loss <= 1e6
    assert len(rows) <= 2 and all(row["id"] in "abc" and not np.isinf(row["score"]) for row in rows)
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in LIKE.items()}


def test_an_honest_answer_is_read():
    steps, loss, rows, state = read(answer())
    assert (steps, loss, [row["id"] for row in rows], set(state)) == (5, 0.5, ["a", "b"], {"w", "b"})
