"""One event loop in a thread of its own, for whoever has none: it starts late and ends early.

Owns the thread and who may wait for it; knows nothing of engines and sessions.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from typing import Final, TypeVar

from d2f_stream.core.errors import EngineClosed

__all__ = ["Background", "shared_background", "stop_first"]

EXIT_TIMEOUT_S: Final = 5.0

Value = TypeVar("Value")


class Background:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="d2f-sync", daemon=True)
        self._thread.start()
        self._started.wait()

    @property
    def alive(self) -> bool:
        """Whether it works for this process."""
        return self._pid == os.getpid() and not self._stop.is_set()

    def run(self, work: Coroutine[object, None, Value]) -> Value:
        """Wait in this thread for what the loop does; an interrupted wait cancels it.

        Raises:
            EngineClosed: the loop is the parent's of this process, or the process ends.
            RuntimeError: the loop's own thread would wait for itself.
        """
        if not self.alive or self._thread is threading.current_thread():
            work.close()
            self._refuse()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # of no effect once it is done

    def stop(self) -> None:
        """End all that runs, and the thread. Idempotent."""
        if self.alive:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(EXIT_TIMEOUT_S)

    def _serve(self) -> None:
        asyncio.run(self._live())

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._started.set()
        await self._stop.wait()

    def _refuse(self) -> None:
        if self._pid != os.getpid():
            raise EngineClosed(
                "this session or engine belongs to the process that this one was forked from; "
                "begin anew here, or start processes by spawn"
            )
        if not self.alive:
            raise EngineClosed("the process ends, and its sessions have ended")
        raise RuntimeError(
            "d2f_stream.sync was called from its own event loop, which would wait for itself; "
            "use d2f_stream there"
        )


_lock: Final = threading.Lock()
_shared: Final[list[Background]] = []  # one, of this process


def shared_background() -> Background:
    """Return the process's own; a new one where it has none yet, or was forked."""
    with _lock:
        if not _shared or not _shared[0].alive:
            _shared[:] = [Background()]
        return _shared[0]


def _stop() -> None:
    for background in _shared:
        background.stop()


def stop_first() -> None:
    """Let the sessions end before the models that were loaded for them: hooks run backwards."""
    atexit.unregister(_stop)
    atexit.register(_stop)


if hasattr(os, "register_at_fork"):  # or a child that is forked amid a call would wait for ever
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )
