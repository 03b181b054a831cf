"""StepGate: holds the steps of a ScriptedBackend, so that tests need no sleeping."""

import threading

__all__ = ["StepGate"]


class StepGate:
    """Holds each step until it is let through."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_entered = 0
        self._num_allowed: float = 0

    def let_through(self, num_steps: float = 1) -> None:
        """Let that many more steps run."""
        with self._changed:
            self._num_allowed += num_steps
            self._changed.notify_all()

    def open(self) -> None:
        """Hold no step any more."""
        self.let_through(float("inf"))

    def wait_entered(self, num_steps: int = 1, timeout_s: float = 10.0) -> None:
        """Wait until that many steps have begun in all. Blocks: call it by asyncio.to_thread.

        Raises:
            TimeoutError: they have not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_entered >= num_steps, timeout_s):
                raise TimeoutError(
                    f"{self._num_entered} of {num_steps} steps began in {timeout_s} s"
                )

    def pass_through(self) -> None:
        """Wait for permission to run a step; called by the backend."""
        with self._changed:
            self._num_entered += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_allowed >= self._num_entered)
