"""SamplingNoise: the uniform numbers that a session's sampling draws.

Pure. A number depends on seed, step and canvas position only, so an answer does not change with
what else runs in the batch, with where the window happens to start, or with the backend.
"""

import struct
from hashlib import shake_128

from d2f_runtime.decoding.window import Window

__all__ = ["SamplingNoise"]

PAGE = 64  # positions that one hash covers
_WORDS = struct.Struct(f"<{PAGE}Q")


class SamplingNoise:
    """One number in [0, 1) for each position of each step, from a 64-bit seed, signed or not."""

    def __init__(self, seed: int) -> None:
        self._seed = seed % 2**64

    def uniforms(self, window: Window, step: int) -> list[float]:
        """Return [E] numbers; 0.0 for leading positions that are not asked, which draw nothing."""
        num_known = window.num_to_cache - window.num_to_verify
        behind = [position + 1 for position in window.branch_positions()]
        first, last = window.start + num_known, max(window.stop, *behind, 0)
        start, stop = first // PAGE, last // PAGE + 1
        numbers = [number for page in range(start, stop) for number in self._page(step, page)]
        skipped = start * PAGE
        drawn = numbers[first - skipped : window.stop - skipped]
        return [0.0] * num_known + drawn + [numbers[position - skipped] for position in behind]

    def _page(self, step: int, page: int) -> list[float]:
        digest = shake_128(struct.pack("<QQQ", self._seed, step, page)).digest(_WORDS.size)
        return [(word >> 11) * 2.0**-53 for word in _WORDS.unpack(digest)]
