"""Hostile messages: the server answers, refuses or hangs up, whatever comes, and goes on."""

import asyncio
import contextlib
import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

import fakes
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import Server
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.protocol import Cancel
from serving import Peer, check_whole, handshake, request, running_server, serving

Frame = bytes | str

GUARD_S = 30
LAST = "the last one"
TAGS = ("authenticate", "generate", "cancel", "resume", "server.hello", "stream.started", "", "x")
FIELDS = ("request_id", "prompt", "params", "on_disconnect", "stream", "after_seq", "token", "type")

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
operations = st.fixed_dictionaries(
    {"type": st.sampled_from(TAGS)},
    optional={name: values for name in FIELDS[:-1]},
)


def encodings(message: dict[str, Any]) -> st.SearchStrategy[Frame]:
    """The message as it should be, cut off, and in the other kind of frame."""
    text = json.dumps(message)
    packed = b""
    with contextlib.suppress(OverflowError):  # an integer beyond 64 bits
        packed = msgspec.msgpack.encode(message)
    cut = st.integers(0, max(len(text), 1)).map(lambda at: text[:at])
    wholes: list[Frame] = [text, text.encode(), packed]
    return st.sampled_from(wholes) | cut


# Deeper than any decoder's stack; some of them larger than a message may be.
deep = st.integers(1, 5000).map(lambda depth: '{"type":"generate","prompt":' + "[" * depth)
frames: st.SearchStrategy[Frame] = (
    st.binary(max_size=200) | st.text(max_size=200) | operations.flatmap(encodings) | deep
)


async def send_all(server: Server, codec: Codec, sent: list[Frame]) -> None:
    """Send them all; nothing may come back but refusals."""
    async with Peer.to(server, codec=codec) as peer, asyncio.timeout(GUARD_S):
        await peer.hello()
        with contextlib.suppress(ConnectionClosed):
            for frame in sent:
                await peer.socket.send(frame)
            await peer.send(Cancel(stream=LAST))
            while (answer := await peer.rejected()).stream != LAST:
                assert answer.message


async def check_alive(server: Server) -> None:
    async with Peer.to(server) as peer:
        await peer.hello()
        await peer.send(request())
        check_whole(await peer.answer())


async def attack(server: Server, sent: list[bytes], opening: bytes) -> None:
    """Send bytes in place of frames, or in place of a handshake."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    with contextlib.suppress(ConnectionError):
        if opening:
            writer.write(opening)
            await reader.readuntil(b"\r\n\r\n")
        for data in sent:
            writer.write(data)
            await writer.drain()
        writer.write_eof()
        await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def check_nothing_left(server: Server, tasks: set["asyncio.Task[Any]"]) -> None:
    while server.gateway.num_connections or server.num_connections:
        await fakes.turn()
    assert server.registry.num_active == 0
    left = asyncio.all_tasks() - tasks - {asyncio.current_task()}
    while {task for task in left if not task.done()}:
        await fakes.turn()


PROPERTY = settings(max_examples=20, suppress_health_check=list(HealthCheck))


def test_malformed_messages_are_refused_and_leave_nothing_behind() -> None:
    limits = ServeLimits(max_message_bytes=4000, max_bad_messages=1000)
    with running_server(limits=limits) as (runner, server):
        tasks = asyncio.all_tasks(runner.get_loop())

        @PROPERTY
        @given(st.lists(st.lists(frames, min_size=20, max_size=40), min_size=2, max_size=3))
        def check(connections: list[list[Frame]]) -> None:
            async def scenario() -> None:
                await asyncio.gather(
                    *(send_all(server, JSON, sent) for sent in connections),
                    *(send_all(server, MSGPACK, sent) for sent in connections),
                )
                assert server.registry.num_active == 0

            runner.run(scenario())

        check()
        runner.run(check_alive(server))
        runner.run(check_nothing_left(server, tasks))


def test_malformed_bytes_end_the_connection_and_leave_nothing_behind() -> None:
    with running_server() as (runner, server):
        tasks = asyncio.all_tasks(runner.get_loop())
        opening = handshake(server.port)
        chunks = st.lists(st.binary(max_size=300), max_size=20)

        @PROPERTY
        @given(st.lists(chunks, min_size=4, max_size=4))
        def check(attacks: list[list[bytes]]) -> None:
            async def scenario() -> None:
                sending = [attack(server, sent, opening) for sent in attacks[:2]]
                sending += [attack(server, sent, b"") for sent in attacks[2:]]
                await asyncio.gather(*sending)

            runner.run(scenario())

        check()
        runner.run(check_alive(server))
        runner.run(check_nothing_left(server, tasks))


async def test_connection_that_sends_only_nonsense_is_ended() -> None:
    async with serving(limits=ServeLimits(max_bad_messages=5)) as server, Peer.to(server) as peer:
        await peer.hello()
        for _ in range(10):
            await peer.socket.send("nonsense")
        code, reason = await peer.closed()
    assert code == 1002
    assert "5 messages" in reason
