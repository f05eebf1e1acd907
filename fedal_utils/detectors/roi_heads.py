"""torchvision's RoI heads with a replaceable box loss, and heads that say how sure each box is.

The defaults are torchvision's. The rest is *reconstructed*: HUALE's (IEEE BigData 2023) equations are not public.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from ..config import ModelConfig
from . import losses
from .base import decode_boxes, encode_boxes

LEAST_DEVIATION = 0.02  # of the proposal's side: below it the likelihood rewards nothing but false certainty


class LocalisedRoIHeads(RoIHeads):
    """RoI heads whose loss follows the config; other arguments as torchvision's, `hidden` is the box head's width.

    box_loss: 'smooth_l1' on encoded deltas | 'efficient_iou' | 'extended_iou' on decoded boxes, times `box_weight`.
    auxiliary_head: 'sides', a standard deviation per side learned by IoU-weighted Gaussian likelihood | 'iou', a head
    that predicts the decoded box's IoU (Peng and Yu's interrelated head), times `auxiliary_weight`; with it a
    detection's score is class probability x root of the IoU. emphasis: of foreground RoIs in crowded places.
    box_loss_head: predicts each RoI's classification loss (Park et al. 2023), on features it does not train.
    """

    def __init__(self, *parts, config: ModelConfig, hidden: int, **settings):
        super().__init__(*parts, **settings)
        self.config = config
        self.plain = config.box_loss == "smooth_l1" and config.auxiliary_head == "none" and config.emphasis == 0
        self.side_head = _beside(lambda: nn.Linear(hidden, 4)) if config.auxiliary_head == "sides" else None
        self.iou_head = _beside(lambda: nn.Linear(hidden, 1)) if config.auxiliary_head == "iou" else None
        self.evidence_head = None
        if config.box_loss_head:
            half = hidden // 2
            self.evidence_head = _beside(lambda: nn.Sequential(nn.Linear(hidden, half), nn.ReLU(), nn.Linear(half, 1)))

    def loss(self, maps: dict[str, Tensor], proposals: list[Tensor], sizes: list, targets: list[dict]) -> dict:
        """Losses of sampled proposals: 'classification', 'regression', and those of the heads that there are.

        targets: of each image "boxes" (k, 4), "labels" (k,) 1..C and "density" (k,), see `losses.crowding`.
        """
        proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
        features = self.box_head(self.box_roi_pool(maps, proposals, sizes))  # (R, hidden)

        def matching(key: str) -> Tensor:  # zeros where the image has no object: nothing of it is foreground
            pairs = ((t[key], index) for t, index in zip(targets, matched, strict=True))
            return torch.cat([v[i] if len(v) else v.new_zeros(len(i), *v.shape[1:]) for v, i in pairs])

        return self.losses_of(features, torch.cat(proposals), torch.cat(labels), matching("boxes"), matching("density"))

    def losses_of(self, features, proposals, labels, goals, density, valid: Tensor | None = None) -> dict[str, Tensor]:
        """The losses of R RoIs from the box head's features (R, hidden); proposals, goals (the matched boxes) (R, 4).

        labels: (R,) classes, 0 = background; density: (R,) how crowded it is where the matched box stands.
        valid: (R,) False for padding, and then no shape depends on values; None: all are RoIs.
        """
        config, foreground = self.config, labels > 0
        logits, regression = self.box_predictor(features)
        each = F.cross_entropy(logits, labels, reduction="none")  # (R,)
        if valid is None:
            row, counted, count = foreground.nonzero()[:, 0], None, max(1, len(labels))
        else:
            row, counted, count = slice(None), foreground.to(each.dtype), valid.sum().clamp(min=1)
            each = each * valid
        own = regression.view(len(labels), logits.shape[1], 4)[row]
        own = own.gather(1, labels[row].view(-1, 1, 1).expand(-1, 1, 4))[:, 0]  # (F, 4) deltas of the RoI's class
        place, goal = proposals[row], goals[row]
        boxes = decode_boxes(own, place)  # (F, 4) xyxy pixels
        if valid is not None:  # a RoI without a box is its own goal: no 0 / 0 spoils the gradient
            goal = torch.where(foreground[:, None], goal, boxes.detach())
        emphasis = torch.ones_like(each)
        if config.emphasis:
            weights = losses.emphasis_weights(density[row], config.emphasis, counted)
            emphasis = emphasis.index_put((row,), weights) if counted is None else weights.where(foreground, 1.0)
        share = emphasis[row] if counted is None else emphasis * counted

        def mean(values: Tensor) -> Tensor:  # (F,) over all RoIs, as torchvision: an RoI weighs the same in any batch
            return (values * share).sum() / count

        if self.plain and valid is None:  # the same sums as torchvision's, to the bit
            wrong = F.smooth_l1_loss(own, encode_boxes(goal, place), beta=1 / 9, reduction="sum") / count
            parts = {"classification": F.cross_entropy(logits, labels), "regression": wrong}
        else:
            if config.box_loss == "smooth_l1":
                wrong = F.smooth_l1_loss(own, encode_boxes(goal, place), beta=1 / 9, reduction="none").sum(1)
            else:
                named = losses.efficient_iou_loss if config.box_loss == "efficient_iou" else losses.extended_iou_loss
                wrong = config.box_weight * named(boxes, goal)
            parts = {"classification": (each * emphasis).sum() / count, "regression": mean(wrong)}
        if self.side_head is not None:
            sizes = (place[:, 2:] - place[:, :2]).clamp(min=1e-3)
            likelihood = losses.side_likelihood_loss(boxes, goal, self.deviations(features[row]), sizes)
            parts["sides"] = config.auxiliary_weight * mean(likelihood)
        if self.iou_head is not None:
            overlap = losses.extended_iou(boxes, goal).clamp(0, 1).detach()
            found = self.iou_head(features[row])[:, 0]
            wrong = F.binary_cross_entropy_with_logits(found, overlap, reduction="none")
            parts["iou"] = config.auxiliary_weight * mean(wrong)
        if self.evidence_head is not None:
            error = (self.predicted_loss(features.detach()) - each.detach()) * foreground
            parts["box_loss_head"] = 5 * (error**2).sum() / foreground.sum().clamp(min=1)
        return parts

    def deviations(self, features: Tensor) -> Tensor:
        """Standard deviations (R, 4) of left, top, right, bottom, as parts of the proposal's side, in (0, 1)."""
        return self.side_head(features).sigmoid() * (1 - LEAST_DEVIATION) + LEAST_DEVIATION

    def predicted_loss(self, features: Tensor) -> Tensor:
        """What the box loss head takes each RoI's classification loss to be (R,), >= 0."""
        return F.softplus(self.evidence_head(features)[:, 0])

    def extra(self, features: Tensor, levels: Tensor) -> dict[str, Tensor]:
        """What `data.Detections.extra` says of each RoI: (R,) or (R, 4) by name."""
        extra = {"level": levels}
        if self.side_head is not None:
            extra["sides"] = 1 - self.deviations(features)
        if self.iou_head is not None:
            extra["sides"] = self.iou_head(features).sigmoid().expand(-1, 4)
        if self.evidence_head is not None:
            extra["predicted_loss"] = self.predicted_loss(features)
        return extra


def _beside(make: Callable[[], nn.Module]) -> nn.Module:
    """A head with weights of its own, and the random numbers left as they were: no other's weights depend on it."""
    with torch.random.fork_rng(devices=[]):
        return make()
