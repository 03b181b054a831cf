"""Rates of the library's products at the sizes of a model's step, which wide steps run.

In fp8 with a scale for each row and output, as the step has them, and with one scale for all, which
shows what these cost.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.activation import quantise_rows
from d2f_runtime.models.config import TransformerConfig
from lab.bench.step import device_times
from lab.records import spread

__all__ = ["library_rates"]

ROWS: Final = (400, 416, 448, 512, 576, 660, 672, 768)


def library_rates(config: TransformerConfig, quantization: str) -> dict[str, Any]:
    """Return Tflop/s of each product of a layer, and the head's, by way and rows."""
    size, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
    shapes = {
        "qkv": (heads * config.head_dim, size),
        "out": (size, config.num_heads * config.head_dim),
        "gate_up": (2 * config.ffn_size, size),
        "down": (size, config.ffn_size),
        "head": (config.vocab_size, size),
    }
    found: dict[str, Any] = {}
    for name, (outputs, features) in shapes.items():
        weight = torch.randn(outputs, features, device="cuda").mul_(0.02).bfloat16()
        for rows in ROWS:
            x = torch.randn(rows, features, device="cuda").bfloat16()
            ways = (
                _fp8_ways(x, weight) if quantization == "fp8" else {"bf16": (F.linear, x, weight)}
            )
            for way, (product, *operands) in ways.items():
                times = device_times(_captured(partial(product, *operands)).replay, 12)
                work = 2 * rows * outputs * features
                rate = round(work / spread(times, 6)["median"] / 1e9, 1)
                found.setdefault(name, {}).setdefault(way, {})[rows] = rate
    return found


def _captured(product: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """Return it as a graph: small products take less than their launch by Python."""
    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product()
    return graph


def _fp8_ways(x: Tensor, weight: Tensor) -> dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]]:
    rows, columns = quantise_rows(x), quantise_rows(weight)
    assert rows.scale is not None
    assert columns.scale is not None
    one = torch.ones((), device="cuda")
    by_row = partial(
        torch._scaled_mm,
        scale_a=rows.scale[:, None],
        scale_b=columns.scale[None, :],
        out_dtype=torch.bfloat16,
    )
    by_one = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    operands = rows.values, columns.values.t()
    return {
        "scales of rows": (partial(by_row, use_fast_accum=True), *operands),
        "scales of rows, exact sums": (partial(by_row, use_fast_accum=False), *operands),
        "one scale": (partial(by_one, use_fast_accum=True), *operands),
    }
