"""NF4: weights as 4-bit codes with one scale per block, in the format of bitsandbytes.

The weight is read row by row as one long vector and cut into blocks; a block's scale is its largest
magnitude, and each element becomes the nearest of 16 quantiles of a normal distribution (QLoRA,
arXiv 2305.14314). Two codes share a byte, the earlier one in its upper half.

Shapes: N outputs, K features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from d2f_runtime.kernels.fragments import NF4_VALUES

__all__ = ["BLOCK", "Nf4Weight", "dequantised_blocks", "quantise_nf4"]

BLOCK: Final = 64
SMALLEST: Final = 1e-38  # of a block's largest magnitude; a block of zeros is divided by it
PIECE: Final = 1 << 26  # elements that are quantised at once: their fp32 copies take memory


@dataclass(frozen=True, slots=True)
class Nf4Weight:
    """A weight [N, K].

    Attributes:
        codes: [N K / 2] uint8, two codes each.
        absmax: [N K / block] fp32, of each block.
        shape: N, K.
        block: elements of a block.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    block: int = BLOCK

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return [N, K], bit for bit what bitsandbytes makes of it."""
        values = torch.tensor(NF4_VALUES, device=self.codes.device)
        flat = dequantised_blocks(self._flat_codes(), values, self.absmax, self.block)
        return flat.to(dtype).view(self.shape)

    def codes_by_row(self) -> Tensor:
        """Return [N, K] uint8, one code each."""
        return self._flat_codes().view(self.shape)

    def scales_by_row(self) -> Tensor:
        """Return [N, K / 64] fp32.

        Raises:
            ValueError: the blocks do not end where rows do, or at every 64th feature.
        """
        outputs, features = self.shape
        if features % self.block or self.block % BLOCK:
            raise ValueError(
                f"blocks of {self.block} do not divide rows of {features} features into pieces "
                f"of {BLOCK}"
            )
        by_row = self.absmax.view(outputs, features // self.block)
        return by_row.repeat_interleave(self.block // BLOCK, dim=1)

    @property
    def by_rows(self) -> bool:
        """Whether blocks end where rows do."""
        return self.shape[1] % self.block == 0

    @classmethod
    def joined(
        cls, weights: Sequence["Nf4Weight"], join: Callable[..., Tensor]
    ) -> "Nf4Weight | None":
        """Return the weights joined along their outputs; None where their blocks do not allow it.

        Args:
            weights: of equal K.
            join: takes tensors [N, ...] and orders their rows, whatever these hold.
        """
        blocks = {weight.block for weight in weights}
        if len(blocks) > 1 or not all(weight.by_rows for weight in weights):
            return None
        codes = join(*[w.codes.view(w.shape[0], -1) for w in weights])
        absmax = join(*[w.absmax.view(w.shape[0], -1) for w in weights])
        shape = (codes.shape[0], weights[0].shape[1])
        return cls(codes.flatten(), absmax.flatten(), shape, blocks.pop())

    def _flat_codes(self) -> Tensor:
        return torch.stack([self.codes >> 4, self.codes & 15], dim=1).flatten()


def quantise_nf4(weight: Tensor) -> Nf4Weight:
    """Quantise a weight [N, K] of any floating dtype, as bitsandbytes does.

    Raises:
        ValueError: the number of elements is odd.
    """
    outputs, features = weight.shape
    if outputs * features % 2:
        raise ValueError(f"{outputs} x {features} weights do not fill bytes of two 4-bit codes")
    values = torch.tensor(NF4_VALUES, device=weight.device)
    bounds = (values[:-1] + values[1:]) / 2
    found = [
        _quantise_piece(piece, bounds)
        for piece in torch.split(weight.detach().flatten(), PIECE)  # a multiple of the block
    ]
    codes, absmax = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Nf4Weight(codes, absmax, (outputs, features))


def dequantised_blocks(codes: Tensor, values: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Return fp32 values of flat codes, each block times its scale; the last may be short."""
    found = values[codes.int()]
    whole = codes.numel() // block * block
    scaled = found[:whole].view(-1, block) * absmax[: whole // block, None]
    if whole == codes.numel():
        return scaled.flatten()
    return torch.cat([scaled.flatten(), found[whole:] * absmax[-1]])


def _quantise_piece(weights: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    flat = weights.float()
    rest = -flat.numel() % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, rest)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]).clamp(-1, 1)
    codes = torch.bucketize(scaled.flatten()[: flat.numel()], bounds, out_int32=True)
    pairs = codes.to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], absmax
