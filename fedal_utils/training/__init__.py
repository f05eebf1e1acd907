"""How a model learns, and what it says of images.

schedule: batches, learning rates, optimizers. inference: predictions, embeddings, kept features. fit: a detector (its
gradients as `graphs`), a VAE. classifier: one client's; streams: many clients'.
"""

from .classifier import ClassifierTask, LocalResult, fit_classifier, fit_in_turn
from .fit import fit, fit_vae, reconstruction_errors
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
from .schedule import STEPS, LocalTask, TrainingDiverged, draw_batches
from .streams import fit_graphs, fit_together
