"""DeviceThread: the one thread on which everything that touches a loaded model runs.

Knows callables and event loops; nothing of models. A queue and `call_soon_threadsafe` instead of
`loop.run_in_executor`, which takes two locks, a semaphore and a second future for each call.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["DeviceThread"]

P = ParamSpec("P")
T = TypeVar("T")

_Job = Callable[[], None]


class DeviceThread:
    """Runs calls one after the other, in the order they came, for event loops of any thread.

    The thread is a daemon: its owner stops it, at the latest from an `atexit` hook.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def call(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Queue a call and return its future, which belongs to the running event loop.

        Cancelling the future abandons the result; the call itself runs all the same.

        Raises:
            RuntimeError: the thread was stopped.
        """
        if self._stopped:
            raise RuntimeError("the device thread was stopped")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                _answer(loop, _fail, future, error)
            else:
                _answer(loop, _resolve, future, result)

        self._jobs.put(job)
        return future

    def stop(self, last: Callable[[], None] | None = None) -> None:
        """Run what is queued, then `last`, then end the thread. Does not wait."""
        self._stopped = True
        if last is not None:
            self._jobs.put(last)
        self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout_s)


def _serve(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # an idle thread keeps no rows, results or tracebacks alive


def _answer(loop: asyncio.AbstractEventLoop, settle: Callable[..., None], *args: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(settle, *args)


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration) or not isinstance(error, Exception):
        # A future refuses the first, and the others would stop the event loop.
        wrapped = RuntimeError(f"a call on the device thread raised {error!r}")
        wrapped.__cause__ = error
        error = wrapped
    future.set_exception(error)
