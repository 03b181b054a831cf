"""Streams: one transformer run over clean rows as its autoregressive self, and over noisy ones.

The clean rows (prompt and true answer) are causal and go through the base alone. The noisy rows go
through the base and the draft adapter, and see the clean rows' keys and values as a prefix. So two
passes do what one row [prompt | answer | noisy answer] would, but the clean pass needs no gradient,
as the base is frozen, and its final states are the teacher's.

Shapes: R rows, C clean positions of a row, N noisy ones, D hidden size, KV key/value heads, hd head
size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.rotary import rotary, rotate
from d2f_runtime.models.transformer import Transformer

__all__ = [
    "AdapterLayer",
    "AttentionMask",
    "LayerKeyValue",
    "LayerWeights",
    "Streams",
    "named_weights",
    "streams_of",
]

AttentionMask = BlockMask | Tensor
LayerKeyValue = tuple[Tensor, Tensor]  # keys and values, each [R, KV, C or N, hd], rotated


class LayerWeights(NamedTuple):
    """One layer's weights, with the products of one input joined."""

    first_norm: Tensor
    qkv: Tensor  # [(H + 2 KV) * hd, D]
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    second_norm: Tensor
    gate_up: Tensor  # [2 F, D]
    down: Tensor


class AdapterLayer(NamedTuple):
    """One layer's low-rank factors: y += (x A^T) B^T. The A of one input are joined."""

    qkv_a: Tensor  # [3 r, D]
    q_b: Tensor
    k_b: Tensor
    v_b: Tensor
    out_a: Tensor
    out_b: Tensor
    gate_up_a: Tensor  # [2 r, D]
    gate_b: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that a layer's code needs."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float


def before_attention(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    past: LayerKeyValue | None,
    weights: LayerWeights,
    adapter: AdapterLayer | None,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [R, H, T, hd], and keys and values [R, KV, P + T, hd] with the past's.

    Args:
        x: [R, T, D].
        cos: with `sin`, of the positions, [R, T, 1, hd] fp32.
        sin: see cos.
        past: keys and values that stand before the layer's own; None are none.
        weights: of the base.
        adapter: of the draft; None runs the base alone.
        shape: of the model.
    """
    rows, length, size = x.shape
    head, queries, keys = shape.head_dim, shape.num_heads, shape.num_kv_heads
    h = F.rms_norm(x, (size,), weights.first_norm, shape.eps)
    joined = F.linear(h, weights.qkv, weights.qkv_bias)
    q, k, v = torch.split(joined, [queries * head, keys * head, keys * head], dim=-1)
    if adapter is not None:
        low = F.linear(h, adapter.qkv_a).chunk(3, dim=-1)
        q = q + F.linear(low[0], adapter.q_b)
        k = k + F.linear(low[1], adapter.k_b)
        v = v + F.linear(low[2], adapter.v_b)
    q, k = q.view(rows, length, queries, head), k.view(rows, length, keys, head)
    if weights.q_norm is not None:
        q = F.rms_norm(q, (head,), weights.q_norm, shape.eps)
    if weights.k_norm is not None:
        k = F.rms_norm(k, (head,), weights.k_norm, shape.eps)
    q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
    v = v.view(rows, length, keys, head).transpose(1, 2)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    return q.contiguous(), k.contiguous(), v.contiguous()


def after_attention(
    x: Tensor, mixed: Tensor, weights: LayerWeights, adapter: AdapterLayer | None, shape: Shape
) -> Tensor:
    """Return the residual stream [R, T, D] after `mixed` [R, H, T, hd] and the feed-forward."""
    rows, length, size = x.shape
    mixed = mixed.transpose(1, 2).reshape(rows, length, -1)
    y = F.linear(mixed, weights.out)
    if adapter is not None:
        y = y + F.linear(F.linear(mixed, adapter.out_a), adapter.out_b)
    x = x + y
    h = F.rms_norm(x, (size,), weights.second_norm, shape.eps)
    gate, up = F.linear(h, weights.gate_up).chunk(2, dim=-1)
    if adapter is not None:
        low_gate, low_up = F.linear(h, adapter.gate_up_a).chunk(2, dim=-1)
        gate, up = gate + F.linear(low_gate, adapter.gate_b), up + F.linear(low_up, adapter.up_b)
    h = F.silu(gate) * up
    y = F.linear(h, weights.down)
    if adapter is not None:
        y = y + F.linear(F.linear(h, adapter.down_a), adapter.down_b)
    return x + y


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Attend by flex_attention, which skips what nobody sees."""
    return cast(Tensor, _flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]))


@cache
def _flex() -> Callable[..., Any]:
    fused: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return fused


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Attend with a [R, 1, T, S] bool mask: the reference, and what a CPU has."""
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=cast(Tensor, mask))


class Streams:
    """The layers of one model as two streams; owns no weights.

    Args:
        config: of the model.
        table: embedding, [V, D].
        head: [V, D]; the table where they are tied.
        layers: of the base.
        norm: of the final states.
        compiled: fuse each layer, which a GPU needs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        table: Tensor,
        head: Tensor,
        layers: list[LayerWeights],
        norm: Tensor,
        compiled: bool,
    ) -> None:
        self.config = config
        self.table, self.head, self.layers, self.norm = table, head, layers, norm
        self._shape = Shape(config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps)
        # Compiled apart from the attention, whose kernel was wrong inside a larger graph on a CPU.
        self._before: Callable[..., Any] = before_attention
        self._after: Callable[..., Any] = after_attention
        self._attend: Callable[..., Tensor] = attend_dense
        if compiled:
            self._before = torch.compile(before_attention, dynamic=False)
            self._after = torch.compile(after_attention, dynamic=False)
            self._attend = attend_flex

    def clean(
        self, tokens: Tensor, positions: Tensor, mask: AttentionMask
    ) -> tuple[Tensor, list[LayerKeyValue]]:
        """Run the base: final states [R, C, D] and each layer's keys and values.

        Args:
            tokens: [R, C] int64.
            positions: [R, C] int64.
            mask: who sees whom, [C, C].
        """
        x = F.embedding(tokens, self.table)
        cos, sin, _ = rotary(positions, self.config)
        cache: list[LayerKeyValue] = []
        for weights in self.layers:
            q, k, v = self._before(x, cos, sin, None, weights, None, self._shape)
            cache.append((k, v))
            x = self._after(x, self._attend(q, k, v, mask), weights, None, self._shape)
        return self._final(x), cache

    def noisy(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: list[LayerKeyValue],
        mask: AttentionMask,
        *,
        mask_id: int,
        mask_embedding: Tensor,
        adapters: list[AdapterLayer] | None,
    ) -> Tensor:
        """Run the draft: final states [R, N, D].

        Args:
            tokens: [R, N] int64; masks are `mask_id`.
            positions: [R, N] int64.
            cache: of `clean`.
            mask: who sees whom, [N, C + N].
            mask_id: the id that stands for a mask.
            mask_embedding: [D], what a mask is to the layers.
            adapters: a layer each; None drafts with the base's weights.
        """
        x = F.embedding(tokens, self.table)
        x = torch.where((tokens == mask_id)[..., None], mask_embedding.to(x.dtype), x)
        cos, sin, _ = rotary(positions, self.config)
        for index, weights in enumerate(self.layers):
            adapter = None if adapters is None else adapters[index]
            q, k, v = self._before(x, cos, sin, cache[index], weights, adapter, self._shape)
            x = self._after(x, self._attend(q, k, v, mask), weights, adapter, self._shape)
        return self._final(x)

    def _final(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.norm, self.config.norm_eps)


def named_weights(model: Transformer) -> dict[str, Tensor]:
    """Return the model's weights with the products of one input joined, by short names."""
    found: dict[str, Tensor] = {"table": model.embed_tokens.weight}
    for index, layer in enumerate(model.layers):
        attention, mlp = cast(Any, layer).self_attn, cast(Any, layer).mlp
        joined = [attention.q_proj, attention.k_proj, attention.v_proj]
        found[f"{index}.first_norm"] = cast(Any, layer).input_layernorm.weight
        found[f"{index}.qkv"] = torch.cat([part.weight for part in joined])
        if model.config.qkv_bias:
            found[f"{index}.qkv_bias"] = torch.cat([part.bias for part in joined])
        if model.config.qk_norm:
            found[f"{index}.q_norm"] = attention.q_norm.weight
            found[f"{index}.k_norm"] = attention.k_norm.weight
        found[f"{index}.out"] = attention.o_proj.weight
        found[f"{index}.second_norm"] = cast(Any, layer).post_attention_layernorm.weight
        found[f"{index}.gate_up"] = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        found[f"{index}.down"] = mlp.down_proj.weight
    found["norm"] = model.norm.weight
    if not model.config.tie_embeddings:
        found["head"] = model.lm_head.weight
    return {name: weight.detach() for name, weight in found.items()}


def streams_of(config: TransformerConfig, weights: dict[str, Tensor], *, compiled: bool) -> Streams:
    """Build the streams over `named_weights`, or over tensors of the same names and shapes."""
    layers = [
        LayerWeights(*(weights.get(f"{index}.{field}") for field in LayerWeights._fields))  # type: ignore[arg-type]
        for index in range(config.num_layers)
    ]
    return Streams(
        config,
        table=weights["table"],
        head=weights.get("head", weights["table"]),
        layers=layers,
        norm=weights["norm"],
        compiled=compiled,
    )
