"""RemoteEngine against a server whose connections break, go silent, or were never there."""

import asyncio

import pytest

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.channels import Channel, ChannelClosed
from d2f_stream.channels.memory import MemoryChannel
from d2f_stream.client.backoff import Backoff
from d2f_stream.client.websocket_line import connect_websocket
from d2f_stream.core.errors import (
    ConnectionLost,
    StreamLost,
)
from d2f_stream.core.events import Draft, StreamNames, StreamStarted
from d2f_stream.server.limits import ServeLimits
from d2f_stream.wire.protocol import (
    Resume,
)
from fakes import ANSWER, STREAM, block, finished, held, texts, turn
from memory_network import client_of, connected, instantly, network, until
from scripted_server import LONG, Far, Script, client_tasks, start_of, until_down
from stalls import stall


@pytest.fixture
async def script() -> Script:
    async with network(ScriptedBackend()) as net:
        return Script(net.gateway.hello)


# Reconnecting.


async def test_hello_that_comes_in_a_stall_of_the_client_is_heard(script: Script) -> None:
    engine = connect_websocket(script.dial, backoff=instantly(), linger_s=0.0)
    entering = asyncio.create_task(engine.__aenter__())
    far = Far(await script.ends.get())
    await turn()
    sending = asyncio.create_task(far.send(script.hello))
    stall()
    await asyncio.gather(sending, entering)
    assert script.ends.empty()  # it has not tried again
    await engine.close()


async def test_stream_goes_on_where_its_connection_broke() -> None:
    backend, gate = held()
    async with network(backend) as net, client_of(net) as engine:
        session = engine.generate("hi")
        gate.let_through(4)
        first = await anext(session)
        net.cut()
        gate.open()
        assert first.text + "".join(await texts(session)) == ANSWER
        assert len(net.dialled) == 2
        assert list(net.notes.started.values()) == [1]


async def test_events_carry_the_names_that_the_request_brings() -> None:
    async with connected(ScriptedBackend(ANSWER)) as engine:
        session = engine.generate("hi", names=StreamNames("mine", "asked"), drafts=True)
        first, *rest = [event async for event in session.events()]
    assert isinstance(first, StreamStarted)
    assert (first.stream, first.request_id) == ("mine", "asked")
    assert {event.stream for event in rest} == {"mine"}


async def test_request_that_had_not_started_is_sent_again_under_its_id() -> None:
    backend, gate = held()
    async with network(backend) as net, client_of(net) as engine:
        session = engine.generate("hi")
        await asyncio.to_thread(gate.wait_entered)
        assert net.registry.num_active == 1
        net.cut()
        gate.open()
        assert (await session.result()).text == ANSWER
        assert list(net.notes.started.values()) == [1]


async def test_drafts_go_on_after_a_reconnect() -> None:
    backend, gate = held()
    async with network(backend) as net, client_of(net) as engine:
        events = engine.generate("hi", drafts=True).events()
        gate.let_through(1)
        while not isinstance(await anext(events), Draft):
            pass
        net.cut()
        gate.open()
        rest = [event async for event in events]
        assert len(net.dialled) == 2
    # The pipeline had drawn a few blocks at most; the last ones were drawn after the reconnect.
    assert max(event.index for event in rest if isinstance(event, Draft)) > 6


async def test_restarted_server_has_lost_what_had_started_and_serves_the_rest() -> None:
    backend, gate = held()
    async with network(backend) as net, client_of(net) as engine:
        session = engine.generate("hi")
        gate.let_through(4)
        await anext(session)
        net.is_up = False
        net.cut()
        await until_down(net)
        waiting = engine.generate("hi")
        old, net.is_up = net.registry, True
        net.start()
        gate.open()
        with pytest.raises(StreamLost):
            await texts(session)
        assert (await waiting.result()).text == ANSWER
        await old.shut_down(0)


async def test_client_gives_up_after_its_time() -> None:
    backend, gate = held()
    async with network(backend) as net, client_of(net) as engine:
        started = engine.generate("hi")
        gate.let_through(4)
        await anext(started)
        unstarted = engine.generate("hi")
        await turn()
        net.is_up = False
        net.cut()
        for session in (started, unstarted):
            with pytest.raises(ConnectionLost, match="for 30 s"):
                await session.result()
        assert client_tasks() == []
        net.is_up = True
        gate.open()
        assert (await engine.generate("hi").result()).text == ANSWER  # the next one tries anew


async def test_waits_grow_and_are_jittered() -> None:
    waits: list[float] = []
    now_s = 0.0

    async def sleep(delay_s: float) -> None:
        nonlocal now_s
        waits.append(delay_s)
        now_s += delay_s

    fixed = Backoff(
        timeout_s=10.0, sleep=sleep, chance=lambda: 0.5, clock=lambda: now_s, first_s=0.25
    )
    backend, gate = held()
    async with network(backend) as net, client_of(net, backoff=fixed) as engine:
        session = engine.generate("hi")
        await asyncio.to_thread(gate.wait_entered)
        net.is_up = False
        net.cut()
        with pytest.raises(ConnectionLost):
            await session.result()
    assert waits[:6] == [0.0, 0.125, 0.25, 0.5, 1.0, 2.0]
    assert max(waits) == 2.5
    assert sum(waits) <= 10.0


async def test_server_that_was_never_there_is_told_at_once() -> None:
    async with network(ScriptedBackend()) as net:
        net.is_up = False
        with pytest.raises(ConnectionLost, match="nobody answers"):
            async with client_of(net):
                pass
        engine = client_of(net)
        with pytest.raises(ConnectionLost, match="nobody answers"):
            await engine.generate("hi").result()
        net.is_up = True
        assert (await engine.generate("hi").result()).text == ""


async def test_server_that_accepts_and_hangs_up_is_not_tried_for_ever() -> None:
    num_dials = 0

    async def dial() -> Channel:
        nonlocal num_dials
        num_dials += 1
        near, far = MemoryChannel.pair()
        await far.close(1013, "all connections in use")
        return near

    engine = connect_websocket(dial, backoff=instantly())
    with pytest.raises(ConnectionLost, match="all connections in use"):
        await engine.generate("hi").result()
    assert 5 < num_dials < 50


async def test_losses_far_apart_do_not_add_up() -> None:
    """Each connection brings some blocks, so each loss has its 30 s anew."""
    cuts = iter([20] * 30)
    async with network(ScriptedBackend(LONG), cuts=cuts) as net, client_of(net) as engine:
        assert (await engine.generate("hi", max_new_tokens=4000).result()).text == LONG
        assert net.num_cut == 30


@pytest.mark.parametrize("code", [1006, 1011, 1012, 1013, 4408])
async def test_close_code_that_allows_it_is_followed_by_a_resume(code: int) -> None:
    backend, gate = held()
    async with network(backend) as net, client_of(net) as engine:
        session = engine.generate("hi")
        gate.let_through(4)
        first = await anext(session)
        await net.dialled[0].close(code)
        gate.open()
        assert first.text + "".join(await texts(session)) == ANSWER


async def test_slow_consumer_is_disconnected_and_resumes() -> None:
    limits = ServeLimits(stall_timeout_s=0)  # no patience: a full pipe is a stalled reader
    async with network(ScriptedBackend(LONG), limits=limits, capacity=4) as net:
        async with client_of(net) as engine:
            session = engine.generate("hi", max_new_tokens=4000)
            first = await anext(session)
            net.dialled[0].flow.clear()
            await until(lambda: net.gateway.num_slow_consumers)
            net.dialled[0].flow.set()
            assert first.text + "".join(await texts(session)) == LONG
        assert list(net.notes.started.values()) == [1]
        assert net.dialled[0].closed is not None
        assert net.dialled[0].closed[0] == 4408


async def test_missing_event_is_asked_for_once_on_each_connection(script: Script) -> None:
    async with asyncio.TaskGroup() as group:
        client = connect_websocket(script.dial, backoff=instantly(), linger_s=0.0)
        session = client.generate("hi")
        far = await script.accept()
        request = await far.request()
        reading = group.create_task(texts(session))
        await far.send(start_of(request), block(1, "b"), block(2, "c"))
        assert await far.receive() == Resume(stream=STREAM, after_seq=0)
        far.channel.sever()
        far = await script.accept()
        assert await far.receive() == Resume(stream=STREAM, after_seq=0)
        await far.send(block(2, "c"))
        assert await far.receive() == Resume(stream=STREAM, after_seq=0)
        await far.send(block(0, "a"), block(0, "a"), block(1, "b"), block(2, "c"), finished(4, 3))
        await far.send(block(1, "b"))  # late, and known
        assert await reading == ["a", "b", "c"]
        with pytest.raises(ChannelClosed):
            await far.receive()  # nothing more was asked; idle, the client leaves
