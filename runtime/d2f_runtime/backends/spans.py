"""Spans: contiguous parts of one linear store. Plain Python; first fit, neighbours rejoin.

Contiguous, because a single row's K/V is then a view of the pool: no gather, no page table.
"""

from bisect import bisect_left

__all__ = ["Spans"]


class Spans:
    """The free parts of `size` places, as ascending, disjoint, non-adjacent half-open spans."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size else []

    @property
    def num_free(self) -> int:
        """Free places in all; a fragmented store may still refuse a span of that length."""
        return sum(stop - start for start, stop in self._free)

    def reserve(self, length: int) -> int | None:
        """Reserve `length` places and return the first; None where no free span is long enough."""
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= length:
                rest = (start + length, stop)
                self._free[index : index + 1] = [rest] if rest[0] < stop else []
                return start
        return None

    def free(self, start: int, length: int) -> None:
        """Return a span that `reserve` handed out."""
        if not length:
            return
        stop = start + length
        index = bisect_left(self._free, (start, stop))
        low = high = index
        if index > 0 and self._free[index - 1][1] == start:
            low, start = index - 1, self._free[index - 1][0]
        if index < len(self._free) and self._free[index][0] == stop:
            high, stop = index + 1, self._free[index][1]
        self._free[low:high] = [(start, stop)]
