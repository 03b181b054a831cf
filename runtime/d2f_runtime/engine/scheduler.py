"""Scheduler: who takes part in the next step, and how wide each one's window is.

Pure bookkeeping over session ids and token counts; knows neither decoders nor backends. Sessions
are admitted in order of arrival while slots and K/V last, and each step takes those that waited
longest. What a step takes by its rows, and what windows of each width bring, is learned from the
steps that ran; a step then holds as many sessions, and as wide windows, as bring most tokens per
millisecond. Only where a request allows it: the windows of any other are its own, so that its
answer is, too, and those of verified answers, whose text does not depend on them.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final, Generic, NamedTuple, TypeVar

from d2f_runtime.decoding.width import Width
from d2f_runtime.engine.allotment import Part, allot
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.running_session import RunningSession
from d2f_runtime.engine.step_cost import StepCost, TimedStep
from d2f_runtime.engine.width_gains import WidthGains
from d2f_stream.core.errors import OutOfCapacity

__all__ = ["Batch", "Scheduler"]

Id = TypeVar("Id", bound=Hashable)

MAX_KINDS: Final = 64
"""Kinds of requests whose gains are remembered."""


@dataclass(frozen=True, slots=True)
class Batch(Generic[Id]):
    """One step's plan.

    Attributes:
        admit: sessions that leave the queue now: open a slot for each, or `requeue` it.
        run: (session, width of its window) in row order, those of `admit` included; may be empty.
        decided: those of them whose width was decided for this step.
    """

    admit: tuple[Id, ...]
    run: tuple[tuple[Id, Width], ...]
    decided: tuple[Id, ...] = ()


class _Place(NamedTuple, Generic[Id]):
    """A session in line for a step: which widths it may have, and whether it may try one."""

    session_id: Id
    choices: Sequence[int]
    part: Part
    hopes: bool


class Scheduler(Generic[Id]):
    """Plans steps. Not thread-safe; lives on the event loop.

    Args:
        max_sessions: how many sessions may hold a slot at once.
        capacity_tokens: K/V storage of all slots together, tokens.
        max_rows: how many sessions may share a step.
        max_step_tokens: bound of a step's window tokens, as far as they are known beforehand. A
            session whose window alone exceeds it still runs, as the first of its step.
    """

    def __init__(
        self, *, max_sessions: int, capacity_tokens: int, max_rows: int, max_step_tokens: int
    ) -> None:
        self._max_sessions = max_sessions
        self._capacity_tokens = capacity_tokens
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._cost = StepCost()
        self._gains: dict[RequestKind, WidthGains] = {}
        self._probes: dict[RequestKind, Id] = {}  # who tries a width, of each kind one at most
        self._waiting: dict[Id, RunningSession] = {}  # in order of arrival
        self._running: dict[Id, RunningSession] = {}  # those that waited longest for a step first
        self._paused: set[Id] = set()
        self._is_full = False  # the backend refused a slot and none was freed since

    def add(
        self,
        session_id: Id,
        *,
        capacity_tokens: int,
        prompt_tokens: int,
        kind: RequestKind,
        may_narrow: bool = False,
    ) -> None:
        """Queue a session under an id that is not in use.

        `capacity_tokens` is the K/V storage it needs at most, `prompt_tokens` are the uncached ones
        (its first window is longer by them), `kind` is its request's, `may_narrow` whether others
        may narrow its windows; those of verified answers always may be narrowed.

        Raises:
            OutOfCapacity: it could not be admitted even alone.
        """
        if session_id in self._waiting or session_id in self._running:
            raise ValueError(f"session {session_id!r} is scheduled already")
        if capacity_tokens > self._capacity_tokens:
            raise OutOfCapacity(
                f"the request needs K/V for {capacity_tokens} tokens but the engine holds "
                f"{self._capacity_tokens}; shorten the prompt or lower max_new_tokens"
            )
        self._waiting[session_id] = RunningSession(
            kind,
            self._gains_of(kind),
            capacity_tokens=capacity_tokens,
            prompt_tokens=prompt_tokens,
            may_narrow=may_narrow,
        )

    def begin_at(self, session_id: Id, num_cached: int) -> None:
        """Note that a session's slot holds the first tokens of its prompt already."""
        self._running[session_id].begin_at(num_cached)

    def remove(self, session_id: Id) -> None:
        """Forget a session: finished, failed or cancelled. Idempotent."""
        self._waiting.pop(session_id, None)
        self._paused.discard(session_id)
        if (session := self._running.pop(session_id, None)) is not None:
            self._is_full = False
            self._end_probe(session_id, session)
            self._decide_anew()

    def requeue(self, session_id: Id) -> None:
        """Put a running session back at the head of the queue: no room, or it was preempted.

        Nobody is admitted before a running session is removed or none is left. Where nothing else
        runs, waiting does not help: `remove` it and fail the request.
        """
        session = self._running.pop(session_id)
        session.begin_anew()
        self._end_probe(session_id, session)
        self._waiting = {session_id: session, **self._waiting}
        self._is_full = True

    def pause(self, session_id: Id) -> None:
        """Leave a session out of steps: its reader is behind. It keeps its slot. Idempotent."""
        if session_id in self._waiting or session_id in self._running:
            self._paused.add(session_id)

    def resume(self, session_id: Id) -> None:
        """Let a paused session take part again. Idempotent."""
        self._paused.discard(session_id)

    def next_batch(self) -> Batch[Id]:
        """Plan the next step; call once per step. Those it runs go to the end of the line."""
        admit = self._admit()
        line = self._line()
        parts = [place.part for place in line]
        chosen = allot(parts, self._cost, max_rows=self._max_step_tokens)
        run: list[tuple[Id, Width]] = []
        decided = [place.session_id for place in line[: len(chosen)] if len(place.choices) > 1]
        for place, number in zip(line, chosen, strict=False):
            session_id, choice = place.session_id, place.choices[number]
            session = self._running[session_id] = self._running.pop(session_id)
            session.num_runs += 1
            session.width = choice
            if place.hopes and not session.gains.known(choice):
                session.probes = True
                self._probes[session.kind] = session_id
            run.append((session_id, session.kind.widths[choice]))
        return Batch(admit, tuple(run), tuple(decided))

    def take_back(self, batch: Batch[Id]) -> None:
        """Undo the run of a batch that did not come about: its sessions lead the line again."""
        led: dict[Id, RunningSession] = {}
        for session_id, _ in batch.run:
            if (session := self._running.pop(session_id, None)) is not None:
                session.num_runs -= 1
                if session_id in batch.decided:
                    session.width = None
                    self._end_probe(session_id, session)
                led[session_id] = session
        self._running = {**led, **self._running}

    def begin_with(self, timed: Iterable[TimedStep]) -> None:
        """Take steps into account that were timed beforehand."""
        self._cost = StepCost(timed)

    def learn_step(self, step: TimedStep) -> None:
        """Take what a step took into account."""
        self._cost.learn(step)

    def learn(self, session_id: Id, width: Width, *, rows: int, tokens: int) -> None:
        """Take what a session's part of a step brought into account, if it is still known.

        Args:
            session_id: its name.
            width: that the step was planned with.
            rows: that ran, the first one's prompt included.
            tokens: that were committed.
        """
        session = self._running.get(session_id)
        if session is None or not session.learn(width, rows=rows, tokens=tokens):
            return
        if session.probes and session.width is not None and not session.gains.tried(session.width):
            return
        session.width = None
        self._end_probe(session_id, session)

    @property
    def admits(self) -> bool:
        """Whether the next batch admits somebody."""
        if not self._waiting or (self._is_full and self._running):
            return False
        used = sum(session.capacity_tokens for session in self._running.values())
        return self._has_room(next(iter(self._waiting.values())), used)

    @property
    def num_running(self) -> int:
        """Number of sessions that hold a slot, paused ones included."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Number of sessions in the queue."""
        return len(self._waiting)

    def _admit(self) -> tuple[Id, ...]:
        if not self.admits:
            return ()
        self._is_full = False
        admitted: list[Id] = []
        self._decide_anew()
        used = sum(session.capacity_tokens for session in self._running.values())
        for session_id, session in self._waiting.items():
            if not self._has_room(session, used):
                break  # first come, first served: nobody overtakes
            used += session.capacity_tokens
            self._running[session_id] = session
            admitted.append(session_id)
        for session_id in admitted:
            del self._waiting[session_id]
        return tuple(admitted)

    def _has_room(self, session: RunningSession, used: int) -> bool:
        if len(self._running) == self._max_sessions:
            return False
        return used + session.capacity_tokens <= self._capacity_tokens

    def _line(self) -> list[_Place[Id]]:
        """Return who may take part, in order."""
        ready = (each for each in self._running.items() if each[0] not in self._paused)
        first = list(islice(ready, 2))
        is_alone = len(first) < 2
        asked: set[RequestKind] = set()
        line: list[_Place[Id]] = []
        room: float = self._max_step_tokens
        num_skipped = 0
        alike: dict[WidthGains, Part] = {}  # what sessions without a choice bring
        for session_id, session in chain(first, ready):
            decided, hopes = session.decided(is_alone=is_alone), False
            choices: Sequence[int]
            if decided is None:
                choices = range(len(session.kind.widths))
                hopes = session.kind not in asked and session.kind not in self._probes
                asked.add(session.kind)
            else:
                choices = (decided,)
            rows = session.next_rows(choices[0])
            if line and rows > room:
                num_skipped += 1  # keeps its place, so it leads a later step
                if num_skipped == self._max_rows:
                    break
                continue
            room -= rows
            has_alike = session.num_runs > 0 and not session.narrows
            part = alike.get(session.gains) if has_alike else None
            if part is None:
                part = _part(session, choices, hopes=hopes)
            if has_alike:
                alike[session.gains] = part
            line.append(_Place(session_id, choices, part, hopes))
            if len(line) == self._max_rows:
                break
        return line

    def _decide_anew(self) -> None:
        """Let all sessions have another width from now on, those that try one excepted."""
        for session in self._running.values():
            if not session.probes:
                session.width = None

    def _end_probe(self, session_id: Id, session: RunningSession) -> None:
        session.probes = False
        if self._probes.get(session.kind) == session_id:
            del self._probes[session.kind]

    def _gains_of(self, kind: RequestKind) -> WidthGains:
        gains = self._gains.pop(kind, None) or kind.gains()
        self._gains[kind] = gains  # those asked for last come last
        if len(self._gains) > MAX_KINDS:
            del self._gains[next(iter(self._gains))]
        return gains


def _part(session: RunningSession, choices: Sequence[int], *, hopes: bool) -> Part:
    gains = [session.gain(choice, hopes=hopes) for choice in choices]
    return Part(gains, session.prompt_rows)
