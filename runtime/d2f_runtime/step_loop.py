"""StepLoop: the one task that runs an engine's steps.

Owns the streams and their slots; admits, steps, applies and ends them, in that order, once around
for each step. Everything happens on the event loop except the calls named `do_*`, which go to the
model's device thread. The task lives while there are streams, so an idle engine leaves nothing
behind on its event loop.

The task is never cancelled by its engine: a cancelled await returns while the device thread still
writes K/V, and freeing that would be a use after free. Where it is cancelled from outside, as
asyncio.run does at its end, it lets the call in flight finish, frees its slots, ends its streams,
and only then lets the cancellation through.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d2f_runtime.backends.base import StepRow
from d2f_runtime.loaded_model import MODELS, LoadedModel, ModelParts
from d2f_runtime.scheduler import Scheduler
from d2f_runtime.stream import Stream, StreamId, cancelled_unstarted
from d2f_stream.buffer import EventBuffer
from d2f_stream.errors import D2FError, EngineClosed, EngineFailed, OutOfCapacity

__all__ = ["EngineLoad", "Limits", "StepLoop", "StepObserver"]

logger = logging.getLogger("d2f_stream.engine")

Prepare = Callable[[ModelParts], Stream]
StepObserver = Callable[[float, int], None]
"""Is given a step's wall time, seconds, and how many rows it had."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an engine takes on at once; the backend's own storage may bound it further.

    Attributes:
        max_sessions: sessions that hold a slot.
        max_tokens: tokens that all slots together have room for.
        max_rows: sessions that share a step.
        max_step_tokens: window tokens that a step aims for.
        max_prompt_tokens: of one request; None leaves it to the model.
    """

    max_sessions: int = 32
    max_tokens: int = 2**31
    max_rows: int = 16
    max_step_tokens: int = 1024
    max_prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine does at one moment.

    Attributes:
        num_running: sessions that hold a slot.
        num_waiting: sessions in the queue.
        kv_tokens: tokens that the open slots have room for.
    """

    num_running: int
    num_waiting: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class _Request:
    """What came while the model was loading."""

    prepare: Prepare
    buffer: EventBuffer


class StepLoop:
    """Runs the streams of one engine on one event loop.

    Attributes:
        parts: of the model, once it is loaded.
        failure: why nothing is accepted any more, if something broke.
        limits: how much it takes on at once.
        observers: called after each step.
    """

    def __init__(self, model: LoadedModel, limits: Limits) -> None:
        self.parts: ModelParts | None = None
        self.failure: D2FError | None = None
        self.limits = limits
        self.observers: list[StepObserver] = []
        self._model = model
        self._scheduler: Scheduler[StreamId] = Scheduler(
            max_sessions=limits.max_sessions,
            capacity_tokens=limits.max_tokens,
            max_rows=limits.max_rows,
            max_step_tokens=limits.max_step_tokens,
        )
        self._requests: dict[StreamId, _Request] = {}
        self._streams: dict[StreamId, Stream] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._closing = False

    @property
    def current_load(self) -> EngineLoad:
        """What the loop does at this moment; requests that wait for the model are in the queue."""
        scheduler = self._scheduler
        return EngineLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._requests),
            kv_tokens=sum(s.capacity for s in self._streams.values() if s.slot is not None),
        )

    async def load(self) -> ModelParts:
        """Load the model. Safe to cancel; loading goes on.

        Raises:
            D2FError: it cannot be loaded.
        """
        if self.parts is None:
            self.parts = await self._model.device.call(self._model.do_load)
        return self.parts

    def submit(self, stream_id: StreamId, prepare: Prepare, buffer: EventBuffer) -> None:
        """Take a request on.

        Raises:
            D2FError: the request is refused; while the model is loading, `buffer` gets that.
        """
        if self.parts is None:
            self._requests[stream_id] = _Request(prepare, buffer)
        else:
            self._add(prepare(self.parts))
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name=f"d2f-steps-{self._model.name}")

    def cancel(self, stream_id: StreamId) -> None:
        """End a stream; its slot is closed before the next step."""
        stream = self._streams.get(stream_id)
        request = self._requests.pop(stream_id, None)
        if stream is not None and stream.outcome is None:
            stream.outcome = "cancelled"
        if request is not None:
            request.buffer.put(cancelled_unstarted(stream_id))
        self._wake.set()

    def pause(self, stream_id: StreamId) -> None:
        """Run no steps for the stream."""
        if stream_id in self._streams:
            self._scheduler.pause(stream_id)

    def resume(self, stream_id: StreamId) -> None:
        """Run steps for the stream again."""
        if stream_id in self._streams:
            self._scheduler.resume(stream_id)
            self._wake.set()

    def close(self, then: Callable[[], None]) -> None:
        """End all streams after the call in flight; `then` is called when the task is gone."""
        self._closing = True
        self._wake.set()
        self._reject_requests(EngineClosed("the engine was closed"))
        if self._task is None or self._task.done():
            then()
        else:
            self._task.add_done_callback(lambda _: then())

    async def _run(self) -> None:
        try:
            await self._serve()
        except asyncio.CancelledError:
            await self._end_all(EngineClosed("the engine's event loop was shut down"))
            raise
        except Exception as error:
            self._note_failure(error)
            assert self.failure is not None
            await self._end_all(self.failure)

    async def _serve(self) -> None:
        parts = await self.load()
        self._take_requests(parts)
        while self._streams:
            self._wake.clear()
            if self._closing:
                for stream in self._streams.values():
                    stream.outcome = stream.outcome or EngineClosed("the engine was closed")
            if ended := [s for s in self._streams.values() if s.outcome is not None]:
                await self._retire(ended)
            if self._streams and not await self._step():
                await self._wake.wait()

    async def _step(self) -> bool:
        """Admit, and run one step; False if nothing can run before something changes."""
        batch = self._scheduler.next_batch()
        if batch.admit:
            await self._admit([self._streams[stream_id] for stream_id in batch.admit])
        rows: list[StepRow] = []
        shares: list[tuple[Stream, slice]] = []
        for stream_id, max_active_blocks in batch.run:
            stream = self._streams[stream_id]
            if stream.slot is not None and stream.outcome is None:
                first = len(rows)
                try:
                    rows += stream.rows(stream.slot, max_active_blocks)
                except Exception as error:
                    _end_alone(stream, error)
                else:
                    shares.append((stream, slice(first, len(rows))))
        if not rows:
            # Where only other engines hold slots, their end wakes this one.
            return bool(batch.run) and self._scheduler.num_running > 0
        began = time.perf_counter()
        proposals = await self._model.device.call(self._model.do_step, rows)
        for observe in self.observers:
            observe(time.perf_counter() - began, len(rows))
        if len(proposals) != len(rows):
            raise RuntimeError(f"the backend answered {len(rows)} rows with {len(proposals)}")
        for stream, share in shares:
            if stream.outcome is None:
                try:
                    stream.apply(proposals[share])
                except Exception as error:
                    _end_alone(stream, error)
        return True

    async def _admit(self, streams: Sequence[Stream]) -> None:
        """Open slots in order of arrival, as far as there is room."""
        model = self._model
        for number, stream in enumerate(streams):
            try:
                slot = await model.device.call(
                    model.do_open_slot, self, stream.capacity, _waker(self._wake)
                )
            except OutOfCapacity as error:  # and nothing to wait for
                stream.outcome = stream.outcome or error
                continue
            if slot is None:
                for waiting in reversed(streams[number:]):
                    self._scheduler.requeue(waiting.id)
                return
            stream.slot = slot
            stream.start()

    async def _retire(self, ended: Sequence[Stream]) -> None:
        """Free the slots of streams that are to end, then announce their ends."""
        slots = [stream.slot for stream in ended if stream.slot is not None]
        if slots:
            await self._model.device.call(self._model.do_close_slots, slots)
        for stream in ended:
            self._drop(stream)

    async def _end_all(self, error: D2FError) -> None:
        """End everything after the call in flight, however often this task is cancelled."""
        interrupted = False
        while self._streams or self._requests:
            self._reject_requests(error)
            for stream in self._streams.values():
                stream.outcome = stream.outcome or error
            closed = self._model.device.call(self._model.do_close_slots_of, self)
            while not closed.done():
                try:
                    await asyncio.wait((closed,))
                except asyncio.CancelledError:
                    interrupted = True
            if closed.exception() is not None:
                logger.error("slots of a failed backend stay open", exc_info=closed.exception())
            for stream in [s for s in self._streams.values() if s.outcome is not None]:
                self._drop(stream)
        if interrupted:
            raise asyncio.CancelledError

    def _note_failure(self, error: Exception) -> None:
        MODELS.discard(self._model)
        name, loaded = self._model.name, self.parts is not None
        logger.error("model %s failed %s", name, "in use" if loaded else "to load", exc_info=error)
        if isinstance(error, EngineFailed) or (isinstance(error, D2FError) and not loaded):
            self.failure = error
        else:
            self.failure = EngineFailed(f"the backend failed: {error!r}")
            self.failure.__cause__ = error

    def _take_requests(self, parts: ModelParts) -> None:
        requests, self._requests = self._requests, {}
        for request in requests.values():
            try:
                self._add(request.prepare(parts))
            except D2FError as error:
                request.buffer.reject(error)
            except Exception as error:
                logger.exception("a request failed")
                request.buffer.reject(D2FError(f"the request failed: {error!r}"))

    def _reject_requests(self, error: D2FError) -> None:
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.buffer.reject(error)

    def _add(self, stream: Stream) -> None:
        params = stream.params
        prompt_tokens, block_size = stream.shares
        self._scheduler.add(
            stream.id,
            capacity_tokens=stream.capacity,
            prompt_tokens=prompt_tokens,
            block_size=block_size,
            max_active_blocks=params.max_active_blocks,
            num_rows=1 + params.lookahead,
        )
        self._streams[stream.id] = stream
        logger.debug("stream %s: %s prompt tokens", stream.id, stream.num_prompt_tokens)

    def _drop(self, stream: Stream) -> None:
        del self._streams[stream.id]
        self._scheduler.remove(stream.id)
        stream.end()
        logger.debug("stream %s: %s", stream.id, stream.outcome)


def _end_alone(stream: Stream, error: Exception) -> None:
    """Let an error of one stream's own code end that stream only."""
    logger.error("stream %s failed", stream.id, exc_info=error)
    stream.outcome = D2FError(f"the stream failed: {error!r}")


def _waker(wake: asyncio.Event) -> Callable[[], None]:
    loop = asyncio.get_running_loop()

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(wake.set)

    return call
