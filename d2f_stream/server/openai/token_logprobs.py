"""Which tokens go with which text, and their log-probabilities in OpenAI's shapes. Pure.

Text is held back while it may still become a stop string, so a block's tokens can be ahead of its
text. A token goes out with the first piece of text that it is part of, and those behind a stop
string never do: texts of the tokens told concatenate to the text, save where that ends amid one.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec import Struct

from d2f_stream.core.events import Block, StreamFinished

__all__ = [
    "ChatLogprobs",
    "TextLogprobs",
    "Token",
    "TokenLine",
    "TokenLogprob",
    "chat_logprobs",
    "text_logprobs",
]


class TokenLogprob(Struct, frozen=True, kw_only=True):
    """One token of a chat answer; alternatives are not known here."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[None] = []


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    """Those of a message, or of what a chunk adds to it."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Struct, frozen=True, kw_only=True):
    """Those of a completion, or of a chunk of it; offsets count the answer's characters."""

    tokens: list[str]
    token_logprobs: list[float]
    text_offset: list[int]
    top_logprobs: None = None


class Token(NamedTuple):
    """A token: what it adds to the text, where, and its log-probability."""

    text: str
    start: int
    logprob: float


@dataclass(slots=True)
class TokenLine:
    """The tokens of one answer that are committed and not told yet."""

    _waiting: deque[Token] = field(default_factory=deque)
    _num_characters: int = 0  # of the texts of all tokens
    _num_told: int = 0  # of the text that is out

    def take(self, block: Block) -> list[Token]:
        """Add a block's tokens; return those that its text is made of."""
        for text, logprob in zip(block.texts, block.logprobs, strict=True):
            self._waiting.append(Token(text, self._num_characters, logprob))
            self._num_characters += len(text)
        self._num_told += len(block.text)
        told: list[Token] = []
        while self._waiting and self._waiting[0].start < self._num_told:
            told.append(self._waiting.popleft())
        return told

    def end(self, end: StreamFinished) -> list[Token]:
        """Return the tokens that are left: none behind a stop string, and never the EOS."""
        left = [] if end.reason == "stop" else list(self._waiting)
        if end.reason == "eos" and left and not left[-1].text:
            left.pop()
        self._waiting.clear()
        return left


def chat_logprobs(tokens: list[Token]) -> ChatLogprobs:
    """Return tokens in the shape of chat completions."""
    return ChatLogprobs(
        content=[
            TokenLogprob(token=t.text, logprob=t.logprob, bytes=[*t.text.encode()]) for t in tokens
        ]
    )


def text_logprobs(tokens: list[Token]) -> TextLogprobs:
    """Return tokens in the shape of text completions."""
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        text_offset=[token.start for token in tokens],
    )
