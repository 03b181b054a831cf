"""What OpenAI's chat and completion API is asked: the bodies of its requests. Pure values.

These are the fields that are obeyed; `fields.py` says what becomes of the others. Beside OpenAI's
own, a request may hold `diffusing` (Inception's name: each delta is the whole text so far, drafts
included) and `d2f`, the settings of block diffusion.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import msgspec
from msgspec import UNSET, Struct

from d2f_stream.server.openai.fields import (
    CHAT,
    COMPLETION,
    Fields,
    UnsupportedParameter,
    check_fields,
)
from d2f_stream.server.openai.history import joined
from d2f_stream.server.openai.messages import ChatMessage
from d2f_stream.wire.protocol import Overrides, WirePrompt

__all__ = [
    "AnswerRequest",
    "ChatRequest",
    "CompletionRequest",
    "StreamOptions",
]

MAX_CHOICES: Final = 16


class StreamOptions(Struct, frozen=True, kw_only=True):
    """`include_usage` adds a last chunk without choices that holds the usage."""

    include_usage: bool | None = None


class AnswerRequest(Struct, frozen=True, kw_only=True):
    """What the requests of both endpoints have in common."""

    prompt_param: ClassVar[str]
    fields: ClassVar[Fields]

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    diffusing: bool | None = None
    d2f: Overrides | None = None

    @classmethod
    def renamed(cls, values: dict[str, object]) -> dict[str, object]:
        """Return the body with its fields under the names of this class."""
        return values

    @classmethod
    def check(cls, values: Mapping[str, object]) -> None:
        """Refuse what is not done here, before the fields are read.

        Raises:
            UnsupportedParameter: names the first such field.
        """
        check_fields(values, cls.fields)

    @property
    def wire_prompt(self) -> WirePrompt:
        """The prompt as the registry takes it.

        Raises:
            UnsupportedParameter: it is not of a kind that is answered here.
        """
        raise NotImplementedError

    def check_values(self) -> None:
        """Refuse values of obeyed fields that are not done here.

        Raises:
            UnsupportedParameter: names the first such field.
        """
        if not 1 <= self.num_choices <= MAX_CHOICES:
            sentence = f"n is {self.n} but must be an integer from 1 to {MAX_CHOICES}"
            raise UnsupportedParameter("n", sentence)
        if self.wants_logprobs and self.diffusing:
            raise UnsupportedParameter(
                "logprobs",
                "logprobs are of tokens that are final, but with diffusing each delta replaces the "
                "one before; leave one of both out",
            )

    @property
    def num_choices(self) -> int:
        """How many answers are asked for."""
        return 1 if self.n is None else self.n

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probability of each token is asked for."""
        return False

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

    def overrides(self, choice: int = 0) -> Overrides:
        """Return the parameters that the request sets; those in `d2f` win over OpenAI's names.

        Args:
            choice: number of the answer; each draws from a seed of its own.
        """
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given: dict[str, Any] = {
            "max_new_tokens": self.answer_limit,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": tuple(text for text in texts if text) or None,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        chosen |= (self.d2f or Overrides()).to_dict()
        chosen["drafts"] = bool(self.diffusing and self.stream)
        chosen["logprobs"] = self.wants_logprobs
        if choice and chosen.get("seed") is not None:
            chosen["seed"] = (chosen["seed"] + choice + 2**63) % 2**64 - 2**63
        return Overrides(**chosen)

    def param_of(self, name: str) -> str:
        """Return where in the request a generation parameter was set."""
        if self.d2f is not None and getattr(self.d2f, name, UNSET) is not UNSET:
            return f"d2f.{name}"
        return self.max_tokens_param if name == "max_new_tokens" else name


class ChatRequest(AnswerRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    prompt_param: ClassVar[str] = "messages"
    fields: ClassVar[Fields] = CHAT

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def check_values(self) -> None:
        """Refuse values of obeyed fields that are not done here; see AnswerRequest."""
        AnswerRequest.check_values(self)
        if self.continue_final_message and self.add_generation_prompt:
            raise UnsupportedParameter(
                "add_generation_prompt",
                "continue_final_message and add_generation_prompt are both true; send one of them",
            )
        if self.continue_final_message and not self._ends_with_an_answer:
            raise UnsupportedParameter(
                "continue_final_message",
                "continue_final_message is true but the last message is not the assistant's; only "
                "that can be continued",
            )
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise UnsupportedParameter(
                "add_generation_prompt",
                "add_generation_prompt is false, so that nobody's turn begins; leave it out, or "
                "continue the assistant's last message by continue_final_message",
            )

    @property
    def wire_prompt(self) -> WirePrompt:
        """The messages, for the model's template.

        Behind a last one of the assistant's begins another of its turns, unless the request says
        that it is to be continued.
        """
        turns = enumerate(self.messages)
        told = joined((turn.wire(f"messages[{i}]"), turn.is_result) for i, turn in turns)
        if self._ends_with_an_answer and not self.continue_final_message:
            told.append({"role": "assistant", "content": ""})
        return [*told]

    @property
    def _ends_with_an_answer(self) -> bool:
        return bool(self.messages) and self.messages[-1].role == "assistant"

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probability of each token is asked for."""
        return bool(self.logprobs)

    @property
    def max_tokens_param(self) -> str:
        """The newer name, where it was given."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def answer_limit(self) -> int | None:
        """The newer of the two names wins."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


class CompletionRequest(AnswerRequest, frozen=True, kw_only=True):
    """POST /v1/completions: the prompt is taken verbatim."""

    prompt_param: ClassVar[str] = "prompt"
    fields: ClassVar[Fields] = COMPLETION

    prompt: str | list[str | int | list[int]]
    logprobs: bool | int | None = None

    def check_values(self) -> None:
        """Refuse values of obeyed fields that are not done here; see AnswerRequest."""
        AnswerRequest.check_values(self)
        if self.logprobs:
            sentence = (
                f"logprobs is {msgspec.json.encode(self.logprobs).decode()}, but of each position "
                "the chosen token's is known alone; send 0 for that, or leave it out"
            )
            raise UnsupportedParameter("logprobs", sentence)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probability of each token is asked for: 0 alternatives to it."""
        return self.logprobs is not None and self.logprobs is not False

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
