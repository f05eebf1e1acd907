"""What sees: detectors, classifiers, and the VAE that says how novel an image is.

base, backbones, losses: what they share. ssd; faster_rcnn with roi_heads; yolo with yolo_loss; classifiers; vae.
build: a model of a config, or the reason why there is none.
"""

from .backbones import Embedder
from .base import Detector, Inputs, clone, decode_boxes, encode_boxes
from .build import build, build_vae
from .classifiers import CLASSIFIERS, Classifier, LinearClassifier, out_of_fold
from .faster_rcnn import FasterRCNN
from .losses import (
    balanced_cross_entropy,
    compensation_loss,
    compensation_weights,
    crowding,
    efficient_iou_loss,
    emphasis_weights,
    extended_iou,
    extended_iou_loss,
    ranking_loss,
    side_likelihood_loss,
)
from .ssd import SSD
from .vae import VAE, losses_of
from .yolo import VIEWS, YOLO
