"""Runs: the streams that a server works for, each brought from its prompt to its end.

A stream passes two places where clients take turns: its prompt is read, off the event loop, and it
enters the engine. So what one client asks for is no other client's wait.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

from d2f_stream.core.errors import D2FError, ServerShuttingDown
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
from d2f_stream.server.streams.admission import Admission, Measured, PromptReader
from d2f_stream.server.streams.log import StreamLog
from d2f_stream.server.streams.observer import StreamObserver
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.server.streams.turns import FairTurns

__all__ = ["Runs"]

logger = logging.getLogger("d2f_stream.server")

MAX_READING: Final = 2
"""Prompts that are read at once, each of another client."""
MAX_ENTERING: Final = 8
"""Streams in the engine that have no slot yet: it takes them in order of arrival."""


class Runs:
    """Brings streams to their ends. Belongs to one event loop.

    Args:
        engine: open; what answers.
        log: keeps the streams.
        admission: has charged each stream; is told of its end.
        limits: what runs at once.
        observer: is told of everything.

    Attributes:
        paused: whether streams wait until the engine is back.
        num_abandoned: streams that the engine did not end in time.
    """

    def __init__(
        self,
        engine: Engine,
        log: StreamLog,
        admission: Admission,
        limits: ServeLimits,
        observer: StreamObserver | None,
    ) -> None:
        self._engine = engine
        self._log = log
        self._admission = admission
        self._limits = limits
        self._observer = observer
        self._pumps: dict[asyncio.Task[D2FError | None], ServedStream] = {}
        self._reading = FairTurns(most=MAX_READING, most_per_client=1)
        self._running = FairTurns(most=limits.max_running, most_per_client=limits.running_share)
        self._entering = FairTurns(most=MAX_ENTERING, most_per_client=MAX_ENTERING)
        self.paused = False
        self.num_abandoned = 0

    def __len__(self) -> int:
        return len(self._pumps)

    @property
    def num_waiting(self) -> int:
        """Streams that wait for their turn."""
        return sum(t.num_waiting for t in (self._reading, self._running, self._entering))

    def begin(self, stream: ServedStream, asked: Measured) -> None:
        """Have an admitted stream worked on."""
        stream.charge = asked.charge
        if self._observer is not None:
            self._observer.on_start(stream)
            stream.observe = self._observer.on_event
        stream.wait(_begin_nothing)
        pump = asyncio.create_task(self._run(stream, asked), name=f"d2f-pump-{stream.id}")
        self._pumps[pump] = stream
        pump.add_done_callback(self._note_end)

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

    async def end(self, deadline_s: float, *, grace_s: float) -> None:
        """Let the streams end, and cancel what is left at the deadline. Safe to cancel.

        Args:
            deadline_s: how long streams may run on, seconds.
            grace_s: how long the engine may take to cancel them.
        """
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

    async def _run(self, stream: ServedStream, asked: Measured) -> D2FError | None:
        """Run a stream from its prompt to its end; return why it was turned away, if it was."""
        pump = asyncio.current_task()
        assert pump is not None
        try:
            if not stream.withdrawn:  # by its client, before this began
                stream.wait(pump.cancel)
                await self._answer(stream, asked)
        except asyncio.CancelledError:
            if not stream.withdrawn:
                raise
            pump.uncancel()
        except D2FError as error:
            return error
        if stream.withdrawn:
            await self._append(stream, self._unrun(stream))
        return None

    async def _answer(self, stream: ServedStream, asked: Measured) -> None:
        prompt, overrides = asked.prompt, asked.overrides
        if isinstance(self._engine, PromptReader):
            async with self._reading.turn(stream.asker):
                prompt = await self._engine.encode(prompt, raw=asked.raw)
            max_len = self._engine.info.max_len
            overrides = asked.fitted(len(prompt), limits=self._limits, max_len=max_len)
        async with self._running.turn(stream.asker):
            await self._pump(stream, prompt, overrides, raw=asked.raw)

    async def _pump(
        self, stream: ServedStream, prompt: Prompt, overrides: ParamOverrides, *, raw: bool
    ) -> None:
        """Drain a session into its stream's log."""
        await self._entering.take(stream.asker)
        enters = True
        try:
            work = await self._log.work(stream.id)
            assert work is not None
            async with work:
                names = StreamNames(stream.id, stream.request_id, stream.client)
                session = self._engine.generate(prompt, names=names, raw=raw, **overrides)
                work.on_cancel(session.cancel)
                async for event in session.events():
                    if enters:
                        enters = False
                        self._entering.give_back(stream.asker)
                    await work.append(event)
        finally:
            if enters:
                self._entering.give_back(stream.asker)

    async def _append(self, stream: ServedStream, events: Iterable[Event]) -> None:
        """Append what no engine says, where the stream has no worker."""
        work = await self._log.work(stream.id)
        if work is not None:
            async with work:
                for event in events:
                    await work.append(event)

    def _note_end(self, pump: "asyncio.Task[D2FError | None]") -> None:
        stream = self._pumps.pop(pump)
        self._admission.release(stream.client, stream.charge)
        if pump.cancelled():
            stream.end(ServerShuttingDown("the server was shut down"))
        elif (broken := pump.exception()) is not None:
            logger.error("stream %s lost its events", stream.id, exc_info=broken)
            stream.end(D2FError("an error inside the server; its log has more"))
        else:
            stream.end(pump.result())
        if self._observer is not None:
            self._observer.on_end(stream)
        if stream.started:
            self._log.retain(stream)
        else:
            self._log.forget(stream)  # it was turned away: the same request may come again

    def _unrun(self, stream: ServedStream) -> tuple[StreamStarted, StreamFinished]:
        """Return the events of a stream that was cancelled while it waited.

        It begins like any other: only that tells its client which request it is of.
        """
        started = StreamStarted(
            stream=stream.id,
            seq=0,
            request_id=stream.request_id,
            model=self._engine.info.name,
            block_size=self._engine.defaults.block_size,
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


def _begin_nothing() -> None:
    """Cancel a stream that nobody works for yet: who would begin with it sees that."""
