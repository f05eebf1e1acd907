"""How a model learns, and what it says of images.

schedule    what one call is given: task, batches, learning rates, an optimizer whose state lives on
inference   predictions, embeddings, class scores, losses; features that are computed once and kept
fit         a detector; graphs: its gradients as CUDA graphs
classifier  one client's classifier; client_step, streams: many clients' on a GPU, each step a CUDA graph
vae         an autoencoder
"""

from .classifier import ClassifierTask, LocalResult, fit_classifier, fit_in_turn
from .fit import fit
from .inference import (
    CachedImages,
    cache_features,
    class_scores,
    embed,
    embedded_sets,
    image_losses,
    learned_losses,
    predict,
)
from .schedule import DETACHED_HEADS, STEPS, LocalTask, TrainingDiverged, draw_batches, learning_rate_factor
from .streams import fit_graphs, fit_together
from .vae import fit_vae, vae_losses
