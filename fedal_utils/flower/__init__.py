"""Clients elsewhere, on Flower: only its public names are used, and nothing of it is changed.

messages     what travels, and what the server takes of an answer
workspace    folders that `deal` hands the data out into
client_app   what a client answers
server_app   the notebooks' loop with clients at its end
deployment   clients in this process, in Flower's simulation, or as processes of this machine over TLS
"""

try:
    import flwr
except ImportError as error:
    raise ImportError(
        "this needs Flower: pip install -e '.[flower]' in the checkout (Python 3.11 or newer); without it, everything "
        f"runs in the plain loop of the notebooks ({error})"
    ) from error

from .deployment import deployed, in_process, simulate
from .server_app import check, serve
from .workspace import deal
