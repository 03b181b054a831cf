import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2f_runtime.engine.allotment import Part, allot
from d2f_runtime.engine.step_cost import StepCost, TimedStep
from d2f_runtime.engine.width_gains import Gain

SHAPES = st.tuples(st.integers(1, 6000), st.integers(1, 64))
STEPS = st.lists(
    st.builds(TimedStep, st.integers(1, 6000), st.integers(1, 64), st.floats(0.01, 500.0)),
    max_size=40,
)


def affine(rows: int, sessions: int) -> float:
    return 4.0 + 0.03 * rows + 0.1 * (sessions - 1)


@settings(max_examples=100)
@given(timed=STEPS, learned=STEPS, shape=SHAPES, more_rows=st.integers(0, 500))
def test_more_rows_or_sessions_never_cost_less(
    timed: list[TimedStep], learned: list[TimedStep], shape: tuple[int, int], more_rows: int
) -> None:
    cost = StepCost(timed)
    for step in learned:
        cost.learn(step)
    rows, sessions = shape
    assert 0.0 < cost.ms(rows, sessions) <= cost.ms(rows + more_rows, sessions) + 1e-9
    assert cost.ms(rows, sessions) <= cost.ms(rows, sessions + 1) + 1e-9


def test_steps_that_were_timed_are_met() -> None:
    shapes = [(1, 1), (32, 1), (128, 1), (512, 1), (256, 8)]
    cost = StepCost(TimedStep(*shape, affine(*shape)) for shape in shapes)
    for rows in (1, 20, 64, 200, 500, 900):
        assert cost.ms(rows, 1) == pytest.approx(affine(rows, 1), rel=0.01)
    assert cost.ms(200, 16) == pytest.approx(affine(200, 16), rel=0.01)


def test_a_step_of_noise_does_not_make_longer_ones_cheaper() -> None:
    cost = StepCost([TimedStep(1, 1, 5.0), TimedStep(32, 1, 3.0), TimedStep(64, 1, 8.0)])
    assert cost.ms(1, 1) == cost.ms(32, 1) == 4.0


def test_an_unknown_device_is_learned_where_it_is_used() -> None:
    cost, chance = StepCost(), random.Random(3)
    for _ in range(400):
        rows, sessions = chance.randint(1, 400), chance.randint(1, 16)
        cost.learn(TimedStep(rows, sessions, affine(rows, sessions) * chance.uniform(0.9, 1.1)))
    for shape in ((10, 1), (100, 4), (200, 16), (300, 8)):
        assert cost.ms(*shape) == pytest.approx(affine(*shape), rel=0.15)


def test_a_device_that_slows_down_does_so_for_shapes_that_do_not_occur_too() -> None:
    cost = StepCost([TimedStep(rows, 1, affine(rows, 1)) for rows in (1, 128, 512)])
    before = cost.ms(8, 1)
    for _ in range(100):
        cost.learn(TimedStep(400, 1, 2 * affine(400, 1)))
    assert cost.ms(400, 1) == pytest.approx(2 * affine(400, 1), rel=0.05)
    assert cost.ms(8, 1) > 1.1 * before


def stairs(rows: int) -> float:
    """One session's step, of which the first four rows cost as much as one."""
    return 4.0 + max(0, rows - 4)


@given(steps=st.lists(st.lists(st.sampled_from([1, 4, 8, 64]), min_size=1, max_size=16)))
def test_sessions_that_run_one_by_one_cost_what_each_does_alone(steps: list[list[int]]) -> None:
    shapes = (1, 4, 8, 16, 64)
    cost = StepCost((TimedStep(rows, 1, stairs(rows)) for rows in shapes), one_by_one=True)
    for each in steps:  # of prompts and windows alike
        cost.learn(TimedStep(sum(each), len(each), sum(map(stairs, each)), each))
    for rows in shapes:
        assert cost.ms(rows, 1) == pytest.approx(stairs(rows))
        assert cost.ms(9 * rows, 9) == pytest.approx(9 * stairs(rows))


@pytest.mark.parametrize("times", [0.5, 3.0])
def test_steps_of_sessions_one_by_one_tell_how_fast_the_device_is_now(times: float) -> None:
    cost = StepCost((TimedStep(rows, 1, stairs(rows)) for rows in (1, 4, 8, 64)), one_by_one=True)
    for each in ([64, 4, 4, 4], [4, 4, 4, 4]) * 100:  # one of them with a prompt
        cost.learn(TimedStep(sum(each), 4, times * sum(map(stairs, each)), each))
    assert cost.ms(4, 1) == pytest.approx(times * stairs(4), rel=0.1)
    assert cost.ms(64, 1) == pytest.approx(times * stairs(64), rel=0.1)


@given(more_ms=st.floats(0.0, 100.0), sessions=st.integers(1, 16))
def test_a_prompt_s_piece_beside_sessions_one_by_one_is_its_own_step(
    more_ms: float, sessions: int
) -> None:
    cost = StepCost((TimedStep(rows, 1, stairs(rows)) for rows in (1, 4, 64, 128)), one_by_one=True)
    rows = cost.rows_within(more_ms, rows=4 * sessions, sessions=sessions, most=100)
    assert rows == 0 or stairs(rows) <= more_ms + 1e-6
    assert rows == 100 or stairs(rows + 1) > more_ms - 1e-6


@pytest.mark.parametrize("rows", [128, 130, 150])
def test_rows_that_were_dear_for_a_while_are_so_no_longer(rows: int) -> None:
    """Steps of a knot's own rows tell nothing of the next one, which must not stay as it was."""
    shapes = (1, 32, 128, 192, 256, 512)
    cost = StepCost(TimedStep(known, 1, affine(known, 1)) for known in shapes)
    for _ in range(20):
        cost.learn(TimedStep(192, 1, 100 * affine(192, 1)))
    assert cost.ms(192, 1) > 2 * affine(192, 1)
    for _ in range(300):
        cost.learn(TimedStep(rows, 1, affine(rows, 1)))
    assert cost.ms(192, 1) < 1.15 * affine(192, 1)


def test_a_compiler_s_pause_says_little() -> None:
    cost = StepCost([TimedStep(rows, 1, affine(rows, 1)) for rows in (1, 128, 512)])
    cost.learn(TimedStep(100, 1, 2300.0))
    assert cost.ms(100, 1) < 1.35 * affine(100, 1)


def test_a_long_step_s_noise_does_not_make_sessions_dear() -> None:
    timed = [TimedStep(n, 1, affine(n, 1)) for n in (1, 128, 1024)]
    noisy = TimedStep(1024, 8, 1.1 * affine(1024, 8))
    cost = StepCost([*timed, TimedStep(16, 16, affine(16, 16)), noisy])
    assert cost.ms(16, 16) == pytest.approx(affine(16, 16), rel=0.01)


def test_sessions_that_were_thought_dear_run_together_again() -> None:
    """Alone, steps are dearer than thought: that must not make the others dearer still."""
    cost = StepCost([TimedStep(8, 1, 0.01), TimedStep(256, 1, 0.02), TimedStep(256, 16, 20.0)])
    parts = [Part([Gain(4.0, 16.0)])] * 16
    number = 0
    for _ in range(300):  # the device takes 2 ms whatever it is given
        number = len(allot(parts, cost, max_rows=1024))
        cost.learn(TimedStep(rows=16 * number, sessions=number, ms=2.0))
    assert number == 16


def test_nobody_runs_alone_for_good_after_steps_of_noise() -> None:
    cost, chance = StepCost(), random.Random(0)
    parts = [Part([Gain(1.0, 1.0)])] * 4
    for _ in range(12):  # others used the cores
        cost.learn(TimedStep(rows=1, sessions=1, ms=1.0))
        cost.learn(TimedStep(rows=4, sessions=4, ms=chance.uniform(10.0, 15.0)))
    assert cost.ms(4, 4) > 4 * cost.ms(1, 1)
    number = 0
    for _ in range(30):
        number = len(allot(parts, cost, max_rows=1024))
        cost.learn(TimedStep(rows=number, sessions=number, ms=1.2))
    assert number > 1


def test_step_alone_says_nothing_of_what_others_cost() -> None:
    cost = StepCost([TimedStep(8, 1, 1.0), TimedStep(256, 1, 1.5), TimedStep(64, 8, 2.0)])
    others_ms = cost.ms(8, 16) - cost.ms(8, 1)
    for _ in range(300):
        cost.learn(TimedStep(rows=8, sessions=1, ms=3.0))
    assert cost.ms(8, 1) > 2.0
    assert cost.ms(8, 16) - cost.ms(8, 1) == pytest.approx(others_ms)


@settings(max_examples=100)
@given(learned=STEPS, shape=SHAPES, times=st.floats(3.0, 1000.0))
def test_one_step_that_takes_far_too_long_changes_nothing(
    learned: list[TimedStep], shape: tuple[int, int], times: float
) -> None:
    shapes = [(1, 1), (128, 1), (512, 1), (2048, 1), (128, 16)]
    cost = StepCost(TimedStep(*known, affine(*known)) for known in shapes)
    for step in learned:
        cost.learn(TimedStep(step.rows, step.sessions, affine(step.rows, step.sessions)))
    before = [cost.ms(rows, sessions) for rows in (1, 16, 200, 3000) for sessions in (1, 16)]
    cost.learn(TimedStep(*shape, times * cost.ms(*shape)))
    after = [cost.ms(rows, sessions) for rows in (1, 16, 200, 3000) for sessions in (1, 16)]
    assert after == before


@settings(max_examples=100)
@example([TimedStep(1, 1, 1.0), TimedStep(1, 2, 2.0)], [TimedStep(2, 1, 1.0)], 2)
@given(timed=STEPS, learned=STEPS, num_sessions=st.integers(2, 64))
def test_a_further_session_costs_no_more_than_a_step_of_its_own(
    timed: list[TimedStep], learned: list[TimedStep], num_sessions: int
) -> None:
    cost = StepCost(timed)
    for step in learned:
        cost.learn(step)
    more_ms = cost.ms(1, num_sessions) - cost.ms(1, num_sessions - 1)
    assert more_ms <= cost.ms(1, 1) + 1e-9
