"""What is learned from: images and labels, the formats they come and go in, sets by name, partitions, augmentation.

`types`: Images, Labels and the Dataset of both. `pixels` opens images, upright and letterboxed. `files` finds and
reads files of strangers. `formats` holds what all formats share: Record, Object, and `assemble`, which makes a Dataset
of records; `formats_voc`, `_coco`, `_yolo`, `_kitti` and `_tables` (CSV, Label Studio) read and write. `folders` finds
out format and split of an own folder; `catalogue` holds the sets by name, and `load`; `inspect` tells what would be
read; `download` fetches at pinned commits. `digits` draws DigitScenes, `classification` holds sets of whole-image
classes. `partition` splits a set over clients; `augment` changes training batches; `views` holds the changed views of
CALD; `boxes` is what torchvision lacks for boxes, and `Detections`.
"""

from . import classification, partition
from .augment import FILL, AugmentDraws, apply_augmentation, draw_augmentation, random_crop
from .boxes import Detections, clip_boxes, flip_boxes, join_detections, letterbox_boxes, letterbox_fit, pad_boxes
from .boxes import to_original
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
from .types import Dataset, Images, Labels, Reading, StreamedImages, row_numbers
from .views import VIEWS, Viewed, move_boxes
