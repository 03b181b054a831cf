"""Runs: the streams that a server works for, each brought from its prompt to its end.

A stream passes two places where clients take turns: its prompt is read, off the event loop, and it
enters the engine. So what one client asks for is no other client's wait.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Final

from d2f_stream.core.errors import D2FError, LogUnavailable, ServerShuttingDown
from d2f_stream.core.events import Block, Event, StreamFinished, StreamNames
from d2f_stream.core.session import Engine
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.admission import Admission, Measured, PromptReader
from d2f_stream.server.streams.endings import cancelled, failed
from d2f_stream.server.streams.log import LoggingEngine, OtherModel, StreamLog, diverged, model_of
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
        self._handed_over: set[ServedStream] = set()
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
        stream.is_attended = True
        stream.charge = asked.charge
        if self._observer is not None:
            self._observer.on_start(stream)
            stream.observe = self._observer.on_event
        stream.wait(_begin_nothing)
        pump = asyncio.create_task(self._run(stream, asked), name=f"d2f-pump-{stream.id}")
        self._pumps[pump] = stream
        pump.add_done_callback(self._note_end)

    def take_over(self, stream: ServedStream, asked: Measured) -> None:
        """Have a stream worked on that was admitted elsewhere."""
        self._admission.take_over(stream.client, asked.charge)
        self.begin(stream, asked)

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
        """Let the streams end, and give up what is left at the deadline. Safe to cancel.

        That is cancelled or, where the log outlives this process and a reader may come back, left
        to others from the last block on.

        Args:
            deadline_s: how long streams may run on, seconds.
            grace_s: how long the engine may take to cancel them.
        """
        if self._pumps:
            await asyncio.wait(self._pumps, timeout=deadline_s)
        for pump, stream in list(self._pumps.items()):
            if not self._log.outlives or stream.cancels_on_disconnect:
                stream.cancel()
            elif stream.works_here:
                self._handed_over.add(stream)
                stream.cancel()
            else:
                pump.cancel()
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
            try:
                if not stream.withdrawn:  # by its client, before this began
                    stream.wait(pump.cancel)
                    await self._answer(stream, asked)
            except asyncio.CancelledError:
                if not stream.withdrawn:
                    raise
                pump.uncancel()
            except (LogUnavailable, OtherModel):
                raise  # others may go on with it
            except D2FError as error:
                if not stream.started or stream.has_terminal:
                    raise
                told = error  # outlives this clause
                await self._append(stream, lambda: (failed(stream, told),))
            if stream.withdrawn:
                await self._append(stream, lambda: cancelled(stream, self._engine))
        except D2FError as error:
            return error
        return None

    async def _answer(self, stream: ServedStream, asked: Measured) -> None:
        if isinstance(self._engine, PromptReader) and not isinstance(self._engine, LoggingEngine):
            async with self._reading.turn(stream.asker):
                prompt = await self._engine.encode(asked.prompt, raw=asked.raw)
            overrides = asked.fitted(
                len(prompt),
                max_prompt_tokens=self._limits.max_prompt_tokens,
                max_len=self._engine.info.max_len,
            )
            asked = replace(asked, prompt=prompt, overrides=overrides)
        async with self._running.turn(stream.asker):
            while not await self._work(stream, asked):
                await self._log.wait_free(stream)  # another has it

    async def _work(self, stream: ServedStream, asked: Measured) -> bool:
        """Bring a stream to its end; False where another worker has it."""
        if isinstance(self._engine, LoggingEngine):
            return await self._work_elsewhere(self._engine, stream, asked)
        await self._entering.take(stream.asker)
        enters = True
        try:
            work = await self._log.work(stream.id, model=model_of(self._engine))
            if work is None:
                return stream.has_terminal
            async with work:
                blocks = [event for event in work.events if isinstance(event, Block)]
                names = StreamNames(stream.id, stream.request_id, stream.client)
                session = self._engine.generate(
                    asked.prompt, names=names, committed=blocks, raw=asked.raw, **asked.overrides
                )
                try:
                    work.on_cancel(session.cancel)
                    async for event in session.events():
                        if enters:
                            enters = False
                            self._entering.give_back(stream.asker)
                        if stream in self._handed_over and isinstance(event, StreamFinished):
                            return True
                        if not await work.append(event):
                            if work.is_lost:
                                return False
                            raise diverged(event)
                finally:
                    session.cancel()  # waits for nothing: a step may hang
        finally:
            if enters:
                self._entering.give_back(stream.asker)
        return True

    async def _work_elsewhere(
        self, engine: LoggingEngine, stream: ServedStream, asked: Measured
    ) -> bool:
        pump = asyncio.current_task()
        assert pump is not None
        stream.leave(pump.cancel)
        await self._log.follow(stream)
        names = StreamNames(stream.id, stream.request_id, stream.client)
        await engine.work(
            names,
            asked,
            max_prompt_tokens=self._limits.max_prompt_tokens,
            is_deserted=partial(self._is_deserted, stream),
        )
        return stream.has_terminal or stream.ended

    async def _is_deserted(self, stream: ServedStream) -> bool:
        await self._log.wait_free(stream, is_given=True)
        return not (stream.has_terminal or stream.ended)

    async def _append(self, stream: ServedStream, events: Callable[[], Iterable[Event]]) -> None:
        """Append what no engine says, unless a worker that the stream has ends it."""
        while (work := await self._log.work(stream.id)) is None:
            if stream.has_terminal:
                return
            await self._log.wait_free(stream)
        async with work:
            for event in events():
                await work.append(event)

    def _note_end(self, pump: "asyncio.Task[D2FError | None]") -> None:
        stream = self._pumps.pop(pump)
        self._admission.release(stream.client, stream.charge)
        is_left = stream in self._handed_over and not stream.has_terminal
        self._handed_over.discard(stream)
        if self._log.outlives and (is_left or pump.cancelled()):
            if self._observer is not None:
                self._observer.on_end(stream)
            return  # its readers go on elsewhere
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


def _begin_nothing() -> None:
    """Cancel a stream that nobody works for yet: who would begin with it sees that."""
