"""Answers whose worker is gone: who goes on with them, and what they end with where nobody can."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from d2f_stream.core.events import StreamFailed, StreamFinished
from d2f_stream.core.identity import ModelIdentity
from d2f_stream.server.auth import LOCAL
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.protocol import RequestRejected
from serving import Peer, check_whole, serving
from stores import ValkeyServer, events_of, request

if TYPE_CHECKING:
    from d2f_stream.server.streams.valkey.log import ValkeyLog


@asynccontextmanager
async def log_of(
    store: ValkeyServer, limits: ServeLimits | None = None
) -> AsyncIterator["ValkeyLog"]:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    async with ValkeyLog(store.url, limits or ServeLimits(), lease_s=0.4) as log:
        yield log


async def left_behind(
    log: "ValkeyLog", name: str, *, num_events: int, model: ModelIdentity | None = None
) -> ServedStream:
    """A stream that a worker began and left."""
    stream, _ = await log.create(request(name), client=LOCAL, asker=LOCAL, clamp=False)
    work = await log.work(stream.id, model=model)
    assert work is not None
    async with work:
        for event in events_of(stream.id)[:num_events]:
            assert await work.append(event)
    return stream


async def test_answer_that_no_other_worker_can_go_on_with_ends_with_one_error(
    store: ValkeyServer,
) -> None:
    async with log_of(store) as log, serving(log=store.url) as server, Peer.to(server) as peer:
        await peer.hello()
        stream = await left_behind(log, "differs", num_events=1)  # of another `model`
        await peer.resume(stream.id)
        async with asyncio.timeout(20.0):
            events = [await peer.started(), *await peer.answer()]
        assert isinstance(events[-1], StreamFailed)
        assert len(events) == 2
        assert events[-1].code == "worker_lost"
        assert "event 0 comes out differently" in events[-1].message
        check_whole([await peer.generate(), *await peer.answer()])  # and its slot is free


async def test_answer_of_another_model_is_refused_and_left_to_who_has_that(
    store: ValkeyServer,
) -> None:
    began = ModelIdentity("another", "00ff")
    async with log_of(store) as log, serving(log=store.url) as server, Peer.to(server) as peer:
        await peer.hello()
        stream = await left_behind(log, "another", num_events=2, model=began)
        await peer.resume(stream.id)
        async with asyncio.timeout(20.0):
            events = [await peer.started(), await peer.receive()]  # what there is may be read
            refusal = await peer.receive()
        assert events == list(events_of(stream.id)[:2])
        assert isinstance(refusal, RequestRejected)
        assert (refusal.code, refusal.stream) == ("worker_lost", stream.id)
        assert "begun by another (version 00ff)" in refusal.message
        assert "where scripted (version " in refusal.message
        work = await log.work(stream.id, model=began)
        assert work is not None
        async with work:
            assert await work.append(events_of(stream.id)[2])


async def test_limits_are_those_of_the_server_that_took_the_request(store: ValkeyServer) -> None:
    limits = ServeLimits(resume_ttl_s=3600.0, max_retained_bytes=1)
    async with log_of(store, limits) as server, log_of(store) as worker:
        stream, _ = await server.create(request("ttl"), client=LOCAL, asker=LOCAL, clamp=False)
        work = await worker.work(stream.id)
        assert work is not None
        keys = worker.keys
        async with work:
            *events, last = events_of(stream.id)
            for event in events:
                assert await work.append(event)
            assert isinstance(last, StreamFinished)
            await asyncio.sleep(2 * worker.times.beat_s)  # what its beats renew is as long, too
            left = await worker.store.run("PTTL", keys.record(stream.id), patience_s=5.0)
            assert isinstance(left, int)
            assert left > 3_000_000
            assert await work.append(last)
        for key in (keys.record(stream.id), keys.events(stream.id)):  # one byte is not enough
            assert await worker.store.run("EXISTS", key, patience_s=5.0) == 0


@pytest.mark.parametrize("renewal", ["append", "beat"])
async def test_worker_that_was_late_goes_on_unless_another_has_the_stream(
    store: ValkeyServer, renewal: str
) -> None:
    async with log_of(store) as server, log_of(store) as worker:
        name = f"late-{renewal}"
        stream, _ = await server.create(request(name), client=LOCAL, asker=LOCAL, clamp=False)
        work = await worker.work(stream.id)
        assert work is not None
        lease = f"{worker.keys.prefix}:l:{stream.id}"
        first, second, third, *_ = events_of(stream.id)
        async with work:
            assert await work.append(first)
            waits = f"?{server.holder}"  # as the server says once a lease has run out
            await server.store.run("SET", lease, waits, "PX", 60_000, patience_s=5.0)
            if renewal == "append":
                assert await work.append(second)
            else:
                await worker._beats._beat()
            ours = worker.holder.encode()
            while await server.store.run("GET", lease, patience_s=5.0) != ours:  # noqa: ASYNC110
                await asyncio.sleep(worker.times.beat_s)  # it has run out in a stall, until a beat
            assert not work.is_lost
            await server.store.run("SET", lease, "another", "PX", 60_000, patience_s=5.0)
            assert not await work.append(third)
            assert work.is_lost


async def test_worker_that_has_lost_its_stream_takes_no_lease_back(store: ValkeyServer) -> None:
    async with log_of(store) as server, log_of(store) as worker, log_of(store) as other:
        stream, _ = await server.create(request("lost"), client=LOCAL, asker=LOCAL, clamp=False)
        late = await worker.work(stream.id)
        assert late is not None
        async with late:  # hangs in a step, say, and has not let go of the stream yet
            taken = await other.work(stream.id, by_force=True)
            assert taken is not None
            async with taken:
                assert not await late.append(events_of(stream.id)[0])
            await worker._beats._beat()
            assert await other.work(stream.id) is not None
