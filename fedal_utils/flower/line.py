"""The server's connection to its clients: who is there, a message to each, and what comes back in time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..federation import ClientLost
from .messages import DIVERGED, HELLO, Answer, without_paths


def lost(name: str, why: str, status: str) -> ClientLost:
    """Why there is nothing of a client, printed as well."""
    error = ClientLost(f"client {name}: {without_paths(why)}", status=status)
    print(f"nothing from {error}", flush=True)
    return error


class Line:
    """The server's connection to its clients, by name.

    clients: name -> the ids that this client holds. timeout: seconds that a message waits for its answer.
    """

    def __init__(self, grid: Grid, clients: Mapping[str, Sequence[str]], timeout: float):
        self.grid, self.clients, self.timeout = grid, dict(clients), timeout
        self.nodes: dict[str, int] = {}
        self._refused: set[int] = set()  # nodes that are nobody

    def meet(self, wait: float) -> None:
        """Wait until all clients are there; TimeoutError if nobody is after so many seconds."""
        deadline = time.monotonic() + wait
        self.greet()
        while len(self.nodes) < len(self.clients) and time.monotonic() < deadline:
            time.sleep(0.2)
            self.greet()
        if not self.nodes:
            raise TimeoutError(f"no client of {', '.join(self.clients)} came within {wait:.0f} s")

    def greet(self) -> None:
        """Ask nodes that are new who they are. A name that two nodes claim is the first one's, while it is there."""
        online, claims = set(self.grid.get_node_ids()), {}
        new = online - set(self.nodes.values()) - self._refused
        for node, answer in self._send(HELLO, {node: RecordDict() for node in sorted(new)}).items():
            try:
                if isinstance(answer, RecordDict):
                    claims.setdefault(Answer(answer).text("name"), []).append(node)
            except ValueError:
                self._refused.add(node)
        for name, nodes in claims.items():
            if name in self.clients and self.nodes.get(name) not in online and len(nodes) == 1:
                self.nodes[name] = nodes[0]
            else:
                print(f"{len(nodes)} node(s) refused that claim to be client {without_paths(name)!r}", flush=True)
                self._refused.update(nodes)

    def exchange(self, kind: str, contents: Mapping[str, RecordDict]) -> dict[str, RecordDict | ClientLost]:
        """Send each client its message; answers by name, or why there is none."""
        online = set(self.grid.get_node_ids())
        nodes = {name: node for name, node in self.nodes.items() if name in contents and node in online}
        answers, found = self._send(kind, {node: contents[name] for name, node in nodes.items()}), {}
        for name in sorted(contents):
            answer = answers[nodes[name]] if name in nodes else ("away", "it is not there")
            if not isinstance(answer, RecordDict):
                status, why = answer
                answer = lost(name, f"{why} ({kind})", status)
            found[name] = answer
        return found

    def _send(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, RecordDict | tuple[str, str]]:
        """The answers by node, or (status, why) there is none."""
        make = getattr(self.grid, "message", Message)  # a grid in this process has messages of its own
        sent = [make(content, node, kind, ttl=self.timeout + 5) for node, content in contents.items()]
        answers = dict.fromkeys(contents, ("no answer", f"no answer within {self.timeout:.0f} s"))
        for reply in self.grid.send_and_receive(sent, timeout=self.timeout) if sent else ():
            if (node := reply.metadata.src_node_id) in answers and reply.has_content():
                answers[node] = reply.content
            elif node in answers:
                diverged = reply.error.code == DIVERGED
                answers[node] = ("diverged" if diverged else "failed", reply.error.reason or "no reason")
        return answers
