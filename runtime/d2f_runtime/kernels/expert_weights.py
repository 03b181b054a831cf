"""ExpertWeights: the weights of a layer's experts in one tensor, in 16, 8 or 4 bits.

Fewer than 16 bits lie in tiles of 64 outputs and 128 (4 bits) or 64 features, 16 words to an
output. A matrix instruction takes 16 features, and of them a thread two that follow each other:
eight such instructions, or four, use up a tile, and a thread's two words hold what it needs for all
of them. Of 4 bits, even instructions take the tile's first 64 features and odd ones the others, so
that each has one scale.

Shapes: E experts, N outputs, K features.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_runtime.kernels.fragments import NF4_VALUES

__all__ = ["TILE", "ExpertWeights", "pack_fp8", "pack_nf4"]

TILE: Final = 64  # outputs of a tile
FEATURES: Final = {4: 128, 8: 64}  # of a tile, by the bits of a weight
ZERO: Final = 7  # the code of the weight 0


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Weights [E, N, K].

    Attributes:
        values: [E, N, K] in the model's dtype, or the words of tiles [E, N / 64, K / 128 or 64, 64,
            16] int32; N and K are filled up with zeros to whole tiles.
        scales: of 8 bits (e4m3) [E, N] fp32; of 4 bits (nf4) [E, N / 64, K / 128, 64, 2] bf16, of
            the two halves of a tile's features; else None.
    """

    values: Tensor
    scales: Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a weight."""
        if self.scales is None:
            return self.values.element_size() * 8
        return 8 if self.scales.dim() == 2 else 4

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, N and K as they are stored."""
        experts, outputs, features = self.values.shape[:3]
        if self.scales is None:
            return experts, outputs, features
        return experts, outputs * TILE, features * FEATURES[self.bits]

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        held = [self.values] if self.scales is None else [self.values, self.scales]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def of(self, expert: int) -> Tensor:
        """Return an expert's weight [N, K] in fp32; in fp64 where it is stored so."""
        values = self.values[expert]
        if self.scales is None:
            return values if values.dtype == torch.float64 else values.float()
        if self.bits == 4:
            return _unpacked_nf4(values, self.scales[expert])
        return _unpacked_fp8(values).float() * self.scales[expert][:, None]

    @classmethod
    def stacked(
        cls, experts: Iterable[tuple[Tensor, Tensor | None]], number: int
    ) -> "ExpertWeights":
        """Copy experts one by one into one tensor.

        Args:
            experts: values and scales of each, as `values[0]` and `scales[0]` of the result.
            number: E.
        """
        values: Tensor | None = None
        scales: Tensor | None = None
        for index, (value, scale) in enumerate(experts):
            if values is None:
                values = value.new_empty((number, *value.shape))
                scales = None if scale is None else scale.new_empty((number, *scale.shape))
            values[index] = value
            if scales is not None and scale is not None:
                scales[index] = scale
        assert values is not None
        return cls(values, scales)


def pack_nf4(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out codes [N, K] uint8 and scales [N, K / 64].

    Returns:
        Words [N / 64, K / 128, 64, 16] int32 and scales [N / 64, K / 128, 64, 2] bf16, filled up
        with zeros.
    """
    outputs, features = codes.shape
    more = (0, -features % FEATURES[4], 0, -outputs % TILE)
    codes = F.pad(codes, more, value=ZERO)
    # tile, output; tile; half; instruction / 2; thread, its two features
    parts = codes.view(codes.shape[0] // TILE, TILE, -1, 2, 2, 2, 8, 2)
    # instruction / 4 (which word), then of a word's nibbles: instruction / 2 % 2, half, feature
    parts = parts.permute(0, 2, 1, 6, 4, 5, 3, 7)
    pairs = parts.reshape(-1, 2)  # a byte's low half comes first
    words = (pairs[:, 0] | (pairs[:, 1] << 4)).view(torch.int32)
    blocks = F.pad(scales, (0, more[1] // 64, 0, more[3])).bfloat16()
    blocks = blocks.view(-1, TILE, codes.shape[1] // FEATURES[4], 2).transpose(1, 2)
    return words.view(*blocks.shape[:3], 16), blocks.contiguous()


def pack_fp8(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out values [N, K] e4m3 with scales [N] fp32.

    Returns:
        Words [N / 64, K / 64, 64, 16] int32 and scales [N], filled up with zeros.
    """
    outputs, features = values.shape
    more = (0, -features % FEATURES[8], 0, -outputs % TILE)
    codes = F.pad(values.view(torch.uint8), more)
    # tile, output; tile; which word, instruction % 2; thread, its two features
    parts = codes.view(codes.shape[0] // TILE, TILE, -1, 2, 2, 8, 2)
    words = parts.permute(0, 2, 1, 5, 3, 4, 6).reshape(-1).view(torch.int32)
    return words.view(parts.shape[0], -1, TILE, 16), F.pad(scales, (0, more[3]))


def _unpacked_fp8(words: Tensor) -> Tensor:
    """Return the values [N, K] of what `pack_fp8` returns."""
    tiles, steps = words.shape[:2]
    parts = words.contiguous().view(torch.uint8).view(tiles, steps, TILE, 8, 2, 2, 2)
    codes = parts.permute(0, 2, 1, 4, 5, 3, 6).reshape(tiles * TILE, steps * FEATURES[8])
    return codes.view(torch.float8_e4m3fn)


def _unpacked_nf4(words: Tensor, scales: Tensor) -> Tensor:
    """Return the weight [N, K] fp32 of what `pack_nf4` returns."""
    values = words.contiguous().view(torch.uint8)
    codes = torch.stack([values & 15, values >> 4], dim=-1)
    tiles, steps = words.shape[:2]
    parts = codes.view(tiles, steps, TILE, 8, 2, 2, 2, 2).permute(0, 2, 1, 6, 4, 5, 3, 7)
    table = torch.tensor(NF4_VALUES, device=words.device).bfloat16().float()
    found = table[parts.reshape(tiles, TILE, steps, 2, 64).int()]
    found = found * scales.float().transpose(1, 2)[..., None]
    return found.reshape(tiles * TILE, steps * FEATURES[4])
