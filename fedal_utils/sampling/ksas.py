"""KAFAL's acquisition (Cao et al., ICCV 2023, 2211.13579), KSAS on boxes, and LoGo (Kim et al., CVPR 2023, 2303.12317).

A client asks for labels where its own model and the global one disagree about the classes it knows. KSAS, the
knowledge-specialised active sampling, multiplies both models' class probabilities by the client's labelled counts n
before they are compared; here all sums run over the classes with n > 0, which is the limit n -> 0 for the others, where
the released code adds ln 0. LoGo clusters the pool by a model trained on the client's labels alone and takes from each
cluster the image that the global model is least sure of. KSAS on boxes is *ours*: no paper has it.

N images, C classes, D embedding, T boxes; divergences and entropies are in nats. As in `sampling`, a score is a pure
function of what the models say, bigger = ask first, and a strategy sees a `Sight` without labels. The losses of KAFAL's
training are `losses.balanced_cross_entropy` and `losses.compensation_loss`. KAFAL's formulas are those of its algorithm
figure and its released code, LoGo's those of its released code.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..data.boxes import Detections
from . import huale
from . import strategies as sampling
from .strategies import Choice, Scores, Sight

DIRECTIONS = ("both", "client", "global")
FLOOR = 1e-6  # the least probability of a class of a box; ours
NEEDS = {
    "ksas": ("logits", "own_logits", "labelled"),
    "ksas_client": ("logits", "own_logits", "labelled"),
    "ksas_global": ("logits", "own_logits", "labelled"),
    "jeffreys": ("logits", "own_logits"),
    "logo": ("logits", "alone_logits", "alone_embedding"),
    "ksas_sum": ("detections", "own", "labelled"),
    "ksas_avg": ("detections", "own", "labelled"),
    "ksas_max": ("detections", "own", "labelled"),
}
CLASS_STRATEGIES = ("ksas", "ksas_client", "ksas_global", "jeffreys", "logo")
BOX_STRATEGIES = ("ksas_sum", "ksas_avg", "ksas_max")
STRATEGIES = CLASS_STRATEGIES + BOX_STRATEGIES
_DIRECTION = {"ksas": "both", "ksas_client": "client", "ksas_global": "global", "jeffreys": "both"}

# ----------------------------------------------------------------------------------------------- KSAS on whole images


def specialised_divergence(
    client_logits: Tensor, global_logits: Tensor, counts: np.ndarray | Tensor, direction: str = "both"
) -> Tensor:
    """KSAS score (N,) float64 >= 0 of whole images; KAFAL, algorithm 1, eq. 1-3.

    P_y = n_y exp(f_y) / sum_k n_k exp(f_k) of the client's logits (N, C), Q of the global model's, over the classes
    with n_y > 0. direction: 'both', the mean of KL(P || Q) and KL(Q || P) (released code), 'client', KL(P || Q) alone,
    or 'global', KL(Q || P) alone. counts: (C,) labels of each class in any unit. With labels of one class only, P and Q
    are both certain and the score is 0 everywhere: the client has nothing to disagree on. ValueError: counts below 0,
    not finite or all 0.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")
    if client_logits.dim() != 2 or client_logits.shape != global_logits.shape:
        raise ValueError(
            f"logits of both models must be the same (N, C), got {tuple(client_logits.shape)} of the client and "
            f"{tuple(global_logits.shape)} of the global model"
        )
    counts = _counts(counts, client_logits.shape[1]).to(client_logits.device)
    known = counts > 0
    log_p, log_q = (
        (logits.double()[:, known] + counts[known].log()).log_softmax(1)
        for logits in (client_logits, global_logits.to(counts.device))
    )
    return _divergence(log_p, log_q, direction)


def _divergence(log_p: Tensor, log_q: Tensor, direction: str = "both") -> Tensor:
    """(...,) from logarithms (..., C) of positive probabilities; 'both' is the same bits either way round."""
    if direction == "both":
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).clamp(min=0) / 2
    first, second = (log_p, log_q) if direction == "client" else (log_q, log_p)
    return (first.exp() * (first - second)).sum(-1).clamp(min=0)


def _counts(counts: np.ndarray | Tensor, classes: int) -> Tensor:
    """(C,) float64; ValueError unless finite, >= 0 and not all 0."""
    values = torch.as_tensor(counts, dtype=torch.float64)
    if values.shape != (classes,) or not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError(f"counts: {classes} finite numbers >= 0, one a class, are needed, got {values.tolist()}")
    if not bool((values > 0).any()):
        raise ValueError(f"a client without a single label has no classes to specialise in: counts {values.tolist()}")
    return values


# ------------------------------------------------------------------------------------------------------- KSAS on boxes


KINDS = ("nothing", "paired", "only client", "only global")


class BoxDivergence(NamedTuple):
    """What two detectors make of the same images: columns of the global detector's boxes, then of the client's.

    values (N, T) float64 >= 0; valid (N, T) bool: the column counts; kind (N, T) int64, a place in `KINDS`. A pair
    stands in the column of its global box.
    """

    values: Tensor
    valid: Tensor
    kind: Tensor


def box_divergence(
    found: Detections, own: Detections, counts: np.ndarray | Tensor, iou: float = 0.5, unseen: float = 0.05
) -> BoxDivergence:
    """KSAS of each box of the global detector (`found`) and of the client's (`own`), T = T_global + T_client. *Ours*.

    Boxes are paired one to one from the largest IoU down to `iou`, whatever their classes (`huale.match`). Of class
    vectors (background first) the classes without labels are left out, the others are weighted by n_y over the mean n
    of the classes with labels, background by 1, and the vector sums to one again; a pair's value is the symmetric
    divergence of its two. A box that one detector alone shows is held against what the other's silence says: background
    1 - `unseen`, and `unseen` over the classes in the box's own proportions. Before all this probabilities are raised
    to at least `FLOOR`.

    counts: (C,) labelled boxes of each class in any unit. unseen: in (0, 1); the score threshold is a good guess. A box
    without area has no partner. ValueError: counts as in `specialised_divergence`; boxes or class vectors that make no
    sense.
    """
    if not 0 < unseen < 1 or not 0 < iou <= 1:
        raise ValueError(f"unseen must lie in (0, 1) and iou in (0, 1], got unseen={unseen} and iou={iou}")
    if len(found) != len(own) or found.probs.shape[-1] != own.probs.shape[-1]:
        raise ValueError(
            f"two detectors of the same images and classes are needed, got {len(found)} and {len(own)} images, "
            f"{found.probs.shape[-1]} and {own.probs.shape[-1]} columns of probabilities"
        )
    _check_detections(found, "global")
    _check_detections(own, "client's")
    counts = _counts(counts, found.probs.shape[-1] - 1).to(found.probs.device)
    known = counts > 0
    log_prior = torch.cat([counts.new_zeros(1), (counts[known] / counts[known].mean()).log()])
    columns = torch.cat([known.new_ones(1), known])  # of class vectors: background and the classes with labels

    def apart(p: Tensor, q: Tensor) -> Tensor:
        return _divergence(*((one.clamp(min=FLOOR).log() + log_prior).log_softmax(1) for one in (p, q)))

    def vectors(detections: Detections, image: Tensor, row: Tensor) -> Tensor:
        return detections.probs[image, row].double()[:, columns]  # (R, 1 + known classes)

    partner = huale.match(found, own.boxes, own, iou)  # (N, T_global), the row in `own`
    paired = partner >= 0
    lonely = own.valid.clone()
    lonely[paired.nonzero()[:, 0], partner[paired]] = False
    kind = torch.where(paired, KINDS.index("paired"), KINDS.index("only global") * found.valid.long())
    kind = torch.cat([kind, KINDS.index("only client") * lonely.long()], dim=1)  # (N, T)

    values = torch.zeros(kind.shape, dtype=torch.float64, device=kind.device)
    image, row = paired.nonzero(as_tuple=True)
    values[image, row] = apart(vectors(found, image, row), vectors(own, image, partner[paired]))
    for detections, alone, start in ((found, found.valid & ~paired, 0), (own, lonely, found.boxes.shape[1])):
        image, row = alone.nonzero(as_tuple=True)
        seen = vectors(detections, image, row)
        values[image, row + start] = apart(seen, _silence(seen, unseen))
    return BoxDivergence(values, kind > 0, kind)


def _silence(seen: Tensor, unseen: float) -> Tensor:
    """(R, 1 + classes) that a detector implies which does not show a box whose class vector is `seen`."""
    classes = seen[:, 1:].clamp(min=FLOOR)
    return torch.cat([torch.full_like(seen[:, :1], 1 - unseen), unseen * classes / classes.sum(1, keepdim=True)], dim=1)


def _check_detections(detections: Detections, whose: str) -> None:
    """ValueError unless real boxes are finite and their class vectors are distributions."""
    boxes, probs = detections.boxes[detections.valid], detections.probs[detections.valid].double()
    good = ((probs.sum(1) - 1).abs() <= huale.SUM_TOLERANCE) & (probs >= 0).all(1)  # NaN is not <= anything
    for what, fine in (("finite boxes", torch.isfinite(boxes).all(1)), ("class vectors >= 0 that sum to 1", good)):
        if not bool(fine.all()):
            image = int(detections.valid.nonzero()[~fine][0, 0])
            raise ValueError(
                f"the {whose} detector must give {what}, image {image} of {len(detections)} has others: a broken model "
                "must not choose labels"
            )


def ksas_boxes(
    found: Detections, own: Detections, counts: np.ndarray | Tensor, how: str, iou: float = 0.5, unseen: float = 0.05
) -> Scores:
    """'sum', 'avg' or 'max' of `box_divergence` over an image's pairs and lone boxes; unscored where there are none."""
    values, valid, _ = box_divergence(found, own, counts, iou, unseen)
    return sampling.reduce(values, valid, how)


# --------------------------------------------------------------------------------------------------------------- LoGo


def logo(
    alone_logits: Tensor, alone_embedding: Tensor, global_logits: Tensor, k: int, rng: np.random.Generator
) -> Choice:
    """LoGo (Kim et al. 2023): k clusters by the client's lone model, from each the image of the largest global entropy.

    k-means of (1 - max_c p_c(x)) h(x), the last layer's gradient for the class that the lone model, with class scores
    alone_logits (N, C) and penultimate features alone_embedding (N, D), expects itself. Where there are fewer different
    images than clusters, the next most uncertain of each cluster follow, cluster after cluster. Order: the largest
    entropy of global_logits (N, C) first; ties break by `rng`. The scores are these entropies.
    """
    given = {"alone_logits": alone_logits, "alone_embedding": alone_embedding, "global_logits": global_logits}
    images = len(global_logits)
    for name, values in given.items():
        if len(values) != images:
            raise ValueError(f"LoGo needs {name} of {images} images, as of the global model, got {len(values)}")
        if not bool(torch.isfinite(values).all()):
            row = int((~torch.isfinite(values)).any(1).nonzero()[0])
            raise ValueError(f"non-finite {name} in row {row}: a broken model must not choose labels")
    if not 0 <= k <= images:
        raise ValueError(f"budget of {k} images, but the pool has {images} unlabelled ones")
    scores = sampling.uncertainty(global_logits, "entropy")
    doubt = torch.from_numpy(sampling.uncertainty(alone_logits, "confidence").values)  # (N,) 1 - max_c p_c
    gradient = doubt[:, None] * alone_embedding.double().cpu()  # (N, D)
    cluster = _clusters(gradient.numpy(), k, rng) if 0 < k < images else np.zeros(images, dtype=np.int64)
    order = sampling.top_k(scores, images, rng)  # (N,) by entropy
    seen: dict[int, int] = {}
    turn = np.empty(images, dtype=np.int64)  # 0 for the first of its cluster, 1 for the second, ...
    for place, one in enumerate(cluster[order]):
        turn[place] = seen[one] = seen.get(one, -1) + 1
    taken = np.sort(np.argsort(turn, kind="stable")[:k])  # places in `order`
    return Choice(order[taken], scores)


def _clusters(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) cluster of each row; fewer than k of them where rows are equal."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than k: filled up by the caller
        return KMeans(k, n_init=1, random_state=int(rng.integers(2**31))).fit_predict(points)


# --------------------------------------------------------------------------------------------------- choosing by name


def needs(strategy: str) -> frozenset[str]:
    """The fields of `Sight` that a strategy reads."""
    if strategy not in NEEDS:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    return frozenset(NEEDS[strategy])


def score(strategy: str, sight: Sight) -> Scores:
    """Scores by name: of 'ksas' and its two directions, of 'jeffreys' (KSAS with equal counts), of KSAS on boxes.

    Without a model of its own (`own_logits` or `own` is None) a client has nothing to compare, and one whose labelled
    images show no object has no boxes to specialise in: no image is scored.
    """
    needs(strategy)
    if strategy == "logo":
        raise ValueError("strategy 'logo' chooses a set of images together; it has no score of one image")
    fields = ("detections", "own") if strategy in BOX_STRATEGIES else ("logits", "own_logits")
    if getattr(sight, fields[1]) is None:
        return Scores(np.zeros(sight.images), np.zeros(sight.images, dtype=bool))
    server, client = (sampling.required(sight, strategy, name) for name in fields)
    counts = np.ones(server.shape[1]) if strategy == "jeffreys" else sight.labelled
    if counts is None:
        raise ValueError(f"strategy {strategy!r} needs 'labelled' of its Sight, which has none")
    if strategy in BOX_STRATEGIES:
        if not np.asarray(counts).any():
            return Scores(np.zeros(sight.images), np.zeros(sight.images, dtype=bool))
        return ksas_boxes(server, client, counts, strategy.removeprefix("ksas_"))
    values = specialised_divergence(client, server, counts, _DIRECTION[strategy])
    return Scores(values.cpu().numpy(), np.ones(sight.images, dtype=bool))


def choose(strategy: str, sight: Sight, k: int, rng: np.random.Generator, empty: str = "last") -> Choice:
    """The k images of a pool to ask next, by a strategy of this module.

    A client without a model of its own asks at random, unless `empty` is 'never': then it asks nothing.
    """
    needs(strategy)
    if strategy == "logo":
        alone, embedding, logits = (
            sampling.required(sight, strategy, name) for name in ("alone_logits", "alone_embedding", "logits")
        )
        return logo(alone, embedding, logits, k, rng)
    scores = score(strategy, sight)
    return Choice(sampling.top_k(scores, k, rng, empty), scores)


# ------------------------------------------------------------------------------------------------- what is compared

PLAIN, BALANCED, WHOLE = "cross-entropy", "balanced softmax", "KCFU"


def training_arms(config: Config) -> dict[str, Config]:
    """The same experiment with KAFAL's training taken apart: plain FedAvg, with the balanced softmax, and the whole."""
    return {
        PLAIN: config.replace(balanced_softmax=False, distillation_weight=0.0),
        BALANCED: config.replace(balanced_softmax=True, distillation_weight=0.0),
        WHOLE: config.replace(balanced_softmax=True, distillation_weight=1.0),
    }


def mixes(config: Config, alphas: tuple[float, ...] = (0.1, 1.0, 100.0)) -> dict[str, Config]:
    """The same experiment from clients that know few classes each to clients that are alike."""
    return {f"alpha {alpha:g}": config.replace(dirichlet_alpha=alpha) for alpha in alphas}


def disagreement_map(
    client_logits: Tensor, global_logits: Tensor, counts: np.ndarray | Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of disagreement by the class that the global model sees: (C,) each of plain KL and of KSAS, parts of one.

    Which classes would get a client's budget if images were asked in proportion to their score.
    """
    seen, classes = global_logits.argmax(1), global_logits.shape[1]
    out = []
    for prior in (np.ones(classes), counts):
        score = specialised_divergence(client_logits, global_logits, prior).cpu()
        total = torch.zeros(classes, dtype=torch.float64).index_add_(0, seen.cpu(), score)
        out.append((total / total.sum().clamp(min=1e-300)).numpy())
    return out[0], out[1]
