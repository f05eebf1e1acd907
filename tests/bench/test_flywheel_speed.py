"""Diversity scores and shares of strategies on a pool of 50,000 embeddings; prints seconds and peak extra memory.

No assertion on time. Memory is what the process grows by while a call runs (Linux); the inputs, 98 MiB of embeddings,
20 MiB of logits, are there before.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedal_utils import sampling, seeding
from fedal_utils.sampling import diversity, scores

IMAGES, LABELLED, WIDE, CLASSES, ASKED = 50_000, 2_000, 512, 100, 100


def resident(what: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at most since the last reset."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def measured(name: str, call) -> None:
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the high-water mark starts anew
        before = resident("VmRSS")
    except OSError:
        before = None
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    grown = "not known" if before is None else f"{max(0, resident('VmHWM') - before) / 1024:.0f} MiB"
    print(f"\n{name}: {seconds:.2f} s, peak extra memory {grown} ({torch.get_num_threads()} threads)")


@pytest.fixture(scope="module")
def pool():
    """logits (N, C), embedding (N, D) of the pool and (L, D) of labelled images, in 200 heaps."""
    rng = seeding.torch_rng_for(0, "bench", "flywheel")
    centres = torch.randn(200, WIDE, generator=rng)
    heap = torch.randint(0, 200, (IMAGES + LABELLED,), generator=rng)
    rows = centres[heap] + torch.randn(IMAGES + LABELLED, WIDE, generator=rng)
    logits = 3 * torch.randn(IMAGES, CLASSES, generator=rng)
    return logits, rows[:IMAGES].clone(), rows[IMAGES:].clone()


def draw() -> np.random.Generator:
    return seeding.rng_for(0, "bench", "flywheel")


@pytest.mark.parametrize("how", scores.UNCERTAINTIES)
def test_uncertainty(pool, how):
    measured(f"{how} of {IMAGES:,} x {CLASSES} logits", lambda: scores.uncertainty(pool[0], how))


def test_outliers(pool):
    logits, embedding, known = pool
    measured(
        f"model outliers among {LABELLED:,} held-out images", lambda: diversity.model_outlier(logits, logits[:LABELLED])
    )
    measured(f"embedding outliers, {LABELLED:,} labelled images", lambda: diversity.embedding_outlier(embedding, known))


def test_sets(pool):
    _, embedding, known = pool
    measured(f"{ASKED} clusters of {IMAGES:,}", lambda: diversity.cluster(embedding, ASKED, draw()))
    measured(f"1,000 clusters of {IMAGES:,}", lambda: diversity.cluster(embedding, 1_000, draw()))
    measured(f"{ASKED} clusters of 10,000", lambda: diversity.cluster(embedding[:10_000], ASKED, draw()))
    measured(f"{ASKED} representative ones", lambda: diversity.representative(embedding, known, ASKED, draw()))


def test_a_combination(pool):
    logits, embedding, known = pool
    shares = {"confidence": 0.4, "entropy": 0.2, "outlier": 0.2, "cluster": 0.1, "random": 0.1}

    def part(name, left, count):
        if name == "cluster":
            return left[diversity.cluster(embedding[left], count, draw())]
        if name == "random":
            return left[draw().permutation(len(left))[:count]]
        if name == "outlier":
            found = diversity.embedding_outlier(embedding[left], known)
        else:
            found = scores.uncertainty(logits[left], name)
        return left[sampling.top_k(found, count, draw())]

    measured(f"a combination of five for {ASKED}", lambda: sampling.combination(shares, part, ASKED, IMAGES))
