"""MemoryChannel: a channel between two tasks of one process, for tests without sockets.

Bounded like a socket: `send` waits while `capacity` messages are unread. `sever` breaks the
connection as a dropped network does: what was not received yet is lost.
"""

import asyncio
from collections import deque
from typing import Self

from d2f_stream.channels import ChannelClosed
from d2f_stream.wire.codec import JSON, Codec

__all__ = ["MemoryChannel"]


class MemoryChannel:
    """One end of an in-process connection; `pair` makes both."""

    def __init__(self, codec: Codec, capacity: int) -> None:
        self.codec = codec
        self._capacity = capacity
        self._inbox: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._closed: tuple[int, str] | None = None
        self._peer: MemoryChannel = self

    @classmethod
    def pair(cls, *, codec: Codec = JSON, capacity: int = 16) -> tuple[Self, Self]:
        """Return the two ends of a new connection."""
        left, right = cls(codec, capacity), cls(codec, capacity)
        left._peer, right._peer = right, left
        return left, right

    @property
    def closed(self) -> tuple[int, str] | None:
        """Close code and reason, once the connection is closed."""
        return self._closed

    async def receive(self) -> bytes:
        """Wait for the next message. Safe to cancel; no message is lost.

        Raises:
            ChannelClosed: there will be none.
        """
        while not self._inbox:
            if self._closed is not None:
                raise ChannelClosed(*self._closed)
            self._changed.clear()
            await self._changed.wait()
        message = self._inbox.popleft()
        self._peer._changed.set()
        return message

    async def send(self, data: bytes) -> None:
        """Send a message; waits while the other side has `capacity` unread. Safe to cancel.

        Raises:
            ChannelClosed: the connection was closed.
        """
        while self._closed is None and len(self._peer._inbox) >= self._capacity:
            self._changed.clear()
            await self._changed.wait()
        if self._closed is not None:
            raise ChannelClosed(*self._closed)
        self._peer._inbox.append(data)
        self._peer._changed.set()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close both directions; what was sent before can still be received. Idempotent."""
        for end in (self, self._peer):
            end._closed = end._closed or (code, reason)
            end._changed.set()

    def sever(self) -> None:
        """Break the connection: unread messages are lost, both sides see code 1006."""
        for end in (self, self._peer):
            end._inbox.clear()
            end._closed = end._closed or (1006, "")
            end._changed.set()
