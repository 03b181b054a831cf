"""The tokens of a model folder: what the tokenizers library makes of its files."""

import json
import secrets
from pathlib import Path
from typing import Any, Final

from d2f_runtime.text.byte_level import KINDS, byte_level, library
from d2f_runtime.text.files import holds_file, read_bytes, read_object, read_text
from d2f_runtime.text.tokenizer_files import TokenizerFiles
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["build_tokens", "nameless", "read_tokens"]

QWEN_CLASSES: Final = (None, "DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")


def build_tokens(files: TokenizerFiles) -> Any:
    """Return the tokenizer that all files of a folder describe together.

    Raises:
        ModelDamaged: one of them cannot be read.
        UnsupportedModel: vocab.json is of a tokenizer that this build does not know.
        MissingExtra: tokenizers is not installed.
    """
    tokens = read_tokens(files.whole) if holds_file(files.whole) else _build_byte_level(files)
    try:
        _add_tokens(tokens, files)
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelDamaged(
            f"the added tokens of {files.folder} are damaged: {error!s:.300}"
        ) from error
    tokens.encode_special_tokens = files.splits_special_tokens
    return tokens


def read_tokens(path: Path) -> Any:
    """Return the tokenizer of a tokenizer.json.

    Raises:
        ModelDamaged: it cannot be read.
        MissingExtra: tokenizers is not installed.
    """
    content = read_bytes(path) or b""
    parts = library()
    try:
        tokens = parts.Tokenizer.from_buffer(content)
    except BaseException as error:
        if not _tells_of_damage(error):
            raise
        raise ModelDamaged(f"{path} is not a tokenizer.json: {error!s:.300}") from error
    # What a trainer stored is of its batches. transformers sets both anew with every call, too.
    tokens.no_truncation()
    tokens.no_padding()
    return tokens


def _tells_of_damage(error: BaseException) -> bool:
    """Whether tokenizers raised it: bare Exception for most kinds of damage, for some it panics.

    A panic is no Exception, and its class cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _build_byte_level(files: TokenizerFiles) -> Any:
    """Build Qwen2's tokenizer, which the Dream models share, from vocab.json and merges.txt."""
    kind = files.config.get("tokenizer_class")
    if kind not in QWEN_CLASSES:
        known = ", ".join(name for name in QWEN_CLASSES if name)
        raise UnsupportedModel(
            f"{files.vocab} is of the tokenizer {kind!r}, but without a tokenizer.json this build "
            f"reads those of {known} only"
        )
    parts = library()
    vocab, merges = read_object(files.vocab) or {}, read_text(files.merges) or ""
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    try:
        model = parts.models.BPE(vocab, [tuple(line.split(" ")) for line in lines])
    except BaseException as error:
        if not _tells_of_damage(error):
            raise
        raise ModelDamaged(
            f"{files.vocab} and {files.merges.name} are not a BPE vocabulary: {error!s:.300}"
        ) from error
    return byte_level(KINDS["qwen2"], model)


def _add_tokens(tokens: Any, files: TokenizerFiles) -> None:
    """Add what the other files name and the tokenizer lacks, under the ids that they give.

    Special tokens that are in the vocabulary become special; such as were added as others only
    where they have a name, such as eos_token, and no file describes the added ones. So transformers
    has it.
    """
    known = tokens.get_added_tokens_decoder()
    named = set() if files.describes_added else set(files.special_names().values())
    for token in files.added_tokens():
        if token.id in known:
            if token.special:
                named.add(known[token.id].content)
            continue
        added = library().AddedToken(
            token.text,
            special=token.special,
            normalized=token.normalized,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
        )
        (tokens.add_special_tokens if token.special else tokens.add_tokens)([added])
        found = tokens.token_to_id(token.text)
        if found != token.id:
            raise ModelDamaged(
                f"the added token {token.text!r} of {files.folder} should have the id {token.id}, "
                f"but the vocabulary gives it {found}"
            )
    known = tokens.get_added_tokens_decoder()
    for text in sorted(named | files.special_texts()):
        found = tokens.token_to_id(text)
        is_plain = found in known and not known[found].special
        if found is not None and (found not in known or (is_plain and text in named)):
            tokens.add_special_tokens([text])


def nameless(tokens: Any, token_id: int) -> Any:
    """Return a copy in which a token has a name that no text can hold, so that none is read so."""
    old, new = tokens.id_to_token(token_id), f"<{secrets.token_hex(16)}>"
    content = json.loads(tokens.to_str())
    for added in content["added_tokens"]:
        if added["content"] == old:
            added["content"] = new
    model = content["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[new, *more] if text == old else [text, *more] for text, *more in vocab]
    elif old in vocab:
        vocab[new] = vocab.pop(old)
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if old not in (*pair, "".join(pair))]
    renamed = library().Tokenizer.from_str(json.dumps(content))
    renamed.encode_special_tokens = tokens.encode_special_tokens
    return renamed
