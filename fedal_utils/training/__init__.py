"""How a model learns, and what it says of images.

schedule    what one call is given: task, batches, learning rates, an optimizer whose state lives on
fit         a detector
classifier  one client's classifier: the plain way, from draws made ahead
stacked     M clients' classifiers as one widened model
client_step, streams    many clients' classifiers on a GPU, each step a CUDA graph
vae         an autoencoder
inference   predictions, embeddings, class scores, losses; cached maps of a frozen backbone
"""

from .classifier import ClassifierTask, LocalResult, fit_classifier, fit_in_turn
from .embedding import embedded, embedded_sets
from .fit import fit
from .inference import CachedImages, cache_features, class_scores, embed, image_losses, learned_losses, predict
from .schedule import DETACHED_HEADS, STEPS, LocalTask, TrainingDiverged, draw_batches, learning_rate_factor
from .stacked import clients_per_stack, fit_stacked
from .streams import fit_graphs, fit_together
from .vae import fit_vae, vae_losses

__all__ = [
    "DETACHED_HEADS",
    "STEPS",
    "CachedImages",
    "ClassifierTask",
    "LocalResult",
    "LocalTask",
    "TrainingDiverged",
    "cache_features",
    "class_scores",
    "clients_per_stack",
    "draw_batches",
    "embed",
    "fit",
    "fit_classifier",
    "fit_graphs",
    "fit_in_turn",
    "fit_stacked",
    "fit_together",
    "fit_vae",
    "image_losses",
    "learned_losses",
    "learning_rate_factor",
    "predict",
    "vae_losses",
]
