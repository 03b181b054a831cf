"""SiLU-gated product of a merged gate and up projection.

The projections are merged in turns of GROUP outputs, so that what belongs together is computed
together: a product can then apply the gate before it stores anything.

Shapes: M rows, F feed-forward size, K features.
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

__all__ = ["GROUP", "interleave", "silu_gate", "silu_gate_reference"]

GROUP = 8

BLOCK = 2048


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Merge two weights [F, K] into [2 F, K], GROUP rows of each in turn."""
    size, features = gate.shape
    groups = torch.stack([gate.view(-1, GROUP, features), up.view(-1, GROUP, features)], dim=1)
    return groups.view(2 * size, features)


def silu_gate_reference(gate_up: Tensor, *, quantise: bool = False) -> Activation:
    """Return silu(gate) * up.

    Args:
        gate_up: [M, 2 F], as `interleave` lays them.
        quantise: whether the rows become fp8.
    """
    gate, up = gate_up.float().view(gate_up.shape[0], -1, 2, GROUP).unbind(dim=2)
    rows = (F.silu(gate) * up).flatten(1)
    return quantise_rows(rows) if quantise else Activation(rows.to(gate_up.dtype))


def silu_gate(gate_up: Tensor, *, quantise: bool = False) -> Activation:
    """Do what `silu_gate_reference` does; one program for a quantised row."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    dtype = FP8 if quantise else gate_up.dtype
    rows = torch.empty((num_rows, size), device=gate_up.device, dtype=dtype)
    pdl = overlaps(gate_up.device)
    if not quantise:
        grid = (num_rows, -(-size // BLOCK))
        _silu_gate[grid](gate_up, rows, size, BLOCK=BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl)
        return Activation(rows)
    scale = torch.empty(num_rows, device=gate_up.device, dtype=torch.float32)
    _silu_gate_quantised[(num_rows,)](
        gate_up, rows, scale, size,
        BLOCK=power_of_2(size), PDL=pdl, num_warps=16 if size > 4096 else 4, launch_pdl=pdl,
    )  # fmt: skip
    return Activation(rows, scale)


@jit
def _gated(gate_up, row, column, size):
    at = gate_up + row.to(tl.int64) * 2 * size + column // 8 * 16 + column % 8
    gate = tl.load(at, mask=column < size, other=0.0).to(tl.float32)
    up = tl.load(at + 8, mask=column < size, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@jit
def _silu_gate(gate_up, rows, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _gated(gate_up, row, column, size)
    at = rows + row.to(tl.int64) * size + column
    tl.store(at, value.to(rows.dtype.element_ty), mask=column < size)


@jit
def _silu_gate_quantised(gate_up, rows, scale, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    value = _gated(gate_up, row, column, size)
    factor = row_scale(tl.max(tl.abs(value), axis=0))
    tl.store(scale + row, factor)
    at = rows + row.to(tl.int64) * size + column
    tl.store(at, (value / factor).to(rows.dtype.element_ty), mask=column < size)
