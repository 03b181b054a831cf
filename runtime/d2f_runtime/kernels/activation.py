"""Activation: the rows that enter a matrix product, plain or quantised to fp8 row by row.

Shapes: M rows, K features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from d2f_runtime.kernels.language import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    overlaps,
    power_of_2,
    tl,
)

__all__ = ["FP8", "FP8_MAX", "Activation", "quantise", "quantise_rows", "row_scale"]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-12  # of a row's largest magnitude; a row of zeros has a scale all the same


class Activation(NamedTuple):
    """Rows of features.

    Attributes:
        values: [M, K] in the model's dtype, or fp8 (e4m3).
        scale: [M] fp32 that the values of each row must be multiplied by; None for plain rows.
    """

    values: Tensor
    scale: Tensor | None = None

    def dequantised(self) -> Tensor:
        """Return [M, K] fp32."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale[:, None]


def quantise_rows(x: Tensor) -> Activation:
    """Scale each row of [M, K] so that its largest magnitude becomes the largest fp8 number."""
    rows = x.float()
    scale = rows.abs().amax(dim=1).clamp(min=SMALLEST) / FP8_MAX
    return Activation((rows / scale[:, None]).to(FP8), scale)


def quantise(x: Tensor) -> Activation:
    """Do what `quantise_rows` does, one program per row."""
    num_rows, size = x.shape
    rows = torch.empty((num_rows, size), device=x.device, dtype=FP8)
    scale = torch.empty(num_rows, device=x.device, dtype=torch.float32)
    pdl = overlaps(x.device)
    _quantise[(num_rows,)](
        x, rows, scale, size,
        BLOCK=power_of_2(size), PDL=pdl, num_warps=16 if size > 4096 else 4, launch_pdl=pdl,
    )  # fmt: skip
    return Activation(rows, scale)


@jit
def _quantise(x, rows, scale, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * size + column
    value = tl.load(x + at, mask=column < size, other=0.0).to(tl.float32)
    factor = row_scale(tl.max(tl.abs(value), axis=0))
    tl.store(scale + row, factor)
    tl.store(rows + at, (value / factor).to(rows.dtype.element_ty), mask=column < size)


@jit
def row_scale(largest):
    """Return the scale of a row from its largest magnitude, as `quantise_rows` does."""
    return tl.maximum(largest, 1e-12) / 448.0
