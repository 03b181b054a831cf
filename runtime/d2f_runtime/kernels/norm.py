"""Residual addition and RMSNorm in one pass over the rows, with the sum of a split product's parts.

Shapes: M rows, D hidden size, S parts of the product that is added.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.activation import FP8, Activation, quantise_rows, row_scale
from d2f_runtime.kernels.language import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    overlaps,
    power_of_2,
    tl,
)

__all__ = ["residual_norm", "residual_norm_reference"]


def residual_norm_reference(
    x: Tensor, parts: Tensor | None, weight: Tensor, eps: float, *, quantise: bool = False
) -> tuple[Tensor, Activation]:
    """Add the parts to the residual stream and normalise it.

    Args:
        x: [M, D] residual stream; unchanged.
        parts: [S, M, D] to be summed in fp32 and added; None adds nothing.
        weight: [D] of the norm.
        eps: of the norm.
        quantise: whether the normalised rows become fp8.

    Returns:
        The new residual stream [M, D] (`x` itself where nothing was added) and its normalised rows.
    """
    if parts is not None:
        x = (x.float() + parts.float().sum(dim=0)).to(x.dtype)
    rows = F.rms_norm(x.float(), (x.shape[1],), weight.float(), eps)
    return x, quantise_rows(rows) if quantise else Activation(rows.to(x.dtype))


def residual_norm(
    x: Tensor, parts: Tensor | None, weight: Tensor, eps: float, *, quantise: bool = False
) -> tuple[Tensor, Activation]:
    """Do what `residual_norm_reference` does, one program per row."""
    num_rows, size = x.shape
    total = x if parts is None else torch.empty_like(x)
    rows = torch.empty_like(x, dtype=FP8 if quantise else x.dtype)
    scale = torch.empty(num_rows, device=x.device, dtype=torch.float32) if quantise else None
    pdl = overlaps(x.device)
    _residual_norm[(num_rows,)](
        x, parts, weight, total, rows, scale, x.numel(), size, eps,
        NUM_PARTS=0 if parts is None else parts.shape[0], BLOCK=power_of_2(size), PDL=pdl,
        num_warps=8 if size >= 2048 else 4, launch_pdl=pdl,
    )  # fmt: skip
    return total, Activation(rows, scale)


@jit
def _residual_norm(
    x, parts, weight, total, rows, scale, part_size, size, eps,
    NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < size
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = row.to(tl.int64) * size + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(NUM_PARTS):
        value += tl.load(parts + part * part_size.to(tl.int64) + at, mask=inside, other=0.0).to(
            tl.float32
        )
    if NUM_PARTS > 0:
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if scale is None:
        normed = value * tl.rsqrt(tl.sum(value * value, axis=0) / size + eps) * gain
    else:  # the largest before the norm is the largest after it: one pass finds both
        normed = value * gain
        square, largest = tl.reduce((value * value, tl.abs(normed)), 0, _sum_and_largest)
        shrink = tl.rsqrt(square / size + eps)
        factor = row_scale(largest * shrink)
        tl.store(scale + row, factor)
        normed *= shrink / factor
    tl.store(rows + at, normed.to(rows.dtype.element_ty), mask=inside)


@jit
def _sum_and_largest(sum_a, largest_a, sum_b, largest_b):
    return sum_a + sum_b, tl.maximum(largest_a, largest_b)
