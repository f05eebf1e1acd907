"""The pooling of HUA (Park et al., Active Learning for Object Detection with Evidential Deep Learning and Hierarchical
Uncertainty Aggregation, ICLR 2023), which shares three words of HUALE's name and none of the method.
"""

import numpy as np
import torch
from torch import Tensor

from .matching import in_blocks, iou_of
from .observation import Observation
from .registry import strategy
from .scores import Scores
from .select import Selection, top_k

SCORE_ABOVE, IOU = 0.3, 0.5


def epistemic(probs: Tensor, predicted_loss: Tensor, scale: Tensor | float) -> Tensor:
    """H(mean) - E[H] in nats of class vectors drawn from Dirichlet(probs * e), e = 25 scale / (loss + 1e-7).

    probs (B, C + 1), predicted_loss (B,), scale: their mean predicted loss, (B,) or one for all. *Stated* (Park et al.
    2023 and its released code), but for E[H], a mean over 500 samples there: psi(e + 1) - sum_c p_c psi(p_c e + 1).
    """
    p = probs.double() / probs.double().sum(-1, keepdim=True)
    evidence = 25 * scale / (predicted_loss.double() + 1e-7)
    within = torch.digamma(evidence + 1) - (p * torch.digamma(p * evidence[..., None] + 1)).sum(-1)
    return (torch.special.entr(p).sum(-1) - within).clamp(min=0)


def pool_hierarchy(values: Tensor, image: Tensor, obj: Tensor, level: Tensor, label: Tensor, images: int) -> Tensor:
    """One number an image (images,) from its boxes' `values` (B,), bottom up; 0 for an image without any.

    Mean over the boxes of one (object, level, class), sum over classes, maximum over levels, sum over objects; the keys
    of the boxes are (B,) int64 >= 0, objects counted within their image.
    """
    values = values.double()
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


@strategy(
    "hua",
    ("detections", "pre_nms_detections"),
    "boxes",
    selects=True,
    score_above=SCORE_ABOVE,
    source="Park et al. (ICLR 2023), from released code",
)
def hua(seen: Observation, k: int, rng: np.random.Generator) -> Selection:
    """The k - n largest pooled uncertainties, and n = round(quota * k) images drawn from those that scored 0.

    Boxes before suppression with a foreground probability above 0.3 and an IoU above 0.5 with a detection scored above
    0.3 (an object) count, once for every such object, as their most probable class. The evidence is normalised by the
    mean predicted loss over the boxes that count of one image and level.
    """
    dense, objects = seen.pre_nms_detections, seen.detections.above(SCORE_ABOVE)
    if "predicted_loss" not in dense.extra:
        raise ValueError("'hua' needs the predicted loss of each box: set box_loss_head=True")
    own = dense.probs.gather(2, dense.labels.clamp(min=0)[..., None]).squeeze(2)  # (N, A)
    kept = dense.valid & (own > SCORE_ABOVE) & (own >= dense.probs[..., 1:].amax(2))
    image, row = (kept & objects.valid.any(1, keepdim=True)).nonzero(as_tuple=True)  # (B,)

    def overlapping(boxes: Tensor, image: Tensor) -> Tensor:
        return (iou_of(boxes[:, None], objects.boxes[image]) > IOU) & objects.valid[image]  # (block, T)

    members = in_blocks(overlapping, objects.boxes.shape[1], dense.boxes[image, row], image)  # (B, T)
    counted = members.any(1)
    image, row, members = image[counted], row[counted], members[counted]
    level = dense.extra["level"][image, row].long() if "level" in dense.extra else torch.zeros_like(row)
    loss = dense.extra["predicted_loss"].double()[image, row]
    _, group = torch.stack([image, level]).unique(dim=1, return_inverse=True)
    means = torch.zeros_like(loss).scatter_reduce(0, group, loss, "mean", include_self=False)
    values = epistemic(dense.probs[image, row], loss, means[group])
    box, obj = members.nonzero(as_tuple=True)  # every (box, object) that overlap
    pairs = (values[box], image[box], obj, level[box], dense.labels[image, row][box])
    pooled = pool_hierarchy(*(t.cpu() for t in pairs), seen.count).numpy()  # a GPU adds in any order
    unseen = np.flatnonzero(pooled == 0)
    drawn = rng.choice(unseen, min(round(seen.config.query.quota * k), len(unseen)), replace=False)
    others = np.setdiff1d(np.arange(seen.count), drawn)
    best = others[top_k(Scores.all(pooled[others]), k - len(drawn), rng)]
    return Selection(np.concatenate([best, drawn]), Scores.all(pooled))
