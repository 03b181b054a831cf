"""Channels: how the messages of one connection travel. Knows bytes, nothing of their meaning.

A channel is what `RemoteEngine` speaks through on the one side and what the server's `Connection`
serves on the other: a websocket, or a pair of queues in one process.
"""

from typing import Protocol

from d2f_stream.wire.codec import Codec

__all__ = ["Channel", "ChannelClosed"]


class ChannelClosed(Exception):
    """The other side is gone, or closed the channel.

    Attributes:
        code: a websocket close code; 1006 where the connection broke without one.
        reason: for people; may be empty.
    """

    def __init__(self, code: int = 1006, reason: str = "") -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"the connection was closed ({code}{': ' if reason else ''}{reason})")


class Channel(Protocol):
    """A two-way connection that keeps messages whole and in order, until it breaks."""

    @property
    def codec(self) -> Codec:
        """The encoding that both sides agreed on."""
        ...

    async def receive(self) -> bytes | str:
        """Wait for the next message. Safe to cancel; no message is lost.

        Raises:
            ChannelClosed: there will be none.
        """
        ...

    async def send(self, data: bytes) -> None:
        """Send a message; waits while the other side does not keep up.

        Cancelling may leave the message sent or not; close the channel after that.

        Raises:
            ChannelClosed: nothing can be sent any more.
        """
        ...

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close both directions. Idempotent."""
        ...
