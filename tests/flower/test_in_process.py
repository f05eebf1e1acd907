"""The same messages as with real clients, in this process: plain loop and Flower agree bit for bit."""

from pathlib import Path

import pytest
import small_run
import torch

from fedal_utils import federation, record

flower = pytest.importorskip("fedal_utils.flower")


def results(root: Path) -> dict[str, bytes]:
    return {p.parts[-3] + "/" + p.name: p.read_bytes() for n in ("rounds", "queries") for p in root.rglob(f"{n}.csv")}


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": ("avg", "chain+sum")},
        {"methods": ("sum",), "optimizer_state": "client", "message_dtype": "fp16"},
        {"methods": ("ksas_avg",), "clients": 3, "client_fraction": 0.7},
    ],
    ids=["avg and chain", "optimizer state kept, fp16", "KSAS, two of three"],
)
def test_the_plain_loop_and_flowers_messages_agree_bit_for_bit(changes, tmp_path):
    setup = small_run.prepared(**changes)
    small_run.loop(tmp_path / "plain", setup)
    flower.deal(setup, tmp_path / "place")
    flower.in_process(setup.config, "small", tmp_path / "place")
    there = tmp_path / "place" / "server" / "runs"
    assert results(there) == results(tmp_path / "plain") and results(there)
    for method in setup.config.methods:
        one, other = (record.state(setup.config, "small", method, 0, root=r) for r in (tmp_path / "plain", there))
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


def test_a_place_that_was_dealt_for_something_else_is_refused(tmp_path):
    setup = small_run.prepared(methods=("sum",))
    assert flower.deal(setup, tmp_path) == federation.partition_clients(setup, 0)[1] == flower.deal(setup, tmp_path)
    with pytest.raises(ValueError, match="was dealt with clients = 2, now it is 3"):
        flower.in_process(setup.config.replace(clients=3), "small", tmp_path)
