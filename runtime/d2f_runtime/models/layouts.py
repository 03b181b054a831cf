"""Where a published checkpoint keeps each parameter of `Transformer`: which tensor, which part.

Most are tensors of their own. LLaDA2 keeps queries, keys and values in one, and its training
repository a whole layer's experts. LLaDA2 also turns the first dimensions of each head, where
`Transformer` turns as many of both halves: the rows of queries and keys are put in that order.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from d2f_runtime.models.config import TransformerConfig

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = ["Cut", "Layout", "Place", "place_of", "published_name"]

Layout = Literal["llada", "llada2", "llada2-merged", "llama", "nemotron", "qwen3-moe"]

_LLADA_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_LLADA_TOP: Final = {"embed_tokens": "wte", "norm": "ln_f", "lm_head": "ff_out"}

_LLADA2_LAYER: Final = {
    "self_attn.q_proj": "attention.query_key_value",
    "self_attn.k_proj": "attention.query_key_value",
    "self_attn.v_proj": "attention.query_key_value",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "self_attn.o_proj": "attention.dense",
    "mlp.router": "mlp.gate",
}
ROUTER: Final = "mlp.router"
SHARED: Final = "mlp.shared."


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a stored tensor a parameter is, and in which order.

    Attributes:
        whole: shape of the stored tensor.
        index: of a stack of matrices; None where it is none.
        first: of its rows.
        turning: for rows of heads, the size of a head and how many of its first rows turn; None
            leaves the order.
    """

    whole: tuple[int, ...]
    index: int | None = None
    first: int = 0
    turning: tuple[int, int] | None = None

    def of(self, tensor: "Tensor", num_rows: int, dtype: "dtype | None" = None) -> "Tensor":
        """Return the part, which keeps nothing of the rest alive; in a dtype, or in its own."""
        part = tensor if self.index is None else tensor[self.index]
        part = part[self.first : self.first + num_rows]
        if self.turning is None:
            return part.to(dtype or part.dtype, copy=True)
        size, turning = self.turning
        heads = part.view(-1, size, *part.shape[1:])
        return heads[:, _half_split(size, turning)].reshape(part.shape).to(dtype or part.dtype)


class Place(NamedTuple):
    """A stored tensor, and which part of it; None is all."""

    name: str
    cut: Cut | None = None


def published_name(layout: Layout, name: str) -> str:
    """Return what a family calls a parameter of `Transformer`, or the tensor that holds it.

    LLaDA has two `ff_out`: a layer's is the down projection, that of the model is the head.
    """
    if layout == "nemotron":
        head, others = "lm_head.", "diffusion_head."
        return name.replace(head, others) if name.startswith(head) else f"encoder.{name}"
    module, _, leaf = name.rpartition(".")
    if not module.startswith("layers."):
        if layout == "llada":
            return f"model.transformer.{_LLADA_TOP[module]}.{leaf}"
        if name.startswith("lm_head."):
            return name
        if module == "embed_tokens" and layout.startswith("llada2"):
            return f"model.word_embeddings.{leaf}"
        return f"model.{name}"
    _, index, inner = module.split(".", 2)
    if layout == "llada":
        return f"model.transformer.blocks.{index}.{_LLADA_LAYER[inner]}.{leaf}"
    if layout.startswith("llada2"):
        inner = _LLADA2_LAYER.get(inner, inner).replace(SHARED, "mlp.shared_experts.")
        leaf = "expert_bias" if inner == "mlp.gate" and leaf == "bias" else leaf
        if layout == "llada2-merged" and inner.startswith("mlp.experts."):
            return f"model.layers.{index}.mlp.experts.{inner.rpartition('.')[2]}"
    elif inner == ROUTER:
        inner = "mlp.gate"
    return f"model.layers.{index}.{inner}.{leaf}"


def place_of(layout: Layout, name: str, shape: tuple[int, ...], config: TransformerConfig) -> Place:
    """Return where a checkpoint of the layout has a parameter.

    Args:
        layout: of the checkpoint.
        name: of the parameter.
        shape: of the parameter.
        config: of the model.
    """
    stored = published_name(layout, name)
    if not layout.startswith("llada2"):
        return Place(stored)
    part = name.split(".")[-2]
    turning = None
    if config.rotary_dim and part in ("q_proj", "k_proj", "q_norm", "k_norm"):
        turning = config.head_dim, config.rotary_dim
    if part in ("q_proj", "k_proj", "v_proj"):
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        first = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}[part]
        return Place(stored, Cut((queries + 2 * keys, *shape[1:]), first=first, turning=turning))
    if turning is not None:
        return Place(stored, Cut(shape, turning=turning))
    if layout == "llada2-merged" and ".experts." in name and config.mixture is not None:
        index = int(name.split(".")[-3])
        return Place(stored, Cut((config.mixture.num_experts, *shape), index=index))
    return Place(stored)


def _half_split(size: int, turning: int) -> list[int]:
    """Return the order in which the dimensions that turn begin each half of a head."""
    half, still = turning // 2, (size - turning) // 2
    first = [*range(half), *range(turning, turning + still)]
    second = [*range(half, turning), *range(turning + still, size)]
    return first + second
