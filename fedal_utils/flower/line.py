"""The server's connection to its clients: who is there, a message to each, and what comes back in time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..federation import ClientLost
from .messages import DIVERGED, HELLO, UNANSWERED, Answer, size_of, without_paths

PAUSE = 0.2  # seconds between two looks for answers
STATUS = {DIVERGED: "diverged", UNANSWERED: "unanswered"}
Answers = dict[str, RecordDict | ClientLost]


class Line:
    """The server's connection to its clients, by name.

    clients: name -> the ids that this client holds. timeout: seconds that a message waits for its answer; patience:
    seconds that a person may take to label. traffic: name -> bytes of the serialised messages, up and down.
    """

    def __init__(self, grid: Grid, clients: Mapping[str, Sequence[str]], timeout: float = 600.0, patience: float = 0.0):
        self.grid, self.clients, self.timeout, self.patience = grid, dict(clients), timeout, patience
        self.nodes: dict[str, int] = {}
        self.traffic = {name: [0, 0] for name in clients}
        self._refused: set[int] = set()  # nodes that are nobody

    def meet(self, wait: float) -> None:
        """Wait until all clients are there; TimeoutError if nobody is after so many seconds."""
        deadline = time.monotonic() + wait
        self.greet()
        while len(self.nodes) < len(self.clients) and time.monotonic() < deadline:
            time.sleep(PAUSE)
            self.greet()
        if not self.nodes:
            raise TimeoutError(f"no client of {', '.join(self.clients)} came within {wait:.0f} s")

    def greet(self) -> None:
        """Ask nodes that are new who they are. A name that two nodes claim is the first one's, while it is there."""
        online, claims = set(self.grid.get_node_ids()), {}
        new = {str(node): node for node in sorted(online - set(self.nodes.values()) - self._refused)}
        for node, answer in self.exchange(HELLO, dict.fromkeys(new, RecordDict()), new).items():
            try:
                if not isinstance(answer, ClientLost):
                    claims.setdefault(Answer(answer).name(), []).append(new[node])
            except ValueError:
                self._refused.add(new[node])
        for name, nodes in claims.items():
            if name in self.clients and self.nodes.get(name) not in online and len(nodes) == 1:
                self.nodes[name] = nodes[0]
            else:
                print(f"{len(nodes)} node(s) refused that claim to be client {without_paths(name)!r}", flush=True)
                self._refused.update(nodes)

    def exchange(
        self, kind: str, contents: Mapping[str, RecordDict], nodes: Mapping[str, int] | None = None
    ) -> Answers:
        """Send each client its message; answers by name, or why there is none. nodes: in place of the known ones."""
        nodes, online = self.nodes if nodes is None else nodes, set(self.grid.get_node_ids())
        make = getattr(self.grid, "message", Message)  # a grid in this process has messages of its own
        answers: Answers = {}
        waiting: dict[str, str] = {}

        def lost(name: str, why: str, status: str) -> None:
            answers[name] = ClientLost(f"client {name}: {without_paths(why)} ({kind})", status=status)

        for name in sorted(contents):
            if nodes.get(name) not in online:
                lost(name, "it is not there", "away")
                continue
            message = make(contents[name], nodes[name], kind, ttl=self.timeout + 5)
            waiting |= {id_: name for id_ in self.grid.push_messages([message]) if id_}
            self._count(name, 1, contents[name])
        deadline = time.monotonic() + self.timeout
        while waiting and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(list(waiting)):
                name = waiting.pop(reply.metadata.reply_to_message_id, None)
                if name is not None and reply.has_error():
                    lost(name, reply.error.reason or "no reason", STATUS.get(reply.error.code, "failed"))
                elif name is not None:
                    answers[name] = reply.content
                    self._count(name, 0, reply.content)
            time.sleep(PAUSE if waiting else 0)
        for name in contents.keys() - answers.keys():
            lost(name, f"no answer within {self.timeout:.0f} s", "no answer")
        return dict(sorted(answers.items()))

    def _count(self, name: str, down: int, content: RecordDict) -> None:
        if name in self.traffic:
            self.traffic[name][down] += size_of(content)
