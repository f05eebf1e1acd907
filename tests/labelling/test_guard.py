"""The guard before the labelling page: foreign origins and guessed passwords get nowhere."""

import contextlib

import pytest

from fedal_utils.labelling import guard

pytest.importorskip("starlette")


@pytest.fixture
def answered():
    """A guard before an app that says 400 to POST /login with a wrong password: (path, headers, ...) -> status."""
    clock = [0.0]
    right = [False]

    async def app(scope, receive, send):
        status = 200 if right[0] or scope["path"] != "/login" else 400
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    shield = guard.Guard(app, ["127.0.0.1", "box.lan"], lambda: clock[0])

    def ask(path="/", method="GET", origin=None, address="10.0.0.1", password=False):
        right[0], said = password, []

        async def send(message):
            said.append(message.get("status"))

        headers = [(b"origin", origin.encode())] if origin else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "client": (address, 1)}
        with contextlib.suppress(StopIteration):  # nothing here waits, so no loop is needed
            shield(scope, None, send).send(None)
        return said[0]

    return ask, clock


def test_foreign_origins_are_refused(answered):
    ask, _ = answered
    for origin in (None, "http://127.0.0.1:7860", "https://box.lan"):
        assert ask(origin=origin) == 200
    for origin in ("http://evil.example", "null", "http://box.lan.evil.example", "http://127.0.0.1.evil.example"):
        assert ask(origin=origin) == 403


def test_wrong_passwords_lock_their_address_out_for_a_while(answered):
    ask, clock = answered
    login = {"path": "/login", "method": "POST"}
    assert ask(**login) == 400 and ask(**login, password=True) == 200  # the right one begins a new count
    assert [ask(**login) for _ in range(guard.TRIES)] == [400] * guard.TRIES
    assert ask(**login, password=True) == 429 and ask("/config") == 200
    assert ask(**login, address="10.0.0.2", password=True) == 200
    clock[0] += guard.LOCKED + 1
    assert ask(**login, password=True) == 200
