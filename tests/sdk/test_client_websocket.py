"""The client over real sockets, against the real server."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import d2f_stream
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.api import connect
from d2f_stream.channels.websocket import check_url, open_websocket
from d2f_stream.client.backoff import Backoff
from d2f_stream.client.websocket_line import connect_websocket
from d2f_stream.core.errors import (
    EngineClosed,
    InvalidRequest,
    MessageTooLarge,
    StreamLost,
    Unauthorized,
)
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import Server
from fakes import ANSWER, texts
from memory_network import until
from serving import ALICE, TWO_CLIENTS, serving, url_of

LONG = "a" * 4000


async def test_answer_comes_over_a_socket() -> None:
    async with serving() as server, connect(url_of(server)) as engine:
        assert engine.info.name == "scripted"
        assert "".join(await texts(engine.generate("hi"))) == ANSWER


async def test_token_is_sent_and_nobody_else_is_let_in() -> None:
    limits = ServeLimits(auth_timeout_s=0)
    async with serving(auth=TWO_CLIENTS, limits=limits) as server:
        async with connect(url_of(server), token=ALICE) as engine:
            assert (await engine.generate("hi").result()).text == ANSWER
        for token, told in (
            ("another-token-0123456789", "does not accept the token that was given"),
            (None, r"wants a token and none was given.*token=.*--token.*D2F_TOKEN"),
        ):
            with pytest.raises(Unauthorized, match=told):
                async with connect(url_of(server), token=token):
                    pass


async def test_generate_on_an_address_shares_one_connection() -> None:
    async with serving() as server:
        sessions = [d2f_stream.generate("hi", model=url_of(server)) for _ in range(3)]
        results = await asyncio.gather(*(session.result() for session in sessions))
        assert [result.text for result in results] == [ANSWER] * 3
        assert server.gateway.num_connections == 1
        _end_shared(url_of(server))
        await until(lambda: not server.gateway.num_connections)


async def test_load_on_an_address_connects() -> None:
    async with serving() as server, d2f_stream.load(url_of(server)) as engine:
        assert (await engine.generate("hi").result()).text == ANSWER
        with pytest.raises(InvalidRequest, match="server's own choice"):
            async with d2f_stream.load(url_of(server), device="cuda"):
                pass


async def test_break_frees_the_slot_on_the_server() -> None:
    backend = ScriptedBackend(LONG)
    async with serving(backend) as server, connect(url_of(server)) as engine:
        async for _ in engine.generate("hi", max_new_tokens=4000):
            break
        await until(lambda: not server.registry.num_active)
        assert backend.num_steps < 1000


async def test_large_request_is_refused_by_its_size() -> None:
    limits = ServeLimits(max_message_bytes=1000)
    async with serving(limits=limits) as server, connect(url_of(server)) as engine:
        with pytest.raises(MessageTooLarge):
            await engine.generate("x" * 2000).result()
        assert (await engine.generate("hi").result()).text == ANSWER


async def test_server_that_shuts_down_lets_streams_end() -> None:
    gate = StepGate()
    backend = ScriptedBackend(ANSWER, gate=gate)
    async with serving(backend) as server, connect(url_of(server)) as engine:
        gate.let_through(4)
        session = engine.generate("hi")
        first = await anext(session)
        stopping = asyncio.create_task(server.shut_down(10))
        gate.open()
        assert first.text + "".join(await texts(session)) == ANSWER
        await stopping


SERVER = """
import asyncio, sys
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.server.serve import Server, ServeSettings

async def main():
    backend = ScriptedBackend({"hi": "hello", "long": "a" * 4000}, tokens_per_step=1)
    async with LocalEngine.over(backend, ByteCodec()) as engine:
        async with Server(engine, ServeSettings(port=int(sys.argv[1]))) as server:
            print(server.port, flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def _server_process(port: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A server that can be killed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER, str(port)), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, int(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_server_killed_and_restarted_on_its_port() -> None:
    async with _server_process(0) as (process, port):
        dial = partial(open_websocket, check_url(f"ws://127.0.0.1:{port}"))
        engine = await connect_websocket(dial, backoff=Backoff(longest_s=0.1)).__aenter__()
        started = engine.generate("long", max_new_tokens=4000)
        await anext(started)
        process.kill()
        await process.wait()
        waiting = engine.generate("hi")
    async with _server_process(port):
        with pytest.raises(StreamLost):
            await started.result()
        assert (await waiting.result()).text == "hello"
        await engine.close()


def _end_shared(url: str) -> None:
    from d2f_stream.client.shared import _shared

    engine = _shared[asyncio.get_running_loop()][url]
    engine.shut()


def _answer(prompt: tuple[int, ...]) -> list[int]:
    return list((LONG if bytes(prompt) == b"long" else ANSWER).encode())


# Event loops that come and go, against a server on another thread.


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, Server]]:
    """A server in an event loop of its own."""
    ready: list[Server] = []
    up = threading.Event()

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with serving(ScriptedBackend(_answer)) as server:
            ready.append(server)
            halt.append(lambda: loop.call_soon_threadsafe(stop.set))
            up.set()
            await stop.wait()

    halt: list[Any] = []
    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert up.wait(20)
    yield url_of(ready[0]), ready[0]
    halt[0]()
    thread.join()


def test_one_event_loop_after_the_other_asks_an_address(elsewhere: tuple[str, Server]) -> None:
    url, _ = elsewhere

    async def ask() -> str:
        return (await d2f_stream.generate("hi", model=url).result()).text

    assert [asyncio.run(ask()) for _ in range(3)] == [ANSWER] * 3


def test_event_loop_that_ends_amid_a_session_ends_it_on_the_server(
    elsewhere: tuple[str, Server],
) -> None:
    url, server = elsewhere

    async def leave() -> d2f_stream.Session:
        session = d2f_stream.generate("long", model=url, max_new_tokens=4000)
        await anext(session)
        return session

    session = asyncio.run(leave())

    async def read_on() -> None:
        await texts(session)

    with pytest.raises(EngineClosed):
        asyncio.run(read_on())

    async def wait() -> None:
        await until(lambda: not server.registry.num_active)

    asyncio.run(wait())


def test_process_ends_cleanly_amid_a_session(elsewhere: tuple[str, Server]) -> None:
    code = f"""
import asyncio, d2f_stream
async def main():
    session = d2f_stream.generate("long", model={elsewhere[0]!r}, max_new_tokens=4000)
    print((await anext(session)).text)
    globals()["session"] = session
asyncio.run(main())
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "aaaaaaaa\n", "")


def test_example_prints_the_answer(elsewhere: tuple[str, Server]) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "websocket_client.py"
    command = [sys.executable, "-W", "error", str(script), elsewhere[0]]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ANSWER in done.stdout
