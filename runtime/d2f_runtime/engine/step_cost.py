"""StepCost: what a step takes by its rows and sessions, milliseconds.

A curve over rows that never falls, and something for each session beyond the first; where sessions
run one after another, what the curve says of each one's rows. Fitted to steps that were timed
beforehand, and moved by the times of all that follow: a device that is shared or warm changes its
speed as a whole, and the shapes that really occur are known best. Pure; the times come in as
arguments.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

__all__ = ["StepCost", "TimedStep"]

KNOTS: Final = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 768, 1024, 2048, 4096)
"""Rows between which the curve is straight."""
LOCAL: Final = 0.2
FRESH: Final = 0.5
"""Share of an error that goes into the curve where it was made, and where little is known."""
SCALE: Final = 0.05
"""Share of an error that moves everything."""
RETURN: Final = 0.02
"""Share of the way back to what was timed beforehand that a step takes others."""
ENOUGH: Final = 8
"""Steps after which a knot is known."""
ODD: Final = 2.0
"""Times what was expected, beyond which a step tells nothing unless the next one there does too."""
LEAST_MS: Final = 1e-4
SESSIONS: Final = 16
"""Sessions that weigh in an error as a whole knot does."""


class TimedStep(NamedTuple):
    """A step that was timed.

    Attributes:
        rows: positions that ran through the model, of all sessions together.
        sessions: that took part.
        ms: milliseconds.
        each: the rows of each session; () is as many of each.
    """

    rows: int
    sessions: int
    ms: float
    each: Sequence[int] = ()


class StepCost:
    """Predicts a step's time; not known at all, it guesses the shape, which the first step scales.

    Attributes:
        one_by_one: whether the sessions of a step run one after another.

    Args:
        timed: steps of one session each, and some of several; () knows nothing.
        one_by_one: see the attribute.
    """

    def __init__(self, timed: Iterable[TimedStep] = (), *, one_by_one: bool = False) -> None:
        self.one_by_one = one_by_one
        self._session_ms = 0.0
        self._knots_ms = [math.sqrt(rows) for rows in KNOTS]
        self._seen = [0] * len(KNOTS)  # steps that told something of a knot
        self._was_odd = [False] * len(KNOTS)  # whether the last step there took too long by far
        self._fit(list(timed))
        self._warm_ms = list(self._knots_ms) if any(self._seen) else []

    def ms(self, rows: float, sessions: int) -> float:
        """Return the milliseconds that a step should take; beyond the last knot, by its slope."""
        if self.one_by_one and sessions > 1:
            return sessions * self.ms(rows / sessions, 1)
        index = self._segment(rows)
        first, last = KNOTS[index], KNOTS[index + 1]
        low, high = self._knots_ms[index], self._knots_ms[index + 1]
        ms = low
        if rows > first:
            ms += (high - low) * (rows - first) / (last - first)
        if sessions > 1:  # alone it costs a step at most
            ms += min(self._session_ms, self._knots_ms[0]) * (sessions - 1)
        return ms if ms > LEAST_MS else LEAST_MS

    def rows_within(self, more_ms: float, *, rows: float, sessions: int, most: int) -> int:
        """Return how many rows, of one more session, a step may have besides for so much more.

        Beyond what was seen each row is taken to cost as much as one did so far: a guess too high,
        which grows less with each step that goes a little further.

        Args:
            more_ms: milliseconds.
            rows: of the step.
            sessions: of the step.
            most: that are asked for.
        """
        limit_ms = more_ms if self.one_by_one else self.ms(rows, sessions) + more_ms
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.one_by_one:
                ms = self._cautious_ms(middle, 1)
            else:
                ms = self._cautious_ms(rows + middle, sessions + 1)
            if ms <= limit_ms:
                low = middle
            else:
                high = middle - 1
        return low

    def _cautious_ms(self, rows: float, sessions: int) -> float:
        last = max((knot for knot, times in enumerate(self._seen) if times), default=0)
        linear_ms = self._knots_ms[last] * rows / KNOTS[last]
        ms = self.ms(rows, sessions)
        return ms if rows <= KNOTS[last] else max(ms, linear_ms)

    def learn(self, step: TimedStep) -> None:
        """Take a step's time into account."""
        if step.rows < 1 or step.ms <= 0.0:
            return
        if not self.one_by_one:
            self._learn(step, 1.0)
            return
        # Nobody knows whose part took longer than thought: all did, as much as they are thought to.
        each = Counter(step.each or [max(1, step.rows // step.sessions)] * step.sessions)
        expected = {rows: self.ms(rows, 1) for rows in each}
        times = step.ms / sum(number * expected[rows] for rows, number in each.items())
        for rows, number in each.items():
            part = TimedStep(rows, 1, times * expected[rows])
            self._learn(part, number * part.ms / step.ms)

    def _learn(self, step: TimedStep, weight: float) -> None:
        expected = self.ms(step.rows, step.sessions)
        if not any(self._seen):
            self._knots_ms = [ms * step.ms / expected for ms in self._knots_ms]
            expected = step.ms
        index = self._segment(step.rows)
        was_odd, self._was_odd[index] = self._was_odd[index], step.ms > ODD * expected
        if self._was_odd[index] and not was_odd:
            return  # a compiler, or a pause; what is so slow again is slow
        ratio = min(2.0, max(0.5, step.ms / expected))
        is_known = min(self._seen[index : index + 2]) >= ENOUGH
        if is_known:  # it is the device that has changed
            factor = ratio ** (SCALE * weight)
            self._knots_ms = [ms * factor for ms in self._knots_ms]
            if step.sessions > 1:  # one alone says nothing of what others cost
                self._session_ms *= factor
            expected *= factor
        error_ms = (LOCAL if is_known else FRESH) * weight * (ratio - 1.0) * expected
        self._correct(step, error_ms, others=(step.sessions - 1) / SESSIONS if is_known else 0.0)

    def _correct(self, step: TimedStep, error_ms: float, *, others: float) -> None:
        """Share an error out among what made it, and let no longer step become cheaper."""
        index = self._segment(step.rows)
        first, last = KNOTS[index], KNOTS[index + 1]
        along = min(1.0, max(0.0, (step.rows - first) / (last - first)))
        norm = (1 - along) ** 2 + along**2 + others**2
        knots = self._knots_ms
        for knot, share in ((index, 1 - along), (index + 1, along)):
            knots[knot] = max(0.0, knots[knot] + error_ms * share / norm)
            self._seen[knot] += share > 0.0
        self._session_ms = max(0.0, self._session_ms + error_ms * others / norm / SESSIONS)
        if step.sessions > 1:
            self._keep_known(index, step.sessions)
        # A step of its own is the most that a session can cost. Thought dearer, sessions would run
        # one by one, and nobody found out.
        self._session_ms = min(self._session_ms, knots[0])
        if knots[index] > knots[index + 1]:
            knots[index] = knots[index + 1] = (knots[index] + knots[index + 1]) / 2
        self._guess_unseen()
        self._remember(index, along)
        for below in range(index):
            knots[below] = min(knots[below], knots[index])
        for above in range(index + 2, len(knots)):
            knots[above] = max(knots[above], knots[index + 1])

    def _remember(self, index: int, along: float) -> None:
        """Let knots of which a step told nothing return to the shape that was timed, at its speed.

        What was found dear for a while would else never be tried again.

        Args:
            index: of the segment that the step was in.
            along: how far, from 0 to 1; at either end it told nothing of the other one.
        """
        if not self._warm_ms:
            return
        knots, warm = self._knots_ms, self._warm_ms
        told = {index: 1.0 - along, index + 1: along}
        speed = sum(share * knots[knot] for knot, share in told.items())
        speed /= sum(share * warm[knot] for knot, share in told.items())
        for knot in range(len(knots)):
            rate = RETURN * (1.0 - told.get(knot, 0.0))
            knots[knot] += rate * (warm[knot] * speed - knots[knot])

    def _keep_known(self, index: int, sessions: int) -> None:
        """Let a step of many sessions make none of fewer rows cheaper than it is known to be.

        It cannot tell rows from sessions, so what it was too dear by was the sessions.
        """
        knots = self._knots_ms
        known = (knots[knot] for knot in range(index) if self._seen[knot] >= ENOUGH)
        lacks_ms = max(known, default=0.0) - knots[index]
        if lacks_ms > 0.0:
            knots[index] += lacks_ms
            knots[index + 1] = max(knots[index + 1], knots[index])
            self._session_ms = max(0.0, self._session_ms - lacks_ms / (sessions - 1))

    def _guess_unseen(self) -> None:
        """Let knots beyond those that were seen follow from the nearest one.

        A guess too low is found out as soon as it is acted upon, one too high never is: so that
        fewer rows are hoped to cost much less, and more rows hardly more.
        """
        seen = [knot for knot, times in enumerate(self._seen) if times]
        first, last = seen[0], seen[-1]
        for knot in range(first):
            self._knots_ms[knot] = self._knots_ms[first] * (KNOTS[knot] / KNOTS[first]) ** 0.75
        for knot in range(last + 1, len(KNOTS)):
            self._knots_ms[knot] = self._knots_ms[last] * (KNOTS[knot] / KNOTS[last]) ** 0.25

    def _segment(self, rows: float) -> int:
        return bisect_right(KNOTS, rows, 1, len(KNOTS) - 1) - 1

    def _fit(self, timed: Sequence[TimedStep]) -> None:
        alone = sorted(step for step in timed if step.sessions == 1)
        if not alone:
            return
        points = _rising({step.rows: step.ms for step in reversed(alone)})  # the least of each
        self._knots_ms = [_between(points, rows) for rows in KNOTS]
        first, last = points[0][0], points[-1][0]
        beyond = 0 if first == last else 1  # a straight line is a guess, but no bare one
        self._seen = [ENOUGH if first <= rows <= last else beyond for rows in KNOTS]
        self._seen[self._segment(first)] = ENOUGH
        extra = [
            (step.ms - self.ms(step.rows, 1)) / (step.sessions - 1)
            for step in timed
            if step.sessions > 1
        ]
        # The least: a long step's noise is more than its sessions, and sessions that are thought
        # dear would run one by one, so that nobody found out.
        least_ms = min(extra, default=0.0)
        self._session_ms = min(max(0.0, least_ms), self._knots_ms[0])


def _rising(points: dict[int, float]) -> list[tuple[int, float]]:
    """Return the points by rows, those that fall made level with their mean (isotonic)."""
    pools: list[tuple[list[int], float]] = []
    for rows, ms in sorted(points.items()):
        pools.append(([rows], ms))
        while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
            (later, high), (earlier, low) = pools.pop(), pools.pop()
            mean = (low * len(earlier) + high * len(later)) / (len(earlier) + len(later))
            pools.append((earlier + later, mean))
    return [(rows, ms) for pool, ms in pools for rows in pool]


def _between(points: Sequence[tuple[int, float]], rows: int) -> float:
    """Return a rising curve's value: level before its first point, straight on after its last."""
    if rows <= points[0][0]:
        return points[0][1]
    for (first, low), (last, high) in pairwise(points):
        if rows <= last:
            return low + (high - low) * (rows - first) / (last - first)
    last, high = points[-1]
    if len(points) == 1:
        return high * math.sqrt(max(1.0, rows / last))
    first, low = points[-2]
    return high + (high - low) * (rows - last) / (last - first)
