"""StreamRegistry: starts the streams of a server and finds them again. Knows no transport.

A stream outlives the connections that read it. Its session is always drained into its log, so a
reader that does not read holds nothing up, and the log is kept for a while after the stream's end,
so that whoever lost a connection can read on.
"""

import asyncio
import logging
from typing import Protocol

import msgspec

from d2f_stream.core.errors import (
    D2FError,
    InvalidRequest,
    MessageTooLarge,
    ServerShuttingDown,
    StreamLost,
    TooManyStreams,
)
from d2f_stream.core.events import Event, StreamNames
from d2f_stream.core.session import Engine, Prompt, Session
from d2f_stream.server.limits import RateLimit, ServeLimits
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.protocol import Generate, ModelCard, ModelDefaults, check_request_id

__all__ = ["StreamObserver", "StreamRegistry"]

logger = logging.getLogger("d2f_stream.server")


class StreamObserver(Protocol):
    """Is told what happens to the streams; for metrics. Called on the event loop; must not wait."""

    def on_start(self, stream: ServedStream) -> None:
        """A request was taken on; its stream waits or runs."""
        ...

    def on_event(self, stream: ServedStream, event: Event) -> None:
        """The stream had an event."""
        ...

    def on_end(self, stream: ServedStream) -> None:
        """The stream ended, or was turned away: `stream.error`."""
        ...

    def on_resume(self, stream: ServedStream) -> None:
        """A reader came back to the stream."""
        ...

    def on_refused(self, error: D2FError) -> None:
        """A request was refused before it had a stream."""
        ...


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
        self._pumps: dict[asyncio.Task[D2FError | None], ServedStream] = {}
        self._expiries: dict[str, asyncio.TimerHandle] = {}  # by stream id
        self._retained_tokens = 0
        self._admits = True

    @property
    def card(self) -> ModelCard:
        """What is told of the engine's model."""
        defaults = ModelDefaults(**msgspec.structs.asdict(self.engine.defaults))
        names = set(ModelCard.__struct_fields__) - {"defaults"}
        told = {name: getattr(self.engine.info, name) for name in names}
        return ModelCard(defaults=defaults, **told)

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
        # Not the parameters as a whole: what a request leaves open may yield to what must fit.
        names = StreamNames(stream.id, stream.request_id)
        session = self.engine.generate(_prompt_of(request), names=names, **overrides)
        stream.begin(session)
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

    async def _pump(self, stream: ServedStream, session: Session) -> D2FError | None:
        """Drain a session into its stream's log; return why it was turned away, if it was."""
        try:
            async for event in session.events():
                stream.put(event)
                if self._observer is not None:
                    self._observer.on_event(stream, event)
        except D2FError as error:
            return error
        return None

    def _note_end(self, pump: "asyncio.Task[D2FError | None]") -> None:
        stream = self._pumps.pop(pump)
        if pump.cancelled():
            stream.end(ServerShuttingDown("the server was shut down"))
        elif (broken := pump.exception()) is not None:
            logger.error("stream %s lost its events", stream.id, exc_info=broken)
            stream.end(D2FError(f"the stream failed: {broken!r}"))
        else:
            stream.end(pump.result())
        if self._observer is not None:
            self._observer.on_end(stream)
        if stream.started:
            self._expiries[stream.id] = asyncio.get_running_loop().call_later(
                self.limits.resume_ttl_s, self._forget, stream
            )
        else:
            self._forget(stream)  # it was turned away: the same request may come again

    def _forget(self, stream: ServedStream) -> None:
        if (expiry := self._expiries.pop(stream.id, None)) is not None:
            expiry.cancel()  # or the timer would hold the log until it is due
        if self._streams.pop(stream.id, None) is not None:
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
