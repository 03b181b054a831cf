"""Shared remote engines: one per event loop and address, for `generate(model="ws://...")`.

Nobody closes them: outside `async with` an engine disconnects by itself when it has been idle, and
its task ends with its event loop.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Final, Protocol

from d2f_stream.core.session import Engine

__all__ = ["SharedEngine", "shared_remote_engine"]


class SharedEngine(Engine, Protocol):
    """An engine that works without being entered and disconnects by itself."""

    @property
    def usable(self) -> bool:
        """Whether requests are accepted."""
        ...

    def shut(self) -> None:
        """Begin to close, without waiting. Idempotent."""
        ...


_shared: Final[dict[asyncio.AbstractEventLoop, dict[str, SharedEngine]]] = {}
_lock: Final = threading.Lock()

if hasattr(os, "register_at_fork"):  # or a child that is forked amid a call would wait for ever
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def shared_remote_engine(url: str, make: Callable[[], SharedEngine]) -> Engine:
    """Return the running event loop's engine for the address; one that was refused is replaced."""
    loop = asyncio.get_running_loop()
    with _lock:
        for old in [old for old in _shared if old.is_closed()]:
            del _shared[old]
        engines = _shared.setdefault(loop, {})
        engine = engines.get(url)
        if engine is None or not engine.usable:
            engine = engines[url] = make()
        return engine
