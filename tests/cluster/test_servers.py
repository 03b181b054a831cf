"""Two servers over one log: a stream of one is a stream of the other."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

import fakes
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.events import Block, StreamFinished
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import Server
from d2f_stream.wire.protocol import Cancel, Resume
from fakes import ANSWER, held
from memory_network import until
from serving import ALICE, BOB, TWO_CLIENTS, Peer, check_whole, request, serving, text_of
from stores import ValkeyServer

ENDLESS = "on and " * 1000
LONG = {"max_new_tokens": 4000}
_databases = itertools.cycle(range(16))


@asynccontextmanager
async def two_servers(
    store: ValkeyServer,
    backend: ScriptedBackend | None = None,
    other: ScriptedBackend | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[Server, Server]]:
    url = f"{store.url}/{next(_databases)}"
    async with (
        serving(backend, log=url, **settings) as one,
        serving(other, log=url, **settings) as two,
    ):
        yield one, two
        await until(no_answer_runs)  # the first's tasks are none that the second may leave behind


def no_answer_runs() -> bool:
    working = ("d2f-pump", "d2f-steps")
    return not any(task.get_name().startswith(working) for task in asyncio.all_tasks())


async def test_stream_is_read_on_at_another_server(store: ValkeyServer) -> None:
    backend, gate = held(tokens_per_step=2)
    async with two_servers(store, backend) as (one, two), Peer.to(two) as elsewhere:
        await elsewhere.hello()
        async with Peer.to(one) as peer:
            await peer.hello()
            stream = (await peer.generate()).stream
            await elsewhere.resume(stream, after_seq=-1)
            started = await elsewhere.started()
            assert started.stream == stream
        gate.open()
        check_whole([started, *(await elsewhere.answer())])
        for after_seq in (-1, 0, 3):
            await elsewhere.resume(stream, after_seq=after_seq)
            check_whole(await elsewhere.answer(), after_seq=after_seq)


async def test_same_request_attaches_at_another_server(store: ValkeyServer) -> None:
    backend, gate = held()
    never = ScriptedBackend("this is not asked")
    asked = request()
    async with two_servers(store, backend, never) as (one, two):
        async with Peer.to(one) as peer, Peer.to(two) as elsewhere:
            await peer.hello()
            await elsewhere.hello()
            await peer.send(asked)
            first = await peer.started()
            await elsewhere.send(asked)
            assert await elsewhere.started() == first
            await elsewhere.send(request("another prompt", request_id=asked.request_id))
            assert (await elsewhere.rejected()).code == "request_conflict"
            gate.open()
            check_whole([first, *await peer.answer()])
            check_whole([first, *await elsewhere.answer()])
        assert never.num_opened == 0


async def test_request_sent_to_both_servers_at_once_is_one_stream(store: ValkeyServer) -> None:
    backends = [ScriptedBackend(ANSWER), ScriptedBackend(ANSWER)]
    async with two_servers(store, *backends) as servers:
        async with Peer.to(servers[0]) as peer, Peer.to(servers[1]) as elsewhere:
            for one in (peer, elsewhere):
                await one.hello()
            for _ in range(20):
                asked = request()
                await asyncio.gather(peer.send(asked), elsewhere.send(asked))
                logs = await asyncio.gather(peer.answer(), elsewhere.answer())
                assert logs[0] == logs[1]
                check_whole(logs[0])
        assert sum(backend.num_opened for backend in backends) == 20


async def test_nobody_reaches_the_stream_of_another_anywhere(store: ValkeyServer) -> None:
    backend, gate = held()
    async with (
        two_servers(store, backend, auth=TWO_CLIENTS) as (one, two),
        Peer.to(one, token=ALICE) as alice,
        Peer.to(two, token=BOB) as bob,
    ):
        await alice.hello()
        await bob.hello()
        started = await alice.generate()
        await bob.send(
            Resume(stream=started.stream),
            Cancel(stream=started.stream),
            Cancel(request_id=started.request_id),
        )
        assert [(await bob.rejected()).code for _ in range(3)] == ["stream_lost"] * 3
        gate.open()
        check_whole([started, *await alice.answer()])


@pytest.mark.parametrize("by", ["stream", "request_id"])
async def test_cancel_at_another_server_frees_the_slot(store: ValkeyServer, by: str) -> None:
    backend = ScriptedBackend(ENDLESS, tokens_per_step=1)
    async with (
        two_servers(store, backend) as (one, two),
        Peer.to(one) as peer,
        Peer.to(two) as elsewhere,
    ):
        await peer.hello()
        await elsewhere.hello()
        started = await peer.generate(params=LONG)
        name = started.stream if by == "stream" else started.request_id
        began_s = asyncio.get_running_loop().time()
        await elsewhere.send(Cancel(**{by: name}))
        *_, last = (await peer.events())[started.stream]
        assert isinstance(last, StreamFinished)
        assert last.reason == "cancelled"
        assert not backend.open_slots
        assert asyncio.get_running_loop().time() - began_s < 2.0


async def test_request_that_waits_is_cancelled_from_elsewhere(store: ValkeyServer) -> None:
    backend, gate = held()
    limits = ServeLimits(max_running=1)
    async with (
        two_servers(store, backend, limits=limits) as (one, two),
        Peer.to(one) as peer,
        Peer.to(two) as elsewhere,
    ):
        await peer.hello()
        await elsewhere.hello()
        await peer.generate()
        waiting = request()
        await peer.send(waiting)
        await until(lambda: one.registry.num_waiting == 1)
        await elsewhere.send(Cancel(request_id=waiting.request_id))
        started = await peer.started()
        assert started.request_id == waiting.request_id
        assert isinstance(await peer.receive(), StreamFinished)
        gate.open()
        await peer.answer()


async def test_stream_ends_with_its_last_reader_wherever_that_is(store: ValkeyServer) -> None:
    backend = ScriptedBackend(ENDLESS, tokens_per_step=1)
    async with two_servers(store, backend) as (one, two):
        async with Peer.to(two) as elsewhere:
            await elsewhere.hello()
            async with Peer.to(one) as peer:
                await peer.hello()
                started = await peer.generate(params=LONG, on_disconnect="cancel")
                await elsewhere.resume(started.stream)
                await elsewhere.started()
            await until(lambda: one.gateway.num_connections == 0)
            for _ in range(20):  # it goes on: there is a reader
                assert isinstance(await elsewhere.receive(), Block)
            assert one.registry.num_active == 1
        await until(lambda: one.registry.num_active == 0)
        assert not backend.open_slots


async def test_server_asked_only_to_cancel_keeps_nothing_of_the_stream(
    store: ValkeyServer,
) -> None:
    backend = ScriptedBackend(ENDLESS, tokens_per_step=1)
    limits = ServeLimits(resume_ttl_s=0.2)
    async with (
        two_servers(store, backend, limits=limits) as (one, two),
        Peer.to(one) as peer,
        Peer.to(two) as elsewhere,
    ):
        await peer.hello()
        await elsewhere.hello()
        started = await peer.generate(params=LONG)
        await elsewhere.cancel(started.stream)
        await peer.answer()
        await until(lambda: two.registry.num_retained == 0)


async def test_resume_beyond_the_log_is_refused_and_the_reading_goes_on(
    store: ValkeyServer,
) -> None:
    backend, gate = held()
    async with (
        two_servers(store, backend) as (one, two),
        Peer.to(one) as peer,
        Peer.to(two) as elsewhere,
    ):
        await peer.hello()
        await elsewhere.hello()
        started = await peer.generate()
        await elsewhere.resume(started.stream)
        await elsewhere.started()
        for after_seq in (999, -2, 2**62):
            await elsewhere.resume(started.stream, after_seq=after_seq)
            assert (await elsewhere.rejected()).code == "invalid_request"
        gate.open()
        check_whole([started, *await elsewhere.answer()])


async def test_refused_request_is_refused_everywhere_and_may_come_again(
    store: ValkeyServer,
) -> None:
    async with two_servers(store, ScriptedBackend(ANSWER, capacity=10)) as (one, two):
        asked = request()
        for server in (one, two):
            async with Peer.to(server) as peer:
                await peer.hello()
                await peer.send(asked)
                if server is one:
                    assert (await peer.rejected()).code == "out_of_capacity"
                else:
                    check_whole(await peer.answer())


async def test_openai_answers_come_through_the_log(store: ValkeyServer) -> None:
    async with (
        two_servers(store) as (one, _),
        httpx.AsyncClient(base_url=one.url, trust_env=False) as client,
    ):
        body = {"model": "scripted", "prompt": "hi", "max_tokens": 128}
        answer = await client.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["text"] == fakes.ANSWER


async def test_requests_that_cannot_be_stored_are_refused(store: ValkeyServer) -> None:
    async with two_servers(store) as (one, _), Peer.to(one) as peer:
        await peer.hello()
        await peer.send(request([1, 2**70]))  # type: ignore[arg-type]
        assert (await peer.rejected()).code in ("invalid_request", "invalid_prompt")
        await peer.generate()
        assert text_of(await peer.answer()) == fakes.ANSWER
