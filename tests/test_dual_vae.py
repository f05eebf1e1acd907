"""The dual score by hand and by its laws, losses against pseudo labels against a loop, and one door to labels."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedal_utils import data, papers, record, training
from fedal_utils.data import Labels
from fedal_utils.data.boxes import Detections
from fedal_utils.detectors import build_vae
from fedal_utils.federation import experiment as alfl
from fedal_utils.sampling import dual_score as dual_vae
from fedal_utils.sampling import strategies as sampling
from fedal_utils.sampling.dual_score import (
    as_labels,
    beyond_texture,
    mix,
    multibox,
    score,
    standardise,
    subsets,
    texture,
)
from fedal_utils.sampling.pool import Oracle, Pool
from fedal_utils.sampling.strategies import Scores, Sight
from fedal_utils.seeding import rng_for, torch_rng_for

fewer = settings(max_examples=40)
ROOT = math.sqrt(1.5)  # 1, 2, 3 have mean 2 and standard deviation sqrt(2 / 3): z = -ROOT, 0, ROOT
HONEST = [name for name in dual_vae.STRATEGIES if name not in dual_vae.DIAGNOSTIC]
SMALL = dict(
    detector="ssd",
    digit_classes=3,
    scenes=(40, 4),
    initial_model_images=0,
    initial_model_iterations=0,
    clients=2,
    initial_labels=4,
    query_size=3,
    cycles=2,
    rounds=1,
    iterations=2,
    batch=4,
    image_loss_head=True,
    vae_size=(16, 16),
    latent=8,
    vae_iterations=4,
    vae_batch=4,
    diagnostic=True,
    methods=dual_vae.STRATEGIES,
    seeds=(0,),
    threads=1,
)
LABELLED = [5, 2, 11]


def scored(values, known=None):
    values = np.asarray(values, dtype=float)
    return Scores(values, np.ones(len(values), dtype=bool) if known is None else np.asarray(known, dtype=bool))


@pytest.fixture(scope="module")
def study() -> alfl.Study:
    return alfl.prepare(papers.load("00_start_here", "smoke", **SMALL), device="cpu")


def lively(model, classes: int):
    """The same SSD with a head that sees things everywhere, of all scores."""
    rng = torch_rng_for(0, "lively")
    with torch.no_grad():
        for layer in model.head.classification_head.module_list:
            layer.weight.copy_(0.3 * torch.randn(layer.weight.shape, generator=rng))
            layer.bias.view(-1, classes + 1)[:, 0] = 0.0
    return model


def detector(study, **changes):
    return lively(alfl.build(study.config.replace(**changes), 3, torch_rng_for(1, "weights")).eval(), 3)


def coder_of(study):
    return build_vae(study.config, torch_rng_for(2, "vae weights")).eval()


def pool_of(study, labels=None, diagnostic=True):
    """A client with all images in an order of its own; three of them have labels."""
    oracle = Oracle(study.train.labels if labels is None else labels, diagnostic=diagnostic)
    pool = Pool("00", study.train.images, oracle, np.roll(np.arange(len(study.train)), 7))
    pool.ask(LABELLED, cycle=0)
    return pool


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


def test_the_dual_score_of_three_images_by_hand():
    # novelty z = -R, 0, R; usefulness 4, 0, 2: z = R, -R, 0; a quarter and three quarters
    found = mix(scored([1, 2, 3]), scored([4, 0, 2]), 0.25)
    assert found.values == pytest.approx([0.5 * ROOT, -0.75 * ROOT, 0.25 * ROOT], rel=1e-12) and found.scored.all()
    ranks = mix(scored([1, 2, 3]), scored([4, 0, 2]), 0.25, "rank")
    assert ranks.values == pytest.approx([0.25, -0.375, 0.125])
    sight = Sight(3, novelty=torch.tensor([10.0, 20, 30]), usefulness=scored([0.4, 0, 0.2]))
    assert score("vae_d1", sight, 0.25).values == pytest.approx([0.5 * ROOT, -0.75 * ROOT, 0.25 * ROOT])
    assert dual_vae.choose("vae_d1", sight, 2, rng_for(0, "c"), part=0.25).positions.tolist() == [0, 2]


def test_where_nothing_is_detected_the_other_term_decides():
    # images 1 and 3 have no usefulness: the average of 4, 0, 2 in z, which is 0
    novelty = [1.0, 2, 3, 4]
    deviation = math.sqrt(5) / 2
    useful = scored([3, math.nan, 1, 1e9], [1, 0, 1, 0])
    found = mix(scored(novelty), useful, 0.5)
    want = [0.5 * (-1.5 / deviation + 1), 0.5 * -0.5 / deviation, 0.5 * (0.5 / deviation - 1), 0.5 * 1.5 / deviation]
    assert found.values == pytest.approx(want) and found.scored.all()
    only = Sight(4, novelty=torch.tensor(novelty), usefulness=scored([math.nan] * 4, [0] * 4))
    assert dual_vae.choose("vae_d1", only, 4, rng_for(0, "c")).positions.tolist() == [3, 2, 1, 0]
    # of one term, they are neither best nor worst
    alone = Sight(4, usefulness=useful)
    picks = dual_vae.choose("d1", alone, 4, rng_for(0, "c")).positions.tolist()
    assert picks[0] == 0 and picks[3] == 2


def test_a_part_outside_zero_and_one_and_unequal_terms_are_refused():
    for part in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"part of the VAE must be in \[0, 1\], got {part}"):
            mix(scored([1, 2]), scored([1, 2]), part)
    with pytest.raises(ValueError, match="same images, got 2 and 3"):
        mix(scored([1, 2]), scored([1, 2, 3]), 0.5)
    with pytest.raises(ValueError, match="'vae_d1' needs 'usefulness'"):
        score("vae_d1", Sight(2, novelty=torch.ones(2)))
    with pytest.raises(ValueError, match="'vae' needs 'novelty' of 3 images, got 2"):
        score("vae", Sight(3, novelty=torch.ones(2)))
    for wrong in (lambda: dual_vae.needs("sum"), lambda: score("d5", Sight(1))):
        with pytest.raises(ValueError, match="strategy must be one of"):
            wrong()


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


@fewer
@given(pairs, how)
def test_the_ends_are_the_single_terms(rows, how):
    new, useful, known = (np.array(column) for column in zip(*rows, strict=True))
    sight = Sight(len(rows), novelty=torch.from_numpy(new.astype(np.float32)), usefulness=scored(useful, known))
    for end, name in ((1.0, "vae"), (0.0, "d1")):
        mixed, single = score("vae_d1", sight, end, how), score(name, sight, 0.3, how)  # whatever alpha is
        assert np.array_equal(mixed.values, single.values) and np.array_equal(mixed.scored, single.scored)
    assert np.array_equal(score("vae", sight, how=how).values, standardise(scored(new), how))
    assert np.array_equal(score("d1", sight, how=how).values, standardise(scored(useful, known), how))


def test_what_each_strategy_reads():
    assert dual_vae.needs("vae") == {"novelty"} and dual_vae.needs("d0") == {"hidden"}
    assert dual_vae.needs("vae_d1") == {"novelty", "consistency"} and dual_vae.needs("vae_d3") == {"novelty", "doubt"}
    assert len(dual_vae.STRATEGIES) == 11 and {"d0", "vae_d0"} == {n for n in dual_vae.NEEDS if "d0" in n}
    for name in HONEST:
        assert "hidden" not in dual_vae.needs(name)


# ------------------------------------------------------------------------------------------------------------- choosing


def slow_z(values, known):
    """z-scores by the statistics module; 0 where unknown."""
    inside = [v for v, k in zip(values, known, strict=True) if k]
    if len(set(inside)) < 2:
        return [0.0] * len(values)
    mean, deviation = statistics.fmean(inside), statistics.pstdev(inside)
    return [(v - mean) / deviation if k else 0.0 for v, k in zip(values, known, strict=True)]


@fewer
@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_choosing_is_a_slow_sort(seed, images, part):
    rng = rng_for(seed, "case")
    new, useful, known = rng.normal(size=images) * 1e4, rng.normal(size=images), rng.random(images) < 0.8
    a, b = slow_z(torch.tensor(new).float().tolist(), [True] * images), slow_z(useful.tolist(), known.tolist())
    values = [part * x + (1 - part) * y for x, y in zip(a, b, strict=True)]
    k = int(rng.integers(0, images + 1))
    sight = Sight(images, novelty=torch.tensor(new).float(), usefulness=scored(useful, known))
    choice = dual_vae.choose("vae_d2", sight, k, rng_for(seed, "c"), part=part)
    assert choice.scores.values == pytest.approx(values, abs=1e-9)
    picked = [values[p] for p in choice.positions]
    assert len(set(choice.positions.tolist())) == k
    assert picked == pytest.approx(sorted(values, reverse=True)[:k], abs=1e-9)


def test_ties_break_by_the_generator_and_by_nothing_else():
    sight = Sight(12, novelty=torch.tensor([5.0] * 4 + [1.0] * 8), usefulness=scored([2.0] * 12))
    picks = [dual_vae.choose("vae_d1", sight, 2, rng_for(seed, "c")).positions.tolist() for seed in range(40)]
    assert {p for pick in picks for p in pick} == {0, 1, 2, 3}
    assert picks[0] == dual_vae.choose("vae_d1", sight, 2, rng_for(0, "c")).positions.tolist()
    flat = Sight(12, novelty=torch.full((12,), 3.0))
    assert {dual_vae.choose("vae", flat, 1, rng_for(s, "c")).positions.item() for s in range(120)} == set(range(12))


def test_too_large_a_budget_is_refused_and_none_asks_nothing():
    sight = Sight(3, novelty=torch.tensor([1.0, 2, 3]), latent=torch.eye(3), known_latent=torch.zeros(0, 3))
    for shortlist in (0.0, 2.0):
        none = dual_vae.choose("vae", sight, 0, rng_for(0, "c"), shortlist=shortlist)
        assert none.positions.tolist() == [] and none.scores.values == pytest.approx([-ROOT, 0, ROOT])
        with pytest.raises(ValueError, match="budget of 4 images, but the pool has 3"):
            dual_vae.choose("vae", sight, 4, rng_for(0, "c"), shortlist=shortlist)
    nobody = Sight(0, novelty=torch.zeros(0), latent=torch.zeros(0, 3), known_latent=torch.zeros(2, 3))
    assert len(dual_vae.choose("vae", nobody, 0, rng_for(0, "c"), shortlist=2.0).positions) == 0


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


@fewer
@given(st.integers(0, 10**6), st.sampled_from([1.5, 2.0, 3.0, 50.0]), st.integers(1, 4))
def test_of_the_shortlist_the_ones_farthest_from_what_is_labelled(seed, shortlist, k):
    rng = rng_for(seed, "shortlist")
    new, latent, known = rng.permutation(15), rng.normal(size=(15, 3)), rng.normal(size=(2, 3))
    sight = Sight(
        15, novelty=torch.from_numpy(new), latent=torch.from_numpy(latent), known_latent=torch.from_numpy(known)
    )
    choice = dual_vae.choose("vae", sight, k, rng_for(seed, "c"), shortlist=shortlist)
    best = sorted(range(15), key=lambda i: -new[i])[: math.ceil(shortlist * k)]
    want = [best[i] for i in farthest([latent[i].tolist() for i in best], known.tolist(), k)]
    assert choice.positions.tolist() == want
    assert np.array_equal(choice.scores.values, score("vae", sight).values)  # of all images, not of the shortlist


@pytest.mark.parametrize(("shortlist", "k", "size"), [(1.5, 3, 5), (2.0, 4, 8), (3.0, 5, 15), (1.1, 50, 55)])
def test_the_shortlist_is_as_long_as_it_says(shortlist, k, size):
    """The last image of the shortlist and the first one beyond it lie far off: only the former is asked."""
    latent = torch.zeros(60, 2)
    latent[:, 0] = torch.arange(60)
    latent[size - 1, 1], latent[size, 1] = 1e3, -1e6
    sight = Sight(60, novelty=-torch.arange(60.0), latent=latent, known_latent=torch.zeros(1, 2))
    picks = dual_vae.choose("vae", sight, k, rng_for(0, "c"), shortlist=shortlist).positions.tolist()
    assert len(picks) == k and size - 1 in picks and size not in picks


@pytest.mark.parametrize("shortlist", [0.0, 0.5, 1.0])
def test_a_shortlist_no_longer_than_the_budget_is_the_best_alone(shortlist):
    rng = rng_for(0, "alone")
    sight = Sight(9, novelty=torch.from_numpy(rng.normal(size=9)))  # no latents are needed
    choice = dual_vae.choose("vae", sight, 4, rng_for(0, "c"), shortlist=shortlist)
    assert choice.positions.tolist() == sorted(range(9), key=lambda i: -sight.novelty[i])[:4]
    with pytest.raises(ValueError, match="needs 'latent'"):
        dual_vae.choose("vae", sight, 4, rng_for(0, "c"), shortlist=1.5)


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


def test_a_sight_with_texture_is_scored_beyond_it():
    looks = torch.tensor([[0.0, 0], [0, 0], [1, 0], [1, 0]])
    sight = Sight(4, novelty=torch.tensor([1.0, 3, 10, 16]), texture=looks)
    assert score("vae", sight).values == pytest.approx(np.array([-1, 1, -3, 3]) / math.sqrt(5))
    assert dual_vae.choose("vae", sight, 2, rng_for(0, "c")).positions.tolist() == [3, 1]
    assert score("vae", dataclasses.replace(sight, texture=None)).values[2] > 0


@pytest.mark.parametrize("explained", ["equal errors", "an error in proportion", "as many images as unknowns"])
def test_an_error_that_texture_explains_says_nothing(explained):
    """All alike up to rounding: what least squares leave is rounding, and must choose no labels."""
    looks = torch.from_numpy(rng_for(0, "explained").random((9, 2)))
    error = torch.full((9,), 1234.5, dtype=torch.float64)
    if explained == "an error in proportion":
        error = 700 + 300 * looks[:, 0] + 100 * looks[:, 1]
    if explained == "as many images as unknowns":
        looks, error = looks[:3], torch.tensor([500.0, 900, 100])
    left = beyond_texture(error, looks)
    assert left.abs().max() < 1e-9
    assert not score("vae", Sight(len(error), novelty=error, texture=looks)).values.any()


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


def ten(study):
    """Ten images and their labels; one has no object, one has none that counts."""
    labels = study.train.labels.take(range(10))
    classes, ignore = labels.classes.clone(), labels.ignore.clone()
    classes[3], ignore[6] = 0, True
    boxes = torch.where(classes[..., None] > 0, labels.boxes, 0)
    return study.train.images.take(range(10)), Labels(boxes, classes, ignore, labels.crowd)


@pytest.mark.parametrize("summed", [False, True])
def test_multibox_is_a_loop_over_single_images(study, summed):
    model, (images, labels) = detector(study), ten(study)
    found = multibox(model, images, labels, summed=summed)
    want = []
    for i in range(10):
        one = labels.take([i])
        with torch.no_grad():
            parts = model.image_losses(images.batch([i]), one.boxes, one.classes, one.ignore, summed=summed)
        want.append(float(parts["classification"] + parts["regression"]))
    assert found.values == pytest.approx(want, rel=1e-4) and found.values.dtype == np.float64
    assert found.scored.tolist() == [i not in (3, 6) for i in range(10)]
    assert len(set(found.values[found.scored].round(3))) == 8 and (found.values[found.scored] > 0).all()
    other = multibox(model, images, labels, summed=not summed)
    sums, means = (found.values, other.values) if summed else (other.values, found.values)
    anchors = (sums / means)[found.scored]  # a sum is as many means as anchors match
    assert anchors == pytest.approx(anchors.round(), rel=1e-4) and anchors.min() >= 1 and anchors.max() > 3
    none = multibox(model, images.take([]), labels.take([]))
    assert len(none) == 0 and none.scored.dtype == bool


def test_labels_of_other_images_and_other_detectors_are_refused(study):
    images, labels = ten(study)
    with pytest.raises(ValueError, match="labels of 10 images are needed, got 9"):
        multibox(detector(study), images, labels.take(range(9)))
    other = alfl.build(
        study.config.replace(detector="faster_rcnn", image_loss_head=False), 3, torch_rng_for(0, "weights")
    )
    for refused in (
        lambda: multibox(other, images, labels),
        lambda: dual_vae.usefulness("doubt", study.config, other, images, images, None, None, None, "cpu"),
        lambda: dual_vae.task_term(study.config, other, images, np.array([0]), labels.take([0]), "cpu"),
    ):
        with pytest.raises(ValueError, match="needs the detector 'ssd', .* got FasterRCNN"):
            refused()


class Fixed(nn.Module):
    """In the place of a VAE: pixels come back as `change` makes them."""

    as_released = False

    def __init__(self, change):
        super().__init__()
        self.change = change

    def reconstruct(self, pixels, generator=None):
        return self.change(pixels.float())


def term(study, how, coder=None, hidden=None, model=None, **changes):
    model, images = model or detector(study), study.train.images.take(range(10))
    settings = study.config.replace(**changes)
    found = alfl.look(settings, model, images, study.device)
    return dual_vae.usefulness(how, settings, model, images, images, found, coder, hidden, "cpu"), found


def test_the_loss_on_a_perfect_reconstruction_is_that_on_the_image_and_on_another_is_not(study):
    plain, found = term(study, "self_training")
    assert 3 < plain.scored.sum() and (plain.values[plain.scored] > 0).all()
    perfect, _ = term(study, "consistency", Fixed(lambda x: x))
    assert perfect.values == pytest.approx(plain.values, rel=1e-4) and np.array_equal(perfect.scored, plain.scored)
    dark, _ = term(study, "consistency", Fixed(lambda x: x * 0 + 20))
    known = dark.scored
    assert np.array_equal(known, plain.scored)  # what is detected is detected on the image itself
    assert (np.abs(dark.values - plain.values)[known] > 0.01).all()
    # the released sums: not divided by the matched anchors
    both = [term(study, "self_training", as_released=on)[0].values[known] for on in (False, True)]
    assert (both[1] > 1.5 * both[0]).all()


def test_the_loss_on_the_reconstruction_is_against_detections_on_the_image_by_a_loop(study):
    coder, model = coder_of(study), detector(study)
    found, seen = term(study, "consistency", coder, model=model)
    guess = as_labels(seen, study.config.query.pseudo_above)
    for i in range(10):
        one = guess.take([i])
        with torch.no_grad():
            back = coder.reconstruct(study.train.images.batch([i]))
            value = float(sum(model.image_losses(back, one.boxes, one.classes, one.ignore).values()))
        assert found.values[i] == pytest.approx(value, rel=1e-3, abs=1e-5)
        assert found.scored[i] == bool((seen.scores[i][seen.valid[i]] >= 0.5).any())


def test_without_a_confident_detection_there_is_no_term(study):
    blind = detector(study)
    with torch.no_grad():
        for layer in blind.head.classification_head.module_list:
            layer.weight.zero_()
            layer.bias.view(-1, 4)[:, 0] = 0.4  # background 1.49 of 4.49: each class 0.22, so seen and never sure
    for how, coder in (("self_training", None), ("consistency", Fixed(lambda x: x))):
        found, seen = term(study, how, coder, model=blind, score_above=0.2)
        assert seen.valid.any(1).all() and not found.scored.any()
        assert term(study, how, coder, model=blind, score_above=0.2, pseudo_above=0.21)[0].scored.all()


def test_doubt_is_the_entropy_of_the_most_uncertain_detection(study):
    values, found = term(study, "doubt")
    assert found.valid.any(1).any()
    for i in range(10):
        each = [-sum(p * math.log(p) for p in row if p > 0) for row in found.probs[i][found.valid[i]].tolist()]
        assert values.scored[i] == bool(each)
        if each:
            assert values.values[i] == pytest.approx(max(each), rel=1e-5)


def test_the_learned_term_is_what_the_head_predicts(study):
    model = detector(study)
    found, _ = term(study, "learned", model=model)
    want = training.learned_losses(model, study.train.images.take(range(10)))
    assert found.values == pytest.approx(want.double().numpy()) and found.scored.all()
    assert len(set(found.values.round(6))) > 5


def test_the_hidden_term_is_the_loss_against_the_truth(study):
    hidden = study.train.labels.take(range(10))
    model = detector(study)
    found, _ = term(study, "hidden", hidden=hidden, model=model)
    want = multibox(model, study.train.images.take(range(10)), hidden)
    assert np.array_equal(found.values, want.values) and np.array_equal(found.scored, want.scored)


# ----------------------------------------------------------------------------------------------------- a task-aware VAE


def judged(study, **changes):
    """A VAE's reconstructions of images 0..5, of which 4, 1 and 2 are labelled, and what the detector's term is."""
    settings = study.config.replace(task_weight=7.0, **changes)
    coder, model = coder_of(study), detector(study)
    labelled, images = np.array([4, 1, 2]), study.train.images
    labels = study.train.labels.take(labelled)
    term = dual_vae.task_term(settings, model, images, labelled, labels, "cpu")
    return coder, model, term, coder.reconstruct(images.batch(range(6)))


def grads(coder):
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in coder.parameters()])


@pytest.mark.parametrize("released", [False, True])
def test_the_detectors_loss_reaches_the_vae_but_not_as_released_and_never_the_detector(study, released):
    coder, model, term, back = judged(study, as_released=released)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    value = term(back, torch.arange(6))
    assert value.item() > 0.01
    (back.sum() * 0 + value).backward()
    assert bool(grads(coder).abs().max() > 1e-6) is not released
    assert not released or grads(coder).count_nonzero() == 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_task_term_is_the_weighted_mean_of_the_labelled_rows_losses(study):
    coder, model, term, back = judged(study)
    each = []
    for row in (1, 2, 4):
        truth = study.train.labels.take([row])
        parts = model.image_losses(back[row : row + 1].detach(), truth.boxes, truth.classes, truth.ignore)
        each.append(float(sum(parts.values()).detach()))
    rows = torch.arange(6)
    assert term(back, rows).item() == pytest.approx(7 * sum(each) / 3, rel=1e-4)
    assert term(back[[5, 2]], rows[[5, 2]]).item() == pytest.approx(7 * each[1], rel=1e-4)  # its place is its row's
    _, _, few, _ = judged(study, task_images=2)
    assert few(back, rows).item() == pytest.approx(7 * sum(each[:2]) / 2, rel=1e-4)  # the first two that are labelled
    nobody = term(back[[0, 3, 5]], rows[[0, 3, 5]])
    assert nobody.item() == 0
    nobody.backward()
    assert grads(coder).count_nonzero() == 0
    # as released, of the image and summed
    _, _, released, _ = judged(study, as_released=True)
    truth = study.train.labels.take([2])
    pixels = study.train.images.batch([2])
    parts = model.image_losses(pixels, truth.boxes, truth.classes, truth.ignore, summed=True)
    want = 7 * float(sum(parts.values()).detach())
    assert released(back[[2]], rows[[2]]).item() == pytest.approx(want, rel=1e-4)


def trained(study, rows=(1, 2, 4, 8), **changes):
    settings, labelled = study.config.replace(vae_iterations=6, **changes), np.array([4, 1, 2])
    coder = build_vae(settings, torch_rng_for(2, "vae weights"))
    dual_vae.train_vae(
        settings,
        coder,
        study.train.images,
        np.array(rows),
        torch_rng_for(3, "vae"),
        detector(study),
        labelled,
        study.train.labels.take(labelled),
    )
    return nn.utils.parameters_to_vector(coder.parameters()).detach()


def test_training_with_the_task_moves_the_vae_and_as_released_it_does_not(study):
    assert not torch.equal(trained(study), trained(study, task_aware=50.0))
    plain, aware = (trained(study, as_released=True, task_aware=weight) for weight in (0.0, 50.0))
    assert torch.equal(plain, aware) and not torch.equal(plain, trained(study))
    # images that nobody labelled teach as without the task
    assert torch.equal(trained(study, rows=(0, 3, 8)), trained(study, rows=(0, 3, 8), task_aware=50.0))


def test_a_task_without_labels_is_refused(study):
    settings, rows = study.config.replace(task_weight=1.0), np.arange(4)
    whole = dict(model=detector(study), labelled=rows, labels=study.train.labels.take(rows))
    for gone in whole:
        with pytest.raises(ValueError, match="task_aware > 0 needs the detector and the labels"):
            dual_vae.train_vae(
                settings, coder_of(study), study.train.images, rows, torch_rng_for(0, "t"), **{**whole, gone: None}
            )


# ------------------------------------------------------------------------------------------------ hidden labels stay so


@pytest.mark.parametrize("method", ["d0", "vae_d0", "chain+vae_d0", "centralised+d0"])
def test_an_upper_bound_must_be_called_one_before_anything_is_loaded(method):
    settings = papers.load("00_start_here", "smoke", **SMALL | {"methods": (method,)})
    with pytest.raises(
        ValueError, match=rf"method '{method.replace('+', '.')}' looks at hidden labels.*diagnostic=True"
    ):
        alfl.prepare(settings.replace(diagnostic=False), device="cpu")
    assert alfl.prepare(settings, device="cpu").config.methods == (method,)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("d4", {"image_loss_head": False}, "'d4' asks a head that learns the detector's loss: set learned_loss=True"),
        ("vae_d4", {"image_loss_head": False}, "'vae_d4' asks a head that learns"),
        *(
            (
                method,
                {"detector": name, "image_loss_head": False},
                f"'{method}' needs the loss of each image.*not '{name}'",
            )
            for method in ("vae", "d3", "vae_d1")
            for name in ("faster_rcnn", "yolo")
        ),
    ],
)
def test_what_a_detector_cannot_do_is_said_before_anything_is_loaded(method, changes, message):
    settings = papers.load("00_start_here", "smoke", **SMALL | {"methods": (method,)})
    with pytest.raises(ValueError, match=message):
        alfl.prepare(settings.replace(**changes), device="cpu")


def test_the_oracle_opens_hidden_labels_to_diagnosis_alone(study):
    pool = pool_of(study, diagnostic=False)
    rows = pool.index[pool.unlabelled()]
    for closed in (pool, Oracle(study.train.labels)):
        with pytest.raises(PermissionError, match="set diagnostic=True"):
            closed.hidden_labels(rows)
    with pytest.raises(PermissionError, match="set diagnostic=True"):
        alfl.see(study, detector(study), pool, pool.unlabelled(), "d0")
    opened = pool_of(study)
    before = opened.bill()
    assert torch.equal(opened.hidden_labels(rows).classes, study.train.labels.take(rows).classes)
    others = alfl.Others(coder=coder_of(study))
    for name in dual_vae.DIAGNOSTIC:
        assert alfl.see(study, detector(study), opened, opened.unlabelled(), name, others).usefulness.scored.all()
    assert opened.bill() == before and before.images == 3  # looked at, and neither paid nor shown
    with pytest.raises(ValueError, match="were not asked"):
        opened.labels_of(rows)


@pytest.mark.parametrize("strategy", alfl.BOX_STRATEGIES)
def test_no_strategy_but_the_upper_bounds_looks_at_hidden_labels(study, strategy, monkeypatch):
    def peeked(oracle, index):
        raise AssertionError("hidden labels were looked at")

    monkeypatch.setattr(Oracle, "hidden_labels", peeked)
    model, pool = detector(study, evidence=True), pool_of(study)
    away = alfl.look(study.config, model, study.train.images.take([0, 1]), study.device)
    others = alfl.Others(own=detector(study), coder=coder_of(study), reference=away)
    positions = pool.unlabelled()[:6]

    def ask():
        sight = alfl.see(study, model, pool, positions, strategy, others)
        return alfl.choose(study.config, strategy, sight, 2, rng_for(0, "ask")).positions

    if strategy in dual_vae.DIAGNOSTIC:
        with pytest.raises(AssertionError, match="hidden labels were looked at"):
            ask()
    else:
        assert len(set(ask().tolist())) == 2


def questions(study, root):
    """Method -> ids that both clients ask in cycle 1, in order, and why, each with a VAE that it trains itself."""
    found = {}
    for run in record.runs(study.config, "dual", root=root, plan=alfl.plan, progress=False):
        clients, model = alfl.start(run, study)
        lively(model, 3).eval()
        for cycle in (0, 1):
            for client in clients:
                alfl.ask(run, study, model, client, cycle)
        rows = [row for client in clients for row in client.pool.asked_rows(1)]
        found[run.method] = {row["id"]: row["score"] for row in rows}
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"task_weight": 5.0, "vae_images": "all", "shortlist": 2.0, "texture_correction": True}],
    ids=["plain", "all"],
)
def test_labels_have_one_door(study, tmp_path, changes):
    """Only labels that nobody ever pays for are changed: no question moves, except where the truth is looked at."""
    study = dataclasses.replace(study, config=study.config.replace(**changes))
    plain = questions(study, tmp_path / "plain")
    assert plain.keys() == set(dual_vae.STRATEGIES) and all(len(asked) == 6 for asked in plain.values())
    _, parts, names = alfl.share_out(study.config, study.train, 0)
    first = set()  # the same in all methods: paid in cycle 0
    for name, part in zip(names, parts, strict=True):
        rng = rng_for(0, "ask", name, 0)
        first |= {int(part[p]) for p in sampling.top_k(sampling.random(len(part), rng), 4, rng)}
    hidden = np.array([row for row in range(len(study.train)) if row not in first])
    labels, order = study.train.labels, torch.arange(len(study.train))
    order[hidden] = torch.as_tensor(np.roll(hidden, 7))
    scrambled = Labels(*(getattr(labels, f.name)[order] for f in dataclasses.fields(labels)))
    assert not torch.equal(scrambled.classes, labels.classes)
    other = dataclasses.replace(study, train=dataclasses.replace(study.train, labels=scrambled))
    moved = questions(other, tmp_path / "scrambled")
    for name in HONEST:
        assert moved[name] == plain[name], name
    for name in dual_vae.DIAGNOSTIC:
        assert moved[name] != plain[name], name
    assert len({tuple(sorted(asked)) for asked in plain.values()}) > 5  # the strategies differ


def test_a_strategy_sees_what_it_needs_and_no_more(study):
    model, pool, coder = detector(study), pool_of(study), coder_of(study)
    positions = pool.unlabelled()[[9, 0, 4]]
    others = alfl.Others(coder=coder)
    looks = {"consistency", "self_training", "doubt"}
    rows = pool.index[positions]
    error = training.vae_losses(coder, study.train.images.take(rows))
    for name in HONEST:
        needed = dual_vae.needs(name)
        want = {"novelty"} & needed | ({"usefulness"} if needed - {"novelty"} else set())
        want |= {"detections"} if needed & looks else set()
        sight = alfl.see(study, model, pool, positions, name, others)
        given = {f.name for f in dataclasses.fields(sight) if getattr(sight, f.name) is not None}
        assert given - {"images", "views"} == want and sight.images == 3
        if "novelty" in want:
            assert torch.equal(sight.novelty, error["reconstruction"])
    wide = dataclasses.replace(study, config=study.config.replace(shortlist=2.0, texture_correction=True))
    sight = alfl.see(wide, model, pool, positions, "vae_d1", others)
    assert torch.equal(sight.latent, error["latent"]) and sight.texture.shape == (3, 2)
    known = pool.index[pool.labelled()]
    assert torch.equal(sight.known_latent, training.vae_losses(coder, study.train.images.take(known))["latent"])
    with pytest.raises(ValueError, match="needs a VAE"):
        alfl.see(study, model, pool, positions, "vae")


# ----------------------------------------------------------------------------------------------------- what is compared


def test_the_sweep_ends_in_the_single_terms(study):
    base = study.config.replace(vae_weight=0.4)
    arms = dual_vae.sweep(base, "d3")
    assert list(arms) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert arms[1.0] == (base, "vae") and arms[0.0] == (base, "d3")
    for alpha in (0.75, 0.5, 0.25):
        assert arms[alpha] == (base.replace(vae_weight=alpha), "vae_d3")
    assert dual_vae.sweep(base)[0.0][1] == "d1"


def test_an_arm_of_the_vae_changes_what_its_name_says(study):
    arms = dual_vae.vae_arms(study.config)
    base = study.config.as_dict()
    changes = [{k for k, v in arm.as_dict().items() if v != base[k]} for arm in arms.values()]
    assert changes == [
        set(),
        *(
            {name}
            for name in (
                "vae_on",
                "vae_refit",
                "vae_corrected",
                "shortlist",
                "standard",
            )
        ),
        {"task_aware", "task_images"},
    ]


VOC = [f"{year}_{i:06d}" for year, count in (("2007", 5011), ("2012", 11540)) for i in range(count)]


def test_the_published_subsets_have_their_sizes_cover_all_and_overlap_nowhere():
    parts = subsets(VOC)
    assert parts == subsets(tuple(VOC)) and list(parts) == ["J1", "J2", "J3", "remaining"]
    assert {name: len(part) for name, part in parts.items()} == {
        "J1": 1000,
        "J2": 15551,
        "J3": 5000,
        "remaining": 11551,
    }
    draw = sorted(random.Random(137).sample(range(16551), 1000))
    assert parts["J1"] == [VOC[row] for row in draw]
    taken = set(parts["J1"])
    assert parts["J2"] == [name for name in VOC if name not in taken]
    assert parts["J3"] == parts["J1"] + parts["J2"][:4000] and parts["remaining"] == parts["J2"][4000:]
    assert sorted(parts["J1"] + parts["J2"]) == sorted(parts["J3"] + parts["remaining"]) == sorted(VOC)
    assert sum(name.startswith("2007") for name in parts["J2"][:4000]) == 4000  # mostly VOC2007
    assert subsets(VOC, seed=138)["J1"] != parts["J1"]


def test_subsets_of_too_few_ids_are_refused():
    with pytest.raises(ValueError, match="a subset of 1000 ids needs as many, got 999"):
        subsets(VOC[:999])
    small = subsets(VOC[:6], first=2, more=3)
    assert [len(small[name]) for name in ("J1", "J2", "J3", "remaining")] == [2, 4, 5, 1]
    assert subsets(VOC[:1000])["J2"] == []
