"""Generators by name: what ran before, and what else was drawn, changes nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedal_utils.seeding import borrowed_global_rng, rng_for, torch_rng_for

name = st.one_of(st.text(max_size=6), st.integers(-5, 40))
names = st.lists(name, max_size=3).map(tuple)
NEAR = {("client", 12): ("client1", 2), ("a", "b"): ("ab",), ("b", "a"): ("a/b",), (1,): ("1",), (): ("",)}


def numbers(seed, *parts):
    theirs = torch.randint(1 << 62, (4,), generator=torch_rng_for(seed, *parts)).tolist()
    return theirs, rng_for(seed, *parts).integers(1 << 62, size=4).tolist()


@given(names, names, st.integers(0, 3), st.integers(0, 3))
def test_two_names_share_numbers_only_if_they_are_the_same(a, b, seed_a, seed_b):
    """True == 1 cannot arise: names hold strings and integers."""
    for one, other in ((a, b), *NEAR.items()):
        same = seed_a == seed_b and one == other
        pairs = zip(numbers(seed_a, *one), numbers(seed_b, *other), strict=True)
        assert all((mine == yours) is same for mine, yours in pairs)


def test_the_same_name_gives_the_same_numbers_whatever_was_drawn_before():
    """Pinned: results on disk stay reproducible."""
    np.random.default_rng(3).random(100)
    torch.rand(10, generator=torch_rng_for(0, "client", 2))
    torch.rand(100)
    assert rng_for(0, "client", np.int32(3)).integers(1000, size=4).tolist() == [523, 800, 310, 333]
    assert torch.randint(1000, (4,), generator=torch_rng_for(0, "client", 3)).tolist() == [966, 362, 644, 456]


@pytest.mark.parametrize(("seed", "part"), [*((s, "a") for s in (-1, 1.0, None, True)), (0, 1.5), (0, True), (0, ())])
def test_a_bad_seed_or_name_is_refused(seed, part):
    with pytest.raises(ValueError, match=r"seed must be an integer >= 0|strings and integers"):
        rng_for(seed, part)


def test_a_borrowed_global_generator_is_given_back_and_draws_from_ours_only():
    def draw(ours):
        with borrowed_global_rng(ours):
            return torch.rand(3).tolist()

    ours = torch_rng_for(1, "x")
    first = draw(ours)
    torch.rand(7)
    assert draw(torch_rng_for(1, "x")) == first  # whatever the global state was
    assert draw(ours) != first and draw(torch_rng_for(2, "x")) != first
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), borrowed_global_rng(ours):
        raise ZeroDivisionError(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), state)
