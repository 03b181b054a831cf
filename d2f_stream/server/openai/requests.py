"""What OpenAI's chat and completion API is asked: the bodies of its requests. Pure values.

They are read leniently: clients send many fields, so unknown ones are ignored, as are `user`,
`metadata` and whatever else does not change the answer; null is as good as absent. What would
change the answer and cannot be done here is refused by name. Beside OpenAI's own fields, a request
may hold `diffusing` (Inception's name: each delta is the whole text so far, drafts included) and
`d2f`, the settings of block diffusion.
"""

from typing import Any, ClassVar

from msgspec import UNSET, Struct

from d2f_stream.core.errors import InvalidRequest
from d2f_stream.wire.protocol import Overrides, WirePrompt

__all__ = [
    "AnswerRequest",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "StreamOptions",
    "TextPart",
    "UnsupportedParameter",
]


class UnsupportedParameter(InvalidRequest):
    """The request asks for something that is not done here; `param` is its place in the JSON."""

    code = "unsupported_parameter"

    def __init__(self, param: str, sentence: str) -> None:
        self.param = param
        super().__init__(sentence)


class StreamOptions(Struct, frozen=True, kw_only=True):
    """`include_usage` adds a last chunk without choices that holds the usage."""

    include_usage: bool | None = None


class TextPart(Struct, frozen=True, kw_only=True):
    """A part of a message; only those of type "text" are understood."""

    type: str
    text: str | None = None


class ChatMessage(Struct, frozen=True, kw_only=True):
    """A message of the conversation."""

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[Any] | None = None

    def wire(self, place: str) -> dict[str, str]:
        """Return the message as a template takes it.

        Args:
            place: of the message in the request, for errors.

        Raises:
            UnsupportedParameter: it is not plain text of a known role.
        """
        roles = {"system": "system", "developer": "system", "user": "user"}
        role = (roles | {"assistant": "assistant"}).get(self.role)
        if role is None:
            known = "system, developer, user or assistant"
            sentence = f"{place}.role is {self.role[:40]!r} but must be {known}"
            raise UnsupportedParameter(f"{place}.role", sentence)
        if self.tool_calls:
            raise _unsupported(f"{place}.tool_calls", "tools")
        return {"role": role, "content": self._text(place)}

    def _text(self, place: str) -> str:
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            sentence = f"{place}.content is missing but must be a string or a list of text parts"
            raise UnsupportedParameter(f"{place}.content", sentence)
        for number, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                where = f"{place}.content[{number}]"
                sentence = f"{where} is of type {part.type[:40]!r} but this model reads text only"
                raise UnsupportedParameter(where, sentence)
        return "".join(part.text or "" for part in self.content)


class AnswerRequest(Struct, frozen=True, kw_only=True):
    """What the requests of both endpoints have in common."""

    prompt_param: ClassVar[str]

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    diffusing: bool | None = None
    d2f: Overrides | None = None
    # Known, and refused where they would change the answer.
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @property
    def wire_prompt(self) -> WirePrompt:
        """The prompt as the registry takes it.

        Raises:
            UnsupportedParameter: it is not of a kind that is answered here.
        """
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a streamed answer ends with a chunk of its usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def max_tokens_param(self) -> str:
        """The name under which the length of the answer was given."""
        return "max_tokens"

    @property
    def answer_limit(self) -> int | None:
        """The longest answer, in tokens; None leaves it to the model."""
        return self.max_tokens

    def check(self) -> None:
        """Refuse what would change the answer and is not done here.

        Raises:
            UnsupportedParameter: names the first such field.
        """
        if self.n is not None and self.n != 1:
            raise UnsupportedParameter("n", f"n is {self.n} but a request has one answer here")
        if self.logit_bias:
            raise _unsupported("logit_bias", "logit_bias")
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise _unsupported(name, f"{name} other than 0")

    def overrides(self) -> Overrides:
        """Return the parameters that the request sets; those in `d2f` win over OpenAI's names."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given: dict[str, Any] = {
            "max_new_tokens": self.answer_limit,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": stop or None,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        chosen |= (self.d2f or Overrides()).to_dict()
        chosen["drafts"] = bool(self.diffusing and self.stream)
        return Overrides(**chosen)

    def param_of(self, name: str) -> str:
        """Return where in the request a generation parameter was set."""
        if self.d2f is not None and getattr(self.d2f, name, UNSET) is not UNSET:
            return f"d2f.{name}"
        return self.max_tokens_param if name == "max_new_tokens" else name


class ChatRequest(AnswerRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    prompt_param: ClassVar[str] = "messages"

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    function_call: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None

    @property
    def wire_prompt(self) -> WirePrompt:
        """The messages, for the model's template."""
        return [message.wire(f"messages[{i}]") for i, message in enumerate(self.messages)]

    @property
    def max_tokens_param(self) -> str:
        """The newer name, where it was given."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def answer_limit(self) -> int | None:
        """The newer of the two names wins."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def check(self) -> None:
        """Refuse what would change the answer and is not done here."""
        AnswerRequest.check(self)
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise _unsupported(name, name)
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "none", "auto"):
                raise _unsupported(name, f"{name} other than none and auto")
        if self.logprobs or self.top_logprobs:
            raise _unsupported("logprobs" if self.logprobs else "top_logprobs", "logprobs")
        if self.response_format and self.response_format.get("type") != "text":
            raise _unsupported("response_format", "a response_format other than text")
        if set(self.modalities or ()) - {"text"}:
            raise _unsupported("modalities", "modalities other than text")
        if self.audio:
            raise _unsupported("audio", "audio")


class CompletionRequest(AnswerRequest, frozen=True, kw_only=True):
    """POST /v1/completions: the prompt is taken verbatim."""

    prompt_param: ClassVar[str] = "prompt"

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = None

    @property
    def wire_prompt(self) -> WirePrompt:
        """The text, or the token ids; a list of one prompt is that prompt."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        ids = [item for item in prompt if isinstance(item, int)]
        if len(ids) == len(prompt):
            return [*ids]
        if len(prompt) != 1:
            sentence = f"prompt holds {len(prompt)} prompts; send one request for each"
            raise UnsupportedParameter("prompt", sentence)
        only = prompt[0]
        return [*only] if isinstance(only, list) else str(only)

    def check(self) -> None:
        """Refuse what would change the answer and is not done here."""
        AnswerRequest.check(self)
        if self.best_of is not None and self.best_of != 1:
            sentence = f"best_of is {self.best_of} but a request has one answer here"
            raise UnsupportedParameter("best_of", sentence)
        if self.echo:
            raise _unsupported("echo", "echo")
        if self.suffix:
            raise _unsupported("suffix", "a suffix")
        if self.logprobs is not None:
            raise _unsupported("logprobs", "logprobs")


def _unsupported(param: str, what: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        param, f"this server does not support {what}; leave {param} out of the request"
    )
