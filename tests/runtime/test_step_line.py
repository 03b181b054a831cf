"""How much of prompts a step runs beside the windows of others."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2f_runtime.engine.prompt_cuts import PromptCuts
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.scheduler import Batch, Scheduler
from d2f_runtime.engine.step_cost import StepCost, TimedStep
from d2f_runtime.engine.step_line import DELAY_MS, DELAY_SHARE, LEAST_PIECE
from d2f_stream.core.params import GenerationParams

KIND = RequestKind.of(GenerationParams(max_active_blocks=1), 16)


def begun(
    num_sessions: int, ms: Callable[[int], float], *, max_step_tokens: int = 1024
) -> Scheduler[str]:
    """A scheduler whose sessions have each run a window of 16 rows."""
    plan: Scheduler[str] = Scheduler(
        max_sessions=64, capacity_tokens=1 << 20, max_rows=16, max_step_tokens=max_step_tokens
    )
    plan.begin_with([TimedStep(rows, 1, ms(rows)) for rows in (1, 64, 256, 1024, 2048)])
    for number in range(num_sessions):
        add(plan, str(number), PromptCuts(1, 1))
    run(plan, ms)
    return plan


def add(plan: Scheduler[str], name: str, prompt: PromptCuts) -> None:
    plan.add(name, capacity_tokens=prompt.num_tokens + 100, prompt=prompt, kind=KIND)


def run(plan: Scheduler[str], ms: Callable[[int], float]) -> tuple[Batch[str], int, int]:
    """Run a step; return it, its rows of prompts and its other rows."""
    batch = plan.next_batch()
    prompts = sum(piece.num_tokens for piece in batch.prompts.values())
    rows = 0
    for name, width in batch.run:
        if name not in batch.prompts or batch.prompts[name].is_last:
            rows += 16
            plan.learn(name, width, rows=16, tokens=4)
    plan.learn_step(TimedStep(rows + prompts, len(batch.run), ms(rows + prompts)))
    return batch, prompts, rows


@settings(max_examples=60)
@given(
    per_row_ms=st.floats(0.005, 5.0),
    base_ms=st.floats(0.5, 50.0),
    num_sessions=st.integers(1, 15),
    length=st.integers(100, 9000),
)
@example(per_row_ms=0.0078125, base_ms=1.0, num_sessions=12, length=817)
@example(per_row_ms=0.0078125, base_ms=0.5, num_sessions=3, length=2916)
@example(per_row_ms=0.005, base_ms=1.0, num_sessions=4, length=945)
@example(per_row_ms=0.005, base_ms=46.46, num_sessions=11, length=1692)
@example(per_row_ms=0.005, base_ms=19.02, num_sessions=2, length=977)
@example(per_row_ms=0.005, base_ms=0.5, num_sessions=11, length=2543)
def test_step_with_a_prompt_takes_hardly_longer_than_without(
    per_row_ms: float, base_ms: float, num_sessions: int, length: int
) -> None:
    def ms(rows: int) -> float:
        return base_ms + per_row_ms * rows

    plan = begun(num_sessions, ms)
    add(plan, "long", PromptCuts(length, 1))
    left = length
    while left:
        batch, prompts, rows = run(plan, ms)
        assert len(batch.run) == num_sessions + 1
        delay_ms = ms(prompts + rows) - ms(16 * num_sessions)
        allowed_ms = max(DELAY_MS, DELAY_SHARE * ms(16 * num_sessions))
        window = 16 if batch.prompts["long"].is_last else 0
        assert prompts <= LEAST_PIECE or delay_ms <= 1.02 * allowed_ms + per_row_ms * window
        left -= prompts
    assert "long" not in run(plan, ms)[0].prompts


def test_pieces_are_as_long_as_the_delay_allows() -> None:
    plan = begun(4, lambda rows: 4.0 + rows / 32)
    add(plan, "long", PromptCuts(4000, 1))
    _, prompts, _ = run(plan, lambda rows: 4.0 + rows / 32)
    assert 240 <= prompts <= 256  # 8 ms


def test_alone_a_prompt_takes_whole_steps() -> None:
    plan = begun(0, lambda rows: 4.0 + rows / 32)
    add(plan, "long", PromptCuts(2500, 1))
    assert [run(plan, float)[1] for _ in range(3)] == [1024, 1024, 452]


def test_short_prompt_is_not_held_up_by_a_long_one() -> None:
    def ms(rows: int) -> float:
        return 4.0 + rows / 32

    plan = begun(2, ms)
    add(plan, "long", PromptCuts(9000, 1))
    run(plan, ms)
    add(plan, "short", PromptCuts(40, 1))
    steps = [run(plan, ms)[0].prompts for _ in range(2)]
    assert any("short" in prompts and prompts["short"].is_last for prompts in steps)
    assert all("long" in run(plan, ms)[0].prompts for _ in range(3))


def test_prompts_that_cannot_be_cut_leave_every_other_step_to_others() -> None:
    plan = begun(3, float)
    for name in ("x", "y", "z"):
        add(plan, name, PromptCuts(3000))
    steps = [run(plan, float)[0] for _ in range(7)]
    held = [[*step.prompts] for step in steps]
    assert sorted(name for names in held for name in names) == ["x", "y", "z"]
    for before, after in pairwise(steps):
        assert not (before.prompts and after.prompts)
        assert after.prompts or len(after.run) >= 3


@pytest.mark.parametrize("seen", [1, 32, 128])
def test_what_was_not_seen_is_not_hoped_to_be_cheap(seen: int) -> None:
    cost = StepCost([TimedStep(1, 1, 4.0), TimedStep(seen, 1, 4.0 + seen / 32)])
    rows = cost.rows_within(10.0, rows=1, sessions=1, most=4000)
    assert rows / 32 <= 10.0
    for _ in range(12):
        cost.learn(TimedStep(1 + rows, 2, 4.0 + rows / 32))
        rows = cost.rows_within(10.0, rows=1, sessions=1, most=4000)
    assert 8.0 <= rows / 32 <= 10.5


@pytest.mark.parametrize(("length", "cached", "expected"), [(5000, 4950, 50), (4500, 4480, 20)])
def test_rows_of_a_cached_prompt_hold_the_window_that_comes_with_its_end(
    length: int, cached: int, expected: int
) -> None:
    plan = begun(4, lambda rows: 4.0 + rows / 32)
    add(plan, "long", PromptCuts(length, 1))
    batch = plan.next_batch()
    planned = batch.prompts["long"].num_tokens
    assert planned >= expected + 16
    piece = plan.begin_at("long", cached, batch).prompts["long"]
    assert (piece.num_tokens, piece.is_last) == (expected, True)


def test_end_of_a_cached_prompt_waits_where_its_window_has_no_room() -> None:
    plan = begun(4, lambda rows: 4.0 + rows / 32)
    add(plan, "long", PromptCuts(5000, 1))
    batch = plan.next_batch()
    planned = batch.prompts["long"].num_tokens
    batch = plan.begin_at("long", 5000 - planned, batch)
    assert not batch.prompts["long"].is_last
    left = planned - batch.prompts["long"].num_tokens
    assert 0 < left <= 16
    assert plan.next_batch().prompts["long"].num_tokens == left
