"""How many rows each session of a step gets: those that bring most tokens per millisecond.

Pure arithmetic on what windows bring and what steps take. Where sessions run one after another,
each gets what is best for it alone. Elsewhere every session of the step gets its
narrowest window first, in order, as long as rows become no dearer by it; then the widenings that
bring most tokens for their rows, as long as they raise what the whole step brings per millisecond.
A prompt's rows are owed whatever width is chosen; they weigh in the budget, and in what further
rows cost.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Final, NamedTuple

from d2f_runtime.engine.step_cost import StepCost
from d2f_runtime.engine.width_gains import Gain

__all__ = ["Part", "allot"]

SLACK: Final = 0.9
"""A step takes fewer sessions than it could only where that is better by more than this."""


class Part(NamedTuple):
    """What a session may have of a step.

    Attributes:
        choices: what its windows bring and need, narrowest first; at least one.
        prompt_rows: that the step computes besides.
    """

    choices: Sequence[Gain]
    prompt_rows: int = 0


def allot(parts: Sequence[Part], cost: StepCost, *, max_rows: int) -> list[int]:
    """Return the number of the choice of each session that takes part: the first of `parts`.

    Args:
        parts: of those that may take part, in order; their narrowest windows fit into the step.
        cost: of steps.
        max_rows: of the step, prompts' included; its first session may exceed it by itself.
    """
    if cost.one_by_one:
        return _allot_apart(parts, cost, max_rows)
    num_sessions = _num_sessions(parts, cost)
    chosen = [0] * num_sessions
    widenings: list[tuple[float, int, int, Gain]] = []
    hulls: dict[int, Sequence[_Widening]] = {}  # sessions that are alike share their choices
    for number, part in enumerate(parts[:num_sessions]):
        if len(part.choices) > 1:
            hull = hulls.get(id(part.choices))
            if hull is None:
                hull = hulls[id(part.choices)] = _widenings(part.choices)
            widenings += [(slope, number, choice, more) for slope, choice, more in hull]
    if not widenings:
        return chosen
    widenings.sort(key=itemgetter(0), reverse=True)  # stable: those in front first
    rows = sum(part.choices[0].rows for part in parts[:num_sessions])
    tokens = sum(part.choices[0].tokens for part in parts[:num_sessions])
    prompt_rows = sum(part.prompt_rows for part in parts[:num_sessions])
    room = max_rows - prompt_rows
    # What the prompts' rows take is owed; how dear others are beside them is not.
    owed_ms = cost.ms(prompt_rows + rows, num_sessions) - cost.ms(rows, num_sessions)
    best, best_rate = 0, tokens / cost.ms(rows, num_sessions)
    taken: list[tuple[int, int]] = []
    full: set[int] = set()
    for _, number, choice, more in widenings:
        if number in full or rows + more.rows > room:
            full.add(number)
            continue
        rows += more.rows
        tokens += more.tokens
        taken.append((number, choice))
        rate = tokens / (cost.ms(prompt_rows + rows, num_sessions) - owed_ms)
        if rate >= best_rate:
            best, best_rate = len(taken), rate
    for number, choice in taken[:best]:
        chosen[number] = choice
    return chosen


def _allot_apart(parts: Sequence[Part], cost: StepCost, max_rows: int) -> list[int]:
    """Return the choices where no session makes another one's rows dearer."""
    chosen: list[int] = []
    room = max_rows - sum(part.choices[0].rows + part.prompt_rows for part in parts)
    for part in parts:
        least = part.choices[0]
        fitting = [
            number
            for number, gain in enumerate(part.choices)
            if number == 0 or gain.rows - least.rows <= room
        ]
        best = max(fitting, key=lambda number: _rate(part.choices[number], cost))
        room -= part.choices[best].rows - least.rows
        chosen.append(best)
    return chosen


def _rate(gain: Gain, cost: StepCost) -> float:
    return gain.tokens / cost.ms(gain.rows, 1)


def _num_sessions(parts: Sequence[Part], cost: StepCost) -> int:
    """Return for how many of the parts, the first ones, the step takes least for a row.

    The others' rows are due in the next step, so that what counts is the time of all of them, not
    what one session's bring more than another's. No session runs alone because steps of several are
    thought dearer than one by one: where that is a mistake, nobody would find out.
    """
    rows = 0.0
    ms: list[float] = []
    rates: list[float] = []
    for number, part in enumerate(parts, 1):
        rows += part.choices[0].rows + part.prompt_rows
        ms.append(cost.ms(rows, number))
        rates.append(rows / ms[-1])
    number = _last_near_best(rates)
    if number != 1 or len(parts) == 1:
        return number
    apart_ms = accumulate(cost.ms(each.choices[0].rows + each.prompt_rows, 1) for each in parts)
    return _last_near_best(
        [
            rate * max(1.0, each / apart)
            for rate, each, apart in zip(rates, ms, apart_ms, strict=True)
        ]
    )


def _last_near_best(rates: Sequence[float]) -> int:
    enough = SLACK * max(rates, default=0.0)
    return max((number for number, rate in enumerate(rates, 1) if rate >= enough), default=0)


class _Widening(NamedTuple):
    """A step along the hull of a session's choices: what it brings for a row, and in all."""

    slope: float
    choice: int
    more: Gain


def _widenings(choices: Sequence[Gain]) -> Sequence[_Widening]:
    """Return the steps along the choices' hull, the best ones first."""
    found: list[_Widening] = []
    at = 0
    while at + 1 < len(choices):
        here = choices[at]
        best: _Widening | None = None
        for choice in range(at + 1, len(choices)):
            there = choices[choice]
            more = Gain(there.tokens - here.tokens, max(there.rows - here.rows, 1e-6))
            slope = more.tokens / more.rows
            if best is None or slope >= best.slope:
                best = _Widening(slope, choice, more)
        assert best is not None
        if best.slope <= 0.0:
            break
        found.append(best)
        at = best.choice
    return found
