"""Nodes: what a client knows of the workers behind a broker. Knows statuses and a clock.

A worker is gone when it says so, when the broker says so in its name, or when nothing was heard of
it for the time that its last status named. While there is no connection nothing can be heard, so
the clock then stands still.
"""

import random
from collections.abc import Callable
from typing import Final

import msgspec

from d2f_stream.channels.patience import Patience
from d2f_stream.wire.protocol import ModelCard
from d2f_stream.wire.topics import NodeStatus

__all__ = ["Nodes"]

MAX_GONE: Final = 256
"""Workers remembered as gone, since their last events may come after the news."""


class Nodes:
    """The workers that were heard of. Belongs to one event loop.

    Args:
        on_online: a worker came or came back, and whether requests may have been lost: those on
            the way to it, or, where it is the only one, those that nobody took.
        on_offline: a worker is gone.
    """

    def __init__(
        self, *, on_online: Callable[[str, bool], None], on_offline: Callable[[str], None]
    ) -> None:
        self._on_online, self._on_offline = on_online, on_offline
        self._nodes: dict[str, NodeStatus] = {}
        self._timers: dict[str, Patience] = {}
        self._listening = False

    @property
    def card(self) -> ModelCard | None:
        """What a worker that takes requests serves; None without one."""
        for status in self._nodes.values():
            if status.status == "online" and status.hello is not None:
                return status.hello.model
        return None

    def is_gone(self, node: str) -> bool:
        """Whether the worker was heard of and is gone."""
        status = self._nodes.get(node)
        return status is not None and status.status == "offline"

    def shares_log(self, node: str) -> bool:
        """Whether a worker's streams go on at others."""
        status = self._nodes.get(node)
        return status is not None and bool(status.log)

    def heir_of(self, node: str) -> str:
        """Return a worker that takes requests and reads the streams of a gone one on, or ""."""
        log = self._nodes[node].log
        heirs = [n for n, s in self._nodes.items() if log and s.log == log and s.status == "online"]
        return random.choice(heirs) if heirs else ""

    def note(self, status: NodeStatus) -> None:
        """Take the news of a worker."""
        had_one = self.card is not None
        known = self._nodes.pop(status.node, None)
        self._nodes[status.node] = status
        if status.status == "offline":
            self._disarm(status.node)
            if known is None or known.status != "offline":
                self._on_offline(status.node)
            self._forget_oldest_gone()
            return
        self._arm(status)
        if known is None or known.status == "offline":
            self._on_online(status.node, not had_one)
        elif known.connection != status.connection:
            self._on_online(status.node, True)

    def expect(self, node: str) -> None:
        """Await news of a worker that was never heard of, as of any other."""
        if node not in self._nodes:
            self._nodes[node] = NodeStatus(node=node, status="closing")
            self._arm(self._nodes[node])

    def listen(self) -> None:
        """The connection stands: who is not heard of from now on is gone."""
        self._listening = True
        for status in self._nodes.values():
            if status.status != "offline":
                self._arm(status)

    def pause(self) -> None:
        """The connection broke, or the client is closed: silence means nothing."""
        self._listening = False
        for node in list(self._timers):
            self._disarm(node)

    def _arm(self, status: NodeStatus) -> None:
        self._disarm(status.node)
        if self._listening:
            gone = msgspec.structs.replace(status, status="offline", hello=None)
            self._timers[status.node] = Patience(status.ttl_s, self.note, gone)

    def _disarm(self, node: str) -> None:
        timer = self._timers.pop(node, None)
        if timer is not None:
            timer.cancel()

    def _forget_oldest_gone(self) -> None:
        gone = [node for node, status in self._nodes.items() if status.status == "offline"]
        for node in gone[:-MAX_GONE]:
            del self._nodes[node]
