"""Servers whose engines are elsewhere, without Ray: over calls alone, and over a log with them."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.cluster.handle_engine import HandleEngine
from d2f_stream.cluster.logging_handle_engine import LoggingHandleEngine
from d2f_stream.cluster.replica_worker import ReplicaWorker
from d2f_stream.core.events import Block, Event, StreamFinished
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import Server
from d2f_stream.server.settings import ServeSettings
from d2f_stream.wire.protocol import Generate, Overrides
from fakes import ANSWER
from memory_network import until
from replicas import Replicas, replicas_over
from serving import Peer, check_whole
from stores import ValkeyServer

NEVER_S = 600.0
"""The lease of replicas: what waits for its end, or for their beats, outlives the test's time."""
_databases = itertools.cycle(range(16))


def held(num_steps: int) -> tuple[ScriptedBackend, StepGate]:
    gate = StepGate()
    gate.let_through(num_steps)
    return ScriptedBackend(ANSWER, gate=gate, tokens_per_step=2), gate


@asynccontextmanager
async def serving_over(*backends: ScriptedBackend) -> AsyncIterator[Server]:
    async with (
        replicas_over(*backends) as (calls, _),
        HandleEngine(calls) as engine,
        Server(engine, ServeSettings(port=0)) as server,
    ):
        yield server


@asynccontextmanager
async def serving_over_log(
    store: ValkeyServer, *backends: ScriptedBackend
) -> AsyncIterator[tuple[Server, Replicas, list[ReplicaWorker]]]:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    url = f"{store.url}/{next(_databases)}"
    logs = [ValkeyLog(url, ServeLimits(), lease_s=NEVER_S) for _ in backends]
    async with (
        replicas_over(*backends, logs=logs) as (calls, workers),
        LoggingHandleEngine(calls) as engine,
        Server(engine, ServeSettings(port=0, log=url)) as server,
    ):
        yield server, calls, workers


async def test_answers_come_whole_and_what_is_cancelled_frees_its_slot() -> None:
    backend, gate = held(6)
    async with serving_over(backend) as server, Peer.to(server) as peer:
        await peer.hello()
        started = await peer.generate()
        assert isinstance(await peer.receive(), Block)
        await peer.cancel(started.stream)
        gate.open()
        *_, last = await peer.answer()
        assert isinstance(last, StreamFinished)
        assert last.reason == "cancelled"
        await until(lambda: not backend.open_slots)
        first = await peer.generate()
        check_whole([first, *await peer.answer()])


async def test_answers_are_shortened_to_the_room_that_the_model_has() -> None:
    async with (
        serving_over(ScriptedBackend(ANSWER)) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        body = {"model": "scripted", "prompt": "hi", "max_tokens": 1_000_000}
        answer = await client.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["text"] == ANSWER
        assert (await client.get("/healthz")).json()["status"] == "ok"


async def test_killed_replica_s_stream_goes_on_at_another_one_through_the_log(
    store: ValkeyServer,
) -> None:
    first, gate = held(9)
    second = ScriptedBackend(ANSWER)
    async with serving_over_log(store, first, second) as (server, calls, workers):
        async with Peer.to(server) as peer:
            await peer.hello()
            calls.methods.clear()
            while calls._living[0] is not workers[0]:
                calls._next("")
            started = await peer.generate()
            blocks: list[Event] = []
            for _ in range(2):
                block = await peer.receive()
                assert isinstance(block, Block)
                blocks.append(block)
            calls.kill(workers[0])
            gate.open()
            check_whole([started, *blocks, *await peer.answer()])
        assert second.num_opened == 1
        window = second.batches[0][0].window
        assert window.num_to_cache >= 16


async def test_cancel_reaches_the_replica_through_the_log(store: ValkeyServer) -> None:
    backend = ScriptedBackend("on and " * 400, step_ms=5)
    async with serving_over_log(store, backend) as (server, _, _), Peer.to(server) as peer:
        await peer.hello()
        started = await peer.generate(params={"max_new_tokens": 2000})
        assert isinstance(await peer.receive(), Block)
        await peer.cancel(started.stream)
        *_, last = await peer.answer()
        assert isinstance(last, StreamFinished)
        assert last.reason == "cancelled"
        assert not backend.open_slots


async def test_refused_request_is_refused_and_may_come_again(store: ValkeyServer) -> None:
    async with (
        serving_over_log(store, ScriptedBackend(ANSWER, capacity=60)) as (server, _, _),
        Peer.to(server) as peer,
    ):
        await peer.hello()
        await peer.send(peer_request("r" * 20, 100))
        assert (await peer.rejected()).code == "out_of_capacity"
        await peer.send(peer_request("r" * 20, 20))
        first = await peer.started()
        *_, last = await peer.answer()
        assert first.request_id == "r" * 20
        assert isinstance(last, StreamFinished)


def peer_request(name: str, max_new_tokens: int) -> Generate:
    return Generate(request_id=name, prompt="hi", params=Overrides(max_new_tokens=max_new_tokens))


async def test_many_streams_are_shared_out_and_come_whole(store: ValkeyServer) -> None:
    backends = [ScriptedBackend(ANSWER, step_ms=1) for _ in range(2)]
    async with serving_over_log(store, *backends) as (server, _, _):

        async def ask() -> None:
            async with Peer.to(server) as peer:
                await peer.hello()
                first = await peer.generate()
                check_whole([first, *await peer.answer()])

        await asyncio.gather(*(ask() for _ in range(8)))
    assert sum(backend.num_opened for backend in backends) == 8
    assert all(backend.num_opened for backend in backends)
