import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.engine.allotment import Part, allot
from d2f_runtime.engine.step_cost import StepCost, TimedStep
from d2f_runtime.engine.width_gains import Gain


@st.composite
def concave_choices(draw: st.DrawFn) -> list[Gain]:
    """Windows that bring more the wider they are, but less and less for a row."""
    tokens, rows, slope = draw(st.floats(0.5, 4.0)), draw(st.floats(1.0, 40.0)), 0.5
    choices = [Gain(tokens, rows)]
    for _ in range(draw(st.integers(0, 2))):
        slope *= draw(st.floats(0.05, 0.9))
        more = draw(st.floats(1.0, 60.0))
        tokens, rows = tokens + slope * more, rows + more
        choices.append(Gain(tokens, rows))
    return choices


COSTS = st.builds(
    lambda fixed, row: StepCost([TimedStep(n, 1, fixed + row * n) for n in (1, 4096)]),
    st.floats(0.1, 20.0),
    st.floats(0.0, 0.2),
)


def rate(parts: list[Part], chosen: list[int], cost: StepCost) -> float:
    gains = [part.choices[choice] for part, choice in zip(parts, chosen, strict=False)]
    rows = sum(gain.rows for gain in gains)
    return sum(gain.tokens for gain in gains) / cost.ms(rows, len(gains))


@settings(max_examples=200)
@given(
    parts=st.lists(st.builds(Part, concave_choices(), st.integers(0, 300)), max_size=4),
    cost=COSTS,
)
def test_no_other_widths_bring_more_per_millisecond(parts: list[Part], cost: StepCost) -> None:
    chosen = allot(parts, cost, max_rows=10_000)
    assert bool(chosen) == bool(parts)
    if not parts:
        return
    others = itertools.product(*(range(len(part.choices)) for part in parts[: len(chosen)]))
    best = max(rate(parts, list(other), cost) for other in others)
    assert rate(parts, chosen, cost) >= 0.97 * best  # a widening is taken as a whole


@given(
    parts=st.lists(st.builds(Part, concave_choices(), st.integers(0, 300)), min_size=1, max_size=8),
    cost=COSTS,
    max_rows=st.integers(400, 900),
    one_by_one=st.booleans(),
)
def test_widenings_keep_within_the_step(
    parts: list[Part], cost: StepCost, max_rows: int, one_by_one: bool
) -> None:
    cost.one_by_one = one_by_one
    chosen = allot(parts, cost, max_rows=max_rows)
    taking = list(zip(parts, chosen, strict=False))
    least = sum(part.choices[0].rows + part.prompt_rows for part, _ in taking)
    rows = sum(part.choices[choice].rows + part.prompt_rows for part, choice in taking)
    assert rows <= max(least, max_rows)


@given(
    parts=st.lists(st.builds(Part, concave_choices(), st.integers(0, 300)), min_size=1, max_size=8),
    fixed=st.floats(0.1, 20.0),
    row=st.floats(0.0, 0.2),
)
def test_sessions_that_run_one_by_one_are_as_wide_as_they_are_alone(
    parts: list[Part], fixed: float, row: float
) -> None:
    cost = StepCost((TimedStep(n, 1, fixed + row * n) for n in (1, 4096)), one_by_one=True)
    chosen = allot(parts, cost, max_rows=10_000)
    assert chosen == [allot([part], cost, max_rows=10_000)[0] for part in parts]
    for part, choice in zip(parts, chosen, strict=True):
        best = max(rate([part], [other], cost) for other in range(len(part.choices)))
        assert rate([part], [choice], cost) == best


def test_sessions_beyond_what_pays_wait() -> None:
    cost = StepCost([TimedStep(n, 1, 5.0 if n <= 128 else 50.0) for n in (1, 128, 192, 400)])
    parts = [Part([Gain(4.0, 60.0)])] * 4
    assert allot(parts, cost, max_rows=1000) == [0, 0]
