"""Gateway: the protocol of /v1/stream, message by message, over a channel in memory."""

import asyncio
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.events import Block, Draft, StreamFinished
from d2f_stream.server.limits import ServeLimits
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.protocol import (
    VERSION,
    Authenticate,
    Cancel,
    Generate,
    Operation,
    Resume,
    ServerHello,
)
from fakes import ANSWER, held, params
from gateway_peer import LONG, TOKENS, peer_of, request, text_of
from memory_network import network


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


@settings(max_examples=60)
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
