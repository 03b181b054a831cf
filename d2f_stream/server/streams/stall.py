"""Stall: the limit of one connection for how long its reader may not take what is sent."""

import asyncio

from d2f_stream.channels.patience import LOOKS

__all__ = ["Stall"]


class Stall:
    """Ends what its task waits for in this context, where that takes too long, by TimeoutError.

    `patient_timeout` with one timer for all: one for each message costs as much as sending it.

    Args:
        timeout_s: seconds; it may take up to one part of `LOOKS` longer.
    """

    def __init__(self, timeout_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._share_s = timeout_s / LOOKS
        self._looks_left = 0  # 0 where nothing is waited for
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    def close(self) -> None:
        """Limit nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def __enter__(self) -> None:
        if self._timer is None:
            self._looks_left = LOOKS
            self._timer = self._loop.call_later(self._share_s, self._look)
        else:
            self._looks_left = LOOKS + 1  # the first may come at once

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._looks_left = 0
        if self._is_over and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise TimeoutError from None

    def _look(self) -> None:
        self._timer = None
        if self._looks_left == 1:
            self._is_over = True
            self._task.cancel()
        elif self._looks_left:
            self._looks_left -= 1
            self._timer = self._loop.call_later(self._share_s, self._look)
