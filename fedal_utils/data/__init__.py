"""What is learned from: images, labels, readers and writers of the usual formats, partitions, augmentation.

`classification` holds sets of whole-image classes; `partition` splits a set over clients; `augment` changes training
batches; `views` holds the changed views of CALD; `boxes` is what torchvision lacks for boxes, and `Detections`.
"""

from . import classification, partition
from .augment import AugmentDraws, apply_augmentation, draw_augmentation, random_crop
from .boxes import (
    Detections,
    clip_boxes,
    flip_boxes,
    join_detections,
    letterbox_boxes,
    letterbox_fit,
    pad_boxes,
    to_original,
)
from .views import VIEWS, Viewed, move_boxes

__all__ = [
    "VIEWS",
    "AugmentDraws",
    "Detections",
    "Viewed",
    "apply_augmentation",
    "classification",
    "clip_boxes",
    "draw_augmentation",
    "flip_boxes",
    "join_detections",
    "letterbox_boxes",
    "letterbox_fit",
    "move_boxes",
    "pad_boxes",
    "partition",
    "random_crop",
    "to_original",
]
