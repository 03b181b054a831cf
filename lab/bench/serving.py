"""What serving costs and survives, over loopback sockets with a scripted model.

Server, engine and clients share one process and one event loop, so every figure holds the clients'
work too. Each answer is checked, character by character and event by event; a benchmark that finds
one wrong raises.
"""

import asyncio
import random
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from d2f_stream.channels.websocket import WebSocketChannel, open_websocket
from d2f_stream.client.backoff import Backoff
from d2f_stream.client.remote_engine import RemoteEngine
from d2f_stream.client.websocket_line import connect_websocket
from d2f_stream.core.events import Block, Event, StreamFinished, StreamStarted
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.metrics import Metrics
from d2f_stream.server.serve import Server
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.protocol import Generate, ServerHello
from lab.bench.served_model import (
    LENGTH,
    answer_to,
    rss_mb,
    serving_model,
    until_forgotten,
    url_of,
)
from lab.bench.serving_hostile import hostile

__all__ = ["PARTS", "serving"]

SEED: Final = 1
SHORT: Final = 24  # bytes of the answers of many streams
NUM_CONNECTIONS, STREAMS_EACH = 50, 10
NUM_DISCONNECTS: Final = 1000
NUM_STREAMS: Final = 10_000


async def serving(parts: Sequence[str]) -> dict[str, Any]:
    """Run the named parts and return the figures of each."""
    return {part: await PARTS[part]() for part in parts}


# (a) Many streams at once.


async def concurrent_streams() -> dict[str, Any]:
    """Run 500 streams over 50 connections; nothing may be lost, doubled or reordered."""
    async with serving_model(step_s=0.002) as server:
        started = time.perf_counter()
        most: list[int] = []
        counts = await asyncio.gather(
            *(_read_streams(server, number, most) for number in range(NUM_CONNECTIONS))
        )
        wall_s = time.perf_counter() - started
        return {
            "connections": NUM_CONNECTIONS,
            "streams": NUM_CONNECTIONS * STREAMS_EACH,
            "most_at_once": max(most),
            "blocks": sum(counts),
            "blocks_per_s": round(sum(counts) / wall_s),
            "lost_duplicated_or_reordered": 0,  # _read_streams raises
            "wall_s": round(wall_s, 2),
        }


async def _read_streams(server: Server, number: int, most: list[int]) -> int:
    """Ask for several answers on one connection; check every event, return the number of blocks."""
    channel = await open_websocket(url_of(server))
    prompts = {uuid.uuid4().hex: f"{number}/{stream}" for stream in range(STREAMS_EACH)}
    for name, prompt in prompts.items():
        await channel.send(channel.codec.encode(Generate(request_id=name, prompt=prompt)))
    logs: dict[str, list[StreamStarted | Block | StreamFinished]] = {}
    num_running = STREAMS_EACH
    while num_running:
        message = channel.codec.decode_message(await channel.receive())
        if isinstance(message, StreamStarted | Block | StreamFinished):
            logs.setdefault(message.stream, []).append(message)
            num_running -= isinstance(message, StreamFinished)
            most.append(server.registry.num_active)
        else:
            assert isinstance(message, ServerHello), message
    await channel.close()
    for log in logs.values():
        begin, end = log[0], log[-1]
        assert isinstance(begin, StreamStarted)
        assert isinstance(end, StreamFinished)
        assert [event.seq for event in log] == list(range(len(log)))
        blocks = [event for event in log if isinstance(event, Block)]
        _check("".join(block.text for block in blocks), prompts.pop(begin.request_id))
    assert not prompts
    return sum(len(log) - 2 for log in logs.values())


def _check(text: str, prompt: str, length: int = LENGTH) -> None:
    wanted = answer_to(prompt, length)
    if text != wanted:
        raise AssertionError(f"{prompt} was answered with {text!r} instead of {wanted!r}")


# (b) Added latency.


class _Arrivals(Metrics):
    """Notes when the server's registry got each block, which is when a reader in process would."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[tuple[str, int], float] = {}

    def on_event(self, stream: ServedStream, event: Event) -> None:
        if isinstance(event, Block):
            self.times[stream.id, event.seq] = time.perf_counter()
        super().on_event(stream, event)


async def added_latency(num_streams: int) -> dict[str, float]:
    """Return how much later a client gets a block than a reader in process, milliseconds.

    A step takes 5 ms; each stream is read through the client of the SDK.
    """
    arrivals = _Arrivals()
    added: list[float] = []
    async with (
        serving_model(step_s=0.005, metrics=arrivals) as server,
        connect_websocket(partial(open_websocket, url_of(server))) as engine,
    ):

        async def read(prompt: str) -> None:
            async for block in engine.generate(prompt):
                late_s = time.perf_counter() - arrivals.times[block.stream, block.seq]
                added.append(late_s)

        for turn in range(1 + (20 if num_streams == 1 else 3)):
            if turn == 1:
                added.clear()  # the first was the warm-up
            await asyncio.gather(*(read(f"{turn}/{n}") for n in range(num_streams)))
    cuts = statistics.quantiles(added, n=100)
    return {
        "p50_ms": round(1e3 * statistics.median(added), 3),
        "p99_ms": round(1e3 * cuts[98], 3),
        "blocks": len(added),
    }


# (c) Disconnects.


class _Breakable:
    """Dials, and breaks the connection that it made last, as a network does."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._channel: WebSocketChannel | None = None
        self.num_broken = 0

    async def dial(self) -> WebSocketChannel:
        self._channel = await open_websocket(self._url)
        return self._channel

    def break_off(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel._socket.transport.abort()  # no way to do this is public, and none should be
            self.num_broken += 1


async def disconnects() -> dict[str, Any]:
    """Break 1,000 connections at random moments; every answer must come out exact."""
    chance = random.Random(SEED)
    async with serving_model(step_s=0.002) as server:
        breakables = [_Breakable(url_of(server)) for _ in range(10)]

        def num_broken() -> int:
            return sum(one.num_broken for one in breakables)

        async def read(engine: RemoteEngine, name: str) -> int:
            num_answers = 0
            while num_broken() < NUM_DISCONNECTS:
                prompt = f"{name}/{num_answers}"
                _check((await engine.generate(prompt).result()).text, prompt)
                num_answers += 1
            return num_answers

        async def breaking(one: _Breakable) -> None:
            while num_broken() < NUM_DISCONNECTS:
                await asyncio.sleep(chance.uniform(0.0, 0.05))
                one.break_off()

        async def client(number: int, one: _Breakable) -> int:
            backoff = Backoff(first_s=0.01, longest_s=0.05)
            async with connect_websocket(one.dial, backoff=backoff) as engine:
                breaker = asyncio.create_task(breaking(one))
                counts = await asyncio.gather(*(read(engine, f"{number}-{n}") for n in range(4)))
                await breaker
            return sum(counts)

        started = time.perf_counter()
        answers = await asyncio.gather(*(client(*pair) for pair in enumerate(breakables)))
        return {
            "disconnects": num_broken(),
            "answers": sum(answers),
            "wrong_answers": 0,  # _check raises
            "wall_s": round(time.perf_counter() - started, 2),
        }


# (d) Memory.


async def memory() -> dict[str, Any]:
    """Serve 10,000 streams on 20 connections, five at a time; nothing may be left of them."""
    limits = ServeLimits(resume_ttl_s=0.2)
    async with serving_model(length=SHORT, limits=limits) as server:
        tasks = len(asyncio.all_tasks())
        started = time.perf_counter()
        await _short_streams(server, NUM_STREAMS // 5)
        await until_forgotten(server)
        before = rss_mb()
        await _short_streams(server, NUM_STREAMS)
        most_retained = server.registry.num_retained
        await until_forgotten(server)
        after = rss_mb()
        return {
            "streams": NUM_STREAMS,
            "rss_after_warm_up_mb": before,
            "rss_after_mb": after,
            "retained_at_the_end_of_the_load": most_retained,
            "retained": server.registry.num_retained,
            "leaked_tasks": len(asyncio.all_tasks()) - tasks,
            "wall_s": round(time.perf_counter() - started, 2),
        }


async def _short_streams(server: Server, number: int) -> None:
    async def read(engine: RemoteEngine, name: str) -> None:
        for turn in range(number // 100):
            prompt = f"{name}/{turn}"
            _check((await engine.generate(prompt).result()).text, prompt, SHORT)

    async def client(name: int) -> None:
        async with connect_websocket(partial(open_websocket, url_of(server))) as engine:
            await asyncio.gather(*(read(engine, f"{name}-{reader}") for reader in range(5)))

    await asyncio.gather(*(client(name) for name in range(20)))


PARTS: Final[Mapping[str, Callable[[], Awaitable[dict[str, Any]]]]] = {
    "concurrent_streams": concurrent_streams,
    "added_latency_1_stream": partial(added_latency, 1),
    "added_latency_32_streams": partial(added_latency, 32),
    "disconnects": disconnects,
    "memory": memory,
    "hostile": hostile,
}
