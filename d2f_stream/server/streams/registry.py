"""StreamRegistry: starts the streams of a server and finds them again. Knows no transport.

A stream outlives the connections that read it. Its session is always drained into its log, so a
reader that does not read holds nothing up, and the log is kept for a while after the stream's end,
so that whoever lost a connection can read on.

A request passes two places where clients take turns: its prompt is read, off the event loop, and it
enters the engine. So what one client asks for is no other client's wait.
"""

import asyncio
import logging
from typing import Final, Protocol, runtime_checkable

import msgspec

from d2f_stream.core.errors import (
    D2FError,
    InvalidRequest,
    MessageTooLarge,
    PromptTooLong,
    RequestConflict,
    ServerShuttingDown,
    StreamLost,
    TooManyStreams,
)
from d2f_stream.core.events import (
    Event,
    StreamFinished,
    StreamNames,
    StreamStarted,
    Timings,
    Usage,
)
from d2f_stream.core.params import ParamOverrides
from d2f_stream.core.session import Engine, Prompt
from d2f_stream.server.limits import RateLimit, ServeLimits
from d2f_stream.server.streams.served_stream import ServedStream, digest_of
from d2f_stream.server.streams.turns import FairTurns
from d2f_stream.wire.protocol import Generate, ModelCard, ModelDefaults, check_request_id

__all__ = ["StreamObserver", "StreamRegistry"]

logger = logging.getLogger("d2f_stream.server")


GRACE_S: Final = 5.0
MAX_READING: Final = 2
"""Prompts that are read at once, each of another client."""
MAX_ENTERING: Final = 8
"""Streams in the engine that have no slot yet: it takes them in order of arrival."""


@runtime_checkable
class PromptReader(Protocol):
    """An engine that reads prompts off the event loop."""

    def check_size(self, prompt: Prompt) -> None:
        """Refuse a prompt that is too long at first sight."""
        ...

    async def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids, which generate() takes for it. Safe to cancel."""
        ...


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

    Attributes:
        paused: whether requests wait until the engine is back.
        num_abandoned: streams that the engine did not end in time when the registry shut down.
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
        self._ended: dict[str, _Ended] = {}  # by client
        self._running_tokens = 0
        self._admits = True
        self.paused = False
        self.num_abandoned = 0
        most, share = self.limits.max_running, self.limits.max_running_per_client
        share = max(1, most * 3 // 4) if share is None else share
        self._reading = FairTurns(most=MAX_READING, most_per_client=1)
        self._running = FairTurns(most=most, most_per_client=share)
        self._entering = FairTurns(most=MAX_ENTERING, most_per_client=MAX_ENTERING)

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
    def num_waiting(self) -> int:
        """Of those, the ones that wait for their turn."""
        return sum(t.num_waiting for t in (self._reading, self._running, self._entering))

    @property
    def num_retained(self) -> int:
        """Streams that can be read, those that ended included."""
        return len(self._streams)

    @property
    def admits(self) -> bool:
        """Whether new requests are taken on."""
        return self._admits

    def generate(
        self, request: Generate, *, client: str, asker: str | None = None, clamp: bool = False
    ) -> ServedStream:
        """Start a stream, or return the one that this request started before.

        What is wrong with the prompt shows later, as the stream's `error`.

        Args:
            request: what is asked.
            client: whose stream it is.
            asker: who takes turns with others; None is the client.
            clamp: whether an answer is shortened, not refused, where the model has no room for its
                length. One whose length the request leaves open always is.

        Raises:
            RequestConflict: the request id stands for another request.
            D2FError: the request is refused; nothing was started.
        """
        try:
            check_request_id(request.request_id)
            known = self._requests.get((client, request.request_id))
            if known is not None:
                if known.digest != digest_of(request):
                    raise RequestConflict(
                        f"request_id {request.request_id!r} stands for another request of yours; "
                        "take a new one for each request"
                    )
                if self._observer is not None:
                    self._observer.on_resume(known)
                return known
            return self._start(request, client, asker or client, clamp)
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

    def pause(self) -> None:
        """Let requests wait, those that come and those that wait already. Idempotent."""
        self.paused = True
        self._reading.pause()
        self._running.pause()

    def go_on(self) -> None:
        """Serve the requests that wait. Idempotent."""
        self.paused = False
        self._reading.go_on()
        self._running.go_on()

    async def shut_down(self, deadline_s: float, *, grace_s: float = GRACE_S) -> None:
        """Refuse new requests, let the streams end, and cancel what is left at the deadline.

        Safe to cancel; the streams still running are then cancelled by closing the engine.

        Args:
            deadline_s: how long streams may run on, seconds.
            grace_s: how long the engine may take to cancel them; those that it does not, since a
                step hangs, are let go.
        """
        self._admits = False
        if self._pumps:
            await asyncio.wait(self._pumps, timeout=deadline_s)
        for stream in list(self._pumps.values()):
            stream.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps, timeout=grace_s)
        self.num_abandoned += len(self._pumps)
        for pump in list(self._pumps):
            pump.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps)

    def _find(self, stream_id: str, client: str) -> ServedStream:
        stream = self._streams.get(stream_id)
        if stream is None or stream.client != client:
            kept = f"streams are kept for {self.limits.resume_ttl_s:g} s after their end"
            raise StreamLost(f"there is no stream {stream_id[:64]!r}; {kept}")
        return stream

    def _start(self, request: Generate, client: str, asker: str, clamp: bool) -> ServedStream:
        if not self._admits:
            raise ServerShuttingDown("the server is shutting down; try again later")
        overrides = request.params.to_dict()
        is_open = "max_new_tokens" not in overrides
        params = self.engine.defaults.with_overrides(overrides)
        limit = self.limits.max_new_tokens
        if limit is not None and params.max_new_tokens > limit:
            if not is_open:
                raise MessageTooLarge(
                    f"max_new_tokens is {params.max_new_tokens} but this server allows {limit}"
                )
            overrides["max_new_tokens"] = limit
        clamp = clamp or is_open
        max_len = self.engine.info.max_len
        if not clamp and params.max_new_tokens > max_len:
            raise PromptTooLong(1, params.max_new_tokens, max_len, at_least=True)
        most = min(params.max_new_tokens, limit or params.max_new_tokens)
        if clamp:
            most = min(most, max_len)
        prompt = _prompt_of(request)
        if isinstance(self.engine, PromptReader):
            self.engine.check_size(prompt)
        charge = most + _size_of(prompt)
        self._check_room(client, charge)
        self._rate.take(client, asyncio.get_running_loop().time())
        stream = ServedStream(request, client=client, asker=asker, charge=charge)
        self._streams[stream.id] = stream
        self._requests[client, stream.request_id] = stream
        self._running_tokens += stream.charge
        if self._observer is not None:
            self._observer.on_start(stream)
        work = self._run(stream, prompt, overrides, clamp)
        pump = asyncio.create_task(work, name=f"d2f-pump-{stream.id}")
        stream.wait(pump.cancel)
        self._pumps[pump] = stream
        pump.add_done_callback(self._note_end)
        return stream

    def _check_room(self, client: str, charge: int) -> None:
        """Refuse a request that there is no room for.

        Raises:
            TooManyStreams: names the limit.
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
        if self._running_tokens + charge > limits.max_running_tokens:
            raise TooManyStreams(
                f"the running streams may take {limits.max_running_tokens} tokens in all; "
                "try again later, or lower max_new_tokens"
            )

    async def _run(
        self, stream: ServedStream, prompt: Prompt, overrides: ParamOverrides, clamp: bool
    ) -> D2FError | None:
        """Run a stream from its prompt to its end; return why it was turned away, if it was."""
        try:
            if isinstance(self.engine, PromptReader):
                async with self._reading.turn(stream.asker):
                    prompt = await self.engine.encode(prompt)
                overrides = self._fitted(overrides, len(prompt), clamp)
            async with self._running.turn(stream.asker):
                await self._pump(stream, prompt, overrides)
        except D2FError as error:
            return error
        return None

    def _fitted(self, overrides: ParamOverrides, num_tokens: int, clamp: bool) -> ParamOverrides:
        """Return the parameters with an answer that fits behind the prompt, where that may be."""
        limit = self.limits.max_prompt_tokens
        if limit is not None and num_tokens > limit:
            raise MessageTooLarge.of_prompt(num_tokens, limit)
        room = self.engine.info.max_len - num_tokens
        if not clamp or overrides.get("max_new_tokens", 0) <= room:
            return overrides  # the engine fits what was left open
        if room < 1:
            raise PromptTooLong(num_tokens, 1, self.engine.info.max_len)
        return {**overrides, "max_new_tokens": room}

    async def _pump(self, stream: ServedStream, prompt: Prompt, overrides: ParamOverrides) -> None:
        """Drain a session into its stream's log."""
        await self._entering.take(stream.asker)
        enters = True
        try:
            names = StreamNames(stream.id, stream.request_id, stream.client)
            session = self.engine.generate(prompt, names=names, **overrides)
            stream.begin(session)
            async for event in session.events():
                if enters:
                    enters = False
                    self._entering.give_back(stream.asker)
                self._put(stream, event)
        finally:
            if enters:
                self._entering.give_back(stream.asker)

    def _put(self, stream: ServedStream, event: Event) -> None:
        stream.append(event)
        if self._observer is not None:
            self._observer.on_event(stream, event)

    def _note_end(self, pump: "asyncio.Task[D2FError | None]") -> None:
        stream = self._pumps.pop(pump)
        self._running_tokens -= stream.charge
        if pump.cancelled() and stream.withdrawn:  # by its client, while it waited
            for event in self._unrun(stream):
                self._put(stream, event)
            stream.end()
        elif pump.cancelled():
            stream.end(ServerShuttingDown("the server was shut down"))
        elif (broken := pump.exception()) is not None:
            logger.error("stream %s lost its events", stream.id, exc_info=broken)
            stream.end(D2FError("an error inside the server; its log has more"))
        else:
            stream.end(pump.result())
        if self._observer is not None:
            self._observer.on_end(stream)
        if stream.started:
            self._retain(stream)
            self._expiries[stream.id] = asyncio.get_running_loop().call_later(
                self.limits.resume_ttl_s, self._forget, stream
            )
        else:
            self._forget(stream)  # it was turned away: the same request may come again

    def _unrun(self, stream: ServedStream) -> tuple[StreamStarted, StreamFinished]:
        """Return the events of a stream that was cancelled while it waited.

        It begins like any other: only that tells its client which request it is of.
        """
        started = StreamStarted(
            stream=stream.id,
            seq=0,
            request_id=stream.request_id,
            model=self.engine.info.name,
            block_size=self.engine.defaults.block_size,
            prompt_tokens=0,
        )
        finished = StreamFinished(
            stream=stream.id,
            seq=1,
            reason="cancelled",
            text_length=0,
            usage=Usage(prompt_tokens=0, completion_tokens=0, steps=0),
            timings=Timings(first_block_ms=None, total_ms=0.0),
        )
        return started, finished

    def _retain(self, stream: ServedStream) -> None:
        """Keep an ended stream, and forget old ones of whoever has most where all take too much."""
        self._ended.setdefault(stream.client, _Ended()).add(stream)
        limit = self.limits.max_retained_bytes
        while sum(ended.num_bytes for ended in self._ended.values()) > limit:
            most = max(self._ended.values(), key=lambda ended: ended.num_bytes)
            self._forget(next(iter(most.streams)))

    def _forget(self, stream: ServedStream) -> None:
        if (ended := self._ended.get(stream.client)) is not None:
            ended.discard(stream)
            if not ended.streams:
                del self._ended[stream.client]
        if (expiry := self._expiries.pop(stream.id, None)) is not None:
            expiry.cancel()  # or the timer would hold the log until it is due
        if self._streams.pop(stream.id, None) is not None:
            del self._requests[stream.client, stream.request_id]


class _Ended:
    """The streams of one client that have ended and are kept, the oldest first."""

    def __init__(self) -> None:
        self.streams: dict[ServedStream, int] = {}
        self.num_bytes = 0

    def add(self, stream: ServedStream) -> None:
        self.streams[stream] = num_bytes = stream.num_bytes
        self.num_bytes += num_bytes

    def discard(self, stream: ServedStream) -> None:
        self.num_bytes -= self.streams.pop(stream, 0)


def _size_of(prompt: Prompt) -> int:
    """Return about how many tokens a prompt has."""
    if isinstance(prompt, str):
        return len(prompt) // 4
    return sum(1 if isinstance(item, int) else len(item.get("content", "")) // 4 for item in prompt)


def _prompt_of(request: Generate) -> Prompt:
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise InvalidRequest("the prompt mixes token ids and chat messages; send one or the other")
    return prompt  # type: ignore[return-value]  # all ints or all messages, as just checked
