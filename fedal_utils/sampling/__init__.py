"""What to label next: pool and Oracle, observations, scores, selection, and every query strategy.

pool         who is labelled since when; the Oracle is the only door to labels and counts their cost
observation  what a strategy may observe of unlabelled images, computed when asked for
scores, select, diversity   one number an image, bigger = query first; top k and cascades; sets of images
registry     `strategy(...)` registers a function by name: read it to add one
strategies   the classic ones
huale, cald, hua, ksas, logo, dual_score   the published ones (matching, dual_terms: their parts)
"""

from . import cald, diversity, dual_score, dual_terms, hua, huale, ksas, logo, matching, scores
from .observation import Observation, PoolObservation, Scene, View, predict
from .pool import Cost, Oracle, Pool, total
from .registry import OBSERVATIONS, Strategy, find, kind_of, registered, strategy
from .scores import Scores
from .select import Selection, cascade, portions, top_k
from .strategies import mixture
