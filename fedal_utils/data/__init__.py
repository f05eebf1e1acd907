"""What is learned from: images and labels (`types`), formats, sets by name (`catalogue`), partitions, augmentation."""

from . import classification, partition
from .augment import FILL, AugmentDraws, apply_augmentation, draw_augmentation, random_crop
from .boxes import Detections, clip_boxes, flip_boxes, join_detections, letterbox_boxes, letterbox_fit, to_original
from .catalogue import NAMES, data_root, load
from .classification import NAMES as CLASS_NAMES
from .classification import load as load_classes
from .digits import Digits, digit_scenes, digit_sources
from .download import KITTI, PINNED, fetch
from .files import find_files
from .formats import Object, Record, assemble
from .formats_coco import read_coco, write_coco
from .formats_tables import read_label_studio, write_csv
from .formats_voc import read_voc, write_voc
from .formats_yolo import read_yolo, write_yolo
from .inspect import contact_sheet, inspect_folder, report_lines
from .pixels import SUFFIXES, letterbox_image, read_upright
from .types import Dataset, Images, Labels, Reading, row_numbers
from .views import VIEWS, Viewed, move_boxes
