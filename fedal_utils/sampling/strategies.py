"""Scores (pure, one number an image, bigger = ask first) and, apart from them, selections.

A strategy sees a `Sight` and nothing else: what the model says about images, never their labels. Scores of single
detections are reduced to one number an image by sum, mean or maximum. Source of the reductions: van Bommel 2021,
section 7.1 of the released code. Whole images are scored by the class scores of one model or of a committee of models:
N images, C classes, D embedding, M members. Diversity and mixtures of strategies follow R. Monarch, Human-in-the-Loop
Machine Learning (2021), chapters 3 to 5; L labelled images, V held-out ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.boxes import Detections

EMPTY_RULES = ("last", "first", "never")
UNCERTAINTIES = ("entropy", "margin", "confidence", "ratio")  # of whole images
BLOCK = 1024  # rows of a large table that are looked at in float64 at a time
MANY = 10_000  # images, above which k-means goes by batches


@dataclass(frozen=True)
class Scores:
    """values (N,) float64, finite where `scored`; scored (N,) bool: the image had something to score."""

    values: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class View:
    """The same images after a change of their pixels: where the plain detections' boxes lie there, and what is seen.

    moved: (N, T, 4) xyxy pixels of the changed images, row by row the boxes of `Sight.detections`.
    """

    moved: Tensor
    found: Detections


@dataclass(frozen=True)
class Sight:
    """All that a strategy may see of N unlabelled images; what it does not need (see `needs`) may be None.

    detections: on the images as they are, cut at the score threshold; reference: on images that the model was not
    trained on and nobody will ask for. flipped: on the mirrored images, boxes mapped
    back. views: changed images by name. crowd: all boxes before non-maximum suppression. embedding (N, D) of these
    images, known (L, D) of the labelled ones. labelled (C,): mean boxes of each class per labelled image.

    Of whole images, class scores before the softmax: logits (N, C) of the model that is asked, own_logits (N, C) of the
    client's own last local model, committee (M, N, C) of every client's model; alone_logits (N, C) and alone_embedding
    (N, D) of a model that was trained on the client's labels alone. own: detections by the client's own detector.

    Of a VAE: novelty (N,) reconstruction error, latent (N, Z) and known_latent (L, Z) means; texture (N, 2) of the
    images. usefulness: how much labels of an image would teach, in a sense of `dual_vae.TERMS`.
    """

    images: int
    detections: Detections | None = None
    flipped: Detections | None = None
    views: Mapping[str, View] = field(default_factory=dict)
    crowd: Detections | None = None
    embedding: Tensor | None = None
    known: Tensor | None = None
    labelled: np.ndarray | None = None
    logits: Tensor | None = None
    own_logits: Tensor | None = None
    committee: Tensor | None = None
    alone_logits: Tensor | None = None
    alone_embedding: Tensor | None = None
    own: Detections | None = None
    novelty: Tensor | None = None
    texture: Tensor | None = None
    latent: Tensor | None = None
    known_latent: Tensor | None = None
    usefulness: Scores | None = None
    reference: Detections | None = None


@dataclass(frozen=True)
class Choice:
    """positions (k,) to ask, first one first; scores of all N images: why."""

    positions: np.ndarray
    scores: Scores


def least_confidence(detections: Detections) -> Tensor:
    """1 - confidence of each detection; van Bommel 2021, 7.1. Returns (N, T) in [0, 1]; padding is not looked at."""
    return 1 - detections.scores


def entropy(detections: Detections) -> Tensor:
    """Entropy of each detection's class distribution in nats; Settles (2012) eq. 2.3. (N, T) in [0, ln(C + 1)]."""
    return torch.special.entr(detections.probs).sum(-1)


def margin(detections: Detections) -> Tensor:
    """1 - (best - second best) class probability; Settles (2012) eq. 2.2, turned so that bigger = ask first. (N, T)."""
    top = detections.probs.topk(2, dim=-1).values  # (N, T, 2) best, second
    return 1 - (top[..., 0] - top[..., 1])


def ratio(detections: Detections) -> Tensor:
    """Second best / best class probability of each detection, 1 = torn between two; Monarch (2021), ch. 3. (N, T)."""
    top = detections.probs.topk(2, dim=-1).values  # (N, T, 2) best, second
    return top[..., 1] / top[..., 0]


def reduce(values: Tensor, valid: Tensor, how: str) -> Scores:
    """One number an image from its detections' (N, T) values: 'sum', 'avg' or 'max' over `valid` (N, T) bool."""
    count = valid.sum(1)
    values = values.double()
    if not bool(torch.isfinite(values[valid]).all()):
        image = int((~torch.isfinite(values) & valid).any(1).nonzero()[0])
        raise ValueError(f"non-finite score for image {image} of {len(values)}: a broken model must not choose labels")
    total = values.masked_fill(~valid, 0).sum(1)
    if how == "sum":
        out = total
    elif how == "avg":
        out = total / count.clamp(min=1)
    elif how == "max":
        out = values.masked_fill(~valid, -torch.inf).amax(1) if values.shape[1] else total
        out = out.masked_fill(count == 0, 0)
    else:
        raise ValueError(f"reduction must be 'sum', 'avg' or 'max', got {how!r}")
    return Scores(out.cpu().numpy(), (count > 0).cpu().numpy())


def box_count(detections: Detections) -> Scores:
    """How many detections the image has: crowded first. Zero is a count, so every image is scored."""
    count = detections.valid.sum(1).double().cpu().numpy()
    return Scores(count, np.ones(len(count), dtype=bool))


def random(images: int, rng: np.random.Generator) -> Scores:
    """A uniform number an image: the baseline that every strategy must beat."""
    return Scores(rng.random(images), np.ones(images, dtype=bool))


def uncertainty(logits: Tensor, how: str) -> Scores:
    """How unsure a model is of whole images, from its class scores (N, C), in float64; Settles (2012), ch. 2.

    'entropy' of the class probabilities in nats (eq. 2.3), 0 .. ln C; 'margin', 1 - (best - second best) (eq. 2.2),
    and 'confidence', 1 - best (least confidence, eq. 2.1), both turned so that bigger = ask first; 'ratio', second best
    / best (Monarch 2021, ch. 3), taken from the difference of the class scores. Probabilities of exactly 0 are no harm.
    """
    logits = _finite("logits", logits.double())
    if how in ("margin", "ratio") and logits.shape[1] < 2:
        raise ValueError(f"a {how} needs two classes or more, got logits {tuple(logits.shape)}")
    probs = logits.softmax(1)
    if how == "entropy":
        values = torch.special.entr(probs).sum(1)
    elif how == "margin":
        best, second = probs.topk(2, dim=1).values.unbind(1)
        values = 1 - (best - second)
    elif how == "confidence":
        values = 1 - probs.amax(1)
    elif how == "ratio":
        best, second = logits.topk(2, dim=1).values.unbind(1)
        values = (second - best).exp()
    else:
        raise ValueError(f"uncertainty must be one of {UNCERTAINTIES}, got {how!r}")
    return Scores(values.cpu().numpy(), np.ones(len(values), dtype=bool))


def query_by_committee(committee: Tensor) -> Scores:
    """Mean divergence in nats of the members' class probabilities from their mean, 0 .. ln M, in float64.

    1/M sum_m KL(P_m || P), P the consensus 1/M sum_m P_m; McCallum and Nigam 1998; Settles (2012), ch. 3.
    committee: (M, N, C) class scores; one member alone never disagrees.
    """
    if committee.dim() != 3 or not len(committee):
        raise ValueError(f"a committee must be (M, N, C) with M >= 1, got {tuple(committee.shape)}")
    members = _finite("committee", committee.double().transpose(0, 1)).log_softmax(2)  # (N, M, C)
    consensus = members.logsumexp(1, keepdim=True) - math.log(members.shape[1])  # (N, 1, C) logs: nothing underflows
    apart = (members.exp() * (members - consensus)).sum(2)  # (N, M)
    return Scores(apart.mean(1).clamp(min=0).cpu().numpy(), np.ones(len(apart), dtype=bool))


_VALUES: dict[str, Callable[[Detections], Tensor]] = {
    "confidence": least_confidence,
    "entropy": entropy,
    "margin": margin,
    "ratio": ratio,
}
_SHORT = {"sum": "confidence_sum", "avg": "confidence_avg", "max": "confidence_max"}
BOX_STRATEGIES = (
    "random",
    "sum",
    "avg",
    "max",
    "count",
    "coreset",
    *(f"{value}_{how}" for value in ("entropy", "margin", "ratio") for how in ("sum", "avg", "max")),
    "model_outlier",
    "embedding_outlier",
    "cluster",
    "representative",
    "mix",
)
CLASS_STRATEGIES = ("random", "entropy", "margin", "confidence", "ratio", "coreset", "badge", "qbc")
STRATEGIES = tuple(dict.fromkeys(BOX_STRATEGIES + CLASS_STRATEGIES))
# active-vision's quickstart mixture, its uncertainties averaged over an image's boxes.
MIX = {"avg": 0.4, "ratio_avg": 0.2, "entropy_avg": 0.2, "model_outlier": 0.1, "random": 0.1}
TOGETHER = ("coreset", "badge", "cluster", "mix")  # choose a set of images, and score none
_NEEDS = {
    **dict.fromkeys(BOX_STRATEGIES, ("detections",)),
    **dict.fromkeys(UNCERTAINTIES, ("logits",)),
    "random": (),
    "coreset": ("embedding", "known"),
    "badge": ("logits", "embedding"),
    "qbc": ("committee",),
    "model_outlier": ("detections", "reference"),
    "embedding_outlier": ("embedding", "known"),
    "cluster": ("embedding",),
    "representative": ("embedding", "known"),
    "mix": ("detections", "reference"),
}


def needs(strategy: str) -> frozenset[str]:
    """The fields of `Sight` that a strategy reads; none for one that looks at nothing."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    return frozenset(_NEEDS[strategy])


def choose(strategy: str, sight: Sight, k: int, rng: np.random.Generator, empty: str = "last") -> Choice:
    """The k images of a pool to ask next, by a strategy of this module."""
    if strategy == "coreset":
        known = _known(sight, strategy)
        positions, distances = k_center(required(sight, strategy, "embedding"), known, k, rng)
        return Choice(positions, Scores(distances, np.ones(sight.images, dtype=bool)))
    if strategy == "badge":
        logits, embedding = (required(sight, strategy, name) for name in ("logits", "embedding"))
        positions, norms = badge(logits, embedding, k, rng)
        return Choice(positions, Scores(norms, np.ones(sight.images, dtype=bool)))
    if strategy == "mix":

        def part(name: str, left: np.ndarray, count: int) -> np.ndarray:
            rule = "last" if empty == "never" else empty  # each part asks its share
            return left[choose(name, _some(sight, left), count, rng, rule).positions]

        positions = combination(MIX, part, k, sight.images)
        return Choice(positions, Scores(np.zeros(sight.images), np.zeros(sight.images, dtype=bool)))
    if strategy == "cluster":
        positions = cluster(required(sight, strategy, "embedding"), k, rng)
        return Choice(positions, Scores(np.zeros(sight.images), np.zeros(sight.images, dtype=bool)))
    if strategy == "representative":
        return representative(required(sight, strategy, "embedding"), _known(sight, strategy), k, rng)
    if strategy == "embedding_outlier":
        scores = embedding_outlier(required(sight, strategy, "embedding"), _known(sight, strategy))
    elif strategy == "model_outlier":
        scores = box_outlier(required(sight, strategy, "detections"), sight.reference)
    elif strategy == "qbc":
        scores = query_by_committee(required(sight, strategy, "committee"))
    elif strategy in UNCERTAINTIES:
        scores = uncertainty(required(sight, strategy, "logits"), strategy)
    else:
        scores = score(strategy, sight.detections, sight.images, rng)
    return Choice(top_k(scores, k, rng, empty), scores)


def _known(sight: Sight, strategy: str) -> Tensor:
    if sight.embedding is None or sight.known is None:
        raise ValueError(f"strategy {strategy!r} needs embeddings of the unlabelled and the labelled images")
    return sight.known


def _some(sight: Sight, positions: np.ndarray) -> Sight:
    """What is seen of some of the images: as much as the parts of `MIX` need."""
    return replace(sight, images=len(positions), detections=sight.detections.take(positions))


def required(sight: Sight, strategy: str, field: str) -> Tensor | Detections | Scores:
    """This field of a `Sight`; ValueError unless it is there and about all of its images."""
    values = getattr(sight, field)
    if values is None:
        raise ValueError(f"strategy {strategy!r} needs {field!r} of its Sight, which has none")
    found = values.shape[1] if field == "committee" else len(values)
    if found != sight.images:
        what = "embeddings" if field == "embedding" else repr(field)
        raise ValueError(f"strategy {strategy!r} needs {what} of {sight.images} images, got {found}")
    return values


def score(strategy: str, detections: Detections | None, images: int, rng: np.random.Generator) -> Scores:
    """Scores by name: 'random', 'count', 'sum' | 'avg' | 'max' (least confidence), 'entropy_max', 'margin_avg', ...

    detections: the model's output for the `images` unlabelled images, already cut at the score threshold.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if strategy in TOGETHER:
        raise ValueError(f"strategy {strategy!r} chooses a set of images together; it has no score of one image")
    if strategy not in BOX_STRATEGIES or strategy in ("model_outlier", "embedding_outlier", "representative"):
        raise ValueError(f"strategy {strategy!r} is not a score of an image's detections alone: `choose`")
    if strategy == "random":
        return random(images, rng)
    if detections is None or len(detections) != images:
        got = "none" if detections is None else len(detections)
        raise ValueError(f"strategy {strategy!r} needs detections of {images} images, got {got}")
    if strategy == "count":
        return box_count(detections)
    value, how = _SHORT.get(strategy, strategy).split("_")
    return reduce(_VALUES[value](detections), detections.valid, how)


def k_center(embedding: Tensor, known: Tensor, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Greedy k-center (core-set; Sener and Savarese 2018, 1708.00489, algorithm 1): the farthest point, k times.

    embedding (N, D) of the pool, known (L, D) of the labelled images, which are centres already; without any, the first
    one is drawn. Returns positions (k,), and the distance (N,) of each image to its nearest centre before the choice
    (zeros where there was none). Ties break by `rng`.
    """
    points, centres = embedding.double(), known.double().to(embedding.device)
    _affordable(k, len(points))
    _finite("embedding", points)
    _finite("known", centres)
    order = torch.from_numpy(rng.permutation(len(points))).to(points.device)  # argmax takes the first of equals
    points = points[order]
    nearest = points.new_full((len(points),), torch.inf)
    for start in range(0, len(centres), 256):  # in blocks: the table of all distances may not fit
        nearest = torch.minimum(nearest, torch.cdist(points, centres[start : start + 256]).amin(1))
    before = torch.where(torch.isinf(nearest), 0.0, nearest)
    taken = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    chosen = []
    for _ in range(k):
        best = int(nearest.masked_fill(taken, -1.0).argmax())
        taken[best] = True
        chosen.append(int(order[best]))
        nearest = torch.minimum(nearest, (points - points[best]).norm(dim=1))
    distances = torch.empty_like(before)
    distances[order] = before
    return np.array(chosen, dtype=np.int64), distances.cpu().numpy()


def badge(logits: Tensor, embedding: Tensor, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """BADGE (Ash et al. 2020, 1906.03671, algorithm 1): k-means++ seeds among the gradients each image would cause.

    The gradient of the last layer, if the model's own guess were the label: g = (p - onehot(argmax p)) (x) h, with p
    (N, C) the softmax of `logits` and h (N, D) the `embedding`. The first centre is the longest g (as in the authors'
    code; ties break by `rng`), each further one is drawn with a probability in proportion to its squared distance to
    the nearest centre; where all are 0, among the images that are left. Returns positions (k,) and |g| (N,).

    |a (x) h - a' (x) h'|^2 = |a|^2 |h|^2 + |a'|^2 |h'|^2 - 2 (a . a') (h . h'): no (N, C D) table is made. Distances
    below 1e-6 of the norms could be rounding of this difference and count as 0, so that equal images are equal.
    """
    if logits.dim() != 2 or embedding.dim() != 2 or len(logits) != len(embedding):
        raise ValueError(f"(N, C) logits and (N, D) embedding, got {tuple(logits.shape)} and {tuple(embedding.shape)}")
    _affordable(k, len(logits))
    guess = _finite("logits", logits.double()).softmax(1)
    apart = guess - F.one_hot(guess.argmax(1), guess.shape[1])  # (N, C), the factor a
    points = _finite("embedding", embedding.double()).to(apart.device)
    squared = apart.square().sum(1) * points.square().sum(1)  # (N,)
    if not bool(torch.isfinite(squared).all()):
        row = int((~torch.isfinite(squared)).nonzero()[0])
        raise ValueError(f"non-finite gradient in row {row}: its embedding is too long to be squared")
    norms = squared.sqrt().cpu().numpy()
    nearest = torch.full_like(squared, torch.inf)
    left, chosen = np.ones(len(norms), dtype=bool), []
    for _ in range(k):
        if chosen:
            weights = np.where(left, nearest.cpu().numpy(), 0.0)
            weights = weights / weights.max() if weights.max() > 0 else left.astype(float)
            best = int(rng.choice(len(weights), p=weights / weights.sum()))
        else:
            tie = rng.permutation(len(norms))
            best = int(tie[norms[tie].argmax()])
        left[best] = False
        chosen.append(best)
        sizes = squared + squared[best]
        distance = sizes - 2 * (apart @ apart[best]) * (points @ points[best])
        nearest = torch.minimum(nearest, distance.masked_fill(distance <= 1e-12 * sizes, 0))
    return np.array(chosen, dtype=np.int64), norms


def cascade(
    steps: Sequence[Scores], sizes: Sequence[int], rng: np.random.Generator, empty: str = "last"
) -> list[np.ndarray]:
    """Positions that are left after each step: the sizes[i] best by steps[i] of those that the step before left.

    Each step is `top_k` among the survivors, best first, so the last entry is the choice. Sizes must not grow; where
    the rule 'never' left fewer than the next size, all that are left go on.
    """
    if len(steps) != len(sizes) or not steps:
        raise ValueError(f"a cascade needs one size a step, got {len(steps)} steps and sizes {list(sizes)}")
    if any(later > earlier for earlier, later in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"the sizes of a cascade must not grow, got {list(sizes)}")
    left, stages = np.arange(len(steps[0])), []
    for scores, size in zip(steps, sizes, strict=True):
        here = Scores(scores.values[left], scores.scored[left])
        left = left[top_k(here, min(size, len(left)) if stages else size, rng, empty)]
        stages.append(left)
    return stages


def _affordable(k: int, images: int) -> None:
    if k < 0 or k > images:
        raise ValueError(f"budget of {k} images, but the pool has {images} unlabelled ones")


def _finite(name: str, values: Tensor) -> Tensor:
    """The same values; ValueError with the first row of (N, ...) that holds a non-finite one."""
    for start in range(0, len(values), 8 * BLOCK):  # or the check would need as much memory as the values
        fine = torch.isfinite(values[start : start + 8 * BLOCK])
        if not bool(fine.all()):
            row = start + int((~fine).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"non-finite {name} in row {row}: a broken model must not choose labels")
    return values


def top_k(scores: Scores, k: int, rng: np.random.Generator, empty: str = "last") -> np.ndarray:
    """Positions of the k largest scores, best first; ties break by `rng`, never by memory order.

    empty: what to do with images that had nothing to score: 'last' (after all scored ones, in random order), 'first'
    (before them: what the model cannot see may be what it must learn), 'never' (van Bommel's released code; fewer than
    k may come back).
    """
    if empty not in EMPTY_RULES:
        raise ValueError(f"the rule for images without detections must be one of {EMPTY_RULES}, got {empty!r}")
    _affordable(k, len(scores))
    if not np.isfinite(scores.values[scores.scored]).all():
        bad = np.flatnonzero(~np.isfinite(scores.values) & scores.scored)
        raise ValueError(f"non-finite score at position {bad[0]}: it can be neither best nor worst")
    tie = rng.random(len(scores))
    rank = {"last": 0, "first": 2, "never": 0}[empty]
    level = np.where(scores.scored, 1, rank)
    values = np.where(scores.scored, scores.values, 0.0)
    order = np.lexsort((tie, -values, -level))
    if empty == "never":
        order = order[scores.scored[order]]
    return order[:k]


# ------------------------------------------------------------------------ diversity, and shares of several strategies


def model_outlier(
    logits: Tensor, held_out_logits: Tensor, held_out_classes: Tensor | np.ndarray | None = None
) -> Scores:
    """How little the model is moved by an image, in [0, 1]; model-based outliers of Monarch (2021), ch. 4.

    1 - mean over classes of r_c, the rank of the image's logit of class c among those of the held-out images: the part
    of them that lies below it, of equal ones the half. Low activations everywhere are an outlier: 1. logits (N, C),
    held_out_logits (V, C). With held_out_classes (V,), columns 0..C-1, class c is ranked among held-out images of class
    c alone; classes without any do not count.
    """
    _tables("logits", logits, "held_out_logits", held_out_logits)
    _finite("logits", logits)
    _finite("held_out_logits", held_out_logits)
    images, classes = logits.shape
    everyone = torch.ones(len(held_out_logits), dtype=torch.bool, device=held_out_logits.device)
    truth = None if held_out_classes is None else torch.as_tensor(held_out_classes, device=everyone.device)
    if truth is not None:
        if truth.shape != everyone.shape:
            raise ValueError(f"{len(everyone)} held-out images need as many classes, got {tuple(truth.shape)}")
        outside = truth[(truth < 0) | (truth >= classes)].tolist()
        if outside:
            raise ValueError(f"class {outside[0]} of a held-out image has no column: allowed are 0..{classes - 1}")
    total, counted = torch.zeros(images, dtype=torch.float64, device=logits.device), 0
    for c in range(classes):
        kept = everyone if truth is None else truth == c
        held = held_out_logits[kept, c].double().sort().values.to(logits.device)  # ascending
        if len(held):
            column = logits[:, c].double().contiguous()
            below, to_equal = (torch.searchsorted(held, column, right=right) for right in (False, True))
            total += (below + to_equal).double() / (2 * len(held))  # int / int would be float32
            counted += 1
    if not counted:
        raise ValueError("a rank among held-out images needs one or more of them, got none")
    return Scores((1 - total / counted).cpu().numpy(), np.ones(images, dtype=bool))


def box_outlier(detections: Detections, reference: Detections | None) -> Scores:
    """`model_outlier` of each box, the mean over an image's boxes: log odds of each class against the background.

    reference: detections on held-out images; class by class, those of that class give the ranks. Without a box there,
    no image is scored. Probabilities would not do: they add up to one, so no box is low in all of them. *Ours*.
    """
    if reference is None:
        raise ValueError("strategy 'model_outlier' needs 'reference' of its Sight, which has none: hold images out")
    valid, held = detections.valid, reference.valid
    known = bool(held.any())
    values = torch.zeros(valid.shape, dtype=torch.float64, device=valid.device)
    if known and bool(valid.any()):
        ranked = _against_background(reference.probs[held]).to(valid.device)
        outlier = model_outlier(_against_background(detections.probs[valid]), ranked, reference.labels[held] - 1)
        values[valid] = torch.from_numpy(outlier.values).to(values)
    return reduce(values, valid if known else torch.zeros_like(valid), "avg")


def _against_background(probs: Tensor) -> Tensor:
    """(B, C) log odds of each class, of probabilities (B, C + 1)."""
    logs = probs.double().clamp(min=1e-300).log()
    return logs[:, 1:] - logs[:, :1]


def embedding_outlier(embedding: Tensor, known: Tensor, k: int = 10) -> Scores:
    """Mean distance to the k nearest labelled images (all of them, if there are fewer), in [0, 2], in float64.

    Euclidean distance of embedding (N, D) and known (L, D) at length 1; zero vectors stay zero. Distances below 1e-6
    could be rounding and count as 0. Without labelled images nothing is far from them: no image is scored. In blocks:
    the table of all distances is never made.
    """
    _tables("embedding", embedding, "known", known)
    if k < 1:
        raise ValueError(f"the nearest labelled images must be 1 or more, got k = {k}")
    _finite("embedding", embedding)
    _finite("known", known)
    values = np.zeros(len(embedding))
    if not len(known):
        return Scores(values, np.zeros(len(values), dtype=bool))
    for start in range(0, len(embedding), BLOCK):
        points = _unit(embedding[start : start + BLOCK])  # (B, D)
        own, nearest = points.square().sum(1, keepdim=True), points.new_zeros(len(points), 0)
        for first in range(0, len(known), BLOCK):
            others = _unit(known[first : first + BLOCK].to(points.device))
            squared = own + others.square().sum(1) - 2 * points @ others.T  # (B, up to BLOCK)
            nearest = torch.cat([nearest, squared], dim=1)
            nearest = nearest.topk(min(k, nearest.shape[1]), dim=1, largest=False).values
        values[start : start + BLOCK] = nearest.masked_fill(nearest <= 1e-12, 0).sqrt().mean(1).cpu().numpy()
    return Scores(values, np.ones(len(values), dtype=bool))


def cluster(embedding: Tensor, k: int, rng: np.random.Generator, many: int = MANY) -> np.ndarray:
    """Positions (k,): of each of k clusters of embedding (N, D) the image nearest to its centre; Monarch (2021), ch. 4.

    k-means with one start drawn by `rng`; of more than `many` images by batches (Sculley 2010) and in float32 if they
    are. The largest cluster comes first; ties break by `rng`. Where there are fewer different images than clusters, the
    next nearest of each cluster follow, again the largest first.
    """
    _affordable(k, len(embedding))
    _finite("embedding", embedding)
    if k == 0:
        return np.zeros(0, dtype=np.int64)
    points = embedding.detach().cpu()
    if len(points) <= many or points.dtype != torch.float32:
        points = points.double()
    label, centres = _k_means(points.numpy(), k, rng, many)
    apart = np.empty(len(points))
    for start in range(0, len(points), BLOCK):
        block = slice(start, start + BLOCK)
        apart[block] = (points[block].double() - torch.from_numpy(centres[label[block]])).norm(dim=1).numpy()
    sizes = np.bincount(label, minlength=len(centres))
    order = np.lexsort((rng.random(len(points)), apart, label))  # cluster by cluster, the nearest first
    turn = np.empty(len(points), dtype=np.int64)  # 0 for the first of its cluster, 1 for the second, ...
    turn[order] = np.arange(len(points)) - (np.cumsum(sizes) - sizes)[label[order]]
    return np.lexsort((rng.random(len(sizes))[label], -sizes[label], turn))[:k]


def _k_means(points: np.ndarray, k: int, rng: np.random.Generator, many: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster (N,) of each row of `points` (N, D), and centres (k, D) in float64; of k = N rows a single cluster."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if k == len(points):
        return np.zeros(k, dtype=np.int64), points.mean(0, keepdims=True, dtype=np.float64)
    method = MiniBatchKMeans if len(points) > many else KMeans
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than k: filled up by the caller
        found = method(k, n_init=1, random_state=int(rng.integers(2**31))).fit(points)
    return found.labels_.astype(np.int64), found.cluster_centers_.astype(np.float64)


def representative(embedding: Tensor, known: Tensor, k: int, rng: np.random.Generator) -> Choice:
    """The k images that are most like the pool and least like what is labelled; an idea of Monarch (2021), ch. 4.

    cos(x, centre of the pool) - cos(x, centre of the labelled images), in [-2, 2], a centre being the mean of the
    embeddings (N, D) or known (L, D) at length 1. Cosines with a zero vector, and with the centre of no image at all,
    are 0. All k are scored at once: near copies come together, unless `cluster` goes before. Ties break by `rng`.
    """
    _tables("embedding", embedding, "known", known)
    _affordable(k, len(embedding))
    _finite("embedding", embedding)
    _finite("known", known)
    direction = _centre(embedding) - _centre(known).to(embedding.device)  # (D,): cos(x, a) - cos(x, b) = x (a - b)
    values = np.empty(len(embedding))
    for start in range(0, len(embedding), BLOCK):
        values[start : start + BLOCK] = (_unit(embedding[start : start + BLOCK]) @ direction).cpu().numpy()
    scores = Scores(values, np.ones(len(values), dtype=bool))
    return Choice(top_k(scores, k, rng), scores)


def portions(shares: Mapping[str, float], k: int) -> dict[str, int]:
    """How many of k images each strategy asks: whole parts, then one each to the largest remainders (equal: the first).

    shares: fractions >= 0 that sum to 1 within 1e-9. (active-vision gives the whole rest to the first strategy.)
    """
    given = {name: float(share) for name, share in shares.items()}
    for name, share in given.items():
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"the share of {name!r} is {share}; allowed are finite fractions >= 0")
    if abs(math.fsum(given.values()) - 1) > 1e-9:
        raise ValueError(f"the shares {given} sum to {math.fsum(given.values())}; they must sum to 1")
    if k < 0:
        raise ValueError(f"budget of {k} images: it must be 0 or more")
    exact = {name: Fraction(repr(share)) for name, share in given.items()}  # 0.29 is 29/100: 29 of 100 images
    quotas = {name: share * k / sum(exact.values()) for name, share in exact.items()}
    sizes = {name: math.floor(quota) for name, quota in quotas.items()}
    by_rest = sorted(quotas, key=lambda name: sizes[name] - quotas[name])  # stable: of equals the first
    for name in by_rest[: k - sum(sizes.values())]:
        sizes[name] += 1
    return sizes


def combination(
    shares: Mapping[str, float], ask: Callable[[str, np.ndarray, int], np.ndarray], k: int, images: int
) -> np.ndarray:
    """Positions (k,) by several strategies, each asked for its `portions` of k, in order, among what those before left.

    ask: (strategy, positions (n,) that are left of the pool's 0..images-1, ascending, how many) -> that many of them;
    not called for none.
    """
    _affordable(k, images)
    left, chosen = np.arange(images), [np.zeros(0, dtype=np.int64)]
    for name, count in portions(shares, k).items():
        if count:
            found = np.asarray(ask(name, left.copy(), count))
            distinct = np.unique(found)
            if found.shape != (count,) or len(distinct) != count or not np.isin(distinct, left).all():
                raise ValueError(
                    f"strategy {name!r} was asked for {count} different of the {len(left)} images left, got "
                    f"{found.tolist()[:10]} of shape {found.shape}"
                )
            chosen.append(found.astype(np.int64))
            left = np.setdiff1d(left, distinct, assume_unique=True)
    return np.concatenate(chosen)


def _tables(name: str, rows: Tensor, other: str, others: Tensor) -> None:
    if rows.dim() != 2 or others.dim() != 2 or rows.shape[1] != others.shape[1] or not rows.shape[1]:
        got = f"{tuple(rows.shape)} and {tuple(others.shape)}"
        raise ValueError(f"{name} and {other} must be tables with the same columns, one or more, got {got}")


def _unit(rows: Tensor) -> Tensor:
    """Rows (B, D) at length 1 in float64; zero rows stay zero."""
    rows = rows.double()
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)  # squares stay finite
    return F.normalize(rows, dim=1)


def _centre(rows: Tensor) -> Tensor:
    """The mean of rows (N, D) at length 1, itself at length 1, (D,) float64; zero for none or where they cancel out."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), BLOCK):
        total += _unit(rows[start : start + BLOCK]).sum(0)
    length = total.norm()
    return total / length if length > 1e-12 * len(rows) else torch.zeros_like(total)
