"""CALD (Yu et al. 2022, 2103.10374): consistency with changed views of an image; after notes on its released code."""

import numpy as np
import torch
from torch import Tensor

from .matching import in_blocks, iou_of, jensen_shannon
from .observation import Observation
from .scores import Scores, Selection, cascade
from .strategies import strategy

BETA, MOST, KEEP = 1.3, 40, 50  # the value of two equal certain boxes; of more boxes than MOST, KEEP enter
_NEEDS = ("detections", "views", "labelled_class_counts")


def consistency(seen: Observation) -> Scores:
    """Minus CALD's consistency, so that bigger = query first; in [-1, 0].

    For box i of the plain image: j is the view's box of the largest IoU with where i lies there, m = IoU + (1 - JS(p_i,
    p_j)) * (s_i + s_j) / 2, s the largest foreground probability. A view's value is the smallest |m - 1.3| over i, 1 at
    most, and 0 where the view, or the plain image, shows nothing. Of more than 40 boxes those at round(linspace(0,
    n - 1, 50)) down the scores enter. *Reconstructed*: p with background, JS in nats.
    """
    plain, entering = seen.detections, seen.detections.valid.clone()
    for one in (entering.sum(1) > MOST).nonzero().flatten().tolist():
        order = plain.scores[one].masked_fill(~plain.valid[one], -torch.inf).argsort(descending=True, stable=True)
        steps = np.round(np.linspace(0, int(plain.valid[one].sum()) - 1, KEEP)).astype(np.int64)
        entering[one] = False
        entering[one, order[torch.from_numpy(steps).to(order.device)]] = True
    image, row = entering.nonzero(as_tuple=True)  # of the R boxes that enter

    def closest(boxes: Tensor, others: Tensor, valid: Tensor) -> Tensor:  # (n, T) row of the largest IoU; ties: lowest
        return torch.where(valid[:, None], iou_of(boxes[:, :, None], others[:, None]), -1.0).argmax(2)

    total = torch.zeros(len(plain), dtype=torch.float64, device=plain.boxes.device)
    for _, (moved, found) in sorted(seen.views.items()):
        nearest = total.new_ones(len(plain), moved.shape[1] + 1)  # the last column: 1 at most
        if found.boxes.shape[1]:
            size = moved.shape[1] * found.boxes.shape[1]
            j = in_blocks(closest, size, moved, found.boxes, found.valid)[image, row]
            p, q = plain.probs[image, row], found.probs[image, j]  # (R, C + 1)
            agreed = (1 - jensen_shannon(p, q)) * (p[:, 1:].amax(1).double() + q[:, 1:].amax(1)) / 2
            nearest[image, row] = (iou_of(moved[image, row], found.boxes[image, j]) + agreed - BETA).abs()
        total = total + torch.where(found.valid.any(1), nearest.amin(1), 0.0)
    return Scores.all(0.0 - torch.where(plain.valid.any(1), total / len(seen.views), 0.0))


@strategy("cald", _NEEDS, "boxes", selects=True, score_above=0.05, source="Yu et al. (2022), from released code")
def cald(seen: Observation, k: int, rng: np.random.Generator) -> Selection:
    """The int(1.2 k) least consistent images, of them the k whose classes the labelled set lacks.

    Second stage: v (N, C) is the mean over all views of each class's best score; the images of the largest
    JS(softmax(mean boxes of each class per labelled image), softmax(v)) are selected, those whose plain view is empty
    before them. *Reconstructed*: that the plain image is one of the views. The scores are those of the first stage.
    """
    first, best = consistency(seen), []  # best: (N, C) float64 of each view, 0 where there is no box of a class
    for found in (seen.detections, *(found for _, (_, found) in sorted(seen.views.items()))):
        scores = torch.where(found.valid, found.scores.double(), 0.0)
        none = scores.new_zeros(len(found), found.probs.shape[-1])
        best.append(none.scatter_reduce(1, found.labels.clamp(min=0), scores, "amax")[:, 1:])
    v = torch.stack(best).mean(0)
    unlike = jensen_shannon(v.softmax(1), torch.as_tensor(seen.labelled_class_counts).softmax(0).to(v.device))
    second = Scores(unlike.cpu().numpy(), seen.detections.valid.any(1).cpu().numpy())
    return Selection(cascade([first, second], (max(k, min(seen.count, int(1.2 * k))), k), rng, "first")[-1], first)
