"""One block-causal transformer for every family: LLaDA, Dream, SDAR, Llama, Qwen.

A forward runs a window of W positions over P cached ones. Who sees whom is one integer per row, the
canvas position up to which the row sees (`visible_until`), so that full, causal and block-causal
attention are the same code. Parameter names are those of transformers' Llama and Qwen classes.

Shapes: B rows, W window positions, P cached positions, H heads, KV key/value heads, hd head size,
D hidden size, V vocabulary.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.draft_adapter import DraftAdapter, LayerDraft
from d2f_runtime.models.feed_forward import FeedForward
from d2f_runtime.models.masks import MaskRows
from d2f_runtime.models.mixture import Mixture
from d2f_runtime.models.rotary import Rope, rotary

__all__ = ["KeyValue", "Past", "Transformer"]

KeyValue = tuple[Tensor, Tensor]  # keys and values of one layer, each [B, P or W, KV, hd]


class Past(Protocol):
    """The cached keys and values of every layer: a list, or a pool that gathers on demand."""

    def __getitem__(self, layer: int, /) -> KeyValue: ...


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with fp32 statistics."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention of a window over the cache and itself."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.grouped = config.num_heads != config.num_kv_heads
        self.q_proj = nn.Linear(size, config.num_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * head_dim, size, bias=False)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | MaskRows | None,
        past: KeyValue | None,
        *,
        causal: bool = False,
        draft: LayerDraft | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Return the output [B, W, D] and this window's rotated keys and values."""
        batch, window, _ = x.shape
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if draft is not None:
            draft.add("q_proj", x, query)
            draft.add("k_proj", x, key)
            draft.add("v_proj", x, value)
        query = self.q_norm(query.view(batch, window, -1, self.head_dim))
        key = self.k_norm(key.view(batch, window, -1, self.head_dim))
        value = value.view(batch, window, -1, self.head_dim)
        query, key = rope.turn(query, key)
        new = (key, value)
        if past is not None:
            key = torch.cat([past[0], key], dim=1)
            value = torch.cat([past[1], value], dim=1)
        if self.grouped and x.requires_grad:  # the fused kernel with a mask has no grouped backward
            key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
            value = value.repeat_interleave(query.shape[2] // value.shape[2], dim=2)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if isinstance(mask, MaskRows):
            parts = [_attend(query[:, :, rows], key, value, part) for rows, part in mask.pieces()]
            out = torch.cat(parts, dim=2)
        else:
            out = _attend(query, key, value, mask, causal=causal)
        joined = out.transpose(1, 2).reshape(batch, window, -1)
        out = self.o_proj(joined)
        if draft is not None:
            draft.add("o_proj", joined, out)
        return out, new


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False
) -> Tensor:
    """Return [B, H, W, hd] of query [B, H, W, hd] over keys and values [B, KV, P + W, hd]."""
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )


class Layer(nn.Module):
    """Pre-norm attention and feed-forward with sequential residuals."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp: FeedForward | Mixture
        if config.mixture is None or config.mixture.is_dense(index):
            self.mlp = FeedForward(config.hidden_size, config.ffn_size)
        else:
            self.mlp = Mixture(config.hidden_size, config.mixture)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | MaskRows | None,
        past: KeyValue | None,
        *,
        causal: bool = False,
        draft: LayerDraft | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Return the residual stream and this window's keys and values."""
        normed = self.input_layernorm(x)
        out, new = self.self_attn(normed, rope, mask, past, causal=causal, draft=draft)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x), draft), new


class Transformer(nn.Module):
    """Embedding, layers, final norm and head.

    Attributes:
        draft: what draft rows go through as well; no part of the model's own weights.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.draft: DraftAdapter | None = None

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | MaskRows | None,
        past: Past | None = None,
        *,
        causal: bool = False,
        draft_rows: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Return the final states [B, W, D] and each layer's new keys and values.

        Args:
            tokens: [B, W] int64.
            positions: [B, W] int64 canvas positions.
            mask: [B or 1, 1, W, P + W] bool, True where the row sees the column, or its rows;
                None is full.
            causal: with no mask and no past, each position sees itself and those before it.
            past: per layer the cached keys and values, [B, P, KV, hd] each; rotated.
            draft_rows: [R] int64, which of the B * W rows go through `draft`; None without one.
        """
        draft = self.draft
        x = self.embed_tokens(tokens) if draft is None else draft.embed(tokens, self.embed_tokens)
        rope = rotary(positions, self.config)
        new: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            x, key_value = layer(
                x,
                rope,
                mask,
                None if past is None else past[index],
                causal=causal,
                draft=None
                if draft is None or draft_rows is None
                else draft.layer(index, draft_rows),
            )
            new.append(key_value)
        return self.norm(x), new

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [..., V] raw logits of final states, unshifted."""
        out: Tensor = self.lm_head(hidden)
        return out

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw fresh weights: normal(0, 0.02), residual outputs scaled by depth, unit norms."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name else 0.0)
                continue
            std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise)


def _embedding(num_rows: int, size: int) -> nn.Embedding:
    """Return a table; where it is laid out only, no values, which would import torch's compiler."""
    if torch.get_default_device().type == "meta":
        return nn.Embedding(num_rows, size, _weight=torch.empty(num_rows, size))
    return nn.Embedding(num_rows, size)
