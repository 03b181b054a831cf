"""Ollama's routes: chat, generate, and what its clients ask first. Answers are NDJSON.

    POST /api/chat   POST /api/generate   POST /api/show
    GET /api/tags    GET /api/ps          GET /api/version

A stream of this API lives as long as its connection. Errors are {"error": sentence}.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from typing import Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from d2f_stream import __version__
from d2f_stream.core.errors import D2FError, InvalidRequest, ModelNotFound, NoChatTemplate
from d2f_stream.core.events import Block, Event, StreamFinished
from d2f_stream.core.printable import printable
from d2f_stream.server.auth import Auth, asker_of
from d2f_stream.server.http.login import client_of
from d2f_stream.server.http.middleware import request_id_of
from d2f_stream.server.http.sse import EventStream, unless_disconnected
from d2f_stream.server.logins import FailedLogins
from d2f_stream.server.ollama.answers import AnswerWriter, timestamp
from d2f_stream.server.ollama.requests import ChatBody, GenerateBody, ShowBody, decode
from d2f_stream.server.openai.errors import error_headers, status_of
from d2f_stream.server.openai.reader import AnswerReader
from d2f_stream.server.openai.routes import MODEL_ALIAS, HttpObserver
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.wire.codec import UNREADABLE, problem_of
from d2f_stream.wire.protocol import Generate, WirePrompt

__all__ = ["ollama_routes"]

logger = logging.getLogger("d2f_stream.server")

LARGE_BYTES: Final = 16 * 1024
CLIENT_LEFT: Final = 499
NDJSON: Final = "application/x-ndjson"


def ollama_routes(
    registry: StreamRegistry,
    auth: Auth,
    *,
    logins: FailedLogins | None = None,
    observer: HttpObserver | None = None,
) -> list[Route]:
    """Return the routes; the arguments are those of `openai_routes`."""
    api = _Api(registry, auth, logins or FailedLogins(), observer)
    return [
        Route("/api/chat", api.chat, methods=["POST"]),
        Route("/api/generate", api.generate, methods=["POST"]),
        Route("/api/show", api.show, methods=["POST"]),
        Route("/api/tags", api.tags, methods=["GET"]),
        Route("/api/ps", api.tags, methods=["GET"]),
        Route("/api/version", api.version, methods=["GET"]),
    ]


class _Api:
    def __init__(
        self,
        registry: StreamRegistry,
        auth: Auth,
        logins: FailedLogins,
        observer: HttpObserver | None,
    ) -> None:
        self._registry = registry
        self._auth = auth
        self._logins = logins
        self._observer = observer
        self._started = timestamp()
        self._reading_large = asyncio.Lock()

    async def chat(self, request: Request) -> Response:
        """POST /api/chat."""
        return await self._answer(request, ChatBody)

    async def generate(self, request: Request) -> Response:
        """POST /api/generate."""
        return await self._answer(request, GenerateBody)

    async def version(self, request: Request) -> Response:
        """GET /api/version; open, as clients look for a server with it."""
        del request
        return JSONResponse({"version": __version__})

    async def tags(self, request: Request) -> Response:
        """GET /api/tags and /api/ps: the one model, which is loaded."""
        try:
            await client_of(request, self._auth, self._logins)
        except D2FError as error:
            return self._refuse(error)
        name = self._registry.engine.info.name
        model = {
            "name": name,
            "model": name,
            "modified_at": self._started,
            "size": 0,
            "digest": "",
            "details": self._details(),
        }
        return JSONResponse({"models": [model]})

    async def show(self, request: Request) -> Response:
        """POST /api/show."""
        try:
            await client_of(request, self._auth, self._logins)
            asked = msgspec.json.decode(await request.body() or b"{}", type=ShowBody)
            self._check_model(asked.model or asked.name)
        except D2FError as error:
            return self._refuse(error)
        except UNREADABLE as error:
            return self._refuse(InvalidRequest(printable(error)))
        info = self._registry.engine.info
        facts = {
            "general.architecture": info.family,
            f"{info.family}.context_length": info.max_len,
            f"{info.family}.block_size": info.native_block_size,
        }
        return JSONResponse(
            {
                "modelfile": "",
                "parameters": "",
                "template": "",
                "license": info.license,
                "details": self._details(),
                "model_info": facts,
                "capabilities": ["completion"],
                "modified_at": self._started,
            }
        )

    def _details(self) -> dict[str, object]:
        family = self._registry.engine.info.family
        return {
            "parent_model": "",
            "format": "",
            "family": family,
            "families": [family],
            "parameter_size": "",
            "quantization_level": "",
        }

    def _check_model(self, name: str | None) -> None:
        served = self._registry.engine.info.name
        known = {served, MODEL_ALIAS, f"{served}:latest", f"{MODEL_ALIAS}:latest"}
        if name and name not in known:
            raise ModelNotFound(
                f"model '{printable(name, 100)}' not found; this server has '{served}', also "
                f"called '{MODEL_ALIAS}'"
            )

    # Answers.

    async def _answer(
        self, request: Request, kind: type[ChatBody] | type[GenerateBody]
    ) -> Response:
        try:
            client = await client_of(request, self._auth, self._logins)
            asked = await self._read(request, kind)
            self._check_model(asked.model)
        except D2FError as error:
            return self._refuse(error)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        name = asked.model or self._registry.engine.info.name
        dialect = "chat" if kind is ChatBody else "generate"
        writer = AnswerWriter(
            dialect="chat" if dialect == "chat" else "generate",
            model=name,
            logprobs=bool(asked.logprobs),
        )
        prompt = asked.wire_prompt
        if prompt is None:
            return Response(writer.nothing(), media_type="application/json")
        try:
            try:
                return await self._start(request, asked, prompt, writer, client)
            except NoChatTemplate:
                if not isinstance(asked, GenerateBody) or asked.system:
                    raise
                return await self._start(request, asked, asked.prompt, writer, client)
        except D2FError as error:  # the registry has told its observer
            return _refusal(error)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        except Exception:
            name = request_id_of(request.scope)
            logger.exception("request %s failed", name)
            return self._refuse(D2FError(f"an error inside the server; see {name} in its log"))

    async def _start(
        self,
        request: Request,
        asked: ChatBody | GenerateBody,
        prompt: WirePrompt,
        writer: AnswerWriter,
        client: str,
    ) -> Response:
        generate = Generate(
            request_id=uuid.uuid4().hex,
            prompt=prompt,
            params=asked.overrides(),
            on_disconnect="cancel",
        )
        asker = asker_of(client, request.client and request.client.host)
        stream = await self._registry.generate(generate, client=client, asker=asker, clamp=True)
        reader = AnswerReader(stream, self._registry)
        if not asked.is_streamed:
            try:
                blocks, end = await unless_disconnected(request.receive, reader.read_all())
            finally:
                reader.close()
            return Response(writer.whole(blocks, end), media_type="application/json")
        try:
            # A request that is turned away at once gets a status of its own, not a 200.
            first = await unless_disconnected(request.receive, reader.next())
        except BaseException:
            reader.close()
            raise
        return EventStream(
            _lines(first, reader, writer),
            stall_timeout_s=self._registry.limits.stall_timeout_s,
            on_end=reader.close,
            on_stall=lambda error: (
                None if self._observer is None else self._observer.on_slow_consumer()
            ),
            media_type=NDJSON,
        )

    async def _read(
        self, request: Request, kind: type[ChatBody] | type[GenerateBody]
    ) -> ChatBody | GenerateBody:
        body = await request.body()
        try:
            if len(body) <= LARGE_BYTES:
                return decode(body, kind)
            async with self._reading_large:  # one in each turn of the event loop
                return decode(body, kind)
        except UNREADABLE as error:
            problem = problem_of(error, body)
            raise InvalidRequest(f"the request cannot be read: {problem}") from error

    def _refuse(self, error: D2FError) -> Response:
        if self._observer is not None:
            self._observer.on_refused(error)
        return _refusal(error)


async def _lines(
    event: Event | None, reader: AnswerReader, writer: AnswerWriter
) -> AsyncGenerator[bytes, None]:
    try:
        while not isinstance(event, StreamFinished):
            if isinstance(event, Block) and (line := writer.line(event)):
                yield line
            event = await reader.next()
        yield writer.last(event)
    except D2FError as error:
        yield msgspec.json.encode({"error": str(error)}) + b"\n"


def _refusal(error: D2FError) -> Response:
    return JSONResponse(
        {"error": str(error)}, status_code=status_of(error), headers=error_headers(error)
    )
