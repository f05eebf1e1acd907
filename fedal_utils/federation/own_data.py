"""A folder of the user's own: an experiment shrunk until its images suffice."""

from __future__ import annotations

from ..config import Config


def fitted(config: Config, images: int) -> Config:
    """Clients, budgets and cycles shrunk until `images` training images suffice; two are enough."""
    if images < 2:
        raise ValueError(f"one training image to start from and one to ask for are needed, got {images} images")
    clients = max(1, min(config.federation.clients, images // 4))
    start_images = min(config.federation.initial_model_images, images // 5)
    share = (images - start_images) // clients
    first = max(1, min(config.query.initial_labels, share // 3))
    budget = max(1, min(config.query.query_size, (share - first) // 2))
    cycles = max(1, min(config.query.cycles, 1 + (share - first) // budget))
    rounds = cycles * config.federation.rounds + config.federation.extra_rounds
    first_pass = min(config.federation.first_pass_rounds, max(1, rounds - 1))  # leaves one later pass
    return config.replace(
        **dict(clients=clients, initial_model_images=start_images, initial_labels=first, query_size=budget),
        **dict(cycles=cycles, first_pass_rounds=first_pass),
    )
