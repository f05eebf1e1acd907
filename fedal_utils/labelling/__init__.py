"""A person answers.

store        the one file that holds the questions and the answers
annotators   somebody simulated, for headless runs
oracle       the Oracle that answers an experiment from a store
transfer     labels as COCO, YOLO, VOC or CSV
page, guard  the page in the browser (Gradio, which is imported when the page is built), and who may call it
"""

from .annotators import Simulated
from .oracle import StoreOracle, Unanswered, oracle_of, pictures, simulated, truth_of
from .store import HISTORY, NotHeld, Question, Store, checked_label, store_path
from .transfer import export, load, records, truth_from
