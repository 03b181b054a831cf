"""Tokenizer: a folder's tokenizer files and its chat template, without transformers.

The libraries for both are imported only when a model is loaded.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, Self

from d2f_runtime.gguf.file import GgufFile, is_gguf
from d2f_runtime.text.chat_template import compile_template
from d2f_runtime.text.files import holds_file
from d2f_runtime.text.folder_tokens import build_tokens, nameless, read_tokens
from d2f_runtime.text.gguf_tokens import GgufTokens
from d2f_runtime.text.tokenizer_files import TokenizerFiles
from d2f_stream.core.errors import InvalidPrompt, ModelNotFound, NoChatTemplate

__all__ = ["TextCodec", "Tokenizer", "token_source"]

Messages = Sequence[Mapping[str, str]]

LONG_TEXT: Final = 4096  # characters


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

    @property
    def chats(self) -> bool:
        """Whether a prompt that is a string is a user's turn, to be rendered."""
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
        opens_thoughts: whether the template may begin an answer with thoughts.

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
        opens_thoughts: bool = True,
    ) -> None:
        self.special_names: Mapping[str, str] = {}
        if isinstance(source, TokenizerFiles):
            self._tokens, where = build_tokens(source), source.folder
            self.special_names = source.special_names()
        elif isinstance(source, GgufTokens):
            self._tokens, where = source.build(), source.path
            self.special_names = source.special_names()
        elif holds_file(source):
            self._tokens, where = read_tokens(source), source
        else:
            raise ModelNotFound(f"no tokenizer at {source}; a model folder needs a tokenizer.json")
        added = self._tokens.get_added_tokens_decoder()
        self.special_tokens: Mapping[str, int] = {
            token.content: number for number, token in added.items() if token.special
        }
        self._mask_id = mask_id
        # By the name that Qwen's templates have for it; what leaves it out goes by the template.
        self._settings: Mapping[str, object] = {} if opens_thoughts else {"enable_thinking": False}
        self._render: Callable[..., str] | None = None
        if chat_template is not None:
            self._render = compile_template(chat_template, where)

    @classmethod
    def from_folder(
        cls, folder: Path, *, mask_id: int | None = None, opens_thoughts: bool = True
    ) -> Self:
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
        template = source.chat_template()
        return cls(source, chat_template=template, mask_id=mask_id, opens_thoughts=opens_thoughts)

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

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._render is not None

    @functools.cached_property
    def _without_mask(self) -> Any:
        """The same tokenizer, in which no text is the mask's; made where a text names the mask."""
        assert self._mask_id is not None
        return nameless(self._tokens, self._mask_id)

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
                **self._settings,
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
