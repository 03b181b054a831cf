"""Matrix products of few rows with a large weight: the weight's read is all that counts.

Output features are the wide side of each tile, so that 16 to 256 rows fill the matrix units, and
the sum over input features can be split over several programs where the outputs alone would not
occupy the device. The parts are left for the reader to add.

Shapes: M rows, N outputs, K features, S splits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2f_runtime.kernels.activation import Activation
from d2f_runtime.kernels.language import (
    MULTIPROCESSORS,
    TensorDescriptor,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    overlaps,
    tl,
)

__all__ = ["Tiling", "skinny_product", "skinny_product_reference", "tiling_for"]

MAX_ROWS = 256


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut.

    Attributes:
        rows: of a tile.
        outputs: of a tile.
        features: of a tile.
        stages: tiles under way at once.
        warps: of a program.
        splits: programs that share the features of an output.
        persistent: a program goes on to further tiles (`streamed` only).
        more: further rows of a tile, which have sums of their own (`streamed` only).
    """

    rows: int
    outputs: int
    features: int
    stages: int
    warps: int
    splits: int
    persistent: bool = False
    more: int = 0


def tiling_for(
    num_rows: int, num_outputs: int, num_features: int, *, fp8: bool, may_split: bool = True
) -> Tiling | None:
    """Return the tiling to use; None where the vendor's library is the better choice.

    The choices are measured ones (bench/fast-step.md), for an H100. Rings as deep as shared memory
    allows: the rows' tiles, too, take microseconds to come. Without `may_split` there is one part.
    """
    features = 128 if fp8 else 64  # a line of shared memory
    if num_rows > MAX_ROWS or num_outputs % 128 or num_features % (features * 4):
        return None
    splits = 2 if num_outputs <= 8192 and may_split else 1  # else too few programs
    has_many_tiles = num_outputs // 64 > 2 * MULTIPROCESSORS
    is_one_wave = MULTIPROCESSORS // 2 < num_outputs // 128 <= MULTIPROCESSORS
    if num_rows <= 32:
        rows = 16 if num_rows <= 16 else 32
        if is_one_wave and not fp8:
            return Tiling(rows, 128, features * 2, 4, 8, 1)
        if not fp8 or has_many_tiles:
            return Tiling(rows, 64, features * 2, 8, 4, splits, persistent=fp8)
        stages = 12 if num_features > 8192 else 9  # 9: two programs on a processor
        return Tiling(rows, 64, features, stages, 4, splits)
    if num_rows > 128:
        is_head = num_outputs // 64 > 8 * MULTIPROCESSORS
        if num_rows > (256 if fp8 and not is_head else 192) or (is_head and not fp8):
            return None
        more, ring = next(x for x in ((32, 7), (64, 6), (128, 5)) if num_rows <= 128 + x[0])
        if is_one_wave:
            return Tiling(128, 128, features, ring - 1, 8, 1, more=more)
        return Tiling(128, 64, features, ring, 4, splits, has_many_tiles, more)
    rows, ring = (64, 12) if num_rows <= 64 else (128, 8)
    if has_many_tiles:
        return Tiling(rows, 64, features * 2, ring // 2, 4, 1, persistent=True)
    if is_one_wave:
        if rows == 64 and not fp8:
            return Tiling(64, 128, features * 2, 4, 8, 1)
        stages, warps = (8, 4) if rows == 64 else (6, 8)
        return Tiling(rows, 128, features, stages, warps, 1)
    return Tiling(rows, 64, features, ring, 4, splits)


def skinny_product_reference(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    *,
    tiling: Tiling,
    dtype: torch.dtype,
) -> Tensor:
    """Return [S, M, N] parts of `dtype` whose sum over S is x times the weight's transpose.

    Args:
        x: [M, K].
        weight: [N, K].
        weight_scale: [N] fp32 of an fp8 weight; None for a plain one.
        tiling: S is its number of splits.
        dtype: of the parts; fewer bytes to write and read count for more than their rounding.
    """
    rows, columns = x.dequantised(), weight.float()
    if weight_scale is not None:
        columns = columns * weight_scale[:, None]
    pairs = zip(rows.chunk(tiling.splits, 1), columns.chunk(tiling.splits, 1), strict=True)
    parts = torch.stack([row @ column.T for row, column in pairs])
    return parts.to(dtype)


def skinny_product(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    *,
    tiling: Tiling,
    dtype: torch.dtype,
) -> Tensor:
    """Do what `skinny_product_reference` does.

    K must be a multiple of the tiling's features times its splits, N of its outputs.
    """
    num_rows, num_features = x.values.shape
    num_outputs = weight.shape[0]
    device = weight.device
    shape = (tiling.splits, num_rows, num_outputs)
    parts = torch.empty(shape, device=device, dtype=dtype)
    rows = TensorDescriptor.from_tensor(x.values, [tiling.rows, tiling.features])
    columns = TensorDescriptor.from_tensor(weight, [tiling.outputs, tiling.features])
    grid = (num_outputs // tiling.outputs, tiling.splits, -(-num_rows // tiling.rows))
    pdl = overlaps(device)
    _product[grid](
        rows, columns, parts, x.scale, weight_scale, num_rows, num_outputs,
        num_features // tiling.splits,
        ROWS=tiling.rows, OUTPUTS=tiling.outputs, FEATURES=tiling.features, PDL=pdl,
        num_warps=tiling.warps, num_stages=tiling.stages, launch_pdl=pdl,
    )  # fmt: skip
    return parts


@jit
def _product(
    rows, columns, parts, row_scales, column_scales, num_rows, num_outputs, share,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, FEATURES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first_output = tl.program_id(0) * OUTPUTS
    split = tl.program_id(1)
    first_row = tl.program_id(2) * ROWS
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for first in range(split * share, (split + 1) * share, FEATURES):
        x = rows.load([first_row, first])
        weight = columns.load([first_output, first])
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
    output = first_output + tl.arange(0, OUTPUTS)
    row = first_row + tl.arange(0, ROWS)
    if column_scales is not None:
        total = total * tl.load(column_scales + output)[:, None]
    if row_scales is not None:
        total = total * tl.load(row_scales + row, mask=row < num_rows, other=0.0)[None, :]
    at = (split * num_rows + row).to(tl.int64)[:, None] * num_outputs + output[None, :]
    value = tl.trans(total).to(parts.dtype.element_ty)
    tl.store(parts + at, value, mask=(row < num_rows)[:, None])
