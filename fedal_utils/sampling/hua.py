"""HUA's pooling (Park et al., ICLR 2023), which shares three words of HUALE's name and none of the method."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .matching import in_blocks, iou_of
from .observation import Observation
from .scores import Scores, Selection, top_k
from .strategies import strategy

SCORE_ABOVE, IOU = 0.3, 0.5
_NEEDS = ("detections", "pre_nms_detections")


def epistemic(probs: Tensor, predicted_loss: Tensor, scale: Tensor | float) -> Tensor:
    """H(mean) - E[H] in nats of class vectors drawn from Dirichlet(probs * e), e = 25 scale / (loss + 1e-7).

    probs (B, C + 1), predicted_loss (B,), scale: their mean predicted loss, (B,) or one for all. *Stated* (Park et al.
    2023 and its released code), but for E[H], a mean over 500 samples there: psi(e + 1) - sum_c p_c psi(p_c e + 1).
    """
    p = probs.double() / probs.double().sum(-1, keepdim=True)
    evidence = 25 * scale / (predicted_loss.double() + 1e-7)
    within = torch.digamma(evidence + 1) - (p * torch.digamma(p * evidence[..., None] + 1)).sum(-1)
    return (torch.special.entr(p).sum(-1) - within).clamp(min=0)


def pool_hierarchy(boxes: pd.DataFrame, images: int) -> np.ndarray:
    """(images,) by mean over a class's boxes, sum over classes, maximum over levels, sum over objects; 0 without boxes.

    boxes: columns image, object, level, label and value.
    """
    values = boxes.groupby(["image", "object", "level", "label"])["value"].mean()
    values = values.groupby(["image", "object", "level"]).sum().groupby(["image", "object"]).max()
    return values.groupby("image").sum().reindex(range(images), fill_value=0.0).to_numpy()


@strategy("hua", _NEEDS, "boxes", True, score_above=SCORE_ABOVE, source="Park et al. (ICLR 2023), from released code")
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
    image, row = kept.nonzero(as_tuple=True)  # (B,)

    def overlapping(boxes: Tensor, image: Tensor) -> Tensor:
        return (iou_of(boxes[:, None], objects.boxes[image]) > IOU) & objects.valid[image]  # (block, T)

    box, obj = in_blocks(overlapping, objects.boxes.shape[1], dense.boxes[image, row], image).nonzero(as_tuple=True)
    counted = box.unique()  # (B',) box, obj: every pair that overlaps
    image, row = image[counted], row[counted]
    level = dense.extra["level"][image, row] if "level" in dense.extra else torch.zeros_like(row)
    loss = dense.extra["predicted_loss"][image, row].double()
    columns = {"image": image, "level": level, "label": dense.labels[image, row], "loss": loss}
    frame = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    scale = frame.groupby(["image", "level"])["loss"].transform("mean")
    frame["value"] = epistemic(dense.probs[image, row], loss, torch.tensor(scale)).numpy()
    pairs = frame.iloc[torch.searchsorted(counted, box).numpy()].assign(object=obj.numpy())
    pooled = pool_hierarchy(pairs, seen.count)
    unseen = np.flatnonzero(pooled == 0)
    drawn = rng.choice(unseen, min(round(seen.config.query.quota * k), len(unseen)), replace=False)
    others = np.setdiff1d(np.arange(seen.count), drawn)
    best = others[top_k(Scores.all(pooled[others]), k - len(drawn), rng)]
    return Selection(np.concatenate([best, drawn]), Scores.all(pooled))
