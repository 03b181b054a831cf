"""RemoteEngine as sessions are cancelled and engines closed, whatever the connection does."""

import asyncio

import pytest

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.client.backoff import Backoff
from d2f_stream.client.websocket_line import connect_websocket
from d2f_stream.core.errors import (
    EngineClosed,
)
from d2f_stream.core.session import Session
from d2f_stream.wire.protocol import (
    Cancel,
    RequestRejected,
)
from fakes import ANSWER, held, texts, turn
from memory_network import client_of, instantly, network, until
from scripted_server import LONG, Script, client_tasks, until_down


@pytest.fixture
async def script() -> Script:
    async with network(ScriptedBackend()) as net:
        return Script(net.gateway.hello)


# Cancelling.


async def test_cancel_without_a_connection_ends_here_and_is_told_later() -> None:
    backend, gate = held(LONG)
    async with network(backend) as net, client_of(net) as engine:
        session = engine.generate("hi", max_new_tokens=4000)
        gate.let_through(4)
        first = await anext(session)
        net.is_up = False
        net.cut()
        await until_down(net)
        async with session:
            pass
        result = await session.result()
        assert (result.reason, result.usage.completion_tokens) == ("cancelled", 8)
        assert result.text == first.text
        assert net.registry.num_active == 1
        net.is_up = True
        gate.open()
        await until(lambda: not net.registry.num_active)
        (stream,) = net.notes.ended
        assert len(stream.log) < 400


async def test_cancel_that_was_under_way_when_the_connection_broke() -> None:
    backend, gate = held(LONG)
    async with network(backend) as net, client_of(net) as engine:
        session = engine.generate("hi", max_new_tokens=4000)
        gate.let_through(4)
        await anext(session)
        session.cancel()
        net.cut()  # before the cancel was sent, or the end received
        assert (await session.result()).reason == "cancelled"
        gate.open()
        await until(lambda: not net.registry.num_active)
        assert len(net.notes.ended[0].log) < 400


async def test_request_that_was_never_sent_is_never_sent() -> None:
    async with network(ScriptedBackend(ANSWER)) as net:
        engine = client_of(net)
        session = engine.generate("hi")
        session.cancel()
        assert (await session.result()).reason == "cancelled"
        await turn()
        assert net.notes.started == {}
        await engine.close()


async def test_cancel_before_the_start_names_the_request(script: Script) -> None:
    client = connect_websocket(script.dial, backoff=instantly(), linger_s=0.0)
    session = client.generate("hi")
    far = await script.accept()
    request = await far.request()
    session.cancel()
    assert await far.receive() == Cancel(request_id=request.request_id)
    await far.send(RequestRejected(code="stream_lost", message="", request_id=request.request_id))
    assert (await session.result()).reason == "cancelled"
    await client.close()


# Lifetime.


async def test_engine_that_nobody_entered_connects_and_leaves_by_itself() -> None:
    async with network(ScriptedBackend(ANSWER)) as net:
        engine = client_of(net)
        assert (await engine.generate("hi").result()).text == ANSWER
        await until(lambda: not client_tasks())
        assert net.dialled[0].closed == (1000, "")
        assert (await engine.generate("hi").result()).text == ANSWER
        assert len(net.dialled) == 2
        await engine.close()


async def test_entered_engine_stays_connected() -> None:
    async with network(ScriptedBackend(ANSWER)) as net:
        async with client_of(net) as engine:
            for _ in range(3):
                await engine.generate("hi").result()
            assert len(net.dialled) == 1
        assert client_tasks() == []
        assert net.dialled[0].closed == (1000, "")


async def test_idle_engine_reconnects_only_when_it_is_needed() -> None:
    async with network(ScriptedBackend(ANSWER)) as net, client_of(net) as engine:
        net.cut()
        await until(lambda: not client_tasks())
        assert len(net.dialled) == 1
        assert (await engine.generate("hi").result()).text == ANSWER
        assert len(net.dialled) == 2


async def test_closing_waits_until_the_server_has_ended_the_streams() -> None:
    backend = ScriptedBackend(LONG)
    async with network(backend) as net:
        async with client_of(net) as engine:
            sessions = [engine.generate("hi", max_new_tokens=4000) for _ in range(5)]
            await anext(sessions[0])
        assert backend.open_slots == {}
        for session in sessions:
            with pytest.raises(EngineClosed):
                await session.result()


async def test_closing_without_a_connection_waits_for_nobody() -> None:
    backend, gate = held()
    async with network(backend) as net:
        engine = client_of(net)
        async with engine:
            session = engine.generate("hi")
            await asyncio.to_thread(gate.wait_entered)
            net.is_up = False
            net.cut()
            await until_down(net)
        with pytest.raises(EngineClosed):
            await session.result()
        assert client_tasks() == []


async def test_closing_amid_a_wait_does_not_wait_for_it() -> None:
    waits: list[float] = []

    async def sleep(delay_s: float) -> None:
        waits.append(delay_s)
        if delay_s:
            await asyncio.Event().wait()

    backend, gate = held()
    async with network(backend) as net:
        async with client_of(net, backoff=Backoff(sleep=sleep)) as engine:
            session = engine.generate("hi")
            await asyncio.to_thread(gate.wait_entered)
            net.is_up = False
            net.cut()
            await until(lambda: len(waits) == 2)
        with pytest.raises(EngineClosed):
            await session.result()


async def test_cancelled_close_goes_on_closing() -> None:
    backend, gate = held(LONG)
    async with network(backend) as net:
        engine = client_of(net)
        session = engine.generate("hi")
        await asyncio.to_thread(gate.wait_entered)
        closing = asyncio.create_task(engine.close())
        await turn()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        gate.open()
        await engine.close()
        assert client_tasks() == []
        with pytest.raises(EngineClosed):
            await session.result()


async def test_entering_may_be_cancelled(script: Script) -> None:
    engine = connect_websocket(script.dial, backoff=instantly())
    entering = asyncio.create_task(engine.__aenter__())
    await script.ends.get()  # connected, and never greeted
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert client_tasks() == []


def test_end_of_the_event_loop_cancels_on_the_server() -> None:
    left: list[Session] = []
    backend = ScriptedBackend(LONG)

    async def serve() -> None:
        async with network(backend) as net:
            engine = client_of(net)
            left.append(engine.generate("hi", max_new_tokens=4000))
            await anext(left[0])
            task = next(t for t in asyncio.all_tasks() if t.get_name() == "d2f-client")
            task.cancel()  # as asyncio.run does at its end
            await asyncio.wait([task])
            assert task.cancelled()
            await until(lambda: not net.registry.num_active)
            assert len(net.notes.ended[0].log) < 400
            with pytest.raises(EngineClosed, match="event loop"):
                await texts(left[0])

    asyncio.run(serve())
