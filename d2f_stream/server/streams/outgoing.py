"""Outgoing: what one connection is still to be told, and the task that tells it.

Replies come first, then one event of each stream in turn, so none waits for another. A reader that
does not take what is sent loses its connection, not its streams.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from d2f_stream.channels import Channel
from d2f_stream.core.errors import D2FError, SlowConsumer
from d2f_stream.core.events import Draft
from d2f_stream.server.streams.served_stream import Cursor, ServedStream
from d2f_stream.server.streams.stall import Stall
from d2f_stream.wire.protocol import RequestRejected, ServerMessage

__all__ = ["Outgoing"]

MAX_WAITING_REPLIES: Final = 32


class Outgoing:
    """The replies and the streams of one connection.

    Args:
        channel: open; stays its owner's.
        stall_timeout_s: how long a reader may not take what is sent to it, seconds.
        on_slow: called when it has not.
    """

    def __init__(
        self, channel: Channel, *, stall_timeout_s: float, on_slow: Callable[[], None]
    ) -> None:
        self._channel = channel
        self._stall_timeout_s = stall_timeout_s
        self._on_slow = on_slow
        self._cursors: dict[str, Cursor] = {}  # by stream id
        self._unread: dict[str, None] = {}  # ids of streams that may have something to tell
        self._replies: deque[ServerMessage] = deque()
        self._wake = asyncio.Event()  # for the writer
        self._room = asyncio.Event()  # for the reader: replies were written
        self._ending: D2FError | None = None
        self._left = False  # the client: nothing can be written any more
        self._stall: Stall

    @property
    def num_streams(self) -> int:
        """Streams that are read."""
        return len(self._cursors)

    def reads(self, *, stream_id: str | None = None, request_id: str | None = None) -> bool:
        """Whether the stream of that id, or of that request, is read."""
        streams = (cursor.stream for cursor in self._cursors.values())
        return any(stream_id == one.id or request_id == one.request_id for one in streams)

    def reply(self, message: ServerMessage) -> None:
        """Send a message before any event."""
        if not self._left:
            self._replies.append(message)
            self._wake.set()

    def follow(self, stream: ServedStream, *, after_seq: int, drafts: bool) -> None:
        """Send what comes in a stream, anew where it is read already.

        Raises:
            InvalidRequest: the stream has no event `after_seq`; nothing has changed.
        """
        wake = partial(self._note_news, stream.id)
        cursor = stream.read(after_seq=after_seq, drafts=drafts, wake=wake)
        old = self._cursors.pop(stream.id, None)  # only now: a refusal must change nothing
        self._cursors[stream.id] = cursor
        wake()
        if old is not None:
            old.detach()

    def finish(self, reason: D2FError) -> None:
        """End `write` with the reason, after what is ready was sent."""
        self._ending = self._ending or reason
        self._wake.set()

    def leave(self) -> None:
        """Send nothing any more: the client is gone."""
        self._left = True
        self._room.set()

    def detach(self) -> None:
        """Read no stream any more."""
        for cursor in self._cursors.values():
            cursor.detach()
        self._cursors.clear()

    async def wait_room(self) -> None:
        """Wait until few replies wait. Safe to cancel."""
        while len(self._replies) > MAX_WAITING_REPLIES and not self._left:
            self._room.clear()
            await self._room.wait()

    async def write(self) -> None:
        """Send what comes, until it is told to finish. Ends by an error or by cancellation.

        Raises:
            ChannelClosed: the client is gone.
            SlowConsumer: it did not take what was sent.
            D2FError: what `finish` was given.
        """
        self._stall = Stall(self._stall_timeout_s)
        try:
            await self._write()
        finally:
            self._stall.close()

    async def _write(self) -> None:
        while True:
            self._wake.clear()
            while self._replies:
                await self._send(self._replies.popleft())
                self._room.set()
            for stream_id in list(self._unread):
                await self._write_next(stream_id)
            if self._unread or self._replies:
                continue
            if self._ending is not None:
                raise self._ending
            await self._wake.wait()

    def _note_news(self, stream_id: str) -> None:
        self._unread[stream_id] = None
        self._wake.set()

    async def _write_next(self, stream_id: str) -> None:
        cursor = self._cursors.get(stream_id)
        event = None if cursor is None else cursor.next_event()
        if event is None:
            del self._unread[stream_id]  # until it has news
        if cursor is None:
            return
        if event is not None:
            await self._send(event)
        elif cursor.exhausted and cursor.stream.error is not None:
            stream = cursor.stream
            assert stream.error is not None
            name = None if stream.started else stream.request_id
            told = stream.id if stream.started else None
            await self._send(RequestRejected.of(stream.error, request_id=name, stream=told))
        if cursor.exhausted and self._cursors.get(stream_id) is cursor:
            del self._cursors[stream_id]
            cursor.detach()

    async def _send(self, message: ServerMessage) -> None:
        data = self._channel.codec.encode(message)
        try:
            with self._stall:
                await self._channel.send(data)
        except TimeoutError:
            self._on_slow()
            kind = "a draft" if isinstance(message, Draft) else "a message"
            timeout_s = self._stall_timeout_s
            raise SlowConsumer(f"the reader did not take {kind} for {timeout_s:g} s") from None
