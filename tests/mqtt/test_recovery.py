"""What breaks: connections, workers, the broker. Every answer still comes whole, once."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from brokers import Device, Mosquitto, Proxy, brief, text_of, worker
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.client.mqtt_line import connect_mqtt
from d2f_stream.core.errors import ConnectionLost, EngineClosed, WorkerLost
from d2f_stream.core.events import Event, StreamFinished, StreamStarted
from d2f_stream.core.session import Session
from d2f_stream.wire.protocol import Generate
from d2f_stream.wire.topics import (
    STATUSES,
    NodeStatus,
    RequestTopic,
    StreamState,
    decode,
    operations_of,
    streams_of,
)
from fakes import ANSWER

pytestmark = [pytest.mark.mqtt, pytest.mark.usefixtures("nothing_left")]

REQUEST = "request-0123456789"
HERE = Path(__file__).parent


@pytest.fixture
def fragile(make_broker: Callable[..., Mosquitto]) -> Mosquitto:
    """A broker of the test's own, which it may kill."""
    broker = make_broker()
    broker.start()
    return broker


async def first_block(session: Session, gate: StepGate) -> str:
    gate.let_through(6)
    return (await anext(session)).text


async def rest_of(session: Session) -> str:
    return "".join([block.text async for block in session])


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


async def test_worker_that_vanishes_loses_its_streams(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with Proxy(mosquitto.port) as proxy:
        backend = ScriptedBackend(ANSWER, gate=gate)
        async with (
            worker(proxy.url, backend) as one,
            connect_mqtt(mosquitto.url) as engine,
            engine.generate("hi") as session,
        ):
            assert await first_block(session, gate)
            proxy.cut(block=True)
            with pytest.raises(WorkerLost, match=one.gateway.node):
                await rest_of(session)
            gate.open()


@pytest.fixture
def process(mosquitto: Mosquitto) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own."""
    process = subprocess.Popen([sys.executable, HERE / "held_worker.py", mosquitto.url])
    yield process
    process.kill()
    process.wait()


async def test_killed_worker_process_loses_its_streams(
    mosquitto: Mosquitto, process: subprocess.Popen[bytes]
) -> None:
    async with connect_mqtt(mosquitto.url) as engine, engine.generate("hi") as session:
        assert (await anext(session)).text
        process.kill()
        with pytest.raises(WorkerLost):
            await rest_of(session)


async def test_request_of_a_worker_that_vanishes_goes_to_another(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with Proxy(mosquitto.port) as proxy:
        stuck = ScriptedBackend(ANSWER, capacity=160, gate=gate)
        async with worker(proxy.url, stuck) as one, connect_mqtt(mosquitto.url) as engine:
            running = engine.generate("hi")
            assert isinstance(await anext(running.events()), StreamStarted)
            waiting = engine.generate("ho")  # there is no room for a second
            await one.wait_active(2)
            async with worker(mosquitto.url, ScriptedBackend("another")):
                proxy.cut(block=True)
                assert (await waiting.result()).text == "another"
            with pytest.raises(WorkerLost):
                await running.result()
            gate.open()


async def test_two_workers_share_the_load(mosquitto: Mosquitto) -> None:
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER)) as left,
        worker(mosquitto.url, ScriptedBackend(ANSWER)) as right,
        connect_mqtt(mosquitto.url) as engine,
    ):
        results = await asyncio.gather(*(engine.generate("hi").result() for _ in range(10)))
    assert {result.text for result in results} == {ANSWER}
    assert left.backend.num_opened + right.backend.num_opened == 10
    assert min(left.backend.num_opened, right.backend.num_opened) > 0


async def test_second_worker_with_the_same_request_is_told_to_stop(mosquitto: Mosquitto) -> None:
    gates = (StepGate(), StepGate())
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gates[0])) as left,
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gates[1])) as right,
        connect_mqtt(mosquitto.url, client="asks") as engine,
        Device(mosquitto, "double") as device,
    ):
        session = engine.generate("hi")
        events = session.events()
        started = await anext(events)
        assert isinstance(started, StreamStarted)
        first, second = (left, right) if left.registry.num_active else (right, left)
        await device.subscribe(operations_of(second.gateway.node), streams_of("double", "events"))
        again = Generate(request_id=started.request_id, prompt="hi")
        while not second.registry.num_active:
            await device.send(RequestTopic("asks"), again)  # as a broker that repeats it
        await device.wait_cancelled(second.gateway.node)
        await device.subscribe(streams_of("asks", "events"))
        gates[second is right].open()
        (end,) = await device.events()
        assert isinstance(end, StreamFinished)
        assert end.reason == "cancelled"
        assert end.stream != started.stream
        gates[first is right].open()
        result = await session.result()
    assert result.text == ANSWER


async def test_worker_that_closes_ends_its_streams_first(mosquitto: Mosquitto) -> None:
    gate = StepGate()
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gate)) as one,
        Device(mosquitto, "news") as news,
        connect_mqtt(mosquitto.url) as engine,
        engine.generate("hi") as session,
    ):
        text = await first_block(session, gate)
        await news.subscribe(STATUSES)
        closing = asyncio.create_task(one.gateway.close(60.0))
        statuses: list[str] = []
        while statuses[-1:] != ["offline"]:
            status = decode((await news.receive()).payload, NodeStatus)
            if status.node == one.gateway.node and status.status not in statuses:
                statuses.append(status.status)
                if status.status == "closing":
                    gate.open()
        await closing
        await one.running
        assert text + await rest_of(session) == ANSWER
    assert statuses == ["online", "closing", "offline"]


async def test_worker_that_closes_cancels_what_is_left_at_the_deadline(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = StepGate()
    async with (
        worker(mosquitto.url, ScriptedBackend(ANSWER, gate=gate)) as one,
        connect_mqtt(mosquitto.url) as engine,
        engine.generate("hi") as session,
    ):
        text = await first_block(session, gate)
        (stream,) = one.registry._runs._pumps.values()
        cancelled = asyncio.Event()
        cancel = stream.cancel

        def cancel_and_tell() -> None:
            cancel()
            cancelled.set()

        monkeypatch.setattr(stream, "cancel", cancel_and_tell)
        closing = asyncio.create_task(one.gateway.close(0.0))
        await cancelled.wait()
        gate.open()
        result = await session.result()
        await closing
    assert result.reason == "cancelled"
    assert result.text.startswith(text)


async def test_client_waits_for_the_first_worker(mosquitto: Mosquitto) -> None:
    engine = connect_mqtt(mosquitto.url)
    opening = asyncio.create_task(engine.__aenter__())
    async with worker(mosquitto.url, ScriptedBackend(ANSWER)):
        await opening
        assert (await engine.generate("hi").result()).text == ANSWER
        await engine.close()


async def test_broker_without_a_worker_is_named(mosquitto: Mosquitto) -> None:
    with pytest.raises(ConnectionLost, match=f"{mosquitto.port} has had no worker online for"):
        async with connect_mqtt(mosquitto.url, connect_timeout_s=0.2):
            pass


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
        assert (await engine.generate("hi").result()).text == ANSWER


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
