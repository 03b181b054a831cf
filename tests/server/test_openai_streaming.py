"""What happens while an answer of the OpenAI routes is on its way: silence, leaving, stalling."""

import ast
import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import d2f_stream
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.core.errors import SlowConsumer
from d2f_stream.core.session import Engine
from d2f_stream.server.http.sse import COMMENT, EventStream
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import Server, ServeSettings
from fakes import ANSWER, engine_over, turn
from installed_model import brief_model
from memory_network import until
from openai_serving import Exchange, Serving, chat, serving
from stalls import stall

CHAT = "/v1/chat/completions"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "openai_client.py"


async def ended(served: Serving) -> None:
    """Wait until no stream runs any more."""
    await served.registry.shut_down(60.0)


async def test_comments_come_while_nothing_else_does() -> None:
    gate = StepGate()
    async with serving(ScriptedBackend("hello", gate=gate), keep_alive_s=0.001) as served:
        exchange = Exchange(served.app, CHAT, chat(stream=True))
        assert (await exchange.start())["status"] == 200
        frames = [await exchange.frame()]
        while frames[-3:] != [COMMENT.decode()] * 3:
            frames.append(await exchange.frame())
        gate.open()
        while frames[-1]:
            frames.append(await exchange.frame())
        await exchange.task
    data = [frame for frame in frames if frame != COMMENT.decode()]
    assert "stream.started" in data[0]
    assert '"hello"' in data[1]
    assert data[-2].endswith("data: [DONE]\n\n")


async def test_comments_come_while_the_request_waits_for_a_slot() -> None:
    gate = StepGate()
    backend = ScriptedBackend("hello", gate=gate, capacity=200)
    async with serving(backend, keep_alive_s=0.001) as served:
        first = Exchange(served.app, CHAT, chat(stream=True))
        await first.start()
        waiting = Exchange(served.app, CHAT, chat(stream=True))
        assert (await waiting.start())["status"] == 200
        assert await waiting.frame() == COMMENT.decode()
        gate.open()
        await asyncio.gather(first.task, waiting.task)


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_frees_its_slot(stream: bool) -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 100, gate=gate)
    async with serving(backend) as served:
        exchange = Exchange(served.app, CHAT, chat(stream=stream))
        await asyncio.to_thread(gate.wait_entered)
        assert len(backend.open_slots) == 1
        await exchange.leave()
        gate.let_through(1)
        await ended(served)
        assert backend.open_slots == {}
        assert backend.num_steps == 1


async def test_client_that_leaves_amid_the_answer_frees_its_slot() -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 100, gate=gate)
    async with serving(backend) as served:
        exchange = Exchange(served.app, CHAT, chat(stream=True))
        gate.let_through(2)
        await exchange.start()
        assert "stream.started" in await exchange.frame()
        assert "block.committed" in await exchange.frame()
        await asyncio.to_thread(gate.wait_entered, 3)
        await exchange.leave()
        gate.let_through(1)
        await ended(served)
        assert backend.open_slots == {}
        assert backend.num_steps == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_frees_the_slots_of_all_its_choices(stream: bool) -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 100, gate=gate)
    async with serving(backend) as served:
        exchange = Exchange(served.app, CHAT, chat(stream=stream, n=3))
        await asyncio.to_thread(gate.wait_entered)
        await exchange.leave()
        gate.open()
        await ended(served)
        assert backend.open_slots == {}
        assert backend.num_steps < 5


async def test_client_that_leaves_before_its_stream_started_ends_it() -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 100, gate=gate, capacity=200)
    async with serving(backend) as served:
        first = Exchange(served.app, CHAT, chat(stream=True))
        await first.start()
        waiting = Exchange(served.app, CHAT, chat(stream=True))
        while served.registry.num_active < 2:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        await waiting.leave()
        gate.open()
        await first.task
        await ended(served)
        assert backend.num_opened == 1


async def test_server_that_cancels_the_request_frees_its_slot() -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 100, gate=gate)
    async with serving(backend) as served:
        exchange = Exchange(served.app, CHAT, chat(stream=True))
        await exchange.start()
        exchange.task.cancel()
        await asyncio.wait((exchange.task,))
        assert exchange.task.cancelled()
        gate.let_through(1)
        await ended(served)
        assert backend.open_slots == {}


async def test_reader_that_never_reads_is_ended_and_others_are_not() -> None:
    backend = ScriptedBackend("a" * 1000)
    limits = ServeLimits(stall_timeout_s=0.01)
    async with serving(backend, limits=limits) as served:
        stuck = Exchange(served.app, CHAT, chat(stream=True, max_tokens=800), room=2)
        other = await served.openai().chat.completions.create(
            model="d2f", messages=[{"role": "user", "content": "hi"}], max_tokens=400
        )
        await stuck.task
        await ended(served)
        assert other.choices[0].message.content == "a" * 400
        assert served.metrics.registry.get_sample_value("d2f_slow_consumers_total") == 1
        assert backend.open_slots == {}


async def test_reader_is_not_blamed_for_a_stall_of_the_server() -> None:
    async with serving(ScriptedBackend("a" * 1000)) as served:
        exchange = Exchange(served.app, CHAT, chat(stream=True, max_tokens=800), room=2)
        await exchange.start()
        await until(lambda: served.registry.num_active == 0)
        stall()
        await turn()
        while "[DONE]" not in await exchange.frame():
            pass
        await exchange.frame()  # the empty one, which ends the response
        await exchange.task
        assert served.metrics.registry.get_sample_value("d2f_slow_consumers_total") == 0


async def test_frames_that_never_began_are_closed_too() -> None:
    ends: list[str] = []

    async def frames() -> Any:
        yield b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.Event().wait()

    def stalled(error: SlowConsumer) -> None:
        ends.append("stalled")

    response = EventStream(
        frames(), stall_timeout_s=60, on_end=lambda: ends.append("ended"), on_stall=stalled
    )
    await response({}, receive, send)
    assert ends == ["ended"]


async def test_shutdown_cuts_the_answer_off_with_an_error() -> None:
    gate = StepGate()
    async with serving(ScriptedBackend("a" * 100, gate=gate)) as served:
        exchange = Exchange(served.app, CHAT, chat(stream=True))
        whole = Exchange(served.app, CHAT, chat())
        await exchange.start()
        assert "stream.started" in await exchange.frame()
        await asyncio.to_thread(gate.wait_entered)
        ending = asyncio.create_task(served.registry.shut_down(0.0))
        while not ending.done():
            gate.let_through(1)
            await asyncio.sleep(0)
        await ending
        await asyncio.gather(exchange.task, whole.task)
        frames = []
        while frame := await exchange.frame():
            frames.append(frame)
        assert (await whole.start())["status"] == 503
    error = json.loads(frames[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("shutting_down", "server_error")


# Over a real socket, through the whole server.


@asynccontextmanager
async def listening(engine: Engine) -> AsyncIterator[tuple[Server, openai.AsyncOpenAI]]:
    async with (
        Server(engine, ServeSettings(port=0)) as server,
        openai.AsyncOpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client,
    ):
        yield server, client


async def test_answers_over_a_socket() -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    async with engine_over(ScriptedBackend(ANSWER)) as engine, listening(engine) as (_, client):
        create = client.chat.completions.create
        whole = await create(model="d2f", messages=messages)
        chunks = [c async for c in await create(model="d2f", messages=messages, stream=True)]
    assert whole.choices[0].message.content == ANSWER
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


async def step_once(backend: ScriptedBackend, gate: StepGate, ended: Callable[[], bool]) -> None:
    """Let one step through and wait until it ran, or will not run any more."""
    num_steps = backend.num_steps
    gate.let_through(1)
    await until(lambda: backend.num_steps > num_steps or ended())


async def test_closing_the_socket_cancels_the_stream() -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 4000, gate=gate)
    messages: Any = [{"role": "user", "content": "hi"}]
    async with engine_over(backend) as engine, listening(engine) as (server, client):
        gate.let_through(2)
        chunks = await client.chat.completions.create(
            model="d2f", messages=messages, stream=True, max_tokens=2000
        )
        assert (await anext(chunks)).choices[0].delta.role == "assistant"
        assert (await anext(chunks)).choices[0].delta.content == "a" * 8
        await chunks.close()
        while server.registry.num_active:  # until the server has noticed
            await step_once(backend, gate, lambda: not server.registry.num_active)
        assert backend.open_slots == {}
        assert backend.num_steps < 400  # far fewer than the answer needs


async def test_body_beyond_the_limit_is_too_large() -> None:
    settings = ServeSettings(port=0, limits=ServeLimits(max_message_bytes=1000))
    async with (
        engine_over(ScriptedBackend()) as engine,
        Server(engine, settings) as server,
        httpx2.AsyncClient(base_url=server.url) as http,
    ):
        answer = await http.post(CHAT, json=chat("x" * 1000))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "message_too_large"


async def test_embedded_model_over_a_socket() -> None:
    problem = "Ben has 34 books. He buys 18 more books. How many books does he have now?"
    async with d2f_stream.load() as engine, listening(engine) as (_, client):
        stream = await client.chat.completions.create(
            model="word-problems", messages=[{"role": "user", "content": problem}], stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "The answer is 52" in text


@pytest.mark.usefixtures("one_core")
async def test_example_runs(tmp_path: Path) -> None:
    async with d2f_stream.load(brief_model(tmp_path)) as engine, listening(engine) as (server, _):
        environment = os.environ | {"D2F_URL": f"{server.url}/v1"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(EXAMPLE)), stdout=PIPE, stderr=PIPE, env=environment
        )
        output, errors = await process.communicate()
    assert errors == b""
    first, _, drafts = output.decode().partition(" tokens)\n")
    assert "scatter" in first
    shown = [ast.literal_eval(line) for line in drafts.split("\n") if line]
    assert len(shown) >= 3
    assert first.startswith(shown[-1])
