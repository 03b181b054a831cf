"""Scheduler: who gets a slot, who runs in a step, and in which order."""

import random

import pytest

from d2f_runtime.decoding.width import OWN, Width
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.step_cost import TimedStep
from d2f_stream.core.errors import OutOfCapacity
from d2f_stream.core.params import GenerationParams
from scheduling import add, scheduler

WIDTHS = RequestKind.of(GenerationParams(), 32).widths


def ids(run: tuple[tuple[str, Width], ...]) -> list[str]:
    return [name for name, _ in run]


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
