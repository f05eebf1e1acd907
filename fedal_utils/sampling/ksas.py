"""KAFAL's acquisition, KSAS (Cao et al., ICCV 2023, 2211.13579), and KSAS carried to boxes (*ours*: no paper has it).

A client queries images where its own model and the global one disagree about the classes it knows. All sums run over
the classes with labels, n > 0: the limit n -> 0 for the others, where the released code adds ln 0. Divergences in nats.
"""

import numpy as np
import torch
from torch import Tensor

from ..data import Detections
from .matching import match
from .observation import Observation
from .registry import strategy
from .scores import Scores, reduce

FLOOR = 1e-6  # the least probability of a class of a box; ours
UNSEEN = 0.05  # of an object where a detector shows none; ours


def specialised_divergence(client_logits: Tensor, global_logits: Tensor, counts: np.ndarray | Tensor) -> Tensor:
    """KSAS score (N,) float64 >= 0 of whole images; KAFAL, algorithm 1, eq. 1-3: the mean of KL(P || Q) and KL(Q || P).

    P_y = n_y exp(f_y) / sum_k n_k exp(f_k) of the client's logits (N, C), Q of the global model's, over the classes
    with n_y > 0. counts: (C,) labels of each class in any unit, not all 0; with one class only the score is 0.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64, device=client_logits.device)
    known = counts > 0
    both = (client_logits, global_logits.to(counts.device))
    return _divergence(*((logits.double()[:, known] + counts[known].log()).log_softmax(1) for logits in both))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(...,) from logarithms (..., C) of positive probabilities; the same bits either way round."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).clamp(min=0) / 2


def box_divergence(found: Detections, own: Detections, counts: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """KSAS of each box of the global detector (`found`) and of the client's (`own`). *Ours*.

    Boxes are paired by `match`. Of class vectors the classes without labels are left out, the others are weighted by
    n_y over the mean n, background by 1; a pair's value is the symmetric divergence of its two. A box that one detector
    alone shows is held against what the other's silence says: background 1 - `UNSEEN`, and `UNSEEN` over the classes in
    the box's own proportions. Probabilities are `FLOOR` at least. counts: (C,) labelled boxes of each class, any unit.

    Returns values (N, T) float64 >= 0 and valid (N, T): the global detector's columns, then the client's.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64, device=found.probs.device)
    known = counts > 0
    log_prior = torch.cat([counts.new_zeros(1), (counts[known] / counts[known].mean()).log()])
    columns = torch.cat([known.new_ones(1), known])  # of class vectors: background and the classes with labels

    def apart(p: Tensor, q: Tensor) -> Tensor:
        return _divergence(*((one.clamp(min=FLOOR).log() + log_prior).log_softmax(1) for one in (p, q)))

    def vectors(detections: Detections, image: Tensor, row: Tensor) -> Tensor:
        return detections.probs[image, row].double()[:, columns]  # (R, 1 + known classes)

    partner = match(found, own)  # (N, T_global), the row in `own`
    paired = partner >= 0
    lonely = own.valid.clone()
    lonely[paired.nonzero()[:, 0], partner[paired]] = False
    valid = torch.cat([found.valid, lonely], dim=1)  # (N, T)
    values = torch.zeros(valid.shape, dtype=torch.float64, device=valid.device)
    image, row = paired.nonzero(as_tuple=True)
    values[image, row] = apart(vectors(found, image, row), vectors(own, image, partner[paired]))
    for detections, alone, start in ((found, found.valid & ~paired, 0), (own, lonely, found.boxes.shape[1])):
        image, row = alone.nonzero(as_tuple=True)
        seen = vectors(detections, image, row)
        classes = seen[:, 1:].clamp(min=FLOOR)
        silence = [torch.full_like(seen[:, :1], 1 - UNSEEN), UNSEEN * classes / classes.sum(1, keepdim=True)]
        values[image, row + start] = apart(seen, torch.cat(silence, dim=1))
    return values, valid


def _of_classes(seen: Observation, counts: np.ndarray) -> Scores:
    if seen.local_class_scores is None:  # nothing to compare with yet
        return Scores.none(seen.count)
    return Scores.all(specialised_divergence(seen.local_class_scores, seen.class_scores, counts))


def _of_boxes(how: str):
    def score(seen: Observation) -> Scores:
        if seen.local_detections is None or not np.asarray(seen.labelled_class_counts).any():
            return Scores.none(seen.count)  # nothing to compare with, or no box to specialise in
        return reduce(*box_divergence(seen.detections, seen.local_detections, seen.labelled_class_counts), how)

    return score


_CLASSES = ("class_scores", "local_class_scores")
_BOXES = ("detections", "local_detections", "labelled_class_counts")
strategy("ksas", (*_CLASSES, "labelled_class_counts"), "images", source="Cao et al. (2023), 2211.13579")(
    lambda seen: _of_classes(seen, seen.labelled_class_counts)
)
strategy("jeffreys", _CLASSES, "images", source="KSAS with equal counts")(
    lambda seen: _of_classes(seen, np.ones(seen.class_scores.shape[1]))
)
for _how in ("sum", "avg", "max"):
    strategy(f"ksas_{_how}", _BOXES, "boxes", source="KSAS carried to boxes: ours")(_of_boxes(_how))
