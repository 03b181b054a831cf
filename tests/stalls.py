"""Time that passes at once on the clock of the running event loop, with or without its turns."""

import asyncio
import time

from fakes import turn

HOUR_S = 3600.0


def stall(seconds: float = HOUR_S) -> None:
    """Let time pass in which the loop does nothing, as where its process is frozen."""
    loop = asyncio.get_running_loop()
    ahead_s = loop.time() - time.monotonic() + seconds
    loop.time = lambda: time.monotonic() + ahead_s  # type: ignore[method-assign]


async def pass_time(seconds: int) -> None:
    """Let time pass in which the loop runs every second."""
    for _ in range(seconds):
        stall(1.0)
        await turn()
