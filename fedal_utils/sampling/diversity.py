"""Sets of images that cover the pool, and how unlike the labelled images one is; no labels are seen.

Monarch is R. Monarch, Human-in-the-Loop Machine Learning (2021).
"""

import warnings

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ..data import Detections
from .scores import Scores, Selection, finite, reduce

MANY = 10_000  # images, above which k-means goes by batches
BLOCK = 1024  # rows of a large table that are looked at in float64 at a time
EXACT = "donot_use_mm_for_euclid_dist"  # a matrix product loses the distance of points far from the origin


def k_center(embedding: Tensor, labelled: Tensor, k: int, rng: np.random.Generator) -> Selection:
    """Greedy k-center (core-set; Sener and Savarese 2018, 1708.00489, algorithm 1): the farthest point, k times.

    embedding (N, D) of the pool; labelled (L, D) are centres already, without any the first one is drawn. The scores
    are distances to the nearest centre before the choice. Ties break by `rng`.
    """
    points, centres = finite("embedding", embedding.double()), finite("labelled", labelled.double())
    order = torch.from_numpy(rng.permutation(len(points))).to(points.device)  # argmax takes the first of equals
    points = points[order]
    nearest = points.new_full((len(points),), torch.inf)
    for block in centres.to(points.device).split(256) if len(centres) else ():  # all distances at once may not fit
        nearest = torch.minimum(nearest, torch.cdist(points, block, compute_mode=EXACT).amin(1))
    distances = torch.empty_like(nearest)
    distances[order] = torch.where(torch.isinf(nearest), 0.0, nearest)
    selected = []
    for _ in range(k):
        best = int(nearest.argmax())
        selected.append(int(order[best]))
        nearest = torch.minimum(nearest, (points - points[best]).norm(dim=1))
        nearest[best] = -1.0  # it is taken
    return Selection(np.array(selected, dtype=np.int64), Scores.all(distances))


def badge(logits: Tensor, embedding: Tensor, k: int, rng: np.random.Generator) -> Selection:
    """BADGE (Ash et al. 2020, 1906.03671, algorithm 1): k-means++ seeds among the gradients each image would cause.

    The gradient of the last layer, if the model's own guess were the label: g = (p - onehot(argmax p)) (x) h, with p
    (N, C) the softmax of `logits` and h (N, D) the `embedding`. The first centre is the longest g (as in the authors'
    code), each further one is drawn in proportion to its squared distance to the nearest centre; the scores are |g|.
    |a (x) h - a' (x) h'|^2 = |a|^2 |h|^2 + |a'|^2 |h'|^2 - 2 (a . a') (h . h'): no (N, C D) table is made. Distances
    below 1e-6 of the norms could be rounding of this difference and count as 0, so that equal images are equal.
    """
    guess = finite("logits", logits.double()).softmax(1)
    apart = guess - F.one_hot(guess.argmax(1), guess.shape[1])  # (N, C), the factor a
    points = embedding.double().to(apart.device)
    squared = finite("squared gradient", (apart.square().sum(1) * points.square().sum(1))[:, None])[:, 0]  # (N,)
    norms = squared.sqrt().cpu().numpy()
    nearest = torch.full_like(squared, torch.inf)
    tie, left, selected = rng.permutation(len(norms)), np.ones(len(norms), dtype=bool), []
    for _ in range(k):
        best = int(tie[norms[tie].argmax()])
        if selected:
            weights = np.where(left, nearest.cpu().numpy(), 0.0)
            weights = weights / weights.max() if weights.max() > 0 else left.astype(float)
            best = int(rng.choice(len(weights), p=weights / weights.sum()))
        left[best] = False
        selected.append(best)
        sizes = squared + squared[best]
        distance = sizes - 2 * (apart @ apart[best]) * (points @ points[best])
        nearest = torch.minimum(nearest, distance.masked_fill(distance <= 1e-12 * sizes, 0))
    return Selection(np.array(selected, dtype=np.int64), Scores.all(norms))


def model_outlier(logits: Tensor, held_out_logits: Tensor, held_out_classes: Tensor | None = None) -> Scores:
    """How little the model is moved by an image, in [0, 1]; model-based outliers of Monarch (2021), ch. 4.

    1 - mean over classes of the rank of the image's logit (N, C) among those of the held-out images (V, C): the part
    below it, of equal ones the half. With held_out_classes (V,) class c is ranked among images of c alone.
    """
    logits, held_out_logits, ranks = finite("logits", logits), finite("held_out_logits", held_out_logits), []
    for c in range(logits.shape[1]):
        held = held_out_logits[:, c] if held_out_classes is None else held_out_logits[held_out_classes == c, c]
        if len(held):
            held, column = np.sort(held.double().cpu().numpy()), logits[:, c].double().cpu().numpy()
            ranks.append(sum(np.searchsorted(held, column, side) for side in ("left", "right")) / (2 * len(held)))
    return Scores.all(1 - sum(ranks) / len(ranks))


def box_outlier(detections: Detections, reference: Detections) -> Scores:
    """`model_outlier` of each box, the mean over an image's boxes: log odds against the background. *Ours*.

    reference: detections on held-out images, those of a class give its ranks; without any no image is scored.
    Probabilities would not do: they add up to one, so no box is low in all of them.
    """
    valid, held = detections.valid, reference.valid
    if not bool(held.any()):
        return Scores.none(len(detections))
    logs = [probs.double().clamp(min=1e-300).log() for probs in (detections.probs[valid], reference.probs[held])]
    odds, ranked = (log[:, 1:] - log[:, :1] for log in logs)  # (B, C) of the boxes here, and of those held out
    values = torch.zeros(valid.shape, dtype=torch.float64, device=valid.device)
    values[valid] = torch.from_numpy(model_outlier(odds, ranked, reference.labels[held] - 1).values).to(values)
    return reduce(values, valid, "avg")


def embedding_outlier(embedding: Tensor, labelled: Tensor, k: int = 10) -> Scores:
    """Mean Euclidean distance at length 1 to the k nearest labelled images (all, if there are fewer), in [0, 2].

    embedding (N, D), labelled (L, D). Distances below 1e-6 could be rounding and count as 0. Without labelled images no
    image is scored.
    """
    if not len(labelled):
        return Scores.none(len(embedding))
    others = _unit(finite("labelled", labelled).to(embedding.device))
    values = []
    for block in embedding.split(BLOCK):
        points = _unit(block)  # (B, D)
        squared = points.square().sum(1, keepdim=True) + others.square().sum(1) - 2 * points @ others.T  # (B, L)
        nearest = squared.topk(min(k, len(others)), dim=1, largest=False).values
        values.append(nearest.masked_fill(nearest <= 1e-12, 0).sqrt().mean(1))
    return Scores.all(torch.cat(values))


def cluster(embedding: Tensor, k: int, rng: np.random.Generator) -> np.ndarray:
    """Positions (k,): of each of k clusters of embedding (N, D) the image nearest to its centre; Monarch (2021), ch. 4.

    The largest cluster comes first; where there are fewer different images than clusters, the next nearest of each
    follow. Ties break by `rng`.
    """
    points = finite("embedding", embedding.detach().cpu())
    label, centres = k_means(points.numpy(), k, rng)
    apart = (points.double() - torch.from_numpy(centres[label])).norm(dim=1).numpy()
    order = np.lexsort((rng.random(len(points)), apart))  # the nearest to its centre first
    sizes = np.bincount(label, minlength=len(centres))
    return np.lexsort((rng.random(len(sizes))[label], -sizes[label], turns(label, order)))[:k]


def turns(label: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(N,) 0 for the first row of each cluster in this order, 1 for the second, ..."""
    turn = np.empty(len(label), dtype=np.int64)
    turn[order] = pd.Series(label[order]).groupby(label[order]).cumcount()
    return turn


def k_means(points: np.ndarray, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cluster (N,) of each row of `points` (N, D), and centres (k, D) in float64; of k = 0 or N a single cluster."""
    if k in (0, len(points)):
        return np.zeros(len(points), dtype=np.int64), points.mean(0, keepdims=True, dtype=np.float64)
    by_batches = len(points) > MANY
    method = (MiniBatchKMeans if by_batches else KMeans)(k, n_init=1, random_state=int(rng.integers(2**31)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than k: the caller fills up
        found = method.fit(points if by_batches else points.astype(np.float64))
    return found.labels_.astype(np.int64), found.cluster_centers_.astype(np.float64)


def representative(embedding: Tensor, labelled: Tensor) -> Scores:
    """How much like the pool and how little like what is labelled an image is; an idea of Monarch (2021), ch. 4.

    cos(x, centre of the pool) - cos(x, centre of the labelled images), in [-2, 2], of embeddings (N, D), (L, D); a
    centre is a mean at length 1. Cosines with a zero vector or the centre of no image are 0.
    """
    finite("labelled", labelled)
    direction = _centre(embedding) - _centre(labelled).to(embedding.device)  # (D,): cos(x, a) - cos(x, b) = x (a - b)
    return Scores.all(torch.cat([_unit(block) @ direction for block in embedding.split(BLOCK)]))


def _unit(rows: Tensor) -> Tensor:
    """Rows (B, D) at length 1 in float64; zero rows stay zero."""
    rows = rows.double()
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)  # squares stay finite
    return F.normalize(rows, dim=1)


def _centre(rows: Tensor) -> Tensor:
    """The mean of rows (N, D) at length 1, itself at length 1, (D,) float64; zero for none or where they cancel out."""
    total = sum(_unit(block).sum(0) for block in rows.split(BLOCK))
    length = total.norm()
    return total / length if length > 1e-12 * len(rows) else torch.zeros_like(total)
