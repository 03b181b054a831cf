"""Copies: what this process knows of streams that others work for, and keeps up with.

A copy grows by what the store publishes. Publishing may lose something where a connection breaks,
so each event is taken only if it is the next one; what is missing is read from the store.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from d2f_stream.channels.ending import end_tasks
from d2f_stream.core.error_codes import error_from
from d2f_stream.core.errors import LogUnavailable, StreamLost
from d2f_stream.core.events import (
    Block,
    Draft,
    Event,
    StreamFailed,
    StreamFinished,
    StreamStarted,
)
from d2f_stream.server.streams.log import diverged
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.server.streams.valkey.keys import Keys, decoded, events_of
from d2f_stream.server.streams.valkey.news import News
from d2f_stream.server.streams.valkey.store import Reply, Store
from d2f_stream.wire.protocol import RequestRejected

__all__ = ["Copies"]

FREE_LOOKS: Final = 2
"""In a row that find no worker, before one is looked for: it may just have ended its lease."""
CLAIM_LOOKS: Final = 6
"""As many, where a worker was called; twice as many after each time."""
LOST_LOOKS: Final = 6
"""In a row that do not find the stream: whoever works for it puts it back where it got lost."""
PATIENCE_S: Final = 5.0


class Copies:
    """The streams that are followed. Belongs to one event loop.

    Args:
        store: what holds them.
        keys: their names there.
        news: what is published of them.
    """

    def __init__(self, store: Store, keys: Keys, news: News) -> None:
        self._store = store
        self._keys = keys
        self._news = news
        self._copies: dict[str, _Copy] = {}  # by stream id
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ids(self) -> list[str]:
        """Of the streams that are followed."""
        return list(self._copies)

    async def follow(self, stream: ServedStream) -> None:
        """Keep up with a stream from now on, until its end. Idempotent; safe to cancel.

        Raises:
            LogUnavailable: what it has so far cannot be read.
        """
        if stream.has_terminal or stream.ended:
            return
        copy = self._copies.setdefault(stream.id, _Copy(stream))
        if not copy.is_read:
            try:
                await self._news.subscribe(self._keys.news(stream.id))
                await self._read(copy)
            except LogUnavailable:
                self.leave(stream.id)
                raise
            copy.is_read = True

    def leave(self, stream_id: str) -> None:
        """Keep up with a stream no more. Idempotent."""
        if self._copies.pop(stream_id, None) is not None:
            self._news.unsubscribe(self._keys.news(stream_id))

    async def wait_free(self, stream: ServedStream, *, is_given: bool) -> None:
        """Wait until the stream has ended, or nobody works for it. Safe to cancel.

        Args:
            stream: which.
            is_given: whether a worker was called, who may take a while to begin.

        Raises:
            StreamLost: the log does not know it any more.
        """
        await self.follow(stream)
        if is_given and (copy := self._copies.get(stream.id)) is not None:
            copy.num_free, copy.has_worker = 0, False
        while (copy := self._copies.get(stream.id)) is not None:
            await copy.changed.wait()
            copy.changed.clear()
            if copy.num_lost >= LOST_LOOKS:
                self.leave(stream.id)
                raise StreamLost(f"the log at {self._store.address} has lost the stream; ask again")
            is_awaited = is_given and not copy.has_worker
            if copy.num_free >= (copy.claim_looks if is_awaited else FREE_LOOKS):
                copy.num_free = 0
                if is_awaited:  # a call that only waits for room must not lose its place often
                    copy.claim_looks *= 2
                return

    def note_message(self, stream_id: str, data: bytes) -> None:
        """Take what was published of a stream."""
        copy = self._copies.get(stream_id)
        if copy is None:
            return
        match decoded(data):
            case Draft() as draft:
                copy.stream.append(draft)
            case StreamStarted() | Block() | StreamFinished() | StreamFailed() as event:
                self._take(copy, event)
                if event.seq > len(copy.stream.log):
                    self._catch_up(copy)
                self._note_end(copy)
            case RequestRejected() as refusal:
                self._end(copy, lambda: copy.stream.end(error_from(refusal.code, refusal.message)))
            case _:
                pass

    def note_look(self, stream_id: str, answer: Reply, *, is_settled: bool) -> None:
        """Take what the store says of a stream: its events, and whether somebody works for it.

        Args:
            stream_id: which.
            answer: of the script BEAT.
            is_settled: whether the store has been there for longer than a lease.
        """
        copy = self._copies.get(stream_id)
        if copy is None:
            return
        is_lost = not isinstance(answer, int)
        copy.num_lost = copy.num_lost + 1 if is_lost and is_settled else 0
        number = answer if isinstance(answer, int) else 0
        if not copy.is_kept:  # else its lease is this process's, and says nothing
            copy.note_worker(number >= 0, is_settled=is_settled)
        if (number if number >= 0 else -1 - number) > len(copy.stream.log):
            self._catch_up(copy)
        if copy.num_lost >= LOST_LOOKS:
            copy.changed.set()
        copy.is_kept = False

    def note_kept(self, stream_id: str, *, has_worker: bool, is_settled: bool) -> None:
        """Take what the store says of a stream that this process keeps while nobody works for it.

        Args:
            stream_id: which.
            has_worker: whether somebody does.
            is_settled: as for `note_look`.
        """
        if (copy := self._copies.get(stream_id)) is not None:
            copy.is_kept = True
            copy.note_worker(has_worker, is_settled=is_settled)

    def note_back(self) -> None:
        """Read anew what may have been missed."""
        for copy in self._copies.values():
            self._catch_up(copy)

    async def close(self) -> None:
        """End what runs."""
        await end_tasks(*self._tasks)

    def _catch_up(self, copy: "_Copy") -> None:
        copy.has_missed = True
        if not copy.is_reading:
            copy.is_reading = True
            task = asyncio.create_task(self._catch_up_with(copy), name="d2f-log-catch-up")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _catch_up_with(self, copy: "_Copy") -> None:
        try:
            while copy.has_missed:
                copy.has_missed = False
                with contextlib.suppress(LogUnavailable):  # the next look finds it again
                    await self._read(copy)
        finally:
            copy.is_reading = False

    async def _read(self, copy: "_Copy") -> None:
        stream = copy.stream
        answer = await self._store.run(
            "XRANGE",
            self._keys.events(stream.id),
            f"{len(stream.log) + 1}-0",
            "+",
            patience_s=PATIENCE_S,
        )
        for event in events_of(answer):
            self._take(copy, event)
        self._note_end(copy)

    def _take(self, copy: "_Copy", event: Event) -> None:
        """Take an event, unless readers have another one: the store had lost that one."""
        stream = copy.stream
        if not stream.append(event) and _contradicts(stream, event):
            self._end(copy, lambda: stream.end(diverged(event)))

    def _note_end(self, copy: "_Copy") -> None:
        if copy.stream.has_terminal:
            self._end(copy, None)

    def _end(self, copy: "_Copy", last: Callable[[], None] | None) -> None:
        if last is not None:
            last()
        self.leave(copy.stream.id)
        copy.changed.set()


def _contradicts(stream: ServedStream, event: Event) -> bool:
    """Whether its readers were told something else than this event says."""
    if isinstance(event, Draft) or not 0 <= event.seq < len(stream.log):
        return False
    known = stream.log[event.seq]
    if isinstance(event, Block) and isinstance(known, Block):
        told, tells = ((one.start, one.text, one.token_ids) for one in (known, event))
        return told != tells
    return type(event) is not type(known)


class _Copy:
    def __init__(self, stream: ServedStream) -> None:
        self.stream = stream
        self.changed = asyncio.Event()
        self.num_free = self.num_lost = 0
        self.claim_looks = CLAIM_LOOKS
        self.has_worker = self.is_kept = False
        self.is_read = self.is_reading = self.has_missed = False

    def note_worker(self, is_there: bool, *, is_settled: bool) -> None:
        """Count the looks that find no worker."""
        self.has_worker = self.has_worker or is_there
        self.num_free = self.num_free + 1 if is_settled and not is_there else 0
        if self.num_free >= FREE_LOOKS:
            self.changed.set()
