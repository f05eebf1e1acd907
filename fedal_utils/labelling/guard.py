"""What stands before the labelling page: who may call it by which name, and from where."""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost")
TRIES, LOCKED = 5, 300.0  # wrong passwords of one address in a row, and the seconds that it then waits


def guards(host: str, allow: Sequence[str] = ()) -> tuple[list[Any], bool]:
    """ASGI middleware for a page that is served at `host`, and whether that is this machine alone.

    A request's Host and Origin must be this machine's names or one of `allow`.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    local = host in LOOPBACK
    hosts = [*LOOPBACK, *allow, *([] if local else [host, socket.gethostname()])]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(Guard, hosts=hosts)], local


class Guard:
    """Refuses foreign origins, and an address for `LOCKED` seconds after `TRIES` wrong passwords."""

    def __init__(self, app: Any, hosts: Sequence[str], clock: Callable[[], float] = time.monotonic):
        self.app, self.hosts, self.clock = app, hosts, clock
        self._wrong: dict[str, tuple[int, float]] = {}  # address -> how many in a row, when the last one was

    async def __call__(self, scope: Mapping[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from starlette.responses import PlainTextResponse

        address = (scope.get("client") or ("",))[0]
        login = scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/login")
        count, last = self._wrong.get(address, (0, 0.0))
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).hostname not in self.hosts:
            return await PlainTextResponse("the page answers to its own origin only", 403)(scope, receive, send)
        if login and count >= TRIES and self.clock() < last + LOCKED:
            return await PlainTextResponse("too many wrong passwords: wait", 429)(scope, receive, send)

        async def watched(message: Mapping[str, Any]) -> None:
            if login and message["type"] == "http.response.start":
                self._wrong.pop(address, None)
                if message["status"] >= 400:
                    self._wrong[address] = (count % TRIES + 1, self.clock())
            await send(message)

        await self.app(scope, receive, watched)
