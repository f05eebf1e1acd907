"""A client: its pool, and what stays with it between rounds."""

from dataclasses import dataclass, field

from ..sampling import Pool
from .messages import State

KEPT = ("optimizer_state", "local_state", "last_local_state", "stale_global_state", "vae_state")  # when a run resumes


@dataclass
class Client:
    """A participant: its name, its pool, and what stays with it between rounds; at the end, what one round was."""

    name: str
    pool: Pool
    optimizer_state: State = field(default_factory=dict)  # where that is kept or sent along
    local_state: State = field(default_factory=dict)  # its own model: local-first, and the chain's first pass
    last_local_state: State = field(default_factory=dict)  # where a strategy compares it with the global model
    stale_global_state: State = field(default_factory=dict)  # the last it received, if it missed rounds (KAFAL, alg. 1)
    vae_state: State = field(default_factory=dict)  # of its VAE, where that is not refitted; never leaves it
    status: str = ""  # why it sent nothing: 'no labels', 'lost', 'diverged', ...
    bytes_down: int = 0
    bytes_from_peers: int = 0  # of other clients' models that it received to query with


class ClientLost(RuntimeError):
    """A client's update did not arrive, or cannot be used; status: the same in a word or two, for the record."""

    def __init__(self, message: str, status: str = "lost"):
        super().__init__(message)
        self.status = status
