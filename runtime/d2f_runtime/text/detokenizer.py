"""Text of an answer's final tokens, released as soon as it cannot change any more.

Owns what may be shown: holds back an incomplete UTF-8 sequence and whatever may become a stop
string. Knows no tokenizer, only a decode function. Decoding a little context before the new tokens
and taking the difference is the approach of Hugging Face TGI and vLLM.
"""

from collections.abc import Callable, Mapping, Sequence

__all__ = ["Detokenizer"]

REPLACEMENT = "\ufffd"
FIRST_STAND_IN = 0xD800  # half a pair in UTF-16, which no text holds


class Detokenizer:
    """Turns final tokens into stable text.

    The texts of all pushes and of the flush concatenate to `decode(all tokens)`, cut at the first
    stop string. NOTE: this needs a decoder whose text only grows when tokens are added, trailing
    U+FFFD aside. Sentencepiece byte fallback is none where a run of byte tokens is broken UTF-8
    (it turns the whole run into U+FFFD); such a run keeps the characters released before.

    A special token has no text of its own; where a stop string holds its name, the token is found
    as well as the same characters.

    Args:
        decode: text of a token sequence; may treat the beginning of one in a special way.
        stop: non-empty strings that end the text.
        special_tokens: ids by name of the tokens that `decode` leaves out.
    """

    def __init__(
        self,
        *,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        special_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self._decode = decode
        self._stand_ins: dict[int, str] = {}  # one character for each special token that may stop
        self._stop = self._with_stand_ins(stop, special_tokens or {})
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
        released: list[str] = []
        text: list[int] = []
        for token in tokens:
            if (stand_in := self._stand_ins.get(token)) is None:
                text.append(token)
                continue
            released += self._push(text), self._release(stand_in, is_last=False)
            text = []
        released.append(self._push(text))
        return "".join(released)

    def _push(self, tokens: Sequence[int]) -> str:
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

    def _with_stand_ins(self, stop: Sequence[str], special_tokens: Mapping[str, int]) -> list[str]:
        """Return the strings, and those that name special tokens with these in their place too."""
        replaced = list(stop)
        for name in sorted(special_tokens, key=len, reverse=True):
            if name and any(name in text for text in replaced):
                stand_in = chr(FIRST_STAND_IN + len(self._stand_ins))
                self._stand_ins[special_tokens[name]] = stand_in
                replaced = [text.replace(name, stand_in) for text in replaced]
        return [*stop, *(text for text in replaced if text not in stop)]

    def _release(self, new: str, *, is_last: bool) -> str:
        if self._stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        open_at = len(text) if is_last else self._first_open(text)
        if found and min(found) <= open_at:  # else an earlier, longer one may still come true
            self._stopped = True
            self._held = ""
            return self._visible(text[: min(found)])
        self._held = text[open_at:]
        return self._visible(text[:open_at])

    def _visible(self, text: str) -> str:
        for stand_in in self._stand_ins.values():
            text = text.replace(stand_in, "")
        return text

    def _first_open(self, text: str) -> int:
        """Return where the first beginning of a stop string lies that reaches the end."""
        for at in range(max(0, len(text) - self._max_held), len(text)):
            if any(stop.startswith(text[at:]) for stop in self._stop):
                return at
        return len(text)
