"""CALD (Yu et al. 2022, 2103.10374): consistency with changed views of an image; after notes on its released code."""

import numpy as np
import torch
from torch import Tensor

from ..data import Detections
from .matching import in_blocks, iou_of, jensen_shannon
from .observation import Observation
from .registry import strategy
from .scores import Scores
from .select import Selection, cascade

BETA, MOST, KEEP = 1.3, 40, 50  # the value of two equal certain boxes; of more boxes than MOST, KEEP enter


def consistency(seen: Observation) -> Scores:
    """Minus CALD's consistency, so that bigger = query first; in [-1, 0].

    For box i of the plain image: j is the view's box of the largest IoU with where i lies there, m = IoU + (1 - JS(p_i,
    p_j)) * (s_i + s_j) / 2, s the largest foreground probability. A view's value is the smallest |m - 1.3| over i, 1 at
    most, and 0 where the view, or the plain image, shows nothing. *Reconstructed*: p with background, JS in nats.
    """
    plain = seen.detections
    image, row = _entering(plain).nonzero(as_tuple=True)  # of the R boxes that enter
    total = torch.zeros(len(plain), dtype=torch.float64, device=plain.boxes.device)
    for _, view in sorted(seen.views.items()):
        found = view.found
        nearest = torch.ones_like(plain.scores, dtype=torch.float64)
        if len(image) and found.boxes.shape[1]:
            j = _closest(view.moved, found)[image, row]
            p, q = plain.probs[image, row], found.probs[image, j]  # (R, C + 1)
            agreed = (1 - jensen_shannon(p, q)) * (p[:, 1:].amax(1).double() + q[:, 1:].amax(1)) / 2
            nearest[image, row] = (iou_of(view.moved[image, row], found.boxes[image, j]) + agreed - BETA).abs()
        value = nearest.amin(1).clamp(max=1) if nearest.shape[1] else torch.ones_like(total)
        total = total + torch.where(found.valid.any(1), value, 0.0)
    return Scores.all(0.0 - torch.where(plain.valid.any(1), total / len(seen.views), 0.0))


def _closest(boxes: Tensor, found: Detections) -> Tensor:
    """(N, T) row of the detection with the largest IoU to each of `boxes` (N, T, 4); ties: the lowest."""

    def rows(boxes: Tensor, others: Tensor, valid: Tensor) -> Tensor:
        table = iou_of(boxes[:, :, None], others[:, None])  # (N, T, T2)
        return torch.where(valid[:, None], table, -1.0).argmax(2)

    return in_blocks(rows, boxes.shape[1] * found.boxes.shape[1], boxes, found.boxes, found.valid)


def _entering(found: Detections) -> Tensor:
    """(N, T) bool: all boxes, or of more than 40 those at round(linspace(0, n - 1, 50)) down the scores."""
    order = found.scores.masked_fill(~found.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # (N, T) 0 for the best scored
    entering = found.valid.clone()
    for image in (found.valid.sum(1) > MOST).nonzero().flatten().tolist():
        steps = np.round(np.linspace(0, int(found.valid[image].sum()) - 1, KEEP)).astype(np.int64)
        entering[image] &= torch.isin(rank[image], torch.from_numpy(steps).to(rank.device))
    return entering


@strategy(
    "cald",
    ("detections", "views", "labelled_class_counts"),
    "boxes",
    selects=True,
    score_above=0.05,  # as there
    source="Yu et al. (2022), 2103.10374, from released code",
)
def cald(seen: Observation, k: int, rng: np.random.Generator) -> Selection:
    """The int(1.2 k) least consistent images, of them the k whose classes the labelled set lacks.

    Second stage: v (N, C) is the mean over all views of each class's best score; the images of the largest
    JS(softmax(mean boxes of each class per labelled image), softmax(v)) are selected, those whose plain view is empty
    before them. *Reconstructed*: that the plain image is one of the views. The scores are those of the first stage.
    """
    first = consistency(seen)
    labelled = torch.from_numpy(np.asarray(seen.labelled_class_counts, dtype=np.float64))
    best = []  # (N, C) float64 of each view: the largest score among the boxes of each class, 0 where there is none
    for found in (seen.detections, *(view.found for _, view in sorted(seen.views.items()))):
        scores = torch.where(found.valid, found.scores.double(), 0.0)
        none = scores.new_zeros(len(found), found.probs.shape[-1])
        best.append(none.scatter_reduce(1, found.labels.clamp(min=0), scores, "amax")[:, 1:])
    v = torch.stack(best).mean(0)
    unlike = jensen_shannon(v.softmax(1), labelled.softmax(0).to(v.device))
    second = Scores(unlike.cpu().numpy(), seen.detections.valid.any(1).cpu().numpy())
    return Selection(cascade([first, second], (max(k, min(seen.count, int(1.2 * k))), k), rng, "first")[-1], first)
