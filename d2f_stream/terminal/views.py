"""Views: how the events of one stream are shown on standard output.

Owns the plain text and the JSON lines, and the protocol that canvas.py's live canvas shares. Knows
events only. A view is a context manager around its stream, so that it can end a line or give a
terminal back whatever ended the stream.
"""

import re
import sys
from contextlib import AbstractContextManager
from typing import Final, Protocol, Self, assert_never

import msgspec

from d2f_stream.core.events import Block, Event, FinishReason

__all__ = ["JsonView", "TextView", "View", "about_silence", "printable"]

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Drop control characters, so that a model cannot write escape sequences to the terminal."""
    return _CONTROL.sub("", text)


def about_silence(reason: FinishReason, description: str) -> str:
    """Say why an answer has no text; "" where it was cancelled.

    Args:
        reason: of its end.
        description: what the model is for; may be empty.
    """
    match reason:
        case "cancelled":
            return ""
        case "stop":
            return "a stop string ended the answer before its first word"
        case "length":
            return "the answer reached its length without a word"
        case "eos":
            told = "the model ended its answer at once, without a word"
            return f"{told}. What it is for: {description}" if description else told
        case _:
            assert_never(reason)


class View(AbstractContextManager["View"], Protocol):
    """Shows the events of one stream; a context manager around it."""

    def apply(self, event: Event) -> None:
        """Show the next event."""
        ...


class TextView:
    """Writes the text block by block, flushed at each; the last line is ended."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._ends_line = True

    def apply(self, event: Event) -> None:
        """Write a block's text; other events have none."""
        if isinstance(event, Block) and event.text:
            text = printable(event.text) if self._is_terminal else event.text
            sys.stdout.write(text)
            sys.stdout.flush()
            self._ends_line = text.endswith("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if not self._ends_line and not isinstance(error, BrokenPipeError):
            sys.stdout.write("\n")
            sys.stdout.flush()


class JsonView:
    """Writes one event per line as JSON in UTF-8, and nothing else."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()

    def apply(self, event: Event) -> None:
        """Write the event."""
        sys.stdout.buffer.write(self._encoder.encode(event) + b"\n")
        sys.stdout.buffer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
