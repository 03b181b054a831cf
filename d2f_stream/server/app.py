"""The ASGI application of a server: every route on one port.

/v1/stream                                       websocket, the protocol of protocol.py
/v1/chat/completions, /v1/completions, /v1/responses, /v1/models    the OpenAI API
/api/chat, /api/generate, /api/tags, /api/show    the Ollama API
/healthz, /health                                whether it works
/metrics
/                                                the chat page, and the files beside it
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.staticfiles import StaticFiles

from d2f_stream.core.printable import printable
from d2f_stream.server.http.middleware import (
    AccessLog,
    BodyLimit,
    OriginGuard,
    PlainPaths,
    RequestIds,
    SecurityHeaders,
    error_response,
)
from d2f_stream.server.http.websocket import stream_route
from d2f_stream.server.metrics import Metrics
from d2f_stream.server.ollama.routes import ollama_routes
from d2f_stream.server.openai.routes import openai_routes
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.registry import StreamRegistry

__all__ = ["create_app"]

STATIC: Final = Path(__file__).parent / "static"
CONTENT_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".ts": "text/plain; charset=utf-8",  # types for editors; the system may call it video/mp2t
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
}
"""Ours, since a system's own table differs from machine to machine; others are not served."""
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def create_app(
    gateway: Gateway,
    *,
    metrics: Metrics | None = None,
    ui: bool = True,
    hosts: Collection[str] | None = None,
    open_metrics: bool = True,
    stuck_s: float = math.inf,
    access_log: bool = False,
) -> Starlette:
    """Return the application that serves the gateway's streams.

    Args:
        gateway: the streams, and who may read them.
        metrics: what is told at `/metrics`; None has no such route.
        ui: whether to serve the chat page at `/`.
        hosts: names under which the server may be reached; None takes every name.
        stuck_s: how long a step may take before the server calls itself stuck, seconds.
        access_log: whether each request is a line of the log.
        open_metrics: whether `/metrics` needs no token where clients need one.
    """
    registry, auth = gateway.registry, gateway.auth
    routes: list[BaseRoute] = [stream_route(gateway), *_health_routes(registry, stuck_s)]
    routes += openai_routes(registry, auth, logins=gateway.logins, observer=metrics)
    routes += ollama_routes(registry, auth, logins=gateway.logins, observer=metrics)
    if metrics is not None:
        routes.append(metrics.route(None if open_metrics else auth, gateway.logins))
    if ui:
        routes.append(_page_route())
    middleware = [
        Middleware(PlainPaths),
        Middleware(SecurityHeaders),
        Middleware(OriginGuard, auth=auth, hosts=hosts),
        Middleware(BodyLimit, max_bytes=registry.limits.max_message_bytes),
    ]
    if auth.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=auth.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id",),
        )
        middleware.insert(3, cors)
    if access_log:
        middleware.insert(0, Middleware(AccessLog))
    middleware.insert(0, Middleware(RequestIds))
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: _no_route}
    )


async def _no_route(request: Request, error: Exception) -> Response:
    """Say that there is nothing at an address, or not for this method, as the API does."""
    assert isinstance(error, HTTPException)
    method, path = request.method, printable(request.url.path, 100)
    if request.url.path.startswith("/api/"):  # as Ollama's clients read it
        return JSONResponse({"error": f"{method} {path}: not found"}, error.status_code)
    methods = _methods_at(request)
    if methods or error.status_code == 405:
        allowed = ", ".join(sorted(methods or METHODS))
        sentence = f"{path} does not take {method}; it takes {allowed}"
        headers = {"Allow": allowed}
        return error_response(405, "method_not_allowed", sentence, headers=headers)
    sentence = (
        f"there is nothing at {method} {path}; the APIs of this server are below /v1 and /api"
    )
    return error_response(404, "not_found", sentence)


@runtime_checkable
class LocalWork(Protocol):
    """An engine that works in this process, so that it can fail or hang."""

    @property
    def usable(self) -> bool:
        """Whether requests are accepted."""
        ...

    @property
    def busy_s(self) -> float:
        """For how long it has been at work on one step, seconds."""
        ...


def _health_routes(registry: StreamRegistry, stuck_s: float) -> list[Route]:
    async def health(request: Request) -> Response:
        del request
        status, model = _status(registry, stuck_s), registry.engine.info.name
        code = 200 if status == "ok" else 503
        headers = {"Cache-Control": "no-store"}
        return JSONResponse({"status": status, "model": model}, status_code=code, headers=headers)

    return [Route(path, health, methods=["GET"]) for path in ("/healthz", "/health")]


def _status(registry: StreamRegistry, stuck_s: float) -> str:
    engine = registry.engine
    if registry.paused:
        return "reloading"
    if isinstance(engine, LocalWork) and not engine.usable:
        return "engine_failed"
    if isinstance(engine, LocalWork) and engine.busy_s > stuck_s:
        return "stuck"
    return "ok" if registry.admits else "shutting_down"


def _methods_at(request: Request) -> set[str]:
    """Return the methods that an address takes; empty where there is none but the page's."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is Match.PARTIAL:
            found |= route.methods or set()
    return found


def _page_route() -> Route:
    files = StaticFiles(directory=STATIC, html=True)

    async def page(request: Request) -> Response:
        path = request.path_params["path"] or "index.html"
        content_type = CONTENT_TYPES.get(Path(path).suffix)
        is_api = path.partition("/")[0] in ("v1", "api")
        if content_type is None or is_api or request.method not in ("GET", "HEAD"):
            raise HTTPException(404)
        response = await files.get_response(path, request.scope)
        response.headers["Content-Type"] = content_type
        # Asked for each time, answered with 304 while the ETag fits: a page never mixes versions.
        response.headers["Cache-Control"] = "no-cache"
        return response

    # For every method: a POST to an address that is not there is a 404 and not a 405.
    return Route("/{path:path}", page, methods=[*METHODS])
