"""FailedLogins: what a wrong token costs whoever shows it. Knows no transport.

Each is counted and logged, and answered the later the more of them the same host has shown of
late; who shows several on one connection loses it. Guessing is slow then, however it is done: a
token has at least 16 characters.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from d2f_stream.server.peer_log import PeerLog

__all__ = ["FailedLogins", "Peer"]

Peer = tuple[str, int]
"""Address and port of the other side; together they name a connection."""

FIRST_DELAY_S: Final = 0.05
MAX_DELAY_S: Final = 2.0
HALF_LIFE_S: Final = 60.0
"""In which half of a host's failures are forgotten."""
MAX_WAITING: Final = 64
"""Answers that are held back at once: they cost a connection each."""
MAX_KNOWN: Final = 4096
"""Hosts and connections that are remembered; the oldest go first."""

log = PeerLog(logging.getLogger("d2f_stream.server"))


class FailedLogins:
    """Counts the wrong tokens of one server.

    Args:
        allowed: of one connection, before it is closed.
        clock: seconds, monotonic.

    Attributes:
        total: how many there were.
    """

    def __init__(self, *, allowed: int = 3, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._allowed = allowed
        self._clock = clock
        self._hosts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # failures, when
        self._connections: OrderedDict[Peer, int] = OrderedDict()
        self._num_waiting = 0

    async def refuse(self, peer: Peer | None) -> bool:
        """Count a wrong token, then wait as long as it deserves; whether to close the connection.

        Safe to cancel; it counts all the same.
        """
        self.total += 1
        host = peer[0] if peer else "an unknown address"
        num_failed = self._count(host)
        log.warning("a wrong token from %s", host)
        is_last = self._count_on(peer) >= self._allowed
        if self._num_waiting >= MAX_WAITING:
            return True
        self._num_waiting += 1
        try:
            await asyncio.sleep(min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(num_failed - 1, 10)))
        finally:
            self._num_waiting -= 1
        return is_last

    def _count(self, host: str) -> float:
        now_s = self._clock()
        num_failed, then_s = self._hosts.pop(host, (0.0, now_s))
        faded: float = num_failed * 0.5 ** ((now_s - then_s) / HALF_LIFE_S)
        num_failed = faded + 1
        self._hosts[host] = num_failed, now_s
        if len(self._hosts) > MAX_KNOWN:
            self._hosts.popitem(last=False)
        return num_failed

    def _count_on(self, peer: Peer | None) -> int:
        if peer is None:
            return 0
        self._connections[peer] = num_failed = self._connections.pop(peer, 0) + 1
        if len(self._connections) > MAX_KNOWN:
            self._connections.popitem(last=False)
        return num_failed
