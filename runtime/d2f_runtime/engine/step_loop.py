"""StepLoop: the one task that runs an engine's steps.

Owns the streams and their slots; admits, launches and announces steps, and ends streams. Everything
happens on the event loop except the calls named `do_*`, which go to the model's device thread. The
task lives while there are streams, so an idle engine leaves nothing behind on its event loop.

Two steps are under way as a rule: one runs, and the next is planned and queued behind it, so that
the device thread goes from one to the next at once. What a step made final is announced while the
next one runs. Where a stream ends or another one joins, what is queued is withdrawn and what runs
is waited for: slots are opened and closed with no step under way. A stream whose outcome is decided
amid a step of its own takes nothing from that step.

The task is never cancelled by its engine: a cancelled await returns while the device thread still
writes K/V, and freeing that would be a use after free. Where it is cancelled from outside, as
asyncio.run does at its end, it lets the call in flight finish, frees its slots, ends its streams,
and only then lets the cancellation through.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from d2f_runtime.device import on_loop
from d2f_runtime.engine.early_requests import EarlyRequests, Prepare
from d2f_runtime.engine.limits import EngineLoad, Limits
from d2f_runtime.engine.planned_step import Joined, PlannedStep, StepQueue, StepResult
from d2f_runtime.engine.scheduler import Batch, Scheduler
from d2f_runtime.engine.step_cost import TimedStep
from d2f_runtime.engine.stream import Stream, StreamId
from d2f_runtime.engine.timed_steps import do_time_steps
from d2f_runtime.loaded_model import MODELS, LoadedModel, ModelParts
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import D2FError, EngineClosed, EngineFailed, OutOfCapacity
from d2f_stream.core.params import GenerationParams

__all__ = ["StepLoop", "StepObserver"]

logger = logging.getLogger("d2f_stream.engine")

T = TypeVar("T")

LOOK_AGAIN_S = 1.0
"""Seconds between two tries for a slot that another event loop holds, which may be gone."""

StepObserver = Callable[[float, int], None]
"""Is given a step's wall time, seconds, and how many rows it had."""


class StepLoop:
    """Runs the streams of one engine on one event loop.

    Attributes:
        parts: of the model, once it is loaded.
        failure: why nothing is accepted any more, if something broke.
        failed: set once it did.
        limits: how much it takes on at once.
        observers: called after each step, in order; each under a key of its own.
    """

    def __init__(self, model: LoadedModel, limits: Limits) -> None:
        self.parts: ModelParts | None = None
        self.failure: D2FError | None = None
        self.failed = asyncio.Event()
        self.limits = limits
        self.observers: dict[object, StepObserver] = {}
        self._model = model
        self._scheduler: Scheduler[StreamId] = Scheduler(
            max_sessions=limits.max_sessions,
            capacity_tokens=limits.max_tokens,
            max_rows=limits.max_rows,
            max_step_tokens=limits.max_step_tokens,
        )
        self._early = EarlyRequests()
        self._streams: dict[StreamId, Stream] = {}
        self._steps = StepQueue(model)
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._has_ended = False  # a stream has its outcome, which is to be announced
        self._closing = False
        self._home: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None

    @property
    def current_load(self) -> EngineLoad:
        """What the loop does at this moment; requests that wait for the model are in the queue."""
        scheduler, prefixes = self._scheduler, self._model.prefixes
        return EngineLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._early),
            kv_tokens=sum(s.capacity for s in self._streams.values() if s.slot is not None),
            kept_tokens=0 if prefixes is None else prefixes.kept_tokens,
            reused_tokens=0 if prefixes is None else prefixes.num_tokens_reused,
        )

    async def load(self) -> ModelParts:
        """Load the model. Safe to cancel; loading goes on.

        Raises:
            D2FError: it cannot be loaded.
        """
        if self.parts is None:
            self.parts = await self._model.device.call(self._model.do_load)
        return self.parts

    async def time_steps(self, params: GenerationParams) -> None:
        """Let the scheduler know what steps take, of requests with such parameters.

        Before the first one. Safe to cancel; the timing goes on.

        Raises:
            Exception: what the backend raised.
        """
        do_time = partial(do_time_steps, params=params, max_sessions=self.limits.max_rows)
        timed = await self._model.device.call(do_time, self._model, self)
        self._scheduler.begin_with(timed)

    def submit(self, stream_id: StreamId, prepare: Prepare, buffer: EventBuffer) -> None:
        """Take a request on.

        Raises:
            D2FError: the request is refused; while the model is loading, `buffer` gets that.
            ValueError: another stream has the id.
        """
        if stream_id in self._streams or stream_id in self._early:
            raise ValueError(f"another stream of this engine is called {stream_id!r}")
        if self.parts is None:
            self._early.add(stream_id, prepare, buffer)
        else:
            self._add(prepare(self.parts))
            if self._scheduler.admits:
                self._steps.withdraw()
        self._wake.set()
        if self._task is None or self._task.done():
            self._home = asyncio.get_running_loop(), threading.current_thread()
            self._task = asyncio.create_task(self._run(), name=f"d2f-steps-{self._model.name}")

    def is_gone(self) -> bool:
        """Whether the event loop was closed, or left behind by its thread. From any thread.

        If so, what waits for the device is withdrawn, and the streams end should it ever go on.
        """
        if self._home is None:
            return False
        loop, thread = self._home
        gone = loop.is_closed() or not (thread.is_alive() or loop.is_running())
        if gone:
            self._closing = True
            self._steps.withdraw()
        return gone

    def cancel(self, stream_id: StreamId) -> None:
        """End a stream; its slot is closed before the next step."""
        if self.is_gone():
            self._model.device.post(self._model.do_reclaim)
            return
        stream = self._streams.get(stream_id)
        if stream is not None and stream.outcome is None:
            stream.outcome = "cancelled"
            self._has_ended = True
            self._steps.withdraw()
        self._early.cancel(stream_id)
        self._wake.set()

    def pause(self, stream_id: StreamId) -> None:
        """Run no steps for the stream."""
        if stream_id in self._streams:
            self._scheduler.pause(stream_id)

    def resume(self, stream_id: StreamId) -> None:
        """Run steps for the stream again."""
        if stream_id in self._streams and not self.is_gone():
            self._scheduler.resume(stream_id)
            self._wake.set()

    def close(self, then: Callable[[], None]) -> None:
        """End all streams after the call in flight; `then` is called when the task is gone."""
        self._closing = True
        self._steps.withdraw()
        self._wake.set()
        self._early.reject(EngineClosed("the engine was closed"))
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
        self._early.start(parts, self._add)
        while self._streams:
            self._wake.clear()
            if self._closing:
                self._end_streams(EngineClosed("the engine was closed"))
            if self._has_ended or (self._steps and self._scheduler.admits):
                await self._settle()
            elif not await self._advance():
                await self._rest()

    async def _rest(self) -> None:
        """Wait for news; with a stream that waits for others' slots, for a while only."""
        patience_s = LOOK_AGAIN_S if self._scheduler.num_waiting else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._wake.wait()

    async def _advance(self) -> bool:
        """Launch a step and announce the one before it; False if nothing can run for now."""
        batch = self._scheduler.next_batch()
        if batch.admit:
            await self._admit([self._streams[stream_id] for stream_id in batch.admit])
        launched = self._launch(batch)
        if len(self._steps) > launched:  # else there is none before it: plan one more
            await self._announce_oldest()
        elif not launched:
            # Where only other engines hold slots, their end wakes this one.
            return bool(batch.run) and self._scheduler.num_running > 0
        return True

    def _launch(self, batch: Batch[StreamId]) -> bool:
        """Queue a step of the batch behind what is under way; False if it has no stream to run."""
        asked = [(self._streams[stream_id], width) for stream_id, width in batch.run]
        ready = [each for each in asked if each[0].slot is not None and each[0].outcome is None]
        if ready:
            after, show = self._steps.newest, on_loop(self._show)
            self._steps.enqueue(PlannedStep(batch, ready, after=after, show=show))
        return bool(ready)

    async def _announce_oldest(self) -> None:
        """Wait for the oldest step under way, and announce what it brought."""
        step, result = await self._steps.next_result()
        if result is None:
            self._scheduler.take_back(step.batch)
            return
        if result.num_rows:
            for observe in tuple(self.observers.values()):
                observe(result.wall_s, result.num_rows)
        self._learn(step, result)
        for stream, progress in zip(step.streams, result.progress, strict=True):
            self._tell(stream, stream.announce, progress)

    def _learn(self, step: PlannedStep, result: StepResult) -> None:
        """Tell the scheduler what a step took, and what it brought to whom."""
        widths, rows = dict(step.batch.run), 0
        for stream, progress in zip(step.streams, result.progress, strict=True):
            if isinstance(progress, Exception):
                continue
            rows += progress.num_rows
            tokens = sum(block.stop - block.start for block in progress.committed)
            self._scheduler.learn(
                stream.id, widths[stream.id], rows=progress.num_rows, tokens=tokens
            )
        self._scheduler.learn_step(TimedStep(rows, result.num_rows, 1e3 * result.wall_s))

    async def _settle(self) -> None:
        """Announce all that is under way, then end the streams that are to end."""
        self._steps.withdraw()
        while self._steps:
            await self._announce_oldest()
        self._has_ended = False
        if ended := [s for s in self._streams.values() if s.outcome is not None]:
            await self._retire(ended)

    def _show(self, joined: Joined) -> None:
        for stream, blocks in joined:
            self._tell(stream, stream.show, blocks)

    def _tell(self, stream: Stream, tell: Callable[[T], None], news: T | Exception) -> None:
        """Let a stream announce something; an error of its own ends that stream only."""
        if stream.outcome is not None:
            return
        try:
            if isinstance(news, Exception):
                raise news
            tell(news)
        except D2FError as error:
            logger.error("stream %s failed: %s", stream.id, error)
            stream.outcome = error
        except Exception as error:
            logger.error("stream %s failed", stream.id, exc_info=error)
            stream.outcome = D2FError(f"the stream failed: {error!r}")
        if stream.outcome is not None:
            self._has_ended = True
            self._steps.withdraw()

    async def _admit(self, streams: Sequence[Stream]) -> None:
        """Open slots in order of arrival, as far as there is room."""
        model = self._model
        for number, stream in enumerate(streams):
            try:
                opened = await model.device.call(
                    partial(model.do_open_slot, prompt=stream.cached_prompt, scope=stream.scope),
                    self,
                    stream.capacity,
                    on_loop(self._wake.set),
                )
            except OutOfCapacity as error:  # and nothing to wait for
                stream.outcome = stream.outcome or error
                self._has_ended = True
                continue
            if opened is None:
                for waiting in reversed(streams[number:]):
                    self._scheduler.requeue(waiting.id)
                return
            stream.slot = opened.slot
            stream.denoiser.begin_at(opened.num_cached)
            self._scheduler.begin_at(stream.id, opened.num_cached)
            stream.start()

    async def _retire(self, ended: Sequence[Stream]) -> None:
        """Free the slots of streams that are to end, then announce their ends."""
        slots = [(s.slot, s.cached_tokens) for s in ended if s.slot is not None]
        if slots:
            await self._model.device.call(self._model.do_retire_slots, slots)
        for stream in ended:
            self._drop(stream)

    async def _end_all(self, error: D2FError) -> None:
        """End everything after the call in flight, however often this task is cancelled."""
        interrupted = False
        self._steps.abandon()
        while self._streams or self._early:
            self._early.reject(error)
            self._end_streams(error)
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

    def _end_streams(self, error: D2FError) -> None:
        self._has_ended = True
        for stream in self._streams.values():
            stream.outcome = stream.outcome or error

    def _note_failure(self, error: Exception) -> None:
        MODELS.discard(self._model)
        name, loaded = self._model.name, self.parts is not None
        logger.error("model %s failed %s", name, "in use" if loaded else "to load", exc_info=error)
        if isinstance(error, EngineFailed) or (isinstance(error, D2FError) and not loaded):
            self.failure = error
        else:
            self.failure = EngineFailed(f"the backend failed: {error!r}")
            self.failure.__cause__ = error
        self.failed.set()

    def _add(self, stream: Stream) -> None:
        self._scheduler.add(
            stream.id,
            capacity_tokens=stream.capacity,
            prompt_tokens=len(stream.cached_prompt),
            kind=stream.kind,
            may_narrow=stream.params.may_narrow,
        )
        self._streams[stream.id] = stream
        logger.debug("stream %s: %s prompt tokens", stream.id, stream.num_prompt_tokens)

    def _drop(self, stream: Stream) -> None:
        del self._streams[stream.id]
        self._scheduler.remove(stream.id)
        stream.end()
        logger.debug("stream %s: %s", stream.id, stream.outcome)
