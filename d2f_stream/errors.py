"""The exceptions of d2f_stream: one tree, each with a stable code.

The code is what crosses the wire and what a program compares; the sentence is for people and names
the offending value, the limit and the way out.

    D2FError
    ├── InvalidRequest (ValueError)      the caller can mend it; nothing was started
    │   ├── InvalidParams                a generation parameter is out of range
    │   ├── InvalidPrompt                empty, or not of a supported shape
    │   └── PromptTooLong                prompt plus answer exceed what the model holds
    ├── ModelError                       the model cannot be used
    │   ├── ModelNotFound (FileNotFoundError)
    │   ├── ModelDamaged                 a file differs from its manifest, or is truncated
    │   └── UnsupportedModel             a family, backend or option this build does not know
    ├── MissingExtra (ImportError)       an optional dependency is not installed
    ├── OutOfCapacity                    no room for another session's K/V
    ├── EngineClosed                     the engine was closed before or during the request
    └── EngineFailed                     the backend failed; the engine is unusable
"""

from typing import ClassVar

__all__ = [
    "D2FError",
    "EngineClosed",
    "EngineFailed",
    "InvalidParams",
    "InvalidPrompt",
    "InvalidRequest",
    "MissingExtra",
    "ModelDamaged",
    "ModelError",
    "ModelNotFound",
    "OutOfCapacity",
    "PromptTooLong",
    "UnsupportedModel",
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
        super().__init__(f"{name} is {value!r} but must be {allowed}")


class InvalidPrompt(InvalidRequest):
    """The prompt is empty or not of a supported shape."""

    code = "invalid_prompt"


class PromptTooLong(InvalidRequest):
    """Prompt and answer together exceed what the model holds."""

    code = "prompt_too_long"

    def __init__(self, num_prompt_tokens: int, max_new_tokens: int, max_len: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.max_len = max_len
        super().__init__(
            f"prompt has {num_prompt_tokens} tokens and max_new_tokens is {max_new_tokens}, but "
            f"the model holds {max_len} in all; shorten the prompt or lower max_new_tokens"
        )


class ModelError(D2FError):
    """The model cannot be used."""

    code = "model_error"


class ModelNotFound(ModelError, FileNotFoundError):
    """No model at the given path."""

    code = "model_not_found"


class ModelDamaged(ModelError):
    """A model file differs from its manifest or is truncated."""

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
