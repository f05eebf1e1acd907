"""Generators by name: what ran before, and what else was drawn, changes nothing."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedal_utils.seeding import borrowed_global_rng, python_sample, rng_for, torch_rng_for

name = st.one_of(st.text(max_size=6), st.integers(-5, 40))
names = st.lists(name, max_size=3).map(tuple)


def numbers(seed, *parts):
    return rng_for(seed, *parts).integers(1 << 62, size=4).tolist()


def torch_numbers(seed, *parts):
    return torch.randint(1 << 62, (4,), generator=torch_rng_for(seed, *parts)).tolist()


@given(names, names, st.integers(0, 3), st.integers(0, 3))
def test_two_names_share_numbers_only_if_they_are_the_same(a, b, seed_a, seed_b):
    same = seed_a == seed_b and a == b  # True == 1 cannot arise: names hold strings and integers
    assert (numbers(seed_a, *a) == numbers(seed_b, *b)) is same
    assert (torch_numbers(seed_a, *a) == torch_numbers(seed_b, *b)) is same


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("client", 12), ("client1", 2)),
        (("a", "b"), ("ab",)),
        (("a", "b"), ("b", "a")),
        (("a/b",), ("a", "b")),
        (("'a'/'b'",), ("a", "b")),
        ((1,), ("1",)),
        ((), ("",)),
    ],
)
def test_names_are_told_apart_by_their_cuts_their_order_and_their_types(a, b):
    assert numbers(0, *a) != numbers(0, *b)
    assert torch_numbers(0, *a) != torch_numbers(0, *b)


def test_the_same_name_gives_the_same_numbers_whatever_was_drawn_before():
    before = numbers(3, "client", 3, "round", 7), torch_numbers(3, "client", 3, "round", 7)
    np.random.default_rng(3).random(100)
    rng_for(3, "client", 2).random(100)
    torch.rand(100)
    torch.rand(10, generator=torch_rng_for(3, "client", 3))
    assert (numbers(3, "client", 3, "round", 7), torch_numbers(3, "client", 3, "round", 7)) == before


def test_numpy_integers_name_the_same_generator_as_plain_ones():
    assert numbers(np.int64(3), "client", np.int32(2)) == numbers(3, "client", 2)


def test_pinned_numbers_so_that_results_on_disk_stay_reproducible():
    assert rng_for(0, "client", 3).integers(1000, size=4).tolist() == [523, 800, 310, 333]
    assert torch.randint(1000, (4,), generator=torch_rng_for(0, "client", 3)).tolist() == [966, 362, 644, 456]


@pytest.mark.parametrize("seed", [-1, 1.0, "0", None, True])
def test_a_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer >= 0, got .*" + str(seed).replace("-", r"\-")):
        rng_for(seed, "a")


@pytest.mark.parametrize("part", [1.5, None, True, ("a",)])
def test_a_bad_name_is_named(part):
    with pytest.raises(ValueError, match="strings and integers"):
        torch_rng_for(0, "a", part)


def test_a_borrowed_global_generator_is_given_back_and_draws_from_ours_only():
    def draw():
        with borrowed_global_rng(torch_rng_for(1, "x")):
            return torch.rand(3).tolist()

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert draw() == first  # whatever the global state was
    with borrowed_global_rng(torch_rng_for(2, "x")):
        assert torch.rand(3).tolist() != first


def test_a_borrowed_global_generator_is_given_back_after_an_error_and_moves_ours_on():
    ours = torch_rng_for(1, "x")
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), borrowed_global_rng(ours):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)
    draws = []
    for _ in range(2):  # the same generator lent twice: two different borrowings
        with borrowed_global_rng(ours):
            draws.append(torch.rand(3).tolist())
    assert draws[0] != draws[1]


def test_pythons_own_sample_is_that_of_every_python_and_leaves_its_global_generator_alone():
    random.seed(5)
    state = random.getstate()
    assert python_sample(137, 16551, 6) == [2371, 5950, 13437, 10670, 6305, 7566]
    assert random.getstate() == state
    whole = python_sample(137, 30, 30)
    assert sorted(whole) == list(range(30)) and python_sample(138, 30, 30) != whole == python_sample(137, 30, 30)
    assert python_sample(137, 16551, 0) == []
    with pytest.raises(ValueError, match="[Ss]ample larger than population"):
        python_sample(137, 5, 6)
