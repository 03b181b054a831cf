"""Tiny random models of every family, and the plain recompute that all backends must agree with."""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_runtime.kernels.sampling import forbid, propose, temper
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.masks import block_causal_mask
from d2f_runtime.models.mixture_config import MixtureConfig
from d2f_runtime.models.transformer import Transformer

Stored = Literal["torch", "fp32", "fp16", "int8", "int4", "int4-fp16", "int4-int8", "device"]

MASK = 3
NUM_TOKENS = 150

_LLADA = TransformerConfig(
    family="llada",
    vocab_size=160,  # the last 10 rows are padding
    num_tokens=NUM_TOKENS,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    ffn_size=96,
    mask_id=MASK,
    eos_ids=(1, 2),
    rope_theta=5_000.0,
    norm_eps=1e-5,
    native_block_size=8,
    max_block_size=32,
    max_len=256,
)
CONFIGS = {
    "llada": _LLADA,
    "dream": replace(
        _LLADA, family="dream", num_kv_heads=2, qkv_bias=True, shift_logits=True, norm_eps=1e-6
    ),
    "sdar": replace(
        _LLADA,
        family="sdar",
        num_kv_heads=2,
        head_dim=32,
        qk_norm=True,
        prompt_attention="grid",
        native_block_size=4,
    ),
    "fast_dllm_v2": replace(
        _LLADA,
        family="fast_dllm_v2",
        num_kv_heads=2,
        qkv_bias=True,
        shift_logits=True,
        tie_embeddings=True,
        prompt_attention="grid",
    ),
    "llama": replace(
        _LLADA,
        family="llama",
        num_kv_heads=2,
        shift_logits=True,
        tie_embeddings=True,
        prompt_attention="causal",
        native_block_size=1,
        max_block_size=1,
    ),
    "a2d": replace(
        _LLADA,
        family="a2d",
        num_kv_heads=2,
        shift_logits=True,
        tie_embeddings=True,
        prompt_attention="causal",
        commit_attention="causal",
    ),
}

MIXTURES = {
    "llada2": replace(
        CONFIGS["sdar"],
        family="llada2",
        num_layers=3,
        rotary_dim=16,
        mixture=MixtureConfig(
            num_experts=8,
            num_chosen=3,
            ffn_size=24,
            scoring="sigmoid",
            has_bias=True,
            num_groups=4,
            num_kept_groups=2,
            scale=2.5,
            shared_size=24,
            dense_layers=(0,),
        ),
    ),
    "sdar_moe": replace(
        CONFIGS["sdar"],
        mixture=MixtureConfig(num_experts=6, num_chosen=2, ffn_size=24, scoring="softmax"),
    ),
}
"""Mixtures of experts."""


def tiny_model(config: TransformerConfig, seed: int = 0) -> Transformer:
    """Weights of some size, so that confidences spread; forbidden ids would often win."""
    model = Transformer(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.mul_(6)
        model.lm_head.weight[config.num_tokens :] *= 8
        model.lm_head.weight[config.mask_id] *= 8
    return model.eval()


def recompute(
    model: Transformer,
    window: Window,
    cached_tokens: Sequence[int],
    cached_stops: Sequence[int],
    *,
    temperature: float = 0.0,
    uniforms: Sequence[float] | None = None,
) -> Proposals:
    """Answer a window from one forward over the whole canvas, nothing cached."""
    config = model.config
    canvas = Window(
        start=0,
        tokens=(*cached_tokens, *window.tokens),
        num_to_cache=0,
        block_stops=(*cached_stops, *window.block_stops),
    )
    length = len(canvas.tokens)
    visible = torch.tensor([canvas.visible_until()])
    mask = block_causal_mask(torch.zeros(1, dtype=torch.long), visible, 0)
    with torch.no_grad():
        hidden, _ = model(torch.tensor([canvas.tokens]), torch.arange(length)[None], mask)
        if config.shift_logits:
            hidden = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
        states = hidden[0, window.start :]
        logits = forbid(model.logits(states), mask_id=config.mask_id, num_tokens=config.num_tokens)
        per_row = torch.full((len(window.tokens),), temperature)
        noise = torch.tensor(list(uniforms) if uniforms else [0.0] * len(window.tokens))
        token, confidence, *_ = propose(temper(logits, per_row), per_row, noise)
    is_mask = [t == config.mask_id for t in window.tokens]
    return Proposals(
        tokens=[t if m else NO_TOKEN for t, m in zip(token.tolist(), is_mask, strict=True)],
        confidence=[c if m else 0.0 for c, m in zip(confidence.tolist(), is_mask, strict=True)],
    )


@cache
def tiny_folder(family: str, quantization: Stored) -> Path:
    """Return a model folder, written once per test run: a checkpoint or an ONNX artefact."""
    root = _root()
    checkpoint = root / f"{family}-torch"
    if quantization == "torch":
        save_checkpoint(checkpoint, tiny_model((CONFIGS | MIXTURES)[family]))
        return checkpoint
    from d2f_export.onnx.artefact import Description, Target, write_artefact

    tokenizer = root / "tokenizer.json"
    tokenizer.write_text("{}")
    folder = root / f"{family}-{quantization}"
    about = Description(
        name=folder.name, tokenizer=tokenizer, defaults={"cpu": {"max_new_tokens": 16}}
    )
    target: Target = "device" if quantization == "device" else "cpu"
    write_artefact(
        tiny_folder(family, "torch"),
        folder,
        about,
        target=target,
        quantization="fp32" if quantization == "device" else quantization,
        window=24,
        capacity=96,
    )
    return folder


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="d2f-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root
