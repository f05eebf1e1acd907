"""The server's connection to its clients: who is there, a message to each, and what comes back in time."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..federation import ClientLost, Step
from .messages import DIVERGED, HELLO, Answer, without_paths


class Line:
    """clients: name -> the ids that it holds; timeout: seconds that a message waits for its answer."""

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
        """Ask nodes that are new who they are. A name is the first one's that claims it, while that is there."""
        online = set(self.grid.get_node_ids())
        new = sorted(online - set(self.nodes.values()) - self._refused)
        for node, answer in self._send(HELLO, {node: RecordDict() for node in new}).items():
            if not isinstance(answer, RecordDict):
                continue  # asked again in the next round
            said = str(answer.get("said", {}).get("name"))
            if said in self.clients and self.nodes.get(said) not in online:
                self.nodes[said] = node
            else:
                print(f"a node was refused that claims to be client {without_paths(said)!r}", flush=True)
                self._refused.add(node)

    def exchange(
        self, kind: str, contents: Mapping[str, RecordDict], step: Step, read: Callable[[str, Answer], Any]
    ) -> dict[str, Any | ClientLost]:
        """Send each client its message; by name what `read` makes of the answer, or why there is none.

        kind, contents: the messages, by client.
        step: that they are of.
        read: of name and answer; ValueError if the answer cannot be believed.
        """
        online = set(self.grid.get_node_ids())
        nodes = {name: node for name, node in self.nodes.items() if name in contents and node in online}
        answers, found = self._send(kind, {node: contents[name] for name, node in nodes.items()}), {}
        for name in sorted(contents):
            answer = answers[nodes[name]] if name in nodes else ("away", "it is not there")
            try:
                if isinstance(answer, RecordDict):
                    found[name] = read(name, Answer(answer, step))
                    continue
                status, why = answer
            except ValueError as error:
                why = f"its answer cannot be used: {error}"
                status = next((word for word in ("not finite", "wrong shape") if word in why), "refused")
            found[name] = ClientLost(f"client {name}: {without_paths(why)} ({kind})", status)
            print(f"nothing from {found[name]}", flush=True)
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
