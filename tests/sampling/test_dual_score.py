"""The dual score by hand and by its laws, losses against pseudo labels against a loop, and one door to labels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import chosen, observed

from fedal_utils.data import Detections
from fedal_utils.sampling import Scores
from fedal_utils.sampling.dual_score import mix, standardise
from fedal_utils.sampling.observation import as_labels
from fedal_utils.seeding import rng_for

fewer = settings(max_examples=40)
ROOT = math.sqrt(1.5)  # 1, 2, 3 have mean 2 and standard deviation sqrt(2 / 3): z = -ROOT, 0, ROOT


def scored(values, known=None):
    values = np.asarray(values, dtype=float)
    return Scores(values, np.ones(len(values), dtype=bool) if known is None else np.asarray(known, dtype=bool))


def test_z_scores_by_hand():
    # 1, 2, 3, 4: mean 5 / 2, variance (9 + 1 + 1 + 9) / 4 / 4 = 5 / 4
    deviation = math.sqrt(5) / 2
    want = [-1.5 / deviation, -0.5 / deviation, 0.5 / deviation, 1.5 / deviation]
    assert standardise(scored([1, 2, 3, 4])) == pytest.approx(want, rel=1e-12)
    assert standardise(scored([1.0, 1 + 1e-9])).tolist() == pytest.approx([-1, 1], rel=1e-6)  # beyond rounding
    assert standardise(scored([1e-30, 3e-30])).tolist() == pytest.approx([-1, 1])
    with pytest.raises(ValueError, match="non-finite term at position 3"):
        standardise(scored([1, math.nan, 2, math.inf, 4], [1, 0, 1, 1, 1]))
    without = standardise(scored([1, 1e6, 2, math.nan, 3, 4], [1, 0, 1, 0, 1, 1]))  # they count in no mean
    assert without.tolist() == pytest.approx([want[0], 0, want[1], 0, want[2], want[3]])


SAME = [([5.0], [1]), ([5.0, 9.0, 1.0], [0, 1, 0]), ([], []), ([7.0, 1e300, 7.0], [1, 0, 1])]


@pytest.mark.parametrize(("values", "known"), [*SAME, ([-1e6, -1e6 * (1 + 2e-16), -1e6], [1, 1, 1])])
def test_a_term_that_says_the_same_of_all_says_nothing(values, known):
    found = standardise(scored(values, known))
    assert found.dtype == np.float64 and found.tolist() == [0.0] * len(values)


some = st.lists(st.tuples(st.integers(-100, 100), st.booleans()), min_size=1, max_size=9)


@fewer
@given(some)
def test_the_mean_of_the_scored_is_zero_and_so_are_the_others(rows):
    values, known = (np.array(column) for column in zip(*rows, strict=True))
    found = standardise(scored(values, known))
    assert found.sum() == pytest.approx(0, abs=1e-9) and not found[~known].any()
    if len(set(values[known])) > 1:
        assert (found[known] ** 2).mean() == pytest.approx(1)
        before, after = (np.sign(np.subtract.outer(x[known], x[known])) for x in (values, found))
        assert np.array_equal(before, after)
    else:
        assert not found.any()


pairs = st.lists(st.tuples(st.integers(-100, 100), st.integers(-100, 100), st.booleans()), min_size=1, max_size=8)
part = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])


@fewer
@given(pairs, part, st.floats(0.1, 1e3), st.floats(-100, 100))
def test_neither_terms_unit_nor_its_zero_moves_a_score(rows, part, unit, shift):
    new, useful, known = (np.array(column) for column in zip(*rows, strict=True))
    want = mix(scored(new), scored(useful, known), part)
    for found in (
        mix(scored(unit * new + shift), scored(useful, known), part),
        mix(scored(new), scored(unit * useful + shift, known), part),
        mix(scored(unit * new), scored(useful / unit, known), part),
    ):
        assert found.values == pytest.approx(want.values, abs=1e-9)
        apart = np.subtract.outer(want.values, want.values) > 1e-8
        assert (np.subtract.outer(found.values, found.values)[apart] > 0).all()
        assert found.scored.all()


def test_confident_detections_are_labels_and_the_rest_is_padding():
    found = Detections(
        torch.arange(24.0).reshape(2, 3, 4) + 1,
        torch.tensor([[0.9, 0.5, 0.4], [0.49, 0.8, 0.0]]),
        torch.tensor([[2, 1, 3], [1, 0, 0]]),
        torch.zeros(2, 3, 4),
    )
    guess = as_labels(found, 0.5)
    assert guess.classes.tolist() == [[2, 1, 0], [0, 0, 0]]  # of 0.5 and more; padding with a score is padding
    assert torch.equal(guess.boxes[0, :2], found.boxes[0, :2]) and not guess.boxes[0, 2].any()
    assert not guess.boxes[1].any() and not guess.ignore.any() and not guess.crowd.any()
    assert guess.ignore.dtype == guess.crowd.dtype == torch.bool and guess.classes.dtype == torch.int64
    assert as_labels(found, 0.0).classes.tolist() == [[2, 1, 3], [1, 0, 0]]


def test_the_dual_score_of_three_images_by_hand():
    # error z = -R, 0, R; detection loss 4, 0, 2: z = R, -R, 0; a quarter and three quarters
    want = [0.5 * ROOT, -0.75 * ROOT, 0.25 * ROOT]
    found = mix(scored([1, 2, 3]), scored([4, 0, 2]), 0.25)
    assert found.values == pytest.approx(want, rel=1e-12) and found.scored.all()
    seen = observed(3, reconstruction_errors=torch.tensor([10.0, 20, 30]), consistency_losses=scored([0.4, 0, 0.2]))
    both = chosen("vae_d1", seen, 2, rng_for(0, "c"), vae_weight=0.25)
    assert both.scores.values == pytest.approx(want) and both.positions.tolist() == [0, 2]
    assert chosen("vae", seen, 3, rng_for(0, "c")).positions.tolist() == [2, 1, 0]
    assert chosen("d1", seen, 3, rng_for(0, "c")).positions.tolist() == [0, 2, 1]


def test_where_nothing_is_detected_the_other_term_decides():
    # images 1 and 3 have no usefulness: the average of 4, 0, 2 in z, which is 0
    novelty = [1.0, 2, 3, 4]
    deviation = math.sqrt(5) / 2
    useful = scored([3, math.nan, 1, 1e9], [1, 0, 1, 0])
    found = mix(scored(novelty), useful, 0.5)
    want = [0.5 * (-1.5 / deviation + 1), 0.5 * -0.5 / deviation, 0.5 * (0.5 / deviation - 1), 0.5 * 1.5 / deviation]
    assert found.values == pytest.approx(want) and found.scored.all()
    only = observed(4, reconstruction_errors=torch.tensor(novelty), consistency_losses=scored([math.nan] * 4, [0] * 4))
    assert chosen("vae_d1", only, 4, rng_for(0, "c")).positions.tolist() == [3, 2, 1, 0]
    # of one term, they are neither best nor worst
    alone = observed(4, consistency_losses=useful)
    picks = chosen("d1", alone, 4, rng_for(0, "c")).positions.tolist()
    assert picks[0] == 0 and picks[3] == 2
