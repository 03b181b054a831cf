"""How a product with a weight of 4 or 8 bits is cut. Plain Python, no torch.

The choices are measured ones (bench/fast-step.md), for an H100.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["MAX_ROWS", "LowBitTiling", "low_bit_tiling"]

MAX_ROWS: Final = 256  # beyond, the weight is better dequantised for the library
MAX_SPLITS: Final = 8
OUTPUTS: Final = 64
STRIDES: Final = {4: 256, 8: 128}  # features that a thread loads at once, by the bits of a code


@dataclass(frozen=True, slots=True)
class LowBitTiling:
    """How a product is cut: rows and outputs of a tile, stages of rows, warps, splits, look-ahead.

    `ahead`, 1 or 2, counts the loads of codes under way, 256 (4 bits) or 128 (8 bits) features
    each. `more` further rows of a tile have sums of their own.
    """

    rows: int
    outputs: int
    stages: int
    warps: int
    splits: int
    ahead: int = 2
    more: int = 0


def low_bit_tiling(
    num_rows: int, num_outputs: int, num_features: int, *, bits: int, may_split: bool = True
) -> LowBitTiling | None:
    """Return the tiling to use; None beyond MAX_ROWS.

    A product is split until there are enough programs, two to four for each multiprocessor, to hide
    the latency of their loads.
    """
    if num_rows > MAX_ROWS:
        return None
    more = 0
    if num_rows <= 16:
        rows, stages, ahead, programs = 16, 8, 2, 512
    elif num_rows <= 32:
        rows, stages, ahead, programs = 32, 20, 2, 512
    elif num_rows <= 64:
        rows, stages, ahead, programs = 64, 8, 1, 512
    elif num_rows <= 128:
        rows, programs = 128, 256
        stages, ahead = (6, 1) if bits == 4 else (4, 2)
    elif num_rows <= 192:
        rows, stages, ahead, programs = 128, 4, 1, 256
        more = 32 if num_rows <= 160 else 64
    else:
        rows, stages, ahead, programs = 256, 6, 2, 128
    splits = 1
    if may_split:
        steps = num_features // STRIDES[bits]
        wanted = max(1, min(MAX_SPLITS, programs * OUTPUTS // num_outputs))
        splits = -(-steps // -(-steps // wanted))  # so that none is left without work
    return LowBitTiling(rows, OUTPUTS, stages, 4, splits, ahead, more)
