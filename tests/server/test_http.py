"""HTTP: the page and its headers, foreign origins, large bodies and slow peers."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest

import fakes
from d2f_stream.server.app import CONTENT_TYPES, STATIC
from d2f_stream.server.auth import Auth
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import Server
from d2f_stream.server.settings import Timeouts
from memory_network import until
from serving import serving, small_socket
from stalls import stall

CHAT = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        yield client


@contextlib.asynccontextmanager
async def raw(server: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_health_names_the_model() -> None:
    async with serving() as server, client_of(server) as client:
        response = await client.get("/healthz")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "model": "scripted"}
    assert "server" not in response.headers


async def test_health_has_the_name_that_other_servers_give_it() -> None:
    async with serving() as server, client_of(server) as client:
        health, other = await client.get("/health"), await client.get("/healthz")
    assert (health.status_code, health.json()) == (200, other.json())


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/health", "/metrics", "/v1/models", "/api/tags", "/api/version"]
)
async def test_head_is_get_without_its_body(path: str) -> None:
    async with serving() as server, client_of(server) as client:
        head = await client.head(path)
        get = await client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


async def test_request_is_named_by_its_client_or_the_server() -> None:
    async with serving() as server, client_of(server) as client:
        for path in ("/healthz", "/v1/nothing", "/v1/models"):
            named = await client.get(path, headers={"X-Request-Id": "trace-7.a"})
            assert named.headers["x-request-id"] == "trace-7.a"
        unnamed = [await client.get("/healthz") for _ in range(2)]
        names = {response.headers["x-request-id"] for response in unnamed}
        assert len(names) == 2
        for bad in (b"a b", b"x" * 129, b"<script>", b"na\xefve"):
            response = await client.get("/healthz", headers={b"X-Request-Id": bad})
            assert re.fullmatch("req_[0-9a-f]{32}", response.headers["x-request-id"])


async def test_metrics_tell_of_the_streams() -> None:
    async with serving() as server, client_of(server) as client:
        await client.post("/v1/completions", json={"model": "scripted", "prompt": "hi"})
        text = (await client.get("/metrics")).text
    assert 'd2f_requests_total{outcome="eos"} 1.0' in text
    assert "d2f_connections 0.0" in text


async def test_page_may_load_from_its_own_server_only() -> None:
    async with serving() as server, client_of(server) as client:
        response = await client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    host = f"127.0.0.1:{server.port}"
    assert f"connect-src 'self' ws://{host} wss://{host};" in policy
    assert "unsafe" not in policy


async def test_host_header_cannot_extend_the_policy() -> None:
    async with serving(auth=Auth(origins=("*",))) as server, client_of(server) as client:
        host = "x; script-src *"
        policy = (await client.get("/", headers={"Host": host})).headers["content-security-policy"]
    assert "connect-src 'self';" in policy
    assert "*" not in policy


async def test_files_of_the_page_have_their_types_and_are_not_sent_twice() -> None:
    async with serving() as server, client_of(server) as client:
        for path in (path for path in STATIC.rglob("*") if path.suffix in CONTENT_TYPES):
            name = path.relative_to(STATIC).as_posix()
            first = await client.get(f"/{name}")
            assert (first.status_code, first.content) == (200, path.read_bytes())
            assert first.headers["content-type"] == CONTENT_TYPES[path.suffix]
            assert first.headers["cache-control"] == "no-cache"
            known = {"If-None-Match": first.headers["etag"]}
            again = await client.get(f"/{name}", headers=known)
            assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/nothing.js", "/../app.py", "/..%2f..%2fserve.py", "//etc/x.json", "/%00.js", "/x.py"]
)
async def test_nothing_else_is_served(path: str) -> None:
    async with serving() as server, raw(server) as (reader, writer):
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 404")


async def test_page_can_be_left_out() -> None:
    async with serving(ui=False) as server, client_of(server) as client:
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Host": "evil.example"},
        {"Host": "["},
        {"Origin": "http://["},
    ],
)
async def test_foreign_page_cannot_make_the_model_work(headers: dict[str, str]) -> None:
    async with serving() as server, client_of(server) as client:
        response = await client.post(CHAT, headers=headers, content=b"{}")
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_refused"
        assert "access-control-allow-origin" not in response.headers


async def test_allowed_origin_may_read_the_answer() -> None:
    origin = "https://chat.example"
    async with (
        serving(auth=Auth(origins=(origin,))) as server,
        client_of(server) as client,
    ):
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = await client.options(CHAT, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == origin
        body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
        response = await client.post(CHAT, headers={"Origin": origin}, json=body)
    assert response.headers["access-control-allow-origin"] == origin
    assert response.json()["choices"][0]["message"]["content"] == fakes.ANSWER


async def _chunks(num_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(0, num_bytes, 1000):
        yield b"x" * 1000


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_large_body_is_refused_in_the_shape_of_the_api(is_chunked: bool) -> None:
    async with (
        serving(limits=ServeLimits(max_message_bytes=5000)) as server,
        client_of(server) as client,
    ):
        content = _chunks(20_000) if is_chunked else b"x" * 20_000
        headers = {"Content-Type": "application/json"}
        response = await client.post(CHAT, content=content, headers=headers)
        assert response.status_code == 413
        error = response.json()["error"]
        assert error["code"] == "message_too_large"
        assert "5000 bytes" in error["message"]


async def test_large_header_is_refused() -> None:
    async with serving() as server, raw(server) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 30_000)
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /",
        b"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n",
    ],
)
async def test_request_that_does_not_arrive_in_time_loses_its_connection(sent: bytes) -> None:
    async with (
        serving(timeouts=Timeouts(request_s=0.05)) as server,
        raw(server) as (reader, writer),
    ):
        writer.write(sent)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):  # far below `keep_alive_s`, which is another limit
                await reader.read()
        assert server.num_connections == 0


async def test_bytes_that_trickle_in_do_not_buy_time() -> None:
    async with serving(timeouts=Timeouts(request_s=0.2)) as server, raw(server) as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: ")
        closed = asyncio.create_task(reader.read())
        while not closed.done():
            writer.write(b"x")
            await asyncio.wait((closed,), timeout=0.02)  # the pace of the attack
        assert isinstance(closed.exception(), ConnectionError) or closed.result() == b""
        assert server.num_connections == 0


async def test_response_that_nobody_reads_loses_its_connection() -> None:
    timeouts = Timeouts(stall_s=0.05)
    async with serving(timeouts=timeouts) as server, small_socket(server) as sock:
        loop = asyncio.get_running_loop()
        # As many as are taken in at once; their responses are some megabytes.
        asked = b"GET /d2f-client.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300
        await loop.sock_sendall(sock, asked)
        await loop.sock_recv(sock, 100)
        while server.num_connections:
            await fakes.turn()


async def test_request_may_go_on_after_a_stall_of_the_server() -> None:
    async with serving() as server, raw(server) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\n")
        await until(lambda: server.num_connections)
        stall()
        await fakes.turn()
        writer.write(b"Host: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_closed_keep_alive_connection_does_not_wait_for_its_reader() -> None:
    timeouts = Timeouts(request_s=0.05)
    async with serving(timeouts=timeouts) as server, raw(server) as (reader, writer):
        for _ in range(3):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            await reader.readuntil(b"}")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/", 200),
        ("GET", "//healthz", 200),
        ("GET", "http://localhost/healthz", 200),
        ("POST", "/v1//completions/", 415),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/healthz", 405),
        ("POST", "/chat/completions", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/nothing.html", 404),
        ("OPTIONS", "/v1/nothing", 404),
    ],
)
async def test_addresses_are_read_as_they_are_meant(method: str, path: str, status: int) -> None:
    async with serving() as server, raw(server) as (reader, writer):
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            "Content-Length: 0\r\n\r\n".encode()
        )
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"application/json" in head
    if status >= 400:
        error = json.loads(body)["error"]
        assert error["message"]
        assert (status != 405) or b"allow: " in head.lower()
