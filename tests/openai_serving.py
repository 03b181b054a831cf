"""The OpenAI routes for tests: over an engine in this process, without sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
from starlette.applications import Starlette

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.session import Engine
from d2f_stream.server.auth import Auth
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.metrics import Metrics
from d2f_stream.server.openai.routes import openai_routes
from d2f_stream.server.streams.registry import StreamRegistry
from fakes import engine_over

TOKEN = "a-token-of-32-characters-at-least"


@dataclass(frozen=True)
class Serving:
    """A server's insides, and clients for it."""

    app: Starlette
    registry: StreamRegistry
    metrics: Metrics

    def http(self) -> httpx2.AsyncClient:
        """A client whose responses come whole, at their end."""
        transport = httpx2.ASGITransport(app=self.app)
        return httpx2.AsyncClient(transport=transport, base_url="http://test")

    def openai(self, token: str = TOKEN) -> openai.AsyncOpenAI:
        """The official client, over the same transport."""
        return openai.AsyncOpenAI(
            api_key=token, base_url="http://test/v1", http_client=self.http(), max_retries=0
        )


@asynccontextmanager
async def serving(
    backend: ScriptedBackend,
    *,
    auth: Auth | None = None,
    limits: ServeLimits | None = None,
    keep_alive_s: float = 60.0,
) -> AsyncIterator[Serving]:
    """Serve a scripted model; at the end nothing may be left of it."""
    async with engine_over(backend) as engine:
        async with serving_engine(
            engine, auth=auth, limits=limits, keep_alive_s=keep_alive_s
        ) as served:
            yield served
        if backend.gate is not None:
            backend.gate.open()


@asynccontextmanager
async def serving_engine(
    engine: Engine,
    *,
    auth: Auth | None = None,
    limits: ServeLimits | None = None,
    keep_alive_s: float = 60.0,
) -> AsyncIterator[Serving]:
    """Serve an open engine."""
    metrics = Metrics()
    metrics.watch(engine)
    registry = StreamRegistry(engine, limits=limits, observer=metrics)
    routes = openai_routes(registry, auth or Auth(), observer=metrics, keep_alive_s=keep_alive_s)
    try:
        yield Serving(Starlette(routes=[*routes, metrics.route()]), registry, metrics)
    finally:
        await registry.shut_down(0.0)


class Exchange:
    """One HTTP request in the hands of a test, which reads the response as it comes.

    Args:
        app: what answers.
        path: of the POST.
        body: sent as JSON.
        room: body messages that the client takes before it reads; sends wait beyond that.
    """

    def __init__(self, app: Starlette, path: str, body: Any, *, room: int = 1000) -> None:
        self._body: bytes | None = json.dumps(body).encode()
        self._left = asyncio.Event()
        self._responses: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue(room)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"test")],
        }
        self.task = asyncio.create_task(
            app(scope, self._receive, self._responses.put), name="exchange"
        )

    async def start(self) -> MutableMapping[str, Any]:
        """Return the response's start."""
        return await self._responses.get()

    async def frame(self) -> str:
        """Return the next part of the body."""
        return str((await self._responses.get())["body"], "utf-8")

    async def leave(self) -> None:
        """Disconnect, and wait until the server is done with it."""
        self._left.set()
        await self.task

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._body is None:
            await self._left.wait()
            return {"type": "http.disconnect"}
        message, self._body = {"type": "http.request", "body": self._body}, None
        return message


def chat(content: str = "hi", **fields: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"model": "d2f", "messages": [{"role": "user", "content": content}], **fields}


MESSAGES: Any = [{"role": "user", "content": "hi"}]
