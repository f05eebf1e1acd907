"""Two that compare a client's model with the global one: KAFAL's KSAS, also carried to boxes, and LoGo.

KSAS (Cao et al., ICCV 2023, 2211.13579): a client queries images where its own model and the global one disagree about
the classes it knows. All sums run over the classes with labels, n > 0: the limit n -> 0 for the others, where the
released code adds ln 0. Divergences in nats. On boxes it is *ours*. LoGo is by Kim et al. (CVPR 2023, 2303.12317).
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..data import Detections
from .diversity import k_means, turns
from .matching import match
from .observation import Observation
from .scores import Scores, Selection, finite, reduce, top_k, uncertainty
from .strategies import strategy

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

    partner = match(found, own)  # (N, T_global), the row in `own`
    image, row = (partner >= 0).nonzero(as_tuple=True)
    theirs, lonely = partner[image, row], own.valid.clone()
    lonely[image, theirs] = False
    valid = torch.cat([found.valid, lonely], dim=1)  # (N, T)
    seen = torch.cat([found.probs, own.probs], dim=1)[..., columns].double()  # (N, T, 1 + known classes)
    classes = seen[..., 1:].clamp(min=FLOOR)
    silence = UNSEEN * classes / classes.sum(-1, keepdim=True)
    other = torch.cat([torch.full_like(seen[..., :1], 1 - UNSEEN), silence], dim=-1)
    other[image, row] = seen[image, found.labels.shape[1] + theirs]
    logs = ((one.clamp(min=FLOOR).log() + log_prior).log_softmax(-1) for one in (seen, other))
    return torch.where(valid, _divergence(*logs), 0.0), valid


def _of_classes(seen: Observation, weighted: bool) -> Scores | Tensor:
    if seen.local_class_scores is None:  # nothing to compare with yet
        return Scores.none(seen.count)
    counts = seen.labelled_class_counts if weighted else np.ones(seen.class_scores.shape[1])
    return specialised_divergence(seen.local_class_scores, seen.class_scores, counts)


def _of_boxes(seen: Observation, how: str) -> Scores:
    if seen.local_detections is None or not np.any(seen.labelled_class_counts):
        return Scores.none(seen.count)  # nothing to compare with, or no box to specialise in
    return reduce(*box_divergence(seen.detections, seen.local_detections, seen.labelled_class_counts), how)


_CLASSES = ("class_scores", "local_class_scores")
_COUNTED = (*_CLASSES, "labelled_class_counts")
_BOXES = ("detections", "local_detections", "labelled_class_counts")
_ALONE = ("class_scores", "local_only_class_scores", "local_only_embeddings")

strategy("ksas", _COUNTED, "images", source="Cao et al. (2023), 2211.13579")(partial(_of_classes, weighted=True))
strategy("jeffreys", _CLASSES, "images", source="KSAS with equal counts")(partial(_of_classes, weighted=False))
for _how in ("sum", "avg", "max"):
    strategy(f"ksas_{_how}", _BOXES, "boxes", source="KSAS carried to boxes: ours")(partial(_of_boxes, how=_how))


@strategy("logo", _ALONE, "images", selects=True, source="Kim et al. (2023), 2303.12317, formulas of its released code")
def logo(seen: Observation, k: int, rng: np.random.Generator) -> Selection:
    """k clusters by the client's local-only model, from each the image of the largest global entropy.

    k-means of (1 - max_c p_c(x)) h(x), the last layer's gradient for the class that the local-only model, with features
    h (N, D), expects itself. Where there are fewer different images, the next most uncertain of each follow.
    """
    scores = uncertainty(seen.class_scores, "entropy")
    unsure = uncertainty(seen.local_only_class_scores, "confidence").values[:, None]  # (N, 1) 1 - max_c p_c
    gradient = unsure * finite("embedding", seen.local_only_embeddings).double().cpu().numpy()  # (N, D)
    cluster, _ = k_means(gradient, k, rng)
    order = top_k(scores, seen.count, rng)  # (N,) by entropy
    taken = np.argsort(turns(cluster, order)[order], kind="stable")[:k]
    return Selection(order[np.sort(taken)], scores)
