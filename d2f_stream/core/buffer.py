"""EventBuffer: what lies between an engine that produces events and the one task that reads them.

Knows events, marks and readers; nothing of models, requests or time. Engines hold the buffer and
never the `Session`, so that a session nobody holds can be collected while its engine still works
for it. The marks and the reader flag follow `Assembler` of websockets (asyncio/messages.py):
`append` is synchronous, and a hard bound is impossible because what was committed must not be lost.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from d2f_stream.core.errors import D2FError, InvalidRequest
from d2f_stream.core.events import Block, Draft, Event, StreamFailed, StreamFinished
from d2f_stream.core.printable import shown

__all__ = ["HIGH_WATER", "EventBuffer"]

HIGH_WATER = 16
"""Durable events that wait unread before the producer is paused; it resumes at a quarter."""


def _go_on() -> None:
    """Pause or resume nothing: the answer's own length bounds what waits for its reader."""


class EventBuffer:
    """The events of one stream, from one producer to one reader at a time.

    All methods are for the thread of the event loop that it was created on.

    Attributes:
        text: what was committed so far, read or not.
        token_ids: the same, as ids.
        terminal: the last event, once there is one.
        error: why the request was turned away before its stream began, if it was.

    Args:
        cancel: called once, when the reader's side gives the stream up.
        pause: called when more than `high` durable events wait.
        resume: called after `pause`, when only a quarter of them still wait.
        high: durable events; drafts do not count, as each replaces the one before it.
        committed: what the reader has of the answer already.

    Raises:
        InvalidRequest: what was committed is no sequence of blocks.
    """

    def __init__(
        self,
        *,
        cancel: Callable[[], None],
        pause: Callable[[], None] = _go_on,
        resume: Callable[[], None] = _go_on,
        high: int = HIGH_WATER,
        committed: Sequence[Block] = (),
    ) -> None:
        if not isinstance(committed, Sequence) or not all(isinstance(b, Block) for b in committed):
            raise InvalidRequest(
                f"committed is {shown(committed)} but must be a list of the blocks that an engine "
                "has told, or () for a new answer"
            )
        self.text = "".join(block.text for block in committed)
        self.token_ids = [token for block in committed for token in block.token_ids]
        self.terminal: StreamFinished | StreamFailed | None = None
        self.error: D2FError | None = None
        self._events: deque[Event] = deque()
        self._num_drafts = 0
        self._high = high
        self._low = high // 4
        self._paused = False
        self._unbounded = False
        self._cancelled = False
        self._reader: asyncio.Future[None] | None = None
        self._ended = asyncio.Event()
        self._cancel, self._pause, self._resume = cancel, pause, resume

    # Producer side: called by engines only.

    def append(self, event: Event) -> None:
        """Append an event; pauses the producer above the high mark.

        A draft replaces the unread one of its block and is dropped while durable events pile up.
        """
        match event:
            case Draft():
                self._put_draft(event)
                return
            case Block():
                self._drop_draft(event.index)
                self.text += event.text
                self.token_ids.extend(event.token_ids)
            case StreamFinished() | StreamFailed():
                self._drop_draft(None)
                self.terminal = event
                self._ended.set()
            case _:
                pass
        self._events.append(event)
        self._wake_reader()
        if self.num_waiting > self._high and not self._paused and not self._unbounded:
            self._paused = True
            self._pause()

    def reject(self, error: D2FError) -> None:
        """Turn the request away before its stream began: every read raises `error`."""
        self.error = error
        self._ended.set()
        self._wake_reader()

    @property
    def ended(self) -> bool:
        """Whether the producer has nothing more to append."""
        return self._ended.is_set()

    @property
    def num_waiting(self) -> int:
        """Durable events that were not read yet."""
        return len(self._events) - self._num_drafts

    # Reader side: called by Session.

    @property
    def would_wait(self) -> bool:
        """Whether a reader would have to wait now."""
        return not self._events and self.error is None and not self.ended

    async def get(self) -> Event | None:
        """Take the next event; None after the last. Safe to cancel; no event is lost.

        Raises:
            RuntimeError: another task is reading.
            D2FError: the request was turned away.
        """
        if self._reader is not None:
            raise RuntimeError(
                "two tasks read one session at a time; let one read, or generate() twice"
            )
        while not self._events:
            if self.error is not None:
                raise self.error
            if self.ended:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        event = self._events.popleft()  # after the await: a cancelled reader has taken nothing
        self._num_drafts -= isinstance(event, Draft)
        if self._paused and self.num_waiting <= self._low:
            self._paused = False
            self._resume()
        return event

    def cancel(self) -> None:
        """Give the stream up. Idempotent; events that already wait can still be read."""
        if not self._cancelled and not self.ended:
            self._cancelled = True
            self._cancel()

    def lift_marks(self) -> None:
        """Never pause the producer again; the answer's own length bounds the buffer."""
        self._unbounded = True
        if self._paused:
            self._paused = False
            self._resume()

    async def wait_ended(self) -> None:
        """Wait until the producer has nothing more to append. Safe to cancel; no event is lost."""
        await self._ended.wait()

    def _put_draft(self, draft: Draft) -> None:
        self._drop_draft(draft.index)
        if self.num_waiting <= self._low:
            self._events.append(draft)
            self._num_drafts += 1
            self._wake_reader()

    def _drop_draft(self, index: int | None) -> None:
        if not self._num_drafts:
            return
        kept = [
            event
            for event in self._events
            if not (isinstance(event, Draft) and index in (None, event.index))
        ]
        self._num_drafts -= len(self._events) - len(kept)
        self._events = deque(kept)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
