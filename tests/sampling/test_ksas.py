"""KSAS by hand, its limit for classes without labels and its laws; on boxes against a slow oracle; LoGo's rounds."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import chosen, detections, lists, observed, slow_match, two_views

from fedal_utils.sampling import Scores, top_k
from fedal_utils.sampling.ksas import box_divergence, logo, specialised_divergence
from fedal_utils.sampling.scores import reduce
from fedal_utils.seeding import rng_for, torch_rng_for

fewer = settings(max_examples=40)
HOW = ("sum", "avg", "max")


def logs(*rows):
    """Class scores whose exponentials are these numbers."""
    return torch.tensor(rows, dtype=torch.float64).log()


def reduced(found, own, counts, how):
    return reduce(*box_divergence(found, own, counts), how)


def jeffreys(p, q):
    """Half the sum of both Kullback-Leibler divergences of two lists that sum to one."""
    return sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2


def normed(values):
    return [x / sum(values) for x in values]


def test_ksas_eq_1_to_3_by_hand():
    # n = 2, 1, 0. Client exp(f) = 1, 2, 9: P = (2, 2) / 4; global 1, 1, 1/7: Q = (2, 1) / 3
    client, world, counts = logs([1, 2, 9], [1, 1, 1]), logs([1, 1, 1 / 7], [1, 1, 5]), np.array([2, 1, 0])
    p_to_q = 0.5 * math.log(0.5 * 3 / 2) + 0.5 * math.log(0.5 * 3)
    q_to_p = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    found = specialised_divergence(client, world, counts)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([(p_to_q + q_to_p) / 2, 0], rel=1e-12, abs=1e-15)
    # labels of one class: nothing to disagree on; scores far apart stay finite
    assert specialised_divergence(client, world, np.array([0, 5, 0])).tolist() == [0, 0]
    far = torch.tensor([[5000.0, -5000, 0]])
    assert specialised_divergence(far, -far, np.array([1, 1, 0])).item() == pytest.approx(10_000)
    # without the counts: P = (1, 2, 9) / 12, Q = (7, 7, 1) / 15
    plain = specialised_divergence(client[:1], world[:1], np.ones(3)).item()
    assert plain == pytest.approx(jeffreys([1 / 12, 2 / 12, 9 / 12], [7 / 15, 7 / 15, 1 / 15]), rel=1e-12)


def released(client, world, counts):
    """The released formula as it stands, on today's PyTorch: the prior of a class without labels is ln 0."""
    p, q = ((logits + counts.log()).softmax(1) for logits in (client, world))
    return (F.kl_div(q.log(), p, reduction="none").sum(1) + F.kl_div(p.log(), q, reduction="none").sum(1)) / 2


def test_classes_without_labels_are_a_limit_here_and_nan_in_the_released_formula():
    rng = torch_rng_for(0, "logits")
    client, world = (2 * torch.randn(8, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    counts = torch.tensor([30.0, 0, 2, 0, 9], dtype=torch.float64)
    naive = released(client, world, counts)
    assert naive.isnan().all()
    with pytest.raises(ValueError, match="non-finite score at position 0"):
        top_k(Scores(naive.numpy(), np.ones(8, dtype=bool)), 3, rng_for(0, "t"))
    ours = specialised_divergence(client, world, counts)
    assert torch.isfinite(ours).all() and (ours > 0).all()
    apart = [(released(client, world, counts.clamp(min=n)) - ours).abs().max().item() for n in (1e-2, 1e-5, 1e-8)]
    assert apart[0] > apart[1] > apart[2] and apart[2] < 1e-6  # n -> 0 comes as near as you like
    # with labels of every class, both are one
    torch.testing.assert_close(specialised_divergence(client, world, counts + 1), released(client, world, counts + 1))


numbers = st.floats(-20, 20)
rows = st.lists(st.tuples(*[numbers] * 3, *[numbers] * 3), min_size=1, max_size=5)
some_counts = st.lists(st.integers(0, 40), min_size=3, max_size=3).filter(any)


def two_models(some):
    both = torch.tensor(some, dtype=torch.float64)
    return both[:, :3], both[:, 3:]


@given(rows, some_counts)
def test_ksas_equals_a_loop_and_is_symmetric_and_not_negative(some, counts):
    client, world = two_models(some)
    found = specialised_divergence(client, world, np.array(counts))
    known = [c for c in range(3) if counts[c]]
    for i, row in enumerate(some):
        p, q = (normed([counts[c] * math.exp(model[c]) for c in known]) for model in (row[:3], row[3:]))
        assert found[i].item() == pytest.approx(jeffreys(p, q), rel=1e-6, abs=1e-9)
    assert (found >= 0).all() and torch.equal(found, specialised_divergence(world, client, np.array(counts)))
    assert not specialised_divergence(client, client.clone(), np.array(counts)).any()


@given(rows, some_counts, st.floats(1e-6, 1e6), st.floats(-30, 30))
def test_counts_in_another_unit_and_a_constant_on_the_scores_change_nothing(some, counts, unit, shift):
    client, world = two_models(some)
    want = specialised_divergence(client, world, np.array(counts))
    for found in (
        specialised_divergence(client, world, np.array(counts) * unit),
        specialised_divergence(client + shift, world - shift, np.array(counts)),
    ):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
    # what the models say of a class without labels changes nothing either, not even to the last bit
    rubbish = torch.where(torch.tensor(counts) > 0, client, 1e3)
    assert torch.equal(specialised_divergence(rubbish, world, np.array(counts)), want)


A, B = (0, 0, 10, 10), (40, 40, 60, 60)
NEAR_A = (0, 0, 10, 8)  # IoU .8
MIXED, OTHER = (0.2, 0.6, 0.2), (0.4, 0.2, 0.4)


# n = 3, 1: pi = 1, 3/2, 1/2. MIXED: .2, .9, .1; OTHER: .4, .3, .2
PAIR = jeffreys(normed([0.2, 0.9, 0.1]), normed([0.4, 0.3, 0.2]))
# silence about MIXED: .95, .05 * 3/4, .05 * 1/4, weighted .95, .05625, .00625; about OTHER: .95, .05 / 3, .05 * 2/3
LONE_MIXED = jeffreys(normed([0.2, 0.9, 0.1]), normed([0.95, 0.05625, 0.00625]))
LONE_OTHER = jeffreys(normed([0.4, 0.3, 0.2]), normed([0.95, 0.025, 0.05 / 3]))


def test_classes_without_labels_are_left_out_of_class_vectors():
    # (.1, .3, .1, .5) without its last class is MIXED, (.2, .1, .2, .5) OTHER
    found = detections([(A, (0.1, 0.3, 0.1, 0.5))], [(A, (0.1, 0.3, 0.1, 0.5))], columns=4)
    own = detections([(A, (0.2, 0.1, 0.2, 0.5))], [], columns=4)
    values = reduced(found, own, np.array([3, 1, 0]), "sum").values
    assert values == pytest.approx([PAIR, LONE_MIXED], rel=1e-6)
    # all of it on the class without labels: what is left is floored at 1e-6, so alike; silence is .95 to .05
    sure = detections([(A, (0, 0, 0, 1.0))], columns=4)
    value = reduced(sure, detections([], columns=4), np.array([1, 1, 0]), "sum").values
    assert value == pytest.approx([jeffreys([1 / 3] * 3, [0.95, 0.025, 0.025])], rel=1e-6)


def slow_ksas(found, own, counts, how, unseen=0.05):
    """One image from lists of (box, class vector) by loops; None where both lists are empty."""
    mine = slow_match([b for b, _ in found], [b for b, _ in own])
    known = [c for c, n in enumerate(counts) if n > 0]
    mean = sum(counts[c] for c in known) / len(known)
    pi = [1.0] + [counts[c] / mean for c in known]

    def kept(p):
        return [p[0]] + [p[c + 1] for c in known]

    def weighted(p):
        return normed([w * max(x, 1e-6) for w, x in zip(pi, p, strict=True)])

    def alone(p):
        shares = normed([max(x, 1e-6) for x in kept(p)[1:]])
        return jeffreys(weighted(kept(p)), weighted([1 - unseen] + [unseen * x for x in shares]))

    values = [jeffreys(weighted(kept(found[i][1])), weighted(kept(own[j][1]))) for i, j in mine.items()]
    values += [alone(p) for i, (_, p) in enumerate(found) if i not in mine]
    values += [alone(p) for j, (_, p) in enumerate(own) if j not in mine.values()]
    if not values:
        return None
    return {"sum": sum(values), "avg": sum(values) / len(values), "max": max(values)}[how]


def rows_of(found):
    return [[(box, p) for box, p, *_ in image] for image in lists(found)]


@fewer
@given(st.integers(0, 10**6), st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any))
def test_ksas_on_boxes_equals_the_oracle_and_its_laws_hold(seed, counts):
    found, own = two_views(seed, images=8, most=4)
    one, other = rows_of(found), rows_of(own)
    order = rng_for(seed, "order").permutation(len(one))
    padded = detections(*one, columns=4, length=11), detections(*other, columns=4, length=9)
    rubbish = [dataclasses.replace(d, boxes=d.boxes * d.valid[..., None], probs=d.probs.nan_to_num(5)) for d in padded]
    for d in rubbish:
        d.boxes[~d.valid] = 0  # of no size, where the first kind of padding is NaN
    for how in HOW:
        scores = reduced(found, own, np.array(counts), how)
        want = [slow_ksas(a, b, counts, how) for a, b in zip(one, other, strict=True)]
        assert scores.scored.tolist() == [w is not None for w in want]
        assert scores.values == pytest.approx([w or 0 for w in want], rel=1e-4, abs=1e-6)
        assert (scores.values >= 0).all()
        for a, b, n in (
            (own, found, counts),
            (found, own, [7.3 * n for n in counts]),
            (*padded, counts),
            (*rubbish, counts),
        ):
            again = reduced(a, b, np.array(n), how)
            assert again.values == pytest.approx(scores.values, rel=1e-9, abs=1e-12)
            assert np.array_equal(again.scored, scores.scored)
        moved = reduced(found.take(order), own.take(order), np.array(counts), how)
        assert np.array_equal(moved.values, scores.values[order])
    values, valid = box_divergence(found, own, np.array(counts))
    assert not values[~valid].any() and torch.equal(valid[:, : found.labels.shape[1]], found.valid)


@pytest.mark.parametrize("how", HOW)
def test_equal_detectors_disagree_on_nothing(how):
    one = rows_of(two_views(3, images=8)[0])
    one[0] = [(A, MIXED + (0.0,)), (A, OTHER + (0.0,)), (B, MIXED + (0.0,))]  # two objects in one place
    found = detections(*one, columns=4)
    scores = reduced(found, found, np.array([4, 0, 1]), how)
    assert not scores.values.any() and scores.scored.tolist() == [bool(image) for image in one]


def sure_as(*best):
    """Class scores of two classes, (N, 2), whose better one has these probabilities."""
    return logs(*[[p, 1 - p] for p in best])


def lone(alone, embedding, global_scores, k, rng):
    what = {"class_scores": global_scores, "local_only_class_scores": alone, "local_only_embeddings": embedding}
    return logo(observed(len(global_scores), **what), k, rng)


def test_logo_clusters_the_lone_models_features_times_its_doubt():
    # one feature for all; (1 - .5) * 10 twice, (1 - 1) * 10 twice: the clusters are the unsure and the sure
    alone = torch.tensor([[0.0, 0], [500, 0], [0, 0], [0, 500]])
    for world, want in ((sure_as(0.6, 0.9, 0.7, 0.8), [0, 3]), (sure_as(0.9, 0.6, 0.7, 0.8), [1, 2])):
        assert lone(alone, torch.full((4, 1), 10.0), world, 2, rng_for(0, "c")).positions.tolist() == want


def test_logo_fills_up_by_rounds_where_images_are_equal_and_warns_nobody():
    embedding = torch.tensor([[0.0], [0], [0], [9], [9]])
    world = sure_as(0.55, 0.6, 0.65, 0.7, 0.75)  # entropy falls with the position
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {k: lone(torch.zeros(5, 2), embedding, world, k, rng_for(0, "c")).positions.tolist() for k in range(6)}
    assert found == {0: [], 1: [0], 2: [0, 3], 3: [0, 1, 3], 4: [0, 1, 3, 4], 5: [0, 1, 2, 3, 4]}


def test_boxes_by_hand():
    found = detections([(A, MIXED)], [(A, MIXED)], [], [(B, OTHER), (A, MIXED)], [])
    own = detections([(NEAR_A, OTHER)], [], [(A, OTHER)], [(NEAR_A, OTHER), (B, OTHER), ((80, 80, 90, 90), MIXED)], [])
    values, valid = box_divergence(found, own, np.array([3, 1]))  # two columns of the global one, three
    want = [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 1, 0, 0, 1], [0] * 5]
    assert valid.int().tolist() == want and values.dtype == torch.float64
    assert values[0, 0].item() == pytest.approx(PAIR, rel=1e-6)
    assert values[1, 0].item() == pytest.approx(LONE_MIXED, rel=1e-6)
    assert values[2, 2].item() == pytest.approx(LONE_OTHER, rel=1e-6)
    assert values[3].tolist() == pytest.approx([0, PAIR, 0, 0, LONE_MIXED], rel=1e-6)
    want = {
        "sum": [PAIR, LONE_MIXED, LONE_OTHER, PAIR + LONE_MIXED, 0],
        "avg": [PAIR, LONE_MIXED, LONE_OTHER, (PAIR + LONE_MIXED) / 3, 0],
        "max": [PAIR, LONE_MIXED, LONE_OTHER, max(PAIR, LONE_MIXED), 0],
    }
    sight = observed(5, found, local_detections=own, labelled_class_counts=np.array([3, 1]))
    for how, numbers in want.items():
        scores = reduced(found, own, np.array([3, 1]), how)
        assert scores.values == pytest.approx(numbers, rel=1e-6)
        assert scores.scored.tolist() == [True] * 4 + [False]
        choice = chosen(f"ksas_{how}", sight, 5, rng_for(0, "c"))
        assert np.array_equal(choice.scores.values, scores.values) and choice.positions[-1] == 4
