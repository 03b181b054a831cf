import random
from collections.abc import Callable, Sequence

import pytest

from d2f_runtime.decoding.width import OWN, Width
from d2f_runtime.engine.prompt_cuts import PromptCuts
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.scheduler import Scheduler
from d2f_runtime.engine.step_cost import TimedStep
from d2f_stream.core.errors import OutOfCapacity
from d2f_stream.core.params import Commit, GenerationParams

KIND = RequestKind.of(GenerationParams(commit="verify"), 32)
WIDTHS = RequestKind.of(GenerationParams(), 32).widths


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


def ids(run: tuple[tuple[str, Width], ...]) -> list[str]:
    return [name for name, _ in run]


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


def test_session_is_admitted_and_run_in_one_batch() -> None:
    plan = scheduler()
    add(plan, "a")
    batch = plan.next_batch()
    assert (batch.admit, batch.run) == (("a",), (("a", OWN),))
    assert (plan.next_batch().admit, plan.num_running, plan.num_waiting) == ((), 1, 0)


def test_nothing_to_run_is_an_empty_batch() -> None:
    assert scheduler().next_batch().run == ()


def test_sessions_wait_for_a_slot_in_order_of_arrival() -> None:
    plan = scheduler(max_sessions=2)
    add(plan, "a", "b", "c", "d")
    assert plan.next_batch().admit == ("a", "b")
    assert (plan.num_running, plan.num_waiting) == (2, 2)
    plan.remove("b")
    assert plan.next_batch().admit == ("c",)


def test_small_session_does_not_overtake_a_large_one() -> None:
    plan = scheduler(capacity=1000)
    add(plan, "a", capacity=600)
    add(plan, "large", capacity=700)
    add(plan, "small", capacity=100)
    assert plan.next_batch().admit == ("a",)
    plan.remove("a")
    assert plan.next_batch().admit == ("large", "small")


def test_session_that_never_fits_is_refused() -> None:
    with pytest.raises(OutOfCapacity, match="1001 tokens but the engine holds 1000"):
        add(scheduler(capacity=1000), "a", capacity=1001)


def test_ids_in_use_are_refused() -> None:
    plan = scheduler()
    add(plan, "a")
    with pytest.raises(ValueError, match="'a' is scheduled already"):
        add(plan, "a")


def test_rows_are_shared_in_turn() -> None:
    plan = scheduler(max_rows=2)
    add(plan, "a", "b", "c")
    assert [ids(plan.next_batch().run) for _ in range(3)] == [["a", "b"], ["c", "a"], ["b", "c"]]


def test_paused_session_keeps_its_slot_and_its_place() -> None:
    plan = scheduler(max_rows=1)
    add(plan, "a", "b")
    plan.pause("a")
    assert [ids(plan.next_batch().run) for _ in range(2)] == [["b"], ["b"]]
    assert plan.num_running == 2
    plan.resume("a")
    assert ids(plan.next_batch().run) == ["a"]


def test_removed_session_may_come_back_unpaused() -> None:
    plan = scheduler()
    add(plan, "a")
    plan.pause("a")
    plan.remove("a")
    plan.remove("a")
    plan.pause("a")
    add(plan, "a")
    assert ids(plan.next_batch().run) == ["a"]


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


def test_long_prompt_runs_first_in_its_step_even_beyond_the_budget() -> None:
    plan = scheduler()
    add(plan, "a", "b")
    add(plan, "long", prompt=5000, capacity=6000)
    assert ids(plan.next_batch().run) == ["a", "b"]
    assert ids(plan.next_batch().run) == ["long"]
    assert ids(plan.next_batch().run) == ["a", "b", "long"]


def test_requeued_session_leads_the_queue_until_a_slot_is_freed() -> None:
    plan = scheduler()
    add(plan, "a", "b", "c")
    assert plan.next_batch().admit == ("a", "b", "c")
    plan.requeue("b")
    add(plan, "d")
    assert plan.next_batch().admit == ()
    plan.remove("d")
    assert plan.next_batch().admit == ()
    plan.remove("a")
    assert plan.next_batch().admit == ("b",)


def test_requeued_session_brings_its_prompt_again() -> None:
    plan = scheduler()
    add(plan, "long", prompt=5000, capacity=6000)
    add(plan, "a")
    plan.next_batch()
    assert ids(plan.next_batch().run) == ["a", "long"]
    plan.requeue("long")
    plan.remove("a")
    add(plan, "b")
    assert ids(plan.next_batch().run) == ["long"]


def test_requeued_session_is_tried_again_when_nothing_runs() -> None:
    plan = scheduler()
    add(plan, "a")
    plan.next_batch()
    plan.requeue("a")
    assert plan.next_batch().admit == ("a",)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_starves_and_limits_hold(seed: int) -> None:
    rnd = random.Random(seed)
    max_rows, max_sessions, budget = (
        rnd.randint(1, 5),
        rnd.randint(1, 8),
        rnd.choice((64, 300, 900)),
    )
    plan = scheduler(
        max_sessions=max_sessions, capacity=2000, max_rows=max_rows, max_step_tokens=budget
    )
    arrived: list[str] = []
    admitted: dict[str, int] = {}  # name: capacity
    capacity: dict[str, int] = {}
    paused: set[str] = set()
    unserved: dict[str, int] = {}
    for tick in range(300):
        if rnd.random() < 0.3:
            name = str(tick)
            capacity[name] = rnd.randint(50, 1500)
            add(
                plan,
                name,
                capacity=capacity[name],
                prompt=rnd.randint(1, 800),
                may_narrow=rnd.random() < 0.5,
                spacing=rnd.choice((0, 1, 32)),
            )
            arrived.append(name)
        for name in list(admitted):
            if rnd.random() < 0.05:
                plan.remove(name)
                del admitted[name], unserved[name]
                paused.discard(name)
            elif rnd.random() < 0.1:
                paused.add(name)
                plan.pause(name)
            elif rnd.random() < 0.3:
                paused.discard(name)
                plan.resume(name)
        batch = plan.next_batch()
        for name in batch.admit:
            assert name == arrived.pop(0), "first come, first served"
            admitted[name] = capacity[name]
            unserved[name] = 0
        assert sum(admitted.values()) <= 2000
        assert plan.num_running == len(admitted) <= max_sessions
        assert plan.num_waiting == len(arrived)
        served = ids(batch.run)
        assert len(served) == len(set(served)) <= max_rows
        assert set(served) <= set(admitted) - paused
        assert bool(served) == bool(set(admitted) - paused)
        for name, width in batch.run:
            plan.learn(name, width, rows=rnd.randint(1, 200), tokens=rnd.choice((0, 0, 9)))
        plan.learn_step(TimedStep(rnd.randint(1, 999), len(batch.run), rnd.uniform(0.1, 50)))
        assert all(width in WIDTHS for _, width in batch.run)
        for name in admitted:
            unserved[name] = 0 if name in served or name in paused else unserved[name] + 1
            assert unserved[name] <= max_sessions, "everybody's turn comes"
