"""transformers' own models with our weights: whole canvases in, proposals by definition out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from d2f_runtime.models.config import TransformerConfig

CLASSES = {
    "a2d": "Llama",
    "llada": "Llama",
    "llama": "Llama",
    "dream": "Qwen2",
    "fast_dllm_v2": "Qwen2",
    "sdar": "Qwen3",
}


def oracle_model(config: TransformerConfig, weights: dict[str, Tensor]) -> Any:
    """The family's transformers model with our weights; eager attention takes any 4-D mask."""
    name = CLASSES[config.family]
    settings = getattr(transformers, f"{name}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=False,
        attn_implementation="eager",
    )
    model = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
    named = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in weights.items()}
    model.load_state_dict(named)
    return model


@dataclass(frozen=True)
class Proposal:
    """What the model says of one masked position."""

    position: int
    token: int
    confidence: float
    margin: float
    neg_entropy: float


@dataclass(frozen=True)
class Oracle:
    """Answers a canvas with one forward over all of it; nothing is cached."""

    model: Any
    config: TransformerConfig

    def proposals(self, canvas: Sequence[int], stops: Sequence[int]) -> list[Proposal]:
        """Propose at every mask; a position sees all before the stop of its attention block."""
        length, config = len(canvas), self.config
        visible = torch.tensor([min(s for s in stops if s > row) for row in range(length)])
        seen = torch.arange(length)[None] < visible[:, None]
        additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            tokens = torch.tensor([list(canvas)])
            logits = self.model(tokens, attention_mask=additive, use_cache=False).logits[0]
        logits[:, config.mask_id] = -torch.inf
        logits[:, config.num_tokens :] = -torch.inf
        found = []
        for position in (p for p, token in enumerate(canvas) if token == config.mask_id):
            p = logits[position - 1 if config.shift_logits else position].softmax(-1)
            best = p.topk(2)
            neg_entropy = (p * (p + 1e-10).log()).sum()
            values = (best.values[0], best.values[0] - best.values[1], neg_entropy)
            found.append(Proposal(position, int(best.indices[0]), *map(float, values)))
        return found
