"""Tokenizer: a folder's tokenizer files and its chat template, without transformers.

Knows the libraries for both, imported here and only when a model is loaded. Chat templates come
with models from anywhere, so they run in jinja2's immutable sandbox and in bounded time, with the
settings and helpers that transformers gives them.
"""

import functools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol, Self

from d2f_runtime.gguf.file import GgufFile, is_gguf
from d2f_runtime.text.bounded_template import bound_environment, compile_bounded
from d2f_runtime.text.byte_level import KINDS, byte_level, library
from d2f_runtime.text.files import holds_file, read_bytes, read_object, read_text
from d2f_runtime.text.gguf_tokens import GgufTokens
from d2f_runtime.text.tokenizer_files import TokenizerFiles
from d2f_stream.core.errors import (
    InvalidPrompt,
    MissingExtra,
    ModelDamaged,
    ModelNotFound,
    NoChatTemplate,
    UnsupportedModel,
)

__all__ = ["TextCodec", "Tokenizer", "token_source"]

Messages = Sequence[Mapping[str, str]]

LONG_TEXT: Final = 4096  # characters

QWEN_CLASSES: Final = (None, "DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")


class TextCodec(Protocol):
    """Turns text into token ids and back. Safe to call from several threads at once."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The tokens that `decode` leaves out: ids by text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of exactly this text: nothing is added to it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids without special tokens; incomplete UTF-8 as U+FFFD."""
        ...

    @property
    def longest_token(self) -> int:
        """Characters of the longest token, for a bound of a text's tokens before it is encoded."""
        ...

    def render(self, messages: Messages) -> str:
        """Return the prompt that the model's chat template makes of the messages."""
        ...


class Tokenizer:
    """A model folder's tokenizer, and its chat template where it has one.

    Nothing is added to a text: a BOS that a model wants stands in its template, or in the prompt,
    and the names of special tokens are read as those tokens; that of the mask is read as text.

    Args:
        source: a tokenizer.json, all files of a folder, or the tokens of a GGUF file.
        chat_template: its source.
        mask_id: never what a text is read as; None where there is no mask.

    Attributes:
        special_names: texts of bos_token, eos_token and so on, as the folder's files give them.
        special_tokens: ids of all special tokens, by text.
    """

    def __init__(
        self,
        source: Path | TokenizerFiles | GgufTokens,
        *,
        chat_template: str | None = None,
        mask_id: int | None = None,
    ) -> None:
        self.special_names: Mapping[str, str] = {}
        if isinstance(source, TokenizerFiles):
            self._tokens, where = _build_tokenizer(source), source.folder
            self.special_names = source.special_names()
        elif isinstance(source, GgufTokens):
            self._tokens, where = source.build(), source.path
            self.special_names = source.special_names()
        elif holds_file(source):
            self._tokens, where = _read_tokenizer(source), source
        else:
            raise ModelNotFound(f"no tokenizer at {source}; a model folder needs a tokenizer.json")
        added = self._tokens.get_added_tokens_decoder()
        self.special_tokens: Mapping[str, int] = {
            token.content: number for number, token in added.items() if token.special
        }
        self._mask_id = mask_id
        self._render: Callable[..., str] | None = None
        if chat_template is not None:
            self._render = _compile_template(chat_template, where)

    @classmethod
    def from_folder(cls, folder: Path, *, mask_id: int | None = None) -> Self:
        """Read a folder's tokenizer files and its chat template, or those that a GGUF file holds.

        The tokenizer is tokenizer.json or, as the Dream models publish it, vocab.json with
        merges.txt; added tokens also come from tokenizer_config.json or added_tokens.json.

        Raises:
            ModelNotFound: there is no tokenizer.
            ModelDamaged: one of the files cannot be read.
            UnsupportedModel: vocab.json or the GGUF file is of a tokenizer that this build does not
                know.
            MissingExtra: tokenizers or jinja2 is not installed.
        """
        source = token_source(folder)
        return cls(source, chat_template=source.chat_template(), mask_id=mask_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of exactly this text."""
        ids = _ids_of(self._tokens, text)
        if self._mask_id is not None and self._mask_id in ids:
            ids = _ids_of(self._without_mask, text)
        return ids

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._tokens.get_vocab()), default=1)

    @functools.cached_property
    def _without_mask(self) -> Any:
        """The same tokenizer, in which no text is the mask's; made where a text names the mask."""
        assert self._mask_id is not None
        return _nameless(self._tokens, self._mask_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens left out."""
        text: str = self._tokens.decode(list(ids), skip_special_tokens=True)
        return text

    def render(self, messages: Messages) -> str:
        """Return the prompt for an answer to the messages.

        Raises:
            NoChatTemplate: the model has none.
            InvalidPrompt: its template refuses these messages.
        """
        if self._render is None:
            raise NoChatTemplate("the model has no chat template; pass the prompt as one string")
        from jinja2 import TemplateError

        try:
            return self._render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self.special_names,
            )
        except InvalidPrompt:
            raise
        except (
            *(TemplateError, TypeError, ValueError, LookupError, ArithmeticError),
            *(AttributeError, RecursionError, MemoryError),
        ) as error:
            raise InvalidPrompt(f"the chat template refuses the messages: {error}") from error


def token_source(model: Path) -> TokenizerFiles | GgufTokens:
    """Return what a folder's files or a GGUF file say of their tokenizer, which is not built yet.

    Raises:
        ModelNotFound: there is no tokenizer.
        ModelDamaged, UnsupportedModel: see `GgufFile.open` and `GgufTokens`.
    """
    if is_gguf(model):
        return GgufTokens(GgufFile.open(model))
    files = TokenizerFiles(model)
    if not files.complete:
        raise ModelNotFound(
            f"no tokenizer in {model}; a model folder needs a tokenizer.json, or a vocab.json and "
            "a merges.txt"
        )
    return files


def _ids_of(tokens: Any, text: str) -> list[int]:
    if len(text) < LONG_TEXT:
        ids: list[int] = tokens.encode(text, add_special_tokens=False).ids
    else:  # `encode` alone holds the interpreter's lock, for half a second at 250 KB
        (found,) = tokens.encode_batch_fast([text], add_special_tokens=False)
        ids = found.ids
    return ids


def _build_tokenizer(files: TokenizerFiles) -> Any:
    tokens = _read_tokenizer(files.whole) if holds_file(files.whole) else _build_byte_level(files)
    try:
        _add_tokens(tokens, files)
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelDamaged(
            f"the added tokens of {files.folder} are damaged: {error!s:.300}"
        ) from error
    tokens.encode_special_tokens = files.splits_special_tokens
    return tokens


def _read_tokenizer(path: Path) -> Any:
    content = read_bytes(path) or b""
    parts = library()
    try:
        tokens = parts.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exception for every kind of damage
        raise ModelDamaged(f"{path} is not a tokenizer.json: {error!s:.300}") from error
    # What a trainer stored is of its batches. transformers sets both anew with every call, too.
    tokens.no_truncation()
    tokens.no_padding()
    return tokens


def _nameless(tokens: Any, token_id: int) -> Any:
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
    except Exception as error:  # see above
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


def _compile_template(source: str, where: Path) -> Callable[..., str]:
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.nodes import Node
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtra("a chat template", "jinja2", "edge") from error

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    def tojson(  # jinja2's own escapes HTML
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    class Generation(Extension):
        """Marks what the model wrote, for training; here its content is all that matters."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = bound_environment(ImmutableSandboxedEnvironment)(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return compile_bounded(environment, source)
    except TemplateError as error:
        raise ModelDamaged(f"the chat template of {where} cannot be read: {error}") from error
