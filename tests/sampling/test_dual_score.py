"""The dual score by hand and by its laws, losses against pseudo labels against a loop, and one door to labels."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import chosen, observed
from torch import nn

from fedal_utils import data
from fedal_utils.data import Detections
from fedal_utils.sampling import Scores
from fedal_utils.sampling.dual_score import mix, standardise
from fedal_utils.sampling.dual_terms import as_labels, beyond_texture, texture
from fedal_utils.seeding import rng_for, torch_rng_for

fewer = settings(max_examples=40)
ROOT = math.sqrt(1.5)  # 1, 2, 3 have mean 2 and standard deviation sqrt(2 / 3): z = -ROOT, 0, ROOT
LABELLED = [5, 2, 11]


def scored(values, known=None):
    values = np.asarray(values, dtype=float)
    return Scores(values, np.ones(len(values), dtype=bool) if known is None else np.asarray(known, dtype=bool))


def lively(model, classes: int):
    """The same SSD with a head that sees things everywhere, of all scores."""
    rng = torch_rng_for(0, "lively")
    with torch.no_grad():
        for layer in model.head.classification_head.module_list:
            layer.weight.copy_(0.3 * torch.randn(layer.weight.shape, generator=rng))
            layer.bias.view(-1, classes + 1)[:, 0] = 0.0
    return model


# ----------------------------------------------------------------------------------------------- standardising, by hand


def test_z_scores_and_ranks_by_hand():
    # 1, 2, 3, 4: mean 5 / 2, variance (9 + 1 + 1 + 9) / 4 / 4 = 5 / 4
    deviation = math.sqrt(5) / 2
    want = [-1.5 / deviation, -0.5 / deviation, 0.5 / deviation, 1.5 / deviation]
    assert standardise(scored([1, 2, 3, 4])) == pytest.approx(want, rel=1e-12)
    assert standardise(scored([4, 1, 3, 2]), "rank") == pytest.approx([0.5, -0.5, 1 / 6, -1 / 6], abs=1e-15)
    # 7 7 are places 1 and 2 of 0..3, so 1.5 each; 9 9 9 places 1, 2, 3 of 0..3, so 2 each
    assert standardise(scored([7, 1, 20, 7]), "rank").tolist() == pytest.approx([0, -0.5, 0.5, 0])
    assert standardise(scored([9, 9, 1, 9]), "rank").tolist() == pytest.approx([1 / 6, 1 / 6, -0.5, 1 / 6])
    assert standardise(scored([1e9, 1, 1e-9]), "rank").tolist() == [0.5, 0, -0.5]  # how far apart does not count


@pytest.mark.parametrize("how", ["z", "rank"])
@pytest.mark.parametrize(
    ("values", "known"),
    [
        ([3.0, 3.0, 3.0], [1, 1, 1]),
        ([0.0, 0.0], [1, 1]),
        ([5.0], [1]),
        ([5.0, 9.0, 1.0], [0, 1, 0]),
        ([math.nan, math.inf], [0, 0]),
        ([], []),
        ([0.1 + 0.2, 0.3, 0.3], [1, 1, 1]),
        ([-1e6, -1e6 * (1 + 2e-16), -1e6], [1, 1, 1]),
        ([7.0, 1e300, 7.0], [1, 0, 1]),
    ],
)
def test_a_term_that_says_the_same_of_all_says_nothing(values, known, how):
    found = standardise(scored(values, known), how)
    assert found.dtype == np.float64 and found.tolist() == [0.0] * len(values)


def test_a_small_spread_beyond_rounding_is_a_spread():
    assert standardise(scored([1.0, 1 + 1e-9])).tolist() == pytest.approx([-1, 1], rel=1e-6)
    assert standardise(scored([1e-30, 3e-30])).tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize("how", ["z", "rank"])
def test_images_without_the_term_are_zero_and_count_in_no_mean(how):
    found = standardise(scored([1, 1e6, 2, math.nan, 3, 4], [1, 0, 1, 0, 1, 1]), how)
    assert found[[1, 3]].tolist() == [0, 0]
    assert found[[0, 2, 4, 5]].tolist() == standardise(scored([1, 2, 3, 4]), how).tolist()


some = st.lists(st.tuples(st.integers(-100, 100), st.booleans()), min_size=1, max_size=9)


@fewer
@given(some, st.sampled_from(["z", "rank"]))
def test_the_mean_of_the_scored_is_zero_and_so_are_the_others(rows, how):
    values, known = (np.array(column) for column in zip(*rows, strict=True))
    found = standardise(scored(values, known), how)
    assert found.sum() == pytest.approx(0, abs=1e-9) and not found[~known].any()
    if len(set(values[known])) > 1:
        if how == "z":
            assert (found[known] ** 2).mean() == pytest.approx(1)
        assert all(
            np.sign(found[i] - found[j]) == np.sign(values[i] - values[j])
            for i in np.flatnonzero(known)
            for j in np.flatnonzero(known)
        )
    else:
        assert not found.any()


@pytest.mark.parametrize("how", ["z", "rank"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_term_names_its_position(broken, how):
    with pytest.raises(ValueError, match="non-finite term at position 3"):
        standardise(scored([1, math.nan, 2, broken, 4], [1, 0, 1, 1, 1]), how)


def test_an_unknown_standard_is_refused():
    with pytest.raises(ValueError, match=r"one of .*'z'.* got 'minmax'"):
        standardise(scored([1, 2]), "minmax")


# ------------------------------------------------------------------------------------------------------ mixing, by hand


pairs = st.lists(st.tuples(st.integers(-100, 100), st.integers(-100, 100), st.booleans()), min_size=1, max_size=8)
part = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])
how = st.sampled_from(["z", "rank"])


@fewer
@given(pairs, part, how, st.floats(0.1, 1e3), st.floats(-100, 100))
def test_neither_terms_unit_nor_its_zero_moves_a_score(rows, part, how, unit, shift):
    new, useful, known = (np.array(column) for column in zip(*rows, strict=True))
    want = mix(scored(new), scored(useful, known), part, how)
    for found in (
        mix(scored(unit * new + shift), scored(useful, known), part, how),
        mix(scored(new), scored(unit * useful + shift, known), part, how),
        mix(scored(unit * new), scored(useful / unit, known), part, how),
    ):
        assert found.values == pytest.approx(want.values, abs=1e-9)
        apart = np.subtract.outer(want.values, want.values) > 1e-8
        assert (np.subtract.outer(found.values, found.values)[apart] > 0).all()
        assert found.scored.all()


# ------------------------------------------------------------------------------------------------------------- choosing


def slow_z(values, known):
    """z-scores by the statistics module; 0 where unknown."""
    inside = [v for v, k in zip(values, known, strict=True) if k]
    if len(set(inside)) < 2:
        return [0.0] * len(values)
    mean, deviation = statistics.fmean(inside), statistics.pstdev(inside)
    return [(v - mean) / deviation if k else 0.0 for v, k in zip(values, known, strict=True)]


def farthest(points, centres, k):
    """Greedy k-center by loops: positions in `points`."""
    chosen = []
    for _ in range(k):
        taken = [points[c] for c in chosen]
        gap = {
            i: min(math.dist(points[i], other) for other in centres + taken)
            for i in range(len(points))
            if i not in chosen
        }
        chosen.append(max(gap, key=gap.get))
    return chosen


# -------------------------------------------------------------------------------------------------------------- texture


def drawn(*grey):
    """Images of these (H, W) arrays of bytes, the same in all channels."""
    pixels = torch.stack([torch.as_tensor(g, dtype=torch.uint8).expand(3, -1, -1) for g in grey]).contiguous()
    size = tuple(pixels.shape[-2:])
    return data.Images(tuple(f"g{i}" for i in range(len(pixels))), pixels, torch.tensor([size] * len(pixels)))


def test_texture_by_hand():
    board = (np.indices((16, 16)).sum(0) % 2) * 255
    half = np.repeat([[0] * 8 + [255] * 8], 16, axis=0)  # one step of 1 in each row of 15, none in a column
    images = drawn(np.full((16, 16), 77), board, half)
    want = [[0, 0], [1, 0.5], [1 / 30, 0.5]]
    assert texture(images, (16, 16)).tolist() == [pytest.approx(row, abs=1e-6) for row in want]
    assert torch.equal(texture(images, (16, 16), batch=2), texture(images, (16, 16)))
    assert texture(images.take([0]), (8, 12)).tolist() == [pytest.approx([0, 0], abs=1e-6)]  # scaled, still flat
    assert texture(images.take([1]), (8, 8))[0, 0] < 0.2  # at a half, a chequered image is nearly grey
    assert texture(images.take([]), (16, 16)).shape == (0, 2)
    red = drawn(board)
    red.pixels[:, 1:] = 0
    assert texture(red, (16, 16)).tolist() == [pytest.approx([1 / 3, 1 / 6], abs=1e-6)]


@fewer
@given(st.integers(0, 10**6), st.integers(4, 30), st.floats(1e-3, 1e5))
def test_beyond_texture_nothing_of_it_is_left(seed, images, unit):
    rng = rng_for(seed, "looks")
    looks, rest = torch.from_numpy(rng.random((images, 2))), torch.from_numpy(rng.normal(size=images))
    error = unit * (3 + 5 * looks[:, 0] - 2 * looks[:, 1] + rest)
    left = beyond_texture(error, looks)
    assert left.dtype == torch.float64 and left.shape == (images,)
    assert (left.sum() / unit).abs() < 1e-6 and (looks.T @ left / unit).abs().max() < 1e-6
    # what texture does not explain stays, in the error's own units
    torch.testing.assert_close(left, unit * beyond_texture(rest, looks), rtol=1e-6, atol=1e-8 * unit)
    torch.testing.assert_close(beyond_texture(left, looks), left, rtol=1e-6, atol=1e-8 * unit)


def test_beyond_texture_by_hand():
    # texture 0, 0, 1, 1 and no contrast: what is left is each error minus the mean of its kind
    looks = torch.tensor([[0.0, 0], [0, 0], [1, 0], [1, 0]])
    left = beyond_texture(torch.tensor([1.0, 3, 10, 16]), looks)
    assert left.tolist() == pytest.approx([-1, 1, -3, 3], abs=1e-9)
    same = beyond_texture(torch.tensor([1.0, 3, 5, 7]), torch.full((4, 2), 0.4))  # says nothing: only the mean goes
    assert same.tolist() == pytest.approx([-3, -1, 1, 3], abs=1e-9)
    assert beyond_texture(torch.zeros(0), torch.zeros(0, 2)).shape == (0,)
    with pytest.raises(ValueError, match="texture of 3 images is needed, got 2"):
        beyond_texture(torch.zeros(3), torch.zeros(2, 2))


# ------------------------------------------------------------------------------------------------ losses without labels


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


class Fixed(nn.Module):
    """In the place of a VAE: pixels come back as `change` makes them."""

    as_released = False

    def __init__(self, change):
        super().__init__()
        self.change = change

    def reconstruct(self, pixels, generator=None):
        return self.change(pixels.float())


# ----------------------------------------------------------------------------------------------------- a task-aware VAE


def grads(coder):
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in coder.parameters()])


# ------------------------------------------------------------------------------------------------ hidden labels stay so


# ----------------------------------------------------------------------------------------------------- what is compared


VOC = [f"{year}_{i:06d}" for year, count in (("2007", 5011), ("2012", 11540)) for i in range(count)]


def test_the_dual_score_of_three_images_by_hand():
    # error z = -R, 0, R; detection loss 4, 0, 2: z = R, -R, 0; a quarter and three quarters
    want = [0.5 * ROOT, -0.75 * ROOT, 0.25 * ROOT]
    found = mix(scored([1, 2, 3]), scored([4, 0, 2]), 0.25)
    assert found.values == pytest.approx(want, rel=1e-12) and found.scored.all()
    ranks = mix(scored([1, 2, 3]), scored([4, 0, 2]), 0.25, "rank")
    assert ranks.values == pytest.approx([0.25, -0.375, 0.125])
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
