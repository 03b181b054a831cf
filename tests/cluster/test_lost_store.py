"""A store that is not there, goes away, is full, or is none: each one clear sentence."""

import asyncio
import logging
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import fakes
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.errors import InvalidRequest, LogUnavailable
from d2f_stream.core.events import Block, StreamFinished
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import Server, ServeSettings
from fakes import ANSWER, held, turn
from requirements import require_program
from serving import Peer, check_whole, request, serving, text_of
from stalls import stall
from stores import ValkeyServer, events_of
from stores import request as request_of

MakeStore = Callable[..., ValkeyServer]
PASSWORD = "correct-horse-battery"


async def refusal(url: str) -> str:
    """What whoever starts a server with this log is told."""
    with pytest.raises((LogUnavailable, InvalidRequest)) as refused:
        async with serving(log=url):
            pass
    assert PASSWORD not in str(refused.value)
    return str(refused.value)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key)]
    openssl = require_program("openssl")
    subprocess.run(
        [openssl, *command, *names, "-out", certificate], check=True, capture_output=True
    )
    return certificate, key


async def test_store_that_is_not_there_is_told_at_start() -> None:
    pytest.importorskip("valkey", reason="valkey is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for host in ("127.0.0.1", "localhost"):  # of several addresses, as a rule
        told = await refusal(f"valkey://:{PASSWORD}@{host}:{port}")
        assert told.startswith(f"the log at {host}:{port} cannot be used: nothing listens there")
        assert "rrno" not in told


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1", f"valkey://:{PASSWORD}@host:port", "valkey://host/x", "nothing"],
)
async def test_url_that_cannot_be_used_is_told_without_its_password(url: str) -> None:
    pytest.importorskip("valkey", reason="valkey is not installed")
    assert "valkey://127.0.0.1:6379/0" in await refusal(url)


async def test_wrong_password_is_told_and_the_right_one_is_taken(make_store: MakeStore) -> None:
    store = make_store(lines=[f"requirepass {PASSWORD}"])
    store.start()
    told = "does not take the user and password"
    assert told in await refusal(store.url)
    assert told in await refusal(f"valkey://:{PASSWORD}x@127.0.0.1:{store.port}")
    async with (
        serving(log=f"redis://:{PASSWORD}@127.0.0.1:{store.port}/3") as server,
        Peer.to(server) as peer,
    ):
        await peer.hello()
        check_whole([await peer.generate(), *await peer.answer()])


async def test_user_who_may_not_hear_is_told(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2f_stream.server.streams.valkey import news

    monkeypatch.setattr(news, "PATIENCE_S", 0.3)
    store = make_store(lines=[f"user d2f on >{PASSWORD} ~d2f:* resetchannels +@all"])
    store.start()
    told = await refusal(f"valkey://d2f:{PASSWORD}@127.0.0.1:{store.port}")
    assert "has not let us hear d2f:0:h:" in told


async def test_user_for_this_alone_is_enough(make_store: MakeStore) -> None:
    rights = "~d2f:* &d2f:* -@all +info +evalsha +script|load +publish +subscribe +unsubscribe"
    more = "+set +get +time +hgetall +xrange +ping +select +@write +@read"
    store = make_store(lines=[f"user d2f on >{PASSWORD} {rights} {more}"])
    store.start()
    async with (
        serving(log=f"valkey://d2f:{PASSWORD}@127.0.0.1:{store.port}") as server,
        Peer.to(server) as peer,
    ):
        await peer.hello()
        check_whole([await peer.generate(), *await peer.answer()])


async def test_log_travels_over_tls(make_store: MakeStore, tmp_path: Path) -> None:
    certificate, key = await asyncio.to_thread(make_certificate, tmp_path)
    store = make_store()
    tls_port = store.port
    store.config.write_text(
        store.config.read_text().replace(f"port {tls_port}", f"port 0\ntls-port {tls_port}")
        + f"tls-cert-file {certificate}\ntls-key-file {key}\ntls-auth-clients no\n"
        + f"tls-ca-cert-file {certificate}\n"
    )
    store.start()
    url = f"valkeys://localhost:{tls_port}"
    assert "certificate verify failed" in await refusal(url)
    async with serving(log=f"{url}?ssl_ca_certs={certificate}") as server, Peer.to(server) as peer:
        await peer.hello()
        check_whole([await peer.generate(), *await peer.answer()])


async def test_server_of_something_else_is_told_at_start() -> None:
    pytest.importorskip("valkey", reason="valkey is not installed")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    web = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with web:
        port = web.sockets[0].getsockname()[1]
        assert "no Valkey or Redis" in await refusal(f"valkey://127.0.0.1:{port}")


async def test_database_of_another_version_is_kept_away_from(store: ValkeyServer) -> None:
    from d2f_stream.server.streams.valkey.store import Store

    foreign = Store(f"{store.url}/9")
    await foreign.open()
    await foreign.run("SET", "d2f:9:version", "0", patience_s=5.0)
    assert "another version" in await refusal(f"{store.url}/9")
    await foreign.run("DEL", "d2f:9:version", patience_s=5.0)
    await foreign.close()


@pytest.mark.parametrize("keeps", [False, True], ids=["empty", "kept"])
async def test_stream_goes_on_when_the_store_is_killed_and_comes_back(
    make_store: MakeStore, keeps: bool
) -> None:
    store = make_store(lines=["appendonly yes", "appendfsync everysec"] if keeps else ())
    store.start()
    backend, gate = held(tokens_per_step=1)
    async with serving(backend, log=store.url) as server, Peer.to(server) as peer:
        await peer.hello()
        started = await peer.generate()
        gate.let_through(12)
        block = await peer.receive()
        assert isinstance(block, Block)
        store.kill()
        gate.open()
        store.start()
        async with asyncio.timeout(20.0):
            check_whole([started, block, *await peer.answer()])
        async with serving(log=store.url) as other, Peer.to(other) as elsewhere:
            await elsewhere.hello()
            await elsewhere.resume(started.stream)
            check_whole(await elsewhere.answer())


async def test_requests_are_refused_while_the_store_is_away(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2f_stream.server.streams.valkey import log

    monkeypatch.setattr(log, "PATIENCE_S", 0.3)
    store = make_store()
    store.start()
    async with serving(log=store.url) as server, Peer.to(server) as peer:
        await peer.hello()
        store.kill()
        asked = request()
        await peer.send(asked)
        refused = await peer.rejected()
        assert refused.code == "log_unavailable"
        assert refused.request_id == asked.request_id
        assert "cannot be reached" in refused.message
        store.start()
        async with asyncio.timeout(20.0):
            while True:
                await peer.send(asked)
                if not hasattr(first := await peer.receive(), "code"):
                    break
            assert text_of([first, *await peer.answer()]) == ANSWER  # type: ignore[list-item]


async def test_stream_whose_log_stays_away_ends_with_one_error(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2f_stream.server.streams.valkey import work

    monkeypatch.setattr(work, "PATIENCE_S", 0.5)
    store = make_store()
    store.start()
    backend, gate = held(tokens_per_step=1)
    async with serving(backend, log=store.url) as server, Peer.to(server) as peer:
        await peer.hello()
        started = await peer.generate()
        store.kill()
        gate.open()
        async with asyncio.timeout(20.0):
            while isinstance(message := await peer.receive(), Block):
                pass
        assert getattr(message, "code", None) == "log_unavailable"
        assert getattr(message, "stream", None) == started.stream
        assert not backend.open_slots


async def test_store_is_heard_after_a_stall_of_the_server(store: ValkeyServer) -> None:
    from d2f_stream.server.streams.valkey.store import Store

    asked = Store(store.url)
    await asked.open()
    answer = asyncio.create_task(asked.run("PING", patience_s=5.0))
    await turn()  # the command is on its way
    stall()
    assert await answer == b"PONG"
    await asked.close()


async def test_full_store_refuses_requests_and_holds_streams_up(make_store: MakeStore) -> None:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    store = make_store(lines=["maxmemory 4mb", "maxmemory-policy noeviction"])
    store.start()
    async with ValkeyLog(store.url, ServeLimits()) as log:
        stream, _ = await log.create(request_of(), client="a", asker="a", clamp=False)
        work = await log.work(stream.id)
        assert work is not None
        async with work:
            first, *rest = events_of(stream.id)
            assert await work.append(first)
            await log.store.run("SETRANGE", "filler", 6_000_000, "x", patience_s=5.0)
            with pytest.raises(LogUnavailable, match="is full; raise its maxmemory"):
                await log.create(request_of("b"), client="a", asker="a", clamp=False)
            appending = asyncio.create_task(work.append(rest[0]))
            await asyncio.sleep(0.2)
            assert not appending.done()
            await log.store.run("DEL", "filler", patience_s=5.0)
            async with asyncio.timeout(5.0):
                assert await appending


async def test_store_that_may_drop_streams_is_warned_of(
    make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(lines=["maxmemory-policy allkeys-lru"])
    store.start()
    with caplog.at_level(logging.WARNING, logger="d2f_stream.server"):
        async with serving(log=store.url):
            pass
    assert "set noeviction" in caplog.text


async def test_reader_elsewhere_misses_nothing_while_the_store_is_away(
    make_store: MakeStore,
) -> None:
    store = make_store()
    store.start()
    backend, gate = held(tokens_per_step=1)
    async with (
        serving(backend, log=store.url) as one,
        fakes.engine_over(ScriptedBackend("never")) as engine,
        Server(engine, ServeSettings(port=0, log=store.url)) as two,
        Peer.to(one) as peer,
        Peer.to(two) as elsewhere,
    ):
        await peer.hello()
        await elsewhere.hello()
        started = await peer.generate()
        await elsewhere.resume(started.stream)
        assert await elsewhere.started() == started
        store.kill()
        gate.open()
        store.start()
        async with asyncio.timeout(20.0):
            check_whole([started, *await elsewhere.answer()])
            check_whole([started, *(events := await peer.answer())])
        assert isinstance(events[-1], StreamFinished)
        assert text_of(events) == fakes.ANSWER
