"""RemoteEngine against a server that refuses, closes, or speaks otherwise."""

import msgspec
import pytest

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.channels import Channel, ChannelClosed
from d2f_stream.channels.memory import MemoryChannel
from d2f_stream.client.websocket_line import WebsocketLine, connect_websocket
from d2f_stream.core.errors import (
    D2FError,
    InvalidParams,
    InvalidPrompt,
    LimitExceeded,
    MessageTooLarge,
    ProtocolError,
    RateLimited,
    ServerShuttingDown,
    TooManyStreams,
    Unauthorized,
)
from d2f_stream.server.auth import Auth
from d2f_stream.server.limits import ServeLimits
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.protocol import (
    Cancel,
    RequestRejected,
)
from fakes import ANSWER, block, finished, held, turn
from memory_network import client_of, connected, instantly, network, until
from scripted_server import Far, Script, start_of


@pytest.fixture
async def script() -> Script:
    async with network(ScriptedBackend()) as net:
        return Script(net.gateway.hello)


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


@pytest.mark.parametrize("codec", [JSON, MSGPACK])
@pytest.mark.parametrize("is_known", [True, False])
async def test_request_that_no_encoding_holds_is_refused_alone(
    codec: Codec, is_known: bool
) -> None:
    backend, gate = held()
    async with network(backend, codec=codec) as net:
        engine = connect_websocket(net.dial, backoff=instantly())
        if is_known:
            await engine.__aenter__()
        running = [engine.generate("hi") for _ in range(2)]
        for prompt in ("\ud83d", [{"role": "user", "content": "\ud83d"}], [10**30]):
            with pytest.raises(InvalidPrompt, match="the prompt cannot be sent"):
                engine.generate(prompt)
        for name, value in (("stop", "\ud83d"), ("max_new_tokens", 10**30), ("seed", 2**64)):
            with pytest.raises(InvalidParams, match=f"{name} is "):
                engine.generate("hi", **{name: value})  # type: ignore[arg-type]
        with pytest.raises(InvalidParams, match=r"params is \{\} but must be GenerationParams"):
            engine.generate("hi", {})  # type: ignore[arg-type]
        odd = engine.generate("hi", raw=object())  # type: ignore[arg-type]
        gate.open()
        assert [(await session.result()).text for session in (*running, odd)] == [ANSWER] * 3
        await engine.close()


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
