"""How matrices [N_i, K] are stored whole: joined, turned round, in bytes or in blocks of 4 bits.

Shapes: N outputs over all matrices, K inputs.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from d2f_export.onnx.graph_builder import Array
from d2f_export.onnx.matrix_rows import by_rows

__all__ = ["INT4_BLOCK", "joined", "pack_int4", "pack_int8", "transposed"]

INT4_BLOCK: Final = 32
INT8_PAIR: Final = 127.0
"""Levels of two neighbouring inputs together, 128 once rounded: without VNNI, x86 kernels add their
products with rows' levels, of 255 at most, in 16 bits, which would overflow silently."""
TORCH: Final = {"float32": torch.float32, "float16": torch.float16}


def pack_int8(matrices: Sequence[Tensor]) -> list[Array]:
    """Return int8 [K, N] and fp32 scales [N] of matrices [N_i, K]."""
    num_out, num_in = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
    levels = np.empty((num_in, num_out), np.int8)
    scales = np.empty(num_out, np.float32)

    def convert(first: int, rows: Array) -> None:
        pairs = _largest_pairs(rows)
        scale = np.where(pairs > 0, pairs / INT8_PAIR, 1.0).astype(np.float32)
        columns = slice(first, first + len(rows))
        scales[columns] = scale
        levels[:, columns] = np.rint(rows / scale[:, None]).astype(np.int8).T

    by_rows(matrices, convert)
    return [levels, scales]


def pack_int4(matrices: Sequence[Tensor], dtype: str) -> list[Array]:
    """Return [N, blocks, 16] bytes, the lower half first, and scales [N blocks].

    A weight is (level - 8) * scale, levels 0 to 15; the largest of a block, whatever its sign, is
    level 0, so that all sixteen are of use.
    """
    num_out, num_in = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
    num_blocks = -(-num_in // INT4_BLOCK)
    packed = np.empty((num_out, num_blocks, INT4_BLOCK // 2), np.uint8)
    scales = np.empty((num_out, num_blocks), dtype)

    def convert(first: int, rows: Array) -> None:
        padding = num_blocks * INT4_BLOCK - num_in
        blocks = np.pad(rows, ((0, 0), (0, padding))).reshape(len(rows), num_blocks, INT4_BLOCK)
        at = np.abs(blocks).argmax(axis=2)[:, :, None]
        scale = (np.take_along_axis(blocks, at, axis=2)[:, :, 0] / -8).astype(dtype)
        divisor = np.where(scale == 0, 1, scale).astype(np.float32)
        levels = np.rint(blocks / divisor[:, :, None] + 8).clip(0, 15).astype(np.uint8)
        packed[first : first + len(rows)] = levels[:, :, ::2] | levels[:, :, 1::2] << 4
        scales[first : first + len(rows)] = scale

    by_rows(matrices, convert)
    return [packed, scales.reshape(-1)]


def joined(matrices: Sequence[Tensor], dtype: str) -> Array:
    """Return [N, K] of matrices [N_i, K]."""
    return np.concatenate([matrix.to(TORCH[dtype]).numpy() for matrix in matrices])


def transposed(matrices: Sequence[Tensor], dtype: str) -> Array:
    """Return [K, N] of matrices [N_i, K]."""
    num_out, num_in = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
    out = np.empty((num_in, num_out), dtype)

    def convert(first: int, rows: Array) -> None:
        out[:, first : first + len(rows)] = rows.T

    by_rows(matrices, convert)
    return out


def _largest_pairs(rows: Array) -> Array:
    """Return the largest sum of two neighbours' magnitudes in each row of [n, K]."""
    sizes = np.abs(rows)
    if sizes.shape[1] == 1:
        return sizes[:, 0]
    pairs: Array = (sizes[:, 1:] + sizes[:, :-1]).max(axis=1)
    return pairs
