"""Weights of 4 and 8 bits as they lie in memory: in the order in which matrix units take them.

A tile is 64 outputs by 64 features, one after the other along the features. Of a tile, each of 128
threads owns what Hopper's matrix instruction wants in its registers (of 16 outputs a warp: two
outputs, eight apart, and of every 16 features four), 16 bytes at a time, so that a thread's load is
wide, a warp's is contiguous, and nothing has to change places afterwards.

Shapes: N outputs, a multiple of 64, and K features, a multiple of 256 (4 bits) or 128 (8 bits).
"""

import struct
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "NF4_VALUES",
    "TILE",
    "PackedCodes",
    "nf4_bytes",
    "pack_codes",
    "pack_scales",
    "unpack_codes",
    "unpack_scales",
]

TILE: Final = 64  # outputs and features of a tile; features of a 4-bit block

NF4_VALUES: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat4, quantiles of a normal distribution (QLoRA, arXiv 2305.14314)."""

# Where the bits of an output n and a feature k of a tile go, for 4 and 8 bits: from the highest bit
# of a place in memory to the lowest. The last ones count the codes of a 32-bit word.
_ORDERS: Final = {
    4: ("n5", "n4", "n2", "n1", "n0", "k2", "k1", "k5", "k4", "k3", "n3", "k0"),
    8: ("k5", "n5", "n4", "n2", "n1", "n0", "k2", "k1", "k4", "k3", "n3", "k0"),
}
_SCALE_ORDER: Final = ("n5", "n4", "n2", "n1", "n0")


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """A weight [N, K] on the device.

    Attributes:
        words: [N K bits / 32] int32, the codes; of 8 bits they are 128 too large.
        scales: 4 bits: [N / 64, K / 256, 32, 4, 2] bf16, one for every 64 features of an output;
            8 bits: [N] fp32, one for each output.
        bits: of a code.
        shape: N, K; of the features some at the end may be there for the tiles' sake, all zero.
    """

    words: Tensor
    scales: Tensor
    bits: int
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """What a product reads of it."""
        return self.words.numel() * 4 + self.scales.numel() * self.scales.element_size()


def pack_codes(codes: Tensor, *, bits: int) -> Tensor:
    """Return the words of codes [N, K] uint8, of which the lowest `bits` bits count."""
    tiles = _by_bits(codes, bits)
    if bits == 4:
        pairs = tiles.reshape(-1, 2)  # a byte's low half comes first
        tiles = pairs[:, 0] | (pairs[:, 1] << 4)
    return tiles.reshape(-1).view(torch.int32)


def unpack_codes(words: Tensor, shape: tuple[int, int], *, bits: int) -> Tensor:
    """Return the codes [N, K] uint8 of what `pack_codes` returns."""
    values = words.view(torch.uint8)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], dim=1)
    order = _ORDERS[bits]
    tiles = values.reshape(shape[0] // TILE, shape[1] // TILE, *[2] * 12)
    places = [2 + order.index(f"{side}{bit}") for side in "nk" for bit in range(5, -1, -1)]
    return tiles.permute(0, *places[:6], 1, *places[6:]).reshape(shape)


def pack_scales(scales: Tensor) -> Tensor:
    """Lay scales [N, K / 64], one for each block of 64 features, as the kernel reads them.

    Returns [N / 64, K / 256, 32, 4, 2] bf16: two outputs, eight apart, lie side by side; of the
    others, four blocks.
    """
    outputs, blocks = scales.shape
    bits = scales.bfloat16().reshape(outputs // TILE, *[2] * 6, blocks // 4, 4)
    names = [f"n{bit}" for bit in range(5, -1, -1)]
    places = [1 + names.index(name) for name in _SCALE_ORDER]
    laid = bits.permute(0, 7, *places, 8, 1 + names.index("n3"))
    return laid.reshape(outputs // TILE, blocks // 4, 32, 4, 2).contiguous()


def unpack_scales(scales: Tensor) -> Tensor:
    """Return [N, K / 64] fp32 of what `pack_scales` returns."""
    groups, quads = scales.shape[:2]
    bits = scales.float().reshape(groups, quads, *[2] * 5, 4, 2)  # as _SCALE_ORDER, block, n3
    order = [*_SCALE_ORDER, "block", "n3"]
    places = [2 + order.index(f"n{bit}") for bit in range(5, -1, -1)]
    return bits.permute(0, *places, 1, 2 + order.index("block")).reshape(groups * TILE, quads * 4)


def nf4_bytes() -> tuple[int, ...]:
    """Return the bytes of the 16 values in bf16, four to a number: the high ones, the low ones."""
    rounded = torch.tensor(NF4_VALUES).bfloat16().view(torch.int16).tolist()
    halves = [struct.pack("<h", value) for value in rounded]
    high, low = (bytes(half[byte] for half in halves) for byte in (1, 0))
    return struct.unpack("<8I", high + low)


def _by_bits(codes: Tensor, bits: int) -> Tensor:
    """Return [N / 64, K / 64, 4096], each tile in its order in memory."""
    outputs, features = codes.shape
    split = codes.reshape(outputs // TILE, *[2] * 6, features // TILE, *[2] * 6)
    places = {f"n{bit}": 1 + 5 - bit for bit in range(6)}
    places |= {f"k{bit}": 8 + 5 - bit for bit in range(6)}
    return split.permute(0, 7, *[places[name] for name in _ORDERS[bits]]).contiguous()
