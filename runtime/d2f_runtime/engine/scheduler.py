"""Scheduler: who takes part in the next step, and how many blocks each may denoise.

Pure bookkeeping over session ids and token counts; knows neither decoders nor backends. Sessions
are admitted in order of arrival while slots and K/V last, and each step takes those that waited
longest. Where a session allows it, its window narrows as sessions grow, before anybody waits: D2F
buys latency with extra rows, and beyond `max_step_tokens` a step's cost grows with its rows. The
window of any other session is its own request's alone, so that its answer is, too.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from d2f_stream.core.errors import OutOfCapacity

__all__ = ["Batch", "Scheduler"]

Id = TypeVar("Id", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Batch(Generic[Id]):
    """One step's plan.

    Attributes:
        admit: sessions that leave the queue now: open a slot for each, or `requeue` it.
        run: (session, max_active_blocks) in row order, those of `admit` included; may be empty.
            None is no bound.
    """

    admit: tuple[Id, ...]
    run: tuple[tuple[Id, int | None], ...]


@dataclass(slots=True)
class _Session:
    capacity_tokens: int
    prompt_tokens: int
    block_size: int
    max_active_blocks: int | None
    may_narrow: bool
    num_runs: int = 0

    def bound(self, share: int) -> int | None:
        if not self.may_narrow:
            return self.max_active_blocks
        fitting = max(1, share // self.block_size - 1)  # one more may wait to be cached
        return fitting if self.max_active_blocks is None else min(fitting, self.max_active_blocks)

    def window_tokens(self, max_active_blocks: int | None) -> int:
        if not self.num_runs:
            return self.prompt_tokens + self.block_size
        if max_active_blocks is None:
            answer_tokens = self.capacity_tokens - self.prompt_tokens
            return max(answer_tokens, 2 * self.block_size)
        return (max_active_blocks + 1) * self.block_size  # an estimate


class Scheduler(Generic[Id]):
    """Plans steps. Not thread-safe; lives on the event loop.

    Args:
        max_sessions: how many sessions may hold a slot at once.
        capacity_tokens: K/V storage of all slots together, tokens.
        max_rows: how many sessions may share a step.
        max_step_tokens: aim for the window tokens of a step. A session whose window alone exceeds
            it still runs, as the first of its step.
    """

    def __init__(
        self, *, max_sessions: int, capacity_tokens: int, max_rows: int, max_step_tokens: int
    ) -> None:
        self._max_sessions = max_sessions
        self._capacity_tokens = capacity_tokens
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._waiting: dict[Id, _Session] = {}  # in order of arrival
        self._running: dict[Id, _Session] = {}  # those that waited longest for a step first
        self._paused: set[Id] = set()
        self._is_full = False  # the backend refused a slot and none was freed since

    def add(
        self,
        session_id: Id,
        *,
        capacity_tokens: int,
        prompt_tokens: int,
        block_size: int,
        max_active_blocks: int | None,
        may_narrow: bool = False,
    ) -> None:
        """Queue a session under an id that is not in use.

        `capacity_tokens` is the K/V storage it needs at most, `prompt_tokens` are the uncached ones
        (its first window is longer by them), `max_active_blocks` is the request's own bound,
        `may_narrow` whether others may lower that.

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
        self._waiting[session_id] = _Session(
            capacity_tokens, prompt_tokens, block_size, max_active_blocks, may_narrow
        )

    def remove(self, session_id: Id) -> None:
        """Forget a session: finished, failed or cancelled. Idempotent."""
        self._waiting.pop(session_id, None)
        self._paused.discard(session_id)
        if self._running.pop(session_id, None) is not None:
            self._is_full = False

    def requeue(self, session_id: Id) -> None:
        """Put a running session back at the head of the queue: no room, or it was preempted.

        Nobody is admitted before a running session is removed or none is left. Where nothing else
        runs, waiting does not help: `remove` it and fail the request.
        """
        session = self._running.pop(session_id)
        session.num_runs = 0
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
        ready = [session_id for session_id in self._running if session_id not in self._paused]
        share = self._max_step_tokens // max(1, min(len(ready), self._max_rows))
        room = self._max_step_tokens
        run: list[tuple[Id, int | None]] = []
        for session_id in ready:
            session = self._running[session_id]
            max_active_blocks = session.bound(share)
            tokens = session.window_tokens(max_active_blocks)
            if run and tokens > room:
                continue  # keeps its place, so it leads a later step
            room -= tokens
            run.append((session_id, max_active_blocks))
            session.num_runs += 1
            self._running[session_id] = self._running.pop(session_id)
            if len(run) == self._max_rows:
                break
        return Batch(admit, tuple(run))

    def take_back(self, batch: Batch[Id]) -> None:
        """Undo the run of a batch that did not come about: its sessions lead the line again."""
        led: dict[Id, _Session] = {}
        for session_id, _ in batch.run:
            if (session := self._running.pop(session_id, None)) is not None:
                session.num_runs -= 1
                led[session_id] = session
        self._running = {**led, **self._running}

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

    def _has_room(self, session: _Session, used: int) -> bool:
        if len(self._running) == self._max_sessions:
            return False
        return used + session.capacity_tokens <= self._capacity_tokens
