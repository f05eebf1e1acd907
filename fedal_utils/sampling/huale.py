"""HUALE's filter cascade (Hierarchical Uncertainty Aggregation and Emphasis Loss, IEEE BigData 2023), CALD and HUA.

HUALE's text, equations and code are not public. What is known are its README, its author's page and numbers printed in
its figures: an image and its mirrored copy are looked at; images with much entropy are retrieved; four metrics then
rank them in turn, as an ordered cascade of filters and never as one weighted sum. Each function below says how it is
known: *stated* (in words or released code of its authors), *from figures* (read off published figures) or
*reconstructed* (ours; no number here is evidence about theirs). Divergences and entropies are in nats.

Beside it what it is compared with: CALD (Yu et al. 2022, 2103.10374), consistency with changed views of an image, and
the pooling of HUA (Park et al., ICLR 2023), which shares three words of the name and none of the method.

Images are rows of padded `Detections`: N images, T boxes, C classes, background first. As in `sampling`, a score is a
pure function of what the model says, bigger = ask first. Every strategy sees a `Sight`, which holds no labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import metrics
from ..config import Config, QueryConfig
from ..data.boxes import Detections
from . import strategies as sampling
from .strategies import Choice, Scores, Sight

LN2 = math.log(2)
SUM_TOLERANCE = 1e-3  # a softmax kept in half precision adds up to one no better
SIZES = QueryConfig().cascade  # budgets left by retrieval and the first three filters; the last filter leaves one
NEEDS = {
    "cascade": ("detections", "flipped"),
    "cald": ("detections", "views", "labelled"),
    "hua": ("detections", "crowd"),
    "hua_entropy": ("detections", "crowd"),
}
STRATEGIES = tuple(NEEDS)
SCORE_ABOVE = {"cald": 0.05, "hua": 0.3, "hua_entropy": 0.3}  # detections that count, by their released codes

# -------------------------------------------------------------------------------------------- divergence and matching


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions along the last axis (Lin 1991), 0 .. ln 2; zeros are fine.

    ValueError: entries below 0 or not finite, or rows that do not sum to one.
    """
    p, q = (torch.as_tensor(values, dtype=torch.float64) for values in (p, q))
    for name, values in (("p", p), ("q", q)):
        total = values.sum(-1)
        if bool((values < 0).any()) or not bool(((total - 1).abs() <= SUM_TOLERANCE).all()):  # NaN is not <= anything
            raise ValueError(
                f"{name} must hold distributions, rows >= 0 that sum to 1, got sums {total.flatten()[:5].tolist()}"
            )
    return _divergence(p, q)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    entropy = torch.special.entr
    p, q = p.double(), q.double()
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).sum(-1).clamp(0, LN2)


def match(plain: Detections, other_boxes: Tensor, other: Detections, iou: float = 0.5) -> Tensor:
    """Pairs one-to-one, image by image, from the largest IoU of all pairs down to `iou`; ties: the lowest rows.

    other_boxes (N, T2, 4): where `other`'s boxes lie in the pixels of the plain images. Returns (N, T), the row of
    `other` that each plain box got, -1 where none. *Reconstructed*: that views are matched is from figures, how is not.
    """
    if 0 in (plain.boxes.shape[1], other_boxes.shape[1]):
        return torch.full(plain.labels.shape, -1, device=plain.labels.device)

    def pairs(boxes: Tensor, valid: Tensor, others: Tensor, valid_too: Tensor) -> Tensor:
        table = _iou(boxes[:, :, None], others[:, None])  # (N, T, T2)
        table = torch.where(valid[:, :, None] & valid_too[:, None] & (table >= iou), table, -1.0)
        partner = torch.full(valid.shape, -1, device=valid.device)
        mine = torch.arange(valid.shape[1], device=valid.device)
        # A pair that is the best of its row and of its column is what the greedy rule would take sooner or later: all
        # of them at once, until none is left, gives the same pairs in a few rounds. max takes the first of equals.
        while True:
            best, column = table.max(2)  # (N, T)
            agreed = (best >= 0) & (table.argmax(1).gather(1, column) == mine)
            if not bool(agreed.any()):
                return partner
            image, row = agreed.nonzero(as_tuple=True)
            partner[image, row] = column[image, row]
            table[image, row] = -1
            table[image, :, column[image, row]] = -1

    size = plain.boxes.shape[1] * other_boxes.shape[1]
    return _in_blocks(pairs, size, plain.boxes, plain.valid, other_boxes, other.valid)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of (..., 4) xyxy boxes with (..., 4), as they broadcast, in float64; 0 where neither has an area."""
    (ax, ay, au, av), (bx, by, bu, bv) = a.double().unbind(-1), b.double().unbind(-1)
    width, height = torch.minimum(au, bu) - torch.maximum(ax, bx), torch.minimum(av, bv) - torch.maximum(ay, by)
    common = width.clamp_(min=0) * height.clamp_(min=0)
    union = (au - ax) * (av - ay) + (bu - bx) * (bv - by) - common
    return torch.where(union > 0, common / union, 0.0)


def _in_blocks(work: Callable[..., Tensor], pairs: int, *tensors: Tensor) -> Tensor:
    """`work` on a few rows at a time, each a table of so many `pairs`: those of a whole pool fit in no cache."""
    rows = max(1, 2**17 // max(1, pairs))
    return torch.cat([work(*block) for block in zip(*(t.split(rows) for t in tensors), strict=True)])


def _closest(boxes: Tensor, others: Tensor, valid: Tensor) -> Tensor:
    """(N, T) row of the valid one of `others` (N, T2, 4) with the largest IoU to each of (N, T, 4); ties: the lowest.

    0 where an image has no valid one; T2 >= 1.
    """

    def rows(boxes: Tensor, others: Tensor, valid: Tensor) -> Tensor:
        table = _iou(boxes[:, :, None], others[:, None])  # (N, T, T2)
        return torch.where(valid[:, None], table, -1.0).argmax(2)

    return _in_blocks(rows, boxes.shape[1] * others.shape[1], boxes, others, valid)


def _sound(found: Detections, what: str) -> Detections:
    """The same detections with room for at least one box an image; ValueError where a real one makes no sense."""
    valid = found.valid
    probs = found.probs[valid].double()
    finite = torch.isfinite(found.boxes[valid]).all(1) & torch.isfinite(found.scores[valid])
    faults = {
        "non-finite class probabilities": ~torch.isfinite(probs).all(1),
        "class probabilities that do not sum to 1": ((probs.sum(1) - 1).abs() > SUM_TOLERANCE) | (probs < 0).any(1),
        "a non-finite box or score": ~finite,
        f"a class above {found.probs.shape[-1] - 1}": found.labels[valid] >= found.probs.shape[-1],
    }
    for fault, where in faults.items():
        if bool(where.any()):
            image = int(valid.nonzero()[where][0, 0])
            raise ValueError(f"{what}: {fault} in image {image} of {len(found)}: a broken model must not choose labels")
    if found.boxes.shape[1]:
        return found

    def blank(t: Tensor) -> Tensor:
        return t.new_zeros(len(found), 1, *t.shape[2:])

    plain = (blank(t) for t in (found.boxes, found.scores, found.labels, found.probs))
    return Detections(*plain, {name: blank(t) for name, t in found.extra.items()})


def _two_views(plain: Detections, flipped: Detections) -> tuple[Detections, Detections]:
    if len(plain) != len(flipped) or plain.probs.shape[-1] != flipped.probs.shape[-1]:
        raise ValueError(
            f"two views of the same images and classes are needed, got {len(plain)} and {len(flipped)} images, "
            f"{plain.probs.shape[-1]} and {flipped.probs.shape[-1]} columns of probabilities"
        )
    return _sound(plain, "plain images"), _sound(flipped, "flipped images")


def _scores(total: Tensor, count: Tensor) -> Scores:
    """Means (N,) of what was added up; an image where nothing was counted has no score."""
    return Scores((total / count.clamp(min=1)).cpu().numpy(), (count > 0).cpu().numpy())


# --------------------------------------------------------------------------------------------------- HUALE: retrieval


def retrieval(plain: Detections, flipped: Detections) -> Scores:
    """Entropy in nats of the most uncertain box, 0 .. ln(C + 1): E(x) = max_i (- sum_c p_ic ln p_ic).

    The boxes are those of the plain view. An image in which only one view has a box is as inconsistent as can be and
    gets ln(C + 1), whatever that box says; without a box in either view there is no score. *From figures*: nats and the
    maximum (one printed entropy per image); that it is the retrieval score, and both rules, are *reconstructed*.
    """
    plain, flipped = _two_views(plain, flipped)
    largest = math.log(plain.probs.shape[-1])
    scores = sampling.reduce(sampling.entropy(plain), plain.valid, "max")
    too = flipped.valid.any(1).cpu().numpy()
    values = np.where(scores.scored != too, largest, np.minimum(scores.values, largest))
    return Scores(values, scores.scored | too)


# ----------------------------------------------------------------------------------------- HUALE: the four filters


def semantic_disagreement(plain: Detections, flipped: Detections) -> Scores:
    """Mean divergence of what the two views call the same box, 0 .. ln 2; a box that one view alone has counts ln 2.

    The mean runs over matched pairs (JS of their class vectors, background included) and unmatched boxes of either
    view. The name "semantic affinity" and its place are *from figures*, the formula is *reconstructed*.
    """
    plain, flipped, paired, partner, lone = _paired(plain, flipped)
    apart = torch.zeros(paired.shape, dtype=torch.float64, device=paired.device)
    apart[paired] = _divergence(plain.probs[paired], flipped.probs[partner])
    return _scores(apart.sum(1) + lone * LN2, paired.sum(1) + lone)


def category_diversity(plain: Detections, flipped: Detections, labelled: np.ndarray | None = None) -> Scores:
    """JS divergence of the two views' class histograms, 0 .. ln 2; ln 2 where one view is empty.

    labelled (C,): boxes of each class among the labels already paid for, in any unit; if given, the divergence of the
    image's classes (both views together) from it is added, as in CALD; ln 2 for all while there is no labelled box.
    The metric's name and place are *from figures*, the formula and the switch are *reconstructed*.
    """
    plain, flipped = _two_views(plain, flipped)
    counts = [_histogram(found) for found in (plain, flipped)]
    values = _histogram_divergence(*counts)
    scored = (counts[0] + counts[1]).sum(1) > 0
    if labelled is not None:
        known = _per_class(labelled, plain.probs.shape[-1] - 1).to(values.device)
        values = values + _histogram_divergence(counts[0] + counts[1], known)
    return _scores(values * scored, scored.long())


def overlap_ratio(plain: Detections, flipped: Detections, above: float = 0.1) -> Scores:
    """Share of an image's boxes that overlap another of its boxes with IoU > `above`, 0 .. 1; the larger of two views.

    The name, its place and "0 for a single box, a ratio with the number of boxes below" are *from figures*; the rule
    is *reconstructed*, and it is known not to give both printed values (.800 and .333) for any threshold.
    """

    def touching(boxes: Tensor, valid: Tensor) -> Tensor:
        table = _iou(boxes[:, :, None], boxes[:, None])  # (N, T, T)
        table = torch.where(valid[:, :, None] & valid[:, None], table, -1.0)
        table.diagonal(dim1=1, dim2=2).fill_(-1)
        return (table > above).any(2).sum(1)

    plain, flipped = _two_views(plain, flipped)
    shares, count = [], plain.valid.sum(1) + flipped.valid.sum(1)
    for found in (plain, flipped):
        touched = _in_blocks(touching, found.boxes.shape[1] ** 2, found.boxes, found.valid)
        shares.append(touched / found.valid.sum(1).clamp(min=1).double())
    return Scores(torch.maximum(*shares).cpu().numpy(), (count > 0).cpu().numpy())


def localisation_confidence(plain: Detections, flipped: Detections) -> Scores:
    """1 - the mean confidence in the four sides of the boxes of both views, 0 .. 1: badly placed boxes first.

    From `extra['sides']` of both views. A detector without them is judged by how well its two views agree: side k of a
    matched pair has q_k = max(0, 1 - |difference| / the pair's mean width or height), a box without a partner q = 0;
    the mean runs over pairs and lone boxes. Four numbers a box and the name are *from figures*, the reduction is
    *reconstructed*, and the stand-in is ours alone.
    """
    plain, flipped, paired, partner, lone = _paired(plain, flipped)
    if "sides" in plain.extra and "sides" in flipped.extra:
        total, count = torch.zeros(len(plain), dtype=torch.float64, device=paired.device), 0
        for what, found in (("plain", plain), ("flipped", flipped)):
            sides = found.extra["sides"].double()
            if not bool(((sides >= 0) & (sides <= 1))[found.valid].all()):
                raise ValueError(f"the confidence of a side must lie in [0, 1]: {what} images have others")
            total = total + sides.mean(2).masked_fill(~found.valid, 0).sum(1)
            count = count + found.valid.sum(1)
    else:
        a, b = plain.boxes[paired].double(), flipped.boxes[partner].double()  # (pairs, 4)
        side = (a[:, 2:] - a[:, :2] + b[:, 2:] - b[:, :2]) / 2  # (pairs, 2) mean width, height
        agreed = (1 - (a - b).abs() / side.repeat(1, 2)).clamp(min=0)  # matched: IoU >= 0.5, so no side is 0
        sure = torch.zeros(paired.shape, dtype=torch.float64, device=paired.device)
        sure[paired] = agreed.mean(1)
        total, count = sure.sum(1), paired.sum(1) + lone
    return _scores(count - total, count)


FILTERS: dict[str, Callable[[Detections, Detections], Scores]] = {  # in the published order
    "semantic": semantic_disagreement,
    "diversity": category_diversity,
    "overlap": overlap_ratio,
    "localisation": localisation_confidence,
}


def _paired(
    plain: Detections, flipped: Detections
) -> tuple[Detections, Detections, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Both views; paired (N, T) bool; (image, row) of each pair in the flipped view; boxes (N,) that nobody matches."""
    plain, flipped = _two_views(plain, flipped)
    index = match(plain, flipped.boxes, flipped)
    paired = index >= 0
    lone = plain.valid.sum(1) + flipped.valid.sum(1) - 2 * paired.sum(1)
    return plain, flipped, paired, (paired.nonzero()[:, 0], index[paired]), lone


def _histogram(found: Detections) -> Tensor:
    """(N, C) float64: boxes of each class."""
    counts = torch.zeros(len(found), found.probs.shape[-1], dtype=torch.float64, device=found.labels.device)
    return counts.scatter_add(1, found.labels.clamp(min=0), found.valid.double())[:, 1:]


def _histogram_divergence(a: Tensor, b: Tensor) -> Tensor:
    """JS of counts (..., C), each divided by its sum; ln 2 where a sum is 0."""
    totals = [counts.sum(-1, keepdim=True) for counts in (a, b)]
    apart = _divergence(*(counts / torch.where(n > 0, n, 1.0) for counts, n in zip((a, b), totals, strict=True)))
    return torch.where((totals[0] > 0).squeeze(-1) & (totals[1] > 0).squeeze(-1), apart, LN2)


def _per_class(labelled: np.ndarray, classes: int) -> Tensor:
    values = np.asarray(labelled, dtype=np.float64)
    if values.shape != (classes,) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"labelled boxes: {classes} finite numbers >= 0, one a class, are needed, got {labelled!r}")
    return torch.from_numpy(values)


# ----------------------------------------------------------------------------------------------------- HUALE: cascade


def cascade_stages(
    sight: Sight,
    k: int,
    rng: np.random.Generator,
    sizes: Sequence[float] = SIZES,
    order: Sequence[str] = tuple(FILTERS),
    empty: str = "last",
) -> list[tuple[str, np.ndarray, Scores]]:
    """Retrieval and four filters: (name, the positions it left, best first, its scores of all images) of each.

    Retrieval leaves round(sizes[0] * k) images, the filters in `order` round(sizes[1] * k), ..., round(sizes[3] * k)
    and k; never more than there are. Images without a box in either view come as `empty` says, at every step. The
    cascade and its order are *stated* and *from figures*, its sizes are *reconstructed*.
    """
    if sorted(order) != sorted(FILTERS):
        raise ValueError(f"the order of the cascade must name each of {tuple(FILTERS)} once, got {tuple(order)!r}")
    falling = [*sizes, 1.0]
    if len(sizes) != 4 or not all(math.inf > a >= b for a, b in zip(falling, falling[1:], strict=False)):
        raise ValueError(f"sizes of a cascade: four falling numbers >= 1, in budgets, got {tuple(sizes)!r}")
    _require(sight, "cascade", NEEDS["cascade"], k)
    steps = {"retrieval": retrieval, **{name: FILTERS[name] for name in order}}
    scores = [step(sight.detections, sight.flipped) for step in steps.values()]
    kept = [max(k, min(sight.images, round(size * k))) for size in falling]
    left = sampling.cascade(scores, kept, rng, empty)
    return list(zip(steps, left, scores, strict=True))


# --------------------------------------------------------------------------------------------------------------- CALD


def cald_consistency(sight: Sight, beta: float = 1.3, most: int = 40, keep: int = 50) -> Scores:
    """Minus CALD's consistency, so that bigger = ask first; Yu et al. 2022. In [-max(beta, 2 - beta), 0].

    For box i of the plain image and a view: j is the view's box of the largest IoU with where i lies there (ties, also
    all 0: the best scored), m = IoU + (1 - JS(p_i, p_j)) * (s_i + s_j) / 2, s the largest foreground probability. The
    view's value is the smallest |m - beta| over i, the image's the mean over views; 0 without a box: asked first. Of an
    image with more than `most` boxes, at most `keep` enter, at even steps down the scores (so 41..50 all do).
    *Stated* by CALD's released code. *Reconstructed*: p with background, JS in nats (beta decides neither), m = 0 where
    the view shows nothing, the even steps (rows floor(r n / keep), r = 0, 1, ...).
    """
    if not 0 < keep or not math.isfinite(beta):
        raise ValueError(f"CALD keeps one box or more and measures from a finite beta, got keep={keep}, beta={beta}")
    _require(sight, "cald_consistency", ("detections", "views"))
    plain = _sound(sight.detections, "plain images")
    image, row = _spaced(plain, most, keep).nonzero(as_tuple=True)  # of the R boxes that enter
    total = torch.zeros(len(plain), dtype=torch.float64, device=plain.boxes.device)
    for name, view in sorted(sight.views.items()):
        found = _sound(view.found, f"view {name!r}")
        moved = view.moved if view.moved.shape[1] else torch.zeros_like(plain.boxes)
        if not bool(torch.isfinite(moved[image, row]).all()):
            raise ValueError(f"view {name!r}: the moved boxes must be finite pixels")
        j = _closest(moved, found.boxes, found.valid)[image, row]
        p, q = plain.probs[image, row], found.probs[image, j]  # (R, C + 1)
        agreed = (1 - _divergence(p, q)) * (p[:, 1:].amax(1).double() + q[:, 1:].amax(1)) / 2
        m = _iou(moved[image, row], found.boxes[image, j]) + agreed
        m = torch.where(found.valid.any(1)[image], m, 0.0)
        away = torch.full(plain.labels.shape, torch.inf, dtype=torch.float64, device=m.device)
        away[image, row] = (m - beta).abs()
        total = total + away.amin(1)
    values = torch.where(plain.valid.any(1), total / len(sight.views), 0.0)
    return Scores(0.0 - values.cpu().numpy(), np.ones(len(plain), dtype=bool))


def _spaced(found: Detections, most: int, keep: int) -> Tensor:
    """(N, T) bool: all boxes of an image, or `keep` at even steps down its scores where there are more than `most`."""
    count = found.valid.sum(1, keepdim=True)  # (N, 1)
    order = found.scores.masked_fill(~found.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # (N, T) 0 for the best scored
    # 7 boxes, 3 kept: ranks 0 * 7 // 3, 1 * 7 // 3, 2 * 7 // 3 = 0, 2, 4
    r = -(-rank * keep // count.clamp(min=1))  # the first r with r * n / keep >= rank
    stepped = (r < keep) & (r * count // keep == rank)
    return found.valid & (stepped | (count <= most))


def _class_vectors(found: Detections) -> Tensor:
    """(N, C) float64: the largest score among the boxes of each class, 0 where there is none."""
    scores = torch.where(found.valid, found.scores.double(), 0.0)
    best = scores.new_zeros(len(found), found.probs.shape[-1])
    return best.scatter_reduce(1, found.labels.clamp(min=0), scores, "amax")[:, 1:]


def cald(sight: Sight, k: int, rng: np.random.Generator, beta: float = 1.3, keep: float = 1.2) -> Choice:
    """CALD: the round(keep * k) least consistent images, of them the k whose classes the labelled set lacks.

    Second stage: v (N, C) is the mean, over the changed views and the plain image, of each class's best score; the
    images of the largest JS(softmax(mean boxes of each class per labelled image), softmax(v)) are asked, those that
    show nothing in any view before them; nothing is updated within the batch. *Stated* by CALD's released code;
    *reconstructed*: that the plain image is one of the views. The scores are those of the first stage.
    """
    if not 1 <= keep < math.inf:
        raise ValueError(f"CALD's first stage must keep at least the budget, got keep={keep} budgets")
    _require(sight, "cald", NEEDS["cald"], k)
    first = cald_consistency(sight, beta)
    known = _per_class(sight.labelled, sight.detections.probs.shape[-1] - 1)
    seen = [sight.detections, *(view.found for _, view in sorted(sight.views.items()))]
    v = torch.stack([_class_vectors(found) for found in seen]).mean(0)
    unlike = jensen_shannon(v.softmax(1), known.softmax(0).to(v.device))
    second = Scores(unlike.cpu().numpy(), (v > 0).any(1).cpu().numpy())
    sizes = (max(k, min(sight.images, round(keep * k))), k)
    return Choice(sampling.cascade([first, second], sizes, rng, "first")[-1], first)


# ---------------------------------------------------------------------------------------------------------------- HUA


def epistemic(probs: Tensor, predicted_loss: Tensor, scale: float) -> Tensor:
    """H(mean) - E[H] in nats, >= 0, of class vectors drawn from Dirichlet(probs * e), e = 25 scale / (loss + 1e-7).

    probs (B, C + 1), predicted_loss (B,), scale: the mean predicted loss. Little loss expected is much evidence, so
    little is left to learn. *Stated* (Park et al. 2023 and its released code), but for the expectation: theirs is a
    mean over 500 samples, here E[H] = psi(e + 1) - sum_c p_c psi(p_c e + 1).
    """
    p = probs.double() / probs.double().sum(-1, keepdim=True)
    evidence = 25 * scale / (predicted_loss.double() + 1e-7)
    within = torch.digamma(evidence + 1) - (p * torch.digamma(p * evidence[..., None] + 1)).sum(-1)
    return (torch.special.entr(p).sum(-1) - within).clamp(min=0)


def pool_hierarchy(values: Tensor, image: Tensor, obj: Tensor, level: Tensor, label: Tensor, images: int) -> Tensor:
    """One number an image (images,) from its boxes' `values` (B,), bottom up; 0 for an image without any.

    Mean over the boxes of one (object, level, class), sum over classes, maximum over levels, sum over objects.
    image, obj, level, label: (B,) int64 >= 0, objects counted within their image. *Stated* (Park et al. 2023).
    """
    values = values.double()
    for name, field in (("image", image), ("object", obj), ("level", level), ("label", label)):
        if field.shape != values.shape or bool((field < 0).any()):
            raise ValueError(f"each of {len(values)} boxes needs one {name} >= 0, got {field}")
    if not len(values):
        return values.new_zeros(images)
    objects, levels, labels = (int(field.max()) + 1 for field in (obj, level, label))
    key = ((image * objects + obj) * levels + level) * labels + label
    # A key divided by the number of labels is the key of the next step: the same digits without the last one.
    for how, digits in (("mean", labels), ("sum", levels), ("amax", objects)):
        key, group = key.unique(return_inverse=True)
        values = values.new_zeros(len(key)).scatter_reduce(0, group, values, how, include_self=False)
        key = key // digits
    return values.new_zeros(images).index_add(0, key, values)


def hua(
    sight: Sight,
    k: int,
    rng: np.random.Generator,
    quota: float = 0.15,
    score_above: float = 0.3,
    iou: float = 0.5,
    uncertainty: str = "epistemic",
) -> Choice:
    """HUA: the k - n largest pooled uncertainties, and n = round(quota * k) images drawn from those that scored 0.

    Boxes before suppression with a foreground probability above `score_above` and an IoU above `iou` with a detection
    scored above `score_above`; the detection of the largest IoU is the object that a box belongs to. A box is of its
    most probable class, so crowd rows that hold it for another class are left out. uncertainty: 'epistemic', from
    `crowd.extra['predicted_loss']`, or 'entropy' of the class vector. Without `extra['level']` all boxes are of one.
    Images without such a box score 0; of fewer than n of them all are taken. Ties break by `rng`. *Stated* by HUA's
    released code; that the mean predicted loss runs over all boxes of `crowd` in this pool is *reconstructed*.
    """
    if uncertainty not in ("epistemic", "entropy") or not 0 <= quota <= 1:
        raise ValueError(f"HUA: 'epistemic' or 'entropy' and a quota in [0, 1], got {uncertainty!r} and {quota}")
    _require(sight, "hua", NEEDS["hua"], k)
    crowd = _sound(sight.crowd, "boxes before suppression")
    objects = _sound(sight.detections, "plain images").above(score_above)
    own = crowd.probs.gather(2, crowd.labels.clamp(min=0)[..., None]).squeeze(2)  # (N, A)
    kept = crowd.valid & (own > score_above) & (own >= crowd.probs[..., 1:].amax(2))
    image, row = kept.nonzero(as_tuple=True)  # (B,)

    def covering(boxes: Tensor, image: Tensor) -> Tensor:
        return _closest(boxes[:, None], objects.boxes[image], objects.valid[image])[:, 0]

    obj = _in_blocks(covering, objects.boxes.shape[1], crowd.boxes[image, row], image)
    near = _iou(crowd.boxes[image, row], objects.boxes[image, obj]) > iou  # a box that is no object has no area
    image, row, obj = image[near], row[near], obj[near]
    if uncertainty == "epistemic":
        losses = _predicted_losses(crowd)
        scale = float(losses[crowd.valid].mean()) if bool(crowd.valid.any()) else 0.0
        values = epistemic(crowd.probs[image, row], losses[image, row], scale)
    else:
        values = torch.special.entr(crowd.probs[image, row].double()).sum(1)
    level = crowd.extra["level"][image, row].long() if "level" in crowd.extra else torch.zeros_like(row)
    boxes = (t.cpu() for t in (values, image, obj, level, crowd.labels[image, row]))  # a GPU adds in any order
    pooled = pool_hierarchy(*boxes, sight.images).numpy()
    scores = Scores(pooled, np.ones(sight.images, dtype=bool))

    unseen = np.flatnonzero(pooled == 0)
    drawn = rng.choice(unseen, min(round(quota * k), len(unseen)), replace=False)
    others = np.setdiff1d(np.arange(sight.images), drawn)
    best = others[sampling.top_k(Scores(pooled[others], scores.scored[others]), k - len(drawn), rng)]
    return Choice(np.concatenate([best, drawn]), scores)


def _predicted_losses(crowd: Detections) -> Tensor:
    if "predicted_loss" not in crowd.extra:
        raise ValueError(
            "epistemic uncertainty needs the predicted loss of each box, which this detector does not give: build it "
            "with its evidence head (config `evidence=True`), or ask by 'hua_entropy'"
        )
    losses = crowd.extra["predicted_loss"].double()
    if not bool(((losses >= 0) & torch.isfinite(losses))[crowd.valid].all()):
        raise ValueError("predicted losses must be finite numbers >= 0: a broken model must not choose labels")
    return losses


# --------------------------------------------------------------------------------------------------- choosing by name


def needs(strategy: str) -> frozenset[str]:
    """The fields of `Sight` that a strategy reads."""
    if strategy not in NEEDS:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    return frozenset(NEEDS[strategy])


def choose(
    strategy: str,
    sight: Sight,
    k: int,
    rng: np.random.Generator,
    empty: str = "last",
    sizes: Sequence[float] = SIZES,
    order: Sequence[str] = tuple(FILTERS),
    quota: float = 0.15,
    beta: float = 1.3,
) -> Choice:
    """The k images of a pool to ask next, by a strategy of this module; the scores of a cascade are its retrieval's.

    empty, sizes and order are the cascade's, quota is HUA's and beta CALD's: these two have rules of their own for
    images without detections.
    """
    needs(strategy)
    if strategy == "cascade":
        stages = cascade_stages(sight, k, rng, sizes, order, empty)
        return Choice(stages[-1][1], stages[0][2])
    if strategy == "cald":
        return cald(sight, k, rng, beta)
    return hua(sight, k, rng, quota, uncertainty="entropy" if strategy == "hua_entropy" else "epistemic")


def _require(sight: Sight, who: str, fields: Sequence[str], k: int = 0) -> None:
    """ValueError unless k images are there to choose, and the Sight has these fields, about the same images."""
    if not 0 <= k <= sight.images:
        raise ValueError(f"budget of {k} images, but the pool has {sight.images} unlabelled ones")
    for name in fields:
        value = getattr(sight, name)
        if value is None or (isinstance(value, Mapping) and not value):
            raise ValueError(f"strategy {who!r} needs {name!r} of its Sight, which has none")
        found = {name: value} if isinstance(value, Detections) else {}
        if name == "views":
            found = {f"view {key!r}": view.found for key, view in value.items()}
            for key, view in value.items():
                if view.moved.shape != sight.detections.boxes.shape:
                    raise ValueError(
                        f"view {key!r} moves boxes of shape {tuple(view.moved.shape)}, but the plain images have "
                        f"{tuple(sight.detections.boxes.shape)}"
                    )
        for key, one in found.items():
            if len(one) != sight.images:
                raise ValueError(f"strategy {who!r} needs {key!r} of {sight.images} images, got {len(one)}")


# ------------------------------------------------------------------------------------------- the experiment's settings

PLAIN, WHOLE = "plain", "HUALE losses"
EMPHASIS = 1.0  # strength; the larger of the two that the notes propose


def loss_arms(config: Config) -> dict[str, Config]:
    """The same experiment under other losses: torchvision's own, all of HUALE's (*reconstructed*), and each one alone.

    The weights are the config's `box_weight` (of an IoU loss) and `companion_weight`. Which loss HUALE's "EIoU" names
    is not known: Extended IoU stands in the whole, the likelier reading, and Efficient IoU alone beside it; the IoU
    head is the other reading of "Synchronic IoU-Localization".
    """
    plain = config.replace(box_loss="smooth_l1", auxiliary_head="none", emphasis=0.0)
    return {
        PLAIN: plain,
        WHOLE: plain.replace(box_loss="extended_iou", auxiliary_head="sides", emphasis=EMPHASIS),
        "Extended IoU alone": plain.replace(box_loss="extended_iou"),
        "Efficient IoU alone": plain.replace(box_loss="efficient_iou"),
        "side likelihood alone": plain.replace(auxiliary_head="sides"),
        "IoU head alone": plain.replace(auxiliary_head="iou"),
        "emphasis alone": plain.replace(emphasis=EMPHASIS),
    }


def filter_orders(config: Config) -> dict[str, Config]:
    """The same experiment with the cascade's four filters in other orders: as published, reversed, turned by two."""
    first = tuple(FILTERS)
    orders = (first, first[::-1], first[2:] + first[:2])
    return {" > ".join(order): config.replace(cascade_order=order) for order in orders}


EFFECTS = {  # name: (arm and method) minus (arm and method)
    "losses and acquisition": ((WHOLE, "cascade"), (PLAIN, "random")),
    "losses, random labels": ((WHOLE, "random"), (PLAIN, "random")),
    "losses, cascade's labels": ((WHOLE, "cascade"), (PLAIN, "cascade")),
    "acquisition, plain losses": ((PLAIN, "cascade"), (PLAIN, "random")),
    "acquisition, HUALE losses": ((WHOLE, "cascade"), (WHOLE, "random")),
    "against CALD as published": ((WHOLE, "cascade"), (PLAIN, "cald")),
    "cascade - CALD, equal losses": ((WHOLE, "cascade"), (WHOLE, "cald")),
}


def gain_split(table: pd.DataFrame, y: str = "ap50") -> pd.DataFrame:
    """HUALE's gain over random taken apart, in points (100 x AP), paired by seed.

    table: rows of `record.table` of several arms, with a column `arm` (names of `loss_arms`). One row per effect of
    `EFFECTS` and part of the curve: 'all cycles' (as HUALE's abstract averages), 'without the first' (as CALD's),
    'first cycle' (where nothing has been chosen yet: random labels for everybody). Columns: effect, part, points, low,
    high (`metrics.paired_test`), p, seeds. An effect whose runs are missing is left out.
    """
    curves = metrics.curves_by_arm(table, y)
    parts = {"all cycles": slice(None), "without the first": slice(1, None), "first cycle": slice(0, 1)}
    found = []
    for effect, (one, other) in EFFECTS.items():
        a, b = curves.get(one, {}), curves.get(other, {})
        seeds = sorted(set(a) & set(b))
        for part, where in parts.items() if seeds else ():
            if any(len(a[seed]) != len(b[seed]) or not len(a[seed][where]) for seed in seeds):
                continue
            found.append(metrics.effect(effect, part, a, b, seeds, where))
    return pd.DataFrame(found, columns=metrics.EFFECT)


def published_split(paper: pd.DataFrame) -> pd.DataFrame:
    """The same arithmetic on the published curves (`record.read_paper("huale")`): points of HUALE over another method.

    Columns: item, minus, all (mean over all cycles), later (without the first), first (the first cycle alone), last.
    The baselines' curves were trained without HUALE's losses, so losses and acquisition cannot be told apart here.
    """
    rows = []
    for item, part in paper[paper["x"].notna()].groupby("item", sort=False):
        wide = part.pivot(index="x", columns="setting", values="value").sort_index()
        for other in ("Random", "CALD"):
            gap = (wide["HUALE"] - wide[other]).to_numpy()
            rows.append(
                {
                    "item": item,
                    "minus": other,
                    "all": gap.mean(),
                    "later": gap[1:].mean(),
                    "first": gap[0],
                    "last": gap[-1],
                }
            )
    return pd.DataFrame(rows)
