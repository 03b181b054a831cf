"""Scheduler: who takes part in the next step, and how wide each one's window is.

Pure bookkeeping over session ids and token counts; knows neither decoders nor backends. Sessions
are admitted in order of arrival while slots and K/V last, and each step takes those that waited
longest. What a step takes by its rows, and what windows of each width bring, is learned from the
steps that ran; a step then holds as many sessions, and as wide windows, as bring most tokens per
millisecond. Only where a request allows it: the windows of any other are its own, so that its
answer is, too, and those of verified answers, whose text does not depend on them.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Generic, TypeVar

from d2f_runtime.decoding.width import OWN, Width
from d2f_runtime.engine.allotment import allot
from d2f_runtime.engine.prompt_cuts import Piece, PromptCuts
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.running_session import RunningSession
from d2f_runtime.engine.step_cost import StepCost, TimedStep
from d2f_runtime.engine.step_line import StepBounds, line_up
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
        prompts: the pieces of prompts that it runs; a session whose piece is not the last one has
            no window in the step.
        after_long: whether a prompt had the step before it to itself.
    """

    admit: tuple[Id, ...]
    run: tuple[tuple[Id, Width], ...]
    decided: tuple[Id, ...] = ()
    prompts: Mapping[Id, Piece] = field(default_factory=dict)
    after_long: bool = False


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
        self._bounds = StepBounds(max_rows, max_step_tokens)
        self._was_long = False  # a prompt had the last step to itself
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
        prompt: PromptCuts,
        kind: RequestKind,
        may_narrow: bool = False,
    ) -> None:
        """Queue a session under an id that is not in use.

        `capacity_tokens` is the K/V storage it needs at most, `prompt` what its first steps store,
        `may_narrow` whether others may narrow its windows, as they may those of verified answers.

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
            prompt=prompt,
            may_narrow=may_narrow,
        )

    def begin_at(self, session_id: Id, num_cached: int, batch: Batch[Id]) -> Batch[Id]:
        """Return the batch that admits a session, whose slot holds the prompt's first tokens.

        What the batch runs of the prompt then begins behind them. Where its end comes into reach
        by that, the answer's window, which nobody planned for, is left to a later step unless the
        rows that are not needed hold it.
        """
        session, piece = self._running[session_id], batch.prompts.get(session_id)
        session.begin_at(num_cached)
        if piece is None:
            return batch
        if piece.is_last:
            piece = replace(piece, num_tokens=session.prompt_rows)
        else:
            own, room = len(session.kind.widths) - 1, piece.num_tokens
            piece = session.piece(room, choice=own, room=room)
        session.prompt_rows -= piece.num_tokens
        return replace(batch, prompts={**batch.prompts, session_id: piece})

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
        ready = [each for each in self._running.items() if each[0] not in self._paused]
        line = line_up(
            ready, self._cost, self._bounds, probed=self._probes.keys(), was_long=self._was_long
        )
        parts = [place.part for place in line]
        chosen = allot(parts, self._cost, max_rows=self._bounds.rows)
        run: list[tuple[Id, Width]] = []
        prompts: dict[Id, Piece] = {}
        decided = [place.session_id for place in line[: len(chosen)] if len(place.choices) > 1]
        for place, number in zip(line, chosen, strict=False):
            session_id = place.session_id
            session = self._running[session_id] = self._running.pop(session_id)
            if place.piece is not None:
                prompts[session_id] = place.piece
                session.prompt_rows -= place.piece.num_tokens
            if not place.choices:
                run.append((session_id, OWN))
                continue
            session.width = choice = place.choices[number]
            if place.hopes and not session.gains.known(choice):
                session.probes = True
                self._probes[session.kind] = session_id
            run.append((session_id, session.kind.widths[choice]))
        batch = Batch(admit, tuple(run), tuple(decided), prompts, self._was_long)
        self._was_long = any(each.num_tokens > self._bounds.rows for each in prompts.values())
        return batch

    def take_back(self, batch: Batch[Id]) -> None:
        """Undo the run of a batch that did not come about: its sessions lead the line again."""
        led: dict[Id, RunningSession] = {}
        for session_id, _ in batch.run:
            if (session := self._running.pop(session_id, None)) is not None:
                if session_id in batch.prompts:
                    session.prompt_rows += batch.prompts[session_id].num_tokens
                if session_id in batch.decided:
                    session.width = None
                    self._end_probe(session_id, session)
                led[session_id] = session
        self._running = {**led, **self._running}
        self._was_long = batch.after_long

    @property
    def max_rows(self) -> int:
        """How many sessions may share a step."""
        return self._bounds.sessions

    def share_steps(self, max_rows: int, *, one_by_one: bool = False) -> None:
        """Let so many sessions share a step, one by one or at once; before the first step."""
        self._bounds = self._bounds._replace(sessions=max_rows)
        self._cost = StepCost(one_by_one=one_by_one)

    def begin_with(self, timed: Iterable[TimedStep]) -> None:
        """Take steps into account that were timed beforehand."""
        self._cost = StepCost(timed, one_by_one=self._cost.one_by_one)

    def learn_step(self, step: TimedStep) -> None:
        """Take what a step took into account."""
        self._cost.learn(step)

    def learn(self, session_id: Id, width: Width, *, rows: int, tokens: int) -> None:
        """Take what a session's part of a step brought into account, if it is still known.

        Args:
            session_id: its name.
            width: that the step was planned with.
            rows: that ran, a prompt's left out.
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
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of running sessions that no step was planned for yet."""
        return sum(session.prompt_rows for session in self._running.values())

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
