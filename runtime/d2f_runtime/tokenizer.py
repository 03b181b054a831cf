"""Tokenizer: tokenizer.json and a chat template, without transformers.

Knows the two files and their libraries, both imported here and only when a model is loaded. Chat
templates come with models from anywhere, so they run in jinja2's immutable sandbox, with the
settings and helpers that transformers gives them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol, Self

from d2f_stream.errors import InvalidPrompt, MissingExtra, ModelDamaged, ModelNotFound

__all__ = ["TextCodec", "Tokenizer"]

Messages = Sequence[Mapping[str, str]]


class TextCodec(Protocol):
    """Turns text into token ids and back. Safe to call from several threads at once."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of exactly this text: nothing is added to it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids without special tokens; incomplete UTF-8 as U+FFFD."""
        ...

    def render(self, messages: Messages) -> str:
        """Return the prompt that the model's chat template makes of the messages."""
        ...


class Tokenizer:
    """A model folder's tokenizer.json, and its chat template where it has one.

    Nothing is added to a text: a BOS that a model wants stands in its template, or in the prompt,
    and the names of special tokens are read as those tokens.
    """

    def __init__(self, path: Path, *, chat_template: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Tokens
        except ImportError as error:
            raise MissingExtra("reading tokenizer.json", "tokenizers", "edge") from error
        if not path.is_file():
            raise ModelNotFound(f"no tokenizer at {path}; a model folder needs a tokenizer.json")
        try:
            self._tokens = Tokens.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for every kind of damage
            raise ModelDamaged(f"{path} is not a tokenizer.json: {error}") from error
        self._special_names: dict[str, str] = {}
        self._render: Callable[..., str] | None = None
        if chat_template is not None:
            self._render = _compile_template(chat_template)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read tokenizer.json, and chat_template.jinja and tokenizer_config.json where they exist.

        Raises:
            ModelNotFound: there is no tokenizer.json.
            ModelDamaged: one of the files cannot be read.
            MissingExtra: tokenizers or jinja2 is not installed.
        """
        config = _read_config(folder / "tokenizer_config.json")
        template_path = folder / "chat_template.jinja"
        template = config.get("chat_template")
        if template_path.is_file():
            template = template_path.read_text(encoding="utf-8")
        tokenizer = cls(
            folder / "tokenizer.json",
            chat_template=template if isinstance(template, str) else None,
        )
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = config.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                tokenizer._special_names[name] = text
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of exactly this text."""
        ids: list[int] = self._tokens.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens left out."""
        text: str = self._tokens.decode(list(ids), skip_special_tokens=True)
        return text

    def render(self, messages: Messages) -> str:
        """Return the prompt for an answer to the messages.

        Raises:
            InvalidPrompt: the model has no chat template, or it refuses these messages.
        """
        if self._render is None:
            raise InvalidPrompt("the model has no chat template; pass the prompt as one string")
        from jinja2 import TemplateError

        try:
            return self._render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                **self._special_names,
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidPrompt(f"the chat template refuses the messages: {error}") from error


def _read_config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelDamaged(f"{path} is not valid JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _compile_template(source: str) -> Callable[..., str]:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtra("a chat template", "jinja2", "edge") from error

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    def tojson(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja2's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source).render
    except TemplateError as error:
        raise ModelDamaged(f"the chat template cannot be read: {error}") from error
