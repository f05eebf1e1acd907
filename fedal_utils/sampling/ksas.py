"""KAFAL's acquisition, KSAS (Cao et al., ICCV 2023, 2211.13579), and KSAS carried to boxes (*ours*: no paper has it).

A client queries images where its own model and the global one disagree about the classes it knows. KSAS, the
knowledge-specialised active sampling, multiplies both models' class probabilities by the client's labelled counts n
before they are compared; here all sums run over the classes with n > 0, which is the limit n -> 0 for the others, where
the released code adds ln 0. Formulas are those of KAFAL's algorithm figure and its released code. Its training losses
are `detectors.balanced_cross_entropy` and `detectors.compensation_loss`. N images, C classes, T boxes; nats.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import Detections
from .matching import match
from .observation import Observation
from .registry import strategy
from .scores import Scores, reduce

DIRECTIONS = ("both", "client", "global")
FLOOR = 1e-6  # the least probability of a class of a box; ours
KINDS = ("nothing", "paired", "only client", "only global")


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

    Boxes are paired one to one from the largest IoU down to `iou`, whatever their classes (`match`). Of class
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
    counts = _counts(counts, found.probs.shape[-1] - 1).to(found.probs.device)
    known = counts > 0
    log_prior = torch.cat([counts.new_zeros(1), (counts[known] / counts[known].mean()).log()])
    columns = torch.cat([known.new_ones(1), known])  # of class vectors: background and the classes with labels

    def apart(p: Tensor, q: Tensor) -> Tensor:
        return _divergence(*((one.clamp(min=FLOOR).log() + log_prior).log_softmax(1) for one in (p, q)))

    def vectors(detections: Detections, image: Tensor, row: Tensor) -> Tensor:
        return detections.probs[image, row].double()[:, columns]  # (R, 1 + known classes)

    partner = match(found, own.boxes, own, iou)  # (N, T_global), the row in `own`
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


def ksas_boxes(
    found: Detections, own: Detections, counts: np.ndarray | Tensor, how: str, iou: float = 0.5, unseen: float = 0.05
) -> Scores:
    """'sum', 'avg' or 'max' of `box_divergence` over an image's pairs and lone boxes; unscored where there are none."""
    values, valid, _ = box_divergence(found, own, counts, iou, unseen)
    return reduce(values, valid, how)


def _of_classes(seen: Observation, counts: np.ndarray, direction: str) -> Scores:
    if seen.local_class_scores is None:  # nothing to compare with yet
        return Scores.none(seen.count)
    return Scores.all(specialised_divergence(seen.local_class_scores, seen.class_scores, counts, direction))


SOURCE = "Cao et al. (2023), 2211.13579"
_NEEDS = ("class_scores", "local_class_scores")


@strategy("ksas", (*_NEEDS, "labelled_class_counts"), "images", source=SOURCE)
def _both(seen: Observation) -> Scores:
    return _of_classes(seen, seen.labelled_class_counts, "both")


@strategy("ksas_client", (*_NEEDS, "labelled_class_counts"), "images", source=f"{SOURCE}, one direction alone")
def _client(seen: Observation) -> Scores:
    return _of_classes(seen, seen.labelled_class_counts, "client")


@strategy("ksas_global", (*_NEEDS, "labelled_class_counts"), "images", source=f"{SOURCE}, one direction alone")
def _global(seen: Observation) -> Scores:
    return _of_classes(seen, seen.labelled_class_counts, "global")


@strategy("jeffreys", _NEEDS, "images", source="KSAS with equal counts")
def _jeffreys(seen: Observation) -> Scores:
    return _of_classes(seen, np.ones(seen.class_scores.shape[1]), "both")


def _of_boxes(how: str):
    def score(seen: Observation) -> Scores:
        counts = seen.labelled_class_counts
        if seen.local_detections is None or not np.asarray(counts).any():  # no box to specialise in
            return Scores.none(seen.count)
        return ksas_boxes(seen.detections, seen.local_detections, counts, how)

    return score


for _how in ("sum", "avg", "max"):
    _box_needs = ("detections", "local_detections", "labelled_class_counts")
    strategy(f"ksas_{_how}", _box_needs, "boxes", source="KSAS carried to boxes: ours")(_of_boxes(_how))
