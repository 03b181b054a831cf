"""Workers that share a log: the streams of one that is gone go on at another."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from brokers import Mosquitto, Worker, worker
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.client.mqtt_line import connect_mqtt
from d2f_stream.core.errors import WorkerLost
from d2f_stream.core.events import StreamStarted
from d2f_stream.core.session import Session
from d2f_stream.server.limits import ServeLimits
from fakes import ANSWER, held
from memory_network import until
from mqtt_answers import first_block, rest_of
from stores import ValkeyServer

if TYPE_CHECKING:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

pytestmark = [pytest.mark.mqtt, pytest.mark.usefixtures("nothing_left")]
HERE = Path(__file__).parent
HELD_ANSWER = "It never comes to the end of this answer."


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("store"))
    server.start()
    yield server
    server.kill()


@asynccontextmanager
async def log_of(store: ValkeyServer, database: int = 0) -> AsyncIterator["ValkeyLog"]:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    async with ValkeyLog(f"{store.url}/{database}", ServeLimits(), lease_s=0.4) as log:
        yield log


@asynccontextmanager
async def asked(
    url: str, backend: ScriptedBackend, log: "ValkeyLog"
) -> AsyncIterator[tuple[Worker, Session]]:
    """A worker, and an answer that it has begun with."""
    async with (
        worker(url, backend, log=log) as one,
        connect_mqtt(url) as engine,
        engine.generate("hi") as session,
    ):
        yield one, session


@pytest.fixture
def start_worker(mosquitto: Mosquitto) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts workers in processes of their own, which stop amid each answer."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(log: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(HERE / "held_worker.py"), mosquitto.url, log]
        processes.append(subprocess.Popen(command))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("comes_late", [False, True])
async def test_killed_worker_s_streams_go_on_at_another(
    mosquitto: Mosquitto,
    store: ValkeyServer,
    start_worker: Callable[[str], subprocess.Popen[bytes]],
    comes_late: bool,
) -> None:
    process = start_worker(store.url + "/0")
    backend = ScriptedBackend(HELD_ANSWER)
    async with log_of(store) as log, connect_mqtt(mosquitto.url) as engine:
        session = engine.generate("hi")
        text = (await anext(session)).text
        if comes_late:
            process.kill()
            process.wait()
            talk = engine._line._talk  # type: ignore[attr-defined]
            await until(lambda: bool(talk._orphaned))
        async with worker(mosquitto.url, backend, log=log) as other:
            if not comes_late:
                process.kill()
            async with asyncio.timeout(20.0):
                text += await rest_of(session)
            assert other.backend.num_opened == 1
    assert text == HELD_ANSWER


async def test_worker_that_closes_leaves_its_streams_to_another(
    mosquitto: Mosquitto, store: ValkeyServer
) -> None:
    backend, gate = held()
    async with (
        log_of(store, 1) as ours,
        log_of(store, 1) as theirs,
        asked(mosquitto.url, backend, ours) as (one, session),
    ):
        text = await first_block(session, gate)
        async with worker(mosquitto.url, ScriptedBackend(ANSWER), log=theirs):
            closing = asyncio.gather(one.gateway.close(0.0), one.registry.shut_down(0.0))
            gate.open()
            async with asyncio.timeout(20.0):
                await closing
                text += await rest_of(session)
    assert text == ANSWER


async def test_stream_that_no_other_worker_knows_is_lost(
    mosquitto: Mosquitto, store: ValkeyServer
) -> None:
    backend, gate = held()
    async with (
        log_of(store, 2) as ours,
        log_of(store, 3) as theirs,
        asked(mosquitto.url, backend, ours) as (one, session),
    ):
        assert isinstance(await anext(session.events()), StreamStarted)
        theirs.name = ours.name  # the same address on another machine
        async with worker(mosquitto.url, ScriptedBackend(ANSWER), log=theirs):
            await one.stop()
            async with asyncio.timeout(20.0):
                with pytest.raises(WorkerLost, match=one.gateway.node):
                    await rest_of(session)
            gate.open()
