"""Earlier turns in which tools were called, as text that every chat template takes. Pure.

No tool is called here, but a conversation may have had some: from another model, or from a client
that ran them. A call stands in its assistant's turn and the results in the user's turn after it,
marked as Qwen's published chat templates mark them.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from d2f_stream.wire.codec import UNREADABLE

__all__ = ["FunctionCall", "ToolCall", "joined", "result_text", "with_calls"]

Turn = dict[str, str]


class FunctionCall(Struct, frozen=True, kw_only=True):
    """What was called; `arguments` are JSON, or a text of it."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Struct, frozen=True, kw_only=True):
    """A call in an assistant's message."""

    function: FunctionCall


def with_calls(text: str, calls: Iterable[FunctionCall]) -> str:
    """Return the text of an assistant's turn, and what it called."""
    return "\n".join([*filter(None, [text]), *map(_call_text, calls)])


def result_text(text: str) -> str:
    """Return what a tool gave, as the user's turn after the call says it."""
    return f"<tool_response>\n{text}\n</tool_response>"


def joined(turns: Iterable[tuple[Turn, bool]]) -> list[Turn]:
    """Return the turns; results that come one after the other are one turn, as templates want it.

    Args:
        turns: each with whether it is a tool's result.
    """
    whole: list[Turn] = []
    after_result = False
    for turn, is_result in turns:
        if is_result and after_result:
            whole[-1] = {**whole[-1], "content": f"{whole[-1]['content']}\n{turn['content']}"}
        else:
            whole.append(turn)
        after_result = is_result
    return whole


def _call_text(call: FunctionCall) -> str:
    arguments: object = call.arguments
    if isinstance(arguments, str):
        with contextlib.suppress(*UNREADABLE):  # a model's own text need not be JSON
            msgspec.json.decode(arguments)
            arguments = msgspec.Raw(arguments.encode())
    body = msgspec.json.encode({"name": call.name, "arguments": arguments}).decode()
    return f"<tool_call>\n{body}\n</tool_call>"
