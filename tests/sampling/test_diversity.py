"""Sets that cover the pool, and outliers: by hand, against slow loops, and their laws."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedal_utils.sampling import diversity, top_k
from fedal_utils.seeding import rng_for, torch_rng_for


def k_center(*given):
    """Positions, and the distances before the choice."""
    found = diversity.k_center(*given)
    return found.positions, found.scores.values


def badge(*given):
    """Positions, and the gradients' lengths."""
    found = diversity.badge(*given)
    return found.positions, found.scores.values


def points(*places):
    """Embeddings of one dimension, easy to see: (N, 1)."""
    return torch.tensor(places, dtype=torch.float32)[:, None]


def test_k_center_by_hand():
    # known: 0. Pool: 1, 4, 10, 11. Farthest from 0: 11 (11 away). Then 1: 1, 4: 4, 10: min(10, 1) = 1 -> 4.
    # Then 1: min(1, 3) = 1, 10: 1: a tie.
    positions, distances = k_center(points(1, 4, 10, 11), points(0), 3, rng_for(0, "c"))
    assert positions[:2].tolist() == [3, 1] and positions[2] in (0, 2)
    assert distances == pytest.approx([1, 4, 10, 11])  # before the choice
    thirds = {int(k_center(points(1, 4, 10, 11), points(0), 3, rng_for(seed, "c"))[0][2]) for seed in range(20)}
    assert thirds == {0, 2}


def test_k_center_without_labelled_images_draws_the_first_centre():
    runs = [k_center(points(0, 1, 10), torch.zeros(0, 1), 2, rng_for(seed, "c")) for seed in range(40)]
    assert {int(positions[0]) for positions, _ in runs} == {0, 1, 2}
    assert all(positions[1] == (2 if positions[0] < 2 else 0) for positions, _ in runs)
    assert all(distances.tolist() == [0, 0, 0] for _, distances in runs)


def slow_k_center(pool, known, k):
    """Sener and Savarese 2018, algorithm 1, word by word: u = argmax_i min_j distance(x_i, x_j), k times."""
    centres, chosen = list(known), []
    for _ in range(k):
        distance = [min(math.dist(x, c) for c in centres) if i not in chosen else -1 for i, x in enumerate(pool)]
        chosen.append(distance.index(max(distance)))
        centres.append(pool[chosen[-1]])
    return chosen


def test_k_center_equals_the_oracle_over_many_labelled_images():
    rng = rng_for(0, "embedding")
    pool, known = rng.normal(size=(40, 6)), rng.normal(size=(300, 6))  # more centres than one block holds
    positions, distances = k_center(torch.from_numpy(pool), torch.from_numpy(known), 25, rng_for(0, "c"))
    assert positions.tolist() == slow_k_center(pool, known, 25)
    assert distances == pytest.approx(np.linalg.norm(pool[:, None] - known[None], axis=2).min(1))


def test_k_center_of_equal_images_takes_each_once():
    positions, _ = k_center(torch.ones(5, 3), torch.ones(2, 3), 5, rng_for(0, "c"))
    assert sorted(positions.tolist()) == [0, 1, 2, 3, 4]
    assert len({tuple(k_center(torch.ones(5, 3), torch.ones(2, 3), 5, rng_for(s, "c"))[0]) for s in range(9)}) > 3
    assert len(k_center(torch.ones(5, 3), torch.ones(2, 3), 0, rng_for(0, "c"))[0]) == 0


def hallucinated(logits, embedding):
    """(N, C * D) gradients of the last layer, one row an image, as Ash et al. 2020 eq. 1 writes them."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(p)), logits.argmax(1)] -= 1
    return np.einsum("nc,nd->ncd", p, embedding).reshape(len(p), -1)


def slow_badge(gradients, k, rng):
    """Arthur and Vassilvitskii's seeding on the rows; the first centre is the longest, as in BADGE's code."""
    length = np.linalg.norm(gradients, axis=1)
    tie = rng.permutation(len(length))
    chosen = [int(tie[length[tie].argmax()])] if k else []
    while len(chosen) < k:
        weights = np.min([((gradients - gradients[c]) ** 2).sum(1) for c in chosen], axis=0)
        chosen.append(int(rng.choice(len(weights), p=weights / weights.sum())))
    return chosen, length


def test_badge_ash_2020_by_hand():
    # p = (3/4, 1/4): a = (-1/4, 1/4), |a|^2 = 1/8; h = 4 and 8: |g|^2 = 2 and 8. p = (1/4, 3/4), h = 2: a turned, 1/2
    logits = torch.tensor([[3.0, 1], [3, 1], [1, 3]], dtype=torch.float64).log()
    positions, norms = badge(logits, points(4, 8, 2), 1, rng_for(0, "c"))
    assert positions.tolist() == [1] and norms == pytest.approx([math.sqrt(2), math.sqrt(8), math.sqrt(0.5)])
    # g = -1, -2 and +1/2 times (1, -1): squared distances to -2 are 1 * 2 and 6.25 * 2, so the third is drawn with
    # probability 6.25 / 7.25 = .862: 345 of 400, standard deviation 6.9
    second = Counter(int(badge(logits, points(4, 8, 2), 2, rng_for(seed, "c"))[0][1]) for seed in range(400))
    assert set(second) == {0, 2} and 317 < second[2] < 373


@pytest.mark.parametrize("spread", [0.1, 3, 30])
def test_badge_equals_the_naive_version_that_writes_all_gradients_down(spread):
    rng = rng_for(0, "gradients")
    for seed in range(5):
        logits, embedding = spread * rng.normal(size=(60, 5)), rng.normal(size=(60, 7))
        want, lengths = slow_badge(hallucinated(logits, embedding), 25, rng_for(seed, "c"))
        found, norms = badge(torch.from_numpy(logits), torch.from_numpy(embedding), 25, rng_for(seed, "c"))
        assert found.tolist() == want and norms == pytest.approx(lengths, rel=1e-9)


def test_badge_of_equal_images_takes_each_once_and_others_first():
    logits, embedding = torch.zeros(6, 3), torch.ones(6, 2) / 3
    for wide in (1, 500):  # sums of 500 thirds are rounded
        positions, norms = badge(logits, embedding.repeat(1, wide), 6, rng_for(0, "c"))
        assert sorted(positions.tolist()) == list(range(6)) and norms.min() == norms.max()
    runs = [tuple(badge(logits, embedding, 6, rng_for(seed, "c"))[0].tolist()) for seed in range(60)]
    assert len(set(runs)) > 50 and all({run[i] for run in runs} == set(range(6)) for i in range(6))
    # three different images, copied: all three come before any copy
    rng = torch_rng_for(0, "copies")
    logits, embedding = (torch.randn(3, width, generator=rng).repeat(4, 1) for width in (4, 6))
    for seed in range(40):
        positions, _ = badge(logits, embedding, 12, rng_for(seed, "c"))
        assert sorted(positions[:3] % 3) == [0, 1, 2] and sorted(positions) == list(range(12))


def slow_model_outlier(logits, held, classes=None):
    """1 - mean over columns of the part of held-out logits below, of equal ones the half; counted one by one."""
    out = []
    for row in logits:
        ranks = []
        for c, x in enumerate(row):
            column = [h[c] for v, h in enumerate(held) if classes is None or classes[v] == c]
            if column:
                ranks.append(sum(1.0 if h < x else 0.5 if h == x else 0.0 for h in column) / len(column))
        out.append(1 - sum(ranks) / len(ranks))
    return out


def test_model_outlier_monarch_2021_ch_4_by_hand():
    held = torch.tensor([[1.0, 10], [2, 20], [2, 30], [3, 40]])
    # (2, 35): ranks (1 + 2/2) / 4 = .5 and 3/4 -> 1 - .625; (0, 0): 1; (9, 99): 0; (1, 10): .5/4 each -> .875
    pool = torch.tensor([[2.0, 35], [0, 0], [9, 99], [1, 10]])
    scores = diversity.model_outlier(pool, held)
    assert scores.values.tolist() == [0.375, 1, 0, 0.875] and scores.scored.all()
    # column 0 among images 1 and 3 alone (2, 3), column 1 among 0 and 2 (10, 30): (2, 35): (.25 + 1) / 2
    by_class = diversity.model_outlier(pool, held, torch.tensor([1, 0, 1, 0])).values
    assert by_class.tolist() == [0.375, 1, 0, 1 - (0 + 0.25) / 2]
    only_one = diversity.model_outlier(pool, held, torch.ones(4, dtype=torch.int64)).values  # column 0 does not count
    assert only_one.tolist() == [0.25, 1, 0, 0.875]


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_model_outlier_equals_the_slow_loop_ties_and_all(images, held, columns, seed, coarse):
    rng = rng_for(seed, "outlier")
    pool, others = rng.normal(size=(images, columns)), rng.normal(size=(held, columns))
    if coarse:
        pool, others = np.round(pool), np.round(others)
    classes = torch.from_numpy(rng.integers(0, columns, held))
    tensors = torch.from_numpy(pool), torch.from_numpy(others)
    assert diversity.model_outlier(*tensors).values == pytest.approx(slow_model_outlier(pool, others), abs=1e-12)
    found = diversity.model_outlier(*tensors, classes)
    assert found.values == pytest.approx(slow_model_outlier(pool, others, classes.tolist()), abs=1e-12)
    assert ((found.values >= 0) & (found.values <= 1)).all() and len(found) == images
    turned = diversity.model_outlier(tensors[0], tensors[1].flip(0), classes.flip(0))
    assert np.array_equal(turned.values, found.values)  # the order of the held-out images does not matter


def unit(rows):
    return [[x / (math.hypot(*row) or 1) for x in row] for row in rows]


def test_embedding_outlier_by_hand():
    # known: east, north. East: 0 and sqrt 2; west: 2 and sqrt 2; twice north: 0; the length does not matter
    known, pool = torch.tensor([[3.0, 0], [0, 0.5]]), torch.tensor([[7.0, 0], [-1, 0], [0, 2], [0, 0]])
    nearest = diversity.embedding_outlier(pool, known, 1)
    assert nearest.values == pytest.approx([0, math.sqrt(2), 0, 1], abs=1e-12) and nearest.scored.all()
    both = diversity.embedding_outlier(pool, known, 10).values  # all that there are
    root = math.sqrt(2)
    assert both == pytest.approx([root / 2, (2 + root) / 2, root / 2, 1], abs=1e-12)


@pytest.mark.parametrize("block", [3, 1024])
def test_embedding_outlier_equals_the_slow_loop_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(diversity, "BLOCK", block)
    rng = rng_for(0, "embedding")
    known = rng.normal(size=(31, 5)) + 1
    pool = np.concatenate([rng.normal(size=(20, 5)), 3 * known[:2], np.zeros((1, 5)), 1e200 * known[2:3]])
    for k in (1, 4, 31, 50):
        want = [sum(sorted(math.dist(x, y) for y in unit(known))[:k]) / min(k, 31) for x in unit(pool)]
        found = diversity.embedding_outlier(torch.from_numpy(pool), torch.from_numpy(known), k)
        assert found.values == pytest.approx(want, abs=1e-9)
        if k == 1:
            assert found.values[[20, 21, 23]].tolist() == [0, 0, 0]  # of labelled images themselves: no rounding


def test_without_labelled_images_nothing_is_far_from_them():
    scores = diversity.embedding_outlier(torch.ones(3, 2), torch.zeros(0, 2))
    assert not scores.scored.any() and not scores.values.any()
    assert len({tuple(top_k(scores, 3, rng_for(seed, "t"))) for seed in range(40)}) == 6  # so they come at random


def heaps(sizes=(5, 3, 9), wide=4, seed=0, spread=0.1):
    """(N, wide) float32 heaps far from each other, and the heap of each row."""
    rng = rng_for(seed, "heaps")
    heap = np.repeat(np.arange(len(sizes)), sizes)
    rows = 100 * np.eye(wide)[heap] + spread * rng.normal(size=(len(heap), wide))
    order = rng.permutation(len(heap))
    return torch.from_numpy(rows[order]).float(), heap[order]


@pytest.mark.parametrize("many", [10_000, 10])  # k-means, k-means by batches
def test_clusters_give_the_image_nearest_to_each_centre_the_largest_first(many, monkeypatch):
    monkeypatch.setattr(diversity, "MANY", many)
    embedding, heap = heaps()
    asked = diversity.cluster(embedding, 3, rng_for(0, "c"))
    assert asked.dtype == np.int64 and heap[asked].tolist() == [2, 0, 1]
    rows = embedding.double().numpy()
    if many > 17:  # centres are means: the nearest one by a loop
        for one in asked:
            members = [i for i in range(len(heap)) if heap[i] == heap[one]]
            centre = rows[members].mean(0)
            assert one == min(members, key=lambda i: math.dist(rows[i], centre))


@pytest.mark.parametrize("many", [10_000, 10])
def test_clusters_are_filled_up_where_images_are_equal_and_take_each_once(many, monkeypatch):
    monkeypatch.setattr(diversity, "MANY", many)
    rows = torch.tensor([[0.0, 0], [9, 9], [-9, 9]])[[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]]
    for k in (3, 5, 6, 8, 11):
        asked = diversity.cluster(rows, k, rng_for(k, "c"))
        assert len(set(asked.tolist())) == k
        assert len({tuple(row) for row in rows[asked[:3]].tolist()}) == 3  # all three before any copy
    assert sorted(diversity.cluster(rows, 12, rng_for(0, "c")).tolist()) == list(range(12))
    assert diversity.cluster(rows, 0, rng_for(0, "c")).tolist() == []
    firsts = {tuple(diversity.cluster(rows, 3, rng_for(seed, "c"))) for seed in range(40)}
    assert {positions[0] for positions in firsts} == set(range(6))  # any of the six copies of the largest heap


def test_representative_by_hand():
    # centre of the pool: east (two to the east, north and south cancel out); labelled: north
    pool, known = torch.tensor([[2.0, 0], [5, 0], [0, 1], [0, -3]]), torch.tensor([[0.0, 4]])
    assert diversity.representative(pool, known).values == pytest.approx([1, 1, -1, 1], abs=1e-12)  # south: 0 - -1
    assert diversity.representative(pool, known[:0]).values == pytest.approx([1, 1, 0, 0], abs=1e-12)


@pytest.mark.parametrize("block", [4, 1024])
def test_representative_equals_the_slow_loop_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(diversity, "BLOCK", block)
    rng = rng_for(0, "embedding")
    pool, known = rng.normal(size=(23, 5)) + 1, rng.normal(size=(9, 5)) - 1

    def centre(rows):
        (mean,) = unit([[sum(column) for column in zip(*unit(rows), strict=True)]])
        return mean

    def cosine(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True))

    want = [cosine(x, centre(pool)) - cosine(x, centre(known)) for x in unit(pool)]
    found = diversity.representative(torch.from_numpy(pool), torch.from_numpy(known)).values
    assert found == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: k_center(bad, points(1, 1), 1, rng_for(0, "c")),
        lambda bad: k_center(points(1, 1), bad, 1, rng_for(0, "c")),
        lambda bad: badge(torch.zeros(2, 3), bad, 1, rng_for(0, "c")),
        lambda bad: diversity.model_outlier(bad, points(1)),
        lambda bad: diversity.embedding_outlier(points(1), bad),
        lambda bad: diversity.cluster(bad, 1, rng_for(0, "c")),
        lambda bad: top_k(diversity.embedding_outlier(bad, points(1)), 1, rng_for(0, "c")),
        lambda bad: top_k(diversity.representative(bad, points(1)), 1, rng_for(0, "c")),
        lambda bad: top_k(diversity.representative(points(1), bad), 1, rng_for(0, "c")),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_selects_nothing(call, value):
    with pytest.raises(ValueError, match="non-finite"):
        call(points(1, value))
