"""Answers in the shape of OpenAI's Responses API, whole or as server-sent events. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from d2f_stream.core.events import Block, Event, StreamFinished, StreamStarted
from d2f_stream.server.openai.reader import Answer
from d2f_stream.server.openai.responses import ResponsesRequest
from d2f_stream.server.openai.shapes import ErrorBody
from d2f_stream.server.openai.token_logprobs import Token, TokenLine, TokenLogprob, chat_logprobs

__all__ = ["ResponseWriter"]


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
    _line: TokenLine = field(default_factory=TokenLine)
    _told: list[TokenLogprob] = field(default_factory=list)
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
                    + self._frame("response.content_part.added", **self._place, part=_part("", []))
                )
            case Block():
                told = self._take(event)
                if not event.text:
                    return b""
                return self._frame(
                    "response.output_text.delta", **self._place, delta=event.text, logprobs=told
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
        for block in blocks:
            self._take(block)
        self._tell(self._line.end(end))
        return msgspec.json.encode(self._response(_status(end), end))

    def _take(self, block: Block) -> list[TokenLogprob]:
        """Add a block; return what is told of its tokens."""
        self._text += block.text
        return self._tell(self._line.take(block)) if self.request.wants_logprobs else []

    def _tell(self, tokens: list[Token]) -> list[TokenLogprob]:
        told = chat_logprobs(tokens).content
        self._told += told
        return told

    def _end(self, end: StreamFinished) -> bytes:
        self._tell(self._line.end(end))
        status = _status(end)
        part, item = _part(self._text, self._told), self._item(status)
        return (
            self._frame(
                "response.output_text.done", **self._place, text=self._text, logprobs=self._told
            )
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
        content = [] if status == "in_progress" else [_part(self._text, self._told)]
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


def _part(text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _status(end: StreamFinished) -> str:
    return "incomplete" if end.reason == "length" else "completed"
