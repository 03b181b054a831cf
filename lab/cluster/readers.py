"""Readers of answers: they check each event, and note when it came."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import d2f_stream
from d2f_stream.core.events import Block, StreamFinished, StreamStarted

__all__ = ["Reading", "after", "connections", "keep_reading", "read_answer"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer as its reader saw it, times in milliseconds.

    Attributes:
        num_blocks: of the answer.
        added_ms: from asking to the last event, less what the engine says that it took.
        lateness_ms: of each block, how much later it came than the earliest did, by the engine's
            clock.
        longest_pause_ms: between two events.
    """

    num_blocks: int
    added_ms: float
    lateness_ms: Sequence[float]
    longest_pause_ms: float


async def read_answer(
    engine: d2f_stream.Engine, answer: str, *, prompt: str = "hi", max_new_tokens: int = 0
) -> Reading:
    """Read an answer, and check it character by character and event by event.

    Args:
        engine: is asked.
        answer: that is expected.
        prompt: taken verbatim.
        max_new_tokens: 0 is one for each byte, as a scripted model has them.

    Raises:
        RuntimeError: something is lost, doubled, reordered or wrong.
    """
    asked_at = now = time.perf_counter()
    pause, text, offsets, next_seq = 0.0, "", [], 0
    end: StreamFinished | None = None
    most = max_new_tokens or len(answer.encode())
    session = engine.generate(prompt, max_new_tokens=most, raw=True)
    async for event in session.events():
        then, now = now, time.perf_counter()
        pause = max(pause, now - then)
        if isinstance(event, StreamStarted | Block | StreamFinished):
            if event.seq != next_seq:
                raise RuntimeError(f"event {event.seq} came where {next_seq} was to come")
            next_seq += 1
        if isinstance(event, Block):
            text += event.text
            offsets.append(1000 * now - event.elapsed_ms)
        elif isinstance(event, StreamFinished):
            end = event
    if end is None or text != answer or end.text_length != len(answer):
        raise RuntimeError(f"an answer of {len(answer)} characters came as {text!r:.200}, {event}")
    return Reading(
        num_blocks=len(offsets),
        added_ms=1000 * (now - asked_at) - end.timings.total_ms,
        lateness_ms=[offset - min(offsets) for offset in offsets],
        longest_pause_ms=1000 * pause,
    )


@asynccontextmanager
async def connections(url: str, number: int) -> AsyncIterator[list[d2f_stream.Engine]]:
    """Open connections of the SDK to one address."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(d2f_stream.connect(url)) for _ in range(number)]


async def keep_reading(
    engines: Sequence[d2f_stream.Engine],
    answer: str,
    *,
    streams: int,
    until: asyncio.Event,
    prompt: str = "",
    max_new_tokens: int = 0,
) -> list[Reading]:
    """Read so many answers at a time, one after the other, until an event is set.

    Each stream has a prompt of its own, unless one is given for all.
    """
    readings: list[Reading] = []

    async def read(number: int) -> None:
        while not until.is_set():
            engine = engines[number % len(engines)]
            asked = prompt or f"prompt {number}"
            reading = await read_answer(engine, answer, prompt=asked, max_new_tokens=max_new_tokens)
            readings.append(reading)

    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(read(number))
    return readings


@contextlib.asynccontextmanager
async def after(seconds: float) -> AsyncIterator[asyncio.Event]:
    """Yield an event that is set after a while."""
    event = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(seconds, event.set)
    try:
        yield event
    finally:
        timer.cancel()
