"""A person answers: the store of questions and answers, the Oracle behind which it lies, a simulated annotator, labels
from and to files; `page` in the browser imports Gradio when it is built.
"""

from .folder import LABELS, OwnFolder, queue
from .oracle import Simulated, StoreOracle, oracle_of, pictures, simulated, truth_of
from .store import HISTORY, Question, Store, store_path
from .transfer import export, load
