"""AnswerReader: one stream as one HTTP response reads it. Knows no HTTP."""

import asyncio

from d2f_stream.core.errors import D2FError, ServerShuttingDown, error_from
from d2f_stream.core.events import Block, Event, StreamFailed, StreamFinished
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.server.streams.served_stream import ServedStream

__all__ = ["AnswerReader"]


class AnswerReader:
    """Reads one stream, from now on; a stream that nobody reads any more is cancelled."""

    def __init__(self, stream: ServedStream, registry: StreamRegistry) -> None:
        self._registry = registry
        self._changed = asyncio.Event()
        drafts = True  # there are none unless the request asked for them
        self._cursor = stream.read(drafts=drafts, wake=self._changed.set)

    async def next(self, patience_s: float | None = None) -> Event | None:
        """Wait for the next event; None if none came for so long. Safe to cancel.

        Raises:
            D2FError: the stream was turned away, failed, or was cut off by the server's end.
        """
        cursor = self._cursor
        try:
            async with asyncio.timeout(patience_s):
                while (event := cursor.next_event()) is None:
                    if cursor.exhausted:
                        raise cursor.stream.error or D2FError("the stream has no end")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return None
        if isinstance(event, StreamFailed):
            raise error_from(event.code, event.message)
        cancelled = isinstance(event, StreamFinished) and event.reason == "cancelled"
        if cancelled and not self._registry.admits:
            raise ServerShuttingDown("the server is shutting down; the answer was cut off")
        return event

    async def read_all(self) -> tuple[list[Block], StreamFinished]:
        """Wait for the whole answer. Safe to cancel."""
        blocks: list[Block] = []
        while not isinstance(event := await self.next(), StreamFinished):
            if isinstance(event, Block):
                blocks.append(event)
        return blocks, event

    def close(self) -> None:
        """Read no more. Idempotent."""
        self._cursor.detach()
