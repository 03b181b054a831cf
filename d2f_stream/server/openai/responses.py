"""OpenAI's Responses API: what it is asked. Pure values.

Text only: no tools, no stored conversations. A request that names an earlier response is refused,
since nothing is kept; its turns can be sent as `input` instead.
"""

from collections.abc import Mapping
from typing import ClassVar, Final

from msgspec import Struct

from d2f_stream.server.openai.fields import (
    BOTH,
    Field,
    Fields,
    UnsupportedParameter,
    check_known,
)
from d2f_stream.server.openai.messages import ChatMessage
from d2f_stream.server.openai.requests import AnswerRequest
from d2f_stream.wire.protocol import WirePrompt

__all__ = ["RESPONSES", "ResponsesRequest"]

RESPONSES: Final[Fields] = {
    **{name: rule for name, rule in BOTH.items() if rule.outcome != "obeyed"},
    **{
        name: Field("obeyed")
        for name in ("model", "input", "instructions", "max_output_tokens", "temperature", "top_p")
    },
    **{name: Field("obeyed") for name in ("stream", "seed", "stop", "d2f")},
    "parallel_tool_calls": Field("no effect"),
    "prompt_cache_key": Field("no effect"),
    "prompt_cache_options": Field("no effect"),
    "stream_options": Field("no effect"),  # obfuscation of the frames' length
    "include": Field("obeyed"),
    "access_programs": Field("refused", ([],)),
    "background": Field("refused", (False,)),
    "background_options": Field("refused"),
    "context_management": Field("refused", ([],)),
    "conversation": Field("refused"),
    "image": Field("refused"),
    "max_tool_calls": Field("refused"),
    "moderation": Field("refused"),
    "n": Field("refused", (1,)),
    "previous_response_id": Field("refused"),
    "prompt": Field("refused"),
    "reasoning": Field("refused", ({}, {"effort": "none"})),
    "text": Field("refused", ({}, {"format": {"type": "text"}})),
    "tool_choice": Field("refused", ("none", "auto")),
    "tools": Field("refused", ([],)),
    "top_logprobs": Field("refused", (0,)),
    "truncation": Field("refused", ("disabled",)),
}
ITEM: Final[Fields] = {
    **{name: Field("obeyed") for name in ("type", "role", "content")},
    "id": Field("no effect"),
    "status": Field("no effect"),
}
PART: Final[Fields] = {
    **{name: Field("obeyed") for name in ("type", "text")},
    "annotations": Field("no effect"),
    "logprobs": Field("no effect"),
}
TEXTS: Final = ("input_text", "output_text", "text")
LOGPROBS: Final = "message.output_text.logprobs"
INCLUDED: Final = (LOGPROBS, "reasoning.encrypted_content")
"""What may be asked for: agents' clients ask for reasoning too, of which there is none."""


class InputPart(Struct, frozen=True, kw_only=True):
    """A part of an item's content."""

    type: str
    text: str = ""


class InputItem(Struct, frozen=True, kw_only=True):
    """A turn of the conversation so far."""

    role: str
    type: str = "message"
    content: str | list[InputPart] = ""


class ResponsesRequest(AnswerRequest, frozen=True, kw_only=True):
    """POST /v1/responses."""

    prompt_param: ClassVar[str] = "input"
    fields: ClassVar[Fields] = RESPONSES

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    include: list[str] | None = None

    def check_values(self) -> None:
        """Refuse values of obeyed fields that are not done here; see AnswerRequest."""
        AnswerRequest.check_values(self)
        for name in self.include or ():
            if name not in INCLUDED:
                sentence = f"include names {name[:60]!r} but this server knows {LOGPROBS} only"
                raise UnsupportedParameter("include", sentence)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probability of each token is asked for."""
        return LOGPROBS in (self.include or ())

    @classmethod
    def renamed(cls, values: dict[str, object]) -> dict[str, object]:
        """Take `messages` for `input`, as clients of the older API send them here."""
        if "messages" not in values or "input" in values:
            return values
        return {"input" if name == "messages" else name: value for name, value in values.items()}

    @classmethod
    def check(cls, values: Mapping[str, object]) -> None:
        """Refuse what is not done here.

        Raises:
            UnsupportedParameter: names the first such field.
        """
        check_known(values, RESPONSES)
        items = values.get("input")
        for number, item in enumerate(items if isinstance(items, list) else ()):
            check_known(item, ITEM, f"input[{number}].")
            content = item.get("content") if isinstance(item, Mapping) else None
            for part_number, part in enumerate(content if isinstance(content, list) else ()):
                if isinstance(part, Mapping) and part.get("type") in TEXTS:
                    check_known(part, PART, f"input[{number}].content[{part_number}].")

    @property
    def max_tokens_param(self) -> str:
        """The name under which the length of the answer was given."""
        return "max_output_tokens"

    @property
    def answer_limit(self) -> int | None:
        """The longest answer, in tokens; None leaves it to the model."""
        return self.max_output_tokens

    @property
    def wire_prompt(self) -> WirePrompt:
        """The messages, the instructions before them.

        Raises:
            UnsupportedParameter: something is not plain text.
        """
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*system, {"role": "user", "content": self.input}]
        turns = [self._turn(item, f"input[{number}]") for number, item in enumerate(self.input)]
        return [*system, *turns]

    def _turn(self, item: InputItem, place: str) -> dict[str, str]:
        if item.type != "message":
            sentence = f"{place}.type is {item.type[:40]!r} but this model reads messages only"
            raise UnsupportedParameter(f"{place}.type", sentence)
        texts = [item.content] if isinstance(item.content, str) else []
        for number, part in enumerate(() if isinstance(item.content, str) else item.content):
            if part.type not in TEXTS:
                where = f"{place}.content[{number}]"
                sentence = f"{where} is of type {part.type[:40]!r} but this model reads text only"
                raise UnsupportedParameter(where, sentence)
            texts.append(part.text)
        return ChatMessage(role=item.role, content="".join(texts)).wire(place)
