"""One worker, one client, a broker that stays: requests, streams, refusals."""

import asyncio
from typing import Literal

import pytest

from brokers import Device, Mosquitto, brief, text_of, worker
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.client.mqtt_line import connect_mqtt
from d2f_stream.core.errors import EngineClosed, InvalidParams, InvalidRequest, MessageTooLarge
from d2f_stream.core.events import Block, Draft, StreamFinished, StreamStarted
from d2f_stream.server.limits import ServeLimits
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.protocol import Cancel, Generate, Overrides, RequestRejected, Resume
from d2f_stream.wire.topics import (
    OperationTopic,
    RequestTopic,
    StreamState,
    StreamTopic,
    codec_of,
    decode,
    operations_of,
    streams_of,
)
from fakes import ANSWER, texts

pytestmark = [pytest.mark.mqtt, pytest.mark.usefixtures("nothing_left")]

REQUEST = "request-0123456789"
CODECS = pytest.mark.parametrize("codec", [JSON, MSGPACK], ids=lambda codec: codec.name)


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_answer_comes_whole(
    mosquitto: Mosquitto, encoding: Literal["json", "msgpack"]
) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)),
        connect_mqtt(mosquitto.url, encoding=encoding, sleep=brief) as engine,
    ):
        blocks = await texts(engine.generate("hi"))
    assert "".join(blocks) == ANSWER
    assert len(blocks) > 5


async def test_engine_knows_the_model_and_passes_parameters_on(mosquitto: Mosquitto) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)),
        connect_mqtt(mosquitto.url) as engine,
    ):
        assert (engine.info.name, engine.defaults.block_size) == ("scripted", 8)
        messages = [{"role": "user", "content": "hi"}]
        result = await engine.generate(messages, max_new_tokens=12, stop=("ffu",)).result()
        given = await engine.generate([1, 2, 3], engine.defaults, block_size=4).result()
        with pytest.raises(InvalidParams):
            engine.generate("hi", block_size=0)
    assert (result.text, result.reason) == ("Block di", "stop")
    assert (given.text, given.usage.prompt_tokens) == (ANSWER, 3)


async def test_many_answers_at_once(mosquitto: Mosquitto) -> None:
    answers = {f"question {n}": f"answer {n} " * (n + 1) for n in range(20)}
    async with (
        worker(mosquitto.url, ScriptedBackend(answers)),
        connect_mqtt(mosquitto.url) as engine,
    ):
        results = await asyncio.gather(*(engine.generate(q).result() for q in answers))
    assert [result.text for result in results] == [a[:128] for a in answers.values()]


async def test_drafts_come_where_they_are_asked_for(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gate)),
        connect_mqtt(mosquitto.url) as engine,
        engine.generate("hi", drafts=True) as session,
    ):
        events = session.events()
        assert isinstance(await anext(events), StreamStarted)
        assert isinstance(await anext(events), Draft)
        gate.open()
        rest = [event async for event in events]
    assert text_of(rest) == ANSWER


async def test_generate_works_without_entering_and_disconnects_when_idle(
    mosquitto: Mosquitto,
) -> None:
    async with worker(mosquitto.url, ScriptedBackend(ANSWER)):
        engine = connect_mqtt(mosquitto.url, linger_s=0.0)
        for _ in range(2):
            assert (await engine.generate("hi").result()).text == ANSWER
        await engine.close()
        with pytest.raises(EngineClosed):
            engine.generate("hi")


@CODECS
async def test_device_reads_a_gapless_stream(mosquitto: Mosquitto, codec: Codec) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)) as one,
        Device(mosquitto, f"reader-{codec.name}") as device,
    ):
        await device.subscribe(streams_of(device.name, "events"))
        request = Generate(request_id=REQUEST, prompt="hi")
        await device.send(RequestTopic(device.name), request, codec=codec)
        first = await device.receive()
        assert first.topic.value == str(StreamTopic(device.name, REQUEST, "events"))
        assert not first.retain
        assert codec_of(first.properties.ContentType) is codec  # type: ignore[union-attr]
        assert ("node", one.gateway.node) in first.properties.UserProperty  # type: ignore[union-attr]
        started = codec.decode_message(first.payload)
        assert isinstance(started, StreamStarted)
        assert started.request_id == REQUEST
        events = [started, *await device.events(codec)]
    assert [event.seq for event in events if not isinstance(event, Draft)] == [*range(len(events))]
    assert text_of(events) == ANSWER


async def test_late_joiner_goes_on_from_the_retained_state(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gate)),
        Device(mosquitto, "early") as early,
        Device(mosquitto, "late") as late,
    ):
        await early.subscribe(str(StreamTopic("early", REQUEST, "state")))
        await early.send(RequestTopic("early"), Generate(request_id=REQUEST, prompt="hi"))
        gate.let_through(6)
        while not (state := decode((await early.receive()).payload, StreamState)).text:
            assert state.terminal is None
        # The events first: what is published between the state and them would else be missed.
        await late.subscribe(str(StreamTopic("early", REQUEST, "events")))
        await late.subscribe(str(StreamTopic("early", REQUEST, "state")))
        blocks: dict[int, str] = {}
        first, terminal = None, None
        while terminal is None:
            message = await late.receive()
            if message.topic.value.endswith("/events"):
                event = JSON.decode_message(message.payload)
                if isinstance(event, Block):
                    blocks[event.seq] = event.text
                continue
            state = decode(message.payload, StreamState)
            if first is None:
                assert message.retain
                assert state.text
                assert ANSWER.startswith(state.text)
                first = state
                gate.open()
            terminal = state.terminal
    assert first is not None
    text = first.text + "".join(blocks[seq] for seq in sorted(blocks) if seq > first.last_seq)
    assert text == ANSWER
    assert isinstance(terminal, StreamFinished)


async def test_state_tells_the_end_and_is_cleared_when_the_stream_is_forgotten(
    mosquitto: Mosquitto,
) -> None:
    limits = ServeLimits(resume_ttl_s=0.1)
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER), limits=limits),
        Device(mosquitto, "stater") as device,
    ):
        await device.subscribe(streams_of("stater", "state"))
        await device.send(RequestTopic("stater"), Generate(request_id=REQUEST, prompt="hi"))
        states = []
        while payload := (await device.receive()).payload:
            states.append(decode(payload, StreamState))
    assert states[-1].text == ANSWER
    assert isinstance(states[-1].terminal, StreamFinished)
    assert [state.last_seq for state in states] == sorted({state.last_seq for state in states})


async def test_same_request_again_attaches_and_is_told_everything(mosquitto: Mosquitto) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)) as one,
        Device(mosquitto, "twice") as device,
    ):
        await device.subscribe(streams_of("twice", "events"))
        request = Generate(request_id=REQUEST, prompt="hi")
        await device.send(RequestTopic("twice"), request)
        first = await device.events()
        await device.send(RequestTopic("twice"), request)
        assert await device.events() == first
        assert one.backend.num_opened == 1


async def test_resume_repeats_what_comes_after(mosquitto: Mosquitto) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)) as one,
        Device(mosquitto, "again") as device,
    ):
        await device.subscribe(streams_of("again", "events"))
        await device.send(RequestTopic("again"), Generate(request_id=REQUEST, prompt="hi"))
        events = await device.events()
        topic = OperationTopic(one.gateway.node, "again", REQUEST)
        await device.send(topic, Resume(stream=events[0].stream, after_seq=4))
        assert await device.events() == events[5:]


async def test_nobody_resumes_or_cancels_a_stream_of_another_client(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gate)) as one,
        Device(mosquitto, "mine") as mine,
        Device(mosquitto, "other") as other,
    ):
        await mine.subscribe(streams_of("mine", "events"))
        await mine.send(RequestTopic("mine"), Generate(request_id=REQUEST, prompt="hi"))
        started = await mine.next_message()
        assert isinstance(started, StreamStarted)
        await other.subscribe(streams_of("other", "events"))
        topic = OperationTopic(one.gateway.node, "other", REQUEST)
        for operation in (Resume(stream=started.stream), Cancel(stream=started.stream)):
            await other.send(topic, operation)
            refused = await other.next_rejection()
            assert (refused.code, refused.stream) == ("stream_lost", started.stream)
        gate.open()
        assert text_of(await mine.events()) == ANSWER


async def test_leaving_a_session_ends_its_stream_at_the_worker(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gate)) as one,
        connect_mqtt(mosquitto.url, client="asks") as engine,
        Device(mosquitto, "watch") as watch,
        Device(mosquitto, "reader") as reader,
    ):
        node = one.gateway.node
        await watch.subscribe(operations_of(node), streams_of("watch", "events"))
        async with engine.generate("hi") as session:
            gate.let_through(6)
            assert (await anext(session)).text
            # Before the end can come: it does at once where no step is under way.
            await reader.subscribe(streams_of("asks", "events"))
            session.cancel()
            await watch.wait_cancelled(node)
            gate.open()
        end = (await reader.events())[-1]
        assert isinstance(end, StreamFinished)
        assert end.reason == "cancelled"
        assert (await session.result()).reason == "cancelled"
        assert one.backend.open_slots == {}


async def test_request_is_cancelled_before_a_worker_has_it(mosquitto: Mosquitto) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)),
        connect_mqtt(mosquitto.url) as engine,
    ):
        session = engine.generate("hi")
        session.cancel()
        result = await session.result()
        assert (result.reason, result.text) == ("cancelled", "")
        assert (await engine.generate("hi").result()).text == ANSWER


async def test_cancel_by_request_id_reaches_whoever_runs_it(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gate)) as one,
        Device(mosquitto, "breaker") as device,
    ):
        await device.subscribe(streams_of("breaker", "events"))
        await device.send(RequestTopic("breaker"), Generate(request_id=REQUEST, prompt="hi"))
        assert isinstance(await device.next_message(), StreamStarted)
        await device.send(StreamTopic("breaker", REQUEST, "cancel"), Cancel(request_id=REQUEST))
        await device.settle(one.gateway.node)
        gate.open()
        (end,) = await device.events()
        assert isinstance(end, StreamFinished)
        assert end.reason == "cancelled"


async def test_refusals_reach_the_session(mosquitto: Mosquitto) -> None:
    limits = ServeLimits(max_new_tokens=200, max_message_bytes=2000)
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER), limits=limits),
        connect_mqtt(mosquitto.url) as engine,
    ):
        with pytest.raises(MessageTooLarge, match="this server allows 200"):
            await engine.generate("hi", max_new_tokens=201).result()
        with pytest.raises(MessageTooLarge, match="this worker allows 2000"):
            await engine.generate("hi" * 1000).result()
        with pytest.raises(MessageTooLarge, match="over MQTT is 524288"):
            engine.generate("hi" * 300_000)
        with pytest.raises(InvalidRequest, match="prompt"):
            await engine.generate("").result()
        assert (await engine.generate("hi").result()).text == ANSWER


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b'{"type": "generate", "request_id": "%s"}', "invalid_request"),
        (b'{"type": "generate", "request_id": "%s", "prompt": 7}', "invalid_request"),
        (b'{"type": "nonsense", "request_id": "%s"}', "protocol_error"),
        (b'{"type": "resume", "request_id": "%s", "stream": "s"}', "protocol_error"),
        (b'{"type": "cancel", "request_id": "%s"}', "protocol_error"),
    ],
)
async def test_unfit_request_is_refused_by_its_name(
    mosquitto: Mosquitto, data: bytes, code: str
) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)),
        Device(mosquitto, "unfit") as device,
    ):
        await device.subscribe(streams_of("unfit", "events"))
        await device.publish(RequestTopic("unfit"), data % REQUEST.encode(), codec=JSON)
        refused = await device.next_rejection()
        assert (refused.code, refused.request_id) == (code, REQUEST)


async def test_request_without_a_usable_name_is_refused_and_the_next_served(
    mosquitto: Mosquitto,
) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)),
        Device(mosquitto, "nameless") as device,
    ):
        await device.subscribe(streams_of("nameless", "events"))
        topic = RequestTopic("nameless")
        for data in (b"", b"\xff", b"{}", b'{"type": "generate", "request_id": "../../x"}'):
            await device.publish(topic, data)
            assert isinstance(await device.next_message(), RequestRejected)
        params = Overrides(max_new_tokens=8)
        await device.send(topic, Generate(request_id=REQUEST, prompt="hi", params=params))
        assert text_of(await device.events()) == ANSWER[:8]
