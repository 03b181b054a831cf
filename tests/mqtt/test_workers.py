"""Workers that vanish, share, repeat or close: every answer still comes whole, once."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers import Device, Mosquitto, Proxy, worker
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.client.mqtt_line import connect_mqtt
from d2f_stream.core.errors import WorkerLost
from d2f_stream.core.events import StreamFinished, StreamStarted
from d2f_stream.wire.protocol import Generate
from d2f_stream.wire.topics import (
    STATUSES,
    NodeStatus,
    RequestTopic,
    decode,
    operations_of,
    streams_of,
)
from fakes import ANSWER
from mqtt_answers import first_block, rest_of

pytestmark = [pytest.mark.mqtt, pytest.mark.usefixtures("nothing_left")]
HERE = Path(__file__).parent


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
