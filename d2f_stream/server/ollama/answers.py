"""From a stream's events to the lines of Ollama's API, and to its whole answers. Pure."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from d2f_stream.core.events import Block, FinishReason, StreamFinished
from d2f_stream.server.openai.token_logprobs import Token, TokenLine, chat_logprobs

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
        logprobs: whether the log-probability of each token is told.
    """

    dialect: Dialect
    model: str
    logprobs: bool = False
    _tokens: TokenLine = field(default_factory=TokenLine)

    def line(self, block: Block) -> bytes:
        """Return the line of a block; nothing for one without text."""
        tokens = self._tokens.take(block) if self.logprobs else []
        if not block.text:
            return b""
        return _encoded({**self._text(block.text), **self._told(tokens), "done": False})

    def last(self, end: StreamFinished) -> bytes:
        """Return the last line of a stream."""
        tokens = self._tokens.end(end) if self.logprobs else []
        told = self._told(tokens) if tokens else {}
        return _encoded({**self._text(""), **told, **_figures(end)})

    def whole(self, blocks: list[Block], end: StreamFinished) -> bytes:
        """Return an answer that is not streamed."""
        text = "".join(block.text for block in blocks)
        tokens: list[Token] = []
        if self.logprobs:
            tokens = [token for block in blocks for token in self._tokens.take(block)]
            tokens += self._tokens.end(end)
        return _encoded({**self._text(text), **self._told(tokens), **_figures(end)})

    def nothing(self) -> bytes:
        """Return the answer to a request that asks for nothing: the model is loaded."""
        return _encoded({**self._text(""), "done": True, "done_reason": "load"})

    def _told(self, tokens: list[Token]) -> dict[str, object]:
        return {"logprobs": chat_logprobs(tokens).content} if self.logprobs else {}

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
