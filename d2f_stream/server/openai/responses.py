"""OpenAI's Responses API: what it is asked, and how an answer is written. Pure values.

Text only: no tools, no stored conversations. A request that names an earlier response is refused,
since nothing is kept; its turns can be sent as `input` instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Struct

from d2f_stream.core.events import Block, Event, StreamFinished, StreamStarted
from d2f_stream.server.openai.fields import (
    BOTH,
    Field,
    Fields,
    UnsupportedParameter,
    check_known,
)
from d2f_stream.server.openai.reader import Answer
from d2f_stream.server.openai.requests import AnswerRequest, ChatMessage
from d2f_stream.server.openai.shapes import ErrorBody
from d2f_stream.wire.protocol import WirePrompt

__all__ = ["RESPONSES", "ResponseWriter", "ResponsesRequest"]

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
    "include": Field("refused", ([],)),
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


@dataclass(slots=True, kw_only=True)
class ResponseWriter:
    """Writes one response, whole or as server-sent events.

    Attributes:
        name: of the request; ids are made of it.
        created: when, Unix seconds.
        model: whose answer it is.
        request: what was asked, which a response repeats.
    """

    name: str
    created: int
    model: str
    request: ResponsesRequest
    _text: str = ""
    _sequence: int = field(default=0)

    def frames(self, event: Event, index: int = 0) -> bytes:
        """Return the server-sent events that an event of the stream makes."""
        assert index == 0  # there are no choices here
        match event:
            case StreamStarted():
                response = self._response("in_progress", None)
                return (
                    self._frame("response.created", response=response)
                    + self._frame("response.in_progress", response=response)
                    + self._frame(
                        "response.output_item.added", output_index=0, item=self._item("in_progress")
                    )
                    + self._frame("response.content_part.added", **self._place, part=_part(""))
                )
            case Block() if event.text:
                self._text += event.text
                return self._frame(
                    "response.output_text.delta", **self._place, delta=event.text, logprobs=[]
                )
            case StreamFinished():
                return self._end(event)
            case _:
                return b""

    def failure(self, error: ErrorBody) -> bytes:
        """Return the server-sent event of a response that broke off."""
        report = error.error
        return self._frame("error", code=report.code, message=report.message, param=report.param)

    def whole(self, answers: Sequence[Answer]) -> bytes:
        """Return the response to a request that is not streamed."""
        [(blocks, end)] = answers
        self._text = "".join(block.text for block in blocks)
        return msgspec.json.encode(self._response(_status(end), end))

    def _end(self, end: StreamFinished) -> bytes:
        status = _status(end)
        part, item = _part(self._text), self._item(status)
        return (
            self._frame("response.output_text.done", **self._place, text=self._text, logprobs=[])
            + self._frame("response.content_part.done", **self._place, part=part)
            + self._frame("response.output_item.done", output_index=0, item=item)
            + self._frame(f"response.{status}", response=self._response(status, end))
        )

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.name}", "output_index": 0, "content_index": 0}

    def _frame(self, kind: str, **values: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._sequence, **values}
        self._sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(body) + b"\n\n"

    def _item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [_part(self._text)]
        return {
            "id": f"msg_{self.name}",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _response(self, status: str, end: StreamFinished | None) -> dict[str, Any]:
        asked = self.request
        usage = None
        if end is not None:
            used = end.usage
            usage = {
                "input_tokens": used.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": used.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used.prompt_tokens + used.completion_tokens,
            }
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{self.name}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "model": self.model,
            "output": [] if end is None else [self._item(status)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": usage,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(end: StreamFinished) -> str:
    return "incomplete" if end.reason == "length" else "completed"
