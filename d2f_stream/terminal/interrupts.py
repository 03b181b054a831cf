"""Interrupts: what Ctrl-C ends in a terminal while an event loop runs.

`asyncio.run` takes Ctrl-C for the end of the program; a chat means less by it.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["interruptible", "on_interrupt", "raising_interrupts"]


@contextmanager
def on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Let Ctrl-C call a function on the running loop, in place of what it did before."""
    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGINT)
    try:
        loop.add_signal_handler(signal.SIGINT, act)
    except (NotImplementedError, RuntimeError, ValueError):  # no such handlers here
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end what the task awaits inside, with KeyboardInterrupt where it is left."""
    task, is_interrupted = asyncio.current_task(), False
    assert task is not None

    def interrupt() -> None:
        nonlocal is_interrupted
        is_interrupted = True
        task.cancel()

    with on_interrupt(interrupt):
        try:
            yield
        except asyncio.CancelledError:
            if is_interrupted and task.uncancel() == 0:
                raise KeyboardInterrupt from None
            raise


@contextmanager
def raising_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in what blocks the loop, as it does without one."""
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:  # only the first thread hears signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
