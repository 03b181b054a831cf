"""The shape of a block-causal transformer, for every supported family. Plain Python, no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import msgspec

from d2f_runtime.models.facts import FAMILIES, ModelFacts
from d2f_runtime.models.mixture_config import MixtureConfig
from d2f_runtime.models.rope_scaling import (
    RopeScaling,
    rope_from_dict,
    rope_to_dict,
)
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = ["TransformerConfig"]

MAX_SIZE: Final = 2**31 - 1  # of any count; what is larger is no model's
_COUNTS: Final = (
    "vocab_size", "num_tokens", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
    "head_dim", "ffn_size", "native_block_size", "max_block_size", "max_len",
)  # fmt: skip
MAX_WEIGHT: Final = 2**40  # elements of one matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig(ModelFacts):
    """Sizes and switches of one decoder-only transformer (RMSNorm, rotary positions, SwiGLU).

    Attributes:
        vocab_size: rows of the embedding and the head.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_size: sizes.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched beyond the first training; None leaves them.
        rotary_dim: how many dimensions of a head turn, half of them at the beginning of each half
            of the head; 0 is all.
        mixture: the experts of the layers' feed-forward; None is a dense one in each layer.
        norm_eps: epsilon of every RMSNorm.
        qkv_bias: biases on the q, k and v projections (Qwen2, Dream).
        qk_norm: RMSNorm over the head dimension of queries and keys (Qwen3, SDAR).
        tie_embeddings: the head is the embedding.
        unnamed_ids: ids below `num_tokens` that the tokenizer has no text for; never produced.

    Raises:
        ModelDamaged: no transformer has such sizes, or an id is of none of its tokens.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    rope_scaling: RopeScaling | None = None
    rotary_dim: int = 0
    mixture: MixtureConfig | None = None
    unnamed_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not 1 <= value <= MAX_SIZE:
                raise ModelDamaged(f"model config: {name} is {value}, not from 1 to {MAX_SIZE}")
        if self.num_heads % self.num_kv_heads:
            raise ModelDamaged(
                f"model config: {self.num_heads} heads cannot share {self.num_kv_heads} key and "
                "value heads evenly"
            )
        if self.head_dim % 2:
            raise ModelDamaged(
                f"model config: a head of {self.head_dim} has no halves for rotary positions"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ModelDamaged(
                f"model config: {self.rotary_dim} dimensions of a head of {self.head_dim} cannot "
                "turn in pairs"
            )
        widest = max(self.vocab_size, self.ffn_size, self.num_heads * self.head_dim)
        if widest * self.hidden_size > MAX_WEIGHT:
            raise ModelDamaged(
                f"model config: a matrix of {widest} x {self.hidden_size} is no model's"
            )
        for number in (self.rope_theta, self.norm_eps):
            if not (math.isfinite(number) and number > 0):
                raise ModelDamaged(f"model config: rope_theta or norm_eps is {number}")
        if self.num_tokens > self.vocab_size:
            raise ModelDamaged(
                f"model config: {self.num_tokens} ids may be produced, but {self.vocab_size} are "
                "embedded"
            )
        if not self.eos_ids or min(self.eos_ids) < 0:
            raise ModelDamaged(
                f"model config: the EOS ids are {self.eos_ids}, but a model needs one that ends an "
                "answer"
            )
        if not 0 <= self.mask_id <= MAX_SIZE:  # a draft adapter's lies beyond the vocabulary
            raise ModelDamaged(f"model config: the mask id is {self.mask_id}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        values = asdict(self) | {"eos_ids": list(self.eos_ids)}
        del values["rope_scaling"]  # absent where there is none, so that older builds read it
        if self.rope_scaling is not None:
            values["rope_scaling"] = rope_to_dict(self.rope_scaling)
        if self.mixture is None:
            del values["mixture"]
        if not self.rotary_dim:
            del values["rotary_dim"]
        if self.commit_attention == "block":
            del values["commit_attention"]
        if not self.drafts_in_place:
            del values["drafts_in_place"]
        del values["unnamed_ids"]
        if self.unnamed_ids:
            values["unnamed_ids"] = list(self.unnamed_ids)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """Build a config from `to_dict`'s values.

        Raises:
            UnsupportedModel: for a family or a key that this build does not know, or a key that is
                missing.
            ModelDamaged: for a value of the wrong kind.
        """
        values = {key: value for key, value in values.items() if value is not None}
        family = values.get("family")
        if family not in FAMILIES:
            families = ", ".join(FAMILIES)
            raise UnsupportedModel(f"model family is {family!r:.100} but must be one of {families}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UnsupportedModel(f"model config has the unknown key {unknown[0]!r:.100}")
        if "rope_scaling" in values:
            values["rope_scaling"] = rope_from_dict(values["rope_scaling"])
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            if "missing required field" in str(error):
                raise UnsupportedModel(f"model config is incomplete: {error!s:.300}") from error
            raise ModelDamaged(f"model config: {error!s:.300}") from error

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Ids below `num_tokens` that must never be produced."""
        mask = (self.mask_id,) if self.mask_id < self.num_tokens else ()
        return (*mask, *self.unnamed_ids)

    @property
    def kv_bytes_per_token(self) -> int:
        """K/V elements of one position over all layers, times four bytes (fp32)."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * 4
