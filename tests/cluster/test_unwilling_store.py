"""A store that answers, but takes no writes for a while, or has lost what it had."""

import asyncio
from collections.abc import Callable

import pytest

from d2f_stream.core.errors import LogUnavailable
from d2f_stream.server.limits import ServeLimits
from fakes import held
from serving import Peer, check_whole, request, serving
from stores import ValkeyServer
from stores import request as request_of

MakeStore = Callable[..., ValkeyServer]


@pytest.mark.parametrize(
    ("command", "undo", "told"),
    [
        ("CONFIG SET min-replicas-to-write 3", "CONFIG SET min-replicas-to-write 0", "fewer rep"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "read-only replica"),
    ],
    ids=["few-replicas", "read-only"],
)
async def test_store_that_takes_no_writes_holds_streams_up_and_says_why(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, command: str, undo: str, told: str
) -> None:
    from d2f_stream.server.streams.valkey import log
    from d2f_stream.server.streams.valkey.store import Store

    monkeypatch.setattr(log, "PATIENCE_S", 0.5)
    store = make_store()
    store.start()
    backend, gate = held(tokens_per_step=1)
    admin = Store(store.url)
    await admin.open()
    async with (
        serving(backend, log=store.url) as server,
        Peer.to(server) as peer,
        Peer.to(server) as another,
    ):
        await peer.hello()
        await another.hello()
        started = await peer.generate()
        await admin.run(*command.split(), patience_s=5.0)
        gate.open()
        await another.send(request())
        refused = await another.rejected()
        assert refused.code == "log_unavailable"
        assert "takes nothing now: " in refused.message
        assert told in refused.message
        assert "script" not in refused.message
        await admin.run(*undo.split(), patience_s=5.0)
        async with asyncio.timeout(20.0):
            check_whole([started, *await peer.answer()])
    await admin.close()


async def test_emptied_store_stays_this_version_s(make_store: MakeStore) -> None:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    store = make_store()
    store.start()
    async with ValkeyLog(store.url, ServeLimits()) as log:

        async def run(*command: str) -> object:
            return await log.store.run(*command, patience_s=5.0)

        await run("FLUSHALL")
        await log.create(request_of(), client="a", asker="a", clamp=False)
        assert await run("GET", "d2f:0:version") == b"1"
        await run("FLUSHALL")
        await run("SET", "d2f:0:version", "0")  # somebody else was quicker
        with pytest.raises(LogUnavailable, match="another version"):
            await log.create(request_of(), client="a", asker="a", clamp=False)
        store.kill()
        store.start()  # empty, and nobody asks for anything
        async with asyncio.timeout(20.0):
            while await run("GET", "d2f:0:version") != b"1":  # noqa: ASYNC110  # it is another's
                await asyncio.sleep(0.05)
