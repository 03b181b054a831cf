"""From a stream's events to the lines of Ollama's API, and to its whole answers. Pure."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from d2f_stream.core.events import Block, FinishReason, StreamFinished

__all__ = ["AnswerWriter", "timestamp"]

Dialect = Literal["chat", "generate"]
DONE: Final[dict[FinishReason, str]] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "cancelled": "stop",
}
NS_PER_MS: Final = 1_000_000


def timestamp() -> str:
    """Return the time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@dataclass(slots=True, kw_only=True)
class AnswerWriter:
    """Writes one answer: a line for each committed block, then a last one with the figures.

    Attributes:
        dialect: whose shape.
        model: as the client called it.
    """

    dialect: Dialect
    model: str

    def line(self, block: Block) -> bytes:
        """Return the line of a block."""
        return _encoded({**self._text(block.text), "done": False})

    def last(self, end: StreamFinished) -> bytes:
        """Return the last line of a stream."""
        return _encoded({**self._text(""), **_figures(end)})

    def whole(self, text: str, end: StreamFinished) -> bytes:
        """Return an answer that is not streamed."""
        return _encoded({**self._text(text), **_figures(end)})

    def nothing(self) -> bytes:
        """Return the answer to a request that asks for nothing: the model is loaded."""
        return _encoded({**self._text(""), "done": True, "done_reason": "load"})

    def _text(self, text: str) -> dict[str, object]:
        head: dict[str, object] = {"model": self.model, "created_at": timestamp()}
        if self.dialect == "chat":
            return {**head, "message": {"role": "assistant", "content": text}}
        return {**head, "response": text}


def _figures(end: StreamFinished) -> dict[str, object]:
    total = int(end.timings.total_ms * NS_PER_MS)
    first = int((end.timings.first_block_ms or end.timings.total_ms) * NS_PER_MS)
    return {
        "done": True,
        "done_reason": DONE[end.reason],
        "total_duration": total,
        "load_duration": 0,
        "prompt_eval_count": end.usage.prompt_tokens,
        "prompt_eval_duration": first,
        "eval_count": end.usage.completion_tokens,
        "eval_duration": total - first,
    }


def _encoded(values: dict[str, object]) -> bytes:
    return msgspec.json.encode(values) + b"\n"
