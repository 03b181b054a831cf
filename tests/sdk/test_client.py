"""RemoteEngine against a server whose connections break, refuse, restart, or go silent."""

import asyncio
from dataclasses import dataclass

import msgspec
import pytest

from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.channels import Channel, ChannelClosed
from d2f_stream.channels.memory import MemoryChannel
from d2f_stream.client.backoff import Backoff
from d2f_stream.client.websocket_line import WebsocketLine, connect_websocket
from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    EngineClosed,
    InvalidParams,
    LimitExceeded,
    MessageTooLarge,
    ProtocolError,
    RateLimited,
    ServerShuttingDown,
    StreamLost,
    TooManyStreams,
    Unauthorized,
)
from d2f_stream.core.events import Draft, StreamNames, StreamStarted
from d2f_stream.core.session import Session
from d2f_stream.server.auth import Auth
from d2f_stream.server.limits import ServeLimits
from d2f_stream.wire.codec import JSON
from d2f_stream.wire.protocol import (
    Cancel,
    Generate,
    Operation,
    RequestRejected,
    Resume,
    ServerHello,
    ServerMessage,
)
from fakes import ANSWER, STREAM, block, finished, started, texts, turn
from memory_network import Network, client_of, connected, instantly, network, until

LONG = "a" * 4000


def held(answers: str = ANSWER) -> tuple[ScriptedBackend, StepGate]:
    gate = StepGate()
    return ScriptedBackend(answers, gate=gate), gate


def client_tasks() -> list[str]:
    return [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("d2f-client")]


async def until_down(net: Network) -> None:
    await until(lambda: not net.gateway.num_connections)
    await turn()


@dataclass
class Script:
    """A server of a few lines: each connection is answered by the test itself."""

    hello: ServerHello

    def __post_init__(self) -> None:
        self.ends: asyncio.Queue[MemoryChannel] = asyncio.Queue(maxsize=100)

    async def dial(self) -> Channel:
        near, far = MemoryChannel.pair()
        await self.ends.put(far)
        return near

    async def accept(self) -> "Far":
        far = Far(await self.ends.get())
        await far.send(self.hello)
        return far


@dataclass
class Far:
    """The server's end of one connection."""

    channel: MemoryChannel

    async def send(self, *messages: ServerMessage) -> None:
        for message in messages:
            await self.channel.send(JSON.encode(message))

    async def receive(self) -> Operation:
        return JSON.decode_operation(await self.channel.receive())

    async def request(self) -> Generate:
        operation = await self.receive()
        assert isinstance(operation, Generate)
        return operation


@pytest.fixture
async def script() -> Script:
    async with network(ScriptedBackend()) as net:
        return Script(net.gateway.hello)


def start_of(request: Generate) -> ServerMessage:
    return msgspec.structs.replace(started(), request_id=request.request_id)


# Reconnecting.


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


# Refusals.


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("out_of_capacity", D2FError),
        ("rate_limited", RateLimited),
        ("prompt_too_long", D2FError),
        ("something_new", D2FError),
    ],
)
async def test_rejection_is_raised_with_its_code(
    script: Script, code: str, kind: type[D2FError]
) -> None:
    client = connect_websocket(script.dial, backoff=instantly(), linger_s=0.0)
    session = client.generate("hi")
    far = await script.accept()
    request = await far.request()
    await far.send(
        RequestRejected(code=code, message="no", request_id=request.request_id, retry_after_s=2.5)
    )
    with pytest.raises(kind, match="no") as caught:
        await session.result()
    assert caught.value.code == code
    if isinstance(caught.value, LimitExceeded):
        assert caught.value.retry_after_s == 2.5
    await client.close()


async def test_rate_limit_says_when_to_come_again() -> None:
    limits = ServeLimits(requests_per_minute=1)
    async with connected(ScriptedBackend(ANSWER), limits=limits) as engine:
        assert (await engine.generate("hi").result()).text == ANSWER
        with pytest.raises(RateLimited) as caught:
            await engine.generate("hi").result()
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 60


async def test_too_many_streams_are_refused_alone() -> None:
    backend, gate = held()
    async with network(backend, limits=ServeLimits(max_streams=2)) as net, client_of(net) as engine:
        sessions = [engine.generate("hi") for _ in range(3)]
        with pytest.raises(TooManyStreams, match="limit is 2"):
            await sessions[2].result()
        gate.open()
        assert [(await session.result()).text for session in sessions[:2]] == [ANSWER] * 2


async def test_unauthorized_is_final() -> None:
    num_dials = 0
    async with network(ScriptedBackend(), auth=Auth({"alice": "a-token"}), client=None) as net:

        async def dial() -> Channel:
            nonlocal num_dials
            num_dials += 1
            channel = await net.dial()
            await channel.send(JSON.encode(Cancel(stream="not authenticated")))
            return channel

        engine = connect_websocket(dial, backoff=instantly())
        with pytest.raises(Unauthorized, match="token"):
            await engine.generate("hi").result()
        with pytest.raises(Unauthorized, match="token"):
            engine.generate("hi")
        assert not engine.usable
        with pytest.raises(Unauthorized, match="token"):
            async with engine:
                pass
    assert num_dials == 1


async def test_server_that_closes_refuses_new_requests_and_ends_the_old() -> None:
    backend, gate = held()
    async with network(backend) as net, client_of(net) as engine:
        session = engine.generate("hi")
        gate.let_through(4)
        await anext(session)
        net.gateway.announce_closing(10)
        line = engine._line
        assert isinstance(line, WebsocketLine)
        await until(lambda: line._conversation.closing is not None)
        with pytest.raises(ServerShuttingDown, match="shutting down"):
            engine.generate("hi")
        gate.open()
        assert (await session.result()).text == ANSWER
        await net.gateway.close()
        net.start()
        await turn()
        assert (await engine.generate("hi").result()).text == ANSWER


async def test_defaults_that_are_known_refuse_a_bad_parameter_at_once() -> None:
    async with connected(ScriptedBackend(ANSWER)) as engine:
        with pytest.raises(InvalidParams, match="temperature"):
            engine.generate("hi", temperature=-1)


async def test_message_beyond_the_servers_size_fails_alone(script: Script) -> None:
    client = connect_websocket(script.dial, backoff=instantly(), linger_s=0.0)
    small, large = client.generate("hi"), client.generate("x" * 1000)
    far = await script.accept()
    asked = [await far.request(), await far.request()]
    await far.channel.close(1009, "message too big")
    with pytest.raises(MessageTooLarge, match="1009"):
        await large.result()
    far = await script.accept()
    request = await far.request()
    assert request == asked[0]
    await far.send(start_of(request), block(0, "a"), finished(2, 1))
    assert (await small.result()).text == "a"
    await client.close()


async def test_request_that_fails_before_it_is_sent_again_is_not_sent(script: Script) -> None:
    client = connect_websocket(script.dial, backoff=instantly(), linger_s=0.0)
    sessions = [client.generate("hi") for _ in range(3)]
    far = await script.accept()
    for _ in sessions:
        await far.request()
    far.channel.sever()
    far = Far(await script.ends.get())
    unreadable = RequestRejected(code="invalid_request", message="no field of mine")
    await far.send(script.hello, unreadable)  # in one piece: nothing was sent again in between
    for session in sessions:
        with pytest.raises(D2FError, match="no field of mine"):
            await session.result()
    with pytest.raises(ChannelClosed):
        await far.receive()
    await client.close()


async def test_operation_that_the_server_cannot_read_hangs_nobody(script: Script) -> None:
    client = connect_websocket(script.dial, backoff=instantly(), linger_s=0.0)
    session = client.generate("hi")
    far = await script.accept()
    await far.request()
    await far.send(RequestRejected(code="invalid_request", message="no field of mine"))
    with pytest.raises(D2FError, match="no field of mine"):
        await session.result()
    await client.close()


@pytest.mark.parametrize("first", [b"{}", b"not json", b'{"type": "server.closing"}'])
async def test_what_is_no_d2f_server_is_told_so(first: bytes) -> None:
    async def dial() -> Channel:
        near, far = MemoryChannel.pair()
        await far.send(first)
        return near

    with pytest.raises(ProtocolError):
        await connect_websocket(dial, backoff=instantly()).generate("hi").result()


async def test_server_of_another_version_is_told_so(script: Script) -> None:
    script.hello = msgspec.structs.replace(script.hello, protocol=2)
    client = connect_websocket(script.dial, backoff=instantly())
    session = client.generate("hi")
    await script.accept()
    with pytest.raises(ProtocolError, match="version 2"):
        await session.result()


async def test_message_of_a_later_version_is_skipped(script: Script) -> None:
    client = connect_websocket(script.dial, backoff=instantly(), linger_s=0.0)
    session = client.generate("hi")
    far = await script.accept()
    request = await far.request()
    await far.send(start_of(request))
    await far.channel.send(b'{"type": "stream.weather", "stream": "stream-1", "sunny": true}')
    await far.send(block(0, "a"), finished(2, 1))
    assert (await session.result()).text == "a"
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
