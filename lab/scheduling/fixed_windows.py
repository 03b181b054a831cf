"""A scheduler for comparisons: windows of one width whatever pays, prompts that are not cut."""

from dataclasses import replace

from d2f_runtime.decoding.width import Width
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.engine.prompt_cuts import PromptCuts
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.scheduler import Batch, Scheduler
from d2f_runtime.engine.stream import StreamId
from d2f_stream.core.limits import Limits

__all__ = ["SteeredScheduler", "steer"]


class SteeredScheduler(Scheduler[StreamId]):
    """The engine's own scheduler, but for what is set here between two requests.

    Attributes:
        width: of all windows; None leaves them to what pays.
        cuts_prompts: whether prompts run in pieces.
    """

    width: Width | None = None
    cuts_prompts = True

    def add(
        self,
        session_id: StreamId,
        *,
        capacity_tokens: int,
        prompt: PromptCuts,
        kind: RequestKind,
        may_narrow: bool = False,
    ) -> None:
        """Queue a session."""
        super().add(
            session_id,
            capacity_tokens=capacity_tokens,
            prompt=prompt if self.cuts_prompts else PromptCuts(prompt.num_tokens),
            kind=kind,
            may_narrow=may_narrow,
        )

    def next_batch(self) -> Batch[StreamId]:
        """Plan the next step."""
        batch = super().next_batch()
        if self.width is None:
            return batch
        return replace(batch, run=tuple((name, self.width) for name, _ in batch.run))


def steer(engine: LocalEngine, limits: Limits) -> SteeredScheduler:
    """Return the scheduler that an engine has from now on; it knows what warming up has timed."""
    streams = engine._steps._streams  # the benchmark's own engine, before its first request
    scheduler = SteeredScheduler(
        max_sessions=limits.max_sessions,
        capacity_tokens=limits.max_tokens,
        max_rows=streams.scheduler.max_rows,
        max_step_tokens=limits.max_step_tokens,
    )
    scheduler._cost = streams.scheduler._cost
    streams.scheduler = scheduler
    return scheduler
