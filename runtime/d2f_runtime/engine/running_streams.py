"""RunningStreams: the streams of an engine, from the queue to their last event.

Gives them slots as the scheduler says, runs their steps, announces what came of these, and takes
the slots back. Everything happens on the event loop except the calls named `do_*`, which go to the
model's device thread. When to do which is the step loop's to say.

Two steps are under way as a rule: one runs, and the next is planned and queued behind it, so that
the device thread goes from one to the next at once. What a step made final is announced while the
next one runs. Where a stream ends or another one joins, what is queued is withdrawn and what runs
is waited for: slots are opened and closed with no step under way. A stream whose outcome is decided
amid a step of its own takes nothing from that step.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from d2f_runtime.device import on_loop
from d2f_runtime.engine.limits import EngineLoad, Limits
from d2f_runtime.engine.planned_step import Joined, PlannedStep, StepQueue, StepResult
from d2f_runtime.engine.scheduler import Batch, Scheduler
from d2f_runtime.engine.step_cost import TimedStep
from d2f_runtime.engine.stream import Stream, StreamId
from d2f_runtime.loaded_model import LoadedModel
from d2f_runtime.loaded_model.model import SlotOwner
from d2f_stream.core.errors import D2FError, OutOfCapacity
from d2f_stream.core.events import FinishReason

__all__ = ["RunningStreams", "StepObserver"]

logger = logging.getLogger("d2f_stream.engine")

T = TypeVar("T")

StepObserver = Callable[[float, int], None]
"""Is given a step's wall time, seconds, and how many rows it had."""


class RunningStreams:
    """Runs streams step by step: `add` them, then `advance` and `settle` while there are any.

    Attributes:
        scheduler: who gets a slot, and which windows a step runs.

    Args:
        model: whose slots they take.
        limits: how much runs at once.
        owner: of the slots.
        on_free: called when a slot that was waited for may be free.
        observers: called after each step, in order.
    """

    def __init__(
        self,
        model: LoadedModel,
        limits: Limits,
        *,
        owner: SlotOwner,
        on_free: Callable[[], object],
        observers: Mapping[object, StepObserver],
    ) -> None:
        self.scheduler: Scheduler[StreamId] = Scheduler(
            max_sessions=limits.max_sessions,
            capacity_tokens=limits.max_tokens,
            max_rows=limits.max_rows or 1,  # which the model will say
            max_step_tokens=limits.max_step_tokens,
        )
        self._model = model
        self._owner = owner
        self._on_free = on_free
        self._observers = observers
        self._streams: dict[StreamId, Stream] = {}
        self._steps = StepQueue(model)
        self._has_ended = False  # a stream has its outcome, which is to be announced

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, stream_id: StreamId) -> bool:
        return stream_id in self._streams

    @property
    def load(self) -> EngineLoad:
        """What they take at this moment."""
        prefixes = self._model.prefixes
        return EngineLoad(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            kv_tokens=sum(s.capacity for s in self._streams.values() if s.slot is not None),
            kept_tokens=0 if prefixes is None else prefixes.kept_tokens,
            reused_tokens=0 if prefixes is None else prefixes.num_tokens_reused,
            prompt_tokens=self.scheduler.num_prompt_tokens,
        )

    @property
    def is_settled(self) -> bool:
        """Whether nobody has ended, and nobody waits for the steps under way in order to join."""
        return not (self._has_ended or (self._steps and self.scheduler.admits))

    def add(self, stream: Stream) -> None:
        """Queue a stream; one that can join at once stops the steps that have not begun.

        Raises:
            OutOfCapacity: it could not be admitted even alone.
        """
        self.scheduler.add(
            stream.id,
            capacity_tokens=stream.capacity,
            prompt=stream.prompt_cuts,
            kind=stream.kind,
            may_narrow=stream.params.may_narrow,
        )
        self._streams[stream.id] = stream
        self._has_ended |= stream.outcome is not None  # it lacked nothing but its last event
        logger.debug("stream %s: %s prompt tokens", stream.id, stream.num_prompt_tokens)
        if self.scheduler.admits:
            self.withdraw()

    def withdraw(self) -> None:
        """Let no step begin that has not begun."""
        self._steps.withdraw()

    def end(self, stream: Stream, outcome: FinishReason | D2FError) -> None:
        """Decide how a stream is to end, unless that is decided; `settle` ends it."""
        stream.outcome = stream.outcome or outcome
        self._has_ended = True
        self.withdraw()

    def cancel(self, stream_id: StreamId) -> None:
        """End a stream; nothing happens where it is not among these."""
        if (stream := self._streams.get(stream_id)) is not None:
            self.end(stream, "cancelled")

    def end_all(self, error: D2FError) -> None:
        """End all streams."""
        for stream in self._streams.values():
            self.end(stream, error)

    async def advance(self) -> bool:
        """Launch a step and announce the one before it; False if nothing can run for now.

        Raises:
            Exception: what the backend raised. `abandon` follows.
        """
        batch = self.scheduler.next_batch()
        if batch.admit:
            batch = await self._admit(batch)
        launched = self._launch(batch)
        if len(self._steps) > launched:  # else there is none before it: plan one more
            await self._announce_oldest()
        elif not launched:
            # Where only other engines hold slots, their end wakes this one.
            return bool(batch.run) and self.scheduler.num_running > 0
        return True

    async def settle(self) -> None:
        """Announce all that is under way, then end the streams that are to end."""
        self.withdraw()
        while self._steps:
            await self._announce_oldest()
        self._has_ended = False
        if ended := [s for s in self._streams.values() if s.outcome is not None]:
            await self._retire(ended)

    def abandon(self) -> None:
        """Withdraw all steps, and forget them."""
        self._steps.abandon()

    def drop_ended(self) -> None:
        """Announce the ends of those that are to end; their slots are closed."""
        for stream in [s for s in self._streams.values() if s.outcome is not None]:
            self._drop(stream)

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
            self.scheduler.take_back(step.batch)
            return
        if result.num_rows:
            for observe in tuple(self._observers.values()):
                observe(result.wall_s, result.num_rows)
        self._learn(step, result)
        for stream, progress in zip(step.streams, result.progress, strict=True):
            self._tell(stream, stream.announce, progress)

    def _learn(self, step: PlannedStep, result: StepResult) -> None:
        """Tell the scheduler what a step took, and what it brought to whom."""
        widths, each = dict(step.batch.run), []
        for stream, progress in zip(step.streams, result.progress, strict=True):
            if isinstance(progress, Exception):
                continue
            each.append(progress.num_rows)
            piece = step.batch.prompts.get(stream.id)
            if piece is None or piece.is_last:
                self.scheduler.learn(
                    stream.id,
                    widths[stream.id],
                    rows=progress.num_rows - progress.num_prompt_rows,
                    tokens=sum(block.stop - block.start for block in progress.committed),
                )
        wall_ms = 1e3 * result.wall_s
        self.scheduler.learn_step(TimedStep(sum(each), result.num_rows, wall_ms, each))

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
            self.end(stream, stream.outcome)

    async def _admit(self, batch: Batch[StreamId]) -> Batch[StreamId]:
        """Open slots in order of arrival, as far as there is room; return what is to be run."""
        model, streams = self._model, [self._streams[stream_id] for stream_id in batch.admit]
        for number, stream in enumerate(streams):
            try:
                opened = await model.device.call(
                    partial(model.do_open_slot, prompt=stream.cached_prompt, scope=stream.scope),
                    self._owner,
                    stream.capacity,
                    on_loop(self._on_free),
                )
            except OutOfCapacity as error:  # and nothing to wait for
                self.end(stream, error)
                continue
            if opened is None:
                for waiting in reversed(streams[number:]):
                    self.scheduler.requeue(waiting.id)
                break
            stream.slot = opened.slot
            stream.denoiser.begin_at(opened.num_cached)
            batch = self.scheduler.begin_at(stream.id, opened.num_cached, batch)
            stream.start()
        return batch

    async def _retire(self, ended: Sequence[Stream]) -> None:
        """Free the slots of streams that are to end, then announce their ends."""
        slots = [(s.slot, s.cached_tokens) for s in ended if s.slot is not None]
        if slots:
            await self._model.device.call(self._model.do_retire_slots, slots)
        for stream in ended:
            self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        del self._streams[stream.id]
        self.scheduler.remove(stream.id)
        stream.end()
        logger.debug("stream %s: %s", stream.id, stream.outcome)
