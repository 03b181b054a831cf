"""Slow motion: shows each step of a stream for some time, without slowing the stream down.

For people: a small model answers faster than an eye follows. Knows events only.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from d2f_stream.core.errors import D2FError
from d2f_stream.core.events import Block, Draft, Event

__all__ = ["paced"]

READ_AHEAD = 4096  # events; beyond it the stream waits for the show


async def paced(
    events: AsyncIterator[Event],
    pace_s: float,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[Event]:
    """Yield the events, with a pause of `pace_s` seconds before those of each further step.

    A step's events come in the order of their blocks, and those of a block that joins after it, so
    an index that does not grow begins the next step. Safe to cancel; closing the generator ends
    the reading.

    Raises:
        D2FError: what reading the events raised, in its turn.
    """
    queue: asyncio.Queue[Event | D2FError | None] = asyncio.Queue(READ_AHEAD)

    async def read() -> None:
        try:
            async for event in events:
                await queue.put(event)
        except D2FError as error:
            await queue.put(error)
        else:
            await queue.put(None)

    reader = asyncio.create_task(read(), name="d2f-paced-reader")
    try:
        last = -1
        while (event := await queue.get()) is not None:
            if isinstance(event, D2FError):
                raise event
            if isinstance(event, Block | Draft):
                if event.index <= last:
                    await sleep(pace_s)
                last = event.index
            yield event
    finally:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
