"""Peers that mean harm, or are broken: what they cost is told in a line and costs nobody else."""

import asyncio
import contextlib
import logging
import resource
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.models import __path__ as models_path
from d2f_runtime.text import bounded_template
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.printable import printable
from d2f_stream.server.auth import LOCAL, Auth
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.listening.sockets import max_sockets
from d2f_stream.server.logins import FailedLogins
from d2f_stream.server.peer_log import OneLine, PeerLog
from d2f_stream.server.serve import Server
from d2f_stream.server.settings import ServeSettings
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.protocol import Authenticate
from fakes import ANSWER, held, params
from serving import ALICE, BOB, TWO_CLIENTS, Peer, check_whole, handshake, request, serving

DEEP = b"[" * 5000 + b"]" * 5000
LOGIN_GUARD_S = 20


@contextlib.asynccontextmanager
async def client_of(server: Server, token: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, headers=headers) as client:
        yield client


@pytest.mark.parametrize("after_seq", [999, -2, 2**62])
async def test_refused_resume_leaves_the_reading_of_its_stream_alone(after_seq: int) -> None:
    backend, gate = held()
    async with serving(backend) as server, Peer.to(server) as peer:
        await peer.hello()
        started = await peer.generate()
        await peer.resume(started.stream, after_seq=after_seq)
        assert (await peer.rejected()).code == "invalid_request"
        stream = await server.registry.resume(started.stream, client=LOCAL)
        assert stream.num_readers == 1
        gate.open()
        check_whole([started, *await peer.answer()])


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        (JSON, b'{"type":"cancel","stream":1,"x":' + DEEP + b"}"),
        (JSON, b'{"type":"nope","x":' + DEEP + b"}"),
        (JSON, b'{"type":"generate","prompt":' + DEEP + b"}"),
        (MSGPACK, b"\x83\xa4type\xa6cancel\xa6stream\x01\xa1x" + b"\x91" * 5000 + b"\x01"),
    ],
)
async def test_message_of_any_depth_is_refused_and_the_connection_goes_on(
    codec: Codec, data: bytes
) -> None:
    async with serving() as server, Peer.to(server, codec=codec) as peer:
        await peer.hello()
        await peer.socket.send(data, text=codec.is_text)
        assert (await peer.rejected()).code in ("protocol_error", "invalid_request")
        await peer.send(request())
        check_whole(await peer.answer())


async def test_what_peers_do_wrong_is_no_error_and_no_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving() as server:
        for _ in range(20):
            async with Peer.to(server) as peer:
                await peer.hello()
                await peer.socket.send(b"\xff\xfe", text=True)
                assert (await peer.closed())[0] == 1007
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(handshake(server.port)[:-2] + b"Origin: http://evil.example\r\n\r\n")
            assert b" 403 " in await reader.readline()
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"\x16\x03\x01 not HTTP\r\n\r\n")
            assert b" 400 " in await reader.readline()
            writer.close()
    lines = [line for line in caplog.records if line.name.startswith(("d2f", "uvicorn", "asyncio"))]
    assert not [line for line in lines if line.levelno > logging.INFO or line.exc_info]
    assert len(lines) < 40
    assert all("\n" not in line.getMessage() for line in lines)


async def test_wrong_tokens_close_their_connection_and_anothers_is_one() -> None:
    async with serving(auth=TWO_CLIENTS) as server, asyncio.timeout(LOGIN_GUARD_S):
        async with Peer.to(server, token=ALICE) as peer:
            await peer.hello()
            await peer.send(Authenticate(token=ALICE))  # her own costs nothing
            await peer.send(Authenticate(token=BOB), Authenticate(token="x" * 20))
            refused = [await peer.rejected(), await peer.rejected()]
            assert {answer.message for answer in refused} == {
                "the token is wrong, or another client's"
            }
            await peer.send(Authenticate(token="y" * 20))
            assert (await peer.closed())[0] == 4401
        assert server.gateway.logins.total == 3


async def test_wrong_tokens_over_http_close_their_connection() -> None:
    async with serving(auth=TWO_CLIENTS) as server, client_of(server, "z" * 20) as client:
        answers = [await client.get("/v1/models") for _ in range(3)]
        assert {answer.status_code for answer in answers} == {401}
        assert [answer.headers.get("connection") for answer in answers] == [None, None, "close"]
        assert server.gateway.logins.total == 3
        assert (await client.get("/metrics")).status_code == 401


async def test_metrics_need_the_token_that_clients_need() -> None:
    async with serving(auth=TWO_CLIENTS) as server, client_of(server) as stranger:
        assert (await stranger.get("/metrics")).status_code == 401
        async with client_of(server, ALICE) as alice:
            assert "d2f_failed_logins_total 0.0" in (await alice.get("/metrics")).text
    async with serving(auth=TWO_CLIENTS, open_metrics=True) as server, client_of(server) as client:
        assert (await client.get("/metrics")).status_code == 200


async def test_guesses_of_one_host_are_answered_later_and_later() -> None:
    logins = FailedLogins(clock=lambda: 0.0)
    loop = asyncio.get_running_loop()
    waits = []
    for port in range(4):
        began = loop.time()
        assert not await logins.refuse(("host", port))
        waits.append(loop.time() - began)
    assert waits == sorted(waits)
    assert waits[-1] >= 0.4


async def test_connections_without_a_token_have_a_share_of_their_own() -> None:
    limits = ServeLimits(max_unauthenticated=2)
    async with (
        serving(auth=Auth({"alice": ALICE}), limits=limits) as server,
        Peer.to(server) as first,
        Peer.to(server) as second,
        Peer.to(server) as third,
    ):
        assert (await first.closed())[0] == 1013
        for peer in (second, third):
            await peer.send(Authenticate(token=ALICE))
            await peer.hello()


async def test_one_client_cannot_take_all_connections() -> None:
    limits = ServeLimits(max_connections_per_client=1)
    async with (
        serving(auth=TWO_CLIENTS, limits=limits) as server,
        Peer.to(server, token=ALICE) as first,
        Peer.to(server, token=ALICE) as second,
        Peer.to(server, token=BOB) as bob,
    ):
        await first.hello()
        code, reason = await second.closed()
        assert code == 1013
        assert "the limit is 1" in reason
        await bob.hello()


async def test_silent_connections_give_way_to_new_ones() -> None:
    limits = ServeLimits(max_sockets=8, max_idle_connections=4)
    async with serving(limits=limits) as server:
        backlog = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(30)]
        async with client_of(server) as client:
            assert (await client.get("/healthz")).status_code == 200
        assert server.num_connections <= 5
        assert await backlog[0][0].read() == b""
        for _, writer in backlog:
            writer.close()


async def test_kept_connection_is_not_closed_for_silent_ones() -> None:
    limits = ServeLimits(max_sockets=100, max_idle_connections=4)
    async with serving(limits=limits) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(2):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in await reader.readline()
            await reader.readuntil(b"}")
            silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(10)]
            for _, other in silent:
                other.close()
        writer.close()


def test_connections_stay_below_what_the_process_may_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert max_sockets(10) == 10
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert 0 < max_sockets(10_000) < 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_full_server_says_so() -> None:
    limits = ServeLimits(max_sockets=1, max_connections=1)
    async with serving(limits=limits) as server, Peer.to(server) as peer:
        await peer.hello()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        answer = await reader.read()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert f"Content-Length: {len(body)}".encode() in head
        writer.close()


def test_log_of_peers_has_one_short_line_each_and_few_of_a_kind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now_s = 0.0
    log = PeerLog(
        logging.getLogger("d2f_stream.test"), burst=2, interval_s=1.0, clock=lambda: now_s
    )
    for _ in range(10):
        log.info("a peer said %s", "x\n2030-01-01 FORGED\x1b[2J" + "y" * 1000)
    now_s = 1.0
    log.info("a peer said %s", "again")
    lines = [line.getMessage() for line in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith(r"a peer said x\x0a2030-01-01 FORGED\x1b[2Jyyy")
    assert len(lines[0]) < 400
    assert lines[2] == "a peer said again (8 more of these were left out)"


def test_printable_text_has_no_character_that_moves_a_cursor_or_a_line() -> None:
    shown = printable("".join(map(chr, [*range(0x250), *range(0x2000, 0x2100), 0xD800])), 10_000)
    assert shown.isprintable() or set(shown) <= set(map(chr, range(0x20, 0x2100)))
    assert not set(shown) & set("\n\r\x1b\x07\x85\u2028\u2029\u202e\ud800")


async def test_access_log_has_a_line_for_each_request_without_its_query(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="d2f_stream.access")
    async with serving(access_log=True) as server, client_of(server) as client:
        await client.get("/healthz?key=secret", headers={"X-Request-Id": "trace-7"})
        await client.get("/v1/%0aforged")
        async with Peer.to(server) as peer:
            await peer.hello()
    lines = [line.getMessage() for line in caplog.records if line.name == "d2f_stream.access"]
    assert lines[0].split()[-1] == "trace-7"
    assert lines[1].split()[-1].startswith("req_")
    assert [line.split()[1:4] for line in lines] == [
        ["GET", "/healthz", "200"],
        ["GET", r"/v1/\x0aforged", "404"],
        ["WEBSOCKET", "/v1/stream", "101"],
    ]


def test_lines_of_the_log_cannot_be_forged() -> None:
    formatter = OneLine("%(levelname)s %(message)s")
    try:
        raise ValueError("x\n2030-01-01 ERROR forged\x1b[2J")
    except ValueError:
        failure = sys.exc_info()
    record = logging.LogRecord("n", logging.ERROR, "f", 1, "a\nb %s", ("c\nd",), failure)
    first, *others = formatter.format(record).splitlines()
    assert first == r"ERROR a\x0ab c\x0ad"
    assert others
    assert all(line.startswith("    ") for line in others)
    assert "\x1b" not in "".join(others)


def test_errors_of_the_codec_are_one_line() -> None:
    forged = b'{"type":"generate","request_id":"r","prompt":"a","params":{"x\\n2030 FORGED":1}}'
    with pytest.raises(Exception, match=r"x\\x0a2030 FORGED"):
        JSON.decode_operation(forged)


async def test_connections_take_turns_where_nobody_has_a_token() -> None:
    backend, gate = held()
    async with (
        serving(backend, limits=ServeLimits(max_running=4)) as server,
        Peer.to(server, close_timeout=0.1) as greedy,  # which leaves its answers unread
        Peer.to(server) as modest,
    ):
        await greedy.hello()
        await modest.hello()
        await greedy.send(*(request() for _ in range(20)))
        await greedy.started()  # no other of its requests can start while the step is held
        await modest.send(request())
        gate.open()
        check_whole(await modest.answer())
        assert server.registry.num_waiting > 4


class LoopingCodec(ByteCodec):
    """A codec whose chat template does not end."""

    def __init__(self) -> None:
        folder = Path(models_path[0]) / "embedded"
        loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        self._tokenizer = Tokenizer(folder / "tokenizer.json", chat_template=loop)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._tokenizer.render(messages)


async def test_template_that_loops_is_cut_off_while_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded_template, "MAX_RENDER_S", 1.0)
    body = {"messages": [{"role": "user", "content": "hi"}]}
    async with (
        LocalEngine.over(ScriptedBackend(ANSWER), LoopingCodec(), defaults=params()) as engine,
        Server(engine, ServeSettings(port=0)) as server,
        client_of(server) as looping,
        client_of(server) as other,
    ):
        asking = asyncio.create_task(looping.post("/v1/chat/completions", json=body, timeout=60))
        num_answered = 0
        while not asking.done():
            assert (await other.get("/healthz", timeout=60)).status_code == 200
            num_answered += 1
        refused = await asking
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_prompt")
        assert "takes more than" in refused.json()["error"]["message"]
        assert num_answered > 3
        answer = await other.post("/v1/completions", json={"prompt": "hi"}, timeout=60)
        assert answer.json()["choices"][0]["text"] == ANSWER
