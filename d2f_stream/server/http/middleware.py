"""ASGI middleware in front of every route: who may call, how much they may send, what is told.

Plain ASGI, so that it holds for whatever answers behind it. Says no in the shape of the OpenAI API,
`{"error": {...}}`, since its clients are the ones that send bodies.
"""

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any, Final
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from d2f_stream.core.printable import printable
from d2f_stream.server.auth import Auth

__all__ = [
    "AccessLog",
    "BodyLimit",
    "OriginGuard",
    "PlainPaths",
    "RequestIds",
    "SecurityHeaders",
    "error_response",
    "request_id_of",
]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

access = logging.getLogger("d2f_stream.access")

ABSOLUTE: Final = re.compile("^https?://[^/]*/?")
SLASHES: Final = re.compile("//+")
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
HOST: Final = re.compile(r"[A-Za-z0-9.\-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?")
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; manifest-src 'self'; connect-src 'self'{sockets}; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def error_response(
    status: int,
    code: str,
    message: str,
    *,
    kind: str = "invalid_request_error",
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error in the shape that clients of the OpenAI API read."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def request_id_of(scope: Mapping[str, Any]) -> str:
    """Return the name of a request, which its answer and the log show; "-" where it has none."""
    return str(scope.get("d2f.request_id", "-"))


class RequestIds:
    """Names each request, by its header x-request-id where that can be shown, and says so.

    Of a client's own name nothing depends: two requests may have the same.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request or a websocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"

        async def named_send(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        await self._app({**scope, "d2f.request_id": name}, receive, named_send)


class AccessLog:
    """Writes a line for each request and each websocket, once it is over."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request or a websocket."""
        began_s = time.monotonic()
        status = "-"

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = str(message["status"])
            elif message["type"] == "websocket.accept":
                status = "101"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            host = (scope.get("client") or ("-",))[0]
            method = scope.get("method", "WEBSOCKET")
            path = printable(
                scope.get("path", ""), 200
            )  # without the query, which may hold secrets
            took_s = time.monotonic() - began_s
            name = request_id_of(scope)
            access.info("%s %s %s %s %.3f s %s", host, method, path, status, took_s, name)


class BodyLimit:
    """Refuses a request whose body is larger than `max_bytes`, however it is sent, with a 413."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answered = False

        async def counted_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            length = Headers(scope=scope).get("content-length", "0")
            if int(length) > self._max_bytes:
                raise _BodyTooLarge
            await self._app(scope, self._counted(receive), counted_send)
        except _BodyTooLarge:
            if answered:
                raise
            await self._refuse(scope, receive, send)

    def _counted(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise _BodyTooLarge
            return message

        return counted

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        sentence = f"the body is larger than this server allows, {self._max_bytes} bytes"
        # Not with "Connection: close": to close while the body still comes resets the connection,
        # which would take the answer with it. The rest is read, and dropped, for a limited time.
        await error_response(413, "message_too_large", sentence)(scope, receive, send)


class _BodyTooLarge(Exception):
    pass


class OriginGuard:
    """Refuses pages of foreign origins, and names that a foreign page gave this machine.

    Args:
        app: what answers the others.
        auth: the origins that may connect.
        hosts: the names under which the server may be reached; None takes every name. Without it,
            a page whose own domain name is made to point here would count as of the same origin.
    """

    def __init__(self, app: App, auth: Auth, hosts: Collection[str] | None = None) -> None:
        self._app = app
        self._auth = auth
        own = {urlsplit(origin).hostname or "" for origin in auth.origins}
        self._hosts = None if hosts is None or "*" in auth.origins else {*hosts, *own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request or a websocket handshake."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(headers.get("host", ""), headers.get("origin"))
        if refusal is None:
            await self._app(scope, receive, send)
            return
        response = error_response(403, "origin_refused", refusal, kind="permission_error")
        await response(scope, receive, send)

    def _refusal(self, host: str, origin: str | None) -> str | None:
        try:
            name = urlsplit(f"//{host}").hostname
            if self._hosts is not None and name not in self._hosts:
                return f"this server is not known as {name!r:.100}; allow it with --allowed-host"
            if not self._auth.allows_origin(origin, host):
                return f"pages of {origin!r:.100} may not connect; start the server with --origin"
        except ValueError:  # of urlsplit
            return "the host or the origin cannot be read"
        return None


class PlainPaths:
    """Reads an address as clients mean it: without doubled slashes, and without one at the end.

    They come from base URLs that end in a slash, or that leave one out. Some proxies send the whole
    address (RFC 9112, 3.2.2).
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request or a websocket handshake."""
        path = scope.get("path", "")
        plain = SLASHES.sub("/", ABSOLUTE.sub("/", path)).rstrip("/") or "/"
        if plain != path:
            scope = {**scope, "path": plain, "raw_path": quote(plain).encode()}
        await self._app(scope, receive, send)


class SecurityHeaders:
    """Tells browsers to load nothing from elsewhere, and to guess nothing."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = Headers(scope=scope).get("host", "")
        # 'self' does not cover websockets in every browser. A host of other characters could
        # smuggle in directives.
        sockets = f" ws://{host} wss://{host}" if HOST.fullmatch(host) else ""

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", POLICY.format(sockets=sockets))
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Referrer-Policy", "no-referrer")
            await send(message)

        await self._app(scope, receive, send_headers)
