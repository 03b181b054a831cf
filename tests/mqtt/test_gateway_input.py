"""Whatever comes over the broker, a gateway answers or drops it and goes on."""

import asyncio
import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brokers import Device, Mosquitto, text_of, worker
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.channels.broker import Incoming
from d2f_stream.server.mqtt.gateway import MqttGateway
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.wire.codec import JSON, MSGPACK
from d2f_stream.wire.protocol import Generate, RequestRejected
from d2f_stream.wire.topics import RequestTopic, streams_of
from fakes import ANSWER, engine_over

REQUEST = "request-0123456789"

levels = st.sampled_from(
    ["d2f", "v1", "requests", "clients", "nodes", "operations", "cancel", "events", "status"]
) | st.text(max_size=20)
near_topics = st.sampled_from(
    [
        "d2f/v1/requests/alice",
        f"d2f/v1/clients/alice/{REQUEST}/cancel",
        f"d2f/v1/nodes/n/operations/alice/{REQUEST}",
        "d2f/v1/requests/+",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
operations = st.fixed_dictionaries(
    {"type": st.sampled_from(["generate", "resume", "cancel", "authenticate", "else"]) | values},
    optional={
        "request_id": st.just(REQUEST) | values,
        "prompt": values,
        "stream": values,
        "after_seq": values,
        "params": values,
        "token": values,
    },
)


def encoded(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


payloads = st.binary(max_size=80) | operations.map(encoded) | values.map(encoded)
messages = st.builds(
    Incoming,
    topic=near_topics | st.lists(levels, max_size=7).map("/".join),
    payload=payloads,
    content_type=st.sampled_from([None, "", JSON.content_type, MSGPACK.content_type, "text/plain"]),
    notes=st.just({}),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(messages, max_size=25))
def test_no_message_breaks_a_gateway(batch: list[Incoming]) -> None:
    async def feed() -> None:
        async with engine_over(ScriptedBackend("short")) as engine:
            registry = StreamRegistry(engine)
            hello = Gateway(registry).hello
            gateway = MqttGateway(registry, "mqtt://127.0.0.1:1", hello=hello)
            for message in batch:
                await gateway.on_message(message)
            good = Generate(request_id=REQUEST, prompt="hi")
            stream = await registry.generate(good, client="somebody")
            assert [event async for event in stream.follow()]
            await gateway.close(0.0)
            await registry.shut_down(0.0)

    asyncio.run(feed())


@pytest.mark.mqtt
@pytest.mark.usefixtures("nothing_left")
async def test_garbage_of_one_device_costs_another_nothing(mosquitto: Mosquitto) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)),
        Device(mosquitto, "bad") as bad,
        Device(mosquitto, "good") as good,
    ):
        await good.subscribe(streams_of("good", "events"))
        for data in (b"\x00" * 1000, b"[" * 100_000, b'{"type":"generate"' * 1000, b"9" * 300_000):
            await bad.publish(RequestTopic("bad"), data)
        await good.send(RequestTopic("good"), Generate(request_id=REQUEST, prompt="hi"))
        assert text_of(await good.events()) == ANSWER


@pytest.mark.mqtt
@pytest.mark.usefixtures("nothing_left")
async def test_too_large_message_is_refused_by_its_name(mosquitto: Mosquitto) -> None:
    async with worker(mosquitto.url, ScriptedBackend(ANSWER)), Device(mosquitto, "big") as big:
        await big.subscribe(streams_of("big", "events"))
        await big.send(RequestTopic("big"), Generate(request_id=REQUEST, prompt="x" * 300_000))
        refused = await big.next_message()
        assert isinstance(refused, RequestRejected)
        assert (refused.code, refused.request_id) == ("message_too_large", REQUEST)


@pytest.mark.mqtt
@pytest.mark.usefixtures("nothing_left")
async def test_request_that_cannot_be_read_is_refused_too(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    forged = "x\n2030-01-01 ERROR FORGED\x1b[2J"
    bodies = (
        b"\xff\xfe",
        b'{"type":"generate","request_id":"short","prompt":"a"}',
        json.dumps({"type": "generate", "prompt": "a", forged: 1}).encode(),
        json.dumps({"type": "generate", "request_id": "x", "params": {forged: 1}}).encode(),
    )
    async with worker(mosquitto.url, ScriptedBackend(ANSWER)), Device(mosquitto, "odd") as device:
        await device.subscribe(streams_of("odd", "events"))
        for body in bodies:
            await device.publish(RequestTopic("odd"), body)
            refused = await device.next_message()
            assert isinstance(refused, RequestRejected)
            assert refused.code in ("protocol_error", "invalid_request")
            assert refused.request_id is None
    lines = [line.getMessage() for line in caplog.records if line.name.startswith("d2f")]
    assert lines
    assert not [line for line in lines if "\n" in line or "\x1b" in line]


@pytest.mark.mqtt
@pytest.mark.usefixtures("nothing_left")
async def test_ending_with_its_reader_is_refused_since_a_worker_sees_none(
    mosquitto: Mosquitto,
) -> None:
    asked = Generate(request_id=REQUEST, prompt="hi", on_disconnect="cancel")
    async with worker(mosquitto.url, ScriptedBackend(ANSWER)), Device(mosquitto, "will") as device:
        await device.subscribe(streams_of("will", "events"))
        await device.send(RequestTopic("will"), asked)
        refused = await device.next_message()
        assert isinstance(refused, RequestRejected)
        assert (refused.code, refused.request_id) == ("invalid_request", REQUEST)
        assert "last will" in refused.message
        other = Generate(request_id="another-0123456789", prompt="hi")
        await device.send(RequestTopic("will"), other)
        assert text_of(await device.events()) == ANSWER
        again = Generate(request_id=other.request_id, prompt="something else")
        await device.send(RequestTopic("will"), again)
        conflict = await device.next_message()
        assert isinstance(conflict, RequestRejected)
        assert conflict.code == "request_conflict"


async def test_identifiers_at_the_broker_are_random_and_stand_in_no_topic() -> None:
    async with engine_over(ScriptedBackend("short")) as engine:
        registry = StreamRegistry(engine)
        hello = Gateway(registry).hello
        gateways = [MqttGateway(registry, "mqtt://127.0.0.1:1", hello=hello) for _ in range(2)]
    names = [gateway._link._identifier for gateway in gateways]
    assert len(set(names)) == 2
    for gateway, name in zip(gateways, names, strict=True):
        secret = name.rpartition("-")[2]
        assert len(secret) >= 32
        assert secret not in gateway.node
        assert gateway.node not in name


def test_rejections_of_one_client_do_not_push_out_another_s() -> None:
    async def feed() -> None:
        async with engine_over(ScriptedBackend("short")) as engine:
            registry = StreamRegistry(engine)
            gateway = MqttGateway(registry, "mqtt://127.0.0.1:1", hello=Gateway(registry).hello)
            await gateway.on_message(garbage("bob"))
            for _ in range(10_000):
                await gateway.on_message(garbage("mallory"))
            waiting = [message.topic for message in gateway._link._outbox.values()]
            assert sum("/bob/" in topic for topic in waiting) == 1
            assert len(waiting) < 100
            await gateway.close(0.0)

    asyncio.run(feed())


def garbage(client: str) -> Incoming:
    return Incoming(str(RequestTopic(client)), b"garbage", None, {})
