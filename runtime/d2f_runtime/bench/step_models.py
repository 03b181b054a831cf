"""Models for timing a step: published shapes with random weights, made on the device itself.

The time of a step depends on shapes, not on what the weights are; random ones need no download. No
token ends an answer: the end ids lie beyond what can be produced.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer

__all__ = ["SHAPES", "floor_bytes", "random_model"]

_LLADA: Final = TransformerConfig(
    family="llada",
    vocab_size=126464,
    num_tokens=126464,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_size=12288,
    mask_id=126336,
    eos_ids=(126464,),
    rope_theta=500_000.0,
    norm_eps=1e-5,
)
_DREAM: Final = TransformerConfig(
    family="dream",
    vocab_size=152064,
    num_tokens=151936,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    ffn_size=18944,
    mask_id=151666,
    eos_ids=(151936,),
    rope_theta=1_000_000.0,
    qkv_bias=True,
    shift_logits=True,
)
_LLAMA: Final = replace(
    _LLADA,
    family="llama",
    vocab_size=128256,
    num_tokens=128256,
    num_kv_heads=8,
    ffn_size=14336,
    mask_id=128255,
    eos_ids=(128256,),
    shift_logits=True,
    prompt_attention="causal",
    native_block_size=1,
    max_block_size=1,
)
_TINY: Final = replace(
    _LLADA,
    vocab_size=512,
    num_tokens=500,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    ffn_size=96,
    mask_id=3,
    eos_ids=(500,),
    max_len=512,
)
SHAPES: Final[Mapping[str, TransformerConfig]] = {
    "llada-8b": _LLADA,
    "dream-7b": _DREAM,
    "llama-3-8b": _LLAMA,
    "tiny": _TINY,
}


def random_model(
    config: TransformerConfig, *, device: str, dtype: torch.dtype, seed: int = 0
) -> Transformer:
    """Return a model with normal weights (0, 0.02), drawn on the device."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.02, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def floor_bytes(config: TransformerConfig, *, fp8: bool, cached: int) -> int:
    """Return the fewest bytes that a step reads: weights of layers and head once, K/V once.

    Args:
        config: of the model; two bytes an element.
        fp8: one byte an element of the layers' products.
        cached: tokens before the window.
    """
    size, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    attention = size * config.head_dim * 2 * (heads + kv_heads)
    layer = attention + 3 * size * config.ffn_size
    weights = config.num_layers * layer * (1 if fp8 else 2) + 2 * config.vocab_size * size
    return weights + cached * config.kv_bytes_per_token // 2
