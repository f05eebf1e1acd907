"""What to label next: pool and Oracle, observations, scores, selection, and every query strategy.

Read pool, observation, scores (and how they select), strategies (the registry; read it to add one); the published ones
are in huale, cald, hua, ksas (with LoGo) and dual_score.
"""

from . import cald, diversity, dual_score, hua, huale, ksas, matching, scores
from .observation import Observation, PoolObservation, Reconstructed, Scene, detection_losses, predict
from .pool import Cost, Oracle, Pool, Unanswered, total
from .scores import Scores, Selection, cascade, portions, top_k
from .strategies import OBSERVATIONS, Strategy, find, kind_of, mixture, registered, strategy
