"""Gateway: the protocol of /v1/stream, message by message, over a channel in memory."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.channels import ChannelClosed
from d2f_stream.channels.memory import MemoryChannel
from d2f_stream.core.events import Block, Draft, Event, StreamFinished, StreamStarted
from d2f_stream.server.auth import Auth
from d2f_stream.server.limits import ServeLimits
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.protocol import (
    VERSION,
    Authenticate,
    Cancel,
    Generate,
    Operation,
    Overrides,
    Resume,
    ServerClosing,
    ServerHello,
    ServerMessage,
)
from fakes import ANSWER, params
from memory_network import Network, network, until
from peers import Expecting

LONG = "a" * 4000
TOKENS = Auth({"alice": "alice-token", "bob": "bob-token"})


def request(name: str = "request", *, prompt: str = "hi", **fields: Any) -> Generate:
    return Generate(request_id=name.ljust(16, "-"), prompt=prompt, params=Overrides(**fields))


def held(answers: str = ANSWER) -> tuple[ScriptedBackend, StepGate]:
    gate = StepGate()
    return ScriptedBackend(answers, gate=gate), gate


class Peer(Expecting):
    """The client's end of one connection, message by message."""

    def __init__(self, channel: MemoryChannel, serving: "asyncio.Task[None]") -> None:
        self.channel = channel
        self.serving = serving

    async def send(self, *operations: Operation) -> None:
        for operation in operations:
            await self.channel.send(self.channel.codec.encode(operation))

    async def receive(self) -> ServerMessage:
        message = self.channel.codec.decode_message(await self.channel.receive())
        assert message is not None
        return message

    async def to_the_end(self) -> list[Event]:
        events: list[Event] = []
        while not (events and isinstance(events[-1], StreamFinished)):
            message = await self.receive()
            assert isinstance(message, StreamStarted | Block | Draft | StreamFinished), message
            events.append(message)
        return events

    async def closed(self) -> tuple[int, str]:
        try:
            while True:
                await self.channel.receive()
        except ChannelClosed as closed:
            await self.serving
            return closed.code, closed.reason


@asynccontextmanager
async def peer_of(
    net: Network,
    *,
    client: str | None = "alice",
    codec: Codec = JSON,
    capacity: int = 16,
    greeted: bool = True,
) -> AsyncIterator[Peer]:
    near, far = MemoryChannel.pair(codec=codec, capacity=capacity)
    serving = asyncio.create_task(net.gateway.serve(far, client=client))
    peer = Peer(near, serving)
    if greeted:
        assert isinstance(await peer.receive(), ServerHello)
    try:
        yield peer
    finally:
        await near.close()
        await serving


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Block))


async def test_hello_describes_the_model() -> None:
    limits = ServeLimits(resume_ttl_s=7)
    async with (
        network(ScriptedBackend(), limits=limits) as net,
        peer_of(net, greeted=False) as peer,
    ):
        hello = await peer.receive()
    assert isinstance(hello, ServerHello)
    assert (hello.protocol, hello.resume_ttl_s) == (VERSION, 7)
    assert (hello.model.name, hello.model.params) == ("scripted", params())


@pytest.mark.parametrize("codec", [JSON, MSGPACK])
async def test_answer_from_start_to_end(codec: Codec) -> None:
    async with network(ScriptedBackend(ANSWER)) as net, peer_of(net, codec=codec) as peer:
        await peer.send(request())
        events = await peer.to_the_end()
    assert [event.seq for event in events if not isinstance(event, Draft)] == list(
        range(len(events))
    )
    assert text_of(events) == ANSWER


async def test_request_sent_twice_is_read_twice_and_computed_once() -> None:
    async with network(ScriptedBackend(ANSWER)) as net, peer_of(net) as peer:
        await peer.send(request())
        first = await peer.to_the_end()
        await peer.send(request())
        assert await peer.to_the_end() == first
        assert list(net.notes.started.values()) == [1]


async def test_connection_that_broke_is_resumed_on_another() -> None:
    backend, gate = held()
    async with network(backend) as net:
        async with peer_of(net) as peer:
            await peer.send(request())
            gate.let_through(2)
            started = await peer.started()
            first = await peer.receive()
            assert isinstance(first, Block)
        gate.open()
        async with peer_of(net) as peer:
            await peer.send(Resume(stream=started.stream, after_seq=first.seq))
            rest = await peer.to_the_end()
        assert first.text + text_of(rest) == ANSWER


async def test_cancel_by_stream_and_by_request() -> None:
    async with network(ScriptedBackend(LONG)) as net, peer_of(net) as peer:
        await peer.send(request("one", max_new_tokens=4000))
        started = await peer.started()
        await peer.send(Cancel(stream=started.stream))
        ended = (await peer.to_the_end())[-1]
        assert isinstance(ended, StreamFinished)
        assert ended.reason == "cancelled"
        two = request("two", max_new_tokens=4000)
        await peer.send(two, Cancel(request_id=two.request_id))
        ended = (await peer.to_the_end())[-1]
        assert isinstance(ended, StreamFinished)
        assert ended.reason == "cancelled"


async def test_nobody_reads_or_cancels_the_stream_of_another() -> None:
    backend, gate = held()
    async with network(backend) as net, peer_of(net) as alice, peer_of(net, client="bob") as bob:
        await alice.send(request())
        gate.let_through(1)
        started = await alice.started()
        await bob.send(
            Resume(stream=started.stream),
            Cancel(stream=started.stream),
            Cancel(request_id=request().request_id),
        )
        rejections = [await bob.rejected() for _ in range(3)]
        assert {rejection.code for rejection in rejections} == {"stream_lost"}
        assert rejections[0].stream == started.stream
        gate.open()
        assert text_of(await alice.to_the_end()) == ANSWER


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        (request(prompt=""), "invalid_prompt"),
        (request(prompt="x" * 5000), "prompt_too_long"),
        (request(temperature=-1.0), "invalid_params"),
        (Generate(request_id="short", prompt="hi"), "invalid_request"),
        (Resume(stream="nowhere"), "stream_lost"),
        (Cancel(stream="nowhere"), "stream_lost"),
        (Cancel(), "invalid_request"),
        (Cancel(stream="both", request_id="of-them"), "invalid_request"),
        (Authenticate(token="what for"), "unauthorized"),
    ],
)
async def test_refused_operation_leaves_the_connection_alone(
    operation: Operation, code: str
) -> None:
    async with network(ScriptedBackend(ANSWER), auth=TOKENS) as net, peer_of(net) as peer:
        await peer.send(operation)
        rejection = await peer.rejected()
        assert rejection.code == code
        assert rejection.request_id == getattr(operation, "request_id", None)
        assert rejection.stream == getattr(operation, "stream", None)
        await peer.send(request("good"))
        assert text_of(await peer.to_the_end()) == ANSWER


@pytest.mark.parametrize("codec", [JSON, MSGPACK])
async def test_operation_that_cannot_be_read_is_refused_under_its_name(codec: Codec) -> None:
    encode = json.dumps if codec is JSON else msgspec.msgpack.encode
    bad = {"type": "generate", "request_id": "n" * 20, "prompt": "hi", "params": {"colour": 1}}
    async with network(ScriptedBackend()) as net, peer_of(net, codec=codec) as peer:
        data = encode(bad)
        await peer.channel.send(data if isinstance(data, bytes) else data.encode())
        rejection = await peer.rejected()
        assert (rejection.request_id, rejection.code) == ("n" * 20, "invalid_request")
        assert "colour" in rejection.message


async def test_connection_that_sends_nonsense_is_closed() -> None:
    async with network(ScriptedBackend()) as net, peer_of(net, capacity=100) as peer:
        for _ in range(net.registry.limits.max_bad_messages):
            await peer.channel.send(b"\xff\x00 nonsense")
        code, reason = await peer.closed()
    assert code == 1002
    assert "could not be read" in reason


@settings(deadline=None, max_examples=60)
@given(
    messages=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from(
                [
                    JSON.encode(message)
                    for message in (
                        request(),
                        request("other", drafts=True),
                        Cancel(request_id=request().request_id),
                        Cancel(stream="nowhere"),
                        Resume(stream="nowhere", after_seq=10**9),
                        Authenticate(token=""),
                    )
                ]
            ),
        ),
        max_size=15,
    ),
    leaves_after=st.integers(0, 40),
)
def test_whatever_is_sent_the_server_goes_on(messages: list[bytes], leaves_after: int) -> None:
    async def main() -> None:
        async with (
            network(ScriptedBackend(ANSWER)) as net,
            peer_of(net, capacity=2) as rude,
            peer_of(net, client="bob") as polite,
        ):

            async def talk() -> None:
                for message in messages:
                    await rude.channel.send(message)

            async def listen() -> None:
                for _ in range(leaves_after):
                    await rude.channel.receive()

            talking = [asyncio.create_task(part) for part in (talk(), listen())]
            await polite.send(request("polite"))
            assert text_of(await polite.to_the_end()) == ANSWER
            for task in talking:
                task.cancel()
            await asyncio.wait(talking)
            rude.channel.sever()

    asyncio.run(main())


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
