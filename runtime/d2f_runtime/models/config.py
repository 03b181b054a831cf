"""The shape of a block-causal transformer, for every supported family. Plain Python, no torch."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from d2f_runtime.models.facts import FAMILIES, CommitAttention, PromptAttention
from d2f_stream.core.errors import UnsupportedModel

__all__ = ["Llama3Rope", "TransformerConfig"]


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3.1's stretching of the rotary frequencies: the slow by `factor`, the fast not at all.

    Attributes:
        factor: by how much wavelengths beyond the trained context are stretched.
        low_freq_factor: wavelengths above the trained context divided by this are stretched fully.
        high_freq_factor: those below the trained context divided by this stay as they are.
        trained_len: the context before stretching, tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    trained_len: int


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Sizes and switches of one decoder-only transformer (RMSNorm, rotary positions, SwiGLU).

    Attributes:
        family: one of FAMILIES; a label only, the switches decide.
        vocab_size: rows of the embedding and the head.
        num_tokens: ids that may be produced; rows beyond are padding and forbidden.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_size: sizes.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched beyond the first training; None leaves them.
        norm_eps: epsilon of every RMSNorm.
        qkv_bias: biases on the q, k and v projections (Qwen2, Dream).
        qk_norm: RMSNorm over the head dimension of queries and keys (Qwen3, SDAR).
        tie_embeddings: the head is the embedding.
        shift_logits: row i-1 predicts position i.
        prompt_attention: who sees whom inside a prompt; see ModelInfo.
        commit_attention: who sees whom when a block is cached; see ModelInfo.
        mask_id: id of the mask token, never produced.
        eos_ids: ids that end an answer.
        native_block_size: block size of training, tokens.
        max_block_size: largest block size to be asked for, tokens.
        max_len: prompt and answer, tokens.
    """

    family: str
    vocab_size: int
    num_tokens: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    mask_id: int
    eos_ids: tuple[int, ...]
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    shift_logits: bool = False
    prompt_attention: PromptAttention = "full"
    native_block_size: int = 32
    max_block_size: int = 64
    max_len: int = 4096
    rope_scaling: Llama3Rope | None = None
    commit_attention: CommitAttention = "block"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        values = asdict(self) | {"eos_ids": list(self.eos_ids)}
        if self.rope_scaling is None:
            del values["rope_scaling"]  # so that older builds read it
        if self.commit_attention == "block":
            del values["commit_attention"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TransformerConfig":
        """Build a config from `to_dict`'s values.

        Raises:
            UnsupportedModel: for a family or a key that this build does not know, or a key that is
                missing.
        """
        family = values.get("family")
        if family not in FAMILIES:
            families = ", ".join(FAMILIES)
            raise UnsupportedModel(f"model family is {family!r} but must be one of {families}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UnsupportedModel(f"model config has the unknown key {unknown[0]!r}")
        scaling = values.get("rope_scaling")
        try:
            rope = None if scaling is None else Llama3Rope(**scaling)
            changed = {"eos_ids": tuple(values["eos_ids"]), "rope_scaling": rope}
            return cls(**(values | changed))
        except (KeyError, TypeError) as exc:
            raise UnsupportedModel(f"model config is incomplete: {exc}") from exc

    @property
    def kv_bytes_per_token(self) -> int:
        """K/V elements of one position over all layers, times four bytes (fp32)."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * 4
