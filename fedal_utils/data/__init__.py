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
# --- shim until the readers land
from .readers import Dataset, Images, Labels, NAMES, SUFFIXES
from .classification import NAMES as CLASS_NAMES
from .classification import load as load_classes
import dataclasses as _d, hashlib as _h
@_d.dataclass(frozen=True)
class Digits:
    scenes: tuple = (400, 200)
    classes: int = 10
def load(name, image_size, root=None, seed=0, limit=None, min_object=0, digits=Digits()):
    from .readers import load as l
    return l(name, image_size, root=root, limit=limit, min_object=min_object, scenes=digits.scenes, digit_classes=digits.classes)
Dataset.fingerprint = lambda self: _h.sha256(repr(self.images.ids).encode()).hexdigest()
__all__ += ["Dataset", "Images", "Labels", "NAMES"]
