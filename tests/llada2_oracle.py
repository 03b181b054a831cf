"""LLaDA2's forward by its definition, naively: the oracle of its logits, in the weights' own dtype.

Written from a description of the published modeling file, under its names, and sharing nothing with
d2f_runtime: every row goes through every expert, and those that were not chosen weigh nothing.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LLaDA2"]


@dataclass
class Output:
    logits: Tensor


class Swiglu(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Attention(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c = c
        width = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        self.query_key_value = nn.Linear(c.hidden_size, width, bias=False)
        self.query_layernorm = Norm(c.head_dim, c.rms_norm_eps)
        self.key_layernorm = Norm(c.head_dim, c.rms_norm_eps)
        self.dense = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        c, length = self.c, x.shape[1]
        heads, kv = c.num_attention_heads, c.num_key_value_heads
        joined = self.query_key_value(x)[0].view(length, heads + 2 * kv, c.head_dim)
        query, key, value = torch.split(joined, [heads, kv, kv], dim=1)
        query, key = self.turn(self.query_layernorm(query)), self.turn(self.key_layernorm(key))
        out = []
        for head in range(heads):
            own = head // (heads // kv)
            scores = query[:, head] @ key[:, own].T * c.head_dim**-0.5 + mask[0, 0].to(x.dtype)
            out.append(scores.softmax(-1) @ value[:, own])
        merged: Tensor = self.dense(torch.stack(out, dim=1).flatten(1))[None]
        return merged

    def turn(self, x: Tensor) -> Tensor:
        """Turn the first dimensions of each head, [length, heads, head_dim]."""
        size = int(self.c.head_dim * self.c.partial_rotary_factor)
        pair = torch.arange(size // 2, dtype=torch.float64)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * self.c.rope_theta ** (
            -2 * pair / size
        )
        cos, sin = (f(angle)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
        sizes = [size // 2, size // 2, x.shape[-1] - size]
        first, second, rest = torch.split(x, sizes, dim=-1)
        turned = [first * cos - second * sin, second * cos + first * sin, rest]
        return torch.cat(turned, dim=-1)


class Gate(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.num_experts, c.hidden_size))
        self.expert_bias = nn.Parameter(torch.empty(c.num_experts))


class Experts(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c = c
        self.gate = Gate(c)
        width = c.moe_intermediate_size
        self.experts = nn.ModuleList(Swiglu(c.hidden_size, width) for _ in range(c.num_experts))
        self.shared_experts = Swiglu(c.hidden_size, width * c.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[0]
        weights = torch.stack([self.weights_of(row) for row in rows])  # [M, E]
        out: Tensor = self.shared_experts(rows)
        for e, expert in enumerate(self.experts):
            out = out + weights[:, e, None] * expert(rows)
        return out[None]

    def weights_of(self, row: Tensor) -> Tensor:
        """What each expert weighs for one row."""
        c = self.c
        scores = [float(s) for s in (self.gate.weight.double() @ row.double()).sigmoid()]
        biased = [s + float(b) for s, b in zip(scores, self.gate.expert_bias, strict=True)]
        size = c.num_experts // c.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
        best_two = [sum(sorted(biased[e] for e in group)[-2:]) for group in groups]
        kept = sorted(range(c.n_group), key=lambda g: -best_two[g])[: c.topk_group]
        candidates = [e for g in kept for e in groups[g]]
        chosen = sorted(candidates, key=lambda e: -biased[e])[: c.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) + 1e-20
        found = torch.zeros(c.num_experts, dtype=row.dtype)
        for e in chosen:
            share = scores[e] / total if c.num_experts_per_tok > 1 else scores[e]
            found[e] = share * c.routed_scaling_factor
        return found


class Layer(nn.Module):
    def __init__(self, c: Any, index: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.attention = Attention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        is_dense = index < c.first_k_dense_replace
        self.mlp = Swiglu(c.hidden_size, c.intermediate_size) if is_dense else Experts(c)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, index) for index in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)


class LLaDA2(nn.Module):
    """The whole model; one canvas at a time."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.model = Body(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, *, attention_mask: Tensor, use_cache: bool) -> Output:
        assert not use_cache
        x = self.model.word_embeddings(tokens)
        for layer in self.model.layers:
            x = layer(x, attention_mask)
        return Output(self.lm_head(self.model.norm(x)))
