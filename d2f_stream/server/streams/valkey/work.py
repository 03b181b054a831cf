"""ValkeyWork: a worker's hold on one stream of a shared log.

Keeps the events of the stream until its end: a store that comes back with less than it had, since
it died before it wrote the rest to its disk, is given it again.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self

from d2f_stream.core.errors import LogUnavailable
from d2f_stream.core.events import Draft, Event, StreamFailed, StreamFinished, StreamNames
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.server.streams.valkey import scripts
from d2f_stream.server.streams.valkey.keys import encoded
from d2f_stream.server.streams.valkey.store import LogFull

if TYPE_CHECKING:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

__all__ = ["ValkeyWork"]

logger = logging.getLogger("d2f_stream.server")

PATIENCE_S: Final = 30.0
"""For a store that does not answer or is full; meanwhile the engine waits with the stream."""
FULL_S: Final = 0.5
"""Between two tries where the store is full."""


class ValkeyWork:
    """A `Work` in a shared log.

    Args:
        log: whose lease it holds.
        stream_id: the stream.
        fields: its record.
        events: so far.
        copy: this process's copy of the stream, where it has one.

    Attributes:
        is_lost: whether the lease is another's, or was given back.
    """

    def __init__(
        self,
        log: "ValkeyLog",
        stream_id: str,
        fields: Mapping[bytes, bytes],
        events: list[Event],
        *,
        copy: ServedStream | None,
    ) -> None:
        self.stream_id = stream_id
        self.is_lost = False
        self._log = log
        self._fields = fields
        self.copy = copy
        self._events = events
        self._request_key = fields[b"request_key"].decode()
        self._client = fields[b"client"].decode()
        self._num_bytes = sum(len(name) + len(value) for name, value in fields.items())
        self._cancel: Callable[[], None] | None = None
        self._cancelled = False

    @property
    def names(self) -> StreamNames:
        """What the stream's events call it and its request, and whose it is."""
        return StreamNames(self.stream_id, self._request_key.rpartition(":")[2], self._client)

    @property
    def events(self) -> Sequence[Event]:
        """The stream's durable events."""
        return self._events if self.copy is None else self.copy.log

    @property
    def has_ended(self) -> bool:
        """Whether the stream's last event is out."""
        events = self.events
        return bool(events) and isinstance(events[-1], StreamFinished | StreamFailed)

    async def append(self, event: Event) -> bool:
        """Append the stream's next event; False where it is another's, or the log has another.

        Raises:
            LogUnavailable: the log could not be reached for too long, or has no room.
        """
        if self.is_lost:
            return False
        if isinstance(event, Draft):
            self._log.store.post(
                "PUBLISH", self._log.keys.news(self.stream_id), encoded(event), is_lossy=True
            )
            return self.copy is None or self.copy.append(event)
        if event.seq < len(self.events):
            return self.events[event.seq] == event
        if not await self._put(event):
            self.note_lost()
            return False
        if self.copy is None:
            self._events.append(event)
        else:
            self.copy.append(event)
        return True

    def on_cancel(self, cancel: Callable[[], None]) -> None:
        """Have `cancel` called when the stream is cancelled, at once where it was before."""
        self._cancel = cancel
        if self.copy is not None:
            self.copy.begin(cancel)
        if self._cancelled:
            cancel()

    def note_cancel(self) -> None:
        """The stream is cancelled. Idempotent."""
        if not self._cancelled:
            self._cancelled = True
            if self._cancel is not None:
                self._cancel()

    def note_lost(self) -> None:
        """The stream is another's: stop working for it. Idempotent."""
        if not self.is_lost:
            self.is_lost = True
            logger.warning("stream %s was taken over by another worker", self.stream_id)
            if self.copy is not None:
                self.copy.leave(lambda: None)
            if self._cancel is not None:
                self._cancel()

    async def put_back(self) -> bool:
        """Give the store again what it has lost; False where the stream is another's."""
        made = await self._log.store.script(
            scripts.CREATE,
            self._log.keys.prefix,
            self.stream_id,
            self._request_key,
            self._log.holder,
            self._log.times.lease_ms,
            self._log.times.idle_ms,
            *itertools.chain.from_iterable(self._fields.items()),
            patience_s=PATIENCE_S,
        )
        return made == self.stream_id.encode()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Give the lease back."""
        await self._log.release(self)

    async def _put(self, event: Event) -> bool:
        """Bring an event to the store; False where the stream is another's."""
        assert not isinstance(event, Draft)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        while True:
            try:
                answer = await self._log.store.script(
                    scripts.APPEND,
                    *self._arguments(event),
                    patience_s=max(FULL_S, deadline - loop.time()),  # time enough to hear it
                )
            except LogFull:
                if loop.time() + FULL_S > deadline:
                    raise
                await asyncio.sleep(FULL_S)
                continue
            if not isinstance(answer, int):
                raise LogUnavailable(f"the log at {self._log.store.address} answers {answer!r}")
            if answer >= 0:
                self._num_bytes += len(encoded(event))
                return True
            if answer == -1 or (answer == -2 and not await self.put_back()):
                return False
            for old in self.events[max(0, -3 - answer) : event.seq]:
                if not await self._put(old):
                    return False

    def _arguments(self, event: Event) -> list[str | bytes | int]:
        assert not isinstance(event, Draft)
        log, data = self._log, encoded(event)
        arguments: list[str | bytes | int] = [
            *(log.keys.prefix, self.stream_id, log.holder, log.times.lease_ms, event.seq, data)
        ]
        if isinstance(event, StreamFinished | StreamFailed):
            arguments += [
                self._request_key,
                *(self._client, self._request_key.rpartition(":")[2]),
                self._limit(b"ttl_ms", log.times.ttl_ms),
                self._num_bytes + len(data),
                self._limit(b"most_bytes", log.limits.max_retained_bytes),
            ]
        return arguments

    def _limit(self, name: bytes, default: int) -> int:
        """Return a limit of the server that took the request, which may not be who works for it."""
        return int(self._fields.get(name, default))
