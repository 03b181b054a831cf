"""Byte-level BPE tokenizers: how each kind cuts text into words before it merges pairs.

A vocabulary does not say this, and cutting differently gives other ids than the model was trained
with, so that a kind is known by its name or not read at all. The names are llama.cpp's
(`tokenizer.ggml.pre`); the words are those of the tokenizer.json that the models are published
with, and of llama.cpp for "default", which none is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from d2f_stream.core.errors import MissingExtra

__all__ = ["KINDS", "ByteLevelKind", "byte_level", "library"]

_GPT2: Final = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3: Final = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteLevelKind:
    """How text becomes words.

    Attributes:
        cuts: regular expressions, each applied to the pieces that those before it left.
        composes: characters first, as Unicode's NFC.
        keeps_words: a word that is a token stays one, whatever the merges would make of it.
    """

    cuts: tuple[str, ...]
    composes: bool = False
    keeps_words: bool = False


KINDS: Final[Mapping[str, ByteLevelKind]] = {
    "default": ByteLevelKind(cuts=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": ByteLevelKind(cuts=(_GPT2,)),
    "llama-bpe": ByteLevelKind(cuts=(_LLAMA3,), keeps_words=True),
    "qwen2": ByteLevelKind(cuts=(_QWEN2,), composes=True),
    "smollm": ByteLevelKind(cuts=(r"\p{N}", _GPT2)),
}


def byte_level(kind: ByteLevelKind, model: Any) -> Any:
    """Return a tokenizer over a BPE model of the tokenizers library.

    Raises:
        MissingExtra: tokenizers is not installed.
    """
    parts = library()
    tokens = parts.Tokenizer(model)
    if kind.composes:
        tokens.normalizer = parts.normalizers.NFC()
    cuts = [parts.pre_tokenizers.Split(parts.Regex(cut), behavior="isolated") for cut in kind.cuts]
    bytes_ = parts.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.pre_tokenizer = parts.pre_tokenizers.Sequence([*cuts, bytes_])
    tokens.decoder = parts.decoders.ByteLevel()
    return tokens


def library() -> Any:
    """Return the tokenizers library.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtra("reading a tokenizer", "tokenizers", "edge") from error
    return tokenizers
