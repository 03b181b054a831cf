"""The exceptions of d2f_stream: one tree, each with a stable code.

The code is what crosses the wire and what a program compares; the sentence is for people and names
the offending value, the limit and the way out.

    D2FError
    ├── InvalidRequest (ValueError)      the caller can mend it; nothing was started
    │   ├── InvalidParams                a generation parameter is out of range
    │   ├── InvalidPrompt                empty, or not of a supported shape
    │   │   └── NoChatTemplate           messages, to a model that takes one string
    │   ├── RequestConflict              the request id stands for another request already
    │   └── PromptTooLong                prompt plus answer exceed what the model holds
    ├── ModelError                       the model cannot be used
    │   ├── ModelNotFound (FileNotFoundError)
    │   ├── ModelDamaged                 a file is not what it should be, or logits are no numbers
    │   └── UnsupportedModel             a family, backend or option this build does not know
    ├── MissingExtra (ImportError)       an optional dependency is not installed
    ├── OutOfCapacity                    no room for another session's K/V
    ├── EngineClosed                     the engine was closed before or during the request
    ├── EngineFailed                     the backend failed; the engine is unusable
    └── RemoteError                      between a client and its server
        ├── ConnectionLost (ConnectionError)  the server cannot be reached
        ├── StreamLost                   the server does not know the stream (any more)
        ├── WorkerLost                   the worker that ran the stream is gone
        ├── LogUnavailable               the log that servers share cannot be reached, or is full
        ├── Unauthorized (PermissionError)  no token, or a wrong one
        ├── LimitExceeded                a limit of the server; the sentence names it
        │   ├── MessageTooLarge          a message, prompt or answer beyond what is served
        │   ├── RateLimited              too many requests a minute
        │   ├── SlowConsumer             a reader did not read for too long
        │   ├── TooManyConnections       too many connections of one client, or in all
        │   └── TooManyStreams           too many streams of one client, or in all
        ├── ServerShuttingDown           the server takes nothing on any more
        └── ProtocolError                one side sent what the other cannot read
"""

from typing import ClassVar

from d2f_stream.core.printable import shown

__all__ = [
    "ConnectionLost",
    "D2FError",
    "EngineClosed",
    "EngineFailed",
    "InvalidParams",
    "InvalidPrompt",
    "InvalidRequest",
    "LimitExceeded",
    "LogUnavailable",
    "MessageTooLarge",
    "MissingExtra",
    "ModelDamaged",
    "ModelError",
    "ModelNotFound",
    "NoChatTemplate",
    "OutOfCapacity",
    "PromptTooLong",
    "ProtocolError",
    "RateLimited",
    "RemoteError",
    "RequestConflict",
    "ServerShuttingDown",
    "SlowConsumer",
    "StreamLost",
    "TooManyConnections",
    "TooManyStreams",
    "Unauthorized",
    "UnsupportedModel",
    "WorkerLost",
]


class D2FError(Exception):
    """Root of all errors raised by d2f_stream."""

    code: ClassVar[str] = "error"


class InvalidRequest(D2FError, ValueError):
    """The request cannot be served as it is; nothing was started."""

    code = "invalid_request"


class InvalidParams(InvalidRequest):
    """A generation parameter lies outside its range."""

    code = "invalid_params"

    def __init__(self, name: str, value: object, allowed: str) -> None:
        self.name = name
        self.value = value
        self.allowed = allowed
        super().__init__(f"{name} is {shown(value)} but must be {allowed}")


class InvalidPrompt(InvalidRequest):
    """The prompt is empty or not of a supported shape."""

    code = "invalid_prompt"


class NoChatTemplate(InvalidPrompt):
    """Messages were given to a model without a chat template; it takes one string."""

    code = "no_chat_template"


class PromptTooLong(InvalidRequest):
    """Prompt and answer together exceed what the model holds."""

    code = "prompt_too_long"

    def __init__(
        self, num_prompt_tokens: int, max_new_tokens: int, max_len: int, *, at_least: bool = False
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.max_len = max_len
        self.at_least = at_least
        number = f"at least {num_prompt_tokens}" if at_least else f"{num_prompt_tokens}"
        sentence = f"prompt has {number} tokens"
        way_out = "shorten the prompt"
        if num_prompt_tokens < max_len:
            sentence += f" and max_new_tokens is {max_new_tokens}"
            way_out += f" or lower max_new_tokens to {max_len - num_prompt_tokens}"
        super().__init__(f"{sentence}, but the model holds {max_len} in all; {way_out}")


class RequestConflict(InvalidRequest):
    """The request id stands for another request already; take a new one for each request."""

    code = "request_conflict"


class ModelError(D2FError):
    """The model cannot be used."""

    code = "model_error"


class ModelNotFound(ModelError, FileNotFoundError):
    """No model at the given path."""

    code = "model_not_found"


class ModelDamaged(ModelError):
    """A model file differs from its manifest, is truncated, or holds weights of no use."""

    code = "model_damaged"


class UnsupportedModel(ModelError):
    """The model's family, or an option asked of it, is not supported by this build."""

    code = "unsupported_model"


class MissingExtra(D2FError, ImportError):
    """An optional dependency is not installed."""

    code = "missing_extra"

    def __init__(self, feature: str, module: str, extra: str) -> None:
        self.feature = feature
        self.module = module
        self.extra = extra
        super().__init__(
            f"{feature} needs {module}, which is not installed; "
            f"run: pip install 'd2f-stream[{extra}]'"
        )


class OutOfCapacity(D2FError):
    """No room for another session's K/V."""

    code = "out_of_capacity"


class EngineClosed(D2FError):
    """The engine was closed before or during the request."""

    code = "engine_closed"


class EngineFailed(D2FError):
    """The backend failed; every session ends with this and the engine accepts no more."""

    code = "engine_failed"


class RemoteError(D2FError):
    """Something between a client and its server; the request itself may have been fine."""

    code = "remote_error"


class ConnectionLost(RemoteError, ConnectionError):
    """The server cannot be reached, and the client has stopped trying."""

    code = "connection_lost"


class StreamLost(RemoteError):
    """The server does not know the stream: it was restarted, or kept the stream long enough."""

    code = "stream_lost"


class WorkerLost(RemoteError):
    """The worker that ran the stream is gone."""

    code = "worker_lost"


class LogUnavailable(RemoteError):
    """The log that servers share cannot be reached, has no room, or is none that can be used."""

    code = "log_unavailable"


class Unauthorized(RemoteError, PermissionError):
    """No token was given, or a wrong one."""

    code = "unauthorized"


class LimitExceeded(RemoteError):
    """A limit of the server; the sentence names it and its value.

    Attributes:
        retry_after_s: seconds after which the same request may succeed, where that is known.
    """

    code = "limit_exceeded"
    retry_after_s: float | None = None


class MessageTooLarge(LimitExceeded):
    """A message, a prompt or an answer is larger than the server allows.

    Attributes:
        concerns: "prompt" where a shorter one would be served.
    """

    code = "message_too_large"
    concerns: str | None = None

    @classmethod
    def of_prompt(cls, num_tokens: int, limit: int) -> "MessageTooLarge":
        """Return the error of a prompt that is longer than the server allows, tokens."""
        error = cls(f"prompt has {num_tokens} tokens but at most {limit} are served; shorten it")
        error.concerns = "prompt"
        return error


class RateLimited(LimitExceeded):
    """Too many requests in a minute; later ones are served."""

    code = "rate_limited"


class SlowConsumer(LimitExceeded):
    """A reader did not take its events for too long and lost its connection, not its streams."""

    code = "slow_consumer"


class TooManyConnections(LimitExceeded):
    """Too many connections at once, of one client or in all; others will end."""

    code = "too_many_connections"


class TooManyStreams(LimitExceeded):
    """Too many streams at once, of one client or in all; others will end."""

    code = "too_many_streams"


class ServerShuttingDown(RemoteError):
    """The server takes no more requests."""

    code = "shutting_down"


class ProtocolError(RemoteError):
    """A message that cannot be read, or that has no place where it came."""

    code = "protocol_error"
