"""What a server takes from hostile clients: malformed, oversized, slow and disordered requests."""

import asyncio
import contextlib
import json
import random
import time
import uuid
from typing import Any, Final

import msgspec

from d2f_stream.channels import ChannelClosed
from d2f_stream.channels.websocket import open_websocket
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import Server
from d2f_stream.server.settings import Timeouts
from lab.bench.served_model import rss_mb, serving_model, until_forgotten, url_of

__all__ = ["hostile"]

SEED: Final = 1
NUM_HOSTILE: Final = 10_000
NUM_SLOW: Final = 200


async def hostile() -> dict[str, Any]:
    """Send 10,000 malformed, oversized and out-of-order messages, and begin 200 slow requests."""
    chance = random.Random(SEED)
    limits = ServeLimits(max_message_bytes=4096, max_bad_messages=100)
    timeouts = Timeouts(request_s=1.0)
    async with serving_model(limits=limits, timeouts=timeouts) as server:
        tasks = len(asyncio.all_tasks())
        started = time.perf_counter()
        await _attack(server, chance, NUM_HOSTILE // 10)
        before = rss_mb()
        slow = asyncio.gather(*(_send_slowly(server) for _ in range(NUM_SLOW)))
        num_closed = await _attack(server, chance, NUM_HOSTILE)
        await slow
        await until_forgotten(server)
        channel = await open_websocket(url_of(server))
        await channel.close()
        await until_forgotten(server)
        return {
            "messages": NUM_HOSTILE,
            "connections_closed_for_it": num_closed,
            "slow_requests_ended": NUM_SLOW,
            "rss_before_mb": before,
            "rss_after_mb": rss_mb(),
            "leaked_tasks": len(asyncio.all_tasks()) - tasks,
            "wall_s": round(time.perf_counter() - started, 2),
        }


async def _attack(server: Server, chance: random.Random, number: int) -> int:
    """Send so many hostile messages over ten connections; return how many more it took."""
    counts = [number // 10] * 10

    async def attack(left: int) -> int:
        num_closed = 0
        while left:
            channel = await open_websocket(url_of(server))
            with contextlib.suppress(ChannelClosed):
                while left:
                    left -= 1
                    await channel.send(_hostile_message(chance))
                    await channel.receive()
            num_closed += left > 0
            await channel.close()
        return num_closed

    return sum(await asyncio.gather(*(attack(left) for left in counts)))


def _hostile_message(chance: random.Random) -> bytes:
    """Return bytes at random, an operation cut off or out of order, or a message too large."""
    name = uuid.uuid4().hex
    whole = json.dumps({"type": "generate", "request_id": name, "prompt": [{}, 1, None]}).encode()
    late = {"type": "resume", "stream": name, "after_seq": chance.randrange(-9, 9)}
    match chance.randrange(6):
        case 0:
            return chance.randbytes(chance.randrange(200))
        case 1:
            return whole[: chance.randrange(len(whole))]
        case 2:
            return msgspec.msgpack.encode(late)
        case 3:
            return b"\x91" * chance.randrange(1, 4000)  # an array in an array in an array
        case 4:
            return msgspec.msgpack.encode({"type": "cancel", "stream": name, "request_id": name})
        case _:
            return b"x" * chance.choice((4096, 4097, 20_000)) if chance.random() < 0.1 else whole


async def _send_slowly(server: Server) -> None:
    """Begin a request and never end it, until the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: ")
    with contextlib.suppress(ConnectionError):
        await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
