"""What the server does when its engine fails or hangs: once it mends it, and it always says so."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import httpx
import pytest

import fakes
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.loaded_model import MODELS, ModelParts
from d2f_stream.core.errors import EngineFailed
from d2f_stream.core.events import StreamFailed
from d2f_stream.server.serve import Server, serve
from d2f_stream.server.settings import ServeSettings, Timeouts
from fakes import held
from serving import Peer, check_whole, request, serving

HANGING = """
import asyncio, sys, time
from dataclasses import dataclass
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine import LocalEngine
from d2f_stream.server.serve import ServeSettings, configure_logging, serve
@dataclass(slots=True)
class Hanging(ScriptedBackend):
    def step(self, rows):
        print("in a step", flush=True)
        time.sleep(600)
        return []
async def main():
    configure_logging()
    async with LocalEngine.over(Hanging("x"), ByteCodec()) as engine:
        return await serve(engine, ServeSettings(port=0, shutdown_deadline_s=float(sys.argv[1])))
sys.exit(asyncio.run(main()))
"""


@dataclass(slots=True)
class Breaking(ScriptedBackend):
    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        raise RuntimeError("the device is gone")


@contextlib.asynccontextmanager
async def engine_of(*backends: ScriptedBackend) -> AsyncIterator[LocalEngine]:
    """An engine whose model is another backend each time that it is loaded."""
    left = list(backends)

    def load() -> ModelParts:
        if not left:
            raise RuntimeError("there is nothing more to load")
        return ModelParts(left.pop(0), ByteCodec(), fakes.params())

    async with LocalEngine(MODELS.lease(None, "breaking", load)) as engine:
        yield engine
    assert all(backend.closed for backend in backends[: len(backends) - len(left)])


async def health_of(server: Server) -> str:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        answer = await client.get("/healthz")
    assert (answer.status_code == 200) is (answer.json()["status"] == "ok")
    return str(answer.json()["status"])


async def break_it(server: Server) -> None:
    async with Peer.to(server) as peer:
        await peer.hello()
        await peer.generate()
        failed = await peer.receive()
        assert isinstance(failed, StreamFailed)
        assert failed.code == "engine_failed"


async def test_failed_engine_is_loaded_anew_once_and_the_server_goes_on() -> None:
    backends = Breaking(), ScriptedBackend(fakes.ANSWER)
    async with engine_of(*backends) as engine, Server(engine, ServeSettings(port=0)) as server:
        await break_it(server)
        async with Peer.to(server) as peer:  # may come while the model is loaded: then it waits
            await peer.hello()
            await peer.send(request())
            check_whole(await peer.answer())
        assert await health_of(server) == "ok"


async def test_engine_that_fails_again_ends_the_server() -> None:
    async with (
        engine_of(Breaking(), Breaking()) as engine,
        Server(engine, ServeSettings(port=0)) as server,
    ):
        await break_it(server)
        await break_it(server)
        with pytest.raises(EngineFailed, match="Start the server again"):
            await server.wait_failed()
        assert await health_of(server) == "engine_failed"


async def test_client_of_the_last_failure_has_its_answer_before_the_process_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with engine_of(Breaking(), Breaking()) as engine:
        serving_task = asyncio.create_task(serve(engine, ServeSettings(port=0)))
        line = ""
        while not line.endswith("\n"):
            assert not serving_task.done()
            await fakes.turn()
            line += capsys.readouterr().out
        url = line.split(" at ")[1].split()[0]
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            for _ in range(2):
                answer = await client.post("/v1/completions", json={"prompt": "hi"})
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "engine_failed"
        with pytest.raises(EngineFailed):
            await serving_task


async def test_engine_that_cannot_be_loaded_again_ends_the_server() -> None:
    async with engine_of(Breaking()) as engine, Server(engine, ServeSettings(port=0)) as server:
        await break_it(server)
        with pytest.raises(RuntimeError, match="nothing more to load"):
            await server.wait_failed()


async def test_server_may_end_at_the_first_failure() -> None:
    settings = ServeSettings(port=0, on_engine_failure="exit")
    async with (
        engine_of(Breaking(), ScriptedBackend()) as engine,
        Server(engine, settings) as server,
    ):
        await break_it(server)
        with pytest.raises(EngineFailed):
            await server.wait_failed()


async def test_step_that_takes_too_long_is_told_by_health() -> None:
    backend, gate = held()
    async with serving(backend, timeouts=Timeouts(stuck_s=0.05)) as server, Peer.to(server) as peer:
        await peer.hello()
        assert await health_of(server) == "ok"
        await peer.send(request())
        await asyncio.to_thread(gate.wait_entered)
        while await health_of(server) != "stuck":
            await fakes.turn()
        gate.open()
        await peer.started()
        check_whole([*await peer.answer()], after_seq=0)
        assert await health_of(server) == "ok"


@pytest.mark.parametrize(("num_signals", "deadline_s", "code"), [(1, 0.1, 1), (2, 60.0, 143)])
def test_process_with_a_step_that_hangs_ends(
    num_signals: int, deadline_s: float, code: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGING, str(deadline_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            url = process.stdout.readline().split(" at ")[1].split()[0]
            body = {"prompt": "hi", "stream": True}
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream(
                    "POST", f"{url}/v1/completions", json=body, trust_env=False, timeout=60
                ),
            ):
                assert process.stdout.readline() == "in a step\n"
                began = time.monotonic()
                os.kill(process.pid, signal.SIGTERM)
                # Two signals at once are one: the second comes when the first was heard.
                assert any("shutting down" in line for line in process.stderr)
                for _ in range(num_signals - 1):
                    os.kill(process.pid, signal.SIGTERM)
                assert process.wait(30) == code
                assert time.monotonic() - began < 20
        finally:
            process.kill()
