"""Streams whole blocks of text from block-diffusion language models.

Importing this package imports msgspec and nothing else: what needs asyncio comes in on first use.
"""

import importlib
from typing import TYPE_CHECKING

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
    MissingExtra,
    ModelDamaged,
    ModelError,
    ModelNotFound,
    NoChatTemplate,
    OutOfCapacity,
    PromptTooLong,
    ProtocolError,
    RateLimited,
    RemoteError,
    RequestConflict,
    ServerShuttingDown,
    SlowConsumer,
    StreamLost,
    TooManyConnections,
    TooManyStreams,
    Unauthorized,
    UnsupportedModel,
    WorkerLost,
)
from d2f_stream.core.events import (
    Block,
    Draft,
    Event,
    FinishReason,
    StreamFailed,
    StreamFinished,
    StreamNames,
    StreamStarted,
    Timings,
    Usage,
)
from d2f_stream.core.limits import Limits
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.presets import PRESETS

if TYPE_CHECKING:
    from d2f_stream import sync
    from d2f_stream.api import connect, generate, load
    from d2f_stream.core.session import Engine, EngineInfo, Prompt, Result, Session

__all__ = [
    "PRESETS",
    "Block",
    "ConnectionLost",
    "D2FError",
    "Draft",
    "Engine",
    "EngineClosed",
    "EngineFailed",
    "EngineInfo",
    "Event",
    "FinishReason",
    "GenerationParams",
    "InvalidParams",
    "InvalidPrompt",
    "InvalidRequest",
    "LimitExceeded",
    "Limits",
    "LogUnavailable",
    "MessageTooLarge",
    "MissingExtra",
    "ModelDamaged",
    "ModelError",
    "ModelNotFound",
    "NoChatTemplate",
    "OutOfCapacity",
    "ParamOverrides",
    "Prompt",
    "PromptTooLong",
    "ProtocolError",
    "RateLimited",
    "RemoteError",
    "RequestConflict",
    "Result",
    "ServerShuttingDown",
    "Session",
    "SlowConsumer",
    "StreamFailed",
    "StreamFinished",
    "StreamLost",
    "StreamNames",
    "StreamStarted",
    "Timings",
    "TooManyConnections",
    "TooManyStreams",
    "Unauthorized",
    "UnsupportedModel",
    "Usage",
    "WorkerLost",
    "__version__",
    "connect",
    "generate",
    "load",
    "sync",
]

__version__ = "0.1.0"

_LAZY = {
    "d2f_stream.api": ("connect", "generate", "load"),
    "d2f_stream.core.session": ("Engine", "EngineInfo", "Prompt", "Result", "Session"),
}

if not TYPE_CHECKING:  # or a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name == "sync":
            return importlib.import_module("d2f_stream.sync")
        for module, names in _LAZY.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(module), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
