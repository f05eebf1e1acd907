"""Split a training set over clients: every image goes to one client at most, and no client is empty.

Each function returns a list of sorted index arrays, one a client. What fits no client is returned beside.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp

TRIES = 1000  # draws that `dirichlet` and `dirichlet_equal` make before they give up
ALTERNATIONS = 2000  # of normalising rows and columns, before `dirichlet_equal` draws again


def _gathered(shares: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Each client's images, sorted, from its share of every class: shares[class][client]."""
    return [np.sort(np.concatenate(parts)) for parts in zip(*shares, strict=True)]


def iid(images: int, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random equal split; sizes differ by one at most."""
    if not 1 <= clients <= images:
        raise ValueError(f"{clients} clients cannot share {images} images: each needs at least one")
    return [np.sort(part) for part in np.array_split(rng.permutation(images), clients)]


def dirichlet(
    dominant: np.ndarray, clients: int, alpha: float, rng: np.random.Generator, least: int = 1
) -> list[np.ndarray]:
    """Label skew: each class's images are dealt out by proportions from Dirichlet(alpha) (Hsu et al. 2019, 1909.06335).

    dominant: (N,) the most frequent class of each image, 0 = no object. alpha: small = each client sees few classes,
    large = IID. least: images that every client must get; the draw is repeated until it holds, TRIES times at most.
    """
    for _ in range(TRIES):
        shares = []
        for label in np.unique(dominant):
            members = rng.permutation(np.flatnonzero(dominant == label))
            cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)
            shares.append(np.split(members, np.round(cuts).astype(int)))
        parts = _gathered(shares)
        if min(len(part) for part in parts) >= least:
            return parts
    wanted = f"gave each of {clients} clients {least} of {len(dominant)} images"
    raise ValueError(f"no Dirichlet({alpha}) draw in {TRIES} {wanted}; raise alpha or lower clients")


def _balanced(logs: np.ndarray, columns: np.ndarray, tolerance: float) -> np.ndarray | None:
    """exp of the logs (M, C), scaled until rows sum to 1 and columns to `columns`; None if that takes too long."""
    for _ in range(ALTERNATIONS):
        logs = logs - logsumexp(logs, axis=0, keepdims=True) + np.log(columns)
        rows = logsumexp(logs, axis=1, keepdims=True)
        if np.abs(np.exp(rows) - 1).max() <= tolerance:
            return np.exp(logs)
        logs = logs - rows
    return None


def _whole(wanted: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Integers (M, C) near `wanted` whose columns sum to `counts` (C,), by largest remainders, and rows to `sizes`."""
    dealt = np.floor(wanted).astype(np.int64)
    for column, lacking in enumerate(counts - dealt.sum(axis=0)):
        order = np.argsort(dealt[:, column] - wanted[:, column], kind="stable")
        dealt[order[:lacking], column] += 1
    while (dealt.sum(axis=1) != sizes).any():
        over, under = np.argmax(dealt.sum(axis=1) - sizes), np.argmin(dealt.sum(axis=1) - sizes)
        gain = (dealt[over] - wanted[over]) - (dealt[under] - wanted[under])
        column = np.argmax(np.where(dealt[over] > 0, gain, -np.inf))  # of which both come nearest to what they want
        dealt[[over, under], column] += [-1, 1]
    return dealt


def dirichlet_equal(classes: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Label skew with equal sizes, as LoGo's released code splits (Kim et al. 2023): Dirichlet(alpha), then balanced.

    A matrix clients x classes with rows from Dirichlet(alpha) is normalised by columns and by rows in turn, until rows
    sum to 1 and column c to clients * n_c / N; scaled to images it is rounded, so that sizes differ by one at most. The
    released code splits without the matrix from alpha 10 on; here one rule holds. classes: (N,) of each image.
    """
    present, counts = np.unique(classes, return_counts=True)
    share, kinds = len(classes) / clients, len(present)
    tolerance = min(1, clients / kinds, kinds / clients) / 1000
    for _ in range(TRIES):  # log G(a) = log G(a + 1) + log U / a never underflows
        logs = np.log(rng.standard_gamma(alpha + 1, (clients, kinds)))
        logs = logs + np.log1p(-rng.random((clients, kinds))) / alpha
        if (balanced := _balanced(logs, counts / share, tolerance)) is not None:
            break
    else:
        raise ValueError(f"none of {TRIES} Dirichlet({alpha}) draws for {clients} clients was balanced; raise alpha")
    sizes = np.full(clients, len(classes) // clients)
    sizes[rng.permutation(clients)[: len(classes) % clients]] += 1
    dealt = _whole(balanced * share, sizes, counts)
    members = [rng.permutation(np.flatnonzero(classes == kind)) for kind in present]
    return _gathered([np.split(rows, np.cumsum(of)[:-1]) for rows, of in zip(members, dealt.T, strict=True)])


def missing_class(
    present: np.ndarray, missing: Sequence[Sequence[int]], rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Label skew by absence: client m never holds an image with a class in missing[m] (van Bommel 2021, released code).

    present: (N, C) bool, class c occurs in image n. Images are grouped by the exact set of their classes; from the
    rarest group on, each goes to the allowed client with the fewest so far. Returns also the images that fit nobody.
    """
    banned = np.zeros((len(missing), present.shape[1]), dtype=bool)
    for client, columns in enumerate(missing):
        if not set(columns) <= set(range(present.shape[1])):
            raise ValueError(f"client {client} misses the columns {columns}; columns are 0..{present.shape[1] - 1}")
        banned[client, list(columns)] = True
    patterns, group, sizes = np.unique(present, axis=0, return_inverse=True, return_counts=True)
    client_of, had = np.full(len(present), -1), np.zeros(len(missing), dtype=np.int64)
    for number in np.argsort(sizes, kind="stable"):
        allowed = np.flatnonzero(~(banned & patterns[number]).any(axis=1))
        members = rng.permutation(np.flatnonzero(group.reshape(-1) == number))
        for image in members if len(allowed) else ():
            fewest = allowed[had[allowed] == had[allowed].min()]
            client_of[image] = fewest[rng.integers(len(fewest))]
            had[client_of[image]] += 1
    if empty := np.flatnonzero(had == 0).tolist():
        raise ValueError(f"clients {empty} get no image: every image holds a class that they must miss")
    return [np.flatnonzero(client_of == client) for client in range(len(missing))], np.flatnonzero(client_of < 0)


def natural(groups: Sequence[str] | None) -> tuple[list[np.ndarray], list[str]]:
    """One client a group (day, camera, hospital): the indices and the groups' names, sorted by name."""
    if not groups:
        raise ValueError("a natural partition needs a group for each image (HIT-UAV has days); this set names none")
    names = sorted(set(groups))
    return [np.flatnonzero(np.asarray(groups) == name) for name in names], names
