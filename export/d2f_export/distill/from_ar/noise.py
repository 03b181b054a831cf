"""Noise: an answer cut into windows of blocks, and the masks that a D2F step would find there.

Pure numpy. A window is up to WINDOW_BLOCKS blocks, the first of which is the fullest. Blocks are
counted from the window's start, which is random: once blocks are verified, one can begin anywhere.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["WINDOW_BLOCKS", "NoisyAnswer", "draw_blank", "draw_noise"]

WINDOW_BLOCKS: Final = 4
ALL_MASKED: Final = 0.4  # share of the windows; after a verified commit all that follows is masks
LOWEST: Final = 0.05  # mask ratios of a window's first block
HIGHEST: Final = 0.95

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class NoisyAnswer:
    """One noisy copy of an answer of A tokens.

    Attributes:
        window: [A] number of the window.
        window_start: [A] place in the answer where it begins.
        block: [A] number of the block in its window.
        masked: [A] bool.
    """

    window: Ints
    window_start: Ints
    block: Ints
    masked: NDArray[np.bool_]


def draw_noise(random: np.random.Generator, length: int, block_size: int) -> NoisyAnswer:
    """Draw one noisy copy.

    Args:
        random: the source of every draw.
        length: of the answer, tokens.
        block_size: tokens.
    """
    noise = _windows(random, length, block_size, WINDOW_BLOCKS * block_size)
    ratio = _ratios(random, int(noise.window[-1]) + 1)
    masked = random.random(length) < ratio[noise.window, noise.block]
    return NoisyAnswer(noise.window, noise.window_start, noise.block, masked)


def draw_blank(random: np.random.Generator, length: int, block_size: int) -> NoisyAnswer:
    """Draw windows of a single block that is all masks: what one step can draft."""
    return _windows(random, length, block_size, block_size)


def _windows(random: np.random.Generator, length: int, block_size: int, span: int) -> NoisyAnswer:
    first = int(random.integers(1, span + 1))  # the first window is cut short
    place = np.arange(length, dtype=np.int32)
    window = np.where(place < first, 0, 1 + (place - first) // span).astype(np.int32)
    start = np.where(window == 0, 0, first + (window - 1) * span).astype(np.int32)
    block = ((place - start) // block_size).astype(np.int32)
    return NoisyAnswer(window, start, block, np.ones(length, np.bool_))


def _ratios(random: np.random.Generator, num_windows: int) -> NDArray[np.float64]:
    """Return mask ratios [windows, blocks], rising within a window."""
    ratio = np.empty((num_windows, WINDOW_BLOCKS))
    ratio[:, 0] = random.uniform(LOWEST, HIGHEST, num_windows)
    for block in range(1, WINDOW_BLOCKS):
        ratio[:, block] = random.uniform(ratio[:, block - 1], 1.0)
    ratio[random.random(num_windows) < ALL_MASKED] = 1.0
    return ratio
