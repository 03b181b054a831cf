"""Limits: what a client may send, keep open and leave unread."""

import asyncio
import contextlib
import os

import pytest

import fakes
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_runtime.engine.local import Limits
from d2f_stream.core.events import Block
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.listening.uvicorn_guard import MAX_FRAGMENTS
from d2f_stream.server.settings import Timeouts
from d2f_stream.wire.codec import MSGPACK
from fakes import held
from serving import Peer, check_whole, handshake, request, serving, small_socket
from stalls import stall

LONG = "A block of text that nobody reads. " * 100


async def test_oversize_message_closes_its_connection_only() -> None:
    limits = ServeLimits(max_message_bytes=2000)
    async with serving(limits=limits) as server, Peer.to(server) as peer, Peer.to(server) as other:
        await other.hello()
        await peer.hello()
        await peer.send(request("x" * 3000))
        assert (await peer.closed())[0] == 1009
        await other.send(request())
        check_whole(await other.answer())


async def test_message_in_endless_fragments_is_refused() -> None:
    async with serving() as server, Peer.to(server) as peer:
        await peer.hello()
        with contextlib.suppress(Exception):  # the server hangs up in the midst of it
            await peer.socket.send([""] * (MAX_FRAGMENTS + 10))
        assert (await peer.closed())[0] == 1008


async def test_connection_too_many_is_told_to_come_later() -> None:
    limits = ServeLimits(max_connections=1)
    async with serving(limits=limits) as server, Peer.to(server) as peer, Peer.to(server) as second:
        assert await second.closed() == (1013, "all 1 connections in use")
        await peer.hello()


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (ServeLimits(max_streams_per_connection=2), "too_many_streams"),
        (ServeLimits(max_streams=2), "too_many_streams"),
        (ServeLimits(max_streams_per_client=2), "too_many_streams"),
        (
            ServeLimits(max_running_tokens=256, max_running_tokens_per_client=256),
            "too_many_streams",
        ),
        (ServeLimits(max_running_tokens_per_client=256), "too_many_streams"),
        (ServeLimits(requests_per_minute=2), "rate_limited"),
    ],
)
async def test_request_too_many_is_refused_with_the_limit(limits: ServeLimits, code: str) -> None:
    backend, gate = held()
    async with serving(backend, limits=limits) as server, Peer.to(server) as peer:
        await peer.hello()
        requests = [request() for _ in range(3)]
        await peer.send(*requests)
        message = await peer.receive()
        while message.__class__.__name__ == "StreamStarted":
            message = await peer.receive()
        assert (getattr(message, "code", None), getattr(message, "request_id", None)) == (
            code,
            requests[2].request_id,
        )
        gate.open()


async def test_answers_and_prompts_are_bounded() -> None:
    limits, engine = ServeLimits(max_new_tokens=64), Limits(max_prompt_tokens=10)
    async with serving(limits=limits, engine_limits=engine) as server, Peer.to(server) as peer:
        await peer.hello()
        await peer.send(request(params={"max_new_tokens": 65}))
        rejected = await peer.rejected()
        assert rejected.code == "message_too_large"
        assert "65" in rejected.message
        assert "64" in rejected.message
        await peer.send(request("eleven char", params={"max_new_tokens": 64}))
        assert (await peer.rejected()).code == "message_too_large"


async def test_reader_that_never_reads_is_ended_and_costs_others_nothing() -> None:
    # Time enough to read the reason of the end, on however slow a machine.
    limits, timeouts = ServeLimits(stall_timeout_s=0.05), Timeouts(close_s=100)
    backend = ScriptedBackend(LONG, tokens_per_step=64)
    params = {"max_new_tokens": len(LONG)}
    async with (
        serving(backend, limits=limits, timeouts=timeouts) as server,
        small_socket(server) as sock,
        Peer.to(server, sock=sock, max_queue=1) as peer,
        Peer.to(server) as other,
    ):
        await other.hello()
        asked = [request(params=params) for _ in range(16)]
        await peer.send(*asked)
        for _ in range(3):
            await other.send(request(params=params))
            check_whole(await other.answer(), LONG)
        while server.gateway.num_slow_consumers == 0:
            await fakes.turn()
        code, reason = await peer.closed()
        assert (code, server.gateway.num_slow_consumers) == (4408, 1)
        assert "did not take" in reason
        # Its streams are not lost: they can be read over another connection.
        await other.send(asked[-1])
        check_whole(await other.answer(), LONG)


async def test_pong_is_awaited_through_a_stall_of_the_server() -> None:
    ping = b"\x89\x04"  # and four bytes that the pong repeats
    async with serving() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(handshake(server.port))
        await reader.readuntil(b"server.hello")
        for _ in range(2):
            await fakes.turn()
            stall()  # and the next ping is due
            await reader.readuntil(ping)
            stall()
            await fakes.turn()
            writer.write(b"\x8a\x84\0\0\0\0" + await reader.readexactly(4))  # masked by zeros
            await writer.drain()
        writer.close()
        await writer.wait_closed()


async def test_reader_that_never_reads_again_is_dropped_even_if_it_stays() -> None:
    limits, timeouts = ServeLimits(stall_timeout_s=0.05), Timeouts(close_s=0.05)
    backend = ScriptedBackend(LONG, tokens_per_step=64)
    async with (
        serving(backend, limits=limits, timeouts=timeouts) as server,
        small_socket(server) as sock,
        Peer.to(server, sock=sock, max_queue=1, close_timeout=0.1) as peer,
    ):
        params = {"max_new_tokens": len(LONG)}
        await peer.send(*(request(params=params) for _ in range(16)))
        while server.gateway.num_slow_consumers == 0:
            await fakes.turn()
        while server.num_connections:
            await fakes.turn()


async def test_pings_of_a_peer_that_reads_nothing_fill_no_memory() -> None:
    async with serving() as server, small_socket(server) as sock:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, handshake(server.port))
        assert (await loop.sock_recv(sock, 1024)).startswith(b"HTTP/1.1 101")
        mask, payload = b"\0\0\0\0", os.urandom(125)
        ping = bytes([0x89, 0x80 | len(payload)]) + mask + payload
        for _ in range(100):
            await loop.sock_sendall(sock, ping * 500)
        (connection,) = server._uvicorn.server_state.connections
        assert connection.transport.get_write_buffer_size() < 1_000_000  # of 6.4 MB of pongs


async def test_flood_of_requests_waits_for_its_own_replies() -> None:
    async with (
        serving(limits=ServeLimits(max_streams_per_connection=1)) as server,
        Peer.to(server, codec=MSGPACK) as peer,
    ):
        await peer.hello()
        await asyncio.gather(*(peer.resume("unknown") for _ in range(500)))
        for _ in range(500):
            assert (await peer.rejected()).code == "stream_lost"
        await peer.send(request())
        log = await peer.answer()
        assert sum(isinstance(event, Block) for event in log) > 1
