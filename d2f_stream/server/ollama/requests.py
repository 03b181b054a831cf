"""What Ollama's API is asked: the bodies of /api/chat and /api/generate. Pure values.

As everywhere, a field is obeyed, or cannot change the answer, or is refused by its name.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from d2f_stream.server.openai.fields import Field, Fields, UnsupportedParameter, check_known
from d2f_stream.server.openai.history import ToolCall, joined, result_text, with_calls
from d2f_stream.wire.protocol import Overrides, WirePrompt

__all__ = ["ChatBody", "GenerateBody", "ShowBody"]

HARDWARE: Final = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "low_vram", "f16_kv",
    "use_mmap", "use_mlock", "numa", "vocab_only",
)  # fmt: skip
OPTIONS: Final[Fields] = {
    **{name: Field("obeyed") for name in ("temperature", "top_p", "seed", "num_predict", "stop")},
    **{name: Field("no effect") for name in (*HARDWARE, "penalize_newline")},
    "top_k": Field("refused", (0,)),
    "min_p": Field("refused", (0,)),
    "typical_p": Field("refused", (1,)),
    "tfs_z": Field("refused", (1,)),
    "repeat_last_n": Field("no effect"),  # of a penalty that is refused itself
    "repeat_penalty": Field("refused", (1,)),
    "presence_penalty": Field("refused", (0,)),
    "frequency_penalty": Field("refused", (0,)),
    "mirostat": Field("refused", (0,)),
    "mirostat_eta": Field("no effect"),
    "mirostat_tau": Field("no effect"),
}
BOTH: Final[Fields] = {
    **{name: Field("obeyed") for name in ("model", "name", "stream", "options")},
    "keep_alive": Field("no effect"),
    "think": Field("refused", (False,)),
    "format": Field("refused", ("",)),
    "logprobs": Field("obeyed"),
    "top_logprobs": Field("refused", (0,)),
    "truncate": Field("no effect"),  # the page and its clients leave out what does not fit
    "shift": Field("no effect"),
}
CHAT: Final[Fields] = {
    **BOTH,
    "messages": Field("obeyed"),
    "tools": Field("refused", ([],)),
}
GENERATE: Final[Fields] = {
    **BOTH,
    **{name: Field("obeyed") for name in ("prompt", "system", "raw")},
    "template": Field("refused", ("",)),
    "suffix": Field("refused", ("",)),
    "context": Field("refused", ([],)),
    "images": Field("refused", ([],)),
}
MESSAGE: Final[Fields] = {
    **{name: Field("obeyed") for name in ("role", "content", "tool_calls")},
    "thinking": Field("no effect"),  # of an earlier answer
    "tool_name": Field("no effect"),  # results stand in the order of their calls
    "tool_call_id": Field("no effect"),
    "images": Field("refused", ([],)),
}


class Options(Struct, frozen=True, kw_only=True):
    """The settings that are obeyed; `num_predict` of -1 or -2 leaves the length to the model."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: str | list[str] | None = None

    def overrides(self) -> Overrides:
        """Return the generation parameters that are set."""
        length = self.num_predict
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given: dict[str, Any] = {
            "max_new_tokens": None if length is not None and length < 0 else length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": tuple(text for text in texts if text) or None,
        }
        return Overrides(**{name: value for name, value in given.items() if value is not None})


class Message(Struct, frozen=True, kw_only=True):
    """A message of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCall] | None = None

    @property
    def turn(self) -> dict[str, str]:
        """The message as a template takes it."""
        text = self.content or ""
        if self.role == "tool":
            return {"role": "user", "content": result_text(text)}
        calls = [call.function for call in self.tool_calls or ()]
        return {"role": self.role, "content": with_calls(text, calls)}


class Body(Struct, frozen=True, kw_only=True):
    """What both have in common."""

    model: str | None = None
    stream: bool | None = None
    options: Options | None = None
    logprobs: bool | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether the answer comes line by line: unless the request says no."""
        return self.stream is not False

    def overrides(self) -> Overrides:
        """Return the generation parameters that are set."""
        chosen = (self.options or Options()).overrides()
        return msgspec.structs.replace(chosen, logprobs=True) if self.logprobs else chosen


class ChatBody(Body, frozen=True, kw_only=True):
    """POST /api/chat."""

    messages: list[Message] = []

    @classmethod
    def check(cls, values: Mapping[str, object]) -> None:
        """Refuse what is not done here; see UnsupportedParameter."""
        check_known(values, CHAT)
        check_known(values.get("options"), OPTIONS, "options.")
        messages = values.get("messages")
        for number, message in enumerate(messages if isinstance(messages, list) else ()):
            check_known(message, MESSAGE, f"messages[{number}].")

    @property
    def wire_prompt(self) -> WirePrompt | None:
        """The prompt as the registry takes it; None where nothing is asked."""
        return [*joined((m.turn, m.role == "tool") for m in self.messages)] or None


class GenerateBody(Body, frozen=True, kw_only=True):
    """POST /api/generate."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None

    @classmethod
    def check(cls, values: Mapping[str, object]) -> None:
        """Refuse what is not done here; see UnsupportedParameter."""
        check_known(values, GENERATE)
        check_known(values.get("options"), OPTIONS, "options.")
        if values.get("raw") and values.get("system"):
            raise UnsupportedParameter(
                "system", "system is for the model's template, which raw goes without"
            )

    @property
    def wire_prompt(self) -> WirePrompt | None:
        """The prompt as the registry takes it; None where nothing is asked."""
        if not self.prompt:
            return None
        if self.raw:
            return self.prompt
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


class ShowBody(Struct, frozen=True, kw_only=True):
    """POST /api/show; older clients call the model `name`."""

    model: str | None = None
    name: str | None = None


def decode(body: bytes, kind: type[ChatBody] | type[GenerateBody]) -> ChatBody | GenerateBody:
    """Read a body.

    Raises:
        UnsupportedParameter: it asks for something that is not done here.
        msgspec.MsgspecError, UnicodeError, RecursionError: it cannot be read.
    """
    values = msgspec.json.decode(body or b"{}")
    if isinstance(values, dict):
        kind.check(values)
        values = {name: value for name, value in values.items() if value is not None}
    return msgspec.convert(values, kind)
