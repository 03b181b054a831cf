"""Loops: where a text has begun to repeat itself."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["loop_lengths"]

LONGEST: Final = 64  # period, tokens
SHORTEST_TAIL: Final = 48  # tokens that must repeat, or twice the period
MOST: Final = max(SHORTEST_TAIL, 2 * LONGEST) + LONGEST


def loop_lengths(tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many tokens at each text's end repeat what stands before them; 0 is no loop.

    Args:
        tokens: [E, L], each text from its beginning.
        lengths: [E] of each.
    """
    found = np.zeros(len(tokens), np.int64)
    rows = (lengths >= MOST).nonzero()[0]
    if not len(rows):
        return found
    places = lengths[rows, None] - MOST + np.arange(MOST)
    tails = np.take_along_axis(tokens[rows], places, axis=1)
    for period in range(1, LONGEST + 1):
        tail = max(SHORTEST_TAIL, 2 * period)
        same = (tails[:, -tail:] == tails[:, -tail - period : -period]).all(axis=1)
        found[rows] = np.maximum(found[rows], np.where(same, tail, 0))
    return found
