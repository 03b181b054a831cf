"""StreamRegistry: starts the streams of a server and finds them again. Knows no transport.

A stream outlives the connections that read it. Its session is always drained into its log, so a
reader that does not read holds nothing up, and the log is kept for a while after the stream's end,
so that whoever lost a connection can read on.

A request passes two places where clients take turns: its prompt is read, off the event loop, and it
enters the engine. So what one client asks for is no other client's wait.
"""

import asyncio
import logging
from typing import Final

import msgspec

from d2f_stream.core.errors import D2FError, RequestConflict, ServerShuttingDown
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
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.admission import Admission, Measured, PromptReader, measured
from d2f_stream.server.streams.observer import StreamObserver
from d2f_stream.server.streams.served_stream import ServedStream, digest_of
from d2f_stream.server.streams.shelf import Shelf
from d2f_stream.server.streams.turns import FairTurns
from d2f_stream.wire.protocol import Generate, ModelCard, ModelDefaults, check_request_id

__all__ = ["StreamRegistry"]

logger = logging.getLogger("d2f_stream.server")


GRACE_S: Final = 5.0
MAX_READING: Final = 2
"""Prompts that are read at once, each of another client."""
MAX_ENTERING: Final = 8
"""Streams in the engine that have no slot yet: it takes them in order of arrival."""


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
        self._shelf = Shelf(self.limits)
        self._admission = Admission(self.limits)
        self._pumps: dict[asyncio.Task[D2FError | None], ServedStream] = {}
        self._admits = True
        self.paused = False
        self.num_abandoned = 0
        self._reading = FairTurns(most=MAX_READING, most_per_client=1)
        self._running = FairTurns(
            most=self.limits.max_running, most_per_client=self.limits.running_share
        )
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
        return len(self._shelf)

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
            known = self._shelf.of_request(request.request_id, client=client)
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
        stream = self._shelf.find(stream_id, client=client)
        if self._observer is not None:
            self._observer.on_resume(stream)
        return stream

    def cancel(self, name: str, *, client: str) -> None:
        """End the client's stream of that id or request id. Idempotent.

        Raises:
            StreamLost: there is none.
        """
        stream = self._shelf.of_request(name, client=client)
        (stream or self._shelf.find(name, client=client)).cancel()

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

    def _start(self, request: Generate, client: str, asker: str, clamp: bool) -> ServedStream:
        if not self._admits:
            raise ServerShuttingDown("the server is shutting down; try again later")
        asked = measured(request, self.engine, self.limits, clamp=clamp)
        self._admission.admit(client, asked.charge, now_s=asyncio.get_running_loop().time())
        stream = ServedStream(request, client=client, asker=asker, charge=asked.charge)
        self._shelf.add(stream)
        if self._observer is not None:
            self._observer.on_start(stream)
        pump = asyncio.create_task(self._run(stream, asked), name=f"d2f-pump-{stream.id}")
        stream.wait(pump.cancel)
        self._pumps[pump] = stream
        pump.add_done_callback(self._note_end)
        return stream

    async def _run(self, stream: ServedStream, asked: Measured) -> D2FError | None:
        """Run a stream from its prompt to its end; return why it was turned away, if it was."""
        prompt, overrides = asked.prompt, asked.overrides
        try:
            if isinstance(self.engine, PromptReader):
                async with self._reading.turn(stream.asker):
                    prompt = await self.engine.encode(prompt)
                max_len = self.engine.info.max_len
                overrides = asked.fitted(len(prompt), limits=self.limits, max_len=max_len)
            async with self._running.turn(stream.asker):
                await self._pump(stream, prompt, overrides)
        except D2FError as error:
            return error
        return None

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
        self._admission.release(stream.client, stream.charge)
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
            self._shelf.retain(stream)
        else:
            self._shelf.forget(stream)  # it was turned away: the same request may come again

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
