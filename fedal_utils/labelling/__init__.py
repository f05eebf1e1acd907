"""A person answers: the store of questions and answers, a simulated annotator, the Oracle behind which a store lies,
transfer of labels from and to files; `page` in the browser (imports Gradio when it is built), and its guard.
"""

from .annotators import Simulated
from .oracle import StoreOracle, Unanswered, oracle_of, pictures, simulated, truth_of
from .store import HISTORY, NotHeld, Question, Store, checked_label, store_path
from .transfer import export, load, records, truth_from
