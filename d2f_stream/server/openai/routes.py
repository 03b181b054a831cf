"""The OpenAI-style routes: chat completions, completions, models. Any OpenAI client can talk here.

    POST /v1/chat/completions   POST /v1/completions   POST /v1/responses
    GET /v1/models   GET /v1/models/{id}

Requests go through the registry like all others. A stream of this API lives as long as its
connection: there is no resuming here, so a client that leaves frees its slot within a step; who
wants to resume uses /v1/stream. Origins and the size of bodies are the middleware's concern.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Final, Protocol

import msgspec
from msgspec import Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from d2f_stream.core.errors import D2FError, ModelNotFound, SlowConsumer
from d2f_stream.core.events import Event
from d2f_stream.server.auth import Auth, asker_of
from d2f_stream.server.http.login import client_of
from d2f_stream.server.http.middleware import request_id_of
from d2f_stream.server.http.sse import COMMENT, EventStream, unless_disconnected
from d2f_stream.server.logins import FailedLogins
from d2f_stream.server.openai.chunks import AnswerWriter
from d2f_stream.server.openai.errors import (
    MalformedBody,
    UnsupportedMediaType,
    error_body,
    error_headers,
    status_of,
)
from d2f_stream.server.openai.reader import AnswersReader, start_choices
from d2f_stream.server.openai.requests import AnswerRequest, ChatRequest, CompletionRequest
from d2f_stream.server.openai.response_writer import ResponseWriter
from d2f_stream.server.openai.responses import ResponsesRequest
from d2f_stream.server.openai.shapes import Model, ModelList
from d2f_stream.server.peer_log import PeerLog
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.wire.codec import UNREADABLE, problem_of
from d2f_stream.wire.protocol import WirePrompt

__all__ = ["HttpObserver", "openai_routes"]

logger = logging.getLogger("d2f_stream.server")
log = PeerLog(logger)

KEEP_ALIVE_S: Final = 15.0
LARGE_BYTES: Final = 16 * 1024
CLIENT_LEFT: Final = 499
"""nginx's status for it; nobody sees it."""
MODEL_ALIAS: Final = "d2f"
"""A name that every server's model has, for clients that must send one."""


class HttpObserver(Protocol):
    """Is told what the registry does not see; for metrics. Must not wait."""

    def on_refused(self, error: D2FError) -> None:
        """A request was refused before it came to the registry."""
        ...

    def on_slow_consumer(self) -> None:
        """A client did not read its answer and lost its connection."""
        ...


def openai_routes(
    registry: StreamRegistry,
    auth: Auth,
    *,
    logins: FailedLogins | None = None,
    observer: HttpObserver | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> list[Route]:
    """Return the routes.

    Args:
        registry: starts the streams.
        auth: who may ask.
        logins: counts wrong tokens; None makes its own.
        observer: is told of what was refused here.
        keep_alive_s: after so long without an event a comment is sent, seconds.
    """
    api = _Api(registry, auth, logins or FailedLogins(), observer, keep_alive_s)
    return [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
        Route("/v1/responses", api.respond, methods=["POST"]),
        Route("/v1/models", api.list_models, methods=["GET"]),
        Route("/v1/models/{id:path}", api.show_model, methods=["GET"]),
    ]


class _Api:
    def __init__(
        self,
        registry: StreamRegistry,
        auth: Auth,
        logins: FailedLogins,
        observer: HttpObserver | None,
        keep_alive_s: float,
    ) -> None:
        self._registry = registry
        self._auth = auth
        self._logins = logins
        self._observer = observer
        self._keep_alive_s = keep_alive_s
        self._created = int(time.time())
        self._reading_large = asyncio.Lock()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, ChatRequest)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, CompletionRequest)

    async def respond(self, request: Request) -> Response:
        """POST /v1/responses."""
        return await self._answer(request, ResponsesRequest)

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models: the one that is loaded."""
        try:
            await client_of(request, self._auth, self._logins)
            return _json(ModelList(data=[self._model()]))
        except D2FError as error:
            return self._refuse(error)

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        try:
            await client_of(request, self._auth, self._logins)
            self._check_model(request.path_params["id"])
            return _json(self._model())
        except D2FError as error:
            return self._refuse(error)

    def _model(self) -> Model:
        card = self._registry.card
        return Model(id=card.name, created=self._created, owned_by="d2f_stream", d2f=card)

    def _check_model(self, name: str | None) -> None:
        served = self._registry.engine.info.name
        if name and name not in (served, MODEL_ALIAS):
            raise ModelNotFound(
                f"there is no model {name[:100]!r} here; this server has {served!r}, "
                f"also called {MODEL_ALIAS!r}"
            )

    # Answers.

    async def _answer(self, request: Request, kind: type[AnswerRequest]) -> Response:
        try:
            client = await client_of(request, self._auth, self._logins)
            asked = await self._read(request, kind)
            self._check_model(asked.model)
            asked.check_values()
            prompt = asked.wire_prompt
        except D2FError as error:
            return self._refuse(error)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        try:
            return await self._start(request, asked, prompt, client)
        except D2FError as error:  # the registry has told its observer
            return _refusal(error, asked)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        except Exception:
            name = request_id_of(request.scope)
            logger.exception("request %s failed", name)
            return self._refuse(D2FError(f"an error inside the server; see {name} in its log"))

    async def _start(
        self, request: Request, asked: AnswerRequest, prompt: WirePrompt, client: str
    ) -> Response:
        name = uuid.uuid4().hex
        asker = asker_of(client, request.client and request.client.host)
        streams = await start_choices(
            self._registry, asked, prompt, name, client=client, asker=asker
        )
        reader = AnswersReader(streams, self._registry)
        writer = self._writer(asked, name)
        if asked.stream:
            return await self._stream(request, reader, writer)
        try:
            answers = await unless_disconnected(request.receive, reader.read_all())
        finally:
            reader.close()
        return Response(writer.whole(answers), media_type="application/json")

    def _writer(self, asked: AnswerRequest, name: str) -> AnswerWriter | ResponseWriter:
        created, model = int(time.time()), self._registry.engine.info.name
        if isinstance(asked, ResponsesRequest):
            return ResponseWriter(name=name, created=created, model=model, request=asked)
        return AnswerWriter(
            dialect="chat" if isinstance(asked, ChatRequest) else "text",
            name=name,
            created=created,
            model=model,
            diffusing=bool(asked.diffusing),
            include_usage=asked.include_usage,
            logprobs=asked.wants_logprobs,
            num_choices=asked.num_choices,
        )

    async def _stream(
        self, request: Request, reader: AnswersReader, writer: AnswerWriter | ResponseWriter
    ) -> Response:
        try:
            # A request that is turned away at once gets a status of its own, not a 200.
            first = await unless_disconnected(request.receive, reader.next(self._keep_alive_s))
        except BaseException:
            reader.close()
            raise
        return EventStream(
            self._frames(first, reader, writer),
            stall_timeout_s=self._registry.limits.stall_timeout_s,
            on_end=reader.close,
            on_stall=self._note_stalled,
        )

    async def _frames(
        self,
        came: tuple[int, Event] | None,
        reader: AnswersReader,
        writer: AnswerWriter | ResponseWriter,
    ) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                if came is None:
                    yield COMMENT
                elif frames := writer.frames(came[1], came[0]):
                    yield frames
                if reader.ended:
                    break
                came = await reader.next(self._keep_alive_s)
        except D2FError as error:
            yield writer.failure(error_body(error))

    async def _read(self, request: Request, kind: type[AnswerRequest]) -> AnswerRequest:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Also what keeps foreign pages out: a browser sends JSON elsewhere only once it may.
        if content_type != "application/json" and not content_type.endswith("+json"):
            raise UnsupportedMediaType(
                f"the Content-Type is {content_type[:100]!r} but must be application/json"
            )
        body = await request.body()
        if len(body) <= LARGE_BYTES:
            return _decode(body, kind)
        async with self._reading_large:  # one in each turn of the event loop
            return _decode(body, kind)

    # Refusals.

    def _refuse(self, error: D2FError) -> Response:
        if self._observer is not None:
            self._observer.on_refused(error)
        return _refusal(error)

    def _note_stalled(self, error: SlowConsumer) -> None:
        log.info("closing a connection: %s", error)
        if self._observer is not None:
            self._observer.on_slow_consumer()


def _decode(body: bytes, kind: type[AnswerRequest]) -> AnswerRequest:
    if not body:
        raise MalformedBody("it has no body")
    try:
        values = msgspec.json.decode(body)
        if isinstance(values, dict):
            values = kind.renamed(values)
            kind.check(values)
        return msgspec.convert(values, kind)
    except UNREADABLE as error:
        raise MalformedBody(problem_of(error, body)) from error


def _json(body: Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


def _refusal(error: D2FError, asked: AnswerRequest | None = None) -> Response:
    return Response(
        msgspec.json.encode(error_body(error, asked)),
        status_code=status_of(error),
        headers=error_headers(error),
        media_type="application/json",
    )
