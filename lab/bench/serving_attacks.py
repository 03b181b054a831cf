"""What others notice while somebody asks too much: a server in a process of its own, attacked.

The embedded model gets prompts that it cannot hold; a scripted one gets silent connections, and
many long requests of one client beside a short one of another.
"""

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import IO, Any, Final

from d2f_stream.channels.websocket import WebSocketChannel, open_websocket
from d2f_stream.core.events import Block
from d2f_stream.server.auth import Auth
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import ServeSettings, configure_logging, serve
from d2f_stream.wire.protocol import Generate, Overrides, RequestRejected
from lab.bench.served_model import engine_of

__all__ = ["PARTS", "attacks"]

NUM_PROMPTS, PROMPT_BYTES = 80, 250_000
NUM_SILENT: Final = 1_100
NUM_LONG, LONG_TOKENS = 150, 1500
ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
TOKENS: Final = {"alice": ALICE, "bob": BOB}
NUM_PROBES, PROBE_PAUSE_S = 4, 0.005
STEP_S: Final = 0.004


async def attacks(parts: Sequence[str]) -> dict[str, Any]:
    """Run the named parts and return the figures of each."""
    return {part: await PARTS[part]() for part in parts}


# What is attacked.


class _Attacked:
    """A server in another process, and its log."""

    def __init__(self, url: str, log: IO[bytes]) -> None:
        self.url = url
        self.port = int(url.rpartition(":")[2])
        self._log = log

    @property
    def log_bytes(self) -> int:
        return os.path.getsize(self._log.name)

    async def open(self, token: str | None = None) -> WebSocketChannel:
        address = f"ws://127.0.0.1:{self.port}/v1/stream"
        channel = await open_websocket(address, token=token)
        await channel.receive()  # its hello
        return channel


@asynccontextmanager
async def _attacked(*arguments: str) -> AsyncIterator[_Attacked]:
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *arguments, stdout=subprocess.PIPE, stderr=log
        )
        assert process.stdout is not None
        try:
            line = (await process.stdout.readline()).decode()
            yield _Attacked(line.split(" at ")[1].split()[0], log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _serve_scripted() -> int:
    """Serve a scripted model on a free port: what `python -m lab.bench.serving_attacks` does."""
    configure_logging()
    async with engine_of(step_s=STEP_S, length=4 * LONG_TOKENS) as engine:
        limits = ServeLimits(max_connections_per_client=None)
        return await serve(engine, ServeSettings(port=0, auth=Auth(TOKENS), limits=limits))


# What others notice.


async def _probe(port: int) -> None:
    """Ask for /healthz over and over, on several connections, until three lines have come.

    Prints the answers' times before the second line and after it, in milliseconds. In a process of
    its own, so that it does not wait for the attacker's work.
    """
    phases: list[list[float]] = [[]]

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                began, phase = time.perf_counter(), phases[-1]
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await reader.readuntil(b"}")
                phase.append(1e3 * (time.perf_counter() - began))
                await asyncio.sleep(PROBE_PAUSE_S)
        finally:
            writer.close()

    asking = [asyncio.create_task(ask()) for _ in range(NUM_PROBES)]
    await asyncio.to_thread(sys.stdin.readline)
    phases.append([])
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.sleep(0.5)  # for the answers that wait
    for task in asking:
        task.cancel()
    sys.stdout.write(json.dumps(phases))


async def _probed(port: int, work: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
    """Do the work and return how /healthz was answered before and meanwhile."""
    command = ("-m", "lab.bench.serving_attacks", "probe", str(port))
    probe = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert probe.stdin is not None
    await asyncio.sleep(3.0)
    probe.stdin.write(b"\n")
    began = time.perf_counter()
    await work()
    wall_s = time.perf_counter() - began
    printed, _ = await probe.communicate(b"\n")
    before, meanwhile = json.loads(printed)
    return {
        "healthz_p99_before_ms": _p99(before),
        "healthz_p99_ms": _p99(meanwhile),
        "healthz_worst_ms": round(max(meanwhile), 1),
        "healthz_answers": len(meanwhile),
        "wall_s": round(wall_s, 2),
    }


def _p99(times_ms: Sequence[float]) -> float:
    return round(statistics.quantiles(times_ms, n=100)[98], 1)


# (a) Large prompts.


async def large_prompts() -> dict[str, Any]:
    """Send 80 prompts of 250 KB at once, over websockets and over HTTP; all are refused."""
    results: dict[str, Any] = {"prompts": NUM_PROMPTS, "bytes_each": PROMPT_BYTES}
    for name, send in (("websocket", _over_websocket), ("http", _over_http)):
        async with _attacked("d2f_stream", "serve", "--port", "0") as server:
            connections = [await send(server) for _ in range(NUM_PROMPTS)]

            async def ask_all(
                asking: Sequence[Callable[[], Awaitable[None]]] = connections,
            ) -> None:
                await asyncio.gather(*(ask() for ask in asking))

            results[name] = await _probed(server.port, ask_all)
    return results


async def _at_once(asking: Sequence[Callable[[], Awaitable[None]]]) -> None:
    await asyncio.gather(*(ask() for ask in asking))


async def _over_websocket(server: _Attacked) -> Callable[[], Awaitable[None]]:
    channel = await server.open()
    prompt = ("word " * (PROMPT_BYTES // 5))[:PROMPT_BYTES]
    asked = channel.codec.encode(Generate(request_id=uuid.uuid4().hex, prompt=prompt))

    async def ask() -> None:
        await channel.send(asked)
        answer = channel.codec.decode_message(await channel.receive())
        assert isinstance(answer, RequestRejected), answer

    return ask


async def _over_http(server: _Attacked) -> Callable[[], Awaitable[None]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    content = ("word " * (PROMPT_BYTES // 5))[:PROMPT_BYTES]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )

    async def ask() -> None:
        writer.write(head.encode() + body)
        assert b" 400 " in await reader.readline()
        writer.close()

    return ask


# (b) Silent connections.


async def silent_connections() -> dict[str, Any]:
    """Open 1,100 connections that send nothing."""
    async with _attacked("lab.bench.serving_attacks") as server:
        log_bytes = server.log_bytes
        opened: list[asyncio.StreamWriter] = []

        async def open_all() -> None:
            for _ in range(NUM_SILENT):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                opened.append(writer)

        results = await _probed(server.port, open_all)
        for writer in opened:
            writer.close()
        return {
            "connections": NUM_SILENT,
            **results,
            "log_bytes": server.log_bytes - log_bytes,
        }


# (c) One client with much to ask.


async def one_client_beside_another() -> dict[str, Any]:
    """Ask 150 long requests as one client, then a short one as another; return its wait."""
    async with _attacked("lab.bench.serving_attacks") as server:
        alone_s = await _short(server, BOB)
        channels = [await server.open(ALICE) for _ in range(3)]
        for channel in channels:
            for _ in range(NUM_LONG // 3):
                await channel.send(_asked(channel, LONG_TOKENS))
        await asyncio.sleep(1.0)
        beside_s = await _short(server, BOB)
        for channel in channels:
            await channel.close()
        return {
            "long_requests": NUM_LONG,
            "tokens_each": LONG_TOKENS,
            "first_block_alone_s": round(alone_s, 3),
            "first_block_beside_them_s": round(beside_s, 3),
        }


async def _short(server: _Attacked, token: str) -> float:
    channel = await server.open(token)
    began = time.perf_counter()
    await channel.send(_asked(channel, 16))
    while not isinstance(channel.codec.decode_message(await channel.receive()), Block):
        pass
    wait_s = time.perf_counter() - began
    await channel.close()
    return wait_s


def _asked(channel: WebSocketChannel, tokens: int) -> bytes:
    params = Overrides(max_new_tokens=tokens)
    name = uuid.uuid4().hex
    return channel.codec.encode(Generate(request_id=name, prompt=name, params=params))


PARTS: Final[Mapping[str, Callable[[], Awaitable[dict[str, Any]]]]] = {
    "large_prompts": large_prompts,
    "silent_connections": silent_connections,
    "one_client_beside_another": one_client_beside_another,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["probe"]:
        asyncio.run(_probe(int(sys.argv[2])))
    else:
        sys.exit(asyncio.run(_serve_scripted()))
