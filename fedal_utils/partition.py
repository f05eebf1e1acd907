"""Split a training set over clients: every image goes to one client at most, and no client is empty.

Each function returns a list of sorted index arrays, one a client. What fits no client is returned beside, never lost
in silence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _check_clients(images: int, clients: int) -> None:
    if clients < 1:
        raise ValueError(f"clients must be 1 or more, got {clients}")
    if clients > images:
        raise ValueError(f"{clients} clients cannot share {images} images: each needs at least one; lower `clients`")


def iid(images: int, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random equal split; sizes differ by one at most."""
    _check_clients(images, clients)
    return [np.sort(part) for part in np.array_split(rng.permutation(images), clients)]


def dirichlet(
    dominant: np.ndarray, clients: int, alpha: float, rng: np.random.Generator, least: int = 1, tries: int = 1000
) -> list[np.ndarray]:
    """Label skew: each class's images are dealt out by proportions from Dirichlet(alpha) (Hsu et al. 2019, 1909.06335).

    dominant: (N,) class of each image (the most frequent one in it; 0 = no object, a class of its own).
    alpha: concentration; small = each client sees few classes, large = IID. least: images that every client must get;
    the draw is repeated until it holds.
    """
    dominant = np.asarray(dominant)
    _check_clients(len(dominant), clients)
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be > 0 and finite, got {alpha}")
    if least * clients > len(dominant):
        raise ValueError(f"{clients} clients with at least {least} images need more than the {len(dominant)} there are")
    for _ in range(tries):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(dominant):
            members = rng.permutation(np.flatnonzero(dominant == label))
            shares = rng.dirichlet(np.full(clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, chunk in zip(parts, np.split(members, cuts), strict=True):
                part.append(chunk)
        joined = [np.sort(np.concatenate(part)) for part in parts]
        if min(len(part) for part in joined) >= least:
            return joined
    raise ValueError(
        f"no Dirichlet({alpha}) draw in {tries} gave each of {clients} clients {least} of {len(dominant)} images; "
        "raise alpha or lower clients"
    )


def missing_class(
    present: np.ndarray, missing: Sequence[Sequence[int]], rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Label skew by absence: client m never holds an image with a class in missing[m] (van Bommel 2021, released code).
    KITTI's table is `config.KITTI_MISSING`: pools of 580 + 8 x 579 training images; 25 fit no device.

    present: (N, C) bool, class c (0-based column) occurs in image n. Images are grouped by the exact set of classes
    they hold; from the rarest group to the most common, each image goes to the allowed client that has the fewest so
    far, so that all end nearly equal. Returns the clients' indices and those of the images that fit no client.
    """
    present = np.asarray(present, dtype=bool)
    images, classes = present.shape
    _check_clients(images, len(missing))
    banned = np.zeros((len(missing), classes), dtype=bool)
    for client, columns in enumerate(missing):
        for column in columns:
            if not 0 <= column < classes:
                raise ValueError(f"client {client} misses class column {column}; columns are 0..{classes - 1}")
            banned[client, column] = True
    patterns, group, sizes = np.unique(present, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    parts: list[list[int]] = [[] for _ in missing]
    left_over: list[int] = []
    for number in np.argsort(sizes, kind="stable"):
        allowed = np.flatnonzero(~(banned & patterns[number]).any(axis=1))
        for image in rng.permutation(np.flatnonzero(group == number)):
            if len(allowed) == 0:
                left_over.append(int(image))
                continue
            counts = np.array([len(parts[client]) for client in allowed])
            fewest = allowed[counts == counts.min()]
            parts[fewest[rng.integers(len(fewest))]].append(int(image))
    empty = [client for client, part in enumerate(parts) if not part]
    if empty:
        raise ValueError(f"clients {empty} get no image: every image holds a class that they must miss")
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts], np.sort(np.array(left_over, dtype=np.int64))


def natural(groups: Sequence[str]) -> tuple[list[np.ndarray], list[str]]:
    """One client a group (town, camera, hospital): the indices and the groups' names, sorted by name."""
    if groups is None or len(groups) == 0:
        raise ValueError("a natural partition needs a group for each image (CARLA has towns); this data set names none")
    names = sorted(set(groups))
    array = np.asarray(groups)
    return [np.flatnonzero(array == name) for name in names], names


def class_counts(classes: np.ndarray, parts: Sequence[np.ndarray], class_count: int) -> np.ndarray:
    """Objects of each class at each client: (M, C) integers. classes: (N, K) 1..C, 0 = padding."""
    classes = np.asarray(classes)
    return np.stack(
        [np.bincount(classes[part].reshape(-1), minlength=class_count + 1)[1 : class_count + 1] for part in parts]
    )
