"""StepLoop: the one task that runs an engine's steps.

Takes requests on, loads the model for them, drives the streams that they become, and ends them when
the engine closes or something breaks. The task lives while there are streams, so an idle engine
leaves nothing behind on its event loop. What happens in a step is `RunningStreams`' to say.

The task is never cancelled by its engine: a cancelled await returns while the device thread still
writes K/V, and freeing that would be a use after free. Where it is cancelled from outside, as
asyncio.run does at its end, it lets the call in flight finish, frees its slots, ends its streams,
and only then lets the cancellation through.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from d2f_runtime.engine.early_requests import EarlyRequests
from d2f_runtime.engine.limits import EngineLoad, Limits
from d2f_runtime.engine.request import Request
from d2f_runtime.engine.running_streams import RunningStreams, StepObserver
from d2f_runtime.engine.stream import StreamId
from d2f_runtime.engine.timed_steps import do_time_steps
from d2f_runtime.loaded_model import MODELS, LoadedModel, ModelParts
from d2f_stream.core.errors import D2FError, EngineClosed, EngineFailed
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.printable import printable

__all__ = ["StepLoop"]

logger = logging.getLogger("d2f_stream.engine")

LOOK_AGAIN_S = 1.0
"""Seconds between two tries for a slot that another event loop holds, which may be gone."""


class StepLoop:
    """Runs the streams of one engine on one event loop.

    Attributes:
        parts: of the model, once it is loaded.
        failure: why nothing is accepted any more, if something broke.
        failed: set once it did.
        limits: how much it takes on at once.

    Args:
        model: that runs the steps.
        limits: how much it takes on at once.
        observers: called after each step, in order.
    """

    def __init__(
        self, model: LoadedModel, limits: Limits, observers: Mapping[object, StepObserver]
    ) -> None:
        self.parts: ModelParts | None = None
        self.failure: D2FError | None = None
        self.failed = asyncio.Event()
        self.limits = limits
        self._model = model
        self._early = EarlyRequests()
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._streams = RunningStreams(
            model, limits, owner=self, on_free=self._wake.set, observers=observers
        )
        self._closing = False
        self._home: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None

    @property
    def current_load(self) -> EngineLoad:
        """What the loop does at this moment; requests that wait for the model are in the queue."""
        load = self._streams.load
        return replace(load, num_waiting=load.num_waiting + len(self._early))

    async def load(self) -> ModelParts:
        """Load the model. Safe to cancel; loading goes on.

        Raises:
            D2FError: it cannot be loaded.
        """
        if self.parts is None:
            self.parts = await self._model.device.call(self._model.do_load)
            info = self.parts.info
            self._streams.scheduler.share_steps(
                self.limits.max_rows or info.step_sessions, one_by_one=info.one_by_one
            )
        return self.parts

    async def time_steps(self, params: GenerationParams) -> None:
        """Let the scheduler know what steps take, of requests with such parameters.

        Before the first one. Safe to cancel; the timing goes on.

        Raises:
            Exception: what the backend raised.
        """
        max_sessions = min(self.limits.max_sessions, self._streams.scheduler.max_rows)
        do_time = partial(do_time_steps, params=params, max_sessions=max_sessions)
        timed = await self._model.device.call(do_time, self._model, self)
        self._streams.scheduler.begin_with(timed)

    def submit(self, request: Request) -> None:
        """Take a request on.

        Raises:
            D2FError: the request is refused; while the model is loading, its buffer gets that.
            ValueError: another stream has the id.
        """
        if request.id in self._streams or request.id in self._early:
            raise ValueError(f"another stream of this engine is called {request.id!r}")
        if self.parts is None:
            self._early.add(request)
        else:
            self._streams.add(request.stream(self.parts, self.limits))
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
            self._streams.withdraw()
        return gone

    def cancel(self, stream_id: StreamId) -> None:
        """End a stream; its slot is closed before the next step."""
        if self.is_gone():
            self._model.device.post(self._model.do_reclaim)
            return
        self._streams.cancel(stream_id)
        self._early.cancel(stream_id)
        self._wake.set()

    def pause(self, stream_id: StreamId) -> None:
        """Run no steps for the stream."""
        self._streams.scheduler.pause(stream_id)

    def resume(self, stream_id: StreamId) -> None:
        """Run steps for the stream again."""
        if stream_id in self._streams and not self.is_gone():
            self._streams.scheduler.resume(stream_id)
            self._wake.set()

    def close(self, then: Callable[[], None]) -> None:
        """End all streams after the call in flight; `then` is called when the task is gone."""
        self._closing = True
        self._streams.withdraw()
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
        self._early.start(parts, self.limits, self._streams.add)
        while self._streams:
            self._wake.clear()
            if self._closing:
                self._streams.end_all(EngineClosed("the engine was closed"))
            if not self._streams.is_settled:
                await self._streams.settle()
            elif not await self._streams.advance():
                await self._rest()

    async def _rest(self) -> None:
        """Wait for news; with a stream that waits for others' slots, for a while only."""
        patience_s = LOOK_AGAIN_S if self._streams.scheduler.num_waiting else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._wake.wait()

    async def _end_all(self, error: D2FError) -> None:
        """End everything after the call in flight, however often this task is cancelled."""
        interrupted = False
        self._streams.abandon()
        while self._streams or self._early:
            self._early.reject(error)
            self._streams.end_all(error)
            closed = self._model.device.call(self._model.do_close_slots_of, self)
            while not closed.done():
                try:
                    await asyncio.wait((closed,))
                except asyncio.CancelledError:
                    interrupted = True
            if closed.exception() is not None:
                logger.error("slots of a failed backend stay open", exc_info=closed.exception())
            self._streams.drop_ended()
        if interrupted:
            raise asyncio.CancelledError

    def _note_failure(self, error: Exception) -> None:
        MODELS.discard(self._model)
        name, loaded = self._model.name, self.parts is not None
        where = "in use" if loaded else "to load"
        logger.error("model %s failed %s", name, where, exc_info=error)
        if isinstance(error, EngineFailed) or (isinstance(error, D2FError) and not loaded):
            self.failure = error
        else:
            self.failure = EngineFailed(f"the model failed {where}: {_first_line(error)}")
            self.failure.__cause__ = error
        self.failed.set()


def _first_line(error: Exception) -> str:
    """Return an error's kind and the beginning of what it says; the log has all of it."""
    said, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {printable(said)}" if said else type(error).__name__
