"""StreamRegistry: the streams of a server, each with its whole event log. Knows no transport.

A stream outlives the connections that read it. Its session is always drained into its log, so a
reader that does not read holds nothing up; a connection is a cursor on the log. The log holds all
durable events, which `max_new_tokens` bounds, and is kept for a while after the stream's end, so
that whoever lost a connection can read on. Of drafts only the latest of each block is kept.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from d2f_stream.errors import (
    D2FError,
    InvalidRequest,
    MessageTooLarge,
    ServerShuttingDown,
    StreamLost,
    TooManyStreams,
)
from d2f_stream.events import Block, Draft, Event, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.protocol import Generate, ModelCard, ModelDefaults, check_request_id
from d2f_stream.server.limits import RateLimit, ServeLimits
from d2f_stream.session import Engine, Prompt, Session

__all__ = ["Cursor", "ServedStream", "StreamObserver", "StreamRegistry"]

logger = logging.getLogger("d2f_stream.server")


class StreamObserver(Protocol):
    """Is told what happens to the streams; for metrics. Called on the event loop; must not wait."""

    def on_start(self, stream: "ServedStream") -> None:
        """A request was taken on; its stream waits or runs."""
        ...

    def on_event(self, stream: "ServedStream", event: Event) -> None:
        """The stream had an event."""
        ...

    def on_end(self, stream: "ServedStream") -> None:
        """The stream ended, or was turned away: `stream.error`."""
        ...

    def on_resume(self, stream: "ServedStream") -> None:
        """A reader came back to the stream."""
        ...

    def on_refused(self, error: D2FError) -> None:
        """A request was refused before it had a stream."""
        ...


class ServedStream:
    """One answer: its log, and who reads it.

    Attributes:
        id: unguessable; whoever knows it may read and cancel the stream.
        client: whose it is.
        request_id: the client's name for it.
        max_new_tokens: what its log is charged.
        log: durable events so far; an event's index is its `seq`.
        drafts: the latest draft of each block that is not final.
        num_drafts_dropped: drafts that a reader wanted and a later state overtook.
        error: why it was turned away before it began, if it was.
        ended: whether no more events come.
    """

    def __init__(self, request: Generate, *, client: str, max_new_tokens: int) -> None:
        self.id = secrets.token_urlsafe(18)
        self.client = client
        self.request_id = request.request_id
        self.max_new_tokens = max_new_tokens
        self.log: list[Event] = []
        self.drafts: dict[int, Draft] = {}
        self.num_drafts_dropped = 0
        self.error: D2FError | None = None
        self.ended = False
        self.cancels_on_disconnect = request.on_disconnect == "cancel"
        self._cursors: set[Cursor] = set()
        self._session: Session | None = None
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def started(self) -> bool:
        """Whether its first event is out."""
        return bool(self.log)

    def cancel(self) -> None:
        """End the stream within a step. Idempotent."""
        if self._session is not None:
            self._session.cancel()

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
        self._cursors.add(cursor)
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
                while (event := cursor.take()) is not None:
                    yield event
                if not cursor.exhausted:
                    await changed.wait()
            if self.error is not None:
                raise self.error
        finally:
            cursor.detach()

    def _put(self, event: Event) -> None:
        match event:
            case Draft():
                self.drafts[event.index] = event
                for cursor in self._cursors:
                    cursor._note_draft(event.index)
                return
            case Block():
                self.drafts.pop(event.index, None)
            case StreamFinished() | StreamFailed():
                self.drafts.clear()
        for cursor in self._cursors:
            cursor._drop_drafts()
        self.log.append(event)
        self._wake_all()

    def _wake_all(self) -> None:
        for cursor in self._cursors:
            cursor._wake()

    def _detach(self, cursor: "Cursor") -> None:
        self._cursors.discard(cursor)
        if self.cancels_on_disconnect and not self._cursors and not self.ended:
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

    def take(self) -> Event | None:
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


class StreamRegistry:
    """Starts streams on an engine and finds them again.

    Belongs to one event loop. `shut_down` must be awaited before the engine is closed.

    Args:
        engine: open; what answers.
        limits: what is taken on.
        observer: is told of everything.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: ServeLimits | None = None,
        observer: StreamObserver | None = None,
    ) -> None:
        self.engine = engine
        self.limits = limits or ServeLimits()
        self._observer = observer
        self._rate = RateLimit(self.limits.requests_per_minute)
        self._streams: dict[str, ServedStream] = {}  # in order of arrival
        self._requests: dict[tuple[str, str], ServedStream] = {}  # by client and request id
        self._pumps: dict[asyncio.Task[None], ServedStream] = {}
        self._retained_tokens = 0
        self._admits = True

    @property
    def card(self) -> ModelCard:
        """What is told of the engine's model."""
        info = self.engine.info
        return ModelCard(
            name=info.name,
            family=info.family,
            native_block_size=info.native_block_size,
            max_block_size=info.max_block_size,
            max_len=info.max_len,
            defaults=ModelDefaults(**msgspec.structs.asdict(self.engine.defaults)),
            description=info.description,
        )

    @property
    def num_active(self) -> int:
        """Streams that run or wait."""
        return len(self._pumps)

    @property
    def num_retained(self) -> int:
        """Streams that can be read, those that ended included."""
        return len(self._streams)

    @property
    def admits(self) -> bool:
        """Whether new requests are taken on."""
        return self._admits

    def generate(self, request: Generate, *, client: str) -> ServedStream:
        """Start a stream, or return the one that this request started before.

        Raises:
            D2FError: the request is refused; nothing was started.
        """
        try:
            check_request_id(request.request_id)
            known = self._requests.get((client, request.request_id))
            if known is not None:
                if self._observer is not None:
                    self._observer.on_resume(known)
                return known
            return self._start(request, client)
        except D2FError as error:
            if self._observer is not None:
                self._observer.on_refused(error)
            raise

    def resume(self, stream_id: str, *, client: str) -> ServedStream:
        """Return a stream of the client's.

        Raises:
            StreamLost: there is none of that id.
        """
        stream = self._find(stream_id, client)
        if self._observer is not None:
            self._observer.on_resume(stream)
        return stream

    def cancel(self, name: str, *, client: str) -> None:
        """End the client's stream of that id or request id. Idempotent.

        Raises:
            StreamLost: there is none.
        """
        stream = self._requests.get((client, name)) or self._find(name, client)
        stream.cancel()

    async def shut_down(self, deadline_s: float) -> None:
        """Refuse new requests, let the streams end, and cancel what is left at the deadline.

        Safe to cancel; the streams still running are then cancelled by closing the engine.
        """
        self._admits = False
        if self._pumps:
            await asyncio.wait(self._pumps, timeout=deadline_s)
        for stream in self._pumps.values():
            stream.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps)

    def _find(self, stream_id: str, client: str) -> ServedStream:
        stream = self._streams.get(stream_id)
        if stream is None or stream.client != client:
            kept = f"streams are kept for {self.limits.resume_ttl_s:g} s after their end"
            raise StreamLost(f"there is no stream {stream_id[:64]!r}; {kept}")
        return stream

    def _start(self, request: Generate, client: str) -> ServedStream:
        if not self._admits:
            raise ServerShuttingDown("the server is shutting down; try again later")
        overrides = request.params.to_dict()
        params = self.engine.defaults.with_overrides(overrides)
        limit = self.limits.max_new_tokens
        if limit is not None and params.max_new_tokens > limit:
            raise MessageTooLarge(
                f"max_new_tokens is {params.max_new_tokens} but this server allows {limit}"
            )
        excess = self._check_room(client, params.max_new_tokens)
        self._rate.take(client, asyncio.get_running_loop().time())
        stream = ServedStream(request, client=client, max_new_tokens=params.max_new_tokens)
        stream._session = session = self.engine.generate(_prompt_of(request), params)
        self._evict(excess)  # only now: a request that is refused must cost others nothing
        self._streams[stream.id] = stream
        self._requests[client, stream.request_id] = stream
        self._retained_tokens += stream.max_new_tokens
        if self._observer is not None:
            self._observer.on_start(stream)
        pump = asyncio.create_task(self._pump(stream, session), name=f"d2f-pump-{stream.id}")
        self._pumps[pump] = stream
        pump.add_done_callback(self._note_end)
        return stream

    def _check_room(self, client: str, max_new_tokens: int) -> int:
        """Return how many retained tokens must go to make room for the request.

        Raises:
            TooManyStreams: there is none, even without the streams that have ended.
        """
        limits = self.limits
        if self.num_active >= limits.max_streams:
            raise TooManyStreams(
                f"{self.num_active} streams are running or waiting and the limit is "
                f"{limits.max_streams}; try again later"
            )
        bound = limits.max_streams_per_client
        if bound is not None:
            own = sum(stream.client == client for stream in self._pumps.values())
            if own >= bound:
                raise TooManyStreams(
                    f"{own} of your streams are running or waiting and the limit is {bound}; "
                    "wait for one to end, or cancel it"
                )
        excess = self._retained_tokens + max_new_tokens - limits.max_retained_tokens
        if excess > 0:
            ended = sum(s.max_new_tokens for s in self._streams.values() if s.ended)
            if excess > ended:
                raise TooManyStreams(
                    f"the running streams may take {limits.max_retained_tokens} tokens in all; "
                    "try again later, or lower max_new_tokens"
                )
        return excess

    def _evict(self, excess: int) -> None:
        """Forget ended streams, the oldest first, until so many tokens are free."""
        if excess <= 0:
            return
        for stream in [s for s in self._streams.values() if s.ended]:
            self._forget(stream)
            excess -= stream.max_new_tokens
            if excess <= 0:
                return

    async def _pump(self, stream: ServedStream, session: Session) -> None:
        """Drain a session into its stream's log, under the names that clients know."""
        try:
            async for event in session.events():
                if isinstance(event, StreamStarted):
                    event = msgspec.structs.replace(
                        event, stream=stream.id, request_id=stream.request_id
                    )
                else:
                    event = msgspec.structs.replace(event, stream=stream.id)
                stream._put(event)
                if self._observer is not None:
                    self._observer.on_event(stream, event)
        except D2FError as error:
            stream.error = error

    def _note_end(self, pump: "asyncio.Task[None]") -> None:
        stream = self._pumps.pop(pump)
        if pump.cancelled():
            stream.error = ServerShuttingDown("the server was shut down")
        elif (broken := pump.exception()) is not None:
            logger.error("stream %s lost its events", stream.id, exc_info=broken)
            stream.error = D2FError(f"the stream failed: {broken!r}")
        stream.ended = True
        stream._session = None
        stream._wake_all()
        if self._observer is not None:
            self._observer.on_end(stream)
        if stream.started:
            stream._expiry = asyncio.get_running_loop().call_later(
                self.limits.resume_ttl_s, self._forget, stream
            )
        else:
            self._forget(stream)  # it was turned away: the same request may come again

    def _forget(self, stream: ServedStream) -> None:
        if self._streams.pop(stream.id, None) is not None:
            if stream._expiry is not None:
                stream._expiry.cancel()  # or the timer would hold the log until it is due
            del self._requests[stream.client, stream.request_id]
            self._retained_tokens -= stream.max_new_tokens


def _prompt_of(request: Generate) -> Prompt:
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise InvalidRequest("the prompt mixes token ids and chat messages; send one or the other")
    return prompt  # type: ignore[return-value]  # all ints or all messages, as just checked
