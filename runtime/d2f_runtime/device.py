"""DeviceThread: the one thread on which everything that touches a loaded model runs.

Knows callables and event loops; nothing of models. A queue and `call_soon_threadsafe` instead of
`loop.run_in_executor`, which takes two locks, a semaphore and a second future for each call.

From one call to the next that waits already, the thread does not let go of the interpreter's lock.
Waking an event loop writes to a socket, which lets go of it, and the event loop then holds it for
all that it has to do: 0.05 to 0.1 ms on a CPU with two busy cores. So a second thread, the
messenger, wakes event loops while calls wait. It gets the lock when the next call lets go of it,
which one that waits for a device does at once.
"""

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

__all__ = ["DeviceThread", "on_loop"]

logger = logging.getLogger("d2f_stream.device")

IDLE_S = 1.0

P = ParamSpec("P")
T = TypeVar("T")

_Job = Callable[[], object]
_Jobs = queue.SimpleQueue[_Job | None]


class DeviceThread:
    """Runs calls one after the other, in the order they came, for event loops of any thread.

    The thread is a daemon: its owner stops it, at the latest from an `atexit` hook.

    Args:
        name: of the thread.
        on_idle: called there when no call has come for a second, and every second from then on as
            long as it returns True.
    """

    def __init__(self, name: str, *, on_idle: Callable[[], bool] | None = None) -> None:
        self._jobs: _Jobs = queue.SimpleQueue()
        self._messages: _Jobs = queue.SimpleQueue()
        self._stopped = False
        self._process = os.getpid()
        self._busy_since_s: float | None = None
        self._threads = (
            _start(name, self._jobs, on_idle),
            _start(f"{name}-messenger", self._messages),
        )

    @property
    def busy_s(self) -> float:
        """For how long the call that runs now has run, seconds; 0 where none does."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the thread's own, and has no such thread."""
        return os.getpid() != self._process

    def call(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Queue a call and return its future, which belongs to the running event loop.

        Cancelling the future abandons the result; the call itself runs all the same.

        Raises:
            RuntimeError: the thread was stopped, or did not come along when this process forked.
        """
        if self._stopped or self.forked:
            raise RuntimeError("the device thread was stopped or is in another process")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            self._busy_since_s = time.monotonic()
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                self._busy_since_s = None
                self._answer(partial(_post, loop, _fail, future, error))
            else:
                self._busy_since_s = None
                self._answer(partial(_post, loop, _resolve, future, result))

        self._jobs.put(job)
        return future

    def post(self, function: Callable[[], object]) -> None:
        """Queue a call that nobody waits for, from any thread; what it raises is logged.

        Nothing happens once the thread was stopped.
        """
        if not self._stopped and not self.forked:
            self._jobs.put(partial(_run_logged, function))

    def stop(self, last: Callable[[], None] | None = None) -> None:
        """Run what is queued, then `last`, then end the thread. Does not wait.

        What `last` raises is logged: the thread ends all the same.
        """
        self._stopped = True
        if last is not None:
            self._jobs.put(partial(_run_logged, last))
        self._jobs.put(partial(self._messages.put, None))
        self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended, and its messenger too."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _answer(self, post: _Job) -> None:
        if self._jobs.empty():
            post()
        else:
            self._messages.put(post)


def on_loop(function: Callable[P, object]) -> Callable[P, None]:
    """Return what calls the function on the event loop that runs now, from any thread, soon."""
    loop = asyncio.get_running_loop()

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        _post(loop, partial(function, *args, **kwargs))

    return call


def _start(name: str, jobs: _Jobs, on_idle: Callable[[], bool] | None = None) -> threading.Thread:
    thread = threading.Thread(target=_serve, args=(jobs, on_idle), name=name, daemon=True)
    thread.start()
    return thread


def _serve(jobs: _Jobs, on_idle: Callable[[], bool] | None) -> None:
    looks = False
    while True:
        try:
            job = jobs.get(timeout=IDLE_S if looks else None)
        except queue.Empty:
            looks = on_idle is not None and _run_logged(on_idle) is True
            continue
        if job is None:
            return
        job()
        del job  # an idle thread keeps no rows, results or tracebacks alive
        looks = on_idle is not None


def _run_logged(function: Callable[[], T]) -> T | None:
    try:
        return function()
    except BaseException:  # a thread has nowhere to raise it to
        logger.exception("a call on the device thread failed")
        return None


def _post(loop: asyncio.AbstractEventLoop, settle: Callable[..., object], *args: object) -> None:
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
