"""A trial of the kernels on a device: one step of a tiny random model, against their references."""

import copy
import functools
import logging
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from d2f_runtime.kernels.attention import rows_per_tile
from d2f_runtime.kernels.language import TRITON_VERSION
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.fast_transformer import (
    KERNELS,
    REFERENCES,
    FastTransformer,
    Ops,
    StepTensors,
)
from d2f_runtime.models.mixture_config import MixtureConfig
from d2f_runtime.models.transformer import Transformer

__all__ = ["fault_of_trial", "trial"]

logger = logging.getLogger("d2f_stream.kernel_trial")

# of relative errors: a wrong index anywhere gives 1
BOUND: Final = 0.1  # bf16 gives 0.015
BOUND_FP8: Final = 0.4  # fp8 gives 0.1
NUM_ROWS: Final = 20
NUM_PLACES: Final = 64
TINY: Final = TransformerConfig(
    family="llada",
    vocab_size=1024,
    num_tokens=1000,
    hidden_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_size=512,
    mask_id=3,
    eos_ids=(0,),
    rope_theta=10_000.0,
    norm_eps=1e-5,
    max_len=NUM_PLACES,
)


TINY_MIXTURE: Final = replace(
    TINY,
    family="llada2",
    mixture=MixtureConfig(
        num_experts=4,
        num_chosen=4,  # all: a rounding that changes a choice is no fault
        ffn_size=128,
        scoring="sigmoid",
        shared_size=128,
        dense_layers=(0,),
    ),
)


@functools.cache
def fault_of_trial(device: torch.device, quantization: str, has_experts: bool) -> str:
    """Return what a trial finds wrong with the kernels, as a clause; empty where nothing is.

    Triton must compile its kernels once: seconds, and later some tenths of one. Held once in a
    process.

    Args:
        device: a CUDA device.
        quantization: "fp8", "nf4", or anything else for bf16.
        has_experts: whether a layer of the model is a mixture of experts.
    """
    try:
        with torch.cuda.device(device):
            error = trial(device, quantization, KERNELS, TINY_MIXTURE if has_experts else TINY)
        bound = BOUND_FP8 if quantization == "fp8" else BOUND
        fault = "" if error < bound else f"errs by {error:.2g}"  # NaN is no less
    except Exception as failure:  # whatever it is, the plain step does without
        fault = f"fails ({' '.join(repr(failure).split())[:200]})"
    if fault:
        fault = f"a trial of the fast step with Triton {TRITON_VERSION} {fault}"
        logger.warning("models run the plain step on %s: %s", device, fault)
    return fault


@torch.inference_mode()
def trial(
    device: torch.device, quantization: str, ops: Ops, config: TransformerConfig = TINY
) -> float:
    """Return the largest relative error of a step's states, K/V and confidences, on fresh inputs.

    Args:
        device: that runs `ops`.
        quantization: "fp8", "nf4", or anything else for bf16.
        ops: under trial.
        config: of the model.
    """
    model = Transformer(config).to(torch.bfloat16).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.05)
    tokens = torch.randint(4, TINY.num_tokens, (NUM_ROWS,), dtype=torch.int32)
    wanted = _step(copy.deepcopy(model).float(), tokens, quantization, REFERENCES)
    found = _step(model.to(device), tokens.to(device), quantization, ops)
    pairs = zip(found, wanted, strict=True)
    return max(float((a.cpu().float() - b).norm() / b.norm()) for a, b in pairs)


def _step(
    model: Transformer, tokens: Tensor, quantization: str, ops: Ops
) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, K/V and confidences of NUM_ROWS rows in two blocks, after as many places."""
    packed = FastTransformer(model, quantization=quantization, ops=ops)
    device = tokens.device

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    counting = range(NUM_ROWS)
    per_tile = rows_per_tile(NUM_ROWS, TINY.num_heads // TINY.num_kv_heads)
    tiles = [
        (first, min(per_tile, NUM_ROWS - first), NUM_ROWS, NUM_PLACES, 0)
        for first in range(0, NUM_ROWS, per_tile)
    ]
    step = StepTensors(
        tokens,
        positions=integers(*counting),
        places=integers(*(NUM_ROWS + i for i in counting)),
        visible=integers(*(12 if i < 12 else NUM_ROWS for i in counting)),
        tiles=torch.tensor(tiles, dtype=torch.int32, device=device),
    )
    shape = (2 * TINY.num_layers, NUM_PLACES, TINY.num_kv_heads, TINY.head_dim)
    store = torch.zeros(shape, device=device, dtype=model.norm.weight.dtype)
    states = packed.forward(step, store)
    return states, store, packed.best_tokens(states)[1]
