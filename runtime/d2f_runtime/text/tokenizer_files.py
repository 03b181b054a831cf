"""What the tokenizer files of a model folder say: vocabulary, added and special tokens, template.

Plain JSON, no library: who has to build a tokenizer or look up an id reads the files through this.
Published folders hold tokenizer.json, or vocab.json and merges.txt with the added tokens in
tokenizer_config.json or added_tokens.json.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from d2f_runtime.text.files import holds_file, read_object, read_text
from d2f_stream.core.errors import ModelDamaged

__all__ = ["SPECIAL_NAMES", "AddedToken", "TokenizerFiles", "Vocabulary"]

MAX_ID: Final = 2**31 - 1
MAX_DIGITS: Final = 10

SPECIAL_NAMES: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the vocabulary; see transformers' and tokenizers' class of that name."""

    id: int
    text: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The ids that a tokenizer knows.

    Attributes:
        ids: by text.
        named: texts by name, such as eos_token.
        base: ids of the vocabulary itself, without added tokens.
    """

    ids: Mapping[str, int]
    named: Mapping[str, str]
    base: frozenset[int] = frozenset()
    _known: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known", self.base.union(self.ids.values()))

    @property
    def size(self) -> int:
        """One past the highest id."""
        return max(self._known, default=-1) + 1

    @property
    def base_size(self) -> int:
        """One past the highest id of the vocabulary, without added tokens."""
        return max(self.base, default=-1) + 1

    def gaps(self, stop: int) -> tuple[int, ...]:
        """Return the ids below `stop` and `size` that no text has."""
        return tuple(sorted(set(range(min(stop, self.size))) - self._known))

    def __contains__(self, token: int) -> bool:
        return token in self._known

    def find(self, text: str | None, *, named: str = "") -> int | None:
        """Return the id of the token that the files name so, else of the text; None without one."""
        for known in (self.named.get(named), text):
            if known is not None and known in self.ids:
                return self.ids[known]
        return None


NAMES: Final = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


class TokenizerFiles:
    """A folder's tokenizer files, read where they are asked for.

    Raises:
        ModelDamaged: by every method, for a file that is not what its name says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = folder / "tokenizer.json"
        self.vocab = folder / "vocab.json"
        self.merges = folder / "merges.txt"
        self.config = _object(folder / "tokenizer_config.json")

    @property
    def complete(self) -> bool:
        """Whether there is a tokenizer to be built."""
        return holds_file(self.whole) or (holds_file(self.vocab) and holds_file(self.merges))

    def write(self, folder: Path) -> None:
        """Copy the files into another folder."""
        for name in NAMES:
            if holds_file(self.folder / name):
                shutil.copyfile(self.folder / name, folder / name)

    def special_names(self) -> dict[str, str]:
        """Return the texts of bos_token, eos_token and so on, where they have one."""
        found: dict[str, str] = {}
        for values in (_object(self.folder / "special_tokens_map.json"), self.config):
            for name in SPECIAL_NAMES:
                text = _text_of(values.get(name))
                if text is not None:
                    found[name] = text
        return found

    def special_texts(self) -> set[str]:
        """Return the texts of all special tokens that have a name or are listed beside those."""
        texts = set(self.special_names().values())
        for values in (_object(self.folder / "special_tokens_map.json"), self.config):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                more = values.get(key) or ()
                listed = more.values() if isinstance(more, dict) else more
                if not isinstance(more, list | dict | tuple):
                    raise ModelDamaged(f"{self.folder}: {key} is {more!r:.100} but must be a list")
                texts |= {text for text in map(_text_of, listed) if text is not None}
        return texts

    @property
    def describes_added(self) -> bool:
        """Whether tokenizer_config.json says all about the added tokens."""
        return self.config.get("added_tokens_decoder") is not None

    @property
    def splits_special_tokens(self) -> bool:
        """Whether the names of special tokens in a text are read as any other text."""
        return bool(self.config.get("split_special_tokens"))

    def added_tokens(self) -> list[AddedToken]:
        """Return the tokens that stand beside the vocabulary, by id.

        tokenizer_config.json knows all about them, added_tokens.json only the ids.
        """
        listed = self.config.get("added_tokens_decoder")
        if isinstance(listed, dict) and listed:
            path = self.folder / "tokenizer_config.json"
            tokens = [_added_token(path, key, facts) for key, facts in listed.items()]
        else:
            path = self.folder / "added_tokens.json"
            special = self.special_texts()
            tokens = [
                AddedToken(_id(path, token), text, special=text in special)
                for text, token in _object(path).items()
            ]
        return sorted(tokens, key=lambda token: token.id)

    def chat_template(self) -> str | None:
        """Return the template's source: a file of its own wins over tokenizer_config.json."""
        alone = read_text(self.folder / "chat_template.jinja")
        if alone is not None:
            return alone
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def vocabulary(self) -> Vocabulary:
        """Return all ids, those of added tokens included."""
        ids: dict[str, int] = {}
        base: dict[str, int] = {}
        if holds_file(self.whole):
            content = _object(self.whole)
            model = content.get("model")
            vocab = model.get("vocab") if isinstance(model, dict) else None
            base = _vocab_ids(self.whole, vocab)
            added = content.get("added_tokens") or []
            if not isinstance(added, list):
                raise ModelDamaged(f"{self.whole}: added_tokens must be a list")
            for token in added:
                if not isinstance(token, dict) or not isinstance(token.get("content"), str):
                    raise ModelDamaged(f"{self.whole}: an added token is {token!r:.100}")
                ids[token["content"]] = _id(self.whole, token.get("id"))
        elif holds_file(self.vocab):
            base = _vocab_ids(self.vocab, _object(self.vocab))
        ids |= {token.text: token.id for token in self.added_tokens()}
        return Vocabulary(base | ids, self.special_names(), frozenset(base.values()))


def _object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, empty where there is no such file."""
    return read_object(path) or {}


def _vocab_ids(path: Path, vocab: object) -> dict[str, int]:
    """Return ids by text of a vocabulary: an object, or a list of text and score by id."""
    try:
        if isinstance(vocab, list):
            return {str(entry[0]): index for index, entry in enumerate(vocab)}
        if isinstance(vocab, dict):
            return {text: _id(path, token) for text, token in vocab.items()}
    except (TypeError, LookupError) as error:
        raise ModelDamaged(f"{path} has an entry of the vocabulary without a text") from error
    raise ModelDamaged(f"{path} is not a tokenizer.json: it has no vocabulary")


def _text_of(token: object) -> str | None:
    """Return the text of a token that is written as such or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _added_token(path: Path, key: str, facts: object) -> AddedToken:
    if not isinstance(facts, dict) or not isinstance(facts.get("content"), str):
        raise ModelDamaged(f"{path}: added token {key} is {facts!r:.100}, without a content")
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    chosen = {name: bool(facts[name]) for name in flags if name in facts}
    return AddedToken(_id(path, key), facts["content"], **chosen)


def _id(path: Path, value: object) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) <= MAX_DIGITS:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID:
        return value
    raise ModelDamaged(f"{path}: {value!r:.100} is no token id")
