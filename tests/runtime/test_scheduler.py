import random

import pytest

from d2f_runtime.engine.scheduler import Scheduler
from d2f_stream.core.errors import OutOfCapacity


def scheduler(
    *, max_sessions: int = 8, capacity: int = 10_000, max_rows: int = 8, max_step_tokens: int = 640
) -> Scheduler[str]:
    return Scheduler(
        max_sessions=max_sessions,
        capacity_tokens=capacity,
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
    )


def add(
    plan: Scheduler[str],
    *names: str,
    capacity: int = 300,
    prompt: int = 8,
    bound: int | None = 4,
    may_narrow: bool = True,
) -> None:
    for name in names:
        plan.add(
            name,
            capacity_tokens=capacity,
            prompt_tokens=prompt,
            block_size=32,
            max_active_blocks=bound,
            may_narrow=may_narrow,
        )


def ids(run: tuple[tuple[str, int | None], ...]) -> list[str]:
    return [name for name, _ in run]


def test_session_is_admitted_and_run_in_one_batch() -> None:
    plan = scheduler()
    add(plan, "a")
    batch = plan.next_batch()
    assert (batch.admit, batch.run) == (("a",), (("a", 4),))
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


def test_windows_narrow_as_sessions_grow_before_anybody_waits() -> None:
    bounds = []
    for count in range(1, 11):
        plan = scheduler(max_sessions=16, max_rows=16)
        add(plan, *"abcdefghij"[:count])
        plan.next_batch()
        run = plan.next_batch().run
        assert len(run) == count
        bounds.append(run[0][1])
    assert bounds == [4, 4, 4, 4, 3, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("bound", [1, 4, None])
def test_windows_of_sessions_that_must_not_narrow_are_their_own(bound: int | None) -> None:
    plan = scheduler(max_sessions=16, max_rows=16)
    add(plan, *"abcdefghij", bound=bound, may_narrow=False)
    add(plan, "narrows", bound=4)
    bounds = {run for _ in range(40) for run in plan.next_batch().run if run[0] != "narrows"}
    assert bounds == {(name, bound) for name in "abcdefghij"}


def test_sessions_that_must_not_narrow_take_turns_where_a_step_cannot_hold_them() -> None:
    plan = scheduler(max_sessions=16, max_rows=16)
    add(plan, *"abcdefgh", may_narrow=False)
    plan.next_batch()
    steps = [ids(plan.next_batch().run) for _ in range(4)]
    assert [len(step) for step in steps] == [4, 4, 4, 4]  # (4 + 1) x 32 of 640 tokens each
    assert set(steps[0]) | set(steps[1]) == set("abcdefgh")


def test_unbounded_window_counts_as_its_whole_answer() -> None:
    plan = scheduler()
    add(plan, "a", "b", bound=None, capacity=508, may_narrow=False)
    plan.next_batch()
    assert [ids(plan.next_batch().run) for _ in range(2)] == [["a"], ["b"]]


def test_paused_sessions_do_not_narrow_others() -> None:
    plan = scheduler()
    add(plan, *"abcdefgh")
    for name in "bcdefgh":
        plan.pause(name)
    assert plan.next_batch().run == (("a", 4),)


def test_unbounded_request_gets_what_fits() -> None:
    plan = scheduler()
    add(plan, "a", bound=None)
    assert plan.next_batch().run == (("a", 19),)


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
                bound=rnd.choice((None, 1, 4)),
                may_narrow=rnd.random() < 0.5,
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
        assert all(bound is None or bound >= 1 for _, bound in batch.run)
        for name in admitted:
            unserved[name] = 0 if name in served or name in paused else unserved[name] + 1
            assert unserved[name] <= max_sessions, "everybody's turn comes"
