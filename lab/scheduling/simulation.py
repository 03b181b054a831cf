"""Simulates an engine: real decoders and scheduler, and a clock that a step curve moves.

A closed loop: so many clients, each of which asks anew as soon as it has its answer.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from d2f_runtime.backends.scripted import SCRIPTED_INFO
from d2f_runtime.decoding.decoder import Committed
from d2f_runtime.decoding.width import Width
from d2f_runtime.decoding.window import Window
from d2f_runtime.engine.prompt_cuts import Piece, PromptCuts
from d2f_runtime.engine.request_kind import RequestKind, least_part
from d2f_runtime.engine.scheduler import Scheduler
from d2f_runtime.engine.step_cost import TimedStep
from lab.scheduling.curves import StepCurve
from lab.scheduling.workloads import MASK, PLAIN, PROMPT_TOKENS, Request, Workload

__all__ = ["Fixed", "Outcome", "Paying", "Planner", "kind_of", "simulate"]

MAX_ROWS = 16
MAX_STEP_TOKENS = 1024


class Planner(Protocol):
    """Who plans the steps."""

    def add(self, session_id: int) -> None:
        """Take a session on."""
        ...

    def plan(self) -> Sequence[tuple[int, Width, Piece | None]]:
        """Return whose windows run next, how wide they are, and how much of their prompts."""
        ...

    def learn(self, session_id: int, width: Width, *, rows: int, tokens: int) -> None:
        """Take a session's part of a step into account."""
        ...

    def learn_step(self, step: TimedStep) -> None:
        """Take a step into account."""
        ...

    def remove(self, session_id: int) -> None:
        """Forget a session."""
        ...


def kind_of(workload: Workload) -> RequestKind:
    """Return the kind of a workload's requests, whose blocks may join in parts, as LLaDA's may."""
    size = workload.params.block_size
    return RequestKind.of(workload.params, size, least_part=least_part(SCRIPTED_INFO, size))


class Paying:
    """The engine's own scheduler."""

    def __init__(
        self,
        workload: Workload,
        timed: Sequence[TimedStep],
        max_sessions: int,
        *,
        one_by_one: bool = False,
    ) -> None:
        self._scheduler: Scheduler[int] = Scheduler(
            max_sessions=max_sessions,
            capacity_tokens=1 << 30,
            max_rows=MAX_ROWS,
            max_step_tokens=MAX_STEP_TOKENS,
        )
        self._scheduler.share_steps(MAX_ROWS, one_by_one=one_by_one)
        self._scheduler.begin_with(timed)
        self._kind = kind_of(workload)

    def add(self, session_id: int) -> None:
        """Take a session on."""
        self._scheduler.add(
            session_id,
            capacity_tokens=1,
            prompt=PromptCuts(PROMPT_TOKENS, 1),
            kind=self._kind,
            may_narrow=True,
        )

    def plan(self) -> Sequence[tuple[int, Width, Piece | None]]:
        """Return the next batch."""
        batch = self._scheduler.next_batch()
        return [(name, width, batch.prompts.get(name)) for name, width in batch.run]

    def learn(self, session_id: int, width: Width, *, rows: int, tokens: int) -> None:
        """Let the scheduler learn."""
        self._scheduler.learn(session_id, width, rows=rows, tokens=tokens)

    def learn_step(self, step: TimedStep) -> None:
        """Let the scheduler learn."""
        self._scheduler.learn_step(step)

    def remove(self, session_id: int) -> None:
        """Forget a session."""
        self._scheduler.remove(session_id)


class Fixed(Paying):
    """The same scheduler, but all windows are of one width."""

    def __init__(
        self,
        workload: Workload,
        timed: Sequence[TimedStep],
        max_sessions: int,
        width: Width,
        *,
        one_by_one: bool = False,
    ) -> None:
        super().__init__(workload, timed, max_sessions, one_by_one=one_by_one)
        self._width = width

    def plan(self) -> Sequence[tuple[int, Width, Piece | None]]:
        """Return the next batch, of windows of that width."""
        return [(name, self._width, piece) for name, _, piece in super().plan()]


@dataclass(frozen=True)
class Outcome:
    """What a simulation found.

    Attributes:
        tokens_per_s: of all clients together.
        first_block_ms: mean time from a request to its first block.
        tokens_per_step: of one session.
        rows: mean rows of a step.
        sessions: mean sessions of a step.
    """

    tokens_per_s: float
    first_block_ms: float
    tokens_per_step: float
    rows: float
    sessions: float

    def to_dict(self) -> dict[str, float]:
        """Return it for a record."""
        return {
            "tokens_per_s": round(self.tokens_per_s, 1),
            "first_block_ms": round(self.first_block_ms, 1),
            "tokens_per_step": round(self.tokens_per_step, 3),
            "rows": round(self.rows, 1),
            "sessions": round(self.sessions, 2),
        }


@dataclass
class _Client:
    request: Request
    asked_ms: float
    has_block: bool = False

    def begin(self, width: Width, piece: Piece | None) -> Window:
        """Return its window in a step, or a piece of its prompt."""
        decoder = self.request.decoder
        if piece is not None and not piece.is_last:
            start = decoder.num_cached
            stop = start + piece.num_tokens
            tokens = (PLAIN,) * piece.num_tokens
            return Window(start, tokens, piece.num_tokens, tuple(range(start + 1, stop + 1)))
        window = decoder.next_window(width)
        assert window is not None
        return window


def _rows_of(window: Window, workload: Workload) -> int:
    forwarded = window.num_forwarded(MASK, shift_logits=workload.shift_logits)
    return forwarded + window.num_branch_masks


def simulate(
    planner: Planner,
    workload: Workload,
    curve: StepCurve,
    *,
    num_clients: int,
    num_requests: int,
    seed: int = 0,
) -> Outcome:
    """Run so many requests of so many clients at once."""
    chance = random.Random(seed)
    noise = random.Random(seed + 1)
    clients: dict[int, _Client] = {}
    clock = 0.0
    num_asked = num_tokens = num_steps = 0
    first_ms: list[float] = []
    steps: list[TimedStep] = []
    while True:
        while len(clients) < num_clients and num_asked < num_requests:
            clients[num_asked] = _Client(workload.request(chance), clock)
            planner.add(num_asked)
            num_asked += 1
        if not clients:
            break
        run = planner.plan()
        parts = [clients[name].begin(width, piece) for name, width, piece in run]
        rows = [_rows_of(window, workload) for window in parts]
        ms = curve.ms_of(rows) * noise.uniform(0.97, 1.03)
        clock += ms
        steps.append(TimedStep(sum(rows), len(run), ms, rows))
        planner.learn_step(steps[-1])
        for (name, width, piece), window, num_rows in zip(run, parts, rows, strict=True):
            client = clients[name]
            decoder = client.request.decoder
            if piece is not None and not piece.is_last:
                decoder.begin_at(window.stop)
                continue
            events = decoder.apply(client.request.propose(window))
            tokens = sum(e.stop - e.start for e in events if isinstance(e, Committed))
            prompt = max(0, PROMPT_TOKENS - window.start)
            planner.learn(name, width, rows=num_rows - prompt, tokens=tokens)
            num_steps += 1
            num_tokens += tokens
            if tokens and not client.has_block:
                client.has_block = True
                first_ms.append(clock - client.asked_ms)
            if decoder.finished:
                planner.remove(name)
                del clients[name]
    return Outcome(
        tokens_per_s=1e3 * num_tokens / clock,
        first_block_ms=statistics.mean(first_ms),
        tokens_per_step=num_tokens / num_steps,
        rows=statistics.mean(step.rows for step in steps),
        sessions=statistics.mean(step.sessions for step in steps),
    )
