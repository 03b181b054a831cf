"""What every StreamLog promises: the one in memory, and one in a real store seen by two servers."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from d2f_stream.core.errors import StreamLost, WorkerLost
from d2f_stream.core.events import Block, Draft, Event
from d2f_stream.core.identity import ModelIdentity
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.log import StreamLog, Work
from d2f_stream.server.streams.memory_log import MemoryLog
from d2f_stream.server.streams.served_stream import ServedStream
from stores import ValkeyServer, events_of, request

LEASE_S = 0.4
_databases = itertools.cycle(range(16))


@dataclass(frozen=True)
class Kind:
    """Of log."""

    name: str
    store: ValkeyServer | None

    @property
    def is_shared(self) -> bool:
        return self.store is not None

    @asynccontextmanager
    async def open(self, **limits: float) -> AsyncIterator[tuple[StreamLog, StreamLog]]:
        """The log as two servers see it: the same object where it is in memory."""
        chosen = ServeLimits(**limits)  # type: ignore[arg-type]
        if self.store is None:
            log = MemoryLog(chosen)
            yield log, log
            return
        from d2f_stream.server.streams.valkey.log import ValkeyLog

        url = f"{self.store.url}/{next(_databases)}"
        async with AsyncExitStack() as stack:
            logs = [ValkeyLog(url, chosen, lease_s=LEASE_S) for _ in range(2)]
            for log_of_one in logs:
                await stack.enter_async_context(log_of_one)
            await logs[0].store.run("FLUSHDB", patience_s=5.0)
            yield logs[0], logs[1]


@pytest.fixture(params=["memory", "valkey"])
def kind(request: pytest.FixtureRequest) -> Kind:
    store = request.getfixturevalue("store") if request.param == "valkey" else None
    return Kind(request.param, store)


async def created(log: StreamLog, name: str = "request", client: str = "ann") -> ServedStream:
    stream, is_new = await log.create(request(name), client=client, asker=client, clamp=False)
    assert is_new
    return stream


async def working(
    log: StreamLog, stream: ServedStream, *, model: ModelIdentity | None = None
) -> Work:
    work = await log.work(stream.id, model=model)
    assert work is not None
    return work


async def write(log: StreamLog, stream: ServedStream, *, num_blocks: int = 3) -> list[Event]:
    """Have a stream's whole answer in the log."""
    events = events_of(stream.id, num_blocks=num_blocks)
    async with await working(log, stream) as work:
        for event in events:
            assert await work.append(event)
    stream.end()
    log.retain(stream)
    return events


async def read(stream: ServedStream, *, after_seq: int = -1) -> list[Event]:
    """What a reader gets until the last event."""
    events = []
    async for event in stream.follow(after_seq=after_seq):
        events.append(event)
        if stream.has_terminal and len(events) == len(stream.log) - after_seq - 1:
            break
    return events


async def test_stream_is_read_from_any_event_on_wherever_it_is_asked_for(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        events = await write(one, stream)
        for after_seq in range(-1, len(events) - 1):
            copy = await other.find(stream.id, client="ann")
            assert await read(copy, after_seq=after_seq) == events[after_seq + 1 :]


async def test_reader_elsewhere_gets_each_event_as_it_comes(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        copy = await other.find(stream.id, client="ann")
        async with await working(one, stream) as work:
            seen = aiter(copy.follow())
            for event in events_of(stream.id):
                assert await work.append(event)
                async with asyncio.timeout(5.0):
                    assert await anext(seen) == event


async def test_request_is_one_stream_however_many_servers_are_asked(kind: Kind) -> None:
    async with kind.open() as logs:
        asked = (log.create(request(), client="ann", asker="ann", clamp=False) for log in logs * 4)
        made = await asyncio.gather(*asked)
        assert len({stream.id for stream, _ in made}) == 1
        assert sum(is_new for _, is_new in made) == 1
        for log in logs:
            known = await log.of_request(request().request_id, client="ann")
            assert known is not None
            assert known.id == made[0][0].id
            assert known.digest == made[0][0].digest


async def test_clients_do_not_find_each_other_s_streams(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        bobs = await created(one, client="bob")
        assert bobs.id != stream.id
        for log in (one, other):
            with pytest.raises(StreamLost):
                await log.find(stream.id, client="bob")
            with pytest.raises(StreamLost):
                await log.find("nothing", client="ann")
            assert await log.of_request("another", client="ann") is None


async def test_event_is_taken_once_and_none_is_left_out(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        events = events_of(stream.id)
        async with await working(one, stream) as work:
            for event in events[:2]:
                assert await work.append(event)
            assert await work.append(events[1])  # the same again is no other event
            assert not await work.append(events_of(stream.id, text="y")[1])
            assert list(work.events) == events[:2]
        copy = await other.find(stream.id, client="ann")
        assert copy.log == events[:2]


async def test_stream_has_one_worker_at_a_time(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        events = events_of(stream.id)
        first = await working(one, stream)
        async with first:
            assert await first.append(events[0])
            assert await one.work(stream.id) is None
            assert await other.work(stream.id) is None
        second = await working(other, stream)
        async with second:
            assert list(second.events) == events[:1]
            assert await second.append(events[1])
            assert not await first.append(events_of(stream.id, text="y")[2])
            assert await second.append(events[2])
        copy = await one.find(stream.id, client="ann")
        seen = aiter(copy.follow())
        async with asyncio.timeout(5.0):
            assert [await anext(seen) for _ in range(3)] == events[:3]


async def test_stream_of_a_dead_worker_is_taken_at_once(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        events = events_of(stream.id)
        async with await working(one, stream) as dead:
            assert await dead.append(events[0])
            assert await other.work(stream.id) is None
            async with await _taken(other, stream) as work:
                assert work.names == (stream.id, stream.request_id, "ann")
                assert list(work.events) == events[:1]
                assert not await dead.append(events[1])  # it was not dead, but says nothing more
                for event in events[1:]:
                    assert await work.append(event)
        copy = await one.find(stream.id, client="ann")
        seen = aiter(copy.follow())
        async with asyncio.timeout(5.0):
            assert [await anext(seen) for _ in events] == events


async def _taken(log: StreamLog, stream: ServedStream) -> Work:
    work = await log.work(stream.id, by_force=True)
    assert work is not None
    return work


async def test_no_model_goes_on_with_the_answer_of_another(kind: Kind) -> None:
    began, other_one = ModelIdentity("small", "00ff"), ModelIdentity("large", "11ee")
    async with kind.open() as (one, other):
        stream = await created(one)
        events = events_of(stream.id)
        for model in (other_one, began):  # before it has begun, any may
            async with await working(one, stream, model=model):
                assert await other.begun_by(stream.id) == model
        async with await working(one, stream, model=began) as work:
            assert await work.append(events[0])
        for by_force in (False, True):
            with pytest.raises(WorkerLost, match=r"begun by small .*00ff.* where large .*11ee"):
                await other.work(stream.id, model=other_one, by_force=by_force)
        same = ModelIdentity("small-by-another-name", began.digest)
        async with await working(other, stream, model=same) as work:  # the refusal took nothing
            assert await work.append(events[1])
        async with await working(one, stream):  # whoever only ends it needs none
            assert await one.begun_by(stream.id) == same
        assert await one.begun_by("nothing") is None


async def test_stream_that_has_ended_has_no_worker_any_more(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        await write(one, stream)
        assert await one.work(stream.id) is None
        assert await other.work(stream.id) is None
        with pytest.raises(StreamLost):
            await one.work("nothing")


async def test_cancel_reaches_the_worker_wherever_it_is(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        copy = await other.find(stream.id, client="ann")
        cancelled = asyncio.Event()
        async with await working(one, stream) as work:
            work.on_cancel(cancelled.set)
            copy.cancel()
            async with asyncio.timeout(5.0):
                await cancelled.wait()
            copy.cancel()  # once more changes nothing


async def test_drafts_reach_readers_and_are_not_kept(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        copy = await other.find(stream.id, client="ann")
        started, block, *_ = events_of(stream.id)
        draft = Draft(stream=stream.id, index=0, text="x?")
        async with await working(one, stream) as work:
            seen = aiter(copy.follow(drafts=True))
            for event in (started, draft, block):
                assert await work.append(event)
                async with asyncio.timeout(5.0):
                    assert await anext(seen) == event
        assert copy.log == [started, block]


async def test_request_turned_away_may_come_again(kind: Kind) -> None:
    async with kind.open() as (one, other):
        stream = await created(one)
        stream.end(StreamLost("no"))
        one.forget(stream)
        for log in (one, other):
            assert await log.of_request(stream.request_id, client="ann") is None
        again = await created(other)
        assert again.id != stream.id


async def test_ended_stream_is_forgotten_after_a_time(kind: Kind) -> None:
    async with kind.open(resume_ttl_s=0.3) as (one, other):
        stream = await created(one)
        await write(one, stream)
        while await one.of_request(stream.request_id, client="ann"):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
        for log in (one, other):
            with pytest.raises(StreamLost):
                await log.find(stream.id, client="ann")
            assert await log.of_request(stream.request_id, client="ann") is None


async def test_ended_streams_are_bounded_and_whoever_has_most_gives_way(kind: Kind) -> None:
    async with kind.open(max_retained_bytes=40_000) as (one, other):
        bobs = await created(one, client="bob")
        await write(one, bobs)
        anns = []
        for number in range(20):
            anns.append(await created(one, f"ann-{number}"))
            await write(one, anns[-1], num_blocks=40)
        assert len((await other.find(bobs.id, client="bob")).log) == 5
        assert len((await other.find(anns[-1].id, client="ann")).log) == 42
        with pytest.raises(StreamLost):
            await other.find(anns[0].id, client="ann")


async def test_blocks_that_wait_for_a_reader_are_whole(kind: Kind) -> None:
    async with kind.open() as (one, other):
        streams = [await created(one, f"r{number}") for number in range(20)]
        copies = [await other.find(stream.id, client="ann") for stream in streams]
        readers = [asyncio.create_task(read(copy)) for copy in copies]
        events = await asyncio.gather(*(write(one, stream, num_blocks=30) for stream in streams))
        async with asyncio.timeout(10.0):
            assert await asyncio.gather(*readers) == events
        assert all(isinstance(event, Block) for event in events[0][1:-1])
