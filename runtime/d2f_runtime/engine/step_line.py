"""The line for a step: who may take part, in order, and how much of their prompts runs in it.

Prompts are worked off beside the windows of others, in pieces that keep these from waiting: a step
becomes longer by about DELAY_MS at most for the sake of prompts, or by DELAY_SHARE of what it takes
without them where that is more, as on CPUs. What fits is a question of what steps cost, see
`StepCost.rows_within`. Where nobody waits for a window, the bound of a step's rows is the only one.

A prompt that cannot be cut runs in one step. One that fits into no step of others has a step to
itself, and never two such steps follow each other while others wait. Pure.
"""

import math
from collections.abc import Collection, Hashable, Sequence
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar

from d2f_runtime.engine.allotment import Part
from d2f_runtime.engine.prompt_cuts import Piece
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.running_session import RunningSession
from d2f_runtime.engine.step_cost import StepCost
from d2f_runtime.engine.width_gains import Gain, WidthGains

__all__ = ["DELAY_MS", "DELAY_SHARE", "LEAST_PIECE", "Place", "StepBounds", "line_up"]

Id = TypeVar("Id", bound=Hashable)

DELAY_MS: Final = 8.0
"""Allowed for by what steps cost on average; where 10 were, the slowest step took 12 ms more."""
DELAY_SHARE: Final = 1.0
LEAST_PIECE: Final = 16
"""Tokens of a prompt that a step runs in any case, so that every prompt comes to its end."""

NOTHING: Final = (Gain(0.0, 0.0),)


class StepBounds(NamedTuple):
    """What a step may hold.

    Attributes:
        sessions: how many.
        rows: of all sessions, as far as they are known beforehand.
    """

    sessions: int
    rows: int


class Place(NamedTuple, Generic[Id]):
    """A session in line for a step.

    Attributes:
        session_id: its name.
        choices: numbers of the widths that its window may have; () where it has none.
        part: what it may have of the step.
        hopes: whether it may try a width of which too little is known.
        piece: of its prompt.
    """

    session_id: Id
    choices: Sequence[int]
    part: Part
    hopes: bool
    piece: Piece | None


def line_up(
    ready: Sequence[tuple[Id, RunningSession]],
    cost: StepCost,
    bounds: StepBounds,
    *,
    probed: Collection[RequestKind],
    was_long: bool = False,
) -> list[Place[Id]]:
    """Return who may take part, in order.

    Args:
        ready: sessions that wait for a step, those that waited longest first.
        cost: of steps.
        bounds: of the step; its first session may exceed the rows by itself.
        probed: kinds of which a session tries a width already.
        was_long: whether a prompt had the step before to itself.
    """
    is_alone = len(ready) < 2
    prompts = _Prompts(ready, cost, bounds, is_alone=is_alone)
    asked = set(probed)
    line: list[Place[Id]] = []
    room: float = bounds.rows
    num_skipped = 0
    alike: dict[tuple[WidthGains, float, bool, int, int], Sequence[Gain]] = {}
    for session_id, session in ready:
        hopes, choices = False, _choices(session, is_alone=is_alone)
        piece = prompts.next_piece(session, choices[0]) if session.prompt_rows else None
        if session.prompt_rows and piece is None:
            continue
        if piece is not None and not piece.is_last:
            choices = ()
        elif len(choices) > 1:
            hopes = session.kind not in asked
        prompt_rows = 0 if piece is None else piece.num_tokens
        rows = prompt_rows + (session.next_rows(choices[0]) if choices else 0)
        if rows > room and (line or (was_long and prompt_rows > bounds.rows)):
            num_skipped += 1  # keeps its place, so it leads a later step
            if num_skipped == bounds.sessions:
                break
            continue
        room -= rows
        if len(choices) > 1:
            asked.add(session.kind)
        if piece is not None:
            prompts.take(piece, rows)
        gains: Sequence[Gain] = NOTHING
        if choices:
            like = session.gains, session.speed, hopes, choices[0], len(choices)
            if like not in alike:
                alike[like] = [session.gain(choice, hopes=hopes) for choice in choices]
            gains = alike[like]
        line.append(Place(session_id, choices, Part(gains, prompt_rows), hopes, piece))
        if len(line) == bounds.sessions:
            break
    if not line and ready and was_long:
        return line_up(ready, cost, bounds, probed=probed)
    return line


def _choices(session: RunningSession, *, is_alone: bool) -> Sequence[int]:
    decided = session.decided(is_alone=is_alone)
    return range(len(session.kind.widths)) if decided is None else (decided,)


class _Prompts:
    """How many rows of prompts a step may still hold; worked out where there are any."""

    def __init__(
        self,
        ready: Sequence[tuple[object, RunningSession]],
        cost: StepCost,
        bounds: StepBounds,
        *,
        is_alone: bool,
    ) -> None:
        self._ready = ready
        self._cost = cost
        self._bounds = bounds
        self._is_alone = is_alone
        self._is_first = True
        self._left: int | None = None  # of prompts alone
        self._room = math.inf  # of prompts, and of the windows that come with their last pieces

    def next_piece(self, session: RunningSession, choice: int) -> Piece | None:
        """Return the piece of a session's prompt that this step may run; None where none is.

        Args:
            session: with a prompt.
            choice: number of the width of its first window.
        """
        if self._left is None:
            self._left = self._rows()
        piece = session.piece(max(self._left, LEAST_PIECE), choice=choice, room=self._room)
        if self._is_first or piece.num_tokens <= self._left:
            return piece
        return None

    def take(self, piece: Piece, rows: float) -> None:
        """Note that a piece runs, in so many rows with what comes with it."""
        assert self._left is not None
        self._left -= piece.num_tokens
        self._room -= rows
        self._is_first = False

    def _rows(self) -> int:
        """Return how many rows of prompts the windows of others leave to this step."""
        deciding = (session for _, session in self._ready if not session.prompt_rows)
        rows, sessions = 0.0, 0
        for session in islice(deciding, self._bounds.sessions):
            rows += session.next_rows(_choices(session, is_alone=self._is_alone)[0])
            sessions += 1
        most = max(0, self._bounds.rows - math.ceil(rows))
        if not sessions:  # the first one may exceed the bound by its window
            return most
        self._room = self._bounds.rows - rows
        more_ms = max(DELAY_MS, DELAY_SHARE * self._cost.ms(rows, sessions))
        return self._cost.rows_within(more_ms, rows=rows, sessions=sessions, most=most)
