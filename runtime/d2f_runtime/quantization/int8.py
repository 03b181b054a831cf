"""int8: weights as bytes with one scale per output, in the format of LLM.int8 (arXiv 2208.07339).

The weights alone are quantised here; the rows of a product stay in bf16, so that no outlier has to
be kept apart.

Shapes: N outputs, K features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["Int8Weight", "quantise_int8"]

LARGEST: Final = 127.0
PART: Final = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it
ROWS: Final = 4096  # outputs that are quantised at once: their fp32 copies take memory


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight [N, K].

    Attributes:
        values: [N, K] int8.
        absmax: [N] fp32, the largest magnitude of each row; bitsandbytes calls it SCB.
    """

    values: Tensor
    absmax: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        outputs, features = self.values.shape
        return outputs, features

    @property
    def scales(self) -> Tensor:
        """[N] fp32 that the values of each row must be multiplied by."""
        return self.absmax * PART

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return [N, K], bit for bit what bitsandbytes makes of it."""
        return (self.values * self.absmax[:, None] * PART).to(dtype)

    @classmethod
    def joined(cls, weights: Sequence["Int8Weight"], join: Callable[..., Tensor]) -> "Int8Weight":
        """Return the weights joined along their outputs; see `Nf4Weight.joined`."""
        absmax = join(*[w.absmax[:, None] for w in weights])
        return cls(join(*[w.values for w in weights]), absmax.flatten())


def quantise_int8(weight: Tensor) -> Int8Weight:
    """Quantise a weight [N, K] of any floating dtype row by row, as bitsandbytes does."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for first in range(0, weight.shape[0], ROWS):
        piece = slice(first, first + ROWS)
        rows = weight.detach()[piece].float()
        absmax[piece] = rows.abs().amax(dim=1)
        factor = torch.where(absmax[piece] > 0, LARGEST / absmax[piece], 0.0)
        values[piece] = (rows * factor[:, None]).round().to(torch.int8)
    return Int8Weight(values, absmax)
