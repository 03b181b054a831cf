"""A store that comes back, or is replaced by its replica, without the last events of a stream."""

import time

import msgspec
import pytest

from d2f_stream.core.errors import WorkerLost
from d2f_stream.core.events import Block
from d2f_stream.server.auth import LOCAL
from d2f_stream.server.limits import ServeLimits
from memory_network import until
from serving import Peer, serving
from stores import ValkeyServer, events_of, request

LOST = 3
"""Events that the store still has."""


@pytest.mark.parametrize("is_same", [True, False])
async def test_readers_are_never_told_another_continuation_of_what_the_store_lost(
    store: ValkeyServer, is_same: bool
) -> None:
    from d2f_stream.server.streams.valkey.keys import encoded
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    async with (
        ValkeyLog(store.url, ServeLimits()) as first,
        ValkeyLog(store.url, ServeLimits()) as second,
        ValkeyLog(store.url, ServeLimits()) as reading,
    ):
        asked = request(f"lost-{is_same}")
        stream, _ = await first.create(asked, client="a", asker="a", clamp=False)
        work = await first.work(stream.id)
        assert work is not None
        told = events_of(stream.id)[: LOST + 1]
        for event in told:
            assert await work.append(event)
        copy = await reading.find(stream.id, client="a")
        key = first.keys.events(stream.id)
        await first.store.run("DEL", key, patience_s=5.0)
        for event in told[:LOST]:
            entry = f"{event.seq + 1}-0", "e", encoded(event)  # type: ignore[union-attr]
            await first.store.run("XADD", key, *entry, patience_s=5.0)
        other = await second.work(stream.id, by_force=True)
        assert other is not None
        assert isinstance(told[LOST], Block)
        again = msgspec.structs.replace(told[LOST], elapsed_ms=99.0)  # as another worker says it
        await other.append(again if is_same else msgspec.structs.replace(again, text="else"))
        if is_same:
            last = events_of(stream.id)[LOST + 1]
            assert await other.append(last)
            await until(lambda: copy.has_terminal)
            assert copy.log == [*told, last]
        else:
            await until(lambda: copy.ended)
            assert isinstance(copy.error, WorkerLost)
            assert copy.log == told


async def test_reader_ahead_of_the_log_waits_until_that_has_its_events_again(
    store: ValkeyServer,
) -> None:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    async with (
        ValkeyLog(store.url, ServeLimits()) as log,
        serving(log=store.url) as server,
        Peer.to(server) as peer,
        Peer.to(server) as other,
    ):
        await peer.hello()
        await other.hello()
        stream, _ = await log.create(request("ahead"), client=LOCAL, asker=LOCAL, clamp=False)
        work = await log.work(stream.id)
        assert work is not None
        events = events_of(stream.id)
        async with work:
            for event in events[:LOST]:
                assert await work.append(event)
            began_s = time.monotonic()
            await peer.resume(stream.id, after_seq=LOST)
            await other.send(request())
            await other.answer()  # over the same log: a refusal of the first would be long there
            for event in events[LOST:]:
                assert await work.append(event)
            assert await peer.receive() == events[LOST + 1]
            assert time.monotonic() - began_s < 4.0
