"""CompilationLog: which kernels had to be compiled, and how long that took; others lay on disk.

Triton keeps what it compiles in a folder (TRITON_CACHE_DIR, else ~/.triton/cache), by source,
options, GPU and its own version, so a second start compiles nothing. It is asked to tell of each
kernel; whoever listened before is told as before.
"""

import functools
import os
from pathlib import Path
from typing import Any

__all__ = ["CompilationLog", "kept_in"]


class CompilationLog:
    """What this process compiled since it was last asked."""

    def __init__(self) -> None:
        self._told = _totals()

    def news(self) -> str:
        """Return what was compiled since the last time, and what was read; empty if nothing was."""
        before, now = self._told, _totals()
        if now == before:
            return ""
        self._told = now
        compiled, read, seconds = (b - a for a, b in zip(before, now, strict=True))
        made = f"{compiled:.0f} kernels were compiled in {seconds:.1f} s" if compiled else ""
        kept = f"{read:.0f} were read from {kept_in()}" if read else ""
        return ", ".join(filter(None, (made, kept)))


class _Listener:
    """Counts what Triton tells of."""

    def __init__(self, told_before: Any) -> None:
        self.totals = (0, 0, 0.0)  # compiled, read, and the seconds of the former
        self._told_before = told_before

    def __call__(self, *, times: Any, cache_hit: bool, **others: Any) -> None:
        """Count a kernel; Triton's own signature."""
        compiled, read, seconds = self.totals
        if cache_hit:
            self.totals = compiled, read + 1, seconds
        else:
            self.totals = compiled + 1, read, seconds + times.total / 1e6
        if self._told_before is not None:
            self._told_before(times=times, cache_hit=cache_hit, **others)


def _totals() -> tuple[int, int, float]:
    listener = _listener()
    return (0, 0, 0.0) if listener is None else listener.totals


@functools.cache
def _listener() -> _Listener | None:
    try:
        from triton import knobs
    except ImportError:  # no Triton, or one older than 3.4, which tells nothing
        return None
    listener = _Listener(knobs.compilation.listener)
    knobs.compilation.listener = listener
    return listener


def kept_in() -> str:
    """Return where compiled kernels are kept, for people; that they are not, if it is so.

    Raises:
        ImportError: there is no Triton, or one older than 3.4.
    """
    from triton import knobs

    folder = Path(knobs.cache.dir)
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return f"nowhere, as {there} is read-only (TRITON_CACHE_DIR names another place)"
    return str(folder)
