"""Noise: an answer cut into windows of blocks, and the masks that a D2F step would find there.

Pure numpy. Blocks are counted from their window's start, which is random: a draft can begin behind
any verified token. Verified decoding meets windows of one block that is all masks; without
verification several blocks are drafted at a time, the first of which is the fullest. Where an
answer was decoded with a draft, its windows stand where decoding began them.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Noise", "NoisyAnswer"]

LOWEST: Final = 0.05  # mask ratios of a window's first block
HIGHEST: Final = 0.95

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class NoisyAnswer:
    """One noisy copy of an answer, N positions.

    Attributes:
        place: [N] in the answer; windows may overlap.
        window: [N] number of the window.
        window_start: [N] place in the answer where it begins.
        block: [N] number of the block in its window.
        masked: [N] bool.
        learns: [N] bool, whether the row learns the token behind its own. Of windows of one block
            the last row does, too, where the answer goes on: its draft is the token behind it.
    """

    place: Ints
    window: Ints
    window_start: Ints
    block: Ints
    masked: NDArray[np.bool_]
    learns: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Noise:
    """Draws noisy copies; see the fields of the same names in DraftSettings.

    Attributes:
        window_blocks: of a window, at most.
        all_masked: share of the windows that are all masks.
    """

    window_blocks: int = 1
    all_masked: float = 1.0

    def draw(self, random: np.random.Generator, length: int, block_size: int) -> NoisyAnswer:
        """Draw one noisy copy.

        Args:
            random: the source of every draw.
            length: of the answer, tokens.
            block_size: tokens.
        """
        span = self.window_blocks * block_size
        first = int(random.integers(1, span + 1))  # the first window is cut short
        place = np.arange(length, dtype=np.int32)
        window = np.where(place < first, 0, 1 + (place - first) // span).astype(np.int32)
        start = np.where(window == 0, 0, first + (window - 1) * span).astype(np.int32)
        block = ((place - start) // block_size).astype(np.int32)
        ratio = self._ratios(random, int(window[-1]) + 1)
        masked = random.random(length) < ratio[window, block]
        same = np.append(window[1:] == window[:-1], False)
        if self.window_blocks == 1:
            same[:-1] |= masked[:-1]
        learns = np.append(masked[1:], False) & same
        return NoisyAnswer(place, window, start, block, masked, learns)

    @staticmethod
    def behind(begins: NDArray[np.int64], length: int, block_size: int) -> NoisyAnswer:
        """Return the windows of masks that decoding met; they may overlap.

        Args:
            begins: [W] places in the answer, rising.
            length: of the answer, tokens.
            block_size: tokens.
        """
        sizes = np.minimum(block_size, length - begins)
        window = np.repeat(np.arange(len(begins), dtype=np.int32), sizes)
        start = np.repeat(begins, sizes).astype(np.int32)
        in_window = np.arange(len(window)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        place = (start + in_window).astype(np.int32)
        masked = np.ones(len(window), np.bool_)
        return NoisyAnswer(place, window, start, np.zeros_like(window), masked, place + 1 < length)

    def _ratios(self, random: np.random.Generator, num_windows: int) -> NDArray[np.float64]:
        """Return mask ratios [windows, blocks], rising within a window."""
        ratio = np.empty((num_windows, self.window_blocks))
        ratio[:, 0] = random.uniform(LOWEST, HIGHEST, num_windows)
        for block in range(1, self.window_blocks):
            ratio[:, block] = random.uniform(ratio[:, block - 1], 1.0)
        ratio[random.random(num_windows) < self.all_masked] = 1.0
        return ratio
