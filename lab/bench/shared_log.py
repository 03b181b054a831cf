"""What a log that servers share costs, without a model: the way of an event, and of a cancel.

The worker's log and the reader's are two connections of one process, so every figure holds the work
of both.
"""

import asyncio
import statistics
import time
import uuid
from collections.abc import Sequence
from typing import Any, Final

from d2f_stream.core.events import Block, Event, StreamFinished, StreamStarted, Timings, Usage
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.server.streams.valkey.log import ValkeyLog
from d2f_stream.wire.protocol import Generate

__all__ = ["shared_log"]

NUM_CANCELS: Final = 200
NUM_BLOCKS: Final = 100
BLOCK_SIZE: Final = 8


async def shared_log(url: str, *, numbers: Sequence[int] = (1, 16, 64)) -> dict[str, Any]:
    """Return the figures of a store; it must be there."""
    async with ValkeyLog(url, ServeLimits()) as one, ValkeyLog(url, ServeLimits()) as other:
        return {
            "cancel": await _cancels(one, other),
            "streams": {number: await _events(one, other, number) for number in numbers},
        }


async def _cancels(one: ValkeyLog, other: ValkeyLog) -> dict[str, float]:
    """Cancel at one server what another works for."""
    waits_ms = []
    for _ in range(NUM_CANCELS):
        stream, copy = await _stream(one, other)
        cancelled = asyncio.Event()
        work = await one.work(stream.id)
        assert work is not None
        async with work:
            work.on_cancel(cancelled.set)
            then = time.perf_counter()
            copy.cancel()
            await cancelled.wait()
            waits_ms.append(1000 * (time.perf_counter() - then))
    return _spread(waits_ms)


async def _events(one: ValkeyLog, other: ValkeyLog, number: int) -> dict[str, Any]:
    """Write so many streams at one server, as fast as the log takes them, and read at another."""
    waits_ms: list[float] = []
    began_s, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(_write_and_read(one, other, waits_ms) for _ in range(number)))
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    return {
        "ms": _spread(waits_ms),
        "events_per_s": round(len(waits_ms) / wall_s),
        "cpu_us_per_event": round(1e6 * cpu_s / len(waits_ms)),
    }


async def _write_and_read(one: ValkeyLog, other: ValkeyLog, waits_ms: list[float]) -> None:
    stream, copy = await _stream(one, other)
    events = _answer(stream.id)
    sent: list[float] = []
    reader = asyncio.create_task(_read(copy, events, sent, waits_ms))
    work = await one.work(stream.id)
    assert work is not None
    async with work:
        for event in events:
            sent.append(time.perf_counter())
            assert await work.append(event)
    await reader
    for log, known in ((one, stream), (other, copy)):
        known.end()
        log.retain(known)


async def _read(
    copy: ServedStream, events: Sequence[Event], sent: list[float], waits_ms: list[float]
) -> None:
    reading = copy.follow()
    for number, event in enumerate(events):
        assert await anext(reading) == event
        waits_ms.append(1000 * (time.perf_counter() - sent[number]))


async def _stream(one: ValkeyLog, other: ValkeyLog) -> tuple[ServedStream, ServedStream]:
    asked = Generate(request_id=uuid.uuid4().hex, prompt="hi")
    stream, _ = await one.create(asked, client="ann", asker="ann", clamp=False)
    return stream, await other.find(stream.id, client="ann")


def _answer(name: str) -> list[Event]:
    blocks = [
        Block(
            stream=name,
            seq=number + 1,
            index=number,
            start=BLOCK_SIZE * number,
            stop=BLOCK_SIZE * (number + 1),
            text="x" * BLOCK_SIZE,
            token_ids=tuple(range(1000, 1000 + BLOCK_SIZE)),
            steps=number,
            elapsed_ms=float(number),
        )
        for number in range(NUM_BLOCKS)
    ]
    first = StreamStarted(
        stream=name, seq=0, request_id="r", model="m", block_size=BLOCK_SIZE, prompt_tokens=1
    )
    last = StreamFinished(
        stream=name,
        seq=NUM_BLOCKS + 1,
        reason="length",
        text_length=BLOCK_SIZE * NUM_BLOCKS,
        usage=Usage(prompt_tokens=1, completion_tokens=BLOCK_SIZE * NUM_BLOCKS, steps=NUM_BLOCKS),
        timings=Timings(first_block_ms=1.0, total_ms=2.0),
    )
    return [first, *blocks, last]


def _spread(values: Sequence[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(values, n=100)
    return {
        "p50": round(hundredths[49], 2),
        "p99": round(hundredths[98], 2),
        "max": round(max(values), 2),
    }
