"""Models for timing a step: published shapes with random weights, made on the device itself.

The time of a step depends on shapes, not on what the weights are; random ones need no download. No
token ends an answer: the end ids lie beyond what can be produced.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import nn

from d2f_runtime.backends.choice import weight_bytes
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.mixture_config import MixtureConfig
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.quantization.int8 import Int8Weight
from d2f_runtime.quantization.nf4 import BLOCK, Nf4Weight
from d2f_runtime.quantization.stored import LOW_BIT, QuantizedLinear, QuantizedWeight

__all__ = ["SHAPES", "floor_bytes", "random_model"]

_LLADA: Final = TransformerConfig(
    family="llada",
    vocab_size=126464,
    num_tokens=126463,  # here and below: the EOS is embedded, and never produced
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_size=12288,
    mask_id=126336,
    eos_ids=(126463,),
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
    num_tokens=128255,
    num_kv_heads=8,
    ffn_size=14336,
    mask_id=128254,
    eos_ids=(128255,),
    shift_logits=True,
    prompt_attention="causal",
    native_block_size=1,
    max_block_size=1,
)
# Shapes of Qwen2.5 and of Llama 3 70B, decoded as block diffusion, so that a window may be of any
# width.
_QWEN_32B: Final = replace(
    _LLADA,
    vocab_size=152064,
    num_tokens=151936,
    hidden_size=5120,
    num_layers=64,
    num_heads=40,
    num_kv_heads=8,
    ffn_size=27648,
    mask_id=151666,
    eos_ids=(151936,),
    rope_theta=1_000_000.0,
    qkv_bias=True,
)
_QWEN_1_5B: Final = replace(
    _QWEN_32B,
    vocab_size=151936,
    num_tokens=151935,
    hidden_size=1536,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    ffn_size=8960,
    eos_ids=(151935,),
    tie_embeddings=True,
)
_LLAMA_70B: Final = replace(
    _LLADA,
    vocab_size=128256,
    num_tokens=128255,
    hidden_size=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    ffn_size=28672,
    mask_id=128254,
    eos_ids=(128255,),
)
_LLADA2_MINI: Final = replace(
    _LLADA,
    family="llada2",
    vocab_size=157184,
    num_tokens=156892,
    hidden_size=2048,
    num_layers=20,
    num_heads=16,
    num_kv_heads=4,
    ffn_size=5120,
    mask_id=156895,
    eos_ids=(156892,),
    rope_theta=600_000.0,
    norm_eps=1e-6,
    qk_norm=True,
    rotary_dim=64,
    prompt_attention="grid",
    native_block_size=32,
    mixture=MixtureConfig(
        num_experts=256,
        num_chosen=8,
        ffn_size=512,
        scoring="sigmoid",
        has_bias=True,
        num_groups=8,
        num_kept_groups=4,
        scale=2.5,
        shared_size=512,
        dense_layers=(0,),
    ),
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
_TINY_MIXTURE: Final = replace(
    _LLADA2_MINI,
    vocab_size=512,
    num_tokens=500,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=128,
    mask_id=3,
    eos_ids=(500,),
    rotary_dim=8,
    max_len=512,
    mixture=MixtureConfig(
        num_experts=8,
        num_chosen=2,
        ffn_size=64,
        scoring="sigmoid",
        has_bias=True,
        num_groups=4,
        num_kept_groups=2,
        scale=2.5,
        shared_size=64,
        dense_layers=(0,),
    ),
)
SHAPES: Final[Mapping[str, TransformerConfig]] = {
    "llada-8b": _LLADA,
    "dream-7b": _DREAM,
    "llama-3-8b": _LLAMA,
    "qwen-1.5b": _QWEN_1_5B,
    "32b": _QWEN_32B,
    "70b": _LLAMA_70B,
    "llada2-mini": _LLADA2_MINI,
    "tiny": _TINY,
    "tiny-mixture": _TINY_MIXTURE,
}


def random_model(
    config: TransformerConfig,
    *,
    device: str,
    dtype: torch.dtype,
    seed: int = 0,
    quantization: str | None = None,
) -> Transformer:
    """Return a model with normal weights (0, 0.02), drawn on the device.

    Args:
        config: sizes.
        device: where the weights are.
        dtype: of the weights.
        seed: of the draw.
        quantization: "nf4" or "int8" draws the codes of the layers' products themselves, so that a
            model fits whose dense weights would not.
    """
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    if quantization in LOW_BIT:
        for name, module in list(model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                shape = (module.out_features, module.in_features)
                weight = _random_codes(shape, quantization, device, generator)
                parent, _, child = name.rpartition(".")
                replaced = QuantizedLinear(weight, module.bias)
                setattr(model.layers.get_submodule(parent), child, replaced)
    model = model.to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.02, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def floor_bytes(config: TransformerConfig, *, quantization: str, cached: int) -> int:
    """Return the fewest bytes that a step reads: weights of layers and head once, K/V once.

    Args:
        config: of the model.
        quantization: of the layers' products, and of the head for fp8; the rest has two bytes an
            element.
        cached: tokens before the window.
    """
    whole = weight_bytes(replace(config, tie_embeddings=True), quantization)
    if quantization == "fp8" and config.vocab_size % 16 == 0:
        whole -= 2 * config.vocab_size * config.hidden_size  # the head is a table of its own
    return whole + cached * config.kv_bytes_per_token // 2


def _random_codes(
    shape: tuple[int, int], quantization: str, device: str, generator: torch.Generator
) -> QuantizedWeight:
    outputs, features = shape
    if quantization == "int8":
        codes = torch.randint(
            -127, 128, shape, dtype=torch.int8, device=device, generator=generator
        )
        return Int8Weight(codes, torch.full((outputs,), 0.05, device=device))
    number = outputs * features
    pairs = torch.randint(
        0, 256, (number // 2,), dtype=torch.uint8, device=device, generator=generator
    )
    absmax = torch.rand(number // BLOCK, device=device, generator=generator) * 0.02 + 0.04
    return Nf4Weight(pairs, absmax, shape)
