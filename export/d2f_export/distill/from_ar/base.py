"""ArBase: the autoregressive model that drafts are trained for, without its weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from d2f_runtime.gguf.file import is_gguf
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.hub import HubModel, fetch_description, fetch_weights, locate
from d2f_runtime.models.stored_weights import read_config
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.errors import InvalidRequest, NoChatTemplate, UnsupportedModel

__all__ = ["MARK", "ArBase", "free_mask_id", "open_ar_base"]

WEIGHTS_FILE: Final = "model.safetensors"
MARK: Final = "\u2063\u2063"  # a text that no template writes


@dataclass(frozen=True, slots=True)
class ArBase:
    """What a training has to know of its base.

    Attributes:
        name: for people, and what an adapter names as its base.
        path: of the folder or the GGUF file.
        family: that was said, where its files do not tell.
        config: of the model.
        codec: its tokenizer.
    """

    name: str
    path: Path
    family: str | None
    config: TransformerConfig
    codec: Tokenizer

    @property
    def end_id(self) -> int:
        """The id that ends an answer: what the chat template writes after one, if it ends one."""
        ends = self.config.eos_ids
        try:
            turns = [{"role": role, "content": MARK} for role in ("user", "assistant", "user")]
            after = self.codec.encode(self.codec.render(turns).split(MARK)[2])
        except NoChatTemplate:
            return ends[0]
        return next((token for token in after if token in ends), ends[0])

    def sha256(self) -> str | None:
        """Return the digest of the weights' file; None where there are several."""
        file = self.path if is_gguf(self.path) else self.path / WEIGHTS_FILE
        if not file.is_file():
            return None
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def open_ar_base(model: str, *, family: str | None = None) -> ArBase:
    """Find an autoregressive model, fetching it where it is on the hub; no weights are read yet.

    Raises:
        ModelNotFound: there is no such model, or it lacks its tokenizer.
        ModelDamaged: one of its files cannot be read.
        UnsupportedModel: it is not autoregressive.
    """
    source = locate(model)
    path = fetch_description(source) if isinstance(source, HubModel) else source
    config = read_config(path, family=family)
    if config.drafts_in_place:
        raise UnsupportedModel(
            f"{model} is a {config.family} model, which denoises blocks already; --from-ar takes "
            "an autoregressive one"
        )
    if not config.shift_logits or config.prompt_attention != "causal":
        raise UnsupportedModel(
            f"{model} is a {config.family} model with {config.prompt_attention} attention, but "
            "--from-ar takes an autoregressive one; distil it with --model"
        )
    codec = Tokenizer.from_folder(path)
    if isinstance(source, HubModel):
        fetch_weights(source, path)
    name = (
        str(source) if isinstance(source, HubModel) else path.stem if is_gguf(path) else path.name
    )
    return ArBase(name, path, family, config, codec)


def free_mask_id(base: ArBase) -> int:
    """Return an id that the model never says, to stand for the mask.

    A row of the table behind the vocabulary, or the last special token that neither the chat
    template writes nor the model's files give a meaning to.

    Raises:
        InvalidRequest: there is none.
    """
    config, codec = base.config, base.codec
    used = {*config.eos_ids}
    used |= {codec.special_tokens.get(name, -1) for name in codec.special_names.values()}
    try:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        used |= set(codec.encode(codec.render([*turns, turns[0]])))
    except NoChatTemplate:
        pass
    highest = max([config.num_tokens - 1, *codec.special_tokens.values()])
    if highest + 1 < config.vocab_size:
        return highest + 1
    free = [i for i in codec.special_tokens.values() if i not in used and i < config.vocab_size]
    if not free:
        raise InvalidRequest(
            f"{base.name} has no token that is free to be the mask: its {config.vocab_size} rows "
            "all have a meaning; name one that no answer of yours needs with --mask-id"
        )
    return max(free)
