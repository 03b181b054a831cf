"""The stream protocol over a real websocket, spoken by the `websockets` library."""

import asyncio

import pytest

import fakes
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_runtime.engine import LocalEngine
from d2f_stream.core.events import Block, Draft, StreamFinished
from d2f_stream.server.limits import ServeLimits
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.protocol import Cancel
from fakes import held
from memory_network import until
from serving import Peer, check_whole, request, serving, text_of


@pytest.mark.parametrize("codec", [JSON, MSGPACK], ids=lambda codec: str(codec.name))
async def test_answer_comes_whole_and_in_order(codec: Codec) -> None:
    async with serving() as server, Peer.to(server, codec=codec) as peer:
        hello = await peer.hello()
        assert hello.model.name == "scripted"
        await peer.send(request())
        check_whole(await peer.answer())


async def test_client_that_offers_no_subprotocol_speaks_json() -> None:
    async with serving() as server, Peer.to(server, subprotocols=[]) as peer:
        assert peer.socket.subprotocol is None
        await peer.hello()
        await peer.send(request())
        check_whole(await peer.answer())


async def test_several_streams_of_a_connection_come_interleaved() -> None:
    answers = {f"prompt {number}": f"{number}: {fakes.ANSWER}" for number in range(20)}
    async with serving(ScriptedBackend(answers)) as server, Peer.to(server) as peer:
        await peer.hello()
        await peer.send(*(request(prompt) for prompt in answers))
        logs = await peer.events(num_streams=len(answers))
    texts = [text_of(log) for log in logs.values()]
    assert sorted(texts) == sorted(answers.values())
    for log, text in zip(logs.values(), texts, strict=True):
        check_whole(log, text)


async def test_drafts_come_to_those_who_ask_for_them() -> None:
    backend, gate = held()
    async with serving(backend) as server, Peer.to(server) as peer:
        await peer.hello()
        started = await peer.generate(params={"drafts": True})
        gate.let_through(1)
        draft = await peer.receive()
        assert isinstance(draft, Draft)
        assert draft.stream == started.stream
        gate.open()
        messages = [draft]
        while not isinstance(messages[-1], StreamFinished):
            messages.append(await peer.receive())  # type: ignore[arg-type]
    blocks = [message for message in messages if isinstance(message, Block)]
    assert "".join(block.text for block in blocks) == fakes.ANSWER


async def test_cancel_ends_the_stream_with_what_it_committed() -> None:
    backend, gate = held("on and on " * 100)
    async with serving(backend) as server, Peer.to(server) as peer:
        await peer.hello()
        started = await peer.generate()
        gate.let_through(3)
        block = await peer.receive()
        assert isinstance(block, Block)
        await peer.cancel(started.stream)
        await peer.send(Cancel(stream="gone"))  # its answer shows that the first was handled
        rejected = await peer.rejected()
        assert rejected.code == "stream_lost"
        gate.open()
        log = await peer.answer()
    assert isinstance(log[-1], StreamFinished)
    assert log[-1].reason == "cancelled"
    assert log[-1].text_length == len(block.text + text_of(log))


@pytest.mark.parametrize("after_seq", [-1, 0, 3])
async def test_resume_gives_exactly_the_rest(after_seq: int) -> None:
    backend, gate = held()
    async with serving(backend) as server:
        async with Peer.to(server) as peer:
            await peer.hello()
            stream = (await peer.generate()).stream
            gate.let_through(6)
            while not (isinstance(event := await peer.receive(), Block) and event.seq >= 3):
                pass
        gate.open()
        async with Peer.to(server) as peer:
            await peer.hello()
            await peer.resume(stream, after_seq=after_seq)
            check_whole(await peer.answer(), after_seq=after_seq)


async def test_stream_can_be_resumed_after_its_end() -> None:
    async with serving() as server, Peer.to(server) as peer:
        await peer.hello()
        await peer.send(request())
        log = await peer.answer()
        await peer.resume(log[0].stream)
        assert await peer.answer() == log


async def test_stream_is_forgotten_a_time_after_its_end() -> None:
    limits = ServeLimits(resume_ttl_s=0.05)
    async with serving(limits=limits) as server, Peer.to(server) as peer:
        await peer.hello()
        await peer.send(request())
        log = await peer.answer()
        while server.registry.num_retained:
            await fakes.turn()
        await peer.resume(log[0].stream)
        assert (await peer.rejected()).code == "stream_lost"


async def test_stream_goes_on_without_its_connection_unless_asked_otherwise() -> None:
    backend, gate = held()
    async with serving(backend) as server:
        engine = server.registry.engine
        assert isinstance(engine, LocalEngine)
        async with Peer.to(server) as peer:
            await peer.hello()
            kept = await peer.generate()
            await asyncio.to_thread(gate.wait_entered)
            await peer.send(request(on_disconnect="cancel"))
            await until(
                lambda: engine.current_load.num_waiting
            )  # while the first one's step is held
            gate.let_through(1)
            ended = await peer.started()
        while server.gateway.num_connections:
            await fakes.turn()
        gate.open()
        async with Peer.to(server) as peer:
            await peer.hello()
            await peer.resume(kept.stream)
            check_whole(await peer.answer())
            await peer.resume(ended.stream)
            finished = (await peer.answer())[-1]
            assert isinstance(finished, StreamFinished)
            assert finished.reason == "cancelled"


async def test_repeated_request_attaches_and_starts_nothing() -> None:
    backend = ScriptedBackend(fakes.ANSWER)
    async with serving(backend) as server:
        again = request()
        async with Peer.to(server) as peer:
            await peer.hello()
            await peer.send(again)
            first = await peer.answer()
        async with Peer.to(server) as peer:
            await peer.hello()
            await peer.send(again)
            assert await peer.answer() == first
        assert backend.num_opened == 1


async def test_refused_request_leaves_the_connection_and_its_streams_alone() -> None:
    backend, gate = held()
    async with serving(backend) as server, Peer.to(server) as peer:
        await peer.hello()
        await peer.generate()
        bad = request(params={"temperature": -1.0})
        await peer.send(bad)
        rejected = await peer.rejected()
        assert (rejected.code, rejected.request_id) == ("invalid_params", bad.request_id)
        assert "temperature is -1.0" in rejected.message
        gate.open()
        assert text_of(await peer.answer()) == fakes.ANSWER


async def test_engine_failure_reaches_every_stream_and_healthz() -> None:
    backend, gate = held(errors={1: RuntimeError("the device is gone")})
    async with serving(backend, on_engine_failure="exit") as server, Peer.to(server) as peer:
        await peer.hello()
        await peer.generate()
        gate.open()
        failed = (await peer.answer())[-1]
        assert getattr(failed, "code", None) == "engine_failed"
        await peer.send(request())
        assert (await peer.rejected()).code == "engine_failed"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"status":"engine_failed"' in answer
