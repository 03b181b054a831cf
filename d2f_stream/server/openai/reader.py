"""The streams of one request: started, and read as one HTTP response does. Knows no HTTP."""

import asyncio
from collections.abc import Sequence

from d2f_stream.core.error_codes import error_from
from d2f_stream.core.errors import D2FError, ServerShuttingDown
from d2f_stream.core.events import Block, Event, StreamFailed, StreamFinished
from d2f_stream.server.openai.requests import AnswerRequest
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.protocol import Generate, WirePrompt

__all__ = ["Answer", "AnswerReader", "AnswersReader", "start_choices"]

Answer = tuple[list[Block], StreamFinished]


async def start_choices(
    registry: StreamRegistry,
    asked: AnswerRequest,
    prompt: WirePrompt,
    name: str,
    *,
    client: str,
    asker: str,
) -> list[ServedStream]:
    """Start a stream for each choice of a request, or none. Safe to cancel.

    Args:
        registry: starts them.
        asked: the request.
        prompt: of the request.
        name: of the request; those of the streams are made of it.
        client: whose streams they are.
        asker: who takes turns with others.

    Raises:
        D2FError: one of them is refused.
    """
    streams: list[ServedStream] = []
    try:
        for choice in range(asked.num_choices):
            generate = Generate(
                request_id=f"{name}-{choice}" if choice else name,
                prompt=prompt,
                params=asked.overrides(choice),
                on_disconnect="cancel",
            )
            stream = await registry.generate(generate, client=client, asker=asker, clamp=True)
            streams.append(stream)
    except BaseException:  # refused, or the client has left
        for stream in streams:
            stream.cancel()
        raise
    return streams


class AnswerReader:
    """Reads one stream, from now on; a stream that nobody reads any more is cancelled.

    Args:
        stream: to be read.
        registry: whose it is.
        changed: is set when there is something to read; None makes its own.
    """

    def __init__(
        self,
        stream: ServedStream,
        registry: StreamRegistry,
        *,
        changed: asyncio.Event | None = None,
    ) -> None:
        self._registry = registry
        self._changed = changed or asyncio.Event()
        drafts = True  # there are none unless the request asked for them
        self._cursor = stream.read(drafts=drafts, wake=self._changed.set)

    def poll(self) -> Event | None:
        """Return the next event if there is one.

        Raises:
            D2FError: the stream was turned away, failed, or was cut off by the server's end.
        """
        cursor = self._cursor
        event = cursor.next_event()
        if event is None and cursor.exhausted:
            raise cursor.stream.error or D2FError("the stream has no end")
        if isinstance(event, StreamFailed):
            raise error_from(event.code, event.message)
        cancelled = isinstance(event, StreamFinished) and event.reason == "cancelled"
        if cancelled and not self._registry.admits:
            raise ServerShuttingDown("the server is shutting down; the answer was cut off")
        return event

    async def next(self, patience_s: float | None = None) -> Event | None:
        """Wait for the next event; None if none came for so long. Safe to cancel.

        Raises:
            D2FError: as `poll`.
        """
        try:
            async with asyncio.timeout(patience_s):
                while (event := self.poll()) is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return None
        return event

    async def read_all(self) -> Answer:
        """Wait for the whole answer. Safe to cancel."""
        blocks: list[Block] = []
        while not isinstance(event := await self.next(), StreamFinished):
            if isinstance(event, Block):
                blocks.append(event)
        return blocks, event

    def close(self) -> None:
        """Read no more. Idempotent."""
        self._cursor.detach()


class AnswersReader:
    """Reads the streams of one request's choices side by side."""

    def __init__(self, streams: Sequence[ServedStream], registry: StreamRegistry) -> None:
        self._changed = asyncio.Event()
        self._readers = [AnswerReader(s, registry, changed=self._changed) for s in streams]
        self._running = dict(enumerate(self._readers))

    async def next(self, patience_s: float | None = None) -> tuple[int, Event] | None:
        """Wait for the next event, and tell whose; None if none came for so long. Safe to cancel.

        To be called until every stream has ended.

        Raises:
            D2FError: one of the streams was turned away, failed, or was cut off.
        """
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    self._changed.clear()
                    for index, reader in self._running.items():
                        if (event := reader.poll()) is not None:
                            if isinstance(event, StreamFinished):
                                del self._running[index]
                            return index, event
                    await self._changed.wait()
        except TimeoutError:
            return None

    @property
    def ended(self) -> bool:
        """Whether every stream has."""
        return not self._running

    async def read_all(self) -> list[Answer]:
        """Wait for the whole answers. Safe to cancel."""
        return [await reader.read_all() for reader in self._readers]

    def close(self) -> None:
        """Read no more. Idempotent."""
        for reader in self._readers:
            reader.close()
