"""LowBitLinear: a weight of 4 or 8 bits on the device, and the product that suits it.

Shapes: M rows, N outputs, K features, S parts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.activation import Activation
from d2f_runtime.kernels.fragments import TILE, PackedCodes, pack_codes, pack_scales
from d2f_runtime.kernels.gluon import HAS_GLUON
from d2f_runtime.kernels.language import is_hopper
from d2f_runtime.kernels.low_bit import low_bit_product
from d2f_runtime.kernels.low_bit_tiling import STRIDES, LowBitTiling, low_bit_tiling
from d2f_runtime.kernels.streamed_low_bit import streamed_low_bit_product
from d2f_runtime.quantization.nf4 import Nf4Weight
from d2f_runtime.quantization.stored import QuantizedWeight

__all__ = ["LowBitLinear", "pack_low_bit"]

ZERO_CODE = {4: 7, 8: 128}  # of the weight 0


class LowBitLinear:
    """A weight [N, K] of 4 or 8 bits; the rows come plain.

    Up to 256 rows the codes become bf16 in the product's registers. More rows, such as a prompt's,
    are worth one dequantised copy, which lasts as long as the product.
    """

    takes_fp8 = False

    def __init__(self, packed: PackedCodes) -> None:
        self.packed = packed

    @property
    def weight(self) -> Tensor:
        """What is stored."""
        return self.packed.words

    @property
    def num_bytes(self) -> int:
        """What a step reads of it."""
        return self.packed.num_bytes

    def __call__(self, x: Activation) -> Tensor:
        """Return [M, N] in the model's dtype."""
        tiling = self._tiling(x, may_split=False)
        if tiling is None:
            return low_bit_product(x.values, self.packed)
        return self._product(x, tiling)[0]

    def parts(self, x: Activation) -> Tensor:
        """Return [S, M, N] in the model's dtype, to be summed over S by the reader."""
        tiling = self._tiling(x)
        if tiling is None:
            return low_bit_product(x.values, self.packed)[None]
        return self._product(x, tiling)

    def gated(self, x: Activation) -> Tensor | None:
        """Return [M, N / 2], gates applied to ups; None where there is no kernel for it."""
        tiling = self._tiling(x, may_split=False)
        return None if tiling is None else self._product(x, tiling, gated=True)[0]

    def _product(self, x: Activation, tiling: LowBitTiling, *, gated: bool = False) -> Tensor:
        return streamed_low_bit_product(
            x.values, self.packed, tiling=tiling, dtype=x.values.dtype, gated=gated
        )

    def _tiling(self, x: Activation, *, may_split: bool = True) -> LowBitTiling | None:
        if x.values.dtype != torch.bfloat16 or not (HAS_GLUON and is_hopper(x.values.device)):
            return None
        bits = self.packed.bits
        return low_bit_tiling(x.values.shape[0], *self.packed.shape, bits=bits, may_split=may_split)


def pack_low_bit(weight: QuantizedWeight) -> PackedCodes | None:
    """Lay a weight as the kernels read it; None where its sizes do not allow it.

    N must be a multiple of 64, and blocks must end where every 64th feature does. Features are
    filled up with zeros.
    """
    bits = 4 if isinstance(weight, Nf4Weight) else 8
    outputs, features = weight.shape
    if outputs % TILE:
        return None
    more = -features % STRIDES[bits]
    if isinstance(weight, Nf4Weight):
        if features % weight.block or weight.block % TILE:
            return None
        codes = weight.codes_by_row()
        scales = pack_scales(F.pad(weight.scales_by_row(), (0, more // TILE)))
    else:
        codes = (weight.values.to(torch.int16) + ZERO_CODE[8]).to(torch.uint8)
        scales = weight.scales
    codes = F.pad(codes, (0, more), value=ZERO_CODE[bits])
    return PackedCodes(pack_codes(codes, bits=bits), scales, bits, (outputs, features + more))
