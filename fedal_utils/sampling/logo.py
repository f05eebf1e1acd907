"""LoGo (Kim et al., CVPR 2023, 2303.12317): a model trained on the client's labels alone says what is different, the
global model says what is uncertain. Formulas are those of its released code.
"""

import numpy as np

from .diversity import k_means, turns
from .observation import Observation
from .registry import strategy
from .scores import finite, uncertainty
from .select import Selection, top_k


@strategy(
    "logo",
    ("class_scores", "local_only_class_scores", "local_only_embeddings"),
    "images",
    selects=True,
    source="Kim et al. (2023), 2303.12317",
)
def logo(seen: Observation, k: int, rng: np.random.Generator) -> Selection:
    """k clusters by the client's local-only model, from each the image of the largest global entropy.

    k-means of (1 - max_c p_c(x)) h(x), the last layer's gradient for the class that the local-only model, with features
    h (N, D), expects itself. Where there are fewer different images, the next most uncertain of each follow.
    """
    scores = uncertainty(seen.class_scores, "entropy")
    unsure = uncertainty(seen.local_only_class_scores, "confidence").values[:, None]  # (N, 1) 1 - max_c p_c
    gradient = unsure * finite("embedding", seen.local_only_embeddings).double().cpu().numpy()  # (N, D)
    cluster = np.zeros(seen.count, dtype=np.int64)
    if 0 < k < seen.count:
        cluster, _ = k_means(gradient, k, rng)
    order = top_k(scores, seen.count, rng)  # (N,) by entropy
    taken = np.argsort(turns(cluster, order)[order], kind="stable")[:k]
    return Selection(order[np.sort(taken)], scores)
