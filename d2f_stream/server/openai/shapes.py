"""What OpenAI's chat and completion API answers: answers, chunks, models, errors. Pure values.

Beside OpenAI's own fields, answers and chunks carry a `d2f` object with what happened.
"""

from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from d2f_stream.core.events import FinishReason, Timings, Usage
from d2f_stream.server.openai.token_logprobs import ChatLogprobs, TextLogprobs
from d2f_stream.wire.protocol import ModelCard

__all__ = [
    "AnswerMessage",
    "Body",
    "ChunkChoice",
    "D2fReport",
    "Delta",
    "ErrorBody",
    "ErrorReport",
    "MessageChoice",
    "Model",
    "ModelList",
    "TextChoice",
    "TokenUsage",
]


class TokenUsage(Struct, frozen=True, kw_only=True):
    """What a request consumed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usages: Sequence[Usage]) -> "TokenUsage":
        """Return the usage of the streams that answered one prompt in OpenAI's words."""
        prompt = usages[0].prompt_tokens
        completion = sum(usage.completion_tokens for usage in usages)
        return cls(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )


class D2fReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk or an answer is made of, for clients that know block diffusion.

    Attributes:
        type: of the event behind it, as on /v1/stream.
        stream: id of the stream.
        seq: of a durable event.
        index: number of the block in the answer, from 0.
        steps: steps that the stream had taken.
        reason: why it ended: eos, length, stop, cancelled.
        tokens_per_step: useful tokens per step.
        timings: wall times, milliseconds.
    """

    type: str
    stream: str
    seq: int | UnsetType = UNSET
    index: int | UnsetType = UNSET
    steps: int | UnsetType = UNSET
    reason: FinishReason | UnsetType = UNSET
    tokens_per_step: float | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class Delta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to the message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True, kw_only=True):
    """The choice of a chat chunk."""

    index: int = 0
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class AnswerMessage(Struct, frozen=True, kw_only=True):
    """A whole answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class MessageChoice(Struct, frozen=True, kw_only=True):
    """The choice of a chat answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class TextChoice(Struct, frozen=True, kw_only=True):
    """The choice of a completion, whole or a chunk of it."""

    index: int = 0
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class Body(Struct, frozen=True, kw_only=True):
    """An answer, or a chunk of one; `object` tells which."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[ChunkChoice | MessageChoice | TextChoice]
    usage: TokenUsage | UnsetType | None = UNSET
    d2f: D2fReport | UnsetType = UNSET


class Model(Struct, frozen=True, kw_only=True):
    """GET /v1/models/{id}; `d2f` says what the model can do."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    d2f: ModelCard


class ModelList(Struct, frozen=True, kw_only=True):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorReport(Struct, frozen=True, kw_only=True):
    """An error in OpenAI's words; `code` is that of the error class."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct, frozen=True, kw_only=True):
    """What every refused request is answered with."""

    error: ErrorReport
