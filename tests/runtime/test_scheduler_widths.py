"""Scheduler: how wide the windows of a step are."""

from collections.abc import Callable

import pytest

from d2f_runtime.decoding.width import OWN, Width
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.scheduler import Scheduler
from d2f_runtime.engine.step_cost import TimedStep
from d2f_stream.core.params import GenerationParams
from scheduling import add, scheduler

KIND = RequestKind.of(GenerationParams(commit="verify"), 32)


def run_steps(
    plan: Scheduler[str],
    num_steps: int,
    *,
    ms: Callable[[int, int], float],
    brings: Callable[[Width], tuple[int, int]],
) -> list[dict[str, Width]]:
    """Run steps that take `ms` of rows and sessions; a window brings (tokens, rows)."""
    steps = []
    for _ in range(num_steps):
        batch = plan.next_batch()
        rows = 0
        for name, width in batch.run:
            tokens, own_rows = brings(width)
            plan.learn(name, width, rows=own_rows, tokens=tokens)
            rows += own_rows
        plan.learn_step(TimedStep(rows, len(batch.run), ms(rows, len(batch.run))))
        steps.append(dict(batch.run))
    return steps


def blocks(width: Width) -> tuple[int, int]:
    """What a window of so many blocks brings: 5, 6, 6.5 and 6.6 tokens for 48 to 144 rows."""
    number = 4 if width == OWN else width.max_active_blocks or 4
    return (10, 12, 13, 13)[number - 1], 16 + 32 * number


def drafts(width: Width) -> tuple[int, int]:
    """What a window of so many drafts brings: one token, and half of what it drafts besides."""
    number = width.max_drafts or 32
    return 1 + min(4, number // 2), number if number == 1 else 2 * number


def per_row(rows: int, sessions: int) -> float:
    return 4.0 + rows / 100


def test_windows_narrow_as_sessions_grow() -> None:
    means = []
    for count in (1, 2, 8):
        plan = scheduler(max_step_tokens=4096)
        add(plan, *"abcdefgh"[:count])
        last = run_steps(plan, 300, ms=per_row, brings=blocks)[-100:]
        assert all(len(step) == count for step in last)
        rows = [blocks(width)[1] for step in last for width in step.values()]
        means.append(sum(rows) / len(rows))
    assert means[0] == blocks(OWN)[1]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 1.05 * blocks(Width(max_active_blocks=1))[1]


def test_windows_stay_where_rows_cost_nothing() -> None:
    plan = scheduler(max_step_tokens=4096)
    add(plan, *"abcdefgh")
    last = run_steps(plan, 200, ms=lambda rows, sessions: 5.0, brings=blocks)[-1]
    assert {blocks(width)[0] for width in last.values()} == {13}


def test_verified_windows_become_autoregressive_where_each_row_costs_as_much() -> None:
    plan = scheduler(max_step_tokens=4096)
    add(plan, *"abcdefgh", commit="verify", may_narrow=False)
    steps = run_steps(plan, 300, ms=lambda rows, sessions: 0.1 + rows, brings=drafts)
    single = [width == Width(max_drafts=1) for step in steps[100:] for width in step.values()]
    assert sum(single) > 0.97 * len(single)


def test_verified_session_alone_drafts_as_much_as_pays() -> None:
    plan = scheduler()
    add(plan, "a", commit="verify")
    steps = run_steps(plan, 400, ms=lambda rows, sessions: 5.0 + rows / 4, brings=drafts)
    rates = {width: drafts(width)[0] / (5 + drafts(width)[1] / 4) for width in KIND.widths}
    best = max(rates, key=rates.__getitem__)
    assert sum(step["a"] == best for step in steps[100:]) > 270


def test_windows_narrow_before_anybody_waits() -> None:
    plan = scheduler()
    add(plan, *"abcdefgh")
    plan.next_batch()
    assert len(plan.next_batch().run) == 8  # of their own width each would need 144 of 640


def test_session_that_is_alone_keeps_its_own_windows() -> None:
    plan = scheduler(max_step_tokens=4096)
    add(plan, *"abcdefgh")
    run_steps(plan, 60, ms=per_row, brings=blocks)
    for name in "bcdefgh":
        plan.remove(name)
    assert run_steps(plan, 20, ms=per_row, brings=blocks) == [{"a": OWN}] * 20


@pytest.mark.parametrize("bound", [1, 4, None])
def test_windows_of_sessions_that_must_not_narrow_are_their_own(bound: int | None) -> None:
    plan = scheduler(max_sessions=16, max_rows=16)
    add(plan, *"abcdefghij", bound=bound, may_narrow=False)
    add(plan, "narrows", bound=4)
    steps = run_steps(plan, 60, ms=per_row, brings=blocks)
    assert {width for step in steps for name, width in step.items() if name != "narrows"} == {OWN}


def test_sessions_that_must_not_narrow_take_turns_where_a_step_cannot_hold_them() -> None:
    plan = scheduler(max_sessions=16, max_rows=16)
    add(plan, *"abcdefgh", may_narrow=False)
    steps = run_steps(plan, 20, ms=per_row, brings=blocks)[-4:]
    assert [len(step) for step in steps] == [4, 4, 4, 4]  # of 144 rows, in 640
    assert set(steps[0]) | set(steps[1]) == set("abcdefgh")


def test_rows_count_as_they_are() -> None:
    plan = scheduler()
    add(plan, *"abcdefgh", may_narrow=False)
    steps = run_steps(plan, 20, ms=per_row, brings=lambda width: (4, 64))[-4:]
    assert [len(step) for step in steps] == [8, 8, 8, 8]


def test_step_holds_no_more_sessions_than_pay() -> None:
    def cliff(rows: int, sessions: int) -> float:
        return 5.0 if rows <= 256 else 40.0

    timed = [TimedStep(rows, 1, cliff(rows, 1)) for rows in (1, 256, 320, 800)]
    plan = scheduler(max_step_tokens=4096, timed=timed)
    add(plan, *"abcdefgh", may_narrow=False)

    steps = run_steps(plan, 60, ms=cliff, brings=lambda width: (4, 80))[-8:]
    assert [len(step) for step in steps] == [3] * 8
    assert set().union(*steps) == set("abcdefgh")


def test_paused_sessions_do_not_narrow_others() -> None:
    plan = scheduler()
    add(plan, *"abcdefgh")
    for name in "bcdefgh":
        plan.pause(name)
    assert plan.next_batch().run == (("a", OWN),)


def test_unbounded_request_keeps_its_windows_alone() -> None:
    plan = scheduler()
    add(plan, "a", bound=None)
    assert plan.next_batch().run == (("a", OWN),)


@pytest.mark.parametrize("times", [3.0, 100.0])
@pytest.mark.parametrize("num_slow", [1, 2, 20])
def test_slow_steps_are_forgotten_when_the_device_is_fast_again(
    times: float, num_slow: int
) -> None:
    def ms(rows: int, sessions: int) -> float:
        return 1.0 + rows / 500 + 0.03 * sessions

    warm = [TimedStep(rows, 1, ms(rows, 1)) for rows in (1, 32, 128, 512)]
    plan = scheduler(max_sessions=16, max_rows=16, max_step_tokens=1024, timed=warm)
    add(plan, *"abcdefghijklmnop", commit="verify")
    before = run_steps(plan, 100, ms=ms, brings=drafts)[-20:]
    run_steps(plan, num_slow, ms=lambda r, s: times * ms(r, s), brings=drafts)
    after = run_steps(plan, 150, ms=ms, brings=drafts)[-20:]
    assert {len(step) for step in before} == {len(step) for step in after} == {16}
    tokens = [
        sum(drafts(width)[0] for step in steps for width in step.values())
        for steps in (before, after)
    ]
    assert tokens[1] >= 0.9 * tokens[0]
