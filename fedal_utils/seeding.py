"""Independent random generators by name: the same name and seed give the same numbers, whatever ran before.

Every draw in the suite comes from a generator made here and handed over; nothing reads or sets a global seed.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch


def _entropy(seed: int, names: tuple[str | int, ...]) -> int:
    """128 bits that depend on every name and on its type: ("client", 12) and ("client1", 2) differ."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
    text = repr(int(seed))
    for name in names:
        if isinstance(name, np.integer):
            name = int(name)
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f"a generator's name is made of strings and integers, got {name!r} in {names!r}")
        text += "/" + repr(name)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


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
    """Run library code that can only draw from torch's global generator as if it drew from `generator`.

    The global state is put back afterwards. Needed for layer initialisation and for torchvision's samplers.
    """
    seed = int(torch.randint(0, 1 << 62, (1,), generator=generator, device=generator.device).item())
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
