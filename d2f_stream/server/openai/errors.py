"""Errors in OpenAI's envelope: which status, type and code an error of ours becomes. Pure.

`code` is that of the error class, so that a program can compare it whatever the transport. Two have
the names that OpenAI's clients know and act on: a missing or wrong token is `invalid_api_key`, and
a prompt that is too long `context_length_exceeded`. Sentences use the request's own names.
"""

import math
import re
from typing import Final

import msgspec

from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    EngineClosed,
    EngineFailed,
    InvalidParams,
    InvalidPrompt,
    InvalidRequest,
    LimitExceeded,
    LogUnavailable,
    MessageTooLarge,
    ModelNotFound,
    OutOfCapacity,
    PromptTooLong,
    ServerShuttingDown,
    Unauthorized,
    WorkerLost,
)
from d2f_stream.core.printable import printable
from d2f_stream.server.http.login import LastFailedLogin
from d2f_stream.server.openai.fields import UnsupportedParameter
from d2f_stream.server.openai.requests import AnswerRequest
from d2f_stream.server.openai.shapes import ErrorBody, ErrorReport

__all__ = [
    "MalformedBody",
    "UnsupportedMediaType",
    "error_body",
    "error_headers",
    "status_of",
]


class UnsupportedMediaType(InvalidRequest):
    """The body does not claim to be JSON."""

    code = "unsupported_media_type"


class MalformedBody(InvalidRequest):
    """The body cannot be read, or a field of it has another type; `param` names the field."""

    def __init__(self, problem: str) -> None:
        path = re.search(r" - at `\$\.?([^`]*)`", problem)
        self.param = path[1] if path and path[1] else None
        super().__init__(f"the request cannot be read: {problem}")


CONTEXT_LENGTH: Final = "context_length_exceeded"
STATUS: Final[dict[type[D2FError], int]] = {
    InvalidRequest: 400,
    Unauthorized: 401,
    ModelNotFound: 404,
    MessageTooLarge: 413,
    UnsupportedMediaType: 415,
    LimitExceeded: 429,
    ConnectionLost: 503,
    EngineClosed: 503,
    EngineFailed: 503,
    OutOfCapacity: 503,
    ServerShuttingDown: 503,
    LogUnavailable: 503,
    WorkerLost: 503,
    D2FError: 500,
}


def status_of(error: D2FError) -> int:
    """Return the HTTP status of an error: that of the nearest class with one."""
    if _is_too_long(error):
        return 400
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_body(error: D2FError, request: AnswerRequest | None = None) -> ErrorBody:
    """Return the envelope of an error.

    Args:
        error: what is wrong.
        request: what it was raised for, to say where in it.
    """
    status = status_of(error)
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    code = "invalid_api_key" if isinstance(error, Unauthorized) else error.code
    return ErrorBody(
        error=ErrorReport(
            message=_message_of(error, request),
            type="server_error" if status >= 500 else kinds.get(status, "invalid_request_error"),
            param=_param_of(error, request),
            code=CONTEXT_LENGTH if _is_too_long(error) else code,
        )
    )


def error_headers(error: D2FError) -> dict[str, str]:
    """Return the headers that go with an error's status."""
    match status_of(error):
        case 401:
            closing = {"Connection": "close"} if isinstance(error, LastFailedLogin) else {}
            return {"WWW-Authenticate": "Bearer", **closing}
        case 429:
            wait_s = error.retry_after_s if isinstance(error, LimitExceeded) else None
            return {"Retry-After": str(max(1, math.ceil(wait_s or 1)))}
    return {}


def _is_too_long(error: D2FError) -> bool:
    """Whether the prompt is, which clients mend by asking again with less of the conversation."""
    if isinstance(error, MessageTooLarge):
        return error.concerns == "prompt"
    return error.code == PromptTooLong.code  # a remote engine's error has the code only


def _message_of(error: D2FError, request: AnswerRequest | None) -> str:
    if isinstance(error, PromptTooLong):
        what = "messages" if request is None else request.prompt_param
        number = "at least " * error.at_least + str(error.num_prompt_tokens)
        return (
            f"This model's maximum context length is {error.max_len} tokens. However, your "
            f"{what} resulted in {number} tokens. Please reduce the length of "
            f"the {what}."
        )
    if _is_too_long(error):
        return f"The maximum context length is exceeded: {error}"
    if request is None:
        return str(error)
    if isinstance(error, InvalidParams):
        value = printable(msgspec.json.encode(error.value, enc_hook=str).decode(), 100)
        return f"{request.param_of(error.name)} is {value} but must be {error.allowed}"
    return re.sub(r"\bmax_new_tokens\b", request.max_tokens_param, str(error))


def _param_of(error: D2FError, request: AnswerRequest | None) -> str | None:
    match error:
        case UnsupportedParameter() | MalformedBody():
            return error.param
        case ModelNotFound():
            return "model"
        case InvalidParams() if request is not None:
            return request.param_of(error.name)
        case _ if request is not None and (isinstance(error, InvalidPrompt) or _is_too_long(error)):
            return request.prompt_param
    return None
