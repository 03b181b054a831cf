"""Errors in OpenAI's envelope: which status, type and code an error of ours becomes. Pure.

`code` is that of the error class, so that a program can compare it whatever the transport; only a
missing or wrong token is called `invalid_api_key`, which OpenAI's clients know.
"""

import math
import re
from typing import Final

from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    EngineClosed,
    EngineFailed,
    InvalidParams,
    InvalidPrompt,
    InvalidRequest,
    LimitExceeded,
    MessageTooLarge,
    ModelNotFound,
    OutOfCapacity,
    PromptTooLong,
    ServerShuttingDown,
    Unauthorized,
    WorkerLost,
)
from d2f_stream.server.http.login import LastFailedLogin
from d2f_stream.server.openai.requests import AnswerRequest, UnsupportedParameter
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
    WorkerLost: 503,
    D2FError: 500,
}


def status_of(error: D2FError) -> int:
    """Return the HTTP status of an error: that of the nearest class with one."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_body(error: D2FError, request: AnswerRequest | None = None) -> ErrorBody:
    """Return the envelope of an error.

    Args:
        error: what is wrong.
        request: what it was raised for, to say where in it.
    """
    status = status_of(error)
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    return ErrorBody(
        error=ErrorReport(
            message=str(error),
            type="server_error" if status >= 500 else kinds.get(status, "invalid_request_error"),
            param=_param_of(error, request),
            code="invalid_api_key" if type(error) is Unauthorized else error.code,
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


def _param_of(error: D2FError, request: AnswerRequest | None) -> str | None:
    match error:
        case UnsupportedParameter() | MalformedBody():
            return error.param
        case ModelNotFound():
            return "model"
        case InvalidParams() if request is not None:
            return request.param_of(error.name)
        case InvalidPrompt() | PromptTooLong() if request is not None:
            return request.prompt_param
    return None
