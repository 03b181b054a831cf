"""Patience: how long another party may take, of the time in which it could have been heard.

While this process is frozen or its event loop is busy nobody is heard, and a timer of asyncio that
was due meanwhile goes off before what has come is read. So a clock here is looked at several times,
and what passes between two looks counts as the time that was planned for it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

__all__ = ["LOOKS", "Patience", "patient_timeout"]

LOOKS: Final = 4
"""At a clock; a stall of this process, however long, costs others one part of so many."""


class Patience:
    """Calls a function once its time is over; as `loop.call_later`, but with patience.

    Args:
        seconds: the time.
        call: must not raise.
        args: for it.
    """

    def __init__(self, seconds: float, call: Callable[..., object], *args: object) -> None:
        self._call, self._args = call, args
        self._share_s = seconds / LOOKS
        self._looks_left = LOOKS
        self._wait()

    def cancel(self) -> None:
        """Call nothing. Idempotent."""
        self._timer.cancel()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._share_s, self._look)

    def _look(self) -> None:
        self._looks_left -= 1
        if self._looks_left:
            self._wait()
        else:
            self._call(*self._args)


@contextlib.asynccontextmanager
async def patient_timeout(seconds: float | None) -> AsyncIterator[None]:
    """Raise TimeoutError where what is awaited inside takes longer; as `asyncio.timeout`."""
    async with asyncio.timeout(None) as timeout:
        if seconds is None:
            yield
            return
        patience = Patience(seconds, _end, timeout)
        try:
            yield
        finally:
            patience.cancel()


def _end(timeout: asyncio.Timeout) -> None:
    timeout.reschedule(asyncio.get_running_loop().time())
