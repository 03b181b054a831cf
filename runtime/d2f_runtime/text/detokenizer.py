"""Text of an answer's final tokens, released as soon as it cannot change any more.

Owns what may be shown: holds back an incomplete UTF-8 sequence and whatever may become a stop
string. Knows no tokenizer, only a decode function. Decoding a little context before the new tokens
and taking the difference is the approach of Hugging Face TGI and vLLM.
"""

from collections.abc import Callable, Sequence

__all__ = ["Detokenizer"]

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns final tokens into stable text.

    The texts of all pushes and of the flush concatenate to `decode(all tokens)`, cut at the first
    stop string. NOTE: this needs a decoder whose text only grows when tokens are added, trailing
    U+FFFD aside. Sentencepiece byte fallback is none where a run of byte tokens is broken UTF-8
    (it turns the whole run into U+FFFD); such a run keeps the characters released before.

    Args:
        decode: text of a token sequence; may treat the beginning of one in a special way.
        stop: non-empty strings that end the text.
    """

    def __init__(self, *, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._max_held = max(map(len, self._stop), default=1) - 1
        self._tokens: list[int] = []  # context, then what is not read yet
        self._num_context = 0
        self._num_released = 0  # characters of decode(self._tokens) that went to the stop search
        self._held = ""  # decoded text that may begin a stop string
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the text before it is out, the rest is dropped."""
        return self._stopped

    def push(self, tokens: Sequence[int]) -> str:
        """Take final tokens, without EOS and other special ones; return the newly stable text."""
        if self._stopped or not tokens:
            return ""
        self._tokens.extend(tokens)
        text = self._decode(self._tokens)
        stable = text.rstrip(REPLACEMENT)
        new = stable[self._num_released :]
        self._num_released = max(self._num_released, len(stable))
        if len(stable) == len(text) and new.strip():
            self._advance()
        return self._release(new, is_last=False)

    def flush(self) -> str:
        """End the text; return what was held back. It may find a stop string; push no more."""
        if self._stopped:
            return ""
        new = self._decode(self._tokens)[self._num_released :]
        self._num_released += len(new)
        return self._release(new, is_last=True)

    def _advance(self) -> None:
        # The tokens read last become the context. They hold visible text, so whatever the decoder
        # does to the beginning of a sequence, it does within them.
        del self._tokens[: self._num_context]
        self._num_context = len(self._tokens)
        self._num_released = len(self._decode(self._tokens))

    def _release(self, new: str, *, is_last: bool) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        open_at = len(text) if is_last else self._first_open(text)
        if found and min(found) <= open_at:  # else an earlier, longer one may still come true
            self._stopped = True
            self._held = ""
            return text[: min(found)]
        self._held = text[open_at:]
        return text[:open_at]

    def _first_open(self, text: str) -> int:
        """Return where the first beginning of a stop string lies that reaches the end."""
        for at in range(max(0, len(text) - self._max_held), len(text)):
            if any(stop.startswith(text[at:]) for stop in self._stop):
                return at
        return len(text)
