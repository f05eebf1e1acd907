"""The same experiment in Flower's simulation, and as processes over TLS: the numbers of the plain loop."""

import psutil
import pytest
import small_run

from fedal_utils import record

flower = pytest.importorskip("fedal_utils.flower")


@pytest.mark.parametrize("way", ["simulate", "deployed"])
def test_simulation_and_processes_give_the_plain_loops_numbers(way, tmp_path):
    setup = small_run.prepared(methods=("avg",), cycles=1, rounds=1, extra_rounds=0, first_pass_rounds=1)
    small_run.loop(tmp_path / "plain", setup)
    flower.deal(setup, tmp_path / "place")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    there = getattr(flower, way)(setup.config, "small", tmp_path / "place")
    if way == "deployed":
        left = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
        assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
    columns = ["cycle", "round", "client", "images", "boxes", "steps", "bytes_up", "loss", "ap50"]
    one, other = (record.table(setup.config, "small", root=root)[columns] for root in (tmp_path / "plain", there))
    assert one.equals(other)
    queries = [record.queries(setup.config, "small", root=root) for root in (tmp_path / "plain", there)]
    assert queries[0].equals(queries[1])
