"""torchvision's RoI heads with a replaceable box loss, and heads that say how sure each box is.

Plain settings call torchvision's own loss. The rest belongs to HUALE (IEEE BigData 2023), whose equations are not
public: which loss its names stand for is *reconstructed* (see `losses` for each one's source), and so are the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss

from . import losses

BOX_LOSSES = ("smooth_l1", "efficient_iou", "extended_iou")
COMPANIONS = ("none", "sides", "iou")
LEAST_DEVIATION = 0.02  # of the proposal's side: below it the likelihood rewards nothing but false certainty


@dataclass(frozen=True)
class Localisation:
    """How boxes are learned; the defaults are torchvision's Faster R-CNN.

    box: 'smooth_l1' on encoded deltas | 'efficient_iou' | 'extended_iou' on decoded boxes, times `weight`; focal:
    exponent of Efficient IoU's focal weight. companion: 'sides', a standard deviation per side learned by IoU-weighted
    Gaussian likelihood | 'iou', a head that predicts the decoded box's IoU (Peng and Yu's interrelated head), times
    `companion_weight`; with it a detection's score is class probability x IoU ** `power`. emphasis: strength of the
    weight of foreground RoIs in crowded places, 0 = all alike.
    """

    box: str = "smooth_l1"
    weight: float = 1.0
    focal: float = 0.0
    companion: str = "none"
    companion_weight: float = 1.0
    power: float = 0.5
    emphasis: float = 0.0

    def __post_init__(self) -> None:
        if self.box not in BOX_LOSSES:
            raise ValueError(f"box loss must be one of {BOX_LOSSES}, got {self.box!r}")
        if self.companion not in COMPANIONS:
            raise ValueError(f"companion must be one of {COMPANIONS}, got {self.companion!r}")
        for name in ("weight", "focal", "companion_weight", "power", "emphasis"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} of the localisation must be finite and >= 0, got {getattr(self, name)}")

    @property
    def plain(self) -> bool:
        """True where the detector's loss is torchvision's."""
        return self.box == "smooth_l1" and self.companion == "none" and self.emphasis == 0


class LocalisedRoIHeads(RoIHeads):
    """RoI heads whose loss follows a `Localisation`; arguments as torchvision's, `hidden` is the box head's width.

    evidence: a head that predicts each RoI's classification loss (Park et al. 2023), on features it does not train.
    """

    def __init__(self, *parts, localisation: Localisation, evidence: bool, hidden: int, **settings):
        super().__init__(*parts, **settings)
        self.localisation = localisation
        self.side_head = _beside(lambda: nn.Linear(hidden, 4)) if localisation.companion == "sides" else None
        self.iou_head = _beside(lambda: nn.Linear(hidden, 1)) if localisation.companion == "iou" else None
        self.evidence_head = _beside(lambda: _evidence(hidden)) if evidence else None

    def loss(
        self, maps: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]], targets: list[dict]
    ) -> dict[str, Tensor]:
        """Losses of sampled proposals: 'classification', 'regression', and those of the heads that there are."""
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        features = self.box_head(self.box_roi_pool(maps, proposals, sizes))  # (R, hidden)
        logits, regression = self.box_predictor(features)
        each = F.cross_entropy(logits, torch.cat(labels), reduction="none") if self.evidence_head is not None else None
        if self.localisation.plain:
            classification, boxes = fastrcnn_loss(logits, regression, labels, deltas)
            parts = {"classification": classification, "regression": boxes}
        else:
            parts = self._localised(features, logits, regression, proposals, matched, labels, deltas, targets)
        if each is not None:
            foreground = (torch.cat(labels) > 0).to(each.dtype)
            predicted = self.predicted_loss(features.detach())
            error = ((predicted - each.detach()) * foreground) ** 2
            parts["evidence"] = 5 * error.sum() / foreground.sum().clamp(min=1)
        return parts

    def _localised(self, features, logits, regression, proposals, matched, labels, deltas, targets):
        how = self.localisation
        label, proposal, delta = torch.cat(labels), torch.cat(proposals), torch.cat(deltas)
        truth = torch.cat([_at(t["boxes"], index) for t, index in zip(targets, matched, strict=True)])  # (R, 4)
        row = (label > 0).nonzero()[:, 0]
        own = regression.view(len(label), logits.shape[1], 4)[row, label[row]]  # (F, 4) deltas of the RoI's own class
        goal, place = truth[row], proposal[row]
        boxes = self.box_coder.decode_single(own, place)  # (F, 4) xyxy pixels
        deviations = self.deviations(features[row]) if self.side_head is not None else boxes[:0]
        if not bool(torch.isfinite(torch.cat([boxes, deviations, *(t["boxes"] for t in targets)])).all()):
            # `losses` refuses such boxes; a loss that is NaN is what `training.fit` can tell who and where of
            return {"classification": F.cross_entropy(logits, label), "regression": boxes.sum() * math.nan}
        emphasis = torch.ones_like(logits[:, 0])
        if how.emphasis:
            density = torch.cat([_at(losses.crowding(t["boxes"]), i) for t, i in zip(targets, matched, strict=True)])
            emphasis = emphasis.index_put((row,), losses.emphasis_weights(density[row], how.emphasis))
        parts = {"classification": (F.cross_entropy(logits, label, reduction="none") * emphasis).mean()}
        if how.box == "smooth_l1":
            each = F.smooth_l1_loss(own, delta[row], beta=1 / 9, reduction="none").sum(1)
        elif how.box == "efficient_iou":
            each = how.weight * losses.efficient_iou_loss(boxes, goal, how.focal)
        else:
            each = how.weight * losses.extended_iou_loss(boxes, goal)
        count = max(1, len(label))  # torchvision divides by all sampled RoIs, so that an RoI weighs the same anywhere
        parts["regression"] = (each * emphasis[row]).sum() / count
        if self.side_head is not None:
            sides = (place[:, 2:] - place[:, :2]).clamp(min=1e-3)
            each = losses.side_likelihood_loss(boxes, goal, deviations, sides)
            parts["sides"] = how.companion_weight * (each * emphasis[row]).sum() / count
        if self.iou_head is not None:
            overlap = losses.extended_iou(boxes, goal).clamp(0, 1).detach()
            each = F.binary_cross_entropy_with_logits(self.iou_head(features[row])[:, 0], overlap, reduction="none")
            parts["iou"] = how.companion_weight * (each * emphasis[row]).sum() / count
        return parts

    def deviations(self, features: Tensor) -> Tensor:
        """Standard deviations (R, 4) of left, top, right and bottom, as parts of the proposal's side, in (0, 1)."""
        return self.side_head(features).sigmoid() * (1 - LEAST_DEVIATION) + LEAST_DEVIATION

    def predicted_loss(self, features: Tensor) -> Tensor:
        """What the evidence head takes each RoI's classification loss to be (R,), >= 0."""
        return F.softplus(self.evidence_head(features)[:, 0])

    def extra(self, features: Tensor, levels: Tensor) -> dict[str, Tensor]:
        """What `boxes.Detections.extra` says of each RoI: (R,) or (R, 4) by name."""
        known = {"level": levels}
        if self.side_head is not None:
            known["sides"] = 1 - self.deviations(features)
        if self.iou_head is not None:
            known["sides"] = self.iou_head(features).sigmoid().expand(-1, 4)
        if self.evidence_head is not None:
            known["predicted_loss"] = self.predicted_loss(features)
        return known


def _beside(make: Callable[[], nn.Module]) -> nn.Module:
    """A head with weights of its own, and the random numbers left as they were: no other's weights depend on it."""
    with torch.random.fork_rng(devices=[]):
        return make()


def _evidence(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, 1))


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[index], or zeros where the image has no object (nothing of it is foreground then)."""
    return values[index] if len(values) else values.new_zeros((len(index), *values.shape[1:]))
