"""Weights of 4 and 8 bits, dequantised from where `fragments` has them; the plain product of them.

For products of many rows, and for GPUs whose matrix units the streamed product was not written for:
the weight is written out once and multiplied by the vendor's library.

Shapes: M rows, N outputs, K features.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.fragments import (
    NF4_VALUES,
    TILE,
    PackedCodes,
    unpack_codes,
    unpack_scales,
)
from d2f_runtime.kernels.language import gdc_launch_dependents, gdc_wait, jit, overlaps, tl

__all__ = ["dequantise", "dequantise_reference", "low_bit_product"]


def dequantise_reference(weight: PackedCodes) -> Tensor:
    """Return the weight [N, K] in fp32."""
    codes = unpack_codes(weight.words, weight.shape, bits=weight.bits)
    if weight.bits == 8:
        return (codes.float() - 128) * weight.scales[:, None]
    scales = unpack_scales(weight.scales)
    values = _nf4_values(codes.device)[codes.int()].view(*scales.shape, TILE)
    return (values * scales[:, :, None]).view(weight.shape)


def dequantise(weight: PackedCodes, dtype: torch.dtype) -> Tensor:
    """Do what `dequantise_reference` does, in `dtype`; one program for each tile."""
    outputs, features = weight.shape
    out = torch.empty(weight.shape, device=weight.words.device, dtype=dtype)
    pdl = overlaps(out.device)
    _dequantise[(features // TILE, outputs // TILE)](
        weight.words, weight.scales, _nf4_values(out.device), out, features,
        BITS=weight.bits, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out


def low_bit_product(x: Tensor, weight: PackedCodes) -> Tensor:
    """Return [M, N], x [M, K or less] times the dequantised weight's transpose, in x's dtype."""
    dense = dequantise(weight, x.dtype) if x.is_cuda else dequantise_reference(weight).to(x.dtype)
    return F.linear(x, dense[:, : x.shape[1]])


@functools.cache
def _nf4_values(device: torch.device) -> Tensor:
    return torch.tensor(NF4_VALUES, device=device)


@jit
def _dequantise(words, scales, values, out, features, BITS: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tiles = features // 64
    tile = tl.program_id(1) * tiles + tl.program_id(0)
    n, k = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    output = tl.program_id(1) * 64 + n
    # the inverse of fragments' orders
    at = (n & 7) * 16 + (n // 16) * 128 + (k // 2 & 3) * 4
    if BITS == 4:
        at += (k // 16 & 1) + (k // 32) * 2
        shift = (k & 1) * 4 + (n // 8 & 1) * 8 + (k // 8 & 1) * 16
        word = tl.load(words + tile.to(tl.int64) * 512 + at)
        value = tl.load(values + ((word >> shift) & 15))
        quad = tile // tiles * (tiles // 4) + tile % tiles // 4
        place = ((n & 7) + (n // 16) * 8) * 8 + tile % 4 * 2 + (n // 8 & 1)
        value *= tl.load(scales + quad * 256 + place).to(tl.float32)
    else:
        at += (k // 8 & 1) + (k // 16 & 1) * 2 + (k // 32) * 512
        shift = (k & 1) * 8 + (n // 8 & 1) * 16
        word = tl.load(words + tile.to(tl.int64) * 1024 + at)
        value = (((word >> shift) & 255) - 128).to(tl.float32)
        value *= tl.load(scales + output)
    place = output.to(tl.int64) * features + tl.program_id(0) * 64 + k
    tl.store(out + place, value.to(out.dtype.element_ty))
