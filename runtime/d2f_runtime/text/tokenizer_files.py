"""What the tokenizer files of a model folder say: vocabulary, added and special tokens, template.

Plain JSON, no library: who has to build a tokenizer or look up an id reads the files through this.
Published folders hold tokenizer.json, or vocab.json and merges.txt with the added tokens in
tokenizer_config.json or added_tokens.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from d2f_stream.core.errors import ModelDamaged

__all__ = ["AddedToken", "TokenizerFiles", "Vocabulary"]

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
    """

    ids: Mapping[str, int]
    named: Mapping[str, str]
    _known: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known", frozenset(self.ids.values()))

    @property
    def size(self) -> int:
        """One past the highest id."""
        return max(self._known, default=-1) + 1

    def __contains__(self, token: int) -> bool:
        return token in self._known

    def find(self, text: str | None, *, named: str = "") -> int | None:
        """Return the id of the token that the files name so, else of the text; None without one."""
        for known in (self.named.get(named), text):
            if known is not None and known in self.ids:
                return self.ids[known]
        return None


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
        self.config = _read_object(folder / "tokenizer_config.json")

    @property
    def complete(self) -> bool:
        """Whether there is a tokenizer to be built."""
        return self.whole.is_file() or (self.vocab.is_file() and self.merges.is_file())

    def special_names(self) -> dict[str, str]:
        """Return the texts of bos_token, eos_token and so on, where they have one."""
        found: dict[str, str] = {}
        for values in (_read_object(self.folder / "special_tokens_map.json"), self.config):
            for name in SPECIAL_NAMES:
                token = values.get(name)
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str):
                    found[name] = text
        return found

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
            special = self._special_texts()
            tokens = [
                AddedToken(_id(path, token), text, special=text in special)
                for text, token in _read_object(path).items()
            ]
        return sorted(tokens, key=lambda token: token.id)

    def chat_template(self) -> str | None:
        """Return the template's source: a file of its own wins over tokenizer_config.json."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def vocabulary(self) -> Vocabulary:
        """Return all ids, those of added tokens included."""
        ids: dict[str, int] = {}
        if self.whole.is_file():
            content = _read_object(self.whole)
            model = content.get("model")
            vocab = model.get("vocab") if isinstance(model, dict) else None
            if isinstance(vocab, list):  # Unigram: [text, score] by id
                vocab = {entry[0]: index for index, entry in enumerate(vocab)}
            if not isinstance(vocab, dict):
                raise ModelDamaged(f"{self.whole} is not a tokenizer.json: it has no vocabulary")
            ids |= vocab
            ids |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        elif self.vocab.is_file():
            ids |= _read_object(self.vocab)
        ids |= {token.text: token.id for token in self.added_tokens()}
        return Vocabulary(ids, self.special_names())

    def _special_texts(self) -> set[str]:
        listed = _read_object(self.folder / "special_tokens_map.json")
        more = self.config.get("additional_special_tokens")
        more = more or listed.get("additional_special_tokens") or []
        texts = {token.get("content") if isinstance(token, dict) else token for token in more}
        return {text for text in texts if isinstance(text, str)} | set(
            self.special_names().values()
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelDamaged(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelDamaged(f"{path} holds no JSON object")
    return values


def _added_token(path: Path, key: str, facts: object) -> AddedToken:
    if not isinstance(facts, dict) or not isinstance(facts.get("content"), str):
        raise ModelDamaged(f"{path}: added token {key} is {facts!r}, without a content")
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    chosen = {name: bool(facts[name]) for name in flags if name in facts}
    return AddedToken(_id(path, key), facts["content"], **chosen)


def _id(path: Path, value: object) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ModelDamaged(f"{path}: {value!r} is no token id")
