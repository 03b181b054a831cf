"""A Scheduler with sessions of a test's own, run step by step."""

from collections.abc import Sequence

from d2f_runtime.engine.prompt_cuts import PromptCuts
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.scheduler import Scheduler
from d2f_runtime.engine.step_cost import TimedStep
from d2f_stream.core.params import Commit, GenerationParams


def scheduler(
    *,
    max_sessions: int = 8,
    capacity: int = 10_000,
    max_rows: int = 8,
    max_step_tokens: int = 640,
    timed: Sequence[TimedStep] = (),
) -> Scheduler[str]:
    plan: Scheduler[str] = Scheduler(
        max_sessions=max_sessions,
        capacity_tokens=capacity,
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
    )
    if timed:
        plan.begin_with(timed)
    return plan


def add(
    plan: Scheduler[str],
    *names: str,
    capacity: int = 300,
    prompt: int = 8,
    bound: int | None = 4,
    may_narrow: bool = True,
    commit: Commit = "filled",
    spacing: int = 0,
) -> None:
    kind = RequestKind.of(GenerationParams(max_active_blocks=bound, commit=commit), 32)
    for name in names:
        plan.add(
            name,
            capacity_tokens=capacity,
            prompt=PromptCuts(prompt, spacing),
            kind=kind,
            may_narrow=may_narrow,
        )
