"""What a query strategy may observe of a client's unlabelled images: computed when asked for, once, without labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import training
from ..config import Config
from ..data import VIEWS, Detections, Images, Labels, Viewed, flip_boxes, move_boxes
from ..detectors import VAE, Classifier, Detector, out_of_fold
from ..detectors import VIEWS as YOLO_VIEWS
from ..training import CachedImages
from .pool import Pool
from .scores import Scores

PRE_NMS = 1000  # boxes of an image at most, where they are wanted before non-maximum suppression


class Observation:
    """N unlabelled images, by name of what was observed; `Observation(config, 3, detections=...)` serves a test."""

    def __init__(self, config: Config, count: int, **observed: Any):
        self.config, self.count = config, count
        self.__dict__.update(observed)

    def __len__(self) -> int:
        return self.count


class Part(Observation):
    """Some of the images of an observation, for a mix; what was not yet observed is observed of all."""

    def __init__(self, whole: Observation, positions: np.ndarray):
        super().__init__(whole.config, len(positions), whole=whole, positions=positions)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.whole, name)
        if name.startswith(("held_out", "labelled")):  # of other images
            return value
        return value.take(self.positions) if isinstance(value, Detections) else value[torch.as_tensor(self.positions)]


@dataclass(frozen=True)
class Scene:
    """What all clients' observations share."""

    images: Images | CachedImages  # all that are trained on
    photos: Images  # the same with their pixels
    classes: int
    device: torch.device
    views: dict[str, CachedImages] = field(default_factory=dict, compare=False, repr=False)  # features, by view
    score_above: float | None = None  # detections count from this confidence on, in the place of the config's


class PoolObservation(Observation):
    """Of these positions of a client's pool by a model; models: the client's others, made when they are wanted."""

    def __init__(self, config: Config, scene: Scene, pool: Pool, positions: np.ndarray, model: Any, models: Any = None):
        super().__init__(config, len(positions), scene=scene, pool=pool, model=model, models=models)
        self.rows, self.device = pool.index[positions], scene.device

    @cached_property
    def images(self) -> Images | CachedImages:
        return self.scene.images.take(self.rows)

    @property
    def photos(self) -> Images:  # the same images with their pixels, where `images` are a frozen backbone's features
        return self.scene.photos.take(self.rows)

    @property
    def labelled(self) -> np.ndarray:  # rows (L,) of the training set that the client has labelled
        return self.pool.index[self.pool.labelled()]

    def predict(self, images: Any, model: Any = None, **options: Any) -> Detections:
        if self.scene.score_above is not None:
            options["score_above"] = self.scene.score_above
        return predict(self.config, model or self.model, images, self.device, **options)

    @cached_property
    def detections(self) -> Detections:  # (N, T), cut at the score threshold
        return self.predict(self.images)

    @cached_property
    def flipped_detections(self) -> Detections:  # (N, T) on the mirrored images, boxes mapped back
        found = self.predict(self._changed("flip"))
        back = flip_boxes(found.boxes, self.images.image_size[1]) * found.valid[..., None]
        sides = {k: v[..., [2, 1, 0, 3]] for k, v in found.extra.items() if k == "sides"}  # left is right there
        return replace(found, boxes=back, extra=found.extra | sides)

    @cached_property
    def views(self) -> dict[str, tuple[Tensor, Detections]]:  # of `data.VIEWS`: the boxes moved, what is found there
        boxes, size = self.detections.boxes, self.images.image_size
        return {name: (move_boxes(name, boxes, size), self.predict(self._changed(name))) for name in VIEWS}

    def _changed(self, name: str) -> CachedImages | Viewed:
        """The images as a view shows them; of a frozen backbone, their features."""
        whole, known = self.scene.images, self.scene.views
        plain = self.detections if name == "cutout" else None  # where it cuts depends on them
        if not isinstance(whole, CachedImages):
            return Viewed(self.images, name, plain)
        if name == "flip" and whole.mirrored is not None:
            return replace(whole, features=whole.mirrored, mirrored=None).take(self.rows)
        if plain is None and name in known:
            return known[name].take(self.rows)
        changed = Viewed(self.scene.photos if plain is None else self.photos, name, plain)
        found = training.cache_features(self.model, changed, device=self.device, mirrored=False)
        return found if plain is not None else known.setdefault(name, found).take(self.rows)

    @cached_property
    def pre_nms_detections(self) -> Detections:  # (N, T), each box with its best class; T <= `PRE_NMS`
        return self.predict(self.images, nms_iou=1.0, class_agnostic=True, top=PRE_NMS, candidates=PRE_NMS)

    @cached_property
    def held_out_detections(self) -> Detections:  # on images that the model was not trained on and nobody will query
        return self.predict(self.models.held_out)

    @cached_property
    def local_detections(self) -> Detections | None:  # (N, T) by the client's own detector; None while it has none
        return None if self.models.local is None else self.predict(self.images, self.models.local)

    def _scores_by(self, model: Classifier) -> Tensor:
        return training.class_scores(model, self.images, device=self.device)

    @cached_property
    def class_scores(self) -> Tensor:  # (N, C) before the softmax
        return self._scores_by(self.model)

    @cached_property
    def local_class_scores(self) -> Tensor | None:  # (N, C) by the client's own model; None while it has none
        return None if self.models.local is None else self._scores_by(self.models.local)

    @cached_property
    def local_only_class_scores(self) -> Tensor:  # (N, C) by a model that was trained on the client's labels alone
        return self._scores_by(self.models.local_only)

    @cached_property
    def committee_class_scores(self) -> Tensor | None:  # (M, N, C) by every client's own model; None without any
        members = self.models.committee
        return torch.stack([self._scores_by(member) for member in members]) if members else None

    @cached_property
    def activations(self) -> Tensor:  # (N, C) of a linear classifier; `class_scores` rule out classes without labels
        return self.model.activations(self.images.features[0])

    @cached_property
    def held_out_activations(self) -> Tensor:  # (L, C) of labelled images, by classifiers not trained on them
        features, strength = self.scene.images.take(self.labelled).features[0], self.config.flywheel.regularisation
        return out_of_fold(features, self.held_out_classes, self.scene.classes, self.models.folds, strength)[0]

    @cached_property
    def held_out_classes(self) -> Tensor:  # (L,) their classes, from 0
        return self.pool.labels_of(self.labelled).classes[:, 0] - 1

    @cached_property
    def embeddings(self) -> Tensor:  # (N, D)
        return training.embed(self.model, self.images, device=self.device)

    @cached_property
    def local_only_embeddings(self) -> Tensor:  # (N, D) of a model that was trained on the client's labels alone
        return training.embed(self.models.local_only, self.images, device=self.device)

    @cached_property
    def labelled_embeddings(self) -> Tensor:  # (L, D)
        return training.embed(self.model, self.scene.images.take(self.labelled), device=self.device)

    @cached_property
    def labelled_class_counts(self) -> np.ndarray:  # (C,) mean number of boxes of each class per labelled image
        labels = self.pool.labels_of(self.labelled)
        counted = torch.where(labels.ignore, 0, labels.classes).flatten()
        return torch.bincount(counted, minlength=self.scene.classes + 1)[1:].numpy() / max(1, len(labels))

    @cached_property
    def reconstruction_errors(self) -> Tensor:  # (N,) sums of squared errors of the client's VAE
        vae, noise = self.models.vae, self.models.noise
        return training.reconstruction_errors(vae, self.photos, self.device, noise)

    @cached_property
    def predicted_losses(self) -> Tensor:  # (N,) by the head that learned to rank images by their loss
        return training.learned_losses(self.model, self.images, device=self.device)

    @cached_property
    def hidden_label_losses(self) -> Scores:  # (N,) against labels that nobody has paid for, needs `diagnostic`
        return detection_losses(self.model, self.images, self.pool.oracle.hidden_labels(self.rows), self.device)

    @cached_property
    def consistency_losses(self) -> Scores:  # (N,) on the VAE's copies, against confident detections on the images
        return self._losses_on(Reconstructed(self.photos, self.models.vae, self.models.noise))

    @cached_property
    def pseudo_label_losses(self) -> Scores:  # (N,) of the detector against its own confident detections
        return self._losses_on(self.images)

    def _losses_on(self, shown: Any) -> Scores:
        guess = as_labels(self.detections, self.config.query.pseudo_above)
        return detection_losses(self.model, shown, guess, self.device, self.config.as_released)


@dataclass(frozen=True)
class Reconstructed:
    """Images as a VAE gives them back; noise: what a VAE as released draws its latents with."""

    images: Images
    vae: VAE
    noise: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, chunks: Sequence, device: str | torch.device = "cpu") -> Iterator[Tensor]:
        """Float pixels (B, 3, H, W) of each chunk of row numbers in turn."""
        for pixels in self.images.batches(chunks, device):
            yield self.vae.to(device).reconstruct(pixels, self.noise if self.vae.as_released else None)


def as_labels(found: Detections, above: float) -> Labels:
    """Detections with a score of `above` and more in the place of ground truth; the rest is background. (N, T)."""
    sure = found.valid & (found.scores >= above)
    never = torch.zeros_like(sure)
    return Labels(found.boxes * sure[..., None], torch.where(sure, found.labels, 0), never, never.clone())


def detection_losses(
    model: Detector, images: Any, labels: Labels, device: str | torch.device = "cpu", summed: bool = False
) -> Scores:
    """MultiBox loss of each image by an SSD against these labels; an image without a label has none.

    summed: not divided by the image's own matched anchors, as in the released code, which favours crowded images.
    """
    batch = 8 if isinstance(images, Reconstructed) and torch.device(device).type == "cpu" else 32  # fits its caches
    parts = training.image_losses(model, images, labels, batch, device, summed)
    known = ((labels.classes > 0) & ~labels.ignore).any(1).cpu().numpy()
    return Scores(np.asarray(sum(parts.values()).double()), known)


def predict(config: Config, model: Detector, images: Any, device: torch.device, **options: Any) -> Detections:
    """Detections for scoring: by default confidence above 0.25, class-agnostic NMS at 0.45 (van Bommel 7.1, code).

    options: of `model.predict`, in the place of the config's.
    """
    given = {name: getattr(config.query, name) for name in ("score_above", "nms_iou", "class_agnostic")}
    views = {"views": YOLO_VIEWS} if config.query.test_time_views else {}
    return training.predict(model, images, device=device, **(given | views | options))
