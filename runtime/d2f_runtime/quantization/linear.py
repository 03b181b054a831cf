"""PackedLinear: a weight as it lies on the device, and the product that suits it.

The model asks only what kind of rows a product takes and then calls it. A further format is one
more class with these methods and one more name in `pack`; those of 4 and 8 bits are in
`low_bit_linear`.

Shapes: M rows, N outputs, K features, S parts.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.activation import FP8, Activation, quantise_rows
from d2f_runtime.kernels.gluon import HAS_GLUON
from d2f_runtime.kernels.language import HAS_TRITON, is_hopper
from d2f_runtime.kernels.rope import Rotation
from d2f_runtime.kernels.skinny import Tiling, skinny_product, tiling_for
from d2f_runtime.kernels.streamed import streamed_product, streamed_rotation
from d2f_runtime.quantization.low_bit_linear import LowBitLinear, pack_low_bit
from d2f_runtime.quantization.stored import LOW_BIT, StoredWeight, dense, quantise

__all__ = ["DenseLinear", "Fp8Linear", "PackedLinear", "pack", "rotated"]


class PackedLinear(Protocol):
    """A linear layer without bias."""

    @property
    def takes_fp8(self) -> bool:
        """Whether the rows must come quantised."""
        ...

    @property
    def num_bytes(self) -> int:
        """What a step reads of it."""
        ...

    @property
    def weight(self) -> Tensor:
        """What is stored, [N, ...]."""
        ...

    def __call__(self, x: Activation) -> Tensor:
        """Return [M, N] in the model's dtype."""
        ...

    def parts(self, x: Activation) -> Tensor:
        """Return [S, M, N] in the model's dtype, to be summed over S by the reader."""
        ...

    def gated(self, x: Activation) -> Tensor | None:
        """Return [M, N / 2], gates applied to ups, in the model's dtype; None where it cannot.

        The outputs are laid as by `kernels.gate.interleave`.
        """
        ...


class DenseLinear:
    """A weight [N, K] in the model's dtype."""

    takes_fp8 = False

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def num_bytes(self) -> int:
        """What a step reads of it."""
        return self.weight.numel() * self.weight.element_size()

    def __call__(self, x: Activation) -> Tensor:
        """Return [M, N] in the model's dtype."""
        tiling = _tiling(x, self.weight, fp8=False, may_split=False)
        if tiling is None:
            return F.linear(x.values, self.weight)
        return _product(x, self.weight, None, tiling=tiling, dtype=self.weight.dtype)[0]

    def parts(self, x: Activation) -> Tensor:
        """Return [S, M, N] in the model's dtype, to be summed over S by the reader."""
        tiling = _tiling(x, self.weight, fp8=False)
        if tiling is None:
            return F.linear(x.values, self.weight)[None]
        return _product(x, self.weight, None, tiling=tiling, dtype=self.weight.dtype)

    def gated(self, x: Activation) -> Tensor | None:
        """Return [M, N / 2], gates applied to ups; None where there is no kernel for it."""
        tiling = _tiling(x, self.weight, fp8=False, may_split=False)
        return _gated(x, self.weight, None, tiling=tiling, dtype=self.weight.dtype)


class Fp8Linear:
    """A weight [N, K] in fp8 (e4m3), one scale per output; the rows come with one scale each."""

    takes_fp8 = True

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self.weight, self.scale = _quantise(weight)

    @property
    def num_bytes(self) -> int:
        """What a step reads of it."""
        return self.weight.numel() + self.scale.numel() * 4

    def __call__(self, x: Activation) -> Tensor:
        """Return [M, N] in the model's dtype."""
        tiling = _tiling(x, self.weight, fp8=True, may_split=False)
        if tiling is None:
            return self._library_product(x)
        return _product(x, self.weight, self.scale, tiling=tiling, dtype=self.dtype)[0]

    def parts(self, x: Activation) -> Tensor:
        """Return [S, M, N] in the model's dtype, to be summed over S by the reader."""
        tiling = _tiling(x, self.weight, fp8=True)
        if tiling is None:
            return self._library_product(x)[None]
        return _product(x, self.weight, self.scale, tiling=tiling, dtype=self.dtype)

    def gated(self, x: Activation) -> Tensor | None:
        """Return [M, N / 2], gates applied to ups; None where there is no kernel for it."""
        tiling = _tiling(x, self.weight, fp8=True, may_split=False)
        return _gated(x, self.weight, self.scale, tiling=tiling, dtype=self.dtype)

    def _library_product(self, x: Activation) -> Tensor:
        assert x.scale is not None, "the rows must come quantised"
        if not x.values.is_cuda:
            weight = self.weight.float() * self.scale[:, None]
            return (x.dequantised() @ weight.T).to(self.dtype)
        return torch._scaled_mm(
            x.values,
            self.weight.t(),
            scale_a=x.scale[:, None],
            scale_b=self.scale[None, :],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ).to(self.dtype)


def pack(weight: StoredWeight, quantization: str, dtype: torch.dtype) -> PackedLinear:
    """Store a weight [N, K] for the step.

    Args:
        weight: dense in `dtype`, or quantised.
        quantization: "fp8", "nf4", "int8", or anything else for `dtype`.
        dtype: the model's.
    """
    if quantization == "fp8":
        return Fp8Linear(dense(weight, dtype))
    if quantization not in LOW_BIT:
        return DenseLinear(dense(weight, dtype))
    stored = quantise(weight, quantization) if isinstance(weight, Tensor) else weight
    packed = pack_low_bit(stored)
    return DenseLinear(stored.dequantised(dtype)) if packed is None else LowBitLinear(packed)


def rotated(layer: PackedLinear, x: Activation, rotation: Rotation) -> Tensor | None:
    """Return what `rope.rotate_and_store` makes of a merged projection, [M, H, hd].

    The outputs are laid as by `kernels.rope.interleave`. None where no kernel does both at once.
    """
    if not HAS_GLUON or rotation.norms is not None:
        return None
    match layer:
        case DenseLinear():
            scale, dtype = None, layer.weight.dtype
        case Fp8Linear():
            scale, dtype = layer.scale, layer.dtype
        case _:
            return None
    tiling = _tiling(x, layer.weight, fp8=layer.takes_fp8, may_split=False)
    num_kv, size = rotation.keys.shape[1:]
    if tiling is None or num_kv * size % tiling.outputs:
        return None
    return streamed_rotation(x, layer.weight, scale, tiling=tiling, dtype=dtype, rotation=rotation)


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp8 [N, K] and scales [N]; piece by piece, since an fp32 copy of all is large."""
    values = torch.empty(weight.shape, device=weight.device, dtype=FP8)
    scale = torch.empty(weight.shape[0], device=weight.device, dtype=torch.float32)
    for first in range(0, weight.shape[0], 4096):
        piece = slice(first, first + 4096)
        quantised = quantise_rows(weight[piece])
        assert quantised.scale is not None
        values[piece] = quantised.values
        scale[piece] = quantised.scale
    return values, scale


def _product(
    x: Activation, weight: Tensor, scale: Tensor | None, *, tiling: Tiling, dtype: torch.dtype
) -> Tensor:
    product = streamed_product if HAS_GLUON else skinny_product
    return product(x, weight, scale, tiling=tiling, dtype=dtype)


def _gated(
    x: Activation,
    weight: Tensor,
    scale: Tensor | None,
    *,
    tiling: Tiling | None,
    dtype: torch.dtype,
) -> Tensor | None:
    if tiling is None or not HAS_GLUON:
        return None
    return streamed_product(x, weight, scale, tiling=tiling, dtype=dtype, gated=True)[0]


def _tiling(x: Activation, weight: Tensor, *, fp8: bool, may_split: bool = True) -> Tiling | None:
    """Return how our own kernel would cut the product, where it is the better choice.

    On Hopper only: the rings of the tilings do not fit into smaller shared memories.
    """
    if not HAS_TRITON or weight.dtype == torch.float32 or not is_hopper(weight.device):
        return None
    return tiling_for(x.values.shape[0], *weight.shape, fp8=fp8, may_split=may_split)
