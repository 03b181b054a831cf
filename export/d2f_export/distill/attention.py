"""Block-causal attention of a training: flex_attention, or a dense mask over the same blocks.

A row sees every position whose block is not after its own; the prompt is block -1.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.draft_adapter import LayerDraft
from d2f_runtime.models.masks import MaskRows
from d2f_runtime.models.rotary import Rope
from d2f_runtime.models.transformer import Attention, KeyValue, Transformer

__all__ = ["FlexAttention", "Mask", "block_mask", "use_flex"]

Mask = Tensor | MaskRows | BlockMask | None


def block_mask(blocks: Tensor, kind: Literal["flex", "dense"]) -> Tensor | BlockMask:
    """Return who sees whom.

    Args:
        blocks: [B, T] int64, number of each position's block.
        kind: "dense" gives [B, 1, T, T] bool.
    """
    if kind == "dense":
        return (blocks[:, None, :] <= blocks[:, :, None])[:, None]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return blocks[row, key] <= blocks[row, query]

    batch, length = blocks.shape
    return create_block_mask(sees, batch, None, length, length, device=str(blocks.device))


class FlexAttention(Attention):
    """The runtime's attention, which takes a BlockMask too."""

    def __init__(self, config: TransformerConfig, *, compiled: bool) -> None:
        super().__init__(config)
        self._flex = _fused() if compiled else cast(Callable[..., Any], flex_attention)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Mask,
        past: KeyValue | None,
        *,
        causal: bool = False,
        draft: LayerDraft | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Return the output [B, T, D] and the rotated keys and values."""
        if not isinstance(mask, BlockMask):
            return super().forward(x, rope, mask, past, causal=causal, draft=draft)
        batch, length, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(batch, length, -1, self.head_dim))
        key = self.k_norm(self.k_proj(x).view(batch, length, -1, self.head_dim))
        value = self.v_proj(x).view(batch, length, -1, self.head_dim)
        query, key = rope.turn(query, key)
        out = self._flex(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            block_mask=mask,
            enable_gqa=self.grouped,
        )
        merged = cast(Tensor, out).transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(merged), (key, value)


def use_flex(model: Transformer, *, compiled: bool) -> None:
    """Let the model's layers take a BlockMask; weights, names and all else stay as they are.

    Args:
        model: changed in place.
        compiled: fuse the attention, which a GPU needs; the first step then compiles it.
    """
    for layer in model.layers:
        attention = cast(Attention, layer.self_attn)
        with torch.device("meta"):
            flex = FlexAttention(model.config, compiled=compiled)
        for name, child in attention.named_children():
            setattr(flex, name, child)
        layer.self_attn = flex


@cache
def _fused() -> Callable[..., Any]:
    """Return the compiled kernel, one for all layers; a shape that is new compiles it again."""
    fused: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return fused
