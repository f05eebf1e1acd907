"""Independent random generators by name: all draws come from one made here and handed over, none from a global seed."""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch


def _entropy(seed: int, names: tuple[str | int, ...]) -> int:
    """128 bits that depend on every name and on its type: ("client", 12) and ("client1", 2) differ."""
    first, *rest = (int(part) if isinstance(part, np.integer) else part for part in (seed, *names))
    if type(first) is not int or first < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
    if any(isinstance(part, bool) or not isinstance(part, (str, int)) for part in rest):
        raise ValueError(f"a generator's name is made of strings and integers, got {names!r}")
    return int.from_bytes(hashlib.sha256("/".join(map(repr, (first, *rest))).encode()).digest()[:16], "big")


def rng_for(seed: int, *names: str | int) -> np.random.Generator:
    """NumPy generator for a named purpose: `rng_for(0, "client", 3, "round", 7)`."""
    return np.random.Generator(np.random.PCG64(_entropy(seed, names)))


def torch_rng_for(seed: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Torch generator for a named purpose, on `device`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(_entropy(seed, names) % (1 << 63))
    return generator


@contextlib.contextmanager
def borrowed_global_rng(generator: torch.Generator) -> Iterator[None]:
    """Layer initialisation and torchvision's samplers draw from torch's global generator: here, from `generator`."""
    seed = int(torch.randint(0, 1 << 62, (1,), generator=generator, device=generator.device).item())
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
