"""PlannedStep: one step of a batch, planned on the event loop and run on the device thread.

The event loop plans a step while the one before it runs, so that the device thread goes from one to
the next without waiting for anybody. Whatever must not be so far ahead stops it there: the event
loop withdraws the plan, or a stream of the step before came to its end.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from d2f_runtime.backends.base import StepRow
from d2f_runtime.decoding.decoder import BlockView
from d2f_runtime.decoding.width import Width
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.engine.denoiser import Progress
from d2f_runtime.engine.scheduler import Batch
from d2f_runtime.engine.stream import Stream, StreamId
from d2f_runtime.loaded_model import LoadedModel

__all__ = ["Joined", "PlannedStep", "StepQueue", "StepResult"]

Joined = Sequence[tuple[Stream, Sequence[BlockView]]]


class StepResult(NamedTuple):  # a third of a frozen dataclass's cost, between two steps
    """What a step brought.

    Attributes:
        wall_s: from its first window to its last acceptance, seconds.
        num_rows: of the backend's step; 0 where it had nothing to run.
        progress: for each stream of the plan; an error that is the stream's own.
    """

    wall_s: float
    num_rows: int
    progress: Sequence[Progress | Exception]


class PlannedStep:
    """A step of the streams of a batch, which must hold slots.

    Of a stream, the device thread drives the denoiser and reads the slot, which stays while a step
    is under way; all else is the event loop's.

    Attributes:
        batch: that it was planned from.
        streams: those of the batch that take part.
        withdrawn: set to let it pass, if it has not begun.

    Args:
        after: the step planned before it, if that may be under way still.
        show: told, on the device thread and before the model runs, of blocks that joined.
    """

    def __init__(
        self,
        batch: Batch[StreamId],
        streams: Sequence[tuple[Stream, Width]],
        *,
        after: "PlannedStep | None",
        show: Callable[[Joined], None],
    ) -> None:
        self.batch = batch
        self.streams = [stream for stream, _ in streams]
        self.withdrawn = False
        self._parts = streams
        self._after = after
        self._show = show
        self._joined: list[tuple[Stream, Sequence[BlockView]]] = []
        self._lets_next = False

    def do_run(self, model: LoadedModel) -> StepResult | None:
        """Run the step; None if it was withdrawn, or a stream ended in the step before it.

        Raises:
            EngineFailed: an earlier step failed; or whatever the backend raises.
            RuntimeError: the backend answered more or fewer rows than it was given.
        """
        after, self._after = self._after, None
        if self.withdrawn or not (after is None or after._lets_next):
            return None
        began = time.perf_counter()
        begun = [self._begin(*each) for each in self._parts]
        rows = [row for row in begun if isinstance(row, StepRow)]
        if self._joined:
            self._show(self._joined)
        answers = model.do_step(rows) if rows else []
        if len(answers) != len(rows):
            raise RuntimeError(f"the backend answered {len(rows)} rows with {len(answers)}")
        answer = iter(answers)
        progress: list[Progress | Exception] = []
        lets_next = True
        for stream, row in zip(self.streams, begun, strict=True):
            made = row if isinstance(row, Exception) else _end(stream, next(answer))
            progress.append(made)
            lets_next = lets_next and isinstance(made, Progress) and made.reason is None
        self._lets_next = lets_next
        return StepResult(time.perf_counter() - began, len(rows), progress)

    def _begin(self, stream: Stream, width: Width) -> StepRow | Exception:
        """Return a stream's row, or the error that is the stream's own."""
        assert stream.slot is not None
        piece = self.batch.prompts.get(stream.id)
        try:
            row = stream.denoiser.row(stream.slot, width, piece)
            if joined := stream.denoiser.joined():
                self._joined.append((stream, joined))
        except Exception as error:
            return error
        return row


class StepQueue:
    """The steps that the device thread runs now or will run next, in order.

    Belongs to the event loop. Two steps deep as a rule: one runs, and the next stands behind it.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._steps: deque[tuple[PlannedStep, asyncio.Future[StepResult | None]]] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def newest(self) -> PlannedStep | None:
        """The step that was queued last, if its result was not taken yet."""
        return self._steps[-1][0] if self._steps else None

    def enqueue(self, step: PlannedStep) -> None:
        """Queue a step on the device thread."""
        self._steps.append((step, self._model.device.call(step.do_run, self._model)))

    async def next_result(self) -> tuple[PlannedStep, StepResult | None]:
        """Wait for the oldest step; its result is None if it was not run.

        Not safe to cancel: the step may run on. `abandon` follows, as it does after an error.

        Raises:
            Exception: whatever the backend raised.
        """
        step, future = self._steps[0]
        if future.done():
            await asyncio.sleep(0)  # readers have their turn between two steps
        result = await future
        self._steps.popleft()
        return step, result

    def withdraw(self) -> None:
        """Let no step begin that has not begun; their results are still to come."""
        for step, _ in self._steps:
            step.withdrawn = True

    def abandon(self) -> None:
        """Withdraw all steps and forget them; one that has begun runs to its end all the same."""
        self.withdraw()
        for _, future in self._steps:
            if not future.cancel() and not future.cancelled():
                future.exception()  # of which the model has taken note
        self._steps.clear()


def _end(stream: Stream, proposals: Proposals) -> Progress | Exception:
    try:
        return stream.denoiser.apply(proposals)
    except Exception as error:
        return error
