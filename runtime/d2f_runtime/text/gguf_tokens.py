"""GgufTokens: the tokenizer of a GGUF file, as its metadata describes it.

What `TokenizerFiles` is to a folder. Only byte-level BPE is read, and of it only the kinds whose
words are known; every other tokenizer is refused by its name.
"""

import json
import logging
from pathlib import Path
from typing import Any, Final

from d2f_runtime.gguf.file import GgufFile
from d2f_runtime.text.byte_level import KINDS, byte_level, library
from d2f_runtime.text.tokenizer_files import Vocabulary
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["GgufTokens"]

logger = logging.getLogger("d2f_stream.gguf_tokens")

MODEL: Final = "gpt2"  # of tokenizer.ggml.model: byte-level BPE
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type
NAMES: Final = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # as llama.cpp spells it
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}


class GgufTokens:
    """What a GGUF file says of its tokenizer.

    Args:
        file: of the model.

    Attributes:
        path: of the file.

    Raises:
        UnsupportedModel: it is of a kind that this build does not know.
        ModelDamaged: a key is missing, of the wrong kind, or contradicts the others.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.path = file.path
        model = self._value("model")
        if model != MODEL:
            raise UnsupportedModel(
                f"{file.path} has a tokenizer of the model {model!r}, but of GGUF files this build "
                f"reads {MODEL!r} (byte-level BPE) only; use the model's folder of safetensors"
            )
        name = self._value("pre")
        if name is not None and name not in KINDS:
            known = ", ".join(KINDS)
            raise UnsupportedModel(
                f"{file.path} cuts text into words as {name!r}, but this build knows {known}; use "
                "the model's folder of safetensors"
            )
        self._name = None if name is None else str(name)
        texts = self._strings("tokens")
        types = self._value("token_type")
        if types is None:
            types = (1,) * len(texts)
        if not isinstance(types, tuple) or len(types) != len(texts):
            raise ModelDamaged(f"{file.path} has {len(texts)} tokens, but not a type for each")
        used = [index for index, kind in enumerate(types) if kind != UNUSED]
        num_used = used[-1] + 1 if used else 0  # beyond lie rows of the embedding that are padding
        self._types = types[:num_used]
        self._texts = texts[:num_used]
        if len(set(self._texts)) < len(self._texts):
            raise ModelDamaged(f"{file.path} has a token twice")
        if not self._texts:
            raise ModelDamaged(f"{file.path} has no tokens")

    def special_names(self) -> dict[str, str]:
        """Return the texts of bos_token, eos_token and so on, where they have one."""
        found: dict[str, str] = {}
        for name, key in NAMES.items():
            token = self._value(f"{key}_token_id")
            if token is None:
                continue
            if not isinstance(token, int) or not 0 <= token < len(self._texts):
                raise ModelDamaged(
                    f"{self._file.path}: tokenizer.ggml.{key}_token_id is {token!r}, but there are "
                    f"{len(self._texts)} tokens"
                )
            found[name] = self._texts[token]
        return found

    def chat_template(self) -> str | None:
        """Return the template's source."""
        template = self._file.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def vocabulary(self) -> Vocabulary:
        """Return all ids; unused rows are none."""
        ids = {
            text: index
            for index, (text, kind) in enumerate(zip(self._texts, self._types, strict=True))
            if kind != UNUSED
        }
        return Vocabulary(ids, self.special_names(), frozenset(ids.values()))

    def build(self) -> Any:
        """Return a tokenizer of the tokenizers library.

        Raises:
            MissingExtra: it is not installed.
        """
        if self._name is None:
            logger.warning(
                "%s does not say how it cuts text into words; llama.cpp's default is taken, and "
                "answers can be worse: convert the model again with a current llama.cpp",
                self._file.path,
            )
        kind = KINDS[self._name or "default"]
        merges = [tuple(pair.split(" ")) for pair in self._strings("merges")]
        parts = library()
        try:
            model = parts.models.BPE(
                {text: index for index, text in enumerate(self._texts)},
                merges,
                ignore_merges=kind.keeps_words,
            )
        except Exception as error:  # tokenizers raises bare Exception for every kind of damage
            raise ModelDamaged(
                f"{self._file.path}: its tokens and merges are not a BPE vocabulary: {error}"
            ) from error
        tokens = byte_level(kind, model)
        tokens.add_special_tokens(self._added(CONTROL, special=True))
        tokens.add_tokens(self._added(USER_DEFINED, special=False))
        return tokens

    def write(self, folder: Path) -> None:
        """Write them as a folder holds them: tokenizer.json and its config, and the template.

        Raises:
            MissingExtra: tokenizers is not installed.
        """
        text = self.build().to_str(pretty=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        config = json.dumps(self.special_names(), ensure_ascii=False, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
        template = self.chat_template()
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def _added(self, kind: int, *, special: bool) -> list[Any]:
        """Return the tokens of a type, which are found in a text before it is cut into words."""
        new = library().AddedToken
        return [
            new(text, special=special, normalized=False)
            for text, found in zip(self._texts, self._types, strict=True)
            if found == kind
        ]

    def _value(self, key: str) -> object:
        return self._file.metadata.get(f"tokenizer.ggml.{key}")

    def _strings(self, key: str) -> tuple[str, ...]:
        value = self._value(key)
        if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
            raise ModelDamaged(f"{self._file.path} has no tokenizer.ggml.{key}, a list of texts")
        return value
