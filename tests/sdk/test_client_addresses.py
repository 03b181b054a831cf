"""The client over real sockets: addresses, and servers that are not there or refuse."""

import asyncio
import errno
import os
import socket
import ssl
import sys
from contextlib import asynccontextmanager
from typing import Any

import pytest

import d2f_stream
from d2f_stream.api import connect
from d2f_stream.channels import ChannelClosed
from d2f_stream.channels.unreachable import reason_of
from d2f_stream.channels.websocket import check_url, open_websocket
from d2f_stream.core.errors import (
    ConnectionLost,
    InvalidRequest,
    MissingExtra,
    ProtocolError,
    Unauthorized,
)
from d2f_stream.server.limits import ServeLimits
from fakes import ANSWER
from serving import ALICE, TWO_CLIENTS, serving, url_of

# Addresses.


@pytest.mark.parametrize(
    ("url", "checked"),
    [
        ("ws://host:8000", "ws://host:8000/v1/stream"),
        ("wss://host/", "wss://host/v1/stream"),
        ("ws://[::1]:8000/d2f/v1/stream?zone=a", "ws://[::1]:8000/d2f/v1/stream?zone=a"),
    ],
)
def test_address_gets_the_path_of_a_server(url: str, checked: str) -> None:
    assert check_url(url) == checked


@pytest.mark.parametrize(
    "url",
    ["ws://user:s3cret@host", "ws://s3cret@host", "wss://host/v1/stream?token=s3cret",
     "wss://host?a=b&Access_Token=s3cret"],
)  # fmt: skip
def test_address_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(InvalidRequest, match="token=") as caught:
        connect(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["ws://", "ws://host:port", "http://", "ws://host#here", "a://b"])
def test_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        connect(url)


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("http://host:8000", "ws://host:8000/v1/stream"),
        ("https://host/", "wss://host/v1/stream"),
        ("https://host/behind/a/proxy", "wss://host/behind/a/proxy"),
        ("ws://host", "ws://host/v1/stream"),
    ],
)
def test_address_of_a_server_means_its_websocket(url: str, meant: str) -> None:
    assert check_url(url) == meant


async def test_server_on_this_machine_is_reached_past_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with serving() as server, connect(url_of(server)) as engine:
        assert (await engine.generate("hi").result()).text == ANSWER


async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        port = taken.getsockname()[1]
        with pytest.raises(
            ConnectionLost, match=f"127.0.0.1:{port} cannot be reached: nothing listens"
        ):
            async with connect(f"ws://127.0.0.1:{port}"):
                pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (socket.gaierror(-2, "Name or service not known"), "no host of that name is known"),
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1)"), "nothing listens"),
        (OSError(f"Multiple exceptions: [Errno {errno.ECONNREFUSED}] ..."), "nothing listens"),
        (OSError(errno.EHOSTUNREACH, "Connect call failed"), os.strerror(errno.EHOSTUNREACH)),
        (ssl.SSLError(1, "certificate verify failed"), "certificate verify failed"),
        (EOFError(), "EOFError"),
    ],
)
def test_why_nothing_answers_is_told_in_words(error: Exception, told: str) -> None:
    assert told in reason_of(error)
    assert "Connect call" not in reason_of(error)


async def test_load_passes_the_token_on() -> None:
    async with serving(auth=TWO_CLIENTS, limits=ServeLimits(auth_timeout_s=0)) as server:
        async with d2f_stream.load(url_of(server), token=ALICE) as engine:
            assert (await engine.generate("hi").result()).text == ANSWER
        with pytest.raises(Unauthorized, match="none was given"):
            async with d2f_stream.load(url_of(server)):
                pass


async def test_another_path_is_refused() -> None:
    async with serving() as server:
        with pytest.raises(Unauthorized, match=r"path.*HTTP 403"):
            await open_websocket(url_of(server) + "/nowhere")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, Unauthorized), (403, Unauthorized), (503, ChannelClosed), (404, ProtocolError)],
)
async def test_refused_handshake(status: int, kind: type[Exception]) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()
        await writer.wait_closed()

    async with _listening(refuse) as port:
        with pytest.raises(kind):
            await open_websocket(f"ws://127.0.0.1:{port}/")


async def test_listener_that_hangs_up_is_not_reached() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        await writer.wait_closed()

    async with _listening(hang_up) as port:
        with pytest.raises(ConnectionLost):
            await open_websocket(f"ws://127.0.0.1:{port}/")


async def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "websockets.asyncio.client", None)
    with pytest.raises(MissingExtra, match=r"websockets.*d2f-stream\[client\]"):
        async with connect("ws://127.0.0.1:1"):
            pass


@asynccontextmanager
async def _listening(serve: Any) -> Any:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def _end_shared(url: str) -> None:
    from d2f_stream.client.shared import _shared

    engine = _shared[asyncio.get_running_loop()][url]
    engine.shut()
