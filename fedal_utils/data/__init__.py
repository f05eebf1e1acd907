"""What is learned from: images and labels (`types`), formats, sets by name (`catalogue`), partitions, augmentation."""

from torchvision.ops import clip_boxes_to_image as clip_boxes

from . import partition
from .augment import FILL, AugmentDraws, apply_augmentation, draw_augmentation, random_crop
from .catalogue import NAMES, contact_sheet, inspect_folder, load, load_classes, missing, report_lines
from .classification import CLASS_NAMES
from .digits import Digits, digit_scenes
from .download import KITTI, PINNED, fetch
from .files import SUFFIXES, find_files, letterbox_boxes, letterbox_fit, read_upright, to_original
from .formats import Object, Record, assemble, write_csv
from .formats_json import read_coco, read_label_studio, write_coco
from .formats_txt import read_yolo, write_yolo
from .formats_voc import read_voc, write_voc
from .types import Dataset, Detections, Images, Labels, flip_boxes, join_detections, row_numbers
from .views import VIEWS, Viewed, move_boxes
