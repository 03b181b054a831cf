"""The transformer's layers as they are exported: the same functions with fewer and cheaper nodes.

One product for queries, keys and values, heads kept flat, one Attention node. The last layer goes
on with the rows that somebody reads: its keys and values are stored for the whole window, but its
attention and feed-forward run for the states that predict a mask or are kept for the next step.

Shapes: B rows, W window, P columns of the cache, S selected rows, H heads, KV key/value heads, hd
head size, D hidden size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import KeyValue, Layer

__all__ = ["GraphLayer", "LastGraphLayer", "select_rows"]


class GraphLayer(nn.Module):
    """One layer; the same function as `Layer`."""

    def __init__(self, layer: Layer, config: TransformerConfig) -> None:
        super().__init__()
        attention = layer.self_attn
        self.config = config
        self.query_size = config.num_heads * config.head_dim
        self.key_size = config.num_kv_heads * config.head_dim
        self.qkv_proj = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = attention.o_proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp

    def forward(
        self, x: Tensor, rope: KeyValue, mask: Tensor, past: KeyValue
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream and the window's keys and values [B, W, KV hd].

        Args:
            x: [B, W, D].
            rope: cos and sin, [B, W, hd / 2] each.
            mask: [B, W, P + W] fp32, added to the scores.
            past: keys and values, [B, P, KV hd] each.
        """
        qkv = self.qkv_proj(self.input_layernorm(x))
        query, key, value = qkv.split([self.query_size, self.key_size, self.key_size], dim=-1)
        key = self._rotate_key(key, rope)
        return self._attend(x, query, key, value, rope, mask, past), key, value

    def _attend(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rope: KeyValue,
        mask: Tensor,
        past: KeyValue,
    ) -> Tensor:
        """Return the residual stream after attention and feed-forward, as long as the query."""
        config = self.config
        query = _rotate(query, self.q_norm, rope, config.num_heads)
        out, *_ = torch.onnx.ops.attention(
            query,
            torch.cat([past[0], key], dim=1),
            torch.cat([past[1], value], dim=1),
            mask[:, None],
            q_num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
        )
        x = x + self.o_proj(out)
        added: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + added

    def _rotate_key(self, key: Tensor, rope: KeyValue) -> Tensor:
        return _rotate(key, self.k_norm, rope, self.config.num_kv_heads)


class LastGraphLayer(GraphLayer):
    """The last layer, for the states that are read."""

    def __init__(self, layer: Layer, config: TransformerConfig) -> None:
        super().__init__(layer, config)
        attention = layer.self_attn
        self.qkv_proj = _joined([attention.k_proj, attention.v_proj])
        self.q_proj = attention.q_proj

    def select(
        self, x: Tensor, rope: KeyValue, mask: Tensor, past: KeyValue, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states of `rows` [B, S] and the whole window's keys and values."""
        normed = self.input_layernorm(x)
        key, value = self.qkv_proj(normed).split([self.key_size, self.key_size], dim=-1)
        key = self._rotate_key(key, rope)
        query = self.q_proj(select_rows(normed, rows))
        rope = select_rows(rope[0], rows), select_rows(rope[1], rows)
        x, mask = select_rows(x, rows), select_rows(mask, rows)
        return self._attend(x, query, key, value, rope, mask, past), key, value


def select_rows(states: Tensor, rows: Tensor) -> Tensor:
    """Select [B, S] rows of [B, W, ...]; a plain Gather, which is the cheapest node for it."""
    batch, length, size = states.shape
    index = rows + torch.arange(batch)[:, None] * length
    return F.embedding(index, states.reshape(-1, size))


def _rotate(x: Tensor, norm: nn.Module, rope: KeyValue, num_heads: int) -> Tensor:
    """Normalise each head where the family does, then rotate [B, W, heads hd]."""
    if not isinstance(norm, nn.Identity):
        x = norm(x.view(*x.shape[:2], num_heads, -1)).flatten(-2)
    out: Tensor = torch.onnx.ops.rotary_embedding(x, *rope, num_heads=num_heads)
    return out


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Return one layer whose outputs are those of all."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None)
    joined.weight = nn.Parameter(weight)
    if linears[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))
    return joined
