"""A real server in the test's own event loop, and a peer for it that is not our own client."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import fakes
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_runtime.engine.local import Limits
from d2f_stream.core.events import Block, Event, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.server.auth import Auth
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.serve import Server
from d2f_stream.server.settings import ServeSettings
from d2f_stream.wire.codec import JSON, Codec
from d2f_stream.wire.protocol import (
    Cancel,
    Generate,
    Operation,
    Overrides,
    Resume,
    ServerMessage,
)
from peers import Expecting

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
TWO_CLIENTS = Auth({"alice": ALICE, "bob": BOB})

_numbers = itertools.count()


@asynccontextmanager
async def serving(
    backend: ScriptedBackend | None = None,
    *,
    limits: ServeLimits | None = None,
    engine_limits: Limits | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    """A server over a scripted model; at the end nothing may be left of it."""
    backend = backend or ScriptedBackend(fakes.ANSWER)
    before = asyncio.all_tasks()
    async with fakes.engine_over(backend, limits=engine_limits) as engine:
        chosen = ServeSettings(port=0, limits=limits or ServeLimits(), **settings)
        async with Server(engine, chosen) as server:
            try:
                yield server
            finally:
                if backend.gate is not None:
                    backend.gate.open()
        assert server.gateway.num_connections == 0
        assert server.registry.num_active == 0
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, left


@contextlib.contextmanager
def running_server(**settings: Any) -> Iterator[tuple[asyncio.Runner, Server]]:
    """A server between the runs of a runner, for properties that check it many times."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        server = runner.run(stack.enter_async_context(serving(**settings)))
        try:
            yield runner, server
        finally:
            runner.run(stack.aclose())


def request(prompt: str = "hi", **fields: Any) -> Generate:
    """A request under a name of its own; `params` may be a plain dict."""
    params = fields.pop("params", {})
    name = fields.pop("request_id", f"request-{next(_numbers):012}")
    return Generate(request_id=name, prompt=prompt, params=Overrides(**params), **fields)


@dataclass(frozen=True)
class Address:
    """Of a server in another process or task; as much of one as a peer needs."""

    port: int


class Peer(Expecting):
    """One websocket connection, through the `websockets` library."""

    def __init__(self, socket: ClientConnection, codec: Codec) -> None:
        self.socket = socket
        self.codec = codec

    @classmethod
    @asynccontextmanager
    async def to(
        cls,
        server: Server | Address,
        *,
        codec: Codec = JSON,
        token: str | None = None,
        subprotocols: list[str] | None = None,
        query: str = "",
        **options: Any,
    ) -> AsyncIterator[Self]:
        """Connect; the server's hello is still to be received."""
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        names = [codec.subprotocol] if subprotocols is None else subprotocols
        async with connect(
            f"ws://127.0.0.1:{server.port}/v1/stream{query}",
            subprotocols=[websockets.Subprotocol(name) for name in names] or None,
            additional_headers=headers,
            compression=None,
            proxy=None,
            **options,
        ) as socket:
            yield cls(socket, codec)

    async def send(self, *operations: Operation) -> None:
        for operation in operations:
            await self.socket.send(self.codec.encode(operation), text=self.codec.is_text)

    async def receive(self) -> ServerMessage:
        data = await self.socket.recv()
        assert isinstance(data, str) is self.codec.is_text
        message = self.codec.decode_message(data)
        assert message is not None
        return message

    async def events(self, *, num_streams: int = 1) -> dict[str, list[Event]]:
        """Receive until so many streams have ended; return the events of each by its id."""
        logs: dict[str, list[Event]] = {}
        while num_streams:
            message = await self.receive()
            assert isinstance(message, StreamStarted | Block | StreamFinished | StreamFailed), (
                message
            )
            logs.setdefault(message.stream, []).append(message)
            num_streams -= isinstance(message, StreamFinished | StreamFailed)
        return logs

    async def answer(self) -> list[Event]:
        """Receive the whole of the one stream that runs."""
        (log,) = (await self.events()).values()
        return log

    async def generate(self, **fields: Any) -> StreamStarted:
        await self.send(request(**fields))
        return await self.started()

    async def resume(self, stream: str, *, after_seq: int = -1) -> None:
        await self.send(Resume(stream=stream, after_seq=after_seq))

    async def cancel(self, stream: str) -> None:
        await self.send(Cancel(stream=stream))

    async def closed(self) -> tuple[int, str]:
        """Receive until the connection is closed; return code and reason."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self.socket.recv()
        code, reason = self.socket.close_code, self.socket.close_reason
        assert code is not None
        return code, reason or ""


def check_whole(log: list[Event], answer: str = fakes.ANSWER, *, after_seq: int = -1) -> None:
    """Check that nothing is missing, doubled or out of order, and that the text is right."""
    assert [event.seq for event in log if hasattr(event, "seq")] == list(
        range(after_seq + 1, after_seq + 1 + len(log))
    )
    assert isinstance(log[-1], StreamFinished), log[-1]
    assert log[-1].text_length == len(answer)
    text = text_of(log)
    assert text == answer if after_seq < 1 else answer.endswith(text)


def text_of(log: list[Event]) -> str:
    return "".join(event.text for event in log if isinstance(event, Block))


@asynccontextmanager
async def small_socket(server: Server) -> AsyncIterator[socket.socket]:
    """A connected socket that holds little for whoever does not read it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        yield sock


def handshake(port: int) -> bytes:
    """The request that opens a websocket, for tests that write their own bytes after it."""
    return (
        f"GET /v1/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    ).encode()


def url_of(server: Server) -> str:
    """Return the address that clients connect to."""
    return f"ws://127.0.0.1:{server.port}"
