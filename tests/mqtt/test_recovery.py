"""What breaks: connections and the broker. Every answer still comes whole, once."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from brokers import Device, Mosquitto, Proxy, brief, text_of, worker
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.client.mqtt_line import connect_mqtt
from d2f_stream.core.errors import ConnectionLost, EngineClosed
from d2f_stream.core.events import Event
from d2f_stream.wire.protocol import Generate
from d2f_stream.wire.topics import (
    RequestTopic,
    StreamState,
    decode,
    streams_of,
)
from fakes import ANSWER
from mqtt_answers import first_block, rest_of

pytestmark = [pytest.mark.mqtt, pytest.mark.usefixtures("nothing_left")]
REQUEST = "request-0123456789"


@pytest.fixture
def fragile(make_broker: Callable[..., Mosquitto]) -> Mosquitto:
    """A broker of the test's own, which it may kill."""
    broker = make_broker()
    broker.start()
    return broker


async def test_device_that_was_offline_catches_up_exactly_once(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gate)),
        Device(mosquitto, "observer") as observer,
    ):
        await observer.subscribe(streams_of("sleeper", "state"))
        events: list[Event] = []
        async with Device(mosquitto, "sleeper") as device:
            await device.subscribe(streams_of("sleeper", "events"))
            await device.send(RequestTopic("sleeper"), Generate(request_id=REQUEST, prompt="hi"))
            gate.let_through(6)
            for _ in range(2):
                event = await device.next_message()
                assert event is not None
                events.append(event)  # type: ignore[arg-type]
        gate.open()
        while decode((await observer.receive()).payload, StreamState).terminal is None:
            pass
        async with Device(mosquitto, "sleeper") as device:
            events += await device.events()
    assert [event.seq for event in events] == [*range(len(events))]  # type: ignore[union-attr]
    assert text_of(events) == ANSWER


@pytest.mark.parametrize("broken", ["client", "worker"])
async def test_cut_connection_costs_nothing(mosquitto: Mosquitto, broken: str) -> None:
    gate = StepGate()
    async with Proxy(mosquitto.port) as proxy:
        urls = {"client": mosquitto.url, "worker": mosquitto.url} | {broken: proxy.url}
        backend = ScriptedBackend(ANSWER, gate=gate)
        async with (
            worker(urls["worker"], backend, will_delay_s=10) as one,
            connect_mqtt(urls["client"], sleep=brief) as engine,
            engine.generate("hi") as session,
        ):
            text = await first_block(session, gate)
            proxy.cut()
            gate.open()
            assert text + await rest_of(session) == ANSWER
            assert one.backend.num_opened == 1


async def test_many_cuts_at_any_moment(mosquitto: Mosquitto) -> None:
    answers = {f"question {n}": f"answer {n} " * 12 for n in range(8)}
    async with (
        Proxy(mosquitto.port) as far,
        Proxy(mosquitto.port) as near,
        worker(far.url, ScriptedBackend(answers), will_delay_s=10) as one,
        connect_mqtt(near.url, sleep=brief) as engine,
    ):
        sessions = [engine.generate(question) for question in answers]
        for number, session in enumerate(sessions):
            await anext(session)
            (near if number % 2 else far).cut()
        results = await asyncio.gather(*(session.result() for session in sessions))
        assert one.backend.num_opened == len(answers)
    assert [result.text for result in results] == [text[:128] for text in answers.values()]


@pytest.mark.parametrize("forcibly", [True, False], ids=["killed", "stopped"])
async def test_broker_is_restarted_in_mid_stream(fragile: Mosquitto, forcibly: bool) -> None:
    gate = StepGate()
    backend = ScriptedBackend(ANSWER, gate=gate)
    async with (
        worker(fragile.url, backend, will_delay_s=10),
        connect_mqtt(fragile.url, sleep=brief) as engine,
        engine.generate("hi") as session,
    ):
        text = await first_block(session, gate)
        (fragile.kill if forcibly else fragile.stop)()
        gate.open()
        fragile.start()
        assert text + await rest_of(session) == ANSWER
        assert backend.num_opened == 1
        assert (await engine.generate("hi").result()).text == ANSWER


async def test_request_that_finds_no_broker_waits_for_it(fragile: Mosquitto) -> None:
    async with (
        worker(fragile.url, ScriptedBackend(ANSWER), will_delay_s=10),
        connect_mqtt(fragile.url, sleep=brief) as engine,
    ):
        fragile.kill()
        session = engine.generate("hi")
        fragile.start()
        assert (await session.result()).text == ANSWER


async def test_retained_state_is_published_again_to_a_broker_that_forgot_it(
    fragile: Mosquitto,
) -> None:
    gate = StepGate()
    async with (
        worker(fragile.url, ScriptedBackend(ANSWER, gate=gate)) as one,
        connect_mqtt(fragile.url, client="asks", sleep=brief) as engine,
        engine.generate("hi") as session,
    ):
        text = await first_block(session, gate)
        fragile.kill()
        (fragile.config.parent / "mosquitto.db").unlink(missing_ok=True)
        fragile.start()
        await one.gateway.wait_connected()
        async with Device(fragile, "late") as device:
            await device.subscribe(streams_of("asks", "state"))
            state = decode((await device.receive()).payload, StreamState)
        assert state.text.startswith(text)
        gate.open()


async def test_client_waits_for_the_first_worker(mosquitto: Mosquitto) -> None:
    engine = connect_mqtt(mosquitto.url)
    opening = asyncio.create_task(engine.__aenter__())
    async with worker(mosquitto.url, ScriptedBackend(ANSWER)):
        await opening
        assert (await engine.generate("hi").result()).text == ANSWER
        await engine.close()


async def test_broker_without_a_worker_is_named(mosquitto: Mosquitto) -> None:
    for timeout_s in (0.2, 2.0, 20.0):  # as long as the broker takes on this machine
        with pytest.raises(ConnectionLost) as caught:
            async with connect_mqtt(mosquitto.url, connect_timeout_s=timeout_s):
                pass
        if "was not reached" not in str(caught.value):
            break
    assert f"{mosquitto.port} has had no worker online for" in str(caught.value)


async def test_broker_that_is_not_there_is_named_without_the_password(tmp_path: Path) -> None:
    port = Mosquitto(tmp_path).port
    url = f"mqtt://user:secret@127.0.0.1:{port}"
    with pytest.raises(ConnectionLost, match="was not reached") as caught:
        async with connect_mqtt(url, connect_timeout_s=0.2, sleep=brief):
            pass
    assert "secret" not in str(caught.value)
    assert "user" not in str(caught.value)


async def test_requests_fail_when_the_broker_stays_away(fragile: Mosquitto) -> None:
    gate = StepGate()
    async with (
        worker(fragile.url, ScriptedBackend(ANSWER, gate=gate), will_delay_s=10),
        connect_mqtt(fragile.url, sleep=brief, reconnect_timeout_s=0.2) as engine,
    ):
        session = engine.generate("hi")
        assert await first_block(session, gate)
        fragile.kill()
        with pytest.raises(ConnectionLost, match="was not reached"):
            await rest_of(session)
        with pytest.raises(ConnectionLost, match="was not reached"):
            await engine.generate("hi").result()
        gate.open()
        fragile.start()
        text = ""
        while not text:  # the worker may take longer to come back than the client waits for it
            with contextlib.suppress(ConnectionLost):
                text = (await engine.generate("hi").result()).text
        assert text == ANSWER


async def test_closing_the_engine_ends_its_sessions(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gate)) as one:
        async with connect_mqtt(mosquitto.url) as engine:
            session = engine.generate("hi")
            assert await first_block(session, gate)
        with pytest.raises(EngineClosed):
            await rest_of(session)
        gate.open()
        await one.wait_active(0)  # the worker was told
        assert one.backend.open_slots == {}
