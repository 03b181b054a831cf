"""ServedStream: one answer on a server, its whole event log and who reads it. Knows no transport.

A connection is a cursor on the log. The log holds all durable events, which `max_new_tokens`
bounds; of drafts only the latest of each block is kept.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable

from d2f_stream.core.errors import D2FError, InvalidRequest
from d2f_stream.core.events import Block, Draft, Event, StreamFailed, StreamFinished
from d2f_stream.core.identity import ModelIdentity
from d2f_stream.server.streams.sizes import STREAM_BYTES, bytes_of
from d2f_stream.wire.protocol import Generate

__all__ = ["Cursor", "ServedStream", "digest_of"]


class ServedStream:
    """One answer: its log, and who reads it.

    Attributes:
        id: unguessable; whoever knows it may read and cancel the stream.
        client: whose it is.
        asker: who takes turns with others for it.
        request_id: the client's name for it.
        request: what it answers, until it has ended.
        clamp: whether the answer is shortened where the model has no room for its length.
        digest: of the request that it answers.
        is_attended: whether this process sees to its end.
        model: what began with it, where this process keeps the log.
        charge: tokens that prompt and answer may take, about, where it is worked on from here.
        log: durable events so far; an event's index is its `seq`.
        drafts: the latest draft of each block that is not final.
        num_drafts_dropped: drafts that a reader wanted and a later state overtook.
        error: why it was turned away before it began, if it was.
        ended: whether no more events come.
        observe: is told of each event.
    """

    def __init__(
        self, request: Generate, *, client: str, asker: str | None = None, clamp: bool = False
    ) -> None:
        self.id = secrets.token_urlsafe(18)
        self.client = client
        self.asker = asker or client
        self.request_id = request.request_id
        self.request: Generate | None = request
        self.clamp = clamp
        self.is_attended = False
        self.digest = digest_of(request)
        self.model: ModelIdentity | None = None
        self.charge = 0
        self.log: list[Event] = []
        self.drafts: dict[int, Draft] = {}
        self.num_drafts_dropped = 0
        self.error: D2FError | None = None
        self.ended = False
        self.cancels_on_disconnect = request.on_disconnect == "cancel"
        self._cursors: dict[Cursor, None] = {}
        self.observe: Callable[[ServedStream, Event], None] | None = None
        self._cancel: Callable[[], object] | None = None
        self._cancel_elsewhere: Callable[[], object] | None = None
        self._withdraw_here: Callable[[], object] | None = None
        self.on_readers: Callable[[ServedStream], None] | None = None
        self._waits = False
        self._terminal: asyncio.Future[None] | None = None

    @property
    def started(self) -> bool:
        """Whether its first event is out."""
        return bool(self.log)

    @property
    def has_terminal(self) -> bool:
        """Whether its last event is out."""
        return bool(self.log) and isinstance(self.log[-1], StreamFinished | StreamFailed)

    @property
    def num_readers(self) -> int:
        """Cursors that are attached."""
        return len(self._cursors)

    @property
    def num_bytes(self) -> int:
        """What keeping it takes, about."""
        return STREAM_BYTES + sum(map(bytes_of, self.log))

    def cancel(self) -> None:
        """End the stream within a step. Idempotent."""
        if self._cancel is not None:
            cancel = self._cancel
            if self._waits:
                self._cancel = None
            cancel()
        elif self._cancel_elsewhere is not None and not self.has_terminal:
            self._cancel_elsewhere()

    def cancel_here(self) -> None:
        """End the stream, where it has no worker elsewhere. Idempotent."""
        if self._cancel is None and self._withdraw_here is not None:
            self.wait(self._withdraw_here)
        if self._cancel is not None:
            self.cancel()

    def read(
        self, *, after_seq: int = -1, drafts: bool = False, wake: Callable[[], None]
    ) -> "Cursor":
        """Attach a reader that has every event up to `after_seq`.

        Args:
            after_seq: -1 reads from the beginning.
            drafts: whether it wants drafts too.
            wake: called whenever there is something to take, or nothing more will come.

        Raises:
            InvalidRequest: the stream has no event `after_seq`.
        """
        if not -1 <= after_seq < len(self.log):
            raise InvalidRequest(
                f"after_seq is {after_seq} but the last event of the stream is {len(self.log) - 1}"
            )
        cursor = Cursor(self, after_seq + 1, drafts, wake)
        self._cursors[cursor] = None
        if self.on_readers is not None and len(self._cursors) == 1:
            self.on_readers(self)
        wake()
        return cursor

    async def follow(self, *, after_seq: int = -1, drafts: bool = False) -> AsyncIterator[Event]:
        """Yield the events as they come, to the end. Safe to cancel; close it when done early.

        Raises:
            D2FError: the request was turned away before its stream began.
        """
        changed = asyncio.Event()
        cursor = self.read(after_seq=after_seq, drafts=drafts, wake=changed.set)
        try:
            while not cursor.exhausted:
                changed.clear()
                while (event := cursor.next_event()) is not None:
                    yield event
                if not cursor.exhausted:
                    await changed.wait()
            if self.error is not None:
                raise self.error
        finally:
            cursor.detach()

    # The producer's side: called by the registry and the log only.

    def wait(self, withdraw: Callable[[], object]) -> None:
        """Note what `cancel` calls while the stream waits for its worker."""
        self._cancel, self._waits = withdraw, True

    @property
    def works_here(self) -> bool:
        """Whether it has a session of this process."""
        return self._cancel is not None and not self._waits

    @property
    def withdrawn(self) -> bool:
        """Whether it was cancelled while it waited."""
        return self._waits and self._cancel is None

    def begin(self, cancel: Callable[[], object]) -> None:
        """Note what `cancel` calls from now on: the stream has its worker."""
        self._cancel, self._waits = cancel, False

    def leave(self, withdraw: Callable[[], object] | None = None) -> None:
        """Note that its worker is elsewhere; `withdraw` is called while it has none yet."""
        self._cancel, self._waits, self._withdraw_here = None, False, withdraw

    def cancels_elsewhere(self, cancel: Callable[[], object]) -> None:
        """Note what `cancel` calls where the stream's worker is not in this process."""
        self._cancel_elsewhere = cancel

    async def wait_terminal(self) -> None:
        """Wait until its last event is out, or it was turned away. Safe to cancel."""
        if not (self.has_terminal or self.ended):
            if self._terminal is None:
                self._terminal = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._terminal)

    def has(self, event: Event) -> bool:
        """Whether it is one of the events so far."""
        if isinstance(event, Draft) or not 0 <= event.seq < len(self.log):
            return False
        return self.log[event.seq] == event

    def append(self, event: Event) -> bool:
        """Append the next durable event, or keep a draft until a later state overtakes it.

        Returns whether it was the next one: an event of any other `seq` is refused.
        """
        if not isinstance(event, Draft) and event.seq != len(self.log):
            return False
        match event:
            case Draft():
                self.drafts[event.index] = event
                for cursor in self._cursors:
                    cursor._note_draft(event.index)
                if self.observe is not None:
                    self.observe(self, event)
                return True
            case Block():
                self.drafts.pop(event.index, None)
            case StreamFinished() | StreamFailed():
                self.drafts.clear()
                self._note_terminal()
        for cursor in self._cursors:
            cursor._drop_drafts()
        self.log.append(event)
        self._wake_all()
        if self.observe is not None:
            self.observe(self, event)
        return True

    def end(self, error: D2FError | None = None) -> None:
        """Put nothing more; `error` says why, where the last event does not. Idempotent."""
        if self.ended:
            return
        self.error = error
        self.ended = True
        self.request = self.observe = self._cancel = self._withdraw_here = None
        self._note_terminal()
        self._wake_all()

    def _note_terminal(self) -> None:
        if self._terminal is not None and not self._terminal.done():
            self._terminal.set_result(None)

    def _wake_all(self) -> None:
        for cursor in self._cursors:
            cursor._wake()

    def _detach(self, cursor: "Cursor") -> None:
        if cursor not in self._cursors:
            return
        del self._cursors[cursor]
        if self._cursors or self.ended:
            return
        if self.on_readers is not None:
            self.on_readers(self)  # others may read it elsewhere
        elif self.cancels_on_disconnect:
            self.cancel()


class Cursor:
    """A reader's place in a stream's log; made by `ServedStream.read`."""

    def __init__(
        self, stream: ServedStream, next_seq: int, drafts: bool, wake: Callable[[], None]
    ) -> None:
        self.stream = stream
        self._next_seq = next_seq
        self._wants_drafts = drafts
        self._unread_drafts = dict.fromkeys(stream.drafts) if drafts else {}
        self._wake = wake

    @property
    def exhausted(self) -> bool:
        """Whether everything was taken and nothing more will come."""
        return self.stream.ended and self._next_seq == len(self.stream.log)

    def next_event(self) -> Event | None:
        """Return the next event, None where there is none now. Drafts come after durable events."""
        log = self.stream.log
        if self._next_seq < len(log):
            self._next_seq += 1
            return log[self._next_seq - 1]
        if self._unread_drafts:
            index = next(iter(self._unread_drafts))
            del self._unread_drafts[index]
            return self.stream.drafts[index]
        return None

    def detach(self) -> None:
        """Read no more. Idempotent."""
        self.stream._detach(self)

    def _note_draft(self, index: int) -> None:
        if self._wants_drafts:
            self.stream.num_drafts_dropped += index in self._unread_drafts
            self._unread_drafts[index] = None
            self._wake()

    def _drop_drafts(self) -> None:
        """Forget those whose block is final."""
        for index in [index for index in self._unread_drafts if index not in self.stream.drafts]:
            del self._unread_drafts[index]
            self.stream.num_drafts_dropped += 1


def digest_of(request: Generate) -> bytes:
    """Return what tells a request from another one with the same id."""
    # Not msgpack, which has no integers beyond 64 bits: a request may be wrong, but not break this.
    return hashlib.sha256(repr(request).encode(errors="surrogatepass")).digest()
