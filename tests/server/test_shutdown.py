"""How a server ends: by signals, at a deadline, and in order."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

import fakes
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.events import Block, StreamFinished
from d2f_stream.server.listening.listener import AddressUnavailable
from d2f_stream.server.serve import Server, serve
from d2f_stream.server.settings import ServeSettings
from d2f_stream.wire.protocol import RequestRejected, ServerClosing
from fakes import held
from serving import Address, Peer, check_whole, request, serving, text_of

ENDLESS = "on and " * 1000
PARAMS = {"max_new_tokens": 4000}


async def test_running_streams_end_and_clients_are_told() -> None:
    backend, gate = held()
    async with serving(backend) as server, Peer.to(server) as peer:
        await peer.hello()
        await peer.generate()
        ending = asyncio.create_task(server.shut_down(60))
        closing = await peer.receive()
        assert isinstance(closing, ServerClosing)
        assert closing.deadline_s == 60
        await peer.send(request())
        assert (await peer.rejected()).code == "shutting_down"
        async with Peer.to(server) as late:
            assert (await late.closed())[0] == 1012
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            health = await client.get("/healthz")
            assert (health.status_code, health.json()["status"]) == (503, "shutting_down")
        gate.open()
        log = await peer.answer()
        assert text_of(log) == fakes.ANSWER
        assert await peer.closed() == (1012, "the server is shutting down")
        await ending


async def test_streams_are_cancelled_at_the_deadline_and_say_so() -> None:
    backend = ScriptedBackend(ENDLESS, tokens_per_step=1)
    async with serving(backend) as server, Peer.to(server) as peer:
        await peer.hello()
        await peer.generate(params=PARAMS)
        ending = asyncio.create_task(server.shut_down(0.02))
        messages = []
        while not isinstance(message := await peer.receive(), StreamFinished):
            messages.append(message)
        assert message.reason == "cancelled"
        text = "".join(event.text for event in messages if isinstance(event, Block))
        assert ENDLESS.startswith(text)
        assert len(text) == message.text_length
        assert (await peer.closed())[0] == 1012
        await ending


async def test_http_answer_that_runs_is_finished() -> None:
    backend, gate = held()
    async with (
        serving(backend) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        body = {"model": "scripted", "prompt": "hi", "max_tokens": 128}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.to_thread(gate.wait_entered)
        ending = asyncio.create_task(server.shut_down(60))
        await fakes.turn()
        gate.open()
        assert (await asking).json()["choices"][0]["text"] == fakes.ANSWER
        await ending
        with pytest.raises(httpx.ConnectError):
            await client.get("/healthz")


async def test_leaving_the_context_ends_everything_at_once() -> None:
    backend = ScriptedBackend(ENDLESS, tokens_per_step=1)
    async with serving(backend) as server, Peer.to(server) as peer:
        await peer.hello()
        await peer.generate(params=PARAMS)
        await peer.socket.send("")  # an unfinished exchange
        leaving = server
    assert leaving.registry.num_active == 0


@asynccontextmanager
async def served(
    backend: ScriptedBackend, read: Callable[[], str], *, deadline_s: float = 60.0
) -> AsyncIterator[tuple[Address, "asyncio.Task[int]"]]:
    """Run `serve` in a task until a signal ends it; yield its address and the task."""
    async with fakes.engine_over(backend) as engine:
        settings = ServeSettings(port=0, shutdown_deadline_s=deadline_s)
        serving_task = asyncio.create_task(serve(engine, settings))
        line = ""
        while not line.endswith("\n"):
            assert not serving_task.done()
            await fakes.turn()
            line += read()
        assert line.startswith("d2f-stream serves scripted on cpu at http://127.0.0.1:")
        assert line.count("\n") == 1
        yield Address(int(line.split("127.0.0.1:")[1].split()[0])), serving_task


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_in_order(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    backend, gate = held()
    async with served(backend, lambda: capsys.readouterr().out) as (address, task):
        async with Peer.to(address) as peer:
            await peer.hello()
            started = await peer.generate()
            os.kill(os.getpid(), number)
            assert isinstance(await peer.receive(), ServerClosing)
            gate.open()
            log = [started, *await peer.answer()]
            check_whole(log)
            assert (await peer.closed())[0] == 1012
        assert await task == 0


async def test_second_signal_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    backend = ScriptedBackend(ENDLESS, tokens_per_step=1)
    async with (
        served(backend, lambda: capsys.readouterr().out) as (address, task),
        Peer.to(address) as peer,
    ):
        await peer.hello()
        await peer.generate(params=PARAMS)
        os.kill(os.getpid(), signal.SIGTERM)
        while not isinstance(await peer.receive(), ServerClosing):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 128 + signal.SIGTERM


async def test_address_in_use_is_one_sentence() -> None:
    async with serving() as server, fakes.engine_over(ScriptedBackend()) as engine:
        with pytest.raises(AddressUnavailable, match=r"port \d+: Address already in use; choose"):
            async with Server(engine, ServeSettings(port=server.port)):
                pass


async def test_rejection_after_shutdown_names_the_reason() -> None:
    async with serving() as server, Peer.to(server) as peer:
        await peer.hello()
        await server.registry.shut_down(0)
        await peer.send(request())
        rejected = await peer.receive()
        assert isinstance(rejected, RequestRejected)
        assert rejected.message == "the server is shutting down; try again later"
