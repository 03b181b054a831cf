"""StepQueue: the steps of one engine that its device thread runs now or will run next.

Belongs to the event loop. Two steps deep as a rule: one runs, and the next stands behind it, so
that the device thread goes from one to the other without waiting for the event loop.
"""

import asyncio
from collections import deque

from d2f_runtime.engine.planned_step import PlannedStep, StepResult
from d2f_runtime.loaded_model import LoadedModel

__all__ = ["StepQueue"]


class StepQueue:
    """Steps in the order in which they run, each with its result to come."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._steps: deque[tuple[PlannedStep, asyncio.Future[StepResult | None]]] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def newest(self) -> PlannedStep | None:
        """The step that was put last, if its result was not taken yet."""
        return self._steps[-1][0] if self._steps else None

    def put(self, step: PlannedStep) -> None:
        """Queue a step on the device thread."""
        self._steps.append((step, self._model.device.call(step.do_run, self._model)))

    async def take(self) -> tuple[PlannedStep, StepResult | None]:
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
        """Let no step begin that has not begun; they are still to be taken."""
        for step, _ in self._steps:
            step.withdrawn = True

    def abandon(self) -> None:
        """Withdraw all steps and forget them; one that has begun runs to its end all the same."""
        self.withdraw()
        for _, future in self._steps:
            if not future.cancel() and not future.cancelled():
                future.exception()  # of which the model has taken note
        self._steps.clear()
