"""Gateway: who is let in, how much of it, and how connections end."""

import asyncio

import pytest

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.channels.memory import MemoryChannel
from d2f_stream.channels.patience import LOOKS
from d2f_stream.core.events import Draft
from d2f_stream.server.limits import ServeLimits
from d2f_stream.wire.codec import JSON
from d2f_stream.wire.protocol import (
    Authenticate,
    Cancel,
    Operation,
    Resume,
    ServerClosing,
    ServerHello,
)
from fakes import ANSWER, held, turn
from gateway_peer import LONG, TOKENS, Peer, peer_of, request, text_of
from memory_network import network, until
from stalls import stall

# Who may connect.


async def test_first_message_authenticates() -> None:
    async with network(ScriptedBackend(ANSWER), auth=TOKENS) as net:
        async with peer_of(net, client=None, greeted=False) as peer:
            await peer.send(Authenticate(token="bob-token"))
            assert isinstance(await peer.receive(), ServerHello)
            await peer.send(request())
            assert text_of(await peer.to_the_end()) == ANSWER
        assert net.notes.ended[0].client == "bob"


@pytest.mark.parametrize(
    "first", [Authenticate(token="wrong"), Authenticate(token=""), request(), b"nonsense"]
)
async def test_anything_else_is_shown_the_door(first: Operation | bytes) -> None:
    async with (
        network(ScriptedBackend(), auth=TOKENS) as net,
        peer_of(net, client=None, greeted=False) as peer,
    ):
        await peer.channel.send(first if isinstance(first, bytes) else JSON.encode(first))
        code, reason = await peer.closed()
    assert code == 4401
    assert "token" in reason
    assert "wrong" not in reason.replace("is wrong", "")
    assert net.notes.started == {}


async def test_connection_that_says_nothing_is_shown_the_door() -> None:
    limits = ServeLimits(auth_timeout_s=0)
    async with (
        network(ScriptedBackend(), auth=TOKENS, limits=limits) as net,
        peer_of(net, client=None, greeted=False) as peer,
    ):
        assert await peer.closed() == (4401, "no token came within 0 s")


async def test_token_that_comes_in_a_stall_of_the_server_is_heard() -> None:
    async with (
        network(ScriptedBackend(), auth=TOKENS) as net,
        peer_of(net, client=None, greeted=False) as peer,
    ):
        await turn()
        sending = asyncio.create_task(peer.send(Authenticate(token="bob-token")))
        stall()
        await sending
        assert isinstance(await peer.receive(), ServerHello)


# Limits.


async def test_number_of_connections_is_bounded() -> None:
    async with network(ScriptedBackend(), limits=ServeLimits(max_connections=1)) as net:
        async with peer_of(net), peer_of(net, greeted=False) as second:
            code, reason = await second.closed()
            assert (code, reason) == (1013, "all 1 connections in use")
        async with peer_of(net):
            assert net.gateway.num_connections == 1


async def test_number_of_streams_of_a_connection_is_bounded_and_attaching_is_free() -> None:
    backend, gate = held()
    limits = ServeLimits(max_streams_per_connection=1)
    async with network(backend, limits=limits) as net, peer_of(net) as peer:
        await peer.send(request(), request(), request("second"))
        rejection = await peer.rejected()
        assert (rejection.code, rejection.request_id) == (
            "too_many_streams",
            request("second").request_id,
        )
        gate.open()
        assert text_of(await peer.to_the_end()) == ANSWER
        await peer.send(request("second"))
        assert text_of(await peer.to_the_end()) == ANSWER


async def test_reader_that_does_not_read_loses_its_connection_only() -> None:
    limits = ServeLimits(stall_timeout_s=0)
    async with network(ScriptedBackend(LONG), limits=limits) as net:
        async with peer_of(net, capacity=1000) as other, peer_of(net, capacity=3) as stalled:
            asked = request("slow", max_new_tokens=4000)
            await stalled.send(asked)
            await other.send(request("other", max_new_tokens=4000))
            assert text_of(await other.to_the_end()) == LONG
            code, reason = await stalled.closed()
            assert code == 4408
            assert "did not take" in reason
            await other.send(asked)
            assert text_of(await other.to_the_end()) == LONG
        assert net.gateway.num_slow_consumers == 1


async def test_reader_is_not_blamed_for_stalls_of_the_server() -> None:
    async with network(ScriptedBackend(LONG)) as net, peer_of(net, capacity=3) as reader:

        async def read_late(name: str) -> None:
            net.notes.ended.clear()
            await reader.send(request(name, max_new_tokens=4000))
            await until(lambda: net.notes.ended)
            for _ in range(LOOKS - 1):
                stall()
                await turn()
            assert text_of(await reader.to_the_end()) == LONG

        await read_late("first")
        await read_late("second")  # with the timer of the first one's last message
        assert net.gateway.num_slow_consumers == 0


async def test_client_that_answers_nothing_is_not_read_without_end() -> None:
    async with network(ScriptedBackend()) as net, peer_of(net, capacity=10) as peer:

        async def flood() -> None:
            for _ in range(1000):
                await peer.send(Cancel(stream="nowhere"))

        flooding = asyncio.create_task(flood())
        await until(lambda: len(peer.channel._peer._inbox) == 10)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not flooding.done()
        (connection,) = net.gateway._connections
        assert len(connection._outgoing._replies) < 50
        for _ in range(1000):
            assert (await peer.rejected()).code == "stream_lost"
        await flooding


async def test_drafts_are_for_those_who_ask() -> None:
    backend = ScriptedBackend(ANSWER, tokens_per_step=1)
    async with network(backend) as net, peer_of(net) as peer, peer_of(net) as other:
        await peer.send(request(drafts=True))
        started = await peer.started()
        await other.send(Resume(stream=started.stream))
        with_drafts, without = await peer.to_the_end(), await other.to_the_end()
    assert any(isinstance(event, Draft) for event in with_drafts)
    assert not any(isinstance(event, Draft) for event in without)
    assert text_of(with_drafts) == text_of(without) == ANSWER


# How connections end.


async def test_last_words_are_heard() -> None:
    """Who hangs up right after a cancel has cancelled, though the server was busy writing."""
    backend, gate = held(LONG)
    async with network(backend) as net:
        async with peer_of(net, capacity=50) as peer:
            asked = request(max_new_tokens=4000)
            await peer.send(asked)
            gate.let_through(200)
            await until(lambda: len(peer.channel._inbox) == 50)  # the writer waits
            await peer.send(*[Cancel(stream="nowhere")] * 40)
            await until(lambda: len(peer.channel._peer._inbox) < 10)  # now the reader waits too
            await peer.send(Cancel(request_id=asked.request_id))
            await peer.channel.close()
            await peer.serving
        gate.open()
        await until(lambda: not net.registry.num_active)
        assert len(net.notes.ended[0].log) < 200


async def test_cancelled_connection_closes_its_channel_and_keeps_its_streams() -> None:
    backend, gate = held()
    async with network(backend) as net:
        near, far = MemoryChannel.pair()
        serving = asyncio.create_task(net.gateway.serve(far, client="alice"))
        peer = Peer(near, serving)
        await peer.receive()
        await peer.send(request())
        await asyncio.to_thread(gate.wait_entered)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert near.closed is not None
        assert net.gateway.num_connections == 0
        gate.open()
        async with peer_of(net) as again:
            await again.send(request())
            assert text_of(await again.to_the_end()) == ANSWER


async def test_closing_is_announced_and_lets_streams_end() -> None:
    backend, gate = held()
    async with network(backend) as net, peer_of(net) as peer:
        await peer.send(request())
        gate.let_through(1)
        await peer.started()
        net.gateway.announce_closing(5)
        announced = await peer.receive()
        assert isinstance(announced, ServerClosing)
        assert announced.deadline_s == 5
        async with peer_of(net, greeted=False) as late:
            assert (await late.closed())[0] == 1012
        ending = asyncio.create_task(net.registry.shut_down(60))
        gate.open()
        assert text_of(await peer.to_the_end()) == ANSWER
        await ending
        closing = asyncio.create_task(net.gateway.close())
        assert (await peer.closed())[0] == 1012
        await closing


async def test_close_may_be_cancelled() -> None:
    async with network(ScriptedBackend(LONG)) as net, peer_of(net, capacity=1) as peer:
        await peer.send(request(max_new_tokens=4000))
        await until(lambda: len(peer.channel._inbox) == 1)
        closing = asyncio.create_task(net.gateway.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert net.gateway.num_connections == 1  # it still has events to send
